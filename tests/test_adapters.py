"""adapters.py: what is computed and trained with adapters, and which folders hold them.

Contract 1 (the sampler's log-probabilities equal the trainer's) holds with B ≠ 0: while B is 0, as in a first step, a
sampler that leaves adapters out computes the same.
"""

import json
import shutil
import types

import pytest
import torch
from plain_reference import compute_in_float64
from runs import names, one_line, read, records, small_run  # noqa: F401 (a fixture)
from safetensors.torch import load_file
from small_models import FAMILIES, questions, small_config

import adapters
import config as config_module
import layers
from llms import LLM, load_llm, recompute_activations
from logprobs import reference_logps, token_logps
from main import accumulate_gradients
from model_checks import ModelError
from optimizer import MasterAdamW
from rollout import Decoder, FusedDecoder, Rollout, Sampler

pytest.importorskip("peft")

RANK, ALPHA = 3, 7


def with_adapters(llm: LLM, seed: int = 1) -> LLM:
    """Add adapters whose matrices B are not 0."""
    adapters.add(llm, RANK, ALPHA, seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, weight in adapters.parameters(llm.model).items():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    return llm


def as_dense(llm: LLM, base: LLM) -> LLM:
    """`base` with the weights W + (α / r) B A of a model with adapters."""
    found = adapters.parameters(llm.model)
    with torch.no_grad():
        for name, A in found.items():
            if ".lora_A." in name:
                layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                B = found[name.replace("lora_A", "lora_B")]
                base.model.get_submodule(layer).weight += ALPHA / RANK * B @ A
    return base


def sampled(llm: LLM, family: str, temperature: float = 0.8) -> Rollout:
    rollout = Sampler(llm).sample(questions(family), 3, 8, temperature)
    if llm.dtype == torch.float64:
        rollout.sampler_logps = rollout.sampler_logps.double()
    return rollout


def gradients(llm: LLM, rollout: Rollout, **changes) -> dict[str, torch.Tensor]:
    """The gradient of a step, by the name of the weight."""
    config = small_config("--temperature 0.8 --beta 0.04", *(f"--{name}" for name in changes))
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(len(rollout.texts), generator=generator, dtype=rollout.sampler_logps.dtype)
    ref = rollout.sampler_logps + 0.1 * rollout.completion_mask
    llm.model.zero_grad()
    accumulate_gradients(config, llm, rollout, advantages, rollout.sampled_mask, None, ref)
    return {name: w.grad.clone() for name, w in llm.model.named_parameters() if w.grad is not None}


# ---------------------------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fast", [True, False], ids=["layers.py", "transformers"])
def test_sampler_and_trainer_agree(load, monkeypatch, family, fast):
    """Contract 1."""
    compute_in_float64(monkeypatch)
    llm = load(family)
    base = token_logps(llm, sampled(llm, family), 0.8)
    if not fast:
        layers.disable(llm.model)
    sampler = Sampler(with_adapters(llm))
    rollout = sampler.sample(questions(family), 3, 8, 0.8)
    assert type(sampler.decoder) is (FusedDecoder if fast else Decoder)
    with torch.no_grad():
        for share_prompt in (True, False):
            found = token_logps(llm, rollout, 0.8, share_prompt=share_prompt)
            torch.testing.assert_close(found.float(), rollout.sampler_logps, atol=2e-5, rtol=1e-5)
        with adapters.without(llm.model):
            base = token_logps(llm, rollout, 0.8)
    assert (base - found).abs().mean() > 0.1  # the adapters matter


def test_a_sampler_notices_adapters_that_are_added(load):
    llm = load("qwen2")
    sampler = Sampler(llm)
    sampler.sample(questions("qwen2"), 2, 4)
    rollout = sampler.sample(questions("qwen2"), 2, 4) if with_adapters(llm) else None
    with torch.no_grad():
        torch.testing.assert_close(token_logps(llm, rollout).float(), rollout.sampler_logps, atol=2e-5, rtol=1e-5)


def test_a_sampler_leaves_out_disabled_adapters(load):
    """Also one that sampled with them before."""
    llm = with_adapters(load("qwen2"))
    sampler, base = Sampler(llm), Sampler(load("qwen2"))
    before = sampler.sample(questions("qwen2"), 2, 8, 0.0)
    with adapters.without(llm.model):
        without = sampler.sample(questions("qwen2"), 2, 8, 0.0)
    assert torch.equal(without.completion_ids, base.sample(questions("qwen2"), 2, 8, 0.0).completion_ids)
    assert not torch.equal(without.completion_ids, before.completion_ids)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_gradients_are_those_of_dense_weights(load, monkeypatch, family):
    """With W' = W + s B A, dL/dA = s Bᵀ dL/dW' and dL/dB = s dL/dW' Aᵀ."""
    compute_in_float64(monkeypatch)
    llm = with_adapters(load(family))
    rollout = sampled(llm, family)
    found = gradients(llm, rollout)
    dense = gradients(as_dense(llm, load(family)), rollout)
    matrices = dict(llm.model.named_parameters())
    assert len(found) == len(adapters.parameters(llm.model)) == 28
    for name, gradient in found.items():
        layer, kind = name.removesuffix(".default.weight").split(".lora_")
        other = matrices[f"{layer}.lora_{'B' if kind == 'A' else 'A'}.default.weight"]
        whole = ALPHA / RANK * dense[f"{layer}.weight"]
        expected = other.T @ whole if kind == "A" else whole @ other.T
        assert (gradient - expected).norm() < 1e-10 * expected.norm(), name


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_checkpointing_changes_no_gradient(load, monkeypatch, family):
    compute_in_float64(monkeypatch)
    llm = with_adapters(load(family))
    rollout = sampled(llm, family)
    kept = gradients(llm, rollout)
    recompute_activations(llm.model)
    recomputed = gradients(llm, rollout, gradient_checkpointing=True)
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sampled(llm, family).sampler_logps, rollout.sampler_logps)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
@pytest.mark.parametrize("checkpointing", ["", "--gradient_checkpointing"])
def test_the_reference_is_the_base_model(load, family, checkpointing):
    """To the last bit, while the policy's adapters are on before and after."""
    llm, base = with_adapters(load(family)), load(family)
    rollout, config = sampled(llm, family), small_config("--lora_rank 3", checkpointing)
    with torch.no_grad():
        policy = token_logps(llm, rollout)
        reference = reference_logps(llm, llm.model, rollout, config)
        assert reference.equal(reference_logps(base, base.model, rollout, config))
        assert token_logps(llm, rollout).equal(policy) and not policy.equal(reference)
    assert all(weight.requires_grad for weight in adapters.parameters(llm.model).values())


