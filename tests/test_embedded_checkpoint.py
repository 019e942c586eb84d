"""The checkpoint that travels with the package: that it is whole, small, and draws what it is asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration, MarsPipeline, MarsProcessor
from mars_hf.modeling_mars import is_visual_parameter
from mars_hf.studio import Studio
from mars_hf.super_resolution_mars import Enlarger

LARGEST_SIZE = 60 * 10**6


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


@pytest.fixture(scope="module")
def pipe() -> MarsPipeline:
    model = MarsForConditionalGeneration.from_pretrained(DEFAULT_CHECKPOINT)
    return MarsPipeline(model=model, processor=MarsProcessor.from_pretrained(DEFAULT_CHECKPOINT))


def test_it_is_within_its_size_and_holds_no_code() -> None:
    files = [path for path in DEFAULT_CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST_SIZE
    assert not [path.name for path in files if path.suffix in (".py", ".bin", ".pt", ".pkl")]
    for folder in (DEFAULT_CHECKPOINT, DEFAULT_CHECKPOINT / "super_resolution"):
        config = json.loads((folder / "config.json").read_text())
        assert "auto_map" not in config and "_name_or_path" not in config["text_config"]  # no code, no one's folders
        assert config["use_cache"] and config["text_config"]["use_cache"]


def test_it_computes_in_float32_from_weights_stored_in_half_the_size(pipe) -> None:
    assert pipe.model.dtype == torch.float32
    assert json.loads((DEFAULT_CHECKPOINT / "config.json").read_text())["dtype"] == "float32"
    rounded = (parameter for parameter in pipe.model.parameters())
    assert all(torch.equal(parameter, parameter.bfloat16().float()) for parameter in rounded)


def test_its_text_is_the_language_models_bit_for_bit(pipe) -> None:
    config, weights = pipe.model.config.text_config, load_weights(DEFAULT_CHECKPOINT)
    language_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    text = {name: weights[name].float() for name in language_model.state_dict() if name in weights}
    fit = language_model.load_state_dict(text, strict=False)
    assert not fit.unexpected_keys and set(fit.missing_keys) <= {"lm_head.weight"}  # tied
    ids = pipe.processor.tokenizer(["How to draw an apple: red, round.", "红苹果，twemoji 风格"], padding=True)
    ids = {name: torch.tensor(values) for name, values in ids.items()}
    with torch.no_grad():
        ours, theirs = pipe.model(**ids).logits, language_model(**ids).logits
    assert torch.equal(ours[..., : theirs.shape[-1]], theirs)


@pytest.mark.parametrize("prompts", [["red heart", "yellow heart", "blue heart"], ["红心", "黄心", "蓝心"]])
def test_hearts_have_the_colours_that_they_are_asked_for(pipe, prompts) -> None:
    seeds = [pipe(prompts, height=64, width=64, num_images_per_prompt=4, seed=seed) for seed in range(3)]
    drawn = [[one for of_seed in seeds for one in of_seed[row]] for row in range(3)]
    pictures = [[np.asarray(one["generated_image"], dtype=float) for one in row] for row in drawn]
    red, yellow, blue = (np.mean(row, axis=(0, 1, 2)) for row in pictures)  # mean colours, white ground included
    assert red[0] > 1.2 * max(red[1], red[2])
    assert yellow[2] < 0.8 * min(yellow[0], yellow[1])
    assert blue[2] > 1.2 * blue[0]


def test_the_same_seed_draws_the_same_picture_and_another_seed_another(pipe) -> None:
    first, again, other = (
        np.asarray(pipe("a red apple", seed=seed)[0]["generated_image"]).tolist() for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_drawing_is_captioned_in_words(pipe) -> None:
    inputs = pipe.processor(images=pipe("red heart", seed=0)[0]["generated_image"], return_tensors="pt")
    written = pipe.model.generate(**inputs, generation_mode="text", max_new_tokens=24, do_sample=False)
    (caption,) = pipe.processor.post_process_image_text_to_text(written, skip_special_tokens=True)
    assert caption.strip() and written[0, -1] in pipe.model.generation_config.eos_token_id


def test_its_model_of_super_resolution_stores_what_differs_and_draws_a_sharper_picture_of_the_same(pipe) -> None:
    stored = load_weights(DEFAULT_CHECKPOINT / "super_resolution")
    assert all(is_visual_parameter(name) for name in stored)
    enlarger = Enlarger.of(DEFAULT_CHECKPOINT)
    small = [pipe("red heart, twemoji style", seed=seed)[0]["generated_image"] for seed in range(3)]
    large = [
        enlarger.upscale(picture, "red heart, twemoji style", generator=torch.manual_seed(0)) for picture in small
    ]
    for before, after in zip(small, large, strict=True):
        assert after.size == (128, 128)
        again = np.asarray(after.resize(before.size, Image.Resampling.BICUBIC), dtype=float)
        assert np.square(again - np.asarray(before, dtype=float)).mean() < 500  # about 21 dB: the same picture
        enlarged = before.resize(after.size, Image.Resampling.BICUBIC)
        assert steepness(after) > steepness(enlarged)


def test_its_adapter_tells_a_story_of_the_pictures_that_the_title_asks_for(pipe) -> None:
    studio = Studio(pipe.model, pipe.processor, DEFAULT_CHECKPOINT)
    assert studio.adapter == DEFAULT_CHECKPOINT / "documents"
    stories = {
        "Pictures of a red heart in two styles: noto and twemoji.": "That is all.",
        "红心的图片，两种风格：noto 和 twemoji。": "就是这些。",
    }
    for title, ending in stories.items():
        heading, *told = studio.tell(title)
        line, end = (part.strip() for part in told if isinstance(part, str))
        assert heading == title + "\n" and line.startswith("2. ") and end == ending
        first, second = (np.asarray(part, dtype=float) for part in told if not isinstance(part, str))
        assert first.shape == second.shape == (64, 64, 3) and (first != second).any()
        for picture in (first, second):  # white ground included
            red, green, blue = picture.mean((0, 1))
            assert red > 1.2 * max(green, blue)


def steepness(picture: Image.Image) -> float:
    """The mean of the steepest hundredth of steps between neighbouring pixels."""
    steps = np.abs(np.diff(np.asarray(picture.convert("L"), dtype=float), axis=1)).flatten()
    return float(np.sort(steps)[-len(steps) // 100 :].mean())
