"""Resume: a run that was stopped ends like one that was not; what cannot be resumed is refused."""

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from tests.test_parallel import free_ports
from tests.training import (
    WORLD,
    largest_difference,
    metric_lines,
    opsd_config,
    run_opsd,
    run_sft,
    sft_config,
    weights_of,
    workspace,
)
from train import opsd, sft
from train.checkpoint import updates_in
from train.config import UsageError
from train.folders import claim_folders, find_resumable
from train.parallel import distributed, full_state
from train.teacher import EMATeacher

STEPS = 5
# log_every does not divide every stop: means then run over updates before and after it
FLAGS = {"total_steps": STEPS, "log_every": 2, "save_every": 1, "lr": 2e-3, "warmup_steps": 2}
FLAGS["eps"] = 1e-6  # or AdamW would magnify the rounding of other batches
RUNS = {"opsd": run_opsd, "sft": run_sft}
TEACHER = {"opsd": {"ema_decay": 0.5, "jsd_token_clip": 0.002, "ce_weight": 0.1}, "sft": {}}
PATIENCE = 240  # seconds; more than ten times what the processes need


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{step:07d}"


def states_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of the state after `step` updates, put together from the shares of all ranks."""
    tensors = {}
    for file in sorted((folder_of(run, step) / "state").rglob("*.safetensors")):
        for name, value in load_file(file).items():
            tensors[f"{file.parent.name} {file.name[:11]} {name}"] = value
    return tensors


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def stop_after(run: Path, step: int, into: Path) -> None:
    """What a run that was killed after `step` updates leaves: later folders and lines are gone."""
    for file in ("results/metrics.jsonl", f"checkpoints/{step:07d}"):
        source, target = run / file, into / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            lines = source.read_text().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            target.write_text("".join(kept) + '{"step": 9')  # and a torn one
    (into / "checkpoints" / "latest").symlink_to(f"{step:07d}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs of both trainers, by name."""
    folder = tmp_path_factory.mktemp("whole")
    for name, run in RUNS.items():
        run(folder / name, **FLAGS, **TEACHER[name])
    return folder


# ---- one process ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "step", "workers"), [("opsd", 1, 0), ("opsd", 3, 1), ("opsd", 4, 0), ("sft", 3, 0)]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    whole, tmp_path, monkeypatch, trainer, step, workers
):
    sampled = []
    sample = opsd.sample
    monkeypatch.setattr(opsd, "sample", lambda *a: sampled.append(a[4]) or sample(*a))
    stop_after(whole / trainer, step, tmp_path)
    flags = {**FLAGS, **TEACHER[trainer], "num_workers": workers}
    lines = RUNS[trainer](tmp_path, **flags, resume="latest")
    assert lines == metric_lines(whole / trainer)
    assert [line["step"] for line in lines] == [2, 4, 5]
    for done in range(step + 1, STEPS + 1):
        assert same(states_of(tmp_path, done), states_of(whole / trainer, done))
        assert same(weights_of(tmp_path, done), weights_of(whole / trainer, done))
        one, two = (folder_of(run, done) / "state" for run in (tmp_path, whole / trainer))
        assert (one / "trainer.json").read_text() == (two / "trainer.json").read_text()
    assert sampled == (list(range(step, STEPS)) if trainer == "opsd" else [])


def test_saving_does_not_change_a_run(whole, tmp_path):
    lines = run_opsd(tmp_path, **{**FLAGS, **TEACHER["opsd"], "save_every": 99})
    assert lines == metric_lines(whole / "opsd")
    assert same(states_of(tmp_path, STEPS), states_of(whole / "opsd", STEPS))


def test_the_state_is_float32_and_complete(whole):
    parts = {"opsd": {"student", "ema", "optimizer"}, "sft": {"student", "optimizer"}}
    for trainer, expected in parts.items():
        tensors = states_of(whole / trainer, 3)
        assert {name.split()[0] for name in tensors} == expected
        assert {value.dtype for value in tensors.values()} == {torch.float32}
        student = {name.split()[2] for name in tensors if name.startswith("student")}
        moments = {name.split()[2] for name in tensors if name.startswith("optimizer")}
        kept = {name for name in student if "vit_pos_embed" not in name}
        assert moments == {f"{n}.{m}" for n in kept for m in ("exp_avg", "exp_avg_sq")}
        files = [p for p in (folder_of(whole / trainer, 3) / "state").rglob("*") if p.is_file()]
        assert {file.suffix for file in files} == {".safetensors", ".json"}  # nothing to unpickle


