"""What does one step compute? Prints the numbers of a real step, each beside its function, its equation and its shape.

    python one_step.py > docs/one_step.md             # a tiny model is built and warmed up first: a few minutes, once
    python one_step.py --learning_rate 1e-3           # any flag of main.py can follow, except other objectives

It calls the functions of main.py on two prompts with four completions each. Letters as there: Q prompts, G completions
each, B = Q·G rows, T completion tokens, K reward components.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import main
from batch import Batch
from config import OBJECTIVES, Config, parse_args
from evaluator import get_evaluator
from llms import LLM, load_llm
from logprobs import reference_logps, token_logps
from main import accumulate_gradients, group_advantages, grpo_loss, kl_estimate, loss_divisor, sample_and_score
from optimizer import MasterAdamW
from prompts import encode_prompts, plain_text
from rldatasets import get_dataloaders
from rollout import Sampler
from run import exit_status
from tiny_models import tiny_model

FLAGS = "--model_path tiny --dataset_name arithmetic --prompts_per_step 2 --num_generations 4 --max_steps 21 "
FLAGS += "--learning_rate 1e-4 --lr_scheduler_type constant --beta 0.04 --device cpu --dtype float32"
MOST_BATCHES = 200  # sampled in search of a step in which both groups have different rewards

# ---------------------------------------------------------------------------------------------------------------------
# The step


@dataclass
class Step:
    """One step: what was sampled, and the log-probabilities of its tokens. All are (B, T) but `advantages`, (B,)."""

    llm: LLM
    reward_names: tuple[str, ...]
    batch: Batch
    advantages: Tensor
    before: Tensor  # log π when the step began
    reference: Tensor  # log π_ref
    after: Tensor  # log π after the update
    loss: float
    stats: dict[str, float]

    @property
    def mask(self) -> Tensor:
        return self.batch.rollout.sampled_mask  # (B, T)


class NoClock:
    """Stands for a run where only times would be kept."""

    def timed(self, phase: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def last_step(config: Config) -> Step:
    """Take --max_steps steps from the model of --model_path and return the last one: the first from then on in which
    no group has equal rewards, whose advantages would all be 0."""
    torch.set_num_threads(1)  # sums are added in one order, so that this machine prints the same page again
    evaluator, run, old = get_evaluator(config.dataset_name, config.dataset_options), NoClock(), None
    data = (config.dataset_path, config.dataset_options)
    path = config.model_path
    if path == "tiny":
        path = str(tiny_model(config.dataset_name, *data, say=functools.partial(print, file=sys.stderr)))
    llm, reference = (load_llm(path, config.device, config.dtype) for _ in range(2))
    loader, _ = get_dataloaders(
        *(config.dataset_name, config.prompts_per_step, config.train_size, 1, config.seed, *data),
        *(lambda examples: encode_prompts(llm, examples), config.max_prompt_length),
    )
    optimizer, sampler = MasterAdamW(llm.model, config), Sampler(llm, config.seed)
    for number in range(1, MOST_BATCHES + 1):
        batch, _ = sample_and_score(config, sampler, loader, evaluator, run)  # type: ignore[arg-type]
        rollout, mask = batch.rollout, batch.rollout.sampled_mask
        advantages = group_advantages(batch.rewards.sum(1), config.num_generations)  # (B,)
        ref_logps = reference_logps(llm, reference.model, rollout, config)  # (B, T)
        loss, stats, logps = accumulate_gradients(config, llm, rollout, advantages, mask, old, ref_logps)
        stats |= optimizer.step(loss)
        if number >= config.max_steps and batch.varied().all():
            loader.close()
            after = token_logps(llm, rollout, config.temperature).detach()  # (B, T)
            return Step(llm, evaluator.reward_names, batch, advantages, logps, ref_logps, after, float(loss), stats)
    raise ValueError(f"in {MOST_BATCHES} steps no two groups had different rewards: choose another --model_path")


def shares_and_slopes(config: Config, step: Step) -> tuple[Tensor, Tensor]:
    """Each token's share of the step's loss and d loss / d log π, both (B, T), from `grpo_loss` with this token alone
    in the mask: the mean over a completion's tokens then comes from the divisor."""
    divisor, lengths = loss_divisor(config.objective, step.mask, config.max_completion_length), step.mask.sum(1)
    shares, logps = torch.zeros_like(step.before), step.before.clone().requires_grad_()  # (B, T), (B, T)
    for row, token in step.mask.nonzero().tolist():
        alone = torch.zeros_like(step.mask)  # (B, T)
        alone[row, token] = True
        inputs = (logps, step.before, step.reference, step.advantages, alone, config.objective)
        share, _ = grpo_loss(*inputs, divisor * int(lengths[row]))
        share.backward()
        shares[row, token] = share.detach()
    assert logps.grad is not None  # every token has a share
    return shares, logps.grad


