"""Drawing: who sees noised latents, cached against packed velocities, the Euler loop, its costs."""

import dataclasses

import pytest
import torch

from modeling.bagel import Bagel, NoGenerationError, text_logits
from modeling.drawing import DrawingParams, decode, draw, encode, latent_segment, noise_like
from modeling.flow import Guidance, timesteps
from modeling.generation import open_cache
from modeling.kv_cache import KVCache
from modeling.layers import patchify
from modeling.sequence import Gap, Latent, Text, pack
from tests.test_generation import cached_rows, packed_rows
from tests.tiny_model import (
    TINY_CONFIG,
    TOKENS,
    random_image,
    tiny_autoencoder,
    tiny_bagel,
    tiny_drawer,
)

TOLERANCE = 5e-5  # float32
PATCH, CHANNELS = TINY_CONFIG.latent_patch_size, TINY_CONFIG.latent_channels
NOISINGS = ((0.2, 1), (0.7, 2), (0.7, 3))  # time, seed of the noise


@pytest.fixture(scope="module")
def drawer():
    return tiny_drawer()


def grid(height=4, width=6, seed=0):
    """Latents (Z, h, w)."""
    return noise_like((CHANNELS, height, width), seed)


def row(noisings=(), picture=0, question=(20, 21, 22)):
    """Text and an image, a picture noised a few times, itself, and what comes after it."""
    return [
        *(Text(question), random_image(2, 2), Text((30,))),
        *(latent_segment(grid(seed=picture), PATCH, t, grid(seed=s)) for t, s in noisings),
        latent_segment(grid(seed=picture), PATCH),
        *(random_image(3, 2, seed=9), Text((40, 41, 42), loss=True)),
    ]


def learned(model, *rows):
    """Logits and velocities of rows in one pack."""
    return model(pack(rows, TOKENS), head=text_logits)


# ---- noised pictures in a packed sequence -----------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_noised_pictures_are_seen_by_nobody_else(drawer, monkeypatch, backend):
    """The text is written as if there were none of them, and each is learned as if it were the
    only one.
    """
    alone = [learned(drawer, row([noising]))[1] for noising in NOISINGS]
    undrawn = learned(drawer, row())
    monkeypatch.setattr(drawer, "attention_backend", backend)
    logits, velocities = learned(drawer, row(NOISINGS), row([NOISINGS[1]], question=(7, 8)))
    assert velocities.shape == (4 * 6, 64)
    torch.testing.assert_close(logits[:4], undrawn, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(velocities[:18], torch.cat(alone), atol=TOLERANCE, rtol=0)
    # all of which could have shown an error
    assert logits.abs().max() > 1 and velocities.abs().max() > 1
    times_and_noises = [float((one - alone[1]).abs().max()) for one in (alone[0], alone[2])]
    assert min(times_and_noises) > 0.1
    assert (velocities[18:] - alone[1]).abs().max() > 0.1  # the question matters


def test_the_picture_itself_is_seen_by_what_follows_only(drawer):
    logits, velocities = learned(drawer, row(NOISINGS))
    other = row(NOISINGS)
    other[6] = latent_segment(grid(seed=8), PATCH)
    changed, same = learned(drawer, other)
    torch.testing.assert_close(same, velocities, atol=TOLERANCE, rtol=0)
    assert (changed - logits).abs().amax(dim=1).min() > 1e-2


def test_flow_time_and_place_of_a_latent_token_matter(drawer):
    segment = latent_segment(grid(), PATCH, 0.5, grid(seed=1))
    still = dataclasses.replace(segment, tokens=torch.ones_like(segment.tokens))
    (base, later, tall) = (
        learned(drawer, [Text((20,)), changed])[1]
        for changed in (
            still,
            dataclasses.replace(still, time=0.6),
            dataclasses.replace(still, height=3, width=2),
        )
    )
    assert (later - base).abs().amax(dim=1).min() > 1e-3
    assert torch.cdist(base, base).topk(2, largest=False).values[:, 1].min() > 1e-3
    assert (tall - base)[1].abs().max() < (tall - base)[2].abs().max()  # (0, 2) against (1, 0)


EVERYTHING = row(NOISINGS)
BATCHES = {
    "everything": EVERYTHING,
    "no picture to draw": [s for s in EVERYTHING if not isinstance(s, Latent)],
    "latents out of sight": row(),
    "no image": [s for s in EVERYTHING if not hasattr(s, "patches")],
    "text alone": [Text((20, 21), loss=True)],
}


@pytest.mark.parametrize("batch", BATCHES)
def test_each_parameter_has_a_gradient_whatever_a_batch_holds(batch):
    """Processes that average gradients, or gather weights layer by layer, count on it."""
    segments = BATCHES[batch]
    plain, always = tiny_bagel(visual_gen=True), tiny_bagel(visual_gen=True)
    always.set_always_draws(True)
    results = []
    for model in (plain, always):
        out = learned(model, segments)
        logits, velocities = out if isinstance(out, tuple) else (out, out.new_zeros(0, 64))
        (logits.square().sum() + velocities.square().sum()).backward()
        results.append((logits, velocities))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)
    for (name, one), other in zip(plain.named_parameters(), always.parameters(), strict=True):
        assert other.grad is not None, name
        expected = torch.zeros_like(one) if one.grad is None else one.grad
        torch.testing.assert_close(other.grad, expected, atol=1e-3, rtol=1e-4)


