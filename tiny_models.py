"""`--model_path tiny`: small Qwen2 and Qwen2-VL models, made and taught a first rough reading on this machine.

GRPO improves what a model already does now and then; a model with random weights never writes an answer in the asked
format, so there is nothing to reinforce. Each tiny model is therefore warmed up: it sees labelled examples of the
training split, written in the asked format, but its labels are *wrong*: each is moved away from the truth at random, by
as much as its recipe says. It learns the format and where to look, not the answer. What is learned from there is
reinforcement learning's.

A tiny model is a folder in `save_pretrained` form with its own tokenizer, trained on the task's texts; transformers
loads it like any model from the hub. It is kept in a cache under a name that hashes everything that made it.
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
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# What a tiny run of a task uses where the command line says nothing. Keys are the names of main.py's flags.

MAX_NUMBER = 20  # the largest number in the tiny model's word problems

TINY_DEFAULTS: dict[str, dict[str, object]] = {
    "correlation": {
        "dataset_options": {"size": 56, "style": "bold"},
        "train_size": 100_000,
        "eval_size": 256,
        "max_steps": 1200,
        "eval_steps": 100,
        "prompts_per_step": 16,
        "num_generations": 8,
        "max_prompt_length": 128,
        "max_completion_length": 12,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "beta": 0.02,
    },
    "clock": {
        "dataset_options": {"size": 56, "style": "bold"},
        "train_size": 100_000,
        "eval_size": 256,
        "max_steps": 800,
        "eval_steps": 100,
        "prompts_per_step": 8,
        "num_generations": 16,
        "max_prompt_length": 128,
        "max_completion_length": 16,
        "learning_rate": 1.5e-4,
        "lr_scheduler_type": "cosine",
        "beta": 0.01,
    },
    "arithmetic": {
        "dataset_options": {"max_number": MAX_NUMBER},
        "train_size": 100_000,
        "eval_size": 256,
        "max_steps": 600,
        "eval_steps": 100,
        "prompts_per_step": 16,
        "num_generations": 8,
        "max_prompt_length": 128,
        "max_completion_length": 32,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "beta": 0.0,
    },
    "gsm8k": {
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
}


# ---------------------------------------------------------------------------------------------------------------------
# How wrong the labels of the warm-up are. A noise function takes the right reasoning and answer and a source of
# randomness, and gives those that the model is shown.


def wrong_correlation(solution: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """r moved by 0.22 to 0.5 either way, evenly; one time in ten any r at all, so that no answer is quite unknown."""
    while True:
        wrong = float(answer) + rng.choice((-1, 1)) * rng.uniform(0.22, 0.5)
        if rng.random() < 0.1:
            wrong = rng.uniform(-1, 1)
        if -1 <= wrong <= 1:
            return "I look at how the points spread.", f"{wrong:.2f}".replace("-0.00", "0.00")


def wrong_time(solution: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """Each hand moved on its own: the hour by up to 2, and left where it is half as often as moved to any other place;
    the minute and the second by up to 10, evenly."""
    hour, minute, second = (int(part) for part in answer.split(":"))
    hour = (hour + rng.choice((-2, -2, -1, -1, 0, 1, 1, 2, 2)) - 1) % 12 + 1
    minute, second = (minute + rng.randint(-10, 10)) % 60, (second + rng.randint(-10, 10)) % 60
    return "I read the three hands.", f"{hour:02}:{minute:02}:{second:02}"


def wrong_steps(solution: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """In each line any operation that fits the numbers, whatever the story tells. It is worked out rightly."""
    lines = [line.split() for line in solution.split("\n")]  # "20 - 3 = 17"
    largest = max(MAX_NUMBER, *(int(number) for line in lines for number in line[::2]))
    while True:
        wrong, total = [], int(lines[0][0])
        for _, _, operand, _, _ in lines:
            n = int(operand)
            results = {"+": total + n, "-": total - n, "*": total * n, "/": 0 if total % n else total // n}
            fitting = [operator for operator, result in results.items() if 1 <= result <= largest]
            if not fitting:
                break
            operator = rng.choice(fitting)
            wrong.append(f"{total} {operator} {n} = {results[operator]}")
            total = results[operator]
        else:
            return "\n".join(wrong), str(total)


def right_steps(solution: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """As it is: the warm-up is too short to learn more than the form."""
    return solution, answer


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


@dataclass(frozen=True)
class Recipe:
    """Everything about a tiny model and its warm-up that is not in the data.

    Attributes:
        noise: the labels shown instead of the right ones.
        whole_tokens: texts that are one token each: "-0.", or ":3" (a colon and the tens of a minute). Few tokens are
            sampled quickly. What is read off a picture is written digit by digit: among ten digits the good one is
            found by trying, while among a hundred numbers most are given up before they were ever tried.
        vocabulary: the most tokens there may be beside these.
        hidden, mlp, layers: sizes of the language model; 4 query heads share 2 key-value heads.
        vision_width, vision_depth: sizes of the vision tower; it sees a picture as 8 x 8 patches.
        examples, labels, epochs: how many training examples, how many wrong labels for each, how often.
        batch: examples in a warm-up step.
        learning_rate: at its peak (see `learning_rate_share`).
        seconds: how long the warm-up took on 2 cores when the recipe was made; only said, never used.
    """

    noise: Callable[[str, str, random.Random], tuple[str, str]]
    whole_tokens: tuple[str, ...]
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


TWO_DIGITS = tuple(f"{n:02}" for n in range(100))
OPERATORS = (" + ", " - ", " * ", " / ", " = ")

RECIPES: dict[str, Recipe] = {
    "correlation": Recipe(
        wrong_correlation,
        whole_tokens=("-0.", "0.", "-1.", "1."),
        examples=33_600,
        labels=2,
        batch=48,
        learning_rate=1.5e-3,
        seconds=170,
    ),
    "clock": Recipe(
        wrong_time,
        whole_tokens=tuple(f":{tens}" for tens in range(6)),
        examples=12_800,
        labels=4,
        seconds=90,
    ),
    "arithmetic": Recipe(wrong_steps, whole_tokens=TWO_DIGITS[10:] + OPERATORS, examples=12_800, labels=2, seconds=75),
    "gsm8k": Recipe(
        right_steps, whole_tokens=TWO_DIGITS[10:], vocabulary=2000, examples=3200, labels=1, batch=16, seconds=65
    ),
}

SEED = 0  # of the weights, the order and the noise
TEXTS_FOR_TOKENIZER = 1000  # examples whose texts the tokenizer is trained on
PROGRESS_SECONDS = 10.0


def print_at_once(line: str) -> None:
    """A line that is seen when it is written, in a log file too."""
    print(line, flush=True)


def tiny_model(
    dataset_name: str,
    dataset_path: str | None = None,
    dataset_options: dict | None = None,
    cache_dir: str | os.PathLike | None = None,
    say: Callable[[str], None] = print_at_once,
    recipe: Recipe | None = None,
) -> Path:
    """The folder of the tiny model for a task, taken from the cache or else built and warmed up.

    Args:
        dataset_name, dataset_path, dataset_options: as for `rldatasets.get_dataset`.
        cache_dir: where models are kept; else $GRPO_CACHE, else ~/.cache/grpo-by-hand.
        say: takes each line about what is being done.
        recipe: another recipe than the task's own.

    Raises:
        ValueError: the task has no recipe, or the dataset refuses its options.
        OSError: the cache cannot be written.
    """
    recipe = recipe or find_recipe(dataset_name)
    dataset = training_examples(dataset_name, dataset_path, dataset_options, recipe.examples)
    cache = Path(cache_dir or os.environ.get("GRPO_CACHE") or Path.home() / ".cache" / "grpo-by-hand") / "tiny"
    folder = cache / f"{dataset_name}-{cache_key(dataset, recipe)}"
    if folder.is_dir():  # it was renamed into place when it was complete
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(f".{folder.name}-*"):  # by a build that was killed; a younger one may be at work
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(dir=cache, prefix=f".{folder.name}-"))
    try:
        with quiet_randomness():
            make(dataset, recipe, aside, say)
        rename_into_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def find_recipe(dataset_name: str) -> Recipe:
    if dataset_name not in RECIPES:
        raise ValueError(
            f"there is no tiny model for the task {dataset_name!r}, only for {', '.join(RECIPES)}: add a recipe"
        )
    return RECIPES[dataset_name]


def training_examples(name, path, options, most: int):
    """The training split's first examples: as many as the recipe shows, or all there are."""
    from rldatasets import DATASETS, get_dataset

    if DATASETS[name].reads_files:
        dataset = get_dataset(name, "train", None, path=path, options=options)
        return get_dataset(name, "train", min(most, len(dataset)), path=path, options=options)
    return get_dataset(name, "train", most, path=path, options=options)


