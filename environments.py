"""What answers the model's turn? An environment reads what the model wrote and shows it the next message, or ends the
episode.

A task with several turns sets `max_turns` and returns its environment from `Dataset.environment` (rldatasets.py). A
tool is what an environment does with the text of a turn. Rewards are not given here: evaluator.py scores the texts that
the model wrote, and never those of an observation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

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


class EpisodeError(RuntimeError):
    """An environment failed: a mistake in its code, since any text can be answered."""
