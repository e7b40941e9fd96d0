"""The plan of a run: memory by closed form, what fits and which knob is named, measured factors,
errors, and the command line.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import measure
from benchmarks.gates import Gate
from modeling.bagel import Bagel
from modeling.config import BagelConfig
from modeling.generation import SamplingParams, decoding_room
from modeling.sequence import Text, pack
from tests.tiny_model import TINY_CONFIG, TOKENS, random_image
from train import cost, knobs, plan, timing
from train import memory as counted
from train.config import UsageError
from train.cost import CASES, FULL_SIZE, MACHINES
from train.memory import Setup, fits, memory, peak, static_memory, total
from train.moments import BUCKET, SLOTS

ROOT = Path(__file__).parents[1]
MINI = ROOT / "models" / "mini-base"
P = cost.parameters(FULL_SIZE).understanding
TABLE = 4 * cost.parameters(FULL_SIZE).tables
H200, H800 = MACHINES["H200"], MACHINES["H800"]
ONE = Setup(FULL_SIZE, H200)
EIGHT = Setup(FULL_SIZE, H800, world=8)


def changed(setup, **values):
    return dataclasses.replace(setup, **values)


# ---- memory -----------------------------------------------------------------------------------


def test_what_one_gpu_keeps():
    """Bytes per parameter: 2 computed with, 4 master, 4 EMA, and the moments; 4 of gradients while
    it learns, and none while it samples.
    """
    cache = counted.kv_cache(ONE)
    assert total(static_memory(ONE)) == (2 + 4 + 4 + 8) * P + cache + 2 * TABLE
    assert total(memory(ONE)["optimizer"]) == 22 * P + cache + 2 * TABLE
    host = changed(ONE, adam_moments="host")
    assert total(static_memory(host)) == (2 + 4 + 4) * P + cache + 2 * TABLE
    slots = total(memory(host)["optimizer"]) - total(memory(host)["checkpoint"]) - 4 * P
    assert slots == 8 * SLOTS * BUCKET
    assert 8 * P < counted.host_memory(host) == 2 * 2**35  # pinned blocks are powers of two
    self_taught = static_memory(changed(ONE, teacher_mode="self"))
    assert total(self_taught) == (2 + 4 + 8) * P + cache + TABLE
    for stage in ("rollout", "checkpoint"):
        assert not any("gradient" in name for name in memory(ONE)[stage])


def test_what_a_shard_keeps():
    """16 bytes per parameter are divided; the rollout copy is whole on every rank."""
    rest = 2 * P + counted.kv_cache(EIGHT) + 3 * TABLE
    assert total(static_memory(EIGHT)) == 16 * P / 8 + rest
    assert total(memory(EIGHT)["optimizer"]) == 20 * P / 8 + rest
    halves = changed(EIGHT, num_shard=4)
    assert (halves.replicas, halves.strategy) == (2, "fsdp")
    assert total(static_memory(halves)) == 16 * P / 4 + rest


def test_what_ddp_keeps():
    """Everything, buckets of gradients included, and autocast copies."""
    replicated = changed(EIGHT, num_shard=1)
    assert replicated.strategy == "ddp"
    rest = counted.kv_cache(EIGHT) + 3 * TABLE
    assert total(static_memory(replicated)) == (4 + 4 + 4 + 8 + 2) * P + rest
    assert total(memory(replicated)["optimizer"]) == total(static_memory(replicated))
    assert memory(replicated)["student"]["autocast copies"] == 2 * P


def test_other_modes():
    whole = cost.parameters(FULL_SIZE).everything
    assert total(static_memory(changed(ONE, mode="sft"))) == 14 * P + TABLE
    assert total(static_memory(changed(ONE, mode="interleaved"))) == 14 * whole + TABLE
    assert total(static_memory(changed(ONE, mode="inference"))) == 2 * P + TABLE
    assert list(memory(changed(ONE, mode="inference"))) == ["load", "generate"]
    assert "rollout" not in memory(changed(ONE, mode="sft"))


def test_no_byte_for_the_generation_expert_in_distillation():
    assert ONE.trained == P == EIGHT.trained
    assert changed(ONE, mode="interleaved").trained > 1.8 * P


def test_kv_cache():
    """16 rows of 3.5k tokens are 3.2 GB counted by hand; once there, the cache stays."""
    assert counted.kv_cache(changed(ONE, max_new=780)) == pytest.approx(3.2e9, rel=0.03)
    stages = memory(ONE)
    assert "KV cache of rollouts" not in stages.pop("load")
    assert all(items["KV cache of rollouts"] == counted.kv_cache(ONE) for items in stages.values())
    assert decoding_room(None, SamplingParams(100), 100) == 100 + counted.FRAMING


def saved_bytes(llm_layers, vit_layers, dtype):
    """Bytes that autograd keeps for the backward pass, weights left out."""
    llm = dataclasses.replace(TINY_CONFIG.llm, num_hidden_layers=llm_layers)
    vit = dataclasses.replace(TINY_CONFIG.vit, num_hidden_layers=vit_layers + 1)
    config = dataclasses.replace(TINY_CONFIG, llm=llm, vit=vit)
    model = Bagel(config, generation_expert=False).to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive: no address twice
        return tensor

    segments = [random_image(7, 8), Text(tuple(range(30))), Text(tuple(range(40)), loss=True)]
    batch = pack([segments], TOKENS)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch, head=lambda hidden, head: hidden)
    return sum(size for size, _ in kept.values()), len(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_autograd_keeps(dtype):
    """Per decoder layer and token, and per encoder layer and patch; kernels may keep less."""
    (more, tokens), (fewer, _) = (saved_bytes(n, 1, dtype) for n in (4, 2))
    decoder, encoder = counted.activation_bytes(TINY_CONFIG, dtype.itemsize, dense=True)
    assert 0.75 * decoder <= (more - fewer) / 2 / tokens <= 1.02 * decoder
    (more, _), (fewer, _) = (saved_bytes(2, n, dtype) for n in (3, 1))
    assert 0.75 * encoder <= (more - fewer) / 2 / 56 <= 1.02 * encoder


def test_activations_at_full_size():
    """The map has 220 KB per token and layer; float32 copies inside the norms make it 250."""
    assert counted.activation_bytes(FULL_SIZE, 2)[0] == pytest.approx(250e3, rel=0.01)
    checkpointed = changed(ONE, activation_checkpointing=True)
    assert counted.student_activations(checkpointed) < 0.35 * counted.student_activations(ONE)
    assert counted.student_activations(changed(ONE, micro_batch=2)) == pytest.approx(
        2 * counted.student_activations(ONE)
    )


def test_the_longest_completion_is_bounded_by_the_cap():
    assert ONE.longest.completion == 1024
    tight = changed(ONE, max_forward_tokens=6000)
    assert cost.length(tight.longest.teacher()) == 6000
    assert tight.longest.completion < 1024


# ---- what fits --------------------------------------------------------------------------------


def test_eight_80_gb_gpus_train_without_offload():
    assert fits(EIGHT) and peak(EIGHT)[0] in ("student", "loss")
    assert counted.host_memory(EIGHT) == 0


def test_the_largest_image_that_fits():
    largest = knobs.largest_image(EIGHT)
    assert 2500 < largest < knobs.FULL_IMAGE
    sizes = [dataclasses.replace(EIGHT.case, image=largest + more) for more in (0, 50)]
    assert [fits(changed(EIGHT, case=case)) for case in sizes] == [True, False]
    assert knobs.largest_image(changed(EIGHT, activation_checkpointing=True)) == knobs.FULL_IMAGE


def test_one_141_gb_gpu_trains_with_moments_in_host_memory():
    assert not fits(ONE)
    assert not any(fits(knobs.turned(ONE, [flag])) for flag in knobs.knobs(ONE))
    together = ["--activation_checkpointing True", "--adam_moments host"]
    assert knobs.remedy(ONE) == together
    assert fits(knobs.turned(ONE, together))


def test_knobs_that_are_turned_already_are_not_named():
    done = changed(ONE, activation_checkpointing=True, adam_moments="host", teacher_mode="self")
    assert knobs.knobs(done) == {}
    assert "--micro_batch 1" in knobs.knobs(changed(ONE, micro_batch=4))
    assert "--num_shard 8" in knobs.knobs(changed(EIGHT, num_shard=2))
    assert "--adam_moments host" not in knobs.knobs(EIGHT)  # shards of moments stay where they are


def test_each_knob_helps_as_much_as_it_says():
    host, taught = (
        total(memory(knobs.turned(ONE, [flag]))["student"]) - total(memory(ONE)["student"])
        for flag in ("--adam_moments host", "--teacher_mode self")
    )
    assert host == pytest.approx(-8 * P)
    assert taught == pytest.approx(-4 * P - TABLE)


def test_attention_with_a_mask_takes_more():
    sdpa = changed(EIGHT, attention_backend="sdpa")
    scores = 28 * 28 * 2 * cost.length(EIGHT.longest.student()) ** 2
    more = counted.student_activations(sdpa) - counted.student_activations(EIGHT)
    assert scores < more < 1.5 * scores
    assert not fits(sdpa) and knobs.remedy(sdpa) == ["--attention_backend flex"]


def test_too_small_for_any_knob():
    small = Setup(FULL_SIZE, H800)
    assert knobs.knobs(small) and knobs.remedy(small) is None
    needed, flags = knobs.gpus_needed(small)
    assert (needed, flags) == (4, ["--activation_checkpointing True"])
    assert fits(knobs.turned(Setup(FULL_SIZE, H800, world=4), flags))


def test_more_shards_and_a_smaller_micro_batch_are_found():
    shards = changed(EIGHT, num_shard=2, activation_checkpointing=True)
    assert not fits(shards) and knobs.remedy(shards) == ["--num_shard 8"]
    large = changed(EIGHT, micro_batch=2)
    assert not fits(large)
    assert knobs.remedy(large) == ["--micro_batch 1"]


# ---- seconds ----------------------------------------------------------------------------------


def test_seconds_are_floors_over_factors(tmp_path):
    found = timing.stages(ONE, tmp_path)
    assert {t.origin for t in found.values()} == {"assumed"}
    assert found["student"].share == timing.ASSUMED["gemm"]
    assert found["decode"].share == timing.ASSUMED["bandwidth"]
    assert found["student"].seconds == found["student"].floor / found["student"].share
    sheet = MACHINES["A100-80"]  # 312 TF/s are on paper
    assert (sheet.flops, sheet.bandwidth) == (0.8 * 312e12, 0.9 * 2.039e12)


def test_the_step_of_the_map():
    """16 samples M on one H200: floor 7.2 to 9.7 s, 13 to 15 s expected."""
    found = timing.stages(ONE)
    assert 7.2 <= sum(t.floor for t in found.values()) <= 9.7
    assert 12.5 <= sum(t.seconds for t in found.values()) <= 15


def test_straggler_of_the_map():
    """Longest over mean of 16 completions 2.1, of 8 1.84; more rows per rank even out."""
    assert timing.slowest(16, 1, 400, 1024) == pytest.approx(2.1, abs=0.05)
    assert timing.slowest(8, 1, 400, 1024) == pytest.approx(1.84, abs=0.05)
    assert timing.slowest(1, 1, 400, 1024) == pytest.approx(1, abs=1e-6)
    assert timing.slowest(8, 4, 400, 1024) < timing.slowest(8, 2, 400, 1024) < 1.84


def write_result(folder, name, created, percent, gpu="NVIDIA H200", **more):
    gates = [{"id": "G7-rate", "floor_percent": percent}, {"id": "G7", "floor_percent": None}]
    content = {"suite": "gpu", "hardware": {"gpu": gpu}, "created": created, "commit": "abcdef123"}
    (folder / name).write_text(json.dumps(content | {"gates": gates} | more))


def test_measured_shares_take_the_place_of_assumed_ones(tmp_path):
    write_result(tmp_path, "b.json", "2026-01-01T10:00", 40.0)
    write_result(tmp_path, "a.json", "2026-03-01T10:00", 50.0)
    write_result(tmp_path, "c.json", "2026-05-01T10:00", 90.0, scale="tiny")
    write_result(tmp_path, "d.json", "2026-05-01T10:00", 80.0, "NVIDIA A100")
    write_result(tmp_path, "e.json", "2026-05-01T10:00", 70.0, suite="cpu")
    found = timing.stages(ONE, tmp_path)
    student = found["student"]
    assert (student.share, student.origin) == (0.5, "measured 2026-03-01 at abcdef12")
    assert found["teacher"].origin == "assumed"
    assert timing.gates(ONE)["decode"] == "G2" and timing.gates(EIGHT)["decode"] == "G1"


def test_the_gates_are_those_of_the_suite():
    assert {"id", "floor_percent"} <= {field.name for field in dataclasses.fields(Gate)}
    assert {"commit", "created", "hardware"} <= measure.provenance([]).keys()
    source = "".join(file.read_text() for file in (ROOT / "benchmarks").glob("gpu*.py"))
    named = {*timing.gates(ONE).values(), *timing.gates(EIGHT).values()}
    assert {name.removesuffix("-rate") for name in named} <= set(re.findall(r'"(G\d+)"', source))


@pytest.mark.parametrize("content", ["{", "[]", '{"suite": "gpu"}'])
def test_broken_result_files_are_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UsageError, match="a.json is not a result"):
        timing.stages(ONE, tmp_path)


def test_calibration_is_plausible():
    machine = timing.calibrate()
    assert 1e9 < machine.flops < 1e13 and 1e8 < machine.bandwidth < 1e12
    assert 0 < machine.launch < 1e-3 and machine.memory > 1e9


# ---- scaling ----------------------------------------------------------------------------------


def test_scaling_stops_at_the_global_batch():
    rows = {row["gpus"]: row for row in timing.scaling(EIGHT)}
    assert list(rows) == [2**n for n in range(10)]
    raised = [gpus for gpus, row in rows.items() if row["global_batch"] > 16]
    assert raised == [32, 64, 128, 256, 512] == [rows[gpus]["global_batch"] for gpus in raised]
    assert rows[16]["mesh"] == (2, 8)
    assert rows[8]["step"] < rows[1]["step"] < 8 * rows[8]["step"]  # faster, by less than eight
    assert rows[16]["rate"] < rows[8]["rate"]
    assert rows[8]["step"] == pytest.approx(timing.step_seconds(EIGHT))


def test_slow_links_make_it_bound_by_communication():
    rows = {row["gpus"]: row for row in timing.scaling(changed(EIGHT, inter_node=1e8))}
    assert rows[8]["wire"] < rows[8]["compute"] < rows[16]["wire"]
    assert rows[16]["step"] > rows[8]["step"]


# ---- errors and command line ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpus", "lots"], ["--gpus lots", "cpu"]),
        (["--gpus", "0x80"], ["--gpus 0x80"]),
        (["--gpus", "1x24"], ["1x24", "Nx80"]),
        (["--gpus", "8xTPU"], ["TPU", "H200"]),
        (["--gpus", "6x80"], ["--global_batch 16", "6 GPUs", "give 18"]),
        (["--gpus", "32x80"], ["--global_batch 16", "32 GPUs"]),
        (["--gpus", "8x80", "--num_shard", "3"], ["--num_shard 3", "1, 2, 4, 8"]),
        (["--gpus", "8x80", "--adam_moments", "host"], ["--adam_moments host", "resident"]),
        (["--gpus", "cpu", "--attention_backend", "flex"], ["--attention_backend flex", "sdpa"]),
        (["--mode", "inference", "--gpus", "2x80"], ["--mode inference", "one GPU"]),
        (["--mode", "inference", "--scaling"], ["--scaling", "--mode inference"]),
        (["--micro_batch", "0"], ["--micro_batch must be at least 1"]),
        (["--max_forward_tokens", "3000"], ["--max_forward_tokens 3000", "--vt_tokens"]),
        (["--completion_tokens", "2000"], ["2000", "--sample_max_new_tokens"]),
        (["--inter_node_gbs", "0"], ["--inter_node_gbs"]),
        (["--model_path", "nowhere"], ["nowhere", "ThinkMorph-7B"]),
        (["--model_path", str(ROOT / "tests")], ["llm_config.json not found"]),
    ],
)
def test_errors_are_one_line_with_a_remedy(argv, words, capsys):
    with pytest.raises(SystemExit) as error:
        plan.main(argv)
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(word in said for word in words)


def test_advice_names_the_knobs(capsys):
    plan.main(["--gpus", "1x141"])
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said
    assert "TURN --activation_checkpointing True --adam_moments host" in said
    plan.main(["--gpus", "8x80"])
    assert "FITS" in capsys.readouterr().out
    plan.main(["--gpus", "1x80"])
    assert "4 such GPUs" in capsys.readouterr().out


def test_a_folder_with_json_files_alone_is_enough(tmp_path, capsys):
    FULL_SIZE.save_pretrained(tmp_path)
    plan.main(["--model_path", str(tmp_path), "--gpus", "1x80", "--mode", "inference"])
    assert "8,035.2 M parameters" in capsys.readouterr().out


def test_train_md_shows_what_is_printed(capsys):
    """The memory of both examples; their seconds change with what is measured."""
    document = (ROOT / "TRAIN.md").read_text()
    examples = re.findall(r"^    python -m train\.plan (.*)\n\n((?: {4}.*\n)+)", document, re.M)
    assert len(examples) == 2
    for flags, shown in examples:
        plan.main(flags.split())
        said = capsys.readouterr().out.splitlines()
        assert not [line for line in shown.splitlines() if line[4:] not in said]


def run_cli(*argv):
    done = subprocess.run(
        [sys.executable, "-m", "train.plan", *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_command_line(tmp_path):
    file = tmp_path / "plan.json"
    said = run_cli("--gpus", "8xH800", "--scaling", "--json", str(file))
    figures = json.loads(file.read_text())
    assert figures["fits"] and figures["peak"]["bytes"] == peak(EIGHT)[1]
    assert figures["step_seconds"] == pytest.approx(timing.step_seconds(EIGHT))
    assert len(figures["scaling"]) == 10 and "512" in said
    sizes = ["--image_tokens", "16", "--vt_tokens", "16", "--text_tokens", "10"]
    rest = ["--completion_tokens", "10", "--sample_max_new_tokens", "24"]
    said = run_cli("--model_path", str(MINI), "--gpus", "cpu", *sizes, *rest)
    assert "MB" in said and "calibrated" in said and "FITS" in said


def test_the_miniature_is_small():
    mini = Setup(BagelConfig.from_pretrained(MINI), H200, itemsize=4, case=CASES["S"])
    held = static_memory(mini)
    assert mini.strategy == "alone" and total(held) - held["KV cache of rollouts"] < 50e6
