"""Draws charts and a report of what a run logged. Needs neither torch nor the model.

    python plotter.py --output_dir runs/first                 # charts in runs/first/plots, and runs/first/report.html
    python plotter.py --output_dir runs/a runs/b runs/c       # overlaid, named by the flags that differ
    python plotter.py --output_dir runs/first --watch         # draws again when there are new records

Every number in the logs is drawn. The tables below give known metrics a title and a unit. A metric missing there gets a
panel under its name, in `task_metrics.png` if evaluations report it, else in `other.png`. Runs that differ only in the
seed become one curve with a band. Runs in progress and logs that were cut off are drawn as far as they reach.
"""

import argparse
import contextlib
import io
import math
import os
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from answers import clock_seconds
from evaluator import clock_error_minutes
from progress import format_value, make_output_safe
from report import (
    NotARun,
    NothingLogged,
    Run,
    Setting,
    changes,
    is_number,
    parse_number,
    print_error,
    read_run,
    scores_markdown,
    series,
    settings_of,
    summarize,
    visible,
    write_report,
)
from run_folder import CONFIG, LOG, METRICS, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# ---------------------------------------------------------------------------------------------------------------------
# Metrics: plain titles and units

NOT_A_METRIC = {"step", "epoch", "num_examples"}
EVAL_NAME = {"reward": "avg_reward"}  # a metric's name in training -> its name in evaluations
TITLES = {  # metric -> title, unit; "%" is a share in [0, 1], drawn times 100
    "reward": ("Training reward", "points"),
    "avg_reward": ("Mean reward", "points"),
    "reward_std": ("Spread of the rewards", "points"),
    "zero_std_fraction": ("Groups whose rewards are all equal", "%"),
    "overlong_penalty": ("Penalty for overlong completions", "points"),
    "loss": ("Loss", ""),
    "grad_norm": ("Gradient norm before clipping", ""),
    "learning_rate": ("Learning rate", ""),
    "kl": ("KL from the reference model", "nats/token"),
    "entropy": ("Entropy of the policy", "nats/token"),
    "clip_fraction": ("Tokens clipped", "%"),
    "ratio": ("Mean probability ratio, new to old", ""),
    "sampler_logp_diff": ("Sampler and trainer differ by", "nats"),
    "completion_length": ("Completion length", "tokens"),
    "truncated_fraction": ("Completions cut off", "%"),
    "skipped_prompts": ("Prompts left out, too long", ""),
    "skipped_steps": ("Steps skipped, not finite", ""),
    "seconds": ("One evaluation", "s"),
    "seconds/total": ("One step", "s"),
    "tokens": ("Tokens in a step", "tokens"),
    "tokens_per_second": ("Speed", "tokens/s"),
    "peak_memory_gb": ("Peak memory", "GB"),
    "last_error": ("Error of the last answer", ""),
    "improved": ("Last answer nearer than the first", "%"),
    "harmed": ("Last answer farther than the first", "%"),
    "copied": ("Last answer the same as the first", "%"),
}
BASELINES = {"last_error": ("first_error", "first answer")}  # metric -> the metric drawn with it, and its label
UNITS = {r"fraction|accuracy|within|share|@": "%", r"_minutes$": "min", r"^seconds": "s", r"_gb$": "GB",
         r"^rewards/": "points"}  # fmt: skip
CHARTS = {  # charts of several panels: file name -> title, metrics
    "rewards": ("Reward by component", [r"rewards/.*"]),
    "task_metrics": ("Metrics of the task", []),  # all others in evaluations
    "feedback": ("The first and the last answer", ["first_error", "last_error", "improved", "harmed", "copied"]),
    "turns": ("Turns", ["turns", "invalid_turns", "observation_tokens", "seconds/environment", "seconds/reread"]),
    "optimization": ("Optimization", ["loss", "grad_norm", "learning_rate", "skipped_steps"]),
    "policy": ("How the policy moves", ["kl", "entropy", "clip_fraction", "ratio", "sampler_logp_diff"]),
    "completions": ("Completions and groups",
                    ["completion_length", "truncated_fraction", "overlong_penalty", "zero_std_fraction", "reward_std",
                     "skipped_prompts"]),
    "time": ("Where the time goes", [r"seconds(/.*)?", "tokens", "tokens_per_second", "peak_memory_gb"]),
    "other": ("Other metrics", []),
}  # fmt: skip


