"""Examples as their readers run them, on data and models of a few kilobytes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration, MarsPipeline, MarsProcessor
from mars_hf.contact_sheet import MARGIN
from mars_hf.data import emoji
from mars_hf.modeling_mars import is_visual_parameter
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
    emoji.write_card(folder, size, dict.fromkeys(emoji.SPLITS, 6))


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


SQUARES = {"red": (220, 40, 40), "blue": (40, 60, 220), "green": (30, 160, 60), "purple": (140, 40, 170)}


def square(colour: str) -> Image.Image:
    """A square that mars-emoji has never seen: in the lower right corner."""
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste(SQUARES[colour], (24, 32, 60, 64))
    return picture


def sheet_pictures(sheet: Image.Image, count: int) -> list[Image.Image]:
    """The pictures of 64 pixels in the first row of a contact sheet, which enlarges them to 192."""
    lefts = [MARGIN + number * (192 + MARGIN) for number in range(count)]
    return [sheet.crop((left, MARGIN, left + 192, MARGIN + 192)).resize((64, 64), 0) for left in lefts]


@pytest.mark.parametrize("has_metadata", [False, True])
def test_a_lora_brings_drawings_nearer_to_the_pictures_of_a_folder(tmp_path: Path, has_metadata: bool) -> None:
    folder = tmp_path / "squares"
    folder.mkdir()
    for number, colour in enumerate(SQUARES):  # the word "test" must not make it another split
        square(colour).save(folder / (f"{number}.png" if has_metadata else f"{colour} test square.png"))
    if has_metadata:
        lines = [{"file_name": f"{n}.png", "caption": f"{colour} test square"} for n, colour in enumerate(SQUARES)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))

    script = str(ROOT / "examples" / "finetune_lora.py")
    options = ("--prompt", "blue test square", "--out", "lora", "--max-steps", "60", "--batch-size", "4")
    said = run(sys.executable, script, str(folder), *options, cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"'loss': '?([0-9.]+)", said)]
    assert len(losses) == 6 and losses[-1] < losses[0] / 2

    with Image.open(tmp_path / "lora" / "before-after.png") as sheet:
        before, after = sheet_pictures(sheet, 2)
    true = np.asarray(square("blue"), dtype=float)
    errors = [np.abs(np.asarray(drawn, dtype=float) - true).mean() for drawn in (before, after)]
    assert errors[1] < errors[0] / 2

    from peft import PeftModel

    model = MarsForConditionalGeneration.from_pretrained(DEFAULT_CHECKPOINT)
    pipe = MarsPipeline(model=model, processor=MarsProcessor.from_pretrained(DEFAULT_CHECKPOINT))
    assert pipe("blue test square", seed=0)[0]["generated_image"].tobytes() == before.tobytes()
    PeftModel.from_pretrained(model, tmp_path / "lora" / "adapter")  # puts it on `model`
    assert pipe("blue test square", seed=0)[0]["generated_image"].tobytes() == after.tobytes()


def test_the_tiny_run_leads_from_emoji_to_drawings_and_a_checkpoint(tmp_path: Path) -> None:
    write_data(tmp_path / "emoji-64", 64)
    script = (sys.executable, str(ROOT / "examples" / "train_tiny.py"), "--data", "emoji-64", "--out", "tiny")
    learnt = ("--subjects", "square 0", "square 4", "--max-steps", "2", "--batch-size", "2")
    run(*script, *learnt, cwd=tmp_path)
    with Image.open(tmp_path / "tiny" / "drawn.png") as sheet:
        assert sheet.width == MARGIN + 4 * (128 + MARGIN)  # two drawings, each beside the true picture

    before = MarsForConditionalGeneration.from_pretrained(DEFAULT_CHECKPOINT).state_dict()
    after = MarsForConditionalGeneration.from_pretrained(tmp_path / "tiny" / "final").state_dict()
    assert before.keys() == after.keys()
    frozen = [name for name in before if not is_visual_parameter(name)]
    assert all(before[name].equal(after[name]) for name in frozen)
    text_expert, visual_expert = (f"model.layers.0.{mlp}.up_proj.weight" for mlp in ("mlp", "visual_mlp"))
    assert not after[visual_expert].equal(after[text_expert])  # it has moved away from where it started
    assert not after[visual_expert].equal(before[visual_expert])
    draw = ("generate", "square 4", "--out", "drawn.png", "--model", "tiny/final")
    run(sys.executable, "-m", "mars_hf.cli", *draw, cwd=tmp_path)

    refused = subprocess.run([*script, "--subjects", "unicorn"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and "no pictures of unicorn" in refused.stderr
