"""The sampler: groups of completions for a batch of prompts, near the speed that memory allows, in plain torch.

What makes it fast:
- each prompt, picture included, is computed once and its keys and values are then copied to its G rows;
- a lean decode step over the very weights that are trained (no second copy): query, key and value projections are one
  matrix product, as are gate and up; the key-value cache is allocated beforehand;
- on CUDA the step, sampling included, is captured as a graph per shape and replayed: one launch, no host in between;
- rows that have finished leave in halvings, and the host looks whether any have only every few tokens;
- the log-probabilities of the sampled tokens fall out of sampling: no extra pass.

What is sampled is exactly softmax(logits / temperature). The model's own generation config (top-k, top-p, repetition
penalty) has no say; only placeholder tokens that would break the model are excluded, here and in llms.token_logps.

Letters in the shape comments: Q prompts, G completions each, B = Q·G rows, P prompt tokens, T completion tokens,
S = P + T cache slots, L layers, D head size, V vocabulary, b rows still decoding, w slots attended to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lean
from llms import LLM, Prompts, encode_prompts, forward_prompts, keys_and_values

# Attention reads the cache in multiples of so many slots: less to read on a CPU, fewer shapes to capture on a GPU.
WINDOW = {"cpu": 16, "cuda": 64}


@dataclass
class Rollout:
    """Q prompts with G completions each; row i of B = Q·G answers prompt i // G.

    Attributes:
        prompts: the encoded prompts, with pictures.
        completion_ids, completion_mask: (B, T), right-padded. The mask covers the end-of-sequence token (it is trained)
            and nothing after it.
        sampler_logps: (B, T) float32, log-probabilities as sampled; 0 off the mask.
        finished: (B,) True where an end-of-sequence token was sampled, False where the completion was cut off.
        texts: B decoded completions, special tokens removed.
    """

    prompts: Prompts
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    sampler_logps: torch.Tensor
    finished: torch.Tensor
    texts: list[str]
    num_generations: int

    @property
    def prompt_ids(self) -> torch.Tensor:  # (Q, P)
        return self.prompts.ids

    @property
    def prompt_mask(self) -> torch.Tensor:  # (Q, P)
        return self.prompts.mask

    @property
    def prompt_of_row(self) -> list[int]:
        return [row // self.num_generations for row in range(len(self.completion_ids))]


@torch.inference_mode()
def sample(
    llm: LLM,
    examples,
    num_generations: int,
    max_completion_length: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    ignore_eos: bool = False,
) -> Rollout:
    """Sample `num_generations` completions for each example (or for already encoded `Prompts`).

    Args:
        temperature: 0 decodes greedily (`sampler_logps` are then those of temperature 1).
        generator: source of randomness, on the model's device; only it is advanced. None uses torch's default one.
        ignore_eos: sample `max_completion_length` tokens whatever comes, for measuring.
    """
    prompts = (examples if isinstance(examples, Prompts) else encode_prompts(llm, examples)).to(llm.device)
    hidden, cache = forward_prompts(llm.model, prompts)  # (Q, P, H)
    decoder = get_decoder(llm, len(prompts) * num_generations, prompts.ids.shape[1] + max_completion_length)
    decoder.start(prompts, cache, num_generations, temperature, generator, ignore_eos)
    last = hidden[:, -1].repeat_interleave(num_generations, 0)  # (B, H); left-padded, so -1 is the prompt's last token
    ids, logps, lengths, finished = decoder.decode(last, max_completion_length)
    with torch.inference_mode(False):  # tensors made in inference mode cannot take part in autograd, their clones can
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths.clone()[:, None]  # (B, T)
        ids, logps, finished = ids.clone(), logps.clone(), finished.clone()
        prompts = clone_prompts(prompts)
    ids.masked_fill_(~mask, llm.pad_token_id)
    logps.masked_fill_(~mask, 0.0)
    tokens = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    texts = llm.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Rollout(prompts, ids, mask, logps, finished, texts, num_generations)


def join(parts: list[tuple[Rollout, list[int]]]) -> Rollout:
    """One rollout of the groups that are named in each of several, in that order."""
    length = max(rollout.completion_ids.shape[1] for rollout, _ in parts)
    width = max(rollout.prompt_ids.shape[1] for rollout, _ in parts)
    G = parts[0][0].num_generations

    def rows(tensor, groups):  # (B, T) -> (kept rows, longest T)
        index = [row for group in groups for row in range(group * G, (group + 1) * G)]
        return F.pad(tensor[index], (0, length - tensor.shape[1]))

    def prompts(tensor, groups):  # (…, Q, P) -> (…, kept, longest P), left-padded
        return F.pad(tensor[..., groups, :], (width - tensor.shape[-1], 0))

    kept = [(rollout, groups) for rollout, groups in parts if groups]
    return Rollout(
        Prompts(
            torch.cat([prompts(r.prompts.ids, groups) for r, groups in kept]),
            torch.cat([prompts(r.prompts.mask, groups) for r, groups in kept]),
            torch.cat([prompts(r.prompts.positions, groups) for r, groups in kept], -2),
            [r.prompts.vision[group] for r, groups in kept for group in groups],
        ),
        torch.cat([rows(r.completion_ids, groups) for r, groups in kept]),
        torch.cat([rows(r.completion_mask, groups) for r, groups in kept]),
        torch.cat([rows(r.sampler_logps, groups) for r, groups in kept]),
        torch.cat([r.finished.view(-1, G)[groups].flatten() for r, groups in kept]),
        [text for r, groups in kept for group in groups for text in r.texts[group * G : (group + 1) * G]],
        G,
    )


def clone_prompts(prompts: Prompts) -> Prompts:
    vision = [{name: tensor.clone() for name, tensor in one.items()} for one in prompts.vision]
    return Prompts(prompts.ids.clone(), prompts.mask.clone(), prompts.positions.clone(), vision)


def get_decoder(llm: LLM, rows: int, slots: int) -> Decoder:
    """The model's decoder, kept between calls so that buffers and CUDA graphs are made once; a larger one if needed."""
    kept = llm.decoder
    if kept is None or kept.max_rows < rows or kept.slots < slots:
        kind = LeanDecoder if lean.is_lean(llm.model) else Decoder
        rows, slots = max(rows, kept.max_rows if kept else 0), max(slots, kept.slots if kept else 0)
        llm.decoder = None  # let the old buffers go before the new ones are made
        llm.decoder = kept = kind(llm, rows, slots)
    return kept


