from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.nifti import VolumeError
from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.volumes import load_case, save_mask, to_labels, to_regions
from preceptor.errors import UserError
from preceptor.segmentation.augment import augment_patch, cut_out, draw_patch
from preceptor.segmentation.dataset import VolumeExamples, VolumeSettings
from preceptor.segmentation.intensity import normalise
from tests.data.volume_files import REGIONS, head, lesion, save, write_case

SETTINGS = VolumeSettings(patch_size=(6, 8, 6), intensity="zscore", augment="light")


@pytest.fixture
def data(tmp_path):
    for i in range(4):
        write_case(tmp_path / f"c{i}", f"c{i}", i)
    (tmp_path / "c1" / "c1_t1ce.nii.gz").unlink()
    return read_volumes(tmp_path, test_fraction=0, validation_fraction=0, regions=REGIONS)


def examples(data, **changes) -> VolumeExamples:
    seed = changes.pop("seed", 0)
    return VolumeExamples(data.samples, data, replace(SETTINGS, **changes), seed=seed)


def same(a, b) -> bool:
    return a["key"] == b["key"] and all(np.array_equal(a[n], b[n]) for n in ("images", "available", "masks"))


def test_a_batch(data):
    made = examples(data)
    batch = made.collate([made[(i, 0)] for i in (0, 1, 3)])
    assert batch.ids == ["c0", "c1", "c3"]
    assert batch["images"].shape == (3, 4, 6, 8, 6)
    assert batch["masks"].shape == (3, 3, 6, 8, 6)
    assert batch["images"].dtype == batch["masks"].dtype == torch.float32
    assert batch["available"].dtype == torch.bool
    assert batch["available"].tolist() == [[True] * 4, [True, True, False, True], [True] * 4]
    assert not batch["images"][1, 2].any()
    assert set(batch["masks"].unique().tolist()) <= {0.0, 1.0}
    et, tc, wt = batch["masks"].unbind(1)
    assert ((et <= tc) & (tc <= wt)).all()
    assert len(set(batch.keys)) == 3
    empty = made.collate(["x"])
    assert (len(empty), empty.skipped, empty["images"].shape) == (0, ["x"], (0, 4, 6, 8, 6))


@pytest.mark.parametrize("augment", ["none", "light", pytest.param("full", marks=pytest.mark.slow)])
def test_items_depend_on_seed_content_and_epoch_alone(data, tmp_path, augment):
    first = examples(data, augment=augment)
    items = [first[(i, e)] for e in range(3) for i in range(4)]
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - that it does not matter is what is tested
    again = examples(data, augment=augment, cache_bytes=0)
    for number in reversed(range(12)):
        assert same(again[(number % 4, number // 4)], items[number])
    assert not same(first[(0, 0)], first[(0, 1)])
    other = examples(data, augment=augment, seed=1)
    assert other[(0, 0)]["key"] == items[0]["key"]
    assert not np.array_equal(other[(0, 0)]["images"], items[0]["images"])
    # Other names of the same files are the same content.
    shutil.copytree(tmp_path / "c0", tmp_path / "moved" / "z")
    for file in (tmp_path / "moved" / "z").iterdir():
        file.rename(file.with_name(file.name.replace("c0", "z")))
    moved = read_volumes(tmp_path / "moved", regions=REGIONS)
    assert same(VolumeExamples(moved.samples, moved, first.settings)[(0, 2)], items[8])


def test_workers_draw_the_same(data):
    made = examples(data)
    batches = [[(0, 0), (1, 0)], [(2, 5), (3, 5)]]
    for one, two in zip(made.loader(batches), made.loader(batches, workers=2), strict=True):
        assert one.keys == two.keys
        assert all(torch.equal(one[name], two[name]) for name in one.tensors)


def test_the_key_changes_with_every_byte_and_role(data, tmp_path):
    before = examples(data).key(0, 0)
    assert examples(data).key(0, 1) != before
    renamed = replace(data, modalities=("flair", "t1", "t2"))
    assert VolumeExamples(data.samples, renamed, SETTINGS).key(0, 0) != before
    save(tmp_path / "c0" / "c0_seg.nii.gz", lesion(values=(1, 2)))
    assert examples(data).key(0, 0) != before


def test_the_whole_case(data, tmp_path):
    made = examples(data)
    whole = made.whole(1)
    assert whole.images.shape == (4, 10, 14, 12)
    assert whole.masks.shape == (3, 10, 14, 12)
    assert whole.box == (slice(2, 8), slice(2, 12), slice(2, 10))
    loaded = load_case(data.samples[1], data)
    assert torch.equal(whole.images[3], torch.from_numpy(normalise(loaded.images["t2"], "zscore")))
    outside = torch.ones(10, 14, 12, dtype=torch.bool)
    outside[whole.box] = False
    assert not whole.images[:, outside].any()
    assert whole.available.tolist() == [True, True, False, True]
    save_mask(tmp_path / "out.nii.gz", to_labels(whole.masks.numpy(), REGIONS), whole.loaded)
    source = nibabel.load(data.samples[1].mask.path)
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "out.nii.gz").dataobj), np.asarray(source.dataobj))


