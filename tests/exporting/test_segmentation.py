from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import preceptor
from preceptor.data.volumes import to_labels, to_regions
from preceptor.exporting.segmentation import WindowNetwork, label_table, stand_alone_intensity
from preceptor.segmentation import intensity
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from preceptor.segmentation.sliding_window import predict_subsets
from preceptor.segmentation.subsets import all_subsets
from tests.command_line import call
from tests.exporting.conftest import Exported, export, save_segmentation, unsettle

ALL_CASES = """
import json, sys, numpy as np, run_onnx
plain, cases = run_onnx.probabilities, json.load(open(sys.argv[1]))
for number, files in enumerate(cases):
    def recorded(*arguments):
        found["p"] = plain(*arguments)
        return found["p"]
    found = {}
    run_onnx.probabilities = recorded
    label, image = run_onnx.segment(files)
    np.savez(f"{sys.argv[2]}/{number}.npz", label=label, p=found["p"])
print("[]")
"""


def write_case(folder: Path, modalities: tuple[str, ...], shape: tuple[int, int, int], affine=None, **header) -> dict:
    """Write a bright ellipsoid in a dark background with another contrast per modality; return the files."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*[np.linspace(-1.1, 1.1, n) for n in shape], indexing="ij")
    inside = sum(axis**2 for axis in axes) < 1
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, name in enumerate(modalities):
        voxels = inside * (200 + 100 * number * axes[0] + 30 * rng.standard_normal(shape))
        image = nibabel.Nifti1Image(voxels.clip(0).astype(np.int16), np.eye(4) if affine is None else affine)
        image.header.set_xyzt_units("mm")
        image.set_qform(image.affine, header.get("qform_code", 1))
        image.set_sform(image.affine, header.get("sform_code", 0))
        files[name] = folder / f"case_{name}.nii.gz"
        nibabel.save(image, files[name])
    return files


def compare(exported: Exported, cases: list[dict[str, Path]], scratch: Path) -> tuple[float, int]:
    """Return the largest difference of a probability, and the number of voxels with another label."""
    (scratch / "cases.json").write_text(json.dumps([{k: str(v) for k, v in files.items()} for files in cases]))
    (scratch / "found").mkdir()
    exported.compute(ALL_CASES, scratch / "cases.json", scratch / "found")
    model = preceptor.load(exported.model)
    difference, voxels = 0.0, 0
    for number, files in enumerate(cases):
        expected = model.segment(files)
        found = np.load(scratch / "found" / f"{number}.npz")
        box = intensity.bounding_box((expected.probabilities != 0).any(axis=0))
        assert found["p"].shape == expected.probabilities[(slice(None), *box)].shape
        difference = max(difference, float(np.abs(found["p"] - expected.probabilities[(slice(None), *box)]).max()))
        voxels += int((found["label"] != expected.mask).sum())
    return difference, voxels


def test_the_runner_segments_what_predict_segments(segmentation, tmp_path):
    affine = np.array([[0, -1.2, 0, 30], [-1, 0, 0, 20], [0, 0, 2.5, -10], [0, 0, 0, 1.0]])
    files = write_case(tmp_path, ("flair", "t2"), (25, 40, 21), affine, sform_code=4)
    pairs = [f"{name}={path}" for name, path in files.items()]
    code, _, _ = call("predict", segmentation.model, *pairs, "--output", tmp_path / "ours", "--json")
    assert code == 0
    result = segmentation.run(tmp_path / "mask.nii.gz", *pairs)
    assert result.returncode == 0, result.stderr
    ours, found = nibabel.load(tmp_path / "ours" / "case_flair_seg.nii.gz"), nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(ours.dataobj))
    assert len(np.unique(np.asarray(found.dataobj))) > 1
    np.testing.assert_array_equal(found.affine, ours.affine)
    for name in ("sform_code", "qform_code", "xyzt_units", "datatype"):
        assert found.header[name] == ours.header[name], name
    volumes = preceptor.load(segmentation.model).segment(files).volumes_ml
    assert result.stdout.split(", ", 1)[1].strip() == ", ".join(f"{k}_ml {v:.2f}" for k, v in volumes.items())
    assert segmentation.run(code="import torch").returncode == 1


def test_every_subset_of_the_modalities_and_cases_of_any_size(segmentation, tmp_path):
    all_files = write_case(tmp_path / "a", ("flair", "t1", "t2"), (33, 20, 24))
    cases = [{name: all_files[name] for name, there in zip(all_files, s, strict=True) if there} for s in all_subsets(3)]
    cases += [write_case(tmp_path / "small", ("t1",), (9, 40, 12)), write_case(tmp_path / "one", ("t2",), (16, 24, 16))]
    difference, voxels = compare(segmentation, cases, tmp_path)
    assert difference < 1e-5
    assert voxels == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"preparation": {"spacing": [2.0, 1.5, 1.0], "intensity": "zscore"}},
        {"inference": {"overlap": 0.3, "mode": "constant"}, "preparation": {"patch_size": [12, 16, 8]}},
    ],
    ids=["resampled", "constant"],
)
def test_other_settings_of_preparation_and_inference(changes, tmp_path):
    model = save_segmentation(tmp_path / "model", ("flair", "t1"), (16, 16, 16), **changes)
    exported = export(model, tmp_path / "onnx")
    affine = np.diag([0.8, 1.1, 3.0, 1])
    difference, voxels = compare(exported, [write_case(tmp_path, ("flair", "t1"), (30, 26, 17), affine)], tmp_path)
    assert difference < 1e-4
    assert voxels <= 2


def test_regions_that_exclude_each_other(tmp_path):
    regions = {"wt": [1], "tc": [2], "et": [3]}
    model = save_segmentation(tmp_path / "model", ("flair", "t1"), (16, 16, 16), regions=regions)
    exported = export(model, tmp_path / "onnx")
    files = write_case(tmp_path, ("flair", "t1"), (30, 26, 17))
    difference, voxels = compare(exported, [files], tmp_path)
    assert difference < 1e-4
    assert voxels <= 2
    found = preceptor.load(model).segment(files)
    several = (found.probabilities >= 0.5).sum(0) > 1
    assert several.sum() > 100
    np.testing.assert_array_equal(found.mask[several], found.probabilities.argmax(0)[several] + 1)


def test_the_runner_refuses_what_preceptor_refuses(segmentation, tmp_path):
    files = write_case(tmp_path / "a", ("flair",), (20, 20, 20))
    other = write_case(tmp_path / "b", ("t1",), (20, 20, 21))
    result = segmentation.run(tmp_path / "m.nii.gz", f"flair={files['flair']}", f"t1={other['t1']}")
    assert (result.returncode, result.stderr) == (2, "the files are not on one grid; resample them\n")
    result = segmentation.run(tmp_path / "m.nii.gz", f"pet={files['flair']}")
    assert result.stderr == "pet was given; the modalities are flair, t1, t2\n"
    nan = np.zeros((20, 20, 20), np.float32)
    nan[3, 3, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(nan, np.eye(4)), tmp_path / "nan.nii.gz")
    assert "finite" in segmentation.run(tmp_path / "m.nii.gz", f"flair={tmp_path / 'nan.nii.gz'}").stderr
    assert segmentation.run(tmp_path / "m.nii.gz").stderr.startswith("Segment a case")
    assert not (tmp_path / "m.nii.gz").exists()


def test_a_mistake_at_the_runner_is_one_sentence_before_anything_is_computed(segmentation, tmp_path):
    files = write_case(tmp_path / "a", ("flair", "t1"), (20, 20, 20))
    flair, t1, output = f"flair={files['flair']}", f"t1={files['t1']}", tmp_path / "m.nii.gz"
    (tmp_path / "cut.nii.gz").write_bytes(files["t1"].read_bytes()[:500])
    (tmp_path / "text.nii.gz").write_text("no image")
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "link.nii.gz").symlink_to("nowhere")
    for arguments, says in (
        ((output, f"t1={tmp_path / 'none.nii.gz'}"), "none.nii.gz: not a readable NIfTI file"),
        ((output, f"t1={tmp_path / 'cut.nii.gz'}"), "cut.nii.gz: not a readable NIfTI file"),
        ((output, f"t1={tmp_path / 'text.nii.gz'}"), "text.nii.gz: not a readable NIfTI file"),
        ((tmp_path / "m.png", flair), "m.png cannot be written"),
        ((tmp_path / "none" / "m.nii.gz", flair), "m.nii.gz cannot be written"),
        ((output, flair, f"flair={files['t1']}"), "flair is given twice"),
        ((flair, t1), "is in the place of OUTPUT"),
        ((flair,), "is in the place of OUTPUT"),
        ((files["flair"], flair), "case_flair.nii.gz exists and is not overwritten"),
        ((f"{tmp_path}/a/../a/case_flair.nii.gz", flair, t1), "case_flair.nii.gz exists and is not overwritten"),
        ((files["flair"], t1), "case_flair.nii.gz exists and is not overwritten"),
        ((tmp_path / "folder.nii.gz", flair), "folder.nii.gz exists and is not overwritten"),
        ((tmp_path / "link.nii.gz", flair), "link.nii.gz exists and is not overwritten"),
        (("/proc/m.nii.gz", flair), "/proc/m.nii.gz cannot be written"),
        ((output, flair, "model.int9.onnx"), "neither MODALITY=FILE nor a model"),
        ((output, flair, "model.onnx", "model.onnx"), "neither MODALITY=FILE nor a model"),
        ((output, flair, "README.md"), "README.md is neither MODALITY=FILE nor a model"),
        ((output, flair, "model.json"), "model.json is neither MODALITY=FILE nor a model"),
        ((output, flair, "../onnx/model.onnx"), "../onnx/model.onnx is neither MODALITY=FILE nor a model"),
    ):
        before = files["flair"].read_bytes()
        result = segmentation.run(*arguments)
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        assert says in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert files["flair"].read_bytes() == before
    assert not output.exists()
    assert segmentation.run().returncode == 2


def test_the_runner_refuses_an_image_that_it_cannot_use_with_one_sentence(segmentation, tmp_path):
    voxels = np.arange(512).reshape(8, 8, 8).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "sound.nii")
    header = bytearray((tmp_path / "sound.nii").read_bytes())
    for name, place, data in (("type.nii", 70, b"\x99\x99"), ("singular.nii", 280, bytes(48))):
        (tmp_path / name).write_bytes(header[:place] + data + header[place + len(data) :])
    colour = np.zeros((8, 8, 8), [(name, np.uint8) for name in "RGB"])
    nibabel.save(nibabel.Nifti1Image(colour, np.eye(4)), tmp_path / "colour.nii")
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.complex64), np.eye(4)), tmp_path / "complex.nii")
    nibabel.save(nibabel.Nifti1Image(voxels[:0], np.eye(4)), tmp_path / "empty.nii")
    nibabel.save(nibabel.MGHImage(voxels, np.eye(4)), tmp_path / "other.mgz")
    for name, says in (
        ("type.nii", "not a readable NIfTI file"),
        ("singular.nii", "not a readable NIfTI file"),
        ("colour.nii", "voxels that are not real numbers"),
        ("complex.nii", "voxels that are not real numbers"),
        ("empty.nii", "not a 3-D image"),
        ("other.mgz", "another format"),
    ):
        result = segmentation.run(tmp_path / "m.nii.gz", f"t1={tmp_path / name}")
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        assert says in result.stderr
        assert "Traceback" not in result.stderr
    nibabel.save(nibabel.Nifti1Pair(voxels, np.eye(4)), tmp_path / "pair.img")
    nibabel.save(nibabel.Nifti2Image(voxels.astype(np.float64), np.eye(4)), tmp_path / "second.nii")
    for name in ("sound.nii", "pair.img", "second.nii"):
        result = segmentation.run(tmp_path / f"mask-{name[:4]}.nii.gz", f"t1={tmp_path / name}", "model.onnx")
        assert result.returncode == 0, result.stderr


def test_an_output_whose_name_is_not_valid_utf_8_is_written_and_printed(segmentation, tmp_path):
    files = write_case(tmp_path, ("t1",), (20, 20, 20))
    output = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.nii.gz")
    result = segmentation.run(output, f"t1={files['t1']}")
    assert (result.returncode, result.stderr) == (0, "")
    assert "m\\udcff.nii.gz, wt_ml" in result.stdout
    assert os.path.exists(output)


def test_a_full_disk_at_the_end_is_one_sentence_and_leaves_no_file(segmentation, tmp_path):
    files = write_case(tmp_path, ("t1",), (20, 20, 20))
    code = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
    result = segmentation.run(segmentation.folder / "run_onnx.py", tmp_path / "m.nii", f"t1={files['t1']}", code=code)
    assert (result.returncode, result.stdout) == (2, "")
    assert "m.nii cannot be written to its end (File too large)" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "m.nii").exists()


@pytest.mark.parametrize(
    "network",
    [
        {},
        {"fill": "bottleneck"},
        {"encoder": "separate", "fill": "bottleneck"},
        {"norm_per_modality": True, "fill": "bottleneck"},
        {"net": "early"},
    ],
    ids=lambda network: "-".join(map(str, network.values())) or "default",
)
def test_the_network_without_branches_computes_the_same(network, monkeypatch):
    model = MultimodalUNet(MultimodalUNetConfig(("flair", "t1", "t2"), ("wt",), channels=(4, 6, 8), **network), seed=0)
    unsettle(model)
    window = (8, 16, 8)
    images = torch.randn(3, *window, generator=torch.Generator().manual_seed(0))
    expected = predict_subsets(model.eval(), images, (True, True, True), window)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    for subset, probabilities in expected.items():
        available = torch.tensor(subset)
        read = torch.where(available[:, None, None, None], images, torch.nan)
        with torch.no_grad():
            found = WindowNetwork(model, window)(read, available)
        torch.testing.assert_close(found, probabilities, atol=1e-5, rtol=0)


def test_the_table_of_labels_is_that_of_the_library():
    regions = {"wt": (1, 2, 4), "tc": (1, 4), "et": (4,), "edema": (2,)}
    table = np.array(label_table(regions))
    masks = np.random.default_rng(0).random((4, 6, 7, 8)) < 0.5
    index = (masks << np.arange(4)[:, None, None, None]).sum(0)
    np.testing.assert_array_equal(table[index], to_labels(masks, regions))
    label = np.random.default_rng(1).choice([0, 1, 2, 4], (5, 5, 5))
    index = (to_regions(label, regions) << np.arange(4)[:, None, None, None]).sum(0)
    np.testing.assert_array_equal(table[index], label)


def test_the_copy_of_the_normalisation_needs_nothing_of_preceptor(tmp_path):
    (tmp_path / "intensity.py").write_text(stand_alone_intensity())
    copy = runpy.run_path(str(tmp_path / "intensity.py"))
    image = np.random.default_rng(0).integers(0, 900, (20, 20, 20)).astype(np.float32)
    for kind in ("zscore", "percentile"):
        np.testing.assert_array_equal(copy["normalise"](image, kind), intensity.normalise(image, kind))
    with pytest.raises(SystemExit, match="intensity 'z' is not known; known: zscore"):
        copy["normalise"](image, "z")


@pytest.mark.real_data
@pytest.mark.slow
def test_one_hundred_cubes_of_brats_with_every_combination_of_contrasts(tmp_path):
    modalities = ("flair", "t1", "t1ce", "t2")
    model = save_segmentation(tmp_path / "model", modalities, (16, 16, 16))
    exported = export(model, tmp_path / "onnx", int8=True)
    folders = sorted(path for path in (Path(os.environ["PRECEPTOR_DATA"]) / "brats20_cubes").iterdir() if path.is_dir())
    patterns = all_subsets(4)
    cases = [
        {
            m: folder / f"{folder.name}_{m}.nii.gz"
            for m, there in zip(modalities, patterns[n % 15], strict=True)
            if there
        }
        for n, folder in enumerate(folders[:100])
    ]
    assert len(cases) == 100
    difference, voxels = compare(exported, cases, tmp_path)
    print(f"largest difference {difference:.2g}, {voxels} voxels, int8 {exported.settings['int8']}")
    assert difference < 1e-4
    assert voxels <= 10  # of 3.3 million; their probability is 0.5 to five digits
