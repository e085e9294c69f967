"""One table for one GPU: how fast could it be, how fast is it, and how much memory does it take?

    uv run benchmarks/gpu.py                 # a GPU, under nine minutes
    uv run benchmarks/gpu.py --dry_run       # the same at tiny sizes on a CPU: shows only that it runs

In this order, each printed as soon as it is measured:

1. the two floors of this GPU: the bandwidth of a large copy, and the rate of large matrix products;
2. decoding: tokens per second, and the time of a token step over the time to read the weights and the used part of the
   key-value cache once;
3. loss and gradients: tokens per second, and the share of the rate of matrix products;
4. whole steps with the time and the peak memory of each;
5. the first of these steps in TRL, where it is installed.

docs/gpu.md has the figures to expect on one H100, and the arithmetic behind them.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import PRESETS, Preset, Worker, examples_of, make_model, median_of_ratios, synchronize, table, timed

if TYPE_CHECKING:
    import torch

    from llms import LLM

FLAGS = "--model_path preset --dataset_name arithmetic --beta 0 --max_steps 1"


@dataclass(frozen=True)
class Plan:
    """What is measured: presets of a text and a vision model, rows and lengths of decoding, shapes of whole steps.

    steps: (preset, Q prompts, G completions, tokens of each). copied: bytes. side: of the square matrices.
    """

    text: str
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    steps: tuple[tuple[str, int, int, int], ...]
    copied: int
    side: int
    rounds: int


FULL = Plan(
    "qwen2.5-1.5b",
    rows=(64, 128, 256, 512),
    lengths=(256, 1024),
    steps=(("qwen2.5-1.5b", 8, 16, 256), ("qwen2.5-1.5b", 4, 16, 786), ("qwen2.5-vl-3b", 4, 16, 128)),
    copied=2**30,
    side=8192,
    rounds=3,
)
DRY = Plan(
    "tiny-text",
    rows=(4, 8),
    lengths=(8, 24),
    steps=(("tiny-text", 2, 4, 16), ("tiny-vision", 1, 4, 8)),
    copied=2**24,
    side=256,
    rounds=1,
)


@dataclass(frozen=True)
class Floors:
    """bandwidth: bytes per second, read and written. rate: floating-point operations per second."""

    bandwidth: float
    rate: float


def measure_floors(plan: Plan, device: str, dtype: torch.dtype) -> Floors:
    """The best of several copies, and of several matrix products in `dtype`."""
    import torch

    source = torch.zeros(plan.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left = torch.randn(plan.side, plan.side, device=device).to(dtype)
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(10))
    product = min(timed(lambda: left @ left, device) for _ in range(10))
    return Floors(2 * plan.copied / copy, 2 * plan.side**3 / product)


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that the arithmetic needs, in elements and operations."""

    weights: int  # of the layers: read in each token step, together with the head's
    head: int
    cache: int  # elements that one token adds to the key-value cache
    attention: int  # operations of one query token for each key that it sees

    @staticmethod
    def of(model: Any) -> Shape:
        import layers

        text = model.config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        decoder = layers.text_model_of(model)
        return Shape(
            weights=sum(p.numel() for p in decoder.layers.parameters()),
            head=model.get_output_embeddings().weight.numel(),
            cache=2 * text.num_hidden_layers * text.num_key_value_heads * size,
            attention=4 * text.num_hidden_layers * text.num_attention_heads * size,
        )

    def step_bytes(self, rows: int, slots: float, itemsize: int) -> float:
        """Read in one token step: the weights once, and `slots` tokens of each row's cache."""
        return itemsize * (self.weights + self.head + self.cache * rows * slots)

    def loss_operations(self, prompts: int, prompt: int, rows: int, length: int) -> float:
        """Of the loss and its gradients: 2 per weight and token forward, twice that backward; attention the same with
        half of the keys visible; the head's logits are computed once more in the backward pass."""
        tokens = prompts * prompt + rows * length
        seen = prompts * prompt * prompt / 2 + rows * length * (prompt + length / 2)
        return 6 * self.weights * tokens + 8 * self.head * rows * length + 3 * self.attention * seen


