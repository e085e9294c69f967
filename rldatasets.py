"""The tasks: what a model is asked, with which pictures, and the answer that is right.

Nothing is stored: an example is made when it is asked for, and `dataset[i]` depends on the task, the split, the seed
and i alone. So every process, in any order, sees the same question and the same picture. Train and test are disjoint by
construction: a clock's time or a problem's calculation belongs to one split for good, and the scatter plots of the two
splits are drawn from different random streams.

Adding a task is one class here, registered in `DATASETS`, and one evaluator in `evaluator.py` under the same name.
"""

import difflib
import functools
import hashlib
import inspect
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from arithmetic_generator import ArithmeticGenerator
from clock_image_generator import ClockImageGenerator
from correlation_generator import CorrelationGenerator

SPLITS = ("train", "test")
DEFAULT_SIZES = {"train": 4000, "test": 512}  # of the tasks that make their own examples
EVAL_SEED = 0  # whatever seed a run has, it is tested on the same examples, so that runs can be compared
SYSTEM_PROMPT = """\
Think first, then answer. Reply in exactly this format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""


@dataclass(frozen=True)
class Example:
    """One question, with as many image placeholders in its messages as there are images."""

    id: str  # unique, usable as a file name: "clock-train-0-17"
    messages: list[dict]  # chat format: a system message and a user message
    images: list[Image.Image]
    answer: str  # the right answer in the form the evaluator reads: "08:15:30", "-0.42", "72"


class Dataset(ABC):
    """Base of the tasks. The keyword-only arguments of a task's constructor are its options.

    Args:
        split: "train" or "test".
        num_examples: how many examples there are; the task's default where None.
        seed: another seed, other examples.
        path: a local folder or file, for a task that reads its data.
    """

    name: str
    modality: str  # "text" or "vision"
    reads_files = False

    def __init__(self, split: str, num_examples: int | None = None, seed: int = 0, path: str | None = None):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
        if num_examples is not None and num_examples < 1:
            raise ValueError(f"a dataset needs at least 1 example, not {num_examples}")
        if seed < 0:
            raise ValueError(f"a seed is 0 or more, not {seed}")
        if path is not None and not self.reads_files:
            raise ValueError(f"the task {self.name!r} makes its own examples and takes no dataset path")
        self.split = split
        self.num_examples = num_examples or DEFAULT_SIZES[split]
        self.seed = seed

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has examples 0 to {len(self) - 1}, not {index}")
        name = f"{self.name}-{self.split}-{self.seed}-{index}"
        try:
            question, images, answer = self.make(index)
        except Exception as error:
            raise ValueError(f"the example {name} cannot be made: {error!r}") from error
        placeholders = [{"type": "image"} for _ in images]
        content = [*placeholders, {"type": "text", "text": question}] if images else question
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": content}]
        return Example(name, messages, images, answer)

    @abstractmethod
    def make(self, index: int) -> tuple[str, list[Image.Image], str]:
        """Question, pictures and right answer of an example."""

    def solution(self, index: int) -> str:
        """The reasoning that leads to the answer, for a supervised warm-up; empty where there is nothing to tell."""
        return ""

    def rng(self, index: int) -> np.random.Generator:
        """The source of everything random about one example."""
        return np.random.default_rng([zlib.crc32(self.name.encode()), SPLITS.index(self.split), self.seed, index])


def split_of(key: str) -> str:
    """The split that a thing belongs to in every run and on every machine: by its hash, one in ten is for testing."""
    return "test" if int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % 10 == 0 else "train"


# ---------------------------------------------------------------------------------------------------------------------
# Vision
# ---------------------------------------------------------------------------------------------------------------------
@functools.cache
def clock_times(split: str, second_hand: bool) -> list[int]:
    """The times of a split, in seconds after 12 o'clock; whole minutes only where there is no second hand."""
    return [time for time in range(0, 43200, 1 if second_hand else 60) if split_of(f"clock {time}") == split]


