"""ClinKD: a vision-language model learns from answers, from a teacher, and its corrected mistakes (Ge et al. 2025).

    answers      cross-entropy of the answers' tokens
    teacher      KL(teacher || student) of each token, at a temperature; both: (alpha KL + CE) / (1 + alpha)
    corrections  cross-entropy of the true answers to questions that the student failed, in place of a few others

The training has two phases. In the first one the answers are the teacher's (pseudo-labels), easy ones first; in the
second one they are the data set's, and rounds of reflection correct the student's mistakes. Where the paper and the
published code leave something open or differ, there is a setting (docs/paper_index.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from preceptor.config import Folder, Section
from preceptor.grounding.settings import GuidanceConfig, PseudoLabelConfig, ReflectionConfig, SelectionConfig

if TYPE_CHECKING:
    from preceptor.grounding.model import GroundedVlm
    from preceptor.grounding.task import ClinkdTask, Collate, Reflect
    from preceptor.task import Teacher


class ClinkdConfig(Section):
    """ClinKD (Ge et al. 2025): guided positions, pseudo-labels, reflection, selection."""

    name: Literal["clinkd"] = "clinkd"
    """The method, or `module:Class` of your own one, a subclass of this class."""
    guidance: GuidanceConfig = GuidanceConfig()
    pseudo_labels: PseudoLabelConfig = PseudoLabelConfig()
    reflection: ReflectionConfig = ReflectionConfig()
    selection: SelectionConfig = SelectionConfig()
    similarity: Folder | None = None
    """Sentence embedder (folder, `package:NAME/FOLDER` or hub name) that compares answers; default: the overlap of
    their words."""
    teaching_run: Folder | None = None
    """A trained run or a checkpoint that is the teacher, instead of this recipe's teacher stage."""
    teacher_offload: Literal["none", "cpu"] = "none"
    """cpu: keep the teacher's weights in CPU memory and move them to the GPU only while the teacher runs."""

    def needs_teacher(self, stage: str) -> bool:
        """Return whether a stage needs a teacher: for pseudo-labels, their token distributions, or corrections."""
        method = self.for_stage(stage)
        labels = method.pseudo_labels
        answers = labels.share > 0 and (labels.store is None or labels.logits != "none")
        return answers or method.reflection.needs_teacher

    def for_stage(self, stage: str) -> Self:
        """Return the settings of a stage. Each stage adds one part of the method to the one before."""
        method = self.model_copy(deep=True)
        if stage in ("teacher", "baseline"):
            method.guidance.kind = "none"
        if stage not in ("distilled", "clinkd"):
            method.pseudo_labels.share = 0.0
        if stage != "clinkd":
            method.reflection.rounds = 0
        return method

    def resume_settings(self) -> dict[str, Any]:
        """Return the settings that must not change when a phase is resumed, those of the parts that it has.

        A fingerprint identifies the teacher, and the phase's rows say which of its answers are used.
        """
        exclude: Any = {"teaching_run": True, "teacher_offload": True, "selection": True}
        exclude["pseudo_labels"] = {"store", "min_usable"}
        settings = self.model_dump(mode="json", exclude=exclude)
        if self.guidance.kind == "none":
            settings["guidance"] = {"kind": "none"}
        if self.pseudo_labels.share == 0:
            settings["pseudo_labels"] = {"share": 0.0}
        if self.reflection.rounds == 0:
            settings |= {"reflection": {"rounds": 0}, "similarity": None}
        return settings

    def build_task(
        self,
        student: GroundedVlm,
        *,
        pseudo_labels: bool = False,
        teacher: Teacher | None = None,
        reflect: Reflect | None = None,
        collate: Collate | None = None,
        seed: int = 0,
    ) -> ClinkdTask:
        """Return the training task of one phase of a stage, on pseudo-labels or on the data set's answers.

        Call it on the settings of the stage, ``method.for_stage(stage)``. The arguments are those of `ClinkdTask`.
        """
        from preceptor.grounding.task import ClinkdTask

        task = ClinkdTask(
            student,
            self.pseudo_labels,
            self.reflection,
            on_pseudo_labels=pseudo_labels,
            teacher=teacher,
            reflect=reflect,
            collate=collate,
            seed=seed,
        )
        if student.guidance.learnable:
            task.learning_rates = {"student.guidance.log_table": self.guidance.learning_rate}
        return task
