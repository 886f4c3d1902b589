"""The client against a server that others wrote: `transformers serve` on loopback, with a tiny Qwen2-VL.

That server has a Qwen-VL model's images read by the library's own processor, which wants torchvision. Where there is
none, the processor of another family that expands image placeholders by the same rule is named in the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from preceptor.cli.app import app
from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.endpoint import AskSettings, EndpointTeacher
from preceptor.grounding.labeling import teach
from preceptor.grounding.local_teacher import LocalTeacher
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.pseudo_labels import ContentHashes, Prompt, prompts_of_turn
from preceptor.grounding.sources import read_dialogues
from preceptor.teachers.chat_client import ClientSettings
from preceptor.teachers.label_store import Label, read_labels
from tests.grounding.asked_data import data, image
from tests.grounding.speaking_vlm import speaking_vlm
from tests.grounding.test_teach_command import file_of

pytestmark = pytest.mark.slow


def servable(folder: Path) -> Path:
    """Return a copy of a model's folder that the server can read images for; sampling is on unless asked otherwise."""
    made = Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-served")))
    changes = {
        "tokenizer_config.json": {"image_token": "<|image_pad|>"},
        "preprocessor_config.json": {"processor_class": "PaddleOCRVLProcessor"},
        "generation_config.json": {"do_sample": True, "temperature": 1.0, "top_k": 0},
    }
    for name, change in changes.items():
        there = json.loads((made / name).read_text())
        (made / name).write_text(json.dumps({**there, **change}))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return speaking_vlm(tmp_path_factory.mktemp("vlm") / "m")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[tuple[str, str]]:
    """Give the address and the model's name."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    model = str(servable(folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.txt"
    program = "from transformers.cli.transformers import main; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        deadline = time.monotonic() + 300
        health = f"http://127.0.0.1:{port}/health"
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(health, timeout=5):
                    break
            except OSError:  # also urllib's errors
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(who: EndpointTeacher | LocalTeacher, asked: list[Prompt]) -> dict[str, Label]:
    labels: list[Label] = []
    assert not who.answer(asked, set(), labels.extend)
    return {label.key: label for label in labels}


def test_it_answers_as_the_model_does_here(folder, server, tmp_path):
    """The same questions to the same weights, through the server and without: every image and every turn arrives."""
    url, model = server
    rows = data(tmp_path, 3, 2).samples
    two = image(tmp_path, 50, side=60)
    rows.append(Dialogue("two", (two, rows[0].images[0]), (("Question about image?", ""),), "mia", "ct", "g", "train"))
    rows.append(Dialogue("none", (), (("Question about image?", ""),), "mia", "ct", "g", "train"))
    asked = list(prompts_of_turn(rows, 0, ContentHashes(), {}))
    turns = (("Question?", "the liver"), ("The image?", ""))
    asked.append(Prompt("cd" * 32, 1, Dialogue("d", (two,), turns, "mia", "ct", "g", "train")))
    client = ClientSettings(url, timeout=60)
    here = answers(LocalTeacher(GroundedVlm.load(folder), max_tokens=8), asked)
    there = answers(EndpointTeacher(model, client, AskSettings(max_tokens=8), concurrent=2), asked)
    assert {key: label.answer for key, label in there.items()} == {key: label.answer for key, label in here.items()}
    assert {key: label.ended for key, label in there.items()} == {key: label.ended for key, label in here.items()}
    assert len({label.answer for label in there.values()}) > len(there) // 2  # the images matter
    # This server knows neither log-probabilities nor several answers at once.
    assert {label.confidence for label in there.values()} == {None}


def test_several_answers_and_their_agreement(server, tmp_path):
    url, model = server
    asked = list(prompts_of_turn(data(tmp_path, 2, 1).samples, 0, ContentHashes(), {}))
    ask = AskSettings(temperature=1.0, candidates=3, max_tokens=3)
    labels = answers(EndpointTeacher(model, ClientSettings(url, timeout=60), ask, concurrent=1), asked)
    for label in labels.values():
        assert len(label.candidates) == 3
        assert label.source == "agreement"
        assert label.confidence is not None
        assert label.confidence >= 1 / 3 - 1e-6
    assert any(len(set(label.candidates)) > 1 for label in labels.values())


def test_a_model_that_it_does_not_have_stops_all(server, tmp_path):
    url, _ = server
    asked = list(prompts_of_turn(data(tmp_path, 2, 2).samples, 0, ContentHashes(), {}))
    who = EndpointTeacher("other/model", ClientSettings(url, max_failures=2), concurrent=1)
    with pytest.raises(UserError, match=r"2 requests in a row have failed, .* it answers with 400 .*pinned"):
        who.answer(asked, set(), lambda labels: None)


def test_the_command_goes_on_where_it_stopped(server, tmp_path):
    url, model = server
    file = file_of(tmp_path, 6)
    given = [
        "teach",
        str(file),
        "--endpoint",
        url,
        "--model",
        model,
        "--output",
        str(tmp_path / "store"),
        "--yes",
        "--max-tokens",
        "4",
        "--min-usable",  # the answers of an untrained model are not usable
        "0",
        "--json",
    ]
    done = CliRunner().invoke(app, [*given, "--limit", "2"])
    assert json.loads(done.stdout)["answered"] == 2
    done = CliRunner().invoke(app, given)
    document = json.loads(done.stdout)
    assert (document["before"], document["answered"]) == (2, 4)
    assert document["tokens"] > 4 * 4
    whole = read_dialogues(str(file))
    assert (
        teach(
            tmp_path / "again",
            whole,
            whole.samples,
            EndpointTeacher(model, ClientSettings(url), AskSettings(max_tokens=4)),
        ).answered
        == 6
    )
    kept = [{label.key: label.answer for label in read_labels(tmp_path / name)} for name in ("store", "again")]
    assert kept[0] == kept[1]
