"""Rewards and metrics: by hand for each component, and under any text a model may write.

The cases of a contract are taken from the registry, so that a task that is registered is tested too.
"""

import json
import math
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluator
from answers import clock_seconds
from evaluator import (
    EVALUATORS,
    TAGS,
    Completion,
    RewardError,
    RewardEvaluator,
    clock_error_minutes,
    follows_loose_format,
    follows_strict_format,
    get_evaluator,
    majority_at_k,
    pass_at_k,
    tagged_answer,
    wilson_interval,
)


def asked_format(answer: str, reasoning: str = "First this,\nthen that.") -> str:
    return evaluator.asked_format(reasoning, answer)


def components(task: str, completion: str, answer: str | None = None) -> dict[str, float]:
    scorer = get_evaluator(task)
    return scorer.score(completion, answer or scorer.gold)


def metrics(task: str, completions: list[str], answers: list[str]) -> dict[str, float]:
    return get_evaluator(task).compute_rewards(completions, answers)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Contract 7: gold in the asked format earns the most there is, junk the least, and every component can fire
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", EVALUATORS)
def test_gold_earns_the_most_and_junk_the_least(task):
    scorer = get_evaluator(task)
    texts = [asked_format(scorer.gold), "", "what a nice picture", asked_format("I don't know")]
    rewards, _ = scorer.compute_rewards(texts, [scorer.gold] * 4)
    gold, *junk = rewards.sum(dim=1).tolist()
    assert gold == pytest.approx(scorer.highest)
    assert junk[0] == junk[1] == scorer.lowest
    assert scorer.lowest <= junk[2] < gold
    assert (scorer.lowest < junk[2]) == ("strict_format" in scorer.reward_names)  # the format alone is worth something
    assert (rewards[0] > rewards[1]).all()  # every component fires


@pytest.mark.parametrize("task", EVALUATORS)
def test_rewards_are_float32_with_a_row_per_completion(task):
    import torch

    scorer = get_evaluator(task)
    rewards, measured = scorer.compute_rewards([asked_format(scorer.gold), "junk", ""], [scorer.gold] * 3)
    assert rewards.shape == (3, len(scorer.reward_names))
    assert rewards.dtype == torch.float32
    assert scorer.headline.metric in measured
    assert all(type(value) is float for value in measured.values())


@pytest.mark.parametrize("task", EVALUATORS)
def test_parsed_completions_score_like_their_texts(task):
    scorer = get_evaluator(task)
    texts, answers = [asked_format(scorer.gold), f"It is {scorer.gold}.", "junk", ""], [scorer.gold] * 4
    parsed = [scorer.parse(text) for text in texts]
    rewards, measured = scorer.compute_rewards(texts, answers)
    again, measured_again = scorer.compute_rewards(parsed, answers)
    assert rewards.equal(again) and measured == measured_again
    assert [one.text for one in parsed] == texts
    assert [one.strict_format for one in parsed] == [True, False, False, False]
    assert [one.prediction for one in parsed] == [scorer.predict(text) for text in texts]
    assert [one.prediction is None for one in parsed] == [False, False, True, True]
    assert [one.strict_prediction is None for one in parsed] == [False, True, True, True]
    assert [scorer.is_correct(one, scorer.gold) for one in parsed] == [True, True, False, False]
    assert [scorer.is_correct(text, scorer.gold) for text in texts] == [True, True, False, False]


@pytest.mark.parametrize("task", EVALUATORS)
def test_a_text_is_read_once(task, monkeypatch):
    scorer, reads = get_evaluator(task), []
    monkeypatch.setattr(evaluator, "tagged_answer", lambda text: reads.append(text) or tagged_answer(text))
    parsed = [scorer.parse(text) for text in (asked_format(scorer.gold), "junk")]
    scorer.compute_rewards(parsed, [scorer.gold] * 2)
    scorer.is_correct(parsed[0], scorer.gold)
    assert len(reads) == 2


