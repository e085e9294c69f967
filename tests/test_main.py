"""The loop: what a run computes, logs and leaves behind; that it can stop and go on; what it refuses, and how."""

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TASK_OPTIONS, questions

import main
from llms import encode_prompts, load_llm, token_logps
from main import OBJECTIVES, grpo_loss, learning_rate, micro_batches
from rldatasets import get_dataloaders
from rollout import join, sample

ROOT = Path(main.__file__).parent
SMALL = "--device cpu --prompts_per_step 2 --num_generations 4 --max_prompt_length 160 --max_completion_length 16 "
SMALL += "--train_size 24 --eval_size 5 --eval_batch_size 3 --max_steps 4 --eval_steps 2 --save_steps 2 "
SMALL += "--learning_rate 1e-3 --log_completions_steps 2"


def small_flags(task: str, model, output_dir) -> list[str]:
    options = [f"{name}={value}" for name, value in TASK_OPTIONS[task].items()]
    return [
        *("--model_path", str(model), "--dataset_name", task, "--dataset_options", *options),
        *("--output_dir", str(output_dir), *SMALL.split()),
    ]


@pytest.fixture
def run(task_models, tmp_path):
    """-> a function that runs main with small flags, those given last winning, and returns the run folder."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(task, *flags, name="run", status=0):
        flags = [part for flag in flags for part in flag.split()]
        assert main.main([*small_flags(task, task_models[task], tmp_path / name), *flags]) == status
        return tmp_path / name

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read(path: Path):
    return json.loads(path.read_text())


def records(folder: Path, but=()) -> list[dict]:
    """The training log without what the clock and the machine put into it."""
    measured = ("seconds/", "tokens_per_second", "peak_memory_gb", *but)
    return [
        {key: value for key, value in record.items() if not key.startswith(measured)}
        for record in read(folder / "train_logs.json")
    ]


def evaluations(folder: Path) -> dict[int, dict]:
    """Metrics by step, without how long they took."""
    found = [read(path) for path in sorted((folder / "eval_logs").glob("metrics_*.json"))]
    return {metrics["step"]: {key: value for key, value in metrics.items() if key != "seconds"} for metrics in found}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Contract 2: the gradient of a step is one thing, however it is computed


def step_of(llm, family, *flags):
    """A rollout with everything that goes into its loss: old and reference log-probabilities are off by a little."""
    args = main.parse_args(["--num_generations", "4", "--max_completion_length", "12", *flags])
    generator = torch.Generator().manual_seed(0)
    rollout = sample(llm, questions(family), 4, 12, 1.0, generator)
    rollout.sampler_logps = rollout.sampler_logps.double()  # as the model's weights here
    noise = 0.3 * torch.randn(2, *rollout.completion_ids.shape, generator=generator)
    advantages = torch.randn(12, generator=generator)
    old_logps, ref_logps = (noise + rollout.sampler_logps) * rollout.completion_mask
    return args, rollout, advantages, rollout.completion_mask, old_logps, ref_logps


def accumulated(llm, plan, args, rollout, advantages, mask, old_logps, ref_logps):
    llm.model.zero_grad()
    loss, stats, logps = main.accumulate_gradients(llm, rollout, advantages, mask, old_logps, ref_logps, plan, args)
    return float(loss), stats, logps, [weight.grad.clone() for weight in llm.model.parameters()]


def assert_same_step(one, other):
    assert other[0] == pytest.approx(one[0], rel=1e-5, abs=1e-6)
    assert other[1] == pytest.approx(one[1], rel=1e-4, abs=1e-6)
    for gradient, same in zip(one[3], other[3], strict=True):
        torch.testing.assert_close(same, gradient, atol=1e-5, rtol=1e-4)  # RMS norms compute in float32


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_the_gradient_does_not_depend_on_micro_batches(load, family, objective):
    llm = load(family)
    args, *step = step_of(llm, family, "--objective", objective)
    rollout, advantages, mask, old_logps, ref_logps = step
    choices = args.choices
    llm.model.zero_grad()
    loss, stats = grpo_loss(
        token_logps(llm, rollout),
        old_logps,
        ref_logps,
        advantages,
        mask,
        objective=choices,
        epsilon=choices.epsilon,
        epsilon_high=choices.epsilon_high,
        beta=choices.beta,
        max_completion_length=12,
    )
    loss.backward()
    gradients = [weight.grad.clone() for weight in llm.model.parameters()]
    lengths, owners = mask.sum(1).tolist(), rollout.prompt_of_row
    sizes = set()
    for budget in (10**6, 150, 1):  # everything at once, some rows, a row at a time
        plan = micro_batches(lengths, owners, rollout.prompt_ids.shape[1], budget)
        sizes.add(len(plan))
        whole = accumulated(llm, plan, args, *step)
        stats_of_loss = {name: whole[1][name] for name in stats}
        assert_same_step(
            (float(loss.detach()), {name: float(value) for name, value in stats.items()}, None, gradients),
            (whole[0], stats_of_loss, None, whole[3]),
        )
    assert sizes >= {1, 12} and len(sizes) == 3
    # any order of the rows, and any rows together
    assert_same_step(whole, accumulated(llm, [[7, 0, 11, 3, 2], [10, 1], [9, 8, 6, 5, 4]], args, *step))


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_the_gradient_does_not_depend_on_padding_or_on_the_order_of_groups(load, family):
    llm = load(family)
    args, rollout, *rest = step_of(llm, family)
    plan = [list(range(5)), list(range(5, 12))]
    expected = accumulated(llm, plan, args, rollout, *rest)
    advantages, mask, old_logps, ref_logps = rest

    padding = torch.nn.functional.pad
    prompts = rollout.prompts
    padded = dataclasses.replace(
        rollout,
        prompts=dataclasses.replace(
            prompts,
            ids=padding(prompts.ids, (3, 0), value=9),  # whatever stands there
            mask=padding(prompts.mask, (3, 0)),
            positions=padding(prompts.positions, (3, 0)),
        ),
        completion_ids=padding(rollout.completion_ids, (0, 5), value=9),
        completion_mask=padding(mask, (0, 5)),
        sampler_logps=padding(rollout.sampler_logps, (0, 5)),
    )
    more = [padding(x, (0, 5)) for x in (mask, old_logps, ref_logps)]
    assert_same_step(expected, accumulated(llm, plan, args, padded, advantages, *more))

    order = [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]  # of rows, when the groups are 2, 0, 1
    moved = [x[order] for x in (advantages, mask, old_logps, ref_logps)]
    assert_same_step(expected, accumulated(llm, plan, args, join([(rollout, [2, 0, 1])]), *moved))


def test_what_is_masked_has_no_gradient(load):
    """Completions that were cut off can be left out; then the others' gradient is all there is."""
    llm = load("qwen2")
    args, rollout, advantages, mask, old_logps, ref_logps = step_of(llm, "qwen2", "--normalizer", "tokens")
    assert 0 < rollout.finished.sum() < 12
    kept = rollout.finished.nonzero()[:, 0].tolist()
    mask = mask & rollout.finished[:, None]
    expected = accumulated(llm, [list(range(12))], args, rollout, advantages, mask, old_logps, ref_logps)
    alone = accumulated(llm, [kept], args, rollout, advantages, mask, old_logps, ref_logps)
    for gradient, same in zip(expected[3], alone[3], strict=True):
        torch.testing.assert_close(same, gradient, atol=1e-8, rtol=1e-5)


