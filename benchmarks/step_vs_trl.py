"""One GRPO step here and in TRL's GRPOTrainer: same weights, prompts, group size, β, completion lengths and dtype.

    uv run benchmarks/step_vs_trl.py --preset tiny-text

Both sides sample completions of the same fixed length, without an end of sequence, so that the work is equal: sample
Q·G completions, score them, reference log-probabilities (β 0.04), loss, gradients, AdamW. Each side runs in its own
process. On a CPU they take turns, round by round; on a GPU one runs after the other, since both would not fit into its
memory. The first step of each round is not counted, because TRL's `train()` sets up its state there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common import (
    Preset,
    Worker,
    add_preset_flags,
    chosen_preset,
    examples_of,
    make_model,
    median_of_ratios,
    serve,
    synchronize,
    table,
    timed,
)

LEARNING_RATE, BETA = 1e-6, 0.04
NUM_EXAMPLES = 64  # that the steps take their prompts from, in turn


def score(text: str) -> float:
    """A cheap reward that differs between completions."""
    return (sum(map(ord, text)) % 97) / 97


def our_side(connection: Connection, preset: Preset, folder: str) -> None:
    """A worker that runs the steps of this repository."""
    import torch

    import main
    from config import parse_args
    from llms import load_llm
    from logprobs import reference_logps
    from optimizer import MasterAdamW
    from prompts import encode_prompts
    from rollout import Sampler
    from run import peak_memory_gb

    flags = f"--learning_rate {LEARNING_RATE} --beta {BETA} --max_completion_length {preset.length} --max_steps 1000"
    flags += f" --num_generations {preset.generations} --micro_batch_tokens {preset.micro_batch_tokens}"
    config = parse_args(["--model_path", folder, "--dataset_name", preset.task, *flags.split()])
    llm = load_llm(folder, preset.device, preset.dtype)
    reference = load_llm(folder, preset.device, preset.dtype).model.requires_grad_(False)
    optimizer, sampler = MasterAdamW(llm.model, config), Sampler(llm, seed=0)
    examples = examples_of(preset, NUM_EXAMPLES)

    def step() -> None:
        prompts = encode_prompts(llm, examples[: preset.prompts])
        examples.extend(examples[: preset.prompts])
        del examples[: preset.prompts]
        rollout = sampler.sample(prompts, preset.generations, preset.length, temperature=1.0, ignore_eos=True)
        rewards = torch.tensor([score(text) for text in rollout.texts])  # (B,)
        advantages = main.group_advantages(rewards, preset.generations).to(llm.device)  # (B,)
        ref_logps = reference_logps(llm, reference, rollout, config)  # (B, T)
        mask = rollout.sampled_mask  # (B, T)
        loss, _, _ = main.accumulate_gradients(config, llm, rollout, advantages, mask, None, ref_logps)
        optimizer.step(loss)

    def run(count: int) -> list[float]:
        return [timed(step, preset.device) for _ in range(count + 1)][1:]

    serve(connection, run, lambda: peak_memory_gb(llm.device))


def trl_side(connection: Connection, preset: Preset, folder: str) -> None:
    """A worker that runs the steps of TRL."""
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
    from trl import GRPOTrainer

    from run import peak_memory_gb

    logging.disable(logging.WARNING)

    class StepTimes(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            synchronize(preset.device)
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronize(preset.device)
            self.seconds.append(time.perf_counter() - self.start)

    rows = trl_rows(preset)
    auto = AutoModelForImageTextToText if "image" in rows else AutoModelForCausalLM
    times = StepTimes()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model=auto.from_pretrained(folder, dtype=getattr(torch, preset.dtype), attn_implementation="sdpa"),
            args=trl_config(preset, scratch),
            processing_class=(AutoProcessor if "image" in rows else AutoTokenizer).from_pretrained(folder),
            train_dataset=Dataset.from_dict(rows),
            reward_funcs=[lambda completions, **_: [score(completion[0]["content"]) for completion in completions]],
            callbacks=[times],
        )

        def run(count: int) -> list[float]:
            times.seconds.clear()
            trainer.args.max_steps = count + 1
            trainer.train()
            return times.seconds[1:]

        serve(connection, run, lambda: peak_memory_gb(torch.device(preset.device)))


def trl_rows(preset: Preset) -> dict[str, list]:
    """The examples as columns of TRL's dataset; TRL itself puts the placeholders of pictures into the messages."""
    examples = examples_of(preset, NUM_EXAMPLES)
    if not examples[0].images:
        return {"prompt": [example.messages for example in examples]}

    def text(content: str | list[dict]) -> str:
        return content if isinstance(content, str) else content[-1]["text"]

    return {
        "prompt": [
            [{"role": message["role"], "content": text(message["content"])} for message in example.messages]
            for example in examples
        ],
        "image": [example.images[0] for example in examples],
    }


def trl_config(preset: Preset, folder: str) -> Any:
    """TRL's settings for the preset's step, without logs and checkpoints."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
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


def compare(name: str, preset: Preset, rounds: int, steps: int) -> str:
    """The table of `rounds` rounds of `steps` steps of each side."""
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
    ratio = median_of_ratios(times["TRL"], times["here"])
    shape = f"{preset.prompts} prompts × {preset.generations} completions × {preset.length} tokens"
    head = ["", "seconds per step", "steps/s (range over rounds)", "tokens/s", "peak memory, GB"]
    title = f"{name}: {shape}, {preset.dtype}, {preset.device}; {rounds} rounds of {steps} steps"
    return f"{title}\n{table(head, rows)}\nratio: {ratio:.2f} × TRL's steps/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preset_flags(parser)
    parser.add_argument("--rounds", type=int, default=5, help="how often the sides take turns")
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round")
    args = parser.parse_args()
    print(compare(args.preset, chosen_preset(args), args.rounds, args.steps))


if __name__ == "__main__":
    main()
