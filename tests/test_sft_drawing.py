"""Fine-tuning on rows that draw: the rows, loss and update by hand, what is trained and saved."""

import re
import shutil
import sys
from collections import Counter

import pytest
import torch

from data.contexts import interleaved_pictures
from data.mixture import INTERLEAVED
from data.streams import stream_seed
from inferencer import InterleaveInferencer
from modeling.bagel import text_logits
from modeling.drawing import encode, noise_like
from modeling.layers import patchify
from modeling.pretrained import is_generation_key, load_autoencoder, load_pretrained
from modeling.sequence import Gap, Image, Latent, Text, pack, segment_length
from modeling.tokenizer import SpecialTokens
from tests.test_resume import folder_of, same, states_of, stop_after
from tests.training import (
    CONFIGS,
    VAE_TRANSFORM,
    WORLD,
    drawing_base,
    drawing_flags,
    draws,
    largest_difference,
    metric_lines,
    run_sft,
    same_segments,
    sft_argv,
    sft_config,
    weights_of,
    workspace,
)
from train import sft
from train.parallel import World

LINEAR = {"eps": 0.1, "lr": 0.5, "min_lr": 0.0}  # AdamW steps that do not magnify rounding
DROPOUT = {"text_cond_dropout_prob": 0.2, "vit_cond_dropout_prob": 0.3}


def opened(folder, **flags):
    """Configuration, model and maker of rows."""
    config = sft_config(folder, **drawing_flags(**flags))
    model = sft.open_trainee(config, WORLD)
    processor = sft.open_processor(config, sft.open_mixture(config))
    return config, model, sft.open_interleaver(config, model, processor, WORLD)


def sequences_of(config, interleaver, step=0):
    seed = config.run.global_seed
    return sft.step_sequences(draws(config, step), interleaver.processor, interleaver, step, seed)


def learned(segments):
    return [s for s in segments if isinstance(s, Latent) and s.target is not None]


# ---- rows ---------------------------------------------------------------------------------------


def test_rows_are_drawn_and_written_in_the_contexts_of_the_mixture(tmp_path):
    kept = {f"{part}_cond_dropout_prob": 0.0 for part in ("text", "vae", "vit")}
    config, _, interleaver = opened(tmp_path, global_batch=32, noisings=2, **kept)
    sequences, rows = sequences_of(config, interleaver), draws(config)
    kinds = Counter((drawn.context, len(drawn.example.visual_thoughts)) for _, drawn in rows)
    assert kinds.keys() >= {(INTERLEAVED, 1), (INTERLEAVED, 2), ("student", 1), ("teacher", 1)}
    for (_, drawn), segments in zip(rows, sequences, strict=True):
        pictures = len(drawn.example.visual_thoughts)
        count = {kind: sum(isinstance(s, kind) for s in segments) for kind in (Latent, Image, Gap)}
        if drawn.context == INTERLEAVED:
            assert count == {Latent: 1 + 3 * pictures, Image: 1 + pictures, Gap: 0}
            assert len(learned(segments)) == 2 * pictures
        else:
            assert count[Latent] == 0 and count[Image] == 1 + (drawn.context == "teacher")
        losses = [s.loss for s in segments if isinstance(s, Text)]
        assert sum(losses) == (pictures + 1 if drawn.context == INTERLEAVED else 1)
    sizes = {(s.height, s.width) for segments in sequences for s in learned(segments)}
    assert sizes == {(4, 4), (2, 4)}


def test_latents_are_samples_of_the_posterior(tmp_path):
    config, _, interleaver = opened(tmp_path, global_batch=8, vae_cond_dropout_prob=0.0)
    autoencoder, seed, step = load_autoencoder(drawing_base()), config.run.global_seed, 3
    rows = zip(draws(config, step), sequences_of(config, interleaver, step), strict=True)
    for (row, drawn), segments in rows:
        clean = [s for s in segments if isinstance(s, Latent) and s.target is None]
        pictures = interleaved_pictures(drawn.example, interleaver.processor)
        for number, block in enumerate(clean):
            pixels = VAE_TRANSFORM(pictures[number])[None]
            size = 1, 16, 2 * block.height, 2 * block.width
            noise = noise_like(size, stream_seed(seed, "vae", step, row, number))
            (sample,), (mean,) = encode(autoencoder, pixels, noise), encode(autoencoder, pixels)
            torch.testing.assert_close(block.tokens, patchify(sample, 2), atol=1e-5, rtol=0)
            assert (sample - mean).abs().mean() > 0.1


