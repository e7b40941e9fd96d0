"""Sprites of the miniature world: every picture is a 4x4 board of 14x14 pixel cells.

One cell is one ViT patch (patch size 14), so a picture is 16 image tokens. Sprites are made once at
import; drawing an item is a handful of array assignments. Pixels are uint8 RGB.
"""

import numpy as np
from PIL import Image

from data.miniworld.record import GRID

CELL = 14  # pixels per cell side, the ViT patch size

COLOURS = {
    "red": (229, 72, 77),
    "orange": (247, 144, 46),
    "yellow": (250, 217, 60),
    "green": (84, 176, 90),
    "cyan": (64, 208, 214),
    "blue": (84, 134, 244),
    "purple": (168, 116, 230),
    "pink": (248, 156, 204),
    "brown": (176, 124, 80),
    "gray": (158, 162, 170),
}
INK = (28, 30, 40)
PAPER = (250, 249, 245)
LINE = (224, 223, 217)  # the faint frame of an empty cell
ICE = (221, 236, 245)
WATER = (38, 68, 112)

_GLYPH_ART = {
    "star": """
        ....##....
        ....##....
        ...####...
        ##########
        .########.
        ..######..
        ..######..
        .###..###.
        .##....##.
        .#......#.""",
    "heart": """
        .##....##.
        ####..####
        ##########
        ##########
        ##########
        .########.
        ..######..
        ...####...
        ....##....
        ..........""",
    "ring": """
        ...####...
        .########.
        .##....##.
        ##......##
        ##......##
        ##......##
        ##......##
        .##....##.
        .########.
        ...####...""",
    "cross": """
        ##......##
        ###....###
        .###..###.
        ..######..
        ...####...
        ...####...
        ..######..
        .###..###.
        ###....###
        ##......##""",
    "moon": """
        ...####...
        ..####....
        .####.....
        ####......
        ####......
        ####......
        #####.....
        .######.##
        ..#######.
        ...#####..""",
    "bolt": """
        .....####.
        ....####..
        ...####...
        ..####....
        .########.
        ....####..
        ...####...
        ..####....
        .###......
        .#........""",
}
_SIGN_ART = {
    "right": """
        ..........
        .....##...
        .....###..
        #########.
        ##########
        ##########
        #########.
        .....###..
        .....##...
        ..........""",
    "flag": """
        .##.......
        .######...
        .########.
        .########.
        .######...
        .##.......
        .##.......
        .##.......
        .##.......
        .##.......""",
    "disc": """
        ...####...
        .########.
        .########.
        ##########
        ##########
        ##########
        ##########
        .########.
        .########.
        ...####...""",
    "A": """
        ....##....
        ...####...
        ...####...
        ..##..##..
        ..##..##..
        .########.
        .########.
        .##....##.
        ##......##
        ##......##""",
    "B": """
        .#######..
        .##....##.
        .##....##.
        .##....##.
        .#######..
        .########.
        .##....##.
        .##....##.
        .##....##.
        .#######..""",
    "?": """
        ..######..
        .##....##.
        .......##.
        ......##..
        ....###...
        ....##....
        ....##....
        ..........
        ....##....
        ....##....""",
}


def _mask(art: str) -> np.ndarray:
    """ASCII art of 10x10 -> boolean mask (14, 14), centred."""
    rows = [[pixel == "#" for pixel in line.strip()] for line in art.split()]
    return np.pad(np.array(rows, dtype=bool), (CELL - len(rows)) // 2)


GLYPHS = {name: _mask(art) for name, art in _GLYPH_ART.items()}
SIGNS = {name: _mask(art) for name, art in _SIGN_ART.items()}
# np.rot90 turns counter-clockwise: right -> up -> left -> down.
ARROWS = {
    move: np.rot90(SIGNS["right"], turns)
    for turns, move in enumerate(("right", "up", "left", "down"))
}

Colour = tuple[int, int, int]


def blend(colour: Colour, other: Colour, share: float) -> Colour:
    """`colour` moved towards `other` by `share` in [0, 1]."""
    mixed = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return tuple(mixed)  # type: ignore[return-value]


def tile(fill: Colour, mask: np.ndarray | None = None, ink: Colour = INK) -> np.ndarray:
    """A solid 12x12 tile with a one-pixel gap around it and a sign in `ink`: (14, 14, 3) uint8."""
    sprite = np.empty((CELL, CELL, 3), dtype=np.uint8)
    sprite[:] = PAPER
    sprite[1:-1, 1:-1] = fill
    if mask is not None:
        sprite[mask] = ink
    return sprite


def _empty_cell() -> np.ndarray:
    sprite = tile(LINE)
    sprite[2:-2, 2:-2] = PAPER
    return sprite


EMPTY = _empty_cell()
TILES = {name: tile(colour) for name, colour in COLOURS.items()}
GLYPH_TILES = {
    (name, glyph): tile(colour, mask)
    for name, colour in COLOURS.items()
    for glyph, mask in GLYPHS.items()
}


def blank_board() -> np.ndarray:
    """A board of empty cells, indexed [row, column]: (4, 4, 14, 14, 3) uint8."""
    return np.tile(EMPTY, (GRID, GRID, 1, 1, 1))


def picture(board: np.ndarray) -> Image.Image:
    """Board (4, 4, 14, 14, 3) -> RGB picture of 56x56 pixels."""
    side = GRID * CELL
    return Image.fromarray(board.transpose(0, 2, 1, 3, 4).reshape(side, side, 3))
