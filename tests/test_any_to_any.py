"""The any-to-any pipeline: as transformers' own where that one goes, and documents beyond it."""

import base64
from io import BytesIO

import pytest
import torch
from PIL import Image, ImageChops
from transformers.pipelines import any_to_any

from mars_hf import MarsAnyToAnyPipeline, MarsPipeline

RED = Image.new("RGB", (16, 16), "red")
QUESTION = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What <img>?"}]}]
PREFIX = [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
GREEDY = {"max_new_tokens": 6}  # the tiny model takes the likeliest token unless told otherwise


@pytest.fixture
def pipe(tiny_model, tiny_processor) -> MarsAnyToAnyPipeline:
    return MarsAnyToAnyPipeline(model=tiny_model, processor=tiny_processor)


@pytest.fixture
def stock(tiny_model, tiny_processor, monkeypatch) -> any_to_any.AnyToAnyPipeline:
    """transformers' own pipeline, but for its demand of torchvision."""
    monkeypatch.setattr(any_to_any, "requires_backends", lambda *_: None)
    return any_to_any.AnyToAnyPipeline(model=tiny_model, processor=tiny_processor)


@pytest.fixture
def drawing(tiny_model) -> dict:
    """Arguments with which the random model begins a picture wherever one fits."""
    start = [[tiny_model.config.image_start_token_id], 100.0]
    sizes = {"height": 16, "width": 16, "max_new_tokens": 40}
    return {"generation_mode": "interleaved", "generate_kwargs": {"sequence_bias": [start]}, **sizes}


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


# As transformers' own


@pytest.mark.parametrize("return_full_text", [None, True, False])
@pytest.mark.parametrize(
    "inputs", [("ab",), ("What?", RED), ("<imgpad> or <imgpad>?", [RED, RED]), (QUESTION,), (PREFIX,)]
)
def test_an_answer_is_the_stock_pipelines(pipe, stock, inputs, return_full_text) -> None:
    options = GREEDY if return_full_text is None else {**GREEDY, "return_full_text": return_full_text}
    text, *images = inputs
    pictures = {"images": images[0]} if images else {}
    assert pipe(text, **pictures, **options) == stock(text, **pictures, **options)


def test_tokens_are_the_stock_pipelines(pipe, stock) -> None:
    (ours,), (theirs,) = (one("ab", RED, return_tensors=True, **GREEDY) for one in (pipe, stock))
    assert torch.equal(ours["generated_token_ids"], theirs["generated_token_ids"])
    assert ours.keys() == theirs.keys()


def test_pictures_of_a_chat_in_openais_form_are_read(pipe) -> None:
    buffer = BytesIO()
    RED.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What <img>?"}]
    asked = pipe.processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=True, return_dict=True)
    own = pipe.processor.apply_chat_template(QUESTION, tokenize=True, return_dict=True)
    assert asked.keys() == own.keys() and all(torch.equal(asked[name], own[name]) for name in own)


def test_several_chats_are_answered_as_the_stock_pipeline_does(pipe, stock) -> None:
    assert pipe([QUESTION, PREFIX], **GREEDY) == stock([QUESTION, PREFIX], **GREEDY)


def test_a_drawing_is_the_stock_pipelines_and_text_to_images(pipe, stock, tiny_model, tiny_processor) -> None:
    size = {"height": 16, "width": 16}
    (ours,) = pipe("ab", generation_mode="image", **size)
    (theirs,) = stock("ab", generation_mode="image", **size)
    assert ours.keys() == theirs.keys() and ours["input_text"] == theirs["input_text"] == "ab"
    assert same(ours["generated_image"], theirs["generated_image"])

    draw = MarsPipeline(model=tiny_model, processor=tiny_processor)
    options = {
        "guidance_scale": 3.0,
        "do_sample": True,
        "seed": 3,
        "negative_prompt": "blue",
        "height": 8,
        "width": 24,
    }
    expected = draw("ab", num_images_per_prompt=2, **options)
    found = pipe("ab", generation_mode="image", num_return_sequences=2, **options)
    assert len(found) == 2
    assert all(same(a["generated_image"], b["generated_image"]) for a, b in zip(found, expected, strict=True))


