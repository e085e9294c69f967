"""What is asked? The tasks: questions, pictures and right answers; and the loader that orders the training examples.

`dataset[i]` is made on request and depends on the task, the split, the seed and i alone, so every process sees the same
question and the same picture, in any order. Train and test are disjoint by construction: a clock's time or a problem's
calculation always belongs to the same split, and the scatter plots of the two splits come from different random
streams.

A new task is one class here, registered in `DATASETS`, and one evaluator class, registered in `evaluator.py` under the
same name. Its tiny model, if it is to have one, is an entry in `tiny_models.py`.
"""

import functools
import hashlib
import inspect
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from arithmetic_generator import ArithmeticGenerator
from clock_image_generator import ClockImageGenerator
from correlation_generator import CorrelationGenerator, axis_limit
from data_files import Columns, hub_table, jsonl_rows, own_rows, parquet_rows
from environments import CALCULATOR, Calculator, Environment
from evaluator import asked_format, get_evaluator
from progress import did_you_mean
from scene_generator import SceneGenerator
from visual_environments import FEEDBACK, ClockFeedback, CorrelationFeedback, Look

if TYPE_CHECKING:
    from prompts import Prompts

SPLITS = ("train", "test")
CALCULATOR_TURNS = 4  # the most turns with a calculator
DEFAULT_SIZES = {"train": 4000, "test": 512}  # of the tasks that make their examples
EVAL_SEED = 0  # every run is tested on the same examples, so that runs can be compared
SYSTEM_PROMPT = "Think first, then answer. Reply in exactly this format:\n" + asked_format("...", "...")


@dataclass(frozen=True)
class Example:
    """One question, with as many image placeholders in its messages as there are images."""

    id: str  # unique, usable as a file name: "clock-train-0-17"
    messages: list[dict]  # chat format: a system message, solved examples if the task shows some, the user's message
    images: list[Image.Image]  # RGB, as the model sees them
    answer: str  # in the form that the task's evaluator reads: "08:15:30", "-0.42", "72"


class Dataset(ABC):
    """Base of the tasks. The keyword-only arguments of a task's constructor are its options.

    Args:
        split: "train" or "test".
        num_examples: number of examples; None: the task's default.
        seed: a different seed gives different examples.
        path: a local folder or file, for a task that reads its data.
    """

    name: str
    modality: str  # "text" or "vision"
    reads_files = False
    shots = 0  # solved examples before each question
    max_turns = 1  # the most turns that the model may take

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
            images = [as_rgb(image) for image in images]
        except Exception as error:
            raise ValueError(f"the example {name} cannot be made: {error!r}") from error
        placeholders = [{"type": "image"} for _ in images]
        content: Any = [*placeholders, {"type": "text", "text": question}] if images else question
        user = {"role": "user", "content": content}
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *self.solved_examples(index), user]
        return Example(name, messages, images, answer)

    @abstractmethod
    def make(self, index: int) -> tuple[str, list[Image.Image], str]:
        """Question, pictures (of any mode) and right answer of an example."""

    def environment(self, example: Example) -> Environment:
        """A new episode of an example: what answers the model's turns."""
        return Environment(example)

    def environments(self, examples: Sequence[Example], num_generations: int = 1) -> list[Environment]:
        """A new episode for each of B = Q·G rows."""
        found = [self.environment(example) for example in examples for _ in range(num_generations)]
        for environment in found:
            environment.max_turns = self.max_turns
        return found

    def solution(self, index: int) -> str:
        """The reasoning that leads to the answer, for a supervised warm-up; empty if the task has none."""
        return ""

    def solved_examples(self, index: int) -> list[dict]:
        """Messages before the question: solved training examples, each one a turn of the user and of the assistant."""
        return []

    def rng(self, index: int) -> np.random.Generator:
        """The source of all randomness of one example."""
        return np.random.default_rng([zlib.crc32(self.name.encode()), SPLITS.index(self.split), self.seed, index])


