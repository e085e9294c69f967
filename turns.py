"""How does a conversation go on? Observations are appended to what the model wrote, and all rows that go on are read
again for the next turn.

Rows take their turns together. After each turn the environments answer; a row leaves when its episode is over or a turn
was cut off. What the others wrote and were shown is then read by the function that the loss uses
(`logprobs.forward_completions`), after the keys and values of their prompts, which are kept. The decoder continues from
that cache as from one of prompts.

Ids are only appended: those that were sampled stay as they are, whatever their text would be encoded to.

Letters in the shape comments: Q prompts, B rows, b rows that go on, P prompt tokens (left-padded), T tokens of a
conversation after its prompt (right-padded), H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from environments import Environment, EpisodeError, Observation, Turn
from logprobs import forward_completions, forward_prompts, joined_pictures, with_completions
from prompts import Prompts, decode_texts, encode_observations, prompt_positions
from rldatasets import as_rgb

if TYPE_CHECKING:
    from llms import LLM


@dataclass
class Conversation:
    """What a row wrote and was shown after its prompt.

    Attributes:
        prompt_length: tokens of the prompt. next_position: the position of the next token.
        ids: all tokens. sampled: for each, whether the model sampled it. logps: for each, as sampled, or 0.
        positions: the positions of the pieces, (3, tokens) each; empty for models whose positions are counted.
        vision: the inputs of the vision tower for each observation with pictures.
        finished: whether the last turn ended in an end-of-sequence token.
    """

    prompt_length: int
    next_position: int
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    vision: list[dict[str, Tensor]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    finished: bool = False

    def write(self, ids: list[int], logps: list[float], text: str, finished: bool) -> None:
        """Append a turn of the model."""
        self.append(ids, torch.arange(len(ids)).expand(3, -1))
        self.sampled += [True] * len(ids)
        self.logps += logps
        self.turns.append(Turn(text, len(ids)))
        self.finished = finished

    def show(self, observation: Observation, ids: list[int], positions: Tensor, vision: dict[str, Tensor]) -> None:
        """Append an observation, the last turn's answer; positions (3, tokens), counted from 0."""
        self.append(ids, positions)
        self.sampled += [False] * len(ids)
        self.logps += [0.0] * len(ids)
        self.vision += [vision] if vision else []
        self.turns[-1] = Turn(self.turns[-1].text, self.turns[-1].length, observation, len(ids))

    def append(self, ids: list[int], positions: Tensor) -> None:
        self.ids += ids
        self.positions.append(positions + self.next_position)
        self.next_position += int(positions.max()) + 1


class Completions(NamedTuple):
    """B conversations as tensors, right-padded.

    Attributes:
        ids, mask, sampled: (B, T); `sampled` is True on the tokens that the model sampled.
        logps: (B, T) float32, 0 off `sampled`.
        positions: (3, B, T), or None where they count on from the prompt's.
        vision: for each row the pictures of its observations; empty if there are none.
    """

    ids: Tensor
    mask: Tensor
    sampled: Tensor
    logps: Tensor
    positions: Tensor | None
    vision: list[dict[str, Tensor]]


@torch.inference_mode(False)  # inference tensors cannot take part in autograd
def stack(conversations: Sequence[Conversation], pad_token_id: int, device: torch.device) -> Completions:
    """The conversations as tensors."""

    def padded(rows: list[list], value: float, dtype: torch.dtype) -> Tensor:
        return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], True, value).to(device)

    ids = padded([one.ids for one in conversations], pad_token_id, torch.long)  # (B, T)
    sampled = padded([one.sampled for one in conversations], False, torch.bool)  # (B, T)
    logps = padded([one.logps for one in conversations], 0.0, torch.float32)  # (B, T)
    lengths = torch.tensor([len(one.ids) for one in conversations], device=device)  # (B,)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # (B, T)
    if not any(one.vision for one in conversations):
        return Completions(ids, mask, sampled, logps, None, [])
    positions = [torch.cat(one.positions, 1) for one in conversations]  # (3, tokens) each
    stacked = torch.stack([F.pad(one, (0, ids.shape[1] - one.shape[1])) for one in positions], 1)  # (3, B, T)
    vision = [joined_pictures(one.vision) for one in conversations]
    on_device = [{name: tensor.to(device) for name, tensor in one.items()} for one in vision]
    return Completions(ids, mask, sampled, logps, stacked.to(device), on_device)


def begin(prompts: Prompts, num_generations: int) -> list[Conversation]:
    """A conversation for each of B = Q·G rows, in which nothing was said yet."""
    firsts = zip(prompts.lengths, prompts.next_positions().tolist(), strict=True)
    return [Conversation(*first) for first in firsts for _ in range(num_generations)]


def write_turn(
    llm: LLM, conversations: Sequence[Conversation], ids: Tensor, logps: Tensor, lengths: Tensor, finished: Tensor
) -> None:
    """Append what the decoder sampled for these rows: (b, T) ids and log-probabilities, (b,) lengths and `finished`."""
    rows = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    columns = zip(conversations, rows, logps.tolist(), decode_texts(llm, rows), finished.tolist(), strict=True)
    for conversation, tokens, row_logps, text, ended in columns:
        conversation.write(tokens, row_logps[: len(tokens)], text, ended)


