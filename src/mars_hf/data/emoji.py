"""
The emoji data: real bilingual text-image pairs that any machine with npm can make.

Four emoji families (vector pictures) meet the English and Chinese names of the Unicode CLDR. One (subject, style)
pair in twenty is held out for test and one for validation, so that a subject is usually seen in the other styles
of its own: the test split asks for composition, not for memory.

What this file leaves to others: training on the pictures, and other sources of data.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm


@dataclass(frozen=True)
class EmojiPackage:
    """An npm package that carries one family of pictures or the names, at the version that was checked."""

    name: str
    version: str
    license: str
    holder: str
    source: str


STYLES: dict[str, EmojiPackage] = {
    "noto": EmojiPackage(
        "@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc.", "https://github.com/googlefonts/noto-emoji"
    ),
    "twemoji": EmojiPackage(
        "@iconify-json/twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "Twitter, Inc. and other contributors",
        "https://github.com/jdecked/twemoji",
    ),
    "fluent-emoji-flat": EmojiPackage(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    "openmoji": EmojiPackage(
        "@iconify-json/openmoji",
        "1.2.29",
        "CC-BY-SA-4.0",
        "OpenMoji – the open-source emoji and icon project",
        "https://github.com/hfg-gmuend/openmoji",
    ),
}
NAMES = EmojiPackage(
    "emojibase-data",
    "17.0.0",
    "MIT",
    "Miles Johnson; names from the Unicode CLDR (Unicode licence)",
    "https://github.com/milesj/emojibase",
)
SPLITS = ("train", "validation", "test")
SHARD_SIZE = 1000  # records in one parquet file, the unit of resuming
MAX_SIZE = 1024


def split_of(hexcode: str, style: str) -> str:
    """
    Name the split of a (subject, style) pair.

    Args:
        hexcode (`str`): Code points in upper case, joined by "-", without FE0F, e.g. `"1F44B-1F3FD"`.
        style (`str`): One of `STYLES`.

    Returns:
        `str`: `"test"` and `"validation"` for one pair in twenty each, else `"train"`.

    Example:
        >>> split_of("1F34E", "noto")
        'train'
    """
    number = int(hashlib.sha1(f"{hexcode}|{style}".encode()).hexdigest(), 16) % 20
    return {0: "test", 1: "validation"}.get(number, "train")


def fetch_package(package: EmojiPackage, cache_dir: Path) -> Path:
    """
    Bring an npm package to `cache_dir` (once) and return the folder that holds its files.

    Raises:
        RuntimeError: If npm is not installed or cannot reach its registry.
    """
    folder = cache_dir / f"{package.name.replace('/', '-').lstrip('@')}-{package.version}"
    if folder.is_dir():
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"npm was not found, but the emoji data come from npm packages ({package.name}@{package.version} and "
            "others). Install Node.js with npm (Debian: `apt-get install npm`) and run the command again."
        )
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        command = [npm, "pack", "--silent", f"{package.name}@{package.version}"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.tgz"))
        if done.returncode != 0 or not archives:
            raise RuntimeError(
                f"`npm pack {package.name}@{package.version}` failed with exit code {done.returncode}: "
                f"{done.stderr.strip() or 'no message'}. Is the network reachable? What was already brought is kept; "
                "run the command again to continue."
            )
        with tarfile.open(archives[0]) as archive:
            archive.extractall(scratch, filter="data")
        os.replace(Path(scratch) / "package", folder)
    return folder


def _names(folder: Path, language: str) -> dict[str, str]:
    """Map hexcode (without FE0F) to its name in one language; skin-tone variants included."""
    names: dict[str, str] = {}
    pending = json.loads((folder / language / "data.json").read_text(encoding="utf-8"))
    for entry in pending:
        for variant in [entry, *entry.get("skins", [])]:
            names.setdefault(_bare(variant["hexcode"]), variant["label"])
    return names


def _bare(hexcode: str) -> str:
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def _icons(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (hexcode, complete SVG) of every picture of a family, aliases followed to their parents."""
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    names = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    seen: set[str] = set()
    for code, name in names.items():
        hexcode = _bare(code)
        mirrored = False
        while name not in icons["icons"] and name in icons.get("aliases", {}):
            alias = icons["aliases"][name]
            name, mirrored = alias["parent"], mirrored ^ alias.get("hFlip", False)
        icon = icons["icons"].get(name)
        if icon is None or hexcode in seen:
            continue
        seen.add(hexcode)
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        left, body = icon.get("left", 0), icon["body"]
        if mirrored:
            body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
        box = f"{left} {icon.get('top', 0)} {width} {height}"
        yield hexcode, f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>'


