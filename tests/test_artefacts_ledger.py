"""The ledger from invented results: every number, and its status on both sides of every rule."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from data.miniworld.world import TASKS
from eval.artefacts.catalogue import ARTEFACTS
from eval.artefacts.claims import CLAIMS
from eval.artefacts.ledger import Claim, average_of_nine, entry
from eval.artefacts.model import Artefact
from eval.artefacts.runs import Runs
from eval.files.registry import COLUMNS, PAPER
from eval.report import ledger_page
from tests.invented_results import (
    FILES,
    IN_KL,
    LAYERS,
    OVERALL,
    PLAN,
    SEEDS,
    SETTINGS,
    Files,
    Want,
    accuracy,
    collected,
    kl,
    made,
    minus,
    over_seeds,
    paired_cells,
    pick,
    planned,
    raw,
    runs_of,
    same,
    scores,
    shown,
    tables_of,
    told,
    write_file,
    written_for_a_while,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Invented results; tests that change them put them back."""
    return made(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def whole(folder) -> tuple[list[Artefact], dict[str, list[tuple[tuple, dict]]]]:
    """All artefacts of the whole folder, and what was to be drawn."""
    return collected(folder)


AT_FULL_SIZE = [claim for claim in CLAIMS if claim.find is average_of_nine]


MEASURABLE = [claim for claim in CLAIMS if claim.find not in (None, average_of_nine)]


def paired_text(pair: str) -> Want:
    difference, *seeds, _, _, p = paired_cells(pair)
    text = f"{difference.text}, by seed {', '.join(s.text for s in seeds)}, p {p.text}"
    if len({s.value > 0 for s in seeds}) > 1:
        text += "; the seeds disagree"
    return Want(text, difference.value, difference.sources)


def closed_by(student: str, task: str = OVERALL) -> Want:
    return over_seeds(
        lambda s: raw(f"seed{s}/kl/summary.json", "gap_closed", student, task=task).times(100)
    )


def expect_gap() -> Want:
    own, prompts = kl("pre", OVERALL), kl("prompts_only", OVERALL)
    return told(own, f"{own.text} nats per token; prompts alone {prompts.text}")


def expect_right_pictures() -> Want:
    own = kl("pre", OVERALL)
    wrong = {t: kl(m, OVERALL) for t, m in IN_KL.items() if m not in ("pre", "identical")}
    most = max(wrong, key=lambda title: wrong[title].value)
    return told(own, f"{own.value:.3f} nats; most under {most}: {wrong[most].value:.3f}")


def expect_words() -> Want:
    content, function = (
        over_seeds(lambda s, n=name: raw(f"seed{s}/kl/tokens.json", "mean", id=n))
        for name in ("content", "function")
    )
    text = f"{content.value:.3f} against {function.value:.3f} nats per token"
    return Want(text, content.value, content.sources | function.sources)


def expect_noise() -> Want:
    noise, real = closed_by("noise"), closed_by("opsd")
    return told(noise, f"{noise.text} %, {real.value - noise.value:.1f} points below real VTs")


def expect_faster() -> Want:
    slow, quick = (
        raw("latency/table.json", "seconds", id=id)
        for id in ("base, interleaved", "opsd, text-only")
    )
    ratio = slow.value / quick.value
    text = f"{ratio:.1f} times ({slow.value:.3f} s against {quick.value:.4f} s)"
    return Want(text, ratio, frozenset([slow.source, quick.source]))


def expect_attention(mode: str) -> Want:
    file = "attention/attention.json"
    picture, problem = (
        [raw(file, key, id=f"{mode}/txt1/{layer:02}") for layer in range(LAYERS)]
        for key in ("img1", "img0")
    )
    vt, image = (100 * fmean(v.value for v in values) for values in (picture, problem))
    return Want(
        f"{vt:.1f} % on the VT, {image:.1f} % on the problem image", vt,
        frozenset(value.source for value in picture),
    )  # fmt: skip


def expect_knob(knob: str, default: str) -> Want:
    found = {
        value: accuracy(f"sweep/systems/{run}/scores.json")
        for name, value, run in SETTINGS
        if name == knob
    }
    text = ", ".join(f"{value}: {share.value:.1f}" for value, share in found.items())
    sources = frozenset(share.source for share in found.values())
    return Want(f"{text} % (default {default})", found[default].value, sources)


def expect_clip() -> Want:
    found = {
        value: accuracy(f"sweep/systems/{run}/scores.json")
        for name, value, run in SETTINGS
        if name == "jsd_token_clip"
    }
    best, own = max(found, key=lambda value: found[value].value), found["0.05"].value
    text = f"{own:.1f} %; the best is {best} with {found[best].value:.1f} %"
    return Want(text, own, frozenset(share.source for share in found.values()))


def expect_shorter(than: str) -> Want:
    ours, others = (
        over_seeds(lambda seed, s=s: raw(f"seed{seed}/systems/{s}/scores.json", "mean_tokens"))
        for s in ("opsd", than)
    )
    text = f"{ours.value:.1f} against {others.value:.1f} tokens"
    return Want(text, ours.value, ours.sources | others.sources)


def expect_ranks() -> Want:
    shares = {task: closed_by("opsd", task) for task in TASKS}
    gains = {task: minus("opsd", "base", task) for task in TASKS}
    text = "; ".join(
        f"{shown(t)}: closed {shares[t].value:.0f} %, {gains[t].value:+.0f} points" for t in TASKS
    )
    sources = frozenset().union(*(w.sources for w in (*shares.values(), *gains.values())))
    return Want(text, shares[TASKS[0]].value, sources)


def expect_theorem_claim() -> Want:
    key, tasks = "forward KL, to p*", [r["task"] for r in FILES["theorem/theorem.json"]]
    found = max((raw("theorem/theorem.json", key, task=t) for t in tasks), key=lambda v: v.value)
    text = f"up to {found.value:.2g} from p* in total variation"
    return Want(text, found.value, frozenset([found.source]))


def with_unit(want: Want, unit: str) -> Want:
    return told(want, f"{want.text} {unit}")


FOUND: tuple[Callable[[], Want], ...] = (  # in the order of the claims
    expect_gap,
    expect_right_pictures,
    expect_words,
    lambda: with_unit(closed_by("opsd"), "%"),
    expect_noise,
    lambda: paired_text("opsd:base"),
    lambda: paired_text("opsd:sft"),
    lambda: paired_text("opsd:sft_base"),
    lambda: paired_text("opsd:noise"),
    lambda: paired_text("noise:sft"),
    lambda: paired_text("noise:base"),
    lambda: paired_text("opsd:thinkmorph"),
    expect_faster,
    lambda: with_unit(minus("base", "thinkmorph"), "points"),
    lambda: with_unit(minus("thinkmorph-noise", "thinkmorph"), "points"),
    lambda: expect_attention("drawn"),
    lambda: expect_attention("noise"),
    lambda: expect_knob("jsd_top_k", "64"),
    lambda: expect_knob("jsd_token_clip", "0"),
    expect_clip,
    expect_ranks,
    expect_theorem_claim,
    lambda: expect_shorter("thinkmorph"),
    lambda: expect_shorter("sft"),
)


def test_ledger_has_the_numbers_of_every_claim(whole):
    tables = tables_of(whole[0])
    assert len(tables["ledger"].rows) == len(tables["ledger_rules"].rows) == len(CLAIMS)
    wants = iter(FOUND)
    for place, (claim, row, rule) in enumerate(
        zip(CLAIMS, tables["ledger"].rows, tables["ledger_rules"].rows, strict=True), 1
    ):
        assert row[:2] == (f"{place}. {claim.text}", claim.value)
        assert rule[:2] == (f"{place}. {claim.text}", claim.place)
        if claim not in MEASURABLE:
            assert row[2:] == ("–", "not run at this scale")
            assert rule[2:] == ("–", claim.why) and claim.why
            continue
        same(row[2], next(wants)())
        assert row[3] in ("holds", "differs")
        assert rule[3] == f"Holds if {claim.rule}. {claim.why}".strip()
        assert rule[2].startswith(f"{PLAN['command']} --only {claim.needs}; ")
        assert "3 seeds" in rule[2] and claim.needs in ARTEFACTS
    assert next(wants, None) is None


Change = tuple[str, tuple[str, ...], float, dict[str, Any]]  # file, keys, new value, which records


def in_kl(values: Mapping[tuple[str, ...], float], task: str = OVERALL) -> list[Change]:
    return [
        (f"seed{s}/kl/summary.json", keys, value, {"task": task})
        for s in SEEDS
        for keys, value in values.items()
    ]


def in_pairs(
    pair: str, value: float, low: float, high: float, seeds: Iterable[int] = SEEDS
) -> list[Change]:
    ends = {"value": value, "low": low, "high": high}
    return [
        (f"seed{s}/pairs.json", ("difference", name), end, {"id": pair, "task": OVERALL})
        for s in seeds
        for name, end in ends.items()
    ]


ROOT3 = 3**0.5  # intervals of three equal estimates are that much narrower


def above_zero(pair: str) -> list[tuple[list[Change], bool]]:
    """By the interval of the mean, whatever single seeds say."""
    of_mean = [
        (in_pairs(pair, 0.1, 0.1 - ROOT3 * (0.1 - low), 0.2), low > 0) for low in (1e-4, -1e-4)
    ]
    of_seed = [
        (in_pairs(pair, 0.1, 0.09, 0.2) + in_pairs(pair, -1e-4, -0.01, 0.2, [seed]), True)
        for seed in SEEDS
    ]
    return of_mean + of_seed


def in_scores(
    values: Mapping[str, float], task: str = OVERALL, key: str = "accuracy"
) -> list[Change]:
    return [
        (f"seed{s}/systems/{system}/scores.json", (key,), value, {"task": task})
        for s in SEEDS
        for system, value in values.items()
    ]


def beside_drawing(system: str) -> list[tuple[list[Change], bool]]:
    return [
        (in_scores({"thinkmorph": 0.5, system: 0.5 + d}), abs(d) < 0.05)
        for d in (0.0499, 0.0501, -0.0499, -0.0501)
    ]


def attended(mode: str) -> list[tuple[list[Change], bool]]:
    file, other = "attention/attention.json", "true"
    return [
        (
            [
                (file, ("img1",), value, {"id": f"{name}/txt1/{layer:02}", "task": OVERALL})
                for name, value in ((mode, share), (other, 1 - share))
                for layer in range(LAYERS)
            ],
            share > 0.5,
        )
        for share in (0.501, 0.499)
    ]


def knob_moved(knob: str, moved: str) -> list[tuple[list[Change], bool]]:
    """One value of the knob away from the default, which the others are at."""
    runs = [run for name, _, run in SETTINGS if name == knob]
    return [
        (
            [
                (
                    f"sweep/systems/{run}/scores.json", ("accuracy",),
                    0.5 + (d if run == moved else 0), {"task": OVERALL},
                )
                for run in runs
            ],
            abs(d) < 0.05,
        )
        for d in (0.0499, 0.0501, -0.0501)
    ]  # fmt: skip


def ranked(gains: Sequence[float]) -> list[Change]:
    changes = []
    for place, (task, gain) in enumerate(zip(TASKS, gains, strict=True)):
        changes += in_kl({("gap_closed", "opsd", "value"): 0.1 * place}, task)
        changes += in_scores({"base": 0.3, "opsd": 0.3 + gain}, task)
    return changes


def seconds_of(slow: float) -> list[Change]:
    file, found = "latency/table.json", {"base, interleaved": slow, "opsd, text-only": 1.0}
    return [(file, ("seconds",), value, {"id": id}) for id, value in found.items()]


def distances(largest: float) -> list[Change]:
    file, tasks = "theorem/theorem.json", ["noise 0.1", "noise 0.5", "noise 1.0", "noise 2.0"]
    values = dict.fromkeys(tasks, 0.0) | {"noise 1.0": largest}
    return [(file, ("forward KL, to p*",), v, {"task": task}) for task, v in values.items()]


def closed_both(noise: float, real: float) -> list[Change]:
    keys = (("gap_closed", "noise", "value"), ("gap_closed", "opsd", "value"))
    return in_kl(dict(zip(keys, (noise, real), strict=True)))


def most_moved(own: float) -> list[Change]:
    wrong = {(m, "value"): 1.0 for m in IN_KL.values() if m != "identical"}
    return in_kl(wrong | {("pre", "value"): own, ("identical", "value"): 5.0})


def words(content: float) -> list[Change]:
    return [
        (f"seed{s}/kl/tokens.json", ("mean",), value, {"id": name, "task": OVERALL})
        for s in SEEDS
        for name, value in (("content", content), ("function", 1.0))
    ]


def beside_prompts(seed: int, own: float) -> list[Change]:
    """One seed against its prompts alone; in the others the gap is plain."""
    changes = in_kl({("pre", "value"): 2.0, ("prompts_only", "value"): 1.0})
    return [*changes, (f"seed{seed}/kl/summary.json", ("pre", "value"), own, {})]


def clips(values: Mapping[str, float]) -> list[Change]:
    runs = [(value, run) for name, value, run in SETTINGS if name == "jsd_token_clip"]
    return [
        (f"sweep/systems/{run}/scores.json", ("accuracy",), values.get(value, 0.5), {})
        for value, run in runs
    ]


def terse(than: str) -> list[tuple[list[Change], bool]]:
    return [
        (in_scores({"opsd": tokens, than: 100.0}, key="mean_tokens"), tokens < 60)
        for tokens in (59.9, 60.1)
    ]


BOTH_SIDES: tuple[list[tuple[list[Change], bool]], ...] = (  # in the order of the claims
    [(beside_prompts(seed, own), own > 1) for seed in SEEDS for own in (1.001, 0.999)],
    [(most_moved(1.001), True), (most_moved(0.999), False)],
    [(words(10.01), True), (words(9.99), False)],
    [(closed_both(0.0, 0.501), True), (closed_both(0.0, 0.499), False)],
    [
        (closed_both(0.149, 0.6), True), (closed_both(0.151, 0.6), False),
        (closed_both(-0.149, 0.6), True), (closed_both(-0.151, 0.6), False),
        (closed_both(0.1, 0.501), True), (closed_both(0.1, 0.499), False),
    ],
    above_zero("opsd:base"),
    above_zero("opsd:sft"),
    above_zero("opsd:sft_base"),
    above_zero("opsd:noise"),
    [(in_pairs("noise:sft", d, -0.9, 0.9), abs(d) < 0.05) for d in (0.0499, 0.0501, -0.0501)],
    [
        (in_pairs("noise:base", -0.1, -0.2, -0.1 + ROOT3 * (0.1 + high)), high < 0)
        for high in (1e-4, -1e-4)
    ],
    above_zero("opsd:thinkmorph"),
    [(seconds_of(5.01), True), (seconds_of(4.99), False)],
    beside_drawing("base"),
    beside_drawing("thinkmorph-noise"),
    attended("drawn"),
    attended("noise"),
    knob_moved("jsd_top_k", "jsd_top_k-128"),
    knob_moved("jsd_token_clip", "jsd_token_clip-0.1"),
    [
        (clips({"0.05": 0.501}), True), (clips({"0.05": 0.499}), False), (clips({}), True),
        (clips({"0.05": 0.6, "0": 0.601}), False), (clips({"0.05": 0.6, "0.01": 0.6}), True),
    ],
    [(ranked([0.1, 0.2, 0.3, 0.4]), True), (ranked([0.1, 0.3, 0.2, 0.4]), False)],
    [(distances(9e-7), True), (distances(1.1e-6), False)],
    terse("thinkmorph"),
    terse("sft"),
)  # fmt: skip


def changed(changes: Sequence[Change]) -> Files:
    """The files that changes touch, changed."""
    files: Files = {}
    for file, keys, value, which in changes:
        if file not in files:
            files[file] = json.loads(json.dumps(FILES[file]))
        holder = pick(file, **({"task": OVERALL} | which), files=files)["values"]
        for key in keys[:-1]:
            holder = holder[key]
        assert keys[-1] in holder
        holder[keys[-1]] = value
    return files


@pytest.mark.parametrize("place", range(len(MEASURABLE)))
def test_status_follows_the_numbers_across_the_rule(folder, place):
    claim: Claim = MEASURABLE[place]
    assert {holds for _, holds in BOTH_SIDES[place]} == {True, False}
    for changes, holds in BOTH_SIDES[place]:
        with written_for_a_while(folder, changed(changes)):
            assert claim.find(runs_of(folder)).holds is holds, (claim.text, changes[:2])


def nine_columns(points: Mapping[str, float]) -> Files:
    """Scores at full size: the student above the model that draws by these points, else below."""
    files: Files = {}
    for seed in SEEDS:
        for system in ("opsd", "thinkmorph"):
            file = f"seed{seed}/systems/{system}/scores.json"
            files[file] = scores(file, PAPER, seed)
            for record in files[file]:
                column = next((c for c, parts in COLUMNS.items() if record["task"] in parts), "")
                above = points.get(column, -0.1) if system == "opsd" else 0.0
                record["values"]["accuracy"] = 0.5 + above + 0.01 * seed
    return files


def only_these(folder: Path, files: Files) -> Runs:
    """Over these files and no others."""
    (folder / "plan.json").write_text(json.dumps(PLAN), encoding="utf-8")
    for file, records in files.items():
        write_file(folder, file, records)
    return runs_of(folder)


@pytest.mark.parametrize("above", [4, 5, 9])
def test_the_mean_of_nine_is_decided_where_the_nine_were_asked(tmp_path, above):
    (claim,) = AT_FULL_SIZE
    points = dict.fromkeys(list(COLUMNS)[:above], 0.01)
    mean = 51 + (above * 1 - (9 - above) * 10) / 9  # seeds are a point apart
    row = entry(only_these(tmp_path, nine_columns(points)), claim)
    number, status = row[3], row[5]
    assert number.text == f"{mean:.2f} ± 1.00 %, {above} of 9 above"
    assert number.value == pytest.approx(mean)
    assert status == ("holds" if above >= 5 else "differs")
    assert {source.file for source in number.sources} == {
        f"seed{s}/systems/{system}/scores.json" for s in SEEDS for system in ("opsd", "thinkmorph")
    }


@pytest.mark.parametrize("lost", ["opsd", "thinkmorph", "ChartQA_v_bar", "nothing"])
def test_the_mean_of_nine_is_not_run_where_one_of_them_is_missing(tmp_path, lost):
    files = nine_columns({})
    for file in list(files):
        if f"/{lost}/" in file:
            del files[file]
            continue
        files[file] = [record for record in files[file] if record["task"] != lost]
    status = entry(only_these(tmp_path, files), AT_FULL_SIZE[0])[5]
    assert status == ("differs" if lost == "nothing" else "not run")


def test_a_quick_run_decides_nothing(folder):
    quick = planned(folder, quick=True)
    for claim in CLAIMS:
        row, full = entry(quick, claim), entry(planned(folder), claim)
        assert row[:5] == full[:5]
        if claim in MEASURABLE:
            assert row[5:] == ("quick run", "A few updates and rows decide nothing.")
        else:
            assert row[5:] == full[5:] == ("not run at this scale", claim.why)
    text = quick.plan.about()
    assert "quick run" in text and "quick" not in planned(folder).plan.about()


def test_every_claim_has_its_numbers_and_both_sides():
    assert len(AT_FULL_SIZE) == 1
    assert len(FOUND) == len(BOTH_SIDES) == len(MEASURABLE)


def test_ledger_document_names_value_status_and_origin_of_each_claim(folder):
    text = ledger_page(folder)
    sections = text.split("\n## ")[1:]
    assert len(sections) == len(CLAIMS)
    wants = iter(FOUND)
    for section, claim in zip(sections, CLAIMS, strict=True):
        assert claim.text in section.splitlines()[0]
        if claim not in MEASURABLE:
            assert "**not run at this scale.**" in section and "- from" not in section
            continue
        want, holds = next(wants)(), claim.find(runs_of(folder)).holds
        assert f"**{'holds' if holds else 'differs'}.**" in section
        assert want.text.split(" ")[0] in section
        for source in want.sources:
            line = (
                f"- from `{folder / source.file}`, seed {source.seed}, commit {source.commit[:10]}"
            )
            assert line in section.splitlines()


def test_seeds_that_disagree_are_told(folder):
    def told(of_seed: float) -> str:
        changes = in_pairs("opsd:base", 0.1, 0.09, 0.2)
        changes += in_pairs("opsd:base", of_seed, -0.1, 0.2, [1])
        with written_for_a_while(folder, changed(changes)):
            return CLAIMS[5].find(runs_of(folder)).text

    assert "untrained self" in CLAIMS[5].text
    assert told(-1e-4).endswith("; the seeds disagree")
    assert "disagree" not in told(1e-4)
