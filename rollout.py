"""How is it sampled fast? Groups of completions for a batch of prompts, near the speed that memory allows, in torch.

- Each prompt, pictures included, is computed once; its keys and values are then copied to its G rows.
- A decode step runs over the very weights that are trained (no second copy): query, key and value projections are one
  matrix product, gate and up another; the key-value cache is allocated beforehand.
- On CUDA the step, sampling included, is captured as a graph per shape and replayed: one launch, no host in between.
- Finished rows leave in halvings, and the host looks for them only every few tokens.
- Sampling yields the log-probabilities of the sampled tokens: no extra pass.

What is sampled is exactly softmax(logits / temperature). The model's generation config (top-k, top-p, repetition
penalty) is ignored; only placeholder tokens that would break the model are excluded, here and in logprobs.py.

Letters in the shape comments: Q prompts, G completions each, B = Q·G rows, P prompt tokens, T completion tokens,
S = P + T cache slots, L layers, D head size, V vocabulary, b rows still decoding, w slots attended to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

import adapters
import layers
import parallel
import turns
from config import launched
from environments import Environment, Episode
from logprobs import BLOCK, completion_positions, forward_prompts, keys_and_values
from prompts import Prompts, decode_texts, encode_prompts
from turns import Conversation

if TYPE_CHECKING:
    from llms import LLM
    from rldatasets import Example

# Attention reads the cache in multiples of so many slots: less to read on a CPU, fewer shapes to capture on a GPU.
WINDOW = {"cpu": 16, "cuda": 64}
BELOW_ONE = 1 - 2**-23  # the largest uniform number: times a float32 sum it stays below that sum
# Room for turns after the first grows by so many slots: a larger decoder has to be made again.
TURN_SLOTS = 128


@dataclass
class Rollout:
    """Q prompts with G completions each; row i of B = Q·G answers prompt i // G.

    Attributes:
        prompts: the encoded prompts, with pictures.
        completion_ids, completion_mask: (B, T), right-padded. The mask covers the end-of-sequence token, which is
            trained, and nothing after it. With several turns a completion holds the observations too.
        sampler_logps: (B, T) float32, log-probabilities as sampled; 0 on all other tokens.
        finished: (B,) True where an end-of-sequence token was sampled, False where the completion was cut off.
        texts: B decoded completions, special tokens removed; with several turns the last one's.
        sampled: (B, T) True on the tokens that the model sampled; None: on all of the completion.
        positions: (3, B, T) where observations have pictures, else None: they count on from the prompt's.
        vision: for each row the pictures of its observations, as in `Prompts`; empty if there are none.
        episodes: the turns of each row; empty where each text is the only turn.
        seconds: what the turns after the first one cost besides sampling, by name.
    """

    prompts: Prompts
    completion_ids: Tensor
    completion_mask: Tensor
    sampler_logps: Tensor
    finished: Tensor
    texts: list[str]
    num_generations: int
    sampled: Tensor | None = None
    positions: Tensor | None = None
    vision: list[dict[str, Tensor]] = field(default_factory=list)
    episodes: list[Episode] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def prompt_ids(self) -> Tensor:  # (Q, P)
        return self.prompts.ids

    @property
    def prompt_mask(self) -> Tensor:  # (Q, P)
        return self.prompts.mask

    @property
    def prompt_of_row(self) -> list[int]:  # B numbers
        return [row // self.num_generations for row in range(len(self.completion_ids))]

    @property
    def sampled_mask(self) -> Tensor:  # (B, T)
        """The tokens that the model sampled; in one turn, all of the completion."""
        return self.completion_mask if self.sampled is None else self.sampled

    @property
    def last_turn_mask(self) -> Tensor:  # (B, T)
        """The sampled tokens that no observation follows."""
        observed = self.completion_mask & ~self.sampled_mask  # (B, T)
        return self.sampled_mask & (observed.flip(1).cumsum(1).flip(1) == 0)

    @property
    def lengths(self) -> Tensor:  # (B,)
        """Sampled tokens of each row."""
        return self.sampled_mask.sum(1)

    @property
    def longest_turns(self) -> Tensor:  # (B,)
        """Sampled tokens of each row's longest turn."""
        longest = [max(turn.length for turn in episode.turns) for episode in self.episodes]
        return torch.tensor(longest) if self.episodes else self.lengths

    @property
    def texts_of_turns(self) -> list[list[str]]:
        """For each row the texts that the model wrote, turn by turn."""
        return [episode.texts for episode in self.episodes] or [[text] for text in self.texts]

    def select(self, groups: list[int]) -> Rollout:
        """The groups at these indices, in that order."""
        G = self.num_generations
        rows = [row for group in groups for row in range(group * G, (group + 1) * G)]
        return Rollout(
            self.prompts.rows(groups),
            self.completion_ids[rows],
            self.completion_mask[rows],
            self.sampler_logps[rows],
            self.finished[rows],
            [self.texts[row] for row in rows],
            G,
            None if self.sampled is None else self.sampled[rows],
            None if self.positions is None else self.positions[:, rows],
            [self.vision[row] for row in rows] if self.vision else [],
            [self.episodes[row] for row in rows] if self.episodes else [],
        )

    @staticmethod
    def cat(parts: Sequence[Rollout]) -> Rollout:
        """All groups of several rollouts, padded to the longest."""
        length = max(part.completion_ids.shape[1] for part in parts)

        def padded(tensor: Tensor) -> Tensor:  # (…, T) -> (…, longest T)
            return F.pad(tensor, (0, length - tensor.shape[-1]))

        pictures = any(part.vision for part in parts)
        return Rollout(
            Prompts.cat([part.prompts for part in parts]),
            torch.cat([padded(part.completion_ids) for part in parts]),
            torch.cat([padded(part.completion_mask) for part in parts]),
            torch.cat([padded(part.sampler_logps) for part in parts]),
            torch.cat([part.finished for part in parts]),
            [text for part in parts for text in part.texts],
            parts[0].num_generations,
            torch.cat([padded(part.sampled_mask) for part in parts]) if parts[0].episodes else None,
            torch.cat([padded(part.counted_positions()) for part in parts], 1) if pictures else None,
            [one for part in parts for one in part.vision or [{} for _ in part.texts]] if pictures else [],
            [episode for part in parts for episode in part.episodes],
        )

    def to(self, device: torch.device) -> Rollout:
        """The same rollout with all tensors on a device."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        vision = [{name: tensor.to(device) for name, tensor in one.items()} for one in self.vision]
        return dataclasses.replace(self, prompts=self.prompts.to(device), vision=vision, **tensors)

    def counted_positions(self) -> Tensor:
        """(3, B, T) or (B, T) `positions`, counted on from the prompt's where they are None."""
        if self.positions is not None:
            return self.positions
        index = torch.tensor(self.prompt_of_row, device=self.completion_ids.device)
        return completion_positions(self.prompts, index, self.completion_ids.shape[1])

    @staticmethod
    def of_conversations(
        prompts: Prompts, talks: Sequence[Conversation], pad_token_id: int, seconds: dict[str, float] | None = None
    ) -> Rollout:
        """B = Q·G conversations as tensors."""
        said = turns.stack(talks, pad_token_id, prompts.ids.device)
        return Rollout(
            prompts,
            said.ids,
            said.mask,
            said.logps,
            torch.tensor([talk.finished for talk in talks], device=said.ids.device),
            [talk.turns[-1].text for talk in talks],
            len(talks) // len(prompts),
            said.sampled,
            said.positions,
            said.vision,
            [Episode(talk.turns) for talk in talks],
            seconds or {},
        )

    def micro_batches(self, budget: int | None) -> list[list[int]]:
        """Cut the rows of this process into micro-batches of at most `budget` tokens (None: any number), padding
        included; the gradient stays the same. Of several processes each gets as many groups, with about as many tokens.

        A group's rows stay together where they fit, since their prompt is computed once per micro-batch. Groups, and
        rows within a group, are ordered by length, so that little is spent on padding.
        """
        lengths, width = self.completion_mask.sum(1).tolist(), self.prompt_ids.shape[1]
        most = sys.maxsize if budget is None else budget
        by_length = sorted(range(len(lengths)), key=lambda row: lengths[row])
        groups: dict[int, list[int]] = {prompt: [] for prompt in range(len(self.prompts))}
        for row in by_length:
            groups[row // self.num_generations].append(row)

        def cost(rows: list[int]) -> int:
            prompts = {row // self.num_generations for row in rows}
            return len(rows) * max(lengths[row] for row in rows) + width * len(prompts)

        ordered = sorted(groups.values(), key=lambda rows: lengths[rows[-1]])
        batches: list[list[int]] = [[]]
        for group in ordered[parallel.rank() :: parallel.size()]:
            if batches[-1] and cost(batches[-1] + group) > most:
                batches.append([])
            for row in group:
                if batches[-1] and cost([*batches[-1], row]) > most:
                    batches.append([])
                batches[-1].append(row)
        return batches


class Sampler:
    """Samples completions from a model. Owns the random numbers, and the decoder with its buffers and CUDA graphs,
    which are made once and replaced only when a larger batch needs more room.

    Args:
        seed: of all that is sampled; greedy decoding draws no random numbers.
    """

    def __init__(self, llm: LLM, seed: int = 0):
        self.llm = llm
        self.generator = torch.Generator(llm.device).manual_seed(seed)
        self.decoder: Decoder | None = None

    @torch.inference_mode()
    def sample(
        self,
        examples: Prompts | Sequence[Example],
        num_generations: int,
        max_completion_length: int,
        temperature: float = 1.0,
        ignore_eos: bool = False,
        environments: Sequence[Environment] = (),
    ) -> Rollout:
        """Sample `num_generations` completions for each example (or for already encoded `Prompts`).

        Args:
            max_completion_length: tokens sampled in a turn.
            temperature: 0 decodes greedily (`sampler_logps` are then those of temperature 1).
            ignore_eos: sample exactly `max_completion_length` tokens, for benchmarks.
            environments: a new one for each of B rows; without them a completion is one turn.
        """
        llm = self.llm
        prompts = (examples if isinstance(examples, Prompts) else encode_prompts(llm, examples)).to(llm.device)
        hidden, cache = forward_prompts(llm.model, prompts)  # (Q, P, H)
        kept = None if has_sliding_window(cache) else keys_and_values(cache)  # before the decoder changes the cache
        decoder = self.roomy_decoder(len(prompts) * num_generations, prompts.ids.shape[1] + max_completion_length)
        uniform = self.uniform_numbers(range(len(prompts) * num_generations), 0, max_completion_length)
        decoder.start(prompts, cache, num_generations, temperature, self.generator, ignore_eos, uniform)
        last = hidden[:, -1].repeat_interleave(num_generations, 0)  # (B, H); left-padded: -1 is the last prompt token
        ids, logps, lengths, finished = decoder.decode(last, max_completion_length)
        with torch.inference_mode(False):  # inference tensors cannot take part in autograd, but their clones can
            mask = torch.arange(ids.shape[1], device=ids.device) < lengths.clone()[:, None]  # (B, T)
            ids, logps, finished = ids.clone(), logps.clone(), finished.clone()
            prompts = clone_prompts(prompts)
        ids.masked_fill_(~mask, llm.pad_token_id)
        logps.masked_fill_(~mask, 0.0)
        tokens = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
        rollout = Rollout(prompts, ids, mask, logps, finished, decode_texts(llm, tokens), num_generations)
        if all(one.max_turns == 1 for one in environments):
            return rollout
        return self.take_turns(rollout, kept, environments, max_completion_length, temperature)

    def take_turns(
        self,
        first: Rollout,
        cache: list[tuple[Tensor, Tensor]] | None,
        environments: Sequence[Environment],
        max_completion_length: int,
        temperature: float,
    ) -> Rollout:
        """Continue a rollout of first turns until the environments have ended every episode: see turns.py.

        Args:
            cache: each layer's keys and values of the Q prompts, or None.
        """
        llm, prompts, G = self.llm, first.prompts, first.num_generations
        talks, rows = turns.begin(prompts, G), list(range(len(environments)))
        seconds, turn = {"environment": 0.0, "reread": 0.0}, 0
        turns.write_turn(llm, talks, first.completion_ids, first.sampler_logps, first.lengths, first.finished)
        while True:
            with timed(seconds, "environment"):
                rows = turns.show_observations(llm, talks, environments, rows, max_completion_length)
            if not rows:
                return Rollout.of_conversations(prompts, talks, llm.pad_token_id, seconds)
            turn += 1
            size = halve_to(len(talks), len(rows)) if self.decoder and self.decoder.uses_graphs else len(rows)
            padded = rows + rows[-1:] * (size - len(rows))  # few numbers of rows, hence few CUDA graphs
            with timed(seconds, "reread"):
                prompt_of_row = [row // G for row in padded]
                whole, state, read = turns.reread(llm, prompts, cache, [talks[row] for row in padded], prompt_of_row)
                slots = round_up(whole.ids.shape[1] + max_completion_length, TURN_SLOTS)
                decoder = self.roomy_decoder(size, slots)
                uniform = self.uniform_numbers(padded, turn, max_completion_length)
                decoder.start(whole, read, 1, temperature, self.generator, False, uniform)
            decoded = decoder.decode(state, max_completion_length)
            turns.write_turn(llm, [talks[row] for row in rows], *(tensor[: len(rows)] for tensor in decoded))

    def uniform_numbers(self, rows: Sequence[int], turn: int, length: int) -> Tensor | None:
        """The random numbers (b, length) in [0, 1) of these rows' turn; None: drawn from the generator, for each token
        as many as there are rows that still decode."""
        return None

    @contextlib.contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Draw from `seed` inside the block; restore the random state afterwards. The generator object stays the same,
        since CUDA graphs were captured with it."""
        state = self.generator.get_state()
        self.generator.manual_seed(seed)
        try:
            yield
        finally:
            self.generator.set_state(state)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. A generator's state fits only its kind of device: on another one, sampling
        continues with new random numbers, whose seed is the check sum of that state, and prints a line."""
        saved = state["generator"]
        if saved.shape == self.generator.get_state().shape:
            self.generator.set_state(saved)
            return
        self.generator.manual_seed(zlib.crc32(bytes(saved.tolist())))
        print(
            f"note: the checkpoint has the random numbers of another kind of device than {self.generator.device.type}: "
            "sampling continues with new ones, so this run differs from an uninterrupted one"
        )

    def roomy_decoder(self, rows: int, slots: int) -> Decoder:
        """The decoder, replaced by a larger one if it has too few rows or slots."""
        kept = self.decoder
        if kept is None or kept.max_rows < rows or kept.slots < slots:
            rows, slots = max(rows, kept.max_rows if kept else 0), max(slots, kept.slots if kept else 0)
            self.decoder = kept = None  # free the old buffers before the new ones are made
            kind = FusedDecoder if layers.has_fast_layers(self.llm.model) else Decoder
            self.decoder = kept = kind(self.llm, rows, slots)
        return kept


class SharedSampler(Sampler):
    """The sampler of a run that torchrun started: each process samples its share of the prompts, and all receive all
    completions.

    The random numbers of a row depend on the seed, the number of the row in the run and the turn alone, so that any
    number of processes samples the same. `Sampler` draws other numbers.
    """

    def __init__(self, llm: LLM, seed: int = 0):
        super().__init__(llm, seed)
        self.seed = seed
        self.rows_drawn = self.first_row = 0  # of all processes so far; the number of this process's first row

    @torch.inference_mode(False)
    def sample(
        self,
        examples: Prompts | Sequence[Example],
        num_generations: int,
        max_completion_length: int,
        temperature: float = 1.0,
        ignore_eos: bool = False,
        environments: Sequence[Environment] = (),
    ) -> Rollout:
        """As `Sampler.sample`; all processes call it with the same arguments and receive the same."""
        prompts = examples if isinstance(examples, Prompts) else encode_prompts(self.llm, examples)
        mine, part = parallel.share(len(prompts)), None
        cpu = torch.device("cpu")  # from which completions are sent
        first, end = mine.start * num_generations, mine.stop * num_generations
        self.first_row = self.rows_drawn + first
        if mine:
            how = (num_generations, max_completion_length, temperature, ignore_eos, environments[first:end])
            part = super().sample(prompts.rows(list(mine)), *how)
            part = dataclasses.replace(part, prompts=prompts.rows([])).to(cpu)  # all have the prompts
        if temperature:
            self.rows_drawn += len(prompts) * num_generations
        parts = [
            dataclasses.replace(part, prompts=prompts.rows(list(parallel.share(len(prompts), number))).to(cpu))
            for number, part in enumerate(parallel.gather(part))
            if part is not None
        ]
        whole = Rollout.cat(parts).to(self.llm.device)
        whole.seconds = {name: max(part.seconds[name] for part in parts) for name in parts[0].seconds}
        return whole

    def uniform_numbers(self, rows: Sequence[int], turn: int, length: int) -> Tensor:
        drawn = [np.random.default_rng([self.seed, self.first_row + row, turn]) for row in rows]
        numbers = np.stack([generator.random(length, dtype=np.float32) for generator in drawn])  # (b, length)
        return torch.from_numpy(numbers).to(self.llm.device)

    @contextlib.contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Draw the numbers of `seed` inside the block; continue with those of before afterwards."""
        before = self.seed, self.rows_drawn
        self.seed, self.rows_drawn = seed, 0
        try:
            yield
        finally:
            self.seed, self.rows_drawn = before

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rows_drawn": self.rows_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, with any number of processes. After steps without torchrun, sampling
        continues with numbers that no row has had."""
        super().load_state_dict(state)
        unused = (1 + zlib.crc32(bytes(state["generator"].tolist()))) << 32
        self.rows_drawn = state.get("rows_drawn", unused)


def pick_sampler(llm: LLM, seed: int = 0) -> Sampler:
    """The sampler of a run: under torchrun, one that all processes share."""
    return SharedSampler(llm, seed) if launched() else Sampler(llm, seed)


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time of the block to seconds[name]."""
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def has_sliding_window(cache: Any) -> bool:
    """Whether some layers forget early tokens: their cache then lacks what a later turn has to see, and counts padding
    between a conversation and its next turn as tokens."""
    return any(isinstance(layer, DynamicSlidingWindowLayer) for layer in getattr(cache, "layers", ()))


def clone_prompts(prompts: Prompts) -> Prompts:
    vision = [{name: tensor.clone() for name, tensor in one.items()} for one in prompts.vision]
    return Prompts(prompts.ids.clone(), prompts.mask.clone(), prompts.positions.clone(), vision)


class Decoder:
    """Decodes rows one token at a time with transformers' own forward pass: any architecture, without CUDA graphs.

    All state lives in buffers of fixed addresses that a step updates in place, so that a step can be captured as a
    CUDA graph. `FusedDecoder` below replaces how the next hidden state is computed and keeps everything else.
    """

    uses_graphs = False

    def __init__(self, llm: LLM, max_rows: int, slots: int):
        device = llm.device
        self.window = WINDOW.get(device.type, 64)
        self.llm, self.max_rows, self.slots = llm, max_rows, round_up(slots, self.window)
        # Reading `alive` makes the host wait for the device: free on a CPU, a bubble on a GPU.
        self.look_every = 1 if device.type == "cpu" else 16
        self.excluded = llm.excluded_mask()  # (V,) or None
        self.eos = torch.tensor(llm.eos_token_ids, device=device)
        self.tokens = torch.zeros(max_rows, dtype=torch.long, device=device)  # the token each row reads next
        self.positions = torch.zeros(max_rows, dtype=torch.long, device=device)  # its rotary position
        self.alive = torch.zeros(max_rows, dtype=torch.bool, device=device)
        # added to attention scores: −inf on the slots that a row may not see, else 0
        self.bias = torch.zeros(max_rows, 1, 1, self.slots, device=device)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)  # the cache slot written next
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # the column of the output written next
        self.ids = torch.zeros(max_rows, self.slots, dtype=torch.long, device=device)
        self.logps = torch.zeros(max_rows, self.slots, device=device)
        self.uniform = torch.zeros(max_rows, self.slots, device=device)  # random numbers that were drawn beforehand
        self.lengths = torch.zeros(max_rows, dtype=torch.long, device=device)

    def start(
        self,
        prompts: Prompts,
        cache: Any,
        num_generations: int,
        temperature: float,
        generator: torch.Generator,
        ignore_eos: bool,
        uniform: Tensor | None = None,
    ) -> None:
        """Set the buffers for B = Q·G rows whose prompts fill slots 0 … P-1. `uniform` (B, T) are the random numbers to
        sample with; None: those of the generator."""
        queries, prompt_length = prompts.ids.shape
        self.rows, self.prompt_length = queries * num_generations, prompt_length
        self.temperature, self.generator, self.ignore_eos = temperature, generator, ignore_eos
        self.positions[: self.rows] = prompts.next_positions().repeat_interleave(num_generations)
        self.alive[: self.rows] = True
        self.draws = uniform is None
        if uniform is not None:
            self.uniform[: self.rows, : uniform.shape[1]] = uniform
        self.lengths.zero_()
        visible = prompts.mask.repeat_interleave(num_generations, 0)  # (B, P)
        self.bias.fill_(-torch.inf)
        self.bias[: self.rows, 0, 0, :prompt_length].masked_fill_(visible, 0.0)
        self.slot.fill_(prompt_length)
        self.column.zero_()
        self.load_cache(cache, num_generations)

    def decode(self, last_hidden: Tensor, max_completion_length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample until every row has ended or is full -> ids, logps (B, T), lengths, finished (B,) in row order."""
        rows, device = self.rows, self.tokens.device
        ids = torch.zeros(rows, max_completion_length, dtype=torch.long, device=device)
        logps = torch.zeros(rows, max_completion_length, device=device)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        origin = torch.arange(rows, device=device)  # (b,) the row, of B, that each decoding row belongs to

        def hand_over() -> None:
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

    def keep_rows(self, keep: Tensor) -> None:
        """Keep only the rows `keep`, moved to the front of the same buffers."""
        for buffer in (
            *(self.tokens, self.positions, self.alive, self.bias),
            *(self.ids, self.logps, self.uniform, self.lengths),
        ):
            buffer[: len(keep)] = buffer[keep]
        self.keep_cache(keep)
        self.rows = len(keep)

    def step(self, rows: int, window: int) -> None:
        self.advance(rows, window)

    def advance(self, rows: int, window: int) -> None:
        """Read the last sampled tokens, write their keys and values to the cache, sample the next ones."""
        self.bias[:rows].index_fill_(3, self.slot, 0.0)
        self.emit(rows, self.next_hidden(rows, window))
        self.slot += 1
        self.positions[:rows] += 1

    def emit(self, rows: int, hidden: Tensor) -> None:
        """Sample a token for each row from its hidden state (b, H); record it with its log-probability."""
        logits = self.head(hidden).float()  # (b, V)
        if self.temperature not in (0, 1):
            logits /= self.temperature
        if self.excluded is not None:
            logits.masked_fill_(self.excluded, -torch.inf)
        if self.temperature == 0:
            logps = logits.log_softmax(-1)  # (b, V)
            tokens = logps.argmax(-1, keepdim=True)  # (b, 1)
            logps = logps.gather(1, tokens)  # (b, 1)
        else:
            if self.draws:
                uniform = torch.rand(rows, 1, device=hidden.device, generator=self.generator)
            else:
                uniform = self.uniform[:rows].index_select(1, self.column)  # (b, 1)
            tokens, logps = draw(logits, uniform.clamp_max_(BELOW_ONE))  # (b, 1) each
        self.ids[:rows].index_copy_(1, self.column, tokens)
        self.logps[:rows].index_copy_(1, self.column, logps)
        self.lengths[:rows] += self.alive[:rows]  # counts the end-of-sequence token and nothing after it
        if not self.ignore_eos:
            self.alive[:rows] &= (tokens != self.eos).all(1)
        self.tokens[:rows] = tokens[:, 0]
        self.column += 1

    # The parts that FusedDecoder overrides:

    def head(self, hidden: Tensor) -> Tensor:
        """(b, H) -> (b, V) logits."""
        return F.linear(hidden, self.llm.model.get_output_embeddings().weight)

    def load_cache(self, cache: Any, num_generations: int) -> None:
        cache.batch_repeat_interleave(num_generations)
        self.cache = cache

    def keep_cache(self, keep: Tensor) -> None:
        self.cache.batch_select_indices(keep)

    def next_hidden(self, rows: int, window: int) -> Tensor:
        """(b, H) the hidden state after each row's last token."""
        seen = self.cache.get_seq_length() + 1
        positions = self.positions[:rows, None]  # (b, 1)
        if hasattr(self.llm.model.base_model, "get_rope_index"):
            positions = positions.expand(3, -1, -1)
        return self.llm.model.base_model(
            input_ids=self.tokens[:rows, None],
            attention_mask=(self.bias[:rows, 0, 0, :seen] == 0).long(),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample from softmax(logits), (b, V), by inverse transform of uniform (b, 1): tokens and their log-probabilities,
    (b, 1) each. In a large vocabulary a block is drawn first, then a token in it: cumulating all of it takes longer."""
    vocabulary = logits.shape[1]
    if vocabulary <= BLOCK:
        logps = logits.log_softmax(-1)  # (b, V)
        tokens = first_above(logps.exp().cumsum(-1), uniform)
        return tokens, logps.gather(1, tokens)
    probabilities = logits.softmax(-1)  # (b, V)
    width = next(width for width in range(512, 0, -1) if vocabulary % width == 0)
    sums = probabilities.unflatten(1, (-1, width)).sum(2)  # (b, V / width)
    cumulated = sums.cumsum(1)
    block = first_above(cumulated, uniform)  # (b, 1)
    beyond = uniform * cumulated[:, -1:] - (cumulated - sums).gather(1, block)  # how far into the block
    inside = (beyond / sums.gather(1, block)).clamp_(0, BELOW_ONE)
    columns = block * width + torch.arange(width, device=logits.device)  # (b, width)
    tokens = block * width + first_above(probabilities.gather(1, columns).cumsum(1), inside)
    return tokens, probabilities.gather(1, tokens).log_()


def first_above(cumulated: Tensor, uniform: Tensor) -> Tensor:
    """(b, 1) the first of n columns in which cumulated (b, n) exceeds uniform (b, 1) times its last column."""
    index = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
    return index.clamp_max_(cumulated.shape[1] - 1)  # NaN weights find no token; the loop skips such a step


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def halve_to(rows: int, needed: int) -> int:
    """Halve `rows` while `needed` rows still fit: few batch shapes, hence few CUDA graphs."""
    while needed <= rows // 2:
        rows //= 2
    return rows


class FusedDecoder(Decoder):
    """Decodes with layers.py over the model's own weights; on CUDA each shape of a step is captured as a graph."""

    def __init__(self, llm: LLM, max_rows: int, slots: int):
        super().__init__(llm, max_rows, slots)
        self.text_model = layers.text_model_of(llm.model)
        attention = self.text_model.layers[0].self_attn
        self.scaling, D = attention.scaling, attention.head_dim
        shape = (max_rows, attention.k_proj.out_features // D, self.slots, D)  # (rows, key heads, S, D)

        def zeros() -> Tensor:
            return torch.zeros(shape, dtype=llm.dtype, device=llm.device)

        self.caches = [(zeros(), zeros()) for _ in self.text_model.layers]  # keys and values
        self.cos, self.sin = self.rotary_table()  # (S, D)
        self.fused, self.adapted = fused_weights(self.text_model.layers), adapters.has_adapters(llm.model)
        self.uses_graphs = llm.device.type == "cuda"
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        self.graph_memory: Any = None  # one pool for all graphs: they run in turn and keep nothing in it

    def rotary_table(self) -> tuple[Tensor, Tensor]:
        """cos and sin (S, D) of every position."""
        positions = torch.arange(self.slots, device=self.llm.device)[None]  # (1, S)
        if hasattr(self.llm.model.base_model, "get_rope_index"):
            positions = positions.expand(3, 1, -1)  # a text token has one position in time, height and width
        example = torch.zeros(1, dtype=self.llm.dtype, device=self.llm.device)
        cos, sin = layers.rotary(self.text_model, example, positions)
        return cos[0], sin[0]

    def start(self, prompts: Prompts, *args: Any) -> None:
        first = adapters.base_of(self.text_model.layers[-1].self_attn.q_proj).weight
        adapted = adapters.has_adapters(self.llm.model)
        if self.adapted != adapted or first.data_ptr() != self.fused[-1][0].data_ptr():
            # Since then the model was moved, its parameters were replaced, or it was given adapters.
            self.adapted, self.fused = adapted, fused_weights(self.text_model.layers)
            self.graphs.clear()
        super().start(prompts, *args)

    def decode(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As above. Packed copies of the weights live until its end: the next update makes them stale, and the loss
        needs their memory."""
        self.products = fused_layers(self.text_model.layers, self.fused)
        self.head_product = layers.product(self.llm.model.get_output_embeddings().weight)
        try:
            return super().decode(*args)
        finally:
            del self.products, self.head_product

    def head(self, hidden: Tensor) -> Tensor:
        return self.head_product(hidden)

    def load_cache(self, cache: Any, num_generations: int) -> None:
        for (keys, values), prompt in zip(self.caches, keys_and_values(cache), strict=True):
            keys[: self.rows, :, : self.prompt_length] = prompt[0].repeat_interleave(num_generations, 0)
            values[: self.rows, :, : self.prompt_length] = prompt[1].repeat_interleave(num_generations, 0)

    def keep_cache(self, keep: Tensor) -> None:
        for keys, values in self.caches:
            keys[: len(keep)] = keys[keep]
            values[: len(keep)] = values[keep]

    def step(self, rows: int, window: int) -> None:
        """On CUDA: run a new shape eagerly once, capture it the second time, replay the graph from then on."""
        if not self.uses_graphs:
            return self.advance(rows, window)
        key = (rows, window, self.temperature, self.ignore_eos, self.generator)  # all that a graph fixes
        if key not in self.graphs:
            self.graphs[key] = None
            return self.advance(rows, window)
        graph = self.graphs[key]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)  # so that every replay draws new numbers
            with torch.cuda.graph(graph, pool=self.graph_memory):
                self.advance(rows, window)  # recorded, not run
            self.graph_memory = graph.pool()
            self.graphs[key] = graph
        graph.replay()

    def next_hidden(self, rows: int, window: int) -> Tensor:
        """(b, H). Grouped-query attention: queries that share a key head are stacked along the time axis."""
        x = self.text_model.embed_tokens(self.tokens[:rows])  # (b, H)
        cos, sin = self.cos[self.positions[:rows], None], self.sin[self.positions[:rows], None]  # (b, 1, D)
        bias = self.bias[:rows, :, :, :window]  # (b, 1, 1, w)
        low_bias = bias.to(x.dtype) if layers.packs(x.device, x.dtype) else None

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self.caches[number]
            keys[:rows].index_copy_(2, self.slot, key.unsqueeze(2))
            values[:rows].index_copy_(2, self.slot, value.unsqueeze(2))
            query = query.reshape(rows, key.shape[1], -1, key.shape[2])  # (b, key heads, queries per key head, D)
            if low_bias is not None:  # torch's kernel reads the window of the cache in place; `@` copies it first
                seen = keys[:rows, :, :window], values[:rows, :, :window]  # (b, key heads, w, D) each
                return F.scaled_dot_product_attention(query, *seen, low_bias, scale=self.scaling).reshape(rows, -1)
            scores = (query * self.scaling) @ keys[:rows, :, :window].transpose(2, 3)  # (b, key heads, queries, w)
            weights = (scores + bias).softmax(-1).to(value.dtype)  # `bias` is float32, so the softmax is too
            return (weights @ values[:rows, :, :window]).reshape(rows, -1)

        return layers.run_layers(self.text_model, x, cos, sin, attend, self.products)


def fused_weights(decoder_layers: Sequence[Any]) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """For each layer, the weights that are read together as one tensor, of which the parameters become views: see
    `layers.run_layers`.

    There is still one copy: the optimizer updates the parameters in place, and the decode step sees the update.
    """
    fused = []
    for layer in decoder_layers:
        qkv, gate_up = ([adapters.base_of(module) for module in modules] for modules in read_together(layer))
        bias = side_by_side(qkv, "bias") if qkv[0].bias is not None else None
        fused.append((side_by_side(qkv, "weight"), bias, side_by_side(gate_up, "weight")))
    return fused


def read_together(layer: Any) -> tuple[list[Any], list[Any]]:
    """The linear modules of a layer that have the same input."""
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]


def fused_layers(decoder_layers: Sequence[Any], fused: list) -> list[layers.FusedLayer]:
    """The products of a decode step for each layer, with the tensors of `fused_weights`, and with adapters if any."""
    found = []
    for layer, (weight, bias, gate_up_weight) in zip(decoder_layers, fused, strict=True):
        qkv, gate_up = read_together(layer)
        found.append(
            layers.FusedLayer(
                adapters.added(layers.product(weight, bias), qkv),
                product_of(layer.self_attn.o_proj),
                adapters.added(layers.product(gate_up_weight), gate_up),
                product_of(layer.mlp.down_proj),
            )
        )
    return found


def product_of(module: Any) -> Callable[[Tensor], Tensor]:
    """`layers.product` of a linear module, with its adapter if it has one; any other module itself."""
    base = adapters.base_of(module)
    plain = layers.product(base.weight, base.bias) if type(base) is torch.nn.Linear else base
    return adapters.added(plain, [module])


def side_by_side(modules: Sequence[Any], name: str) -> Tensor:
    """One tensor with the modules' parameters `name`, concatenated; each parameter becomes a view of it."""
    with torch.inference_mode(False), torch.no_grad():
        parameters = [getattr(module, name) for module in modules]
        whole = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            parameter.data = part
    return whole