def test_fresh_adapters_change_no_bit(load):
    llm = load("qwen2", "float32")
    rollout = Sampler(llm).sample(questions("qwen2"), 2, 4)
    with torch.no_grad():
        before = token_logps(llm, rollout)
        adapters.add(llm, 8, 32)
        assert token_logps(llm, rollout).equal(before)


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


@pytest.mark.parametrize("family, dtype", [("qwen2_vl", "float32"), ("qwen2", "bfloat16")])
def test_only_the_adapters_are_trained(load, family, dtype):
    llm = load(family, dtype)
    adapters.add(llm, RANK, ALPHA)
    before = {name: weight.detach().clone() for name, weight in llm.model.named_parameters()}
    optimizer = MasterAdamW(llm.model, small_config("--learning_rate 1e-2 --weight_decay 0.1"))
    rollout = sampled(llm, family)
    for _ in range(3):
        gradients(llm, rollout)
        optimizer.step(torch.zeros(()))
    moved = {name for name, weight in llm.model.named_parameters() if not weight.equal(before[name])}
    own = {name for name in before if ".lora_" in name}
    assert moved == own and not any("visual" in name for name in own)
    assert {before[name].dtype for name in own} == {torch.float32}
    state = optimizer.state_dict()
    assert state["masters"] is None and len(state["adamw"]["state"]) == len(own)


