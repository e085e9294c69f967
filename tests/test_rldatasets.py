"""Examples are pure functions of (split, seed, index), train and test are disjoint, and the loader resumes exactly."""

import codecs
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from bad_hub import bad_hub
from hypothesis import given, settings
from hypothesis import strategies as st
from other_process import ROOT, run_python
from PIL import Image

import data_files
from clock_image_generator import ClockImageGenerator
from evaluator import EVALUATORS, asked_format, get_evaluator
from rldatasets import (
    DATASETS,
    EVAL_SEED,
    SPLITS,
    Dataset,
    GSM8KDataset,
    TrainLoader,
    clock_times,
    dataset_options,
    get_dataloaders,
    get_dataset,
    split_of,
)

GENERATED = [name for name, task in DATASETS.items() if not task.reads_files]
IN_GSM8K_FORM = [name for name, task in DATASETS.items() if issubclass(task, GSM8KDataset)]
SMALL = {name: {"size": 56} if "size" in dataset_options(name) else {} for name in DATASETS}  # small pictures


def write_problems(path, count: int, start: int = 0):
    """A JSONL file in GSM8K's form."""
    rows = [
        {
            "question": f"Tilda picks {i} plums and then 1,000 more. How many plums is that?",
            "answer": f"She has {i}+1000=<<{i}+1000={i + 1000}>>{i + 1000} plums.\n#### {i + 1000:,}",
        }
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def problems(tmp_path):
    """A folder laid out as GSM8K's."""
    write_problems(tmp_path / "train.jsonl", 30)
    write_problems(tmp_path / "test.jsonl", 10, start=500)
    return str(tmp_path)


def fingerprint(example) -> str:
    """A hash of all of an example, the bytes of its pictures included."""
    digest = hashlib.sha256(json.dumps([example.id, example.messages, example.answer]).encode())
    for image in example.images:
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def user_text(example) -> str:
    content = example.messages[-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


@pytest.mark.slow
# ---------------------------------------------------------------------------------------------------------------------
# Contract: the same (split, seed, index) gives the same example; train and test are disjoint
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", GENERATED)
def test_examples_are_the_same_in_another_process(name):
    cases = [(split, seed, index) for split in SPLITS for seed in (0, 7) for index in (0, 1, 5)]
    program = f"""
import sys
sys.path.insert(0, "tests")
import numpy as np
np.random.seed(99)
from rldatasets import get_dataset
from test_rldatasets import fingerprint
for split, seed, index in reversed({cases}):
    get_dataset({name!r}, split, seed=seed + 1, options={SMALL[name]})[index + 1]
    print(fingerprint(get_dataset({name!r}, split, seed=seed, options={SMALL[name]})[index]))
"""
    here = [
        fingerprint(get_dataset(name, split, seed=seed, options=SMALL[name])[index]) for split, seed, index in cases
    ]
    assert run_python(program).split() == here[::-1]
    assert len(set(here)) == len(cases)  # different splits, seeds and indices give different examples


@pytest.mark.parametrize("name", GENERATED)
def test_size_does_not_change_the_examples(name):
    few, many = (get_dataset(name, "test", size, options=SMALL[name]) for size in (10, 20))
    assert [fingerprint(few[i]) for i in range(10)] == [fingerprint(many[i]) for i in range(10)]


@pytest.mark.parametrize("name", GENERATED)
def test_examples_leave_the_global_random_state_alone(name):
    before = np.random.get_state()[1].tobytes()
    get_dataset(name, "test", options=SMALL[name])[3]
    assert np.random.get_state()[1].tobytes() == before


@pytest.mark.parametrize("second_hand", [True, False])
def test_no_clock_is_in_both_splits(second_hand):
    train, test = clock_times("train", second_hand), clock_times("test", second_hand)
    assert set(train).isdisjoint(test)
    assert len(train) + len(test) == (43200 if second_hand else 720)
    assert 0.07 < len(test) / (len(train) + len(test)) < 0.13
    for split, times in (("train", set(train)), ("test", set(test))):
        dataset = get_dataset("clock", split, options={"size": 56, "second_hand": second_hand})
        for index in range(200):
            hour, minute, second = (int(part) for part in dataset[index].answer.split(":"))
            assert hour % 12 * 3600 + minute * 60 + second in times


def test_test_clocks_are_spread_over_the_dial():
    """The split by hash favours no hour, minute or second: test clocks have the distribution of training clocks."""
    times = np.array(clock_times("test", True))
    for values, bins in ((times // 3600, 12), (times // 60 % 60, 60), (times % 60, 60)):
        counts = np.bincount(values, minlength=bins)
        assert counts.min() > 0.5 * counts.mean()
        assert counts.max() < 1.6 * counts.mean()


@pytest.mark.parametrize("steps", [1, 2, 3, "mixed"])
def test_no_calculation_is_in_both_splits(steps):
    def calculations(split):
        dataset = get_dataset("arithmetic", split, options={"steps": steps, "max_number": 10})
        return {dataset.solution(index) for index in range(400)}

    train, test = calculations("train"), calculations("test")
    assert len(train) > len(test) > 1
    assert train.isdisjoint(test)


def test_no_scatter_plot_is_in_both_splits():
    pictures = [
        get_dataset("correlation", split, seed=seed, options={"size": 56})[index].images[0].tobytes()
        for split in SPLITS
        for seed in range(3)
        for index in range(100)
    ]
    assert len(set(pictures)) == len(pictures)


def test_splits_by_hash_never_change():
    """A time that changed its split would be a test clock that models of an earlier version were trained on."""
    assert [time for time in range(60) if split_of(f"clock {time}") == "test"] == [3, 10, 18]


# ---------------------------------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*GENERATED, *IN_GSM8K_FORM])
@pytest.mark.parametrize("split", SPLITS)
def test_examples_are_well_formed_and_gold_earns_the_most(name, split, problems):
    dataset = get_dataset(name, split, path=problems if DATASETS[name].reads_files else None, options=SMALL[name])
    evaluator = get_evaluator(name)
    ids = set()
    for index in range(10):
        example = dataset[index]
        assert re.fullmatch(r"[\w-]+", example.id, re.ASCII)
        ids.add(example.id)
        system, user = example.messages
        assert (system["role"], user["role"]) == ("system", "user")
        assert asked_format("...", "...") in system["content"]
        if dataset.modality == "vision":
            assert [part["type"] for part in user["content"]] == ["image"] * len(example.images) + ["text"]
            assert example.images and {image.mode for image in example.images} == {"RGB"}
            assert all(image.size == (56, 56) for image in example.images) or "size" not in SMALL[name]
        else:
            assert dataset.modality == "text" and isinstance(user["content"], str) and example.images == []
        gold = asked_format(dataset.solution(index), example.answer)
        rewards, measured = evaluator.compute_rewards([gold], [example.answer])
        assert rewards.sum().item() == pytest.approx(evaluator.highest)
        _, junk = evaluator.compute_rewards(["junk"], [example.answer])
        metric, sign = evaluator.headline.metric, -1 if evaluator.headline.lower_is_better else 1
        assert sign * measured[metric] > sign * junk[metric]
    assert len(ids) == 10


@pytest.mark.parametrize(
    ("name", "modality", "highest", "best"),
    [("gsm8k", "text", 4, 1), ("clock", "vision", 4, 0), ("correlation", "vision", 2, 0), ("arithmetic", "text", 4, 1)],
)
def test_best_reward_and_metric_of_each_task(name, modality, highest, best, problems):
    dataset = get_dataset(name, "test", path=problems if name == "gsm8k" else None, options=SMALL[name])
    evaluator = get_evaluator(name)
    gold = asked_format(dataset.solution(0), dataset[0].answer)
    rewards, measured = evaluator.compute_rewards([gold], [dataset[0].answer])
    assert dataset.modality == modality
    assert rewards.sum().item() == pytest.approx(highest)
    assert measured[evaluator.headline.metric] == best


def test_every_dataset_has_an_evaluator():
    assert set(DATASETS) == set(EVALUATORS)
    assert all(DATASETS[name].name == name for name in DATASETS)


NEW_DATASET = '''

class ParityDataset(Dataset):
    """Is a number even or odd?"""

    name = "parity"
    modality = "text"

    def make(self, index: int) -> tuple[str, list[Image.Image], str]:
        number = int(self.rng(index).integers(10**6))
        return f"Is {number} even or odd? Answer 0 or 1.", [], str(number % 2)


DATASETS["parity"] = ParityDataset
'''
NEW_EVALUATOR = """

class ParityEvaluator(ExactNumberEvaluator):
    components: ClassVar = {"correctness": 1.0}
    gold = "1"


EVALUATORS["parity"] = ParityEvaluator
"""


@pytest.mark.slow
def test_a_new_task_passes_the_tests_unchanged(tmp_path):
    """One dataset class and one evaluator class, registered; without a tiny model."""
    for source in ROOT.glob("*.*"):
        if source.is_file():
            shutil.copy(source, tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for file, addition in (("rldatasets.py", NEW_DATASET), ("evaluator.py", NEW_EVALUATOR)):
        with (tmp_path / file).open("a") as source:
            source.write(addition)
    for file, chosen in (("test_rldatasets.py", "test"), ("test_evaluator.py", "parity")):
        command = [sys.executable, "-m", "pytest", "-vp", "no:cacheprovider", "-m", "not slow", "-k", chosen]
        done = subprocess.run([*command, f"tests/{file}"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert re.search(r"\[(train-)?parity\] PASSED", done.stdout)


def test_clock_answers_are_the_times_drawn():
    dataset = get_dataset("clock", "train", options={"size": 56, "style": "bold", "rotation": 15})
    for index in range(200):
        example = dataset[index]
        assert re.fullmatch(r"(0[1-9]|1[0-2]):[0-5][0-9]:[0-5][0-9]", example.answer)
        picture = dataset.generator.generate(*(int(part) for part in example.answer.split(":")))
        assert picture.tobytes() == example.images[0].tobytes()


def test_a_clock_without_second_hand_asks_for_00():
    dataset = get_dataset("clock", "train", options={"size": 56, "second_hand": "false"})
    for index in range(20):
        assert dataset[index].answer.endswith(":00")
        assert "no second hand" in user_text(dataset[index])
    assert "no second hand" not in user_text(get_dataset("clock", "train", options={"size": 56})[0])


def test_correlation_answers_are_the_correlations_drawn(monkeypatch):
    """The label is the r of the very points in the picture, not of the population they come from."""
    dataset = get_dataset("correlation", "train", options={"size": 56})
    drawn = []
    draw = dataset.generator.draw
    monkeypatch.setattr(dataset.generator, "draw", lambda x, y: drawn.append(np.corrcoef(x, y)[0, 1]) or draw(x, y))
    answers = [dataset[index].answer for index in range(300)]
    assert np.abs(np.array(drawn) - np.array(answers, dtype=float)).max() < 1e-9
    assert all(re.fullmatch(r"-?[01]\.[0-9]{2}", answer) for answer in answers)
    assert "-0.00" not in answers
    values = np.array(answers, dtype=float)
    assert values.min() < -0.9
    assert values.max() > 0.9
    assert abs(values.mean()) < 0.1


def test_arithmetic_solutions_lead_to_the_answer():
    dataset = get_dataset("arithmetic", "train", options={"steps": "3", "max_number": "50"})
    for index in range(100):
        example, lines = dataset[index], dataset.solution(index).split("\n")
        assert len(lines) == 3
        for line in lines:
            assert re.fullmatch(r"\d+ [-+*/] \d+ = \d+", line)
            calculation, result = line.split(" = ")
            assert eval(calculation) == int(result)
        assert lines[-1].endswith(f" = {example.answer}")
        assert user_text(example).startswith(dataset.row(index)["question"])


class Pictures(Dataset):
    """A task that shows whatever picture it is given."""

    name = "pictures"
    modality = "vision"
    given: Image.Image

    def make(self, index: int) -> tuple[str, list[Image.Image], str]:
        return "What is it?", [self.given], "?"


def shown(picture: Image.Image) -> np.ndarray:
    """(height, width, 3) of the picture that an example keeps."""
    task = Pictures("train", 1)
    task.given = picture
    (image,) = task[0].images
    assert image.mode == "RGB" and not image.has_transparency_data
    return np.asarray(image)


def from_file(picture: Image.Image, format: str, **options) -> Image.Image:
    """The picture, written to a file and opened again."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)  # every 8-bit grey


@pytest.mark.parametrize(
    ("mode", "file"),
    [("I;16", None), ("I;16B", None), ("I;16L", None), ("I;16N", None), ("I;16", "PNG"), ("I;16B", "TIFF")],
)
def test_16_bit_grey_is_scaled_to_8_bits(mode, file):
    """Pillow's own conversion cuts at 255, so such pictures became white."""
    order = {"I;16B": ">u2", "I;16L": "<u2"}.get(mode, "=u2")
    picture = Image.frombytes(mode, (16, 16), (RAMP * 257).astype(order).tobytes())
    picture = from_file(picture, file) if file else picture
    assert picture.mode == mode
    assert (shown(picture) == RAMP[..., None]).all()


def test_16_bit_grey_stays_dark_where_it_is_dark():
    assert (shown(Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))) == 1).all()


@pytest.mark.parametrize(
    ("mode", "values", "white"),
    [("I", RAMP, 255), ("I", RAMP * 257, 65535), ("F", RAMP, 255), ("F", RAMP / 255, 1), ("F", RAMP * 257, 65535)],
)
def test_32_bit_grey_is_scaled_by_its_range(mode, values, white):
    assert values.max() == white
    picture = Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
    assert picture.mode == mode
    assert (shown(picture) == RAMP[..., None]).all()


@pytest.mark.parametrize("value", [-1.0, 65536.0, float("nan"), float("inf")])
def test_grey_values_without_a_meaning_are_refused(value):
    picture = Image.fromarray(np.array([[0.5, value]], dtype=np.float32))
    with pytest.raises(ValueError, match="pictures-train-0-0 cannot be made"):
        shown(picture)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "LA", "PA", "CMYK", "YCbCr", "HSV"])
def test_pictures_of_any_mode_become_rgb(mode):
    """An opaque picture in black and white looks the same in every mode."""
    black_and_white = Image.fromarray((RAMP % 2 * 255).astype(np.uint8))
    through = {"PA": "P", "HSV": "RGB", "RGBa": "RGBA"}.get(mode)  # Pillow has no direct conversion
    picture = (black_and_white.convert(through) if through else black_and_white).convert(mode)
    assert picture.mode == mode
    assert np.abs(shown(picture).astype(int) - (RAMP % 2 * 255)[..., None]).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "GIF", "TIFF", "WEBP", "JPEG", "BMP"])
def test_pictures_from_files_become_rgb(format):
    red = Image.new("RGB", (16, 16), (250, 10, 10))
    assert np.abs(shown(from_file(red, format)).astype(int) - (250, 10, 10)).max() < 12


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_transparent_parts_become_white(mode):
    """As on a page; the hidden colour of such pixels is often black."""
    if mode == "PA":
        picture = Image.new("PA", (8, 8))
        for place in np.ndindex(8, 8):
            picture.putpixel(place, (0, 255 if place[0] < 4 else 0))
    elif mode in ("RGBA", "LA"):
        picture = Image.fromarray(np.zeros((8, 8, 4), dtype=np.uint8))
        picture.paste((0, 0, 0, 255), (0, 0, 4, 8))  # the left half is black, the right one transparent
        picture = picture.convert(mode)
    else:
        picture = Image.new("RGB", (8, 8), (1, 2, 3))
        picture.paste((0, 0, 0), (0, 0, 4, 8))
        picture = picture.quantize(2) if mode == "P" else picture
        transparent = picture.getpixel((7, 7))
        picture = from_file(picture, "PNG", transparency=transparent)
    assert picture.mode == mode
    found = shown(picture)
    assert (found[:, :4] == 0).all() and (found[:, 4:] == 255).all()


def test_pictures_are_turned_upright():
    picture = Image.new("RGB", (8, 4), "white")
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    assert shown(from_file(picture, "JPEG", exif=exif)).shape == (8, 4, 3)


def test_a_truncated_picture_is_refused_by_the_name_of_its_example():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="pictures-train-0-0 cannot be made"):
        shown(Image.open(io.BytesIO(buffer.getvalue()[:2000])))


