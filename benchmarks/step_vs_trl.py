"""One GRPO step here and in TRL's GRPOTrainer: same weights, prompts, group size, β, completion lengths, dtype.

    uv run benchmarks/step_vs_trl.py --preset tiny-text

Completions are forced to the same length on both sides (no end of sequence), so that the work is equal: sample Q·G
completions, score them, reference log-probabilities (β 0.04), loss, gradients, AdamW. Each side runs in a process of
its own and they take turns, round by round; on a GPU one after the other, since both would not fit. The first step of
each round is left out: TRL's `train()` sets itself up in it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from common import PRESETS, ROOT, Preset, Worker, examples_of, make_model, peak_gb, synchronize, table

LEARNING_RATE, BETA = 1e-6, 0.04


def score(text: str) -> float:
    """A reward that costs nothing and differs between completions."""
    return (sum(map(ord, text)) % 97) / 97


def our_side(connection, preset: Preset, folder: str) -> None:
    import torch

    import main
    from llms import encode_prompts, load_llm
    from rollout import sample

    flags = ["--model_path", folder, "--dataset_name", preset.task, "--learning_rate", str(LEARNING_RATE)]
    flags += ["--beta", str(BETA), "--micro_batch_tokens", str(preset.micro_batch_tokens)]
    args = main.parse_args([*flags, "--max_completion_length", str(preset.length)])
    llm = load_llm(folder, preset.device, preset.dtype)
    reference = load_llm(folder, preset.device, preset.dtype).model.requires_grad_(False)
    weights = main.MasterWeights(llm.model)
    optimizer = main.make_optimizer(weights, llm.device, args)
    generator = torch.Generator(llm.device).manual_seed(0)
    examples = examples_of(preset, 64)

    def step(number: int) -> None:
        chosen = [examples[(number * preset.prompts + i) % len(examples)] for i in range(preset.prompts)]
        prompts = encode_prompts(llm, chosen)
        rollout = sample(llm, prompts, preset.generations, preset.length, 1.0, generator, ignore_eos=True)
        rewards = torch.tensor([score(text) for text in rollout.texts])  # (B,)
        advantages = main.group_advantages(rewards, preset.generations).to(llm.device)  # (B,)
        plan = main.plan_of(rollout, args)
        ref_logps = main.reference_logps(llm, reference, rollout, plan, args)  # (B, T)
        loss, _, _ = main.accumulate_gradients(
            llm, rollout, advantages, rollout.completion_mask, None, ref_logps, plan, args
        )
        main.update(optimizer, weights, loss, LEARNING_RATE, 1.0)

    connection.send("ready")
    done = 0
    while (count := connection.recv()) is not None:
        times = []
        for _ in range(count + 1):
            synchronize(preset.device)
            start = time.perf_counter()
            step(done)
            synchronize(preset.device)
            times.append(time.perf_counter() - start)
            done += 1
        connection.send(times[1:])
    connection.send(peak_gb(preset.device))


def trl_side(connection, preset: Preset, folder: str) -> None:
    import logging

    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl import GRPOConfig, GRPOTrainer

    logging.disable(logging.WARNING)

    class Stopwatch(TrainerCallback):
        def __init__(self):
            self.times = []

        def on_step_begin(self, *args, **kwargs):
            synchronize(preset.device)
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            synchronize(preset.device)
            self.times.append(time.perf_counter() - self.start)

    examples = examples_of(preset, 64)
    vision = bool(examples[0].images)
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=getattr(torch, preset.dtype), attn_implementation="sdpa")
    rows = {"prompt": [example.messages for example in examples]}
    if vision:  # TRL puts the pictures into the messages itself
        texts = [
            [m["content"][-1]["text"] if m["role"] == "user" else m["content"] for m in e.messages] for e in examples
        ]
        rows["prompt"] = [
            [{"role": m["role"], "content": text} for m, text in zip(e.messages, parts, strict=True)]
            for e, parts in zip(examples, texts, strict=True)
        ]
        rows["image"] = [example.images[0] for example in examples]
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=min(preset.prompts * preset.generations, 16 if preset.model else 64),
            gradient_accumulation_steps=max(1, preset.prompts * preset.generations // 16) if preset.model else 1,
            num_generations=preset.generations,
            max_completion_length=preset.length,
            generation_kwargs={"min_new_tokens": preset.length},
            beta=BETA,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            temperature=1.0,
            top_k=0,
            max_steps=1,
            bf16=preset.dtype == "bfloat16",
            gradient_checkpointing=False,
            use_cpu=preset.device == "cpu",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        stopwatch = Stopwatch()
        trainer = GRPOTrainer(
            model=model,
            args=config,
            processing_class=(AutoProcessor if vision else AutoTokenizer).from_pretrained(folder),
            train_dataset=Dataset.from_dict(rows),
            reward_funcs=[lambda completions, **_: [score(completion[0]["content"]) for completion in completions]],
            callbacks=[stopwatch],
        )
        connection.send("ready")
        while (count := connection.recv()) is not None:
            stopwatch.times.clear()
            trainer.args.max_steps = count + 1
            trainer.train()
            connection.send(stopwatch.times[1:])
        connection.send(peak_gb(preset.device))


def compare(name: str, rounds: int, steps: int) -> str:
    preset = PRESETS[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(make_model(preset, Path(scratch) / "model"))
        sides, times, peaks = {"here": our_side, "TRL": trl_side}, {"here": [], "TRL": []}, {}
        if preset.device == "cpu":
            workers = {side: Worker(target, preset, folder) for side, target in sides.items()}
            for worker in workers.values():
                worker.ready()
            for _ in range(rounds):
                for side, worker in workers.items():
                    times[side].append(statistics.median(worker.steps(steps)))
            peaks = {side: worker.end() for side, worker in workers.items()}
        else:
            for side, target in sides.items():
                worker = Worker(target, preset, folder)
                worker.ready()
                times[side] = [statistics.median(worker.steps(steps)) for _ in range(rounds)]
                peaks[side] = worker.end()
    tokens = preset.prompts * preset.generations * preset.length
    rows = []
    for side in sides:
        median, rates = statistics.median(times[side]), [1 / t for t in times[side]]
        spread = f"{1 / median:.2f} ({min(rates):.2f} to {max(rates):.2f})"
        rows.append([side, f"{median:.3f}", spread, f"{tokens / median:,.0f}", f"{peaks[side]:.2f}"])
    ratio = statistics.median(theirs / ours for ours, theirs in zip(times["here"], times["TRL"], strict=True))
    shape = f"{preset.prompts} prompts × {preset.generations} completions × {preset.length} tokens"
    head = ["", "s a step", "steps/s (of rounds)", "tokens/s", "peak memory, GB"]
    what = f"{name}: {shape}, {preset.dtype}, {preset.device}; {rounds} rounds of {steps} steps"
    return f"{what}\n{table(head, rows)}\nratio: {ratio:.2f} × TRL's steps/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny-text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round")
    args = parser.parse_args()
    print(compare(args.preset, args.rounds, args.steps))


if __name__ == "__main__":
    assert (ROOT / "main.py").is_file()
    main()