def test_the_stock_limit_of_256_tokens_holds_for_text_unless_another_is_set(pipe, make_model, tiny_processor) -> None:
    assert pipe("ab", return_tensors=True, max_new_tokens=3)[0]["generated_token_ids"].shape == (2 + 3,)
    text = {"vocab_size": 264, "eos_token_id": None, "pad_token_id": 256, "max_position_embeddings": 512}
    endless = MarsAnyToAnyPipeline(model=make_model(text=text), processor=tiny_processor)
    endless.model.generation_config.eos_token_id = None
    assert endless("ab", return_tensors=True)[0]["generated_token_ids"].shape == (2 + 256,)
    endless.model.generation_config.max_new_tokens = 4
    assert endless("ab", return_tensors=True)[0]["generated_token_ids"].shape == (2 + 4,)


# Inputs


def test_several_inputs_give_a_list_for_each_in_whatever_form_they_come(pipe) -> None:
    alone = [pipe("ab", **GREEDY), pipe("What?", RED, **GREEDY), pipe(images=RED, **GREEDY), pipe(QUESTION, **GREEDY)]
    forms = ["ab", {"text": "What?", "images": RED}, {"images": [RED]}, {"text": QUESTION}]
    assert pipe(forms, **GREEDY) == alone
    assert pipe(tuple(forms), **GREEDY) == alone
    assert list(pipe((form for form in forms), **GREEDY)) == alone
    assert pipe(["What?", "What?"], [RED, [RED]], **GREEDY) == [alone[1], alone[1]]
    assert pipe(images=[RED, RED], **GREEDY) == [alone[2], alone[2]]


def test_a_batch_answers_each_input_as_it_is_answered_alone(pipe, tiny_model, drawing) -> None:
    tiny_model.double()
    blue = Image.new("RGB", (16, 16), "blue")
    prompts = [{"text": "ab"}, {"text": "What is it?", "images": blue}, {"images": RED}]
    assert pipe(prompts, batch_size=2, **GREEDY) == [pipe(prompt, **GREEDY) for prompt in prompts]
    chats = [QUESTION, [{"role": "user", "content": "a"}], [{"role": "user", "content": "a longer one"}]]
    assert pipe(chats, batch_size=3, **GREEDY) == [pipe(chat, **GREEDY) for chat in chats]
    for found, chat in zip(pipe(chats, batch_size=3, **drawing), chats, strict=True):
        answer, alone = (one["generated_interleaved"][-1]["content"] for one in (found[0], pipe(chat, **drawing)[0]))
        assert [part["type"] for part in answer] == [part["type"] for part in alone]
        pairs = [(a["image"], b["image"]) for a, b in zip(answer, alone, strict=True) if a["type"] == "image"]
        assert len(pairs) == 2 and all(same(*pair) for pair in pairs)


def test_a_chat_draws_what_its_only_message_says(pipe) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "ab"}]}]
    (found,), (expected,) = (pipe(inputs, generation_mode="image") for inputs in (chat, "ab"))
    assert found["input_text"] == chat and same(found["generated_image"], expected["generated_image"])


# Documents


def test_a_document_holds_what_generate_wrote_and_drew(pipe, tiny_model, tiny_processor, drawing) -> None:
    (found,) = pipe("ab", RED, **drawing)
    options = {"generation_mode": "interleaved", "max_new_tokens": 40, **drawing["generate_kwargs"]}
    inputs = tiny_processor("ab", RED, height=16, width=16, generation_mode="interleaved")
    sequences = tiny_model.generate(**inputs, **options)
    pixels = tiny_model.decode_image_tokens(sequences, inputs["image_sizes"])
    (expected,) = tiny_processor.post_process_multimodal_output(
        sequences, generation_mode="interleaved", pixel_values=pixels, prompt_length=inputs["input_ids"].shape[1]
    )
    picture, text, *rest = found["generated_interleaved"]
    assert found["input_text"] == "ab" and picture is RED and text.startswith("\nab")
    (alone,) = pipe("ab", RED, return_full_text=False, **drawing)
    for content in (alone["generated_interleaved"], [part for part in [text.removeprefix("\nab"), *rest] if part]):
        assert len(content) == len(expected) and sum(isinstance(part, Image.Image) for part in content) == 2
        for part, wanted in zip(content, expected, strict=True):
            assert part == wanted if isinstance(wanted, str) else same(part, wanted)


