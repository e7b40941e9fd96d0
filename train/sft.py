"""Supervised fine-tuning: the text-only baseline, interleaved fine-tuning (how a ThinkMorph is
made), and the pretraining of the miniature base.

Rows come in the contexts that the mixture file chooses. Text is learned by cross-entropy on
`<think>text</think><answer>answer</answer>` after a context (by default the student's); with
--visual_gen True also on the texts of interleaved rows, whose visual thoughts are learned by the
error of the velocity that draws them. Both are means over the whole step: over its loss tokens,
and over the channels of its noised latent tokens. `python -m train.sft --help` lists the flags.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data.contexts import sft_sequence
from data.mixture import INTERLEAVED, Drawn, Mixture
from data.processor import Processor, check_drawing_limits
from data.streams import stream_seed
from modeling.bagel import Bagel
from modeling.pretrained import is_generation_key, load_autoencoder, require_drawing
from modeling.sequence import PackedBatch, Segment, pack, segment_length
from train.config import SftConfig, UsageError, parse_sft
from train.interleaved import Interleaver
from train.interrupts import stop_signal
from train.losses import chunked_logprobs
from train.optim import check_finite, clip_grad_norm, lr_at, set_lr
from train.parallel import World, wrap
from train.session import (
    announce_model,
    observe_draws,
    open_loader,
    open_metrics,
    open_mixture,
    open_model,
    open_optimizer,
    open_processor,
    open_writer,
    run,
)


def train(config: SftConfig, world: World) -> Path:
    """Run all steps; returns the folder of the last checkpoint."""
    tuning = config.tuning
    mixture = open_mixture(config)
    check_contexts(config, mixture)
    processor = open_processor(config, mixture)
    tokens = processor.tokenizer.special
    model = open_trainee(config, world)
    interleaver = open_interleaver(config, model, processor, world)
    student = wrap(model, world)
    optimizer = open_optimizer(student, config)
    writer = open_writer(config, model.config, processor, mixture, world)
    start = writer.resume(student, None, optimizer)
    last = start.folder

    with open_metrics(config, world, start) as metrics, stop_signal(world) as stop:
        for step, rows in enumerate(open_loader(config, mixture, world, start.step), start.step):
            sequences = step_sequences(rows, processor, interleaver, step, config.run.global_seed)
            batches = [
                pack(part, tokens).to(world.device)
                for part in forwards(sequences, config.run.micro_batch, tuning.max_num_tokens)
            ]
            words, channels = world.sums(
                sum(float(token_weights(b, config).sum()) for b in batches),
                sum(b.targets.numel() for b in batches),
            )
            channels = max(channels, 1)
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=world.device)
            for batch, share in in_step(batches, world):
                nll, error = losses_of(student, batch)
                ce = (token_weights(batch, config) * nll).sum() / words
                mse = error.sum() / channels
                part = share * (tuning.ce_weight * ce + tuning.mse_weight * mse)
                # gradients are averaged over ranks, so each rank's share counts `size` times
                (part * world.size).backward()
                loss += part.detach()
                if tuning.visual_gen and share:
                    metrics.observe(ce=nll, **({"mse": error} if len(error) else {}))

            norm = clip_grad_norm(student, config.optim.max_grad_norm)
            total = world.sum(loss)
            check_finite(step, loss=total, grad_norm=float(norm))
            lr = lr_at(step, config.optim)
            set_lr(optimizer, lr)
            optimizer.step()

            observe_draws(metrics, rows)
            metrics.observe_global(loss=total, grad_norm=float(norm))
            done = step + 1
            metrics.log(done, lr=lr)
            stopping = stop.agreed()
            if writer.due(done) or stopping:
                last = writer.save(done, student, None, optimizer, metrics)
            if stopping:
                break
    return last


def check_contexts(config: SftConfig, mixture: Mixture) -> None:
    """Raise UsageError where rows and flags do not go together."""
    if mixture.config.draws_pictures() and not config.tuning.visual_gen:
        raise UsageError(
            f"{config.data.dataset_config_file} has rows of the context {INTERLEAVED!r}, which "
            "hold pictures to draw: add --visual_gen True, or take the context out"
        )


def open_trainee(config: SftConfig, world: World) -> Bagel:
    """The model with what is trained of it.

    Raises:
        NoGenerationError: drawing is to be trained, but the checkpoint has no latent heads.
    """
    tuning = config.tuning
    if not tuning.visual_gen:
        return open_model(config, world)
    require_drawing(config.model.model_path, config.model.weights)
    model = open_model(config, world, announce=False, experts="all")
    model.set_always_draws(True)
    if tuning.freeze_und:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_generation_key(name))
    announce_model(config, model, world)
    return model


def open_interleaver(
    config: SftConfig, model: Bagel, processor: Processor, world: World
) -> Interleaver | None:
    """The maker of interleaved rows; None where there are none.

    Raises:
        DataError: picture sizes of the VAE that the model cannot take.
    """
    if not config.tuning.visual_gen:
        return None
    path = config.model.model_path
    autoencoder = load_autoencoder(path, device=world.device)
    autoencoder.requires_grad_(False)
    check_drawing_limits(processor.vae_transform, model.config, autoencoder.config, str(path))
    patch = model.config.latent_patch_size
    return Interleaver(autoencoder, processor, patch, config.tuning, config.run.global_seed)


def step_sequences(
    rows: list[tuple[int, Drawn]],
    processor: Processor,
    interleaver: Interleaver | None,
    step: int,
    seed: int,
) -> list[list[Segment]]:
    """The training sequences of this rank's rows, in their order."""
    interleaved = [(row, drawn.example) for row, drawn in rows if drawn.context == INTERLEAVED]
    drawn_rows = iter(interleaver.sequences(interleaved, step) if interleaved else ())
    return [
        next(drawn_rows)
        if drawn.context == INTERLEAVED
        else sequence(row, drawn, processor, step, seed)
        for row, drawn in rows
    ]


