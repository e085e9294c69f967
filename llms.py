"""Language models, text and vision: loading them, encoding prompts, and the log-probabilities of tokens.

With rollout.py this is the only file that knows transformers. Letters in the shape comments:
Q prompts, B completions (rows; row i answers prompt `prompt_of_row[i]`), P prompt tokens (left-padded),
T completion tokens (right-padded), H hidden size, V vocabulary, N completion tokens of all rows together.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

import lean

# Memory for the logits that `token_logps` holds at once: the (B, T, V) tensor never exists, only (chunk, V) pieces.
LOGIT_CHUNK_BYTES = 256 * 2**20
KEPT_BYTES = 32 * 2**20  # the largest block that glibc can be told to keep, see `keep_freed_memory`

# Attention that has become sure of itself makes probabilities like 1e-40, which a CPU multiplies a hundred times slower
# than others: they count as 0. Set before torch starts its threads, which inherit it; GPUs do not care.
torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Lets glibc keep blocks of up to KEPT_BYTES that a step frees, for the next step to use. By default they go back
    to the system, which hands them out again page by page, filled with zeros: a tenth of a step's time on a CPU."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold = -3, -1  # their names in malloc.h
        ctypes.CDLL(None).mallopt(mmap_threshold, KEPT_BYTES)
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)


keep_freed_memory()


class ModelError(ValueError):
    """A model that cannot be loaded or used; the message is one line saying what, why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@dataclass
class LLM:
    """A model with everything needed to talk to it.

    Attributes:
        model: the transformers model, `.model` its decoder (with the vision tower), weights in `dtype`.
        processor: turns text and pictures into tensors; None for a text model.
        eos_token_ids: every id that ends a completion (union of tokenizer and generation config).
        excluded_token_ids: ids never sampled and left out of the softmax: image and video placeholders, which would
            break the next forward pass.
    """

    model: torch.nn.Module
    tokenizer: object
    processor: object | None
    is_vision: bool
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    excluded_token_ids: tuple[int, ...]
    attn_implementation: str
    name: str
    decoder: object | None = field(default=None, repr=False)  # rollout.py keeps its buffers here between calls

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def text_config(self):
        return self.model.config.get_text_config()

    @property
    def max_context(self) -> int:
        return self.text_config.max_position_embeddings

    def save(self, path) -> None:
        """`save_pretrained` format: loads in transformers and vLLM as it is."""
        self.model.save_pretrained(path)
        (self.processor or self.tokenizer).save_pretrained(path)

    def excluded_mask(self) -> torch.Tensor | None:
        """(V,) True where a token may not be sampled; None when every token may."""
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


def load_llm(model_path, device=None, dtype=None, attn_implementation=None) -> LLM:
    """Load a text or vision-language model from the hub or a local folder: safetensors only, no remote code.

    Raises:
        ModelError: the model is not there, needs a token, needs remote code, or has a head this code cannot score.
    """
    refuse_qwen_vl_chat(str(model_path))
    quiet_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    attn_implementation = pick_attention(attn_implementation, device, dtype)
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
            model_path, dtype=dtype, attn_implementation=attn_implementation, use_safetensors=True, **hub
        ).to(device)
        processor = AutoProcessor.from_pretrained(model_path, **hub) if is_vision else None
        tokenizer = processor.tokenizer if is_vision else AutoTokenizer.from_pretrained(model_path, **hub)
    refuse_unknown_head(model, str(model_path))
    # The pad token often is an end of turn too, which stands in prompts: as "padding" it would not be trained.
    model.get_input_embeddings().padding_idx = None
    model.eval()  # dropout would make the trainer disagree with the sampler; gradients do not need train mode
    eos_token_ids = union_of_eos(tokenizer, model)
    return LLM(
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        is_vision=is_vision,
        eos_token_ids=eos_token_ids,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_token_ids[0],
        excluded_token_ids=placeholder_ids(config),
        attn_implementation=attn_implementation,
        name=str(model_path),
    )


def hub_answers(seconds: float = 5.0) -> bool:
    """Asked once. Its library would try again for 23 seconds for each of a model's files, of which there may be copies
    on this machine."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception:  # whatever its HTTP library calls it
        return False
    return True


def union_of_eos(tokenizer, model) -> tuple[int, ...]:
    """Chat models name their end of turn in one place or the other, Qwen2.5 different ids in both."""
    ids = [tokenizer.eos_token_id]
    if model.generation_config is not None:
        named = model.generation_config.eos_token_id
        ids += named if isinstance(named, list) else [named]
    ids = sorted({i for i in ids if i is not None})
    if not ids:
        raise ModelError("the model names no end-of-sequence token in its tokenizer or generation config: add one")
    return tuple(ids)


def placeholder_ids(config) -> tuple[int, ...]:
    """Ids that stand for a picture's features inside the prompt."""
    ids = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    return tuple(sorted({i for i in ids if i is not None}))


