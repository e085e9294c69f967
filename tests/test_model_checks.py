"""What is refused from a model's name, config, files and tokenizer; templates and tokens that would fail silently."""

import json
import os
import shutil

import pytest
import torch
import transformers
from small_models import question
from tokenizers import Regex, pre_tokenizers

import llms
from evaluator import TAGS, asked_format
from llms import load_llm
from model_checks import ModelError
from prompts import chat_text, encode_prompts
from rldatasets import Example
from rollout import decode_texts


@pytest.fixture
def folder(model_folder, tmp_path):
    """-> a function that copies a family's model into a folder of this test."""

    def copy(family: str = "llama", name: str = "model"):
        shutil.copytree(model_folder(family), tmp_path / name)
        return tmp_path / name

    return copy


def refusal(path) -> str:
    with pytest.raises(ModelError) as caught:
        load_llm(path, "cpu", "float32")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_weights(folder, change) -> None:
    """Save the weights of a folder after `change` was made to the dict of tensors."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_template(folder, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)


# --- weights ---


@pytest.mark.parametrize("lost", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_missing_tensors_are_refused_by_name(folder, lost):
    """transformers would draw them at random: policy and reference would be two models (KL 2.0 at step 1)."""
    path = folder()
    change_weights(path, lambda weights: weights.pop(lost))
    assert lost in refusal(path) and "1 of the model's tensors" in refusal(path)


def test_a_tensor_of_another_shape_is_refused_by_name(folder):
    path = folder()
    change_weights(path, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    assert "model.norm.weight" in refusal(path)


def test_surplus_tensors_are_named(folder, capsys):
    path = folder()
    change_weights(path, lambda weights: weights.update({"model.extra.weight": torch.ones(7)}))
    load_llm(path, "cpu", "float32")
    assert "model.extra.weight" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["exp-401", "gated-403", "run"])
def test_a_folder_without_weights_is_not_a_matter_of_permission(folder, name):
    """Words in a folder's name were taken for the hub's status codes."""
    path = folder(name=name)
    (path / "model.safetensors").unlink()
    assert "safetensors" in refusal(path) and "licence" not in refusal(path)


def test_a_lost_shard_is_refused_by_name(folder):
    path = folder()
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="20KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_llm(path, "cpu", "float32")
    shards[1].unlink()
    assert shards[1].name in refusal(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{broken"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        ("model.safetensors.index.json", b"{"),
        ("model.safetensors.index.json", b'{"weights": []}'),
        ("config.json", b"not JSON"),
        ("config.json", b"{}"),
        ("tokenizer.json", b"{"),
        ("chat_template.jinja", b"{% for %}"),
    ],
)
def test_damaged_files_are_refused_in_one_line(folder, name, content):
    path = folder()
    (path / name).write_bytes(content)
    if name == "chat_template.jinja":  # compiled with the first prompt
        with pytest.raises(ModelError, match="template"):
            encode_prompts(load_llm(path, "cpu", "float32"), [question("7 + 5 =")])
    else:
        assert str(path) in refusal(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused_by_name(folder):
    path = folder()
    (path / "config.json").chmod(0)
    assert "config.json" in refusal(path)


def test_other_vision_families_are_refused_with_those_that_work(tmp_path):
    for config in (transformers.LlavaConfig(), transformers.Idefics3Config()):
        config.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").touch()  # refused from the config: never read
        message = refusal(tmp_path)
        assert config.model_type in message and "qwen2_5_vl" in message


def test_a_model_that_writes_no_text_is_refused(tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert "vit" in refusal(tmp_path)


def test_a_token_with_a_line_break_is_stripped(model_folder, monkeypatch):
    passed = {}
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    original = transformers.AutoConfig.from_pretrained

    def note(path, **more):
        passed.update(more)
        return original(path, **more)

    monkeypatch.setattr(llms.AutoConfig, "from_pretrained", note)
    load_llm(model_folder("llama"), "cpu", "float32")
    assert passed["token"] == "hf_secret"


# --- tokens ---


def test_ids_beyond_the_embedding_are_refused(folder):
    path = folder()
    generation = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [20, 100_000]}))
    assert "100000" in refusal(path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder):
    """It ended in an IndexError after the run folder was opened."""
    path = folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"zebra{letter}" for letter in "abcdefghijklmnopqrst"])
    tokenizer.save_pretrained(path)
    with pytest.raises(ModelError, match="zebrat"):
        encode_prompts(load_llm(path, "cpu", "float32"), [question("zebrat")])


def test_tags_that_are_special_tokens_reach_the_reward(folder):
    """Stripped with the special tokens, they made a perfect completion earn 0."""
    path = folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": [TAGS[1], TAGS[2]]})
    llm = load_llm(path, "cpu", "float32")
    llm.tokenizer = tokenizer
    text = asked_format("12 + 7", "19")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert decode_texts(llm, [[*ids, llm.eos_token_ids[0]]]) == [text]


@pytest.mark.parametrize("template", [None, "{{ bos_token }}{{ messages[-1]['content'] }}"])
def test_a_prompt_begins_with_bos_once(folder, template):
    path = folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    bos = tokenizer.convert_tokens_to_ids("<|system|>")
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|system|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", bos)]
    )
    llm = load_llm(path, "cpu", "float32")
    llm.tokenizer, tokenizer.chat_template = tokenizer, template
    ids = encode_prompts(llm, [question("7 + 5 =")]).ids[0].tolist()
    assert ids[0] == bos and ids.count(bos) == 1


def test_the_token_that_closes_a_turn_ends_a_completion(folder):
    """A base model whose template ends turns with a token of its own never stopped."""
    path = folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    closing = tokenizer.convert_tokens_to_ids("<|user|>")
    assert closing not in load_llm(path, "cpu", "float32").eos_token_ids
    change_template(path, "{% for message in messages %}{{ message['content'] }}<|user|>\n{% endfor %}")
    assert closing in load_llm(path, "cpu", "float32").eos_token_ids


def test_another_pre_tokenizer_than_the_files_is_reported(folder, capsys):
    path = folder("qwen2")
    load_llm(path, "cpu", "float32")
    assert "tokenizer.json" not in capsys.readouterr().out
    backend = transformers.AutoTokenizer.from_pretrained(path).backend_tokenizer
    single = pre_tokenizers.Split(Regex("."), "isolated")  # no token has two characters
    backend.pre_tokenizer = pre_tokenizers.Sequence([single, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.save(str(path / "tokenizer.json"))
    load_llm(path, "cpu", "float32")
    assert "tokenizer.json" in capsys.readouterr().out


# --- templates ---

SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7 + 5 ="}]
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}<|assistant|>"
)
DROPS_SYSTEM = "{% for message in messages if message['role'] == 'user' %}<|user|>{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_a_system_message_goes_before_the_users_text(folder, template):
    """Gemma's template raises, some leave the message out: the model was never told the format."""
    path = folder()
    change_template(path, template)
    text = chat_text(load_llm(path, "cpu", "float32"), Example("clock-1", SYSTEM, [], ""))
    assert "<|user|>Be brief.\n\n7 + 5 =" in text


