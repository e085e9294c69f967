"""Examples are pure functions of (split, seed, index), train and test are disjoint, and the loader keeps its place."""

import hashlib
import json
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from evaluator import EVALUATORS, get_evaluator
from rldatasets import (
    DATASETS,
    EVAL_SEED,
    SPLITS,
    TrainLoader,
    clock_times,
    dataset_options,
    get_dataloaders,
    get_dataset,
    split_of,
)

ROOT = Path(__file__).parents[1]


def run_python(program: str) -> str:
    """What a program prints that runs in a process of its own, in the project's folder."""
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout


SMALL = {"clock": {"size": 56}, "correlation": {"size": 56}, "arithmetic": {}, "gsm8k": {}}
MADE_HERE = ["clock", "correlation", "arithmetic"]


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
    """A hash of everything an example consists of, every byte of its pictures included."""
    digest = hashlib.sha256(json.dumps([example.id, example.messages, example.answer]).encode())
    for image in example.images:
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def user_text(example) -> str:
    content = example.messages[-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


# ---------------------------------------------------------------------------------------------------------------------
# Contract: the same (split, seed, index) gives the same example; train and test are disjoint
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MADE_HERE)
def test_same_example_in_another_process_and_in_any_order(name):
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
    assert len(set(here)) == len(cases)  # another split, seed or index is another example


@pytest.mark.parametrize("name", MADE_HERE)
def test_size_does_not_change_the_examples(name):
    few, many = (get_dataset(name, "test", size, options=SMALL[name]) for size in (10, 20))
    assert [fingerprint(few[i]) for i in range(10)] == [fingerprint(many[i]) for i in range(10)]


@pytest.mark.parametrize("name", MADE_HERE)
def test_making_examples_leaves_the_global_random_state_alone(name):
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
    """A split by hash must not favour some hours, minutes or seconds: then test would differ from train."""
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
    """Were the split of a time to change, a model would be tested on clocks that an earlier version trained on."""
    assert [time for time in range(60) if split_of(f"clock {time}") == "test"] == [3, 10, 18]


# ---------------------------------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("split", SPLITS)
def test_examples_are_well_formed_and_their_gold_earns_the_most(name, split, problems):
    dataset = get_dataset(name, split, path=problems if name == "gsm8k" else None, options=SMALL[name])
    evaluator = get_evaluator(name)
    assert dataset.modality == ("vision" if name in ("clock", "correlation") else "text")
    ids = set()
    for index in range(10):
        example = dataset[index]
        assert re.fullmatch(r"[a-z0-9-]+", example.id)
        ids.add(example.id)
        system, user = example.messages
        assert (system["role"], user["role"]) == ("system", "user")
        assert "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>" in system["content"]
        if dataset.modality == "vision":
            assert [part["type"] for part in user["content"]] == ["image", "text"]
            assert [image.size for image in example.images] == [(56, 56)]
        else:
            assert isinstance(user["content"], str)
            assert example.images == []
        completion = f"<reasoning>\n{dataset.solution(index)}\n</reasoning>\n<answer>\n{example.answer}\n</answer>"
        rewards, measured = evaluator.compute_rewards([completion], [example.answer])
        assert rewards.sum().item() == pytest.approx({"clock": 4.0, "correlation": 2.0}.get(name, 4.0))
        best = 0.0 if evaluator.headline.lower_is_better else 1.0
        assert measured[evaluator.headline.metric] == best
    assert len(ids) == 10


def test_every_dataset_has_an_evaluator():
    assert set(DATASETS) == set(EVALUATORS)
    assert all(DATASETS[name].name == name for name in DATASETS)


def test_clock_answers_are_the_times_drawn():
    dataset = get_dataset("clock", "train", options={"size": 56, "style": "bold", "rotation": 15})
    for index in range(200):
        example = dataset[index]
        assert re.fullmatch(r"(0[1-9]|1[0-2]):[0-5][0-9]:[0-5][0-9]", example.answer)
        picture = dataset.generator.generate(*(int(part) for part in example.answer.split(":")))
        assert picture.tobytes() == example.images[0].tobytes()


def test_a_clock_without_second_hand_says_so():
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
def test_gsm8k_from_one_file_keeps_the_last_tenth_for_testing(tmp_path, count, test_size):
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
        (GOOD + "\n" + GOOD, "line 2: not valid JSON"),
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