def test_a_picture_in_rgb_keeps_its_bytes():
    picture = ClockImageGenerator(56).generate(3, 4, 5)
    assert (shown(picture) == np.asarray(picture)).all()


def test_training_and_evaluation_sizes():
    assert (len(get_dataset("clock", "train")), len(get_dataset("clock", "test"))) == (4000, 512)
    assert len(get_dataset("clock", "train", 17)) == 17
    with pytest.raises(IndexError):
        get_dataset("clock", "train", 17)[17]


# ---------------------------------------------------------------------------------------------------------------------
# GSM8K from local files
# ---------------------------------------------------------------------------------------------------------------------
def test_gsm8k_from_a_folder_of_jsonl(problems):
    train, test = (get_dataset("gsm8k", split, path=problems) for split in SPLITS)
    assert (len(train), len(test)) == (30, 10)
    assert user_text(test[2]).startswith("Tilda picks 502 plums")
    assert test[2].answer == "1502"  # written as 1,502 in the file
    assert test.solution(2) == "She has 502+1000=1502 plums."  # without the calculator's note
    assert [test[i].answer for i in range(3)] == [
        get_dataset("gsm8k", "test", 3, path=problems)[i].answer for i in range(3)
    ]
    with pytest.raises(ValueError, match="11 test examples were asked for, but there are only 10"):
        get_dataset("gsm8k", "test", 11, path=problems)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [".", "main"])
