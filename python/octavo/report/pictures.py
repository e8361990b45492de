"""Pictures as they go into the page: checked, and with what the page has to know of them."""

from __future__ import annotations

import base64
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

_PNG = b"\x89PNG\r\n\x1a\n"
_LIGHT = 200  # of 255, from which on a background is a light one
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG's color type

# What the pictures of octavo's own commands and benchmarks show, by their names; in the order in which they are shown.
CAPTIONS = {
    "perplexity": "Log-likelihood that each scheme loses against float32, with twice the standard error.",
    "quality": "Distance from float32, by scheme: as the model is, and with systematic outliers.",
    "embeddings": "Distance of the embeddings from float32's, by scheme.",
    "accuracy": "Accuracy on the task, by scheme.",
    "outliers": "Outlier columns of each layer, and how far they stand out from all other features.",
    "emergence": "At what share of the positions features are outlying, layer by layer.",
    "magnitudes": "The largest magnitude of every feature of the hidden states, a dot for each layer.",
    "columns": "Columns that reach the threshold, by layer and linear input.",
    "worth": "Error of each linear layer's output, with dequantized and with kept 16-bit outlier weights.",
    "ablation": "What zeroing the largest outlier features does, against as many random ones.",
    "timing": "Time of a batch in int8, float32 and bfloat16.",
    "peers": "int8 layers of other libraries beside octavo's: what they cost in accuracy, and how long they take.",
    "serve": "Memory of the server while it is under load.",
    "linear": "How many times as fast octavo is, by rows of X; above 1 octavo is faster.",
}


@dataclass(frozen=True)
class Picture:
    """A picture: its data URI, size in pixels where it has one, caption, and whether its background is light."""

    uri: str
    size: tuple[int, int] | None
    caption: str
    on_light: bool


def read_picture(data: bytes, name: PurePosixPath) -> Picture:
    """Check and encode a PNG or SVG. Raises ValueError for a broken one."""
    caption = CAPTIONS.get(name.stem) or name.stem.replace("_", " ").replace("-", " ").capitalize() + "."
    encoded = base64.b64encode(data).decode("ascii")
    if name.suffix == ".svg":
        _check_svg(data)
        return Picture(f"data:image/svg+xml;base64,{encoded}", None, caption, on_light=True)
    size, on_light = _read_png(data)
    return Picture(f"data:image/png;base64,{encoded}", size, caption, on_light)


def _check_svg(data: bytes) -> None:
    # matplotlib names the DTD; entities, which could grow without bounds, nobody needs in a plot.
    if re.search(rb"<!ENTITY", data):
        raise ValueError("not a usable SVG: it declares entities")
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(f"not an SVG: {error}") from None
    if root.tag != "{http://www.w3.org/2000/svg}svg":
        raise ValueError("not an SVG: its root is another element")


def _read_png(data: bytes) -> tuple[tuple[int, int], bool]:
    """Width and height, and whether the first pixel is light or transparent."""
    chunks = list(_chunks(data))
    if not chunks or chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13 or chunks[-1][0] != b"IEND":
        raise ValueError("not a whole PNG")
    width, height, depth, color = struct.unpack(">IIBB", chunks[0][1][:10])
    if not width or not height or color not in _CHANNELS:
        raise ValueError("not a PNG that can be shown")
    compressed = b"".join(content for kind, content in chunks if kind == b"IDAT")
    # A row begins with its filter; of the first pixel every filter leaves the bytes as they are.
    try:
        pixel = zlib.decompressobj().decompress(compressed, 1 + _CHANNELS[color])[1:]
    except zlib.error as error:
        raise ValueError(f"not a whole PNG: {error}") from None
    if len(pixel) < _CHANNELS[color]:
        raise ValueError("not a whole PNG: it has no pixels")
    if depth != 8:
        return (width, height), True  # not what a plot is saved as: taken to be on white
    if color == 3:
        palette = next((content for kind, content in chunks if kind == b"PLTE"), b"")
        pixel = palette[3 * pixel[0] : 3 * pixel[0] + 3]
    transparent = color in (4, 6) and pixel[-1] < 128
    tones = pixel[:-1] if color in (4, 6) else pixel
    return (width, height), transparent or min(tones, default=255) >= _LIGHT


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each chunk."""
    if not data.startswith(_PNG):
        raise ValueError("not a PNG")
    at = len(_PNG)
    while at < len(data):
        if at + 12 > len(data):
            raise ValueError("not a whole PNG")
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        checksum = data[at + 8 + length : at + 12 + length]
        if len(checksum) != 4 or zlib.crc32(kind + content) != struct.unpack(">I", checksum)[0]:
            raise ValueError("not a whole PNG: a chunk is cut off or damaged")
        yield kind, content
        at += 12 + length
