"""Super-resolution: prompts with a small picture, its cells, drawing and training."""

import pytest
import torch
from torch.nn import functional as F

from mars_hf import MarsProcessor
from mars_hf.code_order_mars import PictureLayout, emission_order, find_cells
from mars_hf.image_processing_mars import decode_codes, enlarge_codes
from mars_hf.training.collation import AlignedCollator, PackedCollator
from mars_hf.training.mixture import MixtureDataset, Source
from mars_hf.training.run import with_other_config

TEXT = {"vocab_size": 264, "eos_token_id": 256, "pad_token_id": 256}


@pytest.fixture
def make_enlarger(make_model):
    """Random models that double the sides of pictures, whose cell embeddings are not zero."""

    def make(**fields):
        fields = {"cell_embedding": True, "max_grid_size": 8, "super_resolution_factor": 2, **fields}
        model = make_model(text=TEXT, **fields).double().eval()
        for name, table in model.model.named_parameters():
            if "cell_embedding" in name:
                torch.nn.init.normal_(table, std=0.3)
        return model

    return make


@pytest.fixture
def enlarger(make_enlarger):
    return make_enlarger(code_order="block2x2", codes_per_step=[4, 1])


def processor_of(model, tiny_processor):
    tokenizer = tiny_processor.tokenizer  # the specials stand where they did: the vocabularies are equal
    return MarsProcessor(
        tiny_processor.image_processor, tokenizer, code_order=model.config.code_order, super_resolution_factor=2
    )


def small_codes(rows, columns, seed=0):
    return torch.randint(0, 40, (rows, columns), generator=torch.Generator().manual_seed(seed))


def test_a_prompt_is_caption_size_and_small_picture_and_so_is_the_unconditional_one(enlarger, tiny_processor):
    processor, config = processor_of(enlarger, tiny_processor), enlarger.config
    codes = small_codes(2, 3)
    batch = processor("an apple", lowres_codes=[codes])
    small = [config.lowres_start_token_id, *(codes.flatten() + config.image_token_offset).tolist()]
    small.append(config.lowres_end_token_id)
    words = processor.tokenizer("an apple 16x24")["input_ids"]
    assert batch["input_ids"].tolist() == [words + small]
    negative = [config.null_token_id, *processor.tokenizer(" 16x24")["input_ids"], *small]
    assert batch["negative_input_ids"].tolist() == [negative]
    assert batch["image_sizes"].tolist() == [[[16, 24]]]


