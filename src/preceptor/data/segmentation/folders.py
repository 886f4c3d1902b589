"""List the volumes in a folder. Everything that is not used is counted and named."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from preceptor.data.dicom_series import holds_series
from preceptor.data.findings import Finding
from preceptor.data.segmentation.modalities import stem
from preceptor.errors import UserError

OTHER_VOLUMES = (".hdr", ".img", ".mha", ".mhd", ".nrrd", ".nhdr", ".mgh", ".mgz", ".mnc", ".npy", ".npz")
"""Formats of volumes that are not read. A file of one of them may be a forgotten image."""

MOST_NAMED = 20
_DOCUMENTS = ("readme", "license", "licence", "citation", "changes", "changelog", "manifest", "sha256sums", "md5sums")


@dataclass
class Listing:
    """What a folder and its subfolders contain: NIfTI files, folders of DICOM series, and what was skipped."""

    volumes: list[Path] = field(default_factory=list)
    series: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)
    """Volumes in formats that are not read."""
    findings: list[Finding] = field(default_factory=list)

    def add(self, paths: Sequence[Path], reason: str, root: Path) -> None:
        """Add a warning that names the paths, unless there are none. `{}` in the reason stands for their number."""
        if paths:
            file = paths[0] if len(paths) == 1 else None
            text = f"{reason.format(len(paths))}: {listed([p.relative_to(root).as_posix() for p in paths])}"
            self.findings.append(Finding((), file, text, "warning"))


def foreign_stem(file_name: str) -> str | None:
    """Return the name of a file without its suffix if it is one of `OTHER_VOLUMES`, perhaps compressed, or None."""
    name = file_name[:-3] if file_name.lower().endswith(".gz") else file_name
    base, dot, suffix = name.rpartition(".")
    return base if dot + suffix.lower() in OTHER_VOLUMES else None


def listed(names: Collection[str]) -> str:
    """Return names joined by commas; of more than 20, the first ones and the number of the others."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(list(names)[:MOST_NAMED]) + more


def list_volumes(root: Path, used: Collection[str] = ()) -> Listing:
    """List the volumes in a folder and its subfolders, sorted by path. Links to folders are followed once.

    Args:
        root: The folder.
        used: Names of files that are read elsewhere, such as the split file.

    Raises:
        UserError: a folder cannot be read, or a link leads to a folder that contains it.
    """
    listing = Listing()
    seen: dict[Path, Path] = {}
    twice: list[Path] = []
    dead: list[Path] = []

    def visit(folder: Path, above: tuple[Path, ...]) -> None:
        real = folder.resolve()
        if real in above:
            raise UserError(f"{folder} is a link to a folder that contains it; remove the link")
        if real in seen:
            twice.append(folder)
            return
        seen[real] = folder
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
        except PermissionError as error:  # other errors, such as too many open files, are not about this folder
            raise UserError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
        folders: list[Path] = []
        for entry in entries:
            path = Path(entry.path)
            if entry.is_symlink() and not path.exists():
                dead.append(path)
            elif entry.name.startswith("."):
                listing.others.append(path)
            elif entry.is_dir():
                folders.append(path)
            elif stem(entry.name) is not None:
                listing.volumes.append(path)
            elif foreign_stem(entry.name) is not None:
                listing.foreign.append(path)
            elif entry.name not in used and not entry.name.lower().startswith(_DOCUMENTS):
                listing.others.append(path)
        if holds_series(folder):
            listing.series.append(folder)
            listing.others = [path for path in listing.others if path.parent != folder or path.name.startswith(".")]
        for path in folders:
            visit(path, (*above, real))

    visit(root, ())
    for paths in (listing.volumes, listing.series, listing.others):
        paths.sort()
    listing.add(twice, "{} links lead to a folder that was read before, and were left out", root)
    listing.add(dead, "{} links lead to nothing, and were left out; correct or remove them", root)
    listing.add(listing.foreign, "{} files of other volume formats were left out; convert them to .nii.gz", root)
    return listing
