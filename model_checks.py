"""Can this model be used? What is refused from its name, config and files, and a comparison of numbers after loading.

A model's config does not tell every bias, scale, cap or norm of its architecture, so the checks compare numbers: the
layers written out (layers.py), the output embedding applied to the hidden states, and a decode step with a key-value
cache, all with the model's own logits.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import layers

if TYPE_CHECKING:
    from llms import LLM


class ModelError(ValueError):
    """A model that cannot be loaded or used; the message is one line saying what, why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Refusals from names, configs and files


def refuse_qwen_vl_chat(model_path: str) -> None:
    if model_path.rstrip("/").lower().endswith(("qwen-vl-chat", "qwen-vl")):
        raise ModelError(
            f"{model_path} runs only with remote code written for a transformers of 2023, which is not executed here; "
            "use its successor: --model_path Qwen/Qwen2.5-VL-3B-Instruct"
        )


VISION_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def refuse_unknown_architecture(config: Any, name: str) -> bool:
    """Refuse, from its config, a model that cannot be used. Returns whether it is a vision-language model."""
    is_vision = getattr(config, "vision_config", None) is not None
    if is_vision and config.model_type not in VISION_FAMILIES:
        raise ModelError(
            f"{name} is a vision-language model of the family {config.model_type!r}; these work here: "
            f"{', '.join(VISION_FAMILIES)}, for example Qwen/Qwen2.5-VL-3B-Instruct"
        )
    if not is_vision and type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(f"{name} has the architecture {config.model_type!r}, which is no causal language model")
    return is_vision


def refuse_incomplete_folder(folder: Path) -> None:
    """Refuse a local folder without a config, or without all of its safetensors weights."""
    try:
        names = {path.name for path in folder.iterdir()}
        index = folder / "model.safetensors.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.name in names else set()
        for name in sorted(names & {"config.json", *shards}):
            open(folder / name, "rb").close()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"the folder {folder} cannot be read: {' '.join(str(error).split())}") from error
    if "config.json" not in names:
        raise ModelError(f"the folder {folder} holds no model: it has no config.json")
    if missing := sorted(shards - names):
        raise ModelError(
            f"the folder {folder} lacks {len(missing)} of {len(shards)} weight files, such as {missing[0]}"
        )
    if not shards and not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"the folder {folder} has no safetensors weights; pickled weights are not loaded because they can run code"
        )


def refuse_missing_tensors(loaded: dict[str, Any], name: str) -> None:
    """Refuse weights files that lack tensors of the model, which transformers would draw at random; name surplus."""
    wrong = sorted([*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])])
    if wrong:
        raise ModelError(
            f"the weights of {name} lack {len(wrong)} of the model's tensors, or have them in another shape, such as "
            f"{wrong[0]}: get complete weights"
        )
    if surplus := sorted(loaded["unexpected_keys"]):
        print(f"{name}: {len(surplus)} tensors of its weights are not used by the model, such as {surplus[0]}")


# ---------------------------------------------------------------------------------------------------------------------
# Comparing numbers

TOKENS = 12  # of the sequence that is computed in several ways
# The largest mean difference of log-probabilities that rounding explains, in nats. In half precision rounding hides
# small mistakes, so that a layer is compared in float32 too, relative to the length of its output.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
LAYER_TOLERANCE = 1e-4


def check_numbers(llm: LLM) -> None:
    """Compare the ways in which a few tokens are computed here with the model's own logits. Where layers.py differs,
    the model's forward pass is used and one line says so.

    Raises:
        ModelError: the pad or an end-of-sequence token is outside of the embedding; the log-probabilities or a decode
            step differ from the model's own.
    """
    model, rows = llm.model, llm.model.get_input_embeddings().weight.shape[0]
    if outside := [i for i in (llm.pad_token_id, *llm.eos_token_ids) if i >= rows]:
        raise ModelError(f"{llm.name} names the special token {outside[0]}, but its embedding has only {rows} rows")
    if model.get_output_embeddings() is None:
        raise ModelError(f"{llm.name} has no output embedding, which the log-probabilities are computed from")
    ids, most = sample_ids(model, llm.excluded_token_ids), tolerance(model)  # (1, T)
    try:
        head = difference_of_head(model, ids)
        decoding = difference_of_decoding(model, ids)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ModelError(
            f"{llm.name} cannot be sampled here: a trial of {ids.shape[1]} tokens gave {reason}"
        ) from error
    if not math.isfinite(head):
        raise ModelError(f"{llm.name} gives log-probabilities that are not numbers: its weights are broken")
    for what, found in (("output embedding applied to hidden states", head), ("decoding with a cache", decoding)):
        if found > most:
            raise ModelError(
                f"{llm.name} computes its logits in another way than this code: {what} differs by {found:.2g} nats"
            )
    if layers.has_fast_layers(model):
        found, layer = difference_of_layers(model, ids), difference_of_one_layer(model)
        if found > most or layer > LAYER_TOLERANCE:
            layers.disable(model)
            print(
                f"{llm.name}: layers.py differs by {found:.2g} nats, so the model's own forward pass is used (slower)"
            )


@torch.inference_mode()
def difference_of_head(model: Any, ids: Tensor) -> float:
    """Between the model's logits and its output embedding applied to its last hidden states; ids (1, T)."""
    expected = model_logps(model, ids)  # (T, V)
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]  # (T, H)
    return difference(expected, head_logps(model, hidden))


