"""What does a run keep, and when? `Run` joins the folder on disk, the clock, resuming, and stopping.

Errors that reach `exit_status` become one line on stderr: what, why, what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import stat
import sys
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

import parallel
from config import Config, launched
from evaluator import RewardError, RewardEvaluator
from llms import LLM
from memory import plan_run
from progress import PYTHON, Progress, setup_lines, summary_lines
from reporting import Trackers, model_card, with_model_card
from rldatasets import Dataset
from run_folder import RunFolder, RunFolderError, fingerprint, hardware_and_versions, read_records

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Flags that change no number, rounding aside, which a resumed run may give anew.
MAY_CHANGE = {
    *("max_steps", "eval_steps", "save_steps", "save_total_limit", "max_minutes", "log_completions_steps"),
    *("log_completions_groups", "report_to", "resume", "overwrite_output_dir", "output_dir", "eval_only", "fsdp_size"),
    "micro_batch_tokens",
}
NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc")  # in torch's RuntimeError of a CPU
HANGUP = getattr(signal, "SIGHUP", None)  # the terminal or connection is closed; Windows has no such signal


class Stateful(Protocol):
    """What a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Run:
    """One run, from opening its folder to its last words. Use it in a `with` block, which closes the folder. Of several
    processes only the first writes and shows anything.

    Creating it joins the other processes of the run, if there are any, and refuses an output folder that cannot be
    used, before anything slow; nothing is written yet.

    Attributes:
        checkpoint: the checkpoint to resume from; None for a run that starts at step 0.
        step: optimizer steps logged so far.
        evals: the metrics of each evaluation, by step.
        best_step: the step of the best evaluation, whose checkpoint is kept.

    Raises:
        RunFolderError: the folder is in use, holds a run, cannot be written, or has no run to resume.
    """

    def __init__(self, config: Config, evaluator: RewardEvaluator):
        self.config, self.evaluator = config, evaluator
        self.folder = RunFolder(config.output_dir)
        self.checkpoint: Path | None = None
        self.step = self.best_step = 0
        self.best_score: float | None = None
        self.evals: dict[int, dict] = {}
        self.parts: dict[str, Stateful] = {}
        self.signal: int | None = None
        self.deadline = math.inf
        self.progress: Progress | None = None
        self.trackers = Trackers([], self.folder.path, {})
        self.phases: defaultdict[str, float] = defaultdict(float)  # seconds of this step by phase
        self.step_began: float | None = None
        parallel.start(config.device)
        if not config.resume:
            parallel.on_first(self.folder.check_new, config.overwrite_output_dir)
            return
        named = None if config.resume == "newest" else config.resume
        self.checkpoint = parallel.on_first(self.folder.open_resume, named)
        if self.checkpoint is None:
            refuse_if_checkpoints_are_gone(self.folder)
            print(f"the run in {self.folder.path} stopped before its first checkpoint: it starts again from step 0")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.progress:
            self.progress.close()
        self.trackers.close()
        self.folder.__exit__(*error)

    # --- opening and resuming ---

    def open(self, config: Config, llm: LLM, reference: LLM | None, train_set: Dataset, test_set: Dataset) -> Config:
        """Plan the memory; then open the folder of a new run, or check that a resumed one has the flags, the model and
        the data it began with. `config` has the number of steps by now. Returns it with --micro_batch_tokens known."""
        began = self.folder.read_config() if config.resume else {"flags": {}}
        kept = began["flags"].get("micro_batch_tokens")
        config, planned, plan_text = plan_run(config, llm, reference, test_set, kept)
        self.config, self.llm = config, llm
        # what was loaded from --model_path; adapters are loaded with it
        original = reference or (llm if config.lora_rank or not self.checkpoint else None)
        description = describe_run(config, llm, self.evaluator) | {"planned_memory_gb": planned}
        description["fingerprints"] = fingerprints(config, original, train_set, test_set)
        self.description = description
        self.saved = self.folder.load_trainer_state(self.checkpoint) if self.checkpoint else None
        if config.resume:
            refuse_other_flags(began, description)
            refuse_other_inputs(began, description)
            description["fingerprints"] = began.get("fingerprints", {}) | description["fingerprints"]
        else:
            parallel.on_first(self.folder.open_new, config.overwrite_output_dir, checkpoint_bytes(llm), description)
        print(setup_lines(config, llm, len(train_set), len(test_set)), plan_text, sep="\n", flush=True)
        if parallel.size() > 1:
            state = "all of" if config.fsdp_size == 1 else f"1/{config.fsdp_size} of"
            print(f"{parallel.size()} processes; each holds {state} the training state", flush=True)
        if config.resume and not config.eval_only:
            parallel.on_first(self.folder.truncate_after, self.saved["run"]["step"] if self.saved else -1)
            parallel.on_first(self.folder.write_config, description)
        return config

    def start(self, **parts: Stateful | None) -> int:
        """Name the parts that a checkpoint holds, restore them on resuming, and listen for signals from now on.
        Returns the number of steps done."""
        self.parts = {name: part for name, part in parts.items() if part is not None}
        if self.saved:
            for name, part in self.parts.items():
                part.load_state_dict(self.saved[name])
            state = self.saved["run"]
            self.step, self.evals = state["step"], state["evals"]
            self.best_step, self.best_score = state["best_step"], state["best_score"]
            self.saved = None  # its tensors were copied
        if parallel.rank() == 0:
            self.trackers = Trackers(self.config.report_to or [], self.folder.path, self.config.flags(), self.step)
            dtype = str(self.llm.dtype).removeprefix("torch.")
            self.progress = Progress(self.config, self.evaluator.headline, self.step, dtype)
            total_steps = getattr(parts.get("optimizer"), "total_steps", self.config.max_steps)
            if note := schedule_note(self.config, total_steps):
                self.progress.say(note)
        if self.config.max_minutes:
            self.deadline = time.monotonic() + 60 * self.config.max_minutes
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.request_stop)
            if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(HANGUP, self.request_stop)
        return self.step

    def save(self) -> None:
        """Write a checkpoint: the model, the parts, and where the run is."""
        state = {"step": self.step, "evals": self.evals, "best_step": self.best_step, "best_score": self.best_score}
        trainer = {"run": state} | {name: part.state_dict() for name, part in self.parts.items()}
        card = model_card(self.config, self.description, self.evaluator.headline, self.evals, self.step)
        save = with_model_card(self.llm.save, card)
        kept = self.config.save_total_limit, self.best_step
        parallel.on_first(self.folder.save_checkpoint, self.step, save, trainer, *kept)

    # --- stopping ---

    def request_stop(self, number: int, _frame: Any) -> None:
        """Handle a signal: stop after this step. A second signal has its usual effect; but a second SIGHUP, which a
        shell and the system both send, is ignored. So are all further signals under torchrun, which passes on each that
        it receives: Ctrl-C alone sends two."""
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN if launched() else signal.SIG_DFL)
        if HANGUP:
            signal.signal(HANGUP, signal.SIG_IGN)
        if number == HANGUP:
            discard_output()
        again = "" if launched() else "; press Ctrl-C again to stop now"
        if parallel.rank() == 0:
            print(f"\nstopping after this step and saving a checkpoint{again}", file=sys.stderr, flush=True)

    def should_stop(self) -> bool:
        """After SIGINT, SIGTERM or SIGHUP, or when --max_minutes have passed; for any of the processes."""
        found = parallel.gather((self.signal or 0, time.monotonic() >= self.deadline))
        self.signal = max(number for number, _ in found) or None
        return self.signal is not None or any(late for _, late in found)

    def finish(self) -> int:
        """Print what changed, or how to resume. Returns the exit status."""
        if self.step < self.config.max_steps:
            print(
                f"stopped at step {self.step} of {self.config.max_steps}; resume with:  {resume_command(self.config)}"
            )
            return 128 + self.signal if self.signal else 0
        seconds = self.progress.seconds if self.progress else []
        newest = self.folder.newest_checkpoint()
        print(summary_lines(self.config, self.evaluator.headline, self.evals, seconds, newest))
        return 0

    def finish_evaluation(self, metrics: dict[str, Any], groups: list[dict]) -> int:
        """Print the metrics of --eval_only; also write them, unless this evaluates an existing run."""
        if not self.config.resume and parallel.rank() == 0:
            self.folder.log_eval(0, metrics, groups)
        for name, value in metrics.items():
            print(f"{name:32} {value:.6g}")
        return 0

    # --- logging ---

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the time of the block towards `seconds/<phase>` of the step, which begins with its first block."""
        start = time.perf_counter()
        if self.step_began is None:
            self.step_began = start
        try:
            yield
        finally:
            self.phases[phase] += time.perf_counter() - start

    def log_step(self, record: dict[str, Any]) -> None:
        """Append a record, with the times of its phases, to train_logs.json.

        Raises:
            FloatingPointError: --max_skipped_steps steps in a row had no finite loss and gradient.
        """
        total = time.perf_counter() - (self.step_began or time.perf_counter())
        seconds = {f"seconds/{phase}": self.phases[phase] for phase in ("rollout", "reward", "loss")}
        tokens = record["tokens"] + record.get("resampled_tokens", 0)
        record |= {"tokens_per_second": tokens / total, **seconds, "seconds/total": total}
        record["peak_memory_gb"] = parallel.most(peak_memory_gb(self.llm.device))
        self.phases.clear()
        self.step_began = None
        self.step = record["step"]
        if parallel.rank() == 0:
            self.folder.log_step(record)
        self.trackers.log("train", self.step, record)
        if self.progress:
            self.progress.step(record)
        if record["skipped_steps"] >= self.config.max_skipped_steps:
            raise FloatingPointError(
                f"the loss or its gradient was not finite in {record['skipped_steps']} steps in a row, so the run "
                "stopped with the weights from before them: lower --learning_rate, or use --dtype float32"
            )

    def log_samples(self, groups: list[dict]) -> None:
        if parallel.rank() == 0:
            self.folder.log_samples(self.step, groups)

    def log_eval(self, metrics: dict[str, Any], groups: list[dict]) -> None:
        """Write an evaluation, and remember whether it is the best so far."""
        if parallel.rank() == 0:
            self.folder.log_eval(self.step, metrics, groups)
        self.trackers.log("eval", self.step, metrics)
        self.evals[self.step] = metrics
        headline = self.evaluator.headline
        score = metrics[headline.metric] * (-1 if headline.lower_is_better else 1)
        if self.best_score is None or score > self.best_score:
            self.best_score, self.best_step = score, self.step
        if self.progress:
            self.progress.evaluation(self.step, metrics, groups)


def discard_output() -> None:
    """Send output to nowhere unless it goes to a file: writing to a closed terminal, or to a pipe whose reader has
    ended, would raise an exception."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # one that is closed
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


