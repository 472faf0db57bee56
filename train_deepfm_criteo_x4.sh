#!/usr/bin/env bash
# Train DeepFM on Criteo_x4 with the recipe of BARS DeepFM_criteo_x4_001. Makes the Python environment when needed.
#
#   bash train_deepfm_criteo_x4.sh                             demo: synthetic sample, a few epochs
#   DATA_DIR=/data/criteo_x4 bash train_deepfm_criteo_x4.sh    the real job, on a folder that a converter in tools/ made
#
# Further arguments go to the trainer and win over those set here: see `python deepfm_train_eval.py --help`.
# The output also goes to run.log in the current folder, without progress bars. The exit status is the trainer's.
#
# Environment variables, all optional:
#   DATA_DIR                folder or URL with train/, val/ and test/ parquet shards
#   MODEL_SAVE_DIR          folder for checkpoints, default none
#   PERSISTENT_PATH         rows of the embedding, default MODEL_SAVE_DIR/tables, or runs/tables
#   PERSISTENT_PATH_FM      rows of the first-order embedding, default MODEL_SAVE_DIR/tables_fm, or runs/tables_fm
#   DEVICE_NUM_PER_NODE     processes on this node; default: one per visible GPU, or without a GPU one per physical core:
#                           the largest number up to 8 that divides the batch
#   OMP_NUM_THREADS         threads per process, default: cores / processes
#   GLIBC_TUNABLES          without a GPU default glibc.malloc.hugetlb=1, large pages for tables and matrices
#   NUM_NODES, NODE_RANK    number of nodes and the number of this one from 0, default 1 and 0
#   MASTER_ADDR             address of node 0, needed for more than one node
#   MASTER_PORT             its port; default: a free one, with more than one node 29500
#   CUDA_VISIBLE_DEVICES    the GPUs to use
#   PYTHON, VENV, ONEFLOW_VERSION   see tools/setup_env.sh
set -euo pipefail
[[ -e /dev/fd/1 ]] || exec >/dev/null # closed
[[ -e /dev/fd/2 ]] || exec 2>/dev/null
script=$(readlink -f "${BASH_SOURCE[0]}")
root=$(dirname "$script")

# Published hyperparameters; the learning rate is cut after every epoch without a gain, and two in a row end the run.
RECIPE=(--embedding_vec_size 16 --dnn 1000,1000,1000,1000,1000 --net_dropout 0.2 --batch_size 10000
  --learning_rate 0.001 --lr_factor 0.1 --min_lr 1e-6 --patience 1 --early_stop_patience 2
  --embedding_l2 1e-5 --max_grad_norm 10)
# The sample has 100 steps an epoch at this batch size.
DEMO=(--batch_size 2000 --train_batches 200 --loss_print_interval 20)
MAX_CPU_PROCESSES=8

# Runs a command that the kernel kills when the process that started it is gone, however that ended.
LIFELINE=$(cat <<'PYTHON'
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; stays when the command takes the place of this program
parent, launcher, command = os.getppid(), int(sys.argv[1]), sys.argv[2:]
if parent != launcher and os.getpgid(parent) != os.getpgrp():  # gone already
    sys.exit(128 + signal.SIGKILL)
os.execv(command[0], command)
PYTHON
)

# Copies all output to where stdout went, fd 3, and to the log. When that is a terminal, it lends one of its own, so that
# programs show progress bars, and leaves the bars out of the log. What is in the file of notes goes before the first
# output, unless that is an error.
RELAY=$(cat <<'PYTHON'
import fcntl, os, signal, sys, termios, tty
from contextlib import suppress

log_path, notes_path = sys.argv[1:]
source, screen, line, log = 0, 3, b"", None

def copy_size(*_):
    with suppress(OSError):
        fcntl.ioctl(source, termios.TIOCSWINSZ, fcntl.ioctl(screen, termios.TIOCGWINSZ, bytes(8)))

def write(file, data):
    with suppress(OSError):  # nobody reads any more, or the disk is full
        while data:
            data = data[os.write(file, data):]

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)  # ends with its input
try:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
except OSError as error:
    write(screen, f"note: cannot write {log_path}: {error.strerror}\n".encode())
terminal = ""
if os.isatty(screen):
    with suppress(OSError):
        source, end = os.openpty()
        terminal = os.ttyname(end)
        tty.setraw(end)
        copy_size()
        signal.signal(signal.SIGWINCH, copy_size)
write(1, terminal.encode() + b"\n")
if terminal:
    os.read(0, 1)  # until the launcher has opened it, or is gone
    os.close(end)
