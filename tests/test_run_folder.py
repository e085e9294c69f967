"""run_folder.py under kills, full disks, second processes, strange text and poorer systems. The faults are real where
they can be: processes killed with -9, file systems without space, files cut short."""

import errno
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import run_folder
from run_folder import RunFolder, RunFolderError, read_records

ROOT = Path(run_folder.__file__).parent
MIB = 2**20


# --- helpers ---


def new_run(path: Path, steps: int = 0) -> RunFolder:
    folder = RunFolder(path)
    folder.open_new(needed_bytes=0)
    folder.write_config({"flags": {"seed": 0}})
    for step in range(1, steps + 1):
        folder.log_step({"step": step, "loss": 0.5})
    return folder


def save(folder: RunFolder, step: int, **options) -> Path:
    """A checkpoint with 64 KiB of weights, each byte the step."""

    def save_model(path: Path) -> None:
        (path / "config.json").write_text("{}")
        (path / "model.safetensors").write_bytes(bytes([step]) * 2**16)

    state = {"step": step, "optimizer": {"state": {0: {"exp_avg": torch.full((4,), float(step))}}, "lr": [1e-4]}}
    return folder.save_checkpoint(step, save_model, state, **options)


def group(example_id: str = "clock-test-0-3", text: str = "<answer>1</answer>", picture=None) -> dict:
    completion = {"text": text, "rewards": {"format": 0.5}, "reward": 0.5, "advantage": None, "prediction": "1"}
    return {"id": example_id, "prompt": "What?", "answer": "1", "completions": [completion], "image_data": picture}


def log_steps(path: Path) -> list[int]:
    """The steps in a log, which must be valid JSON."""
    return [record["step"] for record in json.loads((path / "train_logs.json").read_text())]


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def python(script: str, *args) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}", *map(str, args)]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def in_child(work, file_size_limit: int | None = None, kill_at: int | None = None) -> tuple[int, str]:
    """Runs `work()` in a forked process; returns its exit status (-9: killed) and the RunFolderError it met, if any.

    file_size_limit: no file may grow beyond that many bytes, which fails as a full disk does.
    kill_at: kill -9 just before the process opens, makes, renames or removes a file or folder for the n-th time."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if file_size_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
            if kill_at:
                left = [kill_at]

                def hook(event: str, args: tuple) -> None:
                    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                        left[0] -= 1
                        if left[0] == 0:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(hook)
            work()
            status = 0
        except RunFolderError as error:
            os.write(writing, str(error).encode())
            status = 2
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        message = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), message


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB; `remount(options)` changes it. Skipped where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


# --- the log ---


def test_the_log_is_valid_json_after_every_call(tmp_path):
    folder = new_run(tmp_path)
    assert log_steps(tmp_path) == []
    for step in range(1, 40):
        folder.log_step({"step": step, "loss": 1 / step, "rewards/format": 0.5})
        assert log_steps(tmp_path) == list(range(1, step + 1))
    assert len((tmp_path / "train_logs.json").read_text().splitlines()) == 39 + 2  # a record a line
    assert json.loads((tmp_path / "train_logs.json").read_text())[6] == {
        "step": 7,
        "loss": 1 / 7,
        "rewards/format": 0.5,
    }


@pytest.mark.slow
def test_append_cost_is_independent_of_log_length(tmp_path, monkeypatch):
    written = []

    class CountingFile(io.FileIO):
        def write(self, data):
            written.append(len(data))
            return super().write(data)

    def seconds_per_append(records: int) -> float:
        path = tmp_path / str(records)
        folder = new_run(path)
        lines = ",\n".join(json.dumps({"step": step, "text": "x" * 100}) for step in range(1, records + 1))
        (path / "train_logs.json").write_text(f"[\n{lines}\n]\n")
        written.clear()
        seconds = []
        for step in range(records + 1, records + 51):
            start = time.perf_counter()
            folder.log_step({"step": step})
            seconds.append(time.perf_counter() - start)
        assert log_steps(path)[-51:] == list(range(records, records + 51))
        return statistics.median(seconds)

    monkeypatch.setattr(run_folder, "open", lambda path, mode, buffering: CountingFile(path, mode), raising=False)
    short, long = seconds_per_append(10), seconds_per_append(200_000)
    assert written == [len(f',\n{{"step": {step}}}\n]\n') for step in range(200_001, 200_051)]  # one write each
    assert long < 20 * short  # writing (or reading) these 26 MB again takes a thousand times as long as an append


def test_nan_and_infinity_become_null(tmp_path):
    folder = new_run(tmp_path)
    values = [float("nan"), float("inf"), -float("inf"), torch.tensor(float("nan")), [1.0, float("nan")]]
    folder.log_step({"step": 1, "values": values, "tensor": torch.tensor([1, 2]), "path": Path("a"), "half": True})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "train_logs.json").read_text(), parse_constant=refuse)[0]
    assert record["values"] == [None, None, None, None, [1.0, None]]
    assert (record["tensor"], record["path"], record["half"]) == ([1, 2], "a", True)


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(exclude_categories=()), max_size=40))
def test_any_text_is_logged_as_ascii_json(tmp_path_factory, text):
    text += "\x1b[2J\x00\x9b\u2028\ud800 \U0001f600 \ude00"
    path = tmp_path_factory.mktemp("text")
    with new_run(path) as folder:
        folder.log_step({"step": 1, text: text})
        folder.log_samples(1, [group(text=text)])
    for file in ("train_logs.json", "train_samples/step_000001.json"):
        raw = (path / file).read_bytes()
        assert all(32 <= byte < 127 or byte == ord("\n") for byte in raw)  # no escape code
        json.loads(raw)
    read = json.loads((path / "train_samples/step_000001.json").read_text())["groups"][0]["completions"][0]["text"]
    read.encode()  # raises for a lone surrogate
    assert "\U0001f600" in read and "\x1b[2J\x00\x9b\u2028\ufffd" in read


def test_a_log_cut_at_any_byte_is_read_and_repaired(tmp_path):
    new_run(tmp_path, steps=3).close()
    save_whole = (tmp_path / "train_logs.json").read_bytes()
    ends = [save_whole.index(b"}", save_whole.index(b'"step": %d' % step)) + 1 for step in (1, 2, 3)]
    for cut in range(len(save_whole)):
        (tmp_path / "train_logs.json").write_bytes(save_whole[:cut])
        whole = [step for step, end in zip((1, 2, 3), ends, strict=True) if end <= cut]
        assert [record["step"] for record in read_records(tmp_path / "train_logs.json")] == whole
        folder = RunFolder(tmp_path)
        folder.truncate_after(2)
        folder.log_step({"step": 7})
        assert log_steps(tmp_path) == [*(step for step in whole if step <= 2), 7]


def test_the_last_record_of_a_step_counts(tmp_path):
    path = tmp_path / "log.json"
    path.write_text('[{"step": 1, "kl": 1}, {"kl": 5}, {"step": 2, "kl": 2},\n{"step": 1, "kl": NaN}]')
    assert [record["step"] for record in read_records(path)] == [1, 2] and read_records(path)[0]["kl"] != 1
    assert read_records(tmp_path / "missing.json") == []


@pytest.mark.parametrize("harm", [b"\0" * 20, b'{"step": 2, "a": "\xff', b"[" * 5000, b'{"step": 2,'])
def test_records_after_a_damaged_one_are_read_with_a_warning(tmp_path, harm):
    path, warnings = tmp_path / "log.json", []
    path.write_bytes(b'[\n{"step": 1},\n{"step": ' + harm + b',\n{"step": 3}\n]\n')
    assert [record["step"] for record in read_records(path, warnings.append)] == [1, 3]
    assert len(warnings) == 1 and "2 records" in warnings[0]


def test_a_reformatted_log_survives_resuming(tmp_path):
    folder = new_run(tmp_path, steps=3)
    (tmp_path / "train_logs.json").write_text(json.dumps(read_records(tmp_path / "train_logs.json"), indent=2))
    folder.truncate_after(2)
    folder.log_step({"step": 3})
    assert log_steps(tmp_path) == [1, 2, 3]


@pytest.mark.slow
def test_killed_while_appending(tmp_path):
    script = """