def refuse_qwen_vl_chat(model_path: str) -> None:
    if model_path.rstrip("/").lower().endswith(("qwen-vl-chat", "qwen-vl")):
        raise ModelError(
            f"{model_path} runs only with remote code written for a transformers of 2023, which is not executed here; "
            "use its successor: --model_path Qwen/Qwen2.5-VL-3B-Instruct"
        )


def refuse_unknown_head(model, name: str) -> None:
    """`token_logps` multiplies hidden states by the output embedding; a head that does more would be scored wrongly."""
    config = model.config.get_text_config()
    for extra in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, extra, None) not in (None, 1, 1.0):
            raise ModelError(f"{name} changes its logits after the output layer ({extra}), which is not supported here")
    if model.get_output_embeddings() is None or getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(f"{name} has no plain output embedding, which the log-probabilities are computed from")


class readable_errors:  # a context manager, so lower case like the standard library's
    """Turns the many ways in which a hub or a folder says no into one line."""

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
    """Keeps progress bars and retries of loading out of the log; warnings that matter still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # pictures are prepared in a thread beside it
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # one line per attempt to reach a hub that is not there; the error says it once


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@dataclass
class Prompts:
    """Q encoded prompts.

    Attributes:
        ids, mask: (Q, P), left-padded; the mask is True on real tokens.
        positions: (Q, P), or (3, Q, P) for models with 3-D rotary positions (time, height, width of a picture).
        vision: per prompt what the vision tower takes (`pixel_values` (patches, …), `image_grid_thw` (pictures, 3));
            empty dicts for text.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    vision: list[dict[str, torch.Tensor]]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device) -> Prompts:
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

    def next_positions(self) -> torch.Tensor:
        """(Q,) the position of the first completion token: one past the largest of the prompt."""
        positions = self.positions if self.positions.dim() == 2 else self.positions.amax(0)  # (Q, P)
        return positions.masked_fill(~self.mask, 0).amax(1) + 1


def chat_text(llm: LLM, example) -> str:
    """The prompt as the model's own chat template writes it, up to where the assistant begins."""
    writer = llm.processor if llm.is_vision and llm.processor.chat_template else llm.tokenizer
    if not writer.chat_template:  # a base model: plain text, and the answer simply goes on
        return "\n\n".join(plain_text(message["content"]) for message in example.messages) + "\n\n"
    return writer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)


def plain_text(content) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def encode_prompts(llm: LLM, examples) -> Prompts:
    """Tokenize Q examples, with their pictures, left-padded; on the CPU, so that a thread can do it ahead of time.

    Raises:
        ModelError: a picture in a prompt of a text model.
    """
    texts = [chat_text(llm, example) for example in examples]
    pictures = [picture for example in examples for picture in example.images]
    if pictures and not llm.is_vision:
        raise ModelError(f"the task shows pictures and {llm.name} reads text only: choose a vision-language model")
    # All in one call, which costs half of one for each. add_special_tokens: the chat template has written them already;
    # twice would change the prompt.
    if pictures:
        output = llm.processor(text=texts, images=pictures, add_special_tokens=False)
        per_prompt = [len(example.images) for example in examples]
        grids = torch.as_tensor(output["image_grid_thw"]).split(per_prompt)  # of each prompt (pictures, 3)
        sizes = [int(grid.prod(1).sum()) for grid in grids]
        patches = torch.as_tensor(output["pixel_values"]).split(sizes)  # of each prompt (patches, …)
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


def prompt_positions(llm: LLM, ids, mask, vision) -> torch.Tensor:
    """(Q, P) counted from the first real token, or the model's own (3, Q, P) when it places pictures in 3-D."""
    inner = llm.model.base_model
    if not hasattr(inner, "get_rope_index"):
        return (mask.long().cumsum(-1) - 1).clamp(min=0)
    grids = [one["image_grid_thw"] for one in vision if one]
    positions, _ = inner.get_rope_index(
        ids,
        mm_token_type_ids=(ids == llm.model.config.image_token_id).int(),  # 1 where a picture stands
        image_grid_thw=torch.cat(grids) if grids else None,
        attention_mask=mask.long(),
    )
    return positions


