"""InterleaveInferencer with pictures: rows beside rows, contexts block by block, public calls."""

import shutil
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch

from data.contexts import interleaved_sequence
from data.example import Example
from data.prompts import PromptSet
from data.streams import stream_seed
from data.transforms import ImageTransform
from inferencer import InterleaveInferencer, InterleaveParams
from modeling.bagel import NoGenerationError
from modeling.drawing import DrawingParams, decode, draw, encode, latent_segment, noise_like
from modeling.flow import Guidance
from modeling.generation import Rollout, Round, SamplingParams, open_cache
from modeling.layers import patchify, unpatchify
from modeling.pretrained import CheckpointError, load_pretrained, save_pretrained
from modeling.sequence import Text, pack
from tests.test_generation import REQUEST, SkippingTokenizer
from tests.tiny_model import TINY_VAE, TOKENS, tiny_autoencoder, tiny_bagel, tiny_drawer
from tests.training import drawing_base, workspace

LIMITS = ImageTransform(max_image_size=16, min_image_size=8, image_stride=4, max_pixels=256)
PROMPTS = PromptSet("test", system="SYS", reference_intro="", transition="")
GUIDED = DrawingParams(num_timesteps=4, guidance=Guidance(3.0, 1.5))
PLAIN = DrawingParams(num_timesteps=3, guidance=Guidance(1.0, 1.0))
ASKING, CLOSING = "<think>see</think><image_start>", "<think>so</think><answer>up</answer>"


class Inferencer(InterleaveInferencer):
    """Keeps the contexts in which texts are written; with a script, the texts are given.

    script: seed of a row -> its texts; the last one is written again and again.
    """

    def __init__(self, model, tokenizer=None, script=None, vae_model=None):
        vae_model = vae_model or tiny_autoencoder()
        super().__init__(
            model, vae_model, tokenizer or SkippingTokenizer(), LIMITS, LIMITS, prompts=PROMPTS
        )
        self.seen, self.opened = [], []
        self.script = {
            stream_seed(seed, "rollout", number): texts[min(number, len(texts) - 1)]
            for seed, texts in (script or {}).items()
            for number in range(5)
        }

    def write_round(self, cache, params, seeds, step=lambda: None):
        self.seen.append(cache)
        if not self.script:
            return super().write_round(cache, params, seeds, step)
        encode = self.processor.tokenizer.encode
        return [Rollout((Round(tuple(encode(self.script[seed])), "eos", ()),)) for seed in seeds]

    def _open(self, contexts):
        self.opened.append(contexts)
        return super()._open(contexts)


