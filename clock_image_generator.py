"""Pictures of analogue clocks: from a time to an RGB picture.

All hands move continuously: the hour hand advances with every minute and second, the minute hand with every second. A
picture is drawn larger and averaged down, for smooth edges. Nothing is random: the same time, style and size give the
same bytes. `python clock_image_generator.py` draws the example sheet `plots/temp_clock.png`.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SUPERSAMPLING = 4  # a picture is drawn this many times larger, then averaged down
MIN_SIZE, MAX_SIZE = 16, 1024  # pixels: in smaller pictures the hands merge, larger ones are slow to draw
OUTLINE = "#f08000"  # of hands drawn over a clock


@dataclass(frozen=True)
class Hand:
    """A hand. Length, width and tail are fractions of the dial's radius."""

    length: float
    width: float
    colour: str
    tail: float = 0.0  # how far the hand extends behind the centre


@dataclass(frozen=True)
class Style:
    """The appearance of a clock. Hands are drawn in the order hour, minute, second: thin hands cover little of the
    thick ones below."""

    hour: Hand
    minute: Hand
    second: Hand
    hub: float = 0.05  # radius of the disc at the centre
    minute_ticks: bool = False
    numerals: bool = False


THIN_BLACK = {
    "hour": Hand(0.50, 0.050, "black", tail=0.08),
    "minute": Hand(0.74, 0.032, "black", tail=0.10),
    "second": Hand(0.86, 0.014, "black", tail=0.16),
}
BOLD_COLOURS = {
    "hour": Hand(0.50, 0.28, "#d81e1e"),
    "minute": Hand(0.74, 0.16, "#0f9d3a"),
    "second": Hand(0.92, 0.07, "#1f3fe0"),
}
THIN_COLOURS = {
    "hour": Hand(0.50, 0.06, "#d81e1e"),
    "minute": Hand(0.74, 0.05, "#0f9d3a"),
    "second": Hand(0.92, 0.04, "#1f3fe0"),
}

STYLES = {
    "classic": Style(**THIN_BLACK, minute_ticks=True),  # thin black hands, distinguished by length
    "numerals": Style(**THIN_BLACK, minute_ticks=True, numerals=True),  # classic, with the numbers 1 to 12
    "bold": Style(**BOLD_COLOURS, hub=0.14),  # thick hands, each in its colour: legible at 56 pixels
    "thin": Style(**THIN_COLOURS),  # the colours of bold with thin hands, to test generalization
}


