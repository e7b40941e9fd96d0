"""The counted cost model: against the modules, torch's own FLOP counter, a table made by hand, and
the collectives that processes really run.
"""

import dataclasses
import json
import os
import socket
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost as tables
from modeling.attention import split_mask
from modeling.bagel import Bagel, text_logits
from modeling.config import BagelConfig
from modeling.pretrained import is_generation_key
from modeling.sequence import Split, Text, pack
from tests.golden_checks.names import FULL_SIZE
from tests.tiny_model import TINY_CONFIG, TOKENS, random_image
from train import cost, wire
from train.cost import CASES, MACHINES
from train.parallel import RolloutCopy, World, wrap
from train.teacher import EMATeacher

MINI = Path(__file__).parents[1] / "models" / "mini-base"
H200, H800 = MACHINES["H200"], MACHINES["H800"]


# ---- parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY_CONFIG, FULL_SIZE, BagelConfig.from_pretrained(MINI)])
def test_parameters_are_those_of_the_module(config):
    with torch.device("meta"):
        model = Bagel(config, visual_gen=True)
    found = Counter()
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if is_generation_key(name):
            part = "gen" if "moe_gen" in name else "latent_heads"
        elif part == "language_model":
            part = "head" if "lm_head" in name else "embedding" if "embed" in name else "und"
        found[{"vit_model": "vit"}.get(part, part)] += parameter.numel()
    found["tables"] = model.vit_pos_embed.pos_embed.numel()
    counted = cost.parameters(config)
    assert dataclasses.asdict(counted) == dict(found)
    assert counted.everything == sum(p.numel() for p in model.parameters())


def test_full_size_needs_no_download():
    assert cost.KNOWN_CONFIGS["ThinkMorph-7B"] == FULL_SIZE == cost.FULL_SIZE
    assert cost.kv_bytes_per_token(FULL_SIZE) == 57_344


# ---- FLOPs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "modes", [["full"], ["causal", "full", "causal"], ["full", "noise", "full"]]
)
def test_visible_pairs_are_those_of_the_mask(modes):
    splits = [Split(3 + i, mode) for i, mode in enumerate(modes)]
    assert cost.visible_pairs(splits) == int(split_mask(splits).sum())


def counted_by_torch(checkpointing):
    """Products and attention of forward and backward of a tiny model, and of the cost model."""
    model = Bagel(TINY_CONFIG, generation_expert=False)
    model.set_activation_checkpointing(checkpointing)
    samples = [
        [random_image(2, 3), Text((1, 2, 3)), Text((4, 5, 6), loss=True)],
        [random_image(2, 3, seed=1), Text((1, 2, 3)), Text((7, 8, 9), loss=True)],
    ]
    batch = pack(samples, TOKENS)
    model.attention_backend = "sdpa"
    found = []
    # kernels of other backends are not known to the counter on the CPU; this one is two products
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(batch, head=text_logits).sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    for counter in (forward, backward):
        parts = Counter()
        for name, flops in counter.get_flop_counts()["Global"].items():
            parts["attention" if "bmm" in str(name) else "products"] += flops
        found.append(parts)
    rows = len(batch.loss_rows)
    ours = cost.forward_flops(TINY_CONFIG, batch.samples, [6, 6], rows, wanted=rows)
    return found, ours, batch


def test_flops_are_those_that_torch_counts():
    (forward, backward), ours, batch = counted_by_torch(checkpointing=False)
    assert forward["products"] == ours.products
    assert backward["products"] == 2 * ours.products - ours.patches
    # This kernel computes the square and masks it; the encoder sees 2 images of 6 patches.
    llm, vit = TINY_CONFIG.llm, TINY_CONFIG.vit
    width = llm.num_attention_heads * llm.head_dim
    square = 4 * llm.num_hidden_layers * width * sum(batch.sample_lens) * max(batch.sample_lens)
    encoder = 4 * TINY_CONFIG.vit_layers_used * vit.hidden_size * 2 * 6**2
    assert ours.vision_attention == encoder
    assert forward["attention"] == square + encoder
    assert ours.attention < square