def schedule_note(config: Config, total_steps: int) -> str:
    """A line for a run that was made longer on resuming, whose learning rate has decayed to 0 by then; else empty."""
    if config.max_steps <= total_steps or config.lr_scheduler_type == "constant":
        return ""
    return (
        f"note: the learning rate decays to 0 at step {total_steps}, which was the length of the run when it began; it "
        f"stays 0 up to step {config.max_steps}, so these steps change no weight"
    )


def due(every: int, step: int, previous: int) -> bool:
    """Is a multiple of `every` in (previous, step]? Never for 0."""
    return every > 0 and step // every > previous // every


# ---------------------------------------------------------------------------------------------------------------------
# What is checked before a run starts or resumes


def refuse_if_checkpoints_are_gone(folder: RunFolder) -> None:
    """Without a checkpoint a run restarts from step 0; refuse if its log is so long that checkpoints must have been
    deleted."""
    flags, logged = folder.read_config()["flags"], len(read_records(folder.log_path))
    first_save = flags["save_steps"] + flags["num_iterations"] + flags["max_skipped_steps"]  # at the latest
    if flags["save_steps"] and logged >= first_save:
        raise RunFolderError(
            f"{folder.path} has logged {logged} steps and its checkpoints are gone: bring them back, or start again "
            "with --overwrite_output_dir"
        )


