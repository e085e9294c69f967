"""Tiny models load like any model from the hub, are the same every time, and know the form but not the answers."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models
from arithmetic_generator import apply
from evaluator import get_evaluator
from rldatasets import DATASETS, get_dataset
from tiny_models import ANSWER, END, REASONING, RECIPES, TAGS, TINY_DEFAULTS, completion_text, tiny_model

TASKS = list(RECIPES)
BRIEF = {"examples": 24, "epochs": 1, "batch": 8, "labels": 2}  # a warm-up of three steps


def brief(task: str, **changes) -> tiny_models.Recipe:
    return dataclasses.replace(RECIPES[task], **{**BRIEF, **changes})


def options_of(task: str) -> dict:
    return TINY_DEFAULTS[task].get("dataset_options", {})


@pytest.fixture(scope="module")
def gsm8k_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {
            "question": f"Tom has {n} red pens and {n + 1} blue ones. How many?",
            "answer": f"{n} + {n + 1} = {2 * n + 1}\n#### {2 * n + 1}",
        }
        for n in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def build(tmp_path_factory, gsm8k_file):
    """-> a function that builds a task's tiny model with a warm-up of three steps, once."""
    cache = tmp_path_factory.mktemp("cache")

    def folder(task: str) -> Path:
        path = str(gsm8k_file) if task == "gsm8k" else None
        return tiny_model(task, path, options_of(task), cache, say=lambda line: None, recipe=brief(task))

    return folder


@pytest.fixture(scope="module")
def tokenizer(build):
    from transformers import AutoTokenizer

    tokenizers = {task: AutoTokenizer.from_pretrained(build(task)) for task in TASKS}
    return tokenizers.__getitem__


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# The folder


@pytest.mark.parametrize("task", TASKS)
def test_loads_through_the_auto_classes(build, task):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    folder = build(task)
    vision = DATASETS[task].modality == "vision"
    model = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_pretrained(folder)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer if vision else AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == ("Qwen2VLForConditionalGeneration" if vision else "Qwen2ForCausalLM")
    assert 0.5e6 < sum(weight.numel() for weight in model.parameters()) < 3e6
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END)
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize("task", TASKS)
def test_samples_and_scores_like_any_model(build, task, gsm8k_file):
    from llms import load_llm, token_logps
    from rollout import sample

    llm = load_llm(build(task), "cpu")
    dataset = get_dataset(task, "test", 2, path=str(gsm8k_file) if task == "gsm8k" else None, options=options_of(task))
    rollout = sample(llm, [dataset[0], dataset[1]], 3, 5, generator=torch.Generator().manual_seed(0))
    logps = token_logps(llm, rollout)
    torch.testing.assert_close(logps.detach(), rollout.sampler_logps, atol=1e-4, rtol=1e-4)


