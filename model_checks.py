"""Can this model be used? Refusals from its name, config, files and tokenizer. number_checks.py compares numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import transformers
from huggingface_hub import try_to_load_from_cache

if TYPE_CHECKING:
    from llms import LLM


class ModelError(ValueError):
    """A model that cannot be loaded or used; the message is one line saying what, why and what to do."""


def refuse_qwen_vl_chat(model_path: str) -> None:
    if model_path.rstrip("/").lower().endswith(("qwen-vl-chat", "qwen-vl")):
        raise ModelError(
            f"{model_path} runs only with remote code written for a transformers of 2023, which is not executed here; "
            "use its successor: --model_path Qwen/Qwen2.5-VL-3B-Instruct"
        )


VISION_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def refuse_unknown_architecture(config: Any, name: str) -> bool:
    """Refuse, from its config, a model that cannot be used. Returns whether it is a vision-language model."""
    is_vision = getattr(config, "vision_config", None) is not None
    if is_vision and config.model_type not in VISION_FAMILIES:
        raise ModelError(
            f"{name} is a vision-language model of the family {config.model_type!r}; these work here: "
            f"{', '.join(VISION_FAMILIES)}, for example Qwen/Qwen2.5-VL-3B-Instruct"
        )
    if not is_vision and type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise ModelError(f"{name} has the architecture {config.model_type!r}, which is no causal language model")
    return is_vision


CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")  # transformers ignores damage in some


def refuse_incomplete_folder(folder: Path) -> None:
    """Refuse a local folder that lacks its config or some of its safetensors weights, or has damaged settings."""
    try:
        names = {path.name for path in folder.iterdir()}
        for name in sorted(names & set(CONFIG_FILES)):
            read_object(folder / name)
        index = "model.safetensors.index.json"
        shards = set(read_object(folder / index)["weight_map"].values()) if index in names else set()
        for name in sorted(names & shards):
            open(folder / name, "rb").close()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"the folder {folder} cannot be read: {reason}") from error
    if "config.json" not in names:
        raise ModelError(f"the folder {folder} holds no model: it has no config.json")
    if missing := sorted(shards - names):
        raise ModelError(
            f"the folder {folder} lacks {len(missing)} of {len(shards)} weight files, such as {missing[0]}"
        )
    if not shards and not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"the folder {folder} has no safetensors weights; pickled weights are not loaded because they can run code"
        )


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a ValueError that names the file if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return found


def refuse_missing_tensors(loaded: dict[str, Any], name: str) -> None:
    """Refuse weights files that lack tensors of the model, which transformers would draw at random; name surplus."""
    wrong = sorted([*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])])
    if wrong:
        raise ModelError(
            f"the weights of {name} lack {len(wrong)} of the model's tensors, or have them in another shape, such as "
            f"{wrong[0]}: get complete weights"
        )
    if surplus := sorted(loaded["unexpected_keys"]):
        print(f"{name}: {len(surplus)} tensors of its weights are not used by the model, such as {surplus[0]}")


def refuse_unfit_tokenizer(llm: LLM) -> None:
    """Refuse a tokenizer without a vocabulary, or with more tokens than the embedding, and special ids beyond it."""
    if not llm.tokenizer("How many eggs?", add_special_tokens=False)["input_ids"]:
        raise ModelError(f"{llm.name} has a tokenizer without a vocabulary: is its tokenizer.json missing?")
    rows = llm.model.get_input_embeddings().weight.shape[0]
    special = (llm.pad_token_id, *llm.eos_token_ids, *llm.excluded_token_ids)
    if (most := max(*special, llm.tokenizer.vocab_size - 1)) >= rows:
        token = llm.tokenizer.convert_ids_to_tokens(most)
        raise ModelError(
            f"{llm.name} has an embedding of {rows} rows, too few for the token {most} ({token!r}) of its tokenizer or "
            "generation config: get the tokenizer that belongs to the model"
        )


# Texts that tokenizers split in different ways: digits, contractions, blanks, line ends, marks, other scripts.
SPLIT_TEXTS = (
    "They're 12,345.67 (or 89%) of what's left -- aren't they?",
    "  def f(x):\n\n\treturn x**2  # don't\r\n",
    "Naïve café, 北京2008年, Москва, हिन्दी, 👍🏽 \u0301e",
)


def report_other_tokenizer(llm: LLM) -> None:
    """Say it if the tokenizer differs from the model's tokenizer.json: transformers writes the rules of some families
    in code, and ignores those of the file."""
    if type(llm.tokenizer) is transformers.PreTrainedTokenizerFast:
        return  # reads the file itself
    folder = Path(llm.name)
    file = folder / "tokenizer.json" if folder.is_dir() else try_to_load_from_cache(llm.name, "tokenizer.json")
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return
    own = tokenizers.Tokenizer.from_file(str(file))
    for text in SPLIT_TEXTS:
        expected = own.encode(text, add_special_tokens=False).ids
        found = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
        if found != expected:
            print(
                f"{llm.name}: {type(llm.tokenizer).__name__} of transformers {transformers.__version__} splits text "
                f"otherwise than the model's tokenizer.json ({len(found)} tokens instead of {len(expected)} for "
                f"{text!r}): prompts differ from those that the model was trained on"
            )
            return
