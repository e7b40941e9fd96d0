"""Spatial navigation: the moves from the start to the flag over a frozen lake.

Every cell off the path is a hole except up to three free decoys, and the shortest path is unique.
The path has 2 to 4 moves, uniformly. The visual thought draws it: the k-th cell carries the arrow
of the k-th move on the k-th colour of a ramp. The text-only thought walks it, each move with the
cell it leads to, so that the next move is one lookup away: with the visual thought the arrow on
that cell, without it the free cell beside it. The answer repeats the moves.
"""

import random
from functools import cache
from itertools import pairwise

import numpy as np

from data.miniworld.art import (
    ARROWS,
    COLOURS,
    ICE,
    INK,
    PAPER,
    SIGNS,
    WATER,
    blank_board,
    blend,
    picture,
    tile,
)
from data.miniworld.record import CELLS, GRID, MiniRecord, cell_name

TASK = "Spatial_Navigation"
MIN_MOVES, MAX_MOVES = 2, 4
MAX_DECOYS = 3
QUESTION = "find the way"
PLAN = "draw the way"
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

Cell = tuple[int, int]
NEIGHBOURS: dict[Cell, dict[Cell, str]] = {
    (row, column): {
        (row + down, column + right): move
        for move, (down, right) in MOVES.items()
        if 0 <= row + down < GRID and 0 <= column + right < GRID
    }
    for row, column in CELLS
}

RAMP = (  # one fill per move, from the green of the start on
    (64, 160, 72),
    (24, 158, 150),
    (40, 120, 210),
    (92, 80, 200),
)
FREE = tile(ICE)
HOLE = tile(ICE, SIGNS["disc"], WATER)
START = tile(ICE, SIGNS["disc"], COLOURS["green"])
GOAL = tile(ICE, SIGNS["flag"], COLOURS["red"])
FADED_FREE = tile(blend(ICE, PAPER, 0.5))
FADED_HOLE = tile(blend(ICE, PAPER, 0.5), SIGNS["disc"], blend(WATER, PAPER, 0.75))
REACHED_GOAL = tile(COLOURS["yellow"], SIGNS["flag"], INK)
STEPS = [{move: tile(fill, mask, PAPER) for move, mask in ARROWS.items()} for fill in RAMP]


@cache
def corridors(moves: int) -> tuple[tuple[Cell, ...], ...]:
    """All paths of that many moves that are the unique shortest path over their own cells.

    These are the chordless paths: a cell touches no other cell of the path than the one before
    and the one after it.
    """
    if moves == 0:
        return tuple((cell,) for cell in CELLS)
    return tuple(
        (*path, cell)
        for path in corridors(moves - 1)
        for cell in NEIGHBOURS[path[-1]]
        if not any(cell in NEIGHBOURS[earlier] or cell == earlier for earlier in path[:-1])
    )


def shortest_paths(free: set[Cell], start: Cell, goal: Cell) -> tuple[int, int]:
    """(moves, number) of the shortest paths over the free cells; (-1, 0) if there is none."""
    ways, seen, moves = {start: 1}, {start}, 0
    while ways and goal not in ways:
        reached: dict[Cell, int] = {}
        for cell, count in ways.items():
            for neighbour in NEIGHBOURS[cell]:
                if neighbour in free and neighbour not in seen:
                    reached[neighbour] = reached.get(neighbour, 0) + count
        seen.update(reached)
        ways, moves = reached, moves + 1
    return (moves, ways[goal]) if goal in ways else (-1, 0)


def draw(rng: random.Random) -> MiniRecord:
    """One maze with a unique shortest path."""
    path = rng.choice(corridors(rng.randint(MIN_MOVES, MAX_MOVES)))
    free = _add_decoys(path, rng)
    moves = [NEIGHBOURS[here][there] for here, there in pairwise(path)]
    thought = _walk(path, moves)
    return MiniRecord(
        task=TASK,
        question=QUESTION,
        answer=" ".join(moves),
        problem_image=picture(_maze(path, free)),
        visual_thought=picture(_solved_maze(path, free, moves)),
        thoughts=(PLAN, thought),
        full_text_only_thought=thought,
    )


def sentences() -> list[str]:
    """Texts that between them hold every word form this family writes."""
    texts = [QUESTION, PLAN]
    texts += [f"from {cell_name(*cell)}" for cell in CELLS]
    return texts + [f"{move} {move}" for move in MOVES]


def _walk(path: tuple[Cell, ...], moves: list[str]) -> str:
    """The path in words: `from a1 right b1 down b2`."""
    steps = [f"{move} {cell_name(*cell)}" for move, cell in zip(moves, path[1:], strict=True)]
    return " ".join([f"from {cell_name(*path[0])}", *steps])


def _add_decoys(path: tuple[Cell, ...], rng: random.Random) -> set[Cell]:
    """The path's cells and up to MAX_DECOYS more that leave its shortest path alone and unique."""
    free, wanted = set(path), rng.randint(0, MAX_DECOYS)
    off_path = [cell for cell in CELLS if cell not in free]
    rng.shuffle(off_path)
    for cell in off_path:
        if len(free) == len(path) + wanted:
            break
        if shortest_paths(free | {cell}, path[0], path[-1]) == (len(path) - 1, 1):
            free.add(cell)
    return free


def _maze(path: tuple[Cell, ...], free: set[Cell]) -> np.ndarray:
    board = blank_board()
    for cell in CELLS:
        board[cell] = FREE if cell in free else HOLE
    board[path[0]], board[path[-1]] = START, GOAL
    return board


def _solved_maze(path: tuple[Cell, ...], free: set[Cell], moves: list[str]) -> np.ndarray:
    board = blank_board()
    for cell in CELLS:
        board[cell] = FADED_FREE if cell in free else FADED_HOLE
    for step, (cell, move) in enumerate(zip(path[:-1], moves, strict=True)):
        board[cell] = STEPS[step][move]
    board[path[-1]] = REACHED_GOAL
    return board
