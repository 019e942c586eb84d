"""Examples as their readers run them, on data and models of a few kilobytes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mars_hf.data import emoji
from mars_hf.training.recipe import RECIPES

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.integration


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def write_data(folder: Path, size: int) -> None:
    """Write a data set of the emoji data's form: squares of random colours."""
    rng = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    for split in emoji.SPLITS:
        rows = []
        for number in range(6):
            red, green, blue = rng.integers(0, 256, 3)
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="{number + 2}" '
            svg += f'fill="rgb({red},{green},{blue})"/></svg>'
            names = {"caption_en": f"square {number}", "caption_zh": f"方块{number}"}
            rows.append({"svg": svg, **names, "style": "noto", "hexcode": f"{number:X}"})
        emoji._write_shard(folder / "data" / f"{split}-00000-of-00001.parquet", rows, size)
    (folder / "README.md").write_text(emoji.dataset_card(size, dict.fromkeys(emoji.SPLITS, 6)))


def test_the_training_scripts_lead_from_data_to_a_drawing(tmp_path: Path, make_text_model, tiny_processor) -> None:
    for size in (64, 128):
        write_data(tmp_path / f"emoji-{size}", size)
    text = make_text_model(vocab_size=264, eos_token_id=256, pad_token_id=256, max_position_embeddings=256)
    text.save_pretrained(tmp_path / "text")
    plain = {token: i for token, i in tiny_processor.tokenizer.get_vocab().items() if i < 256}
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab={**plain, "<|endoftext|>": 256}, merges=[])
    tokenizer.save_pretrained(tmp_path / "text")

    def script(name: str, *arguments: str) -> str:
        return run(sys.executable, str(ROOT / "examples" / name), *arguments, cwd=tmp_path)

    data = ("emoji-64", "emoji-128")
    said = script("train_vqgan.py", "--data", *data, "--out", "vqgan", "--max-steps", "2", "--batch-size", "2")
    assert "test, 128 px" in said
    encode = ("data", "encode", "--model", "vqgan", "--data", "emoji-64", "--size", "64", "64")
    run(sys.executable, "-m", "mars_hf.cli", *encode, "--out", "emoji-64-codes", cwd=tmp_path)
    recipe = yaml.safe_load((RECIPES / "emoji" / "stage1.yaml").read_text())
    recipe["model"] |= {"text": "text", "vqgan": "vqgan"}
    for source in recipe["data"]:
        source["source"] = "emoji-64-codes"
    recipe["training"] |= {"max_steps": 2, "per_device_train_batch_size": 2, "warmup_steps": 0}
    recipe["training"]["lr_scheduler_kwargs"]["num_decay_steps"] = 1
    (tmp_path / "stage1.yaml").write_text(yaml.safe_dump(recipe))
    script("train.py", "stage1.yaml", "--out", "stage1")
    export = ("export", "mars", "--model", "stage1/final", "--weights-dtype", "bfloat16")
    run(sys.executable, "-m", "mars_hf.cli", *export, cwd=tmp_path)
    draw = ("generate", "square 3", "--out", "drawn.png", "--model", "mars")
    run(sys.executable, "-m", "mars_hf.cli", *draw, cwd=tmp_path)
    assert Image.open(tmp_path / "drawn.png").size == (64, 64)


def test_the_judge_scores_drawings_of_the_embedded_checkpoint(tmp_path: Path) -> None:
    write_data(tmp_path / "emoji-64", 64)
    judge = ("--data", "emoji-64", "--out", "judge", "--max-steps", "2", "--batch-size", "4")
    said = run(sys.executable, str(ROOT / "examples" / "train_judge.py"), *judge, cwd=tmp_path)
    assert "validation, zh: of 6 prompts" in said
    clip = "{clip: judge/final}"
    changes = {
        "out": "out",
        "prompts.data": "emoji-64",
        "prompts.limit": "3",
        "runs": "{guidance-4: {guidance_scale: 4.0, pictures_per_prompt: 2}}",
        "metrics": f"{{clip_score: {clip}, best_of: {clip}, retrieval: {clip}}}",
    }
    settings = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    said = run(sys.executable, "-m", "mars_hf.cli", "evaluate", "emoji", *settings, cwd=tmp_path)
    assert "| guidance-4 | best of 2 | zh | 3 |" in said
