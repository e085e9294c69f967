"""Scoring completions: finding the answer, the rewards of each task, and the metrics of an evaluation.

A completion is asked to look like this:

    <reasoning>
    ...
    </reasoning>
    <answer>
    ...
    </answer>

There is one evaluator per task, registered in `EVALUATORS` under the task's name. What a model wrote is untrusted text:
it may hold a million tags or numbers of 100,000 digits. Every reading here takes time linear in its length and yields
an answer or None, never an exception.

Rewards look into the tags alone: the answer block must hold one answer, not a list to choose from. `predict` is more
lenient: it takes the last answer in the tags or, failing that, the last one anywhere in the text.
"""

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Reading = str | float | None  # an answer as the evaluator understands it; None where there is none

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
# `.*` cannot make this slow: it is tried only on texts that hold each tag once, so there is one place to split at.
STRICT_FORMAT = re.compile(r"<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\n?", re.DOTALL)
BETWEEN_BLOCKS = re.compile(r"</reasoning>\s*<answer>")

# Digits are 0 to 9 only. A minus after a letter, digit or bracket is an operator ("10-3"), not a sign.
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
SIGN = r"(?:(?<![\w)\]])[-−+]\$?|\$[-−]?)?"
NUMBER = re.compile(rf"{SIGN}(?:{DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
INTEGER = re.compile(rf"[-−+]?{DIGITS}")
PLAIN_DECIMAL = re.compile(r"[-−+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
CLOCK_TIME = re.compile(r"(?<![0-9:])[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?(?![0-9:])")
FULL_CLOCK_TIME = re.compile(r"[0-9]{2}:[0-9]{2}:[0-9]{2}")

LONGEST_NUMBER = 64  # characters; no answer needs more, and a conversion beyond would not be linear


# ---------------------------------------------------------------------------------------------------------------------
# Reading a completion
# ---------------------------------------------------------------------------------------------------------------------
def tagged_answer(text: str) -> str | None:
    """What stands in the last complete `<answer>...</answer>` of a text, stripped; None without such a block."""
    last_close = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, last_close) if last_close >= 0 else -1
    if start < 0:
        return None
    start += len("<answer>")
    return text[start : text.find("</answer>", start)].strip()


def read_number(text: str) -> Decimal | None:
    """The exact value of a number: `1,080`, `$1080`, `1080.00`, `1080` are the same. None if it is none or huge."""
    text = text.strip()
    if len(text) > LONGEST_NUMBER or not NUMBER.fullmatch(text):
        return None
    try:
        value = Decimal(text.replace(",", "").replace("$", "").replace("−", "-"))
    except InvalidOperation:  # an exponent too large even for Decimal
        return None
    return value if abs(value.adjusted()) <= LONGEST_NUMBER else None


def follows_strict_format(text: str) -> bool:
    """Whether the whole text is the asked format, each tag once; a single newline may follow."""
    return all(text.count(tag) == 1 for tag in TAGS) and STRICT_FORMAT.fullmatch(text) is not None


def follows_loose_format(text: str) -> bool:
    """Whether a reasoning block, with nothing but white space before an answer block, stands anywhere in the text."""
    opening = text.find("<reasoning>")
    border = BETWEEN_BLOCKS.search(text, opening + len("<reasoning>")) if opening >= 0 else None
    return border is not None and text.find("</answer>", border.end()) >= 0


def tag_count_reward(text: str) -> float:
    """0.125 for each tag in place, once and in order; less 0.001 for each character after the last; never below 0."""
    reward, position = 0.0, -1
    for tag in TAGS:
        place = text.find(tag, position + 1)
        if place >= 0 and text.count(tag) == 1:
            reward += 0.125
            position = place
    if "</answer>" in text:
        reward -= 0.001 * len(text.rpartition("</answer>")[2].removesuffix("\n"))
    return max(reward, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluators
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Headline:
    """The one number that says how good a model is at a task."""

    metric: str  # its name among the metrics
    label: str  # what a person calls it
    unit: str  # "min", "" or "%"; with "%" the metric is a share in [0, 1], shown times 100
    lower_is_better: bool
    chance: float | None  # its value under guessing, where known


class RewardError(RuntimeError):
    """A reward could not be computed: a mistake in the evaluator, since any text can be scored."""


class RewardEvaluator(ABC):
    """Scores completions of one task. A subclass says how an answer is read, rewarded and measured."""

    reward_names: tuple[str, ...]  # K of them
    headline: Headline
    exact: bool  # whether answers are right or wrong, rather than near or far
    best_constant: float | None = None  # the headline's value if every answer is the best constant one, where known
    answer_pattern: re.Pattern  # what an answer looks like
    task = "unnamed"  # set by `get_evaluator`

    @abstractmethod
    def read(self, text: str) -> Reading:
        """One answer as matched by `answer_pattern`, in its canonical form; None if it is not a possible answer."""

    @abstractmethod
    def score(self, completion: str, answer: str) -> tuple[float, ...]:
        """The K reward components of one completion, in the order of `reward_names`."""

    @abstractmethod
    def measure(self, completions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
        """The task's metrics over some completions, at least one."""

    @abstractmethod
    def is_correct(self, completion: str, answer: str) -> bool:
        """Whether the lenient reading of the completion is the answer."""

    def compute_rewards(self, completions: Sequence[str], answers: Sequence[str]) -> tuple["Tensor", dict[str, float]]:
        """Rewards (B, K), float32, whose row sums are the completions' rewards, and the metrics over all of them.

        Raises:
            ValueError: unless there is one answer per completion and at least one of them.
            RewardError: if a reward or metric cannot be computed, naming the task and the reward's completion.
        """
        import torch  # only here, so that reading answers does not cost a second of importing

        if len(completions) != len(answers) or not completions:
            raise ValueError(f"{len(completions)} completions cannot be scored against {len(answers)} answers")
        rows = []
        for row, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            try:
                rows.append(self.score(completion, answer))
            except Exception as error:
                place = f"completion {row} of {len(completions)}, {completion[:80]!r}, with the answer {answer!r}"
                raise RewardError(f"the rewards of the task {self.task!r} failed on {place}: {error!r}") from error
        try:
            metrics = self.measure(completions, answers)
        except Exception as error:
            raise RewardError(f"the metrics of the task {self.task!r} failed: {error!r}") from error
        return torch.tensor(rows, dtype=torch.float32), metrics  # (B, K)

    def predict(self, completion: str) -> Reading:
        """The lenient reading: the last answer in the tags or, failing that, the last one in the text."""
        for text in (tagged_answer(completion), completion):
            found = self.answer_pattern.findall(text or "")
            if found:
                return self.read(found[-1])
        return None

    def predict_strictly(self, completion: str) -> Reading:
        """The answer in the tags, which may have a unit or words about it but no second answer beside it."""
        found = self.answer_pattern.findall(tagged_answer(completion) or "")
        return self.read(found[0]) if len(found) == 1 else None


class ExactNumberEvaluator(RewardEvaluator):
    """Answers that are right or wrong numbers, with the five rewards usual for GSM8K; at most 4.0 in all."""

    reward_names = ("correctness", "integer", "strict_format", "loose_format", "tag_count")
    headline = Headline("accuracy", "accuracy", "%", lower_is_better=False, chance=None)
    exact = True
    answer_pattern = NUMBER

    def read(self, text: str) -> str | None:
        """The number written plainly, so that equal numbers are equal texts: "1080", "-2.5"."""
        value = read_number(text)
        if not value:
            return None if value is None else "0"
        plain = f"{value:f}"
        return plain.rstrip("0").rstrip(".") if "." in plain else plain

    def score(self, completion: str, answer: str) -> tuple[float, ...]:
        prediction = self.predict_strictly(completion)
        is_integer = prediction is not None and INTEGER.fullmatch(tagged_answer(completion)) is not None
        return (
            2.0 * self._matches(prediction, answer),
            0.5 * is_integer,
            0.5 * follows_strict_format(completion),
            0.5 * follows_loose_format(completion),
            tag_count_reward(completion),
        )

    def is_correct(self, completion: str, answer: str) -> bool:
        return self._matches(self.predict(completion), answer)

    def measure(self, completions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
        """`accuracy`: right wherever the answer stands; `accuracy_strict`: right in exactly the asked format."""
        pairs = list(zip(completions, answers, strict=True))
        formatted = [follows_strict_format(completion) for completion in completions]
        strict = [
            good and self._matches(self.predict_strictly(c), a) for good, (c, a) in zip(formatted, pairs, strict=True)
        ]
        return {
            "accuracy": sum(self.is_correct(*pair) for pair in pairs) / len(pairs),
            "accuracy_strict": sum(strict) / len(pairs),
            "format_fraction": sum(formatted) / len(pairs),
        }

    def _matches(self, prediction: Reading, answer: str) -> bool:
        return prediction is not None and prediction == self.read(answer)


class ClosenessEvaluator(RewardEvaluator):
    """Answers that are nearer or farther. An unreadable one counts as far off as an answer can be."""

    exact = False
    max_error: float

    @abstractmethod
    def error(self, prediction: Reading, answer: str) -> float:
        """How far a reading is from the answer, 0 to `max_error`, which is also the error of None."""

    def is_correct(self, completion: str, answer: str) -> bool:
        return self.error(self.predict(completion), answer) == 0

    def errors(self, completions: Sequence[str], answers: Sequence[str]) -> tuple[list[Reading], np.ndarray]:
        """The lenient readings, and their errors (B,)."""
        predictions = [self.predict(completion) for completion in completions]
        return predictions, np.array([self.error(*pair) for pair in zip(predictions, answers, strict=True)])


class ClockEvaluator(ClosenessEvaluator):
    """Times on a dial. The error is the shorter way round the 12-hour circle, in minutes; at most 4.0 reward in all."""

    reward_names = ("closeness", "time_format", "strict_format")
    headline = Headline("mean_abs_error_minutes", "mean error", "min", lower_is_better=True, chance=180.0)
    best_constant = 180.0  # on a circle, no answer is nearer to all times than another
    answer_pattern = CLOCK_TIME
    max_error = 360.0

    def read(self, text: str) -> str | None:
        """A time as HH:MM:SS; seconds that are not given are 0."""
        hour, minute, second = ([int(part) for part in text.split(":")] + [0])[:3]
        return f"{hour:02}:{minute:02}:{second:02}" if hour < 24 and minute < 60 and second < 60 else None

    def error(self, prediction: Reading, answer: str) -> float:
        if prediction is None:
            return self.max_error
        apart = abs(_seconds(prediction) - _seconds(answer)) % 43200  # 13:05 and 01:05 look the same on a dial
        return min(apart, 43200 - apart) / 60

    def score(self, completion: str, answer: str) -> tuple[float, ...]:
        tagged = tagged_answer(completion) or ""
        is_time = FULL_CLOCK_TIME.fullmatch(tagged) is not None and self.read(tagged) is not None
        return (
            3.0 - 6.0 * self.error(self.predict_strictly(completion), answer) / self.max_error,
            0.5 * is_time,
            0.5 * follows_strict_format(completion),
        )

    def measure(self, completions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
        predictions, errors = self.errors(completions, answers)  # errors (B,), minutes
        return {
            "mean_abs_error_minutes": float(errors.mean()),
            "median_abs_error_minutes": float(np.median(errors)),
            **{f"within_{n}_minute{'s' if n > 1 else ''}": float((errors <= n).mean()) for n in (1, 5, 10)},
            "unreadable_fraction": predictions.count(None) / len(predictions),
        }


class CorrelationEvaluator(ClosenessEvaluator):
    """Correlations from -1 to 1; a number outside is no reading. At most 2.0 reward in all."""

    reward_names = ("closeness", "value_format", "strict_format")
    headline = Headline("mean_abs_error", "mean error", "", lower_is_better=True, chance=2 / 3)  # two uniform numbers
    best_constant = 0.5  # always 0, with r uniform in [-1, 1]
    answer_pattern = NUMBER
    max_error = 2.0

    def read(self, text: str) -> float | None:
        value = read_number(text)
        return float(value) if value is not None and -1 <= value <= 1 else None

    def error(self, prediction: Reading, answer: str) -> float:
        return self.max_error if prediction is None else abs(prediction - float(answer))

    def score(self, completion: str, answer: str) -> tuple[float, ...]:
        tagged = tagged_answer(completion) or ""
        is_value = PLAIN_DECIMAL.fullmatch(tagged) is not None and self.read(tagged) is not None
        return (
            1.0 - self.error(self.predict_strictly(completion), answer),
            0.5 * is_value,
            0.5 * follows_strict_format(completion),
        )

    def measure(self, completions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
        """`pearson_r` is over the readable answers; 0 where one side does not vary."""
        predictions, errors = self.errors(completions, answers)  # errors (B,)
        read = [(p, float(a)) for p, a in zip(predictions, answers, strict=True) if p is not None]
        return {
            "mean_abs_error": float(errors.mean()),
            "pearson_r": _pearson_r(np.array(read)) if read else 0.0,
            "unreadable_fraction": predictions.count(None) / len(predictions),
        }


EVALUATORS: dict[str, type[RewardEvaluator]] = {
    "gsm8k": ExactNumberEvaluator,
    "arithmetic": ExactNumberEvaluator,
    "clock": ClockEvaluator,
    "correlation": CorrelationEvaluator,
}


def get_evaluator(name: str) -> RewardEvaluator:
    """The evaluator of a task.

    Raises:
        ValueError: for an unknown task, naming the nearest.
    """
    if name not in EVALUATORS:
        nearest = difflib.get_close_matches(name, EVALUATORS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose from {', '.join(EVALUATORS)}"
        raise ValueError(f"no evaluator for the task {name!r}; {hint}")
    evaluator = EVALUATORS[name]()
    evaluator.task = name
    return evaluator


def _seconds(time: str) -> int:
    hour, minute, second = (int(part) for part in time.split(":"))
    return hour * 3600 + minute * 60 + second


def _pearson_r(pairs: np.ndarray) -> float:
    """Correlation of the two columns of pairs (N, 2); 0 where a column does not vary."""
    centred = pairs - pairs.mean(axis=0)  # (N, 2)
    spread = np.sqrt((centred**2).sum(axis=0))  # (2,)
    if spread.min() < 1e-12:
        return 0.0
    return float(np.clip(centred[:, 0] @ centred[:, 1] / spread.prod(), -1, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of right and wrong answers
# ---------------------------------------------------------------------------------------------------------------------
def wilson_interval(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of `correct` out of n, 95 % at z = 1.96 (Wilson, 1927): sound for few and for extreme."""
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"no share can be made of {correct} out of {n}")
    share = correct / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at_k(correct: np.ndarray, k: int | None = None) -> float:
    """The chance that one of k samples is right, from correct (N, n), bool: n samples of each of N questions.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al., "Evaluating Large Language Models Trained on Code"
    (2021), averaged over questions; c samples of a question are right. k is n where it is not given.
    """
    correct = np.asarray(correct, dtype=bool)  # (N, n)
    n = correct.shape[1]
    k = n if k is None else k
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples a question")
    misses = (n - correct.sum(axis=1)).tolist()  # (N,)
    return float(np.mean([1 - math.comb(miss, k) / math.comb(n, k) for miss in misses]))


def majority_at_k(
    predictions: Sequence[Sequence[Reading]], answers: Sequence[str], evaluator: RewardEvaluator
) -> float:
    """The share of N questions whose most frequent prediction is right.

    `predictions` are N lists of k readings by the evaluator's `predict`; unreadable ones do not vote, and the earlier
    one wins a tie.
    """
    right = 0
    for votes, answer in zip(predictions, answers, strict=True):
        ranking = Counter(vote for vote in votes if vote is not None).most_common(1)
        right += bool(ranking) and ranking[0][0] == evaluator.read(answer)
    return right / len(answers)
