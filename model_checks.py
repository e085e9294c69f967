"""Does a loaded model compute what this repository takes it to compute? Each check is a forward pass of a few tokens.

A model's config does not tell every bias, scale, cap or norm of its architecture, so the checks compare numbers: the
layers written out (layers.py), the output embedding applied to the hidden states, and a decode step with a key-value
cache, all with the model's own logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

import layers

TOKENS = 12  # of the sequence that is computed in several ways
# The largest mean difference of log-probabilities that rounding explains, in nats; a forgotten bias is far above it.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}


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
