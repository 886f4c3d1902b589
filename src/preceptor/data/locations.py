"""Folders of the public data sets under PRECEPTOR_DATA."""

from __future__ import annotations

import os
from pathlib import Path

from preceptor.errors import UserError

FOLDERS = {
    "vqa-rad": "vqa_rad",
    "vqa-med-2019": "vqa_med_2019",
    "slake": "slake",
    "path-vqa": "path_vqa",
    "slake-grounding": "slake",
    "med-grit": "med_grit",
}
"""Folder of each public data set under PRECEPTOR_DATA."""


def data_folder(name: str, root: str | Path | None = None) -> Path:
    """Return the folder of a public data set: `root` if it is given, else its folder under PRECEPTOR_DATA.

    Raises:
        UserError: `root` is None and PRECEPTOR_DATA is not set.
    """
    if root is not None:
        return Path(root)
    if shared := os.environ.get("PRECEPTOR_DATA"):
        return Path(shared) / FOLDERS[name]
    raise UserError(
        f"the folder of {name} is not known; give data.root=FOLDER in a recipe or --root FOLDER, or set "
        "PRECEPTOR_DATA to the "
        f"folder that contains {FOLDERS[name]}/"
    )
