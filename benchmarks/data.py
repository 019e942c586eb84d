"""
Does the engine cost much, and does memory stay where it is? Two tables, on random photographs of 512 x 384 pixels in
tar shards:

- decode, filter, hash, find duplicates, write: `mars-hf data build` on Ray with two workers beside a bare
  `multiprocessing` loop, in which two processes examine pictures and a third finds duplicates and writes; each in a
  fresh process and after a warm-up, interleaved; medians;
- peak memory of the whole process tree (proportional set size) of a build of 10 and of 100 shards.

    python benchmarks/data.py --folder data/benchmark

Is everything caught that should be, and nothing else? Among the first pictures of the emoji data, files are planted
that are copies, bombs, damaged or mislabelled; a table says what became of them:

    python benchmarks/data.py --folder data/benchmark --plant data/emoji-64

Needs Linux and psutil. The folder is removed again.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import imagehash
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Image as ImageFeature
from datasets import load_dataset
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from mars_hf.data.build.duplicates import NearDuplicates
from mars_hf.data.build.engine import connected
from mars_hf.data.build.pipeline import build_dataset
from mars_hf.data.build.recipe import Engine, Recipe, make_recipe

SIZE = (512, 384)
MIN_SIDE, MAX_RATIO, MAX_DISTANCE, MAX_COLOUR_DIFFERENCE = 256, 2.0, 4, 16
WORKERS = 2
OBJECT_STORE = 200_000_000
WARM_RECORDS = 20
MIB = 2**20

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--folder", type=Path, required=True, help="where to work; created, and removed afterwards")
parser.add_argument("--shards", type=int, default=8, help="shards of the first table")
parser.add_argument("--records", type=int, default=1000, help="pictures of a shard of the first table")
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--few", type=int, default=10, help="shards of the second table")
parser.add_argument("--many", type=int, default=100)
parser.add_argument("--memory-records", type=int, default=200, help="pictures of a shard of the second table")
parser.add_argument("--plant", type=Path, help="folder of the emoji data: plant files among them and look for them")
parser.add_argument("--run", choices=["bare", "ray", "once"], help="what this script starts itself with")
parser.add_argument("--out", type=Path, help="of --run")


def make_shard(path: Path, seed: int, records: int) -> None:
    """Fill a tar with pictures of smooth colours and some noise, about as hard to decode as photographs."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as archive:
        for i in range(records):
            blobs = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIZE, 3)
            noisy = np.asarray(blobs) + rng.integers(-12, 13, (SIZE[1], SIZE[0], 1))
            buffer = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
            for suffix, content in (("jpg", buffer.getvalue()), ("txt", f"picture {seed} {i}".encode())):
                member = tarfile.TarInfo(f"{seed:05d}{i:05d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


# The bare loop


def examine(path: str) -> list[tuple]:
    """Read, decode, filter and hash one shard."""
    found, data = [], b""
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member).read()
            if member.name.endswith("jpg"):
                data = content
                continue
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            short, long = sorted(picture.size)
            if short < MIN_SIDE or long > MAX_RATIO * short:
                continue
            pixels = hashlib.sha256(picture.tobytes()).digest()
            bits = int(str(imagehash.phash(picture)), 16)
            colours = picture.resize((4, 4), Image.Resampling.BOX).tobytes()
            found.append((member.name, data, content.decode(), picture.size, pixels, bits, colours))
    return found


def run_bare(pool, shards: list[Path], out: Path) -> int:
    out.mkdir(parents=True)
    seen, near, count = set(), NearDuplicates(MAX_DISTANCE, MAX_COLOUR_DIFFERENCE), 0
    for number, found in enumerate(pool.imap(examine, map(str, shards))):
        rows = []
        for name, data, caption, (width, height), pixels, bits, colours in found:
            if pixels in seen or near.find(bits, colours) is not None:
                continue
            seen.add(pixels)
            near.add(bits, colours, name)
            rows.append({"key": name, "image": data, "caption_en": caption, "width": width, "height": height})
        pq.write_table(pa.Table.from_pylist(rows), out / f"{number}.parquet", row_group_size=100, compression="zstd")
        count += len(rows)
    return count


# Ours


