"""The benchmarks run at small sizes, and count bytes and operations as torch does."""

import pytest
import torch
from runs import python
from sampling import draw
from small_models import small_config
from torch.utils.flop_counter import FlopCounterMode

import main


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py as a module."""
    monkeypatch.syspath_prepend("benchmarks")
    import gpu

    return gpu


@pytest.mark.slow
def test_the_table_of_a_gpu_runs_on_a_cpu():
    """Its whole steps are those of benchmarks/step_vs_trl.py."""
    done, _ = python("benchmarks/gpu.py", "--dry_run")
    assert done.returncode == 0, done.stderr
    for part in ("GB/s", "decoding", "loss and gradients", "whole step", "TRL: "):
        assert part in done.stdout


def test_operations_of_the_loss_are_those_that_torch_counts(load, gpu):
    """torch counts attention with all of its keys, here half of them: the models of the test hardly have attention."""
    llm = load("qwen2", "float32")
    rollout = draw(llm, "qwen2", generations=4, length=20, ignore_eos=True)
    counter = FlopCounterMode(display=False)
    with counter:
        advantages = torch.randn(len(rollout.completion_ids))
        main.accumulate_gradients(small_config(), llm, rollout, advantages, rollout.sampled_mask, None, None)
    prompts, prompt = rollout.prompt_ids.shape
    rows, length = rollout.completion_ids.shape
    expected = gpu.Shape.of(llm.model).loss_operations(prompts, prompt, rows, length)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.15)


def test_bytes_of_a_token_step_are_weights_and_cache(load, gpu):
    llm = load("llama", "float32")
    rollout = draw(llm, "llama", generations=2, length=4, ignore_eos=True)
    embedding = llm.model.get_input_embeddings().weight.numel()  # a token step reads one row of it for each token
    norm = llm.model.model.norm.weight.numel()
    cache = 2 * 2 * 2 * 8  # keys and values, layers, key heads, head size
    expected = 4 * (llm.num_parameters - embedding - norm + len(rollout.texts) * 10 * cache)
    assert gpu.Shape.of(llm.model).step_bytes(len(rollout.texts), 10, 4) == expected
