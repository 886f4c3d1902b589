"""Read image files as 8-bit grey or RGB: PNG, JPEG, BMP, TIFF, WebP with Pillow, and DICOM with pydicom.

Only the pixels of a file are used. Text chunks, EXIF data (except the orientation), colour profiles and DICOM header
fields that are not needed for rendering are either not parsed or dropped before the image is returned.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image

from preceptor.data import dicom
from preceptor.data.containers import read_container
from preceptor.data.decode import bands, decode
from preceptor.data.dicom_header import is_dicom
from preceptor.data.image_structure import COPY_AGAIN, Container, Refused, check_size
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.errors import UserError, printable

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXPORT = "export the image as PNG or JPEG"


class ImageError(UserError):
    """An image file that cannot be used. The message names the file, the reason and the fix."""


def load_image(path: Path, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an image in mode L or RGB, with 8 bits per channel, upright and without metadata.

    Transparent pixels become black. Integers of more than 8 bits and floats are scaled linearly from their minimum and
    maximum to 0 and 255; colour images have one minimum and one maximum for all channels. Colour profiles and gamma are
    ignored. The format is detected from the content. DICOM is rendered by `dicom.render`.

    Args:
        path: Image file.
        max_bytes: Largest accepted file size.
        max_pixels: Largest accepted number of pixels (rows x columns). Both limits are checked before decoding.

    Raises:
        ImageError: the file is missing, empty, incomplete, damaged, too large, of an unknown kind, has several frames,
            or stores pixels in a way that is not supported.
    """
    with _named_errors(path):
        data = _read_bytes(path, max_bytes)
        if _is_dicom(path, data):
            return Image.fromarray(dicom.render(data, max_pixels))
        container = _read_container(data, max_pixels)
        del data
        image = _to_8_bit(container)
        # Pillow itself turns a TIFF.
        return image if container.format == "TIFF" else _upright(image, container.orientation)


