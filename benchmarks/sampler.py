"""Tokens per second of the sampler, of transformers' `generate`, and of its continuous batching where it runs.

    uv run benchmarks/sampler.py --preset tiny-text

All sample Q·G completions of exactly the same length from the same prompts at temperature 1, without filters; they take
turns. On CUDA also how near the decode step is to the floor: the weights and the used part of the key-value cache read
once per token step at the bandwidth that a large copy reaches on this device.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from common import PRESETS, Preset, examples_of, make_model, synchronize, table


def sides(preset: Preset, folder: str):
    """-> {name: a function that samples once}, the model and its prompts."""
    import torch

    from llms import encode_prompts, load_llm
    from rollout import sample

    llm = load_llm(folder, preset.device, preset.dtype)
    examples = examples_of(preset, preset.prompts)
    generator = torch.Generator(llm.device).manual_seed(0)
    prompts = encode_prompts(llm, examples)
    moved, G = prompts.to(llm.device), preset.generations
    inputs = {
        "input_ids": moved.ids.repeat_interleave(G, 0),
        "attention_mask": moved.mask.long().repeat_interleave(G, 0),
    }
    if llm.is_vision:
        rows = [one for one in moved.vision for _ in range(G)]
        inputs |= {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == llm.model.config.image_token_id).int()
    length = {"max_new_tokens": preset.length, "min_new_tokens": preset.length}

    def ours():
        sample(llm, prompts, G, preset.length, 1.0, generator, ignore_eos=True)

    @torch.inference_mode()
    def generate():
        llm.model.generate(**inputs, **length, do_sample=True, top_k=0, pad_token_id=llm.pad_token_id)

    return {"here": ours, "generate": generate, "continuous batching": continuous(llm, moved, preset)}, llm, moved


def continuous(llm, prompts, preset: Preset):
    """transformers' own continuous batching, as a function, or the reason why it does not run here."""
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

    def run():
        results = llm.model.generate_batch(inputs=rows, generation_config=config, progress_bar=False)
        produced = sum(len(result.generated_tokens) for result in results.values())
        if produced < len(rows) * preset.length:
            raise RuntimeError(f"only {produced} tokens came back")

    return run


def floor_seconds(llm, prompts, preset: Preset) -> float:
    """The least a token step can take: weights and the mean used cache read once, at the bandwidth of a large copy."""
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
    bandwidth = 10 * 2 * source.numel() / (start.elapsed_time(end) / 1e3)  # bytes a second, read and written
    text = llm.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    used = prompts.ids.shape[1] + preset.length / 2
    rows = preset.prompts * preset.generations
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head * used * rows * llm.dtype.itemsize
    decoder = getattr(llm.model.base_model, "language_model", llm.model.base_model)
    weights = sum(p.numel() for p in decoder.parameters()) * llm.dtype.itemsize
    return (weights + cache) / bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny-text")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    with tempfile.TemporaryDirectory() as scratch:
        functions, llm, prompts = sides(preset, str(make_model(preset, Path(scratch) / "model")))
    times: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}
    for number in range(args.rounds + 1):
        for name, function in functions.items():
            if isinstance(function, str) or name in left_out:
                left_out.setdefault(name, function if isinstance(function, str) else "")
                continue
            try:
                synchronize(preset.device)
                start = time.perf_counter()
                function()
                synchronize(preset.device)
            except Exception as error:  # another library's feature: say that it does not run, and go on without it
                left_out[name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
                continue
            if number:
                times.setdefault(name, []).append(time.perf_counter() - start)
    tokens = preset.prompts * preset.generations * preset.length
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        [name, f"{tokens / t:,.0f}", f"{1e3 * t / preset.length:.2f}", f"{t / medians['here']:.2f}"]
        for name, t in medians.items()
    ]
    rows += [[name, why, "", ""] for name, why in left_out.items()]
    shape = f"{preset.prompts} × {preset.generations} × {preset.length} tokens"
    print(f"{args.preset}: {shape}, {preset.dtype}, {preset.device}")
    print(table(["", "tokens/s", "ms a token step", "time / ours"], rows))
    if "generate" in times:
        ratio = statistics.median(t / o for o, t in zip(times["here"], times["generate"], strict=True))
        print(f"ratio: {ratio:.2f} × generate's tokens/s")
    if preset.device == "cuda":
        floor = floor_seconds(llm, prompts, preset)
        print(
            f"floor: {1e3 * floor:.2f} ms a token step; here {medians['here'] / preset.length / floor:.2f} × the floor"
        )


if __name__ == "__main__":
    main()
