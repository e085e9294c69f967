"""Small real models with random weights, one of each family, saved as on the hub; prompts and settings for them."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

import tiny_models
from config import Config, parse_args
from rldatasets import Example, get_dataset

if TYPE_CHECKING:  # these two import transformers, which takes seconds
    from llms import LLM
    from rollout import Rollout

TEXT = ("qwen2", "llama", "qwen3")
VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = TEXT + VISION

# Settings of `generate` as hub models bring them; the sampler must ignore all of them.
GENERATION = {"do_sample": True, "temperature": 0.3, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.5}
# Random weights hardly ever sample one particular token: every tenth token ends a completion.
EOS = list(range(20, 300, 10))
TASK_OPTIONS = {"arithmetic": {"steps": 1}, "correlation": {"size": 32, "style": "bold"}}  # the easiest examples


def small_config(*flags: str) -> Config:
    """Settings for calling parts of the loop directly; the model and the task that they name are not used."""
    named = "--model_path small --dataset_name gsm8k --max_steps 10"
    return parse_args(" ".join((named, *flags)).split())


def cut(rollout: Rollout, micro_batches: list[list[int]]) -> Rollout:
    """The same rollout, computed in these micro-batches (row numbers) instead of those that fit a budget."""
    other = copy.copy(rollout)
    other.micro_batches = lambda budget: micro_batches
    return other


def build(family: str, folder: Path) -> None:
    """Save a random model of a family with its tokenizer or processor."""
    import transformers

    dataset = get_dataset("arithmetic", "train", 40)
    recipe = dataclasses.replace(tiny_models.RECIPES["arithmetic"], vocabulary=300)
    tokenizer = tiny_models.build_tokenizer(dataset, recipe)
    head_size = 16 if family.startswith("qwen3") else 8  # in Qwen3, heads · head size may differ from hidden size
    text = {
        "vocab_size": len(tokenizer) + 5,  # padded, like that of many hub models
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_size,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    if family in TEXT:
        names = {"qwen2": "Qwen2", "llama": "Llama", "qwen3": "Qwen3"}
        config = getattr(transformers, f"{names[family]}Config")(**text, tie_word_embeddings=family != "llama")
        model, saved = getattr(transformers, f"{names[family]}ForCausalLM")(config), tokenizer
    else:
        model, saved = build_vision(family, text, tokenizer)
    with torch.no_grad():  # biases and norms other than 0 and 1: a forgotten one changes the output
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.2 * torch.randn_like(weight))
    model.generation_config = transformers.GenerationConfig(eos_token_id=EOS, **GENERATION)
    model.save_pretrained(folder)
    saved.save_pretrained(folder)


def build_vision(family: str, text: dict, tokenizer):
    """-> (a random vision-language model, its processor); `text` configures its decoder."""
    import transformers

    half = text["head_dim"] // 2
    text["rope_parameters"]["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]  # time, height, width
    tower = {"depth": 2, "num_heads": 2, "patch_size": 8, "temporal_patch_size": 2, "initializer_range": 0.2}
    if family == "qwen2_vl":
        tower |= {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 32}
    else:
        tower |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    if family == "qwen2_5_vl":
        tower |= {"window_size": 32, "fullatt_block_indexes": [1]}
    if family == "qwen3_vl":
        tower |= {"num_position_embeddings": 36, "deepstack_visual_indexes": [0]}
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    tokens = {"image": tiny_models.IMAGE, "video": tiny_models.VIDEO}
    tokens |= {"vision_start": tiny_models.VISION_START, "vision_end": tiny_models.VISION_END}
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=tower,
        tie_word_embeddings=family == "qwen2_5_vl",
        eos_token_id=tokenizer.eos_token_id,
        **{f"{token}_token_id": tokenizer.convert_tokens_to_ids(content) for token, content in tokens.items()},
    )
    looks = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    looks["size"] = {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}  # keeps pictures of different sizes different
    videos = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
    processor = getattr(transformers, f"{name}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(**looks),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, videos)(**looks),
        chat_template=tiny_models.CHAT_TEMPLATE,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random colours."""
    colours = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(colours.byte().numpy())


def question(text: str, *pictures: Image.Image) -> Example:
    """An example without an answer that shows these pictures."""
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}] if pictures else text
    return Example("question", [{"role": "user", "content": content}], list(pictures), "")


def questions(family: str) -> list[Example]:
    """Three prompts of different lengths; for vision with pictures of different sizes, the second with two pictures."""
    if family in TEXT:
        return [
            question("How many eggs?"),
            question("One hen lays 3 eggs a day. How many in 2 days?"),
            question("7 + 5 ="),
        ]
    return [
        question("What is this?", picture(32, 48)),
        question("Which one of these is larger?", picture(64, 32, 1), picture(40, 40, 2)),
        question("And here?", picture(80, 64, 3)),
    ]


def plain_inputs(llm: LLM, example: Example) -> dict[str, torch.Tensor]:
    """One prompt prepared as in a model card: no batch, no padding, no function of this project."""
    writer = llm.processor if llm.is_vision else llm.tokenizer
    text = writer.apply_chat_template(example.messages, add_generation_prompt=True, tokenize=False)
    return dict(writer(text=[text], **({"images": example.images} if example.images else {}), return_tensors="pt"))
