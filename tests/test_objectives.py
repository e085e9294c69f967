"""The objectives against the papers: values, gradients, TRL's loss on the same tensors, and whole optimizer steps.

The expected values are computed here a second time, from the formulas in the papers, one completion and one token after
the other in float64 numpy, without any function of main.py.
"""

import dataclasses
import inspect
import itertools
import json
import signal
import types
from collections import defaultdict
from typing import ClassVar

import numpy as np
import pytest
import torch
from plain_reference import PlainRows, compute_in_float64, plain_loss
from small_models import cut, questions, small_config

import main
from config import OBJECTIVES, Objective
from evaluator import EVALUATORS, ExactNumberEvaluator
from logprobs import reference_logps, token_logps
from main import accumulate_gradients, group_advantages, grpo_loss, kl_estimate, loss_divisor, overlong_penalty
from optimizer import MasterAdamW
from rollout import Sampler

LONGEST = 9  # the allowed length; completions below are shorter, so max_length differs from the tensor's width


# --- Random steps, as tensors and as lists of tokens ---


@dataclasses.dataclass
class Step:
    """What `grpo_loss` is computed from: advantages (B,), the rest (B, T)."""

    logps: torch.Tensor
    old_logps: torch.Tensor
    ref_logps: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor

    def rows(self):
        """(advantage, log π, log π_old, log π_ref) of each completion, without the masked tokens."""
        for i, advantage in enumerate(self.advantages.tolist()):
            columns = self.mask[i].nonzero()[:, 0]
            values = (tensor[i, columns].detach().numpy() for tensor in (self.logps, self.old_logps, self.ref_logps))
            yield advantage, *values

    def select(self, rows: list[int]) -> "Step":
        return Step(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def random_step(seed: int, noise: float = 0.4, lengths=(7, 1, 4, 7, 3, 5)) -> Step:
    """Six completions of different lengths, off policy by `noise`; masked tokens have random numbers too."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    logps = -normal(*shape).abs() - 0.1
    old_logps, ref_logps = logps + noise * normal(*shape), logps + 0.5 * normal(*shape)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return Step(logps.requires_grad_(), old_logps, ref_logps, normal(shape[0]), mask)


def loss_of(step: Step, name: str | Objective, old_logps=None, divisor=None, weights=None, **changes):
    """The loss of a preset, or of one with some choices changed. Its settings come from the Objective alone."""
    objective = dataclasses.replace(OBJECTIVES[name] if isinstance(name, str) else name, **changes)
    return grpo_loss(
        step.logps,
        step.old_logps if old_logps is None else old_logps,
        step.ref_logps if objective.beta else None,  # as in the loop
        step.advantages,
        step.mask,
        objective,
        loss_divisor(objective, step.mask, LONGEST) if divisor is None else divisor,
        weights,
    )


# --- The papers ---

KL = {  # of one token; Schulman (2020), with r = π_ref / π
    "k1": lambda logp, ref: -np.log(np.exp(ref) / np.exp(logp)),
    "k2": lambda logp, ref: np.log(np.exp(ref) / np.exp(logp)) ** 2 / 2,
    "k3": lambda logp, ref: np.exp(ref) / np.exp(logp) - np.log(np.exp(ref) / np.exp(logp)) - 1,
}


def pessimistic(ratio, advantage, low, high):
    return min(ratio * advantage, min(max(ratio, low), high) * advantage)


def deepseekmath_rows(step, low=0.8, high=1.2, beta=0.04, kl="k3"):
    """The terms inside the sums of DeepSeekMath, equation 3: a list of tokens for each completion."""
    return [
        [
            pessimistic(np.exp(p) / np.exp(o), advantage, low, high) - (beta * KL[kl](p, r) if beta else 0)
            for p, o, r in zip(logps, old, ref, strict=True)
        ]
        for advantage, logps, old, ref in step.rows()
    ]


def grpo(step):
    """DeepSeekMath, equation 3: (1/G) Σ_i (1/|o_i|) Σ_t."""
    return -np.mean([sum(row) / len(row) for row in deepseekmath_rows(step)])


def bnpo(step):
    """The same terms, with equal weight for each token of the step."""
    rows = deepseekmath_rows(step)
    return -sum(map(sum, rows)) / sum(map(len, rows))


def dr_grpo(step):
    """Dr. GRPO, arXiv 2503.20783, section 3.2: no 1/|o_i|, a constant in its place; no KL."""
    return -sum(map(sum, deepseekmath_rows(step, beta=0))) / (len(step.advantages) * LONGEST)


def dapo(step):
    """DAPO, equation 8: (1/Σ|o_i|) Σ_i Σ_t with 1 − 0.2 and 1 + 0.28. The paper sums over one prompt's group; here the
    sums are over the whole step, so that tokens of all groups have equal weight."""
    rows = deepseekmath_rows(step, high=1.28, beta=0)
    return -sum(map(sum, rows)) / sum(map(len, rows))


def gspo(step):
    """GSPO, equations 5 and 7, with the clipping of its section 5.1: s_i = (π(y_i)/π_old(y_i))^(1/|y_i|)."""
    terms = []
    for advantage, logps, old, _ in step.rows():
        s = (np.exp(logps.sum()) / np.exp(old.sum())) ** (1 / len(logps))
        terms.append(pessimistic(s, advantage, 1 - 3e-4, 1 + 4e-4))
    return -np.mean(terms)


def cispo(step):
    """MiniMax-M1, equations 4 and 5: (1/Σ|o_i|) Σ_i Σ_t sg(min(r, 1 + ε_high)) A log π."""
    rows = [
        [min(np.exp(p) / np.exp(o), 1.28) * advantage * p for p, o in zip(logps, old, strict=True)]
        for advantage, logps, old, _ in step.rows()
    ]
    return -sum(map(sum, rows)) / sum(map(len, rows))


PAPERS = {"grpo": grpo, "bnpo": bnpo, "dr_grpo": dr_grpo, "dapo": dapo, "gspo": gspo, "cispo": cispo}
NOISE = {"gspo": 1e-3}  # so that some ratios are clipped and some are not


def test_every_preset_has_its_paper():
    assert set(PAPERS) == set(OBJECTIVES)
    assert all(OBJECTIVES[name].name == name for name in OBJECTIVES)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", PAPERS)
def test_loss_equals_the_papers_formula(name, seed):
    step = random_step(seed, NOISE.get(name, 0.4))
    loss, stats = loss_of(step, name)
    assert loss.item() == pytest.approx(PAPERS[name](step), rel=1e-12)
    assert 0 < stats["clip_fraction"] < 1  # some tokens are clipped and some are not


PUBLISHED = {  # lower bound, upper bound, β; CISPO has no lower bound
    "grpo": (1 - 0.2, 1 + 0.2, 0.04),
    "bnpo": (1 - 0.2, 1 + 0.2, 0.04),
    "dr_grpo": (1 - 0.2, 1 + 0.2, 0),
    "dapo": (1 - 0.2, 1 + 0.28, 0),
    "gspo": (1 - 3e-4, 1 + 4e-4, 0),
    "cispo": (0, 1 + 0.28, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bounds_and_beta_come_from_the_preset(name):
    """`grpo_loss(objective="dapo")` once clipped at 1.2: callers had to repeat ε, ε_high and β of the preset. Here one
    completion of one token, log π = −1, with π_ref/π = e, so that k3 is e − 2."""
    low, high, beta = PUBLISHED[name]

    def loss(ratio, advantage):
        logps, advantages = torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
        old, ref, mask = logps - np.log(ratio), logps + 1, torch.ones(1, 1, dtype=torch.bool)
        return grpo_loss(logps, old, ref, advantages, mask, OBJECTIVES[name], 1.0)[0].item()

    factor = -1 if name == "cispo" else 1  # CISPO multiplies the clipped ratio by log π
    penalty = beta * (np.e - 2)
    assert loss(2.0, 1.0) == pytest.approx(-high * factor + penalty, rel=1e-12)
    assert loss(0.1, -1.0) == pytest.approx(max(0.1, low) * factor + penalty, rel=1e-12)


CHOICES = list(itertools.product(("token", "sequence"), ("ratio", "weight"), ("completions", "tokens", "max_length")))


@pytest.mark.parametrize(("level", "clip", "normalizer"), CHOICES)
@pytest.mark.parametrize("estimator", KL)
def test_all_combinations_of_choices(level, clip, normalizer, estimator):
    """Every combination of the choices, with a KL penalty: the presets are only some of them."""
    step = random_step(7)
    choices = {"importance_sampling_level": level, "clip": clip, "normalizer": normalizer, "kl_estimator": estimator}
    objective = Objective(epsilon=0.1, epsilon_high=0.5, beta=0.3, **choices)
    total, clipped, kls, ratios = 0.0, [], [], []
    for advantage, logps, old, ref in step.rows():
        for t in range(len(logps)):
            distance = logps - old if level == "sequence" else (logps - old)[t]
            ratio = np.exp(np.mean(distance))
            if clip == "weight":
                gain = min(ratio, 1.5) * advantage * logps[t]
                clipped.append(ratio > 1.5)
            else:
                gain = pessimistic(ratio, advantage, 0.9, 1.5)
                clipped.append(gain < ratio * advantage)
            kls.append(KL[estimator](logps[t], ref[t]))
            ratios.append(ratio)
            share = len(logps) if normalizer == "completions" else 1
            total += (-gain + 0.3 * kls[-1]) / share
    total /= {"completions": 6, "tokens": 27, "max_length": 6 * LONGEST}[normalizer]
    loss, stats = loss_of(step, objective)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert stats["clip_fraction"].item() == pytest.approx(np.mean(clipped))
    assert stats["kl"].item() == pytest.approx(np.mean(kls))
    assert stats["ratio"].item() == pytest.approx(np.mean(ratios))


# --- Worked by hand ---


def hand_step() -> Step:
    """Two completions, A = +1 with ratios 1.5 and 0.9, A = −1 with ratio 0.5; π_ref/π is 2, 1 and 0.5."""
    logps = torch.tensor([[-1.0, -2.0], [-3.0, 99.0]], dtype=torch.float64)
    ratio = torch.tensor([[1.5, 0.9], [0.5, 7.0]], dtype=torch.float64)
    reference = torch.tensor([[2.0, 1.0], [0.5, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    return Step(
        logps.requires_grad_(), logps.detach() - ratio.log(), logps.detach() + reference.log(), advantages, mask
    )


BY_HAND = {
    # min(1.5, 1.2) = 1.2 and 0.9, mean 1.05; min(−0.5, −0.8) = −0.8; −(1.05 − 0.8)/2 = −0.125
    # KL of k3: 2 − ln 2 − 1 = 0.306853, 0, and 0.5 + ln 2 − 1 = 0.193147; 0.04 · (0.306853/2 + 0.193147)/2 = 0.006931
    "grpo": -0.125 + 0.006931,
    # −(1.2 + 0.9 − 0.8)/3 = −0.433333; KL 0.04 · 0.5/3 = 0.006667
    "bnpo": -0.433333 + 0.006667,
    # −(1.2 + 0.9 − 0.8) / (2 completions · 9) = −0.072222
    "dr_grpo": -0.072222,
    # min(1.5, 1.28) = 1.28: −(1.28 + 0.9 − 0.8)/3 = −0.46
    "dapo": -0.46,
    # s = √(1.5 · 0.9) = 1.1619 → 1.0004; s = 0.5: min(−0.5, −0.9997) = −0.9997; −(1.0004 − 0.9997)/2 = −0.00035
    "gspo": -0.00035,
    # weights 1.28, 0.9, 0.5 on A log π = −1, −2, 3: −(−1.28 − 1.8 + 1.5)/3 = 0.526667
    "cispo": 0.526667,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_loss_worked_by_hand(name):
    loss, _ = loss_of(hand_step(), name)
    assert loss.item() == pytest.approx(BY_HAND[name], abs=1e-6)


def test_statistics_worked_by_hand():
    _, stats = loss_of(hand_step(), "grpo")
    assert stats["clip_fraction"].item() == pytest.approx(2 / 3)  # 1.5 with A > 0 and 0.5 with A < 0
    assert stats["ratio"].item() == pytest.approx((1.5 + 0.9 + 0.5) / 3)
    assert stats["kl"].item() == pytest.approx(0.5 / 3)


def test_ratios_moving_back_are_not_clipped():
    """Outside the bounds, a ratio that the gradient moves back is not clipped: 1.5 with A < 0, 0.5 with A > 0."""
    step = hand_step()
    step.advantages = -step.advantages
    loss, stats = loss_of(step, "dr_grpo")
    assert stats["clip_fraction"] == 0
    assert loss.item() == pytest.approx(-(-1.5 - 0.9 + 0.5) / 18)


def test_kl_estimators_worked_by_hand():
    logps, ref_logps = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([2.0, 1.0, 0.5]).log()
    expected = {"k1": [-0.693147, 0, 0.693147], "k2": [0.240227, 0, 0.240227], "k3": [0.306853, 0, 0.193147]}
    for estimator, values in expected.items():
        assert kl_estimate(logps, ref_logps, estimator).tolist() == pytest.approx(values, abs=1e-6)
    with pytest.raises(ValueError, match="choose k1, k2 or k3"):
        kl_estimate(logps, ref_logps, "k4")


def test_kl_estimators_estimate_the_kl():
    """Over all tokens of a vocabulary, weighted by π: k1 and k3 are Σ π log(π/π_ref) exactly, k2 nearly."""
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(0)
    ref_logps = (logps + 0.1 * torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(0)
    exact = (logps.exp() * (logps - ref_logps)).sum().item()
    mean = {name: (logps.exp() * kl_estimate(logps, ref_logps, name)).sum().item() for name in ("k1", "k2", "k3")}
    assert mean["k1"] == pytest.approx(exact, rel=1e-9)
    assert mean["k3"] == pytest.approx(exact, rel=1e-9)
    assert mean["k2"] == pytest.approx(exact, rel=0.1)
    assert mean["k2"] != pytest.approx(exact, rel=1e-6)


def test_advantages_worked_by_hand():
    # mean 0.5, std √(4 · 0.25 / 3) = 0.577350, 0.5 / 0.577450 = 0.865876
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    a = 0.865876
    assert group_advantages(rewards, 4).tolist() == pytest.approx([a, -a, -a, a], abs=1e-6)
    # two groups of two: means 0.5 and 3, stds 0.707107 and 2.828427
    rewards = torch.tensor([1.0, 0.0, 1.0, 5.0])
    assert group_advantages(rewards, 2).tolist() == pytest.approx([0.707007, -0.707007, -0.707082, 0.707082], abs=1e-6)
    assert group_advantages(rewards, 2, "none").tolist() == [0.5, -0.5, -2.0, 2.0]
    # of all four: mean 1.75, squares 0.5625 + 3.0625 + 0.5625 + 10.5625 = 14.75, std √(14.75/3) = 2.217356
    expected = [0.225484, -0.225484, -0.901935, 0.901935]
    assert group_advantages(rewards, 2, "batch").tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="choose group, batch or none"):
        group_advantages(rewards, 2, "rank")


@pytest.mark.parametrize("group_size", [2, 3, 8])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_the_papers_formula(scale, group_size):
    """DeepSeekMath, section 4.1.2; the 1e-4 is not in the paper, but in every implementation."""
    rewards = np.random.default_rng(group_size).normal(size=5 * group_size)
    expected = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        for reward in group:
            scales = {"group": np.std(group, ddof=1) + 1e-4, "batch": np.std(rewards, ddof=1) + 1e-4, "none": 1}
            expected.append((reward - np.mean(group)) / scales[scale])
    assert group_advantages(torch.tensor(rewards), group_size, scale).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_advantage_zero(scale):
    """0.1 is no binary fraction: in float32 the mean of seven of them is a different number. Their difference, divided
    by a standard deviation of almost 0, would be a gradient of rounding errors."""
    group = torch.full((7,), 0.1)
    assert (group - group.mean()).abs().max() > 0
    rewards = torch.cat([group, torch.arange(7.0)])
    advantages = group_advantages(rewards, 7, scale)
    assert advantages[:7].tolist() == [0.0] * 7
    assert advantages[7:].abs().min() == 0 and advantages[7:].abs().max() > 0.5


def penalties(lengths, most: int) -> list[float]:
    config = small_config(f"--max_completion_length {most} --overlong_buffer 0.2")
    return overlong_penalty(torch.tensor(lengths), config).tolist()


def test_overlong_penalty_worked_by_hand():
    lengths = [1, 15, 16, 17, 18, 20]  # at most 20; the penalty grows over the last 4 tokens
    assert penalties(lengths, 20) == pytest.approx([0, 0, 0, -0.25, -0.5, -1])
    assert overlong_penalty(torch.tensor(lengths), small_config("--max_completion_length 20")).tolist() == [0] * 6


def test_overlong_penalty_equals_dapos_formula():
    """DAPO, equation 13, with L_max the allowed length and L_cache a fifth of it."""
    for most in (100, 256, 1000):
        cache = 0.2 * most
        lengths = np.arange(1, most + 1)
        expected = [0 if n <= most - cache else ((most - cache) - n) / cache for n in lengths]
        assert penalties(lengths, most) == pytest.approx(expected, abs=1e-6)


def test_divisors_worked_by_hand():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert loss_divisor(Objective(normalizer="completions"), mask, 8) == 2
    assert loss_divisor(Objective(normalizer="tokens"), mask, 8) == 3
    assert loss_divisor(Objective(normalizer="max_length"), mask, 8) == 16
    assert loss_divisor(Objective(normalizer="tokens"), mask & False, 8) == 1  # all completions were cut off and masked


def test_masked_completions_count_in_the_divisor():
    """--mask_truncated_completions removes tokens from the sum; the divisor `completions` stays the same."""
    step = random_step(3)
    step.mask[2] = False
    rows = [row for row in step.rows() if len(row[1])]
    assert len(rows) == 5
    terms = deepseekmath_rows(step)
    expected = -sum(sum(row) / len(row) for row in terms if row) / 6
    assert loss_of(step, "grpo")[0].item() == pytest.approx(expected, rel=1e-12)
    for name in OBJECTIVES:
        loss, _ = loss_of(step, name)
        (gradient,) = torch.autograd.grad(loss, step.logps)
        assert gradient.isfinite().all() and not gradient[2].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_scale_only_the_policy_term(name):
    step = random_step(4, NOISE.get(name, 0.4))
    weights = torch.rand(step.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    weighted, _ = loss_of(step, name, beta=0.1, weights=weights)
    kl_alone, _ = loss_of(dataclasses.replace(step, advantages=step.advantages * 0), name, beta=0.1)
    one_by_one = 0.0
    for i, t in step.mask.nonzero().tolist():  # the loss without KL is linear in the weights
        only = torch.zeros_like(weights)
        only[i, t] = 1
        one_by_one += weights[i, t] * loss_of(step, name, beta=0.0, weights=only)[0]
    assert weighted.item() == pytest.approx((kl_alone + one_by_one).item(), rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("micro_batches", [[[0, 1, 2, 3, 4, 5]], [[5, 0], [1, 2, 3, 4]], [[3], [0, 1], [2], [4], [5]]])
def test_losses_of_micro_batches_add_up(name, micro_batches):
    """Divided by the divisor of the whole step, the losses of its micro-batches add up to the step's loss."""
    step = random_step(5, NOISE.get(name, 0.4))
    whole, _ = loss_of(step, name)
    divisor = loss_divisor(OBJECTIVES[name], step.mask, LONGEST)
    total = sum(loss_of(step.select(rows), name, divisor=divisor)[0].item() for rows in micro_batches)
    assert total == pytest.approx(whole.item(), rel=1e-12)


# --- Gradients ---


@pytest.mark.parametrize("estimator", KL)
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if OBJECTIVES[name].clip == "ratio"])
def test_loss_gradient_by_finite_differences(name, estimator):
    step = random_step(6, NOISE.get(name, 0.4), lengths=(3, 1, 2))

    def loss(logps):
        return loss_of(dataclasses.replace(step, logps=logps), name, beta=0.1, kl_estimator=estimator)[0]

    assert torch.autograd.gradcheck(loss, step.logps, eps=1e-7, atol=1e-6)


