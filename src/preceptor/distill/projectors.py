"""Maps from student layers to teacher layers, and projections between their widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from preceptor.errors import UserError, nearest


def layer_pairs(
    student_layers: int, teacher_layers: int, how: Literal["uniform", "last"] | Sequence[Sequence[int]]
) -> list[tuple[int, int]]:
    """Return (student layer, teacher layer) pairs, counted from 0.

    ``uniform`` maps student layer i to teacher layer round((i + 1) T / S) - 1, halves rounded up, so the last layer
    maps to the last (Patient KD's skip; TinyBERT's g(m) = m T / S). ``last`` maps the last layers one by one. A list
    gives the pairs themselves; a layer may occur in several. Raises UserError for another string, a repeated or
    malformed pair, and a pair outside the networks.
    """
    if how == "uniform":
        pairs = [
            (i, (2 * (i + 1) * teacher_layers + student_layers) // (2 * student_layers) - 1)
            for i in range(student_layers)
        ]
        return [(s, max(0, t)) for s, t in pairs]
    if how == "last":
        count = min(student_layers, teacher_layers)
        return [(student_layers - count + i, teacher_layers - count + i) for i in range(count)]
    if isinstance(how, str):
        raise UserError(f"unknown layer map {how!r}{nearest(how, ['uniform', 'last'])}")
    checked: list[tuple[int, int]] = []
    for pair in how:
        if len(pair) != 2:
            raise UserError(f"layer pair {list(pair)} has {len(pair)} numbers; give [student layer, teacher layer]")
        s, t = pair
        if not (0 <= s < student_layers and 0 <= t < teacher_layers):
            raise UserError(
                f"layer pair [{s}, {t}] is outside the networks: the student has layers 0 to {student_layers - 1}, the "
                f"teacher 0 to {teacher_layers - 1}"
            )
        if (s, t) in checked:
            raise UserError(f"layer pair [{s}, {t}] is listed twice; give it once and raise the term's weight instead")
        checked.append((s, t))
    if not checked:
        raise UserError("the list of layer pairs is empty; give [[student, teacher], ...], uniform or last")
    return checked


def projector(student_width: int, teacher_width: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear map from the student's width to the teacher's, with weights drawn from `generator`.

    Use one also if the widths are equal: two networks that were trained separately share no basis (FitNets, Romero et
    al. 2015).
    """
    # nn.Linear would draw from the global generator, and so change everything that is drawn after it.
    linear = torch.nn.utils.skip_init(nn.Linear, student_width, teacher_width)
    with torch.no_grad():
        linear.weight.normal_(0, student_width**-0.5, generator=generator)
        linear.bias.zero_()
    return linear
