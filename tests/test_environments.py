"""The calculator: what it computes, what it refuses, and how it answers."""

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from answers import write_number
from environments import CALL, LONGEST_EXPRESSION, Calculator, calculate
from rldatasets import Example, get_dataset

EXAMPLE = Example("arithmetic-test-0-0", [], [], "84")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*(3+4)", "84"),
        ("2 + 3 * 4 - 1", "13"),
        ("10 - 3 - 2", "5"),
        ("24 / 4 / 2", "3"),
        ("7 ÷ 2", "3.5"),
        ("−3 × −2", "6"),
        ("-(2 + 3)", "-5"),
        ("0.1 + 0.2", "0.3"),
        ("1/3", "1/3"),
        ("((((7))))", "7"),
    ],
)
def test_calculator_is_exact(expression, value):
    assert write_number(calculate(expression)) == value


@given(st.integers(0, 10**6))
def test_calculator_follows_precedence(seed):
    """Python's own arithmetic on the same random expressions gives the same value."""
    rng = random.Random(seed)

    def expression(depth):
        if depth == 0 or rng.random() < 0.3:
            return str(rng.randint(0, 12))
        inner = f"{expression(depth - 1)} {rng.choice('+-*/')} {expression(depth - 1)}"
        return f"({inner})" if rng.random() < 0.5 else inner

    text = expression(3)
    namespace = {"__builtins__": {}, "F": Fraction}
    exact = " ".join(
        f"F({token})" if token.isdigit() else token for token in text.replace("(", "( ").replace(")", " )").split()
    )
    try:
        expected = eval(exact, namespace)  # the test's own text, not a model's
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            calculate(text)
        return
    if len(text) <= LONGEST_EXPRESSION:
        assert calculate(text) == expected


WRONG = ["", "1 +", "(1", "1)", "2 ** 3", "2 3", "1,000", "x + 1", "__import__('os')", "1e9", "1..2", "1 // 2", "½²"]


@pytest.mark.parametrize("expression", [*WRONG, "1" * (LONGEST_EXPRESSION + 1), "5 / (3 - 3)"])
def test_wrong_expression_gets_an_observation(expression):
    shown = Calculator(EXAMPLE).step(f"I try. {CALL[0]}{expression}{CALL[1]}")
    assert shown.malformed and shown.text.startswith("Error: ") and len(shown.text) < 100


@pytest.mark.parametrize("text", ["-" * LONGEST_EXPRESSION + "1", "(" * LONGEST_EXPRESSION, "1" * LONGEST_EXPRESSION])
def test_longest_expressions_are_answered(text):
    assert Calculator(EXAMPLE).step(f"{CALL[0]}{text[:LONGEST_EXPRESSION]}{CALL[1]}") is not None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"{CALL[0]}1 + 1{CALL[1]}", "= 2"),
        (f"{CALL[0]}1 + 1{CALL[1]} or {CALL[0]}2 + 2{CALL[1]}?", "= 4"),
        ("<answer>84</answer>", None),
        (CALL[1] + CALL[1], None),
        ("", None),
    ],
)
def test_last_call_is_answered_and_no_call_ends(text, shown):
    found = Calculator(EXAMPLE).step(text)
    assert (found and found.text) == shown and (found is None or not found.malformed)


def test_unfinished_call_is_malformed():
    assert Calculator(EXAMPLE).step(f"{CALL[0]}1 + 1").malformed


def test_calculator_says_when_the_last_turn_follows():
    dataset = get_dataset("arithmetic", "test", 2, calculator=True)
    (environment,) = dataset.environments([dataset[0]])
    texts = [environment.step(f"{CALL[0]}1{CALL[1]}").text for _ in range(dataset.max_turns - 1)]
    assert len(set(texts[:-1])) == 1 and texts[-1].startswith(texts[0]) and texts[-1] != texts[0]


def test_calculator_is_described_only_where_it_is_given():
    plain, given = (get_dataset("arithmetic", "train", 2, calculator=value) for value in (False, True))
    assert plain.max_turns == 1 and given.max_turns > 1
    assert CALL[0] in given[0].messages[-1]["content"] and CALL[0] not in plain[0].messages[-1]["content"]
    assert plain[0].answer == given[0].answer
