"""Chart refocus: how tall is the bar of a given colour?

Four bars of different colours, heights 1 to 4 cells, one per column. The problem needs a lookup
(colour -> column -> height). The visual thought keeps the asked bar alone.
"""

import random

from data.miniworld.art import COLOURS, TILES, blank_board, picture
from data.miniworld.record import GRID, MiniRecord, column_name

TASK = "Chart_Refocus"
QUESTION = "how tall is {colour}"
PLAN = "find the {colour} bar"
THOUGHT = "{colour} {column} {height}"


def draw(rng: random.Random) -> MiniRecord:
    """One chart; the four heights are independent and uniform over 1..4."""
    colours = rng.sample(tuple(COLOURS), GRID)
    heights = [rng.randint(1, GRID) for _ in range(GRID)]
    problem = blank_board()
    for column, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        problem[GRID - height :, column] = TILES[colour]
    column = rng.randrange(GRID)
    colour, height = colours[column], heights[column]
    visual_thought = blank_board()
    visual_thought[:, column] = problem[:, column]
    thought = THOUGHT.format(colour=colour, column=column_name(column), height=height)
    return MiniRecord(
        task=TASK,
        question=QUESTION.format(colour=colour),
        answer=str(height),
        problem_image=picture(problem),
        visual_thought=picture(visual_thought),
        thoughts=(PLAN.format(colour=colour), thought),
        full_text_only_thought=thought,
    )


def sentences() -> list[str]:
    """Texts that between them hold every word form this family writes."""
    texts = [str(height) for height in range(1, GRID + 1)]
    for colour in COLOURS:
        texts += [QUESTION.format(colour=colour), PLAN.format(colour=colour)]
        texts += [
            THOUGHT.format(colour=colour, column=column_name(n), height=n + 1) for n in range(GRID)
        ]
    return texts