def test_on_policy_the_ratio_is_one(load):
    llm = load("qwen2_vl")
    args, rollout, advantages, mask, _, _ = step_of(llm, "qwen2_vl")
    _, stats, logps, _ = accumulated(llm, [[0, 1, 2], list(range(3, 12))], args, rollout, advantages, mask, None, None)
    assert stats["ratio"] == pytest.approx(1, abs=1e-6) and stats["clip_fraction"] == 0
    assert 0 < stats["sampler_logp_diff"] < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(logps, token_logps(llm, rollout))


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=24),
    group_size=st.integers(1, 5),
    prompt_length=st.integers(1, 40),
    budget=st.integers(1, 600),
)
@settings(max_examples=200, deadline=None)
def test_micro_batches_are_a_partition_within_the_budget(lengths, group_size, prompt_length, budget):
    owners = [row // group_size for row in range(len(lengths))]
    plan = micro_batches(lengths, owners, prompt_length, budget)
    assert sorted(row for rows in plan for row in rows) == list(range(len(lengths)))
    assert all(plan)

    def cost(rows):
        return len(rows) * max(lengths[row] for row in rows) + prompt_length * len({owners[row] for row in rows})

    assert all(cost(rows) <= budget or len(rows) == 1 for rows in plan)
    for group in set(owners):
        rows = [row for row in range(len(lengths)) if owners[row] == group]
        homes = [part for part in plan if set(part) & set(rows)]
        assert len(homes) == 1 or cost(rows) > budget  # a group that fits stays together, and shares its prompt


# ---------------------------------------------------------------------------------------------------------------------
# Weights and the learning rate


def test_the_learning_rate_warms_up_and_then_follows_its_schedule():
    def rates(kind, steps=10, warmup=0.3, peak=2.0):
        args = main.parse_args(
            ["--learning_rate", str(peak), "--warmup_ratio", str(warmup), "--lr_scheduler_type", kind]
        )
        return [learning_rate(step, steps, args) for step in range(1, steps + 1)]

    rising = [2 / 3, 4 / 3, 2]
    assert rates("constant") == pytest.approx(rising + [2] * 7)
    assert rates("linear") == pytest.approx(rising + [2 * (1 - n / 7) for n in range(7)])
    assert rates("cosine") == pytest.approx(rising + [1 + math.cos(math.pi * n / 7) for n in range(7)])
    assert rates("constant", warmup=0) == [2] * 10
    assert rates("linear", steps=1, warmup=0) == [2]  # the only step must teach something


def test_masters_keep_updates_that_bfloat16_would_lose():
    """A step of 1e-5 on a weight of 1 rounds to nothing in bfloat16; a hundred of them must not."""
    layer = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    layer.weight.data.fill_(1.0)
    weights = main.MasterWeights(layer)
    args = main.parse_args(["--learning_rate", "1e-4"])
    optimizer = main.make_optimizer(weights, torch.device("cpu"), args)
    for step in range(100):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        norm, finite = main.update(optimizer, weights, 1.0, 1e-4, 0.0)
        assert finite and norm == 1 and layer.weight.grad is None and weights.masters[0].grad is None
        if step == 0:
            assert layer.weight.item() == 1  # as if nothing had happened
    assert weights.masters[0].item() == pytest.approx(0.99, abs=1e-4)
    assert layer.weight.item() == pytest.approx(0.99, abs=4e-3)


def test_masters_add_up_micro_batches_in_float32():
    layer = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    weights = main.MasterWeights(layer)
    for size in (1.0, *[2.0**-10] * 16):  # bfloat16 has 8 bits: each small one alone would vanish beside the 1
        layer(torch.full((1, 1), size, dtype=torch.bfloat16)).sum().backward()
    assert weights.masters[0].grad.item() == 1 + 16 * 2.0**-10


def test_masters_of_float32_weights_are_the_weights():
    layer = torch.nn.Linear(2, 2)
    assert all(a is b for a, b in zip(main.MasterWeights(layer).masters, layer.parameters(), strict=True))


def test_update_clips_the_gradient_and_reports_its_norm_before():
    layer = torch.nn.Linear(2, 1, bias=False)
    weights = main.MasterWeights(layer)
    optimizer = torch.optim.SGD(weights.masters, lr=1.0)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert main.update(optimizer, weights, 0.0, 0.5, 1.0) == (5.0, True)
    torch.testing.assert_close(before - layer.weight, torch.tensor([[0.3, 0.4]]))  # rate 0.5, gradient of norm 1


@pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (0.0, math.nan), (0.0, math.inf)])
def test_update_skips_what_is_not_finite(loss, gradient):
    layer = torch.nn.Linear(2, 1, bias=False)
    weights = main.MasterWeights(layer)
    optimizer = main.make_optimizer(weights, torch.device("cpu"), main.parse_args([]))
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[gradient, 1.0]])
    assert main.update(optimizer, weights, loss, 0.5, 1.0)[1] is False
    assert torch.equal(layer.weight, before) and layer.weight.grad is None and not optimizer.state