def test_small_pictures_are_brought_to_size_and_encoded_row_by_row(enlarger, tiny_processor):
    processor = processor_of(enlarger, tiny_processor)
    pixels = torch.randint(0, 256, (3, 20, 20), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    places = processor(["an apple", "a pear"], lowres_images=[pixels, pixels], height=16, width=16)
    assert places["pixel_values"].shape == (2, 3, 8, 8)
    grids = enlarger.encode_image(places["pixel_values"])
    processor.image_tokenizer = enlarger.vqgan
    filled = processor(["an apple", "a pear"], lowres_images=[pixels, pixels], height=16, width=16)
    assert "pixel_values" not in filled
    assert torch.equal(filled["input_ids"], enlarger.place_codes(places["input_ids"], grids))
    assert torch.equal(filled["input_ids"], processor(["an apple", "a pear"], lowres_codes=grids)["input_ids"])
    drawn = [enlarger.generate(**one, generation_mode="image", guidance_scale=2.0) for one in (places, filled)]
    assert torch.equal(*drawn)


def test_a_small_code_holds_the_upper_left_of_the_cells_that_come_of_it(enlarger, tiny_processor):
    processor, config = processor_of(enlarger, tiny_processor), enlarger.config
    row = processor.training_example(
        "super-resolution", "a", range(24), 16, 24, codes_per_step=4, lowres_codes=range(6)
    )
    ids = torch.tensor([row["input_ids"]])
    layout = PictureLayout.of(ids, config.image_token_offset, config.image_start_token_id)
    cells = find_cells(config, ids, layout, [[(16, 24)]])[0]
    start = row["input_ids"].index(config.lowres_start_token_id)
    held = [[0, 0, -1, -1], [0, 2, -1, -1], [0, 4, -1, -1], [2, 0, -1, -1], [2, 2, -1, -1], [2, 4, -1, -1]]
    assert cells[start + 1 : start + 7].tolist() == held
    assert (cells[: start + 1] == -1).all() and (cells[start + 7] == -1).all()
    slots = cells[start + 8 : start + 12]  # the copies of <img> predict the children of the first small code
    assert slots.tolist() == [[-1, -1, 0, 0], [-1, -1, 0, 1], [-1, -1, 1, 0], [-1, -1, 1, 1]]


def test_a_token_is_told_the_code_that_the_enlarged_small_picture_has_where_it_predicts(make_enlarger, tiny_processor):
    model = make_enlarger(code_order="block2x2", codes_per_step=[4, 1], lowres_embedding=True)
    processor, config, small = processor_of(model, tiny_processor), model.config, small_codes(2, 3)
    with torch.no_grad():
        pixels = F.interpolate(
            torch.stack(decode_codes(model.vqgan, [small])), scale_factor=2, mode="bicubic", antialias=True
        )
    (large,) = model.encode_image(pixels.clamp(-1, 1))  # (4, 6)
    row = processor.training_example("super-resolution", "a", range(24), 16, 24, codes_per_step=4, lowres_codes=small)
    ids = torch.tensor([row["input_ids"]])
    seen = []
    model.model.visual_cell_embedding.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(ids, image_sizes=torch.tensor([[[16, 24]]]))
    (cells,) = seen[0]
    predicts = cells[:, 2] >= 0
    assert predicts.sum() == 24 and (cells[~predicts, 4] == -1).all()
    assert torch.equal(cells[predicts, 4], large[cells[predicts, 2], cells[predicts, 3]])
    first = row["input_ids"].index(config.image_start_token_id)
    assert cells[first : first + 4, 4].tolist() == large[:2, :2].flatten().tolist()


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize(("order", "k"), [("raster", 1), ("raster", 3), ("region", 4), ("block2x2", 4)])
def test_the_decoder_sees_the_small_picture_as_the_forward_does(make_enlarger, tiny_processor, order, k, embeds):
    model = make_enlarger(code_order=order, codes_per_step=k, lowres_embedding=embeds)
    processor = processor_of(model, tiny_processor)
    inputs = processor(["an apple", "a"], lowres_codes=[small_codes(2, 2), small_codes(2, 2, 1)], codes_per_step=k)
    out = model.generate(
        **inputs, generation_mode="image", guidance_scale=1.0, codes_per_step=k, output_scores=True,
        return_dict_in_generate=True, do_sample=True, top_k=0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    mask = F.pad(inputs["attention_mask"], (0, out.sequences.shape[1] - inputs["attention_mask"].shape[1]), value=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(
        out.sequences, attention_mask=mask, position_ids=positions, image_sizes=inputs["image_sizes"],
        codes_per_step=k,
    ).logits  # fmt: skip
    width, offset = inputs["input_ids"].shape[1], model.config.image_token_offset
    scores = torch.stack(out.scores, 1)[..., offset : offset + 40]
    assert scores.shape[1] == 16
    assert (logits[:, width : width + 16, offset : offset + 40] - scores).abs().max() < 1e-10
    # Another small picture is another drawing: it is read.
    other = processor(["an apple", "a"], lowres_codes=[small_codes(2, 2, 2), small_codes(2, 2, 3)], codes_per_step=k)
    assert not torch.equal(inputs["input_ids"], other["input_ids"])
    changed = model(
        torch.cat([other["input_ids"], out.sequences[:, width:]], 1), attention_mask=mask, position_ids=positions,
        image_sizes=inputs["image_sizes"], codes_per_step=k,
    ).logits  # fmt: skip
    assert (changed - logits)[:, width:, :offset].abs().max() > 1e-3


def test_guided_rows_of_several_sizes_draw_as_they_do_alone(enlarger, tiny_processor):
    processor = processor_of(enlarger, tiny_processor)
    codes = [small_codes(2, 2), small_codes(2, 3, 1)]
    texts = ["an apple", "a"]
    options = {"generation_mode": "image", "guidance_scale": 3.0, "codes_per_step": 4}
    both = processor(texts, lowres_codes=codes, codes_per_step=4)
    drawn = enlarger.collect_image_codes(enlarger.generate(**both, **options), both["image_sizes"])
    for row, (text, small) in enumerate(zip(texts, codes, strict=True)):
        one = processor(text, lowres_codes=[small], codes_per_step=4)
        alone = enlarger.collect_image_codes(enlarger.generate(**one, **options), one["image_sizes"])
        assert torch.equal(drawn[row][0], alone[0][0])


def test_training_rows_label_the_large_codes_alone(enlarger, tiny_processor):
    processor, config = processor_of(enlarger, tiny_processor), enlarger.config
    codes = torch.arange(16)
    for drop in (False, True):
        row = processor.training_example(
            "super-resolution", "a", codes, 16, 16, drop_caption=drop, codes_per_step=4, lowres_codes=small_codes(2, 2)
        )
        order = emission_order(4, 4, 4, "block2x2")
        labelled = [label for label in row["labels"] if label != -100]
        assert labelled == (codes[order] + config.image_token_offset).tolist()
        prompt = processor("a", lowres_codes=[small_codes(2, 2)])
        name = "negative_input_ids" if drop else "input_ids"
        assert row["input_ids"][: prompt[name].shape[1]] == prompt[name][0].tolist()


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("steps", [(4,), (4, 1)])
def test_packed_and_padded_batches_give_the_loss_of_single_rows(make_enlarger, tiny_processor, steps, embeds):
    enlarger = make_enlarger(code_order="block2x2", codes_per_step=[4, 1], lowres_embedding=embeds)
    processor, config = processor_of(enlarger, tiny_processor), enlarger.config
    records = [
        {"image_codes": small_codes(4, 4, n).flatten().tolist(), "height": 16, "width": 16, "caption_en": "ab" * n,
         "lowres_codes": small_codes(2, 2, n).flatten().tolist()}
        for n in range(1, 4)
    ]  # fmt: skip
    records[1] |= {"image_codes": list(range(24)), "width": 24, "lowres_codes": list(range(6))}
    for record in records if embeds else ():
        small = torch.tensor(record["lowres_codes"]).view(2, -1)
        (large,) = enlarge_codes(enlarger.vqgan, [small], 2)
        record["enlarged_codes"] = large.flatten().tolist()
    noise = 0.0 if embeds else 0.3  # a forward enlarges what it is fed, the noise too
    source = Source("super-resolution", 1.0, records, lambda record, rng: record["caption_en"], code_noise=noise)
    rows = [MixtureDataset(processor, [source], 3, 1, codes_per_step=(k,))[n] for k in steps for n in range(3)]
    pad = processor.tokenizer.pad_token_id

    def total(batch):
        inputs = {
            name: value
            for name, value in batch.items()
            if name in ("input_ids", "attention_mask", "position_ids", "block_ids", "cells")
        }
        logits = enlarger(**inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="sum")

    def total_alone(row):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        layout = PictureLayout.of(ids, config.image_token_offset, config.image_start_token_id)
        k = row["input_ids"].count(config.image_start_token_id)
        logits = enlarger(ids, codes_per_step=k, image_sizes=torch.tensor([row["image_sizes"]])).logits
        return F.cross_entropy(logits[0], layout.shift_labels(labels)[0], reduction="sum")

    alone = sum(total_alone(row) for row in rows)
    padded = total(AlignedCollator(config, pad, prompt_multiple=1)(rows))
    packed = total(PackedCollator(config, pad, 280)([rows]))
    assert abs(padded - alone) < 1e-8 and abs(packed - alone) < 1e-8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "give `lowres_images` or `lowres_codes`"),
        ({"lowres_codes": [small_codes(2, 3)]}, "8x8 pixels has 4 codes, got 6"),
        ({"lowres_codes": [small_codes(2, 2)] * 2}, "got 2 for 1"),
        ({"lowres_codes": [small_codes(2, 2)], "height": 20, "width": 16}, "must be a multiple of 8, got 20"),
    ],
)
def test_a_small_picture_that_does_not_fit_is_refused(enlarger, tiny_processor, call, message):
    processor = processor_of(enlarger, tiny_processor)
    processor.code_order = "raster"
    with pytest.raises(ValueError, match=message):
        processor("a", **{"height": 16, "width": 16, **call})