def decode_rows(llm: LLM, plan: Plan, preset: Preset, floors: Floors) -> list[list[str]]:
    """A row of the table for each number of rows and each length."""
    from prompts import encode_prompts
    from rollout import Sampler

    sampler, shape, device, found = Sampler(llm, seed=0), Shape.of(llm.model), preset.device, []
    for length in plan.lengths:
        for rows in plan.rows:
            G = min(16, rows)
            prompts = encode_prompts(llm, examples_of(preset, rows // G)).to(llm.device)

            def sample(prompts: Any = prompts, G: int = G, length: int = length) -> None:
                sampler.sample(prompts, G, length, temperature=1.0, ignore_eos=True)

            sample()  # captures the graphs
            step = statistics.median(timed(sample, device) for _ in range(plan.rounds)) / length
            slots = prompts.ids.shape[1] + length / 2
            floor = shape.step_bytes(rows, slots, llm.dtype.itemsize) / floors.bandwidth
            cells = [f"{rows / step:,.0f}", f"{1e3 * step:.2f}", f"{1e3 * floor:.2f}", f"{step / floor:.2f}"]
            found.append([f"{rows} rows × {length} tokens", *cells])
    return found


def loss_row(llm: LLM, preset: Preset, floors: Floors, rounds: int) -> list[str]:
    """Loss and gradients of one step's completions."""
    import torch

    import main
    from config import parse_args
    from prompts import encode_prompts
    from rollout import Sampler

    G, length = preset.generations, preset.length
    config = parse_args([*FLAGS.split(), "--micro_batch_tokens", str(preset.micro_batch_tokens)])
    prompts = encode_prompts(llm, examples_of(preset, preset.prompts)).to(llm.device)
    rollout = Sampler(llm, seed=0).sample(prompts, G, length, ignore_eos=True)
    advantages = torch.randn(len(rollout.completion_ids), device=llm.device)

    def gradients() -> None:
        main.accumulate_gradients(config, llm, rollout, advantages, rollout.sampled_mask, None, None)
        llm.model.zero_grad(set_to_none=True)

    gradients()
    seconds = statistics.median(timed(gradients, preset.device) for _ in range(rounds))
    rows = preset.prompts * G
    operations = Shape.of(llm.model).loss_operations(preset.prompts, prompts.ids.shape[1], rows, length)
    share = operations / seconds / floors.rate
    return [f"{rows} × {length}", f"{seconds:.2f}", f"{rows * length / seconds:,.0f}", f"{100 * share:.0f} %"]


def step_row(name: str, preset: Preset, folder: str, rounds: int) -> tuple[list[str], list[float]]:
    """A row for whole steps in their own process, and their seconds."""
    from step_vs_trl import our_side

    worker = Worker(our_side, preset, folder)
    worker.ready()
    seconds = worker.steps(rounds)
    shape = f"{name}, {preset.prompts} × {preset.generations} × {preset.length}"
    tokens = preset.prompts * preset.generations * preset.length / statistics.median(seconds)
    return [shape, f"{statistics.median(seconds):.2f}", f"{tokens:,.0f}", f"{worker.end():.1f}"], seconds


def trl_line(preset: Preset, folder: str, ours: list[float]) -> str:
    """The same step in TRL, and the ratio of the two times."""
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
        return "TRL: left out, since the packages trl and datasets are not both installed"
    from step_vs_trl import trl_side

    worker = Worker(trl_side, preset, folder)
    worker.ready()
    seconds = worker.steps(len(ours))
    ratio = median_of_ratios(seconds, ours)
    return f"TRL: {statistics.median(seconds):.2f} s a step, {worker.end():.1f} GB; here {ratio:.2f} × as fast"


def free(device: str) -> None:
    """Give memory back before other processes need it."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure_one_model(plan: Plan, folder: Path) -> None:
    """Floors, decoding, loss and gradients of the text model."""
    import torch

    from llms import load_llm

    preset = PRESETS[plan.text]
    llm = load_llm(str(make_model(preset, folder)), preset.device, preset.dtype)
    floors = measure_floors(plan, preset.device, getattr(torch, preset.dtype))
    print(f"copy: {floors.bandwidth / 1e9:,.0f} GB/s; products: {floors.rate / 1e12:.2f} TFLOP/s\n", flush=True)
    head = ["decoding", "tokens/s", "ms a token step", "floor, ms", "step / floor"]
    print(table(head, decode_rows(llm, plan, preset, floors)), end="\n\n", flush=True)
    head = ["loss and gradients", "seconds", "tokens/s", "of the rate of products"]
    shapes = [step[1:] for step in plan.steps if step[0] == plan.text]
    presets = [dataclasses.replace(preset, prompts=Q, generations=G, length=length) for Q, G, length in shapes]
    print(table(head, [loss_row(llm, one, floors, plan.rounds) for one in presets]), end="\n\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes on a CPU")
    plan = DRY if parser.parse_args().dry_run else FULL

    import torch

    if plan is FULL and not torch.cuda.is_available():
        raise SystemExit("gpu.py: torch finds no GPU here; --dry_run runs the same at tiny sizes on a CPU")
    print(f"{torch.cuda.get_device_name() if plan is FULL else 'CPU'}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as scratch:
        measure_one_model(plan, Path(scratch) / plan.text)
        free(PRESETS[plan.text].device)
        rows, first = [], None
        for name, Q, G, length in plan.steps:
            preset = dataclasses.replace(PRESETS[name], prompts=Q, generations=G, length=length)
            folder = Path(scratch) / name
            if not folder.exists():
                make_model(preset, folder)
                free(preset.device)
            row, seconds = step_row(name, preset, str(folder), plan.rounds)
            rows.append(row)
            first = first or (preset, str(folder), seconds)
        print(table(["whole step", "seconds", "tokens/s", "peak memory, GB"], rows), end="\n\n", flush=True)
        assert first is not None
        print(trl_line(*first))
        synchronize(first[0].device)


if __name__ == "__main__":
    main()
