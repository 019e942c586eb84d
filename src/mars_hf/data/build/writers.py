"""
Records to files: what training reads, in parquet or WebDataset shards, and how a file comes into being.

A file is written under another name and put in place in one step, so that what is there is complete. The same records
give the same bytes: no times, no names of users, no paths.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from .recipe import Recipe

ROW_GROUP = 100  # records; small, so that single pictures can be read
# One name for all pictures of a WebDataset, PNG too: readers look inside, and `datasets` takes no changing columns.
PICTURE_MEMBER = "jpg"


def write_in_place(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then put it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one step."""
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    write_in_place(path, lambda scratch: scratch.write_text(text, encoding="utf-8") and None)


def write_rows(path: Path, rows: Iterable[dict[str, Any]], schema: Any) -> int:
    """Write rows as a parquet file in one step, a stretch at a time; count them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0

    def write(scratch: Path) -> None:
        nonlocal count
        iterator = iter(rows)
        with pq.ParquetWriter(scratch, schema, compression="zstd") as writer:
            while stretch := list(islice(iterator, 1000)):
                writer.write_table(pa.Table.from_pylist(stretch, schema=schema))
                count += len(stretch)

    write_in_place(path, write)
    return count


def features_of(recipe: Recipe) -> Any:
    """
    Describe the output of a recipe.

    Returns:
        `datasets.Features`: `key`; `image` and/or `image_codes` (raster order) with `codes_height` and `codes_width`;
        `height`, `width`; `caption_en`, `caption_zh` (either may be null); what further stages add; `source`. They
        are records to [`~mars_hf.data.records.open_records`].
    """
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    features: dict[str, Any] = {"key": Value("string")}
    if recipe.codes is None or recipe.codes.keep_images:
        features["image"] = ImageFeature()
    if recipe.codes:
        features |= {
            "image_codes": List(Value("int32")),
            "codes_height": Value("int32"),
            "codes_width": Value("int32"),
        }
    features |= {"height": Value("int32"), "width": Value("int32")}
    texts = ["caption_en", "caption_zh"]
    texts += ["fine_caption_en", "fine_caption_zh"] if recipe.recaption else []
    texts += ["prompt_en", "prompt_zh"] if recipe.resolution_text else []
    features |= {name: Value("string") for name in texts}
    features |= {name: Value("float32") for name in scores_of(recipe)}
    return Features({**features, "source": Value("string")})


def scores_of(recipe: Recipe) -> list[str]:
    """Name the columns with scores."""
    return [f"score_{name}" for name in ("clip", "aesthetic") if getattr(recipe, name)]


def suffix_of(recipe: Recipe) -> str:
    return {"parquet": ".parquet", "webdataset": ".tar"}[recipe.write.format]


def write_shard(path: Path, records: list[dict[str, Any]], schema: Any, index: int) -> None:
    """
    Write one output file.

    Args:
        path (`Path`): Where to; its suffix says in which format.
        records (`list[dict]`): With the columns of [`features_of`]; `image` holds a file's bytes.
        schema (`pyarrow.Schema`): That of [`features_of`].
        index (`int`): Number of the file; a WebDataset has names that differ across its files.
    """
    rows = [{name: record.get(name) for name in schema.names} for record in records]
    write_in_place(path, lambda scratch: _WRITERS[path.suffix](scratch, rows, schema, index))


def _write_parquet(path: Path, rows: list[dict[str, Any]], schema: Any, index: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if "image" in schema.names:
        rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows]
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, path, row_group_size=ROW_GROUP, compression="zstd")


def _write_tar(path: Path, rows: list[dict[str, Any]], schema: Any, index: int) -> None:
    """Members are named by number: what a source calls its records is data, and never a path."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, row in enumerate(rows):
            # Only texts can be null. `datasets` learns types from the first few records: of nulls it learns none.
            fields = {name: "" if value is None else value for name, value in row.items() if name != "image"}
            if "image" in schema.names:
                _add_member(archive, f"{index:05d}{number:05d}.{PICTURE_MEMBER}", row["image"])
            content = json.dumps(fields, ensure_ascii=False, sort_keys=True).encode()
            _add_member(archive, f"{index:05d}{number:05d}.json", content)


def _add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


_WRITERS = {".parquet": _write_parquet, ".tar": _write_tar}


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Read an output file back, record by record; `image` holds a file's bytes."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches(ROW_GROUP):
            for row in batch.to_pylist():
                yield {**row, "image": row["image"]["bytes"]} if "image" in row else row
        return
    with tarfile.open(path) as archive:
        image = None
        for member in archive:
            content = archive.extractfile(member).read()  # type: ignore[union-attr]
            if not member.name.endswith(".json"):
                image = content
            else:
                yield {**json.loads(content), **({} if image is None else {"image": image})}
