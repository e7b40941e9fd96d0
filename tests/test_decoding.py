"""The fused decoding step against the model's own forward, and the memory it lives in."""

import dataclasses
import random
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling import decoding, generation
from modeling.bagel import Bagel, text_logits
from modeling.decoding import DecodeStep, Graphs, can_fuse, fuse
from modeling.generation import SamplingParams, Workspace, generate, open_cache
from modeling.kv_cache import Store
from modeling.sequence import Text, decode_batch
from tests.tiny_model import (
    TINY_CONFIG,
    TOKENS,
    FakeTokenizer,
    random_image,
    randomise_,
    tiny_bagel,
)

CONTEXTS = [[Text((20, 21, 22))], [random_image(2, 3), Text((30,) * 9)], [Text(())]]
TOKEN_IDS = torch.tensor([30, 40, 50])


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.06)])
def test_equals_the_forward_of_the_model(dtype, tolerance):
    """Also in the keys and values that it leaves behind. (Norms are in float32 in every dtype.)"""
    model = tiny_bagel().to(dtype)
    cache, other = (open_cache(model, CONTEXTS, TOKENS, room=3) for _ in range(2))
    with torch.no_grad():
        expected = model(decode_batch(TOKEN_IDS, cache.positions), cache, text_logits)
    step = DecodeStep(model, Store(other.keys, other.values))
    logits = step(TOKEN_IDS, other.positions, other.lengths, other.extent + 2)
    assert logits.dtype == dtype and expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(other.keys, cache.keys, atol=tolerance, rtol=0)
    torch.testing.assert_close(other.values, cache.values, atol=tolerance, rtol=0)


def test_rows_of_one_length_need_no_mask():
    model = tiny_bagel()
    contexts = [[Text(tuple(range(20 + row, 29 + row)))] for row in range(3)]
    cache, other = (open_cache(model, contexts, TOKENS, room=3) for _ in range(2))
    logits = []
    for one, ragged in ((cache, True), (other, False)):
        step = DecodeStep(model, Store(one.keys, one.values))
        logits.append(step(TOKEN_IDS, one.positions, one.lengths, one.extent + 1, ragged))
    torch.testing.assert_close(*logits, atol=1e-6, rtol=0)
    assert torch.equal(cache.keys, other.keys) and torch.equal(cache.values, other.values)


@pytest.mark.parametrize("habits", [generation.CPU_HABITS, generation.ACCELERATOR_HABITS])
def test_steps_that_know_that_rows_are_of_one_length(monkeypatch, habits):
    """On the CPU alone: a recorded step is played at other lengths again."""
    seen, call = [], DecodeStep.__call__

    def noted(self, tokens, positions, lengths, extent, ragged):
        seen.append(ragged)
        return call(self, tokens, positions, lengths, extent, ragged)

    monkeypatch.setattr(DecodeStep, "__call__", noted)
    monkeypatch.setattr(generation, "_habits", lambda model: habits)
    contexts = [[Text((20, 21))], [Text((20, 21))], [Text((20, 21, 22))]]
    params = SamplingParams(6, 0.0, max_image_skips=0)
    generate(tiny_bagel(), contexts, FakeTokenizer(), params, budgets=[6, 6, 3])
    assert seen[:4] == [True] * 4  # in the fourth step, the row that has ended is still seen
    assert seen[4:] == [habits.extent_step > 1] * (len(seen) - 4) and len(seen) > 5


def test_a_layer_is_one_graph_for_the_compiler(monkeypatch):
    """As on CUDA, without its code generation: no break, and its writes into the cache are kept."""
    compiled = torch.compile(decoding._layer, backend="aot_eager", fullgraph=True)
    model = tiny_bagel()
    caches = [open_cache(model, CONTEXTS, TOKENS, room=8) for _ in range(2)]
    steps = [DecodeStep(model, Store(cache.keys, cache.values)) for cache in caches]
    for rows, extent in ((3, 24), (2, 24), (2, 25)):  # several buckets
        logits = []
        for step, cache, layer in zip(steps, caches, (decoding._layer, compiled), strict=True):
            monkeypatch.setattr(decoding, "_layer_function", lambda device, layer=layer: layer)
            where = cache.positions[:rows], cache.lengths[:rows], extent
            logits.append(step(TOKEN_IDS[:rows], *where))
        torch.testing.assert_close(*logits, atol=1e-6, rtol=0)
    assert torch.equal(caches[0].keys, caches[1].keys) and caches[0].keys.any()


