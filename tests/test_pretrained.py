"""Checkpoint folders: round trips, parts, precision, and errors that name the key or the file."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling.bagel import Bagel, text_logits
from modeling.config import BagelConfig, ConfigError
from modeling.pretrained import (
    RECOMPUTED,
    CheckpointError,
    find_weights,
    is_generation_key,
    load_pretrained,
    save_pretrained,
)
from modeling.sequence import Text, pack
from tests.tiny_model import TINY_CONFIG, TOKENS, random_image, tiny_bagel

BATCH = pack([[random_image(2, 3), Text((30, 31), loss=True)]], TOKENS)
LM_HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def full():
    return tiny_bagel(seed=1, visual_gen=True).requires_grad_(False)


@pytest.fixture
def folder(full, tmp_path):
    """A complete folder in float32, both experts, one file."""
    save_pretrained(full.state_dict(), TINY_CONFIG, tmp_path, dtype=torch.float32)
    return tmp_path


def stored(folder, name="model"):
    return load_file(folder / f"{name}.safetensors")


def rewrite(folder, change, name="model"):
    """Apply `change` to the stored tensors."""
    tensors = stored(folder, name)
    change(tensors)
    save_file(tensors, folder / f"{name}.safetensors")


def assert_same_state(model, state):
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    for key, value in ours.items():
        assert torch.equal(value, state[key]), key


# ---- round trips -----------------------------------------------------------------------------


def test_single_file_round_trip(full, folder):
    assert sorted(f.name for f in folder.iterdir()) == [
        "llm_config.json",
        "model.safetensors",
        "vit_config.json",
    ]
    model = load_pretrained(folder, experts="all")
    assert_same_state(model, full.state_dict())
    assert model.config == TINY_CONFIG
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model(BATCH, head=text_logits), full(BATCH, head=text_logits))


@pytest.mark.parametrize("limit", [1, 20_000, 200_000])
def test_sharded_round_trip(full, tmp_path, limit):
    save_pretrained(
        full.state_dict(), TINY_CONFIG, tmp_path, dtype=torch.float32, max_shard_bytes=limit
    )
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(
        v.numel() * v.element_size() for v in full.state_dict().values()
    )
    for shard in shards:
        tensors = load_file(shard)
        size = sum(v.numel() * v.element_size() for v in tensors.values())
        assert size <= limit or len(tensors) == 1  # a tensor larger than the limit stands alone
    assert_same_state(load_pretrained(tmp_path, experts="all"), full.state_dict())


def test_understanding_only_leaves_the_rest_on_disk(full, folder):
    model = load_pretrained(folder)
    assert not hasattr(model, "vae2llm")
    wanted = {k: v for k, v in full.state_dict().items() if not is_generation_key(k)}
    assert_same_state(model, wanted)
    torch.testing.assert_close(
        model(BATCH, head=text_logits), full(BATCH, head=text_logits), atol=0, rtol=0
    )


def test_all_experts_without_latent_heads(full, tmp_path):
    """A folder trained for understanding: the generation expert is there, the heads are not."""
    model = tiny_bagel(seed=1)
    save_pretrained(model.state_dict(), TINY_CONFIG, tmp_path, dtype=torch.float32)
    again = load_pretrained(tmp_path, experts="all")
    assert not hasattr(again, "vae2llm")
    assert_same_state(again, model.state_dict())


def test_bfloat16_on_disk_and_in_memory(full, tmp_path):
    save_pretrained(full.state_dict(), TINY_CONFIG, tmp_path)
    on_disk = stored(tmp_path)
    for key, value in on_disk.items():
        kept = torch.float32 if key in RECOMPUTED else torch.bfloat16
        assert value.dtype == kept and torch.equal(value, full.state_dict()[key].to(kept)), key
    wide = load_pretrained(tmp_path, dtype=torch.float32)
    narrow = load_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, parameter in narrow.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter.float(), dict(wide.named_parameters())[key])
    # the fixed table never loses precision
    assert narrow.vit_pos_embed.pos_embed.dtype == torch.float32
    assert torch.equal(narrow.vit_pos_embed.pos_embed, full.vit_pos_embed.pos_embed)


def test_fixed_tables_are_computed_not_read(full, folder):
    def spoil(tensors):
        tensors["vit_pos_embed.pos_embed"].fill_(3.0)
        tensors["latent_pos_embed.pos_embed"] = torch.full((25, 64), 3.0)  # another side length

    rewrite(folder, spoil)
    model = load_pretrained(folder, experts="all")
    assert torch.equal(model.vit_pos_embed.pos_embed, full.vit_pos_embed.pos_embed)
    assert model.latent_pos_embed.side == 5 and model.latent_pos_embed.pos_embed.max() <= 1.0
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in RECOMPUTED])
    assert_same_state(
        load_pretrained(folder),
        {k: v for k, v in full.state_dict().items() if not is_generation_key(k)},
    )


def test_loading_the_understanding_part_ignores_damage_elsewhere(full, folder):
    """Generation weights are not even looked at."""
    rewrite(folder, lambda tensors: tensors.pop("vae2llm.weight"))
    load_pretrained(folder)
    with pytest.raises(CheckpointError, match="vae2llm.weight"):
        load_pretrained(folder, experts="all")


# ---- merging ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [10**9, 30_000])
def test_merge_carries_generation_weights_bit_for_bit(full, tmp_path, dtype, limit):
    base, out = tmp_path / "base", tmp_path / "out"
    save_pretrained(full.state_dict(), TINY_CONFIG, base, dtype=dtype, max_shard_bytes=limit)
    trained = load_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        trained.language_model.lm_head.weight.add_(1.0)
    source = find_weights(base)
    save_pretrained(
        trained.state_dict(),
        TINY_CONFIG,
        out,
        dtype=torch.float32,
        merge_from=source,
        max_shard_bytes=limit,
    )
    merged, before = find_weights(out), dict(source.read(source.location))
    after = dict(merged.read(merged.location))
    assert after.keys() == before.keys()
    for key, value in after.items():
        if is_generation_key(key):
            assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key
        elif key == LM_HEAD:
            assert torch.equal(value, before[key].float() + 1.0)
    load_pretrained(out, experts="all")


def test_state_wins_over_the_merged_weights(full, folder, tmp_path):
    changed = {key: value + 1 for key, value in full.state_dict().items()}
    save_pretrained(
        changed,
        TINY_CONFIG,
        tmp_path / "out",
        dtype=torch.float32,
        merge_from=find_weights(folder),
    )
    key = "language_model.model.norm_moe_gen.weight"
    assert torch.equal(stored(tmp_path / "out")[key], full.state_dict()[key] + 1)


# ---- which weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("own_run", [False, True])
def test_auto_prefers_ema_of_released_folders_and_the_student_of_runs(full, folder, own_run):
    heads = {"model": full.state_dict()[LM_HEAD], "ema": full.state_dict()[LM_HEAD] + 1}
    state = full.state_dict() | {LM_HEAD: heads["ema"]}
    save_pretrained(state, TINY_CONFIG, folder, name="ema", dtype=torch.float32)
    if own_run:
        (folder / "run.json").write_text("{}")
    expected = {"auto": "model" if own_run else "ema", "student": "model", "ema": "ema"}
    for weights, name in expected.items():
        assert find_weights(folder, weights).name == str(folder / f"{name}.safetensors")
        head = load_pretrained(folder, weights).language_model.lm_head.weight
        assert torch.equal(head, heads[name])


def test_auto_takes_what_there_is(full, folder):
    assert find_weights(folder).name.endswith("model.safetensors")
    (folder / "model.safetensors").rename(folder / "ema.safetensors")
    (folder / "run.json").write_text("{}")
    assert find_weights(folder).name.endswith("ema.safetensors")
    with pytest.raises(CheckpointError, match=r"no model.safetensors .*there: ema.safetensors"):
        find_weights(folder, "student")
    with pytest.raises(CheckpointError, match="'best' is unknown: choose auto, student or ema"):
        find_weights(folder, "best")


# ---- errors ----------------------------------------------------------------------------------


def drop(key):
    return lambda tensors: tensors.pop(key)


def put(key, *shape):
    return lambda tensors: tensors.update({key: torch.zeros(*shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("connector.fc1.bias"), r"1 missing \(first: connector.fc1.bias\)"),
        (put("connector.fc3.bias", 4), r"1 unexpected \(first: connector.fc3.bias\)"),
        (put(LM_HEAD, 5, 64), rf"{LM_HEAD} has shape \(5, 64\).*asks for \(512, 64\)"),
        (
            put("vit_model.vision_model.encoder.layers.7.layer_norm1.bias", 32),
            "unexpected.*encoder.layers.7.layer_norm1.bias",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(folder)
    assert str(folder / "model.safetensors") in str(error.value)
    assert "experts=" not in str(error.value)


def test_missing_generation_expert_names_the_remedy(full, tmp_path):
    model = Bagel(TINY_CONFIG, generation_expert=False)
    save_pretrained(model.state_dict(), TINY_CONFIG, tmp_path)
    load_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="missing .*moe_gen.*experts='und' opens the rest"):
        load_pretrained(tmp_path, experts="all")
    rewrite(tmp_path, drop("connector.fc1.bias"))  # und would not open either
    with pytest.raises(CheckpointError, match="missing .*connector.fc1.bias") as error:
        load_pretrained(tmp_path, experts="all")
    assert "experts=" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 1000, -100])
def test_truncated_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors is not a complete safetensors"):
        load_pretrained(folder)


def test_missing_shard_is_named(full, tmp_path):
    save_pretrained(full.state_dict(), TINY_CONFIG, tmp_path, max_shard_bytes=100_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"index.json names files.*missing: {shard.name}"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_broken_index_is_named(full, tmp_path, text):
    save_pretrained(full.state_dict(), TINY_CONFIG, tmp_path, max_shard_bytes=100_000)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index.json is not a safetensors index"):
        load_pretrained(tmp_path)


def test_missing_folder_and_empty_folder_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no ema.safetensors or model.safetensors.*none"):
        load_pretrained(tmp_path)


# ---- configurations --------------------------------------------------------------------------


def change_json(file, **values):
    data = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def test_released_configs_have_further_fields(folder):
    change_json(folder / "llm_config.json", architectures=["Qwen2ForCausalLM"], rope_theta=...)
    change_json(folder / "llm_config.json", rope_parameters={"rope_theta": 123.0})
    expected = dataclasses.replace(TINY_CONFIG.llm, rope_theta=123.0)
    assert BagelConfig.from_pretrained(folder).llm == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": ...}, "llm_config.json lacks hidden_size"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 .* num_key_value_heads 3"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=true is not supported"),
    ],
)
def test_unusable_config_is_named(folder, values, message):
    change_json(folder / "llm_config.json", **values)
    with pytest.raises(ConfigError, match=message):
        load_pretrained(folder)


def test_missing_or_broken_config_file_is_named(folder):
    (folder / "vit_config.json").write_text("{")
    with pytest.raises(ConfigError, match="vit_config.json is not valid json"):
        load_pretrained(folder)
    (folder / "vit_config.json").unlink()
    with pytest.raises(ConfigError, match="vit_config.json not found"):
        load_pretrained(folder)


def test_files_name_their_format(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
