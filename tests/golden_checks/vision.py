"""a, f, g, h, i, n: image encoder, flow, VAE, transforms, position ids and fixed embeddings."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from data.transforms import ImageTransform, to_rgb
from modeling.attention import packed_plan
from modeling.autoencoder import AutoEncoder
from modeling.config import VAEConfig
from modeling.flow import Guidance, euler, timesteps
from modeling.layers import (
    patch_position_ids,
    patchify,
    rope_cos_sin,
    sincos_table_2d,
    timestep_frequencies,
)
from modeling.sequence import Split
from tests.golden_checks.core import (
    FEATURES,
    LATENT,
    VAE,
    Absent,
    Golden,
    Result,
    check,
    close,
    exact,
    relative,
    to_image,
)


@check("a_vit", "a_vit.safetensors", "model.safetensors", "config.json")
@torch.no_grad()
def image_encoder(golden: Golden) -> Iterator[Result]:
    stored, model = golden.tensors("a_vit"), golden.model()
    layers: list[Tensor] = []
    for layer in model.vit_model.vision_model.encoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: layers.append(output))
    samples = [(Split(int(n), "full"),) for n in stored["cu_seqlens"].diff()]
    ids = stored["position_ids"]
    out = model.vit_model(stored["packed_pixel_values"], ids, packed_plan(samples, "cpu"))
    features = model.connector(out)
    table = model.vit_pos_embed(ids)
    yield close(
        "a_vit.layers",
        FEATURES,
        ((layer, stored[f"vit_layer{i}"]) for i, layer in enumerate(layers)),
    )
    yield close("a_vit.out", FEATURES, [(out, stored["vit_out"])])
    yield close("a_vit.connector", FEATURES, [(features, stored["connector_out"])])
    yield close("a_vit.pos_embed", FEATURES, [(table, stored["pos_embed"])])
    yield close("a_vit.embed", FEATURES, [(features + table, stored["embed_out"])])
    yield from _images_of_a(golden, stored)


def _images_of_a(golden: Golden, stored: dict[str, Tensor]) -> Iterator[Result]:
    """Pictures -> tensors -> patches and position ids."""
    count = sum(re.fullmatch(r"tensor\d+", key) is not None for key in stored)
    patch = golden.config["vit"]["patch_size"]
    side = golden.config["vit"]["image_size"] // patch
    segments = [to_image(stored[f"tensor{i}"], patch) for i in range(count)]
    ids = torch.cat([patch_position_ids(s.height, s.width, side) for s in segments])
    patches = torch.cat([s.patches for s in segments])
    yield exact("a_vit.position_ids", [(ids, stored["position_ids"])])
    yield close("a_vit.patches", FEATURES, [(patches, stored["packed_pixel_values"])])
    transform = ImageTransform(**golden.config["vit_tf"])
    pairs = [
        (transform(PIL.Image.fromarray(stored[f"image{i}"].numpy())), stored[f"tensor{i}"])
        for i in range(count)
        if f"image{i}" in stored
    ]
    if pairs:
        yield close("a_vit.transform", FEATURES, pairs)


@check("g_vae", "g_vae.safetensors", "ae.safetensors", "config.json")
@torch.no_grad()
def autoencoder(golden: Golden) -> Iterator[Result]:
    stored, sizes = golden.tensors("g_vae"), golden.config["vae"]
    known = {field.name for field in dataclasses.fields(VAEConfig)}
    config = VAEConfig(**{name: value for name, value in sizes.items() if name in known})
    yield exact("g_vae.downsample", [(config.downsample, sizes["downsample"])])
    model = AutoEncoder(config)
    model.load_state_dict(golden.tensors("ae"))
    pixels, noise = stored["x"], stored["noise"]
    yield close("g_vae.moments", VAE, [(model.encoder(pixels), stored["moments"])])
    latents = [
        (model.encode(pixels), stored["z_nosample"]),
        (model.encode(pixels, noise), stored["z_sample"]),
    ]
    yield close("g_vae.latents", VAE, latents)
    pictures = [
        (model.decode(stored[name]), stored[f"decode_of_{name}"])
        for name in ("z_nosample", "z_rand")
    ]
    yield close("g_vae.pictures", VAE, pictures)


@check("f_euler", "f_imagegen.safetensors", "f_imagegen.json")
def euler_steps(golden: Golden) -> Iterator[Result]:
    """Times and steps of a drawn picture, along its stored velocities."""
    stored, facts = golden.tensors("f_imagegen"), golden.json("f_imagegen")
    name = "t8_global_img1.5"
    case, steps = facts["cases"][name], facts[f"{name}.steps"]
    times = timesteps(case["num_timesteps"], case["timestep_shift"])
    yield close("f_euler.times", 1e-7, [(times[:-1], torch.tensor([step["t"] for step in steps]))])
    guidance = Guidance(case["cfg_text_scale"], case["cfg_img_scale"], tuple(case["cfg_interval"]))
    guided = [(guidance.branches(step["t"]), (step["cfg_text"] > 1,) * 2) for step in steps]
    yield exact("f_euler.guided", guided)
    velocities = iter(stored[f"{name}.v_t"])
    end = euler(stored["latent.in.packed_init_noises"], times, lambda x, t: next(velocities))
    yield close("f_euler.latent", LATENT, [(end, stored[f"{name}.latent"])])


@check("h_sizes", "h_resize_sizes.json")
def resize_sizes(golden: Golden) -> Iterator[Result]:
    stored = golden.json("h_resize_sizes")
    pairs = []
    for config in stored["configs"].values():
        arguments = {"max_pixels": stored["default_max_pixels"], **config["args"]}
        transform = ImageTransform(**arguments)
        for size, by_number in config["out_wh"].items():
            width, height = map(int, size.split("x"))
            for number, expected in by_number.items():
                img_num = int(number.removeprefix("img_num="))
                pairs.append((transform.size(width, height, img_num=img_num), expected))
    yield exact("h_sizes", pairs)


@check("h_transforms", "h_transforms_u8.npz", "h_resize_sizes.json")
def transforms(golden: Golden) -> Iterator[Result]:
    sizes = golden.json("h_resize_sizes")
    with np.load(golden.path / "h_transforms_u8.npz") as archive:
        arrays = dict(archive)
    pictures = {
        key.removesuffix(".in"): PIL.Image.fromarray(value)
        for key, value in arrays.items()
        if key.endswith(".in")
    }

    def transform(config: str) -> ImageTransform:
        defaults = {"max_pixels": sizes["default_max_pixels"]}
        return ImageTransform(**(defaults | sizes["configs"][config]["args"]))

    rgb, resized = [], []
    for key, expected in arrays.items():
        name, *rest = key.split(".")
        picture = to_rgb(pictures[name])
        if rest == ["rgb"]:
            rgb.append((np.array(picture), expected))
        elif rest[-1] == "u8":
            resized.append((np.array(transform(rest[0]).resize(picture)), expected))
    yield exact("h_transforms.rgb", rgb)
    yield exact("h_transforms.uint8", resized)
    if golden.has(["h_transforms_float.safetensors"]):
        pairs = [
            (transform(key.split(".")[1])(pictures[key.split(".")[0]]), value)
            for key, value in golden.tensors("h_transforms_float").items()
        ]
        yield close("h_transforms.float", 1e-6, pairs)


@check("i_patchify_posids", "i_patchify_posids.safetensors")
def patches_and_ids(golden: Golden) -> Iterator[Result]:
    stored = golden.tensors("i_patchify_posids")
    pattern = re.compile(r"(extrapolate|interpolate)\.h(\d+)_w(\d+)_p(\d+)_max(\d+)")
    pairs: dict[str, list] = {"extrapolate": [], "interpolate": []}
    for key, expected in stored.items():
        if match := pattern.fullmatch(key):
            height, width, patch, side = map(int, match.groups()[1:])
            mode = match.group(1)
            ids = patch_position_ids(
                height // patch, width // patch, side, interpolate=mode == "interpolate"
            )
            pairs[mode].append((ids, expected))
    for mode, found in pairs.items():
        yield exact(f"i_patchify_posids.{mode}", found)
    patched = [
        (patchify(stored["patchify.in"], int(key.removeprefix("patchify.p"))), value)
        for key, value in stored.items()
        if key.startswith("patchify.p")
    ]
    yield exact("i_patchify_posids.patchify", patched)


@check("n_embeddings", "n_embeddings.safetensors", "n_embeddings.json")
@torch.no_grad()
def fixed_embeddings(golden: Golden) -> Iterator[Result | Absent]:
    stored, facts = golden.tensors("n_embeddings"), golden.json("n_embeddings")
    times = stored["timesteps"]
    # A time beyond 1 never occurs. There the angle t * f multiplies the rounding of f (whose last
    # bit depends on the machine's exp) by t, so the difference is taken per unit of time.
    scale = times.clamp(min=1.0)[:, None]
    frequencies, expected = timestep_frequencies(times), stored["freq_embed_256"]
    inside = times <= 1
    yield close(
        "n_embeddings.timestep",
        FEATURES,
        [
            (frequencies[inside], expected[inside]),
            (timestep_frequencies(torch.zeros(1)), stored["freq_embed_int0"]),
        ],
    )
    if not inside.all():
        pairs = [((frequencies / scale)[~inside], (expected / scale)[~inside])]
        yield close("n_embeddings.timestep_beyond_1_per_t", FEATURES, pairs)
    yield close("n_embeddings.rope", FEATURES, _rope_pairs(stored))
    small = [
        (sincos_table_2d(*map(int, m.groups()[1:])), value)
        for key, value in stored.items()
        if (m := re.fullmatch(r"pos_embed_(\d+)x(\d+)_(\d+)", key))
    ]
    yield close("n_embeddings.sincos_small", FEATURES, small)
    for name, fact in facts.items():
        if "sha256_float32" in fact:
            yield from _full_table(name, fact, stored)
    for key in [key for key in stored if key.endswith(".time_embedder_out")]:
        name = key.split(".")[0]
        label, folder = f"n_embeddings.time_embedder_{name}", _folder_of(golden, name)
        if folder is None:
            yield Absent(label, f"no model.safetensors of {name} beside this folder")
        else:
            embedder = folder.model(visual_gen=True).time_embedder
            yield close(label, FEATURES, [(embedder(times), stored[key])])


def _rope_pairs(stored: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    positions = torch.tensor([0, 1, 2, 17, 300])
    for key, expected in stored.items():
        name, _, kind = key.partition(".")
        if kind.startswith("rope_"):
            theta = _theta(stored[f"{name}.inv_freq"])
            cos, sin = rope_cos_sin(positions, expected.shape[1], theta)
            yield (cos if kind.startswith("rope_cos") else sin), expected
        elif kind in ("inv_freq", "inv_freq_fp32"):
            # the angles of position 1 are the frequencies themselves, each of them below pi
            cos, sin = rope_cos_sin(torch.tensor([1]), 2 * len(expected), _theta(expected))
            yield torch.atan2(sin, cos)[0, : len(expected)], expected


def _theta(inv_freq: Tensor) -> float:
    """The base is not stored by name; it is a whole number of thousands in every configuration."""
    return round(float(inv_freq[1].double()) ** -len(inv_freq), -3)


def _full_table(name: str, fact: dict, stored: dict[str, Tensor]) -> Iterator[Result]:
    """Full-size tables are stored as sums, some entries and a digest of all bytes."""
    table = sincos_table_2d(fact["side"], fact["dim"])
    wide = table.double()
    column = torch.arange(1, fact["dim"] + 1, dtype=torch.float64)
    sums = {
        "sum": wide.sum(),
        "sumsq": wide.square().sum(),
        "abs_sum": wide.abs().sum(),
        "weighted": (wide.sum(0) * column).sum(),
    }
    yield relative(f"n_embeddings.{name}.sums", FEATURES, [(sums[key], fact[key]) for key in sums])
    quarter = fact["dim"] // 4
    rows = table[fact["rows"]]
    corner = torch.cat([rows[:, i * quarter : i * quarter + 16] for i in range(4)], dim=1)
    key = f"{name}.rows_first16_and_quarters"
    yield close(f"n_embeddings.{name}.rows", FEATURES, [(corner, stored[key])])
    digest = hashlib.sha256(table.numpy().tobytes()).hexdigest()
    yield exact(f"n_embeddings.{name}.sha256", [(digest == fact["sha256_float32"], True)])


def _folder_of(golden: Golden, name: str) -> Golden | None:
    """The folder that holds the weights of configuration `name`, where it is at hand."""
    for path in (golden.path, golden.path.parent / name):
        folder = Golden(Path(path))
        if path.resolve().name == name and folder.has(["model.safetensors", "config.json"]):
            return folder
    return None