def test_fusing_moves_memory_and_nothing_else():
    model = tiny_bagel()
    before, names = states(model), [name for name, _ in model.named_parameters()]
    objects = list(model.parameters())
    weights = fuse(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = fuse(model)  # nothing to do
    assert [w.qkv.data_ptr() for w in again] == [w.qkv.data_ptr() for w in weights]
    attention = model.language_model.model.layers[1].self_attn
    with torch.no_grad():
        attention.k_proj.weight.fill_(3)
        attention.v_proj.bias.fill_(4)
    E, H, K = 16, TINY_CONFIG.llm.num_attention_heads, TINY_CONFIG.llm.num_key_value_heads
    assert (weights[1].qkv[:, H * E : (H + K) * E] == 3).all() and (weights[1].qkv != 3).any()
    assert (weights[1].qkv_bias[-K * E :] == 4).all() and (weights[1].qkv_bias != 4).any()


def test_weights_that_were_moved_are_fused_again():
    """`to` gives every parameter memory of its own."""
    model = tiny_bagel()
    fuse(model)
    model.to(torch.float64).to(torch.float32)
    cache = open_cache(model, CONTEXTS, TOKENS, room=3)
    step = DecodeStep(model, Store(cache.keys, cache.values))
    assert step.serves(model)
    with torch.no_grad():
        model.language_model.model.layers[0].self_attn.q_proj.weight.mul_(2)
        expected = model(decode_batch(TOKEN_IDS, cache.positions), cache, text_logits)
    logits = step(TOKEN_IDS, cache.positions, cache.lengths, cache.extent + 1)
    torch.testing.assert_close(logits, expected, atol=2e-6, rtol=0)
    model.to(torch.float64).to(torch.float32)
    assert not step.serves(model) and not step.serves(tiny_bagel())


def test_updates_in_place_are_seen():
    """A workspace is kept while the weights of its model change."""
    params, seeds = SamplingParams(6, 1.0, max_image_skips=0), [1, 2, 3]
    model, workspace, seen = tiny_bagel(), Workspace(), []
    for _ in range(3):
        kept = generate(model, CONTEXTS, FakeTokenizer(), params, seeds, workspace=workspace)
        assert kept == generate(model, CONTEXTS, FakeTokenizer(), params, seeds)
        seen.append(kept)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
    assert seen[0] != seen[1] != seen[2]


def test_a_workspace_grows_and_is_used_again():
    params, model, workspace = SamplingParams(4, 0.0), tiny_bagel(), Workspace()
    addresses = []
    for contexts in (CONTEXTS[:2], CONTEXTS[:1], CONTEXTS, CONTEXTS[1:]):
        generate(model, contexts, FakeTokenizer(), params, workspace=workspace)
        addresses.append((workspace.store.keys.data_ptr(), workspace.state.sampled.data_ptr()))
    assert addresses[0] == addresses[1] != addresses[2] == addresses[3]
    other = tiny_bagel(seed=1)
    expected = generate(other, CONTEXTS, FakeTokenizer(), params)
    assert generate(other, CONTEXTS, FakeTokenizer(), params, workspace=workspace) == expected
    deeper = dataclasses.replace(TINY_CONFIG.llm, num_hidden_layers=3)
    deeper = randomise_(Bagel(dataclasses.replace(TINY_CONFIG, llm=deeper))).eval()
    expected = generate(deeper, CONTEXTS, FakeTokenizer(), params)
    assert generate(deeper, CONTEXTS, FakeTokenizer(), params, workspace=workspace) == expected
    narrow = tiny_bagel().to(torch.bfloat16)
    expected = generate(narrow, CONTEXTS, FakeTokenizer(), params)
    assert generate(narrow, CONTEXTS, FakeTokenizer(), params, workspace=workspace) == expected


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def adapt(model):
    """As an adapter would: another module in the place of a projection."""
    old = model.language_model.model.layers[1].mlp.up_proj
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    model.language_model.model.layers[1].mlp.up_proj = new


def watch(model):
    layer = model.language_model.model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: 1.5 * output)


def patch(model):
    mlp = model.language_model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: 1.5 * plain(x)


