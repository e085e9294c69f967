"""Scoring completions: finding the answer, the rewards of each task, and the metrics of an evaluation.

There is one evaluator per task, registered in `EVALUATORS` under the task's name. It parses a completion once, into a
`Completion`, and everything else is computed from that: the reward components, the metrics, pass@k and majority@k.

To add a reward component, write one method `name(self, completion, gold) -> float` (at most 1) and one entry
`"name": weight` in the evaluator's `components`.

A completion is untrusted text: it may hold a million tags or numbers of 100,000 digits. Parsing takes time linear in
its length and never raises an exception. `answers.py` says how an answer is read. A completion has two readings:

- The rewards use the strict one: the answer block must hold one answer, not several to choose from.
- `predict` is lenient: it takes the last answer in the answer block or, without one, the last answer in the text.

Only what follows a closed `<think>` block is scored.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

import answers as reading
from progress import did_you_mean
from scene_generator import COLOURS

if TYPE_CHECKING:
    from torch import Tensor

Answer = str | float | None  # an answer in its canonical form; None if there is none or it is unreadable

# ---------------------------------------------------------------------------------------------------------------------
# The asked format
# ---------------------------------------------------------------------------------------------------------------------
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
BEFORE_REASONING, BEFORE_ANSWER, AFTER_ANSWER = f"{TAGS[0]}\n", f"\n{TAGS[1]}\n{TAGS[2]}\n", f"\n{TAGS[3]}"
END_OF_THINKING = "</think>"

# `.*` cannot make this slow: it is tried only on texts that hold each tag once, so there is one place to split at.
STRICT_FORMAT = re.compile(f"{BEFORE_REASONING}.*{BEFORE_ANSWER}.*{AFTER_ANSWER}\n?", re.DOTALL)
BETWEEN_BLOCKS = re.compile(rf"{TAGS[1]}\s*{TAGS[2]}")


def asked_format(reasoning: str, answer: str) -> str:
    """A completion in the format that the system prompt asks for."""
    return f"{BEFORE_REASONING}{reasoning}{BEFORE_ANSWER}{answer}{AFTER_ANSWER}"


def text_after_thinking(text: str) -> str:
    """What follows the last `</think>`, without leading white space; the whole text if there is none.

    Chat templates of reasoning models open `<think>` in the prompt, so that the asked format can only follow its end.
    """
    return text.rpartition(END_OF_THINKING)[2].lstrip() if END_OF_THINKING in text else text


def follows_strict_format(text: str) -> bool:
    """Whether the text is `asked_format(...)` with each tag once; a single newline may follow."""
    return all(text.count(tag) == 1 for tag in TAGS) and STRICT_FORMAT.fullmatch(text) is not None


def follows_loose_format(text: str) -> bool:
    """Whether the text contains a reasoning block and, after white space only, an answer block."""
    opening = text.find(TAGS[0])
    border = BETWEEN_BLOCKS.search(text, opening + len(TAGS[0])) if opening >= 0 else None
    return border is not None and text.find(TAGS[3], border.end()) >= 0


def tagged_answer(text: str) -> str | None:
    """The contents of the last complete `<answer>` block, stripped, or None."""
    last_close = text.rfind(TAGS[3])
    start = text.rfind(TAGS[2], 0, last_close) if last_close >= 0 else -1
    if start < 0:
        return None
    start += len(TAGS[2])
    return text[start : text.find(TAGS[3], start)].strip()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluators
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Completion:
    """A completion, parsed once."""

    text: str
    reply: str  # what follows a closed <think> block; the text without one. Only this is scored
    tagged: str | None  # the contents of the reply's answer block; None without one
    strict_format: bool  # whether the reply is exactly in the asked format
    prediction: Answer  # the lenient reading: the last answer in the answer block, else in the reply, else in the text
    strict_prediction: Answer  # the only answer in the answer block
    earlier: tuple[Completion, ...] = ()  # the turns before this one, if there are several


@dataclass(frozen=True)
class Headline:
    """The one metric that says how good a model is at a task."""

    metric: str  # its name among the metrics
    label: str  # its name in charts and summaries
    unit: str  # "min", "" or "%"; with "%" the metric is a share in [0, 1], shown times 100
    lower_is_better: bool
    chance: float | None  # its value under guessing, where known


class RewardError(RuntimeError):
    """A completion could not be scored: a mistake in the evaluator, since any text can be scored."""


class RewardEvaluator(ABC):
    """Scores the completions of one task: how an answer is read, its reward components and the task's metrics."""

    components: ClassVar[dict[str, float]]  # name of a method (completion, gold) -> float, at most 1 -> its weight
    headline: Headline
    right_or_wrong: bool  # False if answers are nearer or farther instead
    best_constant: float | None = None  # the headline's value if every answer is the best constant one, where known
    answer_pattern: re.Pattern[str]  # what an answer looks like
    gold: str  # an example of a right answer
    task = "unnamed"  # set by `get_evaluator`

    @abstractmethod
    def value(self, match: re.Match[str]) -> Answer:
        """The canonical form of what `answer_pattern` matched; None if it is unreadable."""

    @abstractmethod
    def metrics(self, completions: Sequence[Completion], answers: Sequence[str]) -> dict[str, float]:
        """The task's metrics over one or more completions."""

    # --- Reading ---

    def parse(self, completion: str | Completion) -> Completion:
        """Find the answer of a text; a `Completion` is returned unchanged.

        Raises:
            RewardError: if the evaluator fails on the text.
        """
        if isinstance(completion, Completion):
            return completion
        with self._explained(f"reading {completion[:80]!r} in"):
            reply = text_after_thinking(completion)
            tagged, strict_format = tagged_answer(reply), follows_strict_format(reply)
            found = self._find(tagged or "")
            strict_prediction = self.value(found[0]) if len(found) == 1 else None
            found = found or self._find(reply) or (self._find(completion) if reply != completion else [])
            prediction = self.value(found[-1]) if found else None
            return Completion(completion, reply, tagged, strict_format, prediction, strict_prediction)

    def parse_episode(self, texts: Sequence[str]) -> Completion:
        """The last of the texts that the model wrote in its turns, with the others as `earlier`."""
        *earlier, last = [self.parse(text) for text in texts]
        return dataclasses.replace(last, earlier=tuple(earlier)) if earlier else last

    def parse_answer(self, text: str) -> Answer:
        """The only answer in a text, which may have words or a unit around it; None without one or with several."""
        found = self._find(text)
        return self.value(found[0]) if len(found) == 1 else None

    def canonical(self, answer: str) -> str | None:
        """A right answer from someone's data as it is written plainly; None if it is unreadable."""
        found = self.parse_answer(answer)
        return None if found is None else str(found)

    def predict(self, text: str) -> Answer:
        """The lenient reading: the last answer in the answer block or, without one, the last in the text."""
        return self.parse(text).prediction

    def is_correct(self, completion: str | Completion, answer: str) -> bool:
        """Whether the lenient reading is the right answer."""
        prediction = self.parse(completion).prediction
        return prediction is not None and prediction == self.parse_answer(answer)

    # --- Scoring ---

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The names of the K reward components."""
        return tuple(self.components)

    @property
    def highest(self) -> float:
        """The highest total reward."""
        return sum(self.components.values())

    @property
    def lowest(self) -> float:
        """The lowest total reward, which an empty completion gets."""
        return sum(self.score("", self.gold).values())

    def score(self, completion: str | Completion, answer: str) -> dict[str, float]:
        """The value of each reward component, by name."""
        completion, gold = self.parse(completion), self.parse_answer(answer)
        return {name: weight * getattr(self, name)(completion, gold) for name, weight in self.components.items()}

    def score_episode(self, texts: Sequence[str], answer: str) -> dict[str, float]:
        """The value of each reward component for the texts of all turns. The last one counts, unless a component also
        looks at `completion.earlier`."""
        return self.score(self.parse_episode(texts), answer)

    def compute_rewards(
        self, completions: Sequence[str | Completion], answers: Sequence[str]
    ) -> tuple[Tensor, dict[str, float]]:
        """Rewards (B, K), float32, and the task's metrics over all B completions; row sums are the total rewards.

        Raises:
            ValueError: unless there is one answer per completion and at least one of them.
            RewardError: if a reward or metric cannot be computed or is not a finite number; names the task and, for a
                reward, the completion.
        """
        import torch  # only here: plotter.py imports this module, and torch takes a second to import

        if len(completions) != len(answers) or not completions:
            raise ValueError(f"{len(completions)} completions cannot be scored against {len(answers)} answers")
        parsed, rows = [self.parse(completion) for completion in completions], []
        for row, (completion, answer) in enumerate(zip(parsed, answers, strict=True)):
            place = f"completion {row} of {len(parsed)}, {completion.text[:80]!r}, with the answer {answer!r}"
            with self._explained("the rewards of", f" on {place}"):
                scores = _finite(self.score(completion, answer))
                rows.append([scores[name] for name in self.reward_names])
        return torch.tensor(rows, dtype=torch.float32), self.checked_metrics(parsed, answers)  # (B, K)

    def checked_metrics(self, completions: Sequence[Completion], answers: Sequence[str]) -> dict[str, float]:
        """`metrics`; raises a RewardError that names the task if they fail or are not finite numbers."""
        with self._explained("the metrics of"):
            return _finite(self.metrics(completions, answers))

    def sampling_metrics(
        self, completions: Sequence[Completion], answers: Sequence[str], samples: Sequence[Sequence[Completion]]
    ) -> dict[str, float]:
        """The 95 % interval of the accuracy; pass@k and majority@k if there are k further `samples` of each question.
        Empty unless answers are right or wrong."""
        if not self.right_or_wrong:
            return {}
        right = sum(self.is_correct(c, answer) for c, answer in zip(completions, answers, strict=True))
        low, high = wilson_interval(right, len(completions))
        found = {"accuracy_low": low, "accuracy_high": high}
        if samples:
            k, pairs = len(samples[0]), list(zip(samples, answers, strict=True))
            correct = np.array([[self.is_correct(c, answer) for c in row] for row, answer in pairs])  # (N, k)
            votes = [[c.prediction for c in row] for row in samples]
            found |= {f"pass@{k}": pass_at_k(correct), f"majority@{k}": majority_at_k(votes, answers, self)}
        return found

    # --- Reward components of every format ---

    def strict_format(self, completion: Completion, gold: Answer) -> float:
        """The text is exactly in the asked format."""
        return completion.strict_format

    def loose_format(self, completion: Completion, gold: Answer) -> float:
        """The text contains a reasoning block followed by an answer block."""
        return follows_loose_format(completion.reply)

    def tag_count(self, completion: Completion, gold: Answer) -> float:
        """1/4 for each tag that occurs once and in order; less 0.002 per character after the last tag; at least 0."""
        text, share, position = completion.reply, 0.0, -1
        for tag in TAGS:
            place = text.find(tag, position + 1)
            if place >= 0 and text.count(tag) == 1:
                share, position = share + 0.25, place
        if TAGS[3] in text:
            share -= 0.002 * len(text.rpartition(TAGS[3])[2].removesuffix("\n"))
        return max(share, 0.0)

    # --- Helpers ---

    def _find(self, text: str) -> list[re.Match[str]]:
        return list(self.answer_pattern.finditer(reading.plain_text(text)))

    @contextmanager
    def _explained(self, what: str, place: str = "") -> Iterator[None]:
        """Turns any exception into a RewardError that names the task and the place."""
        try:
            yield
        except Exception as error:
            raise RewardError(f"{what} the task {self.task!r} failed{place}: {error!r}") from error


class ExactEvaluator(RewardEvaluator):
    """Answers that are right or wrong."""

    headline = Headline("accuracy", "accuracy", "%", lower_is_better=False, chance=None)
    right_or_wrong = True

    def correctness(self, completion: Completion, gold: Answer) -> float:
        """The answer block holds the right answer and no other."""
        return completion.strict_prediction is not None and completion.strict_prediction == gold

    def metrics(self, completions: Sequence[Completion], answers: Sequence[str]) -> dict[str, float]:
        """`accuracy` of the lenient readings; `accuracy_strict`: right and in exactly the asked format."""
        pairs, n = list(zip(completions, answers, strict=True)), len(completions)
        strict = [c.strict_format and self.correctness(c, self.parse_answer(answer)) for c, answer in pairs]
        return {
            "accuracy": sum(self.is_correct(c, answer) for c, answer in pairs) / n,
            "accuracy_strict": sum(strict) / n,
            "format_fraction": sum(c.strict_format for c in completions) / n,
        }


class ExactNumberEvaluator(ExactEvaluator):
    """Numbers that are right or wrong, with the five reward components usual for GSM8K."""

    components: ClassVar = {
        "correctness": 2.0,
        "integer": 0.5,
        "strict_format": 0.5,
        "loose_format": 0.5,
        "tag_count": 0.5,
    }
    answer_pattern = reading.NUMBER
    gold = "72"

    def value(self, match: re.Match[str]) -> str | None:
        """The number as a plain decimal, "1080" or "-2.5", or as a fraction, "1/3"."""
        value = reading.read_number(match)
        return None if value is None else reading.write_number(value)

    def integer(self, completion: Completion, gold: Answer) -> float:
        """The answer block is one whole number, right or wrong, and nothing else."""
        return completion.strict_prediction is not None and reading.is_integer(completion.tagged or "")


class ClosenessEvaluator(RewardEvaluator):
    """Answers that are nearer or farther. An unreadable answer has the largest error."""

    right_or_wrong = False
    max_error: float

    @abstractmethod
    def distance(self, prediction: str | float, gold: str | float) -> float:
        """Distance of a readable answer to the right one, 0 to `max_error`."""

    def error(self, prediction: Answer, gold: Answer) -> float:
        """Distance to the right answer, 0 to `max_error`; an unreadable answer (None) counts as `max_error`."""
        if gold is None:
            raise ValueError("the right answer is unreadable")
        return self.max_error if prediction is None else self.distance(prediction, gold)

    def closeness(self, completion: Completion, gold: Answer) -> float:
        """From 1 for the right answer down to -1 for the largest error or an unreadable answer."""
        return 1 - 2 * self.error(completion.strict_prediction, gold) / self.max_error

    def is_correct(self, completion: str | Completion, answer: str) -> bool:
        return self.error(self.parse(completion).prediction, self.parse_answer(answer)) == 0

    def errors(self, completions: Sequence[Completion], answers: Sequence[str]) -> np.ndarray:
        """The errors (B,) of the lenient readings."""
        golds = [self.parse_answer(answer) for answer in answers]
        return np.array([self.error(c.prediction, gold) for c, gold in zip(completions, golds, strict=True)])


class ClockEvaluator(ClosenessEvaluator):
    """Times on a dial. The error is the shorter way round the 12-hour circle, in minutes."""

    components: ClassVar = {"closeness": 3.0, "time_format": 0.5, "strict_format": 0.5}
    headline = Headline("mean_abs_error_minutes", "mean error", "min", lower_is_better=True, chance=180.0)
    best_constant: float | None = 180.0  # on a circle, no answer is nearer to all times than another
    answer_pattern = reading.TIME
    gold = "08:15:30"
    max_error = 360.0

    def value(self, match: re.Match[str]) -> str | None:
        """A time as HH:MM:SS."""
        return reading.read_time(match)

    def distance(self, prediction: str | float, gold: str | float) -> float:
        return clock_error_minutes(reading.clock_seconds(prediction), reading.clock_seconds(gold))

    def time_format(self, completion: Completion, gold: Answer) -> float:
        """The answer block is a time as HH:MM:SS and nothing else."""
        return completion.strict_prediction is not None and reading.is_full_time(completion.tagged or "")

    def metrics(self, completions: Sequence[Completion], answers: Sequence[str]) -> dict[str, float]:
        errors = self.errors(completions, answers)  # (B,), minutes
        return {
            "mean_abs_error_minutes": float(errors.mean()),
            "median_abs_error_minutes": float(np.median(errors)),
            **{f"within_{n}_minute{'s' if n > 1 else ''}": float((errors <= n).mean()) for n in (1, 5, 10)},
            "unreadable_fraction": _unreadable_fraction(completions),
        }


class CorrelationEvaluator(ClosenessEvaluator):
    """Correlations from -1 to 1; a number outside is unreadable."""

    components: ClassVar = {"closeness": 1.0, "value_format": 0.5, "strict_format": 0.5}
    headline = Headline("mean_abs_error", "mean error", "", lower_is_better=True, chance=2 / 3)  # two uniform numbers
    best_constant = 0.5  # always 0, with r uniform in [-1, 1]
    answer_pattern = reading.NUMBER
    gold = "-0.42"
    max_error = 2.0

    def value(self, match: re.Match[str]) -> float | None:
        """A number from -1 to 1; a percentage is unreadable, since 42 % may be meant as 0.42 or as 0.0042."""
        value = None if match["percent"] else reading.read_number(match)
        return float(value) if value is not None and -1 <= value <= 1 else None

    def distance(self, prediction: str | float, gold: str | float) -> float:
        return abs(float(prediction) - float(gold))

    def value_format(self, completion: Completion, gold: Answer) -> float:
        """The answer block is a decimal number from -1 to 1 and nothing else."""
        return completion.strict_prediction is not None and reading.is_decimal(completion.tagged or "")

    def metrics(self, completions: Sequence[Completion], answers: Sequence[str]) -> dict[str, float]:
        """`pearson_r` is over the readable answers; 0 if either side is constant."""
        pairs = [(c.prediction, self.parse_answer(answer)) for c, answer in zip(completions, answers, strict=True)]
        readable = np.array([pair for pair in pairs if pair[0] is not None])  # (N, 2)
        return {
            "mean_abs_error": float(self.errors(completions, answers).mean()),
            "pearson_r": _pearson_r(readable) if len(readable) else 0.0,
            "unreadable_fraction": _unreadable_fraction(completions),
        }


class ColourEvaluator(ExactEvaluator):
    """Names of colours that are right or wrong."""

    components: ClassVar = {"correctness": 2.0, "strict_format": 0.5}
    headline = replace(ExactEvaluator.headline, chance=1 / len(COLOURS))
    best_constant = 1 / len(COLOURS)
    answer_pattern = re.compile(rf"\b({'|'.join(COLOURS)})\b", re.IGNORECASE)
    gold = "red"

    def value(self, match: re.Match[str]) -> str:
        return match[0].lower()


class FeedbackEvaluator(ClosenessEvaluator):
    """Answers that are given again after feedback. The last one is scored; how it compares with the first is logged.
    Mixed in before the evaluator of a single turn.

    The option `improvement` of these tasks is the weight of a further component (SCoRe, arXiv 2409.12917, section 5.2,
    pays for progress between two answers in the same way)."""

    def improvement(self, completion: Completion, gold: Answer) -> float:
        """How much nearer the last answer is than the first, from -1 to 1 in units of the largest error."""
        first = completion.earlier[0] if completion.earlier else completion
        gain = self.error(first.strict_prediction, gold) - self.error(completion.strict_prediction, gold)
        return gain / self.max_error

    def metrics(self, completions: Sequence[Completion], answers: Sequence[str]) -> dict[str, float]:
        """Besides the task's metrics of the last answers: `first_error` and `last_error`, means; `improved` and
        `harmed`, the shares of rows whose last answer is nearer or farther than the first; `copied`, the share whose
        last answer is the first."""
        firsts = [c.earlier[0] if c.earlier else c for c in completions]  # B
        first, last = self.errors(firsts, answers), self.errors(completions, answers)  # (B,) each
        same = [a.prediction == b.prediction for a, b in zip(firsts, completions, strict=True)]
        return {
            **super().metrics(completions, answers),  # type: ignore[safe-super]
            "first_error": float(first.mean()),
            "last_error": float(last.mean()),
            "improved": float((last < first).mean()),
            "harmed": float((last > first).mean()),
            "copied": sum(same) / len(same),
        }


class ClockFeedbackEvaluator(FeedbackEvaluator, ClockEvaluator):
    """Times on a dial, in two turns."""


class CorrelationFeedbackEvaluator(FeedbackEvaluator, CorrelationEvaluator):
    """Correlations, in two turns."""


# ---------------------------------------------------------------------------------------------------------------------
# One's own data: how answers are read is chosen with --dataset_options reward=...
# ---------------------------------------------------------------------------------------------------------------------
OWN_COMPONENTS = {"correctness": 2.0, "plain": 0.5, "strict_format": 0.5, "loose_format": 0.5, "tag_count": 0.5}


class NumberEvaluator(ExactNumberEvaluator):
    """Numbers of any kind that are right or wrong."""

    components: ClassVar = OWN_COMPONENTS

    def canonical(self, answer: str) -> str | None:
        """The number; of an answer in GSM8K's form, the one after the last `####`."""
        return super().canonical(answer.rpartition("####")[2])

    def plain(self, completion: Completion, gold: Answer) -> float:
        """The answer block is a number in digits and nothing else."""
        return completion.strict_prediction is not None and reading.is_plain_number(completion.tagged or "")