class ClockDataset(Dataset):
    """What time does this clock show? The answer is HH:MM:SS, with hours from 01 to 12.

    Options: `size` (pixels), `style`, `rotation` (degrees clockwise), `second_hand`; see `ClockImageGenerator`.
    """

    name = "clock"
    modality = "vision"
    question = "What time does the clock show? Answer as HH:MM:SS."

    def __init__(self, *common, size=224, style="classic", rotation=0.0, second_hand=True):
        super().__init__(*common)
        self.generator = ClockImageGenerator(size, style, rotation, second_hand)
        self.times = clock_times(self.split, second_hand)
        if not second_hand:
            self.question += " There is no second hand: SS is 00."

    def make(self, index: int) -> tuple[str, list[Image.Image], str]:
        time = self.times[self.rng(index).integers(len(self.times))]
        hour, minute, second = time // 3600, time // 60 % 60, time % 60
        picture = self.generator.generate(hour, minute, second)
        return self.question, [picture], f"{hour or 12:02}:{minute:02}:{second:02}"


class CorrelationDataset(Dataset):
    """What is the correlation of these points? It is uniform in [-1, 1], rounded to two decimals, and exact.

    Options: `size` (pixels), `num_points`, `style`; see `CorrelationGenerator`.
    """

    name = "correlation"
    modality = "vision"
    question = "What is the correlation of the points? Answer with a number from -1.00 to 1.00."

    def __init__(self, *common, size=224, num_points=75, style="classic"):
        super().__init__(*common)
        self.generator = CorrelationGenerator(size, num_points, style)

    def make(self, index: int) -> tuple[str, list[Image.Image], str]:
        rng = self.rng(index)
        r = round(rng.uniform(-1, 1), 2) + 0.0  # + 0.0 makes 0.0 of -0.0
        return self.question, [self.generator.generate(r, rng)], f"{r:.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# Word problems
# ---------------------------------------------------------------------------------------------------------------------
class WordProblems(Dataset):
    """Base of the tasks in GSM8K's form: a question, and an answer text that ends with `#### ` and the number."""

    modality = "text"
    instruction = "The answer is a whole number."

    @abstractmethod
    def row(self, index: int) -> dict[str, str]:
        """The problem as {"question": ..., "answer": ...}."""

    def make(self, index: int) -> tuple[str, list[Image.Image], str]:
        row = self.row(index)
        return f"{row['question']}\n{self.instruction}", [], gold_number(row["answer"])

    def solution(self, index: int) -> str:
        """The worked steps, one a line, without GSM8K's calculator notes in `<<...>>`."""
        return re.sub(r"<<[^>]*>>", "", self.row(index)["answer"].rpartition("####")[0]).strip()


def gold_number(answer: str) -> str:
    """The number after the last `####`, without thousands separators; empty where there is none."""
    gold = answer.rpartition("####")[2].strip().replace(",", "") if "####" in answer else ""
    return gold if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", gold) else ""


class GSM8KDataset(WordProblems):
    """Grade-school word problems (Cobbe et al., 2021) in their official splits: `openai/gsm8k`, or a local copy.

    `path` is a folder with train.jsonl and test.jsonl, a folder of parquet files as on the hub, or a single JSONL file,
    whose last tenth is then the test split and the rest the training split. The data are fixed, so the seed changes
    nothing, and `num_examples` takes the first ones.
    """

    name = "gsm8k"
    reads_files = True

    def __init__(self, split: str, num_examples: int | None = None, seed: int = 0, path: str | None = None):
        super().__init__(split, num_examples, seed, path)
        self.rows = load_hub_rows(split) if path is None else load_local_rows(Path(path), split)
        self.num_examples = len(self.rows) if num_examples is None else num_examples
        if self.num_examples > len(self.rows):
            raise ValueError(f"{num_examples:,} {split} examples were asked for, but there are only {len(self.rows):,}")

    def row(self, index: int) -> dict[str, str]:
        return self.rows[index]