def refuse_other_flags(began: dict, now: dict) -> None:
    """Refuse, by name, a flag that would change what a resumed run computes."""
    for name, value in now["flags"].items():
        before = began["flags"].get(name)
        if name not in MAY_CHANGE and before != value:
            raise RunFolderError(
                f"--{name} was {before} when the run began and is {value} now: resume with the same flags"
            )


def refuse_other_inputs(began: dict, now: dict) -> None:
    """Refuse, by flag, a model or data that were replaced since the run began. A fingerprint that either side lacks
    cannot be compared."""
    for flag, after in now["fingerprints"].items():
        before = began.get("fingerprints", {}).get(flag)
        if before is None or after is None or before == after:
            continue
        what = f"{before} then, {after} now"
        if isinstance(before, dict) and isinstance(after, dict):
            what = ", ".join(name for name in sorted(before | after) if before.get(name) != after.get(name))
        raise RunFolderError(
            f"--{flag} {now['flags'][flag]} is not what the run began with ({what}): bring the original back, or start "
            "again with --overwrite_output_dir"
        )


def fingerprints(config: Config, llm: LLM | None, train_set: Dataset, test_set: Dataset) -> dict[str, Any]:
    """What tells whether the inputs of a run were replaced, by the flag that names them: the files of a model's folder
    or its commit on the hub, and the examples of a task that reads files."""
    found: dict[str, Any] = {}
    if llm is not None:
        commit = getattr(llm.model.config, "_commit_hash", None)
        found["model_path"] = fingerprint(llm.name) if Path(llm.name).is_dir() else commit
    if test_set.reads_files:
        flag = "dataset_path" if config.dataset_path else "dataset_name"
        found[flag] = {split.split: [len(split), check_sum(split)] for split in (train_set, test_set)}
    return found


