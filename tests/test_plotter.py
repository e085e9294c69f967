"""plotter.py and report.py, on run folders made by synthetic_run.py."""

import base64
import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synthetic_run import error, make_run

import plotter
import report
from plotter import task_charts

ROOT = Path(__file__).parent.parent


def settings_of(*folders):
    return report.settings_of([report.read_run(Path(folder)) for folder in folders])


def charts_of(*folders):
    return dict(plotter.metric_charts(settings_of(*folders)))


def task_charts_of(*folders):
    return dict(task_charts(settings_of(*folders)))


def panels(figure):
    return {ax.get_title(loc="left"): ax for ax in figure.axes}


def line(ax, label):
    return next(item for item in ax.lines if item.get_label().startswith(label)).get_xydata()


def rewrite(path, change):
    """Replace the content of a JSON file by `change(content)`, or by the content if `change` edits it in place."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def refusal(capsys, *argv):
    """The error message of a refused command: one line, exit status 2."""
    assert plotter.main([str(arg) for arg in argv]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Traceback" not in message
    return message


@pytest.fixture
def one_chart(monkeypatch):
    """Only the chart of the training reward is drawn, which saves seconds."""

    def metric_charts(settings):
        yield "train_score", plotter.draw_panels("Training reward", ["reward"], settings)

    monkeypatch.setattr(plotter, "metric_charts", metric_charts)
    monkeypatch.setattr(plotter, "task_charts", lambda settings: ())


# ---- charts of all metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("clock", {"evaluation_mean_abs_error_minutes", "clock_error_by_hour", "clock_sheet"}),
        ("correlation", {"evaluation_mean_abs_error", "correlation"}),
        ("arithmetic", {"evaluation_accuracy", "changes"}),
        ("gsm8k", {"evaluation_accuracy", "changes"}),
    ],
)
def test_every_task_gets_its_charts(tmp_path, capsys, task, names):
    run = make_run(tmp_path / "run", task, steps=12, eval_steps=6, eval_size=12)
    assert plotter.main(["--output_dir", str(run), "--no_report"]) == 0
    names |= {"train_score", "eval_score", "evaluation_avg_reward", "rewards", "task_metrics", "optimization", "policy",
              "completions", "time"}  # fmt: skip
    drawn = sorted((run / "plots").glob("*.png"))
    assert {path.stem for path in drawn} == names
    for path in drawn:
        with Image.open(path) as image:
            assert image.width == 1200 and len(image.convert("RGB").getcolors(1 << 24)) > 3, path
        assert path.stat().st_size < 300_000, path
    assert len(re.findall(rb"/Type /Page\b", (run / "plots/charts.pdf").read_bytes())) == len(names)
    assert not (run / "report.html").exists()
    last = json.loads((run / "eval_logs/metrics_000012.json").read_text())
    score = last.get("accuracy", last.get("mean_abs_error", last.get("mean_abs_error_minutes")))
    shown = f"{100 * score:.1f} %" if "accuracy" in last else f"{score:.1f} min" if task == "clock" else f"{score:.3f}"
    assert f"| {shown}" in capsys.readouterr().out and f"| {shown}" in (run / "plots/scores.md").read_text()


@pytest.mark.slow
def test_training_is_drawn_raw_and_smoothed(tmp_path):
    run = make_run(tmp_path / "run", "clock", steps=45, eval_steps=15, eval_size=8)
    (ax,) = charts_of(run)["eval_score"].axes
    logged = report.read_run(run)
    expected = np.array([(r["step"], r["mean_abs_error_minutes"]) for r in logged.train])
    assert np.allclose(line(ax, "each step"), expected)
    smoothed = line(ax, "training, mean of up to 3 steps")
    assert np.allclose(smoothed[20, 1], expected[19:22, 1].mean())
    assert np.allclose(smoothed[[0, 1, -1], 1], expected[[0, 1, -1], 1])
    assert np.allclose(line(ax, "evaluation"), [(r["step"], r["mean_abs_error_minutes"]) for r in logged.evals])
    assert any(np.allclose(item.get_ydata(), 180) for item in ax.lines)
    assert [text.get_text() for text in ax.texts] == ["guessing: 180.0 min"] and ax.get_ylabel() == "min"


@pytest.mark.slow
def test_shares_are_drawn_as_percent_with_their_interval(tmp_path):
    run = make_run(tmp_path / "run", "gsm8k", steps=6, eval_steps=3, eval_size=20)
    (ax,) = charts_of(run)["evaluation_accuracy"].axes
    accuracy = [r["accuracy"] for r in report.read_run(run).evals]
    assert np.allclose(line(ax, "evaluation with its 95 % interval")[:, 1], 100 * np.array(accuracy))
    assert ax.get_ylabel() == "%" and len(ax.containers) == 1  # the error bars
    assert "Accuracy low" not in panels(charts_of(run)["task_metrics"])


def test_unlisted_metrics_get_panels(tmp_path):
    run = make_run(tmp_path / "run", "correlation", steps=6, eval_steps=3, eval_size=8)
    unlisted = {"calm_fraction": 0.25, "rewards/politeness": 1}
    rewrite(run / "train_logs.json", lambda records: [{**r, **unlisted, "wobble": r["step"] ** 2} for r in records])
    rewrite(run / "eval_logs/metrics_000003.json", lambda record: {**record, "hue_error": 2.0})
    rewrite(run / "eval_logs/metrics_000006.json", lambda record: {**record, "hue_error": 1.0})
    charts = charts_of(run)
    assert "Politeness: always 1 points" in charts["rewards"].legends[0].get_title().get_text()
    assert "Hue error" in panels(charts["task_metrics"])
    assert np.allclose(line(panels(charts["other"])["Wobble"], "training")[:, 1], np.arange(1, 7) ** 2)
    assert charts["other"].legends[0].get_title().get_text() == "Calm: always 25 %"  # a constant gets no panel


def test_first_and_last_errors_share_a_panel(tmp_path):
    run = make_run(tmp_path / "run", "correlation", steps=6, eval_steps=3, eval_size=8)
    errors = [{"first_error": 0.5 + 0.01 * i, "last_error": 0.4 - 0.05 * i} for i in range(7)]
    rewrite(run / "train_logs.json", lambda records: [{**r, **errors[r["step"]]} for r in records])
    for step in (0, 3, 6):
        rewrite(run / f"eval_logs/metrics_{step:06d}.json", lambda record, step=step: {**record, **errors[step]})
    (ax,) = charts_of(run)["feedback"].axes
    assert line(ax, "first answer, evaluation")[:, 1].tolist() == [errors[step]["first_error"] for step in (0, 3, 6)]
    assert np.allclose(line(ax, "evaluation")[:, 1], [errors[step]["last_error"] for step in (0, 3, 6)])
    assert len(line(ax, "first answer, training")) == len(line(ax, "training")) == 6


def test_null_is_drawn_as_a_gap(tmp_path):
    run = make_run(tmp_path / "run", steps=6, eval_steps=3, eval_size=4)  # its kl is null at step 3
    rewrite(run / "train_logs.json", lambda records: [{**r, "entropy": None} for r in records])
    drawn = panels(charts_of(run)["policy"])
    assert line(drawn["KL from the reference model"], "training")[:, 0].tolist() == [1, 2, 4, 5, 6]
    assert "Entropy of the policy" not in drawn


def test_one_outlier_does_not_flatten_a_chart(tmp_path):
    run = make_run(tmp_path / "run", steps=6, eval_steps=3, eval_size=4)
    rewrite(
        run / "train_logs.json", lambda records: [{**r, "grad_norm": 1e4 if r["step"] == 4 else 0.5} for r in records]
    )
    drawn = panels(charts_of(run)["optimization"])
    assert drawn["Gradient norm before clipping"].get_yscale() == "log" and drawn["Loss"].get_yscale() == "linear"


@pytest.mark.slow
def test_time_is_stacked_by_phase(tmp_path):
    run = make_run(tmp_path / "run", steps=6, eval_steps=3, eval_size=4)
    ax = panels(charts_of(run)["time"])["One step, phase by phase"]
    first = report.read_run(run).train[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["rollout", "reward", "loss"]
    top = max(y for x, y in ax.collections[-1].get_paths()[0].vertices if x == 1)
    assert top == pytest.approx(sum(first[f"seconds/{phase}"] for phase in ("rollout", "reward", "loss")))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.integers(0, 10))
def test_smoothing_is_a_centred_mean(values, half):
    smoothed = plotter.smooth(np.array(values), 2 * half + 1)
    for i, got in enumerate(smoothed):
        width = min(half, i // 2, len(values) - 1 - i)
        assert got == pytest.approx(np.mean(values[i - width : i + width + 1]), abs=1e-6)
    assert len(smoothed) == len(values)


def test_smoothing_does_not_hide_fast_learning_at_the_start():
    """An error that falls to a third within 50 of 1,200 steps: a fixed window of 81 began far below it."""
    error = 0.05 + 0.3 * np.exp(-np.arange(1200) / 40)
    smoothed = plotter.smooth(error, 81)
    assert smoothed[0] == error[0] and np.abs(smoothed - error).max() < 0.02
    line = np.linspace(1, 0, 300)
    assert plotter.smooth(line, 81) == pytest.approx(line)


def test_an_odd_number_of_panels_leaves_no_hole(tmp_path):
    run = make_run(tmp_path / "run", steps=6, eval_steps=3, eval_size=4)
    settings = report.settings_of([report.read_run(run)])
    first, second, last = plotter.draw_panels("Three", ["loss", "grad_norm", "reward"], settings).axes
    assert last.get_subplotspec().colspan == range(2)
    assert [ax.get_subplotspec().colspan for ax in (first, second)] == [range(1), range(1, 2)]


@pytest.mark.parametrize(
    ("hardware", "text"),
    [
        ({"device": "cpu", "name": "Some CPU 7", "cpu_count": 2, "threads": 1}, "Some CPU 7, 2 cores, 1 torch threads"),
        ({"device": "cpu", "cpu_count": 2}, "cpu"),
        ({"device": "Some GPU", "name": "Some GPU", "cpu_count": 2, "threads": 1}, "Some GPU"),
        ({}, "?"),
    ],
)
def test_the_hardware_has_a_name(hardware, text):
    assert report.hardware_text(hardware) == text


# ---- charts of a task


def test_predictions_are_drawn_over_right_answers(tmp_path):
    run = make_run(tmp_path / "run", "correlation", steps=4, eval_steps=2, eval_size=30)
    axes = task_charts_of(run)["correlation"].axes
    assert [ax.get_title(loc="left") for ax in axes] == ["Before, step 0", "After, step 4"]
    for ax, step in zip(axes, (0, 4), strict=True):
        groups = json.loads((run / f"eval_logs/samples_{step:06d}.json").read_text())["groups"]
        expected = [(float(g["answer"]), g["completions"][0]["prediction"]) for g in groups]
        readable = [pair for pair in expected if pair[1] is not None]
        assert np.allclose(ax.collections[0].get_offsets(), readable)
        assert ax.texts[0].get_text().startswith(f"{len(readable)} of 30 readable")


def test_a_new_task_with_numeric_answers_gets_a_scatter(tmp_path):
    run = make_run(tmp_path / "run", "correlation", steps=2, eval_steps=2, eval_size=5)
    rewrite(run / "config.json", lambda config: config["task"].update(name="thermometer"))
    assert list(task_charts_of(run)) == ["thermometer"]


def test_clock_errors_go_the_shorter_way_round():
    seconds = plotter.clock_seconds
    assert plotter.clock_error_minutes(seconds("11:59:30"), seconds("00:00:30")) == 1
    assert plotter.clock_error_minutes(seconds("03:00:00"), seconds("09:00:00")) == 360
    assert seconds("12:00:00") == seconds("00:00:00") == 0 and seconds("noon") is None and seconds(None) is None


def test_clock_error_by_hour_is_the_mean_of_that_hour(tmp_path):
    run = make_run(tmp_path / "run", "clock", steps=2, eval_steps=2, eval_size=60)
    drawn = task_charts_of(run)
    after = json.loads((run / "eval_logs/samples_000002.json").read_text())["groups"]
    pairs = [(g["completions"][0]["prediction"], g["answer"]) for g in after]
    at_four = [error("clock", prediction, answer) for prediction, answer in pairs if answer.startswith("04")]
    bars = drawn["clock_error_by_hour"].axes[0].containers[1]
    assert at_four and bars[4].get_height() == pytest.approx(np.mean(at_four), abs=0.01)
    titles = [ax.get_title(loc="center") for ax in drawn["clock_sheet"].axes]
    assert len(titles) == 10 and titles[0].split("\n")[1] != titles[-1].split("\n")[1]


def test_examples_are_counted_by_change(tmp_path):
    run = make_run(tmp_path / "run", "gsm8k", steps=2, eval_steps=2, eval_size=4)
    for step, predictions in ((0, ["$1,080", 3, None, 7.0]), (2, [1080, "1,080.00", "1080", "seven"])):

        def predict(content, predictions=predictions):
            for group, prediction in zip(content["groups"], predictions, strict=True):
                group["answer"] = "1080"
                group["completions"][0]["prediction"] = prediction

        rewrite(run / f"eval_logs/samples_{step:06d}.json", predict)
    evaluations = plotter.before_and_after(report.read_run(run))
    counts = {name: len(examples) for name, examples in report.changes(*evaluations.values()).items()}
    assert counts == {"wrong → right": 2, "right → wrong": 0, "right → right": 1, "wrong → wrong": 1}
    assert "3 → 1080" in task_charts_of(run)["changes"].axes[1].texts[0].get_text()


# ---- several runs


@pytest.mark.slow
def test_seeds_are_one_setting_named_by_differing_flags(tmp_path):
    folders = [make_run(tmp_path / f"{rate}-{seed}", "correlation", steps=6, eval_steps=3, eval_size=5, seed=seed,
                        learning_rate=rate, model_path=f"/models/{name}") for seed in (0, 1, 2)
               for rate, name in ((1e-4, "small"), (1e-5, "large"))]  # fmt: skip
    settings = settings_of(*folders)
    assert [s.name for s in settings] == [
        "model_path=small, learning_rate=0.0001",
        "model_path=large, learning_rate=1e-05",
    ]
    assert [len(s.runs) for s in settings] == [3, 3]

    (ax,) = charts_of(*folders)["evaluation_mean_abs_error"].axes
    finals = [run.evals[-1]["mean_abs_error"] for run in settings[1].runs]
    assert line(ax, settings[1].name)[-1].tolist() == pytest.approx([6, np.mean(finals)])
    bars = ax.containers[1].lines[2][0].get_segments()[-1]  # of the second setting, at the last evaluation
    assert bars[:, 1].tolist() == pytest.approx([min(finals), max(finals)])

    summary = report.summarize(settings[1])
    assert summary["seeds"] == "0, 1, 2" and summary["steps"] == "6"
    assert summary["after"] == f"{np.mean(finals):.3f} ({min(finals):.3f} to {max(finals):.3f})"
    assert list(task_charts_of(*folders)) == ["correlation_1_model_path_small_learning_rate_0_0001",
                                           "correlation_2_model_path_large_learning_rate_1e_05"]  # fmt: skip


def test_the_guessing_line_stays_on_the_chart(tmp_path):
    run = make_run(tmp_path, "correlation", steps=6, eval_steps=3, eval_size=3)
    records = json.loads((run / "train_logs.json").read_text())
    for record in records:
        record["mean_abs_error"] = 0.3 * 0.5 ** record["step"]
    (run / "train_logs.json").write_text(json.dumps(records))
    for step, path in enumerate(sorted(run.glob("eval_logs/metrics_*.json"))):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"mean_abs_error": 0.3 * 0.2**step}))
    (ax,) = charts_of(run)["eval_score"].axes
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 2 / 3


@pytest.mark.slow
def test_different_tasks_and_options_can_be_compared(tmp_path):
    options = {"style": "bold", "size": 56}
    clock = make_run(tmp_path / "a", "clock", steps=3, eval_steps=3, eval_size=3, dataset_options=options)
    plain = make_run(tmp_path / "b", "clock", steps=3, eval_steps=3, eval_size=3, dataset_options={"size": 56})
    assert [s.name for s in settings_of(clock, plain)] == ["style=bold", "style=None"]
    other = make_run(tmp_path / "c", "correlation", steps=3, eval_steps=3, eval_size=3, dataset_options=options)
    assert [s.name for s in settings_of(clock, other)] == ["dataset_name=clock", "dataset_name=correlation"]
    lines = [[text.get_text() for text in ax.texts] for ax in charts_of(clock, other)["eval_score"].axes]
    assert lines == [["guessing: 180.0 min"], ["guessing: 0.667", "best constant answer: 0.500"]]


@pytest.mark.slow
def test_a_comparison_keeps_the_first_runs_charts(tmp_path, one_chart):
    a, b = (
        make_run(tmp_path / name, steps=3, eval_steps=3, eval_size=3, beta=beta) for name, beta in (("a", 0), ("b", 1))
    )
    assert plotter.main(["--output_dir", str(a), str(b)]) == 0
    assert (a / "plots/comparison/report.html").exists() and not (a / "plots/train_score.png").exists()
    assert "beta=1" in (a / "plots/comparison/scores.md").read_text()
    assert plotter.main(["--output_dir", str(a), str(b), "--plots_dir", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both/report.html").exists() and (tmp_path / "both/train_score.png").exists()


def test_the_mean_of_equal_seeds_lies_in_their_range():
    """The mean was once rounded to less than the lowest of three seeds, which errorbar refused."""
    steps = np.arange(200)
    curves = [(steps, 0.1 + steps / 997)] * 3
    _, mean, low, high = plotter.mean_and_range(curves)
    assert (low <= mean).all() and (mean <= high).all()


def test_runs_of_different_lengths_share_a_chart(tmp_path):
    a, b = (make_run(tmp_path / str(n), steps=n, eval_steps=2, eval_size=3, seed=n) for n in (4, 8))
    steps, mean, low, high = plotter.mean_and_range(
        [report.series(r.train, "reward") for r in settings_of(a, b)[0].runs]
    )
    assert steps.tolist() == list(range(1, 9)) and (low <= mean).all() and (mean <= high).all()
    assert (low[4:] == high[4:]).all()  # only one run is left there


# ---- broken and unfinished folders


def test_a_cut_off_log_is_drawn_with_a_warning(tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=5, eval_steps=5, eval_size=3)
    path = run / "train_logs.json"
    text = path.read_text()
    assert len(report.read_run(run).train) == 5 and capsys.readouterr().err == ""
    path.write_text(text[: text.rindex("{") + 40])
    assert len(line(charts_of(run)["train_score"].axes[0], "training")) == 4
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and str(path) in warning and "4 records" in warning


def test_what_is_not_a_run_is_refused_in_one_line(tmp_path, capsys):
    assert "no such folder" in refusal(capsys, "--output_dir", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is not a run" in refusal(capsys, "--output_dir", tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    assert "no such folder" in refusal(capsys, "--output_dir", tmp_path / "file")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.json").write_text("{}")
    assert "no records" in refusal(capsys, "--output_dir", tmp_path / "begun")
    run = make_run(tmp_path / "run", steps=2, eval_steps=2, eval_size=2)
    assert "cannot write" in refusal(capsys, "--output_dir", run, "--plots_dir", tmp_path / "file")
    assert list((tmp_path / "empty").iterdir()) == [] and not (run / "report.html").exists()


def test_a_run_without_evaluations_is_drawn(tmp_path):
    run = make_run(tmp_path / "run", steps=3, eval_steps=3, eval_size=2)
    for path in (run / "eval_logs").glob("*.json"):
        path.unlink()
    assert samples_in(write_report(run)) and task_charts_of(run) == {}
    assert charts_of(run)["eval_score"].get_suptitle() == "Mean error over training (no evaluation so far)"
    assert report.summarize(settings_of(run)[0])["before"] == "–"


@pytest.mark.slow
def test_an_evaluation_alone_is_drawn(tmp_path):
    run = make_run(tmp_path / "run", "arithmetic", steps=0, eval_steps=1, eval_size=4)
    (run / "train_logs.json").unlink()
    charts = charts_of(run)
    assert "eval_score" in charts and "train_score" not in charts
    assert len(samples_in(write_report(run))["runs"][0]["pages"]) == 1 and task_charts_of(run) == {}


def test_damaged_files_are_left_out_with_a_warning(tmp_path, capsys, one_chart):
    run = make_run(tmp_path / "run", "correlation", steps=4, eval_steps=2, eval_size=3)
    damage = {"config.json": "{", "eval_logs/metrics_000002.json": "", "eval_logs/samples_000004.json": '{"groups": [{',
              "train_samples/step_000001.json": "[" * 100_000}  # fmt: skip
    for name, content in damage.items():
        (run / name).write_text(content)
    assert plotter.main(["--output_dir", str(run)]) == 0
    warnings = capsys.readouterr().err
    assert all(f"{name} is damaged" in warnings for name in damage)
    assert [r["step"] for r in report.read_run(run).evals] == [0, 4]


@pytest.mark.slow
def test_samples_with_missing_fields_are_shown(tmp_path, one_chart):
    run = make_run(tmp_path / "run", steps=2, eval_steps=2, eval_size=2)
    rewrite(run / "train_samples/step_000001.json", lambda content: {"groups": [{}, {"completions": [{}]}]})
    rewrite(
        run / "eval_logs/samples_000000.json", lambda content: {"groups": [{"answer": "01:00:00", "completions": []}]}
    )
    assert plotter.main(["--output_dir", str(run)]) == 0 and task_charts_of(run)


@pytest.mark.slow
def test_names_in_other_encodings_are_drawn(tmp_path, one_chart):
    """A folder name that is not UTF-8, and a metric and a flag with a lone surrogate or an escape code."""
    run = make_run(
        tmp_path / os.fsdecode(b"caf\xe9\x1b[2J"), steps=2, eval_steps=2, eval_size=2, **{"a\ud800": "b\udfff"}
    )
    rewrite(run / "train_logs.json", lambda records: [{**r, "odd\ud800\x1b": r["step"]} for r in records])
    assert plotter.main(["--output_dir", str(run)]) == 0
    assert plotter.png_of(plotter.draw_panels("Other", ["odd\ud800\x1b"], settings_of(run)))
    assert b"\x1b" not in (run / "report.html").read_bytes()


# ---- the report


def packed_in(page):
    return re.search(rb'id="samples-data">(.*?)</script>', page)[1]


def samples_in(page):
    return json.loads(gzip.decompress(base64.b64decode(packed_in(page))))


def write_report(folder):
    settings = settings_of(folder)
    return report.write_report(settings, {}, [report.summarize(setting) for setting in settings])


def test_the_report_of_a_small_run_is_complete(tmp_path):
    run = make_run(tmp_path / "run", "correlation", steps=5, eval_steps=5, eval_size=3)
    page = write_report(run)
    samples = samples_in(page)
    assert [(p["kind"], p["step"]) for p in samples["runs"][0]["pages"]] == [("eval", 0), ("eval", 5), *(
        ("train", step) for step in range(1, 6))]  # fmt: skip
    assert len(samples["prompts"]) == 1 and len(samples["pictures"]) == 3 + 5 * 2  # each stored once
    rewards = [row[1] for row in samples["runs"][0]["pages"][2]["groups"][0][5]]
    assert rewards == sorted(rewards, reverse=True) and len(rewards) == 8
    assert not re.search(rb"""(src|href)\s*=\s*["']?(https?:)?//|url\(|@import|fetch\(""", page)


