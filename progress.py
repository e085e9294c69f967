"""What does a person see while a run works? A progress line, explanations, a summary; and how values are written."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from config import Config
    from evaluator import Headline

SECONDS_BETWEEN_LINES = 10.0
ANSWERS_SHOWN = 5  # after an evaluation
# The mean |log π of the sampler − log π of the trainer|, in nats, that rounding explains: both add up the same products
# in another order. The random models of the tests have 1e-6 in float32 and 0.02 in bfloat16, which keeps 8 bits; larger
# models add up more terms.
LARGEST_ROUNDING = {"float32": 1e-3, "bfloat16": 0.05}
PYTHON = "uv run" if "UV_RUN_RECURSION_DEPTH" in os.environ else "python"  # how this process was started


class Progress:
    """A bar on a terminal; elsewhere, such as in a log file, a plain line every few seconds."""

    def __init__(self, config: Config, headline: Headline, step: int, dtype: str = "float32"):
        self.config, self.headline, self.dtype = config, headline, dtype
        self.seconds: list[float] = []  # of each step
        self.printed = -SECONDS_BETWEEN_LINES  # when the last plain line was
        self.explained: set[str] = set()
        self.bar = tqdm(total=config.max_steps, initial=step, disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def step(self, record: dict[str, Any]) -> None:
        """Show a training record."""
        self.seconds.append(record["seconds/total"])
        value = format_value(record[self.headline.metric], self.headline.unit)
        text = f"reward {record['reward']:.3f} · {self.headline.label} {value} · kl {record['kl']:.4f}"
        self.bar.set_postfix_str(text)
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and now - self.printed >= SECONDS_BETWEEN_LINES:
            self.printed = now
            steps = self.config.max_steps
            median = sorted(self.seconds[-50:])[len(self.seconds[-50:]) // 2]
            left = format_duration(median * (steps - record["step"]))
            self.say(f"step {record['step']:>4}/{steps} · {text} · {median:.2f} s a step · {left} left")
        for subject, explanation in explanations(record, self.config, self.dtype).items():
            if subject not in self.explained:
                self.explained.add(subject)
                self.say(f"note, step {record['step']}: {explanation}")

    def evaluation(self, step: int, metrics: dict[str, Any], groups: Sequence[dict] = ()) -> None:
        """Show the metrics of an evaluation, and what the model answered to the first questions."""
        interval = ""
        if "accuracy_low" in metrics:
            interval = f" (95 % interval {100 * metrics['accuracy_low']:.1f} to {100 * metrics['accuracy_high']:.1f})"
        value = format_value(metrics[self.headline.metric], self.headline.unit)
        self.say(
            f"evaluation at step {step}: {self.headline.label} {value}{interval} · reward "
            f"{metrics['avg_reward']:.3f} · {metrics['num_examples']} examples in {metrics['seconds']:.0f} s"
        )
        if groups:
            shown = " · ".join(answered(group) for group in groups[:ANSWERS_SHOWN])
            self.say(f"  answers to the first questions (right answer): {shown}")

    def close(self) -> None:
        self.bar.close()


def answered(group: dict[str, Any]) -> str:
    """The answer that was read from a greedy completion, and the right one: "0.31 (0.35)"."""
    given = group["completions"][0]["prediction"]
    return f"{'none' if given is None else shortened(given)} ({shortened(group['answer'])})"


def shortened(value: Any) -> str:
    """A value on one line of at most 20 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 20 else text[:19] + "…"