def test_pictures_keep_their_pixels_and_their_number_of_placeholders(build):
    from llms import encode_prompts, load_llm

    llm = load_llm(build("clock"), "cpu")
    dataset = get_dataset("clock", "train", 2, options=options_of("clock"))
    prompts = encode_prompts(llm, [dataset[0], dataset[1]])
    grid = prompts.vision[0]["image_grid_thw"][0].tolist()
    assert grid == [1, tiny_models.PATCHES, tiny_models.PATCHES]
    assert (prompts.ids == llm.model.config.image_token_id).sum(1).tolist() == [tiny_models.PATCHES**2 // 4] * 2
    white = 1 - 2 * (1 - np.asarray(dataset[0].images[0]) / 255)  # what mean 1, deviation 0.5 undoes
    assert np.isclose(prompts.vision[0]["pixel_values"].mean(), (white.mean() - 1), atol=1e-4)  # no resizing blurs it


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def round_trip(tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_can_be_written(tokenizer, task, text):
    text = unicodedata.normalize("NFC", text)  # Qwen2's tokenizers compose letters and their accents
    assert round_trip(tokenizer(task), text) == text


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_comes_back_as_it_was_written(tokenizer, task):
    answers = {
        "clock": [
            f"{hour:02}:{minute:02}:{second:02}"
            for hour in range(1, 13)
            for minute in range(60)
            for second in (0, 7, 59)
        ],
        "correlation": [f"{hundredths / 100:.2f}" for hundredths in range(-100, 101)],
    }.get(task, [str(number) for number in (*range(-20, 120), 1080, 123456)])
    for answer in answers:
        text = completion_text("a + b", answer)
        assert round_trip(tokenizer(task), text) == text


@pytest.mark.parametrize(
    ("task", "answer", "tokens"), [("clock", "08:15:30", 6), ("correlation", "-0.42", 3), ("arithmetic", "17", 1)]
)
def test_answers_and_tags_are_few_tokens(tokenizer, task, answer, tokens):
    """AutoTokenizer once put Qwen2's way of cutting texts in place of the saved one, and 17 became two tokens."""

    def count(text: str) -> int:
        return len(tokenizer(task)(text, add_special_tokens=False)["input_ids"])

    assert count(answer) == tokens
    assert [count(tag) for tag in TAGS] == [1, 1, 1]
    dataset = get_dataset(task, "train", 40, options=options_of(task))
    for index in range(40):
        text = completion_text(*RECIPES[task].noise(dataset.solution(index), dataset[index].answer, random.Random(0)))
        assert count(text) < TINY_DEFAULTS[task]["max_completion_length"]  # one more ends it


def test_chat_template_writes_roles_in_order(tokenizer):
    messages = get_dataset("clock", "train", 1, options=options_of("clock"))[0].messages
    text = tokenizer("clock").apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    system, question = messages[0]["content"], messages[1]["content"][1]["text"]
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == f"<|system|>{system}{END}<|user|>{picture}{question}{END}<|assistant|>"
    without = tokenizer("clock").apply_chat_template(messages, tokenize=False)
    assert without == text.removesuffix("<|assistant|>")


def test_a_completion_is_in_the_asked_format():
    evaluator = get_evaluator("clock")
    rewards, _ = evaluator.compute_rewards([completion_text("I read the three hands.", "08:15:30")], ["08:15:30"])
    assert rewards.sum() == 4.0  # the most there is


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def test_the_second_time_it_is_taken_from_the_cache(tmp_path):
    said = []
    first = tiny_model("arithmetic", cache_dir=tmp_path, say=said.append, recipe=brief("arithmetic"))
    assert "no tiny model for arithmetic yet" in said[0]
    assert "ready after" in said[-1]
    written = (first / "model.safetensors").stat().st_mtime_ns
    said.clear()
    assert tiny_model("arithmetic", cache_dir=tmp_path, say=said.append, recipe=brief("arithmetic")) == first
    assert said == []
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in first.parent.iterdir()] == [first.name]  # nothing half-made is left beside it


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "elsewhere"))
    folder = tiny_model("arithmetic", say=lambda line: None, recipe=brief("arithmetic", examples=8))
    assert folder.is_relative_to(tmp_path / "elsewhere")


