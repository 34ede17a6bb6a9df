"""Drawn scenes: one or two people, what they hold and where they are, as small pictures.

A :class:`Scene` is a description, :func:`draw` its picture of :data:`SIDE` x :data:`SIDE` pixels, drawn with Pillow at
twice the size and averaged. The same description always gives the same pixels. A person stands in the left or the right
half of the picture; the place fills that half only, so that two people can be in two places.

How people differ: gender presentation (hair, beard, skirt or trousers), six skin tones of which three are called
``lighter`` and three ``darker``, hair colour, the colour of the clothes, the tool in the hand and the place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SIDE = 64
_FINE = 2  # pixels drawn for one that is kept, on each side
SKINS = ("#f6d7c3", "#eec1a0", "#e3b088", "#9a6540", "#7c4a2b", "#59331d")
TONES = ("lighter", "darker")
HAIR = {"black": "#1d1a1a", "brown": "#6b3f1f", "blonde": "#e8c65a", "red": "#c4471c"}
CLOTHES = {
    "blue": "#2b57c9", "green": "#2e9a4b", "orange": "#f08a24", "purple": "#8a3fb0", "grey": "#8b8f96",
    "pink": "#ec7fb0",
}  # fmt: skip
TROUSERS = ("#2f3140", "#4a4034")
WALLS = ("#f4efe4", "#e9eef2", "#eee6ee", "#e6efe6")
STYLES = 3  # ways to wear the hair, of each gender

Draw = Callable[["ImageDraw", float, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """What one person looks like.

    Attributes:
        gender: ``female`` or ``male``: the presentation.
        skin: 0 (lightest) to 5.
        hair, clothes: names of :data:`HAIR` and :data:`CLOTHES`.
        style: 0 to :data:`STYLES` - 1: of the hair, and of skirt or trousers.
        tool: what is held, a name of :data:`TOOLS`, or None.
        place: where the person is, a name of :data:`PLACES`, or None: in front of a plain wall.
    """

    gender: str
    skin: int
    hair: str
    clothes: str
    style: int = 0
    tool: str | None = None
    place: str | None = None

    @property
    def tone(self) -> str:
        """``lighter`` or ``darker``."""
        return TONES[self.skin >= len(SKINS) // 2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Who stands on the left and on the right.

    Attributes:
        left, right: the people; at most one is None.
        wall: 0 to 3: the colour behind people without a place.
        shifts: pixels by which each of them stands right of the middle of the half, and lower than usual.
    """

    left: Person | None
    right: Person | None
    wall: int = 0
    shifts: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    def turned(self) -> Scene:
        """The same people with sides swapped."""
        return replace(self, left=self.right, right=self.left, shifts=self.shifts[::-1])


def draw(scene: Scene) -> Image:
    """The picture of a scene, RGB.

    Raises:
        ValueError: if nobody is in it.
    """
    from PIL import Image, ImageDraw

    if scene.left is None and scene.right is None:
        raise ValueError("a scene needs at least one person")
    picture = Image.new("RGB", (SIDE * _FINE, SIDE * _FINE), WALLS[scene.wall])
    half = SIDE // 2
    for number, person in enumerate((scene.left, scene.right)):
        if person is None:
            continue
        whole = Image.new("RGB", (half * _FINE, SIDE * _FINE), WALLS[scene.wall])
        pen = ImageDraw.Draw(whole)
        if person.place is not None:
            PLACES[person.place](pen)
        across, down = scene.shifts[number]
        _person(pen, person, 13 + across, down)
        picture.paste(whole, (number * half * _FINE, 0))
    return picture.reduce(_FINE)


def _box(pen: ImageDraw, x0: float, y0: float, x1: float, y1: float, fill: str) -> None:
    pen.rectangle([x0 * _FINE, y0 * _FINE, x1 * _FINE - 1, y1 * _FINE - 1], fill=fill)


def _disc(pen: ImageDraw, x: float, y: float, radius: float, fill: str) -> None:
    pen.ellipse([(x - radius) * _FINE, (y - radius) * _FINE, (x + radius) * _FINE, (y + radius) * _FINE], fill=fill)


def _line(pen: ImageDraw, x0: float, y0: float, x1: float, y1: float, width: float, fill: str) -> None:
    pen.line([x0 * _FINE, y0 * _FINE, x1 * _FINE, y1 * _FINE], fill=fill, width=round(width * _FINE))


def _shape(pen: ImageDraw, points: list[tuple[float, float]], fill: str) -> None:
    pen.polygon([(x * _FINE, y * _FINE) for x, y in points], fill=fill)


def _person(pen: ImageDraw, person: Person, x: float, y: float) -> None:
    skin, hair, clothes = SKINS[person.skin], HAIR[person.hair], CLOTHES[person.clothes]
    woman = person.gender == "female"
    if woman and person.style < 2:  # long hair falls behind the shoulders
        _box(pen, x - 8, y + 10, x + 8, y + (30 if person.style == 0 else 25), hair)
    _box(pen, x - 2, y + 17, x + 2, y + 24, skin)
    if woman and person.style != 1:
        _shape(pen, [(x - 4, y + 38), (x + 4, y + 38), (x + 10, y + 54), (x - 10, y + 54)], clothes)
        for side in (-4, 2):
            _box(pen, x + side, y + 54, x + side + 2, y + 61, skin)
    else:
        for side in (-6, 1):
            _box(pen, x + side, y + 38, x + side + 5, y + 61, TROUSERS[person.style % 2])
    wide = 5 if woman else 8
    _box(pen, x - wide, y + 23, x + wide, y + 40, clothes)
    _line(pen, x + wide - 1, y + 25, x + 12, y + 36, 3, skin)
    _line(pen, x - wide + 1, y + 25, x - wide - 2, y + 37, 3, skin)
    _head(pen, person, x, y, skin, hair)
    if person.tool is not None:
        TOOLS[person.tool](pen, x + 12, y + 36)


