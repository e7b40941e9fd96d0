"""One run for every number of processes: two and four under gloo, sharded (FSDP HYBRID_SHARD) and
replicated (DDP), against one.
"""

import dataclasses
import hashlib
import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DistributedDataParallel as DDP

from data.contexts import student_context
from modeling.bagel import text_logits
from modeling.pretrained import is_generation_key, load_pretrained
from modeling.sequence import Latent, Text, pack
from tests.training import (
    PROBES,
    WORLD,
    base_processor,
    drawing_base,
    draws,
    largest_difference,
    metric_lines,
    opsd_config,
    run_sft,
    sft_config,
    weights_of,
    workspace,
)
from train import opsd, sft
from train.checkpoint import CheckpointWriter
from train.config import ModelArguments, UsageError
from train.parallel import RolloutCopy, World, distributed, full_params, full_state, wrap
from train.records import read_records
from train.rollout import prepare, sample
from train.session import base_weights, exit_on_user_error
from train.teacher import EMATeacher

MESHES = {"fsdp": (2, 2), "ddp": (2, 1), "hybrid": (4, 2)}  # processes, num_shard
PAIRS = ("fsdp", "ddp")  # which also run everything else that is compared here
STEPS, SFT_STEPS, PART = 10, 2, 3
PATIENCE = 300  # seconds; more than ten times what the processes need
# A teacher that moves, one trajectory per forward: four processes do in one what one does in four.
FLAGS = {"total_steps": STEPS, "micro_batch": 1, "ema_decay": 0.5, "ce_weight": 0.1}
FLAGS |= {"validate_every": STEPS // 2, "validation_samples": PROBES}
# AdamW steps that do not magnify rounding (eps far above the gradients), at a rate that moves the
# weights ten thousand times further than they may differ.
LINEAR = {"eps": 0.1, "lr": 0.1, "schedule": "constant"}
TOLERANCE, MOVED = 5e-6, 5e-2


def some_rows(rows, processor, sampling, step, *rest):
    """`prepare` without the second half of the rows in steps 0 and 1, and without row 0 in step 2.

    So half of the processes have nothing when the launch gates are asked.
    """
    rows = [(row, drawn) for row, drawn in rows if not (step <= 1 and row >= 2)]
    rows = [(row, drawn) for row, drawn in rows if not (step == 2 and row == 0)]
    return prepare(rows, processor, sampling, step, *rest)


def checksum(module) -> str:
    """Of all parameters, gathered. Collective."""
    digest = hashlib.sha256()
    for name, value in full_params(module):
        digest.update(name.encode() + value.detach().clone().numpy().tobytes())
    return digest.hexdigest()


def recorded_opsd(config, world) -> dict[str, dict]:
    """Run; what this process sampled, by step and row, and checksums of what it saved, by step."""
    rollouts, sums, save = {}, {}, CheckpointWriter.save

    def spy(model, prompts, processor, params, step, seed, workspace):
        trajectories = sample(model, prompts, processor, params, step, seed, workspace)
        for t in trajectories:
            rollouts[f"{step}/{t.prompt.row}"] = [list(r.token_ids) for r in t.rollout.rounds]
        return trajectories

    def summed(writer, step, student, ema, *rest):
        sums[step] = [checksum(student), checksum(ema)]
        return save(writer, step, student, ema, *rest)

    with (
        mock.patch.object(opsd, "prepare", some_rows),
        mock.patch.object(opsd, "sample", spy),
        mock.patch.object(CheckpointWriter, "save", summed),
    ):
        opsd.train(config, world)
    return {"rollouts": rollouts, "checksums": sums}


# ---- what each of the four processes does -----------------------------------------------------


def work(process: int, ports: list[int], space: str, folder: str) -> None:
    """Two meshes of two processes side by side, then one of four."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    for port, (name, (size, num_shard)) in zip(ports, MESHES.items(), strict=True):
        if size == 4 or PAIRS.index(name) == process // 2:
            rank = process % size
            os.environ |= {"RANK": str(rank), "MASTER_PORT": str(port)}
            os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
            run_mesh(name, rank, size, num_shard, space, Path(folder) / name)


def run_mesh(name: str, rank: int, size: int, num_shard: int, space: str, where: Path) -> None:
    paths = {"model_path": f"{space}/base", "data_root": f"{space}/datasets"}
    # 0 shards over the processes of the node
    paths["num_shard"] = 0 if name == "fsdp" else num_shard
    config = opsd_config(where / "opsd", **FLAGS, **LINEAR, **paths, save_every=PART)
    with distributed(config.model, config.run.num_shard, config.run.global_batch) as world:
        assert (world.rank, world.size, world.num_shard) == (rank, size, num_shard)
        assert world.sum(rank + 1.5) == {2: 4.0, 4: 12.0}[size]
        (where / f"record{rank}.json").write_text(json.dumps(recorded_opsd(config, world)))
        if name not in PAIRS:
            return
        sft.train(sft_config(where / "sft", total_steps=SFT_STEPS, **LINEAR, **paths), world)
        (where / f"parts{rank}.json").write_text(json.dumps(parts(config, world)))
        part = {**FLAGS, **LINEAR, **paths, "total_steps": PART, "validate_every": 0}
        recorded_opsd(opsd_config(where / "ungated", **part, launch_gates=False), world)
        recorded_opsd(opsd_config(where / "again", **part, activation_checkpointing=True), world)


@torch.no_grad()
def parts(config, world) -> dict:
    """Differences of the wrapped modules from plain ones, after changes of the weights."""
    base = config.model.model_path
    processor = base_processor()
    batch = pack(
        [
            [*student_context(drawn.example, processor), Text((5, 6, 7), loss=True)]
            for _, drawn in draws(config)
        ],
        processor.tokenizer.special,
    )

    def plain(by: float):
        model = load_pretrained(base)
        for parameter in model.parameters():
            parameter.add_(by)
        return model

    def distance(module, reference) -> float:
        difference = module(batch, head=text_logits) - reference(batch, head=text_logits)
        return float(difference.abs().max())

    student, teacher = wrap(plain(0), world), EMATeacher(wrap(plain(0), world), 0.5)
    actor = RolloutCopy(plain(0).config, world)
    pointers = [p.data_ptr() for p in actor.model.parameters()]
    local = sum(p.numel() for p in student.parameters())
    report = {
        "kind": [isinstance(student, FSDP), isinstance(student, DDP)],
        "share": local / sum(p.numel() for p in plain(0).parameters()),
        "start": [distance(student, plain(0)), distance(teacher.module, plain(0))],
    }
    for turn in (1, 2):
        for parameter in student.parameters():
            parameter.add_(0.02)
        teacher.update(student)  # base + 0.01, then base + 0.025
        report[f"student {turn}"] = distance(student, plain(0.02 * turn))
        report[f"teacher {turn}"] = distance(teacher.module, plain((0.01, 0.025)[turn - 1]))
        report[f"stale {turn}"] = distance(teacher.module, plain(0))
        actor.refresh(student)
        report[f"actor {turn}"] = distance(actor.model, plain(0.02 * turn))
        copied = dict(actor.model.named_parameters())
        gathered = {name: value.clone() for name, value in full_params(student)}
        assert gathered.keys() == copied.keys()
        assert all(torch.equal(value, copied[name]) for name, value in gathered.items())
        assert [p.data_ptr() for p in actor.model.parameters()] == pointers
    assert not any(p.requires_grad for p in actor.model.parameters())
    state = full_state(student, world)
    assert set(state) == (set(copied) if world.is_main else set())
    assert all(torch.equal(value, copied[name]) for name, value in state.items())
    half = wrap(plain(0), dataclasses.replace(world, compute_dtype=torch.bfloat16))
    report["bfloat16"] = distance(half, plain(0))
    return report


# ---- comparison with one process --------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the runs by mesh, of one process (`one`), and of one forward per step (`whole`)."""
    folder = tmp_path_factory.mktemp("parallel")
    for name in MESHES:
        (folder / name).mkdir()
    arguments = (free_ports(len(MESHES)), str(workspace()), str(folder))
    processes = mp.spawn(work, arguments, nprocs=4, join=False)
    deadline = time.monotonic() + PATIENCE
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"the processes were still waiting for each other after {PATIENCE} s")
    for name, flags in {"one": FLAGS, "whole": {**FLAGS, "micro_batch": 4}}.items():
        config = opsd_config(folder / name / "opsd", **flags, **LINEAR, save_every=PART)
        (folder / name / "record0.json").write_text(json.dumps(recorded_opsd(config, WORLD)))
    run_sft(folder / "one" / "sft", total_steps=SFT_STEPS, **LINEAR)
    return folder


