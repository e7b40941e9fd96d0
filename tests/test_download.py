"""download_model.py: what is asked of the hub, what is found in a folder, and the memory it names.

The hub is replaced by functions that record or raise; folders are written here.
"""

import errno
import json
import math
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

import download_model
from data.miniworld.write import write_shards
from download_model import DATA_SETS, MODELS, main
from modeling.autoencoder import AutoEncoder
from modeling.bagel import Bagel
from modeling.config import VAEConfig
from modeling.pretrained import RECOMPUTED, is_generation_key, load_pretrained, save_pretrained
from tests.data_helpers import record, write_source
from tests.golden_checks.names import FULL_SIZE
from tests.tiny_model import TINY_CONFIG, tiny_bagel

ROOT = Path(__file__).parents[1]
MINI = ROOT / "models" / "mini-base"
TINY_VAE = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)
COMMIT = "1234567890" * 4
KEY = "connector.fc1.bias"


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A folder that has everything: both experts, latent heads, autoencoder, tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_pretrained(tiny_bagel(visual_gen=True).state_dict(), TINY_CONFIG, folder)
    save_file(AutoEncoder(TINY_VAE).state_dict(), folder / "ae.safetensors")
    table = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
    (folder / "vae_config.json").write_text(json.dumps(table))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI / name, folder)
    return folder


@pytest.fixture
def folder(complete, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(complete, tmp_path / "model")


@pytest.fixture
def verify(capsys, monkeypatch):
    """verify(folder) -> exit status and lines of the report; huggingface_hub cannot be imported."""

    def run(folder) -> tuple[int, list[str]]:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        code = main(["--verify-only", str(folder)])
        return code, capsys.readouterr().out.splitlines()

    return run


def problems(lines: list[str]) -> list[str]:
    found = [line.partition("PROBLEM: ")[2] for line in lines if "PROBLEM: " in line]
    count = len(found)
    assert lines[-1] == ("complete" if not count else f"{count} problem{'s' * (count > 1)}")
    return found


def only_problem(result: tuple[int, list[str]]) -> str:
    code, lines = result
    (problem,) = problems(lines)
    assert code == 1
    return problem


def line_of(lines: list[str], label: str) -> str:
    (line,) = [line for line in lines if line.startswith(f"  {label} ")]
    return line.removeprefix(f"  {label} ").strip()


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


# ---- checkpoint folders ------------------------------------------------------------------------


def test_a_complete_folder(verify, complete):
    code, lines = verify(complete)
    assert code == 0 and problems(lines) == []
    keys = len(load_file(complete / "model.safetensors"))
    assert line_of(lines, "weights") == f"model.safetensors: {keys} keys fit"
    assert line_of(lines, "autoencoder").endswith(" keys fit")
    assert line_of(lines, "tokenizer") == "440 entries"
    assert line_of(lines, "drawing") == "can draw"
    columns = {line.index(word) for line, word in zip(lines[1:3], ("decoder", "440"), strict=True)}
    assert len(columns) == 1  # aligned


@pytest.mark.parametrize("name", ["model.safetensors", "ae.safetensors"])
@pytest.mark.parametrize("lost", [1, 40_000])
def test_a_truncated_file_is_named_with_both_sizes(verify, folder, name, lost):
    file = folder / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-lost])
    assert only_problem(verify(folder)) == (
        f"{name} is truncated: {len(whole):,} bytes expected, {len(whole) - lost:,} there; "
        f"remove {file} and download again"
    )


def test_a_file_cut_off_in_its_header(verify, folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for kept, least in ((0, 8), (5, 8), (8, 8 + header), (2000, 8 + header)):
        file.write_bytes(whole[:kept])
        problem = only_problem(verify(folder))
        expected = f"is truncated: more than {least:,} bytes expected, {kept:,} there; remove"
        assert expected in problem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html><html><body>Not Found</body></html>", "is not a safetensors file"),
        (bytes(4096), "is not a safetensors file"),
    ],
)
def test_a_file_that_is_something_else(verify, folder, content, said):
    (folder / "model.safetensors").write_bytes(content)
    assert f"model.safetensors {said}" in only_problem(verify(folder))


