"""A real server on a free port, with untrained models or with models that answer as a test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn

from preceptor import api
from preceptor.serving.app import DEFAULTS, Limits, create_app
from preceptor.serving.models import ServedModels
from preceptor.serving.server import listen
from tests.fuzz.model_folders import templates


@contextmanager
def running(
    tasks: Mapping[str, str],
    load: Callable[[Path], Any] = api.load,
    *,
    token: str | None = None,
    limits: Limits = DEFAULTS,
) -> Iterator[str]:
    """Yield the address of a server with models by name; their value is the task, of which there is a template."""
    models = ServedModels({name: templates() / task for name, task in tasks.items()}, load)
    listening = listen("127.0.0.1", 0)
    config = uvicorn.Config(create_app(models, token=token, limits=limits), log_level="error", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not models.loaded:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


class StubGrounding:
    """A grounding model with the same answer to every question."""

    vlm = SimpleNamespace(guidance=SimpleNamespace(kind="clip"))

    def __init__(self, answer: str, boxes: list[tuple[int, int, int, int]]) -> None:
        self.answer, self.boxes = answer, boxes
        self.asked: list[tuple[str, str]] = []

    def ask(self, images: list[Path], question: str, *, modality: str, max_new_tokens: int) -> Any:
        self.asked.append((question, modality))
        row = {"answers": [{"answer": self.answer, "probability": 0.5}], "boxes": [list(box) for box in self.boxes]}
        return SimpleNamespace(to_dict=lambda: row)
