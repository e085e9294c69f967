"""Word problems in the format of GSM8K: a question and a worked answer.

A person has a number of things, and one to three events change it, each by one operation. Every intermediate result is
at least 1 and every division is exact. `python arithmetic_generator.py` prints three problems.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gita",
    "Hugo",
    "Ines",
    "Jon",
    "Kira",
    "Leo",
    "Mona",
    "Nils",
    "Olga",
)
THINGS = ("apples", "books", "buttons", "cards", "coins", "eggs", "marbles", "pens", "shells", "stamps")
OPENING = "{name} has {n} {things}."
EVENTS = {  # sentences for each operation; n is the operand
    "+": ("{name} buys {n} more {things}.", "A friend gives {name} {n} {things}.", "{name} finds {n} {things}."),
    "-": ("{name} gives away {n} {things}.", "{name} loses {n} {things}.", "{name} sells {n} {things}."),
    "*": ("Soon {name} has {n} times as many {things}.", "The pile of {things} grows to {n} times its size."),
    "/": (
        "{name} packs the {things} into {n} equal bags and keeps one bag.",
        "{n} people, {name} among them, share the {things} equally.",
    ),
}
CLOSING = "How many {things} does {name} have now?"
FACTORS = range(2, 6)  # operands of multiplications and divisions

T = TypeVar("T")


@dataclass(frozen=True)
class Calculation:
    """A start value and the operations that are applied to it in order, from left to right."""

    start: int
    steps: tuple[tuple[str, int], ...]  # an operator, one of + - * /, and its operand

    def __str__(self) -> str:
        return " ".join([str(self.start), *(f"{operator} {n}" for operator, n in self.steps)])


class ArithmeticGenerator:
    """Generates problems of one difficulty.

    Args:
        steps: number of operations in a problem, 1 to 3, or "mixed": drawn for each problem.
        max_number: largest number in a problem, results included.

    Raises:
        ValueError: an argument has the wrong type or is out of range; the message names it.
    """

    def __init__(self, steps: int | str = 2, max_number: int = 30):
        if str(steps) not in ("1", "2", "3", "mixed"):
            raise ValueError(f"steps must be 1, 2, 3 or mixed, not {steps!r}")
        if not isinstance(max_number, int) or not 10 <= max_number <= 1000:
            raise ValueError(f"max_number must be a whole number from 10 to 1000, not {max_number!r}")
        self.steps = steps
        self.max_number = max_number

    def calculation(self, rng: np.random.Generator) -> Calculation:
        """A random calculation whose results stay from 1 to `max_number`."""
        start = total = int(rng.integers(2, self.max_number + 1))
        steps = []
        for _ in range(int(rng.integers(1, 4)) if self.steps == "mixed" else self.steps):
            operands = self._operands(total)
            operator = _pick([operator for operator in operands if operands[operator]], rng)
            n = _pick(operands[operator], rng)
            steps.append((operator, n))
            total = apply(operator, total, n)
        return Calculation(start, tuple(steps))

    def tell(self, calculation: Calculation, rng: np.random.Generator) -> dict[str, str]:
        """A word problem for a calculation, with random names and wordings, in the format of a GSM8K row.

        Returns: {"question": the story, "answer": a line per step with GSM8K's calculator notes, then `#### ` and the
            result}.
        """
        name, things = _pick(NAMES, rng), _pick(THINGS, rng)
        story, working = [OPENING.format(name=name, n=calculation.start, things=things)], []
        total = calculation.start
        for operator, n in calculation.steps:
            before, total = total, apply(operator, total, n)
            story.append(_pick(EVENTS[operator], rng).format(name=name, n=n, things=things))
            working.append(f"{before} {operator} {n} = <<{before}{operator}{n}={total}>>{total}")
        story.append(CLOSING.format(name=name, things=things))
        return {"question": " ".join(story), "answer": "\n".join([*working, f"#### {total}"])}

    def _operands(self, total: int) -> dict[str, range | list[int]]:
        """For each operator the operands that keep the result from 1 to `max_number`."""
        return {
            "+": range(2, self.max_number - total + 1),
            "-": range(2, total),
            "*": [n for n in FACTORS if total * n <= self.max_number],
            "/": [n for n in FACTORS if total % n == 0],
        }


def apply(operator: str, a: int, b: int) -> int:
    """The result of one operation; `operator` is one of + - * /, and a division is exact."""
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]


def _pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    """A random element, uniformly."""
    return choices[int(rng.integers(len(choices)))]


def main() -> None:
    """Print a problem with one, two and three steps."""
    rng = np.random.default_rng(0)
    for steps in (1, 2, 3):
        generator = ArithmeticGenerator(steps)
        problem = generator.tell(generator.calculation(rng), rng)
        print(f"{problem['question']}\n{problem['answer']}\n")


if __name__ == "__main__":
    main()
