"""Signals that ask a run to stop, and what becomes of the others when one process fails.

SIGTERM and SIGUSR1 let the update that is running come to its end on every rank; the run then saves
and leaves with exit status 75, "try again" (EX_TEMPFAIL of sysexits.h). It is enough that the
signal reaches one rank.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from train.parallel import World

EXIT_STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Whether somebody wants this run to stop."""

    def __init__(self, world: World) -> None:
        self.world, self.received = world, False

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed(self) -> bool:
        """The same answer on every rank: whether any of them was signalled. Collective.

        Without it a rank would go to save while another waits in the all-reduce of the next update.
        """
        return self.world.sum(float(self.received)) > 0


@contextmanager
def stop_signal(world: World) -> Iterator[StopSignal]:
    """Take SIGTERM and SIGUSR1 as a wish to stop until the end of the block."""
    asked = StopSignal(world)
    before = {number: signal.signal(number, asked.handle) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
