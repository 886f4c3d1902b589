"""Fingerprints of data sets: fixed values, and what they depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from preceptor.data.types import Case, Dataset, Dialogue, GroundingDataset, Sample, SegmentationDataset, VolumeFile

SAMPLES = [
    Sample("a", Path("x/ü.png"), "Qü?", ("yes", "ja"), "closed", "g", "train", "t", {"a": "b"}),
    Sample("b", Path("x/y.png"), "Q?", (), "open", "g2", "test"),
]
FILE = VolumeFile(Path("f/é.nii"), 2)
CASES = [
    Case("c", {"t2": FILE, "t1": VolumeFile(Path("q"))}, FILE, "g", "train"),
    Case("d", {"t1": FILE}, None, "é", "test"),
]
DIALOGUES = [Dialogue("d", (Path("a/ä.png"),), (("q", "a"), ("w", "ü")), "vg", "ct", "g", "train")]

QUESTIONS = Dataset("x", "y", Path(), SAMPLES)
VOLUMES = SegmentationDataset("x", "y", Path(), CASES, modalities=("t1", "t2"), regions={"é": (1, 2)})
GROUNDING = GroundingDataset("x", "y", Path(), DIALOGUES)


@pytest.mark.parametrize(
    ("data", "sha256"),
    [
        (QUESTIONS, "8f4fe80f9e0a12ab56ab87203ed4e71cb71c509adc6ac372c3a8d04fde44b50c"),
        (VOLUMES, "b5e4753ac4559c1385df104d2323b16641438dd6264d28e4349d30b4e40aaa42"),
        (GROUNDING, "bdd1c6a0aa680763f1cdbcafaadf8514106fd8a7fc3ac8d33661edca7859ef92"),
    ],
)
def test_fingerprints_keep_the_values_of_stored_results(data, sha256):
    assert data.fingerprint() == sha256


@pytest.mark.parametrize("data", [QUESTIONS, VOLUMES, GROUNDING])
def test_a_fingerprint_ignores_folders_and_notes_but_not_the_group(data):
    assert replace(data, root=Path("elsewhere"), notes=["a note"]).fingerprint() == data.fingerprint()
    changed = [replace(data.samples[0], group="other"), *data.samples[1:]]
    assert replace(data, samples=changed).fingerprint() != data.fingerprint()


@pytest.mark.parametrize("data", [QUESTIONS, VOLUMES])
def test_the_fingerprint_of_a_split_depends_on_its_samples_only(data):
    assert replace(data, samples=data.split("test")).fingerprint() == data.fingerprint("test") != data.fingerprint()
