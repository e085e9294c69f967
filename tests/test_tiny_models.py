"""Tiny models load like any model from the hub, are reproducible, and know the format but not the answers."""

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
from evaluator import BEFORE_ANSWER, BEFORE_REASONING, asked_format, get_evaluator
from rldatasets import DATASETS, dataset_options, get_dataset
from tiny_models import END, FORMAT_TOKENS, RECIPES, tiny_model

TASKS = list(RECIPES)


def brief(task: str, **changes) -> tiny_models.Recipe:
    """The task's recipe with a warm-up of three steps."""
    return dataclasses.replace(RECIPES[task], **{"examples": 24, "epochs": 1, "batch": 8, "labels": 2, **changes})


def options_of(task: str) -> dict:
    return RECIPES[task].defaults.get("dataset_options", {})


def ignore(line: str) -> None:
    """Takes the lines of progress that a test does not look at."""


@pytest.fixture(scope="module")
def problems_file(tmp_path_factory) -> Path:
    """40 problems in GSM8K's format, for the tasks that read files."""
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
def path_of(problems_file):
    """-> a function from a task to its local data, None for a task that generates its examples."""
    return lambda task: str(problems_file) if DATASETS[task].reads_files else None


@pytest.fixture(scope="module")
def build(tmp_path_factory, path_of):
    """-> a function that builds a task's tiny model, once, with a warm-up of three steps."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda task: tiny_model(task, path_of(task), options_of(task), cache, ignore, brief(task))


@pytest.fixture(scope="module")
def tokenizer(build):
    from transformers import AutoTokenizer

    tokenizers = {task: AutoTokenizer.from_pretrained(build(task)) for task in TASKS}
    return tokenizers.__getitem__


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# The folder


@pytest.mark.slow
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
def test_sampler_and_trainer_agree(build, task, path_of):
    from llms import load_llm
    from logprobs import token_logps
    from rollout import Sampler

    llm = load_llm(build(task), "cpu")
    dataset = get_dataset(task, "test", 2, path=path_of(task), options=options_of(task))
    rollout = Sampler(llm, seed=0).sample([dataset[0], dataset[1]], 3, 5, temperature=1.0)
    logps = token_logps(llm, rollout)
    torch.testing.assert_close(logps.detach(), rollout.sampler_logps, atol=1e-4, rtol=1e-4)


def test_pictures_are_not_resized(build):
    from llms import encode_prompts, load_llm

    llm = load_llm(build("clock"), "cpu")
    dataset = get_dataset("clock", "train", 2, options=options_of("clock"))
    prompts = encode_prompts(llm, [dataset[0], dataset[1]])
    grid = prompts.vision[0]["image_grid_thw"][0].tolist()
    assert grid == [1, tiny_models.PATCHES, tiny_models.PATCHES]
    assert (prompts.ids == llm.model.config.image_token_id).sum(1).tolist() == [tiny_models.PATCHES**2 // 4] * 2
    pixels = np.asarray(dataset[0].images[0]) / 255  # (H, W, 3)
    normalized = prompts.vision[0]["pixel_values"].numpy()  # (patches, …) with mean 1 and standard deviation 0.5
    assert np.allclose(np.sort(normalized.flatten()), np.sort((pixels.flatten() - 1) / 0.5), atol=1e-4)


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
def test_every_answer_can_be_written(tokenizer, task, path_of):
    dataset = get_dataset(task, "train", 30, path=path_of(task), options=options_of(task))
    answers = {dataset[index].answer for index in range(30)} | {"-20", "-1.00", "0.07", "1080", "123456", "12:00:59"}
    for answer in answers:
        text = asked_format("a + b", answer)
        assert round_trip(tokenizer(task), text) == text


def count_tokens(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("task", "answer", "tokens"), [("clock", "08:15:30", 6), ("correlation", "-0.42", 3), ("arithmetic", "17", 1)]
)
def test_answers_are_few_tokens(tokenizer, task, answer, tokens):
    """AutoTokenizer once replaced the saved pre-tokenizer by Qwen2's, and 17 became two tokens."""
    assert count_tokens(tokenizer(task), answer) == tokens


