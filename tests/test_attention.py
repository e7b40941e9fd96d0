"""Attention plans against a dense float64 oracle written from the definition of the splits."""

import importlib.util
import random
from types import SimpleNamespace

import pytest
import torch

from modeling.attention import (
    BLOCK,
    CachedPlan,
    FlashPlan,
    FlexPlan,
    FreshPlan,
    SDPAPlan,
    chosen_backend,
    packed_plan,
    split_mask,
)
from modeling.bagel import text_logits
from modeling.config import LLMConfig
from modeling.kv_cache import KVCache, Store
from modeling.sequence import Split, Text, pack
from tests.tiny_model import TOKENS, random_image, tiny_bagel

E = 8  # head_dim
gpu = pytest.mark.gpu


def visible(splits, query):
    """Tokens of a sample that `query` sees, from the definition, one token at a time."""
    seen, start = set(), 0
    for split in splits:
        inside = range(start, start + split.length)
        if query < start:
            break
        if query in inside:
            seen |= {t for t in inside if split.mode != "causal" or t <= query}
        elif split.mode != "noise":
            seen |= set(inside)
        start += split.length
    return sorted(seen)


def dense(q, k, v, rows):
    """Softmax attention in float64; rows[i] lists the keys of query i; kv-heads are repeated."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    parts = []
    for i, keys in enumerate(rows):
        heads = []
        for h in range(q.shape[1]):
            scores = k[keys, h // group] @ q[i, h] / q.shape[2] ** 0.5
            heads.append(torch.softmax(scores, 0) @ v[keys, h // group])
        parts.append(torch.stack(heads))
    return torch.stack(parts) if parts else out


def oracle(q, k, v, samples):
    rows, start = [], 0
    for splits in samples:
        length = sum(split.length for split in splits)
        rows += [[start + key for key in visible(splits, i)] for i in range(length)]
        start += length
    return dense(q, k, v, rows)


def random_samples(seed, modes=("causal", "full", "noise"), count=3):
    rng = random.Random(seed)
    return [
        tuple(Split(rng.randint(1, 6), rng.choice(modes)) for _ in range(rng.randint(1, 4)))
        for _ in range(count)
    ]


def heads(samples, query_heads, kv_heads, seed=0, device="cpu", dtype=torch.float32):
    length = sum(split.length for splits in samples for split in splits)
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, n, E, generator=generator).to(device, dtype).requires_grad_()
        for n in (query_heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_mask_is_the_definition(seed):
    (splits,) = random_samples(seed, count=1)
    mask = split_mask(splits)
    for query, row in enumerate(mask):
        assert row.nonzero().flatten().tolist() == visible(splits, query)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("seed", range(4))
def test_sdpa_forward_and_backward(seed, kv_heads):
    samples = random_samples(seed)
    q, k, v = heads(samples, 4, kv_heads, seed)
    out = SDPAPlan(samples, "cpu")(q, k, v)
    expected = oracle(q, k, v, samples)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    grads = torch.autograd.grad((out * upstream).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * upstream).sum(), (q, k, v))
    for grad, want in zip(grads, wanted, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(grad, want, atol=5e-6, rtol=0)


@pytest.mark.parametrize("samples", [[(Split(5, "full"),)] * 3, [(Split(4, "full"),)]])
def test_sdpa_without_a_mask_for_equal_images(samples):
    plan = SDPAPlan(samples, "cpu")
    assert plan.mask is None
    q, k, v = heads(samples, 2, 2)
    torch.testing.assert_close(plan(q, k, v).double(), oracle(q, k, v, samples), atol=2e-6, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("seed", range(3))
def test_flex_forward(seed, kv_heads):
    samples = random_samples(seed)
    q, k, v = (x.detach() for x in heads(samples, 4, kv_heads, seed))
    out = FlexPlan(samples, "cpu")(q, k, v)
    torch.testing.assert_close(out.double(), oracle(q, k, v, samples), atol=2e-6, rtol=0)


# ---- bottom-right alignment with a cache ------------------------------------------------------


def cached_rows(cached, samples):
    """Per packed query the keys it sees among [cached, new] tokens of its own row."""
    return [
        list(range(old)) + [old + key for key in visible(splits, i)]
        for old, splits in zip(cached, samples, strict=True)
        for i in range(sum(split.length for split in splits))
    ]


@pytest.mark.parametrize("seed", range(5))
def test_cached_attention_is_bottom_right_aligned(seed):
    """A new query sees all cached keys of its row, then what its splits show of the new ones."""
    rng = random.Random(seed)
    samples = random_samples(seed, modes=("causal", "full"), count=3)
    if seed == 0:
        samples = [(Split(1, "causal"),)] * 3  # a decoding step
    cached = [rng.randint(0, 7) for _ in samples]
    config = LLMConfig(16, 4 * E, 8, 1, 4, 2)
    cache = KVCache(config, 3, 40)
    old_k, old_v = (torch.randn(3, 40, 2, E) for _ in range(2))
    for row, n in enumerate(cached):  # what is beyond a row's length must not matter
        cache.keys[0, row] = 1e3
        cache.values[0, row] = 1e3
        cache.keys[0, row, :, :n] = old_k[row, :n].transpose(0, 1)
        cache.values[0, row, :, :n] = old_v[row, :n].transpose(0, 1)
    cache.advance(torch.tensor(cached), torch.tensor(cached), max(cached))
    with torch.no_grad():
        q, k, v = heads(samples, 4, 2, seed)
        plan = cache.plan(samples)
        out = plan(q, *cache.append(0, k, v, plan))
        rows, start, expected = cached_rows(cached, samples), 0, []
        for row, splits in enumerate(samples):
            length = sum(split.length for split in splits)
            span = slice(start, start + length)
            keys = torch.cat([old_k[row, : cached[row]], k[span]])
            values = torch.cat([old_v[row, : cached[row]], v[span]])
            expected.append(dense(q[span], keys, values, rows[span]))
            start += length
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=2e-6, rtol=0)


def long_samples(seed, modes=("causal", "full", "noise")):
    """Samples whose splits end anywhere, over several blocks."""
    rng = random.Random(seed)
    return [
        tuple(Split(rng.choice((1, 60, 128, 300)), rng.choice(modes)) for _ in range(3))
        for _ in range(rng.randint(1, 4))
    ]


def blocks_of(samples):
    """(blocks, blocks) bool twice, from the dense mask: something is seen, all is seen."""
    mask = torch.block_diag(*(split_mask(splits) for splits in samples)).bool()
    count = -(-len(mask) // BLOCK)
    padded = torch.zeros(count * BLOCK, count * BLOCK, dtype=torch.bool)
    padded[: len(mask), : len(mask)] = mask
    tiles = padded.view(count, BLOCK, count, BLOCK).transpose(1, 2).flatten(2)
    return tiles.any(-1), tiles.all(-1)


def listed(numbers, indices):
    """The block table that a FlexAttention list stands for."""
    table = torch.zeros_like(indices[0, 0], dtype=torch.bool)
    for row, (number, columns) in enumerate(zip(numbers[0, 0], indices[0, 0], strict=True)):
        table[row, columns[:number].long()] = True
    return table


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("modes", [("causal", "full"), ("causal", "full", "noise")])
def test_flex_computes_the_blocks_in_which_something_is_seen(seed, modes):
    """And no others; a block that touches several noise splits may be looked at for nothing."""
    samples = long_samples(seed, modes)
    some, every = blocks_of(samples)
    mask = FlexPlan(samples, "cpu").block_mask
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    assert not (some & ~(full | partial)).any()
    assert not (full & partial).any() and not (full & ~every).any()
    if "noise" not in modes:
        assert torch.equal(full, every) and torch.equal(full | partial, some)
    assert mask.seq_lengths == (sum(s.length for splits in samples for s in splits),) * 2
    # what the backward pass reads: the same blocks, by keys
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), full.T)
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), partial.T)


@pytest.mark.parametrize("seed", range(2))
def test_flex_over_several_blocks(seed):
    samples = long_samples(seed)
    q, k, v = (x.detach() for x in heads(samples, 2, 1))
    expected = SDPAPlan(samples, "cpu")(q, k, v)
    torch.testing.assert_close(FlexPlan(samples, "cpu")(q, k, v), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_sdpa_by_parts_of_the_queries(seed, monkeypatch):
    """Long samples: a part of the queries is given the keys that it may see, and no more."""
    samples = long_samples(seed)
    plan = SDPAPlan(samples, "cpu")
    q, k, v = heads(samples, 2, 1)
    out = plan(q, k, v)
    monkeypatch.setattr(plan, "parts", [])
    whole = plan(q, k, v)
    torch.testing.assert_close(out, whole, atol=2e-6, rtol=0)
    for one, other in zip(
        *(torch.autograd.grad((x * q.detach()).sum(), (q, k, v)) for x in (out, whole)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_parts_of_the_queries():
    causal, picture = (Split(300, "causal"),), (Split(200, "causal"), Split(180, "full"))
    parts = [(some.start, some.stop, keys) for some, keys in SDPAPlan([causal], "cpu").parts]
    assert parts == [(0, 150, 150), (150, 300, 300)]
    parts = [
        (some.start, some.stop, keys) for some, keys in SDPAPlan([causal, picture], "cpu").parts
    ]
    assert parts == [(0, 190, 190), (190, 380, 380)]
    assert len(SDPAPlan([(Split(250, "causal"),)], "cpu").parts) == 1


def test_pictures_of_several_sizes_take_no_mask():
    samples = [
        (Split(n, mode),) for n, mode in ((3, "full"), (5, "noise"), (3, "full"), (0, "full"))
    ]
    plan = SDPAPlan(samples, "cpu")
    assert [tuple(tokens.shape) for tokens in plan.groups.tokens] == [(2, 3), (1, 5)]
    q, k, v = heads(samples, 4, 2)
    out = plan(q, k, v)
    torch.testing.assert_close(out.double(), oracle(q, k, v, samples), atol=2e-6, rtol=0)
    gradients = torch.autograd.grad((out * torch.arange(E)).sum(), (q, k, v))
    wanted = (oracle(q, k, v, samples) * torch.arange(E)).sum()
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_automatic_backend():
    text, picture = [(Split(3, "causal"),)], [(Split(3, "full"),), (Split(4, "full"),)]
    assert chosen_backend(text, "cpu", "auto") == chosen_backend(picture, "cuda", "auto") == "sdpa"
    assert chosen_backend(text, "cuda:1", "auto") == "flex"
    assert chosen_backend(text, "cpu", "flash") == "flash"


def test_first_tokens_of_a_cache_see_each_other_only():
    """With FlexAttention a prefill goes by blocks as well, and leaves the same behind."""
    samples = [(Split(3, "causal"), Split(2, "full")), (), (Split(4, "causal"),)]
    outs, caches = [], []
    for backend in ("sdpa", "flex"):
        cache = KVCache(LLMConfig(16, 2 * E, 8, 1, 2, 1), 3, 8)
        cache.keys.fill_(99), cache.values.fill_(99)  # what an earlier call left
        plan = cache.plan(samples, backend)
        assert isinstance(plan, FreshPlan) == (backend == "flex")
        q, k, v = (x.detach() for x in heads(samples, 2, 1))
        outs.append(plan(q, *cache.append(0, k, v, plan)))
        cache.advance(torch.tensor([5, 0, 4]), cache.positions, 5)
        assert isinstance(cache.plan([(Split(1, "causal"),)] * 3, backend), CachedPlan)
        caches.append(cache)
    torch.testing.assert_close(*outs, atol=2e-6, rtol=0)
    assert torch.equal(caches[0].keys, caches[1].keys)
    assert torch.equal(caches[0].values, caches[1].values)
    with pytest.raises(ValueError, match="noise splits cannot be cached"):
        KVCache(LLMConfig(16, 2 * E, 8, 1, 2, 1), 1, 8).plan([(Split(2, "noise"),)], "flex")


def test_a_cache_over_given_memory():
    large = KVCache(LLMConfig(16, 2 * E, 8, 1, 2, 1), 4, 8)
    store = Store(large.keys, large.values)
    like = (LLMConfig(16, 2 * E, 8, 1, 2, 1), 4, 8, torch.float32, torch.device("cpu"))
    assert store.fits(*like)
    for place, other in enumerate(
        (LLMConfig(16, 2 * E, 8, 2, 2, 1), 5, 9, torch.bfloat16, torch.device("meta"))
    ):
        assert not store.fits(*like[:place], other, *like[place + 1 :])
    cache = KVCache(LLMConfig(16, 2 * E, 8, 1, 2, 1), 2, 5, store=store)
    assert len(cache) == 2 and cache.capacity == 8
    cache.append(
        0, torch.ones(2, 1, E), torch.ones(2, 1, E), cache.plan([(Split(1, "causal"),)] * 2)
    )
    assert large.keys[0, :, 0, 0, 0].tolist() == [1, 1, 0, 0]
    large.keys[0, 1] = 5
    large.move(torch.tensor([1]), torch.tensor([3]), 2)
    assert large.keys[0, 3, 0, :, 0].tolist() == [5, 5] + [0] * 6


def test_last_query_of_a_causal_chunk_sees_every_key():
    mask = CachedPlan([(Split(3, "causal"),)], torch.tensor([4]), extent=7).mask[0, 0]
    expected = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0], [1] * 7]).bool()
    assert torch.equal(mask, expected)


def test_forward_without_advance_leaves_the_cache_as_it_was():
    cache = KVCache(LLMConfig(16, 2 * E, 8, 1, 2, 2), 1, 8)
    plan = cache.plan([(Split(2, "causal"),)])
    cache.append(0, torch.ones(2, 2, E), torch.ones(2, 2, E), plan)
    assert cache.lengths.tolist() == [0] and cache.extent == 0
    again = cache.plan([(Split(1, "causal"),)])
    assert again.slots.tolist() == [0]


def test_forks_do_not_share_storage():
    cache = KVCache(LLMConfig(16, 2 * E, 8, 1, 2, 2), 2, 4)
    plan = cache.plan([(Split(1, "causal"),)] * 2)
    values = torch.arange(2.0)[:, None, None].expand(2, 2, E)
    cache.append(0, values, values, plan)
    cache.advance(torch.tensor([1, 1]), torch.tensor([1, 1]), 1)
    fork = cache.select([1, 1, 0])
    assert len(fork) == 3 and fork.keys[0, :, 0, 0, 0].tolist() == [1.0, 1.0, 0.0]
    fork.keys.fill_(7)
    assert cache.keys[0, 1, 0, 0, 0] == 1.0


# ---- branches and copies of a cache -----------------------------------------------------------


def filled(lengths, capacity, first=0.0):
    """A cache of one layer whose slots hold first + 100 row + slot, positions ahead by 50."""
    cache = KVCache(LLMConfig(16, 2 * E, 8, 1, 2, 2), len(lengths), capacity)
    for row, n in enumerate(lengths):
        cache.keys[0, row, :, :n] = (first + 100 * row + torch.arange(n))[:, None]
    cache.values = -cache.keys
    counts = torch.tensor(lengths)
    cache.advance(counts, counts + 50, max(lengths))
    return cache


def grow(cache, counts, first):
    """Append counts[row] tokens to each row, and keep them."""
    plan = cache.plan([(Split(n, "causal"),) for n in counts])
    at = torch.cat([torch.arange(n) + old for n, old in zip(counts, cache.lengths, strict=True)])
    row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    values = (first + 100.0 * row + at)[:, None, None].expand(-1, 2, E)
    cache.append(0, values, -values, plan)
    cache.advance(torch.tensor(counts), cache.positions + torch.tensor(counts), max(counts))


def held(cache):
    """Per row what it holds, and the position that follows."""
    for row, n in enumerate(cache.lengths.tolist()):  # the same in all heads and channels
        for values in (cache.keys, -cache.values):
            assert (values[0, row, :, :n] == cache.keys[0, row, :1, :n, :1]).all()
    rows = [cache.keys[0, row, 0, :n, 0].tolist() for row, n in enumerate(cache.lengths.tolist())]
    return list(zip(rows, cache.positions.tolist(), strict=True))


def test_a_branch_goes_on_by_itself_in_the_memory_of_its_cache():
    cache = filled([2, 3], capacity=6)
    before = held(cache)
    branch = cache.branch(1)
    assert len(branch) == 1 and held(branch) == before[:1]
    grow(branch, [3], first=7000)
    assert held(branch) == [([0, 1, 7002, 7003, 7004], 55)] and branch.extent == 6
    assert held(cache) == before and cache.extent == 3
    assert branch.keys.data_ptr() == cache.keys.data_ptr()  # no copy
    both = cache.branch()  # begins where the cache ends, whatever another branch has written
    grow(both, [1, 1], first=8000)
    assert held(both) == [([0, 1, 8002], 53), ([100, 101, 102, 8103], 54)]
    assert held(cache) == before
    with pytest.raises(ValueError, match="cache of 6 slots per row cannot hold 7"):
        grow(cache.branch(), [4, 1], first=9000)


def test_copies_of_rows_are_their_own():
    cache = filled([2, 0, 3], capacity=3)
    copy = cache.select([2, 0, 2, 1], capacity=5)
    rows = held(cache)
    assert held(copy) == [rows[2], rows[0], rows[2], rows[1]] and copy.capacity == 5
    grow(copy, [2, 2, 1, 2], first=7000)
    assert [len(values) for values, _ in held(copy)] == [5, 4, 4, 2]
    assert held(cache) == rows
    assert cache.select([1]).capacity == 3 and held(cache.select([])) == []
    with pytest.raises(ValueError, match="cache of 2 slots per row cannot hold 3"):
        cache.select([0], capacity=2)


def test_rows_of_several_caches_are_joined():
    """Of other capacities and extents, one of them without any token."""
    first, second, none = filled([1, 2], 2), filled([4], 9, first=500), filled([0, 0], 0)
    cache = KVCache.joined([(first, [1, 0]), (none, [1]), (second, [0, 0])], capacity=4)
    parts = [*reversed(held(first)), ([], 50), *held(second) * 2]
    assert held(cache) == parts and cache.extent == 4
    cache.keys.fill_(7)
    assert held(second) == parts[-1:]
    with pytest.raises(ValueError, match="cache of 3 slots per row cannot hold 4"):
        KVCache.joined([(first, [0]), (second, [0])], capacity=3)


@pytest.mark.parametrize("cached", [[3, 0, 2], [0, 0, 0]])
def test_a_row_may_have_nothing_new(cached):
    """Its neighbours attend as they would without it."""
    samples = [(Split(2, "causal"), Split(3, "full")), (), (Split(2, "causal"),)]
    cache = filled(cached, 9)
    old = [torch.randn(3, 2, 9, E) for _ in range(2)]  # what is beyond a row's length included
    cache.keys[0], cache.values[0] = old
    q, k, v = (x.detach() for x in heads(samples, 2, 2))
    plan = cache.plan(samples)
    out = plan(q, *cache.append(0, k, v, plan))
    expected, start = [], 0
    for row, splits in enumerate(samples):
        span = slice(start, start + sum(split.length for split in splits))
        if splits:
            keys, values = (
                torch.cat([before[row, :, : cached[row]].transpose(0, 1), new[span]])
                for before, new in zip(old, (k, v), strict=True)
            )
            seen = cached_rows([cached[row]], [splits])
            expected.append(dense(q[span], keys, values, seen))
        start = span.stop
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=2e-6, rtol=0)


@pytest.mark.parametrize("plan", [SDPAPlan, FlexPlan])
def test_a_sample_may_be_empty(plan):
    samples = [(Split(2, "causal"), Split(3, "full")), (), (Split(2, "noise"),)]
    q, k, v = (x.detach() for x in heads(samples, 2, 2))
    out = plan(samples, "cpu")(q, k, v)
    torch.testing.assert_close(out.double(), oracle(q, k, v, samples), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([(Split(5, "causal"),)], "cannot hold 5"),
        ([(Split(1, "causal"),)] * 2, "2 samples for a cache of 1"),
        ([(Split(2, "noise"),)], "noise splits cannot be cached"),
    ],
)
def test_cache_refuses(samples, message):
    cache = KVCache(LLMConfig(16, 2 * E, 8, 1, 2, 2), 1, 4)
    with pytest.raises(ValueError, match=message):
        cache.plan(samples)


# ---- choosing a backend -----------------------------------------------------------------------


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'math' is unknown: choose auto, sdpa, flex or flash"):
        packed_plan([(Split(1, "causal"),)], "cpu", "math")


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is here")
def test_flash_without_the_package_names_the_remedy():
    with pytest.raises(ImportError, match="pip install flash-attn.*sdpa or flex"):
        packed_plan([(Split(1, "causal"),)], "cpu", "flash")


def oracle_kernel(q, k, v, causal):
    """The CUDA kernel of flash-attn, in float64; like it, it takes one dtype only."""
    assert q.dtype == k.dtype == v.dtype
    ahead = k.shape[1] - q.shape[1]
    limit = [ahead + i + 1 if causal else k.shape[1] for i in range(q.shape[1])]
    return dense(q[0], k[0], v[0], [list(range(n)) for n in limit])[None]


def test_flash_splits_reach_the_kernel_with_their_prefixes(monkeypatch):
    """The calls FlashPlan makes, run through the oracle instead of the CUDA kernel."""

    kernel = SimpleNamespace(flash_attn_func=oracle_kernel)
    monkeypatch.setattr("modeling.attention.importlib.import_module", lambda name: kernel)
    samples = random_samples(3, modes=("causal", "full"))
    q, k, v = heads(samples, 4, 2)
    out = FlashPlan(samples)(q, k, v)
    torch.testing.assert_close(out, oracle(q, k, v, samples), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="cannot hide noise splits"):
        FlashPlan([(Split(2, "noise"),)])


@pytest.mark.parametrize("backend", ["sdpa", "flex", "flash"])
def test_autocast_hands_one_dtype_to_every_backend(monkeypatch, backend):
    """Norms and rotation are float32 under autocast, values are not; kernels refuse a mixture."""
    if backend == "flash":
        kernel = SimpleNamespace(
            flash_attn_func=lambda *x, causal: oracle_kernel(*x, causal).to(x[0])
        )
        monkeypatch.setattr("modeling.attention.importlib.import_module", lambda name: kernel)
    model = tiny_bagel().requires_grad_(False)
    batch = pack([[random_image(2, 3), Text((30, 31, 32), loss=True)]], TOKENS)
    exact = model(batch, head=text_logits)
    model.attention_backend = backend
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch, head=text_logits)
    assert rounded.dtype == torch.bfloat16
    error = float((rounded - exact).abs().max())
    assert 0 < error < 0.05 * float(exact.abs().max())


def cuda_or_skip():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@gpu
@pytest.mark.parametrize("seed", range(2))
def test_flex_forward_and_backward_on_cuda(seed):
    cuda_or_skip()
    samples = random_samples(seed)
    q, k, v = heads(samples, 4, 2, seed, "cuda")
    q, k, v = (torch.cat([x, x], dim=-1).detach().requires_grad_() for x in (q, k, v))  # E = 16
    out = FlexPlan(samples, "cuda")(q, k, v)
    expected = oracle(q, k, v, samples)
    torch.testing.assert_close(out.double(), expected, atol=5e-3, rtol=0)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want.to(grad), atol=2e-2, rtol=1e-2)


@gpu
def test_sdpa_forward_and_backward_on_cuda():
    cuda_or_skip()
    samples = random_samples(1)
    q, k, v = heads(samples, 4, 2, 1, "cuda")
    out, expected = SDPAPlan(samples, "cuda")(q, k, v), oracle(q, k, v, samples)
    torch.testing.assert_close(out.double(), expected, atol=5e-3, rtol=0)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want.to(grad), atol=2e-2, rtol=1e-2)


@gpu
def test_flash_forward_and_backward_on_cuda():
    cuda_or_skip()
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    samples = random_samples(2, modes=("causal", "full"))
    q, k, v = heads(samples, 4, 2, 2, "cuda", torch.bfloat16)
    out, expected = FlashPlan(samples)(q, k, v), oracle(q, k, v, samples)
    torch.testing.assert_close(out.double(), expected, atol=3e-2, rtol=0)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want.to(grad), atol=0.2, rtol=5e-2)
