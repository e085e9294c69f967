"""A model that is incomplete, damaged or of an unknown kind is refused in one line that says what is wrong with it."""

import json
import shutil
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from bad_hub import bad_hub
from huggingface_hub import errors
from other_process import run_python
from safetensors.torch import load_file, save_file
from small_models import question

import llms
from llms import ModelError, load_llm
from prompts import encode_prompts


@pytest.fixture
def copy_of(model_folder, tmp_path):
    """-> a function that copies a family's folder, so that a test can damage it."""
    return lambda family, name="model": shutil.copytree(model_folder(family), tmp_path / name)


def refusal(folder) -> str:
    with pytest.raises(ModelError) as caught:
        load_llm(folder, "cpu", "float32")
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    assert len(message) < 500 + len(str(folder))
    return message.replace(str(folder), "FOLDER")


def change_json(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change) -> None:
    """Apply `change` to the dict of the tensors in the folder's weights."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def save_in_shards(folder) -> list[str]:
    """Write the folder's weights anew in several files; their names."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_missing_tensors_are_refused_by_name(copy_of, lost):
    """transformers draws it at random: the policy and its reference were two different models, with a KL of 2.0."""
    folder = copy_of("llama")
    change_tensors(folder, lambda tensors: tensors.pop(lost))
    message = refusal(folder)
    assert lost in message and " 1 " in message


def test_tensors_of_a_missing_layer_are_counted(copy_of):
    folder = copy_of("llama")
    change_json(folder / "config.json", num_hidden_layers=3)
    message = refusal(folder)
    assert "model.layers.2" in message and " 9 " in message


def test_a_tensor_of_another_shape_is_refused_by_name(copy_of):
    folder = copy_of("llama")
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    assert "model.norm.weight" in refusal(folder)
    change_json(folder / "config.json", intermediate_size=64)
    assert " 7 " in refusal(folder)  # three matrices in each of two layers, and the norm


def test_surplus_tensors_are_named(copy_of, capsys):
    folder = copy_of("llama")
    change_json(folder / "config.json", num_hidden_layers=1)
    change_tensors(folder, lambda tensors: tensors.update({"model.spare.weight": torch.ones(3)}))
    assert load_llm(folder, "cpu").num_parameters > 0
    (line,) = capsys.readouterr().out.splitlines()
    assert " 10 " in line and "model.layers.1" in line


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_complete_weights_load_without_a_message(copy_of, family, capsys):
    """Those of qwen2 have no output embedding: it is the input embedding."""
    folder = copy_of(family)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (family == "llama")
    load_llm(folder, "cpu")
    assert not capsys.readouterr().out
    assert len(save_in_shards(folder)) > 2
    load_llm(folder, "cpu")
    assert not capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("name", ["exp-401", "gated-403", "trust_remote_code", "safetensors"])
def test_a_folder_without_weights_is_not_a_matter_of_permission(copy_of, name):
    """ "accept its licence on the hub" was said of a folder whose name has a 401 in it."""
    folder = copy_of("llama", name)
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert "no safetensors weights" in message
    assert "licence" not in message and "HF_TOKEN" not in message


@pytest.mark.parametrize("name", ["exp-401", "lab/gated-403"])
def test_a_missing_model_is_not_a_matter_of_permission(name, monkeypatch):
    monkeypatch.setattr(llms, "hub_answers", lambda: False)
    message = refusal(name)
    assert "neither a local folder" in message and "licence" not in message