def test_gsm8k_from_parquet_as_on_the_hub(tmp_path, folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / folder).mkdir(exist_ok=True)
    for split, part, number in (("train", 0, 1), ("train", 1, 2), ("test", 0, 3)):
        rows = pyarrow.Table.from_pylist([{"question": f"What is {number}?", "answer": f"It is.\n#### {number}"}])
        parquet.write_table(rows, tmp_path / folder / f"{split}-0000{part}-of-00002.parquet")
    train, test = (get_dataset("gsm8k", split, path=str(tmp_path)) for split in SPLITS)
    assert [train[i].answer for i in range(len(train))] == ["1", "2"]
    assert [test[i].answer for i in range(len(test))] == ["3"]


@pytest.mark.parametrize(("count", "test_size"), [(2, 1), (9, 1), (40, 4)])
def test_last_tenth_of_one_file_is_the_test_split(tmp_path, count, test_size):
    write_problems(tmp_path / "all.jsonl", count)
    train, test = (get_dataset("gsm8k", split, path=str(tmp_path / "all.jsonl")) for split in SPLITS)
    assert (len(train), len(test)) == (count - test_size, test_size)
    answers = [dataset[i].answer for dataset in (train, test) for i in range(len(dataset))]
    assert answers == [str(1000 + i) for i in range(count)]


