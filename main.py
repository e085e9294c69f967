"""GRPO by hand: the reinforcement learning behind DeepSeek-R1, in one loop that is read from top to bottom.

For every step: take Q prompts, sample G completions of each from the model, score them, and make each completion more
or less likely by how much better than its own group's mean it was (DeepSeekMath, arXiv 2402.03300, equations 3 and 4):

    A_i    = (R_i − mean(R_1..G)) / std(R_1..G)                                                       group_advantages
    ratio  = π(token) / π_old(token)                       π_old: the weights that sampled            grpo_loss
    loss   = − mean_i mean_t [ min(ratio·A_i, clip(ratio, 1−ε, 1+ε)·A_i) − β·KL(π ‖ π_ref) ]          grpo_loss

Departures from the paper: the loss of the preset `grpo` is as above, other `--objective`s are further below; 1e-4 is
added to the standard deviation; groups whose rewards are all equal have advantage 0; one reward at the end of a
completion (outcome supervision). From the original DeepSeekRL-Extended scripts: log-probabilities are those of the
sampling temperature, the gradient does not depend on how a step is cut into micro-batches, weights keep fp32 masters,
evaluation is greedy on the official test split. README.md has the whole list.

    python main.py --model_path tiny --dataset_name correlation                       # a laptop, minutes
    python main.py --model_path Qwen/Qwen2.5-1.5B-Instruct --dataset_name gsm8k       # one GPU
    python plotter.py --output_dir runs/correlation-tiny                              # look at what happened

Letters in the shape comments: Q prompts in a step, G completions each, B = Q·G rows in group order (row i belongs to
prompt i // G), T completion tokens (right-padded), K reward components.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# torch, transformers and the files that import them are imported in `main`, after the flags: --help takes no second.

# ---------------------------------------------------------------------------------------------------------------------
# The mathematics: pure functions of tensors


def group_advantages(rewards, group_size: int, scale: str = "group"):
    """How much better than its group each completion was.

    Args:
        rewards: (B,) total rewards, the G completions of a prompt one after the other.
        scale: "group": (R − mean) / (std + 1e-4) with the unbiased standard deviation (DeepSeekMath, section 4.1.2);
            "none": R − mean (Dr. GRPO, arXiv 2503.20783); "batch": R − mean, divided by the whole step's std + 1e-4.

    Returns: (B,). Exactly 0 in a group whose rewards are all equal: it teaches nothing, not even rounding errors.
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


@dataclasses.dataclass(frozen=True)
class Objective:
    """The choices that make an objective of the GRPO family; each can be set on its own by the flag named after it."""

    scale_rewards: str = "group"  # see group_advantages
    importance_sampling_level: str = "token"  # is the ratio a token's, or the sequence's geometric mean (GSPO)
    clip: str = "ratio"  # "ratio": PPO's pessimistic clipping; "weight": clipped, detached weight on log π (CISPO)
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None: as epsilon
    beta: float = 0.0  # weight of the KL penalty
    normalizer: str = "completions"  # what the sum over tokens is divided by: completions, tokens or max_length
    dynamic_sampling: bool = False  # sample anew, a few times, groups whose rewards are all equal (DAPO)
    overlong_buffer: float = 0.0  # share of max_completion_length over which a soft penalty grows to −1 (DAPO)


OBJECTIVES = {
    "grpo": Objective(beta=0.04),  # DeepSeekMath, arXiv 2402.03300
    "bnpo": Objective(beta=0.04, normalizer="tokens"),
    "dr_grpo": Objective(scale_rewards="none", normalizer="max_length"),  # arXiv 2503.20783
    "dapo": Objective(epsilon_high=0.28, normalizer="tokens", dynamic_sampling=True, overlong_buffer=0.2),  # 2503.14476
    "gspo": Objective(importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),  # arXiv 2507.18071
    "cispo": Objective(clip="weight", epsilon_high=0.28, normalizer="tokens"),  # MiniMax-M1, arXiv 2506.13585
}


def grpo_loss(
    logps,
    old_logps,
    ref_logps,
    advantages,
    mask,
    *,
    objective="grpo",
    epsilon=0.2,
    epsilon_high=None,
    beta=0.04,
    kl_estimator="k3",
    max_completion_length=None,
    normalizer=None,
    importance_weights=None,
):
    """The loss of some rows of a step; the losses of a step's micro-batches add up to the step's loss.

    Args:
        logps: (B, T) log π of the completion tokens, with gradients.
        old_logps: (B, T) under the weights that sampled, without gradients; `logps.detach()` on the first update.
        ref_logps: (B, T) under the frozen reference, or None: then there is no KL penalty.
        advantages: (B,). mask: (B, T), True on completion tokens, the end-of-sequence token included.
        objective: a name in OBJECTIVES, or an Objective: how the ratio is formed and clipped and the sum normalized.
        normalizer: what the step's sum is divided by, counted over ALL of its rows (see `step_normalizer`). None: over
            the rows given here, which is right if they are the whole step.
        importance_weights: (B, T) or None, multiplies each token's policy term (not the KL).

    Returns: the loss, and stats as 0-d tensors: means over the completion tokens given here.
    """
    choices = OBJECTIVES[objective] if isinstance(objective, str) else objective
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    advantages, mask = advantages[:, None], mask.to(logps.dtype)  # (B, 1), (B, T)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)

    log_ratio = (logps - old_logps) * mask  # (B, T)
    if choices.importance_sampling_level == "sequence":  # GSPO eq. 7: the length-normalized ratio of the sequence
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(logps)  # (B, T), equal along a row
    ratio = log_ratio.exp()  # (B, T)
    if choices.clip == "weight":  # CISPO eq. 4: the ratio only weighs log π; no token loses its gradient
        clipped = ratio > high
        gain = ratio.clamp(max=high).detach() * advantages * logps
    else:  # DeepSeekMath eq. 3, PPO's pessimistic minimum
        clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
        gain = (ratio * advantages).minimum(ratio.clamp(low, high) * advantages)
    if importance_weights is not None:
        gain = gain * importance_weights
    per_token = -gain  # (B, T)

    kl = None
    if ref_logps is not None:
        kl = kl_estimate(logps, ref_logps, kl_estimator)  # (B, T)
        if beta:
            per_token = per_token + beta * kl
    if normalizer is None:
        normalizer = step_normalizer(choices.normalizer, mask, max_completion_length)
    if choices.normalizer == "completions":  # the mean over a completion's tokens, then over completions
        per_token = per_token / lengths
    loss = (per_token * mask).sum() / normalizer

    tokens = mask.sum().clamp(min=1)
    stats = {"clip_fraction": (clipped * mask).sum() / tokens, "ratio": (ratio.detach() * mask).sum() / tokens}
    if kl is not None:
        stats["kl"] = (kl.detach() * mask).sum() / tokens
    return loss, stats


