"""
Sources to shards, shards to items: a picture's file, its captions and its key, or the reason why there is none.

A shard is what one worker reads from start to end: a tar or parquet file, or a stretch of a folder or data set. Its
items come in the same order every time, so that (shard, position) names an item for good. Nothing is decoded here and
nothing is written: names inside archives are keys, never paths.
"""

import functools
import hashlib
import json
import os
import re
import stat
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .recipe import LANGUAGES, Source

PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "image", "img")
TEXT_EXTENSIONS = ("txt", "json", "cls")
MAX_KEY_CHARACTERS = 512
MAX_HEADER_BYTES = 2**20  # of a tar's own long names and attributes
MAX_FILES = 100  # of a sample in a tar
ROWS_AT_ONCE = 16
MAX_COMPRESSION = 30  # times, of a stretch of a parquet file beyond the limit; pictures hardly shrink, bombs by 1,000s
UNDECODABLE = object()  # stands for a text that is no UTF-8
UNSAFE = "absolute, with '..', too long or unprintable"


@dataclass
class Item:
    """What a source holds at one position; without `data` it is unusable, and `reason` says why."""

    key: str
    data: bytes | None = None
    captions: dict[str, str] = field(default_factory=dict)
    extension: str | None = None
    reason: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Shard:
    """
    A unit of work.

    Args:
        source (`str`): Name of its source.
        name (`str`): Goes in front of the names inside a file, which may come again in other files.
        path (`str`): A file, a folder, or a data set.
        size (`int`): Bytes of the file, or number of items: with `modified`, by which a changed input is noticed.
        modified (`str`): When the file was last changed; of a folder, a hash of all files' names, sizes and times.
        start (`int`): First row of a data set.
        files (`tuple[str, ...]`): Pictures of a folder, relative to it.
    """

    source: str
    name: str
    path: str
    size: int
    modified: str = ""
    start: int = 0
    files: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Shard":
        return cls(**{**content, "files": tuple(content["files"])})


def list_shards(source: Source) -> list[Shard]:
    """
    Find the shards of a source, in the order of their names.

    Raises:
        ValueError: If there are none.
    """
    shards = {"folder": _folder_shards, "datasets": _dataset_shards}.get(source.kind, _file_shards)(source)
    if not shards:
        raise ValueError(f"Source {source.name}: {source.path} holds nothing of kind {source.kind}.")
    return shards


def _file_shards(source: Source) -> list[Shard]:
    import fsspec

    files, path = fsspec.core.url_to_fs(source.path)
    found = files.glob(path, detail=True)
    entries = sorted(
        (name, info)
        for name, info in found.items()
        if info["type"] == "file" or (info.get("islink") and files.isfile(name))  # a snapshot of the Hub is of links
    )
    folder = os.path.commonpath([os.path.dirname(name) for name, _ in entries]) if entries else ""
    return [
        Shard(
            source.name,
            os.path.splitext(os.path.relpath(name, folder))[0],
            files.unstrip_protocol(name),
            info["size"],
            str(info.get("mtime") or info.get("ETag") or ""),
        )
        for name, info in entries
    ]


def _folder_shards(source: Source) -> list[Shard]:
    root = Path(source.path).absolute()  # workers on other machines have working folders of their own
    if not root.is_dir():
        raise ValueError(f"Source {source.name}: {root} is no folder.")
    names = []
    for folder, subfolders, files in os.walk(root, onerror=_raise):  # links to folders are not followed
        linked = [name for name in subfolders if (Path(folder) / name).is_symlink()]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files + linked]
    kinds = _text_extensions(source)
    stems = {name: _text_stem(name, kinds) for name in names}
    with_picture = {os.path.splitext(name)[0] for name, stem in stems.items() if stem is None}
    texts: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        if stems[name] in with_picture:
            texts[stems[name]].append(name)
    # A text without its picture is tried as a picture, so that it is counted.
    ordered = sorted(name for name in names if stems[name] not in with_picture)
    shards = []
    for start in range(0, len(ordered), source.records_per_shard):
        chunk = tuple(ordered[start : start + source.records_per_shard])
        files = [file for name in chunk for file in (name, *texts[os.path.splitext(name)[0]])]
        shards.append(Shard(source.name, "", str(root), len(chunk), _state_of(root, files), files=chunk))
    return shards