def test_gradient_of_a_clipped_weight():
    """CISPO: the weight has no gradient, and a token with a clipped weight keeps its gradient, −min(r, c) A / N."""
    step = random_step(6)
    loss, stats = loss_of(step, "cispo", beta=0.1)
    (gradient,) = torch.autograd.grad(loss, step.logps)
    assert stats["clip_fraction"] > 0
    for i, row in enumerate(step.rows()):
        advantage, logps, old, ref = row
        policy = -np.minimum(np.exp(logps - old), 1.28) * advantage
        expected = (policy + 0.1 * (1 - np.exp(ref - logps))) / 27  # d k3 / d log π = 1 − π_ref/π
        assert gradient[i, : len(logps)].tolist() == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_on_policy_is_the_policy_gradient(name):
    """With π_old = π every objective is REINFORCE with its advantages: the ratio is 1, d loss / d log π = −A / divisor.
    Without detaching π_old the gradient would be 0."""
    step = random_step(8)
    loss, stats = loss_of(step, name, beta=0.0, old_logps=step.logps.detach())
    (gradient,) = torch.autograd.grad(loss, step.logps)
    assert stats["ratio"] == 1 and stats["clip_fraction"] == 0
    lengths = step.mask.sum(1, keepdim=True)
    divisor = {"completions": 6 * lengths, "tokens": torch.tensor(27), "max_length": torch.tensor(6 * LONGEST)}
    expected = -step.advantages[:, None] / divisor[OBJECTIVES[name].normalizer] * step.mask
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_zero_loss_on_policy_has_a_gradient():
    """Looks like a bug and is none: a group's advantages add up to 0, so the loss is 0 while all ratios are 1."""
    step = random_step(9, lengths=(5, 5, 5, 5, 5, 5))
    step.advantages = group_advantages(torch.arange(6.0, dtype=torch.float64), 6)
    loss, _ = loss_of(step, "grpo", beta=0.0, old_logps=step.logps.detach())
    (gradient,) = torch.autograd.grad(loss, step.logps)
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert gradient.abs().max() > 0.01


