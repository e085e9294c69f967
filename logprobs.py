"""How likely was it? Log-probabilities of sampled tokens, with shared prompts and without a (B, T, V) tensor.

A prompt and its pictures are computed once per group, and the vocabulary is visited in tiles.
Letters in the shape comments: Q prompts, B completions (rows; row i answers prompt `prompt_of_row[i]`), P prompt tokens
(left-padded), T completion tokens (right-padded), H hidden size, V vocabulary, N completion tokens in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

import adapters
import layers
import parallel
from prompts import Prompts

if TYPE_CHECKING:
    from config import Config
    from llms import LLM
    from rollout import Rollout

KEPT_BYTES = 32 * 2**20  # the largest block that glibc can be told to keep (llms.tune_cpu)
LOGIT_TILE_BYTES = 256 * 2**20  # memory for the logits of one tile, tokens × vocabulary
BLOCK = 8192  # tokens of the vocabulary in a tile


def token_logps(
    llm: LLM,
    rollout: Rollout,
    temperature: float = 1.0,
    rows: list[int] | None = None,
    model: Any = None,
    share_prompt: bool = True,
) -> Tensor:
    """(B, T) float32 log-probabilities of the completion tokens under softmax(logits / temperature); 0 off the mask.

    Differentiable with respect to the model's weights. `rows` picks rows of the rollout; `model` is another set of
    weights (the frozen reference). See `token_logps_and_entropy`.
    """
    return token_logps_and_entropy(llm, rollout, temperature, rows, model, share_prompt)[0]


def token_logps_and_entropy(
    llm: LLM,
    rollout: Rollout,
    temperature: float = 1.0,
    rows: list[int] | None = None,
    model: Any = None,
    share_prompt: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the policy's entropy, both (B, T) float32, 0 off the sampled mask.

    Each prompt, pictures included, is computed once and its keys and values are shared by all of its rows; gradients
    flow back through them. With `share_prompt=False` every row carries a copy of its prompt: slower and equal, for
    gradient checkpointing, which recomputes layers and cannot keep a cache. The entropy carries no gradient.
    """
    model = llm.trained if model is None else model
    rows = list(range(len(rollout.completion_ids))) if rows is None else list(rows)
    mask, padded = rollout.completion_mask[rows], rollout.sampled_mask[rows]  # (B, T) each
    length = int(mask.sum(1).max()) if rows else 0
    mask, sampled = mask[:, :length], padded[:, :length]
    ids = rollout.completion_ids[rows][:, :length]  # (B, T)
    positions = None if rollout.positions is None else rollout.positions[:, rows, :length]  # (3, B, T)
    vision = [rollout.vision[row] for row in rows] if rollout.vision else []
    hidden_of: Callable = hidden_states if share_prompt else hidden_states_unshared
    prompt_of_row = [rollout.prompt_of_row[row] for row in rows]

    def compute() -> tuple[Tensor, Tensor]:  # (N,) each
        hidden = hidden_of(model, rollout.prompts, prompt_of_row, ids, mask, positions, vision)  # (B, T, H)
        # Only at sampled tokens: a placeholder of an observation's picture has log-probability −inf.
        weight, excluded = model.get_output_embeddings().weight, llm.excluded_mask()  # (V, H), (V,)
        return BlockedLogps.apply(hidden[sampled], weight, ids[sampled], temperature, excluded)

    logps, entropy = parallel.forward(model, compute)
    zeros = torch.zeros(padded.shape, device=padded.device, dtype=logps.dtype)
    return zeros.masked_scatter(padded, logps), zeros.masked_scatter(padded, entropy)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean (0-d) of values (B, T) where mask (B, T) is True; 0 where it never is."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def reference_logps(llm: LLM, reference: Any, rollout: Rollout, config: Config) -> Tensor:
    """(B, T) log-probabilities of the completions under the frozen reference, a micro-batch at a time. With adapters,
    `reference` is the policy itself: its adapters are disabled here."""
    logps = torch.zeros_like(rollout.sampler_logps)  # (B, T)
    share_prompt = not config.gradient_checkpointing
    with adapters.without(reference):
        for rows in rollout.micro_batches(config.micro_batch_tokens):
            logps[rows] = token_logps(llm, rollout, config.temperature, rows, reference, share_prompt)
    return logps


