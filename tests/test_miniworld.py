"""The miniature world: answers hold in the pictures, splits are disjoint, texts are short."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data.miniworld import navigation
from data.miniworld.art import COLOURS, GLYPHS, ICE, PAPER, SIGNS
from data.miniworld.record import MiniRecord
from data.miniworld.world import TASKS, content_hash, draw, split_of
from data.miniworld.write import split_records

SEARCH, NAVIGATION, JIGSAW, CHART = TASKS
DRAWS = 400
STEP = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def records(task: str, n: int = DRAWS, seed: int = 1) -> list[MiniRecord]:
    rng = random.Random(seed)
    return [draw(task, rng) for _ in range(n)]


# --- reading the pictures back, from pixels alone ------------------------------------------------


def cells(image: Image.Image) -> dict[str, np.ndarray]:
    """Cell name -> its (14, 14, 3) pixels."""
    pixels = np.asarray(image)
    assert pixels.shape == (56, 56, 3)
    assert pixels.dtype == np.uint8
    return {
        f"{letter}{row + 1}": pixels[14 * row :, 14 * column :][:14, :14]
        for row in range(4)
        for column, letter in enumerate("abcd")
    }


def tile_colour(cell: np.ndarray) -> str | None:
    """The fill of a tile at a corner no glyph reaches, by name; None for anything else."""
    return {rgb: name for name, rgb in COLOURS.items()}.get(tuple(int(v) for v in cell[1, 1]))


def ink(cell: np.ndarray) -> np.ndarray:
    """What differs from a tile's fill, inside the gap: (14, 14) bool."""
    inked = np.zeros((14, 14), dtype=bool)
    inked[1:-1, 1:-1] = (cell[1:-1, 1:-1] != cell[1, 1]).any(-1)
    return inked


def glyph(cell: np.ndarray) -> str:
    (name,) = [name for name, mask in GLYPHS.items() if np.array_equal(mask, ink(cell))]
    return name


def coloured(image: Image.Image) -> dict[str, str]:
    return {name: colour for name, cell in cells(image).items() if (colour := tile_colour(cell))}


def above_tray(board: dict) -> dict:
    """The jigsaw's picture: all cells but the bottom row."""
    return {name: cell for name, cell in board.items() if name[1] != "4"}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b)


# --- the four families ---------------------------------------------------------------------------


def test_search_answer_is_on_the_asked_tile_and_the_thought_keeps_it_alone():
    for record in records(SEARCH):
        asked = record.question.split()[-1]
        tiles = coloured(record.problem_image)
        assert len(tiles) == len(set(tiles.values())) == 5
        (place,) = [name for name, colour in tiles.items() if colour == asked]
        problem, kept = cells(record.problem_image), cells(record.visual_thought)
        assert glyph(problem[place]) == record.answer
        assert record.full_text_only_thought == f"{asked} {record.answer}"
        assert coloured(record.visual_thought) == {place: asked}
        assert same(kept[place], problem[place])


def test_chart_answer_is_the_bar_height_and_the_thought_keeps_it_alone():
    for record in records(CHART):
        asked = record.question.split()[-1]
        tiles = coloured(record.problem_image)
        for column in "abcd":
            bar = [tiles.get(f"{column}{row}") for row in (1, 2, 3, 4)]
            height = sum(colour is not None for colour in bar)
            # It stands on the ground and has one colour.
            assert height >= 1
            assert len(set(bar[4 - height :])) == 1
        bar = {name: colour for name, colour in tiles.items() if colour == asked}
        (column,) = {name[0] for name in bar}
        assert record.answer == str(len(bar))
        assert record.full_text_only_thought == f"{asked} {column} {len(bar)}"
        assert coloured(record.visual_thought) == bar


