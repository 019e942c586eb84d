"""The emoji data: names and pictures meet, splits follow the rule, an interrupted run continues."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mars_hf.data import emoji

SQUARE = '<path fill="{color}" d="M0 0h16v16H0z"/>'
LABELS = {
    "1F34E": ("red apple", "红苹果"),
    "2764": ("red heart", "红心"),
    "1F981": ("lion", "狮子"),
    "1F44B": ("waving hand", "挥手"),
}
WAVE_MEDIUM = "1F44B-1F3FD"
COLUMNS = ["image", "caption_en", "caption_zh", "style", "hexcode"]


def folder_of(package: emoji.EmojiPackage) -> str:
    return f"{package.name.removeprefix('@').replace('/', '-')}-{package.version}"


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_names(folder: Path) -> None:
    for language, position, medium in (("en", 0, "waving hand: medium skin tone"), ("zh", 1, "挥手: 中等肤色")):
        entries = [{"hexcode": code, "label": labels[position]} for code, labels in LABELS.items()]
        entries[1]["hexcode"] = "2764-FE0F"
        entries[-1]["skins"] = [{"hexcode": WAVE_MEDIUM, "label": medium}]
        write_json(folder / language / "data.json", entries)


def write_icons(folder: Path, color: str) -> None:
    icons = {
        "red-apple": {"body": SQUARE.format(color=color)},
        "heart": {"body": SQUARE.format(color=color)},
        "lion": {"body": SQUARE.format(color=color)},
        "wave": {"body": SQUARE.format(color=color)},
        "wave-medium": {"body": SQUARE.format(color="#00f")},
        "nameless": {"body": SQUARE.format(color=color)},
    }
    aliases = {"love": {"parent": "beloved"}, "beloved": {"parent": "heart"}, "lost": {"parent": "nowhere"}}
    write_json(folder / "icons.json", {"icons": icons, "aliases": aliases, "width": 16, "height": 16})
    characters = {
        "1f34e": "red-apple",
        "2764-fe0f": "love",  # an alias of an alias
        "2764": "nameless",  # the same emoji again: the first picture stays
        "1f981": "lion",
        "1f44b": "wave",
        "1f44b-1f3fd": "wave-medium",
        "1f9ff": "nameless",  # no name in emojibase
        "1f600": "lost",  # its parent does not exist
    }
    write_json(folder / "chars.json", characters)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that already holds five small packages; npm is out of reach."""
    monkeypatch.setenv("PATH", "")
    folder = tmp_path / "cache"
    write_names(folder / folder_of(emoji.NAMES))
    for number, package in enumerate(emoji.STYLES.values()):
        write_icons(folder / folder_of(package), f"#f{number}0")
    return folder


def build(out: Path, cache: Path, size: int = 16) -> dict[str, int]:
    return emoji.build_emoji_dataset(out, size, cache, progress=False)


def records(out: Path) -> list[dict]:
    from datasets import load_dataset

    loaded = load_dataset(str(out), cache_dir=str(out.parent / "datasets"))
    return [{**row, "split": split} for split, rows in loaded.items() for row in rows]


def test_every_picture_meets_its_english_and_its_chinese_name(tmp_path: Path, cache: Path) -> None:
    counts = build(tmp_path / "out", cache)
    rows = records(tmp_path / "out")

    assert sum(counts.values()) == len(rows) == 5 * len(emoji.STYLES)
    assert [key for key in rows[0] if key != "split"] == COLUMNS
    captions = {(row["hexcode"], row["style"]): (row["caption_en"], row["caption_zh"]) for row in rows}
    for style in emoji.STYLES:
        for code, labels in LABELS.items():
            assert captions[code, style] == labels
        assert captions[WAVE_MEDIUM, style] == ("waving hand: medium skin tone", "挥手: 中等肤色")