from run_folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.open_new(overwrite=True)
folder.write_config({})
print("ready", flush=True)
for step in range(1, 1_000_000):
    folder.log_step({"step": step, "text": "x" * (step * 7919 % 200_000)})
"""
    rng = random.Random(0)
    for _ in range(8):
        with subprocess.Popen(python(script, tmp_path), stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            wait_until(lambda: read_records(tmp_path / "train_logs.json"))
            time.sleep(0.1 * rng.random())
            process.kill()
        steps = [record["step"] for record in read_records(tmp_path / "train_logs.json")]
        assert steps == list(range(1, len(steps) + 1)) and steps
        RunFolder(tmp_path).truncate_after(len(steps))
        assert log_steps(tmp_path) == steps


# --- evaluations and samples ---


def test_samples_are_written_with_their_pictures(tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    groups = [group("clock-test-0-0", picture=picture), group("gsm8k-test-1")]
    with new_run(tmp_path) as folder:
        folder.log_eval(50, {"accuracy": 0.5, "error": float("nan")}, groups)
        folder.log_samples(50, groups)
        folder.log_samples(51, groups)
    metrics = json.loads((tmp_path / "eval_logs/metrics_000050.json").read_text())
    assert metrics == {"step": 50, "accuracy": 0.5, "error": None}
    for folder_name, file in (("eval_logs", "samples_000050.json"), ("train_samples", "step_000051.json")):
        samples = json.loads((tmp_path / folder_name / file).read_text())
        assert [g["image"] for g in samples["groups"]] == ["images/clock-test-0-0.png", None]
        assert (
            samples["groups"][1]["completions"] == groups[1]["completions"] and "image_data" not in samples["groups"][0]
        )
        assert Image.open(tmp_path / folder_name / samples["groups"][0]["image"]).getpixel((0, 0)) == (255, 0, 0)
    assert groups[0]["image_data"] is picture  # the caller's groups are left as they were


def test_a_picture_is_written_once(tmp_path):
    with new_run(tmp_path) as folder:
        folder.log_eval(0, {}, [group(picture=Image.new("RGB", (8, 8)))])
        folder.flush()
        before = (tmp_path / "eval_logs/images/clock-test-0-3.png").stat()
        folder.log_eval(50, {}, [group(picture=Image.new("RGB", (8, 8)))])
    after = (tmp_path / "eval_logs/images/clock-test-0-3.png").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_picture_cut_short_is_written_again(tmp_path):
    class Cut:
        def save(self, file, format):
            file.write(b"half a picture")
            raise OSError(errno.ENOSPC, "the disk is full")

    folder = new_run(tmp_path)
    folder.log_samples(1, [group(picture=Cut())])
    with pytest.raises(RunFolderError, match="no space left on device; free some space"):
        folder.flush()
    folder.log_samples(2, [group(picture=Image.new("RGB", (2, 2)))])
    folder.close()
    assert Image.open(tmp_path / "train_samples/images/clock-test-0-3.png").size == (2, 2)


def test_no_example_id_writes_outside_the_folder(tmp_path):
    ids = ["../../evil", "/etc/evil", "a b", "..", "ä\ud800", "a/b"]
    with new_run(tmp_path / "run") as folder:
        folder.log_samples(1, [group(i, picture=Image.new("RGB", (2, 2))) for i in ids])
    images = tmp_path / "run/train_samples/images"
    assert len(names(images)) == len(ids) and names(tmp_path) == ["run"]
    for written in json.loads((images.parent / "step_000001.json").read_text())["groups"]:
        assert (images.parent / written["image"]).resolve().parent == images


def test_samples_are_written_in_the_background(tmp_path):
    disk_is_ready = threading.Event()

    class SlowPicture:
        def save(self, file, format):
            disk_is_ready.wait(10)
            Image.new("RGB", (2, 2)).save(file, format=format)

    with new_run(tmp_path) as folder:
        folder.log_eval(1, {"accuracy": 1.0}, [group(picture=SlowPicture())])
        folder.log_step({"step": 1})
        assert log_steps(tmp_path) == [1] and not (tmp_path / "eval_logs/metrics_000001.json").exists()
        disk_is_ready.set()
        folder.flush()
        assert (tmp_path / "eval_logs/metrics_000001.json").exists()


def test_the_backlog_is_bounded(tmp_path):
    most = [0]

    class Picture:
        def save(self, file, format):
            most[0] = max(most[0], len(folder._pending))
            time.sleep(0.002)
            Image.new("RGB", (2, 2)).save(file, format=format)

    with new_run(tmp_path) as folder:
        for step in range(40):
            folder.log_samples(step, [group(f"id-{step}", picture=Picture())])
    assert 1 < most[0] <= run_folder.BACKLOG
    assert len(names(tmp_path / "train_samples/images")) == 40


def test_background_errors_are_raised_in_the_loop(tmp_path):
    folder = new_run(tmp_path)
    (tmp_path / "eval_logs").write_text("a file where a folder should be")
    folder.log_eval(1, {}, [group()])
    with pytest.raises(RunFolderError, match="cannot write samples in"):
        folder.flush()
    folder.flush()  # an error is raised once
    folder.log_eval(2, {}, [group()])
    with pytest.raises(RunFolderError):
        folder.close()
    RunFolder(tmp_path).open_new(overwrite=True)  # the lock was released all the same


def test_the_first_error_hides_later_ones(tmp_path):
    (tmp_path / "train_samples").write_text("a file where a folder should be")
    with pytest.raises(ZeroDivisionError), new_run(tmp_path) as folder:
        folder.log_samples(1, [group()])
        raise ZeroDivisionError


# --- a new run, an old run ---


def test_a_folder_with_a_run_is_refused_unless_overwritten(tmp_path):
    with new_run(tmp_path, steps=2) as folder:
        folder.log_eval(2, {}, [group(picture=Image.new("RGB", (2, 2)))])
        folder.log_samples(2, [group(picture=Image.new("RGB", (2, 2)))])
        save(folder, 2)
    (tmp_path / "checkpoints/.writing_step_000003").mkdir()
    (tmp_path / "train_logs.json.4711.tmp").write_text("left by a process that was killed")
    foreign = [
        "notes.txt",
        "config.json.bak",
        "config.json.mine.tmp",
        "checkpoints/mine.bin",
        "eval_logs/mine.txt",
        "plots/chart.png",
    ]
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for attempt in (RunFolder(tmp_path).check_new, RunFolder(tmp_path).open_new):
        with pytest.raises(RunFolderError, match=r"already holds a run.*--resume.*--overwrite_output_dir"):
            attempt()
    late = RunFolder(tmp_path)
    late.check_new = lambda *args: None  # as if another run started and ended just after this check
    with pytest.raises(RunFolderError, match="already holds a run"):
        late.open_new()
    RunFolder(tmp_path).check_new(overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    with RunFolder(tmp_path) as folder:
        folder.open_new(overwrite=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*foreign, "train_logs.json", "run.lock"}
    assert log_steps(tmp_path) == [] and not any((tmp_path / "checkpoints").glob("*step*"))


def test_any_file_of_a_run_counts_as_a_run(tmp_path):
    with new_run(tmp_path / "run") as folder:
        folder.log_eval(2, {}, [group(picture=Image.new("RGB", (2, 2)))])
        folder.log_samples(2, [group()])
        save(folder, 2)
    for name in ("config.json", "train_logs.json", "eval_logs", "train_samples", "checkpoints"):
        other = tmp_path / f"with_{name}"
        other.mkdir()
        (tmp_path / "run" / name).rename(other / name)
        with pytest.raises(RunFolderError, match="already holds a run"):
            RunFolder(other).open_new()
    with RunFolder(tmp_path / "run") as folder:  # only run.lock is left there
        folder.open_new()


def test_check_new_writes_nothing(tmp_path):
    RunFolder(tmp_path / "a/b").check_new()
    assert names(tmp_path) == []
    with pytest.raises(RunFolderError, match="GB free and this run needs at least"):
        RunFolder(tmp_path / "a/b").open_new(needed_bytes=2**60)
    assert names(tmp_path) == []


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in ("file", "file/run", "dangling", "dangling/run"):
        with pytest.raises(RunFolderError, match="is not a folder; choose another --output_dir"):
            RunFolder(tmp_path / path).open_new()
    with pytest.raises(RunFolderError, match="cannot look into"):
        RunFolder(tmp_path / ("x" * 300) / "y").open_new()


def test_a_read_only_disk_is_refused_in_one_line(small_disk):
    with new_run(small_disk / "run", steps=1) as folder:
        save(folder, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for attempt in (
        RunFolder(small_disk / "new").check_new,
        lambda: RunFolder(small_disk / "run").open_new(overwrite=True),
    ):
        with pytest.raises(RunFolderError, match=r"no right to write in .*; choose another --output_dir"):
            attempt()
    with pytest.raises(RunFolderError, match="read-only file system; choose another --output_dir"):
        RunFolder(small_disk / "run").open_resume()
    assert log_steps(small_disk / "run") == [1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="no right to write in"):
        RunFolder(tmp_path / "run").open_new()


# --- one run at a time ---

HOLD = """
from run_folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.open_new(overwrite=True)
folder.write_config({})
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_while_the_first_runs(tmp_path):
    with subprocess.Popen(python(HOLD, tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        second = RunFolder(tmp_path)
        for attempt in (second.check_new, second.open_new, lambda: second.open_new(overwrite=True), second.open_resume):
            with pytest.raises(RunFolderError, match=rf"in use by another run \(process {first.pid}\)"):
                attempt()
        assert (tmp_path / "config.json").exists()  # the second process removed nothing
        first.kill()  # kill -9
    second.open_new(overwrite=True)
    second.close()


def test_a_failed_opening_releases_the_lock(tmp_path):
    new_run(tmp_path).close()
    refused = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match="cannot continue from checkpoint"):
        refused.open_resume(tmp_path / "checkpoints" / "step_000001")
    with RunFolder(tmp_path) as folder:
        folder.open_new(overwrite=True)


def test_resuming_without_checkpoints_returns_none(tmp_path):
    new_run(tmp_path).close()
    with RunFolder(tmp_path) as folder:
        assert folder.open_resume() is None
        (tmp_path / "config.json.4711.tmp").write_text("left by a process that was killed")
        folder.truncate_after(-1)
    assert names(tmp_path) == ["config.json", "run.lock", "train_logs.json"]


# --- checkpoints ---


def test_a_checkpoint_is_found_and_loaded_again(tmp_path):
    with new_run(tmp_path, steps=12) as folder:
        assert folder.newest_checkpoint() is None
        for step in (2, 10):
            assert save(folder, step) == tmp_path / f"checkpoints/step_{step:06d}"
    with RunFolder(tmp_path) as folder:
        checkpoint = folder.open_resume()
        assert checkpoint == folder.newest_checkpoint() == tmp_path / "checkpoints/step_000010"
        assert (checkpoint / "model.safetensors").read_bytes() == b"\n" * 2**16
        state = folder.load_trainer_state(checkpoint)
        assert state["step"] == 10 and state["optimizer"]["lr"] == [1e-4]
        assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], torch.full((4,), 10.0))
        assert folder.read_config() == {"flags": {"seed": 0}}
        assert names(tmp_path / "checkpoints") == ["step_000002", "step_000010"]


