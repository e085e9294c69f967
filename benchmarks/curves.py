"""The learning curves of docs/results.md with their controls: runs what is missing and prints the tables.

    uv run benchmarks/curves.py --output_dir runs/curves --tasks correlation clock arithmetic --seeds 0 1 2

For each task: GRPO from the task's default flags for every seed; GRPO with the rewards dealt out at random; the
warm-up alone, for as long again as GRPO took; and the trained models on what they never saw. Every run is a plain
command and is printed. A run whose folder holds its last evaluation is not repeated, so this can be stopped and started
again.
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

from common import ROOT, table

from evaluator import get_evaluator
from rldatasets import get_dataset
from tiny_models import RECIPES, TINY_DEFAULTS, tiny_model

UNSEEN = {  # options of the pictures that training never showed
    "clock": [{"style": "thin"}, {"rotation": 30}],
    "correlation": [{"num_points": 25}, {"num_points": 200}],
    "arithmetic": [{"steps": 1}, {"steps": 3}],
}
LONGER = {
    "correlation": 3,
    "clock": 4,
    "arithmetic": 5,
}  # warm-ups that take as long as the usual one and GRPO together
SHUFFLED_STEPS = 400  # enough to see that nothing is learned
KEPT = ("eval_size", "max_prompt_length", "max_completion_length")  # flags that an evaluation shares with its run


def execute(folder: Path, *flags: str) -> Path:
    """Run main.py into `folder` unless it is there already, and leave what it said in `folder`.log."""
    command = [sys.executable, str(ROOT / "main.py"), *flags, "--output_dir", str(folder)]
    if not finished(folder):
        print("$", shlex.join(["python", "main.py", *command[2:]]), flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f"{folder.name}.log", "w") as log:
            subprocess.run([*command, "--overwrite_output_dir"], check=True, stdout=log, stderr=log)
    return folder


def finished(folder: Path) -> bool:
    """Is there an evaluation at its last step?"""
    config = folder / "config.json"
    if not config.is_file():
        return False
    flags = json.loads(config.read_text())["flags"]
    last = 0 if flags["eval_only"] else flags["max_steps"]
    return (folder / "eval_logs" / f"metrics_{last:06}.json").is_file()


def metrics(folder: Path, which: int) -> dict:
    """The first (0) or last (-1) evaluation of a run."""
    return json.loads(sorted((folder / "eval_logs").glob("metrics_*.json"))[which].read_text())


def grpo_seconds(folder: Path) -> float:
    """Time of the optimizer steps of a run; evaluations and checkpoints are not in it."""
    return sum(record["seconds/total"] for record in json.loads((folder / "train_logs.json").read_text()))


def evaluation_flags(task: str, more_options: dict) -> list[str]:
    defaults = TINY_DEFAULTS[task]
    options = [f"{key}={value}" for key, value in (defaults["dataset_options"] | more_options).items()]
    kept = [text for name in KEPT for text in (f"--{name}", str(defaults[name]))]
    return ["--dataset_name", task, "--eval_only", *kept, "--dataset_options", *options]


def longer_warm_up(task: str) -> Path:
    """The tiny model of a task after several times the usual warm-up: what more of the same would have given."""
    recipe = dataclasses.replace(RECIPES[task], examples=LONGER[task] * RECIPES[task].examples)
    return tiny_model(task, dataset_options=TINY_DEFAULTS[task]["dataset_options"], recipe=recipe)


def best_constant(task: str) -> float | None:
    """The score of whoever gives the same answer to all test questions, the best there is."""
    evaluator = get_evaluator(task)
    if not evaluator.exact:
        return evaluator.best_constant
    defaults = TINY_DEFAULTS[task]
    dataset = get_dataset(task, "test", defaults["eval_size"], options=defaults["dataset_options"])
    (_, count), *_ = collections.Counter(dataset[i].answer for i in range(len(dataset))).most_common(1)
    return count / len(dataset)


def score(headline, value: float) -> str:
    if headline.unit == "%":
        return f"{100 * value:.1f} %"
    return f"{value:.1f}" if headline.unit else f"{value:.3f}"


def spread(headline, values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{score(headline, statistics.mean(values))} ± {score(headline, deviation)}"


def rows_of(task: str, root: Path, seeds: list[int]) -> list[list[str]]:
    """Run what is missing for a task -> the rows of its table: what, its score before, its score after."""
    headline = get_evaluator(task).headline
    train = ["--model_path", "tiny", "--dataset_name", task, "--seed"]

    def row(what: str, *runs: Path) -> list[str]:
        """The score of the warm model, from which all start, and the last ones of some runs."""
        finals = [metrics(run, -1)[headline.metric] for run in runs]
        return [what, before, spread(headline, finals) if len(runs) > 1 else score(headline, finals[0])]

    runs = [execute(root / f"{task}-seed{seed}", *train, str(seed)) for seed in seeds]
    before = score(headline, metrics(runs[0], 0)[headline.metric])
    chance = "–" if headline.chance is None else score(headline, headline.chance)
    rows = [["chance", "", chance], ["best constant answer", "", score(headline, best_constant(task))]]
    for seed, run in zip(seeds, runs, strict=True):
        rows.append(row(f"GRPO, seed {seed}, {grpo_seconds(run):.0f} s", run))
        median = metrics(run, -1).get("median_abs_error_minutes")
        if median is not None:
            rows[-1][-1] += f", median {median:.1f}"
    rows.append(row("**GRPO, mean ± standard deviation**", *runs))
    shuffled = [*train, "0", "--shuffle_rewards", "--max_steps", str(SHUFFLED_STEPS)]
    rows.append(row(f"GRPO, rewards shuffled, {SHUFFLED_STEPS} steps", execute(root / f"{task}-shuffled", *shuffled)))
    longer = root / f"{task}-longer-warm-up"
    if not finished(longer):
        execute(longer, "--model_path", str(longer_warm_up(task)), *evaluation_flags(task, {}))
    rows.append(row(f"the warm-up alone, {LONGER[task]} times as long", longer))
    return rows + [unseen_row(task, options, root, runs) for options in UNSEEN[task]]


def unseen_row(task: str, options: dict, root: Path, runs: list[Path]) -> list[str]:
    """What carries over: the warm model and the trained ones on pictures or problems of another kind."""
    headline = get_evaluator(task).headline
    name = "-".join([task, *(f"{key}{value}" for key, value in options.items())])

    def evaluated(model: Path, folder: str) -> float:
        run = execute(root / folder, "--model_path", str(model), *evaluation_flags(task, options))
        return metrics(run, -1)[headline.metric]

    warm = tiny_model(task, dataset_options=TINY_DEFAULTS[task]["dataset_options"])
    after = [evaluated(newest(run), f"{name}-{run.name}") for run in runs]
    told = ", ".join(f"{key}={value}" for key, value in options.items())
    return [f"never seen: `{told}`", score(headline, evaluated(warm, f"{name}-warm")), spread(headline, after)]


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/curves")
    parser.add_argument("--tasks", nargs="+", default=["correlation", "clock", "arithmetic"], choices=list(UNSEEN))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    for task in args.tasks:
        rows = rows_of(task, Path(args.output_dir), args.seeds)
        headline = get_evaluator(task).headline
        unit = f" ({headline.unit})" if headline.unit else ""
        print(f"\n{task}: {headline.label}{unit}\n{table(['', 'before', 'after'], rows)}\n", flush=True)


if __name__ == "__main__":
    main()
