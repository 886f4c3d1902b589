"""Read image files as 8-bit grey or RGB: PNG, JPEG, BMP, TIFF, WebP with Pillow, and DICOM with pydicom.

Only the pixels of a file are used. Text chunks, EXIF data (except the orientation) and DICOM header fields that are not
needed for rendering are either not parsed or dropped before the image is returned.
"""

from __future__ import annotations

import hashlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps

from preceptor.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000

PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
DICOM_MARK = b"DICM"
DICOM_MARK_OFFSET = 128
DICOM_DEFLATED = "1.2.840.10008.1.2.1.99"
# The only fields that pydicom parses. Names, dates and identifiers are never read into memory as values.
DICOM_FIELDS = [
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "RescaleIntercept",
    "RescaleSlope",
    "PixelData",
]
DICOM_COLOURS = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
_EXPORT = "export the image as PNG or JPEG"
_COPY_AGAIN = "copy the file again from its source"


class ImageError(UserError):
    """An image file that cannot be used. The message names the file, the reason and the fix."""


def _refusal(path: Path, reason: str, fix: str) -> ImageError:
    return ImageError(f"{path}: {reason}; {fix}")


def load_image(path: Path, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an image in mode L or RGB, with 8 bits per channel, upright and without metadata.

    Transparent pixels become black. Integers of more than 8 bits and floats are scaled linearly from their minimum and
    maximum to 0 and 255. A DICOM file is recognised by its content and rendered according to DICOM PS3.3 C.11: rescale
    slope and intercept, then the first window of the header (the full range if there is none); MONOCHROME1 is inverted.
    Modality look-up tables, VOI look-up tables and overlays are not applied.

    Args:
        path: Image file.
        max_bytes: Largest accepted file size.
        max_pixels: Largest accepted number of pixels (rows x columns). Both limits are checked before decoding.

    Raises:
        ImageError: the file is missing, empty, truncated, too large, of an unknown kind, or has several frames.
    """
    data = _read_bytes(path, max_bytes)
    return _load_dicom(path, data, max_pixels) if _is_dicom(path, data) else _load_pillow(path, data, max_pixels)


def image_size(path: Path, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return the width and height in pixels of the image that `load_image` returns. Only the header is decoded.

    Raises:
        ImageError: as `load_image`, except for faults that only decoding shows.
    """
    data = _read_bytes(path, max_bytes)
    if _is_dicom(path, data):
        with _named_dicom_errors(path):
            dataset = _parse_dicom(path, data)
            _check_dicom(path, dataset, max_pixels)
            return int(dataset.Columns), int(dataset.Rows)
    with _open_pillow(path, data, max_pixels) as image:
        width, height = image.size
        # Pillow itself turns the size of a TIFF.
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def content_hash(path: Path) -> str:
    """Return the SHA-256 of the bytes of a file, in hexadecimal digits.

    Raises:
        ImageError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _refusal(path, _os_reason(error), "check the path and its permissions") from error


def resolve_image(root: Path, name: str, place: str) -> Path:
    """Return the path of the image `name`, which a table at `place` gives relative to `root`.

    Raises:
        UserError: the name is absolute, leaves `root` (on POSIX or Windows), or is not a file name.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or "\0" in name or posix == PurePosixPath("."):
        raise UserError(f"{place}: image {name!r} is not a file name; give the path relative to {root}")
    if posix.is_absolute() or windows.drive or windows.root or ".." in posix.parts or ".." in windows.parts:
        raise UserError(
            f"{place}: image {name!r} leaves the folder of the table; image paths are relative to {root} and must stay "
            "inside it, so move or link the images there"
        )
    return root / posix


def require_images(places: Mapping[Path, str]) -> None:
    """Check that all files exist. `places` gives the place where each file is named, such as ``line 4``.

    Raises:
        UserError: some files are missing. The message gives their number and lists the first ten.
    """
    missing = [(path, place) for path, place in places.items() if not path.is_file()]
    if missing:
        listed = "".join(f"\n  {path} ({place})" for path, place in missing[:10])
        more = f"\n  and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise UserError(
            f"{len(missing)} of {len(places)} image files are missing; copy them there or correct the "
            f"names:{listed}{more}"
        )


