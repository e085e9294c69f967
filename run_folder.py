"""The files of a run: how they are written, read again, and resumed from.

    OUTPUT_DIR/
      config.json                      the flags, the values they resolved to, versions, commit, hardware
      train_logs.json                  a JSON list with one record per optimizer step, each on one line
      eval_logs/metrics_000050.json    the metrics of the evaluation at step 50
      eval_logs/samples_000050.json    its prompts and completions; the pictures are in eval_logs/images/
      train_samples/step_000050.json   some groups of step 50; the pictures are in train_samples/images/
      checkpoints/step_000100/         the model's save_pretrained files, README.md, trainer_state.pt, manifest.json
      tensorboard/                     event files, with --report_to tensorboard
      run.lock                         locked by the process that writes here, until that process ends

A process that is killed at any instruction, or a disk that is full, leaves a folder that can be read and resumed:
  - A file is written under a temporary name, synced and renamed, so it is there whole or not at all. Checkpoints too.
  - Only train_logs.json is changed in place: one write appends one record. If a kill cuts a record off, `read_records`
    leaves it out and `truncate_after` removes it.
  - The records that lead to a checkpoint are synced before the checkpoint gets its name.

report.py and plotter.py take the names of the files they read from the constants below; plotter.py adds plots/ and
report.html. Nothing here depends on a task or a model. Functions that need torch import it, so this file imports fast.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import quote

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None
    import msvcrt

CONFIG, LOG, LOCK = "config.json", "train_logs.json", "run.lock"
METRICS = "eval_logs/metrics_*.json"  # * is the step, in six digits or more
SAMPLES = {"eval": "eval_logs/samples_*.json", "train": "train_samples/step_*.json"}
TEMPORARY = ".[0-9]*.tmp"  # what a kill during `write_whole` leaves: the file's name, the process, .tmp

# What a run writes and --overwrite_output_dir removes. Any other file in the folder is kept.
RUN_FILES = (
    CONFIG,
    LOG,
    METRICS,
    *SAMPLES.values(),
    "eval_logs/images/*.png",
    "train_samples/images/*.png",
    "checkpoints/step_*",
    "checkpoints/.*_step_*",
    "tensorboard/events.out.*",
)

CLOSING = b"\n]\n"  # the end of train_logs.json; the next record overwrites it and writes it again
EMPTY_LOG = b"[" + CLOSING
BACKLOG = 8  # jobs that may wait for the writing thread; bounds the memory they hold
SMALL_RUN = 16 * 2**20  # bytes that the logs and pictures of a small run need
LOCKED_BYTE = 2**20  # Windows forbids others to read what is locked: a byte far behind the process id in run.lock
FINGERPRINT_BYTES = 4 * 2**20  # of each end of a file
MODEL_FILES = {".safetensors", ".json", ".model", ".txt", ".jinja"}  # weights, configuration, tokenizer, chat template

# A network file system or FUSE may lack locks and fsync. The run does without them.
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


class RunFolderError(ValueError):
    """The run folder cannot be used. The message is one line: what is wrong, and what to do about it."""


class RunFolder:
    """The folder of one run. Call `open_new` or `open_resume` before writing, and `close` (or use `with`) at the end.

    The checkpoint of step s holds the state after record s."""

    def __init__(self, path: str | os.PathLike):
        """Touches no file. Raises RunFolderError for a name that is not UTF-8: safetensors cannot save under it."""
        self.path = Path(path)
        try:
            is_utf8 = os.fsencode(self.path) == str(self.path).encode()
        except UnicodeError:
            is_utf8 = False
        if not is_utf8:
            shown = str(self.path).encode("utf-8", "replace").decode()
            raise RunFolderError(f"the name of the folder {shown} is not UTF-8; choose another --output_dir")
        self.log_path = self.path / LOG
        self.checkpoints = self.path / "checkpoints"
        self._lock_fd: int | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._pending: deque[Future] = deque()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # If the run has already failed, an error of the writing thread must not hide the first one.
        with contextlib.suppress(RunFolderError) if error else contextlib.nullcontext():
            self.close()

    # --- opening, closing ---

    def check_new(self, overwrite: bool = False, needed_bytes: int = SMALL_RUN) -> None:
        """Checks whether `open_new` would work, without writing, so that it can run before a model is loaded.

        Raises RunFolderError if another process uses the folder, if it holds a run (unless `overwrite`), if it cannot
        be written to, or if fewer than `needed_bytes` are free."""
        with self._explained("cannot look into"):
            existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists() or p.is_symlink())
            if not existing.is_dir():
                problem = f"{self.path} cannot be made: {existing} is not a folder"
                raise RunFolderError(f"{problem}; choose another --output_dir")
            disk = shutil.disk_usage(existing)
        if not os.access(existing, os.W_OK | os.X_OK):
            raise RunFolderError(f"no right to write in {existing}; choose another --output_dir")
        self._lock(create=False)  # first, so that a folder in use is reported as "in use"
        self._unlock()
        if not overwrite:
            self._refuse_existing_run()
        if disk.total and disk.free < needed_bytes:  # some network file systems report 0 bytes in total
            raise RunFolderError(
                f"{existing} has {disk.free / 2**30:.2f} GB free and this run needs at least "
                f"{needed_bytes / 2**30:.2f} GB; free some space or choose another --output_dir"
            )

    def open_new(self, overwrite: bool = False, needed_bytes: int = SMALL_RUN, config: dict | None = None) -> None:
        """Locks the folder for a new run and writes `config` and an empty log. `config` is written first, so that a
        run killed at any later moment can be resumed. `overwrite` removes the files of an earlier run, and no others.

        Raises RunFolderError as `check_new` does."""
        self.check_new(overwrite, needed_bytes)
        with self._explained("cannot start a run in", opening=True):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            if not overwrite:
                self._refuse_existing_run()  # again: another run may have started and ended before the lock
            for path in list(self._written()):
                _remove(path)
            if config is not None:
                self.write_config(config)
            write_whole(self.log_path, EMPTY_LOG)

    def open_resume(self, checkpoint: str | os.PathLike | None = None) -> Path | None:
        """Locks the folder and returns the checkpoint to continue from: `checkpoint`, or else the newest. Compares all
        of its bytes with their check sums. Returns None for a run that was killed before its first checkpoint. Leaves
        log, evaluations and samples unchanged; `truncate_after` takes them back to the checkpoint.

        Raises RunFolderError if the folder holds no run or is in use, or if the checkpoint is missing, damaged or of
        another run; the message names the newest good checkpoint."""
        if not (self.path / CONFIG).is_file():
            advice = "start one without --resume, and with --overwrite_output_dir if the folder is not empty"
            raise RunFolderError(f"{self.path} holds no run to resume; {advice}")
        with self._explained("cannot resume the run in", opening=True):
            self._lock()
            for complete in self.checkpoints.glob(".writing_step_*"):  # killed after the last byte, before the renaming
                final = self.checkpoints / complete.name.removeprefix(".writing_")
                if not final.exists() and damage(complete) is None:
                    complete.replace(final)
            if checkpoint is not None:
                chosen = Path(checkpoint)
            elif found := self._checkpoints():
                chosen = found[-1]
            else:
                return None
            # The log of this folder belongs to its own checkpoints only.
            own = chosen.resolve().parent == self.checkpoints.resolve() and chosen.resolve().name.startswith("step_")
            problem = damage(chosen) if own or not chosen.exists() else f"it is not of the run in {self.path}"
            if problem:
                raise self._unusable(chosen, problem)
            return chosen

    def close(self) -> None:
        """Waits for pending writes and releases the lock. Raises RunFolderError as `flush` does."""
        try:
            self.flush()
        finally:
            if self._writer:
                self._writer.shutdown()
                self._writer = None
            self._unlock()

    # --- config, log ---

    def write_config(self, config: dict) -> None:
        """Writes config.json."""
        with self._explained("cannot write config.json in"):
            _write_json(self.path / CONFIG, config)

    def read_config(self) -> dict:
        """Reads config.json. Raises RunFolderError if it is missing or not a JSON object."""
        try:
            config = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(f"{self.path / CONFIG} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise RunFolderError(f"{self.path / CONFIG} cannot be read: it is not a JSON object")
        return config

    def log_step(self, record: dict) -> None:
        """Appends a record to train_logs.json, which is valid JSON afterwards. NaN and infinities become null.

        The cost does not depend on the length of the log: one write overwrites the closing bracket. If the disk is
        full, the log keeps its earlier records and RunFolderError is raised."""
        line = json.dumps(_jsonable(record)).encode()
        with self._explained(f"cannot log to {LOG} in"), open(self.log_path, "r+b", buffering=0) as log:
            size = log.seek(0, os.SEEK_END)
            end = size - len(CLOSING)
            separator = b"\n" if size == len(EMPTY_LOG) else b",\n"
            try:
                _write_at(log, end, separator + line + CLOSING)
            except OSError:
                log.truncate(size)
                _write_at(log, end, CLOSING)  # needs no new space: the file had these bytes before
                raise

    def truncate_after(self, step: int) -> None:
        """Removes the records, evaluations and samples of later steps. Later checkpoints are renamed to .replaced_*
        and removed only when the run has saved a checkpoint at or after their step."""
        with self._explained("cannot remove later steps in"):
            for path in self._checkpoints():
                if step_of(path) > step:
                    _move(path, self.checkpoints / f".replaced_{path.name}")
            half_done = [path for name in ("writing", "removed") for path in self.checkpoints.glob(f".{name}_step_*")]
            for path in (*half_done, *self._temporary_files()):
                _remove(path)
            for pattern in (METRICS, *SAMPLES.values()):
                for path in self.path.glob(pattern):
                    if step_of(path) > step:
                        path.unlink()
            lines = [json.dumps(record) for record in read_records(self.log_path) if record["step"] <= step]
            text = "[\n" + ",\n".join(lines) + "\n]\n" if lines else EMPTY_LOG.decode()
            write_whole(self.log_path, text.encode())

    # --- evaluations and samples ---

    def log_eval(self, step: int, metrics: dict, groups: list[dict]) -> None:
        """Writes the metrics and the samples of an evaluation, in a background thread.

        groups: [{"id", "prompt", "answer", "completions": [...], "image_data": PIL image or None}]. The picture of an
        id is saved once; the file has its path under "image". A completion of several turns has "turns": [{"text",
        "length", "observation": {"text", "image_data": [PIL images]} or None}]; the file has the pictures' paths under
        "images". The caller must not change `groups` afterwards."""
        self._in_background(self._write_eval, step, metrics, groups)

    def log_samples(self, step: int, groups: list[dict]) -> None:
        """Writes some groups of a training step, in a background thread. `groups` as in `log_eval`."""
        self._in_background(self._write_groups, self._file(SAMPLES["train"], step), step, groups)

    def flush(self) -> None:
        """Waits until the background thread has written everything. Raises RunFolderError if it could not."""
        while self._pending:
            self._pending.popleft().result()

    def _in_background(self, job: Callable[..., None], *args: Any) -> None:
        while self._pending and (self._pending[0].done() or len(self._pending) >= BACKLOG):
            self._pending.popleft().result()  # raises an error of the background thread here, in the training loop
        self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="run-folder")
        self._pending.append(self._writer.submit(job, *args))

    def _write_eval(self, step: int, metrics: dict, groups: list[dict]) -> None:
        self._write_groups(self._file(SAMPLES["eval"], step), step, groups)
        with self._explained("cannot write an evaluation in"):  # metrics last: where they exist, the samples do too
            _write_json(self._file(METRICS, step), {"step": step, **metrics})

    def _write_groups(self, path: Path, step: int, groups: list[dict]) -> None:
        with self._explained("cannot write samples in"):
            path.parent.mkdir(exist_ok=True)
            rows = []
            for group in groups:
                row = {key: value for key, value in group.items() if key != "image_data"}
                row["image"] = _save_picture(path.parent, group["id"], group.get("image_data"))
                row["completions"] = [_with_saved_pictures(path.parent, one) for one in group["completions"]]
                rows.append(row)
            _write_json(path, {"step": step, "groups": rows})

    def _file(self, pattern: str, step: int) -> Path:
        return self.path / pattern.replace("*", f"{step:06d}")

    # --- checkpoints ---

    def save_checkpoint(
        self,
        step: int,
        save_model: Callable[[Path], object],
        trainer_state: dict,
        keep: int | None = None,
        best_step: int | None = None,
    ) -> Path:
        """Writes checkpoints/step_<step>/ whole or not at all, and returns its path.

        save_model: called with the folder that it writes the model's files into.
        trainer_state: nested dicts, lists and tuples of tensors, numbers, strings and None, which load without running
            code. Anything else raises TypeError here, instead of failing when the run is resumed.
        keep: keep only the newest `keep` (at least 1) checkpoints and that of `best_step`; None: keep all.

        Raises RunFolderError if the checkpoint cannot be written; earlier checkpoints are unchanged."""
        import torch
        from safetensors import SafetensorError

        self.flush()
        final = self.checkpoints / f"step_{step:06d}"
        aside = self.checkpoints / f".writing_{final.name}"
        try:
            _sync(self.log_path)
            _remove(aside)
            aside.mkdir(parents=True)
            save_model(aside)
            state_path = aside / "trainer_state.pt"
            with open(state_path, "wb") as file:  # torch's own file writer does not report a full disk as OSError
                torch.save(trainer_state, file)
            if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(state_path):
                raise TypeError(f"trainer_state holds {', '.join(unsafe)}: these would not load; convert them")
            apply_umask(aside)
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            manifest = {path.relative_to(aside).as_posix(): [_sync(path), _crc(path)] for path in files}
            _write_json(aside / "manifest.json", {"step": step, "files": manifest})
            if final.exists():
                _move(final, self.checkpoints / f".replaced_{final.name}")
            aside.replace(final)
            _sync(self.checkpoints)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not isinstance(error, (OSError, RuntimeError, SafetensorError)):
                raise
            last = self.newest_checkpoint()
            kept = f"the last good one is {last}" if last else "there is no earlier one"
            raise RunFolderError(f"checkpoint {final} could not be written: {_reason(error)}; {kept}") from error
        with self._explained("cannot remove old checkpoints in"):
            self._remove_old_checkpoints(step, keep, best_step)
        return final

    def load_trainer_state(self, checkpoint: Path) -> dict:
        """The `trainer_state` of a checkpoint, its tensors on the CPU. Loading runs no code from the file.

        Raises RunFolderError if the file is missing or damaged."""
        import pickle

        import torch

        try:
            return torch.load(checkpoint / "trainer_state.pt", map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            problem = damage(checkpoint) or "trainer_state.pt cannot be read"
            raise self._unusable(checkpoint, problem) from error

    def complete_checkpoints(self) -> list[Path]:
        """The checkpoints whose files are all there in full length, oldest first."""
        return [path for path in self._checkpoints() if damage(path, every_byte=False) is None]

    def newest_checkpoint(self) -> Path | None:
        """The last of `complete_checkpoints`, or None."""
        return next(reversed(self.complete_checkpoints()), None)

    def _checkpoints(self) -> list[Path]:
        found = (path for path in self.checkpoints.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name))
        return sorted(found, key=step_of)

    def _unusable(self, checkpoint: Path, problem: str) -> RunFolderError:
        others = [path for path in self._checkpoints() if path.resolve() != checkpoint.resolve()]
        good = next((path for path in reversed(others) if damage(path) is None), None)
        advice = f"the newest good one is {good}: continue with --resume {good}" if good else "there is no good one"
        return RunFolderError(f"cannot continue from checkpoint {checkpoint}: {problem}; {advice}")

    def _remove_old_checkpoints(self, step: int, keep: int | None, best_step: int | None) -> None:
        replaced = [path for path in self.checkpoints.glob(".replaced_step_*") if step_of(path) <= step]
        surplus = self.complete_checkpoints()[:-keep] if keep else []
        for path in replaced + [path for path in surplus if step_of(path) != best_step]:
            # Renamed first: a removal that is interrupted must not look like a damaged checkpoint.
            removed = self.checkpoints / f".removed_step_{step_of(path):06d}"
            _move(path, removed)
            _remove(removed)

    # --- lock, errors ---

    def _lock(self, create: bool = True) -> None:
        path = self.path / LOCK
        if not create and not path.exists():
            return
        with self._explained("cannot lock"):
            self._lock_fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            locked = _try_lock(self._lock_fd)
            os.lseek(self._lock_fd, 0, os.SEEK_SET)
            if not locked:
                owner = os.read(self._lock_fd, 32).decode(errors="replace").strip()
                self._unlock()
                problem = f"{self.path} is in use by another run (process {owner})"
                raise RunFolderError(f"{problem}; wait for it or choose another --output_dir")
            if create:
                os.ftruncate(self._lock_fd, 0)
                os.write(self._lock_fd, f"{os.getpid()}\n".encode())

    def _unlock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _refuse_existing_run(self) -> None:
        if any(self._written()):
            raise RunFolderError(
                f"{self.path} already holds a run; continue it with --resume, replace it with --overwrite_output_dir, "
                "or choose another --output_dir"
            )

    def _written(self) -> Iterator[Path]:
        for pattern in RUN_FILES:
            yield from self.path.glob(pattern)
        yield from self._temporary_files()

    def _temporary_files(self) -> Iterator[Path]:
        return (path for pattern in RUN_FILES for path in self.path.glob(pattern + TEMPORARY))

    @contextlib.contextmanager
    def _explained(self, failure: str, opening: bool = False) -> Iterator[None]:
        """Turns an OSError into a RunFolderError that begins with `failure`; releases the lock if opening failed."""
        try:
            yield
        except BaseException as error:
            if opening:
                self._unlock()
            if isinstance(error, OSError):
                raise RunFolderError(f"{failure} {self.path}: {_reason(error)}") from error
            raise


# --- reading ---


def read_records(path: str | os.PathLike, warn: Callable[[str], object] | None = None) -> list[dict]:
    """The records of a train_logs.json, sorted by step; [] if there is no such file.

    Leaves out a record that is cut off or damaged, and one without a step. If a step was logged twice, the last record
    counts. warn: called with one line if a record was cut off or damaged."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace") + "\n"
    except FileNotFoundError:
        return []
    decoder, records, damaged, position = json.JSONDecoder(), {}, 0, 0
    while (start := text.find("{", position)) >= 0:
        try:
            record, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            damaged += 1
            position = text.find("\n", start)  # a record is one line
            continue
        if isinstance(step := record.get("step"), int | float) and math.isfinite(step):
            records[step] = record
    if damaged and warn:
        warn(f"{path} is cut off or damaged: {len(records)} records can be read")
    return [records[step] for step in sorted(records)]


