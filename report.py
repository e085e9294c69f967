"""What runs left on disk, as data: records, samples, final scores, and `report.html`. Draws nothing; see plotter.py.

The report is one file that opens from disk and can be sent to anyone. Whatever a model wrote travels in it as data: all
of it is JSON in `report_template.html`, and the page only ever shows it as text. The page's own rule (its
Content-Security-Policy) forbids every other script and every request.
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

# ---------------------------------------------------------------------------------------------------------------------
# Reading a run folder

# Escape codes, lone surrogates and marks that turn the direction of text: they would act instead of being seen.
ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text) -> str:
    """`text` with control characters replaced by their pictures (␛), or by � where there is none."""
    return ACTING.sub(lambda m: chr(0x2400 + ord(m[0])) if ord(m[0]) < 32 else "�", str(text).replace("\r\n", "\n"))


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value) -> float | None:
    """`value` as a number where it is one ("$1,080" is), else None."""
    try:
        parsed = float(re.sub(r"[$,%\s]", "", value) if isinstance(value, str) else value)
    except (TypeError, ValueError):
        return None
    return parsed if math.isfinite(parsed) else None


def read_json(path: Path) -> dict:
    """The JSON object in `path`; {} when there is none, with a warning when the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        print(f"plotter.py: {path} is damaged or half written: left out", file=sys.stderr)
        return {}
    return content


def read_records(path: Path) -> list[dict]:
    """The records of a JSON list, up to where it was cut off; of a step logged twice the last record counts."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    decoder, before_record, position, records = json.JSONDecoder(), re.compile(r"[\s,\[]*(?=\{)"), 0, {}
    while start := before_record.match(text, position):
        try:
            record, position = decoder.raw_decode(text, start.end())
        except (ValueError, RecursionError):
            print(f"plotter.py: {path} is cut off after {len(records)} records: the rest is left out", file=sys.stderr)
            break
        if is_number(record.get("step")):
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def series(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) where the metric is a finite number."""
    points = [(r["step"], r[key]) for r in records if is_number(r.get(key))]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


@dataclass
class Run:
    """What one run left on disk; its training and evaluation records are sorted by step."""

    folder: Path
    config: dict
    train: list[dict]
    evals: list[dict]

    @property
    def flags(self) -> dict:
        return self.config.get("flags") or {}

    @property
    def settings(self) -> dict:
        """The flags that say what the run does, a task's own options among them."""
        options = {k: v for value in self.flags.values() if isinstance(value, dict) for k, v in value.items()}
        return {k: v for k, v in (self.flags | options).items() if k not in NOT_A_SETTING and not isinstance(v, dict)}

    @property
    def task(self) -> dict:
        return self.config.get("task") or {}

    @property
    def headline(self) -> dict:
        """The task's one number, or the mean reward where the configuration does not name it."""
        named = self.task.get("headline") or {}
        return named if named.get("metric") else {"metric": "avg_reward", "label": "mean reward"}

    @property
    def exact(self) -> bool:
        """Answers are right or wrong, rather than near or far."""
        return self.headline["metric"].startswith("accuracy")

    def sample_files(self, kind: str) -> dict[int, Path]:
        """step -> file with the samples of "train" or "eval", in the order of the steps."""
        pattern = {"train": "train_samples/step_*.json", "eval": "eval_logs/samples_*.json"}[kind]
        found = {int(m[1]): path for path in self.folder.glob(pattern) if (m := re.search(r"_(\d+)\.json$", path.name))}
        return dict(sorted(found.items()))

    def read_samples(self, path: Path) -> list[dict]:
        """The groups of a samples file, every field present and its texts harmless."""
        groups = []
        for raw in read_json(path).get("groups") or []:
            image = (path.parent / raw["image"]).resolve() if raw.get("image") else None
            if image and not image.is_relative_to(self.folder.resolve()):
                image = None  # a run folder from elsewhere must not pull other files into a report
            texts = {key: visible(raw.get(key, "")) for key in ("id", "prompt", "answer")}
            completions = [self._completion(c, texts["answer"]) for c in raw.get("completions") or []]
            groups.append({**texts, "image": image, "completions": completions})
        return groups

    def _completion(self, raw: dict, answer: str) -> dict:
        prediction = raw.get("prediction")
        if prediction is not None and not is_number(prediction):
            prediction = visible(prediction)
        right = prediction == answer or (number(prediction) is not None and number(prediction) == number(answer))
        return {
            "text": visible(raw.get("text", "")),
            "prediction": prediction,
            "right": right if self.exact else None,
            "truncated": bool(raw.get("truncated")),
            "rewards": {visible(k): v for k, v in (raw.get("rewards") or {}).items() if is_number(v)},
            **{key: raw[key] if is_number(raw.get(key)) else None for key in ("reward", "advantage", "length")},
        }