def watch_end(model):
    model.language_model.model.norm.register_forward_hook(lambda module, inputs, output: -output)


def another_head(model):
    old = model.language_model.lm_head
    model.language_model.lm_head = Doubled(old.in_features, old.out_features, bias=False)
    model.language_model.lm_head.load_state_dict({"weight": -old.weight})


@pytest.mark.parametrize("change", [adapt, watch, patch, watch_end, another_head])
def test_modules_that_are_not_as_expected_are_called(change):
    model, tokenizer = tiny_bagel(), FakeTokenizer()
    assert can_fuse(model)
    params = SamplingParams(5, 0.0, max_image_skips=0)
    plain = generate(model, CONTEXTS, tokenizer, params)
    change(model)
    assert not can_fuse(model)
    changed = generate(model, CONTEXTS, tokenizer, params)
    assert [r.logprobs for r in changed] != [r.logprobs for r in plain]
    for row, rollout in enumerate(changed):  # each token is the likeliest after those before it
        cache = open_cache(model, [CONTEXTS[row]], TOKENS, room=9)
        for fed, token in zip((TOKENS.bos, *rollout.token_ids), rollout.token_ids, strict=False):
            batch = decode_batch(torch.tensor([fed]), cache.positions)
            with torch.no_grad():
                assert model(batch, cache, text_logits).argmax() == token
            cache.advance(torch.ones(1).long(), cache.positions + 1, 1)


@pytest.fixture
def widths(monkeypatch):
    """Rows of every decoding step."""
    seen, call = [], DecodeStep.__call__

    def counted(self, tokens, *rest):
        seen.append(len(tokens))
        return call(self, tokens, *rest)

    monkeypatch.setattr(DecodeStep, "__call__", counted)
    return seen


@pytest.mark.parametrize(
    ("habits", "expected"),
    [
        (generation.CPU_HABITS, [4, 4, 3, 3, 3, 1, 1, 1, 1]),
        (
            generation.Habits(look_every=4, extent_step=8, all_widths=False),
            [4] * 4 + [3] * 4 + [1] * 4,
        ),
    ],
)
def test_rows_that_have_ended_leave_the_batch(widths, monkeypatch, habits, expected):
    """Budgets of 5, 9, 2 and 5 tokens; what is written is what each row writes alone."""
    monkeypatch.setattr(generation, "_habits", lambda model: habits)
    model, params = tiny_bagel(), SamplingParams(9, 1.0, max_image_skips=0)
    contexts, budgets, seeds = [*CONTEXTS, CONTEXTS[0]], [5, 9, 2, 5], [1, 2, 3, 4]
    rollouts = generate(model, contexts, FakeTokenizer(), params, seeds, budgets)
    assert [len(r.token_ids) for r in rollouts] == budgets  # none closed early
    assert widths == expected
    for row in range(4):
        one = slice(row, row + 1)
        alone = generate(model, contexts[one], FakeTokenizer(), params, seeds[one], budgets[one])[0]
        assert alone.token_ids == rollouts[row].token_ids
        assert alone.logprobs == pytest.approx(rollouts[row].logprobs, abs=1e-5)


def test_numbers_of_rows_that_are_recorded():
    habits = generation.ACCELERATOR_HABITS
    rows = [1, 2, 3, 4, 5, 6, 15, 16, 17, 29]
    assert [habits.width(n) for n in rows] == [1, 2, 3, 4, 6, 6, 16, 16, 20, 32]
    assert [generation.CPU_HABITS.width(n) for n in rows] == rows
    assert (habits.extent(256), habits.extent(257), generation.CPU_HABITS.extent(257)) == (
        256,
        512,
        257,
    )


def test_a_callers_cache_stays_in_order():
    """`decode` leaves all that was written in the rows where it belongs."""
    model, params = tiny_bagel(), SamplingParams(9, 0.0, max_image_skips=0)
    cache = open_cache(model, CONTEXTS, TOKENS, room=12)
    rollouts = generation.decode(model, cache, FakeTokenizer(), params, budgets=[2, 9, 4])
    for row, rollout in enumerate(rollouts):
        # the last token was not fed; the opening one was
        written = [*CONTEXTS[row], Text(rollout.token_ids[:-1])]
        expected = open_cache(model, [written], TOKENS, 0)
        n = int(expected.lengths[0]) - 1  # without the closing token
        assert int(cache.lengths[row]) == n
        assert int(cache.positions[row]) == int(expected.positions[0]) - 1
        ours, theirs = cache.keys[:, row, :, :n], expected.keys[:, 0, :, :n]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


