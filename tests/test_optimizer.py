"""The optimizer: float32 masters of bfloat16 weights, schedule, clipping, skipped steps, resuming."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_config

from optimizer import MasterAdamW, learning_rate, sync_reference

FINITE = torch.tensor(0.0)  # a loss


def layer(size: int = 2, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    """y = w·x with weights of 1."""
    made = torch.nn.Linear(size, 1, bias=False).to(dtype)
    torch.nn.init.ones_(made.weight)
    return made


def optimizer_of(model: torch.nn.Module, flags: str = "", steps: int = 100) -> MasterAdamW:
    return MasterAdamW(model, small_config(f"--max_steps {steps} --warmup_ratio 0", flags))


# ---------------------------------------------------------------------------------------------------------------------
# The learning rate


def rates(kind: str, steps: int = 10, warmup: float = 0.3) -> list[float]:
    """The rates of all steps, as shares of the highest."""
    config = small_config(f"--learning_rate 0.5 --warmup_ratio {warmup} --lr_scheduler_type {kind}")
    return [learning_rate(step, steps, config) / 0.5 for step in range(1, steps + 1)]


def test_learning_rate_follows_its_schedule():
    rising = [1 / 3, 2 / 3, 1]
    assert rates("constant") == pytest.approx(rising + [1] * 7)
    assert rates("linear") == pytest.approx(rising + [1 - n / 7 for n in range(7)])
    assert rates("cosine") == pytest.approx(rising + [(1 + math.cos(math.pi * n / 7)) / 2 for n in range(7)])
    assert rates("constant", warmup=0) == [1] * 10


@given(
    kind=st.sampled_from(["constant", "linear", "cosine"]),
    steps=st.integers(1, 40),
    warmup=st.floats(0, 1),
)
@settings(max_examples=30, deadline=None)
def test_every_step_has_a_positive_rate(kind, steps, warmup):
    """The first step of a short run, or the last one, must not be without effect."""
    found = rates(kind, steps, warmup)
    assert all(0 < rate <= 1 for rate in found) and max(found) == pytest.approx(1)


def test_steps_use_the_rates_of_the_schedule():
    model = layer(dtype=torch.bfloat16)
    optimizer = optimizer_of(model, "--learning_rate 0.01 --lr_scheduler_type linear --warmup_ratio 0.5", steps=4)
    logged = []
    for _ in range(4):
        before = optimizer.masters[0].clone()
        model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        logged.append(optimizer.step(FINITE)["learning_rate"])
        moved = before - optimizer.masters[0]  # AdamW moves each weight by the rate if its gradient is constant
        torch.testing.assert_close(moved, torch.full_like(moved, logged[-1]), rtol=1e-3, atol=1e-7)
    assert logged == pytest.approx([0.005, 0.01, 0.01, 0.005])


# ---------------------------------------------------------------------------------------------------------------------
# Masters


def test_masters_keep_updates_that_bfloat16_loses():
    """A step of 1e-4 on a weight of 1 rounds to nothing in bfloat16; a hundred of them must not."""
    model = layer(1, torch.bfloat16)
    optimizer = optimizer_of(model, "--learning_rate 1e-4")
    for step in range(100):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        stats = optimizer.step(FINITE)
        assert stats["grad_norm"] == 1 and stats["skipped_steps"] == 0
        assert model.weight.grad is None and optimizer.masters[0].grad is None
        if step == 0:
            assert model.weight.item() == 1
    assert optimizer.masters[0].item() == pytest.approx(0.99, abs=1e-4)
    assert model.weight.item() == pytest.approx(0.99, abs=4e-3)


def test_masters_add_up_micro_batches_in_float32():
    model = layer(1, torch.bfloat16)
    optimizer = optimizer_of(model)
    for size in (1.0, *[2.0**-10] * 16):  # bfloat16 has 8 bits: each small gradient alone would vanish beside the 1
        model(torch.full((1, 1), size, dtype=torch.bfloat16)).sum().backward()
        assert model.weight.grad is None  # freed at once
    assert optimizer.masters[0].grad.item() == 1 + 16 * 2.0**-10


def test_masters_of_float32_weights_are_the_weights():
    model = torch.nn.Linear(2, 2)
    optimizer = optimizer_of(model)
    assert all(a is b for a, b in zip(optimizer.masters, model.parameters(), strict=True))
    assert optimizer.state_dict()["masters"] is None


def test_frozen_weights_have_no_master():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert [id(master) for master in optimizer_of(model).masters] == [id(model.weight)]


# ---------------------------------------------------------------------------------------------------------------------
# Clipping and skipping


@pytest.mark.parametrize("limit, clipped", [(1.0, [0.6, 0.8]), (0.0, [3.0, 4.0]), (10.0, [3.0, 4.0])])
def test_gradient_is_clipped_and_its_norm_logged_before(limit, clipped):
    model = layer()
    optimizer = optimizer_of(model, f"--learning_rate 0.5 --max_grad_norm {limit}")
    optimizer.adamw = torch.optim.SGD(optimizer.masters, lr=0.5)  # AdamW divides by the gradient's size
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert optimizer.step(FINITE)["grad_norm"] == 5.0
    torch.testing.assert_close(1 - model.weight, 0.5 * torch.tensor([clipped]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (math.inf, 1.0), (0.0, math.nan), (0.0, math.inf)])
def test_a_step_that_is_not_finite_is_skipped(loss, gradient, dtype):
    model = layer(dtype=dtype)
    optimizer = optimizer_of(model)
    optimizer.masters[0].grad = torch.tensor([[gradient, 1.0]])
    assert optimizer.step(torch.tensor(loss))["skipped_steps"] == 1
    assert torch.equal(model.weight, torch.ones_like(model.weight))
    assert optimizer.masters[0].grad is None
    moments = optimizer.adamw.state[optimizer.masters[0]]
    assert all(not moments[name].any() for name in ("step", "exp_avg", "exp_avg_sq"))


def test_skipped_steps_are_counted_in_a_row():
    model = layer()
    optimizer = optimizer_of(model)
    counts = []
    for bad in (False, True, True, False, True):
        model.weight.grad = torch.ones(1, 2)
        counts.append(optimizer.step(torch.tensor(math.nan if bad else 1.0))["skipped_steps"])
    assert counts == [0, 1, 2, 0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def train(model: torch.nn.Module, optimizer: MasterAdamW, steps: range) -> list[dict]:
    """Steps of changing gradients; the fifth has a loss that is not finite."""
    logged = []
    for step in steps:
        x = torch.tensor([[1.0, 0.1 * step]], dtype=model.weight.dtype)
        (model(x) - step).square().sum().backward()
        logged.append(optimizer.step(torch.tensor(math.nan if step == 5 else 1.0)))
    return logged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_continues_exactly(dtype, tmp_path):
    flags = "--learning_rate 1e-3 --lr_scheduler_type cosine"
    whole = layer(dtype=dtype)
    optimizer = optimizer_of(whole, flags, steps=10)
    first = train(whole, optimizer, range(6))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = copy.deepcopy(whole)
    expected = train(whole, optimizer, range(6, 10))

    other = optimizer_of(resumed, flags, steps=99)  # a longer run keeps the schedule of its first steps
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.skipped_steps == first[-1]["skipped_steps"] == 1
    assert train(resumed, other, range(6, 10)) == expected
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(other.masters[0], optimizer.masters[0])


# ---------------------------------------------------------------------------------------------------------------------
# The reference


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_the_reference_moves_towards_the_model(alpha):
    reference, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = alpha * model.weight + (1 - alpha) * reference.weight
    kept = model.weight.clone()
    sync_reference(reference, model, alpha)
    torch.testing.assert_close(reference.weight, expected)
    assert torch.equal(model.weight, kept)
