"""Construction of training data: every hostile item is caught by its reason, nothing good is lost, runs can resume."""

import base64
import io
import itertools
import json
import os
import random
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from datasets import Dataset
from PIL import Image, ImageFile
from typer.testing import CliRunner

from mars_hf.cli import app
from mars_hf.data.build import pictures, pipeline, readers
from mars_hf.data.build.duplicates import NearDuplicates
from mars_hf.data.build.pipeline import build_dataset
from mars_hf.data.build.recipe import Filter, Recipe, Resize, load_recipe, make_recipe
from mars_hf.data.build.writers import read_records

SIZE = (96, 64)
MAX_PIXELS = 1_000_000


def smooth_picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Blobs of colour: no two seeds look alike."""
    values = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def bomb(width: int = 40_000, height: int = 40_000) -> bytes:
    """A PNG of a few bytes whose header promises more pixels than any machine should decode."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def put(folder: Path, name: str, data: bytes, caption: str | bytes | None = "a caption") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    if caption is not None:
        text = caption if isinstance(caption, bytes) else caption.encode()
        (folder / name).with_suffix(".txt").write_bytes(text)


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def recipe_of(out: Path, *sources: dict[str, Any], **settings: Any) -> Recipe:
    return make_recipe({"sources": [*sources], "out": str(out), "engine": {"workers": 0}, **settings})


def folder_source(path: Path, **settings: Any) -> dict[str, Any]:
    return {"name": "raw", "kind": "folder", "path": str(path), **settings}


def tar_source(path: Path, **settings: Any) -> dict[str, Any]:
    return {"name": "raw", "kind": "webdataset", "path": str(path), **settings}


def records_of(out: Path) -> list[dict[str, Any]]:
    return [record for path in sorted((out / "data").iterdir()) for record in read_records(path)]