# --- TRL, which takes seconds to import ---


@pytest.fixture(scope="session")
def trl_trainer():
    return pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer


def trl_loss(trainer, step: Step, loss_type: str, parts=1, on_policy=False, tokens=None, weights=None, **settings):
    """TRL's loss of a step's rows (or of one of `parts` micro-batches), and the metrics it logs: the method of its
    trainer, called on an object with the attributes that it reads."""
    alone = types.SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )
    me = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (step.logps, torch.zeros_like(step.logps), None),
        accelerator=alone,
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=parts),
        model=types.SimpleNamespace(training=True),
        current_gradient_accumulation_steps=parts,
        max_completion_length=LONGEST,
        loss_type=loss_type,
        importance_sampling_level=settings.get("level", "token"),
        epsilon_low=settings.get("low", 0.2),
        epsilon_high=settings.get("high", 0.2),
        beta=settings.get("beta", 0.0),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    ids, mask = torch.zeros_like(step.mask, dtype=torch.long), step.mask.to(step.logps.dtype)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask}
    inputs |= {
        "advantages": step.advantages,
        "ref_per_token_logps": step.ref_logps,
        "importance_sampling_ratio": weights,
    }
    inputs |= {"num_items_in_batch": step.mask.sum() if tokens is None else tokens}
    if not on_policy:
        inputs["old_per_token_logps"] = step.old_logps
    return trainer._compute_loss(me, None, inputs), {name: values[0] for name, values in me._metrics["train"].items()}