GOOD = '{"question": "What is 1?", "answer": "It is.\\n#### 1"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        (GOOD, "at least two"),
        (GOOD + "{not json}\n" + GOOD, "line 2: not valid JSON"),
        (GOOD + "\n\n" + GOOD + "{not json}", "line 5: not valid JSON"),
        ("\ufeff\n" + GOOD + "{not json}", "line 3: not valid JSON"),
        (GOOD.replace("\n", "\r") + "{not json}", "line 2: not valid JSON"),
        (GOOD + "\n" + '{"question": "What?", "answer": "1"}', "line 3: the answer does not end"),
        (GOOD.replace("}", "},") + GOOD, "line 1: not valid JSON"),
        (GOOD.replace("}", ",}") + GOOD, "line 1: not valid JSON"),
        ("[\n" + GOOD + "]", "line 1: not valid JSON"),
        ("[" + GOOD.strip() + "]", "line 1: expected an object"),
        (GOOD + '{"question": "\\ud83d?", "answer": "#### 1"}', "line 2: a text has half of a surrogate pair"),
        (GOOD + GOOD + '["a list"]', 'line 3: expected an object with the texts "question" and "answer"'),
        (GOOD + '{"question": "What is 1?"}', "line 2: expected an object"),
        (GOOD + '{"question": 1, "answer": "#### 1"}', "line 2: expected an object"),
        (GOOD + '{"question": " ", "answer": "#### 1"}', "line 2: the question is empty"),
        (GOOD + '{"question": "What?", "answer": "1"}', "line 2: the answer does not end with '#### ' and a number"),
        (GOOD + '{"question": "What?", "answer": "#### one"}', "line 2: the answer does not end"),
        (GOOD + "[" * 100_000, "line 2: not valid JSON"),
    ],
)
def test_malformed_files_are_refused_with_the_line(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        get_dataset("gsm8k", "train", path=str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_damaged_files_are_refused(tmp_path):
    broken = b"\xff\xfe\x00", GOOD.encode() + b"\xff", codecs.BOM_UTF8 + b"\xc3(", "Äpfel".encode("latin-1")
    for data in broken:
        (tmp_path / "data.jsonl").write_bytes(data)
        with pytest.raises(ValueError, match=r"data\.jsonl is not a text file"):
            get_dataset("gsm8k", "train", path=str(tmp_path / "data.jsonl"))
    (tmp_path / "train.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(ValueError, match=r"train\.parquet is not a readable parquet file"):
        get_dataset("gsm8k", "train", path=str(tmp_path))


PROBLEM = {"question": "Wie viele Äpfel? 🍎\u2028Zwei.", "answer": "Zwei.\n#### 2"}
LINE = json.dumps(PROBLEM, ensure_ascii=False)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_files_of_any_unicode_encoding_and_line_end_are_read(tmp_path, encoding, end):
    (tmp_path / "train.jsonl").write_bytes(f"{LINE}{end}{LINE}{end}".encode(encoding))
    dataset = get_dataset("gsm8k", "train", path=str(tmp_path))
    assert len(dataset) == 2
    assert all(dataset.row(index) == PROBLEM for index in range(2))


@pytest.mark.parametrize(
    "text",
    [
        f"\n{LINE}\n\n\n{LINE}\n\n",
        f"{LINE}\n  \t\n{LINE}",
        f"\ufeff{LINE}\n\ufeff{LINE}\n",  # two files with a byte order mark each, joined
        f"\ufeff\ufeff{LINE}\n{LINE}\n\ufeff",
        f"\r\n{LINE}\r\n\r\n{LINE}\r\n",
        f"  {LINE}\t\n\t{LINE} \n",
    ],
)
def test_blank_lines_and_byte_order_marks_are_skipped(tmp_path, text):
    (tmp_path / "train.jsonl").write_bytes(text.encode())
    dataset = get_dataset("gsm8k", "train", path=str(tmp_path))
    assert [dataset.row(index) for index in range(len(dataset))] == [PROBLEM] * 2


def test_separators_inside_a_text_do_not_end_its_line(tmp_path):
    """U+2028 ends a line for str.splitlines, but JSON allows it inside of a text."""
    row = json.dumps({"question": "One\u2028two\x85three?", "answer": "#### 3"}, ensure_ascii=False)
    (tmp_path / "train.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    assert len(get_dataset("gsm8k", "train", path=str(tmp_path))) == 2


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no dataset file or folder"):
        get_dataset("gsm8k", "train", path=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"neither train\.jsonl nor train\*\.parquet"):
        get_dataset("gsm8k", "train", path=str(tmp_path))


def refused_hub() -> str:
    """The message that refuses GSM8K from a hub."""
    with pytest.raises(ConnectionError) as error:
        get_dataset("gsm8k", "train")
    assert "\n" not in str(error.value) and "--dataset_path" in str(error.value)
    return str(error.value)


@pytest.fixture
def working_hub(monkeypatch):
    """-> a function that sets what the library does when it is asked for a data set, of a hub that answers."""
    import datasets

    monkeypatch.setattr(data_files, "hub_trouble", lambda name: "")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return lambda load: monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.slow
def test_any_error_of_the_hub_is_one_line(working_hub):
    import datasets

    class TimeoutOfAnHTTPLibrary(Exception):
        pass

    errors = [
        ConnectionError("Couldn't reach the Hub\nand much more"),
        FileNotFoundError("Couldn't find any data file"),
        datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist on the Hub"),
        datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset"),
        TimeoutOfAnHTTPLibrary("timed out"),
        json.JSONDecodeError("Expecting value", "<html>", 0),
        KeyError("sha"),
        AttributeError("'NoneType' object has no attribute 'siblings'"),
        RuntimeError(),
    ]
    for error in errors:

        def failing(*_, error=error, **__):
            raise error

        working_hub(failing)
        expected = str(error).partition("\n")[0] or "RuntimeError"
        assert expected in refused_hub()


@pytest.mark.slow
def test_gsm8k_from_the_hub_has_its_official_splits(working_hub):
    def hub(name, config, split):
        assert (name, config) == ("openai/gsm8k", "main")
        return [{"question": f"A {split} question?", "answer": "Because.\n#### 5"}] * {"train": 3, "test": 2}[split]

    working_hub(hub)
    assert [len(get_dataset("gsm8k", split)) for split in SPLITS] == [3, 2]
    assert "A test question?" in user_text(get_dataset("gsm8k", "test")[0])


LOAD_FROM_HUB = """
import sys
import rldatasets
try:
    print(len(rldatasets.get_dataset("gsm8k", "train")), len(rldatasets.get_dataset("gsm8k", "test")))
except ConnectionError as error:
    print(error)
"""


def load_from_hub(address: str, home: Path) -> str:
    """What another process prints that loads GSM8K from a hub at this address, with its caches in `home`."""
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", LOAD_FROM_HUB]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("login", "login page"), ("redirect", "login page"), ("busy", "503"), ("silent", "Timeout"), (None, "Connect")],
)
def test_a_hub_that_does_not_work_is_one_line_soon(kind, reason, tmp_path):
    """A login page in place of the hub, a hub that is busy, silent or not there."""
    start = time.perf_counter()
    if kind is None:
        message = load_from_hub("http://127.0.0.1:9", tmp_path)  # no one listens at this port
    else:
        with bad_hub(kind) as address:
            message = load_from_hub(address, tmp_path)
    assert reason in message and "--dataset_path" in message and "\n" not in message
    assert time.perf_counter() - start < 45


@pytest.mark.slow
def test_a_cached_gsm8k_is_used_while_the_hub_is_silent(tmp_path):
    write_problems(tmp_path / "rows.jsonl", 3)
    program = f"""
import os
os.environ["HF_HOME"] = {str(tmp_path)!r}
import datasets
rows = {str(tmp_path / "rows.jsonl")!r}
builder = datasets.load_dataset_builder("json", data_files={{"train": rows, "test": rows}})
builder.download_and_prepare()
print(builder.cache_dir)
"""
    made = Path(run_python(program).splitlines()[-1])
    cached = tmp_path / "datasets" / "openai___gsm8k" / "main" / "0.0.0" / made.name  # as the hub's copy is kept
    shutil.copytree(made, cached)
    info = json.loads((cached / "dataset_info.json").read_text())
    for name in SPLITS:
        (cached / f"json-{name}.arrow").rename(cached / f"gsm8k-{name}.arrow")
        info["splits"][name]["dataset_name"] = "gsm8k"
    info |= {"builder_name": "parquet", "dataset_name": "gsm8k", "config_name": "main"}
    (cached / "dataset_info.json").write_text(json.dumps(info))
    with bad_hub("silent") as address:
        assert load_from_hub(address, tmp_path) == "3 3"


# ---------------------------------------------------------------------------------------------------------------------
# Solved examples before the question
# ---------------------------------------------------------------------------------------------------------------------
WITH_SHOTS = [name for name in DATASETS if "shots" in dataset_options(name)]


def with_shots(name: str, split: str, shots: object, path: str, seed: int = 0) -> Dataset:
    return get_dataset(name, split, None, seed, path if DATASETS[name].reads_files else None, {"shots": shots})


@pytest.mark.parametrize("name", WITH_SHOTS)
@pytest.mark.parametrize("split", SPLITS)
def test_shots_are_training_examples_with_the_best_reward(name, split, problems):
    dataset, training = with_shots(name, split, 3, problems, seed=5), with_shots(name, "train", 0, problems)
    evaluator = get_evaluator(name)
    golds = {user_text(training[i]): training[i].answer for i in range(4)}  # the first 3, and one to spare
    for index in range(8):
        system, *turns, user = dataset[index].messages
        assert (system["role"], user["role"]) == ("system", "user")
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
        for question, reply in zip(turns[::2], turns[1::2], strict=True):
            rewards, _ = evaluator.compute_rewards([reply["content"]], [golds[question["content"]]])
            assert rewards.sum().item() == pytest.approx(evaluator.highest)
            assert "<<" not in reply["content"]
        assert len({question["content"] for question in turns[::2]}) == 3


@pytest.mark.parametrize("name", WITH_SHOTS)
def test_all_questions_have_the_same_shots_but_their_own(name, problems):
    """The next training example replaces a shot that would give the solution of the question away."""
    training, test = with_shots(name, "train", 2, problems), with_shots(name, "test", 2, problems)
    first = [user_text(training[i]) for i in range(3)]

    def shown(dataset: Dataset, index: int) -> list[str]:
        return [message["content"] for message in dataset[index].messages[1:-1:2]]

    assert shown(training, 0) == [first[1], first[2]]
    assert shown(training, 1) == [first[0], first[2]]
    assert shown(training, 2) == shown(training, 3) == [first[0], first[1]]
    assert all(shown(test, index) == first[:2] for index in range(5))
    other_seed = with_shots(name, "train", 2, problems, seed=9)
    assert shown(other_seed, 7) == first[:2]


def test_a_shot_with_the_solution_of_the_question_is_replaced():
    """Among few calculations, different stories have the same one."""
    options = {"steps": 1, "max_number": 10, "shots": 6}
    dataset, test = (get_dataset("arithmetic", split, 200, options=options) for split in ("train", "test"))
    usual = [turn["content"] for turn in test[0].messages[2:-1:2]]  # no test calculation is a training calculation
    replaced = 0
    for index in range(len(dataset)):
        _, *turns, _ = dataset[index].messages
        replies = [turn["content"] for turn in turns[1::2]]
        assert asked_format(dataset.solution(index), dataset[index].answer) not in replies
        assert len(set(replies)) == 6
        replaced += replies != usual
    assert 10 < replaced < 190


@pytest.mark.parametrize("name", WITH_SHOTS)
def test_without_shots_the_examples_stay_the_same(name, problems):
    plain = get_dataset(name, "test", path=problems if DATASETS[name].reads_files else None)
    none, some = with_shots(name, "test", "0", problems), with_shots(name, "test", "2", problems)
    for index in range(5):
        assert fingerprint(plain[index]) == fingerprint(none[index])
        messages = some[index].messages
        assert [messages[0], messages[-1]] == plain[index].messages and len(messages) == 6


def test_more_shots_than_training_examples_are_refused(problems):
    assert len(with_shots("gsm8k", "test", 29, problems)[0].messages) == 2 + 2 * 29
    with pytest.raises(ValueError, match="at most 29, not 30"):
        with_shots("gsm8k", "test", 30, problems)


# ---------------------------------------------------------------------------------------------------------------------
# Finding a dataset
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "clok"}, "there is no task 'clok'; did you mean 'clock'?"),
        ({"name": "chess"}, f"there is no task 'chess'; choose from {', '.join(DATASETS)}"),
        ({"split": "validation"}, "unknown split 'validation'"),
        ({"size": 0}, "at least 1 example"),
        ({"seed": -1}, "a seed is 0 or more"),
        ({"path": "/tmp"}, "takes no dataset path"),
        ({"options": {"stile": "bold"}}, "no option 'stile'; did you mean 'style'?"),
        ({"options": {"colour": "red"}}, "no option 'colour'; choose from size, style, rotation, second_hand"),
        ({"options": {"num_examples": 3}}, "no option 'num_examples'"),
        ({"options": {"style": "baroque"}}, "unknown clock style 'baroque'"),
        ({"options": {"size": "big"}}, "whole number of pixels"),
        ({"name": "gsm8k", "options": {"size": 3}}, "no option 'size'"),
        ({"name": "arithmetic", "options": {"steps": "9"}}, "steps must be"),
        ({"name": "arithmetic", "options": {"shots": "-1"}}, "shots must be a whole number, 0 or more, not -1"),
        ({"name": "arithmetic", "options": {"shots": "two"}}, "shots must be a whole number, 0 or more, not 'two'"),
        ({"name": "arithmetic", "options": {"shots": "true"}}, "shots must be a whole number"),
        ({"name": "arithmetic", "options": {"shots": 4000}}, "shots must be at most"),
        ({"options": {"shots": 1}}, "no option 'shots'"),
    ],
)
def test_bad_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        get_dataset(**{"name": "clock", "split": "train", **arguments})


