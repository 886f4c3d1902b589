from __future__ import annotations

import contextlib
import gzip
import os
import struct
import tempfile
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from preceptor.data.nifti import VolumeError
from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.types import Case, SegmentationDataset, VolumeFile
from preceptor.data.volumes import (
    LoadedVolume,
    intensities,
    load_case,
    resampled,
    resize,
    save_mask,
    save_probabilities,
    to_labels,
    to_regions,
)
from preceptor.errors import UserError
from tests.data.volume_files import LPS, REGIONS, head, lesion, save

OBLIQUE = np.array([[0.0, 1.9, 0.3, 7], [-1.0, 0.1, 0, 5], [0.05, 0.2, 3.0, -9], [0, 0, 0, 1]])


def case(root: Path, **files: Path) -> Case:
    mask = files.pop("mask", None)
    return Case("c", {n: VolumeFile(p) for n, p in files.items()}, mask and VolumeFile(mask), "c", "train")


def data(regions=REGIONS) -> SegmentationDataset:
    return SegmentationDataset("brats", "x", Path(), [], modalities=("t1", "t2"), regions=regions)


@pytest.mark.parametrize("affine", [np.eye(4), LPS, OBLIQUE, np.diag([2.0, -1, -0.5, 1])[[1, 2, 0, 3]]])
def test_every_orientation_gives_the_same_axes_and_goes_back(tmp_path, affine):
    """The voxel furthest along right, front, head in space is the last one along W, H, D, and results go back."""
    shape = (5, 6, 7)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    for axis, name in enumerate(("right", "front", "head")):
        save(tmp_path / f"{name}.nii.gz", places[..., axis].astype(np.float32), affine)
    loaded = load_case(case(tmp_path, **{n: tmp_path / f"{n}.nii.gz" for n in ("right", "front", "head")}))
    for axis, name in enumerate(("head", "front", "right")):
        assert (np.diff(loaded.images[name], axis=axis) > 0).all()
    assert loaded.images["right"].dtype == np.float32
    assert loaded.shape == loaded.images["right"].shape
    # One step along each axis is one spacing long.
    x, y, z = (loaded.images[name].astype(np.float64) for name in ("right", "front", "head"))
    for axis in range(3):
        step = np.sqrt(sum(np.diff(v, axis=axis).flat[0] ** 2 for v in (x, y, z)))
        assert step == pytest.approx(loaded.spacing[axis], rel=1e-5)
    label = np.random.default_rng(0).integers(0, 5, loaded.shape)
    save_mask(tmp_path / "out.nii.gz", label, loaded)
    back = nibabel.load(tmp_path / "out.nii.gz")
    assert back.get_data_dtype() == np.uint8
    assert back.shape == shape
    assert np.allclose(back.affine, affine, atol=1e-6)
    again = load_case(case(tmp_path, right=tmp_path / "right.nii.gz", mask=tmp_path / "out.nii.gz"))
    assert np.array_equal(again.label, label)
    probabilities = np.random.default_rng(1).random((2, *loaded.shape))
    save_probabilities(tmp_path / "p.nii", probabilities, loaded)
    image = nibabel.load(tmp_path / "p.nii")
    assert image.get_data_dtype() == np.float32
    assert image.shape == (*shape, 2)
    assert np.allclose(image.affine, affine, atol=1e-6)
    assert sorted(np.asarray(image.dataobj)[..., 1].flat) == sorted(probabilities[1].astype(np.float32).flat)
    one = Case("c", {"p": VolumeFile(tmp_path / "p.nii", 1)}, None, "c", "test")
    assert np.array_equal(load_case(one).images["p"], probabilities[1].astype(np.float32))


def test_nothing_but_geometry_of_a_header_is_written(tmp_path):
    image = nibabel.Nifti1Image(head(0), LPS)
    image.header["descrip"], image.header["intent_name"] = b"JANE DOE", b"1970-01-01"
    image.header["db_name"], image.header["aux_file"] = b"DOE", b"doe.txt"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"born 1970"))
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(LPS, 1)
    image.to_filename(tmp_path / "a.nii")
    loaded = load_case(case(tmp_path, t1=tmp_path / "a.nii"))
    save_mask(tmp_path / "b.nii", lesion().transpose(2, 1, 0), loaded)
    bytes_ = (tmp_path / "b.nii").read_bytes()
    assert not any(word in bytes_ for word in (b"JANE", b"DOE", b"1970", b"doe", b"born"))
    out = nibabel.load(tmp_path / "b.nii")
    assert (out.header["qform_code"], out.header["sform_code"]) == (1, 2)
    assert out.header.get_xyzt_units()[0] == "mm"
    save_mask(tmp_path / "c.nii.gz", lesion().transpose(2, 1, 0), loaded)
    assert gzip.decompress((tmp_path / "c.nii.gz").read_bytes()) == bytes_
    assert (tmp_path / "c.nii.gz").read_bytes()[4:8] == b"\0\0\0\0"
    with pytest.raises(UserError, match=r"must end in \.nii\.gz"):
        save_mask(tmp_path / "c.png", lesion().transpose(2, 1, 0), loaded)


