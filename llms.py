"""Which model? Loading language models, text and vision.

Letter in the shape comments: V vocabulary.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import get_session
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import logging

import adapters
import memory
import parallel
import turns
from environments import Observation
from logprobs import KEPT_BYTES
from model_checks import (
    ModelError,
    refuse_incomplete_folder,
    refuse_missing_tensors,
    refuse_qwen_vl_chat,
    refuse_unfit_tokenizer,
    refuse_unknown_architecture,
    report_other_tokenizer,
)
from number_checks import check_numbers
from prompts import chat_text, closing_token, encode_observations, encode_prompts, refuse_stray_placeholders

if TYPE_CHECKING:
    from config import Config
    from rldatasets import Dataset

PRIMITIVES = "64"  # whose code oneDNN keeps; its default is 1024
REAL_SIZE = 512  # hidden size from which --dtype auto takes bfloat16 on a CPU; the tiny models (128) stay in float32


def tune_cpu() -> None:
    """Make CPU steps faster; call it before torch starts its threads, which inherit the first setting.

    Peaked attention yields denormal probabilities, which CPUs multiply about 100 times slower: flush them to zero.
    glibc returns large freed blocks to the system, which hands them out again page by page, filled with zeros, a tenth
    of a step's time: keep blocks of up to KEPT_BYTES for the next step. oneDNN keeps code for each shape of a bfloat16
    product, and every micro-batch has new shapes: keep that of the newest PRIMITIVES only.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVES)  # read by the first product
    torch.set_flush_denormal(True)
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in malloc.h
        ctypes.CDLL(None).mallopt(mmap_threshold, KEPT_BYTES)
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@dataclass
class LLM:
    """A model with its tokenizer and what sampling and scoring need to know about its tokens.

    Attributes:
        model: the transformers model, weights in `dtype`; `.base_model` is its decoder, with the vision tower.
        processor: turns text and pictures into tensors; None for a text model.
        eos_token_ids: every id that ends a completion (union of tokenizer and generation config).
        excluded_token_ids: ids that are never sampled and left out of the softmax: image and video placeholders, which
            would break the next forward pass.
        chat_template_kwargs: keywords for the chat template, such as enable_thinking.
        sharded: a copy of the model that is divided among several processes (parallel.py), or None.
    """

    model: Any
    tokenizer: Any
    processor: Any
    is_vision: bool
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    excluded_token_ids: tuple[int, ...]
    attn_implementation: str
    name: str
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    sharded: Any = None

    @property
    def trained(self) -> Any:
        """The weights that the loss is computed with."""
        return self.model if self.sharded is None else self.sharded

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def max_context(self) -> int | None:
        return context_length(self.model.config)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def save(self, path: str | os.PathLike) -> None:
        """Write the folder in `save_pretrained` format, which transformers and vLLM load; of a model with adapters,
        only these."""
        if adapters.has_adapters(self.model):
            adapters.save(self.model, path)
        else:
            self.model.save_pretrained(path)
        (self.processor or self.tokenizer).save_pretrained(path)

    def excluded_mask(self) -> Tensor | None:
        """(V,) True where a token may not be sampled; None if every token may be."""
        if not self.excluded_token_ids:
            return None
        mask = torch.zeros(self.model.get_output_embeddings().weight.shape[0], dtype=torch.bool, device=self.device)
        mask[list(self.excluded_token_ids)] = True
        return mask


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The asked device, else cuda, else mps, else cpu. Raises ModelError when the asked one is not there."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(device)


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device, hidden_size: int) -> torch.dtype:
    """The asked dtype; else bfloat16 where it is faster: on a GPU that computes in it, and for a model of real size on
    a CPU with AMX, which multiplies it 8 times as fast as float32. With AVX512-BF16 alone float32 is faster."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        if device.type == "cpu":
            faster = hidden_size >= REAL_SIZE and cpu_has_amx()
        else:
            faster = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if faster else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[dtype]


def cpu_has_amx() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 in tiles; an older torch that cannot tell counts as no."""
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return bool(capabilities().get("amx_bf16", False))


