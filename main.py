"""GRPO by hand: the reinforcement learning behind DeepSeek-R1, in one loop that you read from top to bottom.

In every step, take Q prompts, sample G completions of each from the model and score them; then make each completion
more or less likely in proportion to how much better it is than its group (DeepSeekMath, arXiv 2402.03300, eq. 3 and 4):

    A_i    = (R_i − mean(R_1..G)) / std(R_1..G)                                                       group_advantages
    ratio  = π(token) / π_old(token)                       π_old: the weights that sampled            grpo_loss
    loss   = − mean_i mean_t [ min(ratio·A_i, clip(ratio, 1−ε, 1+ε)·A_i) − β·KL(π ‖ π_ref) ]          grpo_loss

docs/objectives.md lists the other objectives and where this departs from the papers. Three commands to begin with:

    python main.py --model_path tiny --dataset_name correlation                       # a laptop, minutes
    python main.py --model_path Qwen/Qwen2.5-1.5B-Instruct --dataset_name gsm8k       # one GPU
    python plotter.py --output_dir runs/correlation-tiny                              # charts and a report

Letters in the shape comments: Q prompts in a step, G completions each, B = Q·G rows in group order (row i belongs to
prompt i // G), b rows of a micro-batch, T completion tokens (right-padded), K reward components.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from dataclasses import dataclass

from config import Config, Objective, parse_args

if __name__ == "__main__":
    parse_args()  # before torch is imported: --help and a wrong flag answer at once

import torch
from torch import Tensor

from evaluator import RewardEvaluator, get_evaluator, majority_at_k, pass_at_k, wilson_interval
from llms import LLM, encode_prompts, load_llm, refuse_unfit_model
from logprobs import token_logps, token_logps_and_entropy
from optimizer import MasterAdamW
from rldatasets import Dataset, Example, TrainLoader, get_dataloaders
from rollout import Rollout, Sampler
from run import Run, due, exit_status, readable_groups
from tiny_models import tiny_model

# ---------------------------------------------------------------------------------------------------------------------
# The objective: pure functions of tensors


def group_advantages(rewards: Tensor, group_size: int, scale: str = "group") -> Tensor:
    """How much better each completion is than its group.

    Args:
        rewards: (B,) total rewards, the G completions of a prompt one after the other.
        scale: "group": (R − mean) / (std + 1e-4) with the unbiased standard deviation (DeepSeekMath, section 4.1.2);
            "none": R − mean (Dr. GRPO, arXiv 2503.20783); "batch": R − mean, divided by the whole step's std + 1e-4.

    Returns: (B,). Exactly 0 for a group of equal rewards, so that rounding errors never become a gradient.
    """
    groups = rewards.view(-1, group_size)  # (Q, G)
    centred = groups - groups.mean(1, keepdim=True)  # (Q, G)
    centred = centred.masked_fill(groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True), 0.0)
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centred = centred / (rewards.std() + 1e-4)
    elif scale != "none":
        raise ValueError(f"unknown scale {scale!r} of advantages: choose group, batch or none")
    return centred.reshape(-1)  # (B,)


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    objective: Objective,
    divisor: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some rows of a step; the losses of a step's micro-batches add up to the step's loss.

    Args:
        logps: (b, T) log π of the completion tokens, with gradients.
        old_logps: (b, T) under the weights that sampled, without gradients; `logps.detach()` in the first update.
        ref_logps: (b, T) under the frozen reference, or None: no KL penalty.
        advantages: (b,). mask: (b, T), True on the tokens that are trained, the end-of-sequence token included.
        divisor: what the step's sum is divided by, counted over all of its rows (see `loss_divisor`).
        weights: (b, T) or None, multiplies each token's policy term (not the KL).

    Returns: the loss, and statistics as 0-d tensors: means over the tokens given here.
    """
    high = objective.epsilon if objective.epsilon_high is None else objective.epsilon_high
    low, high = 1 - objective.epsilon, 1 + high
    advantages, mask = advantages[:, None], mask.to(logps.dtype)  # (b, 1), (b, T)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # (b, 1)

    log_ratio = (logps - old_logps) * mask  # (b, T)
    if objective.importance_sampling_level == "sequence":  # GSPO eq. 7: the length-normalized ratio of the sequence
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(logps)  # (b, T), equal along a row
    ratio = log_ratio.exp()  # (b, T)
    if objective.clip == "weight":  # CISPO eq. 4: the ratio only weighs log π; no token loses its gradient
        clipped = ratio > high
        gain = ratio.clamp(max=high).detach() * advantages * logps
    else:  # DeepSeekMath eq. 3, PPO's pessimistic minimum
        clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
        gain = (ratio * advantages).minimum(ratio.clamp(low, high) * advantages)
    per_token = -gain if weights is None else -gain * weights  # (b, T)

    kl = None if ref_logps is None else kl_estimate(logps, ref_logps, objective.kl_estimator)  # (b, T)
    if kl is not None and objective.beta:
        per_token = per_token + objective.beta * kl
    if objective.normalizer == "completions":  # the mean over a completion's tokens, then over completions
        per_token = per_token / lengths
    loss = (per_token * mask).sum() / divisor

    tokens = mask.sum().clamp(min=1)
    stats = {"clip_fraction": (clipped * mask).sum() / tokens, "ratio": (ratio.detach() * mask).sum() / tokens}
    if kl is not None:
        stats["kl"] = (kl.detach() * mask).sum() / tokens
    return loss, stats


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str = "k3") -> Tensor:
    """(b, T) estimates of KL(π ‖ π_ref) from samples of π (Schulman, "Approximating KL divergence", 2020).

    k1 = log(π/ref): unbiased, can be negative; its gradient does not push towards the reference on average.
    k2 = ½ log²(π/ref): biased, low variance. k3 = ref/π − log(ref/π) − 1: unbiased, never negative
    (DeepSeekMath eq. 4).
    """
    log_ratio = ref_logps - logps  # (b, T)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return log_ratio.exp() - log_ratio - 1
    raise ValueError(f"unknown KL estimator {estimator!r}: choose k1, k2 or k3")


