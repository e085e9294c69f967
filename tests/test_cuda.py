"""The contracts on a GPU, with CUDA graphs. Every test here skips itself where torch finds no GPU.

1. Log-probabilities of the sampler and of the trainer agree, in float32 and bfloat16, text and vision, in every turn of
   a conversation, and with adapters.
2. A step's gradient does not depend on its division into micro-batches; with turns and with adapters too.
4. Tokens are sampled from softmax(logits / temperature): greedy answers, also in a later turn, equal `generate`'s.
8. A resumed run logs the numbers of an unbroken one; with turns and with adapters too.
9. A single-turn task computes, bit for bit, what it computes without environments.

Also: a graph is captured once for each shape, also with evaluations between; memory does not grow. Without a GPU,
test_rollout.py runs the captured step on fake tensors, and the logic of the tests here can be checked on a CPU: set
DEVICE to "cpu", and put an object whose `replay` calls `Decoder.advance` in the place of a graph.
"""

import gc
from collections.abc import Iterable

import pytest
import sampling
import torch
from runs import records, small_run  # noqa: F401  (a fixture)
from sampling import draw
from small_models import TEXT, cut, picture, plain_inputs, question, questions, small_config
from test_turns import CALCULATOR, toys

import adapters
from environments import Environment
from llms import LLM, load_llm
from logprobs import reference_logps, token_logps
from main import accumulate_gradients
from rollout import Sampler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

DEVICE = "cuda"
FAMILIES = sampling.slow([*TEXT, "qwen2_vl", "qwen2_5_vl", "qwen3_vl"], "qwen3", "qwen2_5_vl")
MEAN_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.05}  # of log-probabilities, in nats; the small models are peaked


@pytest.fixture
def on_gpu(model_folder):
    """-> a function that loads a family's model on the GPU, with adapters that are not 0 if asked for."""

    def on_gpu(family: str, dtype: str = "float32", rank: int = 0) -> LLM:
        llm = load_llm(model_folder(family), DEVICE, dtype)
        if rank:
            pytest.importorskip("peft")
            adapters.add(llm, rank, 2 * rank)
            change(adapters.parameters(llm.model).values())
        return llm

    return on_gpu


def change(weights: Iterable[torch.Tensor]) -> None:
    """Add noise to the weights in place, as an optimizer step does."""
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1 * torch.randn_like(weight))


def graphs_of(sampler: Sampler) -> dict:
    """The captured graphs of a sampler's decoder by shape."""
    return {key: graph for key, graph in sampler.decoder.graphs.items() if graph is not None}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_trainer_agree(on_gpu, family, dtype):
    """Rows end at different tokens and leave; the second and third call replay graphs."""
    llm = on_gpu(family, dtype)
    sampler = Sampler(llm)
    for _ in range(3):
        rollout = sampler.sample(questions(family), 8, 70, temperature=0.8)
        with torch.no_grad():
            trained = token_logps(llm, rollout, 0.8)
        difference = (trained - rollout.sampler_logps).abs()[rollout.completion_mask]
        assert difference.mean() < MEAN_DIFFERENCE[dtype]
    assert rollout.lengths.min() < rollout.lengths.max() and graphs_of(sampler)


def greedy(llm: LLM, **inputs: torch.Tensor) -> torch.Tensor:
    """(T,) what `generate` continues one prompt with, without the placeholders that the sampler excludes."""
    options = {"do_sample": False, "max_new_tokens": 30, "repetition_penalty": 1.0, "top_k": 0, "top_p": 1.0}
    options |= {"eos_token_id": list(llm.eos_token_ids), "pad_token_id": llm.pad_token_id}
    options["suppress_tokens"] = list(llm.excluded_token_ids) or None
    return llm.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_generate(on_gpu, family, rank):
    llm = on_gpu(family, rank=rank)
    sampler = Sampler(llm)
    for _ in range(2):  # eagerly and captured, then replayed
        rollout = sampler.sample(questions(family), 2, 30, temperature=0)
    for row, example in enumerate(questions(family)):
        expected = greedy(llm, **{name: tensor.to(DEVICE) for name, tensor in plain_inputs(llm, example).items()})
        for copy in (2 * row, 2 * row + 1):
            ids = rollout.completion_ids[copy][rollout.completion_mask[copy]]
            assert torch.equal(ids, expected[: len(ids)]) and len(ids) == len(expected)


