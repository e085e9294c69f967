"""A step of two turns of `look` against two steps of one turn, with the same number of sampled tokens.

    uv run benchmarks/two_turns.py

The tiny model names a cell, is shown it, and answers. The steps beside it are its turns as tasks of their own: G
completions of each overview, then of what was shown. Once with the same pictures, one completion for each row's cell;
once as tasks of one turn are, where the G completions of a group share one picture: less work. The sides take turns,
round by round, and all of them draw and encode their pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from common import median_of_ratios, table, timed

if TYPE_CHECKING:
    from environments import Environment
    from llms import LLM
    from rldatasets import Dataset, Example
    from rollout import Rollout

LEARNING_RATE = 1e-6  # so small that the model keeps writing what it wrote


def as_task(environment: Environment, text: str) -> Example:
    """What the environment shows after a turn, as the question of a task with one turn."""
    shown = environment.step(text)
    assert shown is not None
    content = [*({"type": "image"} for _ in shown.images), {"type": "text", "text": shown.text}]
    return dataclasses.replace(
        environment.example, messages=[{"role": "user", "content": content}], images=list(shown.images)
    )


class Bench:
    """The two sides, over one model with its sampler and optimizer. Q·G = B conversations."""

    def __init__(self, llm: LLM, dataset: Dataset, prompts: int, generations: int, longest: int):
        from config import parse_args
        from optimizer import MasterAdamW
        from rollout import Sampler

        flags = f"--num_generations {generations} --max_completion_length {longest} --learning_rate {LEARNING_RATE}"
        self.config = parse_args(f"--model_path tiny --dataset_name look --beta 0 --max_steps 1000 {flags}".split())
        self.llm, self.dataset, self.G, self.longest = llm, dataset, generations, longest
        self.examples = [dataset[index] for index in range(prompts)]
        self.optimizer, self.sampler = MasterAdamW(llm.model, self.config), Sampler(llm, seed=0)
        self.rollout: Rollout  # the last one of two turns

    def learn(self, rollout: Rollout) -> None:
        import torch

        import main

        advantages = torch.linspace(-1, 1, len(rollout.texts))  # (B,)
        loss, _, _ = main.accumulate_gradients(
            self.config, self.llm, rollout, advantages, rollout.sampled_mask, None, None
        )
        self.optimizer.step(loss)

    def two_turns(self) -> None:
        from prompts import encode_prompts

        environments = self.dataset.environments(self.examples, self.G)
        prompts = encode_prompts(self.llm, self.examples)
        self.rollout = self.sampler.sample(prompts, self.G, self.longest, environments=environments)
        self.learn(self.rollout)

    def one_turn_each(self, shared: bool) -> None:
        """Needs `two_turns` before it, whose lengths and texts it takes. shared: one cell for each group."""
        from prompts import encode_prompts

        episodes = self.rollout.episodes
        first, second = (max(one.turns[turn].length for one in episodes) for turn in (0, 1))
        prompts = encode_prompts(self.llm, self.examples)
        self.learn(self.sampler.sample(prompts, self.G, first, ignore_eos=True))
        environments = self.dataset.environments(self.examples, self.G)  # B
        rows, copies = (range(0, len(episodes), self.G), self.G) if shared else (range(len(episodes)), 1)
        shown = encode_prompts(self.llm, [as_task(environments[row], episodes[row].texts[0]) for row in rows])
        self.learn(self.sampler.sample(shown, copies, second, ignore_eos=True))

    def lengths(self) -> str:
        """The sampled tokens of each turn, shortest to longest."""
        turns = zip(*(one.turns for one in self.rollout.episodes), strict=True)
        return ", then ".join(f"{min(t.length for t in turn)}–{max(t.length for t in turn)}" for turn in turns)


def measure(bench: Bench, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The seconds of each side, and those of the parts of the conversations, once per round after a warm-up round."""
    sides: dict[str, Callable[[], None]] = {
        "two turns": bench.two_turns,
        "one turn, twice, same pictures": functools.partial(bench.one_turn_each, False),
        "one turn, twice, a picture for a group": functools.partial(bench.one_turn_each, True),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    parts: dict[str, list[float]] = {"environment": [], "reread": []}
    for number in range(rounds + 1):
        for name, step in sides.items():
            seconds = timed(step, "cpu")
            if number:
                times[name].append(seconds)
        for name, values in parts.items():
            values += [bench.rollout.seconds[name]] * bool(number)
    return times, parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="Q")
    parser.add_argument("--generations", type=int, default=16, help="G")
    parser.add_argument("--length", type=int, default=16, help="the most tokens of a turn")
    parser.add_argument("--rounds", type=int, default=7, help="how often each side takes a step")
    args = parser.parse_args()

    from llms import load_llm
    from rldatasets import get_dataset
    from tiny_models import tiny_model

    options = {"size": 56}
    llm = load_llm(str(tiny_model("look", dataset_options=options)), "cpu", "float32")
    dataset = get_dataset("look", "train", 1000, options=options)
    bench = Bench(llm, dataset, args.prompts, args.generations, args.length)
    times, parts = measure(bench, args.rounds)
    both, *alone = times
    rows = [[both, f"{statistics.median(times[both]):.3f}", ""]]
    for name, seconds in parts.items():
        share = median_of_ratios(seconds, times[both])
        rows.append([f"… of it {name}", f"{statistics.median(seconds):.3f}", f"{100 * share:.0f} %"])
    for name in alone:
        ratio = median_of_ratios(times[both], times[name])
        rows.append([name, f"{statistics.median(times[name]):.3f}", f"two turns take {ratio:.2f} ×"])
    print(f"look: {args.prompts} × {args.generations} conversations of {bench.lengths()} tokens")
    print(table(["", "seconds, median", ""], rows))


if __name__ == "__main__":
    main()