def test_a_fixed_teacher_is_where_the_first_run_began(tmp_path):
    flags = {**FLAGS, "teacher_mode": "fixed", "total_steps": 3, "save_dtype": "bfloat16"}
    lines = run_opsd(tmp_path / "whole", **flags)
    stop_after(tmp_path / "whole", 1, tmp_path / "again")
    assert run_opsd(tmp_path / "again", **flags, resume="latest") == lines
    last = [states_of(tmp_path / name, 3) for name in ("whole", "again")]
    assert same(*last)


def test_a_finished_run_has_nothing_left_to_do(whole, tmp_path):
    shutil.copytree(whole / "sft", tmp_path, dirs_exist_ok=True, symlinks=True)
    before = folder_of(tmp_path, STEPS).stat().st_mtime_ns
    config = sft_config(tmp_path, **FLAGS, resume="auto")
    last = sft.train(claim_folders(config, WORLD), WORLD)
    assert (updates_in(last), last.stat().st_mtime_ns) == (STEPS, before)
    assert metric_lines(tmp_path) == metric_lines(whole / "sft")


def test_without_state_a_folder_is_for_inference_only(tmp_path):
    flags = {**FLAGS, "save_state": False, "save_every": 2, "total_steps": 2}
    run_sft(tmp_path, **flags)
    assert not (folder_of(tmp_path, 2) / "state").exists()
    with pytest.raises(UsageError, match="state/trainer.json is missing: written with --save_st"):
        sft.train(sft_config(tmp_path, **flags, resume=folder_of(tmp_path, 2)), WORLD)


# ---- another run is refused -------------------------------------------------------------------


def refusal(folder: Path, **flags) -> str:
    with pytest.raises(UsageError) as caught:
        run_opsd(folder, **{**FLAGS, **TEACHER["opsd"], "resume": "latest", **flags})
    assert "would become another run" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value", "shown"),
    [
        ("global_batch", 8, "--global_batch is 4 there and 8 here"),
        ("global_seed", 1, "--global_seed is 4396 there and 1 here"),
        ("data_seed", 1, "--data_seed is 42 there and 1 here"),
        ("total_steps", 6, "--total_steps is 5 there and 6 here"),
        ("lr", 1e-3, "--lr is 0.002 there and 0.001 here"),
        ("teacher_mode", "fixed", "--teacher_mode is ema there and fixed here"),
        ("compute_dtype", "bfloat16", "--compute_dtype is float32 there and bfloat16 here"),
    ],
)
def test_a_setting_that_makes_another_run_is_named(whole, tmp_path, flag, value, shown):
    stop_after(whole / "opsd", 2, tmp_path)
    world = dataclasses.replace(
        WORLD, compute_dtype=torch.bfloat16 if flag == "compute_dtype" else torch.float32
    )
    config = opsd_config(tmp_path, **{**FLAGS, **TEACHER["opsd"], "resume": "latest", flag: value})
    with pytest.raises(UsageError, match="would become another run") as caught:
        opsd.train(config, world)
    assert shown in str(caught.value)
    assert str(caught.value).count(" there and ") == 1


def test_other_weights_and_other_data_are_another_run(whole, tmp_path):
    stop_after(whole / "opsd", 2, tmp_path)
    base = tmp_path / "base"
    shutil.copytree(workspace() / "base", base)
    file = base / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # one bit of one weight
    file.write_bytes(data)
    assert "contents of --model_path is" in refusal(tmp_path, model_path=base)
    mixture = tmp_path / "mixture.yaml"
    text = Path(opsd_config(tmp_path).data.dataset_config_file).read_text()
    mixture.write_text(text.replace("weights: [1, 1, 1, 1]", "weights: [1, 2, 1, 1]"))
    message = refusal(tmp_path, dataset_config_file=mixture)
    assert "weights of --dataset_config_file is [1, 1, 1, 1] there and [1, 2, 1, 1]" in message
    mixture.write_text(text + "  num_used_data: [12, 12, 12, 11]\n")
    assert "rows of Chart_Refocus is 12 there and 11" in refusal(
        tmp_path, dataset_config_file=mixture
    )