def kl_estimate(logps, ref_logps, estimator: str = "k3"):
    """(B, T) estimates of KL(π ‖ π_ref) from samples of π (Schulman, "Approximating KL divergence", 2020).

    k1 = log(π/ref): unbiased, can be negative; its gradient does not push towards the reference on average.
    k2 = ½ log²(π/ref): biased, low variance. k3 = ref/π − log(ref/π) − 1: unbiased, never negative
    (DeepSeekMath eq. 4).
    """
    log_ratio = ref_logps - logps  # (B, T)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return log_ratio.exp() - log_ratio - 1
    raise ValueError(f"unknown KL estimator {estimator!r}: choose k1, k2 or k3")


def step_normalizer(kind: str, mask, max_completion_length: int | None) -> float:
    """What the sum over a whole step's tokens is divided by; mask (B, T) of all its rows."""
    if kind == "completions":
        return float(len(mask))
    if kind == "tokens":
        return float(max(1, int(mask.sum())))
    if max_completion_length is None:
        raise ValueError("normalizing by max_length needs max_completion_length")
    return float(len(mask) * max_completion_length)


def soft_overlong_penalty(lengths, max_completion_length: int, buffer_share: float):
    """(B,) from 0 down to −1 over the last `buffer_share` of the allowed length (DAPO, arXiv 2503.14476, eq. 13)."""
    buffer = max(1.0, buffer_share * max_completion_length)
    return -((lengths - (max_completion_length - buffer)) / buffer).clamp(0, 1)


def micro_batches(lengths: list[int], prompt_of_row: list[int], prompt_length: int, budget: int) -> list[list[int]]:
    """Cut a step's rows into micro-batches of at most `budget` tokens, padding included; the gradient stays the same.

    A group's rows stay together where they fit, since their prompt is computed once per micro-batch; groups, and rows
    within a group, are ordered by length, so that little is spent on padding.
    """
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompt_of_row):
        groups.setdefault(prompt, []).append(row)
    ordered = sorted(groups.values(), key=lambda rows: max(lengths[row] for row in rows))
    batches, current = [], []

    def cost(rows):
        return len(rows) * max(lengths[r] for r in rows) + prompt_length * len({prompt_of_row[r] for r in rows})

    for group in ordered:
        group = sorted(group, key=lambda row: lengths[row])
        if current and cost(current + group) > budget:
            batches.append(current)
            current = []
        for row in group:
            if current and cost([*current, row]) > budget:
                batches.append(current)
                current = []
            current.append(row)
    return [*batches, current]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(args, llm, reference, loader, eval_dataset, evaluator, folder, resumed=None) -> dict:
    """The GRPO loop. Returns its last state, for the closing words."""
    import torch

    G, objective = args.num_generations, args.choices
    weights = MasterWeights(llm.model)
    optimizer = make_optimizer(weights, llm.device, args)
    generator = torch.Generator(llm.device).manual_seed(args.seed)  # of sampling; nothing else in the loop is random
    if args.gradient_checkpointing:
        enable_checkpointing(llm.model)
    state = {"step": 0, "best_step": 0, "best_score": None, "skipped_in_a_row": 0, "evals": {}}
    if resumed:
        restore(resumed, state, loader, weights, optimizer, generator, reference)
    batches = Batches(loader, llm)
    watch, progress, unsaved = StopWatch(args), Progress(state["step"], args, evaluator), False

    def evaluate_and_log():
        metrics, groups = evaluate(llm, eval_dataset, evaluator, args)
        folder.log_eval(state["step"], metrics, groups)
        state["evals"][state["step"]] = metrics
        score = metrics[evaluator.headline.metric] * (-1 if evaluator.headline.lower_is_better else 1)
        if state["best_score"] is None or score > state["best_score"]:
            state["best_score"], state["best_step"] = score, state["step"]
        progress.evaluated(state["step"], metrics)

    def save():
        trainer = capture(state, batches, weights, optimizer, generator, reference if args.sync_ref_model else None)
        keep = args.save_total_limit
        folder.save_checkpoint(state["step"], llm.save, trainer, keep, state["best_step"])

    if state["step"] == 0:
        evaluate_and_log()
    while state["step"] < args.max_steps and not watch.must_stop():
        previous, timer = state["step"], Timer()

        # 1. Sample G completions for each of Q prompts, and score them.
        batch = collect(llm, batches, evaluator, args, generator, timer)

        # 2. Compare each with its group.
        advantages = group_advantages(batch.totals, G, objective.scale_rewards).to(llm.device)  # (B,)

        # 3. Learn: μ updates from the same completions. π_old is the first update's own π, before it.
        mask = batch.rollout.completion_mask  # (B, T)
        if args.mask_truncated_completions:
            mask = mask & batch.rollout.finished[:, None]
        plan = plan_of(batch.rollout, args)
        ref_logps = None if reference is None else reference_logps(llm, reference, batch.rollout, plan, args)  # (B, T)
        old_logps = None
        for _ in range(min(args.num_iterations, args.max_steps - state["step"])):
            loss, stats, logps = accumulate_gradients(
                llm, batch.rollout, advantages, mask, old_logps, ref_logps, plan, args
            )
            old_logps = logps if old_logps is None else old_logps  # (B, T)
            state["step"] += 1
            rate = learning_rate(state["step"], args.total_steps, args)
            grad_norm, finite = update(optimizer, weights, loss, rate, args.max_grad_norm)
            state["skipped_in_a_row"] = 0 if finite else state["skipped_in_a_row"] + 1
            if args.sync_ref_model and state["step"] % args.ref_model_sync_steps == 0:
                mix_into(reference, llm.model, args.ref_model_mixup_alpha)
            timer.lap("loss")

            record = {"step": state["step"], "epoch": batches.epoch, "loss": float(loss), **batch.record(evaluator)}
            record |= {"kl": 0.0} | stats | {"grad_norm": grad_norm, "learning_rate": rate}
            record |= {"skipped_steps": state["skipped_in_a_row"], "skipped_prompts": batches.state["skipped"]}
            record |= timer.record(record["tokens"]) | {"peak_memory_gb": peak_memory_gb(llm.device)}
            folder.log_step(record)
            progress.stepped(record)
            if state["skipped_in_a_row"] >= args.max_skipped_steps:
                raise FloatingPointError(
                    f"the loss or its gradient was not finite in {state['skipped_in_a_row']} steps in a row, so the "
                    "run stopped; its weights are those before them: lower --learning_rate, or use --dtype float32"
                )
            timer = Timer()

        # 4. Look at it, keep it.
        def due(every, before=previous):
            return every > 0 and state["step"] // every > before // every

        if due(args.log_completions_steps) or previous == 0:
            groups = describe(batch, evaluator, advantages.tolist(), args.log_completions_groups)
            folder.log_samples(state["step"], groups)
        if due(args.eval_steps) and state["step"] < args.max_steps:
            evaluate_and_log()
        unsaved = unsaved or due(args.save_steps)
        # A skipped step may mean that the weights broke: they must not push good checkpoints out.
        if unsaved and not state["skipped_in_a_row"] and state["step"] < args.max_steps:
            save()
            unsaved = False
    if state["step"] >= args.max_steps and state["step"] not in state["evals"]:
        evaluate_and_log()
    save()
    batches.close()
    progress.close()
    return {**state, "signal": watch.signal, "seconds": progress.seconds}