def test_adapters_begin_equal_in_every_process(load):
    one, other = load("qwen2"), load("qwen2")
    adapters.add(one, RANK, ALPHA, seed=5)
    torch.rand(3)
    state = torch.get_rng_state()
    adapters.add(other, RANK, ALPHA, seed=5)
    assert torch.get_rng_state().equal(state)
    for a, b in zip(adapters.parameters(one.model).values(), adapters.parameters(other.model).values(), strict=True):
        assert a.equal(b)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
def test_peft_loads_what_was_saved(load, tmp_path, family):
    from peft import AutoPeftModel, AutoPeftModelForCausalLM

    llm = with_adapters(load(family, "float32"))
    llm.save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "tokenizer.json").exists()
    kind = AutoPeftModel if llm.is_vision else AutoPeftModelForCausalLM
    theirs = kind.from_pretrained(tmp_path, dtype="float32")
    own, ids = load_llm(tmp_path, "cpu", "float32"), torch.arange(3, 13)[None]
    with torch.no_grad():
        expected = llm.model(input_ids=ids).logits
        assert own.model(input_ids=ids).logits.equal(expected)
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected)
    assert own.tokenizer.get_vocab() == llm.tokenizer.get_vocab()


@pytest.mark.parametrize("family, dtype", [("llama", "float32"), ("qwen2_vl", "float32"), ("qwen2", "bfloat16")])
def test_merging_gives_a_plain_model(load, model_folder, tmp_path, family, dtype):
    base = load_llm(model_folder(family), "cpu", dtype)
    base.save(tmp_path / "base")  # stored in this dtype
    llm = with_adapters(load_llm(tmp_path / "base", "cpu", "float32"))
    llm.save(tmp_path / "adapter")
    assert adapters.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert read(tmp_path / "merged" / "config.json")["dtype"] == dtype
    merged = load_llm(tmp_path / "merged", "cpu", "float32")
    assert not adapters.has_adapters(merged.model) and merged.num_parameters == base.num_parameters
    dense = as_dense(llm, load_llm(tmp_path / "base", "cpu", "float32"))
    for name, weight in dense.model.named_parameters():  # rounded once
        assert merged.model.get_parameter(name).equal(weight.to(getattr(torch, dtype)).float()), name


def test_merging_refuses_other_folders(model_folder, load, tmp_path, capsys):
    llm = with_adapters(load("qwen2"))
    llm.save(tmp_path / "adapter")
    for source, target in ((model_folder("qwen2"), tmp_path / "new"), (tmp_path / "adapter", tmp_path)):
        assert adapters.main(["merge", str(source), str(target)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "values",
    [
        {"base_model_name_or_path": "/nowhere/model"},
        {"base_model_name_or_path": None},
        {"use_dora": True},
        {"peft_type": "IA3"},
        {"r": RANK + 1},
        {"r": "many"},
    ],
    ids=str,
)
def test_other_adapters_are_refused(load, tmp_path, values):
    with_adapters(load("qwen2")).save(tmp_path)
    change(tmp_path / adapters.SETTINGS, **values)
    with pytest.raises(ModelError) as caught:
        load_llm(tmp_path, "cpu")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Runs

FLAGS = "--lora_rank 3 --lora_alpha 6 --learning_rate 1e-2 --beta 0.04 --num_iterations 2 --max_steps 6 --save_steps 2"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["arithmetic", "correlation"])
def test_a_run_resumes_and_is_evaluated(small_run, task, capsys):  # noqa: F811
    whole = small_run(task, FLAGS, name="whole")
    setup = capsys.readouterr().out
    log = records(whole)
    assert log[0]["kl"] == 0 < log[-1]["kl"]
    assert all(record["sampler_logp_diff"] < 1e-5 for record in log)
    resolved = read(whole / "config.json")["resolved"]
    assert 0 < resolved["trainable_parameters"] < resolved["parameters"]
    assert f"{resolved['trainable_parameters'] / 1e6:.2f} M are trained" in setup

    folder = small_run(task, FLAGS, "--max_steps 2")
    small_run(task, FLAGS, "--resume")
    assert records(folder) == log
    checkpoints = folder / "checkpoints"
    assert len(names(checkpoints)) <= 3
    newest = checkpoints / "step_000006"
    assert {adapters.SETTINGS, adapters.WEIGHTS, "trainer_state.pt", "manifest.json"} <= {*names(newest)}
    trained, path = 4 * resolved["trainable_parameters"], newest / adapters.WEIGHTS
    assert trained < path.stat().st_size < 1.5 * trained + 20_000
    assert (newest / "trainer_state.pt").stat().st_size < 3 * trained + 100_000

    last = read(folder / "eval_logs" / "metrics_000006.json")
    small_run(task, f"--eval_only --model_path {newest}", name="evaluated")
    small_run(task, FLAGS, f"--eval_only --resume {newest}")
    again = read(folder.parent / "evaluated" / "eval_logs" / "metrics_000000.json")
    assert again["avg_reward"] == last["avg_reward"]


