"""The TinyViT image encoder of LiteMedSAM as a transformers model (Wu et al., 2022; Ma et al., 2024).

It is a variant without a patch stem: the first stage works on single pixels and the last two on a grid of a quarter of
the image side. The package that publishes the weights needs timm and torchvision, so the network is written here, with
its parameter names.

Shapes: B batch, C channels, H, W grid, N cells of a window, A heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel


class TinyVitConfig(PretrainedConfig):
    """Configuration: the width, depth, attention heads and side of the attention windows of every stage."""

    model_type = "preceptor-tiny-vit"

    def __init__(
        self,
        widths: list[int] | None = None,
        depths: list[int] | None = None,
        heads: list[int] | None = None,
        windows: list[int] | None = None,
        neck: int = 256,
        **kwargs: Any,
    ) -> None:
        self.widths, self.depths = widths or [64, 128, 160, 320], depths or [2, 2, 6, 2]
        self.heads, self.windows = heads or [2, 4, 5, 10], windows or [7, 7, 14, 7]
        self.neck = neck
        super().__init__(**kwargs)


class ConvNorm(nn.Sequential):
    """A convolution without bias, followed by batch normalisation."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outputs))


class Convolutions(nn.Module):
    """Pointwise, depthwise and pointwise convolution with GELU between them: MBConv, or the start of a new stage."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, stride: int = 1, residual: bool = False) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, stride, groups=hidden)
        self.conv3 = ConvNorm(hidden, outputs)
        self.residual = residual

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x_BCHW)))))
        return F.gelu(x_BCHW + y) if self.residual else y


class WindowAttention(nn.Module):
    """Self-attention inside a window, with a learned bias for every distance of two cells."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))

    def forward(self, x_BNC: Tensor) -> Tensor:
        b, n, width = x_BNC.shape
        qkv = self.qkv(self.norm(x_BNC)).view(b, n, self.heads, 3 * width // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.split(width // self.heads, dim=3))
        # Computed here, because `from_pretrained` leaves buffers that are not in the file uninitialized.
        cell = torch.arange(n, device=x_BNC.device)
        row, column = cell // self.window, cell % self.window
        bias_ANN = self.attention_biases[:, _distance(row) * self.window + _distance(column)]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_ANN.to(q.dtype))
        return self.proj(y.transpose(1, 2).reshape(b, n, width))


def _distance(place_N: Tensor) -> Tensor:
    return (place_N[:, None] - place_N).abs()


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class WindowBlock(nn.Module):
    """Window attention, a depthwise convolution and a feed-forward network. The grid is padded to whole windows."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(width, heads, window)
        self.local_conv = ConvNorm(width, width, 3, groups=width)
        self.mlp = FeedForward(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        b, c, h, w = x_BCHW.shape
        side = self.window
        # Padded cells take part in the attention, as in the published network.
        padded = F.pad(x_BCHW, (0, -w % side, 0, -h % side))
        rows, columns = padded.shape[2] // side, padded.shape[3] // side
        windows = padded.view(b, c, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1).reshape(-1, side * side, c)
        y = self.attn(windows).view(b, rows, columns, side, side, c).permute(0, 5, 1, 3, 2, 4)
        x_BCHW = self.local_conv(x_BCHW + y.reshape(b, c, rows * side, columns * side)[:, :, :h, :w])
        return x_BCHW + self.mlp(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """The blocks of a stage, and what leads to the next one. Returns the output of both."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return x_BCHW, x_BCHW if self.downsample is None else self.downsample(x_BCHW)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TinyVitModel(PreTrainedModel):
    """The network. `hidden_states` are the output of each stage and, last, of the neck."""

    config_class = TinyVitConfig  # type: ignore[misc,assignment]
    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init__(self, config: TinyVitConfig) -> None:
        super().__init__(config)
        widths, stages = config.widths, len(config.widths)
        first = widths[0]
        self.patch_embed = nn.ModuleDict(
            {"seq": nn.Sequential(ConvNorm(3, first // 2), nn.GELU(), ConvNorm(first // 2, first))}
        )
        self.layers = nn.ModuleList()
        for number, (width, depth) in enumerate(zip(widths, config.depths, strict=True)):
            heads, window = config.heads[number], config.windows[number]
            blocks: list[nn.Module] = [
                WindowBlock(width, heads, window) if number else Convolutions(width, 4 * width, width, residual=True)
                for _ in range(depth)
            ]
            after = widths[number + 1] if number + 1 < stages else None
            stride = 2 if number + 2 < stages else 1  # the last stage keeps the grid of the one before
            self.layers.append(Stage(blocks, Convolutions(width, after, after, stride=stride) if after else None))
        self.neck = nn.Sequential(
            nn.Conv2d(widths[-1], config.neck, 1, bias=False),
            ChannelNorm(config.neck, eps=1e-6),
            nn.Conv2d(config.neck, config.neck, 3, padding=1, bias=False),
            ChannelNorm(config.neck, eps=1e-6),
        )
        self.post_init()

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = True) -> BaseModelOutput:
        """Compute the features (B, 256, H / 4, W / 4) of images (B, 3, H, W)."""
        x = self.patch_embed["seq"](pixel_values)
        states = []
        for stage in self.layers:
            state, x = stage(x)
            states.append(state)
        x = self.neck(x)
        return BaseModelOutput(last_hidden_state=x, hidden_states=(*states, x) if output_hidden_states else None)
