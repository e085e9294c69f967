"""Environments with pictures: what each kind of feedback shows, and that none of them knows the right answer."""

import dataclasses
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from runs import records, small_run  # noqa: F401  (a fixture)

from evaluator import get_evaluator
from rldatasets import get_dataset
from visual_environments import FEEDBACK

TASKS = {
    "look": ({"size": 56}, "2"),
    "clock_feedback": ({"size": 56, "style": "bold"}, "<answer>03:40:10</answer>"),
    "correlation_feedback": ({"size": 56, "style": "bold"}, "<answer>0.20</answer>"),
}
UNREADABLE = "no answer at all"


def dataset_of(task: str, feedback: str = "real", **options):
    return get_dataset(task, "train", 20, options=TASKS[task][0] | {"feedback": feedback} | options)


def first_observation(dataset, index: int, text: str, **changes):
    """What a new episode shows after a first turn with this text."""
    example = dataclasses.replace(dataset[index], **changes)
    return dataset.environments([example])[0].step(text)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_text_gets_the_same_picture(task):
    for feedback in FEEDBACK[:-1]:
        shown = [first_observation(dataset_of(task, feedback), 3, TASKS[task][1]).images[0].tobytes() for _ in range(2)]
        assert shown[0] == shown[1]


@pytest.mark.parametrize("feedback", FEEDBACK)
@pytest.mark.parametrize("task", TASKS)
def test_the_right_answer_is_never_read(task, feedback):
    dataset = dataset_of(task, feedback)
    honest = first_observation(dataset, 3, TASKS[task][1])
    garbled = first_observation(dataset, 3, TASKS[task][1], answer="no such answer")
    assert honest.text == garbled.text
    assert [one.tobytes() for one in honest.images] == [one.tobytes() for one in garbled.images]


@pytest.mark.parametrize("task", TASKS)
def test_each_feedback_shows_what_it_says(task):
    shown = {}
    for feedback in FEEDBACK:
        observation = first_observation(dataset_of(task, feedback), 3, TASKS[task][1])
        shown[feedback] = [np.asarray(one) for one in observation.images]
        assert observation.text and not observation.malformed
    original = np.asarray(dataset_of(task)[3].images[0])
    assert shown["none"] == []
    assert (shown["blank"][0] == 255).all() and shown["blank"][0].shape == original.shape
    assert (shown["original"][0] == original).all()
    assert not np.array_equal(shown["real"][0], original)
    assert not np.array_equal(shown["random"][0], shown["real"][0])
    assert not np.array_equal(shown["random"][0], original)


@pytest.mark.parametrize(
    ("task", "text", "drawn"),
    [
        ("look", "2", "3"),
        ("look", "4", "1"),
        ("clock_feedback", "<answer>03:40:10</answer>", "<answer>04:40:10</answer>"),
        ("clock_feedback", "<answer>12:00:00</answer>", "<answer>01:00:00</answer>"),
        ("correlation_feedback", "<answer>0.25</answer>", "<answer>0.75</answer>"),
        ("correlation_feedback", "<answer>0.75</answer>", "<answer>0.25</answer>"),
    ],
)
def test_shifted_feedback_says_the_same_of_another_drawing(task, text, drawn):
    shown, real = first_observation(dataset_of(task, "shifted"), 3, text), first_observation(dataset_of(task), 3, drawn)
    assert shown.text == real.text and shown.images[0].tobytes() == real.images[0].tobytes()


@pytest.mark.parametrize("task", TASKS)
def test_random_feedback_does_not_depend_on_the_text(task):
    other = {
        "look": "3",
        "clock_feedback": "<answer>10:10:10</answer>",
        "correlation_feedback": "<answer>-0.9</answer>",
    }
    dataset = dataset_of(task, "random")
    one, two = (first_observation(dataset, 3, text).images[0] for text in (TASKS[task][1], other[task]))
    assert one.tobytes() == two.tobytes()
    real = dataset_of(task)
    one, two = (first_observation(real, 3, text).images[0] for text in (TASKS[task][1], other[task]))
    assert one.tobytes() != two.tobytes()


@pytest.mark.parametrize("text", [UNREADABLE, "", "9" * 10_000, "<answer>", "<answer></answer>", "25:99", "-3", "½"])
@pytest.mark.parametrize("task", ["clock_feedback", "correlation_feedback"])
def test_an_unreadable_answer_is_shown_the_plain_original(task, text):
    dataset = dataset_of(task)
    observation = first_observation(dataset, 3, text)
    if not observation.malformed:
        assert get_evaluator(task).predict(text) is not None
        return
    assert observation.images[0].tobytes() == dataset[3].images[0].tobytes()


