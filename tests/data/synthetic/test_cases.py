from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.segmentation.check import check_cases
from preceptor.data.synthetic.anatomy import MR_CONTRASTS
from preceptor.data.synthetic.cases import SPLIT, write_phantom_cases
from preceptor.data.synthetic.tumour import SPACING_48, make_tumour_case
from preceptor.data.volumes import load_case
from preceptor.errors import UserError
from preceptor.segmentation.intensity import normalise
from tests.data.volume_files import REGIONS

ARGUMENTS = {"train": 3, "validation": 1, "test": 2, "seed": 3, "size": 32}


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_phantom_cases(tmp_path_factory.mktemp("phantom") / "cases", **ARGUMENTS)


def test_it_is_read_as_brats(folder):
    data = read_volumes(folder, split_file=folder / SPLIT)
    assert data.modalities == ("flair", "t1", "t1ce", "t2")
    assert data.regions == REGIONS
    assert [len(data.split(part)) for part in ("train", "validation", "test")] == [3, 1, 2]
    assert check_cases(data) == []
    loaded = load_case(data.samples[0], data)
    case = make_tumour_case(3, 0, size=32)
    # The phantom's axes run from front to back and from right to left, those of a loaded case the other way.
    assert np.array_equal(loaded.label, case.label[:, ::-1, ::-1])
    assert np.array_equal(loaded.images["t2"], case.contrasts["t2"][:, ::-1, ::-1])
    assert loaded.spacing == pytest.approx([SPACING_48 * 1.5] * 3)
    assert "SYNTHETIC" in (folder / "README.txt").read_text()


def test_same_arguments_same_bytes(folder, tmp_path):
    write_phantom_cases(tmp_path / "again", **ARGUMENTS)
    assert digest(tmp_path / "again") == digest(folder)
    other = write_phantom_cases(tmp_path / "other", **{**ARGUMENTS, "seed": 4})
    assert digest(other)["PHANTOM_000/PHANTOM_000_t1.nii.gz"] != digest(folder)["PHANTOM_000/PHANTOM_000_t1.nii.gz"]
    image = nibabel.load(folder / "PHANTOM_000" / "PHANTOM_000_t1.nii.gz")
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    assert image.get_data_dtype() == np.int16


def test_it_is_used_again_and_anything_else_is_refused(folder, tmp_path):
    before = digest(folder)
    assert write_phantom_cases(folder, **ARGUMENTS) == folder
    assert digest(folder) == before
    with pytest.raises(UserError, match="does not contain the requested phantom"):
        write_phantom_cases(folder, **{**ARGUMENTS, "train": 4})
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "PHANTOM_001" / "PHANTOM_001_t2.nii.gz").unlink()
    with pytest.raises(UserError, match="changed after it was written"):
        write_phantom_cases(copy, **ARGUMENTS)


def test_missing_modalities(tmp_path):
    folder = write_phantom_cases(tmp_path / "m", train=40, validation=0, test=0, seed=1, size=32, missing=0.3)
    held = [len(list(case.glob("*_[tf]*.nii.gz"))) for case in sorted(folder.glob("PHANTOM_*"))]
    assert len(held) == 40
    assert min(held) >= 1
    # 160 files, each missing with probability 0.3: the standard deviation of the share is 3.6 %.
    assert 1 - np.sum(held) / 160 == pytest.approx(0.3, abs=0.11)
    data = read_volumes(folder, split_file=folder / SPLIT, validation_fraction=0)
    assert data.modalities == ("flair", "t1", "t1ce", "t2")
    assert sum(len(case.images) for case in data.samples) == sum(held)
    whole = make_tumour_case(1, 0, size=32)
    for name, file in data.samples[0].images.items():
        assert np.array_equal(load_case(data.samples[0]).images[name], whole.contrasts[name][:, ::-1, ::-1]), file


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"train": -1}, "train=-1"), ({"missing": 0.9}, "missing=0.9"), ({"size": 16}, "size=16")],
)
def test_numbers_that_do_not_fit(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        write_phantom_cases(tmp_path / "x", **{**ARGUMENTS, **wrong})
    assert not (tmp_path / "x").exists()


def test_every_case_has_a_tumour_of_usable_size():
    for index in range(12):
        case = make_tumour_case(9, index)
        counts = np.bincount(case.label.reshape(-1), minlength=5)
        assert counts[4] >= 0.0008 * case.label.size
        assert counts[2] >= 0.002 * case.label.size
        assert counts[3] == 0
        assert set(case.contrasts) == set(MR_CONTRASTS)
        background = [volume == 0 for volume in case.contrasts.values()]
        assert all(np.array_equal(mask, background[0]) for mask in background)
        assert not case.label[background[0]].any()
        assert 0.15 < 1 - background[0].mean() < 0.4


@pytest.mark.slow
def test_modalities_differ_by_region_as_in_brats():
    """Dice of the best Bayes classifier on one modality's smoothed brightness, without any context.

    For each region two histograms (inside and outside) over brightness at two scales give the likelihood ratio; the
    threshold is the best of the training cases. The order of modalities is that of published single-modality results:
    t1ce first for et, flair and t2 for wt, and t1 last.
    """
    cases = [make_tumour_case(11, index) for index in range(36)]
    dice = {
        (contrast, region): bayes_dice(cases, contrast, values)
        for contrast in MR_CONTRASTS
        for region, values in REGIONS.items()
    }
    print(json.dumps({f"{c} {r}": round(100 * value, 1) for (c, r), value in dice.items()}))
    assert dice["t1ce", "et"] > 1.15 * max(dice[c, "et"] for c in ("t1", "t2", "flair"))
    assert dice["t1ce", "tc"] > dice["t1", "tc"]
    assert dice["flair", "wt"] > dice["t2", "wt"] > 1.3 * dice["t1", "wt"]
    assert dice["flair", "wt"] > 1.3 * dice["t1ce", "wt"]
    for region in ("et", "tc"):
        assert dice["t1", region] == min(dice[contrast, region] for contrast in MR_CONTRASTS)


def bayes_dice(cases, contrast: str, values: tuple[int, ...], bins: int = 32) -> float:
    codes, truth = [], []
    for case in cases:
        inside = case.contrasts[contrast] > 0
        image = normalise(case.contrasts[contrast], "percentile")
        scales = [gaussian_filter(image, sigma)[inside] for sigma in (0.8, 2.0)]
        a, b = (np.clip(((scale + 3) / 6 * bins).astype(int), 0, bins - 1) for scale in scales)
        codes.append(a * bins + b)
        truth.append(np.isin(case.label[inside], values))
    half = 2 * len(cases) // 3
    x, y = np.concatenate(codes[:half]), np.concatenate(truth[:half])
    counts = [np.bincount(x[y == side], minlength=bins * bins).reshape(bins, bins) for side in (False, True)]
    out, ins = (gaussian_filter(count.astype(float), 0.7) + 1e-3 for count in counts)
    chance = (ins / (ins + out)).reshape(-1)

    def mean_dice(codes, truth, level):
        hits = [(chance[c] > level, t) for c, t in zip(codes, truth, strict=True)]
        return np.mean([2 * (h & t).sum() / max(1, h.sum() + t.sum()) for h, t in hits])

    best = max((0.05, 0.1, 0.2, 0.3, 0.4, 0.5), key=lambda level: mean_dice(codes[:half], truth[:half], level))
    return float(mean_dice(codes[half:], truth[half:], best))
