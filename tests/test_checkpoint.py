"""Checkpoints: what a folder named N holds, and that only whole folders become visible."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.processor import Processor
from modeling.pretrained import find_weights, is_generation_key, load_pretrained
from tests.training import WORLD, base_processor, opsd_config, run_opsd, weights_of, workspace
from train import checkpoint
from train.checkpoint import CheckpointWriter
from train.config import UsageError
from train.folders import claim_folders
from train.parallel import wrap
from train.records import config_hash


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three updates that saved after each."""
    folder = tmp_path_factory.mktemp("run")
    run_opsd(folder, total_steps=3, save_every=1, lr=1e-2, ema_decay=0.5)
    return folder


@pytest.fixture
def writer(tmp_path):
    config = opsd_config(tmp_path, total_steps=5)
    model = load_pretrained(workspace() / "base")
    base = find_weights(workspace() / "base")
    written = CheckpointWriter(config, model.config, base_processor(), base, WORLD)
    return written, wrap(model, WORLD)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def move(student, by: float) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(by)


def test_folders_are_named_by_updates_and_latest_is_the_last(run):
    folder = run / "checkpoints"
    assert names(folder) == ["0000001", "0000002", "0000003", "latest"]
    assert os.readlink(folder / "latest") == "0000003"  # relative: the folder may move
    assert (folder / "latest").resolve() == (folder / "0000003").resolve()
    for step in (1, 2, 3):
        assert json.loads((folder / f"{step:07d}" / "run.json").read_text())["step"] == step


def test_one_update_lies_between_neighbours(run):
    """With a learning rate of 1e-2 no AdamW update moves a weight by more than about that."""
    states = [weights_of(workspace() / "base"), *(weights_of(run, step) for step in (1, 2, 3))]
    for before, after in zip(states, states[1:], strict=False):
        moved = {float((after[key] - before[key]).abs().max()) for key in after}
        assert max(moved) > 1e-4
    first = {float((states[1][key] - states[0][key]).abs().max()) for key in states[0]}
    assert max(first) == pytest.approx(1e-2, rel=1e-3)  # the first update of AdamW: lr * sign


