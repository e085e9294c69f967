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

# Architectures of AutoModelForCausalLM: dense, with experts, recurrent, with scaled logits, with an index of keys.
# fmt: off
EXACT = (
    "llama", "mistral", "gemma", "gemma3_text", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "phi3", "gpt2", "gpt_neox",
    "bloom", "opt", "granite", "granitemoe", "olmo", "olmo2", "olmo3", "starcoder2", "stablelm", "smollm3", "mixtral",
    "glm", "glm4", "persimmon", "mpt", "nemotron", "exaone4", "ernie4_5", "helium", "arcee", "gpt_oss", "falcon",
    "deepseek_v2", "deepseek_v3",
)
OTHERS = (
    "gemma2", "phi", "gptj", "codegen", "cohere", "cohere2", "falcon_h1", "mamba", "mamba2", "llama4_text", "rwkv",
    "bert", "trocr", "xlnet", "hy_v4", "deepseek_v32", "qwen3_next", "qwen3_5_text", "jamba", "bamba",
    "recurrent_gemma",
)
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
NEEDS = {  # what a small one needs beside SIZES
    "deepseek_v2": {"num_key_value_heads": 4}, "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4}, "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.1},
    "mamba2": {"num_heads": 4, "head_dim": 16}, "xlnet": {"d_head": 8}, "qwen3_next": MIXED, "qwen3_5_text": MIXED,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}, "bamba": {"attn_layer_indices": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "sliding_window": 8,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "state_size": 8, "lru_width": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "ffn_dim": 48, "word_embed_proj_dim": 32, "intermediate_size_mlp": 48, "rotary_dim": 4, "n_inner": 48,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "decoder_layers": 2, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "chunk_size": 8, "mamba_chunk_size": 8,
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
        config_class = type(transformers.AutoConfig.for_model(architecture))
        known = {*config_class().to_dict(), *config_class.attribute_map}
        options = {name: size for name, size in SIZES.items() if name in known} | {"vocab_size": len(tokenizer) + 5}
        ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                config_class(**options | ids | NEEDS.get(architecture, {}) | more)
            )
            with torch.no_grad():  # biases and norms that are not 0 and 1, so that forgetting one shows
                for weight in model.parameters():
                    if weight.dim() == 1:
                        weight.add_(0.2 * torch.randn_like(weight))
        model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        model.save_pretrained(tmp_path / architecture)
        tokenizer.save_pretrained(tmp_path / architecture)
        return tmp_path / architecture

    return make


def gap(llm) -> float:
    """The largest difference between the log-probabilities of the sampler and of the trainer, in nats (contract 1)."""
    rollout = Sampler(llm).sample([question("How many eggs?"), question("7 + 5 =")], 3, 12)
    gaps = []
    for share_prompt in (True, False):
        logps = token_logps(llm, rollout, share_prompt=share_prompt)
        llm.model.zero_grad()
        logps.sum().backward()
        assert all(torch.isfinite(weight.grad).all() for weight in llm.model.parameters() if weight.grad is not None)
        gaps.append(float(((logps.detach() - rollout.sampler_logps) * rollout.completion_mask).abs().max()))
    return max(gaps)


@pytest.mark.slow
@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("architecture", EXACT)
def test_these_architectures_are_exact(architecture, attention, save, capsys):
    """A fused step once left out biases: 0.28 nats between sampler and trainer, and exit status 0."""
    llm = load_llm(save(architecture), "cpu", "float32", attention)
    assert gap(llm) < 1e-3
    assert layers.has_fast_layers(llm.model) == (architecture in ("llama", "qwen2", "qwen3"))
    assert not capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("architecture", OTHERS)
def test_an_architecture_is_exact_or_refused(architecture, attention, save):
    """Never another exception, nor numbers that are not the model's."""
    folder = save(architecture)
    try:
        llm = load_llm(folder, "cpu", "float32", attention)
    except ModelError as error:
        assert "\n" not in str(error) and architecture in str(error)
    else:
        assert gap(llm) < 1e-3


def rope(kind: str, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **more}}


LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}
VARIANTS = {  # and whether layers.py computes them
    "bias of the MLP": ("llama", {"mlp_bias": True}, False),
    "bias of all": ("llama", {"attention_bias": True, "mlp_bias": True}, False),
    "bias of the attention": ("llama", {"attention_bias": True}, True),
    "other head size": ("llama", {"head_dim": 12}, True),
    "no groups": ("llama", {"num_key_value_heads": 4}, True),
    "one key head": ("llama", {"num_key_value_heads": 1}, True),
    "other activation": ("llama", {"hidden_act": "gelu"}, False),
    "other epsilon": ("llama", {"rms_norm_eps": 0.1}, True),
    "linear rope": ("llama", rope("linear"), True),
    "yarn rope": ("llama", rope("yarn", original_max_position_embeddings=64), True),
    "dynamic rope": ("llama", rope("dynamic"), False),
    "long rope": ("llama", rope("longrope", **LONG), False),
    "Qwen with windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, False),
    "Qwen 3 with windows": ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, False),
    "Qwen 3 with biases": ("qwen3", {"attention_bias": True}, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize(("family", "more", "is_fast"), VARIANTS.values(), ids=list(VARIANTS))
def test_variants_of_known_families_are_exact(family, more, is_fast, attention, save):
    llm = load_llm(save(family, **more), "cpu", "float32", attention)
    assert gap(llm) < 1e-3
    assert layers.has_fast_layers(llm.model) == is_fast


def test_a_context_ends_where_long_rope_changes(save):
    """Beyond it the keys in the cache are rotated otherwise than those of a full forward pass."""
    assert load_llm(save("llama", **rope("longrope", **LONG)), "cpu", "float32").max_context == 64
    assert load_llm(save("bloom"), "cpu", "float32").max_context is None


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