def loss_divisor(objective: Objective, mask: Tensor, max_completion_length: int) -> float:
    """What the sum over a whole step's tokens is divided by; mask (B, T) of all its rows."""
    divisors = {
        "completions": len(mask),
        "tokens": max(1, int(mask.sum())),
        "max_length": len(mask) * max_completion_length,
    }
    return float(divisors[objective.normalizer])


def overlong_penalty(lengths: Tensor, max_completion_length: int, buffer_share: float) -> Tensor:
    """(B,) from 0 down to −1 over the last `buffer_share` of the allowed length (DAPO, arXiv 2503.14476, eq. 13)."""
    if not buffer_share:
        return torch.zeros(len(lengths))
    buffer = max(1.0, buffer_share * max_completion_length)
    return -((lengths - (max_completion_length - buffer)) / buffer).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# One step


@dataclass
class Batch:
    """Groups of completions with their rewards: Q examples, a rollout of B rows, rewards (B, K)."""

    examples: list[Example]
    rollout: Rollout
    rewards: Tensor

    def totals(self) -> Tensor:  # (B,)
        return self.rewards.sum(1)

    def varied(self) -> Tensor:
        """(Q,) True where the rewards of a group are not all equal."""
        groups = self.totals().view(-1, self.rollout.num_generations)  # (Q, G)
        return groups.amax(1) > groups.amin(1)

    def select(self, groups: list[int]) -> Batch:
        rewards = self.rewards.unflatten(0, (-1, self.rollout.num_generations))[groups]  # (kept, G, K)
        return Batch([self.examples[q] for q in groups], self.rollout.select(groups), rewards.flatten(0, 1))


