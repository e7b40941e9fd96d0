"""InterleaveInferencer: questions about images, answered in text or by thinking in pictures too.

    inferencer = InterleaveInferencer.from_pretrained("models/mini-base")
    print(inferencer.answer([PIL.Image.open("problem.png")], "which piece fits").text)

is the understanding mode: images and a question in, a text completion out. A model with generation
expert, latent heads and VAE also draws its visual thoughts:

    inferencer = InterleaveInferencer.from_pretrained("models/mini-base", draws=True)
    pieces = inferencer(image, "which piece fits", think=True)      # [text, picture, text]

Method names, arguments and defaults of the second part are those of the public BAGEL inferencer.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from tqdm import tqdm

from data.answers import extract_answer
from data.contexts import drawing_size, question_context
from data.processor import VAE_TRANSFORM, Processor
from data.prompts import PAPER, PromptSet
from data.streams import stream_seed
from data.transforms import ImageTransform, to_rgb
from modeling.autoencoder import AutoEncoder
from modeling.bagel import Bagel, NoGenerationError, latent_position_ids, text_logits
from modeling.dispatch import Dispatch, Place
from modeling.drawing import DrawingParams, decode, draw, encode, latent_segment, noise_like
from modeling.flow import Guidance
from modeling.generation import (
    IMAGE_REQUEST,
    Rollout,
    SamplingParams,
    Workspace,
    decoding_room,
    extend,
    generate,
    open_cache,
)
from modeling.generation import decode as write
from modeling.kv_cache import KVCache
from modeling.layers import unpatchify
from modeling.pretrained import (
    Weights,
    load_autoencoder,
    load_pretrained,
    require_drawing,
)
from modeling.sequence import Segment, Text, decode_batch, segment_length
from modeling.tokenizer import SpecialTokens, Tokenizer

Piece = str | PIL.Image.Image


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one context."""

    text: str
    answer: str | None  # content of the last <answer>...</answer>, None where there is none
    rollout: Rollout


@dataclass(frozen=True)
class Interleaved:
    """What the model wrote and drew after one input."""

    pieces: tuple[Piece, ...]  # text and pictures in turn, text first and (if closing) last
    rollouts: tuple[Rollout, ...]  # one per text

    @property
    def text(self) -> str:
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def answer(self) -> str | None:
        return extract_answer(self.text)

    @property
    def pictures(self) -> tuple[PIL.Image.Image, ...]:
        return tuple(piece for piece in self.pieces if not isinstance(piece, str))


@dataclass(frozen=True)
class InterleaveParams:
    """How an interleaved answer is made.

    max_new_tokens: visible tokens of each text. temperature: 0 is greedy. max_rounds: pictures; a
    closing text always follows the last. retokenise: feed back the decoded text instead of the
    sampled tokens, as the release does. image_shape: (height, width) where the input has no image;
    otherwise that of its last one. closing: False leaves out the text after the last picture.
    """

    max_new_tokens: int = 1000
    temperature: float = 0.0
    max_rounds: int = 3
    drawing: DrawingParams = DrawingParams(guidance=Guidance(text_scale=3.0))
    retokenise: bool = False
    image_shape: tuple[int, int] = (1024, 1024)
    closing: bool = True

    def __post_init__(self) -> None:
        if self.max_rounds < 0:
            raise ValueError(f"max_rounds must be 0 or more, got {self.max_rounds}")
        if not self.closing and not self.max_rounds:
            raise ValueError("max_rounds=0 with closing=False leaves nothing to write or draw")
        if min(self.image_shape) < 1:
            raise ValueError(f"image_shape {self.image_shape} is not (height, width) in pixels")


@dataclass(frozen=True)
class GenContext:
    """What a model has been shown so far, as cached keys and values of one sequence. Updating it
    gives a new context; this one stays as it is.
    """

    cache: KVCache


@dataclass
class _Row:
    """One input of a batch on its way."""

    number: int  # in the batch
    seed: int
    shape: tuple[int, int]  # (height, width) of its pictures
    pieces: list[Piece]
    rollouts: list[Rollout]


