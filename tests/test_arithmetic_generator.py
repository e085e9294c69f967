"""Word problems: the answer solves the question, and all numbers are within the limits."""

import re

import numpy as np
import pytest

from arithmetic_generator import EVENTS, ArithmeticGenerator, Calculation

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = <<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


def problems(steps, max_number, count=300):
    generator = ArithmeticGenerator(steps, max_number)
    for seed in range(count):
        rng = np.random.default_rng(seed)
        yield generator.tell(generator.calculation(rng), rng)


def parse_story(question: str) -> list[tuple[str, int]]:
    """The calculation in a question: ("start", n), then the operator and operand of each sentence, by its wording."""
    sentences = re.findall(r"[^.?]+[.?]", question)
    steps = [("start", int(re.search(r"\d+", sentences[0])[0]))]
    for sentence in sentences[1:-1]:
        wordings = [
            (operator, re.sub(r"\\{(name|things)\\}", r"\\w+", re.escape(event)).replace(r"\{n\}", r"(\d+)"))
            for operator, events in EVENTS.items()
            for event in events
        ]
        matches = [(op, int(m[1])) for op, wording in wordings if (m := re.fullmatch(wording, sentence.strip()))]
        assert len(matches) == 1, sentence  # no two operations share a wording
        steps += matches
    return steps


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("max_number", [10, 30, 99])
def test_answer_solves_the_question(steps, max_number):
    for problem in problems(steps, max_number):
        *working, last = problem["answer"].split("\n")
        story = parse_story(problem["question"])
        assert len(working) == steps == len(story) - 1
        total = story[0][1]
        for line, (operator, n) in zip(working, story[1:], strict=True):
            a, op, b, *note, result = STEP.fullmatch(line).groups()
            assert note == [a, op, b, result]
            assert (int(a), op, int(b)) == (total, operator, n)
            exact = {"+": total + n, "-": total - n, "*": total * n, "/": total / n}[operator]
            assert int(result) == exact  # an inexact division would not be an integer
            total = int(result)
            assert 1 <= total <= max_number
            assert 2 <= n <= max_number
        assert last == f"#### {total}"


def test_all_operations_occur():
    operators = {operator for problem in problems(2, 30) for operator, _ in parse_story(problem["question"])}
    assert operators == {"start", "+", "-", "*", "/"}


def test_mixed_steps_are_one_to_three():
    assert {problem["answer"].count("\n") for problem in problems("mixed", 30)} == {1, 2, 3}


def test_calculation_as_text():
    assert str(Calculation(12, (("+", 5), ("/", 4)))) == "12 + 5 / 4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 4}, "steps.*4"),
        ({"steps": "many"}, "steps.*many"),
        ({"steps": 2.0}, "steps.*2.0"),
        ({"steps": True}, "steps.*True"),
        ({"max_number": 5}, "max_number.*5"),
        ({"max_number": "big"}, "max_number.*big"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ArithmeticGenerator(**arguments)