@pytest.mark.parametrize("task", EVALUATORS)
def test_a_component_is_a_method_and_an_entry(task):
    kind = EVALUATORS[task]

    class WithAnother(kind):
        components = kind.components | {"fewer_than_401": 0.5}

        def fewer_than_401(self, completion: Completion, gold) -> float:
            return completion.strict_prediction == gold and len(completion.text) <= 400

    scorer = WithAnother()
    assert scorer.reward_names == (*kind().reward_names, "fewer_than_401")
    assert scorer.highest == kind().highest + 0.5
    assert scorer.score(asked_format(scorer.gold), scorer.gold)["fewer_than_401"] == 0.5
    assert scorer.score(asked_format(scorer.gold, "x" * 400), scorer.gold)["fewer_than_401"] == 0.0


def test_several_lines_of_reasoning_earn_the_format_rewards():
    """A format pattern without DOTALL never matched reasoning of more than one line, and its reward stayed 0."""
    for reasoning in ("one line", "two\nlines", "", "\n\n", "1 < 2 and <b>bold</b>"):
        text = asked_format("72", reasoning)
        assert follows_strict_format(text)
        assert follows_loose_format(text)


# ---------------------------------------------------------------------------------------------------------------------
# Format
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        asked_format("72") + " ",
        asked_format("72") + "\n\n",
        "Sure! " + asked_format("72"),
        asked_format("72").replace("</reasoning>\n", "</reasoning>"),
        asked_format("72").replace("<answer>\n", "<answer>"),
        asked_format("72") + "\n" + asked_format("72"),
        asked_format("72", reasoning="a </answer> within"),
        asked_format("<answer>72"),
        "<reasoning>\n</reasoning>\n<answer>\n72\n</answer>",  # one newline cannot stand on both sides of nothing
        "<answer>\n72\n</answer>\n<reasoning>\nbecause\n</reasoning>",
        asked_format("72").upper(),
        "",
    ],
)
def test_not_strict(text):
    assert not follows_strict_format(text)


@pytest.mark.parametrize("before", ["</think>", "so</think>\n\n", "<think>so</think>\n", "a</think>b</think> "])
def test_the_format_is_looked_for_after_a_closed_think_block(before):
    """A chat template that opens <think> in the prompt makes the completion begin inside that block."""
    for task in EVALUATORS:
        scorer = get_evaluator(task)
        text = asked_format(scorer.gold)
        assert scorer.parse(before + text).strict_format
        assert scorer.score(before + text, scorer.gold) == scorer.score(text, scorer.gold)


def test_what_is_thought_is_not_scored():
    thought = asked_format("72") + "</think>\n"
    assert components("gsm8k", thought + "I am not sure")["correctness"] == 0.0
    assert components("gsm8k", thought + asked_format("71")) == components("gsm8k", asked_format("71"))
    assert not get_evaluator("gsm8k").parse("<think>so" + asked_format("72")).strict_format  # never closed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("71</think>72", "72"),
        ("71 <answer>7</answer></think>It is 72.", "72"),
        ("72</think>", "72"),
        ("</think>", None),
    ],
)
def test_lenient_reading_after_a_think_block(text, expected):
    """Without an answer after the block, the last one in it counts."""
    assert get_evaluator("gsm8k").predict(text) == expected


