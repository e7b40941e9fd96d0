"""The ledger: what the paper claims, what runs of this repository say to it.

A claim reads its numbers from result files. Its status follows from them by the rule that stands
beside it, never by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from eval.artefacts.extras import KL_CONTROLS
from eval.artefacts.model import Measured, NotRun, Number, Table, joined, measured, missing
from eval.artefacts.results import OVERALL, sources_of
from eval.artefacts.runs import MEAN, Runs, p_value, scores_of
from eval.artefacts.tables import (
    SYSTEMS,
    closed,
    gap,
    points_above,
    seconds,
    swept,
    swept_values,
)
from eval.files.registry import COLUMNS

Status = Literal["holds", "differs"]
CONTROL_LIMIT, MARGIN = 15.0, 40.0  # points of gap closed: of the noise control, and beyond it
FLAT = 5.0  # points of accuracy that count as "barely changed"
SMALL = 0.1  # part that counts as "next to none"
TERSE = 0.6  # part of the tokens that counts as "half"


class OtherScaleError(Exception):
    """A claim is about data or models that these runs did not have."""


@dataclass(frozen=True)
class Finding:
    """What was measured: as it is shown, the numbers behind it, and whether the claim holds."""

    text: str
    value: Measured
    holds: bool


@dataclass(frozen=True)
class Claim:
    """A claim of the paper in our words.

    place, value: in the paper. rule: when it counts as holding. needs: the artefact whose runs
    decide it. find: reads the results; None where no step runs what the claim is about. why: what
    stands behind it either way, true whatever the numbers are.
    """

    text: str
    place: str
    value: str
    rule: str
    needs: str
    find: Callable[[Runs], Finding] | None = None
    why: str = ""


def _points(runs: Runs, first: str, second: str) -> Finding:
    found = runs.paired(first, second)
    d = found.difference
    seeds = ", ".join(f"{of_seed.value:+.1f}" for of_seed in found.per_seed)
    text = f"{d.value:+.1f} ({d.low:+.1f} .. {d.high:+.1f}), by seed {seeds}, p {p_value(found.p)}"
    if len({of_seed.value > 0 for of_seed in found.per_seed}) > 1:
        text += "; the seeds disagree"
    return Finding(text, d, d.low > 0)


def beats(first: str, second: str) -> Callable[[Runs], Finding]:
    return lambda runs: _points(runs, first, second)


def _spread(value: Measured, form: str) -> str:
    return measured(value, form).text


def gap_exists(runs: Runs) -> Finding:
    """Whether pictures move the base further than the prompts around them alone, in each seed."""
    k, prompts = (
        runs.over_seeds(lambda seed, m=measure: gap(runs, seed, m))
        for measure in ("pre", "prompts_only")
    )
    holds = all(
        gap(runs, seed, "pre").value > gap(runs, seed, "prompts_only").value for seed in runs.seeds
    )
    text = f"{_spread(k, '{:.3f}')} nats per token; prompts alone {_spread(prompts, '{:.3f}')}"
    return Finding(text, replace(k, sources=joined((*k.sources, *prompts.sources))), holds)


def closes(runs: Runs) -> Finding:
    real = runs.over_seeds(lambda seed: closed(runs, seed, "opsd"))
    return Finding(_spread(real, "{:.1f}") + " %", real, real.value > 50)


def noise_closes_little(runs: Runs) -> Finding:
    noise = runs.over_seeds(lambda seed: closed(runs, seed, "noise"))
    real = runs.over_seeds(lambda seed: closed(runs, seed, "opsd"))
    holds = abs(noise.value) <= CONTROL_LIMIT and real.value - noise.value >= MARGIN
    text = f"{_spread(noise, '{:.1f}')} %, {real.value - noise.value:.1f} points below real VTs"
    return Finding(text, noise, holds)


def noise_like_sft(runs: Runs) -> Finding:
    found = _points(runs, "noise", "sft")
    return Finding(found.text, found.value, abs(found.value.value) <= FLAT)


def noise_below_start(runs: Runs) -> Finding:
    found = _points(runs, "noise", "base")
    return Finding(found.text, found.value, found.value.high is not None and found.value.high < 0)


def faster(runs: Runs) -> Finding:
    slow, quick = seconds(runs, "thinkmorph"), seconds(runs, "opsd")
    ratio = Measured(slow.value / quick.value, tuple(dict.fromkeys(slow.sources + quick.sources)))
    text = f"{ratio.value:.1f} times ({slow.value:.3f} s against {quick.value:.4f} s)"
    return Finding(text, ratio, ratio.value > 5)


def barely_changes(folder: str, system: str) -> Callable[[Runs], Finding]:
    """Whether accuracy stays where it was when the VTs are replaced."""

    def find(runs: Runs) -> Finding:
        def read(seed: int) -> Measured:
            a = runs.accuracy(folder, system, MEAN)(seed)
            b = runs.accuracy("systems", "thinkmorph", MEAN)(seed)
            return Measured(a.value - b.value, tuple(dict.fromkeys(a.sources + b.sources)))

        change = runs.over_seeds(read)
        text = _spread(change, "{:+.1f}") + " points"
        return Finding(text, change, abs(change.value) <= FLAT)

    return find


def attends_to_vt(mode: str) -> Callable[[Runs], Finding]:
    """The share of the VT's tokens in the attention of the text after it, mean over layers."""

    def find(runs: Runs) -> Finding:
        share, image = attention_shares(runs, mode)
        text = f"{100 * share.value:.1f} % on the VT, {100 * image:.1f} % on the problem image"
        return Finding(text, share.scaled(100), share.value > 0.5)

    return find


