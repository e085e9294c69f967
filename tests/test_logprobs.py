"""The log-probabilities of sampled tokens are those of a plain full forward pass, with the right gradients."""

import pytest
import torch
from plain_reference import compute_in_float64
from sampling import FAMILIES, TEMPERATURES, VISION, assert_same_gradients, draw, gradients
from small_models import plain_inputs, questions
from torch.utils.flop_counter import FlopCounterMode

import logprobs
from config import parse_args
from llms import recompute_activations
from logprobs import BlockedLogps, masked_mean, reference_logps, token_logps, token_logps_and_entropy

TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}  # transformers' RMS norm computes in float32 whatever the weights are


def plain_logits(llm, example, completion_ids):
    """(T, V) float64 logits of one completion by transformers' own forward pass: no batch, no padding, no cache."""
    inputs = plain_inputs(llm, example)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completion_ids[None]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, len(completion_ids))], 1)
    return llm.model(**inputs).logits[0, -len(completion_ids) - 1 : -1].double()


def plain_distributions(llm, rollout, examples, temperature):
    """For each row the (T, V) log-softmax it was sampled from, and its tokens."""
    for row, prompt in enumerate(rollout.prompt_of_row):
        ids = rollout.completion_ids[row][rollout.completion_mask[row]]
        logits = plain_logits(llm, examples[prompt], ids) / temperature
        logits[:, list(llm.excluded_token_ids)] = -torch.inf
        yield logits.log_softmax(-1), ids


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logps_and_entropy_equal_a_plain_forward_pass(load, family, temperature):
    llm = load(family)
    examples = questions(family)
    rollout = draw(llm, family, temperature=temperature)
    lengths = rollout.completion_mask.sum(1)
    assert len(set(rollout.prompt_mask.sum(1).tolist())) == 3 and len(set(lengths.tolist())) > 2  # ragged, both
    with torch.no_grad():
        logps, entropy = token_logps_and_entropy(llm, rollout, temperature)
        for row, (full, ids) in enumerate(plain_distributions(llm, rollout, examples, temperature)):
            expected = full.gather(1, ids[:, None])[:, 0]
            true_entropy = -(full.exp() * full).nan_to_num(0.0).sum(-1)  # 0 · −inf of an excluded token is 0
            torch.testing.assert_close(logps[row, : len(ids)].double(), expected, **TOLERANCE)
            torch.testing.assert_close(entropy[row, : len(ids)].double(), true_entropy, **TOLERANCE)
            assert (logps[row, len(ids) :] == 0).all() and (entropy[row, len(ids) :] == 0).all()