def load_hub_rows(split: str) -> list[dict]:
    """The rows of a split of `openai/gsm8k`, from the hub or a copy that it left on this machine."""
    import datasets  # takes seconds to import, and only this needs it

    try:
        table = datasets.load_dataset("openai/gsm8k", "main", split=split)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(f"GSM8K could not be loaded ({reason}); give a local copy with --dataset_path") from error
    return checked_rows(table, f"openai/gsm8k ({split}), row")


def load_local_rows(path: Path, split: str) -> list[dict]:
    """The rows of a split in a local folder or JSONL file.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for an empty file or a malformed line, naming the line.
    """
    if path.is_file():
        rows = read_jsonl(path)
        test_size = max(1, len(rows) // 10)
        if len(rows) < 2:
            raise ValueError(f"{path} has one problem; at least two are needed, since the last tenth is the test split")
        return rows[:-test_size] if split == "train" else rows[-test_size:]
    if not path.exists():
        raise FileNotFoundError(f"there is no dataset file or folder {path}")
    if (path / f"{split}.jsonl").is_file():
        return read_jsonl(path / f"{split}.jsonl")
    tables = sorted([*path.glob(f"{split}*.parquet"), *path.glob(f"main/{split}*.parquet")])
    if not tables:
        raise FileNotFoundError(f"the dataset folder {path} has neither {split}.jsonl nor {split}*.parquet")
    return [row for table in tables for row in read_parquet(table)]


def read_jsonl(path: Path) -> list[dict]:
    def parse(line: str, number: int) -> object:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error

    try:
        lines = path.read_text(encoding="utf-8").rstrip().split("\n")  # splitlines() would also split inside of texts
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8") from error
    if lines == [""]:
        raise ValueError(f"{path} is empty")
    return checked_rows((parse(line, number) for number, line in enumerate(lines, 1)), f"{path}, line")


def read_parquet(path: Path) -> list[dict]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is not a readable parquet file") from error
    return checked_rows(table, f"{path}, row")


def checked_rows(rows: Iterable, place: str) -> list[dict]:
    """The rows, each in GSM8K's form; `place` and the row's number, from 1, tell where one is not."""
    checked = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
            raise ValueError(f'{place} {number}: expected an object with the texts "question" and "answer"')
        if not row["question"].strip():
            raise ValueError(f"{place} {number}: the question is empty")
        if not gold_number(row["answer"]):
            raise ValueError(f"{place} {number}: the answer does not end with '#### ' and a number")
        checked.append({"question": row["question"], "answer": row["answer"]})
    return checked


class ArithmeticDataset(WordProblems):
    """Word problems made here, so that a tiny text model has something to learn offline.

    Options: `steps`, `max_number`; see `ArithmeticGenerator`. A calculation belongs to one split, whoever and whatever
    it is told about.
    """

    name = "arithmetic"

    def __init__(self, *common, steps=2, max_number=30):
        super().__init__(*common)
        self.generator = ArithmeticGenerator(steps, max_number)

    def row(self, index: int) -> dict[str, str]:
        rng = self.rng(index)
        calculation = self.generator.calculation(rng)
        while split_of(f"arithmetic {calculation}") != self.split:
            calculation = self.generator.calculation(rng)
        return self.generator.tell(calculation, rng)


# ---------------------------------------------------------------------------------------------------------------------
# Finding a task, and the order of training
# ---------------------------------------------------------------------------------------------------------------------
DATASETS: dict[str, type[Dataset]] = {
    dataset.name: dataset for dataset in (GSM8KDataset, ClockDataset, CorrelationDataset, ArithmeticDataset)
}


def dataset_options(name: str) -> dict[str, object]:
    """The options of a task with their defaults."""
    parameters = inspect.signature(DATASETS[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def get_dataset(
    name: str,
    split: str,
    size: int | None = None,
    seed: int = 0,
    path: str | None = None,
    options: dict | None = None,
    **more_options,
) -> Dataset:
    """A split of a task.

    Args:
        name: a key of `DATASETS`.
        split: "train" or "test".
        size: how many examples; the task's default where None.
        seed: another seed, other examples.
        path: local data, for a task that reads some.
        options: the task's own options: a dict, since one may be called `size` too. Values may be texts, as they come
            from a command line. Further keywords are options as well.

    Raises:
        ValueError: for an unknown task, split or option, naming the nearest; for a bad value; for malformed data.
        OSError: for data that are not there or cannot be reached.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no task {name!r}; {_suggestion(name, DATASETS)}")
    known = dataset_options(name)
    values = {**(options or {}), **more_options}
    for option in values:
        if option not in known:
            raise ValueError(f"the task {name!r} has no option {option!r}; {_suggestion(option, known)}")
    return DATASETS[name](split, size, seed, path, **{option: _parsed(value) for option, value in values.items()})


def _suggestion(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known) or 'none'}"


def _parsed(value: object) -> object:
    """What a text stands for: a whole number, a number, true or false; else the text itself."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(value.lower(), value)


class TrainLoader:
    """An endless iterator over lists of exactly `prompts_per_step` examples, shuffled anew for every epoch.

    The order within an epoch depends on (seed, epoch) alone; a step may take examples from two epochs. Examples that
    `keep` refuses are left out and counted in `skipped`, once each time they come up.
    """

    def __init__(
        self,
        dataset: Dataset,
        prompts_per_step: int,
        seed: int = 0,
        keep: Callable[[Example], bool] | None = None,
    ):
        if prompts_per_step < 1:
            raise ValueError(f"a step needs at least 1 prompt, not {prompts_per_step}")
        if len(dataset) < prompts_per_step:
            raise ValueError(f"{len(dataset)} training examples are too few for {prompts_per_step} prompts a step")
        self.dataset = dataset
        self.prompts_per_step = prompts_per_step
        self.steps_per_epoch = len(dataset) // prompts_per_step
        self.skipped = 0  # examples left out so far
        self._seed = seed
        self._keep = keep
        self._start_epoch(0)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> list[Example]:
        return [self._next_example() for _ in range(self.prompts_per_step)]

    @property
    def epoch(self) -> float:
        """How many times the dataset has been gone through."""
        return self._epoch + self._position / len(self.dataset)

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands, in plain integers."""
        state = {"epoch": self._epoch, "position": self._position, "kept": self._kept, "skipped": self.skipped}
        return {**state, "size": len(self.dataset)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where `state` was taken.

        Raises:
            ValueError: if that was in a dataset of another size.
        """
        if state["size"] != len(self.dataset):
            raise ValueError(f"the saved run had {state['size']} training examples, this one has {len(self.dataset)}")
        self._start_epoch(state["epoch"])
        self._position, self._kept, self.skipped = state["position"], state["kept"], state["skipped"]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch  # epochs completed
        self._position = 0  # examples of this epoch gone by
        self._kept = 0  # those of them that were used
        self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self.dataset))

    def _next_example(self) -> Example:
        while True:
            if self._position == len(self.dataset):
                if self._kept == 0:
                    raise ValueError(
                        f"all {len(self.dataset)} training examples were left out: their prompts are too long"
                    )
                self._start_epoch(self._epoch + 1)
            example = self.dataset[int(self._order[self._position])]
            self._position += 1
            if self._keep is None or self._keep(example):
                self._kept += 1
                return example
            self.skipped += 1


def get_dataloaders(
    name: str,
    prompts_per_step: int,
    train_size: int | None = None,
    eval_size: int | None = None,
    seed: int = 0,
    path: str | None = None,
    options: dict | None = None,
    keep: Callable[[Example], bool] | None = None,
) -> tuple[TrainLoader, Dataset]:
    """The training loader and the test set of a task; the test set is the same for every seed."""
    train = get_dataset(name, "train", train_size, seed, path, options)
    test = get_dataset(name, "test", eval_size, EVAL_SEED, path, options)
    return TrainLoader(train, prompts_per_step, seed, keep), test