@torch.inference_mode()
def difference_of_layers(model: Any, ids: Tensor) -> float:
    """Between the model's hidden states and those of layers.py, with separate and with fused weights; ids (1, T)."""
    expected = model_logps(model, ids)  # (T, V)
    text_model = layers.text_model_of(model)
    length = ids.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()  # (T, T)
    bias = torch.zeros(length, length, dtype=model.dtype, device=ids.device).masked_fill_(~visible, -torch.inf)
    positions = torch.arange(length, device=ids.device)[None]  # (1, T)
    if hasattr(model.base_model, "get_rope_index"):
        positions = positions.expand(3, 1, -1)
    found = 0.0
    for fused in (None, FusedCopies(text_model)):
        hidden, _ = layers.forward(model, ids, positions, bias[None, None], fused=fused)  # (1, T, H)
        found = max(found, difference(expected, head_logps(model, hidden[0])))
    return found


@torch.inference_mode()
def difference_of_one_layer(model: Any) -> float:
    """Between a decoder layer and layers.py in float32, on random hidden states: the length of the difference over the
    length of the output; the larger one of the first and the last layer."""
    text_model = layers.text_model_of(model)
    found = 0.0
    for original in (text_model.layers[0], text_model.layers[-1]):
        layer, norm = (copy.deepcopy(module).float() for module in (original, text_model.norm))
        hidden = torch.randn(
            1, TOKENS, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0)
        ).to(model.device)  # (1, T, H)
        positions = torch.arange(TOKENS, device=model.device)[None]  # (1, T)
        if hasattr(model.base_model, "get_rope_index"):
            positions = positions.expand(3, 1, -1)
        rotary = text_model.rotary_emb(hidden, positions)  # cos and sin (1, T, D)
        expected = norm(layer(hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions))
        alone = SimpleNamespace(layers=[layer], norm=norm, rotary_emb=text_model.rotary_emb)
        cos, sin = (x[0, :, None] for x in layers.rotary(alone, hidden, positions))  # (T, 1, D)
        for fused in (None, FusedCopies(alone)):
            output = layers.run_layers(alone, hidden[0], cos, sin, causal_attention(layer), fused)  # (T, H)
            found = max(found, float((output - expected[0]).norm() / expected.norm()))
    return found


def causal_attention(layer: Any) -> Callable[..., Tensor]:
    """The `attend` of layers.run_layers for one sequence of T tokens and one layer."""

    def attend(number: int, *projected: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in projected)  # (1, heads, T, D)
        scale = layer.self_attn.scaling
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return mixed[0].transpose(0, 1).flatten(1)  # (T, heads · D)

    return attend


@torch.inference_mode()
def difference_of_decoding(model: Any, ids: Tensor) -> float:
    """Between the model's logits and those of a decode step for two rows that share the prompt ids[:, :-1]; ids (1, T).

    Raises what the model raises if its cache cannot be repeated, as in architectures with a recurrent state.
    """
    expected = model_logps(model, ids)[-1:]  # (1, V)
    cache = DynamicCache(config=model.config.get_text_config())
    prompt = {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
    model.base_model(**prompt, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    step = model.base_model(
        input_ids=ids[:, -1:].expand(2, -1),
        attention_mask=torch.ones_like(ids).expand(2, -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state  # (2, 1, H)
    return max(difference(expected, head_logps(model, row)) for row in step)


def model_logps(model: Any, ids: Tensor) -> Tensor:
    """(T, V) the model's own log-probabilities; ids (1, T)."""
    return model(input_ids=ids).logits[0].to(layers.wide(model.dtype)).log_softmax(-1)


def head_logps(model: Any, hidden: Tensor) -> Tensor:
    """(T, V) log-probabilities as logprobs.py takes them from hidden states (T, H)."""
    return F.linear(hidden, model.get_output_embeddings().weight).to(layers.wide(model.dtype)).log_softmax(-1)


def difference(expected: Tensor, found: Tensor) -> float:
    """The mean over tokens of Σ p |log p − log q|, for log-probabilities (T, V); infinite if one is not a number."""
    gap = ((found - expected).abs() * expected.exp()).sum(-1).mean()
    return float(gap.nan_to_num(torch.inf, torch.inf))


def tolerance(model: Any) -> float:
    return TOLERANCE.get(model.dtype, 1e-3)


def sample_ids(model: Any, excluded: tuple[int, ...]) -> Tensor:
    """(1, T) token ids spread over the vocabulary, without placeholders of pictures."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = [i for i in torch.linspace(0, rows - 1, 2 * TOKENS).long().tolist() if i not in excluded]
    return torch.tensor([ids[:: max(1, len(ids) // TOKENS)][:TOKENS]], device=model.device)


class FusedCopies:
    """Each layer's weights side by side, as the sampler stores them, copied one layer at a time."""

    def __init__(self, text_model: Any):
        self.layers = text_model.layers

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor | None, Tensor]:
        attention, mlp = self.layers[number].self_attn, self.layers[number].mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = torch.cat([part.bias for part in qkv]) if attention.q_proj.bias is not None else None
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        return torch.cat([part.weight for part in qkv]), bias, gate_up
