"""Whole runs survive faults: real processes that are really killed, and disks that are really full.

Importing torch takes seconds, so one process imports everything and forks a process for each run (`serve`). From there
on a run is what `python main.py` is, exit status and output included. A fault that cannot be caused from outside, such
as a reward that raises, is one of the functions under "Faults": the forked process calls it before the run starts.
"""

import gc
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import main
import report
from run_folder import read_records

pytestmark = pytest.mark.slow  # all of this file starts processes

ROOT = Path(main.__file__).parent
STEPS, KILLS = 12, 20
FLAGS = "--dataset_name arithmetic --dataset_options steps=1 --device cpu --prompts_per_step 2 --num_generations 8 "
FLAGS += "--max_prompt_length 160 --max_completion_length 8 --train_size 20 --eval_size 4 --eval_steps 3 "
FLAGS += "--save_steps 3 --learning_rate 1e-2 --sync_ref_model --ref_model_sync_steps 4 --log_completions_steps 4 "
FLAGS += f"--warmup_ratio 0 --max_steps {STEPS}"
PICTURES = "--dataset_name correlation --dataset_options size=32 style=bold"

CACHED = "someone/cached"  # a model in the cache of the hub
COMMAND = r"(?:python|uv run) main\.py"
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there

# Sets a window's title, clears the screen, turns text red, goes back to the line's start, writes from right to left.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e"


# ---------------------------------------------------------------------------------------------------------------------
# Faults: called with the run's folder in the process that is about to run


def at_step(step: int, act: Callable[[], object]) -> None:
    """Have `act()` called once the record of a step is logged, before the checkpoint that may be due."""
    from run import Run

    log_step = Run.log_step

    def log_and_act(run: Run, record: dict) -> None:
        log_step(run, record)
        if record["step"] == step:
            act()

    Run.log_step = log_and_act


def wait_here(folder: Path) -> None:
    """Make a file, and wait until it is removed; signals are handled meanwhile."""
    paused = folder.with_suffix(".paused")
    paused.touch()
    deadline = time.monotonic() + 60
    while paused.exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def pause(folder: Path, step: int) -> None:
    at_step(step, lambda: wait_here(folder))


def pause_under_nohup(folder: Path, step: int) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    pause(folder, step)


def pause_while_saving(folder: Path, step: int) -> None:
    """Wait in the middle of a checkpoint: the weights are written, the trainer's state is not."""
    from llms import LLM

    save = LLM.save

    def save_and_wait(llm: LLM, path: Path) -> None:
        save(llm, path)
        if path.name.endswith(f"step_{step:06d}"):
            wait_here(folder)

    LLM.save = save_and_wait


def pause_while_loading(folder: Path) -> None:
    main.load_llm = lambda *how: wait_here(folder)


def pause_before_the_log(folder: Path) -> None:
    """Wait when the folder has just been made."""
    import run_folder

    write = run_folder.write_whole

    def wait_and_write(path: Path, data: bytes) -> None:
        if path.name == run_folder.LOG:
            wait_here(folder)
        write(path, data)

    run_folder.write_whole = wait_and_write


def without_pauses(folder: Path) -> None:
    """huggingface_hub retries for up to 23 seconds for each file: not in tests."""
    from huggingface_hub.utils import _http

    _http.time = SimpleNamespace(sleep=lambda seconds: None, time=time.time)


def fill_disk(folder: Path, step: int, leave: int) -> None:
    """Another program fills the disk but for `leave` bytes."""

    def fill() -> None:
        with open(folder.parent / "ballast", "wb") as ballast:
            ballast.write(bytes(shutil.disk_usage(folder.parent).free - leave))

    at_step(step, fill)


