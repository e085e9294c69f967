"""Prompts in the model's chat template, with their pictures: encoded alone, together, and concatenated."""

import dataclasses

import pytest
import torch
from sampling import VISION
from small_models import question, questions

import tiny_models
from llms import ModelError
from prompts import Prompts, chat_text, encode_prompts


def test_masks_come_from_lengths_not_from_pad_ids(load):
    """These tokenizers pad with the end-of-sequence token, which the chat template also writes into every prompt."""
    llm = load("qwen2")
    assert llm.pad_token_id == llm.tokenizer.eos_token_id == 0
    prompts = encode_prompts(llm, questions("qwen2"))
    for row, example in enumerate(questions("qwen2")):
        ids = llm.tokenizer(chat_text(llm, example))["input_ids"]
        assert 0 in ids  # an end token that is no padding
        assert prompts.ids[row][prompts.mask[row]].tolist() == ids
        assert not prompts.mask[row, : -len(ids)].any() and prompts.mask[row, -len(ids) :].all()
        assert prompts.positions[row][prompts.mask[row]].tolist() == list(range(len(ids)))


def test_chat_text_ends_where_the_assistant_begins(load):
    text = chat_text(load("qwen2"), question("7 + 5 ="))
    assert text == f"<|user|>7 + 5 ={tiny_models.END}<|assistant|>"
    text = chat_text(load("qwen2_vl"), questions("qwen2_vl")[1])
    assert text.count("<|image_pad|>") == 2


def test_without_chat_template_the_prompt_is_plain_text(load):
    llm = load("qwen2")
    llm.tokenizer.chat_template = None
    assert chat_text(llm, question("7 + 5 =")) == "7 + 5 =\n\n"


@pytest.mark.parametrize("family", VISION)
def test_pictures_fill_their_number_of_tokens(load, family):
    llm = load(family)
    prompts = encode_prompts(llm, [*questions(family), question("No picture at all.")])
    image = llm.model.config.image_token_id
    for ids, one in zip(prompts.ids, prompts.vision, strict=True):
        merged = one["image_grid_thw"].prod(1).sum() // 4 if one else 0
        assert (ids == image).sum() == merged
    assert [len(one["image_grid_thw"]) if one else 0 for one in prompts.vision] == [1, 2, 1, 0]
    assert len({int((ids == image).sum()) for ids in prompts.ids}) == 4  # pictures of different sizes


@pytest.mark.parametrize("family", VISION)
def test_encoding_together_equals_encoding_alone(load, family):
    """Each keeps its own pictures, of which there are none, one or two."""
    llm = load(family)
    examples = [question("Nothing to see."), *questions(family)]
    together = encode_prompts(llm, examples)
    for row, example in enumerate(examples):
        one, alone = together.select([row]), encode_prompts(llm, [example])
        assert torch.equal(one.ids, alone.ids) and torch.equal(one.positions, alone.positions)
        assert one.vision[0].keys() == alone.vision[0].keys()
        assert all(torch.equal(one.vision[0][name], tensor) for name, tensor in alone.vision[0].items())


def assert_same_prompts(one: Prompts, other: Prompts):
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.next_positions(), other.next_positions())
    for here, there in zip(one.vision, other.vision, strict=True):
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], tensor) for name, tensor in there.items())


@pytest.mark.parametrize("family", ["qwen2", *VISION])
def test_concatenating_prompts_equals_encoding_together(load, family):
    """With prompts of different lengths first, and with parts that have no picture."""
    llm = load(family)
    examples = [question("Hm?"), *questions(family), question("A question that is longer than the others are, by far.")]
    together = encode_prompts(llm, examples)
    for cuts in ([1], [4], [2, 3], [1, 2, 3, 4], []):
        bounds = list(zip([0, *cuts], [*cuts, 5], strict=True))
        assert_same_prompts(Prompts.cat([encode_prompts(llm, examples[a:b]) for a, b in bounds]), together)
        assert_same_prompts(Prompts.cat([together.select(list(range(a, b))) for a, b in bounds]), together)


def test_selecting_prompts_drops_common_padding(load):
    llm = load("qwen2_vl")
    examples = questions("qwen2_vl")
    prompts = encode_prompts(llm, examples)
    order = sorted(range(3), key=lambda i: prompts.lengths[i])
    for index in (order[:1], order[:2][::-1], order[::-1]):
        assert_same_prompts(prompts.select(index), encode_prompts(llm, [examples[i] for i in index]))


def test_refuses_a_picture_for_a_text_model(load):
    with pytest.raises(ModelError, match="reads text only"):
        encode_prompts(load("qwen2"), questions("qwen2_vl"))


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
@pytest.mark.parametrize("family", VISION)
def test_refuses_a_placeholder_in_a_question(load, family, token):
    """It would stand for a picture that is not there, or for another prompt's."""
    llm = load(family)
    first = questions(family)[0]
    for stray in (question(f"What is {token}?"), question(f"What is {token}?", *first.images)):
        stray = dataclasses.replace(stray, id="stray-7")
        for examples in ([stray], [first, stray], [stray, first]):
            with pytest.raises(ModelError, match=r"stray-7") as error:
                encode_prompts(llm, examples)
            assert token in str(error.value) and "\n" not in str(error.value)


def test_refuses_a_chat_template_without_pictures(load):
    """The model would answer without seeing them."""
    llm = load("qwen2_vl")
    llm.processor.chat_template = llm.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="chat template"):
        encode_prompts(llm, questions("qwen2_vl"))


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_other_special_tokens_in_a_question_are_read(load, family):
    llm = load(family)
    tokens = [*llm.tokenizer.all_special_tokens, *(["<|image_pad|>"] if family == "qwen2" else [])]
    tokens = [token for token in tokens if llm.tokenizer.convert_tokens_to_ids(token) not in llm.excluded_token_ids]
    example = question(f"What is {' '.join(tokens)}?")
    assert encode_prompts(llm, [*questions(family), example]).lengths[-1] > len(tokens)
