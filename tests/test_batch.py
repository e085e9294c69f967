"""Batches: groups of scored completions, the columns of a record, and the metrics of an evaluation."""

import pytest
import torch

from batch import Batch, evaluation_metrics, named_means
from evaluator import asked_format, get_evaluator
from prompts import Prompts
from rldatasets import Example
from rollout import Rollout

EVALUATOR = get_evaluator("arithmetic")


def rollout_of(lengths: list[int], finished: list[bool], group_size: int, prompt_length: int = 3) -> Rollout:
    """Completions of these lengths. Token t of row i is 100·i + t; prompt q consists of tokens q, left-padded by q."""
    queries, longest = len(lengths) // group_size, max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]  # (B, T)
    ids = torch.arange(longest) + 100 * torch.arange(len(lengths))[:, None]  # (B, T)
    prompt_mask = torch.arange(prompt_length) >= torch.arange(queries).clamp(max=prompt_length - 1)[:, None]  # (Q, P)
    prompts = Prompts(
        torch.arange(queries)[:, None].expand(-1, prompt_length) * prompt_mask,
        prompt_mask,
        (prompt_mask.long().cumsum(-1) - 1).clamp(min=0),
        [{} for _ in range(queries)],
    )
    logps = -ids.float() * mask
    return Rollout(
        prompts, ids * mask, mask, logps, torch.tensor(finished), [f"text {i}" for i in range(len(lengths))], group_size
    )


def batch_of(rewards: list[list[float]], group_size: int = 2, lengths: list[int] | None = None) -> Batch:
    """Completions with these reward components; odd rows are cut off."""
    rows = len(rewards)
    lengths = lengths or [row + 1 for row in range(rows)]
    finished = [row % 2 == 0 for row in range(rows)]
    examples = [
        Example(f"example-{q}", [{"role": "user", "content": f"question {q}"}], [], str(q))
        for q in range(rows // group_size)
    ]
    completions = [EVALUATOR.parse(asked_format("adding", str(row))) for row in range(rows)]
    return Batch(examples, rollout_of(lengths, finished, group_size), completions, torch.tensor(rewards))


REWARDS = [[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.5, 0.5], [0.25, 0.75]]  # totals 1 1, 2 0, 1 1


def test_groups_are_totals_by_prompt():
    batch = batch_of(REWARDS)
    assert batch.groups.tolist() == [[1, 1], [2, 0], [1, 1]]
    assert batch.varied().tolist() == [False, True, False]


def test_record_describes_the_completions():
    record = batch_of(REWARDS, lengths=[1, 2, 3, 4, 5, 6]).record(["first", "second"])
    assert record == {
        "reward": pytest.approx(1),
        "reward_std": pytest.approx(2**0.5 / 3),  # the unbiased std of 2, 0 is √2; the other groups have 0
        "rewards/first": pytest.approx(3.75 / 6),
        "rewards/second": pytest.approx(2.25 / 6),
        "completion_length": 3.5,
        "truncated_fraction": 0.5,
        "zero_std_fraction": pytest.approx(2 / 3),
        "tokens": 21,
    }


def test_each_reward_component_has_a_column():
    assert named_means(["a", "b"], torch.tensor([[1.0, 2.0], [3.0, 6.0]])) == {"rewards/a": 2, "rewards/b": 4}
    with pytest.raises(ValueError):
        named_means(["a"], torch.zeros(2, 2))


def test_selected_groups_keep_their_rows():
    batch = batch_of(REWARDS)
    chosen = batch.select([2, 0])
    assert [example.id for example in chosen.examples] == ["example-2", "example-0"]
    assert chosen.rewards.tolist() == [REWARDS[row] for row in (4, 5, 0, 1)]
    assert [completion.prediction for completion in chosen.completions] == ["4", "5", "0", "1"]
    assert chosen.rollout.texts == ["text 4", "text 5", "text 0", "text 1"]
    assert chosen.rollout.lengths.tolist() == [5, 6, 1, 2]
    assert chosen.rollout.prompt_ids.tolist() == [[0, 0, 2], [0, 0, 0]]


def test_joined_batches_are_their_groups():
    batch = batch_of(REWARDS)
    joined = Batch.cat([batch.select([1]), batch.select([0, 2])])
    expected = batch.select([1, 0, 2])
    assert joined.examples == expected.examples and joined.completions == expected.completions
    assert torch.equal(joined.rewards, expected.rewards)
    for name in ("completion_ids", "completion_mask", "sampler_logps", "finished", "prompt_ids", "prompt_mask"):
        assert torch.equal(getattr(joined.rollout, name), getattr(expected.rollout, name)), name
    assert joined.rollout.texts == expected.rollout.texts


def test_readable_groups_hold_what_was_scored():
    batch = batch_of([[float(row), *[0.0] * (len(EVALUATOR.reward_names) - 1)] for row in range(6)])
    groups = batch.readable(EVALUATOR, scores=[0.5 * row for row in range(6)], advantages=[-1.0, 1.0] * 3, count=2)
    assert [group["id"] for group in groups] == ["example-0", "example-1"]
    assert groups[1]["prompt"] == "question 1" and groups[1]["answer"] == "1" and groups[1]["image_data"] is None
    completion = groups[1]["completions"][1]  # row 3
    assert completion == {
        "text": asked_format("adding", "3"),
        "rewards": dict(zip(EVALUATOR.reward_names, batch.rewards[3].tolist(), strict=True)),
        "reward": 1.5,
        "advantage": 1.0,
        "length": 4,
        "truncated": True,
        "prediction": "3",
    }


def test_without_advantages_rewards_are_the_sums():
    batch = batch_of([[1.0] * len(EVALUATOR.reward_names)] * 4)
    completions = [completion for group in batch.readable(EVALUATOR) for completion in group["completions"]]
    assert [completion["advantage"] for completion in completions] == [None] * 4
    assert [completion["reward"] for completion in completions] == [len(EVALUATOR.reward_names)] * 4


def test_metrics_of_an_evaluation_are_over_all_batches():
    """Batches of 2 and 1 questions: means are over questions, not over batches."""

    def answered(predictions: list[str], lengths: list[int]) -> Batch:
        examples = [Example(f"example-{p}", [], [], "1") for p in predictions]
        completions = [EVALUATOR.parse(asked_format("adding", p)) for p in predictions]
        rewards, _ = EVALUATOR.compute_rewards(completions, ["1"] * len(predictions))
        return Batch(examples, rollout_of(lengths, [True] * len(predictions), 1), completions, rewards)

    batches = [answered(["1", "1"], [4, 5]), answered(["2"], [9])]
    samples = [[EVALUATOR.parse(asked_format("", text)) for text in pair] for pair in ("11", "12", "22")]
    metrics = evaluation_metrics(EVALUATOR, batches, samples)
    assert metrics["num_examples"] == 3 and metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["completion_length"] == 6 and metrics["truncated_fraction"] == 0
    assert metrics["pass@2"] == pytest.approx(2 / 3)  # the second question was answered rightly once
    assert metrics["avg_reward"] == pytest.approx(sum(metrics[f"rewards/{name}"] for name in EVALUATOR.reward_names))
    rewards = torch.cat([batch.rewards for batch in batches])
    assert metrics["avg_reward"] == pytest.approx(float(rewards.sum()) / 3)
    assert "pass@2" not in evaluation_metrics(EVALUATOR, batches, [])
