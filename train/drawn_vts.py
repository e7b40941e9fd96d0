"""Visual thoughts of the teacher's own: drawn by the current teacher instead of read from the data.

The teacher of this step thinks and draws after the student's context, in one process and as one
batch; its pictures take the place of the record's. Drawing needs the generation expert, the latent
heads and the VAE, which stay as they are on disk, and a whole model on every device.
"""

import dataclasses

from torch import nn

from data.mixture import Drawn
from data.processor import Processor, check_drawing_limits
from data.streams import stream_seed
from inferencer import InterleaveInferencer, InterleaveParams
from modeling.drawing import DrawingParams
from modeling.flow import Guidance
from modeling.pretrained import load_autoencoder, load_pretrained, require_drawing
from train.config import OpsdConfig
from train.parallel import RolloutCopy, World

Rows = list[tuple[int, Drawn]]


class DrawingTeacher:
    """Replaces the visual thoughts of a step's rows.

    Raises:
        NoGenerationError: the starting checkpoint has no latent heads.
        CheckpointError: it has no VAE.
    """

    def __init__(self, config: OpsdConfig, processor: Processor, world: World) -> None:
        model_args, vt = config.model, config.visual_thoughts
        dtype, device = world.compute_dtype, world.device
        path = model_args.model_path
        require_drawing(path, model_args.weights)
        model = load_pretrained(path, model_args.weights, "all", dtype, device)
        self.copy = RolloutCopy(model.config, world, model)
        vae = load_autoencoder(path, dtype, device).requires_grad_(False)
        check_drawing_limits(processor.vae_transform, model.config, vae.config, str(path))
        self.inferencer = InterleaveInferencer.of(model, processor, vae)
        self.seed = config.run.global_seed
        self.params = InterleaveParams(
            max_new_tokens=vt.vt_max_think_tokens,
            temperature=config.sampling.sample_temperature,
            max_rounds=vt.vt_rounds,
            drawing=DrawingParams(
                vt.vt_num_timesteps,
                vt.vt_timestep_shift,
                Guidance(vt.vt_cfg_text_scale, vt.vt_cfg_img_scale),
            ),
            closing=False,
        )

    def redraw(self, rows: Rows, teacher: nn.Module, step: int) -> Rows:
        """The rows with pictures that `teacher` draws. Those it asks for no picture for are left
        out: there is nothing to teach from. Collective.
        """
        self.copy.refresh(teacher)
        suffix = self.inferencer.processor.prompts.instruction_suffix
        inputs = [
            [drawn.example.problem_image, drawn.example.question + suffix] for _, drawn in rows
        ]
        seeds = [stream_seed(self.seed, "draw", step, row) for row, _ in rows]
        answers = self.inferencer.interleave_batch(inputs, self.params, seeds)
        return [
            (row, _with_pictures(drawn, answer.pictures))
            for (row, drawn), answer in zip(rows, answers, strict=True)
            if answer.pictures
        ]


def _with_pictures(drawn: Drawn, pictures: tuple) -> Drawn:
    example = dataclasses.replace(drawn.example, visual_thoughts=pictures)
    return dataclasses.replace(drawn, example=example)
