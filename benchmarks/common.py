"""Shared by the benchmarks: presets, models with random weights saved to a folder, and workers that take turns."""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from rldatasets import Example


@dataclass(frozen=True)
class Preset:
    """A model and the shape of a step: Q prompts × G completions of exactly `length` tokens each."""

    task: str
    prompts: int
    generations: int
    length: int
    model: dict[str, Any] | None  # configuration of the text model; None: that of the task's tiny model
    vision: dict[str, Any] | None = None  # configuration of the vision tower
    device: str = "cpu"
    dtype: str = "float32"
    micro_batch_tokens: int = 8192


SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
}
QWEN_0_5B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
}
QWEN_1_5B = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
}
QWEN_VL_3B = {
    **QWEN_1_5B,
    "model_type": "qwen2_5_vl_text",
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "intermediate_size": 11_008,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
QWEN_VL_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "out_hidden_size": 2048,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
PRESETS = {
    "tiny-text": Preset("arithmetic", 4, 16, 128, None),
    "tiny-vision": Preset("correlation", 4, 16, 32, None),
    "smollm2-135m": Preset("arithmetic", 2, 8, 64, SMOLLM2_135M, dtype="bfloat16"),
    "qwen2.5-0.5b": Preset("arithmetic", 2, 8, 64, QWEN_0_5B, dtype="bfloat16", micro_batch_tokens=2048),
    "qwen2.5-1.5b": Preset("arithmetic", 1, 16, 786, QWEN_1_5B, device="cuda", dtype="bfloat16"),
    "qwen2.5-vl-3b": Preset("correlation", 2, 8, 128, QWEN_VL_3B, QWEN_VL_TOWER, device="cuda", dtype="bfloat16"),
}


def add_preset_flags(parser: argparse.ArgumentParser, default: str = "tiny-text") -> None:
    """--preset, and the flags that change its dtype and the shape of its step."""
    parser.add_argument("--preset", choices=PRESETS, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="another dtype than the preset's")
    for name, what in (("prompts", "Q"), ("generations", "G"), ("length", "tokens of each completion")):
        parser.add_argument(f"--{name}", type=int, help=f"another number than the preset's: {what}")


def chosen_preset(args: argparse.Namespace) -> Preset:
    names = ("dtype", "prompts", "generations", "length")
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    return dataclasses.replace(PRESETS[args.preset], **changes)


def make_model(preset: Preset, folder: Path) -> Path:
    """Save a model of the preset's shape with random weights, and the tokenizer or processor of the tiny model."""
    import torch

    import tiny_models
    from llms import quiet_transformers
    from rldatasets import get_dataset

    quiet_transformers()
    torch.manual_seed(0)
    recipe = tiny_models.RECIPES[preset.task]
    dataset = get_dataset(preset.task, "train", 2000, options=picture_options(preset))
    tokenizer = tiny_models.build_tokenizer(dataset, recipe)
    model, processor = tiny_models.build_model(dataset, recipe, tokenizer)
    if preset.model:
        torch.set_default_dtype(getattr(torch, preset.dtype))
        with torch.device(preset.device):
            model = large_model(preset, model, processor)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    (processor or tokenizer).save_pretrained(folder)
    return folder


def large_model(preset: Preset, tiny: PreTrainedModel, processor: ProcessorMixin | None) -> PreTrainedModel:
    """A model of the preset's configuration with the token ids of the tiny one; adapts the processor's patch size."""
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {name: getattr(tiny.config.get_text_config(), name) for name in ("eos_token_id", "pad_token_id")}
    if processor is None:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**preset.model, tie_word_embeddings=True, **ids))
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids |= {name: getattr(tiny.config, name) for name in names}
    pictures = processor.image_processor
    pictures.patch_size, pictures.temporal_patch_size = 14, 2
    pictures.size = {"shortest_edge": 224 * 224, "longest_edge": 224 * 224}
    config = Qwen2_5_VLConfig(text_config=preset.model, vision_config=preset.vision, tie_word_embeddings=True, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)


def picture_options(preset: Preset) -> dict[str, Any]:
    """Options of a task with pictures: 224 pixels for the models of real size, 56 for the tiny ones."""
    from rldatasets import DATASETS

    if DATASETS[preset.task].modality == "text":
        return {}
    return {"size": 224 if preset.vision else 56, "style": "bold"}


def examples_of(preset: Preset, count: int) -> list[Example]:
    """The first examples of the preset's training split."""
    from rldatasets import get_dataset

    dataset = get_dataset(preset.task, "train", count, options=picture_options(preset))
    return [dataset[index] for index in range(count)]


def synchronize(device: str) -> None:
    """Wait until the GPU has finished; nothing to wait for on a CPU."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def timed(step: Callable[[], object], device: str) -> float:
    """The seconds that a call takes."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


class Worker:
    """One side of a comparison in another process, so that its peak memory is its own; it waits while others run.

    `target(connection, *args)` sends "ready". It answers each number n with the seconds of n steps, and None with its
    peak memory in GB, after which it ends: see `serve`.
    """

    def __init__(self, target: Callable[..., None], *args: Any):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=target, args=(other, *args), daemon=True)
        self.process.start()
        other.close()

    def ready(self) -> None:
        """Wait until the worker is set up."""
        self.receive()

    def steps(self, count: int) -> list[float]:
        """The seconds of each of `count` steps."""
        self.connection.send(count)
        return self.receive()

    def end(self) -> float:
        """End the worker. Returns its peak memory in GB."""
        self.connection.send(None)
        peak = self.receive()
        self.process.join()
        return peak

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise SystemExit("a side of the comparison died; its error is above") from None


def serve(connection: Connection, run: Callable[[int], list[float]], peak: Callable[[], float]) -> None:
    """The worker's side of the connection: `run(n)` gives the seconds of n steps, `peak()` the peak memory in GB."""
    connection.send("ready")
    while (count := connection.recv()) is not None:
        connection.send(run(count))
    connection.send(peak())


def median_of_ratios(numerators: list[float], denominators: list[float]) -> float:
    """The median over the rounds of one side's time over the other's."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
