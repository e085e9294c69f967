"""Charts and a report from what a run left on disk; needs neither torch nor the model.

    python plotter.py --output_dir runs/first                 # charts into runs/first/plots, and runs/first/report.html
    python plotter.py --output_dir runs/a runs/b runs/c       # overlaid, named by what differs; seeds become a band
    python plotter.py --output_dir runs/first --watch         # redraws when new records arrive

What is drawn is discovered in the logs: a metric that nobody listed here gets a panel under its own name, in
`task_metrics.png` when the evaluation reports it too, else in `other.png`; the tables below only add plainer titles and
units. Runs that are still going on, cut-off records and missing evaluations are drawn as far as they go.
"""

import argparse
import io
import math
import os
import re
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np

from report import (
    Group,
    NotARun,
    NothingLogged,
    Run,
    changes,
    group_runs,
    is_number,
    number,
    read_run,
    scores_markdown,
    series,
    summarize,
    write_report,
)

# ---------------------------------------------------------------------------------------------------------------------
# Metrics: plain titles and units

NOT_A_METRIC = {"step", "epoch", "num_examples"}
EVAL_NAME = {"reward": "avg_reward"}  # what training calls by one name and the evaluation by another
PLAIN = {  # metric -> title, unit; "%" is a share in [0, 1], drawn times 100
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
}
UNITS = {r"fraction|accuracy|within|share|@": "%", r"_minutes$": "min", r"^seconds": "s", r"_gb$": "GB",
         r"^rewards/": "points"}  # fmt: skip
CHARTS = {  # charts of several panels: file name -> title, metrics
    "rewards": ("Reward by component", [r"rewards/.*"]),
    "task_metrics": ("The task's own metrics", []),  # what else the evaluation reports
    "optimization": ("Optimization", ["loss", "grad_norm", "learning_rate", "skipped_steps"]),
    "policy": ("How the policy moves", ["kl", "entropy", "clip_fraction", "ratio", "sampler_logp_diff"]),
    "completions": ("Completions and groups",
                    ["completion_length", "truncated_fraction", "overlong_penalty", "zero_std_fraction", "reward_std",
                     "skipped_prompts"]),
    "time": ("Where the time goes", [r"seconds(/.*)?", "tokens", "tokens_per_second", "peak_memory_gb"]),
    "other": ("What else was logged", []),
}  # fmt: skip


def title_and_unit(key: str, headline: dict) -> tuple[str, str]:
    """What to call a metric on a chart. `headline` is the task's one number where `key` is that, else {}."""
    if key in PLAIN:
        return PLAIN[key]
    unit = next((unit for pattern, unit in UNITS.items() if re.search(pattern, key)), "")
    words = re.sub(r"_fraction$" if key.startswith("within") else r"_(fraction|minutes)$", "", key.split("/")[-1])
    words = headline.get("label") or words.replace("_", " ").replace(" abs ", " absolute ").replace(
        " 1 minutes", " 1 minute"
    )
    return words[:1].upper() + words[1:], headline.get("unit", unit)


def found_metrics(records: list[dict]) -> list[str]:
    """Every key that is a finite number somewhere, in order of appearance, without the two ends of intervals."""
    keys = dict.fromkeys(k for record in records for k, v in record.items() if is_number(v) and k not in NOT_A_METRIC)
    return [key for key in keys if re.sub(r"_(low|high)$", "", key) == key or key.rsplit("_", 1)[0] not in keys]


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average, over fewer values at the two ends; as long as `values`."""
    ones = np.ones(min(window, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def window_of(groups: list[Group]) -> int:
    """Steps to smooth over: a fifteenth of the longest run, odd so that it is centred."""
    return max(len(run.train) for group in groups for run in group.runs) // 15 | 1


def mean_and_range(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
    """(steps, mean, lowest, highest) over those of the curves (steps, values) that have a value at the step."""
    steps = np.unique(np.concatenate([s for s, _ in curves]))
    table = np.full((len(curves), len(steps)), np.nan)
    for row, (s, values) in zip(table, curves, strict=True):
        row[np.searchsorted(steps, s)] = values
    low, high = np.nanmin(table, 0), np.nanmax(table, 0)
    return steps, np.nanmean(table, 0).clip(low, high), low, high  # the mean of equal values is rounded, to either side


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


def new_figure(title: str, height: float = 4.5):
    """An empty figure of 8 x `height` inches, 150 dots an inch."""
    import matplotlib  # here, so that --help and refusals need not wait for it
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(8, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def draw_training(ax, key: str, group: Group, style: tuple, scale: float, window: int, alone: bool) -> None:
    """One setting's training curve: each step faint and the smoothed mean, or the range of several seeds."""
    curves = [curve for run in group.runs if len((curve := series(run.train, key))[0])]
    if not curves:
        return
    colour, dashes, marker = style
    steps, mean, low, high = mean_and_range([(s, smooth(values, window) * scale) for s, values in curves])
    if len(curves) > 1:
        ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    elif window > 1:
        ax.plot(curves[0][0], curves[0][1] * scale, color=colour, alpha=0.25, linewidth=0.8,
                label="each step" if alone else None)  # fmt: skip
    label = group.name if not alone else f"training, mean of {window} steps" if window > 1 else "training"
    ax.plot(steps, mean, color=colour, linestyle=dashes, marker=marker if len(steps) == 1 else None, label=label)


