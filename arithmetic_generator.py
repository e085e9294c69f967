"""Word problems in the form of GSM8K: a source of randomness in, a question and its worked answer out.

Somebody has some things, and then something happens to them one to three times, each time an operation on how many
there are. No result is below 1 and divisions come out even. `python arithmetic_generator.py` prints a few.
"""

from dataclasses import dataclass

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
EVENTS = {  # how each operation is told, n being the operand
    "+": ("{name} buys {n} more {things}.", "A friend gives {name} {n} {things}.", "{name} finds {n} {things}."),
    "-": ("{name} gives away {n} {things}.", "{name} loses {n} {things}.", "{name} sells {n} {things}."),
    "*": ("Soon {name} has {n} times as many {things}.", "The pile of {things} grows to {n} times its size."),
    "/": (
        "{name} packs the {things} into {n} equal bags and keeps one bag.",
        "{n} people, {name} among them, share the {things} equally.",
    ),
}
CLOSING = "How many {things} does {name} have now?"
FACTORS = range(2, 6)  # what is multiplied with and divided by


@dataclass(frozen=True)
class Calculation:
    """A number to start from, and the steps from there."""

    start: int
    steps: tuple[tuple[str, int], ...]  # an operator of + - * / and its operand

    def __str__(self) -> str:
        return " ".join([str(self.start), *(f"{operator} {n}" for operator, n in self.steps)])


class ArithmeticGenerator:
    """Makes problems of one difficulty.

    Args:
        steps: how many operations a problem takes, 1 to 3, or "mixed".
        max_number: the largest number that occurs, results included.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(self, steps: int | str = 2, max_number: int = 30):
        if str(steps) not in ("1", "2", "3", "mixed"):
            raise ValueError(f"steps must be 1, 2, 3 or mixed, not {steps!r}")
        if not isinstance(max_number, int) or not 10 <= max_number <= 1000:
            raise ValueError(f"max_number must be a whole number from 10 to 1000, not {max_number!r}")
        self.steps = steps
        self.max_number = max_number

    def calculation(self, rng: np.random.Generator) -> Calculation:
        """What is to be calculated, as yet without a story."""
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
        """A story about a calculation: {"question": ..., "answer": the steps, then `#### ` and the result}."""
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
        """The operands that each operator may take so that the result stays from 1 to `max_number`."""
        return {
            "+": range(2, self.max_number - total + 1),
            "-": range(2, total),
            "*": [n for n in FACTORS if total * n <= self.max_number],
            "/": [n for n in FACTORS if total % n == 0],
        }


def apply(operator: str, a: int, b: int) -> int:
    """The result of one step."""
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]


def _pick(choices, rng: np.random.Generator):
    return choices[int(rng.integers(len(choices)))]


def main() -> None:
    """Print a problem of each number of steps."""
    rng = np.random.default_rng(0)
    for steps in (1, 2, 3):
        generator = ArithmeticGenerator(steps)
        problem = generator.tell(generator.calculation(rng), rng)
        print(f"{problem['question']}\n{problem['answer']}\n")


if __name__ == "__main__":
    main()
