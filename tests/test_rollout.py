"""The sampler draws from softmax(logits / temperature), returns its log-probabilities, and stops at the end token."""

import functools
import random

import pytest
import sampling
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import FAMILIES, TEMPERATURES, VISION
from small_models import EOS, GENERATION, plain_inputs, question, questions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adapters
import layers
import rollout as rollout_module
from logprobs import token_logps, token_logps_and_entropy
from prompts import Prompts, encode_prompts
from rollout import Decoder, FusedDecoder, Rollout, Sampler, halve_to

PACKS = layers.packs(torch.device("cpu"), torch.bfloat16)
draw = functools.partial(sampling.draw, generations=8, length=24)


def greedy(llm, examples, generations=1, length=30) -> Rollout:
    return Sampler(llm).sample(examples, generations, length, temperature=0)


@pytest.fixture(params=[True, False], ids=["fused", "plain"])
def either_decoder(request, monkeypatch):
    """Once with the layers written out, once with transformers' own forward pass."""
    monkeypatch.setattr(rollout_module.layers, "has_fast_layers", lambda model: request.param)
    return FusedDecoder if request.param else Decoder


def assert_same_rollout(one, other):
    assert torch.equal(one.completion_mask, other.completion_mask)
    assert torch.equal(one.completion_ids, other.completion_ids)
    assert torch.equal(one.finished, other.finished)
    torch.testing.assert_close(one.sampler_logps, other.sampler_logps)
    assert one.texts == other.texts


