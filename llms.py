"""Which model, which prompt? Loading language models, text and vision, and encoding prompts.

Letters in the shape comments: Q prompts, P prompt tokens (left-padded), V vocabulary.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import logging

if TYPE_CHECKING:
    from config import Config
    from rldatasets import Dataset, Example

KEPT_BYTES = 32 * 2**20  # the largest block that glibc can be told to keep


def tune_cpu() -> None:
    """Make CPU steps faster; call it before torch starts its threads, which inherit the first setting.

    Peaked attention yields denormal probabilities, which CPUs multiply about 100 times slower: flush them to zero.
    glibc returns large freed blocks to the system, which hands them out again page by page, filled with zeros, a tenth
    of a step's time: keep blocks of up to KEPT_BYTES for the next step.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in malloc.h
        ctypes.CDLL(None).mallopt(mmap_threshold, KEPT_BYTES)
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)


class ModelError(ValueError):
    """A model that cannot be loaded or used; the message is one line saying what, why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@dataclass
class LLM:
    """A model with its tokenizer and what sampling and scoring need to know about its tokens.

    Attributes:
        model: the transformers model, weights in `dtype`; `.base_model` is its decoder, with the vision tower.
        processor: turns text and pictures into tensors; None for a text model.
        eos_token_ids: every id that ends a completion (union of tokenizer and generation config).
        excluded_token_ids: ids that are never sampled and left out of the softmax: image and video placeholders, which
            would break the next forward pass.
    """

    model: Any
    tokenizer: Any
    processor: Any
    is_vision: bool
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    excluded_token_ids: tuple[int, ...]
    attn_implementation: str
    name: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def max_context(self) -> int:
        return self.model.config.get_text_config().max_position_embeddings

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def save(self, path: str | os.PathLike) -> None:
        """Write the folder in `save_pretrained` format, which transformers and vLLM load."""
        self.model.save_pretrained(path)
        (self.processor or self.tokenizer).save_pretrained(path)

    def excluded_mask(self) -> Tensor | None:
        """(V,) True where a token may not be sampled; None if every token may be."""
        if not self.excluded_token_ids:
            return None
        mask = torch.zeros(self.model.get_output_embeddings().weight.shape[0], dtype=torch.bool, device=self.device)
        mask[list(self.excluded_token_ids)] = True
        return mask


def pick_device(device: str | None = None) -> torch.device:
    """The asked device, else cuda, else mps, else cpu. Raises ModelError when the asked one is not there."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(device)


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that computes in it, float32 elsewhere, unless one is asked for."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[dtype]


