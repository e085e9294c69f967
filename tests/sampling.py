"""Rollouts and gradients of the small models, for the tests of several files."""

import pytest
import small_models
import torch
from small_models import questions

from rollout import Rollout, Sampler


def slow(values, *left_out) -> list:
    """Parameters of a test, of which the fast lane leaves out some."""
    return [pytest.param(value, marks=pytest.mark.slow) if value in left_out else value for value in values]


FAMILIES = slow(small_models.FAMILIES, "llama", "qwen3", "qwen2_5_vl")  # the others cover the same branches
VISION = slow(small_models.VISION, "qwen2_5_vl")
TEMPERATURES = slow([0.7, 1.0, 1.3], 1.0, 1.3)


def draw(llm, family, generations=3, length=12, temperature=1.0, seed=0, **options) -> Rollout:
    """Completions of the family's three questions, from a sampler made for this call."""
    return Sampler(llm, seed).sample(questions(family), generations, length, temperature, **options)


def gradients(llm, loss) -> dict[str, torch.Tensor]:
    """The gradient of each weight that has one."""
    llm.model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in llm.model.named_parameters() if weight.grad is not None}


def assert_same_gradients(one: dict, other: dict, atol=1e-5, rtol=1e-4):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")
