"""The decoder layers of the Llama and Qwen families, written out once over the model's own weights.

The sampler's decode step and, on a CPU, the forward pass of the loss both run these few operations instead of
transformers' modules; what differs between them is how queries meet keys, and that is a function they bring along.

Letters in the shape comments: n tokens side by side, H hidden size, D head size, B rows, T tokens of each, S keys that
they may see (those of the past first).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

LEAN_FAMILIES = {"llama", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}


def is_lean(model) -> bool:
    """Is this an architecture that `run_layers` knows? Others compute through transformers' own forward pass."""
    config = model.config.get_text_config()
    full_attention = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    rope = getattr(config, "rope_parameters", None) or {}  # none where positions are learned, as in GPT-2
    static_rope = rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
    return config.model_type in LEAN_FAMILIES and full_attention and static_rope and config.hidden_act == "silu"


def text_model_of(model):
    """The decoder itself, without vision tower and output embedding."""
    return getattr(model.base_model, "language_model", model.base_model)


def run_layers(text_model, x: torch.Tensor, cos, sin, attend, fused=None) -> torch.Tensor:
    """(n, H) embeddings of tokens -> (n, H) their last hidden states, normed.

    Args:
        cos, sin: (n, 1, D), the rotary position of each token, as `rotary` gives them.
        attend: (number of the layer, query (n, heads, D), key and value (n, key heads, D)) -> (n, heads · D).
        fused: for each layer the weights of query, key and value side by side, their biases, and those of gate and up:
            fewer and larger products, for few tokens at a time. None: each module by itself, with gradients.
    """
    for number, layer in enumerate(text_model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        normed = rms_norm(x, layer.input_layernorm)
        if fused:
            qkv, qkv_bias, gate_up = fused[number]
            heads = [part.out_features // attention.head_dim for part in (attention.q_proj, attention.k_proj)]
            projected = F.linear(normed, qkv, qkv_bias).unflatten(-1, (-1, attention.head_dim))
            both, value = projected[:, : sum(heads)], projected[:, sum(heads) :]  # queries and keys are rotated at once
            if hasattr(attention, "q_norm"):  # Qwen3
                query, key = both.split(heads, 1)
                both = torch.cat([rms_norm(query, attention.q_norm), rms_norm(key, attention.k_norm)], 1)
            query, key = rotate(both, cos, sin).split(heads, 1)
        else:
            parts = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
            query, key, value = (part.unflatten(-1, (-1, attention.head_dim)) for part in parts)
            if hasattr(attention, "q_norm"):
                query, key = rms_norm(query, attention.q_norm), rms_norm(key, attention.k_norm)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        x = x + attention.o_proj(attend(number, query, key, value))
        normed = rms_norm(x, layer.post_attention_layernorm)
        gate, up = F.linear(normed, gate_up).chunk(2, -1) if fused else (mlp.gate_proj(normed), mlp.up_proj(normed))
        x = x + mlp.down_proj(F.silu(gate) * up)
    return rms_norm(x, text_model.norm)


def forward(model, ids, positions, hide, past=None):
    """One differentiable pass over (B, T) tokens -> (hidden states (B, T, H), keys and values of each layer).

    Args:
        positions: (B, T), or (3, B, T) for models with 3-D rotary positions.
        hide: (B, 1, T, S), −inf on keys that a token may not see, else 0.
        past: for each layer keys and values (B, key heads, S - T, D) of what stands before, or None.
    """
    text_model = text_model_of(model)
    rows, length = ids.shape
    x = text_model.embed_tokens(ids.flatten())  # (n, H), n = B · T
    cos, sin = rotary(text_model, x, positions)  # (B, T, D)
    cache = []

    def attend(number, *projected):
        query, key, value = (x.unflatten(0, (rows, length)).transpose(1, 2) for x in projected)  # (B, heads, T, D)
        if past:
            key, value = torch.cat([past[number][0], key], 2), torch.cat([past[number][1], value], 2)
        cache.append((key, value))  # (B, key heads, S, D)
        scale = text_model.layers[number].self_attn.scaling
        mixed = F.scaled_dot_product_attention(query, key, value, hide, scale=scale, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)  # (n, heads · D)

    x = run_layers(text_model, x, cos.flatten(0, 1)[:, None], sin.flatten(0, 1)[:, None], attend)
    return x.unflatten(0, (rows, length)), cache


def rms_norm(x: torch.Tensor, norm) -> torch.Tensor:
    if torch.is_grad_enabled():
        return RMSNorm.apply(x, norm.weight, norm.variance_epsilon)
    return (x * inverse_rms(x, norm.variance_epsilon)).to(x.dtype) * norm.weight


def inverse_rms(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """(…, 1), 1 / sqrt(mean of squares + epsilon), in as few operations as it can be said."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    return torch.addcmul(length.new_full((), epsilon), length, length, value=1 / x.shape[-1]).rsqrt_()


class RMSNorm(torch.autograd.Function):
    """x / rms(x) · weight. On a CPU torch differentiates its own through a dozen small steps, three times slower."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        inverse = inverse_rms(x, epsilon)
        normed = (x * inverse).to(x.dtype)
        ctx.save_for_backward(normed, weight, inverse)
        return normed * weight

    @staticmethod
    def backward(ctx, grad):
        normed, weight, inverse = ctx.saved_tensors
        product = grad * normed
        mean = (product @ weight).unsqueeze(-1) / weight.numel()  # (…, 1): what moves rms(x) moves all of x
        grad_x = (grad * weight).sub_(normed * mean).mul(inverse).to(grad.dtype)
        return grad_x, product.flatten(0, -2).sum(0), None


def rotary(text_model, x: torch.Tensor, positions: torch.Tensor):
    """cos and sin (B, T, D) of positions (B, T) or (3, B, T); sin with the signs of `rotate` in it."""
    cos, sin = text_model.rotary_emb(x, positions)
    first, second = sin.chunk(2, -1)
    return cos, torch.cat([-first, second], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves paired as Llama and Qwen do."""
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([second, first], -1), sin)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
