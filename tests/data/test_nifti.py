"""Integrity and headers of NIfTI files, compared with gzip, SimpleITK and nibabel."""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest

from preceptor.data.nifti import VolumeError, channels_of, remarks_of, volume_shape
from preceptor.data.types import Case, VolumeFile
from preceptor.data.volumes import load_case, load_label, save_mask
from tests.data.volume_files import LPS, head, lesion, save

OFFSETS = {"dim": 40, "datatype": 70, "bitpix": 72, "pixdim": 76, "vox_offset": 108, "scl_slope": 112, "scl_inter": 116}
OFFSETS |= {"xyzt_units": 123, "qform_code": 252, "sform_code": 254, "quatern_b": 256, "srow_x": 280}


def load(path: Path):
    return load_case(Case("c", {"t1": VolumeFile(path)}, None, "c", "test"))


def accepted(path: Path) -> bool:
    try:
        load(path)
    except VolumeError:
        return False
    return True


def edited(path: Path, *changes: tuple[str, int, str, float], qform: np.ndarray | None = None) -> Path:
    """Write a file and change fields of its header: (name, index, struct type, value)."""
    image = nibabel.Nifti1Image(head(0), LPS)
    if qform is not None:
        image.set_qform(qform, 1)
    data = bytearray(image.to_bytes())
    for name, index, kind, value in changes:
        struct.pack_into(f"<{kind}", data, OFFSETS[name] + index * struct.calcsize(kind), value)
    path.write_bytes(data)
    return path


def test_every_damaged_file_that_gzip_refuses_is_refused(tmp_path):
    if shutil.which("gzip") is None:
        pytest.skip("gzip is not installed")
    whole = save(tmp_path / "a.nii.gz", head(0, (24, 24, 20))).read_bytes()
    random = np.random.default_rng(0)
    places = [*range(12), *random.integers(12, len(whole) - 8, 40), *range(len(whole) - 8, len(whole))]
    path, refused = tmp_path / "b.nii.gz", 0
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        by_gzip = subprocess.run(["gzip", "-t", path], capture_output=True, check=False).returncode != 0
        assert accepted(path) is not by_gzip, place
        refused += by_gzip
    assert refused >= 48


def test_members_and_tails_of_gzip(tmp_path):
    raw = gzip.decompress(save(tmp_path / "a.nii.gz", head(0)).read_bytes())
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(raw[:700]) + gzip.compress(raw[700:]) + b"\0" * 20)
    assert np.array_equal(load(path).images["t1"], load(tmp_path / "a.nii.gz").images["t1"])
    for tail, message in ((b"garbage", "truncated or broken"), (gzip.compress(b"x"), "longer than the 3,360 bytes")):
        path.write_bytes(gzip.compress(raw) + tail)
        with pytest.raises(VolumeError, match=message):
            load(path)
    for data, message in ((raw + b"x", "longer than"), (raw[:-1], r"truncated or broken file \(3,359 of 3,360 bytes")):
        (tmp_path / "c.nii").write_bytes(data)
        path.write_bytes(gzip.compress(data))
        for file in (path, tmp_path / "c.nii"):
            with pytest.raises(VolumeError, match=message):
                load(file)


def test_names_that_contradict_the_content(tmp_path):
    whole = save(tmp_path / "a.nii.gz", head(0)).read_bytes()
    (tmp_path / "b.nii").write_bytes(whole)
    (tmp_path / "c.nii.gz").write_bytes(gzip.decompress(whole))
    nibabel.Nifti1Pair(head(0), LPS).to_filename(tmp_path / "d.hdr")
    (tmp_path / "d.hdr").rename(tmp_path / "d.nii")
    nibabel.AnalyzeImage(head(0), LPS).to_filename(tmp_path / "e.img")
    (tmp_path / "e.hdr").rename(tmp_path / "e.nii")
    for name, message in (
        ("b.nii", "compressed with gzip, but named .nii; rename it to .nii.gz"),
        ("c.nii.gz", "not compressed with gzip, but named .nii.gz; rename it to .nii"),
        ("d.nii", r"the header of a pair of files \(.hdr and .img\)"),
        ("e.nii", "Analyze 7.5"),
    ):
        with pytest.raises(VolumeError, match=message):
            load(tmp_path / name)