def check_sum(dataset: Dataset) -> int:
    """CRC-32 of the questions, pictures and answers: of up to 100,000 examples, or 64 with pictures, which are slow to
    read; evenly spread over the dataset if it has more."""
    crc, most = 0, 64 if dataset.modality == "vision" else 100_000
    for index in range(0, len(dataset), math.ceil(len(dataset) / most)):
        example = dataset[index]
        crc = zlib.crc32(json.dumps([example.messages[1:], example.answer]).encode(), crc)
        for picture in example.images:
            crc = zlib.crc32(picture.tobytes(), crc)
    return crc


def describe_run(config: Config, llm: LLM, evaluator: RewardEvaluator) -> dict:
    """Contents of config.json: the flags, the values they resolved to, versions and hardware."""
    return {
        "command": shlex.join(["python", "main.py", *config.argv]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "flags": config.flags(),
        "resolved": {
            "device": str(llm.device),
            "dtype": str(llm.dtype).removeprefix("torch."),
            "attn_implementation": llm.attn_implementation,
            "parameters": llm.num_parameters,
            "trainable_parameters": llm.num_trainable,
            "processes": parallel.size(),
        },
        **hardware_and_versions(str(llm.device)),
        "task": {
            "name": config.dataset_name,
            "modality": "vision" if llm.is_vision else "text",
            "reward_names": list(evaluator.reward_names),
            "headline": dataclasses.asdict(evaluator.headline),
            "best_constant": evaluator.best_constant,
        },
    }


def checkpoint_bytes(llm: LLM) -> int:
    """Disk space for one checkpoint: the weights that are trained, AdamW's two moments, and float32 copies of
    half-precision weights."""
    trained = [weight for weight in llm.model.parameters() if weight.requires_grad]
    return 16 * 2**20 + sum(w.numel() * (w.itemsize + 8 + (4 if w.itemsize == 2 else 0)) for w in trained)


def resume_command(config: Config) -> str:
    """The command that resumes this run: its arguments with --resume, without a named checkpoint."""
    kept, skip = [], False
    for text in config.argv:
        if skip and not text.startswith("--"):
            skip = False
            continue
        skip = text == "--resume"
        if text not in ("--resume", "--overwrite_output_dir") and not text.startswith("--resume="):
            kept.append(text)
    start = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', 1)}" if launched() else PYTHON
    return f"{start} {shlex.join(['main.py', *kept, '--resume'])}"


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def exit_status(work: Callable[[Config], int], config: Config) -> int:
    """The status of `work(config)`; an error becomes one line on stderr and status 2, and with GRPO_TRACEBACK=1 a
    traceback."""
    try:
        return work(config)
    except KeyboardInterrupt:  # before or after training; during training Run handles the signal
        print("main.py: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if os.environ.get("GRPO_TRACEBACK"):
            raise
        # The message may quote what a model wrote, which must not control the terminal.
        text = "".join(c if c.isprintable() else "�" for c in " ".join(explain(error, config).split()))
        parallel.report(error, text)
        return 2


def explain(error: Exception, config: Config) -> str:
    """What went wrong, why, and what to do."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in NO_MEMORY):
        where = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "this machine"
        return (
            f"{where} is out of memory: lower --micro_batch_tokens (now {config.micro_batch_tokens or 'auto'}), add "
            "--gradient_checkpointing, or lower --num_generations, --prompts_per_step or --max_completion_length "
            f"({(str(error).splitlines() or [''])[0]})"
        )
    if isinstance(error, ValueError | OSError | FloatingPointError | RewardError):
        return str(error)
    return f"{type(error).__name__}: {error} (an error that was not expected; GRPO_TRACEBACK=1 shows where)"
