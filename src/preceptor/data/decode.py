"""Decode images after `containers` has checked the structure of the file: JPEG with simplejpeg, others with Pillow."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from preceptor.data.containers import check_image_data
from preceptor.data.image_structure import STOPS, Container, Refused
from preceptor.data.tiff import check_parts

_BAND_PIXELS = 2**21  # pixels that are converted at a time, to bound the memory for intermediate values


def decode(container: Container, *, second_byte: bool = False) -> Image.Image:
    """Return the image in a mode of Pillow.

    With `second_byte`, the channels are the low bytes of channels with 16 bits, instead of the high bytes.

    Raises:
        Refused: the pixels are incomplete, damaged, or of a kind that is not supported.
    """
    if container.format == "PNG":
        check_image_data(container)
    if container.format == "TIFF":
        check_parts(container)
    if container.format == "JPEG":
        return _decode_jpeg(container)
    image = _open(container, container.pixels, second_byte=second_byte)
    if container.colours and image.mode == "P" and any(image.histogram()[container.colours :]):
        raise Refused(f"damaged {container.format} (a pixel has a colour that its palette lacks)")
    return image


def bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Yield the image in bands of rows."""
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(image.height, top + rows)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _decode_jpeg(container: Container) -> Image.Image:
    """Return a JPEG as Pillow would, but refuse what Pillow fills with grey or skips.

    The decoder of libjpeg-turbo warns if a scan has less or more data than the header implies. It does not count the 8
    bytes that it has read ahead. In a small image these may be a row of blocks, so that it must warn if the last byte
    of each scan is left out.
    """
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[container.channels]
    read = partial(simplejpeg.decode_jpeg, colorspace="GRAY" if mode == "L" else mode)
    try:
        pixels = read(container.pixels)
    except ValueError as error:
        if "subsampling" in str(error):
            raise Refused("JPEG with unusual sampling factors is not supported", "save it as PNG") from error
        raise Refused(f"truncated or damaged JPEG ({str(error).removeprefix('Corrupt JPEG data: ')})") from error
    if container.shortened is not None:
        try:
            read(container.shortened, min_height=1, min_width=1)
        except ValueError:
            pass
        else:
            raise Refused("damaged JPEG (more image data than its header says)")
    if mode == "CMYK":  # Adobe stores the inverse, and other writers follow
        np.subtract(255, pixels, out=pixels)
    return Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)


def _open(container: Container, data: bytes, *, second_byte: bool = False) -> Image.Image:
    """Decode the image. With `second_byte`, the channels are the low bytes of channels with 16 bits."""
    try:
        image = Image.open(io.BytesIO(data), formats=[container.format])
        if second_byte:
            image.tile = [tile._replace(args=_second_byte(tile.args)) for tile in image.tile]
        image.load()
        return image
    except Image.DecompressionBombError as error:
        raise Refused(str(error), "shrink the image") from error
    except Image.UnidentifiedImageError as error:
        fields = f" ({container.fields})" if container.fields else ""
        raise Refused(f"{container.format} of a kind that is not supported{fields}", "save it as PNG") from error
    except (MemoryError, *STOPS):
        raise
    except BaseException as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError, ...
        raise Refused(f"broken or truncated {container.format} ({error})") from error


def _second_byte(args: Any) -> Any:
    """Return the arguments of a Pillow decoder that keeps the other byte of channels with 16 bits.

    Pillow has no mode for colour with 16 bits per channel. Its decoders keep the high byte; told the opposite byte
    order, they keep the low byte.
    """
    if not isinstance(args, str):
        return (_second_byte(args[0]), *args[1:])
    name, order = args[:-1], args[-1]
    if order == "N":
        order = "L" if sys.byteorder == "little" else "B"
    return name + {"L": "B", "B": "L"}[order]