def forward_prompts(model, prompts: Prompts, use_cache: bool = True):
    """One pass over the prompts, pictures included -> (hidden states (Q, P, H), key-value cache or None)."""
    from transformers import DynamicCache

    vision = [one for one in prompts.vision if one]
    if use_cache and not vision and computes_lean(model):
        length = prompts.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=prompts.ids.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=prompts.ids.device)  # padding sees something, or it is NaN
        visible = prompts.mask[:, None] & causal | itself  # (Q, P, P)
        return lean.forward(model, prompts.ids, prompts.positions, hidden_where(visible, model))
    pictures = {name: torch.cat([one[name] for one in vision]) for name in vision[0]} if vision else {}
    output = model.base_model(
        input_ids=prompts.ids,
        attention_mask=prompts.mask.long(),
        position_ids=prompts.positions,
        past_key_values=DynamicCache(config=model.config.get_text_config()) if use_cache else None,
        use_cache=use_cache,
        **pictures,
    )
    return output.last_hidden_state, output.past_key_values


def computes_lean(model) -> bool:
    """Whether the loss takes lean.py's forward pass: on a CPU, where it is faster. A GPU gains less, and
    transformers brings the attention kernels that were asked for."""
    return model.device.type == "cpu" and model.config._attn_implementation == "sdpa" and lean.is_lean(model)


