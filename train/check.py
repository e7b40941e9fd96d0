"""What a launch can get wrong, found in one process before torchrun starts several.

    python -m train.check opsd --model_path models/ThinkMorph-7B ...

Flags, preset, checkpoint folder, mixture file and the data it names. Ends with status 0, or with 2
and one line; torchrun would bury that line under its own traceback. No weights are read.
"""

import argparse
import sys

from data.processor import check_drawing_limits
from modeling.config import BagelConfig, VAEConfig
from modeling.pretrained import require_drawing
from train.config import OpsdConfig, SftConfig, TrainConfig, parse_opsd, parse_sft
from train.folders import find_resumable
from train.session import base_weights, exit_on_user_error, open_mixture, open_processor
from train.sft import check_contexts
from train.validation import check_probe_set

PARSERS = {"opsd": parse_opsd, "sft": parse_sft}


def _draws(config: TrainConfig) -> bool:
    if isinstance(config, OpsdConfig):
        return config.visual_thoughts.vt_source == "generated"
    return config.tuning.visual_gen


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.check", usage="%(prog)s {opsd,sft} [--flag value ...]"
    )
    parser.add_argument("trainer", choices=PARSERS, help="whose flags the rest are")
    words = sys.argv[1:]
    config = PARSERS[parser.parse_args(words[:1]).trainer](words[1:])
    with exit_on_user_error():
        find_resumable(config)
        base_weights(config)
        mixture = open_mixture(config)
        processor = open_processor(config, mixture)
        if _draws(config):
            path = config.model.model_path
            require_drawing(path, config.model.weights)
            shapes = BagelConfig.from_pretrained(path), VAEConfig.from_pretrained(path)
            check_drawing_limits(processor.vae_transform, *shapes, path)
        if isinstance(config, SftConfig):
            check_contexts(config, mixture)
        if isinstance(config, OpsdConfig):
            check_probe_set(config, mixture)


if __name__ == "__main__":
    main()
