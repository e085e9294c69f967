"""The loop: the gradient of a step, what a run computes and logs, evaluation, and what each number costs."""

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import types

import pytest
import runs
import torch
from runs import TASK_OPTIONS, contents, evaluations, names, one_line, read, records
from small_models import cut, questions, small_config

import main
from config import OBJECTIVES, Objective
from evaluator import get_evaluator
from llms import load_llm, recompute_activations
from logprobs import token_logps
from main import evaluate, grpo_loss, loss_divisor, replace_equal_groups, sample_and_score
from optimizer import MasterAdamW
from prompts import encode_prompts
from rldatasets import get_dataloaders
from rollout import Decoder, FusedDecoder, Sampler

small_run, refused = runs.small_run, runs.refused  # fixtures

# ---------------------------------------------------------------------------------------------------------------------
# Contract 2: the gradient of a step does not depend on how it was computed


def step_of(llm, family, *flags):
    """The arguments of accumulate_gradients; old and reference log-probabilities differ a little from the policy's."""
    config = small_config("--num_generations 4 --max_completion_length 12", *flags)
    generator = torch.Generator().manual_seed(0)
    rollout = Sampler(llm).sample(questions(family), 4, 12)
    rollout.sampler_logps = rollout.sampler_logps.double()  # like the model's weights here
    noise = 0.3 * torch.randn(2, *rollout.completion_ids.shape, generator=generator)
    advantages = torch.randn(12, generator=generator)
    old_logps, ref_logps = (noise + rollout.sampler_logps) * rollout.completion_mask
    return config, rollout, advantages, rollout.sampled_mask, old_logps, ref_logps


def accumulated(llm, config, rollout, advantages, mask, old_logps, ref_logps):
    """-> the loss, its statistics, log π, and the gradient of each weight."""
    llm.model.zero_grad()
    loss, stats, logps = main.accumulate_gradients(config, llm, rollout, advantages, mask, old_logps, ref_logps)
    return float(loss), stats, logps, [weight.grad.clone() for weight in llm.model.parameters()]


