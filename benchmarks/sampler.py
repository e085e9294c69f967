"""Tokens per second of the sampler, of transformers' `generate`, and of its continuous batching where that runs.

    uv run benchmarks/sampler.py --preset tiny-text

Each samples Q·G completions of exactly the same length from the same prompts at temperature 1, without filters; they
take turns. On CUDA the decode step is also compared with a lower bound: the time to read the weights and the used part
of the key-value cache once per token step, at the bandwidth of a large copy on this device.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common import Preset, add_preset_flags, chosen_preset, examples_of, make_model, median_of_ratios, table, timed

if TYPE_CHECKING:
    from llms import LLM, Prompts

Run = Callable[[], object]  # samples once


def sides(llm: LLM, prompts: Prompts, preset: Preset) -> dict[str, Run | str]:
    """A function that samples once for each way of sampling, or the reason why that way does not run here."""
    import torch

    from rollout import Sampler

    G = preset.generations
    inputs = {
        "input_ids": prompts.ids.repeat_interleave(G, 0),  # (B, P)
        "attention_mask": prompts.mask.long().repeat_interleave(G, 0),  # (B, P)
    }
    if llm.is_vision:
        rows = [pictures for pictures in prompts.vision for _ in range(G)]
        inputs |= {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == llm.model.config.image_token_id).int()
    length = {"max_new_tokens": preset.length, "min_new_tokens": preset.length}
    sampler = Sampler(llm, seed=0)

    def here() -> object:
        return sampler.sample(prompts, G, preset.length, temperature=1.0, ignore_eos=True)

    @torch.inference_mode()
    def generate() -> object:
        return llm.model.generate(**inputs, **length, do_sample=True, top_k=0, pad_token_id=llm.pad_token_id)

    return {"here": here, "generate": generate, "continuous batching": continuous_batching(llm, prompts, preset)}


def continuous_batching(llm: LLM, prompts: Prompts, preset: Preset) -> Run | str:
    """A function that samples once with transformers' continuous batching, or the reason why it does not run here."""
    if llm.is_vision:
        return "takes text only"
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=preset.length,
        min_new_tokens=preset.length,
        do_sample=True,
        eos_token_id=-1,
        pad_token_id=llm.pad_token_id,
    )
    rows = [
        ids[mask].tolist()
        for ids, mask in zip(prompts.ids, prompts.mask, strict=True)
        for _ in range(preset.generations)
    ]

    def run() -> None:
        results = llm.model.generate_batch(inputs=rows, generation_config=config, progress_bar=False)
        produced = sum(len(result.generated_tokens) for result in results.values())
        if produced < len(rows) * preset.length:
            raise RuntimeError(f"only {produced} tokens came back")

    return run


def lower_bound(llm: LLM, prompts: Prompts, preset: Preset) -> float:
    """Seconds to read the weights and, on average over the steps, the used cache once, at a large copy's bandwidth."""
    import torch

    source = torch.empty(2**30, dtype=torch.uint8, device=llm.device)
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    bandwidth = 10 * 2 * source.numel() / (start.elapsed_time(end) / 1e3)  # bytes per second, read and written
    text = llm.model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    used = prompts.ids.shape[1] + preset.length / 2  # cache slots, on average
    rows = preset.prompts * preset.generations
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head * used * rows * llm.dtype.itemsize
    decoder = getattr(llm.model.base_model, "language_model", llm.model.base_model)
    weights = sum(p.numel() for p in decoder.parameters()) * llm.dtype.itemsize
    return (weights + cache) / bandwidth


def measure(ways: dict[str, Run | str], rounds: int, device: str) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The seconds of each way that runs, once per round after a warm-up round, and the reasons of the others."""
    reasons = {name: way for name, way in ways.items() if isinstance(way, str)}
    times: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name in [name for name in ways if name not in reasons]:
            try:
                seconds = timed(ways[name], device)
            except Exception as error:  # a feature of another library: report that it does not run
                reasons[name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
                times.pop(name, None)
                continue
            if number:
                times.setdefault(name, []).append(seconds)
    return times, reasons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preset_flags(parser)
    parser.add_argument("--rounds", type=int, default=7, help="how often each side samples, in turns")
    args = parser.parse_args()

    from llms import load_llm
    from prompts import encode_prompts

    preset = chosen_preset(args)
    with tempfile.TemporaryDirectory() as scratch:
        llm = load_llm(str(make_model(preset, Path(scratch) / "model")), preset.device, preset.dtype)
    prompts = encode_prompts(llm, examples_of(preset, preset.prompts)).to(llm.device)
    times, reasons = measure(sides(llm, prompts, preset), args.rounds, preset.device)
    tokens = preset.prompts * preset.generations * preset.length
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        [name, f"{tokens / t:,.0f}", f"{1e3 * t / preset.length:.2f}", f"{t / medians['here']:.2f}"]
        for name, t in medians.items()
    ]
    rows += [[name, reason, "", ""] for name, reason in reasons.items()]
    shape = f"{preset.prompts} × {preset.generations} × {preset.length} tokens"
    print(f"{args.preset}: {shape}, {preset.dtype}, {preset.device}")
    print(table(["", "tokens/s", "ms per token step", "time / ours"], rows))
    if "generate" in times:
        print(f"ratio: {median_of_ratios(times['generate'], times['here']):.2f} × generate's tokens/s")
    if preset.device == "cuda":
        bound, step = lower_bound(llm, prompts, preset), medians["here"] / preset.length
        print(f"lower bound: {1e3 * bound:.2f} ms per token step; here {step / bound:.2f} × that")


if __name__ == "__main__":
    main()