def draw_evaluations(ax, key: str, group: Group, style: tuple, scale: float, alone: bool, training: bool) -> None:
    """One setting's evaluations as points, with the interval that was logged or the range of several seeds."""
    curves = [curve for run in group.runs if len((curve := series(run.evals, key))[0])]
    if not curves:
        return
    colour, dashes, marker = style
    steps, mean, low, high = mean_and_range([(s, values * scale) for s, values in curves])
    ends = [series(group.runs[0].evals, f"{key}_{end}") for end in ("low", "high")]
    interval = len(curves) == 1 and all(len(s) == len(steps) for s, _ in ends)
    if interval:
        low, high = (values * scale for _, values in ends)
    if (high > low).any():
        ax.errorbar(steps, mean, (mean - low, high - mean), color=colour, capsize=2, elinewidth=1, linestyle="none")
    label = f"evaluation{' with its 95 % interval' if interval else ''}" if alone else None if training else group.name
    ax.plot(steps, mean, color=colour, marker=marker, linewidth=1, linestyle=":" if training else dashes, label=label)
    if alone and not training:  # beside the first and the last point
        for i, side, aside in ((0, "left", 7), (-1, "right", -7))[: len(steps)]:
            ax.annotate(f"{mean[i]:.3g}", (steps[i], mean[i]), (aside, 6), textcoords="offset points", ha=side,
                        bbox={"color": "white", "alpha": 0.75, "pad": 0.5})  # fmt: skip


def draw_panel(ax, key: str, groups: list[Group], training: bool = True) -> None:
    """One metric of all the runs: training and evaluations, and what guessing gives where that is known."""
    owner = next((group.runs[0] for group in groups if group.runs[0].headline["metric"] == key), None)
    headline, best_constant = (owner.headline, owner.task.get("best_constant")) if owner else ({}, None)
    title, unit = title_and_unit(key, headline)
    scale, window, alone = 100 if unit == "%" else 1, window_of(groups), len(groups) == 1
    for i, group in enumerate(groups):
        style = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)]
        if training:
            draw_training(ax, key, group, style, scale, window, alone)
        points = (COLOURS[1], "-", "o") if alone else style
        draw_evaluations(ax, EVAL_NAME.get(key, key), group, points, scale, alone, training)
    values = np.concatenate([line.get_ydata() for line in ax.lines])
    draw_reference_lines(ax, headline, best_constant, scale)
    if values.min() > 0 and values.max() > 100 * np.median(values):
        ax.set_yscale("log")  # else one outlier flattens everything
    elif values.min() >= 0 and not 0.02 < np.ptp(values) / max(values.max(), 1e-30) < 0.7:
        highest = max(max(line.get_ydata()) for line in ax.lines)  # what guessing gives included
        ax.set_ylim(bottom=0, top=1.25 * highest or 1)  # what is constant looks so, what falls far is seen to
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}" if abs(value) >= 1e-3 else f"{value:.3g}")
    ax.set(title=title, ylabel=unit)
    ax.margins(x=0.02)


