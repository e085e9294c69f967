"""Contracts 1, 2, 3, 4 and 6 of docs/contracts.md, with random shapes and texts drawn by hypothesis.

1. The sampler's log-probabilities equal the trainer's.
2. A step's gradient does not depend on its division into micro-batches, on padding, or on the order of its rows.
3. The end-of-sequence token is trained, tokens after it are not; the id of the pad token decides nothing.
4. Tokens are sampled from softmax(logits / temperature), without the placeholders of pictures.
6. Evaluating changes nothing in training.

Also: each completion is scored with the answer of its own prompt, also after groups were replaced.
"""

import dataclasses
import itertools
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from plain_reference import PlainRows, compute_in_float64, plain_loss
from small_models import cut, picture, question, questions, small_config

from batch import Batch
from config import OBJECTIVES, Config
from evaluator import ExactNumberEvaluator, get_evaluator
from llms import LLM, load_llm
from logprobs import token_logps
from main import accumulate_gradients, evaluate, group_advantages, replace_equal_groups, sample_and_score
from prompts import Prompts, encode_prompts
from rldatasets import Example, get_dataset
from rollout import Decoder, FusedDecoder, Rollout, Sampler
from run import Run

# gpt2 learns its positions: rotary positions would hide a prompt that its padding has shifted.
FAMILIES = ("qwen2", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("qwen2_vl", marks=pytest.mark.slow))
LONGEST = 24
ORDINARY = 30  # the id of a token that does not end a completion

# The same examples in every run, so that failures are reproducible. They are small and need no shrinking.
thorough = settings(
    derandomize=True, deadline=None, database=None, max_examples=12, phases=(Phase.explicit, Phase.generate)
)
briefly = settings(thorough, max_examples=4)


@pytest.fixture(scope="module")
def models(model_folder):
    """-> a function from a family to its model in float64; each call returns a new LLM with the same weights."""
    loaded = {}

    def model(family: str, **changes) -> LLM:
        if family not in loaded:
            loaded[family] = load_llm(model_folder("qwen2" if family == "gpt2" else family), "cpu", "float64")
            if family == "gpt2":
                loaded[family].model = learned_positions(loaded[family].tokenizer)
        return dataclasses.replace(loaded[family], **changes)

    with pytest.MonkeyPatch.context() as patch:
        compute_in_float64(patch)
        yield model


