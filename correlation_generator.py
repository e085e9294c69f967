"""Scatter plots whose points have an exact sample correlation r.

Points sampled from a population with correlation r have a sample correlation that differs from r, by 0.06 on average
for 75 points. That would be label noise. Here the noise is made orthogonal to x before the two are mixed, so that the
sample correlation is r up to rounding. `python correlation_generator.py` draws the example sheet
`plots/temp_correlation.png`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 4  # a picture is drawn this many times larger, then averaged down
MIN_SIZE, MAX_SIZE = 16, 1024  # pixels: in smaller pictures the dots merge, larger ones are slow to draw
MAX_POINTS = 10_000  # more points cover the picture
OVERLAY = "#f08000"  # of what is drawn over a plot
AXIS_LIMIT = 3.0  # the axes span at least -3 to 3 standard deviations, and more if a point lies outside


@dataclass(frozen=True)
class Style:
    """The appearance of a scatter plot. The radius of a dot is a fraction of the picture's width."""

    dot: str
    radius: float
    frame: bool
    grid: bool


STYLES = {
    "classic": Style(dot="#1f5fb4", radius=0.016, frame=True, grid=True),
    "plain": Style(dot="black", radius=0.013, frame=False, grid=False),
    "bold": Style(dot="black", radius=0.030, frame=False, grid=False),
}


