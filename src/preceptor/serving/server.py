"""Listen on an address and serve until interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from preceptor.errors import UserError
from preceptor.serving.app import DEFAULTS, Limits, create_app
from preceptor.serving.models import ServedModels, unique_names

MOST_WAITING_CONNECTIONS = 1024
SHORTEST_TOKEN = 16
_INTERRUPTION = re.compile("KeyboardInterrupt|CancelledError")
_SECONDS_TO_STOP = 8
"""Time that requests have to end when the server stops. Docker kills a container after ten seconds."""


def serve(
    folders: Sequence[Path],
    load: Callable[[Path], Any],
    *,
    host: str,
    port: int,
    token: str | None,
    ready: Callable[[str], None] | None = None,
    limits: Limits = DEFAULTS,
) -> None:
    """Serve the models of folders until the process is interrupted, or no model can be loaded.

    For arguments and errors see `preceptor.serve`.
    """
    check_token(host, token)
    models = ServedModels(unique_names(folders), load)
    app = create_app(models, token=token, limits=limits)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a line for each malformed request
    logging.getLogger("uvicorn.error").addFilter(lambda record: not _is_interruption(record))
    listening = listen(host, port)

    async def stop_if_all_failed() -> None:
        server.should_exit = server.should_exit or models.all_failed

    config = uvicorn.Config(
        app,
        log_level=logging.WARNING,
        access_log=False,  # the address of a request may name a case
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=_SECONDS_TO_STOP,
        backlog=MOST_WAITING_CONNECTIONS,
        h11_max_incomplete_event_size=2**16,
        callback_notify=stop_if_all_failed,
        timeout_notify=1,
    )
    server = uvicorn.Server(config)
    name, bound = listening.getsockname()[:2]
    if ready is not None:
        ready(f"http://{f'[{name}]' if ':' in name else name}:{bound}")
    # A KeyboardInterrupt is raised again after an orderly end.
    with contextlib.suppress(KeyboardInterrupt), app.state.scratch.as_temporary_folder():
        server.run(sockets=[listening])
    if models.error is not None:
        raise UserError(models.error)


def _is_interruption(record: logging.LogRecord) -> bool:
    """Return whether a record of uvicorn is the traceback of a request or a server that was stopped, not a defect."""
    error = record.exc_info[1] if record.exc_info else None
    stopped = isinstance(error, KeyboardInterrupt | asyncio.CancelledError)
    return stopped or _INTERRUPTION.search(record.getMessage()) is not None


def check_token(host: str, token: str | None) -> None:
    """Raise UserError if other machines can reach the address and there is no token, or if the token is short."""
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise UserError(f"the token has {len(token)} characters; use at least {SHORTEST_TOKEN}")
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and token is None:
        raise UserError(f"other machines can reach {host}; set a token (--token-file FILE), or use 127.0.0.1")


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError if the address is not of this machine or the port is in use."""
    if not 0 <= port < 2**16:
        raise UserError(f"port {port} is not between 0 and 65535")
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, number)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port") from None
    opened.listen(MOST_WAITING_CONNECTIONS)
    return opened
