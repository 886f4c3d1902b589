"""Masks of any system: scores by hand, the scores of a run's own evaluation, and what is refused."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from preceptor.cli.app import app
from preceptor.errors import UserError
from preceptor.segmentation.score import knows, score_file

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def write(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(voxels, affine).to_filename(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two cases of 8 x 6 x 4 voxels; b lacks t1. The reference is a slab of label 4 inside a slab of label 2."""
    rng = np.random.default_rng(0)
    reference = np.zeros((8, 6, 4), np.uint8)
    reference[2:6], reference[3:5] = 2, 4
    for case, modalities in (("a", ("flair", "t1")), ("b", ("flair",))):
        for modality in modalities:
            write(tmp_path / "data" / case / f"{case}_{modality}.nii.gz", rng.random((8, 6, 4), np.float32))
        write(tmp_path / "data" / case / f"{case}_seg.nii.gz", reference)
    return tmp_path / "data"


def slab(start: int, stop: int, label: int = 2) -> np.ndarray:
    voxels = np.zeros((8, 6, 4), np.uint8)
    voxels[start:stop] = label
    return voxels


def test_dice_and_distance_by_hand(data: Path, tmp_path: Path) -> None:
    """A slab of the voxels 1 to 5 along x (1 mm each) against 2 to 6: Dice 2 x 3 / 8, surfaces 1 mm apart."""
    for case, name in (("a", "a.nii.gz"), ("b", "b_seg.nii.gz")):
        write(tmp_path / "masks" / name, slab(1, 5) if case == "a" else slab(2, 6))
    scored = score_file(tmp_path / "masks", "brats/all/A", root=data)
    scores = {(row["id"], row["region"]): (row["dice"], row["hd95"]) for row in scored.rows}
    assert scores["a", "wt"] == pytest.approx((0.75, 1.0))
    assert scores["b", "wt"] == pytest.approx((1.0, 0.0))
    assert scores["a", "et"][0] == pytest.approx(0, abs=1e-8)
    assert {row["id"]: row["subset"] for row in scored.rows} == {"a": "flair+t1", "b": "flair"}
    assert scored.scores["n"] == 2
    assert scored.results["regions"] == ["et", "tc", "wt"]


def test_combinations_in_folders_and_names(data: Path, tmp_path: Path) -> None:
    for name in ("flair/a.nii.gz", "flair/b.nii.gz", "t1/a_seg.nii.gz", "a__t1+flair.nii.gz"):
        write(tmp_path / "masks" / name, slab(2, 6))
    scored = score_file(tmp_path / "masks", "brats/all/A", root=data)
    order = [(row["id"], row["subset"]) for row in scored.rows if row["region"] == "wt"]
    assert order == [("a", "flair"), ("a", "t1"), ("a", "flair+t1"), ("b", "flair")]
    assert all(row["dice"] == pytest.approx(1) for row in scored.rows if row["region"] == "wt")


@pytest.mark.parametrize("ids", [("site1__001", "site1__002"), ("a", "a__1"), ("a_", "_b")])
@pytest.mark.parametrize(
    "names", [["{}"], ["{}_seg"], ["{}__flair", "{}__t1", "{}__flair+t1"], ["t1/{}", "{}__flair_seg"]]
)
def test_ids_may_contain_what_separates_the_combination(tmp_path: Path, ids: tuple[str, str], names: list[str]) -> None:
    """Slabs of four voxels that overlap the reference in three (Dice 6/8) and in all of them (Dice 1)."""
    rng = np.random.default_rng(0)
    lines = ["case,flair,t1,mask"]
    for number, (id, start) in enumerate(zip(ids, (1, 2), strict=True)):
        for kind in ("flair", "t1"):
            write(tmp_path / f"{number}-{kind}.nii.gz", rng.random((8, 6, 4), np.float32))
        write(tmp_path / f"{number}-mask.nii.gz", slab(2, 6, label=1))
        lines.append(f"{id},{number}-flair.nii.gz,{number}-t1.nii.gz,{number}-mask.nii.gz")
        for name in names:
            write(tmp_path / "masks" / f"{name.format(id)}.nii.gz", slab(start, start + 4, label=1))
    (tmp_path / "cases.csv").write_text("\n".join(lines))
    scored = score_file(tmp_path / "masks", "volumes/all/A", root=tmp_path / "cases.csv")
    assert len(scored.rows) == 2 * len(names)
    assert {(row["id"], round(row["dice"], 6)) for row in scored.rows} == {(ids[0], 0.75), (ids[1], 1)}


def test_names_of_data_and_links_are_read_as_in_a_folder_of_cases(data: Path, tmp_path: Path) -> None:
    """A dash before seg (BraTS 2023), another name of a modality, and a link to a folder elsewhere."""
    for case in "ab":
        write(tmp_path / "elsewhere" / f"{case}-seg.nii.gz", slab(2, 6))
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "T2f").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "masks" / "a__t1n.nii.gz", slab(2, 6))
    scored = score_file(tmp_path / "masks", "brats/all/A", root=data)
    order = [(row["id"], row["subset"]) for row in scored.rows if row["region"] == "wt"]
    assert order == [("a", "flair"), ("a", "t1"), ("b", "flair")]
    write(tmp_path / "masks" / "a__t1+T1w.nii.gz", slab(2, 6))
    with pytest.raises(UserError, match="'t1' and 'T1w' are the same modality; give one of them"):
        score_file(tmp_path / "masks", "brats/all/A", root=data)
    (tmp_path / "masks" / "a__t1+T1w.nii.gz").unlink()
    (tmp_path / "masks" / "dead").symlink_to(tmp_path / "nothing")
    notes = score_file(tmp_path / "masks", "brats/all/A", root=data).results["notes"]
    assert any("1 links lead to nothing" in note for note in notes)


