"""The benchmark suite: the plain baseline is right and as plain as it claims, the instruments
measure, and the gates that count rather than time reach what they must.
"""

import argparse
import copy
import dataclasses
import functools
import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks import (
    cpu,
    decoding,
    gpu,
    loss,
    masks,
    measure,
    models,
    plain,
    processes,
    run,
    step,
)
from benchmarks.gates import Check, Gate, Settings
from modeling.bagel import text_logits
from modeling.generation import SamplingParams, generate
from modeling.sequence import Text, pack
from tests.tiny_model import TOKENS, FakeTokenizer, random_image, tiny_bagel
from train.config import DistillArguments
from train.divergence import JSDConfig
from train.losses import chunked_jsd, teacher_topk

# Counted once on the public release: a decoded token, 28 layers.
RELEASE = {"non_view": 1990, "dispatches": 3217, "scalars": 112}
NEVER = dataclasses.replace(TOKENS, eos=-1)


def context(seed: int = 0) -> list:
    text = functools.partial(models.prompt, seed=seed)
    return [*text(9), random_image(4, 3, seed), *text(14), random_image(2, 2, seed), *text(6)]


# ---- the baseline -----------------------------------------------------------------------------


def test_a_decoded_token_of_the_baseline_costs_what_the_release_pays():
    """Operators within 5 %, all dispatches (with views) within 7 %, host waits exactly.

    There are fewer views than in the release, and one more wait: the test of the stop token, which
    is outside of the decoder.
    """
    whole, _ = models.models("deep", torch.bfloat16)
    cache, position = plain.prefill(whole, models.prompt(64), TOKENS)
    found = decoding.per_step(
        lambda n: plain.decode(whole, cache.fork(), position, NEVER, n), first=4, second=12
    )
    assert found.scalars == RELEASE["scalars"] + 1
    assert found.non_view == pytest.approx(RELEASE["non_view"], rel=0.05)
    assert found.dispatches == pytest.approx(RELEASE["dispatches"], rel=0.07)


def test_the_baseline_writes_what_generate_writes(shared_bagel):
    contexts = [context(seed) for seed in range(3)]
    params = SamplingParams(24, temperature=0.0, max_image_skips=0)
    ours = generate(shared_bagel, contexts, FakeTokenizer(), params)
    theirs = plain.generate(shared_bagel, contexts, TOKENS, [24] * 3)
    assert theirs == [list(row.token_ids) for row in ours]
    assert max(map(len, theirs)) > 3


def test_the_baseline_draws_what_generate_draws(shared_bagel):
    contexts, seeds = [context(seed) for seed in range(3)], [5, 6, 7]
    params = SamplingParams(24, max_image_skips=0)
    ours = generate(shared_bagel, contexts, FakeTokenizer(), params, seeds)
    theirs = plain.generate(shared_bagel, contexts, TOKENS, [24] * 3, 1.0, seeds)
    assert theirs == [list(row.token_ids) for row in ours]
    assert len({str(row) for row in theirs}) == 3


def test_a_longer_prompt_and_a_cache_that_goes_on_agree(shared_bagel):
    """The causal mask over cached keys is aligned at the end, and a fork leaves the cache alone."""
    cache, position = plain.prefill(shared_bagel, context(), TOKENS)
    first = plain.decode(shared_bagel, cache.fork(), position, NEVER, 12)
    assert plain.decode(shared_bagel, cache.fork(), position, NEVER, 12) == first
    batch = pack([[*context(), Text(tuple(first), loss=True)]], TOKENS)
    logits = shared_bagel(batch, head=text_logits)
    assert logits[:-1].argmax(-1).tolist() == first


def test_the_baseline_scores_what_the_model_scores(shared_bagel):
    samples = [[*context(seed), Text((20, 30, 40, 50), loss=True)] for seed in range(3)]
    batch = pack(samples, TOKENS)
    expected = shared_bagel(batch, head=text_logits)
    with torch.no_grad():
        rows = plain.hidden_rows(shared_bagel, batch)
        logits, cross_entropy = plain.scored(
            rows, shared_bagel.language_model.lm_head, batch.labels
        )
    assert float((logits - expected).abs().max()) <= 1e-4
    direct = torch.nn.functional.cross_entropy(expected, batch.labels, reduction="none")
    assert float((cross_entropy - direct).abs().max()) <= 1e-4