def recipe_of(shards: list[Path], out: Path, records: int) -> Recipe:
    return make_recipe(
        {
            "sources": [{"name": "photographs", "kind": "webdataset", "path": str(shards[0].parent / "*.tar")}],
            "filter": {"min_side": MIN_SIDE, "max_aspect_ratio": MAX_RATIO},
            "duplicates": {"max_distance": MAX_DISTANCE, "max_colour_difference": MAX_COLOUR_DIFFERENCE},
            "write": {"records_per_shard": records},
            "engine": {"workers": WORKERS, "object_store_bytes": OBJECT_STORE},
            "out": str(out),
        }
    )


# Ray starts its workers with a niceness of 15: beside anything else that runs, the comparison would not be fair.
os.environ["RAY_worker_niceness"] = "0"


def run_ray(shards: list[Path], out: Path, records: int) -> int:
    return build_dataset(recipe_of(shards, out, records), progress=False)["kept"]


# The processes that are measured


def timed(options: argparse.Namespace) -> None:
    """Warm up, measure once (neither the start nor the end of processes), print seconds and records."""
    shards = sorted((options.folder / "shards").glob("*.tar"))
    warm = sorted((options.folder / "warm").glob("*.tar"))
    if options.run == "bare":
        with multiprocessing.Pool(WORKERS) as pool:
            run_bare(pool, warm, options.out / "warm")
            started = time.perf_counter()
            count = run_bare(pool, shards, options.out / "out")
            seconds = time.perf_counter() - started
    else:
        with connected(Engine(workers=WORKERS, object_store_bytes=OBJECT_STORE)):
            run_ray(warm, options.out / "warm", WARM_RECORDS)  # a file for each worker
            started = time.perf_counter()
            count = run_ray(shards, options.out / "out", options.records)
            seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "records": count}))


def start(options: argparse.Namespace, run: str, folder: Path) -> subprocess.Popen:
    out = folder / f"out-{run}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--run", run, "--folder", str(folder), "--out", str(out)]
    command += ["--records", str(options.records)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def measure(options: argparse.Namespace, run: str, folder: Path) -> dict:
    process = start(options, run, folder)
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"--run {run} failed")
    return json.loads(output.splitlines()[-1])


def peak_memory(options: argparse.Namespace, folder: Path) -> float:
    """Watch the process tree of one build; give its peak in MiB."""
    process = start(options, "once", folder)
    tree, peak = psutil.Process(process.pid), 0

    def total() -> int:
        count = 0
        for member in [tree, *tree.children(recursive=True)]:
            try:
                count += member.memory_full_info().pss
            except psutil.Error:  # it has just ended
                continue
        return count

    reader = threading.Thread(target=process.stdout.read)  # the pipe must not fill
    reader.start()
    while process.poll() is None:
        try:
            peak = max(peak, total())
        except psutil.NoSuchProcess:
            break
        time.sleep(0.2)
    reader.join()
    if process.wait():
        sys.exit("the build failed")
    return peak / MIB


def fill(folder: Path, count: int, records: int) -> None:
    folder.mkdir(parents=True)
    for seed in tqdm(range(count), desc=f"Making {folder}", unit="shard"):
        make_shard(folder / f"{seed:05d}.tar", seed, records)


def compare(options: argparse.Namespace) -> None:
    folder = options.folder
    fill(folder / "shards", options.shards, options.records)
    fill(folder / "warm", WORKERS, WARM_RECORDS)
    results: dict[str, list[dict]] = {"bare": [], "ray": []}
    for _ in range(options.repeats):
        for run in results:
            results[run].append(measure(options, run, folder))
    print("\n| | pictures/s, median | spread |\n|---|---|---|")
    medians = {}
    for run, measured in results.items():
        rates = [result["records"] / result["seconds"] for result in measured]
        medians[run] = statistics.median(rates)
        print(f"| {run} | {medians[run]:.0f} | {min(rates):.0f} to {max(rates):.0f} |")
    counts = {result["records"] for measured in results.values() for result in measured}
    print(f"\nratio {medians['ray'] / medians['bare']:.2f}; records written: {counts}")
    shutil.rmtree(folder / "shards")

    peaks, options.records = {}, options.memory_records
    for count in (options.few, options.many):
        fill(folder / "shards", count, options.records)
        peaks[count] = peak_memory(options, folder)
        shutil.rmtree(folder / "shards")
    print("\n| shards | peak memory of the process tree, MiB |\n|---|---|")
    for count, peak in peaks.items():
        print(f"| {count} | {peak:.0f} |")
    print(f"\nratio {peaks[options.many] / peaks[options.few]:.2f}")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")


# What is planted


def encoded(picture: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=60)
    return buffer.getvalue()