@dataclasses.dataclass
class Batch:
    """A step's groups, sampled and scored. rewards: (B, K); totals: (B,), what advantages are made of; metrics and
    `sampled_totals` describe the completions as they were sampled, before any group was replaced."""

    examples: list
    rollout: object
    rewards: object
    totals: object
    metrics: dict
    sampled_totals: object

    def record(self, evaluator) -> dict:
        """What the log says about it."""
        G = self.rollout.num_generations
        groups = self.sampled_totals.view(-1, G)  # (Q, G)
        lengths = self.rollout.completion_mask.sum(1)  # (B,)
        return {
            "reward": float(groups.mean()),
            "reward_std": float(groups.std(1).mean()),
            **named_means(evaluator, self.rewards),
            **self.metrics,
            "completion_length": float(lengths.float().mean()),
            "truncated_fraction": 1 - float(self.rollout.finished.float().mean()),
            "zero_std_fraction": float((groups.amax(1) == groups.amin(1)).float().mean()),
            "tokens": int(lengths.sum()),
        }


def collect(llm, batches, evaluator, args, generator, timer) -> Batch:
    """Sample and score Q groups. With dynamic sampling (DAPO, section 3.2) groups whose rewards are all equal, which
    teach nothing, make room for groups of further prompts, in at most --max_resamples further rounds."""
    import torch

    from rollout import join, sample

    G, objective = args.num_generations, args.choices
    examples, parts, rewards, first = [], [], [], None
    rounds = 1 + (args.max_resamples if objective.dynamic_sampling else 0)
    for last in (number == rounds - 1 for number in range(rounds)):
        new_examples, prompts = batches.next()
        rollout = sample(llm, prompts, G, args.max_completion_length, args.temperature, generator)
        timer.lap("rollout")
        answers = [example.answer for example in new_examples for _ in range(G)]
        new_rewards, metrics = evaluator.compute_rewards(rollout.texts, answers)  # (B, K)
        timer.lap("reward")
        totals = new_rewards.sum(1)  # (B,)
        first = first or (metrics, totals)
        groups = totals.view(-1, G)  # (Q, G)
        varied = (groups.amax(1) > groups.amin(1)).tolist()
        wanted = args.prompts_per_step - len(examples)
        order = (
            sorted(range(len(new_examples)), key=lambda q, varied=varied: not varied[q])
            if rounds > 1
            else range(wanted)
        )
        kept = [q for q in order if varied[q] or last][:wanted]
        examples += [new_examples[q] for q in kept]
        parts.append((rollout, kept))
        rewards += [new_rewards[q * G : (q + 1) * G] for q in kept]
        if len(examples) == args.prompts_per_step:
            break
    rollout = parts[0][0] if rounds == 1 else join(parts)
    rewards = torch.cat(rewards)  # (B, K)
    if args.shuffle_rewards:  # a control: rewards that say nothing about their completions must teach nothing
        seed = batches.state["position"]
        rewards = rewards[torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))]
    totals = rewards.sum(1)  # (B,)
    sampled_totals = totals if rounds == 1 else first[1]
    metrics = first[0]
    if objective.overlong_buffer:  # no part of the logged reward, nor of what makes a group worth replacing
        lengths = rollout.completion_mask.sum(1).cpu()
        penalty = soft_overlong_penalty(lengths, args.max_completion_length, objective.overlong_buffer)  # (B,)
        totals, metrics = totals + penalty, {**metrics, "overlong_penalty": float(penalty.mean())}
    return Batch(examples, rollout, rewards, totals, metrics, sampled_totals)


def plan_of(rollout, args) -> list[list[int]]:
    lengths = rollout.completion_mask.sum(1).tolist()
    return micro_batches(lengths, rollout.prompt_of_row, rollout.prompt_ids.shape[1], args.micro_batch_tokens)


def reference_logps(llm, reference, rollout, plan, args):
    """(B, T) log-probabilities of the completions under the frozen reference."""
    import torch

    from llms import token_logps

    ref_logps = torch.zeros_like(rollout.sampler_logps)  # (B, T)
    with torch.no_grad():
        for rows in plan:
            ref_logps[rows] = token_logps(
                llm, rollout, args.temperature, rows, reference, share_prompt=not args.gradient_checkpointing
            )
    return ref_logps


def accumulate_gradients(llm, rollout, advantages, mask, old_logps, ref_logps, plan, args):
    """The gradient of the whole step's loss, a micro-batch at a time, added up in the weights' `.grad`.

    Args:
        advantages: (B,). mask: (B, T), tokens that count in the loss. plan: rows of each micro-batch.
        old_logps: (B, T), or None on the first update: then π_old is π itself, without gradients.
        ref_logps: (B, T) or None.

    Returns: the step's loss (0-d), its statistics as floats, and log π (B, T) without gradients.
    """
    import torch

    from llms import token_logps_and_entropy

    objective, loss, sums = args.choices, 0.0, {}
    llm.model.train(args.gradient_checkpointing)  # only then does transformers recompute layers; dropout is off
    normalizer = step_normalizer(objective.normalizer, mask, args.max_completion_length)  # of all micro-batches alike
    all_logps = torch.zeros_like(rollout.sampler_logps)  # (B, T)
    for rows in plan:
        logps, entropy = token_logps_and_entropy(
            llm, rollout, args.temperature, rows, share_prompt=not args.gradient_checkpointing
        )  # (b, T), (b, T)
        all_logps[rows] = logps.detach()
        old = all_logps[rows] if old_logps is None else old_logps[rows]  # (b, T)
        off = old - rollout.sampler_logps[rows]  # (b, T) 0 but for rounding: the sampler computes in another order
        part, stats = grpo_loss(
            logps,
            old,
            None if ref_logps is None else ref_logps[rows],
            advantages[rows],
            mask[rows],
            objective=objective,
            epsilon=objective.epsilon,
            epsilon_high=objective.epsilon_high,
            beta=objective.beta,
            kl_estimator=args.kl_estimator,
            max_completion_length=args.max_completion_length,
            normalizer=normalizer,
            importance_weights=off.exp().clamp(max=args.correction_cap)
            if args.importance_sampling_correction
            else None,
        )
        part.backward()
        loss = loss + part.detach()
        sampled = rollout.completion_mask[rows]  # (b, T)
        stats |= {"entropy": masked_mean(entropy, sampled), "sampler_logp_diff": masked_mean(off.abs(), sampled)}
        for name, mean in stats.items():  # a mean over the step is the mean of the parts' means, weighted by tokens
            count = (sampled if name in ("entropy", "sampler_logp_diff") else mask[rows]).sum()
            value, total = sums.get(name, (0.0, 0))
            sums[name] = (value + mean * count, total + count)
    llm.model.eval()  # the sampler needs the key-value cache, which recomputing does without
    return loss, {name: float(value / total.clamp(min=1)) for name, (value, total) in sums.items()}, all_logps


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum().clamp(min=1)