# Each preset in TRL's settings. TRL's ε_high of cispo is the upper bound, ours is the bound − 1 as in all presets.
IN_TRL = {
    "grpo": {"loss_type": "grpo", "beta": 0.04},
    "bnpo": {"loss_type": "bnpo", "beta": 0.04},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "high": 0.28},
    "gspo": {"loss_type": "grpo", "level": "sequence", "low": 3e-4, "high": 4e-4},
    "cispo": {"loss_type": "cispo", "high": 1.28},
}


def assert_same_loss_and_gradient(step: Step, ours, theirs):
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    gradients = (torch.autograd.grad(loss, step.logps)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", IN_TRL)
def test_loss_and_gradient_equal_trls(trl_trainer, name, on_policy, seed):
    step = random_step(seed, NOISE.get(name, 0.4))
    old_logps = step.logps.detach() if on_policy else step.old_logps
    ours, stats = loss_of(step, name, old_logps=old_logps)
    theirs, logged = trl_loss(trl_trainer, step, on_policy=on_policy, **IN_TRL[name])
    assert_same_loss_and_gradient(step, ours, theirs)
    if OBJECTIVES[name].beta:
        assert stats["kl"].item() == pytest.approx(logged["kl"])
    if name not in ("gspo", "cispo"):
        assert stats["clip_fraction"].item() == pytest.approx(logged["clip_ratio/region_mean"])


@pytest.mark.slow
def test_weighted_loss_equals_trls(trl_trainer):
    step = random_step(12)
    weights = torch.rand(step.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    ours, _ = loss_of(step, "grpo", weights=weights)
    theirs, _ = trl_loss(trl_trainer, step, weights=weights, **IN_TRL["grpo"])
    assert_same_loss_and_gradient(step, ours, theirs)


def halves(step: Step) -> list[Step]:
    """Two micro-batches of three rows each, with 12 tokens and 15."""
    return [step.select([0, 1, 2]), step.select([3, 4, 5])]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in IN_TRL if name != "bnpo"])
