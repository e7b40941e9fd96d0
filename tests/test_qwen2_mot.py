"""The decoder against `transformers` (Qwen2, Qwen3), and the routing of its two experts."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model

from modeling.attention import packed_plan
from modeling.config import LLMConfig
from modeling.qwen2_mot import MoTDecoderLayer, Qwen2MoT, Route
from modeling.sequence import Split
from tests.tiny_model import randomise_

CONFIG = LLMConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=5000.0,
    rms_norm_eps=1e-5,
)
SHAPE = {
    **{k: v for k, v in dataclasses.asdict(CONFIG).items() if k != "rope_theta"},
    "rope_parameters": {"rope_type": "default", "rope_theta": CONFIG.rope_theta},
    "head_dim": CONFIG.head_dim,
    "use_sliding_window": False,
    "attn_implementation": "eager",
}
IDS = torch.randint(0, 64, (13,), generator=torch.Generator().manual_seed(3))


def decoder(generation=False):
    return randomise_(Qwen2MoT(CONFIG, generation), seed=1).requires_grad_(False)


def run(model, x, splits, positions=None, route=None):
    positions = torch.arange(len(x)) if positions is None else positions
    return model(x, positions, packed_plan([splits], "cpu"), route)


@torch.no_grad()
def reference_states(model, ids, positions=None):
    positions = None if positions is None else positions[None]
    return model(input_ids=ids[None], position_ids=positions).last_hidden_state[0]


def test_agrees_with_transformers_qwen2():
    """Biases, grouped heads, rotary positions, SwiGLU and norms; Qwen2 has no q/k norms."""
    ours, theirs = decoder(), Qwen2Model(Qwen2Config(**SHAPE)).eval()
    for layer in ours.layers:
        layer.self_attn.q_norm, layer.self_attn.k_norm = nn.Identity(), nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    hidden = run(ours, ours.embed_tokens(IDS), (Split(13, "causal"),))
    torch.testing.assert_close(hidden, reference_states(theirs, IDS), atol=2e-5, rtol=0)
    # positions with repeats and gaps, as after an image
    positions = torch.tensor([0, 1, 2, 3, 3, 3, 3, 4, 5, 9, 10, 11, 40])
    hidden = run(ours, ours.embed_tokens(IDS), (Split(13, "causal"),), positions)
    expected = reference_states(theirs, IDS, positions)
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=0)


def test_agrees_with_transformers_qwen3():
    """With the q/k norms on (before the rotation) and without biases."""
    ours, theirs = decoder(), Qwen3Model(Qwen3Config(**SHAPE)).eval()
    for layer in ours.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).bias.zero_()
    state = {k: v for k, v in ours.state_dict().items() if not k.endswith("proj.bias")}
    theirs.load_state_dict(state, strict=True)
    hidden = run(ours, ours.embed_tokens(IDS), (Split(13, "causal"),))
    torch.testing.assert_close(hidden, reference_states(theirs, IDS), atol=2e-5, rtol=0)


def swapped(model):
    """The same weights with the two experts exchanged."""
    twin, state = decoder(generation=True), {}
    for key, value in model.state_dict().items():
        if "_moe_gen" in key:
            state[key.replace("_moe_gen", "")] = value
        elif key == "embed_tokens.weight":
            state[key] = value
        else:
            parts = key.split(".")
            where = 0 if len(parts) == 2 else 3 if parts[2] == "self_attn" else 2
            parts[where] += "_moe_gen"
            state[".".join(parts)] = value
    twin.load_state_dict(state, strict=True)
    return twin


def test_all_latent_tokens_equal_the_other_expert():
    model = decoder(generation=True)
    x, splits = model.embed_tokens(IDS), (Split(5, "causal"), Split(8, "full"))
    none, everything = torch.arange(0), torch.arange(13)
    latent = run(model, x, splits, route=Route(none, everything))
    torch.testing.assert_close(latent, run(swapped(model), x, splits), atol=1e-6, rtol=0)
    assert (latent - run(model, x, splits)).abs().max() > 0.1


def test_routes_are_symmetric_under_an_exchange_of_experts():
    model = decoder(generation=True)
    x, splits = model.embed_tokens(IDS), (Split(5, "causal"), Split(8, "noise"))
    und, gen = torch.tensor([0, 1, 2, 3, 4, 5, 12]), torch.tensor([6, 7, 8, 9, 10, 11])
    torch.testing.assert_close(
        run(model, x, splits, route=Route(und, gen)),
        run(swapped(model), x, splits, route=Route(gen, und)),
        atol=1e-6,
        rtol=0,
    )


def test_no_route_equals_a_route_without_latents():
    model = decoder(generation=True)
    x, splits = model.embed_tokens(IDS), (Split(13, "causal"),)
    route = Route(torch.arange(13), torch.arange(0))
    torch.testing.assert_close(
        run(model, x, splits), run(model, x, splits, route=route), atol=1e-6, rtol=0
    )


def test_latents_without_the_generation_expert_are_refused():
    model = decoder(generation=False)
    route = Route(torch.arange(5), torch.arange(5, 13))
    with pytest.raises((ValueError, AttributeError), match="moe_gen|generation expert"):
        run(model, model.embed_tokens(IDS), (Split(13, "causal"),), route=route)


def test_activation_checkpointing_computes_again_and_changes_no_gradient(monkeypatch):
    model = decoder().requires_grad_(True)
    forward, calls, grads = MoTDecoderLayer.forward, [], []
    monkeypatch.setattr(
        MoTDecoderLayer, "forward", lambda *args: calls.append(args[0]) or forward(*args)
    )
    for enabled in (False, True):
        model.activation_checkpointing = enabled
        model.zero_grad()
        calls.clear()
        run(model, model.embed_tokens(IDS), (Split(13, "causal"),)).square().sum().backward()
        assert len(calls) == len(model.layers) * (1 + enabled)
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)
