"""InterleaveInferencer: questions about images, answered in text by any checkpoint.

    inferencer = InterleaveInferencer.from_pretrained("models/mini-base")
    print(inferencer.answer([PIL.Image.open("problem.png")], "which piece fits").text)

This is the understanding mode: images and a question in, a text completion out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch

from data.answers import extract_answer
from data.contexts import question_context
from data.processor import Processor
from data.streams import stream_seed
from data.transforms import to_rgb
from modeling.bagel import Bagel
from modeling.generation import Rollout, SamplingParams, generate
from modeling.pretrained import Weights, load_pretrained
from modeling.sequence import Segment


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one context."""

    text: str
    answer: str | None  # content of the last <answer>...</answer>, None where there is none
    rollout: Rollout


class InterleaveInferencer:
    """A model with the processor of its checkpoint folder."""

    def __init__(self, model: Bagel, processor: Processor) -> None:
        self.model = model
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        weights: Weights = "auto",
    ) -> "InterleaveInferencer":
        """Open the understanding path of a checkpoint folder; see `load_pretrained` for errors."""
        model = load_pretrained(path, weights=weights, dtype=dtype, device=device)
        return cls(model, Processor.from_pretrained(path))

    def __call__(
        self, image: PIL.Image.Image | None = None, text: str | None = None, **sampling
    ) -> list[str]:
        """The output pieces for one image and / or text; in this mode one piece of text."""
        if image is None and text is None:
            raise ValueError("nothing to answer: pass an image, a text, or both")
        images = [] if image is None else [image]
        return [self.answer(images, text or "", **sampling).text]

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
        rollouts = generate(self.model, contexts, tokenizer, params, seeds)
        texts = [tokenizer.decode(rollout.token_ids) for rollout in rollouts]
        return [
            Completion(text, extract_answer(text), rollout)
            for text, rollout in zip(texts, rollouts, strict=True)
        ]