def title_and_unit(key: str, headline: dict) -> tuple[str, str]:
    """A metric's title and unit. `headline` describes the task's headline metric if `key` is that metric, else {}."""
    if key in TITLES:
        return TITLES[key]
    unit = next((unit for pattern, unit in UNITS.items() if re.search(pattern, key)), "")
    words = re.sub(r"_fraction$" if key.startswith("within") else r"_(fraction|minutes)$", "", key.split("/")[-1])
    words = headline.get("label") or words.replace("_", " ").replace(" abs ", " absolute ").replace(
        " 1 minutes", " 1 minute"
    )
    return visible(words[:1].upper() + words[1:]), headline.get("unit", unit)


def found_metrics(records: list[dict]) -> list[str]:
    """Every key with a finite number in some record, in order of appearance, without the ends of intervals."""
    keys = dict.fromkeys(k for record in records for k, v in record.items() if is_number(v) and k not in NOT_A_METRIC)
    return [key for key in keys if re.sub(r"_(low|high)$", "", key) == key or key.rsplit("_", 1)[0] not in keys]


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """(N,) -> (N,) centred moving average over at most `window` values.

    At value i of N it takes at most i // 2 values on each side and none beyond the last, as many on both. So it keeps a
    straight line straight, up to its ends, and does not flatten the first steps, in which a run learns fastest.
    """
    index = np.arange(len(values))
    half = np.minimum(np.minimum(window // 2, index // 2), len(values) - 1 - index)  # (N,)
    sums = np.concatenate([[0.0], np.cumsum(values)])  # (N + 1,)
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def smoothing_window(settings: list[Setting]) -> int:
    """Steps to average over: a fifteenth of the longest run, odd so that the average is centred."""
    return max(len(run.train) for setting in settings for run in setting.runs) // 15 | 1


def mean_and_range(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
    """(steps, mean, lowest, highest) of curves (steps, values), over those that have a value at each step."""
    steps = np.unique(np.concatenate([s for s, _ in curves]))
    table = np.full((len(curves), len(steps)), np.nan)  # (curves, steps)
    for row, (s, values) in zip(table, curves, strict=True):
        row[np.searchsorted(steps, s)] = values
    low, high = np.nanmin(table, 0), np.nanmax(table, 0)
    return steps, np.nanmean(table, 0).clip(low, high), low, high  # rounding can move the mean of equal values


# ---------------------------------------------------------------------------------------------------------------------
# Charts

STYLE = {
    "font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "figure.titlesize": 13, "figure.titleweight": "bold", "legend.frameon": False, "lines.linewidth": 1.8,
    "lines.markersize": 5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "axes.axisbelow": True, "text.parse_math": False, "figure.dpi": 150, "pdf.fonttype": 42,
}  # fmt: skip
# Okabe and Ito's palette, told apart by colour-blind readers; dashes and markers tell lines apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX"
GREY, BEFORE, AFTER = "#666666", "#E69F00", "#0072B2"


def load_matplotlib() -> None:
    """Imports matplotlib with its default settings and STYLE.

    MPLBACKEND or a matplotlibrc that was made for something else (a notebook, LaTeX labels) must not stop a chart.
    matplotlib reads both when it is imported, and the matplotlibrc of the working directory before all others."""
    if "matplotlib" not in sys.modules:  # imported here, so that --help and refusals do not wait for it
        os.environ["MPLBACKEND"] = "agg"
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            Path("matplotlibrc").touch()
            import matplotlib
    else:
        import matplotlib
    matplotlib.rcParams.update(matplotlib.rcParamsDefault)
    matplotlib.rcParams.update(STYLE)


def new_figure(title: str, height: float = 4.5) -> "Figure":
    """An empty figure of 8 x `height` inches, 150 dots an inch."""
    load_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def draw_training(ax: "Axes", key: str, setting: Setting, style: tuple, scale: float, window: int, alone: bool) -> None:
    """One setting's training curve: the smoothed mean, over the values of each step or the range of several seeds."""
    curves = [curve for run in setting.runs if len((curve := series(run.train, key))[0])]
    if not curves:
        return
    colour, dashes, marker = style
    steps, mean, low, high = mean_and_range([(s, smooth(values, window) * scale) for s, values in curves])
    if len(curves) > 1:
        ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    elif window > 1:
        ax.plot(curves[0][0], curves[0][1] * scale, color=colour, alpha=0.25, linewidth=0.8,
                label="each step" if alone else None)  # fmt: skip
    label = setting.name if not alone else f"training, mean of up to {window} steps" if window > 1 else "training"
    ax.plot(steps, mean, color=colour, linestyle=dashes, marker=marker if len(steps) == 1 else None, label=label)


def draw_evaluations(
    ax: "Axes", key: str, setting: Setting, style: tuple, scale: float, alone: bool, training: bool
) -> None:
    """One setting's evaluations as points, with the logged interval or the range of several seeds."""
    curves = [curve for run in setting.runs if len((curve := series(run.evals, key))[0])]
    if not curves:
        return
    colour, dashes, marker = style
    steps, mean, low, high = mean_and_range([(s, values * scale) for s, values in curves])
    ends = [series(setting.runs[0].evals, f"{key}_{end}") for end in ("low", "high")]
    interval = len(curves) == 1 and all(len(s) == len(steps) for s, _ in ends)
    if interval:
        low, high = (values * scale for _, values in ends)
    if (high > low).any():
        ax.errorbar(steps, mean, (mean - low, high - mean), color=colour, capsize=2, elinewidth=1, linestyle="none")
    label = (
        f"evaluation{' with its 95 % interval' if interval else ''}" if alone else None if training else setting.name
    )
    ax.plot(steps, mean, color=colour, marker=marker, linewidth=1, linestyle=":" if training else dashes, label=label)
    if alone and not training:  # the values of the first and the last point
        for i, side, offset in ((0, "left", 7), (-1, "right", -7))[: len(steps)]:
            ax.annotate(f"{mean[i]:.3g}", (steps[i], mean[i]), (offset, 6), textcoords="offset points", ha=side,
                        bbox={"color": "white", "alpha": 0.75, "pad": 0.5})  # fmt: skip


def draw_panel(ax: "Axes", key: str, settings: list[Setting], training: bool = True) -> None:
    """One metric of all runs: training, evaluations, and the score of guessing if it is known."""
    owner = next((setting.runs[0] for setting in settings if setting.runs[0].headline["metric"] == key), None)
    headline, best_constant = (owner.headline, owner.task.get("best_constant")) if owner else ({}, None)
    title, unit = title_and_unit(key, headline)
    scale, window, alone = 100 if unit == "%" else 1, smoothing_window(settings), len(settings) == 1
    for i, setting in enumerate(settings):
        style = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)]
        if training:
            draw_training(ax, key, setting, style, scale, window, alone)
        points = (COLOURS[1], "-", "o") if alone else style
        draw_evaluations(ax, EVAL_NAME.get(key, key), setting, points, scale, alone, training)
    if alone and key in BASELINES:
        draw_baseline(ax, *BASELINES[key], settings[0], scale, window)
    values = np.concatenate([line.get_ydata() for line in ax.lines])
    draw_reference_lines(ax, headline, best_constant, scale)
    if values.min() > 0 and values.max() > 100 * np.median(values):
        ax.set_yscale("log")  # or one outlier would flatten the curve
    elif values.min() >= 0 and not 0.02 < np.ptp(values) / max(values.max(), 1e-30) < 0.7:
        highest = max(max(line.get_ydata()) for line in ax.lines)  # with the score of guessing
        ax.set_ylim(bottom=0, top=1.25 * highest or 1)  # from 0, for nearly constant values and for large changes
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}" if abs(value) >= 1e-3 else f"{value:.3g}")
    ax.set(title=title, ylabel=unit)
    ax.margins(x=0.02)


