"""The gates of the GPU suite, G1 to G20: one accelerator, the 7B at full size, random weights.

    python -m benchmarks.run --suite gpu                      # all parts, each below nine minutes
    python -m benchmarks.run --suite gpu --only decode,loss   # some of them
    python -m benchmarks.run --suite gpu --scale tiny --device cpu      # the same code, small

A part builds its models, compares the product with `benchmarks.plain` on the same weights in turn
(bfloat16), and gives seconds, ratios, and the share of the floor that `train.cost` counts. The
plain whole step does not fit one GPU (weights, gradients and optimizer of both experts): it is
timed stage by stage, without AdamW on all weights, and added up.
"""

from collections.abc import Callable

from benchmarks.full_size import Settings
from benchmarks.gates import Gate
from benchmarks.gpu_decoding import decode_part, sampling_part
from benchmarks.gpu_drawing import drawing_part
from benchmarks.gpu_scoring import loss_part, scoring_part
from benchmarks.gpu_step import step_part

PARTS: dict[str, Callable[[Settings], list[Gate]]] = {
    "decode": decode_part,
    "sampling": sampling_part,
    "loss": loss_part,
    "scoring": scoring_part,
    "step": step_part,
    "drawing": drawing_part,
}