def test_folder_opens_as_the_student_and_on_request_as_the_teacher(run):
    folder = run / "checkpoints" / "latest"
    stored = {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema")}
    for weights, name in (("auto", "model"), ("student", "model"), ("ema", "ema")):
        model = load_pretrained(folder, weights=weights)
        for key, value in model.named_parameters():
            assert torch.equal(value, stored[name][key]), (weights, key)
    load_pretrained(folder, experts="all")  # strict: the generation expert is complete
    assert any(not torch.equal(stored["model"][key], stored["ema"][key]) for key in stored["ema"])


def test_folder_is_self_contained(run):
    folder = run / "checkpoints" / "0000002"
    files = names(folder)
    for name in ("llm_config.json", "vit_config.json", "run.json", "preprocessor_config.json"):
        assert name in files
    assert {"model.safetensors", "ema.safetensors", "tokenizer.json"} <= set(files)
    assert not [name for name in files if name.startswith(".")]
    opened, base = Processor.from_pretrained(folder), base_processor()
    assert (opened.transform, opened.prompts) == (base.transform, base.prompts)
    text = "find the <image_start> 3 </think>"
    assert opened.tokenizer.encode(text) == base.tokenizer.encode(text)
    assert opened.tokenizer.special == base.tokenizer.special


def test_a_run_goes_on_from_a_checkpoint_folder(run, tmp_path):
    lines = run_opsd(tmp_path, model_path=run / "checkpoints" / "latest", total_steps=1)
    assert len(lines) == 1
    before, after = weights_of(run, 3), weights_of(tmp_path, 1)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and not any(is_generation_key(key) for key in changed)
    assert max(float((after[key] - before[key]).abs().max()) for key in changed) < 2e-3


def test_origin_is_recorded(run):
    origin = json.loads((run / "checkpoints" / "0000003" / "run.json").read_text())
    flags = {"total_steps": 3, "save_every": 1, "lr": 1e-2, "ema_decay": 0.5}
    config = opsd_config(run, **flags)
    assert origin["step"] == 3
    assert origin["seed"] == config.run.global_seed == 4396
    assert origin["preset"] is None
    assert origin["base"] == str(workspace() / "base")
    assert origin["config_hash"] == config_hash(config)
    assert config_hash(opsd_config(run, **{**flags, "lr": 2e-2})) != origin["config_hash"]
    for field in ("commit", "command", "created", "hardware"):
        assert origin[field]


def test_export_dtype_spares_what_is_carried_over(tmp_path):
    run_opsd(tmp_path, total_steps=1, save_dtype="bfloat16")
    stored = weights_of(tmp_path, 1)
    base = weights_of(workspace() / "base")
    for key, value in stored.items():
        kept = is_generation_key(key)
        assert value.dtype == (torch.float32 if kept else torch.bfloat16)
        if kept:
            assert torch.equal(value, base[key])
    model = load_pretrained(tmp_path / "checkpoints" / "latest")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_left_over_folders_of_a_killed_run_do_not_disturb(writer, tmp_path):
    written, student = writer
    folder = tmp_path / "checkpoints"
    for name in (".0000004.partial", ".0000005.partial", ".0000004.replaced"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"torn")
    final = written.save(4, student)
    assert final == folder / "0000004"
    assert [name for name in names(folder) if not name.startswith(".")] == ["0000004", "latest"]
    assert ".0000004.partial" not in names(folder)
    load_pretrained(final)
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_pretrained(folder / ".0000005.partial")


def test_the_same_step_may_be_written_again(writer, tmp_path):
    written, student = writer
    first = written.save(4, student, ema=student)
    before = load_file(first / "model.safetensors")
    (first / "stray.txt").write_text("of the first run")
    move(student, 1.0)
    assert written.save(4, student) == first
    assert names(tmp_path / "checkpoints") == ["0000004", "latest"]
    assert "stray.txt" not in names(first)
    assert "ema.safetensors" not in names(first)
    after = load_file(first / "model.safetensors")
    key = "language_model.model.norm.weight"
    assert torch.allclose(after[key], before[key] + 1.0)


def test_overwrite_removes_the_earlier_run_and_nothing_else(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    for name in ("0000005", "12345678", ".0000006.partial", "0000009.bak", "best", "7"):
        (folder / name).mkdir(parents=True)
    (folder / "0000008").write_text("not a folder")
    (folder / "latest").symlink_to("0000005")
    with pytest.raises(UsageError, match=r"holds 2 checkpoint\(s\) .*\(12345678\)"):
        claim_folders(opsd_config(tmp_path), WORLD)
    assert ".0000006.partial" in names(folder)  # a refusal touches nothing
    claim_folders(opsd_config(tmp_path, overwrite=True), WORLD)
    assert names(folder) == ["0000008", "0000009.bak", "7", "best"]
    assert f"removing 2 checkpoint(s) of an earlier run in {folder}" in capsys.readouterr().out


def test_half_written_folders_of_a_killed_run_are_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in (".0000004.partial", ".0000005.partial", ".notes.partial"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"torn")
    claim_folders(opsd_config(tmp_path), WORLD)
    assert names(folder) == [".notes.partial"]


def test_only_the_first_rank_removes(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "0000005").mkdir(parents=True)
    second = dataclasses.replace(WORLD, rank=1)
    with pytest.raises(UsageError, match="0000005"):  # all ranks come to the same decision
        claim_folders(opsd_config(tmp_path), second)
    claim_folders(opsd_config(tmp_path, overwrite=True), second)
    assert names(folder) == ["0000005"]


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UsageError, match=f"--results_dir .*no permission to write in {tmp_path}"):
        claim_folders(opsd_config(tmp_path), WORLD)


@pytest.mark.parametrize("broken", ["save_pretrained", "write_atomic", "fsync"])
def test_a_failure_while_writing_publishes_nothing(writer, tmp_path, monkeypatch, broken):
    written, student = writer
    kept = written.save(3, student)
    before = {file.name: file.read_bytes() for file in kept.iterdir()}

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    move(student, 1.0)
    monkeypatch.setattr(checkpoint, broken, disk_full)
    for step in (3, 4):  # over an existing folder, and a new one
        with pytest.raises(OSError, match="No space left"):
            written.save(step, student)
    folder = tmp_path / "checkpoints"
    assert [name for name in names(folder) if not name.startswith(".")] == ["0000003", "latest"]
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before
    assert os.readlink(folder / "latest") == "0000003"
    monkeypatch.undo()
    assert written.save(4, student) == folder / "0000004"
    assert os.readlink(folder / "latest") == "0000004"
    load_pretrained(folder / "latest")


def saved(folder, steps, best=None, **flags):
    """Folders left of a run that saved at `steps`, `best` being marked when it was the newest."""
    config = opsd_config(folder, total_steps=9, **flags)
    model = load_pretrained(workspace() / "base")
    base = find_weights(workspace() / "base")
    writer = CheckpointWriter(config, model.config, base_processor(), base, WORLD)
    for step in steps:
        writer.save(step, model)
        if step == best:
            writer.mark_best(step)
    return names(folder / "checkpoints"), writer


def test_the_last_n_stay_and_the_best_besides(tmp_path):
    assert saved(tmp_path / "all", (1, 2, 3))[0] == ["0000001", "0000002", "0000003", "latest"]
    left, _ = saved(tmp_path / "two", (1, 2, 3, 4), keep_last=2)
    assert left == ["0000003", "0000004", "latest"]
    left, writer = saved(tmp_path / "best", (1, 2, 3, 4), best=2, keep_last=1)
    assert left == ["0000002", "0000004", "best", "latest"]
    folder = tmp_path / "best" / "checkpoints"
    assert os.readlink(folder / "best") == "0000002"
    writer.mark_best(4)
    writer.save(5, load_pretrained(folder / "best"))
    assert names(folder) == ["0000004", "0000005", "best", "latest"]
    with pytest.raises(ValueError, match="no checkpoint 0000003 .* save it first"):
        writer.mark_best(3)
    assert os.readlink(folder / "best") == "0000004"


def test_the_best_has_a_folder_of_its_own_where_none_was_due(tmp_path):
    """It has no state, does not count for --keep_last, and goes when another one is the best."""
    _, writer = saved(tmp_path, (2,), keep_last=1)
    folder, model = tmp_path / "checkpoints", load_pretrained(workspace() / "base")
    writer.save_best(3, model, model)
    assert names(folder) == ["0000002", "best", "best-0000003", "latest"]
    assert os.readlink(folder / "best") == "best-0000003"
    assert os.readlink(folder / "latest") == "0000002"
    assert json.loads((folder / "best" / "run.json").read_text())["step"] == 3
    load_pretrained(folder / "best", weights="ema")
    writer.save(4, model)
    assert names(folder) == ["0000004", "best", "best-0000003", "latest"]
    writer.save_best(4, model)  # that one is there
    assert names(folder) == ["0000004", "best", "latest"]
    assert os.readlink(folder / "best") == "0000004"
    assert writer.holds(4) and not writer.holds(3)
    writer.save_best(5, model)
    writer.save_best(6, model)
    assert names(folder) == ["0000004", "best", "best-0000006", "latest"]


def test_the_best_of_an_earlier_attempt_is_written_again(tmp_path):
    """A run that begins anew after a kill may have other settings, and finds its best there."""
    _, writer = saved(tmp_path, (1,))
    folder, model = tmp_path / "checkpoints", load_pretrained(workspace() / "base")
    writer.save_best(3, model)
    (folder / "0000005").mkdir()  # foreign: no run.json
    move(model, 1.0)
    for step in (3, 5):
        writer.save_best(step, model)
        assert os.readlink(folder / "best") == f"best-000000{step}"
        key = "language_model.model.norm.weight"
        before = load_file(workspace() / "base" / "model.safetensors")[key]
        after = load_file(folder / "best" / "model.safetensors")[key].float()
        torch.testing.assert_close(after, before + 1.0, atol=1e-2, rtol=1e-2)  # stored as bfloat16


def test_a_best_of_another_run_is_not_taken_over(tmp_path):
    _, writer = saved(tmp_path, (1,))
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder)
    writer.save_best(3, load_pretrained(workspace() / "base"))
    with pytest.raises(UsageError, match=r"holds 1 .*\(best-0000003\).*--resume auto"):
        claim_folders(opsd_config(tmp_path), WORLD)
    claim_folders(opsd_config(tmp_path, resume="auto"), WORLD)  # the same run, started again
    assert names(folder) == ["best", "best-0000003"]
    claim_folders(opsd_config(tmp_path, overwrite=True), WORLD)
    assert names(folder) == []


def test_what_is_not_ours_or_still_needed_is_not_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "0000002").mkdir(parents=True)  # foreign: no run.json
    start = folder / "0000001"
    shutil.copytree(workspace() / "base", start)
    (start / "run.json").write_text('{"step": 1}')
    left, _ = saved(tmp_path, (3, 4, 5), keep_last=1, model_path=start)
    assert left == ["0000001", "0000002", "0000005", "latest"]


def test_left_overs_are_announced_and_a_replaced_folder_outlives_a_crash(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    for name in (".0000004.partial", ".0000003.removed", ".0000002.replaced"):
        (folder / name).mkdir(parents=True)
    claim_folders(opsd_config(tmp_path), WORLD)
    assert names(folder) == [".0000002.replaced"]  # the only one of its step
    out = capsys.readouterr().out
    for name in (".0000003.removed", ".0000004.partial"):
        assert f"ignored {folder / name}: half-written" in out
