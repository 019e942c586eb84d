"""
Items to pictures and captions that training can read, or a reason why not.

Files come from strangers. A header is read first and pixels only if it promises a bearable number; only formats of
pixels are opened at all; whatever a decoder raises is a reason, never the end of a run.
"""

import functools
import hashlib
import io
import unicodedata
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ...image_processing_mars import MarsImageProcessorPil, to_rgb
from .readers import Item
from .recipe import LANGUAGES, Captions, Decode, Filter, Recipe, Resize

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # none that runs programs, as EPS does
FORMAT_OF_EXTENSION = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "tiff": "TIFF",
}
NO_CLAIM = ("image", "img")
PNG_BIT_DEPTH = 24  # its place in the file
HASH_GRID = 4

# What becomes of an item, in words for the report.
REASONS = {
    "unreadable_shard": "the shard, or the rest of it, cannot be read",
    "unreadable_file": "the file cannot be read",
    "not_a_file": "a link or a device",
    "unsafe_name": "its name would lead out of a folder, or cannot be printed",
    "file_too_large": "a larger file than `decode.max_file_bytes`",
    "no_picture": "no picture beside the caption",
    "not_a_picture": f"none of {', '.join(FORMATS)}",
    "too_many_pixels": "more pixels than `decode.max_pixels`; not decoded",
    "damaged": "truncated or damaged",
    "peculiar": "a peculiarity that `decode.refuse` names",
    "undecodable_caption": "the caption is no UTF-8 or no JSON",
    "caption_too_long": "a caption longer than `captions.max_characters`",
    "no_caption": "no caption",
    "too_small": "shorter side below `filter.min_side`",
    "too_elongated": "aspect ratio above `filter.max_aspect_ratio`",
    "duplicate_key": "an earlier record has the same key",
    "exact_duplicate": "an earlier picture has the same pixels",
    "near_duplicate": "an earlier picture looks the same",
    "low_clip": "picture and caption fit too little",
    "low_aesthetic": "a low aesthetic score",
}
# What was put right in a record that may stay.
NOTES = {
    "animated": "several frames; the first is taken",
    "cmyk": "CMYK, converted",
    "16_bit": "16 bits, scaled to 8",
    "palette": "a palette, converted",
    "transparent": "transparent, put on white",
    "gray": "shades of gray, converted",
    "rotated": "turned upright as EXIF says",
    "wrong_extension": "another format than its name says",
    "bad_exif": "EXIF data that cannot be read, ignored",
    "caption_cleaned": "control characters taken out of a caption",
}
_BIDI_CONTROLS = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


class Refused(Exception):
    """An item cannot be used; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, " ".join(detail.split())[:200]


@dataclass
class Decoded:
    """An upright RGB picture, what had to be put right, and whether the file can be kept as it is."""

    picture: Image.Image
    notes: list[str]
    verbatim: bool


def decode_picture(data: bytes, extension: str | None, limits: Decode) -> Decoded:
    """
    Decode a picture's file.

    Args:
        data (`bytes`): The file.
        extension (`str`, *optional*): What its name says.
        limits ([`Decode`]): Pixels at most, and peculiarities that are refused.

    Raises:
        Refused: If it is no picture, too large, damaged, or peculiar in a way that is refused.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # counted here, file by file
        picture = _open(data)
        if picture.width * picture.height > limits.max_pixels:
            raise Refused("too_many_pixels", f"{picture.width} x {picture.height}")
        try:
            notes = _peculiarities(picture, data)
            if extension and extension not in NO_CLAIM and FORMAT_OF_EXTENSION.get(extension) != _format_of(picture):
                notes.append("wrong_extension")
            if "bad_exif" in notes:
                picture = _without_exif(picture)
            # `to_rgb` copies what is as it should be, too: twice.
            is_plain = picture.mode == "RGB" and not set(notes) - {"wrong_extension"}
            rgb = picture if is_plain else to_rgb(picture)
        except MemoryError:
            raise  # of the machine, and not of the picture
        except Exception as error:  # decoders raise whatever they like
            raise Refused("damaged", str(error.__cause__ or error)) from None
    if refused := [note for note in notes if note in limits.refuse]:
        raise Refused("peculiar", ", ".join(refused))
    return Decoded(rgb, notes, _format_of(picture) in ("JPEG", "PNG") and not set(notes) - {"wrong_extension"})


