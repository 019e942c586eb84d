"""Data of a recipe: what is left out before the first step, what is known from an earlier start, what tasks share."""

import json
from collections import Counter

import pytest
import torch
from datasets import Dataset
from PIL import Image

from mars_hf import MarsProcessor
from mars_hf.data import records
from mars_hf.data.encode import encode_records as encode
from mars_hf.training import sources
from mars_hf.training.mixture import MixtureDataset, MixtureStream, Source
from mars_hf.training.recipe import Recipe
from mars_hf.training.run import make_trainer
from mars_hf.training.sources import build_sources, rows_of_an_epoch


def pair(number=0, height=16, width=16, **changes):
    codes = [(number + place) % 40 for place in range(height * width // 16)]
    texts = {"caption_en": f"apple {number}", "caption_zh": f"苹果{number}", "style": "noto"}
    small = {"lowres_codes": codes[: len(codes) // 4], "enlarged_codes": codes}
    return {"image_codes": codes, "height": height, "width": width, **small, **texts, **changes}


@pytest.fixture
def recipe_of(tiny_model, tiny_processor, tmp_path):
    """Give a recipe on records of pairs, of which those given are bad."""
    tiny_model.save_pretrained(tmp_path / "base")
    tiny_processor.save_pretrained(tmp_path / "base")

    def make(bad=(), stage="alignment", config=None, packing=None, ks=None, good=200, **part):
        rows = [pair(number) for number in range(good)]
        rows[7:7] = bad
        Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
        source = {"source": str(tmp_path / "pairs.parquet"), "task": "text-to-image", **part}
        values = {
            "stage": stage,
            "model": {"base": str(tmp_path / "base"), "config": config or {}},
            "data": [source],
            "training": {"max_steps": 2, "per_device_train_batch_size": 2},
            "packing": packing,
            "codes_per_step": ks,
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(values))
        return Recipe.load(tmp_path / "recipe.yaml")

    return make


STAGE_3 = {"stage": "super-resolution", "task": "super-resolution", "ks": [1]}
FACTOR = {"super_resolution_factor": 2}
CELLS = {"cell_embedding": True, "max_grid_size": 4}
ENLARGED = {**FACTOR, **CELLS, "lowres_embedding": True}


@pytest.mark.parametrize(
    ("bad", "changes", "reason"),
    [
        ([pair(caption_en="a" * 60, caption_zh=None)], {"packing": 64}, "row too long"),
        ([pair(height=48, width=48)], {}, "row too long"),  # 144 codes in a context of 128
        ([pair(height=20)], {"config": CELLS, "ks": [1]}, "picture too large"),
        ([pair(height=12, lowres_codes=[1] * 3)], {**STAGE_3, "config": FACTOR}, "low-resolution codes do not fit"),
        ([pair(lowres_codes=None)], {**STAGE_3, "config": FACTOR}, "low-resolution codes do not fit"),
        ([pair(lowres_codes=[1, 2, 3, 40])], {**STAGE_3, "config": FACTOR}, "codes out of range"),
        ([pair(enlarged_codes=None)], {**STAGE_3, "config": ENLARGED}, "enlarged codes do not fit"),
        ([pair(enlarged_codes=[1] * 15)], {**STAGE_3, "config": ENLARGED}, "enlarged codes do not fit"),
        ([pair(enlarged_codes=[1] * 15 + [-1])], {**STAGE_3, "config": ENLARGED}, "codes out of range"),
        ([pair(style=None)], {"captions": {"form": "emoji"}}, "no caption"),
        ([pair(caption_zh="")], {"captions": {"form": "emoji"}}, "no caption"),
        ([pair(height=4, width=8)], {"min_size": 8}, "picture too small"),
        ([pair(height=4, width=24)], {"max_aspect_ratio": 2.0}, "picture too elongated"),
    ],
)
def test_a_record_of_which_no_row_can_be_made_is_left_out_before_the_first_step(
    recipe_of, tmp_path, bad, changes, reason
):
    recipe = recipe_of(bad, **changes)
    trainer, _ = make_trainer(recipe, tmp_path / "run")
    (source,) = getattr(trainer.train_dataset, "rows", trainer.train_dataset).sources
    assert source.bad_records.reasons == {reason: 1} and len(source.records) == 200


def test_orders_and_low_resolution_that_do_not_fit_a_grid_are_left_out(recipe_of, tmp_path):
    config = {"code_order": "block2x2", "cell_embedding": True, "codes_per_step": [4]}
    recipe = recipe_of([pair(height=12)], config=config, ks=[4])
    trainer, _ = make_trainer(recipe, tmp_path / "run")
    assert trainer.train_dataset.sources[0].bad_records.reasons == {"picture cannot be drawn in this order": 1}


def test_more_than_a_share_of_such_records_ends_the_run_before_it_begins(recipe_of, tmp_path):
    long = [pair(caption_en="a" * 60) for _ in range(3)]
    with pytest.raises(ValueError, match=r"More than 1.0% .*3 row too long.*`packing`"):
        make_trainer(recipe_of(long, packing=64), tmp_path / "run")


def test_every_form_of_a_caption_has_to_fit(recipe_of, tmp_path):
    captions = {"form": "emoji", "named_style": 1.0, "phrase": 1.0}
    label = pair(caption_en="a" * 12)  # "a picture of an aaaaaaaaaaaa, noto style 16x16" does not
    recipe = recipe_of([label], packing=64, captions=captions)
    (source,) = make_trainer(recipe, tmp_path / "run")[0].train_dataset.rows.sources
    assert source.bad_records.reasons == {"row too long": 1}


def test_an_epoch_is_as_long_in_any_order_of_the_sources(recipe_of, tiny_model, tiny_processor):
    recipe = recipe_of([pair(score=9.0)] * 3 + [pair(score=1.0)] * 5, good=0)
    recipe.data += [type(recipe.data[0])(recipe.data[0].source, "captioning", min_score=5.0)]
    recipe.data += [type(recipe.data[0])(recipe.data[0].source, "captioning")]
    for order in (1, -1):
        recipe.data = recipe.data[::order]
        assert rows_of_an_epoch(build_sources(recipe, tiny_model, tiny_processor)) == 8 + 3


def test_a_row_as_long_as_a_pack_is_kept(recipe_of, tmp_path):
    # 16 codes, `<img>`, `</img>`, the end, and " 16x16" leave 39 bytes of 64 to a caption.
    fits, too_long = pair(caption_en="a" * 39, caption_zh=None), pair(caption_en="a" * 40, caption_zh=None)
    trainer, _ = make_trainer(recipe_of([fits, too_long], packing=64), tmp_path / "run")
    assert len(trainer.train_dataset.rows.sources[0].records) == 201
    for pack in zip(range(99), trainer.train_dataset, strict=False):
        assert pack


def test_pictures_are_encoded_once_before_the_first_step(recipe_of, tmp_path, monkeypatch):
    pictures = [Image.new("RGB", (24, 16), (9 * number, 90, 200)) for number in range(12)]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"kite {number}"}) for number in range(12)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    recipe = recipe_of(encode={"short_side": 8}, min_size=16, max_aspect_ratio=1.5)  # of the pictures as they come
    recipe.data[0].source, recipe.data[0].columns = str(folder), {"text": "caption_en"}
    calls = []

    def counted(*args, **options):
        calls.append(encode(*args, **options))
        return calls[-1]

    monkeypatch.setattr(sources, "encode_records", counted)
    for _ in range(2):
        trainer, _ = make_trainer(recipe, tmp_path / "run")
    found = trainer.train_dataset.sources[0].records
    assert {(row["height"], row["width"], len(row["image_codes"])) for row in found} == {(8, 12, 6)}
    assert len(list((tmp_path / "run").glob("codes-*/data/*.parquet"))) == 1 and calls[0].num_seen == 12
    to_pixels = MarsProcessor.from_pretrained(tmp_path / "base").image_processor
    pixels = to_pixels(pictures[3], size={"shortest_edge": 8}, return_tensors="pt")["pixel_values"]
    own = trainer.model.encode_image(pixels)[0].flatten().tolist()
    assert found["image_codes"][3] == own and found["caption_en"][3] == "kite 3"
    trainer.train()


def test_what_a_run_does_not_encode_is_told_and_tasks_may_have_rules_of_their_own(recipe_of, tmp_path, monkeypatch):
    rows = [{"image": Image.new("RGB", (side, side), "red"), "caption_en": "red kite"} for side in (16, 16, 8)]
    Dataset.from_list(rows).to_parquet(tmp_path / "pictures.parquet")
    recipe = recipe_of(encode={"size": [16, 16]}, min_size=12, max_caption_length=3)
    recipe.data[0].source = str(tmp_path / "pictures.parquet")
    recipe.data += [type(recipe.data[0])(recipe.data[0].source, "captioning", encode={"size": [16, 16]})]
    told: list[str] = []
    monkeypatch.setattr(sources.logger, "warning", told.append)
    drawn, captioned = make_trainer(recipe, tmp_path / "run")[0].train_dataset.sources
    assert [line.partition(": ")[2] for line in told] == [
        "1 of 3 records were left out (1 picture too small), 3 had a caption that is too long."
    ]
    assert drawn.records["caption_en"] == ["red"] * 2 and captioned.records["caption_en"] == ["red kite"] * 3


def test_small_codes_come_along_where_super_resolution_trains(recipe_of, tmp_path):
    data = Dataset.from_list([{"image": Image.new("RGB", (20, 20), "red"), "caption_en": "red"}] * 4)
    data.to_parquet(tmp_path / "pictures.parquet")
    recipe = recipe_of(**STAGE_3, config=FACTOR, encode={"size": [16, 16]})
    recipe.data[0].source = str(tmp_path / "pictures.parquet")
    found = make_trainer(recipe, tmp_path / "run")[0].train_dataset.sources[0].records
    assert {(len(row["image_codes"]), len(row["lowres_codes"])) for row in found} == {(16, 4)}


def test_what_was_left_out_is_known_at_the_next_start_and_not_when_data_or_recipe_change(
    recipe_of, tmp_path, monkeypatch
):
    checked = []
    find = sources.find_bad_records

    def counted(dataset, *args, **kwargs):
        checked.append(len(dataset))
        return find(dataset, *args, **kwargs)

    monkeypatch.setattr(sources, "find_bad_records", counted)
    recipe = recipe_of([pair(height=48, width=48)])
    found = [make_trainer(recipe, tmp_path / "run")[0].train_dataset.sources[0] for _ in range(2)]
    assert checked == [201]
    assert found[0].bad_records == found[1].bad_records and found[1].bad_records.reasons == {"row too long": 1}
    assert found[0].records["caption_en"] == found[1].records["caption_en"]
    make_trainer(recipe_of([pair(height=48, width=48)], min_size=8), tmp_path / "run")
    make_trainer(recipe_of([], min_size=8), tmp_path / "run")
    assert checked == [201, 201, 200]


def test_tasks_of_the_same_data_check_it_once_and_show_each_record_in_one_of_them(
    recipe_of, tiny_model, tiny_processor, monkeypatch
):
    opened = []
    monkeypatch.setattr(sources, "open_records", lambda *args: opened.append(args) or records.open_records(*args))
    recipe = recipe_of(good=12)
    recipe.data.append(type(recipe.data[0])(recipe.data[0].source, "captioning"))
    both = build_sources(recipe, tiny_model, tiny_processor)
    assert len(opened) == 1 and both[0].records is both[1].records
    rows = MixtureDataset(tiny_processor, both, batch_size=2, num_batches=12)
    shown = [rows.record_of(index)["caption_en"] for index in range(len(rows))]
    assert {len(set(shown[start : start + 12])) for start in (0, 12)} == {12}
    assert {rows.source_of(index).task for index in range(12)} == {"text-to-image", "captioning"}
    streamed = list(MixtureStream(tiny_processor, both, batch_size=2, num_batches=12))
    assert streamed == [rows[index] for index in range(len(rows))]


def test_weighted_sources_of_the_same_data_have_passes_of_their_own(tiny_processor):
    data, first = [pair(number) for number in range(4)], torch.tensor([1.0, 0.0, 0.0, 0.0])
    captions = {"write_caption": lambda record, rng: record["caption_en"]}
    both = [Source("text-to-image", 0.5, data, weights=first, **captions), Source("captioning", 0.5, data, **captions)]
    rows = MixtureDataset(tiny_processor, both, batch_size=2, num_batches=12)
    shown = [(rows.source_of(index).task, rows.record_of(index)["caption_en"]) for index in range(len(rows))]
    counts = Counter(shown)
    assert {name for task, name in counts if task == "text-to-image"} == {"apple 0"}
    captioned = [name for task, name in shown if task == "captioning"]
    assert len(set(captioned[:4])) == 4
