"""The token microscope: its numbers against the diagnostic and loops, its page as html."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from data.contexts import student_context, teacher_context
from data.processor import Processor
from data.token_classes import classes_of
from eval import kl_diagnostic, microscope
from eval.kl_scoring import Scorer
from eval.microscope import compared_entries, completions, divergences, look
from eval.microscope_page import EDGES, Header, Side, Slide, Token, number, page, shade, share
from modeling.generation import SamplingParams, generate
from modeling.pretrained import load_pretrained
from tests.data_helpers import image
from tests.eval_helpers import flags, write_world
from tests.test_kl_diagnostic import example
from train.kgen import Rows, completion_rows
from train.losses import JSDConfig
from train.records import RECORD_FIELDS, read_records

HEADER = Header("BASE", "STUDENT", "texts", "beta 0.5", 0.05, "INTRO", "NOW", "command, seed 1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def measured(world: Path) -> Path:
    """The diagnostic and the microscope on the same rows, of a student that is not the base."""
    student = world / "other"
    kl_diagnostic.main(
        flags(world, world / "kl", num_samples=8, batch_size=1, student_path=f"other={student}")
    )
    microscope.main(flags(world, world / "trained", num_samples=2, student_path=student))
    microscope.main(flags(world, world / "same", num_samples=2))
    return world


@pytest.fixture(scope="module")
def scorer(world: Path) -> Scorer:
    base, processor = load_pretrained(world / "base"), Processor.from_pretrained(world / "base")
    return Scorer(base, processor, seed=3)


@torch.no_grad()
def by_hand(scorer: Scorer, model, segments, token_ids) -> torch.Tensor:
    """Log-probs (T, V) in float64 at the rows that predict a completion."""
    rows = completion_rows(model, [segments], [token_ids], scorer.processor.tokenizer.special)
    logits = rows.hidden.double() @ rows.head.weight.double().T
    return logits.log_softmax(-1)[: len(token_ids)]


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "measure"), [("trained", "post:other"), ("same", "pre")])
def test_kl_is_that_of_the_diagnostic(measured: Path, folder: str, measure: str) -> None:
    known = read_records(measured / "kl" / "records.jsonl")
    found = read_records(measured / folder / "microscope.json")
    assert [record["id"] for record in found] == [record["id"] for record in known]
    for record, reference in zip(found, known, strict=True):
        values, expected = record["values"], reference["values"]
        assert [token["id"] for token in values["tokens"]] == expected["token_ids"]
        kl = [token["kl"] for token in values["tokens"]]
        assert kl == pytest.approx(expected["kl_t"][measure], abs=6e-7)  # saved to six digits
        assert values["mean_kl"] == pytest.approx(expected[measure], abs=1e-6)
    assert max(token["kl"] for r in found for token in r["values"]["tokens"]) > 1e-4


def test_every_number_of_a_token_by_hand(world: Path, scorer: Scorer) -> None:
    student = load_pretrained(world / "other")
    row, tokenizer = example(world), scorer.processor.tokenizer
    token_ids = tuple(tokenizer.encode("<think>go up</think><answer>b2</answer>"))
    slide = look(scorer, student, row, token_ids, JSDConfig(top_k=7, token_clip=0.002))
    teacher = by_hand(scorer, scorer.base, teacher_context(row, scorer.processor), token_ids)
    ours = by_hand(scorer, student, student_context(row, scorer.processor), token_ids)
    assert [token.id for token in slide.tokens] == list(token_ids)
    assert [token.text for token in slide.tokens] == [tokenizer.decode([id]) for id in token_ids]
    assert [token.token_class for token in slide.tokens] == classes_of(token_ids, tokenizer)
    for token, p, q in zip(slide.tokens, teacher.exp(), ours.exp(), strict=True):
        assert token.kl == pytest.approx(float((p * (p / q).log()).sum()), abs=2e-6)
        assert token.teacher.p == pytest.approx(float(p[token.id]), rel=1e-4)
        assert token.student.p == pytest.approx(float(q[token.id]), rel=1e-4)
        for side, shares in ((token.teacher, p), (token.student, q)):
            assert side.entropy == pytest.approx(float(-(shares * shares.log()).sum()), rel=1e-4)
            best = shares.topk(5)
            assert [id for _, id, _ in side.top] == best.indices.tolist()
            assert [text for text, _, _ in side.top] == [
                tokenizer.decode([id]) for id in best.indices.tolist()
            ]
            assert [x for _, _, x in side.top] == pytest.approx(best.values.tolist(), rel=1e-4)
        kept = p.topk(7).indices
        p, q = p[kept] / p[kept].sum(), q[kept] / q[kept].sum()
        m = (p + q) / 2
        terms = 0.5 * p * (p / m).log() + 0.5 * q * (q / m).log()
        assert token.jsd == pytest.approx(float(terms.clamp(max=0.002).sum()), abs=2e-6)
        assert (token.clipped, token.entries) == (int((terms > 0.002).sum()), 7)
    assert slide.mean_kl == pytest.approx(sum(t.kl for t in slide.tokens) / len(token_ids))
    assert len({token.clipped for token in slide.tokens}) > 1  # the limit is neither all nor none


def test_the_temperature_is_of_the_divergence_alone(world: Path, scorer: Scorer) -> None:
    student = load_pretrained(world / "other")
    row, tokenizer = example(world), scorer.processor.tokenizer
    token_ids = tuple(tokenizer.encode("<think>up</think>"))
    config = JSDConfig(top_k=0, clip_mode="off", temperature=2.0)
    warm = look(scorer, student, row, token_ids, config).tokens
    cold = look(scorer, student, row, token_ids, JSDConfig(top_k=0, clip_mode="off")).tokens
    teacher = by_hand(scorer, scorer.base, teacher_context(row, scorer.processor), token_ids)
    ours = by_hand(scorer, student, student_context(row, scorer.processor), token_ids)
    for token, other, p, q in zip(warm, cold, teacher, ours, strict=True):
        p, q = (p / 2).softmax(-1), (q / 2).softmax(-1)
        m = (p + q) / 2
        jsd = 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum()
        assert token.jsd == pytest.approx(4 * float(jsd), abs=2e-6)
        assert (token.kl, token.teacher, token.student) == (other.kl, other.teacher, other.student)
    assert max(abs(t.jsd - o.jsd) for t, o in zip(warm, cold, strict=True)) > 1e-4
    args = microscope.parse(["--output_dir", "unused", "--jsd_temperature", "2.0"])
    assert microscope.jsd_config(args).temperature == 2.0


def test_clipped_entries_are_counted_in_every_mode() -> None:
    """Two rows over four entries whose distributions are set by hand."""
    head = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.eye_(head.weight)
    p = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    q = torch.tensor([[0.1, 0.7, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    sides = Rows(p.log(), head), Rows(q.log(), head)
    term = 0.5 * 0.7 * math.log(0.7 / 0.4) + 0.5 * 0.1 * math.log(0.1 / 0.4)
    for config, rows, counts, entries in (
        (JSDConfig(top_k=0, token_clip=0.01), [0.02, 0.0], [2, 0], 4),
        (JSDConfig(top_k=0, clip_mode="off"), [2 * term, 0.0], [0, 0], 4),
        (JSDConfig(top_k=2, top_k_mode="tail", token_clip=1.0), None, [0, 0], 3),
        (JSDConfig(top_k=2, top_k_mode="none", token_clip=0.01), None, None, 2),
    ):
        jsd, clipped = divergences(*sides, config)
        assert compared_entries(config, 4) == entries
        if rows is not None:
            assert jsd == pytest.approx(rows, abs=1e-6)
        if counts is not None:
            assert clipped == counts


def test_written_completions_are_those_of_the_student(world: Path, scorer: Scorer) -> None:
    student, row = load_pretrained(world / "other"), example(world)
    tokenizer = scorer.processor.tokenizer
    (greedy,) = completions("greedy", scorer, student, [row], 6)
    context = student_context(row, scorer.processor)
    (alone,) = generate(student, [context], tokenizer, SamplingParams(6, 0.0, 0))
    assert greedy == alone.token_ids != ()
    (sampled,) = completions("sample", scorer, student, [row], 6)
    (expected,) = Scorer(student, scorer.processor, 3).completions([row], "sample", 6)
    assert sampled == expected


def test_records_name_their_origin(measured: Path) -> None:
    records = read_records(measured / "trained" / "microscope.json")
    assert len(records) == 8 and set(RECORD_FIELDS) <= set(records[0])
    assert {record["kind"] for record in records} == {"microscope"}
    values = records[0]["values"]
    assert (values["student"], values["completion"]) == ("other", "dataset")
    assert (values["jsd"]["beta"], values["jsd"]["token_clip"]) == (0.5, 0.05)
    assert values["jsd"]["temperature"] == 1.0
    assert ", temperature 1.0, clip 0.05" in (measured / "trained/microscope.html").read_text()
    assert set(values["tokens"][0]) == {
        "text", "id", "kl", "jsd", "clipped", "entries", "class", "teacher", "student",
        "teacher_p", "student_p", "teacher_entropy", "student_entropy",
    }  # fmt: skip
    assert all(len(token["teacher"]) == 5 for token in values["tokens"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_samples": 0}, "--num_samples must be at least 1, got 0"),
        ({"num_samples": 100}, "Visual_Search: 6 usable validation rows, --num_samples 100"),
        ({"jsd_temperature": 0.0}, "--jsd_temperature=0.0 must be positive"),
        ({"jsd_beta": 0.0}, "--jsd_beta=0.0 with an entry clip of 0.05"),
        ({"student_path": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_named(world: Path, tmp_path: Path, capsys, changes, words) -> None:
    with pytest.raises(SystemExit) as stopped:
        microscope.main(flags(world, tmp_path, **changes))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- the page -------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Elements with their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self.hidden = "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        self.hidden = tag in ("style", "script")

    def handle_endtag(self, tag) -> None:
        self.hidden = False

    def handle_data(self, data) -> None:
        self.text += "" if self.hidden else data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def slide(row, *tokens: tuple[str, float, int]) -> Slide:
    said = Side((("<b>x", 1, 0.9), (" y", 2, 0.05)), 0.9, 0.5)
    made = [
        Token(text, 1, "tag", kl, 0.01, clipped, 256, said, said) for text, kl, clipped in tokens
    ]
    return Slide(row, tuple(made))


def hostile(world: Path):
    row = example(world)
    text = '</section><script>alert(1)</script>" onload="x & \u202e'
    thoughts = (image(1), image(2, (2000, 500)))
    changes = {"question": text, "answer": text, "pid": text, "visual_thoughts": thoughts}
    return type(row)(**{**row.__dict__, **changes})


def test_the_page_needs_nothing_and_all_text_is_escaped(world: Path) -> None:
    row = hostile(world)
    found = Reader(page([slide(row, ("<script>", 0.2, 0), ('"x', 0.0, 1))], HEADER))
    names = [tag for tag, _ in found.elements]
    assert names.count("script") == 1 and names.count("section") == 1 and "link" not in names
    assert found.text.count("<script>") >= 3 and "\u202e" not in found.text
    assert "[U+202E]" in found.text
    for _, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert attributes.get("href", "#").startswith("#")
    assert len(found.all("img")) == 3  # the problem and two visual thoughts
    assert "url(" not in page([slide(row, ("a", 0.0, 0))], HEADER)


def test_every_token_leads_to_its_row(measured: Path) -> None:
    text = (measured / "trained" / "microscope.html").read_text()
    found, records = Reader(text), read_records(measured / "trained" / "microscope.json")
    tokens = [a for a in found.all("a") if "t" in a.get("class", "").split()]
    rows = [a["id"] for a in found.all("tr") if "id" in a]
    counts = [len(record["values"]["tokens"]) for record in records]
    assert [a["href"] for a in tokens] == [f"#{id}" for id in rows]
    assert rows == [f"s{s}t{t}" for s, count in enumerate(counts) for t in range(count)]
    assert len(found.all("li")) >= 10 * sum(counts)  # five choices of either side
    flat = [token for record in records for token in record["values"]["tokens"]]
    for attributes, token in zip(tokens, flat, strict=True):
        classes = attributes["class"].split()
        assert f"k{sum(token['kl'] >= edge for edge in EDGES)}" in classes
        assert ("clip" in classes) == (token["clipped"] > 0)
    cells = re.findall(r'<td data-label="KL, nats">(.*?)</td>', text)
    assert cells == [number(token["kl"]) for token in flat]
    assert records[0]["command"].split()[0] in found.text and "commit" in found.text


def test_white_space_is_seen(world: Path) -> None:
    text = page([slide(example(world), (" a", 0.0, 0), ("\n", 0.0, 0), ("", 0.0, 0))], HEADER)
    (tokens,) = re.findall(r'<p class="tokens">(.*?)</p>', text)
    assert [Reader(part).text for part in tokens.split("</a>")][:3] == ["·a", "↵", "∅"]
    assert tokens.count("<br>") == 1


def test_shades_and_numbers_round_to_nothing_that_is_wrong() -> None:
    assert [shade(x) for x in (-1e-9, 0.0, 0.0029, 0.003, 0.5, 1.0, 9.0)] == [0, 0, 0, 1, 5, 6, 6]
    assert [number(x) for x in (0.0, 1e-5, -1e-9, 0.12345)] == [
        "0.0000", "&lt; 0.0001", "&lt; 0.0001", "0.1235",
    ]  # fmt: skip
    assert [share(x) for x in (0.0, 1e-4, 0.5, 0.9996, 1.0)] == [
        "0.0 %", "&lt; 0.1 %", "50.0 %", "&gt; 99.9 %", "100.0 %",
    ]  # fmt: skip
