"""Models of every family load, and what cannot be used is refused in one line."""

import json
import shutil

import pytest
import torch
import transformers
from other_process import run_python
from sampling import FAMILIES, draw, gradients
from small_models import EOS, TEXT

import llms
from config import parse_args
from llms import ModelError, load_llm
from logprobs import token_logps
from prompts import encode_prompts
from rldatasets import get_dataset
from tiny_models import RECIPES

# ---------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_takes_a_training_step(load, family):
    llm = load(family, "float32")
    assert llm.is_vision == (llm.processor is not None) == (family not in TEXT)
    assert llm.dtype == torch.float32 and not llm.model.training
    before = {name: weight.detach().clone() for name, weight in llm.model.named_parameters()}
    rollout = draw(llm, family)
    optimizer = torch.optim.AdamW(llm.model.parameters(), lr=1e-3, weight_decay=0.0)
    advantages = torch.linspace(-1, 1, len(rollout.completion_ids))[:, None]
    logps = token_logps(llm, rollout)
    found = gradients(llm, -(logps * advantages).sum())
    # A key's bias adds the same to all scores of a query, so softmax takes it away; Qwen2.5-VL's too.
    for name, weight in llm.model.named_parameters():
        assert torch.isfinite(found[name]).all(), name
        assert (found[name] != 0).any() or "k_proj.bias" in name, name
        assert weight.grad is not None
    optimizer.step()
    assert all((weight != before[name]).any() for name, weight in llm.model.named_parameters() if "k_proj" not in name)
    after = token_logps(llm, rollout)
    assert (after * advantages).sum() > (logps * advantages).sum()  # the step went uphill


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_the_one_asked_for(load, attention):
    llm = load("qwen2", "float32", attention)  # transformers: padding is NaN in eager attention in float64
    assert llm.attn_implementation == attention == llm.model.config._attn_implementation


def test_bfloat16_is_chosen_only_where_it_is_faster(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(llms, "cpu_has_amx", lambda: True)
    assert llms.pick_dtype("auto", cpu, 576) == llms.pick_dtype(None, cpu, 896) == torch.bfloat16
    assert llms.pick_dtype("auto", cpu, RECIPES["arithmetic"].hidden) == torch.float32  # the recorded results are so
    assert llms.pick_dtype("float32", cpu, 576) == torch.float32
    assert llms.pick_dtype("auto", torch.device("mps"), 576) == torch.float32
    monkeypatch.setattr(llms, "cpu_has_amx", lambda: False)
    assert llms.pick_dtype("auto", cpu, 576) == torch.float32
    assert llms.pick_dtype("bfloat16", cpu, 576) == torch.bfloat16


@pytest.mark.parametrize("amx", [True, False])
def test_the_cpus_dtype_is_that_of_the_weights(model_folder, monkeypatch, amx):
    monkeypatch.setattr(llms, "cpu_has_amx", lambda: amx)
    monkeypatch.setattr(llms, "REAL_SIZE", 32)  # the hidden size of the small models
    assert load_llm(model_folder("llama"), "cpu").dtype == (torch.bfloat16 if amx else torch.float32)


def test_flash_attention_is_chosen_only_where_it_runs(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert llms.pick_attention("eager", cuda, torch.bfloat16) == "eager"
    monkeypatch.setattr(llms.importlib.util, "find_spec", lambda name: None)
    assert llms.pick_attention(None, cuda, torch.bfloat16) == "sdpa"
    monkeypatch.setattr(llms.importlib.util, "find_spec", lambda name: name == "flash_attn")
    assert llms.pick_attention("auto", cuda, torch.bfloat16) == "flash_attention_2"
    assert llms.pick_attention("auto", cuda, torch.float32) == "sdpa"  # flash-attn knows half precision only
    assert llms.pick_attention("auto", cpu, torch.bfloat16) == "sdpa"


def test_eos_ids_of_tokenizer_and_generation_config(load, model_folder):
    """Qwen2.5-Instruct names one in each; a sampler that knew only one of them would sample past the other."""
    llm = load("qwen2")
    assert llm.tokenizer.eos_token_id == 0 and 0 not in EOS
    assert llm.eos_token_ids == (0, *EOS)


@pytest.mark.parametrize("eos", [5, None])
def test_generation_config_names_one_eos_id_or_none(load, model_folder, tmp_path, eos):
    folder = shutil.copytree(model_folder("qwen2"), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos} if eos else {}))
    assert load_llm(folder, "cpu").eos_token_ids == ((0, 5) if eos else (0,))


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_are_excluded(load, family):
    llm = load(family)
    if family in TEXT:
        assert llm.excluded_token_ids == () and llm.excluded_mask() is None
    else:
        names = llm.tokenizer.convert_ids_to_tokens(list(llm.excluded_token_ids))
        assert names == ["<|image_pad|>", "<|video_pad|>"]
        assert llm.excluded_mask().nonzero()[:, 0].tolist() == list(llm.excluded_token_ids)