def test_where_a_run_runs_may_change(whole, tmp_path):
    """Moved weights and data, other batches per forward, other folders: the same run."""
    stop_after(whole / "opsd", 3, tmp_path)
    for name in ("base", "datasets"):
        shutil.copytree(workspace() / name, tmp_path / "moved" / name)
    flags = {
        **{**FLAGS, **TEACHER["opsd"], "micro_batch": 2, "log_every": 1, "save_every": 7},
        **{"model_path": tmp_path / "moved/base", "data_root": tmp_path / "moved/datasets"},
        "activation_checkpointing": True,
    }
    run_opsd(tmp_path, **flags, resume=folder_of(tmp_path, 3))
    assert [line["step"] for line in metric_lines(tmp_path)] == [2, 4, 5]
    after = [weights_of(run, STEPS) for run in (tmp_path, whole / "opsd")]
    assert largest_difference(*after) <= 1e-5


# ---- which folder -----------------------------------------------------------------------------


def resumable(folder: Path, resume: str):
    return find_resumable(sft_config(folder, resume=resume))


def test_latest_is_the_newest_whole_folder_and_says_what_it_ignored(whole, tmp_path, capsys):
    shutil.copytree(whole / "sft", tmp_path, dirs_exist_ok=True, symlinks=True)
    root = tmp_path / "checkpoints"
    (root / "0000011").mkdir()  # foreign
    shutil.copytree(root / "0000005", root / "0000010")  # renamed by hand
    torn = next((root / "0000005" / "state" / "student").iterdir())
    size = torn.stat().st_size
    torn.write_bytes(torn.read_bytes()[:-100])
    (root / "0000004" / "state" / "trainer.json").write_text('{"format": 1, "st')
    (root / "0000003" / "run.json").unlink()
    (root / ".0000012.partial").mkdir()
    start, lines = resumable(tmp_path, "latest")
    assert (start.step, start.folder.name) == (2, "0000002")
    found = {Path(line.split()[1].rstrip(":")).name: line for line in lines}
    assert list(found) == ["0000011", "0000010", "0000005", "0000004", "0000003"]
    assert "no run.json" in found["0000011"]
    assert "its state is that of update 5" in found["0000010"]
    assert f"{torn.name} has {size - 100} of its {size} bytes" in found["0000005"]
    assert "trainer.json is not JSON" in found["0000004"]
    assert "no run.json" in found["0000003"]
    # the ones with a run.json after it are in the way, whatever state they are in
    with pytest.raises(UsageError, match=r"holds 3 checkpoint\(s\) after .*\(0000010 is the last"):
        claim_folders(sft_config(tmp_path, resume="latest"), WORLD)
    claim_folders(sft_config(tmp_path, resume="latest", overwrite=True), WORLD)
    out = capsys.readouterr().out
    assert all(line in out for line in lines)
    assert f"ignored {root / '.0000012.partial'}: half-written" in out
    left = sorted(path.name for path in root.iterdir())
    assert left == ["0000001", "0000002", "0000003", "0000011", "latest"]
    assert os.readlink(root / "latest") == "0000002"


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(UsageError, match="latest: nothing to resume from in .*checkpoints.*auto"):
        claim_folders(sft_config(tmp_path, resume="latest"), WORLD)
    config = claim_folders(sft_config(tmp_path, resume="auto"), WORLD)
    assert config.run.resume is None
    with pytest.raises(UsageError, match=f"--resume {tmp_path / 'none'} is no folder"):
        claim_folders(sft_config(tmp_path, resume=tmp_path / "none"), WORLD)
    foreign = tmp_path / "checkpoints" / "0000003"
    foreign.mkdir(parents=True)
    with pytest.raises(UsageError, match="nothing to resume.*0000003: no run.json.*without"):
        claim_folders(sft_config(tmp_path, resume="latest"), WORLD)
    with pytest.raises(UsageError, match=r"holds 1 checkpoint\(s\) of an earlier run"):
        claim_folders(sft_config(tmp_path, resume="auto"), WORLD)


def test_going_back_needs_permission_to_give_the_later_ones_up(whole, tmp_path):
    shutil.copytree(whole / "sft", tmp_path, dirs_exist_ok=True, symlinks=True)
    root = tmp_path / "checkpoints"
    (root / "best").symlink_to("0000004")
    flags = {**FLAGS, "resume": root / "0000003"}
    with pytest.raises(UsageError, match=r"2 checkpoint\(s\) after .*0000005 is the last, 0000003"):
        claim_folders(sft_config(tmp_path, **flags), WORLD)
    config = claim_folders(sft_config(tmp_path, **flags, overwrite=True), WORLD)
    left = ["0000001", "0000002", "0000003", "latest"]
    assert sorted(path.name for path in root.iterdir()) == left
    assert os.readlink(root / "latest") == "0000003"
    sft.train(config, WORLD)
    assert same(states_of(tmp_path, STEPS), states_of(whole / "sft", STEPS))
    elsewhere = sft_config(tmp_path / "other", **flags)  # another run's folder, a new home
    assert claim_folders(elsewhere, WORLD).run.resume == str((root / "0000003").resolve())