def test_equal_micro_batches_equal_trls(trl_trainer, name):
    step = random_step(2, NOISE.get(name, 0.4))
    ours, _ = loss_of(step, name)
    theirs = sum(
        trl_loss(trl_trainer, part, parts=2, tokens=step.mask.sum(), **IN_TRL[name])[0] for part in halves(step)
    )
    assert_same_loss_and_gradient(step, ours, theirs)


@pytest.mark.slow
def test_bnpo_of_micro_batches_differs_from_trls(trl_trainer):
    """On purpose: TRL divides each micro-batch by its number of tokens and averages, so that tokens of a micro-batch of
    short completions have more weight. Ours is the mean over the whole step (test_losses_of_micro_batches_add_up).
    """
    step = random_step(13)
    ours, _ = loss_of(step, "bnpo")
    theirs = [trl_loss(trl_trainer, part, parts=2, **IN_TRL["bnpo"])[0].item() for part in halves(step)]
    means = [loss_of(part, "bnpo")[0].item() for part in halves(step)]
    assert sum(theirs) == pytest.approx(np.mean(means), rel=1e-12)
    assert ours.item() == pytest.approx((12 * means[0] + 15 * means[1]) / 27, rel=1e-12)
    assert abs(ours.item() - sum(theirs)) > 1e-3