@pytest.mark.parametrize(("code", "factor"), [(0, 1.0), (1, 1000.0), (2, 1.0), (3, 0.001)])
def test_lengths_are_in_mm_whatever_the_units(tmp_path, code, factor):
    sitk = pytest.importorskip("SimpleITK")
    affine = np.array([[-0.9, 0, 0, 7], [0, -1.5, 0, -9], [0, 0, 2.5, 11], [0, 0, 0, 1]])
    affine[:3] /= factor
    image = nibabel.Nifti1Image(head(0), affine)
    image.set_qform(affine, 1)
    image.header["xyzt_units"] = code
    image.to_filename(tmp_path / "a.nii")
    loaded = load(tmp_path / "a.nii")
    assert loaded.spacing == pytest.approx((2.5, 1.5, 0.9))
    assert loaded.geometry.voxel_volume == pytest.approx(2.5 * 1.5 * 0.9)
    save_mask(tmp_path / "b.nii.gz", np.ones(loaded.shape, np.uint8), loaded)
    source, result = (sitk.ReadImage(str(tmp_path / name)) for name in ("a.nii", "b.nii.gz"))
    if code:  # ITK does not define unknown units
        assert result.GetSpacing() == pytest.approx(source.GetSpacing())
        assert result.GetOrigin() == pytest.approx(source.GetOrigin())
    assert result.GetSpacing() == pytest.approx((0.9, 1.5, 2.5))


def test_channels_as_itk_writes_them(tmp_path):
    """ITK writes the elements of a vector as the fifth dimension: (X, Y, Z, 1, C)."""
    sitk = pytest.importorskip("SimpleITK")
    voxels = np.random.default_rng(0).integers(1, 900, (5, 6, 7, 2)).astype(np.int16)  # (Z, Y, X, C)
    file = tmp_path / "a.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(voxels, isVector=True), str(file))
    assert nibabel.load(file).shape == (7, 6, 5, 1, 2)
    assert channels_of(file) == 2
    for channel in (0, 1):
        loaded = load_case(Case("c", {"t1": VolumeFile(file, channel)}, None, "c", "test"))
        # ITK's axes point to the left, the back and the head.
        np.testing.assert_array_equal(loaded.images["t1"], voxels[:, ::-1, ::-1, channel])
        assert remarks_of(file, channel) == ()
    with pytest.raises(VolumeError, match="7 x 6 x 5 x 1 x 2 voxels have no channel 2"):
        load_case(Case("c", {"t1": VolumeFile(file, 2)}, None, "c", "test"))
    with pytest.raises(VolumeError, match="7 x 6 x 5 x 1 x 2 voxels are not a volume: 5-D, but a 3-D image"):
        load(file)


@pytest.mark.parametrize(
    ("shape", "channel", "fits"),
    [
        ((4, 5, 6), None, True),
        ((4, 5, 6, 1), None, True),
        ((4, 5, 6, 1, 1), None, True),
        ((4, 5, 6, 1), 0, True),
        ((4, 5, 6, 3), 2, True),
        ((4, 5, 6, 3, 1), 2, True),
        ((4, 5, 6, 1, 3), 2, True),
        ((4, 5, 6, 3), None, False),
        ((4, 5, 6, 3), 3, False),
        ((4, 5, 6), 0, False),
        ((4, 5, 6, 2, 3), 1, False),
    ],
    ids=str,
)
def test_which_shapes_have_a_channel(tmp_path, shape, channel, fits):
    if fits:
        assert volume_shape(tmp_path, shape, channel) == (4, 5, 6)
        return
    with pytest.raises(VolumeError, match=" x ".join(map(str, shape)) + " voxels (have no channel|are not a volume)"):
        volume_shape(tmp_path, shape, channel)