def test_latents_for_a_model_that_cannot_take_them():
    for model in (tiny_bagel(), Bagel(TINY_CONFIG, generation_expert=False)):
        with pytest.raises(NoGenerationError, match="latent heads .* experts='all'"):
            learned(model, row())


def test_a_picture_beyond_the_position_table_is_named(drawer):
    wide = latent_segment(grid(2, 18), PATCH)
    with pytest.raises(ValueError, match="1x9 latent tokens is beyond max_latent_size=8: make it"):
        learned(drawer, [wide])


# ---- the same over a cache ----------------------------------------------------------------------


def context(seed=0, question=(50, 51, 52)):
    """Text, a picture as latents and patches, text."""
    picture = latent_segment(grid(2 + 2 * (seed % 2), 4, seed=seed), PATCH)
    return [Text((60, 61)), picture, random_image(2, 1 + seed, seed), Text(question)]


CONTEXTS = {
    "one": [context()],
    "ragged": [context(), context(1, (53,)), [Text((54, 55))]],
    "gaps": [[Gap(), *context()], [*context(1), Gap()]],
    "empty": [[], []],
    "some empty": [context(), []],
}


@pytest.mark.parametrize("contexts", ["one", "ragged", "gaps"])
def test_packed_logits_equal_cached_logits_after_pictures(drawer, contexts):
    contexts = CONTEXTS[contexts]
    rounds = [((60, 61), (62,)), ((70,), ()), ((80, 81, 82),)][: len(contexts)]
    cached = cached_rows(drawer, contexts, rounds)
    for segments, texts, ours in zip(contexts, rounds, cached, strict=True):
        packed, _ = packed_rows(drawer, segments, texts)
        assert packed.abs().max() > 1
        torch.testing.assert_close(ours, packed, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("contexts", CONTEXTS)
def test_cached_velocities_equal_those_that_are_learned(drawer, contexts):
    """Of pictures of several sizes at several times, after contexts of several lengths."""
    contexts = CONTEXTS[contexts]
    sizes, times = [(4, 6), (2, 4), (6, 2)], [0.3, 1.0, 0.8]
    pictures = [
        latent_segment(grid(*size), PATCH, time, grid(*size, seed=5))
        for size, time, _ in zip(sizes, times, contexts, strict=False)
    ]
    cache = open_cache(drawer, contexts, TOKENS, room=8)
    query = pack([[dataclasses.replace(picture, target=None)] for picture in pictures], TOKENS)
    cached = drawer.velocity(query.after(cache.positions), cache)
    packed = [
        learned(drawer, [*segments, picture])[1]
        for segments, picture in zip(contexts, pictures, strict=True)
    ]
    assert cached.abs().max() > 1
    torch.testing.assert_close(cached, torch.cat(packed), atol=TOLERANCE, rtol=0)


# ---- drawing ------------------------------------------------------------------------------------

FULL = [context(), context(1, (53, 54))]
TEXTLESS = [segments[:-1] for segments in FULL]
BLIND = [[segments[0], segments[-1]] for segments in FULL]
STEPS = 5  # at times 1, 0.9, 0.75 and 0.5
GUIDANCE = {
    "none": (Guidance(1.0, 1.5), [1, 1, 1, 1]),
    "text": (Guidance(3.0, 1.0), [2, 2, 2, 2]),
    "global": (Guidance(3.0, 1.5), [3, 3, 3, 3]),
    "channel": (Guidance(3.0, 1.5, renorm="channel"), [3, 3, 3, 3]),
    "text_channel": (Guidance(3.0, 1.5, renorm="text_channel"), [3, 3, 3, 3]),
    "renorm_min": (Guidance(6.0, 2.0, renorm_min=0.9), [3, 3, 3, 3]),
    "interval": (Guidance(3.0, 1.5, (0.6, 0.95)), [1, 3, 3, 1]),
    "never": (Guidance(3.0, 1.5, (0.2, 0.3)), [1, 1, 1, 1]),
}
NOISE = torch.stack([grid(seed=11), grid(seed=12)])


@pytest.fixture(scope="module")
def caches(drawer):
    return [open_cache(drawer, contexts, TOKENS, 0) for contexts in (FULL, TEXTLESS, BLIND)]


def drawn(drawer, caches, guidance, noise=NOISE, rows=None, **options):
    params = DrawingParams(STEPS, 3.0, guidance)
    parts = [cache if rows is None else cache.select(rows) for cache in caches]
    return draw(drawer, *parts, noise, params, TOKENS, **options)


def by_hand(drawer, number, guidance):
    """Euler's steps along packed velocities, one picture and one context at a time."""
    x = patchify(NOISE[number], PATCH)
    times = timesteps(STEPS, 3.0).tolist()
    for t, after in zip(times[:-1], times[1:], strict=True):
        here = Latent(x, 2, 3, t, torch.zeros_like(x))
        velocities = [
            learned(drawer, [*contexts[number], here])[1][None]
            for contexts in (FULL, TEXTLESS, BLIND)
        ]
        if guidance.text_scale <= 1 or not guidance.interval[0] < t <= guidance.interval[1]:
            velocities[1:] = None, None
        elif guidance.image_scale <= 1:
            velocities[2] = None
        x = x - (t - after) * guidance(*velocities)[0]
    return x


@pytest.mark.parametrize("case", GUIDANCE)
def test_drawing_follows_the_packed_velocities(drawer, caches, case):
    guidance, _ = GUIDANCE[case]
    pictures = drawn(drawer, caches, guidance)
    assert pictures.shape == NOISE.shape and pictures.dtype == torch.float32
    for number, picture in enumerate(pictures):
        expected = by_hand(drawer, number, guidance)
        torch.testing.assert_close(patchify(picture, PATCH), expected, atol=2e-4, rtol=0)


def test_every_kind_of_guidance_draws_another_picture(drawer, caches):
    pictures = [drawn(drawer, caches, guidance) for guidance, _ in GUIDANCE.values()]
    same = {
        (one, other)
        for i, (one, first) in enumerate(zip(GUIDANCE, pictures, strict=True))
        for other, second in list(zip(GUIDANCE, pictures, strict=True))[:i]
        if (first - second).abs().max() < 0.05
    }
    assert same == {("never", "none")}


@pytest.mark.parametrize("case", GUIDANCE)
def test_pictures_do_not_depend_on_those_beside_them(drawer, caches, case):
    guidance, _ = GUIDANCE[case]
    together = drawn(drawer, caches, guidance)
    alone = [drawn(drawer, caches, guidance, NOISE[[i]], [i]) for i in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-4, rtol=0)


def test_a_seed_draws_one_picture(drawer, caches):
    guidance, _ = GUIDANCE["global"]
    first = drawn(drawer, caches, guidance)
    assert torch.equal(drawn(drawer, caches, guidance), first)
    assert torch.equal(noise_like((2, 3), 4), noise_like((2, 3), 4))
    assert not torch.equal(noise_like((2, 3), 4), noise_like((2, 3), 5))
    other = drawn(drawer, caches, guidance, NOISE.flip(0))
    assert (other - first).abs().max() > 0.1


@pytest.mark.parametrize("case", GUIDANCE)
def test_each_step_forwards_the_contexts_that_it_compares(drawer, caches, monkeypatch, case):
    guidance, contexts = GUIDANCE[case]
    rows, ticks, velocity = [], [], Bagel.velocity

    def counted(model, batch, cache):
        rows.append(len(batch.samples))
        assert len(cache) == len(batch.samples)
        return velocity(model, batch, cache)

    monkeypatch.setattr(Bagel, "velocity", counted)
    drawn(drawer, caches, guidance, step=lambda: ticks.append(len(rows)))
    assert rows == [count * len(NOISE) for count in contexts]
    assert ticks == [1, 2, 3, 4]


@pytest.mark.parametrize("case", ["none", "global"])
@pytest.mark.parametrize("room", [0, 30])
def test_drawing_leaves_the_caches_as_they_are(drawer, caches, case, room):
    caches = [cache.select([0, 1], cache.extent + room) for cache in caches]
    before = [
        (c.keys.clone(), c.values.clone(), c.lengths.clone(), c.positions.clone(), c.extent)
        for c in caches
    ]
    drawn(drawer, caches, GUIDANCE[case][0])
    for cache, (keys, values, lengths, positions, extent) in zip(caches, before, strict=True):
        assert torch.equal(cache.keys, keys) and torch.equal(cache.values, values)
        assert torch.equal(cache.lengths, lengths) and torch.equal(cache.positions, positions)
        assert cache.extent == extent


def test_contexts_that_are_not_compared_are_not_looked_at(drawer, caches):
    full, textless, _ = caches
    params = DrawingParams(STEPS, 3.0, GUIDANCE["none"][0])
    alone = draw(drawer, full, None, None, NOISE, params, TOKENS)
    assert torch.equal(alone, drawn(drawer, caches, params.guidance))
    params = DrawingParams(STEPS, 3.0, GUIDANCE["text"][0])
    by_text = draw(drawer, full, textless, None, NOISE, params, TOKENS)
    assert torch.equal(by_text, drawn(drawer, caches, params.guidance))


def test_a_picture_may_have_no_context(drawer):
    nothing = KVCache(drawer.config.llm, 2, 0)
    picture = drawn(drawer, [nothing] * 3, Guidance(1.0, 1.0))
    velocity = learned(drawer, [Latent(patchify(NOISE[0], PATCH), 2, 3, 1.0, torch.ones(6, 64))])[1]
    one = DrawingParams(2, 1.0, Guidance(1.0, 1.0))
    (end, _) = draw(drawer, *[nothing] * 3, NOISE, one, TOKENS)
    expected = patchify(NOISE[0], PATCH) - velocity
    torch.testing.assert_close(patchify(end, PATCH), expected, atol=TOLERANCE, rtol=0)
    assert (picture[0] - end).abs().max() > 0.1


def test_what_cannot_be_drawn_is_named(drawer, caches):
    for model in (tiny_bagel(), Bagel(TINY_CONFIG, generation_expert=False)):
        with pytest.raises(NoGenerationError, match="cannot draw: .* latent heads were not loaded"):
            drawn(model, caches, Guidance())
    with pytest.raises(ValueError, match="9x1 latent tokens is beyond max_latent_size=8"):
        drawn(drawer, caches, Guidance(), torch.zeros(2, CHANNELS, 18, 2))
    with pytest.raises(ValueError, match="4x3 does not divide into 2x2 patches"):
        drawn(drawer, caches, Guidance(), torch.zeros(2, CHANNELS, 4, 3))
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"num_timesteps={count} bounds no step"):
            draw(drawer, *caches, NOISE, DrawingParams(count), TOKENS)


