"""What a gate of the suites is: a number, its bounds, and checks that it means something."""

import functools
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    repeats: int = 5


@dataclass(frozen=True)
class Check:
    """That two implementations agree: a difference, and what it may be."""

    what: str
    difference: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.limit


@dataclass(frozen=True)
class Gate:
    """One number of the suite and its bounds."""

    id: str
    what: str
    value: float
    unit: str
    must: float | None  # None: reported, not aimed at
    stretch: float | None
    checks: tuple[Check, ...] = ()
    spread: str = "-"
    floor_percent: float | None = None  # of what this machine could do at best
    at_least: bool = True  # else at most
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        return all(check.holds for check in self.checks)

    def _reaches(self, bound: float | None) -> bool:
        if bound is None:
            return True
        return self.value >= bound if self.at_least else self.value <= bound

    @property
    def passes(self) -> bool:
        return self.agrees and self._reaches(self.must)

    @property
    def stretches(self) -> bool:
        return self.agrees and self.must is not None and self._reaches(self.stretch)


at_least = functools.partial(Gate, at_least=True)
at_most = functools.partial(Gate, at_least=False)
