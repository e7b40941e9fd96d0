"""Several devices: accelerate's hooks change no number, and every tensor is where its layer is.

There is no second device here that computes. Numbers are compared with layers whose weights are on
disk, placement with layers on the "meta" device, which has shapes only.
"""

import dataclasses
import logging
import sys

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.utils import send_to_device

from data.miniworld.world import TASKS
from examples.inference_demo import draw_example
from inferencer import InterleaveInferencer
from modeling.attention import CachedPlan, SDPAPlan
from modeling.bagel import Bagel, text_logits
from modeling.dispatch import NOT_SPLIT, Dispatch, spread
from modeling.drawing import DrawingParams, draw
from modeling.flow import Guidance
from modeling.generation import SamplingParams, generate, open_cache
from modeling.kv_cache import KVCache
from modeling.pretrained import CheckpointError
from modeling.qwen2_mot import Route
from modeling.sequence import Latent, Split, Text, pack
from tests.tiny_model import (
    TINY_CONFIG,
    TOKENS,
    FakeTokenizer,
    random_image,
    randomise_,
    tiny_bagel,
)
from tests.training import drawing_base, workspace

LAYERS = "language_model.model.layers"
IMAGE_LAYERS = "vit_model.vision_model.encoder.layers"
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, logger="accelerate")


# ---- numbers: weights on disk -----------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> InterleaveInferencer:
    return InterleaveInferencer.from_pretrained(drawing_base(), draws=True)


def on_disk(model: Bagel, away: tuple[str, ...]) -> dict[str, str]:
    """A map with the given modules on disk and everything else on the CPU, layers not split."""
    modules = dict(model.named_modules())
    units = [name for name, module in modules.items() if type(module).__name__ in NOT_SPLIT]
    inside = tuple(f"{name}." for name in units)
    units += [
        name
        for name, module in modules.items()
        if not list(module.children()) and not name.startswith(inside)
    ]
    return {name: "disk" if name.startswith(away) else "cpu" for name in units}


DISK = {
    "layers": (f"{LAYERS}.1", f"{IMAGE_LAYERS}.0"),
    "ends": (
        "language_model.model.embed_tokens",
        "language_model.lm_head",
        "connector",
        "time_embedder",
        "vae2llm",
        "llm2vae",
    ),
}


@pytest.fixture(scope="module", params=["layers", "ends", "auto"])
def dispatched(request, plain, tmp_path_factory) -> InterleaveInferencer:
    size = sum(parameter.nbytes for parameter in plain.model.parameters())
    where: dict = {"device_map": "auto", "max_memory": {"cpu": size // 2}}
    if request.param != "auto":
        where = {"device_map": on_disk(plain.model, DISK[request.param])}
    folder = tmp_path_factory.mktemp("offload") / request.param
    opened = InterleaveInferencer.from_pretrained(
        drawing_base(), draws=True, offload_folder=folder, **where
    )
    away = {name for name, p in opened.model.named_parameters() if p.is_meta}
    assert away and len(away) < len(list(opened.model.parameters()))
    for module in DISK.get(request.param, ()):
        assert any(name.startswith(module) for name in away)
    return opened


def test_offloaded_weights_write_the_same(plain, dispatched):
    drawn = [draw_example(task, seed=5) for task in TASKS]
    items = [([item.problem_image], item.question) for item in drawn] + [([], "look")]
    for temperature in (0.0, 1.0):
        expected, answers = (
            inferencer.answer_batch(items, 12, temperature, max_image_skips=1)
            for inferencer in (plain, dispatched)
        )
        # the plain model decodes with fused weights, the other one cannot
        for ours, reference in zip(answers, expected, strict=True):
            assert ours.rollout.token_ids == reference.rollout.token_ids
            assert ours.rollout.logprobs == pytest.approx(reference.rollout.logprobs, abs=1e-4)
        assert len({answer.rollout.logprobs for answer in expected}) == len(items)


def test_offloaded_weights_draw_the_same(plain, dispatched):
    photo = PIL.Image.fromarray(np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3))
    pictures = []
    for inferencer in (plain, dispatched):
        start = inferencer.init_gen_context()
        shown = inferencer.update_context_image(photo, start, seed=1)
        context = inferencer.update_context_text("draw", shown)
        other = inferencer.update_context_text("draw", start)
        pictures.append(
            inferencer.gen_image(
                (8, 16), context, 2.0, 1.5, shown, other, (0.0, 1.0), num_timesteps=3, seed=1
            )
        )
    expected, picture = map(np.asarray, pictures)
    assert expected.std() > 0 and np.array_equal(picture, expected)


def test_offloaded_weights_give_the_same_logits(plain, dispatched):
    expected, logits = (
        inferencer.next_token_logits(inferencer.init_gen_context())
        for inferencer in (plain, dispatched)
    )
    assert torch.equal(logits, expected) and logits.device == dispatched.model.device == CPU
    assert dispatched.model.dtype == torch.float32


# ---- placement: layers on two devices ---------------------------------------------------------


def four_layers(answering: int = 2) -> Bagel:
    """One layer answers with numbers of its own, which depend on their count only: so that layer
    and those before it may be without any numbers.
    """
    llm = dataclasses.replace(TINY_CONFIG.llm, num_hidden_layers=4)
    model = Bagel(dataclasses.replace(TINY_CONFIG, llm=llm), visual_gen=True)

    def answer(module, inputs, output):
        generator = torch.Generator().manual_seed(len(output))
        return torch.randn(output.shape, generator=generator)

    model.language_model.model.layers[answering].register_forward_hook(answer)
    return randomise_(model).requires_grad_(False)


CONTEXTS = [
    [Text((30, 31, 32)), random_image(2, 3), Text((40,))],
    [Text((50,)), Latent(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), 2, 2)],
]


