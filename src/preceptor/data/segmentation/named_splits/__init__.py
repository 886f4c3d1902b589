"""Splits of published protocols by name: NAME.csv in this folder, as a user's split file. See README.md for sources."""

from __future__ import annotations

from pathlib import Path

from preceptor.errors import nearest

NOT_SHIPPED = {
    "brats2023-875-125-251": "clone github.com/AImageLab-zip/IM-Fuse and set data.split_file=IM-Fuse/IMFuse/datalist"
}
"""Published splits whose lists have no licence, and where to get them."""


def named_splits() -> dict[str, Path]:
    """Return the files of the shipped splits by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.csv"))}


def check_split_name(name: str) -> str:
    """Return the name of a shipped split. Raises ValueError if it is none."""
    if name in NOT_SHIPPED:
        raise ValueError(f"its list has no licence and is not shipped; {NOT_SHIPPED[name]}")
    if name not in named_splits():
        raise ValueError(
            f"it must be the name of a shipped split (for a file: data.split_file){nearest(name, named_splits())}"
        )
    return name
