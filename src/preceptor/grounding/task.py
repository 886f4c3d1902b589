"""The training task of grounded dialogue (ClinKD): token losses, pseudo-labels by curriculum, corrections."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from preceptor.distill.chunked_kl import chunked_cross_entropy, distillation_loss
from preceptor.distributed import broadcast_from_main, processes
from preceptor.grounding.curriculum import Curriculum
from preceptor.grounding.dataset import DialogueBatch
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.reflection import Correction, CorrectionBuffer
from preceptor.grounding.settings import PseudoLabelConfig, ReflectionConfig
from preceptor.task import Batch, LossTerms, Task, Teacher
from preceptor.training.fsdp import summon_full_params

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
        seed: seed of the order of corrections.
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
        self._parts: dict[int, tuple[Batch, list[tuple[str, Batch]]]] = {}
        """The micro-batches of this step and their parts, by the `id` of the micro-batch: two may have equal rows."""
        self._rows = 0
        """Rows of this process so far."""
        self._order: list[Correction] | None = None
        """The corrections in the order in which this step uses them."""
        self._taken = 0
        """Number of corrections that all processes have taken in this step."""

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
        if self._collate is not None and len(self.buffer):
            # All steps log the same terms.
            for name in {"answers", "corrections"} - loss.sums.keys():
                loss.add(name, torch.zeros((), device=batch["labels"].device), 1.0, "tokens")
        return loss

    def units(self, batch: Batch) -> dict[str, int]:
        parts = self._split(batch)
        tokens = sum(
            int(((part["labels"][:, 1:] >= 0) & (self._weights(part) > 0)[:, None]).sum()) for _, part in parts
        )
        return {"samples": len(batch), "tokens": tokens}

    def _weights(self, batch: Batch) -> Tensor:
        """Return (B,): the current weight of each dialogue."""
        if not self.on_pseudo_labels:
            return torch.ones(len(batch), device=batch["labels"].device)
        return self.curriculum.weights(batch["confidence"], batch["margin"], self.progress)

    def _split(self, batch: Batch) -> list[tuple[str, Batch]]:
        """Return the parts of a micro-batch that are computed, by name of their loss.

        Pseudo-labels that have not entered are left out; if there are no others, the first one stays, with its weight
        0, because every process must run the model. Otherwise corrections replace the last rows, or all of them. The
        same batch object gives the same parts until the next step.
        """
        if id(batch) not in self._parts:
            parts = self._entered(batch) if self.on_pseudo_labels else self._with_corrections(batch)
            self._parts[id(batch)] = batch, parts  # as long as it is referred to, no other object has its id
        return self._parts[id(batch)][1]

    def _entered(self, batch: Batch) -> list[tuple[str, Batch]]:
        kept = self._weights(batch) > 0
        if not kept.any():
            kept[0] = True
        assert isinstance(batch, DialogueBatch)
        return [("answers", batch if kept.all() else batch.select(kept))]

    def _with_corrections(self, batch: Batch) -> list[tuple[str, Batch]]:
        if self._collate is None:
            return [("answers", batch)]
        # The fraction that does not fill a row is carried over to the next micro-batch.
        before = self._rows
        self._rows += len(batch)
        count = int(self.reflection.ratio * self._rows + 1e-9) - int(self.reflection.ratio * before + 1e-9)
        # Each process has its own of the next corrections, and all have equally many, because sharded processes must
        # run the model equally often: for the remaining rows, if there are any, and for the corrections.
        state = processes()
        count = min(count, (len(self.buffer) - self._taken) // state.num_processes)
        if count == 0:
            return [("answers", batch)]
        if self._order is None:
            self._order = self.buffer.order(self.seed)
        chosen = self._order[self._taken + state.process_index * count :][:count]
        self._taken += state.num_processes * count
        corrected = self._collate(chosen).to(batch["labels"].device)
        remaining = len(batch) - count
        answers = [("answers", batch.narrow(0, remaining))] if remaining else []
        return [*answers, ("corrections", corrected)]

    def on_interval(self, progress: float) -> None:
        self.progress = progress
        self._parts = {}
        rounds = self.reflection.rounds if self._reflect is not None else 0
        while len(self.buffer.rounds) < rounds and progress >= (len(self.buffer.rounds) + 1) / (rounds + 1):
            assert self._reflect is not None
            training = self.student.training
            with summon_full_params(self):
                self._reflect(len(self.buffer.rounds), self.buffer)
            self.buffer = CorrectionBuffer.restore(broadcast_from_main(self.buffer.state()))
            self.student.train(training)

    def after_step(self, step: int) -> None:
        if self._order is not None:
            self.buffer.use(self._order[: self._taken], self.reflection.uses)
        self._order, self._taken = None, 0

    def task_state(self) -> dict[str, Tensor]:
        if self._reflect is None:
            return {}
        buffer = torch.tensor(list(self.buffer.state().encode()), dtype=torch.uint8)
        return {"buffer": buffer, "rows": torch.tensor(self._rows)}

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        if "buffer" in state:
            self._rows = int(state["rows"])
            self.buffer = CorrectionBuffer.restore(bytes(state["buffer"].tolist()).decode())
