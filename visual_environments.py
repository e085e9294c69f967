"""Environments that answer with a picture: a cell of a scene enlarged, or the model's answer drawn for comparison.

Every one of them has the option `feedback`, whose other values are controls: with `real` a model may use what it is
shown; with the others it is shown as many pictures and words, which cannot help.

    real       what the model asked for, or what its answer looks like
    original   the question's picture again: one more look, without the tool
    blank      a white picture
    random     the drawing for a random cell or answer, whatever the model wrote
    shifted    the drawing for the next cell, a time one hour later, or a correlation that differs by 0.5: does what
               the model answers then move with the drawing?
    none       the words without a picture

What is drawn depends on the example's pictures and id and on what the model wrote, and never on the right answer.
"""

from __future__ import annotations

import re
import zlib
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from clock_image_generator import ClockImageGenerator
from correlation_generator import CorrelationGenerator
from environments import Environment, Observation
from evaluator import ClockEvaluator, CorrelationEvaluator, tagged_answer
from scene_generator import Scene, SceneGenerator

if TYPE_CHECKING:
    from rldatasets import Example

FEEDBACK = ("real", "original", "blank", "random", "shifted", "none")


class PictureEnvironment(Environment):
    """Answers each turn but the last with a picture. Base of the environments below.

    Args:
        feedback: one of FEEDBACK.
    """

    unreadable: str  # what a turn that cannot be read is told

    def __init__(self, example: Example, feedback: str = "real"):
        super().__init__(example)
        self.feedback, self.turn = feedback, 0

    @abstractmethod
    def read(self, text: str) -> Any:
        """What the turn asks for or answers; None if it is unreadable."""

    @abstractmethod
    def draw(self, found: Any) -> Image.Image:
        """The picture for what `read` found."""

    @abstractmethod
    def other(self, rng: np.random.Generator) -> Any:
        """Something random that `draw` can draw instead."""

    @abstractmethod
    def shifted(self, found: Any) -> Any:
        """What `draw` draws instead for `shifted` feedback."""

    @abstractmethod
    def words(self, found: Any) -> str:
        """The text below the picture."""

    def step(self, text: str) -> Observation | None:
        if self.is_over(text):
            return None
        self.turn += 1
        found = self.read(text)
        if found is None:
            return Observation(self.unreadable, (self.example.images[0],), malformed=True)
        pictures = () if self.feedback == "none" else (self.picture(found),)
        return Observation(self.words(found), pictures)

    def picture(self, found: Any) -> Image.Image:
        """What the option `feedback` shows for what `read` found."""
        original = self.example.images[0]
        if self.feedback == "original":
            return original
        if self.feedback == "blank":
            return Image.new("RGB", original.size, "white")
        if self.feedback == "random":
            found = self.other(np.random.default_rng([zlib.crc32(self.example.id.encode()), self.turn]))
        return self.draw(self.shifted(found) if self.feedback == "shifted" else found)

    def is_over(self, text: str) -> bool:
        """Whether a turn ends the episode before its last turn."""
        return False


class Look(PictureEnvironment):
    """Enlarges, in colour, the cell of a scene whose number a turn names. A turn with an answer block ends the
    episode."""

    unreadable = "That is no cell. What colour is the odd shape?"

    def __init__(self, example: Example, feedback: str, generator: SceneGenerator, scene: Scene):
        super().__init__(example, feedback)
        self.generator, self.scene = generator, scene

    def is_over(self, text: str) -> bool:
        return tagged_answer(text) is not None

    def read(self, text: str) -> int | None:
        """The last number in the text, if it is a cell's."""
        numbers = re.findall("[0-9]+", text[-100:])
        return int(numbers[-1]) if numbers and 1 <= int(numbers[-1]) <= self.generator.cells else None

    def draw(self, found: int) -> Image.Image:
        return self.generator.crop(self.scene, found)

    def other(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.generator.cells)) + 1

    def shifted(self, found: int) -> int:
        return found % self.generator.cells + 1

    def words(self, found: int) -> str:
        return "What colour is the odd shape?"


class ClockFeedback(PictureEnvironment):
    """Draws the time that the model answered, in orange outlines over the clock (`overlay`), as a clock beside it
    (`side`), or as a clock of its own (`alone`)."""

    unreadable = "I could not read a time. Answer again."
    views = ("overlay", "side", "alone")

    def __init__(self, example: Example, feedback: str, generator: ClockImageGenerator, view: str = "overlay"):
        super().__init__(example, feedback)
        self.generator, self.view = generator, view

    def read(self, text: str) -> tuple[int, int, int] | None:
        time = ClockEvaluator().predict(text)
        if time is None:
            return None
        hour, minute, second = (int(part) for part in str(time).split(":"))
        return hour, minute, second

    def draw(self, found: tuple[int, int, int]) -> Image.Image:
        original = self.example.images[0]
        if self.view == "overlay":
            return self.generator.draw_over(original, *found)
        drawn = self.generator.generate(*found)
        return beside(original, drawn) if self.view == "side" else drawn

    def other(self, rng: np.random.Generator) -> tuple[int, int, int]:
        hour, minute, second = (int(rng.integers(end)) for end in (12, 60, 60))
        return hour, minute, second

    def shifted(self, found: tuple[int, int, int]) -> tuple[int, int, int]:
        hour, minute, second = found
        return hour % 12 + 1, minute, second

    def words(self, found: tuple[int, int, int]) -> str:
        return "This is your answer, drawn. Answer again."


class CorrelationFeedback(PictureEnvironment):
    """Draws the correlation that the model answered over the points: the ellipse of two standard deviations, or orange
    points with exactly that correlation (`view`)."""

    unreadable = "I could not read a correlation. Answer again."
    views = ("ellipse", "points")

    def __init__(
        self,
        example: Example,
        feedback: str,
        generator: CorrelationGenerator,
        view: str = "ellipse",
        limit: float = 3.0,
    ):
        super().__init__(example, feedback)
        self.generator, self.view, self.limit = generator, view, limit  # limit: of the plot's axes

    def read(self, text: str) -> float | None:
        found = CorrelationEvaluator().predict(text)
        return None if found is None else float(found)

    def draw(self, found: float) -> Image.Image:
        original = self.example.images[0]
        if self.view == "ellipse":
            return self.generator.draw_ellipse(original, found, self.limit)
        rng = np.random.default_rng(zlib.crc32(self.example.id.encode()))
        return self.generator.draw_over(original, *self.generator.points(found, rng), self.limit)

    def other(self, rng: np.random.Generator) -> float:
        return float(rng.uniform(-1, 1))

    def shifted(self, found: float) -> float:
        return found + 0.5 if found <= 0.5 else found - 0.5

    def words(self, found: float) -> str:
        return "This is your answer, drawn. Answer again."


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures of the same height side by side."""
    both = Image.new("RGB", (left.width + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both
