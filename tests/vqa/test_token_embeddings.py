"""Token embeddings that a student inherits from its teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.errors import UserError
from preceptor.vqa.bundle import build_bundle, make_tokenizer
from preceptor.vqa.config import ModelConfig
from preceptor.vqa.dataset import Preprocessing
from preceptor.vqa.token_embeddings import inherit_token_embeddings, principal_embeddings


def test_principal_embeddings_equal_scikit_learns_pca():
    from sklearn.decomposition import PCA

    embeddings = np.random.default_rng(0).normal(size=(60, 12)) @ np.diag(np.linspace(3, 0.2, 12))
    want = PCA(5, svd_solver="full").fit_transform(embeddings)
    found = principal_embeddings(torch.from_numpy(embeddings), 5, 0.02).numpy()
    assert found.std() == pytest.approx(0.02, rel=1e-2)
    signs = np.sign((found * want).sum(0))
    np.testing.assert_allclose(found, want * signs * (found.std() / want.std()), atol=1e-6)


def test_all_components_keep_every_distance():
    embeddings = torch.randn(30, 6, generator=torch.Generator().manual_seed(2))
    found = principal_embeddings(embeddings, 6, 1.0)
    ratio = torch.pdist(found) / torch.pdist(embeddings)
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4)


def test_a_student_with_the_same_tokens_inherits_them():
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
    embeddings = torch.randn(len(own), 24)
    inherit_token_embeddings(student, embeddings)
    assert torch.equal(own, principal_embeddings(embeddings, 8, spread))
    assert not torch.allclose(own, before, atol=1e-3)
    with pytest.raises(UserError, match=r"method\.inherit_token_embeddings"):
        inherit_token_embeddings(student, embeddings[1:])
    with pytest.raises(UserError, match="no more dimensions"):
        inherit_token_embeddings(student, embeddings[:, :4])
