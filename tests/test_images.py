"""tools/images/make.sh, which makes the pictures of README.md and tools/BENCHMARKS.md."""

import json
import os
import re
import subprocess

from conftest import ROOT

from deepfm_train_eval import make_parser

SCRIPT = ROOT / "tools" / "images" / "make.sh"
TRAINER = {f"--{action.dest}" for action in make_parser()._actions}


def test_it_makes_every_picture_of_the_pages():
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "tools/BENCHMARKS.md"))
    pictures = set(re.findall(r"images/(\w+\.png)", pages))
    assert len(pictures) > 1 and pictures <= set(re.findall(r"\w+\.png", SCRIPT.read_text()))
    assert {path.name for path in (ROOT / "tools" / "images").glob("*.png")} >= pictures


def test_its_options_exist():
    tools = "".join((ROOT / "tools" / name).read_text() for name in re.findall(r"tools/(\w+\.py)", SCRIPT.read_text()))
    for option in set(re.findall(r"--\w+", SCRIPT.read_text())):
        assert option in TRAINER or f'"{option}"' in tools, option


def test_step_png_from_a_measurement(tmp_path):
    runs = {name: [{"ms_per_step": ms} for ms in (9.0, 10.0)] for name in ("trainer lazy", "matrix products")}
    (tmp_path / "step.json").write_text(json.dumps({"settings": {"batch_size": 64, "fields": 5}, "runs": runs}))
    done = subprocess.run(["bash", str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "STEP_JSON": "step.json", "OUT": "."})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "step.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "training.png").exists()
