"""README and launcher say what the programs do."""

import re

import pytest
from conftest import ROOT

from deepfm_train_eval import make_parser

README = (ROOT / "README.md").read_text()


def parser_arguments():
    return {action.dest: action for action in make_parser()._actions if action.dest != "help"}


def readme_arguments():
    table = README.split("## Arguments description")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| (\w+) \| ([^|]*?) \|", table, re.M)[1:])


def test_the_table_has_every_argument_with_its_default():
    table = readme_arguments()
    arguments = parser_arguments()
    assert list(table) == sorted(table, key=list(table).index) and set(table) == set(arguments)
    special = {"num_train_samples", "num_val_samples", "num_test_samples", "table_size_array", "log_dir"}
    for name, action in arguments.items():
        if name in ("data_dir", "persistent_path", "persistent_path_fm"):
            assert action.default is None and table[name] == "required"
        elif name in special:
            assert action.default is None and table[name] != "None"
        else:
            assert table[name] == str(action.default), name


def test_options_in_the_readme_exist():
    tools = "\n".join(path.read_text() for path in [*(ROOT / "tools").glob("*.py"), ROOT / "train_deepfm_criteo_x4.sh"])
    for option in set(re.findall(r"--([a-z][a-z0-9_]+)", README)):
        known = option in parser_arguments() or f'"--{option}"' in tools or f"--{option} " in tools
        assert known, option


def test_files_and_links_exist():
    section = README.split("## Directory description")[1].split("```")[1]
    for name in re.findall(r"^([\w/.]+)", section, re.M):
        assert (ROOT / name).exists(), name
    anchors = {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
               for title in re.findall(r"^#+ (.+)$", README, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("option", re.findall(r"(--\w+) [\w.,-]+", (ROOT / "train_deepfm_criteo_x4.sh").read_text()
                                              .split("RECIPE=(")[1].split(")")[0]))
def test_options_of_the_recipe_exist(option):
    assert option[2:] in parser_arguments()
