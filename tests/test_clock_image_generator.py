"""Clock pictures show their time, are reproducible, and are drawn fast."""

import hashlib
import math
import time

import numpy as np
import pytest
from other_process import run_python
from PIL import Image

from clock_image_generator import STYLES, ClockImageGenerator

BOLD = {"hour": (216, 30, 30), "minute": (15, 157, 58), "second": (31, 63, 224)}  # the colours of the bold hands


def direction(picture: Image.Image, colour: tuple[int, int, int]) -> float:
    """The mean direction of a colour's pixels from the centre, in turns clockwise from 12 o'clock."""
    pixels = np.asarray(picture).astype(int)  # (H, W, 3)
    rows, columns = np.nonzero(np.abs(pixels - np.array(colour)).max(axis=-1) < 40)
    centre = (picture.width - 1) / 2
    return math.atan2(columns.mean() - centre, centre - rows.mean()) / (2 * math.pi) % 1


def turns_apart(a: float, b: float) -> float:
    return min((a - b) % 1, (b - a) % 1)


@pytest.mark.parametrize("size", [56, 224])
@pytest.mark.parametrize("rotation", [0, 30, -100])
def test_each_hand_points_where_the_time_says(size, rotation):
    generator = ClockImageGenerator(size, "bold", rotation)
    # The hands of these times are far apart: a hand that covers another would shift the mean of its visible pixels.
    for hour, minute, second in [(1, 15, 40), (10, 35, 5), (4, 0, 50), (20, 12, 26)]:
        picture = generator.generate(hour, minute, second)
        seconds = hour * 3600 + minute * 60 + second
        for hand, period in (("hour", 43200), ("minute", 3600), ("second", 60)):
            expected = seconds / period + rotation / 360
            assert turns_apart(direction(picture, BOLD[hand]), expected % 1) < 0.012, (hand, hour, minute, second)


def test_hour_hand_advances_with_the_minutes():
    generator = ClockImageGenerator(224, "bold", second_hand=False)
    early, late = (direction(generator.generate(3, minute, 0), BOLD["hour"]) for minute in (0, 59))
    assert turns_apart(late, early) == pytest.approx(59 / 720, abs=0.01)


def test_short_hands_stay_visible_under_long_ones():
    """At 12:00:00 all three hands overlap; some pixels of each must still be red, green and blue."""
    pixels = np.asarray(ClockImageGenerator(56, "bold").generate(0, 0, 0)).astype(int)  # (H, W, 3)
    for channel in range(3):
        others = np.delete(pixels, channel, axis=-1).max(axis=-1)  # (H, W)
        assert (pixels[..., channel] - others > 50).sum() >= 10


@pytest.mark.parametrize("style", STYLES)
def test_different_times_give_different_pictures(style):
    generator = ClockImageGenerator(56, style)
    times = [(hour, minute, 17) for hour in range(12) for minute in range(60)]
    times += [(7, 23, second) for second in range(60) if second != 17]
    pictures = {generator.generate(*time).tobytes() for time in times}
    assert len(pictures) == len(times)


def test_hour_13_looks_like_hour_1():
    generator = ClockImageGenerator(112)
    assert generator.generate(13, 5, 9).tobytes() == generator.generate(1, 5, 9).tobytes()


def test_second_hand_can_be_left_out():
    generator = ClockImageGenerator(112)
    with_hand, without = generator.generate(3, 0, 30), ClockImageGenerator(112, second_hand=False).generate(3, 0, 30)
    assert np.asarray(with_hand).sum() < np.asarray(without).sum()  # a hand is darker than the dial


def test_styles_and_rotations_look_different():
    looks = [ClockImageGenerator(112, style).generate(4, 50, 20).tobytes() for style in STYLES]
    looks += [ClockImageGenerator(112, style, rotation=30).generate(4, 50, 20).tobytes() for style in STYLES]
    assert len(set(looks)) == 2 * len(STYLES)


def test_edges_are_smooth():
    """Without smoothing, a picture has only the colours of the hands, the frame and the background."""
    pixels = np.asarray(ClockImageGenerator(56, "bold").generate(2, 22, 41)).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50


@pytest.mark.parametrize("size", [16, 57, 224])
def test_picture_has_the_requested_size(size):
    picture = ClockImageGenerator(size, "numerals").generate(9, 9, 9)
    assert picture.size == (size, size)
    assert picture.mode == "RGB"


def test_same_bytes_in_another_process():
    program = """
import hashlib
from clock_image_generator import STYLES, ClockImageGenerator
ClockImageGenerator(99, "bold").generate(1, 1, 1)
pictures = [ClockImageGenerator(64, style, 12.5).generate(6, 7, 8).tobytes() for style in STYLES]
print(hashlib.sha256(b"".join(pictures)).hexdigest())
"""
    elsewhere = run_python(program)
    here = b"".join(ClockImageGenerator(64, style, 12.5).generate(6, 7, 8).tobytes() for style in STYLES)
    assert elsewhere.strip() == hashlib.sha256(here).hexdigest()


@pytest.mark.parametrize("size", [56, 224])
@pytest.mark.parametrize("style", STYLES)
def test_drawing_takes_under_10_ms(style, size):
    generator = ClockImageGenerator(size, style)
    seconds = []
    for minute in range(20):
        start = time.perf_counter()
        generator.generate(5, minute, 30)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 0.010


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "baroque"}, "style 'baroque'.*classic"),
        ({"size": 3}, "size.*3"),
        ({"size": 56.5}, "size.*56.5"),
        ({"size": "large"}, "size.*large"),
        ({"rotation": "left"}, "rotation.*left"),
        ({"rotation": math.nan}, "rotation.*nan"),
        ({"second_hand": "perhaps"}, "second_hand.*perhaps"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClockImageGenerator(**arguments)


@pytest.mark.parametrize("time", [(24, 0, 0), (-1, 0, 0), (3, 60, 0), (3, 0, 60)])
def test_impossible_times_are_refused(time):
    with pytest.raises(ValueError, match=":".join(map(str, time))):
        ClockImageGenerator(56).generate(*time)
