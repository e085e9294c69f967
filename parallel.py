"""How do several processes train one model? Each samples its share of the prompts and computes its share of the loss.

    torchrun --nproc_per_node 8 main.py …                  # replicas: each GPU holds the whole training state
    torchrun --nproc_per_node 8 main.py --fsdp_size 8 …    # the training state is divided among 8 GPUs

All processes draw the same prompts, and after sampling each receives the completions of the others. Rewards,
advantages, normalizers and the log are then computed from the whole batch, as by one process. The sums over
micro-batches are added up over the processes once a step: gradients, loss and statistics. Process 0 alone writes and
prints.

This is the only file that knows torch.distributed. Without torchrun there is one process, and each function returns
what it was given. docs/scale.md has the arithmetic of what is sent.
"""

from __future__ import annotations

import atexit
import copy
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

import layers
from config import launched

if TYPE_CHECKING:
    from llms import LLM

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # longer than any work that the others wait for, such as writing a checkpoint
SECONDS_FOR_THE_FIRST = 2  # to report an error that all processes have


def start(device: str | None) -> None:
    """Join the other processes. On CUDA each has the GPU of its LOCAL_RANK; all but process 0 print no results.

    Raises:
        ValueError: more processes than GPUs on this machine.
    """
    if not launched() or dist.is_initialized():
        return
    local, on_gpu = int(os.environ.get("LOCAL_RANK", 0)), device in (None, "cuda") and torch.cuda.is_available()
    if on_gpu and local >= (gpus := torch.cuda.device_count()):
        raise ValueError(f"there are more processes than the {gpus} GPUs of this machine: --nproc_per_node {gpus}")
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)
    if rank():
        sys.stdout = io.StringIO()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def share(count: int, of: int | None = None) -> range:
    """The part of `count` things in order that falls to this process, or to process `of`."""
    number = rank() if of is None else of
    return range(count * number // size(), count * (number + 1) // size())


# ---------------------------------------------------------------------------------------------------------------------
# Small things are sent as float64 or as pickled objects, between the processes of one run only


def on_first(work: Callable[..., T], *args: Any) -> T:
    """Process 0 calls `work(*args)`; all return the result."""
    if size() == 1:
        return work(*args)
    found: list[Any] = [work(*args) if rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def gather(mine: T) -> list[T]:
    """What each process gave, in the order of their numbers. Tensors must be on the CPU."""
    found: list[Any] = [mine] * size()
    if size() > 1:
        dist.all_gather_object(found, mine)
    return found


def most(number: float) -> float:
    """The largest of the processes' numbers."""
    return max(gather(number))


def total(tree: T) -> T:
    """The same nested dicts and tuples, with each number or 0-d tensor added up over the processes in float64."""
    if size() == 1:
        return tree
    leaves, structure = pytree.tree_flatten(tree)
    sums = torch.tensor([float(leaf) for leaf in leaves], dtype=torch.float64)  # (number of leaves,)
    dist.all_reduce(sums)
    return pytree.tree_unflatten(list(sums.unbind()), structure)


def report(error: Exception, text: str) -> None:
    """Print `text`, which explains `error`, on stderr with the number of this process. An error that all processes have
    is reported by the first, and torchrun ends the others while they wait here; so is the end of another process."""
    if size() > 1:
        atexit.unregister(dist.destroy_process_group)  # it would wait for the others
        lost = isinstance(error, dist.DistBackendError) or ("onnection" in str(error) and "peer" in str(error))
        if rank():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(SECONDS_FOR_THE_FIRST)
        if rank() and lost:
            return
        text = "another process of this run ended, so this one ends too" if lost else text
        text = f"process {rank()} of {size()}: {text}"
    print(f"main.py: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The training state


def shard(llm: LLM, fsdp_size: int) -> None:
    """Give `llm` a float32 copy whose weights are divided among `fsdp_size` processes each. Losses and gradients are
    computed with that copy; its weights are gathered in the model's dtype when they are needed (FSDP2: torch's
    `fully_shard`). `llm.model` remains whole, for sampling and saving, and receives each update."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    from logprobs import uses_fast_layers  # which imports this file

    model, dtype = copy.deepcopy(llm.model), llm.dtype
    sizes = (size() // fsdp_size, fsdp_size)
    mesh = init_device_mesh(llm.device.type, sizes, mesh_dim_names=("replicate", "shard"))
    kept: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=layers.wide(dtype)),
    }
    if not uses_fast_layers(model):  # which reads all weights in one call and calls no layer by itself
        for layer in layers.text_model_of(model).layers:
            fully_shard(layer, **kept)
    fully_shard(model, reshard_after_forward=False, **kept)
    model.to(layers.wide(dtype))  # only now: each process makes its part of the float32 copy
    type(model).gathered = call_and_clone  # of the class that fully_shard made for this model
    register_fsdp_forward_method(model, "gathered")
    llm.sharded = model


def call_and_clone(_model: Any, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """compute(), copied: FSDP cannot follow what happens to a view of another tensor."""
    return tuple(tensor.clone() for tensor in compute())


def forward(model: Any, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The tensors of compute(), during which the weights of a sharded model are whole."""
    return model.gathered(compute) if hasattr(model, "gathered") else compute()


def padded(micro_batches: list[list[int]], sharded: Any) -> Iterator[tuple[list[int], float]]:
    """Micro-batches with a factor of their loss, which is 1. Each pass through a sharded model waits for the other
    processes, so that all need the same number of passes: the last micro-batch is repeated with factor 0."""
    for rows in micro_batches:
        yield rows, 1.0
    if sharded is not None:
        for _ in range(int(most(len(micro_batches))) - len(micro_batches)):
            yield micro_batches[-1], 0.0


def add_gradients(parameters: Sequence[Tensor]) -> None:
    """Add each parameter's gradient up over the processes. One may lack a gradient that others have: that of the vision
    tower, if its prompts have no pictures."""
    if size() == 1:
        return
    if is_divided(parameters[0]):
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(found, float(size()))  # FSDP has averaged them
        return
    have = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)  # (parameters,)
    dist.all_reduce(have, dist.ReduceOp.MAX)
    gradients = []
    for parameter, somewhere in zip(parameters, have.tolist(), strict=True):
        if somewhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()


def is_divided(tensor: Any) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")  # torch's DTensor, whose import takes seconds


def whole(tensor: Any) -> Tensor:
    """The tensor, gathered from the processes if it is divided; all must call this."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def whole_on_first(tree: T) -> T:
    """The same nested dicts and lists with every divided tensor whole, on the CPU; empty tensors on all processes but
    the first, which alone writes them."""

    if size() == 1:
        return tree

    def gathered(value: Any) -> Any:
        if not is_divided(value):
            return value
        full = whole(value.detach())
        return full.cpu() if rank() == 0 else full.new_empty(0, device="cpu")

    return pytree.tree_map(gathered, tree)


def divided_like(value: Any, parameter: Any) -> Any:
    """A tensor of the parameter's shape, divided as the parameter is; any other value as it is."""
    if not is_divided(parameter) or getattr(value, "shape", None) != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
