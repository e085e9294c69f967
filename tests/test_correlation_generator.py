"""Scatter plots have the exact sample correlation that was requested, and show every point."""

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from other_process import run_python

from correlation_generator import STYLES, CorrelationGenerator


@given(r=st.floats(-1, 1), num_points=st.integers(5, 300), seed=st.integers(0, 2**32))
def test_sample_correlation_is_exactly_r(r, num_points, seed):
    """The sample correlation of 75 points from a population differs from r by 0.06 on average: label noise."""
    x, y = CorrelationGenerator(56, num_points).points(r, np.random.default_rng(seed))
    assert np.corrcoef(x, y)[0, 1] == pytest.approx(r, abs=1e-9)


@pytest.mark.parametrize("r", [-1.0, -0.37, 0.0, 0.99, 1.0])
def test_three_points_are_enough(r):
    for seed in range(50):
        x, y = CorrelationGenerator(56, 3).points(r, np.random.default_rng(seed))
        assert np.corrcoef(x, y)[0, 1] == pytest.approx(r, abs=1e-9)


def test_points_are_standardized_and_random():
    generator = CorrelationGenerator(56, 75)
    x, y = generator.points(0.3, np.random.default_rng(0))
    for values in (x, y):
        assert values.shape == (75,)
        assert values.mean() == pytest.approx(0, abs=1e-12)
        assert values.std() == pytest.approx(1)
    assert not np.allclose(x, generator.points(0.3, np.random.default_rng(1))[0])


def dark_pixels(picture) -> np.ndarray:
    return np.asarray(picture.convert("L")) < 128  # (H, W)


@pytest.mark.parametrize("r", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_drawn_dots_have_the_correlation(r):
    """The correlation of the coordinates of all dark pixels is r: large y is at the top, both axes have one scale."""
    generator = CorrelationGenerator(224, 75, "plain")
    measured = []
    for seed in range(10):
        rows, columns = np.nonzero(dark_pixels(generator.generate(r, np.random.default_rng(seed))))
        measured.append(np.corrcoef(columns, -rows)[0, 1])
    assert np.mean(measured) == pytest.approx(r, abs=0.03)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [56, 224])
def test_outliers_are_drawn_whole(style, size):
    """For a point far from the others the axes must be extended until its whole dot is inside the frame."""
    generator = CorrelationGenerator(size, 200, style)
    x, y = np.zeros(200), np.zeros(200)
    empty = np.asarray(generator.draw(x, y)).astype(int)
    for far_x, far_y in [(14, 14), (-14, 0), (0, -14)]:
        x[0], y[0] = far_x, far_y
        picture = np.asarray(generator.draw(x, y)).astype(int)
        changed = np.argwhere(np.abs(picture - empty).max(axis=-1) > 0)  # of the outlier, and of its dot at the centre
        far = changed[np.abs(changed - (size - 1) / 2).max(axis=1) > size / 4]
        assert far.min() >= 0.02 * size - 1
        assert far.max() <= 0.98 * size
        darkness = np.pi * (STYLES[style].radius * size) ** 2  # the area of a whole dot, in pixels
        assert len(far) >= darkness


def test_each_point_is_a_dot():
    x = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    dark = dark_pixels(CorrelationGenerator(224, 5, "bold").draw(x, x * 0))
    crossings = np.diff(dark[112].astype(int))
    assert (crossings == 1).sum() == 5


def test_picture_depends_on_r_and_rng_only():
    generator = CorrelationGenerator(56)
    first = generator.generate(0.4, np.random.default_rng(3)).tobytes()
    generator.generate(-0.4, np.random.default_rng(4))
    assert generator.generate(0.4, np.random.default_rng(3)).tobytes() == first
    assert generator.generate(0.4, np.random.default_rng(4)).tobytes() != first


def test_same_bytes_in_another_process():
    program = """
import hashlib
import numpy as np
from correlation_generator import STYLES, CorrelationGenerator
pictures = [CorrelationGenerator(64, 30, s).generate(0.6, np.random.default_rng(5)).tobytes() for s in STYLES]
print(hashlib.sha256(b"".join(pictures)).hexdigest())
"""
    elsewhere = run_python(program)
    here = b"".join(CorrelationGenerator(64, 30, s).generate(0.6, np.random.default_rng(5)).tobytes() for s in STYLES)
    assert elsewhere.strip() == hashlib.sha256(here).hexdigest()


def test_styles_look_different():
    pictures = [CorrelationGenerator(56, style=style).generate(0.1, np.random.default_rng(0)) for style in STYLES]
    assert len({picture.tobytes() for picture in pictures}) == len(STYLES)
    assert all(picture.size == (56, 56) and picture.mode == "RGB" for picture in pictures)


@pytest.mark.parametrize("size", [56, 224])
@pytest.mark.parametrize("style", STYLES)
def test_drawing_takes_under_10_ms(style, size):
    generator = CorrelationGenerator(size, style=style)
    rng, seconds = np.random.default_rng(0), []
    for _ in range(20):
        start = time.perf_counter()
        generator.generate(0.5, rng)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 0.010


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "baroque"}, "style 'baroque'.*classic"),
        ({"size": 3}, "size.*3"),
        ({"size": "large"}, "size.*large"),
        ({"num_points": 2}, "num_points.*2"),
        ({"num_points": 10**7}, "num_points.*10000000"),
        ({"num_points": 7.5}, "num_points.*7.5"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CorrelationGenerator(**arguments)


@pytest.mark.parametrize("r", [1.001, -2, float("nan")])
def test_impossible_correlations_are_refused(r):
    with pytest.raises(ValueError, match=f"{r}"):
        CorrelationGenerator(56).points(r, np.random.default_rng(0))
