"""Whole runs survive what happens to them: real processes, really killed, on disks that are really full.

Importing torch takes seconds, so one process imports everything and forks a process for each run (`serve`): from there
on that is what `python main.py` is, exit status and last words included. A fault that cannot be brought about from
outside, such as a reward that raises, is one of the functions under "Faults", called in the process before it starts.
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
from pathlib import Path
from types import SimpleNamespace

import pytest

import main
import report
from run_folder import read_records

ROOT = Path(main.__file__).parent
STEPS, KILLS = 12, 20
FLAGS = "--dataset_name arithmetic --dataset_options steps=1 --device cpu --prompts_per_step 2 --num_generations 8 "
FLAGS += "--max_prompt_length 160 --max_completion_length 8 --train_size 20 --eval_size 4 --eval_steps 3 "
FLAGS += "--save_steps 3 --learning_rate 1e-2 --sync_ref_model --ref_model_sync_steps 4 --log_completions_steps 4 "
FLAGS += f"--warmup_ratio 0 --max_steps {STEPS}"
PICTURES = "--dataset_name correlation --dataset_options size=32 style=bold"

CACHED = "someone/cached"  # a model that the hub once left on this machine
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there

# Sets a window's title, clears the screen, turns text red, goes back to the line's start, writes from right to left.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e"


# ---------------------------------------------------------------------------------------------------------------------
# Faults: called with the run's folder in the process that is about to run


def at_step(step: int, act) -> None:
    """Has `act()` called once the record of a step is logged, before the checkpoint that may be due."""
    stepped = main.Progress.stepped

    def then_act(progress, record):
        stepped(progress, record)
        if record["step"] == step:
            act()

    main.Progress.stepped = then_act


def wait_here(folder: Path) -> None:
    """Says so with a file, and waits until it is removed; signals are noticed meanwhile."""
    paused = folder.with_suffix(".paused")
    paused.touch()
    deadline = time.monotonic() + 60
    while paused.exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def pause(folder: Path, step: int) -> None:
    at_step(step, lambda: wait_here(folder))


def pause_while_saving(folder: Path, step: int) -> None:
    """In the middle of a checkpoint: the weights are written, the trainer's state is not."""
    import llms

    save = llms.LLM.save

    def save_and_wait(llm, path):
        save(llm, path)
        if path.name.endswith(f"step_{step:06d}"):
            wait_here(folder)

    llms.LLM.save = save_and_wait


def pause_while_loading(folder: Path) -> None:
    import llms

    llms.load_llm = lambda *args: wait_here(folder)


def pause_before_the_log(folder: Path) -> None:
    """When the folder has just been made."""
    import run_folder

    write = run_folder._write_whole

    def wait_and_write(path, data):
        if path.name == "train_logs.json":
            wait_here(folder)
        write(path, data)

    run_folder._write_whole = wait_and_write


def without_pauses(folder: Path) -> None:
    """A library of the hub's waits for up to 23 seconds for each file it asks for in vain: not in tests."""
    from huggingface_hub.utils import _http

    _http.time = SimpleNamespace(sleep=lambda seconds: None, time=time.time)


def fill_disk(folder: Path, step: int, leave: int) -> None:
    """Somebody else fills the disk but for some bytes."""

    def fill():
        with open(folder.parent / "ballast", "wb") as ballast:
            ballast.write(bytes(shutil.disk_usage(folder.parent).free - leave))

    at_step(step, fill)


def break_weights(folder: Path, step: int) -> None:
    import torch

    update = main.update

    def update_and_break(optimizer, weights, *rest):
        done = update(optimizer, weights, *rest)
        with torch.no_grad():
            weights.masters[0].fill_(torch.nan)
        return done

    at_step(step - 1, lambda: setattr(main, "update", update_and_break))


def write_hostile_texts(folder: Path) -> None:
    import rollout

    sample = rollout.sample

    def sample_hostile(*args, **options):
        found = sample(*args, **options)
        found.texts = [HOSTILE + text for text in found.texts]
        return found

    rollout.sample = sample_hostile