@pytest.mark.parametrize("changes", [{}, {"top_k": 0}, {"token_clip": 0.0}, {"beta": 0.2}])
def test_loss_and_gradients_are_those_of_chunked_jsd(changes):
    config = dataclasses.replace(JSDConfig(top_k=16, token_clip=0.01), **changes)
    stream = torch.Generator().manual_seed(3)
    head, teacher_head = (torch.nn.Linear(24, 300, bias=False) for _ in range(2))
    for one in (head, teacher_head):
        one.weight.data = torch.randn(300, 24, generator=stream) / 5
    teacher_rows = torch.randn(11, 24, generator=stream)
    labels = torch.randint(300, (11,), generator=stream)
    values, gradients = [], []
    for side in ("plain", "ours"):
        rows = (teacher_rows + 0.5).requires_grad_()
        head.weight.grad = None
        if side == "plain":
            value = plain.loss(rows, head, teacher_rows, teacher_head, labels, config)
        else:
            target = teacher_topk(teacher_rows, teacher_head, config)
            value = chunked_jsd(rows, head, target, config, torch.full((11,), 1 / 11)).loss
        value.backward()
        values.append(float(value.detach()))
        gradients.append((rows.grad, head.weight.grad))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] > 1e-3
    for theirs, ours in zip(*gradients, strict=True):
        assert loss.distance(ours, theirs) <= 1e-4


@pytest.mark.parametrize(
    "changes", [{"top_k_mode": "tail"}, {"clip_mode": "token"}, {"beta": 0.0, "token_clip": 0}]
)
def test_the_baseline_refuses_divergences_it_does_not_know(changes):
    with pytest.raises(ValueError, match="plain baseline"):
        plain.jsd_rows(torch.zeros(1, 9), torch.zeros(1, 9), JSDConfig(**changes))


def test_a_whole_step_of_the_baseline_is_a_step_of_ours():
    """On the same completions: loss, gradient norm, and where the understanding weights go."""
    samples, distill = step.distillation_samples(3, mean=8, cap=16), DistillArguments()
    whole, und = (copy.deepcopy(model) for model in models.models("tiny"))
    ours = step.OurTrainer(und, distill, lr=1.0)
    theirs = plain.PlainTrainer(whole.requires_grad_(True), distill.jsd, lr=1.0)
    for optimizer in (ours.optimizer, theirs.optimizer):  # steps that do not magnify rounding
        optimizer.param_groups[0]["eps"] = 1.0
    start = {name: p.detach().clone() for name, p in und.named_parameters()}
    generation = {n: p.detach().clone() for n, p in whole.named_parameters() if n not in start}
    loss, norm, trajectories = ours.step(samples)
    completions = [t.rollout.token_ids for t in trajectories]
    assert [len(c) for c in completions] == [s.budget for s in samples]
    plain_loss, plain_norm = theirs.step(samples, TOKENS, completions)
    assert loss == pytest.approx(plain_loss, rel=1e-4)
    assert norm == pytest.approx(plain_norm, rel=1e-3)
    updated = {name: p.detach() for name, p in whole.named_parameters()}
    averages = dict(theirs.teacher.named_parameters())
    mine = dict(ours.teacher.module.named_parameters())
    trained = {name: p.detach() for name, p in und.named_parameters()}
    moved = max(float((p - start[name]).abs().max()) for name, p in trained.items())
    for name, parameter in trained.items():
        assert float((parameter - updated[name]).abs().max()) <= 1e-3 * moved, name
        # these have moved by the two hundredth part of it
        average = mine[f"module.{name}"]
        assert float((average - averages[name]).abs().max()) <= 1e-5 * moved, name
    # it has gradients of zero and optimizer state for the expert that nothing runs through
    assert all(torch.equal(updated[name], value) for name, value in generation.items())
    expert = [p for name, p in whole.named_parameters() if name in generation]
    assert all(p.grad is not None and p in theirs.optimizer.state for p in expert)


def test_the_baseline_recomputes_its_layers(monkeypatch):
    calls = []

    def spy(*args, **kwargs):
        calls.append(kwargs["use_reentrant"])
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(plain, "checkpoint", spy)
    model = tiny_bagel()
    plain.hidden_rows(model, pack([[Text((1, 2, 3), loss=True)]], TOKENS)).sum().backward()
    assert calls == [False] * model.config.llm.num_hidden_layers


# ---- the instruments --------------------------------------------------------------------------