def test_pictures_are_rendered_at_the_size_asked_for_with_the_first_picture_of_a_code(
    tmp_path: Path, cache: Path
) -> None:
    build(tmp_path / "out", cache, size=24)
    for row in records(tmp_path / "out"):
        assert row["image"].size == (24, 24) and row["image"].mode == "RGB"
        red, green = 255, 17 * list(emoji.STYLES).index(row["style"])
        expected = (0, 0, 255) if row["hexcode"] == WAVE_MEDIUM else (red, green, 0)
        assert row["image"].getpixel((12, 12)) == expected


def test_data_made_elsewhere_under_the_same_name_are_not_taken_for_those_read_before(
    tmp_path: Path, cache: Path
) -> None:
    from datasets import load_dataset

    for place, size in (("here", 16), ("there", 24)):
        build(tmp_path / place / "emoji", cache, size)
        rows = load_dataset(str(tmp_path / place / "emoji"), split="train", cache_dir=str(tmp_path / "datasets"))
        assert rows[0]["image"].size == (size, size)


def test_a_picture_that_is_not_square_is_centred_on_white() -> None:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 8">{SQUARE.format(color="#f00")}</svg>'
    picture = emoji.render_svg(svg, 32)
    assert picture.size == (32, 32) and picture.mode == "RGB"
    assert picture.getpixel((16, 2)) == picture.getpixel((16, 29)) == (255, 255, 255)
    assert picture.getpixel((2, 16)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("hexcode", "style", "split"),
    [
        ("1F34E", "noto", "train"),
        ("1F34E", "twemoji", "validation"),
        ("1F981", "noto", "test"),
        ("1F981", "fluent-emoji-flat", "test"),
        ("1F436", "fluent-emoji-flat", "validation"),
        ("1F697", "openmoji", "test"),
        ("1F44B", "openmoji", "train"),
    ],
)
def test_the_split_is_the_sha1_of_hexcode_and_style_modulo_20(hexcode: str, style: str, split: str) -> None:
    # By hand from `printf '1F34E|noto' | sha1sum`: every power of 16 is 16 modulo 20, so the remainder is that of
    # 16 times the sum of all hexadecimal digits but the last, plus the last.
    *head, last = hashlib.sha1(f"{hexcode}|{style}".encode("ascii")).hexdigest()
    remainder = (16 * sum(int(digit, 16) for digit in head) + int(last, 16)) % 20
    assert {0: "test", 1: "validation"}.get(remainder, "train") == split
    assert emoji.split_of(hexcode, style) == split


def test_records_lie_in_the_split_of_their_pair(tmp_path: Path, cache: Path) -> None:
    counts = build(tmp_path / "out", cache)
    rows = records(tmp_path / "out")
    found = {(row["hexcode"], row["style"]): row["split"] for row in rows}
    assert found["1F981", "noto"] == found["1F981", "fluent-emoji-flat"] == "test"
    assert found["1F34E", "twemoji"] == "validation" and found["1F34E", "noto"] == "train"
    assert counts == {split: sum(row["split"] == split for row in rows) for split in emoji.SPLITS}


def test_a_second_run_makes_only_what_is_missing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "SHARD_SIZE", 4)
    out = tmp_path / "out"
    build(out, cache)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out / "data").iterdir()}
    assert len(before) > 4
    lost = "train-00001-of-"
    (missing,) = (path for path in (out / "data").iterdir() if path.name.startswith(lost))
    missing.unlink()

    build(out, cache)
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out / "data").iterdir()}
    assert after.keys() == before.keys()
    assert [name for name in before if after[name][0] != before[name][0]] == [missing.name]
    assert after[missing.name][1] == before[missing.name][1]