class InterleaveInferencer:
    """A model with what turns text and images into its segments and back.

    Args:
        vae_model: None for a model that only writes.
        vae_transform, vit_transform: image limits of the VAE and of the understanding encoder.
        new_token_ids: the framing tokens of the public constructor; they are the tokenizer's own
            here, and others are an error.
        prompts: the system prompt of think mode is theirs.
    """

    def __init__(
        self,
        model: Bagel,
        vae_model: AutoEncoder | None,
        tokenizer: Tokenizer,
        vae_transform: ImageTransform = VAE_TRANSFORM,
        vit_transform: ImageTransform | None = None,
        new_token_ids: dict[str, int] | None = None,
        prompts: PromptSet = PAPER,
    ) -> None:
        vit_transform = vit_transform or ImageTransform()
        self.model, self.vae_model = model, vae_model
        self._workspace = Workspace()
        self.processor = Processor(tokenizer, vit_transform, prompts, vae_transform)
        if new_token_ids is not None and new_token_ids != token_ids(tokenizer.special):
            raise ValueError(
                f"new_token_ids {new_token_ids} are not those of the tokenizer, "
                f"{token_ids(tokenizer.special)}: leave the argument out"
            )

    @classmethod
    def of(
        cls, model: Bagel, processor: Processor, vae_model: AutoEncoder | None = None
    ) -> "InterleaveInferencer":
        """From the processor of a checkpoint folder."""
        return cls(
            model,
            vae_model,
            processor.tokenizer,
            processor.vae_transform,
            processor.transform,
            prompts=processor.prompts,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        weights: Weights = "auto",
        draws: bool = False,
        *,
        device_map: Literal["auto"] | Mapping[str, Place] | None = None,
        max_memory: Mapping[Place, int | str] | None = None,
        offload_folder: str | Path | None = None,
    ) -> "InterleaveInferencer":
        """Open a checkpoint folder; see `load_pretrained` for errors.

        Args:
            draws: also open the generation expert, the latent heads and the VAE.
            device_map, max_memory, offload_folder: instead of `device`, several devices, by the
                accelerate library; see `Dispatch` in modeling/dispatch.py for meaning and errors.
                The weights go through CPU memory, all of them at a time.

        Raises:
            NoGenerationError: `draws`, but the folder has no generation expert or latent heads.
            CheckpointError: `draws`, but the folder has no VAE.
        """
        dispatch = None
        if device_map is not None:
            if torch.device(device).type != "cpu":
                raise ValueError(f"device={device} and device_map exclude each other: give one")
            dispatch = Dispatch(device_map, max_memory, offload_folder)
        if draws:
            require_drawing(path, weights)
        experts = "all" if draws else "und"
        model = load_pretrained(path, weights, experts, dtype=dtype, device=device)
        if dispatch is not None:
            model = dispatch.place(model)
        vae_model = load_autoencoder(path, dtype, model.device) if draws else None
        return cls.of(model, Processor.from_pretrained(path), vae_model)

    # ---- text alone ------------------------------------------------------------------------------

    def answer(self, images: Sequence[PIL.Image.Image], question: str, **sampling) -> Completion:
        """Answer one question about images; keyword arguments are those of `answer_batch`."""
        return self.answer_batch([(images, question)], **sampling)[0]

    def answer_batch(
        self,
        items: Sequence[tuple[Sequence[PIL.Image.Image], str]],
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        seed: int = 0,
        max_image_skips: int = 0,
    ) -> list[Completion]:
        """Answer (images, question) items as one ragged batch.

        Args:
            temperature: 0 is greedy.
            seed: of the sampling; item i has its own stream.
            max_image_skips: times a model that asks for a picture is told to write on without one.
        """
        contexts = [
            question_context([to_rgb(image) for image in images], question, self.processor)
            for images, question in items
        ]
        seeds = [stream_seed(seed, "rollout", index) for index in range(len(items))]
        params = SamplingParams(max_new_tokens, temperature, max_image_skips)
        return self.complete(contexts, params, seeds)

    def complete(
        self,
        contexts: Sequence[Sequence[Segment]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
    ) -> list[Completion]:
        """One completion per context, whatever the contexts hold."""
        tokenizer = self.processor.tokenizer
        rollouts = generate(
            self.model, contexts, tokenizer, params, seeds, workspace=self._workspace
        )
        texts = [tokenizer.decode(rollout.token_ids) for rollout in rollouts]
        return [
            Completion(text, extract_answer(text), rollout)
            for text, rollout in zip(texts, rollouts, strict=True)
        ]

    # ---- text and pictures -----------------------------------------------------------------------

    def interleave_batch(
        self,
        inputs: Sequence[Sequence[Piece]],
        params: InterleaveParams | None = None,
        seeds: Sequence[int] | None = None,
        think: bool = True,
        progress: bool = False,
        given: Sequence[Sequence[PIL.Image.Image]] | None = None,
    ) -> list[Interleaved]:
        """Think, draw, think: every input is answered in texts with pictures between them.

        Rows are written as one ragged batch and drawn as one batch per picture size. A picture is
        drawn whenever a text holds `<image_start>`, and shown to the model like an input image.

        Args:
            inputs: per row its images and texts in order.
            seeds: per row the seed of all its random streams (default: its number): a row does not
                depend on the rows beside it.
            think: put the system prompt first.
            progress: show a bar.
            given: per row pictures (possibly none) that are shown in place of the first ones it
                would draw, to see what it makes of them.

        Raises:
            NoGenerationError: the model or the VAE is missing.
            ValueError: a picture size beyond the model's `max_latent_size`, or no input at all.
        """
        params = params or InterleaveParams()
        self._check_inputs(inputs, seeds)
        if not inputs:
            return []
        rows = [
            _Row(number, seed, self._shape(items, params.image_shape), [], [])
            for number, (items, seed) in enumerate(
                zip(inputs, seeds if seeds is not None else range(len(inputs)), strict=True)
            )
        ]
        contexts = [
            self._contexts(items, row, think) for row, items in zip(rows, inputs, strict=True)
        ]
        guided = [self._lazy([context[i] for context in contexts]) for i in (1, 2)]
        cache = self._open([context[0] for context in contexts])
        active = rows
        with tqdm(disable=not progress, unit="step", dynamic_ncols=True) as bar:
            for number in range(params.max_rounds + params.closing):
                self._write(active, cache, params, number, bar)
                if number == params.max_rounds:
                    break
                places = [i for i, row in enumerate(active) if IMAGE_REQUEST in row.pieces[-1]]
                active = [active[i] for i in places]
                if not active:
                    break
                spoken = [[Text(self._spoken(row, params))] for row in active]
                cache = self._extended(cache.select(places), spoken)
                pictures = self._given(active, given, number)
                rest = [i for i in range(len(active)) if i not in pictures]
                if rest:
                    undrawn, contexts = [active[i] for i in rest], cache.select(rest)
                    drawn = self._draw(undrawn, contexts, guided, params.drawing, number, bar)
                    pictures |= dict(zip(rest, drawn, strict=True))
                shown = []
                for place, row in enumerate(active):
                    picture = pictures[place]
                    row.pieces.append(picture)
                    shown.append(self._image(picture, row.seed, number + 1))
                if number + 1 < params.max_rounds + params.closing:
                    cache = self._extended(cache, shown)
        return [Interleaved(tuple(row.pieces), tuple(row.rollouts)) for row in rows]

    def _contexts(
        self, items: Sequence[Piece], row: _Row, think: bool
    ) -> tuple[list[Segment], list[Segment], list[Segment]]:
        """What guidance compares: everything, all before the last text, and texts alone. An image
        after the last text takes that text in again.
        """
        if not items:
            raise ValueError("nothing to answer: pass an image, a text, or both")
        system = self._text(self.processor.prompts.system) if think else []
        everything, texts = list(system), list(system)
        without_text, images = list(everything), 0
        for item in items:
            if isinstance(item, str):
                without_text = list(everything)
                everything += self._text(item)
                texts += self._text(item)
            else:
                everything += self._image(item, row.seed, -images)
                images += 1
                without_text = list(everything)
        return everything, without_text, texts

    def _shape(self, items: Sequence[Piece], default: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the pictures that are drawn: the last image's, as the VAE sees it."""
        images = [item for item in items if not isinstance(item, str)]
        if not images:
            return default
        width, height = self.processor.vae_transform.size(*images[-1].size)
        return height, width

    def _text(self, text: str) -> list[Segment]:
        return [Text(tuple(self.processor.tokenizer.encode(text)))] if text else []

    def _image(
        self, image: PIL.Image.Image, seed: int, number: int, vae: bool = True, vit: bool = True
    ) -> list[Segment]:
        """An image as latents and patches; `number` keys its posterior noise."""
        image = drawing_size(image, self.processor)
        segments: list[Segment] = []
        if vae:
            autoencoder = self._autoencoder()
            pixels = self.processor.vae_transform(image)[None]
            factor = autoencoder.config.downsample
            sides = (side // factor for side in pixels.shape[-2:])
            noise = self.noise((autoencoder.config.z_channels, *sides), seed, "vae", number)
            latents = encode(autoencoder, pixels, noise[None])[0].cpu()
            segments.append(latent_segment(latents, self.model.config.latent_patch_size))
        if vit:
            segments.append(self.processor.transform.segment(image))
        return segments

    def noise(self, shape: tuple[int, ...], seed: int, purpose: str, number: int) -> Tensor:
        """Standard normal noise for the `number`-th picture of a row."""
        return noise_like(shape, stream_seed(seed, purpose, number))

    def _autoencoder(self) -> AutoEncoder:
        if self.vae_model is None or not self.model.can_draw:
            raise NoGenerationError(
                "this inferencer cannot draw: it was opened without generation expert, latent "
                "heads and VAE. Open the checkpoint with draws=True"
            )
        return self.vae_model

    def _open(self, contexts: Sequence[Sequence[Segment]]) -> KVCache:
        return open_cache(self.model, contexts, self.processor.tokenizer.special, room=0)

    def _lazy(self, contexts: Sequence[Sequence[Segment]]) -> "_Once":
        """A cache that is only filled where guidance looks at it."""
        return _Once(lambda: self._open(contexts))

    def _extended(self, cache: KVCache, segments: Sequence[Sequence[Segment]]) -> KVCache:
        """The cache with segments behind every row, in new memory."""
        room = max(sum(map(segment_length, row)) for row in segments)
        cache = cache.select(range(len(cache)), cache.extent + room)
        extend(self.model, cache, segments, self.processor.tokenizer.special)
        return cache

    def _write(
        self, rows: Sequence[_Row], cache: KVCache, params: InterleaveParams, number: int, bar: tqdm
    ) -> None:
        """The next text of every row."""
        sampling = SamplingParams(params.max_new_tokens, params.temperature, 0)
        seeds = [stream_seed(row.seed, "rollout", number) for row in rows]
        bar.set_description(f"writing text {number + 1}")
        for row, rollout in zip(
            rows, self.write_round(cache, sampling, seeds, bar.update), strict=True
        ):
            row.rollouts.append(rollout)
            row.pieces.append(self.processor.tokenizer.decode(rollout.token_ids))

    def write_round(
        self, cache: KVCache, params: SamplingParams, seeds: Sequence[int], step: Any = lambda: None
    ) -> list[Rollout]:
        """One text per cache row; the cache stays as it is."""
        room = decoding_room(self.model, params, params.max_new_tokens)
        roomy = cache.select(range(len(cache)), cache.extent + room)
        return write(self.model, roomy, self.processor.tokenizer, params, seeds, step=step)

    def _spoken(self, row: _Row, params: InterleaveParams) -> tuple[int, ...]:
        """The tokens of a row's last text, as they enter its context."""
        if params.retokenise:
            return tuple(self.processor.tokenizer.encode(row.pieces[-1]))
        return row.rollouts[-1].token_ids

    def _given(
        self,
        rows: Sequence[_Row],
        given: Sequence[Sequence[PIL.Image.Image]] | None,
        number: int,
    ) -> dict[int, PIL.Image.Image]:
        """The `number`-th given picture of those rows that have one."""
        return {
            place: drawing_size(given[row.number][number], self.processor)
            for place, row in enumerate(rows)
            if given is not None and number < len(given[row.number])
        }

    def _check_inputs(self, inputs: Sequence[Sequence[Piece]], seeds: Sequence[int] | None) -> None:
        if seeds is not None and len(seeds) != len(inputs):
            raise ValueError(f"{len(seeds)} seeds for {len(inputs)} inputs: give one for each")
        for number, items in enumerate(inputs):
            for item in items:
                if not isinstance(item, (str, PIL.Image.Image)):
                    raise TypeError(
                        f"input {number} holds {item!r}: give texts and PIL images; open a file "
                        "with PIL.Image.open"
                    )

    def _draw(
        self,
        rows: Sequence[_Row],
        cache: KVCache,
        guided: Sequence["_Once"],
        params: DrawingParams,
        number: int,
        bar: tqdm,
    ) -> list[PIL.Image.Image]:
        """The next picture of every row; rows with pictures of one size are drawn together."""
        by_shape = defaultdict(list)
        for place, row in enumerate(rows):
            by_shape[row.shape].append(place)
        pictures: dict[int, PIL.Image.Image] = {}
        for shape, places in by_shape.items():
            bar.set_description(f"drawing {len(places)} of size {shape[1]}x{shape[0]}")
            members = [rows[place] for place in places]
            seeds = [row.seed for row in members]
            contexts = [cache.select(places, cache.extent)]
            numbers = [row.number for row in members]
            needed = guided[: params.guidance.contexts() - 1]
            contexts += [once.get().select(numbers) for once in needed]
            contexts += contexts[:1] * (3 - len(contexts))  # not looked at
            grids = self._latents(contexts, shape, seeds, number, params, bar)
            for place, picture in zip(places, self._pictures(grids), strict=True):
                pictures[place] = picture
        return [pictures[place] for place in range(len(rows))]

    def _latents(
        self,
        contexts: Sequence[KVCache],
        shape: tuple[int, int],
        seeds: Sequence[int],
        number: int,
        params: DrawingParams,
        bar: tqdm,
    ) -> Tensor:
        """(B, Z, h, w) drawn latents of pictures of `shape` (height, width)."""
        self._check_shape(shape)
        config = self._autoencoder().config
        grid = config.z_channels, shape[0] // config.downsample, shape[1] // config.downsample
        noise = torch.stack([self.noise(grid, seed, "draw", number) for seed in seeds])
        special = self.processor.tokenizer.special
        return draw(self.model, *contexts, noise, params, special, bar.update)

    def _check_shape(self, shape: tuple[int, int]) -> None:
        """Raise ValueError for a picture that does not divide into latent tokens, or is too big."""
        stride = self._autoencoder().config.downsample * self.model.config.latent_patch_size
        if shape[0] % stride or shape[1] % stride:
            raise ValueError(
                f"pictures of {shape[1]}x{shape[0]} pixels do not divide into latent tokens of "
                f"{stride}x{stride}: choose multiples of {stride}"
            )
        side = self.model.config.max_latent_size
        latent_position_ids(shape[0] // stride, shape[1] // stride, side)  # checks the size

    def _pictures(self, latents: Tensor) -> list[PIL.Image.Image]:
        pixels = decode(self._autoencoder(), latents)  # (B, 3, H, W) in [-1, 1]
        # the release cuts off rather than rounding
        shown = ((pixels * 0.5 + 0.5) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        return [PIL.Image.fromarray(np.ascontiguousarray(picture)) for picture in shown]

    # ---- the public interface --------------------------------------------------------------------

    def init_gen_context(self) -> GenContext:
        """A context that has been shown nothing."""
        return GenContext(self._open([[]]))

    def update_context_text(self, text: str, gen_context: GenContext) -> GenContext:
        """The context with a text behind it."""
        return GenContext(self._extended(gen_context.cache, [self._text(text)]))

    def update_context_image(
        self,
        image: PIL.Image.Image,
        gen_context: GenContext,
        vae: bool = True,
        vit: bool = True,
        seed: int | None = None,
    ) -> GenContext:
        """The context with an image behind it: its latents, then its patches.

        Args:
            seed: of the posterior noise; None draws one from torch's global generator.
        """
        if not (vae or vit):
            raise ValueError("vae=False and vit=False show nothing of the image")
        segments = self._image(image, _seed(seed), 0, vae, vit)
        return GenContext(self._extended(gen_context.cache, [segments]))

    def gen_image(
        self,
        image_shape: tuple[int, int],
        gen_context: GenContext,
        cfg_text_scale: float = 4.0,
        cfg_img_scale: float = 1.5,
        cfg_text_precontext: GenContext | None = None,
        cfg_img_precontext: GenContext | None = None,
        cfg_interval: Sequence[float] = (0.4, 1.0),
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: str = "global",
        num_timesteps: int = 50,
        timestep_shift: float = 3.0,
        enable_taylorseer: bool = False,
        seed: int | None = None,
        progress: bool = False,
    ) -> PIL.Image.Image:
        """Draw one picture of `image_shape` (height, width) in a context.

        Args:
            cfg_text_precontext, cfg_img_precontext: contexts without the text and without images,
                which guidance compares with; needed where their scale is above 1.
            seed: of the noise it starts from; None draws one from torch's global generator.
        """
        _without_shortcut(enable_taylorseer)
        guidance = Guidance(
            cfg_text_scale, cfg_img_scale, tuple(cfg_interval), cfg_renorm_type, cfg_renorm_min
        )
        given = [gen_context, cfg_text_precontext, cfg_img_precontext]
        needed = guidance.contexts()
        if any(context is None for context in given[:needed]):
            raise ValueError(
                f"cfg_text_scale={cfg_text_scale} and cfg_img_scale={cfg_img_scale} compare with "
                "cfg_text_precontext and cfg_img_precontext: pass them, or set the scale to 1"
            )
        caches = [context.cache for context in given if context is not None]
        caches += [gen_context.cache] * (3 - len(caches))  # not looked at
        params = DrawingParams(num_timesteps, timestep_shift, guidance)
        with tqdm(disable=not progress, unit="step", dynamic_ncols=True) as bar:
            latents = self._latents(caches, tuple(image_shape), [_seed(seed)], 0, params, bar)
        return self._pictures(latents)[0]

    def decode_image(self, latent: Tensor, image_shape: tuple[int, int]) -> PIL.Image.Image:
        """The picture (height, width) of drawn latent tokens (N, C)."""
        config, patch = self._autoencoder().config, self.model.config.latent_patch_size
        stride = config.downsample * patch
        height, width = image_shape[0] // stride, image_shape[1] // stride
        return self._pictures(unpatchify(latent[None], height, width, patch))[0]

    def gen_text(
        self,
        gen_context: GenContext,
        max_length: int = 500,
        do_sample: bool = True,
        temperature: float = 1.0,
        seed: int | None = None,
    ) -> str:
        """Write one text in a context, which stays as it is.

        Args:
            max_length: tokens, the opening one included.
            seed: of the sampling; None draws one from torch's global generator.
        """
        _check_length(max_length, "max_length")
        params = SamplingParams(max_length - 1, temperature if do_sample else 0.0, 0)
        seeds = [_seed(seed)] if do_sample else [0]
        (rollout,) = self.write_round(gen_context.cache, params, seeds)
        return self.processor.tokenizer.decode(rollout.token_ids)

    def next_token_logits(self, gen_context: GenContext) -> Tensor:
        """(1, V) logits of the first token of a text that would follow."""
        cache = gen_context.cache.select([0], gen_context.cache.extent + 1)
        start = torch.tensor([self.processor.tokenizer.special.bos], device=cache.device)
        with torch.no_grad():
            return self.model(decode_batch(start, cache.positions), cache, text_logits)

    def interleave_inference(
        self,
        input_lists: Sequence[Piece] | Sequence[Sequence[Piece]],
        think: bool = False,
        understanding_output: bool = False,
        max_think_token_n: int = 1000,
        do_sample: bool = False,
        text_temperature: float = 0.3,
        cfg_text_scale: float = 3.0,
        cfg_img_scale: float = 1.5,
        cfg_interval: Sequence[float] = (0.4, 1.0),
        timestep_shift: float = 3.0,
        num_timesteps: int = 50,
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: str = "global",
        image_shapes: tuple[int, int] = (1024, 1024),
        enable_taylorseer: bool = False,
        max_rounds: int = 3,
        max_image_skips: int = 0,
        retokenise: bool = False,
        seed: int | None = None,
        progress: bool = False,
    ) -> list[Any]:
        """Answer one input (images and texts in order), or a batch of them.

        With `understanding_output` the answer is one text, images being seen by the understanding
        encoder alone, after the resize of the VAE as in the release. Otherwise text and pictures
        in turn, up to `max_rounds` pictures and always a closing text.

        Args:
            think: the system prompt comes first.
            max_think_token_n: tokens of each text, the opening one included.
            image_shapes: (height, width) of pictures where the input has no image.
            max_image_skips: understanding mode: times a model that asks for a picture is told to
                write on without one.
            retokenise: feed back decoded texts, as the release does, not the sampled tokens.
            seed: of all that is random; None draws one from torch's global generator.

        Returns:
            The output pieces, texts and pictures; of a batch, a list per input.
        """
        _without_shortcut(enable_taylorseer)
        batch = bool(input_lists) and all(
            not isinstance(item, (str, PIL.Image.Image)) for item in input_lists
        )
        inputs = [list(items) for items in input_lists] if batch else [list(input_lists)]
        self._check_inputs(inputs, None)
        _check_length(max_think_token_n, "max_think_token_n")
        first = _seed(seed)
        seeds = [stream_seed(first, "rollout", number) for number in range(len(inputs))]
        temperature = text_temperature if do_sample else 0.0
        if understanding_output:
            contexts = [self._understanding(items, think) for items in inputs]
            params = SamplingParams(max_think_token_n - 1, temperature, max_image_skips)
            outputs = [[c.text] for c in self.complete(contexts, params, seeds)]
        else:
            guidance = Guidance(
                cfg_text_scale, cfg_img_scale, tuple(cfg_interval), cfg_renorm_type, cfg_renorm_min
            )
            params = InterleaveParams(
                max_think_token_n - 1,
                temperature,
                max_rounds,
                DrawingParams(num_timesteps, timestep_shift, guidance),
                retokenise,
                tuple(image_shapes),
            )
            answers = self.interleave_batch(inputs, params, seeds, think, progress)
            outputs = [list(answer.pieces) for answer in answers]
        return outputs if batch else outputs[0]

    def _understanding(self, items: Sequence[Piece], think: bool) -> list[Segment]:
        if not items:
            raise ValueError("nothing to answer: pass an image, a text, or both")
        segments = self._text(self.processor.prompts.system) if think else []
        for item in items:
            segments += (
                self._text(item) if isinstance(item, str) else self._image(item, 0, 0, vae=False)
            )
        return segments

    def __call__(
        self,
        image: PIL.Image.Image | None = None,
        text: str | None = None,
        input_list: Sequence[Piece] | None = None,
        **options,
    ) -> list[Piece]:
        """The output pieces for an image, a text, both, or any list of them; `options` are those of
        `interleave_inference`.
        """
        if isinstance(image, str):
            raise TypeError(f"image is {image!r}: open the file with PIL.Image.open")
        items = [piece for piece in (image, text) if piece is not None]
        items += input_list or []
        return self.interleave_inference(items, **options)


class _Once:
    """A value that is made when it is first asked for."""

    def __init__(self, make: Any) -> None:
        self._make, self._value = make, None

    def get(self) -> Any:
        if self._value is None:
            self._value = self._make()
        return self._value


def token_ids(special: SpecialTokens) -> dict[str, int]:
    """Framing tokens under the names of the public code."""
    return {
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "start_of_image": special.image_start,
        "end_of_image": special.image_end,
    }


def _seed(seed: int | None) -> int:
    return int(torch.randint(2**62, ())) if seed is None else seed


def _check_length(value: int, name: str) -> None:
    if value < 2:
        raise ValueError(f"{name}={value} leaves no token after the opening one: give at least 2")


def _without_shortcut(enable_taylorseer: bool) -> None:
    if enable_taylorseer:
        raise ValueError("enable_taylorseer=True is not supported: leave it out for exact steps")