def named_means(evaluator, rewards) -> dict[str, float]:
    """The mean of each reward component; rewards: (B, K)."""
    return {f"rewards/{name}": float(x) for name, x in zip(evaluator.reward_names, rewards.mean(0), strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# Weights and their updates


class MasterWeights:
    """fp32 copies of half-precision weights, which the optimizer updates.

    AdamW at 1e-6 moves a weight of 0.02 by about 1e-6; bfloat16 would round that to nothing. Gradients of
    micro-batches are added up in fp32 too, each as soon as it is complete. For fp32 weights the copies are the weights.
    """

    def __init__(self, model):
        import torch

        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = self.parameters
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in self.parameters):
            self.masters = [p.detach().float() for p in self.parameters]
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.register_post_accumulate_grad_hook(self.adder(master))

    @staticmethod
    def adder(master):
        def add(parameter):
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

        return add

    def copy_to_model(self) -> None:
        import torch

        if self.masters is not self.parameters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)


def make_optimizer(weights: MasterWeights, device, args):
    import torch

    return torch.optim.AdamW(
        weights.masters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def update(optimizer, weights: MasterWeights, loss, rate: float, max_grad_norm: float) -> tuple[float, bool]:
    """Clip, step, clear -> the gradient's norm before clipping, and whether the step was taken: not if it is NaN."""
    import torch

    for group in optimizer.param_groups:
        group["lr"] = rate
    norm = float(torch.nn.utils.clip_grad_norm_(weights.masters, max_grad_norm or math.inf))
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        optimizer.step()
        weights.copy_to_model()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def learning_rate(step: int, total_steps: int, args) -> float:
    """The learning rate of step 1 … total_steps: linear warm-up, then constant, linear or cosine down to 0."""
    warmup_steps = math.ceil(args.warmup_ratio * total_steps)
    if step <= warmup_steps:
        return args.learning_rate * step / warmup_steps
    done = min(1.0, (step - warmup_steps - 1) / max(1, total_steps - warmup_steps))
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return args.learning_rate * factor[args.lr_scheduler_type]


def enable_checkpointing(model) -> None:
    """Recompute layers in the backward pass instead of keeping their activations. transformers does so in train mode
    only (see `accumulate_gradients`), where dropout would come in: it is set to zero."""
    import torch

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def mix_into(reference, model, alpha: float) -> None:
    """reference ← alpha · model + (1 − alpha) · reference."""
    import torch

    with torch.no_grad():
        for old, new in zip(reference.parameters(), model.parameters(), strict=True):
            old.lerp_(new, alpha)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(llm, dataset, evaluator, args) -> tuple[dict, list[dict]]:
    """Answer the whole test set, greedily -> metrics, and every answer. Changes nothing in training: greedy decoding
    draws no random numbers, and `--eval_samples` brings its own generator.

    Prompts longer than --max_prompt_length are left out and counted in `skipped_prompts`.
    """
    import torch

    from evaluator import majority_at_k, pass_at_k, wilson_interval
    from llms import encode_prompts
    from rollout import sample

    start, k = time.perf_counter(), args.eval_samples
    generator = torch.Generator(llm.device).manual_seed(0)
    batches: list[Batch] = []
    sampled: list[list[str]] = []  # k further answers to each question
    for first in range(0, len(dataset), args.eval_batch_size):
        examples = [dataset[i] for i in range(first, min(first + args.eval_batch_size, len(dataset)))]
        prompts = encode_prompts(llm, examples)
        fitting = [i for i, length in enumerate(prompts.mask.sum(1).tolist()) if length <= args.max_prompt_length]
        if not fitting:
            continue
        examples, prompts = [examples[i] for i in fitting], prompts.select(fitting)
        rollout = sample(llm, prompts, 1, args.max_completion_length, temperature=0)
        rewards, metrics = evaluator.compute_rewards(rollout.texts, [example.answer for example in examples])  # (n, K)
        batches.append(Batch(examples, rollout, rewards, rewards.sum(1), metrics, rewards.sum(1)))
        if k > 1:
            texts = sample(llm, prompts, k, args.max_completion_length, args.temperature, generator).texts
            sampled += [texts[i : i + k] for i in range(0, len(texts), k)]
    texts = [text for batch in batches for text in batch.rollout.texts]
    answers = [example.answer for batch in batches for example in batch.examples]
    skipped = len(dataset) - len(texts)
    rewards, metrics = evaluator.compute_rewards(texts, answers)  # (N, K)
    lengths = torch.cat([batch.rollout.completion_mask.sum(1) for batch in batches])  # (N,)
    finished = torch.cat([batch.rollout.finished for batch in batches])  # (N,)
    metrics = {
        "num_examples": len(texts),
        "skipped_prompts": skipped,
        "avg_reward": float(rewards.sum(1).mean()),
        **named_means(evaluator, rewards),
        **metrics,
        "completion_length": float(lengths.float().mean()),
        "truncated_fraction": 1 - float(finished.float().mean()),
    }
    if evaluator.exact:
        right = sum(map(evaluator.is_correct, texts, answers))
        metrics["accuracy_low"], metrics["accuracy_high"] = wilson_interval(right, len(texts))
        if k > 1:
            right = [
                [evaluator.is_correct(text, answer) for text in row]
                for row, answer in zip(sampled, answers, strict=True)
            ]
            votes = [[evaluator.predict(text) for text in row] for row in sampled]
            metrics[f"pass@{k}"], metrics[f"majority@{k}"] = pass_at_k(right), majority_at_k(votes, answers, evaluator)
    groups = [group for batch in batches for group in describe(batch, evaluator)]
    return {**metrics, "seconds": time.perf_counter() - start}, groups


def describe(batch: Batch, evaluator, advantages: list | None = None, count: int | None = None) -> list[dict]:
    """The first `count` groups of completions as the run folder keeps them, for people to read."""
    from llms import plain_text

    rollout, groups = batch.rollout, []
    lengths, finished = rollout.completion_mask.sum(1).tolist(), rollout.finished.tolist()
    for q, example in enumerate(batch.examples[:count]):
        completions = [
            {
                "text": rollout.texts[row],
                "rewards": dict(zip(evaluator.reward_names, batch.rewards[row].tolist(), strict=True)),
                "reward": float(batch.totals[row]),
                "advantage": None if advantages is None else advantages[row],
                "length": lengths[row],
                "truncated": not finished[row],
                "prediction": evaluator.predict(rollout.texts[row]),
            }
            for row in range(q * rollout.num_generations, (q + 1) * rollout.num_generations)
        ]
        groups.append(
            {
                "id": example.id,
                "prompt": "\n\n".join(plain_text(message["content"]) for message in example.messages),
                "image_data": example.images[0] if example.images else None,
                "answer": example.answer,
                "completions": completions,
            }
        )
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# The order of things: data ahead of time, checkpoints, stopping


class Batches:
    """Prompts for the next step, drawn and encoded in a thread while the step before is computed.

    `state` and `epoch` belong to the batches handed out, not to the one that is being prepared: a run resumed
    from `state` gets that one again.
    """

    def __init__(self, loader, llm):
        self.loader, self.llm = loader, llm
        self.state, self.epoch = loader.state_dict(), loader.epoch
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self.upcoming = self.pool.submit(self.prepare)

    def prepare(self):
        from llms import encode_prompts

        examples = next(self.loader)
        return examples, encode_prompts(self.llm, examples), self.loader.state_dict(), self.loader.epoch

    def next(self):
        """-> Q examples and their encoded prompts."""
        examples, prompts, self.state, self.epoch = self.upcoming.result()
        self.upcoming = self.pool.submit(self.prepare)
        return examples, prompts

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def prompt_length(llm, example) -> int:
    """Tokens of the prompt, pictures included."""
    from llms import encode_prompts

    return encode_prompts(llm, [example]).ids.shape[1]


def capture(state: dict, batches: Batches, weights: MasterWeights, optimizer, generator, reference) -> dict:
    """All that a run needs to go on exactly, in types that load without running code."""
    return {
        "state": dict(state),
        "loader": batches.state,
        "masters": None if weights.masters is weights.parameters else weights.masters,
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "reference": None if reference is None else reference.state_dict(),
    }


def restore(saved: dict, state: dict, loader, weights: MasterWeights, optimizer, generator, reference) -> None:
    """The inverse of `capture`; the weights themselves were loaded with the model."""
    import torch

    state.update(saved["state"])
    loader.load_state_dict(saved["loader"])
    optimizer.load_state_dict(saved["optimizer"])
    generator.set_state(saved["generator"])
    if saved["masters"] is not None:
        with torch.no_grad():
            for master, kept in zip(weights.masters, saved["masters"], strict=True):
                master.copy_(kept)
    if saved["reference"] is not None:
        reference.load_state_dict(saved["reference"])


class StopWatch:
    """Says when to stop: after SIGINT or SIGTERM (a second one stops at once), or when --max_minutes are over."""

    def __init__(self, args):
        self.signal = None
        self.deadline = time.monotonic() + 60 * args.max_minutes if args.max_minutes else math.inf
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.note)

    def note(self, number, _frame):
        self.signal = number
        print("\nstopping after this step, with a checkpoint; again to stop at once", file=sys.stderr, flush=True)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    def must_stop(self) -> bool:
        return self.signal is not None or time.monotonic() >= self.deadline