# ---------------------------------------------------------------------------------------------------------------------
# The page


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table, as lines."""
    head = list(header)
    cells = [head, ["---:"] * len(head), *(list(row) for row in rows)]
    return ["", *("| " + " | ".join(row) + " |" for row in cells), ""]


def sources(*rows: tuple[str, str, str, str]) -> list[str]:
    """The table at the top of a section: number, shape, function, line of the equation or of the code."""
    head = ["| number | shape | function | line |", "|---|---|---|---|"]
    return ["", *head, *(f"| {number} | {shape} | {made} | {line} |" for number, shape, made, line in rows), ""]


def equations() -> list[str]:
    """The equations of main.py's docstring, without the names of their functions."""
    lines = (main.__doc__ or "").splitlines()
    found = [line.strip() for line in lines if line.startswith("    ") and " = " in line]
    return [line.removesuffix("group_advantages").removesuffix("grpo_loss").strip() for line in found]


def code(function: Callable, part: str) -> str:
    """The line of a function that has `part`, without its comment.

    Raises:
        ValueError: the function was changed and no longer has it once.
    """
    lines = [line for line in inspect.getsource(function).splitlines() if part in line]
    if len(lines) != 1:
        raise ValueError(f"{function.__name__} has {part!r} in {len(lines)} lines: correct one_step.py")
    return f"`{lines[0].split('  #')[0].strip()}`"


def shown(text: str) -> str:
    """Text on one line."""
    return text.replace("\n", "↵")


def cell(text: str) -> str:
    """Text as code in a table."""
    return "`" + shown(text).replace("|", "\\|").replace("`", "'") + "`"


def paragraph(text: str) -> list[str]:
    """Text in lines of at most 118 characters."""
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def decimals(value: Any, digits: int = 5, sign: str = "") -> str:
    """A number with so many decimals; 0 never has a sign."""
    text = f"{float(value):{sign}.{digits}f}"
    return text.lstrip("+-") if not text.strip("+-0.") else text


def page(config: Config) -> str:
    """The page, from a step that is taken now."""
    step = last_step(config)
    with torch.no_grad():
        kl = kl_estimate(step.before, step.reference, config.objective.kl_estimator)  # (B, T)
    shares, slopes = shares_and_slopes(config, step)  # (B, T), (B, T)
    chosen = int(step.advantages.argmax())
    parts = [
        introduction(config, step),
        sampled(config, step),
        scored(config, step),
        tokens_before(config, step, chosen, kl, shares, slopes),
        added_up(config, step, kl, shares),
        tokens_after(config, step, chosen),
    ]
    return "\n".join(line for part in parts for line in part) + "\n"


def introduction(config: Config, step: Step) -> list[str]:
    numbered = [f"({i}) {line}" for i, line in enumerate(equations(), 1)]
    return [
        "# One step, by the numbers",
        "",
        *paragraph(
            "Made by `python one_step.py > docs/one_step.md`, which calls the functions of `main.py` and prints what "
            "they return. The model is the tiny one for word problems. It was warmed up and then took "
            f"{config.max_steps - 1} steps of GRPO or a few more, so that π has moved a little from π_ref, the model "
            "after the warm-up. This is the step after them. A model that was warmed up on another machine gives other "
            "numbers; the relations between them are the same."
        ),
        "",
        "The equations are those at the top of `main.py`:",
        "",
        "```",
        *numbered,
        "```",
        "",
        *paragraph(
            f"Here Q = {config.prompts_per_step} prompts, G = {config.num_generations} completions of each, B = Q·G = "
            f"{len(step.advantages)} rows, at most T = {step.mask.shape[1]} tokens in a completion, and K = "
            f"{len(step.reward_names)} reward components; ε = {config.objective.epsilon:g}, β = "
            f"{config.objective.beta:g}. A micro-batch has b rows, here all {len(step.advantages)}."
        ),
        "",
    ]


