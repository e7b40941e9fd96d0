"""A distillation run in which one rank is interrupted: started by tests/test_interrupts.py.

    torchrun --nproc_per_node 2 -m tests.interrupted HOW RANK [--flag value ...]

In its third update rank RANK raises a user error ("user") or any other ("bug"), is killed ("kill"),
or gets SIGTERM ("stop") and goes on.
"""

import os
import signal
import sys

import torch

from train import opsd
from train.config import UsageError

STEP = 2


def strike(how: str) -> None:
    print("struck", file=sys.stderr, flush=True)
    if how == "user":
        raise UsageError("row 3 is odd: mend it")
    if how == "bug":
        raise RuntimeError("a bug of one rank")
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)


def main() -> None:
    torch.set_num_threads(1)
    how, rank = sys.argv.pop(1), int(sys.argv.pop(1))
    scored, distillation, sample = [], opsd.distillation, opsd.sample

    def noted(*args):
        scored.append([])  # of this update; the launch gates are part of the first one
        return sample(*args)

    def interrupted(*args):
        """Between two micro batches: the others wait in the collectives of the second one."""
        scored[-1].append(None)
        if len(scored) == STEP + 1 and len(scored[-1]) == 2 and rank == int(os.environ["RANK"]):
            strike(how)
        return distillation(*args)

    opsd.distillation, opsd.sample = interrupted, noted
    opsd.main()


if __name__ == "__main__":
    main()
