"""Metric logging: exact global means, files that survive a resume, optional dashboards."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.training import WORLD, sft_config
from train import metrics
from train.metrics import MetricLogger
from train.session import open_metrics


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_means_run_over_elements_since_the_last_report(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricLogger(path, total_steps=5, log_every=2, progress=False) as logger:
        logger.observe(loss=torch.tensor([1.0, 2.0]), length=torch.tensor(7))
        assert logger.log(1) is None
        logger.observe(loss=torch.tensor([6.0]), empty=torch.zeros(0))
        logger.observe(skips=1.0)
        assert logger.log(2, lr=0.5) == {
            "step": 2,
            "loss": 3.0,
            "length": 7.0,
            "skips": 1.0,
            "lr": 0.5,
        }
        assert len(lines(path)) == 1  # flushed, readable while the run goes on
        logger.observe(loss=5.0)
        logger.log(3)
        logger.log(4)
        logger.observe(loss=-1.0)
        logger.log(5)  # the last step is always reported
    assert [line["step"] for line in lines(path)] == [2, 4, 5]
    assert [line["loss"] for line in lines(path)] == [3.0, 5.0, -1.0]


def test_observed_values_carry_no_graph():
    x = torch.ones(3, requires_grad=True)
    with MetricLogger(None, total_steps=1, progress=False) as logger:
        logger.observe(loss=(x * 2).sum())
        assert logger.log(1)["loss"] == 6.0
    assert x.grad is None


def test_unequal_ranks_weigh_by_their_counts():
    other = {"loss": (30.0, 3), "only_there": (4.0, 2)}
    logger = MetricLogger(None, total_steps=1, progress=False, gather=lambda mine: [mine, other])
    logger.observe(loss=torch.tensor([2.0]), only_here=1.0)
    assert logger.log(1) == {"step": 1, "loss": 8.0, "only_here": 1.0, "only_there": 2.0}


def test_only_rank_zero_writes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = MetricLogger(path, total_steps=1, rank=1, progress=False)
    logger.observe(loss=2.0)
    assert logger.log(1) == {"step": 1, "loss": 2.0}
    assert not path.exists()


def test_resume_drops_the_lines_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = "".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in (1, 2, 3))
    path.write_text(rows + '{"step": 4, "lo')  # killed while writing
    with MetricLogger(path, total_steps=4, start_step=2, progress=False) as logger:
        logger.observe(loss=9.0)
        logger.log(3)
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_non_finite_values_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricLogger(path, total_steps=1, progress=False) as logger:
        logger.observe(loss=float("nan"), kept=1.5)
        assert math.isnan(logger.log(1)["loss"])
    assert lines(path) == [{"step": 1, "loss": None, "kept": 1.5}]


def test_progress_bar_follows_the_steps(capsys):
    with MetricLogger(None, total_steps=4, start_step=2) as logger:
        logger.observe(loss=0.125)
        logger.log(3)
        logger.log(4)
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "loss=0.125" in shown


@pytest.mark.parametrize(
    ("package", "wanted"),
    [("tensorboard", {"tensorboard_dir": "runs"}), ("wandb", {"wandb_project": "opsd"})],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_dashboard_is_an_error_on_every_rank(monkeypatch, package, wanted, rank):
    monkeypatch.setitem(sys.modules, package, None)
    (flag,) = wanted
    with pytest.raises(ModuleNotFoundError, match=f"^--{flag} needs .*pip install {package}"):
        MetricLogger(None, total_steps=1, rank=rank, progress=False, **wanted)


def test_wandb_receives_the_reported_values(monkeypatch):
    calls = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = SimpleNamespace(init=lambda project, config: calls.append((project, config)) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = {"wandb_project": "opsd", "config": {"lr": 1}, "progress": False}
    with MetricLogger(None, total_steps=2, log_every=2, **options) as logger:
        for step in (1, 2):
            logger.observe(loss=step)
            logger.log(step)
    assert calls == [("opsd", {"lr": 1}), (2, {"loss": 1.5}), "end"]


def test_wandb_is_told_the_whole_configuration(monkeypatch, tmp_path):
    told = []
    run = SimpleNamespace(finish=lambda: None)
    fake = SimpleNamespace(init=lambda project, config: told.append((project, config)) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = sft_config(tmp_path, wandb_project="opsd", lr=0.25)
    open_metrics(config, WORLD).close()
    assert told == [("opsd", dataclasses.asdict(config))]
    assert told[0][1]["optim"]["lr"] == 0.25


def test_speed_counts_the_time_from_the_request_for_rows_to_the_report(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

    def loader():
        for _ in range(4):
            now[0] += 1.0  # waiting for rows counts
            yield "rows"

    lines = []
    with MetricLogger(None, total_steps=4, log_every=2, progress=False) as logger:
        for step, _ in enumerate(logger.timed(loader()), 1):
            now[0] += 2.0
            logger.count_tokens(30 if step <= 2 else 60)
            lines.append(logger.log(step))
            now[0] += 50.0  # validation and checkpoints
    assert [line and line["tokens_per_second"] for line in lines] == [None, 10.0, None, 20.0]


def test_speed_has_the_tokens_of_all_ranks_and_the_clock_of_one():
    other = {"tokens_per_second": (300.0, 0.0), "peak_memory_mib": (7e6, 1)}
    both = []
    logger = MetricLogger(
        None,
        total_steps=1,
        progress=False,
        device=torch.device("cpu"),
        gather=lambda mine: both.append(mine) or [mine, other],
    )
    for _ in logger.timed([None]):
        logger.count_tokens(100)
        line = logger.log(1)
    seconds = both[0]["tokens_per_second"][1]
    assert seconds > 0
    assert line["tokens_per_second"] == pytest.approx(400 / seconds)
    assert line["peak_memory_mib"] == 7e6  # the largest, no mean


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_peak_memory_is_that_of_the_process_in_mib():
    block = torch.ones(2**28, dtype=torch.uint8)  # 256 MiB
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert block.nbytes / 2**20 < resident <= metrics.peak_memory(torch.device("cpu")) + 1 < 1e5


def test_a_validation_is_a_line_of_its_own_and_comes_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricLogger(path, total_steps=2, log_every=2, progress=False) as logger:
        logger.observe(loss=1.0)
        logger.validated(1, {"accuracy": 0.5, "gap_closed": None})
        logger.observe(loss=2.0)
        logger.log(2)
        logger.validated(2, {"accuracy": 1.0})
        MetricLogger(None, total_steps=2, rank=1, progress=False).validated(1, {"x": 1.0})
    written = [
        {"step": 1, "val/accuracy": 0.5, "val/gap_closed": None},
        {"step": 2, "loss": 1.5},
        {"step": 2, "val/accuracy": 1.0},
    ]
    assert lines(path) == written
    MetricLogger(path, total_steps=2, start_step=2, progress=False).close()
    assert lines(path) == written[:2]
    MetricLogger(path, total_steps=2, start_step=1, progress=False).close()
    assert lines(path) == []


def test_a_line_is_said_above_the_bar(capsys):
    with MetricLogger(None, total_steps=4) as logger:
        logger.log(1)
        metrics.say("half of it")
        logger.log(2)
    shown = capsys.readouterr()
    assert shown.out == "half of it\n"
    assert "2/4" in shown.err


def test_reports_says_when_log_does():
    with MetricLogger(None, total_steps=5, log_every=2, progress=False) as logger:
        for step in range(1, 6):
            assert logger.reports(step) == (logger.log(step) is not None) == (step in (2, 4, 5))


def test_log_every_must_be_positive():
    with pytest.raises(ValueError, match="log_every=0 must be at least 1"):
        MetricLogger(None, total_steps=1, log_every=0)


def rank_run(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    path = f"{folder}/metrics.jsonl"
    with MetricLogger(path, total_steps=1, rank=rank, progress=False) as logger:
        logger.observe(loss=torch.arange(1.0, 4.0) if rank else torch.tensor([10.0]))
        if rank:
            logger.observe(skipped=1.0)  # a name that only one rank has
        assert logger.log(1) == {"step": 1, "loss": 4.0, "skipped": 1.0}
    dist.barrier()  # no rank leaves while another still communicates
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_agree_on_the_global_mean(tmp_path):
    mp.spawn(rank_run, args=(str(tmp_path),), nprocs=2)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 4.0, "skipped": 1.0}]
