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

import functools
import sys
import time

from config import Config, Objective, parse_args
from progress import make_output_safe

if __name__ == "__main__":
    make_output_safe()
    parse_args()  # before torch is imported: --help and a wrong flag answer at once

import torch
from torch import Tensor

import parallel
from batch import Batch, evaluation_metrics, score
from evaluator import Completion, RewardEvaluator, get_evaluator
from llms import LLM, load_llm, pick_device, prepare_training, refuse_unfit_config, refuse_unfit_model
from logprobs import masked_mean, reference_logps, token_logps_and_entropy
from optimizer import MasterAdamW, sync_reference
from prompts import encode_prompts
from rldatasets import Dataset, TrainLoader, get_dataloaders
from rollout import Rollout, Sampler, pick_sampler
from run import Run, due, exit_status
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


def loss_divisor(objective: Objective, mask: Tensor, max_length: int) -> float:
    """What the sum over a whole step's tokens is divided by; mask (B, T) of all its rows, of at most `max_length`."""
    divisors = {"completions": len(mask), "tokens": max(1, int(mask.sum())), "max_length": len(mask) * max_length}
    return float(divisors[objective.normalizer])


def overlong_penalty(lengths: Tensor, config: Config) -> Tensor:
    """(B,) from 0 down to −1 over the last part of the allowed length (DAPO, arXiv 2503.14476, eq. 13)."""
    if not config.objective.overlong_buffer:
        return torch.zeros(len(lengths))
    allowed = config.max_completion_length
    buffer = max(1.0, config.objective.overlong_buffer * allowed)
    return -((lengths.cpu() - (allowed - buffer)) / buffer).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# One step


def sample_and_score(
    config: Config, sampler: Sampler, loader: TrainLoader, evaluator: RewardEvaluator, run: Run
) -> tuple[Batch, dict[str, float]]:
    """Sample G completions for each of Q prompts and score them -> the batch, and its columns of the record."""
    examples, prompts = next(loader)
    environments = loader.dataset.environments(examples, config.num_generations)  # B
    with run.timed("rollout"):
        rollout = sampler.sample(
            prompts, config.num_generations, config.max_completion_length, config.temperature, environments=environments
        )
    with run.timed("reward"):
        batch, metrics = score(examples, rollout, evaluator)
    if config.shuffle_rewards:  # a control that must not learn: rewards no longer belong to their completions
        generator = torch.Generator().manual_seed(loader.state_dict()["position"])
        batch.rewards = batch.rewards[torch.randperm(len(batch.rewards), generator=generator)]  # (B, K)
    if config.objective.overlong_buffer:
        metrics["overlong_penalty"] = float(overlong_penalty(rollout.longest_turns, config).mean())
    return batch, batch.record(evaluator.reward_names) | metrics