@pytest.mark.parametrize("text", [UNREADABLE, "0", "5", "cell", "1" * 400])
def test_a_cell_that_does_not_exist_is_malformed(text):
    assert first_observation(dataset_of("look"), 3, text).malformed


def test_a_look_shows_the_named_cell():
    dataset = dataset_of("look")
    scene = dataset.generator.scene(dataset.rng(3))
    for cell in range(1, 5):
        shown = first_observation(dataset, 3, f"I look at cell {cell}").images[0]
        assert shown.tobytes() == dataset.generator.crop(scene, cell).tobytes()


def test_random_looks_show_every_cell_of_the_scene():
    dataset = dataset_of("look", "random")
    right = 0
    for index in range(20):
        scene = dataset.generator.scene(dataset.rng(index))
        shown = first_observation(dataset, index, str(scene.odd)).images[0].tobytes()
        cells = [dataset.generator.crop(scene, cell).tobytes() for cell in range(1, 5)]
        assert shown in cells
        right += shown == cells[scene.odd - 1]
    assert 0 < right < 14  # one in four, whatever the model asked for


def test_an_answer_block_ends_the_episode_of_look():
    assert first_observation(dataset_of("look"), 3, "<answer>red</answer>") is None


def test_several_looks_are_turns():
    assert dataset_of("look", looks=3).max_turns == 4
    assert dataset_of("look").max_turns == 2 and dataset_of("clock_feedback").max_turns == 2


@pytest.mark.parametrize("view", ["overlay", "side", "alone"])
def test_views_of_a_clock_show_the_answer(view):
    dataset = dataset_of("clock_feedback", view=view)
    texts = ("<answer>03:40:10</answer>", "<answer>09:40:10</answer>")
    one, two = (np.asarray(first_observation(dataset, 3, text).images[0], dtype=int) for text in texts)
    assert (one != two).any()
    original = np.asarray(dataset[3].images[0], dtype=int)
    if view == "overlay":
        unchanged = (one == original).all(-1).mean()
        assert 0.7 < unchanged < 1
    if view == "side":
        assert one.shape[1] == 2 * original.shape[1] and (one[:, : original.shape[1]] == original).all()
    if view == "alone":
        assert (one == np.asarray(dataset.generators[0].generate(3, 40, 10))).all()


@pytest.mark.parametrize("view", ["ellipse", "points"])
def test_views_of_a_correlation_keep_the_points(view):
    dataset = dataset_of("correlation_feedback", view=view)
    shown = np.asarray(first_observation(dataset, 3, "<answer>0.20</answer>").images[0], dtype=int)
    original = np.asarray(dataset[3].images[0], dtype=int)
    assert 0.5 < (shown == original).all(-1).mean() < 1


def test_drawn_points_have_the_scale_of_the_plot():
    """A third of the plots have axes beyond 3, since a point lies there: the drawing must have the same axes."""
    dataset = dataset_of("correlation_feedback", view="points")
    wide = 0
    for index in range(20):
        example, (_, x, y) = dataset[index], dataset.points(index)
        shown = first_observation(dataset, index, "<answer>0.20</answer>").images[0]
        limit = max(3.0, np.abs([x, y]).max())
        points = dataset.generator.points(0.2, np.random.default_rng(zlib.crc32(example.id.encode())))
        assert shown.tobytes() == dataset.generator.draw_over(example.images[0], *points, limit).tobytes()
        wide += limit > 3
    assert wide


def test_a_hidden_rotation_turns_dial_and_drawing_alike():
    dataset = dataset_of("clock_feedback", marked=False)
    angles = set()
    for index in range(20):
        example, generator = dataset[index], dataset.generator_of(index)
        angles.add(generator.rotation)
        hour, minute, second = (int(part) for part in example.answer.split(":"))
        assert example.images[0].tobytes() == generator.generate(hour, minute, second).tobytes()
        drawn = first_observation(dataset, index, "<answer>03:40:10</answer>").images[0]
        assert drawn.tobytes() == generator.draw_over(example.images[0], 3, 40, 10).tobytes()
    assert len(angles) > 6 and all(angle % 30 == 0 for angle in angles)
    halves = dataset_of("clock_feedback", marked=False, rotations=2)
    assert {halves.generator_of(index).rotation for index in range(20)} == {0, 180}


