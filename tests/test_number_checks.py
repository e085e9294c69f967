"""A model is tried when it is loaded: it is exact or refused; layers.py is used only where it computes the same."""

import dataclasses
import time

import pytest
import torch
import transformers
from small_models import FAMILIES, question

import layers
import number_checks
import tiny_models
from llms import load_llm
from logprobs import token_logps
from model_checks import ModelError
from rldatasets import get_dataset
from rollout import Sampler

# Architectures of AutoModelForCausalLM: dense, mixtures of experts, recurrent; with and without scaled logits.
# fmt: off
ARCHITECTURES = (
    "llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_next",
    "phi", "phi3", "gpt2", "gpt_neox", "gptj", "bloom", "opt", "falcon_h1", "mamba", "recurrent_gemma", "granite",
    "granitemoe", "cohere", "cohere2", "olmo", "olmo2", "olmo3", "starcoder2", "stablelm", "smollm3", "mixtral",
    "deepseek_v2", "deepseek_v3", "llama4_text", "glm", "glm4", "persimmon", "codegen", "mpt", "jamba", "nemotron",
    "exaone4", "ernie4_5", "helium", "arcee",
)
EXACT = {  # not refused
    "llama", "mistral", "gemma3_text", "qwen2", "qwen3", "gpt2", "granite", "olmo2", "phi3", "smollm3", "starcoder2",
}
# fmt: on


@pytest.fixture(scope="module")
def tokenizer():
    recipe = dataclasses.replace(tiny_models.RECIPES["arithmetic"], vocabulary=300)
    return tiny_models.build_tokenizer(get_dataset("arithmetic", "train", 40), recipe)


@pytest.fixture
def save(tokenizer, tmp_path):
    """-> a function that saves a small random model of an architecture and returns its folder."""

    def make(architecture: str, **more):
        sizes = {"vocab_size": len(tokenizer) + 5, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
        sizes |= {"initializer_range": 0.3, "bos_token_id": None}
        sizes |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = transformers.AutoConfig.for_model(architecture, **sizes, **more)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():  # biases and norms that are not 0 and 1, so that forgetting one shows
                for weight in model.parameters():
                    if weight.dim() == 1:
                        weight.add_(0.2 * torch.randn_like(weight))
        model.save_pretrained(tmp_path / architecture)
        tokenizer.save_pretrained(tmp_path / architecture)
        return tmp_path / architecture

    return make


def gap(llm) -> float:
    """The largest difference between the log-probabilities of the sampler and of the trainer, in nats (contract 1)."""
    rollout = Sampler(llm).sample([question("How many eggs?"), question("7 + 5 =")], 3, 8)
    with torch.no_grad():
        logps = token_logps(llm, rollout)
    return float(((logps - rollout.sampler_logps) * rollout.completion_mask).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_is_exact_or_refused(architecture, save):
    """A fused step once left out biases: 0.28 nats between sampler and trainer, and exit status 0."""
    try:
        llm = load_llm(save(architecture), "cpu", "float32")
    except ModelError as error:
        assert architecture not in EXACT, error
        assert "\n" not in str(error)
    else:
        assert gap(llm) < 1e-3


@pytest.mark.parametrize("biases", [{"mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}])
def test_forgotten_biases_disable_the_fast_layers(biases, save, capsys):
    llm = load_llm(save("llama", **biases), "cpu", "float32")
    assert not layers.has_fast_layers(llm.model)
    assert "layers.py" in capsys.readouterr().out
    assert gap(llm) < 1e-3


def test_a_bias_that_is_zero_so_far_is_noticed(save):
    """It would be trained, and the sampler would not follow."""
    folder = save("llama", mlp_bias=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
    model.save_pretrained(folder)
    assert not layers.has_fast_layers(load_llm(folder, "cpu", "float32").model)


@pytest.mark.parametrize("family", ["qwen2", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_known_families_keep_the_fast_layers(family, dtype, load, capsys):
    llm = load(family, dtype)
    assert layers.has_fast_layers(llm.model)
    assert not capsys.readouterr().out


def test_a_wrong_layer_is_noticed_in_half_precision(load, monkeypatch):
    """A mistake of one percent disappears in the rounding of bfloat16; layers are compared in float32."""
    model = load("qwen2", "bfloat16").model
    assert number_checks.difference_of_layers(model) < 1e-5
    right = layers.rms_norm
    monkeypatch.setattr(layers, "rms_norm", lambda x, norm: 1.01 * right(x, norm))
    assert number_checks.difference_of_layers(model) > number_checks.LAYER_TOLERANCE


def test_loading_leaves_random_numbers_and_weights(model_folder):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    llm = load_llm(model_folder("qwen2"), "cpu", "float32")
    assert torch.equal(torch.rand(4), expected)
    saved = transformers.AutoModelForCausalLM.from_pretrained(model_folder("qwen2"), dtype=torch.float32)
    for weight, original in zip(llm.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(weight, original)


def test_the_trial_takes_less_than_a_second(load):
    llm = load("qwen2", "float32")
    began = time.process_time()
    number_checks.check_numbers(llm)
    assert time.process_time() - began < 1


def test_weights_that_are_not_finite_are_refused(save):
    folder = save("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match="finite"):
        load_llm(folder, "cpu", "float32")
