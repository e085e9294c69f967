"""The layers written out compute what transformers' modules compute, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from plain_reference import compute_in_float64
from sampling import FAMILIES, assert_same_gradients, draw, gradients
from small_models import TEXT

import layers
import logprobs
from layers import RMSNorm, has_fast_layers, rms_norm
from logprobs import token_logps, uses_fast_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_layers_equal_those_of_transformers(load, family, monkeypatch):
    """The loss through layers.py and through the model's own modules: equal values, and equal gradients of every
    weight."""
    compute_in_float64(monkeypatch)
    llm = load(family)
    rollout = draw(llm, family)
    weights = torch.randn(rollout.completion_ids.shape, generator=torch.Generator().manual_seed(1)).double()
    calls, forward = [], layers.forward
    monkeypatch.setattr(layers, "forward", lambda *args: calls.append(1) or forward(*args))

    def run():
        logps = token_logps(llm, rollout, 0.9)
        return logps.detach(), gradients(llm, (logps * weights).sum())

    fast_logps, fast_gradients = run()
    assert len(calls) == (2 if family in TEXT else 1)  # prompts with pictures go through the model's own modules
    monkeypatch.setattr(logprobs, "uses_fast_layers", lambda model: False)
    logps, expected = run()
    assert len(calls) == (2 if family in TEXT else 1)  # no further calls
    torch.testing.assert_close(fast_logps, logps, rtol=1e-9, atol=1e-11)
    assert expected.keys() == dict(llm.model.named_parameters()).keys()
    assert_same_gradients(expected, fast_gradients, rtol=1e-6, atol=1e-8)


def test_eager_attention_runs_in_transformers(load):
    """The implementation named by --attn_implementation is the one that runs."""
    assert uses_fast_layers(load("qwen2").model)
    assert not uses_fast_layers(load("qwen2", "float32", "eager").model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "mistral"),
        ("hidden_act", "gelu"),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ],
)
def test_other_architectures_run_in_transformers(load, name, value):
    model = load("qwen2").model
    assert has_fast_layers(model)
    setattr(model.config, name, value)
    assert not has_fast_layers(model)


def test_rms_norm_gradient_equals_numerical_one():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 4, 6, generator=generator).double(), torch.randn(6, generator=generator).double()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: RMSNorm.apply(x, weight, 1e-3), (x, weight))
    expected = torch.nn.functional.rms_norm(x, (6,), weight, 1e-3)
    torch.testing.assert_close(RMSNorm.apply(x, weight, 1e-3), expected)


def test_rms_norm_is_the_same_with_and_without_gradients(load):
    norm = load("qwen2").model.base_model.norm
    x = torch.randn(5, norm.weight.numel(), generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        without = rms_norm(x, norm)
    torch.testing.assert_close(rms_norm(x, norm).detach(), without)
    expected = torch.nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    torch.testing.assert_close(without, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_swiglu_keeps_two_tensors_for_the_same_gradients(dtype, bias):
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(7, 12, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(7, 5, generator=generator).to(dtype)
    down = torch.nn.Linear(12, 5, bias=bias, dtype=dtype)
    inputs = (gate, up, *down.parameters())
    expected = torch.autograd.grad(down(F.silu(gate) * up), inputs, grad)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = layers.gated_down(gate, up, down)
    assert sorted(tensor.numel() for tensor in kept) == sorted([gate.numel(), up.numel(), down.weight.numel()])
    for found, right in zip(torch.autograd.grad(output, inputs, grad), expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_attention_in_bfloat16_has_the_exact_gradient(key_heads):
    """Value and gradients against float64, with padding and fewer queries than keys."""
    query = torch.randn(3, 5, 6, 16).bfloat16().transpose(1, 2).requires_grad_()  # (B, heads, T, D)
    key, value = (torch.randn(3, key_heads, 9, 16).bfloat16().requires_grad_() for _ in range(2))  # (B, …, S, D)
    bias = torch.zeros(3, 1, 5, 9).masked_fill_(torch.ones(5, 9, dtype=torch.bool).triu(5), -torch.inf)
    bias[1, ..., :3] = -torch.inf  # left padding
    found = layers.attention(query, key, value, bias.bfloat16(), 0.3)
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected = F.scaled_dot_product_attention(*exact, bias.double(), scale=0.3, enable_gqa=True)
    grad = torch.randn(3, 6, 5, 16).bfloat16()
    pairs = zip(
        (found, *torch.autograd.grad(found, (query, key, value), grad)),
        (expected, *torch.autograd.grad(expected, exact, grad.double())),
        strict=True,
    )
    for one, other in pairs:
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 0.01 * other.norm()
