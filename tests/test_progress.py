"""What a person sees: values and durations as text, hints, explanations, progress lines, the summary."""

import dataclasses
import re
import types

import pytest
from small_models import small_config

import progress
from config import OBJECTIVES
from evaluator import Headline
from progress import Progress, did_you_mean, explanations, format_duration, format_value, setup_lines, summary_lines

HEADLINE = Headline("accuracy", "accuracy", "%", lower_is_better=False, chance=0.1)
CONFIG = small_config("--dataset_name arithmetic --output_dir runs/a --max_steps 40 --max_completion_length 16")
RECORD = {
    "step": 1,
    "loss": 0.3,
    "reward": 1.25,
    "kl": 0.0123,
    "accuracy": 0.456,
    "zero_std_fraction": 0.5,
    "truncated_fraction": 0.25,
    "rewards/strict_format": 0.1,
    "skipped_steps": 0,
    "seconds/total": 2.0,
}

# ---------------------------------------------------------------------------------------------------------------------
# Values, durations, hints


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.456, "%", "45.6 %"),
        (1.0, "%", "100.0 %"),
        (12.34, "min", "12.3 min"),
        (0.1234, "", "0.123"),
        (None, "%", "–"),
        (float("nan"), "", "nan"),
    ],
)
def test_values_are_written_with_their_unit(value, unit, text):
    assert format_value(value, unit) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (45.4, "45 s"),
        (59.6, "1 min 0 s"),
        (548, "9 min 8 s"),
        (3600, "1 h 0 min"),
        (7530, "2 h 5 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_durations_have_at_most_two_units(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "name, near",
    [("grp", "grpo"), ("gpro", "grpo"), ("gsop", "gspo"), ("dpo", "dapo"), ("dr-grpo", "dr_grpo")],
)
def test_the_nearest_name_is_suggested(name, near):
    assert repr(near) in did_you_mean(name, OBJECTIVES)


def test_without_a_near_name_all_are_listed():
    assert all(name in did_you_mean("xxxxxxx", OBJECTIVES) for name in OBJECTIVES)
    assert did_you_mean("xxxxxxx", []) and "did you mean" not in did_you_mean("xxxxxxx", [])


# ---------------------------------------------------------------------------------------------------------------------
# Explanations


@pytest.mark.parametrize(
    "changes, subject, named",
    [
        ({"loss": 1e-9}, "loss", "grad_norm"),
        ({"zero_std_fraction": 1.0}, "equal rewards", "temperature"),
        ({"truncated_fraction": 1.0}, "truncated", "16 tokens"),
        ({"truncated_fraction": 1.0}, "truncated", "--max_completion_length"),
        ({"rewards/strict_format": 0.0}, "format", "format"),
        ({"skipped_steps": 1}, "skipped", "not finite"),
    ],
)
def test_what_looks_wrong_is_explained(changes, subject, named):
    found = explanations({**RECORD, **changes}, CONFIG)
    assert list(found) == [subject] and named in found[subject]


@pytest.mark.parametrize(
    "task, options, named",
    [
        ("arithmetic", {}, True),
        ("gsm8k", {"shots": "0"}, True),
        ("gsm8k", {"shots": "4"}, False),
        ("clock", {}, False),
    ],
)
def test_a_run_without_the_format_is_pointed_to_shots(task, options, named):
    config = dataclasses.replace(CONFIG, dataset_name=task, dataset_options=options)
    found = explanations({**RECORD, "rewards/strict_format": 0.0}, config)
    assert ("--dataset_options shots=2" in found["format"]) == named


def test_an_ordinary_record_needs_no_explanation():
    assert explanations(RECORD, CONFIG) == {}
    without_format = {name: value for name, value in RECORD.items() if name != "rewards/strict_format"}
    assert explanations(without_format, CONFIG) == {}


def test_a_loss_of_zero_is_right_only_with_a_gradient():
    """With equal rewards in every group it is 0 because there is nothing to learn from, which is another subject."""
    assert list(explanations({**RECORD, "loss": 0.0, "zero_std_fraction": 1.0}, CONFIG)) == ["equal rewards"]


# ---------------------------------------------------------------------------------------------------------------------
# Lines during a run, where there is no terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: `clock.now`, in seconds."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


def test_a_line_says_how_far_the_run_is(capsys, clock):
    Progress(CONFIG, HEADLINE, step=0).step(RECORD)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    for part in ("1/40", "1.250", "accuracy 45.6 %", "0.0123", "2.00 s", "1 min 18 s"):  # 39 steps of 2 s are left
        assert part in line


