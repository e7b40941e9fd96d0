"""Model configurations and their released json files (`llm_config.json`, `vit_config.json`)."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration file is missing, incomplete or holds a value that this model cannot take."""


@dataclass(frozen=True)
class LLMConfig:
    """Qwen2.5 decoder shape. Field names are those of the released `llm_config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.tie_word_embeddings:
            raise ConfigError(
                "tie_word_embeddings=true is not supported: released folders have an lm_head"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ViTConfig:
    """SigLIP NaViT shape. `num_hidden_layers` is the number on disk, see `num_layers_used`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int = 14
    image_size: int = 980
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vit hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @property
    def patches_per_side(self) -> int:
        """Side of the learned position table (70 at full size: 980 / 14)."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        return self.num_channels * self.patch_size**2


@dataclass(frozen=True)
class VAEConfig:
    """FLUX VAE shape. Field names are those of the published code; defaults are the full size.

    Released folders have no file for it; `vae_config.json` is read where there is one.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    in_channels: int = 3
    out_ch: int = 3
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))  # json has a list
        if self.ch % 32:
            raise ConfigError(
                f"vae ch {self.ch} is not a multiple of 32, the number of groups of its norms"
            )

    @property
    def downsample(self) -> int:
        """Pixels per latent position along a side (8 at full size)."""
        return 2 ** (len(self.ch_mult) - 1)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "VAEConfig":
        """`vae_config.json` of a checkpoint folder, or the full size without one."""
        file = Path(path) / "vae_config.json"
        return _read(cls, file) if file.is_file() else cls()


@dataclass(frozen=True)
class BagelConfig:
    """The whole model. The fields below `vit` are constants of the released training code."""

    llm: LLMConfig
    vit: ViTConfig
    vit_select_layer: int = -2
    interpolate_pos: bool = False
    latent_patch_size: int = 2
    latent_channels: int = 16
    max_latent_size: int = 64

    @property
    def vit_layers_used(self) -> int:
        """Encoder layers that run: the output is taken at `vit_select_layer`."""
        return self.vit.num_hidden_layers + 1 + self.vit_select_layer

    @property
    def latent_dim(self) -> int:
        """Channels of a latent token."""
        return self.latent_patch_size**2 * self.latent_channels

    @classmethod
    def from_pretrained(cls, path: str | Path, **overrides: Any) -> "BagelConfig":
        """Read `llm_config.json`, `vit_config.json` and, if it is there, `vae_config.json` of a
        checkpoint folder.
        """
        parts = {
            "llm": _read(LLMConfig, Path(path) / "llm_config.json"),
            "vit": _read(ViTConfig, Path(path) / "vit_config.json"),
            "latent_channels": VAEConfig.from_pretrained(path).z_channels,
        }
        return cls(**parts | overrides)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the two json files so that `from_pretrained` gives this configuration back."""
        for name, part in (("llm_config.json", self.llm), ("vit_config.json", self.vit)):
            text = json.dumps(dataclasses.asdict(part), indent=2) + "\n"
            (Path(path) / name).write_text(text)


def _read(cls: type, file: Path) -> Any:
    """Build `cls` from a json file; other keys of the file (release bookkeeping) are ignored."""
    if not file.is_file():
        raise ConfigError(
            f"{file} not found: a checkpoint folder holds llm_config.json, vit_config.json, "
            "tokenizer files and model.safetensors (or ema.safetensors)"
        )
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not valid json: {error}") from error
    # newer `transformers` writes rope_theta into rope_parameters
    if "rope_theta" not in values and "rope_theta" in (values.get("rope_parameters") or {}):
        values["rope_theta"] = values["rope_parameters"]["rope_theta"]
    fields = dataclasses.fields(cls)
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise ConfigError(f"{file} lacks {', '.join(missing)}")
    return cls(**{f.name: values[f.name] for f in fields if f.name in values})
