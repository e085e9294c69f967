"""Prompts in the model's chat template, with their pictures: encoded alone, together, and concatenated; templates of
several kinds, and none; the tokens before a prompt and after a completion."""

import dataclasses
import datetime
import os
import shutil

import pytest
import tokenizers
import torch
import transformers
from sampling import VISION
from small_models import picture, question, questions
from tokenizers.processors import TemplateProcessing

import tiny_models
from config import parse_args
from evaluator import get_evaluator
from llms import ModelError, load_llm
from prompts import DATE, Prompts, chat_text, encode_prompts
from rldatasets import Example, get_dataset
from rollout import Sampler, decode_texts


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


def test_shots_are_turns_of_the_chat_template(load):
    llm, end = load("qwen2"), tiny_models.END
    example = get_dataset("arithmetic", "test", 1, shots=2)[0]
    system, one, solved_one, two, solved_two, asked = (message["content"] for message in example.messages)
    assert chat_text(llm, example) == (
        f"<|system|>{system}{end}<|user|>{one}{end}<|assistant|>{solved_one}{end}"
        f"<|user|>{two}{end}<|assistant|>{solved_two}{end}<|user|>{asked}{end}<|assistant|>"
    )
    llm.tokenizer.chat_template = None
    assert chat_text(llm, example) == "\n\n".join((system, one, solved_one, two, solved_two, asked, ""))


def test_shots_stay_where_a_template_forbids_the_system_message(save):
    example = get_dataset("arithmetic", "test", 1, shots=1)[0]
    system, one, solved, asked = (message["content"] for message in example.messages)
    text = chat_text(load_llm(save(WITHOUT_SYSTEM["raises"]), "cpu"), example)
    end = tiny_models.END
    assert text == f"<|user|>{system}\n\n{one}{end}<|assistant|>{solved}{end}<|user|>{asked}{end}"


REAL = os.environ.get("REAL_MODEL")  # the folder of an instruction-tuned model in save_pretrained form


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="REAL_MODEL names no folder of a pretrained model")
def test_a_pretrained_model_follows_the_shots():
    """Some of its greedy answers to 8 questions have the format of the solved examples."""
    llm, evaluator = load_llm(str(REAL), "cpu", "bfloat16"), get_evaluator("arithmetic")
    test_set = get_dataset("arithmetic", "test", 8, shots=2)
    prompts = encode_prompts(llm, [test_set[i] for i in range(8)])
    texts = Sampler(llm).sample(prompts, 1, 64, temperature=0).texts
    assert any(evaluator.parse(text).strict_format for text in texts)


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


# ---------------------------------------------------------------------------------------------------------------------
# Messages in a chat template

SYSTEM, USER = "Answer in the asked format.", "How many eggs?"
EXAMPLE = Example("eggs-3", [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}], [], "")

BODY = "{{ '<|' + message['role'] + '|>' + message['content'] + '<|endoftext|>' }}"
FORBIDS = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
# Gemma's raises an exception. Others leave the message out, or fail in their own ways.
WITHOUT_SYSTEM = {
    "raises": FORBIDS + "{% for message in messages %}" + BODY + "{% endfor %}",
    "leaves it out": "{% for message in messages if message['role'] != 'system' %}" + BODY + "{% endfor %}",
    "fails": "{% for message in messages %}{{ {'user': ''}[message['role']] + '' }}" + BODY + "{% endfor %}",
}