class Timer:
    """Where the time of a step went, in seconds."""

    def __init__(self):
        self.start = self.tick = time.perf_counter()
        self.laps = {"rollout": 0.0, "reward": 0.0, "loss": 0.0}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] += now - self.tick
        self.tick = now

    def record(self, tokens: int) -> dict:
        total = time.perf_counter() - self.start
        seconds = {f"seconds/{name}": lap for name, lap in self.laps.items()}
        return {"tokens_per_second": tokens / total, **seconds, "seconds/total": total}


def peak_memory_gb(device) -> float:
    """Most memory used so far: on the GPU where there is one, of the process elsewhere."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ---------------------------------------------------------------------------------------------------------------------
# What a person sees while it runs


class Progress:
    """A bar on a terminal; elsewhere, such as in a log file, a plain line every few seconds."""

    SECONDS_BETWEEN_LINES = 10

    def __init__(self, done: int, args, evaluator):
        from tqdm import tqdm

        self.args, self.headline = args, evaluator.headline
        self.seconds: list[float] = []  # of each step
        self.printed, self.told = -math.inf, set()
        self.bar = tqdm(total=args.max_steps, initial=done, disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def stepped(self, record: dict) -> None:
        self.seconds.append(record["seconds/total"])
        value = show(self.headline, record[self.headline.metric])
        text = f"reward {record['reward']:.3f} · {self.headline.label} {value} · kl {record['kl']:.4f}"
        self.bar.set_postfix_str(text)
        self.bar.update()
        now = time.perf_counter()
        if self.bar.disable and now - self.printed >= self.SECONDS_BETWEEN_LINES:
            self.printed = now
            median = sorted(self.seconds[-50:])[len(self.seconds[-50:]) // 2]
            left = clock(median * (self.args.max_steps - record["step"]))
            self.say(f"step {record['step']:>4}/{self.args.max_steps} · {text} · {median:.2f} s a step · {left} left")
        for about, worry in worries(record, self.args).items():
            if about not in self.told:
                self.told.add(about)
                self.say(f"note, step {record['step']}: {worry}")

    def evaluated(self, step: int, metrics: dict) -> None:
        headline, interval = self.headline, ""
        if "accuracy_low" in metrics:
            interval = f" (95 % interval {100 * metrics['accuracy_low']:.1f} to {100 * metrics['accuracy_high']:.1f})"
        self.say(
            f"evaluation at step {step}: {headline.label} {show(headline, metrics[headline.metric])}{interval} · "
            f"reward {metrics['avg_reward']:.3f} · {metrics['num_examples']} examples in {metrics['seconds']:.0f} s"
        )

    def close(self) -> None:
        self.bar.close()


def worries(record: dict, args) -> dict[str, str]:
    """What a newcomer would wonder about at this record, by subject."""
    found = {}
    if abs(record["loss"]) < 1e-6 and record["zero_std_fraction"] < 1:
        found["loss"] = (
            "the loss is 0 and that is right: on the policy that sampled, every ratio is 1 and a group's advantages "
            "add up to 0; the gradient is not 0 (see grad_norm), and the reward is what to watch"
        )
    if record["zero_std_fraction"] == 1:
        found["equal rewards"] = (
            "in every group all completions got equal rewards, so this step teaches nothing; if it goes on, the task "
            "is too easy or too hard for the model, or the temperature too low"
        )
    if record["truncated_fraction"] == 1:
        found["cut off"] = (
            f"every completion was cut off at {args.max_completion_length} tokens; if it goes on, raise "
            "--max_completion_length"
        )
    if record.get("rewards/strict_format") == 0:
        found["format"] = "no completion had the asked format; that reward cannot teach until one has it"
    if record["skipped_steps"]:
        found["skipped"] = "the loss or its gradient was not finite, so the step was skipped"
    return found


def show(headline, value: float | None) -> str:
    """A headline value with its unit: 12.3 min, 0.123, 45.6 %."""
    if value is None:
        return "unknown"
    if headline.unit == "%":
        return f"{100 * value:.1f} %"
    return f"{value:.1f} {headline.unit}" if headline.unit else f"{value:.3f}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def closing_words(args, evaluator, outcome: dict, folder) -> str:
    """What changed, where it is, how to look at it."""
    headline, evals = evaluator.headline, outcome["evals"]
    before, after = (show(headline, evals[step][headline.metric]) for step in (min(evals), max(evals)))
    chance = "" if headline.chance is None else f" (chance: {show(headline, headline.chance)})"
    return (
        f"{args.dataset_name}: {headline.label} {before} → {after}{chance}, after {outcome['step']} steps; the last "
        f"{len(outcome['seconds'])} took {clock(sum(outcome['seconds']))} besides evaluating\n"
        f"the run is in {folder.path}, its weights in {folder.newest_checkpoint()}\n"
        f"draw it:  uv run plotter.py --output_dir {shlex.quote(str(folder.path))}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    """Refuses in one line, with the nearest name."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            flag = message.split(": ", 1)[1].split()[0]
            message = f"there is no flag {flag}; {nearest(flag.split('=')[0], self._option_string_actions, '--help')}"
        print(f"main.py: {message}", file=sys.stderr)
        raise SystemExit(2)

    def flags_titled(self, title: str):
        """-> a function that adds a flag to a group of them. The kind of value is that of the default, if there is one;
        numbers below `least` are refused; a default of False makes a switch."""
        group = self.add_argument_group(title)

        def flag(name, default, text, kind=None, least=None, **more):
            if default not in (None, False):
                text += f" (default: {default})"
            text = text.replace("%", "%%")
            if default is False:
                group.add_argument(f"--{name}", action="store_true", help=text)
            else:
                kind = at_least(kind or type(default), least) if least is not None else kind or type(default)
                group.add_argument(f"--{name}", type=kind, default=default, help=text, **more)

        return flag