def sampled(config: Config, step: Step) -> list[str]:
    rollout, G = step.batch.rollout, config.num_generations
    lines = [
        "## 1. Sample G completions of each prompt",
        *sources(
            ("completion_ids", "(B, T)", "`Sampler.sample`", "each token is drawn from softmax(logits / temperature)"),
            ("sampler_logps", "(B, T)", "`Sampler.sample`", "log π of each token, kept while sampling"),
        ),
        *paragraph(
            "`↵` is a line break. Each prompt also has a system message, which asks for the format with the four tags."
        ),
    ]
    for q, example in enumerate(step.batch.examples):
        question = plain_text(example.messages[-1]["content"])
        texts = rollout.texts[q * G : (q + 1) * G]
        rows = [f"{q * G + i}  {shown(text)}" for i, text in enumerate(texts)]
        lines += ["", f"Prompt {q}:", "", "```", *question.splitlines(), f"(right: {example.answer})", "", *rows, "```"]
    return [*lines, ""]


def scored(config: Config, step: Step) -> list[str]:
    totals = step.batch.groups  # (Q, G)
    rows = []
    for i, rewards in enumerate(step.batch.rewards.tolist()):
        group = totals[i // config.num_generations]  # (G,)
        numbers = [*rewards, group[i % config.num_generations], group.mean(), group.std(), step.advantages[i]]
        answer = step.batch.completions[i].strict_prediction
        rows.append([str(i), "–" if answer is None else str(answer), *(decimals(value, 4) for value in numbers)])
    return [
        "## 2. Score them, and compare each with its group",
        *sources(
            ("components", "(B, K)", "`RewardEvaluator.compute_rewards`", "weight × value, from 0 to the weight"),
            ("R", "(B,)", "`train`", code(main.train, "scores = batch.rewards.sum(1)")),
            ("mean, std", "(Q, 1)", "`group_advantages`", code(group_advantages, "centred = groups - groups.mean")),
            ("A", "(B,)", "`group_advantages`, (1)", code(group_advantages, "centred / (groups.std(")),
        ),
        *paragraph(
            "The standard deviation is the unbiased one. A completion that is better than its group has A > 0. The "
            "advantages of a group add up to 0. A group whose rewards are all equal would have no gradient."
        ),
        *table(["row", "answer", *step.reward_names, "R", "mean", "std", "A"], rows),
    ]


def tokens_before(config: Config, step: Step, chosen: int, kl: Tensor, shares: Tensor, slopes: Tensor) -> list[str]:
    ids = step.batch.rollout.completion_ids[chosen]  # (T,)
    rows = []
    for t in range(int(step.mask[chosen].sum())):
        logps = (step.batch.rollout.sampler_logps, step.before, step.reference)
        rows.append([
            *(str(t), cell(step.llm.tokenizer.decode([int(ids[t])]))),
            *(decimals(values[chosen, t]) for values in logps),
            decimals((step.before - step.batch.rollout.sampler_logps)[chosen, t].exp(), 4),
            *(decimals(values[chosen, t], 6) for values in (kl, shares, slopes)),
        ])  # fmt: skip
    total = decimals(shares[chosen].sum(), 6)
    return [
        f"## 3. One completion, token by token: row {chosen}, A = {decimals(step.advantages[chosen], 4)}",
        *sources(
            ("log π sampled", "(B, T)", "`Sampler.sample`", "the sampler computes one token at a time"),
            ("log π", "(B, T)", "`token_logps`", "the trainer computes all tokens at once, with gradients"),
            ("log π_ref", "(B, T)", "`reference_logps`", "the same from the frozen model"),
            ("ratio", "(b, T)", "`grpo_loss`, (2)", code(grpo_loss, "ratio = log_ratio.exp()")),
            ("KL", "(b, T)", "`kl_estimate`, (3)", code(kl_estimate, "log_ratio.exp() - log_ratio - 1")),
            ("share of the loss", "one token", "`grpo_loss`, (3)", "(− min[…] + β·KL) / (B · tokens of the row)"),
            ("slope", "one token", "its derivative", "d loss / d log π"),
        ),
        *paragraph(
            "The sampler and the trainer give the same log π up to rounding, and π_old is π before the first update. "
            "So every ratio is 1, nothing is clipped, and min[…] is A for every token. The slope tells what gradient "
            "descent does: where it is negative, the token becomes more likely. It is (−A + β·(1 − π_ref/π)) / (B · "
            "tokens of the row)."
        ),
        *table(
            ["t", "token", "log π sampled", "log π", "log π_ref", "ratio", "KL", "share of the loss", "slope"], rows
        ),
        f"The shares of row {chosen} add up to {total}.",
        "",
    ]


def added_up(config: Config, step: Step, kl: Tensor, shares: Tensor) -> list[str]:
    lengths = step.mask.sum(1)  # (B,)
    rows = [
        [
            *(str(i), str(int(lengths[i])), decimals(step.advantages[i], 4)),
            *(decimals((kl * step.mask)[i].sum() / lengths[i], 6), decimals(shares[i].sum(), 6)),
        ]
        for i in range(len(lengths))
    ]
    limit = config.max_grad_norm
    return [
        "## 4. Add up, and update the weights",
        *sources(
            ("loss", "()", "`grpo_loss`, (3)", code(grpo_loss, "loss = (per_token * mask).sum() / divisor")),
            ("divisor", "()", "`loss_divisor`", code(loss_divisor, '"completions": len(mask)')),
            ("gradient norm", "()", "`MasterAdamW.step`", code(MasterAdamW.step, "clip_grad_norm_")),
        ),
        *table(["row", "tokens", "A", "mean KL", "share of the loss"], rows)[1:],
        *paragraph(
            f"The loss of the step is the sum of the last column: {decimals(step.loss, 6)}. The advantages of a group "
            "add up to 0, so that β times the mean KL remains. Whether the model learns cannot be seen from the loss. "
            f"Its gradient is not 0: the norm is {decimals(step.stats['grad_norm'], 4)}, and a norm above {limit:g} is "
            f"scaled down to {limit:g}. AdamW then changes each weight by about the learning rate, "
            f"{decimals(step.stats['learning_rate'], 6)}."
        ),
        "",
    ]


def tokens_after(config: Config, step: Step, chosen: int) -> list[str]:
    rollout, change = step.batch.rollout, step.after - step.before  # (B, T)
    tokens = [
        [
            *(str(t), cell(step.llm.tokenizer.decode([int(rollout.completion_ids[chosen, t])]))),
            *(decimals(step.before[chosen, t]), decimals(step.after[chosen, t])),
            *(decimals(change[chosen, t], 5, "+"), decimals(change[chosen, t].exp(), 4)),
        ]
        for t in range(int(step.mask[chosen].sum()))
    ]
    sums = (step.advantages, step.before.sum(1), step.after.sum(1), change.sum(1))  # each (B,)
    rows = [
        [str(i), decimals(A, 4), decimals(before), decimals(after), decimals(delta, 5, "+"), decimals(delta.exp(), 4)]
        for i, (A, before, after, delta) in enumerate(zip(*sums, strict=True))
    ]
    better, worse = step.advantages > 0, step.advantages < 0  # (B,), (B,)
    up, down = change.sum(1) > 0, change.sum(1) < 0  # (B,), (B,)
    _, again = grpo_loss(
        step.after, step.before, step.reference, step.advantages, step.mask, config.objective, len(step.advantages)
    )
    clipped = round(float(again["clip_fraction"] * step.mask.sum()))
    moved = int(change[chosen].abs().argmax())
    still = sum(abs(float(change[chosen, t])) < 0.001 for t in range(len(tokens)))
    return [
        "## 5. The same tokens after the update",
        *sources(
            ("log π after", "(B, T)", "`token_logps`", "the same tokens under the new weights"),
            ("ratio", "(b, T)", "`grpo_loss`, (2)", "π after / π before, where π before is π_old"),
        ),
        *paragraph(
            f"Row {chosen} again. {still} of its {len(tokens)} tokens changed by less than 0.001, and token {moved} "
            "the most. With `--num_iterations 2` a second update would use these ratios, and clip a token whose ratio "
            "has passed "
            f"1 ± {config.objective.epsilon:g} in the direction of A: {clipped} of the {int(step.mask.sum())} tokens."
        ),
        *table(["t", "token", "log π before", "log π after", "change", "ratio"], tokens),
        *paragraph(
            "All rows: the log-probability of a completion is the sum over its tokens. The last column tells how many "
            "times as likely the completion is now."
        ),
        *table(["row", "A", "log π before", "log π after", "change", "times as likely"], rows),
        *paragraph(
            f"Of the {int(better.sum())} completions with A > 0, {int((better & up).sum())} became more likely; of the "
            f"{int(worse.sum())} with A < 0, {int((worse & down).sum())} became less likely. All completions are "
            "written by the same weights, so an update for one of them moves the others too."
        ),
        "",
        *paragraph(
            "The loop repeats this. [objectives.md](objectives.md) has the other objectives, [metrics.md](metrics.md) "
            "the logged numbers, and `main.py` the code."
        ),
    ]


def write_page(config: Config) -> int:
    choices = ("importance_sampling_level", "clip", "normalizer", "scale_rewards", "overlong_buffer")
    if any(getattr(config.objective, name) != getattr(OBJECTIVES["grpo"], name) for name in choices):
        raise ValueError("one_step.py explains --objective grpo; docs/objectives.md has the equations of the others")
    print(page(config), end="")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(write_page, parse_args([*FLAGS.split(), *sys.argv[1:]])))
