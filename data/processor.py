"""Processor: what a checkpoint folder says about turning examples into segments."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.example import DataError
from data.prompts import PAPER, PROMPT_SETS, PromptSet
from data.transforms import ImageTransform
from modeling.config import BagelConfig, VAEConfig
from modeling.tokenizer import Tokenizer, load_tokenizer

PREPROCESSOR_FILE = "preprocessor_config.json"
VAE_TRANSFORM = ImageTransform(1024, 512, 16)  # of the released weights


@dataclass(frozen=True)
class Processor:
    """Tokenizer, image limits and prompts that belong to one set of weights."""

    tokenizer: Tokenizer
    transform: ImageTransform = field(default_factory=ImageTransform)
    prompts: PromptSet = PAPER
    vae_transform: ImageTransform = VAE_TRANSFORM

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Processor":
        """Open a checkpoint folder.

        Released folders have no `preprocessor_config.json` of this layout (one without "prompt_set"
        belongs to another library): they get the paper's image limits and prompts.

        Raises:
            DataError: a `preprocessor_config.json` that is not JSON or whose values do not fit, or
                image limits that do not fit the image encoder.
        """
        file = Path(path) / PREPROCESSOR_FILE
        config = _read_json(file) if file.is_file() else {}
        tokenizer = load_tokenizer(path)
        transform, prompts, where = ImageTransform(), PAPER, f"{path} (the paper's image limits)"
        vae_transform = VAE_TRANSFORM
        if "prompt_set" in config:
            name = config.pop("prompt_set")
            if not isinstance(name, str) or name not in PROMPT_SETS:
                raise DataError(f"{file}: prompt_set {name!r} is not one of {sorted(PROMPT_SETS)}")
            if "vae_transform" in config:
                vae_transform = transform_from_dict(
                    config.pop("vae_transform"), f"{file}: vae_transform"
                )
            transform, prompts = transform_from_dict(config, str(file)), PROMPT_SETS[name]
            where = str(file)
        check_image_limits(transform, path, where)
        return cls(tokenizer, transform, prompts, vae_transform)

    def with_transform(self, transform: ImageTransform | None) -> "Processor":
        """The processor with the image limits of a mixture file; itself where that has none."""
        return dataclasses.replace(self, transform=transform) if transform else self

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer files and `preprocessor_config.json`; the prompts must be a named set."""
        if PROMPT_SETS.get(self.prompts.name) != self.prompts:
            raise ValueError(
                f"prompts {self.prompts.name!r} are not in data/prompts.py: add them there, "
                "a checkpoint stores the name only"
            )
        config = {
            **dataclasses.asdict(self.transform),
            "vae_transform": dataclasses.asdict(self.vae_transform),
            "prompt_set": self.prompts.name,
        }
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / PREPROCESSOR_FILE).write_text(json.dumps(config, indent=2) + "\n")
        self.tokenizer.save(path)


def transform_from_dict(config: Any, where: str) -> ImageTransform:
    """ImageTransform from its four whole numbers; anything else raises DataError."""
    known = {f.name for f in dataclasses.fields(ImageTransform)}
    if not isinstance(config, dict) or set(config) != known:
        found = sorted(map(str, config)) if isinstance(config, dict) else repr(config)
        raise DataError(f"{where}: expected exactly {sorted(known)}, got {found}")
    for key, value in config.items():
        if type(value) is not int:
            raise DataError(f"{where}: {key} is {value!r}; expected a whole number of pixels")
    try:
        return ImageTransform(**config)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def check_image_limits(transform: ImageTransform, path: str | Path, where: str) -> None:
    """Raise DataError if the image encoder of the checkpoint folder `path` cannot take the images.

    Args:
        where: what the limits come from, for the message.
    """
    vit, file = BagelConfig.from_pretrained(path).vit, Path(path) / "vit_config.json"
    if transform.image_stride != vit.patch_size:
        raise DataError(
            f"{where}: image_stride {transform.image_stride} is not the patch_size "
            f"{vit.patch_size} of {file}; make it {vit.patch_size}"
        )
    # sides are rounded to whole strides, so the last one may begin beyond the limit
    patches = round(transform.max_image_size / transform.image_stride)
    if patches > vit.patches_per_side:
        raise DataError(
            f"{where}: max_image_size {transform.max_image_size} makes sides of {patches} patches, "
            f"image_size {vit.image_size} of {file} has positions for {vit.patches_per_side}; "
            f"lower it to {vit.patches_per_side * vit.patch_size}"
        )


def check_drawing_limits(
    transform: ImageTransform, model: BagelConfig, vae: VAEConfig, where: str
) -> None:
    """Raise DataError if pictures of the VAE's sizes do not fit the model's latent tokens.

    Args:
        where: the checkpoint folder, for the message.
    """
    stride = vae.downsample * model.latent_patch_size
    if transform.image_stride % stride:
        raise DataError(
            f"{where}: vae_transform has image_stride {transform.image_stride}; a latent token is "
            f"{stride} pixels wide, so make it a multiple of {stride}"
        )
    tokens = round(transform.max_image_size / stride)
    if tokens > model.max_latent_size:
        raise DataError(
            f"{where}: vae_transform has max_image_size {transform.max_image_size}, sides of "
            f"{tokens} latent tokens, beyond max_latent_size={model.max_latent_size}; lower it to "
            f"{model.max_latent_size * stride}"
        )


def _read_json(file: Path) -> dict:
    try:
        config = json.loads(file.read_text())
    except ValueError as error:  # not JSON, or not text at all
        raise DataError(
            f"{file} is not JSON ({error}); copy it from the checkpoint again"
        ) from error
    if not isinstance(config, dict):
        raise DataError(f"{file} holds {config!r}; expected an object with the key prompt_set")
    return config
