"""The logs reach the trackers that are asked for, and each checkpoint has a model card."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import yaml
from runs import evaluations, one_line, python, read, records, small_run  # noqa: F401

import reporting
from run_folder import damage


def numbers(record: dict) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}


@pytest.mark.slow
def test_tensorboard_has_the_logged_numbers(small_run):  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = small_run("arithmetic", "--report_to tensorboard")
    small_run("arithmetic", "--report_to tensorboard --resume --max_steps 6")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    logged = {tag: {point.step: point.value for point in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    for kind, by_step in (("train", {r["step"]: r for r in records(folder)}), ("eval", evaluations(folder))):
        assert len(by_step) > 3
        for step, record in by_step.items():
            for name, value in numbers(record).items():
                assert logged[f"{kind}/{name}"][step] == pytest.approx(value, rel=1e-5, abs=1e-7)
    small_run("arithmetic", "--overwrite_output_dir")
    assert not list(folder.glob("tensorboard/events*"))


@pytest.mark.slow
@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_services_get_the_numbers_step_by_step(package, small_run, monkeypatch):  # noqa: F811
    """A stand-in with the three functions that both packages have."""
    calls = []
    service = SimpleNamespace(
        init=lambda **about: calls.append(about),
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finished"),
        __spec__=SimpleNamespace(name=package),
    )
    monkeypatch.setitem(sys.modules, package, service)
    folder = small_run("arithmetic", f"--report_to {package} none")
    about, *logged, last = calls
    assert about["name"] == "run" and about["config"]["num_generations"] == 4 and last == "finished"
    assert [step for step, _ in logged] == sorted(step for step, _ in logged)
    for record in records(folder):
        values = next(values for step, values in logged if step == record["step"] and "train/loss" in values)
        assert values["train/reward"] == record["reward"]
    assert {step for step, values in logged if "eval/accuracy" in values} == {*evaluations(folder)}


def test_no_tracker_is_imported_by_default(tmp_path):
    tracker = reporting.Trackers([], tmp_path, {})
    tracker.log("train", 1, {"loss": 1.0})
    tracker.close()
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_missing_package_is_refused_before_torch():
    program = "import sys, importlib.util as u\nreal = u.find_spec\n"
    program += "u.find_spec = lambda name: None if name == 'trackio' else real(name)\n"
    program += "import config\ntry: config.parse_args(['--report_to', 'none', 'trackio'])\n"
    program += "finally: print('torch' in sys.modules)"
    done, _ = python("-c", program)
    assert done.returncode == 2 and done.stdout == "False\n"
    assert "the package trackio, which is not installed" in one_line(done.stderr)
    done, _ = python("main.py", "--report_to", "wanbd")
    assert done.returncode == 2 and "wandb" in one_line(done.stderr)


@pytest.mark.slow
def test_every_checkpoint_has_a_card_with_its_results(small_run):  # noqa: F811
    folder = small_run("arithmetic")
    metrics = evaluations(folder)
    for step in (2, 4):
        checkpoint = folder / f"checkpoints/step_{step:06d}"
        card = (checkpoint / "README.md").read_text(encoding="utf-8")
        head = yaml.safe_load(re.match(r"---\n(.*?)---\n", card, re.DOTALL)[1])
        assert head["pipeline_tag"] == "text-generation" and "grpo" in head["tags"] and "base_model" not in head
        assert read(folder / "config.json")["command"] in card
        rows = [line.split(" | ") for line in card.splitlines() if re.match(r"\| \d", line)]
        assert [int(row[0].strip("| ")) for row in rows] == [at for at in metrics if at <= step]
        assert float(rows[-1][2]) == pytest.approx(metrics[step]["avg_reward"], abs=5e-4)
        assert "README.md" in json.loads((checkpoint / "manifest.json").read_text())["files"]
        (checkpoint / "README.md").write_text(card + " ")
        assert "README.md" in damage(checkpoint)


def test_the_card_names_what_is_on_the_hub(monkeypatch, tmp_path):
    from config import parse_args
    from evaluator import get_evaluator

    flags = "--model_path Qwen/Qwen2.5-0.5B --dataset_name jsonl --dataset_path someone/shapes --max_steps 3"
    description = {"task": {"modality": "vision"}, "commit": None}
    monkeypatch.chdir(tmp_path)  # where no folder has such a name
    card = reporting.model_card(parse_args(flags.split()), description, get_evaluator("jsonl").headline, {}, 0)
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "Qwen/Qwen2.5-0.5B" and head["datasets"] == ["someone/shapes"]
    assert head["pipeline_tag"] == "image-text-to-text"
