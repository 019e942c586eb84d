"""The command line: what it draws, writes and prints, and that what it cannot do is refused in one line."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mars_hf import DEFAULT_CHECKPOINT, ImageIteratorStreamer
from mars_hf.cli import app
from mars_hf.documents import as_markdown, write_document
from mars_hf.evaluation.provenance import fingerprint
from mars_hf.studio import Studio, check_prompt
from mars_hf.training.recipe import Recipe

SIDE = 16


@pytest.fixture
def folder(tmp_path: Path, tiny_model, tiny_processor) -> Path:
    """A checkpoint of a few kilobytes, which samples with guidance."""
    tiny_model.generation_config.image_defaults = {"do_sample": True, "guidance_scale": 2.0}
    tiny_model.save_pretrained(tmp_path / "tiny")
    tiny_processor.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def pixels(picture: Image.Image) -> list:
    return np.asarray(picture).tolist()


def test_a_caption_is_asked_for_with_as_many_start_tokens_as_the_model_has_learnt(folder: Path, monkeypatch):
    studio, asked = Studio.open(folder), []
    studio.model.config.codes_per_step = [4, 1]
    generate = studio.model.generate
    monkeypatch.setattr(studio.model, "generate", lambda **inputs: (asked.append(inputs), generate(**inputs))[1])
    studio.caption(Image.new("RGB", (SIDE, SIDE)), max_new_tokens=2)
    start = studio.model.config.image_start_token_id
    assert [(inputs["input_ids"] == start).sum().item() for inputs in asked] == [4]


# ---- generate


def test_every_prompt_is_drawn_in_every_size_from_every_seed_and_says_so_in_its_file(folder: Path, tmp_path: Path):
    prompts, out = ["a red apple", "تفاحة 🍎 红苹果"], tmp_path / "apple.png"
    options = ["--size", "16x16", "--size", "8x16", "--seed", 3, "--seed", 4, "--batch-size", 3, "--json"]
    done = run("generate", *prompts, "--out", out, "--model", folder, *options)
    assert done.exit_code == 0, done.output
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(own["file"]).name for own in facts] == [f"apple-{number}.png" for number in range(1, 9)]
    order = [(own["settings"]["height"], own["prompt"], own["seed"]) for own in facts]
    assert order == [(height, prompt, seed) for height in (16, 8) for prompt in prompts for seed in (3, 4)]
    for own in facts:
        with Image.open(own["file"]) as picture:
            assert picture.size == (16, own["settings"]["height"])
            assert picture.text["prompt"] == own["prompt"] and json.loads(picture.text["seed"]) == own["seed"]
            assert json.loads(picture.text["settings"]) == own["settings"]
            assert picture.text["checkpoint"] == own["checkpoint"] == fingerprint(folder)


def test_a_picture_is_that_of_generate_with_its_seed_and_can_be_drawn_again_from_its_file(
    folder: Path, tmp_path: Path, tiny_model, tiny_processor
):
    out, again = tmp_path / "one.png", tmp_path / "again.png"
    assert run("generate", "ab", "--out", out, "--model", folder, "--seed", 7, "--guidance-scale", 3).exit_code == 0
    inputs = tiny_processor("ab", height=SIDE, width=SIDE)
    options = {"do_sample": True, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(7)}
    drawn = tiny_model.generate(**inputs, generation_mode="image", **options)
    (expected,) = tiny_processor.image_processor.postprocess(tiny_model.decode_image_tokens(drawn))
    with Image.open(out) as picture:
        assert pixels(picture) == pixels(expected)
        text = picture.text
    settings = json.loads(text["settings"])
    redraw = ["--seed", text["seed"], "--guidance-scale", settings["guidance_scale"]]
    assert run("generate", text["prompt"], "--out", again, "--model", folder, *redraw).exit_code == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_grid_is_one_file_that_says_what_each_picture_is(folder: Path, tmp_path: Path):
    out = tmp_path / "sheet.png"
    done = run("generate", "a", "b", "--seed", 1, "--seed", 2, "--grid", "--out", out, "--model", folder)
    assert done.exit_code == 0, done.output
    assert re.fullmatch(rf"{re.escape(str(out))} \(drawn in \d+\.\d s\)\n", done.stdout)
    with Image.open(out) as sheet:
        assert sheet.width > 4 * SIDE
        drawn = json.loads(sheet.text["pictures"])
    assert [(own["prompt"], own["seed"]) for own in drawn] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert [path.name for path in tmp_path.glob("*.p*")] == ["sheet.png"]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "broken.png").write_bytes(b"no picture")
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:900])
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")
    return folder


GENERATE = ["generate", "a red apple", "--out", "a.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "", "--out", "a.png"], "prompt is empty"),
        (["generate", " \u200b\n", "--out", "a.png"], "prompt is empty"),
        (["generate", "x" * 100_000, "--out", "a.png"], "at most 4,000 characters, but this one has 100,000"),
        (["generate", "red\x1b[31m", "--out", "a.png"], "holds U+001B"),
        (["generate", "red\udcff", "--out", "a.png"], "holds U+DCFF"),
        (["generate", "x" * 3000, "--out", "a.png"], "only"),  # tokens
        ([*GENERATE, "--negative-prompt", "\x00"], "holds U+0000"),
        ([*GENERATE, "--seed", "-1"], "from 0 to 9223372036854775807, got -1"),
        ([*GENERATE, "--seed", str(2**63)], "from 0 to"),
        ([*GENERATE, "--size", "64"], "such as 64x96, got '64'"),
        ([*GENERATE, "--size", "0x16"], "must be a positive whole number of pixels, got 0"),
        ([*GENERATE, "--size", "17x16"], "multiple of 4, got 17"),
        ([*GENERATE, "--size", "16x8192"], "at most 4096 pixels"),
        ([*GENERATE, "--size", "16x16", "--size", "2048x2048"], "262146 more, but only"),
        ([*GENERATE, "--guidance-scale", "-1"], "`guidance_scale` must be 0 or more"),
        ([*GENERATE, "--guidance-scale", "inf"], "must be a finite number"),
        ([*GENERATE, "--temperature", "nan"], "must be a finite number"),
        ([*GENERATE, "--temperature", "0"], "`temperature` must be above 0"),
        ([*GENERATE, "--codes-per-step", "4"], "not trained to draw 4 codes a step"),
        ([*GENERATE, "--codes-per-step", "0"], "codes"),
        ([*GENERATE, "--batch-size", "0"], "--batch-size"),
        ([*GENERATE, "--model", "."], "holds no complete MARS checkpoint"),
        ([*GENERATE, "--model", "./nowhere"], "neither a folder nor a repository"),
        (["generate", "a", "--out", "a.txt"], "must name a PNG"),
        (["generate", "a", "--out", "nowhere/a.png"], "does not exist"),
        (["generate", "a"], "Missing option '--out'"),
        (["generat", "a"], "No such command 'generat'"),
        (["caption", "nowhere.png"], "no picture file nowhere.png"),
        (["caption", "broken.png"], "cannot be read as a picture"),
        (["caption", "cut.png"], "cut.png: "),
        (["caption", "bomb.png"], "must have at most 64000000 pixels"),
        (["story", "", "--out", "a.md"], "prompt is empty"),
        (["story", "a", "--out", "a.pdf"], "ends in .md or .html"),
        (["story", "a", "--out", "a.md", "--seed", "-3"], "got -3"),
        (["story", "a", "--out", "a.md", "--guidance-scale", "nan"], "finite number"),
        (["info", "."], "holds no complete MARS checkpoint"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_one_line(
    folder: Path, bad_files: Path, monkeypatch, arguments: list[str], message: str
):
    monkeypatch.chdir(bad_files)
    before = sorted(Path().iterdir())
    if arguments[0] != "info" and "--model" not in arguments:
        arguments = [*arguments, "--model", str(folder)]
    refused = run(*arguments)
    assert refused.exit_code == 2, refused.output
    lines = refused.stderr.strip().splitlines()
    assert lines[-1].startswith("mars-hf: ") and message in lines[-1]
    assert not [line for line in lines[:-1] if "Traceback" in line] and not refused.stdout
    assert sorted(Path().iterdir()) == before


def test_debug_shows_the_trace(folder: Path, tmp_path: Path):
    refused = run("generate", "", "--out", tmp_path / "a.png", "--model", folder, "--debug")
    assert isinstance(refused.exception, ValueError) and "prompt is empty" in str(refused.exception)


def test_a_failing_machine_is_another_exit_code(folder: Path, tmp_path: Path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of memory:\ntried to allocate")

    monkeypatch.setattr(Studio, "open", fail)
    failed = run("generate", "a", "--out", tmp_path / "a.png", "--model", folder)
    assert failed.exit_code == 1 and failed.stderr == "mars-hf: out of memory: tried to allocate\n"


@pytest.mark.parametrize("text", ["تفاحة حمراء", "תפוח", "🍎👩🏽\u200d🚀", "सेब", "a\nb", "苹果", "\u202eelppa"])
def test_every_script_is_a_prompt(text: str):
    assert check_prompt(text) == text


# ---- caption, story


def test_pictures_are_captioned_as_generate_captions_them(folder: Path, tmp_path: Path, tiny_model, tiny_processor):
    files = []
    for color in ("red", "blue"):
        files.append(tmp_path / f"{color}.png")
        Image.new("RGB", (20, 24), color).save(files[-1])
    expected = []
    for file in files:
        inputs = tiny_processor(images=Image.open(file))
        written = tiny_model.generate(**inputs, generation_mode="text", max_new_tokens=9, do_sample=False)
        (text,) = tiny_processor.post_process_image_text_to_text(written[:, inputs["input_ids"].shape[1] :])
        expected.append(text.strip())
    options = ["--model", folder, "--max-new-tokens", 9]
    done = run("caption", *files, *options, "--json")
    assert done.exit_code == 0, done.output
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said == [{"picture": str(f), "caption": text} for f, text in zip(files, expected, strict=True)]
    plain = run("caption", files[0], *options)
    assert plain.stdout == f"{files[0]}: {expected[0]}\n"


@pytest.fixture
def storyteller(folder: Path, tiny_model) -> Path:
    """The checkpoint, made to begin pictures often."""
    with torch.no_grad():
        tiny_model.vision_head.weight[
            tiny_model.config.image_start_token_id - tiny_model.config.image_token_offset
        ] *= 4
    tiny_model.save_pretrained(folder)
    return folder


def test_a_story_has_its_title_its_texts_and_its_pictures(storyteller: Path, tmp_path: Path):
    page, text = tmp_path / "story.html", tmp_path / "story.md"
    options = ["--model", storyteller, "--max-new-tokens", 80, "--seed", 1]
    told = run("story", "Apples <b>& pears", "--out", page, *options, "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    count = found["segments"].count(None)
    assert count >= 1 and found["segments"][0] == "Apples <b>& pears\n" and found["files"] == [str(page)]
    written = page.read_text()
    assert written.count("data:image/png;base64,") == count and "<b>" not in written.split("<body>")[1]
    assert "Apples &lt;b&gt;&amp; pears</h1>" in written
    assert run("story", "Apples <b>& pears", "--out", text, *options).stdout.splitlines() == [
        str(text), *(str(tmp_path / f"story-{number}.png") for number in range(1, count + 1))
    ]  # fmt: skip
    assert text.read_text().startswith("# Apples &lt;b&gt;&amp; pears\n")
    for number in range(1, count + 1):
        assert f"![](story-{number}.png)" in text.read_text()
        assert Image.open(tmp_path / f"story-{number}.png").size == (SIDE, SIDE)


def test_markup_that_a_model_writes_is_shown_and_not_obeyed(tmp_path: Path):
    hostile = "Title\n<script>alert(1)</script>\n![x](https://example.org/x.png) [a](javascript:b)\n# `c` {0}"
    files = write_document([hostile, Image.new("RGB", (4, 4))], tmp_path / "a b.md")
    text = files[0].read_text()
    assert "<script" not in text and not re.search(r"(?<!\\)[\[`*]", text.replace("![](a%20b-1.png)", ""))
    assert files[1].name == "a b-1.png"
    lines = as_markdown(["Title\n- a\n---\n+ b\n===\n1. c\n12) d\n1.5 e"], []).split("\n\n")[1:]
    assert lines == ["\\- a", "\\---", "\\+ b", "\\===", "1\\. c", "12\\) d", "1\\.5 e\n"]
    page = write_document([hostile], tmp_path / "a.html")[0].read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "{0}" in page


# ---- info, help


def test_info_agrees_with_the_loaded_model_and_the_tokenizer(folder: Path, tiny_model, tiny_processor):
    done = run("info", folder, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    parameters = {name: p for name, p in tiny_model.named_parameters()}
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    in_vqgan = sum(p.numel() for p in tiny_model.vqgan.parameters())
    parts = found["parts"]
    assert parts["visual"]["parameters"] == trained and parts["visual"]["trains"]
    assert parts["vqgan"]["parameters"] == in_vqgan and not parts["vqgan"]["trains"]
    assert parts["text"]["parameters"] == sum(p.numel() for p in parameters.values()) - trained - in_vqgan
    assert sum(part["stored_bytes"] for part in parts.values()) == 4 * sum(p.numel() for p in parameters.values())
    name_of = tiny_processor.tokenizer.convert_ids_to_tokens
    ids = found["vocabulary"]
    assert name_of(ids["codes"][0]) == "<code_0>" and name_of(ids["specials"]) == ["<img>", "<imgpad>"]
    assert ids["text"] == [0, ids["codes"][0] - 1] and len(tiny_processor.tokenizer) == ids["padding"][1] + 1
    layer = tiny_model.model.layers[0].self_attn
    cache = 2 * 2 * 2 * layer.k_proj.out_features * 4 * (64 + 16)  # keys and values, 2 layers, 2 rows of float32
    assert found["memory"]["cache_bytes"] == cache and found["sha256"] == fingerprint(folder)


def test_info_counts_the_base_that_a_checkpoint_is_stored_against(folder: Path, tmp_path: Path):
    difference = tmp_path / "difference"
    shutil.copytree(folder, difference)
    tensors = load_file(folder / "model.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if "visual_" in name or "vision_head" in name}
    save_file(own, difference / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["base_checkpoint"] = {"path": "../tiny", "sha256": "0" * 64}
    (difference / "config.json").write_text(json.dumps(config))
    whole, told = (json.loads(run("info", one, "--json").stdout) for one in (folder, difference))
    assert told["parts"] == whole["parts"] and told["base_checkpoint"]["path"] == "../tiny"
    shutil.rmtree(folder)
    refused = run("info", difference)
    assert refused.exit_code == 2 and "stored against the weights at ../tiny, but there are none" in refused.stderr


def test_info_tells_what_else_the_embedded_checkpoint_holds(folder: Path):
    weights = {"super_resolution": "model.safetensors", "documents": "adapter_model.safetensors"}
    stored = {name: (DEFAULT_CHECKPOINT / name / file).stat().st_size for name, file in weights.items()}
    assert json.loads(run("info", "--json").stdout)["carries"] == stored
    assert "an adapter for documents" in run("info").stdout and "documents" not in run("info", folder).stdout


def test_info_reads_well_and_loads_no_weights(folder: Path, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load_file", None)
    monkeypatch.setattr("mars_hf.MarsForConditionalGeneration.from_pretrained", None)
    done = run("info")
    assert done.exit_code == 0, done.output
    assert str(DEFAULT_CHECKPOINT) in done.stdout and "VQ-GAN" in done.stdout and "frozen" in done.stdout
    assert "64 x 64 by default, multiples of 8; 64 codes, 1 a step, in raster order" in done.stdout


DRAWING = ["generate", "upscale", "caption", "story", "info", "demo"]
DATA = [f"data {name}" for name in ("emoji", "encode", "canvases", "stories", "build")]


@pytest.mark.parametrize(
    "command", [*DRAWING, *DATA, "export", "convert", "train", "evaluate", "study make", "study tally"]
)
def test_help_has_examples_and_exit_codes(command: str):
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", run(*command.split(), "--help").stdout).split())
    assert f"mars-hf {command}" in said.split("Examples:")[1] and "130 interrupted" in said


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, tmp_path: Path):
    monkeypatch.delitem(sys.modules, "mars_hf.training.run", raising=False)
    monkeypatch.delitem(sys.modules, "mars_hf.training.trainer", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate.utils", None)
    done = run("train", "emoji/stage1", "--out", tmp_path / "run")
    assert done.exit_code == 1 and "accelerate" in done.stderr and done.stderr.endswith("'mars_hf[train]'\n")


def test_a_recipe_of_the_package_is_printed_to_be_copied(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(run("train", "emoji/stage2", "--show").stdout, encoding="utf-8")
    assert Recipe.load(tmp_path / "mine.yaml") == Recipe.load("emoji/stage2")


def test_a_drawing_that_is_cancelled_before_it_begins_stops_after_a_step(tiny_model, tiny_processor):
    streamer = ImageIteratorStreamer(tiny_model.vqgan)
    streamer.cancel()
    assert Studio(tiny_model, tiny_processor).drawer().draw(["a"], [0], streamer) == []
    assert list(streamer) == []


@pytest.mark.integration
def test_help_is_instant() -> None:
    code = "import time; t = time.perf_counter()\nfrom mars_hf.cli import app\n"
    code += "try: app(['--help'], prog_name='mars-hf')\nexcept SystemExit: print(time.perf_counter() - t)"
    took = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()[-1])
        for _ in range(3)
    ]
    assert min(took) < 0.3
