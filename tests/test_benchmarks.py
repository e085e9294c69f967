"""The benchmarks run at small sizes, and count bytes and operations as torch does."""

import json
import re

import pytest
import torch
from runs import python, small_run  # noqa: F401  (a fixture)
from sampling import draw
from small_models import small_config
from torch.utils.flop_counter import FlopCounterMode

import main
from rldatasets import get_dataset


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py as a module."""
    monkeypatch.syspath_prepend("benchmarks")
    import gpu

    return gpu


@pytest.mark.slow
def test_the_table_of_a_gpu_runs_on_a_cpu():
    """Its whole steps are those of benchmarks/step_vs_trl.py."""
    done, _ = python("benchmarks/gpu.py", "--dry_run")
    assert done.returncode == 0, done.stderr
    for part in ("GB/s", "decoding", "loss and gradients", "whole step", "TRL: "):
        assert part in done.stdout


def test_operations_of_the_loss_are_those_that_torch_counts(load, gpu):
    """torch counts attention with all of its keys, here half of them: the models of the test hardly have attention."""
    llm = load("qwen2", "float32")
    rollout = draw(llm, "qwen2", generations=4, length=20, ignore_eos=True)
    counter = FlopCounterMode(display=False)
    with counter:
        advantages = torch.randn(len(rollout.completion_ids))
        main.accumulate_gradients(small_config(), llm, rollout, advantages, rollout.sampled_mask, None, None)
    prompts, prompt = rollout.prompt_ids.shape
    rows, length = rollout.completion_ids.shape
    expected = gpu.Shape.of(llm.model).loss_operations(prompts, prompt, rows, length)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.15)


def test_bytes_of_a_token_step_are_weights_and_cache(load, gpu):
    llm = load("llama", "float32")
    rollout = draw(llm, "llama", generations=2, length=4, ignore_eos=True)
    embedding = llm.model.get_input_embeddings().weight.numel()  # a token step reads one row of it for each token
    norm = llm.model.model.norm.weight.numel()
    cache = 2 * 2 * 2 * 8  # keys and values, layers, key heads, head size
    expected = 4 * (llm.num_parameters - embedding - norm + len(rollout.texts) * 10 * cache)
    assert gpu.Shape.of(llm.model).step_bytes(len(rollout.texts), 10, 4) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Controls of the environments


@pytest.fixture
def controls(monkeypatch):
    """benchmarks/controls.py as a module."""
    monkeypatch.syspath_prepend("benchmarks")
    import controls

    return controls


@pytest.mark.parametrize(
    ("task", "first", "real", "shifted", "expected"),
    [
        ("clock_feedback", "03:40:10", "05:00:00", "06:00:00", 1),
        ("clock_feedback", "03:40:10", "12:30:00", "12:00:00", -0.5),
        ("clock_feedback", "12:10:00", "02:00:00", "02:00:00", 0),
        ("correlation_feedback", "0.20", "0.10", "0.60", 1),
        ("correlation_feedback", "0.90", "0.80", "0.90", -0.2),
    ],
)
def test_an_answer_follows_by_the_share_of_the_drawing_that_it_moves(controls, task, first, real, shifted, expected):
    dataset = get_dataset(task, "test", 4, options={"size": 56})
    before, after = ([f"<answer>{one}</answer>" for one in (first, last)] for last in (real, shifted))
    assert controls.answers_that_follow(dataset, [before], [after]) == pytest.approx([expected])
    junk = ["junk", before[1]]
    assert controls.answers_that_follow(dataset, [junk], [junk]) == []


def test_a_look_follows_if_it_names_what_was_shown(controls):
    dataset = get_dataset("look", "test", 4, options={"size": 56})
    colours = dataset.environments([dataset[0]])[0].scene.colours
    wrong = next(colour for colour in ("red", "green", "blue") if colour != colours[2])
    for answer, expected in ((colours[2], 1), (wrong, 0)):
        turns = ["2", f"<answer>{answer}</answer>"]
        assert controls.answers_that_follow(dataset, [turns], [turns]) == [expected]


@pytest.mark.slow
def test_controls_evaluate_the_last_checkpoint_of_a_run(controls, small_run, monkeypatch, capsys):  # noqa: F811
    task = "--dataset_name correlation_feedback --dataset_options size=32 style=bold --max_prompt_length 200"
    run = small_run("correlation", task)  # checkpoints after steps 2 and 4
    commands = []

    def execute(folder, *flags):
        commands.append(flags)
        assert main.main([*flags, "--output_dir", str(folder), "--device", "cpu"]) == 0
        return folder

    monkeypatch.setattr(controls, "execute", execute)
    monkeypatch.setattr("sys.argv", ["controls.py", str(run)])
    controls.main()
    table = capsys.readouterr().out.split("\n\n")[-1]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in table.strip().splitlines()]
    assert [row[0] for row in rows[3:9]] == [f"`{feedback}`" for feedback in controls.FEEDBACK]
    assert {str(run / "checkpoints" / "step_000004")} == {flags[flags.index("--model_path") + 1] for flags in commands}
    assert [flags[-1] for flags in commands] == [f"feedback={feedback}" for feedback in controls.FEEDBACK]
    last = float(rows[3][1])
    assert last == pytest.approx(controls.metrics(run, -1)["last_error"], abs=0.001)  # of the run's own evaluation


def test_controls_refuse_what_has_none(controls, monkeypatch, capsys, tmp_path):
    def refusal(*runs):
        monkeypatch.setattr("sys.argv", ["controls.py", *map(str, runs)])
        with pytest.raises(SystemExit) as status:
            controls.main()
        assert status.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "has no checkpoint" in refusal(tmp_path)
    for task in ("clock", "look", "clock_feedback"):
        (tmp_path / task / "checkpoints" / "step_000001").mkdir(parents=True)
        (tmp_path / task / "config.json").write_text(json.dumps({"flags": {"dataset_name": task}}))
    assert "clock, has no option feedback" in refusal(tmp_path / "look", tmp_path / "clock")
    assert "different tasks" in refusal(tmp_path / "look", tmp_path / "clock_feedback")
