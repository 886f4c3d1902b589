"""The training task of grounded dialogue (ClinKD): token losses, pseudo-labels by curriculum, corrections."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from preceptor.distill.chunked_kl import chunked_cross_entropy, distillation_loss
from preceptor.distributed import broadcast_from_main
from preceptor.grounding.curriculum import Curriculum
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.reflection import Correction, CorrectionBuffer
from preceptor.grounding.settings import PseudoLabelConfig, ReflectionConfig
from preceptor.task import Batch, LossTerms, Task, Teacher
from preceptor.training.fsdp import summon_full_params
from preceptor.training.sampler import mix_seed

Collate = Callable[[list[Correction]], Batch]
Reflect = Callable[[int, CorrectionBuffer], None]


class ClinkdTask(Task):
    """A vision-language model and its loss in one of the two phases of the training.

    Args:
        student: the model to train.
        pseudo_labels: settings of the loss on pseudo-labels, and of their curriculum.
        reflection: settings of the rounds of reflection.
        on_pseudo_labels: the batches hold a teacher's answers, with `confidence` and `margin`, which enter by the
            curriculum.
        teacher: gives token distributions, for pseudo-labels.
        reflect: ``reflect(round, buffer)`` adds corrections to the buffer. It is called `reflection.rounds` times,
            evenly spaced over the training, not at its beginning.
        collate: makes a batch of corrections.
        seed: seed of the choice of corrections.
    """

    student: GroundedVlm

    def __init__(
        self,
        student: GroundedVlm,
        pseudo_labels: PseudoLabelConfig,
        reflection: ReflectionConfig,
        *,
        on_pseudo_labels: bool = False,
        teacher: Teacher | None = None,
        reflect: Reflect | None = None,
        collate: Collate | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student, self.config, self.reflection = student, pseudo_labels, reflection
        self.on_pseudo_labels, self.seed = on_pseudo_labels, seed
        self.progress = 0.0
        self._teacher = teacher
        self._reflect, self._collate = reflect, collate
        self.buffer = CorrectionBuffer(reflection.buffer)
        c = pseudo_labels.curriculum
        self.curriculum = Curriculum(c.begin, c.end, c.over, c.margin_weight, c.weigh)
        self._cached_split: tuple[Batch, list[tuple[str, Batch]]] | None = None

    def forward(self, batch: Batch) -> LossTerms:
        loss = LossTerms()
        for name, part in self._split(batch):
            states = self.student(part.tensors)
            lm_head = self.student.lm_head_weight
            weights = self._weights(part)[states.rows]
            if self._teacher is not None and name == "answers":
                c = self.config
                signal = self._teacher.signal(part)
                assert signal.tokens is not None, "the teacher of a language model gives token distributions"
                both = distillation_loss(
                    states.hidden,
                    lm_head,
                    states.targets,
                    signal.tokens,
                    alpha=c.alpha,
                    temperature=c.temperature,
                    t_squared=c.t_squared,
                    weights_T=weights,
                )
                loss.add("distilled", both.loss, 1.0, "tokens")
                # For the log only; their gradient is in "distilled".
                loss.add("answers", both.cross_entropy, 0.0, "tokens")
                loss.add("teacher", both.kl, 0.0, "tokens")
            else:
                total = chunked_cross_entropy(states.hidden, lm_head, states.targets, weights_T=weights)
                loss.add(name, total, 1.0, "tokens")
        return loss

    def units(self, batch: Batch) -> dict[str, int]:
        parts = self._split(batch)
        tokens = sum(
            int(((part["labels"][:, 1:] >= 0) & (self._weights(part) > 0)[:, None]).sum()) for _, part in parts
        )
        return {"samples": sum(len(part) for _, part in parts), "tokens": tokens}

    def _weights(self, batch: Batch) -> Tensor:
        """Return (B,): the current weight of each dialogue."""
        if not self.on_pseudo_labels:
            return torch.ones(len(batch), device=batch["labels"].device)
        return self.curriculum.weights(batch["confidence"], batch["margin"], self.progress)

    def _split(self, batch: Batch) -> list[tuple[str, Batch]]:
        """Return the batch, its last rows replaced by corrections if there are any. The same batch gives the same."""
        if self._cached_split is not None and self._cached_split[0] is batch:
            return self._cached_split[1]
        count = min(round(self.reflection.ratio * len(batch)), len(batch) - 1)
        parts = [("answers", batch)]
        if self._collate is not None and len(self.buffer) and count > 0:
            # Seeded by the rows, so that each process and micro-batch draws its own and a resumed run the same.
            rows = int.from_bytes(batch.keys[0].encode()[:7], "big")
            generator = torch.Generator().manual_seed(mix_seed(self.seed, round(self.progress * 1e9), rows))
            corrections = self.buffer.corrections
            chosen = [corrections[int(i)] for i in torch.randint(len(corrections), (count,), generator=generator)]
            corrected = self._collate(chosen).to(batch["labels"].device)
            parts = [("answers", batch.narrow(0, len(batch) - count)), ("corrections", corrected)]
        self._cached_split = (batch, parts)
        return parts

    def on_interval(self, progress: float) -> None:
        self.progress = progress
        rounds = self.reflection.rounds if self._reflect is not None else 0
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