def test_the_reference_moves_towards_the_model():
    reference, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.6 * model.weight + 0.4 * reference.weight
    main.mix_into(reference, model, 0.6)
    torch.testing.assert_close(reference.weight, expected)


# ---------------------------------------------------------------------------------------------------------------------
# The order of the data


def test_batches_prepared_ahead_do_not_count_as_seen(load):
    """A run resumed from `state` must get the batch that was being prepared, not the one after it."""
    llm = load("qwen2")

    def batches(state=None):
        loader, _ = get_dataloaders("arithmetic", 3, 10, 4, seed=1)
        if state:
            loader.load_state_dict(state)
        return main.Batches(loader, llm)

    def ids(found):
        return [example.id for example in found[0]]

    straight = batches()
    order = [ids(straight.next()) for _ in range(7)]
    straight.close()
    for seen in range(6):
        first = batches()
        for _ in range(seen):
            first.next()
        first.upcoming.result()  # the next one is ready
        second = batches(first.state)
        assert ids(second.next()) == order[seen]
        assert second.epoch == pytest.approx(0.3 * (seen + 1))
        first.close()
        second.close()


def test_batches_encode_their_examples(load):
    llm = load("qwen2")
    loader, _ = get_dataloaders("arithmetic", 3, 10, 4)
    batches = main.Batches(loader, llm)
    examples, prompts = batches.next()
    assert torch.equal(prompts.ids, encode_prompts(llm, examples).ids)
    batches.close()


# ---------------------------------------------------------------------------------------------------------------------
# Runs, end to end

RECORD = """
step epoch loss reward reward_std kl entropy clip_fraction grad_norm learning_rate completion_length truncated_fraction
zero_std_fraction sampler_logp_diff tokens tokens_per_second seconds/rollout seconds/reward seconds/loss seconds/total
peak_memory_gb
"""


@pytest.mark.parametrize("task", TASK_OPTIONS)
def test_a_run_leaves_what_the_design_says(run, task_models, task, capsys):
    from evaluator import get_evaluator

    folder, evaluator = run(task), get_evaluator(task)
    components = [f"rewards/{name}" for name in evaluator.reward_names]
    headline = evaluator.headline.metric

    log = read(folder / "train_logs.json")
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    for record in log:
        assert {*RECORD.split(), *components, headline} <= record.keys()
        assert all(isinstance(value, (int, float)) for value in record.values())
        assert record["reward"] == pytest.approx(sum(record[name] for name in components), abs=1e-5)
        assert record["grad_norm"] > 0 and record["entropy"] > 0
        assert record["sampler_logp_diff"] < 1e-4 and record["clip_fraction"] == 0
        assert 1 <= record["completion_length"] <= 16
        assert record["tokens"] == round(8 * record["completion_length"])
        parts = sum(record[f"seconds/{name}"] for name in ("rollout", "reward", "loss"))
        assert 0 < parts <= record["seconds/total"] + 1e-3
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the model before training
    assert log[3]["kl"] > 1e-5
    assert [record["epoch"] for record in log] == pytest.approx([1 / 12, 2 / 12, 3 / 12, 4 / 12])

    config = read(folder / "config.json")
    assert {"flags", "resolved", "command", "versions", "commit", "hardware", "started", "task"} <= config.keys()
    assert config["flags"]["num_generations"] == 4 and config["flags"]["objective"] == "grpo"
    assert config["resolved"]["beta"] == 0.04 and config["resolved"]["total_steps"] == 4
    assert config["resolved"]["dtype"] == "float32" and config["resolved"]["device"] == "cpu"
    assert config["resolved"]["attn_implementation"] == "sdpa" and config["resolved"]["parameters"] > 10_000
    assert config["task"]["name"] == task and config["task"]["reward_names"] == list(evaluator.reward_names)
    assert config["task"]["headline"] == dataclasses.asdict(evaluator.headline)
    assert config["command"].startswith("python main.py --model_path")

    assert names(folder / "checkpoints") == ["step_000002", "step_000004"]
    assert list(evaluations(folder)) == [0, 2, 4]
    for step, metrics in evaluations(folder).items():
        assert {"avg_reward", headline, "completion_length", "truncated_fraction", *components} <= metrics.keys()
        assert metrics["num_examples"] == 5 and metrics["skipped_prompts"] == 0
        check_groups(folder / f"eval_logs/samples_{step:06d}.json", step, task, groups=5, completions=1)
    assert names(folder / "train_samples")[-3:] == [f"step_{step:06d}.json" for step in (1, 2, 4)]
    for step in (1, 2, 4):
        groups = check_groups(folder / f"train_samples/step_{step:06d}.json", step, task, groups=2, completions=4)
        for group in groups:
            advantages = [completion["advantage"] for completion in group["completions"]]
            assert sum(advantages) == pytest.approx(0, abs=1e-5)
            best = max(group["completions"], key=lambda completion: completion["reward"])
            assert best["advantage"] == max(advantages)
    assert any(completion["advantage"] > 0.5 for group in groups for completion in group["completions"])

    out = capsys.readouterr().out
    assert "attention: sdpa" in out and "evaluation at step 0" in out and "step    1/4" in out
    assert f"{task}: {evaluator.headline.label}" in out and "→" in out and f"plotter.py --output_dir {folder}" in out

    check_checkpoint(folder / "checkpoints/step_000004", task_models[task], vision=task == "correlation")


