"""The ledger: what the paper claims, what runs of this repository say to it.

A claim reads its numbers from result files. Its status follows from them by the rule that stands
beside it, never by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from eval.artefacts.extras import KL_CONTROLS
from eval.artefacts.model import Measured, NotRun, Number, Table, joined, measured, missing
from eval.artefacts.results import OVERALL, sources_of
from eval.artefacts.runs import MEAN, Runs, p_value
from eval.artefacts.tables import closed, gap, points_above, seconds, swept, swept_values

Status = Literal["holds", "differs", "not run at this scale"]
CONTROL_LIMIT, MARGIN = 15.0, 40.0  # points of gap closed: of the noise control, and beyond it
FLAT = 5.0  # points of accuracy that count as "barely changed"


@dataclass(frozen=True)
class Finding:
    """What was measured: as it is shown, the numbers behind it, and whether the claim holds."""

    text: str
    value: Measured
    holds: bool


@dataclass(frozen=True)
class Claim:
    """A claim of the paper in our words.

    place, value: in the paper. rule: when it counts as holding. find: reads the results. needs:
    the artefact whose runs decide it; "" where no run of this size can. holds, differs: why, in
    either case.
    """

    text: str
    place: str
    value: str
    rule: str
    needs: str
    find: Callable[[Runs], Finding] | None = None
    holds: str = ""
    differs: str = ""


def _points(runs: Runs, first: str, second: str) -> Finding:
    found = runs.paired(first, second)
    d = found.difference
    seeds = ", ".join(f"{of_seed.value:+.1f}" for of_seed in found.per_seed)
    text = f"{d.value:+.1f} ({d.low:+.1f} .. {d.high:+.1f}), by seed {seeds}, p {p_value(found.p)}"
    return Finding(text, d, d.low > 0)


def beats(first: str, second: str) -> Callable[[Runs], Finding]:
    return lambda runs: _points(runs, first, second)


def _spread(value: Measured, form: str) -> str:
    return measured(value, form).text


def gap_exists(runs: Runs) -> Finding:
    k = runs.over_seeds(lambda seed: gap(runs, seed, "pre"))
    low = min(gap(runs, seed, "pre").low or 0.0 for seed in runs.seeds)
    return Finding(_spread(k, "{:.3f}") + " nats per token", k, low > 0)


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
    near = abs(found.value.value) <= FLAT
    return Finding(found.text, found.value, near)


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


def content_words(runs: Runs) -> Finding:
    """Whether content words carry more of the KL than function words."""
    words = runs.over_seeds(
        lambda seed: runs.results.value(f"seed{seed}/kl/tokens.json", "mean", id="content")
    )
    grammar = runs.over_seeds(
        lambda seed: runs.results.value(f"seed{seed}/kl/tokens.json", "mean", id="function")
    )
    text = f"{words.value:.3f} against {grammar.value:.3f} nats per token"
    return Finding(text, words, words.value > grammar.value)


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
    if claim.find is None:
        return (*said, "–", "–", "not run at this scale", claim.differs)
    seeds = f"{len(runs.seeds)} seeds" if len(runs.seeds) > 1 else "1 seed"
    command = f"{runs.plan.command} --only {claim.needs}; {runs.plan.config}; {seeds}"
    found = runs.found(lambda: claim.find(runs))
    if found is None:
        return (*said, missing(), command, "not run", "There are no results.")
    number = Number(found.text, found.value.value, "measured", found.value.sources)
    why = claim.holds if found.holds else claim.differs
    status: Status = "holds" if found.holds else "differs"
    return (*said, number, command, status, f"Holds if {claim.rule}. {why}".strip())


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