def broken(tmp_path: Path, what: str) -> Case:
    good = save(tmp_path / "good.nii.gz", head(0))
    path = tmp_path / "bad.nii.gz"
    volume, affine = head(1).astype(np.float32), LPS.copy()
    if what == "missing":
        return case(tmp_path, t1=good, t2=path)
    if what == "nan":
        volume[3, 3, 3] = np.nan
    if what == "inf":
        volume[3, 3, 3] = np.inf
    if what == "constant":
        volume[:] = 0
    if what == "shape":
        volume = volume[:-1]
    if what == "moved":
        affine[0, 3] = 0.01
    if what == "flipped header":
        affine = np.eye(4)
    if what == "2-D":
        volume = volume[..., 0]
    if what == "one slice":
        volume = volume[..., :1]
    if what == "4-D":
        volume = np.stack([volume, volume], -1)
    if what == "colours":
        volume = np.zeros(volume.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    if what == "complex":
        volume = volume.astype(np.complex64)
    save(path, volume, affine)
    if what == "flat":
        image = nibabel.load(path)
        image.header["srow_z"] = 0
        path.write_bytes(gzip.compress(image.header.binaryblock + b"\0" * 4 + volume.tobytes()))
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    if what == "truncated header":
        path.write_bytes(path.read_bytes()[:30])
    if what == "text":
        path.write_text("hello")
    if what == "empty":
        path.write_bytes(b"")
    if what == "truncated .nii":
        nibabel.Nifti1Image(volume, affine).to_filename(tmp_path / "bad.nii")
        path = tmp_path / "bad.nii"
        path.write_bytes(path.read_bytes()[:-100])
    return case(tmp_path, t1=good, t2=path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "does not exist"),
        ("nan", "1 voxels are NaN"),
        ("inf", "1 voxels are NaN or infinite"),
        ("constant", "every voxel is 0; .*leave the file out"),
        ("shape", "11 x 14 x 10 voxels, good.nii.gz has 12"),
        ("moved", "differ by up to 0.01 mm"),
        ("flipped header", "its grid is not that of"),
        ("2-D", "12 x 14 voxels are not a volume"),
        ("one slice", "12 x 14 x 1 voxels are not a volume"),
        ("4-D", "4-D, but a 3-D image is expected"),
        ("colours", "are not intensities"),
        ("complex", "are not intensities"),
        ("flat", "does not span space"),
        ("truncated", "truncated or broken"),
        ("truncated header", "not a readable NIfTI"),
        ("text", "not a readable NIfTI"),
        ("empty", "not a readable NIfTI"),
        ("truncated .nii", "truncated or broken"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, what, message):
    with pytest.raises(VolumeError, match=message) as caught:
        load_case(broken(tmp_path, what))
    assert "bad.nii" in str(caught.value)


# (offset, width, number) of dim, datatype, pixdim, vox_offset, scl_slope, units, codes, quaternions, sform, extension.
FIELDS = [
    (40, 2, 8),
    (70, 2, 2),
    (76, 4, 8),
    (108, 4, 1),
    (112, 4, 2),
    (123, 1, 1),
    (252, 2, 2),
    (256, 4, 6),
    (280, 4, 12),
    (348, 1, 4),
]
PLACES = [(start + i * width, width) for start, width, number in FIELDS for i in range(number)]
ODD = st.sampled_from([b"\0" * 4, b"\xff" * 4, *(struct.pack("<f", value) for value in (np.nan, np.inf, -1, 1e30))])


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(PLACES), ODD | st.binary(min_size=4, max_size=4)), min_size=1, max_size=3))
def test_a_damaged_header_never_raises_anything_else(changes):
    """Whatever stands in the header: the file loads and its results can be read again, or it is a VolumeError."""
    data = bytearray(nibabel.Nifti1Image(head(0), LPS).to_bytes())
    for (place, width), value in changes:
        data[place : place + width] = value[:width]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.nii"
        path.write_bytes(data)
        with warnings.catch_warnings(), contextlib.suppress(VolumeError):
            warnings.simplefilter("ignore")
            loaded = load_case(Case("c", {"t1": VolumeFile(path)}, None, "c", "test"), max_voxels=10**6)
            save_mask(Path(folder) / "b.nii", np.zeros(loaded.shape, np.uint8), loaded)
            load_case(Case("c", {"t1": VolumeFile(path)}, VolumeFile(Path(folder) / "b.nii"), "c", "test"))