def explanations(record: dict[str, Any], config: Config, dtype: str = "float32") -> dict[str, str]:
    """Explanations, by subject, of log values that look wrong but are not, and of those that are. `dtype` is that of
    the weights."""
    from rldatasets import dataset_options, parse_option  # which imports this module

    found = {}
    if abs(record["loss"]) < 1e-6 and record["zero_std_fraction"] < 1:
        found["loss"] = (
            "a loss of 0 is right here: before the first update every ratio is 1, and the advantages of a group add up "
            "to 0; the gradient is not 0 (see grad_norm), and the reward is what to watch"
        )
    if record["zero_std_fraction"] == 1:
        found["equal rewards"] = (
            "the rewards were equal in every group, so this step had no gradient from them; if this continues, the "
            "task is too easy or too hard for the model, or the temperature is too low"
        )
    if record["truncated_fraction"] == 1:
        found["truncated"] = (
            f"every completion was cut off at {config.max_completion_length} tokens; if this continues, raise "
            "--max_completion_length"
        )
    if record.get("rewards/strict_format") == 0:
        found["format"] = (
            "no completion had the asked format; the format reward gives no signal until some completion uses it"
        )
        if "shots" in dataset_options(config.dataset_name) and not parse_option(config.dataset_options.get("shots", 0)):
            found["format"] += "; --dataset_options shots=2 shows the model two solved examples before each question"
    # Log-probabilities are those of logits / temperature, and so is their rounding.
    rounding = LARGEST_ROUNDING.get(dtype, 0.05) / min(1.0, config.temperature)
    difference = record.get("sampler_logp_diff", 0.0)
    if difference > rounding:
        found["sampler"] = (
            f"sampler_logp_diff is {difference:.2g} nats, and rounding in {dtype} explains up to about {rounding:.2g}: "
            "the sampler and the trainer compute different probabilities, so the completions do not come from the "
            "policy that is trained; do not trust this run, and compare --attn_implementation eager or --dtype float32"
        )
    if record["skipped_steps"]:
        found["skipped"] = "the loss or its gradient was not finite, so the update was skipped"
    return found


def setup_lines(config: Config, llm: Any, num_train: int, num_test: int) -> str:
    """What is about to be trained, and how."""
    objective = config.objective
    trained = ""
    if config.lora_rank and llm.num_trainable < llm.num_parameters:
        rank, alpha = config.lora_rank, config.lora_alpha
        trained = f" ({format_count(llm.num_trainable)} are trained: adapters of rank {rank}, α {alpha})"
    high = objective.epsilon if objective.epsilon_high is None else objective.epsilon_high
    return (
        f"{config.model_path}: {format_count(llm.num_parameters)} parameters{trained}, "
        f"{'vision and text' if llm.is_vision else 'text'}, "
        f"{str(llm.dtype).removeprefix('torch.')} on {llm.device}, attention: {llm.attn_implementation}\n"
        f"{config.dataset_name}: {num_train:,} training and {num_test:,} test examples; "
        f"{config.prompts_per_step} prompts × {config.num_generations} completions per step, {config.max_steps} steps\n"
        f"objective {objective.name}: advantages scaled by {objective.scale_rewards}, one ratio per "
        f"{objective.importance_sampling_level}, clip {objective.clip} −{objective.epsilon:g} +{high:g}, "
        f"β {objective.beta:g}{' ' + objective.kl_estimator if objective.beta else ''}, loss divided by "
        f"{objective.normalizer}\nrun folder: {config.output_dir}"
    )


def summary_lines(
    config: Config, headline: Headline, evals: dict[int, dict], seconds: list[float], checkpoint: Any
) -> str:
    """What changed, where it is, how to look at it. `seconds` are those of the steps of this process."""
    before, after = (format_value(evals[step][headline.metric], headline.unit) for step in (min(evals), max(evals)))
    chance = "" if headline.chance is None else f" (chance: {format_value(headline.chance, headline.unit)})"
    return (
        f"{config.dataset_name}: {headline.label} {before} → {after}{chance} after {max(evals)} steps; the last "
        f"{len(seconds)} took {format_duration(sum(seconds))} without evaluations\n"
        f"the run is in {config.output_dir}, its weights in {checkpoint}\n"
        f"draw it:  {PYTHON} plotter.py --output_dir {shlex.quote(str(config.output_dir))}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# How values, names and commands are written


def format_value(value: float | None, unit: str = "") -> str:
    """A metric with its unit: 12.3 min, 0.123, 45.6 % (a share in [0, 1] whose unit is "%"); – for None."""
    if value is None:
        return "–"
    if unit == "%":
        return f"{100 * value:.1f} %"
    return f"{value:.1f} {unit}" if unit else f"{value:.3f}"


def format_count(number: int) -> str:
    """1.50 B, 1.24 M."""
    return f"{number / 1e9:.2f} B" if number > 1e9 else f"{number / 1e6:.2f} M"


def format_duration(seconds: float) -> str:
    """45 s, 9 min 8 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint after an unknown name: the nearest known one, or all of them where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known)
    if near:
        swapped = [one for one in near if sorted(one) == sorted(name)]  # "gpro" means grpo, not gspo
        return f"did you mean {(swapped or near)[0]!r}?"
    return f"choose from {', '.join(known)}" if known else "there is none"


def make_output_safe() -> None:
    """Lets print replace characters that the terminal's encoding lacks, instead of raising UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams have no encoding
            stream.reconfigure(errors="replace")