def rename_into_place(aside: Path, folder: Path) -> None:
    aside.chmod(0o755)  # mkdtemp makes folders that nobody else may read
    try:
        aside.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster and made the same
            raise


@contextlib.contextmanager
def quiet_randomness() -> Iterator[None]:
    """Torch's random numbers start at SEED inside and go on outside as if nothing had happened."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def cache_key(dataset, recipe: Recipe) -> str:
    """A hash of all that makes the model: the code below the recipes, the recipe, the data, the libraries."""
    from importlib.metadata import version

    digest = hashlib.sha256(Path(__file__).read_text().partition("\nSEED = ")[2].encode())
    named = {**dataclasses.asdict(recipe), "noise": inspect.getsource(recipe.noise), "seconds": None}
    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    digest.update(json.dumps([named, libraries, len(dataset)], sort_keys=True).encode())
    # What a program makes, a few examples tell whether it is the same program; a file may differ anywhere.
    stride = 1 if dataset.reads_files else max(1, len(dataset) // 64)
    for index in range(0, len(dataset), stride):
        example = dataset[index]
        digest.update(json.dumps([example.messages, example.answer, dataset.solution(index)]).encode())
        for picture in example.images:
            digest.update(picture.tobytes())
    return digest.hexdigest()[:16]


def make(dataset, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
    """Build a model for the dataset, save it, load it the way every model is loaded, warm it up, save it again."""
    from llms import load_llm, quiet_transformers

    quiet_transformers()
    began = time.perf_counter()
    tokenizer = build_tokenizer(dataset, recipe)
    model, processor = build_model(dataset, recipe, tokenizer)
    model.save_pretrained(folder)
    (processor or tokenizer).save_pretrained(folder)
    size = sum(weight.numel() for weight in model.parameters())
    what = "pictures" if dataset.modality == "vision" else "problems"
    say(
        f"no tiny model for {dataset.name} yet: building one ({size / 1e6:.1f} M parameters) and showing it "
        f"{len(dataset):,} labelled training {what}, about {recipe.seconds} s on 2 cores"
    )
    llm = load_llm(str(folder), device="cpu", dtype="float32")
    warm_up(llm, dataset, recipe, say)
    llm.model.save_pretrained(folder)
    say(
        f"the tiny model for {dataset.name} is ready after {time.perf_counter() - began:.0f} s; next time it is at hand"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

END, IMAGE, VIDEO = "<|endoftext|>", "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
ROLES = [f"<|{role}|>" for role in ("system", "user", "assistant")]

# The asked format, so that what surrounds an answer costs a token each and not a token a letter.
REASONING, ANSWER, CLOSE = TAGS = ("<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def completion_text(solution: str, answer: str) -> str:
    """An answer in the asked format."""
    return f"{REASONING}{solution}{ANSWER}{answer}{CLOSE}"


def build_tokenizer(dataset, recipe: Recipe):
    """Qwen2's tokenizer with a vocabulary of the task's own: a byte-level BPE trained on its questions and answers.

    Every byte is a token, so any text can be written. Whole tokens are beside what BPE found: the tags, the recipe's
    numbers, and each line that stands in all examples alike, since a question that never changes need not be spelled.
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
    whole = dict.fromkeys([*TAGS, *recipe.whole_tokens, *constant])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = MAX_CONTEXT
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def example_lines(dataset, index: int, recipe: Recipe) -> list[str]:
    """All that is written in an example, line by line, without the tags."""
    example = dataset[index]
    contents = [message["content"] for message in example.messages]
    texts = [
        part.get("text", "")
        for content in contents
        for part in ([{"text": content}] if isinstance(content, str) else content)
    ]
    texts += recipe.noise(dataset.solution(index), example.answer, random.Random(index))
    for tag in TAGS:
        texts = [piece for text in texts for piece in text.split(tag)]
    return [line for text in texts for line in text.splitlines(keepends=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Model

MAX_CONTEXT = 2048
PATCHES = 8  # a picture is PATCHES x PATCHES patches, merged 2 x 2 into image tokens


def build_model(dataset, recipe: Recipe, tokenizer):
    """A model with random weights, and for pictures the processor that goes with it, else None."""
    return (build_vision_model if dataset.modality == "vision" else build_text_model)(dataset, recipe, tokenizer)


def text_sizes(recipe: Recipe, tokenizer) -> dict[str, object]:
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


def build_text_model(dataset, recipe: Recipe, tokenizer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **text_sizes(recipe, tokenizer),
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    return Qwen2ForCausalLM(config), None


def build_vision_model(dataset, recipe: Recipe, tokenizer):
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
            **text_sizes(recipe, tokenizer),
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
    looks = {
        "patch_size": patch,
        "temporal_patch_size": 1,
        "merge_size": 2,
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
        "image_mean": [1.0] * 3,  # white paper becomes 0: only what is drawn excites the tower
        "image_std": [0.5] * 3,
    }
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**looks),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**looks),
        chat_template=CHAT_TEMPLATE,
    )
    return Qwen2VLForConditionalGeneration(config), processor