def assert_logps_are_the_trainers(llm, rollout, temperature=1.0):
    with torch.no_grad():
        logps = token_logps(llm, rollout, temperature).float()
    torch.testing.assert_close(rollout.sampler_logps, logps, atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Contract 1: the sampler's log-probabilities are the trainer's


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_trainer_agree(load, family, temperature):
    llm = load(family)
    sampler = Sampler(llm)
    rollout = sampler.sample(questions(family), 8, 24, temperature)
    with torch.no_grad():
        logps = token_logps(llm, rollout, temperature)
        elsewhere = token_logps(llm, rollout, 1.1 * temperature)
    assert type(sampler.decoder) is FusedDecoder
    torch.testing.assert_close(rollout.sampler_logps, logps.float(), atol=2e-5, rtol=1e-5)
    assert (elsewhere - logps).abs().max() > 0.01  # so both use the temperature
    assert (rollout.sampler_logps[~rollout.completion_mask] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_trainer_agree_in_bfloat16(load, family):
    """They round in different orders: they agree to bfloat16's precision, without bias."""
    llm = load(family, "bfloat16")
    rollout = draw(llm, family)
    with torch.no_grad():
        off = (token_logps(llm, rollout) - rollout.sampler_logps)[rollout.completion_mask]
    assert off.abs().mean() < 0.1 and abs(off.mean()) < 0.05


def test_rollouts_take_part_in_autograd(load):
    """Sampling runs in inference mode, whose tensors autograd refuses."""
    llm = load("qwen2_vl")
    rollout = draw(llm, "qwen2_vl")
    (token_logps(llm, rollout) * rollout.sampler_logps).sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# Contract 3: where completions end


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_the_mask_ends_with_the_end_token(load, family):
    llm = load(family)
    rollout = draw(llm, family, generations=40, length=12)
    eos = torch.tensor(llm.eos_token_ids)
    lengths = rollout.completion_mask.sum(1)
    assert rollout.finished.any() and not rollout.finished.all()
    assert lengths.min() == 1  # an empty completion consists of its end token, which is trained
    for ids, mask, logps, length, finished in zip(
        rollout.completion_ids, rollout.completion_mask, rollout.sampler_logps, lengths, rollout.finished, strict=True
    ):
        assert mask[:length].all() and not mask[length:].any()
        is_end = torch.isin(ids[:length], eos)
        assert not is_end[:-1].any() and is_end[-1] == finished
        assert finished or length == 12
        assert (logps[:length] < 0).all()  # that of the end token too
        assert (ids[length:] == llm.pad_token_id).all()


def test_only_the_given_eos_ids_end_a_completion(load):
    llm = load("qwen2")
    llm.eos_token_ids = (0,)
    rollout = draw(llm, "qwen2", generations=100, length=40)
    assert 0 < rollout.finished.float().mean() < 0.9
    assert ((rollout.completion_ids == 0) & rollout.completion_mask).sum() == rollout.finished.sum()
    assert torch.isin(
        rollout.completion_ids[rollout.completion_mask], torch.tensor(EOS)
    ).any()  # the ids of the generation config no longer end it


def test_texts_are_the_tokens_without_end_and_padding(load):
    """Other special tokens stay: the tags of a format may be among them."""
    llm = load("qwen2")
    rollout = draw(llm, "qwen2")
    ends = {llm.pad_token_id, *llm.eos_token_ids}
    for text, ids, mask in zip(rollout.texts, rollout.completion_ids, rollout.completion_mask, strict=True):
        kept = ids[mask].tolist()
        kept = kept[:-1] if kept[-1] in llm.eos_token_ids else kept
        assert text == llm.tokenizer.decode(kept, clean_up_tokenization_spaces=False)
    special = [i for i in llm.tokenizer.all_special_ids if i not in ends]
    letter = llm.tokenizer.convert_tokens_to_ids("e")
    assert special and letter not in ends
    expected = llm.tokenizer.convert_ids_to_tokens(special[0]) + "e"
    assert rollout_module.decode_texts(llm, [[special[0], letter, EOS[0]]]) == [expected]


def test_shapes_and_group_order(load):
    llm = load("qwen2_vl")
    rollout = draw(llm, "qwen2_vl", generations=5, length=7)
    assert rollout.completion_ids.shape == rollout.sampler_logps.shape == rollout.completion_mask.shape == (15, 7)
    assert rollout.prompt_ids.shape == rollout.prompt_mask.shape and len(rollout.prompt_ids) == 3
    assert len(rollout.prompts.vision) == 3 and rollout.finished.shape == (15,) and len(rollout.texts) == 15
    assert rollout.prompt_of_row == [0] * 5 + [1] * 5 + [2] * 5


def test_ignore_eos_fills_every_row(load):
    rollout = draw(load("qwen2"), "qwen2", length=9, ignore_eos=True)
    assert rollout.completion_mask.all() and rollout.completion_ids.shape[1] == 9 and not rollout.finished.any()


def test_one_token_completions(load):
    rollout = draw(load("qwen3"), "qwen3", length=1)
    assert rollout.completion_ids.shape == (24, 1)
    assert torch.equal(rollout.finished, torch.isin(rollout.completion_ids[:, 0], torch.tensor((0, *EOS))))


# ---------------------------------------------------------------------------------------------------------------------
# Contract 4: what is sampled is softmax(logits / temperature)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom, rare tokens taken together."""
    expected = counts.sum() * probabilities
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_sampled_tokens_have_the_models_distribution(load, family, temperature):
    """The top-k, top-p, temperature and penalty of the model's generation config change nothing."""
    llm = load(family)
    for name, value in GENERATION.items():
        assert getattr(llm.model.generation_config, name) == value  # the model does name them
    example, excluded = questions(family)[0], list(llm.excluded_token_ids)
    with torch.no_grad():
        logits = llm.model(**plain_inputs(llm, example)).logits[0, -1]  # (V,)
    logits[excluded] = -torch.inf
    rollout = Sampler(llm).sample([example], 10_000, 1, temperature)
    counts = rollout.completion_ids[:, 0].bincount(minlength=len(logits))  # (V,)
    assert (counts[excluded] == 0).all() and (counts > 0).sum() > 30
    statistic, freedom = chi_square(counts, (logits / temperature).softmax(-1))
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5  # mean and standard deviation of chi-square
    off, freedom = chi_square(counts, (logits / (1.2 * temperature)).softmax(-1))
    assert off > freedom + 5 * (2 * freedom) ** 0.5  # a temperature 20 % off is detected


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_have_the_models_distribution(load, family, temperature):
    """The mean log-probability of samples is minus the entropy; of samples from another distribution it is not."""
    llm = load(family, "float32")
    rollout = draw(llm, family, generations=100, length=10, temperature=temperature, ignore_eos=True)
    with torch.no_grad():
        logps, entropy = token_logps_and_entropy(llm, rollout, temperature)
    surprise = logps + entropy  # (B, T), of mean 0 at each token
    assert (surprise.mean(0).abs() < 5 * surprise.std(0) / len(surprise) ** 0.5).all()


@pytest.mark.parametrize("family", VISION)
def test_placeholders_are_never_sampled(load, family):
    """A sampled image placeholder has no picture, and breaks the next forward pass."""
    llm = load(family)
    images = list(llm.excluded_token_ids)
    with torch.no_grad():  # make them the likeliest tokens wherever tokens 50 and 51 are likely
        head = llm.model.get_output_embeddings().weight
        head[images] = 3 * head[50:52]
    for rollout in (greedy(llm, questions(family), 1, 20), draw(llm, family, generations=30)):
        assert not torch.isin(rollout.completion_ids, torch.tensor(images)).any()
        assert torch.isfinite(rollout.sampler_logps).all()
        with torch.no_grad():
            assert torch.isfinite(token_logps(llm, rollout)).all()


def test_extreme_uniform_numbers_give_possible_tokens(load, monkeypatch):
    """The number 0 must not choose a first token of probability 0, nor a number near 1 an index past the end."""
    llm = load("qwen2_vl")
    size = llm.model.get_output_embeddings().weight.shape[0]
    llm.excluded_token_ids = (0, 1, size - 2, size - 1)
    for edge in (0.0, 1.0):
        monkeypatch.setattr(torch, "rand", lambda *shape, edge=edge, **_: torch.full(shape, edge))
        rollout = draw(llm, "qwen2_vl")
        assert torch.isfinite(rollout.sampler_logps).all()
        assert not torch.isin(
            rollout.completion_ids[rollout.completion_mask], torch.tensor(llm.excluded_token_ids)
        ).any()


# ---------------------------------------------------------------------------------------------------------------------
# Greedy decoding is transformers' own


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_generate(load, family):
    llm = load(family)
    rollout = greedy(llm, questions(family), 2, 30)
    for row, example in enumerate(questions(family)):
        inputs = plain_inputs(llm, example)
        expected = llm.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=30,
            eos_token_id=list(llm.eos_token_ids),
            pad_token_id=llm.pad_token_id,
            suppress_tokens=list(llm.excluded_token_ids) or None,
            repetition_penalty=1.0,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
        )[0, inputs["input_ids"].shape[1] :]
        for completion in (2 * row, 2 * row + 1):
            mask = rollout.completion_mask[completion]
            assert rollout.completion_ids[completion][mask].tolist() == expected.tolist()
    # greedy decoding returns the log-probabilities of temperature 1
    assert_logps_are_the_trainers(llm, rollout)


# ---------------------------------------------------------------------------------------------------------------------
# Rows that leave, buffers that stay


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_and_plain_decoding_are_the_same(load, family, monkeypatch):
    llm = load(family)
    rollouts, used = [], []
    for fused in (True, False):
        monkeypatch.setattr(rollout_module.layers, "has_fast_layers", lambda model, fused=fused: fused)
        sampler = Sampler(llm, seed=1)  # with another seed a number might fall on the border of two tokens
        rollouts.append(sampler.sample(questions(family), 8, 24, 0.9))
        used.append(type(sampler.decoder))
    assert used == [FusedDecoder, Decoder]
    assert_same_rollout(*rollouts)


def many_questions():
    """33 strings of random letters, 5 to 37 long: the answers of a random model to them differ."""
    letters = "abcdefghijklmnopqrstuvwxyz 0123456789"
    return [question("".join(random.Random(n).choices(letters, k=5 + n))) for n in range(33)]


@pytest.mark.slow
@pytest.mark.parametrize("look_every", sampling.slow([1, 5, 16], 5))
def test_removing_finished_rows_changes_nothing(load, monkeypatch, either_decoder, look_every):
    """33 rows that end at many different tokens, decoded with and without removing those that have ended.

    `look_every`: on a GPU the host looks only every few tokens, so rows decode past their end.
    """
    sampler, kept, keep_rows = Sampler(load("llama")), [], Decoder.keep_rows

    def spy(decoder, keep):
        kept.append(len(keep))
        keep_rows(decoder, keep)

    monkeypatch.setattr(Decoder, "keep_rows", spy)
    sampler.roomy_decoder(33, 128).look_every = look_every
    leaving = sampler.sample(many_questions(), 1, 60, temperature=0)
    assert type(sampler.decoder) is either_decoder and sampler.decoder.look_every == look_every
    assert kept and kept == sorted(kept, reverse=True) and (look_every > 1 or kept[:2] == [16, 8])
    assert len(set(leaving.completion_mask.sum(1).tolist())) > 8
    monkeypatch.setattr(rollout_module, "halve_to", lambda rows, needed: rows)  # now no row is removed
    kept.clear()
    assert_same_rollout(leaving, sampler.sample(many_questions(), 1, 60, temperature=0))
    assert set(kept) == {33}


def test_remaining_rows_keep_their_own_cache(load):
    """While sampling, the random numbers depend on the rows that remain, but each row's log-probabilities are right."""
    llm = load("qwen2_vl")
    rollout = draw(llm, "qwen2_vl", generations=40, length=60)
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 20
    assert_logps_are_the_trainers(llm, rollout)


def test_halve_to():
    assert [halve_to(64, needed) for needed in (64, 33, 32, 17, 16, 3, 2, 1)] == [64, 64, 32, 32, 16, 4, 2, 1]
    assert [halve_to(9, needed) for needed in (5, 4, 2, 1)] == [9, 4, 2, 1]


@pytest.mark.slow
def test_buffers_are_reused_for_other_shapes(load, either_decoder):
    """A smaller request uses the decoder as it is, and nothing of earlier completions is left in it."""
    llm, family = load("qwen2_vl"), "qwen2_vl"
    sampler = Sampler(llm)
    sampler.sample(questions(family), 10, 100)
    kept = sampler.decoder
    for generations, length, temperature in [(2, 5, 1.0), (7, 30, 0.6), (1, 3, 0), (9, 90, 1.0)]:
        with sampler.seeded(0):
            again = sampler.sample(questions(family), generations, length, temperature)
        assert_same_rollout(again, Sampler(llm).sample(questions(family), generations, length, temperature))
    assert sampler.decoder is kept and type(kept) is either_decoder


def test_a_larger_request_replaces_the_decoder(load):
    sampler = Sampler(load("qwen2_vl"))
    sampler.sample(questions("qwen2_vl"), 10, 100)
    kept = sampler.decoder
    sampler.sample(questions("qwen2_vl"), 12, 200)
    assert sampler.decoder is not kept and sampler.decoder.max_rows == 36 and sampler.decoder.slots >= 244


def test_a_larger_decoder_keeps_the_larger_of_both_sizes(load):
    sampler = Sampler(load("qwen2"))
    first = sampler.roomy_decoder(10, 100)
    assert sampler.roomy_decoder(10, 100) is first and sampler.roomy_decoder(5, 50) is first
    assert sampler.roomy_decoder(5, 300).max_rows == 10
    assert sampler.roomy_decoder(20, 50).slots == 304


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_sees_an_optimizer_step(load, family):
    """The parameters are views of the fused weights that it reads: there is no second copy to grow stale."""
    llm = load(family)
    sampler = Sampler(llm)
    before = sampler.sample(questions(family), 8, 24)
    fused = sampler.decoder.fused
    token_logps(llm, before).sum().backward()
    torch.optim.AdamW(llm.model.parameters(), lr=0.05).step()
    with sampler.seeded(0):
        after = sampler.sample(questions(family), 8, 24)
    assert sampler.decoder.fused is fused  # not fused a second time
    assert not torch.equal(before.completion_ids, after.completion_ids)
    assert_logps_are_the_trainers(llm, after)


@pytest.mark.skipif(not PACKS, reason="this CPU does not multiply bfloat16 with oneDNN")
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_packed_weights_follow_every_change(load, family):
    """Packed copies of bfloat16 weights: sampler and trainer agree after an update in place and after a replacement,
    and the copies are freed."""
    llm = load(family, "bfloat16")
    sampler = Sampler(llm)
    for change in (None, lambda weight: weight.mul_(1.5), lambda weight: setattr(weight, "data", weight.data * 0.5)):
        for weight in llm.model.parameters() if change else ():
            with torch.no_grad():
                change(weight)
        rollout = sampler.sample(questions(family), 8, 24)
        gap = (rollout.sampler_logps - token_logps(llm, rollout)).abs()[rollout.completion_mask]
        assert gap.mean() < 0.02
        assert not hasattr(sampler.decoder, "products")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 32, 64])
