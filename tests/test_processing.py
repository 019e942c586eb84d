"""
Prompt to ids, picture to pixels to picture, batches, padding, labels and refusals, on a tiny vocabulary: 320 text ids,
32 codes of 2 x 2 pixels, six specials and 2 ids of padding.
"""

import base64
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2Tokenizer

from mars_hf.configuration_mars import SPECIAL_TOKENS, MarsConfig
from mars_hf.image_processing_mars import MarsImageProcessorPil, decode_codes, encode_pixels
from mars_hf.processing_mars import MarsProcessor
from mars_hf.prompts_mars import null_prompt_ids, prompt_ids, text_ids

TYPED_SPECIALS = [*SPECIAL_TOKENS, "<code_5>", "<unused_319>", "<pad_1>", "<|im_end|>", "<|endoftext|>"]
IMG, END_IMG, NULL, IMGPAD = 352, 353, 356, 357  # 320 text ids, then 32 codes, then the six specials


@pytest.fixture(scope="module")
def text_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    untrained = Qwen2Tokenizer(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[])
    sentences = ["a red apple 64x64", "a green apple", "红苹果", "user assistant system"] * 4
    return untrained.train_new_from_iterator(
        sentences, 300, new_special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )


@pytest.fixture(scope="module")
def vqgan():
    torch.manual_seed(0)
    return VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=32,
    ).eval()


