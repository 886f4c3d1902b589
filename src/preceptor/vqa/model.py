"""One-stream transformer for visual question answering in a shared image-text space.

Image tokens from several depths of a vision backbone (patches and global context) and the tokens of a text encoder are
projected to a common width, marked by type and position, and fused by transformer layers. The classifier uses the
classification token plus the product of the mean image token and the mean question token. Because of the product, the
question gates the image from the first step, which learns much faster than attention alone on small data.

The architecture is our choice: MHKD-MVQA (BIBM 2022) specifies a latent space shared by image and question, and
teaching by outputs and intermediate layers, but does not publish a network.

Shapes: B batch, I image tokens, Q question tokens (padded at the end), L = 1 + I + Q fused tokens, D width, H heads,
C answer classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from preceptor.backbones.tiny_vit import TinyVitConfig, TinyVitModel
from preceptor.vqa.vision import VISION


class VqaTransformerConfig(PretrainedConfig):
    """Configuration of the model.

    `vision` is ``{"kind": "conv", ...}`` or ``{"kind": "transformers", "config": {...}}``. `text` is a transformers
    text configuration as a dict with its `model_type`.
    """

    model_type = "preceptor-vqa"

    def __init__(
        self,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        width: int = 256,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        image_size: int = 112,
        max_question_tokens: int = 24,
        normaliser: str = "mevf",
        preceptor: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision = vision or {"kind": "conv", "channels": [16, 32], "blocks": [1, 1], "token_stages": [1]}
        self.text = text or {"model_type": "bert"}
        self.width, self.layers, self.heads, self.dropout = width, layers, heads, dropout
        self.image_size, self.max_question_tokens = image_size, max_question_tokens
        self.normaliser = normaliser
        self.preceptor = preceptor or {}
        super().__init__(**kwargs)

    @property
    def answers(self) -> list[str]:
        """The answer classes in the order of the logits."""
        labels: dict[Any, str] = dict(self.id2label or {})
        return [labels[i] for i in range(len(labels))]


class SelfAttention(nn.Module):
    """Multi-head self-attention. Its maps pass through the module `probabilities`, so that hooks can read them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.probabilities = nn.Softmax(dim=-1)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, bias_B11L: Tensor) -> Tensor:
        b, length, width = x_BLD.shape
        q, k, v = self.qkv(x_BLD).view(b, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        # Not a fused kernel: sequences are short, and distillation needs the attention maps.
        scores_BHLL = (q @ k.transpose(-1, -2)).float() * (width // self.heads) ** -0.5 + bias_B11L
        maps_BHLL = self.probabilities(scores_BHLL)
        context = maps_BHLL.to(v.dtype) @ v
        return self.out(context.transpose(1, 2).reshape(b, length, width))


class FusionLayer(nn.Module):
    """Pre-norm transformer layer.

    Dropout is applied to the two residual branches only. Inside them it costs more CPU time than the matrix products.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, bias_B11L: Tensor) -> Tensor:
        x_BLD = x_BLD + self.dropout(self.attention(self.norm1(x_BLD), bias_B11L))
        return x_BLD + self.dropout(self.feedforward(self.norm2(x_BLD)))


@dataclass
class VqaOutput(ModelOutput):
    """`logits` (B, C) of the answer classes, and `mask` (B, L), True for fused tokens that are not padding."""

    logits: Tensor | None = None
    mask: Tensor | None = None


class VqaTransformer(PreTrainedModel):
    """The network. Features for hooks: `embed_image` (B, I, D), `embed_question` (B, Q, D), `fusion.N` (B, L, D),
    `fusion.N.attention.probabilities` (B, H, L, L)."""

    config_class = VqaTransformerConfig  # type: ignore[misc,assignment]
    base_model_prefix = ""
    main_input_name = "pixels"

    def __init__(self, config: VqaTransformerConfig) -> None:
        super().__init__(config)
        self.vision = VISION[config.vision["kind"]](config.vision)
        text = dict(config.text)
        text_config = AutoConfig.for_model(text.pop("model_type"), **text)
        options = {"add_pooling_layer": False} if text_config.model_type in ("bert", "roberta") else {}
        # Only the eager implementation is exact with a mask on every backend, and questions are short.
        self.text = AutoModel.from_config(text_config, attn_implementation="eager", **options)
        width = config.width
        self.embed_image = nn.Sequential(nn.Linear(self.vision.width, width), nn.LayerNorm(width))
        self.embed_question = nn.Sequential(nn.Linear(text_config.hidden_size, width), nn.LayerNorm(width))
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.image_position = nn.Parameter(torch.zeros(1, self.vision.tokens(config.image_size), width))
        self.question_position = nn.Parameter(torch.zeros(1, config.max_question_tokens, width))
        self.token_type = nn.Parameter(torch.zeros(2, width))
        self.dropout = nn.Dropout(config.dropout)
        self.fusion = nn.ModuleList(FusionLayer(width, config.heads, config.dropout) for _ in range(config.layers))
        self.norm_image, self.norm_question = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(config.answers))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            # The usual standard deviation of 0.02 would attenuate the image signal at these widths.
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, VqaTransformer):
            for parameter in (module.cls, module.image_position, module.question_position, module.token_type):
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> VqaOutput:
        """Compute the logits of the answer classes.

        Args:
            pixels: Normalised images (B, 3, h, w).
            input_ids: Tokens of the questions (B, Q).
            attention_mask: 1 for tokens, 0 for padding (B, Q).
        """
        image_BID = self.embed_image(self.vision(pixels))
        text_BQW = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        question_BQD = self.embed_question(text_BQW)
        b, q, _ = question_BQD.shape
        x_BLD = torch.cat(
            [
                self.cls.expand(b, -1, -1),
                image_BID + self.image_position + self.token_type[0],
                question_BQD + self.question_position[:, :q] + self.token_type[1],
            ],
            dim=1,
        )
        mask_BL = torch.cat([attention_mask.new_ones(b, 1 + image_BID.shape[1]), attention_mask], dim=1).bool()
        bias_B11L = torch.zeros(mask_BL.shape, device=x_BLD.device).masked_fill(~mask_BL, -1e9)[:, None, None]
        x_BLD = self.dropout(x_BLD)
        for layer in self.fusion:
            x_BLD = layer(x_BLD, bias_B11L)
        first = 1 + image_BID.shape[1]
        weight_BQ1 = attention_mask[..., None].to(x_BLD.dtype)
        image_BD = self.norm_image(x_BLD[:, 1:first].mean(dim=1))
        question_BD = self.norm_question((x_BLD[:, first:] * weight_BQ1).sum(dim=1) / weight_BQ1.sum(dim=1))
        answer_BD = self.norm(x_BLD[:, 0] + image_BD * question_BD)
        return VqaOutput(logits=self.head(answer_BD).float(), mask=mask_BL)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


# After this import, AutoTokenizer, AutoConfig and AutoModel load folders of this model and know its backbone. What this
# module imports must not import transformers' Auto classes: they import this module (see preceptor._transformers).
AutoConfig.register(TinyVitConfig.model_type, TinyVitConfig, exist_ok=True)
AutoModel.register(TinyVitConfig, TinyVitModel, exist_ok=True)
AutoConfig.register(VqaTransformerConfig.model_type, VqaTransformerConfig, exist_ok=True)
AutoModel.register(VqaTransformerConfig, VqaTransformer, exist_ok=True)