def test_a_changed_file_is_found_when_it_is_read(whole, tmp_path):
    stop_after(whole / "sft", 2, tmp_path)
    file = next((folder_of(tmp_path, 2) / "state" / "optimizer").iterdir())
    data = bytearray(file.read_bytes())
    data[8:40] = b"\0" * 32  # the header, sizes untouched
    file.write_bytes(data)
    with pytest.raises(UsageError, match="state/optimizer cannot be read"):
        run_sft(tmp_path, **FLAGS, resume="latest")


# ---- masters ------------------------------------------------------------------------------------

NARROW = {"compute_dtype": "bfloat16"}
ALONE = dataclasses.replace(WORLD, compute_dtype=torch.bfloat16)


def run_narrow(folder: Path, **flags) -> list[dict[str, float]]:
    opsd.train(opsd_config(folder, **{**FLAGS, **TEACHER["opsd"], **NARROW, **flags}), ALONE)
    return metric_lines(folder)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """An uninterrupted run on bfloat16 weights with masters."""
    folder = tmp_path_factory.mktemp("narrow")
    run_narrow(folder)
    return folder


@pytest.mark.parametrize("moments", ["resident", "host"])
def test_a_run_with_masters_resumes_bit_for_bit(narrow, tmp_path, moments):
    stop_after(narrow, 3, tmp_path)
    lines = run_narrow(tmp_path, resume="latest", adam_moments=moments)
    assert lines == metric_lines(narrow)
    for done in range(4, STEPS + 1):
        assert same(states_of(tmp_path, done), states_of(narrow, done))
        assert same(weights_of(tmp_path, done), weights_of(narrow, done))
    assert {value.dtype for value in states_of(narrow, 3).values()} == {torch.float32}
    student = {k: v for k, v in states_of(narrow, 3).items() if k.startswith("student")}
    assert any(not torch.equal(v, v.bfloat16().float()) for v in student.values())