def attention_shares(runs: Runs, mode: str) -> tuple[Measured, float]:
    """Shares of VT and problem image after a VT of a mode, means over layers.

    Raises:
        NotRun: there is no such record.
    """
    file = "attention/attention.json"
    records = [
        record
        for record in runs.results.records(file)
        if record["task"] == OVERALL and record["id"].startswith(f"{mode}/txt1/")
    ]
    if not records:
        raise NotRun(f"{file}: {mode}")
    picture, problem = (fmean(r["values"][name] for r in records) for name in ("img1", "img0"))
    return Measured(picture, sources_of(file, records)), problem


def insensitive(knob: str) -> Callable[[Runs], Finding]:
    """Whether all values of a knob end within FLAT points of the default."""

    def find(runs: Runs) -> Finding:
        read = {value: swept(runs, run) for value, run in swept_values(runs, knob)}
        default = read[runs.plan.defaults[knob]]
        parts = [f"{value}: {found.value:.1f}" for value, found in read.items()]
        worst = max(abs(found.value - default.value) for found in read.values())
        sources = joined(source for found in read.values() for source in found.sources)
        text = f"{', '.join(parts)} % (default {runs.plan.defaults[knob]})"
        return Finding(text, Measured(default.value, sources), worst <= FLAT)

    return find


def best_value(knob: str, value: str) -> Callable[[Runs], Finding]:
    """Whether no other value of a knob ends above this one."""

    def find(runs: Runs) -> Finding:
        read = {name: swept(runs, run) for name, run in swept_values(runs, knob)}
        best = max(read, key=lambda name: read[name].value)
        sources = joined(source for found in read.values() for source in found.sources)
        text = f"{read[value].value:.1f} %; the best is {best} with {read[best].value:.1f} %"
        holds = read[value].value == read[best].value  # another may be as good
        return Finding(text, Measured(read[value].value, sources), holds)

    return find


def shorter(than: str) -> Callable[[Runs], Finding]:
    """Whether the student writes about half the tokens of another system."""

    def find(runs: Runs) -> Finding:
        ours, others = (
            runs.over_seeds(
                lambda seed, s=system: runs.results.value(
                    scores_of(seed, "systems", s), "mean_tokens"
                )
            )
            for system in ("opsd", than)
        )
        sources = joined((*ours.sources, *others.sources))
        text = f"{ours.value:.1f} against {others.value:.1f} tokens"
        return Finding(text, Measured(ours.value, sources), ours.value <= TERSE * others.value)

    return find


def average_of_nine(runs: Runs) -> Finding:
    """The mean over the paper's nine columns, and on how many the student is above the teacher.

    Raises:
        OtherScaleError: other data sets were asked.
        NotRun: some of the nine are missing.
    """
    if not set(COLUMNS) & set(runs.columns("systems", list(SYSTEMS))):
        raise OtherScaleError
    mean = runs.over_seeds(runs.accuracy("systems", "opsd", MEAN))
    points = [
        runs.over_seeds(lambda s, n=name: points_above(runs, s, "opsd", "thinkmorph", n))
        for name in COLUMNS
    ]
    above = sum(of_one.value > 0 for of_one in points)
    text = f"{_spread(mean, '{:.2f}')} %, {above} of {len(COLUMNS)} above"
    sources = joined(source for value in (mean, *points) for source in value.sources)
    return Finding(text, replace(mean, sources=sources), above > len(COLUMNS) / 2)