@pytest.mark.slow
def test_clip_fraction_differs_from_trls(trl_trainer):
    """On purpose. For cispo TRL counts only clipped tokens with A > 0, ours all clipped tokens, since the weight is
    clipped for both signs. For gspo TRL averages over sequences, ours over tokens, like every other statistic."""
    step = random_step(14)
    ours, theirs = loss_of(step, "cispo")[1], trl_loss(trl_trainer, step, **IN_TRL["cispo"])[1]
    ratios = [(a, np.exp(p - o)) for a, logps, old, _ in step.rows() for p, o in zip(logps, old, strict=True)]
    assert ours["clip_fraction"].item() == pytest.approx(np.mean([ratio > 1.28 for _, ratio in ratios]))
    assert theirs["cispo_clip_ratio"] == pytest.approx(np.mean([ratio > 1.28 and a > 0 for a, ratio in ratios]))

    step = random_step(0, NOISE["gspo"])
    ours, theirs = loss_of(step, "gspo")[1], trl_loss(trl_trainer, step, **IN_TRL["gspo"])[1]
    ratios = [(a, np.exp(np.mean(logps - old)), len(old)) for a, logps, old, _ in step.rows()]
    clipped = [(s > 1.0004 and a > 0) or (s < 0.9997 and a < 0) for a, s, _ in ratios]
    assert theirs["clip_ratio/region_mean"] == pytest.approx(np.mean(clipped))
    lengths = [length for _, _, length in ratios]
    assert ours["clip_fraction"].item() == pytest.approx(np.average(clipped, weights=lengths))
    assert ours["clip_fraction"].item() != pytest.approx(np.mean(clipped))


# --- Whole optimizer steps ---


@pytest.fixture
def in_float64(monkeypatch):
    compute_in_float64(monkeypatch)


def config_of(name: str, *more: str):
    flags = f"--objective {name} --temperature 0.8 --learning_rate 1e-3 --warmup_ratio 0 --weight_decay 0.1 "
    return small_config(flags, f"--max_completion_length {LONGEST} --max_grad_norm 0.7", *more)


def small_rollout(llm, family, config):
    """Three prompts of different lengths with four completions of different lengths each, and advantages."""
    rollout = Sampler(llm, 1).sample(questions(family), 4, config.max_completion_length, config.temperature)
    assert len(set(rollout.lengths.tolist())) > 3
    rollout.sampler_logps = rollout.sampler_logps.double()  # buffers of its dtype then keep all digits
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return rollout, group_advantages(rewards, 4)


def moved(model, by=0.02):
    """The model after adding noise to its weights."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += by * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return model


CUTS = {  # twelve rows in one micro-batch, in two of different sizes, in five that divide the groups
    1: [list(range(12))],
    2: [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]],
    5: [[11, 2], [0], [3, 4, 5, 6], [1, 10, 9], [7, 8]],
}
UPDATES = 3


def plain_updates(name, model, plain: PlainRows, old, ref, advantages):
    """UPDATES updates of the model by torch's AdamW -> for each its loss, gradient norm and the weights after it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(UPDATES):
        loss = plain_loss(name, plain.logps(model, 0.8), old, ref, advantages, LONGEST)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7).item()
        optimizer.step()
        yield loss.item(), norm, [weight.detach().clone() for weight in model.parameters()]