def test_recomputation_spares_the_last_product_of_a_layer():
    (_, plain), ours, _ = counted_by_torch(checkpointing=False)
    (_, again), _, _ = counted_by_torch(checkpointing=True)
    assert again["products"] - plain["products"] == ours.recomputed() - ours.attention
    assert ours.recomputed(early_stop=False) - ours.recomputed() == ours.last


# ---- a table made by hand ---------------------------------------------------------------------

MAP = {  # stage: TF of S, M, L; then ms on H200 and on H800
    "ViT, student image": ((1.3, 2.8, 6.9), (1.6, 3.6, 8.8), (1.9, 4.3, 10.5)),
    "prefill": ((20, 38, 77), (26, 48, 97), (31, 58, 116)),
    "decode, B=1": (None, (847, 1331, 1344), (1257, 1973, 1992)),
    "decode, B=8": (None, (111, 180, 193), (164, 267, 286)),
    "decode, B=16": (None, (58, 98, 110), (86, 145, 164)),
    "decode, B=32": (None, (32, 57, 69), (47, 84, 103)),
    "student, full recompute": ((101, 188, 364), (128, 238, 461), (153, 284, 552)),
    "student, no recompute": ((76, 141, 274), (96, 179, 347), (115, 214, 416)),
    "teacher, ViT of all images": ((46, 89, 182), (58, 112, 231), (70, 134, 276)),
    "head + JSD, full vocabulary": ((1.1, 1.7, 1.7), (1.4, 2.2, 2.2), (1.7, 2.6, 2.6)),
}


@pytest.mark.parametrize("stage", MAP)
def test_the_map_is_reproduced(stage):
    """Within 2 % beyond rounding: recomputation there includes the encoder, which this
    project does not checkpoint.
    """
    flops, *times = MAP[stage]
    works = [tables.sample_stages(case)[stage] for case in CASES.values()]
    if flops:
        assert [w.flops / 1e12 for w in works] == pytest.approx(flops, rel=0.02, abs=0.06)
    for machine, expected in zip((H200, H800), times, strict=True):
        found = [1e3 * w.seconds(machine) for w in works]
        assert found == pytest.approx(expected, rel=0.02, abs=0.06)


def test_the_map_of_a_step_is_reproduced():
    p = cost.parameters(FULL_SIZE)
    for work, on_h200, on_h800 in (
        (cost.adamw(p.everything), 95, 141),
        (cost.adamw(p.understanding), 52, 78),
        (cost.ema(p.understanding), 22, 33),
    ):
        assert 1e3 * work.seconds(H200) == pytest.approx(on_h200, abs=0.6)
        assert 1e3 * work.seconds(H800) == pytest.approx(on_h800, abs=0.6)
    for count, expected in ((p.everything, 154), (p.understanding, 85)):
        assert 1e3 * wire.gather_sweep(count, 8) / H800.link == pytest.approx(expected, abs=0.7)
    context = cost.length(CASES["M"].prompt()) + 200
    steps = {1: 3.33, 8: 3.60, 16: 3.91, 32: 4.53, 64: 5.77}
    for batch, expected in steps.items():
        found = 1e3 * cost.decode_step(FULL_SIZE, batch, context).seconds(H200)
        assert found == pytest.approx(expected, abs=0.01)


def test_teacher_grows_with_its_images_as_in_the_map():
    cases = [dataclasses.replace(CASES["M"], vts=n) for n in range(4)]
    found = [cost.teacher(FULL_SIZE, case).flops / 1e12 for case in cases]
    assert found == pytest.approx([47.5, 88.7, 132, 179], rel=0.02)


def test_table_of_floors():
    text = "\n".join(tables.lines([H200]))
    assert "26/48/97" in text and "847/1331/1344" in text


# ---- over the wire ----------------------------------------------------------------------------

MICRO_STEPS = 2


class Collectives(TorchDispatchMode):
    """Calls and payload, as `wire.Collective` means it, of each kind."""

    def __init__(self):
        super().__init__()
        self.calls, self.payload = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kinds = {
            "allgather_": ("all_gather", 0),
            "_reduce_scatter_base_": ("reduce_scatter", 1),
            "allreduce_": ("all_reduce", 0),
        }
        name = func._schema.name
        if name.startswith("c10d::"):
            kind, place = kinds[name.removeprefix("c10d::")]
            whole = torch.utils._pytree.tree_leaves(args[place])
            self.calls[kind] += 1
            self.payload[kind] += sum(t.numel() * t.itemsize for t in whole)
        return func(*args, **(kwargs or {}))