def photo(seed, size=(16, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.fixture(scope="module")
def drawer():
    return tiny_drawer(seed=5)


@pytest.fixture(scope="module")
@torch.no_grad()
def restless():
    """A model that draws, often ends a text and often asks for a picture in it."""
    model = tiny_drawer(seed=5)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(6))
    model.language_model.model.embed_tokens.weight += 2 * direction
    inferencer = Inferencer(model)
    rows = [
        [*inferencer._image(photo(i), i, 0), Text(tuple(range(60, 90)), loss=True)]
        for i in range(3)
    ]
    mean = model(pack(rows, TOKENS)).mean(0)
    head = model.language_model.lm_head.weight
    head *= 0.2
    for token, level in ((REQUEST, 7.0), (TOKENS.eos, 6.2)):
        head[token] = level * mean / mean.square().sum()
    return model


def kinds(pieces):
    return "".join("T" if isinstance(piece, str) else "I" for piece in pieces)


def distance(first, second):
    """Largest difference of two pictures, in steps of 8 bits."""
    assert first.size == second.size
    return np.abs(np.asarray(first).astype(int) - np.asarray(second)).max()


# ---- rows beside rows ---------------------------------------------------------------------------

INPUTS = [
    [photo(0), "which one?"],
    [photo(1, (30, 14)), "and this one?"],  # drawn with 16x8 pixels
    ["draw a bird"],  # drawn in the size that was asked for
    [photo(2), "look", photo(3, (10, 18)), ""],
    [photo(4, (20, 20))],
    [photo(5), "again"],
]
SEEDS = [160 + i for i in range(len(INPUTS))]


def interleaved(model, inputs, seeds, think, **options):
    params = InterleaveParams(6, 1.0, 2, GUIDED, image_shape=(8, 12), **options)
    return Inferencer(model).interleave_batch(inputs, params, seeds, think)


@pytest.mark.parametrize("think", [True, False])
def test_a_row_does_not_depend_on_those_beside_it(restless, think):
    together = interleaved(restless, INPUTS, SEEDS, think)
    found = Counter(kinds(answer.pieces) for answer in together)
    assert set(found) == {"T", "TIT", "TITIT"}, found
    for items, seed, answer in zip(INPUTS, SEEDS, together, strict=True):
        (alone,) = interleaved(restless, [items], [seed], think)
        assert kinds(alone.pieces) == kinds(answer.pieces)
        assert alone.text == answer.text
        for one, other in zip(alone.rollouts, answer.rollouts, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-2)  # after a picture
        for one, other in zip(alone.pictures, answer.pictures, strict=True):
            assert distance(one, other) <= 1
    sizes = {picture.size for answer in together for picture in answer.pictures}
    assert len(sizes) >= 3
    assert len({picture.tobytes() for a in together for picture in a.pictures}) > len(sizes)


def test_seeds_are_all_that_is_random(restless):
    items, again = [INPUTS[0]] * 3, [SEEDS[0], SEEDS[0], SEEDS[5]]
    first, second, third = interleaved(restless, items, again, True)
    assert first.text == second.text != third.text
    by_number = interleaved(restless, INPUTS[:2], None, True)
    named = interleaved(restless, INPUTS[:2], [0, 1], True)
    assert [answer.text for answer in by_number] == [answer.text for answer in named]


def test_pictures_differ_by_seed_and_by_round(drawer):
    inferencer = Inferencer(drawer, script={seed: [ASKING] for seed in (1, 2)})
    params = InterleaveParams(drawing=PLAIN, max_rounds=2)
    pair, again = (inferencer.interleave_batch([INPUTS[0]] * 2, params, [1, 2]) for _ in range(2))
    pictures = [picture for answer in pair for picture in answer.pictures]
    assert min(distance(a, b) for i, a in enumerate(pictures) for b in pictures[:i]) > 20
    assert again == pair


# ---- rounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_closing_text_always_follows_the_last_picture(drawer, rounds):
    """One row never stops asking, one asks once, one does not ask."""
    script = {1: [ASKING], 2: [ASKING, CLOSING], 3: [CLOSING]}
    inferencer = Inferencer(drawer, script=script)
    params = InterleaveParams(drawing=PLAIN, max_rounds=rounds)
    answers = inferencer.interleave_batch(INPUTS[:3], params, [1, 2, 3])
    asking, once, never = answers
    assert kinds(asking.pieces) == "TI" * rounds + "T"
    assert kinds(once.pieces) == ("TIT" if rounds else "T")
    assert never.pieces == (CLOSING,) and never.pictures == ()
    assert all(kinds(a.pieces).count("T") == len(a.rollouts) for a in answers)
    assert asking.text == ASKING * (rounds + 1) and asking.answer is None
    assert never.answer == "up" and (once.answer == "up") == bool(rounds)
    assert [len(cache) for cache in inferencer.seen] == [3, 2, 1, 1][: rounds + 1]


def test_sampled_tokens_or_decoded_text_enter_the_context(drawer):
    """A text of 3 tokens, one of which reads as a tag of 13 letters."""
    tokens, lengths = (16 + ord("a"), REQUEST, 16 + ord("b")), {}

    class Sampled(Inferencer):
        def write_round(self, cache, params, seeds, step=lambda: None):
            self.seen.append(cache)
            return [Rollout((Round(tokens, "eos", ()),)) for _ in seeds]

    for retokenise in (False, True):
        inferencer = Sampled(drawer)
        params = InterleaveParams(
            drawing=PLAIN, max_rounds=1, retokenise=retokenise, image_shape=(8, 8)
        )
        (answer,) = inferencer.interleave_batch([["go"]], params)
        assert answer.pieces[0] == "a<image_start>b"
        before, after = (int(cache.lengths) for cache in inferencer.seen)
        lengths[retokenise] = after - before - 2 * (4 + 2)  # latents and patches of the picture
    assert lengths == {False: len(tokens) + 2, True: len("a<image_start>b") + 2}


# ---- contexts, block by block -------------------------------------------------------------------

# What is given -> what guidance compares: all of it, without the last text, without images. S is
# the system prompt; an image after the last text takes that text in again.
COMPARED = {
    "IT": ("SIT", "SI", "ST"),
    "TI": ("STI", "STI", "ST"),
    "T": ("ST", "S", "ST"),
    "I": ("SI", "SI", "S"),
    "TIT": ("STIt", "STI", "STt"),
    "ITI": ("SITi", "SITi", "ST"),
}
SEED = 7


def given(word):
    """Letters stand for texts and images; a second one of a kind is small."""
    pieces = {"S": "SYS", "T": "first?", "t": "second", "I": photo(0), "i": photo(1, (8, 16))}
    return [pieces[letter] for letter in word]


def image_blocks(image, number):
    """Its latents, under the noise of the row's `number`-th image, then its patches."""
    image = LIMITS.resize(image)
    autoencoder, size = tiny_autoencoder(), (16, image.height // 2, image.width // 2)
    noise = noise_like(size, stream_seed(SEED, "vae", number))
    (latents,) = encode(autoencoder, LIMITS(image)[None], noise[None])
    return [latent_segment(latents, 2), LIMITS.segment(image)]


def blocks(pieces):
    """Images of the input count down from 0."""
    segments, images = [], 0
    for piece in pieces:
        if isinstance(piece, str):
            segments.append(Text(tuple(SkippingTokenizer().encode(piece))))
        else:
            segments += image_blocks(piece, -images)
            images += 1
    return segments


def assert_same_context(cache, segments, model):
    expected = open_cache(model, [segments], TOKENS, 0)
    length = int(expected.lengths)
    assert cache.lengths.tolist() == [length]
    assert torch.equal(cache.positions, expected.positions)
    torch.testing.assert_close(cache.keys[:, :, :, :length], expected.keys, atol=2e-4, rtol=0)


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("word", COMPARED)
def test_contexts_and_the_picture_drawn_in_them(drawer, word, think):
    everything, *compared = (c if think else c[1:] for c in COMPARED[word])
    items = given(everything[think:])
    inferencer = Inferencer(drawer, script={SEED: [ASKING, ASKING, CLOSING]})
    params = InterleaveParams(drawing=GUIDED, max_rounds=2, image_shape=(8, 12))
    (answer,) = inferencer.interleave_batch([items], params, [SEED], think)
    assert kinds(answer.pieces) == "TITIT"

    context, spoken = blocks(given(everything)), blocks([ASKING])
    assert_same_context(inferencer.seen[0], context, drawer)
    last = [item for item in items if not isinstance(item, str)][-1:]
    width, height = last[0].size if last else (12, 8)
    for number, picture in enumerate(answer.pictures):
        context = context + spoken
        contexts = [context, *(blocks(given(part)) for part in compared)]
        caches = [open_cache(drawer, [segments], TOKENS, 0) for segments in contexts]
        noise = noise_like((1, 16, height // 2, width // 2), stream_seed(SEED, "draw", number))
        latents = draw(drawer, *caches, noise, GUIDED, TOKENS)
        pixels = (decode(tiny_autoencoder(), latents)[0] * 0.5 + 0.5) * 255
        expected = PIL.Image.fromarray(pixels.byte().permute(1, 2, 0).numpy())
        assert picture.size == (width, height) and distance(picture, expected) <= 1
        context = context + image_blocks(picture, number + 1)
        assert_same_context(inferencer.seen[number + 1], context, drawer)


def test_images_are_laid_on_white_and_resized_before_both_encoders(drawer):
    clear = PIL.Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    white = PIL.Image.new("RGB", (16, 16), (255, 255, 255))
    inferencer = Inferencer(drawer)
    latents, patches = inferencer._image(clear, SEED, 0)
    expected = image_blocks(white, 0)
    assert torch.equal(latents.tokens, expected[0].tokens)
    assert torch.equal(patches.patches, expected[1].patches)


def test_answers_are_laid_out_like_the_rows_of_training(drawer, monkeypatch):
    """A model that writes and draws what a row holds has then seen what it was trained on."""
    visual_thoughts = (photo(1), photo(2, (8, 16)))
    example = Example(
        *("source", "pid", "task", "first?", "up", photo(0), visual_thoughts, ("a", "b", "c"))
    )
    texts = ["<think>a</think><image_start>", "<image_end><think>b</think><image_start>", "end"]
    inferencer, pictures = Inferencer(drawer, script={SEED: texts}), iter(visual_thoughts)
    monkeypatch.setattr(inferencer, "_draw", lambda *_: [next(pictures)])
    inferencer.interleave_batch([[photo(0), "first?"]], seeds=[SEED])

    shown = enumerate((photo(0), *visual_thoughts))
    blocks_of_each = [image_blocks(picture, number) for number, picture in shown]
    latents = [unpatchify(b.tokens[None], b.height, b.width, 2)[0] for b, _ in blocks_of_each]
    sequence = interleaved_sequence(example, inferencer.processor, latents, 2)
    assert_same_context(inferencer.seen[2], sequence[:-1], drawer)


@pytest.mark.parametrize(
    ("guidance", "contexts"),
    [(Guidance(1.0, 1.5), 1), (Guidance(3.0, 1.0), 2), (Guidance(3.0, 1.5), 3)],
)
def test_contexts_that_guidance_does_not_need_are_not_computed(drawer, guidance, contexts):
    inferencer = Inferencer(drawer, script={0: [ASKING, CLOSING]})
    params = InterleaveParams(drawing=DrawingParams(3, guidance=guidance))
    inferencer.interleave_batch(INPUTS[:1], params)
    assert len(inferencer.opened) == contexts
    inferencer = Inferencer(drawer, script={0: [CLOSING]})
    inferencer.interleave_batch(INPUTS[:1], params)
    assert len(inferencer.opened) == 1


# ---- the public interface -----------------------------------------------------------------------


def test_the_single_calls_make_what_interleave_inference_makes(drawer):
    image, question = given("IT")
    row = stream_seed(SEED, "rollout", 0)  # the first row of a batch
    inferencer = Inferencer(drawer, script={row: [ASKING, CLOSING]})
    options = {"num_timesteps": 4, "cfg_text_scale": 3.0, "cfg_img_scale": 1.5}
    text, picture, closing = inferencer(image, question, think=True, seed=SEED, **options)
    assert (text, closing) == (ASKING, CLOSING)

    start = inferencer.init_gen_context()
    system = inferencer.update_context_text("SYS", start)
    seen = inferencer.update_context_image(image, system, seed=row)
    asked = inferencer.update_context_text(question, seen)
    blind = inferencer.update_context_text(question, system)
    drawn = inferencer.gen_image(
        picture.size[::-1],
        inferencer.update_context_text(text, asked),
        cfg_text_precontext=seen,
        cfg_img_precontext=blind,
        seed=row,
        **options,
    )
    assert distance(drawn, picture) <= 1
    lengths = [int(c.cache.lengths) for c in (start, system, seen, asked)]  # all stay as they were
    assert lengths == [0, 5, 5 + 2 * 18, 5 + 2 * 18 + len(question) + 2]
    other = inferencer.gen_image(picture.size[::-1], asked, 1.0, 1.0, num_timesteps=4, seed=row)
    assert distance(other, picture) > 5


def test_texts_of_a_context_are_those_of_interleave_inference(restless):
    image, question = given("IT")
    inferencer = Inferencer(restless)
    row = stream_seed(SEED, "rollout", 0)
    context = inferencer.update_context_image(image, inferencer.init_gen_context(), seed=row)
    context = inferencer.update_context_text(question, context)
    greedy = inferencer.gen_text(context, max_length=7, do_sample=False)
    options = {"max_rounds": 0, "max_think_token_n": 7, "seed": SEED}
    assert inferencer(image, question, **options) == [greedy] and greedy
    sampled = inferencer.gen_text(context, 7, temperature=0.9, seed=stream_seed(row, "rollout", 0))
    options |= {"do_sample": True, "text_temperature": 0.9}
    assert inferencer(image, question, **options) == [sampled] != [greedy]
    assert inferencer.gen_text(context, 7, seed=1) == inferencer.gen_text(context, 7, seed=1)
    logits = inferencer.next_token_logits(context)
    assert logits.shape == (1, 512)
    tokens = inferencer.write_round(context.cache, SamplingParams(6, 0.0, 0), [0])[0].token_ids
    assert tokens[0] == int(logits.argmax()) and len(tokens) > 1


def test_an_image_can_be_shown_to_one_encoder(drawer):
    inferencer = Inferencer(drawer)
    start = inferencer.init_gen_context()
    for vae, vit in ((True, False), (False, True)):
        context = inferencer.update_context_image(photo(0), start, vae, vit, seed=SEED)
        block = image_blocks(photo(0), 0)[int(vit)]
        assert_same_context(context.cache, [block], drawer)


def test_a_picture_is_what_its_latents_decode_to(drawer):
    inferencer = Inferencer(drawer)
    latents = 2 * noise_like((16, 4, 8), 3)
    picture = inferencer.decode_image(patchify(latents, 2), (8, 16))
    assert picture.size == (16, 8)
    pixels = (decode(tiny_autoencoder(), latents[None])[0] * 0.5 + 0.5) * 255
    assert pixels.std() > 10
    assert torch.equal(torch.tensor(np.asarray(picture)), pixels.permute(1, 2, 0).byte())


def test_without_a_seed_torch_gives_one(drawer):
    inferencer = Inferencer(drawer)
    context, options = inferencer.init_gen_context(), {"num_timesteps": 3, "cfg_text_scale": 1.0}
    pictures = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        pictures.append(inferencer.gen_image((8, 8), context, **options))
    assert distance(*pictures[:2]) == 0 and distance(*pictures[1:]) > 5


def test_understanding_mode_writes_on_where_a_picture_is_asked_for(restless):
    """Images are seen by the understanding encoder alone; nothing of what draws is needed."""
    inferencer = Inferencer(restless)
    inferencer.vae_model = None
    options = {"understanding_output": True, "max_think_token_n": 9, "seed": SEED}
    options |= {"do_sample": True, "text_temperature": 1.0, "max_image_skips": 2}
    outputs = inferencer.interleave_inference(INPUTS * 4, think=True, **options)
    skips = []
    for number, (items, pieces) in enumerate(zip(INPUTS * 4, outputs, strict=True)):
        context = [s for s in blocks(["SYS", *filter(None, items)]) if not hasattr(s, "tokens")]
        params = SamplingParams(8, 1.0, 2)
        (alone,) = inferencer.complete([context], params, [stream_seed(SEED, "rollout", number)])
        assert pieces == [alone.text]
        skips.append(alone.rollout.skips)
    assert {0, 1} <= set(skips)
    none = inferencer.interleave_inference(INPUTS[0], **{**options, "max_image_skips": 0})
    assert kinds(none) == "T"


def test_a_batch_of_inputs_gives_a_list_for_each(drawer):
    rows = [stream_seed(SEED, "rollout", number) for number in (0, 1)]
    inferencer = Inferencer(drawer, script=dict.fromkeys(rows, [ASKING, CLOSING]))
    options = {"seed": SEED, "max_rounds": 1, "num_timesteps": 3}
    outputs = inferencer.interleave_inference([INPUTS[1], ["x"]], image_shapes=(8, 8), **options)
    assert [kinds(pieces) for pieces in outputs] == ["TIT", "TIT"]
    assert [pieces[1].size for pieces in outputs] == [(16, 8), (8, 8)]
    single = inferencer.interleave_inference(INPUTS[1], **options)
    assert kinds(single) == "TIT" and distance(single[1], outputs[0][1]) <= 1
    same = inferencer(input_list=INPUTS[1], **options)
    assert distance(same[1], single[1]) == 0


# ---- what cannot be done ------------------------------------------------------------------------


def test_what_cannot_be_drawn_is_named(drawer):
    inferencer = Inferencer(drawer, script={0: [ASKING]})
    context = inferencer.init_gen_context()
    for shape, message in (
        ((10, 8), "pictures of 8x10 pixels do not divide .* tokens of 4x4: choose multiples of 4"),
        ((8, 36), "2x9 latent tokens is beyond max_latent_size=8"),
    ):
        with pytest.raises(ValueError, match=message):
            inferencer.gen_image(shape, context, cfg_text_scale=1.0)
        with pytest.raises(ValueError, match=message):
            inferencer.interleave_batch([["x"]], InterleaveParams(image_shape=shape, drawing=PLAIN))
    with pytest.raises(ValueError, match="num_timesteps=1 bounds no step"):
        inferencer.gen_image((8, 8), context, cfg_text_scale=1.0, num_timesteps=1)
    for given_contexts in ({}, {"cfg_text_precontext": context}):
        with pytest.raises(ValueError, match="cfg_text_scale=4.0 and cfg_img_scale=1.5 compare"):
            inferencer.gen_image((8, 8), context, **given_contexts)
    with pytest.raises(ValueError, match="renorm='tokens' is unknown"):
        inferencer.gen_image((8, 8), context, cfg_renorm_type="tokens")


def test_what_cannot_be_asked_is_named(drawer):
    inferencer = Inferencer(drawer)
    for call in (
        lambda: inferencer(text="x", enable_taylorseer=True),
        lambda: inferencer.gen_image((8, 8), inferencer.init_gen_context(), enable_taylorseer=True),
    ):
        with pytest.raises(ValueError, match="enable_taylorseer=True is not supported: leave it"):
            call()
    with pytest.raises(ValueError, match="max_rounds must be 0 or more, got -1"):
        inferencer(text="x", max_rounds=-1)
    for nothing in ([], [[]], [["x"], []]):
        with pytest.raises(ValueError, match="nothing to answer"):
            inferencer.interleave_inference(nothing)
    with pytest.raises(ValueError, match="nothing to answer"):
        inferencer.interleave_inference([], understanding_output=True)
    wrong = {"bos_token_id": 1, "eos_token_id": 2, "start_of_image": 3, "end_of_image": 4}
    with pytest.raises(ValueError, match="new_token_ids .* are not those of the tokenizer"):
        InterleaveInferencer(drawer, None, SkippingTokenizer(), new_token_ids=wrong)


def test_no_input_has_no_answer(drawer):
    assert Inferencer(drawer).answer_batch([]) == []
    assert Inferencer(drawer).interleave_batch([]) == []


def test_a_model_that_only_writes_says_so():
    for model, vae_model in ((tiny_drawer(), None), (tiny_bagel(), tiny_autoencoder())):
        inferencer = InterleaveInferencer(model, vae_model, SkippingTokenizer(), LIMITS, LIMITS)
        with pytest.raises(NoGenerationError, match="cannot draw: .* with draws=True"):
            inferencer(photo(0), "x")
        with pytest.raises(NoGenerationError, match="cannot draw"):
            inferencer.gen_image((8, 8), inferencer.init_gen_context(), cfg_text_scale=1.0)
        with pytest.raises(NoGenerationError, match="cannot draw"):
            inferencer.update_context_image(photo(0), inferencer.init_gen_context())
        pieces = inferencer(photo(0), "x", understanding_output=True, max_think_token_n=3)
        assert kinds(pieces) == "T"


def test_a_checkpoint_that_draws_opens_and_draws():
    inferencer = InterleaveInferencer.from_pretrained(drawing_base(), draws=True)
    assert inferencer.model.can_draw and inferencer.vae_model.config == TINY_VAE
    assert inferencer.model.config.max_latent_size == 8
    assert inferencer.processor.vae_transform == LIMITS
    context = inferencer.update_context_text("draw", inferencer.init_gen_context())
    picture = inferencer.gen_image((8, 16), context, 1.0, num_timesteps=3, seed=1)
    assert picture.size == (16, 8) and np.asarray(picture).std() > 0
    assert InterleaveInferencer.from_pretrained(drawing_base()).vae_model is None


def test_a_checkpoint_without_what_draws_is_named(tmp_path):
    with pytest.raises(NoGenerationError, match="base cannot draw: it has no latent heads"):
        InterleaveInferencer.from_pretrained(workspace() / "base", draws=True)
    folder = shutil.copytree(drawing_base(), tmp_path / "copy")
    (folder / "ae.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"copy/ae.safetensors is missing: this checkpoint"):
        InterleaveInferencer.from_pretrained(folder, draws=True)
    assert InterleaveInferencer.from_pretrained(folder).vae_model is None


def test_understanding_export_says_what_it_lacks(tmp_path):
    """Before any weights are read; a folder of the understanding path alone is a common export."""
    folder = tmp_path / "und"
    shutil.copytree(drawing_base(), folder)
    model = load_pretrained(drawing_base())
    save_pretrained(dict(model.named_parameters()), model.config, folder)
    message = "und cannot draw: it has no generation expert .* and no latent heads"
    with pytest.raises(NoGenerationError, match=message):
        InterleaveInferencer.from_pretrained(folder, draws=True)


def test_a_path_is_not_taken_for_a_text():
    inferencer = InterleaveInferencer.from_pretrained(drawing_base(), draws=True)
    with pytest.raises(TypeError, match="image is 'photo.png': open the file"):
        inferencer("photo.png", "q", understanding_output=True)
    with pytest.raises(TypeError, match="input 0 holds"):
        inferencer.interleave_inference([["q", 3]], understanding_output=True)


@pytest.mark.parametrize("name", ["max_think_token_n", "max_length"])
def test_lengths_are_named_as_they_were_given(name):
    inferencer = InterleaveInferencer.from_pretrained(drawing_base(), draws=True)
    with pytest.raises(ValueError, match=f"{name}=1 leaves no token"):
        if name == "max_length":
            inferencer.gen_text(inferencer.init_gen_context(), 1)
        inferencer.interleave_inference(["q"], max_think_token_n=1)