def test_another_orientation_of_the_same_grid_gives_the_same_scores(data: Path, tmp_path: Path) -> None:
    mirrored = AFFINE.copy()
    mirrored[0] = [-1, 0, 0, 7]
    for case in "ab":
        write(tmp_path / "masks" / f"{case}.nii.gz", slab(1, 5)[::-1], mirrored)
    scored = score_file(tmp_path / "masks", "brats/all/A", root=data)
    assert [row["dice"] for row in scored.rows if row["region"] == "wt"] == pytest.approx([0.75, 0.75])


def test_what_is_refused(data: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    shifted = AFFINE.copy()
    shifted[0, 3] = 5
    for name, voxels, affine, message in (
        ("b.nii.gz", slab(1, 5)[:7], AFFINE, "resample them to one grid"),
        ("b.nii.gz", slab(1, 5), shifted, "affines differ by up to 5 mm"),
        ("b.nii.gz", slab(1, 5, label=7), AFFINE, "label 7 is in no region"),
        ("b.nii.gz", slab(1, 5).astype(np.float32) / 4, AFFINE, "0.5 is not a label"),
        ("b__t1.nii.gz", slab(1, 5), AFFINE, "case b does not have the modality t1"),
        ("b__t2.nii.gz", slab(1, 5), AFFINE, "'t2' is not a modality"),
        ("other.nii.gz", slab(1, 5), AFFINE, r"1 masks are missing: b \(flair\)"),
    ):
        for old in masks.rglob("*.nii.gz"):
            old.unlink()
        write(masks / "a.nii.gz", slab(1, 5))
        write(masks / name, voxels, affine)
        with pytest.raises(UserError, match=message):
            score_file(masks, "brats/all/A", root=data)
    write(masks / "a_seg.nii.gz", slab(1, 5))
    with pytest.raises(UserError, match="are both masks of a from the same modalities"):
        score_file(masks, "brats/all/A", root=data)
    with pytest.raises(UserError, match=r"'brats/given/A' does not fit .*brats/by-patient/A .*brats/all/A"):
        score_file(masks, "brats/given/A", root=data)
    with pytest.raises(UserError, match="give --root DATA"):
        score_file(masks, "brats/all/A")
    with pytest.raises(UserError, match="is not a folder"):
        score_file(masks / "a.nii.gz", "brats/all/A", root=data)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="contains no mask of the 2 cases"):
        score_file(empty, "brats/all/A", root=data)


def test_which_protocols_are_of_masks() -> None:
    assert all(map(knows, ("brats/all/A", "phantom/made/A-post")))
    assert not any(map(knows, ("med-grit/given/strict", "vqa-rad/clean/451", "mine/A", "A")))


def test_the_command(data: Path, tmp_path: Path) -> None:
    for case in "ab":
        write(tmp_path / "masks" / f"{case}.nii.gz", slab(1, 5))
    arguments = ["score", str(tmp_path / "masks"), "--protocol", "brats/all/A", "--root", str(data)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for part in ("brats/all/A", "flair+t1", "75.0 %", "mean of 2"):
        assert part in done.output


@pytest.mark.slow
def test_the_masks_of_a_run_have_the_scores_of_its_evaluation(tmp_path: Path) -> None:
    """Every mask that the run would write, as files and scored from outside, gives its predictions file again."""
    import preceptor
    from preceptor.data.volumes import on_source_grid, save_mask
    from preceptor.pipeline.run_dir import read_predictions
    from preceptor.segmentation.data import examples
    from preceptor.segmentation.evaluate import label_map, whole_probabilities
    from preceptor.segmentation.experiment import SegmentationExperiment
    from preceptor.segmentation.subsets import subset_name
    from preceptor.tasks import load_recipe
    from tests.fault.tiny import LCKD, write_recipe

    torch.set_num_threads(1)
    settings = ["stages=[baseline]", "train.epochs=1", "data.phantom.test=2", f"output={tmp_path / 'run'}"]
    settings += ["data.spacing=[1.5,1.5,1.5]"]
    recipe = write_recipe(tmp_path, LCKD)
    preceptor.train(recipe, settings)
    run = load_recipe(str(recipe), settings)
    experiment = SegmentationExperiment.read(run)
    network = experiment.load(tmp_path / "run" / "model")
    cases = examples(run, experiment.data, "test", 0)
    for key, post in (("A", None), ("A-post", run.evaluation)):
        for index in range(len(cases)):
            case = cases.whole(index)
            for subset, probabilities in whole_probabilities(network, case, run):
                folder = tmp_path / key / subset_name(subset, cases.modalities)
                folder.mkdir(parents=True, exist_ok=True)
                label = on_source_grid(label_map(probabilities, cases.regions, post), case.loaded)
                save_mask(folder / f"{case.id}.nii.gz", label, case.loaded)
        scored = score_file(tmp_path / key, f"phantom/made/{key}", root=tmp_path / "run")
        rows = read_predictions(tmp_path / "run", f"phantom/made/{key}")
        order = lambda row: (row["id"], row["subset"], row["region"])  # noqa: E731
        assert sorted(scored.rows, key=order) == sorted(rows, key=order)
