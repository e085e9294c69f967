"""Models of every family load, and the log-probabilities of tokens are those of a plain full forward pass."""

import json
import shutil

import pytest
import torch
from plain_reference import compute_in_float64
from small_models import EOS, FAMILIES, TEXT, VISION, plain_inputs, question, questions

import llms
import tiny_models
from llms import ChunkedLogps, ModelError, encode_prompts, load_llm, token_logps, token_logps_and_entropy
from rollout import sample

TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}  # transformers' RMS norm computes in float32 whatever the weights are


def roll(llm, family, temperature=1.0, generations=3, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return sample(llm, questions(family), generations, length, temperature, generator)


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


def gradients(llm, loss) -> dict[str, torch.Tensor]:
    llm.model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in llm.model.named_parameters() if weight.grad is not None}


def assert_same_gradients(one: dict, other: dict, atol=1e-5):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_takes_a_training_step(load, family):
    llm = load(family, "float32")
    assert llm.is_vision == (llm.processor is not None) == (family in VISION)
    assert llm.dtype == torch.float32 and not llm.model.training
    before = {name: weight.detach().clone() for name, weight in llm.model.named_parameters()}
    rollout = roll(llm, family)
    optimizer = torch.optim.AdamW(llm.model.parameters(), lr=1e-3, weight_decay=0.0)
    advantages = torch.linspace(-1, 1, len(rollout.completion_ids))[:, None]
    logps = token_logps(llm, rollout)
    found = gradients(llm, -(logps * advantages).sum())
    # A key's bias adds the same to all scores of a query, so softmax takes it away; Qwen2.5-VL's too.
    for name, weight in llm.model.named_parameters():
        assert torch.isfinite(found[name]).all(), name
        assert (found[name] != 0).any() or "k_proj.bias" in name, name
        assert weight.grad is not None
    optimizer.step()
    assert all((weight != before[name]).any() for name, weight in llm.model.named_parameters() if "k_proj" not in name)
    after = token_logps(llm, rollout)
    assert (after * advantages).sum() > (logps * advantages).sum()  # the step went uphill


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_the_one_asked_for(load, attention):
    llm = load("qwen2", attention=attention)
    assert llm.attn_implementation == attention == llm.model.config._attn_implementation