def match_records(cache_dir: Path, progress: bool = True) -> list[dict[str, str]]:
    """
    Match every picture with its English and its Chinese name.

    Returns:
        `list[dict[str, str]]`: Records with `svg`, `caption_en`, `caption_zh`, `style`, `hexcode`, ordered by style
        (as in `STYLES`) and hexcode. Pictures without a name in both languages are left out.
    """
    names_folder = fetch_package(NAMES, cache_dir)
    english, chinese = _names(names_folder, "en"), _names(names_folder, "zh")
    records = []
    for style, package in tqdm(STYLES.items(), desc="Matching names", unit="style", disable=not progress):
        for hexcode, svg in sorted(_icons(fetch_package(package, cache_dir))):
            if hexcode in english and hexcode in chinese:
                captions = {"caption_en": english[hexcode], "caption_zh": chinese[hexcode]}
                records.append({"svg": svg, **captions, "style": style, "hexcode": hexcode})
    return records


def render_svg(svg: str, size: int) -> Image.Image:
    """
    Render an SVG on white.

    Args:
        svg (`str`): A complete SVG document.
        size (`int`): Longest side of the picture in pixels; a picture that is not square is centred.

    Returns:
        `PIL.Image.Image`: RGB, `size` x `size`.
    """
    import resvg_py  # part of the extra `data`

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    picture = Image.new("RGBA", (size, size), "white")
    picture.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return picture.convert("RGB")


def _features() -> Any:
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    text = {name: Value("string") for name in ("caption_en", "caption_zh", "style", "hexcode")}
    return Features({"image": ImageFeature(), **text})


def _write_shard(path: Path, records: list[dict[str, str]], size: int) -> None:
    """Render one shard and put it in place in one step, so that an interrupted run leaves no half file."""
    from datasets import Dataset

    rows: list[dict[str, Any]] = []
    for record in records:
        buffer = io.BytesIO()
        render_svg(record["svg"], size).save(buffer, "PNG")
        image = {"bytes": buffer.getvalue(), "path": f"{record['style']}-{record['hexcode']}.png"}
        rows.append({"image": image, **{key: value for key, value in record.items() if key != "svg"}})
    scratch = path.with_suffix(".part")
    Dataset.from_list(rows, features=_features()).to_parquet(scratch)
    os.replace(scratch, path)


