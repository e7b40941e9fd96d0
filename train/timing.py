"""Seconds of a training step before it is run: floors (`train.cost`) over the share of the floor
that is reached, measured where benchmarks/results/ has the GPU suite's results of such hardware,
else assumed. And what becomes of a step on more GPUs. Counted is the usual completion.
"""

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling.sequence import Split
from train import cost
from train.config import UsageError
from train.cost import FP32, Machine, Work
from train.memory import NODE, Setup, peak, sequence
from train.records import REPOSITORY
from train.wire import Collective, wire_bytes

RESULTS = REPOSITORY / "benchmarks" / "results"
LARGEST = 512  # GPUs of the scaling table

# Share of the floor that is reached: what good kernels are known to (60 to 65, 70 to 75 %).
ASSUMED = {"gemm": 0.62, "bandwidth": 0.72, "wire": 1.0}
# Of the calibrated CPU floor: the miniature's step took 0.27 s where 0.124 s were counted, one run.
CPU_REACHED = 0.46

SIGMA = 0.5  # of the logarithm of completion lengths
DRAWS = 400  # of the simulation of the slowest rank
# Operations that a decoder layer, and an encoder layer, launch (counted on the CPU, eager).
LAYER_LAUNCHES, BACKWARD_LAUNCHES, DECODE_LAUNCHES, UPDATE_LAUNCHES = 49, 92, 51, 14
COPY, WIRE = "rollout copy", "communication that does not hide"


@dataclass(frozen=True)
class Timed:
    """One stage of a step on a rank, and where the share of its floor is from."""

    floor: float  # seconds
    share: float
    origin: str

    @property
    def seconds(self) -> float:
        return self.floor / self.share


# ---- the share of the floor ---------------------------------------------------------------------