class ClockImageGenerator:
    """Draws clocks of one style.

    Args:
        size: width and height of the picture in pixels.
        style: a name in `STYLES`.
        rotation: clockwise rotation of the whole dial in degrees; a triangle marks 12 o'clock.
        second_hand: whether the second hand is drawn.
        marked: whether the triangle is drawn; without it the rotation of a dial without numerals is hidden.

    Raises:
        ValueError: an argument has the wrong type or is out of range; the message names it.
    """

    def __init__(
        self,
        size: int = 224,
        style: str = "classic",
        rotation: float = 0.0,
        second_hand: bool = True,
        marked: bool = True,
    ):
        if style not in STYLES:
            raise ValueError(f"unknown clock style {style!r}; choose from {', '.join(STYLES)}")
        if not isinstance(size, int) or not MIN_SIZE <= size <= MAX_SIZE:
            raise ValueError(f"clock size must be a whole number of pixels from {MIN_SIZE} to {MAX_SIZE}, not {size!r}")
        if not isinstance(rotation, int | float) or not math.isfinite(rotation):
            raise ValueError(f"clock rotation must be a number of degrees, not {rotation!r}")
        if not isinstance(second_hand, bool):
            raise ValueError(f"second_hand must be true or false, not {second_hand!r}")
        if not isinstance(marked, bool):
            raise ValueError(f"marked must be true or false, not {marked!r}")
        self.size = size
        self.style = STYLES[style]
        self.rotation = rotation
        self.second_hand = second_hand
        self.marked = marked
        self._centre = size * SUPERSAMPLING / 2
        self._radius = 0.96 * self._centre
        self._dial = self._draw_dial()  # the same in every picture

    def generate(self, hour: int, minute: int, second: int) -> Image.Image:
        """An RGB picture, size x size pixels, of the clock at `hour` (0 to 23), `minute` and `second` (0 to 59).

        Raises:
            ValueError: the time does not exist.
        """
        picture = self._dial.copy()
        draw = ImageDraw.Draw(picture)
        for hand, turn in self._hands(hour, minute, second):
            self._draw_hand(draw, hand, turn)
        self._draw_disc(draw, self.style.hub, "black")
        return picture.reduce(SUPERSAMPLING)

    def draw_over(self, picture: Image.Image, hour: int, minute: int, second: int) -> Image.Image:
        """A copy of a clock's picture with the hands of another time in orange outlines over it.

        Raises:
            ValueError: the time does not exist, or the picture has another size.
        """
        if picture.size != (self.size, self.size):
            raise ValueError(f"the picture has {picture.size} pixels, not {(self.size, self.size)}")
        side = self.size * SUPERSAMPLING
        larger = picture.resize((side, side), Image.Resampling.NEAREST)  # averaged down again, it is the same
        draw = ImageDraw.Draw(larger)
        for hand, turn in self._hands(hour, minute, second):
            draw.polygon(self._corners(hand, turn), outline=OUTLINE, width=max(1, round(0.02 * side)))
        return larger.reduce(SUPERSAMPLING)

    def _hands(self, hour: int, minute: int, second: int) -> list[tuple[Hand, float]]:
        """The hands in the order in which they are drawn, with their angles in full turns."""
        if not (0 <= hour <= 23 and 0 <= minute <= 59 and 0 <= second <= 59):
            raise ValueError(f"no such time: {hour}:{minute}:{second}")
        seconds = (hour % 12) * 3600 + minute * 60 + second
        hands = [(self.style.hour, seconds / 43_200), (self.style.minute, seconds % 3600 / 3600)]  # of 12 h, of 1 h
        return [*hands, (self.style.second, seconds % 60 / 60)] if self.second_hand else hands

    def _point(self, turn: float, distance: float, sideways: float = 0.0) -> tuple[float, float]:
        """Pixel coordinates (x, y) before averaging. `turn` is the angle clockwise from 12 o'clock in full turns;
        `distance` from the centre and `sideways`, at right angles to it, are in radii."""
        angle = 2 * math.pi * (turn + self.rotation / 360)
        x = distance * math.sin(angle) + sideways * math.cos(angle)
        y = -distance * math.cos(angle) + sideways * math.sin(angle)
        return self._centre + self._radius * x, self._centre + self._radius * y

    def _draw_disc(self, draw: ImageDraw.ImageDraw, radius: float, fill: str, outline: str | None = None) -> None:
        pixels = radius * self._radius
        box = [self._centre - pixels] * 2 + [self._centre + pixels] * 2
        draw.ellipse(box, fill=fill, outline=outline, width=max(1, round(0.02 * self._radius)))

    def _corners(self, hand: Hand, turn: float) -> list[tuple[float, float]]:
        half = hand.width / 2
        corners = [(-hand.tail, -half), (hand.length, -half), (hand.length, half), (-hand.tail, half)]
        return [self._point(turn, out, sideways) for out, sideways in corners]

    def _draw_hand(self, draw: ImageDraw.ImageDraw, hand: Hand, turn: float) -> None:
        draw.polygon(self._corners(hand, turn), fill=hand.colour)

    def _draw_dial(self) -> Image.Image:
        side = self.size * SUPERSAMPLING
        picture = Image.new("RGB", (side, side), "white")
        draw = ImageDraw.Draw(picture)
        self._draw_disc(draw, 1.0, "white", outline="black")
        for tick in range(60):
            is_hour = tick % 5 == 0
            if is_hour or self.style.minute_ticks:
                self._draw_hand(draw, Hand(0.98, 0.022 if is_hour else 0.01, "black", tail=-0.90), turn=tick / 60)
        if self.style.numerals:
            font = ImageFont.load_default(size=0.17 * self._radius)
            for hour in range(1, 13):
                draw.text(self._point(hour / 12, 0.76), str(hour), fill="black", font=font, anchor="mm")
        if self.marked:
            draw.polygon([self._point(0, 0.86), self._point(0, 0.99, -0.07), self._point(0, 0.99, 0.07)], fill="black")
        return picture


def main() -> None:
    """Draw the example sheet: one column for each style, one with a rotated dial, one without second hand."""
    variants = [{"style": style} for style in STYLES] + [
        {"style": "bold", "rotation": 30},
        {"style": "classic", "second_hand": False},
    ]
    times = [(10, 8, 37), (3, 0, 15), (7, 45, 52)]
    size = 224
    sheet = Image.new("RGB", (size * len(variants), size * len(times)), "white")
    for column, options in enumerate(variants):
        generator = ClockImageGenerator(size, **options)
        for row, time in enumerate(times):
            sheet.paste(generator.generate(*time), (column * size, row * size))
    path = Path(__file__).parent / "plots" / "temp_clock.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