@pytest.mark.slow
def test_importing_llms_has_no_side_effects():
    """No environment variable, thread setting, log level, denormal or random state changes before a model is loaded."""
    program = """
import os, torch, transformers
import huggingface_hub.utils.logging
os.environ.pop("TOKENIZERS_PARALLELISM", None)
def state():
    logs = transformers.logging.get_verbosity(), huggingface_hub.utils.logging.get_verbosity()
    denormal = float(torch.tensor([1e-40]) * torch.ones(1))
    return dict(os.environ), logs, torch.get_num_threads(), denormal, torch.get_rng_state().tolist()
before = state()
import llms, logprobs, layers, rollout
print(state() == before)
llms.tune_cpu(), llms.quiet_transformers()
print([one == other for one, other in zip(state(), before)])
"""
    unchanged, after = run_python(program).splitlines()
    assert unchanged == "True"
    assert after == "[False, False, True, False, True]"  # what loading a model changes on purpose


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: each one line that says what to do


def refusal(model_path, **options) -> str:
    with pytest.raises(ModelError) as caught:
        load_llm(model_path, "cpu", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refuses_a_missing_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal(str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in message and "check the name" in message


def test_refuses_a_folder_without_a_model(tmp_path):
    assert "no config.json" in refusal(tmp_path)


def test_refuses_qwen_vl_chat_and_names_its_successor():
    for name in ("Qwen/Qwen-VL-Chat", "/models/Qwen-VL-Chat/"):
        assert "--model_path Qwen/Qwen2.5-VL-3B-Instruct" in refusal(name)


def test_refuses_remote_code(model_folder, tmp_path):
    shutil.copy(model_folder("qwen2") / "model.safetensors", tmp_path)
    code = "raise SystemExit('executed')\n"
    (tmp_path / "code.py").write_text(code)
    config = {"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "never executed" in refusal(tmp_path)


def test_refuses_pickled_weights(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("qwen2"), tmp_path / "model")
    weights = load_llm(folder, "cpu").model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "safetensors" in refusal(folder)


def test_refuses_a_damaged_config(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("qwen2"), tmp_path / "model")
    (folder / "config.json").write_text("{")
    assert str(folder) in refusal(folder)


def test_refuses_a_missing_device():
    with pytest.raises(ModelError, match="cannot be used"):
        llms.pick_device("cuda:99")


def gated(*args, **options):
    raise OSError(
        "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/x/y.\n"
        "401 Client Error. Cannot access gated repo. Please log in."
    )


def test_refuses_a_gated_model_and_names_hf_token(monkeypatch):
    monkeypatch.setattr(llms, "hub_answers", lambda: True)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    assert "HF_TOKEN" in refusal("meta-llama/Llama-3.2-1B-Instruct")


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGINGFACE_TOKEN", None])
def test_hub_token_is_read_from_the_environment(model_folder, monkeypatch, variable):
    for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "hf_secret")
    passed = {}

    def spy(auto_class):
        original = auto_class.from_pretrained

        def from_pretrained(*args, **options):
            passed.setdefault(auto_class.__name__, options)  # ours; they call each other after that
            return original(*args, **options)

        monkeypatch.setattr(auto_class, "from_pretrained", from_pretrained)

    names = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")
    for name in names:
        spy(getattr(transformers, name))
    load_llm(model_folder("qwen2_vl"), "cpu")
    for name in names:
        assert passed[name]["token"] == ("hf_secret" if variable else None)
        assert passed[name]["trust_remote_code"] is False
    assert passed["AutoModelForImageTextToText"]["use_safetensors"] is True


def test_refuses_an_unsupported_output_layer(load, model_folder, tmp_path):
    """Granite and Cohere scale their logits, Phi adds a bias: the log-probabilities would be wrong."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": 0}
    granite = transformers.GraniteConfig(**sizes, logits_scaling=8.0)
    cohere = transformers.CohereConfig(**sizes, logit_scale=0.0625)
    for config in (granite, cohere):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        assert config.model_type in refusal(folder)
    llm = load("llama", "float32")
    llm.model.lm_head.bias = torch.nn.Parameter(torch.linspace(0, 1, llm.model.lm_head.out_features))
    with pytest.raises(ModelError, match=r"lm_head\.bias"):
        llms.check_numbers(llm)


def unfit(llm, task, *flags) -> str:
    """The message that refuses `llm` for a task; empty if it is accepted."""
    train_set, test_set = get_dataset(task, "train", 3), get_dataset(task, "test", 3)
    try:
        llms.refuse_unfit_model(parse_args(["--dataset_name", task, *flags]), llm, train_set, test_set)
    except ModelError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def test_refuses_a_task_with_pictures_for_a_text_model(load):
    limits = ["--max_prompt_length", "400", "--max_completion_length", "100"]
    message = unfit(load("qwen2"), "correlation", *limits)
    assert "'correlation'" in message and "text only" in message
    assert unfit(load("qwen2_vl"), "correlation", *limits) == ""
    assert unfit(load("qwen2_vl"), "arithmetic", *limits) == ""


def test_refuses_lengths_beyond_the_context(load):
    llm = load("qwen2")
    assert llm.max_context == 512
    assert unfit(llm, "arithmetic", "--max_prompt_length", "400", "--max_completion_length", "112") == ""
    message = unfit(llm, "arithmetic", "--max_prompt_length", "400", "--max_completion_length", "113")
    assert all(part in message for part in ("512", "--max_prompt_length 400", "--max_completion_length 113"))


@pytest.mark.parametrize("row", [7, 19])
def test_refuses_a_placeholder_in_a_file_before_training(load, tmp_path, row):
    """Of 18 training rows and 2 test rows, one names a placeholder; a text model has none."""
    questions = [f"What is {i}?{' <|image_pad|>' if i == row else ''}" for i in range(20)]
    lines = [json.dumps({"question": question, "answer": "#### 1"}) for question in questions]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = [get_dataset("gsm8k", split, path=str(tmp_path / "data.jsonl")) for split in ("train", "test")]
    config = parse_args(["--max_prompt_length", "200", "--max_completion_length", "8"])
    with pytest.raises(ModelError, match="gsm8k-train-0-7" if row == 7 else "gsm8k-test-0-1"):
        llms.refuse_unfit_model(config, load("qwen2_vl"), *data)
    llms.refuse_unfit_model(config, load("qwen2"), *data)


def test_refuses_a_limit_below_every_test_prompt(load):
    llm, test_set = load("qwen2"), get_dataset("arithmetic", "test", 3)
    shortest = min(encode_prompts(llm, [test_set[i] for i in range(3)]).lengths)
    rest = ["--max_completion_length", "8", "--max_prompt_length"]
    assert unfit(llm, "arithmetic", *rest, str(shortest)) == ""
    message = unfit(llm, "arithmetic", *rest, str(shortest - 1))
    assert f"--max_prompt_length {shortest - 1}" in message and "shots" not in message


def test_shots_that_make_all_prompts_too_long_are_named(load):
    test_set = get_dataset("arithmetic", "test", 3, shots=2)
    config = parse_args(["--max_prompt_length", "150", "--max_completion_length", "8"])
    with pytest.raises(ModelError, match=r"all test prompts .* 150: .*lower shots"):
        llms.refuse_unfit_model(config, load("qwen2"), test_set, test_set)


# ---------------------------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_loads_in_transformers(load, family, tmp_path):
    """After sampling the weights are views of fused storage, which must not show in the files."""
    llm = load(family, "float32")
    rollout = draw(llm, family)
    with torch.no_grad():
        for weight in llm.model.parameters():
            weight.mul_(1.01)
        expected = token_logps(llm, rollout)
    llm.save(tmp_path)
    kind = transformers.AutoModelForImageTextToText if llm.is_vision else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path)
    weights = dict(model.named_parameters())
    assert weights.keys() == dict(llm.model.named_parameters()).keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in llm.model.named_parameters())
    with torch.no_grad():
        assert torch.equal(token_logps(llm, rollout, model=model), expected)
    reader = (transformers.AutoProcessor if llm.is_vision else transformers.AutoTokenizer).from_pretrained(tmp_path)
    tokenizer = reader.tokenizer if llm.is_vision else reader
    assert tokenizer.get_vocab() == llm.tokenizer.get_vocab()
    assert llms.load_llm(tmp_path, "cpu").eos_token_ids == llm.eos_token_ids
    saved = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert saved < 1.2 * sum(weight.numel() * 4 for weight in llm.model.parameters())  # no storage written twice
