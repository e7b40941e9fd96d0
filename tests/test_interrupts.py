"""Signals end a run with all its work saved; a rank that fails takes the others along, at once."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.training import (
    WORLD,
    metric_lines,
    opsd_argv,
    run_opsd,
    run_sft,
    sft_argv,
    weights_of,
)
from train import opsd, parallel, session, sft
from train.config import ModelArguments
from train.interrupts import EXIT_STOPPED, StopSignal, stop_signal
from train.parallel import LostRankError, distributed

ROOT = Path(__file__).parents[1]
WITHIN = 60  # seconds from the failure to the end of all processes
STEPS = 5
FLAGS = {"total_steps": STEPS, "log_every": 2, "save_every": 99, "lr": 2e-3}


# ---- one process ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_after_the_update_and_resume_ends_the_same_run(
    tmp_path, monkeypatch, capsys, number
):
    whole = run_sft(tmp_path / "whole", **FLAGS)
    done, step = [], sft.check_finite

    def signalled(at, **values):
        done.append(at)
        if len(done) == 3:
            os.kill(os.getpid(), number)
        step(at, **values)

    monkeypatch.setattr(sft, "check_finite", signalled)
    folder = tmp_path / "stopped"
    monkeypatch.setattr(sys, "argv", ["sft", *sft_argv(folder, **FLAGS, resume="auto")])
    with pytest.raises(SystemExit) as exit_:
        sft.main()
    assert exit_.value.code == EXIT_STOPPED == 75
    assert os.readlink(folder / "checkpoints" / "latest") == "0000003"
    assert "stopped by a signal after 3 of 5 updates" in capsys.readouterr().err
    assert [line["step"] for line in metric_lines(folder)] == [2]
    assert signal.getsignal(number) is signal.SIG_DFL

    sft.main()  # the same command line
    assert done == [0, 1, 2, 3, 4]
    assert metric_lines(folder) == whole
    first, second = (weights_of(tmp_path / name, STEPS) for name in ("whole", "stopped"))
    assert all(first[key].equal(second[key]) for key in first)


def test_a_signal_in_the_last_update_is_no_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sft, "check_finite", lambda at, **_: at == 1 and os.kill(os.getpid(), signal.SIGTERM)
    )
    monkeypatch.setattr(sys, "argv", ["sft", *sft_argv(tmp_path, total_steps=2)])
    sft.main()  # no SystemExit
    assert os.readlink(tmp_path / "checkpoints" / "latest") == "0000002"


def test_a_signal_to_the_workers_too_does_not_lose_their_rows(tmp_path, monkeypatch):
    """A cluster signals every process of a job."""
    whole = run_opsd(tmp_path / "whole", **FLAGS, num_workers=1)

    def everyone(rows, *rest, prepare=opsd.prepare):
        if rest[2] == 1:  # the step
            workers = [str(child.pid) for child in multiprocessing.active_children()]
            assert len(workers) == 1
            subprocess.run(["kill", "-TERM", *workers, str(os.getpid())], check=True)
        return prepare(rows, *rest)

    monkeypatch.setattr(opsd, "prepare", everyone)
    lines = run_opsd(tmp_path / "stopped", **FLAGS, num_workers=1)
    monkeypatch.undo()
    assert lines == whole[:1]
    assert os.readlink(tmp_path / "stopped" / "checkpoints" / "latest") == "0000002"
    assert run_opsd(tmp_path / "stopped", **FLAGS, num_workers=1, resume="latest") == whole


def test_the_signal_of_any_rank_counts_for_all():
    class Two:
        def __init__(self, others):
            self.others = others

        def sum(self, value):
            return value + self.others

    for mine in (False, True):
        for others in (0.0, 1.0):
            asked = StopSignal(Two(others))
            if mine:
                asked.handle(signal.SIGTERM, None)
            assert asked.agreed() == (mine or others > 0)


def test_handlers_are_put_back(monkeypatch):
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with pytest.raises(KeyError), stop_signal(WORLD) as asked:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert asked.agreed()
            raise KeyError
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_rank_that_misses_another_waits_before_it_speaks(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(parallel.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "0")
    arguments = ModelArguments(device="cpu")
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    for error in (RuntimeError(gloo), dist.DistBackendError("NCCL error: remote\nprocess exited")):
        refused = pytest.raises(LostRankError, match="another process has ended.*--resume latest")
        with refused, distributed(arguments, 1, 1):
            raise error
    assert waited == [parallel.HEAD_START] * 2
    with pytest.raises(RuntimeError, match="^shapes differ$"), distributed(arguments, 1, 1):
        raise RuntimeError("shapes differ")
    assert len(waited) == 2
    with pytest.raises(SystemExit), session.exit_on_user_error():
        raise LostRankError("another process has ended")
    assert capsys.readouterr().err == "error: another process has ended\n"


# ---- two processes under torchrun -------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """A run of two processes that came to an end."""

    folder: Path
    status: int  # of torchrun
    after: str  # what was said after the interruption
    seconds: float  # from the interruption to the end of the last process


HOW = {  # how a rank is interrupted: which rank, num_shard
    "user": (1, 2),
    "bug": (0, 1),
    "kill": (1, 2),
    "stop": (1, 2),
}


def start(folder: Path, how: str) -> subprocess.Popen:
    folder.mkdir()
    rank, num_shard = HOW[how]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    launcher += ["--local_addr", "127.0.0.1", "-m", "tests.interrupted", how, str(rank)]
    argv = opsd_argv(folder, **FLAGS, micro_batch=1, num_shard=num_shard)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (folder / "stderr").open("w") as stderr:
        return subprocess.Popen([*launcher, *argv], cwd=ROOT, env=env, stderr=stderr)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
    """Runs of two processes under torchrun, side by side, each interrupted in another way."""
    root = tmp_path_factory.mktemp("torchrun")
    running = {how: start(root / how, how) for how in HOW}
    struck, ended = {}, {}
    deadline = time.monotonic() + 240
    while running:
        time.sleep(0.1)
        for how, process in list(running.items()):
            now, text = time.monotonic(), (root / how / "stderr").read_text()
            if "struck\n" in text:
                struck.setdefault(how, now)
            if process.poll() is not None:
                del running[how]
                assert how in struck, text
                said = (root / how / "stderr").read_text().partition("struck\n")[2]
                seconds = now - struck[how]
                ended[how] = Outcome(root / how, process.returncode, said, seconds)
            elif now > min(deadline, struck.get(how, now) + WITHIN):
                for other in running.values():
                    other.kill()
                pytest.fail(f"{how}: still running: {text}")
    return ended


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("user", "[rank 1] error: row 3 is odd: mend it"),
        ("bug", "RuntimeError: a bug of one rank"),
        ("kill", "(exitcode: -9) local_rank: 1"),
    ],
)
def test_a_rank_that_fails_takes_the_others_along_and_is_named_first(outcomes, how, said):
    outcome, rank = outcomes[how], HOW[how][0]
    assert outcome.status == 1
    assert outcome.seconds < WITHIN
    assert said in outcome.after
    before, _, rest = outcome.after.partition(said)
    assert "Connection" not in before and f"[rank{1 - rank}]" not in before
    assert "another process has ended" not in outcome.after  # torchrun was faster than HEAD_START
    cause = rest.partition("Root Cause (first observed failure)")[2]
    assert f"rank      : {rank} (local_rank: {rank})" in cause
    assert not (outcome.folder / "checkpoints").exists()


@pytest.mark.dist
def test_a_signal_to_one_rank_stops_all_of_them_with_one_checkpoint(outcomes):
    outcome = outcomes["stop"]
    assert outcome.status == 1  # torchrun's own; that of the workers is in its report
    assert f"exitcode  : {EXIT_STOPPED}" in outcome.after
    assert "stopped by a signal after 3 of 5 updates: go on with --resume latest" in outcome.after
    checkpoints = outcome.folder / "checkpoints"
    assert os.readlink(checkpoints / "latest") == "0000003"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["0000003", "latest"]
    # and one process can take over from the two
    lines = run_opsd(outcome.folder, **FLAGS, micro_batch=1, resume="latest")
    assert [line["step"] for line in lines] == [2, 4, 5]