@pytest.mark.parametrize("task", TASKS)
def test_labels_fit_into_a_completion(tokenizer, task, path_of):
    assert [count_tokens(tokenizer(task), text) for text in FORMAT_TOKENS] == [1, 1, 1]
    dataset, recipe = get_dataset(task, "train", 30, path=path_of(task), options=options_of(task)), RECIPES[task]
    for index in range(30):
        label = asked_format(*recipe.noise(dataset.solution(index), dataset[index].answer, random.Random(0)))
        assert count_tokens(tokenizer(task), label) < recipe.defaults["max_completion_length"]  # room for the end token


def test_chat_template_writes_roles_in_order(tokenizer):
    messages = get_dataset("clock", "train", 1, options=options_of("clock"))[0].messages
    text = tokenizer("clock").apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    system, question = messages[0]["content"], messages[1]["content"][1]["text"]
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == f"<|system|>{system}{END}<|user|>{picture}{question}{END}<|assistant|>"
    without = tokenizer("clock").apply_chat_template(messages, tokenize=False)
    assert without == text.removesuffix("<|assistant|>")


def test_asked_format_gets_the_highest_reward():
    rewards, _ = get_evaluator("clock").compute_rewards([asked_format("I read the hands.", "08:15:30")], ["08:15:30"])
    assert rewards.sum() == 4.0


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def test_second_call_reads_the_cache(tmp_path):
    lines = []
    first = tiny_model("arithmetic", cache_dir=tmp_path, say=lines.append, recipe=brief("arithmetic"))
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert lines
    lines.clear()
    assert tiny_model("arithmetic", cache_dir=tmp_path, say=lines.append, recipe=brief("arithmetic")) == first
    assert lines == []
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in first.parent.iterdir()] == [first.name]  # no unfinished build beside it


def test_grpo_cache_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "elsewhere"))
    folder = tiny_model("arithmetic", say=ignore, recipe=brief("arithmetic", examples=8))
    assert folder.is_relative_to(tmp_path / "elsewhere")


def test_user_without_home_is_refused(monkeypatch):
    """A container may run under a user id that has no entry in the password database, where Path.home() raises."""
    pwd = pytest.importorskip("pwd")

    def no_entry(uid: int):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("GRPO_CACHE", raising=False)
    with pytest.raises(ValueError, match="GRPO_CACHE"):
        tiny_model("arithmetic", say=ignore, recipe=brief("arithmetic", examples=8))


def test_unwritable_cache_is_refused_with_status_2(tmp_path, monkeypatch, capsys):
    from main import main

    (tmp_path / "file").write_text("a folder cannot be made in a file")
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "file"))
    flags = ["--model_path", "tiny", "--dataset_name", "arithmetic", "--output_dir", str(tmp_path / "run")]
    assert main(flags) == 2
    message = capsys.readouterr().err
    assert "GRPO_CACHE" in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_cached_files_have_the_mode_of_the_umask(tmp_path, umask):
    """safetensors gives its files mode 600: a colleague who shared the cache was told that there were no weights."""
    before = os.umask(umask)
    try:
        folder = tiny_model("arithmetic", None, None, tmp_path, ignore, brief("arithmetic", examples=8))
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}


