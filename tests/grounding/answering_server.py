"""A real HTTP server on loopback that speaks the chat-completions protocol, and misbehaves where a test asks it to."""

from __future__ import annotations

import hashlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = str | tuple[int, dict[str, str], str] | None
"""None: answer; `drop`, `half`, `hang`, `broken`, `empty`; or a status with headers and a body."""


@dataclass
class Asked:
    """What the server has seen: bodies of the requests, their headers, and when they came (seconds)."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    @property
    def questions(self) -> list[str]:
        return [question_of(body) for body in self.bodies]


def question_of(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else next(part["text"] for part in content if part["type"] == "text")


def server_options(asked: Asked, output: Path) -> tuple[object, ...]:
    """Return the options of `preceptor teach` that name the server and the store."""
    return ("--endpoint", asked.url, "--model", "m", "--output", output, "--yes")


def reply(body: dict[str, Any], *, logprobs: bool = True) -> dict[str, Any]:
    """A reply that is a function of the request's messages, seed and number alone."""
    choices = []
    for number in range(body.get("n", 1)):
        seed = (body.get("seed", 0) + number) if body["temperature"] else 0
        said = json.dumps([body["messages"], seed], sort_keys=True)
        digest = hashlib.sha256(said.encode()).digest()
        first, second = 0.5 + digest[0] / 512, 0.25
        tokens = [
            {
                "token": "a",
                "logprob": math.log(first),
                "top_logprobs": [
                    {"token": "a", "logprob": math.log(first)},
                    {"token": "b", "logprob": math.log(second)},
                ],
            }
        ] * 3
        text = f"answer {digest[1] % 3 if body['temperature'] else digest.hex()[:8]}<|im_end|>"
        choice: dict[str, Any] = {
            "index": number,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
        }
        if logprobs and body.get("logprobs"):
            choice["logprobs"] = {"content": tokens}
        choices.append(choice)
    return {"object": "chat.completion", "choices": choices, "usage": {"prompt_tokens": 10, "completion_tokens": 3}}


@contextmanager
def serving(
    fault: Callable[[int, dict[str, Any]], Fault] = lambda number, body: None,
    *,
    answer: Callable[[dict[str, Any]], dict[str, Any]] = reply,
    delay: float = 0.0,
) -> Iterator[Asked]:
    """Serve on a free port of loopback; `fault` says for a request (its number from 0, its body) what goes wrong."""
    asked = Asked()
    lock = threading.Lock()
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(asked.bodies)
                asked.bodies.append(body)
                asked.headers.append({name.lower(): value for name, value in self.headers.items()})
                asked.times.append(time.monotonic())
                asked.at_once += 1
                asked.most_at_once = max(asked.most_at_once, asked.at_once)
            try:
                self.behave(fault(number, body), body)
            finally:
                with lock:
                    asked.at_once -= 1

        def behave(self, what: Fault, body: dict[str, Any]) -> None:
            time.sleep(delay)
            if what == "drop":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            elif what == "hang":
                ended.wait(300)
                self.close_connection = True
            elif what == "half":
                text = json.dumps(answer(body)).encode()
                self.begin(200, len(text), {})
                self.wfile.write(text[: len(text) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            elif what == "broken":
                self.whole(200, {}, '{"choices": [{"mess')
            elif what == "empty":
                self.whole(200, {}, '{"choices": []}')
            elif isinstance(what, tuple):
                self.whole(*what)
            else:
                assert what is None, what
                self.whole(200, {}, json.dumps(answer(body)))

        def begin(self, status: int, length: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(length))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def whole(self, status: int, headers: dict[str, str], text: str) -> None:
            data = text.encode()
            self.begin(status, len(data), headers)
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    asked.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield asked
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