def test_options_come_as_texts_or_values():
    texts = {"size": "64", "style": "bold", "rotation": "22.5", "second_hand": "False"}
    values = {"size": 64, "style": "bold", "rotation": 22.5, "second_hand": False}
    assert dataset_options("clock").keys() == values.keys()
    examples = [get_dataset("clock", "test", options=options)[0] for options in (texts, values)]
    examples.append(
        get_dataset("clock", "test", None, style="bold", rotation=22.5, options={"size": 64, "second_hand": False})[0]
    )
    assert len({fingerprint(example) for example in examples}) == 1
    assert fingerprint(get_dataset("clock", "test")[0]) != fingerprint(examples[0])


# ---------------------------------------------------------------------------------------------------------------------
# The order of training
# ---------------------------------------------------------------------------------------------------------------------
def index_of(example) -> int:
    return int(example.id.rpartition("-")[2])


def indices(batch) -> list[int]:
    """The indices of the examples that a loader handed out."""
    examples, _ = batch
    return [index_of(example) for example in examples]


def loader(size=10, prompts_per_step=4, seed=0, encode=None, max_prompt_length=None) -> TrainLoader:
    return TrainLoader(get_dataset("arithmetic", "train", size), prompts_per_step, seed, encode, max_prompt_length)


class Encoder:
    """Encodes an example as its index, 9 times if it is one of `long`, else 1 to 3 times; lists what it read."""

    def __init__(self, long=()):
        self.long, self.read = set(long), []

    def __call__(self, examples):
        import torch

        from prompts import Prompts

        numbers = [index_of(example) for example in examples]
        self.read += numbers
        lengths = torch.tensor([9 if number in self.long else 1 + number % 3 for number in numbers])
        mask = torch.arange(int(lengths.max())).flip(0) < lengths[:, None]  # (Q, P), left-padded
        ids = torch.tensor(numbers)[:, None] * mask
        return Prompts(ids, mask, mask.long().cumsum(1) - 1, [{} for _ in numbers])