def joined(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The state of a run by name, whatever files its parts are in."""
    whole: dict[str, torch.Tensor] = {}
    for name, value in states_of(run, step).items():
        part, _, key = name.split()
        whole[f"{part} {key}"] = value
    return whole


def resave(rank: int, port: int, space: str, folder: str, num_shard: int) -> None:
    """Two processes take over the state of `narrow`, say what they hold, and save it as theirs."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    flags = {**FLAGS, **TEACHER["opsd"], **NARROW, "num_shard": num_shard}
    flags |= {"model_path": f"{space}/base", "data_root": f"{space}/datasets"}
    config = opsd_config(Path(folder), **flags, resume=Path(folder) / "alone")
    with distributed(config.model, num_shard, config.run.global_batch) as world:
        writer, student, teacher, optimizer = opened(config, world)
        assert writer.resume(student, teacher.module, optimizer).step == 3
        for name, module in (("model", student), ("ema", teacher.module)):
            state = full_state(module, world)
            if world.is_main:
                save_file(state, Path(folder) / f"{name}.safetensors")
        writer.save(3, student, teacher.module, optimizer)


def opened(config, world):
    """Student, teacher, optimizer and writer of a distillation run, as train/opsd.py opens them."""
    mixture = opsd.open_mixture(config)
    model = opsd.open_model(config, world)
    student = opsd.wrap(model, world)
    other = opsd.open_model(config, world, announce=False)
    teacher = EMATeacher(opsd.wrap(other, world, trained=False), config.distill.ema_decay)
    optimizer = opsd.open_optimizer(student, config)
    processor = opsd.open_processor(config, mixture)
    writer = opsd.open_writer(config, model.config, processor, mixture, world)
    return writer, student, teacher, optimizer


@pytest.mark.dist
@pytest.mark.parametrize("num_shard", [2, 1], ids=["fsdp", "ddp"])
def test_masters_become_float32_shards_and_masters_again(narrow, tmp_path, num_shard):
    """No value changes on the way from one process to two and back; then the run goes on."""
    shutil.copytree(folder_of(narrow, 3), tmp_path / "alone")
    arguments = (*free_ports(1), str(workspace()), str(tmp_path), num_shard)
    mp.spawn(resave, arguments, nprocs=2)
    held = states_of(narrow, 3)
    for part, name in (("student", "model"), ("ema", "ema")):
        gathered = load_file(tmp_path / f"{name}.safetensors")
        before = {k.split()[2].removeprefix("module."): v for k, v in held.items() if part in k}
        assert gathered.keys() == {k for k in before if "pos_embed" not in k}
        assert all(torch.equal(value, before[key]) for key, value in gathered.items())
    lines = run_narrow(tmp_path / "back", resume=folder_of(tmp_path, 3))
    assert lines[-1] == metric_lines(narrow)[-1]  # the means before it began in the first run
    assert same(joined(tmp_path / "back", STEPS), joined(narrow, STEPS))


# ---- several processes ------------------------------------------------------------------------

# AdamW steps that do not magnify rounding
LINEAR = {"eps": 0.1, "lr": 0.02, "min_lr": 0.0, "micro_batch": 1}
SPREAD = {**FLAGS, **TEACHER["opsd"], **LINEAR}
JOBS = (  # processes, and their runs: name, num_shard, run and update to resume from
    (2, [("two", 2, None, 0), ("two again", 2, "two", 3), ("one, two", 1, "one", 3)]),
    (4, [("two, four", 2, "two", 3)]),
    (2, [("two, four, two", 1, "two, four", 4)]),
)
RESHARDED = {"one, two": 3, "two, one": 3, "two, four": 3, "two, four, two": 4, "one, two, one": 4}


def work(rank: int, turn: int, ports: list[int], space: str, folder: str) -> None:
    size, jobs = JOBS[turn]
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    for port, (name, num_shard, start, step) in zip(ports, jobs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        flags = {"model_path": f"{space}/base", "data_root": f"{space}/datasets"}
        if start:
            flags["resume"] = folder_of(Path(folder) / start, step)
        config = opsd_config(Path(folder) / name, **SPREAD, **flags, num_shard=num_shard)
        with distributed(config.model, num_shard, config.run.global_batch) as world:
            opsd.train(config, world)


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Runs of one, two and four processes, some of them resumed from one another."""
    folder = tmp_path_factory.mktemp("spread")
    run_opsd(folder / "one", **SPREAD)
    # one process imports torch, the others are forked from it
    mp.get_context("forkserver").set_forkserver_preload([__name__])
    for turn, (size, jobs) in enumerate(JOBS):
        arguments = (turn, free_ports(len(jobs)), str(workspace()), str(folder))
        processes = mp.start_processes(
            work, arguments, nprocs=size, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + PATIENCE
        while not processes.join(timeout=1):
            if time.monotonic() > deadline:
                for process in processes.processes:
                    process.kill()
                pytest.fail(f"{size} processes were still waiting after {PATIENCE} s")
    for name, step in (("two", 3), ("one, two", 4)):
        run_opsd(folder / f"{name}, one", **SPREAD, resume=folder_of(folder / name, step))
    return folder


@pytest.mark.dist
def test_two_processes_resume_bit_for_bit(spread):
    assert metric_lines(spread / "two again") == metric_lines(spread / "two")[1:]
    states = [states_of(spread / name, STEPS) for name in ("two", "two again")]
    assert {name.split()[1] for name in states[0]} == {"shard-00001", "shard-00002"}
    assert same(*states)


@pytest.mark.dist
@pytest.mark.parametrize("name", RESHARDED)
def test_resharding_goes_on_with_the_same_run(spread, name):
    """One, two and four processes, FSDP and DDP, in the order of the name."""
    one = [line for line in metric_lines(spread / "one") if line["step"] > RESHARDED[name]]
    lines = metric_lines(spread / name)
    assert [line["step"] for line in lines] == list(range(RESHARDED[name] + 1, STEPS + 1))
    for expected, line in zip(one, lines, strict=True):  # the first spans both numbers of processes
        assert line.keys() == expected.keys()
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    start = weights_of(spread / "one", 3)
    for weights in ("model", "ema"):
        ends = [weights_of(spread / run, STEPS, weights) for run in ("one", name)]
        assert largest_difference(*ends) <= 1e-6
    assert largest_difference(start, weights_of(spread / name, STEPS)) > 1e-3
