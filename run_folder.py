"""What a run leaves on disk, and how it is found again. No other file knows these names:

    OUTPUT_DIR/
      config.json                      the flags as resolved, versions, commit, hardware
      train_logs.json                  a JSON list, one record a line, one record per optimizer step
      eval_logs/metrics_000050.json    the numbers of an evaluation
      eval_logs/samples_000050.json    what was asked and answered there; pictures under eval_logs/images/
      train_samples/step_000050.json   some groups of that step; pictures under train_samples/images/
      checkpoints/step_000100/         save_pretrained files, trainer_state.pt, manifest.json (sizes, check sums)
      run.lock                         locked while a process writes here; the lock dies with the process

The promise: a process killed at any instruction, or a disk that fills up, leaves a folder that can be read and resumed.
  - A file is written aside, synced and renamed: it is there whole or not at all. Checkpoint folders likewise.
  - The log alone is appended to, in place: one write per record, whatever the length of the run. A record cut off by
    the kill is skipped by `read_records` and removed on resuming.
  - Whatever was logged before a checkpoint is on the disk before that checkpoint is.

Tasks and models are foreign here, and importing this file is cheap: torch is imported where it is needed.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import shutil
import subprocess
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

CLOSING = b"\n]\n"  # ends train_logs.json; the next record is written over it, and closes the list again
EMPTY_LOG = b"[" + CLOSING
BACKLOG = 8  # jobs that may wait for the writing thread before the loop waits for it: bounds the memory they hold
SMALL_RUN = 16 * 2**20  # bytes a run needs at the least: logs and pictures

# What a run writes and --overwrite_output_dir removes. Anything else in the folder belongs to somebody else.
WRITTEN = (
    "config.json",
    "train_logs.json",
    "eval_logs/metrics_*.json",
    "eval_logs/samples_*.json",
    "eval_logs/images/*.png",
    "train_samples/step_*.json",
    "train_samples/images/*.png",
    "checkpoints/step_*",
    "checkpoints/.*_step_*",
)


class RunFolderError(ValueError):
    """Something about the run folder stops the run. One line: what, why, what to do."""


class RunFolder:
    """The folder of one run: `open_new` or `open_resume` before writing, `close` (or a `with` block) at the end.

    Everything is ordered by `step`; the checkpoint of step s holds the state after record s."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.log_path = self.path / "train_logs.json"
        self.checkpoints = self.path / "checkpoints"
        self._lock_fd: int | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._pending: deque[Future] = deque()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        # When the run is already failing, what the writing thread has to complain about must not hide the first cause.
        with contextlib.suppress(RunFolderError) if error else contextlib.nullcontext():
            self.close()

    # --- opening, closing ---

    def check_new(self, overwrite: bool = False, needed_bytes: int = SMALL_RUN) -> None:
        """Would `open_new` work? Writes nothing, so that it can be asked before a model is loaded.

        Raises RunFolderError: the folder is in use, holds a run (unless `overwrite`) or cannot be written, or there are
        less than `needed_bytes` free."""
        with self._explained("cannot look into"):
            existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists() or p.is_symlink())
        if not existing.is_dir():
            raise RunFolderError(f"{self.path} cannot be made: {existing} is not a folder; choose another --output_dir")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise RunFolderError(f"no right to write in {existing}; choose another --output_dir")
        self._lock(create=False)  # a folder in use is said to be that, not to "hold a run"
        self._unlock()
        if not overwrite:
            self._refuse_existing_run()
        free = shutil.disk_usage(existing).free
        if free < needed_bytes:
            raise RunFolderError(
                f"{existing} has {free / 2**30:.2f} GB free and this run needs at least {needed_bytes / 2**30:.2f} GB; "
                "free some space or choose another --output_dir"
            )

    def open_new(self, overwrite: bool = False, needed_bytes: int = SMALL_RUN, config: dict | None = None) -> None:
        """Locks the folder for a new run with an empty log. `overwrite` removes the run that is there, and only that.
        `config` is written before anything else, so that whatever is left of a run that is killed can be resumed.

        Raises RunFolderError as `check_new` does."""
        self.check_new(overwrite, needed_bytes)
        with self._explained("cannot start a run in", opening=True):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            if not overwrite:
                self._refuse_existing_run()  # one that was started and ended between the check and the lock
            for path in list(self._written()):
                _remove(path)
            if config is not None:
                self.write_config(config)
            _write_whole(self.log_path, EMPTY_LOG)

    def open_resume(self, checkpoint: str | os.PathLike | None = None) -> Path | None:
        """Locks the folder and returns the checkpoint to continue from: the newest, or the one asked for, every byte
        checked; None for a run that stopped before its first one and so starts again. Changes nothing the run wrote;
        `truncate_after` does, once the caller has decided to go on.

        Raises RunFolderError: no run here, in use, or a checkpoint missing or damaged (naming the newest good one)."""
        if not (self.path / "config.json").is_file():
            advice = "start one without --resume (and with --overwrite_output_dir if the folder is in the way)"
            raise RunFolderError(f"{self.path} holds no run to resume; {advice}")
        with self._explained("cannot resume the run in", opening=True):
            self._lock()
            for written in self.checkpoints.glob(".writing_step_*"):  # killed between the last byte and the renaming?
                final = self.checkpoints / written.name.removeprefix(".writing_")
                if not final.exists() and damage(written) is None:
                    written.rename(final)
            if checkpoint is not None:
                chosen = Path(checkpoint)
            elif found := self._checkpoints():
                chosen = found[-1]
            else:
                return None
            # The logs in this folder go with its own checkpoints only.
            own = chosen.resolve().parent == self.checkpoints.resolve() and chosen.resolve().name.startswith("step_")
            problem = damage(chosen) if own or not chosen.exists() else f"it is not of the run in {self.path}"
            if problem:
                raise self._unusable(chosen, problem)
            return chosen

    def close(self) -> None:
        """Finishes what is waiting to be written and lets go of the folder. Raises RunFolderError as `flush` does."""
        try:
            self.flush()
        finally:
            if self._writer:
                self._writer.shutdown()
                self._writer = None
            self._unlock()

    # --- config, log ---

    def write_config(self, config: dict) -> None:
        """config.json, whole or not at all."""
        with self._explained("cannot write config.json in"):
            _write_json(self.path / "config.json", config)

    def read_config(self) -> dict:
        """What `write_config` wrote. Raises RunFolderError when it is not there or is not JSON."""
        try:
            return json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self.path / 'config.json'} cannot be read: {error}") from error

    def log_step(self, record: dict) -> None:
        """Appends a record to train_logs.json, which is valid JSON afterwards; NaN and infinities become null.

        The cost does not depend on how many records there are: the closing bracket is overwritten by one write. When
        the disk is full the file goes back to what it was and RunFolderError is raised."""
        line = json.dumps(_jsonable(record)).encode()
        with self._explained("cannot log to train_logs.json in"), open(self.log_path, "r+b", buffering=0) as log:
            size = log.seek(0, os.SEEK_END)
            end = size - len(CLOSING)
            separator = b"\n" if size == len(EMPTY_LOG) else b",\n"
            try:
                _write_at(log.fileno(), separator + line + CLOSING, end)
            except OSError:
                log.truncate(size)
                _write_at(log.fileno(), CLOSING, end)  # these bytes were there before: they need no new space
                raise

    def truncate_after(self, step: int) -> None:
        """Takes the run back to `step`, to continue from there: removes the records, evaluations and samples of later
        steps. Later checkpoints cost hours: they are only set aside, until the run has saved past them."""
        with self._explained("cannot take back the run in"):
            for path in self._checkpoints():
                if _step(path) > step:
                    _move(path, self.checkpoints / f".replaced_{path.name}")
            for pattern in (".writing_step_*", ".removed_step_*"):
                for leftover in self.checkpoints.glob(pattern):
                    _remove(leftover)
            for pattern in ("eval_logs/*_*.json", "train_samples/step_*.json"):
                for path in self.path.glob(pattern):
                    if _step(path) > step:
                        path.unlink()
            lines = [json.dumps(record) for record in read_records(self.log_path) if record.get("step", 0) <= step]
            text = "[\n" + ",\n".join(lines) + "\n]\n" if lines else EMPTY_LOG.decode()
            _write_whole(self.log_path, text.encode())

    # --- what was sampled ---

    def log_eval(self, step: int, metrics: dict, groups: list[dict]) -> None:
        """eval_logs/metrics_<step>.json and samples_<step>.json, in the background.

        groups: [{"id", "prompt", "answer", "completions": [...], "image_data": PIL image or None}]. A picture is saved
        once per id; the file has its path as "image". The caller must not change `groups` any more."""
        self._in_background(self._write_eval, step, metrics, groups)

    def log_samples(self, step: int, groups: list[dict]) -> None:
        """train_samples/step_<step>.json, in the background. `groups` as in `log_eval`."""
        self._in_background(self._write_groups, self.path / "train_samples" / f"step_{step:06d}.json", step, groups)

    def flush(self) -> None:
        """Waits until everything logged is in its file. Raises RunFolderError for what could not be written."""
        while self._pending:
            self._pending.popleft().result()

    def _in_background(self, job: Callable, *args) -> None:
        while self._pending and (self._pending[0].done() or len(self._pending) >= BACKLOG):
            self._pending.popleft().result()  # raises here, in the loop, what went wrong there
        self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="run-folder")
        self._pending.append(self._writer.submit(job, *args))

    def _write_eval(self, step: int, metrics: dict, groups: list[dict]) -> None:
        folder = self.path / "eval_logs"
        self._write_groups(folder / f"samples_{step:06d}.json", step, groups)
        with self._explained("cannot write an evaluation in"):  # last: where there are metrics, there are samples
            _write_json(folder / f"metrics_{step:06d}.json", {"step": step, **metrics})

    def _write_groups(self, path: Path, step: int, groups: list[dict]) -> None:
        with self._explained("cannot write samples in"):
            path.parent.mkdir(exist_ok=True)
            rows = []
            for group in groups:
                row = {key: value for key, value in group.items() if key != "image_data"}
                row["image"] = _save_picture(path.parent, group["id"], group.get("image_data"))
                rows.append(row)
            _write_json(path, {"step": step, "groups": rows})

    # --- checkpoints ---

    def save_checkpoint(
        self,
        step: int,
        save_model: Callable,
        trainer_state: dict,
        keep: int | None = None,
        best_step: int | None = None,
    ) -> Path:
        """checkpoints/step_<step>/, whole or not at all; returns its path.

        save_model: called with the folder to write into.
        trainer_state: nested dicts, lists and tuples of tensors, numbers, strings and None, which load without running
            code. Anything else is a TypeError now, rather than when the run has to be resumed.
        keep: only the newest `keep` (at least 1) checkpoints and that of `best_step` stay; None: all of them.

        Raises RunFolderError when it cannot be written; the earlier checkpoints are as they were."""
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
            with open(state_path, "wb") as file:  # torch's own writer would not say that the disk is full
                torch.save(trainer_state, file)
            if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(state_path):
                raise TypeError(f"trainer_state holds {', '.join(unsafe)}: these would not load; convert them")
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            manifest = {path.relative_to(aside).as_posix(): [_sync(path), _crc(path)] for path in files}
            _write_json(aside / "manifest.json", {"step": step, "files": manifest})
            if final.exists():
                _move(final, self.checkpoints / f".replaced_{final.name}")
            aside.rename(final)
            _sync(self.checkpoints)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not isinstance(error, (OSError, RuntimeError, SafetensorError)):
                raise
            last = self.newest_checkpoint()
            kept = f"the last good one is {last}" if last else "there is none before it"
            raise RunFolderError(f"checkpoint {final} could not be written: {_why(error)}; {kept}") from error
        with self._explained("cannot remove old checkpoints in"):
            self._rotate(step, keep, best_step)
        return final

    def load_trainer_state(self, checkpoint: Path) -> dict:
        """The `trainer_state` a checkpoint was saved with, its tensors on the CPU; nothing in it is executed.

        Raises RunFolderError when it is missing or damaged."""
        import pickle

        import torch

        try:
            return torch.load(checkpoint / "trainer_state.pt", map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            problem = damage(checkpoint) or "trainer_state.pt cannot be read"
            raise self._unusable(checkpoint, problem) from error

    def complete_checkpoints(self) -> list[Path]:
        """The checkpoints that have all their files in full length, oldest first."""
        return [path for path in self._checkpoints() if damage(path, every_byte=False) is None]

    def newest_checkpoint(self) -> Path | None:
        """The last of `complete_checkpoints`, None without any."""
        return next(reversed(self.complete_checkpoints()), None)

    def _checkpoints(self) -> list[Path]:
        found = (path for path in self.checkpoints.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name))
        return sorted(found, key=_step)

    def _unusable(self, checkpoint: Path, problem: str) -> RunFolderError:
        others = [path for path in self._checkpoints() if path.resolve() != checkpoint.resolve()]
        good = next((path for path in reversed(others) if damage(path) is None), None)
        advice = f"the newest good one is {good}: continue with --resume {good}" if good else "there is no good one"
        return RunFolderError(f"cannot continue from checkpoint {checkpoint}: {problem}; {advice}")

    def _rotate(self, step: int, keep: int | None, best_step: int | None) -> None:
        passed = [path for path in self.checkpoints.glob(".replaced_step_*") if _step(path) <= step]
        surplus = self.complete_checkpoints()[:-keep] if keep else []
        for path in passed + [path for path in surplus if _step(path) != best_step]:
            # Renamed first: a removal that is cut short must not look like a damaged checkpoint.
            removed = self.checkpoints / f".removed_step_{_step(path):06d}"
            _move(path, removed)
            _remove(removed)

    # --- lock, errors ---

    def _lock(self, create: bool = True) -> None:
        path = self.path / "run.lock"
        if not create and not path.exists():
            return
        with self._explained("cannot lock"):
            self._lock_fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(self._lock_fd, 32, 0).decode(errors="replace").strip()
                self._unlock()
                problem = f"{self.path} is in use by another run (process {owner})"
                raise RunFolderError(f"{problem}; wait for it or choose another --output_dir") from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise  # those three: a file system without locks, which is no reason not to run
            if create:
                os.ftruncate(self._lock_fd, 0)
                os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)

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
        return (path for pattern in WRITTEN for aside in ("", ".tmp") for path in self.path.glob(pattern + aside))

    @contextlib.contextmanager
    def _explained(self, failure: str, opening: bool = False) -> Iterator[None]:
        """Turns the operating system's errors into a RunFolderError; a folder that could not be opened is let go."""
        try:
            yield
        except BaseException as error:
            if opening:
                self._unlock()
            if isinstance(error, OSError):
                raise RunFolderError(f"{failure} {self.path}: {_why(error)}") from error
            raise