def test_a_later_turn_equals_generate(on_gpu):
    """Given the ids of the whole conversation before it."""
    llm, counts = on_gpu("qwen2"), set()
    rollout = Sampler(llm).sample(questions("qwen2"), 4, 30, temperature=0, environments=toys("qwen2", 4))
    for row, episode in enumerate(rollout.episodes):
        prompt = plain_inputs(llm, questions("qwen2")[row // 4])["input_ids"][0].to(DEVICE)
        said = rollout.completion_ids[row][rollout.completion_mask[row]]
        before, last = said.split([len(said) - episode.turns[-1].length, episode.turns[-1].length])
        assert torch.equal(last, greedy(llm, input_ids=torch.cat([prompt, before])[None]))
        counts.add(len(episode.turns))
    assert max(counts) > 1


def test_replays_draw_new_random_numbers(on_gpu):
    """Each row continues differently from one replay to the next, and the same seed gives the same tokens."""
    llm = on_gpu("qwen2")

    def three_calls() -> list[torch.Tensor]:
        sampler = Sampler(llm, seed=5)
        return [sampler.sample(questions("qwen2"), 8, 40, ignore_eos=True).completion_ids for _ in range(3)]

    one, two = three_calls(), three_calls()
    assert not torch.equal(one[1], one[2])
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["one turn", "turns", "adapters"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_the_gradient_does_not_depend_on_micro_batches(on_gpu, family, kind):
    llm = on_gpu(family, rank=3 * (kind == "adapters"))
    rollout = draw(llm, family, 4, length=20, environments=toys(family, 4) if kind == "turns" else ())
    advantages = torch.randn(len(rollout.texts), device=DEVICE)

    def gradient(batches: list[list[int]]) -> dict[str, torch.Tensor]:
        llm.model.zero_grad()
        parts = cut(rollout, batches)
        accumulate_gradients(small_config(), llm, parts, advantages, parts.sampled_mask, None, None)
        return {name: weight.grad.clone() for name, weight in llm.model.named_parameters() if weight.grad is not None}

    whole = gradient([list(range(12))])
    assert len(whole) == 28 if kind == "adapters" else len(whole) > 20
    sampling.assert_same_gradients(whole, gradient([[5, 0, 7], [1, 2, 3, 4], [6, 8, 9, 10, 11]]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_one_turn_computes_what_it_computes_alone(on_gpu, family):
    """Also where graphs are replayed."""
    llm = on_gpu(family)
    plain, turned = Sampler(llm, 3), Sampler(llm, 3)
    for _ in range(3):
        one = plain.sample(questions(family), 2, 20)
        environments = [Environment(example) for example in questions(family) for _ in range(2)]
        other = turned.sample(questions(family), 2, 20, environments=environments)
        assert torch.equal(one.completion_ids, other.completion_ids) and other.episodes == []
        assert torch.equal(one.sampler_logps, other.sampler_logps)


def test_the_sampler_sees_an_optimizer_step(on_gpu):
    llm = on_gpu("qwen2")
    sampler = Sampler(llm)
    for _ in range(3):  # graphs read the weights by address
        change(llm.model.parameters())
        rollout = sampler.sample(questions("qwen2"), 4, 30)
        with torch.no_grad():
            difference = token_logps(llm, rollout) - rollout.sampler_logps
        assert difference.abs()[rollout.completion_mask].mean() < MEAN_DIFFERENCE["float32"]


def test_graphs_are_captured_once_for_each_shape(on_gpu):
    """Ten steps with an evaluation after each: after the second, no new graph, and the old ones are kept."""
    llm = on_gpu("qwen2")
    sampler = Sampler(llm)
    kept: dict = {}
    for step in range(10):
        sampler.sample(questions("qwen2"), 8, 60, ignore_eos=True)
        with sampler.seeded(0):
            sampler.sample(questions("qwen2"), 1, 60, temperature=0, ignore_eos=True)
        if step == 2:
            kept = graphs_of(sampler)
    assert kept and graphs_of(sampler).keys() == kept.keys()
    assert all(graphs_of(sampler)[key] is graph for key, graph in kept.items())


def test_a_longer_prompt_and_a_reference_between_do_not_disturb(on_gpu):
    """A larger request replaces buffers and graphs; another model's pass uses the memory in between."""
    llm, reference = on_gpu("qwen2"), on_gpu("qwen2")
    sampler = Sampler(llm)
    for words in (3, 3, 90, 3):
        rollout = sampler.sample([question("eggs " * words)], 8, 40)
        with torch.no_grad():
            trained = token_logps(llm, rollout)
            token_logps(llm, rollout, model=reference.model)
        difference = (trained - rollout.sampler_logps).abs()[rollout.completion_mask]
        assert difference.mean() < MEAN_DIFFERENCE["float32"]


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_memory_does_not_grow(on_gpu, family):
    llm = on_gpu(family)
    sampler, config = Sampler(llm), small_config()
    allocated = []
    for _ in range(12):
        rollout = sampler.sample(questions(family), 8, 40, ignore_eos=True)
        advantages = torch.ones(len(rollout.texts), device=DEVICE)
        accumulate_gradients(config, llm, rollout, advantages, rollout.sampled_mask, None, None)
        llm.model.zero_grad(set_to_none=True)
        del rollout
        gc.collect()
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
    assert max(allocated[4:]) == min(allocated[4:])


def test_a_prompt_with_pictures_mixes_with_one_without(on_gpu):
    llm = on_gpu("qwen2_vl")
    rollout = Sampler(llm).sample([question("Two?", picture(32, 32), picture(64, 32, 1)), question("None?")], 4, 20)
    with torch.no_grad():
        difference = token_logps(llm, rollout) - rollout.sampler_logps
    assert difference.abs()[rollout.completion_mask].mean() < MEAN_DIFFERENCE["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_vl", "qwen3_vl"])
def test_conversations_keep_contract_1(on_gpu, family, dtype):
    """One to three turns, with pictures where the model sees them; later calls replay graphs of earlier ones."""
    llm = on_gpu(family, dtype)
    sampler = Sampler(llm)
    for _ in range(3):
        rollout = sampler.sample(questions(family), 8, 20, environments=toys(family, 8))
        with torch.no_grad():
            difference = (token_logps(llm, rollout) - rollout.sampler_logps).abs()[rollout.sampled_mask]
        assert difference.mean() < MEAN_DIFFERENCE[dtype]
    assert {len(episode.turns) for episode in rollout.episodes} == {1, 2, 3} and graphs_of(sampler)


def test_the_graphs_of_a_turn_are_reused(on_gpu):
    """The rows that go on are another number in each turn and each step; graphs exist for few numbers of rows."""
    sampler = Sampler(on_gpu("qwen2"))
    for _ in range(10):
        sampler.sample(questions("qwen2"), 8, 20, environments=toys("qwen2", 8))
    assert {rows for rows, *_ in sampler.decoder.graphs} <= {24, 12, 6, 3, 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_adapters_keep_contract_1(on_gpu, family, dtype):
    """Graphs read the adapters by address: an update is seen, and the reference, without them, leaves them as they
    are."""
    llm = on_gpu(family, dtype, rank=3)
    sampler, config = Sampler(llm), small_config("--temperature 1.0 --beta 0.04")
    for _ in range(4):
        change(adapters.parameters(llm.model).values())
        rollout = sampler.sample(questions(family), 8, 20)
        with torch.no_grad():
            difference = (token_logps(llm, rollout) - rollout.sampler_logps).abs()[rollout.sampled_mask]
            base = (reference_logps(llm, llm.model, rollout, config) - rollout.sampler_logps)[rollout.sampled_mask]
        assert difference.mean() < MEAN_DIFFERENCE[dtype] < base.abs().mean()
    assert graphs_of(sampler)


@pytest.mark.parametrize(
    ("task", "flags"),
    [("arithmetic", ""), ("correlation", ""), ("arithmetic", CALCULATOR), ("correlation", "--lora_rank 3 --beta 0.04")],
    ids=["text", "vision", "turns", "adapters"],
)
def test_a_resumed_run_equals_an_unbroken_one(small_run, task, flags):  # noqa: F811
    if "lora" in flags:
        pytest.importorskip("peft")
    flags += f" --device {DEVICE} --dtype float32"
    whole = small_run(task, flags, name="whole")
    small_run(task, flags, "--max_steps 2", name="cut")
    cut_run = small_run(task, flags, "--resume", name="cut")
    for one, other in zip(records(whole), records(cut_run), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True)
