from __future__ import annotations

import pytest

from preceptor.errors import UserError
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.segmentation.data import examples, read_cases
from preceptor.tasks import load_recipe

SMALL = [
    "data.phantom.train=5",
    "data.phantom.validation=2",
    "data.phantom.test=2",
    "data.phantom.size=32",
    "data.patch_size=[16, 16, 16]",
    "data.train_share=1",
    "data.unlabelled=none",
]


def recipe(*overrides: str) -> SegmentationRecipe:
    found = load_recipe("lckd-demo", [*SMALL, *overrides])
    assert isinstance(found, SegmentationRecipe)
    return found


def test_what_the_share_leaves_out_is_there_without_its_masks(tmp_path):
    whole = read_cases(recipe().data, tmp_path)
    thin = read_cases(recipe("data.train_share=0.4").data, tmp_path)
    rest = recipe("data.train_share=0.4", "data.unlabelled=rest")
    both = read_cases(rest.data, tmp_path)
    assert len(whole.split("train")) == 5
    assert len(thin.split("train")) == len(both.split("train")) == 2
    assert not thin.split("unlabelled")
    left = {case.id for case in both.split("unlabelled")}
    assert left | {case.id for case in both.split("train")} == {case.id for case in whole.split("train")}
    assert all(case.mask is None for case in both.split("unlabelled"))
    assert "In addition, 3 cases without masks were used (data.unlabelled)." in both.notes
    for part in ("validation", "test"):
        assert both.split(part) == whole.split(part)
    train = examples(rest, both, "train", 0, unlabelled=True)
    assert len(train) == 5
    batch = train.collate([train[i, 0] for i in range(5)])
    assert batch["labelled"].tolist() == [True, True, False, False, False]
    assert not batch["masks"][2:].any()
    assert batch["images"][2:].any()


@pytest.mark.parametrize("cut", [["data.validation_fraction=0.3"], ["data.fold=1", "data.folds=3"]])
def test_cases_without_masks_do_not_change_who_is_tested(tmp_path, cut):
    """Nor are they drawn for validation or testing, where they would be of no use."""
    for case in read_cases(recipe().data, tmp_path).samples[:3]:
        assert case.mask is not None
        case.mask.path.unlink()
    here = ["data.name=volumes", f"data.root={tmp_path}", "data.split_file=null", *cut]
    plain, rest = (read_cases(recipe(*here, f"data.unlabelled={u}").data, tmp_path) for u in ("none", "rest"))
    for part in ("train", "validation", "test"):
        assert [case.id for case in rest.split(part)] == [case.id for case in plain.split(part)]
        assert plain.split(part)
    assert len(rest.split("unlabelled")) == 3


def test_cases_that_never_had_masks_are_taken_in_or_refused(tmp_path):
    first = read_cases(recipe().data, tmp_path).split("train")[0]
    assert first.mask is not None
    first.mask.path.unlink()
    here = ["data.name=brats", f"data.root={tmp_path}", f"data.split_file={tmp_path / 'splits.json'}"]
    plain = recipe(*here)
    with pytest.raises(UserError, match=f"case '{first.id}' is not in the data"):
        read_cases(plain.data, tmp_path)
    rest = recipe(*here, "data.unlabelled=rest")
    data = read_cases(rest.data, tmp_path)
    assert [case.id for case in data.split("unlabelled")] == [first.id]
    assert len(data.split("train")) == 4


@pytest.mark.parametrize(
    ("settings", "accepted"),
    [
        (["method.full.weight=1"], True),
        (["method.cross_modal.levels=all"], True),
        (["method.cross_modal.levels=all", "method.teachers=single"], True),
        (["method.cross_modal.levels=all", "method.teachers=per_task"], False),  # needs masks
        (["method.cross_modal.levels=all", "method.cross_modal.weight=0"], False),
        (["method.cross_modal.levels=bottleneck"], False),
        (["method.cross_modal.levels=bottleneck", "stages=[baseline]"], True),
    ],
)
def test_unlabelled_needs_something_that_teaches_without_masks(settings, accepted):
    choices = ["data.train_share=0.4", "data.unlabelled=rest", "method.full.weight=0", *settings]
    if accepted:
        recipe(*choices)
    else:
        with pytest.raises(UserError, match=r"method\.full\.weight above 0.*method\.cross_modal\.levels=all"):
            recipe(*choices)


def test_unlabelled_needs_cases_without_masks(tmp_path):
    rest = recipe("data.unlabelled=rest")
    with pytest.raises(UserError, match=r"set it below 1"):
        read_cases(rest.data, tmp_path)
