"""Scatter plots whose drawn points have exactly the correlation that was asked for.

Points drawn from a population with correlation r have a sample correlation that misses r (with 75 points by 0.06 on
average), which would be noise in the label of the picture. Here the sample itself is made to have r, by removing from
the noise its mean and whatever of it correlates with x. `python correlation_generator.py` draws the example sheet
`plots/temp_correlation.png`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ENLARGED = 4  # how many times larger a picture is drawn than it will be: shrinking smooths the edges
MIN_SIZE, MAX_SIZE = 16, 1024  # pixels: below the dots merge, above a picture costs too much
MAX_POINTS = 10_000  # beyond, a picture is one blot
REACH = 3.0  # standard deviations from the centre to the frame; more when a point lies farther out


@dataclass(frozen=True)
class Style:
    """The look of a scatter plot; the dot's radius is a share of the picture's width."""

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
    """Draws scatter plots of one look.

    Args:
        size: width and height of the picture in pixels.
        num_points: how many points are drawn, at least 3 (two points always correlate fully).
        style: a name in `STYLES`.

    Raises:
        ValueError: for an unknown style, or a size or number of points that makes no picture.
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
        """x and y, (num_points,) each, of mean 0 and standard deviation 1, with sample correlation r to rounding.

        Raises:
            ValueError: unless -1 <= r <= 1.
        """
        if not -1 <= r <= 1:
            raise ValueError(f"a correlation lies between -1 and 1, not at {r}")
        x = _standardized(rng.standard_normal(self.num_points))  # (N,)
        noise = _standardized(rng.standard_normal(self.num_points))  # (N,)
        noise = _standardized(noise - x * np.mean(x * noise))  # (N,) uncorrelated with x
        return x, r * x + np.sqrt(1 - r * r) * noise

    def generate(self, r: float, rng: np.random.Generator) -> Image.Image:
        """A scatter plot of points with sample correlation r, an RGB picture of size x size pixels."""
        return self.draw(*self.points(r, rng))

    def draw(self, x: np.ndarray, y: np.ndarray) -> Image.Image:
        """The picture of points of mean 0, with one scale for both axes, on which no point falls outside."""
        reach = max(REACH, np.abs(x).max(), np.abs(y).max())
        side = self.size * ENLARGED
        centre, radius = side / 2, self.style.radius * side
        scale = (centre - 0.03 * side - radius) / reach  # pixels a standard deviation; dots stay inside the frame
        picture = self._background.copy()
        draw = ImageDraw.Draw(picture)
        for column, row in zip((centre + scale * x).tolist(), (centre - scale * y).tolist(), strict=True):
            draw.ellipse((column - radius, row - radius, column + radius, row + radius), fill=self.style.dot)
        return picture.reduce(ENLARGED)

    def _draw_background(self) -> Image.Image:
        side = self.size * ENLARGED
        picture = Image.new("RGB", (side, side), "white")
        draw = ImageDraw.Draw(picture)
        low, high = 0.02 * side, 0.98 * side
        if self.style.grid:
            for line in np.linspace(low, high, 7)[1:-1].tolist():
                draw.line((line, low, line, high), fill="#dddddd", width=ENLARGED)
                draw.line((low, line, high, line), fill="#dddddd", width=ENLARGED)
        if self.style.frame:
            draw.rectangle((low, low, high, high), outline="black", width=ENLARGED)
        return picture


def _standardized(values: np.ndarray) -> np.ndarray:
    """The values (N,) shifted and scaled to mean 0 and standard deviation 1."""
    centred = values - values.mean()
    return centred / np.sqrt(np.mean(centred**2))


def main() -> None:
    """Draw the example sheet: a row for each style, a column for each r."""
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
