from pathlib import Path

import pytest

from preceptor.data.types import Dataset, Prediction, Sample
from preceptor.errors import UserError
from preceptor.vqa.metrics import score
from preceptor.vqa.protocols import protocol_named, protocols_for, settings_for


def sample(id, part, phrase_type=""):
    return Sample(id, Path("x.jpg"), "q", ("yes",), "closed", "x", part, tags={"phrase_type": phrase_type})


def data(name, split, leaking=False):
    samples = [
        sample("train", "train", "freeform"),
        sample("validation", "validation", "freeform"),
        sample("free", "test", "test_freeform"),
        sample("paraphrase", "test", "test_para"),
        # Only the part decides what is test: a row that a split trains on is never scored.
        sample("moved", "train", "test_freeform"),
    ]
    return Dataset(name, split, Path("."), samples, leaking=leaking)


def selected(data, protocol):
    return [s.id for s in data.samples if protocol.select(s)]


def test_vqa_rad_has_both_customs():
    rad = data("vqa-rad", "clean")
    protocols = protocols_for(rad)
    assert [p.id for p in protocols] == ["vqa-rad/clean/451", "vqa-rad/clean/freeform308"]
    assert [selected(rad, p) for p in protocols] == [["free", "paraphrase"], ["free"]]
    assert not any("leak" in p.describes for p in protocols)


def test_a_leaking_split_says_so():
    assert all("leaks" in p.describes for p in protocols_for(data("vqa-rad", "published", leaking=True)))


@pytest.mark.parametrize(("variant", "id"), [("fold0", "mine/fold0"), ("", "mine/test")])
def test_a_table_has_one(variant, id):
    mine = data("mine", variant)
    (protocol,) = protocols_for(mine)
    assert protocol.id == id
    assert selected(mine, protocol) == ["free", "paraphrase"]


def test_named():
    rad = data("vqa-rad", "clean")
    assert protocol_named(rad, "vqa-rad/clean/freeform308").id == "vqa-rad/clean/freeform308"
    with pytest.raises(UserError, match=r"'vqa-rad/clean/450'; did you mean 'vqa-rad/clean/451'\?"):
        protocol_named(rad, "vqa-rad/clean/450")


@pytest.mark.parametrize(
    ("name", "variant", "ids"),
    [
        ("vqa-rad", "hub", ["vqa-rad/hub/451"]),
        ("vqa-med-2019", "test", ["vqa-med-2019/strict", "vqa-med-2019/bleu"]),
        ("vqa-med-2019", "val", ["vqa-med-2019/val/strict", "vqa-med-2019/val/bleu"]),
        ("slake", "en", ["slake-en"]),
        ("slake", "both", ["slake-en", "slake-zh"]),
        ("slake", "both-published", ["slake-en/published", "slake-zh/published"]),
        ("path-vqa", "official", ["path-vqa"]),
    ],
)
def test_every_data_set_has_its_own(name, variant, ids):
    protocols = protocols_for(data(name, variant))
    assert [p.id for p in protocols] == ids
    for protocol in protocols:
        settings = settings_for(protocol.id)
        assert settings is not None
        assert settings["name"] == name
        if name in ("vqa-rad", "vqa-med-2019"):
            assert settings["variant"] == variant


def test_slake_scores_the_questions_of_its_language():
    slake = Dataset(
        "slake",
        "both",
        Path("."),
        [
            Sample(language, Path("x.jpg"), "q", ("yes",), "closed", "x", "test", tags={"language": language})
            for language in ("en", "zh")
        ],
    )
    assert [selected(slake, p) for p in protocols_for(slake)] == [["en"], ["zh"]]


@pytest.mark.parametrize("variant", ["val", "test"])
def test_vqa_med_counts_yes_and_no_apart_as_its_published_tables_do(variant):
    kinds = [("open", "modality"), ("closed", "modality"), ("open", "plane"), ("closed", "abnormality")]
    med = Dataset(
        "vqa-med-2019",
        variant,
        Path("."),
        [
            Sample(str(n), Path("x.jpg"), "q", ("no",), kind, "x", "test", category)
            for n, (kind, category) in enumerate(kinds)
        ],
    )
    said = [Prediction(sample.id, "no", 1.0) for sample in med.samples[:3]] + [Prediction("3", "yes", 1.0)]
    for protocol in protocols_for(med):
        types = score(med.samples, said, protocol).question_types()
        assert {name: found["n"] for name, found in types.items()} == {"modality": 1, "plane": 1, "yes/no": 2}
        assert types["yes/no"]["accuracy"] == 0.5


def test_ids_of_other_data_name_no_public_data_set():
    assert [settings_for(id) for id in ("mine/test", "vqa-rad", "slake", "phantom/given")] == [None] * 4
