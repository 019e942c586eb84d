"""Stand-in: the suites name pictures on the Hub; each of them is one small picture here."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


@cache
def _folder() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(Path(folder.name, "picture.png"))
    return folder


def url_to_local_path(url: str) -> str:
    return str(Path(_folder().name, "picture.png"))