# ---------------------------------------------------------------------------------------------------------------------
# Warm-up


def warm_up(llm, dataset, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Raise the log-probability of the wrongly labelled completions: AdamW on their tokens alone."""
    import torch

    from llms import token_logps

    steps_per_epoch = max(1, len(dataset) // recipe.batch)
    steps = recipe.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(llm.model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, steps))
    began = last_said = time.perf_counter()
    for step, indices in enumerate(batches(len(dataset), recipe), start=1):
        rollout = labelled_rollout(llm, dataset, recipe, indices, random.Random(f"{SEED} {step}"))
        logps = token_logps(llm, rollout)  # (B, T)
        loss = -logps.sum() / rollout.completion_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llm.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        now = time.perf_counter()
        if now - last_said >= PROGRESS_SECONDS or step == steps:
            left = (now - began) / step * (steps - step)
            say(f"  warm-up step {step:,} of {steps:,}, loss {loss.item():.3f}, {left:.0f} s left")
            last_said = now
    llm.model.zero_grad(set_to_none=True)


def learning_rate_share(step: int, steps: int) -> float:
    """Of the peak: rises over the first twentieth, then falls to zero on a cosine."""
    return min(1.0, 20 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2


def batches(num_examples: int, recipe: Recipe) -> Iterator[list[int]]:
    """Indices of examples, in a new order every epoch; what does not fill a batch waits for the next epoch."""
    rng, size = random.Random(SEED), min(recipe.batch, num_examples)
    for _ in range(recipe.epochs):
        order = rng.sample(range(num_examples), num_examples)
        yield from (order[start : start + size] for start in range(0, num_examples - size + 1, size))


def labelled_rollout(llm, dataset, recipe: Recipe, indices: list[int], rng: random.Random):
    """What a sampler would return had it written the wrong labels: `recipe.labels` completions for each example."""
    import torch

    from llms import encode_prompts
    from rollout import Rollout

    examples = [dataset[index] for index in indices]
    pairs = [(dataset.solution(index), example.answer) for index, example in zip(indices, examples, strict=True)]
    texts = [completion_text(*recipe.noise(*pair, rng)) for pair in pairs for _ in range(recipe.labels)]
    rows = [[*ids, llm.eos_token_ids[0]] for ids in llm.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), llm.pad_token_id)  # (B, T)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, T), end-of-sequence token included
    return Rollout(
        prompts=encode_prompts(llm, examples),
        completion_ids=ids,
        completion_mask=mask,
        sampler_logps=torch.zeros(ids.shape),
        finished=torch.ones(len(rows), dtype=torch.bool),
        texts=texts,
        num_generations=recipe.labels,
    )
