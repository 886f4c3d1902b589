"""MHKD-MVQA: hierarchical knowledge distillation for medical visual question answering (Wang et al., BIBM 2022).

The student learns the answers, and from its teacher the output and the intermediate layers of a shared image-text
space. The paper names these levels; no code and no layer map, weights or distances were published, so each of those is
a setting here (docs/paper_index.md). Terms, each the mean over samples:

    label      CE(y, s)  or BCE                                   the data set's answers
    output     T^2 KL(softmax(t/T) || softmax(s/T))               Hinton et al. 2015
    embedding  d(P s_image, t_image), d(P s_question, t_question) the shared space before fusion
    hidden     d(P s_l, t_m) for mapped fusion layers (l, m)      FitNets, TinyBERT
    attention  KL(a_t || a_s) for mapped fusion layers            TinyBERT, MiniLM
    relation   |sim(s) - sim(t)|^2 over the batch                 Tung and Mori 2019
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from preceptor.config import TermConfig
from preceptor.vqa.method import Layers, VqaMethod

if TYPE_CHECKING:
    from preceptor.distill.loss_term import LossTerm


class OutputTerm(TermConfig):
    weight: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Temperature T of both distributions; the term is scaled by T squared."""


class EmbeddingTerm(TermConfig):
    kind: Literal["mse", "cosine"] = "mse"
    """Distance of projected student and teacher tokens: MSE after layer normalization, or cosine."""


class HiddenTerm(TermConfig):
    kind: Literal["mse", "cosine"] = "mse"
    """Distance of projected student and teacher tokens: MSE after layer normalization, or cosine."""
    layers: Layers = "uniform"
    """Layer map: `uniform`, `last`, or pairs `[[student, teacher], ...]` counted from 0."""


class AttentionTerm(TermConfig):
    kind: Literal["kl", "mse"] = "kl"
    """Distance of attention maps: KL(teacher, student) per query, or MSE."""
    layers: Layers = "uniform"
    """Layer map: `uniform`, `last`, or pairs `[[student, teacher], ...]` counted from 0."""


class RelationTerm(TermConfig):
    pass


class MhkdConfig(VqaMethod):
    """MHKD-MVQA (Wang et al., BIBM 2022): the student learns from the teacher's output and intermediate layers."""

    name: Literal["mhkd"] = "mhkd"
    """The method, or `module:Class` of your own one."""
    output: OutputTerm = OutputTerm()
    embedding: EmbeddingTerm = EmbeddingTerm(weight=0.5)
    hidden: HiddenTerm = HiddenTerm(weight=0.5)
    attention: AttentionTerm = AttentionTerm(weight=0.1)
    relation: RelationTerm = RelationTerm(weight=0.0)

    def loss_terms(self, student_layers: int, teacher_layers: int) -> list[LossTerm]:
        from preceptor.distill.projectors import layer_pairs
        from preceptor.vqa.losses import AttentionLoss, FeatureLoss, OutputLoss, RelationLoss

        terms: list[LossTerm] = [self.label_loss()]
        if (o := self.output).weight:
            terms.append(OutputLoss(o, o.temperature))
        if (e := self.embedding).weight:
            for tokens in ("image", "question"):
                path = f"embed_{tokens}"
                terms.append(FeatureLoss(f"embedding/{tokens}", e, path, path, kind=e.kind, tokens=tokens, divisor=2))
        if (h := self.hidden).weight:
            pairs = layer_pairs(student_layers, teacher_layers, h.layers)
            for s, t in pairs:
                paths = f"fusion.{s}", f"fusion.{t}"
                terms.append(FeatureLoss(f"hidden/{s}-{t}", h, *paths, kind=h.kind, divisor=len(pairs)))
        if (a := self.attention).weight:
            pairs = layer_pairs(student_layers, teacher_layers, a.layers)
            for s, t in pairs:
                terms.append(AttentionLoss(f"attention/{s}-{t}", a, s, t, kind=a.kind, divisor=len(pairs)))
        if self.relation.weight:
            terms.append(RelationLoss(self.relation, student_layers - 1, teacher_layers - 1))
        return terms
