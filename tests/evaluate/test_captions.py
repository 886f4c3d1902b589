"""Against the package's own evaluation of a fixed file."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import pytest

from preceptor.errors import UserError
from preceptor.evaluate import captions

REFERENCES = {
    "1": ["There is a small nodule in the left upper lobe.", "A nodule in the left lung."],
    "2": ["The heart is enlarged; no effusion is seen."],
    "3": ["Oedema surrounds an enhancing tumour of the right temporal lobe."],
    "4": ["Normal."],
}
RESPONSES = {
    "1": "A small nodule is in the left lung.",
    "2": "The heart is of normal size.\nNo effusion!",
    "3": "An enhancing tumour of the right temporal lobe with oedema.",
    "4": "",
}
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java")


@needs_java
@pytest.mark.slow
def test_the_scores_are_those_of_the_package(tmp_path, monkeypatch):
    import pycocoevalcap.eval as package
    from pycocotools.coco import COCO

    class NoSpice:  # SPICE downloads a model
        def method(self):
            return "SPICE"

        def compute_score(self, wanted, said):
            return 0.0, [0.0] * len(wanted)

    monkeypatch.setattr(package, "Spice", NoSpice)
    annotations = [
        {"id": n, "image_id": int(key), "caption": text}
        for n, (key, text) in enumerate((key, text) for key, texts in REFERENCES.items() for text in texts)
    ]
    truth = {"images": [{"id": int(key)} for key in REFERENCES], "annotations": annotations, "type": "captions",
             "info": {}, "licenses": []}  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    said = [{"image_id": int(key), "caption": text or "."} for key, text in RESPONSES.items()]
    (tmp_path / "said.json").write_text(json.dumps(said))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "truth.json"))
        run = package.COCOEvalCap(coco, coco.loadRes(str(tmp_path / "said.json")))
        run.evaluate()
    got = captions.caption_scores(REFERENCES, RESPONSES)
    names = {"bleu_1": "Bleu_1", "bleu_2": "Bleu_2", "bleu_3": "Bleu_3", "bleu_4": "Bleu_4", "meteor": "METEOR",
             "rouge_l": "ROUGE_L", "cider": "CIDEr"}  # fmt: skip
    for ours, theirs in names.items():
        assert got[ours] == pytest.approx(run.eval[theirs], abs=1e-9), ours
    assert got["mbmr"] == pytest.approx(sum(got[name] for name in list(names)[:6]) / 6)
    assert 0.1 < got["mbmr"] < 0.9
    same = captions.caption_scores(REFERENCES, {key: texts[0] for key, texts in REFERENCES.items()})
    assert same["rouge_l"] == pytest.approx(1)
    assert same["bleu_1"] == pytest.approx(1)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="Java"):
        captions.caption_scores({"a": ["b"]}, {"a": "b"})
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"preceptor\[captions\]"):
        captions.caption_scores({"a": ["b"]}, {"a": "b"})


def test_ids_must_agree(monkeypatch):
    monkeypatch.setattr(captions, "require_captions", lambda: None)
    with pytest.raises(UserError, match="'b'"):
        captions.caption_scores({"a": ["x"]}, {"a": "x", "b": "y"})
    with pytest.raises(UserError, match="at least one"):
        captions.caption_scores({}, {})
    with pytest.raises(UserError, match="at least one"):
        captions.caption_scores({"a": []}, {"a": "x"})