def _os_reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            fix = "shrink the image or raise data.max_image_bytes"
            raise _refusal(path, f"{size:,} bytes, more than the limit of {max_bytes:,}", fix)
        if not path.is_file():
            raise _refusal(path, "not a file", "give the path of an image file")
        data = path.read_bytes()
    except OSError as error:
        raise _refusal(path, _os_reason(error), "check the path and its permissions") from error
    if not data:
        raise _refusal(path, "the file is empty", _COPY_AGAIN)
    return data


def _is_dicom(path: Path, data: bytes) -> bool:
    if data[DICOM_MARK_OFFSET : DICOM_MARK_OFFSET + len(DICOM_MARK)] == DICOM_MARK:
        return True
    if path.suffix.lower() in (".dcm", ".dicom"):
        reason = f"named as DICOM, but has no {DICOM_MARK.decode()} mark at byte {DICOM_MARK_OFFSET}"
        raise _refusal(path, reason, f"{_COPY_AGAIN}, or {_EXPORT}")
    return False


def _check_pixels(path: Path, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        reason = f"{width} x {height} pixels, more than the limit of {max_pixels:,}"
        raise _refusal(path, reason, "shrink the image or raise data.max_image_pixels")


# --- Pillow ---------------------------------------------------------------------------------------------------------


@contextmanager
def _open_pillow(path: Path, data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image and check its size and number of frames. Errors of Pillow in the block become ImageError."""
    known = ", ".join(PILLOW_FORMATS)
    try:
        image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    except Image.UnidentifiedImageError as error:
        reason = "not an image that can be read (the content decides, not the name)"
        raise _refusal(path, reason, f"known are {known} and DICOM") from error
    except Image.DecompressionBombError as error:
        raise _refusal(path, str(error), "shrink the image") from error
    except Exception as error:  # Pillow's parsers raise many kinds of errors for broken headers
        raise _refusal(path, f"broken {path.suffix} header ({error})", _COPY_AGAIN) from error
    with image:
        _check_pixels(path, image.width, image.height, max_pixels)
        try:
            # A JPEG of a phone (MPO) may store a depth or gain map as a second frame; the first frame is the image.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                reason = f"{image.format} with {getattr(image, 'n_frames', 0)} frames; only single images can be read"
                raise _refusal(path, reason, "save each frame as a separate file")
            yield image
        except ImageError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError, ...
            raise _refusal(path, f"broken or truncated {image.format} ({error})", _COPY_AGAIN) from error


def _load_pillow(path: Path, data: bytes, max_pixels: int) -> Image.Image:
    with _open_pillow(path, data, max_pixels) as image:
        if image.format in ("JPEG", "MPO") and not _jpeg_is_ended(data):
            raise _refusal(path, "truncated JPEG (no end marker)", _COPY_AGAIN)
        image.load()
        upright = ImageOps.exif_transpose(image)
        return Image.fromarray(np.asarray(_to_8_bit(path, upright)))


def _jpeg_is_ended(data: bytes) -> bool:
    """Return whether an end marker follows the first scan of a JPEG file.

    The JPEG library silently decodes a tail of zero bytes, as left by an interrupted download, to grey rows. The search
    skips segment by segment, because a thumbnail in the EXIF segment has an end marker of its own.
    """
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker == 0xDA:  # start of scan
            return data.find(b"\xff\xd9", position) >= 0
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def _to_8_bit(path: Path, image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise _refusal(path, "some pixels are not finite numbers", _EXPORT)
        return Image.fromarray(_stretch(values))
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("L" if grey else "RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")


def _stretch(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if low == high:
        return np.zeros(values.shape, dtype=np.uint8)
    return np.round((values - low) / (high - low) * 255).astype(np.uint8)


# --- DICOM ----------------------------------------------------------------------------------------------------------


def _load_dicom(path: Path, data: bytes, max_pixels: int) -> Image.Image:
    with _named_dicom_errors(path):
        dataset = _parse_dicom(path, data)
        _check_dicom(path, dataset, max_pixels)
        return Image.fromarray(_render_dicom(path, dataset))


@contextmanager
def _named_dicom_errors(path: Path) -> Iterator[None]:
    with silent_pydicom():
        try:
            yield
        except ImageError:
            raise
        except Exception as error:  # pydicom and its decoders raise many kinds of errors for broken files
            # Drop the error text and the traceback: if a length field is broken, they may quote the patient's name.
            reason = f"broken or truncated DICOM ({type(error).__name__})"
            raise _refusal(path, reason, f"{_COPY_AGAIN}, or {_EXPORT}") from None


_silence = threading.Lock()


@contextmanager
def silent_pydicom() -> Iterator[None]:
    """Suppress the warnings and log messages of pydicom, because they quote header values.

    Warning filters and loggers are global, so only one thread at a time can be inside.
    """
    logger = logging.getLogger("pydicom")
    with _silence, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        was_disabled, logger.disabled = logger.disabled, True
        try:
            yield
        finally:
            logger.disabled = was_disabled


def _parse_dicom(path: Path, data: bytes) -> Dataset:
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info

    # pydicom inflates the whole data set before any size in it can be checked.
    if read_file_meta_info(path).get("TransferSyntaxUID") == DICOM_DEFLATED:
        raise _refusal(path, "deflated DICOM is not supported", f"rewrite it uncompressed, or {_EXPORT}")
    return dcmread(io.BytesIO(data), specific_tags=list(DICOM_FIELDS))


def _check_dicom(path: Path, dataset: Dataset, max_pixels: int) -> None:
    from pydicom.pixels import get_decoder

    absent = [name for name in ("PixelData", "Rows", "Columns", "PhotometricInterpretation") if name not in dataset]
    if absent:
        raise _refusal(path, f"DICOM without {' and '.join(absent)}: not an image, or truncated", _COPY_AGAIN)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise _refusal(
            path,
            f"multi-frame DICOM ({frames} frames), only single images are read",
            "save each frame as a separate file",
        )
    _check_pixels(path, int(dataset.Columns), int(dataset.Rows), max_pixels)
    colour, samples = dataset.PhotometricInterpretation, int(dataset.get("SamplesPerPixel", 1))
    bits = int(dataset.BitsAllocated)
    grey = colour in ("MONOCHROME1", "MONOCHROME2") and samples == 1
    rgb = (colour == "RGB" or colour.startswith("YBR_")) and samples == 3 and bits == 8
    if not (grey or rgb):
        kind = colour if colour in DICOM_COLOURS else "of an unknown kind"
        raise _refusal(path, f"DICOM colour {kind} with {samples} samples of {bits} bits is not supported", _EXPORT)
    syntax = dataset.file_meta.TransferSyntaxUID
    kind = syntax.name if syntax.type == "Transfer Syntax" else "of an unknown kind"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise _refusal(path, f"DICOM compression {kind} is not supported", _EXPORT) from None
    if syntax.is_encapsulated and not decoder.is_available:
        missing = "; ".join(decoder.missing_dependencies)
        raise _refusal(path, f"no decoder for {kind} is installed ({missing})", f"install one, or {_EXPORT}")


def _render_dicom(path: Path, dataset: Dataset) -> np.ndarray:
    from pydicom.pixels import pixel_array

    stored = pixel_array(dataset)  # (rows, columns), or (rows, columns, 3) already RGB
    if stored.ndim == 3:
        return stored.astype(np.uint8)
    slope, intercept = float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)
    values = stored.astype(np.float64) * slope + intercept
    if not np.isfinite(values).all():
        raise _refusal(path, "rescale slope or intercept is not a finite number", _EXPORT)
    centre, width = _first(dataset, "WindowCenter"), _first(dataset, "WindowWidth")
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    # The standard forbids narrower windows. Some writers store a width of 0 if they have no window.
    if centre is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        grey = _stretch(values)
    else:
        grey = np.round(_window(values, centre, width, function) * 255).astype(np.uint8)
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def _window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Apply a window to the values and return them in [0, 1] (DICOM PS3.3 C.11.2.1.2.1 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


def _first(dataset: Dataset, field: str) -> float | None:
    """Return the first value of a field, or None if it is absent or empty."""
    value = dataset.get(field)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else None
    return None if value in (None, "") else float(value)
