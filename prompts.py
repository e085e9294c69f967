"""Which prompt? Chat templates, tokens and pictures of a batch of prompts.

Letters in the shape comments: Q prompts, P prompt tokens (left-padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


# Some templates write today's date; it is always 1 January 2025 here, so that prompts are the same on every day.
# transformers passes no functions to a template, so a macro takes the place of its `strftime_now`.
DATE = {"%d": "01", "%-d": "1", "%m": "01", "%b": "Jan", "%B": "January", "%Y": "2025", "%y": "25", "%A": "Wednesday"}
DATE |= {"%a": "Wed", "%H": "00", "%M": "00", "%S": "00", "%F": "2025-01-01", "%j": "001"}
FIXED_DATE = "{% macro strftime_now(form) %}{{ form"
FIXED_DATE += "".join(f" | replace('{code}', '{value}')" for code, value in DATE.items()) + " }}{% endmacro %}\n"


def chat_text(llm: LLM, example: Example) -> str:
    """The prompt in the model's chat template, up to where the assistant's turn begins; without a template, plain text.

    If the template refuses the system message or leaves it out, as Gemma's does, its text goes before the user's.

    Raises:
        ModelError: the template fails, or leaves out a message.
    """
    if (writer := template_writer(llm.tokenizer, llm.processor)) is None:  # a base model, which continues the text
        return "\n\n".join(plain_text(message["content"]) for message in example.messages) + "\n\n"
    options = {**llm.chat_template_kwargs, "tokenize": False, "add_generation_prompt": True}
    template = writer.chat_template if isinstance(writer.chat_template, str) else writer.chat_template["default"]
    options["chat_template"] = FIXED_DATE + template if "strftime_now" in template else template
    reason = ""
    for messages in (example.messages, without_system(example.messages)):
        try:
            text = writer.apply_chat_template(messages, **options)
        except Exception as error:  # a template is a program, which may fail in any way
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())}"
            continue
        if all(part.strip() in text for message in messages for part in text_parts(message["content"])):
            return text
        reason = reason or "it leaves out the text of a message"
    raise ModelError(f"the chat template of {llm.name} does not work for the example {example.id}: {reason}")


def template_writer(tokenizer: Any, processor: Any) -> Any:
    """The processor or the tokenizer, the one that has a chat template; None for a base model without one."""
    writers = [one for one in (processor, tokenizer) if one is not None and one.chat_template]
    return next((one for one in writers if isinstance(one.chat_template, str) or "default" in one.chat_template), None)


def closing_token(tokenizer: Any, processor: Any) -> int | None:
    """The token with which the chat template ends the assistant's turn; None if it is no special or added token."""
    if (writer := template_writer(tokenizer, processor)) is None:
        return None
    turns = [("user", "question"), ("assistant", "answer")]
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if writer is processor else text}
        for role, text in turns
    ]
    try:
        text = writer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template may refuse these turns; then it names no token
        return None
    ids = tokenizer(text.rpartition("answer")[2].lstrip(), add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return ids[0] if ids and ids[0] in special else None


def opening_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as a beginning-of-sequence token."""
    plain, ids = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = [start for start in range(len(ids)) if ids[start : start + len(plain)] == plain]
    return ids[: starts[0]] if starts else []


def without_system(messages: list[dict]) -> list[dict]:
    """The messages with the text of the system message put before that of the user's."""
    system, *rest = messages
    if system["role"] != "system" or not rest:
        return messages
    user, text = rest[0], f"{plain_text(system['content'])}\n\n"
    content = user["content"]
    content = text + content if isinstance(content, str) else [{"type": "text", "text": text}, *content]
    return [{**user, "content": content}, *rest[1:]]


def text_parts(content: str | list[dict]) -> list[str]:
    """The texts of a message, between its pictures."""
    return [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]


def plain_text(content: str | list[dict]) -> str:
    """The text of a message, without its pictures."""
    return "".join(text_parts(content))


def encode_prompts(llm: LLM, examples: Sequence[Example]) -> Prompts:
    """Tokenize Q examples, with their pictures, left-padded, on the CPU, so that a thread can prefetch them.

    Raises:
        ModelError: a picture in a prompt of a text model, or of a model without a chat template; a prompt without one
            placeholder for each picture; see `chat_text`.
    """
    texts = [chat_text(llm, example) for example in examples]
    pictures = [picture for example in examples for picture in example.images]
    has_template = template_writer(llm.tokenizer, llm.processor) is not None
    if pictures and not llm.is_vision:
        raise ModelError(f"the task shows pictures and {llm.name} reads text only: choose a vision-language model")
    if pictures and not has_template:
        raise ModelError(f"{llm.name} has no chat template, which places pictures in a prompt: choose one that has")
    for example, text in zip(examples, texts, strict=True):
        refuse_stray_placeholders(llm, example, text)
    # One call for all costs half of a call for each. add_special_tokens=False: a chat template writes them itself.
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
    opening = [] if has_template else opening_tokens(llm.tokenizer)
    encoded = [[*opening, *ids] for ids in output["input_ids"]]  # Q lists, none padded
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