def break_weights(folder: Path, step: int) -> None:
    """From a step on, every update leaves NaN in the weights."""
    import torch

    from optimizer import MasterAdamW

    update = MasterAdamW.step

    def update_and_break(optimizer: MasterAdamW, loss: torch.Tensor) -> dict[str, float]:
        done = update(optimizer, loss)
        with torch.no_grad():
            optimizer.masters[0].fill_(torch.nan)
        return done

    at_step(step - 1, lambda: setattr(MasterAdamW, "step", update_and_break))


def write_hostile_texts(folder: Path) -> None:
    from rollout import Sampler

    sample = Sampler.sample

    def sample_hostile(*args: Any, **options: Any) -> Any:
        rollout = sample(*args, **options)
        rollout.texts = [HOSTILE + text for text in rollout.texts]
        return rollout

    Sampler.sample = sample_hostile


def evaluator_raises(folder: Path, method: str, calls: int) -> None:
    """A method raises after so many calls, and quotes what the model wrote, as a careless reward function would."""
    from evaluator import EVALUATORS

    write_hostile_texts(folder)
    kind, left = EVALUATORS["arithmetic"], [calls]
    honest = getattr(kind, method)

    def careless(evaluator: Any, completion: Any, *answer: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            text = getattr(completion, "text", None) or getattr(completion, "string", completion)
            raise ValueError(f"what is {text}?")
        return honest(evaluator, completion, *answer)

    setattr(kind, method, careless)


def undrawable(folder: Path, calls: int) -> None:
    from correlation_generator import CorrelationGenerator

    draw, left = CorrelationGenerator.draw, [calls]

    def without_ink(generator: CorrelationGenerator, *args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("no ink")
        return draw(generator, *args)

    CorrelationGenerator.draw = without_ink


# ---------------------------------------------------------------------------------------------------------------------
# The process that forks the others


def serve(models: Path) -> None:
    """For a line {"argv", "output", "fault"} fork a process that runs main.py, and print its id; for a line with an id
    print the exit status of that process. Computes nothing itself, since a fork would lose its threads."""
    import small_models  # noqa: F401
    import torch

    import llms

    torch.set_num_threads(1)
    if os.fork() == 0:
        build_models(models)
        os._exit(0)
    assert os.wait()[1] == 0
    for name in ("text", "vision"):
        llms.load_llm(models / name, "cpu")  # imports what loading imports
    give_a_headline_that_random_models_improve()
    gc.freeze()  # otherwise a garbage collection copies shared memory in every forked process
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if isinstance(job, int):
            print(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]), flush=True)
        elif child := os.fork():
            print(child, flush=True)
        else:
            os._exit(run_main(**job))  # at once: freeing all that was imported takes a second


def run_main(argv: list[str], output: str, fault: list) -> int:
    """main.py in this process, with its own input and output, and with the fault -> exit status."""
    for path, descriptors in ((os.devnull, [0]), (output, [1, 2])):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        for descriptor in descriptors:
            os.dup2(opened, descriptor)
        os.close(opened)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup pytest would ignore
    if fault:
        name, folder, *rest = fault
        globals()[name](Path(folder), *rest)
    try:
        return main.main(argv)
    except SystemExit as refused:  # a wrong flag
        return refused.code
    except BaseException:  # as the interpreter does
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()


def build_models(folder: Path) -> None:
    import torch
    from small_models import build
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evaluator import TAGS

    for family, name in (("qwen2_vl", "vision"), ("llama", "text")):
        torch.manual_seed(0)
        build(family, folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder / "text")
    tags = AutoTokenizer.from_pretrained(folder / "text").convert_tokens_to_ids(TAGS)
    with torch.no_grad():  # make the tags likely, in a direction that all tokens share, so that rewards vary
        model.model.embed_tokens.weight[:, 0], model.lm_head.weight[:, 0] = 3, 0
        model.lm_head.weight[tags, 0] = 1
    model.save_pretrained(folder / "text")
    cached = folder / f"hub/models--{CACHED.replace('/', '--')}"
    shutil.copytree(folder / "text", cached / "snapshots/0123abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123abc")