def _format_of(picture: Image.Image) -> str | None:
    """Name a picture's format; cameras write JPEG files with several pictures, of which the first counts."""
    return "JPEG" if picture.format == "MPO" else picture.format


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Refused("too_many_pixels", str(error)) from None
    except UnidentifiedImageError:
        raise Refused("not_a_picture", f"begins with {data[:8]!r}") from None
    except MemoryError:
        raise
    except Exception as error:
        raise Refused("damaged", str(error)) from None


def _peculiarities(picture: Image.Image, data: bytes) -> list[str]:
    mode = picture.mode
    deep = mode.startswith("I") or mode == "F" or (picture.format == "PNG" and data[PNG_BIT_DEPTH] == 16)
    found = {
        "animated": getattr(picture, "is_animated", False) and picture.format != "MPO",
        "cmyk": mode in ("CMYK", "LAB", "YCbCr", "HSV"),
        "16_bit": deep,
        "palette": mode in ("P", "PA"),
        "transparent": picture.has_transparency_data,
        "gray": mode in ("1", "L", "LA", "La") or mode.startswith("I") or mode == "F",
    }
    picture.load()
    try:
        found["rotated"] = picture.getexif().get(0x0112, 1) not in (0, 1)
    except Exception:  # a good picture may carry bad EXIF data
        found["bad_exif"] = True
    return [name for name, is_so in found.items() if is_so]


def _without_exif(picture: Image.Image) -> Image.Image:
    bare = picture.copy()
    bare.format = None
    for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        bare.info.pop(name, None)
    return bare


def check_shape(
    width: int, height: int, limits: Filter, resize: Resize | None = None, max_pixels: int | None = None
) -> None:
    """
    Apply the filter of size and shape.

    Raises:
        Refused: If the picture is too small (also: smaller than the square of a code) or too elongated (also: so much
            that scaled it would have more than `max_pixels`).
    """
    short, long = sorted((width, height))
    if resize is not None and max_pixels is not None and resize.shortest_edge**2 * long > max_pixels * short:
        raise Refused("too_elongated", f"{width} x {height}, too many pixels when scaled")
    if resize is not None and min(width, height) < resize.multiple_of:
        raise Refused("too_small", f"{width} x {height}, smaller than a code")
    if limits.min_side is not None and min(width, height) < limits.min_side:
        raise Refused("too_small", f"{width} x {height}")
    if limits.max_aspect_ratio is not None and max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise Refused("too_elongated", f"{width} x {height}")


def clean_captions(captions: dict[str, str], limits: Captions) -> tuple[dict[str, str], list[str]]:
    """
    Bring captions to one line of printable text, in Unicode's composed form. What they say is not touched: markup and
    templates in them are text.

    Returns:
        `tuple[dict[str, str], list[str]]`: Captions by language, empty ones left out, and notes.

    Raises:
        Refused: If one is too long, or one is needed and there is none.

    Example:
        >>> clean_captions({"en": " a red\\x00 apple\\n"}, Captions())
        ({'en': 'a red apple'}, ['caption_cleaned'])
    """
    cleaned, notes = {}, set()
    for language in LANGUAGES:
        text = captions.get(language, "")
        if len(text) > limits.max_characters:
            raise Refused("caption_too_long", f"{len(text)} characters")
        line, changed = clean_text(text)
        notes |= {"caption_cleaned"} if changed else set()
        if line:
            cleaned[language] = line
    if limits.required and not cleaned:
        raise Refused("no_caption")
    return cleaned, sorted(notes)


