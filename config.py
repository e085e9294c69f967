"""Which settings are there? Each flag is one field here: its name, type, default and help. Imports no torch.

    python main.py --help                     # every flag
    python config.py > docs/flags.md          # the same as a page

Names are those of transformers' TrainingArguments and TRL's GRPOConfig wherever one exists.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import math
import os
import re
import sys
import tomllib
import typing
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from progress import did_you_mean
from rldatasets import DATASETS, dataset_options, parse_option
from tiny_models import MAX_CONTEXT, RECIPES

PROJECT = Path(__file__).with_name("pyproject.toml")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")  # names of transformers, and of the packages
LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # torchrun, accelerate and others; Open MPI; MPICH
TORCHRUN = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # the variables that it sets


def flag(
    default: Any,
    text: str,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    section: str | None = None,
    or_auto: bool = False,
    **more: Any,
) -> Any:
    """A field that becomes a command-line flag: numbers within [least, most], and over `above` and under `below`;
    `section` starts a new group of flags in --help; with `or_auto`, "auto" gives None; `more` goes to argparse."""
    bounds = {"least": least, "most": most, "above": above, "below": below}
    details = {"choices": choices, "section": section, "or_auto": or_auto, "bounds": bounds, "more": more}
    return dataclasses.field(default=default, metadata={"help": text, **details})


# ---------------------------------------------------------------------------------------------------------------------
# Objectives


@dataclasses.dataclass(frozen=True)
class Objective:
    """The choices that make an objective of the GRPO family; a flag of the same name changes each of them."""

    name: str = "custom"
    scale_rewards: str = flag(
        "group", "divide advantages by the std of the group, of the batch, or not", choices=("group", "batch", "none")
    )
    importance_sampling_level: str = flag(
        "token", "one importance ratio per token, or one per sequence (GSPO)", choices=("token", "sequence")
    )
    clip: str = flag(
        "ratio", "ratio: PPO's clipped ratio; weight: a clipped, detached weight on log π (CISPO)",
        choices=("ratio", "weight"),
    )  # fmt: skip
    epsilon: float = flag(0.2, "ε: clip the ratio below 1 − ε and above 1 + ε", least=0)
    epsilon_high: float | None = flag(None, "a different ε for the upper bound", least=0)
    beta: float = flag(0.0, "β: weight of the KL penalty; with 0 no reference model is loaded", least=0)
    kl_estimator: str = flag("k3", "estimator of the KL divergence from the reference", choices=("k1", "k2", "k3"))
    normalizer: str = flag(
        "completions",
        "divide the summed loss by: completions = each length, then their number; tokens = all tokens; "
        "max_length = completions × --max_completion_length × turns",
        choices=("completions", "tokens", "max_length"),
    )
    dynamic_sampling: bool = flag(False, "replace groups whose rewards are all equal (DAPO): 1 or 0")
    overlong_buffer: float = flag(
        0.0, "share of --max_completion_length over which a soft penalty grows to −1 (DAPO); 0: no penalty", 0, 1
    )


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("grpo", beta=0.04),  # DeepSeekMath, arXiv 2402.03300
        Objective("bnpo", beta=0.04, normalizer="tokens"),
        Objective("dr_grpo", scale_rewards="none", normalizer="max_length"),  # arXiv 2503.20783
        # DAPO, arXiv 2503.14476
        Objective("dapo", epsilon_high=0.28, normalizer="tokens", dynamic_sampling=True, overlong_buffer=0.2),
        Objective("gspo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),  # arXiv 2507.18071
        Objective("cispo", clip="weight", epsilon_high=0.28, normalizer="tokens"),  # MiniMax-M1, arXiv 2506.13585
    )
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Flags


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run. `objective` is its preset with the choices that were given; `max_steps` is None until
    `with_steps`, and `micro_batch_tokens` until memory.py's `plan_run`, unless they were given."""

    model_path: str = flag(
        "Qwen/Qwen2.5-1.5B-Instruct", "a model on the hub, a local folder, or `tiny`", section="Model and task"
    )
    dataset_name: str = flag("gsm8k", f"the task: {', '.join(DATASETS)}")
    dataset_path: str | None = flag(
        None, "data for a task that reads files: a folder or a file; for jsonl also a data set of the hub"
    )
    dataset_options: dict = flag(
        None, "options of the task, such as style=bold size=56", nargs="*", metavar="KEY=VALUE"
    )
    output_dir: str = flag(None, "folder for the run (default: runs/TASK-MODEL)")
    chat_template_kwargs: dict = flag(
        None, "keywords for the model's chat template: enable_thinking=false", nargs="*", metavar="KEY=VALUE"
    )
    train_size: int | None = flag(None, "number of training examples (default: the task's)", 1, 100_000_000)
    eval_size: int | None = flag(
        None, "number of test examples, always the first ones (default: the task's)", 1, 100_000_000
    )

    num_train_epochs: float = flag(
        1.0, "passes over the training examples", above=0, most=1_000_000, section="Duration and logging"
    )
    max_steps: int = flag(None, "number of optimizer steps; overrides --num_train_epochs", least=1)
    eval_steps: int = flag(100, "evaluate every N steps, and before and after training (0: only before and after)", 0)
    save_steps: int = flag(100, "save a checkpoint every N steps, and at the end (0: only at the end)", 0)
    save_total_limit: int = flag(2, "keep the N newest checkpoints, and the best", 1)
    max_minutes: float | None = flag(None, "stop with a checkpoint after so many minutes", above=0)
    log_completions_steps: int = flag(10, "save some completions for reading every N steps (0: only the first)", 0)
    log_completions_groups: int = flag(2, "number of groups saved each time", 1)
    report_to: list[str] | None = flag(
        None, f"also log to these trackers: {', '.join(TRACKERS)}", nargs="+", metavar="TRACKER"
    )

    prompts_per_step: int = flag(8, "Q: prompts per optimizer step", 1, section="Sampling")
    num_generations: int = flag(16, "G: completions per prompt, compared with each other", 2)
    max_prompt_length: int = flag(512, "skip prompts with more tokens than this, pictures included", 1)
    max_completion_length: int = flag(786, "cut completions, or each turn of them, off after this many tokens", 1)
    max_turns: int | None = flag(None, "the most turns of an episode (default, and at most: the task's)", 1)
    temperature: float = flag(1.0, "temperature of sampling and of the trained log-probabilities", 0.01, 100)
    eval_batch_size: int = flag(64, "prompts evaluated at once", 1)
    eval_samples: int = flag(1, "also sample K answers to each test question, for pass@K and majority@K", 1)

    objective: Objective = flag(
        OBJECTIVES["grpo"],
        f"preset: {', '.join(OBJECTIVES)}; the flags below change single choices",
        section="Objective",
    )
    num_iterations: int = flag(1, "μ: updates from the same completions", 1)
    max_resamples: int = flag(3, "rounds of further prompts with --dynamic_sampling", 1)
    train_turns: str = flag("all", "the turns whose tokens are in the loss", choices=("all", "last"))
    mask_truncated_completions: bool = flag(False, "leave completions that were cut off out of the loss")
    importance_sampling_correction: bool = flag(
        False, "weight each token by the trainer's probability over the sampler's"
    )
    correction_cap: float = flag(2.0, "upper bound of those weights", 1)
    sync_ref_model: bool = flag(False, "mix the trained weights into the reference model from time to time")
    ref_model_sync_steps: int = flag(512, "steps between two such updates of the reference", 1)
    ref_model_mixup_alpha: float = flag(0.6, "α of such an update: reference = α·model + (1 − α)·reference", 0, 1)
    shuffle_rewards: bool = flag(False, "a control that must not learn: shuffle the rewards among the completions")

    learning_rate: float = flag(1e-6, "learning rate after the warm-up", 0, 1, section="Optimizer (AdamW)")
    lr_scheduler_type: str = flag(
        "constant", "course of the learning rate after the warm-up", choices=("constant", "linear", "cosine")
    )
    warmup_ratio: float = flag(0.05, "share of the steps over which the learning rate grows from 0", 0, 1)
    weight_decay: float = flag(0.0, "decoupled weight decay", 0)
    adam_beta1: float = flag(0.9, "decay rate of the mean of the gradients", 0, below=1)
    adam_beta2: float = flag(0.99, "decay rate of the mean of the squared gradients", 0, below=1)
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm (0: do not clip)", 0)
    max_skipped_steps: int = flag(5, "stop after N steps in a row whose gradient is not finite", 1)

    lora_rank: int = flag(
        0,
        "r: train low-rank adapters of the decoder's linear layers instead of the weights; needs the package peft and "
        "about ten times the learning rate (0: train the weights)",
        0,
        section="Adapters (LoRA)",
    )
    lora_alpha: int = flag(32, "α: the adapters' output is multiplied by α / r", 1)

    micro_batch_tokens: int | None = flag(
        None,
        "tokens computed at once in the loss, which changes the result by rounding only: a number, or auto, up to 8192 "
        "as memory allows (default: auto)",
        1,
        section="Machine",
        or_auto=True,
    )
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, slower")
    dtype: str = flag(
        "auto",
        "dtype of the weights; auto: bfloat16 on CUDA and, from hidden size 512, on a CPU with AMX; else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    attn_implementation: str = flag(
        "auto",
        "attention; auto: flash-attn if installed on CUDA, else torch's scaled-dot-product attention",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    )
    fsdp_size: int = flag(
        1, "under torchrun: divide the training state among so many processes (1: each holds all of it)", 1
    )
    device: str | None = flag(None, "cuda, mps or cpu (default: the first available)")
    seed: int = flag(0, "seed of the order of the data and of sampling", 0, 2**32 - 1)

    resume: str | None = flag(
        None,
        "continue the run in --output_dir, from its newest checkpoint or the named one",
        section="Runs",
        nargs="?",
        const="newest",
        metavar="CHECKPOINT",
    )
    overwrite_output_dir: bool = flag(False, "delete the run in --output_dir")
    eval_only: bool = flag(False, "evaluate --model_path, or with --resume a checkpoint, and stop")

    argv: tuple[str, ...] = ()  # the arguments as given

    @property
    def max_episode_length(self) -> int:
        """The most tokens that the model samples in an episode."""
        return (self.max_turns or 1) * self.max_completion_length

    def with_steps(self, steps_per_epoch: int, max_turns: int = 1) -> Config:
        """The same settings with `max_turns` of the task known, and `max_steps`: --max_steps, or --num_train_epochs
        times the steps of an epoch."""
        steps = math.ceil(self.num_train_epochs * steps_per_epoch) * self.num_iterations
        return dataclasses.replace(self, max_steps=self.max_steps or max(1, steps), max_turns=max_turns)

    def flags(self) -> dict[str, Any]:
        """Every flag by name, for config.json; the choices of the objective under their own names."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "argv"}
        choices = dataclasses.asdict(self.objective)
        return values | {"objective": choices.pop("name")} | choices


def parse_args(argv: list[str] | None = None) -> Config:
    """The settings that the command line asks for. Refuses bad ones in one line, with exit status 2.

    With `--model_path tiny` the defaults are those of the task's recipe in tiny_models.py.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    first, _ = parser.parse_known_args([text for text in argv if text not in ("-h", "--help")])
    recipe = RECIPES.get(first.dataset_name) if first.model_path == "tiny" else None
    defaults: dict[str, Any] = recipe.defaults if recipe else {}
    parser.set_defaults(**{name: value for name, value in defaults.items() if name != "dataset_options"})
    given = vars(parser.parse_args(argv))
    if given["dataset_name"] not in DATASETS:
        parser.error(f"there is no task {given['dataset_name']!r}; {did_you_mean(given['dataset_name'], DATASETS)}")
    given["dataset_options"] = parse_options(parser, given, defaults.get("dataset_options", {}))
    options = key_values(parser, "chat_template_kwargs", given)
    given["chat_template_kwargs"] = {key: parse_option(value) for key, value in options.items()}
    given["output_dir"] = given["output_dir"] or f"runs/{given['dataset_name']}-{Path(given['model_path']).name}"
    choices = {field.name: given.pop(field.name) for field in dataclasses.fields(Objective) if field.name != "name"}
    choices = {name: value for name, value in choices.items() if value is not None}
    given["objective"] = dataclasses.replace(resolve_objective(parser, given["objective"]), **choices)
    if given["overwrite_output_dir"] and given["resume"]:
        parser.error("--resume continues a run, --overwrite_output_dir deletes it: use only one")
    if given["sync_ref_model"] and not given["objective"].beta:
        parser.error("--sync_ref_model needs a reference model, which is loaded only with --beta above 0")
    refuse_adapters(parser, given)
    refuse_processes(parser, given)
    refuse_old_packages(parser)
    refuse_short_context(parser, given)
    if given["attn_implementation"] == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        parser.error("--attn_implementation flash_attention_2 needs the package flash-attn, which is not installed")
    for name in given["report_to"] or []:
        if name not in TRACKERS:
            parser.error(f"there is no tracker {name!r}; {did_you_mean(name, TRACKERS)}")
        if name != "none" and importlib.util.find_spec(name) is None:
            parser.error(f"--report_to {name} needs the package {name}, which is not installed: uv pip install {name}")
    return Config(**given, argv=tuple(argv))


