"""Faults of a run that need no process of their own: bad flags, replaced inputs, other machines, careless rewards."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import torch

import config
import llms
import main
import optimizer
import run
from config import parse_args
from evaluator import EVALUATORS
from progress import explanations
from rollout import Sampler
from run_folder import RunFolderError
from tiny_models import MAX_CONTEXT

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SMALL = "--device cpu --prompts_per_step 2 --num_generations 4 --max_prompt_length 200 --max_completion_length 8 "
SMALL += "--train_size 8 --eval_size 2 --max_steps 2 --save_steps 1"
TASK = {"arithmetic": "--dataset_name arithmetic --dataset_options steps=1", "gsm8k": "--dataset_name gsm8k"}


def one_line(output: str) -> str:
    """The only line of a refusal."""
    assert output.startswith("main.py: ") and output.count("\n") == 1, output
    return output


def refusal(capsys, flags: str) -> str:
    """The line with which `parse_args` refuses flags; the exit status must be 2."""
    with pytest.raises(SystemExit) as status:
        parse_args(shlex.split(flags))
    assert status.value.code == 2
    return one_line(capsys.readouterr().err)


@pytest.fixture
def train(model_folder, tmp_path):
    """-> a function that runs main.py in this process on a copy of a random Llama, and returns the exit status."""
    model = shutil.copytree(model_folder("llama"), tmp_path / "model")
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}

    def train(flags: str = "", task: str = "arithmetic") -> int:
        paths = f"--model_path {model} --output_dir {tmp_path / 'run'}"
        return main.main(shlex.split(f"{TASK[task]} {paths} {SMALL} {flags}"))

    yield train
    for number in (signal.SIGINT, signal.SIGTERM, run.HANGUP):
        if number:
            signal.signal(number, handlers[number])


# ---------------------------------------------------------------------------------------------------------------------
# Inputs that are replaced before a run is resumed


def break_weights(model: Path) -> None:
    with open(model / "model.safetensors", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))


def change_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages[-1].content }}")


@pytest.mark.slow
@pytest.mark.parametrize("change, file", [(break_weights, "model.safetensors"), (change_template, "chat_template")])
def test_a_replaced_model_is_refused_on_resuming(train, tmp_path, capsys, change, file):
    assert train("--beta 0.1") == 0
    log = (tmp_path / "run/train_logs.json").read_bytes()
    change(tmp_path / "model")
    capsys.readouterr()
    assert train("--beta 0.1 --max_steps 3 --resume") == 2
    line = one_line(capsys.readouterr().err)
    assert "--model_path" in line and file in line
    assert (tmp_path / "run/train_logs.json").read_bytes() == log


@pytest.mark.slow
def test_an_unneeded_model_may_be_missing_on_resuming(train, tmp_path):
    """Without a KL penalty the weights of the checkpoint are all there is to load."""
    assert train("--beta 0") == 0
    shutil.rmtree(tmp_path / "model")
    assert train("--beta 0 --max_steps 3 --resume") == 0
    assert "model_path" in json.loads((tmp_path / "run/config.json").read_text())["fingerprints"]


@pytest.mark.slow
@pytest.mark.parametrize("changed, split", [(0, "train"), (19, "test")])
def test_replaced_data_are_refused_on_resuming(train, tmp_path, capsys, changed, split):
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(20)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    flags = f"--beta 0 --train_size 18 --dataset_path {data}"
    assert train(flags, "gsm8k") == 0
    assert train(f"{flags} --max_steps 3 --resume", "gsm8k") == 0
    rows[changed]["answer"] = "#### 0"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    capsys.readouterr()
    assert train(f"{flags} --max_steps 4 --resume", "gsm8k") == 2
    line = one_line(capsys.readouterr().err)
    assert "--dataset_path" in line and f"({split})" in line


def test_a_moved_commit_of_the_hub_is_refused():
    def description(commit: str | None) -> dict:
        settings = parse_args(["--model_path", "someone/model"])
        model = SimpleNamespace(config=SimpleNamespace(_commit_hash=commit))
        llm, dataset = SimpleNamespace(name="someone/model", model=model), SimpleNamespace(reads_files=False)
        return {"flags": settings.flags(), "fingerprints": run.fingerprints(settings, llm, dataset, dataset)}

    with pytest.raises(RunFolderError, match=r"--model_path someone/model .*0123abc.*4567def"):
        run.refuse_other_inputs(description("0123abc"), description("4567def"))
    run.refuse_other_inputs(description("0123abc"), description("0123abc"))
    run.refuse_other_inputs(description("0123abc"), description(None))  # a hub that does not tell it
    run.refuse_other_inputs({"flags": {}}, description("0123abc"))  # a run of an older version


# ---------------------------------------------------------------------------------------------------------------------
# Resuming for longer, or on another device


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_longer_run_without_a_learning_rate_is_noted(schedule):
    settings = dataclasses.replace(parse_args([]), max_steps=30, lr_scheduler_type=schedule)
    rate = optimizer.learning_rate(21, 20, settings)
    note = run.schedule_note(settings, 20)
    assert (rate == 0) == bool(note) == (schedule != "constant")
    assert not note or ("20" in note and "30" in note)
    assert not run.schedule_note(settings, 30) and not run.schedule_note(settings, 40)


@pytest.mark.slow
def test_a_run_resumed_for_longer_prints_the_note(train, tmp_path, capsys):
    assert train("--beta 0 --lr_scheduler_type cosine") == 0
    assert "decays to 0" not in capsys.readouterr().out
    assert train("--beta 0 --lr_scheduler_type cosine --max_steps 3 --resume") == 0
    assert "decays to 0 at step 2" in capsys.readouterr().out
    log = json.loads((tmp_path / "run/train_logs.json").read_text())
    assert log[1]["learning_rate"] > 0 and log[2]["learning_rate"] == 0


def test_random_numbers_of_a_gpu_are_replaced_on_a_cpu(load, capsys):
    """A CUDA generator's state has 16 bytes: a seed and an offset."""
    llm, state = load("llama"), {"generator": torch.arange(16, dtype=torch.uint8)}
    samplers = [Sampler(llm, seed=3) for _ in range(3)]
    for sampler in samplers[:2]:
        sampler.load_state_dict(state)
        assert "random numbers" in capsys.readouterr().out
    drawn = [torch.rand(4, generator=sampler.generator).tolist() for sampler in samplers]
    assert drawn[0] == drawn[1] != drawn[2]  # reproducible, and not those with which the run began
    samplers[0].load_state_dict(samplers[1].state_dict())
    assert not capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Flags


