"""Reads run folders for plotter.py, which draws them: records, samples, final scores. Writes `report.html`.

The report is one file without links to others, so it can be sent to anyone. It holds what a model wrote as JSON, and
`report_template.html` shows that as text only. The page's Content-Security-Policy forbids all other scripts and all
requests.
"""

import base64
import functools
import gzip
import hashlib
import io
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from progress import format_duration, format_value
from run_folder import CONFIG, LOG, METRICS, SAMPLES, read_records, step_of

# ---------------------------------------------------------------------------------------------------------------------
# Reading a run folder

# Escape codes, lone surrogates and bidi marks, which a terminal or browser would interpret.
CONTROL_CHARACTERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: object) -> str:
    """`text` with control characters replaced by their pictures (␛), or by � if they have none."""
    lines = str(text).replace("\r\n", "\n")
    return CONTROL_CHARACTERS.sub(lambda found: chr(0x2400 + ord(found[0])) if ord(found[0]) < 32 else "�", lines)


def print_error(message: object) -> None:
    """Prints one line to stderr."""
    print("plotter.py:", " ".join(visible(message).split()), file=sys.stderr)


def is_number(value: object) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def parse_number(value: object) -> float | None:
    """`value` as a number if it is one ("$1,080" is), else None."""
    try:
        number = float(re.sub(r"[$,%\s]", "", value) if isinstance(value, str) else value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def read_json(path: Path) -> dict:
    """The JSON object in `path`; {} if there is none, with a warning if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        print_error(f"{path} is damaged or half written: left out")
        return {}
    return content


def series(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records in which the metric is a finite number; both have shape (records,)."""
    points = [(r["step"], r[key]) for r in records if is_number(r.get(key))]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


@dataclass
class Run:
    """The logs of one run; training and evaluation records are sorted by step."""

    folder: Path
    config: dict
    train: list[dict]
    evals: list[dict]

    @property
    def flags(self) -> dict:
        return self.config.get("flags") or {}

    @property
    def settings(self) -> dict:
        """The flags that change what the run computes, and the task's options."""
        options = {k: v for value in self.flags.values() if isinstance(value, dict) for k, v in value.items()}
        return {k: v for k, v in (self.flags | options).items() if k not in NOT_A_SETTING and not isinstance(v, dict)}

    @property
    def task(self) -> dict:
        return self.config.get("task") or {}

    @property
    def headline(self) -> dict:
        """The metric by which the task is judged; the mean reward if config.json names none."""
        named = self.task.get("headline") or {}
        return named if named.get("metric") else {"metric": "avg_reward", "label": "mean reward"}

    @property
    def right_or_wrong(self) -> bool:
        """Whether an answer is right or wrong, rather than at some distance from the right one."""
        return self.headline["metric"].startswith("accuracy")

    def sample_files(self, kind: str) -> dict[int, Path]:
        """{step: file} of the samples of "train" or "eval", sorted by step."""
        files = {step_of(path): path for path in self.folder.glob(SAMPLES[kind])}
        return {step: files[step] for step in sorted(files) if step >= 0}

    def read_samples(self, path: Path) -> list[dict]:
        """The groups of a samples file, with all fields, and with control characters replaced in all texts."""
        groups = []
        for raw in read_json(path).get("groups") or []:
            texts = {key: visible(raw.get(key, "")) for key in ("id", "prompt", "answer")}
            completions = [self._completion(c, texts["answer"], path.parent) for c in raw.get("completions") or []]
            image = self._own_picture(path.parent, raw.get("image"))
            groups.append({**texts, "image": image, "completions": completions})
        return groups

    def _own_picture(self, folder: Path, name: object) -> Path | None:
        """The path of a picture that a samples file in `folder` names. None if it lies outside of the run folder: a run
        from a stranger must not copy other files into a report."""
        path = (folder / name).resolve() if isinstance(name, str) and name else None
        return path if path and path.is_relative_to(self.folder.resolve()) else None

    def _turns(self, raw: dict, folder: Path) -> list[dict]:
        """The turns that an observation follows: {"text", "shown", "images"}."""
        turns = []
        for turn in raw.get("turns") or []:
            if shown := turn.get("observation"):
                images = [self._own_picture(folder, name) for name in shown.get("images") or []]
                words = {"text": visible(turn.get("text", "")), "shown": visible(shown.get("text", ""))}
                turns.append({**words, "images": [image for image in images if image]})
        return turns

    def _completion(self, raw: dict, answer: str, folder: Path) -> dict:
        prediction = raw.get("prediction")
        if prediction is not None and not is_number(prediction):
            prediction = visible(prediction)
        number = parse_number(prediction)
        right = prediction == answer or (number is not None and number == parse_number(answer))
        return {
            "text": visible(raw.get("text", "")),
            "turns": self._turns(raw, folder),
            "prediction": prediction,
            "right": right if self.right_or_wrong else None,
            "truncated": bool(raw.get("truncated")),
            "rewards": {visible(k): v for k, v in (raw.get("rewards") or {}).items() if is_number(v)},
            **{key: raw[key] if is_number(raw.get(key)) else None for key in ("reward", "advantage", "length")},
        }


class NotARun(ValueError):
    """The folder was not written by main.py."""


class NothingLogged(NotARun):
    """The folder was written by main.py and has no records so far."""


def read_run(folder: Path) -> Run:
    """Reads the logs in `folder`, with a warning about damaged files. Raises NotARun or NothingLogged."""
    if not folder.is_dir():
        raise NotARun(f"{folder}: no such folder; --output_dir takes the folder that main.py wrote")
    if not (folder / CONFIG).exists() and not (folder / LOG).exists() and not any(folder.glob(METRICS)):
        raise NotARun(f"{folder} is not a run: it has no {CONFIG}, {LOG} or {METRICS}")
    metrics = [read_json(path) for path in sorted(folder.glob(METRICS))]
    evals = sorted((m for m in metrics if is_number(m.get("step"))), key=lambda m: m["step"])
    train = read_records(folder / LOG, warn=print_error)
    if not train and not evals:
        raise NothingLogged(f"{folder} has no records so far: wait for its first step, or add --watch")
    return Run(folder, read_json(folder / CONFIG), train, evals)


# ---------------------------------------------------------------------------------------------------------------------
# Several runs, and their final scores

NOT_A_SETTING = {"output_dir", "seed", "resume", "overwrite_output_dir"}


@dataclass
class Setting:
    """Runs that differ only in the seed."""

    name: str
    runs: list[Run]


def settings_of(runs: list[Run]) -> list[Setting]:
    """Sorts runs by setting. Each setting is named by the flags in which it differs from the others."""
    same = {}
    for run in runs:
        same.setdefault(json.dumps(run.settings or str(run.folder), sort_keys=True), []).append(run)
    all_flags = [members[0].settings for members in same.values()]
    names = dict.fromkeys(name for flags in all_flags for name in flags)
    differing = [name for name in names if any(flags.get(name) != all_flags[0].get(name) for flags in all_flags)]
    settings = []
    for flags, members in zip(all_flags, same.values(), strict=True):
        parts = [f"{name}={str(flags.get(name)).rstrip('/').split('/')[-1]}" for name in differing]
        settings.append(Setting(visible(", ".join(parts) or members[0].folder.resolve().name), members))
    return settings


def summarize(setting: Setting) -> dict[str, str]:
    """The final scores and facts of a setting, for the terminal, scores.md and the top of the report."""
    run = setting.runs[0]
    unit, hardware = run.headline.get("unit", ""), run.config.get("hardware") or {}
    scores = [values for run in setting.runs if len(values := series(run.evals, run.headline["metric"])[1])]

    def over_seeds(values: list[float]) -> str:
        mean = format_value(float(np.mean(values)) if values else None, unit)
        if len(values) < 2:
            return mean
        return f"{mean} ({format_value(min(values), unit)} to {format_value(max(values), unit)})"

    seconds = [series(r.train, "seconds/total")[1].sum() + series(r.evals, "seconds")[1].sum() for r in setting.runs]
    speeds = np.concatenate([series(run.train, "tokens_per_second")[1] for run in setting.runs])
    last_steps = {max(record["step"] for record in (*run.train, *run.evals)) for run in setting.runs}
    facts = {
        "run": setting.name,
        "task": run.task.get("name", "?"),
        "score": run.headline.get("label") or run.headline["metric"],
        "before": over_seeds([values[0] for values in scores]),
        "after": over_seeds([values[-1] for values in scores if len(values) > 1]),
        "guessing": format_value(run.headline.get("chance"), unit),
        "steps": ", ".join(f"{step:,.0f}" for step in sorted(last_steps)),
        "time": format_duration(float(np.mean(seconds))),
        "tokens/s": f"{np.median(speeds):,.0f}" if len(speeds) else "–",
        "seeds": ", ".join(str(run.flags.get("seed", "?")) for run in setting.runs),
        "model": run.flags.get("model_path", "?"),
        "hardware": hardware_text(hardware),
        "commit": str(run.config.get("commit") or "?")[:10],
        "command": run.config.get("command", "?"),
        "settings": "\n".join(f"{name} = {value}" for name, value in run.settings.items()),
    }
    return {name: visible(fact) for name, fact in facts.items()}


def hardware_text(hardware: dict) -> str:
    """The GPU, or the processor with its cores and torch's threads; "cpu" in the folder of an older run."""
    device = str(hardware.get("device", "?"))
    if device != "cpu" or not hardware.get("name"):
        return device
    counts = [
        f"{hardware[key]} {word}"
        for key, word in (("cpu_count", "cores"), ("threads", "torch threads"))
        if hardware.get(key)
    ]
    return ", ".join([str(hardware["name"]), *counts])


def scores_markdown(summaries: list[dict[str, str]]) -> str:
    """A Markdown table with one row per setting, followed by the commands."""
    columns = [name for name in summaries[0] if name not in ("command", "settings")]
    rows = [columns, *([re.sub(r"[\n|]", " ", summary[name]) for name in columns] for summary in summaries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([*lines, "", "```", *(summary["command"] for summary in summaries), "```", ""])


# ---------------------------------------------------------------------------------------------------------------------
# The report

TEMPLATE = Path(__file__).with_name("report_template.html")
PACKED_BUDGET = 12_500_000  # bytes of packed samples and their pictures; with the charts the report is under 15 MB
UNPACKED_BUDGET = 50_000_000  # bytes that the browser unpacks; more would take it seconds
MAX_PAGES = 1200  # files of samples that are read per run, spread evenly over its steps
MAX_TEXT = 8000  # characters of a completion that are kept: its beginning and its end


def spread_evenly(items: list, stride: int) -> list:
    """The first item, the last, and every `stride`-th counted from the last."""
    return [items[i] for i in sorted({*range(len(items) - 1, -1, -stride), *range(min(1, len(items)))})]


def shorten(text: str) -> str:
    """The first and the last MAX_TEXT / 2 characters of a longer text."""
    half = MAX_TEXT // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]}\n[… {left_out:,} characters left out …]\n{text[-half:]}"


@functools.cache
def data_uri(path: Path) -> str | None:
    """The picture as a data URI in WebP, a few kilobytes at most 336 pixels wide; None if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    picture.thumbnail((336, 336))
    lossless, lossy = io.BytesIO(), io.BytesIO()  # lossless is smaller for drawings, lossy for photographs
    picture.save(lossless, "webp", lossless=True, method=2)
    picture.save(lossy, "webp", quality=60, method=2)
    return f"data:image/webp;base64,{base64.b64encode(min(lossless.getvalue(), lossy.getvalue(), key=len)).decode()}"


def read_pages(run: Run) -> list[tuple[str, int, list[dict]]]:
    """(kind, step, groups) of a run's samples. Examples whose answers are right or wrong get a "change" since the first
    evaluation."""
    pages = []
    for kind in ("eval", "train"):
        files = list(run.sample_files(kind).items())
        for step, path in spread_evenly(files, math.ceil(len(files) / MAX_PAGES) or 1):
            if groups := run.read_samples(path):
                pages.append((kind, step, groups))
    evaluations = [groups for kind, _, groups in pages if kind == "eval" and run.right_or_wrong]
    for groups in evaluations[1:]:
        for change, examples in changes(evaluations[0], groups).items():
            for _, example in examples:
                example["change"] = change
    return pages


def changes(first: list[dict], last: list[dict]) -> dict[str, list[tuple[dict, dict]]]:
    """The examples of two evaluations by how they changed: {"wrong → right": [(before, after), …], …}."""
    word = {False: "wrong", True: "right"}
    changed = {f"{word[a]} → {word[b]}": [] for a, b in ((False, True), (True, False), (True, True), (False, False))}
    by_id = {group["id"]: group for group in first if group["completions"]}
    for after in last:
        before = by_id.get(after["id"])
        if before and after["completions"]:
            right = [group["completions"][0]["right"] for group in (before, after)]
            changed[f"{word[right[0]]} → {word[right[1]]}"].append((before, after))
    return changed


class Numbering(dict):
    """Numbers distinct items 0, 1, 2, … in the order in which they come; None stays None."""

    def index(self, item: str | None) -> int | None:
        return None if item is None else self.setdefault(item, len(self))


def pack(names: list[str], all_pages: list[list], stride: int, most_groups: int) -> str:
    """The samples as JSON for the page: every `stride`-th step, `most_groups` of it, the highest reward first."""
    prompts, pictures, runs = Numbering(), Numbering(), []

    def rounded(value: float | None) -> float | None:
        return value if value is None else float(f"{value:.4g}")

    def packed_turn(turn: dict) -> list:
        uris = [data_uri(image) for image in turn["images"]]
        return [shorten(turn["text"]), shorten(turn["shown"]), [pictures.index(uri) for uri in uris if uri]]

    def packed_group(g: dict, components: list[str]) -> list:
        completions = sorted(g["completions"], key=lambda c: -(c["reward"] or 0))
        rows = [[shorten(c["text"]), rounded(c["reward"]), rounded(c["advantage"]),
                 [rounded(c["rewards"].get(name)) for name in components],
                 c["length"], c["truncated"], c["prediction"], c["right"],
                 [packed_turn(turn) for turn in c["turns"]]] for c in completions]  # fmt: skip
        picture = pictures.index(g["image"] and data_uri(g["image"]))
        return [g["id"], prompts.index(g["prompt"]), picture, g["answer"], g.get("change"), rows]

    for name, pages in zip(names, all_pages, strict=True):
        components = list(dict.fromkeys(k for *_, groups in pages for g in groups for c in g["completions"]
                                        for k in c["rewards"]))  # fmt: skip
        kept = [p for kind in ("eval", "train") for p in spread_evenly([p for p in pages if p[0] == kind], stride)]
        shown = [{"kind": kind, "step": step, "groups": [packed_group(g, components) for g in groups[:most_groups]],
                  "of": len(groups)} for kind, step, groups in kept]  # fmt: skip
        runs.append({"name": name, "components": components, "pages": shown, "of": len(pages)})
    samples = {"prompts": list(prompts), "pictures": list(pictures), "runs": runs}
    return json.dumps(samples, ensure_ascii=False, separators=(",", ":"))


def to_json(data: object) -> str:
    """JSON for a script element. Escapes `<`, without which nothing can end the element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def pack_within_budget(names: list[str], all_pages: list[list]) -> str:
    """The samples in base64 of gzip, which the page unpacks with the browser's DecompressionStream.

    If all of them do not fit, takes every second, third, … step; if that is still too much, fewer groups of each.
    """
    stride, most_groups = 1, max((len(groups) for pages in all_pages for *_, groups in pages), default=1)
    longest = max(map(len, all_pages), default=0)
    while True:
        samples = pack(names, all_pages, stride, most_groups).encode()
        if len(samples) <= UNPACKED_BUDGET or most_groups <= 1:
            packed = base64.b64encode(gzip.compress(samples, mtime=0)).decode()
            if len(packed) <= PACKED_BUDGET or most_groups <= 1:
                return packed
        if stride < longest:
            stride += max(1, stride // 2)
        else:
            most_groups //= 2


def write_report(settings: list[Setting], charts: dict[str, tuple[str, bytes]], summaries: list[dict]) -> bytes:
    """The report as HTML. `charts` maps a name to (title, PNG); `summaries` has one entry per setting."""
    images = [(name, title, f"data:image/png;base64,{base64.b64encode(png).decode()}")
              for name, (title, png) in charts.items()]  # fmt: skip
    page = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    blocks = {
        "SCRIPT_HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "SUMMARY": to_json({"summaries": summaries, "charts": images}),
        "SAMPLES": pack_within_budget([s.name for s in settings], [read_pages(s.runs[0]) for s in settings]),
    }
    return re.sub(r"@@(\w+)@@", lambda found: blocks[found[1]], page).encode()
