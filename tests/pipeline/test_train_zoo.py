"""The script that trains and packs the ready models, hardly trained."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import preceptor

SCRIPT = Path(__file__).parents[2] / "bench" / "train_zoo.py"


@pytest.mark.slow
def test_a_model_is_trained_packed_and_answers(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "zoo"), "--models", "mhkd-demo", "--quick"]
    for _ in range(2):  # the second call reads back what is there
        subprocess.run(command, check=True, capture_output=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    release = tmp_path / "zoo" / "release"
    packed = release / "mhkd-demo.zip"
    checksum, name = (release / "SHA256SUMS").read_text().split()
    assert (checksum, name) == (hashlib.sha256(packed.read_bytes()).hexdigest(), packed.name)
    with zipfile.ZipFile(packed) as file:
        assert {"README.md", "SOURCES.txt", "results.json", "model.safetensors"} <= set(file.namelist())
        assert json.loads(file.read("results.json"))["stage"] == "distilled"
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(tmp_path / "image.png")
    assert preceptor.load(packed).answer(tmp_path / "image.png", "Is there a mass?").text
