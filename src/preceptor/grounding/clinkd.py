"""ClinKD: a vision-language model learns from answers, from a teacher's, and from its own mistakes (Ge et al. 2025).

    answers      cross-entropy of the answers' tokens
    teacher      KL(teacher || student) of each token, at a temperature; both: (alpha KL + CE) / (1 + alpha)
    corrections  cross-entropy of corrected answers, which take the place of a share of the batch

The training has two parts. In the first, the prior, the answers are the teacher's own (pseudo-labels), easy ones first;
in the second they are the data's, and rounds of reflection correct what the student gets wrong. What paper and
published code leave open or do differently is a setting (docs/paper_index.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from preceptor.distill.chunked_kl import chunked_cross_entropy, distillation_loss
from preceptor.distributed import broadcast_from_main
from preceptor.grounding.config import ClinkdConfig
from preceptor.grounding.curriculum import Curriculum
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.reflection import Correction, CorrectionBuffer
from preceptor.task import Batch, LossTerms, Task, Teacher
from preceptor.training.fsdp import summon_full_params
from preceptor.training.sampler import mix_seed

Collate = Callable[[list[Correction]], Batch]
Reflect = Callable[[int, CorrectionBuffer], None]


class ClinkdTask(Task):
    """A student, and what it learns from in one of the two parts of the training."""

    student: GroundedVlm

    def __init__(
        self,
        student: GroundedVlm,
        config: ClinkdConfig,
        *,
        prior: bool = False,
        teacher: Teacher | None = None,
        reflect: Reflect | None = None,
        lessons: Collate | None = None,
        seed: int = 0,
    ) -> None:
        """`prior`: batches hold a teacher's answers, with `confidence` and `margin`, which enter by the curriculum.

        `reflect(round, buffer)` is called `config.reflection.rounds` times, evenly over the training but for its
        beginning; `lessons` makes a batch of corrections.
        """
        super().__init__()
        self.student, self.config = student, config
        self.prior, self.seed = prior, seed
        self.progress = 0.0
        self._teacher = teacher
        self._reflect, self._lessons = reflect, lessons
        self.buffer = CorrectionBuffer(config.reflection.buffer)
        c = config.pseudo_labels.curriculum
        self.curriculum = Curriculum(c.begin, c.end, c.over, c.margin_weight, c.weigh)
        self._parts: tuple[Batch, list[tuple[str, Batch]]] | None = None

    def forward(self, batch: Batch) -> LossTerms:
        loss = LossTerms()
        for name, part in self._split(batch):
            states = self.student(part.tensors)
            words = self.student.lm_head_weight
            weights = self._weights(part)[states.rows]
            if self._teacher is not None and name == "answers":
                c = self.config.pseudo_labels
                signal = self._teacher.signal(part)
                assert signal.tokens is not None, "the teacher of a language model gives token distributions"
                both = distillation_loss(
                    states.hidden,
                    words,
                    states.targets,
                    signal.tokens,
                    alpha=c.alpha,
                    temperature=c.temperature,
                    t_squared=c.t_squared,
                    weights_T=weights,
                )
                loss.add("distilled", both.loss, 1.0, "tokens")
                # For the log: their gradient is in the sum.
                loss.add("answers", both.cross_entropy, 0.0, "tokens")
                loss.add("teacher", both.kl, 0.0, "tokens")
            else:
                alone = chunked_cross_entropy(states.hidden, words, states.targets, weights_T=weights)
                loss.add(name, alone, 1.0, "tokens")
        return loss

    def units(self, batch: Batch) -> dict[str, int]:
        parts = self._split(batch)
        tokens = sum(
            int(((part["labels"][:, 1:] >= 0) & (self._weights(part) > 0)[:, None]).sum()) for _, part in parts
        )
        return {"samples": sum(len(part) for _, part in parts), "tokens": tokens}

    def _weights(self, batch: Batch) -> Tensor:
        """Return (B,): what each dialogue weighs now."""
        if not self.prior:
            return torch.ones(len(batch), device=batch["labels"].device)
        return self.curriculum.weights(batch["confidence"], batch["margin"], self.progress)

    def _split(self, batch: Batch) -> list[tuple[str, Batch]]:
        """Return the batch, its last rows given up for corrections where there are any; the same until the next one."""
        if self._parts is not None and self._parts[0] is batch:
            return self._parts[1]
        count = min(round(self.config.reflection.ratio * len(batch)), len(batch) - 1)
        parts = [("answers", batch)]
        if self._lessons is not None and len(self.buffer) and count > 0:
            # By the rows themselves, so that each process and micro-batch draws its own, and a resumed run the same.
            own = int.from_bytes(batch.keys[0].encode()[:7], "big")
            drawn = torch.Generator().manual_seed(mix_seed(self.seed, round(self.progress * 1e9), own))
            kept = self.buffer.corrections
            chosen = [kept[int(i)] for i in torch.randint(len(kept), (count,), generator=drawn)]
            lessons = self._lessons(chosen).to(batch["labels"].device)
            parts = [("answers", first_rows(batch, len(batch) - count)), ("corrections", lessons)]
        self._parts = (batch, parts)
        return parts

    def on_interval(self, progress: float) -> None:
        self.progress = progress
        rounds = self.config.reflection.rounds if self._reflect is not None else 0
        while len(self.buffer.rounds) < rounds and progress >= (len(self.buffer.rounds) + 1) / (rounds + 1):
            assert self._reflect is not None
            training = self.student.training
            with summon_full_params(self):
                self._reflect(len(self.buffer.rounds), self.buffer)
            self.buffer = CorrectionBuffer.restore(broadcast_from_main(self.buffer.state()))
            self.student.train(training)

    def task_state(self) -> dict[str, Tensor]:
        if self._reflect is None:
            return {}
        return {"buffer": torch.tensor(list(self.buffer.state().encode()), dtype=torch.uint8)}

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        if "buffer" in state:
            self.buffer = CorrectionBuffer.restore(bytes(state["buffer"].tolist()).decode())


def first_rows(batch: Batch, count: int) -> Batch:
    """Return the first `count` dialogues of a batch, with their images."""
    images = int(batch["images"][:count].sum())
    found = {}
    for name, tensor in batch.tensors.items():
        if name in ("image_grid_thw", "modalities"):
            found[name] = tensor[:images]
        elif name == "pixel_values":
            found[name] = tensor[: int(batch["image_grid_thw"][:images].prod(dim=1).sum())]
        else:
            found[name] = tensor[:count]
    if images == 0:
        found = {name: value for name, value in found.items() if name not in ("pixel_values", "image_grid_thw")}
    return Batch(found, batch.ids[:count], batch.keys[:count])