def evaluator_raises(folder: Path, method: str, calls: int) -> None:
    """From a call on; with what the model wrote in the message, as a careless reward function would."""
    from evaluator import EVALUATORS

    write_hostile_texts(folder)
    kind, left = EVALUATORS["arithmetic"], [calls]
    honest = getattr(kind, method)

    def careless(evaluator, completion, *answer):
        left[0] -= 1
        if left[0] < 0:
            raise ValueError(f"what is {completion}?")
        return honest(evaluator, completion, *answer)

    setattr(kind, method, careless)


def undrawable(folder: Path, calls: int) -> None:
    from correlation_generator import CorrelationGenerator

    generate, left = CorrelationGenerator.generate, [calls]

    def without_ink(generator, *args):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("no ink")
        return generate(generator, *args)

    CorrelationGenerator.generate = without_ink


# ---------------------------------------------------------------------------------------------------------------------
# The process that forks the others


def serve(models: Path) -> None:
    """For a line {"argv", "output", "fault"} forks a process that runs main.py, and answers with its id; for a line
    with an id answers how that process ended. Computes nothing itself, so that it has no threads to lose in a fork."""
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
    gc.freeze()  # else the forked processes copy what is collected
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if isinstance(job, int):
            print(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]), flush=True)
        elif child := os.fork():
            print(child, flush=True)
        else:
            os._exit(run_main(**job))  # without the second that it takes to tidy up all that was imported


def run_main(argv: list[str], output: str, fault: list) -> int:
    """main.py in this process, with input and output of its own, and the fault -> exit status."""
    for path, descriptors in ((os.devnull, [0]), (output, [1, 2])):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        for descriptor in descriptors:
            os.dup2(opened, descriptor)
        os.close(opened)
    if fault:
        name, folder, *rest = fault
        globals()[name](Path(folder), *rest)
    try:
        return main.main(argv)
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
    with torch.no_grad():  # tags are made likely, in a direction that all tokens share: so rewards vary, and it learns
        model.model.embed_tokens.weight[:, 0], model.lm_head.weight[:, 0] = 3, 0
        model.lm_head.weight[tags, 0] = 1
    model.save_pretrained(folder / "text")
    cached = folder / f"hub/models--{CACHED.replace('/', '--')}"
    shutil.copytree(folder / "text", cached / "snapshots/0123abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123abc")


def give_a_headline_that_random_models_improve() -> None:
    """So that there is a best checkpoint other than the first; none of them ever gets a problem right."""
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

    def ask(self, request) -> int:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, folder: Path, flags="", fault=(), model="text", terminal=None) -> "Child":
        """A run in `folder` with FLAGS and those that differ from them; fault: a function above and its arguments."""
        model = self.models / model if model in ("text", "vision") else model
        argv = ["--model_path", str(model), *FLAGS.split(), "--output_dir", str(folder), *flags.split()]
        return self.start_with(argv, folder, fault, terminal)

    def start_with(self, argv: list[str], folder: Path, fault=(), terminal=None) -> "Child":
        self.started += 1
        output = Path(terminal or self.models / f"output_{self.started}")
        output.touch()
        if fault:
            folder.with_suffix(".paused").unlink(missing_ok=True)  # of a process that was killed while it paused
            fault = [fault[0].__name__, str(folder), *fault[1:]]
        return Child(self, self.ask({"argv": argv, "output": str(output), "fault": fault}), folder, output)

    def run(self, folder: Path, flags="", fault=(), model="text") -> tuple[int, str]:
        """-> exit status, and what it said."""
        child = self.start(folder, flags, fault, model)
        return child.wait(), child.said()


class Child:
    def __init__(self, server: Server, pid: int, folder: Path, output: Path):
        self.server, self.pid, self.output = server, pid, output
        self.paused = folder.with_suffix(".paused")

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def said(self) -> str:
        return self.output.read_text()

    def until(self, condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.002)

    def wait(self) -> int:
        """The exit status; -9 too if it hangs."""
        watchdog = threading.Timer(120, lambda: self.send(signal.SIGKILL))
        watchdog.start()
        try:
            return self.server.ask(self.pid)
        finally:
            watchdog.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# What a run came to