def sample_and_score(
    config: Config, sampler: Sampler, loader: TrainLoader, evaluator: RewardEvaluator, run: Run
) -> tuple[Batch, dict[str, float]]:
    """Sample G completions for each of Q prompts and score them -> the batch to train on, and the record's columns.

    With dynamic sampling the batch has other groups than those first sampled. The columns describe the completions
    first sampled; `replaced_fraction`, `resampled_tokens` and `trained/*` say what replacing changed.
    """
    batch, metrics = sample_groups(config, sampler, loader, evaluator, run)
    objective, lengths = config.objective, batch.rollout.lengths  # (B,)
    groups = batch.totals().view(-1, config.num_generations)  # (Q, G)
    means = zip(evaluator.reward_names, batch.rewards.mean(0).tolist(), strict=True)
    record = {
        "reward": float(groups.mean()),
        "reward_std": float(groups.std(1).mean()),
        **{f"rewards/{name}": mean for name, mean in means},
        **metrics,
        "completion_length": float(lengths.float().mean()),
        "truncated_fraction": 1 - float(batch.rollout.finished.float().mean()),
        "zero_std_fraction": float((~batch.varied()).float().mean()),
        "tokens": int(lengths.sum()),
    }
    if objective.overlong_buffer:
        penalty = overlong_penalty(lengths, config.max_completion_length, objective.overlong_buffer)  # (B,)
        record["overlong_penalty"] = float(penalty.mean())
    if objective.dynamic_sampling:
        batch, changes = replace_equal_groups(config, batch, sampler, loader, evaluator, run)
        record |= changes
    return batch, record


def sample_groups(
    config: Config, sampler: Sampler, loader: TrainLoader, evaluator: RewardEvaluator, run: Run
) -> tuple[Batch, dict[str, float]]:
    """Q groups for the next prompts, with their rewards, and the task's metrics over their completions."""
    examples, prompts = next(loader)
    with run.timed("rollout"):
        rollout = sampler.sample(prompts, config.num_generations, config.max_completion_length, config.temperature)
    with run.timed("reward"):
        answers = [example.answer for example in examples for _ in range(config.num_generations)]  # B
        rewards, metrics = evaluator.compute_rewards(rollout.texts, answers)  # (B, K)
    if config.shuffle_rewards:  # a control: rewards that say nothing about their completions must not teach anything
        generator = torch.Generator().manual_seed(loader.state_dict()["position"])
        rewards = rewards[torch.randperm(len(rewards), generator=generator)]
    return Batch(examples, rollout, rewards), metrics


def replace_equal_groups(
    config: Config, first: Batch, sampler: Sampler, loader: TrainLoader, evaluator: RewardEvaluator, run: Run
) -> tuple[Batch, dict[str, float]]:
    """Replace groups of equal rewards, which have no gradient, by groups of further prompts (DAPO, section 3.2), in at
    most --max_resamples rounds; the last round fills up with what it has. Returns the batch, and what changed."""
    kept = [first.select(first.varied().nonzero()[:, 0].tolist())]
    missing = config.prompts_per_step - len(kept[0].examples)
    replaced, tokens = missing, 0
    for rounds_left in range(config.max_resamples - 1, -1, -1):
        if not missing:
            break
        new, _ = sample_groups(config, sampler, loader, evaluator, run)
        tokens += int(new.rollout.lengths.sum())
        order = new.varied().int().argsort(descending=True, stable=True).tolist()  # varied groups first
        usable = len(order) if rounds_left == 0 else int(new.varied().sum())
        kept.append(new.select(order[: min(missing, usable)]))
        missing -= len(kept[-1].examples)
    parts = [batch for batch in kept if batch.examples]
    batch = Batch(
        [example for part in parts for example in part.examples],
        Rollout.cat([part.rollout for part in parts]),
        torch.cat([part.rewards for part in parts]),
    )
    return batch, {
        "replaced_fraction": replaced / config.prompts_per_step,
        "resampled_tokens": tokens,
        "trained/reward": float(batch.totals().mean()),
        "trained/completion_length": float(batch.rollout.lengths.float().mean()),
    }