def pick_attention(
    attn_implementation: str | None, device: torch.device, dtype: torch.dtype, model_class: Any = None
) -> str:
    """The asked attention, else flash-attn if it is installed on CUDA and the dtype suits it, else torch's
    scaled-dot-product attention, else "eager": some classes of transformers have neither of the two."""
    if attn_implementation not in (None, "auto"):
        return attn_implementation
    installed = importlib.util.find_spec("flash_attn") is not None
    suits = device.type == "cuda" and dtype == torch.bfloat16 and getattr(model_class, "_supports_flash_attn", True)
    if installed and suits:
        return "flash_attention_2"
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"


def load_llm(
    model_path: str | os.PathLike,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    check: Callable[[Any, str], object] | None = None,
) -> LLM:
    """Load a text or vision-language model from the hub or a local folder: safetensors only, no remote code.

    A few tokens are sampled and scored (number_checks.py), so that a model which this code would compute wrongly is
    found here. An adapter folder is loaded with its base model.

    Args:
        check: called with the model's config and name before the weights are loaded.

    Raises:
        ModelError: the model is not there, is incomplete, needs a token or remote code, or is one that this code cannot
            sample from and score.
        OutOfMemory: its weights alone do not fit.
    """
    if settings := adapters.read_settings(model_path):
        return load_adapter(model_path, settings, device, dtype, attn_implementation, chat_template_kwargs, check)
    name = str(model_path)
    refuse_qwen_vl_chat(name)
    tune_cpu()
    quiet_transformers()
    on, hub = pick_device(device), hub_options(Path(model_path).is_dir())
    if Path(model_path).is_dir():
        refuse_incomplete_folder(Path(model_path))
    with readable_errors(name):
        config = AutoConfig.from_pretrained(model_path, **hub)
        is_vision = refuse_unknown_architecture(config, name)
        if check:
            check(config, name)
        processor: Any = AutoProcessor.from_pretrained(model_path, **hub) if is_vision else None
        tokenizer = processor.tokenizer if is_vision else AutoTokenizer.from_pretrained(model_path, **hub)
        auto_class: Any = AutoModelForImageTextToText if is_vision else AutoModelForCausalLM
        kind = pick_dtype(dtype, on, getattr(config.get_text_config(), "hidden_size", 0))
        attention = pick_attention(attn_implementation, on, kind, auto_class._model_mapping[type(config)])
        memory.refuse_weights(auto_class, config, kind, on, name)
        model = read_model(auto_class, name, dtype=kind, attn_implementation=attention, **hub)
        model = model.to(on)
    # The pad token often ends turns inside prompts too: with a padding_idx its embedding would not be trained.
    model.get_input_embeddings().padding_idx = None
    model.eval()  # with dropout, trainer and sampler would disagree; gradients do not need train mode
    eos_token_ids = union_of_eos(tokenizer, processor, model)
    llm = LLM(
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        is_vision=is_vision,
        eos_token_ids=eos_token_ids,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_token_ids[0],
        excluded_token_ids=placeholder_ids(config),
        attn_implementation=attention,
        name=name,
        chat_template_kwargs=chat_template_kwargs or {},
    )
    refuse_unfit_tokenizer(llm)
    report_other_tokenizer(llm)
    check_numbers(llm)
    copy_from_file(model)
    return llm


def read_model(auto_class: Any, name: str, **how: Any) -> Any:
    """A model of transformers with the weights of its files, none missing. `how`: keywords of `from_pretrained`."""
    checked = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # for refuse_missing_tensors
    model, loaded = auto_class.from_pretrained(name, use_safetensors=True, **checked, **how)
    refuse_missing_tensors(loaded, name)
    return model


def copy_from_file(model: Any) -> None:
    """On a CPU, copy the weights that are parts of the mapped file. The trial of the sampler has copied the others (see
    rollout.fused_weights), and as long as one part is in use, the pages of the whole file count as the process's."""
    for weight in model.parameters() if model.device.type == "cpu" else ():
        if weight.untyped_storage().nbytes() == weight.nbytes:
            weight.data = weight.data.clone()


