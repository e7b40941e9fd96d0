"""load_pretrained / save_pretrained: json configurations and (sharded) safetensors, strict keys.

A checkpoint folder in the released layout holds `llm_config.json`, `vit_config.json`, tokenizer
files and `model.safetensors` and / or `ema.safetensors`, each possibly in shards with an index.
Folders written by this project also hold `run.json`; they open as the student, released ones as the
EMA weights if present.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modeling.autoencoder import AutoEncoder
from modeling.bagel import Bagel, NoGenerationError
from modeling.config import BagelConfig, VAEConfig

Weights = Literal["auto", "student", "ema"]
Experts = Literal["und", "all"]

# Constants that the model computes itself: absent or of another side length in some checkpoints.
RECOMPUTED = ("vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed")
LATENT_HEADS = ("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed.")
WEIGHT_NAMES = {"student": "model", "ema": "ema"}


class CheckpointError(ValueError):
    """A checkpoint folder is incomplete, damaged or does not fit the model."""


def is_generation_key(key: str) -> bool:
    """Weights that only drawing images uses: the `*_moe_gen` expert and the latent heads."""
    return "moe_gen" in key or key.startswith(LATENT_HEADS)


@dataclass(frozen=True)
class WeightFiles:
    """One set of weights on disk: where each key lies."""

    name: str  # what was opened: the file, or the index of its shards
    location: Mapping[str, Path]  # key -> file

    def shape(self, key: str) -> tuple[int, ...]:
        with _open(self.location[key]) as file:
            return tuple(file.get_slice(key).get_shape())

    def read(self, keys: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
        """Tensors of the given keys, file by file (each file is opened once)."""
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.location[key], []).append(key)
        for path, wanted in by_file.items():
            with _open(path) as file:
                for key in wanted:
                    yield key, file.get_tensor(key)


def find_weights(path: str | Path, weights: Weights = "auto") -> WeightFiles:
    """The weight files of a folder.

    "student" = model.safetensors, "ema" = ema.safetensors, "auto" = the student of a run of this
    project, else the EMA weights if the folder has them, else model.safetensors.

    Raises:
        CheckpointError: nothing to open, or an index that names files that are not there.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder of a checkpoint")
    order = {"student": ["model"], "ema": ["ema"], "auto": ["ema", "model"]}
    if weights not in order:
        raise CheckpointError(f"weights={weights!r} is unknown: choose auto, student or ema")
    names = (
        ["model", "ema"] if weights == "auto" and (folder / "run.json").exists() else order[weights]
    )
    for name in names:
        single, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
        if single.is_file():
            with _open(single) as file:
                return WeightFiles(str(single), dict.fromkeys(file.keys(), single))
        if index.is_file():
            return _from_index(index)
    found = sorted(file.name for file in folder.glob("*.safetensors")) or ["none"]
    raise CheckpointError(
        f"{folder} has no {' or '.join(f'{name}.safetensors' for name in names)} "
        f"(safetensors files there: {', '.join(found)})"
    )


def _from_index(index: Path) -> WeightFiles:
    try:
        table = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from error
    location = {key: index.parent / file for key, file in table.items()}
    absent = sorted({file.name for file in location.values() if not file.is_file()})
    if absent:
        raise CheckpointError(f"{index} names files that are missing: {', '.join(absent)}")
    return WeightFiles(str(index), location)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error


def require_drawing(path: str | Path, weights: Weights = "auto") -> None:
    """Look, without reading weights, whether a folder has what it takes to draw besides the VAE.

    Raises:
        NoGenerationError: no generation expert, or no latent heads.
    """
    keys = find_weights(path, weights).location
    parts = {
        "generation expert (*_moe_gen)": any("moe_gen" in key for key in keys),
        "latent heads (vae2llm, llm2vae, time_embedder)": _has_latent_heads(keys),
    }
    if absent := [part for part, there in parts.items() if not there]:
        raise NoGenerationError(
            f"{path} cannot draw: it has no {' and no '.join(absent)}. It answers in text; to "
            "draw, or to learn it, use a checkpoint that has them, such as BAGEL-7B-MoT"
        )


def _has_latent_heads(keys: Iterable[str]) -> bool:
    """The table of positions alone is none: it is a constant."""
    return any(key.startswith(LATENT_HEADS) and key not in RECOMPUTED for key in keys)


