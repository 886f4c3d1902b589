"""Word embeddings that a student takes over from its teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.errors import UserError
from preceptor.vqa.bundle import build_bundle, make_tokenizer
from preceptor.vqa.config import ModelConfig
from preceptor.vqa.dataset import Preprocessing
from preceptor.vqa.token_embeddings import inherit_words, principal_words


def test_principal_words_are_those_of_a_peer_library():
    from sklearn.decomposition import PCA

    words = np.random.default_rng(0).normal(size=(60, 12)) @ np.diag(np.linspace(3, 0.2, 12))
    want = PCA(5, svd_solver="full").fit_transform(words)
    found = principal_words(torch.from_numpy(words), 5, 0.02).numpy()
    assert found.std() == pytest.approx(0.02, rel=1e-2)
    signs = np.sign((found * want).sum(0))
    np.testing.assert_allclose(found, want * signs * (found.std() / want.std()), atol=1e-6)


def test_all_components_keep_every_distance():
    words = torch.randn(30, 6, generator=torch.Generator().manual_seed(2))
    found = principal_words(words, 6, 1.0)
    ratio = torch.pdist(found) / torch.pdist(words)
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4)


def test_a_student_of_the_same_tokens_takes_them_over():
    tokenizer = make_tokenizer(["is there a lesion in the left lung?"] * 2)
    small = {
        "vision": {"conv": {"channels": [8], "blocks": [1], "token_stages": [0]}},
        "width": 16,
        "heads": 2,
        "text": {"scratch": {"embedding": 8, "width": 16, "layers": 1, "heads": 2}},
    }
    student = build_bundle(
        ModelConfig.model_validate(small), tokenizer, Preprocessing(32), AnswerVocabulary(["yes"]), seed=0
    ).model
    own = student.text.get_input_embeddings().weight
    before, spread = own.detach().clone(), float(own.detach().std())
    words = torch.randn(len(own), 24)
    inherit_words(student, words)
    assert torch.equal(own, principal_words(words, 8, spread))
    assert not torch.allclose(own, before, atol=1e-3)
    with pytest.raises(UserError, match=r"method\.inherit_words"):
        inherit_words(student, words[1:])
    with pytest.raises(UserError, match="no more dimensions"):
        inherit_words(student, words[:, :4])