def measured(machine: Machine, folder: Path = RESULTS) -> dict[str, tuple[float, str]]:
    """Gate of the GPU suite -> share of the floor and where it was measured, newest first.

    Raises:
        UsageError: a file that is not what `benchmarks.run --output` writes.
    """
    found: dict[str, tuple[str, float, str]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text())
            if content["suite"] != "gpu" or content.get("scale", "full") != "full":
                continue
            hardware, created, commit = (content[key] for key in ("hardware", "created", "commit"))
            gates = [(gate["id"], gate["floor_percent"]) for gate in content["gates"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{file} is not a result of benchmarks.run ({error!r}): remove it or measure again"
            ) from error
        if machine.name.split("-")[0].lower() not in hardware.get("gpu", "").lower():
            continue
        for gate, percent in gates:
            if percent and created >= found.get(gate, ("",))[0]:
                found[gate] = created, percent / 100, f"measured {created[:10]} at {commit[:8]}"
    return {gate: (share, origin) for gate, (_, share, origin) in found.items()}


def gates(s: Setup) -> dict[str, str]:
    """Stage -> gate of the GPU suite that tells its share of the floor."""
    decode = "G1" if s.rows < 8 else "G2" if s.rows < 24 else "G3"
    return {"decode": decode, "student": "G7-rate", "teacher": "G9-rate", "loss": "G6"}


def assumed(machine: Machine, bound: str) -> tuple[float, str]:
    return (CPU_REACHED, "calibrated") if machine.name == "cpu" else (ASSUMED[bound], "assumed")


# ---- what a rank does ---------------------------------------------------------------------------


@functools.cache
def slowest(ranks: int, rows: int, mean: float, most: float) -> float:
    """Expected greatest, over ranks, of the summed lengths of `rows` completions, over its mean.

    Lengths are lognormal with SIGMA and the given mean, capped at `most`.
    """
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(DRAWS, ranks, rows, generator=generator)
    lengths = (mean * torch.exp(SIGMA * normal - SIGMA**2 / 2)).clamp(max=most).sum(-1)
    return float(lengths.max(-1).values.mean() / lengths.mean())


def stage_work(s: Setup) -> dict[str, Work]:
    """What one rank does in a step."""
    c, item, layers = s.config, s.itemsize, s.config.llm.num_hidden_layers
    everywhere = layers + c.vit_layers_used
    work = _sampling(s) if s.mode in ("full", "inference") else {}
    if s.mode == "inference":
        return work
    # ranks meet in every micro step: what counts is the longest of them
    case = s.case
    if s.mode == "full":
        wait = slowest(s.world, s.micro_rows, case.completion, s.longest.completion)
        case = case.with_completion(case.completion * wait)
    recompute = "full" if s.activation_checkpointing else "none"
    learn = _interleaved(s) if s.mode == "interleaved" else cost.student(c, case, recompute)
    launches = everywhere * s.micro_steps
    work["student"] = Work(
        learn.flops * s.rows,
        learn.bytes * s.micro_steps,
        (LAYER_LAUNCHES + BACKWARD_LAUNCHES) * launches,
    )
    if s.mode == "full":
        look = cost.teacher(c, case, item)
        work["teacher"] = Work(
            look.flops * s.rows, look.bytes * s.micro_steps, LAYER_LAUNCHES * launches
        )
    work["loss"] = cost.loss_head(c, case.rows, itemsize=item) * s.rows
    tensors = Work(launches=UPDATE_LAUNCHES * everywhere)
    work["optimizer"] = cost.adamw(s.trained / s.split) + tensors
    if s.mode == "full" and s.teacher_mode == "ema":
        work["ema"] = cost.ema(s.trained / s.split) + tensors
    return work


def _sampling(s: Setup) -> dict[str, Work]:
    c, item, case, most = s.config, s.itemsize, s.case, s.longest.completion
    prompt = cost.vision(c, [case.image], item) + cost.prefill(c, case, item)
    layers = c.llm.num_hidden_layers
    launches = LAYER_LAUNCHES * (layers + c.vit_layers_used)
    weights = cost.parameters(c).und * item  # read once, not per row
    # the step waits for the longest completion of all ranks; rows that end leave the batch
    steps = min(most, case.completion * slowest(s.global_batch, 1, case.completion, most))
    alive = s.rows * case.completion / steps
    token = cost.decode_step(c, alive, cost.length(case.prompt()) + steps / 2, item)
    return {
        "prefill": Work(prompt.flops * s.rows, weights, launches),
        "decode": (token + Work(launches=DECODE_LAUNCHES * layers)) * steps,
    }


def _interleaved(s: Setup) -> Work:
    """One interleaved row: patches are full blocks, latents take the other expert."""
    tokens, _, _ = sequence(dataclasses.replace(s, micro_batch=1))
    flops = cost.decoder_flops(s.config, tokens, cost.visible_pairs([Split(tokens, "causal")]))
    seen = cost.vision_flops(s.config, [s.case.image, *[s.case.vt] * s.case.vts])
    again = flops.recomputed() if s.activation_checkpointing else 0
    done = flops.forward + flops.backward + seen.forward + seen.backward + again
    return Work(done, (3 * s.itemsize + FP32) * s.trained)


def wire(s: Setup) -> list[Collective]:
    """What goes over the wire in a step."""
    return wire_bytes(
        s.config,
        (s.replicas, s.shard),
        s.micro_steps,
        s.itemsize,
        distils=s.mode == "full",
        scope="all" if s.mode == "interleaved" else "und",
    )


def wire_seconds(s: Setup, collectives: Iterable[Collective]) -> float:
    """At link speed; between nodes at that of the network."""
    seconds = 0.0
    for c in collectives:
        # a shard group beyond a node is as slow as the network
        far = s.world > NODE and (c.between_replicas or s.shard > NODE)
        seconds += c.received / (s.inter_node if far else s.machine.link)
    return seconds


def stages(s: Setup, folder: Path = RESULTS) -> dict[str, Timed]:
    """Each stage of a step, on one rank."""
    known, gate = measured(s.machine, folder), gates(s)
    timed = {}
    for name, work in stage_work(s).items():
        reached = known.get(gate.get(name)) or assumed(s.machine, work.bound(s.machine))
        timed[name] = Timed(work.seconds(s.machine), *reached)
    wired = assumed(s.machine, "wire")
    if s.adam_moments == "host" and s.mode != "inference":
        # both directions at the same time
        timed["moments"] = Timed(2 * FP32 * s.trained / s.machine.host_link, *wired)
    collectives = wire(s)
    copy = [c for c in collectives if c.place == "rollout copy"]
    if copy:
        timed[COPY] = Timed(wire_seconds(s, copy), *wired)
    if collectives:
        # prefetched behind the forward and backward passes that need it
        hidden = sum(timed[name].seconds for name in ("student", "teacher") if name in timed)
        rest = wire_seconds(s, (c for c in collectives if c not in copy))
        timed[WIRE] = Timed(max(0.0, rest - hidden * wired[0]), *wired)
    return timed


def step_seconds(s: Setup) -> float:
    return sum(stage.seconds for stage in stages(s).values())


# ---- scaling on paper ---------------------------------------------------------------------------


def scaling(s: Setup) -> Iterator[dict[str, Any]]:
    """Rows of a table: powers of two up to LARGEST, sharded within a node, so with moments on the
    device from two on. Where the global batch has no row for every rank, it is raised to one each.
    """
    for world in (2**n for n in range(LARGEST.bit_length())):
        at = dataclasses.replace(
            s,
            world=world,
            num_shard=0,
            global_batch=s.global_batch if s.global_batch % world == 0 else world,
            adam_moments=s.adam_moments if world == 1 else "resident",
        )
        collectives, timed = wire(at), stages(at)
        step = sum(stage.seconds for stage in timed.values())
        apart = sum(timed[name].seconds for name in (COPY, WIRE) if name in timed)
        yield {
            "gpus": world,
            "mesh": (at.replicas, at.shard),
            "global_batch": at.global_batch,
            "memory": peak(at)[1],  # bytes
            "received": sum(c.received for c in collectives),  # bytes per rank and step
            "decode": timed["decode"].seconds if "decode" in timed else 0.0,  # of compute
            "compute": step - apart,
            "wire": wire_seconds(at, collectives) / assumed(at.machine, "wire")[0],
            "step": step,
            "rate": at.global_batch / step / world,  # samples per second and GPU
            # the longest completion over the mean one
            "longest": slowest(at.global_batch, 1, s.case.completion, at.longest.completion),
        }


# ---- this machine -------------------------------------------------------------------------------


def calibrate() -> Machine:
    """What this CPU does in float32: a product, a copy, and how long a tiny operation takes."""
    a, flat = torch.randn(768, 768), torch.zeros(2**24)
    other, small = torch.empty_like(flat), torch.zeros(64)
    product = _fastest(lambda: torch.mm(a, a))
    bandwidth = 2 * flat.nbytes / _fastest(lambda: other.copy_(flat))
    tiny = _fastest(lambda: [small.add(1.0) for _ in range(500)]) / 500
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rate = 2 * 768**3 / product
    return Machine("cpu", memory, rate, bandwidth, bandwidth, launch=tiny)


def _fastest(call: Callable[[], object], seconds: float = 0.3) -> float:
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
