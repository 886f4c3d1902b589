from __future__ import annotations

import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.errors import UserError
from preceptor.segmentation import planes
from preceptor.segmentation.figures import choose_subsets

WHOLE = (slice(None), slice(None), slice(None))


def polygons(path: str) -> list[np.ndarray]:
    return [np.array(part.split(), float).reshape(-1, 2) for part in re.findall(r"M([^Z]+)Z", path)]


def area(points: np.ndarray) -> float:
    """The shoelace formula."""
    x, y = points.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SRA"])
def test_planes_are_radiological_however_a_file_is_stored(tmp_path: Path, axes: str):
    """A head with one bright voxel on the right, in front, above: in every stored order it is drawn in one place."""
    volume = np.zeros((8, 10, 12), np.float32)
    volume[6, 8, 10] = 1  # canonical: to the right, to the front, up
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    image = nibabel.Nifti1Image(volume, np.diag([1.0, 2.0, 3.0, 1.0])).as_reoriented(turn)
    nibabel.save(image, tmp_path / "v.nii.gz")
    read = planes.read_volume(tmp_path / "v.nii.gz", max_voxels=1000)
    assert np.array_equal(read.voxels, volume)
    assert read.spacing == (1.0, 2.0, 3.0)
    at = (6, 8, 10)
    # Axial: right on the left, front up. Coronal: right on the left, head up. Sagittal: face on the left, head up.
    for plane, place, shape in (
        ("axial", (1, 1), (10, 8)),
        ("coronal", (1, 1), (12, 8)),
        ("sagittal", (1, 1), (12, 10)),
    ):
        shown = planes.slice_plane(read.voxels, plane, at, WHOLE)
        assert shown.shape == shape
        assert np.argwhere(shown).tolist() == [list(place)]
    assert [planes.pixel_size(plane, read.spacing) for plane in planes.PLANES] == [(1, 2), (1, 3), (2, 3)]


@given(st.integers(0, 2**16 - 1))
def test_outlines_hold_their_pixels(bits: int):
    """Every pixel's centre lies inside the outline if, and only if, it is in the mask."""
    mask = np.array([bits >> place & 1 for place in range(16)], bool).reshape(4, 4)
    found = polygons(planes.outline(mask, (2.0, 3.0)))
    from matplotlib.path import Path as Shape

    centres = [(2 * (column + 0.5), 3 * (row + 0.5)) for row in range(4) for column in range(4)]
    inside = np.zeros(16, int)
    for polygon in found:
        inside += Shape(np.concatenate([polygon, polygon[:1]])).contains_points(centres)
    assert np.array_equal(inside % 2 == 1, mask.ravel())


def test_the_outline_of_a_rectangle_has_eight_corners():
    mask = np.zeros((20, 30), bool)
    mask[5:15, 10:22] = True
    (polygon,) = polygons(planes.outline(mask, (1.0, 1.0)))
    assert len(polygon) == 8  # corners are cut
    assert area(polygon) == pytest.approx(10 * 12 - 4 * 0.125, abs=0.2)
    assert planes.outline(np.zeros((4, 4), bool), (1, 1)) == ""


def test_the_centre_is_in_the_lesion():
    ring = np.zeros((9, 9, 3), bool)
    ring[2:7, 2:7, 1] = True
    ring[3:6, 3:6, 1] = False
    assert ring[planes.central_voxel(ring)]
    assert planes.central_voxel(np.zeros((8, 6, 4), bool)) == (4, 3, 2)


def test_the_window_is_that_of_the_foreground():
    volume = np.zeros((10, 10, 10), np.float32)
    volume[2:8, 2:8, 2:8] = np.linspace(100, 300, 216).reshape(6, 6, 6)
    grey = planes.apply_window(volume)
    assert grey[0, 0, 0] == 0
    assert grey[7, 7, 7] == 255
    assert abs(int(np.median(grey[2:8, 2:8, 2:8])) - 128) <= 2
    assert not planes.apply_window(np.full((3, 3, 3), 5.0)).any()
    box = planes.content_box(grey, np.zeros(grey.shape, bool))
    assert all(part.start <= 3 and part.stop == 10 for part in box)


def test_a_channel_of_a_4d_file(tmp_path: Path):
    voxels = np.arange(4 * 3 * 2 * 2, dtype=np.float32).reshape(4, 3, 2, 2)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "v.nii")
    assert np.array_equal(planes.read_volume(tmp_path / "v.nii", 1, max_voxels=99).voxels, voxels[..., 1])
    with pytest.raises(UserError, match="not a volume"):
        planes.read_volume(tmp_path / "v.nii", max_voxels=99)
    with pytest.raises(UserError, match="more than the limit of 20"):
        planes.read_volume(tmp_path / "v.nii", 1, max_voxels=20)
    with pytest.raises(UserError, match="does not exist"):
        planes.read_volume(tmp_path / "gone.nii", max_voxels=20)


def test_four_combinations_of_decreasing_size_with_the_worst():
    dice = {
        ("a", "b", "c", "d"): 0.9,
        ("a", "b", "c"): 0.8,
        ("a", "b", "d"): 0.7,
        ("a", "b"): 0.6,
        ("c", "d"): 0.2,
        ("a",): 0.5,
        ("b",): 0.4,
    }
    assert choose_subsets(dice) == [("a", "b", "c", "d"), ("a", "b", "d"), ("c", "d"), ("b",)]
    assert choose_subsets({("a",): 0.4, ("a", "b"): 0.9, ("b",): None}) == [("a", "b"), ("a",), ("b",)]