def test_strict_allows_one_newline_after():
    assert follows_strict_format(asked_format("72") + "\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<reasoning>so</reasoning><answer>72</answer>", True),
        ("Well: <reasoning>so</reasoning> \n\n <answer>72</answer> Bye", True),
        ("</reasoning><answer> <reasoning>so</reasoning><answer>72</answer>", True),
        ("<reasoning>so</reasoning> therefore <answer>72</answer>", False),
        ("<answer>72</answer><reasoning>so</reasoning>", False),
        ("<reasoning>so</reasoning><answer>72", False),
        ("so</reasoning><answer>72</answer>", False),
        ("</answer><reasoning>so</reasoning><answer>72", False),
    ],
)
def test_loose(text, expected):
    assert follows_loose_format(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (asked_format("72"), 0.5),
        (asked_format("72") + "\n", 0.5),
        ("<reasoning>", 0.125),
        ("<reasoning> so </reasoning>", 0.25),
        ("<reasoning> so </reasoning> <answer> 72", 0.375),
        ("<answer>72</answer>", 0.25),
        ("</answer>72<answer>", 0.125 - 0.010),  # only <answer> is in place, and 10 characters follow </answer>
        ("<answer><answer>72</answer>", 0.125),  # twice is not in place
        (asked_format("72") + "x" * 100, 0.4),
        (asked_format("72") + "x" * 10_000, 0.0),  # never below 0
        ("x" * 10_000, 0.0),
    ],
)
def test_tag_count(text, expected):
    assert components("gsm8k", text)["tag_count"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> 5 </answer>", "5"),
        ("<answer>5</answer> no: <answer>6</answer>", "6"),
        ("<answer>5</answer> and <answer>6", "5"),
        ("<answer>5</answer> and </answer>", "5"),
        ("<answer><answer>7</answer>", "7"),
        ("</answer>5<answer>", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_complete_answer_counts(text, expected):
    assert tagged_answer(text) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Numbers: GSM8K and arithmetic
# ---------------------------------------------------------------------------------------------------------------------
def test_decimals_are_compared_exactly():
    assert components("gsm8k", asked_format("0.1"), "0.10")["correctness"] == 2.0
    assert components("gsm8k", asked_format("0.10000000000000000001"), "0.1")["correctness"] == 0.0
    assert components("gsm8k", asked_format("9007199254740993"), "9007199254740992")["correctness"] == 0.0


@pytest.mark.parametrize(
    ("content", "correct", "integer"),
    [
        ("72", 2.0, 0.5),
        ("73", 0.0, 0.5),
        ("1,072", 0.0, 0.5),
        ("-72", 0.0, 0.5),
        ("72.00", 2.0, 0.0),
        ("$72", 2.0, 0.0),
        ("72 apples", 2.0, 0.0),
        ("The answer is **72**.", 2.0, 0.0),
        ("36 + 36 = 72", 0.0, 0.0),  # a calculation is not an answer
        ("71 72 73", 0.0, 0.0),  # nor is a list to choose from
        ("1/72", 0.0, 0.0),
        ("seventy-two", 0.0, 0.0),
        ("٧٢", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_correctness_and_integer(content, correct, integer):
    scores = components("gsm8k", asked_format(content))
    assert (scores["correctness"], scores["integer"]) == (correct, integer)


def test_a_negative_answer_is_an_integer():
    assert components("arithmetic", asked_format("-5"))["integer"] == 0.5


def test_correctness_needs_the_tags_but_accuracy_does_not():
    bare = "36 + 36 = 72, so the answer is $72."
    assert components("gsm8k", bare)["correctness"] == 0.0
    assert get_evaluator("gsm8k").is_correct(bare, "72")
    measured = metrics("gsm8k", [bare, asked_format("72"), asked_format("71"), "<answer>72</answer>"], ["72"] * 4)
    assert measured == {"accuracy": 0.75, "accuracy_strict": 0.25, "format_fraction": 0.5}


def test_an_unreadable_gold_matches_nothing():
    """None equals None: junk must not become right where the gold itself cannot be read."""
    measured = metrics("gsm8k", [asked_format("junk"), "junk"], ["junk", "junk"])
    assert measured["accuracy"] == measured["accuracy_strict"] == 0.0
    assert components("gsm8k", asked_format("junk"), "junk")["correctness"] == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Clocks
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("time_read", "minutes"),
    [
        ("08:15:30", 0),
        ("8:15:30", 0),
        ("20:15:30", 0),  # the same on a dial
        ("22:15:30", 120),
        ("08:15", 0.5),
        ("08:16:30", 1),
        ("07:15:30", 60),
        ("12:15:30", 240),
        ("00:15:30", 240),
        ("02:15:30", 360),
        ("01:15:30", 300),  # seven hours forwards is five backwards
        ("24:15:30", 360),
        ("08:60:30", 360),
        ("around eight", 360),
        ("08:15:30 or 09:15:30", 360),
    ],
)
def test_clock_error_is_the_shorter_way_round(time_read, minutes):
    scores = components("clock", asked_format(time_read))
    assert scores["closeness"] == pytest.approx(3 - 6 * minutes / 360)


@given(a=st.integers(0, 43199), b=st.integers(0, 43199))
def test_clock_error_is_symmetric_and_at_most_six_hours(a, b):
    scorer = get_evaluator("clock")
    one, other = (f"{t // 3600:02}:{t // 60 % 60:02}:{t % 60:02}" for t in (a, b))
    assert scorer.error(one, other) == scorer.error(other, one) == clock_error_minutes(a, b)
    assert clock_error_minutes(a, b) == min((a - b) % 43200, (b - a) % 43200) / 60


@pytest.mark.parametrize(
    ("content", "expected"),
    [("08:15:30", 0.5), ("23:59:59", 0.5), ("8:15:30", 0.0), ("08:15", 0.0), ("08:75:30", 0.0), ("08:15:30 h", 0.0)],
)
def test_time_format(content, expected):
    assert components("clock", asked_format(content))["time_format"] == expected


def test_clock_metrics():
    completions = [asked_format(t) for t in ("08:15:30", "08:16:30", "08:20:30", "08:26:30", "junk")]
    measured = metrics("clock", completions, ["08:15:30"] * 5)
    assert measured == {
        "mean_abs_error_minutes": pytest.approx((0 + 1 + 5 + 11 + 360) / 5),
        "median_abs_error_minutes": 5.0,
        "within_1_minute": 0.4,
        "within_5_minutes": 0.6,
        "within_10_minutes": 0.6,
        "unreadable_fraction": 0.2,
    }
    assert get_evaluator("clock").predict("I see 8:15 here") == "08:15:00"


def test_seconds_of_a_time():
    assert [clock_seconds(time) for time in ("00:00:01", "1:00:00", "13:00:00")] == [1, 3600, 3600]
    assert [clock_seconds(time) for time in ("01:00", "x", None, 3600)] == [None] * 4
    assert clock_error_minutes(clock_seconds("11:59:30"), clock_seconds("00:00:30")) == 1
    assert clock_error_minutes(None, 0) == clock_error_minutes(0, None) == 360


def test_guessing_a_clock_costs_three_hours():
    """The chance and best-constant figures that charts mark are the ones this evaluator measures."""
    rng = np.random.default_rng(0)
    times = [f"{t // 3600:02}:{t // 60 % 60:02}:{t % 60:02}" for t in rng.integers(0, 43200, 4000)]
    headline = get_evaluator("clock").headline
    guessed = metrics("clock", [asked_format(t) for t in rng.permutation(times)], times)
    constant = metrics("clock", [asked_format("03:00:00")] * len(times), times)
    assert guessed[headline.metric] == pytest.approx(headline.chance, abs=5)
    assert constant[headline.metric] == pytest.approx(get_evaluator("clock").best_constant, abs=5)


# ---------------------------------------------------------------------------------------------------------------------
# Correlations
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "closeness", "value_format"),
    [
        ("-0.42", 1.0, 0.5),
        ("-.42", 1.0, 0.5),
        ("−0.42", 1.0, 0.5),
        ("0.58", 0.0, 0.5),
        ("1", -0.42, 0.5),
        ("r = -0.42", 1.0, 0.0),
        ("1.5", -1.0, 0.0),  # no correlation
        ("-42", -1.0, 0.0),
        ("-0.42 or 0.42", -1.0, 0.0),
        ("strong", -1.0, 0.0),
        ("nan", -1.0, 0.0),
        ("-4.2e-1", 1.0, 0.0),
    ],
)
def test_correlation_rewards(content, closeness, value_format):
    scores = components("correlation", asked_format(content))
    assert (scores["closeness"], scores["value_format"]) == (pytest.approx(closeness), value_format)


def test_correlation_metrics():
    answers = ["-0.50", "0.00", "0.50", "0.90"]
    measured = metrics("correlation", [asked_format(a) for a in ("-0.25", "0.00", "0.25")] + ["junk"], answers)
    assert measured == {
        "mean_abs_error": pytest.approx((0.25 + 0 + 0.25 + 2) / 4),
        "pearson_r": pytest.approx(1.0),
        "unreadable_fraction": 0.25,
    }
    upside_down = metrics("correlation", [asked_format(a) for a in ("0.5", "-0.1", "-0.5", "-0.9")], answers)
    assert upside_down["pearson_r"] < -0.9


@pytest.mark.parametrize("contents", [["0.3", "0.3", "0.3"], ["0.3", "junk", "junk"], ["junk", "junk", "junk"]])
def test_correlation_of_what_does_not_vary_is_0(contents):
    measured = metrics("correlation", [asked_format(c) for c in contents], ["-0.5", "0.2", "0.7"])
    assert measured["pearson_r"] == 0.0


@pytest.mark.slow
def test_guessing_correlations():
    rng = np.random.default_rng(0)
    answers = [f"{r:.2f}" for r in rng.uniform(-1, 1, 4000)]
    scorer = get_evaluator("correlation")
    guesses = [asked_format(f"{r:.2f}") for r in rng.uniform(-1, 1, 4000)]
    assert metrics("correlation", guesses, answers)["mean_abs_error"] == pytest.approx(scorer.headline.chance, abs=0.02)
    constant = metrics("correlation", [asked_format("0.00")] * 4000, answers)["mean_abs_error"]
    assert constant == pytest.approx(scorer.best_constant, abs=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Untrusted text
# ---------------------------------------------------------------------------------------------------------------------
FRAGMENTS = [
    *TAGS,
    "\n",
    " ",
    "72",
    "08:15:30",
    "-0.42",
    "1e999",
    "nan",
    "inf",
    "-",
    "$",
    ",",
    ".",
    ":",
    "٧٢",
    "²",
    "½",
    "９",
    "\x1b[31m",
    "\ud800",
]
any_text = st.one_of(
    st.text(),
    st.text(alphabet=st.characters(categories=["Nd", "Nl", "No", "Sc", "Pd", "Cc"])),
    st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=30).map("".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map(lambda parts: asked_format("".join(parts))),
)


def check_scored(task: str, completion: str) -> None:
    scorer = get_evaluator(task)
    rewards, measured = scorer.compute_rewards([completion], [scorer.gold])
    total = rewards.sum().item()
    assert scorer.lowest - 1e-6 <= total <= scorer.highest + 1e-6
    assert all(math.isfinite(value) for value in measured.values())
    json.dumps(scorer.predict(completion), allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize("task", EVALUATORS)
@settings(max_examples=300, deadline=None)
@given(completion=any_text)
def test_any_text_is_scored(task, completion):
    check_scored(task, completion)


LOTS = 20_000
PATHOLOGICAL = {
    "many opening tags": "<answer>" * (5 * LOTS),
    "many closing tags": "</answer>" * LOTS,
    "many blocks": "<answer>7</answer>" * LOTS,
    "many borders": "<reasoning>" + "</reasoning> <answer>" * LOTS,
    "many opened blocks": "<reasoning>\n</reasoning>\n<answer>\n" * LOTS,
    "white space between": "<reasoning></reasoning>" + " \n" * LOTS + "<answe>",
    "newlines in the right format": asked_format("\n" * LOTS, reasoning="\n" * LOTS),
    "nearly the right format": asked_format("7", reasoning="\n</reasonin>\n<answe>\n" * LOTS) + "x",
    "digits": "7" * LOTS,
    "digits in tags": asked_format("7" * LOTS),
    "digits with commas": asked_format("777," * LOTS),
    "digits with commas and a bad end": asked_format("777," * LOTS + "7777"),
    "zeros after the point": asked_format("0." + "0" * LOTS + "1"),
    "many numbers": "7 " * LOTS,
    "many signs": "-$" * LOTS,
    "many points": "." * LOTS + "7" + ".7" * LOTS,
    "exponents": "1e" * LOTS + "9" * LOTS,
    "a huge exponent": asked_format("1e" + "9" * LOTS),
    "times": "08:15:" * LOTS,
    "other digits": asked_format("٧" * LOTS),
    "brackets": "<" * LOTS + ">" * LOTS,
    "round brackets": "-" + "(" * LOTS + "7",
    "dashes": "−" * LOTS + "7",
    "dashes and blanks": "- " * LOTS + "7",
    "blanks": "7" + " " * LOTS + "- " + " " * LOTS + "7",
    "groups of three": asked_format("7 " + "777 " * LOTS),
    "long numbers with blanks": ("7" * 1000 + " ") * (LOTS // 100),
    "fractions": "1/2 " * LOTS + "1/" * LOTS,
    "one-character fractions": asked_format("1½" * LOTS),
    "LaTeX fractions": "\\frac{1}{2}" * LOTS + "\\frac{" * LOTS + "1}{2}" * LOTS,
    "LaTeX texts": "\\text{" * LOTS + "7" + "}" * LOTS,
    "LaTeX blanks": "\\" * LOTS + "\\," * LOTS + "{,}" * LOTS + "7",
    "unknown LaTeX": "\\" + "a" * LOTS + "{7" + "\\log{7" * LOTS,
    "powers of ten": "7*10^" * LOTS + "7",
    "currencies": "$ " * LOTS + "USD " * LOTS + "$7,777," * LOTS + "m",
    "words for signs": "minus negative " * LOTS + "7",
    "entities": "&minus;" * LOTS + "&#" + "9" * LOTS + ";7",
    "apostrophes": "7'777" * LOTS,
    "spaced colons": "08 : " * LOTS + "15 :30 " * LOTS,
    "hours and minutes": "3h" * LOTS + "3h 45m " * LOTS,
    "thoughts": "<think></think>" * LOTS + asked_format("7"),
}


ONE_PER_CLASS = {kind: task for task, kind in EVALUATORS.items()}.values()


@pytest.mark.slow
@pytest.mark.parametrize("task", ONE_PER_CLASS)
@pytest.mark.parametrize("case", PATHOLOGICAL)
def test_pathological_text_is_scored_in_linear_time(task, case):
    """Hundreds of thousands of characters in a second: anything quadratic would take minutes."""
    start = time.perf_counter()
    check_scored(task, PATHOLOGICAL[case])
    assert time.perf_counter() - start < 5


# ---------------------------------------------------------------------------------------------------------------------
# Finding evaluators, and failures
# ---------------------------------------------------------------------------------------------------------------------
def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'clock'"):
        get_evaluator("clocks")
    with pytest.raises(ValueError, match="choose from gsm8k, arithmetic"):
        get_evaluator("chess")


@pytest.mark.parametrize(("completions", "answers"), [(["a"], []), ([], []), (["a"], ["1", "2"])])
def test_answers_must_match_completions(completions, answers):
    with pytest.raises(ValueError, match="cannot be scored against"):
        get_evaluator("gsm8k").compute_rewards(completions, answers)


def broken(kind: type[RewardEvaluator], method: str, result) -> RewardEvaluator:
    """An evaluator one of whose methods returns `result`, or raises it."""

    def fail(self, *_):
        if isinstance(result, Exception):
            raise result
        return result

    return type("Broken", (kind,), {method: fail, "task": "mine"})()


@pytest.mark.parametrize("task", ONE_PER_CLASS)
@pytest.mark.parametrize("result", [ZeroDivisionError(), math.nan, math.inf, None, "a lot"])
def test_a_failing_component_names_task_and_completion(task, result):
    kind = EVALUATORS[task]
    scorer = broken(kind, next(iter(kind.components)), result)
    with pytest.raises(RewardError, match=r"rewards of the task 'mine' failed on completion 0 of 2, 'half past"):
        scorer.compute_rewards(["half past eight", "nine"], [scorer.gold] * 2)


@pytest.mark.parametrize("result", [{}, {"correctness": 1.0}, None, (1.0, 0.0, 0.0, 0.0)])
def test_a_score_that_lacks_a_component_is_refused(result):
    with pytest.raises(RewardError, match=r"'mine' failed on completion 0 of 1"):
        broken(EVALUATORS["gsm8k"], "score", result).compute_rewards(["7"], ["7"])


@pytest.mark.parametrize("result", [ZeroDivisionError(), {"accuracy": math.nan}, {"accuracy": None}, None])
def test_failing_metrics_name_the_task(result):
    with pytest.raises(RewardError, match="metrics of the task 'mine' failed"):
        broken(EVALUATORS["gsm8k"], "metrics", result).compute_rewards(["7"], ["7"])


@pytest.mark.parametrize("task", ONE_PER_CLASS)
def test_an_answer_that_cannot_be_read_names_task_and_text(task):
    scorer = broken(EVALUATORS[task], "value", ZeroDivisionError())
    with pytest.raises(RewardError, match=f"'It is {scorer.gold}' in the task 'mine' failed: ZeroDivision"):
        scorer.parse(f"It is {scorer.gold}")


def test_closeness_to_an_unreadable_gold_is_refused():
    with pytest.raises(RewardError, match="right answer is unreadable"):
        get_evaluator("clock").compute_rewards(["08:15:30"], ["half past eight"])


@pytest.mark.parametrize("task", EVALUATORS)
def test_registered_evaluators_are_complete(task):
    scorer = get_evaluator(task)
    assert isinstance(scorer, RewardEvaluator)
    assert scorer.task == task
    assert scorer.lowest < scorer.highest
    assert scorer.is_correct(scorer.gold, scorer.gold)
    assert scorer.right_or_wrong in (True, False)
    assert all(hasattr(scorer.headline, name) for name in ("metric", "label", "unit", "chance"))


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------
def test_wilson_interval():
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    for correct, n in [(-1, 10), (11, 10), (0, 0)]:
        with pytest.raises(ValueError, match="no share"):
            wilson_interval(correct, n)


def test_wilson_interval_covers_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    intervals = [wilson_interval(int(correct), 50) for correct in rng.binomial(50, 0.1, 4000)]
    assert 0.93 < np.mean([low <= 0.1 <= high for low, high in intervals]) < 0.98


def test_pass_at_k():
    correct = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert pass_at_k(correct) == pytest.approx(2 / 3)
    assert pass_at_k(correct, 1) == pytest.approx((0.25 + 1 + 0) / 3)
    assert pass_at_k(correct, 2) == pytest.approx((0.5 + 1 + 0) / 3)
    for k in (0, 5):
        with pytest.raises(ValueError, match="cannot be estimated"):
            pass_at_k(correct, k)


def test_pass_at_k_is_the_chance_of_one_right_in_a_subset():
    rng = random.Random(0)
    correct = [True, False, False, True, False, False, False]
    hits = np.mean([any(rng.sample(correct, 3)) for _ in range(20_000)])
    assert pass_at_k(np.array([correct]), 3) == pytest.approx(hits, abs=0.01)


def test_majority_at_k():
    predictions = [["72", "71", "72"], ["1", "2", "2"], [None, None, "5"], [None, None, None], ["3", "4", None]]
    answers = ["72.00", "1", "5", "6", "3"]
    assert majority_at_k(predictions, answers, get_evaluator("gsm8k")) == pytest.approx(3 / 5)
