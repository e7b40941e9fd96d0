"""SigLIP NaViT: an image encoder over packed patches of pictures of any size.

A flat patch goes through one Linear (the patch convolution of SigLIP), gets a learned position from
a table of patches_per_side^2 rows, then pre-norm blocks with full attention inside each picture.
Attribute names are the released state-dict keys.

Legend: N packed patches, P patch_dim, D hidden, H heads, E head_dim.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from modeling.attention import Plan
from modeling.config import BagelConfig, ViTConfig


class SiglipAttention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.head_dim = D // config.num_attention_heads
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.q_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))  # (N, H, E)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(plan(q, k, v).flatten(1))


class SiglipMLP(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipLayer(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.self_attn = SiglipAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), plan)
        return x + self.mlp(self.layer_norm2(x))


class SiglipEmbeddings(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(config.patches_per_side**2, config.hidden_size)
        self.patch_embedding = nn.Linear(config.patch_dim, config.hidden_size)

    def forward(self, patches: Tensor, position_ids: Tensor) -> Tensor:
        return self.patch_embedding(patches) + self.position_embedding(position_ids)


class SiglipEncoder(nn.Module):
    """Holds the layers under the released key `encoder.layers.N`."""

    def __init__(self, config: ViTConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipLayer(config) for _ in range(num_layers))

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        for layer in self.layers:
            x = layer(x, plan)
        return x


class SiglipVisionTransformer(nn.Module):
    def __init__(self, config: ViTConfig, num_layers: int) -> None:
        super().__init__()
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = SiglipEncoder(config, num_layers)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, position_ids: Tensor, plan: Plan) -> Tensor:
        x = self.embeddings(patches, position_ids)
        return self.post_layernorm(self.encoder(x, plan))


class SiglipNaViT(nn.Module):
    """(N, P) patches of several images -> (N, D) features after the last kept layer's norm."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.vision_model = SiglipVisionTransformer(config.vit, config.vit_layers_used)

    def forward(self, patches: Tensor, position_ids: Tensor, plan: Plan) -> Tensor:
        return self.vision_model(patches, position_ids, plan)