def build_emoji_dataset(out: str | Path, size: int = 64, cache_dir: str | Path | None = None, progress: bool = True):
    """
    Make the emoji data set at one size; run again after an interruption, it continues.

    The folder is a data set of `datasets`: `load_dataset(out)` gives the splits `train`, `validation` and `test`
    with the columns `image`, `caption_en`, `caption_zh`, `style` and `hexcode`.

    Args:
        out (`str` or `Path`): Folder to write to. If it already holds the data at another size, nothing is touched.
        size (`int`, defaults to 64): Side of the square pictures in pixels, 8 to 1024.
        cache_dir (`str` or `Path`, *optional*): Where npm packages are kept. Defaults to `<out>/.packages`.
        progress (`bool`, defaults to `True`): Show progress bars.

    Returns:
        `dict[str, int]`: Number of records of each split.

    Raises:
        ValueError: If `size` is out of range, or `out` holds other data.
        RuntimeError: If npm or the network is missing.
    """
    if not 8 <= size <= MAX_SIZE:
        raise ValueError(f"`size` must be 8 to {MAX_SIZE} pixels, got {size}.")
    out = Path(out)
    recipe = {"size": size, "shard_size": SHARD_SIZE, "packages": [f"{p.name}@{p.version}" for p in _packages()]}
    recipe_file = out / "recipe.json"
    if recipe_file.exists() and json.loads(recipe_file.read_text()) != recipe:
        raise ValueError(
            f"{out} already holds emoji data made as {recipe_file.read_text().strip()}, but {json.dumps(recipe)} was "
            "asked for. Choose another folder, or remove this one."
        )
    own = {".packages", "data", recipe_file.with_suffix(".part").name}  # what a run cut off at its start leaves
    foreign = out.is_dir() and (any(p.name not in own for p in out.iterdir()) or any((out / "data").glob("*")))
    if not recipe_file.exists() and foreign:
        raise ValueError(f"{out} is not empty and holds no emoji data. Choose another folder.")
    records = match_records(Path(cache_dir) if cache_dir else out / ".packages", progress)
    (out / "data").mkdir(parents=True, exist_ok=True)
    scratch = recipe_file.with_suffix(".part")
    scratch.write_text(json.dumps(recipe))
    os.replace(scratch, recipe_file)

    shards: list[tuple[Path, list[dict[str, str]]]] = []
    counts = {}
    for split in SPLITS:
        rows = [record for record in records if split_of(record["hexcode"], record["style"]) == split]
        counts[split] = len(rows)
        starts = range(0, len(rows), SHARD_SIZE)
        for index, start in enumerate(starts):
            path = out / "data" / f"{split}-{index:05d}-of-{len(starts):05d}.parquet"
            shards.append((path, rows[start : start + SHARD_SIZE]))
    with tqdm(total=len(records), desc=f"Rendering at {size} px", unit="picture", disable=not progress) as bar:
        for path, rows in shards:
            if not path.exists():
                _write_shard(path, rows, size)
            bar.update(len(rows))
    write_card(out, size, counts)
    return counts


def _packages() -> list[EmojiPackage]:
    return [*STYLES.values(), NAMES]


def write_card(folder: Path, size: int, counts: dict[str, int]) -> None:
    """
    Write the data set's card: what it holds, how it was split, and every licence.

    It names the bytes of each split. `datasets` keeps what it has read under a folder's name and the head of its card:
    without them, data made anew or elsewhere under the same name would be taken for those read before.
    """
    sizes = {split: sum(file.stat().st_size for file in folder.glob(f"data/{split}-*.parquet")) for split in counts}
    (folder / "README.md").write_text(_dataset_card(size, counts, sizes), encoding="utf-8")


def _dataset_card(size: int, counts: dict[str, int], num_bytes: dict[str, int]) -> str:
    rows = "\n".join(f"| {p.name} | {p.version} | {p.license} | {p.holder} | {p.source} |" for p in _packages())
    lines = "\n".join(f"| {split} | {count} |" for split, count in counts.items())
    files = "\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in SPLITS)
    splits = "\n".join(
        f"  - name: {split}\n    num_bytes: {num_bytes[split]}\n    num_examples: {count}"
        for split, count in counts.items()
    )
    return f"""---
language: [en, zh]
license: other
license_name: mixed-see-card
task_categories: [text-to-image, image-to-text]
pretty_name: Emoji in four styles with English and Chinese names
configs:
- config_name: default
  data_files:
{files}
dataset_info:
  config_name: default
  splits:
{splits}
---
# Emoji in four styles, with English and Chinese names

Pictures of {size} x {size} pixels on white, rendered from vectors by `mars-hf data emoji --size {size}`.

| split | pictures |
|---|---|
{lines}

Columns: `image`, `caption_en`, `caption_zh`, `style`, `hexcode`. The split of a pair is
`int(sha1("HEXCODE|STYLE"), 16) % 20`: 0 is test, 1 is validation, the rest is train.

## Licences

The pictures and names belong to their makers. OpenMoji's licence asks that adapted pictures are shared alike;
Twemoji's asks for attribution.

| package | version | licence | holder | source |
|---|---|---|---|---|
{rows}
"""
