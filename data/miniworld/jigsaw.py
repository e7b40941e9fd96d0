"""Jigsaw assembly: which of two pieces completes the picture?

The upper three rows are a picture of three stripes with one tile missing; the bottom row is the
tray with the pieces "A" and "B". The wrong piece has the colour of another stripe, so that its
colour alone does not give it away: the hole's stripe has to be found (hole -> stripe -> piece). The
visual thought shows the completed picture, the letter still on the piece that was laid in the hole,
and its place in the tray empty.
"""

import random

from data.miniworld.art import COLOURS, INK, PAPER, SIGNS, TILES, blank_board, picture, tile
from data.miniworld.record import CELLS, GRID, MiniRecord, cell_name

TASK = "Jigsaw_Assembly"
PICTURE_ROWS = GRID - 1
TRAY_ROW = GRID - 1
SLOT_COLUMNS = {"A": 0, "B": 3}
QUESTION = "which piece fits"
PLAN = "fill the hole"
THOUGHT = "hole {cell} {colour} {piece}"

HOLE = tile(INK, SIGNS["?"], PAPER)
PIECES = {
    (name, colour): tile(fill, SIGNS[name])
    for name in SLOT_COLUMNS
    for colour, fill in COLOURS.items()
}


def draw(rng: random.Random) -> MiniRecord:
    """One puzzle; colours, hole and answer letter are uniform."""
    stripes = rng.sample(tuple(COLOURS), PICTURE_ROWS)
    hole = rng.randrange(PICTURE_ROWS), rng.randrange(GRID)
    colour = stripes[hole[0]]
    wrong = rng.choice([stripe for stripe in stripes if stripe != colour])
    answer = rng.choice(("A", "B"))

    visual_thought = blank_board()
    for row, stripe in enumerate(stripes):
        visual_thought[row] = TILES[stripe]
    problem = visual_thought.copy()
    problem[hole] = HOLE
    for name, slot in SLOT_COLUMNS.items():
        problem[TRAY_ROW, slot] = PIECES[name, colour if name == answer else wrong]
        if name == answer:
            visual_thought[hole] = problem[TRAY_ROW, slot]
        else:
            visual_thought[TRAY_ROW, slot] = problem[TRAY_ROW, slot]

    thought = THOUGHT.format(cell=cell_name(*hole), colour=colour, piece=answer)
    return MiniRecord(
        task=TASK,
        question=QUESTION,
        answer=answer,
        problem_image=picture(problem),
        visual_thought=picture(visual_thought),
        thoughts=(PLAN, thought),
        full_text_only_thought=thought,
    )


def sentences() -> list[str]:
    """Texts that between them hold every word form this family writes."""
    texts = [*SLOT_COLUMNS, QUESTION, PLAN]
    texts += [THOUGHT.format(cell="a1", colour=colour, piece="A") for colour in COLOURS]
    texts += [THOUGHT.format(cell="a1", colour="red", piece=piece) for piece in SLOT_COLUMNS]
    return texts + [THOUGHT.format(cell=cell_name(*c), colour="red", piece="A") for c in CELLS]