def draw_baseline(ax: "Axes", key: str, label: str, setting: Setting, scale: float, window: int) -> None:
    """A second metric in the panel of the one that it is compared with: its mean in training and in evaluations."""
    for kind, dashes, marker in (("train", "-", None), ("evals", ":", "s")):
        curves = [curve for run in setting.runs if len((curve := series(getattr(run, kind), key))[0])]
        if curves:
            smoothed = [(s, (smooth(v, window) if kind == "train" else v) * scale) for s, v in curves]
            steps, mean, _, _ = mean_and_range(smoothed)
            name = f"{label}, {'training' if kind == 'train' else 'evaluation'}"
            ax.plot(steps, mean, color=COLOURS[2], linestyle=dashes, marker=marker, label=name)


def draw_reference_lines(ax: "Axes", headline: dict, best_constant: float | None, scale: float = 1) -> None:
    """The scores of guessing and of the best constant answer; one line if they are equal."""
    levels = {headline.get("chance"): "guessing"}
    levels.setdefault(best_constant, "best constant answer")
    for level, name in levels.items():
        if is_number(level):
            ax.axhline(level * scale, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
            ax.annotate(f"{name}: {format_value(level, headline.get('unit', ''))}", (0.995, level * scale), (0, 3),
                        xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=9,
                        bbox={"color": "white", "alpha": 0.75, "pad": 0.5})  # fmt: skip


def draw_panels(title: str, keys: list[str], settings: list[Setting], training: bool = True) -> "Figure":
    """A figure with a panel for each metric that changes, two in a row, and one legend for all."""
    constants = {key: value for key in keys if (value := constant_value(key, settings)) is not None and len(keys) > 1}
    keys = [key for key in keys if key not in constants] or keys[:1]
    columns = min(2, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = new_figure(title, height=4.5 if columns == 1 else 1 + 2.4 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for ax, key in zip(axes, keys, strict=False):
        draw_panel(ax, key, settings, training)
        ax.xaxis.set_tick_params(labelbottom=True)
    for ax in axes[len(keys) :]:  # the last of an odd number of panels takes the place of both
        axes[len(keys) - 1].set_subplotspec(ax.get_subplotspec().get_gridspec()[-1, :])
        ax.remove()
    for ax in axes[len(keys) - columns : len(keys)]:
        ax.set_xlabel("optimizer step")
    if len(keys) == 1 and not constants:
        axes[0].set_title("")  # the figure has the same title
    if len(settings) > 1 and training:
        axes[0].plot([], [], color=GREY, linestyle=":", marker=".", label="evaluation")
    if any(len(setting.runs) > 1 for setting in settings):
        axes[0].fill_between([], [], color=GREY, alpha=0.3, label="from the lowest to the highest seed")
    remarks = [f"{title_and_unit(key, {})[0]}: always {value}" for key, value in constants.items()]
    add_legend(figure, axes[: len(keys)], textwrap.fill("; ".join(remarks), 110))
    return figure


def constant_value(key: str, settings: list[Setting]) -> str | None:
    """The value of a metric, as text, if it is the same in all records of all runs; else None."""
    runs = [run for setting in settings for run in setting.runs]
    values = np.concatenate(
        [series(run.train, key)[1] for run in runs] + [series(run.evals, EVAL_NAME.get(key, key))[1] for run in runs]
    )
    if np.ptp(values) > 1e-9 * np.abs(values).max():
        return None
    unit = title_and_unit(key, {})[1]
    return f"{values[0] * (100 if unit == '%' else 1):.4g} {unit}".rstrip()


def add_legend(figure: "Figure", axes: list["Axes"], remark: str = "") -> None:
    """One legend under the figure, with each label of its panels once; `remark` is the legend's title."""
    legends = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes]
    entries = {textwrap.fill(label, 90): handle for legend in legends for handle, label in legend}
    if entries:
        columns = max(1, min(4, 100 // max(len(label) + 8 for label in entries)))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=9,
                      title=remark or None, title_fontsize=9)  # fmt: skip


def draw_time(run: Run, phases: list[str], others: list[str]) -> "Figure":
    """The seconds of a step, stacked by phase, and the other metrics of time and memory."""
    setting = Setting("", [run])
    figure = draw_panels(CHARTS["time"][0], ["seconds/total", *others], [setting])
    ax, window = figure.axes[0], smoothing_window([setting])
    for line in list(ax.lines):
        line.remove()
    seconds = [[r[k] if is_number(r.get(k)) else 0.0 for r in run.train] for k in phases]  # (phases, steps)
    hatches = [("", "//", "..", "\\\\", "xx", "--")[i % 6] for i in range(len(phases))]
    ax.stackplot([r["step"] for r in run.train], [smooth(np.array(row), window) for row in seconds], colors=COLOURS,
                 labels=[phase.split("/", 1)[1] for phase in phases], alpha=0.8, hatch=hatches)  # fmt: skip
    ax.legend(fontsize=8, loc="upper left", ncols=3, columnspacing=1, handlelength=1.5)
    ax.set(title="One step, phase by phase", ylim=(0, 1.45 * np.sum(seconds, 0).max()))
    return figure


def metric_charts(settings: list[Setting]) -> Iterator[tuple[str, "Figure"]]:
    """Yields (file name, figure) for all metrics in the logs."""
    runs = [run for setting in settings for run in setting.runs]
    trained = found_metrics([record for run in runs for record in run.train])
    evaluated = found_metrics([record for run in runs for record in run.evals])
    headlines = {run.headline["metric"]: run.headline for run in runs}

    if "reward" in trained:
        yield "train_score", draw_panels("Training reward", ["reward"], settings)
    scores = [key for key in headlines if key in evaluated or key in trained]
    if scores:
        names = " and ".join(dict.fromkeys(title_and_unit(key, headlines[key])[0] for key in scores))
        when = "over training" if set(scores) & set(evaluated) else "over training (no evaluation so far)"
        yield "eval_score", draw_panels(f"{names} {when}", scores, settings)
    for key in dict.fromkeys([*headlines, "avg_reward"]):
        if key in evaluated:
            title = f"{title_and_unit(key, headlines.get(key, {}))[0]} in evaluation"
            yield f"evaluation_{slug(key)}", draw_panels(title, [key], settings, training=False)

    keys_of = {chart: [] for chart in CHARTS}
    for key in dict.fromkeys([*trained, *evaluated]):
        if key not in ("reward", "avg_reward", *headlines):
            known = [chart for chart, (_, patterns) in CHARTS.items() if any(re.fullmatch(p, key) for p in patterns)]
            keys_of[known[0] if known else "task_metrics" if key in evaluated else "other"].append(key)
    if len(settings) == 1:  # one panel holds a metric and its baseline
        for metric, (baseline, _) in BASELINES.items():
            keys_of = {c: [k for k in keys if k != baseline or metric not in keys] for c, keys in keys_of.items()}
    for chart, keys in keys_of.items():
        phases = [key for key in keys if key.startswith("seconds/") and key != "seconds/total"]
        if chart == "time" and len(runs) == 1 and phases and "seconds/total" in keys:
            yield chart, draw_time(runs[0], phases, [key for key in keys if not key.startswith("seconds/")])
        elif keys:
            yield chart, draw_panels(CHARTS[chart][0], keys, settings)


def slug(text: str) -> str:
    """`text` as a part of a file name: lower-case ASCII letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:80]


# ---------------------------------------------------------------------------------------------------------------------
# Charts of a task: evaluations before and after training, chosen by the form of the answers (see TASK_CHARTS)


def before_and_after(run: Run) -> dict[str, list[dict]]:
    """{"before, step 0": groups, "after, step 500": groups}, or one entry if there is only one evaluation."""
    files = list(run.sample_files("eval").items())
    found = {step: groups for step, path in dict(files[:1] + files[-1:]).items() if (groups := run.read_samples(path))}
    names = ("before", "after") if len(found) == 2 else ("evaluation",)
    return {f"{name}, step {step}": groups for name, (step, groups) in zip(names, found.items(), strict=False)}


def pairs(groups: list[dict], parse: Callable[[object], float | None]) -> list[tuple[float | None, float | None]]:
    """(right answer, prediction) of each example's first completion; None for a prediction that cannot be parsed."""
    return [(parse(g["answer"]), parse(g["completions"][0]["prediction"])) for g in groups if g["completions"]]


def draw_true_against_predicted(run: Run, evaluations: dict[str, list[dict]]) -> Iterator[tuple[str, "Figure"]]:
    """Predicted numbers over the right ones, before and after training."""
    figure = new_figure(f"{str(run.task.get('name', 'answers')).capitalize()}: predicted against true", height=4.6)
    axes = figure.subplots(1, len(evaluations), squeeze=False, sharex=True, sharey=True).flat
    for ax, (name, groups), colour, marker in zip(axes, evaluations.items(), (BEFORE, AFTER), "so", strict=False):
        points = pairs(groups, parse_number)
        true, predicted = np.array([p for p in points if p[1] is not None], dtype=float).reshape(-1, 2).T
        ends = [f(t for t, _ in points) for f in (min, max)]
        ax.plot(ends, ends, color=GREY, linestyle="--", linewidth=1, label="perfect")
        ax.scatter(true, predicted, s=20, color=colour, marker=marker, alpha=0.6, edgecolors="none")
        lines = [f"{len(true)} of {len(points)} readable"]
        if len(true):
            lines.append(f"their mean error {np.abs(true - predicted).mean():.3g}")
        if len(true) > 2 and min(np.ptp(true), np.ptp(predicted)) > 0:
            lines.append(f"r = {np.corrcoef(true, predicted)[0, 1]:.2f}")
        ax.text(0.98, 0.03, "\n".join(lines), transform=ax.transAxes, ha="right", fontsize=9,
                bbox={"color": "white", "alpha": 0.75, "pad": 1})  # fmt: skip
        ax.set(title=name[:1].upper() + name[1:], xlabel="true", box_aspect=1)
    figure.axes[0].set_ylabel("predicted")
    figure.axes[0].legend(loc="upper left")
    yield slug(str(run.task.get("name", "predicted"))), figure


def draw_clocks(run: Run, evaluations: dict[str, list[dict]]) -> Iterator[tuple[str, "Figure"]]:
    """The mean error at each hour, and some dials with the right and the predicted hands."""
    figure = new_figure("Clock error by the hour on the dial")
    ax, width = figure.subplots(), 0.8 / len(evaluations)
    styles = ({"color": BEFORE, "hatch": "//", "edgecolor": "white"}, {"color": AFTER})
    for i, ((name, groups), style) in enumerate(zip(evaluations.items(), styles, strict=False)):
        times = pairs(groups, clock_seconds)
        by_hour = [[clock_error_minutes(t, p) for t, p in times if t // 3600 == hour] for hour in range(12)]
        ax.bar(np.arange(12) - 0.4 + width * (i + 0.5), [np.mean(errors) if errors else 0 for errors in by_hour],
               width, label=f"{name} ({len(times)} clocks)", **style)  # fmt: skip
    draw_reference_lines(ax, run.headline, None)
    ax.set(xlabel="hour", ylabel="mean error, min", xticks=range(12), xticklabels=[12, *range(1, 12)])
    ax.grid(axis="x", visible=False)
    add_legend(figure, [ax])
    yield "clock_error_by_hour", figure

    name, groups = list(evaluations.items())[-1]
    times = sorted(pairs(groups, clock_seconds), key=lambda pair: clock_error_minutes(*pair))
    chosen = [times[round(i)] for i in np.linspace(0, len(times) - 1, min(10, len(times)))]
    figure = new_figure(f"Test clocks, from the smallest error to the largest ({name})", height=4.6)
    axes = list(figure.subplots(2, 5).flat)
    for ax, (true, predicted) in zip(axes, chosen, strict=False):
        draw_dial(ax, true, predicted)
    for ax in axes[len(chosen) :]:
        ax.remove()
    add_legend(figure, figure.axes)
    yield "clock_sheet", figure


def draw_dial(ax: "Axes", true: int, predicted: int | None) -> None:
    """A dial with the hands of two times, in seconds since twelve, and the error in minutes above it."""
    turn = np.linspace(0, 2 * np.pi, 97)
    ax.plot(np.sin(turn), np.cos(turn), color=GREY, linewidth=1)
    ticks = np.stack([np.sin(turn[:-1:8]), np.cos(turn[:-1:8])])  # (2, 12)
    ax.plot(*np.stack([0.9 * ticks, ticks], axis=1), color=GREY, linewidth=1)
    hands = (("true hands", true, "black", "-", 1.0), ("predicted hands", predicted, COLOURS[1], (0, (3, 1)), 0.8))
    for label, seconds, colour, dashes, thickness in hands:
        for period, length, width in ((43200, 0.5, 4), (3600, 0.8, 2.4), (60, 0.88, 1)):  # hour, minute, second
            if seconds is not None:
                angle = 2 * np.pi * (seconds % period) / period
                ax.plot([0, length * np.sin(angle)], [0, length * np.cos(angle)], color=colour, linestyle=dashes,
                        linewidth=width * thickness, label=label if period == 3600 else None)  # fmt: skip
    shown = [f"{s // 3600 or 12}:{s // 60 % 60:02d}:{s % 60:02d}" for s in (true, predicted) if s is not None]
    error = "unreadable" if predicted is None else f"off by {format_value(clock_error_minutes(true, predicted), 'min')}"
    ax.set_title(f"{' → '.join(shown)}\n{error}", fontsize=9, loc="center", fontweight="normal")
    ax.set_aspect("equal")
    ax.axis("off")


def draw_changes(run: Run, evaluations: dict[str, list[dict]]) -> Iterator[tuple[str, "Figure"]]:
    """How many answers changed from wrong to right and from right to wrong, with examples."""
    if len(evaluations) < 2:
        return
    changed = changes(*evaluations.values())
    lists = {f"From {name.replace(' → ', ' to ')}": changed[name] for name in list(changed)[:2]}
    blocks = {f"{title}, {min(4, len(examples))} of {len(examples)}": "\n\n".join(map(change_text, examples[:4]))
              for title, examples in lists.items() if examples}  # fmt: skip
    heights = [1, *(0.3 + 0.19 * (text.count("\n") + 1) for text in blocks.values())]
    figure = new_figure(f"Changes by training: {' → '.join(evaluations)}", height=1.3 + sum(heights))
    bar, *axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False).flat
    left, styles = 0, ((AFTER, ""), (COLOURS[1], "//"), ("#999999", ""), ("#dddddd", ".."))
    for (name, examples), (colour, hatch) in zip(changed.items(), styles, strict=True):
        count = len(examples)
        bar.barh(0, count, left=left, color=colour, hatch=hatch, edgecolor="white", label=f"{name}: {count}")
        left += count
    bar.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=9, columnspacing=1.2)
    bar.set(yticks=[], xlabel="test examples", xlim=(0, max(left, 1)))
    bar.grid(False)
    for ax, (title, text) in zip(axes, blocks.items(), strict=True):
        ax.set_title(title)
        ax.text(0, 1, text, va="top", fontsize=9, linespacing=1.3, transform=ax.transAxes, in_layout=False)
        ax.axis("off")
    yield "changes", figure


def change_text(example: tuple[dict, dict]) -> str:
    """The question, the answers before and after training, and the right one."""
    before, after = (prediction_text(group["completions"][0]["prediction"]) for group in example)
    question = textwrap.shorten(example[0]["prompt"].rsplit("\n\n", 1)[-1], 200, placeholder=" …")
    return f"{textwrap.fill(question, 105)}\n    {before} → {after}   (right: {example[1]['answer']})"


def prediction_text(prediction: str | float | None) -> str:
    """A prediction, short enough for a chart."""
    number = parse_number(prediction)
    if number is not None:
        return f"{number:.10g}"
    return "unreadable" if prediction is None else textwrap.shorten(str(prediction), 30)


def answers_are(parse: Callable[[object], float | None], run: Run, groups: list[dict]) -> bool:
    """Whether `parse` understands the right answers of all examples."""
    return all(parse(group["answer"]) is not None for group in groups)


# (condition on the run and its test examples, function that yields figures); the first condition that holds counts
TASK_CHARTS = (
    (partial(answers_are, clock_seconds), draw_clocks),
    (lambda run, groups: run.right_or_wrong, draw_changes),
    (partial(answers_are, parse_number), draw_true_against_predicted),
)


def task_charts(settings: list[Setting]) -> Iterator[tuple[str, "Figure"]]:
    """Yields (file name, figure) for each setting's first run; with several settings, the file name has the setting."""
    for i, setting in enumerate(settings, start=1):
        run = setting.runs[0]
        evaluations = before_and_after(run)
        examples = [example for groups in evaluations.values() for example in groups]
        charts = next((draw for fits, draw in TASK_CHARTS if examples and fits(run, examples)), None)
        for name, figure in charts(run, evaluations) if charts else ():
            if len(settings) > 1:
                figure.suptitle(textwrap.fill(f"{figure.get_suptitle()}, {setting.name}", 90), x=0.01, ha="left")
            yield name if len(settings) == 1 else f"{name}_{i}_{slug(setting.name)}", figure


# ---------------------------------------------------------------------------------------------------------------------
# The command


def png_of(figure: "Figure") -> bytes:
    """The figure as a PNG with 256 colours, a third of the size of one with all colours."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png")
    return small.getvalue()


def draw(folders: list[Path], plots_dir: Path | None, report: bool) -> None:
    """Reads the runs and writes charts, PDF, table and report.

    Raises NotARun or OSError if a folder is not a run or cannot be written to; the message says what to do.
    """
    settings = settings_of([read_run(folder) for folder in folders])
    several = len(folders) > 1
    target = plots_dir or folders[0] / ("plots/comparison" if several else "plots")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OSError(f"cannot write to {target}: {problem.strerror}; choose a folder with --plots_dir") from None
    load_matplotlib()
    from matplotlib.backends.backend_pdf import PdfPages

    charts, pdf_file = {}, io.BytesIO()
    with PdfPages(pdf_file) as pdf:
        for figures in (metric_charts(settings), task_charts(settings)):
            for name, figure in figures:
                charts[name] = (figure.get_suptitle(), png_of(figure))
                figure.set_layout_engine("none")  # the PNG has the same layout
                pdf.savefig(figure)
                write_whole(target / f"{name}.png", charts[name][1])
    write_whole(target / "charts.pdf", pdf_file.getvalue())
    summaries = [summarize(setting) for setting in settings]
    write_whole(target / "scores.md", scores_markdown(summaries).encode())
    print(scores_markdown(summaries))
    print(visible(f"{len(charts)} charts, charts.pdf and scores.md are in {target}"))
    if report:
        page = (target if plots_dir or several else folders[0]) / "report.html"
        write_whole(page, write_report(settings, charts, summaries))
        print(visible(f"the report is {page} ({page.stat().st_size / 1e6:.1f} MB)"))


def watch(folders: list[Path], seconds: float, redraw: Callable[[], None]) -> None:
    """Calls `redraw` when a log has changed, until Ctrl-C. Draws at most half of the time."""
    seen, duration = None, 0.0
    while True:
        logs = [path for folder in folders for pattern in (CONFIG, LOG, METRICS) for path in folder.glob(pattern)]
        now = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(logs)]
        if now != seen:
            seen, start = now, time.monotonic()
            try:
                redraw()
            except NothingLogged as nothing:
                print(visible(nothing))
            print(time.strftime("%H:%M:%S watching; Ctrl-C ends"), flush=True)
            duration = time.monotonic() - start
        time.sleep(max(seconds, duration))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw charts and a report of one run, or of several overlaid.")
    parser.add_argument("--output_dir", nargs="+", type=Path, required=True, metavar="RUN",
                        help="run folders written by main.py; several are overlaid and named by the flags that differ; "
                             "runs that differ only in the seed become one curve with a band")  # fmt: skip
    parser.add_argument("--plots_dir", type=Path, help="folder for charts, charts.pdf, scores.md and report.html "
                        "(default: RUN/plots, report in RUN; for several runs FIRST_RUN/plots/comparison)")  # fmt: skip
    parser.add_argument("--watch", nargs="?", type=float, const=5.0, metavar="SECONDS",
                        help="look for new records every SECONDS (default: 5) and draw again")  # fmt: skip
    parser.add_argument("--no_report", action="store_true", help="draw charts only, without report.html")
    args = parser.parse_args(argv)
    if args.watch is not None and not 0 < args.watch < math.inf:
        parser.error(f"--watch takes a number of seconds above 0, got {args.watch:g}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after an error, which is one line on stderr."""
    make_output_safe()
    args = parse_args(argv)
    folders = list(dict.fromkeys(args.output_dir))
    redraw = partial(draw, folders, args.plots_dir, not args.no_report)
    try:
        watch(folders, args.watch, redraw) if args.watch else redraw()
    except (NotARun, OSError) as problem:
        print_error(problem)
        return 2
    except KeyboardInterrupt:
        pass
    except Exception as error:
        if os.environ.get("GRPO_TRACEBACK"):
            raise
        print_error(f"{type(error).__name__}: {error} (an unexpected error; GRPO_TRACEBACK=1 shows where)")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
