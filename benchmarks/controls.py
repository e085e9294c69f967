"""Is what the environment shows used? Evaluates trained models with every kind of feedback, and prints a table.

    uv run benchmarks/controls.py runs/look-seed0 runs/look-seed1

Takes run folders of one task that has the option `feedback`, and evaluates the newest checkpoint of each with the run's
own flags. Each evaluation is a command of main.py, which is printed, in `RUN-controls/FEEDBACK`; a finished one is not
repeated. The last two rows compare the answers after a `shifted` drawing with those after the real one, example by
example: the model's first turn is the same in both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import table
from curves import execute, metrics, newest_checkpoint

from evaluator import get_evaluator
from progress import format_value
from rldatasets import Dataset, dataset_options, get_dataset
from visual_environments import FEEDBACK, Look, PictureEnvironment

FLAGS = ("dataset_name", "eval_size", "max_prompt_length", "max_completion_length", "max_turns", "dtype")
HALF_DIAL = 6.0  # hours


def flags_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())["flags"]


def evaluated(run: Path, feedback: str) -> Path:
    """The folder of the evaluation of a run's last model with this feedback."""
    flags = flags_of(run)
    same = [text for name in FLAGS for text in (f"--{name}", str(flags[name]))]
    options = [f"{key}={value}" for key, value in (flags["dataset_options"] | {"feedback": feedback}).items()]
    model = str(newest_checkpoint(run))
    folder = run.with_name(f"{run.name}-controls") / feedback
    return execute(folder, "--eval_only", "--model_path", model, *same, "--dataset_options", *options)


def texts_of(evaluation: Path) -> list[list[str]]:
    """What the model wrote about each test example, turn by turn."""
    groups = json.loads(next((evaluation / "eval_logs").glob("samples_*.json")).read_text())["groups"]
    completions = [group["completions"][0] for group in groups]
    return [[turn["text"] for turn in one["turns"]] if "turns" in one else [one["text"]] for one in completions]


def answers_that_follow(dataset: Dataset, real: list[list[str]], shifted: list[list[str]]) -> list[float]:
    """How the last answer follows the drawing, for each example whose turns can be read. In `look`: 1 if it names the
    colour of the cell that was shown, else 0. Elsewhere: how far it moves, as a share of how far the drawing moves; 0
    if the drawing is not used, 1 if the answer is copied from it, negative if the answer makes up for it."""
    follow = []
    for index, (before, after) in enumerate(zip(real, shifted, strict=True)):
        environment = dataset.environments([dataset[index]])[0]
        assert isinstance(environment, PictureEnvironment)
        asked = environment.read(after[-2]) if len(after) > 1 else None
        if asked is None:
            continue
        shown = environment.shifted(asked)
        if isinstance(environment, Look):
            follow.append(float(environment.scene.colours[shown - 1] in after[-1]))
            continue
        answers = [environment.read(texts[-1]) for texts in (before, after)]
        if None not in answers:
            follow.append(distance(*answers) / distance(asked, shown))
    return follow


def distance(start: Any, end: Any) -> float:
    """From one answer to another: of r, or in hours, the shorter way round the dial, positive if clockwise."""
    if isinstance(start, float):
        return end - start
    hours = [hour + minute / 60 + second / 3600 for hour, minute, second in (start, end)]
    return (hours[1] - hours[0] + HALF_DIAL) % (2 * HALF_DIAL) - HALF_DIAL


def column_of(run: Path) -> dict[str, str]:
    """What the table says of a run, by row. Does the evaluations that are missing."""
    flags = flags_of(run)
    headline = get_evaluator(flags["dataset_name"]).headline
    folders = {feedback: evaluated(run, feedback) for feedback in FEEDBACK}
    scores = {feedback: metrics(folder, -1) for feedback, folder in folders.items()}
    column = {}
    if "first_error" in scores["real"]:
        column["first answer"] = format_value(scores["real"]["first_error"], headline.unit)
    for feedback in FEEDBACK:
        column[f"`{feedback}`"] = format_value(scores[feedback][headline.metric], headline.unit)
    real, shifted = (texts_of(folders[feedback]) for feedback in ("real", "shifted"))
    dataset = get_dataset(flags["dataset_name"], "test", len(real), options=flags["dataset_options"])
    follow = answers_that_follow(dataset, real, shifted)
    same = sum(before[-1] == after[-1] for before, after in zip(real, shifted, strict=True)) / len(real)
    column["`shifted`: last answers that change"] = f"{100 * (1 - same):.0f} %"
    column["`shifted`: follow the drawing"] = (
        f"{sum(follow) / len(follow):.2f}".replace("-0.00", "0.00") if follow else "–"
    )
    return column


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    runs: list[Path] = parser.parse_args().runs
    for run in runs:
        if not list(run.glob("checkpoints/step_*")):
            parser.error(f"{run} has no checkpoint: name the --output_dir of a training that has saved one")
        if "feedback" not in dataset_options(task := flags_of(run)["dataset_name"]):
            parser.error(f"the task of {run}, {task}, has no option feedback, so there is nothing to compare")
    if len({flags_of(run)["dataset_name"] for run in runs}) > 1:
        parser.error("the runs have different tasks: compare those of one task")
    columns = [(run.name, column_of(run)) for run in runs]
    rows = [[row, *(column[row] for _, column in columns)] for row in columns[0][1]]
    print("\n" + table(["", *(name for name, _ in columns)], rows), flush=True)


if __name__ == "__main__":
    main()