# --- reading what was written ---


def read_records(path: str | os.PathLike) -> list[dict]:
    """The records of a train_logs.json, [] when there is no such file. A record cut off by a kill is left out."""
    if not Path(path).exists():
        return []
    text = Path(path).read_bytes()
    try:
        return json.loads(text)
    except ValueError:  # not closed: a record is a line
        records = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # "[", and the line that was cut
                records.append(json.loads(line.rstrip(b",")))
        return records


def damage(checkpoint: Path, every_byte: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, None when nothing is. Without `every_byte`, by names and sizes alone."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    except OSError:
        return "it has no manifest.json" if checkpoint.is_dir() else "it does not exist"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is not readable"
    for name, (size, crc) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
        if every_byte and _crc(path) != crc:
            return f"{name} is not what was written"
    return None


def hardware_and_versions(device: str = "cpu") -> dict:
    """{"versions": {...}, "commit": str or None, "hardware": {...}}, for config.json: what this process runs on."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "transformers", "datasets", "numpy", "pillow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    if str(device).startswith("cuda"):
        import torch

        device = torch.cuda.get_device_name(device)
    hardware = {
        "device": str(device),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    return {"versions": versions, "commit": _commit(), "hardware": hardware}


def _commit() -> str | None:
    """The commit of this code, with "+changes" when files differ from it; None outside of its repository."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # it must be this code's repository, not one around it
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# --- small helpers ---


def _jsonable(value: Any) -> Any:
    """`value` in JSON's types: non-finite numbers as None, tensors and arrays as lists, lone surrogates (which strict
    readers refuse) as U+FFFD. Control characters are left to json.dumps, which escapes all but plain ASCII."""
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
    """Saves a picture as images/<id>.png, unless it is there; returns that path relative to `folder`."""
    if picture is None:
        return None
    name = quote(example_id, safe="", errors="replace").replace("%", "_")  # whatever the id is, a file in this folder
    path = folder / "images" / f"{name}.png"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        aside = path.with_suffix(".png.tmp")
        picture.save(aside, format="PNG")
        _sync(aside)
        aside.rename(path)
    return f"images/{path.name}"


def _write_json(path: Path, value: Any) -> None:
    _write_whole(path, json.dumps(_jsonable(value), indent=1).encode() + b"\n")


def _write_whole(path: Path, data: bytes) -> None:
    """Writes a file aside, syncs it and renames it: nobody ever sees a part of it, even after a power cut."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_bytes(data)
        _sync(aside)
        aside.rename(path)
        _sync(path.parent)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _write_at(fd: int, data: bytes, offset: int) -> None:
    """One pwrite as a rule; on a full disk it may take only a part, and the next attempt says why."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _sync(path: Path) -> int:
    """Has the disk confirm what was written to a file or folder; returns its size."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**23):
            crc = zlib.crc32(chunk, crc)
    return crc


def _move(source: Path, target: Path) -> None:
    _remove(target)
    source.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _step(path: Path) -> int:
    """The step in a name: 50 of metrics_000050.json, step_000050, .replaced_step_000050."""
    found = re.search(r"_(\d+)(\.json)?$", path.name)
    return int(found[1]) if found else -1


def _why(error: BaseException) -> str:
    """The operating system's reason behind an exception, and what to do about it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    number = cause.errno if cause else None
    if cause is None and (found := re.search(r"os error (\d+)", str(error))):  # how safetensors says it
        number = int(found[1])
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{os.strerror(number).lower()}; free some space, then continue with --resume"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{os.strerror(number).lower()}; choose another --output_dir or change its permissions"
    return os.strerror(number).lower() if number else str(error).strip().split("\n")[0]
