"""Faults of a run that need no process of their own: bad flags, other machines, replaced files, careless rewards."""

import re
import shlex
from pathlib import Path

import pytest

import config
import run

TESTS = Path(__file__).parent


@pytest.mark.parametrize("once", ["--resume runs/a/checkpoints/step_000003", "--resume", "--overwrite_output_dir"])
@pytest.mark.parametrize("python", ["python", "uv run"])
def test_the_resume_command_keeps_every_flag(monkeypatch, once, python):
    """--resume may be anywhere among the flags; those after it must not be lost."""
    monkeypatch.setattr(run, "PYTHON", python)
    before, after = "--beta 0", "--output_dir 'runs/my run' --dataset_name clock --dataset_options size=56 style=bold"
    settings = config.parse_args(shlex.split(f"{before} {once} {after}"))
    assert run.resume_command(settings) == f"{python} main.py {before} {after} --resume"


def test_the_table_of_faults_names_existing_tests():
    table = (TESTS.parent / "docs/faults.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", table)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (TESTS / file).read_text(), f"{file}::{test}"
    survival = re.findall(r"^def (test_\w+)", (TESTS / "test_survival.py").read_text(), re.MULTILINE)
    assert set(survival) <= {test for _, test in named}