def test_jigsaw_answer_is_the_piece_of_the_holes_stripe_and_leaves_the_tray():
    for record in records(JIGSAW):
        before, after = coloured(record.problem_image), coloured(record.visual_thought)
        place = record.full_text_only_thought.split()[1]
        tray = {"A": before["a4"], "B": before["d4"]}
        for letter, slot in (("A", "a4"), ("B", "d4")):
            assert same(ink(cells(record.problem_image)[slot]), SIGNS[letter])
        picture = above_tray(before)
        assert set(above_tray(cells(record.problem_image))) - set(picture) == {place}
        # Which candidate makes every row one colour?
        fitting = []
        for letter, colour in tray.items():
            stripes = {}
            for name, tile in (picture | {place: colour}).items():
                stripes.setdefault(name[1], set()).add(tile)
            fitting += [letter] * all(len(stripe) == 1 for stripe in stripes.values())
        assert fitting == [record.answer]
        # The wrong piece is no stranger: its colour is in the picture as well.
        assert set(tray.values()) <= set(picture.values())
        colour = tray[record.answer]
        assert record.full_text_only_thought == f"hole {place} {colour} {record.answer}"
        used, left = ("a4", "d4") if record.answer == "A" else ("d4", "a4")
        assert above_tray(after) == picture | {place: colour}
        assert same(cells(record.visual_thought)[place], cells(record.problem_image)[used])
        assert used not in after
        assert after[left] == before[left]


def sign_of(cell: np.ndarray) -> str:
    """What a maze cell shows: hole, start, goal or free."""
    inked = (cell != np.array(ICE)).any(-1)
    inked[[0, -1]] = inked[:, [0, -1]] = False
    if not inked.any():
        return "free"
    if same(inked, SIGNS["flag"]):
        return "goal"
    assert same(inked, SIGNS["disc"])
    return "start" if tuple(cell[7, 7]) == COLOURS["green"] else "hole"


def neighbour(place: str, down: int, right: int) -> str:
    """Name of the cell that many steps away, on the board or off it."""
    return f"{chr(ord(place[0]) + right)}{int(place[1]) + down}"


def shortest_answers(maze: dict[str, str], start: str) -> list[str]:
    """All shortest move lists, by brute force over ever longer walks."""
    walks = [(start, ())]
    for _ in range(16):
        walks = [
            (place, (*moves, move))
            for here, moves in walks
            for move, (down, right) in STEP.items()
            if maze.get(place := neighbour(here, down, right), "hole") != "hole"
        ]
        if reached := [" ".join(moves) for place, moves in walks if maze[place] == "goal"]:
            return reached
    return []


def test_navigation_answer_is_the_unique_shortest_path_of_the_picture():
    lengths = Counter()
    for record in records(NAVIGATION, 300):
        maze = {name: sign_of(cell) for name, cell in cells(record.problem_image).items()}
        (start,) = [name for name, sign in maze.items() if sign == "start"]
        (goal,) = [name for name, sign in maze.items() if sign == "goal"]
        assert shortest_answers(maze, start) == [record.answer]
        _, first, *steps = record.full_text_only_thought.split()
        moves, places = steps[::2], steps[1::2]
        assert moves == record.answer.split()
        assert (first, places[-1]) == (start, goal)
        for move, here, there in zip(moves, [first, *places], places, strict=False):
            assert neighbour(here, *STEP[move]) == there
        lengths[len(moves)] += 1
        free = sum(sign != "hole" for sign in maze.values())
        assert 0 <= free - (len(moves) + 1) <= 3
    assert set(lengths) == {2, 3, 4}
    assert min(lengths.values()) > 300 / 3 * 0.6