def give_a_headline_that_random_models_improve() -> None:
    """The best checkpoint is then not always the first: these models never solve a problem."""
    from evaluator import EVALUATORS, Headline

    EVALUATORS["arithmetic"].headline = Headline("rewards/tag_count", "tags", "", lower_is_better=False, chance=None)


class Server:
    def __init__(self, models: Path):
        self.models, self.started = models, 0
        here = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.environment = {**os.environ, "PYTHONPATH": here, "HF_HOME": str(models), **NO_HUB}
        program = f"import pathlib, test_survival; test_survival.serve(pathlib.Path({str(models)!r}))"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", program], env=self.environment, cwd=ROOT, **pipes)
        while self.process.stdout.readline() != "ready\n":
            assert self.process.poll() is None

    def ask(self, request: dict | int) -> int:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(
        self, folder: Path, flags: str = "", fault: tuple = (), model: str | Path = "text", terminal: str | None = None
    ) -> "Child":
        """A run in `folder` with FLAGS and further flags; fault: a function above and its arguments."""
        model = self.models / model if model in ("text", "vision") else model
        argv = ["--model_path", str(model), *FLAGS.split(), "--output_dir", str(folder), *flags.split()]
        return self.start_with(argv, folder, fault, terminal)

    def start_with(self, argv: list[str], folder: Path, fault: tuple = (), terminal: str | None = None) -> "Child":
        self.started += 1
        output = Path(terminal or self.models / f"output_{self.started}")
        output.touch()
        if fault:
            folder.with_suffix(".paused").unlink(missing_ok=True)  # left by a process that was killed while it paused
        named = [fault[0].__name__, str(folder), *fault[1:]] if fault else []
        return Child(self, self.ask({"argv": argv, "output": str(output), "fault": named}), folder, output)

    def run(self, folder: Path, flags: str = "", fault: tuple = (), model: str | Path = "text") -> tuple[int, str]:
        """-> exit status, and the output."""
        child = self.start(folder, flags, fault, model)
        return child.wait(), child.output()


class Child:
    def __init__(self, server: Server, pid: int, folder: Path, output: Path):
        self.server, self.pid, self.output_path = server, pid, output
        self.paused = folder.with_suffix(".paused")

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def output(self) -> str:
        return self.output_path.read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.002)

    def wait(self) -> int:
        """The exit status; -9 also if it hangs."""
        watchdog = threading.Timer(120, lambda: self.send(signal.SIGKILL))
        watchdog.start()
        try:
            return self.server.ask(self.pid)
        finally:
            watchdog.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# What a run computed


def records(folder: Path) -> list[dict]:
    """The training log without times and memory."""
    measured = ("seconds/", "tokens_per_second", "peak_memory_gb")
    log = read_records(folder / "train_logs.json")
    return [{key: value for key, value in record.items() if not key.startswith(measured)} for record in log]


def evaluations(folder: Path) -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("eval_logs/metrics_*.json"))]
    return [{key: value for key, value in metrics.items() if key != "seconds"} for metrics in found]


def outcome(folder: Path) -> dict:
    """All that a run computed: records, evaluations, every saved completion, the weights of checkpoints."""
    completions = {path.relative_to(folder): path.read_text() for path in folder.glob("*/s*_*.json")}
    weights = {path.name: (path / "model.safetensors").read_bytes() for path in (folder / "checkpoints").iterdir()}
    json.loads((folder / "train_logs.json").read_text())  # valid for any reader
    return {"records": records(folder), "evaluations": evaluations(folder), **completions, **weights}


def check_readable(folder: Path, whole: dict) -> None:
    """The plotter reads of a killed run what the uninterrupted run had logged by then."""
    if not (folder / "config.json").exists():
        return  # killed before there was a run
    try:
        run = report.read_run(folder)
    except report.NothingLogged:
        return
    steps = [record["step"] for record in run.train]
    assert steps == list(range(1, len(steps) + 1))
    found = records(folder)
    assert found == whole["records"][: len(found)] and len(found) <= len(steps)
    assert evaluations(folder) == whole["evaluations"][: len(run.evals)]