def one_by_one(size, prompts_per_step, seed, long) -> Iterator[tuple[list[int], dict[str, int], list[int]]]:
    """What the loader must do, an example at a time: (batch, state after it, everything read so far)."""
    epoch = position = kept = skipped = 0
    read = []
    while True:
        batch = []
        while len(batch) < prompts_per_step:
            if position == size:
                if kept == 0:
                    raise ValueError("all prompts are too long")
                epoch, position, kept = epoch + 1, 0, 0
            index = int(np.random.default_rng([seed, epoch]).permutation(size)[position])
            position += 1
            read.append(index)
            if index in long:
                skipped += 1
            else:
                kept += 1
                batch.append(index)
        state = {"epoch": epoch, "position": position, "kept": kept, "skipped": skipped, "size": size}
        yield batch, state, list(read)


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9)).map(sorted)  # prompts a step, examples


@given(sizes=SIZES, seed=st.integers(0, 99), long=st.sets(st.integers(0, 8)), steps=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_batches_and_states_equal_those_of_one_by_one(sizes, seed, long, steps):
    """Full batches in the shuffled order, across epochs; long prompts skipped and counted; each encoded once."""
    prompts_per_step, size = sizes
    long -= {size - 1}  # at least one prompt is short enough
    encode, expected = Encoder(long), one_by_one(size, prompts_per_step, seed, long)
    batches = loader(size, prompts_per_step, seed, encode, max_prompt_length=8)
    for _ in range(steps):
        batch, state, read = next(expected)
        examples, prompts = next(batches)
        assert [index_of(example) for example in examples] == batch
        assert prompts.lengths == [1 + index % 3 for index in batch]
        assert prompts.ids[:, -1].tolist() == batch
        assert prompts.ids.shape[1] == max(prompts.lengths)
        assert batches.state_dict() == state
        assert batches.skipped == state["skipped"] and batches.epoch == state["epoch"] + state["position"] / size
    batches.close()  # waits for the next batch if its preparation has begun
    assert batches.state_dict() == state
    assert encode.read in (read, next(expected)[2])


def test_the_state_is_that_of_the_batch_handed_out():
    """Although the next batch is already prepared."""
    encode, second = Encoder(), threading.Event()

    def signalling(examples):
        if encode.read:
            second.set()
        return encode(examples)

    steps = loader(10, 4, encode=signalling)
    first = indices(next(steps))
    assert second.wait(60)
    steps.close()  # waits for the second batch
    assert len(encode.read) == 8 and encode.read[:4] == first
    assert steps.state_dict() == {"epoch": 0, "position": 4, "kept": 4, "skipped": 0, "size": 10}
    assert steps.epoch == pytest.approx(0.4)


@pytest.mark.slow
@given(sizes=SIZES, seed=st.integers(0, 99), long=st.sets(st.integers(0, 8)), done=st.integers(0, 6))
@settings(max_examples=25, deadline=None)
def test_a_loader_resumes_from_any_state(sizes, seed, long, done):
    prompts_per_step, size = sizes
    long -= {size - 1}  # at least one prompt is short enough
    uninterrupted, resumed = (loader(size, prompts_per_step, seed, Encoder(long), 8) for _ in range(2))
    for _ in range(done):
        next(uninterrupted)
    state = json.loads(json.dumps(uninterrupted.state_dict()))
    assert all(type(value) is int for value in state.values())
    next(resumed)  # which must not matter
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for _ in range(4):
        (examples, prompts), (expected_examples, expected) = next(resumed), next(uninterrupted)
        assert [example.id for example in examples] == [example.id for example in expected_examples]
        assert prompts.ids.tolist() == expected.ids.tolist()
        assert (resumed.epoch, resumed.skipped) == (uninterrupted.epoch, uninterrupted.skipped)
    resumed.close(), uninterrupted.close()


def test_every_epoch_has_each_example_once_in_another_order():
    examples = loader(prompts_per_step=1)
    epochs = [[indices(next(examples))[0] for _ in range(10)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_are_full_and_cross_the_end_of_an_epoch():
    steps, one_by_one = loader(prompts_per_step=4), loader(prompts_per_step=1)
    batches = [indices(next(steps)) for _ in range(10)]
    assert all(len(batch) == 4 for batch in batches)
    assert list(chain(*batches)) == [indices(next(one_by_one))[0] for _ in range(40)]


def test_order_depends_on_the_seed_alone():
    first = indices(next(loader(seed=1)))
    np.random.seed(5)
    assert indices(next(loader(seed=1))) == first
    assert indices(next(loader(seed=2))) != first


def test_without_encode_the_order_is_the_same():
    encoded, plain = loader(encode=Encoder()), loader()
    for _ in range(6):
        (examples, prompts), (expected, nothing) = next(encoded), next(plain)
        assert [example.id for example in examples] == [example.id for example in expected]
        assert nothing is None and len(prompts) == 4
        assert encoded.state_dict() == plain.state_dict()
    encoded.close()


def test_epoch_and_steps_per_epoch():
    steps = loader(size=10, prompts_per_step=4)
    assert steps.steps_per_epoch == 2
    assert steps.epoch == 0
    next(steps)
    assert steps.epoch == pytest.approx(0.4)
    next(steps), next(steps)
    assert steps.epoch == pytest.approx(1.2)
    assert loader(size=4, prompts_per_step=4).steps_per_epoch == 1


def test_without_a_limit_no_prompt_is_too_long():
    steps = loader(encode=Encoder(long=range(10)))
    assert all(len(indices(next(steps))) == 4 for _ in range(5)) and steps.skipped == 0
    steps.close()


def test_an_epoch_with_one_short_prompt_is_no_error_on_resuming():
    """The rest of an epoch may be too long; only an epoch of nothing but long prompts is an error."""
    interrupted = loader(10, 3)
    first = indices(next(interrupted))
    order = list(chain(first, *(indices(next(interrupted)) for _ in range(2))))
    assert len(set(order)) == 9
    encode = Encoder(long=set(range(10)) - set(first))
    resumed = loader(10, 3, encode=encode, max_prompt_length=8)
    interrupted = loader(10, 3)
    next(interrupted)
    resumed.load_state_dict(interrupted.state_dict())
    assert sorted(indices(next(resumed))) == sorted(first)
    assert resumed.skipped >= 7 and resumed.state_dict()["epoch"] == 1
    resumed.close()


def test_state_of_another_dataset_is_refused():
    with pytest.raises(ValueError, match="10 training examples, this one has 12"):
        loader(size=12).load_state_dict(loader(size=10).state_dict())


def test_long_prompts_are_skipped_once_in_each_epoch():
    steps = loader(10, 2, encode=Encoder(long=range(1, 10, 2)), max_prompt_length=8)
    seen = list(chain(*(indices(next(steps)) for _ in range(10))))
    steps.close()
    assert set(seen) == {0, 2, 4, 6, 8}
    assert all(seen.count(index) == 4 for index in seen)
    assert 15 <= steps.skipped <= 20  # five in each epoch; those at the end of the fourth may not have come up


def test_an_epoch_of_long_prompts_is_an_error():
    """Without the error, the loader would search forever."""
    encode = Encoder(long=range(10))
    with pytest.raises(ValueError, match="all 10 training prompts are longer than --max_prompt_length"):
        next(loader(encode=encode, max_prompt_length=8))
    assert sorted(encode.read) == list(range(10))
    encode = Encoder()
    steps = loader(prompts_per_step=1, encode=lambda examples: encode(examples), max_prompt_length=8)
    first = indices(next(steps))
    encode.long = set(range(10))  # from now on, that is after at most one more batch was prefetched
    seen = [first]
    with pytest.raises(ValueError, match="all 10 training prompts"):
        while len(seen) < 5:
            seen.append(indices(next(steps)))
    assert len(seen) <= 2
    steps.close()
    shown = get_dataset("arithmetic", "train", 10, shots=2)
    with pytest.raises(ValueError, match="lower shots"):
        next(TrainLoader(shown, 4, encode=Encoder(long=range(10)), max_prompt_length=8))


def test_an_error_while_prefetching_is_raised_with_its_batch():
    encode, broken = Encoder(), threading.Event()

    def breaking(examples):
        if len(encode.read) == 10:  # the third batch
            broken.set()
            raise OSError("the disk is gone")
        return encode(examples)

    steps, expected = loader(prompts_per_step=5, encode=breaking), loader(prompts_per_step=5)
    for _ in range(2):
        assert indices(next(steps)) == indices(next(expected))
    assert broken.wait(60)
    state = steps.state_dict()
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(steps)
    assert steps.state_dict() == state == expected.state_dict()
    encode.read.append(-1)  # no further error
    steps.load_state_dict(state)
    assert indices(next(steps)) == indices(next(expected))
    steps.close()


@pytest.mark.parametrize(
    ("size", "prompts_per_step", "message"), [(3, 4, "3 training examples are too few"), (3, 0, "at least 1 prompt")]
)
def test_batches_that_cannot_be_filled_are_refused(size, prompts_per_step, message):
    with pytest.raises(ValueError, match=message):
        loader(size, prompts_per_step)


def test_the_test_set_is_the_same_for_every_seed():
    """Runs with different seeds are compared on the same examples; their training examples differ."""
    loaders = [get_dataloaders("clock", 2, 20, 5, seed=seed, options={"size": 56}) for seed in (1, 2)]
    tests = [[fingerprint(test[i]) for i in range(len(test))] for _, test in loaders]
    assert tests[0] == tests[1]
    assert len(tests[0]) == 5
    assert loaders[0][1].seed == EVAL_SEED
    answers = [{example.answer for example in next(train)[0]} for train, _ in loaders]
    assert answers[0] != answers[1]


def test_evaluating_does_not_move_the_loader():
    alone, (beside, test) = loader(size=20), get_dataloaders("arithmetic", 4, 20, 5)
    for _ in range(8):
        assert indices(next(beside)) == indices(next(alone))
        [test[i] for i in range(len(test))]


@pytest.mark.slow
def test_no_task_imports_torch_or_transformers():
    """Flags are checked, and help is shown, before torch and transformers are imported, which takes seconds."""
    program = """
import sys, arithmetic_generator, clock_image_generator, correlation_generator, evaluator, rldatasets
for name in evaluator.EVALUATORS:
    scorer = evaluator.get_evaluator(name)
    scorer.predict(scorer.gold)
    if not rldatasets.DATASETS[name].reads_files:
        rldatasets.get_dataset(name, "train", 1)[0]
print([name for name in ("torch", "transformers", "datasets", "pyarrow", "matplotlib") if name in sys.modules])
"""
    assert run_python(program).strip() == "[]"