def content_words(runs: Runs) -> Finding:
    """Whether function words have a small part of the KL of content words."""
    words = runs.over_seeds(
        lambda seed: runs.results.value(f"seed{seed}/kl/tokens.json", "mean", id="content")
    )
    grammar = runs.over_seeds(
        lambda seed: runs.results.value(f"seed{seed}/kl/tokens.json", "mean", id="function")
    )
    text = f"{words.value:.3f} against {grammar.value:.3f} nats per token"
    sources = joined((*words.sources, *grammar.sources))
    return Finding(text, replace(words, sources=sources), grammar.value < SMALL * words.value)


def minimiser_is_reference(runs: Runs) -> Finding:
    file = "theorem/theorem.json"
    distances = [
        runs.results.value(file, "forward KL, to p*", task=record["task"])
        for record in runs.results.records(file)
    ]
    largest = max(distances, key=lambda value: value.value)
    text = f"up to {largest.value:.2g} from p* in total variation"
    return Finding(text, largest, largest.value < 1e-6)


def right_pictures_move_most(runs: Runs) -> Finding:
    """Whether right pictures move the base further than any wrong ones."""
    values = {m: runs.over_seeds(lambda s, m=m: gap(runs, s, m)) for m in KL_CONTROLS}
    others = {m: v.value for m, v in values.items() if m not in ("pre", "identical")}
    most = max(others, key=others.__getitem__)
    text = f"{values['pre'].value:.3f} nats; most under {KL_CONTROLS[most]}: {others[most]:.3f}"
    return Finding(text, values["pre"], values["pre"].value > others[most])


def gap_follows_gain(runs: Runs) -> Finding:
    """Whether tasks with a larger part of their gap closed also gain more accuracy."""
    tasks = runs.results.tasks("seed0/kl/summary.json")
    share = [runs.over_seeds(lambda s, t=t: closed(runs, s, "opsd", t)) for t in tasks]
    gain = [runs.over_seeds(lambda s, t=t: points_above(runs, s, "opsd", "base", t)) for t in tasks]
    by_share = sorted(range(len(tasks)), key=lambda i: share[i].value)
    by_gain = sorted(range(len(tasks)), key=lambda i: gain[i].value)
    text = "; ".join(
        f"{task.replace('_', ' ')}: closed {share[i].value:.0f} %, {gain[i].value:+.0f} points"
        for i, task in enumerate(tasks)
    )
    sources = joined(source for value in (*share, *gain) for source in value.sources)
    return Finding(text, Measured(share[0].value, sources), by_share == by_gain)


def entry(runs: Runs, claim: Claim) -> tuple[str | Number, ...]:
    """A row of the ledger."""
    said = (claim.text, claim.place, claim.value)
    seeds = f"{len(runs.seeds)} seeds" if len(runs.seeds) > 1 else "1 seed"
    command = f"{runs.plan.command} --only {claim.needs}; {runs.plan.config}; {seeds}"
    try:
        if claim.find is None:
            raise OtherScaleError
        found = runs.found(lambda: claim.find(runs))
    except OtherScaleError:
        return (*said, "–", "–", "not run at this scale", claim.why)
    if found is None:
        return (*said, missing(), command, "not run", "There are no results.")
    number = Number(found.text, found.value.value, "measured", found.value.sources)
    if runs.plan.quick:
        return (*said, number, command, "quick run", "A few updates and rows decide nothing.")
    status: Status = "holds" if found.holds else "differs"
    return (*said, number, command, status, f"Holds if {claim.rule}. {claim.why}".strip())


def ledger(runs: Runs, claims: tuple[Claim, ...]) -> list[Table]:
    """All claims: what is said and found, and, in a second table, by which rule and run."""
    rows = [entry(runs, claim) for claim in claims]
    numbered = [(f"{number}. {row[0]}", *row[1:]) for number, row in enumerate(rows, 1)]
    header = ("claim", "the paper says", "here", "status")
    short = tuple((claim, said, here, status) for claim, _, said, here, _, status, _ in numbered)
    title = "Claims of the paper, and what runs here say"
    more = ("claim", "place", "made by", "rule and reason")
    long = tuple((claim, place, made, why) for claim, place, _, _, made, _, why in numbered)
    return [
        Table("ledger", title, header, short),
        Table("ledger_rules", "Rules, reasons and commands", more, long),
    ]