def test_an_interrupted_shard_leaves_no_file_that_a_reader_would_take(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = emoji.render_svg
    drawn: list[str] = []

    def interrupted_render(svg: str, size: int) -> Image.Image:
        drawn.append(svg)
        if len(drawn) == 6:
            raise KeyboardInterrupt
        return render(svg, size)

    monkeypatch.setattr(emoji, "SHARD_SIZE", 4)
    monkeypatch.setattr(emoji, "render_svg", interrupted_render)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build(out, cache)
    assert [path.name[:11] for path in (out / "data").glob("*.parquet")] == ["train-00000"]

    monkeypatch.setattr(emoji, "render_svg", render)
    build(out, cache)
    assert len(records(out)) == 5 * len(emoji.STYLES)


def test_another_size_is_refused_and_nothing_is_touched(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out"
    build(out, cache)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ValueError, match='"size": 16.*"size": 24.*another folder'):
        build(out, cache, size=24)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_foreign_folder_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no emoji data"):
        build(tmp_path / "out", cache)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("size", [-1, 0, 7, 1025])
def test_a_size_out_of_range_is_refused_before_anything_is_brought(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"8 to 1024 pixels, got {size}"):
        emoji.build_emoji_dataset(tmp_path / "out", size)
    assert not (tmp_path / "out").exists()


def test_without_npm_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="npm was not found.*apt-get install npm.*run the command again"):
        emoji.build_emoji_dataset(tmp_path / "out", progress=False)


def test_an_unreachable_registry_keeps_what_was_brought(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = emoji.STYLES["openmoji"]
    shutil.rmtree(cache / folder_of(package))
    npm = make_npm(tmp_path, "echo 'network unreachable' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    with pytest.raises(
        RuntimeError, match=r"openmoji@1\.2\.29` failed with exit code 1: network unreachable.*continue"
    ):
        build(tmp_path / "out", cache)
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        folder_of(p) for p in [*emoji.STYLES.values(), emoji.NAMES] if p != package
    )


def test_a_package_is_unpacked_from_what_npm_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "archive.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        content = b'{"icons": {}}'
        info = tarfile.TarInfo("package/icons.json")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    npm = make_npm(tmp_path, f"cp {archive} ./brought.tgz; echo brought.tgz")
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")

    folder = emoji.fetch_package(emoji.STYLES["noto"], tmp_path / "cache")
    assert (folder / "icons.json").read_bytes() == content
    npm.write_text("#!/bin/sh\nexit 1\n")  # not asked a second time
    assert emoji.fetch_package(emoji.STYLES["noto"], tmp_path / "cache") == folder
    assert list((tmp_path / "cache").iterdir()) == [folder]


def make_npm(folder: Path, body: str) -> Path:
    npm = folder / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n{body}\n")
    npm.chmod(0o755)
    return npm


def test_the_card_names_every_package_with_its_licence(tmp_path: Path, cache: Path) -> None:
    counts = build(tmp_path / "out", cache)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for package in [*emoji.STYLES.values(), emoji.NAMES]:
        (row,) = [line for line in card.splitlines() if line.startswith(f"| {package.name} |")]
        assert all(word in row for word in (package.version, package.license, package.holder, package.source))
    for split, count in counts.items():
        assert f"| {split} | {count} |" in card


def test_the_command_tells_a_failure_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mars_hf.cli", "data", "emoji", "--out", str(tmp_path / "out")]
    no_npm = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""})
    assert no_npm.returncode == 1
    assert no_npm.stderr.startswith("mars-hf: npm was not found") and no_npm.stderr.count("\n") == 1
    bad_size = subprocess.run([*command, "--size", "7"], capture_output=True, text=True, env={"PATH": ""})
    assert bad_size.returncode == 2 and bad_size.stderr.count("\n") == 1
    trace = subprocess.run([*command, "--size", "7", "--debug"], capture_output=True, text=True, env={"PATH": ""})
    assert trace.returncode == 1 and "Traceback" in trace.stderr


def test_a_mirrored_alias_is_drawn_mirrored(tmp_path: Path) -> None:
    icons = {"left": {"body": '<rect width="4" height="16" fill="#f00"/>'}}
    aliases = {"right": {"parent": "left", "hFlip": True}}
    write_json(tmp_path / "icons.json", {"icons": icons, "aliases": aliases, "width": 16, "height": 16})
    write_json(tmp_path / "chars.json", {"1f448": "left", "1f449": "right"})
    left, right = (np.asarray(emoji.render_svg(svg, 16)) for _, svg in emoji._icons(tmp_path))
    assert (left[:, :4] == [255, 0, 0]).all() and (left[:, 4:] == 255).all()
    assert np.array_equal(right, left[:, ::-1])
