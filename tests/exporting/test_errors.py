"""Every reason not to export is one sentence, and nothing is left behind."""

from __future__ import annotations

import importlib.util
import json

import pytest

import preceptor
from preceptor.exporting import onnx_files
from tests.command_line import call


@pytest.fixture
def refused(tmp_path):
    def check(model, *options: object) -> str:
        before = sorted(path.name for path in tmp_path.iterdir())
        code, out, err = call("export", model, "--output", tmp_path / "onnx", *options)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        return err

    return check


def with_config(folder, config: dict):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    return folder


def test_a_grounding_model(refused, tmp_path):
    model = with_config(tmp_path / "model", {"model_type": "qwen2_vl"})
    assert "a grounding model writes its answer token by token" in refused(model)


def test_a_class_of_the_users_is_named_and_not_imported(refused, tmp_path):
    vision = {"kind": "module", "module": "no_such_module:Patches"}
    model = with_config(tmp_path / "vqa", {"model_type": "preceptor-vqa", "vision": vision})
    assert "the class no_such_module:Patches is your own, which is not exported" in refused(model)
    model = with_config(tmp_path / "unet", {"model_type": "preceptor-multimodal-unet", "net": "no_such_module:Net"})
    assert "the class no_such_module:Net is your own, which is not exported" in refused(model)


def test_a_folder_that_exists(segmentation, tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "file").touch()
    code, _, err = call("export", segmentation.model, "--output", tmp_path / "onnx")
    assert code == 2
    assert "onnx already exists; choose another folder, or remove it" in err
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["file"]


def test_a_missing_package(refused, segmentation, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    message = refused(segmentation.model)
    assert "needs onnxscript, which is not installed: pip install 'preceptor[export]'" in message


def test_a_network_that_differs_from_torch(refused, segmentation, monkeypatch):
    monkeypatch.setattr(onnx_files, "TOLERANCE", 1e-12)
    assert "differs from torch by" in refused(segmentation.model)


def test_a_network_that_torch_cannot_express(refused, segmentation, monkeypatch):
    import torch

    def fail(*arguments, **options):
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    assert "cannot express this network in ONNX (no such operator)" in refused(segmentation.model)


def test_a_table_for_a_segmentation_model(refused, segmentation, tmp_path):
    (tmp_path / "table.csv").touch()
    assert "leave it out for a segmentation model with --to onnx" in refused(
        segmentation.model, "--table", tmp_path / "table.csv"
    )


def test_an_unknown_format(segmentation, tmp_path):
    with pytest.raises(preceptor.UserError, match="the format 'tf' is not known"):
        preceptor.export(segmentation.model, tmp_path / "tf", to="tf")