def _raise(error: OSError) -> None:
    raise error


def _text_extensions(source: Source) -> list[str]:
    """Say which files beside a picture are texts, those with more dots first: `en.txt` is no text `en`."""
    named = {name.lower() for name in (source.caption_en, source.caption_zh) if name is not None}
    return sorted({*TEXT_EXTENSIONS, *named}, key=lambda kind: (-kind.count("."), kind))


def _text_stem(name: str, kinds: list[str]) -> str | None:
    return next((name[: -len(kind) - 1] for kind in kinds if name.lower().endswith(f".{kind}")), None)


def _state_of(root: Path, files: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in files:
        status = os.lstat(root / name)
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _dataset_shards(source: Source) -> list[Shard]:
    rows = _load_rows(source.path, source.configuration, source.split, source.image)
    named = {source.key, source.caption_en, source.caption_zh} - {None}
    if missing := sorted(named - set(rows.column_names)):
        raise ValueError(
            f"Source {source.name}: {source.path} has no column {', '.join(missing)}; there are "
            f"{', '.join(rows.column_names)}."
        )
    _refuse_pictures_elsewhere(rows, source)
    steps = range(0, len(rows), source.records_per_shard)
    cached = Path(rows.cache_files[0]["filename"]).parts if rows.cache_files else ()
    fingerprint = "/".join(cached[-2:])  # the folder's name is a hash of what was loaded
    sizes = [min(source.records_per_shard, len(rows) - start) for start in steps]
    return [
        Shard(source.name, "", source.path, size, fingerprint, start) for start, size in zip(steps, sizes, strict=True)
    ]


def _refuse_pictures_elsewhere(rows: Any, source: Source) -> None:
    """Of pictures that are files those in the data set's own folder are read; others would all be left out."""
    from datasets import Image

    cell = rows[0][source.image] if len(rows) and isinstance(rows.features[source.image], Image) else None
    if cell is None or cell["bytes"] is not None or not cell["path"]:
        return
    root = Path(source.path).resolve()
    if not root.is_dir() or not (root / cell["path"]).resolve().is_relative_to(root):
        raise ValueError(
            f"Source {source.name}: the pictures of {source.path} are files elsewhere, such as "
            f"{PurePosixPath(cell['path']).name}, which are not read. Put them into a folder and take `kind: folder`."
        )


def read_items(shard: Shard, source: Source, max_file_bytes: int) -> Iterator[Item]:
    """
    Read a shard.

    Args:
        shard ([`Shard`]): What to read.
        source ([`Source`]): Where it comes from.
        max_file_bytes (`int`): Larger files become items without data.

    Yields:
        [`Item`]: In the shard's own order. A shard that cannot be read (on) ends with an item that says so.
    """
    try:
        for item in READERS[source.kind](shard, source, max_file_bytes):
            if item.data is not None and not _is_safe_key(item.key):
                item.data, item.reason, item.detail = None, "unsafe_name", UNSAFE
            item.key, item.detail = _printable(item.key), _printable(item.detail)
            yield item
    except Exception as error:  # whatever a broken file makes its library raise
        if _is_of_the_machine(error):
            raise  # not of the file: it may be read next time
        name = _printable(PurePosixPath(shard.path).name)
        yield Item(name, reason="unreadable_shard", detail=_printable(f"{type(error).__name__}: {error}"))


def _is_of_the_machine(error: BaseException) -> bool:
    """Whether a failure is of memory, disk, network or installation, and says nothing about what was to be read."""
    return isinstance(error, (MemoryError, ImportError, ConnectionError, TimeoutError)) or (
        isinstance(error, OSError) and error.errno is not None
    )


class _Opened:
    """A file whose failures to read are those of the machine: of its bytes others judge."""

    def __init__(self, file: Any):
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, *args: Any) -> bytes:
        with _failures_of_the_machine():
            return self._file.read(*args)