def test_the_box_holds_the_foreground_of_every_modality(data, tmp_path):
    larger = head(0)
    larger[1, 5, 5] = larger[5, 13, 5] = 150
    save(tmp_path / "c0" / "c0_t2.nii.gz", larger)
    whole = examples(data).whole(0)
    expected = normalise(load_case(data.samples[0], data).images["t2"], "zscore")
    assert torch.equal(whole.images[3], torch.from_numpy(expected))
    assert [side.stop - side.start for side in whole.box] == [6, 12, 9]


def test_patches_come_from_the_volume(data):
    """Unaugmented patches of half the seeds hold a lesion's voxel in the middle, others lie anywhere."""
    made = examples(data, augment="none", foreground_probability=1.0)
    whole = made.whole(0).images[(slice(None), *made.whole(0).box)].numpy()
    for epoch in range(20):
        patch = made[(0, epoch)]
        assert patch["masks"].any()
        z, y, x = (np.subtract(whole.shape[1:], (6, 8, 6)) + 1).tolist()
        assert any(
            np.array_equal(cut_out(whole, [a, b, c], (6, 8, 6)), patch["images"])
            for a in range(z)
            for b in range(y)
            for c in range(x)
        )


def test_every_label_is_centred_equally_often():
    """A label of 1 voxel and one of 1000: each is in the middle of about half the patches."""
    label = np.zeros((40, 40, 40), np.uint8)
    label[5:15, 5:15, 5:15], label[30, 30, 30] = 2, 4
    images = np.zeros((1, 40, 40, 40), np.float32)
    middles = [
        draw_patch(images, label, (4, 4, 4), np.random.default_rng(i), foreground_probability=0.8)[1][2, 2, 2]
        for i in range(600)
    ]
    assert np.mean(np.equal(middles, 4)) == pytest.approx(0.4, abs=0.06)
    assert np.mean(np.equal(middles, 2)) == pytest.approx(0.4, abs=0.06)


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(2, 9)] * 3), st.integers(0, 9))
def test_patches_of_any_size_from_volumes_of_any_size(shape, size, seed):
    rng = np.random.default_rng(seed)
    images, label = rng.random((2, *shape), np.float32) + 1, np.ones(shape, np.uint8)
    patch, its = draw_patch(images, label, size, rng, foreground_probability=0.5)
    assert patch.shape == (2, *size)
    # A side that fits is filled, a shorter one is all there.
    assert its.sum() == np.prod(np.minimum(shape, size))
    assert np.array_equal(patch[0] != 0, its == 1)


@pytest.mark.parametrize("augment", ["light", "full"])
def test_augmentation_moves_images_and_masks_together_and_leaves_the_missing_out(augment):
    """An image that is the mask stays bright inside it and dark outside, whatever the view."""
    label = np.zeros((20, 24, 28), np.uint8)
    label[4:12, 10:22, 3:15] = 2
    images = np.stack([10.0 * (label == 2), np.zeros(label.shape)]).astype(np.float32)
    seen = set()
    for seed in range(40):
        view, its = augment_patch(images, label, np.array([True, False]), augment, np.random.default_rng(seed))
        inside = its == 2
        assert view.shape == images.shape
        assert its.shape == label.shape
        assert view.dtype == np.float32
        assert its.dtype == np.uint8
        assert not view[1].any()
        assert np.mean((view[0] > 5) == inside) > 0.95
        seen.add(inside.tobytes())
    assert len(seen) >= 8