def test_models_refuse_prompts_of_the_other_kind(enlarger, tiny_model, tiny_processor):
    with pytest.raises(ValueError, match="draws from text alone"):
        tiny_processor("a", lowres_codes=[small_codes(2, 2)])
    prompt = processor_of(enlarger, tiny_processor)("a", lowres_codes=[small_codes(2, 2)])
    with pytest.raises(ValueError, match="draws from text alone"):
        tiny_model.generate(**prompt, generation_mode="image")
    plain = tiny_processor("a", height=16, width=16)
    with pytest.raises(ValueError, match="row 0 has no single one"):
        enlarger.generate(**plain, generation_mode="image")
    with pytest.raises(ValueError, match="row 0 has 4"):
        enlarger.generate(**prompt | {"image_sizes": torch.tensor([[[16, 24]]])}, generation_mode="image")


def test_embeddings_of_the_enlarged_picture_start_as_those_of_the_same_codes(tiny_model, tiny_processor):
    changes = {"super_resolution_factor": 2, "cell_embedding": True, "max_grid_size": 8, "lowres_embedding": True}
    model, processor = with_other_config(tiny_model, tiny_processor, changes)
    table = model.model.visual_cell_embedding.lowres_code
    assert torch.equal(table, tiny_model.model.visual_embed_tokens.weight[:40]) and table.requires_grad
    torch.nn.init.zeros_(table)
    again, _ = with_other_config(model, processor, {"codes_per_step": [4]})
    assert not again.model.visual_cell_embedding.lowres_code.any()  # what a base has learnt stays


def test_the_enlarged_small_picture_asks_for_codes_of_it_and_for_cells(make_enlarger, make_model, tiny_processor):
    for fields in ({}, {"super_resolution_factor": 2}, {"cell_embedding": True}):
        with pytest.raises(ValueError, match="`lowres_embedding` is True, but it goes with"):
            make_model(lowres_embedding=True, **fields)
    model = make_enlarger(lowres_embedding=True)
    row = processor_of(model, tiny_processor).training_example("text-to-image", "a", range(16), 16, 16)
    with pytest.raises(
        ValueError, match=r"runs of \[\] tokens, where pictures of \[\(16, 16\)\] pixels start from \[4\]"
    ):
        model(torch.tensor([row["input_ids"]]), image_sizes=torch.tensor([[[16, 16]]]))
    with pytest.raises(ValueError, match="needs the `enlarged` codes of every"):
        AlignedCollator(model.config, 0)([{**row, "image_sizes": [(16, 16)]}])


@pytest.mark.parametrize("factor", [1, 3])
def test_a_factor_must_divide_the_default_size(make_model, factor):
    with pytest.raises(ValueError, match="super_resolution_factor"):
        make_model(super_resolution_factor=factor)