# ---------------------------------------------------------------------------------------------------------------------
# Hidden states: the prompts once, then the completions


def hidden_states(
    model: Any,
    prompts: Prompts,
    prompt_of_row: list[int],
    ids: Tensor,
    mask: Tensor,
    positions: Tensor | None = None,
    vision: Sequence[dict[str, Tensor]] = (),
) -> Tensor:
    """(B, T, H): at t the state that predicts completion token t. One pass over prompts, one over completions.

    Args:
        ids, mask: (B, T), observations included. positions: (3, B, T) of completions with pictures, else None.
        vision: for each row the pictures of its observations, as in `Prompts`; empty if there are none.
    """
    used = sorted(set(prompt_of_row))
    prompts = prompts.select(used)
    index = torch.tensor([used.index(prompt) for prompt in prompt_of_row], device=ids.device)  # (B,)
    prompt_hidden, cache = forward_prompts(model, prompts)  # (Q, P, H); left-padded, so column -1 is the last token
    first = prompt_hidden[:, -1].index_select(0, index).unsqueeze(1)  # (B, 1, H) predicts token 0
    if ids.shape[1] == 1:
        return first
    positions = None if positions is None else positions[..., :-1]
    rest, _ = forward_completions(
        model, prompts, cache, index, ids[:, :-1], mask[:, :-1], positions, vision
    )  # (B, T - 1, H)
    return torch.cat([first, rest], 1)


def hidden_states_unshared(
    model: Any,
    prompts: Prompts,
    prompt_of_row: list[int],
    ids: Tensor,
    mask: Tensor,
    positions: Tensor | None = None,
    vision: Sequence[dict[str, Tensor]] = (),
) -> Tensor:
    """The same states in one pass over (B, P + T), each row with a copy of its prompt."""
    prompts = prompts.select(prompt_of_row)
    joined = with_completions(prompts, ids, mask, positions, vision)
    hidden, _ = forward_prompts(model, joined, use_cache=False)  # (B, P + T, H)
    return hidden[:, prompts.ids.shape[1] - 1 : -1]


def with_completions(
    prompts: Prompts,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor | None = None,
    vision: Sequence[dict[str, Tensor]] = (),
) -> Prompts:
    """B prompts (B, P) and their completions (B, T) in one: (B, P + T), with padding on the left and on the right."""
    if positions is None:
        positions = completion_positions(prompts, torch.arange(len(ids), device=ids.device), ids.shape[1])
    return Prompts(
        torch.cat([prompts.ids, ids], 1),
        torch.cat([prompts.mask, mask], 1),
        torch.cat([prompts.positions, positions], -1),
        [joined_pictures(pair) for pair in zip(prompts.vision, vision, strict=True)] if vision else prompts.vision,
    )


def forward_prompts(model: Any, prompts: Prompts, use_cache: bool = True) -> tuple[Tensor, Any]:
    """One pass over the prompts, pictures included -> (hidden states (Q, P, H), key-value cache or None)."""
    pictures = joined_pictures(prompts.vision)
    if use_cache and not pictures and uses_fast_layers(model):
        length = prompts.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=prompts.ids.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=prompts.ids.device)  # padding sees itself, or it is NaN
        visible = prompts.mask[:, None] & causal | itself  # (Q, P, P)
        return layers.forward(model, prompts.ids, prompts.positions, attention_bias(visible, model))
    output = model.base_model(
        input_ids=prompts.ids,
        attention_mask=prompts.mask.long(),
        position_ids=prompts.positions,
        past_key_values=DynamicCache(config=model.config.get_text_config()) if use_cache else None,
        use_cache=use_cache,
        **pictures,
    )
    return output.last_hidden_state, output.past_key_values