def bomb() -> bytes:
    """Make a PNG of a few bytes whose header promises 1.6 thousand million pixels."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    parts = (struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def planted(data: bytes) -> dict[str, tuple[bytes, bytes | None, str | None]]:
    """Give by name: a file and its caption made of a picture that stays, and the reason that must drop it, if any."""
    picture, caption = Image.open(io.BytesIO(data)).convert("RGB"), b"a caption"
    new = ImageOps.invert(ImageOps.flip(picture))
    return {
        "copy.png": (data, caption, "exact_duplicate"),
        "copy-as.bmp": (encoded(picture, "BMP"), caption, "exact_duplicate"),
        "recompressed.jpg": (encoded(picture, "JPEG"), caption, "near_duplicate"),
        "bomb.png": (bomb(), caption, "too_many_pixels"),
        "cut.png": (data[: len(data) // 2], caption, "damaged"),
        "page.jpg": (b"<html>404 not found</html>", caption, "not_a_picture"),
        "small.png": (encoded(picture.resize((8, 8)), "PNG"), caption, "too_small"),
        "long.png": (encoded(picture.resize((picture.width * 3, picture.height)), "PNG"), caption, "too_elongated"),
        "silent.png": (encoded(new, "PNG"), None, "no_caption"),
        "gbk.png": (encoded(new, "PNG"), "红苹果".encode("gbk"), "undecodable_caption"),
        "endless.png": (encoded(new, "PNG"), b"x" * MIB, "caption_too_long"),
        "mislabelled.png": (encoded(new, "JPEG"), caption, None),
    }


def build(raw: Path, folder: Path, name: str) -> tuple[dict, set[str]]:
    """Run the command; give the report and the keys of what was kept."""
    recipe = {"sources": [{"name": "emoji", "kind": "folder", "path": str(raw), "records_per_shard": 50}]}
    recipe |= {"filter": {"min_side": 16, "max_aspect_ratio": 2}, "duplicates": {}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "mars_hf.cli", "data", "build", folder / f"{name}.yaml", "--out", folder / name]
    subprocess.run([*command, "--workers", str(WORKERS)], check=True)
    report = json.loads((folder / name / "report.json").read_text(encoding="utf-8"))
    keys = pq.read_table(folder / name / "data", columns=["key"])["key"].to_pylist()
    return report, set(keys)


def look_for_planted(options: argparse.Namespace) -> None:
    """Build without and with planted files; all that differs must be what was planted."""
    raw = options.folder / "raw"
    raw.mkdir()
    rows = load_dataset(str(options.plant), split="train").cast_column("image", ImageFeature(decode=False))
    rows = rows.select(range(min(options.records, len(rows))))
    for number, row in enumerate(rows):
        (raw / f"{number:05d}.png").write_bytes(row["image"]["bytes"])
        (raw / f"{number:05d}.txt").write_text(row["caption_en"], encoding="utf-8")
    before, kept = build(raw, options.folder, "without")
    files = planted((raw / min(kept).removeprefix("emoji/")).read_bytes())
    for name, (data, caption, _) in files.items():
        (raw / f"planted-{name}").write_bytes(data)
        if caption is not None:
            (raw / f"planted-{name}").with_suffix(".txt").write_bytes(caption)
    after, kept_with = build(raw, options.folder, "with")
    expected = Counter(reason for *_, reason in files.values() if reason)
    caught = Counter(after["dropped"]) - Counter(before["dropped"])
    print("\n| reason | planted | caught |\n|---|---|---|")
    for reason in sorted(expected | caught):
        print(f"| {reason} | {expected[reason]} | {caught[reason]} |")
    good = {f"emoji/planted-{name}" for name, (*_, reason) in files.items() if reason is None}
    print(f"\nkept: {len(kept)} without, {len(kept_with)} with what was planted, of which {len(good)} were to stay")
    if caught != expected or kept_with != kept | good:
        sys.exit(f"not as planted: {sorted(kept_with ^ (kept | good))}")


if __name__ == "__main__":
    options = parser.parse_args()
    if options.run in ("bare", "ray"):
        timed(options)
    elif options.run == "once":
        run_ray(sorted((options.folder / "shards").glob("*.tar")), options.out, options.records)
    else:
        options.folder = options.folder.absolute()
        options.folder.mkdir(parents=True)  # a folder of one's own: it is removed
        try:
            look_for_planted(options) if options.plant else compare(options)
        finally:
            shutil.rmtree(options.folder)