class ChoiceEvaluator(ExactEvaluator):
    """One of the letters A to J."""

    components: ClassVar = OWN_COMPONENTS
    answer_pattern = reading.CHOICE
    gold = "B"

    def value(self, match: re.Match[str]) -> str:
        """The letter as a capital."""
        return match[0].strip("()[].:").upper()

    def plain(self, completion: Completion, gold: Answer) -> float:
        """The answer block is a letter and nothing else."""
        return completion.strict_prediction is not None and len(completion.tagged or "") == 1


class TextEvaluator(ExactEvaluator):
    """A line of text. Case, blanks and punctuation around it do not count."""

    components: ClassVar = OWN_COMPONENTS
    answer_pattern = reading.LINE
    gold = "Ada Lovelace"

    def value(self, match: re.Match[str]) -> str | None:
        return reading.read_line(match)

    def canonical(self, answer: str) -> str | None:
        """The text as it was written, if it is one line."""
        return None if self.parse_answer(answer) is None else answer.strip()

    def plain(self, completion: Completion, gold: Answer) -> float:
        """The answer block is one line."""
        return completion.strict_prediction is not None


class TimeEvaluator(ClockEvaluator):
    """Times on a 12-hour dial, scored by their distance. How often each time occurs is unknown, and so is chance."""

    headline = replace(ClockEvaluator.headline, chance=None)
    best_constant = None


