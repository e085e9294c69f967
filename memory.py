"""How much memory will this run need, part by part, and how much is there? Chooses `--micro_batch_tokens auto`.

The estimate is made from shapes when the models are loaded, before anything is written. docs/memory.md compares it with
measured peaks. All numbers are bytes; texts give them in GB of 2^30 bytes, as `peak_memory_gb` does.

Letters: H hidden size, D head size, P and T tokens of a prompt and of a completion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import layers
import parallel
from logprobs import BLOCK, KEPT_BYTES, LOGIT_TILE_BYTES, uses_fast_layers
from prompts import encode_prompts

if TYPE_CHECKING:
    from config import Config
    from llms import LLM
    from rldatasets import Dataset

GB = 2**30
MARGIN = 0.1  # of the memory there is, left free for what the estimate misses
CHOICES = (8192, 4096, 2048, 1024, 512, 256)  # of --micro_batch_tokens auto
CPU_ACTIVATIONS = GB  # on a CPU, products of some hundred rows are as fast as larger ones: more only takes memory
PROMPTS_LOOKED_AT, LONGER = 16, 1.25  # the longest prompt is taken to be so much longer than the longest of some
OTHER_LIBRARIES = int(0.7 * GB)  # where the system does not tell: Python, torch and transformers, measured on Linux


class OutOfMemory(ValueError):
    """A run that cannot fit; the message is one line saying what it needs, what is free and which flags help."""


@dataclass(frozen=True)
class Shape:
    """What the estimate must know of a model, its device and its prompts.

    Attributes:
        parameters, trained: numbers of weights. size: bytes of one.
        layers, hidden, inner, queries, keys, vocabulary: of the decoder; queries = heads · D, keys = key heads · D.
        tied: input and output embedding are one parameter. head_trained: the output embedding gets a gradient.
        query_norm: queries and keys are normalized, as in Qwen3. fast: the loss runs layers.py.
        eager: attention keeps its scores, of so many heads (0: it does not).
        prompt: tokens of the longest prompt. patches: of the pictures of one prompt. tower: kept elements per patch.
        packed: weights that decoding copies into another layout. libraries: what the process holds besides its models.
    """

    parameters: int
    trained: int
    size: int
    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool = True
    head_trained: bool = True
    query_norm: bool = False
    fast: bool = True
    eager: int = 0
    on_cpu: bool = True
    prompt: int = 128
    patches: int = 0
    tower: int = 0
    packed: int = 0
    libraries: int = OTHER_LIBRARIES


@dataclass(frozen=True)
class Plan:
    """Bytes by part. Sampling and the loss take turns, so the peak counts the larger of the two.

    Attributes:
        masters: float32 copies of weights in bfloat16, and `gradients` theirs, which last; those of float32 weights are
            freed by each update. packed_weights: copies of the decoder's weights for sampling (layers.product), whose
            memory stays in gaps that activations seldom fit into. newest_gradients: of one micro-batch.
        sampling: what a call of the sampler needs besides the key-value cache. activations, logits: of one micro-batch.
    """

    libraries: int
    weights: int
    masters: int
    gradients: int
    moments: int
    reference: int
    key_value_cache: int
    packed_weights: int
    sampling: int
    newest_gradients: int
    activations: int
    logits: int

    @property
    def peak(self) -> int:
        gradients_last = self.masters > 0
        loss = self.newest_gradients + self.activations + self.logits + (0 if gradients_last else self.gradients)
        lasting = self.libraries + self.weights + self.masters + self.moments + self.reference
        lasting += self.key_value_cache + self.packed_weights + (self.gradients if gradients_last else 0)
        return lasting + max(self.sampling, loss)


@dataclass(frozen=True)
class Room:
    """Memory that this process can have in all (what it holds already, and what is free), and that of the machine."""

    free: int
    total: int

    def holds(self, plan: Plan) -> bool:
        return plan.peak <= (1 - MARGIN) * self.free


# ---------------------------------------------------------------------------------------------------------------------
# What is needed


def estimate(config: Config, shape: Shape, tokens: int) -> Plan:
    """The parts of a run whose micro-batches have at most `tokens` tokens."""
    training, half = not config.eval_only, shape.size == 2
    moved = shape.trained if training else 0
    head = shape.vocabulary * shape.hidden * shape.size if training and shape.head_trained else 0
    parts = 1 if config.eval_only else config.fsdp_size  # processes that divide the training state
    gathered = 2 * shape.size * moved if shape.fast else 2 * (head + 2 * shape.size * moved // max(1, shape.layers))
    return Plan(
        libraries=shape.libraries,
        weights=shape.parameters * shape.size,
        masters=4 * moved // parts if half or parts > 1 else 0,
        gradients=moved * max(4, shape.size) // parts,
        moments=2 * moved * max(4, shape.size) // parts,
        reference=shape.parameters * shape.size if training and has_reference(config) else 0,
        key_value_cache=cache_bytes(config, shape),
        packed_weights=shape.packed * shape.size,
        sampling=sampling_bytes(config, shape),
        # The head's is the largest. A tied embedding has two: the lookup's is added when the backward pass ends. Of a
        # divided model, the weights that are whole at once and their gradients.
        newest_gradients=head * (2 if shape.tied else 1) if parts == 1 else gathered,
        activations=activation_bytes(config, shape, tokens) if training else 0,
        logits=logit_bytes(shape, tokens) if training else 0,
    )


def has_reference(config: Config) -> bool:
    """Whether a second model is loaded; with adapters the reference is the model without them."""
    return bool(config.objective.beta and not config.lora_rank)


def rows_and_prompts(config: Config) -> tuple[int, int]:
    """The most rows that are decoded at once, and the most prompts: in training or in an evaluation."""
    rows = config.eval_batch_size * max(1, config.eval_samples)
    if config.eval_only:
        return rows, config.eval_batch_size
    prompts = config.prompts_per_step // parallel.size()
    return max(rows, prompts * config.num_generations), max(config.eval_batch_size, prompts)


def cache_bytes(config: Config, shape: Shape) -> int:
    """Keys and values of every row and slot, which the sampler keeps from one step to the next."""
    slots = shape.prompt + config.max_episode_length
    return rows_and_prompts(config)[0] * slots * shape.layers * 2 * shape.keys * shape.size


def sampling_bytes(config: Config, shape: Shape) -> int:
    """The prompts' own keys and values, and one layer over the prompts or the logits of one token of each row, with
    a packed copy of the output embedding where the decoder's weights have one."""
    rows, prompts = rows_and_prompts(config)
    read = prompts * shape.prompt  # tokens
    own = read * shape.layers * 2 * shape.keys * shape.size
    layer = read * shape.size * (3 * shape.inner + 4 * shape.hidden + 2 * shape.queries)
    logits = rows * shape.vocabulary * (shape.size + 3 * 4)  # raw; float32, log-probabilities, and their sums
    head = shape.vocabulary * shape.hidden * shape.size if shape.packed else 0
    return own + max(layer, logits + head)