@pytest.fixture
def save(model_folder, tmp_path):
    """-> a function that saves a small llama with another chat template or tokenizer and returns its folder."""

    def make(template=None, tokenizer=None):
        folder = shutil.copytree(model_folder("llama"), tmp_path / f"model{len(list(tmp_path.iterdir()))}")
        if tokenizer is not None:
            for path in [*folder.glob("*token*"), *folder.glob("chat_template*")]:
                path.unlink()
            tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def fast_tokenizer(model_folder, **special) -> transformers.PreTrainedTokenizerFast:
    """The small tokenizer in the class that reads its rules from tokenizer.json; `special` names tokens of it."""
    small = transformers.AutoTokenizer.from_pretrained(model_folder("llama"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=small.backend_tokenizer, **special)


def prompt_ids(llm, example=EXAMPLE) -> list[int]:
    return encode_prompts(llm, [example]).ids[0].tolist()


@pytest.mark.parametrize("template", WITHOUT_SYSTEM.values(), ids=WITHOUT_SYSTEM.keys())
def test_a_system_message_goes_before_the_users_text(save, template):
    llm = load_llm(save(template), "cpu")
    assert chat_text(llm, EXAMPLE) == f"<|user|>{SYSTEM}\n\n{USER}<|endoftext|>"


def test_a_system_message_goes_before_a_picture(load):
    llm = load("qwen2_vl")
    llm.processor.chat_template = FORBIDS + llm.processor.chat_template
    example = question("What is this?", picture(32, 48))
    example.messages.insert(0, {"role": "system", "content": SYSTEM})
    text = chat_text(llm, example)
    assert text.count(SYSTEM) == text.count("<|image_pad|>") == 1
    assert text.index(SYSTEM) < text.index("<|image_pad|>") < text.index("What is this?")
    assert encode_prompts(llm, [example]).lengths[0] > 0


def test_a_system_message_is_kept_where_it_is_allowed(load):
    text = chat_text(load("llama"), EXAMPLE)
    assert text == f"<|system|>{SYSTEM}<|endoftext|><|user|>{USER}<|endoftext|><|assistant|>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only tools') }}",
        "{% for message in messages %}",
        "{{ unheard_of(messages) }}",
        "{{ messages[7]['content']['text'] }}",
        "{{ 1 / 0 }}",
        "Hello!",
    ],
)
def test_a_template_that_fails_is_refused_with_the_example(save, template):
    llm = load_llm(save(template), "cpu")
    with pytest.raises(ModelError) as caught:
        encode_prompts(llm, [EXAMPLE])
    assert "eggs-3" in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# What a template takes from outside

THINKING = (
    "{% for message in messages %}" + BODY + "{% endfor %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}"
    "{% else %}{{ '<think>' }}{% endif %}"
)


@pytest.mark.parametrize("value, ending", [(None, "<think>"), ("true", "<think>"), ("false", "<think></think>")])
def test_keywords_reach_the_template(save, value, ending):
    flags = [] if value is None else ["--chat_template_kwargs", f"enable_thinking={value}"]
    config = parse_args(["--dataset_name", "gsm8k", *flags])
    llm = load_llm(save(THINKING), "cpu", chat_template_kwargs=config.chat_template_kwargs)
    assert chat_text(llm, EXAMPLE).endswith("<|assistant|>" + ending)


DATED = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{{ 'Today is ' + date_string }}{% for message in messages %}"
)


def test_a_template_with_a_date_is_the_same_every_day(save, load):
    """As in Llama 3. With the date of the day, a test set has other prompts tomorrow."""
    template = DATED + BODY + "{% endfor %}"
    today = datetime.datetime.now().strftime("%d %b %Y")
    plain = transformers.AutoTokenizer.from_pretrained(save(template))
    assert today in plain.apply_chat_template(EXAMPLE.messages, tokenize=False)
    text = chat_text(load_llm(save(template), "cpu"), EXAMPLE)
    assert text.startswith("Today is 01 Jan 2025<|system|>")
    llm = load_llm(save(template), "cpu", chat_template_kwargs={"date_string": "2 May 2023"})
    assert chat_text(llm, EXAMPLE).startswith("Today is 2 May 2023<|system|>")
    vision = load("qwen2_vl")
    vision.processor.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + vision.processor.chat_template
    assert chat_text(vision, question("What is this?", picture(32, 48))).startswith("2025-01-01")