def records(folder: Path) -> list[dict]:
    """The training log without what the clock and the machine put into it."""
    measured = ("seconds/", "tokens_per_second", "peak_memory_gb")
    log = read_records(folder / "train_logs.json")
    return [{key: value for key, value in record.items() if not key.startswith(measured)} for record in log]


def evaluations(folder: Path) -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("eval_logs/metrics_*.json"))]
    return [{key: value for key, value in metrics.items() if key != "seconds"} for metrics in found]


def outcome(folder: Path) -> dict:
    """All that a run computed: records, evaluations, every completion that was kept, the weights of checkpoints."""
    completions = {path.relative_to(folder): path.read_text() for path in folder.glob("*/s*_*.json")}
    weights = {path.name: (path / "model.safetensors").read_bytes() for path in (folder / "checkpoints").iterdir()}
    json.loads((folder / "train_logs.json").read_text())  # valid for any reader
    return {"records": records(folder), "evaluations": evaluations(folder), **completions, **weights}


def check_that_it_can_be_looked_at(folder: Path, whole: dict) -> None:
    """What the plotter reads of a run that died is what the uninterrupted run had logged by then."""
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


def one_line(said: str) -> str:
    """The refusal, when it is one line without anything that a terminal would act upon."""
    line = said.splitlines()[-1]
    assert line.startswith("main.py: ") and "Traceback" not in said
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
    """The uninterrupted run: its folder, what it came to, and how long it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start = time.monotonic()
    status, said = server.run(folder)
    seconds = time.monotonic() - start
    assert status == 0, said
    found = outcome(folder)
    assert len(found["records"]) == STEPS
    assert sum(record["reward_std"] > 0 for record in found["records"]) > 4  # so that there is something to compare
    return SimpleNamespace(folder=folder, outcome=found, seconds=seconds)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def goes_on(server, whole, folder):
    """-> a function that resumes the run in `folder`: it must come to what the uninterrupted run came to."""

    def goes_on(flags="--resume"):
        status, said = server.run(folder, flags)
        assert status == 0, said
        assert outcome(folder) == whole.outcome

    return goes_on


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
def test_killed_at_a_random_moment(server, whole, folder, goes_on, number):
    """kill -9, the twenty moments spread over the whole run, loading and closing included."""
    moment = whole.seconds * (number + random.Random(number).random()) / KILLS
    status = None
    while status != -signal.SIGKILL:  # the run may be quicker this time, and over at that moment
        shutil.rmtree(folder, ignore_errors=True)
        child = server.start(folder)
        time.sleep(moment)
        child.send(signal.SIGKILL)
        status, moment = child.wait(), 0.9 * moment
    check_that_it_can_be_looked_at(folder, whole.outcome)
    goes_on("--resume" if (folder / "config.json").exists() else "")  # there is nothing of a run before that file


def test_killed_before_anything_is_logged(server, folder, goes_on):
    child = server.start(folder, fault=(pause_before_the_log,))
    child.until(child.paused.exists)
    child.send(signal.SIGKILL)
    child.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "run.lock"]
    goes_on()


def test_killed_while_a_checkpoint_is_written(server, whole, folder, goes_on):
    child = server.start(folder, fault=(pause_while_saving, 9))
    child.until(child.paused.exists)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert (folder / "checkpoints/.writing_step_000009/model.safetensors").exists()
    assert newest(folder) == "step_000006"
    check_that_it_can_be_looked_at(folder, whole.outcome)
    goes_on()


def test_killed_again_while_it_goes_on(server, whole, folder, goes_on):
    """And the second time before it has saved anything."""
    for flags, step in (("", 8), ("--resume", 7), ("--resume", 11)):
        child = server.start(folder, flags, fault=(pause, step))
        child.until(child.paused.exists)
        child.send(signal.SIGKILL)
        child.wait()
        assert len(records(folder)) == step
        check_that_it_can_be_looked_at(folder, whole.outcome)
    goes_on()


def test_the_plotter_draws_a_run_that_was_killed(server, folder):
    child = server.start(folder, fault=(pause, 5))
    child.until(child.paused.exists)
    child.send(signal.SIGKILL)
    child.wait()
    with open(folder / "train_logs.json", "rb+") as log:
        log.truncate(log.seek(0, os.SEEK_END) - 100)  # and the machine lost power
    command = [sys.executable, "plotter.py", "--output_dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "cut off after 4 records" in done.stderr
    assert (folder / "report.html").exists() and (folder / "plots/rewards.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Stopped


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_stops_after_the_step_and_says_how_to_go_on(server, whole, folder, number, status):
    child = server.start(folder, "--overwrite_output_dir", fault=(pause, 5))
    child.until(child.paused.exists)
    child.send(number)
    child.until(lambda: "again to stop at once" in child.said())
    child.paused.unlink()
    assert child.wait() == status
    assert newest(folder) == "step_000005" and records(folder) == whole.outcome["records"][:5]
    command = re.search(r"stopped at step 5 of 12; go on with:  python main\.py (.*)", child.said())[1]
    child = server.start_with(shlex.split(command), folder)
    assert child.wait() == 0, child.said()
    assert outcome(folder) == whole.outcome


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_second_signal_stops_at_once(server, folder, goes_on, number):
    child = server.start(folder, fault=(pause, 5))
    child.until(child.paused.exists)
    child.send(number)
    child.until(lambda: "again to stop at once" in child.said())
    child.send(number)
    assert child.wait() == -number  # a shell says 128 + number
    assert newest(folder) == "step_000003"
    goes_on()


def test_the_command_to_go_on_keeps_every_flag():
    """--resume may have stood in the middle; what followed it must not be lost."""
    for once in ("--resume runs/a/checkpoints/step_000003", "--resume", "--overwrite_output_dir"):
        argv = shlex.split(f"--beta 0 {once} --output_dir 'runs/my run' --dataset_options size=56 style=bold --seed 1")
        command = "python main.py --beta 0 --output_dir 'runs/my run' --dataset_options size=56 style=bold --seed 1"
        assert main.command_to_go_on(argv) == f"{command} --resume"


def test_interrupted_before_the_first_step_it_says_so(server, folder):
    """Loading a large model takes minutes, in which people notice that they forgot a flag."""
    child = server.start(folder, fault=(pause_while_loading,))
    child.until(child.paused.exists)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    assert "Traceback" not in child.said() and not folder.exists()


def test_max_minutes_stops_with_a_checkpoint_from_which_it_goes_on(server, whole, folder):
    status, said = server.run(folder, "--max_minutes 0.002")
    assert status == 0 and re.search(r"stopped at step [0-9] of 12; go on with:  python main\.py .* --resume", said)
    assert newest(folder) == f"step_{len(records(folder)):06d}"
    status, said = server.run(folder, "--resume")
    assert status == 0 and records(folder) == whole.outcome["records"], said
    assert evaluations(folder) == whole.outcome["evaluations"]


# ---------------------------------------------------------------------------------------------------------------------
# Disks and folders


def test_a_disk_that_is_full_while_logging(server, whole, small_disk):
    folder = small_disk / "run"
    logs_only = "--save_steps 6 --eval_steps 0 --log_completions_steps 0"
    status, said = server.run(folder, logs_only, fault=(fill_disk, 7, 0))
    assert status == 2, said
    assert "cannot log to train_logs.json" in one_line(said) and "free some space, then continue with --resume" in said
    logged = json.loads((folder / "train_logs.json").read_text())
    assert 7 <= len(logged) < STEPS and newest(folder) == "step_000006"
    assert records(folder) == whole.outcome["records"][: len(logged)]
    (small_disk / "ballast").unlink()
    status, said = server.run(folder, f"{logs_only} --resume")
    assert status == 0 and records(folder) == whole.outcome["records"], said


def test_a_disk_that_is_full_while_saving(server, whole, small_disk):
    folder = small_disk / "run"
    status, said = server.run(folder, fault=(fill_disk, 5, 100_000))  # enough for logs, not for weights
    assert status == 2, said
    good = folder / "checkpoints/step_000003"
    assert f"no space left on device; free some space, then continue with --resume; the last good one is {good}" in said
    assert "checkpoints/step_000006 could not be written" in one_line(said)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [good.name]
    (small_disk / "ballast").unlink()
    status, said = server.run(folder, "--resume")
    assert status == 0 and outcome(folder) == whole.outcome, said


def test_a_disk_that_may_only_be_read(server, small_disk):
    folder = small_disk / "run"
    assert server.run(folder, "--max_steps 1")[0] == 0
    before = (folder / "train_logs.json").read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for flags, complaint in (
        ("--overwrite_output_dir", "no right to write in"),
        ("--resume", "read-only file system; choose another --output_dir"),
    ):
        status, said = server.run(folder, flags)
        assert status == 2 and complaint in one_line(said)
    assert (folder / "train_logs.json").read_bytes() == before


def test_of_two_runs_in_one_folder_the_second_is_refused(server, whole, folder):
    first = server.start(folder, fault=(pause, 4))
    first.until(first.paused.exists)
    for flags in ("", "--overwrite_output_dir", "--resume"):
        status, said = server.run(folder, flags)
        assert status == 2 and f"in use by another run (process {first.pid})" in one_line(said)
    first.paused.unlink()
    assert first.wait() == 0 and outcome(folder) == whole.outcome


def test_of_two_runs_that_start_together_one_is_refused(server, whole, folder):
    both = [server.start(folder), server.start(folder)]
    statuses = [child.wait() for child in both]
    assert sorted(statuses) == [0, 2]
    assert re.search("in use by another run|already holds a run", one_line(both[statuses.index(2)].said()))
    assert outcome(folder) == whole.outcome


def copy_of(whole, folder: Path) -> list[Path]:
    """Makes `folder` a copy of the uninterrupted run -> its checkpoints, oldest first."""
    shutil.copytree(whole.folder, folder)
    return sorted((folder / "checkpoints").iterdir())


def test_a_checkpoint_that_was_cut_short_is_refused_and_the_newest_good_one_named(server, whole, folder, goes_on):
    *_, good, bad = copy_of(whole, folder)
    weights = bad / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    status, said = server.run(folder, "--resume")
    assert status == 2 and f"the newest good one is {good}: continue with --resume {good}" in one_line(said)
    assert len(records(folder)) == STEPS
    goes_on(f"--resume {good}")


def test_a_checkpoint_that_is_not_there_is_no_fresh_start(server, whole, folder):
    *_, good = copy_of(whole, folder)
    status, said = server.run(folder, f"--resume {folder}/checkpoints/step_000004")
    assert status == 2 and f"it does not exist; the newest good one is {good}" in one_line(said)
    shutil.rmtree(folder / "checkpoints")
    status, said = server.run(folder, "--resume")
    assert status == 2 and "its checkpoints are gone" in one_line(said)
    assert len(records(folder)) == STEPS


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again(server, folder, goes_on):
    child = server.start(folder, fault=(pause, 2))
    child.until(child.paused.exists)
    child.send(signal.SIGKILL)
    child.wait()
    goes_on()


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong inside


def test_weights_that_are_not_numbers_stop_the_run_before_they_are_saved(server, folder, goes_on):
    status, said = server.run(folder, fault=(break_weights, 5))
    assert status == 2 and "not finite in 5 steps in a row" in one_line(said)
    assert [record["skipped_steps"] for record in records(folder)][-6:] == [0, 1, 2, 3, 4, 5]
    assert newest(folder) == "step_000003"  # at 6 and 9 there were only broken weights to save
    goes_on()


def test_a_model_whose_weights_are_not_numbers_is_said_to_be_that(server, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(server.models / "text", tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][7] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    status, said = server.run(folder, model=broken)
    assert status == 2 and "not finite" in one_line(said)


@pytest.mark.parametrize("method", ["score", "measure", "predict"])
def test_an_evaluator_that_raises_stops_the_run_in_one_line(server, folder, goes_on, method):
    """The completion that it failed on, and quotes in its message, is one that would take over a terminal."""
    calls = {"score": 60, "measure": 10, "predict": 150}[method]
    status, said = server.run(folder, "--log_completions_steps 1", fault=(evaluator_raises, method, calls))
    assert status == 2, said
    line = one_line(said)
    if method == "score":
        assert re.search(r"the rewards of the task 'arithmetic' failed on completion [0-3] of 4, '\\x1b\]0;owned", line)
    assert "ValueError" in line or "what is" in line


def test_a_picture_that_cannot_be_drawn_is_named(server, folder):
    status, said = server.run(folder, PICTURES, fault=(undrawable, 7), model="vision")
    assert status == 2
    assert re.search(r"the example correlation-train-0-\d+ cannot be made: RuntimeError\('no ink'\)", one_line(said))
    assert len(records(folder)) > 0
    status, said = server.run(folder, f"{PICTURES} --resume", model="vision")
    assert status == 0, said


# ---------------------------------------------------------------------------------------------------------------------
# A hub that cannot be reached


def test_without_the_hub_its_copy_on_this_machine_is_used(server, whole, folder):
    began = time.monotonic()
    status, said = server.run(folder, model=CACHED)
    assert status == 0 and outcome(folder) == whole.outcome, said
    assert time.monotonic() - began < 60  # the hub is asked once, not for each file, each for 23 seconds


def test_without_the_hub_and_a_copy_there_is_one_clear_line(server, folder):
    status, said = server.run(folder, model="someone/else")
    assert status == 2 and said.count("\n") == 1
    assert "'someone/else' cannot be loaded" in one_line(said) and "check the name, the network" in said
    assert not folder.exists()


def test_without_the_hub_a_dataset_is_asked_for_locally(server, folder):
    status, said = server.run(folder, "--dataset_name gsm8k --dataset_options", fault=(without_pauses,))
    assert status == 2 and said.count("\n") == 1
    assert "GSM8K could not be loaded" in one_line(said) and "--dataset_path" in said
    assert not folder.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Untrusted text


def on_a_terminal(start) -> str:
    """What a process has shown on a terminal when it has ended; `start(terminal)` starts it."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    shown = []

    def read():
        try:
            while data := os.read(leader, 4096):
                shown.append(data)
        except OSError:  # how a terminal says that nobody writes to it any more
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


