"""How do other tools see a run? The logs in TensorBoard, Weights & Biases or Trackio; a checkpoint's model card.

The packages of the trackers are imported only when --report_to names them. Their copies of the logs are for looking at:
the run folder remains what a run is resumed from.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progress import format_value

if TYPE_CHECKING:
    from config import Config
    from evaluator import Headline

PROJECT = "grpo-by-hand"  # the name under which wandb and trackio collect the runs
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

# ---------------------------------------------------------------------------------------------------------------------
# Trackers


class TensorBoard:
    """Event files in OUTPUT_DIR/tensorboard. A resumed run hides the points after its checkpoint."""

    def __init__(self, folder: Path, flags: dict[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self.writer.add_text("flags", f"```\n{json.dumps(flags, indent=1)}\n```", step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Service:
    """wandb or trackio, which have the same three functions. A resumed run becomes another run there."""

    def __init__(self, package: str, folder: Path, flags: dict[str, Any]):
        self.package = importlib.import_module(package)
        more = {"dir": str(folder)} if package == "wandb" else {}
        self.package.init(project=PROJECT, name=folder.resolve().name, config=flags, **more)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.package.log(values, step=step)

    def close(self) -> None:
        self.package.finish()


class Trackers:
    """All trackers of a run; none by default."""

    def __init__(self, names: list[str], folder: Path, flags: dict[str, Any], step: int = 0):
        self.open: list[TensorBoard | Service] = []
        for name in dict.fromkeys(names):
            if name == "tensorboard":
                self.open.append(TensorBoard(folder, flags, step))
            elif name != "none":
                self.open.append(Service(name, folder, flags))

    def log(self, kind: str, step: int, record: dict[str, Any]) -> None:
        """Log the finite numbers of a record as `kind/name`; `kind` is train or eval."""
        if not self.open:
            return
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in record.items()
            if isinstance(value, int | float) and math.isfinite(value) and name != "step"
        }
        for tracker in self.open:
            tracker.log(step, numbers)

    def close(self) -> None:
        for tracker in self.open:
            tracker.close()


# ---------------------------------------------------------------------------------------------------------------------
# The model card


def with_model_card(save: Callable[[Path], object], card: str) -> Callable[[Path], None]:
    """A function that saves the model and its card into a folder."""

    def save_both(folder: Path) -> None:
        save(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    return save_both


def model_card(
    config: Config, description: dict[str, Any], headline: Headline, evals: dict[int, dict], step: int
) -> str:
    """The README.md of a checkpoint in the form of the hub: a head in YAML, then Markdown.

    `description` is config.json; `evals` are the metrics of the evaluations by step.
    """

    base, data = config.model_path, config.dataset_path or config.dataset_name
    vision = description["task"]["modality"] == "vision"
    head = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if vision else "text-generation",
        "tags": ["grpo", "reinforcement-learning"],
    }
    if is_hub_name(base):
        head |= {"base_model": base}
    if is_hub_name(data):
        head |= {"datasets": [data]}
    rows = [
        f"| {at} | {found['num_examples']} | {format_value(found['avg_reward'])} | "
        f"{format_value(found[headline.metric], headline.unit)} |"
        for at, found in sorted(evals.items())
    ]
    options = " ".join(f"{name}={value}" for name, value in config.dataset_options.items())
    return "\n".join([
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in head.items()),  # JSON is YAML
        "---",
        "",
        f"# {one_line(Path(base).name)}, step {step} of GRPO on {one_line(config.dataset_name)}",
        "",
        f"- base: `{one_line(base)}`",
        f"- data: `{one_line(' '.join(filter(None, (config.dataset_name, config.dataset_path, options))))}`",
        f"- step: {step} of {config.max_steps}, {config.prompts_per_step} prompts × {config.num_generations} "
        f"completions each, objective {config.objective.name}, β {config.objective.beta:g}, "
        f"learning rate {config.learning_rate:g}",
        f"- code: commit {description.get('commit') or 'unknown'}, seed {config.seed}",
        "",
        "```",
        one_line(shlex.join(["python", "main.py", *config.argv])),
        "```",
        "",
        "Greedy answers to the test examples, up to this step:",
        "",
        f"| step | examples | mean reward | {headline.label} |",
        "|---:|---:|---:|---:|",
        *rows,
        "",
    ])  # fmt: skip


def is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def one_line(text: str) -> str:
    """Text that ends no line and no code of the card."""
    return " ".join(text.replace("`", "'").split())
