"""Similarity of texts, by shared words or by a sentence embedder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from preceptor.errors import UserError
from preceptor.grounding.selection import Similarity, word_overlap


def choose_similarity(name: str | None, *, allow_downloads: bool = False) -> Similarity:
    """Return `word_overlap`, or the cosine similarity of a sentence embedder.

    `name` is a folder, ``package:NAME/FOLDER`` or hub name of a transformers text encoder. The embedding of a sentence
    is the mean of its tokens, as in the sentence-transformers family. Negative cosines count as 0.

    Raises:
        UserError: the model does not exist.
    """
    if name is None:
        return word_overlap
    from preceptor.hub import find_pretrained, hide_progress_bars

    folder = find_pretrained(name, allow_downloads=allow_downloads)
    if folder is None:
        raise UserError(
            f"method.similarity={name} is not a folder, an installed package or in the hub cache; remove it "
            "to compare answers by their words"
        )
    import torch
    from transformers import AutoModel, AutoTokenizer

    with hide_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def similarity(texts: Sequence[str]) -> np.ndarray:
        # Embed distinct texts, so that equal texts have a similarity of exactly 1 regardless of padding.
        distinct = list(dict.fromkeys(texts))
        batch = tokenizer(distinct, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        embeddings = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1), dim=-1)
        cosines = (embeddings @ embeddings.T).clamp(0, 1).fill_diagonal_(1).numpy()
        indices = [distinct.index(text) for text in texts]
        return cosines[np.ix_(indices, indices)]

    return similarity