def pick_attention(attn_implementation: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """flash-attn when it is installed on CUDA and the dtype suits it, else torch's scaled-dot-product attention."""
    if attn_implementation not in (None, "auto"):
        return attn_implementation
    installed = importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if installed and device.type == "cuda" and dtype == torch.bfloat16 else "sdpa"


def load_llm(
    model_path: str | os.PathLike,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> LLM:
    """Load a text or vision-language model from the hub or a local folder: safetensors only, no remote code.

    Raises:
        ModelError: the model is not there, needs a token, needs remote code, or has a head this code cannot score.
    """
    refuse_qwen_vl_chat(str(model_path))
    tune_cpu()
    quiet_transformers()
    on, kind = pick_device(device), pick_dtype(dtype, pick_device(device))
    attention = pick_attention(attn_implementation, on, kind)
    hub = {
        "token": os.environ.get("HF_TOKEN") or os.environ.get("HUGGINGFACE_TOKEN"),
        "trust_remote_code": False,
        "local_files_only": Path(model_path).is_dir() or not hub_answers(),
    }
    with readable_errors(str(model_path)):
        config = AutoConfig.from_pretrained(model_path, **hub)
        is_vision = getattr(config, "vision_config", None) is not None
        auto_class = AutoModelForImageTextToText if is_vision else AutoModelForCausalLM
        model = auto_class.from_pretrained(
            model_path, dtype=kind, attn_implementation=attention, use_safetensors=True, **hub
        ).to(on)
        processor = AutoProcessor.from_pretrained(model_path, **hub) if is_vision else None
        tokenizer = processor.tokenizer if is_vision else AutoTokenizer.from_pretrained(model_path, **hub)
    refuse_unknown_head(model, str(model_path))
    # In many models the pad token also ends turns inside prompts: with a padding_idx its embedding is not trained.
    model.get_input_embeddings().padding_idx = None
    model.eval()  # with dropout, trainer and sampler would disagree; gradients do not need train mode
    eos_token_ids = union_of_eos(tokenizer, model)
    return LLM(
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        is_vision=is_vision,
        eos_token_ids=eos_token_ids,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_token_ids[0],
        excluded_token_ids=placeholder_ids(config),
        attn_implementation=attention,
        name=str(model_path),
    )


def hub_answers(seconds: float = 5.0) -> bool:
    """Is the hub reachable? One quick request; otherwise huggingface_hub retries each file for 23 s even if cached."""
    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception:  # the HTTP library has its own exception types
        return False
    return True


def union_of_eos(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """Ids that end a completion: chat models name them in the tokenizer or the generation config, Qwen2.5 in both."""
    ids = [tokenizer.eos_token_id]
    if model.generation_config is not None:
        named = model.generation_config.eos_token_id
        ids += named if isinstance(named, list) else [named]
    ids = sorted({i for i in ids if i is not None})
    if not ids:
        raise ModelError("the model names no end-of-sequence token in its tokenizer or generation config: add one")
    return tuple(ids)


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """Ids that a prompt holds in place of the features of its pictures."""
    ids = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    return tuple(sorted({i for i in ids if i is not None}))


def refuse_qwen_vl_chat(model_path: str) -> None:
    if model_path.rstrip("/").lower().endswith(("qwen-vl-chat", "qwen-vl")):
        raise ModelError(
            f"{model_path} runs only with remote code written for a transformers of 2023, which is not executed here; "
            "use its successor: --model_path Qwen/Qwen2.5-VL-3B-Instruct"
        )


def refuse_unknown_head(model: Any, name: str) -> None:
    """`token_logps` multiplies hidden states by the output embedding; it would score a head that does more wrongly."""
    config = model.config.get_text_config()
    for extra in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, extra, None) not in (None, 1, 1.0):
            raise ModelError(f"{name} changes its logits after the output layer ({extra}), which is not supported here")
    if model.get_output_embeddings() is None or getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(f"{name} has no plain output embedding, which the log-probabilities are computed from")


def recompute_activations(model: Any) -> None:
    """Gradient checkpointing: recompute layers in the backward pass instead of keeping their activations.

    transformers does so in train mode only, in which dropout would be active: it is set to zero.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


class readable_errors:  # lower case, like the context managers of the standard library
    """Turns the errors of a hub or a model folder into a ModelError of one line."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        if Path(self.name).is_dir() and not (Path(self.name) / "config.json").is_file():
            raise ModelError(f"the folder {self.name} holds no model: it has no config.json")

    def __exit__(self, kind, error, traceback):
        if error is None or not isinstance(error, Exception) or isinstance(error, ModelError):
            return False
        text = " ".join(str(error).split())
        if "gated" in text.lower() or "401" in text or "403" in text:
            advice = "it needs permission: accept its licence on the hub and set HF_TOKEN"
        elif "trust_remote_code" in text or "custom code" in text:
            advice = "it needs code from the hub, which is never executed here: choose a model that transformers knows"
        elif "safetensors" in text and "pickle" not in text:
            advice = "it has no safetensors weights; pickled weights are not loaded here because they can run code"
        elif isinstance(error, ImportError):
            advice = f"a package is missing: {text[:200]}"
        elif isinstance(error, OSError):
            advice = (
                "it is neither a local folder nor a model that the hub (or its cache on this machine) gives; "
                f"check the name, the network, and HF_TOKEN if it is private ({text[:160]})"
            )
        elif isinstance(error, torch.OutOfMemoryError):
            advice = "its weights do not fit into this GPU's memory: choose a smaller model"
        else:
            advice = f"{type(error).__name__}: {text[:300]}"
        raise ModelError(f"the model {self.name!r} cannot be loaded: {advice}") from error


def quiet_transformers() -> None:
    """Keep progress bars and retries out of the log; a ModelError says once what went wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a thread prepares pictures beside it
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@dataclass
class Prompts:
    """Q encoded prompts.

    Attributes:
        ids, mask: (Q, P), left-padded; the mask is True on real tokens.
        positions: (Q, P), or (3, Q, P) for models with 3-D rotary positions (time, height, width of a picture).
        vision: for each prompt the inputs of the vision tower (`pixel_values` (patches, …), `image_grid_thw`
            (pictures, 3)); empty dicts for text.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    vision: list[dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Q numbers of tokens, pictures included."""
        return self.mask.sum(1).tolist()

    def to(self, device: torch.device) -> Prompts:
        vision = [{name: tensor.to(device, non_blocking=True) for name, tensor in one.items()} for one in self.vision]
        return Prompts(self.ids.to(device), self.mask.to(device), self.positions.to(device), vision)

    def select(self, index: list[int]) -> Prompts:
        """The prompts at `index`, without the columns that are padding in all of them."""
        mask = self.mask[index]
        start = int(mask.any(0).int().argmax())
        return Prompts(
            self.ids[index][:, start:],
            mask[:, start:],
            self.positions[..., index, start:],
            [self.vision[i] for i in index],
        )

    @staticmethod
    def cat(parts: Sequence[Prompts]) -> Prompts:
        """All prompts of several batches, left-padded to the longest."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.ids.shape[1] for part in parts)

        def padded(tensor: Tensor) -> Tensor:  # (…, P) -> (…, longest P)
            return F.pad(tensor, (width - tensor.shape[-1], 0))

        return Prompts(
            torch.cat([padded(part.ids) for part in parts]),
            torch.cat([padded(part.mask) for part in parts]),
            torch.cat([padded(part.positions) for part in parts], -2),
            [one for part in parts for one in part.vision],
        )

    def next_positions(self) -> Tensor:
        """(Q,) the position of the first completion token: one past the largest of the prompt."""
        positions = self.positions if self.positions.dim() == 2 else self.positions.amax(0)  # (Q, P)
        return positions.masked_fill(~self.mask, 0).amax(1) + 1


def chat_text(llm: LLM, example: Example) -> str:
    """The prompt in the model's chat template, up to where the assistant's turn begins."""
    writer = llm.processor if llm.is_vision and llm.processor.chat_template else llm.tokenizer
    if not writer.chat_template:  # a base model: plain text, which the answer continues
        return "\n\n".join(plain_text(message["content"]) for message in example.messages) + "\n\n"
    return writer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)


def plain_text(content: str | list[dict]) -> str:
    """The text of a message, without its pictures."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def encode_prompts(llm: LLM, examples: Sequence[Example]) -> Prompts:
    """Tokenize Q examples, with their pictures, left-padded, on the CPU, so that a thread can prefetch them.

    Raises:
        ModelError: a picture in a prompt of a text model.
    """
    texts = [chat_text(llm, example) for example in examples]
    pictures = [picture for example in examples for picture in example.images]
    if pictures and not llm.is_vision:
        raise ModelError(f"the task shows pictures and {llm.name} reads text only: choose a vision-language model")
    # One call for all costs half of a call for each. add_special_tokens=False: the chat template has written them.
    if pictures:
        output = llm.processor(text=texts, images=pictures, add_special_tokens=False)
        per_prompt = [len(example.images) for example in examples]
        grids = torch.as_tensor(output["image_grid_thw"]).split(per_prompt)  # Q × (pictures, 3)
        sizes = [int(grid.prod(1).sum()) for grid in grids]
        patches = torch.as_tensor(output["pixel_values"]).split(sizes)  # Q × (patches, …)
        vision = [
            {"pixel_values": pixels, "image_grid_thw": grid} if len(grid) else {}
            for pixels, grid in zip(patches, grids, strict=True)
        ]
    else:
        output, vision = llm.tokenizer(texts, add_special_tokens=False), [{} for _ in texts]
    encoded = output["input_ids"]  # Q lists, none padded
    length = max(len(ids) for ids in encoded)
    ids = torch.full((len(encoded), length), llm.pad_token_id)  # (Q, P)
    mask = torch.zeros(len(encoded), length, dtype=torch.bool)  # (Q, P), from lengths: pad may equal end-of-sequence
    for row, tokens in enumerate(encoded):
        ids[row, length - len(tokens) :] = torch.as_tensor(tokens)
        mask[row, length - len(tokens) :] = True
    return Prompts(ids, mask, prompt_positions(llm, ids, mask, vision), vision)


def prompt_positions(llm: LLM, ids: Tensor, mask: Tensor, vision: list[dict[str, Tensor]]) -> Tensor:
    """(Q, P) counted from the first real token, or (3, Q, P) from the model itself if it places pictures in 3-D."""
    inner = llm.model.base_model
    if not hasattr(inner, "get_rope_index"):
        return (mask.long().cumsum(-1) - 1).clamp(min=0)
    grids = [one["image_grid_thw"] for one in vision if one]
    positions, _ = inner.get_rope_index(
        ids,
        mm_token_type_ids=(ids == llm.model.config.image_token_id).int(),  # 1 on a picture's tokens
        image_grid_thw=torch.cat(grids) if grids else None,
        attention_mask=mask.long(),
    )
    return positions


def refuse_unfit_model(config: Config, llm: LLM, test_set: Dataset) -> None:
    """Refuse a task that the model cannot do.

    Raises:
        ModelError: a task with pictures for a text model; prompts and completions longer than the model's context; a
            test set without a prompt of at most --max_prompt_length tokens.
    """
    if test_set.modality == "vision" and not llm.is_vision:
        raise ModelError(
            f"the task {test_set.name!r} shows pictures and {llm.name} reads text only: choose a vision-language model "
            "such as Qwen/Qwen2.5-VL-3B-Instruct, or --model_path tiny"
        )
    if config.max_prompt_length + config.max_completion_length > llm.max_context:
        raise ModelError(
            f"{llm.name} can read {llm.max_context} tokens, fewer than --max_prompt_length {config.max_prompt_length} "
            f"+ --max_completion_length {config.max_completion_length}: lower one of them"
        )
    lengths = (encode_prompts(llm, [test_set[i]]).lengths[0] for i in range(len(test_set)))
    if all(length > config.max_prompt_length for length in lengths):
        raise ModelError(f"all test prompts are longer than --max_prompt_length {config.max_prompt_length}: raise it")