def test_counts_of_operators_waits_and_rows():
    table, ids = torch.randn(10, 4), torch.tensor([1, 2, 2])
    other = torch.randn(10, 4)
    with measure.counting(table) as counts:
        x = torch.nn.functional.embedding(ids, table)
        torch.nn.functional.embedding(ids, other)
        x = (x.t() + 1).t().view(-1)
        bool(x[0] > 0), float(x[1]), x.tolist()
    assert counts.row_tokens == 3
    assert counts.scalars == 2
    assert counts.syncs == 3
    assert counts.operators["aten.t.default"] == 2
    assert counts.dispatches - counts.non_view == 5  # these, view, two selects
    with measure.counting() as counts:
        x[x > 0]
        torch.nonzero(x)
        torch.repeat_interleave(x, torch.ones(12, dtype=torch.long))
        torch.repeat_interleave(x, torch.ones(12, dtype=torch.long), output_size=12)
    assert counts.syncs == 3


def test_differences_of_counts():
    with measure.counting() as few:
        torch.ones(2)
    with measure.counting() as many:
        torch.ones(2), torch.ones(2).sum().item()
    rest = many.minus(few)
    assert (rest.dispatches, rest.scalars) == (3, 1)
    assert rest.operators == {
        "aten.ones.default": 1,
        "aten.sum.default": 1,
        "aten._local_scalar_dense.default": 1,
    }


def test_pairs_are_timed_in_turn_and_set_up_apart(monkeypatch):
    log = []
    clock = iter(range(1000))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))

    def side(name: str, ticks: int):
        def setup():
            log.append(f"set up {name}")
            return lambda: [next(clock) for _ in range(ticks)]

        return setup

    found = measure.paired(side("a", 5), side("b", 1), repeats=4, warmup=1)
    assert (found.ratio, found.low, found.high) == (3.0, 3.0, 3.0)  # (5 + 1) / (1 + 1)
    assert (found.baseline_s, found.ours_s, found.repeats) == (6, 2, 4)
    assert [entry[-1] for entry in log] == list("ba" + "ab" + "ba" + "ab" + "ba")


def test_quartiles():
    assert measure.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


def stage_of(megabytes: int, freed: int):
    """A stage that holds so much at its peak, after a set-up that used `freed` more."""
    torch.ones(freed << 18)
    return lambda: float(torch.ones(megabytes << 18).sum())


def test_the_peak_of_a_stage_is_that_of_the_stage():
    found = measure.peak_in_process("tests.test_benchmarks:stage_of", megabytes=64, freed=200)
    assert found.result == 64 << 18
    assert found.peak == pytest.approx(64 << 20, rel=0.05)


def test_a_stage_that_fails_says_why():
    with pytest.raises(RuntimeError, match="no_such_function"):
        measure.peak_in_process("benchmarks.measure:no_such_function")


def test_bytes_held_by_an_object():
    shared = torch.zeros(100)

    class Holder:
        def __init__(self):
            self.views = [shared[:50], shared[50:]]
            self.function = lambda: shared.sum() + inner
            self.table = {"a": torch.zeros(10, dtype=torch.int64)}

        def __call__(self):
            pass

    inner = torch.zeros(3)
    assert measure.held_bytes(Holder()) == 400 + 80 + 12


def test_every_record_says_where_it_comes_from():
    found = measure.provenance(["--suite", "cpu"])
    assert found["command"] == "python -m benchmarks.run --suite cpu"
    assert len(found["commit"].removesuffix("-dirty")) == 40
    assert found["torch"] == torch.__version__
    assert found["hardware"]["cores"] >= 1


# ---- gates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_id", ["C9", "C10", "C12", "C14"])
def test_counted_gates(gate_id):
    reach(cpu.GATES[gate_id](Settings()))


@pytest.mark.slow
@pytest.mark.dist
def test_collectives_of_one_two_and_four_processes():
    reach(processes.c13(Settings()))


def reach(gates: list[Gate]) -> None:
    missed = [(g.what, g.value, g.must, g.checks) for g in gates if not g.passes]
    assert not missed


def test_needed_blocks_by_hand():
    """Three blocks of text see 1 + 2 + 3; an image of two blocks 4, and what precedes it."""
    assert masks.needed_blocks([masks.split_sample(3 * masks.BLOCK)]) == 6
    assert masks.needed_blocks([masks.split_sample(masks.BLOCK, -2 * masks.BLOCK)]) == 1 + 2 * 3
    assert masks.needed_blocks([masks.split_sample(masks.BLOCK)] * 3) == 3
    assert masks.needed_blocks([masks.split_sample(masks.BLOCK + 1)]) == 3