def test_a_chat_is_answered_with_pictures_and_goes_on_with_them(pipe, drawing) -> None:
    (first,) = pipe(QUESTION, **drawing)
    chat = first["generated_interleaved"]
    assert chat[:-1] == QUESTION and chat[-1]["role"] == "assistant"
    kinds = [part["type"] for part in chat[-1]["content"]]
    assert kinds.count("image") == 2 and all(part.keys() == {"type", part["type"]} for part in chat[-1]["content"])
    (second,) = pipe([*chat, {"role": "user", "content": "And?"}], **GREEDY)
    assert second["generated_text"][-2]["content"] == "And?"


def test_a_document_goes_on_with_the_assistants_message(pipe, drawing) -> None:
    (found,) = pipe(PREFIX, **drawing)
    chat = found["generated_interleaved"]
    assert len(chat) == len(PREFIX) and chat[-1]["content"][0]["text"].startswith("It is")
    (text,) = pipe([{"role": "assistant", "content": "It is"}], **GREEDY)
    assert text["generated_text"][-1]["content"].startswith("It is")


# Chance


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_a_seed_decides_and_leaves_the_chance_of_others_alone(pipe, mode) -> None:
    options = {"generation_mode": mode, "do_sample": True, "return_tensors": True}
    options |= {} if mode == "image" else {"max_new_tokens": 20}

    def write(**chance) -> list[int]:
        return pipe("ab", **options, **chance)[0]["generated_token_ids"].tolist()

    state = torch.get_rng_state()
    one = write(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert write(seed=1) == one != write(seed=2)


# Refusals


@pytest.mark.parametrize(
    ("inputs", "arguments", "error", "message"),
    [
        ({}, {}, ValueError, "got neither"),
        ({"text": []}, {}, ValueError, "got an empty list"),
        ({"text": ""}, {}, ValueError, "must have a text or pictures"),
        ({"text": [7]}, {}, ValueError, "got int: 7"),
        ({"text": {"prompt": "a"}}, {}, ValueError, "a dictionary with `text` and `images`"),
        ({"text": QUESTION, "images": RED}, {}, ValueError, "A chat carries its pictures"),
        ({"text": ["a", "b"], "images": [RED]}, {}, ValueError, "got 2 texts and pictures for 1"),
        ({"text": "a", "videos": "x.mp4"}, {}, ValueError, "got `videos`"),
        ({"text": "a"}, {"generation_mode": "audio"}, ValueError, "must be 'text', 'image' or 'interleaved'"),
        ({"text": "a", "images": RED}, {"generation_mode": "image"}, ValueError, "draws a caption"),
        ({"text": PREFIX}, {"generation_mode": "image"}, ValueError, "draws a caption"),
        ({"text": "a"}, {"generation_mode": "image", "return_full_text": True}, ValueError, "`return_full_text`"),
        ({"text": "a"}, {"return_tensors": True, "return_full_text": True}, ValueError, "`return_full_text`"),
        ({"text": "a"}, {"height": 16, "width": 16}, ValueError, "`height` belongs to pictures"),
        ({"text": "a"}, {"guidance_scale": 3.0}, ValueError, "`guidance_scale` belongs to"),
        ({"text": "a"}, {"hight": 16}, TypeError, "takes no argument `hight`"),
        ({"text": "a"}, {"max_new_tokens": 3, "generate_kwargs": {"max_new_tokens": 3}}, ValueError, "given twice"),
        ({"text": "a"}, {"seed": 1, "generator": torch.Generator()}, ValueError, "both given"),
        ({"text": [QUESTION, PREFIX]}, {"batch_size": 2}, ValueError, "this one mixes them"),
        ({"text": ["a", {"text": QUESTION}]}, {"batch_size": 2}, ValueError, "this one mixes them"),
    ],
)
def test_what_cannot_be_answered_is_refused(pipe, inputs, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        pipe(**inputs, **arguments)