def test_a_lost_shard_is_refused_by_name(copy_of):
    folder = copy_of("llama")
    shards = save_in_shards(folder)
    (folder / shards[1]).unlink()
    message = refusal(folder)
    assert shards[1] in message and f"1 of {len(shards)}" in message


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\xff"])
def test_a_damaged_index_is_refused(copy_of, index):
    folder = copy_of("llama")
    save_in_shards(folder)
    (folder / "model.safetensors.index.json").write_bytes(index.encode("latin-1"))
    refusal(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
DAMAGE = {"empty": b"", "pointer": POINTER, "huge header": b"\xff" * 64, "header of nothing": b"\2" + b"\0" * 7 + b"{}"}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_file_without_weights_is_refused(copy_of, content):
    folder = copy_of("llama")
    (folder / "model.safetensors").write_bytes(content)
    refusal(folder)


def test_a_truncated_weights_file_is_refused(copy_of):
    folder = copy_of("llama")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refusal(folder)
    (folder / "model.safetensors").write_bytes(whole)
    shards = save_in_shards(folder)
    (folder / shards[-1]).write_bytes((folder / shards[-1]).read_bytes()[:-8])
    refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_file_that_cannot_be_opened_is_refused(copy_of, name):
    folder = copy_of("llama")
    (folder / name).unlink()
    (folder / name).mkdir()
    refusal(folder)


CONFIGS = ("", "{", "[]", "null", "3", "{}", '{"model_type": "unheard_of"}', '{"model_type": 3}', "\xff\xfe")


@pytest.mark.parametrize("config", CONFIGS)
def test_a_damaged_config_is_refused(copy_of, config):
    folder = copy_of("llama")
    (folder / "config.json").write_bytes(config.encode("latin-1"))
    refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "many"},
        {"hidden_size": 30},
        {"num_attention_heads": 0},
        {"hidden_act": "unheard_of"},
        {"vocab_size": -1},
        {"rope_parameters": {"rope_type": "unheard_of"}},
        {"pad_token_id": 100_000},
        {"layer_types": ["full_attention"]},
    ],
    ids=str,
)
def test_an_impossible_config_is_refused(copy_of, change):
    folder = copy_of("llama")
    change_json(folder / "config.json", **change)
    refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_damaged_files_beside_the_weights_are_refused(copy_of, name, content):
    folder = copy_of("llama")
    (folder / name).write_bytes(content.encode("latin-1"))
    refusal(folder)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_vl"])
def test_a_model_without_its_tokenizer_is_refused(copy_of, family):
    folder = copy_of(family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "tokenizer" in refusal(folder)


def test_a_vision_model_without_its_processor_is_refused(copy_of):
    folder = copy_of("qwen2_vl")
    for path in folder.glob("*processor*"):
        path.unlink()
    assert "processor" in refusal(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Families

OTHER_VISION = {
    "LLaVA": transformers.LlavaConfig,
    "LLaVA-OneVision": transformers.LlavaOnevisionConfig,
    "PaliGemma": transformers.PaliGemmaConfig,
    "Idefics 3": transformers.Idefics3Config,
    "Gemma 3": transformers.Gemma3Config,
    "Llama 3.2": transformers.MllamaConfig,
    "Llama 4": transformers.Llama4Config,
    "InternVL": transformers.InternVLConfig,
    "CLIP": transformers.CLIPConfig,
}


@pytest.mark.parametrize("config_class", OTHER_VISION.values(), ids=OTHER_VISION.keys())
def test_other_vision_families_are_refused_with_those_that_work(copy_of, config_class):
    """It was a KeyError in the middle of preparing a picture."""
    folder = copy_of("qwen2_vl")
    config_class().save_pretrained(folder)
    message = refusal(folder)
    assert all(name in message for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", config_class.model_type))


@pytest.mark.parametrize("kind", ["t5", "vit", "wav2vec2", "distilbert", "clip_text_model"])
def test_a_model_that_writes_no_text_is_refused(copy_of, kind):
    folder = copy_of("llama")
    transformers.AutoConfig.for_model(kind).save_pretrained(folder)
    assert f"{kind!r}, which is no causal language model" in refusal(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("ends", [406, [3, 100_000]])
def test_ids_beyond_the_embedding_are_refused(copy_of, ends):
    """An IndexError, after the folder of the run was opened."""
    folder = copy_of("llama")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 406
    change_json(folder / "generation_config.json", eos_token_id=ends)
    assert "406 rows" in refusal(folder)


def add_tokens(folder, *tokens, **names) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    for name, token in names.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)


def test_a_pad_token_beyond_the_embedding_is_refused(copy_of):
    folder = copy_of("llama")
    add_tokens(folder, *(f"<|spare {i}|>" for i in range(8)), pad_token="<|spare 7|>")
    message = refusal(folder)
    assert "406 rows" in message and "<|spare 7|>" in message


def test_a_token_in_a_prompt_beyond_the_embedding_is_refused(copy_of):
    folder = copy_of("llama")
    add_tokens(folder, *(f"<|spare {i}|>" for i in range(8)))
    llm = load_llm(folder, "cpu")  # tokens that no prompt holds do no harm
    assert encode_prompts(llm, [question("How many eggs?")]).lengths[0] > 0
    with pytest.raises(ModelError, match=r"<\|spare 7\|>"):
        encode_prompts(llm, [question("How many eggs in <|spare 7|>?")])


def test_a_tokenizer_larger_than_the_embedding_is_refused(copy_of):
    folder = copy_of("llama")
    change_json(folder / "config.json", vocab_size=200)
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:200].clone() for name in WORDS}))
    change_json(folder / "generation_config.json", eos_token_id=0)
    assert "200 rows" in refusal(folder)


