"""The plain baseline: the public release's way of working, done correctly, on the weights of a
`Bagel` that has its generation expert.

Nothing here is fast on purpose, nothing is slow on purpose: one prompt is decoded at a time, its
cache is merged into new tensors for every token and layer, experts are gathered and scattered also
where all tokens are text, all logits of both sides are held, cross-entropy is computed at weight
zero, layers are recomputed in the backward pass, the optimizer and the average run over all
weights. What it computes is right (causal masks are aligned bottom-right), so every comparison can
check that both sides give the same result.

Legend: T packed tokens, n new tokens, S cached + new tokens, R loss rows, D hidden, H heads,
K kv-heads, E head_dim, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling.attention import Samples, packed_plan, split_mask
from modeling.bagel import Bagel
from modeling.drawing import DrawingParams
from modeling.flow import euler, timesteps
from modeling.kv_cache import KVCache
from modeling.layers import RMSNorm, patchify, unpatchify
from modeling.qwen2_mot import Attention, MoTDecoderLayer
from modeling.sequence import Image, Latent, PackedBatch, Segment, Split, Text, pack
from modeling.tokenizer import SpecialTokens
from train.divergence import JSDConfig

Experts = tuple[Tensor, Tensor]  # packed places of the understanding and of the generation tokens


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (T, H, E), k and v (T, K, E) -> (T, H, E)


# ---- building blocks, op by op ----------------------------------------------------------------


def rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """(..., D) -> (..., D); in float32, cast back, scaled."""
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + norm.eps)
    return norm.weight * x.to(dtype)


def rotary_tables(positions: Tensor, like: Tensor, head_dim: int, theta: float) -> Experts:
    """cos and sin (n, E) of (n,) positions, computed in float32 in the dtype of `like`."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    inverse = 1.0 / (theta ** (exponent / head_dim))
    angles = (inverse[:, None] @ positions[None, :].float()).transpose(0, 1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of (n, H, E) and (n, K, E) by half-split pairs."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half_turn(q) * sin, k * cos + _half_turn(k) * sin


def _half_turn(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


# ---- decoding one prompt ----------------------------------------------------------------------


class MergedCache:
    """Keys and values of one prompt, (S, K, E) per layer; a new tensor each time it grows."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.lengths = torch.zeros(1, dtype=torch.long, device=device)  # (samples,)
        self.places = torch.zeros(0, dtype=torch.long, device=device)  # of the cached tokens

    def fork(self) -> "MergedCache":
        """Goes on by itself; tensors are never changed in place."""
        other = copy.copy(self)
        other.keys, other.values = list(self.keys), list(self.values)
        return other


@dataclass
class Query:
    """New tokens of one forward over a cache; lengths and places are tensors, as in the release."""

    lengths: Tensor  # (samples,)
    places: Tensor  # (n,) of the new tokens among cached + new
    rope: tuple[Tensor, Tensor]
    causal: bool


def cached_layer(
    layer: MoTDecoderLayer, index: int, x: Tensor, query: Query, cache: MergedCache
) -> Tensor:
    """One decoder block over new tokens (n, D), understanding expert; the cache takes them in."""
    residual = x
    x = rms_norm(x, layer.input_layernorm)
    x = residual + cached_attention(layer.self_attn, index, x, query, cache)
    residual = x
    x = rms_norm(x, layer.post_attention_layernorm)
    mlp = layer.mlp
    return residual + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def cached_attention(
    attention: Attention, index: int, x: Tensor, query: Query, cache: MergedCache
) -> Tensor:
    E = attention.head_dim
    q = attention.q_proj(x).view(-1, attention.q_proj.out_features // E, E)
    k = attention.k_proj(x).view(-1, attention.k_proj.out_features // E, E)
    v = attention.v_proj(x).view(-1, attention.v_proj.out_features // E, E)
    q, k = rms_norm(q, attention.q_norm), rms_norm(k, attention.k_norm)
    q, k = rotate(q, k, *query.rope)
    lengths = query.lengths
    if cache.keys[index] is not None:
        old_keys, old_values = cache.keys[index], cache.values[index]
        total = sum(query.lengths) + sum(cache.lengths)
        keys = old_keys.new_zeros(size=[total, *k.shape[1:]])  # reads the size from the device
        values = old_values.new_zeros(size=[total, *v.shape[1:]])
        keys[query.places], keys[cache.places] = k, old_keys
        values[query.places], values[cache.places] = v, old_values
        k, v, lengths = keys, values, cache.lengths + query.lengths
    cache.keys[index], cache.values[index] = k, v
    bounds_q = F.pad(torch.cumsum(query.lengths, dim=0), (1, 0))
    bounds_k = F.pad(torch.cumsum(lengths, dim=0), (1, 0))
    longest_q, longest_k = max(query.lengths).item(), max(lengths).item()
    out = _kernel(q, k, v, (bounds_q, bounds_k, longest_q, longest_k), query.causal)
    return attention.o_proj(out.reshape(len(x), -1))


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor, int, int], causal: bool
) -> Tensor:
    """Stands for a variable-length kernel: (n, H, E), the last query sees all keys.

    Such a kernel takes the bounds (the release computes them in every layer), groups the heads
    itself and makes no copies: here the one sample is cut out, and its heads are grouped, by views.
    """
    n, S, (_, K, E) = bounds[2], bounds[3], k.shape
    q, k, v = q[:n], k[:S].transpose(0, 1).unsqueeze(0), v[:S].transpose(0, 1).unsqueeze(0)
    if n == 1:  # the last token sees them all: the heads of a group are queries of one kv-head
        out = F.scaled_dot_product_attention(q.view(K, -1, E).unsqueeze(0), k, v)
        return out.squeeze(0).view(1, -1, E)
    mask = None
    if causal:
        mask = torch.ones(n, S, dtype=torch.bool, device=q.device).tril(S - n)
    q, grouped = q.transpose(0, 1).unsqueeze(0), q.shape[1] != K
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


def cached_forward(
    model: Bagel, x: Tensor, positions: Tensor, cache: MergedCache, causal: bool
) -> Tensor:
    """(n, D) embeddings of new tokens at (n,) positions -> (n, D) after the final norm."""
    decoder, config = model.language_model.model, model.config.llm
    lengths = torch.full_like(cache.lengths, len(x))
    places = torch.cumsum(cache.lengths, dim=0)[-1] + torch.arange(len(x), device=x.device)
    rope = rotary_tables(positions, x, config.head_dim, config.rope_theta)
    query = Query(lengths, places, rope, causal)
    for index, layer in enumerate(decoder.layers):
        x = cached_layer(layer, index, x, query, cache)
    cache.places = torch.cat([cache.places, places])
    cache.lengths = cache.lengths + lengths
    return rms_norm(x, decoder.norm)


@torch.no_grad()
def prefill(
    model: Bagel, context: Sequence[Segment], tokens: SpecialTokens
) -> tuple[MergedCache, Tensor]:
    """A cache of one context, block by block, and the position (1,) that follows."""
    cache = MergedCache(model.config.llm.num_hidden_layers, model.device)
    position = torch.zeros(1, dtype=torch.long, device=model.device)
    for segment in context:
        batch = pack([[segment]], tokens).to(model.device)
        positions = batch.position_ids + position
        causal = not isinstance(segment, Image)
        cached_forward(model, model.embed(batch), positions, cache, causal)
        position = position + batch.next_positions[0]
    return cache, position


@torch.no_grad()
def decode(
    model: Bagel,
    cache: MergedCache,
    position: Tensor,
    tokens: SpecialTokens,
    budget: int,
    temperature: float = 0.0,
    seed: int | None = None,
    step: Callable[[], None] = lambda: None,
) -> list[int]:
    """One round of at most `budget` content ids: greedy, or sampled from the stream of `seed`.

    Args:
        step: called after each token.
    """
    lm_head, embed = model.language_model.lm_head, model.language_model.model.embed_tokens
    token = torch.tensor([tokens.bos], device=model.device)
    stream = None if temperature == 0 else torch.Generator().manual_seed(seed)
    written: list[Tensor] = []
    while len(written) < budget:
        hidden = cached_forward(model, embed(token), position, cache, causal=True)
        token = _pick(lm_head(hidden), temperature, stream)
        position = position + 1
        if token[0] == tokens.eos:
            break
        written.append(token)
        step()
    return torch.cat(written).tolist() if written else []


def _pick(logits: Tensor, temperature: float, stream: torch.Generator | None) -> Tensor:
    """(1, V) -> (1,): argmax, or the inverse of the cumulative distribution at a random number."""
    if stream is None:
        return torch.argmax(logits, dim=-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    cumulative = probs.double().cumsum(dim=-1)
    u = torch.rand(1, generator=stream, dtype=torch.float64).to(logits.device)
    token = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    return token[:, 0].clamp(max=logits.shape[-1] - 1)


def generate(
    model: Bagel,
    contexts: Sequence[Sequence[Segment]],
    tokens: SpecialTokens,
    budgets: Sequence[int],
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    eos: int | None = None,
) -> list[list[int]]:
    """Completions of the contexts, one after another.

    Args:
        eos: stop at this id instead of the closing token, e.g. -1 to use up every budget.
    """
    stop = tokens if eos is None else SpecialTokens(tokens.bos, eos, -1, -1)
    completions = []
    for row, (context, budget) in enumerate(zip(contexts, budgets, strict=True)):
        cache, position = prefill(model, context, tokens)
        seed = None if seeds is None else seeds[row]
        completions.append(decode(model, cache, position, stop, budget, temperature, seed))
    return completions


# ---- packed scoring ---------------------------------------------------------------------------


def _routed(
    experts: Experts, width: int, und: Callable[[Tensor], Tensor], gen: Callable, x: Tensor
) -> Tensor:
    """Both experts on their tokens, written into a zero-filled tensor (T, width)."""
    out_und, out_gen = und(x[experts[0]]), gen(x[experts[1]])
    out = out_und.new_zeros(len(x), width, *out_und.shape[2:])
    out[experts[0]] = out_und
    out[experts[1]] = out_gen
    return out


def packed_layer(
    layer: MoTDecoderLayer, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, experts: Experts
) -> Tensor:
    """One decoder block over a packed sequence (T, D)."""
    D = x.shape[1]

    def both(name: str, x: Tensor) -> Tensor:
        pair = (getattr(layer, name), getattr(layer, f"{name}_moe_gen"))
        if name == "mlp":
            und, gen = (_plain_mlp(mlp) for mlp in pair)
        else:
            und, gen = (lambda x, norm=norm: rms_norm(x, norm) for norm in pair)
        return _routed(experts, D, und, gen, x)

    x = x + packed_attention(layer.self_attn, both("input_layernorm", x), rope, attend, experts)
    return x + both("mlp", both("post_attention_layernorm", x))


def _plain_mlp(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def packed_attention(
    attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, experts: Experts
) -> Tensor:
    def both(name: str, x: Tensor, width: int, norm: bool = False) -> Tensor:
        und, gen = getattr(attention, name), getattr(attention, f"{name}_moe_gen")
        if norm:
            return _routed(
                experts, width, lambda x: rms_norm(x, und), lambda x: rms_norm(x, gen), x
            )
        return _routed(experts, width, und, gen, x)

    E = attention.head_dim
    wide, narrow = attention.q_proj.out_features, attention.k_proj.out_features
    q = both("q_proj", x, wide).view(-1, wide // E, E)
    k = both("k_proj", x, narrow).view(-1, narrow // E, E)
    v = both("v_proj", x, narrow).view(-1, narrow // E, E)
    q, k = both("q_norm", q, wide // E, norm=True), both("k_norm", k, narrow // E, norm=True)
    q, k = rotate(q, k, *rope)
    out = attend(q, k, v).reshape(-1, wide)
    return both("o_proj", out, x.shape[1])


def dense_attention(samples: Samples, device: torch.device) -> Attend:
    """Over float masks of all pairs of a sample, keys and values repeated for every head."""
    masks = [additive_mask(splits, device) for splits in samples]
    lengths = [len(mask) for mask in masks]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k = k[:, :, None, :].repeat(1, 1, groups, 1).flatten(1, 2)
        v = v[:, :, None, :].repeat(1, 1, groups, 1).flatten(1, 2)
        rows = (y.transpose(0, 1).split(lengths, dim=1) for y in (q, k, v))
        parts = [
            F.scaled_dot_product_attention(q_s[None], k_s[None], v_s[None], mask.to(q.dtype)[None])
            for q_s, k_s, v_s, mask in zip(*rows, masks, strict=True)
        ]
        return torch.cat([part[0] for part in parts], dim=1).transpose(0, 1)

    return attend


def padded_attention(samples: Samples, length: int, device: torch.device) -> Attend:
    """Over the sequence padded to `length`, by blocks; what is padded is one more causal sample."""
    missing = length - sum(split.length for splits in samples for split in splits)
    plan = packed_plan([*samples, (Split(missing, "causal"),)], device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        padded = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))
        return plan(*padded)[: len(q)]

    return attend


def additive_mask(splits: Sequence, device: torch.device) -> Tensor:
    """Dense (L, L) float32 mask of one sample: 0 where a query may look, -inf elsewhere."""
    visible = split_mask(splits, device)
    return torch.zeros(visible.shape, device=device).masked_fill_(~visible, -torch.inf)


def hidden_rows(model: Bagel, batch: PackedBatch, padded: int = 0) -> Tensor:
    """(R, D): what the text head is fed; layers are recomputed in the backward pass.

    Args:
        padded: length to which attention pads the sequence; 0: dense masks, without padding.
    """
    decoder, config = model.language_model.model, model.config.llm
    x = model.embed(batch)
    if padded:
        attend = padded_attention(batch.samples, padded, x.device)
    else:
        attend = dense_attention(batch.samples, x.device)
    rope = rotary_tables(batch.position_ids, x, config.head_dim, config.rope_theta)
    everyone = torch.arange(len(batch), device=x.device)
    experts = everyone, everyone[:0]
    for layer in decoder.layers:
        if torch.is_grad_enabled():
            x = checkpoint(packed_layer, layer, x, rope, attend, experts, use_reentrant=False)
        else:
            x = packed_layer(layer, x, rope, attend, experts)
    und, gen = decoder.norm, decoder.norm_moe_gen
    x = _routed(experts, x.shape[1], lambda x: rms_norm(x, und), lambda x: rms_norm(x, gen), x)
    return x[batch.loss_rows]


def scored(rows: Tensor, lm_head: nn.Linear, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (R, V) and cross-entropy (R,) of the loss rows."""
    logits = lm_head(rows)
    return logits, F.cross_entropy(logits.float(), labels, reduction="none")


def jsd_rows(student: Tensor, teacher: Tensor, config: JSDConfig) -> Tensor:
    """Row divergences (R,) from two (R, V) logit tables: gathered on the teacher's top-K and
    renormalised there, each term clipped.

    Raises:
        ValueError: another divergence than the one of the release's run.
    """
    if config.top_k_mode != "renorm" or config.clips == "token" or not 0 < config.beta < 1:
        raise ValueError("the plain baseline knows renormalised top-K, entry clip, 0 < beta < 1")
    if 0 < config.top_k < teacher.shape[-1]:
        ids = torch.topk(teacher, config.top_k, dim=-1).indices
        student, teacher = student.gather(-1, ids), teacher.gather(-1, ids)
    beta = torch.tensor(config.beta, device=student.device)
    log_s = F.log_softmax(student.float() / config.temperature, dim=-1)
    log_t = F.log_softmax(teacher.float() / config.temperature, dim=-1)
    both = torch.stack([log_s + torch.log1p(-beta), log_t + torch.log(beta)])
    mixture = torch.logsumexp(both, dim=0)
    terms = beta * F.kl_div(mixture, log_t, reduction="none", log_target=True)
    terms = terms + (1 - beta) * F.kl_div(mixture, log_s, reduction="none", log_target=True)
    if config.clips == "entry":
        terms = terms.clamp(max=config.token_clip)
    return terms.sum(-1) * config.temperature**2


def loss(
    student_rows: Tensor,
    student_head: nn.Linear,
    teacher_rows: Tensor,
    teacher_head: nn.Linear,
    labels: Tensor,
    config: JSDConfig,
) -> Tensor:
    """Mean divergence over the rows of one trajectory, from hidden states (R, D) of both sides."""
    with torch.no_grad():
        teacher_logits, _ = scored(teacher_rows, teacher_head, labels)
    student_logits, cross_entropy = scored(student_rows, student_head, labels)
    divergence = jsd_rows(student_logits, teacher_logits, config).mean()
    return divergence + 0.0 * cross_entropy.mean()


# ---- drawing ----------------------------------------------------------------------------------


@torch.no_grad()
def draw(
    model: Bagel,
    caches: Sequence[KVCache],
    noise: Tensor,
    params: DrawingParams,
    tokens: SpecialTokens,
) -> Tensor:
    """(1, Z, h, w) latents from noise of that shape: each context of guidance in a forward of its
    own, over a cache whose keys and values are merged into new tensors every time.

    Args:
        caches: of the contexts that `modeling.drawing.draw` takes, in its order.
    """
    patch = model.config.latent_patch_size
    height, width = noise.shape[-2] // patch, noise.shape[-1] // patch
    x = patchify(noise[0], patch)[None].to(model.device)
    capacity = max(cache.extent for cache in caches) + height * width + 2

    def velocity(x: Tensor, t: float) -> Tensor:
        count = 1 + sum(params.guidance.branches(t))
        found = []
        for cache in caches[:count]:
            merged = cache.select([0], capacity)
            block = Latent(x[0].float().cpu(), height, width, t)
            batch = pack([[block]], tokens).to(model.device).after(merged.positions)
            found.append(model.velocity(batch, merged).float()[None])
        text, images = params.guidance.branches(t)
        return params.guidance(found[0], found[1] if text else None, found[2] if images else None)

    times = timesteps(params.num_timesteps, params.timestep_shift)
    return unpatchify(euler(x, times, velocity), height, width, patch)


# ---- training ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What one trajectory starts from."""

    student: list[Segment]
    teacher: list[Segment]
    budget: int
    seed: int


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model over all parameters, in two sweeps."""
    ours, theirs = list(average.parameters()), list(model.parameters())
    torch._foreach_mul_(ours, decay)
    torch._foreach_add_(ours, theirs, alpha=1 - decay)


class PlainTrainer:
    """Student, averaged teacher, full-size sampling copy and AdamW over all parameters."""

    def __init__(self, model: Bagel, jsd: JSDConfig, lr: float = 1e-5, decay: float = 0.995):
        self.model, self.jsd, self.decay = model, jsd, decay
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.actor = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0
        )

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Stands for the gathering of all weights before a prompt is sampled."""
        for copied, current in zip(self.actor.parameters(), self.model.parameters(), strict=True):
            copied.copy_(current)

    def sample(self, sample: Sample, tokens: SpecialTokens) -> list[int]:
        """A completion that uses up its budget."""
        self.copy_weights()
        contexts, budgets, seeds = [sample.student], [sample.budget], [sample.seed]
        return generate(self.actor, contexts, tokens, budgets, 1.0, seeds, eos=-1)[0]

    def score(self, sample: Sample, completion: Sequence[int], tokens: SpecialTokens) -> Tensor:
        """Loss of one trajectory, with its graph."""
        block = Text(tuple(completion), loss=True)
        packs = [pack([[*c, block]], tokens) for c in (sample.student, sample.teacher)]
        student, teacher = (batch.to(self.model.device) for batch in packs)
        with torch.no_grad():
            teacher_rows = hidden_rows(self.teacher, teacher)
        return loss(
            hidden_rows(self.model, student),
            self.model.language_model.lm_head,
            teacher_rows,
            self.teacher.language_model.lm_head,
            student.labels,
            self.jsd,
        )

    def step(
        self,
        samples: Sequence[Sample],
        tokens: SpecialTokens,
        completions: Sequence[Sequence[int]] | None = None,
    ) -> tuple[float, float]:
        """One optimizer step over the samples, one at a time: mean loss, norm of the gradient.

        Args:
            completions: score these (of the same lengths) in place of what was sampled, so that
                the step can be compared with another implementation's.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for row, sample in enumerate(samples):
            written = self.sample(sample, tokens)
            if completions is not None:
                written = completions[row]
            share = self.score(sample, written, tokens) / len(samples)
            share.backward()
            total += share.item()
        return total, self.update().item()

    def update(self) -> Tensor:
        """Clip, AdamW, average. Returns the norm of the gradient."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        update_average(self.teacher, self.model, self.decay)
        return norm
