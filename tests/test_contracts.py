"""What the sampler and the loss promise each other, under shapes that nobody would think of writing down.

1. The sampler's log-probabilities are the trainer's.
2. A step's gradient does not depend on its cut into micro-batches, on padding, or on the order of its rows.
3. The end-of-sequence token is trained, what comes after it is not; the pad token's id means nothing.
4. What is sampled is softmax(logits / temperature), of all tokens but the placeholders of pictures.
"""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from plain_reference import PlainRows, compute_in_float64, plain_loss
from small_models import picture, question

import main
from llms import LLM, Prompts, encode_prompts, load_llm, token_logps
from main import OBJECTIVES, group_advantages
from rldatasets import Example
from rollout import Decoder, LeanDecoder, Rollout, sample

# gpt2 learns its positions: with rotary ones, a prompt moved along by its padding would look the same.
FAMILIES = ("qwen2", "gpt2", "qwen2_vl")
LONGEST = 24
ORDINARY = 30  # the id of some token

# The same examples in every run: what fails fails for everybody. They are small as they are and need no shrinking.
thorough = settings(
    derandomize=True, deadline=None, database=None, max_examples=12, phases=(Phase.explicit, Phase.generate)
)
briefly = settings(thorough, max_examples=4)


@pytest.fixture(scope="module")
def models(model_folder):
    """-> a function from a family to its model in float64; each call gives another LLM around the same weights."""
    loaded = {}

    def model(family: str, **changes) -> LLM:
        if family not in loaded:
            loaded[family] = load_llm(model_folder("qwen2" if family == "gpt2" else family), "cpu", "float64")
            if family == "gpt2":
                loaded[family].model = learned_positions(loaded[family].tokenizer)
        return dataclasses.replace(loaded[family], decoder=None, **changes)

    with pytest.MonkeyPatch.context() as patch:
        compute_in_float64(patch)
        yield model


def learned_positions(tokenizer):
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
        """Padding is written with the end token, or with a token that occurs in completions."""
        return models(family, pad_token_id=0 if self.pad_is_end else ORDINARY)

    def rollout(self, llm: LLM, family: str) -> Rollout:
        """Completions of any tokens, the pad token's id among them, with an end only where one is finished."""
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


EMPTY = Shape((2, 5), 3, (1,) * 6, (True,) * 6)  # the end comes first in all of them
ONE_LONG = Shape((4, 0, 1), 2, (1, 1, 2, LONGEST, 1, 1), (True, True, True, False, True, True))
PAIR = Shape((3,), 2, (5, 2), (True, False), pad_is_end=False)


def edge_cases(**more):
    """Each of the shapes above, in every run."""

    def decorate(test):
        for shape in (EMPTY, ONE_LONG, PAIR):
            test = example(shape=shape, **more)(test)
        return test

    return decorate


def flags(name: str, temperature=0.8):
    command = f"--model_path small --dataset_name gsm8k --objective {name} --temperature {temperature} "
    return main.parse_args([*command.split(), "--max_completion_length", str(LONGEST)])


@dataclasses.dataclass
class Step:
    """What `accumulate_gradients` takes, off policy and with a reference."""

    rollout: Rollout
    advantages: torch.Tensor
    old_logps: torch.Tensor
    ref_logps: torch.Tensor

    def gradient(self, llm: LLM, args, plan=None) -> torch.Tensor:
        """The loss and the gradient of all weights, in one row of numbers."""
        plan = plan or [list(range(len(self.advantages)))]
        mask = self.rollout.completion_mask
        llm.model.zero_grad()
        loss, stats, _ = main.accumulate_gradients(
            llm, self.rollout, self.advantages, mask, self.old_logps, self.ref_logps, plan, args
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
    """Of all weights; a vision tower that saw no picture has none."""
    weights = list(model.parameters())
    return torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights])