@contextmanager
def _failures_of_the_machine() -> Iterator[None]:
    """Make of whatever a file system raises, such as an answer of the Hub, what ends the build and not the shard."""
    try:
        yield
    except Exception as error:
        if _is_of_the_machine(error):
            raise
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _opened(path: str) -> Iterator[_Opened]:
    import fsspec

    opened = fsspec.open(path, "rb")
    with _failures_of_the_machine():
        file = opened.__enter__()
    try:
        yield _Opened(file)
    finally:
        opened.__exit__(None, None, None)


def _read_tar(shard: Shard, source: Source, max_file_bytes: int) -> Iterator[Item]:
    """Group consecutive members of one name, as WebDataset does, without ever going back in the file."""
    stem, group, failure = "", {}, None  # a group holds, all together, no more than one file may
    room = max_file_bytes
    with (
        _opened(shard.path) as file,
        tarfile.open(fileobj=file, mode="r|*", tarinfo=_CheckedTarInfo) as archive,
    ):
        try:
            for member in archive:
                if member.isdir():
                    continue
                if not member.isfile():
                    yield Item(f"{shard.name}/{member.name}", reason="not_a_file", detail="a link or a device")
                    continue
                member_stem, extension = _stem_and_extension(member.name)
                if group and (member_stem != stem or extension in group):
                    yield _item_of_group(shard, stem, group, source)
                    group, room = {}, max_file_bytes
                stem = member_stem
                if len(group) == MAX_FILES:
                    continue
                group[extension] = None if member.size > room else archive.extractfile(member).read()
                room -= len(group[extension] or b"")
        except Exception as error:
            failure = error
        if group:  # also of a broken file: complete or not, what it lacks is found out like everywhere
            yield _item_of_group(shard, stem, group, source)
        if failure is not None:
            raise failure


