"""The objectives against the papers: values, gradients, TRL's loss on the same tensors, and whole optimizer steps.

What is expected is computed here a second time, from the formulas as they are printed, one completion and one token
after the other in float64 numpy; nothing of main.py helps with it.
"""

import dataclasses
import itertools
import json
import signal
import types
from collections import defaultdict

import numpy as np
import pytest
import torch
from plain_reference import PlainRows, compute_in_float64, plain_loss
from small_models import questions

import main
from evaluator import EVALUATORS, ExactNumberEvaluator
from llms import token_logps
from main import OBJECTIVES, Objective, group_advantages, grpo_loss, kl_estimate, soft_overlong_penalty, step_normalizer
from rollout import sample

LONGEST = 9  # the allowed length; no completion below is as long, which tells max_length from the tensor's width


# --- Random steps, and the same as lists of tokens ---


@dataclasses.dataclass
class Step:
    logps: torch.Tensor
    old_logps: torch.Tensor
    ref_logps: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor

    def rows(self):
        """(advantage, log π, log π_old, log π_ref) of each completion, its own tokens only."""
        for i, advantage in enumerate(self.advantages.tolist()):
            columns = self.mask[i].nonzero()[:, 0]
            values = (tensor[i, columns].detach().numpy() for tensor in (self.logps, self.old_logps, self.ref_logps))
            yield advantage, *values


