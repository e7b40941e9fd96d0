"""A model over several small GPUs and, beyond them, CPU memory and disk, by means of `accelerate`.

    inferencer = InterleaveInferencer.from_pretrained(path, dtype=torch.bfloat16, device_map="auto")

Decoder and image-encoder layers are never split. The keys and values of a decoder layer are where
the layer computes; batches, texts and latents are on the device of the first one. Layers compute
one after another: this fits a model into memory, it does not make it faster. For inference only.

Run by `tests/test_dispatch.py`, which has no GPU: weights on disk that accelerate fetches for every
forward (numbers equal to those of the plain model), and a prefill, a decoding step and a flow step
whose layers are on two devices (shapes and placement only, on torch's "meta" device). Not run: any
GPU, be it one or several; the test marked `gpu` waits for one.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

from modeling.bagel import Bagel

Place = int | str  # number of a GPU, a device by name, or "disk"
NOT_SPLIT = ["MoTDecoderLayer", "SiglipLayer"]
STORED = ("cpu", "disk")  # weights are kept there; the main device computes


@dataclass(frozen=True)
class Dispatch:
    """What goes where.

    Args:
        device_map: module name -> place, where the name of a module stands for all that is in it;
            "auto" fills GPUs evenly, then CPU memory, then the disk. With a GPU in the map, what
            is on "cpu" or "disk" is copied to the main device each time it computes.
        max_memory: for "auto", place -> bytes, or text like "7GiB"; default: what is free. Leave
            room for keys and values, and on the main device for the VAE.
        offload_folder: where weights on "disk" are written; needed where there are any.

    Raises:
        ImportError: accelerate is not installed.
    """

    device_map: Literal["auto"] | Mapping[str, Place]
    max_memory: Mapping[Place, int | str] | None = None
    offload_folder: str | Path | None = None

    def __post_init__(self) -> None:
        _accelerate()  # before any weights are read
        if isinstance(self.device_map, str) and self.device_map != "auto":
            raise ValueError(f"device_map is 'auto' or a mapping, got {self.device_map!r}")

    def place(self, model: Bagel) -> Bagel:
        """Move the model's weights; the model itself comes back.

        Raises:
            ValueError: a decoder layer has no single place, or "disk" has no (unused) folder.
        """
        accelerate = _accelerate()
        places = self._auto(model) if self.device_map == "auto" else dict(self.device_map)
        if "disk" in places.values():
            self._check_folder()
        layers = range(len(model.language_model.model.layers))
        of_layers = [_place(places, f"language_model.model.layers.{layer}") for layer in layers]
        # the first layer's device is the main one, as a cache has its lengths and positions there
        computing = [place for place in (of_layers[0], *places.values()) if place not in STORED]
        main = computing[0] if computing else "cpu"
        devices = [torch.device(main if place in STORED else place) for place in of_layers]
        accelerate.dispatch_model(model, places, main_device=main, offload_dir=self.offload_folder)
        return spread(model, devices)

    def _auto(self, model: Bagel) -> dict[str, Place]:
        accelerate = _accelerate()
        limits = None if self.max_memory is None else dict(self.max_memory)
        balanced = accelerate.utils.get_balanced_memory(
            model, limits, no_split_module_classes=NOT_SPLIT
        )
        return dict(accelerate.infer_auto_device_map(model, balanced, NOT_SPLIT))

    def _check_folder(self) -> None:
        if self.offload_folder is None:
            raise ValueError(
                "some weights go to disk: pass offload_folder=..., or allow more max_memory"
            )
        if (Path(self.offload_folder) / "index.json").exists():
            # accelerate would take the weights there for those of this model
            raise ValueError(
                f"{self.offload_folder} holds the weights of another call: empty the folder"
            )


def spread(model: Bagel, devices: list[torch.device]) -> Bagel:
    """Tell a model where its decoder layers compute; weights are not moved."""
    decoder, home = model.language_model.model, devices[0]
    decoder.layer_devices = tuple(devices)
    # what Bagel and its decoder combine, wherever it was computed, is combined on the main device
    ends = [child for child in model.children() if child is not model.language_model]
    ends += [child for child in decoder.children() if child is not decoder.layers]
    for module in [*ends, model.language_model.lm_head]:
        module.register_forward_hook(lambda module, inputs, output: output.to(home))
    return model


def _place(places: Mapping[str, Place], layer: str) -> Place:
    """The place of the innermost module that is named in the map and holds the layer."""
    name = layer
    while name not in places:
        if not name:
            raise ValueError(f"device_map has no place for {layer} as a whole: give it one")
        name = name.rpartition(".")[0]
    return places[name]


def _accelerate() -> ModuleType:
    try:
        return importlib.import_module("accelerate")
    except ImportError as error:
        raise ImportError(
            "device_map needs the accelerate package: pip install accelerate, or leave device_map "
            "out and open the model on one device"
        ) from error
