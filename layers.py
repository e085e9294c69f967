"""The decoder layers of the Llama and Qwen families, written out over the model's own weights.

The sampler's decode step and, on a CPU, the forward pass of the loss run these few operations instead of transformers'
modules. The two differ in how queries meet keys, so each brings its own `attend` function.

Letters in the shape comments: n tokens side by side, H hidden size, D head size, B rows, T tokens of each, S keys that
they may see (those of earlier tokens first).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FAMILIES = {"llama", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}
PACKED_ROWS = 32  # the number of rows that a packed weight's layout is chosen for; it serves 8 to 64 about as well


def has_fast_layers(model: Any) -> bool:
    """Does `run_layers` compute this architecture? Others go through transformers' own forward pass."""
    if getattr(model, "fast_layers_differ", False):
        return False
    config = model.config.get_text_config()
    full_attention = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    rope = getattr(config, "rope_parameters", None) or {}  # absent where positions are learned, as in GPT-2
    static_rope = rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
    return config.model_type in FAMILIES and full_attention and static_rope and config.hidden_act == "silu"


def disable(model: Any) -> None:
    """Have `has_fast_layers` answer no for this model: its numbers differ (see number_checks.py)."""
    model.fast_layers_differ = True


def text_model_of(model: Any) -> Any:
    """The decoder, without the vision tower and the output embedding."""
    return getattr(model.base_model, "language_model", model.base_model)


class FusedLayer(NamedTuple):
    """The four products of a layer in a decode step: (b, in) -> (b, out)."""

    qkv: Callable[[Tensor], Tensor]  # query, key and value projections side by side
    output: Callable[[Tensor], Tensor]
    gate_up: Callable[[Tensor], Tensor]  # gate and up projections side by side
    down: Callable[[Tensor], Tensor]


def product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x ↦ x Wᵀ + bias for few rows x and a weight that does not change meanwhile; without gradients.

    With few rows a product takes as long as reading the weight. For bfloat16 on a CPU, oneDNN reads a weight up to
    three times faster from a copy in its own layout, and the result has the same bits.
    """
    if not packs(weight.device, weight.dtype):
        return functools.partial(F.linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Does `product` make a packed copy of such a weight? In float32 it would gain little and round otherwise."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def run_layers(text_model: Any, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable, fused: Any = None) -> Tensor:
    """Token embeddings (n, H) -> last hidden states (n, H), after the final norm.

    Args:
        cos, sin: (n, 1, D), the rotary position of each token, as returned by `rotary`.
        attend: (layer number, query (n, heads, D), key and value (n, key heads, D)) -> (n, heads · D).
        fused: the `FusedLayer` of each layer: fewer and larger products, for few tokens at a time. None: each module
            separately, with gradients.
    """
    for number, layer in enumerate(text_model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        normed = rms_norm(x, layer.input_layernorm)
        if fused:
            qkv, output, gate_up, down = fused[number]
            heads = [part.out_features // attention.head_dim for part in (attention.q_proj, attention.k_proj)]
            projected = qkv(normed).unflatten(-1, (-1, attention.head_dim))
            both, value = projected[:, : sum(heads)], projected[:, sum(heads) :]  # rotate queries and keys together
            if hasattr(attention, "q_norm"):  # Qwen3
                query, key = both.split(heads, 1)
                both = torch.cat([rms_norm(query, attention.q_norm), rms_norm(key, attention.k_norm)], 1)
            query, key = rotate(both, cos, sin).split(heads, 1)
            x = x + output(attend(number, query, key, value))
            gate, up = gate_up(rms_norm(x, layer.post_attention_layernorm)).chunk(2, -1)
            x = x + down(F.silu(gate) * up)
        else:
            parts = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
            query, key, value = (part.unflatten(-1, (-1, attention.head_dim)) for part in parts)
            if hasattr(attention, "q_norm"):
                query, key = rms_norm(query, attention.q_norm), rms_norm(key, attention.k_norm)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            x = x + attention.o_proj(attend(number, query, key, value))
            normed = rms_norm(x, layer.post_attention_layernorm)
            x = x + gated_down(mlp.gate_proj(normed), mlp.up_proj(normed), mlp.down_proj)
    return rms_norm(x, text_model.norm)


def forward(
    model: Any, ids: Tensor, positions: Tensor, bias: Tensor, past: list | None = None, fused: Any = None
) -> tuple[Tensor, list]:
    """One differentiable pass over (B, T) tokens -> hidden states (B, T, H), and each layer's keys and values.

    Args:
        positions: (B, T), or (3, B, T) for models with 3-D rotary positions.
        bias: (B, 1, T, S), added to the attention scores: 0 where visible, −inf elsewhere.
        past: each layer's keys and values (B, key heads, S - T, D) of earlier tokens, or None.
        fused: as in `run_layers`.
    """
    text_model = text_model_of(model)
    rows, length = ids.shape
    x = text_model.embed_tokens(ids.flatten())  # (n, H), n = B · T
    cos, sin = rotary(text_model, x, positions)  # (B, T, D)
    cache = []

    def attend(number: int, *projected: Tensor) -> Tensor:
        query, key, value = (x.unflatten(0, (rows, length)).transpose(1, 2) for x in projected)  # (B, heads, T, D)
        if past:
            key, value = torch.cat([past[number][0], key], 2), torch.cat([past[number][1], value], 2)
        cache.append((key, value))  # (B, key heads, S, D)
        scale = text_model.layers[number].self_attn.scaling
        mixed = attention(query, key, value, bias, scale)  # (B, heads, T, D)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)  # (n, heads · D)

    x = run_layers(text_model, x, cos.flatten(0, 1)[:, None], sin.flatten(0, 1)[:, None], attend, fused)
    return x.unflatten(0, (rows, length)), cache


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(query keyᵀ · scale + bias) value: (B, heads, T, D), (B, key heads, S, D) twice, (B, 1, T, S) ->
    (B, heads, T, D)."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return WideGradAttention.apply(query, key, value, bias, scale)
    return F.scaled_dot_product_attention(query, key, value, bias, scale=scale, enable_gqa=True)


class WideGradAttention(torch.autograd.Function):
    """Torch's attention kernel for a CPU, with its gradient taken in float32 from bfloat16 input: more exact, and up to
    twice as fast as its gradient in bfloat16. What is kept for the backward pass stays in bfloat16."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mixed, log_sum = kernel(query, key, value, attn_mask=bias, scale=scale)  # (B, heads, T, D), (B, heads, T)
        ctx.save_for_backward(query, key, value, bias, mixed, log_sum)
        ctx.scale = scale
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *given, log_sum = ctx.saved_tensors
        query, key, value, bias, mixed = (tensor.float() for tensor in given)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = kernel(
            grad.float(), query, key, value, mixed, log_sum, 0.0, False, attn_mask=bias, scale=ctx.scale
        )  # fmt: skip
        return *(one.to(grad.dtype) for one in grads), None, None


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """x / rms(x) · weight over the last dimension, with the weight and epsilon of the module `norm`."""
    if torch.is_grad_enabled():
        return RMSNorm.apply(x, norm.weight, norm.variance_epsilon)
    return (x * inverse_rms(x, norm.variance_epsilon)).to(x.dtype) * norm.weight


def inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean of squares + epsilon), (…, 1), in as few torch operations as possible."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    return torch.addcmul(length.new_full((), epsilon), length, length, value=1 / x.shape[-1]).rsqrt_()


class RMSNorm(torch.autograd.Function):
    """`rms_norm` with its gradient in closed form: on a CPU three times faster than torch's own dozen small steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        inverse = inverse_rms(x, epsilon)  # (…, 1)
        normed = (x * inverse).to(x.dtype)
        ctx.save_for_backward(normed, weight, inverse)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, weight, inverse = ctx.saved_tensors
        product = grad * normed
        mean = (product @ weight).unsqueeze(-1) / weight.numel()  # (…, 1): a change of rms(x) moves every element
        grad_x = (grad * weight).sub_(normed * mean).mul(inverse).to(grad.dtype)
        return grad_x, product.flatten(0, -2).sum(0), None


def gated_down(gate: Tensor, up: Tensor, down: Any) -> Tensor:
    """down(silu(gate) · up) for the linear module `down`: (n, I), (n, I) -> (n, H)."""
    if torch.is_grad_enabled() and type(down) is torch.nn.Linear:
        return SwiGLU.apply(gate, up, down.weight, down.bias)
    return down(F.silu(gate) * up)


class SwiGLU(torch.autograd.Function):
    """`gated_down` that keeps gate and up for the backward pass and computes silu(gate) and the product again: half of
    what autograd would keep, in the widest part of a layer."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.has_bias = bias is not None
        return F.linear(F.silu(gate) * up, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)  # (n, I)
        grad_product = grad @ weight  # (n, I)
        grad_weight = grad.T @ (activated * up) if ctx.needs_input_grad[2] else None  # (H, I)
        grad_gate = torch.ops.aten.silu_backward(grad_product * up, gate)
        grad_bias = grad.sum(0) if ctx.has_bias else None
        return grad_gate, grad_product.mul_(activated), grad_weight, grad_bias


def rotary(text_model: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, T, D), of positions (B, T) or (3, B, T); `sin` carries the signs that `rotate` needs."""
    cos, sin = text_model.rotary_emb(x, positions)
    first, second = sin.chunk(2, -1)
    return cos, torch.cat([-first, second], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), with halves paired as in Llama and Qwen."""
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([second, first], -1), sin)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