def random_step(seed: int, noise: float = 0.4, lengths=(7, 1, 4, 7, 3, 5)) -> Step:
    """Six ragged completions off policy by `noise`; beyond their ends stand numbers that must not count."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    logps = -normal(*shape).abs() - 0.1
    old_logps, ref_logps = logps + noise * normal(*shape), logps + 0.5 * normal(*shape)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return Step(logps.requires_grad_(), old_logps, ref_logps, normal(shape[0]), mask)


def loss_of(step: Step, name: str, **settings):
    """The loss with everything that a preset sets, as the training loop passes it on."""
    choices = OBJECTIVES[name]
    settings = {"epsilon": choices.epsilon, "epsilon_high": choices.epsilon_high, "beta": choices.beta} | settings
    ref_logps = step.ref_logps if settings["beta"] else None
    old = settings.pop("old_logps", step.old_logps)
    return grpo_loss(
        step.logps,
        old,
        ref_logps,
        step.advantages,
        step.mask,
        objective=name,
        max_completion_length=LONGEST,
        **settings,
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
    """Equation 3 of DeepSeekMath inside its sums: one list of token terms for each completion."""
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
    """The same terms, each token of the step counting alike."""
    rows = deepseekmath_rows(step)
    return -sum(map(sum, rows)) / sum(map(len, rows))


def dr_grpo(step):
    """Dr. GRPO, arXiv 2503.20783, section 3.2: no 1/|o_i|, a constant in its place; no KL."""
    return -sum(map(sum, deepseekmath_rows(step, beta=0))) / (len(step.advantages) * LONGEST)


def dapo(step):
    """DAPO, equation 8: (1/Σ|o_i|) Σ_i Σ_t with 1 − 0.2 and 1 + 0.28. The paper writes it for one prompt's group; the
    sums here go over the whole step, so that a token counts the same in each of its groups."""
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


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", PAPERS)
def test_loss_is_the_papers(name, seed):
    step = random_step(seed, NOISE.get(name, 0.4))
    loss, stats = loss_of(step, name)
    assert loss.item() == pytest.approx(PAPERS[name](step), rel=1e-12)
    assert 0 < stats["clip_fraction"] < 1  # both sides of the clipping were reached


CHOICES = list(itertools.product(("token", "sequence"), ("ratio", "weight"), ("completions", "tokens", "max_length")))


@pytest.mark.parametrize(("level", "clip", "normalizer"), CHOICES)
@pytest.mark.parametrize("estimator", KL)
def test_choices_compose(level, clip, normalizer, estimator):
    """Every combination of the choices, not only those with a name, with a KL penalty on top."""
    step = random_step(7)
    objective = Objective(importance_sampling_level=level, clip=clip, normalizer=normalizer)
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
    loss, stats = grpo_loss(
        step.logps,
        step.old_logps,
        step.ref_logps,
        step.advantages,
        step.mask,
        objective=objective,
        epsilon=0.1,
        epsilon_high=0.5,
        beta=0.3,
        kl_estimator=estimator,
        max_completion_length=LONGEST,
    )
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


def test_clipping_spares_what_it_would_not_stop():
    """A ratio beyond the border that moves back is neither clipped nor counted: 1.5 with A < 0, 0.5 with A > 0."""
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
def test_advantages_are_the_papers(scale, group_size):
    """DeepSeekMath, section 4.1.2; the 1e-4 is ours (and everybody's)."""
    rewards = np.random.default_rng(group_size).normal(size=5 * group_size)
    expected = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        for reward in group:
            scales = {"group": np.std(group, ddof=1) + 1e-4, "batch": np.std(rewards, ddof=1) + 1e-4, "none": 1}
            expected.append((reward - np.mean(group)) / scales[scale])
    assert group_advantages(torch.tensor(rewards), group_size, scale).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_teach_nothing_at_all(scale):
    """0.1 is no binary fraction: the mean of seven of them is another number in float32, and the difference divided by
    a standard deviation of nearly nothing would be a gradient made of rounding errors."""
    group = torch.full((7,), 0.1)
    assert (group - group.mean()).abs().max() > 0
    rewards = torch.cat([group, torch.arange(7.0)])
    advantages = group_advantages(rewards, 7, scale)
    assert advantages[:7].tolist() == [0.0] * 7
    assert advantages[7:].abs().min() == 0 and advantages[7:].abs().max() > 0.5


def test_overlong_penalty_worked_by_hand():
    lengths = torch.tensor([1, 15, 16, 17, 18, 20])  # of at most 20, the last 4 of which cost something
    assert soft_overlong_penalty(lengths, 20, 0.2).tolist() == pytest.approx([0, 0, 0, -0.25, -0.5, -1])


def test_overlong_penalty_is_dapos():
    """DAPO, equation 13, with L_max the allowed length and L_cache a fifth of it."""
    for most in (100, 256, 1000):
        cache = 0.2 * most
        lengths = np.arange(1, most + 1)
        expected = [0 if n <= most - cache else ((most - cache) - n) / cache for n in lengths]
        assert soft_overlong_penalty(torch.tensor(lengths), most, 0.2).tolist() == pytest.approx(expected, abs=1e-6)


def test_normalizers_worked_by_hand():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert step_normalizer("completions", mask, 8) == 2
    assert step_normalizer("tokens", mask, 8) == 3
    assert step_normalizer("max_length", mask, 8) == 16
    assert step_normalizer("tokens", mask & False, 8) == 1  # every completion was cut off and masked
    with pytest.raises(ValueError, match="max_completion_length"):
        step_normalizer("max_length", mask, None)


def test_a_masked_completion_counts_as_a_completion():
    """--mask_truncated_completions takes tokens out of the sum; with `completions` the divisor stays."""
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
def test_importance_weights_scale_the_policy_term_alone(name):
    step = random_step(4, NOISE.get(name, 0.4))
    weights = torch.rand(step.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    weighted, _ = loss_of(step, name, beta=0.1, importance_weights=weights)
    kl_alone, _ = loss_of(dataclasses.replace(step, advantages=step.advantages * 0), name, beta=0.1)
    one_by_one = 0.0
    for i, t in step.mask.nonzero().tolist():  # the loss without KL is linear in the weights
        only = torch.zeros_like(weights)
        only[i, t] = 1
        one_by_one += weights[i, t] * loss_of(step, name, beta=0.0, importance_weights=only)[0]
    assert weighted.item() == pytest.approx((kl_alone + one_by_one).item(), rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("cut", [[[0, 1, 2, 3, 4, 5]], [[5, 0], [1, 2, 3, 4]], [[3], [0, 1], [2], [4], [5]]])
def test_parts_of_a_step_add_up(name, cut):
    """Divided by the whole step's normalizer, the losses of its parts add up to the step's, ragged as they are."""
    step = random_step(5, NOISE.get(name, 0.4))
    whole, _ = loss_of(step, name)
    normalizer = step_normalizer(OBJECTIVES[name].normalizer, step.mask, LONGEST)
    total = 0.0
    for rows in cut:
        tensors = (getattr(step, field.name)[rows] for field in dataclasses.fields(Step))
        total += loss_of(Step(*tensors), name, normalizer=normalizer)[0].item()
    assert total == pytest.approx(whole.item(), rel=1e-12)


# --- Gradients ---


@pytest.mark.parametrize("estimator", KL)
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if OBJECTIVES[name].clip == "ratio"])
def test_gradient_is_that_of_the_value(name, estimator):
    step = random_step(6, NOISE.get(name, 0.4), lengths=(3, 1, 2))

    def loss(logps):
        return loss_of(dataclasses.replace(step, logps=logps), name, beta=0.1, kl_estimator=estimator)[0]

    assert torch.autograd.gradcheck(loss, step.logps, eps=1e-7, atol=1e-6)


def test_gradient_of_a_clipped_weight():
    """CISPO: the weight carries no gradient, and a token whose weight is clipped keeps its own: −min(r, c) A / N."""
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
    """With π_old = π every objective is REINFORCE with its advantages: d loss / d log π = −A / divisor, while the ratio
    is 1. A ratio of π to itself, not detached, would have no gradient at all."""
    step = random_step(8)
    loss, stats = loss_of(step, name, beta=0.0, old_logps=step.logps.detach())
    (gradient,) = torch.autograd.grad(loss, step.logps)
    assert stats["ratio"] == 1 and stats["clip_fraction"] == 0
    lengths = step.mask.sum(1, keepdim=True)
    divisor = {"completions": 6 * lengths, "tokens": torch.tensor(27), "max_length": torch.tensor(6 * LONGEST)}
    expected = -step.advantages[:, None] / divisor[OBJECTIVES[name].normalizer] * step.mask
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_loss_is_zero_on_policy_and_still_teaches():
    """What newcomers take for a bug: advantages of a group add up to 0, and so does the loss while all ratios are 1."""
    step = random_step(9, lengths=(5, 5, 5, 5, 5, 5))
    step.advantages = group_advantages(torch.arange(6.0, dtype=torch.float64), 6)
    loss, _ = loss_of(step, "grpo", beta=0.0, old_logps=step.logps.detach())
    (gradient,) = torch.autograd.grad(loss, step.logps)
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert gradient.abs().max() > 0.01


# --- TRL ---


@pytest.fixture(scope="session")
def trl_trainer():
    return pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer


def trl_loss(trainer, step: Step, loss_type: str, parts=1, on_policy=False, tokens=None, weights=None, **settings):
    """TRL's loss of a step's rows (or of one of `parts` micro-batches), and what it logs: its own method, called on an
    object that has what it reads."""
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


# How each preset is asked for there. Their ε_high of cispo is the bound itself, ours what is added to 1 as everywhere.
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


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", IN_TRL)
def test_loss_is_trls(trl_trainer, name, on_policy, seed):
    step = random_step(seed, NOISE.get(name, 0.4))
    old_logps = step.logps.detach() if on_policy else step.old_logps
    ours, stats = loss_of(step, name, old_logps=old_logps)
    theirs, logged = trl_loss(trl_trainer, step, on_policy=on_policy, **IN_TRL[name])
    assert_same_loss_and_gradient(step, ours, theirs)
    if OBJECTIVES[name].beta:
        assert stats["kl"].item() == pytest.approx(logged["kl"])
    if name not in ("gspo", "cispo"):
        assert stats["clip_fraction"].item() == pytest.approx(logged["clip_ratio/region_mean"])


def test_importance_sampling_correction_is_trls(trl_trainer):
    step = random_step(12)
    weights = torch.rand(step.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    ours, _ = loss_of(step, "grpo", importance_weights=weights)
    theirs, _ = trl_loss(trl_trainer, step, weights=weights, **IN_TRL["grpo"])
    assert_same_loss_and_gradient(step, ours, theirs)


PARTS = [[0, 1, 2], [3, 4, 5]]  # 12 tokens and 15


def in_parts(step: Step) -> list[Step]:
    return [Step(*(getattr(step, field.name)[rows] for field in dataclasses.fields(Step))) for rows in PARTS]


@pytest.mark.parametrize("name", [name for name in IN_TRL if name != "bnpo"])
def test_micro_batches_of_one_size_are_trls(trl_trainer, name):
    step = random_step(2, NOISE.get(name, 0.4))
    ours, _ = loss_of(step, name)
    theirs = sum(
        trl_loss(trl_trainer, part, parts=2, tokens=step.mask.sum(), **IN_TRL[name])[0] for part in in_parts(step)
    )
    assert_same_loss_and_gradient(step, ours, theirs)


def test_bnpo_differs_from_trls_in_micro_batches(trl_trainer):
    """On purpose: TRL divides each micro-batch by its own tokens and averages, so that a token weighs more in a
    micro-batch of short completions. Ours is the whole step's mean however it is cut (see test_parts_of_a_step_add_up).
    """
    step = random_step(13)
    ours, _ = loss_of(step, "bnpo")
    theirs = [trl_loss(trl_trainer, part, parts=2, **IN_TRL["bnpo"])[0].item() for part in in_parts(step)]
    means = [loss_of(part, "bnpo")[0].item() for part in in_parts(step)]
    assert sum(theirs) == pytest.approx(np.mean(means), rel=1e-12)
    assert ours.item() == pytest.approx((12 * means[0] + 15 * means[1]) / 27, rel=1e-12)
    assert abs(ours.item() - sum(theirs)) > 1e-3


def test_clip_fraction_differs_from_trls_where_weights_are_clipped(trl_trainer):
    """On purpose. Of cispo TRL counts the tokens with A > 0 alone, ours every token whose weight was cut, for both
    signs lose weight. Of gspo it counts sequences alike, ours its tokens, as every other statistic is over tokens."""
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


def flags(name, *more):
    command = f"--model_path small --dataset_name gsm8k --objective {name} --temperature 0.8 --learning_rate 1e-3 "
    command += f"--max_completion_length {LONGEST} --max_grad_norm 0.7 --weight_decay 0.1"
    return main.parse_args([*command.split(), *more])


def small_rollout(llm, family, args):
    """Three prompts of different lengths with four ragged completions each, and advantages."""
    generator = torch.Generator().manual_seed(1)
    rollout = sample(llm, questions(family), 4, args.max_completion_length, args.temperature, generator)
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 3
    rollout.sampler_logps = rollout.sampler_logps.double()  # buffers made like it keep all digits
    rewards = torch.randn(12, generator=generator, dtype=torch.float64)
    return rollout, group_advantages(rewards, 4)


def moved(model, by=0.02):
    """The model with other weights near its own."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += by * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return model


CUTS = {  # twelve rows in one micro-batch, in two uneven ones, in five that tear groups apart
    1: [list(range(12))],
    2: [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]],
    5: [[11, 2], [0], [3, 4, 5, 6], [1, 10, 9], [7, 8]],
}
UPDATES = 3


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_steps_are_those_of_a_plain_implementation(load, in_float64, family, name):
    """Three updates from one batch: the parameters after each are those that whole padded rows, full logits and
    torch's AdamW give, however the rows are cut into micro-batches."""
    args = flags(name)
    llm, reference, model = load(family), moved(load(family).model), load(family).model
    rollout, advantages = small_rollout(llm, family, args)
    plain = PlainRows(llm, rollout, questions(family))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    with torch.no_grad():
        old, ref = plain.logps(model, 0.8), plain.logps(reference, 0.8)
        entropy = plain.entropy(model, 0.8)
    losses, norms, after = [], [], []
    for _ in range(UPDATES):
        loss = plain_loss(name, plain.logps(model, 0.8), old, ref, advantages, LONGEST)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7).item())
        optimizer.step()
        losses.append(loss.item())
        after.append([weight.detach().clone() for weight in model.parameters()])

    for plan in CUTS.values():
        llm = load(family)
        weights = main.MasterWeights(llm.model)
        optimizer = main.make_optimizer(weights, llm.device, args)
        ref_logps = main.reference_logps(llm, reference, rollout, plan, args) if args.choices.beta else None
        old_logps = None
        for update in range(UPDATES):
            loss, stats, logps = main.accumulate_gradients(
                llm, rollout, advantages, rollout.completion_mask, old_logps, ref_logps, plan, args
            )
            if update == 0:
                old_logps = logps
                assert stats["entropy"] == pytest.approx(entropy, rel=1e-10)
                assert stats["ratio"] == pytest.approx(1, abs=1e-12) and stats["clip_fraction"] == 0
            else:
                assert stats["clip_fraction"] > 0.1  # so that clipping was compared too
            norm, finite = main.update(optimizer, weights, loss, 1e-3, args.max_grad_norm)
            assert finite
            assert loss.item() == pytest.approx(losses[update], rel=1e-9, abs=1e-12)
            assert norm == pytest.approx(norms[update], rel=1e-9)
            for weight, expected in zip(llm.model.parameters(), after[update], strict=True):
                torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-10)  # the steps are of 1e-3


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if OBJECTIVES[name].clip == "ratio"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_gradient_of_a_step_by_finite_differences(load, in_float64, family, name):
    """Off policy, with a reference: the loss along a random direction in the space of all weights rises as the gradient
    says."""
    args = flags(name)
    llm = load(family)
    rollout, advantages = small_rollout(llm, family, args)
    generator = torch.Generator().manual_seed(3)
    ref_logps, old_logps = (
        token_logps(llm, rollout, 0.8).detach()
        + size * torch.randn(rollout.sampler_logps.shape, generator=generator, dtype=torch.float64)
        for size in (0.5, 1e-3 if name == "gspo" else 0.3)
    )

    def loss():
        llm.model.zero_grad()
        return main.accumulate_gradients(
            llm, rollout, advantages, rollout.completion_mask, old_logps, ref_logps, CUTS[2], args
        )[0].item()

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