def _head(pen: ImageDraw, person: Person, x: float, y: float, skin: str, hair: str) -> None:
    woman = person.gender == "female"
    if woman:
        _disc(pen, x, y + 10, 8.5, hair)
    if woman and person.style == 2:  # a bun
        _disc(pen, x, y + 2.5, 3.5, hair)
    _disc(pen, x, y + 13, 6.5, skin)
    if not woman and person.style < 2:
        pen.pieslice([(x - 7) * _FINE, (y + 5) * _FINE, (x + 7) * _FINE, (y + 17) * _FINE], 180, 360, fill=hair)
    if not woman and person.style > 0:  # a beard
        pen.pieslice([(x - 6.5) * _FINE, (y + 7) * _FINE, (x + 6.5) * _FINE, (y + 21) * _FINE], 10, 170, fill=hair)
    for side in (-2.5, 2.5):
        _disc(pen, x + side, y + 12.5, 0.9, "#101010")


def _kit(pen: ImageDraw, x: float, y: float) -> None:
    _box(pen, x - 6, y - 5, x + 6, y + 7, "#ffffff")
    _box(pen, x - 1.5, y - 3.5, x + 1.5, y + 5.5, "#d81e1e")
    _box(pen, x - 4.5, y - 0.5, x + 4.5, y + 2.5, "#d81e1e")


def _book(pen: ImageDraw, x: float, y: float) -> None:
    _box(pen, x - 6, y - 6, x + 6, y + 6, "#123a8c")
    _box(pen, x - 4.5, y - 4, x - 0.5, y + 4, "#fbfbf2")
    _box(pen, x + 0.5, y - 4, x + 4.5, y + 4, "#fbfbf2")


def _flower(pen: ImageDraw, x: float, y: float) -> None:
    _line(pen, x, y, x, y + 9, 2, "#1f7a2e")
    for across, down in ((-3.5, -4), (3.5, -4), (-2.5, 0.5), (2.5, 0.5), (0, -7)):
        _disc(pen, x + across, y + down, 3, "#f0389a")
    _disc(pen, x, y - 3, 2.2, "#ffe14a")


def _notepad(pen: ImageDraw, x: float, y: float) -> None:
    _box(pen, x - 5, y - 8, x + 5, y + 6, "#ffe84d")
    for down in (-5, -2, 1, 4):
        _line(pen, x - 3.5, y + down, x + 3.5, y + down, 1, "#303030")


def _wrench(pen: ImageDraw, x: float, y: float) -> None:
    _line(pen, x, y - 5, x, y + 9, 3, "#5d6772")
    _disc(pen, x, y - 6, 5, "#5d6772")
    _box(pen, x - 1.5, y - 12, x + 1.5, y - 6, "#f2f2f2")


def _hammer(pen: ImageDraw, x: float, y: float) -> None:
    _line(pen, x, y - 6, x, y + 10, 3, "#b5742d")
    _box(pen, x - 6, y - 9, x + 6, y - 4, "#20242b")


def _extinguisher(pen: ImageDraw, x: float, y: float) -> None:
    _box(pen, x - 4, y - 4, x + 4, y + 10, "#e01414")
    _box(pen, x - 2, y - 8, x + 2, y - 4, "#181818")
    _line(pen, x, y - 7, x + 5, y - 4, 2, "#181818")


def _fork(pen: ImageDraw, x: float, y: float) -> None:
    _line(pen, x, y - 6, x, y + 18, 2, "#a8722e")
    _box(pen, x - 5, y - 7, x + 5, y - 5, "#d9a520")
    for across in (-4, 0, 4):
        _line(pen, x + across, y - 14, x + across, y - 6, 2, "#d9a520")


def _office(pen: ImageDraw) -> None:
    _box(pen, 0, 0, 32, 64, "#b8cfe6")
    for across in (2, 13, 24):
        _box(pen, across, 2, across + 8, 14, "#f5fbff")
    _box(pen, 0, 48, 32, 64, "#5c6f86")


def _library(pen: ImageDraw) -> None:
    _box(pen, 0, 0, 32, 64, "#7a4a24")
    for shelf in range(4):
        for number in range(7):
            colour = ("#a33b2e", "#d9b24a", "#3f6f4f", "#3b4f8c")[(number + shelf) % 4]
            _box(pen, 1 + 4.4 * number, 2 + 16 * shelf, 4.4 + 4.4 * number, 14 + 16 * shelf, colour)


def _kitchen(pen: ImageDraw) -> None:
    _box(pen, 0, 0, 32, 64, "#f7f7f7")
    for row in range(8):
        for column in range(4):
            if (row + column) % 2:
                _box(pen, 8 * column, 8 * row, 8 * column + 8, 8 * row + 8, "#46b3ad")


def _garden(pen: ImageDraw) -> None:
    _box(pen, 0, 0, 32, 64, "#8fd0f5")
    _box(pen, 0, 34, 32, 64, "#5fae3a")
    _disc(pen, 28, 4, 5, "#fff04a")
    for across in (3, 11, 20, 28):
        _disc(pen, across, 36, 4, "#2f7d26")


TOOLS: dict[str, Draw] = {
    "kit": _kit, "book": _book, "flower": _flower, "notepad": _notepad, "wrench": _wrench, "hammer": _hammer,
    "extinguisher": _extinguisher, "fork": _fork,
}  # fmt: skip
PLACES: dict[str, Callable[[ImageDraw], None]] = {
    "office": _office, "library": _library, "kitchen": _kitchen, "garden": _garden,
}  # fmt: skip
