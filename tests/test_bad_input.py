"""What the user can mend ends with one line that names the place, the value and the remedy."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.miniworld.world import TASKS
from tests.data_helpers import cell, png, record, write_source
from tests.training import metric_lines, opsd_argv, sft_argv, workspace
from train import opsd, sft

ROOT = Path(__file__).parents[1]
KEY = "language_model.model.norm.weight"
MAINS = {"opsd": (opsd.main, opsd_argv), "sft": (sft.main, sft_argv)}


@pytest.fixture
def fails(monkeypatch, capfd, tmp_path):
    """fails(trainer, **flags) -> the message of a run that must end with status 2."""

    def run(trainer="opsd", **flags) -> str:
        main, argv = MAINS[trainer]
        monkeypatch.setattr(sys, "argv", [trainer, *argv(tmp_path, **flags)])
        capfd.readouterr()
        before = sorted(tmp_path.glob("checkpoints/*/*"))
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 2
        err = capfd.readouterr().err
        assert "Traceback" not in err
        assert sorted(tmp_path.glob("checkpoints/*/*")) == before
        (message,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert message == err.strip().splitlines()[-1]
        return message

    return run


@pytest.fixture
def model(tmp_path):
    """A copy of the checkpoint to damage."""
    folder = tmp_path / "model"
    shutil.copytree(workspace() / "base", folder)
    return folder


def mixture(tmp_path, names=("Toy",), group="visual_opsd", **keys):
    path = tmp_path / "mixture.yaml"
    path.write_text(json.dumps({group: {"dataset_names": list(names), **keys}}))
    return {"dataset_config_file": path, "data_root": tmp_path / "datasets"}


# ---- checkpoints ------------------------------------------------------------------------------


def damaged(folder: Path, change) -> Path:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    return file


def test_missing_weight(fails, model):
    file = damaged(model, lambda state: state.pop(KEY))
    message = fails(model_path=model)
    assert f"{file} does not fit the model" in message
    assert f"1 missing (first: {KEY})" in message


def test_extra_weight(fails, model):
    file = damaged(model, lambda state: state.update({"lora.A": torch.zeros(2)}))
    message = fails("sft", model_path=model)
    assert str(file) in message
    assert "1 unexpected (first: lora.A)" in message


def test_wrong_shape(fails, model):
    file = damaged(model, lambda state: state.update({KEY: torch.ones(33)}))
    message = fails(model_path=model)
    assert f"{file}: {KEY} has shape (33,), the configuration asks for (32,)" in message


def test_torn_weight_file(fails, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert f"{file} is not a complete safetensors file" in fails(model_path=model)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("model.safetensors", "has no ema.safetensors or model.safetensors"),
        ("llm_config.json", "llm_config.json not found: a checkpoint folder holds"),
        ("tokenizer.json", "no tokenizer in"),
    ],
)
def test_missing_file_of_a_checkpoint(fails, model, name, named):
    (model / name).unlink()
    message = fails(model_path=model)
    assert named in message
    assert str(model) in message


def test_no_checkpoint_folder(fails, tmp_path):
    message = fails(model_path=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message


def test_weights_that_are_not_there(fails):
    message = fails(weights="ema")
    assert f"{workspace() / 'base'} has no ema.safetensors" in message
    assert "files there: model.safetensors" in message


@pytest.mark.parametrize("text", ['{"version": "1.0", ', "{}", "[]"])
def test_broken_tokenizer(fails, model, text):
    (model / "tokenizer.json").write_text(text)
    message = fails(model_path=model)
    assert f"{model}: the tokenizer cannot be read (" in message
    assert "copy tokenizer.json" in message


def test_image_limits_beyond_the_encoder(fails, model):
    file = model / "preprocessor_config.json"
    limits = json.loads(file.read_text())
    file.write_text(json.dumps(limits | {"max_image_size": 70, "max_pixels": 4900}))
    message = fails(model_path=model)
    assert f"{file}: max_image_size 70 makes sides of 5 patches, image_size 56 of " in message
    file.write_text(json.dumps(limits | {"image_stride": 28}))
    message = fails("sft", model_path=model)
    assert f"{file}: image_stride 28 is not the patch_size 14 of {model}/vit_config" in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"prompt_set": "mini"', "is not JSON (Expecting"),
        ("[1]", "holds [1]; expected an object"),
        ('{"prompt_set": "papr"}', "prompt_set 'papr' is not one of ['mini', 'paper']"),
        ('{"prompt_set": ["mini"]}', "prompt_set ['mini'] is not one of"),
        ('{"prompt_set": "mini", "image_stride": 14}', "got ['image_stride']"),
    ],
)
def test_broken_preprocessor_file(fails, model, text, named):
    file = model / "preprocessor_config.json"
    file.write_text(text)
    message = fails(model_path=model)
    assert str(file) in message
    assert named in message


# ---- data -------------------------------------------------------------------------------------


def test_missing_column(fails, tmp_path):
    write_source(tmp_path / "datasets", "Toy", [record(i, reasoning_image_0=...) for i in range(3)])
    message = fails(**mixture(tmp_path))
    file = tmp_path / "datasets" / "Toy" / "data" / "train-00000-of-00001.parquet"
    assert f"{file}: missing column(s) reasoning_image_0" in message
    assert "Rename or add the column" in message
    message = fails("sft", **mixture(tmp_path))
    assert "reasoning_image_0" in message
    write_source(tmp_path / "datasets", "Text", [record(0, full_text_only_thought=...)])
    message = fails("sft", **mixture(tmp_path, ["Text"], "text_reasoning"))
    assert "missing column(s) full_text_only_thought" in message


@pytest.mark.parametrize("trainer", MAINS)
def test_image_column_of_plain_bytes(fails, tmp_path, trainer):
    rows = [record(i) | {"problem_image_0": png(i)} for i in range(3)]
    file = tmp_path / "datasets" / "Toy" / "data" / "train-00000.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    group = "visual_opsd" if trainer == "opsd" else "text_reasoning"
    message = fails(trainer, **mixture(tmp_path, group=group))
    assert f"{file}: column problem_image_0 is of type binary; expected struct<" in message


def test_no_files(fails, tmp_path):
    message = fails(**mixture(tmp_path))
    assert f"no file matches {tmp_path / 'datasets' / 'Toy' / 'data'}/*train*.parquet" in message
    assert "VISUAL_OPSD_DATA_ROOT" in message
    assert "python -m data.miniworld" in message


def test_no_rows(fails, tmp_path):
    write_source(tmp_path / "datasets", "Toy", [record(0)])
    file = next((tmp_path / "datasets" / "Toy" / "data").glob("*.parquet"))
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    assert "Toy: the files train-00000-of-00001.parquet hold no rows" in fails(**mixture(tmp_path))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("visual_opsd: {dataset_name: [Toy]}", "visual_opsd needs dataset_names"),
        ("visual_opsd: {dataset_names: [Toy], weihgts: [1]}", "unknown keys ['weihgts']"),
        ("editing: {dataset_names: [Toy]}", "expected one top-level key out of"),
        ("visual_opsd: {dataset_names: [Toy], split: dev}", "split 'dev' is not one of"),
        ("visual_opsd: {dataset_names: [Toy}", "is not yaml: while parsing a flow sequence"),
        ("visual_opsd: {dataset_names: [Toy], weights: 1}", "weights is 1; expected a list of"),
    ],
)
def test_bad_mixture_file(fails, tmp_path, text, named):
    path = tmp_path / "m.yaml"
    path.write_text(text)
    message = fails(dataset_config_file=path)
    assert message.startswith(f"error: {path}")
    assert named in message


def test_no_mixture_file(fails, tmp_path):
    message = fails(dataset_config_file=tmp_path / "none.yaml")
    assert f"{tmp_path / 'none.yaml'}: no such mixture file" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_parquet_file(fails, tmp_path, workers):
    write_source(tmp_path / "datasets", "Toy", [record(i) for i in range(6)])
    file = next((tmp_path / "datasets" / "Toy" / "data").glob("*.parquet"))
    whole = file.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    damages = {"torn": whole[:-20], "pages": b"\xff" * (len(whole) - footer) + whole[-footer:]}
    for damage in ["torn", "pages"]:  # seen when the footer is read; when the first row is
        file.write_bytes(damages[damage])
        message = fails(num_workers=workers, **mixture(tmp_path))
        assert f"{file} is not a readable parquet file (" in message, damage
        assert "download or write it again" in message


def test_distillation_needs_visual_thoughts(fails, tmp_path):
    keys = mixture(tmp_path, TASKS, "text_reasoning") | {"data_root": workspace() / "datasets"}
    assert "no visual thought for the teacher" in fails(**keys)


def damaged_rows(tmp_path, every: int) -> None:
    torn = png(3)[:40]
    rows = [record(i) for i in range(12)]
    for row in rows[::every]:
        row["problem_image_0"] = cell(torn)
    write_source(tmp_path / "datasets", "Toy", rows)


def test_damaged_images_are_skipped_and_counted(tmp_path, monkeypatch):
    damaged_rows(tmp_path, every=4)
    flags = {"global_batch": 12, "total_steps": 1, **mixture(tmp_path, max_skip_fraction=0.5)}
    monkeypatch.setattr(sys, "argv", ["opsd", *opsd_argv(tmp_path, **flags)])
    opsd.main()
    (line,) = metric_lines(tmp_path)
    assert line["skipped_records"] == pytest.approx(3 / 12)  # every row of the epoch comes once
    assert line["over_cap"] == 0  # all twelve rows became prompts: others took their places


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("trainer", MAINS)
def test_too_many_damaged_images_stop_the_run(fails, tmp_path, trainer, workers):
    damaged_rows(tmp_path, every=4)
    group = "visual_opsd" if trainer == "opsd" else "text_reasoning"
    keys = mixture(tmp_path, group=group, max_skip_fraction=0.05)
    message = fails(trainer, global_batch=240, num_workers=workers, **keys)
    assert "rows were unusable, more than max_skip_fraction=0.05" in message
    assert "train-00000-of-00001.parquet, row " in message
    assert "column problem_image_0 is not a readable image" in message
    assert "raise max_skip_fraction in the mixture file" in message


# ---- output folders ---------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", MAINS)
def test_output_folder_that_is_a_file(fails, tmp_path, trainer):
    file = tmp_path / "taken"
    file.write_text("notes")
    for flag in ("results_dir", "checkpoint_dir"):
        for folder in (file, file / "deeper" / "still"):
            message = fails(trainer, **{flag: folder})
            assert message == f"error: --{flag} {folder}: {file} is a file; name a folder"
    assert file.read_text() == "notes"


@pytest.mark.parametrize("trainer", MAINS)
def test_checkpoints_of_an_earlier_run_stay(fails, tmp_path, trainer):
    folder = tmp_path / "checkpoints"
    for name in ("0000400", "0000500"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"weights")
    message = fails(trainer)
    assert f"--checkpoint_dir {folder} holds 2 checkpoint(s)" in message
    assert "(0000500)" in message
    assert "choose another folder" in message and "--overwrite True" in message
    assert not (tmp_path / "results").exists()  # nothing was written


def test_overwrite_spares_the_weights_to_start_from(fails, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(workspace() / "base", folder / "0000500")
    (folder / "latest").symlink_to("0000500")
    message = fails(model_path=folder / "latest", overwrite=True)
    assert f"would remove the weights to start from, --model_path {folder / 'latest'}" in message


# ---- the real command line --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--jsd_beta", "0"], "beta=0.0 with an entry clip of 0.05"),
        (["--model_path", "no/such/model", "--device", "cpu"], "error: "),
    ],
)
def test_command_line(flags, named, tmp_path):
    argv = opsd_argv(tmp_path)
    command = [sys.executable, "-m", "train.opsd", *argv, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert named in done.stderr.strip().splitlines()[-1]
    if "no/such/model" in flags:
        assert "no/such/model" in done.stderr.strip().splitlines()[-1]


def test_cuda_without_a_gpu(fails):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "torch sees no GPU: use --device cpu or auto" in fails(device="cuda")