def test_each_input_of_the_model_changes_the_key(problems_file, tmp_path):
    def key(task="arithmetic", path=None, options=None, **changes):
        recipe = brief(task, **changes)
        return tiny_models.cache_key(tiny_models.training_examples(task, path, options, recipe), recipe)

    changed = tmp_path / "train.jsonl"
    changed.write_text(problems_file.read_text().replace("Tom has 20", "Tim has 20"), encoding="utf-8")
    keys = [
        key(),
        key(options={"max_number": 20}),
        key(learning_rate=1e-4),
        key(examples=25),
        key(noise=tiny_models.noisy_time),
        key("clock", options={"size": 56}),
        key("clock", options={"size": 48}),
        key("clock_feedback", options={"size": 56}),
        key("clock_feedback", options={"size": 56, "view": "side"}),  # the same examples, other observations
        key("gsm8k", path=str(problems_file)),
        key("gsm8k", path=str(changed)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == key(seconds=1) == key(defaults={}) == keys[0]  # neither changes the weights
    assert key("look") == key("look", options={"feedback": "blank"})  # a control starts from the same model


def test_key_hashes_the_code_below_the_recipes(tmp_path, monkeypatch):
    def key_with(old: str, new: str) -> str:
        edited = tmp_path / "tiny_models.py"
        edited.write_text(source.replace(old, new), encoding="utf-8")
        monkeypatch.setattr(tiny_models, "__file__", str(edited))
        return tiny_models.cache_key(dataset, brief("arithmetic"))

    source = Path(tiny_models.__file__).read_text(encoding="utf-8")
    dataset = tiny_models.training_examples("arithmetic", None, None, brief("arithmetic"))
    key = tiny_models.cache_key(dataset, brief("arithmetic"))
    assert key_with("weight_decay=0.01", "weight_decay=0.02") != key
    assert key_with("max_steps", "min_steps") == key


def test_interrupted_build_is_never_used(tmp_path, monkeypatch):
    """A warm-up that was killed once left a folder of random weights that the next run took for the warm model."""
    monkeypatch.setattr(tiny_models, "warm_up", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tiny_model("arithmetic", cache_dir=tmp_path, say=ignore, recipe=brief("arithmetic"))
    assert list((tmp_path / "tiny").iterdir()) == []
    monkeypatch.undo()
    lines = []
    folder = tiny_model("arithmetic", cache_dir=tmp_path, say=lines.append, recipe=brief("arithmetic"))
    assert lines and (folder / "model.safetensors").is_file()


def test_stale_builds_are_removed_active_ones_kept(tmp_path):
    recipe = brief("arithmetic", examples=8)
    folder = tiny_model("arithmetic", cache_dir=tmp_path, say=ignore, recipe=recipe)
    stale, active = (folder.with_name(f".{folder.name}-{name}") for name in ("stale", "active"))
    folder.rename(stale)
    active.mkdir()
    os.utime(stale, (time.time() - 2 * tiny_models.STALE_SECONDS,) * 2)
    tiny_model("arithmetic", cache_dir=tmp_path, say=ignore, recipe=recipe)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, active.name}


def test_two_processes_may_build_the_same_model(tmp_path):
    for name, content in (("unfinished", "late"), ("folder", "first")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(content)
    tiny_models.rename_into_place(tmp_path / "unfinished", tmp_path / "folder")
    assert (tmp_path / "folder" / "model").read_text() == "first"
    with pytest.raises(OSError, match="nowhere"):  # other errors are raised
        tiny_models.rename_into_place(tmp_path / "unfinished", tmp_path / "nowhere" / "folder")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["arithmetic", "correlation"])
def test_builds_are_equal_and_leave_random_states_alone(task, tmp_path):
    def random_states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    recipe, folders = brief(task, examples=16), []
    for number in range(2):
        torch.rand(1 + number), random.random()  # another state for each build
        before = random_states()
        folders.append(tiny_model(task, None, options_of(task), tmp_path / str(number), ignore, recipe))
        assert random_states() == before
    assert folders[0].name == folders[1].name
    assert weights_of(folders[0]) == weights_of(folders[1])


def test_task_without_recipe_is_refused(monkeypatch):
    monkeypatch.delitem(RECIPES, "clock")
    with pytest.raises(ValueError, match="'clock'"):
        tiny_model("clock")


# ---------------------------------------------------------------------------------------------------------------------
# The warm-up


@pytest.mark.slow
def test_warm_up_learns_the_format(tmp_path):
    """The negative log-probability of a token falls far below that of a uniform guess, and most answers have tags."""
    from llms import load_llm
    from rollout import Sampler

    recipe = brief("arithmetic", examples=640, batch=16, labels=1, layers=2, learning_rate=4e-3)
    llm = load_llm(tiny_model("arithmetic", cache_dir=tmp_path, say=ignore, recipe=recipe), "cpu")
    dataset = get_dataset("arithmetic", "test", 16)
    examples = [dataset[index] for index in range(16)]
    rollout = Sampler(llm, seed=0).sample(examples, 1, 32, temperature=0)
    assert -(rollout.sampler_logps.sum() / rollout.completion_mask.sum()) < 1.5  # uniform over the vocabulary: 6.3
    assert sum(text.startswith(BEFORE_REASONING) and BEFORE_ANSWER in text for text in rollout.texts) >= 12


@pytest.mark.parametrize(
    ("task", "metric", "low", "high"),
    [
        ("clock", "mean_abs_error_minutes", 60, 120),
        ("correlation", "mean_abs_error", 0.2, 0.5),
        ("arithmetic", "accuracy", 0.02, 0.4),
    ],
)
def test_noisy_labels_have_the_format_not_the_answer(task, metric, low, high):
    """GRPO has to find the answers: the warm-up shows few correct ones, but all have the format."""
    dataset, rng = get_dataset(task, "train", 200, options=options_of(task)), random.Random(0)
    answers, solutions = [dataset[i].answer for i in range(200)], [dataset.solution(i) for i in range(200)]
    pairs = list(zip(solutions, answers, strict=True))
    score = get_evaluator(task).compute_rewards
    rewards, metrics = score([asked_format(*RECIPES[task].noise(*pair, rng)) for pair in pairs], answers)  # (B, K)
    correct, _ = score([asked_format(*pair) for pair in pairs], answers)  # (B, K)
    assert (rewards[:, 1:] == correct[:, 1:]).all()  # all components but the first, which is that of the answer
    assert low < metrics[metric] < high


@pytest.mark.parametrize(
    ("task", "options", "metric", "low", "high"),
    [
        ("look", {}, "accuracy", 0.15, 0.3),  # chance is 0.25
        ("clock_feedback", {}, "mean_abs_error_minutes", 30, 60),
        ("clock_feedback", {"marked": False}, "mean_abs_error_minutes", 30, 60),
        ("correlation_feedback", {}, "mean_abs_error", 0.1, 0.25),
    ],
)
def test_scripts_do_not_tell_the_answer(task, options, metric, low, high):
    """As for one turn: the last answers have the format and are wrong, and every turn but the last one is usable."""
    dataset, rng = get_dataset(task, "train", 400, options=options_of(task) | options), random.Random(0)
    evaluator = get_evaluator(task)
    scripts = [RECIPES[task].script(dataset.solution(i), dataset[i].answer, rng) for i in range(400)]
    environments = dataset.environments([dataset[i] for i in range(400)])
    shown = [one.step(turns[0]) for one, turns in zip(environments, scripts, strict=True)]
    assert all(one is not None and not one.malformed and len(one.images) == 1 for one in shown)
    completions = [evaluator.parse_episode(turns) for turns in scripts]
    metrics = evaluator.metrics(completions, [dataset[i].answer for i in range(400)])
    assert all(completion.strict_format for completion in completions)
    assert low < metrics[metric] < high


def test_random_operations_are_calculated_correctly():
    operators, unchanged, rng = set(), set(), random.Random(0)
    for _ in range(200):
        solution, answer = tiny_models.random_operations("12 / 3 = 4\n4 + 4 = 8", "8", rng)
        first, second = (line.split() for line in solution.split("\n"))
        for a, operator, b, _, result in (first, second):
            assert apply(operator, int(a), int(b)) == int(result) and 1 <= int(result) <= tiny_models.MAX_NUMBER
        assert first[4] == second[0] and second[4] == answer
        operators.add(first[1])
        unchanged.add(solution == "12 / 3 = 4\n4 + 4 = 8")
    assert operators == {"+", "-", "/"} and unchanged == {True, False}  # 12 * 3 is above MAX_NUMBER


def test_epochs_show_each_example_once():
    recipe = brief("clock", batch=4, epochs=3)
    shown = list(tiny_models.batches(10, recipe))
    assert [len(batch) for batch in shown] == [4, 4] * 3  # two of ten examples are left over in each epoch
    assert all(len({*one, *other}) == 8 for one, other in zip(shown[::2], shown[1::2], strict=True))
    assert shown[:2] != shown[2:4]
    assert len(list(tiny_models.batches(3, recipe))) == 3  # fewer examples than a batch holds


# ---------------------------------------------------------------------------------------------------------------------
# The defaults of a tiny run


@pytest.mark.parametrize("task", TASKS)
def test_tiny_runs_take_the_defaults_of_the_recipe(task):
    from config import parse_args

    flags = parse_args(["--model_path", "tiny", "--dataset_name", task]).flags()
    assert RECIPES[task].defaults.items() <= flags.items()
    assert options_of(task).keys() <= dataset_options(task).keys()


def test_importing_recipes_imports_no_torch():
    code = "import sys, tiny_models; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    folder = Path(tiny_models.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0