def test_a_packed_product_equals_the_plain_one(bias, rows):
    x, weight = torch.randn(rows, 96).bfloat16(), torch.randn(80, 96).bfloat16()
    bias = torch.randn(80).bfloat16() if bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(layers.product(weight, bias)(x).double(), expected, rtol=2**-7, atol=0.1)
    wide = weight.float()
    assert torch.equal(layers.product(wide)(x.float()), F.linear(x.float(), wide))  # float32 is not packed


@pytest.mark.parametrize("vocabulary", [300, 16_384 + 256, 8209])  # whole, in blocks, and a prime number
def test_a_token_is_drawn_as_often_as_it_is_likely(vocabulary):
    """Evenly spaced uniform numbers hit each token in proportion to its probability, in order, within one hit."""
    logits = 3 * torch.randn(1, vocabulary)
    logits[:, 5:290] = -torch.inf
    draws = 4096
    uniform = (torch.arange(draws) + 0.5)[:, None] / draws  # (b, 1)
    tokens, logps = rollout_module.draw(logits.expand(draws, -1), uniform)
    expected = logits.double().log_softmax(-1)[0]  # (V,)
    hits = torch.bincount(tokens[:, 0], minlength=vocabulary)
    assert (hits - draws * expected.exp()).abs().max() < 1.1
    assert (tokens[1:] >= tokens[:-1]).all()
    torch.testing.assert_close(logps[:, 0], expected[tokens[:, 0]].float(), rtol=0, atol=1e-5)