def test_a_file_with_bytes_too_many(verify, folder):
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with file.open("ab") as handle:
        handle.write(b"more")
    problem = only_problem(verify(folder))
    assert "damaged (" in problem and f"{size:,} bytes expected, {size + 4:,} there" in problem


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(KEY), f"1 missing (first: {KEY})"),
        (lambda t: t.update({"lora.A": torch.zeros(2)}), "1 unexpected (first: lora.A)"),
        (
            lambda t: t.update({KEY: torch.zeros(3)}),
            f"1 of another shape (first: {KEY} has (3,), not (64,))",
        ),
        (lambda t: t.pop("llm2vae.bias"), "1 missing (first: llm2vae.bias)"),
        (
            lambda t: [t.pop(key) for key in list(t) if "moe_gen" in key],
            "29 missing (first: language_model.model.layers.0.input_layernorm_moe_gen.weight, ",
        ),
    ],
)
def test_weights_that_do_not_fit(verify, folder, change, said):
    rewrite(folder / "model.safetensors", change)
    assert only_problem(verify(folder)).startswith(f"model.safetensors: {said}")


def test_the_fixed_tables_may_be_absent_or_of_another_side(verify, folder):
    file = folder / "model.safetensors"
    rewrite(file, lambda t: t.update({RECOMPUTED[1]: torch.zeros(16, 64)}))
    assert verify(folder)[0] == 0
    rewrite(file, lambda t: [t.pop(key) for key in RECOMPUTED])
    assert verify(folder)[0] == 0


def test_an_autoencoder_that_does_not_fit(verify, folder):
    rewrite(folder / "ae.safetensors", lambda t: t.pop("decoder.conv_in.bias"))
    assert only_problem(verify(folder)) == "ae.safetensors: 1 missing (first: decoder.conv_in.bias)"


def test_without_an_autoencoder_it_cannot_draw(verify, folder):
    (folder / "ae.safetensors").unlink()
    code, lines = verify(folder)
    assert code == 0 and lines[-1] == "complete"
    assert line_of(lines, "drawing").startswith("cannot draw: no ae.safetensors. Text, ")


def test_the_understanding_path_alone_is_complete_for_text(verify, folder):
    def reduce(tensors):
        for key in filter(is_generation_key, list(tensors)):
            if key not in RECOMPUTED:  # a table of positions alone is no head
                del tensors[key]

    rewrite(folder / "model.safetensors", reduce)
    (folder / "ae.safetensors").unlink()
    code, lines = verify(folder)
    assert code == 0 and lines[-1] == "complete"
    lacking = "no generation expert, no latent heads, no ae.safetensors"
    assert line_of(lines, "drawing").startswith(f"cannot draw: {lacking}. Text, Visual-OPSD")
    load_pretrained(folder)  # as the report says


def test_the_miniature_base(verify):
    code, lines = verify(MINI)
    keys = load_file(MINI / "model.safetensors").keys()
    assert code == 0 and problems(lines) == []
    heads = "llm2vae.weight" in keys
    draws = heads and (MINI / "ae.safetensors").is_file()
    assert line_of(lines, "drawing").startswith("can draw" if draws else "cannot draw: ")
    assert ("no latent heads" in line_of(lines, "drawing")) == (not heads)
    assert f"{len(keys)} keys fit" in line_of(lines, "weights")


@pytest.fixture
def sharded(folder):
    """The same weights in shards."""
    state = load_pretrained(folder, experts="all").state_dict()
    save_pretrained(state, TINY_CONFIG, folder, max_shard_bytes=100_000)
    return folder


def test_shards(verify, sharded):
    _, lines = verify(sharded)
    assert problems(lines) == []
    assert line_of(lines, "weights").startswith("model.safetensors.index.json: ")
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[1].unlink()
    assert only_problem(verify(sharded)).endswith(f"keys fit; 1 shard missing: {shards[1].name}")


