"""One decoding step, written for speed: one text token per row over a KV cache of fixed storage.

The same function as `Bagel.forward` on a `decode_batch` (tests hold the two together), with few and
large operations: q, k, v are one matrix product and gate, up another; residual sums are done by the
products; norm weights and rotary tables of all layers are combined once per step. Nothing in a step
waits for the device or allocates by the length of the context, so that on CUDA its layers are
compiled and the whole step can be recorded as a graph.

Legend: B rows, S key slots, D hidden, F intermediate, H heads, K kv-heads, E head_dim, L layers,
V vocab.
"""

import functools
import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.bagel import Bagel
from modeling.kv_cache import Store
from modeling.layers import RMSNorm, SwiGLU, rope_cos_sin
from modeling.qwen2_mot import Attention, MoTDecoderLayer


class LayerWeights(NamedTuple):
    """The matrices of a layer's understanding expert, transposed views of what the model holds."""

    qkv: Tensor  # (D, (H + 2K) E)
    qkv_bias: Tensor  # ((H + 2K) E,)
    out: Tensor  # (H E, D)
    gate_up: Tensor  # (D, 2F)
    down: Tensor  # (F, D)


class Shared(NamedTuple):
    """What all layers of a step take."""

    rows: Tensor  # (B, 1)
    heads: Tensor  # (1, K)
    slots: Tensor  # (B, 1) where the new keys and values go
    bias: Tensor | None  # (B, 1, 1, S) 0 where a key may be seen, else -inf; None: all may be seen,
    # and the new keys and values go to the last slot
    eps: Tensor  # () sqrt(D eps)
    head_eps: Tensor  # () sqrt(E eps)
    normed: Tensor  # (B, D) and, for heads, (B, H + K, E): where norms are rounded to, again and
    rotated: Tensor  # again


PLAIN = (MoTDecoderLayer, Attention, SwiGLU, RMSNorm, nn.Linear, nn.Embedding)


def can_fuse(model: Bagel) -> bool:
    """Whether a step of the decoder is what this file takes it for: all on one device, no module
    replaced (by an adapter, say), and none that somebody watches or has patched.
    """
    decoder, head = model.language_model.model, model.language_model.lm_head
    parts = [*decoder.layers.modules(), decoder.embed_tokens, decoder.norm, head]
    return not decoder.layer_devices and all(map(_is_plain, parts))


def _is_plain(module: nn.Module) -> bool:
    watched = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return isinstance(module, nn.ModuleList) or (type(module) in PLAIN and not watched)


def fuse(model: Bagel) -> list[LayerWeights]:
    """Let q, k, v of every layer be slices of one matrix, and gate, up of another.

    Parameters stay the same objects with the same names and values: only their memory moves, so
    that updates in place reach the fused matrices, and nothing is held twice. Where that is so
    already, nothing happens.
    """
    weights = []
    for layer in model.language_model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        qkv = _joined([one.weight for one in projections])
        bias = _joined([one.bias for one in projections])
        gate_up = _joined([mlp.gate_proj.weight, mlp.up_proj.weight])
        out, down = attention.o_proj.weight.detach(), mlp.down_proj.weight.detach()
        weights.append(LayerWeights(qkv.t(), bias, out.t(), gate_up.t(), down.t()))
    return weights


def _joined(parts: list[nn.Parameter]) -> Tensor:
    """One tensor that the parts, rows of it, share memory with."""
    first, sizes = parts[0].detach(), [len(part) for part in parts]
    memory = [part.untyped_storage().data_ptr() for part in parts]
    ends = [part.data_ptr() + part.numel() * part.itemsize for part in parts]
    adjoining = [part.data_ptr() for part in parts[1:]] == ends[:-1]
    if adjoining and len(set(memory)) == 1:
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())
    whole = torch.cat([part.detach() for part in parts])
    for part, rows in zip(parts, whole.split(sizes), strict=True):
        part.data = rows
    return whole


def _addresses(model: Bagel) -> list[int]:
    """Where the weights that write text are."""
    decoder, head = model.language_model.model, model.language_model.lm_head
    return [parameter.data_ptr() for parameter in (*decoder.parameters(), head.weight)]


