"""One's own data: rows of a file, a folder or the hub, how their answers are read, and what is refused."""

import json
import re
import time

import pytest
from PIL import Image
from runs import ROOT, handlers_restored, names, read

import answers
import data_files
import main
from evaluator import REWARDS, asked_format, get_evaluator
from rldatasets import SPLITS, get_dataset

ROWS = [
    {"question": "Which colour is this?", "answer": "red", "image": "pictures/red.png"},
    {"question": "Which colour is the sky?", "answer": "blue"},
    {"question": "Which colour is grass?", "answer": "green"},
    {"question": "Which two colours are these?", "answer": "red and blue", "images": ["pictures/red.png", "blue.png"]},
    {"question": "Which colour is snow?", "answer": "white"},
    {"question": "Which colour is coal?", "answer": "black"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_page_shows_these_rows():
    shown = re.search(r"```jsonl\n(.*?)```", (ROOT / "docs/own_data.md").read_text(), re.DOTALL)[1]
    assert [json.loads(line) for line in shown.splitlines()] == ROWS


@pytest.fixture
def own(tmp_path):
    """A file of six rows with two pictures, as docs/own_data.md shows it."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 48), "red").save(tmp_path / "pictures/red.png")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "blue.png")
    return write(tmp_path / "my.jsonl", ROWS)


def own_set(path, split="train", size=None, **options):
    return get_dataset("jsonl", split, size, path=str(path), options=options)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_rows_with_and_without_pictures_are_read(own):
    train, test = (own_set(own, split, reward="text") for split in SPLITS)
    assert (len(train), len(test)) == (5, 1) and (train.modality, test.modality) == ("vision", "text")
    assert [len(train[i].images) for i in range(5)] == [1, 0, 0, 2, 0]
    assert [image.size for image in train[3].images] == [(32, 48), (40, 40)]
    assert [part["type"] for part in train[3].messages[-1]["content"]] == ["image", "image", "text"]
    assert train[1].messages[-1]["content"] == "Which colour is the sky?" and test[0].answer == "black"
    assert own_set(own, size=1, reward="text").modality == "vision" and len(own_set(own, size=2, reward="text")) == 2


def test_the_test_split_may_be_a_file(own, tmp_path):
    other = write(tmp_path / "other.jsonl", [{"question": "2?", "answer": 2}, {"question": "3?", "answer": 3.5}])
    assert len(own_set(own, "train", reward="text", test=other)) == 6
    assert [own_set(other, "test", test=other)[i].answer for i in range(2)] == ["2", "3.5"]


def test_folders_and_columns_as_gsm8k_has_them(tmp_path):
    rows = [{"q": "What is 1 + 1?", "a": "One and one.\n#### 2"}]
    for split in SPLITS:
        write(tmp_path / f"{split}.jsonl", rows)
        example = own_set(tmp_path, split, question="q", answer="a")[0]
        assert example.answer == "2" and example.messages[-1]["content"] == "What is 1 + 1?"


@pytest.mark.slow
def test_parquet_holds_its_pictures(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    picture = {"bytes": (tmp_path / "red.png").read_bytes(), "path": None}
    rows = [
        {"question": "What?", "answer": "B", "image": picture},
        {"question": "And?", "answer": "(c)", "image": None},
    ]
    for split in SPLITS:
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}-00000-of-00001.parquet")
    dataset = own_set(tmp_path, reward="choice")
    assert [dataset[i].answer for i in range(2)] == ["B", "C"]
    assert [[image.size for image in dataset[i].images] for i in range(2)] == [[(20, 30)], []]


@pytest.mark.slow
def test_any_data_set_of_the_hub_can_be_named(monkeypatch):
    import datasets

    def hub(name, *subset, split):
        assert (name, subset, split) == ("someone/shapes", ("round",), "train")
        rows = {"asked": ["What?", "And?"], "told": ["08:15", "3:00:10"], "photo": [Image.new("L", (9, 9)), None]}
        features = datasets.Features(
            asked=datasets.Value("string"), told=datasets.Value("string"), photo=datasets.Image()
        )
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(data_files, "hub_trouble", lambda name: "")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    columns = {"question": "asked", "answer": "told", "image": "photo"}
    dataset = own_set("someone/shapes", reward="time", subset="round", **columns)
    assert [dataset[i].answer for i in range(2)] == ["08:15:00", "03:00:10"] and dataset.modality == "vision"
    assert [[image.size for image in dataset[i].images] for i in range(2)] == [[(9, 9)], []]
    with pytest.raises(ValueError, match=r"no column 'answer', only asked, told, photo"):
        own_set("someone/shapes", reward="time", subset="round")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "What?"}, "line 2: 'answer' is not a text or empty; the row has question"),
        ({"question": " ", "answer": "1"}, "line 2: 'question' is not a text or empty"),
        ({"question": "What?", "answer": True}, "line 2: 'answer' is not a text"),
        (["a list"], "line 2: expected an object"),
        ({"question": "What?", "answer": "seven"}, "line 2: the answer 'seven' cannot be read as reward=number"),
        ({"question": "What?", "answer": "1", "image": "no.png"}, "line 2: there is no file no.png"),
        ({"question": "What?", "answer": "1", "image": "../out.png"}, "line 2: the picture ../out.png is outside"),
        ({"question": "What?", "answer": "1", "image": "link.png"}, "line 2: the picture link.png is outside"),
        ({"question": "What?", "answer": "1", "images": ["my.jsonl"]}, "line 2: the picture my.jsonl cannot be read"),
        ({"question": "What?", "answer": "1", "image": 7}, "line 2: a picture is the path of a file, as text, not int"),
        ({"question": "\ud83d", "answer": "1"}, "line 2: 'question' has half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, row, message):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "out.png")
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    path = write(folder / "my.jsonl", [{"question": "What is 1?", "answer": "1"}, row])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        own_set(path, test=path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_an_absolute_path_is_outside(own, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    path = write(other / "my.jsonl", [{"question": "?", "answer": "1", "image": str(tmp_path / "blue.png")}])
    with pytest.raises(ValueError, match="outside of the folder"):
        own_set(path, test=path)


def test_paths_and_options_that_do_not_work_are_refused(own, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dataset file or folder .*nowhere\.jsonl"):
        own_set(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no dataset file .*other\.jsonl"):
        own_set(own, "test", test=tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="needs --dataset_path"):
        get_dataset("jsonl", "train")
    with pytest.raises(ValueError, match=r"no reward 'nunber'; did you mean 'number'\?"):
        own_set(own, reward="nunber")


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


@pytest.mark.parametrize("kind", REWARDS)
def test_gold_earns_the_most_and_junk_the_least(kind):
    evaluator = get_evaluator("jsonl", {"reward": kind})
    gold = evaluator.canonical(evaluator.gold)
    assert sum(evaluator.score(asked_format("so", gold), gold).values()) == evaluator.highest
    assert sum(evaluator.score("", gold).values()) == evaluator.lowest
    assert evaluator.is_correct(asked_format("so", gold), gold) and not evaluator.is_correct("", gold)


@pytest.mark.parametrize(
    ("kind", "gold", "right", "wrong"),
    [
        ("number", "1,080.5", ["1080.5", "$1,080.50"], ["1080", "1080.5 or 3"]),
        ("number", "1/3", ["1/3", "2/6"], ["0.33"]),
        ("choice", "b", ["B", "(B)", "b)", "B. A dog", "**B**"], ["A", "A or B", "bad", "", "the dog"]),
        (
            "text",
            "Ada  Lovelace.",
            ["ada lovelace", '"Ada Lovelace"', "ＡDA Lovelace"],
            ["Ada", "Ada\nLovelace", "..."],
        ),
    ],
)
def test_answers_are_read_as_people_write_them(kind, gold, right, wrong):
    evaluator = get_evaluator("jsonl", {"reward": kind})
    gold = evaluator.canonical(gold)
    for texts, expected in ((right, 2.0), (wrong, 0.0)):
        assert {answer: evaluator.score(asked_format("so", answer), gold)["correctness"] for answer in texts} == {
            answer: expected for answer in texts
        }


def test_articles_and_pronouns_are_no_choices():
    choice = get_evaluator("jsonl", {"reward": "choice"})
    assert choice.predict("A dog barks. I think it is C") == "C"
    assert choice.predict("A dog. I'm not sure") is None
    assert get_evaluator("jsonl", {"reward": "text"}).predict("I think\nIt is Paris.") == "it is paris"


@pytest.mark.parametrize("pattern", [answers.CHOICE, answers.LINE])
def test_patterns_take_linear_time(pattern):
    start = time.perf_counter()
    for part in (" ", "a", "B ", "b\n", "(", "A or ", ".,"):
        sum(1 for _ in pattern.finditer(part * 100_000))
    assert time.perf_counter() - start < 10


# ---------------------------------------------------------------------------------------------------------------------
# A run


@pytest.mark.slow
def test_a_run_on_six_rows_with_two_pictures(own, tmp_path, model_folder):
    flags = "--dataset_name jsonl --dataset_options reward=text --device cpu --prompts_per_step 2 --num_generations 2 "
    flags += "--max_steps 2 --max_prompt_length 200 --max_completion_length 8 --log_completions_steps 1"
    command = ["--model_path", str(model_folder("qwen2_vl")), "--dataset_path", own, *flags.split()]
    with handlers_restored():
        assert main.main([*command, "--output_dir", str(tmp_path / "run")]) == 0
    assert [record["step"] for record in read(tmp_path / "run/train_logs.json")] == [1, 2]
    assert read(tmp_path / "run/config.json")["task"]["reward_names"] == list(
        get_evaluator("jsonl", {"reward": "text"}).components
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model_path tiny", "no tiny model"),
        ("--dataset_options reward=poem", "no reward 'poem'"),
        ("--dataset_options reward=number", "line 1: the answer 'red' cannot be read"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_2(flags, message, own, tmp_path, model_folder, capsys):
    before = names(tmp_path)
    command = ["--model_path", str(model_folder("qwen2")), "--dataset_name", "jsonl", "--dataset_path", own]
    command += ["--dataset_options", "reward=text", "--prompts_per_step", "2"]
    assert main.main([*command, "--output_dir", str(tmp_path / "run"), *flags.split()]) == 2
    assert message in capsys.readouterr().err and names(tmp_path) == before


@pytest.mark.slow
def test_pictures_need_a_model_that_sees(own, tmp_path, model_folder, capsys):
    command = ["--model_path", str(model_folder("qwen2")), "--dataset_name", "jsonl", "--dataset_path", own]
    command += ["--dataset_options", "reward=text", "--prompts_per_step", "2", "--max_prompt_length", "200"]
    command += ["--max_completion_length", "8", "--output_dir", str(tmp_path / "run")]
    assert main.main(command) == 2
    assert "reads text only" in capsys.readouterr().err and not (tmp_path / "run").exists()
