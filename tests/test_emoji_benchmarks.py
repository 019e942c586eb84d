"""The benchmarks of mars-emoji from end to end, on a few hundred drawn shapes: what they print and what they write."""

import json
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from test_examples import ROOT, run

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration, MarsProcessor
from mars_hf.data import emoji
from mars_hf.training.run import with_other_config

pytestmark = pytest.mark.integration
MARS = (sys.executable, "-m", "mars_hf.cli")


def write_shapes(folder: Path, size: int) -> None:
    """Write data of the emoji data's form: 180 subjects in four styles; their test split is what a score takes."""
    colours = ("red", "green", "blue", "gold", "brown", "black", "pink", "grey", "navy", "teal", "orange", "purple")
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in emoji.SPLITS}
    for number, (colour, radius) in enumerate(product(colours, range(1, 16))):
        shape = f'<circle cx="8" cy="8" r="{radius * 0.5}" fill="{colour}"/>'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{shape}</svg>'
        names = {
            "caption_en": f"{colour} disc {radius}",
            "caption_zh": f"圆{number}",
            "hexcode": f"{0x1F400 + number:X}",
        }
        for style in emoji.STYLES:
            split = emoji.split_of(names["hexcode"], style)
            rows[split].append({"svg": svg, **names, "style": style})
    (folder / "data").mkdir(parents=True)
    for split, own in rows.items():
        emoji._write_shard(folder / "data" / f"{split}-00000-of-00001.parquet", own, size)
    emoji.write_card(folder, size, {split: len(own) for split, own in rows.items()})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with the data sets that the recipes of mars-emoji name, codes of the embedded checkpoint's VQ-GAN."""
    folder = tmp_path_factory.mktemp("shapes")
    for size in (64, 128):
        write_shapes(folder / f"emoji-{size}", size)
    encode = (*MARS, "data", "encode")
    for split in ("train", "test"):
        small = ("--data", "emoji-64", "--size", "64", "64", "--split", split, "--out", "emoji-64-codes")
        run(*encode, *small, cwd=folder)
    large = ("--data", "emoji-128", "--size", "128", "128", "--lowres-factor", "2", "--out", "emoji-128-codes")
    run(*encode, *large, cwd=folder)
    run(*MARS, "data", "canvases", "--data", "emoji-128", "--records", "60", "--out", "emoji-canvas", cwd=folder)
    run(*encode, "--data", "emoji-canvas", "--short-side", "64", "--out", "emoji-canvas-codes", cwd=folder)
    return folder


def benchmark(name: str, *arguments: str | Path, cwd: Path) -> str:
    return run(sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *map(str, arguments), cwd=cwd)


def scores_of(file: Path) -> dict:
    return json.loads(file.read_text())["scores"]


