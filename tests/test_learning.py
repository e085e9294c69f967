"""The loop learns: a model that was warmed up on shifted labels gets nearer to the right answers from rewards alone.

The warmed-up model reads clocks with an error of about two and a half hours, since its labels were shifted. Sixty steps
of GRPO must lower that by at least twenty minutes; with the sign of the advantages flipped they must not.

The error is that of the answers sampled in training, in each step of clocks that were not shown before: a mean over two
thousand answers. A single greedy evaluation can change by twenty minutes with the rounding of a machine.
"""

import dataclasses
import json
import os
import statistics

import pytest

import main
import tiny_models

pytestmark = pytest.mark.slow  # minutes


@pytest.fixture(scope="module")
def warm_model(tmp_path_factory):
    """The task's tiny model with a shorter warm-up: about a minute."""
    recipe = dataclasses.replace(tiny_models.RECIPES["clock"], examples=6400)
    options = recipe.defaults["dataset_options"]
    return tiny_models.tiny_model("clock", None, options, tmp_path_factory.mktemp("cache"), recipe=recipe)


def errors(model, folder) -> list[float]:
    """The mean error in minutes over the first 5 and over the last 15 of 60 steps of GRPO from the warmed-up model."""
    flags = "--dataset_name clock --dataset_options size=56 style=bold --max_steps 60 --eval_steps 0 --eval_size 8"
    flags += " --prompts_per_step 8 --num_generations 16 --learning_rate 2e-4 --beta 0 --max_completion_length 12"
    assert main.main(["--model_path", str(model), "--output_dir", str(folder), *flags.split()]) == 0
    errors = [record["mean_abs_error_minutes"] for record in json.loads((folder / "train_logs.json").read_text())]
    return [statistics.mean(errors[:5]), statistics.mean(errors[-15:])]


def test_grpo_lowers_the_clock_error(warm_model, tmp_path):
    before, after = errors(warm_model, tmp_path / "run")
    assert after < before - 20


def test_flipped_advantages_do_not_lower_it(warm_model, tmp_path, monkeypatch):
    right = main.group_advantages
    monkeypatch.setattr(main, "group_advantages", lambda *args: -right(*args))
    before, after = errors(warm_model, tmp_path / "run")
    assert after > before - 10


@pytest.mark.skipif("GRPO_LONG_TESTS" not in os.environ, reason="ten minutes: set GRPO_LONG_TESTS=1")
def test_a_tool_is_learned_and_used(tmp_path):
    """The tiny model of `look` asks for the odd cell and names its colour, which it cannot when the cell is white."""

    def accuracy(folder) -> float:
        metrics = max((folder / "eval_logs").glob("metrics_*.json"))
        return json.loads(metrics.read_text())["accuracy"]

    run, blank = tmp_path / "run", tmp_path / "blank"
    assert main.main(["--model_path", "tiny", "--dataset_name", "look", "--output_dir", str(run)]) == 0
    flags = "--dataset_name look --eval_only --eval_size 256 --max_prompt_length 128 --max_completion_length 16"
    checkpoint = max((run / "checkpoints").glob("step_*"))
    flags = ["--model_path", str(checkpoint), *flags.split(), "--dataset_options", "size=56", "feedback=blank"]
    assert main.main([*flags, "--output_dir", str(blank)]) == 0
    assert accuracy(run) > 0.9
    assert accuracy(blank) < 0.35  # chance is 0.25
