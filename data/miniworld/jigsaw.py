"""Jigsaw assembly: which of two pieces completes the picture?

The upper three rows are a striped picture (colour by row or by column) with one piece missing; the
bottom row is the tray, reading "A", piece, "B", piece. The wrong piece has the colour of another
stripe, so that its colour alone does not give it away: the hole's stripe has to be found. The
visual thought shows the completed picture with the used piece gone from its tray slot; without the
emptied slot the answer letter could not be read from it.
"""

import random

from data.miniworld.art import COLOURS, EMPTY, INK, PAPER, SIGNS, TILES, blank_board, picture, tile
from data.miniworld.record import CELLS, GRID, MiniRecord, cell_name

TASK = "Jigsaw_Assembly"
PICTURE_ROWS = GRID - 1
TRAY_ROW = GRID - 1
SLOT_COLUMNS = {"A": 1, "B": 3}
QUESTION = "which piece fits"
PLAN = "fill the hole"
THOUGHT = "hole {cell} {colour}"

HOLE = tile(INK, SIGNS["?"], PAPER)
LABELS = {name: tile(PAPER, SIGNS[name]) for name in SLOT_COLUMNS}


def draw(rng: random.Random) -> MiniRecord:
    """One puzzle; stripe direction, hole and answer letter are uniform."""
    by_row = rng.random() < 0.5
    stripes = rng.sample(tuple(COLOURS), PICTURE_ROWS if by_row else GRID)
    hole = rng.randrange(PICTURE_ROWS), rng.randrange(GRID)
    colour = stripes[hole[0] if by_row else hole[1]]
    wrong = rng.choice([stripe for stripe in stripes if stripe != colour])
    answer = rng.choice(("A", "B"))

    visual_thought = blank_board()
    for row, column in CELLS[: PICTURE_ROWS * GRID]:
        visual_thought[row, column] = TILES[stripes[row if by_row else column]]
    for name, slot in SLOT_COLUMNS.items():
        visual_thought[TRAY_ROW, slot - 1] = LABELS[name]
        visual_thought[TRAY_ROW, slot] = EMPTY if name == answer else TILES[wrong]
    problem = visual_thought.copy()
    problem[hole] = HOLE
    problem[TRAY_ROW, SLOT_COLUMNS[answer]] = TILES[colour]

    thought = THOUGHT.format(cell=cell_name(*hole), colour=colour)
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
    texts += [THOUGHT.format(cell="a1", colour=colour) for colour in COLOURS]
    return texts + [THOUGHT.format(cell=cell_name(*cell), colour="red") for cell in CELLS]