@pytest.fixture
def halves() -> Bagel:
    """Layers 1 and 2 without numbers."""
    model = four_layers()
    for layer in model.language_model.model.layers[1:3]:
        layer.to(META)
    return spread(model, [CPU, META, META, CPU])


@pytest.fixture
def plans(monkeypatch) -> list[torch.device]:
    """The devices of all plans that are made for a cache."""
    made, init = [], CachedPlan.__init__

    def recorded(self, samples, lengths, extent):
        made.append(lengths.device)
        init(self, samples, lengths, extent)

    monkeypatch.setattr(CachedPlan, "__init__", recorded)
    return made


def test_keys_and_values_are_on_the_device_of_their_layer(halves):
    spread_cache = open_cache(halves, CONTEXTS, TOKENS, room=2)
    plain_cache = open_cache(four_layers(), CONTEXTS, TOKENS, room=2)
    assert spread_cache.device == CPU and list(spread_cache.others) == [META]
    away = spread_cache.others[META]
    assert away.keys.shape == away.values.shape == plain_cache.keys[1:3].shape
    assert torch.equal(spread_cache.keys, plain_cache.keys[[0, 3]])
    assert torch.equal(spread_cache.values, plain_cache.values[[0, 3]])
    assert plain_cache.keys[3].abs().max() > 0.1 and not plain_cache.others
    joined = KVCache.joined([(spread_cache, [1, 0, 1]), (spread_cache, [0])], 50)
    expected = plain_cache.select([1, 0, 1, 0], 50)
    assert torch.equal(joined.keys, expected.keys[[0, 3]])
    assert torch.equal(joined.positions, expected.positions)
    assert joined.others[META].values.shape == expected.values[1:3].shape
    branch = joined.branch(2)
    assert branch.others[META].keys.shape[:2] == (2, 2) and branch.places == joined.places


def test_plans_and_tables_move_once_per_forward_and_device(halves, plans):
    seen = []
    for layer in halves.language_model.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    open_cache(halves, CONTEXTS, TOKENS, room=2)
    assert plans == [CPU, META]
    for x, (cos, sin), plan, route, index, *_ in seen:
        device = [CPU, META, META, CPU][index]
        tensors = (x, cos, sin, plan.mask, plan.rows, plan.slots, route.und_index, route.gen_index)
        assert {tensor.device for tensor in tensors} == {device}
    for one, other in ((0, 3), (1, 2)):  # the same objects
        assert all(a is b for a, b in zip(seen[one][1:4], seen[other][1:4], strict=True))


def test_the_last_layer_may_be_elsewhere():
    """The final norms get hidden states and routes on the main device."""
    model, plain = four_layers(answering=3), four_layers(answering=3)
    model.language_model.model.layers[3].to(META)
    spread(model, [CPU, CPU, CPU, META])
    batch = pack(CONTEXTS, TOKENS)
    embeddings = plain.embed(batch)
    hidden = [one.hidden_states(embeddings, batch) for one in (model, plain)]
    assert torch.equal(*hidden)
    model = four_layers(answering=0)
    model.language_model.model.layers[3].to(META)
    spread(model, [CPU, CPU, CPU, META])
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        model.hidden_states(embeddings, batch)  # on their way home


