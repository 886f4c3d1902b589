"""Find the image files in a folder, and name all that is not used."""

from __future__ import annotations

from pathlib import Path

from preceptor.data.dicom_header import is_dicom
from preceptor.data.findings import Finding
from preceptor.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom")


def find_images(folder: Path) -> tuple[list[Path], list[Finding]]:
    """Return the image files in a folder and its subfolders, sorted by path, and findings that name all other entries.

    Images are files with a usual suffix, and DICOM files with any name. Symbolic links are followed, each folder once.
    Hidden files and folders are not used; macOS stores `._a.png` beside `a.png`, for example.

    Raises:
        UserError: there is no image file, or the folder cannot be read.
    """
    images: list[Path] = []
    skipped: dict[str, list[str]] = {}
    folders, linked_folders = [folder], list[Path]()
    visited: set[tuple[int, int]] = set()
    while folders or linked_folders:  # links come last, so that a file keeps its name in the folder itself
        current = folders.pop() if folders else linked_folders.pop(0)
        try:
            status = current.stat()
            entries = sorted(current.iterdir())
        except OSError as error:
            if current == folder:
                raise UserError(
                    f"the folder {folder} cannot be read ({(error.strerror or str(error)).lower()})"
                ) from error
            skipped.setdefault("unreadable", []).append(_relative(current, folder))
            continue
        if (status.st_dev, status.st_ino) in visited:
            skipped.setdefault("links to a folder that is already included", []).append(_relative(current, folder))
            continue
        visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                skipped.setdefault("hidden", []).append(_relative(entry, folder))
            elif entry.is_dir():
                (linked_folders if entry.is_symlink() else folders).append(entry)
            elif (reason := _reason_to_skip(entry)) is None:
                images.append(entry)
            else:
                skipped.setdefault(reason, []).append(_relative(entry, folder))
    note = "; ".join(f"{len(names)} {reason} ({_listed(names)})" for reason, names in sorted(skipped.items()))
    if not images:
        reasons = f"; not used: {note}" if note else ""
        raise UserError(f"the folder {folder} contains no image files ({', '.join(IMAGE_SUFFIXES)}){reasons}")
    findings = [Finding((), folder, f"some entries of the folder are not used: {note}", "warning")] if note else []
    return sorted(images), findings


def _reason_to_skip(file: Path) -> str | None:
    if file.is_symlink() and not file.exists():
        return "broken links"
    if not file.is_file():
        return "neither files nor folders"
    if file.suffix.lower() in IMAGE_SUFFIXES:
        return None  # if it cannot be read, the reader of the image says so
    try:
        with file.open("rb") as opened:
            # DICOM files often have no suffix. A DICOMDIR is a table of contents.
            return None if is_dicom(opened.read(132)) and file.name != "DICOMDIR" else "of another kind"
    except OSError:
        return "unreadable"


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix().encode("utf-8", "backslashreplace").decode()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
