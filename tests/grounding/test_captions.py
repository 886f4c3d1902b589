"""Against the package's own evaluation of a fixed file."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess

import pytest

from preceptor.errors import UserError
from preceptor.grounding import captions

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


def caption_scores(references, responses):
    return captions.caption_scores_by_group([(references, responses)])[0]


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
    truth = {
        "images": [{"id": int(key)} for key in REFERENCES],
        "annotations": annotations,
        "type": "captions",
        "info": {},
        "licenses": [],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    said = [{"image_id": int(key), "caption": text or "."} for key, text in RESPONSES.items()]
    (tmp_path / "said.json").write_text(json.dumps(said))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "truth.json"))
        run = package.COCOEvalCap(coco, coco.loadRes(str(tmp_path / "said.json")))
        run.evaluate()
    got = caption_scores(REFERENCES, RESPONSES)
    names = {
        "bleu_1": "Bleu_1",
        "bleu_2": "Bleu_2",
        "bleu_3": "Bleu_3",
        "bleu_4": "Bleu_4",
        "meteor": "METEOR",
        "rouge_l": "ROUGE_L",
        "cider": "CIDEr",
    }
    for ours, theirs in names.items():
        assert got[ours] == pytest.approx(run.eval[theirs], abs=1e-9), ours
    assert got["mbmr"] == pytest.approx(sum(got[name] for name in list(names)[:6]) / 6)
    assert 0.1 < got["mbmr"] < 0.9
    same = caption_scores(REFERENCES, {key: texts[0] for key, texts in REFERENCES.items()})
    assert same["rouge_l"] == pytest.approx(1)
    assert same["bleu_1"] == pytest.approx(1)


GROUPS = [
    (REFERENCES, RESPONSES),
    # What a line becomes depends on the next one, and on whether there is one.
    ({"a": ["The U.S. Corp."], "b": ["It is 5 p.m."], "c": ["Smith Corp."]}, {"a": "U.S.", "b": "p.m.", "c": "Corp."}),
    ({"x": ["Ödem rechts (5 mm), s. o.", "Oedema"]}, {"x": "Ödem ||| links \u2028 unten"}),
    ({"x": ["An organ."], "z": ["..."]}, {"x": "...", "z": "no"}),
]


@needs_java
@pytest.mark.slow
def test_groups_are_scored_as_the_packages_own_classes_score_each(monkeypatch, capfd):
    """In two starts of Java, and without a word of it on the terminal."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    started = []
    real = subprocess.Popen.__init__

    def counted(self, args, *rest, **named):
        started.append(args[0])
        real(self, args, *rest, **named)

    monkeypatch.setattr(subprocess.Popen, "__init__", counted)
    found = captions.caption_scores_by_group(GROUPS)
    assert started == ["java", "java"]
    assert capfd.readouterr() == ("", "")
    meteor = Meteor()
    # The other way round, so that a program that remembers earlier groups would be noticed.
    for (references, responses), got in reversed(list(zip(GROUPS, found, strict=True))):
        one_line = {i: [{"caption": " ".join(t.split())} for t in ts] for i, ts in references.items()}
        wanted = PTBTokenizer().tokenize(one_line)
        said = PTBTokenizer().tokenize({i: [{"caption": " ".join(t.split()) or "."}] for i, t in responses.items()})
        assert captions._tokenised([references, {i: [t] for i, t in responses.items()}]) == [wanted, said]
        bleu = Bleu(4).compute_score(wanted, said, verbose=0)[0]
        theirs = [*bleu, *(of.compute_score(wanted, said)[0] for of in (meteor, Rouge(), Cider()))]
        assert [got[name] for name in captions.METRICS] == theirs


def test_references_without_a_word(monkeypatch):
    monkeypatch.setattr(captions, "require_captions", lambda: None)
    monkeypatch.setattr(captions, "_tokenised", lambda sets: [{"a": [""]}, {"a": ["no"]}])
    monkeypatch.setattr(captions, "_meteor", lambda pairs: [0.0])
    assert caption_scores({"a": ["..."]}, {"a": "no"})["cider"] == 0


def test_a_java_that_fails_is_said(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'Error: could not reserve memory' >&2\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"failed with code 3 \(Error: could not reserve memory\)"):
        caption_scores({"a": ["b"]}, {"a": "b"})
    monkeypatch.setattr(captions, "_tokenised", lambda sets: [{"a": ["b"]}, {"a": ["b"]}])
    java.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(UserError, match="the Java program of METEOR failed"):
        caption_scores({"a": ["b"]}, {"a": "b"})


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="Java"):
        caption_scores({"a": ["b"]}, {"a": "b"})
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"preceptor\[captions\]"):
        caption_scores({"a": ["b"]}, {"a": "b"})


def test_ids_must_agree(monkeypatch):
    monkeypatch.setattr(captions, "require_captions", lambda: None)
    with pytest.raises(UserError, match="'b'"):
        caption_scores({"a": ["x"]}, {"a": "x", "b": "y"})
    with pytest.raises(UserError, match="at least one"):
        caption_scores({}, {})
    with pytest.raises(UserError, match="at least one"):
        caption_scores({"a": []}, {"a": "x"})