def test_lines_come_every_few_seconds(capsys, clock):
    shown = Progress(CONFIG, HEADLINE, step=0)
    for step in range(1, 31):
        clock.now += 1
        shown.step({**RECORD, "step": step})
    steps = re.findall(r"^step +(\d+)/40", capsys.readouterr().out, re.MULTILINE)
    assert steps == ["1", "11", "21"]


def test_the_time_left_follows_recent_steps(capsys, clock):
    """The first steps may be slow: the median of the last 50 counts."""
    shown = Progress(dataclasses.replace(CONFIG, max_steps=1000), HEADLINE, step=0)
    for step in range(1, 131):
        shown.step({**RECORD, "step": step, "seconds/total": 100.0 if step <= 80 else 1.0})
    capsys.readouterr()
    clock.now += 60
    shown.step({**RECORD, "step": 131, "seconds/total": 1.0})
    assert "14 min 29 s" in capsys.readouterr().out  # 869 steps of 1 s


def test_each_explanation_is_given_once(capsys, clock):
    shown = Progress(CONFIG, HEADLINE, step=0)
    for step in range(1, 5):
        shown.step({**RECORD, "step": step, "loss": 0.0})
    shown.step({**RECORD, "step": 5, "loss": 0.0, "truncated_fraction": 1.0})
    out = capsys.readouterr().out
    assert out.count("grad_norm") == 1 and out.count("--max_completion_length") == 1


def test_an_evaluation_shows_score_and_interval(capsys):
    shown = Progress(CONFIG, HEADLINE, step=0)
    metrics = {"accuracy": 0.5, "avg_reward": 1.5, "num_examples": 20, "seconds": 3.2}
    shown.evaluation(10, {**metrics, "accuracy_low": 0.3, "accuracy_high": 0.7})
    shown.evaluation(20, metrics)
    with_interval, without = capsys.readouterr().out.splitlines()
    for part in ("step 10", "accuracy 50.0 %", "30.0", "70.0", "1.500", "20 examples", "3 s"):
        assert part in with_interval
    assert "step 20" in without and "95" not in without


def test_an_evaluation_shows_answers_of_the_model(capsys):
    shown = Progress(CONFIG, HEADLINE, step=0)
    metrics = {"accuracy": 0.5, "avg_reward": 1.5, "num_examples": 20, "seconds": 3.2}
    pairs = [(0.31, "0.35"), (None, "-1"), ("a long\nanswer " * 3, "b"), (1, "1"), (2, "2"), (3, "77")]
    shown.evaluation(10, metrics, [{"answer": gold, "completions": [{"prediction": given}]} for given, gold in pairs])
    line = capsys.readouterr().out.splitlines()[1]
    for part in ("0.31 (0.35)", "none (-1)", "a long answer a lon… (b)", "2 (2)"):
        assert part in line
    assert "77" not in line  # five are enough


# ---------------------------------------------------------------------------------------------------------------------
# Before and after


def test_setup_names_model_task_and_objective():
    import torch

    llm = types.SimpleNamespace(
        num_parameters=1_540_000_000,
        is_vision=False,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        attn_implementation="sdpa",
    )
    config = small_config("--objective gspo --beta 0.1 --max_steps 7 --prompts_per_step 3 --num_generations 5")
    text = setup_lines(config, llm, 7473, 1319)
    for part in ("1.54 B", "bfloat16", "cpu", "sdpa", "7,473", "1,319", "3 prompts × 5", "7 steps", "gspo", "sequence"):
        assert part in text
    assert "−0.0003 +0.0004" in text and "β 0.1 k3" in text and config.output_dir in text
    llm.num_parameters = 310_000
    assert "0.31 M" in setup_lines(small_config("--max_steps 1"), llm, 1, 1)


def test_summary_names_scores_time_and_places():
    evals = {0: {"accuracy": 0.1}, 20: {"accuracy": 0.9}, 40: {"accuracy": 0.456}}
    config = dataclasses.replace(CONFIG, output_dir="runs/my run")
    text = summary_lines(config, HEADLINE, evals, [30.0, 31.0], "runs/my run/checkpoints/step_000040")
    for part in ("arithmetic", "10.0 % → 45.6 %", "chance: 10.0 %", "40 steps", "last 2", "1 min 1 s", "step_000040"):
        assert part in text
    assert text.endswith("plotter.py --output_dir 'runs/my run'")
    assert "chance" not in summary_lines(config, dataclasses.replace(HEADLINE, chance=None), evals, [], "step_000040")