@pytest.mark.parametrize("family", VISION)
def test_logps_depend_on_the_prompts_own_picture(load, family):
    llm = load(family)
    rollout = draw(llm, family)
    with torch.no_grad():
        right = token_logps(llm, rollout)
        first, _, third = rollout.prompts.vision
        third["pixel_values"].neg_()
        changed = (token_logps(llm, rollout) - right).abs().amax(1)  # (B,)
    assert first and (changed[:6] == 0).all() and (changed[6:] > 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_of_the_prompt_gets_a_gradient(load, family):
    """The pad token too, which also ends turns inside prompts: torch gives "padding" no gradient by default."""
    llm = load(family)
    rollout = draw(llm, family)
    embedding = llm.model.get_input_embeddings().weight
    images = torch.tensor(llm.excluded_token_ids)
    (found,) = torch.autograd.grad(token_logps(llm, rollout).sum(), [embedding])
    read = rollout.prompt_ids[rollout.prompt_mask].unique()
    read = read[~torch.isin(read, images)]  # the features of a picture replace their embeddings
    assert 0 in read and llm.pad_token_id == 0
    assert (found[read] != 0).any(1).all()


def test_excluded_tokens_are_not_in_the_softmax(load):
    llm = load("qwen2_vl")
    rollout = draw(llm, "qwen2_vl")
    with torch.no_grad():
        excluded = token_logps(llm, rollout)
        llm.excluded_token_ids = ()
        everything = token_logps(llm, rollout)
    mask = rollout.completion_mask
    assert (excluded[mask] >= everything[mask]).all() and (excluded[mask] > everything[mask] + 1e-4).any()


def test_logps_of_some_rows_equal_those_rows_of_all(load):
    """A micro-batch drops the padding that its rows do not need, which changes no value."""
    llm = load("qwen2_vl")
    rollout = draw(llm, "qwen2_vl")
    with torch.no_grad():
        everything = token_logps(llm, rollout)
        for rows in ([0], [7, 2], [8, 7, 6], list(range(9))[::-1]):
            torch.testing.assert_close(token_logps(llm, rollout, rows=rows), everything[rows], **TOLERANCE)


def test_logps_under_another_model(load):
    llm, other = load("llama"), load("llama")
    with torch.no_grad():
        other.model.lm_head.weight.mul_(0.5)
        rollout = draw(llm, "llama")
        assert torch.equal(token_logps(llm, rollout, model=other.model), token_logps(other, rollout))
        assert not torch.equal(token_logps(llm, rollout, model=other.model), token_logps(llm, rollout))


@pytest.mark.parametrize("checkpointing", [[], ["--gradient_checkpointing"]])
def test_reference_logps_are_those_of_the_reference(load, checkpointing):
    """In micro-batches of a few rows, and without gradients."""
    llm, reference = load("qwen2", "float32"), load("qwen2", "float32")
    with torch.no_grad():
        reference.model.base_model.embed_tokens.weight.mul_(0.5)
    rollout = draw(llm, "qwen2")
    config = parse_args(["--micro_batch_tokens", "60", "--temperature", "0.8", *checkpointing])
    assert len(rollout.micro_batches(60)) > 2
    logps = reference_logps(llm, reference.model, rollout, config)
    assert not logps.requires_grad and logps.dtype == torch.float32
    with torch.no_grad():
        expected = token_logps(reference, rollout, 0.8)
        assert (expected - token_logps(llm, rollout, 0.8)).abs().max() > 0.1
    torch.testing.assert_close(logps, expected, **TOLERANCE)


def test_masked_mean_counts_the_masked_tokens_only():
    values, mask = torch.tensor([[1.0, 5.0], [3.0, 7.0]]), torch.tensor([[True, False], [True, False]])
    assert masked_mean(values, mask) == 2
    assert masked_mean(values, torch.zeros(2, 2, dtype=torch.bool)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_and_recomputing_change_no_gradient(load, family, monkeypatch):
    compute_in_float64(monkeypatch)
    llm = load(family)
    rollout = draw(llm, family)
    weights = torch.randn(rollout.completion_ids.shape, generator=torch.Generator().manual_seed(1))

    def run(share_prompt):
        logps = token_logps(llm, rollout, 0.9, share_prompt=share_prompt)
        return logps.detach(), gradients(llm, (logps * weights).sum())

    shared, shared_gradients = run(share_prompt=True)
    assert set(shared_gradients) == {name for name, _ in llm.model.named_parameters()}
    plain, plain_gradients = run(share_prompt=False)
    torch.testing.assert_close(plain, shared, **TOLERANCE)
    assert_same_gradients(plain_gradients, shared_gradients)
    recompute_activations(llm.model)
    llm.model.train()  # transformers recomputes in train mode only
    recomputed, recomputed_gradients = run(share_prompt=False)
    torch.testing.assert_close(recomputed, shared, **TOLERANCE)
    assert_same_gradients(recomputed_gradients, plain_gradients)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(("block", "kept"), [(4, 4 * 4 * 2), (11, 4 * 11 * 2), (3, 2**20)])
def test_tiled_logps_have_the_numerical_gradient(monkeypatch, temperature, block, kept):
    """Against numerical differentiation, in tiles of some tokens × some of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=generator).double().requires_grad_() for n in (7, 11))
    targets = torch.randint(2, 11, (7,), generator=generator)
    excluded = torch.zeros(11, dtype=torch.bool)
    excluded[:2] = True
    monkeypatch.setattr(logprobs, "BLOCK", block)
    monkeypatch.setattr(logprobs, "KEPT_BYTES", kept)
    assert len(logprobs.tiles(hidden, weight)[0]) * len(logprobs.tiles(hidden, weight)[1]) > 1

    def logps(hidden, weight):
        return BlockedLogps.apply(hidden, weight, targets, temperature, excluded)[0]

    assert torch.autograd.gradcheck(logps, (hidden, weight))
    full = (hidden @ weight.T / temperature).masked_fill(excluded, -torch.inf).log_softmax(-1)  # (N, V)
    found, entropy = BlockedLogps.apply(hidden, weight, targets, temperature, excluded)
    torch.testing.assert_close(found, full.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(full.exp() * full.masked_fill(excluded, 0.0)).sum(1))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient(frozen):
    sides = {"hidden": torch.randn(7, 5), "weight": torch.randn(11, 5)}
    for name, tensor in sides.items():
        tensor.requires_grad_(name != frozen)
    logps, _ = BlockedLogps.apply(sides["hidden"], sides["weight"], torch.arange(7), 1.0, None)
    with FlopCounterMode(display=False) as counter:
        logps.sum().backward()
    assert [name for name, tensor in sides.items() if tensor.grad is None] == [frozen]
    assert counter.get_total_flops() == 2 * (2 * 7 * 5 * 11)  # the logits again, and the other side: two products


def test_tiles_change_no_value_and_no_gradient(load, monkeypatch):
    llm = load("qwen2")
    rollout = draw(llm, "qwen2")

    def run():
        logps = token_logps(llm, rollout)
        return logps.detach(), gradients(llm, logps.sum())

    whole, whole_gradients = run()
    monkeypatch.setattr(logprobs, "KEPT_BYTES", 1)  # one token at a time
    monkeypatch.setattr(logprobs, "BLOCK", 100)
    parts, part_gradients = run()
    torch.testing.assert_close(parts, whole)
    assert_same_gradients(part_gradients, whole_gradients)


def test_tiles_cover_everything_once_within_their_memory():
    weight = torch.empty(100_000, 4, device="meta")
    for hidden in (torch.empty(9500, 4), torch.empty(9500, 4, device="meta")):  # "meta" is no CPU
        tokens, blocks = logprobs.tiles(hidden, weight)
        assert [i for part in tokens for i in range(9500)[part]] == list(range(9500))
        assert [i for block in blocks for i in range(100_000)[block]] == list(range(100_000))
        allowed = logprobs.KEPT_BYTES if hidden.device.type == "cpu" else logprobs.LOGIT_TILE_BYTES
        assert 4 * len(range(9500)[tokens[0]]) * len(range(100_000)[blocks[0]]) <= allowed


def test_logps_of_bfloat16_weights_are_computed_in_float32(load):
    """In bfloat16 a log-probability of −5 would be known to 0.03 at best, and every ratio with it."""
    llm = load("qwen2", "bfloat16")
    rollout = draw(llm, "qwen2")
    logps = token_logps(llm, rollout)
    assert logps.dtype == torch.float32
    values = logps.detach()[rollout.completion_mask]
    assert (values != values.bfloat16().float()).float().mean() > 0.9