def test_a_truncated_shard_and_one_of_another_download(verify, sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    key = min(load_file(second))
    rewrite(second, lambda tensors: tensors.pop(key))
    size = first.stat().st_size
    first.write_bytes(first.read_bytes()[:-1])
    code, lines = verify(sharded)
    truncated, lacks = problems(lines)
    assert f"{first.name} is truncated: {size:,} bytes expected, {size - 1:,} there" in truncated
    assert lacks == f"{second.name} lacks 1 of the keys of the index (first: {key})"


def test_an_index_for_other_libraries_is_no_second_set_of_weights(verify, folder):
    (folder / "model.safetensors").rename(folder / "ema.safetensors")
    table = dict.fromkeys(load_file(folder / "ema.safetensors"), "ema.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    code, lines = verify(folder)
    assert code == 0
    assert any("index.json points to ema.safetensors" in line for line in lines)
    (folder / "ema.safetensors").unlink()
    assert "keys fit; 1 shard missing: ema.safetensors" in only_problem(verify(folder))


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_a_broken_index(verify, sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json is not an index" in only_problem(verify(sharded))


def test_files_that_are_missing(verify, folder):
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "llm_config.json").unlink()
    code, lines = verify(folder)
    config, tokenizer, weights = problems(lines)
    assert "llm_config.json not found" in config
    assert f"no tokenizer in {folder}" in tokenizer
    assert weights.startswith("no ema.safetensors or model.safetensors")
    assert weights.endswith("(safetensors files there: ae.safetensors, weights.safetensors)")


def test_configurations_that_cannot_be_read(verify, folder):
    (folder / "vit_config.json").write_text('{"hidden_size": 32, ')
    (folder / "vae_config.json").write_text("<html>")
    _, lines = verify(folder)
    assert [problem.partition(" (")[0] for problem in problems(lines)] == [
        "vae_config.json is not valid json",
        "vit_config.json is not valid json",
    ]


def test_a_folder_that_is_no_checkpoint(verify, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    problem = only_problem(verify(tmp_path))
    assert problem.startswith("neither a checkpoint (llm_config.json, ") and "data set" in problem


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert main(["--verify-only", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'nowhere'} is not a folder: name one that a download has filled\n"
    )


# ---- full size ---------------------------------------------------------------------------------


def test_every_key_of_the_full_size(verify, tmp_path):
    """Configurations and index alone: the keys are compared both ways, the shards missed."""
    with torch.device("meta"):
        keys = sorted(Bagel(FULL_SIZE, visual_gen=True).state_dict())
    FULL_SIZE.save_pretrained(tmp_path)
    shutil.copy(MINI / "tokenizer.json", tmp_path)
    shards = [f"model-{n:05d}-of-00006.safetensors" for n in range(1, 7)]
    table = {key: shards[n * 6 // len(keys)] for n, key in enumerate(keys)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    code, lines = verify(tmp_path)
    missing = f"6 shards missing: {', '.join(shards[:4])}, ..."
    assert code == 1
    assert problems(lines) == [f"{index.name}: 1,223 keys fit; {missing}"]
    text_only, opsd = (
        next(s for s in lines if name in s) for name in ("text-only inf", "  Visual-OPSD  ")
    )
    values = 8_035_157_408  # of the understanding path
    tables = 4900 * 3584
    assert text_only.split()[-2:] == [f"{(2 * values + 4 * tables) / 2**30:.1f}", "-"]
    assert opsd.split()[-2:] == [
        f"{(22 * values + 12 * tables) / 2**30:.1f}",
        f"{(20 * values / 8 + 2 * values + 12 * tables) / 2**30:.1f}",
    ]

    dropped = "language_model.model.layers.27.mlp_moe_gen.up_proj.weight"
    table["language_model.model.layers.28.mlp.up_proj.weight"] = table.pop(dropped)
    index.write_text(json.dumps({"weight_map": table}))
    assert only_problem(verify(tmp_path)) == (
        f"{index.name}: 1 missing (first: {dropped}); "
        f"1 unexpected (first: language_model.model.layers.28.mlp.up_proj.weight); {missing}"
    )


# ---- memory ------------------------------------------------------------------------------------


def test_memory_in_closed_form():
    """Every count written out for the tiny configuration, apart from the code of the model."""
    D, FF, V, layers, kv, head = 64, 96, 512, 2, 32, 16
    d, ff, patches, patch_dim, kept = 32, 48, 8 * 8, 3 * 4 * 4, 2
    attention = 2 * (D * D) + D + 2 * (D * kv + kv) + 2 * head
    decoder = layers * (attention + 3 * D * FF + 2 * D) + D
    block = 4 * (d * d + d) + (d * ff + ff) + (ff * d + d) + 4 * d
    image = patch_dim * d + d + patches * d + kept * block + 2 * d
    connector = d * D + D + D * D + D
    und = 2 * V * D + decoder + image + connector
    heads = (256 * D + D + D * D + D) + (64 * D + D) + (D * 64 + 64)
    whole = und + decoder + heads
    with torch.device("meta"):
        model, autoencoder = Bagel(TINY_CONFIG, visual_gen=True), AutoEncoder(TINY_VAE)
    vae = sum(math.prod(value.shape) for value in autoencoder.state_dict().values())
    table, latents = 4 * patches * D, 4 * 8 * 8 * D  # bytes of the fixed tables
    text, drawing, opsd, sft = download_model.stages(model, autoencoder)
    assert text.each_of(1) == 2 * und + table
    assert drawing.each_of(1) == 2 * (whole + vae) + table + latents
    # master weights, gradients, two moments, EMA teacher; the rollout copy on every GPU
    assert opsd.each_of(1) == (4 + 4 + 8 + 4) * und + 2 * und + 3 * table
    assert opsd.each_of(8) == math.ceil(20 * und / 8) + 2 * und + 3 * table
    assert sft.each_of(1) == (4 + 4 + 8) * whole + 4 * vae + table + latents
    assert sft.each_of(8) == math.ceil(16 * whole / 8) + 4 * vae + table + latents


def test_what_comes_on_top_is_said(verify, complete):
    _, lines = verify(complete)
    start = next(n for n, line in enumerate(lines) if line.startswith("  memory in MiB "))
    names = [line[2:28].strip() for line in lines[start + 1 : start + 5]]
    assert names == [
        "text-only inference, bf16",
        "drawing, bf16",
        "Visual-OPSD",
        "interleaved SFT",
    ]
    assert "activations" in lines[start + 5] and "KV cache" in lines[start + 6]


# ---- data sets ---------------------------------------------------------------------------------


def test_a_data_set(verify, tmp_path):
    write_source(tmp_path, "Toy", [record(i) for i in range(7)], files=2)
    code, lines = verify(tmp_path / "Toy")
    assert code == 0
    assert [line.split(maxsplit=1)[1] for line in lines[1:3]] == [
        "train-00000-of-00002.parquet: 4 rows",
        "train-00001-of-00002.parquet: 3 rows",
    ]
    assert line_of(lines, "train") == "7 rows to train on"
    assert lines[-1] == "complete"


def test_row_counts_of_the_released_sets(verify, tmp_path):
    (tmp_path / "Visual_Search" / "data").mkdir(parents=True)
    write_shards(tmp_path / "Visual_Search" / "data", "Visual_Search", "train", 6, 0, range(1))
    code, lines = verify(tmp_path / "Visual_Search")
    assert code == 0 and lines[-1] == "complete"
    assert line_of(lines, "train") == (
        "warning: 6 rows to train on, the released Visual_Search has 6,990"
    )


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_a_truncated_parquet_file_is_named(verify, tmp_path, kept):
    write_source(tmp_path, "Toy", [record(i) for i in range(6)], files=2)
    file = tmp_path / "Toy" / "data" / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:kept])
    code, lines = verify(tmp_path / "Toy")
    (problem,) = problems(lines)
    what = "is truncated: its end is missing" if kept in (100, -1) else "is not a parquet file"
    assert code == 1
    assert problem.startswith(f"{file.name} {what}, {file.stat().st_size:,} bytes there (")
    assert line_of(lines, "train") == "3 rows to train on"


def test_columns_that_training_needs(verify, tmp_path):
    rows = [record(i, reasoning_image_0=...) for i in range(3)]
    write_source(tmp_path, "Toy", rows)
    assert "missing column(s) reasoning_image_0" in only_problem(verify(tmp_path / "Toy"))
    write_source(tmp_path, "Plain", [record(i, full_text_only_thought=...) for i in range(3)])
    code, lines = verify(tmp_path / "Plain")
    assert code == 0
    assert line_of(lines, "columns").startswith("warning: no full_text_only_thought")


def test_a_data_set_without_a_training_split(verify, tmp_path):
    write_source(tmp_path, "Toy", [record(0)], split="test")
    problem = only_problem(verify(tmp_path / "Toy"))
    assert "*train*.parquet (present: test-00000-of-00001.parquet)" in problem


# ---- the hub -----------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path, complete):
    """Replaces the hub: records calls, and fills the folder with a checkpoint or a data set."""
    calls = []

    def repo_info(repo_id, *, repo_type=None, revision=None):
        calls.append(("repo_info", repo_id, repo_type, revision))
        return SimpleNamespace(sha=COMMIT)

    def snapshot_download(repo_id, **keywords):
        calls.append(("snapshot_download", repo_id, keywords))
        folder = Path(keywords["local_dir"])
        if keywords["repo_type"] == "model":
            shutil.copytree(complete, folder, dirs_exist_ok=True)
        else:
            write_source(folder.parent, folder.name, [record(0)])

    monkeypatch.setattr(huggingface_hub, "repo_info", repo_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VISUAL_OPSD_DATA_ROOT", raising=False)
    return calls


def test_a_model_is_fetched_and_verified(hub, capsys):
    assert main(["ThinkMorph-7B"]) == 0
    assert hub == [
        ("repo_info", "ThinkMorph/ThinkMorph-7B", "model", None),
        (
            "snapshot_download",
            "ThinkMorph/ThinkMorph-7B",
            {
                "repo_type": "model",
                "revision": COMMIT,
                "local_dir": Path("models/ThinkMorph-7B"),
                "allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.md"],
                "max_workers": 8,
            },
        ),
    ]
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        f"https://huggingface.co/ThinkMorph/ThinkMorph-7B, commit {COMMIT}, to models/ThinkMorph-7B"
    )
    assert out[1] == "models/ThinkMorph-7B, a checkpoint" and out[-1] == "complete"


def test_the_arguments_are_those_of_the_client(hub):
    """What is recorded above is accepted by the installed huggingface_hub."""
    main(["Jigsaw_Assembly"])
    keywords = hub[-1][2]
    real = signature(huggingface_hub.HfApi.snapshot_download).parameters
    assert set(keywords) <= set(real)


def test_flags_reach_the_client(hub):
    flags = ["--repo-id", "me/mine", "--save-dir", "here", "--revision", "v2", "--max-workers", "3"]
    patterns = ["--allow-pattern", "*.json", "--allow-pattern", "ema.safetensors"]
    assert main(["BAGEL-7B-MoT", *flags, *patterns]) == 0
    assert hub[0] == ("repo_info", "me/mine", "model", "v2")
    keywords = hub[1][2]
    assert hub[1][1] == "me/mine" and keywords["local_dir"] == Path("here")
    assert keywords["allow_patterns"] == ["*.json", "ema.safetensors"]
    assert keywords["max_workers"] == 3


def test_a_repository_without_a_known_name_is_a_model(hub):
    assert main(["--repo-id", "me/Mine-7B"]) == 0
    assert hub[1][2]["local_dir"] == Path("models/Mine-7B")
    assert hub[1][2]["repo_type"] == "model"


@pytest.mark.parametrize("root", [None, "elsewhere"])
def test_data_sets_land_where_they_are_read(hub, monkeypatch, root, capsys):
    if root:
        monkeypatch.setenv("VISUAL_OPSD_DATA_ROOT", root)
    assert main(["Visual_Search", "all-data"]) == 0
    fetched = [call for call in hub if call[0] == "snapshot_download"]
    assert [repo for _, repo, _ in fetched] == list(DATA_SETS.values())  # each of them once
    for (_, _, keywords), name in zip(fetched, DATA_SETS, strict=True):
        assert keywords["local_dir"] == Path(root or "datasets") / name
        assert keywords["repo_type"] == "dataset"
        assert "data/*.parquet" in keywords["allow_patterns"]
    out = capsys.readouterr().out
    assert "https://huggingface.co/datasets/ThinkMorph/Chart_Refocus, commit " in out
    assert out.count("warning: 1 rows to train on, the released ") == 4


def test_what_arrived_damaged_is_status_1(hub, monkeypatch):
    def fetch(repo_id, **keywords):
        write_source(Path("datasets"), "Chart_Refocus", [record(0)])
        (file,) = Path("datasets").glob("Chart_Refocus/data/*")
        file.write_bytes(file.read_bytes()[:-9])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert main(["Chart_Refocus"]) == 1


def of_hub(kind: type, status: int) -> Exception:
    request = SimpleNamespace(url="https://huggingface.co/x", method="GET")
    response = SimpleNamespace(status_code=status, headers={}, request=request)
    return kind("said by the hub\nin two lines", response=response)


FAILURES = [
    (of_hub(errors.GatedRepoError, 403), "wants its terms accepted: do so at https://huggingface"),
    (of_hub(errors.RepositoryNotFoundError, 404), "there is no model ThinkMorph/ThinkMorph-7B at"),
    (of_hub(errors.RevisionNotFoundError, 404), "has no revision v9: check --revision at"),
    (of_hub(errors.HfHubHTTPError, 401), "log in with `hf auth login`"),
    (of_hub(errors.HfHubHTTPError, 429), "wait, then run the same command again"),
    (errors.HFValidationError("bad"), "is not of the form OWNER/NAME"),
    (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set, so nothing is fetched"),
    (errors.LocalEntryNotFoundError("no connection"), "check network and proxy (HTTPS_PROXY)"),
    (errors.HTTPError("[Errno 111] Connection refused"), "check network and proxy (HTTPS_PROXY)"),
    (OSError(errno.ENOSPC, "No space left on device"), "the disk of models/ThinkMorph-7B is full"),
    (RuntimeError("No space left on device (os error 28)"), "the disk of models/ThinkMorph-7B is"),
    (RuntimeError("Data processing error"), "(RuntimeError: Data processing error): check network"),
    (PermissionError(13, "Permission denied"), "cannot be written to: choose another --save-dir"),
]


@pytest.mark.parametrize(("failure", "said"), FAILURES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("function", ["repo_info", "snapshot_download"])
def test_failures_are_one_line_with_a_remedy(hub, monkeypatch, capsys, function, failure, said):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(huggingface_hub, function, fail)
    assert main(["ThinkMorph-7B", "--revision", "v9"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_stopping_leaves_without_a_traceback(hub, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stop)
    assert main(["ThinkMorph-7B"]) == 130
    assert capsys.readouterr().err == "stopped: the same command goes on where it was\n"


# ---- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ThinkMorf-7B"], "'ThinkMorf-7B' is not a known name: known are ThinkMorph-7B, BAGEL"),
        ([], "nothing to fetch: name models or data sets; known are ThinkMorph-7B"),
        (["all-data", "--save-dir", "x"], "--repo-id and --save-dir are for a single name"),
        (["ThinkMorph-7B", "--max-workers", "0"], "--max-workers 0: at least one is needed"),
        (["ThinkMorph-7B", "--verify-only", "x"], "--verify-only fetches nothing"),
    ],
)
def test_command_lines_that_cannot_be_done(hub, capsys, argv, said):
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    assert not hub


def test_help_names_every_repository():
    command = [sys.executable, "download_model.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name, repo in (MODELS | DATA_SETS).items():
        assert f"{name} " in done.stdout and repo in done.stdout
    assert "all-data" in done.stdout and "--verify-only" in done.stdout


def test_files_that_were_being_fetched_are_named(tmp_path, capsys):
    folder = tmp_path / "base"
    shutil.copytree(MINI, folder)
    (folder / "ae.safetensors").unlink()
    part = folder / ".cache" / "huggingface" / "download" / "ae.safetensors.ab12.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 10)
    assert main(["--verify-only", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "ae.safetensors.ab12 is not complete, 10 bytes there" in out and "1 problem" in out
