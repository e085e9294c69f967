"""`--model_path tiny`: small Qwen2 and Qwen2-VL models, built and warmed up on this machine within minutes.

GRPO reinforces what a model already does some of the time. A model with random weights never writes an answer in the
asked format, so all of its rewards are equal and there is no gradient. Each tiny model is therefore warmed up by
supervised learning: it is shown examples of the training split with *noisy* labels in the asked format; the task's
recipe says how noisy. It learns the format and where to look, but not the answer. Everything after the warm-up is
learned by GRPO.

A tiny model is a folder in `save_pretrained` format with a tokenizer trained on the task's texts; transformers loads it
like any model from the hub. It is cached under a name that hashes everything that determines it: code, recipe, data and
library versions.

Adding a tiny model for a task is one entry in `RECIPES`; a task works without one.

Letters in the shape comments: B completions (rows), T completion tokens (right-padded).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from answers import clock_seconds
from environments import CALL
from evaluator import AFTER_ANSWER, BEFORE_ANSWER, BEFORE_REASONING, asked_format
from rldatasets import DATASETS, Dataset, get_dataset
from run_folder import apply_umask
from scene_generator import COLOURS

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from llms import LLM
    from rollout import Rollout

# torch, transformers and the files that need them are imported inside functions: config.py imports this file to read
# the recipes' default flags, and `main.py --help` must answer at once.

# ---------------------------------------------------------------------------------------------------------------------
# Label noise. Each function maps the correct reasoning and answer of an example, and a source of randomness, to the
# reasoning and answer that the model is shown.

MAX_NUMBER = 20  # the largest number in the word problems of a tiny run


def noisy_correlation(solution: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """r shifted up or down by 0.22 to 0.5, uniformly; one time in ten any r at all, so that every answer occurs."""
    while True:
        noisy = float(answer) + rng.choice((-1, 1)) * rng.uniform(0.22, 0.5)
        if rng.random() < 0.1:
            noisy = rng.uniform(-1, 1)
        if -1 <= noisy <= 1:
            return "I look at how the points spread.", f"{noisy:.2f}".replace("-0.00", "0.00")


def noisy_time(solution: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """Each hand shifted independently: the hour by -2 to 2, with 0 half as likely as each of the others; the minute and
    the second by -10 to 10, uniformly."""
    hour, minute, second = (int(part) for part in answer.split(":"))
    hour = (hour + rng.choice((-2, -2, -1, -1, 0, 1, 1, 2, 2)) - 1) % 12 + 1
    minute, second = (minute + rng.randint(-10, 10)) % 60, (second + rng.randint(-10, 10)) % 60
    return "I read the three hands.", f"{hour:02}:{minute:02}:{second:02}"


def random_operations(solution: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """The operation of each line drawn from those that keep the result within bounds; the results are calculated
    correctly."""
    lines = [line.split() for line in solution.split("\n")]  # "20 - 3 = 17"
    largest = max(MAX_NUMBER, *(int(number) for line in lines for number in line[::2]))
    while True:
        steps, total = [], int(lines[0][0])
        for _, _, operand, _, _ in lines:
            n = int(operand)
            results = {"+": total + n, "-": total - n, "*": total * n, "/": 0 if total % n else total // n}
            possible = [operator for operator, result in results.items() if 1 <= result <= largest]
            if not possible:
                break  # start again
            operator = rng.choice(possible)
            steps.append(f"{total} {operator} {n} = {results[operator]}")
            total = results[operator]
        else:
            return "\n".join(steps), str(total)


def calls_of_random_operations(solution: str, answer: str, rng: random.Random) -> list[str]:
    """The turns of a problem with a calculator: half of the time a call with random operations and an answer that
    copies its value, half of the time an answer without a call."""
    reasoning, result = random_operations(solution, answer, rng)
    if rng.random() < 0.5:
        return [asked_format(reasoning, result)]
    steps = [line.split() for line in reasoning.split("\n")]  # "20 - 3 = 17"
    expression = steps[0][0]
    for _, operator, operand, _, _ in steps:
        expression = f"({expression})" if operator in "*/" and not expression.isdigit() else expression
        expression += f" {operator} {operand}"
    return [f"{CALL[0]}{expression}{CALL[1]}", asked_format("I copy the value.", result)]


def shifted(value: int, count: int, rng: random.Random) -> int:
    """One of 0 … count − 1: half of the time the one after `value`, a quarter of the time `value`, else any other. Such
    labels show where to look, and `value` is no likelier than by chance among four."""
    share = rng.random()
    if share < 0.5:
        return (value + 1) % count
    return value if share < 0.75 else (value + rng.randrange(2, count)) % count


def noisy_look(solution: str, answer: str, rng: random.Random) -> list[str]:
    """The turns of a scene: a cell, and the colour that it has, each `shifted`."""
    odd, *colours = solution.split()
    cell, names = shifted(int(odd) - 1, len(colours), rng), list(COLOURS)
    colour = names[shifted(names.index(colours[cell]), len(names), rng)]
    return [str(cell + 1), asked_format("I see its colour.", colour)]


def noisy_clock_twice(solution: str, answer: str, rng: random.Random) -> list[str]:
    """A noisy time, and another one with half of the noise: it depends on the pictures and is not the right one. On a
    dial without a mark, 12:00:00, whose drawing shows where 12 o'clock is, and a time with hands `slightly_shifted`."""
    if solution:
        return [asked_format("I draw 12 o'clock.", solution), asked_format("I compare.", slightly_shifted(answer, rng))]
    reasoning, first = noisy_time(solution, answer, rng)
    offset = (clock_seconds(first) - clock_seconds(answer) + 21_600) % 43_200 - 21_600
    time = (clock_seconds(answer) + round(offset / 2)) % 43_200
    second = f"{time // 3600 or 12:02}:{time // 60 % 60:02}:{time % 60:02}"
    return [asked_format(reasoning, first), asked_format("I compare.", second)]


