"""Mixture-of-Transformers decoder (Qwen2.5 shape): every block has an understanding and a
generation expert.

Text and image-understanding tokens run through the understanding weights, VAE latent tokens through
the `*_moe_gen` weights; attention is joint. Attribute names are the released state-dict keys. One
forward serves packed training and cached decoding. The layers may be on several devices
(`Qwen2MoT.layer_devices`): what they share is then brought to each device once per forward.

Legend: T packed tokens, D hidden, H heads, K kv-heads, E head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling.attention import CachedPlan, FreshPlan, Plan
from modeling.config import LLMConfig
from modeling.kv_cache import KVCache
from modeling.layers import RMSNorm, SwiGLU, apply_rope, rope_cos_sin


@dataclass(frozen=True)
class Route:
    """Which packed tokens go through which expert; None for a Route = all understanding."""

    und_index: Tensor  # (T_und,)
    gen_index: Tensor  # (T_gen,)

    def apply(
        self, und: Callable[[Tensor], Tensor], gen: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """und(x[und_index]) and gen(x[gen_index]) put back in packed order."""
        out_und, out_gen = und(x[self.und_index]), gen(x[self.gen_index])
        out = out_und.new_empty(len(x), *out_und.shape[1:])
        out = out.index_copy(0, self.und_index, out_und)
        return out.index_copy(0, self.gen_index, out_gen)

    def to(self, device: torch.device | str | int) -> "Route":
        return Route(self.und_index.to(device), self.gen_index.to(device))


def routed(route: Route | None, und: nn.Module, gen: nn.Module | None, x: Tensor) -> Tensor:
    """Apply the experts by route; without a route nothing is gathered or scattered."""
    return und(x) if route is None else route.apply(und, gen, x)


class Attention(nn.Module):
    """q, k, v (with bias) -> per-head RMSNorm of q and k -> rotary -> attention -> o (no bias)."""

    def __init__(self, config: LLMConfig, generation: bool) -> None:
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = E
        for suffix in ("", "_moe_gen") if generation else ("",):
            self.add_module(f"q_proj{suffix}", nn.Linear(D, H * E))
            self.add_module(f"k_proj{suffix}", nn.Linear(D, K * E))
            self.add_module(f"v_proj{suffix}", nn.Linear(D, K * E))
            self.add_module(f"o_proj{suffix}", nn.Linear(H * E, D, bias=False))
            self.add_module(f"q_norm{suffix}", RMSNorm(E, config.rms_norm_eps))
            self.add_module(f"k_norm{suffix}", RMSNorm(E, config.rms_norm_eps))

    def qkv(self, x: Tensor, suffix: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) -> q (T, H, E), k and v (T, K, E), norms applied, not yet rotated."""
        q, k, v = (
            getattr(self, f"{name}_proj{suffix}")(x).unflatten(-1, (-1, self.head_dim))
            for name in ("q", "k", "v")
        )
        return getattr(self, f"q_norm{suffix}")(q), getattr(self, f"k_norm{suffix}")(k), v

    def routed_qkv(self, x: Tensor, route: Route | None) -> tuple[Tensor, Tensor, Tensor]:
        if route is None:
            return self.qkv(x)
        heads = [  # one packed (T, H + 2K, E) tensor, so that one scatter restores the order
            torch.cat(self.qkv(x[index], suffix), dim=1)
            for index, suffix in ((route.und_index, ""), (route.gen_index, "_moe_gen"))
        ]
        joint = heads[0].new_empty(len(x), *heads[0].shape[1:])
        joint = joint.index_copy(0, route.und_index, heads[0])
        joint = joint.index_copy(0, route.gen_index, heads[1])
        K = self.k_proj.out_features // self.head_dim
        return joint.split([joint.shape[1] - 2 * K, K, K], dim=1)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        plan: Plan,
        route: Route | None = None,
        layer: int = 0,
        kv_cache: KVCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """(T, D) -> (T, D), or only its `rows`, (R, D); keys and values are those of all tokens."""
        q, k, v = self.routed_qkv(x, route)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if kv_cache is not None:
            assert isinstance(plan, (CachedPlan, FreshPlan))
            k, v = kv_cache.append(layer, k, v, plan)
            if rows is not None and not len(rows):
                return x[:0]
        # autocast leaves norm and rotation in float32; attention kernels want one dtype
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = plan(q, k, v).flatten(1)  # (T, H*E)
        if rows is not None:
            out = out[rows]
        gen = None if route is None else self.o_proj_moe_gen
        return routed(route, self.o_proj, gen, out)


class MoTDecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU with residuals, each in two experts."""

    def __init__(self, config: LLMConfig, generation: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, generation)
        for suffix in ("", "_moe_gen") if generation else ("",):
            self.add_module(f"mlp{suffix}", SwiGLU(config.hidden_size, config.intermediate_size))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(norm + suffix, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def _expert(self, name: str, route: Route | None, x: Tensor) -> Tensor:
        gen = None if route is None else getattr(self, f"{name}_moe_gen")
        return routed(route, getattr(self, name), gen, x)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        plan: Plan,
        route: Route | None = None,
        layer: int = 0,
        kv_cache: KVCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        normed = self._expert("input_layernorm", route, x)
        attended = self.self_attn(normed, rope, plan, route, layer, kv_cache, rows)
        x = (x if rows is None else x[rows]) + attended
        return x + self._expert("mlp", route, self._expert("post_attention_layernorm", route, x))


class _Shared:
    """What all layers of a forward take, brought to every device once."""

    def __init__(self, rope: tuple[Tensor, Tensor], plan: Plan, route: Route | None) -> None:
        self.copies = {rope[0].device: (rope, plan, route)}

    def on(self, device: torch.device) -> tuple[tuple[Tensor, Tensor], Plan, Route | None]:
        if device not in self.copies:
            (cos, sin), plan, route = next(iter(self.copies.values()))
            route = None if route is None else route.to(device)
            self.copies[device] = (cos.to(device), sin.to(device)), plan.to(device), route
        return self.copies[device]


class Qwen2MoT(nn.Module):
    """Token embedding, decoder layers and the final norms.

    `layer_devices` has one device per layer if they are spread over several, and is empty
    otherwise. Inputs and outputs are on the device of the first layer.
    """

    def __init__(self, config: LLMConfig, generation: bool = True) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.layer_devices: tuple[torch.device, ...] = ()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MoTDecoderLayer(config, generation) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if generation:
            self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        plan: Plan,
        route: Route | None = None,
        kv_cache: KVCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """(T, D) embeddings -> (T, D) hidden states after the final norm, or `rows` of them.

        With `kv_cache` the tokens continue its rows and `plan` must come from `kv_cache.plan`.
        `rows`, (R,), is for tokens that all take the understanding expert: the last layer then
        computes these alone, besides the keys and values that they see.
        """
        if route is not None and not hasattr(self, "norm_moe_gen"):
            raise ValueError("latent tokens need the generation expert: load with experts='all'")
        cos, sin = rope_cos_sin(position_ids, self.config.head_dim, self.config.rope_theta)
        rope = (cos.to(x.dtype), sin.to(x.dtype))
        home, shared = x.device, _Shared(rope, plan, route)
        for index, layer in enumerate(self.layers):
            if self.layer_devices:
                x = x.to(self.layer_devices[index])
                rope, plan, route = shared.on(x.device)
            wanted = None
            if rows is not None and index == len(self.layers) - 1:
                wanted = rows.to(x.device)
            arguments = x, rope, plan, route, index, kv_cache, wanted
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        if self.layer_devices:
            x, (_, _, route) = x.to(home), shared.on(home)
        return routed(route, self.norm, None if route is None else self.norm_moe_gen, x)


class Qwen2ForCausalLM(nn.Module):
    """Decoder and text head, named as in released checkpoints (`language_model.*`)."""

    def __init__(self, config: LLMConfig, generation: bool = True) -> None:
        super().__init__()
        self.model = Qwen2MoT(config, generation)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