def learned_positions(tokenizer):
    """A random GPT-2 in float64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": len(tokenizer) + 5, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
    sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, initializer_range=0.3, attn_implementation="sdpa"))
    return model.double().eval()


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@dataclasses.dataclass(frozen=True)
class Shape:
    """words: of each of Q prompts; for vision, prompt i shows words[i] % 3 pictures. lengths, finished: of B rows."""

    words: tuple[int, ...]
    generations: int
    lengths: tuple[int, ...]
    finished: tuple[bool, ...]
    pad_is_end: bool = True
    seed: int = 0

    def examples(self, family) -> list[Example]:
        sizes = ((32, 32), (64, 32), (32, 48))
        return [
            question(
                "How many " + "eggs " * n + "?",
                *(picture(*sizes[(n + i) % 3], seed=n + i) for i in range(n % 3 if family == "qwen2_vl" else 0)),
            )
            for n in self.words
        ]

    def llm(self, models, family) -> LLM:
        """The pad token is the end-of-sequence token, or a token that occurs in completions."""
        return models(family, pad_token_id=0 if self.pad_is_end else ORDINARY)

    def rollout(self, llm: LLM, family: str) -> Rollout:
        """Completions of random tokens, the pad token among them; only finished ones end with an end token."""
        generator = torch.Generator().manual_seed(self.seed)
        lengths, finished = torch.tensor(self.lengths), torch.tensor(self.finished)
        shape = (len(lengths), int(lengths.max()))
        vocabulary = torch.tensor([i for i in range(300) if i not in (*llm.eos_token_ids, *llm.excluded_token_ids)])
        ids = vocabulary[torch.randint(len(vocabulary), shape, generator=generator)]
        ids[torch.rand(shape, generator=generator) < 0.2] = ORDINARY
        ids[finished, lengths[finished] - 1] = 0
        mask = torch.arange(shape[1]) < lengths[:, None]
        ids[~mask] = llm.pad_token_id
        prompts = encode_prompts(llm, self.examples(family))
        logps = torch.zeros(shape, dtype=torch.float64)
        return Rollout(prompts, ids, mask, logps, finished, [""] * len(ids), self.generations)


@st.composite
def shapes(draw) -> Shape:
    words = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    generations = draw(st.integers(2, 4))
    rows = len(words) * generations
    lengths = draw(st.lists(st.integers(1, 8), min_size=rows, max_size=rows))
    finished = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    seed = draw(st.integers(0, 1000))
    return Shape(tuple(words), generations, tuple(lengths), tuple(finished), draw(st.booleans()), seed)


EMPTY = Shape((2, 5), 3, (1,) * 6, (True,) * 6)  # each completion is only an end token
ONE_LONG = Shape((4, 0, 1), 2, (1, 1, 2, LONGEST, 1, 1), (True, True, True, False, True, True))
PAIR = Shape((3,), 2, (5, 2), (True, False), pad_is_end=False)


def edge_cases(**more):
    """Adds each of the shapes above to the random ones."""

    def decorate(test):
        for shape in (EMPTY, ONE_LONG, PAIR):
            test = example(shape=shape, **more)(test)
        return test

    return decorate


def config_of(name: str, temperature: float = 0.8) -> Config:
    return small_config(f"--objective {name} --temperature {temperature} --max_completion_length {LONGEST}")


@dataclasses.dataclass
class Step:
    """Arguments of `accumulate_gradients`, off policy and with a reference."""

    rollout: Rollout
    advantages: torch.Tensor
    old_logps: torch.Tensor
    ref_logps: torch.Tensor

    def gradient(self, llm: LLM, config: Config, micro_batches: list[list[int]] | None = None) -> torch.Tensor:
        """The loss, its statistics and the gradient of all weights, in one vector. By default in one micro-batch."""
        rollout = cut(self.rollout, micro_batches or [list(range(len(self.advantages)))])
        llm.model.zero_grad()
        loss, stats, _ = accumulate_gradients(
            config, llm, rollout, self.advantages, rollout.sampled_mask, self.old_logps, self.ref_logps
        )
        numbers = [loss.view(1), torch.tensor(list(stats.values()), dtype=torch.float64)]
        return torch.cat([*numbers, flat_gradient(llm.model)])


def make_step(shape: Shape, llm: LLM, family: str, name: str) -> Step:
    rollout = shape.rollout(llm, family)
    generator = torch.Generator().manual_seed(shape.seed)
    with torch.no_grad():
        logps = token_logps(llm, rollout, 0.8)
    mask = rollout.completion_mask
    old, ref = (
        logps + size * torch.randn(logps.shape, generator=generator, dtype=torch.float64) * mask
        for size in (1e-3 if name == "gspo" else 0.3, 0.3)
    )
    rewards = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    return Step(rollout, group_advantages(rewards, shape.generations), old, ref)


def flat_gradient(model) -> torch.Tensor:
    """The gradients of all weights in one vector; 0 for a vision tower that saw no picture."""
    weights = list(model.parameters())
    return torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights])


def assert_same(one: torch.Tensor, other: torch.Tensor):
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Contract 1: the sampler's log-probabilities equal the trainer's

ENDS = {"never": (299,), "now and then": tuple(range(0, 300, 12)), "mostly": tuple(range(0, 300, 2)), "at once": None}


@pytest.mark.parametrize("family", FAMILIES)
@thorough
@given(
    words=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    generations=st.integers(2, 6),
    longest=st.integers(1, 12),
    temperature=st.floats(0.3, 3),
    ends=st.sampled_from(list(ENDS)),
)
@example(words=[5, 0], generations=2, longest=8, temperature=1.0, ends="at once")
@example(words=[5, 0, 3], generations=8, longest=12, temperature=0.7, ends="mostly")
def test_sampler_and_trainer_agree(models, family, words, generations, longest, temperature, ends):
    llm, config = models(family), config_of("bnpo", temperature)
    llm.eos_token_ids = ENDS[ends] or tuple(range(llm.model.get_output_embeddings().weight.shape[0]))
    examples = Shape(tuple(words), generations, (), ()).examples(family)
    sampler = Sampler(llm, longest)
    rollout = sampler.sample(examples, generations, longest, temperature)
    assert type(sampler.decoder) is (Decoder if family == "gpt2" else FusedDecoder)

    # Contract 3: a completion ends with its first end token, or at the allowed length without one.
    is_end = torch.isin(rollout.completion_ids, torch.tensor(llm.eos_token_ids)) & rollout.completion_mask
    lengths = rollout.lengths
    assert torch.equal(rollout.completion_mask, torch.arange(rollout.completion_ids.shape[1]) < lengths[:, None])
    assert (is_end.sum(1) == rollout.finished).all() and (lengths >= 1).all()
    assert is_end.gather(1, lengths[:, None] - 1)[:, 0].equal(rollout.finished)
    assert (lengths[~rollout.finished] == longest).all()
    if ends == "at once":
        assert rollout.finished.all() and (lengths == 1).all()

    # Contract 1: equal numbers, so the ratio is 1 before the first update.
    advantages, mask = torch.ones(len(rollout.texts)), rollout.sampled_mask
    sampler_logps, rollout.sampler_logps = rollout.sampler_logps, rollout.sampler_logps.double()
    loss, stats, logps = accumulate_gradients(config, llm, rollout, advantages, mask, None, None)
    torch.testing.assert_close(sampler_logps, logps.float(), atol=2e-5, rtol=1e-5)
    assert stats["ratio"] == pytest.approx(1, abs=1e-6) and stats["clip_fraction"] == 0
    assert stats["sampler_logp_diff"] < 1e-5
    assert loss.item() == pytest.approx(-1, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Contract 2: the gradient depends neither on the micro-batches, nor on padding, nor on the order


@pytest.mark.parametrize("family", FAMILIES)
@thorough
@edge_cases(name="grpo")
@given(shape=shapes(), name=st.sampled_from(("grpo", "dr_grpo", "dapo", "gspo", "cispo")))
def test_gradient_matches_a_plain_implementation(models, family, shape, name):
    llm = shape.llm(models, family)
    step = make_step(shape, llm, family, name)
    mask = step.rollout.completion_mask
    plain = PlainRows(llm, step.rollout, shape.examples(family))
    rows = [[row[keep] for row, keep in zip(x, mask, strict=True)] for x in (step.old_logps, step.ref_logps)]
    llm.model.zero_grad()
    loss = plain_loss(name, plain.logps(llm.model, 0.8), *rows, step.advantages, LONGEST)
    loss.backward()
    expected = flat_gradient(llm.model)
    found = step.gradient(llm, config_of(name))
    assert_same(found[-len(expected) :], expected)
    assert_same(found[0], loss.detach())


@pytest.mark.parametrize("family", FAMILIES)
@thorough
@edge_cases(name="bnpo", order=0, cuts=[1], budget=1)
@given(
    shape=shapes(),
    name=st.sampled_from(list(OBJECTIVES)),
    order=st.integers(0, 1000),
    cuts=st.lists(st.integers(1, 11), max_size=5),
    budget=st.integers(1, 500),
)
def test_gradient_is_independent_of_micro_batches(models, family, shape, name, order, cuts, budget):
    llm, config = shape.llm(models, family), config_of(name)
    step = make_step(shape, llm, family, name)
    whole = step.gradient(llm, config)
    rows = torch.randperm(len(step.advantages), generator=torch.Generator().manual_seed(order)).tolist()
    borders = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    at_random = [rows[a:b] for a, b in itertools.pairwise(borders)]
    for micro_batches in (at_random, step.rollout.micro_batches(budget)):
        assert_same(step.gradient(llm, config, micro_batches), whole)
    config = dataclasses.replace(config, gradient_checkpointing=True)  # each row with its own copy of the prompt
    assert_same(step.gradient(llm, config, at_random), whole)


@pytest.mark.parametrize("family", FAMILIES)
@thorough
@edge_cases(left=3, right=4)
@given(shape=shapes(), left=st.integers(0, 5), right=st.integers(0, 5))
def test_gradient_is_independent_of_padding(models, family, shape, left, right):
    """With more padding, of random ids, the gradient is the same; so are the log-probabilities of each prompt alone,
    without padding."""
    llm, config = shape.llm(models, family), config_of("dr_grpo")
    step = make_step(shape, llm, family, "dr_grpo")
    rollout, prompts = step.rollout, step.rollout.prompts
    generator = torch.Generator().manual_seed(right)

    def scribble(ids, mask):
        return torch.where(mask, ids, torch.randint(10, 200, ids.shape, generator=generator))

    mask = F.pad(rollout.completion_mask, (0, right))
    padded = dataclasses.replace(
        rollout,
        prompts=Prompts(
            scribble(F.pad(prompts.ids, (left, 0)), F.pad(prompts.mask, (left, 0))),
            F.pad(prompts.mask, (left, 0)),
            F.pad(prompts.positions, (left, 0)),
            prompts.vision,
        ),
        completion_ids=scribble(F.pad(rollout.completion_ids, (0, right)), mask),
        completion_mask=mask,
        sampler_logps=F.pad(rollout.sampler_logps, (0, right)),
    )
    old_logps, ref_logps = (F.pad(x, (0, right)) for x in (step.old_logps, step.ref_logps))
    wider = Step(padded, step.advantages, old_logps, ref_logps)
    assert_same(wider.gradient(llm, config), step.gradient(llm, config))

    with torch.no_grad():
        together = token_logps(llm, rollout, 0.8)
        G = shape.generations
        for q, one in enumerate(shape.examples(family)):
            rows = slice(q * G, (q + 1) * G)
            alone = Rollout(
                encode_prompts(llm, [one]),
                rollout.completion_ids[rows],
                rollout.completion_mask[rows],
                rollout.sampler_logps[rows],
                rollout.finished[rows],
                [""] * G,
                G,
            )
            assert_same(token_logps(llm, alone, 0.8), together[rows])


@pytest.mark.parametrize("family", FAMILIES)
@thorough
@edge_cases(name="cispo", order=1)
@given(shape=shapes(), name=st.sampled_from(list(OBJECTIVES)), order=st.integers(0, 1000))
def test_gradient_is_independent_of_row_order(models, family, shape, name, order):
    """With the groups in another order, and the completions of each group."""
    llm, config = shape.llm(models, family), config_of(name)
    step = make_step(shape, llm, family, name)
    generator = torch.Generator().manual_seed(order)
    groups = torch.randperm(len(shape.words), generator=generator).tolist()
    G, rollout = shape.generations, step.rollout
    rows = [q * G + i for q in groups for i in torch.randperm(G, generator=generator).tolist()]
    shuffled = Rollout(
        rollout.prompts.select(groups),
        rollout.completion_ids[rows],
        rollout.completion_mask[rows],
        rollout.sampler_logps[rows],
        rollout.finished[rows],
        rollout.texts,
        G,
    )
    other = Step(shuffled, step.advantages[rows], step.old_logps[rows], step.ref_logps[rows])
    assert_same(other.gradient(llm, config), step.gradient(llm, config))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_groups_of_equal_rewards_have_no_gradient(models, name):
    """The gradient is exactly 0 without a KL penalty."""
    llm, config = models("qwen2"), config_of(name)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, beta=0.0))
    step = make_step(ONE_LONG, llm, "qwen2", name)
    advantages = group_advantages(torch.tensor([0.1] * 4 + [2.7] * 2, dtype=torch.float64), 2)
    llm.model.zero_grad()
    mask = step.rollout.sampled_mask
    loss, _, _ = accumulate_gradients(config, llm, step.rollout, advantages, mask, step.old_logps, None)
    assert loss == 0 and not any(weight.grad.any() for weight in llm.model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Contract 3: the end token is trained, tokens after it are not


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_completions_train_the_end_token(models, family):
    """All completions are only an end token: the one with an advantage makes it likelier, in the first update."""
    llm, config = EMPTY.llm(models, family), config_of("grpo")
    rollout = EMPTY.rollout(llm, family)
    advantages = torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    before = token_logps(llm, rollout, 0.8)
    expected = torch.autograd.grad(-before[0, 0] / 6, list(llm.model.parameters()))
    llm.model.zero_grad()
    accumulate_gradients(config, llm, rollout, advantages, rollout.sampled_mask, None, None)
    assert (rollout.completion_ids == 0).all() and rollout.completion_ids.shape == (6, 1)
    for weight, gradient in zip(llm.model.parameters(), expected, strict=True):
        assert_same(weight.grad, gradient)
    assert max(gradient.abs().max() for gradient in expected) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@thorough
@edge_cases()
@given(shape=shapes())
def test_the_last_token_is_trained(models, family, shape):
    """The end token, or the last token of a cut-off completion: its gradient is part of the gradient of the loss."""
    llm, config = shape.llm(models, family), config_of("dr_grpo")
    rollout = shape.rollout(llm, family)
    advantages = torch.zeros(len(shape.lengths), dtype=torch.float64)
    advantages[0] = 1
    mask = rollout.sampled_mask
    gradients = []
    for counted in (mask, mask.scatter(1, mask.sum(1, keepdim=True) - 1, False)):  # with the last tokens and without
        llm.model.zero_grad()
        accumulate_gradients(config, llm, rollout, advantages, counted, None, None)
        gradients.append(flat_gradient(llm.model))
    last = token_logps(llm, rollout, 0.8)[0, shape.lengths[0] - 1]
    llm.model.zero_grad()
    (-last / (len(advantages) * LONGEST)).backward()
    assert_same(gradients[0] - gradients[1], flat_gradient(llm.model))
    assert flat_gradient(llm.model).abs().max() > 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Contract 4: tokens are sampled from softmax(logits / temperature)


@pytest.mark.parametrize("family", FAMILIES)
@thorough
@given(words=st.integers(0, 9), temperature=st.floats(0.3, 3), length=st.integers(1, 3))
def test_probabilities_of_all_tokens_add_up_to_one(models, family, words, temperature, length):
    """Summed over every possible next token: placeholders have probability 0, all others together 1."""
    llm = models(family)
    size = llm.model.get_output_embeddings().weight.shape[0]
    ids = torch.full((size, length), ORDINARY)
    ids[:, -1] = torch.arange(size)
    prompts = encode_prompts(llm, Shape((words,), 2, (), ()).examples(family))
    mask, zeros = torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape)
    with torch.no_grad():
        logps = token_logps(llm, Rollout(prompts, ids, mask, zeros, mask[:, 0], [], size), temperature)[:, -1]
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-9)
    assert (logps == -torch.inf).nonzero()[:, 0].tolist() == list(llm.excluded_token_ids)


@pytest.mark.parametrize("family", FAMILIES)
@briefly
@given(words=st.integers(0, 9), temperature=st.floats(0.3, 3))
def test_sampled_tokens_have_the_models_distribution(models, family, words, temperature):
    """The frequencies of 3,000 samples. The models' generation configs have a top-k, a top-p, a temperature and a
    repetition penalty."""
    llm, rows = models(family), 3000
    assert family == "gpt2" or llm.model.generation_config.repetition_penalty > 1
    examples = Shape((words,), 2, (), ()).examples(family)
    rollout = Sampler(llm, words).sample(examples, rows, 1, temperature)
    size = llm.model.get_output_embeddings().weight.shape[0]
    ids = torch.arange(size)[:, None]
    mask, zeros = torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape)
    with torch.no_grad():
        logps = token_logps(llm, Rollout(rollout.prompts, ids, mask, zeros, mask[:, 0], [], size), temperature)
    expected, found = rows * logps[:, 0].exp(), rollout.completion_ids[:, 0].bincount(minlength=size)
    often = expected >= 5  # rare tokens are counted together
    expected = torch.cat([expected[often], expected[~often].sum().clamp(min=1e-9)[None]])
    found = torch.cat([found[often], found[~often].sum()[None]])
    statistic, freedom = ((found - expected).square() / expected.clamp(min=1)).sum(), len(expected) - 1
    assert freedom >= 2 and statistic < freedom + 6 * (2 * freedom) ** 0.5 + 6
    assert not torch.isin(rollout.completion_ids, torch.tensor(llm.excluded_token_ids)).any()


# ---------------------------------------------------------------------------------------------------------------------
# From the sampler to the loss: rows stay with their prompts


class CountingLoader:
    """An endless loader whose prompts count up; every third has an answer for which all rewards are equal."""

    def __init__(self, llm: LLM, prompts_per_step: int, dull_until: int = 0):
        self.llm, self.prompts_per_step, self.dull_until = llm, prompts_per_step, dull_until
        self.handed_out: list[Example] = []
        self.dataset = get_dataset("arithmetic", "train", 1)  # for its environments: the single turn

    def __next__(self) -> tuple[list[Example], Prompts]:
        first = len(self.handed_out)
        examples = [self.example(n) for n in range(first, first + self.prompts_per_step)]
        self.handed_out += examples
        return examples, encode_prompts(self.llm, examples)

    def example(self, n: int) -> Example:
        answer = "dull" if n % 3 == 0 or n < self.dull_until else str(n)
        return Example(f"q-{n}", [{"role": "user", "content": f"{n} " * (1 + n % 4)}], [], answer)


class PairEvaluator(ExactNumberEvaluator):
    """Rewards that show which completion was scored with which answer."""

    components: ClassVar = {"pair": 1.0, "number": 1.0}

    def metrics(self, completions, answers):
        return {"dull_fraction": answers.count("dull") / len(answers)}

    def score(self, completion, answer) -> dict[str, float]:
        if answer == "dull":
            return {"pair": 1.0, "number": 0.0}
        return {"pair": float(sum(map(ord, self.parse(completion).text)) % 97), "number": 1000.0 * int(answer)}


@dataclasses.dataclass
class Collected:
    """A batch of 4 groups of 3 completions as the loop collects it, and all that was sampled for it."""

    batch: Batch
    record: dict[str, float]
    changes: dict[str, float]
    first: Batch
    rollouts: list[Rollout]
    loader: CountingLoader


@pytest.fixture
def collect(models, tmp_path, monkeypatch):
    """-> a function that samples, scores and, with dynamic sampling, replaces groups of equal rewards."""
    rollouts, sample = [], Sampler.sample

    def listen(*args, **more):
        rollouts.append(sample(*args, **more))
        return rollouts[-1]

    monkeypatch.setattr(Sampler, "sample", listen)

    def collect(*flags: str, dull_until: int = 0) -> Collected:
        config = small_config(
            f"--prompts_per_step 4 --num_generations 3 --max_completion_length 8 --output_dir {tmp_path}/run", *flags
        )
        llm, evaluator = models("qwen2"), PairEvaluator()
        parts = Sampler(llm), CountingLoader(llm, 4, dull_until), evaluator, Run(config, evaluator)
        first, record = sample_and_score(config, *parts)
        batch, changes = first, {}
        if config.objective.dynamic_sampling:
            batch, changes = replace_equal_groups(config, first, *parts)
        return Collected(batch, record, changes, first, rollouts, parts[1])

    return collect


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_completions_are_scored_with_their_own_answers(models, collect, name):
    """`grpo` keeps what it sampled; `dapo` replaces groups whose rewards are all equal by groups of further prompts."""
    llm, batch = models("qwen2"), collect(f"--objective {name} --temperature 0.8").batch
    rollout = batch.rollout
    assert len(batch.examples) == 4 and len({one.id for one in batch.examples}) == 4
    assert len(rollout.texts) == 12 and rollout.prompt_of_row == [i // 3 for i in range(12)]
    answers = [one.answer for one in batch.examples]
    assert ("dull" in answers) == (name == "grpo")
    for row, text in enumerate(rollout.texts):
        ids = rollout.completion_ids[row][rollout.completion_mask[row]]
        ids = ids[:-1] if rollout.finished[row] else ids  # without the end token
        assert llm.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert batch.completions[row].text == text
        assert batch.rewards[row].tolist() == list(PairEvaluator().score(text, answers[row // 3]).values())
    for q, one in enumerate(batch.examples):
        prompt = rollout.prompt_ids[q][rollout.prompt_mask[q]]
        assert torch.equal(prompt, encode_prompts(llm, [one]).ids[0])
    with torch.no_grad():  # after rounds of different widths were joined, each row still follows its own prompt
        logps = token_logps(llm, rollout, 0.8).float()
    torch.testing.assert_close(logps, rollout.sampler_logps, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("dull_until", "rounds", "replaced"), [(0, 1, 2), (4, 2, 4), (7, 2, 4), (100, 3, 4)])
def test_replaced_groups_have_columns_for_themselves(collect, dull_until, rounds, replaced):
    """Prompts 0, 3, 6, … and those below `dull_until` have groups of equal rewards; 4 varied groups are wanted, within
    at most 3 further rounds. All columns describe the first samples, four new ones the replacement."""
    found = collect("--objective dapo --overlong_buffer 0.5", dull_until=dull_until)
    first, batch = found.first.rollout, found.batch
    assert found.first.examples == found.loader.handed_out[:4] and first is found.rollouts[0]
    assert len(found.rollouts) == 1 + rounds

    lengths, totals = first.lengths.float(), found.first.rewards.sum(1)
    assert found.record == {
        "reward": pytest.approx(totals.mean().item()),
        "reward_std": pytest.approx(totals.view(4, 3).std(1).mean().item()),
        "rewards/pair": pytest.approx(found.first.rewards[:, 0].mean().item()),
        "rewards/number": pytest.approx(found.first.rewards[:, 1].mean().item()),
        "completion_length": pytest.approx(lengths.mean().item()),
        "truncated_fraction": pytest.approx(1 - first.finished.float().mean().item()),
        "zero_std_fraction": replaced / 4,
        "tokens": lengths.sum().item(),
        "dull_fraction": replaced / 4,
        "overlong_penalty": pytest.approx(-((lengths - 4) / 4).clamp(0, 1).mean().item()),
    }
    assert found.changes == {
        "replaced_fraction": replaced / 4,
        "resampled_tokens": sum(int(rollout.lengths.sum()) for rollout in found.rollouts[1:]),
        "trained/reward": pytest.approx(batch.rewards.sum(1).mean().item()),
        "trained/completion_length": pytest.approx(batch.rollout.lengths.float().mean().item()),
    }
    varied = [one.id for one in found.loader.handed_out if one.answer != "dull"][:4]
    equal = [one.id for one in found.loader.handed_out[-4:] if one.answer == "dull"]  # they fill up the last round
    assert [one.id for one in batch.examples] == (varied + equal)[:4]


# ---------------------------------------------------------------------------------------------------------------------
# Contract 6: evaluating changes nothing in training


def test_evaluations_reuse_the_sampler_unchanged(models, monkeypatch):
    """With --eval_samples each evaluation once had its own generator, for which a GPU captured new graphs and kept
    them. Now all of them use the sampler of training, draw the same samples, and leave its random state unchanged."""
    llm, config = models("qwen2"), small_config("--eval_samples 3 --eval_batch_size 2 --max_completion_length 16")
    test_set, evaluator = get_dataset("arithmetic", "test", 3), get_evaluator("arithmetic")
    sampler, undisturbed = Sampler(llm, 7), Sampler(llm, 7)
    drawn, sampling_metrics = [], evaluator.sampling_metrics

    def listen(completions, answers, samples):
        drawn.append([[one.text for one in row] for row in samples])
        return sampling_metrics(completions, answers, samples)

    monkeypatch.setattr(evaluator, "sampling_metrics", listen)
    generator, decoders, evaluations = sampler.generator, [], []
    for _ in range(3):
        one, other = (each.sample(questions("qwen2"), 4, 8, 1.0) for each in (sampler, undisturbed))
        assert one.texts == other.texts and torch.equal(one.sampler_logps, other.sampler_logps)
        metrics, groups = evaluate(config, sampler, test_set, evaluator)
        evaluations.append(({name: value for name, value in metrics.items() if name != "seconds"}, groups))
        decoders.append(sampler.decoder)
        assert sampler.generator is generator and torch.equal(generator.get_state(), undisturbed.generator.get_state())
    assert decoders[1] is decoders[0] and decoders[2] is decoders[0]  # made larger by the first evaluation
    assert evaluations[1] == evaluations[0] and evaluations[2] == evaluations[0]
    assert drawn[1] == drawn[0] and drawn[2] == drawn[0]
    assert [len(set(row)) > 1 for row in drawn[0]] == [True] * 3  # 3 questions, with 3 different samples each