def one_line(output: str) -> str:
    """The last line of the output, which must be a refusal without a character that a terminal interprets."""
    line = output.splitlines()[-1]
    assert line.startswith("main.py: ") and "Traceback" not in output
    assert line.isprintable(), ascii(line)
    return line


def newest(folder: Path) -> str:
    return max(path.name for path in (folder / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("models"))
    yield server
    server.process.stdin.close()
    assert server.process.wait(60) == 0


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The uninterrupted run: its folder, what it computed, and how long it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start = time.monotonic()
    status, output = server.run(folder)
    seconds = time.monotonic() - start
    assert status == 0, output
    found = outcome(folder)
    assert len(found["records"]) == STEPS
    assert sum(record["reward_std"] > 0 for record in found["records"]) > 4  # otherwise nothing is learned
    return SimpleNamespace(folder=folder, outcome=found, seconds=seconds)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def resumes(server, whole, folder):
    """-> a function that resumes the run in `folder` and checks that it computes what the uninterrupted run did."""

    def resumes(flags: str = "--resume") -> None:
        status, output = server.run(folder, flags)
        assert status == 0, output
        assert outcome(folder) == whole.outcome

    return resumes


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 20 MiB, which is little more than a run asks for. Skipped where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Killed


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_moment(server, whole, folder, resumes, number):
    """kill -9, the twenty moments spread over the whole run, loading and closing included."""
    moment = whole.seconds * (number + random.Random(number).random()) / KILLS
    status = None
    while status != -signal.SIGKILL:  # the run may be quicker this time, and over at that moment
        shutil.rmtree(folder, ignore_errors=True)
        child = server.start(folder)
        time.sleep(moment)
        child.send(signal.SIGKILL)
        status, moment = child.wait(), 0.9 * moment
    check_readable(folder, whole.outcome)
    resumes("--resume" if (folder / "config.json").exists() else "")  # without that file there is no run


def test_killed_before_anything_is_logged(server, folder, resumes):
    child = server.start(folder, fault=(pause_before_the_log,))
    child.until(child.paused.exists)
    child.send(signal.SIGKILL)
    child.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "run.lock"]
    resumes()


def test_killed_while_a_checkpoint_is_written(server, whole, folder, resumes):
    child = server.start(folder, fault=(pause_while_saving, 9))
    child.until(child.paused.exists)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert (folder / "checkpoints/.writing_step_000009/model.safetensors").exists()
    assert newest(folder) == "step_000006"
    check_readable(folder, whole.outcome)
    resumes()


def test_killed_again_after_resuming(server, whole, folder, resumes):
    """The second kill comes before the resumed run has saved a checkpoint."""
    for flags, step in (("", 8), ("--resume", 7), ("--resume", 11)):
        child = server.start(folder, flags, fault=(pause, step))
        child.until(child.paused.exists)
        child.send(signal.SIGKILL)
        child.wait()
        assert len(records(folder)) == step
        check_readable(folder, whole.outcome)
    resumes()