def test_a_template_that_always_fails_is_refused_by_the_example(folder):
    path = folder()
    change_template(path, "{{ raise_exception('no') }}")
    with pytest.raises(ModelError, match=r"clock-1.*no"):
        chat_text(load_llm(path, "cpu", "float32"), Example("clock-1", SYSTEM, [], ""))


def test_keywords_reach_the_template(folder):
    path = folder()
    change_template(path, "{{ messages[-1]['content'] }}{% if enable_thinking is not false %}<think>{% endif %}")
    assert chat_text(load_llm(path, "cpu", "float32"), question("7 + 5 =")).endswith("<think>")
    llm = load_llm(path, "cpu", "float32", chat_template_kwargs={"enable_thinking": False})
    assert "<think>" not in chat_text(llm, question("7 + 5 ="))


@pytest.mark.parametrize(
    ("form", "date"), [("%d %b %Y", "01 Jan 2025"), ("%Y-%m-%d", "2025-01-01"), ("%-d %B %Y", "1 January 2025")]
)
def test_a_template_with_a_date_is_the_same_every_day(folder, form, date):
    path = folder()
    change_template(
        path,
        "{% set today = strftime_now('" + form + "') if strftime_now is defined else '' %}"
        "Today: {{ today }}. {{ messages[-1]['content'] }}",
    )
    llm = load_llm(path, "cpu", "float32")
    assert chat_text(llm, question("7 + 5 =")) == f"Today: {date}. 7 + 5 ="
