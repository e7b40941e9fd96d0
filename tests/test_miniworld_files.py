"""The miniature world on disk: tokenizer, parquet layout, command line, preview."""

import io
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from data.miniworld import __main__ as command
from data.miniworld.preview import contact_sheet
from data.miniworld.record import MiniRecord
from data.miniworld.tokenizer import PROMPTS, SPECIAL_TOKENS, TAGS, save_tokenizer
from data.miniworld.world import TASKS, draw
from data.miniworld.write import SHARD_ROWS, shard_count, split_records, write_shards

SEARCH, NAVIGATION, JIGSAW, CHART = TASKS


def records(task: str, n: int) -> list[MiniRecord]:
    rng = random.Random(1)
    return [draw(task, rng) for _ in range(n)]


# --- the tokenizer -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)


def test_every_world_word_and_tag_is_one_token(tokenizer):
    def pieces(text: str) -> list[str]:
        return tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)

    texts = [*PROMPTS, *TAGS, *"0123456789"]
    for task in TASKS:
        for record in records(task, 300):
            texts += [record.question, record.completion, *record.thoughts]
    for text in dict.fromkeys(texts):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(pieces(text)), (text, tokenizer.convert_ids_to_tokens(ids))
    assert all(len(tokenizer.encode(tag, add_special_tokens=False)) == 1 for tag in TAGS)
    assert len(tokenizer.encode("look and answer", add_special_tokens=False)) == 3


def test_completions_and_questions_are_short(tokenizer):
    for task in TASKS:
        for record in records(task, 300):
            assert len(tokenizer.encode(record.completion, add_special_tokens=False)) <= 18
            assert len(tokenizer.encode(record.question, add_special_tokens=False)) <= 5


def test_vocabulary_is_small_and_only_framing_is_special(tokenizer):
    assert 256 + len(SPECIAL_TOKENS) < len(tokenizer) <= 512
    ids = tokenizer.convert_tokens_to_ids([*TAGS, *SPECIAL_TOKENS])
    assert [i in tokenizer.all_special_ids for i in ids] == [False] * 6 + [True] * 5
    text = "".join(SPECIAL_TOKENS)
    assert tokenizer.encode(text, add_special_tokens=False) == ids[6:]


def test_tokenizer_files_are_deterministic(tokenizer_folder, tmp_path):
    save_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer_folder / name).read_bytes()


FRAGMENTS = st.sampled_from(
    [*TAGS, *SPECIAL_TOKENS, "red", " red", " ", "  ", "\n", "<", "é", "日本"]
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.lists(FRAGMENTS).map("".join)))
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


# --- files ---------------------------------------------------------------------------------------


def write_split(folder: Path, task: str, split: str, n: int, seed: int, shard_rows=SHARD_ROWS):
    """All shards of a split."""
    shards = range(shard_count(n, shard_rows))
    return write_shards(folder, task, split, n, seed, shards, shard_rows)


def test_files_have_the_released_layout(tmp_path):
    paths = write_split(tmp_path, CHART, "train", n=300, seed=0, shard_rows=200)
    assert paths == [
        tmp_path / "train-00000-of-00002.parquet",
        tmp_path / "train-00001-of-00002.parquet",
    ]
    for split in ("test", "validation"):
        (path,) = write_split(tmp_path, CHART, split, n=20, seed=0)
        assert "train" not in path.name
        assert path.name.startswith(split)
    file = pq.ParquetFile(paths[0])
    assert file.metadata.num_rows == 200
    assert file.metadata.row_group(0).num_rows == 128
    assert file.schema_arrow.names == [
        "pid",
        "question",
        "answer",
        "problem_image_0",
        "resoning_thought_0",
        "reasoning_image_0",
        "resoning_thought_1",
        "task",
        "full_text_only_thought",
    ]
    assert [f.name for f in file.schema_arrow.field("problem_image_0").type] == ["bytes", "path"]


def test_rows_hold_the_records_bit_for_bit(tmp_path):
    (path,) = write_split(tmp_path, JIGSAW, "train", n=30, seed=7)
    rng = random.Random(f"7/{JIGSAW}/train/0")
    expected = split_records(JIGSAW, "train", 30, rng)
    for row, record in zip(pq.read_table(path).to_pylist(), expected, strict=True):
        for column, image in (
            ("problem_image_0", record.problem_image),
            ("reasoning_image_0", record.visual_thought),
        ):
            with Image.open(io.BytesIO(row[column]["bytes"])) as stored:
                assert stored.mode == "RGB"
                assert stored.tobytes() == image.tobytes()
        assert (row["question"], row["answer"]) == (record.question, record.answer)
        assert (row["resoning_thought_0"], row["resoning_thought_1"]) == record.thoughts
        assert row["full_text_only_thought"] == record.full_text_only_thought
        assert row["task"] == JIGSAW


def test_pids_are_unique_and_files_depend_on_the_seed_alone(tmp_path):
    def table(folder, seed):
        return [
            pq.read_table(p) for p in write_split(folder, SEARCH, "test", 60, seed, shard_rows=25)
        ]

    first, again, other = (table(tmp_path / str(i), seed) for i, seed in enumerate((3, 3, 4)))
    assert first == again
    assert first != other
    pids = [pid for part in first for pid in part["pid"].to_pylist()]
    assert len(set(pids)) == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Sudoku", "train", 1), "unknown task 'Sudoku'"),
        ((SEARCH, "dev", 1), "unknown split 'dev'"),
        ((SEARCH, "train", -1), "n=-1"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, *arguments, seed=0, shards=range(1))
    assert not any(tmp_path.iterdir())


def test_command_writes_all_tasks_and_refuses_to_replace_them(tmp_path):
    root = tmp_path / "datasets"
    arguments = ["--output", str(root), "--train", "6", "--validation", "3", "--test", "4"]

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "data.miniworld", *arguments, *more],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).resolve().parents[1],
        )

    assert run().returncode == 0
    files = {path: path.read_bytes() for path in root.rglob("*.parquet")}
    assert len(files) == 12
    assert sorted(p.name for p in root.iterdir()) == sorted(TASKS)
    refused = run("--seed", "1")
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert {path: path.read_bytes() for path in files} == files
    assert run("--seed", "1", "--overwrite").returncode == 0
    assert all(path.read_bytes() != old for path, old in files.items())
    # The library call and the command draw the same rows.
    (path,) = write_split(tmp_path / "again", CHART, "test", n=4, seed=1)
    assert pq.read_table(path) == pq.read_table(root / CHART / "data" / path.name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output FOLDER, --preview FILE.png"),
        (["--output", "x", "--test", "-2"], "--test -2"),
        (["--preview", "sheet.nonsense"], "unknown file extension"),
    ],
)
def test_command_names_bad_arguments(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_preview_shows_every_problem_enlarged(tmp_path):
    command.main(["--preview", str(tmp_path / "sheet.png"), "--seed", "4"])
    with Image.open(tmp_path / "sheet.png") as stored:
        assert stored.tobytes() == contact_sheet(4).tobytes()
    sheet = np.asarray(contact_sheet(4, per_task=1))
    first = draw(SEARCH, random.Random("4/preview")).problem_image
    enlarged = np.asarray(first).repeat(3, axis=0).repeat(3, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, enlarged.shape)[:60, :30, 0]
    assert any(np.array_equal(window, enlarged) for row in windows for window in row)