def test_resuming_removes_all_later_steps(tmp_path):
    with new_run(tmp_path, steps=6) as folder:
        for step in (2, 4, 6):
            folder.log_eval(step, {}, [group()])
            folder.log_samples(step, [group()])
            save(folder, step)
    with RunFolder(tmp_path) as folder:
        assert folder.open_resume(f"{tmp_path}/checkpoints/../checkpoints/step_000002/").name == "step_000002"
        assert log_steps(tmp_path) == [1, 2, 3, 4, 5, 6]  # opening alone changes nothing
        folder.truncate_after(2)
        assert log_steps(tmp_path) == [1, 2]
        assert names(tmp_path / "eval_logs") == ["metrics_000002.json", "samples_000002.json"]
        assert names(tmp_path / "train_samples") == ["step_000002.json"]
        assert [c.name for c in folder.complete_checkpoints()] == ["step_000002"]
        replaced = [".replaced_step_000004", ".replaced_step_000006"]
        assert names(tmp_path / "checkpoints") == [*replaced, "step_000002"]  # kept until the run has passed them
        folder.log_step({"step": 3})
        save(folder, 3)
        assert names(tmp_path / "checkpoints") == [*replaced, "step_000002", "step_000003"]
        save(folder, 5)
        assert names(tmp_path / "checkpoints") == [replaced[1], "step_000002", "step_000003", "step_000005"]
        save(folder, 6, keep=1)
        assert names(tmp_path / "checkpoints") == ["step_000006"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    folder = new_run(tmp_path, steps=9)
    for step in range(1, 5):
        save(folder, step)
    save(folder, 5, keep=3, best_step=2)
    assert [_step(c) for c in folder.complete_checkpoints()] == [2, 3, 4, 5]
    save(folder, 6, keep=2, best_step=2)
    assert [_step(c) for c in folder.complete_checkpoints()] == [2, 5, 6]
    save(folder, 7, keep=1, best_step=7)
    assert names(tmp_path / "checkpoints") == ["step_000007"]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def test_saving_a_step_again_replaces_it(tmp_path):
    folder = new_run(tmp_path, steps=1)
    save(folder, 1)
    checkpoint = folder.save_checkpoint(1, lambda path: (path / "w").write_bytes(b"new"), {"step": 1, "again": True})
    assert names(checkpoint) == ["manifest.json", "trainer_state.pt", "w"]
    assert folder.load_trainer_state(checkpoint)["again"] and names(tmp_path / "checkpoints") == ["step_000001"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "harm", "problem"),
    [
        ("model.safetensors", cut, "model.safetensors has 65,535 of 65,536 bytes"),
        ("model.safetensors", flip, "model.safetensors was changed"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("trainer_state.pt", cut, "trainer_state.pt has"),
        ("trainer_state.pt", flip, "trainer_state.pt was changed"),
        ("manifest.json", Path.unlink, "it has no manifest.json"),
        ("manifest.json", cut, None),  # the last byte is a line feed: no harm
        ("manifest.json", lambda path: path.write_text(path.read_text()[:20]), "manifest.json is not readable"),
        ("manifest.json", lambda path: path.write_text('{"files": {"a": 1}}'), "manifest.json is not readable"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, file, harm, problem):
    with new_run(tmp_path, steps=3) as folder:
        older, good, newest = [save(folder, step) for step in (1, 2, 3)]
    harm(newest / file)
    with RunFolder(tmp_path) as folder:
        if problem is None:
            assert folder.open_resume() == newest
            return
        for asked in (None, newest):
            with pytest.raises(RunFolderError) as caught:
                folder.open_resume(asked)
            assert problem in str(caught.value) and f"--resume {good}" in str(caught.value)
            assert "\n" not in str(caught.value)
        assert folder.open_resume(good) == good  # the advice works
        folder.truncate_after(2)
        save(folder, 3)
        assert folder.newest_checkpoint() == newest and names(tmp_path / "checkpoints")[0] == older.name


def test_a_missing_or_foreign_checkpoint_is_refused(tmp_path):
    folders = []
    for name in ("a", "b"):
        with new_run(tmp_path / name, steps=2) as folder:
            save(folder, 2)
            folders.append(folder)
    mine, other = (folder.newest_checkpoint() for folder in folders)
    missing = tmp_path / "a/checkpoints/step_000009"
    for checkpoint, problem in ((missing, "it does not exist"), (other, "not of the run in")):
        with RunFolder(tmp_path / "a") as folder, pytest.raises(RunFolderError) as caught:
            folder.open_resume(checkpoint)
        assert problem in str(caught.value) and f"--resume {mine}" in str(caught.value)
    shutil.rmtree(mine)
    with RunFolder(tmp_path / "a") as folder, pytest.raises(RunFolderError, match="there is no good one"):
        folder.open_resume(mine)
    with pytest.raises(RunFolderError, match="holds no run to resume"):
        RunFolder(tmp_path / "nowhere").open_resume()
    assert not (tmp_path / "nowhere").exists()


def test_unloadable_trainer_state_is_refused_when_saving(tmp_path):
    folder = new_run(tmp_path, steps=1)
    good = save(folder, 1)
    for value in (torch.tensor(1.0).numpy(), random.Random(0), Path("a")):
        with pytest.raises(TypeError, match="convert them"):
            folder.save_checkpoint(2, lambda path: None, {"a": [value]})
    assert folder.newest_checkpoint() == good and names(tmp_path / "checkpoints") == [good.name]


def test_nothing_in_a_trainer_state_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    folder = new_run(tmp_path, steps=2)
    good, bad = save(folder, 1), save(folder, 2)
    for write in (torch.save, lambda value, file: pickle.dump(value, file, protocol=2)):
        with open(bad / "trainer_state.pt", "wb") as file:
            write({"step": Evil()}, file)
        with pytest.raises(RunFolderError, match=rf"trainer_state\.pt.*--resume {good}"):
            folder.load_trainer_state(bad)
    (bad / "trainer_state.pt").unlink()
    with pytest.raises(RunFolderError, match=r"trainer_state\.pt is missing"):
        folder.load_trainer_state(bad)
    assert not (tmp_path / "executed").exists()


def test_an_interrupted_save_leaves_no_files(tmp_path):
    folder = new_run(tmp_path, steps=2)
    good = save(folder, 1)

    def interrupted(path: Path) -> None:
        (path / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.save_checkpoint(2, interrupted, {})
    assert names(tmp_path / "checkpoints") == [good.name]


def test_everything_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut can leave a checkpoint, or a log, with the right name and no contents."""
    synced = set()
    fsync, replace = os.fsync, Path.replace
    named = []

    def checked_replace(source: Path, target: Path) -> None:
        files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
        assert files and {path.stat().st_ino for path in files} <= synced, source
        named.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(os.fstat(fd).st_ino) or fsync(fd))
    monkeypatch.setattr(Path, "replace", checked_replace)
    with new_run(tmp_path, steps=1) as folder:
        folder.log_eval(1, {}, [group(picture=Image.new("RGB", (2, 2)))])
        synced.discard((tmp_path / "train_logs.json").stat().st_ino)
        save(folder, 1)
        assert (tmp_path / "train_logs.json").stat().st_ino in synced  # the records that lead to the checkpoint
        assert (tmp_path / "checkpoints").stat().st_ino in synced  # the name itself
        assert named.index("metrics_000001.json") < named.index("step_000001")
    expected = ["train_logs.json", "config.json", "clock-test-0-3.png", "samples_000001.json", "metrics_000001.json"]
    assert named == [*expected, "manifest.json", "step_000001"]


@pytest.mark.slow
def test_killed_at_every_moment_of_a_step_with_a_checkpoint(tmp_path, monkeypatch):
    """kill -9 before each file operation of a step that logs, evaluates, saves and removes the old checkpoint."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # saves time: only a power cut loses what was not synced

    def prepare() -> None:
        shutil.rmtree(tmp_path, ignore_errors=True)
        with new_run(tmp_path, steps=3) as folder:
            folder.log_eval(2, {}, [group("old", picture=Image.new("RGB", (2, 2)))])
            save(folder, 2)

    def work() -> None:
        with RunFolder(tmp_path) as folder:
            folder.log_step({"step": 4})
            folder.log_eval(4, {}, [group("new", picture=Image.new("RGB", (2, 2)))])
            save(folder, 4, keep=1)
            folder.log_step({"step": 5})
            save(folder, 4, keep=1)  # a kill during the second save must leave the first

    prepare()
    work()  # imports the modules that it needs, whose file operations must not count
    resumed_from = []
    for moment in range(1, 1000):
        prepare()
        status, _ = in_child(work, kill_at=moment)
        with RunFolder(tmp_path) as folder:
            checkpoint = folder.open_resume()
            reached = folder.load_trainer_state(checkpoint)["step"]
            folder.truncate_after(reached)
            assert checkpoint.name == f"step_{reached:06d}" and log_steps(tmp_path) == list(range(1, reached + 1))
            for metrics in (tmp_path / "eval_logs").glob("metrics_*.json"):
                for written in json.loads((metrics.parent / metrics.name.replace("metrics", "samples")).read_text())[
                    "groups"
                ]:
                    Image.open(metrics.parent / written["image"]).load()
            save(folder, 5, keep=1)
            assert names(tmp_path / "checkpoints") == ["step_000005"]
        resumed_from.append(reached)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert resumed_from == sorted(resumed_from) and set(resumed_from) == {2, 4}  # once saved, never lost
    assert len(resumed_from) > 40


@pytest.mark.slow
def test_killed_while_saving_at_random_moments(tmp_path):
    """Like the test above, but the kill also comes in the middle of writes and syncs."""
    folder = new_run(tmp_path, steps=1)
    save(folder, 1)
    weights = os.urandom(MIB)

    def forever() -> None:
        for step in range(2, 250):
            folder.log_step({"step": step})
            state = {"step": step, "weights": torch.full((1000,), float(step))}
            folder.save_checkpoint(step, lambda path: (path / "weights").write_bytes(weights), state, keep=2)

    rng = random.Random(0)
    for _ in range(6):
        pid = os.fork()
        if pid == 0:
            forever()
            os._exit(0)
        wait_until(lambda: any((tmp_path / "checkpoints").glob("step_*[2-9]")))
        time.sleep(0.1 * rng.random())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        folder.close()
        checkpoint = folder.open_resume()
        state = folder.load_trainer_state(checkpoint)
        folder.truncate_after(state["step"])
        assert log_steps(tmp_path) == list(range(1, state["step"] + 1))
        assert state["step"] > 1 and torch.equal(state["weights"], torch.full((1000,), float(state["step"])))
        assert (checkpoint / "weights").read_bytes() == weights
        folder.truncate_after(1)
        save(folder, 1)
    folder.close()


# --- a full disk ---


def test_a_log_that_cannot_grow_stays_valid(tmp_path):
    folder = new_run(tmp_path)

    def log_until_full() -> None:
        for step in range(1, 1000):
            folder.log_step({"step": step, "text": "x" * 300})

    status, message = in_child(log_until_full, file_size_limit=20_000)
    assert status == 2
    assert f"train_logs.json in {tmp_path}: file too large" in message and "--resume" in message
    steps = log_steps(tmp_path)
    assert steps == list(range(1, 60 + 1)) or 50 < len(steps) < 70
    folder.log_step({"step": 61})  # there is space again
    assert log_steps(tmp_path) == [*steps, 61]


@pytest.mark.parametrize("where", ["model", "trainer state"])
def test_a_failed_save_keeps_the_last_good_checkpoint(tmp_path, where):
    from safetensors.torch import save_file

    folder = new_run(tmp_path, steps=2)
    good = save(folder, 1)
    big = torch.zeros(MIB)

    def fail() -> None:
        if where == "model":
            folder.save_checkpoint(2, lambda path: save_file({"w": big}, path / "model.safetensors"), {})
        else:
            folder.save_checkpoint(2, lambda path: None, {"w": big})

    status, message = in_child(fail, file_size_limit=MIB)
    assert status == 2
    assert "step_000002 could not be written: file too large; free some space" in message
    assert f"the last good one is {good}" in message and "\n" not in message
    assert names(tmp_path / "checkpoints") == [good.name]


def test_a_full_disk_keeps_log_and_checkpoints(small_disk):
    path = small_disk / "run"
    with RunFolder(path) as folder:
        with pytest.raises(RunFolderError, match=r"0\.00 GB free and this run needs at least 0\.02 GB"):
            folder.open_new()
        folder.open_new(needed_bytes=MIB // 2)
        folder.write_config({})
        folder.log_step({"step": 1})
        good = save(folder, 1)
        with pytest.raises(RunFolderError, match=rf"no space left on device; .* the last good one is {good}"):
            folder.save_checkpoint(2, lambda path: (path / "w").write_bytes(bytes(2 * MIB)), {})
        folder.log_samples(1, [group(text="x" * MIB)])
        with pytest.raises(RunFolderError, match=r"cannot write samples in .*no space left on device"):
            folder.flush()
        with pytest.raises(RunFolderError, match=r"cannot log to train_logs\.json in .*no space left on device"):
            folder.log_step({"step": 2, "text": "x" * MIB})
        assert log_steps(path) == [1]
        (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
        with pytest.raises(RunFolderError, match="no space left on device"):
            for step in range(2, 1000):
                folder.log_step({"step": step, "text": "x" * 100})
        steps = log_steps(path)
        assert steps == list(range(1, len(steps) + 1))
        assert not list(path.rglob("*.tmp")) and names(path / "checkpoints") == [good.name]
        (small_disk / "ballast").unlink()
        folder.log_step({"step": len(steps) + 1})
        assert log_steps(path) == [*steps, len(steps) + 1] and save(folder, 2).name == "step_000002"


# --- other systems and file systems ---


def live(path: Path) -> None:
    """A whole life: start, log, evaluate, save, resume."""
    with new_run(path, steps=2) as folder:
        folder.log_eval(2, {}, [group(picture=Image.new("RGB", (2, 2)))])
        save(folder, 2)
        folder.log_step({"step": 3})
    with RunFolder(path) as folder:
        assert folder.open_resume() == path / "checkpoints/step_000002"
        folder.truncate_after(2)
    assert log_steps(path) == [1, 2]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_or_locks_is_used(tmp_path, monkeypatch, number):
    def refuse(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    monkeypatch.setattr(os, "chmod", refuse)
    live(tmp_path)


def test_a_failing_disk_is_reported(tmp_path, monkeypatch):
    folder = new_run(tmp_path, steps=1)

    def fail(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunFolderError, match="could not be written"):
        save(folder, 1)
    assert folder.newest_checkpoint() is None and not any((tmp_path / "checkpoints").glob("*"))


def test_a_disk_that_reports_no_size_is_used(tmp_path, monkeypatch):
    no_size = type(shutil.disk_usage(ROOT))(0, 0, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: no_size)
    RunFolder(tmp_path / "run").check_new(needed_bytes=2**60)


WINDOWS = """
import concurrent.futures.thread, errno, fcntl, os, shutil, subprocess, types
shutil._use_fd_functions = False
real_open = os.open

def open_no_folder(path, flags, mode=0o777, **options):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied")
    return real_open(path, flags, mode, **options)

def locking(fd, mode, length):
    if os.lseek(fd, 0, os.SEEK_CUR) < 32:
        raise AssertionError("the process id must stay readable")
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length)
    except OSError:
        raise PermissionError(errno.EACCES, "Permission denied") from None

os.open = open_no_folder
os.fsync, real_fsync = (lambda fd: real_fsync(fd) if os.write(fd, b"") == 0 else None), os.fsync
for name in ("pread", "pwrite", "sysconf", "sched_getaffinity"):
    delattr(os, name)
sys.modules["fcntl"] = sys.modules["resource"] = None
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
"""


@pytest.mark.slow
def test_without_the_modules_that_windows_lacks_a_run_works(tmp_path):
    """What Windows lacks is taken away, and msvcrt is played by fcntl; no Windows was at hand."""
    script = f"""import PIL.Image, torch, safetensors  # before the rest: they depend on the real system
{WINDOWS}
import run_folder
from run_folder import RunFolder, RunFolderError
assert run_folder.fcntl is None and run_folder.hardware_and_versions()["hardware"]["memory_gb"] is None
folder = RunFolder(sys.argv[1])
folder.open_new(config={{}})
for step in (1, 2, 3):
    folder.log_step({{"step": step}})
folder.log_samples(1, [{{"id": "a", "completions": [], "image_data": PIL.Image.new("RGB", (2, 2))}}])
folder.save_checkpoint(2, lambda path: (path / "w").write_bytes(b"w"), {{"step": 2}})
print("ready", flush=True)
sys.stdin.readline()
folder.close()
assert folder.open_resume().name == "step_000002"
folder.truncate_after(2)
folder.close()
"""
    second = f"""{WINDOWS}
from run_folder import RunFolder, RunFolderError
try:
    RunFolder(sys.argv[1]).open_resume()
except RunFolderError as error:
    print(error)
"""
    with subprocess.Popen(python(script, tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"ready\n"
        refusal = subprocess.run(python(second, tmp_path), capture_output=True, text=True, check=True).stdout
        assert f"in use by another run (process {first.pid})" in refusal
        first.communicate(b"\n")
    assert first.returncode == 0
    assert log_steps(tmp_path) == [1, 2] and names(tmp_path / "train_samples") == ["images", "step_000001.json"]


@pytest.mark.parametrize("name", [b"caf\xe9", b"runs/\xff\xfe/a"])
def test_a_folder_name_that_is_not_utf8_is_refused(tmp_path, name):
    for path in (os.fsdecode(name), tmp_path / os.fsdecode(name)):
        with pytest.raises(RunFolderError, match="is not UTF-8") as caught:
            RunFolder(path)
        str(caught.value).encode()
    RunFolder(tmp_path / "café 時計").check_new()


def test_a_folder_name_in_another_encoding_is_refused(tmp_path, monkeypatch):
    """With a Latin-1 locale Python writes ä as one byte, safetensors as two: into another folder."""
    monkeypatch.setattr(os, "fsencode", lambda path: str(path).encode("latin-1"))
    with pytest.raises(RunFolderError, match="is not UTF-8"):
        RunFolder("käse")
    RunFolder("cheese")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_checkpoints_have_the_permissions_of_the_umask(tmp_path, umask):
    """safetensors writes files that only their owner may read."""
    from safetensors.torch import save_file

    def save_model(path: Path) -> None:
        save_file({"w": torch.zeros(2)}, path / "model.safetensors")
        (path / "part").mkdir(mode=0o700)
        os.close(tempfile.mkstemp(dir=path / "part")[0])
        (path / "model.safetensors").chmod(0o600)  # older versions of safetensors use the umask

    before = os.umask(umask)
    try:
        folder = new_run(tmp_path / "run", steps=1)
        checkpoint = folder.save_checkpoint(1, save_model, {"step": 1})
    finally:
        os.umask(before)
    assert names(checkpoint) == ["manifest.json", "model.safetensors", "part", "trainer_state.pt"]
    for path in (checkpoint, *checkpoint.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_apply_umask_opens_a_temporary_folder(tmp_path):
    folder, secret = Path(tempfile.mkdtemp(dir=tmp_path)), tmp_path / "secret"
    secret.touch(0o600)
    (folder / "link").symlink_to(secret)
    before = os.umask(0o022)
    try:
        run_folder.apply_umask(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755 and names(folder) == ["link"]
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600  # what a link points to belongs to others


# --- fingerprints, versions ---


def test_a_fingerprint_tells_whether_a_file_was_replaced(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(9 * MIB))
    for name in ("config.json", "tokenizer.json", "README.md", "chat_template.jinja"):
        (tmp_path / name).write_text(name)
    before = run_folder.fingerprint(tmp_path)
    assert list(before) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads(json.dumps(before)) == before == run_folder.fingerprint(str(tmp_path))
    assert run_folder.fingerprint(weights) == {"model.safetensors": before["model.safetensors"]}

    def changed() -> list[str]:
        now = run_folder.fingerprint(tmp_path)
        return [name for name in {**before, **now} if now.get(name) != before.get(name)]

    for position in (0, 9 * MIB - 1):
        data = bytearray(9 * MIB)
        data[position] = 1
        weights.write_bytes(data)
        assert changed() == ["model.safetensors"]
    weights.write_bytes(bytes(9 * MIB + 1))
    assert changed() == ["model.safetensors"]
    (tmp_path / "tokenizer.json").unlink()
    assert changed() == ["model.safetensors", "tokenizer.json"]
    with pytest.raises(FileNotFoundError):
        run_folder.fingerprint(tmp_path / "missing")


def test_hardware_and_versions_are_recorded():
    found = run_folder.hardware_and_versions("cpu")
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] and "python" in found["versions"]
    assert found["hardware"]["device"] == "cpu" and found["hardware"]["cpu_count"] >= 1
    assert 0.1 < found["hardware"]["memory_gb"] < 100_000
    if os.path.exists("/proc/cpuinfo"):
        assert found["hardware"]["name"] in Path("/proc/cpuinfo").read_text()
    json.dumps(found)


def test_the_commit_is_that_of_the_code(tmp_path):
    def git(*args: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *args], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def commit() -> str:
        script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom run_folder import hardware_and_versions\n"
        script += "print(hardware_and_versions()['commit'])"
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
        )
        return done.stdout.strip()

    shutil.copy(run_folder.__file__, tmp_path)
    assert commit() == "None"  # no repository
    git("init")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-m", "a repository around a copy of the code")
    assert commit() == "None"
    git("add", "run_folder.py")
    git("commit", "-m", "the code")
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "other").write_text("changed")
    assert commit() == git("rev-parse", "HEAD") + "+changes"


def test_importing_run_folder_imports_no_torch():
    script = "import run_folder; print([m for m in ('torch', 'numpy', 'PIL', 'transformers') if m in sys.modules])"
    done = subprocess.run(python(script), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
