"""Wins and losses: every count by hand, means over data sets, and what cannot be compared."""

import math
from pathlib import Path

import pytest

from eval import pairs, table
from eval.pairs import compare, compare_rows, together
from eval.predictions import PREDICTIONS
from eval.scores import score_system
from eval.statistics import OVERALL, mcnemar, paired_difference
from tests.test_table import PROTOCOL, write
from train.records import RECORD_FIELDS, read_records

VSTAR = [True, True, True, False, True, True]  # of `a`
RIGHTS = {
    "a": {"VStarBench": VSTAR, "BLINK": [True, False]},
    "b": {"VStarBench": [False, True, False, False, True, False], "BLINK": [False, True]},
    "c": {"VStarBench": VSTAR},
}


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    for system, tasks in RIGHTS.items():
        for task, rights in tasks.items():
            write(tmp_path, task, rights, system)
        score_system(tmp_path / system, PROTOCOL)
    return tmp_path


def found(folder: Path, *names: str) -> dict[tuple[str, str], dict]:
    output = folder / "pairs.json"
    pairs.main([str(folder), "--pairs", *names, "--output_file", str(output)])
    return {(record["id"], record["task"]): record for record in read_records(output)}


def test_counts_by_hand() -> None:
    first = dict(a=True, b=True, c=True, d=False, e=False, x=True)
    second = dict(a=True, b=False, c=False, d=True, e=False, y=True)
    pair = compare(first, second)
    assert (pair.n, pair.both, pair.only_first, pair.only_second, pair.neither) == (5, 1, 2, 1, 1)
    assert (pair.first, pair.second) == (3 / 5, 2 / 5)
    assert pair.difference == paired_difference(1, 2, 1, 1)
    assert pair.p == 1.0  # one or two of three heads: anything is as likely


def test_together_counts_are_added_and_means_are_of_data_sets() -> None:
    many = compare(dict.fromkeys("abcdefgh", True), dict.fromkeys("abcdefgh", False))
    few = compare({"a": True, "b": False}, {"a": True, "b": True})
    pair = together([many, few])
    assert (pair.n, pair.both, pair.only_first, pair.only_second, pair.neither) == (10, 1, 8, 1, 0)
    assert (pair.first, pair.second) == ((1 + 0.5) / 2, (0 + 1) / 2)  # not 9/10 and 2/10
    assert pair.difference.value == pytest.approx((1 - 0.5) / 2)
    below = math.hypot(*(d.value - d.low for d in (many.difference, few.difference))) / 2
    above = math.hypot(*(d.high - d.value for d in (many.difference, few.difference))) / 2
    assert pair.difference.low == pytest.approx(0.25 - below)
    assert pair.difference.high == pytest.approx(0.25 + above)
    assert pair.p == mcnemar(8, 1) == 2 * (1 + 9) / 2**9


def test_command_writes_a_record_per_pair_and_data_set(answered: Path, capsys) -> None:
    records = found(answered, "a:b", "b:a", "a:c")
    assert list(records) == [
        ("a:b", "VStarBench"), ("a:b", "BLINK"), ("a:b", OVERALL),
        ("b:a", "VStarBench"), ("b:a", "BLINK"), ("b:a", OVERALL),
        ("a:c", "VStarBench"), ("a:c", OVERALL),
    ]  # fmt: skip
    record = records["a:b", "VStarBench"]
    values = record["values"]
    assert {name: values[name] for name in ("both", "only_first", "only_second", "neither")} == {
        "both": 2, "only_first": 3, "only_second": 0, "neither": 1,
    }  # fmt: skip
    assert (values["n"], values["first"], values["second"]) == (6, 5 / 6, 2 / 6)
    assert values["p"] == 2 / 8 and values["difference"]["value"] == pytest.approx(0.5)
    overall = records["a:b", OVERALL]["values"]
    assert (overall["n"], overall["only_first"], overall["only_second"]) == (8, 4, 1)
    assert overall["first"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert overall["p"] == 2 * (1 + 5) / 2**5 and overall["tasks"] == ["VStarBench", "BLINK"]
    turned = records["b:a", OVERALL]["values"]
    assert turned["difference"]["low"] == pytest.approx(-overall["difference"]["high"])
    same = records["a:c", OVERALL]["values"]
    assert same["tasks"] == ["VStarBench"] and same["difference"]["value"] == 0 and same["p"] == 1
    assert "a:b, overall" in capsys.readouterr().out


def test_records_name_their_origin(answered: Path) -> None:
    record = found(answered, "a:b")["a:b", OVERALL]
    assert set(RECORD_FIELDS) <= set(record)
    assert (record["kind"], record["system"], record["seed"]) == ("pair", "a", 3)
    assert record["commit"] == "abc"  # of the answers
    values = record["values"]
    assert values["commands"] == ["python -m eval.run ..."]
    assert values["files"] == [str(answered / name / "scores.json") for name in "ab"]


def test_questions_in_groups_count_as_they_are_scored(tmp_path: Path) -> None:
    """Of rotated questions the unit is the question, right only in all its rotations."""
    options = {"options": {"A": "", "B": ""}}
    write(tmp_path, "SAT_circular", [True, True, True, False, True, True], "a", **options)
    write(tmp_path, "SAT_circular", [True, False, True, False, True, True], "b", **options)
    for name in "ab":
        score_system(tmp_path / name, PROTOCOL)
    first, second = table.read_rows([tmp_path], ["a", "b"])
    pair = compare_rows(first, second)["SAT_circular"]
    assert (pair.n, pair.both, pair.only_first, pair.neither) == (3, 1, 1, 1)


def test_the_first_run_counts(tmp_path: Path) -> None:
    write(tmp_path, "BLINK", [True, False], "a")
    file = tmp_path / "a" / "BLINK" / PREDICTIONS
    lines = file.read_text()
    again = lines.replace('"run": 0', '"run": 1').replace("<answer>no", "<answer>yes")
    file.write_text(lines + again)
    write(tmp_path, "BLINK", [False, False], "b")
    for name in "ab":
        score_system(tmp_path / name, PROTOCOL)
    values = found(tmp_path, "a:b")["a:b", "BLINK"]["values"]
    assert (values["n"], values["first"], values["second"]) == (2, 0.5, 0.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pairs", "a"], "--pairs a: give two systems as FIRST:SECOND"),
        (["--pairs", "a:a"], "--pairs a:a: give two"),
        (["--pairs", "a:nobody"], "nobody: not among a, b, c"),
        (["--pairs", "a:b", "--output_file", "x.csv"], "--output_file x.csv has to end in .json"),
    ],
)
def test_mistakes_are_named(answered: Path, capsys, arguments, words) -> None:
    with pytest.raises(SystemExit) as stopped:
        pairs.main([str(answered), "--output_file", str(answered / "p.json"), *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1
    assert not (answered / "p.json").exists()


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("VStarBench", {"file_hash": "other"}, "VStarBench: a answered the file f, d the file"),
        (
            "VStarBench",
            {"protocol": "mine", "protocol_hash": "k"},
            "VStarBench: a answered under the protocol asked (h), d under mine (k): prompts, "
            "budget or images differ; ask both with one --protocol",
        ),
        ("MMVP", {}, "a and d have no data set in common: VStarBench, BLINK against MMVP"),
    ],
)
def test_only_the_same_questions_are_compared(answered, capsys, task, changes, words) -> None:
    write(answered, task, [True, False], "d", **changes)
    score_system(answered / "d", PROTOCOL)
    with pytest.raises(SystemExit):
        found(answered, "a:d")
    assert words in capsys.readouterr().err