def clean_text(text: str) -> tuple[str, bool]:
    """Bring a text to one printable line; say whether that took control characters out."""
    kept = "".join(
        c for c in text if c.isspace() or not (unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI_CONTROLS)
    )
    return unicodedata.normalize("NFC", " ".join(kept.split())), len(kept) != len(text)


def measure_item(item: Item, recipe: Recipe) -> dict[str, Any]:
    """
    Examine one item: all filters that need no other record.

    Returns:
        `dict`: The columns of `pipeline.MEASURED` but `position`; `reason` is `None` where the record may stay.
    """
    row: dict[str, Any] = {"key": item.key, "notes": [], "num_bytes": len(item.data or b""), "detail": ""}
    try:
        if item.data is None:
            raise Refused(item.reason or "no_picture", item.detail)
        decoded = decode_picture(item.data, item.extension, recipe.decode)
        picture = decoded.picture
        row |= {"width": picture.width, "height": picture.height, "verbatim": decoded.verbatim}
        limits = (recipe.filter or Filter(), recipe.resize, recipe.decode.max_pixels)
        check_shape(picture.width, picture.height, *limits)
        row["caption_characters"] = _longest(item.captions)  # for the report, should they be refused
        captions, notes = clean_captions(item.captions, recipe.captions)
        row |= {"notes": decoded.notes + notes, "caption_characters": _longest(captions)}
        if recipe.duplicates:
            row |= fingerprints(picture)
    except Refused as refused:
        return row | {"reason": refused.reason, "detail": refused.detail}
    return row | {"reason": None}


def _longest(captions: dict[str, str]) -> int:
    return max(map(len, captions.values()), default=0)


def fingerprints(picture: Image.Image) -> dict[str, Any]:
    """
    Describe a picture so that its duplicates can be found.

    Args:
        picture (`PIL.Image.Image`): In RGB.

    Returns:
        `dict`: `pixels` (SHA-256 of size and pixels), `perceptual` (64 bits of `imagehash.phash` as a number) and
        `colours` (the mean colours of a 4 x 4 grid, 48 bytes).
    """
    import imagehash

    digest = hashlib.sha256(f"{picture.width}x{picture.height}:".encode())
    digest.update(picture.tobytes())
    bits = imagehash.phash(picture).hash
    colours = picture.resize((HASH_GRID, HASH_GRID), Image.Resampling.BOX).tobytes()
    perceptual = int.from_bytes(np.packbits(bits.flatten()).tobytes(), "big")
    return {"pixels": digest.digest(), "perceptual": perceptual, "colours": colours}


@functools.lru_cache
def _image_processor(shortest_edge: int, multiple_of: int) -> MarsImageProcessorPil:
    size = {"size": {"shortest_edge": shortest_edge}, "downsample_factor": multiple_of}
    return MarsImageProcessorPil(**size, do_rescale=False, do_normalize=False)


def fit(picture: Image.Image, resize: Resize) -> Image.Image:
    """Scale a picture to its shorter side and cut the middle out, in whole codes, as MARS does with any picture."""
    process = _image_processor(resize.shortest_edge, resize.multiple_of)
    pixels = process(picture, max_pixels=picture.width * picture.height, return_tensors="np")["pixel_values"][0]
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)).astype(np.uint8))


def encode_file(picture: Image.Image, jpeg_quality: int | None = None) -> bytes:
    """Store a picture as PNG, or as JPEG of the given quality."""
    buffer = io.BytesIO()
    if jpeg_quality is None:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=jpeg_quality)
    return buffer.getvalue()


def thumbnail(data: bytes, extension: str | None, limits: Decode, side: int) -> Image.Image | None:
    """Show a picture small, or nothing if it cannot be decoded within the limits."""
    try:
        picture = decode_picture(data, extension, limits).picture
    except Refused:
        return None
    picture.thumbnail((side, side))
    return picture