def test_navigation_thought_shows_move_k_on_ramp_colour_k():
    for record in records(NAVIGATION):
        shown = cells(record.visual_thought)
        words = record.full_text_only_thought.split()
        place, goal, moves = words[1], words[-1], record.answer.split()
        for step, move in enumerate(moves):
            cell = shown[place]
            assert tuple(cell[1, 1]) == navigation.RAMP[step]
            # An arrow is widest in the half it points to, and symmetric across its axis.
            white = (cell == np.array(PAPER)).all(-1)
            white[[0, -1]] = white[:, [0, -1]] = False
            down, right = STEP[move]
            along, forward = (white, down) if down else (white.T, right)
            assert (along.sum(axis=1).argmax() - 6.5) * forward > 0
            assert same(along, along[:, ::-1])
            place = neighbour(place, down, right)
        assert place == goal
        ramp_cells = [c for c in shown.values() if tuple(c[1, 1]) in navigation.RAMP]
        assert len(ramp_cells) == len(moves)


def test_corridors_are_all_the_chordless_paths():
    # Two moves, both ways: 2 straight runs in each of 8 lines, 4 bends in each of 9 blocks of four.
    assert len(navigation.corridors(2)) == 2 * (8 * 2 + 9 * 4)
    for moves in range(2, 7):
        paths = navigation.corridors(moves)
        assert len(set(paths)) == len(paths)
        for path in paths[::7]:
            assert navigation.shortest_paths(set(path), path[0], path[-1]) == (moves, 1)


def test_shortest_paths_counts_ways_and_says_when_there_is_none():
    square = {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert navigation.shortest_paths(square, (0, 0), (1, 1)) == (2, 2)
    assert navigation.shortest_paths({(0, 0), (3, 3)}, (0, 0), (3, 3)) == (-1, 0)


@pytest.mark.parametrize(("task", "answers"), [(SEARCH, 6), (JIGSAW, 2), (CHART, 4)])
def test_answers_are_balanced(task, answers):
    counts = Counter(record.answer for record in records(task, 1200))
    assert len(counts) == answers
    assert min(counts.values()) > 1200 / answers * 0.75


def test_glyphs_are_far_apart():
    names = sorted(GLYPHS)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert (GLYPHS[one] ^ GLYPHS[other]).sum() >= 20, (one, other)


# --- drawing and splits --------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_drawing_is_a_function_of_the_generator(task):
    assert records(task, 20) == records(task, 20)
    assert records(task, 20) != records(task, 20, seed=2)


def test_unknown_task_is_refused():
    with pytest.raises(ValueError, match="unknown task 'Sudoku'.*Visual_Search"):
        draw("Sudoku", random.Random(0))


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint_for_different_seeds(task):
    train = {content_hash(r) for r in split_records(task, "train", 1500, random.Random(1))}
    seen: set[int] = set()
    test = {content_hash(r) for r in split_records(task, "test", 150, random.Random(2), seen)}
    validation = {content_hash(r) for r in split_records(task, "validation", 150, random.Random(3))}
    assert len(test) == 150
    assert seen == test
    assert not train & test
    assert not train & validation
    assert not test & validation


@pytest.mark.parametrize("task", TASKS)
def test_split_shares(task):
    shares = Counter(split_of(record) for record in records(task, 3000))
    assert abs(shares["test"] - 300) < 70
    assert abs(shares["validation"] - 300) < 70


def test_content_hash_sees_question_and_picture():
    first, second = records(CHART, 2)
    swapped = MiniRecord(**{**vars(first), "question": second.question})
    same_question = MiniRecord(**{**vars(second), "question": first.question})
    assert len({content_hash(r) for r in (first, swapped, same_question)}) == 3
    # Answers and visual thoughts do not identify an item.
    assert content_hash(MiniRecord(**{**vars(first), "answer": "9"})) == content_hash(first)


def test_exhausted_split_is_an_error(monkeypatch):
    only = next(split_records(JIGSAW, "test", 1, random.Random(0)))
    monkeypatch.setattr("data.miniworld.write.draw", lambda task, rng: only)
    with pytest.raises(ValueError, match="no new test items left after 1 of 2"):
        list(split_records(JIGSAW, "test", 2, random.Random(0), set()))