def assert_same(one: torch.Tensor, other: torch.Tensor):
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# 1. The sampler's log-probabilities are the trainer's

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
    llm = models(family)
    llm.eos_token_ids = ENDS[ends] or tuple(range(llm.model.get_output_embeddings().weight.shape[0]))
    examples = Shape(tuple(words), generations, (), ()).examples(family)
    rollout = sample(llm, examples, generations, longest, temperature, torch.Generator().manual_seed(longest))
    assert type(llm.decoder) is (Decoder if family == "gpt2" else LeanDecoder)

    # Contract 3: a mask ends with the end token or with the room there was, and no end stands before it.
    is_end = torch.isin(rollout.completion_ids, torch.tensor(llm.eos_token_ids)) & rollout.completion_mask
    lengths = rollout.completion_mask.sum(1)
    assert torch.equal(rollout.completion_mask, torch.arange(rollout.completion_ids.shape[1]) < lengths[:, None])
    assert (is_end.sum(1) == rollout.finished).all() and (lengths >= 1).all()
    assert is_end.gather(1, lengths[:, None] - 1)[:, 0].equal(rollout.finished)
    assert (lengths[~rollout.finished] == longest).all()
    if ends == "at once":
        assert rollout.finished.all() and (lengths == 1).all()

    # Contract 1: both computed the same numbers, and so the ratio is 1 before the first update.
    args = flags("bnpo", temperature)
    plan = main.plan_of(rollout, args)
    advantages = torch.ones(len(rollout.texts))
    mask = rollout.completion_mask
    sampler_logps, rollout.sampler_logps = rollout.sampler_logps, rollout.sampler_logps.double()
    loss, stats, logps = main.accumulate_gradients(llm, rollout, advantages, mask, None, None, plan, args)
    torch.testing.assert_close(sampler_logps, logps.float(), atol=2e-5, rtol=1e-5)
    assert stats["ratio"] == pytest.approx(1, abs=1e-6) and stats["clip_fraction"] == 0
    assert stats["sampler_logp_diff"] < 1e-5
    assert loss.item() == pytest.approx(-1, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The gradient depends neither on the cut, nor on padding, nor on the order


@pytest.mark.parametrize("family", FAMILIES)
@thorough
@edge_cases(name="grpo")
@given(shape=shapes(), name=st.sampled_from(("grpo", "dr_grpo", "dapo", "gspo", "cispo")))
def test_gradient_is_that_of_a_plain_implementation(models, family, shape, name):
    llm = shape.llm(models, family)
    step = make_step(shape, llm, family, name)
    mask = step.rollout.completion_mask
    plain = PlainRows(llm, step.rollout, shape.examples(family))
    rows = [[row[keep] for row, keep in zip(x, mask, strict=True)] for x in (step.old_logps, step.ref_logps)]
    llm.model.zero_grad()
    loss = plain_loss(name, plain.logps(llm.model, 0.8), *rows, step.advantages, LONGEST)
    loss.backward()
    expected = flat_gradient(llm.model)
    found = step.gradient(llm, flags(name))
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
def test_gradient_does_not_depend_on_the_cut(models, family, shape, name, order, cuts, budget):
    llm, args = shape.llm(models, family), flags(name)
    step = make_step(shape, llm, family, name)
    whole = step.gradient(llm, args)
    rows = torch.randperm(len(step.advantages), generator=torch.Generator().manual_seed(order)).tolist()
    borders = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    at_random = [rows[a:b] for a, b in itertools.pairwise(borders)]
    args.micro_batch_tokens = budget
    for plan in (at_random, main.plan_of(step.rollout, args)):
        assert_same(step.gradient(llm, args, plan), whole)
    args.gradient_checkpointing = True  # each row with its own copy of the prompt
    assert_same(step.gradient(llm, args, at_random), whole)
    llm.model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@thorough
@edge_cases(left=3, right=4)
@given(shape=shapes(), left=st.integers(0, 5), right=st.integers(0, 5))
def test_gradient_does_not_depend_on_padding(models, family, shape, left, right):
    """More of it, and written with any ids; the log-probabilities of each prompt alone, with none, are the same too."""
    llm, args = shape.llm(models, family), flags("dr_grpo")
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
    assert_same(wider.gradient(llm, args), step.gradient(llm, args))

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
def test_gradient_does_not_depend_on_the_order(models, family, shape, name, order):
    """Groups in another order, and the completions of each."""
    llm, args = shape.llm(models, family), flags(name)
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
    assert_same(other.gradient(llm, args), step.gradient(llm, args))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_groups_of_equal_rewards_have_no_gradient(models, name):
    """Not a small one: none. What is left in a step with a penalty is the penalty."""
    llm, args = models("qwen2"), flags(name)
    step = make_step(ONE_LONG, llm, "qwen2", name)
    step.advantages = group_advantages(torch.tensor([0.1] * 4 + [2.7] * 2, dtype=torch.float64), 2)
    args.choices = dataclasses.replace(args.choices, beta=0.0)
    llm.model.zero_grad()
    loss, _, _ = main.accumulate_gradients(
        llm, step.rollout, step.advantages, step.rollout.completion_mask, step.old_logps, None, [list(range(6))], args
    )
    assert loss == 0 and not any(weight.grad.any() for weight in llm.model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# 3. The end is trained, what comes after it is not


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_completion_teaches_its_end(models, family):
    """Rows that are nothing but an end: the one with the advantage makes the end likelier, in the first update."""
    llm, args = EMPTY.llm(models, family), flags("grpo")
    rollout = EMPTY.rollout(llm, family)
    advantages = torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    before = token_logps(llm, rollout, 0.8)
    expected = torch.autograd.grad(-before[0, 0] / 6, list(llm.model.parameters()))
    llm.model.zero_grad()
    main.accumulate_gradients(llm, rollout, advantages, rollout.completion_mask, None, None, [list(range(6))], args)
    assert (rollout.completion_ids == 0).all() and rollout.completion_ids.shape == (6, 1)
    for weight, gradient in zip(llm.model.parameters(), expected, strict=True):
        assert_same(weight.grad, gradient)
    assert max(gradient.abs().max() for gradient in expected) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@thorough
@edge_cases()
@given(shape=shapes())
def test_the_end_is_trained(models, family, shape):
    """Of a single row with an advantage, the last token adds its own gradient to the loss's."""
    llm, args = shape.llm(models, family), flags("dr_grpo")
    rollout = shape.rollout(llm, family)
    advantages = torch.zeros(len(shape.lengths), dtype=torch.float64)
    advantages[0] = 1
    plan = [list(range(len(advantages)))]
    mask = rollout.completion_mask
    gradients = []
    for counted in (mask, mask.scatter(1, mask.sum(1, keepdim=True) - 1, False)):  # with the last tokens and without
        llm.model.zero_grad()
        main.accumulate_gradients(llm, rollout, advantages, counted, None, None, plan, args)
        gradients.append(flat_gradient(llm.model))
    last = token_logps(llm, rollout, 0.8)[0, shape.lengths[0] - 1]
    llm.model.zero_grad()
    (-last / (len(advantages) * LONGEST)).backward()
    assert_same(gradients[0] - gradients[1], flat_gradient(llm.model))
    assert flat_gradient(llm.model).abs().max() > 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# 4. What is sampled is the model's distribution


@pytest.mark.parametrize("family", FAMILIES)
@thorough
@given(words=st.integers(0, 9), temperature=st.floats(0.3, 3), length=st.integers(1, 3))
def test_probabilities_of_all_tokens_add_up_to_one(models, family, words, temperature, length):
    """Every next token is tried: together those that may be sampled have probability 1, placeholders have 0."""
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
    """Frequencies of 3,000 samples. The models ask for a top-k, a top-p, a temperature and a penalty on repeating the
    prompt's tokens."""
    llm, rows = models(family), 3000
    assert family == "gpt2" or llm.model.generation_config.repetition_penalty > 1
    examples = Shape((words,), 2, (), ()).examples(family)
    rollout = sample(llm, examples, rows, 1, temperature, torch.Generator().manual_seed(words))
    size = llm.model.get_output_embeddings().weight.shape[0]
    ids = torch.arange(size)[:, None]
    mask, zeros = torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape)
    with torch.no_grad():
        logps = token_logps(llm, Rollout(rollout.prompts, ids, mask, zeros, mask[:, 0], [], size), temperature)
    expected, found = rows * logps[:, 0].exp(), rollout.completion_ids[:, 0].bincount(minlength=size)
    often = expected >= 5  # the others are counted together
    expected = torch.cat([expected[often], expected[~often].sum().clamp(min=1e-9)[None]])
    found = torch.cat([found[often], found[~often].sum()[None]])
    statistic, freedom = ((found - expected).square() / expected.clamp(min=1)).sum(), len(expected) - 1
    assert freedom >= 2 and statistic < freedom + 6 * (2 * freedom) ** 0.5 + 6
    assert not torch.isin(rollout.completion_ids, torch.tensor(llm.excluded_token_ids)).any()


# ---------------------------------------------------------------------------------------------------------------------
# From the sampler to the loss: rows stay with their prompts


class Prompter:
    """An endless loader whose prompts count up; every third has an answer for which all rewards are equal."""

    def __init__(self, prompts_per_step):
        self.count, self.prompts_per_step, self.epoch = 0, prompts_per_step, 0.0

    def __next__(self):
        numbers = range(self.count, self.count + self.prompts_per_step)
        self.count += self.prompts_per_step
        return [
            Example(
                f"q-{n}", [{"role": "user", "content": f"{n} " * (1 + n % 4)}], [], "dull" if n % 3 == 0 else str(n)
            )
            for n in numbers
        ]

    def state_dict(self):
        return {"position": self.count, "skipped": 0}


class PairEvaluator:
    """A reward that says which completion was scored against which answer."""

    reward_names = ("pair", "length")

    def compute_rewards(self, completions, answers):
        rows = [self.score(completion, answer) for completion, answer in zip(completions, answers, strict=True)]
        return torch.tensor(rows), {}

    @staticmethod
    def score(completion, answer):
        if answer == "dull":
            return 1.0, 0.0
        return float(sum(map(ord, completion)) % 97), 1000.0 * int(answer)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_each_completion_is_scored_against_its_own_prompts_answer(models, name):
    """`grpo` keeps what it sampled; `dapo` replaces groups whose rewards are all equal by groups of further prompts."""
    llm, args = models("qwen2"), flags(name)
    args.prompts_per_step, args.num_generations, args.max_completion_length = 4, 3, 8
    args.choices = dataclasses.replace(args.choices, overlong_buffer=0.0)
    batches = main.Batches(Prompter(4), llm)
    batch = main.collect(llm, batches, PairEvaluator(), args, torch.Generator().manual_seed(0), main.Timer())
    batches.close()
    rollout = batch.rollout
    assert (
        len(batch.examples) == 4 and len(rollout.texts) == 12 and rollout.prompt_of_row == [i // 3 for i in range(12)]
    )
    answers = [one.answer for one in batch.examples]
    assert ("dull" in answers) == (name == "grpo") and len({one.id for one in batch.examples}) == 4
    for row, text in enumerate(rollout.texts):
        ids = rollout.completion_ids[row][rollout.completion_mask[row]]
        assert llm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
        assert batch.rewards[row].tolist() == list(PairEvaluator.score(text, answers[row // 3]))
        assert batch.totals[row] == batch.rewards[row].sum()
    for q, one in enumerate(batch.examples):
        prompt = rollout.prompt_ids[q][rollout.prompt_mask[q]]
        assert torch.equal(prompt, encode_prompts(llm, [one]).ids[0])
    with torch.no_grad():  # joined from rounds of different widths, each row still follows its own prompt
        logps = token_logps(llm, rollout, 0.8).float()
    torch.testing.assert_close(logps, rollout.sampler_logps, atol=2e-5, rtol=1e-5)


def test_the_overlong_penalty_counts_in_the_advantages_and_not_in_the_logged_reward(models):
    llm, args = models("qwen2"), flags("dapo")
    args.prompts_per_step, args.num_generations, args.max_completion_length = 4, 3, 8
    batches = main.Batches(Prompter(4), llm)
    batch = main.collect(llm, batches, PairEvaluator(), args, torch.Generator().manual_seed(0), main.Timer())
    batches.close()
    lengths = batch.rollout.completion_mask.sum(1)
    assert (lengths == 8).any()
    penalty = main.soft_overlong_penalty(lengths, 8, args.choices.overlong_buffer)
    torch.testing.assert_close(batch.totals, batch.rewards.sum(1) + penalty)
    assert batch.metrics["overlong_penalty"] == pytest.approx(float(penalty.mean()))
    groups = batch.sampled_totals  # of whole points: PairEvaluator gives no fractions
    assert torch.equal(groups, groups.round())