def play_script(
    llm: LLM, prompts: Prompts, environments: Sequence[Environment], texts: Sequence[Sequence[str]]
) -> list[Conversation]:
    """The conversations in which the model writes given texts, turn by turn, and B environments answer them.

    Raises:
        ValueError: an environment asks for more turns than there are texts.
    """
    talks = begin(prompts, len(environments) // len(prompts))
    rows, turn = list(range(len(talks))), 0
    while rows:
        if any(turn >= len(texts[row]) for row in rows):
            raise ValueError(f"an environment asks for turn {turn + 1}, for which there is no text")
        written = [texts[row][turn] for row in rows]
        for row, text, ids in zip(
            rows, written, llm.tokenizer(written, add_special_tokens=False)["input_ids"], strict=True
        ):
            talks[row].write([*ids, llm.eos_token_ids[0]], [0.0] * (len(ids) + 1), text, True)
        rows, turn = show_observations(llm, talks, environments, rows, 0), turn + 1
    return talks


@torch.inference_mode(False)
def show_observations(
    llm: LLM,
    conversations: Sequence[Conversation],
    environments: Sequence[Environment],
    rows: Sequence[int],
    max_completion_length: int,
) -> list[int]:
    """Let the environments answer these rows -> the rows that go on, with the observation appended. A turn that was cut
    off ends its episode: an observation may only follow the end of a turn.

    Raises:
        EpisodeError: see `answer`; or a conversation has no room for another turn in the model's context.
    """
    shown: dict[int, Observation] = {}
    for row in rows:
        talk, environment = conversations[row], environments[row]
        if talk.finished and len(talk.turns) < environment.max_turns:
            observation = answer(environment, talk.turns[-1].text, len(talk.turns))
            if observation is not None:
                shown[row] = observation
    ids, vision = encode_observations(llm, list(shown.values())) if shown else ([], [])
    for (row, observation), tokens, pictures in zip(shown.items(), ids, vision, strict=True):
        talk = conversations[row]
        talk.show(observation, tokens, piece_positions(llm, tokens, pictures), pictures)
        length = talk.prompt_length + len(talk.ids)
        if llm.max_context and length + max_completion_length > llm.max_context:
            raise EpisodeError(
                f"the conversation about the example {environments[row].example.id} has {length} tokens after turn "
                f"{len(talk.turns)}, and {llm.name} can read {llm.max_context}, too few for another turn of "
                f"{max_completion_length} tokens: lower --max_completion_length or --max_turns"
            )
    return list(shown)


def answer(environment: Environment, text: str, turn: int) -> Observation | None:
    """The environment's observation, with its pictures in RGB.

    Raises:
        EpisodeError: the environment raised an exception; names the example and the turn.
    """
    try:
        found = environment.step(text)
        return found and Observation(found.text, tuple(as_rgb(one) for one in found.images), found.malformed)
    except Exception as error:
        place = f"the example {environment.example.id}, turn {turn}, where the model wrote {text[:80]!r}"
        raise EpisodeError(f"the environment failed on {place}: {error!r}") from error


def piece_positions(llm: LLM, ids: list[int], vision: dict[str, Tensor]) -> Tensor:
    """(3, tokens) positions of an observation, counted from 0. A picture advances the position by its longer side and
    not by its number of tokens, so the model itself is asked."""
    if not vision:
        return torch.arange(len(ids)).expand(3, -1)
    device = llm.device
    piece = torch.tensor([ids], device=device)  # (1, tokens)
    grids = {name: tensor.to(device) for name, tensor in vision.items()}
    return prompt_positions(llm, piece, torch.ones_like(piece, dtype=torch.bool), [grids])[:, 0].cpu()


def reread(
    llm: LLM,
    prompts: Prompts,
    cache: list[tuple[Tensor, Tensor]] | None,
    conversations: Sequence[Conversation],
    prompt_of_row: list[int],
) -> tuple[Prompts, Tensor, Any]:
    """Read conversations after the keys and values of their prompts.

    Args:
        cache: each layer's keys and values of the Q prompts; None: read each prompt again with its conversation.
        conversations: b, each ending in an observation. prompt_of_row: b.

    Returns: prompts and conversations in one (b, P + T), the states (b, H) that predict the next tokens, the cache.
    """
    said = stack(conversations, llm.pad_token_id, llm.device)
    whole = with_completions(prompts.rows(prompt_of_row), said.ids, said.mask, said.positions, said.vision)
    if cache is None:
        whole = whole.left_padded()
        hidden, read = forward_prompts(llm.model, whole)  # (b, P + T, H)
        return whole, hidden[:, -1], read
    index = torch.tensor(prompt_of_row, device=llm.device)  # (b,)
    hidden, read = forward_completions(
        llm.model, prompts, cache, index, said.ids, said.mask, said.positions, said.vision
    )  # (b, T, H)
    last = said.mask.sum(1) - 1  # (b,)
    return whole, hidden[torch.arange(len(last), device=llm.device), last], read