def step_of(path: Path) -> int:
    """The step in a name: 50 of metrics_000050.json, step_000050, .replaced_step_000050; -1 if there is none."""
    found = re.search(r"_(\d+)(\.json)?$", path.name)
    return int(found[1]) if found else -1


def damage(checkpoint: Path, every_byte: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None. Without `every_byte`, compares names and sizes only."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        files = [(name, int(size), int(crc)) for name, (size, crc) in manifest["files"].items()]
    except OSError:
        return "it has no manifest.json" if checkpoint.is_dir() else "it does not exist"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "manifest.json is not readable"
    for name, size, crc in files:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
        if every_byte and _crc(path) != crc:
            return f"{name} was changed: its check sum differs"
    return None


def fingerprint(path: str | os.PathLike) -> dict[str, list[int]]:
    """{file name: [bytes, check sum]} of a data file, or of the weights, configuration, tokenizer and chat template of
    a model folder. It tells whether one was replaced since the run began.

    The check sum is the CRC-32 of a file of up to 8 MiB, and of the first and last 4 MiB of a longer one: this takes
    milliseconds per file, but does not notice a change of the same length in between. Raises OSError."""
    files = [Path(path)]
    if files[0].is_dir():
        files = sorted(file for file in files[0].iterdir() if file.suffix in MODEL_FILES and file.is_file())
    return {file.name: [file.stat().st_size, _crc(file, FINGERPRINT_BYTES)] for file in files}


def hardware_and_versions(device: str = "cpu") -> dict:
    """{"versions": {...}, "commit": str or None, "hardware": {...}} of this process, for config.json."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "transformers", "peft", "datasets", "numpy", "pillow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    if str(device).startswith("cuda"):
        import torch

        device = name = torch.cuda.get_device_name(device)
    else:
        name = _processor()
    try:
        memory_gb = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        memory_gb = None
    hardware = {
        "device": str(device),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": memory_gb,
        "name": name,
        "threads": torch.get_num_threads() if (torch := sys.modules.get("torch")) else None,
    }
    return {"versions": versions, "commit": _commit(), "hardware": hardware}


def _processor() -> str:
    """The name of the processor, or "" where the system does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _commit() -> str | None:
    """The commit of this code, with "+changes" if files differ from it; None outside of its repository."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *args]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=10)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails in another repository that contains this folder
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# --- writing ---


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, syncs it and renames it, so that no reader sees a part of it."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two plotters may draw the same chart
    try:
        aside.write_bytes(data)
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def apply_umask(folder: str | os.PathLike) -> None:
    """Gives a folder and everything in it the permissions that a new folder and a new file get there.

    safetensors and tempfile make theirs for the owner alone, so that nobody else in the group could load a model."""
    probe = Path(folder) / ".permissions"  # os.umask() alone could be read only by changing it, for all threads
    probe.mkdir(exist_ok=True)
    (probe / "file").touch()
    folder_mode, file_mode = probe.stat().st_mode & 0o7777, (probe / "file").stat().st_mode & 0o7777
    shutil.rmtree(probe)
    for path in (Path(folder), *Path(folder).rglob("*")):
        if not path.is_symlink():
            with contextlib.suppress(OSError):  # a file system without permissions
                path.chmod(folder_mode if path.is_dir() else file_mode)


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(_jsonable(value), indent=1).encode() + b"\n")


def _jsonable(value: Any) -> Any:
    """`value` in the types of JSON: non-finite numbers become None, tensors and arrays lists, lone surrogates U+FFFD,
    other objects strings. json.dumps escapes control characters and everything else that is not ASCII."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_jsonable(str(key)): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return _jsonable(value.tolist())
    return _jsonable(str(value))


def _save_picture(folder: Path, example_id: str, picture: Any) -> str | None:
    """Saves a PIL image as images/<id>.png, unless it exists; returns that path relative to `folder`."""
    if picture is None:
        return None
    name = quote(example_id, safe="", errors="replace").replace("%", "_")  # an id cannot name a file elsewhere
    path = folder / "images" / f"{name}.png"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        png = io.BytesIO()
        picture.save(png, format="PNG")
        write_whole(path, png.getvalue())
    return f"images/{path.name}"


def _with_saved_pictures(folder: Path, completion: dict) -> dict:
    """The completion with the pictures of its observations saved under hashes of their contents, once each."""

    def saved(observation: dict | None) -> dict | None:
        if observation is None:
            return None
        names = [hashlib.sha256(repr(one.size).encode() + one.tobytes()) for one in observation["image_data"]]
        pairs = zip(names, observation["image_data"], strict=True)
        images = [_save_picture(folder, f"observation-{name.hexdigest()[:24]}", one) for name, one in pairs]
        return {"text": observation["text"], "images": images}

    if "turns" not in completion:
        return completion
    turns = [{**turn, "observation": saved(turn["observation"])} for turn in completion["turns"]]
    return {**completion, "turns": turns}


def _write_at(file: BinaryIO, offset: int, data: bytes) -> None:
    """Writes `data` at `offset`, normally at once; a nearly full disk takes a part, and the next write raises."""
    file.seek(offset)
    while data:
        data = data[file.write(data) :]


def _sync(path: Path) -> int:
    """Waits until a file or folder is on the disk, where the file system can do that; returns the size in bytes."""
    is_folder = path.is_dir()
    try:
        fd = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows syncs only what it may write to
    except PermissionError:
        if is_folder:  # Windows opens no folders
            return 0
        raise
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(fd)
    return path.stat().st_size


def _try_lock(fd: int) -> bool:
    """Locks an open file for this process; False if another process has locked it."""
    try:
        if fcntl:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(fd, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno not in UNSUPPORTED:
            raise
    return True


def _crc(path: Path, ends: int = 0) -> int:
    """CRC-32 of a file, or of its first and last `ends` bytes if it is longer than both together."""
    crc = 0
    with open(path, "rb") as file:
        if 0 < 2 * ends < path.stat().st_size:
            crc = zlib.crc32(file.read(ends))
            file.seek(-ends, os.SEEK_END)
        while chunk := file.read(2**23):
            crc = zlib.crc32(chunk, crc)
    return crc


def _move(source: Path, target: Path) -> None:
    _remove(target)
    source.replace(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """The operating system's reason for an exception, and what to do about it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    number = cause.errno if cause else None
    if cause is None and (found := re.search(r"os error (\d+)", str(error))):  # safetensors' wording
        number = int(found[1])
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{os.strerror(number).lower()}; free some space, then continue with --resume"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{os.strerror(number).lower()}; choose another --output_dir or change its permissions"
    return os.strerror(number).lower() if number else str(error).strip().split("\n")[0]