@pytest.fixture(scope="module")
def config():
    text = Qwen2Config(vocab_size=320, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    text.max_position_embeddings = 200
    return MarsConfig(text_config=text, codebook_size=32, downsample_factor=2, default_image_size=4)


@pytest.fixture
def processor(text_tokenizer, config):
    return MarsProcessor.from_text_tokenizer(text_tokenizer, config, image_processor=_pil(size=4))


@pytest.fixture
def coding_processor(processor, vqgan):
    processor.image_tokenizer = vqgan
    return processor


def _pil(**kwargs):
    return MarsImageProcessorPil(downsample_factor=2, **kwargs)


def _picture(height=4, width=4, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _file(picture, file_format="PNG", **kwargs):
    stream = BytesIO()
    picture.save(stream, file_format, **kwargs)
    return stream.getvalue()


# ---- vocabulary


def test_ids_and_tokens_are_inverse_for_every_id(processor, config):
    ids = list(range(config.vocab_size))
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    assert processor.tokenizer.convert_tokens_to_ids(tokens) == ids
    assert len(processor.tokenizer) == config.vocab_size == 360
    assert tokens[319:322] == ["<unused_319>", "<code_0>", "<code_1>"]
    assert tokens[351:] == ["<code_31>", *SPECIAL_TOKENS, "<pad_0>", "<pad_1>"]


def test_extending_leaves_the_text_tokenizer_alone(text_tokenizer, processor):
    assert len(text_tokenizer) < 320
    assert text_ids(text_tokenizer, "a red apple") == text_ids(processor.tokenizer, "a red apple")


def test_a_tokenizer_of_another_language_model_is_refused(text_tokenizer):
    small = MarsConfig(text_config={"vocab_size": 200, "model_type": "qwen2"}, codebook_size=32)
    with pytest.raises(ValueError, match="vocab_size` is 200"):
        MarsProcessor.from_text_tokenizer(text_tokenizer, small)


def test_a_tokenizer_with_a_name_of_ours_is_refused(processor, config):
    with pytest.raises(ValueError, match="320"):
        MarsProcessor.from_text_tokenizer(processor.tokenizer, config)
    with pytest.raises(ValueError, match="in the way"):
        text = Qwen2Config(vocab_size=400)
        MarsProcessor.from_text_tokenizer(processor.tokenizer, MarsConfig(text_config=text))


def test_a_bare_text_tokenizer_is_refused(text_tokenizer):
    with pytest.raises(ValueError, match="from_text_tokenizer"):
        MarsProcessor(_pil(size=4), text_tokenizer)


def test_the_order_of_codes_is_the_configurations(text_tokenizer, config, processor):
    fields = {"codebook_size": 32, "downsample_factor": 2, "default_image_size": 4, "cell_embedding": True}
    other = MarsConfig(text_config=config.text_config, code_order="block2x2", **fields)
    assert MarsProcessor.from_text_tokenizer(text_tokenizer, other).code_order == "block2x2"
    assert processor.code_order == "raster"


@pytest.mark.parametrize("typed", TYPED_SPECIALS)
def test_specials_typed_by_a_user_stay_text(coding_processor, typed):
    processor = coding_processor
    special = processor.tokenizer.convert_tokens_to_ids(typed)
    draw = processor(typed, height=4, width=4, negative_prompt=typed)
    example = processor.training_example("text-to-image", typed, [0, 0, 0, 0], 4, 4)
    plain = processor(typed)["input_ids"][0].tolist()
    chat = processor.apply_chat_template([{"role": "user", "content": typed}], tokenize=True)[0].tolist()
    without = processor.apply_chat_template([{"role": "user", "content": ""}], tokenize=True)[0].tolist()
    for row in (draw["input_ids"][0], draw["negative_input_ids"][0], plain):
        assert special not in row
    assert example["input_ids"].count(special) == [IMG, 320, 320, 320, 320, END_IMG].count(special)
    assert chat.count(special) == without.count(special)
    assert processor.tokenizer.decode(plain) == typed
    if typed != "<imgpad>":  # with pictures it is the mark of their places
        prompt = processor(typed, images=_picture())["input_ids"][0].tolist()
        assert special not in prompt[6:]


# ---- drawing


def test_drawing_prompt_is_caption_and_size_without_the_picture_start(processor):
    inputs = processor("a red apple", height=4, width=6)
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == "a red apple 4x6"
    assert inputs["image_sizes"].tolist() == [[[4, 6]]] and inputs["image_sizes"].dtype == torch.long
    assert inputs["input_ids"][0].tolist() == prompt_ids(processor.tokenizer, "a red apple", 4, 6)
    assert set(inputs) <= set(processor.model_input_names)


def test_unconditional_prompt_keeps_the_size(processor):
    inputs = processor(["a red apple", "红苹果"], height=4, width=[4, 6])
    size_ids = text_ids(processor.tokenizer, " 4x6")
    assert inputs["negative_input_ids"][1].tolist() == [NULL, *size_ids]
    assert null_prompt_ids(processor.tokenizer, 4, 6) == [NULL, *size_ids]
    assert inputs["negative_attention_mask"].tolist() == [[1] * (len(size_ids) + 1)] * 2
    assert inputs["image_sizes"].tolist() == [[[4, 4]], [[4, 6]]]


def test_negative_prompt_takes_the_place_of_null_row_by_row(processor):
    inputs = processor(["a", "a"], height=4, width=4, negative_prompt=["a green apple", None])
    rows, masks = inputs["negative_input_ids"], inputs["negative_attention_mask"].bool()
    assert rows[0][masks[0]].tolist() == prompt_ids(processor.tokenizer, "a green apple", 4, 4)
    assert rows[1][masks[1]].tolist() == null_prompt_ids(processor.tokenizer, 4, 4)


def test_batches_are_padded_on_the_left(processor):
    inputs = processor(["a", "a red apple"], height=4, width=4)
    alone = processor("a", height=4, width=4)["input_ids"][0].tolist()
    missing = inputs["input_ids"].shape[1] - len(alone)
    assert missing > 0
    assert inputs["input_ids"][0].tolist() == [processor.tokenizer.pad_token_id] * missing + alone
    assert inputs["attention_mask"][0].tolist() == [0] * missing + [1] * len(alone)


def test_image_sizes_are_another_way_to_say_height_and_width(processor):
    said = processor(["a", "a"], height=[4, 6], width=8)
    given = processor(["a", "a"], image_sizes=said["image_sizes"])
    assert torch.equal(said["input_ids"], given["input_ids"])
    assert torch.equal(said["image_sizes"], given["image_sizes"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"height": 5, "width": 4}, "multiple of 2, got 5: use 4 or 6"),
        ({"height": 1, "width": 4}, "multiple of 2, got 1: use 2"),
        ({"height": 0, "width": 4}, "`height` must be a positive"),
        ({"height": 4, "width": -2}, "`width` must be a positive"),
        ({"height": 4.0, "width": 4}, "whole number"),
        ({"height": 4, "width": 5000}, "at most 4096"),
        ({"height": 4}, "go together"),
        ({"height": [4, 4], "width": 4}, "`height` holds 2 values, but there are 1 rows"),
        ({"height": 4, "width": 4, "image_sizes": [[[4, 6]]]}, "contradict"),
        ({"image_sizes": [[4, 4], [4, 4]]}, "contradict"),
        ({"height": 4, "width": 4, "negative_prompt": ["a", "b"]}, "`negative_prompt` holds 2"),
        ({"height": 24, "width": 32}, "192|194"),
        ({"negative_prompt": "a"}, "belong to drawing"),
        ({"height": 4, "width": 4, "max_length": 2}, "only 2 fit"),
    ],
)
def test_impossible_drawing_is_refused(processor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor("a red apple", **kwargs)


def test_an_empty_prompt_list_is_refused(processor):
    for kwargs in ({"height": 4, "width": 4}, {}):
        with pytest.raises(ValueError, match="at least one prompt"):
            processor([], **kwargs)
    with pytest.raises(ValueError, match="at least one picture"):
        processor(images=[])
    for kwargs in ({}, {"generation_mode": "interleaved", "height": 4, "width": 4}):
        with pytest.raises(ValueError, match="Row 1 holds neither text nor a picture"):
            processor(["a", ""], **kwargs)


def test_no_pictures_are_as_none(processor):
    plain, empty = (processor("a red apple", height=4, width=4, images=images) for images in (None, []))
    assert plain.keys() == empty.keys() and all(torch.equal(plain[name], empty[name]) for name in plain)


def test_rows_that_hold_their_pictures_are_read_at_a_size(processor):
    inputs = processor([["What is this? ", _picture()]], height=8, width=4)
    assert inputs["image_sizes"].tolist() == [[[8, 4]]] and inputs["pixel_values"].shape == (1, 3, 8, 4)


def test_a_part_of_a_chat_that_is_neither_text_nor_picture_is_refused(processor):
    with pytest.raises(Exception, match="A part must be of type text or image, got video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}])


def test_a_row_of_texts_and_pictures_is_a_list(processor):
    with pytest.raises(ValueError, match="list of rows"):
        processor(["a", _picture()])


def test_only_text_and_pictures_are_taken(processor):
    assert processor("a", videos=None, audio=None)["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="`videos`"):
        processor("a", videos=[1])


def test_a_prompt_longer_than_the_context_is_refused(processor):
    assert processor.tokenizer.model_max_length == 200
    with pytest.raises(ValueError, match="only 200 fit"):
        processor("a" * 2000)
    with pytest.raises(ValueError, match="6 more, but only 200 fit"):
        processor("b" * 195, height=4, width=4)


# ---- reading


def test_a_picture_alone_asks_for_its_caption(processor):
    inputs = processor(images=_picture())
    line_end = text_ids(processor.tokenizer, "\n")
    assert inputs["input_ids"].tolist() == [[IMG, IMGPAD, IMGPAD, IMGPAD, IMGPAD, END_IMG, *line_end]]
    assert inputs["image_sizes"].tolist() == [[[4, 4]]]
    assert inputs["pixel_values"].shape == (1, 3, 4, 4)
    asked = processor("a", images=_picture())["input_ids"][0].tolist()
    assert asked == [IMG, *[IMGPAD] * 4, END_IMG, *text_ids(processor.tokenizer, "\na")]


def test_pictures_stand_where_the_text_marks_them(processor):
    picture = [IMG, *[IMGPAD] * 4, END_IMG]
    ids = processor("a<imgpad>b<imgpad>", images=[_picture(), _picture()])["input_ids"][0].tolist()
    a, b = (text_ids(processor.tokenizer, letter) for letter in "ab")
    assert ids == [*a, *picture, *b, *picture]
    segments = [["a", _picture(), "b", _picture()]]
    assert processor(segments)["input_ids"][0].tolist() == ids


def test_pictures_are_dealt_out_in_order(processor):
    pictures = [_picture(seed=seed) for seed in range(3)]
    flat = processor(["<imgpad>a", "<imgpad><imgpad>"], images=pictures)
    nested = processor(["<imgpad>a", "<imgpad><imgpad>"], images=[pictures[:1], pictures[1:]])
    assert torch.equal(flat["input_ids"], nested["input_ids"])
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    assert flat["image_sizes"].tolist() == [[[4, 4], [0, 0]], [[4, 4], [4, 4]]]
    assert processor(["a", "b"], images=pictures[:2])["input_ids"].shape[0] == 2


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("<imgpad>a", 2, r"places for 1 picture\(s\), but 2 came"),
        ("<imgpad><imgpad>", 1, r"places for 2 picture\(s\), but 1 came"),
        ("a", 2, r"places for 0 picture\(s\), but 2 came"),
        (["<imgpad>", "<imgpad>"], 3, r"places for 2 picture\(s\), but 3 came"),
        (["a", "b"], 1, r"places for 2 picture\(s\), but 1 came"),
    ],
)
def test_more_or_fewer_places_than_pictures_are_refused(processor, text, count, message):
    with pytest.raises(ValueError, match=message):
        processor(text, images=[_picture()] * count)


def test_without_pictures_the_mark_is_text(processor):
    assert IMGPAD not in processor("<imgpad>")["input_ids"]


def test_pictures_of_different_sizes_come_as_a_list(text_tokenizer, config):
    keeping = _pil(size={"shortest_edge": 4})
    processor = MarsProcessor.from_text_tokenizer(text_tokenizer, config, image_processor=keeping)
    inputs = processor(images=[_picture(4, 8), _picture(4, 4)])
    assert [tuple(pixels.shape) for pixels in inputs["pixel_values"]] == [(3, 4, 8), (3, 4, 4)]
    assert inputs["image_sizes"].tolist() == [[[4, 8]], [[4, 4]]]
    assert (inputs["input_ids"] == IMGPAD).sum(1).tolist() == [8, 4]
    assert [pixels.dtype for pixels in inputs.to(dtype=torch.bfloat16)["pixel_values"]] == [torch.bfloat16] * 2


def test_exact_size_and_other_tensor_types(processor):
    inputs = processor(images=_picture(4, 4), height=6, width=2, return_tensors="np")
    assert inputs["pixel_values"].shape == (1, 3, 6, 2) and isinstance(inputs["input_ids"], np.ndarray)
    plain = processor("a", images=_picture(), return_tensors=None)
    assert isinstance(plain["input_ids"][0], list) and plain["image_sizes"] == [[[4, 4]]]


def test_with_an_image_tokenizer_rows_hold_codes(processor, vqgan):
    pictures = [_picture(seed=1), _picture(seed=2)]
    places = processor(["a", "a red apple"], images=pictures)
    processor.image_tokenizer = vqgan
    coded = processor(["a", "a red apple"], images=pictures)
    codes = torch.stack(encode_pixels(vqgan, places["pixel_values"])).flatten()
    expected = places["input_ids"].masked_scatter(places["input_ids"] == IMGPAD, codes + 320)
    assert torch.equal(coded["input_ids"], expected)
    assert "pixel_values" not in coded and torch.equal(coded["image_sizes"], places["image_sizes"])


# ---- conversations

CHAT = [
    {"role": "user", "content": [{"type": "image", "image": _picture()}, {"type": "text", "text": "a red apple"}]},
]


def test_conversation_row_holds_the_template_and_the_picture(processor):
    inputs = processor.apply_chat_template(CHAT, tokenize=True, return_dict=True, add_generation_prompt=True)
    start, end = processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = {text: text_ids(processor.tokenizer, text) for text in ("user\n", "a red apple", "\n", "assistant\n")}
    assert inputs["input_ids"][0].tolist() == [
        *[start, *ids["user\n"], IMG, *[IMGPAD] * 4, END_IMG, *ids["a red apple"], end, *ids["\n"]],
        *[start, *ids["assistant\n"]],
    ]
    assert inputs["pixel_values"].shape == (1, 3, 4, 4) and inputs["image_sizes"].tolist() == [[[4, 4]]]


def test_conversations_are_batched_and_may_be_strings(processor):
    plain = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    inputs = processor.apply_chat_template([plain, CHAT], tokenize=True, return_dict=True)
    assert inputs["input_ids"].shape[0] == 2 and inputs["image_sizes"].tolist() == [[[0, 0]], [[4, 4]]]
    text = processor.apply_chat_template(plain)
    assert text == "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
    alone = processor.apply_chat_template(plain, tokenize=True)[0]
    assert processor.tokenizer.decode(alone) == text


def test_a_conversation_can_be_continued(processor):
    prefill = [*CHAT, {"role": "assistant", "content": [{"type": "text", "text": "a red"}]}]
    row = processor.apply_chat_template(prefill, tokenize=True, continue_final_message=True)[0].tolist()
    said = text_ids(processor.tokenizer, "a red")
    assert row[-len(said) :] == said


def test_a_conversation_may_ask_for_an_answer_with_pictures(processor):
    sizes = {"height": 4, "width": 6, "negative_prompt": "b"}
    options = {"generation_mode": "interleaved", "codes_per_step": 2, **sizes}
    inputs = processor.apply_chat_template(CHAT, tokenize=True, return_dict=True, processor_kwargs=options)
    read = processor.apply_chat_template(CHAT, tokenize=True, processor_kwargs={"codes_per_step": 2})
    assert torch.equal(inputs["input_ids"], read) and (read == IMG).sum() == 2
    assert inputs["image_sizes"].tolist() == [[[4, 4], [4, 6]]]  # of the picture that is read, and of those to come
    negative = [prompt_ids(processor.tokenizer, "b", 4, width) for width in (4, 6)]
    assert inputs["negative_input_ids"].tolist() == [negative]
    larger = processor.apply_chat_template(CHAT, tokenize=True, processor_kwargs={"height": 4, "width": 8})
    assert (larger == IMGPAD).sum() == 8


def test_what_a_conversation_cannot_hold_is_refused(processor):
    with pytest.raises(ValueError, match="of a chat is 'interleaved' or left out, got 'image'"):
        processor.apply_chat_template(CHAT, tokenize=True, processor_kwargs={"generation_mode": "image"})
    with pytest.raises(ValueError, match="A document needs the sizes"):
        processor.apply_chat_template(CHAT, tokenize=True, processor_kwargs={"generation_mode": "interleaved"})
    with pytest.raises(Exception, match="got <img>"):
        processor.apply_chat_template([{"role": "<img>", "content": ""}], tokenize=True)
    with pytest.raises(ValueError, match=r"places for 1 picture\(s\), but 0 came"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=True)
    with pytest.raises(ValueError, match="return_assistant_tokens_mask"):
        processor.apply_chat_template(CHAT, tokenize=True, return_assistant_tokens_mask=True)


# ---- training


def test_text_to_image_labels_are_the_codes(processor):
    example = processor.training_example("text-to-image", "a red apple", torch.tensor([3, 1, 0, 31]), 4, 4)
    text = prompt_ids(processor.tokenizer, "a red apple", 4, 4)
    assert example["input_ids"] == [*text, IMG, 323, 321, 320, 351, END_IMG]
    assert example["labels"] == [-100] * len(text) + [-100, 323, 321, 320, 351, -100]


def test_a_dropped_caption_leaves_the_row_that_guidance_uses(processor):
    example = processor.training_example("text-to-image", "a red apple", [0, 0, 0, 0], 4, 4, drop_caption=True)
    guidance = processor("a red apple", height=4, width=4)["negative_input_ids"][0].tolist()
    assert example["input_ids"] == [*guidance, IMG, 320, 320, 320, 320, END_IMG]


def test_captioning_labels_are_what_follows_the_picture(processor):
    example = processor.training_example("captioning", "红苹果", [0, 1, 2, 3, 4, 5], 4, 6)
    tail = [*text_ids(processor.tokenizer, "\n红苹果"), processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert example["input_ids"] == [IMG, 320, 321, 322, 323, 324, 325, END_IMG, *tail]
    assert example["labels"] == [-100] * 8 + tail


@pytest.mark.parametrize("task", ["text-to-image", "captioning"])
def test_a_training_batch_holds_its_examples(coding_processor, vqgan, task):
    pictures, captions = [_picture(seed=1), _picture(seed=2)], ["a", "a red apple"]
    batch = coding_processor(captions, images=pictures, task=task, return_labels=True)
    pixels = coding_processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    for i, codes in enumerate(encode_pixels(vqgan, pixels)):
        example = coding_processor.training_example(task, captions[i], codes, 4, 4)
        mask = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][mask].tolist() == example["input_ids"]
        assert batch["labels"][i][mask].tolist() == example["labels"]
        assert (batch["labels"][i][~mask] == -100).all()
    assert batch["image_sizes"].tolist() == [[[4, 4]], [[4, 4]]]


def test_without_an_image_tokenizer_places_are_labelled_for_the_model(processor):
    batch = processor(["a", "b"], images=[_picture()] * 2, task="text-to-image", return_labels=True, drop_caption=True)
    assert torch.equal(batch["labels"] == IMGPAD, batch["input_ids"] == IMGPAD)
    assert batch["pixel_values"].shape == (2, 3, 4, 4) and (batch["input_ids"][:, 0] == NULL).all()


def test_impossible_training_rows_are_refused(coding_processor):
    example = coding_processor.training_example
    with pytest.raises(ValueError, match="has 4 codes, got 3"):
        example("captioning", "a", [0, 1, 2], 4, 4)
    with pytest.raises(ValueError, match=r"\[0, 32\), got 0 to 32"):
        example("captioning", "a", [0, 1, 2, 32], 4, 4)
    with pytest.raises(ValueError, match="task='drawing'"):
        example("drawing", "a", [0, 1, 2, 3], 4, 4)
    with pytest.raises(ValueError, match="drop_caption=True"):
        example("captioning", "a", [0, 1, 2, 3], 4, 4, drop_caption=True)
    with pytest.raises(ValueError, match="only 7 fit"):
        example("captioning", "a", [0, 1, 2, 3], 4, 4, max_length=7)
    with pytest.raises(ValueError, match="got 1 and 2"):
        coding_processor(["a", "b"], images=_picture(), task="captioning", return_labels=True)
    with pytest.raises(ValueError, match="go together"):
        coding_processor("a", images=_picture(), task="captioning")


# ---- back


def test_generated_text_is_decoded_without_pictures(processor):
    text = text_ids(processor.tokenizer, "a red apple")
    row = [*text[:2], IMG, 320, 351, END_IMG, *text[2:], processor.tokenizer.eos_token_id]
    for skip, expected in ((True, "a red apple"), (False, "a red apple<|endoftext|>")):
        assert processor.post_process_image_text_to_text([row], skip_special_tokens=skip) == [expected]
    assert processor.post_process_multimodal_output(torch.tensor([row, row])) == ["a red apple"] * 2
    assert processor.post_process_image_text_to_text(torch.tensor(row)) == ["a red apple"]


def test_generated_pixels_become_pictures(processor):
    pixels = torch.tensor([-2.0, -1.0, 0.0, 2.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    (picture,) = processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert np.asarray(picture)[..., 0].tolist() == [[0, 0], [128, 255]]
    with pytest.raises(ValueError, match="decode_image_tokens"):
        processor.post_process_multimodal_output(torch.tensor([[1, 2]]), generation_mode="image")
    with pytest.raises(ValueError, match="'audio'"):
        processor.post_process_multimodal_output(pixels, generation_mode="audio")


def test_codes_become_pictures_of_their_sizes(coding_processor, vqgan):
    codes = [torch.arange(4), torch.arange(8)]
    pictures = coding_processor.decode_images(codes, [[[4, 4]], [[4, 8]]])
    assert [picture.size for picture in pictures] == [(4, 4), (8, 4)]
    alone = coding_processor.image_processor.postprocess(decode_codes(vqgan, [codes[1].view(2, 4)]))
    assert pictures[1].tobytes() == alone[0].tobytes()
    with pytest.raises(ValueError, match="2 sizes, but `codes` 1"):
        coding_processor.decode_images(codes[:1], [[4, 4], [4, 8]])
    coding_processor.image_tokenizer = None
    with pytest.raises(ValueError, match="model.vqgan"):
        coding_processor.decode_images(codes, [[4, 4], [4, 8]])


def test_pictures_of_two_sizes_are_coded_as_each_alone(vqgan):
    torch.manual_seed(1)
    pixels = [torch.rand(3, 4, 4), torch.rand(3, 4, 8), torch.rand(3, 4, 4)]
    together = encode_pixels(vqgan, pixels)
    alone = [encode_pixels(vqgan, picture[None])[0] for picture in pixels]
    assert [tuple(codes.shape) for codes in together] == [(2, 2), (2, 4), (2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    back = [decode_codes(vqgan, [codes])[0] for codes in alone]
    for together_picture, picture in zip(decode_codes(vqgan, together), back, strict=True):
        torch.testing.assert_close(together_picture, picture)


def test_saved_and_loaded_processor_is_the_same(coding_processor, tmp_path):
    coding_processor.max_image_size, coding_processor.code_order = 64, "region"
    coding_processor.save_pretrained(tmp_path)
    loaded = MarsProcessor.from_pretrained(tmp_path)
    assert loaded.image_tokenizer is None and not list(tmp_path.glob("*.safetensors"))
    assert (loaded.max_image_size, loaded.downsample_factor, loaded.code_order) == (64, 2, "region")
    assert loaded.chat_template == coding_processor.chat_template
    assert loaded.tokenizer.padding_side == "left" and loaded.tokenizer.model_max_length == 200
    coding_processor.image_tokenizer = None
    for kwargs in ({"text": ["a", "a <img> b"], "height": 4, "width": 6}, {"images": _picture(9, 7)}):
        first, second = coding_processor(**kwargs), loaded(**kwargs)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


# ---- pictures


def _pixels(source, **kwargs):
    """The picture as 8-bit values, unchanged in size."""
    pixels = _pil(do_resize=False, do_rescale=False, do_normalize=False)(source, return_tensors="np", **kwargs)
    return pixels["pixel_values"][0].transpose(1, 2, 0)


def test_pixels_lie_between_minus_one_and_one_and_come_back(processor):
    picture = _picture(4, 6)
    image_processor = _pil(size={"height": 4, "width": 6})
    inputs = image_processor(picture, return_tensors="pt")
    assert inputs["pixel_values"].dtype == torch.float32 and inputs["image_sizes"].tolist() == [[4, 6]]
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(inputs["pixel_values"][0], expected)
    assert image_processor.postprocess(inputs["pixel_values"])[0].tobytes() == picture.tobytes()


def test_the_middle_is_cut_out_and_the_aspect_ratio_kept():
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, 2:6] = 255
    whole = _pil(size=4)(Image.fromarray(pixels), return_tensors="pt")
    assert whole["pixel_values"].shape == (1, 3, 4, 4) and (whole["pixel_values"] == 1).all()
    keeping = _pil(size={"shortest_edge": 4})
    assert keeping(_picture(8, 13), return_tensors="pt")["image_sizes"].tolist() == [[4, 6]]
    exact = _pil()(Image.fromarray(pixels), height=4, width=4, return_tensors="pt")
    assert (exact["pixel_values"][..., 0] < 0).all()


def test_floats_that_were_rescaled_by_hand_are_recognised_and_a_switch_that_would_leave_their_range_is_refused():
    floats = torch.rand(3, 8, 8)
    with pytest.raises(ValueError, match="`do_rescale=False` with `do_normalize=True`.*Leave `do_rescale` out"):
        _pil(do_resize=False)(floats, do_rescale=False)
    pixels = _pil(do_resize=False)(floats, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, floats * 2 - 1, atol=1 / 255, rtol=0)
    rounded = _pil(do_resize=False)(floats.bfloat16(), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(rounded, floats * 2 - 1, atol=1 / 60, rtol=0)
    beyond = torch.where(floats > 0.99, 1.02, floats).where(floats > 0.01, -0.01)  # as resizing leaves it
    shown = _pil(do_resize=False)(beyond, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(shown, beyond.clamp(0, 1) * 2 - 1, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_applied(orientation):
    upright = _picture(4, 6)
    turn = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = upright if turn[orientation] is None else upright.transpose(turn[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (_pixels(_file(stored, exif=exif)) == np.array(upright)).all()


def test_transparent_pictures_stand_on_white():
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0] = [255, 0, 0, 255]
    rgba[1] = [0, 0, 0, 0]
    picture = Image.fromarray(rgba)
    palette = Image.fromarray(np.array([[0, 0], [1, 1]], dtype=np.uint8), mode="P")
    palette.putpalette([255, 0, 0, 0, 0, 0])
    for source in (picture, _file(picture), rgba, _file(palette, transparency=1)):
        assert _pixels(source).tolist() == [[[255, 0, 0]] * 2, [[255, 255, 255]] * 2]
    grey = Image.merge("LA", [Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 0)])
    assert (_pixels(grey) == 255).all()


def test_sixteen_bits_are_scaled_to_eight():
    deep = np.array([[0, 257], [25700, 65535]], dtype=np.uint16)
    for source in (_file(Image.fromarray(deep)), deep, Image.fromarray(deep.astype(np.int32)), deep.astype(np.int64)):
        assert _pixels(source)[..., 0].tolist() == [[0, 1], [100, 255]]


def test_other_modes_become_rgb():
    assert _pixels(Image.new("CMYK", (2, 2), (0, 255, 255, 0))).tolist() == [[[255, 0, 0]] * 2] * 2
    for mode in ("1", "L", "P", "YCbCr", "F", "I"):
        assert _pixels(Image.new(mode, (2, 2))).shape == (2, 2, 3)


def test_pictures_may_be_arrays_files_and_texts(tmp_path):
    picture = _picture(6, 8)
    array, path, data = np.array(picture), tmp_path / "picture.png", _file(picture)
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    tensor = torch.from_numpy(array)
    sources = [picture, array, array / 255, array.astype(np.float32), tensor.permute(2, 0, 1), tensor[None]]
    for source in [*sources, data, path, str(path), text, f"data:image/png;base64,{text}"]:
        assert (_pixels(source) == array).all()
    assert len(_pil(size=4)(np.stack([array] * 3))["pixel_values"]) == 3


def test_an_animation_gives_its_first_frame_and_a_warning():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    data = _file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    animation = Image.open(BytesIO(data))
    animation.seek(1)
    for source in (data, animation):
        with pytest.warns(UserWarning, match="2 frames; the first is used"):
            assert _pixels(source).tolist() == [[[255, 0, 0]] * 2] * 2


def test_too_many_pixels_are_refused_before_decoding():
    header = struct.pack(">IIBBBBB", 50_000, 3000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    only_a_header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    only_a_header += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="64000000 pixels"):
        _pil()(only_a_header)
    with pytest.raises(ValueError, match="at most 15 pixels.*4 x 4"):
        _pil(max_pixels=15)(_picture())


def test_a_picture_that_would_become_too_large_by_scaling_is_refused():
    assert _pil(max_pixels=1600, size=4)(_picture(2, 200))["pixel_values"][0].shape == (3, 4, 4)
    with pytest.raises(ValueError, match="200 x 2 is too thin.* 400 x 4, more than 1599 pixels"):
        _pil(max_pixels=1599, size=4)(_picture(2, 200))


def test_a_download_without_end_is_refused(monkeypatch):
    data = f"data:image/png;base64,{base64.b64encode(_file(_picture())).decode()}"
    monkeypatch.setattr("mars_hf.image_processing_mars.DOWNLOAD_LIMIT", 20)
    with pytest.raises(ValueError, match="has more than 20 bytes"):
        _pil()(data)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (_file(_picture(64, 64))[:2000], "truncated"),
        (_file(_picture(64, 64), "JPEG")[:700], "truncated"),
        (b"no picture", "10 bytes cannot be read as a picture"),
        ("nowhere.png", "'nowhere.png' cannot be read.*neither an existing file"),
        (3, "got int"),
        (None, "got NoneType"),
        (np.zeros((5, 4, 7)), "1, 3 or 4 channels"),
        (np.zeros((0, 4, 3)), r"shape \(0, 4, 3\)"),
        (np.full((4, 4), -1.0), "known range"),
        (Image.new("RGB", (1, 9)), "shorter side must be at least 2 pixels, got 1 x 9"),
        ([], "at least one picture"),
    ],
)
def test_what_is_no_usable_picture_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        _pil(size=4)(source)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"size": 5}, "multiple of 2, got 5"),
        ({"size": {"longest_edge": 4}}, "'shortest_edge'"),
        ({"height": 4}, "go together"),
        ({"height": 4, "width": 3}, "`width` must be a multiple of 2, got 3"),
        ({"do_resize": False}, "multiple of 2, got 7"),
    ],
)
def test_impossible_picture_sizes_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        _pil(size=4)(_picture(7, 9), **kwargs)
