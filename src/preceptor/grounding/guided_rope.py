"""Rotary positions of the Qwen-VL family with guided intervals (ClinKD, Ge et al. 2025, "Med-CLIP guided RoPE").

The rule. A token has three coordinates (t, h, w). In each sequence, padding left out:

- Text has one number in all three. The first token is 0, and each text token is 1 after the text token before it.
- The first visual token of an image lies `gap` after the last text token, in all three coordinates; where nothing
  comes before, at 0. Call it s. The token in frame i, row r, column c (after the patch merger) is at
  ``(s + i, s + row_step * r, s + column_step * c)``: steps inside the image are the guidance's, the temporal index
  inside it is untouched (of a video, upstream's interval between frames).
- Text after an image is `gap` after ``s + max(row_step * (rows - 1), column_step * (columns - 1))``.
- Two images side by side without text between them are 1 apart: only where text meets vision is there a gap.

With gap 1 and steps 1 this is transformers' own `get_rope_index`, number for number. With gap 2 and steps 1 it is the
code published with ClinKD (model/modeling_qwen2_vl.py: ``max() + 2`` at every change between text and vision). That
code cannot run on an image at the very beginning, on images side by side, or on a second row of a batch, where it
reads the maximum of an empty list; there ours goes on by the rule. The deltas follow current transformers, which
counts tokens without padding (the published code counts the padding too), as its cached decoding needs them so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from preceptor.errors import UserError

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MODALITIES = ("ct", "mr", "x", "pet", "endoscopy", "dermoscopy", "fundus", "ultrasound")
"""Med-GRIT-270k's modalities: the part of its image names before ``_``; the rows of the table."""

