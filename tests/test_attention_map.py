"""Recorded attention against a float64 loop over heads and rows, and against the kernel itself."""

import dataclasses
import re

import pytest
import torch

from data.example import DataError
from eval import attention
from eval.attention import (
    SOURCES,
    TOTALS,
    Found,
    Part,
    columns,
    generated_rows,
    question_parts,
    sequences,
    shares_of,
    token_sources,
    values_of,
)
from eval.backends.bagel import BagelSystem
from eval.benchmarks import first_samples
from eval.protocol import Decoding, Drawing, Protocol
from inferencer import InterleaveInferencer
from modeling import attention_map
from modeling.attention import Plan, SDPAPlan, packed_plan, split_mask
from modeling.attention_map import (
    AttentionMismatchError,
    RecordingPlan,
    Shares,
    attention_shares,
    last_visible,
)
from modeling.bagel import text_logits
from modeling.sequence import Latent, Split, Text, pack
from tests import data_helpers
from tests.data_helpers import cell, write_source
from tests.test_interleaved import ASKING, CLOSING, Inferencer, photo
from tests.tiny_model import TOKENS, random_image, tiny_drawer
from tests.training import drawing_base
from train.records import read_records

DRAWING = Drawing(num_timesteps=3, cfg_text_scale=1.0, max_rounds=1)
# 8 + 8 text tokens around a picture of 2 x 3 latents and one of 3 x 3 patches
SEGMENTS = [
    Text(tuple(range(20, 26))),
    Latent(torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), 2, 3),
    random_image(3, 3),
    Text(tuple(range(40, 46))),
]
LENGTH = 8 + 8 + 11 + 8
GROUPS = [torch.arange(1, 7), torch.arange(28, 34)]
SOURCE_IDS = torch.arange(LENGTH) % 5


class Spy(Plan):
    """Keeps what the layers give and get."""

    def __init__(self, inner: Plan) -> None:
        super().__init__(inner.device)
        self.inner, self.calls = inner, []

    def __call__(self, q, k, v):
        self.calls.append((q, k, v))
        return self.inner(q, k, v)

    def _rebuilt(self, device):
        raise NotImplementedError


@pytest.fixture(scope="module")
def drawer():
    return tiny_drawer(seed=5)


def spied(model, batch, monkeypatch) -> list:
    """q, k and v of every layer of a plain forward."""
    spies = []

    def plan(*args):
        spies.append(Spy(packed_plan(*args)))
        return spies[-1]

    with monkeypatch.context() as patched:
        patched.setattr("modeling.bagel.packed_plan", plan)
        with torch.no_grad():
            model(batch)
    return spies[-1].calls  # the first ones are the image encoder's


