"""Files of pictures: PNGs that say what decided them, put in place in one step."""

import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from . import __version__


def png_bytes(picture: Image.Image, **facts: Any) -> bytes:
    """
    Write a PNG with text chunks.

    Args:
        picture (`PIL.Image.Image`): The picture.
        facts: Names and values of the chunks, such as `prompt` and `seed`; what is no text is written as JSON.

    Returns:
        `bytes`: The file.

    Example:
        >>> Image.open(BytesIO(png_bytes(picture, prompt="a red apple", seed=0))).text["prompt"]
        'a red apple'
    """
    chunks = PngInfo()
    for name, value in {"Software": f"mars_hf {__version__}", **facts}.items():
        chunks.add_text(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    file = BytesIO()
    picture.save(file, format="PNG", pnginfo=chunks)
    return file.getvalue()


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in place in one step; what was there before stays whole until then."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


__all__ = ["png_bytes", "replace_file"]