def test_the_sampler_sees_replaced_weights(load):
    """`model.to`, or a loaded state whose tensors are assigned, gives parameters new storage."""
    llm = load("llama")
    sampler = Sampler(llm)
    sampler.sample(questions("llama"), 8, 24)
    other = {name: 0.8 * weight for name, weight in llm.model.state_dict().items()}
    llm.model.load_state_dict(other, assign=True)
    assert_logps_are_the_trainers(llm, sampler.sample(questions("llama"), 8, 24))


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs, without a GPU: fake tensors have a shape, a dtype and a device, but no values


class OnGpu(TorchDispatchMode):
    """Every result of an operation has to be on the GPU: a copy to the CPU would wait for it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        assert all(part.is_cuda for part in tree_leaves(result) if torch.is_tensor(part)), operation
        return result


def fake_decoder(llm) -> FusedDecoder:
    """A decoder of 8 rows over this model, whose weights are moved to a GPU that need not be there."""
    for module in llm.model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    kept[name] = torch.nn.Parameter(fake, False) if kept is module._parameters else fake
    decoder = FusedDecoder(llm, 8, 128)
    decoder.generator, decoder.ignore_eos, decoder.draws = None, False, True
    decoder.products = rollout_module.fused_layers(decoder.text_model.layers, decoder.fused)
    decoder.head_product = layers.product(llm.model.get_output_embeddings().weight)
    return decoder


@pytest.mark.parametrize(("dtype", "rank"), [("float32", 0), ("bfloat16", 0), ("bfloat16", 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_step_asks_the_gpu_for_no_value(load, family, dtype, rank):
    """`.item()`, `if tensor`, `.cpu()` and shapes that depend on values raise an error here, and no graph can capture
    them. What a step reads and writes keeps its address."""
    llm = load(family, dtype)
    if rank:
        pytest.importorskip("peft")
        adapters.add(llm, rank, 7)
    with FakeTensorMode(), torch.inference_mode():
        decoder = fake_decoder(llm)
        before = tensors_of(decoder)
        assert decoder.uses_graphs and decoder.adapted == bool(rank) and len(before) > 10 + 2 * 2
        with OnGpu():
            for decoder.temperature, rows, window in ((0.0, 8, 64), (0.7, 4, 128)):
                decoder.advance(rows, window)
        assert all(now is tensor for now, tensor in zip(tensors_of(decoder), before, strict=True))


def tensors_of(decoder: FusedDecoder) -> list[torch.Tensor]:
    """Its buffers, keys and values, fused weights, and the weights of the model."""
    held = [part for part in tree_leaves(vars(decoder)) if torch.is_tensor(part)]
    return [*held, *decoder.llm.model.parameters()]


# ---------------------------------------------------------------------------------------------------------------------
# Randomness


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_sampling_advances_the_samplers_generator_only(load, temperature):
    sampler = Sampler(load("qwen2"))
    outside, inside = torch.get_rng_state(), sampler.generator.get_state()
    sampler.sample(questions("qwen2"), 3, 10, temperature)
    assert torch.equal(torch.get_rng_state(), outside)
    assert torch.equal(sampler.generator.get_state(), inside) == (temperature == 0)  # greedy decoding draws no numbers


def test_same_seed_same_samples(load):
    llm = load("qwen3_vl")
    assert_same_rollout(draw(llm, "qwen3_vl"), draw(llm, "qwen3_vl"))
    assert not torch.equal(draw(llm, "qwen3_vl").completion_ids, draw(llm, "qwen3_vl", seed=1).completion_ids)


def test_seeded_restores_the_random_state(load):
    """After an error too; the generator stays the same object, with which CUDA graphs were captured."""
    llm = load("qwen2")
    sampler, expected = Sampler(llm, seed=3), draw(llm, "qwen2", seed=5)
    generator, state = sampler.generator, sampler.generator.get_state()
    with sampler.seeded(5):
        assert_same_rollout(sampler.sample(questions("qwen2"), 8, 24), expected)
    assert sampler.generator is generator and torch.equal(generator.get_state(), state)
    with pytest.raises(KeyError), sampler.seeded(5):
        sampler.sample(questions("qwen2"), 1, 2)
        raise KeyError
    assert sampler.generator is generator and torch.equal(generator.get_state(), state)


def test_a_restored_sampler_continues_the_random_numbers(load):
    llm = load("qwen2")
    uninterrupted = Sampler(llm, seed=3)
    uninterrupted.sample(questions("qwen2"), 8, 24)
    state = uninterrupted.state_dict()
    state = {name: value.clone() for name, value in state.items()}
    resumed = Sampler(llm, seed=4)
    resumed.load_state_dict(state)
    for _ in range(2):
        assert_same_rollout(resumed.sample(questions("qwen2"), 8, 24), uninterrupted.sample(questions("qwen2"), 8, 24))


def test_completions_of_a_group_differ(load):
    rollout = draw(load("llama"), "llama", ignore_eos=True)
    assert len({tuple(row) for row in rollout.completion_ids.tolist()}) == len(rollout.completion_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts in a batch


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_do_not_depend_on_the_batch(load, family):
    """A prompt's completions are those it gets alone: no token attends to the padding on the left."""
    llm = load(family)
    together = greedy(llm, questions(family))
    for row, example in enumerate(questions(family)):
        alone = greedy(llm, [example])
        mask = together.completion_mask[row]
        assert together.completion_ids[row][mask].tolist() == alone.completion_ids[0].tolist()
        torch.testing.assert_close(together.sampler_logps[row][mask], alone.sampler_logps[0], atol=2e-5, rtol=1e-5)