def sequence(row: int, drawn: Drawn, processor: Processor, step: int, seed: int) -> list[Segment]:
    """The training sequence of one row; noise, where its context asks for it, is keyed by (step,
    row).
    """
    noisy = drawn.context == "teacher_noise"
    noise_seed = stream_seed(seed, "noise", step, row) if noisy else None
    return sft_sequence(drawn.example, processor, drawn.context, noise_seed)


def forwards(
    sequences: list[list[Segment]], micro_batch: int, max_num_tokens: int = 0
) -> list[list[list[Segment]]]:
    """Consecutive rows that share a forward: at most `micro_batch`, or, where it is given, as many
    as have `max_num_tokens` together. A row that is longer than that goes alone.
    """
    parts: list[list[list[Segment]]] = []
    length = 0
    for row in sequences:
        tokens = sum(map(segment_length, row))
        if max_num_tokens:
            full = length + tokens > max_num_tokens
        else:
            full = parts and len(parts[-1]) == micro_batch
        if not parts or full:
            parts.append([])
            length = 0
        parts[-1].append(row)
        length += tokens
    return parts


def in_step(batches: list[PackedBatch], world: World) -> Iterator[tuple[PackedBatch, float]]:
    """Each batch with share 1; then one with share 0, as often as other ranks have more: they
    meet in every forward.
    """
    most = int(world.max(len(batches)))  # asked for before the first forward, which is one meeting
    yield from ((batch, 1.0) for batch in batches)
    for _ in range(most - len(batches)):
        yield batches[-1], 0.0


def token_weights(batch: PackedBatch, config: SftConfig) -> Tensor:
    """(R,) weight of each loss token before division by the sum over the step."""
    if config.tuning.ce_loss_reweighting:
        return batch.loss_weights
    return torch.ones_like(batch.loss_weights)


def losses_of(student: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Cross-entropy (R,) of the loss tokens in nats, and squared error (F, C) of the velocities."""
    out = student(batch, head=partial(_token_losses, batch=batch))
    if not isinstance(out, tuple):
        return out, out.new_zeros(0, 0)
    nll, velocities = out
    return nll, (velocities.float() - batch.targets.reshape(velocities.shape)).square()


def _token_losses(hidden: Tensor, lm_head: nn.Linear, batch: PackedBatch) -> Tensor:
    """Cross-entropy of each loss row, (R,) nats."""
    return -chunked_logprobs(hidden, lm_head, batch.labels)


def main() -> None:
    run(parse_sft(), train)


if __name__ == "__main__":
    main()
