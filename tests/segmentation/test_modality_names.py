"""A modality is known under all of its names, wherever a user gives it; two names of one modality are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.data.segmentation.modalities import find_modality, spelled_as
from preceptor.errors import UserError
from preceptor.segmentation.initial_weights import load_network
from preceptor.segmentation.lckd import LckdConfig
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from preceptor.segmentation.specialist_networks import SpecialistNetworks
from preceptor.segmentation.specialists import SpecialistsConfig
from preceptor.segmentation.teachers import PartialNetwork

OURS = ("t2f", "t1n", "t1c", "t2w")
USUAL = ("flair", "t1", "t1ce", "t2")


def network(*modalities: str) -> MultimodalUNet:
    return MultimodalUNet(MultimodalUNetConfig(modalities, ("whole",), channels=(2, 2, 4)), seed=0).eval()


def test_names() -> None:
    assert [find_modality(name, USUAL) for name in OURS] == list(USUAL)
    assert [find_modality(name, OURS) for name in USUAL] == list(OURS)
    assert find_modality("T1-Gd", ("t1", "t1ce")) == "t1ce"
    assert find_modality("T1", ("t1", "T1")) == "T1", "its own name first"
    assert find_modality("ct", USUAL) is None
    assert spelled_as(OURS, ["t1ce", "other", "T2"]) == ["t1c", "other", "t2w"]
    with pytest.raises(UserError, match="'t1c' and 'T1Gd' are the same modality; give one of them"):
        spelled_as(USUAL, ["t1c", "T1Gd"])


def test_networks_for_data_with_other_names(tmp_path: Path) -> None:
    network(*USUAL).save(tmp_path)
    assert load_network(tmp_path, OURS).config.modalities == OURS
    assert load_network(tmp_path, ("flair", "pet")).config.modalities == USUAL
    images, available = torch.rand(1, 4, 8, 8, 8), torch.ones(1, 4, dtype=torch.bool)
    partial = [PartialNetwork(network(*names), OURS)(images, available).logits for names in (("t1ce",), ("t1c",))]
    assert torch.equal(*partial)
    method = LckdConfig()
    assert isinstance(method.combine_teachers({"method.teaching_run": network("t1ce", "t1")}, OURS), PartialNetwork)
    assert isinstance(method.combine_teachers({"method.teaching_run": network(*USUAL)}, OURS), MultimodalUNet)


def test_settings_that_name_a_modality() -> None:
    LckdConfig.model_validate({"election": {"initial": "FLAIR"}}).check_modalities(OURS)
    with pytest.raises(ValueError, match="'pet' is not among"):
        LckdConfig.model_validate({"election": {"initial": "pet"}}).check_modalities(OURS)
    runs = dict.fromkeys(USUAL, "run")
    method = SpecialistsConfig.model_validate({"name": "specialists", "runs": runs})
    method.check_modalities(OURS)
    networks: dict[str, Any] = {f"method.runs.{name}": network(name) for name in USUAL}
    teacher = method.combine_teachers(networks, OURS)
    assert isinstance(teacher, SpecialistNetworks)
    images, alone = torch.rand(1, 4, 8, 8, 8), torch.tensor([[False, False, True, False]])
    found = teacher(images, alone, torch.ones_like(alone))
    expected = network("t1ce")(images[:, 2:3], torch.ones(1, 1, dtype=torch.bool)).logits
    torch.testing.assert_close(found, expected)
    twice = SpecialistsConfig.model_validate({"name": "specialists", "runs": {**runs, "t1c": "run"}})
    with pytest.raises(ValueError, match="'t1ce' and 't1c' are the same modality"):
        twice.check_modalities(OURS)