def forward_completions(
    model: Any,
    prompts: Prompts,
    cache: Any,
    index: Tensor,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor | None = None,
    vision: Sequence[dict[str, Tensor]] = (),
) -> tuple[Tensor, Any]:
    """(B, T, H) hidden states of completion tokens, and keys and values of (B, P + T) tokens. Row i sees the keys and
    values of prompt index[i]; gradients add up over the rows of a group. Arguments as in `hidden_states`."""
    if positions is None:
        positions = completion_positions(prompts, index, ids.shape[1])
    pictures = joined_pictures(vision)
    if uses_fast_layers(model) and not pictures:
        past = [(keys.index_select(0, index), values.index_select(0, index)) for keys, values in keys_and_values(cache)]
        visible = prompts.mask[index, None].expand(-1, ids.shape[1], -1)  # (B, T, P)
        earlier = torch.ones_like(ids[0], dtype=torch.bool).expand(len(ids), ids.shape[1], -1).tril()  # (B, T, T)
        bias = attention_bias(torch.cat([visible, earlier], 2), model)  # (B, 1, T, P + T)
        return layers.forward(model, ids, positions, bias, past)
    if isinstance(cache, list):
        cache = transformers_cache(model, cache)
    cache.batch_select_indices(index)
    output = model.base_model(
        input_ids=ids,
        attention_mask=torch.cat([prompts.mask[index], mask], 1).long(),  # (B, P + T)
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        **pictures,
    )
    return output.last_hidden_state, output.past_key_values