def test_noise_is_added_along_a_line_to_the_picture_that_follows(tmp_path):
    config, _, interleaver = opened(tmp_path, global_batch=8, noisings=3, vae_cond_dropout_prob=0.0)
    times = []
    for segments in sequences_of(config, interleaver):
        latents = [s for s in segments if isinstance(s, Latent)]
        for place, block in enumerate(latents):
            if block.target is None:
                continue
            picture = next(s for s in latents[place:] if s.target is None)
            line = picture.tokens + block.time * block.target
            torch.testing.assert_close(block.tokens, line, atol=1e-5, rtol=0)
            noise = block.target + picture.tokens
            assert abs(float(noise.mean())) < 0.2 and abs(float(noise.std()) - 1) < 0.15
            times.append(block.time)
    assert len(set(times)) == len(times) >= 9


def test_a_row_is_a_function_of_seed_step_and_row(tmp_path):
    config, _, interleaver = opened(tmp_path, global_batch=8, **DROPOUT)
    rows = [(row, drawn.example) for row, drawn in draws(config) if drawn.context == INTERLEAVED]
    together = interleaver.sequences(rows, 5)
    for number in (0, len(rows) - 1):
        (alone,) = interleaver.sequences(rows[number : number + 1], 5)
        assert [type(s) for s in alone] == [type(s) for s in together[number]]
        for one, other in zip(alone, together[number], strict=True):
            if isinstance(one, Latent):
                torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=0)
                assert one.time == other.time
            else:
                assert same_segments([one], [other])
    assert all(map(same_segments, interleaver.sequences(rows, 5), together))
    assert not any(map(same_segments, interleaver.sequences(rows, 6), together))
    moved = interleaver.sequences([(row + 1, example) for row, example in rows], 5)
    assert not any(map(same_segments, moved, together))


@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_times_are_logit_normal_and_shifted(tmp_path, shift):
    """A shift by s moves the logit of a time by log s."""
    _, _, interleaver = opened(tmp_path, noisings=600, timestep_shift=shift)
    points = interleaver._noisings([torch.zeros(1, 1, 1)] * 2, 0, 0)
    assert [len(part) for part in points] == [600, 600]
    logits = torch.tensor([p.time for part in points for p in part]).logit()
    assert float(logits.mean() - torch.tensor(shift).log()) == pytest.approx(0, abs=0.1)
    assert float(logits.std()) == pytest.approx(1, abs=0.1)


def test_conditions_are_dropped_at_their_rates(tmp_path):
    rates = {"text": 0.1, "vae": 0.3, "vit": 0.6}
    flags = {f"{name}_cond_dropout_prob": rate for name, rate in rates.items()}
    _, _, interleaver = opened(tmp_path, **flags)
    dropped = [interleaver._dropout(3, step, row) for step in range(40) for row in range(50)]
    texts = torch.tensor([d.text for d in dropped]).float()
    latents, patches = (
        torch.tensor([[i in part for i in range(3)] for part in parts]).float()
        for parts in ([d.latents for d in dropped], [d.patches for d in dropped])
    )
    assert float(texts.mean()) == pytest.approx(0.1, abs=0.03)
    for part, rate in ((latents, 0.3), (patches, 0.6)):
        assert part.mean(0).tolist() == pytest.approx([rate] * 3, abs=0.04)
    # each choice is one of its own
    choices = torch.cat([texts[:, None], latents, patches], dim=1)
    assert (torch.corrcoef(choices.T) - torch.eye(7)).abs().max() < 0.08


# ---- loss and update ----------------------------------------------------------------------------


