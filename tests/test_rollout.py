"""The sampler draws from exactly softmax(logits / temperature), knows how probable it was, and ends where it should."""

import random

import pytest
import torch
from small_models import EOS, FAMILIES, GENERATION, VISION, plain_inputs, question, questions

import rollout as rollout_module
from llms import encode_prompts, token_logps, token_logps_and_entropy
from rollout import Decoder, LeanDecoder, get_decoder, halve_to, join, sample


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(llm, family, generations=8, length=24, temperature=1.0, seed=0, **options):
    return sample(llm, questions(family), generations, length, temperature, seeded(seed), **options)


def assert_same_rollout(one, other):
    assert torch.equal(one.completion_mask, other.completion_mask)
    assert torch.equal(one.completion_ids, other.completion_ids)
    assert torch.equal(one.finished, other.finished)
    torch.testing.assert_close(one.sampler_logps, other.sampler_logps)
    assert one.texts == other.texts


# ---------------------------------------------------------------------------------------------------------------------
# Contract 1: the sampler's log-probabilities are the trainer's


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_trainer_agree(load, family, temperature):
    llm = load(family)
    rollout = draw(llm, family, temperature=temperature)
    with torch.no_grad():
        logps = token_logps(llm, rollout, temperature)
        elsewhere = token_logps(llm, rollout, 1.1 * temperature)
    assert isinstance(llm.decoder, LeanDecoder)
    torch.testing.assert_close(rollout.sampler_logps, logps.float(), atol=2e-5, rtol=1e-5)
    assert (elsewhere - logps).abs().max() > 0.01  # so the temperature was in both
    assert (rollout.sampler_logps[~rollout.completion_mask] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_trainer_agree_in_bfloat16(load, family):
    """Each rounds in its own order, so they agree to bfloat16's precision, and on average nothing is off."""
    llm = load(family, "bfloat16")
    rollout = draw(llm, family)
    with torch.no_grad():
        off = (token_logps(llm, rollout) - rollout.sampler_logps)[rollout.completion_mask]
    assert off.abs().mean() < 0.1 and abs(off.mean()) < 0.05


def test_rollouts_take_part_in_autograd(load):
    """They are made in inference mode, whose tensors autograd refuses."""
    llm = load("qwen2_vl")
    rollout = draw(llm, "qwen2_vl")
    (token_logps(llm, rollout) * rollout.sampler_logps).sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# Contract 3: where completions end


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_the_end_token_is_in_the_mask_and_nothing_after_it(load, family):
    llm = load(family)
    rollout = draw(llm, family, generations=40, length=12)
    eos = torch.tensor(llm.eos_token_ids)
    lengths = rollout.completion_mask.sum(1)
    assert rollout.finished.any() and not rollout.finished.all()
    assert lengths.min() == 1  # the end comes first: an empty completion still teaches its end
    for ids, mask, logps, length, finished in zip(
        rollout.completion_ids, rollout.completion_mask, rollout.sampler_logps, lengths, rollout.finished, strict=True
    ):
        assert mask[:length].all() and not mask[length:].any()
        is_end = torch.isin(ids[:length], eos)
        assert not is_end[:-1].any() and is_end[-1] == finished
        assert finished or length == 12
        assert (logps[:length] < 0).all()  # the end's log-probability too
        assert (ids[length:] == llm.pad_token_id).all()


def test_only_the_tokenizers_end_token_still_ends(load):
    llm = load("qwen2")
    llm.eos_token_ids = (0,)
    rollout = draw(llm, "qwen2", generations=100, length=40)
    assert 0 < rollout.finished.float().mean() < 0.9
    assert ((rollout.completion_ids == 0) & rollout.completion_mask).sum() == rollout.finished.sum()
    assert torch.isin(
        rollout.completion_ids[rollout.completion_mask], torch.tensor(EOS)
    ).any()  # now tokens like others


def test_texts_are_the_tokens_without_special_ones(load):
    llm = load("qwen2")
    rollout = draw(llm, "qwen2")
    for text, ids, mask in zip(rollout.texts, rollout.completion_ids, rollout.completion_mask, strict=True):
        assert text == llm.tokenizer.decode(ids[mask], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "<|" not in text


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


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_sampled_tokens_have_the_models_distribution(load, family, temperature):
    """Whatever top-k, top-p, temperature or penalty the model's generation config asks for."""
    llm = load(family)
    for name, value in GENERATION.items():
        assert getattr(llm.model.generation_config, name) == value  # the model does ask for them
    example, excluded = questions(family)[0], list(llm.excluded_token_ids)
    with torch.no_grad():
        logits = llm.model(**plain_inputs(llm, example)).logits[0, -1]  # (V,)
    logits[excluded] = -torch.inf
    rollout = sample(llm, [example], 10_000, 1, temperature, seeded())
    counts = rollout.completion_ids[:, 0].bincount(minlength=len(logits))  # (V,)
    assert (counts[excluded] == 0).all() and (counts > 0).sum() > 30
    statistic, freedom = chi_square(counts, (logits / temperature).softmax(-1))
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5  # mean and standard deviation of chi-square
    off, freedom = chi_square(counts, (logits / (1.2 * temperature)).softmax(-1))
    assert off > freedom + 5 * (2 * freedom) ** 0.5  # and a temperature 20 % off would be seen


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_have_the_models_distribution_too(load, family, temperature):
    """Were they sampled from another one, their mean log-probability would not be minus the entropy."""
    llm = load(family, "float32")
    rollout = draw(llm, family, 100, 10, temperature, ignore_eos=True)
    with torch.no_grad():
        logps, entropy = token_logps_and_entropy(llm, rollout, temperature)
    surprise = logps + entropy  # (B, T), of mean 0 at each token whatever came before
    assert (surprise.mean(0).abs() < 5 * surprise.std(0) / len(surprise) ** 0.5).all()


@pytest.mark.parametrize("family", VISION)
def test_placeholders_are_never_sampled(load, family):
    """A sampled image placeholder has no picture, and breaks the next forward pass."""
    llm = load(family)
    images = list(llm.excluded_token_ids)
    with torch.no_grad():  # one of them is now by far the likeliest token wherever its neighbour was likely
        head = llm.model.get_output_embeddings().weight
        head[images] = 3 * head[50:52]
    for rollout in (sample(llm, questions(family), 1, 20, 0), draw(llm, family, generations=30)):
        assert not torch.isin(rollout.completion_ids, torch.tensor(images)).any()
        assert torch.isfinite(rollout.sampler_logps).all()
        with torch.no_grad():
            assert torch.isfinite(token_logps(llm, rollout)).all()


def test_the_edges_of_the_uniform_number_still_give_possible_tokens(load, monkeypatch):
    """A uniform number of 0 must not choose a first token of probability 0, nor one near 1 run off the end."""
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
def test_greedy_decoding_is_that_of_generate(load, family):
    llm = load(family)
    rollout = sample(llm, questions(family), 2, 30, temperature=0)
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
    with torch.no_grad():  # there is no temperature 0 to score with: they are those of temperature 1
        torch.testing.assert_close(rollout.sampler_logps, token_logps(llm, rollout, 1).float(), atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Rows that leave, buffers that stay


@pytest.mark.parametrize("family", FAMILIES)
def test_lean_and_plain_decoding_are_the_same(load, family, monkeypatch):
    llm = load(family)
    lean = draw(llm, family, temperature=0.9, seed=1)  # a number drawn on the border of two tokens could go either way
    monkeypatch.setattr(rollout_module.lean, "is_lean", lambda model: False)
    llm.decoder = None
    plain = draw(llm, family, temperature=0.9, seed=1)
    assert type(llm.decoder) is Decoder
    assert_same_rollout(lean, plain)


def many_questions():
    """33 strings of random letters, 5 to 37 long: what such a model answers has nothing in common."""
    letters = "abcdefghijklmnopqrstuvwxyz 0123456789"
    return [question("".join(random.Random(n).choices(letters, k=5 + n))) for n in range(33)]


@pytest.mark.parametrize("look_every", [1, 5, 16])
@pytest.mark.parametrize("lean", [True, False])
def test_rows_that_leave_change_nothing(load, monkeypatch, lean, look_every):
    """33 rows that end at many different tokens, decoded until all have ended, and with those that have gone.

    `look_every`: on a GPU the host looks only now and then, so rows go on past their end; nothing of that comes out.
    """
    monkeypatch.setattr(rollout_module.lean, "is_lean", lambda model: lean)
    llm, kept, keep_rows = load("llama"), [], Decoder.keep_rows

    def spy(decoder, keep):
        kept.append(len(keep))
        keep_rows(decoder, keep)

    monkeypatch.setattr(Decoder, "keep_rows", spy)
    get_decoder(llm, 33, 128).look_every = look_every
    leaving = sample(llm, many_questions(), 1, 60, temperature=0)
    assert kept and kept == sorted(kept, reverse=True) and (look_every > 1 or kept[:2] == [16, 8])
    assert len(set(leaving.completion_mask.sum(1).tolist())) > 8
    monkeypatch.setattr(rollout_module, "halve_to", lambda rows, needed: rows)  # now nobody leaves
    kept.clear()
    assert_same_rollout(leaving, sample(llm, many_questions(), 1, 60, temperature=0))
    assert set(kept) == {33}


def test_rows_that_leave_keep_their_own_past(load):
    """The same while sampling, where the random numbers depend on who is left: each row's log-probabilities fit."""
    llm = load("qwen2_vl")
    rollout = draw(llm, "qwen2_vl", generations=40, length=60)
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 20
    with torch.no_grad():
        torch.testing.assert_close(rollout.sampler_logps, token_logps(llm, rollout).float(), atol=2e-5, rtol=1e-5)


def test_halvings():
    assert [halve_to(64, needed) for needed in (64, 33, 32, 17, 16, 3, 2, 1)] == [64, 64, 32, 32, 16, 4, 2, 1]
    assert [halve_to(9, needed) for needed in (5, 4, 2, 1)] == [9, 4, 2, 1]


@pytest.mark.parametrize("lean", [True, False])
def test_a_decoder_is_used_again_for_other_shapes(load, monkeypatch, lean):
    monkeypatch.setattr(rollout_module.lean, "is_lean", lambda model: lean)
    used, family = load("qwen2_vl"), "qwen2_vl"
    draw(used, family, generations=10, length=100)
    kept = used.decoder
    shapes = [(2, 5, 1.0), (7, 30, 0.6), (1, 3, 0), (9, 90, 1.0)]
    for generations, length, temperature in shapes:
        again = draw(used, family, generations, length, temperature)
        assert_same_rollout(again, draw(load(family), family, generations, length, temperature))
    assert used.decoder is kept
    draw(used, family, generations=12, length=200)  # more than there is room for
    assert used.decoder is not kept and used.decoder.max_rows == 36 and used.decoder.slots >= 244


def test_a_larger_decoder_keeps_the_larger_of_both_sizes(load):
    llm = load("qwen2")
    get_decoder(llm, 10, 100)
    assert get_decoder(llm, 5, 300).max_rows == 10
    assert get_decoder(llm, 20, 50).slots == 304


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_sees_an_optimizer_step(load, family):
    """It decodes over fused storage, of which the parameters are views: one copy, not a second that grows stale."""
    llm = load(family)
    before, fused = draw(llm, family), llm.decoder.fused
    token_logps(llm, before).sum().backward()
    torch.optim.AdamW(llm.model.parameters(), lr=0.05).step()
    after = draw(llm, family)
    assert llm.decoder.fused is fused  # not put together anew
    assert not torch.equal(before.completion_ids, after.completion_ids)
    with torch.no_grad():
        torch.testing.assert_close(after.sampler_logps, token_logps(llm, after).float(), atol=2e-5, rtol=1e-5)


def test_the_sampler_sees_replaced_weights(load):
    """`model.to`, or a loaded state whose tensors are assigned, gives parameters new storage."""
    llm = load("llama")
    draw(llm, "llama")
    other = {name: 0.8 * weight for name, weight in llm.model.state_dict().items()}
    llm.model.load_state_dict(other, assign=True)
    after = draw(llm, "llama")
    with torch.no_grad():
        torch.testing.assert_close(after.sampler_logps, token_logps(llm, after).float(), atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Randomness


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_only_the_given_generator_is_advanced(load, temperature):
    llm, generator = load("qwen2"), seeded()
    outside, inside = torch.get_rng_state(), generator.get_state()
    sample(llm, questions("qwen2"), 3, 10, temperature, generator)
    assert torch.equal(torch.get_rng_state(), outside)
    assert torch.equal(generator.get_state(), inside) == (temperature == 0)  # greedy decoding draws no numbers


def test_same_seed_same_samples(load):
    llm = load("qwen3_vl")
    assert_same_rollout(draw(llm, "qwen3_vl"), draw(llm, "qwen3_vl"))
    assert not torch.equal(draw(llm, "qwen3_vl").completion_ids, draw(llm, "qwen3_vl", seed=1).completion_ids)


def test_completions_of_a_group_differ(load):
    rollout = draw(load("llama"), "llama", ignore_eos=True)
    assert len({tuple(row) for row in rollout.completion_ids.tolist()}) == len(rollout.completion_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts in a batch


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_in_the_batch_do_not_matter(load, family):
    """A prompt's completions are those it gets alone: padding on the left is seen by nobody."""
    llm = load(family)
    together = sample(llm, questions(family), 1, 30, temperature=0)
    for row, example in enumerate(questions(family)):
        alone = sample(llm, [example], 1, 30, temperature=0)
        mask = together.completion_mask[row]
        assert together.completion_ids[row][mask].tolist() == alone.completion_ids[0].tolist()
        torch.testing.assert_close(together.sampler_logps[row][mask], alone.sampler_logps[0], atol=2e-5, rtol=1e-5)


def test_prompts_with_and_without_pictures_go_together(load):
    llm = load("qwen2_5_vl")
    examples = [question("No picture."), *questions("qwen2_5_vl"), question("None here either, thank you.")]
    rollout = sample(llm, examples, 2, 10, 1.0, seeded())
    with torch.no_grad():
        torch.testing.assert_close(rollout.sampler_logps, token_logps(llm, rollout).float(), atol=2e-5, rtol=1e-5)


def test_encoded_prompts_give_what_examples_give(load):
    llm = load("qwen2_vl")
    encoded = sample(llm, encode_prompts(llm, questions("qwen2_vl")), 4, 10, 1.0, seeded())
    assert_same_rollout(encoded, draw(llm, "qwen2_vl", generations=4, length=10))


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_joined_rollouts_are_their_parts(load, family):
    llm = load(family)
    first = sample(llm, questions(family), 4, 6, 1.0, seeded(1))
    second = sample(llm, questions(family)[:1], 4, 20, 1.0, seeded(2))
    nothing = sample(llm, questions(family), 4, 20, 1.0, seeded(3))
    joined = join([(first, [2, 0]), (nothing, []), (second, [0])])
    rows = [8, 9, 10, 11, 0, 1, 2, 3]
    assert joined.num_generations == 4 and joined.prompt_of_row == [0] * 4 + [1] * 4 + [2] * 4
    assert joined.texts == [first.texts[row] for row in rows] + second.texts
    assert joined.finished.tolist() == first.finished[rows].tolist() + second.finished.tolist()
    assert torch.equal(joined.completion_mask.sum(1)[:8], first.completion_mask.sum(1)[rows])
    with torch.no_grad():
        torch.testing.assert_close(joined.sampler_logps, token_logps(llm, joined).float(), atol=2e-5, rtol=1e-5)