NUMBERS = [(owner, field) for owner, field in config.flag_fields() if config.kind_of(owner, field) in (int, float)]


@pytest.mark.parametrize("owner, field", NUMBERS, ids=[field.name for _, field in NUMBERS])
def test_every_number_is_finite_and_within_bounds(capsys, owner, field):
    kind, bounds = config.kind_of(owner, field), field.metadata["bounds"]
    parser = config.Parser()  # with this flag alone, since parsing all of them takes 20 ms
    config.add_flag(parser, owner, field)
    bad = ["nan", "inf", "-inf", "1e999", "", "x", "-1", "9" * 400]
    bad += ["1e3", "1.5", "0x10"] if kind is int else []
    bad += [str(bounds[name] + sign) for name, sign in (("least", -1), ("most", 1)) if bounds[name] is not None]
    bad += [str(bounds[name]) for name in ("above", "below") if bounds[name] is not None]
    for text in bad:
        with pytest.raises(SystemExit) as status:
            parser.parse_args([f"--{field.name}={text}"])
        assert status.value.code == 2 and f"--{field.name}" in one_line(capsys.readouterr().err), text
    default = config.Objective().epsilon if field.name == "epsilon_high" else field.default
    if default is not None:
        parser.parse_args([f"--{field.name}={default}"])


