"""Bagel: segments of text and images -> decoder -> hidden states -> text head, velocity head.

Legend: T packed tokens, N patches, M latent tokens, F of them learned, C latent_dim, D hidden,
R loss rows, V vocab.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modeling.attention import Backend, packed_plan
from modeling.config import BagelConfig
from modeling.kv_cache import KVCache
from modeling.layers import Connector, PositionTable, TimestepEmbedder, patch_position_ids
from modeling.qwen2_mot import Qwen2ForCausalLM, Route
from modeling.sequence import PackedBatch, Split
from modeling.siglip_navit import SiglipNaViT

Head = Callable[[Tensor, nn.Linear], Any]


class NoGenerationError(ValueError):
    """Latents reached a model that was opened without what it takes to draw."""


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
        self.attention_backend: Backend = "auto"
        self.always_draws = False
        self.language_model = Qwen2ForCausalLM(config.llm, generation_expert)
        self.vit_model = SiglipNaViT(config)
        self.connector = Connector(config.vit.hidden_size, D)
        self.vit_pos_embed = PositionTable(config.vit.patches_per_side, D)
        if visual_gen:
            self.time_embedder = TimestepEmbedder(D)
            self.vae2llm = nn.Linear(config.latent_dim, D)
            self.llm2vae = nn.Linear(D, config.latent_dim)
            self.latent_pos_embed = PositionTable(config.max_latent_size, D)

    @property
    def device(self) -> torch.device:
        """Where batches go and outputs lie. The weights, too, unless layers have devices of their
        own: then that of the first layer, and a weight may lie anywhere.
        """
        spread = self.language_model.model.layer_devices
        return spread[0] if spread else self.language_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of keys and values in a cache."""
        return self.language_model.lm_head.weight.dtype

    @property
    def can_draw(self) -> bool:
        """Whether the latent heads are there, and with them the generation expert."""
        return hasattr(self, "llm2vae")

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute decoder layers in the backward pass instead of keeping their activations."""
        self.language_model.model.activation_checkpointing = enabled

    def set_always_draws(self, enabled: bool) -> None:
        """Run the generation expert and the latent heads also on batches without latents, and the
        image encoder on those without images, to no effect but zero gradients: processes that
        average gradients need one of every parameter.
        """
        self.always_draws = enabled

    def embed(self, batch: PackedBatch) -> Tensor:
        """Token, image and latent embeddings in packed order: (T, D)."""
        tokens = self.language_model.model.embed_tokens(batch.token_ids)
        latents = batch.latent_grids or self.always_draws
        if not batch.image_grids and not latents:
            return tokens  # text only: token_index is 0..T-1
        x = tokens.new_zeros(len(batch), tokens.shape[-1])
        x = x.index_copy(0, batch.token_index, tokens)
        if batch.image_grids:
            x = x.index_copy(0, batch.patch_index, self.encode_images(batch).to(x.dtype))
        elif self.always_draws:
            patch = batch.latents.new_zeros(1, self.config.vit.patch_dim)
            blank = dataclasses.replace(batch, patches=patch, image_grids=((1, 1),))
            x = x + 0 * self.encode_images(blank).sum().to(x.dtype)
        if latents:
            x = x.index_copy(0, batch.latent_index, self.encode_latents(batch).to(x.dtype))
        return x

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

    def encode_latents(self, batch: PackedBatch) -> Tensor:
        """vae2llm, plus flow time, plus the fixed 2-D position of each latent token: (M, D).

        Raises:
            NoGenerationError: the latent heads were not loaded.
            ValueError: a picture that is larger than the position table.
        """
        if not self.can_draw:
            raise NoGenerationError(
                "this model cannot take latents: its latent heads (vae2llm, llm2vae, "
                "time_embedder) were not loaded. Open the checkpoint with experts='all'; if that "
                "finds none, the checkpoint has none"
            )
        side = self.config.max_latent_size
        ids = [latent_position_ids(h, w, side) for h, w in batch.latent_grids]
        ids = torch.cat([*ids, batch.latent_index[:0].cpu()]).to(batch.latents.device)
        latents = batch.latents.reshape(len(ids), self.config.latent_dim)  # or none
        x = self.vae2llm(latents.to(self.vae2llm.weight.dtype))
        return x + self.time_embedder(batch.times) + self.latent_pos_embed(ids).to(x.dtype)

    def forward(
        self, batch: PackedBatch, kv_cache: KVCache | None = None, head: Head | None = None
    ) -> Any:
        """Hidden states of the loss rows, (R, D), or what `head` makes of them.

        Where the batch has velocities to learn (or with `set_always_draws`), a pair: that, and
        the velocities, (F, C).

        Args:
            batch: packed tokens; with `kv_cache`, one sample per cache row, continuing it.
            kv_cache: keys and values are appended (the caller decides on `advance`).
            head: called as head(hidden_rows, lm_head) inside this forward, where a sharding
                wrapper has the head's weight gathered.
        """
        embeddings, draws = self.embed(batch), batch.latent_grids or self.always_draws
        if draws:
            hidden = self.hidden_states(embeddings, batch, kv_cache)
            rows = hidden[batch.loss_rows]
        else:
            rows = self.hidden_states(embeddings, batch, kv_cache, batch.loss_rows)
        out = rows if head is None else head(rows, self.language_model.lm_head)
        if not len(batch.targets) and not self.always_draws:
            return out
        return out, self.llm2vae(hidden[batch.flow_rows])

    @torch.no_grad()
    def velocity(self, batch: PackedBatch, kv_cache: KVCache) -> Tensor:
        """What flows at every latent token of the batch, (M, C), continuing the cache's rows."""
        hidden = self.hidden_states(self.embed(batch), batch, kv_cache)
        return self.llm2vae(hidden[batch.latent_index])

    def hidden_states(
        self,
        embeddings: Tensor,
        batch: PackedBatch,
        kv_cache: KVCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """(T, D) embeddings -> (T, D) after the final norm; of a batch without latents, `rows`
        alone where these are given.
        """
        if kv_cache is None:
            plan = packed_plan(batch.samples, embeddings.device, self.attention_backend)
        else:
            plan = kv_cache.plan(batch.samples, self.attention_backend)
        route = None
        if batch.latent_grids or self.always_draws:
            und_index = torch.cat([batch.token_index, batch.patch_index])
            route = Route(und_index, batch.latent_index)
        decoder = self.language_model.model
        return decoder(embeddings, batch.position_ids, plan, route, kv_cache, rows)


def latent_position_ids(height: int, width: int, side: int) -> Tensor:
    """Ids of a (height, width) grid of latent tokens in the side x side table, raster order.

    Raises:
        ValueError: the grid is larger than the table.
    """
    if max(height, width) > side:
        raise ValueError(
            f"a picture of {height}x{width} latent tokens is beyond max_latent_size={side}: "
            "make it smaller"
        )
    return patch_position_ids(height, width, side)


def text_logits(hidden: Tensor, lm_head: nn.Linear) -> Tensor:
    """A `head`: (R, D) -> (R, V) logits."""
    return lm_head(hidden)