QUICK = {("qwen2", "grpo"), ("qwen2", "gspo"), ("qwen2", "cispo")}  # the others take as long, and are slow together
FAMILIES_AND_PRESETS = [
    pytest.param(family, name, marks=() if (family, name) in QUICK else pytest.mark.slow)
    for family in ("qwen2", "qwen2_vl")
    for name in OBJECTIVES
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), FAMILIES_AND_PRESETS)
def test_updates_match_a_plain_implementation(load, in_float64, family, name):
    """Three updates from one batch, for every division into micro-batches: the weights after each equal those of an
    implementation with whole padded rows, full logits and torch's AdamW."""
    config = config_of(name)
    llm, reference, model = load(family), moved(load(family).model), load(family).model
    rollout, advantages = small_rollout(llm, family, config)
    plain = PlainRows(llm, rollout, questions(family))
    with torch.no_grad():
        old, ref = plain.logps(model, 0.8), plain.logps(reference, 0.8)
        entropy = plain.entropy(model, 0.8)
    expected = list(plain_updates(name, model, plain, old, ref, advantages))
    for micro_batches in CUTS.values():
        llm, one = load(family), cut(rollout, micro_batches)
        optimizer = MasterAdamW(llm.model, config)
        ref_logps = reference_logps(llm, reference, one, config) if config.objective.beta else None
        old_logps = None
        for update, (plain_loss_value, norm, weights) in enumerate(expected):
            loss, stats, logps = accumulate_gradients(
                config, llm, one, advantages, one.sampled_mask, old_logps, ref_logps
            )
            if update == 0:
                old_logps = logps
                assert stats["entropy"] == pytest.approx(entropy, rel=1e-10)
                assert stats["ratio"] == pytest.approx(1, abs=1e-12) and stats["clip_fraction"] == 0
            else:
                assert stats["clip_fraction"] > 0.1  # so that clipping is compared too
            stats |= optimizer.step(loss)
            assert stats["skipped_steps"] == 0 and stats["learning_rate"] == 1e-3
            assert loss.item() == pytest.approx(plain_loss_value, rel=1e-9, abs=1e-12)
            assert stats["grad_norm"] == pytest.approx(norm, rel=1e-9)
            for weight, value in zip(llm.model.parameters(), weights, strict=True):
                torch.testing.assert_close(weight.detach(), value, rtol=0, atol=1e-10)  # an update moves by 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if OBJECTIVES[name].clip == "ratio"])