RUNS = [*((name, "opsd") for name in (*MESHES, "whole")), *((name, "sft") for name in PAIRS)]


def records_of(folder: Path, what: str) -> list[dict]:
    """Of each process."""
    return [json.loads(path.read_text())[what] for path in sorted(folder.glob("record*.json"))]


@pytest.mark.dist
@pytest.mark.parametrize("name", [*MESHES, "whole"])
def test_rollouts_are_those_of_one_process(runs, name):
    (one,) = records_of(runs / "one", "rollouts")
    ranks = records_of(runs / name, "rollouts")
    assert len(ranks) == MESHES.get(name, (1,))[0]
    assert sum(map(len, ranks)) == len(one)  # no row twice
    assert {row: rounds for rank in ranks for row, rounds in rank.items()} == one


@pytest.mark.dist
def test_the_runs_have_what_sets_processes_apart(runs):
    """Ranks without trajectories, ranks of unequal numbers and lengths, image skips, early ends."""
    (one,) = records_of(runs / "one", "rollouts")
    for name, (size, _) in MESHES.items():
        ranks = records_of(runs / name, "rollouts")
        found = [[sum(k.startswith(f"{s}/") for k in rank) for rank in ranks] for s in range(STEPS)]
        for step in (0, 1):
            assert sum(found[step][size // 2 :]) == 0 < min(found[step][: size // 2])
        assert found[2][0] < max(found[2])
    lengths = [sum(map(len, rounds)) for rounds in one.values()]
    assert len(set(lengths)) > 5
    assert {len(rounds) for rounds in one.values()} == {1, 2}
    assert len({str(rounds) for rounds in one.values()}) > STEPS


@pytest.mark.dist
@pytest.mark.parametrize(("name", "trainer"), RUNS)
def test_metrics_are_those_of_one_process(runs, name, trainer):
    one, other = metric_lines(runs / "one" / trainer), metric_lines(runs / name / trainer)
    assert len(one) == len(other) == (STEPS if trainer == "opsd" else SFT_STEPS)
    for expected, line in zip(one, other, strict=True):
        assert line.keys() == expected.keys()
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.dist
@pytest.mark.parametrize(("name", "trainer"), RUNS)
def test_weights_are_those_of_one_process(runs, name, trainer):
    step = STEPS if trainer == "opsd" else SFT_STEPS
    for file in ("model", "ema") if trainer == "opsd" else ("model",):
        one = weights_of(runs / "one" / trainer, step, file)
        other = weights_of(runs / name / trainer, step, file)
        assert largest_difference(one, other) <= TOLERANCE
        assert largest_difference(one, weights_of(workspace() / "base")) > MOVED


@pytest.mark.dist
@pytest.mark.parametrize("name", [*MESHES, "whole"])
def test_validations_are_those_of_one_process(runs, name):
    """Probe rows are split over the processes: 12 over 4, 2 and 1."""
    one, other = (
        read_records(runs / run / "opsd" / "results" / "validation.jsonl") for run in ("one", name)
    )
    assert [record["step"] for record in one] == [step for step in (0, 5, 10) for _ in range(5)]
    for expected, record in zip(one, other, strict=True):
        assert (record["step"], record["task"]) == (expected["step"], expected["task"])
        assert record["values"].keys() == expected["values"].keys()
        for key, value in expected["values"].items():
            close = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)
            assert record["values"][key] == close, key
    gaps = {record["step"]: record["values"]["k_gen"] for record in one if record["step"]}
    assert abs(gaps[5] - gaps[10]) > 1e-3


@pytest.mark.dist
@pytest.mark.parametrize("name", MESHES)
def test_all_processes_have_the_same_weights_bit_for_bit(runs, name):
    first, *others = records_of(runs / name, "checksums")
    assert list(first) == ["3", "6", "9", "10"]
    assert all(other == first for other in others)
    assert len({value for pair in first.values() for value in pair}) == 2 * len(first)


@pytest.mark.dist
@pytest.mark.parametrize("name", PAIRS)
def test_launch_gates_leave_no_trace_on_any_mesh(runs, name):
    assert metric_lines(runs / name / "ungated") == metric_lines(runs / name / "opsd")[:PART]
    for file in ("model", "ema"):
        checked, bare = (weights_of(runs / name / run, PART, file) for run in ("opsd", "ungated"))
        assert largest_difference(checked, bare) == 0
    values = read_records(runs / name / "opsd" / "results" / "gates.jsonl")[0]["values"]
    alone = read_records(runs / "one" / "opsd" / "results" / "gates.jsonl")[0]["values"]
    for key in ("loss", "grad_norm", "real_loss", "real_grad_norm", "tokens"):
        assert values[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6), key


@pytest.mark.dist
@pytest.mark.parametrize("name", PAIRS)
def test_activation_checkpointing_changes_nothing_on_any_mesh(runs, name):
    for file in ("model", "ema"):
        kept, again = (weights_of(runs / name / run, PART, file) for run in ("opsd", "again"))
        assert largest_difference(kept, again) <= 1e-6


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("mesh", PAIRS)
def test_wrapped_modules_compute_with_their_current_weights(runs, mesh, rank):
    report = json.loads((runs / mesh / f"parts{rank}.json").read_text())
    assert report["kind"] == ([True, False] if mesh == "fsdp" else [False, True])
    assert report["share"] == pytest.approx(0.5 if mesh == "fsdp" else 1.0, rel=0.02)
    assert max(report["start"]) <= 1e-5
    for turn in (1, 2):
        for name in ("student", "teacher", "actor"):
            assert report[f"{name} {turn}"] <= 2e-5, name
        assert report[f"stale {turn}"] > 1e-2  # an EMA teacher that never changed would be here
    assert 0 < report["bfloat16"] < 0.2


# ---- rows that draw -----------------------------------------------------------------------------

SHARDS = {"fsdp": 2, "ddp": 1}
# Rows of text and rows that draw, half and half.
HALF = """interleaved_reasoning:
  dataset_names: [Ragged, Visual_Search]
  weights: [1, 1]
  contexts: {Visual_Search: {student: 1}}
"""
COMMON = {"visual_gen": True, "noisings": 2, "vit_cond_dropout_prob": 0.0, "global_batch": 4}
COMMON |= {"micro_batch": 2, "total_steps": 3, **LINEAR}
DRAWING = {
    "drawn": {},
    "frozen": {"freeze_und": True, "max_num_tokens": 205},  # forwards of unequal numbers
    "blind": {"vit_cond_dropout_prob": 0.7, "max_num_tokens": 205},  # and without patches
}


def drawing_config(where: Path, run: str, space: Path):
    """In a workspace that may be another process's."""
    paths = {"model_path": space / "drawing", "data_root": space / "datasets"}
    paths["dataset_config_file"] = space / "half.yaml"
    return sft_config(where / run, **{**COMMON, **DRAWING[run], **paths})


def work_on_drawings(rank: int, port: int, space: Path, folder: Path) -> None:
    """Every run on both meshes, the one that has most to go wrong at the end."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with distributed(ModelArguments(device="cpu"), 2, COMMON["global_batch"]) as world:
        for run in DRAWING:
            for name, shards in SHARDS.items():
                here = dataclasses.replace(world, num_shard=shards)
                sft.train(drawing_config(folder / name, run, space), here)
                world.barrier()
                (folder / name / run / f"done{rank}").touch()


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Folder of the runs by mesh, and of one process (`one`); some of them may be missing."""
    folder, space = tmp_path_factory.mktemp("drawings"), drawing_base().parent
    (space / "half.yaml").write_text(HALF)
    processes = mp.spawn(work_on_drawings, (*free_ports(1), space, folder), nprocs=2, join=False)
    for run in DRAWING:
        sft.train(drawing_config(folder / "one", run, space), WORLD)
    deadline = time.monotonic() + PATIENCE / 5
    try:
        while not processes.join(timeout=1) and time.monotonic() < deadline:
            pass
    except mp.ProcessRaisedException as error:
        print(error)
    for process in processes.processes:
        process.kill()
    return folder


@pytest.mark.dist
@pytest.mark.parametrize("run", DRAWING)
@pytest.mark.parametrize("name", SHARDS)
def test_runs_that_draw_are_those_of_one_process(drawings, name, run):
    one, other = drawings / "one" / run, drawings / name / run
    assert sorted(file.name for file in other.glob("done*")) == ["done0", "done1"]
    for expected, line in zip(metric_lines(one), metric_lines(other), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    base, first, second = weights_of(drawing_base()), weights_of(one, 3), weights_of(other, 3)
    assert largest_difference(first, second) <= TOLERANCE
    moved = {
        drawing: max(
            float((first[key] - base[key]).abs().max())
            for key in base
            if is_generation_key(key) is drawing
        )
        for drawing in (True, False)
    }
    assert moved[True] > MOVED / 10 and (moved[False] > MOVED / 10) is not (run == "frozen")


@pytest.mark.dist
def test_the_runs_that_draw_have_what_sets_processes_apart(drawings):
    """Steps in which a rank has no row that draws, or fewer forwards; forwards without patches."""
    space, pictures, forwards, patches = drawing_base().parent, set(), set(), set()
    config = drawing_config(drawings / "one", "blind", space)
    model, mixture = sft.open_trainee(config, WORLD), sft.open_mixture(config)
    processor = sft.open_processor(config, mixture)
    interleaver = sft.open_interleaver(config, model, processor, WORLD)
    for step in range(COMMON["total_steps"]):
        rows = draws(config, step)
        sequences = sft.step_sequences(rows, processor, interleaver, step, config.run.global_seed)
        ranks = [sft.forwards(sequences[i : i + 2], 2, 205) for i in (0, 2)]
        forwards.add(tuple(map(len, ranks)))
        for parts in ranks:
            rank = [segment for part in parts for row in part for segment in row]
            pictures.add(any(isinstance(segment, Latent) for segment in rank))
            patches |= {any(hasattr(s, "patches") for row in part for s in row) for part in parts}
    assert pictures == patches == {True, False}
    assert {a != b for a, b in forwards} == {True, False}, forwards


# ---- one process --------------------------------------------------------------------------------


def test_one_process_is_a_plain_module_and_its_copy_has_the_compute_dtype():
    world = dataclasses.replace(WORLD, compute_dtype=torch.bfloat16)
    student = wrap(load_pretrained(workspace() / "base"), world)
    assert not isinstance(student, (FSDP, DDP))
    actor = RolloutCopy(student.module.config, world)
    pointers = {name: p.data_ptr() for name, p in actor.model.named_parameters()}
    actor.refresh(student)
    for name, parameter in student.module.named_parameters():
        copy = actor.model.get_parameter(name)
        assert parameter.dtype == torch.float32
        assert torch.equal(copy, parameter.detach().bfloat16())
        assert copy.data_ptr() == pointers[name]


def test_refresh_misses_no_parameter():
    student = wrap(load_pretrained(workspace() / "base"), WORLD)
    actor = RolloutCopy(student.module.config, WORLD)
    del student.module.connector.fc2
    with pytest.raises(RuntimeError, match=r"missed 2 parameters: \['connector.fc2.bias'"):
        actor.refresh(student)


@pytest.mark.parametrize(
    ("device", "num_shard", "global_batch", "message"),
    [
        ("cpu", 3, 12, "--num_shard 3 does not divide the 4 processes"),
        ("cpu", 2, 6, "--global_batch 6 is not a multiple of the 4 processes"),
        ("cuda", 2, 8, "--device cuda, but torch sees no GPU"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(monkeypatch, device, num_shard, global_batch, message):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("WORLD_SIZE", "4")
    arguments = ModelArguments(device=device)
    with pytest.raises(UsageError, match=message), distributed(arguments, num_shard, global_batch):
        pass


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    message = "LOCAL_RANK 2, torch sees 2: .*--nproc_per_node 2, NPROC_PER_NODE=2 .*--device cpu"
    for device in ("cuda", "auto"):
        arguments = ModelArguments(device=device)
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(UsageError, match=message), distributed(arguments, 1, 1):
            pass
        monkeypatch.setenv("LOCAL_RANK", "1")
        with distributed(arguments, 1, 1) as world:
            assert world.device == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 1)] * 2
    monkeypatch.setenv("LOCAL_RANK", "2")
    with distributed(ModelArguments(device="cpu"), 1, 1) as world:
        assert world.device == torch.device("cpu")


def test_ranks_wait_for_each_other_longer_than_sampling_takes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ModelArguments(device="cpu")
    with mock.patch("train.parallel.dist") as dist, distributed(arguments, 1, 2):
        pass
    dist.init_process_group.assert_called_once_with("gloo", timeout=timedelta(hours=2))


def test_no_rank_gathers_weights_while_another_writes(tmp_path, monkeypatch):
    """Collectives of the sharding groups have a shorter limit than those over all ranks."""
    events = []

    class Recorded(World):
        def barrier(self) -> None:
            events.append("wait")

    world = Recorded(**{**vars(WORLD), "rank": 1, "size": 2})
    monkeypatch.setattr("train.checkpoint.full_state", lambda *_: events.append("gather") or {})
    config = opsd_config(tmp_path)
    model = load_pretrained(workspace() / "base")
    writer = CheckpointWriter(config, model.config, base_processor(), base_weights(config), world)
    writer.save(1, model, model)
    assert events[:4] == ["gather", "wait", "gather", "wait"]


@pytest.mark.parametrize(("rank", "start"), [(None, "error: "), (0, "error: "), (3, "[rank 3] ")])
def test_every_rank_says_what_stopped_it(monkeypatch, capsys, rank, start):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as exit_, exit_on_user_error():
        raise UsageError("--lr is odd")
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(start)
    assert err.endswith("error: --lr is odd\n")


def test_a_bfloat16_step_stays_close_and_keeps_float32_weights(tmp_path):
    lines = {}
    for dtype in ("float32", "bfloat16"):
        config = opsd_config(
            tmp_path / dtype, total_steps=1, compute_dtype=dtype, sample_temperature=0
        )
        with distributed(config.model, 0, config.run.global_batch) as world:
            opsd.train(config, world)
        (lines[dtype],) = metric_lines(tmp_path / dtype)
    exact, rounded = lines["float32"]["student_entropy"], lines["bfloat16"]["student_entropy"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.1)
    moved = weights_of(tmp_path / "bfloat16", 1)["language_model.lm_head.weight"]
    assert not torch.equal(moved, moved.bfloat16().float())
