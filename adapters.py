"""How is a large model trained on a small card? By low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685).

Each linear layer of the decoder computes y = W x + (α / r) B A x. W (out, in) is frozen; A (r, in) begins at random and
B (out, r) at 0, so that the first step samples from the base model. Only A and B are trained, in float32: they alone
have gradients, moments and a place in the checkpoints. With the adapters disabled the model is the base model to the
last bit, so that it is its own reference for the KL penalty. Embeddings, norms and a vision tower have no adapters.

    python main.py --lora_rank 32 --learning_rate 1e-5             # ten times the rate of full training
    python adapters.py merge RUN/checkpoints/step_000100 OUT       # a plain model folder with W + (α / r) B A

The layers are those of the package peft, which is imported only for a model with adapters. A checkpoint is an adapter
folder in peft's format, which vLLM reads too; it names the base model, which is needed to load it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import layers
from model_checks import ModelError, read_object
from run_folder import apply_umask

if TYPE_CHECKING:
    from config import Config
    from llms import LLM

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")


def add(llm: LLM, rank: int, alpha: int, seed: int = 0) -> None:
    """Add adapters to all linear layers of the decoder and freeze everything else. The model computes what it did.

    Args:
        rank, alpha: r and α; the adapters' output is multiplied by α / r.
        seed: of the matrices A.

    Raises:
        ModelError: peft is missing, or the decoder has no linear layers.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError("adapters need the package peft, which is not installed: uv pip install 'peft>=0.20'")
    from peft import LoraConfig

    modules = layers.text_model_of(llm.model).named_modules()
    linear = [name for name, module in modules if name.startswith("layers.") and type(module) is torch.nn.Linear]
    names = sorted({name.rpartition(".")[2] for name in linear})
    if not names:
        raise ModelError(f"{llm.name} has no linear layers in its decoder that adapters could be added to")
    kind: dict[str, Any] = {"task_type": "CAUSAL_LM"}  # by which peft's Auto classes find the class of the base model
    if llm.is_vision:  # the tower's layers have some of these names
        place = {"base_model_class": type(llm.model).__name__, "parent_library": type(llm.model).__module__}
        kind = {"exclude_modules": r".*\bvisual\b.*", "auto_mapping": place}
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, **kind)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        llm.model.add_adapter(settings)
    settings.target_modules = names  # peft made a set of it, whose order differs from process to process
    settings.base_model_name_or_path = str(Path(llm.name).resolve()) if Path(llm.name).is_dir() else llm.name
    for weight in parameters(llm.model).values():
        weight.data = weight.data.to(layers.wide(weight.dtype))


def has_adapters(model: Any) -> bool:
    return bool(getattr(model, "peft_config", None))


def parameters(model: Any) -> dict[str, Tensor]:
    """The matrices A and B by their names in WEIGHTS; none for a model without adapters."""
    found = ((name, weight) for name, weight in model.named_parameters() if ".lora_" in name)
    return {f"base_model.model.{name.replace('.default', '')}": weight for name, weight in found}


def base_of(module: Any) -> Any:
    """The linear module without its adapter; any other module itself."""
    return getattr(module, "base_layer", module)