def load_adapter(folder: str | os.PathLike, settings: dict[str, Any], *how: Any) -> LLM:
    """Load an adapter folder with its base model; `how` as for `load_llm`."""
    try:
        llm = load_llm(settings["base_model_name_or_path"], *how)
    except ModelError as error:
        raise ModelError(f"the adapter {folder} needs its base model: {error}") from error
    adapters.load(llm, folder, settings)
    check_numbers(llm)
    return llm


def hub_options(local: bool) -> dict[str, Any]:
    """Keywords of `from_pretrained`. For a local folder, or without a network, the hub is not asked."""
    token = (os.environ.get("HF_TOKEN") or os.environ.get("HUGGINGFACE_TOKEN") or "").strip()
    return {"token": token or None, "trust_remote_code": False, "local_files_only": local or not hub_answers()}


def hub_answers(seconds: float = 5.0) -> bool:
    """Is the hub reachable? One quick request; otherwise huggingface_hub retries each file for 23 s even if cached."""
    try:
        return get_session().head(constants.ENDPOINT, timeout=seconds).status_code < 500
    except Exception:  # the HTTP library has its own exception types
        return False


def union_of_eos(tokenizer: Any, processor: Any, model: Any) -> tuple[int, ...]:
    """Ids that end a completion: those that the tokenizer and the generation config name (Qwen2.5: different ones), and
    the token with which the chat template closes the assistant's turn."""
    ids = [tokenizer.eos_token_id, closing_token(tokenizer, processor)]
    if model.generation_config is not None:
        named = model.generation_config.eos_token_id
        ids += named if isinstance(named, list) else [named]
    ids = sorted({i for i in ids if i is not None})
    if not ids:
        raise ModelError("the model names no end-of-sequence token in its tokenizer or generation config: add one")
    return tuple(ids)


def context_length(config: Any) -> int | None:
    """The number of tokens that a model with this config can read; None if it names no limit."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # past this length it rotates all keys otherwise, the cached ones too
        return rope["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", None)


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """Ids that a prompt holds in place of the features of its pictures."""
    ids = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    return tuple(sorted({i for i in ids if i is not None}))


def prepare_training(config: Config, llm: LLM) -> None:
    """Add what the flags ask for: adapters, gradient checkpointing, and a copy divided among several processes."""
    adapters.prepare(config, llm)
    if config.gradient_checkpointing:
        recompute_activations(llm.model)
    if config.fsdp_size > 1 and not config.eval_only:
        parallel.shard(llm, config.fsdp_size)


def recompute_activations(model: Any) -> None:
    """Gradient checkpointing: recompute layers in the backward pass instead of keeping their activations.

    transformers does so in train mode only, in which dropout would be active: it is set to zero.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


class readable_errors:  # lower case, like the context managers of the standard library
    """Turns the errors of a hub or a model folder into a ModelError of one line."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, ModelError | memory.OutOfMemory):
            advice = advice_for(error, self.name, Path(self.name).is_dir())
            raise ModelError(f"the model {self.name!r} cannot be loaded: {advice}") from error


def advice_for(error: Exception, name: str, local: bool) -> str:
    """Why loading the model `name` failed, and what to do, by the types of the exceptions behind the error."""
    causes: list[BaseException] = [error]
    while nested := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(nested)
    text = " ".join(str(error).replace(name, "it").split())  # a name may hold any word
    unknown = any(isinstance(cause, RepositoryNotFoundError) for cause in causes)  # the hub answers 401 to these too
    status = [getattr(getattr(cause, "response", None), "status_code", None) for cause in causes]
    if any(isinstance(cause, GatedRepoError) for cause in causes) or ({401, 403} & set(status) and not unknown):
        return "it needs permission: accept its licence on the hub and set HF_TOKEN"
    if "trust_remote_code" in text or "custom code" in text:
        return "it needs code from the hub, which is never executed here: choose a model that transformers knows"
    if "safetensors" in text and "does not appear to have" in text:
        return "it has no safetensors weights; pickled weights are not loaded here because they can run code"
    if isinstance(error, SafetensorError):
        return f"its weights are damaged ({text[:160]}): get them again"
    if isinstance(error, ImportError):
        return f"a package is missing: {text[:200]}"
    if isinstance(error, OSError) and not local:
        return (
            "it is neither a local folder nor a model that the hub (or its cache on this machine) gives; check the "
            f"name, the network, and HF_TOKEN if it is private ({text[:160]})"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return "its weights do not fit into this GPU's memory: choose a smaller model"
    return f"{type(error).__name__}: {text[:300]}"


def quiet_transformers() -> None:
    """Keep progress bars and retries out of the log; a ModelError says once what went wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a thread prepares pictures beside it
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()