def test_every_part_of_a_date_is_fixed(save):
    parts = "|".join(form for form in DATE if "-" not in form)  # the others are of the C library of some systems
    llm = load_llm(save("{{ strftime_now('" + parts + "') }}" + WITHOUT_SYSTEM["leaves it out"]), "cpu")
    assert chat_text(llm, question("7 + 5 =")).split("<|user|>")[0] == datetime.datetime(2025, 1, 1).strftime(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens before a prompt

TOKENS = [("<|endoftext|>", 0), ("<|system|>", 1), ("<|user|>", 2)]
BEGINNINGS = {  # what the tokenizer puts around a text A, and the number of tokens before it
    "none": ("$A", 0),
    "one": ("<|system|> $A", 1),
    "two, as in GLM": ("<|system|> <|user|> $A", 2),
    "one, and an end": ("<|system|> $A <|endoftext|>", 1),
}


@pytest.mark.parametrize("around, number", BEGINNINGS.values(), ids=BEGINNINGS.keys())
def test_a_base_model_begins_as_its_tokenizer_does(save, model_folder, around, number):
    """Llama was trained with a token before every text, Qwen without one."""
    tokenizer = fast_tokenizer(model_folder, bos_token="<|system|>", eos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=TOKENS)
    llm = load_llm(save(None, tokenizer), "cpu")
    text = f"{SYSTEM}\n\n{USER}\n\n"
    plain = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = prompt_ids(llm)
    assert ids == llm.tokenizer(text)["input_ids"][: len(ids)]
    assert ids[number:] == plain and ids[:number] == llm.tokenizer("a")["input_ids"][:number]


def test_a_token_before_a_text_keeps_its_first_blank(model_folder, save):
    """SentencePiece puts a blank before the first word, not before one that follows a special token as text."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "▁Answer": 3, "Answer": 4, "▁in": 5, "▁the": 6, "▁eggs?": 7, "▁How": 8}
    small = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    small.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    small.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    llm = load_llm(save(None, transformers.PreTrainedTokenizerFast(tokenizer_object=small, **special)), "cpu")
    assert prompt_ids(llm)[:4] == [0, 3, 5, 6]


@pytest.mark.parametrize("written", ["{{ bos_token }}", ""])
def test_with_a_template_it_alone_writes_the_first_token(save, model_folder, written):
    tokenizer = fast_tokenizer(model_folder, bos_token="<|system|>", eos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|system|> $A", special_tokens=TOKENS)
    llm = load_llm(
        save(written + "{% for message in messages %}{{ message['content'] }}{% endfor %}", tokenizer), "cpu"
    )
    assert llm.tokenizer("a")["input_ids"][0] == 1
    assert prompt_ids(llm).count(1) == (1 if written else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens after a completion

CLOSINGS = {
    "at once": ("{{ message['content'] + '<|close|>' }}", True),
    "after a line break": ("{{ message['content'] + '\n<|close|>\n' }}", True),
    "with text": ("{{ message['content'] + ' The end.' }}", False),
    "with nothing": ("{{ message['content'] }}", False),
    "refused": ("{% if message['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}<|close|>", False),
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("body, closes", CLOSINGS.values(), ids=CLOSINGS.keys())
def test_the_token_that_closes_a_turn_ends_a_completion(save, model_folder, body, closes, special):
    """Of a base model whose tokenizer and generation config name another one; its completions never stopped."""
    tokenizer = fast_tokenizer(model_folder, eos_token="<|endoftext|>")
    tokenizer.add_tokens([tokenizers.AddedToken("<|close|>", special=special)])
    template = "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}" + body + "{% endfor %}"
    llm = load_llm(save(template, tokenizer), "cpu")
    added = llm.tokenizer.convert_tokens_to_ids("<|close|>")
    assert (added in llm.eos_token_ids) == closes
    assert decode_texts(llm, [[*llm.tokenizer("5")["input_ids"], added]])[0] == ("5" if closes else "5<|close|>")


def test_the_processors_template_names_the_end_too(load, model_folder, tmp_path):
    folder = shutil.copytree(model_folder("qwen2_vl"), tmp_path / "model")
    for path in folder.glob("chat_template*"):
        path.write_text(path.read_text().replace("<|endoftext|>", "<|vision_end|>"))
    llm = load_llm(folder, "cpu")
    assert llm.tokenizer.convert_tokens_to_ids("<|vision_end|>") in llm.eos_token_ids


def test_tags_that_are_special_tokens_reach_the_reward(save, model_folder):
    """They were stripped before the reward saw the text, and a perfect completion earned 0."""
    tokenizer = fast_tokenizer(model_folder, eos_token="<|endoftext|>")
    tokenizer.add_tokens([tokenizers.AddedToken(tag, special=True) for tag in tiny_models.FORMAT_TOKENS])
    llm = load_llm(save(None, tokenizer), "cpu")
    llm.eos_token_ids = (llm.tokenizer.eos_token_id,)  # the small models end with many of their letters
    dataset, evaluator = get_dataset("arithmetic", "train", 1), get_evaluator("arithmetic")
    example = dataset[0]
    perfect = f"<reasoning>\nAll of them.\n</reasoning>\n<answer>\n{example.answer}\n</answer>\n"
    ids = [*llm.tokenizer(perfect, add_special_tokens=False)["input_ids"], llm.eos_token_ids[0]]
    assert "answer" not in llm.tokenizer.decode(ids, skip_special_tokens=True)
    read = decode_texts(llm, [ids])
    assert read == [perfect]
    rewards, _ = evaluator.compute_rewards([*read, perfect, USER], [example.answer] * 3)
    read_back, written, other = rewards.sum(1).tolist()
    assert read_back == written > other