def test_prompts_with_and_without_pictures_mix(load):
    llm = load("qwen2_5_vl")
    examples = [question("No picture."), *questions("qwen2_5_vl"), question("None here either, thank you.")]
    rollout = Sampler(llm).sample(examples, 2, 10)
    assert_logps_are_the_trainers(llm, rollout)


def test_encoded_prompts_and_examples_sample_the_same(load):
    llm = load("qwen2_vl")
    encoded = Sampler(llm).sample(encode_prompts(llm, questions("qwen2_vl")), 4, 10)
    assert_same_rollout(encoded, draw(llm, "qwen2_vl", generations=4, length=10))


# ---------------------------------------------------------------------------------------------------------------------
# Selecting, concatenating and cutting rollouts


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_selected_and_concatenated_groups_are_unchanged(load, family):
    llm = load(family)
    first = draw(llm, family, generations=4, length=6, seed=1)
    second = Sampler(llm, 2).sample(questions(family)[:1], 4, 20)
    parts = [first.select([2, 0]), draw(llm, family, generations=4, length=20, seed=3).select([]), second]
    for joined in (Rollout.cat(parts), Rollout.cat([Rollout.cat(parts[:2]), second])):
        rows = [8, 9, 10, 11, 0, 1, 2, 3]
        assert joined.num_generations == 4 and joined.prompt_of_row == [0] * 4 + [1] * 4 + [2] * 4
        assert joined.texts == [first.texts[row] for row in rows] + second.texts
        assert joined.finished.tolist() == first.finished[rows].tolist() + second.finished.tolist()
        assert torch.equal(joined.lengths, torch.cat([first.lengths[rows], second.lengths]))
        assert torch.equal(joined.sampled_mask, joined.completion_mask)
        for row, (part, old) in enumerate([(first, row) for row in rows] + [(second, row) for row in range(4)]):
            ids = joined.completion_ids[row][joined.completion_mask[row]]
            assert torch.equal(ids, part.completion_ids[old][part.completion_mask[old]])
        assert_logps_are_the_trainers(llm, joined)


