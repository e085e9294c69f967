"""How do bfloat16 weights learn? AdamW over float32 master copies, with the learning-rate schedule and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import parallel
from config import Config

ROWS = 4096  # of a gradient, added up at once


class MasterAdamW:
    """AdamW that updates float32 copies of half-precision weights.

    AdamW at 1e-6 moves a weight of 0.02 by about 1e-6, which bfloat16 would round to nothing. Gradients of
    micro-batches are also added up in float32, each parameter's as soon as it is complete. The copies of float32
    weights are the weights themselves. A `sharded` model holds the copies of several processes, a part in each.

    Copies, their gradients and the moments are allocated here and kept, each kind in one block of memory: allocated
    one by one between activations, which come and go, they would leave gaps too small for later activations, and the
    process would grow by half within twenty steps.

    Attributes:
        total_steps: the length of the learning-rate schedule; a resumed run keeps that of its checkpoint.
        skipped_steps: steps in a row that were skipped because the loss or its gradient was not finite.
    """

    def __init__(self, model: torch.nn.Module, config: Config, sharded: torch.nn.Module | None = None):
        self.config, self.total_steps = config, config.max_steps
        self.steps = self.skipped_steps = 0
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.masters = self.parameters
        if sharded is not None:
            self.masters = [p for p in sharded.parameters() if p.requires_grad]
        elif any(p.dtype in (torch.bfloat16, torch.float16) for p in self.parameters):
            self.masters = zeros_in_one_block(self.parameters, torch.float32)
            gradients = zeros_in_one_block(self.parameters, torch.float32)
            for parameter, master, gradient in zip(self.parameters, self.masters, gradients, strict=True):
                master.copy_(parameter.detach())
                parameter.register_post_accumulate_grad_hook(add_gradient_to(master, gradient))
        self.adamw = torch.optim.AdamW(
            self.masters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=self.masters[0].device.type in ("cpu", "cuda"),
        )
        if sharded is not None:
            return
        moments = (zeros_in_one_block(self.masters, self.masters[0].dtype) for _ in range(2))
        for master, mean, square in zip(self.masters, *moments, strict=True):  # as torch would in the first step
            steps = torch.zeros((), device=master.device if self.adamw.defaults["fused"] else "cpu")
            self.adamw.state[master] = {"step": steps, "exp_avg": mean, "exp_avg_sq": square}

    def step(self, loss: Tensor) -> dict[str, float]:
        """Clip the gradient, update the weights, clear the gradient. A loss or gradient that is not finite skips the
        update. Returns the record's columns: the gradient's norm before clipping, the learning rate, skipped steps."""
        self.steps += 1
        rate = learning_rate(self.steps, self.total_steps, self.config)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        parallel.add_gradients(self.masters)
        largest = self.config.max_grad_norm or math.inf
        norm = float(parallel.whole(torch.nn.utils.clip_grad_norm_(self.masters, largest)))
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self.adamw.step()
            self.copy_to_model()
        self.adamw.zero_grad(set_to_none=True)
        self.skipped_steps = 0 if finite else self.skipped_steps + 1
        return {"grad_norm": norm, "learning_rate": rate, "skipped_steps": self.skipped_steps}

    @torch.no_grad()
    def copy_to_model(self) -> None:
        if parallel.is_divided(self.masters[0]):
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(parallel.whole(master))
        elif self.masters is not self.parameters:
            torch._foreach_copy_(self.parameters, self.masters)

    def state_dict(self) -> dict[str, Any]:
        state = {
            "adamw": self.adamw.state_dict(),
            "masters": None if self.masters is self.parameters else self.masters,
            "steps": self.steps,
            "total_steps": self.total_steps,
            "skipped_steps": self.skipped_steps,
        }
        return parallel.whole_on_first(state)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; the model's weights were loaded with the model."""
        moments = {
            number: {name: parallel.divided_like(value, self.masters[number]) for name, value in found.items()}
            for number, found in state["adamw"]["state"].items()
        }
        self.adamw.load_state_dict(state["adamw"] | {"state": moments})
        for master, saved in zip(self.masters, state["masters"] or (), strict=state["masters"] is not None):
            master.copy_(parallel.divided_like(saved, master))
        self.steps, self.total_steps = state["steps"], state["total_steps"]
        self.skipped_steps = state["skipped_steps"]


def zeros_in_one_block(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Zeros in the shapes and strides of `tensors`, as views of one block of memory."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = torch.zeros(sum(sizes), dtype=dtype, device=tensors[0].device).split(sizes)  # (n,) of each tensor
    pairs = zip(parts, tensors, strict=True)
    return [part.as_strided(tensor.shape, tensor.stride(), part.storage_offset()) for part, tensor in pairs]


def add_gradient_to(master: Tensor, total: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's gradient to `total`, which becomes the gradient of its float32 copy, and frees
    it."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None  # the hook runs when the gradient is complete
        if master.grad is None:
            master.grad = total.copy_(parameter.grad)
        elif total.dim() == 0:
            total.add_(parameter.grad)
        else:  # in parts: torch makes a float32 copy of what it adds, and the gradient of an embedding is large
            for some, more in zip(total.split(ROWS), parameter.grad.split(ROWS), strict=True):
                some.add_(more)
        parameter.grad = None

    return add


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The rate of step 1 … total_steps: linear warm-up, then constant, or linear or cosine decay to 0."""
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    if step <= warmup_steps:
        return config.learning_rate * step / warmup_steps
    done = min(1.0, (step - warmup_steps - 1) / max(1, total_steps - warmup_steps))
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * factor[config.lr_scheduler_type]


@torch.no_grad()
def sync_reference(reference: torch.nn.Module, model: torch.nn.Module, alpha: float) -> None:
    """reference ← alpha · model + (1 − alpha) · reference."""
    for old, new in zip(reference.parameters(), model.parameters(), strict=True):
        old.lerp_(new, alpha)