def test_bounds_of_a_gate():
    low = Gate("X", "a time", 2.0, "s", must=3.0, stretch=1.0, at_least=False)
    high = Gate("X", "a rate", 2.0, "x", must=3.0, stretch=4.0)
    assert low.passes and not low.stretches and not high.passes
    wrong = dataclasses.replace(low, checks=(Check("same tokens", 1, 0),))
    assert not wrong.agrees and not wrong.passes


# ---- the command ------------------------------------------------------------------------------


@pytest.fixture
def suite(monkeypatch):
    """A suite of two gates, of which the second one misses."""
    good = Gate("X1", "good | well", 5.0, "x", 2.0, 10.0, spread="4..6", floor_percent=51.0)
    bad = Gate("X2", "bad", 5.0, "MB", 2.0, 1.0, at_least=False, checks=(Check("same", 3, 1),))

    def first(settings):
        """Something."""
        return [dataclasses.replace(good, value=float(settings.repeats))]

    def second(settings):
        """Something else."""
        return [bad]

    monkeypatch.setitem(run.SUITES, "cpu", {"X1": first, "X2": second})


def test_the_command_prints_and_writes(suite, tmp_path, capsys):
    output, page = tmp_path / "new" / "cpu.json", tmp_path / "page.md"
    argv = ["--repeats", "7", "--output", str(output), "--markdown", str(page)]
    assert run.main(argv) == 1
    out = capsys.readouterr().out
    assert "WRONG: same 3" in out and "1 of 2 gates" in out
    found = json.loads(output.read_text())
    assert [(g["id"], g["value"], g["passes"]) for g in found["gates"]] == [
        ("X1", 7.0, True),
        ("X2", 5.0, False),
    ]
    assert found["command"] == f"python -m benchmarks.run {' '.join(argv)}"
    rows = [line for line in page.read_text().splitlines() if line.startswith("| X")]
    assert rows[0] == r"| X1 | good \| well | 7 x | 4..6 | >= 2 | >= 10 | 51 % | pass |"


def test_the_command_can_run_some_gates(suite, capsys):
    assert run.main(["--only", "x1"]) == 0
    assert "X2" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["--only", "X9"])
    assert "has X1, X2" in capsys.readouterr().err


@pytest.mark.parametrize("part", gpu.PARTS)
def test_the_gpu_suite_runs_in_small(part, tmp_path, capsys):
    """The code of the full size, on the CPU: both sides agree, and no bound is looked at."""
    output = tmp_path / "gpu.json"
    flags = f"--suite gpu --only {part} --scale tiny --device cpu --dtype float32 --repeats 1"
    assert run.main([*flags.split(), "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["suite"] == "gpu" and found["scale"] == "tiny" and found["gates"]
    for gate in found["gates"]:
        assert gate["agrees"] and gate["must"] is None and math.isfinite(gate["value"])
        assert gate["value"] > 0 or gate["id"] == "G20"
    assert any(gate["checks"] for gate in found["gates"])
    assert "MISS" not in capsys.readouterr().out


def test_the_gpu_suite_has_all_gates():
    text = "".join(inspect.getsource(inspect.getmodule(part)) for part in gpu.PARTS.values())
    assert {f"G{n}" for n in range(1, 21)} <= set(re.findall(r"\bG\d+\b", text))


def test_the_gpu_suite_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main(["--suite", "gpu"])
    assert "torch sees no GPU: --device cpu --scale tiny" in capsys.readouterr().err


def test_the_table_goes_where_the_page_has_a_place_for_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- cpu -->\nold\n<!-- /cpu -->\nend\n")
    arguments = argparse.Namespace(markdown=page, suite="cpu")
    assert run.placed("new\n", arguments) == page.read_text().replace("old", "new")
    arguments.suite = "gpu"
    assert run.placed("new\n", arguments) == "new\n"


def test_the_page_shows_the_latest_record():
    """benchmarks/README.md has the table of the newest result file of the CPU suite."""
    found = [json.loads(file.read_text()) for file in Path("benchmarks/results").glob("cpu*.json")]
    latest = max(found, key=lambda one: one["created"])
    fields = [field.name for field in dataclasses.fields(Gate)]
    gates = []
    for record in latest["gates"]:
        checks = tuple(Check(**check) for check in record["checks"])
        gates.append(Gate(**{name: record[name] for name in fields} | {"checks": checks}))
        assert (gates[-1].passes, gates[-1].stretches) == (record["passes"], record["stretches"])
    assert run.markdown(gates, latest) in Path("benchmarks/README.md").read_text()
    assert {gate.id for gate in gates} == set(cpu.GATES)