class DecodeStep:
    """`step(tokens, positions, lengths, extent)` -> (B, V) logits, over the memory it was made for.

    Weights are read anew at every `refresh`, which has to follow each change of them: norms are
    combined with constants there. Everything else is the model's own memory.
    """

    def __init__(self, model: Bagel, store: Store) -> None:
        config = model.config.llm
        self.decoder, self.head = model.language_model.model, model.language_model.lm_head
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.keys, self.values = store.keys, store.values
        self.layers = fuse(model)
        self.addresses = _addresses(model)
        device = store.keys.device
        widths = torch.tensor([config.hidden_size, self.head_dim], device=device)
        self.eps = (widths * config.rms_norm_eps).sqrt()
        self.row_ids = torch.arange(store.keys.shape[1], device=device)[:, None]
        self.head_ids = torch.arange(self.kv_heads, device=device)[None, :]
        self.key_ids = torch.arange(store.keys.shape[3], device=device)
        self.norms = torch.empty(2 * len(self.layers) + 1, config.hidden_size, device=device)
        shape = len(self.layers), 1, self.heads + self.kv_heads, self.head_dim
        rows, dtype = store.keys.shape[1], store.keys.dtype
        self.normed = torch.empty(rows, config.hidden_size, dtype=dtype, device=device)
        self.rotated = torch.empty(rows, *shape[2:], dtype=dtype, device=device)
        self.direct, self.rolled = (
            torch.empty(shape, device=device),
            torch.empty(shape, device=device),
        )
        self.refresh()

    def serves(self, model: Bagel) -> bool:
        """Whether the weights of `model` are still those that this step reads."""
        return self.decoder is model.language_model.model and self.addresses == _addresses(model)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the norm weights. `rms(x) w` is `x / hypot(|x|, sqrt(D eps))` times
        `sqrt(D) w`, and rotation of a weighted head is a weighted rotation: w goes into the tables.
        """
        layers, half = self.decoder.layers, self.head_dim // 2
        norms = [
            w for layer in layers for w in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        scale = math.sqrt(self.norms.shape[1])
        torch.stack(
            [norm.weight.float() * scale for norm in [*norms, self.decoder.norm]], out=self.norms
        )
        scale = math.sqrt(self.head_dim)
        self.direct.copy_(torch.stack([self._head_weights(layer) for layer in layers]) * scale)
        sign = torch.ones(self.head_dim, device=self.direct.device)
        sign[:half] = -1
        self.rolled.copy_(self.direct.roll(half, -1) * sign)

    def _head_weights(self, layer: MoTDecoderLayer) -> Tensor:
        """(1, H + K, E) weights of the norms of q and k, per head."""
        q, k = layer.self_attn.q_norm.weight.float(), layer.self_attn.k_norm.weight.float()
        return torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)])[None]

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        lengths: Tensor,
        extent: int,
        ragged: bool = True,
    ) -> Tensor:
        """Run one token per row; its keys and values are written at `lengths`.

        Args:
            tokens, positions, lengths: (B,) of the first B rows of the cache; lengths are the
                tokens cached so far.
            extent: host-side bound: all of `lengths` are below it.
            ragged: False where all rows that matter have `extent` - 1 tokens. Nothing is masked
                then, and every row writes into the last slot.
        """
        B = len(tokens)
        x = F.embedding(tokens, self.decoder.embed_tokens.weight)
        cos, sin = rope_cos_sin(positions, self.head_dim, self.theta)
        directs = (cos[:, None] * self.direct).unbind(0)
        rolleds = (sin[:, None] * self.rolled).unbind(0)
        bias = self._bias(lengths, extent, x.dtype) if ragged else None
        shared = Shared(
            self.row_ids[:B],
            self.head_ids,
            lengths[:, None],
            bias,
            *self.eps.unbind(0),
            self.normed[:B],
            self.rotated[:B],
        )
        keys = self.keys[:, :B, :, :extent].unbind(0)
        values = self.values[:, :B, :, :extent].unbind(0)
        norms = self.norms.unbind(0)
        run = _layer_function(x.device.type)
        for i, weights in enumerate(self.layers):
            x = run(
                x,
                weights,
                norms[2 * i],
                norms[2 * i + 1],
                directs[i],
                rolleds[i],
                shared,
                keys[i],
                values[i],
            )
        return F.linear(_scaled(x, norms[-1], shared), self.head.weight)

    def _bias(self, lengths: Tensor, extent: int, dtype: torch.dtype) -> Tensor:
        hidden = self.key_ids[:extent] > lengths[:, None]
        bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return bias.masked_fill_(hidden, -math.inf)[:, None, None]


def _layer(
    x: Tensor,
    weights: LayerWeights,
    attention_norm: Tensor,
    mlp_norm: Tensor,
    direct: Tensor,
    rolled: Tensor,
    shared: Shared,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """(B, D) -> (B, D); writes the new keys and values (B, K, E) into (B, K, S, E).

    direct, rolled: (B, H + K, E) rotary tables of this layer, see `DecodeStep.refresh`.
    """
    K, E = keys.shape[1], keys.shape[3]
    heads = direct.shape[1]
    qkv = torch.addmm(weights.qkv_bias, _scaled(x, attention_norm, shared), weights.qkv)
    qk, v = qkv.view(len(x), -1, E).split([heads, K], 1)
    size = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=torch.float32)
    qk = qk / torch.hypot(size, shared.head_eps)
    torch.addcmul(qk * direct, qk.roll(E // 2, -1), rolled, out=shared.rotated)
    q, k = shared.rotated.split([heads - K, K], 1)
    if shared.bias is None:
        keys.select(2, -1).copy_(k)
        values.select(2, -1).copy_(v)
    else:
        where = shared.rows, shared.heads, shared.slots
        keys.index_put_(where, k)
        values.index_put_(where, v)
    # the queries that share a kv-head are the rows of one product
    out = F.scaled_dot_product_attention(
        q.view(len(x), K, -1, E), keys, values, attn_mask=shared.bias
    )
    x = torch.addmm(x, out.reshape(len(x), -1), weights.out)
    gate, up = torch.mm(_scaled(x, mlp_norm, shared), weights.gate_up).chunk(2, -1)
    return torch.addmm(x, F.silu(gate) * up, weights.down)


def _scaled(x: Tensor, weight: Tensor, shared: Shared) -> Tensor:
    """RMSNorm in float32, rounded once; `eps` and `weight` carry the root of the width."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.mul(x / torch.hypot(size, shared.eps), weight, out=shared.normed)


@functools.cache
def _layer_function(device_type: str) -> Callable[..., Tensor]:
    """Compiled on CUDA (once for all layers); as it stands elsewhere."""
    return torch.compile(_layer) if device_type == "cuda" else _layer


class Graphs:
    """CUDA graphs over memory that stays where it is: recorded once, then played by their keys."""

    def __init__(self) -> None:
        self.recorded: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self.pool = None  # they run one after another, so they share what they need in between

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Do what `step` does: the first time by calling it (which compiles), then from a graph."""
        if key not in self.recorded:
            self.recorded[key] = None
            step()
            return
        graph = self.recorded[key]
        if graph is None:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # other threads (a loader that pins memory) may go on meanwhile
            with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                step()
            self.recorded[key] = graph
        graph.replay()
