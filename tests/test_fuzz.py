"""Some seconds of the campaign of fuzz.py with a fixed seed, its ways of damage and its judgement."""

import json

import fuzz
import pytest
from fuzz_inputs import BYTES, PLACES


def test_no_damage_is_silent_or_ends_in_a_traceback():
    table, wrong = fuzz.campaign(seed=0, count=len(fuzz.KINDS), workers=1)
    counts = sum(table.values(), fuzz.Counter())
    assert not wrong, [(kind, seed, found["end"], found["what"]) for kind, seed, found in wrong]
    assert all(sum(ends.values()) == 1 for ends in table.values())
    assert counts["clear line"] > len(table) / 2 and counts["right"] > 0


@pytest.mark.parametrize("status, errors, same, checked, end", [
    (0, "", True, True, "right"),
    (0, "", False, True, "silently other"),
    (0, "", None, True, "silently other"),
    (0, "", False, False, "as it is"),
    (1, "error: x is damaged; do y\n", None, True, "clear line"),
    (1, "error: one\nerror: two\n", None, True, "traceback"),
    (1, "", None, True, "traceback"),
    (3, "error: x\n", None, True, "traceback"),
    (0, "Traceback (most recent call last):\n", True, True, "traceback"),
    ("Traceback ...", "", None, True, "traceback"),
    (-11, "", None, True, "abort"),
    (1, "*** Check failure stack trace: ***\nerror: x\n", None, True, "abort"),
])
def test_judgement(status, errors, same, checked, end):
    assert fuzz.classify(status, errors, same, checked) == end


@pytest.mark.parametrize("errors, end", [("error: one\nerror: two\n", "clear line"), ("error: one\ntwo\n", "traceback"),
                                         ("", "traceback")])
def test_judgement_of_a_program_that_names_every_fault(errors, end):
    assert fuzz.classify(1, errors, None, True, several=True) == end


def test_forged_descriptions_fit_their_fingerprints(tmp_path):
    """So that what no fingerprint can show is tried too."""
    from test_serving import convert, write_rows

    from tools.converter.encoders import Encoder

    convert(tmp_path / "data", write_rows(tmp_path / "rows.csv", 500, 1))
    path, known = tmp_path / "data/dataset_info.json", []
    text = path.read_text()
    for seed in range(20):
        path.write_text(text)
        assert fuzz.forge_info(fuzz.random.Random(seed), path) == "forged info"
        assert path.read_text() != text
        with fuzz.contextlib.suppress(fuzz.UserError):
            known.append(Encoder.load(tmp_path / "data").fingerprint)
    assert json.loads(text)["fingerprint"] not in known or len(set(known)) > 1


def test_workers_that_hang_or_die_are_noticed(monkeypatch):
    for code, timeout, end in (("import time; time.sleep(99)", 0.5, "hang"), ("import os; os.abort()", 20, "abort"),
                               ("print('{\"end\": \"right\"}', flush=True); input(); input()", 20, "right")):
        monkeypatch.setattr(fuzz, "TIMEOUT", timeout)
        worker = fuzz.subprocess.Popen([fuzz.sys.executable, "-c", code], stdin=fuzz.subprocess.PIPE, text=True,
                                       stdout=fuzz.subprocess.PIPE)
        assert fuzz.ask(worker, ("kind", 1))["end"] == end
        worker.kill()


def test_every_way_of_damage_changes_something(tmp_path):
    for way in (*BYTES[:-1], *PLACES):
        path = tmp_path / way
        path.write_bytes(bytes(range(100)))
        rng = fuzz.random.Random(1)
        fuzz.place(rng, path, way) if way in PLACES else fuzz.mutate_bytes(rng, path, way)
        assert not path.is_file() or path.is_symlink() or path.read_bytes() != bytes(range(100)), way
