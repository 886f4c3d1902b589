"""A client that goes away: what it waited for is not computed, and its uploads are removed."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest

from preceptor.serving.app import Limits
from preceptor.serving.uploads import _SHARED_MEMORY
from tests.serving.server import running


class Gated:
    """A grounding model that answers when its gate is opened."""

    vlm = SimpleNamespace(guidance=SimpleNamespace(kind="none"))

    def __init__(self) -> None:
        self.gate, self.asked = threading.Event(), []

    def ask(self, images: list[Path], question: str, **_: Any) -> Any:
        self.asked.append(question)
        self.gate.wait(20)
        return SimpleNamespace(to_dict=lambda: {"answers": [], "boxes": []})


def test_a_waiting_question_is_dropped_when_its_client_disconnects() -> None:
    model = Gated()
    before = set(_SHARED_MEMORY.glob("preceptor-serve-*"))
    with running({"grounding": "grounding"}, lambda folder: model, limits=Limits(waiting=2)) as address:

        def ask(question: str, seconds: float) -> httpx.Response:
            files, data = {"image": ("x", b"1")}, {"question": question}
            return httpx.post(f"{address}/v1/ask", files=files, data=data, timeout=seconds)

        first = threading.Thread(target=ask, args=("first", 20))
        first.start()
        wait_for(lambda: model.asked == ["first"])
        started = set(_SHARED_MEMORY.glob("preceptor-serve-*")) - before  # also those of tests in other processes
        (scratch,) = [folder for folder in started if len(list(folder.iterdir())) == 1]
        with pytest.raises(httpx.TimeoutException):
            ask("second", 0.5)
        wait_for(lambda: len(list(scratch.iterdir())) == 1)  # the upload of the first
        third = threading.Thread(target=ask, args=("third", 20))  # the place of the second is free
        third.start()
        wait_for(lambda: len(list(scratch.iterdir())) == 2)
        model.gate.set()
        first.join(10)
        third.join(10)
        assert model.asked == ["first", "third"]
        wait_for(lambda: list(scratch.iterdir()) == [])


def half_a_request(address: str) -> socket.socket:
    """Send the beginning of an upload, and nothing more; return the connection."""
    connection = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=30)
    connection.sendall(
        b"POST /v1/ask HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + bytes(400)
    )
    return connection


def test_an_upload_that_stalls_is_refused_and_a_client_that_waits_is_not() -> None:
    model = Gated()
    with running({"grounding": "grounding"}, lambda folder: model, limits=Limits(stalled_seconds=0.5)) as address:
        with half_a_request(address) as connection:
            received = b"".join(iter(lambda: connection.recv(2**16), b""))  # until the server closes it
        assert received.startswith(b"HTTP/1.1 408 ")
        assert received.endswith(b'{"detail":"no data of the request arrived for 0.5 s; send it again"}')
        opened = threading.Timer(1.5, model.gate.set)
        opened.start()
        found = httpx.post(f"{address}/v1/ask", files={"image": ("x", b"1")}, data={"question": "?"}, timeout=20)
        assert found.status_code == 200
        opened.join()


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