def test_correction_for_the_sampler_weighs_by_what_it_sampled_from(load, in_float64):
    """π_old of the trainer over that of the sampler, at most 2; from the old weights in later updates too."""
    args = flags("bnpo", "--importance_sampling_correction", "--beta", "0")
    llm = load("qwen2")
    rollout, advantages = small_rollout(llm, "qwen2", args)
    mask = rollout.completion_mask
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rollout.sampler_logps += noise * mask
    off = moved(load("qwen2").model, 1e-3)
    llm.model.load_state_dict(off.state_dict())  # what is trained by now; sampled was from the weights before
    with torch.no_grad():
        old_logps, logps = (token_logps(llm, rollout, 0.8, model=m) for m in (load("qwen2").model, off))
    weights = (old_logps - rollout.sampler_logps).exp()
    assert (weights[mask] > 2).any() and (weights[mask] < 0.5).any()
    ratio = (logps - old_logps).exp()
    gain = torch.min(ratio * advantages[:, None], ratio.clip(0.8, 1.2) * advantages[:, None])
    expected = -(weights.clip(max=2) * gain)[mask].mean()
    loss, stats, _ = main.accumulate_gradients(llm, rollout, advantages, mask, old_logps, None, CUTS[5], args)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert stats["sampler_logp_diff"] == pytest.approx(noise[mask].abs().mean().item(), abs=1e-5)