def reference_logps(config: Config, llm: LLM, reference: torch.nn.Module, rollout: Rollout) -> Tensor:
    """(B, T) log-probabilities of the completions under the frozen reference."""
    ref_logps = torch.zeros_like(rollout.sampler_logps)  # (B, T)
    with torch.no_grad():
        for rows in rollout.micro_batches(config.micro_batch_tokens):
            ref_logps[rows] = token_logps(
                llm, rollout, config.temperature, rows, reference, share_prompt=not config.gradient_checkpointing
            )
    return ref_logps


def accumulate_gradients(
    config: Config,
    llm: LLM,
    rollout: Rollout,
    advantages: Tensor,
    mask: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
) -> tuple[Tensor, dict[str, float], Tensor]:
    """The gradient of the whole step's loss, a micro-batch at a time, added up in the weights' `.grad`.

    Args:
        advantages: (B,). mask: (B, T), the tokens that count in the loss.
        old_logps: (B, T), or None in the first update: π_old is then π itself, without gradients.
        ref_logps: (B, T) or None.

    Returns: the step's loss (0-d), its statistics as floats, and log π (B, T) without gradients.
    """
    loss, sums = torch.zeros((), device=llm.device), {}
    llm.model.train(config.gradient_checkpointing)  # transformers recomputes layers in train mode only; no dropout
    divisor = loss_divisor(config.objective, mask, config.max_completion_length)  # the same for all micro-batches
    all_logps = torch.zeros_like(rollout.sampler_logps)  # (B, T)
    for rows in rollout.micro_batches(config.micro_batch_tokens):
        logps, entropy = token_logps_and_entropy(
            llm, rollout, config.temperature, rows, share_prompt=not config.gradient_checkpointing
        )  # (b, T), (b, T)
        all_logps[rows] = logps.detach()
        old = all_logps[rows] if old_logps is None else old_logps[rows]  # (b, T)
        ref = None if ref_logps is None else ref_logps[rows]  # (b, T)
        drift = old - rollout.sampler_logps[rows]  # (b, T) rounding: the sampler computes in another order
        weights = drift.exp().clamp(max=config.correction_cap) if config.importance_sampling_correction else None
        part, stats = grpo_loss(logps, old, ref, advantages[rows], mask[rows], config.objective, divisor, weights)
        part.backward()
        loss = loss + part.detach()
        sampled = rollout.sampled_mask[rows]  # (b, T)
        for name, mean in stats.items():
            add_to_mean(sums, name, mean, mask[rows].sum())
        for name, values in {"entropy": entropy, "sampler_logp_diff": drift.abs()}.items():
            count = sampled.sum()
            add_to_mean(sums, name, (values * sampled).sum() / count.clamp(min=1), count)
    llm.model.eval()  # the sampler needs the key-value cache, which transformers drops in train mode
    return loss, {name: float(total / count.clamp(min=1)) for name, (total, count) in sums.items()}, all_logps


def add_to_mean(sums: dict[str, tuple[Tensor, Tensor]], name: str, mean: Tensor, count: Tensor) -> None:
    """Add a micro-batch's mean over `count` tokens to the step's."""
    total, tokens = sums.get(name, (torch.zeros_like(mean), torch.zeros_like(count)))
    sums[name] = (total + mean * count, tokens + count)