def losses_by_hand(model, sequences, special):
    """Row by row in float64: cross-entropies, their weights, squared errors of velocities."""
    parts = []
    for segments in sequences:
        batch = pack([segments], special)
        with torch.no_grad():
            logits, velocities = model(batch, head=text_logits)
        chosen = logits.double().log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
        errors = velocities.double() - batch.targets.double().reshape(velocities.shape)
        weights = torch.cat(
            [
                torch.full((len(s.token_ids) + 1,), (len(s.token_ids) + 1) ** -0.5)
                for s in segments
                if isinstance(s, Text) and s.loss
            ]
        )
        parts.append((-chosen, weights.double(), errors.square()))
    return [list(part) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize("reweighting", [False, True])
def test_loss_is_the_mean_over_tokens_and_over_channels_of_the_step(tmp_path, reweighting):
    flags = {"global_batch": 8, "noisings": 2, "ce_weight": 0.7, "mse_weight": 1.3, **DROPOUT}
    flags |= {"ce_loss_reweighting": reweighting, "micro_batch": 3, "save_every": 1}
    lines = run_sft(tmp_path, lr=1e-2, **drawing_flags(**flags))
    config, _, interleaver = opened(tmp_path, **flags)
    special = interleaver.processor.tokenizer.special
    for step, folder in enumerate([drawing_base(), folder_of(tmp_path, 1)]):
        model = load_pretrained(folder, experts="all")
        model.set_always_draws(True)
        sequences = sequences_of(config, interleaver, step)
        nll, weights, errors = losses_by_hand(model, sequences, special)
        used = weights if reweighting else [torch.ones_like(w) for w in weights]
        total = sum(map(torch.sum, used))
        ce = sum((n * w).sum() for n, w in zip(nll, used, strict=True)) / total
        mse = sum(map(torch.sum, errors)) / sum(e.numel() for e in errors)
        assert lines[step]["loss"] == pytest.approx(float(0.7 * ce + 1.3 * mse), rel=1e-5)
        assert lines[step]["ce"] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)
        assert lines[step]["mse"] == pytest.approx(float(mse), rel=1e-5)
        # means over rows would be other numbers, and so would a mean of the parts' means
        assert len({len(row) for row in nll}) > 2 < len({len(row) for row in errors} | {0})
        drawn = [row.mean() for row in errors if len(row)]
        assert abs(float(torch.stack(drawn).mean() / mse) - 1) > 1e-3


@pytest.mark.parametrize("freeze", [False, True])
def test_update_is_that_of_the_loss(tmp_path, freeze):
    """One update of plain size: AdamW's first step with a large eps is lr * g / (|g| + eps)."""
    flags = {"global_batch": 6, "total_steps": 1, "lr": 0.5, "eps": 1.0, "freeze_und": freeze}
    flags |= {"mse_weight": 2.0, "vae_cond_dropout_prob": 0.5}
    run_sft(tmp_path, micro_batch=4, max_grad_norm=float("inf"), **drawing_flags(**flags))
    config, _, interleaver = opened(tmp_path, **flags)
    model = load_pretrained(drawing_base(), experts="all")
    special = interleaver.processor.tokenizer.special
    batch = pack(sequences_of(config, interleaver), special)
    logits, velocities = model(batch, head=text_logits)
    ce = torch.nn.functional.cross_entropy(logits, batch.labels)
    (ce + 2 * (velocities - batch.targets).square().mean()).backward()
    after, norms = weights_of(tmp_path, 1), {True: 0.0, False: 0.0}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if freeze and not is_generation_key(name):
            assert torch.equal(after[name], parameter.detach()), name
            continue
        expected = parameter.detach() - 0.5 * gradient / (gradient.abs() + 1.0)
        assert float((after[name] - expected).abs().max()) <= 2e-5, name
        norms[is_generation_key(name)] += float(gradient.square().sum())
    assert metric_lines(tmp_path)[0]["grad_norm"] == pytest.approx(
        sum(norms.values()) ** 0.5, rel=1e-4
    )
    assert norms[True] > 1e-2 and (norms[False] > 1e-2) is not freeze


def test_forwards_of_any_size_give_the_same_run(tmp_path):
    """Also where one holds no row that draws, and where a row is longer than the limit."""
    common = drawing_flags(total_steps=3, global_batch=8, noisings=2, **DROPOUT, **LINEAR)
    sizes = {"one": {"micro_batch": 1}, "all": {"micro_batch": 8}}
    sizes["some"] = {"micro_batch": 5, "max_num_tokens": 205}
    lines = {name: run_sft(tmp_path / name, **common, **size) for name, size in sizes.items()}
    config, _, interleaver = opened(tmp_path / "some", **{**common, **sizes["some"]})
    sequences = sequences_of(config, interleaver)
    parts = sft.forwards(sequences, 5, 205)
    lengths = [sum(map(segment_length, row)) for row in sequences]
    assert max(lengths) > 205 and 2 < len(parts) < 8
    weights = {name: weights_of(tmp_path / name, 3) for name in sizes}
    for name in ("one", "some"):
        assert largest_difference(weights[name], weights["all"]) <= 2e-5
        for line, expected in zip(lines[name], lines["all"], strict=True):
            assert line == pytest.approx(expected, rel=1e-4)
    assert largest_difference(weights["all"], weights_of(drawing_base())) > 1e-2