def test_whatever_makes_another_model_makes_another_key(gsm8k_file, tmp_path):
    def key(task="arithmetic", path=None, options=None, **changes):
        recipe = brief(task, **changes)
        return tiny_models.cache_key(tiny_models.training_examples(task, path, options, recipe.examples), recipe)

    changed = tmp_path / "train.jsonl"
    changed.write_text(gsm8k_file.read_text().replace("Tom has 20", "Tim has 20"), encoding="utf-8")
    keys = [
        key(),
        key(options={"max_number": 20}),
        key(learning_rate=1e-4),
        key(examples=25),
        key(noise=tiny_models.wrong_time),
        key("clock", options={"size": 56}),
        key("clock", options={"size": 48}),
        key("gsm8k", path=str(gsm8k_file)),
        key("gsm8k", path=str(changed)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_what_was_interrupted_is_never_used(tmp_path, monkeypatch):
    """A warm-up that was killed once left a folder of random weights that the next run took for the warm model."""
    monkeypatch.setattr(tiny_models, "warm_up", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tiny_model("arithmetic", cache_dir=tmp_path, say=lambda line: None, recipe=brief("arithmetic"))
    assert list((tmp_path / "tiny").iterdir()) == []
    monkeypatch.undo()
    said = []
    folder = tiny_model("arithmetic", cache_dir=tmp_path, say=said.append, recipe=brief("arithmetic"))
    assert said and (folder / "model.safetensors").is_file()


def test_what_killed_builds_left_is_cleared_away_and_what_others_build_is_not(tmp_path):
    said, recipe = lambda line: None, brief("arithmetic", examples=8)
    folder = tiny_model("arithmetic", cache_dir=tmp_path, say=said, recipe=recipe)
    killed, at_work = (folder.with_name(f".{folder.name}-{name}") for name in ("killed", "at_work"))
    folder.rename(killed)
    at_work.mkdir()
    os.utime(killed, (time.time() - 7200,) * 2)
    tiny_model("arithmetic", cache_dir=tmp_path, say=said, recipe=recipe)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, at_work.name}


def test_two_processes_may_build_the_same_model(tmp_path):
    for name, content in (("aside", "late"), ("folder", "first")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(content)
    tiny_models.rename_into_place(tmp_path / "aside", tmp_path / "folder")
    assert (tmp_path / "folder" / "model").read_text() == "first"
    with pytest.raises(OSError, match="nowhere"):  # any other trouble is not swallowed
        tiny_models.rename_into_place(tmp_path / "aside", tmp_path / "nowhere" / "folder")


@pytest.mark.parametrize("task", ["arithmetic", "correlation"])
def test_is_the_same_every_time_and_leaves_no_trace(task, tmp_path):
    recipe = brief(task, examples=16)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    folders = []
    for number in range(2):
        folders.append(tiny_model(task, None, options_of(task), tmp_path / str(number), lambda line: None, recipe))
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
        torch.rand(1 + number), random.random()  # whatever state the program is in
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert folders[0].name == folders[1].name
    assert weights_of(folders[0]) == weights_of(folders[1])


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="no tiny model for the task 'chess'"):
        tiny_model("chess")


# ---------------------------------------------------------------------------------------------------------------------
# The warm-up


def test_learns_the_form(tmp_path):
    """The completion's loss falls far below that of a uniform guess, and the format is what was learned."""
    from llms import load_llm
    from rollout import sample

    recipe = brief("arithmetic", examples=640, batch=16, labels=1, layers=2, learning_rate=4e-3)
    llm = load_llm(tiny_model("arithmetic", cache_dir=tmp_path, say=lambda line: None, recipe=recipe), "cpu")
    dataset = get_dataset("arithmetic", "test", 16)
    examples = [dataset[index] for index in range(16)]
    rollout = sample(llm, examples, 1, 32, temperature=0)
    assert -(rollout.sampler_logps.sum() / rollout.completion_mask.sum()) < 1.5  # uniform over the vocabulary: 6.3
    assert sum(text.startswith(REASONING) and ANSWER in text for text in rollout.texts) >= 12


@pytest.mark.parametrize("task", [task for task in TASKS if task != "gsm8k"])
def test_labels_are_rough_and_readable(task):
    """The warm-up must not hand over what reinforcement learning is to find: few labels are right, all are possible."""
    dataset, evaluator, rng = (
        get_dataset(task, "train", 200, options=options_of(task)),
        get_evaluator(task),
        random.Random(0),
    )
    truths = [dataset[index].answer for index in range(200)]
    labels = [completion_text(*RECIPES[task].noise(dataset.solution(i), truth, rng)) for i, truth in enumerate(truths)]
    rewards, metrics = evaluator.compute_rewards(labels, truths)
    form = {"clock": 1.0, "correlation": 1.0, "arithmetic": 2.0}[task]  # everything but the answer itself
    assert (rewards[:, 1:].sum(1) == form).all()
    if task == "clock":
        assert 60 < metrics["mean_abs_error_minutes"] < 120
    elif task == "correlation":
        assert 0.2 < metrics["mean_abs_error"] < 0.5
    else:
        assert 0.02 < metrics["accuracy"] < 0.4


def test_labels_of_arithmetic_calculate_rightly_and_choose_operations_at_random():
    chosen, told, rng = set(), set(), random.Random(0)
    for _ in range(200):
        wrong, answer = RECIPES["arithmetic"].noise("12 / 3 = 4\n4 + 4 = 8", "8", rng)
        first, second = (line.split() for line in wrong.split("\n"))
        for a, operator, b, _, result in (first, second):
            assert apply(operator, int(a), int(b)) == int(result) and 1 <= int(result) <= 20
        assert first[4] == second[0] and second[4] == answer
        chosen.add(first[1])
        told.add(wrong == "12 / 3 = 4\n4 + 4 = 8")
    assert chosen == {"+", "-", "/"} and told == {True, False}  # 12 * 3 is more than there may be


def test_every_example_is_shown_once_an_epoch():
    recipe = brief("clock", batch=4, epochs=3)
    shown = [batch for batch in tiny_models.batches(10, recipe)]
    assert [len(batch) for batch in shown] == [4, 4] * 3  # what does not fill a batch is left out of this epoch
    assert all(len({*one, *other}) == 8 for one, other in zip(shown[::2], shown[1::2], strict=True))
    assert shown[:2] != shown[2:4]
    assert len(list(tiny_models.batches(3, recipe))) == 3  # fewer examples than a batch holds


# ---------------------------------------------------------------------------------------------------------------------
# What main.py takes from here


def test_defaults_are_flags_and_options_that_exist():
    from main import build_parser
    from rldatasets import dataset_options

    flags = vars(build_parser().parse_args([]))
    assert set(TINY_DEFAULTS) == set(DATASETS) == set(RECIPES)
    for task, defaults in TINY_DEFAULTS.items():
        assert set(defaults) <= set(flags)
        assert set(defaults.get("dataset_options", {})) <= set(dataset_options(task))


def test_defaults_are_read_without_torch():
    code = "import sys, tiny_models; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    folder = Path(tiny_models.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0