def at_least(kind: type, least):
    def parse(text: str):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def nearest(name: str, known, otherwise: str = "") -> str:
    near = difflib.get_close_matches(name, list(known))
    if near:
        swapped = [one for one in near if sorted(one) == sorted(name)]  # "gpro" means grpo, not gspo
        return f"did you mean {(swapped or near)[0]}?"
    return f"see {otherwise}" if otherwise else f"choose from {', '.join(known)}"


def build_parser() -> Parser:
    parser = Parser(
        prog="main.py",
        description="Train a language model with GRPO. Names are those of transformers' TrainingArguments and TRL's "
        "GRPOConfig wherever one exists. `--model_path tiny` builds a small model on this machine and has defaults of "
        "its own for each task (tiny_models.py).",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
        allow_abbrev=False,
    )
    flag = parser.flags_titled("what is trained on what")
    flag("model_path", "Qwen/Qwen2.5-1.5B-Instruct", "a model on the hub, a local folder, or `tiny`")
    flag("dataset_name", "gsm8k", "the task: gsm8k, clock, correlation or arithmetic")
    flag("dataset_path", None, "local data for a task that reads some: a folder or a JSONL file", str)
    flag("dataset_options", None, "options of the task, as style=bold size=56", str, nargs="*", metavar="KEY=VALUE")
    flag("output_dir", None, "where the run is kept (default: runs/TASK-MODEL)", str)
    flag("train_size", None, "training examples (default: the task's own)", int, 1)
    flag("eval_size", None, "test examples, always the first ones (default: the task's own)", int, 1)

    flag = parser.flags_titled("how long, how often")
    flag("num_train_epochs", 1.0, "passes over the training examples", least=0)
    flag("max_steps", None, "optimizer steps; overrides --num_train_epochs", int, 1)
    flag("eval_steps", 100, "evaluate every so many steps, and before and after; 0: only then", least=0)
    flag("save_steps", 100, "checkpoint every so many steps, and at the end; 0: only then", least=0)
    flag("save_total_limit", 2, "keep the newest so many checkpoints, and the best", least=1)
    flag("max_minutes", None, "stop with a checkpoint after so many minutes", float, 0)
    flag("log_completions_steps", 10, "keep completions for reading every so many steps; 0: only once", least=0)
    flag("log_completions_groups", 2, "groups kept each time", least=1)

    flag = parser.flags_titled("sampling")
    flag("prompts_per_step", 8, "Q: prompts in an optimizer step", least=1)
    flag("num_generations", 16, "G: completions of each prompt, compared with each other", least=2)
    flag("max_prompt_length", 512, "tokens, pictures included; longer prompts are left out and counted", least=1)
    flag("max_completion_length", 786, "tokens at which a completion is cut off", least=1)
    flag("temperature", 1.0, "of sampling, and of the log-probabilities that are trained")
    flag("eval_batch_size", 64, "prompts evaluated at once", least=1)
    flag("eval_samples", 1, "also sample so many answers to each test question: pass@k, majority@k", least=1)

    flag = parser.flags_titled("objective: a preset, and its choices, each with the preset's default")
    flag("objective", "grpo", ", ".join(OBJECTIVES))
    scales = ("group", "batch", "none")
    flag(
        "scale_rewards", None, "advantages are divided by the std of the group, the batch, or not", str, choices=scales
    )
    levels = ("token", "sequence")
    flag("importance_sampling_level", None, "is the ratio a token's or a sequence's", str, choices=levels)
    flag("clip", None, "clip the ratio (PPO), or a weight on log π (CISPO)", str, choices=("ratio", "weight"))
    flag("epsilon", None, "the ratio is clipped below 1 − ε and above 1 + ε", float, 0)
    flag("epsilon_high", None, "another ε above", float, 0)
    flag("beta", None, "β: weight of the KL penalty; with 0 no reference model is loaded", float, 0)
    kinds = ("completions", "tokens", "max_length")
    what = "the sum over tokens is divided by: each completion's length and their number, all tokens, the most allowed"
    flag("normalizer", None, what, str, choices=kinds)
    flag("dynamic_sampling", None, "replace groups whose rewards are all equal: 1 or 0", int, 0)
    flag("overlong_buffer", None, "share of the length over which a soft penalty grows to −1; 0: none", float, 0)
    flag("kl_estimator", "k3", "of the KL divergence from the reference", choices=("k1", "k2", "k3"))
    flag("num_iterations", 1, "μ: updates from the same completions", least=1)
    flag("max_resamples", 3, "rounds of further prompts with dynamic sampling", least=1)
    flag("mask_truncated_completions", False, "leave completions that were cut off out of the loss")
    flag("importance_sampling_correction", False, "weigh tokens by the trainer's over the sampler's probability")
    flag("correction_cap", 2.0, "at which those weights are cut off", least=1)
    flag("sync_ref_model", False, "let the reference follow the model")
    flag("ref_model_sync_steps", 512, "how often", least=1)
    flag("ref_model_mixup_alpha", 0.6, "how far: reference = α·model + (1 − α)·reference", least=0)
    flag("shuffle_rewards", False, "a control that must not learn: deal the rewards out at random")

    flag = parser.flags_titled("optimizer: AdamW")
    flag("learning_rate", 1e-6, "after warm-up", least=0)
    schedules = ("constant", "linear", "cosine")
    flag("lr_scheduler_type", "constant", "of the learning rate after warm-up", choices=schedules)
    flag("warmup_ratio", 0.05, "share of the steps over which the learning rate grows from 0", least=0)
    flag("weight_decay", 0.0, "decoupled weight decay", least=0)
    flag("adam_beta1", 0.9, "decay of the mean of gradients", least=0)
    flag("adam_beta2", 0.99, "decay of the mean of their squares", least=0)
    flag("max_grad_norm", 1.0, "clip the gradient to this norm; 0: do not", least=0)
    flag("max_skipped_steps", 5, "stop after so many steps in a row whose gradient is not finite", least=1)

    flag = parser.flags_titled("machine")
    flag(
        "micro_batch_tokens", 8192, "tokens computed at once in the loss: fewer take less memory, same result", least=1
    )
    flag("gradient_checkpointing", False, "recompute activations: less memory, slower")
    dtypes = ("auto", "float32", "bfloat16")
    flag("dtype", "auto", "of the weights that compute; auto: bfloat16 on CUDA, else float32", choices=dtypes)
    attentions = ("auto", "sdpa", "eager", "flash_attention_2")
    flag(
        "attn_implementation", "auto", "auto: flash-attn where installed on CUDA, else torch's own", choices=attentions
    )
    flag("device", None, "cuda, mps or cpu (default: the first that is there)", str)
    flag("seed", 0, "of the order of the data and of sampling", least=0)

    flag = parser.flags_titled("runs")
    where = "go on with the run in --output_dir, from its newest checkpoint or the one named"
    flag("resume", None, where, str, nargs="?", const="newest", metavar="CHECKPOINT")
    flag("overwrite_output_dir", False, "remove the run that is in --output_dir")
    flag("eval_only", False, "evaluate --model_path, or with --resume a checkpoint, and stop")
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    """The flags, with everything that can be derived from them alone. Refuses in one line, with exit status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    args, _ = parser.parse_known_args([text for text in argv if text not in ("-h", "--help")])
    if args.model_path == "tiny":  # the task's own defaults; flags that are given still win
        from tiny_models import TINY_DEFAULTS

        parser.set_defaults(**TINY_DEFAULTS.get(args.dataset_name, {}))
    args = parser.parse_args(argv)
    args.command, args.go_on = shlex.join(["python", "main.py", *argv]), command_to_go_on(argv)
    check_flags(parser, args)
    args.output_dir = args.output_dir or f"runs/{args.dataset_name}-{Path(args.model_path).name}"
    chosen = {field.name: getattr(args, field.name) for field in dataclasses.fields(Objective)}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    args.choices = dataclasses.replace(OBJECTIVES[args.objective], **chosen)
    return args


def command_to_go_on(argv: list[str]) -> str:
    """The command that resumes the run that was started, or resumed, with these arguments."""
    once = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    once.add_argument("--resume", nargs="?")
    once.add_argument("--overwrite_output_dir", action="store_true")
    return shlex.join(["python", "main.py", *once.parse_known_args(argv)[1], "--resume"])


def check_flags(parser: Parser, args) -> None:
    from rldatasets import DATASETS, dataset_options

    if args.dataset_name not in DATASETS:
        parser.error(f"there is no task {args.dataset_name!r}; {nearest(args.dataset_name, DATASETS)}")
    if args.objective not in OBJECTIVES:
        parser.error(f"there is no objective {args.objective!r}; {nearest(args.objective, OBJECTIVES)}")
    defaults = parser.get_default("dataset_options") or {}  # a tiny model's picture size stays unless another is given
    given = {} if isinstance(args.dataset_options, dict) else args.dataset_options or []
    args.dataset_options = dict(defaults)
    for text in given:
        key, _, value = text.partition("=")
        if not (key and value):
            parser.error(f"--dataset_options takes KEY=VALUE, not {text!r}")
        args.dataset_options[key] = value
    known = dataset_options(args.dataset_name)
    for option in args.dataset_options:
        if option not in known:
            hint = nearest(option, known) if known else "it has none"
            parser.error(f"the task {args.dataset_name!r} has no option {option!r}; {hint}")
    if not 0 < args.temperature < math.inf:
        parser.error(
            f"--temperature must be above 0, not {args.temperature}: groups of equal completions teach nothing"
        )
    if args.overwrite_output_dir and args.resume:
        parser.error("--resume goes on with a run and --overwrite_output_dir removes it: give one of them")


# ---------------------------------------------------------------------------------------------------------------------
# Setting up


def run(args) -> int:
    """Refuse what cannot work before anything is written; train; say what changed. Returns the exit status."""
    from evaluator import get_evaluator
    from rldatasets import get_dataloaders
    from run_folder import RunFolder, hardware_and_versions

    folder = RunFolder(args.output_dir)
    if not args.resume:
        folder.check_new(args.overwrite_output_dir)
    evaluator = get_evaluator(args.dataset_name)
    checkpoint = folder.open_resume(None if args.resume == "newest" else args.resume) if args.resume else None
    if args.resume and checkpoint is None:
        check_none_is_lost(folder)
        print(f"the run in {folder.path} stopped before its first checkpoint: it starts again from step 0")

    from llms import load_llm

    model_path = args.model_path
    if model_path == "tiny":
        from tiny_models import tiny_model

        model_path = tiny_model(args.dataset_name, args.dataset_path, args.dataset_options)
    llm = load_llm(checkpoint or model_path, args.device, args.dtype, args.attn_implementation)
    check_model(args, llm)
    loader, eval_dataset = get_dataloaders(
        args.dataset_name,
        args.prompts_per_step,
        args.train_size,
        args.eval_size,
        args.seed,
        args.dataset_path,
        args.dataset_options,
        keep=lambda example: prompt_length(llm, example) <= args.max_prompt_length,
    )
    if all(prompt_length(llm, example) > args.max_prompt_length for example in eval_dataset):
        raise ValueError(f"all test prompts are longer than --max_prompt_length {args.max_prompt_length}: raise it")
    steps = math.ceil(args.num_train_epochs * loader.steps_per_epoch) * args.num_iterations
    args.max_steps = args.total_steps = args.max_steps or max(1, steps)
    config = describe_run(args, llm, evaluator, hardware_and_versions(str(llm.device)))
    resumed = folder.load_trainer_state(checkpoint) if checkpoint else None
    if args.resume:
        began = folder.read_config()
        check_same_flags(began, config)
        args.total_steps = began["resolved"]["total_steps"]  # the schedule goes on as it began
        config["resolved"]["total_steps"] = args.total_steps
    else:
        folder.open_new(args.overwrite_output_dir, checkpoint_bytes(llm), config)
    with folder:
        say_hello(args, llm, loader, eval_dataset, folder)
        if args.eval_only:
            return evaluate_only(args, llm, eval_dataset, evaluator, folder)
        if args.resume:
            folder.truncate_after(resumed["state"]["step"] if resumed else -1)
            folder.write_config(config)
        reference = None
        if args.choices.beta:
            reference = load_llm(model_path, args.device, args.dtype, args.attn_implementation).model
            reference.requires_grad_(False)
        outcome = train(args, llm, reference, loader, eval_dataset, evaluator, folder, resumed)
    if outcome["step"] < args.max_steps:
        print(f"stopped at step {outcome['step']} of {args.max_steps}; go on with:  {args.go_on}")
        return 128 + outcome["signal"] if outcome["signal"] else 0
    print(closing_words(args, evaluator, outcome, folder))
    return 0


def check_model(args, llm) -> None:
    from llms import ModelError
    from rldatasets import DATASETS

    if DATASETS[args.dataset_name].modality == "vision" and not llm.is_vision:
        raise ModelError(
            f"the task {args.dataset_name!r} shows pictures and {args.model_path} reads text only: choose a "
            "vision-language model such as Qwen/Qwen2.5-VL-3B-Instruct, or --model_path tiny"
        )
    if args.max_prompt_length + args.max_completion_length > llm.max_context:
        raise ModelError(
            f"{args.model_path} can read {llm.max_context} tokens, fewer than --max_prompt_length "
            f"{args.max_prompt_length} + --max_completion_length {args.max_completion_length}: lower one of them"
        )


def evaluate_only(args, llm, eval_dataset, evaluator, folder) -> int:
    """Print the metrics; into a new folder they are written too, while a run that goes on stays as it is."""
    metrics, groups = evaluate(llm, eval_dataset, evaluator, args)
    if not args.resume:
        folder.log_eval(0, metrics, groups)
    for name, value in metrics.items():
        print(f"{name:32} {value:.6g}")
    return 0


def describe_run(args, llm, evaluator, machine: dict) -> dict:
    """config.json: what was asked for, what became of it, on what."""
    return {
        "command": args.command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "flags": {
            name: value
            for name, value in vars(args).items()
            if name not in ("choices", "command", "go_on", "total_steps")
        },
        "resolved": {
            **dataclasses.asdict(args.choices),
            "total_steps": args.total_steps,
            "device": str(llm.device),
            "dtype": str(llm.dtype).removeprefix("torch."),
            "attn_implementation": llm.attn_implementation,
            "parameters": count_parameters(llm),
        },
        **machine,
        "task": {
            "name": args.dataset_name,
            "modality": "vision" if llm.is_vision else "text",
            "reward_names": list(evaluator.reward_names),
            "headline": dataclasses.asdict(evaluator.headline),
            "best_constant": evaluator.best_constant,
        },
    }


MAY_CHANGE = "max_steps eval_steps save_steps save_total_limit max_minutes log_completions_steps log_completions_groups"
MAY_CHANGE += " resume overwrite_output_dir output_dir eval_only"


def check_none_is_lost(folder) -> None:
    """A run without checkpoints starts again, unless it must have had some: then its log is worth more than that."""
    from run_folder import read_records

    flags, logged = folder.read_config()["flags"], len(read_records(folder.log_path))
    latest = flags["save_steps"] + flags["num_iterations"] + flags["max_skipped_steps"]  # by then there was one
    if flags["save_steps"] and logged >= latest:
        raise ValueError(
            f"{folder.path} has logged {logged} steps and its checkpoints are gone: bring them back, or begin anew "
            "with --overwrite_output_dir"
        )


def check_same_flags(began: dict, now: dict) -> None:
    """A run goes on as it began; a flag that would change what is computed is refused by name."""
    for name, value in now["flags"].items():
        before = began["flags"].get(name)
        if name not in MAY_CHANGE.split() and before != value:
            raise ValueError(f"--{name} was {before} when the run began and is {value} now: resume with the same flags")


def count_parameters(llm) -> int:
    return sum(parameter.numel() for parameter in llm.model.parameters())


def checkpoint_bytes(llm) -> int:
    """Disk space for one checkpoint: the weights, AdamW's two moments, and fp32 masters where there are some."""
    size = llm.dtype.itemsize
    return 16 * 2**20 + count_parameters(llm) * (size + 8 + (4 if size == 2 else 0))


