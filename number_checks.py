"""Does this code compute what the model computes? A trial of a few tokens when a model is loaded.

A config does not name every bias, scale, cap and norm of an architecture, so numbers are compared: log-probabilities of
the sampler and of the loss with the model's own, and layers.py with decoder layers in float32.

Letters in the shape comments: G completions of a prompt, P prompt tokens, T completion tokens, N tokens, V vocabulary,
H hidden size, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import layers
from logprobs import token_logps
from model_checks import ModelError
from prompts import Prompts, prompt_positions
from rollout import Rollout, Sampler, fused_layers, fused_weights

if TYPE_CHECKING:
    from llms import LLM

TEXT = "One hen lays three eggs on Monday and two on Tuesday. How many eggs does she lay in both days?"
PROMPT_LENGTHS, GENERATIONS, TOKENS = (9, 5), 2, 3  # two prompts, one of them padded, with two completions each
# The largest mean difference of log-probabilities that rounding explains, in nats.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
HEAD_TOLERANCE = 1e-3  # in nats: the same product twice, so that precision does not matter
LAYER_TOLERANCE = 1e-4  # in float32, relative to the length of the output


def check_numbers(llm: LLM) -> None:
    """Sample and score a few tokens. If layers.py differs, use the model's own forward pass and say so in one line.

    Raises:
        ModelError: the model's own forward pass cannot be used either.
    """
    problem = cache_problem(llm.model) or head_problem(llm)
    if not problem and layers.has_fast_layers(llm.model):
        if not (slower := layers_problem(llm.model) or rollout_problem(llm)):
            return
        layers.disable(llm.model)
        print(f"{llm.name}: layers.py does not compute this model ({slower}); its own forward pass is used, slower")
    if problem := problem or rollout_problem(llm):
        kind = llm.model.config.model_type
        raise ModelError(
            f"{llm.name} cannot be used: {problem}. Its architecture {kind!r} works otherwise than this code; those of "
            "Llama, Mistral, Gemma 3, OLMo, SmolLM and Qwen 2 to 3 work"
        )


def compare(what: str, measure: Callable[[], float], most: float, unit: str = "") -> str:
    """A phrase if `measure()`, the difference of `what` from the model's own numbers, exceeds `most` or fails; else "".

    Raises:
        ModelError: the weights are not finite.
    """
    try:
        found = measure()
    except (torch.OutOfMemoryError, ModelError):
        raise
    except Exception as error:  # architectures fail in many ways
        return f"{what} fails with {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return "" if found <= most else f"{what} differs by {found:.2g}{unit} from the model's own numbers"


def cache_problem(model: Any) -> str:
    """Rows that share a prompt share its keys and values. A recurrent state is not copied like those, and an index of
    the keys that matter is only used by sequences longer than the trial's."""
    try:
        kinds = {type(layer) for layer in DynamicCache(config=model.config.get_text_config()).layers}
    except Exception as error:  # transformers has no cache for some kinds of layers
        return f"its cache fails with {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    others = sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
    return f"it keeps other states than keys and values ({others[0]})" if others else ""


# ---------------------------------------------------------------------------------------------------------------------
# The output embedding


def head_problem(llm: LLM) -> str:
    """Log-probabilities are computed from the last hidden states and the weight of the output embedding alone."""
    model, head = llm.model, llm.model.get_output_embeddings()
    if head is None:
        return "it has no output embedding"
    known = {id(weight) for weight in model.base_model.parameters()} | {id(head.weight)}
    if others := [name for name, weight in model.named_parameters() if id(weight) not in known]:
        return f"its logits also depend on the parameter {others[0]}"
    return compare("the output embedding", lambda: difference_of_head(model, trial_ids(llm)), HEAD_TOLERANCE, " nats")