def check_groups(path, step, task, groups, completions):
    content = read(path)
    assert content["step"] == step and len(content["groups"]) == groups
    for group in content["groups"]:
        assert group["id"].startswith(f"{task}-") and "<reasoning>" in group["prompt"] and group["answer"]
        assert len(group["completions"]) == completions
        assert bool(group["image"]) == (task == "correlation")
        assert not group["image"] or (path.parent / group["image"]).is_file()
        for completion in group["completions"]:
            assert {"text", "rewards", "reward", "advantage", "length", "truncated", "prediction"} == completion.keys()
            assert completion["reward"] == pytest.approx(sum(completion["rewards"].values()), abs=1e-5)
            assert (completion["advantage"] is None) == (completions == 1)
            assert 1 <= completion["length"] <= 16 and (completion["length"] == 16 or not completion["truncated"])
    return content["groups"]


def check_checkpoint(checkpoint, start, vision):
    """It loads in plain transformers, with other weights than training began with."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    before, after = (kind.from_pretrained(path).state_dict() for path in (start, checkpoint))
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.8 * len(before)
    if vision:
        assert any("visual" in name for name in moved)


def test_same_seed_same_run(run):
    first, same, other = (
        run("correlation", "--seed", str(seed), name=name) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert records(first) == records(same) and evaluations(first) == evaluations(same)
    assert records(first)[0]["reward"] != records(other)[0]["reward"]


@pytest.mark.parametrize("task", TASK_OPTIONS)
def test_evaluating_changes_nothing_in_training(run, task):
    """Contract 6: not the random state, not the order of the data."""
    never = run(task, "--eval_steps 0", name="never")
    often = run(task, "--eval_steps 1 --eval_samples 3", name="often")
    assert list(evaluations(never)) == [0, 4] and list(evaluations(often)) == [0, 1, 2, 3, 4]
    assert records(often) == records(never)


def test_the_global_random_state_is_not_part_of_a_run(run):
    torch.manual_seed(1)
    one = run("correlation", name="one")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert records(run("correlation", "--eval_samples 2", name="two")) == records(one)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_runs(run, objective):
    folder = run("arithmetic", f"--objective {objective} --max_steps 2 --eval_steps 0 --save_steps 0")
    resolved = read(folder / "config.json")["resolved"]
    assert {name: resolved[name] for name in ("clip", "normalizer", "beta")} == {
        name: getattr(OBJECTIVES[objective], name) for name in ("clip", "normalizer", "beta")
    }
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in records(folder))


def test_a_choice_of_the_objective_can_be_changed(run):
    folder = run("arithmetic", "--objective dapo --normalizer completions --beta 0.1 --dynamic_sampling 0")
    resolved = read(folder / "config.json")["resolved"]
    assert (resolved["normalizer"], resolved["beta"], resolved["dynamic_sampling"]) == ("completions", 0.1, 0)
    assert resolved["epsilon_high"] == 0.28  # the preset's


def test_several_updates_from_the_same_completions(run):
    folder = run("arithmetic", "--num_iterations 2 --max_steps 5 --learning_rate 1e-2")
    log = records(folder)
    for first, second in ((0, 1), (2, 3)):
        assert log[first]["ratio"] == pytest.approx(1, abs=1e-5) and log[first]["clip_fraction"] == 0
        assert log[second]["ratio"] != pytest.approx(1, abs=1e-5) and log[second]["clip_fraction"] > 0
        assert log[first]["reward"] == log[second]["reward"] and log[first]["epoch"] == log[second]["epoch"]
    assert log[2]["epoch"] > log[1]["epoch"]
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5]  # the last one is not doubled


def test_the_reference_follows_the_model_where_asked(run):
    plain = run("arithmetic", name="plain")
    synced = run("arithmetic", "--sync_ref_model --ref_model_sync_steps 2 --ref_model_mixup_alpha 1", name="synced")
    kl = [record["kl"] for record in records(synced)]
    assert kl[1] > 1e-6 and kl[3] > 1e-6
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[2] == pytest.approx(0, abs=1e-7)  # equal after each sync
    assert [record["kl"] for record in records(plain)][2] > 1e-6


def test_without_a_penalty_no_reference_is_loaded(run, monkeypatch):
    import llms

    loaded = []
    monkeypatch.setattr(llms, "load_llm", lambda *args: loaded.append(args) or load_llm(*args))
    assert all(record["kl"] == 0 for record in records(run("arithmetic", "--beta 0", name="free")))
    assert len(loaded) == 1
    run("arithmetic", name="held")
    assert len(loaded) == 3


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_gradient_checkpointing_recomputes_every_layer_and_changes_no_gradient(load, family):
    llm, passes = load(family), []
    args, *step = step_of(llm, family)
    layers = getattr(llm.model.base_model, "language_model", llm.model.base_model).layers
    layers[0].self_attn.q_proj.register_forward_hook(lambda *_: passes.append(1))
    expected = accumulated(llm, [list(range(12))], args, *step)
    assert len(passes) == 2  # prompts, completions
    main.enable_checkpointing(llm.model)
    args.gradient_checkpointing = True
    assert_same_step(expected, accumulated(llm, [list(range(12))], args, *step))
    assert len(passes) == 2 + 2  # both at once, and again in the backward pass
    sample(llm, questions(family), 2, 3)  # with its cache, as if nothing were recomputed


def test_gradient_checkpointing_changes_memory_only(run):
    plain = run("correlation", "--max_steps 2", name="plain")
    recomputed = run("correlation", "--max_steps 2 --gradient_checkpointing", name="recomputed")
    for one, other in zip(records(plain), records(recomputed), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_micro_batch_size_changes_memory_only(run):
    whole = run("correlation", "--max_steps 2", name="whole")
    rows = run("correlation", "--max_steps 2 --micro_batch_tokens 1", name="rows")
    for one, other in zip(records(whole), records(rows), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_bfloat16_weights_learn_at_a_small_rate(run, task_models):
    """In pure bfloat16, steps of 1e-5 are lost on most weights; the masters have them."""
    folder = run("arithmetic", "--dtype bfloat16 --learning_rate 1e-5 --warmup_ratio 0")
    assert read(folder / "config.json")["resolved"]["dtype"] == "bfloat16"
    masters = torch.load(folder / "checkpoints/step_000004/trainer_state.pt")["masters"]
    before = load_llm(task_models["arithmetic"], "cpu", "bfloat16").model.parameters()
    moved = [(master != old.float()).float().mean() for master, old in zip(masters, before, strict=True)]
    assert sum(moved) / len(moved) > 0.8
    after = load_llm(folder / "checkpoints/step_000004", "cpu", "bfloat16").model.parameters()
    assert all(torch.equal(master.bfloat16(), new) for master, new in zip(masters, after, strict=True))


def test_cut_off_completions_can_be_left_out(run):
    flags = "--max_completion_length 1 --beta 0 --max_steps 1 --normalizer tokens"  # nothing ends in one token
    folder = run("arithmetic", flags, "--mask_truncated_completions")
    (record,) = records(folder)
    assert record["truncated_fraction"] == 1 and record["grad_norm"] == 0 and record["loss"] == 0
    assert record["entropy"] > 0  # of what was sampled


def test_correction_of_the_sampler_changes_nothing_where_it_is_exact(run):
    plain = run("arithmetic", "--max_steps 2", name="plain")
    corrected = run("arithmetic", "--max_steps 2 --importance_sampling_correction", name="corrected")
    for one, other in zip(records(plain), records(corrected), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_dynamic_sampling_replaces_groups_that_teach_nothing(load, monkeypatch):
    """Of every three groups one has rewards that differ; two such are wanted, and found in the third round."""
    llm = load("qwen2")
    flags = "--objective dapo --prompts_per_step 2 --num_generations 2 --max_completion_length 4"
    args = main.parse_args(flags.split())
    loader, _ = get_dataloaders("arithmetic", 2, 30, 4)
    batches, seen = main.Batches(loader, llm), []

    class Evaluator:
        reward_names = ("alone",)

        def compute_rewards(self, completions, answers):
            groups = [len(seen) + n for n in range(len(completions) // 2)]
            seen.extend(groups)
            return torch.tensor([[float(g % 3 == 2 and i)] for g in groups for i in (0, 1)]), {"round": len(seen) // 2}

    handed_out, next_batch = [], batches.next
    monkeypatch.setattr(batches, "next", lambda: handed_out.append(next_batch()) or handed_out[-1])
    batch = main.collect(llm, batches, Evaluator(), args, torch.Generator().manual_seed(0), main.Timer())
    batches.close()
    examples = [example for found, _ in handed_out for example in found]
    assert len(examples) == 6  # 0 1, 2 3, 4 5: the groups 2 and 5 differ
    assert [example.id for example in batch.examples] == [examples[2].id, examples[5].id]
    assert batch.rewards[:, 0].tolist() == [0, 1, 0, 1]
    expected = encode_prompts(llm, batch.examples)
    for q, row in enumerate(expected.ids):
        assert torch.equal(batch.rollout.prompt_ids[q][batch.rollout.prompt_mask[q]], row[expected.mask[q]])
    record = batch.record(Evaluator())
    assert record["zero_std_fraction"] == 1 and record["round"] == 1  # the log says what was sampled first


def test_shuffled_rewards_are_the_same_rewards(run):
    plain, shuffled = run("arithmetic", name="plain"), run("arithmetic", "--shuffle_rewards", name="shuffled")
    one, other = records(plain)[0], records(shuffled)[0]
    assert other["reward"] == pytest.approx(one["reward"]) and other["grad_norm"] != pytest.approx(one["grad_norm"])
    assert other["reward_std"] != pytest.approx(one["reward_std"])


def test_a_worried_reader_is_told_once(run, capsys):
    run("arithmetic", "--beta 0")
    out = capsys.readouterr().out
    assert out.count("the loss is 0 and that is right") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_eval_only_evaluates_and_stops(run, capsys):
    folder = run("arithmetic", "--eval_only")
    out = capsys.readouterr().out
    assert list(evaluations(folder)) == [0] and read(folder / "train_logs.json") == []
    assert not (folder / "checkpoints").exists()
    accuracy = evaluations(folder)[0]["accuracy"]
    assert any(line.split() == ["accuracy", f"{accuracy:.6g}"] for line in out.splitlines())


def test_eval_only_of_a_checkpoint_repeats_what_the_run_saw_and_leaves_it_alone(run, capsys):
    folder = run("correlation")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    seen = evaluations(folder)
    capsys.readouterr()
    for step in (2, 4):
        run("correlation", f"--eval_only --resume {folder}/checkpoints/step_{step:06d}")
        printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
        assert float(printed["mean_abs_error"]) == pytest.approx(seen[step]["mean_abs_error"], rel=1e-5)
        assert float(printed["avg_reward"]) == pytest.approx(seen[step]["avg_reward"], rel=1e-5)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_eval_samples_give_pass_and_majority(run):
    folder = run("arithmetic", "--eval_only --eval_samples 4 --eval_size 20")
    metrics = evaluations(folder)[0]
    assert 0 <= metrics["majority@4"] <= metrics["pass@4"] <= 1
    assert metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"]
    assert metrics["accuracy_high"] - metrics["accuracy_low"] > 0.1  # 20 questions do not say more
    assert len(read(folder / "eval_logs/samples_000000.json")["groups"]) == 20


def test_batches_of_an_evaluation_do_not_matter(run):
    one = run("correlation", "--eval_only --eval_batch_size 1", name="one")
    all_at_once = run("correlation", "--eval_only --eval_batch_size 5", name="all")
    assert evaluations(one)[0] == pytest.approx(evaluations(all_at_once)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Contract 8: stopping and going on


@pytest.mark.parametrize(
    "task, flags",
    [
        ("arithmetic", "--sync_ref_model --ref_model_sync_steps 1 --lr_scheduler_type linear --warmup_ratio 0.5"),
        ("arithmetic", "--dtype bfloat16 --learning_rate 1e-5 --num_iterations 2"),
        ("correlation", "--objective dapo --train_size 5"),  # two epochs; rounds of further prompts
    ],
    ids=["reference", "bfloat16", "vision"],
)
def test_a_resumed_run_logs_what_the_uninterrupted_one_logs(run, tmp_path, task, flags):
    """Everything after step 2 is lost, as if the machine had been switched off while step 3 was being logged."""
    straight = run(task, flags)
    killed = shutil.copytree(straight, tmp_path / "killed")
    shutil.rmtree(killed / "checkpoints/step_000004")
    log = (killed / "train_logs.json").read_text().split("\n")
    (killed / "train_logs.json").write_text("\n".join(log[:4])[:-30])
    (killed / "eval_logs/metrics_000004.json").unlink()
    run(task, flags, "--resume", name="killed")
    assert records(killed) == records(straight)
    assert evaluations(killed) == evaluations(straight)
    for kind in ("eval_logs", "train_samples"):
        assert names(killed / kind) == names(straight / kind)
    for name in ("model.safetensors", "config.json"):
        path = f"checkpoints/step_000004/{name}"
        assert (killed / path).read_bytes() == (straight / path).read_bytes()


def test_a_run_can_go_on_from_an_earlier_checkpoint_and_for_longer(run):
    folder = run("arithmetic")
    before = records(folder)
    run("arithmetic", f"--resume {folder}/checkpoints/step_000002 --max_steps 6")
    after = records(folder)
    assert [record["step"] for record in after] == [1, 2, 3, 4, 5, 6] and after[:4] == before


def test_max_minutes_stops_with_a_checkpoint(run, capsys):
    whole = run("arithmetic", name="whole")
    folder = run("arithmetic", "--max_minutes 0.0001")
    assert names(folder / "checkpoints") == ["step_000000"] and records(folder) == []
    assert "go on with:  python main.py" in capsys.readouterr().out
    run("arithmetic", "--resume")
    assert records(folder) == records(whole) and evaluations(folder) == evaluations(whole)


def test_a_signal_stops_after_the_step_with_a_checkpoint(run, monkeypatch, capsys):
    whole = run("arithmetic", name="whole")
    log_step = main.Progress.stepped

    def interrupt(progress, record):
        log_step(progress, record)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(main.Progress, "stepped", interrupt)
    folder = run("arithmetic", status=128 + signal.SIGTERM)
    assert names(folder / "checkpoints")[-1] == "step_000003" and len(records(folder)) == 3
    assert "stopped at step 3 of 4" in capsys.readouterr().out
    monkeypatch.undo()
    run("arithmetic", "--resume")
    assert records(folder) == records(whole)


def test_resuming_with_other_flags_is_refused(run, capsys):
    folder = run("arithmetic")
    before = (folder / "train_logs.json").read_bytes()
    run("arithmetic", "--resume --temperature 0.5", status=2)
    assert "--temperature was 1.0" in capsys.readouterr().err
    assert (folder / "train_logs.json").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite


@pytest.mark.parametrize("bad, status", [({2}, 0), ({2, 3}, 2)])
def test_a_step_that_is_not_finite_is_skipped_and_several_stop_the_run(run, monkeypatch, capsys, bad, status):
    """`grpo_loss` breaks down at the steps `bad`; two in a row are the most that is allowed."""
    calls, honest = [], main.grpo_loss

    def sometimes_nan(*args, **options):
        loss, stats = honest(*args, **options)
        calls.append(1)
        return (loss * math.nan if len(calls) in bad else loss), stats

    monkeypatch.setattr(main, "grpo_loss", sometimes_nan)
    folder = run("arithmetic", "--max_skipped_steps 2 --micro_batch_tokens 100000 --save_steps 1", status=status)
    log = read(folder / "train_logs.json")
    assert log[1]["loss"] is None and log[1]["grad_norm"] is None  # NaN is not JSON
    assert [record["skipped_steps"] for record in log] == ([0, 1, 0, 0] if status == 0 else [0, 1, 2])
    captured = capsys.readouterr()
    assert "not finite, so the step was skipped" in captured.out
    if status == 0:
        assert math.isfinite(log[3]["loss"]) and names(folder / "checkpoints")[-1] == "step_000004"
        weights = [load_llm(folder / f"checkpoints/step_00000{step}", "cpu").model for step in (3, 4)]
        assert all(torch.isfinite(weight).all() for model in weights for weight in model.parameters())
    else:
        assert "2 steps in a row" in captured.err and captured.err.startswith("main.py: ")


def test_weights_that_broke_stop_the_run_with_an_explanation(run, capsys):
    """At this rate the first update makes every logit NaN, from which nothing can be sampled."""
    folder = run("arithmetic", "--learning_rate 1e20 --max_steps 20 --eval_steps 0", status=2)
    assert [record["skipped_steps"] for record in records(folder)] == [0, 1, 2, 3, 4, 5]
    assert "lower --learning_rate" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Help, and what is refused: one line, status 2, nothing written


def python(*arguments):
    """A process of its own, in the project's folder -> what came of it, and the seconds of computing it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_quick_and_names_every_flag():
    done, seconds = python("main.py", "--help")
    assert done.returncode == 0 and seconds < 1
    flags = "model_path dataset_options num_generations objective epsilon_high beta resume eval_only micro_batch_tokens"
    assert all(f"--{flag}" in done.stdout for flag in flags.split())