def resolve_objective(parser: Parser, name: str | Objective) -> Objective:
    if isinstance(name, Objective):
        return name
    if name not in OBJECTIVES:
        parser.error(f"there is no objective {name!r}; {did_you_mean(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def parse_options(parser: Parser, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The task's options from KEY=VALUE texts, over the defaults of its tiny model."""
    options, known = key_values(parser, "dataset_options", given), dataset_options(given["dataset_name"])
    for key in options:
        if key not in known:
            parser.error(f"the task {given['dataset_name']!r} has no option {key!r}; {did_you_mean(key, known)}")
    if given["model_path"] == "tiny" and parse_option(options.get("shots", 0)):
        parser.error("tiny models are taught the asked format without solved examples: leave out shots")
    return dict(defaults) | options


def key_values(parser: Parser, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The KEY=VALUE texts of a flag as a dict."""
    pairs = [text.partition("=") for text in given[name] or []]
    for key, sign, value in pairs:
        if not (key and value):
            parser.error(f"--{name} takes KEY=VALUE, not {key + sign + value!r}")
    return {key: value for key, _, value in pairs}


# ---------------------------------------------------------------------------------------------------------------------
# What else is refused before torch is imported


def refuse_adapters(parser: Parser, given: dict[str, Any]) -> None:
    """--lora_rank without the package peft, or with a reference model that the adapters do not have."""
    if given["lora_rank"] and importlib.util.find_spec("peft") is None:
        parser.error("--lora_rank needs the package peft, which is not installed: uv pip install 'peft>=0.20'")
    if given["lora_rank"] and given["sync_ref_model"]:
        parser.error("--sync_ref_model changes the reference, which with --lora_rank is the frozen base model: use one")


def launched() -> bool:
    """Did torchrun start this process, possibly as the only one?"""
    return os.environ.keys() >= TORCHRUN


def refuse_processes(parser: Parser, given: dict[str, Any]) -> None:
    """Processes that torchrun did not start would train the same model in the same folder. Those that it started share
    the prompts of a step equally."""
    size = int(os.environ["WORLD_SIZE"]) if launched() else 1
    for name in () if launched() else LAUNCHERS:
        if (found := os.environ.get(name, "")).isdigit() and int(found) > 1:
            parser.error(f"a launcher started {found} processes ({name}={found}): start them with torchrun instead")
    prompts, parts, device = given["prompts_per_step"], given["fsdp_size"], given["device"]
    if prompts % size:
        near = [str(size * times) for times in (prompts // size, prompts // size + 1) if times]
        sizes = ", ".join(str(number) for number in range(1, prompts + 1) if prompts % number == 0)
        parser.error(
            f"{size} processes cannot share --prompts_per_step {prompts} equally: choose {' or '.join(near)} prompts, "
            f"or one of {sizes} processes"
        )
    if size % parts:
        sizes = ", ".join(str(number) for number in range(1, size + 1) if size % number == 0)
        parser.error(f"--fsdp_size {parts} does not divide the {size} processes of this run: choose from {sizes}")
    if parts > 1 and given["lora_rank"]:
        parser.error("--fsdp_size divides the training state, which with --lora_rank is small: leave it out")
    if size > 1 and device not in (None, "cuda", "cpu"):
        parser.error(f"--device {device} is for one process: several need cuda, a GPU for each, or cpu")


def refuse_old_packages(parser: Parser) -> None:
    """Compare installed packages with the minimum versions in pyproject.toml, which old ones fail in obscure ways."""
    if not PROJECT.is_file():
        return
    for requirement in tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]:
        package, _, least = requirement.partition(">=")
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # importing it will say so
        if release(found) < release(least):
            parser.error(f"{package} {found} is too old: {package} >= {least} is needed; install it with `uv sync`")


def release(version: str) -> list[int]:
    """[2, 11, 0] of "2.11.0+cu128"."""
    return [int(part) for part in re.findall(r"^[\d.]*", version)[0].split(".") if part]


def refuse_short_context(parser: Parser, given: dict[str, Any]) -> None:
    """The context of a tiny model is known before its warm-up; those of other models when they are loaded."""
    prompt, completion = given["max_prompt_length"], given["max_completion_length"]
    if given["model_path"] == "tiny" and prompt + completion > MAX_CONTEXT:
        parser.error(
            f"tiny models can read {MAX_CONTEXT} tokens, fewer than --max_prompt_length {prompt} "
            f"+ --max_completion_length {completion}: lower one of them"
        )


# ---------------------------------------------------------------------------------------------------------------------
# From fields to argparse


type_hints = functools.cache(typing.get_type_hints)  # slow: it evaluates every annotation of a class


class Parser(argparse.ArgumentParser):
    """Refuses in one line, with the nearest name."""

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments: "):
            name = message.split(": ", 1)[1].split()[0]
            known = [option for option in self._option_string_actions if option.startswith("--")]
            hint = did_you_mean(name.split("=")[0], known)
            message = f"there is no flag {name}; {hint if hint.startswith('did') else 'see --help'}"
        if not (launched() and int(os.environ["RANK"])):  # of several processes one says it
            print(f"main.py: {message}", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> Parser:
    parser = Parser(
        prog="main.py",
        description="Train a language model with GRPO. `--model_path tiny` builds a small model on this machine; its "
        "defaults for each task are in tiny_models.py.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
        allow_abbrev=False,
    )
    group: Any = parser
    for owner, field in flag_fields():
        if field.metadata["section"]:
            group = parser.add_argument_group(field.metadata["section"])
        add_flag(group, owner, field)
    return parser


def flag_fields() -> list[tuple[type, dataclasses.Field]]:
    """(class, field) of every flag, in the order of --help: the choices of an objective follow --objective."""
    found: list[tuple[type, dataclasses.Field]] = []
    for field in dataclasses.fields(Config):
        if field.metadata:
            found.append((Config, field))
        if field.name == "objective":
            found += [(Objective, choice) for choice in dataclasses.fields(Objective) if choice.metadata]
    return found


def add_flag(group: Any, owner: type, field: dataclasses.Field) -> None:
    """Add a field of Config or Objective to a parser. A choice of the objective has no default here: it keeps that of
    the preset."""
    kind, meta = kind_of(owner, field), field.metadata
    default = None if owner is Objective else field.default
    if kind is bool and owner is Config:
        group.add_argument(f"--{field.name}", action="store_true", help=help_text(owner, field))
        return
    more = dict(meta["more"])
    if meta["choices"]:
        more["choices"] = meta["choices"]
    group.add_argument(
        f"--{field.name}",
        type=number_parser(kind, meta) if kind in (int, float) else truth if kind is bool else str,
        default=default,
        help=help_text(owner, field),
        **more,
    )


def help_text(owner: type, field: dataclasses.Field) -> str:
    default = field.default.name if isinstance(field.default, Objective) else field.default
    shown = owner is Config and default not in (None, False)
    text = field.metadata["help"] + (f" (default: {default})" if shown else "")
    return text.replace("%", "%%")


def kind_of(owner: type, field: dataclasses.Field) -> type:
    """int, float, bool or str: the type of a field without its None."""
    hint = type_hints(owner)[field.name]
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    return kinds[0]


def number_parser(kind: type, meta: typing.Mapping[str, Any]) -> Callable[[str], float | None]:
    """A parser of the numbers of a flag, and of "auto", which gives None, where it is allowed."""
    parse = bounded(kind, **meta["bounds"])
    if not meta["or_auto"]:
        return parse

    def parse_or_auto(text: str) -> float | None:
        return None if text == "auto" else parse(text)

    parse_or_auto.__name__ = f"{kind.__name__} or auto"  # argparse names it in "invalid int or auto value"
    return parse_or_auto


def bounded(
    kind: type, least: float | None, most: float | None, above: float | None, below: float | None
) -> Callable[[str], float]:
    """A parser of finite numbers within bounds; its error message names them."""
    if kind is int and most is None:
        most = 2**31 - 1
    names = {"at least": least, "at most": most, "above": above, "below": below}
    wanted = [f"{name} {bound:,}" for name, bound in names.items() if bound is not None]

    def parse(text: str) -> float:
        value = kind(text)
        inside = (least is None or value >= least) and (most is None or value <= most)
        inside = inside and (above is None or value > above) and (below is None or value < below)
        if not (inside and math.isfinite(value)):  # a comparison with NaN is False
            raise argparse.ArgumentTypeError(f"must be {' and '.join(wanted) or 'a finite number'}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def truth(text: str) -> bool:
    values = {"1": True, "true": True, "0": False, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be 1 or 0, not {text}")
    return values[text.lower()]


def flags_page() -> str:
    """docs/flags.md: every flag with its help, section by section."""
    lines = [
        "# Flags",
        "",
        "Made from `config.py` by `python config.py > docs/flags.md`. With `--model_path tiny` some defaults are those",
        "of the task's recipe in `tiny_models.py`.",
    ]
    for owner, field in flag_fields():
        if field.metadata["section"]:
            lines += ["", f"## {field.metadata['section']}", "", "| flag | what |", "|---|---|"]
        lines.append(f"| `--{field.name}{value_name(owner, field)}` | {help_text(owner, field).replace('%%', '%')} |")
    return "\n".join(lines) + "\n"


def value_name(owner: type, field: dataclasses.Field) -> str:
    """How the page shows the value of a flag: N for whole numbers, X for numbers, the choices, or TEXT."""
    kind, more = kind_of(owner, field), field.metadata["more"]
    if "metavar" in more:
        return f" [{more['metavar']}]" if more["nargs"] == "?" else f" {more['metavar']} …"
    if kind is bool:
        return "" if owner is Config else " {1,0}"
    if field.metadata["choices"]:
        return f" {{{','.join(field.metadata['choices'])}}}"
    if field.metadata["or_auto"]:
        return " {auto,N}"
    return {int: " N", float: " X"}.get(kind, " TEXT")


if __name__ == "__main__":
    print(flags_page(), end="")