@pytest.mark.parametrize("family", ["qwen2", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_step_gradient_by_finite_differences(load, in_float64, family, name):
    """Off policy, with a reference: along a random direction in the space of all weights, the loss changes as the
    gradient says."""
    config = config_of(name)
    llm = load(family)
    rollout, advantages = small_rollout(llm, family, config)
    rollout = cut(rollout, CUTS[2])
    generator = torch.Generator().manual_seed(3)
    ref_logps, old_logps = (
        token_logps(llm, rollout, 0.8).detach()
        + size * torch.randn(rollout.sampler_logps.shape, generator=generator, dtype=torch.float64)
        for size in (0.5, 1e-3 if name == "gspo" else 0.3)
    )

    def loss():
        llm.model.zero_grad()
        mask = rollout.sampled_mask
        return accumulate_gradients(config, llm, rollout, advantages, mask, old_logps, ref_logps)[0].item()

    loss()
    weights = list(llm.model.parameters())
    gradients = [weight.grad.clone() for weight in weights]
    direction = [torch.randn(weight.shape, generator=generator, dtype=torch.float64) for weight in weights]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
    values = []
    for step in (5e-9, -1e-8):
        with torch.no_grad():
            for weight, d in zip(weights, direction, strict=True):
                weight += step * d
        values.append(loss())
    assert abs(slope) > 1e-2
    assert (values[0] - values[1]) / 1e-8 == pytest.approx(slope, rel=1e-5, abs=1e-5)


def test_sampler_correction_uses_the_old_weights(load, in_float64):
    """--importance_sampling_correction: π_old of the trainer over that of the sampler, at most 2, also in the updates
    after the first."""
    config = config_of("bnpo", "--importance_sampling_correction --beta 0")
    llm = load("qwen2")
    rollout, advantages = small_rollout(llm, "qwen2", config)
    mask = rollout.sampled_mask
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rollout.sampler_logps += noise * mask
    updated = moved(load("qwen2").model, 1e-3)
    llm.model.load_state_dict(updated.state_dict())  # the weights after an update; sampled with those before it
    with torch.no_grad():
        old_logps, logps = (token_logps(llm, rollout, 0.8, model=m) for m in (load("qwen2").model, updated))
    weights = (old_logps - rollout.sampler_logps).exp()
    assert (weights[mask] > 2).any() and (weights[mask] < 0.5).any()
    ratio = (logps - old_logps).exp()
    gain = torch.min(ratio * advantages[:, None], ratio.clip(0.8, 1.2) * advantages[:, None])
    expected = -(weights.clip(max=2) * gain)[mask].mean()
    loss, stats, _ = accumulate_gradients(config, llm, cut(rollout, CUTS[5]), advantages, mask, old_logps, None)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert stats["sampler_logp_diff"] == pytest.approx(noise[mask].abs().mean().item(), abs=1e-5)


# --- The loop ---


def letters(text: str) -> float:
    return sum("a" <= letter <= "z" for letter in text) / (len(text) + 1)


class LetterEvaluator(ExactNumberEvaluator):
    """A reward in which random texts differ: the share of small letters."""

    components: ClassVar = {"letters": 1.0}

    def letters(self, completion, gold):
        return letters(completion.text)


class OddAnswersOnly(LetterEvaluator):
    """The same where the right answer is odd; else 0, so that all rewards of the group are equal."""

    def letters(self, completion, gold):
        return letters(completion.text) if int(gold) % 2 else 0.0


@pytest.fixture
def train(model_folder, tmp_path, monkeypatch):
    """-> a function that makes three updates of a random model and returns their records."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of the run would outlive the test

    def run(*more, evaluator=LetterEvaluator, name="run"):
        monkeypatch.setitem(EVALUATORS, "arithmetic", evaluator)
        folder = tmp_path / name
        command = f"--model_path {model_folder('qwen2')} --dataset_name arithmetic --output_dir {folder} --device cpu "
        command += "--max_steps 3 --learning_rate 3e-3 --warmup_ratio 0 --train_size 8 --eval_size 2 "
        command += "--prompts_per_step 2 --num_generations 4 --max_completion_length 8 --max_prompt_length 400"
        assert main.main([*command.split(), *more]) == 0
        return json.loads((folder / "train_logs.json").read_text())

    return run


@pytest.fixture
def updates(monkeypatch):
    """The arguments of each call of `accumulate_gradients`, by name, with the log-probabilities that it returned."""
    calls, accumulate = [], main.accumulate_gradients

    def listen(*args, **more):
        result = accumulate(*args, **more)
        bound = inspect.signature(accumulate).bind(*args, **more)
        calls.append(types.SimpleNamespace(**bound.arguments, logps=result[2]))
        return result

    monkeypatch.setattr(main, "accumulate_gradients", listen)
    return calls


@pytest.fixture
def sampled(monkeypatch):
    """Every rollout of training, in the order in which they were sampled."""
    rollouts, sample = [], Sampler.sample

    def listen(sampler, prompts, num_generations, *rest, **more):
        rollout = sample(sampler, prompts, num_generations, *rest, **more)
        if num_generations > 1 and not more.get("ignore_eos"):  # neither an evaluation nor the trial at load
            rollouts.append(rollout)
        return rollout

    monkeypatch.setattr(Sampler, "sample", listen)
    return rollouts


def test_reference_model_stays_frozen(train):
    """A reference that shares its weights with the policy would follow every update: the KL would always be 0."""
    first, second, third = train("--objective", "grpo", "--beta", "0.04")
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert second["kl"] > 1e-3 and third["kl"] > second["kl"]


def test_old_logps_are_from_before_the_first_update(train, updates):
    """With μ = 3: computed again for each update, the ratio would stay near 1 and never be clipped."""
    records = train("--num_iterations", "3")
    first, second, third = updates
    assert first.old_logps is None and second.old_logps.equal(first.logps) and third.old_logps.equal(first.logps)
    assert not second.logps.equal(first.logps)
    assert records[0]["ratio"] == 1 and all(record["ratio"] != 1 for record in records[1:])


def test_overlong_penalty_counts_in_advantages_only(train, updates):
    """It changes the advantages, and no column that describes the rewards."""
    record, *_ = train("--objective", "grpo", "--overlong_buffer", "0.5", "--scale_rewards", "none")
    rollout = updates[0].rollout
    rewards = torch.tensor([letters(text) for text in rollout.texts])
    penalty = -((rollout.lengths - 4) / 4).clamp(0, 1)  # of at most 8 tokens
    assert penalty.unique().numel() > 1
    torch.testing.assert_close(updates[0].advantages, group_advantages(rewards + penalty, 4, "none"))
    assert record["reward"] == record["rewards/letters"] == pytest.approx(rewards.mean().item())
    assert record["reward_std"] == pytest.approx(rewards.view(2, 4).std(1).mean().item())
    assert record["overlong_penalty"] == pytest.approx(penalty.mean().item())


# Columns of the update: they describe the completions that are trained. Others describe the rollout, or times.
OF_THE_UPDATE = {"loss", "kl", "ratio", "clip_fraction", "entropy", "sampler_logp_diff", "grad_norm"}
OF_THE_MACHINE = {"tokens_per_second", "peak_memory_gb"}


def test_columns_describe_what_was_sampled_first(train, updates, sampled):
    """One record once mixed two populations: the reward and the metrics were those of the first samples, the reward
    components, tokens and lengths those of the groups that replaced equal ones. The seed is the same in both runs, so
    their first samples are the same."""
    flags = ("--objective", "dapo", "--prompts_per_step", "4", "--max_steps", "1")
    (plain,) = train(*flags, "--dynamic_sampling", "0", evaluator=OddAnswersOnly, name="plain")
    updates.clear()
    sampled.clear()
    (record,) = train(*flags, evaluator=OddAnswersOnly, name="replaced")
    described = {name for name in plain if not name.startswith("seconds/")} - OF_THE_UPDATE - OF_THE_MACHINE
    described -= {"epoch"}  # replacing takes further prompts
    assert {"reward", "reward_std", "rewards/letters", "completion_length", "accuracy", "tokens"} < described
    assert {name: record[name] for name in described} == {name: plain[name] for name in described}

    new = {"replaced_fraction", "resampled_tokens", "trained/reward", "trained/completion_length"}
    assert record.keys() - plain.keys() == new
    trained, first, further = updates[0].rollout, sampled[0], sampled[1:]
    assert record["replaced_fraction"] == record["zero_std_fraction"] > 0
    assert record["resampled_tokens"] == sum(int(rollout.lengths.sum()) for rollout in further) > 0
    assert record["tokens"] == int(first.lengths.sum())
    assert record["trained/completion_length"] == pytest.approx(trained.lengths.float().mean().item())
    rewards = torch.tensor([letters(text) for text in trained.texts])  # all trained groups have odd answers
    assert record["trained/reward"] == pytest.approx(rewards.mean().item()) and record["reward"] < rewards.mean()
    assert len(trained.texts) == 16 and updates[0].advantages.view(4, 4).abs().amax(1).min() > 0
    spent = record["tokens"] + record["resampled_tokens"]
    assert record["tokens_per_second"] == pytest.approx(spent / record["seconds/total"])
