"""Which prompt? Chat templates, tokens and pictures of a batch of prompts.

Letters in the shape comments: Q prompts, P prompt tokens (left-padded).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import torch
import torch.nn.functional as F
from torch import Tensor

from model_checks import ModelError

if TYPE_CHECKING:
    from llms import LLM
    from rldatasets import Example


@dataclass
class Prompts:
    """Q encoded prompts.

    Attributes:
        ids, mask: (Q, P), left-padded; the mask is True on real tokens.
        positions: (Q, P), or (3, Q, P) for models with 3-D rotary positions (time, height, width of a picture).
        vision: for each prompt the inputs of the vision tower (`pixel_values` (patches, …), `image_grid_thw`
            (pictures, 3)); empty dicts for text.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    vision: list[dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Q numbers of tokens, pictures included."""
        return self.mask.sum(1).tolist()

    def to(self, device: torch.device) -> Prompts:
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

    @staticmethod
    def cat(parts: Sequence[Prompts]) -> Prompts:
        """All prompts of several batches, left-padded to the longest."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.ids.shape[1] for part in parts)

        def padded(tensor: Tensor) -> Tensor:  # (…, P) -> (…, longest P)
            return F.pad(tensor, (width - tensor.shape[-1], 0))

        return Prompts(
            torch.cat([padded(part.ids) for part in parts]),
            torch.cat([padded(part.mask) for part in parts]),
            torch.cat([padded(part.positions) for part in parts], -2),
            [one for part in parts for one in part.vision],
        )

    def next_positions(self) -> Tensor:
        """(Q,) the position of the first completion token: one past the largest of the prompt."""
        positions = self.positions if self.positions.dim() == 2 else self.positions.amax(0)  # (Q, P)
        return positions.masked_fill(~self.mask, 0).amax(1) + 1


# Templates of Llama 3 write today's date into the system message; a fixed one keeps prompts the same on every day.
TEMPLATE_DATE = time.strptime("2025-01-01", "%Y-%m-%d")


def chat_text(llm: LLM, example: Example) -> str:
    """The prompt in the model's chat template, up to where the assistant's turn begins. Without a template: plain text
    behind the tokenizer's beginning-of-sequence token, if it has one.

    Raises:
        ModelError: the template refuses the messages.
    """
    writer = llm.processor if llm.is_vision and llm.processor.chat_template else llm.tokenizer
    if not writer.chat_template:  # a base model, which continues the text
        text = "\n\n".join(plain_text(message["content"]) for message in example.messages) + "\n\n"
        return first_token(llm.tokenizer) + text
    options = {"strftime_now": lambda form: time.strftime(form, TEMPLATE_DATE), **llm.chat_template_kwargs}
    options |= {"tokenize": False, "add_generation_prompt": True}
    try:
        return writer.apply_chat_template(example.messages, **options)
    except jinja2.TemplateError as error:
        try:  # some, like Gemma's, have no system role
            return writer.apply_chat_template(without_system(example.messages), **options)
        except jinja2.TemplateError:
            reason = " ".join(str(error).split())
            raise ModelError(f"the chat template of {llm.name} refuses the example {example.id}: {reason}") from error


def first_token(tokenizer: Any) -> str:
    """The special token that the tokenizer puts before a text, as text; empty without one."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    return tokenizer.convert_ids_to_tokens(ids[0]) if ids[1 : 1 + len(plain)] == plain else ""


def without_system(messages: list[dict]) -> list[dict]:
    """The messages with the text of the system message put before that of the user's."""
    system, user, *rest = messages
    if system["role"] != "system":
        return messages
    if isinstance(user["content"], str):
        return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
    return [{**user, "content": [{"type": "text", "text": f"{system['content']}\n\n"}, *user["content"]]}, *rest]


def plain_text(content: str | list[dict]) -> str:
    """The text of a message, without its pictures."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def encode_prompts(llm: LLM, examples: Sequence[Example]) -> Prompts:
    """Tokenize Q examples, with their pictures, left-padded, on the CPU, so that a thread can prefetch them.

    Raises:
        ModelError: a picture in a prompt of a text model; a prompt without one placeholder for each picture.
    """
    texts = [chat_text(llm, example) for example in examples]
    pictures = [picture for example in examples for picture in example.images]
    if pictures and not llm.is_vision:
        raise ModelError(f"the task shows pictures and {llm.name} reads text only: choose a vision-language model")
    for example, text in zip(examples, texts, strict=True):
        refuse_stray_placeholders(llm, example, text)
    # One call for all costs half of a call for each. add_special_tokens=False: the chat template has written them.
    if pictures:
        output = llm.processor(text=texts, images=pictures, add_special_tokens=False)
        per_prompt = [len(example.images) for example in examples]
        grids = torch.as_tensor(output["image_grid_thw"]).split(per_prompt)  # Q × (pictures, 3)
        sizes = [int(grid.prod(1).sum()) for grid in grids]
        patches = torch.as_tensor(output["pixel_values"]).split(sizes)  # Q × (patches, …)
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
    rows = llm.model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= rows:
        token = llm.tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise ModelError(f"{llm.name} has an embedding of {rows} rows, too few for its tokenizer's token {token!r}")
    return Prompts(ids, mask, prompt_positions(llm, ids, mask, vision), vision)


def refuse_stray_placeholders(llm: LLM, example: Example, text: str) -> None:
    """Refuse a prompt that writes a placeholder like <|image_pad|> in a question: it would stand for a picture that is
    not there, or for the picture of another prompt."""
    for name, expected in (("image_token_id", len(example.images)), ("video_token_id", 0)):
        token_id = getattr(llm.model.config, name, None)
        token = None if token_id is None else llm.tokenizer.convert_ids_to_tokens(token_id)
        if token is not None and text.count(token) != expected:
            raise ModelError(
                f"the prompt of the example {example.id} has the placeholder {token} {text.count(token)} times for "
                f"{expected} pictures: remove it from the question, or use a chat template that writes it for pictures"
            )


def prompt_positions(llm: LLM, ids: Tensor, mask: Tensor, vision: list[dict[str, Tensor]]) -> Tensor:
    """(Q, P) counted from the first real token, or (3, Q, P) from the model itself if it places pictures in 3-D."""
    inner = llm.model.base_model
    if not hasattr(inner, "get_rope_index"):
        return (mask.long().cumsum(-1) - 1).clamp(min=0)
    grids = [one["image_grid_thw"] for one in vision if one]
    positions, _ = inner.get_rope_index(
        ids,
        mm_token_type_ids=(ids == llm.model.config.image_token_id).int(),  # 1 on a picture's tokens
        image_grid_thw=torch.cat(grids) if grids else None,
        attention_mask=mask.long(),
    )
    return positions
