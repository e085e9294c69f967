"""Scenes: what the overview shows and what only a crop shows."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from PIL import ImageColor

from scene_generator import COLOURS, Scene, SceneGenerator


def hues(picture) -> set[str]:
    """The names of the colours that some pixels of a picture have exactly."""
    pixels = {tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3).tolist()}
    return {name for name, code in COLOURS.items() if ImageColor.getrgb(code) in pixels}


@pytest.mark.parametrize("cells", [4, 9])
def test_the_overview_is_grey_and_shows_the_odd_cell(cells):
    generator = SceneGenerator(112, cells)
    colours = ("red",) * cells
    pictures = [np.asarray(generator.overview(Scene(odd, colours))) for odd in range(1, cells + 1)]
    for picture in pictures:
        assert (picture == picture[..., :1]).all()  # no colour
    assert len({picture.tobytes() for picture in pictures}) == cells


def test_the_overview_does_not_depend_on_the_colours():
    generator, rng = SceneGenerator(56), np.random.default_rng(0)
    scenes = [dataclasses.replace(generator.scene(rng), odd=2) for _ in range(5)]
    assert len({scene.colours for scene in scenes}) > 1
    assert len({generator.overview(scene).tobytes() for scene in scenes}) == 1


def test_a_crop_has_the_colour_of_its_cell_alone():
    generator = SceneGenerator(56)
    scene = Scene(3, ("red", "blue", "yellow", "green"))
    for cell, colour in enumerate(scene.colours, 1):
        assert hues(generator.crop(scene, cell)) == {colour}
    assert scene.answer == "yellow"


def test_scenes_are_uniform_and_cells_are_independent():
    generator, rng = SceneGenerator(56), np.random.default_rng(0)
    scenes = [generator.scene(rng) for _ in range(4000)]
    for counts in (Counter(scene.odd for scene in scenes), Counter(scene.answer for scene in scenes)):
        assert len(counts) == 4 and all(abs(count / 4000 - 0.25) < 0.03 for count in counts.values())
    others = [scene.colours[scene.odd % 4] == scene.answer for scene in scenes]
    assert abs(np.mean(others) - 0.25) < 0.03  # a look at another cell tells nothing


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((8,), "32"), ((56.0,), "56.0"), ((2000,), "1024"), ((56, 5), "4 or 9"), ((56, "4"), "4 or 9")],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        SceneGenerator(*arguments)


@pytest.mark.parametrize("cell", [0, 5, -1])
def test_there_is_no_such_cell(cell):
    with pytest.raises(ValueError, match="1 to 4"):
        SceneGenerator(56).crop(Scene(1, ("red",) * 4), cell)