def test_small_differences_of_affines_and_other_orders_of_voxels_pass(tmp_path):
    moved = LPS.copy()
    moved[0, 3] = 5e-4
    same = save(tmp_path / "a.nii.gz", head(0))
    near = save(tmp_path / "b.nii.gz", head(1)[..., None], moved)
    # The same voxels, stored from the other end.
    other = LPS @ np.array([[-1, 0, 0, 11], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    mirrored = save(tmp_path / "c.nii.gz", head(0)[::-1], other)
    loaded = load_case(case(tmp_path, t1=same, t2=near, ct=mirrored))
    assert np.array_equal(loaded.images["t1"], loaded.images["ct"])


@pytest.mark.parametrize("values", [(0.0, 1e-300), (1e10, 1e10 + 4), (0.0, 1e300)])
def test_values_that_float32_cannot_hold_are_refused(values):
    with pytest.raises(VolumeError, match=r"voxels from .* do not fit float32; rescale the file"):
        intensities(np.array(values), VolumeFile(Path("a.nii")))


def test_scaled_integers_are_scaled(tmp_path):
    image = nibabel.Nifti1Image(head(0), LPS)
    image.header.set_slope_inter(0.5, -10)
    path = tmp_path / "a.nii.gz"
    image.to_filename(path)
    stored = np.asarray(nibabel.load(path).dataobj)
    loaded = load_case(case(tmp_path, t1=path))
    assert np.allclose(loaded.images["t1"], stored[::-1, ::-1].transpose(2, 1, 0))


def test_the_ceiling_is_checked_before_anything_is_decoded(tmp_path):
    header = nibabel.Nifti1Header()
    header.set_data_shape((4000, 4000, 4000))
    header.set_data_dtype(np.int16)
    with gzip.open(tmp_path / "huge.nii.gz", "wb") as file:
        header.write_to(file)
    with pytest.raises(VolumeError, match=r"4000 x 4000 x 4000 = 64000000000 voxels are more than"):
        load_case(case(tmp_path, t1=tmp_path / "huge.nii.gz"))
    with pytest.raises(VolumeError, match="more than the limit of 1000"):
        load_case(case(tmp_path, t1=save(tmp_path / "a.nii.gz", head(0))), max_voxels=1000)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lesion(values=(1, 3)), "label 3 is in no region"),
        (lesion() * 0.5, "0.5 is not a label"),
        (lesion().astype(np.int16) - 1, "-1 is not a label"),
        (lesion().astype(np.int16) * 100, "400 is not a label"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, label, message):
    files = {"t1": save(tmp_path / "a.nii.gz", head(0)), "mask": save(tmp_path / "m.nii.gz", label)}
    with pytest.raises(VolumeError, match=message):
        load_case(case(tmp_path, **files), data())


def test_float_label_maps_of_whole_numbers_pass(tmp_path):
    files = {
        "t1": save(tmp_path / "a.nii.gz", head(0)),
        "mask": save(tmp_path / "m.nii.gz", lesion().astype(np.float64)),
    }
    loaded = load_case(case(tmp_path, **files), data())
    assert loaded.label.dtype == np.uint8
    assert np.array_equal(loaded.label, lesion()[::-1, ::-1].transpose(2, 1, 0))


@pytest.mark.parametrize(
    "regions",
    [
        REGIONS,
        {"et": (3,), "tc": (2, 3), "wt": (1, 2, 3)},
        {"wt": (1, 2, 4), "et": (4,), "tc": (1, 4)},
        {"liver": (1, 2), "cancer": (2,)},
        {"a": (7,), "b": (3,)},
        {"a": (1, 2), "b": (2, 3)},
    ],
)
@given(draw=st.data())
def test_regions_and_labels_are_inverses(regions, draw):
    values = sorted({0} | {v for held in regions.values() for v in held})
    label = draw.draw(arrays.arrays(np.uint8, (3, 4, 2), elements=st.sampled_from(values)))
    masks = to_regions(label, regions)
    assert masks.dtype == bool
    for row, held in zip(masks, regions.values(), strict=True):
        assert np.array_equal(row, np.isin(label, held))
    assert np.array_equal(to_labels(masks, regions), label)


def test_inconsistent_regions_are_written_widest_first():
    # et, tc, wt of single voxels, and the label: a narrower region wins, whatever the wider ones say.
    table = {
        (0, 0, 0): 0,
        (0, 0, 1): 2,
        (0, 1, 0): 1,
        (0, 1, 1): 1,
        (1, 0, 0): 4,
        (1, 0, 1): 4,
        (1, 1, 0): 4,
        (1, 1, 1): 4,
    }
    masks = np.array(list(table), bool).T.reshape(3, 8, 1, 1)
    assert to_labels(masks, REGIONS).reshape(-1).tolist() == list(table.values())
    assert to_labels(masks[2:], {"wt": (1, 2, 4)}).max() == 1
    core_alone = np.array([False, True]).reshape(2, 1, 1, 1)
    assert to_labels(core_alone, {"wt": (1, 2, 3, 4), "tc": (3, 4)}).max() == 3, "the smallest of several labels"


def test_resampling_keeps_place_and_returns_to_the_source(tmp_path):
    """A linear ramp stays that ramp at the new voxels' places, except beside the border."""
    shape = (12, 20, 16)
    ramp = np.broadcast_to(np.arange(20, dtype=np.float32)[None, :, None], shape)
    affine = np.diag([1.0, 1.5, 2.0, 1])
    label = np.zeros(shape, np.uint8)
    label[3:9, 4:16, 4:12] = 1
    files = {"t1": save(tmp_path / "a.nii.gz", ramp, affine), "mask": save(tmp_path / "m.nii.gz", label, affine)}
    loaded = load_case(case(tmp_path, **files))
    assert loaded.spacing == pytest.approx((2, 1.5, 1))
    fine = resampled(loaded, (1, 0.75, 0.5))
    assert fine.shape == (32, 40, 24)
    expected = (np.arange(40) + 0.5) / 2 - 0.5
    assert np.allclose(fine.images["t1"][5, 1:-1, 5], expected[1:-1], atol=1e-5)
    assert fine.label.sum() == 8 * label.sum()
    save_mask(tmp_path / "out.nii.gz", fine.label, fine)
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "out.nii.gz").dataobj), label)
    coarse = resampled(loaded, (4, 3, 2))
    assert coarse.shape == (8, 10, 6)
    assert np.allclose(coarse.images["t1"][4, 2:-2, 3], 2 * np.arange(10)[2:-2] + 0.5, atol=1e-4)
    assert resampled(loaded, (2, 1.6, 1)).shape == (16, 19, 12), "18.75 is rounded"
    assert resize(label, label.shape) is label
    with pytest.raises(UserError, match="not three sizes"):
        resampled(loaded, (1, 0, 1))


