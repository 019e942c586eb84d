"""The checkpoint that travels with the package: that it is whole, small, and draws what it is asked for."""

import json

import numpy as np
import pytest
import torch

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration, MarsPipeline, MarsProcessor

LARGEST_SIZE = 40 * 2**20


@pytest.fixture(scope="module")
def pipe() -> MarsPipeline:
    model = MarsForConditionalGeneration.from_pretrained(DEFAULT_CHECKPOINT)
    return MarsPipeline(model=model, processor=MarsProcessor.from_pretrained(DEFAULT_CHECKPOINT))


def test_it_is_within_its_size_and_holds_no_code() -> None:
    files = list(DEFAULT_CHECKPOINT.iterdir())
    assert sum(path.stat().st_size for path in files) <= LARGEST_SIZE
    assert not [path.name for path in files if path.suffix in (".py", ".bin", ".pt", ".pkl")]
    config = json.loads((DEFAULT_CHECKPOINT / "config.json").read_text())
    assert "auto_map" not in config and "_name_or_path" not in config["text_config"]  # no code, no one's folders
    assert config["use_cache"] and config["text_config"]["use_cache"]


def test_it_computes_in_float32_from_weights_stored_in_half_the_size(pipe) -> None:
    assert pipe.model.dtype == torch.float32
    assert json.loads((DEFAULT_CHECKPOINT / "config.json").read_text())["dtype"] == "float32"
    rounded = (parameter for parameter in pipe.model.parameters())
    assert all(torch.equal(parameter, parameter.bfloat16().float()) for parameter in rounded)


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
