"""Visual search: what is drawn on the tile of a given colour?

Five tiles of five different colours lie on the board, each with one of six glyphs. The problem
needs a lookup (colour -> glyph). The visual thought keeps the asked tile alone, so that
with it the answer is the only glyph in sight.
"""

import random

from data.miniworld.art import COLOURS, GLYPH_TILES, GLYPHS, blank_board, picture
from data.miniworld.record import CELLS, MiniRecord

TASK = "Visual_Search"
TILE_COUNT = 5
QUESTION = "what is on {colour}"
PLAN = "find the {colour} tile"
THOUGHT = "{colour} {glyph}"


def draw(rng: random.Random) -> MiniRecord:
    """One search problem; the asked colour occurs exactly once."""
    cells = rng.sample(CELLS, TILE_COUNT)
    colours = rng.sample(tuple(COLOURS), TILE_COUNT)
    glyphs = rng.choices(tuple(GLYPHS), k=TILE_COUNT)
    problem = blank_board()
    for cell, colour, glyph in zip(cells, colours, glyphs, strict=True):
        problem[cell] = GLYPH_TILES[colour, glyph]
    cell, colour, glyph = cells[0], colours[0], glyphs[0]  # samples come in random order
    visual_thought = blank_board()
    visual_thought[cell] = problem[cell]
    thought = THOUGHT.format(colour=colour, glyph=glyph)
    return MiniRecord(
        task=TASK,
        question=QUESTION.format(colour=colour),
        answer=glyph,
        problem_image=picture(problem),
        visual_thought=picture(visual_thought),
        thoughts=(PLAN.format(colour=colour), thought),
        full_text_only_thought=thought,
    )


def sentences() -> list[str]:
    """Texts that between them hold every word form this family writes."""
    texts = list(GLYPHS)
    for colour in COLOURS:
        texts += [QUESTION.format(colour=colour), PLAN.format(colour=colour)]
        texts.append(THOUGHT.format(colour=colour, glyph="star"))
    return texts + [THOUGHT.format(colour="red", glyph=glyph) for glyph in GLYPHS]
