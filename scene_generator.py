"""Scenes of numbered cells, of which one is odd: a grey overview, and each cell enlarged in colour.

The overview does not show colours, so a question about the colour of the odd shape can only be answered by looking at
its cell. Nothing is random here: the same scene gives the same bytes. `python scene_generator.py` draws the example
sheet `plots/temp_scene.png`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SUPERSAMPLING = 4  # a picture is drawn this many times larger, then averaged down
MIN_SIZE, MAX_SIZE = 32, 1024  # pixels: in smaller pictures the numbers cannot be read, larger ones are slow to draw
COLOURS = {"red": "#e02020", "green": "#10a040", "blue": "#2040e0", "yellow": "#f0c000"}
GREY = "#606060"
CELLS = (4, 9)


@dataclass(frozen=True)
class Scene:
    """odd: the number of the cell with the triangle, from 1; the others have circles. colours: the name of each cell's
    colour."""

    odd: int
    colours: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The colour of the odd cell."""
        return self.colours[self.odd - 1]


class SceneGenerator:
    """Draws scenes.

    Args:
        size: width and height of each picture in pixels.
        cells: 4 or 9.

    Raises:
        ValueError: an argument has the wrong type or is out of range; the message names it.
    """

    def __init__(self, size: int = 224, cells: int = 4):
        if not isinstance(size, int) or not MIN_SIZE <= size <= MAX_SIZE:
            raise ValueError(f"scene size must be a whole number of pixels from {MIN_SIZE} to {MAX_SIZE}, not {size!r}")
        if cells not in CELLS:
            raise ValueError(f"a scene has {' or '.join(map(str, CELLS))} cells, not {cells!r}")
        self.size, self.cells = size, cells

    def scene(self, rng: np.random.Generator) -> Scene:
        """A random scene: the odd cell and the colour of each cell, all independent and uniform."""
        names = tuple(COLOURS)
        colours = tuple(names[i] for i in rng.integers(len(names), size=self.cells))
        return Scene(int(rng.integers(self.cells)) + 1, colours)

    def overview(self, scene: Scene) -> Image.Image:
        """All cells, in grey: an RGB picture of size x size pixels."""
        picture, draw = self._canvas()
        columns = math.isqrt(self.cells)
        side = self.size * SUPERSAMPLING / columns
        for cell in range(1, self.cells + 1):
            row, column = divmod(cell - 1, columns)
            self._draw_cell(draw, scene, cell, ((column + 0.5) * side, (row + 0.5) * side), side, GREY)
        return picture.reduce(SUPERSAMPLING)

    def crop(self, scene: Scene, cell: int) -> Image.Image:
        """One cell, from 1, enlarged to size x size pixels, in its colour.

        Raises:
            ValueError: there is no such cell.
        """
        if not 1 <= cell <= self.cells:
            raise ValueError(f"the cells are 1 to {self.cells}, not {cell}")
        picture, draw = self._canvas()
        side = self.size * SUPERSAMPLING
        self._draw_cell(draw, scene, cell, (side / 2, side / 2), side, COLOURS[scene.colours[cell - 1]])
        return picture.reduce(SUPERSAMPLING)

    def blank(self) -> Image.Image:
        return Image.new("RGB", (self.size, self.size), "white")

    def _canvas(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        picture = Image.new("RGB", (self.size * SUPERSAMPLING,) * 2, "white")
        return picture, ImageDraw.Draw(picture)

    def _draw_cell(
        self,
        draw: ImageDraw.ImageDraw,
        scene: Scene,
        cell: int,
        centre: tuple[float, float],
        side: float,
        colour: str,
    ) -> None:
        """The outline of a shape in `colour`, with the cell's number in black inside."""
        (x, y), radius, width = centre, 0.42 * side, round(0.08 * side)
        if cell == scene.odd:
            draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], None, colour, width)
        else:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), None, colour, width)
        font = ImageFont.load_default(size=0.45 * side)
        draw.text((x, y + (0.08 * side if cell == scene.odd else 0)), str(cell), fill="black", font=font, anchor="mm")


def main() -> None:
    """Draw the example sheet: each row an overview and its cells."""
    size, generators = 224, [SceneGenerator(224, cells) for cells in CELLS]
    sheet = Image.new("RGB", (size * (1 + max(CELLS)), size * len(CELLS)), "white")
    for row, generator in enumerate(generators):
        scene = generator.scene(np.random.default_rng(row))
        sheet.paste(generator.overview(scene), (0, row * size))
        for cell in range(1, generator.cells + 1):
            sheet.paste(generator.crop(scene, cell), (cell * size, row * size))
    path = Path(__file__).parent / "plots" / "temp_scene.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