def test_forwards_hold_consecutive_rows_up_to_the_limit_that_is_given():
    def row(length):
        return [Text((0,) * (length - 2))]

    def split(lengths, micro_batch, most):
        parts = sft.forwards([row(n) for n in lengths], micro_batch, most)
        return [[segment_length(*r) for r in part] for part in parts]

    lengths = [4, 5, 20, 3, 3, 3, 9, 30]
    assert split(lengths, 3, 0) == [[4, 5, 20], [3, 3, 3], [9, 30]]
    assert split(lengths, 8, 9) == [[4, 5], [20], [3, 3, 3], [9], [30]]  # two are longer than 9
    assert split(lengths, 1, 9) == split(lengths, 8, 9)  # then micro_batch does not count
    assert split(lengths, 8, 12) == [[4, 5], [20], [3, 3, 3], [9], [30]]
    assert split([], 2, 9) == []


def test_ranks_agree_on_the_number_of_forwards_before_the_first():
    """Asked for later, a rank with fewer would wait in another collective than the rest."""
    asked = []

    class Three(World):
        def max(self, value):
            asked.append(value)
            return 3.0

    first, second = (pack([[Text((n,), loss=True)]], SpecialTokens(1, 2, 3, 4)) for n in (5, 6))
    steps = sft.in_step([first, second], Three(**vars(WORLD)))
    batch, share = next(steps)
    assert batch is first and share == 1.0 and asked == [2]
    assert [(b is second, share) for b, share in steps] == [(True, 1.0), (True, 0.0)]


# ---- what is trained ----------------------------------------------------------------------------


def changed(folder, step):
    """Keys of the weights that differ from the base, bit for bit, and the others."""
    base, after = weights_of(drawing_base()), weights_of(folder, step)
    assert base.keys() == after.keys()
    moved = {key for key in base if not torch.equal(base[key], after[key])}
    return moved, base.keys() - moved


def test_frozen_weights_stay_bit_for_bit(tmp_path):
    run_sft(tmp_path / "frozen", **drawing_flags(freeze_und=True, weight_decay=0.1))
    run_sft(tmp_path / "free", **drawing_flags())
    moved, still = changed(tmp_path / "frozen", 2)
    assert all(map(is_generation_key, moved)) and not any(map(is_generation_key, still))
    moved, still = changed(tmp_path / "free", 2)
    assert still == set()


def test_text_alone_moves_nothing_that_draws(tmp_path):
    """With and without --visual_gen True, rows of text train the same weights by the same loss."""
    text = drawing_flags(dataset_config_file=CONFIGS / "mini_pretrain.yaml", **LINEAR)
    lines = {
        heads: run_sft(tmp_path / str(heads), **{**text, "visual_gen": heads})
        for heads in (False, True)
    }
    for with_heads, without in zip(lines[True], lines[False], strict=True):
        assert with_heads.keys() - without.keys() == {"ce"}
        assert with_heads["ce"] == pytest.approx(without["loss"], rel=1e-6)
        for key, value in without.items():
            assert with_heads[key] == pytest.approx(value, rel=1e-5), key
    for heads in (False, True):
        moved, still = changed(tmp_path / str(heads), 2)
        assert {is_generation_key(key) for key in moved} == {False}
        assert {is_generation_key(key) for key in still} == {True}
    both = [weights_of(tmp_path / str(heads), 2) for heads in (False, True)]
    assert largest_difference(*both) <= 1e-6


def test_without_weight_of_the_error_no_picture_is_noised(tmp_path):
    flags = drawing_flags(mse_weight=0.0)
    lines = run_sft(tmp_path, **flags)
    for line in lines:
        assert line["loss"] == pytest.approx(line["ce"], rel=1e-6) and "mse" not in line
    config, _, interleaver = opened(tmp_path, mse_weight=0.0)
    sequences = sequences_of(config, interleaver)
    assert sum(len(learned(segments)) for segments in sequences) == 0
    assert any(isinstance(s, Latent) for segments in sequences for s in segments)
    moved, _ = changed(tmp_path, 2)
    assert not any(key.startswith("llm2vae") for key in moved)
    assert any("moe_gen" in key for key in moved)  # texts see the pictures through it


