"""The miniature's VAE: the shape of the FLUX VAE at a size that two cores train in minutes.

Pictures are 64x64, sixteen pixels to a cell of the 4x4 grid, so that one latent token of the model
(two latent positions of eight pixels each) is one cell. It is trained on problem images and visual
thoughts drawn on the way, to give them back (squared error) through a narrow posterior; afterwards
`scale_factor` and `shift_factor` are set so that its latents have zero mean and unit scale.

    python -m data.miniworld.autoencoder --output FOLDER [--seed N] [--steps N]

writes `ae.safetensors` and `vae_config.json` into a checkpoint folder.
"""

import argparse
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data.miniworld.world import TASKS, draw, split_of
from data.transforms import ImageTransform
from modeling.autoencoder import AutoEncoder
from modeling.config import VAEConfig

TRANSFORM = ImageTransform(
    max_image_size=64, min_image_size=64, image_stride=16, max_pixels=64 * 64
)
CONFIG = VAEConfig(
    ch=32,
    ch_mult=(1, 1, 2, 2),
    num_res_blocks=1,
    z_channels=4,  # sixteen numbers per cell: enough for a tile and a sign, and easier to draw
    scale_factor=1.0,
    shift_factor=0.0,
)
BATCH, STEPS, WARMUP = 32, 600, 20
LR = 3e-3
KL_WEIGHT = 3e-4  # keeps latents bounded; a stronger one blurs the glyphs
CALIBRATION = 512  # pictures whose latents set scale and shift


def pictures(seed: int, size: int) -> Iterator[Tensor]:
    """Batches (size, 3, 64, 64) in [-1, 1]: problems and visual thoughts of training items."""
    rng = random.Random(f"{seed}/autoencoder")
    while True:
        batch: list[Tensor] = []
        while len(batch) < size:
            record = draw(rng.choice(TASKS), rng)
            if split_of(record) == "train":
                batch += [TRANSFORM(record.problem_image), TRANSFORM(record.visual_thought)]
        yield torch.stack(batch[:size])


def train(seed: int, steps: int = STEPS, progress: bool = True) -> AutoEncoder:
    """A VAE after `steps` updates of AdamW, cosine to zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoEncoder(CONFIG)
    model = model.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - WARMUP, 1)),
        ],
        [WARMUP],
    )
    bar = tqdm(range(steps), disable=not progress, dynamic_ncols=True)
    batches = pictures(seed, BATCH)
    for _ in bar:
        batch = next(batches)
        mean, log_variance = model.encoder(batch).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator)
        decoded = model.decoder(mean + torch.exp(0.5 * log_variance) * noise)
        error = (decoded - batch).square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        optimizer.zero_grad(set_to_none=True)
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if bar.n % 25 == 0:
            bar.set_postfix(error=f"{float(error.detach()):.4f}", kl=f"{float(kl.detach()):.2f}")
    return calibrated(model, seed)


@torch.no_grad()
def calibrated(model: AutoEncoder, seed: int) -> AutoEncoder:
    """The model with `shift_factor` and `scale_factor` of its latents."""
    latents = model.encode(next(pictures(seed + 1, CALIBRATION)))
    config = dataclasses.replace(
        model.config,
        shift_factor=round(float(latents.mean()), 4),
        scale_factor=round(float(1 / latents.std()), 4),
    )
    final = AutoEncoder(config)
    final.load_state_dict(model.state_dict())
    return final


def save(model: AutoEncoder, folder: str | Path) -> None:
    """Write `ae.safetensors` (bfloat16, a megabyte) and `vae_config.json`."""
    state = {
        key: value.to(torch.bfloat16).contiguous() for key, value in model.state_dict().items()
    }
    file = Path(folder) / "ae.safetensors"
    save_file(state, str(file), metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes files private to the user
    text = json.dumps(dataclasses.asdict(model.config), indent=2) + "\n"
    (Path(folder) / "vae_config.json").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", required=True, help="checkpoint folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="of weights, pictures and noise")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates")
    args = parser.parse_args()
    Path(args.output).mkdir(parents=True, exist_ok=True)
    save(train(args.seed, args.steps), args.output)
    print(f"miniature VAE: {args.output}")


if __name__ == "__main__":
    main()