@torch.inference_mode()
def difference_of_head(model: Any, ids: Tensor) -> float:
    """The mean over tokens of Σ p |log p − log q|: p of the model's logits, q of its hidden states and embedding."""
    ids = ids[None].to(model.device)  # (1, N)
    hidden = model.base_model(input_ids=ids).last_hidden_state  # (1, N, H)
    wide = layers.wide(model.dtype)
    expected = model(input_ids=ids).logits.to(wide).log_softmax(-1)  # (1, N, V)
    found = F.linear(hidden, model.get_output_embeddings().weight).to(wide).log_softmax(-1)  # (1, N, V)
    if not torch.isfinite(expected).all():
        raise ModelError(f"{model.name_or_path} has weights that are not finite: its logits are no numbers")
    return float(((found - expected).abs() * expected.exp()).sum(-1).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Decoder layers


def layers_problem(model: Any) -> str:
    return compare("a decoder layer", lambda: difference_of_layers(model), LAYER_TOLERANCE)


@torch.no_grad()
def difference_of_layers(model: Any) -> float:
    """Between decoder layers, the first and the last one, and layers.py: |difference| / |output|, the larger one.

    Copies in float32 are compared, because half precision hides small mistakes. Norms and biases are changed at random,
    because a bias may be 0 until it is trained.
    """
    text_model = layers.text_model_of(model)
    generator = torch.Generator().manual_seed(0)
    shape = sum(PROMPT_LENGTHS), model.config.get_text_config().hidden_size
    hidden = torch.randn(shape, generator=generator).to(model.device)  # (N, H)
    positions = torch.arange(len(hidden), device=model.device)[None]  # (1, N)
    if hasattr(model.base_model, "get_rope_index"):
        positions = positions.expand(3, 1, -1)
    rotary = text_model.rotary_emb(hidden, positions)  # cos and sin (1, N, D)
    mask = torch.full((len(hidden), len(hidden)), -torch.inf, device=model.device).triu(1)[None, None]  # (1, 1, N, N)
    found = 0.0
    for layer in (text_model.layers[0], text_model.layers[-1]):
        layer, norm = copy.deepcopy(layer).float(), copy.deepcopy(text_model.norm).float()
        for weight in (*layer.parameters(), *norm.parameters()):
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator).to(model.device))
        layer.self_attn.config._attn_implementation = "eager"  # flash-attn has no float32
        output = layer(hidden[None], position_embeddings=rotary, attention_mask=mask, position_ids=positions)
        expected = norm(output)[0]  # (N, H)
        alone = SimpleNamespace(layers=[layer], norm=norm, rotary_emb=text_model.rotary_emb)
        cos, sin = (x[0, :, None] for x in layers.rotary(alone, hidden, positions))  # (N, 1, D)
        for fused in (None, fused_layers(alone.layers, fused_weights(alone.layers))):
            output = layers.run_layers(alone, hidden, cos, sin, causal_attention(layer), fused)  # (N, H)
            found = max(found, float((output - expected).norm() / expected.norm()))
    return found


def causal_attention(layer: Any) -> Callable[..., Tensor]:
    """The `attend` of layers.run_layers for one sequence of N tokens and one layer."""

    def attend(number: int, *projected: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in projected)  # (1, heads, N, D)
        scale = layer.self_attn.scaling
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return mixed[0].transpose(0, 1).flatten(1)  # (N, heads · D)

    return attend


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and scoring


def rollout_problem(llm: LLM) -> str:
    """Sample a few tokens and score them in every way that the loss may; compare with the model's own forward pass."""
    most = TOLERANCE.get(llm.dtype, 1e-3)
    rollouts: list[Rollout] = []
    expected: list[Tensor] = []  # (B, T)

    def sampling() -> float:
        rollouts.append(Sampler(llm).sample(trial_prompts(llm), GENERATIONS, TOKENS, ignore_eos=True))
        expected.append(own_logps(llm, rollouts[0]))
        return difference(rollouts[0].sampler_logps, expected[0])

    def scoring(share_prompt: bool) -> float:
        with torch.no_grad():
            return difference(token_logps(llm, rollouts[0], share_prompt=share_prompt), expected[0])

    return (
        compare("sampling", sampling, most, " nats")
        or compare("scoring with shared prompts", lambda: scoring(True), most, " nats")
        or compare("scoring", lambda: scoring(False), most, " nats")
    )


def trial_ids(llm: LLM) -> Tensor:
    """(N,) tokens of TEXT, enough for the trial's prompts."""
    ids = llm.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids * sum(PROMPT_LENGTHS))[: sum(PROMPT_LENGTHS)]


def trial_prompts(llm: LLM) -> Prompts:
    """Two prompts without pictures; the second one is shorter and left-padded."""
    longest = max(PROMPT_LENGTHS)
    rows = [F.pad(row, (longest - len(row), 0), value=llm.pad_token_id) for row in trial_ids(llm).split(PROMPT_LENGTHS)]
    mask = torch.arange(longest) >= longest - torch.tensor(PROMPT_LENGTHS)[:, None]  # (Q, P)
    ids, vision = torch.stack(rows), [{} for _ in rows]  # type: ignore[var-annotated]
    return Prompts(ids, mask, prompt_positions(llm, ids, mask, vision), vision)


@torch.inference_mode()
def own_logps(llm: LLM, rollout: Rollout) -> Tensor:
    """(B, T) by the model's own forward pass over one prompt's rows at a time, without padding and without a cache."""
    found, excluded = [], llm.excluded_mask()
    for number, (prompt, visible) in enumerate(zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)):
        completions = rollout.completion_ids[number * GENERATIONS : (number + 1) * GENERATIONS]  # (G, T)
        ids = torch.cat([prompt[visible].expand(GENERATIONS, -1), completions], 1)  # (G, P + T)
        logits = llm.model(input_ids=ids).logits[:, -TOKENS - 1 : -1].to(layers.wide(llm.dtype))  # (G, T, V)
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        found.append(logits.log_softmax(-1).gather(2, completions[..., None])[..., 0])
    return torch.cat(found)


def difference(logps: Tensor, expected: Tensor) -> float:
    """The mean over tokens of |log p − log q|, both (B, T), for the prompt where it is larger."""
    gap = (logps - expected).abs().view(len(PROMPT_LENGTHS), -1).mean(1)  # (Q,)
    return float(gap.max().nan_to_num(torch.inf))