def test_writing_and_drawing_over_two_devices(halves, plans):
    """With the third layer's numbers given, those of the first two do not matter to any result."""
    params = SamplingParams(5, 0.0, max_image_skips=0)
    rollouts = [
        generate(model, CONTEXTS, FakeTokenizer(), params) for model in (four_layers(), halves)
    ]
    assert rollouts[0] == rollouts[1]
    assert plans.count(META) == 1 + max(len(rollout.logprobs) for rollout in rollouts[1])
    noise = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    drawing, grids = DrawingParams(3, 3.0, Guidance(2.0, 1.5, (0.0, 1.0))), []
    for model in (four_layers(), halves):
        parts = ([row[:end] for row in CONTEXTS] for end in (2, 1, 1))
        caches = [open_cache(model, part, TOKENS, room=0) for part in parts]
        grids.append(draw(model, *caches, noise, drawing, TOKENS))
    assert torch.equal(*grids) and (grids[0] - noise).abs().max() > 0.1


def test_what_is_computed_elsewhere_comes_home():
    """Every module whose output meets that of others, called as in a forward of all kinds of
    tokens; only layers and what is inside of modules answer where they are.
    """
    model, calls = tiny_bagel(visual_gen=True).requires_grad_(False), {}
    language = model.language_model
    called = dict(model.named_children()) | dict(language.named_children())
    called |= dict(language.model.named_children()) | {"layer": language.model.layers[1]}
    for name in ("language_model", "model", "layers"):
        called.pop(name)
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: calls.update({name: inputs}))
        for name, module in called.items()
    ]
    tokens = torch.randn(4, 64)
    learned = Latent(tokens, 2, 2, 0.5, target=tokens)
    contexts = [[Text((1,), loss=True), random_image(2, 2), learned, Latent(tokens, 2, 2)]]
    model(pack(contexts, TOKENS), head=text_logits)
    for hook in hooks:
        hook.remove()
    spread(model, [META, META])
    assert calls.keys() == called.keys()
    devices = {name: called[name](*inputs).device for name, inputs in calls.items()}
    assert devices.pop("layer") == CPU and set(devices.values()) == {META} and len(devices) == 11


def test_one_device_has_one_block_of_memory():
    cache = KVCache(TINY_CONFIG.llm, 3, 7, torch.bfloat16, "cpu")
    assert cache.keys.shape == cache.values.shape == (2, 3, 2, 7, 16) and not cache.others
    plan = cache.plan([(Split(1, "causal"),)] * 3)
    new = torch.ones(3, 2, 16)
    keys, values = cache.append(1, new, new, plan)
    assert keys.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()
    assert values.untyped_storage().data_ptr() == cache.values.untyped_storage().data_ptr()
    same = KVCache(TINY_CONFIG.llm, 3, 7, device=[CPU, CPU])
    assert same.keys.shape == cache.keys.shape and not same.others
    with pytest.raises(ValueError, match="3 devices for 2 layers"):
        KVCache(TINY_CONFIG.llm, 3, 7, device=[CPU] * 3)


def test_what_accelerate_moves_for_a_layer():
    """Its hooks call `to` of whatever has one: plans are built once, caches stay."""
    plan = SDPAPlan([(Split(2, "causal"),), (Split(3, "full"),)], CPU)
    assert plan.to("cpu") is plan and send_to_device(plan, "cpu") is plan
    moved = send_to_device(plan, "meta")
    assert moved is plan.to(META) is moved.to(META)
    assert moved.mask.device == moved.padding.gather.device == META
    assert moved.mask.shape == plan.mask.shape
    cached = KVCache(TINY_CONFIG.llm, 1, 4)
    assert send_to_device(cached, "meta") is cached
    assert send_to_device(Route(*torch.ones(2, 3)), "meta").gen_index.device == META


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpus_write_and_draw_what_the_cpu_does(plain):
    """Over the first and the last GPU (which may be the same) and CPU memory."""
    last = torch.cuda.device_count() - 1
    places = on_disk(plain.model, ()) | {f"{LAYERS}.0": 0, f"{LAYERS}.1": last}
    places |= {"language_model.lm_head": last, f"{IMAGE_LAYERS}.0": last}
    opened = InterleaveInferencer.from_pretrained(drawing_base(), draws=True, device_map=places)
    item = draw_example(TASKS[0], seed=5)
    latents, rollouts = [], []
    for inferencer in (plain, opened):
        answer = inferencer.answer([item.problem_image], item.question, max_new_tokens=12)
        rollouts.append(answer.rollout)
        start = inferencer.init_gen_context()
        caches = [inferencer.update_context_text("draw", start).cache, start.cache, start.cache]
        noise = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(1))
        special = inferencer.processor.tokenizer.special
        drawing = DrawingParams(3, 3.0, Guidance(2.0, 1.0))
        latents.append(draw(inferencer.model, *caches, noise, drawing, special).cpu())
    assert rollouts[1].token_ids == rollouts[0].token_ids
    assert rollouts[1].logprobs == pytest.approx(rollouts[0].logprobs, abs=1e-4)
    torch.testing.assert_close(latents[1], latents[0], atol=2e-4, rtol=0)