def image_size(path: Path, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return the width and height in pixels of the image that `load_image` returns. The pixels are not decoded.

    Raises:
        ImageError: as `load_image`, except for faults that only decoding shows.
    """
    with _named_errors(path):
        data = _read_bytes(path, max_bytes)
        if _is_dicom(path, data):
            return dicom.size(data, max_pixels)
        return _read_container(data, max_pixels).upright_size


def content_hash(path: Path) -> str:
    """Return the SHA-256 of the bytes of a file, in hexadecimal digits.

    Raises:
        ImageError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def resolve_image(root: Path, name: str, place: str) -> Path:
    """Return the path of the image `name`, which a table at `place` gives relative to `root`.

    Raises:
        UserError: the name is absolute, leaves `root` (on POSIX or Windows), or is not a file name.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or "\0" in name or posix == PurePosixPath("."):
        raise UserError(f"{place}: image {name!r} is not a file name; give the path relative to {root}")
    if max(len(part.encode(errors="surrogatepass")) for part in posix.parts) > 255 or len(name) > 4000:
        raise UserError(
            f"{place}: image {name[:40]!r}... is too long for a file name; give the path relative to {root}"
        )
    if posix.is_absolute() or windows.drive or windows.root or ".." in posix.parts or ".." in windows.parts:
        raise UserError(
            f"{place}: image {name!r} leaves the folder of the table; image paths are relative to {root} and must stay "
            "inside it, so move or link the images there"
        )
    return root / posix


def require_images(places: Mapping[Path, str], source: Path) -> None:
    """Check that all files exist. `places` gives the place in `source` where each file is named.

    Raises:
        UserError: some files are missing. The message gives their number and lists the first ten.
    """
    missing = [(path, place) for path, place in places.items() if not path.is_file()]
    if missing and (fix := backslash_fix(path for path, _ in missing)):
        raise UserError(f"{source}: {len(missing)} of {len(places)} image files are missing; {fix}")
    if missing:
        listed = "".join(f"\n  {printable(str(path))} ({printable(place)})" for path, place in missing[:10])
        more = f"\n  and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise UserError(
            f"{source}: {len(missing)} of {len(places)} image files are missing; copy them there or correct the "
            f"names:{listed}{more}"
        )


def backslash_fix(missing: Iterable[Path]) -> str:
    """Return how to correct names if all of these files exist under names with / in the place of a backslash."""
    paths = list(missing)
    if not all("\\" in path.name and Path(str(path).replace("\\", "/")).exists() for path in paths):
        return ""
    right = paths[0].name.replace("\\", "/")
    return f"write / in the place of the backslashes of Windows, such as {right!r}"


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Refused as refused:
        raise ImageError(f"{printable(str(path))}: {refused.reason}; {refused.fix}") from refused.__cause__
    except MemoryError:
        raise ImageError(f"{printable(str(path))}: not enough memory to decode the image; shrink the image") from None


def _unreadable(path: Path, error: OSError) -> ImageError:
    reason = (error.strerror or str(error)).lower()
    return ImageError(f"{printable(str(path))}: {reason}; check the path and its permissions")


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise Refused("not a file", "give the path of an image file")
        if size > max_bytes:
            fix = "shrink the image or raise data.max_image_bytes"
            raise Refused(f"{size:,} bytes, more than the limit of {max_bytes:,}", fix)
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not data:
        raise Refused("the file is empty")
    return data


def _is_dicom(path: Path, data: bytes) -> bool:
    if is_dicom(data):
        return True
    if path.suffix.lower() in (".dcm", ".dicom"):
        raise Refused("named as DICOM, but has no DICM mark at byte 128", f"{COPY_AGAIN}, or {_EXPORT}")
    return False


def _read_container(data: bytes, max_pixels: int) -> Container:
    try:
        container = read_container(data)
    except (struct.error, IndexError) as error:
        raise Refused("truncated or damaged header") from error
    if container is None:
        reason = "not an image that can be read (the content decides, not the name)"
        raise Refused(reason, f"known are {', '.join(FORMATS)} and DICOM")
    check_size(*container.size, max_pixels)
    return container


def _to_8_bit(container: Container) -> Image.Image:
    """Return the image in mode L or RGB, not yet upright unless Pillow turned it."""
    image = decode(container)
    if container.bits == 16 and container.channels > 1:
        return _scaled(image, _deep_colour(container))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image, _deep_grey(container), inverted=container.inverted)
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = _on_black(image, grey)
    elif image.mode in ("L", "RGB"):
        if type(image) is not Image.Image:
            image = image.copy()  # without the attributes of the format
    else:
        image = image.convert("L" if grey else "RGB")
    image.info.clear()
    return image


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def _on_black(image: Image.Image, grey: bool) -> Image.Image:
    """Return the image in mode L or RGB on a black background."""
    pixels = np.empty((image.height, image.width) if grey else (image.height, image.width, 3), np.uint8)
    for rows, band in bands(image):
        opaque = band.convert("LA" if band.mode == "La" else "RGBA").convert("RGBA").convert("RGBa")
        pixels[rows] = np.asarray(opaque)[..., 0] if grey else np.asarray(opaque)[..., :3]
    return Image.fromarray(pixels)


# Values (rows, columns) or (rows, columns, 3) of a band, and its opacity (rows, columns) in [0, 1] or None.
_Band = tuple[np.ndarray, np.ndarray | None]


def _deep_grey(container: Container) -> Callable[[Image.Image, slice], _Band]:
    def read(band: Image.Image, rows: slice) -> _Band:
        values = np.asarray(band)
        if values.dtype == np.int32 and container.unsigned:
            values = values.view(np.uint32)
        if container.transparent:
            return values, values != container.transparent[0]
        return values, None

    return read


def _deep_colour(container: Container) -> Callable[[Image.Image, slice], _Band]:
    """Return a function that joins the bytes of channels with 16 bits."""
    if container.channels == 2:  # decoded as RGBA: high and low byte of grey, high and low byte of alpha

        def read_grey(band: Image.Image, rows: slice) -> _Band:
            high_low = np.asarray(band).astype(np.uint16)
            return high_low[..., 0] << 8 | high_low[..., 1], (high_low[..., 2] << 8 | high_low[..., 3]) / 65535

        return read_grey

    low = decode(container, second_byte=True)

    def read(band: Image.Image, rows: slice) -> _Band:
        values = np.asarray(band).astype(np.uint16) << 8
        values |= np.asarray(low.crop((0, rows.start, low.width, rows.stop)))
        if values.shape[2] == 4:
            return values[..., :3], values[..., 3] / 65535
        if container.transparent:
            return values, (values != container.transparent).any(axis=2)
        return values, None

    return read


def _scaled(image: Image.Image, read: Callable[[Image.Image, slice], _Band], *, inverted: bool = False) -> Image.Image:
    """Map the smallest and largest visible value to 0 and 255. Transparent pixels become black."""
    low, high = np.inf, -np.inf
    for rows, band in bands(image):
        values, opacity = read(band, rows)
        visible = values if opacity is None else values[opacity > 0]
        if visible.size:
            low, high = min(low, float(visible.min())), max(high, float(visible.max()))
            if not np.isfinite(visible.sum(dtype=np.float64)):  # NaN, or infinities of either sign
                raise Refused("some pixels are not finite numbers", _EXPORT)
    pixels = np.empty((image.height, image.width, *values.shape[2:]), np.uint8)
    for rows, band in bands(image):
        values, opacity = read(band, rows)
        scaled = dicom.stretch(values, low, high)
        if inverted:
            scaled = 255 - scaled
        if opacity is not None:
            weights = opacity if scaled.ndim == 2 else opacity[..., None]
            scaled = np.round(scaled * weights).astype(np.uint8)
        pixels[rows] = scaled
    return Image.fromarray(pixels)