@pytest.mark.slow
def test_an_adapter_is_trained_further(small_run, tmp_path):  # noqa: F811
    first = small_run("arithmetic", FLAGS, name="first") / "checkpoints" / "step_000006"
    flags = f"{FLAGS} --model_path {first}"
    second = small_run("arithmetic", flags, "--beta 0 --max_steps 2", name="second")
    before, after = (load_file(place / adapters.WEIGHTS) for place in (first, second / "checkpoints" / "step_000002"))
    changed = [name for name, weight in before.items() if not after[name].equal(weight)]
    assert len(changed) == len(before) and all((after[name] - w).abs().max() < 0.1 for name, w in before.items())
    for other in ("", "--beta 0 --lora_rank 2", "--beta 0 --lora_rank 0"):  # the reference; the rank; no rank
        small_run("arithmetic", flags, other, name="third", status=2)
    assert not (tmp_path / "third").exists()


@pytest.mark.slow
def test_resuming_refuses_other_adapters_and_bases(small_run, task_models, tmp_path, capsys):  # noqa: F811
    base = shutil.copytree(task_models["arithmetic"], tmp_path / "base")
    flags = f"{FLAGS} --model_path {base}"
    small_run("arithmetic", flags, "--max_steps 2")

    def refused(*more: str) -> str:
        capsys.readouterr()
        small_run("arithmetic", flags, "--resume", *more, status=2)
        return one_line(capsys.readouterr().err)

    for more in ("--lora_rank 2", "--lora_rank 0", "--lora_alpha 5"):
        assert more.split()[0] in refused(more)
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    assert "--model_path" in refused() and "config.json" in refused()
    shutil.rmtree(base)
    assert str(base) in refused()


@pytest.mark.parametrize("flags", ["--lora_rank -1", "--lora_alpha 0", "--lora_rank 2 --beta 1 --sync_ref_model"])
def test_flags_that_cannot_work_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        small_config(flags)
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_missing_package_is_refused(monkeypatch, capsys, load, tmp_path):
    with_adapters(load("qwen2")).save(tmp_path)
    missing = types.SimpleNamespace(find_spec=lambda name: None)
    monkeypatch.setattr(config_module.importlib, "util", missing)
    with pytest.raises(SystemExit) as caught:
        small_config("--lora_rank 4")
    assert caught.value.code == 2 and "peft" in capsys.readouterr().err
    with pytest.raises(ModelError, match="peft"):
        load_llm(tmp_path, "cpu", attn_implementation="sdpa")


def test_models_without_linear_layers_are_refused(load):
    from transformers import GPT2Config, GPT2LMHeadModel

    llm = load("qwen2")
    llm.model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=30))
    with pytest.raises(ModelError, match="no linear layers"):
        adapters.add(llm, 2, 4)
