"""The gates of the CPU suite, C1 to C15: what has to hold on a machine without a GPU.

Each function measures the product's public entry points against `benchmarks.plain` in the same run,
checks that both give the same result, and returns its gates. What is counted (C4, C9, C10, C12 to
C15) is the same on every machine, and most of it is a test as well; what is timed is a ratio.
"""

from collections.abc import Callable

from benchmarks.decoding import c1, c2, c3, c4, c10
from benchmarks.gates import Gate, Settings
from benchmarks.loss import c5, c6, c7
from benchmarks.masks import c8, c9
from benchmarks.processes import c13
from benchmarks.reading import c14, c15
from benchmarks.step import c11, c12

GATES: dict[str, Callable[[Settings], list[Gate]]] = {
    function.__name__.upper(): function
    for function in (c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15)
}