class CorrelationGenerator:
    """Draws scatter plots of one style.

    Args:
        size: width and height of the picture in pixels.
        num_points: number of points, at least 3 (the correlation of two points is always 1 or -1).
        style: a name in `STYLES`.

    Raises:
        ValueError: an argument has the wrong type or is out of range; the message names it.
    """

    def __init__(self, size: int = 224, num_points: int = 75, style: str = "classic"):
        if style not in STYLES:
            raise ValueError(f"unknown correlation style {style!r}; choose from {', '.join(STYLES)}")
        if not isinstance(size, int) or not MIN_SIZE <= size <= MAX_SIZE:
            raise ValueError(f"plot size must be a whole number of pixels from {MIN_SIZE} to {MAX_SIZE}, not {size!r}")
        if not isinstance(num_points, int) or not 3 <= num_points <= MAX_POINTS:
            raise ValueError(f"num_points must be a whole number from 3 to {MAX_POINTS:,}, not {num_points!r}")
        self.size = size
        self.num_points = num_points
        self.style = STYLES[style]
        self._background = self._draw_background()

    def points(self, r: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """x and y, (num_points,) each, with mean 0, standard deviation 1 and sample correlation r, up to rounding.

        Raises:
            ValueError: r is not between -1 and 1.
        """
        if not -1 <= r <= 1:
            raise ValueError(f"a correlation lies between -1 and 1, not at {r}")
        x = _standardized(rng.standard_normal(self.num_points))  # (N,)
        noise = _standardized(rng.standard_normal(self.num_points))  # (N,)
        noise = _standardized(noise - x * np.mean(x * noise))  # (N,) uncorrelated with x
        return x, r * x + np.sqrt(1 - r * r) * noise

    def generate(self, r: float, rng: np.random.Generator) -> Image.Image:
        """A scatter plot of points with sample correlation r: an RGB picture of size x size pixels.

        Raises:
            ValueError: r is not between -1 and 1.
        """
        return self.draw(*self.points(r, rng))

    def draw(self, x: np.ndarray, y: np.ndarray) -> Image.Image:
        """The picture of points x and y, (N,) each, with mean 0. Both axes have the same limits, which include every
        point."""
        picture = self._background.copy()
        self._draw_dots(ImageDraw.Draw(picture), x, y, axis_limit(x, y), self.style.dot)
        return picture.reduce(SUPERSAMPLING)

    def draw_over(self, picture: Image.Image, x: np.ndarray, y: np.ndarray, limit: float = AXIS_LIMIT) -> Image.Image:
        """A copy of a plot, whose axes have this limit, with orange points x and y, (N,) each, over it."""
        larger = self._enlarged(picture)
        self._draw_dots(ImageDraw.Draw(larger), x, y, limit, OVERLAY)
        return larger.reduce(SUPERSAMPLING)

    def draw_ellipse(self, picture: Image.Image, r: float, limit: float = AXIS_LIMIT) -> Image.Image:
        """A copy of a plot, whose axes have this limit, with the ellipse of two standard deviations of a normal
        distribution with correlation r, in orange.

        Raises:
            ValueError: r is not between -1 and 1.
        """
        if not -1 <= r <= 1:
            raise ValueError(f"a correlation lies between -1 and 1, not at {r}")
        larger = self._enlarged(picture)
        turn = np.linspace(0, 2 * np.pi, 200)  # (N,)
        x, y = 2 * np.cos(turn), 2 * (r * np.cos(turn) + np.sqrt(1 - r * r) * np.sin(turn))  # (N,) each
        columns, rows = self._pixels(x, y, limit)
        line = list(zip(columns, rows, strict=True))
        ImageDraw.Draw(larger).line(line, fill=OVERLAY, width=max(1, round(0.02 * larger.width)), joint="curve")
        return larger.reduce(SUPERSAMPLING)

    def _pixels(self, x: np.ndarray, y: np.ndarray, limit: float) -> tuple[list[float], list[float]]:
        """Columns and rows, before averaging, of points in standard deviations; dots stay inside the frame."""
        side = self.size * SUPERSAMPLING
        scale = (side / 2 - 0.03 * side - self.style.radius * side) / limit  # pixels per standard deviation
        return (side / 2 + scale * x).tolist(), (side / 2 - scale * y).tolist()

    def _draw_dots(self, draw: ImageDraw.ImageDraw, x: np.ndarray, y: np.ndarray, limit: float, colour: str) -> None:
        radius = self.style.radius * self.size * SUPERSAMPLING
        for column, row in zip(*self._pixels(x, y, limit), strict=True):
            draw.ellipse((column - radius, row - radius, column + radius, row + radius), fill=colour)

    def _enlarged(self, picture: Image.Image) -> Image.Image:
        """The picture before averaging, for drawing over it: averaged down again, it is the same."""
        if picture.size != (self.size, self.size):
            raise ValueError(f"the picture has {picture.size} pixels, not {(self.size, self.size)}")
        return picture.resize((self.size * SUPERSAMPLING,) * 2, Image.Resampling.NEAREST)

    def _draw_background(self) -> Image.Image:
        side = self.size * SUPERSAMPLING
        picture = Image.new("RGB", (side, side), "white")
        draw = ImageDraw.Draw(picture)
        low, high = 0.02 * side, 0.98 * side
        if self.style.grid:
            for line in np.linspace(low, high, 7)[1:-1].tolist():
                draw.line((line, low, line, high), fill="#dddddd", width=SUPERSAMPLING)
                draw.line((low, line, high, line), fill="#dddddd", width=SUPERSAMPLING)
        if self.style.frame:
            draw.rectangle((low, low, high, high), outline="black", width=SUPERSAMPLING)
        return picture


def axis_limit(x: np.ndarray, y: np.ndarray) -> float:
    """Where the axes of a plot of these points end, in standard deviations."""
    return max(AXIS_LIMIT, float(np.abs(x).max()), float(np.abs(y).max()))


def _standardized(values: np.ndarray) -> np.ndarray:
    """The values (N,) shifted and scaled to mean 0 and standard deviation 1."""
    centred = values - values.mean()
    return centred / np.sqrt(np.mean(centred**2))


def main() -> None:
    """Draw the example sheet: one row per style, one column per r."""
    correlations, size = (-1.0, -0.7, -0.2, 0.0, 0.4, 0.9), 224
    sheet = Image.new("RGB", (size * len(correlations), size * len(STYLES)), "white")
    for row, style in enumerate(STYLES):
        generator = CorrelationGenerator(size, style=style)
        for column, r in enumerate(correlations):
            picture = generator.generate(r, np.random.default_rng([row, column]))
            sheet.paste(picture, (column * size, row * size))
    path = Path(__file__).parent / "plots" / "temp_correlation.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