def test_what_a_model_wrote_does_not_reach_the_terminal(server, folder):
    shown = on_a_terminal(lambda terminal: server.start(folder, "", (write_hostile_texts,), terminal=terminal))
    assert "12/12" in shown and "reward" in shown  # the bar, which is drawn on terminals only
    assert {c for c in shown if not c.isprintable()} <= {"\r", "\n"}
    kept = (folder / "train_samples/step_000001.json").read_bytes()
    assert kept.isascii() and b"\x1b" not in kept
    assert json.loads(kept)["groups"][0]["completions"][0]["text"].startswith(HOSTILE)


# ---------------------------------------------------------------------------------------------------------------------
# The command itself, and the table


def test_the_command_itself_without_a_network(server, whole, folder):
    """No fork and no fault: `python main.py` on a machine that is offline, stopped by SIGINT wherever it is."""
    environment = {**server.environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "main.py", "--model_path", CACHED, *FLAGS.split(), "--output_dir", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*argv, "--max_steps", "500"], cwd=ROOT, env=environment, **pipes) as command:
        while command.poll() is None and len(read_records(folder / "train_logs.json")) < 2:
            time.sleep(0.01)
        command.send_signal(signal.SIGINT)
        said, error = command.communicate(timeout=60)
    assert command.returncode == 130 and "go on with:  python main.py" in said, error
    status, said = server.run(folder, "--resume", model=CACHED, fault=(without_pauses,))
    assert status == 0, said
    assert records(folder)[:STEPS] == whole.outcome["records"]


def test_every_test_in_the_table_of_faults_is_there():
    table = (ROOT / "docs/faults.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", table)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
    mine = re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.MULTILINE)
    assert {test for test in mine if test != "test_every_test_in_the_table_of_faults_is_there"} <= {t for _, t in named}