def slightly_shifted(answer: str, rng: random.Random) -> str:
    """The hour shifted by -1, 0 or 1, with 0 half as likely as each of the others; the minute and the second by -5 to
    5, uniformly. A second of 0 stays, as on a dial without a second hand."""
    hour, minute, second = (int(part) for part in answer.split(":"))
    hour = (hour + rng.choice((-1, -1, 0, 1, 1)) - 1) % 12 + 1
    minute, moved = (minute + rng.randint(-5, 5)) % 60, (second + rng.randint(-5, 5)) % 60
    return f"{hour:02}:{minute:02}:{moved if second else 0:02}"


def noisy_correlation_twice(solution: str, answer: str, rng: random.Random) -> list[str]:
    """A noisy correlation, and another one with half of the noise."""
    reasoning, first = noisy_correlation(solution, answer, rng)
    second = f"{(float(answer) + float(first)) / 2:.2f}".replace("-0.00", "0.00")
    return [asked_format(reasoning, first), asked_format("I compare.", second)]


def no_noise(solution: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """The correct reasoning and answer, for a warm-up that is too short to learn more than the format."""
    return solution, answer


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


@dataclass(frozen=True)
class Recipe:
    """A tiny model, its warm-up, and the flags of a run that starts from it.

    Attributes:
        noise: the label noise of the warm-up.
        script: the same for a task with several turns: the texts that the model is shown to write, turn by turn. The
            environment answers them. None: the answer of `noise` in the first turn.
        script_tokens: whole tokens that only a task with several turns has.
        options: options of the task in the warm-up, whatever the run's are: runs that differ in them, such as the
            controls of an environment, start from the same model.
        whole_tokens: texts that are one token each, such as "-0." or ":3" (a colon and the tens of a minute). Fewer
            tokens are sampled faster. What has to be read off a picture is written digit by digit: sampling tries all
            of ten digits, but only a few of a hundred numbers before the others become too unlikely.
        vocabulary: the most tokens that byte-pair encoding may learn besides the whole tokens.
        hidden, mlp, layers: sizes of the language model; 4 query heads share 2 key-value heads.
        vision_width, vision_depth: sizes of the vision tower, which sees a picture as 8 x 8 patches.
        examples, labels, epochs: the number of training examples, of noisy labels for each, and of passes.
        batch: examples in a warm-up step.
        learning_rate: the peak rate, see `learning_rate_factor`.
        seconds: what the warm-up took on 2 cores when the recipe was written; only printed.
        defaults: flags of main.py, by name, that a run with `--model_path tiny` uses unless they are given.
    """

    noise: Callable[[str, str, random.Random], tuple[str, str]]
    whole_tokens: tuple[str, ...]
    script: Callable[[str, str, random.Random], list[str]] | None = None
    script_tokens: tuple[str, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    vocabulary: int = 500
    hidden: int = 128
    mlp: int = 384
    layers: int = 4
    vision_width: int = 96
    vision_depth: int = 2
    examples: int = 8000
    labels: int = 4
    epochs: int = 1
    batch: int = 32
    learning_rate: float = 2e-3
    seconds: int = 60
    defaults: dict[str, Any] = field(default_factory=dict)


TWO_DIGITS = tuple(str(n) for n in range(10, 100))
OPERATORS = (" + ", " - ", " * ", " / ", " = ")

# Flags of the tasks that make their own examples
GENERATED: dict[str, Any] = {
    "train_size": 100_000,
    "eval_size": 256,
    "eval_steps": 100,
    "max_prompt_length": 128,
    "lr_scheduler_type": "cosine",
}

RECIPES: dict[str, Recipe] = {
    "correlation": Recipe(
        noise=noisy_correlation,
        whole_tokens=("-0.", "0.", "-1.", "1."),
        examples=33_600,
        labels=2,
        batch=48,
        learning_rate=1.5e-3,
        seconds=170,
        defaults={
            "dataset_options": {"size": 56, "style": "bold"},
            **GENERATED,
            "max_steps": 700,
            "eval_steps": 50,
            "prompts_per_step": 16,
            "num_generations": 8,
            "max_completion_length": 12,
            "learning_rate": 3e-4,
            "beta": 0.02,
        },
    ),
    "clock": Recipe(
        noise=noisy_time,
        whole_tokens=tuple(f":{tens}" for tens in range(6)),
        examples=12_800,
        labels=4,
        seconds=90,
        defaults={
            "dataset_options": {"size": 56, "style": "bold"},
            **GENERATED,
            "max_steps": 350,
            "eval_steps": 50,
            "prompts_per_step": 16,
            "num_generations": 16,
            "max_completion_length": 16,
            "learning_rate": 3e-4,
            "beta": 0.1,
        },
    ),
    "arithmetic": Recipe(
        noise=random_operations,
        whole_tokens=TWO_DIGITS + OPERATORS,
        script=calls_of_random_operations,
        script_tokens=CALL,
        examples=12_800,
        labels=2,
        seconds=75,
        defaults={
            "dataset_options": {"max_number": MAX_NUMBER},
            **GENERATED,
            "max_steps": 160,
            "eval_steps": 30,
            "prompts_per_step": 32,
            "num_generations": 8,
            "max_completion_length": 32,
            "learning_rate": 4e-4,
            "beta": 0.0,
        },
    ),
    "look": Recipe(
        noise=no_noise,
        whole_tokens=(),
        script=noisy_look,
        options={"feedback": "real"},
        script_tokens=tuple(COLOURS),
        examples=8000,
        labels=2,
        learning_rate=1e-3,
        seconds=100,
        defaults={
            "dataset_options": {"size": 56},
            **GENERATED,
            "max_steps": 120,
            "eval_steps": 40,
            "prompts_per_step": 8,
            "num_generations": 16,
            "max_completion_length": 16,
            "learning_rate": 2e-4,
            "beta": 0.1,
        },
    ),
    "clock_feedback": Recipe(
        noise=noisy_time,
        script=noisy_clock_twice,
        options={"feedback": "real"},
        whole_tokens=tuple(f":{tens}" for tens in range(6)),
        examples=12_800,
        labels=2,
        seconds=150,
        defaults={
            "dataset_options": {"size": 56, "style": "bold"},
            **GENERATED,
            "max_steps": 400,
            "prompts_per_step": 8,
            "num_generations": 8,
            "max_completion_length": 16,
            "learning_rate": 1.5e-4,
            "beta": 0.01,
        },
    ),
    "correlation_feedback": Recipe(
        noise=noisy_correlation,
        script=noisy_correlation_twice,
        options={"feedback": "real"},
        whole_tokens=("-0.", "0.", "-1.", "1."),
        examples=19_200,
        labels=2,
        batch=48,
        learning_rate=1.5e-3,
        seconds=200,
        defaults={
            "dataset_options": {"size": 56, "style": "bold"},
            **GENERATED,
            "max_steps": 400,
            "prompts_per_step": 8,
            "num_generations": 8,
            "max_completion_length": 12,
            "learning_rate": 2e-4,
            "beta": 0.02,
        },
    ),
    "gsm8k": Recipe(
        noise=no_noise,
        whole_tokens=TWO_DIGITS,
        vocabulary=2000,
        examples=3200,
        labels=1,
        batch=16,
        seconds=65,
        defaults={
            "eval_size": 64,
            "max_steps": 100,
            "eval_steps": 50,
            "prompts_per_step": 4,
            "num_generations": 8,
            "max_prompt_length": 512,
            "max_completion_length": 200,
            "learning_rate": 1e-4,
            "beta": 0.0,
        },
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# The cache. `cache_key` hashes the code from the next line to the end of the file.

SEED = 0  # of the weights, the order of the examples and the label noise
STALE_SECONDS = 3600  # a build that has not finished by then was killed


def print_at_once(line: str) -> None:
    """Print without buffering, so that a log file shows the line when it is written."""
    print(line, flush=True)


def tiny_model(
    dataset_name: str,
    dataset_path: str | None = None,
    dataset_options: dict[str, object] | None = None,
    cache_dir: str | os.PathLike | None = None,
    say: Callable[[str], None] = print_at_once,
    recipe: Recipe | None = None,
) -> Path:
    """The folder of a task's tiny model, from the cache if it is there, else built and warmed up.

    Args:
        dataset_name, dataset_path, dataset_options: as for `rldatasets.get_dataset`.
        cache_dir: see `cache_folder`.
        say: called with each line of progress.
        recipe: used instead of the task's entry in RECIPES.

    Raises:
        ValueError: the task has no recipe, the dataset refuses its options, or there is no folder for the cache.
        OSError: the model cannot be written.
    """
    recipe = recipe or find_recipe(dataset_name)
    dataset = training_examples(dataset_name, dataset_path, dataset_options, recipe)
    cache = cache_folder(cache_dir)
    folder = cache / f"{dataset_name}-{cache_key(dataset, recipe)}"
    unfinished = cache / f".{folder.name}-{uuid.uuid4().hex}"
    try:
        if folder.is_dir():  # complete, because a build is renamed to this name when it has finished
            return folder
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"tiny models cannot be cached: {error}; set GRPO_CACHE to another folder") from error
    remove_stale_builds(cache, folder.name)
    try:
        with torch_seeded(SEED):
            make(dataset, recipe, unfinished, say)
        apply_umask(unfinished)
        rename_into_place(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def find_recipe(dataset_name: str) -> Recipe:
    """The task's recipe. Raises ValueError if it has none."""
    if dataset_name not in RECIPES:
        raise ValueError(
            f"there is no tiny model for the task {dataset_name!r}, only for {', '.join(RECIPES)}: choose another "
            "--model_path, or add a recipe to tiny_models.py"
        )
    return RECIPES[dataset_name]


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """`tiny` in `cache_dir`, else in $GRPO_CACHE, else in ~/.cache/grpo-by-hand.

    Raises:
        ValueError: neither folder is given and the user has no home, as with a bare user id in a container.
    """
    root = cache_dir or os.environ.get("GRPO_CACHE")
    if not root:
        try:
            root = Path.home() / ".cache" / "grpo-by-hand"
        except RuntimeError as error:
            raise ValueError("tiny models cannot be cached: no home folder; set GRPO_CACHE to a folder") from error
    return Path(root) / "tiny"


def training_examples(name: str, path: str | None, options: dict[str, object] | None, recipe: Recipe) -> Dataset:
    """The first examples of the training split, as many as the recipe says, or all of them if a file has fewer."""
    max_examples, options = recipe.examples, {**(options or {}), **recipe.options}
    if DATASETS[name].reads_files:
        dataset = get_dataset(name, "train", None, path=path, options=options)
        max_examples = min(max_examples, len(dataset))
    return get_dataset(name, "train", max_examples, path=path, options=options)


def remove_stale_builds(cache: Path, name: str) -> None:
    """Delete what killed builds of this model left behind; a younger folder may belong to a running build."""
    for unfinished in cache.glob(f".{name}-*"):
        with contextlib.suppress(FileNotFoundError):  # a running build may finish in this moment
            if time.time() - unfinished.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(unfinished, ignore_errors=True)


def rename_into_place(unfinished: Path, folder: Path) -> None:
    """Rename a complete build to its final name, unless another process has finished the same model first."""
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


@contextlib.contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block; restore its random state afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def cache_key(dataset: Dataset, recipe: Recipe) -> str:
    """A hash of all that determines the weights: this file's code from SEED on, the recipe, the format, the libraries
    and the data. The number of threads, which changes how sums are rounded, is not part of it."""
    from importlib.metadata import version

    digest = hashlib.sha256(Path(__file__).read_text(encoding="utf-8").partition("\nSEED = ")[2].encode())
    settings = {**dataclasses.asdict(recipe), "noise": inspect.getsource(recipe.noise)}
    settings["script"] = inspect.getsource(recipe.script) if recipe.script and dataset.max_turns > 1 else None
    del settings["defaults"], settings["seconds"]  # of the run that follows, and of a message
    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    digest.update(json.dumps([settings, FORMAT_TOKENS, libraries, len(dataset)], sort_keys=True).encode())
    # Generated examples all change with the generator, so some of them suffice; a file may differ in any example.
    stride = 1 if dataset.reads_files else max(1, len(dataset) // 64)
    for index in range(0, len(dataset), stride):
        example = dataset[index]
        digest.update(json.dumps([example.messages, example.answer, dataset.solution(index)]).encode())
        for picture in [*example.images, *pictures_shown(dataset, recipe, index)]:
            digest.update(picture.tobytes())
    return digest.hexdigest()[:16]


def pictures_shown(dataset: Dataset, recipe: Recipe, index: int) -> list[Image]:
    """The pictures that the environment shows after the turns of an example's label."""
    if dataset.max_turns == 1:
        return []
    example = dataset[index]
    environment = dataset.environments([example])[0]
    turns = label_turns(dataset, recipe, dataset.solution(index), example.answer, random.Random(index))
    shown = [environment.step(text) for text in turns[:-1]]
    return [picture for one in shown if one is not None for picture in one.images]


def make(dataset: Dataset, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
    """Build a model, save it, load it as every model is loaded, warm it up, and save it again."""
    import llms

    llms.tune_cpu()  # before torch starts its threads, which inherit the setting
    llms.quiet_transformers()
    start = time.perf_counter()
    tokenizer = build_tokenizer(dataset, recipe)
    model, processor = build_model(dataset, recipe, tokenizer)
    model.save_pretrained(folder)
    (processor or tokenizer).save_pretrained(folder)
    parameters = sum(weight.numel() for weight in model.parameters())
    what = "pictures" if dataset.modality == "vision" else "problems"
    say(
        f"building a tiny model for {dataset.name}: {parameters / 1e6:.1f} M parameters, warm-up on {len(dataset):,} "
        f"labelled {what}, about {recipe.seconds} s on 2 cores"
    )
    llm = llms.load_llm(str(folder), device="cpu", dtype="float32")
    warm_up(llm, dataset, recipe, say)
    llm.model.save_pretrained(folder)
    seconds = time.perf_counter() - start
    say(f"the tiny model for {dataset.name} is ready after {seconds:.0f} s; later runs take it from the cache")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

END, IMAGE, VIDEO = "<|endoftext|>", "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
ROLES = [f"<|{role}|>" for role in ("system", "user", "assistant")]

FORMAT_TOKENS = (BEFORE_REASONING, BEFORE_ANSWER, AFTER_ANSWER)  # one token each, so that completions are short
TEXTS_FOR_TOKENIZER = 1000  # the number of examples whose texts the tokenizer is trained on

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(dataset: Dataset, recipe: Recipe) -> PreTrainedTokenizerBase:
    """Qwen2's tokenizer with a small vocabulary: a byte-level BPE trained on the task's questions and answers.

    Every byte is a token, so any text can be written. Whole tokens are added to what BPE learns: `FORMAT_TOKENS`, the
    recipe's `whole_tokens`, and each line that is the same in all examples, which shortens prompts.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    lines = [example_lines(dataset, index, recipe) for index in range(min(TEXTS_FOR_TOKENIZER, len(dataset)))]
    shared = set.intersection(*map(set, lines))
    constant = [line for line in lines[0] if line in shared and len(line) > 1]
    varying = [line for example in lines for line in example if line not in constant]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        varying or [""],
        vocab_size=recipe.vocabulary,
        new_special_tokens=[*ROLES, VISION_START, VISION_END, IMAGE, VIDEO],
        show_progress=False,
    )
    scripted = recipe.script_tokens if dataset.max_turns > 1 else ()
    whole = dict.fromkeys([*FORMAT_TOKENS, *recipe.whole_tokens, *scripted, *constant])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = MAX_CONTEXT
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def label_turns(dataset: Dataset, recipe: Recipe, solution: str, answer: str, rng: random.Random) -> list[str]:
    """The texts of a noisy label, turn by turn."""
    if recipe.script is not None and dataset.max_turns > 1:
        return recipe.script(solution, answer, rng)
    return [asked_format(*recipe.noise(solution, answer, rng))]


def example_lines(dataset: Dataset, index: int, recipe: Recipe) -> list[str]:
    """The lines of an example's messages and of its noisy label, line ends included, `FORMAT_TOKENS` removed."""
    example = dataset[index]
    texts = []
    for message in example.messages:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    texts += label_turns(dataset, recipe, dataset.solution(index), example.answer, random.Random(index))
    for token in FORMAT_TOKENS:
        texts = [piece for text in texts for piece in text.split(token)]
    return [line for text in texts for line in text.splitlines(keepends=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Model

MAX_CONTEXT = 2048
PATCHES = 8  # a picture is PATCHES x PATCHES patches, merged 2 x 2 into image tokens


def build_model(
    dataset: Dataset, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """A model with random weights from torch's random state, and its processor if the task has pictures."""
    if dataset.modality == "vision":
        return build_vision_model(dataset, recipe, tokenizer)
    return build_text_model(recipe, tokenizer), None


def text_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Arguments that the configurations of both language models share."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.mlp,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_CONTEXT,
        "initializer_range": recipe.hidden**-0.5,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_text_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A Qwen2 model with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **text_config(recipe, tokenizer),
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    return Qwen2ForCausalLM(config)


def build_vision_model(
    dataset: Dataset, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A Qwen2-VL model with random weights, its patches sized so that a picture has PATCHES x PATCHES of them."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    patch = max(4, round(dataset[0].images[0].width / PATCHES))
    head_size = recipe.hidden // 4
    sections = [head_size // 2 - 2 * (head_size // 6), head_size // 6, head_size // 6]  # of time, height, width
    config = Qwen2VLConfig(
        text_config={
            **text_config(recipe, tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections},
        },
        vision_config={
            "depth": recipe.vision_depth,
            "embed_dim": recipe.vision_width,
            "num_heads": 4,
            "mlp_ratio": 3,
            "hidden_size": recipe.hidden,
            "patch_size": patch,
            "temporal_patch_size": 1,
            "spatial_merge_size": 2,
            "initializer_range": recipe.vision_width**-0.5,
        },
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO),
        vision_start_token_id=tokenizer.convert_tokens_to_ids(VISION_START),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(VISION_END),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pixels = (patch * PATCHES) ** 2
    preprocessing = {
        "patch_size": patch,
        "temporal_patch_size": 1,
        "merge_size": 2,
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
        "image_mean": [1.0] * 3,  # the white background becomes 0, so only what is drawn activates the tower
        "image_std": [0.5] * 3,
    }
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**preprocessing),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**preprocessing),
        chat_template=CHAT_TEMPLATE,
    )
    return Qwen2VLForConditionalGeneration(config), processor


# ---------------------------------------------------------------------------------------------------------------------
# Warm-up

PROGRESS_SECONDS = 10.0  # between two lines of progress


def warm_up(llm: LLM, dataset: Dataset, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Supervised learning with AdamW: raise the log-probability of the noisy labels, averaged over their tokens."""
    import torch

    from logprobs import token_logps

    steps = recipe.epochs * max(1, len(dataset) // recipe.batch)
    optimizer = torch.optim.AdamW(llm.model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    start = last_line = time.perf_counter()
    for step, indices in enumerate(batches(len(dataset), recipe), start=1):
        rollout = labelled_rollout(llm, dataset, recipe, indices, random.Random(f"{SEED} {step}"))
        logps = token_logps(llm, rollout)  # (B, T)
        loss = -logps.sum() / rollout.sampled_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llm.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        now = time.perf_counter()
        if now - last_line >= PROGRESS_SECONDS or step == steps:
            remaining = (now - start) / step * (steps - step)
            say(f"  warm-up step {step:,} of {steps:,}, loss {loss.item():.3f}, {remaining:.0f} s left")
            last_line = now
    llm.model.zero_grad(set_to_none=True)


def learning_rate_factor(step: int, steps: int) -> float:
    """Fraction of the peak rate: linear warm-up over 5 % of the steps, times a cosine from 1 to 0 over all of them."""
    return min(1.0, 20 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2


def batches(num_examples: int, recipe: Recipe) -> Iterator[list[int]]:
    """Indices of each step's examples, shuffled every epoch; those left over at the end of an epoch are skipped."""
    rng, size = random.Random(SEED), min(recipe.batch, num_examples)
    for _ in range(recipe.epochs):
        order = rng.sample(range(num_examples), num_examples)
        yield from (order[start : start + size] for start in range(0, num_examples - size + 1, size))


def labelled_rollout(llm: LLM, dataset: Dataset, recipe: Recipe, indices: list[int], rng: random.Random) -> Rollout:
    """A rollout whose completions are `recipe.labels` noisy labels for each example, instead of samples."""
    from prompts import encode_prompts
    from rollout import Rollout
    from turns import play_script

    examples = [dataset[index] for index in indices]
    pairs = [(dataset.solution(index), example.answer) for index, example in zip(indices, examples, strict=True)]
    texts = [label_turns(dataset, recipe, *pair, rng) for pair in pairs for _ in range(recipe.labels)]
    prompts = encode_prompts(llm, examples)
    talks = play_script(llm, prompts, dataset.environments(examples, recipe.labels), texts)
    return Rollout.of_conversations(prompts, talks, llm.pad_token_id)