while True:
    try:
        data = os.read(source, 1 << 16)
    except OSError:  # a terminal that all have closed
        data = b""
    with suppress(FileNotFoundError), open(notes_path, "rb") as notes:
        os.remove(notes_path)
        data = data if data.startswith(b"error: ") else notes.read() + data
    write(screen, data)
    if log is not None:
        *lines, line = (line + data).split(b"\n")
        write(log, b"".join(text.rstrip(b"\r").rpartition(b"\r")[2] + b"\n" for text in lines))
        line = line[-(1 << 16):]  # a bar goes on for hours
    if not data:
        break
if log is not None:
    write(log, line.rpartition(b"\r")[2])
PYTHON
)

die() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

# The value that the trainer will see of an option: the last `--name value` or `--name=value`.
option_value() {
  local name=$1 value=""
  shift
  while (($#)); do
    case $1 in
      "$name") value=${2:-} ;;
      "$name"=*) value=${1#*=} ;;
    esac
    shift
  done
  echo "$value"
}

# Ends with a message unless the variable is a whole number in a range; leaves it without leading zeros.
check_number() { # name of the variable, smallest, largest
  local value=${!1}
  [[ $value =~ ^[0-9]{1,9}$ ]] && ((10#$value >= $2 && 10#$value <= $3)) ||
    die "$1=$value is not a whole number from $2 to $3" 2
  printf -v "$1" %d "$((10#$value))"
}

check_environment() {
  check_number NUM_NODES 1 4096
  check_number NODE_RANK 0 4095
  ((NODE_RANK < NUM_NODES)) || die "NODE_RANK=$NODE_RANK is not below NUM_NODES=$NUM_NODES; count nodes from 0" 2
  [[ -z ${DEVICE_NUM_PER_NODE:-} ]] || check_number DEVICE_NUM_PER_NODE 1 256
  [[ -z ${OMP_NUM_THREADS:-} ]] || check_number OMP_NUM_THREADS 1 1024
  [[ -z ${MASTER_PORT:-} ]] || check_number MASTER_PORT 1 65535
  ((NUM_NODES == 1)) || [[ -n ${MASTER_ADDR:-} ]] ||
    die "NUM_NODES=$NUM_NODES needs MASTER_ADDR, the address of node 0" 2
  [[ -z $DATA_DIR || -d $DATA_DIR || $DATA_DIR == *://* ]] ||
    die "DATA_DIR=$DATA_DIR is not a folder; make it with tools/criteo_parquet.py or another converter"
}

count_gpus() {
  # importing OneFlow takes seconds, so only where there may be a GPU
  compgen -G "/dev/nvidia[0-9]*" >/dev/null || [[ -e /dev/dxg ]] || { echo 0; return; }
  "$python" -c 'import oneflow; print(oneflow.cuda.device_count())' 2>/dev/null || echo 0
}

# Physical cores that this process may use: hyperthreads share the units that matrix products need.
count_cores() {
  "$python" - <<'PYTHON'
import os

def read(path):
    try:
        with open(path) as file:
            return file.read().split()
    except OSError:
        return None

cpus = os.sched_getaffinity(0)
siblings = [read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or [cpu] for cpu in cpus]
cores = len({tuple(names) for names in siblings})
quota, period = read("/sys/fs/cgroup/cpu.max") or (  # control groups version 2, then 1
    (read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or ["max"]) + (read("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or ["1"])
)
if quota not in ("max", "-1"):
    cores = min(cores, max(1, int(quota) // int(period)))
print(cores)
PYTHON
}

# Sets `processes` and OMP_NUM_THREADS from the machine, the environment variables and the trainer's arguments.
choose_processes() {
  local batch_size cores gpus=0
  batch_size=$(option_value --batch_size "$@")
  cores=$(count_cores)
  [[ $(option_value --device "$@") == cpu ]] || gpus=$(count_gpus)
  if [[ -n ${DEVICE_NUM_PER_NODE:-} ]]; then
    processes=$DEVICE_NUM_PER_NODE
  elif ((gpus > 0)); then
    processes=$gpus
  else
    processes=$((cores < MAX_CPU_PROCESSES ? cores : MAX_CPU_PROCESSES))
    # the trainer reports a batch size that is not a number
    [[ $batch_size =~ ^[0-9]{1,9}$ ]] || processes=1
    while ((processes > 1 && 10#$batch_size % (processes * NUM_NODES))); do ((processes--)); done
  fi
  # large pages, where the kernel gives them on request only: 6 % less time per step (glibc 2.35 and later)
  ((gpus)) || export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
  describe_layout "$cores" "$gpus" >>"$scratch/notes"
}

# Such as "2 processes with 1 thread each on 2 CPU cores, no GPU"; tools/benchmark.py reads the first two numbers.
describe_layout() { # cores, GPUs
  local text
  text="$(count "$processes" process processes) with $(count "$OMP_NUM_THREADS" thread threads)"
  ((processes == 1)) || text+=" each"
  text+=" on $(count "$1" "CPU core" "CPU cores")"
  (($2)) && text+=" and $(count "$2" GPU GPUs)" || text+=", no GPU"
  ((NUM_NODES == 1)) || text+=", node $NODE_RANK of $NUM_NODES (from 0)"
  echo "$text"
}

count() { # number, singular, plural
  (($1 == 1)) && echo "1 $2" || echo "$1 $3"
}

# Makes the demo's dataset, unless an earlier run did; sets DATA_DIR.
make_demo_data() {
  local raw=$root/data/criteo_sample_raw
  DATA_DIR=$root/data/criteo_sample
  if [[ -f $DATA_DIR/dataset_info.json && -f $raw/sample_info.json ]]; then
    echo "demo: using the sample in $DATA_DIR" >"$scratch/notes"
    return
  fi
  echo "demo: no DATA_DIR given, making a synthetic Criteo sample in $DATA_DIR"
  run "${lifeline[@]}" "$python" "$root/tools/make_criteo_sample.py" --output_dir "$raw"
  run "${lifeline[@]}" "$python" "$root/tools/criteo_parquet.py" --input_dir "$raw" --output_dir "$DATA_DIR"
}

print_best_auc() {
  "$python" -c 'import json, sys; print("demo: best test AUC any model could reach is about %.4f" %
    json.load(open(sys.argv[1]))["best_auc"])' "$root/data/criteo_sample_raw/sample_info.json"
}

# Runs a command in its own process group, so that Ctrl-C or kill ends all of it, and returns its exit status.
run() {
  local status=0
  set -m
  "$@" &
  group=$!
  set +m
  wait "$group" 2>/dev/null || status=$? # without what bash says when a signal ends it
  while kill -0 "$group" 2>/dev/null; do # a signal to this script ended the wait
    status=0
    wait "$group" 2>/dev/null || status=$?
  done
  end_group
  ((signals < 2)) || status=$signal_status # and not what killing it gave
  return "$status"
}

# The processes of the group that live, one a line; an orphan that nobody has waited for does not count.
group_members() {
  { cat /proc/[0-9]*/stat 2>/dev/null || true; } | # some end while they are listed
    awk -v group="$group" '{pid = $1; sub(/.*\) /, "")} $3 == group && $1 != "Z" {print pid}'
}

# Ends what is left of the group; its first process has ended, and the others can do nothing without it.
end_group() {
  local tries
  kill -TERM -- "-$group" 2>/dev/null || true
  for ((tries = 0; tries < 50; tries++)); do
    [[ -n $(group_members) ]] || break
    sleep 0.1
  done
  kill -KILL -- "-$group" 2>/dev/null || true
  group=""
}

on_signal() { # name, number
  local pid members
  signal_status=$((128 + $2))
  if [[ -z $group ]]; then
    exit "$signal_status"
  elif ((signals++)); then
    kill -KILL -- "-$group" 2>/dev/null || true
    wait "$group" 2>/dev/null || true
    return
  fi
  [[ ! -t 2 ]] || printf '\033[2K\r' >&2 # in place of a progress bar
  echo "stopping; once more to stop at once" >&2
  members=$(group_members)
  for pid in $members; do
    # OneFlow's launcher would end the others before they can answer; it ends when one of them does
    [[ $pid == "$group" && $launched == 1 && $members != "$group" ]] || kill -s "$1" "$pid" 2>/dev/null || true
  done
}

on_exit() {
  rm -rf "$scratch"
  # the log is complete when the relay has read all of it
  exec >&- 2>&-
  [[ -z $relay_pid ]] || wait "$relay_pid" 2>/dev/null || true
}

train() {
  local status=0 rank=0 launch
  if ((processes * NUM_NODES == 1)); then
    run "${lifeline[@]}" "$python" -u "$root/deepfm_train_eval.py" "$@" || status=$?
    name_signal
    return "$status"
  fi
  launch=(--nproc_per_node "$processes" --nnodes "$NUM_NODES" --node_rank "$NODE_RANK"
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-$(free_port)}")
  launched=1
  # OneFlow's launcher says much when a process fails and ends with status 1 then. So its output goes to a file that is
  # shown only when it failed by itself; ours passes it as stdin, and each process notes its status.
  run "$BASH" -c 'exec "${@:2}" <&1 >"$1" 2>&1' launch "$scratch/launch.log" "${lifeline[@]}" \
    "$python" -m oneflow.distributed.launch "${launch[@]}" --no_python "${lifeline[@]}" "$BASH" -c '
    trap : INT TERM HUP # the trainer answers them
    exec 3>&0 >/dev/null 2>&1 </dev/null # bash has nothing to say
    "${@:2}" >&3 2>&3 3>&- || { status=$?; echo "$status $RANK" >>"$1"; exit "$status"; }' trainer "$scratch/status" \
    "${lifeline[@]}" "$python" -u "$root/deepfm_train_eval.py" "$@" || status=$?
  if [[ -s $scratch/status ]]; then
    read -r status rank <"$scratch/status" # the first process that failed; others may have been ended because of it
    name_signal
  elif ((signals)); then
    status=$signal_status
  elif ((status)); then
    cat "$scratch/launch.log" >&2
  fi
  return "$status"
}

# Says which signal ended a process that could not say anything itself.
name_signal() {
  ((signals == 0)) || return 0 # it was the user
  case $((status - 128)) in
    9) echo "error: process $rank was killed (SIGKILL); the system does that when memory runs out" >&2 ;;
    4 | 6 | 7 | 8 | 11) echo "error: process $rank crashed (SIG$(kill -l "$status"))" >&2 ;;
  esac
}

free_port() {
  if ((NUM_NODES > 1)); then
    echo 29500
  else
    "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
  fi
}

# From here on all output goes through the relay.
start_relay() {
  local terminal into from log=run.log
  ((NODE_RANK == 0)) || log=run_node$NODE_RANK.log # nodes may share a file system
  exec 3>&1
  coproc relay { exec "$python" -ISc "$RELAY" "$log" "$scratch/notes"; }
  relay_pid=$relay_PID from=${relay[0]} into=${relay[1]}
  read -r terminal <&"$from" || die "the relay of the output did not start"
  if [[ -n $terminal ]]; then exec >"$terminal"; else exec >&"$into"; fi
  exec 2>&1 3>&- {from}<&- {into}>&-
}

main() {
  local options=() save_dir tables tables_fm
  case " $* " in *" --help "* | *" -h "*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$script"
    exit ;;
  esac
  DATA_DIR=$(option_value --data_dir --data_dir "${DATA_DIR:-}" "$@")
  check_environment
  run bash "$root/tools/setup_env.sh" >"$scratch/python"
  python=$(<"$scratch/python")
  lifeline=("$python" -ISc "$LIFELINE" $$)
  start_relay
  options=("${RECIPE[@]}")
  save_dir=$(option_value --model_save_dir --model_save_dir "${MODEL_SAVE_DIR:-}" "$@")
  tables=$(option_value --persistent_path --persistent_path "${PERSISTENT_PATH:-}" "$@")
  tables_fm=$(option_value --persistent_path_fm --persistent_path_fm "${PERSISTENT_PATH_FM:-}" "$@")
  if [[ -z $DATA_DIR ]]; then
    make_demo_data
    options+=("${DEMO[@]}")
    demo=1
  fi
  if ((demo)) && [[ -z $save_dir$tables$tables_fm ]]; then
    # the demo starts afresh each time, but --overwrite_tables never reaches folders that the user named
    tables=$root/data/criteo_sample_tables
    tables_fm=$root/data/criteo_sample_tables_fm
    options+=(--overwrite_tables)
  fi
  options+=(--data_dir "$DATA_DIR" --persistent_path "${tables:-${save_dir:-runs}/tables}"
    --persistent_path_fm "${tables_fm:-${save_dir:-runs}/tables_fm}")
  [[ -z $save_dir ]] || options+=(--model_save_dir "$save_dir")
  options+=("$@")
  choose_processes "${options[@]}"
  train "${options[@]}"
  ((demo == 0)) || print_best_auc
}

NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
group="" signals=0 signal_status=0 launched=0 relay_pid="" demo=0 lifeline=()
scratch=$(mktemp -d)
trap on_exit EXIT
trap 'on_signal INT 2' INT
trap 'on_signal TERM 15' TERM
trap 'on_signal HUP 1' HUP
unset RANK LOCAL_RANK WORLD_SIZE # another launcher's; NUM_NODES and NODE_RANK count here
export -n MASTER_ADDR MASTER_PORT # arguments here; OneFlow 0.8.0 would take them for half of another launcher's
exec </dev/null
main "$@"
