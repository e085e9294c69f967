"""The tables of docs/results.md: trains the tiny models, with controls, and prints how much they learned.

    uv run benchmarks/curves.py --output_dir runs/curves --tasks correlation clock arithmetic --seeds 0 1 2

For each task: GRPO with the task's default flags, for every seed; GRPO with shuffled rewards; the warm-up alone, for
longer than warm-up and GRPO together; and the trained models on pictures or problems of another kind. Each run is a
command of main.py, which is printed. A run whose folder has its last evaluation is not repeated, so this script can be
interrupted and started again.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import ROOT, table

from evaluator import Headline, get_evaluator
from progress import format_value
from rldatasets import get_dataset
from run_folder import read_records
from tiny_models import RECIPES, tiny_model

UNSEEN: dict[str, list[dict[str, Any]]] = {  # options that make examples unlike those of the training
    "clock": [{"style": "thin"}, {"rotation": 30}],
    "correlation": [{"num_points": 25}, {"num_points": 200}],
    "arithmetic": [{"steps": 1}, {"steps": 3}],
}
LONGER = {"correlation": 3, "clock": 4, "arithmetic": 5}  # times the warm-up, longer than warm-up and GRPO together
EVALUATION_FLAGS = ("eval_size", "max_prompt_length", "max_completion_length")  # of the task's recipe


def execute(folder: Path, *flags: str) -> Path:
    """Run main.py into `folder`, its output into `folder`.log, unless `folder` has a finished run. Returns `folder`."""
    command = [sys.executable, str(ROOT / "main.py"), *flags, "--output_dir", str(folder)]
    if not finished(folder):
        print("$", shlex.join(["python", "main.py", *command[2:]]), flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f"{folder.name}.log", "w") as log:
            subprocess.run([*command, "--overwrite_output_dir"], check=True, stdout=log, stderr=log)
    return folder


def finished(folder: Path) -> bool:
    """Whether the folder has the evaluation after the run's last step."""
    config = folder / "config.json"
    if not config.is_file():
        return False
    flags = json.loads(config.read_text())["flags"]
    last = 0 if flags["eval_only"] else flags["max_steps"]
    return (folder / "eval_logs" / f"metrics_{last:06}.json").is_file()


def metrics(folder: Path, which: int) -> dict[str, Any]:
    """The metrics of a run's first (0) or last (-1) evaluation."""
    return json.loads(sorted((folder / "eval_logs").glob("metrics_*.json"))[which].read_text())


def grpo_seconds(folder: Path) -> float:
    """Seconds of a run's optimizer steps, without evaluations and checkpoints."""
    return sum(record["seconds/total"] for record in read_records(folder / "train_logs.json"))


def evaluation_flags(task: str, more_options: dict[str, Any]) -> list[str]:
    """Flags of main.py that evaluate a model as in the task's tiny runs, but with `more_options` of the task."""
    defaults = RECIPES[task].defaults
    options = [f"{key}={value}" for key, value in (defaults["dataset_options"] | more_options).items()]
    same = [text for name in EVALUATION_FLAGS for text in (f"--{name}", str(defaults[name]))]
    return ["--dataset_name", task, "--eval_only", *same, "--dataset_options", *options]


def warm_model(task: str, times: int = 1) -> Path:
    """The task's tiny model after a warm-up that is `times` as long as usual."""
    recipe = dataclasses.replace(RECIPES[task], examples=times * RECIPES[task].examples)
    return tiny_model(task, dataset_options=recipe.defaults["dataset_options"], recipe=recipe)


def best_constant(task: str) -> float | None:
    """The highest score of a model that gives the same answer to every test question, None if it is not known."""
    evaluator = get_evaluator(task)
    if not evaluator.right_or_wrong:
        return evaluator.best_constant
    defaults = RECIPES[task].defaults
    dataset = get_dataset(task, "test", defaults["eval_size"], options=defaults["dataset_options"])
    (_, count), *_ = collections.Counter(dataset[i].answer for i in range(len(dataset))).most_common(1)
    return count / len(dataset)


def mean_and_deviation(headline: Headline, values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{format_value(statistics.mean(values), headline.unit)} ± {format_value(deviation, headline.unit)}"


def rows_of(task: str, root: Path, seeds: list[int]) -> list[list[str]]:
    """The rows of a task's table: a description, the score before and after. Does the runs that are missing."""
    headline = get_evaluator(task).headline
    train = ["--model_path", "tiny", "--dataset_name", task, "--seed"]

    def final_score(run: Path) -> float:
        return metrics(run, -1)[headline.metric]

    runs = [execute(root / f"{task}-seed{seed}", *train, str(seed)) for seed in seeds]
    before = format_value(metrics(runs[0], 0)[headline.metric], headline.unit)  # of the warm model, the same for all
    constant = format_value(best_constant(task), headline.unit)
    rows = [["chance", "", format_value(headline.chance, headline.unit)], ["best constant answer", "", constant]]
    for seed, run in zip(seeds, runs, strict=True):
        score = format_value(final_score(run), headline.unit)
        median = metrics(run, -1).get("median_abs_error_minutes")
        after = score if median is None else f"{score}, median {median:.1f}"
        rows.append([f"GRPO, seed {seed}, {grpo_seconds(run):.0f} s", before, after])
    mean = mean_and_deviation(headline, [final_score(run) for run in runs])
    rows.append(["**GRPO, mean ± standard deviation**", before, mean])
    shuffled = execute(root / f"{task}-shuffled", *train, "0", "--shuffle_rewards")
    longer = root / f"{task}-longer-warm-up"
    if not finished(longer):
        execute(longer, "--model_path", str(warm_model(task, LONGER[task])), *evaluation_flags(task, {}))
    for name, run in (
        ("GRPO, rewards shuffled", shuffled),
        (f"the warm-up alone, {LONGER[task]} times as long", longer),
    ):
        rows.append([name, before, format_value(final_score(run), headline.unit)])
    return rows + [unseen_row(task, options, root, runs) for options in UNSEEN[task]]


def unseen_row(task: str, options: dict[str, Any], root: Path, runs: list[Path]) -> list[str]:
    """Generalization: the scores of the warm model and of the trained models with other `options` of the task."""
    headline = get_evaluator(task).headline
    name = "-".join([task, *(f"{key}{value}" for key, value in options.items())])

    def evaluated(model: Path, folder: str) -> float:
        run = execute(root / folder, "--model_path", str(model), *evaluation_flags(task, options))
        return metrics(run, -1)[headline.metric]

    before = format_value(evaluated(warm_model(task), f"{name}-warm"), headline.unit)
    after = [evaluated(newest_checkpoint(run), f"{name}-{run.name}") for run in runs]
    shown = ", ".join(f"{key}={value}" for key, value in options.items())
    return [f"never seen: `{shown}`", before, mean_and_deviation(headline, after)]


def newest_checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/curves")
    parser.add_argument("--tasks", nargs="+", default=["correlation", "clock", "arithmetic"], choices=list(UNSEEN))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    for task in args.tasks:
        rows = rows_of(task, Path(args.output_dir), args.seeds)
        label = get_evaluator(task).headline.label
        print(f"\n{task}: {label}\n{table(['', 'before', 'after'], rows)}\n", flush=True)


if __name__ == "__main__":
    main()
