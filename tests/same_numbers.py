"""Does this checkout compute what another revision computes? For everyone who refactors.

    python tests/same_numbers.py HEAD~3                    # a commit, tag or branch against the files as they are here
    python tests/same_numbers.py HEAD~3 --runs clock       # one run alone

Both sides train the same short runs from the same tiny models, in processes of one thread each. Every logged value is
compared to the last bit, times and memory aside, and so are the answers of the evaluations and the final weights.
Prints each column that differs with its first step and both values; exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_THE_MACHINE = ("seconds", "tokens_per_second", "peak_memory_gb")  # may differ from one run to the next
SHORT = "--max_steps 20 --eval_steps 10 --save_steps 5 --train_size 200 --eval_size 16 --prompts_per_step 4"
SHORT += " --num_generations 4 --max_prompt_length 160 --log_completions_steps 5 --learning_rate 2e-4 --seed 3"
WARM_UP = """
import dataclasses, sys
import tiny_models
task, cache, *options = sys.argv[1:]
recipe = dataclasses.replace(tiny_models.RECIPES[task], examples=1600)
options = dict(option.split("=") for option in options)
print(tiny_models.tiny_model(task, dataset_options=options, cache_dir=cache, recipe=recipe))
"""


@dataclass(frozen=True)
class ShortRun:
    options: str  # the task's options, for the tiny model and the run
    flags: str
    killed_after: int | None = None  # steps, after which the process is killed and the run resumed


RUNS = {
    "correlation": ShortRun(
        "size=56 style=bold", "--max_completion_length 12 --objective grpo --beta 0.02 --micro_batch_tokens 600"
    ),
    "clock": ShortRun("size=56 style=bold", "--max_completion_length 14 --objective dapo --eval_samples 2"),
    "arithmetic": ShortRun(
        "max_number=20",
        "--max_completion_length 32 --objective gspo --num_iterations 2 --lr_scheduler_type cosine",
        killed_after=7,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        there = Path(scratch) / "revision"
        archive = subprocess.run(["git", "archive", args.revision], cwd=ROOT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(there, filter="data")
        differences = [compare(name, RUNS[name], there, Path(scratch)) for name in args.runs]
    return int(any(differences))


def compare(name: str, run: ShortRun, there: Path, scratch: Path) -> bool:
    """Train `run` in both checkouts and print what differs. Returns whether anything does."""
    models = [warm_model(checkout, name, run, scratch / side) for side, checkout in sides(there)]
    values = [train(checkout, name, run, models[0], scratch / side) for side, checkout in sides(there)]
    values = [{("tiny model", ""): digest(model)} | found for model, found in zip(models, values, strict=True)]
    columns: dict[str, list[str]] = {}
    for place in sorted(values[0].keys() | values[1].keys()):
        before, after = (found.get(place, "absent") for found in values)
        if before != after:
            columns.setdefault(place[0], []).append(f"{place[1]}: {short(before)} there, {short(after)} here")
    print(f"{name}: {len(values[0])} values, {len(columns)} columns differ", flush=True)
    for column, found in columns.items():
        print(f"  {column} in {len(found)} places; {found[0]}")
    return bool(columns)


def sides(there: Path) -> tuple[tuple[str, Path], ...]:
    return ("there", there), ("here", ROOT)


def environment(checkout: Path) -> dict[str, str]:
    """One thread, so that sums are added in one order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout), "GRPO_TRACEBACK": "1"}


def warm_model(checkout: Path, task: str, run: ShortRun, scratch: Path) -> Path:
    """The folder of the task's tiny model after a short warm-up in that checkout."""
    command = [sys.executable, "-c", WARM_UP, task, str(scratch), *run.options.split()]
    done = subprocess.run(command, cwd=checkout, env=environment(checkout), check=True, stdout=subprocess.PIPE)
    return Path(done.stdout.decode().splitlines()[-1])


def train(checkout: Path, task: str, run: ShortRun, model: Path, scratch: Path) -> dict[tuple[str, str], object]:
    """Do the run -> everything it logged, by column and place."""
    folder = scratch / f"run-{task}"
    command = [sys.executable, str(checkout / "main.py"), "--model_path", str(model), "--output_dir", str(folder)]
    command += ["--dataset_name", task, "--dataset_options", *run.options.split(), *f"{run.flags} {SHORT}".split()]
    with open(scratch / f"{task}.log", "w") as log:
        options = {"cwd": checkout, "env": environment(checkout), "stdout": log, "stderr": log}
        if run.killed_after is not None:
            process = subprocess.Popen(command, **options)
            while process.poll() is None and steps_logged(folder) < run.killed_after:
                time.sleep(0.01)
            process.kill()
            process.wait()
            command.append("--resume")
        if subprocess.run(command, **options).returncode:
            sys.exit(f"the run of {task} failed in {checkout}:\n{(scratch / f'{task}.log').read_text()[-3000:]}")
    return logged_values(folder)


def steps_logged(folder: Path) -> int:
    log = folder / "train_logs.json"
    return log.read_text().count('"step"') if log.exists() else 0


def logged_values(folder: Path) -> dict[tuple[str, str], object]:
    """{(column, place): value} of the log, the evaluations and the samples; a digest of the last weights."""
    values: dict[tuple[str, str], object] = {}
    for record in json.loads((folder / "train_logs.json").read_text()):
        values |= {(name, f"step {record['step']:03}"): value for name, value in record.items()}
    for path in sorted([*folder.glob("eval_logs/*.json"), *folder.glob("train_samples/*.json")]):
        content = json.loads(path.read_text())
        values |= {(f"{path.parent.name}: {name}", path.name): value for name, value in content.items()}
    for checkpoint in sorted(folder.glob("checkpoints/step_*"))[-1:]:
        values["weights", checkpoint.name] = digest(checkpoint)
    return {
        (column, place): value
        for (column, place), value in values.items()
        if not any(word in column for word in OF_THE_MACHINE)
    }


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


if __name__ == "__main__":
    sys.exit(main())
