"""
Data sets on disk that are made of the emoji data: canvases that are not square (Stage II) and stories (documents).

Each is a folder with one parquet file, written in one step, that `open_records` reads. Stories are made of codes, so
that the picture of an emoji is encoded once; they carry on whose codes these are.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tqdm.auto import tqdm

from .composition import EmojiCompositions
from .emoji_captions import subject_weights
from .encode import check_split_name, open_manifest, read_manifest, write_manifest
from .records import open_records
from .stories import EmojiStories

_TEXT = Value("string")
_CODES = {"image_codes": List(Value("int32")), "height": Value("int32"), "width": Value("int32")}
CANVAS_FEATURES = Features(
    {
        "image": ImageFeature(),
        **dict.fromkeys(("caption_en", "caption_zh", "style", "kind", "place", "key"), _TEXT),
        "hexcodes": List(_TEXT),
    }
)
STORY_FEATURES = Features(
    {"segments": List({"text": _TEXT, **_CODES}), **dict.fromkeys(("title", "language", "kind", "key"), _TEXT)}
)


def write_canvases(
    data: Dataset,
    out: str | Path,
    num_records: int,
    split: str = "train",
    balance: float = 0.5,
    seed: int = 0,
    scale: int = 1,
    progress: bool = True,
) -> Path:
    """
    Write emoji on canvases that are not square; see [`EmojiCompositions`].

    Args:
        data (`datasets.Dataset`): Emoji data of one split; pictures of 128 pixels leave parts and pairs sharper.
        out (`str` or `Path`): Folder to write to.
        num_records (`int`): How many.
        split (`str`, defaults to `"train"`): The split of `data`, and the name to give the records.
        balance (`float`, defaults to 0.5): See [`subject_weights`].
        seed (`int`, defaults to 0): Decides all else.
        scale (`int`, defaults to 1): 1 makes 64 x 96 and 96 x 64 pixels, 2 the same pictures at twice the resolution.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If the file is there already, or the data do not fit.
    """
    sizes = [(64 * scale, 96 * scale), (96 * scale, 64 * scale)]
    path = _new_file(out, split)
    weights = subject_weights(data["hexcode"], balance).tolist()
    records = EmojiCompositions(data, num_records, split, sizes, weights=weights, seed=seed)

    def row(index: int) -> dict[str, Any]:
        record = records[index]
        kept = {name: record[name] for name in CANVAS_FEATURES if name in record and name != "image"}
        return {**kept, "image": {"bytes": _png(record["image"]), "path": None}, "key": f"canvas-{index}"}

    return _write(path, num_records, row, CANVAS_FEATURES, progress)


def write_stories(
    codes: str | Path, out: str | Path, num_stories: int, split: str = "train", seed: int = 0, progress: bool = True
) -> Path:
    """
    Write stories, with a `codes.json` by which another image tokenizer is refused; see [`EmojiStories`].

    Args:
        codes (`str` or `Path`): Folder of emoji data, as `mars-hf data encode` wrote it.
        out (`str` or `Path`): Folder to write to; it may hold the stories of another split.
        num_stories (`int`): How many.
        split (`str`, defaults to `"train"`): The split of `codes`, and the name to give the stories.
        seed (`int`, defaults to 0): Decides all else.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If the file is there already, the data hold no codes of single pictures or are of another split, or
            `out` holds stories of other codes.
    """
    path, made_by = _new_file(out, split), read_manifest(codes)
    pictures = open_records(codes, split)
    if missing := sorted(_CODES.keys() - set(pictures.column_names)):
        raise ValueError(f"Stories are made of pictures, but {codes} has no `{missing[0]}`. Give encoded emoji data.")
    stories = EmojiStories(pictures, num_stories, (split,), seed)

    def row(index: int) -> dict[str, Any]:
        story = stories[index]
        segments = [_segment(part, pictures) for part in story["segments"]]
        kept = {name: story[name] for name in ("title", "language", "kind")}
        return {"segments": segments, **kept, "key": f"story-{index}"}

    recipe = {"stories_of": made_by["recipe"]}
    manifest, done = open_manifest(Path(out), made_by["tokenizer"], recipe, split, num_stories)
    _write(path, num_stories, row, STORY_FEATURES, progress)
    done |= {"complete": True, "shards": 1, "seen": num_stories, "records": num_stories}
    write_manifest(Path(out), manifest)
    return path


def _segment(part: str | dict[str, Any], codes: Dataset) -> dict[str, Any]:
    if isinstance(part, str):
        return {"text": part, **dict.fromkeys(_CODES)}
    picture = codes[part["index"]]
    return {"text": None, **{name: picture[name] for name in _CODES}}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _new_file(out: str | Path, split: str) -> Path:
    check_split_name(split)
    folder = Path(out) / "data"
    if there := sorted(folder.glob(f"{split}-*.parquet")):
        raise ValueError(f"{there[0]} is there already. Choose another folder, or remove it.")
    return folder / f"{split}-00000-of-00001.parquet"


def _write(path: Path, count: int, row: Callable[[int], dict[str, Any]], features: Features, progress: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    rows = [row(index) for index in tqdm(range(count), desc="Writing", unit="record", disable=not progress)]
    Dataset.from_list(rows, features=features).to_parquet(scratch)
    os.replace(scratch, path)
    return path


__all__ = ["write_canvases", "write_stories"]