class NotARun(ValueError):
    """The folder is not one that main.py wrote."""


class NothingLogged(NotARun):
    """It is one, but there is nothing in it to show so far."""


def read_run(folder: Path) -> Run:
    if not folder.is_dir():
        raise NotARun(f"{folder}: no such folder; --output_dir takes the folder that main.py wrote")
    if not any((folder / name).exists() for name in ("config.json", "train_logs.json", "eval_logs")):
        raise NotARun(f"{folder} is not a run: there is no config.json, train_logs.json or eval_logs in it")
    metrics = [read_json(path) for path in sorted(folder.glob("eval_logs/metrics_*.json"))]
    evals = sorted((m for m in metrics if is_number(m.get("step"))), key=lambda m: m["step"])
    train = read_records(folder / "train_logs.json")
    if not train and not evals:
        raise NothingLogged(f"{folder} has logged nothing so far: wait for its first step, or add --watch")
    return Run(folder, read_json(folder / "config.json"), train, evals)


# ---------------------------------------------------------------------------------------------------------------------
# Several runs, and their final scores

NOT_A_SETTING = {"output_dir", "seed", "resume", "overwrite_output_dir"}


@dataclass
class Group:
    """Runs that differ in nothing but the seed."""

    name: str
    runs: list[Run]


def group_runs(runs: list[Run]) -> list[Group]:
    """Runs of the same settings together, each group named by the flags in which it differs from the others."""
    same = {}
    for run in runs:
        same.setdefault(json.dumps(run.settings or str(run.folder), sort_keys=True), []).append(run)
    everyone = [members[0].settings for members in same.values()]
    names = dict.fromkeys(name for settings in everyone for name in settings)
    differing = [name for name in names if any(s.get(name) != everyone[0].get(name) for s in everyone)]
    groups = []
    for settings, members in zip(everyone, same.values(), strict=True):
        parts = [f"{name}={visible(settings.get(name)).rstrip('/').split('/')[-1]}" for name in differing]
        groups.append(Group(", ".join(parts) or visible(members[0].folder.resolve().name), members))
    return groups


def show(value: float | None, unit: str = "") -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def summarize(group: Group) -> dict[str, str]:
    """The final scores of one setting: what the terminal, the table and the top of the report show."""
    run = group.runs[0]
    unit, hardware = run.headline.get("unit", ""), run.config.get("hardware") or {}
    scores = [values for run in group.runs if len(values := series(run.evals, run.headline["metric"])[1])]

    def over_seeds(values: list[float]) -> str:
        mean = show(float(np.mean(values)) if values else None, unit)
        return mean if len(values) < 2 else f"{mean} ({show(min(values), unit)} to {show(max(values), unit)})"

    seconds = [series(r.train, "seconds/total")[1].sum() + series(r.evals, "seconds")[1].sum() for r in group.runs]
    speeds = np.concatenate([series(run.train, "tokens_per_second")[1] for run in group.runs])
    last_steps = {max(record["step"] for record in (*run.train, *run.evals)) for run in group.runs}
    facts = {
        "run": group.name,
        "task": run.task.get("name", "?"),
        "score": run.headline.get("label") or run.headline["metric"],
        "before": over_seeds([values[0] for values in scores]),
        "after": over_seeds([values[-1] for values in scores if len(values) > 1]),
        "guessing": show(run.headline.get("chance"), unit),
        "steps": ", ".join(f"{step:,.0f}" for step in sorted(last_steps)),
        "time": duration(np.mean(seconds)),
        "tokens/s": f"{np.median(speeds):,.0f}" if len(speeds) else "–",
        "seeds": ", ".join(str(run.flags.get("seed", "?")) for run in group.runs),
        "model": run.flags.get("model_path", "?"),
        "hardware": hardware.get("device", "?"),
        "commit": str(run.config.get("commit") or "?")[:10],
        "command": run.config.get("command", "?"),
        "settings": "\n".join(f"{name} = {value}" for name, value in run.settings.items()),
    }
    return {name: visible(fact) for name, fact in facts.items()}