def draw_reference_lines(ax, headline: dict, best_constant: float | None, scale: float = 1) -> None:
    """What guessing gives, and the best answer that never looks; one line where they are the same."""
    levels = {headline.get("chance"): "guessing"}
    levels.setdefault(best_constant, "best constant answer")
    for level, name in levels.items():
        if is_number(level):
            ax.axhline(level * scale, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
            text = f"{name}: {level * scale:.3g} {headline.get('unit', '')}".rstrip()
            ax.annotate(text, (0.995, level * scale), (0, 3),
                        xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=9,
                        bbox={"color": "white", "alpha": 0.75, "pad": 0.5})  # fmt: skip


def draw_panels(title: str, keys: list[str], groups: list[Group], training: bool = True):
    """A figure with a panel for each metric that ever changes, two in a row, and one legend for all."""
    constants = {key: value for key in keys if (value := constant_value(key, groups)) is not None and len(keys) > 1}
    keys = [key for key in keys if key not in constants] or keys[:1]
    columns = min(2, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = new_figure(title, height=4.5 if columns == 1 else 1 + 2.4 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for ax, key in zip(axes, keys, strict=False):
        draw_panel(ax, key, groups, training)
        ax.xaxis.set_tick_params(labelbottom=True)
    for ax in axes[len(keys) :]:
        ax.remove()
    for ax in axes[len(keys) - columns : len(keys)]:
        ax.set_xlabel("optimizer step")
    if len(keys) == 1 and not constants:
        axes[0].set_title("")  # the figure's title says it
    if len(groups) > 1 and training:
        axes[0].plot([], [], color=GREY, linestyle=":", marker=".", label="evaluation")
    if any(len(group.runs) > 1 for group in groups):
        axes[0].fill_between([], [], color=GREY, alpha=0.3, label="from the lowest to the highest seed")
    remarks = [f"{title_and_unit(key, {})[0]}: always {value}" for key, value in constants.items()]
    add_legend(figure, axes[: len(keys)], textwrap.fill("; ".join(remarks), 110))
    return figure


def constant_value(key: str, groups: list[Group]) -> str | None:
    """The one value, as a text, that a metric has throughout all runs; None when it changes."""
    runs = [run for group in groups for run in group.runs]
    curves = [series(run.train, key)[1] for run in runs] + [
        series(run.evals, EVAL_NAME.get(key, key))[1] for run in runs
    ]
    values = np.concatenate(curves)
    if np.ptp(values) > 1e-9 * np.abs(values).max():
        return None
    unit = title_and_unit(key, {})[1]
    return f"{values[0] * (100 if unit == '%' else 1):.4g} {unit}".rstrip()


def add_legend(figure, axes: list, remark: str = "") -> None:
    """One legend under the figure for what several panels have in common."""
    legends = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes]
    entries = {textwrap.fill(label, 90): handle for legend in legends for handle, label in legend}
    if entries:
        columns = max(1, min(4, 100 // max(len(label) + 8 for label in entries)))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=9,
                      title=remark or None, title_fontsize=9)  # fmt: skip


def draw_time(run: Run, phases: list[str], others: list[str]):
    """Seconds of a step, stacked by phase, beside what else was logged about time and memory."""
    figure = draw_panels(CHARTS["time"][0], ["seconds/total", *others], [Group("", [run])])
    ax, window = figure.axes[0], window_of([Group("", [run])])
    for line in list(ax.lines):
        line.remove()
    seconds = [[r[k] if is_number(r.get(k)) else 0.0 for r in run.train] for k in phases]
    hatches = [("", "//", "..", "\\\\", "xx", "--")[i % 6] for i in range(len(phases))]
    ax.stackplot([r["step"] for r in run.train], [smooth(np.array(row), window) for row in seconds], colors=COLOURS,
                 labels=[phase.split("/", 1)[1] for phase in phases], alpha=0.8, hatch=hatches)  # fmt: skip
    ax.legend(fontsize=8, loc="upper left", ncols=3, columnspacing=1, handlelength=1.5)
    ax.set(title="One step, phase by phase", ylim=(0, 1.45 * np.sum(seconds, 0).max()))
    return figure


def metric_charts(groups: list[Group]):
    """Yield (file name, figure) for everything in the logs."""
    runs = [run for group in groups for run in group.runs]
    trained = found_metrics([record for run in runs for record in run.train])
    evaluated = found_metrics([record for run in runs for record in run.evals])
    headlines = {run.headline["metric"]: run.headline for run in runs}

    if "reward" in trained:
        yield "train_score", draw_panels("Training reward", ["reward"], groups)
    scores = [key for key in headlines if key in evaluated or key in trained]
    if scores:
        what = " and ".join(dict.fromkeys(title_and_unit(key, headlines[key])[0] for key in scores))
        when = "over training" if set(scores) & set(evaluated) else "over training (no evaluation so far)"
        yield "eval_score", draw_panels(f"{what} {when}", scores, groups)
    for key in dict.fromkeys([*headlines, "avg_reward"]):
        if key in evaluated:
            title = f"{title_and_unit(key, headlines.get(key, {}))[0]} in evaluation"
            yield f"evaluation_{slug(key)}", draw_panels(title, [key], groups, training=False)

    keys_of = {chart: [] for chart in CHARTS}
    for key in dict.fromkeys([*trained, *evaluated]):
        if key not in ("reward", "avg_reward", *headlines):
            known = [chart for chart, (_, patterns) in CHARTS.items() if any(re.fullmatch(p, key) for p in patterns)]
            keys_of[known[0] if known else "task_metrics" if key in evaluated else "other"].append(key)
    for chart, keys in keys_of.items():
        phases = [key for key in keys if key.startswith("seconds/") and key != "seconds/total"]
        if chart == "time" and len(runs) == 1 and phases and "seconds/total" in keys:
            yield chart, draw_time(runs[0], phases, [key for key in keys if not key.startswith("seconds/")])
        elif keys:
            yield chart, draw_panels(CHARTS[chart][0], keys, groups)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:80]


# ---------------------------------------------------------------------------------------------------------------------
# Task pictures: what evaluations looked like before and after, chosen by the form of the answers (see TASK_PICTURES)


def before_and_after(run: Run) -> dict[str, list[dict]]:
    """{"before, step 0": groups, "after, step 500": groups}; one entry when there is only one evaluation."""
    files = list(run.sample_files("eval").items())
    found = {step: groups for step, path in dict(files[:1] + files[-1:]).items() if (groups := run.read_samples(path))}
    names = ("before", "after") if len(found) == 2 else ("evaluation",)
    return {f"{name}, step {step}": groups for name, (step, groups) in zip(names, found.items(), strict=False)}


def pairs(groups: list[dict], read) -> list[tuple]:
    """(true, predicted or None) of each example's first completion, both as `read` understands them."""
    return [(read(g["answer"]), read(g["completions"][0]["prediction"])) for g in groups if g["completions"]]


def draw_true_against_predicted(run: Run, evaluations: dict):
    """Scatter of predicted over true numbers, before and after training."""
    figure = new_figure(f"{str(run.task.get('name', 'answers')).capitalize()}: predicted against true", height=4.6)
    axes = figure.subplots(1, len(evaluations), squeeze=False, sharex=True, sharey=True).flat
    for ax, (name, groups), colour, marker in zip(axes, evaluations.items(), (BEFORE, AFTER), "so", strict=False):
        points = pairs(groups, number)
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


def clock_seconds(value) -> int | None:
    """Seconds on a 12-hour circle of an "HH:MM:SS", None for anything else."""
    match = re.fullmatch(r"(\d{1,2}):(\d{2}):(\d{2})", value) if isinstance(value, str) else None
    return (int(match[1]) * 3600 + int(match[2]) * 60 + int(match[3])) % 43200 if match else None


def minutes_off(true: int, predicted: int | None) -> float:
    """The shorter way round a 12-hour circle, six hours when nothing was readable."""
    return 360.0 if predicted is None else min((true - predicted) % 43200, (predicted - true) % 43200) / 60


def draw_clocks(run: Run, evaluations: dict):
    """The error at each hour, and a sheet of dials with the true and the predicted hands."""
    figure = new_figure("Clock error by the hour that is shown")
    ax, width = figure.subplots(), 0.8 / len(evaluations)
    looks = ({"color": BEFORE, "hatch": "//", "edgecolor": "white"}, {"color": AFTER})
    for i, ((name, groups), look) in enumerate(zip(evaluations.items(), looks, strict=False)):
        read = pairs(groups, clock_seconds)
        by_hour = [[minutes_off(t, p) for t, p in read if t // 3600 == hour] for hour in range(12)]
        ax.bar(np.arange(12) - 0.4 + width * (i + 0.5), [np.mean(errors) if errors else 0 for errors in by_hour],
               width, label=f"{name} ({len(read)} clocks)", **look)  # fmt: skip
    draw_reference_lines(ax, run.headline, None)
    ax.set(xlabel="hour", ylabel="mean error, min", xticks=range(12), xticklabels=[12, *range(1, 12)])
    ax.grid(axis="x", visible=False)
    add_legend(figure, [ax])
    yield "clock_error_by_hour", figure

    name, groups = list(evaluations.items())[-1]
    read = sorted(pairs(groups, clock_seconds), key=lambda pair: minutes_off(*pair))
    chosen = [read[round(i)] for i in np.linspace(0, len(read) - 1, min(10, len(read)))]
    figure = new_figure(f"Test clocks, from the best read to the worst ({name})", height=4.6)
    axes = list(figure.subplots(2, 5).flat)
    for ax, (true, predicted) in zip(axes, chosen, strict=False):
        draw_dial(ax, true, predicted)
    for ax in axes[len(chosen) :]:
        ax.remove()
    add_legend(figure, figure.axes)
    yield "clock_sheet", figure


def draw_dial(ax, true: int, predicted: int | None) -> None:
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
    off = minutes_off(true, predicted)
    apart = "unreadable" if predicted is None else f"off by {off:.1f} min" if off < 60 else f"off by {off / 60:.1f} h"
    ax.set_title(f"{' → '.join(shown)}\n{apart}", fontsize=9, loc="center", fontweight="normal")
    ax.set_aspect("equal")
    ax.axis("off")


def draw_changes(run: Run, evaluations: dict):
    """How many examples went from wrong to right and back, and some of each."""
    if len(evaluations) < 2:
        return
    became = changes(*evaluations.values())
    lists = {f"From {name.replace(' → ', ' to ')}": became[name] for name in list(became)[:2]}
    blocks = {f"{title}, {min(4, len(examples))} of {len(examples)}": "\n\n".join(map(change_text, examples[:4]))
              for title, examples in lists.items() if examples}  # fmt: skip
    heights = [1, *(0.3 + 0.19 * (text.count("\n") + 1) for text in blocks.values())]
    figure = new_figure(f"What training changed: {' → '.join(evaluations)}", height=1.3 + sum(heights))
    bar, *axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False).flat
    left, looks = 0, ((AFTER, ""), (COLOURS[1], "//"), ("#999999", ""), ("#dddddd", ".."))
    for (name, examples), (colour, hatch) in zip(became.items(), looks, strict=True):
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
    was, now = example
    said = [number(p) if number(p) is not None else p for p in (g["completions"][0]["prediction"] for g in example)]
    said = ["unreadable" if p is None else f"{p:.10g}" if is_number(p) else textwrap.shorten(p, 30) for p in said]
    asked = textwrap.shorten(was["prompt"].rsplit("\n\n", 1)[-1], 200, placeholder=" …")
    return f"{textwrap.fill(asked, 105)}\n    {said[0]} → {said[1]}   (right: {now['answer']})"


def answers_are(read, run: Run, groups: list[dict]) -> bool:
    return all(read(g["answer"]) is not None for g in groups)


# (does it fit this run and these test examples?, what yields its figures); the first that fits draws
TASK_PICTURES = (
    (partial(answers_are, clock_seconds), draw_clocks),
    (lambda run, groups: run.exact, draw_changes),
    (partial(answers_are, number), draw_true_against_predicted),
)


def task_pictures(groups: list[Group]):
    """Yield (file name, figure) of each setting's first run; several settings are told apart in the file names."""
    for i, group in enumerate(groups, start=1):
        run = group.runs[0]
        evaluations = before_and_after(run)
        examples = [example for groups in evaluations.values() for example in groups]
        draw_them = next((draw for fits, draw in TASK_PICTURES if examples and fits(run, examples)), None)
        for name, figure in draw_them(run, evaluations) if draw_them else ():
            if len(groups) > 1:
                figure.suptitle(textwrap.fill(f"{figure.get_suptitle()}, {group.name}", 90), x=0.01, ha="left")
            yield name if len(groups) == 1 else f"{name}_{i}_{slug(group.name)}", figure


# ---------------------------------------------------------------------------------------------------------------------
# The command


def write_whole(path: Path, content: bytes) -> None:
    """Write by renaming, so that nobody ever reads half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def png_of(figure) -> bytes:
    """The figure as a PNG of 256 colours, a third of the size that all colours take."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png")
    return small.getvalue()


def draw(folders: list[Path], plots_dir: Path | None, report: bool) -> None:
    """Read the runs and write charts, PDF, table and report.

    Raises NotARun or OSError, saying what to do, when a folder is not a run or cannot be written to.
    """
    groups = group_runs([read_run(folder) for folder in folders])
    several = len(folders) > 1
    target = plots_dir or folders[0] / ("plots/comparison" if several else "plots")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OSError(f"cannot write to {target}: {problem.strerror}; --plots_dir takes another place") from None
    from matplotlib.backends.backend_pdf import PdfPages

    charts, pdf_file = {}, io.BytesIO()
    with PdfPages(pdf_file) as pdf:
        for figures in (metric_charts(groups), task_pictures(groups)):
            for name, figure in figures:
                charts[name] = (figure.get_suptitle(), png_of(figure))
                figure.set_layout_engine("none")  # laid out by now
                pdf.savefig(figure)
                write_whole(target / f"{name}.png", charts[name][1])
    write_whole(target / "charts.pdf", pdf_file.getvalue())
    summaries = [summarize(group) for group in groups]
    write_whole(target / "scores.md", scores_markdown(summaries).encode())
    print(scores_markdown(summaries))
    print(f"{len(charts)} charts, charts.pdf and scores.md are in {target}")
    if report:
        page = (target if plots_dir or several else folders[0]) / "report.html"
        write_whole(page, write_report(groups, charts, summaries))
        print(f"the report is {page} ({page.stat().st_size / 1e6:.1f} MB)")


def watch(folders: list[Path], every: float, redraw) -> None:
    """Call `redraw` whenever a log has changed, until interrupted; drawing takes half of the time at most."""
    seen, took = None, 0.0
    while True:
        logs = [
            path for folder in folders for pattern in ("*.json", "eval_logs/*.json") for path in folder.glob(pattern)
        ]
        now = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(logs)]
        if now != seen:
            seen, start = now, time.monotonic()
            try:
                redraw()
            except NothingLogged as nothing:
                print(nothing)
            print(time.strftime("%H:%M:%S watching; Ctrl+C ends"), flush=True)
            took = time.monotonic() - start
        time.sleep(max(every, took))


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw charts and a report of one run, or of several overlaid.")
    parser.add_argument("--output_dir", nargs="+", type=Path, required=True, metavar="RUN",
                        help="run folders, as given to main.py; several are overlaid, named by the flags that differ, "
                             "and those that differ only in the seed become one line with its range")  # fmt: skip
    parser.add_argument("--plots_dir", type=Path, help="where charts, charts.pdf and scores.md go, and the report too "
                        "(default: RUN/plots and RUN/report.html; for several runs all in FIRST_RUN/plots/comparison, "
                        "so that the first run's own charts stay)")  # fmt: skip
    parser.add_argument("--watch", nargs="?", type=float, const=5.0, metavar="SECONDS",
                        help="redraw when there are new records; looks every 5 seconds, or every SECONDS")  # fmt: skip
    parser.add_argument("--no_report", action="store_true", help="charts only, no report.html")
    args = parser.parse_args(argv)
    if args.watch is not None and not args.watch > 0:
        parser.error(f"--watch takes a number of seconds above 0, got {args.watch:g}")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    folders = list(dict.fromkeys(args.output_dir))
    redraw = partial(draw, folders, args.plots_dir, not args.no_report)
    try:
        watch(folders, args.watch, redraw) if args.watch else redraw()
    except (NotARun, OSError) as problem:
        print(f"plotter.py: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
