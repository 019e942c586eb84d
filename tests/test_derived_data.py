"""Data sets made of the emoji data: canvases and stories on disk, and codes at two resolutions."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PilImage
from torch.nn import functional as F

from mars_hf.data.composition import EmojiCompositions
from mars_hf.data.derived import write_canvases, write_stories
from mars_hf.data.emoji import STYLES, split_of
from mars_hf.data.encode import encode_records, open_manifest, scale_down, write_manifest
from mars_hf.data.records import open_records, tokenizer_fingerprint
from mars_hf.data.stories import EmojiStories
from mars_hf.image_processing_mars import MarsImageProcessor, decode_codes, encode_pixels


@pytest.fixture(scope="module")
def emoji():
    """Emoji-like rows of the train split, whose names share words."""
    rows = []
    for number in range(60):
        hexcode = f"1F{number:03X}"
        for style in STYLES:
            if split_of(hexcode, style) == "train":
                names = {"caption_en": f"big thing {number}", "caption_zh": f"东西{number}"}
                rows.append({"image": PilImage.new("RGB", (64, 64), (4 * number, 90, 20)), **names, "style": style})
                rows[-1]["hexcode"] = hexcode
    text = dict.fromkeys(("caption_en", "caption_zh", "style", "hexcode"), Value("string"))
    return Dataset.from_list(rows, features=Features({"image": Image(), **text}))


def test_canvases_on_disk_are_the_compositions_of_their_seed(emoji, tmp_path):
    weights = [1 / len(emoji)] * len(emoji)
    write_canvases(emoji, tmp_path, 12, balance=0.0, seed=3, progress=False)
    read = open_records(tmp_path)
    expected = EmojiCompositions(emoji, 12, weights=weights, seed=3)
    for row, index in zip(read, range(12), strict=True):
        record = expected[index]
        assert row["caption_en"] == record["caption_en"] and row["hexcodes"] == record["hexcodes"]
        with PilImage.open(io.BytesIO(row["image"]["bytes"])) as picture:
            assert picture.tobytes() == record["image"].tobytes() and picture.size in ((64, 96), (96, 64))
    with pytest.raises(ValueError, match="is there already"):
        write_canvases(emoji, tmp_path, 12, progress=False)


def write_codes(emoji, folder, vqgan):
    """Write a folder as `encode_records` does, but with codes that number the pictures."""
    codes = emoji.remove_columns("image").map(
        lambda row, index: {"image_codes": [index] * 64, "height": 64, "width": 64}, with_indices=True
    )
    tokenizer = {"fingerprint": tokenizer_fingerprint(vqgan)}
    manifest, done = open_manifest(folder, tokenizer, {"size": 64}, "train", len(codes))
    codes.to_parquet(folder / "data" / "train-00000.parquet")
    done["complete"] = True
    write_manifest(folder, manifest)
    return codes


def test_stories_on_disk_hold_the_codes_of_their_pictures_and_say_whose_they_are(emoji, make_vqgan, tmp_path):
    vqgan, out = make_vqgan(), tmp_path / "stories"
    codes = write_codes(emoji, tmp_path / "codes", vqgan)
    write_stories(tmp_path / "codes", out, 16, seed=1, progress=False)
    read, told = open_records(out, vqgan=vqgan), EmojiStories(codes, 16, seed=1)
    for row, index in zip(read, range(16), strict=True):
        segments = told[index]["segments"]
        assert [part["text"] for part in row["segments"]] == [p if isinstance(p, str) else None for p in segments]
        pictures = [part["image_codes"] for part in row["segments"] if part["text"] is None]
        assert pictures == [[part["index"]] * 64 for part in segments if not isinstance(part, str)]
    with pytest.raises(ValueError, match="were made by the image tokenizer"):
        open_records(out, vqgan=make_vqgan())
    for files in (out / "data" / "train-00000-of-00001.parquet", str(out / "data" / "*.parquet")):
        with pytest.raises(ValueError, match="were made by the image tokenizer"):
            open_records(files, vqgan=make_vqgan())
        open_records(files, vqgan=vqgan)
    before = (out / "codes.json").read_text()
    with pytest.raises(ValueError, match="is there already"):
        write_stories(tmp_path / "codes", out, 16, progress=False)
    write_codes(emoji, tmp_path / "others", make_vqgan())
    (out / "data" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="made in another way.*'fingerprint'"):
        write_stories(tmp_path / "others", out, 16, progress=False)
    assert (out / "codes.json").read_text() == before
    with pytest.raises(ValueError, match="holds no `codes.json`.*`mars-hf data encode`"):
        write_stories(tmp_path, tmp_path / "other", 16, progress=False)
    assert not (tmp_path / "other").exists()


def test_small_codes_are_those_of_the_picture_scaled_down(make_vqgan, tmp_path):
    rng = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (16, 24, 3), generator=rng, dtype=torch.uint8).numpy() for _ in range(3)]
    rows = [{"image": PilImage.fromarray(pixels), "caption": "a"} for pixels in pictures]
    data = Dataset.from_list(rows, features=Features({"image": Image(), "caption": Value("string")}))
    vqgan = make_vqgan()
    processor = MarsImageProcessor(size={"height": 16, "width": 16}, downsample_factor=4)
    encode_records(
        open_records(data), tmp_path, vqgan, processor, {"height": 16, "width": 24}, progress=False, lowres_factor=2
    )
    pixels = processor(
        [row["image"] for row in rows], size={"height": 16, "width": 24}, return_tensors="pt"
    ).pixel_values
    large, small = encode_pixels(vqgan, pixels), encode_pixels(vqgan, scale_down(pixels, 2))
    for row, own, lowres in zip(open_records(tmp_path, vqgan=vqgan), large, small, strict=True):
        assert row["image_codes"] == own.flatten().tolist() and lowres.shape == (2, 3)
        assert row["lowres_codes"] == lowres.flatten().tolist()
        (shown,) = decode_codes(vqgan, [lowres])
        enlarged = F.interpolate(shown[None], (16, 24), mode="bicubic", antialias=True).clamp(-1, 1)
        (again,) = encode_pixels(vqgan, enlarged)
        assert row["enlarged_codes"] == again.flatten().tolist()
    assert json.loads((tmp_path / "codes.json").read_text())["recipe"]["lowres_factor"] == 2
    with pytest.raises(ValueError, match="multiple of 8"):
        encode_records(
            open_records(data), tmp_path / "b", vqgan, processor, {"height": 16, "width": 20}, lowres_factor=2
        )
    with pytest.raises(ValueError, match="`lowres_factor` must be 2 or more"):
        encode_records(open_records(data), tmp_path / "c", vqgan, processor, lowres_factor=1)


@pytest.mark.integration
def test_drawn_small_pictures_are_of_the_models_tokenizer_and_of_no_other(
    tiny_model, tiny_processor, make_vqgan, tmp_path
):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    rows = [{"image": PilImage.new("RGB", (16, 16), (40 * number, 90, 20))} for number in range(4)]
    rows = [{**row, "caption_en": "apple", "caption_zh": "苹果", "style": "noto", "hexcode": "1F34E"} for row in rows]
    data = Dataset.from_list(rows).cast_column("image", Image())
    encode_records(
        open_records(data), tmp_path / "pairs", tiny_model.vqgan, tiny_processor.image_processor, lowres_factor=2
    )
    script = str(Path(__file__).parent.parent / "examples" / "draw_lowres.py")
    folders = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs"), "--out", str(tmp_path / "drawn")]
    for limit, code in (("100", 0), ("100", 0), ("50", 1)):
        command = [sys.executable, script, *folders, "--records", "3", "--max-distance", limit]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
        assert done.returncode == code, done.stderr[-3000:]
    assert "made in another way" in done.stderr and "'max_distance'" in done.stderr
    drawn = open_records(tmp_path / "drawn", vqgan=tiny_model.vqgan)
    assert len(drawn) == 3 and all(len(row["lowres_codes"]) == 4 for row in drawn)
    assert all(len(row["enlarged_codes"]) == 16 for row in drawn)
    with pytest.raises(ValueError, match="were made by the image tokenizer"):
        open_records(tmp_path / "drawn", vqgan=make_vqgan())