def say_hello(args, llm, loader, eval_dataset, folder) -> None:
    parameters, choices = count_parameters(llm), args.choices
    size = f"{parameters / 1e9:.2f} B" if parameters > 1e9 else f"{parameters / 1e6:.2f} M"
    high = choices.epsilon if choices.epsilon_high is None else choices.epsilon_high
    print(
        f"{args.model_path}: {size} parameters, {'vision and text' if llm.is_vision else 'text'}, "
        f"{str(llm.dtype).removeprefix('torch.')} on {llm.device}, attention: {llm.attn_implementation}\n"
        f"{args.dataset_name}: {len(loader.dataset):,} training and {len(eval_dataset):,} test examples; "
        f"{args.prompts_per_step} prompts × {args.num_generations} completions a step, {args.max_steps} steps\n"
        f"objective {args.objective}: advantages scaled by {choices.scale_rewards}, ratio of a "
        f"{choices.importance_sampling_level}, clip {choices.clip} −{choices.epsilon:g} +{high:g}, "
        f"β {choices.beta:g}{' ' + args.kl_estimator if choices.beta else ''}, sum divided by {choices.normalizer}\n"
        f"run folder: {folder.path}",
        flush=True,
    )


def main(argv=None) -> int:
    args = parse_args(argv)
    import torch

    from evaluator import RewardError

    try:
        return run(args)
    except torch.OutOfMemoryError as error:
        message = (
            f"the GPU is out of memory: lower --micro_batch_tokens (now {args.micro_batch_tokens}), add "
            "--gradient_checkpointing, or lower --num_generations, --prompts_per_step or --max_completion_length "
            f"({str(error).splitlines()[0]})"
        )
    except (ValueError, OSError, FloatingPointError, RewardError) as error:
        if os.environ.get("GRPO_TRACEBACK"):  # for whoever debugs the code rather than the input
            raise
        message = " ".join(str(error).split())
    except KeyboardInterrupt:  # before or after training, during which StopWatch listens
        print("main.py: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    # It may quote what a model wrote, which must not act upon the terminal.
    print("main.py: " + "".join(c if c.isprintable() else "�" for c in message), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