def test_light_leaves_the_background_alone():
    images = np.zeros((1, 8, 8, 8), np.float32)
    images[0, 2:5, 2:6, 1:4] = 3
    for seed in range(8):
        view, _ = augment_patch(
            images, images[0].astype(np.uint8), np.array([True]), "light", np.random.default_rng(seed)
        )
        assert (view != 0).sum() == 36
        assert 2.6 <= view[view != 0].min() <= view.max() <= 3.4


def test_broken_cases_raise_or_are_skipped(data, tmp_path):
    path = tmp_path / "c2" / "c2_t1.nii.gz"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(VolumeError, match=r"c2_t1\.nii\.gz: truncated"):
        examples(data)[(2, 0)]
    made = examples(data, broken="skip")
    batch = made.collate([made[(i, 0)] for i in range(4)])
    assert (batch.ids, batch.skipped) == (["c0", "c1", "c3"], ["c2"])
    with pytest.raises(VolumeError):
        made.whole(2)
    path.unlink()
    assert made[(2, 0)] == "c2"


def test_the_cache_stops_at_its_limit(data):
    unlimited = examples(data)
    size = unlimited.prepared(0).nbytes
    made = examples(data, cache_bytes=2 * size)
    for i in range(4):
        made.prepared(i)
    assert len(made._prepared) == 2
    assert made._bytes <= 2 * size
    assert made.prepared(0) is made.prepared(0)
    assert made.prepared(3) is not made.prepared(3)


def test_resampled_cases(data, tmp_path):
    made = examples(data, spacing=(2.0, 2.0, 2.0), patch_size=(4, 4, 4))
    whole = made.whole(0)
    assert whole.images.shape == (4, 5, 7, 6)
    assert made[(0, 0)]["images"].shape == (4, 4, 4, 4)
    save_mask(tmp_path / "out.nii.gz", to_labels(whole.masks.numpy(), REGIONS), whole.loaded)
    assert nibabel.load(tmp_path / "out.nii.gz").shape == (12, 14, 10)


def test_an_intensity_that_does_not_fit_names_the_file(data, tmp_path):
    save(tmp_path / "c0" / "c0_flair.nii.gz", head(0) / 1000)
    with pytest.raises(VolumeError, match=r"c0_flair\.nii\.gz: intensity=histogram .* set intensity=percentile"):
        examples(data, intensity="histogram").prepared(0)


@pytest.mark.parametrize("wrong", [{"patch_size": (4, 4)}, {"patch_size": (4, 4, 1)}, {"foreground_probability": 1.5}])
def test_settings_that_do_not_fit(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        VolumeSettings(**wrong)


def test_importing_does_not_import_monai():
    modules = "preceptor.segmentation.dataset, preceptor.data.segmentation.cases"
    code = f"import sys, {modules}; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.real_data
@pytest.mark.slow
def test_real_cases():
    data = read_volumes(Path(os.environ["PRECEPTOR_DATA"]) / "mri")
    settings = VolumeSettings(
        patch_size=(80, 160, 160), intensity="histogram", augment="full", foreground_probability=1
    )
    made = VolumeExamples(data.samples, data, settings)
    for index, case in enumerate(data.samples):
        item = made[(index, 3)]
        assert item["masks"][2].any()
        assert np.isfinite(item["images"]).all()
        whole = made.whole(index)
        assert np.array_equal(whole.masks.numpy(), to_regions(load_case(case).label, data.regions))
        # The brain is about 140 x 180 x 140 mm; nothing of the lesion lies outside the box.
        assert all(90 < side.stop - side.start < 200 for side in whole.box)
        outside = torch.ones(whole.masks.shape[1:], dtype=torch.bool)
        outside[whole.box] = False
        assert not whole.masks[:, outside].any()