class _CheckedTarInfo(tarfile.TarInfo):
    """Headers as `tarfile` reads them, but a damaged one is no silent end and a vast one is not read into memory."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            header = super().frombuf(buf, encoding, errors)
        except (tarfile.EmptyHeaderError, tarfile.EOFHeaderError):
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged: {error}") from None
        is_description = header.type not in tarfile.SUPPORTED_TYPES or header.type in _DESCRIPTIONS
        if is_description and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


_DESCRIPTIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def _stem_and_extension(name: str) -> tuple[str, str]:
    """Cut a name at the first dot of its last part (WebDataset's rule)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()[: MAX_KEY_CHARACTERS + 1]  # enough to be refused


def _item_of_group(shard: Shard, stem: str, group: dict[str, bytes | None], source: Source) -> Item:
    texts = _text_extensions(source)
    others = [name for name in group if name not in texts]
    pictures = [source.image] if source.image else [name for name in PICTURE_EXTENSIONS if name in group] or others
    item = Item(f"{shard.name}/{stem}")
    if not all(_is_safe_key(f"{stem}.{extension}") for extension in group):
        item.reason, item.detail = "unsafe_name", UNSAFE
        return item
    if not pictures or pictures[0] not in group:
        item.reason, item.detail = "no_picture", f"only {', '.join(group)}"
        return item
    return _fill(item, group[pictures[0]], pictures[0], group, source)


def _fill(item: Item, data: bytes | None, extension: str, texts: dict[str, bytes | None], source: Source) -> Item:
    """Add the picture's file and the captions beside it."""
    item.extension = extension.rpartition(".")[2]
    if data is None:
        item.reason = "file_too_large"
        return item
    if large := [name for name, text in texts.items() if text is None and name in _text_extensions(source)]:
        item.reason, item.detail = "caption_too_long", f"a large file: {', '.join(large)}"
        return item
    try:
        item.captions = _captions_beside(texts, source)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON
        item.reason, item.detail = "undecodable_caption", str(error)[:200]
        return item
    item.data = data
    return item


def _captions_beside(texts: dict[str, bytes | None], source: Source) -> dict[str, str]:
    fields: dict[str, Any] = {}
    if texts.get("json"):
        content = json.loads(texts["json"])
        fields = content if isinstance(content, dict) else {}
    names = {language: source.field_of(language) for language in LANGUAGES}
    for name in names.values():
        if name is not None and name != "json" and texts.get(name) is not None:
            fields = {**fields, name: texts[name].decode("utf-8-sig")}
    return _captions_in(fields, source)


def _captions_in(fields: dict[str, Any], source: Source) -> dict[str, str]:
    found = {language: fields.get(source.field_of(language) or "") for language in LANGUAGES}
    return {language: text for language, text in found.items() if isinstance(text, str)}


def _read_folder(shard: Shard, source: Source, max_file_bytes: int) -> Iterator[Item]:
    root = Path(shard.path)
    for name in shard.files:
        path = root / name
        if not stat.S_ISREG(os.lstat(path).st_mode):  # a pipe would never end; what is gone is the machine's affair
            yield Item(name, reason="not_a_file", detail="a link or a device")
            continue
        stem, suffix = os.path.splitext(name)
        needed = {"json", source.caption_en, source.caption_zh} - {None}
        beside = {kind: _in_any_case(root, stem, kind) for kind in needed}
        try:
            texts = {
                kind: _read_up_to(file, max_file_bytes)
                for kind, file in beside.items()
                if file != path and file.is_file() and not file.is_symlink()
            }
            data = _read_up_to(path, max_file_bytes)
        except PermissionError as error:  # of this file; other failures are the machine's
            yield Item(name, reason="unreadable_file", detail=str(error)[:200])
            continue
        yield _fill(Item(name), data, suffix.lower()[1:], texts, source)


def _in_any_case(root: Path, stem: str, kind: str) -> Path:
    """Find a text beside a picture, `1.txt` or `1.TXT`."""
    small, large = root / f"{stem}.{kind}", root / f"{stem}.{kind.upper()}"
    return large if not small.is_file() and large.is_file() else small


def _read_up_to(path: Path, max_bytes: int) -> bytes | None:
    return None if path.stat().st_size > max_bytes else path.read_bytes()


def _read_parquet(shard: Shard, source: Source, max_file_bytes: int) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {source.image, source.key, source.caption_en, source.caption_zh} - {None}
    with _opened(shard.path) as file:
        table = pq.ParquetFile(file)
        if missing := sorted(columns - set(table.schema_arrow.names)):
            raise ValueError(f"no column {', '.join(missing)}; there are {', '.join(table.schema_arrow.names)}")
        texts = [name for name in columns if pa.types.is_string(table.schema_arrow.field(name).type)]
        number = 0
        for index in range(table.num_row_groups):
            group = table.metadata.row_group(index)
            packed, unpacked = _sizes_of(group, columns)
            if unpacked > max_file_bytes and unpacked > MAX_COMPRESSION * packed:
                detail = f"{group.num_rows} rows of {packed} bytes that unpack to {unpacked}"
                yield Item(f"{shard.name}/{number}", reason="file_too_large", detail=detail)
                number += group.num_rows
                continue
            at_once = min(ROWS_AT_ONCE, max(1, max_file_bytes // max(1, unpacked)))
            for batch in table.iter_batches(at_once, row_groups=[index], columns=sorted(columns)):
                for name in texts:  # as bytes: one text that is no UTF-8 would spoil the batch
                    batch = batch.set_column(batch.schema.get_field_index(name), name, batch[name].cast(pa.binary()))
                for row in batch.to_pylist():
                    row = _decode_texts(row, texts)
                    yield _item_of_row(row, f"{shard.name}/{number}", source, max_file_bytes, None)
                    number += 1


def _sizes_of(group: Any, columns: set[str]) -> tuple[int, int]:
    """Sum up the bytes of columns of a row group, as stored and unpacked, by what the file says of itself."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    own = [c for c in chunks if any(f"{c.path_in_schema}.".startswith(f"{name}.") for name in columns)]
    return sum(chunk.total_compressed_size for chunk in own), sum(chunk.total_uncompressed_size for chunk in own)


def _decode_texts(row: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    for name in texts:
        try:
            row[name] = row[name] if row[name] is None else row[name].decode()
        except UnicodeDecodeError:
            row[name] = UNDECODABLE
    return row


@functools.lru_cache(maxsize=4)
def _load_rows(path: str, configuration: str | None, split: str, image: str) -> Any:
    from datasets import Image, load_dataset

    rows = load_dataset(path, configuration, split=split)
    if image not in rows.column_names:
        raise ValueError(f"{path} has no column {image}; there are {', '.join(rows.column_names)}.")
    # Not decoded by the library: it would decompress whatever comes.
    return rows.cast_column(image, Image(decode=False)) if isinstance(rows.features[image], Image) else rows


def _read_dataset(shard: Shard, source: Source, max_file_bytes: int) -> Iterator[Item]:
    rows = _load_rows(source.path, source.configuration, source.split, source.image)
    root = Path(source.path).resolve() if Path(source.path).is_dir() else None
    for number in range(shard.start, shard.start + shard.size):
        yield _item_of_row(rows[number], str(number), source, max_file_bytes, root)


def _item_of_row(row: dict[str, Any], key: str, source: Source, max_file_bytes: int, root: Path | None) -> Item:
    cell = row.get(source.image)
    cell = cell if isinstance(cell, dict) else {"bytes": cell}
    name = cell.get("path") or ""
    named = source.key is not None and row.get(source.key) not in (None, "", UNDECODABLE)
    item = Item(str(row[source.key]) if named else key)
    item.extension = os.path.splitext(name)[1].lower()[1:] if isinstance(name, str) else None
    item.captions = _captions_in(row, source)
    if UNDECODABLE in (row.get(source.caption_en or ""), row.get(source.caption_zh or "")):
        item.reason, item.detail = "undecodable_caption", "no UTF-8"
        return item
    data = cell.get("bytes")
    if data is None and root is not None and name:
        data = _file_inside(root, name, max_file_bytes)
    if not isinstance(data, bytes):
        item.reason, item.detail = "no_picture", "the row holds no bytes"
    elif len(data) > max_file_bytes:
        item.reason = "file_too_large"
    else:
        item.data = data
    return item


def _file_inside(root: Path, name: str, max_file_bytes: int) -> bytes | None:
    """Read a file that a row of a local data set names, if it lies in that data set's own folder."""
    path = (root / name).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(max_file_bytes + 1)


READERS: dict[str, Callable[[Shard, Source, int], Iterator[Item]]] = {
    "webdataset": _read_tar,
    "folder": _read_folder,
    "parquet": _read_parquet,
    "datasets": _read_dataset,
}


_PLAIN_KEY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)  # no part begins with a dot


def _is_safe_key(key: str) -> bool:
    """A key names nothing outside a folder on any system, should somebody unpack files under it."""
    if len(key) <= MAX_KEY_CHARACTERS and _PLAIN_KEY.fullmatch(key):
        return True  # nearly all, and `pathlib` takes a tenth of what decoding a picture does
    if not key or len(key) > MAX_KEY_CHARACTERS or key != _printable(key):
        return False
    parts = (*PurePosixPath(key).parts, *PureWindowsPath(key).parts)
    return not (PurePosixPath(key).is_absolute() or PureWindowsPath(key).anchor or ".." in parts)


def _printable(text: str) -> str:
    if text.isprintable():
        return text[:MAX_KEY_CHARACTERS]
    shown = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    return shown[:MAX_KEY_CHARACTERS]