def added(product: Callable[[Tensor], Tensor], modules: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """x ↦ product(x) + (α / r) B A x, the adapters' part in float32, for modules whose outputs (b, out) lie side by
    side in the product's; the product itself if they have no adapters, or disabled ones."""
    if not all(hasattr(module, "lora_A") and not module.disable_adapters for module in modules):
        return product
    parts = [(one.lora_A.default.weight, one.lora_B.default.weight, one.scaling["default"]) for one in modules]

    def adapted(x: Tensor) -> Tensor:
        wide = x.to(parts[0][0].dtype)  # (b, in)
        low_rank = [F.linear(F.linear(wide, A), B) * scale for A, B, scale in parts]  # (b, out) each
        return (product(x) + torch.cat(low_rank, -1)).to(x.dtype)

    return adapted


@contextlib.contextmanager
def without(model: Any) -> Iterator[None]:
    """Inside the block the model computes what its base computes. A model without adapters does not change."""
    if not has_adapters(model):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def prepare(config: Config, llm: LLM) -> None:
    """Add the adapters that --lora_rank asks for, unless the model was loaded with adapters.

    Raises:
        ModelError: --model_path is an adapter that these flags cannot train further.
    """
    if not has_adapters(llm.model):
        if config.lora_rank and not config.eval_only:
            add(llm, config.lora_rank, config.lora_alpha, config.seed)
        return
    found = llm.model.peft_config["default"]
    fits = (found.r, found.lora_alpha) == (config.lora_rank, config.lora_alpha) and not config.objective.beta
    if not (fits or config.eval_only or config.resume):  # Run compares the flags of a resumed run
        raise ModelError(
            f"{config.model_path} is an adapter: train it further with --lora_rank {found.r} --lora_alpha "
            f"{found.lora_alpha} --beta 0 (its reference would be its base model), or begin with the plain model that "
            f"`python adapters.py merge {config.model_path} OUT` writes"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def save(model: Any, folder: str | os.PathLike) -> None:
    """Write the adapters and their settings, the name of the base model among them, in peft's format."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().contiguous() for name, weight in parameters(model).items()}
    save_file(weights, Path(folder) / WEIGHTS, metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(folder)


def read_settings(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The settings of an adapter folder; None for any other folder and for a name on the hub.

    Raises:
        ModelError: the folder is incomplete, or holds adapters of another kind than those of `add`.
    """
    path = Path(folder)
    if not (path / SETTINGS).is_file():
        return None
    try:
        settings = read_object(path / SETTINGS)
    except (OSError, ValueError) as error:
        raise ModelError(f"the adapter folder {folder} cannot be read: {error}") from error
    base, sizes = settings.get("base_model_name_or_path"), (settings.get("r"), settings.get("lora_alpha"))
    if not (path / WEIGHTS).is_file() or not isinstance(base, str):
        raise ModelError(f"the adapter folder {folder} lacks {WEIGHTS}, or the name of its base model in {SETTINGS}")
    others = [f"{name} {settings[name]}" for name in VARIANTS if settings.get(name)]
    if settings.get("peft_type") != "LORA" or others or not all(type(size) is int and size > 0 for size in sizes):
        raise ModelError(
            f"the adapter folder {folder} holds no plain LoRA ({', '.join(others) or 'see its settings'}): merge it "
            "into its base model with peft"
        )
    return settings


@torch.no_grad()
def load(llm: LLM, folder: str | os.PathLike, settings: dict[str, Any]) -> None:
    """Add the adapters of a folder to their base model. Raises ModelError if they do not fit its decoder layers."""
    add(llm, settings["r"], settings["lora_alpha"])
    own, found = parameters(llm.model), load_file(Path(folder) / WEIGHTS)
    wrong = own.keys() ^ found.keys() or {name for name in own if own[name].shape != found[name].shape}
    if wrong:
        raise ModelError(
            f"the adapter {folder} does not fit the linear layers of its base model's decoder: {len(wrong)} of its "
            f"matrices are missing, surplus or of another shape, such as {min(wrong)}"
        )
    for name, weight in own.items():
        weight.copy_(found[name])


@torch.no_grad()
def merge(source: str, target: str) -> None:
    """Write a plain model folder with W + (α / r) B A, computed in float32 and rounded once to the dtype of the base.

    Raises:
        ModelError: `source` is no adapter folder, its base model is not there, or `target` exists.
    """
    from llms import load_llm  # llms.py imports this file

    if read_settings(source) is None:
        raise ModelError(f"{source} is no adapter folder: it has no {SETTINGS}")
    if Path(target).exists():
        raise ModelError(f"{target} exists already: choose a new folder")
    stored: list[torch.dtype | None] = []
    llm = load_llm(source, "cpu", "float32", check=lambda config, name: stored.append(config.dtype))
    for name, layer in [(name, module) for name, module in llm.model.named_modules() if hasattr(module, "lora_A")]:
        A, B, plain = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.base_layer  # (r, in), (out, r)
        plain.weight += layer.scaling["default"] * B @ A  # (out, in)
        llm.model.set_submodule(name, plain)
    llm.model.delete_adapter("default")
    llm.model.to(stored[0] or torch.float32)
    llm.save(target)
    apply_umask(target)
    print(f"{target} holds {llm.name} with the adapter {source}, rounded to {llm.dtype}: evaluate it")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="adapters.py", description="Make a plain model of an adapter folder.")
    command = parser.add_subparsers(required=True).add_parser("merge", help="write W + (α / r) B A as a model folder")
    command.add_argument("source", metavar="IN", help="an adapter folder, such as a checkpoint of a run")
    command.add_argument("target", metavar="OUT", help="the folder to write")
    given = parser.parse_args(argv)
    try:
        merge(given.source, given.target)
    except (ModelError, OSError) as error:
        print(f"adapters.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
