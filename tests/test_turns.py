"""Turns: sampling, scoring and training conversations, against plain implementations."""

import dataclasses
import random

import pytest
import runs
import torch
from runs import evaluations, read, records
from sampling import FAMILIES, assert_same_gradients, gradients, slow
from small_models import EOS, VISION, cut, picture, plain_inputs, question, questions, small_config

import main
import rollout as rollout_module
from batch import score
from environments import Environment, EpisodeError, Observation
from evaluator import asked_format, get_evaluator
from llms import refuse_unfit_model
from logprobs import token_logps
from model_checks import ModelError
from prompts import encode_observations
from rldatasets import get_dataset
from rollout import Rollout, Sampler
from tiny_models import CHAT_TEMPLATE

small_run = runs.small_run  # a fixture
PICTURES = slow(["qwen2_vl", "qwen3_vl"])
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


@pytest.mark.parametrize("family", FAMILIES)
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


def test_turns_decode_few_numbers_of_rows(load, monkeypatch):
    """On a GPU each number is captured as a graph. The rows that go on are another number in each turn and step."""
    llm, decoded = load("qwen2"), set()

    class Captured(rollout_module.FusedDecoder):
        def __init__(self, *args):
            super().__init__(*args)
            self.uses_graphs, self.look_every = True, 16

        def step(self, rows, window):
            decoded.add(rows)
            self.advance(rows, window)

    monkeypatch.setattr(rollout_module, "FusedDecoder", Captured)
    sampler = Sampler(llm)
    for _ in range(4):
        sampler.sample(questions("qwen2"), 8, 20, environments=toys("qwen2", 8))
    assert {24, 12, 6} <= decoded <= {24, 12, 6, 3, 1}


def pieces(llm, rollout, row):
    """The ids of each turn and of each observation of a row, in order."""
    found, position, ids = [], 0, rollout.completion_ids[row].tolist()
    for turn in rollout.episodes[row].turns:
        for length in (turn.length, turn.observation_length):
            found.append(ids[position : position + length])
            position += length
    assert position == int(rollout.completion_mask[row].sum())
    return found[:-1]


@pytest.mark.parametrize("family", ["qwen2", "qwen3_vl"])
def test_sampled_ids_stay_and_observations_are_appended(load, family):
    """Some sampled ids are not those to which their text would be encoded. The masks say which ids were sampled, and
    every turn but the last ends in an end-of-sequence token."""
    llm = load(family, "float32")
    rollout, encoded_otherwise = play(llm, family, 4), 0
    for row, episode in enumerate(rollout.episodes):
        parts = pieces(llm, rollout, row)
        sampled = [mask for number, part in enumerate(parts) for mask in [number % 2 == 0] * len(part)]
        assert rollout.sampled_mask[row, : len(sampled)].tolist() == sampled
        assert rollout.texts[row] == episode.turns[-1].text
        for turn, ids, shown in zip(episode.turns, parts[::2], [*parts[1::2], None], strict=True):
            text = llm.tokenizer.decode(ids[:-1] if ids[-1] in EOS else ids)
            assert turn.text == text and turn.length == len(ids) and not set(ids) & set(llm.excluded_token_ids)
            encoded_otherwise += llm.tokenizer(text)["input_ids"] != [i for i in ids if i not in EOS]
            if shown is not None:
                assert ids[-1] in EOS and shown == encode_observations(llm, [turn.observation])[0][0]
        last = [False] * (len(sampled) - len(parts[-1])) + [True] * len(parts[-1])
        assert rollout.last_turn_mask[row, : len(sampled)].tolist() == last
    assert encoded_otherwise > 3 and rollout.lengths.tolist() == [
        sum(t.length for t in e.turns) for e in rollout.episodes
    ]
    assert rollout.longest_turns.tolist() == [max(t.length for t in e.turns) for e in rollout.episodes]


LINES = CHAT_TEMPLATE.replace("{{ '<|endoftext|>' }}", "{{ '<|endoftext|>\n' }}")
STRIPS = LINES.replace("{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LINES, STRIPS])
def test_observation_is_a_slice_of_the_whole_rendering(load, template):
    """The line end after the end of the turn included. A template that drops thoughts changes no id."""
    llm = load("qwen2", "float32")
    llm.tokenizer.chat_template = template
    messages = [*questions("qwen2")[0].messages, {"role": "assistant", "content": "two"}]
    messages.append({"role": "user", "content": "Look again."})
    text = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    whole = llm.tokenizer(text)["input_ids"]
    (ids,), _ = encode_observations(llm, [Observation("Look again.")])
    end = len(whole) - len(ids)
    assert whole[end:] == ids and whole[end - 1] == llm.tokenizer.eos_token_id
    assert (llm.tokenizer.decode(ids)[0] == "\n") == (template != CHAT_TEMPLATE)
    (quoted,), _ = encode_observations(llm, [Observation("Look <|endoftext|>again.")])
    assert quoted == ids  # an observation may quote a model, which cannot end a turn with a text


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE.replace("<|endoftext|>", "END"),  # no end-of-sequence token ends a turn
        CHAT_TEMPLATE.replace("in messages", "in messages[:2]"),
        CHAT_TEMPLATE + "{{ raise_exception('one question only') if messages | length > 2 }}",
    ],
)
def test_templates_without_turns_are_refused(load, template):
    llm = load("qwen2", "float32")
    llm.tokenizer.chat_template = template
    with pytest.raises(ModelError, match="chat template"):
        encode_observations(llm, [Observation("Look again.")])