def load_pretrained(
    path: str | Path,
    weights: Weights = "auto",
    experts: Experts = "und",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Bagel:
    """Open a checkpoint folder.

    Args:
        path: folder in the released layout.
        weights: see `find_weights`.
        experts: "und" leaves the generation expert and the latent heads on disk; "all" loads them
            (the latent heads if the folder has them).
        dtype: of all parameters.

    Raises:
        CheckpointError: missing or unexpected keys, or a tensor of another shape, by name.
        modeling.config.ConfigError: configuration files missing or unusable.
    """
    files = find_weights(path, weights)
    keys = set(files.location)
    visual_gen = experts == "all" and _has_latent_heads(keys)
    overrides = {}
    if "latent_pos_embed.pos_embed" in keys:
        overrides["max_latent_size"] = round(files.shape("latent_pos_embed.pos_embed")[0] ** 0.5)
    if "vae2llm.weight" in keys:
        latent_dim = files.shape("vae2llm.weight")[1]
        overrides["latent_channels"] = latent_dim // BagelConfig.latent_patch_size**2
    config = BagelConfig.from_pretrained(path, **overrides)
    with torch.device("meta"):
        model = Bagel(config, generation_expert=experts == "all", visual_gen=visual_gen)
    if experts == "und":
        keys = {key for key in keys if not is_generation_key(key)}
    wanted = {key for key in model.state_dict() if key not in RECOMPUTED}
    keys -= set(RECOMPUTED)
    _check_keys(files.name, wanted, keys)
    state = _read_all(model, files, dtype, device)
    for key, value in model.state_dict().items():
        if key in RECOMPUTED:
            state[key] = torch.empty(value.shape, dtype=torch.float32, device=device)
    model.load_state_dict(state, strict=True, assign=True)
    model.vit_pos_embed.reset()
    if visual_gen:
        model.latent_pos_embed.reset()
    return model


def load_autoencoder(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AutoEncoder:
    """Open `ae.safetensors` of a checkpoint folder.

    Raises:
        CheckpointError: no such file, missing or unexpected keys, or a tensor of another shape.
        modeling.config.ConfigError: an unusable `vae_config.json`.
    """
    file = Path(path) / "ae.safetensors"
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing: this checkpoint cannot turn latents into pictures. Released "
            "folders have the file; copy it from there"
        )
    with _open(file) as handle:
        files = WeightFiles(str(file), dict.fromkeys(handle.keys(), file))
    with torch.device("meta"):
        model = AutoEncoder(VAEConfig.from_pretrained(path))
    _check_keys(files.name, set(model.state_dict()), set(files.location))
    model.load_state_dict(_read_all(model, files, dtype, device), strict=True, assign=True)
    return model


def _check_keys(name: str, wanted: set[str], found: set[str]) -> None:
    problems = []
    for label, difference in (("missing", wanted - found), ("unexpected", found - wanted)):
        if difference:
            first = ", ".join(sorted(difference)[:4])
            problems.append(f"{len(difference)} {label} (first: {first})")
    if problems:
        remedy = ""
        if all(is_generation_key(key) for key in wanted ^ found):  # so experts='all' was asked for
            remedy = ". All of them belong to the drawing of images: experts='und' opens the rest"
        raise CheckpointError(
            f"{name} does not fit the model of its configuration files: "
            f"{'; '.join(problems)}{remedy}"
        )


def _read_all(
    model: nn.Module, files: WeightFiles, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """What the meta-device model needs of the files, one tensor at a time.

    Raises:
        CheckpointError: a tensor of another shape.
    """
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = {}
    for key, value in files.read(sorted(key for key in shapes if key not in RECOMPUTED)):
        if tuple(value.shape) != shapes[key]:
            raise CheckpointError(
                f"{files.name}: {key} has shape {tuple(value.shape)}, "
                f"the configuration asks for {shapes[key]}"
            )
        state[key] = value.to(device=device, dtype=dtype)
    return state


def save_pretrained(
    state: Mapping[str, Tensor],
    config: BagelConfig,
    path: str | Path,
    *,
    name: Literal["model", "ema"] = "model",
    dtype: torch.dtype = torch.bfloat16,
    merge_from: WeightFiles | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write configurations and weights so that `load_pretrained` opens the folder.

    Args:
        state: key -> tensor, e.g. `model.state_dict()`.
        merge_from: weights whose generation keys (absent from `state`) are carried over untouched,
            bit for bit and in their own dtype.
        max_shard_bytes: larger sets are cut into shards with an index.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    readers: dict[str, Callable[[], Tensor]] = {}
    sizes: dict[str, int] = {}
    for key, value in state.items():
        kept = torch.float32 if key in RECOMPUTED else dtype
        readers[key] = lambda value=value, kept=kept: value.detach().to("cpu", kept).contiguous()
        sizes[key] = value.numel() * kept.itemsize
    if merge_from is not None:
        for key in merge_from.location:
            if is_generation_key(key) and key not in readers:
                readers[key] = lambda key=key: next(iter(merge_from.read([key])))[1]
                sizes[key] = _stored_bytes(merge_from.location[key], key)
    _write_shards(folder, name, readers, sizes, max_shard_bytes)


def _stored_bytes(path: Path, key: str) -> int:
    with _open(path) as file:
        tensor = file.get_slice(key)
        bits = int("".join(c for c in tensor.get_dtype().split("_")[0] if c.isdigit()))
        return bits // 8 * int(torch.Size(tensor.get_shape()).numel())


def _write_shards(
    folder: Path,
    name: str,
    readers: Mapping[str, Callable[[], Tensor]],
    sizes: Mapping[str, int],
    limit: int,
) -> None:
    shards: list[list[str]] = [[]]
    filled = 0
    for key in readers:
        if shards[-1] and filled + sizes[key] > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += sizes[key]
    if len(shards) == 1:
        _save(folder / f"{name}.safetensors", shards[0], readers)
        _keep_only(folder, name, {f"{name}.safetensors"})
        return
    weight_map = {}
    for number, keys in enumerate(shards, start=1):
        file = f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(folder / file, keys, readers)
        weight_map.update(dict.fromkeys(keys, file))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    index_name = f"{name}.safetensors.index.json"
    (folder / index_name).write_text(json.dumps(index, indent=2) + "\n")
    _keep_only(folder, name, {index_name, *weight_map.values()})


def _keep_only(folder: Path, name: str, written: set[str]) -> None:
    """Remove an earlier set of the same name: left behind, it could be opened in place of this."""
    for file in folder.glob(f"{name}*.safetensors*"):
        if file.name not in written:
            file.unlink()


def _save(file: Path, keys: list[str], readers: Mapping[str, Callable[[], Tensor]]) -> None:
    save_file({key: readers[key]() for key in keys}, str(file), metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes files private to the user
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
