"""The loop learns: a model that was shown only wrong labels finds the right ones by reward alone.

The warm start knows how a scatter plot looks and answers about 0.35 off, since every label it saw was. GRPO must bring
the error of greedy answers on held-out pictures below 0.22. With the advantages' sign flipped it moves away from it.
"""

import dataclasses
import json

import pytest

import main
import tiny_models


@pytest.fixture(scope="module")
def warm_model(tmp_path_factory):
    """A shorter warm-up than the task's own: half a minute."""
    recipe = dataclasses.replace(tiny_models.RECIPES["correlation"], examples=8000, batch=40, labels=2)
    cache = tmp_path_factory.mktemp("cache")
    options = tiny_models.TINY_DEFAULTS["correlation"]["dataset_options"]
    return tiny_models.tiny_model("correlation", None, options, cache, recipe=recipe)


def errors(model, folder) -> list[float]:
    """Mean error before and after 60 steps of GRPO from the warm model."""
    flags = "--dataset_name correlation --dataset_options size=56 style=bold --max_steps 60 --eval_steps 0"
    flags += " --eval_size 128"
    flags += " --prompts_per_step 16 --num_generations 8 --learning_rate 2e-4 --beta 0 --max_completion_length 12"
    assert main.main(["--model_path", str(model), "--output_dir", str(folder), *flags.split()]) == 0
    return [json.loads(path.read_text())["mean_abs_error"] for path in sorted(folder.glob("eval_logs/metrics*.json"))]


def test_reward_alone_finds_what_no_label_said(warm_model, tmp_path):
    before, after = errors(warm_model, tmp_path / "run")
    assert before > 0.28  # what the labels taught: about right, never right
    assert after < 0.22


def test_with_the_advantages_flipped_it_does_not(warm_model, tmp_path, monkeypatch):
    right = main.group_advantages
    monkeypatch.setattr(main, "group_advantages", lambda *args: -right(*args))
    before, after = errors(warm_model, tmp_path / "run")
    assert after > before - 0.02