# ---- pictures to latents and back ---------------------------------------------------------------


def test_segments_hold_the_picture_or_a_point_on_its_way():
    picture, noise = grid(seed=1), grid(seed=2)
    clean = latent_segment(picture, PATCH)
    assert torch.equal(clean.tokens, patchify(picture, PATCH))
    assert (clean.height, clean.width, clean.time, clean.target) == (2, 3, 0.0, None)
    noised = latent_segment(picture, PATCH, 0.25, noise)
    expected = patchify(0.75 * picture + 0.25 * noise, PATCH)
    torch.testing.assert_close(noised.tokens, expected)
    assert torch.equal(noised.target, patchify(noise - picture, PATCH))
    assert (noised.height, noised.width, noised.time) == (2, 3, 0.25)


def test_latents_and_pixels_are_float32_whatever_the_vae_is():
    exact, rounded = tiny_autoencoder(), tiny_autoencoder().bfloat16()
    pixels = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise = noise_like((2, CHANNELS, 4, 6), 3)
    assert torch.equal(encode(exact, pixels, noise), exact.encode(pixels, noise))
    assert torch.equal(encode(exact, pixels), exact.encode(pixels))
    for ours, reference in (
        (encode(rounded, pixels, noise), encode(exact, pixels, noise)),
        (decode(rounded, noise), decode(exact, noise)),
    ):
        assert ours.dtype == torch.float32
        assert 0 < (ours - reference).abs().max() < 0.1
    loud = decode(exact, 1e4 * noise)
    assert exact.decode(1e4 * noise).abs().max() > loud.abs().max() == 1
