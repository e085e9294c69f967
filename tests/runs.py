"""Small runs of main.py for the tests: their flags, fixtures that start them, and readers of what they leave."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import TASK_OPTIONS

HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows
ROOT = Path(__file__).resolve().parent.parent
SMALL = "--device cpu --prompts_per_step 2 --num_generations 4 --max_prompt_length 160 --max_completion_length 16 "
SMALL += "--train_size 24 --eval_size 5 --eval_batch_size 3 --max_steps 4 --eval_steps 2 --save_steps 2 "
SMALL += "--learning_rate 1e-3 --log_completions_steps 2"


def small_flags(task: str, model, output_dir) -> list[str]:
    options = [f"{name}={value}" for name, value in TASK_OPTIONS[task].items()]
    return [
        *("--model_path", str(model), "--dataset_name", task, "--dataset_options", *options),
        *("--output_dir", str(output_dir), *SMALL.split()),
    ]


@pytest.fixture
def small_run(task_models, tmp_path):
    """-> a function that runs main with small flags, of which later ones win, and returns the run folder."""
    import main  # imports torch and transformers, which takes seconds

    def small_run(task, *flags, name="run", status=0):
        flags = [part for flag in flags for part in flag.split()]
        assert main.main([*small_flags(task, task_models[task], tmp_path / name), *flags]) == status
        return tmp_path / name

    with handlers_restored():
        yield small_run


@pytest.fixture
def refused(tmp_path, capsys, task_models):
    """-> a function that runs main, which must refuse its flags and write nothing, and returns the line on stderr."""
    import main

    def refused(*flags, task="arithmetic", model=None):
        model = task_models[task] if model is None else model
        before = names(tmp_path)
        status = main.main([*small_flags(task, model, tmp_path / "run"), *map(str, flags)])
        assert status == 2 and names(tmp_path) == before
        return one_line(capsys.readouterr().err)

    return refused


@contextlib.contextmanager
def handlers_restored():
    """Restore the handlers of the signals for which a run installs its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def one_line(error: str) -> str:
    """What main.py printed on stderr, which must be a single line."""
    assert error.startswith("main.py: ") and error.count("\n") == 1, error
    return error


def python(*arguments, **environment):
    """Python in a new process, in the project's folder -> the completed process, the seconds of CPU time it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# ---------------------------------------------------------------------------------------------------------------------
# Reading a run folder


def read(path: Path):
    return json.loads(path.read_text())


def records(folder: Path) -> list[dict]:
    """The training log without times and memory."""
    measured = ("seconds/", "tokens_per_second", "peak_memory_gb")
    return [
        {key: value for key, value in record.items() if not key.startswith(measured)}
        for record in read(folder / "train_logs.json")
    ]


def evaluations(folder: Path) -> dict[int, dict]:
    """Metrics by step, without how long they took."""
    found = [read(path) for path in sorted((folder / "eval_logs").glob("metrics_*.json"))]
    return {metrics["step"]: {key: value for key, value in metrics.items() if key != "seconds"} for metrics in found}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[Path, bytes]:
    """The bytes of every file of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