def test_an_unmarked_upright_dial_looks_like_a_rotated_one():
    """Without the mark, 12 o'clock on a dial that is turned by 180 degrees is drawn like 6 o'clock upright, except for
    the minute hand."""
    upright, turned = dataset_of("clock_feedback", marked=False, rotations=2).generators
    one, two = (np.asarray(clock.generate(3, 0, 0), dtype=int) for clock in (upright, turned))
    assert np.abs(one - two[::-1, ::-1]).max() <= 64  # rounding of the corners of hands


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("look", {"looks": 0}),
        ("look", {"cells": 5}),
        ("look", {"feedback": "reel"}),
        ("clock_feedback", {"view": "above"}),
        ("clock_feedback", {"marked": 3}),
        ("clock_feedback", {"rotations": 0}),
        ("correlation_feedback", {"view": "overlay"}),
        ("correlation_feedback", {"feedback": 1}),
    ],
)
def test_bad_options_are_named(task, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        get_dataset(task, "train", 4, options=options)


# ---------------------------------------------------------------------------------------------------------------------
# How the last answer compares with the first


def test_improved_harmed_and_copied_are_shares_of_rows():
    evaluator = get_evaluator("correlation_feedback")
    pairs = [("0.10", "0.30"), ("0.50", "0.10"), ("0.20", "0.20"), ("junk", "0.40")]
    episodes = [[f"<answer>{first}</answer>", f"<answer>{last}</answer>"] for first, last in pairs]
    completions = [evaluator.parse_episode(texts) for texts in episodes]
    metrics = evaluator.metrics(completions, ["0.40"] * 4)
    assert metrics["first_error"] == pytest.approx((0.3 + 0.1 + 0.2 + 2.0) / 4)
    assert metrics["last_error"] == metrics["mean_abs_error"] == pytest.approx((0.1 + 0.3 + 0.2 + 0.0) / 4)
    assert (metrics["improved"], metrics["harmed"], metrics["copied"]) == (0.5, 0.25, 0.25)


def test_only_the_last_answer_is_rewarded():
    evaluator = get_evaluator("clock_feedback")
    right, wrong = "<answer>08:15:30</answer>", "<answer>02:15:30</answer>"
    assert evaluator.score_episode([right, wrong], "08:15:30") == evaluator.score(wrong, "08:15:30")
    assert evaluator.score_episode([wrong, right], "08:15:30") == evaluator.score(right, "08:15:30")


def test_improvement_is_paid_only_when_asked_for():
    plain, paid = (get_evaluator("clock_feedback", options) for options in ({}, {"improvement": "2"}))
    near, far = "<answer>08:15:30</answer>", "<answer>02:15:30</answer>"  # 6 hours apart, the largest error
    assert "improvement" not in plain.reward_names and "improvement" not in get_evaluator("clock_feedback").reward_names
    for texts, improvement in (
        ([far, near], 2),
        ([near, far], -2),
        ([near, near], 0),
        ([near], 0),
        (["junk", near], 2),
    ):
        scores = paid.score_episode(texts, "08:15:30")
        assert scores.pop("improvement") == improvement
        assert scores == plain.score_episode(texts, "08:15:30")


@pytest.mark.parametrize("weight", ["much", "-1", "nan", "inf"])
def test_a_bad_weight_of_improvement_is_named(weight):
    with pytest.raises(ValueError, match="improvement"):
        get_evaluator("correlation_feedback", {"improvement": weight})


def test_colours_are_read_as_whole_words():
    evaluator = get_evaluator("look")
    assert evaluator.is_correct("<answer>Red</answer>", "red")
    assert evaluator.predict("<answer>reddish</answer>") is None
    assert evaluator.score("<answer>red or blue</answer>", "red")["correctness"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# The documented environment


@pytest.mark.slow
def test_the_documented_environment_trains(small_run, monkeypatch):  # noqa: F811
    """The thirty lines of docs/environments.md, registered as they say, run with two turns."""
    import rldatasets
    from environments import Observation
    from evaluator import EVALUATORS, ExactNumberEvaluator

    page = (Path(rldatasets.__file__).parent / "docs" / "environments.md").read_text()
    namespace = {**vars(rldatasets), "Observation": Observation}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], namespace)
    monkeypatch.setitem(rldatasets.DATASETS, "elapsed", namespace["ElapsedDataset"])
    monkeypatch.setitem(EVALUATORS, "elapsed", ExactNumberEvaluator)
    run = small_run(
        "correlation", "--dataset_name elapsed --dataset_options size=32 style=bold --max_prompt_length 200"
    )
    logged = records(run)
    assert logged[-1]["step"] == 4 and max(record["turns"] for record in logged) > 1
