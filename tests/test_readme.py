"""README and launcher say what the programs do."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from deepfm_train_eval import make_parser

README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README, "tools/BENCHMARKS.md": (ROOT / "tools" / "BENCHMARKS.md").read_text()}
TOOLS = ["tests/fuzz.py", *(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")
                            if "def parse_args" in path.read_text())]
BENCHMARKS = ["step", "loader", "eval", "scale", "serve", "convert", "accuracy"]
ORIGINAL = (  # the arguments of the original script, in the order of its table
    "data_dir num_train_samples num_val_samples num_test_samples model_load_dir model_save_dir save_initial_model "
    "save_model_after_each_eval disable_fusedmlp embedding_vec_size dnn net_dropout learning_rate batch_size "
    "train_batches loss_print_interval patience min_delta table_size_array persistent_path persistent_path_fm "
    "store_type cache_memory_budget_mb amp loss_scale_policy").split()


def parser_arguments():
    return {action.dest: action for action in make_parser()._actions if action.dest != "help"}


def readme_arguments():
    """[(name, default)] of the original's table, and then of ours, where a row has the options of a topic."""
    section = README.split("## Options")[1].split("\n## ")[0]
    original, ours = section.split("\nOurs, by topic:\n")
    rows = re.findall(r"^\| ([\w, ]+) \| ([^|]*?) \| [^|]+ \|$", original, re.M)[1:]
    rows = [(name, default) for names, default in rows for name in names.split(", ")]
    return rows + re.findall(r"`--(\w+)` \(([^)]+)\)", "".join(re.findall(r"^\| .* \|$", ours, re.M)))


def test_the_tables_have_every_argument_once_with_its_default():
    arguments, rows = parser_arguments(), readme_arguments()
    names = [name for name, _ in rows]
    assert names[:len(ORIGINAL)] == ORIGINAL
    assert len(set(names)) == len(names) and set(names) == set(arguments)
    special = {"num_train_samples", "num_val_samples", "num_test_samples", "table_size_array", "log_dir"}
    for name, default in rows:
        if name in ("data_dir", "persistent_path", "persistent_path_fm"):
            assert arguments[name].default is None and default == "required"
        elif name in special:
            assert arguments[name].default is None and default != "None"
        else:
            assert default == str(arguments[name].default), name


def commands(page):
    """[(program, its options)] of the commands in a page's code blocks and inline code."""
    blocks = re.findall(r"^```\n(.*?)^```", page, re.M | re.S) + re.findall(r"`([^`\n]+)`", page)
    for line in "\n".join(blocks).replace("\\\n", " ").split("\n"):
        programs = re.findall(r"(?:python3? (?:-m oneflow.distributed.launch .*?)?|bash )([\w/]+\.(?:py|sh))", line)
        if programs:
            yield programs[-1], set(re.findall(r" --([a-z]\w*)", line.split(programs[-1])[1]))


# each as a script, with its folder first in the path; in one process, which imports OneFlow once
HELP = """
import contextlib, io, json, os, runpy, sys
texts = []
for script, *words in json.load(sys.stdin):
    sys.argv, sys.path[0] = [script, *words], os.path.dirname(script)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert not end.code, script
    assert text.getvalue(), script
    texts.append(text.getvalue())
json.dump(texts, sys.stdout)
"""


@pytest.fixture(scope="module")
def options_of():
    """{program: options in its --help}, of benchmark.py in all its commands'; the launcher takes the trainer's."""
    programs = {program for page in PAGES.values() for program, options in commands(page)
                if program.endswith(".py") or options} | set(TOOLS)
    known, runs = {program: {"help"} for program in programs}, []
    for program in sorted(programs):
        script = str(ROOT / ("deepfm_train_eval.py" if program.startswith("train_deepfm") else program))
        if script.endswith(".sh"):
            text = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True).stdout
            known[program] |= set(re.findall(r"--([a-z]\w*)", text))
        elif "benchmark" in program:
            runs += [(program, [script, word, "--help"]) for word in BENCHMARKS]
        else:
            runs.append((program, [script, "--help"]))
    done = subprocess.run([sys.executable, "-c", HELP], input=json.dumps([run for _, run in runs]), text=True,
                          stdout=subprocess.PIPE, check=True)
    for (program, _), text in zip(runs, json.loads(done.stdout)):
        known[program] |= set(re.findall(r"--([a-z]\w*)", text))
    return known


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_options_of_their_own_program(page, options_of):
    found = [(program, options) for program, options in commands(PAGES[page]) if program.endswith(".py") or options]
    assert len(found) > 3
    for program, options in found:
        assert options <= options_of[program], (program, options - options_of[program])


def test_options_in_the_text_exist(options_of):
    """Those outside of commands, of the trainer or of a tool."""
    known = set(parser_arguments()).union(*(options_of[tool] for tool in TOOLS))
    launcher = {"nproc_per_node", "nnodes", "node_rank", "master_addr"}  # of oneflow.distributed.launch
    for page in PAGES.values():
        assert set(re.findall(r"--([a-z][a-z0-9_]+)", page)) <= known | launcher


def test_the_code_map_is_true():
    section = README.split("## Code map")[1].split("\n## ")[0]
    named = set()
    for name in re.findall(r"`([\w/{},]+\.\w+)`", section):
        start, names, end = re.fullmatch(r"([^{]*)(?:{(.*)})?(.*)", name).groups()
        named |= {start + middle + end for middle in (names or "").split(",")}
    for name in named:
        assert (ROOT / name).is_file(), name
    files = {path for pattern in ("*.py", "*.sh", "tools/*.*", "tools/*/*.py", "requirements.txt")
             for path in ROOT.glob(pattern) if path.is_file() and path.name != "__init__.py"}
    assert {str(path.relative_to(ROOT)) for path in files} <= named


def test_links_exist():
    anchors = {page: {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
                      for title in re.findall(r"^#+ (.+)$", text, re.M)} for page, text in PAGES.items()}
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text):
            if not target.startswith("http"):
                path, _, anchor = target.partition("#")
                path = ((ROOT / page).parent / path).resolve() if path else ROOT / page
                assert path.exists(), target
                assert not anchor or anchor in anchors[str(path.relative_to(ROOT))], target


@pytest.mark.parametrize("option", re.findall(r"(--\w+) [\w.,-]+", (ROOT / "train_deepfm_criteo_x4.sh").read_text()
                                              .split("RECIPE=(")[1].split(")")[0]))
def test_options_of_the_recipe_exist(option):
    assert option[2:] in parser_arguments()
