"""Mixtures: order as a pure function of (seed, index), weights, epochs, skips, loading."""

import multiprocessing
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.example import DataError, ExampleError
from data.mixture import Mixture, MixtureConfig, load_mixture, loader
from data.transforms import ImageTransform
from tests.data_helpers import cell, png, record, write_source

FOLDER = Path(__file__).parents[1] / "data" / "configs"
# The other files there are presets of the trainers.
CONFIGS = [
    FOLDER / f"{name}.yaml"
    for name in ("visual_opsd", "text_reasoning", "mini_opsd", "mini_pretrain")
    + ("interleaved_reasoning", "mini_interleaved")
]
OPSD = {"group": "visual_opsd", "dataset_names": ("A", "B")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    write_source(folder, "A", [record(i) for i in range(30)], files=2)
    write_source(folder, "B", [record(i) for i in range(10)])
    return folder


def mixture(root, seed=0, **config):
    return Mixture(MixtureConfig(**{**OPSD, **config}), root, seed)


def keys(source, indices):
    return [source.draw(i).example.key for i in indices]


def test_draws_depend_on_seed_and_index_only(root):
    forward = keys(mixture(root), range(60))
    assert keys(mixture(root), reversed(range(60))) == forward[::-1]
    assert keys(mixture(root, seed=1), range(60)) != forward


def test_one_epoch_of_the_mixture_holds_every_row_once(root):
    source = mixture(root)
    everything = {f"A/p{i}" for i in range(30)} | {f"B/p{i}" for i in range(10)}
    for epoch in range(3):
        drawn = [source.draw(i) for i in range(40 * epoch, 40 * (epoch + 1))]
        assert {draw.example.key for draw in drawn} == everything
        assert {draw.epoch for draw in drawn} == {epoch}
    assert keys(source, range(40)) != keys(source, range(40, 80))


def test_every_row_once_per_epoch_of_a_weighted_source(root):
    source = mixture(root, weights=(1, 3))
    epochs = {}
    for i in range(200):
        draw = source.draw(i)
        epochs.setdefault((draw.example.source, draw.epoch), []).append(draw.row)
    for (name, epoch), rows in epochs.items():
        assert len(set(rows)) == len(rows), f"{name} repeats a row in epoch {epoch}"
    full = [rows for (name, _), rows in epochs.items() if name == "B" and len(rows) == 10]
    assert len(full) >= 12
    assert len({tuple(rows) for rows in full}) == len(full)


@pytest.mark.parametrize("weights", [(1, 3), (0.9, 0.1)])
def test_weights_are_respected(root, weights):
    schedule = mixture(root, weights=weights)._schedule
    counts = Counter(schedule.place(i)[0] for i in range(20_000))
    assert counts[0] / 20_000 == pytest.approx(weights[0] / sum(weights), abs=1e-4)
    early = Counter(schedule.place(i)[0] for i in range(1000))
    assert early[0] / 1000 == pytest.approx(weights[0] / sum(weights), abs=0.06)


def test_positions_in_a_source_are_consecutive(root):
    schedule = mixture(root, weights=(1, 3))._schedule
    seen = Counter()
    for i in range(25_000):
        which, position = schedule.place(i)
        assert position == seen[which]
        seen[which] += 1


def test_windows_keep_reading_local(tmp_path, monkeypatch):
    monkeypatch.setattr("data.order.WINDOW_GROUPS", 2)
    write_source(tmp_path, "A", [record(i) for i in range(64)])
    source = mixture(tmp_path, dataset_names=("A",))
    groups = [source.draw(i).row // 4 for i in range(64)]
    assert [len(set(groups[i : i + 8])) for i in range(0, 64, 8)] == [2] * 8
    assert groups != sorted(groups)


def test_num_used_data_takes_the_first_rows(root):
    source = mixture(root, num_used_data=(5, 3))
    expected = {f"A/p{i}" for i in range(5)} | {f"B/p{i}" for i in range(3)}
    assert set(keys(source, range(8))) == expected


def damaged(folder, bad, total=40):
    rows = [record(i) for i in range(total)]
    for index in bad:
        rows[index]["problem_image_0"] = cell(b"\x89PNG\r\n\x1a\n junk")
    write_source(folder, "A", rows)
    return mixture(folder, dataset_names=("A",), max_skip_fraction=0.05)


def test_damaged_rows_are_replaced_by_the_next_row_and_counted(tmp_path):
    source = damaged(tmp_path, bad=[7, 8])
    drawn = [source.draw(i) for i in range(40)]
    counts = Counter(draw.row for draw in drawn)
    assert counts == Counter({**{row: 1 for row in range(40) if row not in (7, 8)}, 9: 3})
    assert sorted(draw.skipped for draw in drawn if draw.skipped) == [1, 2]
    again = damaged(tmp_path, bad=[7, 8])
    assert [again.draw(i).row for i in range(40)] == [draw.row for draw in drawn]


def test_too_many_damaged_rows_stop_the_run(tmp_path):
    source = damaged(tmp_path, bad=range(0, 40, 8))
    with pytest.raises(DataError, match=r"max_skip_fraction=0.05.*row \d+ of A: column problem_im"):
        for i in range(400):
            source.draw(i)
    assert source._reader.tried >= 200


def test_rows_without_visual_thoughts_are_not_drawn_for_opsd(tmp_path):
    rows = [record(i) for i in range(8)]
    rows[3]["reasoning_image_0"] = cell(None)
    write_source(tmp_path, "A", rows)
    source = mixture(tmp_path, dataset_names=("A",))
    drawn = [source.draw(i) for i in range(8)]
    assert {draw.row for draw in drawn} == {0, 1, 2, 4, 5, 6, 7}
    assert sum(draw.skipped for draw in drawn) == 1


def test_a_source_without_usable_rows_is_an_error(tmp_path):
    with pytest.raises(DataError, match="none of its 5 rows is usable"):
        damaged(tmp_path, bad=range(5), total=5).draw(0)


def test_groups_read_what_they_need(root):
    opsd = mixture(root).draw(0).example
    assert (len(opsd.visual_thoughts), opsd.full_text_only_thought, opsd.thoughts) == (1, "", ())
    text = mixture(root, group="text_reasoning").draw(0).example
    assert text.full_text_only_thought.startswith("because")
    assert text.visual_thoughts == ()
    contexts = {"default": {"teacher": 1.0}}
    both = mixture(root, group="text_reasoning", contexts=contexts).draw(0)
    assert (len(both.example.visual_thoughts), both.context) == (1, "teacher")


def test_contexts_follow_their_shares(root):
    contexts = {"default": {"student": 1, "teacher": 3}, "B": {"teacher_noise": 0.5}}
    source = mixture(root, group="text_reasoning", contexts=contexts)
    drawn = [source.draw(i) for i in range(1200)]
    counts = Counter((draw.example.source, draw.context) for draw in drawn)
    assert set(counts) == {("A", "student"), ("A", "teacher"), ("B", "teacher_noise")}
    assert counts["A", "teacher"] / 900 == pytest.approx(0.75, abs=0.05)
    assert [source.draw(i).context for i in range(50)] == [draw.context for draw in drawn[:50]]
    assert mixture(root).draw(0).context == "student"


def test_the_interleaved_group_reads_thoughts_and_pictures_and_no_other_text(tmp_path):
    rows = [record(i, full_text_only_thought=...) for i in range(4)]  # no such column
    write_source(tmp_path, "A", rows)
    source = mixture(tmp_path, group="interleaved_reasoning", dataset_names=("A",))
    assert source.config.draws_pictures()
    drawn = source.draw(0)
    assert drawn.context == "interleaved"
    number = drawn.example.pid[1:]
    assert drawn.example.thoughts == (f"first {number}", f"second {number}")
    assert len(drawn.example.visual_thoughts) == 1
    assert drawn.example.full_text_only_thought == ""


@pytest.mark.parametrize("group", ["text_reasoning", "interleaved_reasoning"])
def test_a_group_may_mix_text_rows_and_rows_that_draw(root, group):
    contexts = {"default": {"interleaved": 1, "student": 1}, "B": {"student": 1, "interleaved": 0}}
    source = mixture(root, group=group, contexts=contexts)
    assert source.config.draws_pictures()
    drawn = [source.draw(i) for i in range(200)]
    counts = Counter((draw.example.source, draw.context) for draw in drawn)
    assert set(counts) == {("A", "interleaved"), ("A", "student"), ("B", "student")}
    assert counts["A", "interleaved"] / 150 == pytest.approx(0.5, abs=0.15)
    assert all(len(draw.example.thoughts) == 2 for draw in drawn)
    assert all(draw.example.full_text_only_thought for draw in drawn)


@pytest.mark.parametrize(
    ("config", "draws"),
    [
        ({"group": "visual_opsd"}, False),
        ({"group": "text_reasoning"}, False),
        ({"group": "interleaved_reasoning", "contexts": {"default": {"teacher": 1}}}, False),
        ({"group": "interleaved_reasoning", "contexts": {"A": {"teacher": 1}}}, True),  # B does
        ({"group": "text_reasoning", "contexts": {"A": {"interleaved": 1}}}, True),
        ({"group": "text_reasoning", "contexts": {"A": {"interleaved": 0, "student": 1}}}, False),
    ],
)
def test_mixtures_that_draw_pictures(config, draws):
    config = MixtureConfig(**{**OPSD, **config})
    assert config.draws_pictures() is draws
    assert (config.fields.interleaved, config.fields.thoughts) == (draws, draws)
    assert config.fields.visual_thoughts or not draws


def test_rows_without_a_thought_on_both_sides_of_each_picture_are_skipped(tmp_path):
    rows = [record(i) for i in range(40)]
    rows[3] |= {"resoning_thought_1": None}
    rows[7] |= {"resoning_thought_0": ""}
    rows[11] |= {"resoning_thought_2": "one too many"}
    rows[20] |= {"reasoning_image_0": cell(None)}
    rows[30] |= {"reasoning_image_0": cell(b"\x89PNG\r\n\x1a\n junk")}
    rows[31] |= {"reasoning_image_1": cell(png(9)), "resoning_thought_2": "then"}  # two pictures
    write_source(tmp_path, "A", rows)
    draws = {"group": "interleaved_reasoning", "dataset_names": ("A",)}
    source = mixture(tmp_path, **draws)
    drawn = [source.draw(i) for i in range(40)]
    counts = Counter(draw.row for draw in drawn)
    bad = {3, 7, 11, 20, 30}
    assert counts == Counter([row if row not in bad else row + 1 for row in range(40)])
    assert sum(draw.skipped for draw in drawn) == len(bad) == source._reader.skipped["A"]
    (two,) = [draw.example for draw in drawn if draw.row == 31 and not draw.skipped]
    assert (len(two.thoughts), len(two.visual_thoughts)) == (3, 2)
    with pytest.raises(ExampleError, match=r"row 3 of A: 1 thoughts around 1 visual thoughts; an"):
        source.sources[0].example(3)
    with pytest.raises(ExampleError, match=r"row 30 of A: column reasoning_image_\* is empty or d"):
        source.sources[0].example(30)
    # the same rows are good for a text-only baseline, which does not read them
    text = mixture(tmp_path, group="text_reasoning", dataset_names=("A",))
    assert sum(text.draw(i).skipped for i in range(40)) == 0


def test_too_many_rows_that_cannot_be_drawn_stop_the_run(tmp_path):
    rows = [record(i, **({"resoning_thought_1": None} if i % 8 == 0 else {})) for i in range(40)]
    write_source(tmp_path, "A", rows)
    source = mixture(tmp_path, group="interleaved_reasoning", dataset_names=("A",))
    with pytest.raises(DataError, match="max_skip_fraction=0.01; the last one: .* 1 thoughts ar"):
        for i in range(400):
            source.draw(i)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_order_does_not_depend_on_workers(root, num_workers):
    batches = list(loader(mixture(root), 4, start_step=3, steps=5, num_workers=num_workers))
    assert [[row for row, _ in batch] for batch in batches] == [[0, 1, 2, 3]] * 5
    drawn = [draw for batch in batches for _, draw in batch]
    assert [draw.index for draw in drawn] == list(range(12, 32))
    assert [draw.example.key for draw in drawn] == keys(mixture(root), range(12, 32))


def test_order_does_not_depend_on_world_size(root):
    whole = [flat for batch in loader(mixture(root), 4, 0, 6) for flat in batch]
    for world in (2, 4):
        parts = [list(loader(mixture(root), 4, 0, 6, rank, world)) for rank in range(world)]
        joined = [flat for step in range(6) for part in parts for flat in part[step]]
        assert [(row, d.example.key) for row, d in joined] == [
            (row, d.example.key) for row, d in whole
        ]
    with pytest.raises(ValueError, match="global_batch=4 must be a positive multiple of world=3"):
        loader(mixture(root), 4, rank=0, world=3)


def write_shards(root, name, sizes):
    """One file per size, 0 included, with row groups of two rows."""
    folder = root / name / "data"
    for number, size in enumerate(sizes):
        first = sum(sizes[:number])
        rows = [record(first + i) for i in range(size)] or [record(0)]
        write_source(root, name, rows, row_group_size=2)
        written = folder / "train-00000-of-00001.parquet"
        if size == 0:
            pq.write_table(pq.read_table(written).slice(0, 0), written)
        written.rename(folder / f"train-{number:05d}.parquet")


SHARDS = st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sources=st.lists(SHARDS, min_size=1, max_size=2),
    world=st.sampled_from([1, 2, 4]),
    share=st.integers(1, 3),
    workers=st.sampled_from([0, 0, 1, 3]),
    start=st.integers(0, 3),
)
@example(sources=[[0, 1, 0]], world=2, share=1, workers=3, start=0)  # fewer rows than workers
def test_no_row_is_lost_or_doubled_whatever_reads_it(sources, world, share, workers, start):
    """Shards of any size, over ranks and workers, from a step on: each row once per epoch."""
    with tempfile.TemporaryDirectory() as folder:
        rows = set()
        for number, sizes in enumerate(sources):
            write_shards(Path(folder), f"S{number}", sizes)
            rows |= {f"S{number}/p{i}" for i in range(sum(sizes))}
        batch = world * share
        steps = -(-2 * len(rows) // batch) + 2
        names = tuple(f"S{number}" for number in range(len(sources)))
        ranks = [
            list(
                loader(
                    mixture(Path(folder), dataset_names=names),
                    *(batch, start, steps, rank, world, workers),
                )
            )
            for rank in range(world)
        ]
    assert {len(items) for items in ranks} == {steps}  # no rank waits for another
    drawn = [draw for step in range(steps) for items in ranks for _, draw in items[step]]
    assert [draw.index for draw in drawn] == list(range(batch * start, batch * (start + steps)))
    skip = -batch * start % len(rows)  # to where an epoch begins
    epoch = [draw.example.key for draw in drawn[skip : skip + len(rows)]]
    assert Counter(epoch) == Counter(rows)


@pytest.mark.skipif(sys.platform != "linux", reason="the sender of a signal is not known")
def test_workers_obey_the_process_that_started_them_and_nobody_else(root):
    batches = iter(loader(mixture(root), 4, steps=9, num_workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    for name in ("TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len(list(batches)) == 8
    batches = iter(loader(mixture(root), 4, steps=9, num_workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(timeout=20)
    assert not worker.is_alive()


def test_spawned_workers_read_the_same(root):
    source = mixture(root)
    source.draw(0)
    (batch,) = loader(source, 2, steps=1, num_workers=1, start_method="spawn")
    assert [draw.example.key for _, draw in batch] == keys(source, range(2))


def test_worker_errors_reach_the_caller(tmp_path):
    source = damaged(tmp_path, bad=range(5), total=5)
    with pytest.raises(DataError, match="none of its 5 rows is usable"):
        list(loader(source, 2, steps=1, num_workers=1))
    assert issubclass(ExampleError, DataError)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path, tmp_path):
    config = MixtureConfig.load(path)
    assert len(config.dataset_names) == 4
    for name in config.dataset_names:
        write_source(tmp_path, name, [record(i) for i in range(3)])
    source = load_mixture(path, tmp_path, seed=1)
    assert {source.draw(i).example.source for i in range(60)} == set(config.dataset_names)


def test_shipped_paper_config_is_the_paper():
    config = MixtureConfig.load(FOLDER / "visual_opsd.yaml")
    assert config.vit_image_transform_args == ImageTransform(980, 378, 14, 2_007_040)
    assert (config.max_reference_rounds, config.weights, config.num_used_data) == (8, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("visual_opsd: {dataset_names: [A], weigths: [1]}", "unknown keys .'weigths'.*known keys"),
        ("visual_opsd: [A]", "needs dataset_names"),
        ("visual_opsd: {split: train}", "needs dataset_names; keys are"),
        ("t2i: {dataset_names: [A]}", "one top-level key out of visual_opsd, text_reasoning"),
        ("visual_opsd: {dataset_names: [A, B], weights: [1]}", "weights .1. needs one positive"),
        ("visual_opsd: {dataset_names: [A, A]}", "empty or has repeats"),
        ("visual_opsd: {dataset_names: [A], num_used_data: [0]}", "num_used_data .0. needs"),
        ("visual_opsd: {dataset_names: [A], split: dev}", "split 'dev'"),
        (
            "text_reasoning: {dataset_names: [A], contexts: {default: {tutor: 1}}}",
            "expected non-negative shares",
        ),
        ("text_reasoning: {dataset_names: [A], contexts: {C: {teacher: 1}}}", "contexts names 'C'"),
        (
            "interleaved_reasoning: {dataset_names: [A], contexts: {A: {drawn: 1}}}",
            "of student, teacher, teacher_noise, interleaved",
        ),
        (
            "visual_opsd: {dataset_names: [A], vit_image_transform_args: {image_stride: 14}}",
            "vit_image_transform_args: expected exactly",
        ),
        ("visual_opsd: {dataset_names: [A], vit_image_transform_args: 980}", "args: exp.*got 980"),
        ("visual_opsd: {dataset_names: A}", "dataset_names is 'A'; expected a list of folder"),
        ("visual_opsd: {dataset_names: [1]}", "dataset_names is .1.; expected a list of folder"),
        ("visual_opsd: {dataset_names: null}", "needs dataset_names"),
        ("visual_opsd: {dataset_names: [A], weights: '1'}", "weights is '1'; expected a list"),
        ("visual_opsd: {dataset_names: [A], weights: [.nan]}", "weights is .nan.; expected"),
        ("visual_opsd: {dataset_names: [A], num_used_data: 7}", "num_used_data is 7; expected"),
        ("visual_opsd: {dataset_names: [A], num_used_data: [1.5]}", "num_used_data is .1.5.; exp"),
        ("visual_opsd: {dataset_names: [A], max_skip_fraction: 1e-2}", "fraction is '1e-2'; exp"),
        ("visual_opsd: {dataset_names: [A], max_reference_rounds: two}", "rounds is 'two'; exp"),
        ("visual_opsd: {dataset_names: [A], split: [train]}", "split .'train'. is not one of"),
        ("text_reasoning: {dataset_names: [A], contexts: teacher}", "contexts is 'teacher'; exp"),
        (
            "text_reasoning: {dataset_names: [A], contexts: {A: {teacher: x}}}",
            "contexts is .*: 'x'",
        ),
        ("visual_opsd: {dataset_names: [A", "is not yaml: while parsing"),
        ("visual_opsd: \x07", "is not yaml: unacceptable character"),
    ],
)
def test_wrong_configs_are_refused(tmp_path, text, message):
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        MixtureConfig.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_key_without_value_keeps_its_default(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text("visual_opsd:\n  dataset_names: [A]\n  weights:\n  max_skip_fraction:\n")
    assert MixtureConfig.load(path) == MixtureConfig("visual_opsd", ("A",))
    with pytest.raises(DataError, match="no such mixture file"):
        MixtureConfig.load(tmp_path)