def bytes_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Five pictures with captions."""
    for seed in range(5):
        put(tmp_path / "raw", f"{seed}.png", encoded(smooth_picture(seed)), f"picture {seed}")
    return tmp_path / "raw"


# Hostile input


def plant(folder: Path) -> dict[str, str | None]:
    """Fill a folder; give for each file the reason that must drop it, or None if it must stay."""
    picture = smooth_picture(100)
    good = {f"good-{seed:02d}.png": (encoded(smooth_picture(seed)), f"picture {seed}") for seed in range(12)}
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    deep = Image.fromarray(np.asarray(smooth_picture(102).convert("L")).astype(np.uint16) * 257)
    clear = smooth_picture(104).convert("RGBA")
    clear.putalpha(smooth_picture(105).convert("L"))
    frames = [smooth_picture(seed) for seed in (106, 107)]
    peculiar = {
        "png-named.jpg": encoded(picture),
        "jpeg-named.dat": encoded(smooth_picture(110), "JPEG"),
        "rotated.jpg": encoded(smooth_picture(101), "JPEG", exif=exif),
        "bad-exif.png": encoded(smooth_picture(111), exif=b"nonsense that is no TIFF header"),
        "deep.png": encoded(deep),
        "palette.png": encoded(smooth_picture(103).quantize(64)),
        "clear.png": encoded(clear),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "cmyk.jpg": encoded(smooth_picture(108).convert("CMYK"), "JPEG"),
        "gray.png": encoded(smooth_picture(109).convert("L")),
    }
    jpeg = encoded(smooth_picture(120), "JPEG", quality=95)
    tiff = io.BytesIO()
    smooth_picture(121).save(tiff, "EPS")
    bad = {
        "later-00-copy.png": (good["good-00.png"][0], "exact_duplicate"),
        "later-01-other-format.bmp": (encoded(smooth_picture(1), "BMP"), "exact_duplicate"),
        "later-02-recompressed.jpg": (encoded(smooth_picture(2), "JPEG", quality=60), "near_duplicate"),
        "later-03-smaller.png": (encoded(smooth_picture(3).resize((72, 48))), "near_duplicate"),
        "bomb.png": (bomb(), "too_many_pixels"),
        "bomb-below-pillows-limit.png": (bomb(2000, 2000), "too_many_pixels"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "damaged"),
        "cut.png": (encoded(smooth_picture(122))[:3000], "damaged"),
        "page.jpg": (b"<html><body>404 not found</body></html>", "not_a_picture"),
        "empty.png": (b"", "not_a_picture"),
        "script.eps": (tiff.getvalue(), "not_a_picture"),
        "large.png": (encoded(smooth_picture(123)) + bytes(300_000), "file_too_large"),
        "small.png": (encoded(smooth_picture(124, (40, 20))), "too_small"),
        "long.png": (encoded(smooth_picture(125, (400, 40))), "too_elongated"),
    }
    expected: dict[str, str | None] = {}
    for name, (data, caption) in good.items():
        put(folder, name, data, caption)
        expected[name] = None
    for name, data in peculiar.items():
        put(folder, name, data, f"picture {name}")
        expected[name] = None
    for name, (data, reason) in bad.items():
        put(folder, name, data)
        expected[name] = reason
    put(folder, "controls.png", encoded(smooth_picture(130)), "a \x00red\x1b[31m\u202e apple\r\n{{7*7}} <script>")
    put(folder, "megabyte.png", encoded(smooth_picture(131)), "x" * 2**20)
    put(folder, "silent.png", encoded(smooth_picture(132)), None)
    put(folder, "blank.png", encoded(smooth_picture(133)), " \n\t\x00")
    put(folder, "gbk.png", encoded(smooth_picture(134)), "红苹果".encode("gbk"))
    put(folder, "notes.md", b"# not a picture", None)
    (folder / "link.png").symlink_to(folder / "good-00.png")
    os.mkfifo(folder / "pipe.png")
    expected |= {"controls.png": None, "megabyte.png": "caption_too_long", "silent.png": "no_caption"}
    expected |= {"blank.png": "no_caption", "gbk.png": "undecodable_caption", "notes.md": "not_a_picture"}
    return expected | {"link.png": "not_a_file", "pipe.png": "not_a_file"}


STAGES: dict[str, Any] = {
    "decode": {"max_pixels": MAX_PIXELS, "max_file_bytes": 250_000},
    "filter": {"min_side": 32, "max_aspect_ratio": 3},
    "duplicates": {},
}


def test_every_planted_item_is_caught_by_its_reason_and_nothing_good_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plant(tmp_path / "raw")
    decoded: list[int] = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: (decoded.append(self.width * self.height), load(self))[1]
    )
    recipe = recipe_of(tmp_path / "out", folder_source(tmp_path / "raw", records_per_shard=7), **STAGES)
    summary = build_dataset(recipe, progress=False)

    records = {record["key"].removeprefix("raw/"): record for record in records_of(tmp_path / "out")}
    assert records.keys() == {name for name, reason in expected.items() if reason is None}
    assert summary["dropped"] == Counter(reason for reason in expected.values() if reason)
    assert summary["items"] == len(expected) and summary["kept"] == len(records)
    assert summary["notes"] == {
        "animated": 1, "cmyk": 1, "16_bit": 1, "palette": 2, "transparent": 1, "gray": 2, "rotated": 1,
        "wrong_extension": 2, "bad_exif": 1, "caption_cleaned": 1,
    }  # fmt: skip
    assert max(decoded) <= MAX_PIXELS  # no bomb was decoded, also not for the report
    assert records["controls.png"]["caption_en"] == "a red[31m apple {{7*7}} <script>"


def test_what_was_put_right_looks_as_pillow_shows_it(tmp_path: Path) -> None:
    plant(tmp_path / "raw")
    build_dataset(recipe_of(tmp_path / "out", folder_source(tmp_path / "raw"), **STAGES), progress=False)
    records = {record["key"].removeprefix("raw/"): record for record in records_of(tmp_path / "out")}

    def shown(name: str) -> np.ndarray:
        picture = Image.open(io.BytesIO(records[name]["image"]))
        assert picture.mode == "RGB" and picture.size == (records[name]["width"], records[name]["height"])
        return np.asarray(picture)

    def source(name: str) -> Image.Image:
        return Image.open(tmp_path / "raw" / name)

    assert (shown("rotated.jpg") == np.rot90(np.asarray(source("rotated.jpg")), -1)).all()
    for name in ("palette.png", "cmyk.jpg", "gray.png", "moving.gif", "bad-exif.png"):
        assert (shown(name) == np.asarray(source(name).convert("RGB"))).all()
    assert (shown("deep.png")[..., 0] == np.asarray(source("deep.png")) // 257).all()
    clear = np.asarray(source("clear.png")).astype(float)
    on_white = clear[..., :3] * clear[..., 3:] / 255 + 255 - clear[..., 3:]
    assert np.abs(shown("clear.png") - on_white).max() <= 1
    for name in ("good-00.png", "png-named.jpg", "jpeg-named.dat"):  # no need to touch them
        assert records[name]["image"] == (tmp_path / "raw" / name).read_bytes()


def test_peculiar_pictures_can_be_refused(tmp_path: Path) -> None:
    plant(tmp_path / "raw")
    stages = STAGES | {"decode": {**STAGES["decode"], "refuse": ["animated", "transparent"]}}
    summary = build_dataset(recipe_of(tmp_path / "out", folder_source(tmp_path / "raw"), **stages), progress=False)
    assert summary["dropped"]["peculiar"] == 2 and not {"animated", "transparent"} & summary["notes"].keys()


def test_names_in_archives_are_never_paths_and_broken_archives_are_counted(tmp_path: Path) -> None:
    png = [encoded(smooth_picture(seed)) for seed in range(12)]
    shards = tmp_path / "shards"
    escapes = ["../../evil", "/tmp/evil", "a/../../evil", "C:/evil", "back\\..\\..\\evil", "new\nline", "k" * 600]
    members = [(f"{name}.png", png[0]) for name in escapes]
    tar_of(shards / "0-names.tar", [*members, ("good/one.png", png[1]), ("good/one.txt", b"one")])
    with tarfile.open(shards / "1-links.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
    whole = tar_of(tmp_path / "whole.tar", [m for i in (2, 3, 4) for m in ((f"{i}.png", png[i]), (f"{i}.txt", b"t"))])
    content = whole.read_bytes()
    (shards / "2-cut.tar").write_bytes(content[: len(content) // 2])
    (shards / "3-no.tar").write_bytes(b"this is no archive" * 1000)
    second = content.index(b"3.png")
    (shards / "4-hit.tar").write_bytes(content[:second] + b"\xff" * 512 + content[second + 512 :])
    twice = [("5.png", png[5]), ("5.txt", b"t"), ("5.png", png[6]), ("5.txt", b"t")]
    tar_of(shards / "5-twice.tar", [*twice, ("only.txt", b"t"), ("list.json", b"[" * 100_000), ("list.png", png[7])])
    vast = tarfile.TarInfo("x")
    vast.type, vast.size = tarfile.GNUTYPE_LONGNAME, 2**33
    (shards / "6-vast.tar").write_bytes(vast.tobuf() + bytes(1024))
    before = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in path.parents}

    summary = build_dataset(
        recipe_of(tmp_path / "out", tar_source(shards / "*.tar"), duplicates={}, write={"format": "webdataset"}),
        progress=False,
    )
    assert summary["dropped"] == {
        "unreadable_shard": 4,  # cut, no archive, damaged header, vast header
        "not_a_file": 3,
        "unsafe_name": len(escapes),
        "no_picture": 1,
        "undecodable_caption": 1,
        "duplicate_key": 1,  # 5, in one shard; 2 comes in two shards, where names are their own
        "exact_duplicate": 1,
    }
    assert [record["key"] for record in records_of(tmp_path / "out")] == [
        "raw/0-names/good/one",
        "raw/2-cut/2",
        "raw/5-twice/5",
    ]
    (written,) = (tmp_path / "out" / "data").iterdir()
    with tarfile.open(written) as archive:
        assert archive.getnames() == [f"{i:010d}.{kind}" for i in range(3) for kind in ("jpg", "json")]
    now = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in path.parents}
    assert now - before == {tmp_path / "out"} and not Path("/tmp/evil.png").exists()


def test_shards_may_be_links_as_in_a_snapshot_of_the_hub(tmp_path: Path) -> None:
    whole = tar_of(tmp_path / "blobs" / "0f3a", [("1.png", encoded(smooth_picture(1))), ("1.txt", b"one")])
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "train-0.tar").symlink_to(whole)
    (snapshot / "train-1.tar").symlink_to(tmp_path / "blobs" / "missing")
    build_dataset(recipe_of(tmp_path / "out", tar_source(snapshot / "*.tar")), progress=False)
    assert [record["key"] for record in records_of(tmp_path / "out")] == ["raw/train-0/1"]


def test_the_report_shows_text_of_strangers_as_text(tmp_path: Path, raw: Path) -> None:
    attack = "<script>alert(1)</script> {{ 7*7 }} ${7*7} {% raw %} '\"> <img src=x onerror=alert(1)>"
    put(raw, "kept.png", encoded(smooth_picture(50)), attack)
    put(raw, "<b>dropped & shown.png", encoded(smooth_picture(51, (300, 10))), attack)
    stages = {"filter": {"max_aspect_ratio": 3}}
    summary = build_dataset(recipe_of(tmp_path / "out", folder_source(raw), **stages), progress=False)
    page = (tmp_path / "out" / "report.html").read_text()

    assert summary["items"] == summary["kept"] + sum(summary["dropped"].values()) == 7
    assert "<script" not in page and "<img src" not in page and "<b>" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; {{ 7*7 }} ${7*7} {% raw %}") == 2
    assert "default-src 'none'" in page
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == summary
    ratio = summary["histograms"]["ratio"]
    assert sum(ratio["kept"]) == 6 and sum(ratio["dropped"]) == 1 and ratio["threshold"] == 3


def test_the_report_shows_pictures_that_were_kept_and_dropped_and_why(tmp_path: Path, raw: Path) -> None:
    small, long = smooth_picture(50, (90, 20)), smooth_picture(51, (120, 30))
    put(raw, "small.png", encoded(small), None)
    put(raw, "long.png", encoded(long))
    put(raw, "silent.png", encoded(smooth_picture(52)), None)
    put(raw, "wordy.png", encoded(smooth_picture(53)), "x" * 40)
    stages = {"filter": {"min_side": 24, "max_aspect_ratio": 3}, "captions": {"max_characters": 20}}
    summary = build_dataset(recipe_of(tmp_path / "out", folder_source(raw), **stages), progress=False)
    assert summary["dropped"] == {"too_small": 1, "too_elongated": 1, "caption_too_long": 1, "no_caption": 1}
    page = (tmp_path / "out" / "report.html").read_text()
    sections = {section.partition("<")[0]: section for section in page.split("<h2>")[1:]}

    def shown(title: str) -> list[np.ndarray]:
        files = re.findall(r'src="data:image/png;base64,([^"]+)"', sections[title])
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))) for file in files]

    expected = {"Kept": [smooth_picture(seed) for seed in range(5)], "Dropped: too_small": [small]}
    expected |= {"Dropped: too_elongated": [long], "Dropped: no_caption": [smooth_picture(52)]}
    for title, originals in expected.items():
        assert all(np.array_equal(*pair) for pair in zip(shown(title), originals, strict=True))
    assert "raw/0.png" in sections["Kept"] and "picture 0" in sections["Kept"]
    assert "long.png" in sections["Dropped: too_elongated"] and "120 x 30" in sections["Dropped: too_elongated"]
    assert "40 characters" in sections["Dropped: caption_too_long"]

    side, ratio, caption = (summary["histograms"][name] for name in ("side", "ratio", "caption"))
    assert (sum(side["kept"]), sum(side["dropped"])) == (8, 1)
    assert (sum(ratio["kept"]), sum(ratio["dropped"])) == (7, 1)
    assert (sum(caption["kept"]), sum(caption["dropped"])) == (5, 2)
    below = [edge < 24 for edge in side["edges"][1:-1]]
    assert not any(count for count, is_below in zip(side["kept"], below, strict=False) if is_below)


@pytest.mark.parametrize("seed", range(3))
def test_garbage_is_a_reason_never_an_error(seed: int) -> None:
    rng = random.Random(seed)
    forms = [encoded(smooth_picture(seed), form) for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")]
    for data in forms * 20:
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 30)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        item = readers.Item("key", bytes(broken[: rng.randrange(len(broken) + 1)]), {"en": "caption"}, "png")
        recipe = recipe_of(Path("out"), folder_source(Path("raw")), decode={"max_pixels": MAX_PIXELS}, duplicates={})
        row = pictures.measure_item(item, recipe)
        assert row["reason"] in (None, *pictures.REASONS)


# Duplicates


@pytest.mark.parametrize("max_distance", [0, 3, 10])
def test_near_duplicates_are_those_that_a_plain_loop_over_all_pairs_finds(max_distance: int) -> None:
    rng = random.Random(max_distance)
    hashes: list[int] = []
    for _ in range(300):
        base = rng.choice(hashes) if hashes and rng.random() < 0.6 else rng.getrandbits(64)
        flips = [1 << rng.randrange(64) for _ in range(rng.randrange(max_distance + 4))]
        hashes.append(base ^ int(np.bitwise_xor.reduce(np.array([0, *flips], np.uint64))))
    colours = [bytes([rng.choice([0, 10, 60])] * 48) for _ in hashes]

    kept: list[int] = []
    expected: list[int | None] = []
    for i, value in enumerate(hashes):
        alike = (
            k for k in kept
            if bin(hashes[k] ^ value).count("1") <= max_distance and abs(colours[k][0] - colours[i][0]) <= 16
        )  # fmt: skip
        expected.append(next(alike, None))
        if expected[-1] is None:
            kept.append(i)

    finder, found = NearDuplicates(max_distance, 16), []
    for i, value in enumerate(hashes):
        found.append(finder.find(value, colours[i]))
        if found[-1] is None:
            finder.add(value, colours[i], i)
    assert found == expected and 0 < len(kept) < len(hashes)


def test_one_shape_in_two_colours_is_no_duplicate(tmp_path: Path) -> None:
    for name, colour in (("0", "red"), ("1", "blue"), ("2", "red")):
        put(tmp_path / "raw", f"{name}.png", encoded(Image.new("RGB", (64, 64 + int(name)), colour)))
    summary = build_dataset(
        recipe_of(tmp_path / "out", folder_source(tmp_path / "raw"), duplicates={}), progress=False
    )
    assert summary["dropped"] == {"near_duplicate": 1}
    assert [record["key"] for record in records_of(tmp_path / "out")] == ["raw/0.png", "raw/1.png"]


# Readers and writers


def test_all_kinds_of_sources_give_the_same_records(tmp_path: Path, raw: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(raw.glob("*.png"))
    english = [f"picture {i}" for i in range(5)]
    chinese = [f"图片 {i}" for i in range(5)]
    for path, caption in zip(files, chinese, strict=True):
        path.with_suffix(".json").write_text(json.dumps({"zh": caption}))
    members = [(path.name, path.read_bytes()) for path in sorted(raw.iterdir())]
    tar_of(tmp_path / "tar" / "0.tar", members)
    table = {"jpg": [path.read_bytes() for path in files], "caption": english, "zh": chinese, "id": list(range(5))}
    pq.write_table(pa.table(table), tmp_path / "plain.parquet")
    structs = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    pq.write_table(pa.table({"image": structs, "caption": english, "zh": chinese}), tmp_path / "structs.parquet")
    sources = [
        folder_source(raw, caption_en="txt", caption_zh="zh") | {"name": "folder", "records_per_shard": 2},
        tar_source(tmp_path / "tar" / "*.tar", caption_en="txt", caption_zh="zh") | {"name": "tar"},
        {"name": "plain", "kind": "parquet", "path": str(tmp_path / "plain.parquet"), "image": "jpg", "key": "id"},
        {"name": "structs", "kind": "parquet", "path": str(tmp_path / "structs.parquet")},
    ]
    for source in sources[2:]:
        source |= {"caption_en": "caption", "caption_zh": "zh"}
    build_dataset(recipe_of(tmp_path / "out", *sources), progress=False)

    found: dict[str, list[tuple]] = {}
    for record in records_of(tmp_path / "out"):
        found.setdefault(record["source"], []).append(
            (record["image"], record["caption_en"], record["caption_zh"], record["width"], record["height"])
        )
    expected = [(path.read_bytes(), e, z, *SIZE) for path, e, z in zip(files, english, chinese, strict=True)]
    assert found == dict.fromkeys(("folder", "tar", "plain", "structs"), expected)


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_the_output_is_a_data_set_that_can_be_built_from_again(tmp_path: Path, raw: Path, form: str) -> None:
    from datasets import load_dataset

    build_dataset(
        recipe_of(tmp_path / "out", folder_source(raw), write={"format": form, "records_per_shard": 2}), progress=False
    )
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    pictures_of_rows = rows["image"] if form == "parquet" else rows["jpg"]
    facts = list(rows) if form == "parquet" else rows["json"]
    nothing = None if form == "parquet" else ""
    for seed, (picture, fact) in enumerate(zip(pictures_of_rows, facts, strict=True)):
        assert (np.asarray(picture) == np.asarray(smooth_picture(seed))).all()
        assert (fact["key"], fact["caption_en"], fact["caption_zh"]) == (f"raw/{seed}.png", f"picture {seed}", nothing)
        assert (fact["height"], fact["width"], fact["source"]) == (64, 96, "raw")

    if form == "parquet":
        again = {"name": "again", "kind": "datasets", "path": str(tmp_path / "out"), "caption_en": "caption_en"}
    else:
        again = tar_source(tmp_path / "out" / "data" / "*.tar", caption_en="caption_en") | {"name": "again"}
    build_dataset(recipe_of(tmp_path / "again", again), progress=False)
    first, second = records_of(tmp_path / "out"), records_of(tmp_path / "again")
    assert [r["image"] for r in first] == [r["image"] for r in second]
    assert [r["caption_en"] for r in first] == [r["caption_en"] for r in second]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_both_formats_open_as_the_records_that_were_built(
    tmp_path: Path, raw: Path, form: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from mars_hf.data.records import open_record_picture, open_records, validate_records

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    put(raw, "7.jpg", encoded(smooth_picture(7), "JPEG"), "picture 7")  # kept as it is among PNG files
    put(raw, "8.png", encoded(smooth_picture(8)), None)
    (raw / "8.json").write_text(
        json.dumps({"zh": "图片八"})
    )  # the only one in Chinese, behind those that types are learnt of
    write = {"format": form, "records_per_shard": 6}
    source = folder_source(raw, caption_en="txt", caption_zh="zh")
    build_dataset(recipe_of(tmp_path / "out", source, write=write), progress=False)
    records, bad = validate_records(open_records(tmp_path / "out", streaming=streaming), progress=False)
    records, built = list(records), records_of(tmp_path / "out")
    assert len(records) == 7 and not bad.reasons
    for record, expected in zip(records, built, strict=True):
        assert all((record[name] or None) == (expected[name] or None) for name in expected.keys() - {"image"})
        shown = [open_record_picture(image).convert("RGB") for image in (record["image"], expected["image"])]
        assert np.array_equal(*shown)
    assert [open_record_picture(record["image"]).format for record in records] == ["PNG"] * 5 + ["JPEG", "PNG"]
    assert records[-1]["caption_zh"] == "图片八"


def test_a_row_cannot_make_the_reader_open_files_of_this_machine(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    put(tmp_path, "private.png", encoded(smooth_picture(0)))
    (tmp_path / "set").mkdir()
    cells = [{"bytes": None, "path": str(tmp_path / "private.png")}, {"bytes": None, "path": "../private.png"}]
    cells += [{"bytes": encoded(smooth_picture(1)), "path": "/etc/passwd.png"}]
    pq.write_table(pa.table({"image": cells, "caption": ["a", "b", "c"]}), tmp_path / "set" / "train.parquet")
    for kind, path in (("parquet", tmp_path / "set" / "train.parquet"), ("datasets", tmp_path / "set")):
        out = tmp_path / kind
        summary = build_dataset(recipe_of(out, {"name": "x", "kind": kind, "path": str(path)}), progress=False)
        assert summary["dropped"] == {"no_picture": 2} and summary["kept"] == 1


def test_rows_of_other_files_keep_their_names_and_one_bad_text_spoils_no_other(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number, folder in enumerate(("a", "b")):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        texts = [b"fine", b"\xff\xfe no UTF-8", "好".encode()]
        captions = pa.Array.from_buffers(pa.string(), 3, pa.array(texts, pa.binary()).buffers())
        images = pa.array([encoded(smooth_picture(3 * number + i)) for i in range(3)])
        table = pa.table({"image": images, "caption": captions})
        pq.write_table(table, tmp_path / "raw" / folder / "part.parquet")
    (tmp_path / "raw" / "c.parquet").write_bytes(b"PAR1 is not enough")
    source = {"name": "x", "kind": "parquet", "path": str(tmp_path / "raw" / "**" / "*.parquet")}
    summary = build_dataset(recipe_of(tmp_path / "out", source, duplicates={}), progress=False)
    assert summary["dropped"] == {"unreadable_shard": 1, "undecodable_caption": 2}
    found = [(record["key"], record["caption_en"]) for record in records_of(tmp_path / "out")]
    assert found == [("x/a/part/0", "fine"), ("x/a/part/2", "好"), ("x/b/part/0", "fine"), ("x/b/part/2", "好")]


def test_a_stretch_of_a_parquet_file_that_unpacks_to_much_is_never_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = [encoded(smooth_picture(seed)) for seed in range(2)]
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 256, 3), np.uint8)))  # 180 kB
    groups = [good[:1], [bytes(200_000)] * 3, [noise] * 2, good[1:]]
    (tmp_path / "raw").mkdir()
    schema = pa.schema({"image": pa.binary(), "caption": pa.string()})
    with pq.ParquetWriter(tmp_path / "raw" / "0.parquet", schema, compression="zstd", use_dictionary=False) as writer:
        for cells in groups:
            writer.write_table(pa.table({"image": cells, "caption": ["a caption"] * len(cells)}, schema))
    read: list[tuple[int, list[int]]] = []
    iterate = pq.ParquetFile.iter_batches

    def watched(self: pq.ParquetFile, *sizes: int, **settings: Any) -> Any:
        read.extend((size, settings["row_groups"]) for size in sizes if "row_groups" in settings)
        return iterate(self, *sizes, **settings)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    source = {"name": "x", "kind": "parquet", "path": str(tmp_path / "raw" / "*.parquet")}
    decode = {"max_file_bytes": 250_000}
    summary = build_dataset(recipe_of(tmp_path / "out", source, decode=decode), progress=False)
    assert summary["dropped"] == {"file_too_large": 1}
    assert [record["key"] for record in records_of(tmp_path / "out")] == ["x/0/0", "x/0/4", "x/0/5", "x/0/6"]
    assert {tuple(groups) for _, groups in read} == {(0,), (2,), (3,)}
    assert {size for size, groups in read if groups == [2]} == {1}  # two of them would be more than one file may hold


def test_files_of_a_sample_are_together_no_larger_than_one_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, held = encoded(smooth_picture(0)), []
    junk = [(f"0.junk{i}", bytes(40_000)) for i in range(120)]
    tar_of(tmp_path / "shards" / "0.tar", [*junk, ("0.png", picture), ("1.png", picture), ("1.txt", b"a caption")])
    of_group = readers._item_of_group
    monkeypatch.setattr(readers, "_item_of_group", lambda *given: (held.append(given[2]), of_group(*given))[1])
    recipe = recipe_of(tmp_path / "out", tar_source(tmp_path / "shards" / "*.tar"), decode={"max_file_bytes": 100_000})
    summary = build_dataset(recipe, progress=False)
    assert summary["kept"] == 1 and sum(summary["dropped"].values()) == 1
    assert max(sum(len(data or b"") for data in group.values()) for group in held) == 80_000
    assert max(map(len, held)) == readers.MAX_FILES


def test_captions_with_an_extension_of_their_own_are_no_pictures(tmp_path: Path) -> None:
    for seed in range(2):
        put(tmp_path / "raw", f"{seed}.png", encoded(smooth_picture(seed)), None)
        (tmp_path / "raw" / f"{seed}.caption").write_text(f"picture {seed}")
        (tmp_path / "raw" / f"{seed}.zh.txt").write_text(f"图片 {seed}")
    (tmp_path / "raw" / "alone.caption").write_text("a text without its picture")
    source = folder_source(tmp_path / "raw", caption_en="caption", caption_zh="zh.txt")
    summary = build_dataset(recipe_of(tmp_path / "out", source), progress=False)
    assert summary["dropped"] == {"not_a_picture": 1}
    found = [(record["caption_en"], record["caption_zh"]) for record in records_of(tmp_path / "out")]
    assert found == [("picture 0", "图片 0"), ("picture 1", "图片 1")]


# Resuming


def test_an_interrupted_build_continues_and_writes_nothing_twice(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_source(raw, records_per_shard=2)
    settings = {"write": {"records_per_shard": 2}, "duplicates": {}}
    build_dataset(recipe_of(tmp_path / "whole", source, **settings), progress=False)

    def failing(function: Callable, at: int) -> Callable:
        calls = itertools.count()
        return lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no space left")) if next(calls) == at else (
            function(*args, **kwargs)
        )  # fmt: skip

    recipe = recipe_of(tmp_path / "out", source, **settings)
    stamps: dict[Path, int] = {}
    for name, at in (("measure_item", 3), ("write_shard", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, name, failing(getattr(pipeline, name), at))
            with pytest.raises(OSError, match="no space left"):
                build_dataset(recipe, progress=False)
        done = [
            p for p in (tmp_path / "out").rglob("*") if p.suffix in (".parquet", ".json") and p.name != "recipe.json"
        ]
        assert len(done) == {"measure_item": 1, "write_shard": 3 + 2}[name]
        assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
        stamps = {path: path.stat().st_mtime_ns for path in done}
    (tmp_path / "out" / "data" / ".train-00001.parquet.1.part").write_bytes(b"half a file")
    build_dataset(recipe, progress=False)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    build_dataset(recipe, progress=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_with_another_build_or_other_files_is_left_alone(tmp_path: Path, raw: Path) -> None:
    recipe = recipe_of(tmp_path / "out", folder_source(raw))
    build_dataset(recipe, progress=False)
    before = bytes_of(tmp_path / "out")
    with pytest.raises(ValueError, match="another recipe.*Choose another folder"):
        build_dataset(recipe_of(tmp_path / "out", folder_source(raw), filter={"min_side": 9}), progress=False)
    put(raw, "9.png", encoded(smooth_picture(9)))
    with pytest.raises(ValueError, match="input has changed"):
        build_dataset(recipe, progress=False)
    with pytest.raises(ValueError, match="is not empty and holds no build"):
        build_dataset(recipe_of(raw, folder_source(raw)), progress=False)
    assert bytes_of(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["0.png", "0.txt"])
def test_a_picture_or_a_text_that_was_replaced_is_noticed(tmp_path: Path, raw: Path, name: str) -> None:
    recipe = recipe_of(tmp_path / "out", folder_source(raw))
    build_dataset(recipe, progress=False)
    os.utime(raw / name, (1, 1))  # by an older file of the same size
    with pytest.raises(ValueError, match="input has changed"):
        build_dataset(recipe, progress=False)


def test_a_second_build_in_a_folder_is_refused_and_disturbs_nothing(tmp_path: Path, raw: Path) -> None:
    from filelock import FileLock

    recipe = recipe_of(tmp_path / "out", folder_source(raw))
    build_dataset(recipe, progress=False)
    half = tmp_path / "out" / "data" / ".train-00000.parquet.1.part"
    half.touch()
    with FileLock(tmp_path / "out" / pipeline.WORK / "lock"):
        with pytest.raises(ValueError, match="Another build is at work.*choose another folder"):
            build_dataset(recipe, progress=False)
        assert half.exists()
    build_dataset(recipe, progress=False)
    assert not half.exists()


def test_a_task_that_is_tried_again_reads_nothing_of_what_is_written(tmp_path: Path, raw: Path) -> None:
    recipe = recipe_of(tmp_path / "out", folder_source(raw))
    build_dataset(recipe, progress=False)
    (manifest,) = (json.loads(path.read_text()) for path in (tmp_path / "out" / "manifests").iterdir())
    output = pipeline.Output([manifest["file"]], tmp_path / "out" / "data", tmp_path / "out" / "manifests")
    again = {"index": 0, "plan": manifest["plan"], "parts": "would not be read"}
    assert list(pipeline.collect_records(again, recipe, output)) == []
    (tmp_path / "out" / "data" / manifest["file"]).write_bytes(b"cut off")
    with pytest.raises(json.JSONDecodeError):
        list(pipeline.collect_records(again, recipe, output))


def test_a_build_of_which_nothing_is_left_says_so_and_why(tmp_path: Path, raw: Path) -> None:
    with pytest.raises(ValueError, match="Nothing is left of 5 items"):
        build_dataset(recipe_of(tmp_path / "out", folder_source(raw), filter={"min_side": 999}), progress=False)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dropped"] == {"too_small": 5}


# Recipes and the command


def test_the_papers_recipe_marks_what_the_paper_does_not_state() -> None:
    recipe = load_recipe("paper", "out")
    content = yaml.safe_load((Path(readers.__file__).parents[1] / "configs" / "paper.yaml").read_text())
    lost = {"filter": ["min_side", "max_aspect_ratio"], "select": ["clip_minimum", "aesthetic_minimum"]}
    lost |= {"clip": ["model"], "recaption": ["model"], "resize": ["shortest_edge", "multiple_of"]}
    for stage, settings in lost.items():
        for name in settings:
            assert content[stage][name]["paper"] is None
            assert getattr(getattr(recipe, stage), name) == content[stage][name]["ours"]
            assert recipe.origins[f"{stage}.{name}"] == "ours"
    assert recipe.origins["resolution_text"] == "paper" and recipe.resolution_text is True
    assert [source.name for source in recipe.sources] == [
        "laion-400m", "cc3m", "cc12m", "laion-coco", "coyo", "datacomp",
    ]  # fmt: skip


SOURCES = [{"name": "raw", "kind": "folder", "path": "raw"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fliter": {}}, "A recipe knows no fliter.*filter"),
        ({"filter": {"min_sdie": 3}}, "`filter` knows no min_sdie. It knows min_side"),
        ({"filter": {"min_side": "large"}}, "`filter`.*min_side.*'large'"),
        ({"filter": [3]}, "`filter` must hold settings by name"),
        ({"duplicates": False}, "`duplicates` must hold settings by name, got False"),
        ({"decode": {"max_file_bytes": 0}}, "`max_file_bytes` must be 1 or more, got 0"),
        ({"clip": {"model": "c", "batch_size": 0}}, "`batch_size` must be 1 or more, got 0"),
        ({"recaption": {"model": "x", "prompts": {"en": "?"}, "max_new_tokens": 0}}, "`max_new_tokens` must be 1"),
        ({"samples": -1}, "`samples` must be 0 or more, got -1"),
        ({"sources": []}, "one or more"),
        ({"sources": [{"name": "raw", "kind": "folder"}]}, r"`sources\[0\]` needs path"),
        ({"sources": SOURCES * 2}, "each with a name of its own"),
        ({"sources": [{"name": "../raw", "kind": "folder", "path": "raw"}]}, "letters, digits"),
        ({"sources": [{"name": "raw", "kind": "zip", "path": "raw"}]}, "one of webdataset, parquet"),
        ({"select": {"clip_minimum": 0.3}}, "no such stage"),
        ({"select": {"aesthetic_top": 1.5}}, r"share in \(0, 1\], got 1.5"),
        ({"aesthetic": {"head": "head"}}, "needs its `model`"),
        ({"codes": {"model": "mars"}}, "add `resize`"),
        ({"captions": {"required": False}}, "must come from `recaption`"),
        ({"recaption": {"model": "x", "prompts": {"fr": "quoi?"}}}, "some of en, zh"),
        ({"resize": {"shortest_edge": 250}}, "multiple of `multiple_of`, got 250, 16"),
        ({"decode": {"refuse": ["ugly"]}}, "knows animated, cmyk.*got ugly"),
        ({"write": {"format": "csv"}}, "parquet or webdataset, got 'csv'"),
        ({"engine": {"gpus_per_worker": -1}}, "`gpus_per_worker` must be 0 or more, got -1"),
        ({"resolution_text": "yes"}, "of type bool, got 'yes'"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_with_what_is_known(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe({"sources": SOURCES, **changes})


def test_the_command_builds_shows_and_refuses(tmp_path: Path, raw: Path) -> None:
    run = CliRunner().invoke
    assert "laion-400m" in run(app, ["data", "build", "paper", "--show"]).output
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"sources": [folder_source(raw)], "filter": {"min_side": 3}}))
    done = run(app, ["data", "build", str(config), "--out", str(tmp_path / "out"), "--workers", "0"])
    assert done.exit_code == 0 and "5 of 5 kept" in done.output and (tmp_path / "out" / "report.html").is_file()
    for arguments in ([str(config)], ["papre", "--out", "x"], ["paper", "--out", str(tmp_path / "none")]):
        refused = run(app, ["data", "build", *arguments])
        assert refused.exit_code == 2 and refused.output.startswith("mars-hf: ") and refused.output.count("\n") == 1


@pytest.mark.integration
def test_the_command_builds_on_a_ray_of_its_own(tmp_path: Path, raw: Path) -> None:
    config = tmp_path / "mine.yaml"
    engine = {"workers": 2, "object_store_bytes": 200_000_000}
    config.write_text(yaml.safe_dump({"sources": [folder_source(raw, records_per_shard=2)], "engine": engine}))
    command = [sys.executable, "-m", "mars_hf.cli", "data", "build", str(config), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "5 of 5 kept" in done.stdout, done.stderr
    assert len(records_of(tmp_path / "out")) == 5


@pytest.mark.parametrize("error", [TimeoutError("slow"), MemoryError(), OSError(5, "Input/output error")])
def test_a_failure_of_the_machine_is_not_taken_for_a_damaged_file(monkeypatch, error) -> None:
    from mars_hf.data.build import readers

    def fail(*arguments):
        raise error
        yield

    monkeypatch.setitem(readers.READERS, "parquet", fail)
    source = SimpleNamespace(kind="parquet")
    with pytest.raises(type(error)):
        list(readers.read_items(SimpleNamespace(path="a.parquet"), source, 1000))
    monkeypatch.setitem(readers.READERS, "parquet", lambda *_: (_ for _ in ()).throw(OSError("not a parquet file")))
    (item,) = readers.read_items(SimpleNamespace(path="a.parquet"), source, 1000)
    assert item.reason == "unreadable_shard"


class Unauthorised(OSError):
    """What the Hub answers when a token has expired: it has no errno."""


@pytest.mark.parametrize("error", [Unauthorised("401"), RuntimeError("read timed out"), OSError(5, "input or output")])
@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_file_that_fails_while_it_is_read_ends_the_build(tmp_path: Path, monkeypatch, kind: str, error) -> None:
    import fsspec

    class Broken(io.BytesIO):
        def read(self, *args):
            raise error

    class Opened:
        def __enter__(self):
            return Broken(b"x" * 1000)

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(fsspec, "open", lambda *args: Opened())
    source = SimpleNamespace(kind=kind, image="image", key=None, caption_en="caption", caption_zh=None)
    with pytest.raises((ConnectionError, OSError)):
        list(readers.read_items(SimpleNamespace(path="hf://a.tar", name="a"), source, 1000))


def test_pictures_that_are_gone_end_the_build_and_are_not_left_out(raw: Path) -> None:
    recipe = make_recipe({"sources": [folder_source(raw)]})
    (shard, *_) = readers.list_shards(recipe.sources[0])
    (raw / shard.files[0]).unlink()
    with pytest.raises(FileNotFoundError):
        list(readers.read_items(shard, recipe.sources[0], 10**6))


def test_no_memory_to_decode_says_nothing_of_the_picture(raw: Path, monkeypatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        pictures.decode_picture((raw / "0.png").read_bytes(), "png", make_recipe({"sources": SOURCES}).decode)


def test_a_strip_that_would_be_too_large_when_scaled_is_refused() -> None:
    with pytest.raises(pictures.Refused, match="too many pixels when scaled"):
        pictures.check_shape(16, 40_000, Filter(), Resize(512), 64_000_000)
    pictures.check_shape(16, 3_000, Filter(), Resize(512), 64_000_000)


def test_columns_that_a_data_set_does_not_have_are_named_before_the_build(tmp_path: Path, monkeypatch) -> None:
    Dataset.from_list([{"image": {"bytes": b"x", "path": None}, "text": "a"}]).to_parquet(tmp_path / "a.parquet")
    source = {"name": "raw", "kind": "datasets", "path": str(tmp_path), "caption_en": "text", "caption_zh": "nonsense"}
    with pytest.raises(ValueError, match="has no column nonsense; there are image, text"):
        readers.list_shards(make_recipe({"sources": [source]}).sources[0])
    rows = Dataset.from_list([{"image": {"bytes": None, "path": "/elsewhere/a.png"}, "text": "a"}])
    rows = rows.cast_column("image", datasets.Image(decode=False))  # as of a folder with a zip in it
    monkeypatch.setattr(readers, "_load_rows", lambda *args: rows)
    del source["caption_zh"]
    with pytest.raises(ValueError, match="are files elsewhere, such as a.png"):
        readers.list_shards(make_recipe({"sources": [source]}).sources[0])