def shares_by_hand(q, k, splits, rows, sources, count):
    """(S,) of one layer, a row and a head at a time."""
    mask, total = split_mask(splits), torch.zeros(count, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for row in rows.tolist():
        keys = mask[row].nonzero().flatten()
        for head in range(q.shape[1]):
            scores = k[keys, head // group].double() @ q[row, head].double()
            weights = torch.softmax(scores / q.shape[2] ** 0.5, 0)
            for key, weight in zip(keys.tolist(), weights, strict=True):
                total[sources[key]] += weight
    return total / (len(rows) * q.shape[1])


def looks(model, check=True, groups=GROUPS):
    return attention_shares(model, pack([SEGMENTS], TOKENS), groups, SOURCE_IDS, 5, check)


# --- the record -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_shares_are_those_of_a_loop_over_heads_and_rows(drawer, monkeypatch, backend):
    monkeypatch.setattr(drawer, "attention_backend", backend)
    batch = pack([SEGMENTS], TOKENS)
    found = looks(drawer)
    calls = spied(drawer, batch, monkeypatch)
    assert found.found.shape == (2, 2, 5) and len(calls) == 2
    for layer, (q, k, _) in enumerate(calls):
        assert q.shape[1] == 2 * k.shape[1]  # grouped kv-heads
        for number, rows in enumerate(GROUPS):
            expected = shares_by_hand(q, k, batch.samples[0], rows, SOURCE_IDS, 5)
            torch.testing.assert_close(found.found[layer, number], expected, atol=1e-6, rtol=0)
    assert (found.found - found.uniform).abs().max() > 0.02  # it does look somewhere


def test_shares_sum_to_one_and_the_uniform_ones_are_those_of_the_mask(drawer):
    found = looks(drawer)
    ones = torch.ones(2, 2, dtype=torch.float64)
    torch.testing.assert_close(found.found.sum(-1), ones, atol=1e-6, rtol=0)
    mask = split_mask(pack([SEGMENTS], TOKENS).samples[0]).double()
    even = mask / mask.sum(1, keepdim=True)
    for number, rows in enumerate(GROUPS):
        expected = [float(even[rows][:, s == SOURCE_IDS].sum(1).mean()) for s in range(5)]
        assert found.uniform[number].tolist() == pytest.approx(expected, abs=1e-12)


def test_every_visible_token_and_no_other_is_looked_at(drawer):
    """Sources are single tokens: those behind a row have nothing, its own and earlier ones some."""
    batch = pack([SEGMENTS], TOKENS)
    rows = [torch.tensor([row]) for row in range(LENGTH)]
    found = attention_shares(drawer, batch, rows, torch.arange(LENGTH), LENGTH, True)
    mask = split_mask(batch.samples[0])
    assert ((found.uniform > 0) == mask).all() and ((found.found[0] > 0) == mask).all()


def test_rows_by_parts_are_the_same(drawer, monkeypatch):
    whole, sizes = looks(drawer), []
    scores = attention_map.masked_scores
    monkeypatch.setattr(attention_map, "MAX_SCORES", 2 * 4 * LENGTH + 1)
    monkeypatch.setattr(
        attention_map, "masked_scores", lambda q, *rest: sizes.append(len(q)) or scores(q, *rest)
    )
    parts = looks(drawer)
    assert set(sizes) == {2}
    torch.testing.assert_close(parts.found, whole.found, atol=1e-7, rtol=0)


def test_the_wrapped_plan_gives_its_own_output(drawer):
    splits = (Split(5, "causal"),)
    q, k, v = (torch.randn(5, heads, 8) for heads in (4, 2, 2))
    record = attention_map._Record(
        [torch.arange(5)], torch.zeros(5, dtype=torch.long), 1, last_visible(splits), True
    )
    plan = RecordingPlan(SDPAPlan([splits], "cpu"), record, "cpu")
    assert plan(q, k, v).equal(SDPAPlan([splits], "cpu")(q, k, v)) and len(record.layers) == 1
    elsewhere = plan.to("meta")  # a device that holds no numbers: only whose record it is
    assert elsewhere.record is record and elsewhere.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_agrees_in_its_own_dtype(dtype):
    model = tiny_drawer(seed=5).to(dtype)
    assert looks(model).found.shape == (2, 2, 5)


def without_scale(q, keys, last):
    return scores_of(q, keys, last) * q.shape[-1] ** 0.5


def without_mask(q, keys, last):
    return scores_of(q, keys, torch.full_like(last, keys.shape[1]))


def other_kv_heads(q, keys, last):
    return scores_of(q, keys.flip(0), last)


scores_of = attention_map.masked_scores
WRONG = {f.__name__: f for f in (without_scale, without_mask, other_kv_heads)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG)
def test_the_kernel_finds_a_wrong_record(monkeypatch, wrong, dtype):
    model = tiny_drawer(seed=5).to(dtype)
    monkeypatch.setattr(attention_map, "masked_scores", WRONG[wrong])
    with pytest.raises(AttentionMismatchError, match="layer 0: recorded attention times v differs"):
        looks(model)
    looks(model, check=False)


def test_a_small_error_of_the_scale_is_found(drawer, monkeypatch):
    """A hundredth: far below what a wrong formula makes, far above rounding."""
    monkeypatch.setattr(attention_map, "masked_scores", lambda *args: 1.01 * scores_of(*args))
    with pytest.raises(AttentionMismatchError):
        looks(drawer)


def test_what_cannot_be_recorded_is_refused(drawer):
    batch = pack([SEGMENTS], TOKENS)
    two = pack([SEGMENTS, SEGMENTS], TOKENS)
    ids = torch.zeros(2 * LENGTH, dtype=torch.long)
    for arguments in (
        (two, GROUPS, ids, 1),
        (batch, GROUPS, ids, 1),
        (batch, [GROUPS[0][:0]], ids[:LENGTH], 1),
    ):
        with pytest.raises(ValueError, match="give one sample, a source for each token and no em"):
            attention_shares(drawer, *arguments)
    with pytest.raises(ValueError, match="noise splits"):
        last_visible([Split(3, "causal"), Split(4, "noise")])


# --- the sequence of an answer --------------------------------------------------------------------


def loaded(context: str, tokens: int = 6) -> BagelSystem:
    drawn = context != "student"
    inferencer = InterleaveInferencer.from_pretrained(drawing_base(), draws=drawn)
    return BagelSystem(
        context, inferencer, Protocol("t", Decoding(tokens), drawing=DRAWING), context
    )


def rows(count: int):
    return first_samples("Ragged", drawing_base().parent / "datasets", "train", count)


def test_every_token_has_its_source():
    parts = [
        *question_parts([Text((1, 2)), SEGMENTS[1], SEGMENTS[2], Text((3,))], True),
        Part("txt0", Text((4, 5, 6))),
        Part("img1_vae", SEGMENTS[1]),
        Part("img1_vit", SEGMENTS[2]),
        Part("txt1", Text((7, 8))),
    ]
    names = [SOURCES[number] for number in token_sources(parts)]
    picture = [["marks", *[f"{{}}_{kind}"] * n, "marks"] for kind, n in (("vae", 6), ("vit", 9))]
    pictures = [name.format(image) for image in ("img0", "img1") for p in picture for name in p]
    assert names == [
        *["system"] * 4, *pictures[:19], *["question"] * 3, *["txt0"] * 5, *pictures[19:],
        *["txt1"] * 4,
    ]  # fmt: skip
    batch = pack([[part.segment for part in parts]], TOKENS)
    written = [
        [int(batch.token_ids[batch.token_index == row]) for row in group]
        for group in generated_rows(parts)
    ]
    assert written == [[4, 5, 6], [7, 8]]
    bare = question_parts([Text((2,)), SEGMENTS[2], Text((3,))], False)
    assert [part.source for part in bare] == ["question", "img0_vit", "question"]


@pytest.mark.parametrize("context", ["interleaved", "interleaved_noise", "interleaved_shuffled"])
def test_the_sequence_gives_what_was_written_its_probability(context):
    """The one forward is the context of the answer: its log-probs are those of writing."""
    system, samples, seeds = loaded(context), rows(5), [3, 4, 5, 6, 7]
    answers = system.interleave(samples, seeds)
    inferencer, checked = system.inferencer, 0
    for parts, answer in zip(sequences(system, samples, seeds), answers, strict=True):
        if parts is None:
            continue
        for name, rollout in zip(("txt0", "txt1"), answer.rollouts, strict=True):
            segments = [
                dataclasses.replace(p.segment, loss=True) if p.source == name else p.segment
                for p in parts
            ]
            batch = pack([segments], inferencer.processor.tokenizer.special)
            with torch.no_grad():
                logprobs = inferencer.model(batch, head=text_logits).log_softmax(-1)
            found = logprobs[torch.arange(len(batch.labels)), batch.labels]
            count = len(rollout.logprobs)
            assert found[:count].tolist() == pytest.approx(list(rollout.logprobs), abs=1e-4)
            checked += 1
    assert checked >= 4


def test_a_text_only_answer_follows_its_own_context():
    system, samples = loaded("student"), rows(2)
    for parts, sample in zip(sequences(system, samples, [0, 0]), samples, strict=True):
        assert [p.source for p in parts] == ["system", "img0_vit", "question", "txt0"]
        (answer,) = system.answer([sample], [0])
        tokenizer = system.inferencer.processor.tokenizer
        assert tokenizer.decode(parts[-1].segment.token_ids) == answer.text
        shares = shares_of(system.inferencer, parts, check=True)
        assert shares.found.shape == (2, 1, len(SOURCES))


def test_an_answer_without_a_picture_or_with_an_empty_text_is_left_out(drawer):
    script = {9: [CLOSING], 10: [ASKING, ""], 11: [ASKING, CLOSING]}
    inferencer = Inferencer(drawer, script=script)
    system = BagelSystem("quiet", inferencer, Protocol("t", drawing=DRAWING), "interleaved")
    sample = dataclasses.replace(rows(1)[0], prompt=(photo(1), "?"))
    silent, empty, whole = sequences(system, [sample] * 3, list(script))
    assert silent is None and empty is None and whole[-1].source == "txt1"


# --- numbers and files ----------------------------------------------------------------------------


def invented(*values: float) -> list[Shares]:
    """Samples with one layer and one text, of which `img0_vit` has a share, `img0_vae` 0.1."""
    samples = []
    for value in values:
        row = torch.zeros(len(SOURCES), dtype=torch.float64)
        row[SOURCES.index("img0_vae")], row[SOURCES.index("img0_vit")] = 0.1, value
        row[SOURCES.index("system")] = 0.9 - value
        samples.append(Shares(row[None, None], row.flip(0)[None]))
    return samples


def test_shares_are_means_over_samples_and_overall_over_tasks():
    found = {"a": Found(invented(0.2, 0.4), 1), "b": Found(invented(0.8), 0), "c": Found([], 4)}
    values = values_of(found, "drawn", 0)
    assert list(values) == [("drawn/txt0/00", task) for task in ("a", "b", "overall")]
    a, b, overall = values.values()
    assert (a["img0_vit"], a["img0"], a["system"]) == pytest.approx((0.3, 0.4, 0.6))
    assert (b["img0"], overall["img0"], overall["img1"]) == pytest.approx((0.9, 0.65, 0.0))
    assert (a["n"], a["without"], overall["n"], overall["without"]) == (2, 1, 3, 5)
    assert (a["low"]["img0"], a["high"]["img0"]) == pytest.approx((0.3, 0.5))  # one sample twice
    assert b["low"]["img0"] == b["high"]["img0"] == pytest.approx(0.9)
    assert a["uniform"]["marks"] == pytest.approx(0.6)  # the invented row backwards
    assert columns(invented(0.2), 0)["uniform/marks"] == pytest.approx([0.7])


def flags(output, **changes) -> list[str]:
    root = drawing_base().parent
    values = {
        "model_path": root / "drawing", "data_root": root / "datasets", "tasks": "Visual_Search",
        "split": "validation", "limit_per_task": 3, "max_new_tokens": 6, "num_timesteps": 3,
        "device": "cpu", "batch_size": 2, "output_dir": output, **changes,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_command_writes_a_record_per_mode_text_layer_and_task(tmp_path, capsys):
    student = drawing_base().parent / "base"
    attention.main(flags(tmp_path, student_path=student))
    records = read_records(tmp_path / "attention.json")
    texts = [f"{mode}/{t}" for mode in ("drawn", "noise", "shuffled") for t in ("txt0", "txt1")]
    ids = [f"{text}/{layer:02}" for text in (*texts, "text/txt0") for layer in range(2)]
    assert {(r["id"], r["task"]) for r in records} == {
        (id, task) for id in ids for task in ("Visual_Search", "overall")
    }
    assert len(records) == 2 * len(ids)
    for record in records:
        values, is_text = record["values"], record["id"].startswith("text/")
        for shares in (values, values["uniform"]):
            assert sum(shares[name] for name in SOURCES) == pytest.approx(1, abs=1e-6)
            for name, parts in TOTALS.items():
                assert shares[name] == pytest.approx(sum(shares[part] for part in parts))
        for name in TOTALS:
            assert values["low"][name] <= values[name] + 1e-12
            assert values[name] <= values["high"][name] + 1e-12
        assert values["n"] + values["without"] == 3 and values["n"] > 0
        assert (values["img1"] > 0) == ("/txt1/" in record["id"])
        assert record["system"] == ("base" if is_text else "drawing")
        assert (values["img0_vae"] == 0) == is_text
    assert "drawn/txt1/uniform" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_rounds": 2}, "--max_rounds 2: attention is measured around one picture"),
        ({"limit_per_task": 0}, "--limit_per_task must be at least 1"),
        ({"student_path": "nowhere"}, "nowhere"),
        ({"tasks": "nothing"}, "nothing"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, changes, words):
    with pytest.raises(SystemExit) as stopped:
        attention.main(flags(tmp_path, **changes))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and words in error and "\n" not in error
    assert not (tmp_path / "attention.json").exists()


def test_a_model_that_never_asks_is_an_error(drawer):
    system = loaded("interleaved")
    system.interleave = lambda samples, seeds: loaded("interleaved_none").interleave(samples, seeds)
    args = attention.parse(flags("unused"))
    with pytest.raises(DataError, match="none of 3 answers has the texts and the picture"):
        attention.measure(system, [rows(3)], args, check=False)


def test_rows_without_visual_thoughts_cannot_be_shuffled(monkeypatch):
    plain = [dataclasses.replace(sample, example=None) for sample in rows(2)]
    monkeypatch.setattr(attention, "first_samples", lambda *args: plain)
    with pytest.raises(attention.UsageError, match="--modes shuffled: Ragged has no visual"):
        attention.read_tasks(attention.parse(flags("unused")))
    one = attention.read_tasks(attention.parse([*flags("unused"), "--modes", "drawn", "noise"]))
    assert one == [plain]


def test_a_task_that_cannot_be_shuffled_is_told_before_a_model_is_loaded(tmp_path, capsys):
    """Its one row that has any stands in for others, and nothing for it."""
    bare = [data_helpers.record(k, reasoning_image_0=cell(None)) for k in (1, 2)]
    for rows_of, words in (
        ([data_helpers.record(0)], "One, row p0: .* there is no other row"),
        ([*bare, data_helpers.record(0)], "One, row p0: .* none of the 2 other rows has any"),
    ):
        write_source(tmp_path, "One", rows_of, split="validation")
        places = {"tasks": "One", "data_root": tmp_path, "model_path": tmp_path / "nowhere"}
        with pytest.raises(SystemExit) as stopped:
            attention.main(flags(tmp_path / "out", **places))
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and "\n" not in error and re.search(words, error)
        assert "leave out the contexts and modes called shuffled" in error
        args = attention.parse([*flags("unused", **places), "--modes", "drawn", "noise"])
        ((*_, sample),) = attention.read_tasks(args)
        assert sample.id == "p0"


def test_what_was_measured_survives_a_later_failure(tmp_path, monkeypatch, capsys):
    measure = attention.measure

    def failing(system, *rest):
        if system.name == "noise":
            raise DataError("noise: nothing measured")
        return measure(system, *rest)

    monkeypatch.setattr(attention, "measure", failing)
    with pytest.raises(SystemExit):
        attention.main(flags(tmp_path))
    assert "nothing measured" in capsys.readouterr().err
    records = read_records(tmp_path / "attention.json")
    assert {record["id"].split("/")[0] for record in records} == {"drawn"}
    assert len(records) == 2 * 2 * 2  # texts, layers, the task and overall
