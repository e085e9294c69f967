"""The README is true: its diffs apply and train, its loop is the code's, every file it names exists."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import config

ROOT = Path(config.__file__).parent
README = (ROOT / "README.md").read_text()
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs", "plots", "docs", "benchmarks", "*.lock")
DIFFS = re.findall(r"^\*\*([^*\n]+)\*\*:[^\n]*\n\n```diff\n(.*?)```", README, re.DOTALL | re.MULTILINE)
STEP = "--max_steps 1 --train_size 8 --eval_size 2 --prompts_per_step 2 --num_generations 4 --max_prompt_length 160 "
STEP += "--max_completion_length 8"
RUNS = {  # what each diff is tried with: the task of the small model, and flags
    "A reward component": ("arithmetic", "--dataset_name arithmetic --dataset_options steps=1"),
    "A loss variant with a new number": (
        "arithmetic",
        "--dataset_name arithmetic --dataset_options steps=1 --objective dual_clip",
    ),
    "A task with a picture": ("correlation", "--dataset_name dots"),
}


def apply(diff: str, folder: Path) -> set[str]:
    """Make the changes of a diff in a copy of the project: each hunk replaces text that occurs once in its file.
    Returns the files it touches."""
    name, files = "", set()
    for place, hunk in re.findall(r"^@@ ?([^\n]*)\n(.*?)(?=^@@|\Z)", diff, re.DOTALL | re.MULTILINE):
        name = re.split(r",| ", place)[0] or name
        old, new = ("".join(line[1:] for line in hunk.splitlines(True) if line[0] in marks) for marks in (" -", " +"))
        text = (folder / name).read_text()
        assert text.count(old) == 1, (name, old)
        (folder / name).write_text(text.replace(old, new))
        files.add(name)
    return files


@pytest.fixture
def changed_copy(tmp_path):
    """-> a function that copies the project and applies a diff of the README to the copy."""

    def make(diff: str) -> Path:
        copy = tmp_path / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        apply(diff, copy)
        return copy

    return make


def test_there_are_the_three_diffs():
    assert [title for title, _ in DIFFS] == list(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize(("title", "diff"), DIFFS)
def test_a_diff_applies_and_trains(title, diff, changed_copy, task_models, tmp_path):
    copy, (task, flags) = changed_copy(diff), RUNS[title]
    command = [sys.executable, "main.py", "--model_path", str(task_models[task]), "--output_dir", str(tmp_path / "run")]
    done = subprocess.run([*command, *flags.split(), *STEP.split()], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "train_logs.json").read_text()
    assert '"step": 1' in log
    assert ("rewards/brevity" in log) == (title == "A reward component")


def test_a_loss_variant_touches_two_files(tmp_path):
    diff = dict(DIFFS)["A loss variant with a new number"]
    for name in ("config.py", "main.py"):
        shutil.copy(ROOT / name, tmp_path)
    assert apply(diff, tmp_path) == {"config.py", "main.py"}
    assert diff.count("@@") == 3


@pytest.mark.slow
def test_a_new_task_passes_the_existing_tests(changed_copy):
    copy = changed_copy(dict(DIFFS)["A task with a picture"])
    tests = ["tests/test_evaluator.py", "tests/test_rldatasets.py", "tests/test_config.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    done = subprocess.run([*command, "-k", "not page and not flags_md"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_loop_it_shows_is_the_code():
    shown = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    code = (ROOT / "main.py").read_text()
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    known = {line.strip() for line in code.splitlines()}
    changed = [line for line in lines if line not in known]
    assert len(changed) <= 2  # two are shortened: .to(device), and the last step's fewer updates


def test_every_file_it_names_exists():
    named = re.findall(r"\]\((?!http|#)([^)#]+)", README) + re.findall(r"`([a-z_]+\.py)`", README)
    assert not sorted({name for name in named if not (ROOT / name).exists()})


def test_it_names_only_flags_that_exist():
    known = {field.name for _, field in config.flag_fields()}
    known |= {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}  # torchrun's
    assert set(re.findall(r"--([a-z_]{3,})", README)) <= known


def test_it_can_be_read_in_one_sitting():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert next(number for number, line in enumerate(lines) if "![" in line) < 12
