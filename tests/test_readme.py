"""The README is true: every flag and every logged number is explained, every file it names is there."""

import re
from pathlib import Path

import main

ROOT = Path(main.__file__).parent
README = (ROOT / "README.md").read_text()


def test_every_flag_is_explained_with_its_default():
    for action in main.build_parser()._actions:
        if action.dest != "help":
            starts = (f"| `--{action.dest} ", f"| `--{action.dest}`")
            rows = [line for line in README.splitlines() if line.startswith(starts)]
            assert len(rows) == 1, action.dest
            assert action.help.replace("%%", "%") in rows[0], action.dest


def test_no_flag_is_explained_that_is_not_there():
    known = {action.dest for action in main.build_parser()._actions}
    named = set(re.findall(r"`--([a-z_0-9]+)", README)) - {"output_dir", "no"}
    assert named <= known | {"watch", "no_report", "plots_dir", "preset"}


def test_every_file_it_names_is_there():
    named = re.findall(r"\]\((?!http|#)([^)#]+)", README) + re.findall(r"`([a-z_]+\.py)`", README)
    missing = sorted({name for name in named if not (ROOT / name).exists()})
    assert not missing


def test_every_objective_is_in_its_table():
    for name in main.OBJECTIVES:
        assert f"| `{name}`" in README