# --- What the loop keeps over a run ---


class LetterEvaluator(ExactNumberEvaluator):
    """Rewards that random text differs in: the share of small letters."""

    def score(self, completion, answer):
        return sum("a" <= letter <= "z" for letter in completion) / (len(completion) + 1), 0.0, 0.0, 0.0, 0.0


@pytest.fixture
def train(model_folder, tmp_path, monkeypatch):
    """-> a function that makes three updates of a random model and gives their records."""
    monkeypatch.setitem(EVALUATORS, "arithmetic", LetterEvaluator)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the loop's handlers would outlive the test
    folder = tmp_path / "run"

    def run(*more):
        command = f"--model_path {model_folder('qwen2')} --dataset_name arithmetic --output_dir {folder} --device cpu "
        command += "--max_steps 3 --learning_rate 3e-3 --warmup_ratio 0 --train_size 8 --eval_size 2 "
        command += "--prompts_per_step 2 --num_generations 4 --max_completion_length 8 --max_prompt_length 400"
        assert main.main([*command.split(), *more]) == 0
        return json.loads((folder / "train_logs.json").read_text())

    return run


def test_the_reference_stays_where_the_run_began(train):
    """A reference that shares its weights with the policy follows every update: its KL is 0 for ever, and the penalty
    that should hold the policy back does nothing."""
    first, second, third = train("--objective", "grpo", "--beta", "0.04")
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert second["kl"] > 1e-3 and third["kl"] > second["kl"]


def test_old_log_probabilities_are_those_before_the_first_update(train, monkeypatch):
    """With μ = 3: taken anew for each update, the ratio would stay near 1 and never be clipped."""
    accumulate, calls = main.accumulate_gradients, []

    def listen(llm, rollout, advantages, mask, old_logps, *rest):
        result = accumulate(llm, rollout, advantages, mask, old_logps, *rest)
        calls.append((old_logps, result[2]))
        return result

    monkeypatch.setattr(main, "accumulate_gradients", listen)
    records = train("--num_iterations", "3")
    (none, first), (second_old, second), (third_old, _) = calls
    assert none is None and second_old.equal(first) and third_old.equal(first) and not second.equal(first)
    assert records[0]["ratio"] == 1 and all(record["ratio"] != 1 for record in records[1:])