REWARDS: dict[str, type[RewardEvaluator]] = {
    "number": NumberEvaluator,
    "text": TextEvaluator,
    "choice": ChoiceEvaluator,
    "time": TimeEvaluator,
}

EVALUATORS: dict[str, type[RewardEvaluator]] = {
    "gsm8k": ExactNumberEvaluator,
    "arithmetic": ExactNumberEvaluator,
    "clock": ClockEvaluator,
    "correlation": CorrelationEvaluator,
    "look": ColourEvaluator,
    "clock_feedback": ClockFeedbackEvaluator,
    "correlation_feedback": CorrelationFeedbackEvaluator,
    "jsonl": NumberEvaluator,  # or another of REWARDS
}


def get_evaluator(name: str, options: Mapping[str, object] | None = None) -> RewardEvaluator:
    """The evaluator of a task; `options` are those of its dataset, of which `reward` chooses from `REWARDS`, and
    `improvement` is the weight of the reward component of that name.

    Raises:
        ValueError: for an unknown task or reward, naming the nearest; for a weight that is no number from 0 on.
    """
    if name not in EVALUATORS:
        raise ValueError(f"no evaluator for the task {name!r}; {did_you_mean(name, EVALUATORS)}")
    kind = str((options or {}).get("reward", ""))
    if kind and kind not in REWARDS:
        raise ValueError(f"there is no reward {kind!r}; {did_you_mean(kind, REWARDS)}")
    evaluator = REWARDS[kind]() if kind else EVALUATORS[name]()
    evaluator.task = name
    if weight := checked_weight((options or {}).get("improvement", 0)):
        evaluator.components = {**evaluator.components, "improvement": weight}  # type: ignore[misc]
    return evaluator