@pytest.mark.parametrize(
    "flags, hint",
    [
        ("--num_generation 4", "--num_generations"),
        ("--objective grp", "grpo"),
        ("--dataset_name colck", "clock"),
        ("--dataset_name clock --dataset_options stile=bold", "style"),
        ("--dataset_name clock --dataset_options style", "KEY=VALUE"),
        ("--dataset_name gsm8k --dataset_options size=5", "has none"),
        ("--num_generations 1", "at least 2"),
        ("--prompts_per_step 0", "at least 1"),
        ("--learning_rate -1", "at least 0"),
        ("--learning_rate nan", "at least 0"),
        ("--max_steps many", "invalid int value"),
        ("--temperature 0", "--temperature must be above 0"),
        ("--kl_estimator k4", "k3"),
        ("--scale_rewards std", "batch"),
        ("--resume --overwrite_output_dir", "give one of them"),
        ("--epsilon", "expected one argument"),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_is_imported(flags, hint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main.parse_args(flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("main.py: ") and error.count("\n") == 1
    assert hint in error
    assert names(tmp_path) == []


def test_flags_are_parsed_without_torch():
    program = (
        "import sys, main\n"
        "for flags in ('--help', '--objective grp', '--dataset_name colck', '--model_path tiny', ''):\n"
        "    try: main.parse_args(flags.split())\n"
        "    except SystemExit: pass\n"
        "print('imported:', {'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done, _ = python("-c", program)
    assert done.stdout.endswith("imported: set()\n"), done.stderr


def test_a_refusal_in_a_process_of_its_own(tmp_path):
    done, seconds = python("main.py", "--dataset_name", "colck", "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 2 and done.stdout == "" and "did you mean clock?" in done.stderr
    assert done.stderr.count("\n") == 1 and seconds < 1 and names(tmp_path) == []


@pytest.fixture
def refused(tmp_path, capsys, task_models):
    """-> a function that runs main and returns its one line of refusal, when nothing at all was written."""

    def refused(*flags, task="arithmetic", model=None, writes=()):
        model = task_models[task] if model is None else model
        before = names(tmp_path)
        status = main.main([*small_flags(task, model, tmp_path / "run"), *map(str, flags)])
        error = capsys.readouterr().err
        assert status == 2 and error.startswith("main.py: ") and error.count("\n") == 1, error
        assert names(tmp_path) == before
        return error

    return refused


def test_a_vision_task_needs_a_vision_model(refused, task_models):
    error = refused(task="correlation", model=task_models["arithmetic"])
    assert "reads text only" in error and "Qwen2.5-VL" in error


def test_a_model_that_is_not_there_is_refused(refused, tmp_path):
    assert "nowhere" in refused(model=tmp_path / "nowhere")


def test_qwen_vl_chat_is_refused_with_its_successor(refused):
    assert "Qwen2.5-VL-3B-Instruct" in refused(model="Qwen/Qwen-VL-Chat")


def test_lengths_beyond_the_context_are_refused(refused):
    error = refused("--max_completion_length", 2000)
    assert "2048 tokens" in error and "--max_completion_length 2000" in error


def test_prompts_that_are_all_too_long_are_refused(refused):
    assert "longer than --max_prompt_length 3" in refused("--max_prompt_length", 3)


def test_a_swapped_letter_finds_the_objective_that_was_meant(capsys):
    with pytest.raises(SystemExit):
        main.parse_args(["--objective", "gpro"])
    assert "did you mean grpo?" in capsys.readouterr().err


def test_more_prompts_than_examples_are_refused(refused):
    assert "24 training examples are too few" in refused("--prompts_per_step", 25)


def problem(answer="12 - 5 = 7\n#### 7") -> str:
    return json.dumps({"question": "Ann has 12 eggs and eats 5. How many are left?", "answer": answer}) + "\n"


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "there is no dataset file"),
        ("", "is empty"),
        (problem() + "{oops\n" + problem(), "line 2: not valid JSON"),
        (problem() * 2 + '{"question": "How many?"}\n', 'line 3: expected an object with the texts "question" and'),
        (problem() + problem("seven"), "line 2: the answer does not end with '#### '"),
    ],
)
def test_a_bad_dataset_file_is_refused_with_its_line(refused, tmp_path, content, complaint):
    path = tmp_path / "problems.jsonl"
    if content is not None:
        path.write_text(content)
    error = refused("--dataset_name", "gsm8k", "--dataset_options", "--dataset_path", path)
    assert complaint in error and str(path) in error


def test_gsm8k_trains_from_a_local_file(run, tmp_path):
    (tmp_path / "problems.jsonl").write_text(problem() * 30)
    flags = f"--dataset_name gsm8k --dataset_options --dataset_path {tmp_path}/problems.jsonl --eval_size 3"
    folder = run("arithmetic", flags)
    assert len(records(folder)) == 4 and evaluations(folder)[4]["num_examples"] == 3


def test_a_folder_that_holds_a_run_is_refused(run, refused, tmp_path):
    folder = run("arithmetic")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    error = refused()
    assert "--resume" in error and "--overwrite_output_dir" in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    run("arithmetic", "--overwrite_output_dir --max_steps 1")
    assert len(records(folder)) == 1


def test_resuming_where_no_run_is_is_refused(refused):
    assert "holds no run to resume" in refused("--resume")


def test_an_output_folder_that_cannot_be_made_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "is not a folder" in refused("--output_dir", tmp_path / "file" / "run")


def test_a_full_disk_is_refused_before_training(refused, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=16 * 2**20 + 9))  # for logs alone
    assert "free some space" in refused()


def test_a_device_that_is_not_there_is_refused(refused):
    assert "'cuda:99' cannot be used" in refused("--device", "cuda:99")


def test_out_of_memory_names_the_flags_that_help(run, monkeypatch, capsys):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more")

    monkeypatch.setattr(main, "accumulate_gradients", full)
    run("arithmetic", status=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(flag in error for flag in ("--micro_batch_tokens", "--gradient_checkpointing", "--num_generations"))


def test_long_prompts_are_left_out_and_counted_never_cut(run, task_models):
    llm = load_llm(task_models["arithmetic"], "cpu")
    loader, tests = get_dataloaders("arithmetic", 2, 24, 12, options=TASK_OPTIONS["arithmetic"])
    lengths = [[main.prompt_length(llm, data[i]) for i in range(len(data))] for data in (loader.dataset, tests)]
    limit = sorted(lengths[0] + lengths[1])[18]
    long_tests = sum(length > limit for length in lengths[1])
    assert all(min(some) <= limit < max(some) for some in lengths)
    folder = run("arithmetic", f"--max_prompt_length {limit} --max_steps 8 --log_completions_steps 1 --eval_size 12")
    log = records(folder)
    assert log[-1]["skipped_prompts"] > log[0]["skipped_prompts"] >= 0
    assert log[-1]["epoch"] > 16 / 24  # the ones left out were gone through too
    metrics = evaluations(folder)[8]
    assert metrics["skipped_prompts"] == long_tests and metrics["num_examples"] == 12 - long_tests
    kept = {loader.dataset[i].id for i, length in enumerate(lengths[0]) if length <= limit}
    seen = {group["id"] for path in (folder / "train_samples").glob("*.json") for group in read(path)["groups"]}
    assert seen and seen <= kept


def test_when_every_prompt_is_too_long_it_says_so(run, capsys):
    run("arithmetic", "--max_prompt_length 3", status=2)
    assert "longer than --max_prompt_length 3" in capsys.readouterr().err
