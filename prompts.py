"""Which prompt? Chat templates, tokens and pictures of a batch of prompts.

Letters in the shape comments: Q prompts, P prompt tokens (left-padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model_checks import ModelError

if TYPE_CHECKING:
    from environments import Observation
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
        return self.rows(index, int(self.mask[index].any(0).int().argmax()))

    def rows(self, index: list[int], start: int = 0) -> Prompts:
        """The prompts at `index`, without the first `start` columns."""
        vision = [self.vision[i] for i in index]
        return Prompts(
            self.ids[index][:, start:], self.mask[index][:, start:], self.positions[..., index, start:], vision
        )

    def left_padded(self) -> Prompts:
        """The same tokens with all padding on the left."""
        order = self.mask.int().argsort(dim=1, stable=True)  # (Q, P) padding first, tokens in their order
        positions = self.positions.gather(-1, order.expand_as(self.positions))
        return Prompts(self.ids.gather(1, order), self.mask.gather(1, order), positions, self.vision)

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
    options = template_options(llm, writer)
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


def template_options(llm: LLM, writer: Any) -> dict[str, Any]:
    """Keywords of `apply_chat_template` for a text up to where the assistant's turn begins."""
    template = writer.chat_template if isinstance(writer.chat_template, str) else writer.chat_template["default"]
    template = FIXED_DATE + template if "strftime_now" in template else template
    return {**llm.chat_template_kwargs, "tokenize": False, "add_generation_prompt": True, "chat_template": template}


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
    pictures = any(example.images for example in examples)
    has_template = template_writer(llm.tokenizer, llm.processor) is not None
    if pictures and not llm.is_vision:
        raise ModelError(f"the task shows pictures and {llm.name} reads text only: choose a vision-language model")
    if pictures and not has_template:
        raise ModelError(f"{llm.name} has no chat template, which places pictures in a prompt: choose one that has")
    for example, text in zip(examples, texts, strict=True):
        refuse_stray_placeholders(llm, example, text)
    encoded, vision = encode_texts(llm, texts, [example.images for example in examples])
    opening = [] if has_template else opening_tokens(llm.tokenizer)
    encoded = [[*opening, *ids] for ids in encoded]  # Q lists, none padded
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


def encode_texts(
    llm: LLM, texts: list[str], images: Sequence[Sequence[Image.Image]]
) -> tuple[list[list[int]], list[dict[str, Tensor]]]:
    """The ids of each text, with a placeholder for each of its images, and its inputs of the vision tower."""
    # One call for all costs half of a call for each. add_special_tokens=False: a chat template writes them itself.
    if not any(images):
        return llm.tokenizer(texts, add_special_tokens=False)["input_ids"], [{} for _ in texts]
    output = llm.processor(text=texts, images=[one for some in images for one in some], add_special_tokens=False)
    grids = torch.as_tensor(output["image_grid_thw"]).split([len(some) for some in images])  # Q × (pictures, 3)
    patches = torch.as_tensor(output["pixel_values"]).split([int(grid.prod(1).sum()) for grid in grids])  # Q × (…, …)
    vision = [
        {"pixel_values": pixels, "image_grid_thw": grid} if len(grid) else {}
        for pixels, grid in zip(patches, grids, strict=True)
    ]
    return output["input_ids"], vision


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


# Stands for what the model wrote when the chat template renders an observation.
SENTINEL = "text of the first turn"


def encode_observations(
    llm: LLM, observations: Sequence[Observation]
) -> tuple[list[list[int]], list[dict[str, Tensor]]]:
    """The ids that follow the end-of-sequence token of a turn, up to where the next turn begins, and the pictures.

    The chat template renders a short conversation in which an observation is the second user message. What it writes
    after the first answer and the end of that turn is the observation, line ends included, whatever the template makes
    of earlier messages: the ids of a conversation are only ever appended to. The user's role is taken since many
    templates leave pictures out of other roles.

    Raises:
        ModelError: the template leaves the observation out or does not end turns with an end-of-sequence token; a
            picture for a text model, or for a model without a chat template.
    """
    texts = [observation_text(llm, observation) for observation in observations]
    encoded, vision = encode_texts(llm, texts, [one.images for one in observations])
    if template_writer(llm.tokenizer, llm.processor) is None:
        return encoded, vision
    for text, ids in zip(texts, encoded, strict=True):
        if not ids or ids[0] not in llm.eos_token_ids:
            raise ModelError(
                f"the chat template of {llm.name} writes {text[:20]!r} after a turn, which does not begin with an "
                "end-of-sequence token of the model: use --max_turns 1 or another model"
            )
    return [list(ids[1:]) for ids in encoded], vision


def observation_text(llm: LLM, observation: Observation) -> str:
    """What the template writes after the text of an assistant's turn, when the observation is the next message; for a
    base model without a template, the text between empty lines."""
    writer = template_writer(llm.tokenizer, llm.processor)
    if observation.images and (writer is None or not llm.is_vision):
        raise ModelError(f"an environment shows pictures, which {llm.name} cannot read in a conversation")
    text = without_special_tokens(llm, observation.text)
    if writer is None:
        return f"\n\n{text}\n\n"

    def content(text: str, pictures: int = 0) -> Any:
        parts = [{"type": "image"} for _ in range(pictures)] + [{"type": "text", "text": text}]
        return parts if writer is llm.processor else text

    turns = [("user", content("question")), ("assistant", content(SENTINEL))]
    turns.append(("user", content(text, len(observation.images))))
    rendered, reason = "", ""
    try:
        options = template_options(llm, writer)
        rendered = writer.apply_chat_template([{"role": r, "content": c} for r, c in turns], **options)
    except Exception as error:  # a template is a program, which may fail in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    _, sentinel, after = rendered.partition(SENTINEL)
    if not sentinel or text.strip() not in after:
        raise ModelError(
            f"the chat template of {llm.name} cannot write a second user message: "
            f"{reason or 'it leaves out a message'}: use --max_turns 1 or another model"
        )
    return after.lstrip()


def without_special_tokens(llm: LLM, text: str) -> str:
    """The text of an observation without special tokens: it may quote what a model wrote, such as the text of a
    picture's placeholder or of the token that ends a turn."""
    added = {*llm.eos_token_ids, *llm.excluded_token_ids} & set(llm.tokenizer.added_tokens_decoder)
    special = added | set(llm.tokenizer.all_special_ids)
    for token in llm.tokenizer.convert_ids_to_tokens(sorted(special)):
        text = text.replace(token, "") if token else text
    return text


def decode_texts(llm: LLM, rows: list[list[int]]) -> list[str]:
    """The texts of turns, without the end-of-sequence token; other special tokens stay, since a format's tags may be
    special tokens of the tokenizer."""
    kept = [row[:-1] if row[-1] in llm.eos_token_ids else row for row in rows]
    return llm.tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


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
