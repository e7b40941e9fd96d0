"""Result records: complete, atomic, and traceable to a commit and a command."""

import datetime
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.records import (
    RECORD_FIELDS,
    base_record,
    config_hash,
    git_commit,
    read_records,
    run_info,
    write_atomic,
    write_records,
)


def record(id="1", **changes):
    origin = {"kind": "score", "system": "student", "task": "maze", "id": id}
    return base_record(
        **origin, values={"accuracy": 0.5}, seed=0, step=10, config_hash="abc", **changes
    )


def test_a_record_names_its_origin():
    made = record()
    assert set(made) == set(RECORD_FIELDS)
    assert made["values"] == {"accuracy": 0.5}
    assert made["hardware"]["torch"] == torch.__version__
    created = datetime.datetime.fromisoformat(made["created"])
    age = datetime.datetime.now(datetime.timezone.utc) - created
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)
    shared = run_info() | {"commit": "c0ffee"}
    assert record(info=shared)["commit"] == "c0ffee"


def test_the_command_keeps_module_and_arguments():
    code = "from train.records import command_line; print(command_line())"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, "--name", "two words"],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip().endswith("--name 'two words'")
    assert done.stdout.startswith(Path(sys.executable).name + " -c ")


def test_commit_is_the_head_marked_when_dirty_and_unknown_outside_git(tmp_path):
    assert git_commit(tmp_path) == "unknown"

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert git_commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == head + "-dirty"


@pytest.mark.parametrize("name", ["scores.json", "deep/predictions.jsonl"])
def test_records_read_back_as_written(tmp_path, name):
    records = [record("1"), record("2")]
    write_records(tmp_path / name, records)
    assert read_records(tmp_path / name) == records
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "scores.jsonl"
    write_records(path, [record("old")])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_records(path, [record() | {"values": {"loss": float("nan")}}])
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert [made["id"] for made in read_records(path)] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_incomplete_and_broken_files_are_named(tmp_path):
    incomplete = record()
    del incomplete["seed"]
    with pytest.raises(ValueError, match="record 2 for .*x.json lacks seed; build records with"):
        write_records(tmp_path / "x.json", [record(), incomplete])
    with pytest.raises(ValueError, match="result files end in .json or .jsonl"):
        write_records(tmp_path / "x.csv", [record()])
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record()) + "\n{oops\n")
    with pytest.raises(ValueError, match="x.jsonl, line 2 is not JSON"):
        read_records(path)
    path.write_text("3\n")
    with pytest.raises(ValueError, match="record 1 is a int, not a record"):
        read_records(path)


def test_config_hash_depends_on_values_not_on_order():
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})
    assert config_hash({"a": 1, "b": 2}) != config_hash({"a": 1, "b": 3})
    assert len(config_hash({})) == 12
