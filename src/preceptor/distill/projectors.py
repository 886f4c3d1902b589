"""Which layer learns from which, and the projections between widths. Projectors train with the student and are never
part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from preceptor.errors import UserError, nearest


def layer_pairs(
    student_layers: int, teacher_layers: int, how: Literal["uniform", "last"] | Sequence[Sequence[int]]
) -> list[tuple[int, int]]:
    """Return (student layer, teacher layer) pairs, counted from 0.

    ``uniform``: student layer i from teacher layer round((i + 1) T / S) - 1, halves rounded up, so the last learns from
    the last (Patient KD's skip; TinyBERT's g(m) = m T / S). ``last``: the last layers one by one. Or the pairs
    themselves; a layer may occur in several, a pair only once. Raises UserError for another word, a repeated or
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
    found: list[tuple[int, int]] = []
    for pair in how:
        if len(pair) != 2:
            raise UserError(f"layer pair {list(pair)} has {len(pair)} numbers; give [student layer, teacher layer]")
        s, t = pair
        if not (0 <= s < student_layers and 0 <= t < teacher_layers):
            raise UserError(
                f"layer pair [{s}, {t}] is outside the networks: the student has layers 0 to {student_layers - 1}, the "
                f"teacher 0 to {teacher_layers - 1}"
            )
        if (s, t) in found:
            raise UserError(f"layer pair [{s}, {t}] is listed twice; give it once and raise the term's weight instead")
        found.append((s, t))
    if not found:
        raise UserError("the list of layer pairs is empty; give [[student, teacher], ...], uniform or last")
    return found


class Projectors(nn.Module):
    """One linear map per pair, from the student's width to the teacher's, also where the widths are equal: two networks
    trained apart share no basis (FitNets, Romero et al. 2015). Weights come from `seed` alone."""

    def __init__(self, widths: Mapping[str, tuple[int, int]], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.maps = nn.ModuleDict()
        for name, (student, teacher) in widths.items():
            # nn.Linear would draw from the global generator, and so move whatever is drawn after it.
            linear = torch.nn.utils.skip_init(nn.Linear, student, teacher)
            with torch.no_grad():
                linear.weight.normal_(0, student**-0.5, generator=generator)
                linear.bias.zero_()
            self.maps[self._key(name)] = linear

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "/")  # a module's name may hold no dot

    def forward(self, name: str, x: Tensor) -> Tensor:
        """Project the student's tensor (..., student width) of pair `name`."""
        return self.maps[self._key(name)](x)