@pytest.mark.parametrize("change", ["sform", "qform", "scaled", "big-endian", "4-D of one volume"])
def test_voxels_and_affine_are_those_of_simpleitk(tmp_path, change):
    sitk = pytest.importorskip("SimpleITK")
    turn = np.diag([0.7, 1.3, 2.1, 1.0])
    turn[:3, :3] = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) @ turn[:3, :3]
    turn[:3, 3] = 5, -6, 7
    header = nibabel.Nifti1Header(endianness=">" if change == "big-endian" else "<")
    image = nibabel.Nifti1Image(head(0)[..., None] if change == "4-D of one volume" else head(0), turn, header)
    image.set_sform(turn, 0 if change == "qform" else 1)
    image.set_qform(turn, 1)
    if change == "scaled":
        image.header.set_slope_inter(0.25, -3)
    image.to_filename(tmp_path / "a.nii.gz")
    loaded = load(tmp_path / "a.nii.gz")
    theirs = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    if theirs.GetDimension() == 4:
        theirs = theirs[..., 0]
    voxels = loaded.geometry.source(loaded.images["t1"])
    assert np.allclose(voxels, sitk.GetArrayFromImage(theirs).transpose(2, 1, 0))
    direction = np.array(theirs.GetDirection()).reshape(3, 3) * theirs.GetSpacing()
    assert np.allclose(np.diag([-1, -1, 1]) @ direction, loaded.geometry.affine[:3, :3], atol=1e-5)
    assert np.allclose(np.diag([-1, -1, 1]) @ theirs.GetOrigin(), loaded.geometry.affine[:3, 3], atol=1e-5)
    assert loaded.geometry.remarks == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("pixdim", 3, "f", 10.0)], r"the sform has voxels of 1 x 1 x 1, but pixdim says 1 x 1 x 10"),
        ([("pixdim", 1, "f", 1.02)], r"but pixdim says 1.02 x 1 x 1"),
        ([("pixdim", 1, "f", -1.0)], r"pixdim -1 x 1 x 1 are not voxel sizes"),
        ([("pixdim", 2, "f", float("nan"))], "pixdim 1 x nan x 1 are not voxel sizes"),
        ([("xyzt_units", 0, "B", 5)], "xyzt_units has the unknown code 5"),
        ([("xyzt_units", 0, "B", 1)], r"voxels of 1000 x 1000 x 1000 mm are too large; .* \(its code is 1: metre\)"),
        (
            [("sform_code", 0, "h", 0), ("qform_code", 0, "h", 1), ("pixdim", 1, "f", 1e-30)],
            r"voxels of 1e-30 x 1 x 1 mm are too small; correct pixdim, or xyzt_units \(its code is 0: unknown",
        ),
        ([("scl_slope", 0, "f", float("inf"))], "scl_slope inf and scl_inter"),
        ([("scl_slope", 0, "f", 2.0), ("scl_inter", 0, "f", float("nan"))], "scl_inter nan"),
        ([("bitpix", 0, "h", 8)], "datatype int16 has 16 bits, but bitpix is 8"),
        ([("datatype", 0, "h", 128)], "voxels of type RGB are not intensities"),
        ([("datatype", 0, "h", 1792)], "voxels of type complex128 are not intensities"),
        ([("datatype", 0, "h", 77)], "datatype code 77 is not supported"),
        ([("dim", 0, "h", 0)], r"dim \[0, 12, 14, 10"),
        ([("dim", 2, "h", -14)], "is not a shape"),
        ([("dim", 0, "h", 2)], "longer than the 336 bytes of 12 x 14"),
        ([("dim", 4, "h", 2), ("dim", 0, "h", 4)], "truncated or broken file"),
        ([("vox_offset", 0, "f", 100.0)], "vox_offset 100"),
        ([("sform_code", 0, "h", 0), ("qform_code", 0, "h", 1), ("quatern_b", 0, "f", 2.0)], "invalid qform"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, changes, message):
    with pytest.raises(VolumeError, match=message):
        load(edited(tmp_path / "a.nii", *changes))