@pytest.mark.parametrize("family", slow(["qwen2", "qwen2_vl", "qwen3_vl"], "qwen3_vl"))
def test_gradient_equals_the_plain_one(load, family):
    """The tokens of observations have no weight of their own; their pictures get gradients."""
    llm = load(family)
    rollout = play(llm, family, 2)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(rollout.sampled_mask.shape, generator=generator).double() * rollout.sampled_mask / 100

    def weighted(rows):  # on the sampled tokens alone: a placeholder has log-probability -inf
        parts = [(weights[i, : len(row)], row) for i, row in enumerate(rows)]
        return sum((weight[weight != 0] * row[weight != 0]).sum() for weight, row in parts)

    expected = gradients(llm, weighted(plain_logps(llm, family, rollout)))
    assert_same_gradients(gradients(llm, weighted(token_logps(llm, rollout))), expected)
    alone = token_logps(llm, rollout, share_prompt=False)
    assert_same_gradients(gradients(llm, weighted(alone)), expected)
    order = [4, 0, 5, 2, 1, 3]
    micro_batches = [token_logps(llm, rollout, rows=order[i : i + 2]) for i in (0, 2, 4)]
    in_order = torch.cat(micro_batches)[torch.tensor(order).argsort()]
    assert_same_gradients(gradients(llm, weighted(in_order)), expected)


