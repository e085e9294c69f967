"""Turns: sampling, scoring and training conversations, against plain implementations."""

import random

import pytest
import torch
from sampling import slow
from small_models import FAMILIES, VISION, picture, questions

from environments import Environment, Observation
from logprobs import token_logps
from rollout import Rollout, Sampler

SOME = slow(FAMILIES, "llama", "qwen3", "qwen2_5_vl")
WORDS = ("How many eggs?", "7 + 5 =", "Look again.", "two hens", "No.")


class Toy(Environment):
    """Goes on for one to `max_turns` turns, with texts, and pictures for models that see, that depend on the texts."""

    max_turns = 3

    def __init__(self, example, row=0, pictures=False, longer=0):
        super().__init__(example)
        self.row, self.pictures, self.longer, self.heard = row, pictures, longer, []

    def step(self, text):
        self.heard.append(text)
        rng = random.Random(f"{self.row} {self.heard}")
        if rng.random() < 0.2:
            return None
        shown = [picture(32 * rng.randint(1, 3), 32 * rng.randint(1, 2), rng.randint(0, 9))] if self.pictures else []
        shown *= rng.randint(0, 2)
        return Observation(
            " ".join(rng.choices(WORDS, k=rng.randint(1, 3) + self.longer)), tuple(shown), rng.random() < 0.5
        )


def toys(family, generations, **options):
    return [
        Toy(example, row, family in VISION, **options)
        for row, example in enumerate(example for example in questions(family) for _ in range(generations))
    ]


def play(llm, family, generations=3, length=20, temperature=1.0, seed=0, environments=None, **options) -> Rollout:
    environments = toys(family, generations, **options) if environments is None else environments
    return Sampler(llm, seed).sample(questions(family), generations, length, temperature, environments=environments)


def plain_logps(llm, family, rollout, temperature=1.0, model=None):
    """For each row the log-probabilities (T,) of all tokens of its completion: one row at a time, without a cache. The
    whole conversation is given to the model, which places the pictures itself."""
    from small_models import plain_inputs

    model, found = model or llm.model, []
    for row, prompt in enumerate(rollout.prompt_of_row):
        inputs = plain_inputs(llm, questions(family)[prompt])
        mask = rollout.completion_mask[row]
        ids = torch.cat([inputs["input_ids"], rollout.completion_ids[row][mask][None]], 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pictures = [image for turn in rollout.episodes[row].turns[:-1] for image in turn.observation.images]
        if llm.is_vision:
            own = llm.processor.image_processor(pictures, return_tensors="pt") if pictures else {}
            for name in ("pixel_values", "image_grid_thw"):
                parts = [one[name] for one in (inputs, own) if name in one]
                if parts:
                    given[name] = torch.cat(parts)
            given["mm_token_type_ids"] = (ids == llm.model.config.image_token_id).int()
        logits = model(**given).logits[0, inputs["input_ids"].shape[1] - 1 : -1] / temperature
        if llm.excluded_token_ids:
            logits[:, list(llm.excluded_token_ids)] = -torch.inf
        found.append(logits.log_softmax(-1).gather(1, ids[0, inputs["input_ids"].shape[1] :, None])[:, 0])
    return found


@pytest.mark.parametrize("family", SOME)
def test_sampler_trainer_and_plain_forward_agree(load, family):
    llm = load(family)
    rollout = play(llm, family, temperature=0.8)
    counts = [len(episode.turns) for episode in rollout.episodes]
    assert max(counts) == 3 and len(set(counts)) > 1 and rollout.sampled_mask.sum(1).unique().numel() > 2
    mask = rollout.sampled_mask
    with torch.no_grad():
        shared = token_logps(llm, rollout, 0.8)
        alone = token_logps(llm, rollout, 0.8, share_prompt=False)
        plain = plain_logps(llm, family, rollout, 0.8)
    for row, expected in enumerate(plain):
        inside = mask[row][: len(expected)]
        for found in (shared[row].float(), alone[row].float(), rollout.sampler_logps[row]):
            torch.testing.assert_close(found[: len(expected)][inside], expected.float()[inside], atol=2e-5, rtol=1e-5)
            assert torch.isfinite(found).all() and (found[~mask[row]] == 0).all()