def test_both_losses_fall(tmp_path):
    flags = {"total_steps": 30, "global_batch": 8, "micro_batch": 8, "lr": 5e-3, "noisings": 2}
    lines = run_sft(tmp_path, **drawing_flags(**flags))
    for name in ("ce", "mse"):
        first, last = (sum(line[name] for line in part) / 5 for part in (lines[:5], lines[-5:]))
        assert last < 0.8 * first, name


# ---- what is written, and how a run goes on -----------------------------------------------------


def test_a_checkpoint_draws(tmp_path):
    run_sft(tmp_path, **drawing_flags())
    folder = folder_of(tmp_path, 2)
    for name in ("ae.safetensors", "vae_config.json"):
        assert (folder / name).read_bytes() == (drawing_base() / name).read_bytes()
    trained = InterleaveInferencer.from_pretrained(folder, draws=True)
    assert trained.processor.vae_transform == VAE_TRANSFORM
    pictures = [
        inferencer.gen_image((16, 16), inferencer.init_gen_context(), 1.0, num_timesteps=3, seed=1)
        for inferencer in (
            trained,
            InterleaveInferencer.from_pretrained(drawing_base(), draws=True),
        )
    ]
    assert pictures[0] != pictures[1]
    state = trained.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights_of(folder).items())


RUN = {"total_steps": 4, "save_every": 1, "log_every": 2, "lr": 2e-3, "warmup_steps": 2}
PATCHLESS = "interleaved_reasoning: {dataset_names: [Ragged, Jigsaw_Assembly]}\n"


@pytest.mark.parametrize("kind", ["all", "frozen", "without patches"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, kind):
    flags = drawing_flags(**RUN, **DROPOUT, freeze_und=kind == "frozen")
    if kind == "without patches":
        flags["dataset_config_file"] = tmp_path / "drawn.yaml"
        flags["dataset_config_file"].write_text(PATCHLESS)
        flags["vit_cond_dropout_prob"] = 1.0
    whole, again = tmp_path / "whole", tmp_path / "again"
    lines = run_sft(whole, **flags)
    stop_after(whole, 1, again)
    assert run_sft(again, **flags, resume="latest") == lines
    for step in (2, 3, 4):
        assert same(states_of(again, step), states_of(whole, step))
        assert same(weights_of(again, step), weights_of(whole, step))
    names = (name.split() for name in states_of(whole, 4))
    moments = [key.removeprefix("module.") for part, _, key in names if part == "optimizer"]
    assert {is_generation_key(key) for key in moments} == {True, kind == "frozen"}


# ---- what does not go together ------------------------------------------------------------------


MISFITS = {
    "rows to draw": (
        {"visual_gen": False},
        "drawn.yaml has rows of the context 'interleaved', .*: add --visual_gen True",
    ),
    "no heads": (
        {"model_path": "base"},
        "base cannot draw: it has no latent heads .* use a checkpoint that has them",
    ),
    "no VAE": (
        {"model_path": "without VAE"},
        "ae.safetensors is missing: this checkpoint cannot turn latents into pictures",
    ),
    "nothing to train": (
        {"visual_gen": False, "freeze_und": True},
        "--freeze_und True leaves nothing to train without --visual_gen True",
    ),
    "no loss": (
        {"ce_weight": 0, "mse_weight": 0},
        "--ce_weight 0 leaves no loss",
    ),
    "no noise": ({"noisings": 0}, "--noisings 0 must be 1 or more"),
    "no rate": ({"vae_cond_dropout_prob": 1.5}, r"--vae_cond_dropout_prob 1.5 is not in \[0, 1\]"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_go_together_is_one_line(tmp_path, monkeypatch, capsys, name):
    flags, message = MISFITS[name]
    if flags.get("model_path") == "base":
        flags = {"model_path": workspace() / "base"}
    elif "model_path" in flags:
        flags = {"model_path": shutil.copytree(drawing_base(), tmp_path / "copy")}
        (tmp_path / "copy" / "ae.safetensors").unlink()
    argv = sft_argv(tmp_path, **drawing_flags(**flags))
    monkeypatch.setattr(sys, "argv", ["sft.py", *argv])
    with pytest.raises(SystemExit) as exit_:
        sft.main()
    *usage, error = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and "error: " in error and re.search(message, error)
    assert all(line.startswith("usage: ") for line in usage)