@pytest.mark.parametrize("objective", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_update_does_not_depend_on_micro_batches(load, objective):
    """Nor on recomputing activations; and the tokens of observations are in no statistic and no normalizer."""
    llm = load("qwen2_vl")
    rollout = play(llm, "qwen2_vl", 3)
    rollout.sampler_logps = rollout.sampler_logps.double()
    advantages = torch.linspace(-1, 2, 9).double()
    assert len(rollout.micro_batches(120)) > 2

    def update(config, rollout=rollout):
        llm.model.zero_grad()
        loss, stats, logps = main.accumulate_gradients(
            config, llm, rollout, advantages, rollout.sampled_mask, None, None
        )
        return loss, stats, logps, {name: w.grad.clone() for name, w in llm.model.named_parameters()}

    expected = update(small_config(f"--objective {objective} --beta 0 --max_turns 3"))
    for other in (
        update(small_config(f"--objective {objective} --beta 0 --max_turns 3 --micro_batch_tokens 120")),
        update(
            small_config(f"--objective {objective} --beta 0 --max_turns 3"),
            cut(rollout, [[8, 0, 4], [7, 1], [2, 3, 5, 6]]),
        ),
        update(small_config(f"--objective {objective} --beta 0 --max_turns 3 --gradient_checkpointing")),
    ):
        torch.testing.assert_close(other[:3], expected[:3], atol=1e-7, rtol=1e-6)
        assert_same_gradients(other[3], expected[3])
    mask, config = rollout.sampled_mask, small_config("--max_turns 3")
    sums = (advantages * mask.sum(1)).sum()  # all ratios are 1
    by_hand = {"dapo": sums / mask.sum(), "dr_grpo": sums / (9 * config.max_episode_length)}
    torch.testing.assert_close(expected[0], -by_hand.get(objective, advantages.mean()), atol=1e-7, rtol=1e-6)
    assert expected[1]["entropy"] > 0 and (expected[2][~mask] == 0).all() and (expected[2][mask] < 0).all()


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_one_turn_computes_what_it_computes_alone(load, family):
    llm = load(family, "float32")
    samplers = Sampler(llm, 3), Sampler(llm, 3)
    environments = [Environment(example) for example in questions(family) for _ in range(2)]
    plain = samplers[0].sample(questions(family), 2, 8)
    turned = samplers[1].sample(questions(family), 2, 8, environments=environments)
    for name in ("completion_ids", "completion_mask", "sampler_logps", "finished", "texts"):
        one, other = getattr(plain, name), getattr(turned, name)
        assert one == other if name == "texts" else torch.equal(one, other)
    assert torch.equal(samplers[0].generator.get_state(), samplers[1].generator.get_state())
    assert turned.sampled_mask is turned.completion_mask and turned.episodes == [] and turned.positions is None
    ended = [Toy(example) for example in questions(family) for _ in range(2)]
    for toy in ended:
        toy.step = lambda text: None
    over = Sampler(llm, 3).sample(questions(family), 2, 8, environments=ended)
    assert torch.equal(over.completion_ids, plain.completion_ids) and torch.equal(
        over.sampler_logps, plain.sampler_logps
    )
    assert torch.equal(over.sampled_mask, over.completion_mask) and over.texts == plain.texts


@pytest.mark.parametrize("family", PICTURES)
def test_row_is_independent_of_its_neighbours(load, family, monkeypatch):
    """Of those that leave, are cut off, or read longer observations. The same holds when every prompt is read again
    with its conversation, as for models with a sliding window."""
    llm = load(family)
    together = play(llm, family, 2, temperature=0, length=12)
    assert len({len(episode.turns) for episode in together.episodes}) > 1 and not together.finished.all()
    for row in range(6):
        alone = Sampler(llm).sample([questions(family)[row // 2]], 1, 12, 0, environments=[toys(family, 2)[row]])
        length = int(alone.completion_mask.sum())
        assert together.completion_ids[row][together.completion_mask[row]].tolist() == alone.completion_ids[0].tolist()
        torch.testing.assert_close(alone.sampler_logps[0], together.sampler_logps[row, :length], atol=2e-5, rtol=1e-5)
    monkeypatch.setattr(rollout_module, "has_sliding_window", lambda cache: True)
    again = play(llm, family, 2, temperature=0, length=12)
    assert torch.equal(again.completion_ids, together.completion_ids)


def test_cut_turn_ends_the_episode(load):
    llm = load("qwen2", "float32")
    environments = toys("qwen2", 6)
    rollout = play(llm, "qwen2", 6, length=4, environments=environments)
    assert not rollout.finished.all() and rollout.finished.any()
    for toy, episode, finished in zip(environments, rollout.episodes, rollout.finished, strict=True):
        # the environment reads every turn but one that was cut off or is the last of those allowed
        assert len(toy.heard) == len(episode.turns) - (not finished or len(episode.turns) == 3)
        assert episode.turns[-1].observation is None


def test_conversation_that_does_not_fit_names_its_example(load):
    llm = load("qwen2", "float32")
    example = question("How many eggs?")
    llm.model.config.max_position_embeddings = 60
    sampler = Sampler(llm)
    with pytest.raises(EpisodeError, match=r"the example question has .* tokens after turn 1"):
        sampler.sample([example], 8, 20, environments=[Toy(example, row, longer=9) for row in range(8)])


class Broken(Environment):
    max_turns = 2

    def step(self, text):
        raise KeyError("no such cell")


def test_failing_environment_names_example_and_turn(load):
    llm = load("qwen2", "float32")
    with pytest.raises(EpisodeError, match=r"the example question, turn 1, .*no such cell"):
        Sampler(llm).sample(questions("qwen2"), 4, 20, environments=[Broken(q) for q in questions("qwen2") * 4])


def test_observations_earn_nothing_and_are_not_counted(load):
    """A right answer inside an observation is not scored, and a longer observation changes no length."""
    llm = load("qwen2", "float32")
    right = asked_format("I see.", "72")

    class Tells(Environment):
        max_turns = 2

        def step(self, text):
            return Observation(right * 3)

    examples = [dataclasses.replace(one, answer="72") for one in questions("qwen2")]
    rollout = play(llm, "qwen2", 4, environments=[Tells(one) for one in examples for _ in range(4)])
    assert any(len(episode.turns) == 2 for episode in rollout.episodes)
    batch, metrics = score(examples, rollout, get_evaluator("gsm8k"))
    assert metrics["accuracy"] == 0 and (batch.rewards.sum(1) < 1).all()
    record, turns = batch.record(get_evaluator("gsm8k").reward_names), [t for e in rollout.episodes for t in e.turns]
    assert record["tokens"] == sum(turn.length for turn in turns) < int(rollout.completion_mask.sum())
    assert record["completion_length"] == pytest.approx(record["tokens"] / 12) and record["turns"] == len(turns) / 12
    told = encode_observations(llm, [Observation(right * 3)])[0][0]
    assert record["observation_tokens"] == (len(turns) - 12) * len(told) / 12
    config = small_config("--objective dr_grpo --max_turns 2 --max_completion_length 20")
    assert main.loss_divisor(config.objective, rollout.sampled_mask, config.max_episode_length) == 12 * 2 * 20
    tokens = small_config("--objective bnpo")
    assert main.loss_divisor(tokens.objective, rollout.sampled_mask, 0) == record["tokens"]


@pytest.mark.parametrize("family", PICTURES)
def test_groups_are_chosen_and_joined_with_their_turns(load, family):
    """As dynamic sampling does; some parts have pictures in observations and others have none."""
    llm = load(family)
    whole = play(llm, family, 3)
    without = Sampler(llm, 5).sample(
        questions(family), 3, 30, environments=[Toy(q) for q in questions(family) for _ in "abc"]
    )
    assert whole.vision and not without.vision
    joined = Rollout.cat([whole.select([2]), without.select([1]), whole.select([0, 1])])
    with torch.no_grad():
        found, parts = token_logps(llm, joined), [token_logps(llm, one) for one in (whole, without)]
    rows = [(0, r) for r in (6, 7, 8)] + [(1, r) for r in (3, 4, 5)] + [(0, r) for r in range(6)]
    for row, (part, source) in enumerate(rows):
        expected, length = (whole, without)[part], min(found.shape[1], parts[part].shape[1])
        torch.testing.assert_close(found[row, :length], parts[part][source, :length], atol=1e-5, rtol=1e-5)
        assert joined.episodes[row] is expected.episodes[source] and joined.texts[row] == expected.texts[source]


def test_earlier_turns_are_read_but_only_the_last_counts():
    evaluator = get_evaluator("gsm8k")
    first, last = asked_format("a", "72"), asked_format("b", "71")
    completion = evaluator.parse_episode([first, last])
    assert completion.prediction == "71" and [one.prediction for one in completion.earlier] == ["72"]
    assert evaluator.score_episode([first, last], "72")["correctness"] == 0
    assert evaluator.score_episode([last, first], "72") == evaluator.score(first, "72")


def test_sample_records_keep_turns_and_pictures(load, tmp_path):
    """A picture that two rows were shown is saved once."""
    llm = load("qwen2_vl", "float32")
    rollout = play(llm, "qwen2_vl", 6)
    batch, _ = score(
        [dataclasses.replace(one, answer="72") for one in questions("qwen2_vl")], rollout, get_evaluator("gsm8k")
    )
    groups = batch.readable(get_evaluator("gsm8k"))
    from run_folder import RunFolder

    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder._write_groups(folder.path / "train_samples" / "step_000001.json", 1, groups)
    kept = [
        one for group in read(folder.path / "train_samples/step_000001.json")["groups"] for one in group["completions"]
    ]
    pictures = set()
    for completion, episode in zip(kept, rollout.episodes, strict=True):
        assert ("turns" in completion) == (len(episode.turns) > 1)
        for turn, expected in zip(completion.get("turns", ()), episode.turns, strict=False):
            assert (turn["text"], turn["length"]) == (expected.text, expected.length)
            if expected.observation is not None:
                assert turn["observation"]["text"] == expected.observation.text
                assert len(turn["observation"]["images"]) == len(expected.observation.images)
                pictures |= {image.tobytes() for image in expected.observation.images}
    saved = list((folder.path / "train_samples/images").glob("observation-*.png"))
    assert 1 < len(saved) == len(pictures)


CALCULATOR = "--dataset_options steps=1 calculator=true --max_completion_length 8 --objective dapo --num_iterations 2"
CALCULATOR += " --beta 0.01"


@pytest.mark.slow
def test_run_with_turns_resumes_exactly(small_run):
    """In evaluations with further samples, with replaced groups, a reference and two updates for each batch."""
    whole = small_run("arithmetic", CALCULATOR, "--max_steps 6 --eval_samples 2", name="whole")
    small_run("arithmetic", CALCULATOR, "--max_steps 4 --eval_samples 2", name="parts")
    parts = small_run("arithmetic", CALCULATOR, "--max_steps 6 --eval_samples 2 --resume", name="parts")
    assert records(parts) == records(whole) and evaluations(parts) == evaluations(whole)
    assert read(whole / "config.json")["flags"]["max_turns"] == 4 and all("turns" in one for one in records(whole))
    one = small_run("arithmetic", CALCULATOR, "--max_turns 1 --max_steps 2", name="one")
    assert "turns" not in records(one)[0] and read(one / "config.json")["flags"]["max_turns"] == 1


def test_conversations_too_long_for_the_model_are_refused(load):
    llm = load("qwen2", "float32")
    data = get_dataset("arithmetic", "test", 4, calculator=True)
    fits = small_config("--max_prompt_length 256 --max_completion_length 60")
    refuse_unfit_model(fits, llm, data, data)
    with pytest.raises(ModelError, match="4 turns"):
        refuse_unfit_model(small_config("--max_prompt_length 256 --max_completion_length 70"), llm, data, data)