def test_larger_voxels_are_smoothed_before():
    """A Gaussian of standard deviation s = (3 - 1) / 2 multiplies a wave of frequency w by exp(-(s w)^2 / 2)."""
    w, shape = 2 * np.pi / 8, (2, 60, 2)
    wave = np.broadcast_to(np.cos(w * np.arange(60, dtype=np.float32))[:, None], shape)
    loaded = LoadedVolume("c", {"t1": np.ascontiguousarray(wave)}, None, shape, (1.0, 1.0, 1.0), None)
    found = resampled(loaded, (1, 3, 1)).images["t1"]
    expected = np.exp(-(w**2) / 2) * np.cos(w * (3 * np.arange(20) + 1))
    assert np.allclose(found[0, 3:-3, 0], expected[3:-3], atol=1e-3)


def test_labels_are_those_of_the_nearest_voxel():
    """The centre of new voxel i is at (i + 1/2) 9 / 4 of the old ones."""
    label = np.arange(9, dtype=np.uint8).reshape(1, 9, 1)
    assert resize(label, (1, 4, 1)).ravel().tolist() == [1, 3, 5, 7]


def test_the_size_after_resampling_has_the_limit(tmp_path):
    loaded = load_case(case(tmp_path, t1=save(tmp_path / "a.nii.gz", head(0), np.diag([-60.0, -60.0, 60.0, 1.0]))))
    with pytest.raises(VolumeError, match=r"600 x 840 x 720 = 362880000 voxels, more than the limit of 134217728"):
        resampled(loaded, (1.0, 1.0, 1.0))
    assert resampled(loaded, (30.0, 30.0, 30.0), max_voxels=20 * 28 * 24).shape == (20, 28, 24)
    with pytest.raises(VolumeError, match=r"from voxels of 60 x 60 x 60 mm to 30 x 30 x 30 mm \(data.spacing\)"):
        resampled(loaded, (30.0, 30.0, 30.0), max_voxels=20 * 28 * 24 - 1)


@pytest.mark.real_data
def test_real_cases_load_and_results_go_back_to_their_grid(tmp_path):
    found = read_volumes(Path(os.environ["PRECEPTOR_DATA"]) / "mri")
    for one in found.samples:
        loaded = load_case(one, found)
        assert loaded.shape == ((155, 240, 240) if one.id.startswith("glioma") else (182, 218, 182))
        assert loaded.spacing == (1, 1, 1)
        masks = to_regions(loaded.label, found.regions)
        save_mask(tmp_path / "out.nii.gz", to_labels(masks, found.regions), loaded)
        ours, theirs = nibabel.load(tmp_path / "out.nii.gz"), nibabel.load(one.mask.path)
        assert np.array_equal(ours.affine, theirs.affine)
        assert np.array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