def loss_tokens(config: Config, shape: Shape, tokens: int) -> int:
    """The tokens of the largest micro-batch: `tokens`, but one row at least, and a whole step at most. Gradient
    checkpointing copies the prompt for each row."""
    P, T = shape.prompt, config.max_episode_length
    rows = config.prompts_per_step * config.num_generations
    if config.gradient_checkpointing:
        fitting = int(tokens / (T + P / config.num_generations))
        return min(max(1, fitting), rows) * (P + T)
    return min(max(tokens, P + T), rows * T + config.prompts_per_step * P)


def activation_bytes(config: Config, shape: Shape, tokens: int) -> int:
    """What the backward pass of one micro-batch needs: of every layer what its operations keep, as much again for the
    layer being computed, and what the vision tower keeps of the pictures."""
    H, queries, keys, inner = shape.hidden, shape.queries, shape.keys, shape.inner
    n, wide = loss_tokens(config, shape, tokens), max(1, 4 // shape.size)  # float32, in elements of the weights
    P, T = shape.prompt, config.max_episode_length
    rows = n / (P + T if config.gradient_checkpointing else T + P / config.num_generations)
    # layers.py: norms keep normalized input and result, attention query and result, the MLP gate and up.
    # transformers' operations: also the norms' inputs in float32, silu and product, and a second query.
    layer = n * (4 * H + 2 * queries + 2 * inner)
    if slow := not shape.fast or config.gradient_checkpointing:
        layer += n * (2 * H * wide + 2 * queries + 2 * inner)
    if config.lora_rank:  # frozen weights keep no input; each adapter keeps its own in float32, and silu is kept too
        layer += n * (inner - 2 * H + wide * (5 * H + queries + inner) if wide > 1 else 2 * inner)
    if shape.query_norm:
        layer += n * (queries + keys) * (1 + wide if slow else 1)
    layer += int(rows * (P + T)) * 2 * keys  # each row has the keys and values of its prompt
    layer += 2 * shape.eager * int(rows * T * (P + T))
    kept = shape.layers * (n * H if config.gradient_checkpointing else layer) + layer + n * 4 * H
    prompts = min(config.prompts_per_step, n // (P + config.num_generations * T) + 1)
    return shape.size * (kept + prompts * shape.patches * shape.tower)


def logit_bytes(shape: Shape, tokens: int) -> int:
    """One tile of logits with its softmax, and the block's gradient of the head: see logprobs.BlockedLogps."""
    width = min(shape.vocabulary, BLOCK)
    most = (KEPT_BYTES if shape.on_cpu else LOGIT_TILE_BYTES) // (4 * width)
    height = max(1, min(tokens, most if shape.vocabulary > BLOCK else min(512, most)))
    return height * width * (shape.size + 2 * 4) + width * shape.hidden * (shape.size + 2 * 4)


# ---------------------------------------------------------------------------------------------------------------------
# What is there


def room_of(device: torch.device, root: Path = Path("/")) -> Room | None:
    """The memory for this process; None where the system does not tell. `root` holds proc and sys."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(free + torch.cuda.memory_reserved(device), total)
    if device.type == "mps" and hasattr(torch.mps, "recommended_max_memory"):
        total = torch.mps.recommended_max_memory()
        return Room(total, total)
    system = fields(root / "proc/meminfo")
    if not {"MemAvailable", "MemTotal"} <= system.keys():
        return None
    free, total = system["MemAvailable"] * 1024, system["MemTotal"] * 1024
    for limit, used in cgroup_limits(root):
        free, total = min(free, limit - used), min(total, limit)
    return Room(max(0, free) + held(root), total)


def held(root: Path = Path("/")) -> int:
    """Memory of this process that is not a file's."""
    return fields(root / "proc/self/status").get("RssAnon", 0) * 1024


def cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of each control group that this process is in, versions 1 and 2. Cached files do not count as used:
    the system drops them when it needs memory."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":  # version 2
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file", "active_file")
        elif "memory" in kinds.split(","):
            base = root / "sys/fs/cgroup/memory"
            files = ("total_inactive_file", "total_active_file")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", *files)
        else:
            continue
        inner = base / path.lstrip("/")
        for folder in (inner, *inner.parents):  # a container may see its own group as the base
            limit, used = number(folder / names[0]), number(folder / names[1])
            if limit is not None and used is not None:
                cached = fields(folder / "memory.stat")
                yield limit, used - sum(cached.get(name, 0) for name in names[2:])
            if folder == base:
                break


def fields(path: Path) -> dict[str, int]:
    """The numbers of a file of lines such as "MemTotal:  24684084 kB" or "active_file 1024"; {} without the file."""
    try:
        words = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def number(path: Path) -> int | None:
    """The number in a file; None without one, and for "max", no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


# ---------------------------------------------------------------------------------------------------------------------
# From a model to a decision


def refuse_weights(auto_class: Any, config: Any, dtype: torch.dtype, device: torch.device, name: str) -> None:
    """Refuse a model whose weights alone do not fit, before they are read.

    Raises:
        OutOfMemory: the weights in `dtype` need more than the free memory of `device`.
    """
    with torch.device("meta"):  # shapes without memory
        model = auto_class.from_config(config)
    needed, room = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize, room_of(device)
    if room is None:
        return
    used = torch.cuda.memory_allocated(device) if device.type == "cuda" else held()
    if needed > (free := room.free - used):
        smaller = " or --dtype bfloat16" if dtype.itemsize > 2 else ""
        raise OutOfMemory(
            f"the weights of {name} need {in_gb(needed)} in {str(dtype).removeprefix('torch.')}, and {in_gb(free)} of "
            f"{in_gb(room.total)} are free: choose a smaller model{smaller}"
        )


def shape_of(config: Config, llm: LLM, reference: LLM | None, dataset: Dataset) -> Shape:
    """The shape of a loaded model, of its prompts, and of the process."""
    model, text = llm.model, llm.model.config.get_text_config()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    weights = sum(p.numel() * p.element_size() for one in (llm, reference) if one for p in one.model.parameters())
    prompts = encode_prompts(llm, [dataset[i] for i in range(min(PROMPTS_LOOKED_AT, len(dataset)))])
    heads = largest(getattr(text, "num_attention_heads", 1))
    head_size = getattr(text, "head_dim", None) or head.shape[1] // heads
    packed = packed_weights(llm)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    divided = 0 if llm.sharded is None else 4 * trained // config.fsdp_size  # bytes of masters that are there already
    # The trial of the sampler has packed its weights already.
    process = max(held() - weights - divided - packed * llm.dtype.itemsize, 0)
    return Shape(
        parameters=llm.num_parameters,
        trained=trained,
        size=llm.dtype.itemsize,
        layers=largest(getattr(text, "num_hidden_layers", 1)),
        hidden=head.shape[1],
        inner=largest(getattr(text, "intermediate_size", None) or 4 * head.shape[1]),
        queries=heads * head_size,
        keys=largest(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        vocabulary=head.shape[0],
        tied=head is embedding,
        head_trained=head.requires_grad,
        query_norm=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        fast=uses_fast_layers(model),
        eager=heads if llm.attn_implementation == "eager" else 0,
        on_cpu=llm.device.type == "cpu",
        prompt=min(config.max_prompt_length, int(LONGER * max(prompts.lengths))),
        patches=max((len(one["pixel_values"]) for one in prompts.vision if one), default=0),
        tower=tower_elements(getattr(model.config, "vision_config", None)),
        packed=packed,
        libraries=0 if llm.device.type == "cuda" else process + FILES if process else OTHER_LIBRARIES,
    )


def packed_weights(llm: LLM) -> int:
    """The elements that the sampler copies into oneDNN's layout for each call: see layers.product."""
    if not (layers.packs(llm.device, llm.dtype) and layers.has_fast_layers(llm.model)):
        return 0
    decoder = layers.text_model_of(llm.model).layers
    return sum(weight.numel() for weight in decoder.parameters())


FILES = int(0.3 * GB)  # of libraries, mapped into the process: resident, but the system can drop them


def largest(value: int | Sequence[int]) -> int:
    """A size that some configs give for each layer."""
    return value if isinstance(value, int) else max(value)


def tower_elements(vision: Any) -> int:
    """What the backward pass keeps of one patch, in elements: in each block of the tower two norms, query, key, value,
    their rotary forms and the result of attention, and of the MLP gate, up and their product."""
    if vision is None:
        return 0
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or int(vision.mlp_ratio * width)
    return vision.depth * (12 * width + 3 * inner)


def choose(config: Config, shape: Shape, room: Room | None, began: int | None = None) -> tuple[Config, Plan]:
    """The settings with --micro_batch_tokens as a number, and their plan.

    A number that was given stays, and so does the one that a resumed run began with: another would change the order in
    which gradients are added, and so the rounding. `auto` is else the largest of CHOICES that fits, whose activations
    are at most CPU_ACTIVATIONS on a CPU.

    Raises:
        OutOfMemory: not even the smallest choice fits, or a given number needs more than the machine has.
    """

    def planned(tokens: int) -> tuple[Config, Plan]:
        return dataclasses.replace(config, micro_batch_tokens=tokens), estimate(config, shape, tokens)

    given = config.micro_batch_tokens or began
    if given is not None:
        found = planned(given)
        if room and found[1].peak > room.total:
            raise OutOfMemory(refusal(config, shape, room, given))
        return found
    for tokens in CHOICES:
        found = planned(tokens)
        modest = not shape.on_cpu or found[1].activations <= CPU_ACTIVATIONS or tokens == CHOICES[-1]
        if modest and (room is None or room.holds(found[1])):
            return found
    assert room is not None
    raise OutOfMemory(refusal(config, shape, room, CHOICES[-1]))


def refusal(config: Config, shape: Shape, room: Room, tokens: int) -> str:
    """What is needed, what is free, and which flags would save how much, the largest saving first."""
    plan = estimate(config, shape, tokens)
    saved = savings(config, shape, tokens)
    helpful = ", ".join(f"{flag} ({in_gb(size)} less)" for flag, size in sorted(saved.items(), key=lambda x: -x[1]))
    helpful = f"these flags need less: {helpful}; or " if helpful else ""
    return (
        f"this run needs about {in_gb(plan.peak)} even with --micro_batch_tokens {tokens} (weights and optimizer "
        f"{in_gb(plan.weights + plan.masters + plan.gradients + plan.moments)}), and {in_gb(room.free)} of "
        f"{in_gb(room.total)} are free for it: {helpful}choose a smaller model"
    )


def savings(config: Config, shape: Shape, tokens: int) -> dict[str, int]:
    """What each flag alone would save; only those that save a hundredth of the whole."""
    peak = estimate(config, shape, tokens).peak
    changes: dict[str, Any] = {
        "--gradient_checkpointing": {"gradient_checkpointing": True},
        "--beta 0": {"objective": dataclasses.replace(config.objective, beta=0.0)},
    }
    names = ("prompts_per_step", "num_generations", "max_completion_length", "eval_batch_size")
    for name in names:
        fewer = max(2 if name == "num_generations" else 1, getattr(config, name) // 2)
        changes[f"--{name} {fewer}"] = {name: fewer}
    saved = {
        flag: peak - estimate(dataclasses.replace(config, **change), shape, tokens).peak
        for flag, change in changes.items()
    }
    if shape.size > 2:
        saved["--dtype bfloat16"] = peak - estimate(config, dataclasses.replace(shape, size=2), tokens).peak
    if tokens > CHOICES[-1]:
        saved[f"--micro_batch_tokens {CHOICES[-1]}"] = peak - estimate(config, shape, CHOICES[-1]).peak
    return {flag: size for flag, size in saved.items() if size > peak / 100}


def plan_run(
    config: Config, llm: LLM, reference: LLM | None, dataset: Dataset, began: int | None = None
) -> tuple[Config, dict[str, float], str]:
    """The settings with --micro_batch_tokens as a number, the plan in GB as config.json keeps it, and lines about it.
    See `choose` for `began` and errors."""
    shape, room = shape_of(config, llm, reference, dataset), room_of(llm.device)
    if room and shape.on_cpu:  # which the processes of this machine share
        room = Room(room.free // parallel.local_size(), room.total // parallel.local_size())
    resolved, plan = choose(config, shape, room, began)
    fewest = -int(parallel.most(-(resolved.micro_batch_tokens or 0)))  # the same number in all processes
    resolved = dataclasses.replace(resolved, micro_batch_tokens=fewest)
    sizes = {"peak": plan.peak} | ({"free": room.free} if room else {}) | dataclasses.asdict(plan)
    how = "as given" if config.micro_batch_tokens else "as the run began" if began else "auto"
    text = plan_lines(resolved, how, plan, room)
    return resolved, {name: round(size / GB, 3) for name, size in sizes.items()}, text


def plan_lines(config: Config, how: str, plan: Plan, room: Room | None) -> str:
    """The plan, for people; with a warning if it leaves less than MARGIN free. `how` the number was chosen."""
    parts = {name.replace("_", " "): size for name, size in dataclasses.asdict(plan).items() if size >= GB / 200}
    lines = [f"memory: about {in_gb(plan.peak)} at the peak" + (f", {in_gb(room.free)} free" if room else "")]
    lines[0] += f": {', '.join(f'{name} {size / GB:.2f}' for name, size in parts.items())}"
    if not config.eval_only:
        lines.append(f"micro-batches of up to {config.micro_batch_tokens:,} tokens ({how})")
    if room and not room.holds(plan):
        lines.append(
            f"warning: this leaves less than {MARGIN:.0%} of the free memory, so the run may end for lack of it; "
            "smaller --micro_batch_tokens need less"
        )
    return "\n".join(lines)


def in_gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / GB:.3f} GB"