def checked_size(num_examples: int | None, rows: int, split: str) -> int:
    """The number of examples of a split whose file has so many rows. Raises ValueError if these are too few."""
    if num_examples is not None and num_examples > rows:
        raise ValueError(f"{num_examples:,} {split} examples were asked for, but there are only {rows:,}")
    return rows if num_examples is None else num_examples


def split_of(key: str) -> str:
    """The split of an item, the same in every run and on every machine: by its hash, one item in ten is for testing."""
    return "test" if int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % 10 == 0 else "train"


# ---------------------------------------------------------------------------------------------------------------------
# Vision
# ---------------------------------------------------------------------------------------------------------------------
def as_rgb(picture: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB, upright, transparent parts on white, more than 8 bits of grey scaled to 8.

    The modes I and F (32-bit integers and floats) have no fixed range: white is 255 or, if a value is larger, 65535;
    with floats of at most 1, white is 1.

    Raises:
        ValueError: values below 0, above 65535 or NaN.
        OSError: the picture's file cannot be read.
    """
    picture.load()  # reads and closes the file that a task may have opened
    picture = ImageOps.exif_transpose(picture)  # upright, as a camera was held
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.asarray(picture, dtype=float)  # (height, width)
        whites = {"F": (1, 255, 65535), "I": (255, 65535)}.get(picture.mode, (65535,))  # (65535,): I;16
        white = next((white for white in whites if values.max() <= white), None)
        if white is None or values.min() < 0:
            raise ValueError(f"its grey values are from {values.min():g} to {values.max():g}, not from 0 to 65535")
        picture = Image.fromarray(np.round(values * 255 / white).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


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

    def __init__(
        self,
        *common: Any,
        size: int = 224,
        style: str = "classic",
        rotation: float = 0.0,
        second_hand: bool = True,
    ):
        super().__init__(*common)
        self.generator = ClockImageGenerator(size, style, rotation, second_hand)
        self.times = clock_times(self.split, second_hand)
        if not second_hand:
            self.question += " There is no second hand: SS is 00."

    def make(self, index: int) -> tuple[str, list[Image.Image], str]:
        time = self.times[self.rng(index).integers(len(self.times))]
        hour, minute, second = time // 3600, time // 60 % 60, time % 60
        picture = self.generator_of(index).generate(hour, minute, second)
        return self.question, [picture], f"{hour or 12:02}:{minute:02}:{second:02}"

    def generator_of(self, index: int) -> ClockImageGenerator:
        """The generator of an example's dial."""
        return self.generator


class CorrelationDataset(Dataset):
    """What is the correlation of these points? It is uniform in [-1, 1], rounded to two decimals, and exact.

    Options: `size` (pixels), `num_points`, `style`; see `CorrelationGenerator`.
    """

    name = "correlation"
    modality = "vision"
    question = "What is the correlation of the points? Answer with a number from -1.00 to 1.00."

    def __init__(self, *common: Any, size: int = 224, num_points: int = 75, style: str = "classic"):
        super().__init__(*common)
        self.generator = CorrelationGenerator(size, num_points, style)

    def make(self, index: int) -> tuple[str, list[Image.Image], str]:
        r, x, y = self.points(index)
        return self.question, [self.generator.draw(x, y)], f"{r:.2f}"

    def points(self, index: int) -> tuple[float, np.ndarray, np.ndarray]:
        """An example's correlation and its points x and y, (N,) each."""
        rng = self.rng(index)
        r = round(rng.uniform(-1, 1), 2) + 0.0  # + 0.0 makes 0.0 of -0.0
        return r, *self.generator.points(r, rng)


# ---------------------------------------------------------------------------------------------------------------------
# Vision in several turns: what the model writes in a turn is answered with a picture, see visual_environments.py
# ---------------------------------------------------------------------------------------------------------------------
def checked_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """The value of an option. Raises ValueError unless it is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, not {value!r}")
    return value


def index_of(example: Example) -> int:
    """The index of an example in its dataset, from its id."""
    return int(example.id.rpartition("-")[2])


class LookDataset(Dataset):
    """What colour is the odd shape? The overview is grey; a turn that names a cell is shown it enlarged, in colour.

    Options: `size` (pixels), `cells` (4 or 9), `looks` (turns before the last one), `feedback`; see `Look`.
    """

    name = "look"
    modality = "vision"

    def __init__(self, *common: Any, size: int = 224, cells: int = 4, looks: int = 1, feedback: str = "real"):
        super().__init__(*common)
        if not isinstance(looks, int) or not 1 <= looks <= 8:
            raise ValueError(f"looks must be a whole number from 1 to 8, not {looks!r}")
        self.generator, self.feedback = SceneGenerator(size, cells), checked_choice("feedback", feedback, FEEDBACK)
        self.max_turns = looks + 1
        self.question = (
            "One shape is odd. What colour is it? To see a cell enlarged and in colour, reply with its number and "
            "nothing else."
        )

    def make(self, index: int) -> tuple[str, list[Image.Image], str]:
        scene = self.generator.scene(self.rng(index))
        return self.question, [self.generator.overview(scene)], scene.answer

    def environment(self, example: Example) -> Environment:
        return Look(example, self.feedback, self.generator, self.generator.scene(self.rng(index_of(example))))

    def solution(self, index: int) -> str:
        """The number of the odd cell and the colours of all cells, separated by spaces."""
        scene = self.generator.scene(self.rng(index))
        return " ".join([str(scene.odd), *scene.colours])


class ClockFeedbackDataset(ClockDataset):
    """A clock in two turns: the first answer is drawn, and the second one counts.

    Options: those of `clock` except `rotation`; `feedback` and `view` (see `ClockFeedback`); `improvement` (see
    `FeedbackEvaluator`). Each dial is turned by one of `rotations` equally spaced angles. `marked=false` leaves out the
    triangle, so that only the drawing shows where 12 o'clock is, and makes 12 rotations the default.
    """

    name = "clock_feedback"
    max_turns = 2

    def __init__(
        self,
        *common: Any,
        size: int = 224,
        style: str = "classic",
        second_hand: bool = True,
        marked: bool = True,
        rotations: int | None = None,
        feedback: str = "real",
        view: str = "overlay",
        improvement: float = 0.0,
    ):
        super().__init__(*common, size=size, style=style, second_hand=second_hand)
        count = (1 if marked else 12) if rotations is None else rotations
        if not isinstance(count, int) or not 1 <= count <= 60:
            raise ValueError(f"rotations must be a whole number from 1 to 60, not {rotations!r}")
        self.marked = marked
        self.feedback = checked_choice("feedback", feedback, FEEDBACK)
        self.view = checked_choice("view", view, ClockFeedback.views)
        angles = [360 * i / count for i in range(count)]
        self.generators = [ClockImageGenerator(size, style, angle, second_hand, marked) for angle in angles]

    def generator_of(self, index: int) -> ClockImageGenerator:
        return self.generators[self.rng(index).spawn(1)[0].integers(len(self.generators))]

    def environment(self, example: Example) -> Environment:
        return ClockFeedback(example, self.feedback, self.generator_of(index_of(example)), self.view)

    def solution(self, index: int) -> str:
        """The first answer whose drawing shows where 12 o'clock is, if the dial does not show it."""
        return "" if self.marked else "12:00:00"


class CorrelationFeedbackDataset(CorrelationDataset):
    """A correlation in two turns: the first answer is drawn over the points, and the second one counts.

    Options: those of `correlation`; `feedback` and `view` (see `CorrelationFeedback`); `improvement` (see
    `FeedbackEvaluator`).
    """

    name = "correlation_feedback"
    max_turns = 2

    def __init__(
        self,
        *common: Any,
        size: int = 224,
        num_points: int = 75,
        style: str = "classic",
        feedback: str = "real",
        view: str = "ellipse",
        improvement: float = 0.0,
    ):
        super().__init__(*common, size=size, num_points=num_points, style=style)
        self.feedback = checked_choice("feedback", feedback, FEEDBACK)
        self.view = checked_choice("view", view, CorrelationFeedback.views)

    def environment(self, example: Example) -> Environment:
        _, x, y = self.points(index_of(example))
        return CorrelationFeedback(example, self.feedback, self.generator, self.view, axis_limit(x, y))


# ---------------------------------------------------------------------------------------------------------------------
# Word problems
# ---------------------------------------------------------------------------------------------------------------------
class WordProblems(Dataset):
    """Base of the tasks in GSM8K's form: a question, and an answer text that ends with `#### ` and the number.

    All of them have the option `shots`: the number of solved training examples before each question. With the option
    `calculator` the model may use one (`environments.Calculator`) in the turns before its answer.
    """

    modality = "text"
    instruction = "The answer is a whole number."
    calculator = False

    def give_calculator(self) -> None:
        self.calculator, self.max_turns = True, CALCULATOR_TURNS
        self.instruction = f"{self.instruction} {CALCULATOR}"

    def environment(self, example: Example) -> Environment:
        return Calculator(example) if self.calculator else Environment(example)

    @abstractmethod
    def row(self, index: int) -> dict[str, str]:
        """The problem as {"question": ..., "answer": ...}."""

    def make(self, index: int) -> tuple[str, list[Image.Image], str]:
        row = self.row(index)
        return f"{row['question']}\n{self.instruction}", [], gold_number(row["answer"])

    def solution(self, index: int) -> str:
        """The worked steps, one a line, without GSM8K's calculator notes in `<<...>>`."""
        return re.sub(r"<<[^>]*>>", "", self.row(index)["answer"].rpartition("####")[0]).strip()

    def set_shots(self, shots: object, training_set: "Callable[[], WordProblems]") -> None:
        """Show the first `shots` training examples, solved, before each question; the next one replaces an example
        with the solution of the question itself. `training_set` does not depend on the seed of the run.

        Raises:
            ValueError: `shots` is no whole number, negative, or too large for the training set.
        """
        if type(shots) is not int or shots < 0:
            raise ValueError(f"shots must be a whole number, 0 or more, not {shots!r}")
        self.shots = shots
        self.solved: dict[str, list[dict]] = {}  # by solution
        if shots == 0:
            return
        training = training_set()
        for i in range(len(training)):
            example = training[i]
            reply = {"role": "assistant", "content": asked_format(training.solution(i), example.answer)}
            self.solved.setdefault(training.row(i)["answer"], [example.messages[-1], reply])
            if len(self.solved) > shots:
                return
        raise ValueError(
            f"shots must be at most {len(self.solved) - 1}, not {shots}: the {len(training):,} training examples have "
            f"{len(self.solved)} different solutions, and the question's own is not shown"
        )

    def solved_examples(self, index: int) -> list[dict]:
        if not self.shots:
            return []
        own = self.row(index)["answer"]
        others = [turns for answer, turns in self.solved.items() if answer != own]
        return [turn for turns in others[: self.shots] for turn in turns]


def gold_number(answer: str) -> str:
    """The number after the last `####`, without thousands separators; empty where there is none."""
    gold = answer.rpartition("####")[2].strip().replace(",", "") if "####" in answer else ""
    return gold if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", gold) else ""


GSM8K = "openai/gsm8k"  # on the hub


class GSM8KDataset(WordProblems):
    """Grade-school word problems (Cobbe et al., 2021) in their official splits: `openai/gsm8k`, or a local copy.

    `path` is a folder with train.jsonl and test.jsonl, a folder of parquet files as on the hub, or a single JSONL file,
    whose last tenth becomes the test split and the rest the training split. The seed changes nothing, and
    `num_examples` takes the first rows. Options: `shots`, `calculator`.
    """

    name = "gsm8k"
    reads_files = True

    def __init__(
        self,
        split: str,
        num_examples: int | None = None,
        seed: int = 0,
        path: str | None = None,
        *,
        shots: int = 0,
        calculator: bool = False,
    ):
        super().__init__(split, num_examples, seed, path)
        if calculator:
            self.give_calculator()
        self.rows = load_hub_rows(split) if path is None else load_local_rows(Path(path), split)
        self.num_examples = checked_size(num_examples, len(self.rows), split)
        self.set_shots(shots, lambda: GSM8KDataset("train", path=path))

    def row(self, index: int) -> dict[str, str]:
        return self.rows[index]


def load_hub_rows(split: str) -> list[dict]:
    """The rows of a split of `openai/gsm8k`, from the hub or its cache on this machine.

    Raises:
        ConnectionError: neither gives them; the message is one line.
    """
    try:
        table = hub_table(GSM8K, "main", split)
    except ConnectionError as error:
        raise ConnectionError(f"GSM8K could not be loaded ({error}); give a local copy with --dataset_path") from error
    return checked_rows(enumerate(table, 1), f"{GSM8K} ({split}), row")


def load_local_rows(path: Path, split: str) -> list[dict]:
    """The rows of a split in a local folder or JSONL file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty or a line is malformed; the message names the line.
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
    return checked_rows(jsonl_rows(path), f"{path}, line")


def read_parquet(path: Path) -> list[dict]:
    return checked_rows(parquet_rows(path), f"{path}, row")


def checked_rows(numbered_rows: Iterable[tuple[int, object]], place: str) -> list[dict]:
    """The rows, if each has GSM8K's form; else a ValueError that names `place` and the number of the row."""
    checked = []
    for number, row in numbered_rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
            raise ValueError(f'{place} {number}: expected an object with the texts "question" and "answer"')
        if not row["question"].strip():
            raise ValueError(f"{place} {number}: the question is empty")
        if re.search("[\ud800-\udfff]", row["question"] + row["answer"]):
            raise ValueError(f"{place} {number}: a text has half of a surrogate pair, which is no character")
        if not gold_number(row["answer"]):
            raise ValueError(f"{place} {number}: the answer does not end with '#### ' and a number")
        checked.append({"question": row["question"], "answer": row["answer"]})
    return checked


class ArithmeticDataset(WordProblems):
    """Generated word problems, so that a tiny text model can learn offline.

    Options: `steps`, `max_number`, see `ArithmeticGenerator`; `shots`; `calculator`. A calculation belongs to one
    split, in every story.
    """

    name = "arithmetic"

    def __init__(self, *common: Any, steps: int = 2, max_number: int = 30, shots: int = 0, calculator: bool = False):
        super().__init__(*common)
        if calculator:
            self.give_calculator()
        self.generator = ArithmeticGenerator(steps, max_number)
        self.set_shots(shots, lambda: ArithmeticDataset("train", steps=steps, max_number=max_number))

    def row(self, index: int) -> dict[str, str]:
        rng = self.rng(index)
        calculation = self.generator.calculation(rng)
        while split_of(f"arithmetic {calculation}") != self.split:
            calculation = self.generator.calculation(rng)
        return self.generator.tell(calculation, rng)


# ---------------------------------------------------------------------------------------------------------------------
# One's own data
# ---------------------------------------------------------------------------------------------------------------------
class OwnDataset(Dataset):
    """Questions, answers and pictures of one's own: a file, a folder, or a data set of the hub (see `own_rows`).

    Options: `reward`, how answers are read and scored (see `evaluator.REWARDS`); `test`, the file of the test split;
    `question`, `answer`, `image`, the names of the columns; `subset`, the configuration of a data set of the hub.
    `num_examples` takes the first rows, and the seed changes nothing.
    """

    name = "jsonl"
    modality = "text"  # "vision" for rows with pictures
    reads_files = True

    def __init__(
        self,
        split: str,
        num_examples: int | None = None,
        seed: int = 0,
        path: str | None = None,
        *,
        reward: str = "number",
        test: str = "",
        question: str = "question",
        answer: str = "answer",
        image: str = "",
        subset: str = "",
    ):
        super().__init__(split, num_examples, seed, path)
        if path is None:
            raise ValueError("the task 'jsonl' needs --dataset_path: a file, a folder, or a data set of the hub")
        columns, evaluator = (
            Columns(str(question), str(answer), str(image)),
            get_evaluator(self.name, {"reward": reward}),
        )
        self.rows = own_rows(path, split, columns, str(test), str(subset))
        self.golds: list[str] = []
        for row in self.rows:
            gold = evaluator.canonical(row.answer)
            if gold is None:
                raise ValueError(f"{row.place}: the answer {row.answer[:80]!r} cannot be read as reward={reward}")
            self.golds.append(gold)
        self.num_examples = checked_size(num_examples, len(self.rows), split)
        if any(row.pictures for row in self.rows[: self.num_examples]):
            self.modality = "vision"

    def make(self, index: int) -> tuple[str, list[Image.Image], str]:
        row = self.rows[index]
        return row.question, [open_picture() for open_picture in row.pictures], self.golds[index]


# ---------------------------------------------------------------------------------------------------------------------
# Finding a task
# ---------------------------------------------------------------------------------------------------------------------
DATASETS: dict[str, type[Dataset]] = {
    dataset.name: dataset
    for dataset in (
        GSM8KDataset,
        ClockDataset,
        CorrelationDataset,
        ArithmeticDataset,
        LookDataset,
        ClockFeedbackDataset,
        CorrelationFeedbackDataset,
        OwnDataset,
    )
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
    **more_options: Any,
) -> Dataset:
    """A split of a task.

    Args:
        name: a key of `DATASETS`.
        split: "train" or "test".
        size: number of examples; None: the task's default.
        seed: a different seed gives different examples.
        path: local data, for a task that reads files.
        options: the task's options, as a dict because one may be called `size`; values may be texts, as they come from
            a command line. Further keywords are options too.

    Raises:
        ValueError: an unknown task, split or option (the message names the nearest), a bad value, or malformed data.
        OSError: data that are missing or cannot be reached.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no task {name!r}; {did_you_mean(name, DATASETS)}")
    known = dataset_options(name)
    values = {**(options or {}), **more_options}
    for option in values:
        if option not in known:
            raise ValueError(f"the task {name!r} has no option {option!r}; {did_you_mean(option, known)}")
    return DATASETS[name](split, size, seed, path, **{option: parse_option(value) for option, value in values.items()})


def parse_option(value: Any) -> Any:
    """The value of a text: a whole number, a number, true or false; else the text itself."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(value.lower(), value)


# ---------------------------------------------------------------------------------------------------------------------
# The order of training


class TrainLoader:
    """An endless iterator over batches of exactly `prompts_per_step` examples, shuffled again in every epoch.

    The order within an epoch depends on (seed, epoch) alone; a batch may take examples from two epochs. With `encode`
    the next batch is drawn and encoded in a thread while the loop works on this one, and an example whose prompt is
    longer than `max_prompt_length` is skipped: each prompt is encoded once.

    Args:
        encode: examples -> encoded prompts. None: the loader gives examples without prompts.
        max_prompt_length: in tokens, pictures included; None: no limit.

    Attributes:
        epoch: passes over the dataset so far. skipped: prompts skipped so far, counted once in each epoch. Both
            describe the batch handed out last, not the one that is being prepared.
    """

    def __init__(
        self,
        dataset: Dataset,
        prompts_per_step: int,
        seed: int = 0,
        encode: "Callable[[list[Example]], Prompts] | None" = None,
        max_prompt_length: int | None = None,
    ):
        if prompts_per_step < 1:
            raise ValueError(f"a step needs at least 1 prompt, not {prompts_per_step}")
        if len(dataset) < prompts_per_step:
            raise ValueError(f"{len(dataset)} training examples are too few for {prompts_per_step} prompts a step")
        self.dataset = dataset
        self.prompts_per_step = prompts_per_step
        self.steps_per_epoch = len(dataset) // prompts_per_step
        self._seed, self._encode, self._max_prompt_length = seed, encode, max_prompt_length
        self._skipped = 0
        self._start_epoch(0)
        self._state = self._current_state()  # after the batch handed out last
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if encode else None
        self._upcoming: Future | None = None

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> tuple[list[Example], Any]:
        """Q examples and their encoded prompts (None without `encode`)."""
        if self._pool is None:
            batch, self._state = self._prepare()
            return batch
        upcoming = self._upcoming or self._pool.submit(self._prepare)
        batch, self._state = upcoming.result()
        self._upcoming = self._pool.submit(self._prepare)
        return batch

    @property
    def epoch(self) -> float:
        return self._state["epoch"] + self._state["position"] / len(self.dataset)

    @property
    def skipped(self) -> int:
        return self._state["skipped"]

    def state_dict(self) -> dict[str, int]:
        """The position after the batch handed out last, in plain integers."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state`.

        Raises:
            ValueError: `state` belongs to a dataset of another size.
        """
        if state["size"] != len(self.dataset):
            raise ValueError(f"the saved run had {state['size']} training examples, this one has {len(self.dataset)}")
        if self._upcoming is not None:
            wait([self._upcoming])  # the thread must not move the position any more; its error no longer matters
            self._upcoming = None
        self._start_epoch(state["epoch"])
        self._position, self._kept, self._skipped = state["position"], state["kept"], state["skipped"]
        self._state = self._current_state()

    def close(self) -> None:
        """Stop prefetching."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _prepare(self) -> "tuple[tuple[list[Example], Prompts | None], dict[str, int]]":
        """The next batch, and the loader's state after it."""
        examples: list[Example] = []
        parts = []
        while len(examples) < self.prompts_per_step:
            drawn = self._draw(self.prompts_per_step - len(examples))
            if self._encode is not None:
                prompts = self._encode(drawn)
                longest = self._max_prompt_length or max(prompts.lengths)
                fitting = [i for i, length in enumerate(prompts.lengths) if length <= longest]
                self._skipped += len(drawn) - len(fitting)
                if not fitting:
                    continue
                drawn, prompts = [drawn[i] for i in fitting], prompts.select(fitting)
                parts.append(prompts)
            self._kept += len(drawn)
            examples += drawn
        encoded = parts[0].cat(parts) if parts else None
        return (examples, encoded), self._current_state()

    def _draw(self, count: int) -> list[Example]:
        """At most `count` examples: those left of this epoch, or the first of the next one if none is left."""
        if self._position == len(self.dataset):
            if self._kept == 0:
                hint = "; lower shots in --dataset_options" if self.dataset.shots else ""
                raise ValueError(f"all {len(self.dataset)} training prompts are longer than --max_prompt_length{hint}")
            self._start_epoch(self._epoch + 1)
        indices = self._order[self._position : self._position + count]
        self._position += len(indices)
        return [self.dataset[int(index)] for index in indices]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch  # epochs completed
        self._position = 0  # examples of this epoch drawn so far
        self._kept = 0  # those of them that were used
        self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self.dataset))

    def _current_state(self) -> dict[str, int]:
        state = {"epoch": self._epoch, "position": self._position, "kept": self._kept, "skipped": self._skipped}
        return {**state, "size": len(self.dataset)}


def get_dataloaders(
    name: str,
    prompts_per_step: int,
    train_size: int | None = None,
    eval_size: int | None = None,
    seed: int = 0,
    path: str | None = None,
    options: dict | None = None,
    encode: "Callable[[list[Example]], Prompts] | None" = None,
    max_prompt_length: int | None = None,
    max_turns: int | None = None,
) -> tuple[TrainLoader, Dataset]:
    """The training loader and the test set of a task; the test set is the same for every seed. `max_turns` lowers the
    number of turns that the task allows."""
    train = get_dataset(name, "train", train_size, seed, path, options)
    test = get_dataset(name, "test", eval_size, EVAL_SEED, path, options)
    for dataset in (train, test):
        dataset.max_turns = min(dataset.max_turns, max_turns or dataset.max_turns)
    return TrainLoader(train, prompts_per_step, seed, encode, max_prompt_length), test