def test_files_that_are_not_text_or_parquet_are_refused(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        get_dataset("gsm8k", "train", path=str(tmp_path / "data.jsonl"))
    (tmp_path / "train.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(ValueError, match=r"train\.parquet is not a readable parquet file"):
        get_dataset("gsm8k", "train", path=str(tmp_path))


def test_line_separators_within_a_text_do_not_split_its_line(tmp_path):
    """U+2028 ends a line for str.splitlines, but JSON allows it inside of a text."""
    row = json.dumps({"question": "One\u2028two\x85three?", "answer": "#### 3"}, ensure_ascii=False)
    (tmp_path / "train.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    assert len(get_dataset("gsm8k", "train", path=str(tmp_path))) == 2


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no dataset file or folder"):
        get_dataset("gsm8k", "train", path=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"neither train\.jsonl nor train\*\.parquet"):
        get_dataset("gsm8k", "train", path=str(tmp_path))


def test_an_unreachable_hub_is_one_clear_line(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match=r"Couldn't reach the Hub.*--dataset_path") as error:
        get_dataset("gsm8k", "train")
    assert "\n" not in str(error.value)


def test_gsm8k_from_the_hub_has_its_official_splits(monkeypatch):
    import datasets

    def hub(name, config, split):
        assert (name, config) == ("openai/gsm8k", "main")
        return [{"question": f"A {split} question?", "answer": "Because.\n#### 5"}] * {"train": 3, "test": 2}[split]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert [len(get_dataset("gsm8k", split)) for split in SPLITS] == [3, 2]
    assert "A test question?" in user_text(get_dataset("gsm8k", "test")[0])


# ---------------------------------------------------------------------------------------------------------------------
# Finding a dataset
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "clok"}, "there is no task 'clok'; did you mean 'clock'?"),
        ({"name": "chess"}, "there is no task 'chess'; known: gsm8k, clock, correlation, arithmetic"),
        ({"split": "validation"}, "unknown split 'validation'"),
        ({"size": 0}, "at least 1 example"),
        ({"seed": -1}, "a seed is 0 or more"),
        ({"path": "/tmp"}, "takes no dataset path"),
        ({"options": {"stile": "bold"}}, "no option 'stile'; did you mean 'style'?"),
        ({"options": {"colour": "red"}}, "no option 'colour'; known: size, style, rotation, second_hand"),
        ({"options": {"num_examples": 3}}, "no option 'num_examples'"),
        ({"options": {"style": "baroque"}}, "unknown clock style 'baroque'"),
        ({"options": {"size": "big"}}, "whole number of pixels"),
        ({"name": "gsm8k", "options": {"size": 3}}, "no option 'size'; known: none"),
        ({"name": "arithmetic", "options": {"steps": "9"}}, "steps must be"),
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
def ids(batch) -> list[str]:
    return [example.id for example in batch]


def loader(size=10, prompts_per_step=4, seed=0, keep=None) -> TrainLoader:
    return TrainLoader(get_dataset("arithmetic", "train", size), prompts_per_step, seed, keep)


def test_every_epoch_visits_each_example_once_in_another_order():
    examples = loader(prompts_per_step=1)
    epochs = [[ids(next(examples))[0] for _ in range(10)] for _ in range(3)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_steps_are_full_and_flow_over_the_end_of_an_epoch():
    steps, one_by_one = loader(prompts_per_step=4), loader(prompts_per_step=1)
    batches = [ids(next(steps)) for _ in range(10)]
    assert all(len(batch) == 4 for batch in batches)
    assert list(chain(*batches)) == [ids(next(one_by_one))[0] for _ in range(40)]


def test_order_depends_on_the_seed_alone():
    first = ids(next(loader(seed=1)))
    np.random.seed(5)
    assert ids(next(loader(seed=1))) == first
    assert ids(next(loader(seed=2))) != first


def test_epoch_and_steps_per_epoch():
    steps = loader(size=10, prompts_per_step=4)
    assert steps.steps_per_epoch == 2
    assert steps.epoch == 0
    next(steps)
    assert steps.epoch == pytest.approx(0.4)
    next(steps), next(steps)
    assert steps.epoch == pytest.approx(1.2)
    assert loader(size=4, prompts_per_step=4).steps_per_epoch == 1


@pytest.mark.parametrize("done", [0, 1, 2, 3, 5, 7])
def test_a_restored_loader_goes_on_where_it_was(done):
    def keep(example):
        return not example.id.endswith("3")

    interrupted, uninterrupted = loader(seed=3, keep=keep), loader(seed=3, keep=keep)
    for _ in range(done):
        next(interrupted), next(uninterrupted)
    state = json.loads(json.dumps(interrupted.state_dict()))
    assert all(type(value) is int for value in state.values())
    resumed = loader(seed=3, keep=keep)
    next(resumed)  # whatever it did before is forgotten
    resumed.load_state_dict(state)
    for _ in range(6):
        assert ids(next(resumed)) == ids(next(uninterrupted))
        assert resumed.epoch == uninterrupted.epoch
        assert resumed.skipped == uninterrupted.skipped


def test_a_restored_loader_knows_that_its_epoch_was_of_use():
    """The rest of an epoch may be left out; only an epoch of which nothing was kept is an error."""
    interrupted = loader(size=10, prompts_per_step=3)
    next(interrupted)
    seen = []
    resumed = loader(size=10, prompts_per_step=3, keep=lambda example: len(seen) > 7 or bool(seen.append(example)))
    resumed.load_state_dict(interrupted.state_dict())
    assert len(next(resumed)) == 3
    assert resumed.skipped == len(seen) == 8


def test_state_of_another_dataset_is_refused():
    with pytest.raises(ValueError, match="10 training examples, this one has 12"):
        loader(size=12).load_state_dict(loader(size=10).state_dict())


def test_examples_that_are_not_kept_are_left_out_and_counted():
    steps = loader(size=10, prompts_per_step=2, keep=lambda example: int(example.id.split("-")[-1]) % 2 == 0)
    seen = list(chain(*(ids(next(steps)) for _ in range(10))))
    assert set(seen) == {f"arithmetic-train-0-{i}" for i in (0, 2, 4, 6, 8)}
    assert all(seen.count(name) == 4 for name in seen)
    assert 15 <= steps.skipped <= 20  # five in each epoch but, perhaps, some at the end of the fourth


def test_an_epoch_in_which_nothing_was_kept_is_an_error():
    """Without it, a loader whose prompts are all too long would search forever."""
    with pytest.raises(ValueError, match="all 10 training examples were left out"):
        next(loader(keep=lambda example: False))
    kept = []
    steps = loader(prompts_per_step=1, keep=lambda example: len(kept) < 3 and not kept.append(example))
    for _ in range(3):
        next(steps)
    with pytest.raises(ValueError, match="all 10 training examples were left out"):
        next(steps)


@pytest.mark.parametrize(
    ("size", "prompts_per_step", "message"), [(3, 4, "3 training examples are too few"), (3, 0, "at least 1 prompt")]
)
def test_steps_that_cannot_be_filled_are_refused(size, prompts_per_step, message):
    with pytest.raises(ValueError, match=message):
        loader(size=size, prompts_per_step=prompts_per_step)


def test_the_test_set_is_the_same_for_every_seed():
    """Runs with different seeds are compared on the same examples; their training examples differ."""
    loaders = [get_dataloaders("clock", 2, 20, 5, seed=seed, options={"size": 56}) for seed in (1, 2)]
    tests = [[fingerprint(test[i]) for i in range(len(test))] for _, test in loaders]
    assert tests[0] == tests[1]
    assert len(tests[0]) == 5
    assert loaders[0][1].seed == EVAL_SEED
    batches = [next(train) for train, _ in loaders]
    assert {example.answer for example in batches[0]} != {example.answer for example in batches[1]}


def test_evaluating_does_not_move_the_loader():
    alone, (beside, test) = loader(size=20), get_dataloaders("arithmetic", 4, 20, 5)
    for _ in range(8):
        assert ids(next(beside)) == ids(next(alone))
        [test[i] for i in range(len(test))]


def test_modules_are_light():
    """The flags are checked and help is shown before torch or transformers take seconds to import."""
    program = """
import sys, arithmetic_generator, clock_image_generator, correlation_generator, evaluator, rldatasets
evaluator.get_evaluator("clock").predict("08:15:30")
rldatasets.get_dataset("clock", "train", 1)[0]
print([name for name in ("torch", "transformers", "datasets", "pyarrow", "matplotlib") if name in sys.modules])
"""
    assert run_python(program).strip() == "[]"