@pytest.mark.parametrize(
    "flag",
    [
        *("num_train_epochs 0", "max_minutes 0", "max_steps 0", "warmup_ratio 100", "overlong_buffer 4096"),
        *("adam_beta1 1", "adam_beta2 1", "num_generations 1", "temperature 0", "correction_cap 0.5"),
        *("eval_samples 0", "learning_rate 5", "train_size 1000000000000", "seed 1000000000000000000000"),
        *("num_train_epochs 1e308", "temperature 1e-30", "ref_model_mixup_alpha 2", "epsilon -0.2"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(capsys, flag):
    assert f"--{flag.split()[0]}" in refusal(capsys, f"--{flag}")


@pytest.mark.parametrize("objective", sorted(config.OBJECTIVES))
def test_syncing_needs_a_reference_model(capsys, objective):
    settings = f"--objective {objective} --sync_ref_model"
    if config.OBJECTIVES[objective].beta:
        parse_args(shlex.split(settings))
    else:
        assert "--beta" in refusal(capsys, settings)
    parse_args(shlex.split(f"{settings} --beta 0.1"))
    assert "--sync_ref_model" in refusal(capsys, f"{settings} --beta 0")


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--dataset_name clock --dataset_options size=-5", "size"),
        ("--dataset_name clock --dataset_options size=nan", "size"),
        ("--dataset_name correlation --dataset_options size=1e9", "size"),
        ("--dataset_name correlation --dataset_options num_points=inf", "num_points"),
        ("--dataset_name clock --dataset_options style=bald", "bold"),
        ("--dataset_name arithmetic --dataset_options steps=0", "steps"),
        ("--dataset_name clock --train_size 50 --prompts_per_step 60", "60"),
        ("--dataset_name clock --dataset_path data.jsonl", "path"),
        ("--dataset_name clock --device cuda:99", "cuda:99"),
        ("--dataset_name gsm8k --dataset_path {folder}/missing.jsonl", "missing.jsonl"),
        ("--dataset_name gsm8k --dataset_path {folder}/data.jsonl", "line 1"),
    ],
)
@pytest.mark.parametrize("model", ["someone/model", "tiny"])
def test_bad_input_is_refused_before_the_model(tmp_path, monkeypatch, capsys, flags, named, model):
    (tmp_path / "data.jsonl").write_text('{"question": "What is 1 + 1?"}\n' * 20)
    for slow in ("load_llm", "tiny_model"):
        monkeypatch.setattr(main, slow, lambda *_: pytest.fail("the model came before the refusal"))
    argv = shlex.split(flags.format(folder=tmp_path))
    assert main.main([*argv, "--model_path", model, "--output_dir", str(tmp_path / "run")]) == 2
    assert named in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_too_long_completions_are_refused_before_a_warm_up(capsys):
    line = refusal(capsys, "--model_path tiny --dataset_name clock --max_completion_length 10000000")
    assert "--max_completion_length 10000000" in line and str(MAX_CONTEXT) in line


@pytest.mark.parametrize(
    "flags, named", [("--max_completion_length 10000000", "512"), ("--dataset_name clock --dataset_options", "clock")]
)
def test_an_unfit_model_is_refused_before_its_weights(train, monkeypatch, tmp_path, capsys, flags, named):
    """The weights of a hub model take minutes to download; its config says what it can read."""
    for kind in (llms.AutoModelForCausalLM, llms.AutoModelForImageTextToText):
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, **how: pytest.fail("the weights came first"))
    assert train(flags) == 2
    assert named in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The machine


