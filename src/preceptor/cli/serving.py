"""The verb that serves models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from preceptor import api
from preceptor.cli import options
from preceptor.cli.terminal import log_to_stderr, sentence
from preceptor.errors import UserError

SERVE_EXAMPLES = """\
preceptor serve runs/mhkd-demo
preceptor serve runs/rad/teacher runs/rad/distilled --port 8080
preceptor serve runs/lckd-demo --host 0.0.0.0 --token-file token.txt"""

TOKEN = "PRECEPTOR_TOKEN"


def serve(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Run, stage or model folders; packed models.")
    ],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Port to listen on; 0 chooses a free one.")] = 8000,
    token_file: Annotated[
        Path | None,
        options.existing(
            "FILE", f"File with a token that requests need; or set {TOKEN}. Required if other machines have access."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="Where to compute, such as cuda or cpu.")] = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Serve trained models on a local page and through a JSON API.

    Stop it with Ctrl+C.
    """
    log_to_stderr()
    token = token_file.read_text("utf-8").strip() if token_file else os.environ.get(TOKEN) or None
    if token_file and not token:
        raise UserError(f"{token_file} is empty; write a token of at least 16 characters into it")

    def ready(address: str) -> None:
        models = "1 model" if len(folders) == 1 else f"{len(folders)} models"
        sentence(f"Serving {models} on {address}. For research only. Stop with Ctrl+C.")

    api.serve(
        *folders, host=host, port=port, token=token, device=device, trust_remote_code=trust_remote_code, ready=ready
    )
