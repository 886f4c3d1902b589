"""Initial token embeddings of a student, from its teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from preceptor.errors import UserError
from preceptor.vqa.model import VqaTransformer


def principal_embeddings(embeddings_VE: Tensor, width: int, scale: float) -> Tensor:
    """Return token embeddings in `width` dimensions: the principal components of the teacher's.

    `embeddings_VE` has V tokens and E dimensions, `width` <= E. The result (V, width) has mean 0 and standard deviation
    `scale`. Of all projections to that width it preserves the distances between tokens best (Pearson 1901). The sign of
    a component makes its largest entry positive, so that the result does not depend on the library's solver.
    """
    assert 1 <= width <= embeddings_VE.shape[1], f"{width} components of {embeddings_VE.shape[1]} dimensions"
    centred = embeddings_VE.double() - embeddings_VE.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # in ascending order
    axes = vectors[:, -width:].flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    projected = centred @ (axes * largest.sign())
    return (projected * (scale / projected.std())).float()


@torch.no_grad()
def inherit_token_embeddings(student: VqaTransformer, embeddings_VE: Tensor) -> None:
    """Set the student's token embeddings to the `principal_embeddings` of the teacher's, with the spread they had.

    Raises UserError if the two models differ in their tokens, or the student's embedding is wider.
    """
    weight = student.text.get_input_embeddings().weight
    if weight.shape[0] != embeddings_VE.shape[0] or weight.shape[1] > embeddings_VE.shape[1]:
        raise UserError(
            f"method.inherit_token_embeddings: the student embeds {weight.shape[0]} tokens in {weight.shape[1]} "
            f"dimensions and the teacher {embeddings_VE.shape[0]} in {embeddings_VE.shape[1]}; both need the same "
            "tokens, and the student no more dimensions (student.model.text.scratch.embedding), or set "
            "method.inherit_token_embeddings=false"
        )
    weight.copy_(principal_embeddings(embeddings_VE, weight.shape[1], float(weight.std())))