def count(places, name, call):
    with Collectives() as counter:
        result = call()
    for kind, calls in counter.calls.items():
        before = places.get(f"{name}/{kind}", [0, 0])
        places[f"{name}/{kind}"] = [before[0] + calls, before[1] + counter.payload[kind]]
    return result


def one_step(world):
    """Collectives of an optimizer step without its scalars, by place and kind."""

    def network():
        torch.manual_seed(0)
        model = Bagel(TINY_CONFIG, generation_expert=False)
        model.set_activation_checkpointing(True)
        return model

    student, teacher = wrap(network(), world), EMATeacher(wrap(network(), world))
    actor = RolloutCopy(TINY_CONFIG, world)
    batch = pack([[random_image(2, 3), Text((1, 2, 3)), Text((4, 5), loss=True)]], TOKENS)
    places = {}
    student(batch, head=text_logits).float().sum().backward()  # DDP agrees on buckets after it
    student.zero_grad()
    student(batch, head=text_logits).float().sum().backward()
    count(places, "rollout copy", lambda: actor.refresh(student))
    for _ in range(MICRO_STEPS):
        with torch.no_grad():
            count(places, "teacher forward", lambda: teacher.module(batch, head=text_logits))
        out = count(places, "student forward", lambda: student(batch, head=text_logits))
        count(places, "backward", out.float().sum().backward)
    return places


def work(rank, size, meshes, folder):
    torch.set_num_threads(1)
    for port, shard, dtype in meshes:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        dist.init_process_group("gloo")
        world = World(rank, size, shard, torch.device("cpu"), getattr(torch, dtype))
        places = one_step(world)
        if rank == 0:
            (Path(folder) / f"{size}-{shard}-{dtype}.json").write_text(json.dumps(places))
        dist.barrier()
        dist.destroy_process_group()


def expected_places(mesh, itemsize):
    found = {}
    for c in wire.wire_bytes(TINY_CONFIG, mesh, MICRO_STEPS, itemsize):
        place = "backward" if c.place in ("gradients", "student backward") else c.place
        found[f"{place}/{c.kind}"] = [c.calls, c.payload]
    return found


@pytest.mark.dist
@pytest.mark.parametrize(
    ("size", "runs"),
    [
        (2, [(2, "float32"), (2, "bfloat16"), (1, "float32")]),
        pytest.param(4, [(2, "float32")], marks=pytest.mark.slow),
    ],
)
def test_collectives_are_those_that_processes_run(size, runs, tmp_path):
    """To the call and the byte. Recomputation is on: it gathers nothing again."""
    meshes = []
    for shard, dtype in runs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meshes.append((free.getsockname()[1], shard, dtype))
    processes = mp.spawn(work, (size, meshes, str(tmp_path)), nprocs=size, join=False)
    deadline = time.monotonic() + 120
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("the processes were still waiting for each other after 120 s")
    for shard, dtype in runs:
        places = json.loads((tmp_path / f"{size}-{shard}-{dtype}.json").read_text())
        itemsize = getattr(torch, dtype).itemsize
        assert places == expected_places((size // shard, shard), itemsize)


def test_bytes_that_a_rank_receives():
    gather, scatter, reduce = (
        wire.Collective("", kind, 1, 800, ranks)
        for kind, ranks in (("all_gather", 8), ("reduce_scatter", 8), ("all_reduce", 4))
    )
    assert (gather.received, scatter.received, reduce.received) == (700, 700, 1200)
    assert wire.wire_bytes(TINY_CONFIG, (1, 1), 3) == []
    whole = wire.wire_bytes(FULL_SIZE, (2, 8), 1)
    by_place = {(c.place, c.kind): c for c in whole}
    values = cost.parameters(FULL_SIZE).understanding
    assert by_place["student forward", "all_gather"].payload == 2 * values  # nothing to pad
    assert by_place["gradients", "all_reduce"].payload == 4 * values // 8


def test_padding_of_units():
    """5 and 3 values, aligned to 4, then to 6 ranks: 5 + 3 (padding) + 3, then 12."""
    assert wire._flat([5, 3], align=4, num_shard=6) == 12
