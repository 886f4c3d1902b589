"""Uploads to the Hugging Face hub, against a local server that answers the requests of an upload."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import preceptor
from preceptor.errors import UserError
from preceptor.vqa.bundle import VqaBundle
from tests.vqa.conftest import make_bundle, make_data

CARD = "---\nlicense: mit\ntags: [preceptor]\n---\n# A tiny model\n"


@dataclass
class Hub:
    """What a hub received: the requests for repositories, the committed files by path, the tokens of all requests."""

    address: str = ""
    repositories: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    refuses: bool = False


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def answer(self, document: Any, status: int = 200) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            body = self.body()
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.refuses:
                self.answer({"error": "You have no write access"}, 403)
            elif self.path == "/api/repos/create":
                hub.repositories.append(json.loads(body))
                self.answer({"url": f"{hub.address}/someone/tiny"})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                self.answer({"files": files})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    one | {"actions": {"upload": {"href": f"{hub.address}/large/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        hub.files[value["path"]] = hub.large[value["oid"]]
                self.answer({"commitUrl": f"{hub.address}/someone/tiny/commit/{'0' * 40}", "commitOid": "0" * 40})
            else:
                self.answer({"error": f"unexpected request {self.path}"}, 404)

        def do_PUT(self) -> None:
            hub.large[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

        def do_GET(self) -> None:
            self.answer({"error": "not found"}, 404)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # upload to the server, not to a storage service
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with an untrained model and its card."""
    root = tmp_path_factory.mktemp("hub")
    make_bundle(make_data(root / "data"), 16, 0).save(root / "run" / "model")
    (root / "run" / "model" / "README.md").write_text(CARD)
    (root / "run" / "log.txt").write_text("not part of the model")
    return root / "run"


def test_the_files_of_the_model_folder_arrive(hub: Hub, run: Path, tmp_path: Path) -> None:
    assert constants.HF_HUB_OFFLINE, "the tests run offline, as every other function does"
    address = preceptor.push_to_hub(run, "someone/tiny", token="hf_secret")
    assert address.startswith(f"{hub.address}/someone/tiny/commit/")
    assert constants.HF_HUB_OFFLINE
    (repository,) = hub.repositories
    assert (repository["organization"], repository["name"]) == ("someone", "tiny")
    assert repository["visibility"] == "private"
    assert hub.tokens == {"Bearer hf_secret"}
    expected = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    assert hub.files == expected
    assert hub.files["README.md"].decode() == CARD
    assert "model.safetensors" in hub.files
    # What arrived is a model folder.
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert VqaBundle.load(tmp_path).vocabulary.answers == VqaBundle.load(run / "model").vocabulary.answers


def test_a_refused_upload_is_an_error_of_one_sentence(hub: Hub, run: Path) -> None:
    hub.refuses = True
    with pytest.raises(UserError, match="someone/tiny cannot be uploaded"):
        preceptor.push_to_hub(run, "someone/tiny", token="hf_secret")
    assert hub.files == {}


def test_a_hub_that_cannot_be_reached_is_an_error_of_one_sentence(run: Path, monkeypatch) -> None:
    with socket.socket() as closed:  # bound, and not listening
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(UserError, match=r"someone/tiny cannot be uploaded: .*[Cc]onnection refused"):
            preceptor.push_to_hub(run, "someone/tiny", token="hf_secret")


def test_a_name_that_the_hub_does_not_allow(hub: Hub, run: Path) -> None:
    with pytest.raises(UserError, match="a/b/c cannot be uploaded"):
        preceptor.push_to_hub(run, "a/b/c", token="hf_secret")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no trained model"):
        preceptor.push_to_hub(tmp_path, "someone/tiny")