def test_doubtful_headers_are_remarks(tmp_path):
    moved = LPS.copy()
    moved[0, 3] = 40
    assert load(edited(tmp_path / "a.nii", qform=LPS)).remarks == ()
    for path, message in (
        (edited(tmp_path / "a.nii", qform=moved), "qform and sform place voxels up to 40 units apart"),
        (edited(tmp_path / "b.nii", ("sform_code", 0, "h", 0)), "neither sform nor qform"),
        (edited(tmp_path / "c.nii", ("xyzt_units", 0, "B", 3)), "0.001 x 0.001 x 0.001 mm are very small"),
        (edited(tmp_path / "d.nii", ("srow_x", 1, "f", 0.05)), "not perpendicular"),
    ):
        (remark,) = load(path).remarks
        assert message in remark


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.99999, "0.99999 is not a label"), (1.0000201, "1.0000201"), (255.5, "255.5"), (256, "256")],
)
def test_a_value_that_is_no_label_is_shown_with_its_digits(tmp_path, value, message):
    label = lesion(values=(1,)) * np.float64(value)
    with pytest.raises(VolumeError, match=message.replace(".", r"\.")):
        load_label(VolumeFile(save(tmp_path / "a.nii", label)))


def test_rounding_errors_of_scaled_labels_are_no_fractions(tmp_path):
    path = save(tmp_path / "a.nii", lesion().astype(np.float64) * 0.9999999998)
    assert np.array_equal(np.unique(load_label(VolumeFile(path))[0]), [0, 1, 2, 4])
    edited(path, ("scl_slope", 0, "f", 0.1), ("scl_inter", 0, "f", 0))
    stored = bytearray(path.read_bytes())
    stored[352:] = (lesion() * 10).astype("<i2").tobytes(order="F")
    path.write_bytes(stored)
    assert set(np.unique(nibabel.load(path).get_fdata())) != {0, 1, 2, 4}
    assert np.array_equal(np.unique(load_label(VolumeFile(path))[0]), [0, 1, 2, 4])


def test_a_slope_of_0_means_no_scale(tmp_path):
    path = save(tmp_path / "a.nii", head(0))
    before = load(path).images["t1"]
    edited(path, ("scl_slope", 0, "f", 0.0), ("scl_inter", 0, "f", 7.0))
    assert np.array_equal(load(path).images["t1"], before)
    assert np.array_equal(nibabel.load(path).get_fdata(), head(0))


@pytest.mark.parametrize(
    ("sform", "qform", "written"), [(1, 0, (1, 0)), (0, 1, (0, 1)), (4, 1, (4, 1)), (0, 0, (2, 0)), (9, 0, (2, 0))]
)
def test_masks_have_the_codes_of_the_source(tmp_path, sform, qform, written):
    path = edited(save(tmp_path / "a.nii", head(0)), ("sform_code", 0, "h", sform), ("qform_code", 0, "h", qform))
    loaded = load(path)
    save_mask(tmp_path / "out.nii", np.zeros(loaded.shape, np.uint8), loaded)
    header = nibabel.load(tmp_path / "out.nii").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == written


def test_nifti_2_is_read_as_nibabel_reads_it(tmp_path):
    affine = np.diag([2.0, 3.0, 4.0, 1])
    image = nibabel.Nifti2Image(head(0), affine)
    image.set_qform(affine, 1)
    image.to_filename(tmp_path / "a.nii.gz")
    loaded = load(tmp_path / "a.nii.gz")
    assert np.array_equal(loaded.geometry.source(loaded.images["t1"]), nibabel.load(tmp_path / "a.nii.gz").get_fdata())
    assert np.array_equal(loaded.geometry.affine, affine)