Kind = Literal["none", "fixed", "clip"]
_INPUTS = ("image_grid_thw", "attention_mask", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")


class Guidance(nn.Module):
    """How far apart positions lie: `none` as upstream, `fixed` for all images, `clip` by each image's modality.

    Of `clip`, an image's (gap, row_step, column_step) is ``probabilities @ table``: the rows of a table of the eight
    `MODALITIES`, weighted by the probabilities that a medical CLIP (or the file's name: one 1) gives the image.

    Args:
        kind: `none`, `fixed` or `clip`.
        gap: lambda, between text and vision; the published 2. Of `clip` the start of every row.
        row_step, column_step: alpha_1 and alpha_2, between neighbours inside an image; 1 in the published code.
        table: of `clip` the whole table, 8 rows of (gap, row_step, column_step), instead of equal rows.
        learnable: of `clip`, whether the table is a parameter that the loss trains. Upstream computes the rotation
            without gradient; `attach` lets it through.

    Raises:
        UserError: for an unknown kind, a table of another shape, values that are not finite or not above 0.
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
            raise UserError(f"guidance {kind!r} has no table; leave table and learnable out, or choose clip")
        row = (1.0, 1.0, 1.0) if kind == "none" else (gap, row_step, column_step)
        values = torch.as_tensor([row] * len(MODALITIES) if table is None else table, dtype=torch.float32).clone()
        if values.shape != (len(MODALITIES), 3):
            raise UserError(
                f"the guidance table has shape {tuple(values.shape)}; give 8 rows, one for each of "
                f"{', '.join(MODALITIES)}, of 3 numbers: gap, row_step, column_step"
            )
        if not (values.isfinite().all() and (values > 0).all()):
            raise UserError(f"guidance intervals must be numbers above 0, not {values.tolist()}")
        self.kind: Kind = kind
        self.table: Tensor
        if learnable:
            self.table = nn.Parameter(values)
        else:
            self.register_buffer("table", values)

    @property
    def learnable(self) -> bool:
        return isinstance(self.table, nn.Parameter)

    def settings(self) -> dict[str, Any]:
        """Return what `Guidance(**settings)` needs to be this one again, fit for JSON."""
        if self.kind == "clip":
            return {"kind": "clip", "table": self.table.detach().tolist(), "learnable": self.learnable}
        if self.kind == "none":
            return {"kind": "none"}
        gap, row_step, column_step = self.table[0].tolist()
        return {"kind": "fixed", "gap": gap, "row_step": row_step, "column_step": column_step}

    def intervals(self, images: int, probabilities_N8: Tensor | None) -> Tensor:
        """Return (images, 3): gap, row step and column step of each image.

        `probabilities_N8` has a row for each image, in the order of the grids; only `clip` reads it. Raises UserError
        where it is missing, of another shape, or no probabilities.
        """
        if self.kind != "clip":
            return self.table[:1].expand(images, 3)
        if probabilities_N8 is None and images == 0:
            return self.table[:0]
        if probabilities_N8 is None:
            raise UserError("guidance clip needs the modality probabilities of every image; give probabilities")
        given = torch.as_tensor(probabilities_N8).detach().to(self.table)
        if given.shape != (images, len(MODALITIES)):
            raise UserError(
                f"probabilities have shape {tuple(given.shape)} for {images} images; give one row of "
                f"{len(MODALITIES)} for each image (per_image spreads rows of samples)"
            )
        sums = given.sum(dim=1)
        if not ((given >= 0).all() and ((sums - 1).abs() < 1e-3).all()):
            raise UserError(
                f"rows of modality probabilities must be 0 or more and sum to 1; their sums: {sums.tolist()}"
            )
        return given @ self.table


def per_image(probabilities_B8: Tensor, images: Sequence[int]) -> Tensor:
    """Return (N, 8): each sample's row once for each of its images; `images` counts those of every sample."""
    return torch.repeat_interleave(probabilities_B8, torch.tensor(images, device=probabilities_B8.device), dim=0)


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
    """Return `position_ids` (3, B, L) and rope deltas (B, 1) by the rule of this module.

    Whole numbers of `none` and of `fixed` with whole intervals; float32 otherwise, with gradient to a learnable table
    (none to the deltas, which serve decoding alone). Padding is 0.

    Args:
        config: the model's configuration; of one of `FAMILIES`.
        input_ids, attention_mask: (B, L).
        image_grid_thw: (N, 3), patches in time, rows and columns of every image, in the order of the sequences.
        probabilities: (N, 8), of `clip`; see `Guidance.intervals`.
        mm_token_type_ids: (B, L), 0 text, 1 image, 2 video; by default from the configuration's placeholder tokens.
        video_grid_thw, second_per_grid_ts: as upstream has them; `clip` takes no videos.

    Raises:
        UserError: for another model family, placeholders that the grids do not fill, wrong probabilities, or a video
            under `clip`.
    """
    if config.model_type not in FAMILIES:
        raise UserError(f"guided positions are for {', '.join(FAMILIES)}, not for {config.model_type!r}")
    if video_grid_thw is not None and guidance.kind == "clip":
        raise UserError("guidance clip knows images alone; leave videos out, or choose fixed or none")
    if mm_token_type_ids is None:
        image, video = input_ids == config.image_token_id, input_ids == config.video_token_id
        mm_token_type_ids = image.long() + 2 * video.long()
    merge = config.vision_config.spatial_merge_size
    images = [] if image_grid_thw is None else image_grid_thw.tolist()
    stills = [(t, h // merge, w // merge, 1.0) for t, h, w in images]
    videos = _videos(config, merge, video_grid_thw, second_per_grid_ts)
    table_N3 = guidance.intervals(len(stills), probabilities)
    # Float32 holds whole numbers to 16 million; float64 would shut out some devices.
    rows_N3 = list(table_N3.to(device=input_ids.device, dtype=torch.float32))
    supply = {1: iter(zip(stills, rows_N3, strict=True)), 2: ((grid, guidance.table[0]) for grid in videos)}

    length = input_ids.shape[1]
    valid_BL = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    placed, deltas = [], []
    for valid_L, types_L in zip(valid_BL, mm_token_type_ids, strict=True):
        row_3L = _sequence(types_L[valid_L].tolist(), supply, input_ids.device)
        full_3L = row_3L.new_zeros(3, length)
        # index_copy, not an assignment in place: a table that learns sits behind these numbers.
        placed.append(full_3L.index_copy(1, valid_L.nonzero().squeeze(1), row_3L))
        deltas.append((row_3L.detach().amax() if row_3L.shape[1] else row_3L.new_tensor(-1.0)) + 1 - row_3L.shape[1])
    for kind, name in ((1, "image"), (2, "video")):
        if next(supply[kind], None) is not None:
            raise UserError(f"there are more {name}s than {name} placeholders in the text; give one for each {name}")
    found, delta_B1 = torch.stack(placed, dim=1), torch.stack(deltas).unsqueeze(1)
    if guidance.kind == "clip" or not bool((guidance.table[0] == guidance.table[0].round()).all()):
        return found, delta_B1
    return found.to(input_ids.dtype), delta_B1.to(input_ids.dtype)


def _videos(config: Any, merge: int, grids: Tensor | None, seconds: Iterable[float] | None) -> list[tuple]:
    """Return (frames, rows, columns, interval) of every video; of Qwen3-VL of every frame: its frames stand alone."""
    if grids is None:
        return []
    sizes = [(t, h // merge, w // merge) for t, h, w in grids.tolist()]
    if config.model_type == "qwen3_vl":
        return [(1, h, w, 1.0) for t, h, w in sizes for _ in range(t)]
    if config.model_type == "qwen2_vl":
        return [(t, h, w, 1.0) for t, h, w in sizes]
    each = [1.0] * len(sizes) if seconds is None else [float(second) for second in seconds]
    rate = config.vision_config.tokens_per_second
    return [(t, h, w, rate * second) for (t, h, w), second in zip(sizes, each, strict=True)]


def _sequence(types: list[int], supply: dict[int, Any], device: torch.device) -> Tensor:
    """Return (3, tokens) of one sequence without padding."""
    last = torch.tensor(-1.0, device=device)  # the greatest coordinate so far that others are counted from
    before, gap = None, last.new_ones(())
    parts = [last.new_zeros(3, 0)]
    for kind, run in itertools.groupby(types):
        left = len(list(run))
        if kind == 0:
            start = last + (gap if before in (1, 2) else 1)
            parts.append((start + torch.arange(left, device=device)).expand(3, left))
            last, before = start + left - 1, 0
            continue
        while left > 0:
            grid, interval_3 = next(supply[kind], (None, None))
            name = "image" if kind == 1 else "video"
            if grid is None or interval_3 is None:
                raise UserError(f"there are more {name} placeholders in the text than {name}s; give one for each")
            frames, rows, columns, tick = grid
            left -= frames * rows * columns
            if left < 0:
                raise UserError(
                    f"{left + frames * rows * columns} {name} placeholder tokens stand where the {name} has "
                    f"{frames} x {rows} x {columns} after merging; write one for each of these"
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
    """The tie between one model and its guidance: remove it, or leave the `with` block, and the model is as before.

    `probabilities` (N, 8) belong to the images of the next call; set them before each `generate` or forward of `clip`.
    """

    def __init__(self, inner: Any, guidance: Guidance, probabilities: Tensor | None = None) -> None:
        self.guidance, self.probabilities, self._inner = guidance, probabilities, inner

        def get_rope_index(model: Any, input_ids: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
            known = {name: inputs.get(name) for name in _INPUTS}
            return positions(model.config, self.guidance, input_ids, probabilities=self.probabilities, **known)

        inner.get_rope_index = MethodType(get_rope_index, inner)
        if guidance.learnable:
            rotary = inner.language_model.rotary_emb
            # Upstream's own function, less the `torch.no_grad` around it, so that angles lead back to the table.
            rotary.forward = MethodType(type(rotary).forward.__wrapped__, rotary)

    def remove(self) -> None:
        self._inner.__dict__.pop("get_rope_index", None)
        self._inner.language_model.rotary_emb.__dict__.pop("forward", None)
        self._inner.rope_deltas = None  # left over from another rule

    def __enter__(self) -> RopePatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(model: nn.Module, guidance: Guidance, probabilities: Tensor | None = None) -> RopePatch:
    """Let a Qwen-VL model (or a peft model around one) count positions by `guidance`, in forward and in `generate`.

    Only this instance changes: its `get_rope_index`, and with a learnable table the `forward` of its text rotation,
    which upstream computes without gradient. Neither weights nor what is saved change; the table is the guidance's own
    and goes to the optimizer from there. Given `position_ids`, the model uses those. Gradient checkpointing must be
    the non-reentrant kind (transformers' default).

    Raises UserError where the model is none of `FAMILIES` or has guidance already.
    """
    for inner in model.modules():
        if hasattr(type(inner), "get_rope_index") and inner.config.model_type in FAMILIES:  # type: ignore
            if "get_rope_index" in inner.__dict__:
                raise UserError("the model has guided positions already; remove those first")
            return RopePatch(inner, guidance, probabilities)
    raise UserError(f"{type(model).__name__} has no positions to guide; give a model of {', '.join(FAMILIES)}")