WORDS = ("model.embed_tokens.weight", "lm_head.weight")


def split_digits_in_threes(folder) -> None:
    """Give tokenizer.json another rule than that which transformers' class for Qwen2 has in its code."""
    file = folder / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(True), byte_level])
    backend.save(str(file))


def test_another_pre_tokenizer_than_the_files_is_reported(copy_of, capsys):
    """transformers 5 ignores the rules in the tokenizer.json of a qwen2 folder."""
    folder = copy_of("qwen2")
    load_llm(folder, "cpu")
    assert not capsys.readouterr().out
    split_digits_in_threes(folder)
    llm = load_llm(folder, "cpu")
    (line,) = capsys.readouterr().out.splitlines()
    assert "tokenizer.json" in line and str(folder) in line and transformers.__version__ in line
    assert encode_prompts(llm, [question("12345")]).lengths[0] > 0
    other = copy_of("llama", "other")
    split_digits_in_threes(other)
    change_json(other / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # which reads the file
    load_llm(other, "cpu")
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_another_pre_tokenizer_in_the_cache_is_reported(model_folder, tmp_path):
    snapshot = tmp_path / "models--lab--small" / "snapshots" / "abc"
    shutil.copytree(model_folder("qwen2"), snapshot)
    (tmp_path / "models--lab--small" / "refs").mkdir()
    (tmp_path / "models--lab--small" / "refs" / "main").write_text("abc")
    program = "import llms; llms.hub_answers = lambda: False; llms.load_llm('lab/small', 'cpu')"
    cache = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    split_digits_in_threes(snapshot)
    assert "tokenizer.json" in run_python(program, **cache)


# ---------------------------------------------------------------------------------------------------------------------
# The hub


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGINGFACE_TOKEN"])
@pytest.mark.parametrize(
    "value, expected", [("hf_secret\n", "hf_secret"), (" hf_secret\r\n", "hf_secret"), ("\n", None)]
)
def test_a_token_with_a_line_break_is_stripped(model_folder, monkeypatch, variable, value, expected):
    for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    passed = []
    original = transformers.AutoConfig.from_pretrained

    def from_pretrained(*args, **options):
        passed.append(options.get("token"))
        return original(*args, **options)

    monkeypatch.setattr(llms.AutoConfig, "from_pretrained", from_pretrained)
    load_llm(model_folder("llama"), "cpu")
    assert passed[0] == expected


def hub_error(kind, status):
    """What transformers raises if the hub answers with this status."""
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    error = OSError("something about a token and a repository")
    error.__cause__ = kind("said by the hub", response=response)
    return error


@pytest.mark.parametrize(
    "error, licence",
    [
        (hub_error(errors.GatedRepoError, 403), True),
        (hub_error(errors.GatedRepoError, 401), True),
        (hub_error(errors.HfHubHTTPError, 403), True),
        (hub_error(errors.RepositoryNotFoundError, 401), False),  # a name that is not there
        (hub_error(errors.RepositoryNotFoundError, 404), False),
        (hub_error(errors.HfHubHTTPError, 503), False),
        (OSError("401 gated"), False),
    ],
    ids=str,
)
def test_a_licence_is_named_where_the_hub_asks_for_one(monkeypatch, error, licence):
    def from_pretrained(*_, **__):
        raise error

    monkeypatch.setattr(llms, "hub_answers", lambda: True)
    monkeypatch.setattr(llms.AutoConfig, "from_pretrained", from_pretrained)
    message = refusal("lab/small-401")
    assert ("licence" in message) == licence
    assert licence or "HF_TOKEN if it is private" in message


@pytest.mark.slow
def test_a_busy_hub_is_one_line_at_once(tmp_path):
    with bad_hub("busy") as address:
        program = (
            "import time, llms\nstart = time.time()\ntry:\n    llms.load_llm('lab/small', 'cpu')\n"
            "except llms.ModelError as error:\n    print(error, time.time() - start < 5)"
        )
        said = run_python(program, HF_ENDPOINT=address, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="0")
    assert "lab/small" in said and said.splitlines()[0].endswith("True")