def test_the_plotter_draws_a_killed_run(server, folder):
    child = server.start(folder, fault=(pause, 5))
    child.until(child.paused.exists)
    child.send(signal.SIGKILL)
    child.wait()
    with open(folder / "train_logs.json", "rb+") as log:
        log.truncate(log.seek(0, os.SEEK_END) - 100)  # as after a power cut
    command = [sys.executable, "plotter.py", "--output_dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "4 records" in done.stderr
    assert (folder / "report.html").exists() and (folder / "plots/rewards.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_after_the_step(server, whole, folder, number):
    child = server.start(folder, "--overwrite_output_dir", fault=(pause, 5))
    child.until(child.paused.exists)
    child.send(number)
    child.until(lambda: "Ctrl-C" in child.output())
    child.paused.unlink()
    assert child.wait() == 128 + number
    assert newest(folder) == "step_000005" and records(folder) == whole.outcome["records"][:5]
    command = re.search(rf"step 5 of {STEPS}.*{COMMAND} (.* --resume)", child.output())[1]
    assert "--overwrite_output_dir" not in command
    child = server.start_with(shlex.split(command), folder)
    assert child.wait() == 0, child.output()
    assert outcome(folder) == whole.outcome


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(server, folder, resumes, number):
    child = server.start(folder, fault=(pause, 5))
    child.until(child.paused.exists)
    child.send(number)
    child.until(lambda: "Ctrl-C" in child.output())
    child.send(number)
    assert child.wait() == -number  # a shell says 128 + number
    assert newest(folder) == "step_000003"
    resumes()


def test_a_closed_terminal_stops_with_a_checkpoint(server, folder, resumes):
    """Whatever is written to the terminal from then on raises an exception; a shell may send the signal twice."""
    leader, follower = pty.openpty()
    child = server.start(folder, fault=(pause, 5), terminal=os.ttyname(follower))
    child.until(child.paused.exists)
    os.close(follower)
    os.close(leader)
    child.send(signal.SIGHUP)
    child.until(lambda: signal.SIGHUP in ignored_signals(child))
    child.send(signal.SIGHUP)
    child.paused.unlink()
    assert child.wait() == 128 + signal.SIGHUP
    assert newest(folder) == "step_000005"
    resumes()


def test_nohup_keeps_a_run_alive(server, whole, folder):
    child = server.start(folder, fault=(pause_under_nohup, 5))
    child.until(child.paused.exists)
    child.send(signal.SIGHUP)
    child.paused.unlink()
    assert child.wait() == 0 and outcome(folder) == whole.outcome


def ignored_signals(child: "Child") -> set[int]:
    status = Path(f"/proc/{child.pid}/status").read_text()
    mask = int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16)
    return {number for number in signal.valid_signals() if mask >> (number - 1) & 1}


def test_an_interrupt_while_loading_writes_nothing(server, folder):
    """Loading a large model takes minutes, in which people notice a mistake in the flags."""
    child = server.start(folder, fault=(pause_while_loading,))
    child.until(child.paused.exists)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    assert "Traceback" not in child.output() and not folder.exists()


def test_max_minutes_stops_and_can_be_resumed(server, whole, folder):
    status, output = server.run(folder, "--max_minutes 0.002")
    assert status == 0 and re.search(rf"step [0-9] of {STEPS}.*{COMMAND} .* --resume", output)
    assert newest(folder) == f"step_{len(records(folder)):06d}"
    status, output = server.run(folder, "--resume")
    assert status == 0 and records(folder) == whole.outcome["records"], output
    assert evaluations(folder) == whole.outcome["evaluations"]


# ---------------------------------------------------------------------------------------------------------------------
# Disks and folders


def test_a_disk_full_while_logging(server, whole, small_disk):
    folder = small_disk / "run"
    logs_only = "--save_steps 6 --eval_steps 0 --log_completions_steps 0"
    status, output = server.run(folder, logs_only, fault=(fill_disk, 7, 0))
    assert status == 2, output
    assert "train_logs.json" in one_line(output) and "--resume" in one_line(output)
    logged = json.loads((folder / "train_logs.json").read_text())
    assert 7 <= len(logged) < STEPS and newest(folder) == "step_000006"
    assert records(folder) == whole.outcome["records"][: len(logged)]
    (small_disk / "ballast").unlink()
    status, output = server.run(folder, f"{logs_only} --resume")
    assert status == 0 and records(folder) == whole.outcome["records"], output


def test_a_disk_full_while_saving(server, whole, small_disk):
    folder = small_disk / "run"
    status, output = server.run(folder, fault=(fill_disk, 5, 100_000))  # enough for logs, not for weights
    assert status == 2, output
    good = folder / "checkpoints/step_000003"
    line = one_line(output)
    assert all(fact in line for fact in ("checkpoints/step_000006", "no space left", "--resume", str(good))), line
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [good.name]
    (small_disk / "ballast").unlink()
    status, output = server.run(folder, "--resume")
    assert status == 0 and outcome(folder) == whole.outcome, output


def test_a_read_only_disk_is_refused(server, small_disk):
    folder = small_disk / "run"
    assert server.run(folder, "--max_steps 1")[0] == 0
    before = (folder / "train_logs.json").read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for flags in ("--overwrite_output_dir", "--resume"):
        status, output = server.run(folder, flags)
        assert status == 2 and str(folder) in one_line(output) and "another --output_dir" in output
    assert (folder / "train_logs.json").read_bytes() == before


def test_a_second_run_in_a_folder_is_refused(server, whole, folder):
    first = server.start(folder, fault=(pause, 4))
    first.until(first.paused.exists)
    for flags in ("", "--overwrite_output_dir", "--resume"):
        status, output = server.run(folder, flags)
        assert status == 2 and f"process {first.pid}" in one_line(output)
    first.paused.unlink()
    assert first.wait() == 0 and outcome(folder) == whole.outcome


def test_of_two_runs_started_together_one_is_refused(server, whole, folder):
    both = [server.start(folder), server.start(folder)]
    statuses = [child.wait() for child in both]
    assert sorted(statuses) == [0, 2]
    assert re.search("in use by another run|already holds a run", one_line(both[statuses.index(2)].output()))
    assert outcome(folder) == whole.outcome


def copy_of(whole, folder: Path) -> list[Path]:
    """Makes `folder` a copy of the uninterrupted run -> its checkpoints, oldest first."""
    shutil.copytree(whole.folder, folder)
    return sorted((folder / "checkpoints").iterdir())


def test_a_truncated_checkpoint_is_refused(server, whole, folder, resumes):
    *_, good, bad = copy_of(whole, folder)
    weights = bad / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    status, output = server.run(folder, "--resume")
    assert status == 2 and f"--resume {good}" in one_line(output)
    assert len(records(folder)) == STEPS
    resumes(f"--resume {good}")


def test_a_missing_checkpoint_is_refused(server, whole, folder):
    *_, good = copy_of(whole, folder)
    status, output = server.run(folder, f"--resume {folder}/checkpoints/step_000004")
    assert status == 2 and f"--resume {good}" in one_line(output)
    shutil.rmtree(folder / "checkpoints")
    status, output = server.run(folder, "--resume")
    assert status == 2 and f"{STEPS} steps" in one_line(output)
    assert len(records(folder)) == STEPS


def test_a_run_without_checkpoints_restarts(server, folder, resumes):
    child = server.start(folder, fault=(pause, 2))
    child.until(child.paused.exists)
    child.send(signal.SIGKILL)
    child.wait()
    resumes()


# ---------------------------------------------------------------------------------------------------------------------
# Faults inside the run


def test_nan_weights_are_never_saved(server, folder, resumes):
    status, output = server.run(folder, fault=(break_weights, 5))
    assert status == 2 and "5 steps in a row" in one_line(output)
    assert [record["skipped_steps"] for record in records(folder)][-6:] == [0, 1, 2, 3, 4, 5]
    assert newest(folder) == "step_000003"  # at 6 and 9 the weights were broken
    resumes()


def test_a_model_with_nan_weights_is_reported(server, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(server.models / "text", tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][7] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    status, output = server.run(folder, model=broken)
    assert status == 2 and str(broken) in one_line(output)
    assert not folder.exists()


@pytest.mark.parametrize("method, calls", [("score", 60), ("metrics", 10), ("value", 150)])
def test_a_failing_evaluator_stops_the_run(server, folder, method, calls):
    """The error quotes a completion that would take over a terminal."""
    status, output = server.run(folder, "--log_completions_steps 1", fault=(evaluator_raises, method, calls))
    assert status == 2, output
    line = one_line(output)
    assert len(records(folder)) > 0 and "what is" in line
    if method == "score":
        assert re.search(r"'arithmetic' failed on completion [0-9]+ of [0-9]+, '\\x1b\]0;owned", line)


def test_an_example_that_cannot_be_made_is_named(server, folder):
    status, output = server.run(folder, PICTURES, fault=(undrawable, 11), model="vision")
    assert status == 2
    assert re.search(r"correlation-train-0-\d+.*no ink", one_line(output))
    assert len(records(folder)) > 0
    status, output = server.run(folder, f"{PICTURES} --resume", model="vision")
    assert status == 0, output


# ---------------------------------------------------------------------------------------------------------------------
# A hub that cannot be reached


def test_without_the_hub_the_cached_model_is_used(server, whole, folder):
    began = time.monotonic()
    status, output = server.run(folder, model=CACHED)
    assert status == 0 and outcome(folder) == whole.outcome, output
    assert time.monotonic() - began < 60  # asks the hub once, not for each file for 23 seconds


def test_without_hub_and_cache_the_model_is_refused(server, folder):
    status, output = server.run(folder, model="someone/else")
    assert status == 2 and output.count("\n") == 1
    assert "'someone/else'" in one_line(output) and "network" in output
    assert not folder.exists()


def test_without_the_hub_gsm8k_needs_a_local_path(server, folder):
    status, output = server.run(folder, "--dataset_name gsm8k --dataset_options", fault=(without_pauses,))
    assert status == 2 and output.count("\n") == 1
    assert "GSM8K" in one_line(output) and "--dataset_path" in output
    assert not folder.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Untrusted text


def on_a_terminal(start: Callable[[str], Child]) -> str:
    """What a process wrote to a terminal until it ended; `start(terminal)` starts it."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    shown = []

    def read() -> None:
        try:
            while data := os.read(leader, 4096):
                shown.append(data)
        except OSError:  # nobody writes to the terminal any more
            pass

    reader = threading.Thread(target=read)
    reader.start()
    child = start(os.ttyname(follower))
    status = child.wait()
    os.close(follower)  # the last one that could write
    reader.join(60)
    os.close(leader)
    assert status == 0, b"".join(shown)
    return b"".join(shown).decode()


def test_control_characters_never_reach_the_terminal(server, folder):
    shown = on_a_terminal(lambda terminal: server.start(folder, "", (write_hostile_texts,), terminal=terminal))
    assert "12/12" in shown and "reward" in shown  # the bar, which is drawn on terminals only
    assert {c for c in shown if not c.isprintable()} <= {"\r", "\n"}
    kept = (folder / "train_samples/step_000001.json").read_bytes()
    assert kept.isascii() and b"\x1b" not in kept
    assert json.loads(kept)["groups"][0]["completions"][0]["text"].startswith(HOSTILE)


# ---------------------------------------------------------------------------------------------------------------------
# The command itself


def test_the_command_itself_without_a_network(server, whole, folder):
    """Without a fork and a fault: `python main.py` on a machine that is offline, stopped by SIGINT at any moment."""
    environment = {**server.environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "main.py", "--model_path", CACHED, *FLAGS.split(), "--output_dir", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*argv, "--max_steps", "500"], cwd=ROOT, env=environment, **pipes) as command:
        while command.poll() is None and len(read_records(folder / "train_logs.json")) < 2:
            time.sleep(0.01)
        command.send_signal(signal.SIGINT)
        output, error = command.communicate(timeout=60)
    assert command.returncode == 130 and re.search(f"{COMMAND} .* --resume", output), error
    status, output = server.run(folder, "--resume", model=CACHED, fault=(without_pauses,))
    assert status == 0, output
    assert records(folder)[:STEPS] == whole.outcome["records"]
