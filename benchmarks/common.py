"""What the benchmarks share: presets, models with random weights saved to a folder, workers that take turns."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Preset:
    """A model and the shape of a step: Q prompts × G completions of exactly `length` tokens each."""

    task: str
    prompts: int
    generations: int
    length: int
    model: dict | None  # sizes of the text model where they are not those of the task's tiny model
    vision: dict | None = None
    device: str = "cpu"
    dtype: str = "float32"
    micro_batch_tokens: int = 8192


QWEN_1_5B = {
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
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "intermediate_size": 11_008,
}
QWEN_VL_TOWER = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 2048}
PRESETS = {
    "tiny-text": Preset("arithmetic", 4, 16, 128, None),
    "tiny-vision": Preset("correlation", 4, 16, 32, None),
    "qwen2.5-1.5b": Preset("arithmetic", 1, 16, 786, QWEN_1_5B, device="cuda", dtype="bfloat16"),
    "qwen2.5-vl-3b": Preset("correlation", 2, 8, 128, QWEN_VL_3B, QWEN_VL_TOWER, device="cuda", dtype="bfloat16"),
}


def make_model(preset: Preset, folder: Path) -> Path:
    """Save a model of the preset's shape, random weights, with the task's own tokenizer or processor."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

    import tiny_models
    from rldatasets import get_dataset

    torch.manual_seed(0)
    recipe = tiny_models.RECIPES[preset.task]
    data = get_dataset(preset.task, "train", 2000, options=picture_options(preset))
    tokenizer = tiny_models.build_tokenizer(data, recipe)
    model, processor = tiny_models.build_model(data, recipe, tokenizer)
    if preset.model:
        ids = {name: getattr(model.config.get_text_config(), name) for name in ("eos_token_id", "pad_token_id")}
        with torch.device(preset.device):
            torch.set_default_dtype(getattr(torch, preset.dtype))
            if preset.vision:
                names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
                ids |= {name: getattr(model.config, name) for name in names}
                rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
                tower = preset.vision | {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
                text = preset.model | {"rope_parameters": rope}
                config = Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=True, **ids)
                model = Qwen2_5_VLForConditionalGeneration(config)
                processor.image_processor.patch_size, processor.image_processor.temporal_patch_size = 14, 2
                processor.image_processor.size = {"shortest_edge": 224 * 224, "longest_edge": 224 * 224}
            else:
                model = Qwen2ForCausalLM(Qwen2Config(**preset.model, tie_word_embeddings=True, **ids))
            torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    (processor or tokenizer).save_pretrained(folder)
    return folder


def picture_options(preset: Preset) -> dict:
    if preset.task not in ("clock", "correlation"):
        return {}
    return {"size": 224 if preset.vision else 56, "style": "bold"}


def examples_of(preset: Preset, count: int):
    from rldatasets import get_dataset

    data = get_dataset(preset.task, "train", count, options=picture_options(preset))
    return [data[i] for i in range(count)]


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_gb(device: str) -> float:
    """Most memory used: of the GPU, or of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def median_seconds(function, repeats: int, device: str = "cpu") -> float:
    """The median time of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


class Worker:
    """A side of a comparison in a process of its own: its memory is its own, and it waits while the other side runs.

    `target(connection, *args)` sends "ready", then answers each number n received with the seconds of n steps, and the
    message None with its peak memory in GB, and ends.
    """

    def __init__(self, target, *args):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=target, args=(other, *args), daemon=True)
        self.process.start()
        other.close()

    def ready(self) -> None:
        self.receive()

    def steps(self, count: int) -> list[float]:
        self.connection.send(count)
        return self.receive()

    def end(self) -> float:
        self.connection.send(None)
        peak = self.receive()
        self.process.join()
        return peak

    def receive(self):
        try:
            return self.connection.recv()
        except EOFError:
            raise SystemExit("a side of the comparison died; its error is above") from None


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
