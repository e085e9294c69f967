"""The loop learns: a model that was shown wrong labels gets nearer to the right ones by reward alone.

The warm start reads a clock about an hour and a half wrong, since its labels were moved. Sixty steps of GRPO must
take at least twenty minutes off the error on held-out clocks. With the advantages' sign flipped they do not.
"""

import dataclasses
import json

import pytest

import main
import tiny_models


@pytest.fixture(scope="module")
def warm_model(tmp_path_factory):
    """A shorter warm-up than the task's own: about a minute."""
    recipe = dataclasses.replace(tiny_models.RECIPES["clock"], examples=8000)
    options = tiny_models.TINY_DEFAULTS["clock"]["dataset_options"]
    return tiny_models.tiny_model("clock", None, options, tmp_path_factory.mktemp("cache"), recipe=recipe)


def errors(model, folder) -> list[float]:
    """Mean error in minutes before and after 60 steps of GRPO from the warm model."""
    flags = "--dataset_name clock --dataset_options size=56 style=bold --max_steps 60 --eval_steps 0 --eval_size 128"
    flags += " --prompts_per_step 8 --num_generations 16 --learning_rate 2e-4 --beta 0 --max_completion_length 12"
    assert main.main(["--model_path", str(model), "--output_dir", str(folder), *flags.split()]) == 0
    metrics = [json.loads(path.read_text()) for path in sorted(folder.glob("eval_logs/metrics_*.json"))]
    return [one["mean_abs_error_minutes"] for one in metrics]


def test_reward_alone_brings_the_answers_nearer(warm_model, tmp_path):
    before, after = errors(warm_model, tmp_path / "run")
    assert after < before - 20


def test_with_the_advantages_flipped_it_does_not(warm_model, tmp_path, monkeypatch):
    right = main.group_advantages
    monkeypatch.setattr(main, "group_advantages", lambda *args: -right(*args))
    before, after = errors(warm_model, tmp_path / "run")
    assert after > before - 10