def keys_and_values(cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer (Q, key heads, P, D), from lean.py's list or from transformers' cache."""
    return cache if isinstance(cache, list) else [(layer.keys, layer.values) for layer in cache.layers]


def hidden_where(visible: torch.Tensor, model) -> torch.Tensor:
    """(B, T, S) bool -> (B, 1, T, S) what attention adds to its scores."""
    return torch.zeros_like(visible, dtype=model.dtype).masked_fill_(~visible, -torch.inf)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities


def token_logps(llm: LLM, rollout, temperature: float = 1.0, rows=None, model=None, share_prompt: bool = True):
    """(B, T) float32 log-probabilities of the completion tokens under softmax(logits / temperature); 0 off the mask.

    Differentiable with respect to the model's weights. `rows` picks some of the rollout's rows; `model` another set of
    weights (the frozen reference). See `token_logps_and_entropy`.
    """
    return token_logps_and_entropy(llm, rollout, temperature, rows, model, share_prompt)[0]


def token_logps_and_entropy(llm: LLM, rollout, temperature=1.0, rows=None, model=None, share_prompt=True):
    """Log-probabilities and the policy's entropy, both (B, T) float32, 0 off the completion mask.

    The prompts, pictures included, are computed once each and their keys and values shared by all of their rows, with
    gradients flowing back through them. With `share_prompt=False` every row carries its own copy of the prompt: the
    plain way, slower and equal, used under gradient checkpointing (which recomputes layers and cannot keep a cache).
    Entropy carries no gradient; it is for the log.
    """
    model = llm.model if model is None else model
    rows = list(range(len(rollout.completion_ids))) if rows is None else list(rows)
    mask = rollout.completion_mask[rows]  # (B, T)
    length = int(mask.sum(1).max()) if len(rows) else 0
    full_length, mask = mask.shape[1], mask[:, :length]
    ids = rollout.completion_ids[rows][:, :length]  # (B, T)
    hidden_of = hidden_states if share_prompt else hidden_states_unshared
    hidden = hidden_of(model, rollout.prompts, [rollout.prompt_of_row[i] for i in rows], ids, mask)  # (B, T, H)
    weight = model.get_output_embeddings().weight  # (V, H)
    logps, entropy = ChunkedLogps.apply(hidden[mask], weight, ids[mask], temperature, llm.excluded_mask())  # (N,), (N,)
    padded = F.pad(mask, (0, full_length - length))  # (B, T)
    scatter = torch.zeros(padded.shape, device=padded.device, dtype=torch.float32).to(logps.dtype)
    return scatter.masked_scatter(padded, logps), scatter.masked_scatter(padded, entropy)


def hidden_states(model, prompts: Prompts, prompt_of_row: list[int], ids, mask) -> torch.Tensor:
    """(B, T, H): at t the state that predicts completion token t. One pass over the prompts, one over completions."""
    used = sorted(set(prompt_of_row))
    prompts = prompts.select(used)
    index = torch.tensor([used.index(prompt) for prompt in prompt_of_row], device=ids.device)  # (B,)
    prompt_hidden, cache = forward_prompts(model, prompts)  # (Q, P, H); left-padded, so column -1 is the last token
    first = prompt_hidden[:, -1].index_select(0, index).unsqueeze(1)  # (B, 1, H) predicts token 0
    if ids.shape[1] == 1:
        return first
    rest = forward_completions(model, prompts, cache, index, ids[:, :-1], mask[:, :-1])  # (B, T - 1, H)
    return torch.cat([first, rest], 1)


def forward_completions(model, prompts: Prompts, cache, index, ids, mask) -> torch.Tensor:
    """(B, T, H) hidden states of completion tokens. Row i sees the keys and values of prompt index[i]; gradients add up
    over the rows of a group."""
    positions = completion_positions(prompts, index, ids.shape[1])
    if computes_lean(model):
        past = [(keys.index_select(0, index), values.index_select(0, index)) for keys, values in keys_and_values(cache)]
        visible = prompts.mask[index, None].expand(-1, ids.shape[1], -1)  # (B, T, P)
        earlier = torch.ones_like(ids[0], dtype=torch.bool).expand(len(ids), ids.shape[1], -1).tril()  # (B, T, T)
        return lean.forward(model, ids, positions, hidden_where(torch.cat([visible, earlier], 2), model), past)[0]
    cache.batch_select_indices(index)
    return model.base_model(
        input_ids=ids,
        attention_mask=torch.cat([prompts.mask[index], mask], 1).long(),  # (B, P + T)
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


def completion_positions(prompts: Prompts, index: torch.Tensor, length: int) -> torch.Tensor:
    """(B, length), or (3, B, length), positions that go on where each row's prompt ended."""
    positions = prompts.next_positions()[index, None] + torch.arange(length, device=index.device)
    return positions if prompts.positions.dim() == 2 else positions.expand(3, -1, -1)


def hidden_states_unshared(model, prompts: Prompts, prompt_of_row: list[int], ids, mask) -> torch.Tensor:
    """The same states the plain way: one pass over (B, P + T), each row with its own copy of the prompt."""
    prompts = prompts.select(prompt_of_row)
    index = torch.arange(len(prompt_of_row), device=ids.device)
    length = prompts.ids.shape[1]
    joined = Prompts(
        torch.cat([prompts.ids, ids], 1),
        torch.cat([prompts.mask, mask], 1),
        torch.cat([prompts.positions, completion_positions(prompts, index, ids.shape[1])], -1),
        prompts.vision,
    )
    hidden, _ = forward_prompts(model, joined, use_cache=False)  # (B, P + T, H)
    return hidden[:, length - 1 : -1]


class ChunkedLogps(torch.autograd.Function):
    """log softmax(h Wᵀ / temperature)[target] and its entropy for N tokens, a chunk of tokens at a time.

    The backward pass computes each chunk's logits again instead of keeping them, so memory holds (chunk, V) and never
    (N, V). With p = softmax: d logp / d logits = (onehot(target) − p) / temperature.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, excluded):
        logps, entropy = hidden.new_empty(2, len(hidden), dtype=lean.wide(hidden.dtype))  # (N,), (N,)
        for part in chunks(hidden, weight):
            full = tempered_logits(hidden[part], weight, temperature, excluded).log_softmax(-1)  # (n, V)
            logps[part] = full.gather(1, targets[part, None])[:, 0]
            p = full.exp()
            if excluded is not None:
                full.masked_fill_(excluded, 0.0)  # there p · log p is 0 · −inf, and counts as 0
            entropy[part] = -torch.linalg.vecdot(p, full)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.excluded = temperature, excluded
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, _grad_entropy):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # summed over chunks in float32 at least: many small contributions would be rounded away in bfloat16
        grad_weight = torch.zeros_like(weight, dtype=lean.wide(weight.dtype)) if ctx.needs_input_grad[1] else None
        for part in chunks(hidden, weight):
            p = tempered_logits(hidden[part], weight, ctx.temperature, ctx.excluded).softmax(-1)  # (n, V)
            p.scatter_add_(1, targets[part, None], -torch.ones_like(p[:, :1]))  # p − onehot, before anything is rounded
            p = p.to(hidden.dtype)
            scale = -grad_logps[part, None] / ctx.temperature  # (n, 1)
            if grad_hidden is not None:
                grad_hidden[part] = (p @ weight) * scale
            if grad_weight is not None:
                scaled = (hidden[part] * scale).to(hidden.dtype)  # (n, H)
                if p.dtype == grad_weight.dtype:
                    grad_weight.addmm_(p.T, scaled)  # without another tensor of the weight's size
                else:
                    grad_weight += p.T @ scaled
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def tempered_logits(hidden, weight, temperature: float, excluded) -> torch.Tensor:
    """(n, V) logits / temperature in float32 (float64 stays), −inf on excluded tokens."""
    logits = (hidden @ weight.T).to(lean.wide(hidden.dtype))
    if temperature != 1:
        logits.div_(temperature)
    return logits if excluded is None else logits.masked_fill_(excluded, -torch.inf)


def chunks(hidden, weight) -> list[slice]:
    """On a CPU so small that the next chunk uses the same memory again, which stays in the cache if V is small."""
    at_once = min(LOGIT_CHUNK_BYTES, KEPT_BYTES if hidden.device.type == "cpu" else LOGIT_CHUNK_BYTES)
    size = min(512, max(1, at_once // (4 * weight.shape[0])))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