def joined_pictures(vision: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The inputs of the vision tower for the pictures of several sequences, in their order; empty without pictures."""
    shown = [one for one in vision if one]
    return {name: torch.cat([one[name] for one in shown]) for name in shown[0]} if shown else {}


def transformers_cache(model: Any, pairs: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """transformers' cache with each layer's keys and values."""
    cache = DynamicCache(config=model.config.get_text_config())
    for number, (keys, values) in enumerate(pairs):
        cache.update(keys, values, number)
    return cache


def uses_fast_layers(model: Any) -> bool:
    """Whether the loss runs layers.py: on a CPU, where it is faster. A GPU gains less, and transformers has the
    attention kernels that were asked for."""
    return model.device.type == "cpu" and model.config._attn_implementation == "sdpa" and layers.has_fast_layers(model)


def keys_and_values(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Each layer's (Q, key heads, P, D), from layers.py's list or from transformers' cache."""
    return cache if isinstance(cache, list) else [(layer.keys, layer.values) for layer in cache.layers]


def attention_bias(visible: Tensor, model: Any) -> Tensor:
    """Additive attention mask (B, 1, T, S) of visible (B, T, S): 0 where visible, −inf elsewhere."""
    return torch.zeros_like(visible, dtype=model.dtype).masked_fill_(~visible, -torch.inf)[:, None]


def completion_positions(prompts: Prompts, index: Tensor, length: int) -> Tensor:
    """(B, length), or (3, B, length): the positions after the prompt of each row."""
    positions = prompts.next_positions()[index, None] + torch.arange(length, device=index.device)
    return positions if prompts.positions.dim() == 2 else positions.expand(3, -1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# From hidden states to log-probabilities


class BlockedLogps(torch.autograd.Function):
    """log softmax(h Wᵀ / temperature)[target] and its entropy for N tokens, in tiles of some tokens × some of the
    vocabulary, so that memory holds (n, v) and never (N, V).

    The forward pass takes the log-sum-exp block by block. The backward pass computes each tile's logits again; with
    p = softmax, d logp / d logits = (onehot(target) − p) / temperature. A block's part of the weight's gradient is
    complete before the next block begins, so that it is written once: with a real vocabulary that gradient is far
    larger than a tile.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, excluded: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        log_sum, entropy, logps = hidden.new_empty(3, len(hidden), dtype=layers.wide(hidden.dtype))  # each (N,)
        tokens, blocks = tiles(hidden, weight)
        for part in tokens:
            peak = torch.full_like(log_sum[part], torch.finfo(log_sum.dtype).min)  # (n,) the largest logit so far
            total, moment = torch.zeros_like(peak), torch.zeros_like(peak)  # (n,) Σ e^(l − peak), Σ l e^(l − peak)
            for block in blocks:
                hide = None if excluded is None else excluded[block]  # (v,)
                logits = tempered_logits(hidden[part], weight[block], temperature, hide)  # (n, v)
                inside, column = in_block(targets[part], block)  # (n,) each
                logps[part] = torch.where(inside, logits.gather(1, column[:, None])[:, 0], logps[part])
                higher = torch.maximum(peak, logits.amax(1))  # (n,)
                shrink = (peak - higher).exp_()  # (n,)
                p = (logits - higher[:, None]).exp_()  # (n, v), not normalized
                if hide is not None:
                    logits.masked_fill_(hide, 0.0)  # p · l is 0 · −inf there, and counts as 0
                total, moment = total * shrink + p.sum(1), moment * shrink + torch.linalg.vecdot(p, logits)
                peak = higher
            log_sum[part] = peak + total.log()
            entropy[part] = log_sum[part] - moment / total
        logps -= log_sum
        ctx.save_for_backward(hidden, weight, targets, log_sum)
        ctx.temperature, ctx.excluded = temperature, excluded
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_sum = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]  # a frozen head needs no gradient of its weight
        # Sums over several tiles are taken in float32 at least: bfloat16 would round small contributions away.
        grad_hidden = torch.zeros_like(hidden, dtype=layers.wide(hidden.dtype)) if needs_hidden else None  # (N, H)
        grad_weight = torch.empty_like(weight) if needs_weight else None  # (V, H)
        tokens, blocks = tiles(hidden, weight)
        scale = -grad_logps / ctx.temperature  # (N,)
        for block in blocks:
            hide = None if ctx.excluded is None else ctx.excluded[block]  # (v,)
            of_block: Tensor | None = None  # (v, H), the block's part of the weight's gradient
            for part in tokens:
                p = tempered_logits(hidden[part], weight[block], ctx.temperature, hide)  # (n, v)
                p.sub_(log_sum[part, None]).exp_()
                inside, column = in_block(targets[part], block)  # (n,) each
                p.scatter_add_(1, column[:, None], -inside[:, None].to(p.dtype))  # p − onehot, before any rounding
                p = p.mul_(scale[part, None]).to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] += p @ weight[block]
                if grad_weight is not None:
                    product = p.T @ hidden[part]  # (v, H)
                    if len(tokens) == 1:
                        of_block = product
                    else:
                        wide = product.to(layers.wide(product.dtype))
                        of_block = wide if of_block is None else of_block.add_(wide)
            if grad_weight is not None and of_block is not None:
                grad_weight[block] = of_block
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def in_block(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Which targets (n,) lie in a block of the vocabulary, and their columns in it (0 for the others)."""
    inside = (targets >= block.start) & (targets < block.stop)
    return inside, torch.where(inside, targets - block.start, 0)


def tempered_logits(hidden: Tensor, weight: Tensor, temperature: float, excluded: Tensor | None) -> Tensor:
    """(n, v) logits / temperature in float32 (float64 stays), −inf on excluded tokens."""
    logits = (hidden @ weight.T).to(layers.wide(hidden.dtype))
    if temperature != 1:
        logits.div_(temperature)
    return logits if excluded is None else logits.masked_fill_(excluded, -torch.inf)


def tiles(hidden: Tensor, weight: Tensor) -> tuple[list[slice], list[slice]]:
    """Slices of the N tokens and of the vocabulary. On a CPU a tile is so small that the next one reuses its memory."""
    at_once = KEPT_BYTES if hidden.device.type == "cpu" else LOGIT_TILE_BYTES
    width = min(len(weight), BLOCK)
    height = max(1, at_once // (4 * width)) if len(weight) > BLOCK else min(512, max(1, at_once // (4 * width)))
    return slices(len(hidden), height), slices(len(weight), width)


def slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
