"""The loop learns: a model that was shown wrong labels gets nearer to the right ones by reward alone.

The warm start reads a clock about two and a half hours wrong, since its labels were moved. Sixty steps of GRPO must
take at least twenty minutes off that. With the advantages' sign flipped they do not.

The error is that of the answers sampled in training, each step's from clocks that were never shown before: a mean over
two thousand answers, where one greedy evaluation moves by twenty minutes with a machine's rounding.
"""

import dataclasses
import json
import statistics

import pytest

import main
import tiny_models


@pytest.fixture(scope="module")
def warm_model(tmp_path_factory):
    """A shorter warm-up than the task's own: about a minute."""
    recipe = dataclasses.replace(tiny_models.RECIPES["clock"], examples=6400)
    options = tiny_models.RECIPES["clock"].defaults["dataset_options"]
    return tiny_models.tiny_model("clock", None, options, tmp_path_factory.mktemp("cache"), recipe=recipe)


def errors(model, folder) -> list[float]:
    """Mean error in minutes in the first 5 and in the last 15 of 60 steps of GRPO from the warm model."""
    flags = "--dataset_name clock --dataset_options size=56 style=bold --max_steps 60 --eval_steps 0 --eval_size 8"
    flags += " --prompts_per_step 8 --num_generations 16 --learning_rate 2e-4 --beta 0 --max_completion_length 12"
    assert main.main(["--model_path", str(model), "--output_dir", str(folder), *flags.split()]) == 0
    errors = [record["mean_abs_error_minutes"] for record in json.loads((folder / "train_logs.json").read_text())]
    return [statistics.mean(errors[:5]), statistics.mean(errors[-15:])]


def test_reward_alone_brings_the_answers_nearer(warm_model, tmp_path):
    before, after = errors(warm_model, tmp_path / "run")
    assert after < before - 20


def test_with_the_advantages_flipped_it_does_not(warm_model, tmp_path, monkeypatch):
    right = main.group_advantages
    monkeypatch.setattr(main, "group_advantages", lambda *args: -right(*args))
    before, after = errors(warm_model, tmp_path / "run")
    assert after > before - 10