@pytest.mark.slow
def test_a_large_run_is_thinned_but_keeps_first_and_last(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", "clock", steps=40, eval_steps=10, eval_size=6)
    page_alone = len(write_report(run)) - len(packed_in(write_report(run)))
    monkeypatch.setattr(report, "PACKED_BUDGET", len(packed_in(write_report(run))) // 3)
    page = write_report(run)
    pages = samples_in(page)["runs"][0]["pages"]
    steps = {kind: [p["step"] for p in pages if p["kind"] == kind] for kind in ("eval", "train")}
    assert {0, 40} <= set(steps["eval"]) and {1, 40} <= set(steps["train"]) and 3 < len(steps["train"]) < 20
    assert len(page) <= report.PACKED_BUDGET + page_alone
    monkeypatch.setattr(report, "UNPACKED_BUDGET", 30_000)
    page = write_report(run)
    assert len(page) <= 30_000 + page_alone and {p["of"] for p in samples_in(page)["runs"][0]["pages"]} == {2, 6}


def test_long_completions_keep_both_ends():
    text = "a" * 50_000 + "<answer>\n7\n</answer>"
    short = report.shorten(text)
    assert len(short) < 9_000 and short.startswith("aaaa") and short.endswith("<answer>\n7\n</answer>")
    assert report.shorten("brief") == "brief"


def test_pictures_outside_the_run_are_left_out(tmp_path):
    run = make_run(tmp_path / "run", "clock", steps=1, eval_steps=1, eval_size=1)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "secret.png")
    for name in ("../../secret.png", str(tmp_path / "secret.png"), "images/missing.png"):
        rewrite(
            run / "train_samples/step_000001.json", lambda content, name=name: content["groups"][0].update(image=name)
        )
        assert [g[2] is None for p in samples_in(write_report(run))["runs"][0]["pages"][2:] for g in p["groups"]] == [
            True, False]  # fmt: skip


@given(st.text(st.characters() | st.sampled_from("\x1b\x00\r\n\t\u202e\u2066\ud800\x9b<&")))
def test_control_characters_are_neutralized(text):
    shown = report.visible(text)
    assert report.visible(shown) == shown
    shown.encode()  # raises for a lone surrogate
    assert not set(shown) & {
        *map(chr, range(9)),
        *map(chr, range(11, 32)),
        *map(chr, range(127, 160)),
        "\u202e",
        "\u2066",
    }
    written = report.to_json({"text": shown})
    assert "<" not in written and json.loads(written)["text"] == shown


# ---- the command


@pytest.mark.slow
def test_torch_is_not_needed(tmp_path):
    run = make_run(tmp_path / "run", steps=2, eval_steps=2, eval_size=2)
    code = (
        "import sys; sys.modules['torch'] = None; import plotter; sys.exit(plotter.main(['--output_dir', sys.argv[1]]))"
    )
    assert subprocess.run([sys.executable, "-c", code, run], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    code = "import sys, plotter; sys.exit('matplotlib' in sys.modules)"  # --help answers at once
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["module://a.notebook", "nonsense"])
def test_a_foreign_matplotlib_configuration_is_not_read(tmp_path, backend):
    """A notebook's MPLBACKEND, and a matplotlibrc in the working directory that cannot even be decoded."""
    run = make_run(tmp_path / "run", steps=2, eval_steps=2, eval_size=2)
    (tmp_path / "matplotlibrc").write_bytes(b"text.usetex: True\nsavefig.bbox: tight\nno colon\nfont.family: \xff\n")
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import plotter
plotter.metric_charts = lambda settings: [("reward", plotter.draw_panels("A", ["reward"], settings))]
sys.exit(plotter.main(["--output_dir", "run", "--no_report"]))"""
    environment = {**os.environ, "MPLBACKEND": backend, "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open(run / "plots/reward.png") as chart:
        assert chart.size == (1200, 675)


def test_a_notebooks_matplotlib_settings_are_reset():
    """In a process that has loaded matplotlib with its configuration."""
    import matplotlib

    plain = plotter.png_of(plotter.new_figure("Title"))
    settings = {"text.usetex": True, "savefig.bbox": "tight", "savefig.dpi": 40, "font.family": "no such font",
                "axes.prop_cycle": matplotlib.cycler(color=["red"]), "figure.facecolor": "black"}  # fmt: skip
    matplotlib.rcParams.update(settings)
    assert plotter.png_of(plotter.new_figure("Title")) == plain


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "shift_jis"])
def test_a_terminal_that_is_not_utf8_gets_replaced_characters(tmp_path, monkeypatch, one_chart, encoding):
    run = make_run(tmp_path / "実行 – run", steps=2, eval_steps=2, eval_size=2)
    for path in (run / "eval_logs").glob("*.json"):
        path.unlink()  # the score of a run without evaluations is "–"
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding, errors="strict"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict"))
    assert plotter.main(["--output_dir", str(run)]) == 0
    assert plotter.main(["--output_dir", str(tmp_path / "実行 –")]) == 2
    sys.stdout.flush()
    assert b"report.html" in printed.getvalue() and (run / "report.html").exists()
    assert "–" in (run / "plots/scores.md").read_text(encoding="utf-8")


def test_watching_redraws_when_a_record_arrives(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", steps=3, eval_steps=3, eval_size=2)
    log, drawn, moments = run / "train_logs.json", [], []
    whole = log.read_text()
    log.write_text(whole[: whole.rindex(",\n")] + "\n]\n")  # two of its three records

    def sleep(seconds):
        moments.append(seconds)
        if len(moments) == 2:
            log.write_text(whole)
        if len(moments) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(plotter.time, "sleep", sleep)
    monkeypatch.setattr(plotter, "draw", lambda folders, *_: drawn.append(len(report.read_run(folders[0]).train)))
    assert plotter.main(["--output_dir", str(run), "--watch", "7"]) == 0
    assert drawn == [2, 3] and moments == [7] * 4  # once at the start, once for the new record

    for path in (*run.glob("eval_logs/*.json"), log):
        path.unlink()
    moments.clear()
    assert plotter.main(["--output_dir", str(run), "--watch"]) == 0  # waits for the first record
    assert drawn == [2, 3, 3] and "no records" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("no"), RuntimeError("two\nlines")])
def test_an_unexpected_error_is_one_line(error, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(plotter, "draw", fail)
    monkeypatch.delenv("GRPO_TRACEBACK", raising=False)
    assert plotter.main(["--output_dir", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and type(error).__name__ in lines[0]
    monkeypatch.setenv("GRPO_TRACEBACK", "1")
    with pytest.raises(type(error)):
        plotter.main(["--output_dir", str(tmp_path)])