class Decoder:
    """Decodes rows one token at a time with transformers' own forward pass: any architecture, without CUDA graphs.

    All state lives in buffers of fixed addresses that a step updates in place, so that a step can be captured as a
    CUDA graph. `LeanDecoder` below replaces how the next hidden state is computed and keeps everything else.
    """

    uses_graphs = False

    def __init__(self, llm: LLM, max_rows: int, slots: int):
        device = llm.device
        self.window = WINDOW.get(device.type, 64)
        self.llm, self.max_rows, self.slots = llm, max_rows, round_up(slots, self.window)
        # The host waits for the device when it looks at `alive`: free on a CPU, a bubble on a GPU.
        self.look_every = 1 if device.type == "cpu" else 16
        self.excluded = llm.excluded_mask()  # (V,) or None
        self.eos = torch.tensor(llm.eos_token_ids, device=device)
        self.tokens = torch.zeros(max_rows, dtype=torch.long, device=device)  # what each row reads next
        self.positions = torch.zeros(max_rows, dtype=torch.long, device=device)  # and its rotary position
        self.alive = torch.zeros(max_rows, dtype=torch.bool, device=device)
        # −inf on the slots that a row may not see, else 0
        self.hide = torch.zeros(max_rows, 1, 1, self.slots, device=device)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)  # the cache slot written next
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # the column of the output written next
        self.ids = torch.zeros(max_rows, self.slots, dtype=torch.long, device=device)
        self.logps = torch.zeros(max_rows, self.slots, device=device)
        self.lengths = torch.zeros(max_rows, dtype=torch.long, device=device)

    def start(self, prompts: Prompts, cache, num_generations: int, temperature: float, generator, ignore_eos: bool):
        """Set the buffers for B = Q·G rows whose prompts stand in slots 0 … P-1."""
        queries, prompt_length = prompts.ids.shape
        self.rows, self.prompt_length = queries * num_generations, prompt_length
        self.temperature, self.generator, self.ignore_eos = temperature, generator, ignore_eos
        self.positions[: self.rows] = prompts.next_positions().repeat_interleave(num_generations)
        self.alive[: self.rows] = True
        self.lengths.zero_()
        visible = prompts.mask.repeat_interleave(num_generations, 0)  # (B, P)
        self.hide.fill_(-torch.inf)
        self.hide[: self.rows, 0, 0, :prompt_length].masked_fill_(visible, 0.0)
        self.slot.fill_(prompt_length)
        self.column.zero_()
        self.load_cache(cache, num_generations)

    def decode(self, last_hidden: torch.Tensor, max_completion_length: int):
        """Sample until every row has ended or is full -> ids, logps (B, T), lengths, finished (B,) in row order."""
        rows, device = self.rows, self.tokens.device
        ids = torch.zeros(rows, max_completion_length, dtype=torch.long, device=device)
        logps = torch.zeros(rows, max_completion_length, device=device)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        origin = torch.arange(rows, device=device)  # which of the B rows a decoding row is

        def hand_over():
            ids[origin] = self.ids[: self.rows, :max_completion_length]
            logps[origin] = self.logps[: self.rows, :max_completion_length]
            lengths[origin] = self.lengths[: self.rows]
            finished[origin] = ~self.alive[: self.rows]

        self.emit(self.rows, last_hidden)
        for produced in range(1, max_completion_length):
            if produced % self.look_every == 0 and not self.ignore_eos:
                num_alive = int(self.alive[: self.rows].sum())
                if num_alive == 0:
                    break
                if num_alive <= self.rows // 2:
                    hand_over()
                    order = self.alive[: self.rows].int().argsort(descending=True, stable=True)
                    keep = order[: halve_to(self.rows, num_alive)]
                    origin = origin[keep]
                    self.keep_rows(keep)
            self.step(self.rows, round_up(self.prompt_length + produced, self.window))
        hand_over()
        longest = int(lengths.max())
        return ids[:, :longest], logps[:, :longest], lengths, finished

    def keep_rows(self, keep: torch.Tensor) -> None:
        """Go on with the rows `keep` only, moved to the front of the same buffers."""
        for buffer in (self.tokens, self.positions, self.alive, self.hide, self.ids, self.logps, self.lengths):
            buffer[: len(keep)] = buffer[keep]
        self.keep_cache(keep)
        self.rows = len(keep)

    def step(self, rows: int, window: int) -> None:
        self.advance(rows, window)

    def advance(self, rows: int, window: int) -> None:
        """Read the last sampled tokens, write their keys and values to the cache, sample the next ones."""
        self.hide[:rows].index_fill_(3, self.slot, 0.0)
        self.emit(rows, self.next_hidden(rows, window))
        self.slot += 1
        self.positions[:rows] += 1

    def emit(self, rows: int, hidden: torch.Tensor) -> None:
        """Sample a token for each row from its hidden state (b, H) and note it, with its log-probability."""
        logits = F.linear(hidden, self.llm.model.get_output_embeddings().weight).float()  # (b, V)
        if self.temperature not in (0, 1):
            logits /= self.temperature
        if self.excluded is not None:
            logits.masked_fill_(self.excluded, -torch.inf)
        logps = logits.log_softmax(-1)  # (b, V)
        if self.temperature == 0:
            tokens = logps.argmax(-1)
        else:  # inverse transform: the first token whose cumulated probability exceeds a uniform number
            cumulated = logps.exp().cumsum(-1)  # (b, V)
            uniform = torch.rand(rows, 1, device=hidden.device, generator=self.generator).clamp_max_(1 - 2**-23)
            tokens = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)[:, 0]
            tokens.clamp_max_(logps.shape[1] - 1)  # weights that broke give NaN, where none is found; the loop skips it
        self.ids[:rows].index_copy_(1, self.column, tokens[:, None])
        self.logps[:rows].index_copy_(1, self.column, logps.gather(1, tokens[:, None]))
        self.lengths[:rows] += self.alive[:rows]  # the end-of-sequence token itself counts, what comes after does not
        if not self.ignore_eos:
            self.alive[:rows] &= (tokens[:, None] != self.eos).all(1)
        self.tokens[:rows] = tokens
        self.column += 1

    # What LeanDecoder does in its own way:

    def load_cache(self, cache, num_generations: int) -> None:
        cache.batch_repeat_interleave(num_generations)
        self.cache = cache

    def keep_cache(self, keep: torch.Tensor) -> None:
        self.cache.batch_select_indices(keep)

    def next_hidden(self, rows: int, window: int) -> torch.Tensor:
        """(b, H) the state after each row's last token."""
        seen = self.cache.get_seq_length() + 1
        positions = self.positions[:rows, None]  # (b, 1)
        if hasattr(self.llm.model.base_model, "get_rope_index"):
            positions = positions.expand(3, -1, -1)
        return self.llm.model.base_model(
            input_ids=self.tokens[:rows, None],
            attention_mask=(self.hide[:rows, 0, 0, :seen] == 0).long(),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def halve_to(rows: int, needed: int) -> int:
    """Halve `rows` as long as `needed` rows still fit: few different batch shapes, hence few CUDA graphs."""
    while needed <= rows // 2:
        rows //= 2
    return rows


class LeanDecoder(Decoder):
    """One decode step for the Llama and Qwen families, over the model's own weights, captured as a CUDA graph."""

    def __init__(self, llm: LLM, max_rows: int, slots: int):
        super().__init__(llm, max_rows, slots)
        self.text_model = lean.text_model_of(llm.model)
        attention = self.text_model.layers[0].self_attn
        self.scaling, D = attention.scaling, attention.head_dim
        heads, options = attention.k_proj.out_features // D, {"dtype": llm.dtype, "device": llm.device}
        shape = (max_rows, heads, self.slots, D)
        self.caches = [(torch.zeros(shape, **options), torch.zeros(shape, **options)) for _ in self.text_model.layers]
        self.cos, self.sin = self.rotary_table()  # (S, D)
        self.fuse()
        self.uses_graphs = llm.device.type == "cuda"
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        self.graph_memory = None  # one pool for all graphs: they run one after the other and keep nothing in it

    def rotary_table(self):
        positions = torch.arange(self.slots, device=self.llm.device)[None]  # (1, S)
        if hasattr(self.llm.model.base_model, "get_rope_index"):
            positions = positions.expand(3, 1, -1)  # a text token stands at the same place in time, height and width
        example = torch.zeros(1, dtype=self.llm.dtype, device=self.llm.device)
        cos, sin = lean.rotary(self.text_model, example, positions)
        return cos[0], sin[0]

    def fuse(self) -> None:
        """Lay weights that are read together side by side and make the parameters views of the whole.

        There is still one copy: the optimizer updates the parameters in place, and the step below sees it.
        """
        self.fused = []
        for layer in self.text_model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
            bias = side_by_side(qkv, "bias") if attention.q_proj.bias is not None else None
            self.fused.append((side_by_side(qkv, "weight"), bias, side_by_side((mlp.gate_proj, mlp.up_proj), "weight")))

    def start(self, prompts, *args):
        if self.text_model.layers[-1].self_attn.q_proj.weight.data_ptr() != self.fused[-1][0].data_ptr():
            self.fuse()  # the model was moved or its parameters replaced since
            self.graphs.clear()
        super().start(prompts, *args)

    def load_cache(self, cache, num_generations: int) -> None:
        for (keys, values), prompt in zip(self.caches, keys_and_values(cache), strict=True):
            keys[: self.rows, :, : self.prompt_length] = prompt[0].repeat_interleave(num_generations, 0)
            values[: self.rows, :, : self.prompt_length] = prompt[1].repeat_interleave(num_generations, 0)

    def keep_cache(self, keep: torch.Tensor) -> None:
        for keys, values in self.caches:
            keys[: len(keep)] = keys[keep]
            values[: len(keep)] = values[keep]

    def step(self, rows: int, window: int) -> None:
        """On CUDA the first step of a shape runs as it is (which warms it up), the second is captured, all replayed."""
        if not self.uses_graphs:
            return self.advance(rows, window)
        key = (rows, window, self.temperature, self.ignore_eos, self.generator)  # all that is baked into a graph
        if key not in self.graphs:
            self.graphs[key] = None
            return self.advance(rows, window)
        if self.graphs[key] is None:
            graph = torch.cuda.CUDAGraph()
            if self.generator is not None:
                graph.register_generator_state(self.generator)  # so that every replay draws new numbers
            with torch.cuda.graph(graph, pool=self.graph_memory):
                self.advance(rows, window)  # recorded, not run
            self.graph_memory = graph.pool()
            self.graphs[key] = graph
        self.graphs[key].replay()

    def next_hidden(self, rows: int, window: int) -> torch.Tensor:
        """(b, H). Grouped-query attention by plain matrix products: a key head's queries stand where time would."""
        x = self.text_model.embed_tokens(self.tokens[:rows])  # (b, H)
        cos, sin = self.cos[self.positions[:rows], None], self.sin[self.positions[:rows], None]  # (b, 1, D)
        hide = self.hide[:rows, :, :, :window]  # (b, 1, 1, w)

        def attend(number, query, key, value):
            keys, values = self.caches[number]
            keys[:rows].index_copy_(2, self.slot, key.unsqueeze(2))
            values[:rows].index_copy_(2, self.slot, value.unsqueeze(2))
            query = query.reshape(rows, key.shape[1], -1, key.shape[2])  # (b, key heads, queries per key head, D)
            scores = (query * self.scaling) @ keys[:rows, :, :window].transpose(2, 3)  # (b, key heads, queries, w)
            weights = (scores + hide).softmax(-1).to(value.dtype)  # `hide` is float32, and so is the softmax
            return (weights @ values[:rows, :, :window]).reshape(rows, -1)

        return lean.run_layers(self.text_model, x, cos, sin, attend, self.fused)


def side_by_side(modules, name: str) -> torch.Tensor:
    """One tensor holding the modules' parameters `name` one after the other; each parameter becomes a view of it."""
    with torch.inference_mode(False), torch.no_grad():
        parameters = [getattr(module, name) for module in modules]
        whole = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            parameter.data = part
    return whole
