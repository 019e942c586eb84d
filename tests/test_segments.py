"""
Documents as lists of texts and pictures: to tokens, with K codes a step in every order, and back. Text ids are bytes,
each of the 40 codes stands for 4 x 4 pixels.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from mars_hf import MarsProcessor
from mars_hf.code_order_mars import PictureSpan, PictureTokens, emission_order, sizes_by_row, to_emission_order
from mars_hf.image_processing_mars import decode_codes, encode_pixels
from mars_hf.prompts_mars import null_prompt_ids, prompt_ids, text_ids

pytestmark = pytest.mark.filterwarnings("ignore:In .* steps")  # tiny grids


@pytest.fixture
def processor(tiny_processor, tiny_model):
    tiny_processor.image_tokenizer = tiny_model.vqgan
    return tiny_processor


@pytest.fixture
def make_processor(processor):
    """Make processors of other orders."""

    def make(code_order="raster"):
        made = MarsProcessor(processor.image_processor, processor.tokenizer, code_order=code_order)
        made.image_tokenizer = processor.image_tokenizer
        return made

    return make


@pytest.fixture
def writer(tiny_model):
    """A model that begins pictures often."""
    with torch.no_grad():
        tiny_model.vision_head.weight[tiny_model.config.image_start_token_id - 264] *= 2.5
    return tiny_model


def picture(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def codes_of(processor, image):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    return encode_pixels(processor.image_tokenizer, pixels[None])[0]


def to_picture(processor, codes):
    return processor.image_processor.postprocess(decode_codes(processor.image_tokenizer, [codes]))[0]


def plain(segments):
    return [part if isinstance(part, str) else (part.size, part.tobytes()) for part in segments]


def same(segments, expected):
    """Whether two documents have equal texts and equal pixels."""
    return plain(segments) == plain(expected)


def to_segments(processor, sequences, image_sizes=None, **kwargs):
    return processor.post_process_multimodal_output(
        sequences, generation_mode="interleaved", image_sizes=image_sizes, **kwargs
    )


# ---- from tokens


def test_a_row_worked_by_hand_gives_its_texts_and_its_picture(make_processor):
    processor = make_processor("region")
    tokenizer, offset = processor.tokenizer, processor.image_token_offset
    start, end, pad = processor.image_start_token_id, processor.image_end_token_id, tokenizer.pad_token_id
    # 2 x 4 codes 10 to 17; two regions of 2 x 2, so that a step takes codes two columns apart.
    emitted = [offset + code for code in (10, 12, 11, 13, 14, 16, 15, 17)]
    a, b = text_ids(tokenizer, "a <img> "), text_ids(tokenizer, " 苹果")
    row = torch.tensor([[pad, pad, *a, start, start, *emitted, end, *b, tokenizer.eos_token_id, pad]])
    expected = ["a <img> ", to_picture(processor, torch.arange(10, 18).view(2, 4)), " 苹果"]
    for rows in (row, row[0], row.tolist()):
        (segments,) = to_segments(processor, rows, [[[8, 16]]])
        assert same(segments, expected)
    assert same(to_segments(processor, row, [[[8, 16]]], prompt_length=2 + len(a))[0], expected[1:])
    assert same(to_segments(processor, row, [[[8, 16]]], prompt_length=3 + len(a))[0], expected[2:])
    with_end = to_segments(processor, row, [[[8, 16]]], skip_special_tokens=False)[0]
    assert with_end[0] == "<|endoftext|>" * 2 + "a <img> " and with_end[2] == " 苹果" + "<|endoftext|>" * 2


def test_pictures_are_found_where_their_brackets_stand():
    tokens = PictureTokens(10, 18, 19, downsample_factor=4)  # codes 10 to 17
    row = torch.tensor([3, 18, 11, 18, 18, 12, 13, 14, 15, 19, 4, 19, 18, 16, 19, 18, 17, 5])
    assert tokens.find(row) == [PictureSpan(3, 5, 9), PictureSpan(12, 13, 14)]
    assert tokens.read(row, PictureSpan(3, 5, 9)).tolist() == [[2, 3], [4, 5]]
    grids = tokens.collect([row, row], [[[4, 16], [4, 4]]])
    assert [[grid.tolist() for grid in own] for own in grids] == [[[[2, 3, 4, 5]], [[6]]]] * 2


def test_sizes_are_read_by_row():
    assert sizes_by_row(torch.tensor([[[4, 8], [0, 0]], [[4, 4], [8, 8]]])) == [[(4, 8)], [(4, 4), (8, 8)]]
    assert sizes_by_row([[4, 8], (8, 4)]) == [[(4, 8)], [(8, 4)]]
    assert sizes_by_row([[[4, 8]], [[4, 4], [8, 8]]]) == [[(4, 8)], [(4, 4), (8, 8)]]


def test_pixels_of_the_model_and_an_image_tokenizer_give_the_same_documents(processor, tiny_model):
    inputs = processor(["a red apple", "b"], image_sizes=[[16, 16], [12, 20]])
    options = {"generation_mode": "image", "do_sample": True, "num_return_sequences": 2}
    sequences = tiny_model.generate(**inputs, **options, generator=torch.Generator().manual_seed(0))
    decoded = to_segments(processor, sequences, inputs["image_sizes"])
    assert [row[0] for row in decoded] == ["a red apple 16x16"] * 2 + ["b 12x20"] * 2
    assert [row[1].size for row in decoded] == [(16, 16)] * 2 + [(20, 12)] * 2
    assert len({row[1].tobytes() for row in decoded}) == 4
    processor.image_tokenizer = None
    pixels = tiny_model.decode_image_tokens(sequences, inputs["image_sizes"])
    given = to_segments(processor, sequences, pixel_values=pixels)
    assert all(map(same, given, decoded))
    answers = to_segments(processor, sequences, pixel_values=pixels, prompt_length=inputs["input_ids"].shape[1])
    assert all(same(answer, row[1:]) for answer, row in zip(answers, decoded, strict=True))


def test_rows_without_pictures_need_no_image_tokenizer(processor):
    processor.image_tokenizer = None
    inputs = processor(["a", "a red apple"])
    assert to_segments(processor, inputs["input_ids"]) == [["a"], ["a red apple"]]
    assert to_segments(processor, inputs["input_ids"], prompt_length=99) == [[], []]


@pytest.mark.parametrize("num_codes", [0, 1, 15])
def test_a_picture_without_its_end_is_left_out(processor, num_codes):
    whole = processor([["a", picture(16, 16), "b", picture(16, 16)]], codes_per_step=3)["input_ids"]
    cut = whole.clone()
    cut[0, 1 + 3 + 16 + 1 + 1 + 3 + num_codes :] = processor.tokenizer.pad_token_id
    complete, cancelled = to_segments(processor, torch.cat([whole, cut]), [[[16, 16]]])
    assert len(complete) == 4 and same(cancelled, complete[:3])


# ---- to tokens and back

DOCUMENTS = [
    ["a red apple, ", picture(12, 20, 1), " and then ", picture(16, 16, 2), picture(20, 12, 3), "."],
    [picture(8, 32, 4), "红苹果\n"],
    ["text alone"],
]


@pytest.mark.parametrize("order", ["raster", "region"])
@pytest.mark.parametrize("k", [1, 4])
def test_documents_come_back_as_the_same_texts_and_codes(make_processor, make_model, order, k):
    processor = make_processor(order)
    inputs = processor(DOCUMENTS, do_resize=False, codes_per_step=k)
    assert inputs["image_sizes"].tolist() == [
        [[12, 20], [16, 16], [20, 12]],
        [[8, 32], [0, 0], [0, 0]],
        [[0, 0]] * 3,
    ]
    assert inputs["attention_mask"].sum(1).unique().numel() == 3, "rows are padded"
    expected = []
    for ids, mask, document in zip(inputs["input_ids"], inputs["attention_mask"], DOCUMENTS, strict=True):
        row, back = [], []
        for part in document:
            if isinstance(part, str):
                row += text_ids(processor.tokenizer, part)
                back.append(part)
                continue
            codes = codes_of(processor, part)
            ordered = codes.flatten()[emission_order(*codes.shape, k, order)] + processor.image_token_offset
            row += [processor.image_start_token_id] * k + ordered.tolist() + [processor.image_end_token_id]
            back.append(codes)
        assert ids[mask.bool()].tolist() == row
        expected.append(back)
    segments = to_segments(processor, inputs["input_ids"], inputs["image_sizes"])
    for found, parts in zip(segments, expected, strict=True):
        assert same(found, [part if isinstance(part, str) else to_picture(processor, part) for part in parts])
    # The model reads the same codes, in raster order.
    text = {"vocab_size": 264, "eos_token_id": 256, "pad_token_id": 256}
    model = make_model(text=text, code_order=order, cell_embedding=order != "raster")
    grids = model.collect_image_codes(inputs["input_ids"], inputs["image_sizes"])
    codes = [part for row in expected for part in row if not isinstance(part, str)]
    assert all(map(torch.equal, [grid for row in grids for grid in row], codes))
    assert [len(row) for row in grids] == [3, 1, 0]


def test_what_comes_back_can_be_read_again(processor):
    inputs = processor(DOCUMENTS, do_resize=False, codes_per_step=4)
    segments = to_segments(processor, inputs["input_ids"], inputs["image_sizes"])
    again = processor(segments, do_resize=False, codes_per_step=4)
    assert torch.equal(again["image_sizes"], inputs["image_sizes"])
    is_code = inputs["input_ids"].ge(processor.image_token_offset) & inputs["input_ids"].lt(
        processor.image_start_token_id
    )
    assert torch.equal(again["input_ids"].masked_fill(is_code, 0), inputs["input_ids"].masked_fill(is_code, 0))


@pytest.mark.parametrize("k", [1, 3])
def test_without_an_image_tokenizer_places_of_codes_are_kept_behind_k_copies(processor, k):
    processor.image_tokenizer = None
    ids = processor([["a", picture(16, 16), "b"]], codes_per_step=k)["input_ids"][0].tolist()
    start, end = processor.image_start_token_id, processor.image_end_token_id
    a, b = (text_ids(processor.tokenizer, letter) for letter in "ab")
    assert ids == [*a, *[start] * k, *[processor.image_token_id] * 16, end, *b]


def test_squares_of_codes_are_written_one_after_the_other(make_processor):
    processor = make_processor("block2x2")
    ids = processor(images=picture(8, 16), do_resize=False, codes_per_step=4)["input_ids"][0].tolist()
    codes = codes_of(processor, picture(8, 16)).flatten() + processor.image_token_offset
    assert ids[4:12] == codes[[0, 1, 4, 5, 2, 3, 6, 7]].tolist()


# ---- training


def test_training_rows_hold_k_copies_and_codes_as_emitted(make_processor):
    processor = make_processor("region")
    codes = torch.arange(16)
    start, end = processor.image_start_token_id, processor.image_end_token_id
    emitted = [processor.image_token_offset + code for code in (0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15)]
    text = prompt_ids(processor.tokenizer, "a", 16, 16)
    row = processor.training_example("text-to-image", "a", codes, 16, 16, codes_per_step=4)
    assert row["input_ids"] == [*text, *[start] * 4, *emitted, end]
    assert row["labels"] == [-100] * (len(text) + 4) + emitted + [-100]
    row = processor.training_example("captioning", "a", codes, 16, 16, codes_per_step=4)
    tail = [*text_ids(processor.tokenizer, "\na"), processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert row["input_ids"] == [*[start] * 4, *emitted, end, *tail]
    assert row["labels"] == [-100] * 21 + tail


@pytest.mark.parametrize("task", ["text-to-image", "captioning"])
def test_a_training_batch_of_k_codes_a_step_holds_its_examples(make_processor, task):
    processor = make_processor("region")
    captions, pictures = ["a", "a red apple"], [picture(16, 16, seed) for seed in (1, 2)]
    batch = processor(captions, images=pictures, task=task, return_labels=True, codes_per_step=4)
    for i, (caption, image) in enumerate(zip(captions, pictures, strict=True)):
        codes = codes_of(processor, image)
        example = processor.training_example(task, caption, codes, 16, 16, codes_per_step=4)
        mask = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][mask].tolist() == example["input_ids"]
        assert batch["labels"][i][mask].tolist() == example["labels"]


# ---- prompts of documents


def test_a_document_prompt_has_an_unconditional_prefix_for_every_picture(processor):
    sizes = [[[16, 16], [8, 12]], [[8, 8]]]
    inputs = processor(["a", "a red apple"], image_sizes=sizes, generation_mode="interleaved")
    assert [processor.tokenizer.decode(row, skip_special_tokens=True) for row in inputs["input_ids"]] == [
        "a",
        "a red apple",
    ]
    assert inputs["image_sizes"].tolist() == [[[16, 16], [8, 12]], [[8, 8], [8, 8]]]
    ids, masks = inputs["negative_input_ids"], inputs["negative_attention_mask"]
    assert ids.shape == masks.shape == (2, 2, len(null_prompt_ids(processor.tokenizer, 16, 16)))
    for row, mask, size in zip(
        ids.flatten(0, 1), masks.flatten(0, 1), inputs["image_sizes"].flatten(0, 1), strict=True
    ):
        assert row[mask.bool()].tolist() == null_prompt_ids(processor.tokenizer, *size.tolist())
        assert mask.tolist() == sorted(mask.tolist()), "padded on the left"


def test_a_negative_prompt_stands_before_the_size_of_every_picture(processor):
    inputs = processor(
        ["a", "b"],
        image_sizes=[[[16, 16], [8, 12]]] * 2,
        generation_mode="interleaved",
        negative_prompt=["green", None],
    )
    rows = [
        [row[mask.bool()].tolist() for row, mask in zip(*one, strict=True)]
        for one in zip(inputs["negative_input_ids"], inputs["negative_attention_mask"], strict=True)
    ]
    tokenizer = processor.tokenizer
    assert rows[0] == [prompt_ids(tokenizer, "green", 16, 16), prompt_ids(tokenizer, "green", 8, 12)]
    assert rows[1] == [null_prompt_ids(tokenizer, 16, 16), null_prompt_ids(tokenizer, 8, 12)]


def test_height_and_width_hold_for_all_pictures_of_a_document(processor):
    said = processor("a", height=8, width=12, generation_mode="interleaved")
    given = processor("a", image_sizes=[[8, 12]], generation_mode="interleaved")
    assert said["image_sizes"].tolist() == [[[8, 12]]]
    assert all(torch.equal(said[name], given[name]) for name in {*said, *given})


@pytest.mark.parametrize("coded", [True, False])
def test_pictures_of_a_prompt_are_counted_before_those_to_come(processor, coded):
    processor.image_tokenizer = processor.image_tokenizer if coded else None
    rows = [["a", picture(16, 16), "b", picture(16, 16)], ["c"]]
    inputs = processor(rows, image_sizes=[[[8, 8]], [[8, 12]]], generation_mode="interleaved", codes_per_step=3)
    assert inputs["image_sizes"].tolist() == [[[16, 16], [16, 16], [8, 8]], [[8, 12]] * 3]
    assert inputs["negative_input_ids"].shape[:2] == (2, 3) and ("pixel_values" in inputs) is not coded
    read = processor(rows, codes_per_step=3)
    assert torch.equal(inputs["input_ids"], read["input_ids"])
    marked = processor("a<imgpad>b", images=picture(16, 16), height=8, width=8, generation_mode="interleaved")
    assert marked["image_sizes"].tolist() == [[[16, 16], [8, 8]]]


def test_a_document_goes_through_the_model_row_by_row(processor, writer):
    rows = [["look: ", picture(16, 16)], ["a red apple"]]
    sizes = [[[8, 8], [8, 12]], [[12, 8], [8, 8]]]
    options = {"generation_mode": "interleaved", "max_new_tokens": 40, "do_sample": False}
    options["image_kwargs"] = {"guidance_scale": 3.0}
    inputs = processor(rows, image_sizes=sizes, generation_mode="interleaved")
    sequences = writer.generate(**inputs, **options)
    length = inputs["input_ids"].shape[1]
    documents = to_segments(processor, sequences, inputs["image_sizes"])
    answers = to_segments(processor, sequences, inputs["image_sizes"], prompt_length=length)
    pictures = 0
    for row, size, document, answer in zip(rows, sizes, documents, answers, strict=True):
        alone = processor([row], image_sizes=[size], generation_mode="interleaved")
        single = writer.generate(**alone, **options)
        (expected,) = to_segments(processor, single, alone["image_sizes"])
        assert same(document, expected)
        drawn = [part.size for part in answer if not isinstance(part, str)]
        assert drawn[:2] == [(width, height) for height, width in size][: len(drawn[:2])]
        assert set(drawn[2:]) <= {drawn[1] if len(drawn) > 1 else None}
        pictures += len(drawn)
    assert pictures >= 3
    assert documents[0][0] == "look: " and documents[0][1].size == (16, 16)


# ---- what is refused


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"codes_per_step": 0}, "1 or more, got 0"),
        ({"codes_per_step": True}, "1 or more, got True"),
        ({"codes_per_step": 2.0}, "1 or more, got 2.0"),
        ({"codes_per_step": 5, "height": 8, "width": 8}, "2x2 = 4.*got 5"),
        ({"codes_per_step": 17, "images": picture(16, 16)}, "4x4 = 16.*got 17"),
        ({"generation_mode": "image", "height": 8, "width": 8}, "'interleaved'.*got 'image'"),
        ({"generation_mode": "interleaved"}, "needs the sizes"),
        ({"generation_mode": "interleaved", "height": 8}, "go together"),
        ({"generation_mode": "interleaved", "height": 8, "width": 8, "image_sizes": [[[8, 8], [8, 4]]]}, "contradict"),
        ({"generation_mode": "interleaved", "image_sizes": [[[8, 8]], [[8, 8]]]}, "contradict 1 prompt"),
        ({"generation_mode": "interleaved", "image_sizes": [[[0, 0]]]}, "contradict 1 prompt"),
        ({"generation_mode": "interleaved", "image_sizes": [[[8, 8, 8]]]}, r"shape \(batch, pictures, 2\)"),
        ({"generation_mode": "interleaved", "image_sizes": [8, 8]}, r"shape \(batch, pictures, 2\)"),
        ({"generation_mode": "interleaved", "image_sizes": [[[8, 8], [8, 9]]]}, "multiple of 4, got 9"),
        ({"generation_mode": "interleaved", "image_sizes": [[[40, 52]]]}, "132 more, but only 128"),
        ({"image_sizes": [[[8, 8], [8, 4]]]}, "one size for each prompt"),
        ({"images": picture(16, 16), "image_sizes": [[[8, 8]]]}, "generation_mode='interleaved'"),
        (
            {"images": picture(16, 16), "task": "captioning", "return_labels": True, "generation_mode": "interleaved"},
            "task='captioning'",
        ),
    ],
)
def test_impossible_prompts_are_refused(processor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor("a", **kwargs)


def test_orders_that_a_picture_does_not_have_are_refused(make_processor):
    processor = make_processor("block2x2")
    for kwargs in ({"height": 12, "width": 8}, {"images": picture(12, 8), "do_resize": False}):
        with pytest.raises(ValueError, match="even number.*3x2"):
            processor("a", **kwargs)
    with pytest.raises(ValueError, match="multiple of 4 codes a step, got 3"):
        processor.training_example("captioning", "a", [0] * 16, 16, 16, codes_per_step=3)
    with pytest.raises(ValueError, match="1 or more, got -1"):
        processor.training_example("captioning", "a", [0] * 16, 16, 16, codes_per_step=-1)
    with pytest.raises(ValueError, match="'spiral'"):
        make_processor("spiral")


def test_rows_that_are_no_documents_are_refused(processor, tiny_model):
    ids = processor([["a", picture(16, 16), "b", picture(16, 16)]])["input_ids"]
    broken = ids.clone()
    broken[0, 4] = 7
    pixels = tiny_model.decode_image_tokens(ids, [[[16, 16]]])
    interleaved = {"generation_mode": "interleaved"}
    for outputs, kwargs, message in (
        (broken, interleaved, "holds id 7 in column 4, which is no image code: codes are ids 264 to 303"),
        (ids, {**interleaved, "image_sizes": [[[16, 20]]]}, r"16 codes, which do not make 16x20 pixels \(20 codes\)"),
        (ids, {**interleaved, "image_sizes": [[[16, 16], [8, 8]]]}, "do not make 8x8 pixels"),
        (ids, {**interleaved, "image_sizes": [[[0, 0]]]}, "give the size of every picture"),
        (ids, {**interleaved, "image_sizes": [[[16, 16]]] * 2}, "1 sequences cannot share 2 rows"),
        (ids, {**interleaved, "pixel_values": pixels[:1]}, r"pictures of \[16\] codes, but .* \[16, 16\]"),
        (ids, {**interleaved, "pixel_values": [pixels[0], pixels[0][:, :8]]}, r"pictures of \[16, 8\] codes"),
        (pixels, interleaved, "token ids"),
        (torch.tensor([[-100, 3]]), interleaved, "0 or more"),
        (ids, {"generation_mode": "text", "prompt_length": 3}, "go with `generation_mode='interleaved'`"),
        (pixels, {"generation_mode": "image", "pixel_values": pixels}, "go with `generation_mode='interleaved'`"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.post_process_multimodal_output(outputs, **kwargs)
    processor.image_tokenizer = None
    with pytest.raises(ValueError, match="model.vqgan.*model.decode_image_tokens"):
        to_segments(processor, ids, [[[16, 16]]])


def test_emission_is_undone_by_reading():
    codes = torch.randperm(15).view(3, 5)
    for k, order in ((1, "raster"), (4, "raster"), (4, "region"), (3, "region")):
        row = torch.cat([torch.full((k,), 118), to_emission_order(codes, k, order) + 100, torch.tensor([119])])
        tokens = PictureTokens(100, 118, 119, 4, order)
        assert torch.equal(tokens.collect([row], [[[12, 20]]])[0][0], codes)


@pytest.mark.parametrize("k", [1, 4])
def test_a_model_fills_places_as_its_image_tokenizer_would_have(make_model, processor, k):
    text = {"vocab_size": 264, "eos_token_id": 256, "pad_token_id": 256}
    model = make_model(text=text, code_order="region", cell_embedding=True, max_grid_size=8)
    rows = [["a", picture(16, 24), "b", picture(16, 16, seed=1)], [picture(16, 16, seed=2), "c"]]
    made = MarsProcessor(processor.image_processor, processor.tokenizer, code_order="region")
    places = made(rows, do_resize=False, codes_per_step=k)
    made.image_tokenizer = model.vqgan
    expected = made(rows, do_resize=False, codes_per_step=k)["input_ids"]
    assert torch.equal(model.fill_image_codes(places["input_ids"], places["pixel_values"]), expected)
