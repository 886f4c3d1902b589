"""Which regions a voxel belongs to, from their probabilities; the rule is worked out by hand."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from preceptor.data.volumes import to_labels
from preceptor.segmentation import region_masks
from preceptor.segmentation.evaluate import label_map
from preceptor.segmentation.region_masks import threshold_regions

BRATS = {"et": (4,), "tc": (1, 4), "wt": (1, 2, 4)}
ZONES = {"pz": (1,), "tz": (2,)}


def labels(regions: dict[str, tuple[int, ...]], *voxels: tuple[float, ...]) -> list[int]:
    """Return the label of each voxel, given the probabilities of its regions."""
    probabilities = np.array(voxels, np.float32).T.reshape(len(regions), 1, 1, -1)
    return label_map(probabilities, regions)[0, 0].tolist()


@pytest.mark.parametrize("regions", [ZONES, dict(reversed(ZONES.items()))], ids=["pz-tz", "tz-pz"])
def test_the_most_probable_of_two_regions_without_a_common_label_is_written(regions) -> None:
    by_name = [{"pz": 0.9, "tz": 0.6}, {"pz": 0.6, "tz": 0.9}, {"pz": 0.6, "tz": 0.4}, {"pz": 0.4, "tz": 0.3}]
    assert labels(regions, *[tuple(voxel[name] for name in regions) for voxel in by_name]) == [1, 2, 1, 0]


def test_a_tie_is_won_by_the_first_region() -> None:
    assert labels(ZONES, (0.7, 0.7)) == [1]
    assert labels({"tz": (2,), "pz": (1,)}, (0.7, 0.7)) == [2]


def test_a_region_that_is_dropped_drops_no_other() -> None:
    """The spleen excludes the tumour, but the liver excludes the spleen, and contains the tumour."""
    organs = {"liver": (1, 2), "tumour": (2,), "spleen": (3,)}
    assert labels(organs, (0.9, 0.55, 0.7), (0.6, 0.55, 0.7), (0.6, 0.8, 0.7), (0.9, 0.4, 0.7)) == [2, 3, 2, 1]
    prostate = {"prostate": (1, 2), "pz": (1,), "tz": (2,)}
    assert labels(prostate, (0.9, 0.6, 0.7), (0.6, 0.8, 0.7)) == [2, 1]


@pytest.mark.parametrize("regions", [BRATS, {"a": (1, 2), "b": (2, 3)}, {"lesion": (1,)}], ids=str)
def test_regions_that_share_labels_are_written_as_before(regions) -> None:
    probabilities = np.random.default_rng(0).random((len(regions), 12, 13, 14)).astype(np.float32)
    np.testing.assert_array_equal(label_map(probabilities, regions), to_labels(probabilities >= 0.5, regions))
    np.testing.assert_array_equal(threshold_regions(probabilities, regions, 0.5), probabilities >= 0.5)


def test_a_further_region_changes_nested_ones_only_where_it_is() -> None:
    """The resection cavity of BraTS 2024, which shares no label with the tumour."""
    regions = {"et": (3,), "tc": (1, 3), "wt": (1, 2, 3), "rc": (4,)}
    probabilities = np.random.default_rng(0).random((4, 12, 13, 14)).astype(np.float32)
    plain, found = probabilities >= 0.5, threshold_regions(probabilities, regions, 0.5)
    both = plain[:3].any(0) & plain[3]
    np.testing.assert_array_equal(found[:, ~both], plain[:, ~both])
    cavity = both & (probabilities[3] > probabilities[:3].max(0))
    assert found[3][cavity].all()
    assert not found[:3, cavity].any()
    assert not found[3][both & ~cavity].any()
    np.testing.assert_array_equal(found[:3, both & ~cavity], plain[:3, both & ~cavity])
    assert cavity.sum() > 100


def test_the_copy_of_an_export_needs_numpy_alone() -> None:
    source = Path(region_masks.__file__)
    assert "preceptor" not in source.read_text("utf-8")
    copy = runpy.run_path(str(source))["threshold_regions"]
    probabilities = np.random.default_rng(1).random((2, 5, 5, 5))
    np.testing.assert_array_equal(copy(probabilities, ZONES, 0.5), threshold_regions(probabilities, ZONES, 0.5))
