"""The points of a scatter plot have exactly the correlation that was asked for, and all of them are drawn."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from correlation_generator import STYLES, CorrelationGenerator

ROOT = Path(__file__).parents[1]


def run_python(program: str) -> str:
    """What a program prints that runs in a process of its own, in the project's folder."""
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@given(r=st.floats(-1, 1), num_points=st.integers(5, 300), seed=st.integers(0, 2**32))
def test_sample_correlation_is_exactly_r(r, num_points, seed):
    """Points from a population with correlation r miss it by 0.06 on average; as labels that would be noise."""
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
def test_drawn_dots_have_the_correlation_too(r):
    """The ink itself, weighed pixel by pixel, must tell r: up is up, the axes have one scale."""
    generator = CorrelationGenerator(224, 75, "plain")
    measured = []
    for seed in range(10):
        rows, columns = np.nonzero(dark_pixels(generator.generate(r, np.random.default_rng(seed))))
        measured.append(np.corrcoef(columns, -rows)[0, 1])
    assert np.mean(measured) == pytest.approx(r, abs=0.03)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [56, 224])
def test_no_dot_is_cut_off_even_far_out(style, size):
    """One point far from the rest must be drawn whole, inside the frame, by shrinking the scale."""
    generator = CorrelationGenerator(size, 200, style)
    x, y = np.zeros(200), np.zeros(200)
    empty = np.asarray(generator.draw(x, y)).astype(int)
    for far_x, far_y in [(14, 14), (-14, 0), (0, -14)]:
        x[0], y[0] = far_x, far_y
        picture = np.asarray(generator.draw(x, y)).astype(int)
        changed = np.argwhere(np.abs(picture - empty).max(axis=-1) > 0)  # the dot that moved away from the centre
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


def test_pictures_are_pure_in_r_and_rng():
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
def test_a_picture_costs_under_10_ms(style, size):
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
        ({"style": "baroque"}, "unknown correlation style 'baroque'; choose from classic"),
        ({"size": 3}, "whole number of pixels"),
        ({"size": "large"}, "whole number of pixels"),
        ({"num_points": 2}, "num_points must be"),
        ({"num_points": 10**7}, "num_points must be"),
        ({"num_points": 7.5}, "num_points must be"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CorrelationGenerator(**arguments)


@pytest.mark.parametrize("r", [1.001, -2, float("nan")])
def test_impossible_correlations_are_refused(r):
    with pytest.raises(ValueError, match="between -1 and 1"):
        CorrelationGenerator(56).points(r, np.random.default_rng(0))
