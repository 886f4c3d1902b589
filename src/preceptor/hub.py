"""Pretrained models: where they are found, what a card calls them, and transformers' progress bars."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preceptor.errors import UserError

_OFFLINE, _TRUE = "HF_HUB_OFFLINE", ("1", "ON", "YES", "TRUE")

_replaced: list[str | None] = []
"""The user's value of HF_HUB_OFFLINE, while `set_offline` has replaced it."""


def set_offline(offline: bool) -> None:
    """Refuse requests to the hub from here on, or allow them again if the user's environment does.

    huggingface_hub reads the environment once, when it is imported; later its constant counts.
    """
    if offline and not _replaced:
        _replaced.append(os.environ.get(_OFFLINE))
        os.environ[_OFFLINE] = "1"
    elif not offline and _replaced:
        value = _replaced.pop()
        if value is None:
            os.environ.pop(_OFFLINE, None)
        else:
            os.environ[_OFFLINE] = value
    if constants := sys.modules.get("huggingface_hub.constants"):
        value = os.environ.get(_OFFLINE) or os.environ.get("TRANSFORMERS_OFFLINE") or ""
        constants.HF_HUB_OFFLINE = value.upper() in _TRUE  # type: ignore[attr-defined]


def find_pretrained(name: str, *, allow_downloads: bool) -> str | None:
    """Return the argument with which `from_pretrained` loads a model, or None if the model is not available.

    Args:
        name: ``package:NAME/FOLDER`` for a folder inside an installed Python package, the path of a folder, or the name
            of a model on the hub. ``~`` is the home folder.
        allow_downloads: Whether a hub model may be downloaded. Otherwise it must be in the local hub cache.
    """
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            if (Path(root) / inner / "config.json").is_file():
                return str(Path(root) / inner)
        return None
    name = os.path.expanduser(name)
    if (Path(name) / "config.json").is_file():
        return name
    if is_local(name) or name.count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    return name if allow_downloads or isinstance(try_to_load_from_cache(name, "config.json"), str) else None


def public_name(name: str) -> str:
    """Return the name of a model for a card: the last part of a local path, or the name of a hub model or package."""
    return Path(name).name if is_local(name) else name


def is_local(name: str) -> bool:
    """Return whether the name of a model is the path of a folder."""
    return name.startswith((".", "/", "~"))


@contextlib.contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Turn off the progress bars of transformers, which would garble those of Preceptor, and its reports of loading.

    Tensors that are missing or do not fit are reported by `pipeline.model_files.check_loaded`.
    """
    from transformers.utils import logging

    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()


def push_folder(folder: Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload a model folder with its card to the Hugging Face hub; return the address of the commit.

    The repository is created if it does not exist. Nothing but the files of the folder is sent.

    Raises:
        UserError: the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # OSError, and the error of the library that sends the requests, which is raised without a network.
    failures: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OfflineModeIsEnabled, ValueError)
    api = HfApi(token=token)
    try:
        with online():
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                folder_path=folder, repo_id=repo_id, commit_message="Upload model with Preceptor"
            )
    except failures as error:
        raise UserError(f"{repo_id} cannot be uploaded: {str(error) or type(error).__name__}") from error
    return commit.commit_url


@contextlib.contextmanager
def online() -> Iterator[None]:
    """Allow requests to the hub, which every other function of Preceptor refuses (`api.keep_offline`)."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, False
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
