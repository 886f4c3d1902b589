"""A client that goes away: what it waited for is not computed, and its uploads are removed."""

from __future__ import annotations

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


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
