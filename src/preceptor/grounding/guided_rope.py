"""Rotary positions of the Qwen-VL family with guided intervals (ClinKD, Ge et al. 2025, "Med-CLIP guided RoPE").

A token has three coordinates (t, h, w). They are computed for each sequence without its padding:

- Text tokens have three equal coordinates. The first token is at 0, and each text token is 1 after the previous one.
- The first visual token of an image is `gap` after the last text token in all coordinates, or at 0 if there is none.
  Let s be its position. The token in frame i, row r, column c (after the patch merger) is at
  ``(s + i, s + row_step * r, s + column_step * c)``. The guidance sets the steps inside an image, but not the temporal
  index (for videos, the interval between frames of transformers).
- Text after an image is `gap` after ``s + max(row_step * (rows - 1), column_step * (columns - 1))``.
- Adjacent images without text between them are 1 apart; there is a gap only between text and vision.

With gap 1 and steps 1 the positions equal those of `get_rope_index` of transformers. With gap 2 and steps 1 they equal
those of the published ClinKD code (model/modeling_qwen2_vl.py: ``max() + 2`` at every change between text and vision)
for images, and for videos with at most as many frames as rows or columns. After a longer video, the published code (and
the transformers of its time) starts the text after the largest of t, h and w: at 14 after four text tokens and 8 frames
of 2 x 2 tokens. Current transformers and this implementation start it after the largest of h and w: with gap 2 at 8.
The published code also fails for an image at the very beginning, for adjacent images, and for the second row of a
batch, where it takes the maximum of an empty list; this implementation follows the rules above. The deltas follow the
current transformers, which counts tokens without padding, as cached decoding requires; the published code counts
padding too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from preceptor.errors import UserError
from preceptor.grounding.settings import MODALITIES

FAMILIES = ("qwen2_vl", "qwen2_vl_dinov2", "qwen2_5_vl", "qwen3_vl")

Kind = Literal["none", "fixed", "clip"]
_LOG_LIMIT = 20.0
_INPUTS = ("image_grid_thw", "attention_mask", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")


class Guidance(nn.Module):
    """Intervals between positions: `none` as in transformers, `fixed` for all images, `clip` by modality.

    With `clip`, (gap, row_step, column_step) of an image is ``probabilities @ table``. The table has a row for each of
    the eight `MODALITIES`. The probabilities come from a medical CLIP model, or are one-hot for a known modality.

    Args:
        kind: `none`, `fixed` or `clip`.
        gap: Interval between text and vision (lambda; 2 in the paper). With `learnable` the initial value of each row.
        row_step: Interval between rows of an image (alpha_1; 1 in the published code).
        column_step: Interval between columns of an image (alpha_2; 1 in the published code).
        table: With `clip`, the whole table with 8 rows of (gap, row_step, column_step).
        learnable: With `clip`, whether the table is trained. The parameters are its logarithms, so that it stays above
            0. Transformers computes the rotation without gradients; `attach` enables them.

    Raises:
        UserError: `kind` is unknown, `clip` has neither a table nor `learnable`, the table has another shape, or a
            value is not finite and positive.
    """

    def __init__(
        self,
        kind: Kind = "fixed",
        *,
        gap: float = 2.0,
        row_step: float = 1.0,
        column_step: float = 1.0,
        table: Sequence[Sequence[float]] | Tensor | None = None,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        if kind not in ("none", "fixed", "clip"):
            raise UserError(f"guidance {kind!r} is not known; choose none, fixed or clip")
        if kind != "clip" and (table is not None or learnable):
            raise UserError(f"guidance {kind!r} has no table; remove table and learnable, or choose clip")
        if kind == "clip" and table is None and not learnable:
            raise UserError("guidance 'clip' without a table is 'fixed'; give a table, set learnable, or choose fixed")
        row = (1.0, 1.0, 1.0) if kind == "none" else (gap, row_step, column_step)
        values = torch.as_tensor([row] * len(MODALITIES) if table is None else table, dtype=torch.float32).clone()
        if values.shape != (len(MODALITIES), 3):
            raise UserError(
                f"the guidance table has shape {tuple(values.shape)}; give 8 rows, one for each of "
                f"{', '.join(MODALITIES)}, of 3 numbers: gap, row_step, column_step"
            )
        if not (values.isfinite().all() and (values > 0).all()):
            raise UserError(
                f"guidance intervals must be numbers above 0, not {values.tolist()}; a table that an earlier version "
                "of Preceptor trained can hold others, and its model must be trained again"
            )
        self.kind: Kind = kind
        self.log_table = nn.Parameter(values.log()) if learnable else None
        self.register_buffer("_constant", None if learnable else values)

    @property
    def learnable(self) -> bool:
        return self.log_table is not None

    @property
    def table(self) -> Tensor:
        """The intervals (8, 3): gap, row step and column step of each modality."""
        if self.log_table is not None:
            return self.log_table.clamp(-_LOG_LIMIT, _LOG_LIMIT).exp()
        return self._constant  # type: ignore[return-value]

    def settings(self) -> dict[str, Any]:
        """Return the arguments that recreate this guidance, for JSON."""
        if self.kind == "clip":
            return {"kind": "clip", "table": self.table.detach().tolist(), "learnable": self.learnable}
        if self.kind == "none":
            return {"kind": "none"}
        gap, row_step, column_step = self.table[0].tolist()
        return {"kind": "fixed", "gap": gap, "row_step": row_step, "column_step": column_step}

    def intervals(self, images: int, probabilities_N8: Tensor | None) -> Tensor:
        """Return gap, row step and column step of each image, (images, 3).

        `probabilities_N8` has a row per image in the order of the grids; it is used by `clip` only.

        Raises:
            UserError: the probabilities are missing, have another shape, or do not sum to 1.
        """
        table_83 = self.table
        if self.kind != "clip":
            return table_83[:1].expand(images, 3)
        if probabilities_N8 is None and images == 0:
            return table_83[:0]
        if probabilities_N8 is None:
            raise UserError("guidance clip needs the modality probabilities of every image")
        probabilities = torch.as_tensor(probabilities_N8).detach().to(table_83)
        if probabilities.shape != (images, len(MODALITIES)):
            raise UserError(
                f"probabilities have shape {tuple(probabilities.shape)} for {images} images; give one row of "
                f"{len(MODALITIES)} for each image"
            )
        row_sums = probabilities.sum(dim=1)
        if not ((probabilities >= 0).all() and ((row_sums - 1).abs() < 1e-3).all()):
            raise UserError(
                f"modality probabilities must not be negative and must sum to 1, but the sums are {row_sums.tolist()}"
            )
        return probabilities @ table_83


def positions(
    config: Any,
    guidance: Guidance,
    input_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    probabilities: Tensor | None = None,
    mm_token_type_ids: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Iterable[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `position_ids` (3, B, L) and rope deltas (B, 1).

    They are integers for `none` and for `fixed` with integer intervals. Otherwise they are float32, with gradients to a
    learnable table; the deltas have no gradient, because they are used for decoding only. Padding is 0.

    Args:
        config: Configuration of a model of one of `FAMILIES`.
        guidance: The guidance.
        input_ids: Tokens (B, L).
        image_grid_thw: Patches in time, rows and columns of every image (N, 3), in the order of the sequences.
        attention_mask: 0 for padding (B, L).
        probabilities: Modality probabilities (N, 8) for `clip`; see `Guidance.intervals`.
        mm_token_type_ids: 0 text, 1 image, 2 video (B, L). Default: derived from the placeholder tokens.
        video_grid_thw: As in transformers. `clip` does not support videos.
        second_per_grid_ts: As in transformers.

    Raises:
        UserError: the model belongs to another family, placeholders and grids do not match, the probabilities are
            invalid, or there is a video with `clip`.
    """
    if config.model_type not in FAMILIES:
        raise UserError(f"guided positions are for {', '.join(FAMILIES)}, not for {config.model_type!r}")
    if video_grid_thw is not None and guidance.kind == "clip":
        raise UserError("guidance clip does not support videos; remove them, or choose fixed or none")
    if mm_token_type_ids is None:
        image, video = input_ids == config.image_token_id, input_ids == config.video_token_id
        mm_token_type_ids = image.long() + 2 * video.long()
    merge = config.vision_config.spatial_merge_size
    images = [] if image_grid_thw is None else image_grid_thw.tolist()
    stills = [(t, h // merge, w // merge, 1.0) for t, h, w in images]
    videos = _videos(config, merge, video_grid_thw, second_per_grid_ts)
    table_N3 = guidance.intervals(len(stills), probabilities)
    # Float32 represents integers up to 16 million exactly; some devices do not support float64.
    rows_N3 = list(table_N3.to(device=input_ids.device, dtype=torch.float32))
    supply = {1: iter(zip(stills, rows_N3, strict=True)), 2: ((grid, guidance.table[0]) for grid in videos)}

    length = input_ids.shape[1]
    valid_BL = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    placed, deltas = [], []
    for valid_L, types_L in zip(valid_BL, mm_token_type_ids, strict=True):
        row_3L = _sequence(types_L[valid_L].tolist(), supply, input_ids.device)
        full_3L = row_3L.new_zeros(3, length)
        # index_copy instead of an in-place assignment, because gradients flow back to a learnable table.
        placed.append(full_3L.index_copy(1, valid_L.nonzero().squeeze(1), row_3L))
        deltas.append((row_3L.detach().amax() if row_3L.shape[1] else row_3L.new_tensor(-1.0)) + 1 - row_3L.shape[1])
    for kind, name in ((1, "image"), (2, "video")):
        if next(supply[kind], None) is not None:
            raise UserError(f"there are more {name}s than {name} placeholders in the text; the numbers must be equal")
    found, delta_B1 = torch.stack(placed, dim=1), torch.stack(deltas).unsqueeze(1)
    if guidance.kind == "clip" or not bool((guidance.table[0] == guidance.table[0].round()).all()):
        return found, delta_B1
    return found.to(input_ids.dtype), delta_B1.to(input_ids.dtype)


def _videos(config: Any, merge: int, grids: Tensor | None, seconds: Iterable[float] | None) -> list[tuple]:
    """Return (frames, rows, columns, interval) of every video, or for Qwen3-VL of every frame as a separate image."""
    if grids is None:
        return []
    sizes = [(t, h // merge, w // merge) for t, h, w in grids.tolist()]
    if config.model_type == "qwen3_vl":
        return [(1, h, w, 1.0) for t, h, w in sizes for _ in range(t)]
    if config.model_type in ("qwen2_vl", "qwen2_vl_dinov2"):
        return [(t, h, w, 1.0) for t, h, w in sizes]
    each = [1.0] * len(sizes) if seconds is None else [float(second) for second in seconds]
    rate = config.vision_config.tokens_per_second
    return [(t, h, w, rate * second) for (t, h, w), second in zip(sizes, each, strict=True)]


def _sequence(types: list[int], supply: dict[int, Any], device: torch.device) -> Tensor:
    """Return the positions (3, tokens) of one sequence without padding."""
    last = torch.tensor(-1.0, device=device)  # the largest coordinate so far
    before, gap = None, last.new_ones(())
    parts = [last.new_zeros(3, 0)]
    for kind, run in itertools.groupby(types):
        remaining = len(list(run))
        if kind == 0:
            start = last + (gap if before in (1, 2) else 1)
            parts.append((start + torch.arange(remaining, device=device)).expand(3, remaining))
            last, before = start + remaining - 1, 0
            continue
        while remaining > 0:
            grid, interval_3 = next(supply[kind], (None, None))
            name = "image" if kind == 1 else "video"
            if grid is None or interval_3 is None:
                raise UserError(
                    f"there are more {name} placeholders in the text than {name}s; the numbers must be equal"
                )
            frames, rows, columns, tick = grid
            remaining -= frames * rows * columns
            if remaining < 0:
                raise UserError(
                    f"the text has {remaining + frames * rows * columns} {name} placeholder tokens, but the {name} has "
                    f"{frames} x {rows} x {columns} tokens after merging; the numbers must be equal"
                )
            gap, row_step, column_step = interval_3.to(last).unbind()
            start = last + (gap if before == 0 else 1)
            t, h, w = torch.meshgrid(
                (torch.arange(frames, device=device) * tick).long().to(last),
                torch.arange(rows, device=device) * row_step,
                torch.arange(columns, device=device) * column_step,
                indexing="ij",
            )
            parts.append(start + torch.stack([t, h, w]).reshape(3, -1))
            last = start + torch.maximum(row_step * (rows - 1), column_step * (columns - 1))
            before = kind
    return torch.cat(parts, dim=1)


class RopePatch:
    """Connection of a model and its guidance. `remove` or the end of a `with` block restores the model.

    `probabilities` (N, 8) belong to the images of the next call. With `clip`, set them before each forward pass or call
    of `generate`.
    """

    def __init__(self, inner: Any, guidance: Guidance, probabilities: Tensor | None = None) -> None:
        self.guidance, self.probabilities, self._inner = guidance, probabilities, inner

        def get_rope_index(model: Any, input_ids: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
            known = {name: inputs.get(name) for name in _INPUTS}
            return positions(model.config, self.guidance, input_ids, probabilities=self.probabilities, **known)

        inner.get_rope_index = MethodType(get_rope_index, inner)
        if guidance.learnable:
            rotary = inner.language_model.rotary_emb
            # The original function without `torch.no_grad`, so that gradients reach the table.
            rotary.forward = MethodType(type(rotary).forward.__wrapped__, rotary)

    def remove(self) -> None:
        self._inner.__dict__.pop("get_rope_index", None)
        self._inner.language_model.rotary_emb.__dict__.pop("forward", None)
        self._inner.rope_deltas = None  # computed with other positions

    def __enter__(self) -> RopePatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(model: nn.Module, guidance: Guidance, probabilities: Tensor | None = None) -> RopePatch:
    """Let a Qwen-VL model (or a PEFT model around one) use guided positions, in forward passes and in `generate`.

    Only this instance changes: its `get_rope_index` and, with a learnable table, the `forward` of its rotary embedding,
    which transformers computes without gradients. Weights and saved files do not change; the table belongs to the
    guidance. If the model is called with `position_ids`, it uses them. Gradient checkpointing must be non-reentrant,
    which is the default of transformers.

    Raises:
        UserError: the model belongs to none of `FAMILIES`, or already has guided positions.
    """
    for inner in model.modules():
        if hasattr(type(inner), "get_rope_index") and inner.config.model_type in FAMILIES:  # type: ignore
            if "get_rope_index" in inner.__dict__:
                raise UserError("the model already has guided positions; remove them first")
            return RopePatch(inner, guidance, probabilities)
    raise UserError(f"{type(model).__name__} does not support guided positions; give a model of {', '.join(FAMILIES)}")
