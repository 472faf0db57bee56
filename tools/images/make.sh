#!/usr/bin/env bash
# Make the pictures of README.md and tools/BENCHMARKS.md again, in this folder or in OUT: training.png and calibration.png
# from two runs on the synthetic sample, about a minute on 2 cores; step.png from what benchmark.py measured:
#
#   bash tools/images/make.sh
#   python tools/benchmark.py step --peer /path/to/python/with/torch --repeats 5 --steps 16 --json step.json
#   STEP_JSON=step.json bash tools/images/make.sh
set -euo pipefail
root=$(readlink -f "$(dirname "${BASH_SOURCE[0]}")/../..")
out=$(readlink -f "${OUT:-$root/tools/images}")
step_json=${STEP_JSON:+$(readlink -f "$STEP_JSON")}
rows=${ROWS:-250000}
python=$(bash "$root/tools/setup_env.sh")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

train() { # name, further arguments
  "$python" "$root/deepfm_train_eval.py" --data_dir data/mine --persistent_path "runs/$1/tables" \
    --persistent_path_fm "runs/$1/tables_fm" --dnn 64,64 --embedding_vec_size 8 --batch_size 2000 "${@:2}"
}

predict() { # name
  "$python" "$root/deepfm_train_eval.py" --model_load_dir "runs/$1/best_checkpoint" --predict data/mine/test \
    --predict_output "$1.parquet" --keep_columns Label
}

if [[ -n $step_json ]]; then
  "$python" - "$root/tools" "$step_json" "$out/step.png" <<'PYTHON'
import json
import sys

sys.path.insert(0, sys.argv[1])
import benchmark

with open(sys.argv[2]) as file:
    benchmark.plot_step(json.load(file), sys.argv[3])
PYTHON
  exit
fi
"$python" "$root/tools/make_criteo_sample.py" --output_dir data/raw --num_rows "$rows"
"$python" "$root/tools/criteo_parquet.py" --input_dir data/raw --output_dir data/mine
train small --model_save_dir runs/small --train_batches 600 --patience 5
train fast --model_save_dir runs/fast --train_batches 600 --patience 1 --learning_rate 0.01
"$python" "$root/tools/plot_training.py" runs/small runs/fast --output "$out/training.png"
predict small
predict fast
"$python" "$root/tools/plot_training.py" --calibration small.parquet fast.parquet --output "$out/calibration.png"
