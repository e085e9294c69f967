"""A run: config.json, times, what is due, stopping and resuming, what is refused, errors in one line."""

import dataclasses
import os
import shutil
import signal
import time
import types

import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import contents, evaluations, names, one_line, python, read, records
from small_models import small_config

import main
import run as run_module
from config import Config, flag_fields
from evaluator import RewardError, get_evaluator
from run import MAY_CHANGE, Run, due, exit_status, refuse_other_flags, resume_command
from run_folder import RunFolder, RunFolderError

small_run, refused = runs.small_run, runs.refused  # fixtures

# ---------------------------------------------------------------------------------------------------------------------
# What is due, and times


@given(every=st.integers(0, 12), step=st.integers(1, 200), jump=st.integers(1, 5))
def test_due_when_a_multiple_was_passed(every, step, jump):
    """μ updates from the same completions move the step by more than one."""
    previous = max(0, step - jump)
    passed = [n for n in range(previous + 1, step + 1) if every and n % every == 0]
    assert due(every, step, previous) == bool(passed)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose folder is open, without a model."""
    config = small_config(f"--output_dir {tmp_path}/run --max_steps 10 --max_skipped_steps 2")
    monkeypatch.setattr(run_module, "describe_run", lambda config, llm, evaluator: {"flags": config.flags()})
    monkeypatch.setattr(run_module, "setup_lines", lambda *args: "")
    monkeypatch.setattr(run_module, "plan_run", lambda config, *args: (config, {}, ""))
    llm = types.SimpleNamespace(model=torch.nn.Linear(2, 5), device=torch.device("cpu"), dtype=torch.float32)
    monkeypatch.setattr(run_module, "fingerprints", lambda *args: {})
    with Run(config, get_evaluator("arithmetic")) as run:
        run.open(config, llm, None, range(8), range(4))
        yield run


RECORD = {"step": 1, "tokens": 100, "skipped_steps": 0}


def test_phases_are_timed_and_add_up_within_a_step(run):
    for step in (1, 2):
        for _ in range(2):
            with run.timed("rollout"):
                time.sleep(0.02)
        with run.timed("loss"):
            time.sleep(0.01)
        time.sleep(0.03)
        run.log_step({**RECORD, "step": step})
    for record in read(run.folder.path / "train_logs.json"):
        assert 0.04 <= record["seconds/rollout"] < record["seconds/total"]
        assert record["seconds/loss"] >= 0.01 and record["seconds/reward"] == 0
        assert 0.08 <= record["seconds/total"] < 0.08 + 0.5
        assert record["tokens_per_second"] == pytest.approx(100 / record["seconds/total"])
        assert record["peak_memory_gb"] > 0.01


def test_a_phase_is_timed_when_it_raises(run):
    with pytest.raises(ValueError), run.timed("reward"):
        time.sleep(0.01)
        raise ValueError
    run.log_step(dict(RECORD))
    assert read(run.folder.path / "train_logs.json")[0]["seconds/reward"] >= 0.01


def test_resampled_tokens_count_in_the_speed(run):
    with run.timed("rollout"):
        time.sleep(0.01)
    run.log_step({**RECORD, "resampled_tokens": 300})
    (record,) = read(run.folder.path / "train_logs.json")
    assert record["tokens_per_second"] * record["seconds/total"] == pytest.approx(400)


def test_too_many_skipped_steps_stop_the_run(run):
    run.log_step({**RECORD, "skipped_steps": 1})
    with pytest.raises(FloatingPointError, match="--learning_rate"):
        run.log_step({**RECORD, "step": 2, "skipped_steps": 2})
    assert len(read(run.folder.path / "train_logs.json")) == 2  # the last record is in the log


@pytest.mark.parametrize("lower_is_better, best", [(False, 20), (True, 10)])
def test_the_best_evaluation_is_remembered(run, lower_is_better, best):
    run.evaluator = types.SimpleNamespace(
        headline=dataclasses.replace(run.evaluator.headline, metric="score", lower_is_better=lower_is_better)
    )
    for step, score in ((0, 0.5), (10, 0.1), (20, 0.7), (30, 0.7 if best == 20 else 0.1)):
        run.step = step
        run.log_eval({"score": score}, [])
    assert run.best_step == best and list(run.evals) == [0, 10, 20, 30]


def test_peak_memory_is_in_gibibytes():
    block = torch.ones(2**26)  # 256 MiB
    assert block.nbytes / 2**30 <= run_module.peak_memory_gb(torch.device("cpu")) < 100


@pytest.mark.parametrize("dtype, bytes_per_weight", [(torch.float32, 4 + 8), (torch.bfloat16, 2 + 8 + 4)])
def test_a_checkpoint_holds_weights_moments_and_masters(dtype, bytes_per_weight):
    llm = types.SimpleNamespace(model=torch.nn.Linear(10**5, 10**4, bias=False, device="meta", dtype=dtype))
    assert run_module.checkpoint_bytes(llm) == pytest.approx(bytes_per_weight * 10**9, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# config.json


@pytest.mark.parametrize("task", runs.TASK_OPTIONS)
def test_config_json_describes_the_run(small_run, task):
    config, evaluator = read(small_run(task, "--eval_only") / "config.json"), get_evaluator(task)
    assert {"flags", "resolved", "command", "versions", "commit", "hardware", "started", "task"} <= config.keys()
    assert config["flags"].keys() == {field.name for _, field in flag_fields()}
    assert config["flags"]["num_generations"] == 4 and config["flags"]["objective"] == "grpo"
    assert config["flags"]["beta"] == 0.04 and config["flags"]["max_steps"] == 4
    assert config["flags"]["dataset_options"] == {name: str(v) for name, v in runs.TASK_OPTIONS[task].items()}
    resolved = config["resolved"]
    assert resolved["dtype"] == "float32" and resolved["device"] == "cpu" and resolved["attn_implementation"] == "sdpa"
    assert resolved["parameters"] > 10_000
    assert config["task"]["name"] == task and config["task"]["reward_names"] == list(evaluator.reward_names)
    assert config["task"]["headline"] == dataclasses.asdict(evaluator.headline)
    assert config["task"]["modality"] == ("vision" if task == "correlation" else "text")
    assert config["command"].startswith("python main.py --model_path")


def test_config_json_has_the_resolved_choices(small_run):
    folder = small_run("arithmetic", "--objective dapo --normalizer completions --beta 0.1 --eval_only")
    flags = read(folder / "config.json")["flags"]
    assert (flags["objective"], flags["normalizer"], flags["beta"]) == ("dapo", "completions", 0.1)
    assert flags["epsilon_high"] == 0.28  # the preset's


# ---------------------------------------------------------------------------------------------------------------------
# Stopping


def test_a_run_stops_at_its_deadline(run, monkeypatch):
    run.config = dataclasses.replace(run.config, max_minutes=2.0)
    with runs.handlers_restored():
        run.start()
    assert not run.should_stop()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 119)
    assert not run.should_stop()
    monkeypatch.setattr(time, "monotonic", lambda: now + 121)
    assert run.should_stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run(run, number, capsys):
    with runs.handlers_restored():
        run.start()
        os.kill(os.getpid(), number)
        assert run.should_stop() and run.finish() == 128 + number
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second signal stops at once
    assert "main.py" in capsys.readouterr().out  # the command that resumes


@pytest.mark.slow
def test_max_minutes_stops_with_a_checkpoint(small_run, capsys):
    whole = small_run("arithmetic", name="whole")
    folder = small_run("arithmetic", "--max_minutes 0.0001")
    assert names(folder / "checkpoints") == ["step_000000"] and records(folder) == []
    assert f"--output_dir {folder}" in capsys.readouterr().out.splitlines()[-1]
    small_run("arithmetic", "--resume")
    assert records(folder) == records(whole) and evaluations(folder) == evaluations(whole)


@pytest.mark.slow
def test_a_signal_stops_after_the_step_with_a_checkpoint(small_run, monkeypatch, capsys):
    whole = small_run("arithmetic", name="whole")
    log_step = Run.log_step

    def interrupt(run, record):
        log_step(run, record)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log_step", interrupt)
    folder = small_run("arithmetic", status=128 + signal.SIGTERM)
    assert names(folder / "checkpoints")[-1] == "step_000003" and len(records(folder)) == 3
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert "step 3 of 4" in last_line and "--resume" in last_line
    monkeypatch.undo()
    small_run("arithmetic", "--resume")
    assert records(folder) == records(whole)


def test_the_resume_command_drops_a_named_checkpoint():
    """Written as one argument; test_run_faults.py has the others."""
    command = resume_command(Config(argv=("--seed", "1", "--resume=runs/a/checkpoints/step_000003", "--beta", "0")))
    assert command.endswith("main.py --seed 1 --beta 0 --resume")


# ---------------------------------------------------------------------------------------------------------------------
# Contract 8: a resumed run logs what the uninterrupted one logs


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, flags",
    [
        ("arithmetic", "--sync_ref_model --ref_model_sync_steps 1 --lr_scheduler_type linear --warmup_ratio 0.5"),
        ("arithmetic", "--dtype bfloat16 --learning_rate 1e-5 --num_iterations 2"),
        ("correlation", "--objective dapo --train_size 5"),  # two epochs; rounds of further prompts
    ],
    ids=["reference", "bfloat16", "vision"],
)
def test_a_resumed_run_logs_what_a_whole_run_logs(small_run, tmp_path, task, flags):
    """Contract 8. Everything after step 2 is lost, as if the machine was switched off while step 3 was being logged."""
    whole = small_run(task, flags)
    killed = shutil.copytree(whole, tmp_path / "killed")
    shutil.rmtree(killed / "checkpoints/step_000004")
    log = (killed / "train_logs.json").read_text().split("\n")
    (killed / "train_logs.json").write_text("\n".join(log[:4])[:-30])
    (killed / "eval_logs/metrics_000004.json").unlink()
    small_run(task, flags, "--resume", name="killed")
    assert records(killed) == records(whole)
    assert evaluations(killed) == evaluations(whole)
    for kind in ("eval_logs", "train_samples"):
        assert names(killed / kind) == names(whole / kind)
    for name in ("model.safetensors", "config.json"):
        path = f"checkpoints/step_000004/{name}"
        assert (killed / path).read_bytes() == (whole / path).read_bytes()


@pytest.mark.slow
def test_resuming_from_an_earlier_checkpoint_for_longer(small_run):
    folder = small_run("arithmetic")
    before = records(folder)
    small_run("arithmetic", f"--resume {folder}/checkpoints/step_000002 --max_steps 6")
    after = records(folder)
    assert [record["step"] for record in after] == [1, 2, 3, 4, 5, 6] and after[:4] == before


def test_resuming_with_other_flags_is_refused(small_run, capsys):
    folder = small_run("arithmetic")
    before = contents(folder)
    small_run("arithmetic", "--resume --temperature 0.5", status=2)
    error = one_line(capsys.readouterr().err)
    assert "--temperature" in error and "1.0" in error and "0.5" in error
    assert contents(folder) == before


def test_only_flags_that_change_no_number_may_change():
    assert {field.name for _, field in flag_fields()} >= MAY_CHANGE
    began = {"flags": small_config().flags()}
    for name, value in began["flags"].items():
        now = {"flags": {**began["flags"], name: "another" if value != "another" else "one"}}
        if name in MAY_CHANGE:
            refuse_other_flags(began, now)
        else:
            with pytest.raises(RunFolderError, match=f"--{name} "):
                refuse_other_flags(began, now)


@pytest.mark.parametrize(
    "save_steps, num_iterations, logged, lost",
    [
        (5, 1, 4, False),  # no step of a checkpoint yet
        (5, 1, 10, False),  # up to 5 skipped steps postpone it
        (5, 1, 11, True),
        (5, 4, 13, False),  # and 4 updates are one iteration of the loop
        (5, 4, 14, True),
        (0, 1, 90, False),  # saves at the end only
    ],
)
def test_a_long_log_without_checkpoints_is_refused(tmp_path, save_steps, num_iterations, logged, lost):
    config = small_config(f"--save_steps {save_steps} --num_iterations {num_iterations} --max_skipped_steps 5")
    with RunFolder(tmp_path / "run") as folder:
        folder.open_new(False, 0, {"flags": config.flags()})
        for step in range(1, logged + 1):
            folder.log_step({"step": step})
    folder = RunFolder(tmp_path / "run")
    if lost:
        with pytest.raises(RunFolderError, match=f"{logged} steps"):
            run_module.refuse_if_checkpoints_are_gone(folder)
    else:
        run_module.refuse_if_checkpoints_are_gone(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused before anything is written


def test_a_vision_task_needs_a_vision_model(refused, task_models):
    error = refused(task="correlation", model=task_models["arithmetic"])
    assert "correlation" in error and "Qwen2.5-VL" in error


def test_a_missing_model_is_refused(refused, tmp_path):
    assert str(tmp_path / "nowhere") in refused(model=tmp_path / "nowhere")


def test_qwen_vl_chat_is_refused_with_its_successor(refused):
    assert "Qwen2.5-VL-3B-Instruct" in refused(model="Qwen/Qwen-VL-Chat")


def test_lengths_beyond_the_context_are_refused(refused):
    error = refused("--max_completion_length", 2000)
    assert "2048 tokens" in error and "--max_completion_length 2000" in error


def test_prompts_that_are_all_too_long_are_refused(refused):
    assert "--max_prompt_length 3" in refused("--max_prompt_length", 3)


def test_more_prompts_than_examples_are_refused(refused):
    error = refused("--prompts_per_step", 25)
    assert "24 training examples" in error and "25 prompts" in error


def test_resuming_without_a_run_is_refused(refused, tmp_path):
    assert str(tmp_path / "run") in refused("--resume")


def test_an_output_folder_below_a_file_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refused("--output_dir", tmp_path / "file" / "run")


def test_a_full_disk_is_refused_before_training(refused, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=16 * 2**20 + 9))  # for logs alone
    assert "space" in refused()


def test_a_missing_device_is_refused(refused):
    assert "'cuda:99'" in refused("--device", "cuda:99")


def test_a_folder_with_a_run_is_refused(small_run, refused):
    folder = small_run("arithmetic", "--max_steps 1 --eval_steps 0 --beta 0")
    before = contents(folder)
    error = refused()
    assert "--resume" in error and "--overwrite_output_dir" in error
    assert contents(folder) == before


@pytest.mark.slow
def test_overwriting_replaces_a_run(small_run):
    folder = small_run("arithmetic")
    small_run("arithmetic", "--overwrite_output_dir --max_steps 1")
    assert len(records(folder)) == 1 and names(folder / "checkpoints") == ["step_000001"]


# ---------------------------------------------------------------------------------------------------------------------
# Errors: one line on stderr, exit status 2


@pytest.fixture
def line_of(capsys, monkeypatch):
    """-> a function from an error to the line that exit_status prints for it."""
    monkeypatch.delenv("GRPO_TRACEBACK", raising=False)

    def line_of(error: BaseException, flags: str = "", status: int = 2) -> str:
        def fail(config):
            raise error

        assert exit_status(fail, small_config(flags)) == status
        return one_line(capsys.readouterr().err)

    return line_of


def test_without_an_error_the_status_is_that_of_the_work():
    assert exit_status(lambda config: config.seed, small_config("--seed 3")) == 3


@pytest.mark.parametrize("kind", [ValueError, OSError, RunFolderError, FloatingPointError, RewardError])
def test_expected_errors_are_their_message(line_of, kind):
    assert line_of(kind("too few eggs: buy some")) == "main.py: too few eggs: buy some\n"


def test_an_interruption_has_its_status(line_of):
    line_of(KeyboardInterrupt(), status=130)


def test_messages_of_several_lines_become_one(line_of):
    assert line_of(ValueError("first\n  second\r\nthird")) == "main.py: first second third\n"


def test_control_characters_do_not_reach_the_terminal(line_of):
    """A message may quote what a model wrote."""
    line = line_of(ValueError("red: \x1b[31m bell: \a right to left: \u202e"))
    assert not set("\x1b\a\u202e") & set(line) and "[31m" in line


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("eggs"), TypeError("eggs")])
def test_errors_during_training_end_the_command(small_run, monkeypatch, capsys, error):
    def fail(*args, **options):
        raise error

    monkeypatch.delenv("GRPO_TRACEBACK", raising=False)
    monkeypatch.setattr(main, "accumulate_gradients", fail)
    small_run("arithmetic", "--beta 0", status=2)
    one_line(capsys.readouterr().err)


@pytest.mark.slow
def test_an_unexpected_error_of_the_command_is_one_line(tmp_path):
    """The whole command in a new process, with a function of the set-up replaced by one that fails."""
    program = (
        "import sys, main\n"
        "def get_evaluator(name, options): return {}[name]\n"
        "main.get_evaluator = get_evaluator\n"
        f"sys.exit(main.main(['--output_dir', {str(tmp_path / 'run')!r}]))"
    )
    done, _ = python("-c", program, GRPO_TRACEBACK="")
    assert done.returncode == 2 and "KeyError" in one_line(done.stderr) and done.stdout == ""
    done, _ = python("-c", program, GRPO_TRACEBACK="1")
    assert done.returncode == 1 and "in get_evaluator" in done.stderr
    assert names(tmp_path) == []
