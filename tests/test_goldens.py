"""Stored reference numbers of a miniature model hold, and the command that checks them works."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.check_goldens import main
from tests.golden_checks.core import CHECKS, Golden, Result, max_abs, worst

GOLDENS = Path(__file__).parent / "data" / "goldens"
STORED = [entry for entry in CHECKS if Golden(GOLDENS).has(entry.files)]


def test_the_subset_covers_every_kind_of_check():
    kinds = {"a", "b", "c", "d", "e2", "f", "f2", "f3", "g", "i", "j", "k", "l", "o"}
    assert {entry.name.split("_")[0] for entry in STORED} == kinds


@pytest.mark.parametrize("entry", STORED, ids=lambda entry: entry.name)
def test_golden(entry):
    results = list(entry.run(Golden(GOLDENS)))
    assert results
    assert [r for r in results if not r.ok] == []


@pytest.fixture
def folder(tmp_path):
    """A small folder whose numbers a test may spoil."""
    for pattern in (
        "d_masks.*",
        "i_patchify*",
        "o_optim.json",
        "a_vit.*",
        "config.json",
        "model.*",
    ):
        for file in GOLDENS.glob(pattern):
            shutil.copy(file, tmp_path)
    return tmp_path


def test_command_succeeds_and_names_absent_checks(folder, capsys):
    (folder / "unknown_file.safetensors").write_bytes(b"ignored")
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "MISS" not in out.replace("0 MISS", "")
    assert "absent (needs k_opsd_packs.safetensors" in out
    lines = [line for line in out.splitlines() if line.startswith("a_vit.out ")]
    assert len(lines) == 1 and lines[0].endswith("ok") and "tolerance 1e-05" in lines[0]


def test_command_takes_a_parent_of_folders(folder, capsys):
    inner = folder / "inner"
    inner.mkdir()
    shutil.move(folder / "o_optim.json", inner / "o_optim.json")
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "o_optim.ema" in out and "a_vit.out" in out


@pytest.mark.parametrize(
    ("file", "key", "amount"),
    [
        ("a_vit", "vit_out", 2e-5),
        ("a_vit", "connector_out", -2e-5),
        ("d_masks", "case3", 1),
        ("i_patchify_posids", "interpolate.h28_w42_p14_max70", 1),
    ],
)
def test_one_changed_number_is_a_miss(folder, capsys, file, key, amount):
    path = folder / f"{file}.safetensors"
    tensors = load_file(path)
    flat = tensors[key].flatten().clone()
    flat[3] = ~flat[3] if flat.dtype == torch.bool else flat[3] + amount
    tensors[key] = flat.view(tensors[key].shape)
    save_file(tensors, path)
    assert main([str(folder)]) == 1
    misses = [line for line in capsys.readouterr().out.splitlines() if line.endswith("MISS")]
    assert len(misses) >= 1 and all(line.startswith(file) for line in misses[:-1])


def test_a_changed_json_number_is_a_miss(folder):
    path = folder / "o_optim.json"
    facts = json.loads(path.read_text())
    facts["cosine_min_lr"]["lr_used_at_step"]["300"] *= 1.00001
    path.write_text(json.dumps(facts))
    assert main([str(folder)]) == 1


def test_nothing_to_check_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path / "no_such_folder")]) == 2
    assert "no_such_folder is not a folder" in capsys.readouterr().err
    (tmp_path / "other.txt").write_text("x")
    assert main([str(tmp_path)]) == 2
    assert "holds no data of a known check" in capsys.readouterr().err


def test_comparisons_do_not_hide_nan_or_shapes():
    assert max_abs(torch.zeros(3), torch.zeros(2)) == float("inf")
    assert not Result("x", max_abs(torch.tensor([float("nan")]), [0.0]), 1.0).ok
    assert not Result("nothing compared", worst([]), 1.0).ok
    assert not Result("x", worst([0.0, float("nan")]), 1.0).ok
