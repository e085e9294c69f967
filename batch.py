"""What was sampled, and how good was it? One record carried from the sampler to the loss and to the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import parallel
from environments import Episode, Turn
from evaluator import Completion, RewardEvaluator
from prompts import plain_text
from rldatasets import Example
from rollout import Rollout


@dataclass
class Batch:
    """Q groups of G scored completions; row i of B = Q·G belongs to example i // G.

    Attributes:
        examples: Q. rollout: B rows. completions: B texts, parsed by the evaluator.
        rewards: (B, K) reward components.
    """

    examples: list[Example]
    rollout: Rollout
    completions: list[Completion]
    rewards: Tensor

    @property
    def groups(self) -> Tensor:
        """(Q, G) total rewards."""
        return self.rewards.sum(1).view(len(self.examples), -1)

    def varied(self) -> Tensor:
        """(Q,) True where the rewards of a group are not all equal."""
        return self.groups.amax(1) > self.groups.amin(1)

    def select(self, groups: list[int]) -> Batch:
        """The groups at these indices, in that order."""
        rows = torch.arange(len(self.completions)).view(len(self.examples), -1)[groups].flatten().tolist()
        completions = [self.completions[row] for row in rows]
        return Batch([self.examples[q] for q in groups], self.rollout.select(groups), completions, self.rewards[rows])

    @staticmethod
    def cat(parts: Sequence[Batch]) -> Batch:
        """All groups of several batches."""
        return Batch(
            [example for part in parts for example in part.examples],
            Rollout.cat([part.rollout for part in parts]),
            [completion for part in parts for completion in part.completions],
            torch.cat([part.rewards for part in parts]),
        )

    def record(self, reward_names: Sequence[str]) -> dict[str, float]:
        """The columns of a training record that describe these completions."""
        lengths = self.rollout.lengths  # (B,)
        return {
            "reward": float(self.groups.mean()),
            "reward_std": float(self.groups.std(1).mean()),
            **named_means(reward_names, self.rewards),
            "completion_length": float(lengths.float().mean()),
            "truncated_fraction": 1 - float(self.rollout.finished.float().mean()),
            "zero_std_fraction": float((~self.varied()).float().mean()),
            "tokens": int(lengths.sum()),
            **turn_columns(self.rollout.episodes),
            **{f"seconds/{name}": seconds for name, seconds in self.rollout.seconds.items()},
        }

    def readable(
        self,
        evaluator: RewardEvaluator,
        scores: Sequence[float] | None = None,
        advantages: Sequence[float] | None = None,
        count: int | None = None,
    ) -> list[dict]:
        """The first `count` groups as the run folder keeps them for reading.

        Args:
            scores: B totals; None: the sums of the reward components. advantages: B; None in evaluations.
        """
        G = self.rollout.num_generations
        scores = self.rewards.sum(1).tolist() if scores is None else scores
        lengths, finished = self.rollout.lengths.tolist(), self.rollout.finished.tolist()

        def readable_turns(row: int) -> dict:
            episodes = self.rollout.episodes
            if not episodes or len(episodes[row].turns) == 1:
                return {}
            return {"turns": [readable_turn(turn) for turn in episodes[row].turns]}

        def readable_completion(row: int) -> dict:
            return {
                "text": self.completions[row].text,
                "rewards": dict(zip(evaluator.reward_names, self.rewards[row].tolist(), strict=True)),
                "reward": scores[row],
                "advantage": None if advantages is None else advantages[row],
                "length": lengths[row],
                "truncated": not finished[row],
                "prediction": self.completions[row].prediction,
                **readable_turns(row),
            }

        return [
            {
                "id": example.id,
                "prompt": "\n\n".join(plain_text(message["content"]) for message in example.messages),
                "image_data": example.images[0] if example.images else None,
                "answer": example.answer,
                "completions": [readable_completion(row) for row in range(q * G, (q + 1) * G)],
            }
            for q, example in enumerate(self.examples[:count])
        ]


def readable_turn(turn: Turn) -> dict:
    """A turn as the run folder keeps it; the pictures of its observation under "image_data"."""
    shown = turn.observation
    observation = None if shown is None else {"text": shown.text, "image_data": list(shown.images)}
    return {"text": turn.text, "length": turn.length, "observation": observation}


def score(examples: list[Example], rollout: Rollout, evaluator: RewardEvaluator) -> tuple[Batch, dict[str, float]]:
    """Score the completions of Q examples -> the batch, and the task's metrics. Only what the model wrote is scored."""
    completions = [evaluator.parse_episode(texts) for texts in rollout.texts_of_turns]  # B
    answers = [example.answer for example in examples for _ in range(rollout.num_generations)]  # B
    rewards, metrics = parallel.on_first(evaluator.compute_rewards, completions, answers)  # (B, K)
    return Batch(examples, rollout, completions, rewards), metrics


def turn_columns(episodes: Sequence[Episode]) -> dict[str, float]:
    """The columns of a record that only tasks with several turns have: means over the rows."""
    turns = [turn for episode in episodes for turn in episode.turns]
    sums = {
        "turns": len(turns),
        "invalid_turns": sum(turn.observation is not None and turn.observation.malformed for turn in turns),
        "observation_tokens": sum(turn.observation_length for turn in turns),
    }
    return {name: total / len(episodes) for name, total in sums.items()} if episodes else {}


def named_means(reward_names: Sequence[str], rewards: Tensor) -> dict[str, float]:
    """The mean of each reward component; rewards (B, K)."""
    return {f"rewards/{name}": mean for name, mean in zip(reward_names, rewards.mean(0).tolist(), strict=True)}


def evaluation_metrics(
    evaluator: RewardEvaluator, batches: Sequence[Batch], samples: Sequence[Sequence[Completion]]
) -> dict[str, float]:
    """The metrics over all answers of an evaluation; `samples` has k further answers to each question, or is empty."""
    answers = [example.answer for batch in batches for example in batch.examples]  # N
    completions = [completion for batch in batches for completion in batch.completions]  # N
    rewards = torch.cat([batch.rewards for batch in batches])  # (N, K)
    lengths = torch.cat([batch.rollout.lengths for batch in batches])  # (N,)
    episodes = [episode for batch in batches for episode in batch.rollout.episodes]  # N, or none
    finished = torch.cat([batch.rollout.finished for batch in batches])  # (N,)
    return {
        "num_examples": len(answers),
        "avg_reward": float(rewards.sum(1).mean()),
        **named_means(evaluator.reward_names, rewards),
        **evaluator.checked_metrics(completions, answers),
        **evaluator.sampling_metrics(completions, answers, samples),
        "completion_length": float(lengths.float().mean()),
        "truncated_fraction": 1 - float(finished.float().mean()),
        **turn_columns(episodes),
    }