def test_one_rollout_concatenated_is_itself(load):
    rollout = draw(load("qwen2_vl"), "qwen2_vl", generations=2, length=6)
    assert_same_rollout(Rollout.cat([rollout]), rollout)
    assert_same_rollout(Rollout.cat([rollout.select([0]), rollout.select([1, 2])]), rollout)


def rollout_of(lengths: list[int], group_size: int, prompt_length: int) -> Rollout:
    """Completions of these lengths; only the shapes matter."""
    queries, width = len(lengths) // group_size, max(lengths)
    prompts = torch.ones(queries, prompt_length, dtype=torch.long)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    finished = torch.ones(len(lengths), dtype=torch.bool)
    encoded = Prompts(prompts, prompts.bool(), prompts, [{} for _ in range(queries)])
    return Rollout(encoded, ids, mask, mask.float(), finished, [""] * len(lengths), group_size)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=24),
    group_size=st.integers(1, 5),
    prompt_length=st.integers(1, 40),
    budget=st.integers(1, 600),
)
@settings(max_examples=200, deadline=None)
def test_micro_batches_are_a_partition_within_the_budget(lengths, group_size, prompt_length, budget):
    lengths = lengths[: len(lengths) // group_size * group_size] or [1] * group_size
    batches = rollout_of(lengths, group_size, prompt_length).micro_batches(budget)

    def cost(rows):
        return len(rows) * max(lengths[row] for row in rows) + prompt_length * len({row // group_size for row in rows})

    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    assert all(batches)
    assert all(cost(rows) <= budget or len(rows) == 1 for rows in batches)
    for first in range(0, len(lengths), group_size):
        rows = range(first, first + group_size)
        used = [batch for batch in batches if set(batch) & set(rows)]
        assert len(used) == 1 or cost(rows) > budget  # a group that fits stays together and shares its prompt


def test_micro_batches_keep_groups_together():
    """Three groups of two rows that fit as a whole: two in one micro-batch, sorted by length, and one alone."""
    rollout = rollout_of([5, 4, 1, 2, 3, 3], group_size=2, prompt_length=10)
    assert rollout.micro_batches(32) == [[2, 3, 4, 5], [1, 0]]
    assert rollout.micro_batches(1000) == [[2, 3, 4, 5, 1, 0]]
    assert rollout.micro_batches(1) == [[2], [3], [4], [5], [1], [0]]