def scores_markdown(summaries: list[dict[str, str]]) -> str:
    """A table with a row a setting, and under it the command of each."""
    columns = [name for name in summaries[0] if name not in ("command", "settings")]
    rows = [columns, *([re.sub(r"[\n|]", " ", summary[name]) for name in columns] for summary in summaries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([*lines, "", "```", *(summary["command"] for summary in summaries), "```", ""])


# ---------------------------------------------------------------------------------------------------------------------
# The report

TEMPLATE = Path(__file__).with_name("report_template.html")
PACKED_BUDGET = 12_500_000  # bytes of packed samples with their pictures: beside the charts, under 15 MB in all
UNPACKED_BUDGET = 50_000_000  # bytes that the browser unpacks; more would make it wait
MAX_PAGES = 1200  # files of samples that are read of one run, spread evenly
MAX_TEXT = 8000  # characters of one completion, its beginning and its end


def spread_evenly(items: list, stride: int) -> list:
    """Every `stride`-th item, counted from the last, and the first: before and after are never left out."""
    return [items[i] for i in sorted({*range(len(items) - 1, -1, -stride), *range(min(1, len(items)))})]


def shorten(text: str) -> str:
    half = MAX_TEXT // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]}\n[… {left_out:,} characters left out …]\n{text[-half:]}"


@functools.cache
def data_uri(path: Path) -> str | None:
    """The picture as a data URI of WebP, small enough for thousands of them; None when it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    picture.thumbnail((336, 336))
    exact, lossy = io.BytesIO(), io.BytesIO()  # drawings are smallest as they are, photographs are not
    picture.save(exact, "webp", lossless=True, method=2)
    picture.save(lossy, "webp", quality=60, method=2)
    return f"data:image/webp;base64,{base64.b64encode(min(exact.getvalue(), lossy.getvalue(), key=len)).decode()}"


def read_pages(run: Run) -> list[tuple[str, int, list[dict]]]:
    """(kind, step, groups) of a run's samples; exact answers say how they changed since the first evaluation."""
    pages = []
    for kind in ("eval", "train"):
        files = list(run.sample_files(kind).items())
        for step, path in spread_evenly(files, math.ceil(len(files) / MAX_PAGES) or 1):
            if groups := run.read_samples(path):
                pages.append((kind, step, groups))
    evaluations = [groups for kind, _, groups in pages if kind == "eval" and run.exact]
    for groups in evaluations[1:]:
        for change, examples in changes(evaluations[0], groups).items():
            for _, example in examples:
                example["change"] = change
    return pages


def changes(first: list[dict], last: list[dict]) -> dict[str, list[tuple[dict, dict]]]:
    """The examples of two evaluations by what became of them: {"wrong → right": [(before, after), …], …}."""
    word = {False: "wrong", True: "right"}
    became = {f"{word[a]} → {word[b]}": [] for a, b in ((False, True), (True, False), (True, True), (False, False))}
    before = {g["id"]: g for g in first if g["completions"]}
    for now in last:
        was = before.get(now["id"])
        if was and now["completions"]:
            right = [g["completions"][0]["right"] for g in (was, now)]
            became[f"{word[right[0]]} → {word[right[1]]}"].append((was, now))
    return became


class Table(dict):
    """Numbers things in the order in which they come, equal ones alike; None stays None."""

    def index(self, item):
        return None if item is None else self.setdefault(item, len(self))


def pack(names: list[str], all_pages: list[list], stride: int, most_groups: int) -> str:
    """The samples as JSON for the page: every `stride`-th step, completions as lists and the best rewarded first."""
    prompts, pictures, runs = Table(), Table(), []

    def short(value: float | None) -> float | None:
        return value if value is None else float(f"{value:.4g}")

    def packed_group(g: dict, components: list[str]) -> list:
        completions = sorted(g["completions"], key=lambda c: -(c["reward"] or 0))
        rows = [[shorten(c["text"]), short(c["reward"]), short(c["advantage"]),
                 [short(c["rewards"].get(name)) for name in components],
                 c["length"], c["truncated"], c["prediction"], c["right"]] for c in completions]  # fmt: skip
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


def to_json(data) -> str:
    """JSON for a script element: without a `<` nothing in it can end the element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def pack_within_budget(names: list[str], all_pages: list[list]) -> str:
    """All samples where they fit, else every second, third, … step, and at last fewer groups of each.

    Packed is gzip in base64, which the page unpacks with the browser's own DecompressionStream.
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


def write_report(groups: list[Group], charts: dict[str, tuple[str, bytes]], summaries: list[dict]) -> bytes:
    """The report as HTML. `charts` maps a name to (title, PNG); `summaries` are those of `groups`."""
    images = [(name, title, f"data:image/png;base64,{base64.b64encode(png).decode()}")
              for name, (title, png) in charts.items()]  # fmt: skip
    page = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    blocks = {
        "SCRIPT_HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "SUMMARY": to_json({"summaries": summaries, "charts": images}),
        "SAMPLES": pack_within_budget([g.name for g in groups], [read_pages(g.runs[0]) for g in groups]),
    }
    return re.sub(r"@@(\w+)@@", lambda found: blocks[found[1]], page).encode()
