"""The text-to-image pipeline: which pictures belong to which prompt, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from mars_hf import MarsPipeline

PROMPTS = ["a red apple", "红苹果，twemoji 风格"]


@pytest.fixture
def pipe(tiny_model, tiny_processor) -> MarsPipeline:
    return MarsPipeline(model=tiny_model, processor=tiny_processor)


@pytest.fixture
def call(tiny_model) -> dict:
    side = tiny_model.config.downsample_factor * 2
    return {"height": side, "width": 3 * side, "guidance_scale": 3.0, "do_sample": True, "seed": 1}


def bytes_of(drawn: list[dict]) -> list[bytes]:
    assert all(picture.keys() == {"generated_image"} for picture in drawn)
    return [picture["generated_image"].tobytes() for picture in drawn]


def test_a_prompt_gives_its_pictures_and_a_list_gives_a_list_of_them(pipe, call) -> None:
    one = pipe(PROMPTS[0], num_images_per_prompt=3, **call)
    both = pipe(PROMPTS, num_images_per_prompt=3, **call)
    assert len(one) == 3 and [len(pictures) for pictures in both] == [3, 3]
    assert one[0]["generated_image"].size == (call["width"], call["height"])
    assert len(set(bytes_of(one))) == 3
    assert bytes_of(both[0]) == bytes_of(one)
    assert bytes_of(both[1]) == bytes_of(pipe(PROMPTS[1], num_images_per_prompt=3, **call))


def test_a_batch_gives_each_prompt_the_pictures_that_it_gets_alone(pipe, tiny_model, call) -> None:
    tiny_model.double()
    greedy = {**call, "do_sample": False}
    prompts = [*PROMPTS, "x"]
    together = pipe(prompts, batch_size=2, **greedy)
    assert [bytes_of(pictures) for pictures in together] == [bytes_of(pipe(prompt, **greedy)) for prompt in prompts]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_many_pictures_of_a_batch_stay_with_their_prompt(pipe, tiny_model, call, batch_size) -> None:
    # Codes are likeliest by far to be those of one prompt or the other, so that sampling cannot hide a mix-up.
    drawn = pipe(PROMPTS, num_images_per_prompt=2, batch_size=batch_size, generate_kwargs={"top_k": 1}, **call)
    assert [len(pictures) for pictures in drawn] == [2, 2]
    for pictures in drawn:
        assert len(set(bytes_of(pictures))) == 1


def test_prompts_may_come_as_a_tuple_or_one_by_one(pipe, call) -> None:
    expected = [bytes_of(pictures) for pictures in pipe(PROMPTS, **call)]
    assert [bytes_of(pictures) for pictures in pipe(tuple(PROMPTS), **call)] == expected
    assert [bytes_of(pictures) for pictures in pipe((prompt for prompt in PROMPTS), **call)] == expected


def test_sizes_and_arguments_have_the_checkpoints_defaults(pipe, tiny_model) -> None:
    (drawn,) = pipe("a red apple", height=tiny_model.config.downsample_factor)
    size = (tiny_model.config.default_image_size, tiny_model.config.downsample_factor)
    assert drawn["generated_image"].size == size


def test_arguments_given_at_construction_hold_until_a_call_says_otherwise(tiny_model, tiny_processor, call) -> None:
    pipe = MarsPipeline(model=tiny_model, processor=tiny_processor, **call)
    assert bytes_of(pipe(PROMPTS[0])) == bytes_of(pipe(PROMPTS[0], **call))
    assert bytes_of(pipe(PROMPTS[0], seed=2)) != bytes_of(pipe(PROMPTS[0]))


def test_a_generator_goes_on_where_a_seed_starts_again(pipe, call) -> None:
    del call["seed"]
    seeded = pipe([PROMPTS[0]] * 2, seed=1, **call)
    assert bytes_of(seeded[0]) == bytes_of(seeded[1])
    drawn = pipe([PROMPTS[0]] * 2, generator=torch.Generator().manual_seed(1), **call)
    assert bytes_of(drawn[0]) == bytes_of(seeded[0]) != bytes_of(drawn[1])


def test_a_negative_prompt_changes_the_picture(pipe, tiny_model, call) -> None:
    for parameter in tiny_model.parameters():  # the tiny model hardly listens to its prompt otherwise
        parameter.data *= 4
    plain = np.asarray(pipe(PROMPTS[0], **call)[0]["generated_image"])
    led_away = np.asarray(pipe(PROMPTS[0], negative_prompt="blue", **call)[0]["generated_image"])
    assert (plain != led_away).any()


@pytest.mark.parametrize(
    ("inputs", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "got an empty list"),
        ((), {}, ValueError, "got an empty list"),
        (7, {}, ValueError, "must be a string, got int: 7"),
        (["a", None], {}, ValueError, "must be a string, got NoneType"),
        ("a", {"num_images_per_prompt": 2, "generate_kwargs": {"num_return_sequences": 2}}, ValueError, "twice"),
        ("a", {"num_images_per_prompt": 0}, ValueError, "`num_images_per_prompt` must be 1 or more, got 0"),
        ("a", {"top_k": 3, "generate_kwargs": {"top_k": 4}}, ValueError, "`top_k` is given twice"),
        ("a", {"seed": 1, "generator": torch.Generator()}, ValueError, "`seed` and `generator` are both given"),
        ("a", {"hight": 64}, TypeError, "takes no argument `hight`"),
        ("a", {"height": 3}, ValueError, "3"),
        ("a", {"guidance_scale": -1.0}, ValueError, "guidance_scale"),
    ],
)
def test_what_cannot_be_drawn_is_refused(pipe, inputs, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        pipe(inputs, **arguments)


def test_the_stock_image_text_to_text_pipeline_reads_a_chat_with_a_picture(tiny_model, tiny_processor) -> None:
    from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline

    picture = Image.new("RGB", (16, 16), "red")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What <img>?"}]
    chat = [{"role": "user", "content": content}]
    stock = ImageTextToTextPipeline(model=tiny_model, processor=tiny_processor)
    said = stock(text=chat, max_new_tokens=5, do_sample=False)[0]["generated_text"][-1]["content"]

    inputs = tiny_processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    ids = tiny_model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert said == tiny_processor.tokenizer.decode(ids[0], skip_special_tokens=True)


def test_the_stock_text_generation_pipeline_writes(tiny_model, tiny_processor) -> None:
    from transformers import TextGenerationPipeline

    stock = TextGenerationPipeline(model=tiny_model, tokenizer=tiny_processor.tokenizer)
    said = stock("ab", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    ids = tiny_model.generate(torch.tensor([tiny_processor.tokenizer("ab")["input_ids"]]), max_new_tokens=5)
    assert said == tiny_processor.tokenizer.decode(ids[0], skip_special_tokens=True)