def test_flash_attention_is_chosen_only_where_it_runs(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert llms.pick_attention("eager", cuda, torch.bfloat16) == "eager"
    monkeypatch.setattr(llms.importlib.util, "find_spec", lambda name: None)
    assert llms.pick_attention(None, cuda, torch.bfloat16) == "sdpa"
    monkeypatch.setattr(llms.importlib.util, "find_spec", lambda name: name == "flash_attn")
    assert llms.pick_attention("auto", cuda, torch.bfloat16) == "flash_attention_2"
    assert llms.pick_attention("auto", cuda, torch.float32) == "sdpa"  # flash-attn knows half precision only
    assert llms.pick_attention("auto", cpu, torch.bfloat16) == "sdpa"


def test_ends_are_those_of_tokenizer_and_generation_config(load, model_folder):
    """Qwen2.5-Instruct names one in each; a sampler that knew only one of them would run on past the other."""
    llm = load("qwen2")
    assert llm.tokenizer.eos_token_id == 0 and 0 not in EOS
    assert llm.eos_token_ids == (0, *EOS)


@pytest.mark.parametrize("eos", [5, None])
def test_ends_when_the_generation_config_names_one_or_none(load, model_folder, tmp_path, eos):
    folder = shutil.copytree(model_folder("qwen2"), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos} if eos else {}))
    assert load_llm(folder, "cpu").eos_token_ids == ((0, 5) if eos else (0,))


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_are_excluded(load, family):
    llm = load(family)
    if family in TEXT:
        assert llm.excluded_token_ids == () and llm.excluded_mask() is None
    else:
        names = llm.tokenizer.convert_ids_to_tokens(list(llm.excluded_token_ids))
        assert names == ["<|image_pad|>", "<|video_pad|>"]
        assert llm.excluded_mask().nonzero()[:, 0].tolist() == list(llm.excluded_token_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: each one line that says what to do


def refusal(model_path, **options) -> str:
    with pytest.raises(ModelError) as caught:
        load_llm(model_path, "cpu", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refuses_a_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal(str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in message and "check the name" in message


def test_refuses_a_folder_without_a_model(tmp_path):
    assert "no config.json" in refusal(tmp_path)


def test_refuses_qwen_vl_chat_and_names_its_successor():
    for name in ("Qwen/Qwen-VL-Chat", "/models/Qwen-VL-Chat/"):
        assert "--model_path Qwen/Qwen2.5-VL-3B-Instruct" in refusal(name)


def test_refuses_remote_code(tmp_path):
    code = "raise SystemExit('executed')\n"
    (tmp_path / "code.py").write_text(code)
    config = {"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "never executed" in refusal(tmp_path)


def test_refuses_pickled_weights(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("qwen2"), tmp_path / "model")
    weights = load_llm(folder, "cpu").model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "safetensors" in refusal(folder)


def test_refuses_a_damaged_config(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("qwen2"), tmp_path / "model")
    (folder / "config.json").write_text("{")
    assert str(folder) in refusal(folder)


def test_refuses_a_device_that_is_not_there():
    with pytest.raises(ModelError, match="cannot be used"):
        llms.pick_device("cuda:99")


def gated(*args, **options):
    raise OSError(
        "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/x/y.\n"
        "401 Client Error. Cannot access gated repo. Please log in."
    )


def test_says_how_to_get_at_a_gated_model(monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    assert "HF_TOKEN" in refusal("meta-llama/Llama-3.2-1B-Instruct")


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGINGFACE_TOKEN", None])
def test_the_token_is_used_where_there_is_one(model_folder, monkeypatch, variable):
    import transformers

    for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "hf_secret")
    passed = {}

    def spy(auto_class):
        original = auto_class.from_pretrained

        def from_pretrained(*args, **options):
            passed.setdefault(auto_class.__name__, options)  # ours; they call each other after that
            return original(*args, **options)

        monkeypatch.setattr(auto_class, "from_pretrained", from_pretrained)

    names = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")
    for name in names:
        spy(getattr(transformers, name))
    load_llm(model_folder("qwen2_vl"), "cpu")
    for name in names:
        assert passed[name]["token"] == ("hf_secret" if variable else None)
        assert passed[name]["trust_remote_code"] is False
    assert passed["AutoModelForImageTextToText"]["use_safetensors"] is True


def test_refuses_a_picture_for_a_text_model(load):
    with pytest.raises(ModelError, match="reads text only"):
        encode_prompts(load("qwen2"), questions("qwen2_vl"))


def test_refuses_a_head_that_it_would_score_wrongly(load, model_folder, tmp_path):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "logits_scaling": 8.0}))  # as Granite has
    assert "logits_scaling" in refusal(folder)
    llm = load("llama")
    llm.model.lm_head.bias = torch.nn.Parameter(torch.ones(llm.model.lm_head.out_features))  # as Phi has
    with pytest.raises(ModelError, match="output embedding"):
        llms.refuse_unknown_head(llm.model, "phi")


# ---------------------------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_a_plain_transformers_model(load, family, tmp_path):
    """After sampling the weights are views of fused storage, which must not show in the files."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    llm = load(family, "float32")
    rollout = roll(llm, family)
    with torch.no_grad():
        for weight in llm.model.parameters():
            weight.mul_(1.01)
        expected = token_logps(llm, rollout)
    llm.save(tmp_path)
    kind = AutoModelForImageTextToText if llm.is_vision else AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path)
    weights = dict(model.named_parameters())
    assert weights.keys() == dict(llm.model.named_parameters()).keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in llm.model.named_parameters())
    with torch.no_grad():
        assert torch.equal(token_logps(llm, rollout, model=model), expected)
    reader = (AutoProcessor if llm.is_vision else AutoTokenizer).from_pretrained(tmp_path)
    tokenizer = reader.tokenizer if llm.is_vision else reader
    assert tokenizer.get_vocab() == llm.tokenizer.get_vocab()
    assert llms.load_llm(tmp_path, "cpu").eos_token_ids == llm.eos_token_ids
    saved = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert saved < 1.2 * sum(weight.numel() * 4 for weight in llm.model.parameters())  # no storage written twice


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def test_masks_come_from_lengths_where_pad_is_the_end_token(load):
    """These tokenizers pad with the end-of-sequence token, which the chat template also writes into every prompt."""
    llm = load("qwen2")
    assert llm.pad_token_id == llm.tokenizer.eos_token_id == 0
    prompts = encode_prompts(llm, questions("qwen2"))
    for row, example in enumerate(questions("qwen2")):
        ids = llm.tokenizer(llms.chat_text(llm, example))["input_ids"]
        assert 0 in ids  # an end token that is no padding
        assert prompts.ids[row][prompts.mask[row]].tolist() == ids
        assert not prompts.mask[row, : -len(ids)].any() and prompts.mask[row, -len(ids) :].all()
        assert prompts.positions[row][prompts.mask[row]].tolist() == list(range(len(ids)))


def test_the_chat_template_ends_where_the_assistant_begins(load):
    text = llms.chat_text(load("qwen2"), question("7 + 5 ="))
    assert text == f"<|user|>7 + 5 ={tiny_models.END}<|assistant|>"
    text = llms.chat_text(load("qwen2_vl"), questions("qwen2_vl")[1])
    assert text.count("<|image_pad|>") == 2


def test_a_model_without_chat_template_gets_plain_text(load):
    llm = load("qwen2")
    llm.tokenizer.chat_template = None
    assert llms.chat_text(llm, question("7 + 5 =")) == "7 + 5 =\n\n"


@pytest.mark.parametrize("family", VISION)
def test_pictures_count_as_many_tokens_as_they_have(load, family):
    llm = load(family)
    prompts = encode_prompts(llm, [*questions(family), question("No picture at all.")])
    image = llm.model.config.image_token_id
    for ids, one in zip(prompts.ids, prompts.vision, strict=True):
        merged = one["image_grid_thw"].prod(1).sum() // 4 if one else 0
        assert (ids == image).sum() == merged
    assert [len(one["image_grid_thw"]) if one else 0 for one in prompts.vision] == [1, 2, 1, 0]
    assert len({int((ids == image).sum()) for ids in prompts.ids}) == 4  # pictures of different sizes


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_logps_and_entropy_are_those_of_a_plain_forward_pass(load, family, temperature):
    llm = load(family)
    examples = questions(family)
    rollout = roll(llm, family, temperature)
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
def test_the_picture_matters_and_each_prompt_sees_its_own(load, family):
    llm = load(family)
    rollout = roll(llm, family)
    with torch.no_grad():
        right = token_logps(llm, rollout)
        first, _, third = rollout.prompts.vision
        third["pixel_values"].neg_()
        changed = (token_logps(llm, rollout) - right).abs().amax(1)  # (B,)
    assert first and (changed[:6] == 0).all() and (changed[6:] > 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_that_is_read_is_trained(load, family):
    """The pad token too, which stands in prompts as an end of turn: torch gives "padding" no gradient by default."""
    llm = load(family)
    rollout = roll(llm, family)
    embedding = llm.model.get_input_embeddings().weight
    images = torch.tensor(llm.excluded_token_ids)
    (found,) = torch.autograd.grad(token_logps(llm, rollout).sum(), [embedding])
    read = rollout.prompt_ids[rollout.prompt_mask].unique()
    read = read[~torch.isin(read, images)]  # a picture's features stand in their place
    assert 0 in read and llm.pad_token_id == 0
    assert (found[read] != 0).any(1).all()


def test_excluded_tokens_are_not_in_the_softmax(load):
    llm = load("qwen2_vl")
    rollout = roll(llm, "qwen2_vl")
    with torch.no_grad():
        excluded = token_logps(llm, rollout)
        llm.excluded_token_ids = ()
        everything = token_logps(llm, rollout)
    mask = rollout.completion_mask
    assert (excluded[mask] >= everything[mask]).all() and (excluded[mask] > everything[mask] + 1e-4).any()


def test_logps_of_some_rows_are_those_rows(load):
    """A micro-batch drops the padding that its rows do not need; nothing may change."""
    llm = load("qwen2_vl")
    rollout = roll(llm, "qwen2_vl")
    with torch.no_grad():
        everything = token_logps(llm, rollout)
        for rows in ([0], [7, 2], [8, 7, 6], list(range(9))[::-1]):
            torch.testing.assert_close(token_logps(llm, rollout, rows=rows), everything[rows], **TOLERANCE)


def test_logps_under_another_model(load):
    llm, other = load("llama"), load("llama")
    with torch.no_grad():
        other.model.lm_head.weight.mul_(0.5)
        rollout = roll(llm, "llama")
        assert torch.equal(token_logps(llm, rollout, model=other.model), token_logps(other, rollout))
        assert not torch.equal(token_logps(llm, rollout, model=other.model), token_logps(llm, rollout))


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_prompts_and_recomputing_layers_change_no_value_and_no_gradient(load, family, monkeypatch):
    from main import enable_checkpointing

    compute_in_float64(monkeypatch)
    llm = load(family)
    rollout = roll(llm, family)
    weights = torch.randn(rollout.completion_ids.shape, generator=torch.Generator().manual_seed(1))

    def run(share_prompt):
        logps = token_logps(llm, rollout, 0.9, share_prompt=share_prompt)
        return logps.detach(), gradients(llm, (logps * weights).sum())

    shared, shared_gradients = run(share_prompt=True)
    assert set(shared_gradients) == {name for name, _ in llm.model.named_parameters()}
    plain, plain_gradients = run(share_prompt=False)
    torch.testing.assert_close(plain, shared, **TOLERANCE)
    assert_same_gradients(plain_gradients, shared_gradients)
    enable_checkpointing(llm.model)
    llm.model.train()  # transformers recomputes in train mode only
    recomputed, recomputed_gradients = run(share_prompt=False)
    torch.testing.assert_close(recomputed, shared, **TOLERANCE)
    assert_same_gradients(recomputed_gradients, plain_gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_written_out_are_those_of_transformers(load, family, monkeypatch):
    """The loss through lean.py and through the model's own modules: the same values and gradients, of every weight."""
    compute_in_float64(monkeypatch)
    llm = load(family)
    rollout = roll(llm, family)
    weights = torch.randn(rollout.completion_ids.shape, generator=torch.Generator().manual_seed(1)).double()
    calls, written_out = [], llms.lean.forward
    monkeypatch.setattr(llms.lean, "forward", lambda *args: calls.append(1) or written_out(*args))

    def run():
        logps = token_logps(llm, rollout, 0.9)
        return logps.detach(), gradients(llm, (logps * weights).sum())

    lean_logps, lean_gradients = run()
    assert len(calls) == (2 if family in TEXT else 1)  # prompts with pictures go through the model's own modules
    monkeypatch.setattr(llms, "computes_lean", lambda model: False)
    logps, expected = run()
    assert len(calls) <= 2
    torch.testing.assert_close(lean_logps, logps, rtol=1e-9, atol=1e-11)
    assert lean_gradients.keys() == expected.keys() == dict(llm.model.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            lean_gradients[name], gradient, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_lean_layers_leave_other_attention_alone(load):
    """What was asked for by --attn_implementation is what runs."""
    assert llms.computes_lean(load("qwen2").model) and not llms.computes_lean(load("qwen2", attention="eager").model)


def test_gradients_of_the_norm():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 4, 6, generator=generator).double(), torch.randn(6, generator=generator).double()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: llms.lean.RMSNorm.apply(x, weight, 1e-3), (x, weight))
    expected = torch.nn.functional.rms_norm(x, (6,), weight, 1e-3)
    torch.testing.assert_close(llms.lean.RMSNorm.apply(x, weight, 1e-3), expected)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_gradients_of_chunked_logps(monkeypatch, temperature):
    """Against numerical differentiation, two tokens of seven at a time."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=generator).double().requires_grad_() for n in (7, 11))
    targets = torch.randint(2, 11, (7,), generator=generator)
    excluded = torch.zeros(11, dtype=torch.bool)
    excluded[:2] = True
    monkeypatch.setattr(llms, "LOGIT_CHUNK_BYTES", 4 * 11 * 2)
    assert len(llms.chunks(hidden, weight)) == 4

    def logps(hidden, weight):
        return ChunkedLogps.apply(hidden, weight, targets, temperature, excluded)[0]

    assert torch.autograd.gradcheck(logps, (hidden, weight))
    logits = (hidden @ weight.T / temperature).masked_fill(excluded, -torch.inf)
    torch.testing.assert_close(logps(hidden, weight), logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])


def test_chunks_do_not_change_the_result(load, monkeypatch):
    llm = load("qwen2")
    rollout = roll(llm, "qwen2")

    def run():
        logps = token_logps(llm, rollout)
        return logps.detach(), gradients(llm, logps.sum())

    whole, whole_gradients = run()
    monkeypatch.setattr(llms, "LOGIT_CHUNK_BYTES", 1)  # one token at a time
    parts, part_gradients = run()
    torch.testing.assert_close(parts, whole)
    assert_same_gradients(part_gradients, whole_gradients)


def test_logps_of_bfloat16_weights_are_computed_in_float32(load):
    """In bfloat16 a log-probability of −5 would be known to 0.03 at best, and every ratio with it."""
    llm = load("qwen2", "bfloat16")
    rollout = roll(llm, "qwen2")
    logps = token_logps(llm, rollout)
    assert logps.dtype == torch.float32
    values = logps.detach()[rollout.completion_mask]
    assert (values != values.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("family", VISION)
def test_prompts_encoded_together_are_those_encoded_alone(load, family):
    """Each keeps its own pictures, of which there are none, one or two."""
    llm = load(family)
    examples = [question("Nothing to see."), *questions(family)]
    together = encode_prompts(llm, examples)
    for row, example in enumerate(examples):
        one, alone = together.select([row]), encode_prompts(llm, [example])
        assert torch.equal(one.ids, alone.ids) and torch.equal(one.positions, alone.positions)
        assert one.vision[0].keys() == alone.vision[0].keys()
        assert all(torch.equal(one.vision[0][name], tensor) for name, tensor in alone.vision[0].items())