def refuse_unfit_config(config: Config, test_set: Dataset, model_config: Any, name: str) -> None:
    """Refuse, from its config, a model that cannot do the task.

    Raises:
        ModelError: a task with pictures for a text model; prompts and completions longer than the model's context.
    """
    if test_set.modality == "vision" and getattr(model_config, "vision_config", None) is None:
        raise ModelError(
            f"the task {test_set.name!r} shows pictures and {name} reads text only: choose a vision-language model "
            "such as Qwen/Qwen2.5-VL-3B-Instruct, or --model_path tiny"
        )
    context, most = context_length(model_config), test_set.max_turns
    if context and config.max_prompt_length + most * config.max_completion_length > context:
        raise ModelError(
            f"{name} can read {context} tokens, fewer than --max_prompt_length {config.max_prompt_length} "
            f"+ {f'{most} turns of ' if most > 1 else ''}--max_completion_length {config.max_completion_length}: "
            "lower one of them"
        )


def refuse_unfit_model(config: Config, llm: LLM, train_set: Dataset, test_set: Dataset) -> None:
    """Refuse a task that the model cannot do.

    Raises:
        ModelError: as `refuse_unfit_config`; a test set without a prompt of at most --max_prompt_length tokens; a
            question from a file that has a placeholder of pictures.
    """
    for dataset in (train_set, test_set):
        refuse_unfit_config(config, dataset, llm.model.config, llm.name)
        if llm.is_vision and dataset.modality == "text" and dataset.reads_files:  # else none, or slow
            for index in range(len(dataset)):
                refuse_stray_placeholders(llm, dataset[index], chat_text(llm, dataset[index]))
    lengths = (encode_prompts(llm, [test_set[i]]).lengths[0] for i in range(len(test_set)))
    if all(length > config.max_prompt_length for length in lengths):
        hint = f"raise it{', or lower shots in --dataset_options' if test_set.shots else ''}"
        raise ModelError(f"all test prompts are longer than --max_prompt_length {config.max_prompt_length}: {hint}")
    if test_set.max_turns > 1:
        refuse_unfit_conversation(config, llm, test_set)


def refuse_unfit_conversation(config: Config, llm: LLM, test_set: Dataset) -> None:
    """Play an episode of empty turns, and refuse it if the model's template cannot write its observations or if it is
    longer than the model's context."""
    environment = test_set.environments([test_set[0]])[0]
    observations = [Observation("Go on.")]  # shows what the template does, if the environment says nothing
    while len(observations) < test_set.max_turns:
        if (shown := turns.answer(environment, "", len(observations))) is None:
            break
        observations.append(shown)
    tokens = sum(len(ids) for ids in encode_observations(llm, observations)[0][1:])
    needed = config.max_prompt_length + test_set.max_turns * config.max_completion_length + tokens
    if llm.max_context and needed > llm.max_context:
        raise ModelError(
            f"{llm.name} can read {llm.max_context} tokens, and {test_set.max_turns} turns with {tokens} tokens of "
            f"observations may need {needed}: lower --max_turns, --max_prompt_length or --max_completion_length"
        )