def test_identity_is_scored_on_square_canvases_and_on_others(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "identity.json"
    printed = benchmark("emoji_identity", "--data", "emoji-64", "--prompts", 4, "--json", file, cwd=data)
    found = scores_of(file)
    drawn = {f"{split}, {language}" for split, language in product(("train", "test"), ("en", "zh"))}
    assert drawn < found.keys() and found["test, reconstructions"] >= 50 and "Chinese less English" in printed
    other = ("--size", 64, 96, "--splits", "train", "--languages", "en", "--prompts", 4, "--json", file)
    benchmark("emoji_identity", "--data", "emoji-64", *other, cwd=data)
    assert scores_of(file)["train, en: distance by the size named"] >= 0


def test_captions_are_ranked_and_the_greedy_one_is_counted_once(data: Path, tmp_path) -> None:
    file = tmp_path / "captioning.json"
    printed = benchmark("emoji_captioning", "--data", "emoji-64-codes", "--pictures", 3, "--json", file, cwd=data)
    assert len(scores_of(file)) == 6 and printed.count("greedy caption") == 2


def test_stories_are_told_and_held_out_pairs_counted_apart(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "stories.json"
    benchmark("emoji_stories", "--data", "emoji-64", "--stories", 2, "--json", file, cwd=data)
    found = scores_of(file)
    assert 0 <= found["ends by itself, %"] <= 100 and found["its worst rank"] >= 1
    assert "of them of test pairs, %" in found


def test_super_resolution_stands_beside_bicubic_and_its_ceiling(data: Path, tmp_path: Path) -> None:
    changes = {"super_resolution_factor": 2, "default_image_size": 128, "codes_per_step": [1, 16]}
    changes |= {"code_order": "block2x2", "cell_embedding": True, "max_grid_size": 16}
    base = MarsForConditionalGeneration.from_pretrained(DEFAULT_CHECKPOINT)
    model, processor = with_other_config(base, MarsProcessor.from_pretrained(DEFAULT_CHECKPOINT), changes)
    model.save_pretrained(tmp_path / "large")
    processor.save_pretrained(tmp_path / "large")
    asked = ("--data", "emoji-128", "--split", "train", "--pictures", 34, "--json", tmp_path / "scores.json")
    printed = benchmark("super_resolution", *asked, "--model", tmp_path / "large", cwd=data)
    found = scores_of(tmp_path / "scores.json")
    small, again, ceiling = (found[name] for name in ("bicubic, of the small picture", "bicubic, of the small codes",
                                                      "the large picture's own codes"))  # fmt: skip
    assert small["psnr"] > again["psnr"] and ceiling["psnr"] > again["psnr"] > found["drawn, K = 1"]["psnr"]
    low, high = found["drawn, K = 16"]["interval"]
    assert low <= found["drawn, K = 16"]["frechet"] <= high
    assert "over bicubic of the small codes: K = 1" in printed and "at K = 16 to that at K = 1" in printed


def test_arms_are_trained_once_and_an_arm_that_fails_does_not_end_the_others(
    data: Path, tmp_path: Path, make_text_model, tiny_processor
) -> None:
    from transformers import Qwen2Tokenizer

    ids = {"vocab_size": 264, "eos_token_id": 256, "pad_token_id": 256, "max_position_embeddings": 512}
    make_text_model(**ids).save_pretrained(tmp_path / "text")
    plain = {token: number for token, number in tiny_processor.tokenizer.get_vocab().items() if number < 256}
    Qwen2Tokenizer(vocab={**plain, "<|endoftext|>": 256}, merges=[]).save_pretrained(tmp_path / "text")
    model = MarsForConditionalGeneration.from_pretrained(DEFAULT_CHECKPOINT, dtype=torch.float32)
    model.vqgan.save_pretrained(tmp_path / "vqgan")
    folders = ("--data", data, "--text", tmp_path / "text", "--vqgan", tmp_path / "vqgan", "--out", tmp_path / "out")
    asked = (*folders, "--seeds", "0", "--steps", "5", "--pictures", "34", "--arms")
    arms = ("stages I, II, III", "K1 raster", "K4 raster", "K4 region", "K4 block2x2", "K16 best order")
    printed = benchmark("ablations", *asked, *arms, cwd=tmp_path)
    written = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")}
    assert len(written) == len(arms) and written["K16-best-order-0"]["codes_per_step"] == 16
    config = json.loads((tmp_path / "out" / "runs" / "K16-best-order-0" / "final" / "config.json").read_text())
    assert config["cell_embedding"] and config["lowres_embedding"]
    assert written["stages-I-II-III-0"]["frechet_128"].keys() == {"1", "16"}
    assert "| stages I, II, III |" in printed and "best order at K = 16 to K = 1:" in printed
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert benchmark("ablations", *asked, *arms, cwd=tmp_path).splitlines()[-8:] == printed.splitlines()[-8:]
    assert before == {file: file.stat().st_mtime_ns for file in before}

    (tmp_path / "out" / "K4-region-0.json").unlink()
    (tmp_path / "out" / "K4-block2x2-0.json").unlink()
    (tmp_path / "out" / "runs" / "K4-region-0" / "final" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(AssertionError, match="Failed: K4 region, seed 0."):
        benchmark("ablations", *asked, *arms, cwd=tmp_path)
    assert (tmp_path / "out" / "K4-block2x2-0.json").exists()
    with pytest.raises(AssertionError, match="was measured with other --pictures"):
        benchmark(
            "ablations", *folders, "--seeds", "0", "--steps", "5", "--pictures", "36", "--arms", *arms, cwd=tmp_path
        )