def assert_same_step(one, other):
    assert other[0] == pytest.approx(one[0], rel=1e-5, abs=1e-6)
    assert other[1] == pytest.approx(one[1], rel=1e-4, abs=1e-6)
    for gradient, same in zip(one[3], other[3], strict=True):
        torch.testing.assert_close(same, gradient, atol=1e-5, rtol=1e-4)  # RMS norms compute in float32


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["qwen2", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_gradient_does_not_depend_on_micro_batches(load, family, objective):
    llm = load(family)
    config, rollout, *step = step_of(llm, family, "--objective", objective)
    advantages, mask, old_logps, ref_logps = step
    llm.model.zero_grad()
    divisor = loss_divisor(config.objective, mask, 12)
    loss, stats = grpo_loss(
        token_logps(llm, rollout), old_logps, ref_logps, advantages, mask, config.objective, divisor
    )
    loss.backward()
    gradients = [weight.grad.clone() for weight in llm.model.parameters()]
    sizes = set()
    for budget in (10**6, 150, 1):  # everything at once, some rows, a row at a time
        sizes.add(len(rollout.micro_batches(budget)))
        whole = accumulated(llm, dataclasses.replace(config, micro_batch_tokens=budget), rollout, *step)
        assert_same_step(
            (float(loss.detach()), {name: float(value) for name, value in stats.items()}, None, gradients),
            (whole[0], {name: whole[1][name] for name in stats}, None, whole[3]),
        )
    assert sizes >= {1, 12} and len(sizes) == 3
    any_order = cut(rollout, [[7, 0, 11, 3, 2], [10, 1], [9, 8, 6, 5, 4]])
    assert_same_step(whole, accumulated(llm, config, any_order, *step))


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_gradient_does_not_depend_on_padding_or_order(load, family):
    llm = load(family)
    config, rollout, *step = step_of(llm, family)
    in_two = [list(range(5)), list(range(5, 12))]
    expected = accumulated(llm, config, cut(rollout, in_two), *step)
    advantages, mask, old_logps, ref_logps = step

    padding = torch.nn.functional.pad
    prompts = rollout.prompts
    padded = dataclasses.replace(
        rollout,
        prompts=dataclasses.replace(
            prompts,
            ids=padding(prompts.ids, (3, 0), value=9),  # any token
            mask=padding(prompts.mask, (3, 0)),
            positions=padding(prompts.positions, (3, 0)),
        ),
        completion_ids=padding(rollout.completion_ids, (0, 5), value=9),
        completion_mask=padding(mask, (0, 5)),
        sampler_logps=padding(rollout.sampler_logps, (0, 5)),
    )
    more = [padding(x, (0, 5)) for x in (mask, old_logps, ref_logps)]
    assert_same_step(expected, accumulated(llm, config, cut(padded, in_two), advantages, *more))

    order = [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]  # of rows, when the groups are 2, 0, 1
    moved = [x[order] for x in (advantages, mask, old_logps, ref_logps)]
    assert_same_step(expected, accumulated(llm, config, cut(rollout.select([2, 0, 1]), in_two), *moved))


def test_masked_completions_have_no_gradient(load):
    """Without the completions that were cut off, the gradient is that of the others."""
    llm = load("qwen2")
    config, rollout, advantages, mask, old_logps, ref_logps = step_of(llm, "qwen2", "--normalizer tokens")
    assert 0 < rollout.finished.sum() < 12
    kept = rollout.finished.nonzero()[:, 0].tolist()
    step = (advantages, mask & rollout.finished[:, None], old_logps, ref_logps)
    expected = accumulated(llm, config, cut(rollout, [list(range(12))]), *step)
    alone = accumulated(llm, config, cut(rollout, [kept]), *step)
    for gradient, same in zip(expected[3], alone[3], strict=True):
        torch.testing.assert_close(same, gradient, atol=1e-8, rtol=1e-5)


def test_on_policy_the_ratio_is_one(load):
    """Contract 1, for the statistics that a record shows."""
    llm = load("qwen2_vl")
    config, rollout, advantages, mask, _, _ = step_of(llm, "qwen2_vl")
    in_two = cut(rollout, [[0, 1, 2], list(range(3, 12))])
    _, stats, logps, _ = accumulated(llm, config, in_two, advantages, mask, None, None)
    assert stats["ratio"] == pytest.approx(1, abs=1e-6) and stats["clip_fraction"] == 0
    assert 0 < stats["sampler_logp_diff"] < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(logps, token_logps(llm, rollout))


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_gradient_checkpointing_recomputes_every_layer(load, family):
    llm, passes = load(family), []
    config, rollout, *step = step_of(llm, family)
    rollout = cut(rollout, [list(range(12))])
    layers = getattr(llm.model.base_model, "language_model", llm.model.base_model).layers
    layers[0].self_attn.q_proj.register_forward_hook(lambda *_: passes.append(1))
    expected = accumulated(llm, config, rollout, *step)
    assert len(passes) == 2  # prompts, completions
    recompute_activations(llm.model)
    checkpointing = dataclasses.replace(config, gradient_checkpointing=True)
    assert_same_step(expected, accumulated(llm, checkpointing, rollout, *step))
    assert len(passes) == 2 + 2  # both at once, and again in the backward pass
    assert Sampler(llm).sample(questions(family), 2, 3).completion_ids.shape[1] <= 3  # sampling keeps its cache


def test_the_loss_takes_its_settings_from_the_objective():
    """ε, ε_high, β were arguments beside the objective, whose own values were ignored without them."""
    assert not {field.name for field in dataclasses.fields(Objective)} & set(inspect.signature(grpo_loss).parameters)
    logps = torch.tensor([[0.0, 0.25]]).log_softmax(1)
    old_logps, ref_logps = logps - math.log(1.25), logps - 1  # a ratio of 1.25 is within dapo's ε_high of 0.28
    arguments = (logps, old_logps, ref_logps, torch.ones(1), torch.ones(1, 2, dtype=torch.bool))
    clipped = {name: grpo_loss(*arguments, OBJECTIVES[name], 1.0)[1]["clip_fraction"] for name in ("grpo", "dapo")}
    assert clipped == {"grpo": 1, "dapo": 0}
    with_kl, without = (
        grpo_loss(*arguments, dataclasses.replace(OBJECTIVES["grpo"], beta=beta), 1.0)[0] for beta in (0.1, 0.0)
    )
    assert with_kl - without == pytest.approx(0.1 * math.exp(-1), rel=1e-5)  # k3 of a log-ratio of −1 is 1/e


# ---------------------------------------------------------------------------------------------------------------------
# Runs, end to end

RECORD = """
step epoch loss reward reward_std kl entropy clip_fraction grad_norm learning_rate completion_length truncated_fraction
zero_std_fraction sampler_logp_diff tokens tokens_per_second seconds/rollout seconds/reward seconds/loss seconds/total
peak_memory_gb skipped_steps skipped_prompts ratio
"""


@pytest.mark.parametrize("task", TASK_OPTIONS)
def test_a_run_logs_evaluates_and_saves(small_run, task_models, task, capsys):
    folder, evaluator = small_run(task), get_evaluator(task)
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
    for part in ("sdpa", "evaluation at step 0", "1/4", evaluator.headline.label, "→", f"--output_dir {folder}"):
        assert part in out
    assert out.count("grad_norm") == 1  # the explanation of a loss of 0, given once

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
    """It loads in plain transformers, and training changed most of its weights."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    before, after = (kind.from_pretrained(path).state_dict() for path in (start, checkpoint))
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.8 * len(before)
    if vision:
        assert any("visual" in name for name in moved)


@pytest.mark.slow
def test_same_seed_same_run(small_run):
    first, same, other = (
        small_run("correlation", "--seed", str(seed), name=name) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert records(first) == records(same) and evaluations(first) == evaluations(same)
    assert records(first)[0]["reward"] != records(other)[0]["reward"]


@pytest.mark.slow
def test_the_global_random_state_is_not_part_of_a_run(small_run):
    torch.manual_seed(1)
    one = small_run("correlation", name="one")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert records(small_run("correlation", "--eval_samples 2", name="two")) == records(one)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_runs(small_run, objective):
    folder = small_run("arithmetic", f"--objective {objective} --max_steps 2 --eval_steps 0 --save_steps 0")
    flags = read(folder / "config.json")["flags"]
    expected = dataclasses.asdict(OBJECTIVES[objective])
    assert flags["objective"] == expected.pop("name")
    assert {name: flags[name] for name in expected} == expected
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in records(folder))


def test_several_updates_from_the_same_completions(small_run):
    folder = small_run("arithmetic", "--num_iterations 2 --max_steps 5 --learning_rate 1e-2")
    log = records(folder)
    for first, second in ((0, 1), (2, 3)):
        assert log[first]["ratio"] == pytest.approx(1, abs=1e-5) and log[first]["clip_fraction"] == 0
        assert log[second]["ratio"] != pytest.approx(1, abs=1e-5) and log[second]["clip_fraction"] > 0
        assert log[first]["reward"] == log[second]["reward"] and log[first]["epoch"] == log[second]["epoch"]
    assert log[2]["epoch"] > log[1]["epoch"]
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5]  # the last completions are used once


@pytest.mark.slow
def test_the_reference_follows_the_model_if_asked(small_run):
    plain = small_run("arithmetic", name="plain")
    flags = "--sync_ref_model --ref_model_sync_steps 2 --ref_model_mixup_alpha 1"
    kl = [record["kl"] for record in records(small_run("arithmetic", flags, name="synced"))]
    assert kl[1] > 1e-6 and kl[3] > 1e-6
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[2] == pytest.approx(0, abs=1e-7)  # equal after each sync
    assert [record["kl"] for record in records(plain)][2] > 1e-6


@pytest.mark.slow
def test_without_a_penalty_no_reference_is_loaded(small_run, monkeypatch):
    loaded = []
    monkeypatch.setattr(main, "load_llm", lambda *args: loaded.append(args) or load_llm(*args))
    assert all(record["kl"] == 0 for record in records(small_run("arithmetic", "--beta 0", name="free")))
    assert len(loaded) == 1
    small_run("arithmetic", name="held")
    assert len(loaded) == 3


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--gradient_checkpointing", "--micro_batch_tokens 1"])
def test_memory_flags_change_no_number(small_run, flags):
    plain = small_run("correlation", "--max_steps 2", name="plain")
    smaller = small_run("correlation", "--max_steps 2", flags, name="smaller")
    for one, other in zip(records(plain), records(smaller), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_bfloat16_weights_learn_at_a_small_rate(small_run, task_models):
    """In pure bfloat16, steps of 1e-5 are lost on most weights; the masters have them."""
    folder = small_run("arithmetic", "--dtype bfloat16 --learning_rate 1e-5 --warmup_ratio 0")
    assert read(folder / "config.json")["resolved"]["dtype"] == "bfloat16"
    masters = torch.load(folder / "checkpoints/step_000004/trainer_state.pt")["optimizer"]["masters"]
    before = load_llm(task_models["arithmetic"], "cpu", "bfloat16").model.parameters()
    moved = [(master != old.float()).float().mean() for master, old in zip(masters, before, strict=True)]
    assert sum(moved) / len(moved) > 0.8
    after = load_llm(folder / "checkpoints/step_000004", "cpu", "bfloat16").model.parameters()
    assert all(torch.equal(master.bfloat16(), new) for master, new in zip(masters, after, strict=True))


def test_truncated_completions_can_be_masked(small_run):
    flags = "--max_completion_length 1 --beta 0 --max_steps 1 --normalizer tokens"  # nothing ends in one token
    folder = small_run("arithmetic", flags, "--mask_truncated_completions")
    (record,) = records(folder)
    assert record["truncated_fraction"] == 1 and record["grad_norm"] == 0 and record["loss"] == 0
    assert record["entropy"] > 0  # of what was sampled


@pytest.mark.slow
def test_correcting_an_exact_sampler_changes_nothing(small_run):
    plain = small_run("arithmetic", "--max_steps 2", name="plain")
    corrected = small_run("arithmetic", "--max_steps 2 --importance_sampling_correction", name="corrected")
    for one, other in zip(records(plain), records(corrected), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_shuffled_rewards_are_the_same_rewards(small_run):
    plain, shuffled = (
        small_run("arithmetic", name="plain"),
        small_run("arithmetic", "--shuffle_rewards", name="shuffled"),
    )
    one, other = records(plain)[0], records(shuffled)[0]
    assert other["reward"] == pytest.approx(one["reward"]) and other["grad_norm"] != pytest.approx(one["grad_norm"])
    assert other["reward_std"] != pytest.approx(one["reward_std"])


# ---------------------------------------------------------------------------------------------------------------------
# Data: each prompt is encoded once, long ones are skipped


@pytest.fixture
def encoded(monkeypatch):
    """The ids of all examples that main encodes, in order."""
    ids = []

    def counted(llm, examples):
        ids.extend(example.id for example in examples)
        return encode_prompts(llm, examples)

    monkeypatch.setattr(main, "encode_prompts", counted)
    return ids


@pytest.mark.parametrize("task", ["arithmetic", pytest.param("correlation", marks=pytest.mark.slow)])
def test_each_training_prompt_is_encoded_once(small_run, encoded, task):
    """It was encoded a second time, alone, to count its tokens."""
    small_run(task, "--max_steps 12 --eval_steps 0")
    trained = [name for name in encoded if "-train-" in name]
    assert len(set(trained[:24])) == 24  # the whole epoch
    assert 24 <= len(trained) <= 26  # and the batch that was prefetched when the run ended
    tested = [name for name in encoded if "-test-" in name]
    assert len(tested) == 2 * 5 and len(set(tested)) == 5  # two evaluations


@pytest.mark.slow
def test_long_prompts_are_skipped_and_counted_never_cut(small_run, task_models):
    llm = load_llm(task_models["arithmetic"], "cpu")
    loader, tests = get_dataloaders("arithmetic", 2, 24, 12, options=TASK_OPTIONS["arithmetic"])
    lengths = [encode_prompts(llm, [data[i] for i in range(len(data))]).lengths for data in (loader.dataset, tests)]
    limit = sorted(lengths[0] + lengths[1])[18]
    long_tests = sum(length > limit for length in lengths[1])
    assert all(min(some) <= limit < max(some) for some in lengths)
    flags = f"--max_prompt_length {limit} --max_steps 8 --log_completions_steps 1 --eval_size 12"
    folder = small_run("arithmetic", flags)
    log = records(folder)
    assert log[-1]["skipped_prompts"] > log[0]["skipped_prompts"] >= 0
    assert log[-1]["epoch"] > 16 / 24  # skipped prompts count too
    metrics = evaluations(folder)[8]
    assert metrics["skipped_prompts"] == long_tests and metrics["num_examples"] == 12 - long_tests
    kept = {loader.dataset[i].id for i, length in enumerate(lengths[0]) if length <= limit}
    seen = {group["id"] for path in (folder / "train_samples").glob("*.json") for group in read(path)["groups"]}
    assert seen and seen <= kept


def problem(answer="12 - 5 = 7\n#### 7") -> str:
    return json.dumps({"question": "Ann has 12 eggs and eats 5. How many are left?", "answer": answer}) + "\n"


@pytest.mark.parametrize(
    "content, place, named",
    [
        (None, "", "dataset file"),
        ("", "", "empty"),
        (problem() + "{oops\n" + problem(), "line 2", "JSON"),
        (problem() * 2 + '{"question": "How many?"}\n', "line 3", '"answer"'),
        (problem() + problem("seven"), "line 2", "####"),
    ],
)
def test_a_bad_dataset_file_is_refused_with_its_line(refused, tmp_path, content, place, named):
    path = tmp_path / "problems.jsonl"
    if content is not None:
        path.write_text(content)
    error = refused("--dataset_name", "gsm8k", "--dataset_options", "--dataset_path", path)
    assert place in error and named in error and str(path) in error


@pytest.mark.slow
def test_gsm8k_trains_from_a_local_file(small_run, tmp_path):
    (tmp_path / "problems.jsonl").write_text(problem() * 30)
    flags = f"--dataset_name gsm8k --dataset_options --dataset_path {tmp_path}/problems.jsonl --eval_size 3"
    folder = small_run("arithmetic", flags)
    assert len(records(folder)) == 4 and evaluations(folder)[4]["num_examples"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# Dynamic sampling


class EveryThird:
    """An evaluator that gives different rewards within every third group, in the order in which they are scored."""

    reward_names = ("second",)

    def __init__(self):
        self.groups = self.calls = 0

    def parse(self, text):
        return get_evaluator("arithmetic").parse(text)

    def parse_episode(self, texts):
        return self.parse(texts[-1])

    def compute_rewards(self, completions, answers):
        numbers = range(self.groups, self.groups + len(completions) // 2)
        self.groups, self.calls = numbers.stop, self.calls + 1
        rewards = torch.tensor([[float(n % 3 == 2 and i)] for n in numbers for i in (0, 1)])
        return rewards, {"call": self.calls}


def collected(llm, *flags):
    """-> (the batch that is trained, its columns, all batches first sampled, all examples handed out)."""
    config = small_config("--objective dapo --prompts_per_step 2 --num_generations 2 --max_completion_length 4", *flags)
    evaluator, run = EveryThird(), types.SimpleNamespace(timed=lambda phase: contextlib.nullcontext())
    sampler, handed_out = Sampler(llm), []

    class Recorded:
        def __init__(self, loader):
            self.loader, self.dataset = loader, loader.dataset

        def __next__(self):
            examples, prompts = next(self.loader)
            handed_out.extend(examples)
            return examples, prompts

    encode = functools.partial(encode_prompts, llm)
    loader, _ = get_dataloaders("arithmetic", 2, 30, 4, seed=1, encode=encode)
    with contextlib.closing(loader):
        recorded = Recorded(loader)
        first, record = sample_and_score(config, sampler, recorded, evaluator, run)
        batch, changes = replace_equal_groups(config, first, sampler, recorded, evaluator, run)
    return batch, record, changes, first, handed_out


def test_dynamic_sampling_replaces_groups_of_equal_rewards(load):
    """Of every three groups one has different rewards; two are needed, and found in the third round."""
    llm = load("qwen2")
    batch, _, changes, _, examples = collected(llm)
    assert len(examples) == 6  # 0 1, 2 3, 4 5: the groups 2 and 5 differ
    assert [example.id for example in batch.examples] == [examples[2].id, examples[5].id]
    assert batch.rewards[:, 0].tolist() == [0, 1, 0, 1]
    expected = encode_prompts(llm, batch.examples)
    for q, row in enumerate(expected.ids):
        assert torch.equal(batch.rollout.prompt_ids[q][batch.rollout.prompt_mask[q]], row[expected.mask[q]])
    assert changes["replaced_fraction"] == 1 and changes["trained/reward"] == 0.5
    assert changes["trained/completion_length"] == pytest.approx(float(batch.rollout.lengths.float().mean()))
    assert changes["resampled_tokens"] >= int(batch.rollout.lengths.sum())


def test_records_describe_what_was_first_sampled(load):
    """`reward` was that of the first completions, `rewards/*`, `tokens` and lengths those of the groups kept."""
    _, record, changes, first, _ = collected(load("qwen2"))
    assert record["reward"] == record["rewards/second"] == 0 and record["zero_std_fraction"] == 1
    assert record["call"] == 1 and record["tokens"] == int(first.rollout.lengths.sum())
    assert not record.keys() & changes.keys()


def test_the_last_round_fills_up_with_equal_groups(load):
    batch, _, changes, _, examples = collected(load("qwen2"), "--max_resamples 1")
    assert len(examples) == 4
    assert [example.id for example in batch.examples] == [examples[2].id, examples[3].id]
    assert batch.rewards[:, 0].tolist() == [0, 1, 0, 0] and changes["replaced_fraction"] == 1


@pytest.mark.slow
def test_records_of_a_run_with_dynamic_sampling(small_run):
    flags = "--objective dapo --num_generations 2 --temperature 0.3 --max_steps 6"
    log = records(small_run("arithmetic", flags))
    assert any(record["replaced_fraction"] > 0 for record in log)
    for record in log:
        assert record["replaced_fraction"] == pytest.approx(record["zero_std_fraction"])
        assert (record["resampled_tokens"] > 0) == (record["replaced_fraction"] > 0)
        components = [value for name, value in record.items() if name.startswith("rewards/")]
        assert record["reward"] == pytest.approx(sum(components), abs=1e-5)
        assert record["tokens"] == round(4 * record["completion_length"])
        if not record["replaced_fraction"]:
            assert record["trained/reward"] == pytest.approx(record["reward"])


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.slow
@pytest.mark.parametrize("task", TASK_OPTIONS)
def test_evaluating_changes_nothing_in_training(small_run, task):
    """Contract 6: not the random state, not the order of the data."""
    never = small_run(task, "--eval_steps 0", name="never")
    often = small_run(task, "--eval_steps 1 --eval_samples 3", name="often")
    assert list(evaluations(never)) == [0, 4] and list(evaluations(often)) == [0, 1, 2, 3, 4]
    assert records(often) == records(never)


def test_eval_only_evaluates_and_stops(small_run, capsys):
    folder = small_run("arithmetic", "--eval_only")
    out = capsys.readouterr().out
    assert list(evaluations(folder)) == [0] and read(folder / "train_logs.json") == []
    assert not (folder / "checkpoints").exists()
    accuracy = evaluations(folder)[0]["accuracy"]
    assert any(line.split() == ["accuracy", f"{accuracy:.6g}"] for line in out.splitlines())


@pytest.mark.slow
def test_eval_only_of_a_checkpoint_repeats_its_evaluation(small_run, capsys):
    """And leaves the run's folder unchanged."""
    folder = small_run("correlation")
    before, seen = contents(folder), evaluations(folder)
    capsys.readouterr()
    for step in (2, 4):
        small_run("correlation", f"--eval_only --resume {folder}/checkpoints/step_{step:06d}")
        printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
        assert float(printed["mean_abs_error"]) == pytest.approx(seen[step]["mean_abs_error"], rel=1e-5)
        assert float(printed["avg_reward"]) == pytest.approx(seen[step]["avg_reward"], rel=1e-5)
    assert contents(folder) == before


def test_eval_samples_give_pass_and_majority(small_run):
    folder = small_run("arithmetic", "--eval_only --eval_samples 4 --eval_size 20")
    metrics = evaluations(folder)[0]
    assert 0 <= metrics["majority@4"] <= metrics["pass@4"] <= 1
    assert metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"]
    assert metrics["accuracy_high"] - metrics["accuracy_low"] > 0.1  # 20 questions do not say more
    assert len(read(folder / "eval_logs/samples_000000.json")["groups"]) == 20


@pytest.mark.slow
def test_eval_batch_size_changes_no_metric(small_run):
    one = small_run("correlation", "--eval_only --eval_batch_size 1", name="one")
    all_at_once = small_run("correlation", "--eval_only --eval_batch_size 5", name="all")
    assert evaluations(one)[0] == pytest.approx(evaluations(all_at_once)[0])


def evaluation_of(llm, *flags, sampler=None, size=5, task="arithmetic"):
    """-> metrics and groups of an evaluation of a random model."""
    config = small_config("--max_completion_length 6 --eval_batch_size 3 --max_prompt_length 2000", *flags)
    _, tests = get_dataloaders(task, 2, 8, size)
    return evaluate(config, sampler or Sampler(llm), tests, get_evaluator(task))


def test_an_evaluation_parses_and_scores_each_text_once(load, monkeypatch):
    """It scored everything twice, and parsed each text up to four times."""
    parsed, scored = [], []
    kind = type(get_evaluator("arithmetic"))
    parse, score = kind.parse, kind.score

    def counted_parse(self, completion):
        if isinstance(completion, str):  # a parsed completion is returned as it came
            parsed.append(completion)
        return parse(self, completion)

    def counted_score(self, completion, answer):
        scored.append(completion)
        return score(self, completion, answer)

    monkeypatch.setattr(kind, "parse", counted_parse)
    monkeypatch.setattr(kind, "score", counted_score)
    evaluation_of(load("qwen2"))
    assert len(parsed) == len(scored) == 5
    parsed.clear()
    scored.clear()
    evaluation_of(load("qwen2"), "--eval_samples 4")
    assert len(parsed) == 5 + 5 * 4 and len(scored) == 5  # the samples are right or wrong, without rewards


def test_evaluations_reuse_generator_and_decoder(load, monkeypatch):
    """CUDA graphs are captured with a generator: a new one in each evaluation needed new graphs, which were kept."""
    llm = load("qwen2")
    sampler, used = Sampler(llm, seed=7), []
    generator, state, start = sampler.generator, sampler.generator.get_state(), Decoder.start

    def recorded(decoder, prompts, cache, num_generations, temperature, generator, *more):
        used.append((decoder, generator))
        start(decoder, prompts, cache, num_generations, temperature, generator, *more)

    monkeypatch.setattr(Decoder, "start", recorded)
    first = evaluation_of(llm, "--eval_samples 8", sampler=sampler)  # 24 rows at once: the most there will be
    used.clear()
    second = evaluation_of(llm, "--eval_samples 8", sampler=sampler)
    assert torch.equal(generator.get_state(), state)
    assert {each for _, each in used} == {generator} and len({decoder for decoder, _ in used}) == 1
    assert isinstance(used[0][0], FusedDecoder)
    first[0].pop("seconds"), second[0].pop("seconds")
    assert first == second  # the same samples in every evaluation


def test_an_evaluation_keeps_every_answer(load):
    metrics, groups = evaluation_of(load("qwen2"), size=7)
    _, tests = get_dataloaders("arithmetic", 2, 8, 7)
    assert [group["id"] for group in groups] == [tests[i].id for i in range(7)] and metrics["num_examples"] == 7
    totals = [group["completions"][0]["reward"] for group in groups]
    assert metrics["avg_reward"] == pytest.approx(sum(totals) / 7, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Losses and weights that are not finite


@pytest.mark.slow
@pytest.mark.parametrize("bad, status", [({2}, 0), ({2, 3}, 2)])
def test_nan_losses_are_skipped_and_several_stop_the_run(small_run, monkeypatch, capsys, bad, status):
    """`grpo_loss` gives NaN at the steps `bad`; two in a row are too many."""
    calls, honest = [], main.grpo_loss

    def sometimes_nan(*args, **options):
        loss, stats = honest(*args, **options)
        calls.append(1)
        return (loss * math.nan if len(calls) in bad else loss), stats

    monkeypatch.setattr(main, "grpo_loss", sometimes_nan)
    folder = small_run("arithmetic", "--max_skipped_steps 2 --micro_batch_tokens 100000 --save_steps 1", status=status)
    log = read(folder / "train_logs.json")
    assert log[1]["loss"] is None and log[1]["grad_norm"] is None  # NaN is not JSON
    assert [record["skipped_steps"] for record in log] == ([0, 1, 0, 0] if status == 0 else [0, 1, 2])
    captured = capsys.readouterr()
    assert "note, step 2: " in captured.out
    if status == 0:
        assert math.isfinite(log[3]["loss"]) and names(folder / "checkpoints")[-1] == "step_000004"
        weights = [load_llm(folder / f"checkpoints/step_00000{step}", "cpu").model for step in (3, 4)]
        assert all(torch.isfinite(weight).all() for model in weights for weight in model.parameters())
    else:
        assert "2 steps" in one_line(captured.err)
        assert names(folder / "checkpoints") == ["step_000001"]  # the weights from before the first NaN


def test_broken_weights_stop_the_run_with_advice(small_run, monkeypatch, capsys):
    """The first update makes every weight NaN, so that nothing can be sampled."""
    copy_to_model = MasterAdamW.copy_to_model

    def broken(optimizer):
        copy_to_model(optimizer)
        for weight in optimizer.parameters:
            weight.data.fill_(math.nan)

    monkeypatch.setattr(MasterAdamW, "copy_to_model", broken)
    folder = small_run("arithmetic", "--max_steps 20 --eval_steps 0", status=2)
    assert [record["skipped_steps"] for record in records(folder)] == [0, 1, 2, 3, 4, 5]
    assert "--learning_rate" in one_line(capsys.readouterr().err)
    assert not (folder / "checkpoints").exists()