@torch.no_grad()
def sync_reference(reference: torch.nn.Module, model: torch.nn.Module, alpha: float) -> None:
    """reference ← alpha · model + (1 − alpha) · reference."""
    for old, new in zip(reference.parameters(), model.parameters(), strict=True):
        old.lerp_(new, alpha)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(
    config: Config,
    llm: LLM,
    reference: torch.nn.Module | None,
    loader: TrainLoader,
    test_set: Dataset,
    evaluator: RewardEvaluator,
    run: Run,
) -> None:
    """Train until --max_steps, a signal or --max_minutes; evaluate, log and save along the way."""
    objective = config.objective
    optimizer, sampler = MasterAdamW(llm.model, config), Sampler(llm, config.seed)
    step = run.start(
        optimizer=optimizer, sampler=sampler, loader=loader, reference=reference if config.sync_ref_model else None
    )
    unsaved = False
    if step == 0:
        run.log_eval(*evaluate(config, sampler, test_set, evaluator))
    while step < config.max_steps and not run.should_stop():
        previous = step

        # 1. Sample G completions for each of Q prompts, and score them.
        batch, record = sample_and_score(config, sampler, loader, evaluator, run)
        rollout, lengths = batch.rollout, batch.rollout.lengths.cpu()  # (B,)

        # 2. Compare each completion with its group.
        penalty = overlong_penalty(lengths, config.max_completion_length, objective.overlong_buffer)  # (B,)
        scores = batch.totals() + penalty  # (B,)
        advantages = group_advantages(scores, config.num_generations, objective.scale_rewards).to(llm.device)  # (B,)

        # 3. Learn: μ updates from the same completions. π_old is π before the first of them.
        mask = rollout.sampled_mask  # (B, T)
        if config.mask_truncated_completions:
            mask = mask & rollout.finished[:, None]
        old_logps = ref_logps = None
        for _ in range(min(config.num_iterations, config.max_steps - step)):
            with run.timed("loss"):
                if reference is not None and ref_logps is None:
                    ref_logps = reference_logps(config, llm, reference, rollout)  # (B, T)
                loss, stats, logps = accumulate_gradients(config, llm, rollout, advantages, mask, old_logps, ref_logps)
                stats |= optimizer.step(loss)
                old_logps = logps if old_logps is None else old_logps  # (B, T)
                step += 1
                if reference is not None and config.sync_ref_model and step % config.ref_model_sync_steps == 0:
                    sync_reference(reference, llm.model, config.ref_model_mixup_alpha)
            place = {"step": step, "epoch": loader.epoch, "loss": float(loss)}
            run.log_step(place | record | {"kl": 0.0} | stats | {"skipped_prompts": loader.skipped})

        # 4. Log samples, evaluate, save.
        if due(config.log_completions_steps, step, previous) or previous == 0:
            groups = config.log_completions_groups
            run.log_samples(readable_groups(evaluator, batch, scores.tolist(), advantages.tolist(), groups))
        if due(config.eval_steps, step, previous) and step < config.max_steps:
            run.log_eval(*evaluate(config, sampler, test_set, evaluator))
        unsaved = unsaved or due(config.save_steps, step, previous)
        # A skipped step may mean that the weights are broken: they must not replace good checkpoints.
        if unsaved and not optimizer.skipped_steps and step < config.max_steps:
            run.save()
            unsaved = False
    if step >= config.max_steps and step not in run.evals:
        run.log_eval(*evaluate(config, sampler, test_set, evaluator))
    run.save()
    loader.close()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(
    config: Config, sampler: Sampler, test_set: Dataset, evaluator: RewardEvaluator
) -> tuple[dict[str, float], list[dict]]:
    """Answer the whole test set greedily -> metrics, and every answer for reading.

    Changes nothing in training: greedy decoding draws no random numbers, and --eval_samples draws from a seed that is
    the same in every evaluation. Prompts longer than --max_prompt_length are left out and counted.
    """
    start, k = time.perf_counter(), config.eval_samples
    batches: list[Batch] = []
    samples: list[list[str]] = []  # k further answers to each question
    with sampler.seeded(0):
        for first in range(0, len(test_set), config.eval_batch_size):
            examples = [test_set[i] for i in range(first, min(first + config.eval_batch_size, len(test_set)))]
            prompts = encode_prompts(sampler.llm, examples)
            fitting = [i for i, length in enumerate(prompts.lengths) if length <= config.max_prompt_length]
            if not fitting:
                continue
            examples, prompts = [examples[i] for i in fitting], prompts.select(fitting)
            rollout = sampler.sample(prompts, 1, config.max_completion_length, temperature=0)
            rewards, _ = evaluator.compute_rewards(rollout.texts, [example.answer for example in examples])  # (n, K)
            batches.append(Batch(examples, rollout, rewards))
            if k > 1:
                texts = sampler.sample(prompts, k, config.max_completion_length, config.temperature).texts
                samples += [texts[i : i + k] for i in range(0, len(texts), k)]
    groups = [group for batch in batches for group in readable_groups(evaluator, batch)]
    metrics = evaluation_metrics(batches, samples, evaluator)
    metrics |= {"skipped_prompts": len(test_set) - len(groups), "seconds": time.perf_counter() - start}
    return metrics, groups