# ---- what goes where --------------------------------------------------------------------------


def gpus(first: str, second: str, rest: str) -> dict[str, str]:
    return {
        "vit_model": "cuda:2",
        "connector": rest,
        "vit_pos_embed": rest,
        "language_model.lm_head": "cuda:3",
        "language_model.model.embed_tokens": "cuda:4",
        "language_model.model.norm": rest,
        "language_model.model.norm_moe_gen": rest,
        f"{LAYERS}.0": first,
        f"{LAYERS}.1": second,
    }


@pytest.mark.parametrize(
    ("places", "devices"),
    [
        (gpus("cuda:0", "cuda:1", "cuda:1"), ["cuda:0", "cuda:1"]),
        (gpus("cuda:1", "cuda:0", "cuda:0"), ["cuda:1", "cuda:0"]),
        (gpus("cuda:0", "disk", "cpu"), ["cuda:0", "cuda:0"]),
        (gpus("cpu", "cuda:1", "cpu"), ["cuda:2", "cuda:1"]),  # the first GPU of the map
        ({"": "cpu"}, ["cpu", "cpu"]),
        ({"language_model": "cuda:1", "vit_model": "cuda:0"}, ["cuda:1", "cuda:1"]),
    ],
)
def test_devices_of_a_map(places, devices, monkeypatch, tmp_path):
    """Weights are not moved here: there is no GPU."""
    calls = []
    monkeypatch.setattr(accelerate, "dispatch_model", lambda *_, **options: calls.append(options))
    model = Dispatch(places, offload_folder=tmp_path).place(tiny_bagel())
    expected = tuple(map(torch.device, devices))
    assert model.language_model.model.layer_devices == expected
    assert model.device == expected[0] and calls[0]["main_device"] == devices[0]


def test_layers_are_not_split():
    """Room for a layer and a half per device means one layer per device."""
    model = tiny_bagel()
    layer = sum(parameter.nbytes for parameter in model.language_model.model.layers[0].parameters())
    limits = dict.fromkeys(range(8), 3 * layer // 2) | {"cpu": 0}
    places = Dispatch("auto", limits)._auto(model)
    inside = [name for name in places if name.startswith((f"{LAYERS}.", f"{IMAGE_LAYERS}."))]
    assert inside and all(name.rpartition(".")[2].isdigit() for name in inside)
    assert places[f"{LAYERS}.0"] != places[f"{LAYERS}.1"]


# ---- errors -----------------------------------------------------------------------------------


def test_without_accelerate_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="needs the accelerate package: pip install") as error:
        InterleaveInferencer.from_pretrained("no_such_folder", device_map="auto")
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError):  # which nothing else needs
        InterleaveInferencer.from_pretrained("no_such_folder")


def test_bad_requests_are_refused(tmp_path):
    base, model = workspace() / "base", tiny_bagel()
    with pytest.raises(ValueError, match="device=cuda and device_map exclude each other"):
        InterleaveInferencer.from_pretrained(base, "cuda", device_map="auto")
    with pytest.raises(ValueError, match="'auto' or a mapping, got 'balanced'"):
        Dispatch("balanced")
    with pytest.raises(ValueError, match=r"no place for .*layers.1 as a whole"):
        Dispatch({f"{LAYERS}.0": "cpu", f"{LAYERS}.1.mlp": "cpu"}).place(model)
    with pytest.raises(ValueError, match="pass offload_folder="):
        Dispatch({"": "disk"}).place(model)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="holds the weights of another call: empty the folder"):
        Dispatch({"": "disk"}, offload_folder=tmp_path).place(model)
