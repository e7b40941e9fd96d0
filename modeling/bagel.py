"""Bagel: segments of text and images -> decoder -> hidden states -> text head.

Legend: T packed tokens, N patches, D hidden, R loss rows, V vocab.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modeling.attention import Backend, packed_plan
from modeling.config import BagelConfig
from modeling.kv_cache import KVCache
from modeling.layers import Connector, PositionTable, TimestepEmbedder, patch_position_ids
from modeling.qwen2_mot import Qwen2ForCausalLM
from modeling.sequence import PackedBatch, Split
from modeling.siglip_navit import SiglipNaViT

Head = Callable[[Tensor, nn.Linear], Any]


class Bagel(nn.Module):
    """The unified model.

    Args:
        config: shapes.
        generation_expert: build the `*_moe_gen` weights of the decoder.
        visual_gen: build the latent heads (`vae2llm`, `llm2vae`, time embedder, latent positions).
    """

    def __init__(
        self, config: BagelConfig, generation_expert: bool = True, visual_gen: bool = False
    ) -> None:
        super().__init__()
        if visual_gen and not generation_expert:
            raise ValueError("visual_gen needs the generation expert")
        D = config.llm.hidden_size
        self.config = config
        self.attention_backend: Backend = "sdpa"
        self.language_model = Qwen2ForCausalLM(config.llm, generation_expert)
        self.vit_model = SiglipNaViT(config)
        self.connector = Connector(config.vit.hidden_size, D)
        self.vit_pos_embed = PositionTable(config.vit.patches_per_side, D)
        if visual_gen:
            latent_dim = config.latent_patch_size**2 * config.latent_channels
            self.time_embedder = TimestepEmbedder(D)
            self.vae2llm = nn.Linear(latent_dim, D)
            self.llm2vae = nn.Linear(D, latent_dim)
            self.latent_pos_embed = PositionTable(config.max_latent_size, D)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute decoder layers in the backward pass instead of keeping their activations."""
        self.language_model.model.activation_checkpointing = enabled

    def embed(self, batch: PackedBatch) -> Tensor:
        """Token and image embeddings in packed order: (T, D)."""
        tokens = self.language_model.model.embed_tokens(batch.token_ids)
        if not batch.image_grids:
            return tokens  # text only: token_index is 0..T-1
        x = tokens.new_zeros(len(batch), tokens.shape[-1])
        x = x.index_copy(0, batch.token_index, tokens)
        return x.index_copy(0, batch.patch_index, self.encode_images(batch).to(x.dtype))

    def encode_images(self, batch: PackedBatch) -> Tensor:
        """ViT -> connector -> plus the fixed 2-D position of each patch: (N, D)."""
        side, interpolate = self.config.vit.patches_per_side, self.config.interpolate_pos
        ids = torch.cat(
            [patch_position_ids(h, w, side, interpolate) for h, w in batch.image_grids]
        ).to(batch.patches.device)
        images = [(Split(h * w, "full"),) for h, w in batch.image_grids]
        plan = packed_plan(images, batch.patches.device, self.attention_backend)
        patches = batch.patches.to(self.connector.fc1.weight.dtype)
        features = self.connector(self.vit_model(patches, ids, plan))
        return features + self.vit_pos_embed(ids).to(features.dtype)

    def forward(
        self, batch: PackedBatch, kv_cache: KVCache | None = None, head: Head | None = None
    ) -> Any:
        """Hidden states of the loss rows, (R, D), or what `head` makes of them.

        Args:
            batch: packed tokens; with `kv_cache`, one sample per cache row, continuing it.
            kv_cache: keys and values are appended (the caller decides on `advance`).
            head: called as head(hidden_rows, lm_head) inside this forward, where a sharding
                wrapper has the head's weight gathered.
        """
        hidden = self.hidden_states(self.embed(batch), batch, kv_cache)[batch.loss_rows]
        return hidden if head is None else head(hidden, self.language_model.lm_head)

    def hidden_states(
        self, embeddings: Tensor, batch: PackedBatch, kv_cache: KVCache | None = None
    ) -> Tensor:
        """(T, D) embeddings -> (T, D) after the final norm."""
        if kv_cache is None:
            plan = packed_plan(batch.samples, embeddings.device, self.attention_backend)
        else:
            plan = kv_cache.plan(batch.samples)
        return self.language_model.model(embeddings, batch.position_ids, plan, None, kv_cache)


def text_logits(hidden: Tensor, lm_head: nn.Linear) -> Tensor:
    """A `head`: (R, D) -> (R, V) logits."""
    return lm_head(hidden)
