"""What a student takes over from its teacher before it learns."""

from __future__ import annotations

import torch
from torch import Tensor

from preceptor.errors import UserError
from preceptor.vqa.model import VqaTransformer


def principal_words(words_VE: Tensor, width: int, scale: float) -> Tensor:
    """Return the teacher's word embeddings in `width` dimensions: their principal components.

    `words_VE` (V words, E dimensions), `width` <= E; the result (V, width) has mean 0 and standard deviation `scale`.
    It is the projection of that width that keeps distances between words best (Pearson 1901), so words of one meaning
    start as neighbours. The sign of a component is that which makes its largest entry positive, so that the result
    does not depend on the library's solver.
    """
    assert 1 <= width <= words_VE.shape[1], f"{width} components of {words_VE.shape[1]} dimensions"
    centred = words_VE.double() - words_VE.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    axes = vectors[:, -width:].flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    projected = centred @ (axes * largest.sign())
    return (projected * (scale / projected.std())).float()


@torch.no_grad()
def inherit_words(student: VqaTransformer, words_VE: Tensor) -> None:
    """Start the student's word embeddings as `principal_words` of the teacher's, at the spread they had.

    Raises UserError where the two do not know the same tokens, or the student's embedding is the wider one.
    """
    own = student.text.get_input_embeddings().weight
    if own.shape[0] != words_VE.shape[0] or own.shape[1] > words_VE.shape[1]:
        raise UserError(
            f"method.inherit_words: the student embeds {own.shape[0]} tokens in {own.shape[1]} dimensions and the "
            f"teacher {words_VE.shape[0]} in {words_VE.shape[1]}; both need the same tokens, and the student no more "
            "dimensions (student.model.text.scratch.embedding), or set method.inherit_words=false"
        )
    own.copy_(principal_words(words_VE, own.shape[1], float(own.std())))
