"""What answers the model's turn? An environment reads what the model wrote and shows it the next message, or ends the
episode.

A task with several turns sets `max_turns` and returns its environment from `Dataset.environment` (rldatasets.py). A
tool is what an environment does with the text of a turn. Rewards are not given here: evaluator.py scores the texts that
the model wrote, and never those of an observation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from PIL import Image

import answers

if TYPE_CHECKING:
    from rldatasets import Example


@dataclass(frozen=True)
class Observation:
    """What the model is shown after its turn: the next user message, its pictures before its text.

    Attributes:
        images: pictures of any mode.
        malformed: the turn could not be used, and the text says why (`invalid_turns` in the log).
    """

    text: str = ""
    images: tuple[Image.Image, ...] = ()
    malformed: bool = False


class Environment:
    """One episode of one row, used once. This one is the single turn, whose text is the answer.

    All randomness comes from `example.id` and the number of the turn, so that the same texts get the same observations,
    and the G rows of a group begin alike.

    Attributes:
        max_turns: the most turns of this episode, which `Dataset.environments` sets; an environment may use it to say
            that the next turn is the last one.
    """

    max_turns = 1

    def __init__(self, example: Example):
        self.example = example

    def step(self, text: str) -> Observation | None:
        """The observation that follows a turn with this text, which may be anything; None ends the episode.

        A turn that cannot be used gets an observation that says so: an exception is a mistake in the environment and
        stops the run. After the last turn that the task allows, no observation is shown.
        """
        return None


@dataclass(frozen=True)
class Turn:
    """What the model wrote in a turn, and what it was shown afterwards.

    Attributes:
        text: decoded, without the end-of-sequence token. length: sampled tokens, that token included.
        observation: None after the last turn. observation_length: its tokens, placeholders of pictures included.
    """

    text: str
    length: int
    observation: Observation | None = None
    observation_length: int = 0


@dataclass
class Episode:
    """The turns of a row, at least one."""

    turns: list[Turn]

    @property
    def texts(self) -> list[str]:
        return [turn.text for turn in self.turns]


# ---------------------------------------------------------------------------------------------------------------------
# A calculator

CALL = ("<calculate>", "</calculate>")
CALCULATOR = (
    "You have a calculator: write an expression of numbers, + - * / and parentheses like "
    "<calculate>12*(3+4)</calculate> and end your reply; you are told its value and reply again."
)
LONGEST_EXPRESSION = 100  # characters, which bounds the time of a calculation and the size of its numbers


class Calculator(Environment):
    """Answers the last `<calculate>...</calculate>` of a turn with the value of the expression, or says what is wrong
    with it. A turn without such a call ends the episode."""

    def __init__(self, example: Example):
        super().__init__(example)
        self.turn = 0

    def step(self, text: str) -> Observation | None:
        self.turn += 1
        before, closing, _ = text.rpartition(CALL[1])
        _, opening, expression = (before if closing else text).rpartition(CALL[0])
        if not opening:
            return None
        hint = "\nNow answer." if self.turn == self.max_turns - 1 else ""
        try:
            if not closing:
                raise ValueError(f"{CALL[1]} is missing")
            return Observation(f"= {answers.write_number(calculate(expression))}{hint}")
        except (ValueError, ZeroDivisionError) as error:
            return Observation(f"Error: {error}{hint}", malformed=True)


def calculate(expression: str) -> Fraction:
    """The exact value of numbers, + - * / (also written − × ÷) and parentheses, with the usual precedence.

    Raises:
        ValueError: anything else, or more than LONGEST_EXPRESSION characters. ZeroDivisionError.
    """
    text = answers.plain_text(expression).strip()
    if len(text) > LONGEST_EXPRESSION:
        raise ValueError(f"the expression has more than {LONGEST_EXPRESSION} characters")
    tokens = re.findall(r"[0-9]+(?:\.[0-9]+)?|\S", text)
    value, rest = read_sum(tokens)
    if rest:
        raise ValueError(f"{rest[0]!r} is not expected")
    return value


def read_sum(tokens: list[str]) -> tuple[Fraction, list[str]]:
    """The value of a sum of products at the beginning of the tokens, and the tokens after it."""
    value, tokens = read_product(tokens)
    while tokens[:1] in (["+"], ["-"]):
        operand, rest = read_product(tokens[1:])
        value, tokens = (value + operand if tokens[0] == "+" else value - operand), rest
    return value, tokens


def read_product(tokens: list[str]) -> tuple[Fraction, list[str]]:
    """As `read_sum`, for a product of numbers and parentheses."""
    value, tokens = read_factor(tokens)
    while tokens[:1] in (["*"], ["/"]):
        operand, rest = read_factor(tokens[1:])
        if tokens[0] == "/" and operand == 0:
            raise ZeroDivisionError("division by zero")
        value, tokens = (value * operand if tokens[0] == "*" else value / operand), rest
    return value, tokens


def read_factor(tokens: list[str]) -> tuple[Fraction, list[str]]:
    """As `read_sum`, for a number or a sum in parentheses, with signs before it."""
    if not tokens:
        raise ValueError("a number is missing at the end")
    first, rest = tokens[0], tokens[1:]
    if first in "+-":
        value, rest = read_factor(rest)
        return (-value if first == "-" else value), rest
    if first == "(":
        value, rest = read_sum(rest)
        if rest[:1] != [")"]:
            raise ValueError("')' is missing")
        return value, rest[1:]
    if not first[0].isdigit():
        raise ValueError(f"{first!r} is not expected")
    return Fraction(first), rest


class EpisodeError(RuntimeError):
    """An environment failed: a mistake in its code, since any text can be answered."""