class Recorder(TorchDispatchMode):
    """What a CUDA graph holds: operators with the very tensors that they were given and gave."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            if not function._schema.is_mutable:
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class FakeGraph:
    """In the place of a CUDA graph. Recording computes here, so the first replay does nothing."""

    def replay(self):
        if self.recorder is None:
            return
        if self.fresh:
            self.fresh = False
        else:
            self.recorder.replay()


@contextmanager
def recording(graph, pool, capture_error_mode):
    assert pool == "pool" and capture_error_mode == "thread_local"
    graph.recorder, graph.fresh = Recorder(), True
    with graph.recorder:
        yield


@pytest.fixture
def graphs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    habits = generation.Habits(3, 16, False, records=True)
    monkeypatch.setattr(generation, "_habits", lambda model: habits)


def test_graphs_are_recorded_at_the_second_step_of_a_key(graphs_on_the_cpu):
    """The first one runs as it stands, to be compiled; from the third on a graph is played."""
    graphs, total, calls = Graphs(), torch.zeros(()), []

    def step(key):
        calls.append(key)
        total.add_({"a": 1, "b": 10}[key])

    for key in ("a", "a", "b", "a", "b", "b"):
        graphs.run(key, lambda key=key: step(key))
    assert calls == ["a", "a", "b", "b"] and total == 3 + 30


def test_played_steps_are_those_that_are_run(graphs_on_the_cpu):
    """Nothing that changes between two calls is part of what was recorded: rows and their number,
    budgets, temperature, closing up, weights.
    """
    model, workspace, draw = tiny_bagel(), Workspace(), random.Random(0)
    everyone = [CONTEXTS[i % 3] for i in range(9)]
    for call in range(8):
        rows = draw.sample(range(9), draw.choice([9, 9, 5, 2, 1]))
        params = SamplingParams(draw.choice([8, 12]), draw.choice([1.0, 0.0]), call % 2)
        budgets, seeds = [3 + (row * call) % 10 for row in rows], [100 * call + r for r in rows]
        given = [everyone[row] for row in rows], FakeTokenizer(), params, seeds, budgets
        expected = generate(model, *given)
        for one, other in zip(generate(model, *given, workspace), expected, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02)
    played = [graph for graph in workspace.graphs.recorded.values() if graph is not None]
    assert len(played) > 5 and any(not graph.fresh for graph in played)


@pytest.mark.parametrize("change", ["moved", "another", "one weight"])
def test_graphs_of_other_weights_are_not_played(graphs_on_the_cpu, change):
    model, workspace, params = tiny_bagel(), Workspace(), SamplingParams(12, 0.0, 0)
    for _ in range(2):
        before = generate(model, CONTEXTS, FakeTokenizer(), params, workspace=workspace)
    if change == "another":
        model = tiny_bagel(seed=1)
    elif change == "moved":
        model.to(torch.float64).to(torch.float32)
        model.language_model.model.layers[1].mlp.down_proj.weight.data.mul_(-3)
    else:
        projection = model.language_model.model.layers[1].self_attn.o_proj
        projection.weight.data = projection.weight.data * -3
    expected = generate(model, CONTEXTS, FakeTokenizer(), params)
    after = generate(model, CONTEXTS, FakeTokenizer(), params, workspace=workspace)
    assert [r.token_ids for r in after] == [r.token_ids for r in expected]
    assert [r.token_ids for r in after] != [r.token_ids for r in before]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decoding_on_cuda_equals_the_cpu():
    params, seeds = SamplingParams(40, 1.0, max_image_skips=0), [1, 2, 3]
    expected = generate(tiny_bagel(), CONTEXTS, FakeTokenizer(), params, seeds)
    model, workspace = tiny_bagel().to("cuda"), Workspace()
    for _ in range(2):  # the second time from graphs
        ours = generate(model, CONTEXTS, FakeTokenizer(), params, seeds, workspace=workspace)
        for one, other in zip(ours, expected, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    assert any(graph is not None for graph in workspace.graphs.recorded.values())
