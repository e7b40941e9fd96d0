"""Supervised fine-tuning: the text-only baseline, and the pretraining of the miniature base.

Cross-entropy on `<think>text</think><answer>answer</answer>` after a context that the mixture file
chooses per row (by default the student's), averaged over the loss tokens of the whole step.
`python -m train.sft --help` lists the flags.
"""

from functools import partial
from pathlib import Path

from torch import Tensor, nn

from data.contexts import sft_sequence
from data.mixture import Drawn
from data.processor import Processor
from data.streams import stream_seed
from modeling.sequence import PackedBatch, Segment, pack
from train.config import SftConfig, parse_sft
from train.interrupts import stop_signal
from train.losses import chunked_logprobs
from train.optim import check_finite, clip_grad_norm, lr_at, set_lr
from train.parallel import World, wrap
from train.session import (
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
    mixture = open_mixture(config)
    processor = open_processor(config, mixture)
    tokens = processor.tokenizer.special
    model = open_model(config, world)
    student = wrap(model, world)
    optimizer = open_optimizer(student, config)
    writer = open_writer(config, model.config, processor, mixture, world)
    start = writer.resume(student, None, optimizer)
    last = start.folder

    with open_metrics(config, world, start) as metrics, stop_signal(world) as stop:
        for step, rows in enumerate(open_loader(config, mixture, world, start.step), start.step):
            sequences = [
                sequence(row, drawn, processor, step, config.run.global_seed) for row, drawn in rows
            ]
            size = config.run.micro_batch
            batches = [
                pack(sequences[start : start + size], tokens).to(world.device)
                for start in range(0, len(sequences), size)
            ]
            count = int(world.sum(sum(len(batch.labels) for batch in batches)))
            optimizer.zero_grad(set_to_none=True)
            for batch in batches:
                nll = student(batch, head=partial(_token_losses, batch=batch))
                # gradients are averaged over ranks, so each rank's share counts `size` times
                (nll.sum() * world.size / count).backward()
                metrics.observe(loss=nll)

            norm = clip_grad_norm(student, config.optim.max_grad_norm)
            check_finite(step, grad_norm=float(norm))
            lr = lr_at(step, config.optim)
            set_lr(optimizer, lr)
            optimizer.step()

            observe_draws(metrics, rows)
            metrics.observe_global(grad_norm=float(norm))
            done = step + 1
            metrics.log(done, lr=lr)
            stopping = stop.agreed()
            if writer.due(done) or stopping:
                last = writer.save(done, student, None, optimizer, metrics)
            if stopping:
                break
    return last


def sequence(row: int, drawn: Drawn, processor: Processor, step: int, seed: int) -> list[Segment]:
    """The training sequence of one row; noise, where its context asks for it, is keyed by (step,
    row).
    """
    noisy = drawn.context == "teacher_noise"
    noise_seed = stream_seed(seed, "noise", step, row) if noisy else None
    return sft_sequence(drawn.example, processor, drawn.context, noise_seed)


def _token_losses(hidden: Tensor, lm_head: nn.Linear, batch: PackedBatch) -> Tensor:
    """Cross-entropy of each loss row, (R,) nats."""
    return -chunked_logprobs(hidden, lm_head, batch.labels)


def main() -> None:
    run(parse_sft(), train)


if __name__ == "__main__":
    main()