@pytest.mark.parametrize("name", config.LAUNCHERS)
def test_several_processes_are_refused(monkeypatch, capsys, tmp_path, name):
    """On every rank, before the folder is touched."""
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv(name, "2")
        assert f"{name}=2" in refusal(capsys, f"--output_dir {tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()
    for single in ("1", ""):
        monkeypatch.setenv(name, single)
        parse_args([])


def test_missing_flash_attention_is_refused_from_the_flags(monkeypatch, capsys):
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
    assert "flash-attn" in refusal(capsys, "--attn_implementation flash_attention_2")


def test_old_packages_are_refused_in_one_line(monkeypatch, capsys):
    installed = {"torch": "2.11.0+cu128", "transformers": "5.17.0.dev0"}
    version = config.metadata.version
    monkeypatch.setattr(config.metadata, "version", lambda name: installed.get(name) or version(name))
    parse_args([])
    for package, old in (("transformers", "4.57.1"), ("torch", "2.9.1+cu128"), ("pillow", "10.4.0")):
        with monkeypatch.context() as patch:
            patch.setitem(installed, package, old)
            line = refusal(capsys, "")
            assert f"{package} {old}" in line and f"{package} >=" in line


@pytest.mark.parametrize("once", ["--resume runs/a/checkpoints/step_000003", "--resume", "--overwrite_output_dir"])
@pytest.mark.parametrize("python", ["python", "uv run"])
def test_the_resume_command_keeps_every_flag(monkeypatch, once, python):
    """--resume may be anywhere among the flags; those after it must not be lost."""
    monkeypatch.setattr(run, "PYTHON", python)
    before, after = "--beta 0", "--output_dir 'runs/my run' --dataset_name clock --dataset_options size=56 style=bold"
    settings = parse_args(shlex.split(f"{before} {once} {after}"))
    assert run.resume_command(settings) == f"{python} main.py {before} {after} --resume"


@pytest.mark.parametrize("depth, expected", [(None, "python"), ("1", "uv run")])
def test_printed_commands_start_python_as_this_was(depth, expected):
    """Under `uv run`, a plain `python` would not find the packages."""
    environment = {name: value for name, value in os.environ.items() if name != "UV_RUN_RECURSION_DEPTH"}
    environment |= {"UV_RUN_RECURSION_DEPTH": depth} if depth else {}
    code = "import progress; print(progress.PYTHON)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.slow
def test_a_terminal_without_utf8_stops_nothing(model_folder, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    train = f"{TASK['arithmetic']} {SMALL} --model_path {model_folder('llama')} --output_dir {tmp_path / 'run'}"
    for flags in ("--help", train):
        command = [sys.executable, "main.py", *shlex.split(flags)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii() and "?" in done.stdout  # in place of β


# ---------------------------------------------------------------------------------------------------------------------
# Rewards and errors


REWARDS = {
    "NaN": lambda scores: {**scores, "correctness": math.nan},
    "infinite": lambda scores: {**scores, "correctness": math.inf},
    "None": lambda scores: {**scores, "correctness": None},
    "one too few": lambda scores: dict(list(scores.items())[1:]),
    "none": lambda scores: None,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REWARDS)
def test_a_careless_reward_names_task_and_completion(train, monkeypatch, capsys, kind):
    score = EVALUATORS["arithmetic"].score
    monkeypatch.setattr(EVALUATORS["arithmetic"], "score", lambda *args: REWARDS[kind](score(*args)))
    assert train("--beta 0") == 2
    assert re.search(r"'arithmetic' failed on completion \d+ of \d+, ['\"]", one_line(capsys.readouterr().err))


ERRORS = [
    *(KeyError("weight"), IndexError("list index out of range"), TypeError("'NoneType' object is not iterable")),
    *(
        AttributeError("layers"),
        RuntimeError("shapes do not fit"),
        ZeroDivisionError("division by zero"),
    ),
    *(jinja2.TemplateError("only user and assistant roles"), AssertionError(), RecursionError("too deep")),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_unexpected_error_is_one_line(monkeypatch, capsys, error):
    def work(settings: config.Config) -> int:
        raise error

    monkeypatch.delenv("GRPO_TRACEBACK", raising=False)
    assert run.exit_status(work, parse_args([])) == 2
    line = one_line(capsys.readouterr().err)
    assert type(error).__name__ in line and "GRPO_TRACEBACK" in line
    monkeypatch.setenv("GRPO_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run.exit_status(work, parse_args([]))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_lack_of_memory_names_the_flags_that_help(capsys, error):
    def work(settings: config.Config) -> int:
        raise error

    assert run.exit_status(work, parse_args(["--micro_batch_tokens", "4321"])) == 2
    line = one_line(capsys.readouterr().err)
    assert all(text in line for text in ("--micro_batch_tokens", "4321", "--gradient_checkpointing"))


# ---------------------------------------------------------------------------------------------------------------------
# What a log says


@pytest.mark.parametrize("dtype, rounding, fault", [("float32", 2e-4, 0.28), ("bfloat16", 0.02, 0.28)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_sampler_that_differs_is_explained(dtype, rounding, fault, temperature):
    settings = parse_args([f"--temperature={temperature}"])
    record = {"loss": 1.0, "zero_std_fraction": 0.5, "truncated_fraction": 0.0, "skipped_steps": 0}

    def explained(difference: float) -> bool:
        found = explanations(record | {"sampler_logp_diff": difference / temperature}, settings, dtype)
        return any("sampler_logp_diff" in text for text in found.values())

    assert explained(fault) and not explained(rounding) and not explained(0.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_alone_is_not_explained(train, capsys, dtype):
    assert train(f"--beta 0 --dtype {dtype}") == 0
    assert "sampler_logp_diff" not in capsys.readouterr().out


def test_the_table_of_faults_names_existing_tests():
    table = (ROOT / "docs/faults.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", table)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (TESTS / file).read_text(), f"{file}::{test}"
    survival = re.findall(r"^def (test_\w+)", (TESTS / "test_survival.py").read_text(), re.MULTILINE)
    assert set(survival) <= {test for _, test in named}