def replace_equal_groups(
    config: Config, first: Batch, sampler: Sampler, loader: TrainLoader, evaluator: RewardEvaluator, run: Run
) -> tuple[Batch, dict[str, float]]:
    """Replace groups of equal rewards, which have no gradient, by groups of further prompts, in at most
    --max_resamples rounds (DAPO, section 3.2); the last round fills up with equal ones. Returns the batch, and columns
    for what replacing changed: all others describe the completions first sampled."""
    parts, tokens = [first.select(first.varied().nonzero()[:, 0].tolist())], 0
    missing = replaced = config.prompts_per_step - len(parts[0].examples)
    for rounds_left in reversed(range(config.max_resamples if missing else 0)):
        more, _ = sample_and_score(config, sampler, loader, evaluator, run)
        tokens += int(more.rollout.lengths.sum())
        order = more.varied().int().argsort(descending=True, stable=True).tolist()  # varied groups first
        usable = int(more.varied().sum()) if rounds_left else len(order)
        parts.append(more.select(order[: min(missing, usable)]))
        missing -= len(parts[-1].examples)
        if not missing:
            break
    batch = Batch.cat([part for part in parts if part.examples])
    return batch, {
        "replaced_fraction": replaced / config.prompts_per_step,
        "resampled_tokens": tokens,
        "trained/reward": float(batch.groups.mean()),
        "trained/completion_length": float(batch.rollout.lengths.float().mean()),
    }


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
    loss: Tensor = torch.zeros((), device=llm.device)
    sums: dict[str, tuple] = {}
    llm.trained.train(config.gradient_checkpointing)  # transformers recomputes layers in train mode only; no dropout
    divisor = loss_divisor(config.objective, mask, config.max_episode_length)  # the same for all micro-batches
    all_logps = torch.zeros_like(rollout.sampler_logps)  # (B, T)
    for rows, factor in parallel.padded(rollout.micro_batches(config.micro_batch_tokens), llm.sharded):
        logps, entropy = token_logps_and_entropy(
            llm, rollout, config.temperature, rows, share_prompt=not config.gradient_checkpointing
        )  # (b, T), (b, T)
        all_logps[rows] = logps.detach()
        old = all_logps[rows] if old_logps is None else old_logps[rows]  # (b, T)
        ref = None if ref_logps is None else ref_logps[rows]  # (b, T)
        drift = old - rollout.sampler_logps[rows]  # (b, T) rounding: the sampler computes in another order
        weights = drift.exp().clamp(max=config.correction_cap) if config.importance_sampling_correction else None
        part, stats = grpo_loss(logps, old, ref, advantages[rows], mask[rows], config.objective, divisor, weights)
        (factor * part).backward()  # factor 0: repeated, because other processes have more micro-batches
        loss = loss + factor * part.detach()
        sampled = rollout.sampled_mask[rows]  # (b, T)
        stats |= {"entropy": masked_mean(entropy, sampled), "sampler_logp_diff": masked_mean(drift.abs(), sampled)}
        for name, mean in stats.items():  # the mean over the step: the micro-batches' means, weighted by their tokens
            count = factor * (sampled if name in ("entropy", "sampler_logp_diff") else mask[rows]).sum()
            total, tokens = sums.get(name, (0.0, 0))
            sums[name] = (total + mean * count, tokens + count)
    llm.trained.eval()  # the sampler needs the key-value cache, which transformers drops in train mode
    loss, sums = parallel.total((loss, sums))
    return loss, {name: float(total / count.clamp(min=1)) for name, (total, count) in sums.items()}, all_logps


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
    optimizer, sampler = MasterAdamW(llm.model, config, llm.sharded), pick_sampler(llm, config.seed)
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
        if objective.dynamic_sampling:
            batch, changes = replace_equal_groups(config, batch, sampler, loader, evaluator, run)
            record |= changes
        rollout = batch.rollout

        # 2. Compare each completion with its group.
        scores = batch.rewards.sum(1) + overlong_penalty(rollout.longest_turns, config)  # (B,)
        advantages = group_advantages(scores, config.num_generations, objective.scale_rewards).to(llm.device)  # (B,)

        # 3. Learn: μ updates from the same completions. π_old is π before the first of them.
        mask = rollout.last_turn_mask if config.train_turns == "last" else rollout.sampled_mask  # (B, T)
        if config.mask_truncated_completions:
            mask = mask & rollout.finished[:, None]
        old_logps = ref_logps = None
        for _ in range(min(config.num_iterations, config.max_steps - step)):
            with run.timed("loss"):
                if reference is not None and ref_logps is None:
                    ref_logps = reference_logps(llm, reference, rollout, config)  # (B, T)
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
            run.log_samples(batch.readable(evaluator, scores.tolist(), advantages.tolist(), groups))
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
    size = config.eval_batch_size * parallel.size()  # prompts that all processes evaluate at once
    batches: list[Batch] = []
    samples: list[list[Completion]] = []  # k further answers to each question
    with sampler.seeded(0):
        for first in range(0, len(test_set), size):
            examples = [test_set[i] for i in range(first, min(first + size, len(test_set)))]
            prompts = encode_prompts(sampler.llm, examples)
            fitting = [i for i, length in enumerate(prompts.lengths) if length <= config.max_prompt_length]
            if not fitting:
                continue
            examples, prompts = [examples[i] for i in fitting], prompts.select(fitting)
            length, play = config.max_completion_length, test_set.environments
            rollout = sampler.sample(prompts, 1, length, temperature=0, environments=play(examples))
            batches.append(score(examples, rollout, evaluator)[0])
            if k > 1:
                rollout = sampler.sample(prompts, k, length, config.temperature, environments=play(examples, k))
                more = [evaluator.parse_episode(texts) for texts in rollout.texts_of_turns]
                samples += [more[i : i + k] for i in range(0, len(more), k)]
    groups = [group for batch in batches for group in batch.readable(evaluator)]
    metrics = evaluation_metrics(evaluator, batches, samples)
    metrics |= {"skipped_prompts": len(test_set) - len(groups), "seconds": time.perf_counter() - start}
    return metrics, groups


# ---------------------------------------------------------------------------------------------------------------------
# The command


def set_up_and_train(config: Config) -> int:
    """Load model and task, refuse what cannot work before anything is written, train. Returns the exit status."""
    evaluator = get_evaluator(config.dataset_name, config.dataset_options)
    with Run(config, evaluator) as run:
        data = (config.dataset_path, config.dataset_options)
        loader, test_set = get_dataloaders(  # before the model, which takes longer: bad data are refused at once
            *(config.dataset_name, config.prompts_per_step, config.train_size, config.eval_size, config.seed),
            *(*data, lambda examples: encode_prompts(llm, examples), config.max_prompt_length, config.max_turns),
        )
        check = functools.partial(refuse_unfit_config, config, test_set)
        how = (pick_device(config.device), config.dtype, config.attn_implementation, config.chat_template_kwargs, check)
        tiny = config.model_path == "tiny"
        model_path = str(parallel.on_first(tiny_model, config.dataset_name, *data)) if tiny else config.model_path
        llm: LLM = load_llm(run.checkpoint or model_path, *how)
        refuse_unfit_model(config, llm, loader.dataset, test_set)
        prepare_training(config, llm)
        apart = config.objective.beta and not (config.lora_rank or config.eval_only)  # adapters can be disabled instead
        reference = load_llm(model_path, *how) if apart else None
        config = config.with_steps(loader.steps_per_epoch, test_set.max_turns)
        config = run.open(config, llm, reference, loader.dataset, test_set)
        if config.eval_only:
            return run.finish_evaluation(*evaluate(config, pick_sampler(llm), test_set, evaluator))
        frozen = reference.model.requires_grad_(False) if reference else llm.model if config.objective.beta else None
        train(config, llm, frozen, loader, test_set, evaluator, run)
        return run.finish()


def main(argv: list[str] | None = None) -> int:
    return exit_status(set_up_and_train, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