def evaluation_metrics(batches: list[Batch], samples: list[list[str]], evaluator: RewardEvaluator) -> dict[str, float]:
    """The metrics over all answers of an evaluation; `samples` has k further answers to each question, or is empty."""
    answers = [example.answer for batch in batches for example in batch.examples]  # N
    texts = [text for batch in batches for text in batch.rollout.texts]  # N
    rewards = torch.cat([batch.rewards for batch in batches])  # (N, K)
    lengths = torch.cat([batch.rollout.lengths for batch in batches])  # (N,)
    finished = torch.cat([batch.rollout.finished for batch in batches])  # (N,)
    means = zip(evaluator.reward_names, rewards.mean(0).tolist(), strict=True)
    metrics = {
        "num_examples": len(texts),
        "avg_reward": float(rewards.sum(1).mean()),
        **{f"rewards/{name}": mean for name, mean in means},
        **evaluator.measure(texts, answers),
        "completion_length": float(lengths.float().mean()),
        "truncated_fraction": 1 - float(finished.float().mean()),
    }
    if evaluator.exact:
        right = sum(map(evaluator.is_correct, texts, answers))
        metrics["accuracy_low"], metrics["accuracy_high"] = wilson_interval(right, len(texts))
        if samples:
            k = len(samples[0])
            correct = [[evaluator.is_correct(t, a) for t in row] for row, a in zip(samples, answers, strict=True)]
            votes = [[evaluator.predict(text) for text in row] for row in samples]
            metrics |= {f"pass@{k}": pass_at_k(correct), f"majority@{k}": majority_at_k(votes, answers, evaluator)}
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# The command


def set_up_and_train(config: Config) -> int:
    """Load the model and the task, refuse what cannot work before anything is written, train. Returns the exit status."""
    evaluator = get_evaluator(config.dataset_name)
    with Run(config, evaluator) as run:
        model_path = config.model_path
        if model_path == "tiny":
            model_path = str(tiny_model(config.dataset_name, config.dataset_path, config.dataset_options))
        how = (config.device, config.dtype, config.attn_implementation)
        llm = load_llm(run.checkpoint or model_path, *how)
        task = (config.dataset_name, config.prompts_per_step, config.train_size, config.eval_size, config.seed)
        encode = functools.partial(encode_prompts, llm)
        where = (config.dataset_path, config.dataset_options, encode, config.max_prompt_length)
        loader, test_set = get_dataloaders(*task, *where)
        refuse_unfit_model(config, llm, test_set)
        steps = math.ceil(config.num_train_epochs * loader.steps_per_epoch) * config.num_iterations
        config = dataclasses.replace(config, max_steps=config.max_steps or max(1, steps))
        run.open(config, llm, len(loader.dataset), len(test_set))
        if config.eval_only:
            return run.finish_evaluation(*evaluate(config, Sampler(llm), test_set, evaluator))
        reference = load_llm(model_path, *how).model.requires_grad_(False) if config.objective.beta else None
        train(config, llm, reference, loader, test_set, evaluator, run)
        return run.finish()


def main(argv: list[str] | None = None) -> int:
    return exit_status(set_up_and_train, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
