"""Checkpoints of this project as systems: text-only, interleaved, or shown visual thoughts.

The context says what the model sees. Those of QUESTION_ALONE answer any benchmark; the others need
the visual thoughts of a training data set.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import PIL.Image
import torch

from data.contexts import drawing_size, prompt_context, teacher_context, with_suffix
from data.controls import CONTROLS, Control, controlled
from data.example import DataError, Example
from data.processor import Processor, check_image_limits
from data.streams import stream_seed
from data.transforms import to_rgb
from eval.protocol import Decoding, Layout, Protocol
from eval.sample import Piece, Reply, Sample
from eval.session import announce, pick_dtype, synchronize
from inferencer import Interleaved, InterleaveInferencer, InterleaveParams
from modeling.bagel import NoGenerationError
from modeling.drawing import encode, latent_segment, noise_like
from modeling.generation import (
    IMAGE_REQUEST,
    Rollout,
    SamplingParams,
    extend,
    open_cache,
)
from modeling.pretrained import Weights
from modeling.sequence import Gap, Segment, Text, segment_length
from train.config import UsageError

Context = Literal[
    "student", "teacher", "teacher_noise", "teacher_shuffled", "teacher_blank", "teacher_problem",
    "teacher_crop", "prompts_only", "interleaved", "interleaved_true", "interleaved_noise",
    "interleaved_shuffled", "interleaved_none",
]  # fmt: skip
# Context of the teacher -> its visual thoughts.
SHOWN = {"teacher": "real", "teacher_noise": "noise", "prompts_only": "none"}
CONTROLLED: dict[str, Control] = {f"teacher_{control}": control for control in CONTROLS}
# Contexts that see pictures as latents too, whose encoding is random; not all of them draw.
DRAWN = (
    "interleaved", "interleaved_true", "interleaved_noise", "interleaved_shuffled",
    "interleaved_none",
)  # fmt: skip
QUESTION_ALONE = ("student", "interleaved", "interleaved_noise", "interleaved_none")
PLACEHOLDER = "<img><|image_{}|></img>"


@dataclass(frozen=True)
class BagelConfig:
    """A checkpoint folder and what it is shown.

    context: `student` (the question), `teacher` (the visual thoughts of the data set as well),
        `teacher_noise`, `teacher_shuffled`, `teacher_blank`, `teacher_problem`, `teacher_crop`
        (other pictures in their place, data/controls.py), `prompts_only` (the teacher's prompts
        without images), `interleaved` (it draws its visual thoughts). Whenever it asks for one, it
        is instead shown with `interleaved_true` those of the data set, with `interleaved_noise`
        Gaussian noise, with `interleaved_shuffled` those of another row, with `interleaved_none`
        nothing. Everything else is as with `interleaved`, seeds included.
    weights: of that folder.
    """

    model_path: str
    context: Context = "student"
    weights: Weights = "auto"


class BagelSystem:
    """See `eval.sample.System`."""

    def __init__(
        self,
        name: str,
        inferencer: InterleaveInferencer,
        protocol: Protocol,
        context: Context = "student",
    ) -> None:
        self.name, self.context, self.protocol = name, context, protocol
        self.inferencer = inferencer

    @classmethod
    def open(
        cls,
        name: str,
        config: BagelConfig,
        protocol: Protocol,
        device: torch.device,
        compute_dtype: str = "auto",
    ) -> "BagelSystem":
        """Open a checkpoint folder; its image limits give way to those of the protocol.

        Raises:
            DataError: limits that the image encoder has no positions for.
        """
        inferencer = InterleaveInferencer.from_pretrained(
            config.model_path,
            device,
            pick_dtype(compute_dtype, device),
            config.weights,
            draws=config.context in DRAWN,
        )
        announce(config.model_path, config.weights, inferencer.model)
        if protocol.images is not None:
            check_limits(config.model_path, protocol)
            transform = protocol.images.transform()
            inferencer.processor = inferencer.processor.with_transform(transform)
        return cls(name, inferencer, protocol, config.context)

    def with_decoding(self, decoding: Decoding) -> "BagelSystem":
        """The same model with another budget or temperature."""
        protocol = dataclasses.replace(self.protocol, decoding=decoding)
        return BagelSystem(self.name, self.inferencer, protocol, self.context)

    def answer(self, samples: Sequence[Sample], seeds: Sequence[int]) -> list[Reply]:
        """One ragged batch.

        Args:
            seeds: per sample, of all that is random in its answer.
        """
        device = self.inferencer.model.device
        synchronize(device)
        start = time.perf_counter()
        ask = self._draw if self.context in DRAWN else self._write
        replies = ask(samples, seeds)
        synchronize(device)
        seconds = (time.perf_counter() - start) / len(samples)
        return [dataclasses.replace(reply, seconds=seconds) for reply in replies]

    def _write(self, samples: Sequence[Sample], seeds: Sequence[int]) -> list[Reply]:
        protocol = self.protocol
        params = SamplingParams(
            protocol.decoding.max_new_tokens, protocol.decoding.temperature, protocol.image_skips
        )
        contexts = [
            self.segments(sample, seed) for sample, seed in zip(samples, seeds, strict=True)
        ]
        completions = self.inferencer.complete(contexts, params, seeds)
        return [_reply(c.text, [c.rollout], skips=c.rollout.skips) for c in completions]

    def _draw(self, samples: Sequence[Sample], seeds: Sequence[int]) -> list[Reply]:
        answers = self.interleave(samples, seeds)
        none = self.context == "interleaved_none"
        return [
            _reply(a.text, a.rollouts, len(a.rollouts) - 1 if none else 0, a.pictures)
            for a in answers
        ]

    def interleave(self, samples: Sequence[Sample], seeds: Sequence[int]) -> list[Interleaved]:
        """Answers of a context of DRAWN, with the pictures that the model was shown."""
        params = self._interleaving
        inputs = [self.pieces(sample) for sample in samples]
        if self.context == "interleaved_true":
            return self._shown(inputs, params, seeds, samples)
        if self.context == "interleaved_none":
            return interleave_without(self.inferencer, inputs, params, seeds)
        given = None
        if self.context != "interleaved":
            given = [
                self._instead(*row, params) for row in zip(samples, inputs, seeds, strict=True)
            ]
        return self.inferencer.interleave_batch(inputs, params, seeds, given=given)

    @property
    def _interleaving(self) -> InterleaveParams:
        protocol = self.protocol
        return InterleaveParams(
            protocol.decoding.max_new_tokens,
            protocol.decoding.temperature,
            protocol.drawing.max_rounds,
            protocol.drawing.params(),
        )

    def pieces(self, sample: Sample) -> list[Piece]:
        """Texts and pictures of a sample as a context of DRAWN has them."""
        layout = self.protocol.prompt.layout
        return with_suffix(arranged(sample.prompt, layout), self.inferencer.processor)

    def _instead(
        self, sample: Sample, pieces: Sequence[Piece], seed: int, params: InterleaveParams
    ) -> list[PIL.Image.Image]:
        """As many pictures as the model may ask for, in the size of those that it would draw."""
        images = [piece for piece in pieces if not isinstance(piece, str)]
        height, width = params.image_shape
        if images:
            width, height = self.inferencer.processor.vae_transform.size(*images[-1].size)
        rounds = range(params.max_rounds)
        if self.context == "interleaved_noise":
            seeds = [stream_seed(seed, "noise", number) for number in rounds]
            return [noise_picture((width, height), noise_seed) for noise_seed in seeds]
        self._row(sample)
        others = self._other(sample).visual_thoughts
        return [
            others[number % len(others)].resize((width, height), PIL.Image.Resampling.BICUBIC)
            for number in rounds
        ]

    def _shown(
        self,
        inputs: Sequence[Sequence[Piece]],
        params: InterleaveParams,
        seeds: Sequence[int],
        samples: Sequence[Sample],
    ) -> list[Interleaved]:
        """Answers with the pictures of the data set in the place of drawn ones, and none beyond:
        samples with equally many are answered together.
        """
        given = [self._example(sample).visual_thoughts for sample in samples]
        answers: dict[int, Interleaved] = {}
        for rounds in sorted({len(pictures) for pictures in given}):
            rows = [i for i, pictures in enumerate(given) if len(pictures) == rounds]
            found = self.inferencer.interleave_batch(
                [inputs[i] for i in rows],
                dataclasses.replace(params, max_rounds=rounds),
                [seeds[i] for i in rows],
                given=[given[i] for i in rows],
            )
            answers |= dict(zip(rows, found, strict=True))
        return [answers[i] for i in range(len(samples))]

    def segments(self, sample: Sample, seed: int) -> list[Segment]:
        """What the model is shown of a sample; noise and crop are keyed by its seed."""
        processor = self.inferencer.processor
        if self.context in CONTROLLED:
            example, control = self._example(sample), CONTROLLED[self.context]
            other = self._other(sample) if control == "shuffled" else example
            shown = controlled(example, control, other, seed)
            return teacher_context(shown, processor)
        vt = SHOWN.get(self.context)
        if vt is None:
            pieces = arranged(sample.prompt, self.protocol.prompt.layout)
            return prompt_context([self._resized(piece, processor) for piece in pieces], processor)
        noise_seed = stream_seed(seed, "noise") if vt == "noise" else None
        return teacher_context(self._example(sample), processor, vt, noise_seed)

    def _resized(self, piece: Piece, processor: Processor) -> Piece:
        if isinstance(piece, str):
            return piece
        piece = to_rgb(piece)
        limits = self.protocol.images
        first = limits is not None and limits.resize_first
        return processor.vae_transform.resize(piece) if first else piece

    def _row(self, sample: Sample) -> Example:
        """The training row of a sample."""
        if sample.example is None:
            raise UsageError(
                f"{self.name}: context {self.context} shows visual thoughts, and {sample.benchmark}"
                " has none: evaluate it on data sets of the training schema, such as mini"
            )
        return sample.example

    def _example(self, sample: Sample) -> Example:
        """The training row of a sample, with the visual thoughts that the context needs."""
        example = self._row(sample)
        if not example.visual_thoughts and self.context != "prompts_only":
            raise DataError(
                f"{self.name}: context {self.context} needs visual thoughts, and row {sample.id} "
                f"of {sample.benchmark} has none ({example.skipped_vts} could not be decoded); "
                "drop the row or evaluate the context prompts_only"
            )
        return example

    def _other(self, sample: Sample) -> Example:
        """Another row of the data set, with visual thoughts.

        Raises:
            DataError: there is none.
        """
        other = sample.other() if sample.other is not None else None
        if other is None or not other.visual_thoughts:
            raise DataError(
                f"{self.name}: context {self.context} needs the visual thoughts of another row, "
                f"and the one beside {sample.id} of {sample.benchmark} has none; give it one that "
                "has some, or evaluate a context that shows no other row's"
            )
        return other


def noise_picture(size: tuple[int, int], seed: int) -> PIL.Image.Image:
    """A picture (width, height) of Gaussian noise, which VAE and image encoder then see like any.

    Pixel channels are standard normal in normalised space, cut to the [-1, 1] that a picture can
    hold (a third of them) and rounded to 8 bits.
    """
    pixels = noise_like((size[1], size[0], 3), seed).clamp(-1, 1)
    return PIL.Image.fromarray(((pixels * 0.5 + 0.5) * 255).round().byte().numpy())


def interleave_without(
    inferencer: InterleaveInferencer,
    inputs: Sequence[Sequence[Piece]],
    params: InterleaveParams,
    seeds: Sequence[int],
) -> list[Interleaved]:
    """`interleave_batch` with nothing where a picture would be: the positions of its latents and
    its patches stay empty, and the model writes on. Budget and seed of each text are those there.
    """
    tokenizer, model = inferencer.processor.tokenizer, inferencer.model
    texts: list[list[str]] = [[] for _ in inputs]
    rollouts: list[list[Rollout]] = [[] for _ in inputs]
    contexts = [interleaved_context(inferencer, *row) for row in zip(inputs, seeds, strict=True)]
    cache = open_cache(model, contexts, tokenizer.special, room=0)
    sampling = SamplingParams(params.max_new_tokens, params.temperature, 0)
    active = list(range(len(inputs)))
    for number in range(params.max_rounds + 1):
        streams = [stream_seed(seeds[row], "rollout", number) for row in active]
        written = inferencer.write_round(cache, sampling, streams)
        for row, rollout in zip(active, written, strict=True):
            rollouts[row].append(rollout)
            texts[row].append(tokenizer.decode(rollout.token_ids))
        places = [i for i, row in enumerate(active) if IMAGE_REQUEST in texts[row][-1]]
        if number == params.max_rounds or not places:
            break
        active = [active[i] for i in places]
        spoken = [[Text(rollouts[row][-1].token_ids), Gap(), Gap()] for row in active]
        room = max(sum(map(segment_length, row)) for row in spoken)
        cache = cache.select(places, cache.extent + room)
        extend(model, cache, spoken, tokenizer.special)
    pairs = zip(texts, rollouts, strict=True)
    return [Interleaved(tuple(pieces), tuple(found)) for pieces, found in pairs]


def interleaved_context(
    inferencer: InterleaveInferencer, pieces: Sequence[Piece], seed: int
) -> list[Segment]:
    """What `interleave_batch` shows a model first: [sys, texts and pictures in order]."""
    encode_text = inferencer.processor.tokenizer.encode
    segments: list[Segment] = []
    if inferencer.processor.prompts.system:
        segments.append(Text(tuple(encode_text(inferencer.processor.prompts.system))))
    images = 0
    for piece in pieces:
        if isinstance(piece, str):
            segments += [Text(tuple(encode_text(piece)))] if piece else []
        else:
            segments += picture_segments(inferencer, piece, seed, -images)
            images += 1
    return segments


def picture_segments(
    inferencer: InterleaveInferencer, picture: PIL.Image.Image, seed: int, number: int
) -> list[Segment]:
    """Latents and patches of a picture. number: 1 .. of those that were drawn, 0, -1 .. of those
    that were given; it keys the noise of the encoding.

    Raises:
        NoGenerationError: the inferencer was opened without its VAE.
    """
    if inferencer.vae_model is None:
        raise NoGenerationError("this inferencer has no VAE: open the checkpoint with draws=True")
    processor, config = inferencer.processor, inferencer.vae_model.config
    picture = drawing_size(picture, processor)
    pixels = processor.vae_transform(picture)[None]
    sides = (side // config.downsample for side in pixels.shape[-2:])
    noise = inferencer.noise((config.z_channels, *sides), seed, "vae", number)
    latents = encode(inferencer.vae_model, pixels, noise[None])[0].cpu()
    seen = processor.transform.segment(picture)
    return [latent_segment(latents, inferencer.model.config.latent_patch_size), seen]


def check_limits(model_path: str, protocol: Protocol) -> None:
    """Raise DataError for image limits that the image encoder has no positions for."""
    if protocol.images is not None:
        where = f"protocol {protocol.name}: images"
        check_image_limits(protocol.images.transform(), model_path, where)


def arranged(prompt: Sequence[Piece], layout: Layout) -> list[Piece]:
    """Texts and pictures in the order in which a Bagel model gets them.

    `images_first` joins the texts by line breaks, `placeholders` by blanks, with a mark for each
    picture where it stood, as the public harness does.
    """
    images: list[PIL.Image.Image] = [piece for piece in prompt if not isinstance(piece, str)]
    if layout == "interleaved":
        return list(prompt)
    if layout == "images_first":
        return [*images, "\n".join(piece for piece in prompt if isinstance(piece, str))]
    texts, shown = [], 0
    for piece in prompt:
        if not isinstance(piece, str):
            shown += 1
            piece = PLACEHOLDER.format(shown)
        texts.append(piece)
    return [*images, " ".join(texts)]


def _reply(
    text: str,
    rollouts: Sequence[Rollout],
    skips: int = 0,
    pictures: tuple[PIL.Image.Image, ...] = (),
) -> Reply:
    """`seconds` are filled in when the batch is through."""
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    finish = "stop" if rollouts[-1].ended_by == "eos" else "length"
    return Reply(text, tokens, finish, 0.0, skips, pictures)
