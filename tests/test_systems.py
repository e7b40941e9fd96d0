"""Systems by name and protocols as data: every file opens, every mistake is named."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from data.example import DataError
from eval.backends.api import ApiSystem
from eval.backends.bagel import BagelConfig, BagelSystem
from eval.backends.tiny_vlm import write_tiny
from eval.backends.vlm import TransformersSystem
from eval.protocol import CONFIGS, Decoding, JudgeConfig, Protocol
from eval.systems import (
    SYSTEMS,
    fingerprint,
    is_sampled,
    known_systems,
    open_system,
    system_config,
)
from train.config import UsageError

MINI = Path("models/mini-base")
CPU = torch.device("cpu")
TABLE_2 = {
    "InternVL3.5-8B", "InternVL3.5-38B", "Qwen3-VL-8B", "Qwen3-VL-32B", "GPT-4o", "GPT-5",
    "Janus-Pro-7B", "Chameleon-7B", "BAGEL-7B", "ThinkMorph", "Text-only SFT",
    "Visual-OPSD-Noise", "Visual-OPSD",
}  # fmt: skip


def test_every_row_of_the_papers_table_is_a_file() -> None:
    configs = [system_config(name) for name in known_systems()]
    assert {config.title for config in configs} >= TABLE_2 | {"Gemini 2.5 Flash"}
    assert [config.name for config in configs] == known_systems()
    assert len({config.title for config in configs}) == len(configs)


@pytest.mark.parametrize("name", known_systems())
def test_every_file_has_known_keys_only(name: str) -> None:
    values = yaml.safe_load((SYSTEMS / f"{name}.yaml").read_text())
    model = system_config(name).model
    assert values.keys() <= {"name", "title", "note", "kind", *dataclasses.asdict(model)}


def test_another_checkpoint_and_another_name() -> None:
    plain, moved = system_config("opsd"), system_config("opsd=somewhere/0000900")
    assert plain.model_path == "checkpoints/visual-opsd-ema-beta0.5/latest"
    assert moved == dataclasses.replace(
        plain, model=BagelConfig("somewhere/0000900", "student", "auto")
    )
    late = system_config("late:opsd=somewhere")
    assert (late.name, late.title, late.model_path) == ("late", "late", "somewhere")
    assert system_config("gpt-4o=gpt-4o-mini").model_path == "gpt-4o-mini"


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("kind: bagel\nmodel_path: here\ncontext: interleaved\n")
    config = system_config(str(file))
    assert (config.name, config.title) == ("mine", "mine")
    assert config.model == BagelConfig("here", "interleaved", "auto")
    assert system_config(f"other:{file}=there").model == BagelConfig("there", "interleaved")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: bagle\nmodel_path: x", "kind is 'bagle'; expected one of bagel, transformers, api"),
        ("kind: bagel", "model_path is missing"),
        ("kind: bagel\nmodel_path: x\ncontxt: y", "unknown key contxt; it can have model_path"),
        ("kind: bagel\nmodel_path: x\ncontext: oracle", "context is 'oracle'; expected one of stu"),
        ("kind: bagel\nmodel_path: 3", "model_path is 3; expected str"),
        ("name: a/b\nkind: bagel\nmodel_path: x", "'a/b' names a folder too"),
        ("name: 5\nkind: bagel\nmodel_path: x", "name is 5; expected a text"),
        ("- kind", "expected keys and values"),
        ("kind: [", "is not yaml"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as raised:
        system_config(str(file))
    assert str(file) in str(raised.value) and words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="--systems opds: .*gpt-5, .*opsd.*thinkmorph"):
        system_config("opds")


def test_a_path_that_was_left_empty_is_refused() -> None:
    with pytest.raises(UsageError, match="--systems opsd=: no checkpoint behind the ="):
        system_config("opsd=")


def test_weights_replaced_under_one_path_have_another_fingerprint(tmp_path: Path) -> None:
    here, found = tmp_path / "here", set()
    for seed in (0, 1):
        shutil.rmtree(here, ignore_errors=True)
        write_tiny("janus", here, seed)
        found.add(fingerprint(system_config(f"janus-pro-7b={here}")))
    assert len(found) == 2
    mini = [system_config(f"{name}={MINI}") for name in ("opsd", "noise", "thinkmorph")]
    text, same, drawn = map(fingerprint, mini)
    assert text == same != drawn and fingerprint(system_config("gpt-5")) is None


def test_what_is_random_has_runs() -> None:
    greedy = Protocol("p")
    warm = dataclasses.replace(greedy, decoding=Decoding(temperature=0.3))
    assert [name for name in known_systems() if is_sampled(system_config(name), greedy)] == [
        "gpt-5", "interleaved-true", "teacher-crop", "teacher-noise", "thinkmorph",
        "thinkmorph-noise", "thinkmorph-none", "thinkmorph-shuffled",
    ]  # fmt: skip
    assert all(is_sampled(system_config(name), warm) for name in known_systems())


def test_each_kind_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny("qwen3_vl", tmp_path / "tiny")
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    protocol = Protocol.load("mini")
    found = [
        open_system(system_config(spec), protocol, CPU)
        for spec in (f"opsd={MINI}", f"qwen3-vl-8b={tmp_path / 'tiny'}", "gpt-4o")
    ]
    assert [type(system) for system in found] == [BagelSystem, TransformersSystem, ApiSystem]
    assert [system.name for system in found] == ["opsd", "qwen3-vl-8b", "gpt-4o"]


# --- protocols ------------------------------------------------------------------------------------


def test_the_papers_protocol_has_its_numbers() -> None:
    paper = Protocol.load("paper")
    assert (paper.decoding.max_new_tokens, paper.decoding.temperature) == (1024, 0.0)
    transform = paper.images.transform()
    assert (transform.max_image_size, transform.min_image_size, transform.image_stride) == (
        980, 378, 14,
    )  # fmt: skip
    assert transform.max_pixels == 2_007_040 and not paper.images.resize_first
    assert (paper.drawing.num_timesteps, paper.drawing.cfg_text_scale) == (50, 3.5)
    assert paper.judge is None and paper.batch_size == 1


def test_the_releases_protocol_has_the_harnesses_numbers() -> None:
    release = Protocol.load("release")
    assert (release.decoding.max_new_tokens, release.decoding.temperature) == (4096, 0.3)
    assert release.images.min_image_size == 224 and release.images.resize_first
    assert release.images.max_pixels == 14 * 14 * 9 * 1024
    guidance = release.drawing.params().guidance
    assert (guidance.text_scale, guidance.image_scale, guidance.interval) == (4.0, 2.0, (0.0, 1.0))
    assert guidance.renorm == "text_channel" and release.judge.model == "gpt-5"


def test_every_protocol_has_a_hash_of_what_decides() -> None:
    names = [file.stem for file in CONFIGS.glob("*.yaml")]
    assert sorted(names) == ["mini", "paper", "release"]
    assert len({Protocol.load(name).hash for name in names}) == 3
    paper = Protocol.load("paper")
    same = dataclasses.replace(paper, name="other", batch_size=8)
    assert same.hash == paper.hash
    for other in (
        dataclasses.replace(paper, decoding=Decoding(1023)),
        dataclasses.replace(paper, image_skips=1),
        dataclasses.replace(paper, judge=JudgeConfig("gpt-5")),
    ):
        assert other.hash != paper.hash
    patient = [dataclasses.replace(paper, judge=JudgeConfig("m", retries=n)) for n in (1, 9)]
    assert patient[0].hash == patient[1].hash


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\ndecodng: {}", "unknown key decodng"),
        ("decoding: {}", "name is missing"),
        ("name: x\ndecoding: 3", "decoding is 3; expected keys and values"),
        ("name: x\ndecoding: {max_new_tokens: 0}", "decoding: max_new_tokens is 0"),
        ("name: x\ndecoding: {temperature: -1}", "decoding: temperature is -1"),
        ("name: x\ndecoding: {temperature: warm}", "temperature is 'warm'; expected float"),
        ("name: x\nprompt: {layout: sideways}", "layout is 'sideways'; expected one of images_f"),
        ("name: x\ndrawing: {cfg_interval: [1]}", "cfg_interval is [1]; expected 2 numbers"),
        ("name: x\ndrawing: {num_timesteps: 1}", "num_timesteps"),
        ("name: x\nimages: {max_image_size: 10}", "image sizes need"),
        ("name: x\nbatch_size: 0", "batch_size is 0; it has to be 1 or more"),
        ("name: x\njudge: {}", "judge: model is missing"),
        ("name: x\njudge: {model: ''}", "judge: model is empty"),
    ],
)
def test_a_protocol_that_does_not_fit_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as raised:
        Protocol.load(file)
    assert str(file) in str(raised.value) and words in str(raised.value)


def test_image_limits_that_the_encoder_has_no_positions_for_are_refused() -> None:
    with pytest.raises(DataError, match="protocol paper: images: max_image_size 980"):
        open_system(system_config(f"opsd={MINI}"), Protocol.load("paper"), CPU)