def checked_weight(value: object) -> float:
    """The weight `improvement`, which may be a text. Raises ValueError unless it is a number, 0 or more."""
    try:
        weight = float(str(value))
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ValueError(f"improvement must be a number, 0 or more, not {value!r}")
    return weight


def clock_error_minutes(a: int | None, b: int | None) -> float:
    """The shorter way round a 12-hour dial between two times in seconds; 360 if one is unreadable (None)."""
    return 360.0 if a is None or b is None else min((a - b) % 43200, (b - a) % 43200) / 60


def _finite(values: dict[str, float]) -> dict[str, float]:
    """The values as floats; raises a ValueError for one that is not finite."""
    floats = {name: float(value) for name, value in values.items()}
    for name, value in floats.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    return floats


def _unreadable_fraction(completions: Sequence[Completion]) -> float:
    return sum(c.prediction is None for c in completions) / len(completions)


def _pearson_r(pairs: np.ndarray) -> float:
    """Correlation of the two columns of pairs (N, 2); 0 if a column is constant."""
    centred = pairs - pairs.mean(axis=0)  # (N, 2)
    spread = np.sqrt((centred**2).sum(axis=0))  # (2,)
    if spread.min() < 1e-12:
        return 0.0
    return float(np.clip(centred[:, 0] @ centred[:, 1] / spread.prod(), -1, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of right and wrong answers
# ---------------------------------------------------------------------------------------------------------------------
def wilson_interval(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of the share correct / n, 95 % at z = 1.96 (Wilson, 1927); valid for small n too.

    Raises:
        ValueError: unless 0 <= correct <= n and n >= 1.
    """
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"{correct} out of {n} is no share")
    share = correct / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at_k(correct: np.ndarray, k: int | None = None) -> float:
    """The chance that at least one of k samples is right, from correct (N, n), bool: n samples of each of N questions.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al., "Evaluating Large Language Models Trained on Code"
    (2021), averaged over questions, where c samples of a question are right. k defaults to n.

    Raises:
        ValueError: unless 1 <= k <= n.
    """
    correct = np.asarray(correct, dtype=bool)  # (N, n)
    n = correct.shape[1]
    k = n if k is None else k
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples per question")
    misses = (n - correct.sum(axis=1)).tolist()  # (N,)
    return float(np.mean([1 - math.comb(miss, k) / math.comb(n, k) for miss in misses]))


def majority_at_k(predictions: Sequence[Sequence[Answer]], answers: Sequence[str], evaluator: RewardEvaluator) -> float:
    """The share of N questions whose most frequent prediction is right.

    `predictions` are N lists of k lenient readings. Unreadable ones do not vote; in a tie the earlier one wins.
    """
    right = 0
    for votes, answer in zip(predictions, answers, strict=True):
        ranking = Counter(vote for vote in votes if vote is not None).most_common(1)
        right += bool(ranking) and ranking[0][0] == evaluator.parse_answer(answer)
    return right / len(answers)
