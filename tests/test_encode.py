"""Encoding: codes are those of the processor, runs continue after a kill, codes of another tokenizer are refused."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration
from mars_hf.cli import app
from mars_hf.data import encode
from mars_hf.data.encode import encode_records, load_image_tokenizer
from mars_hf.data.records import (
    RecordRules,
    open_records,
    source_fingerprint,
    tokenizer_fingerprint,
    validate_records,
)
from mars_hf.image_processing_mars import MarsImageProcessor

NUM, BROKEN = 11, 5
SAME = {"shard_size": 3, "limit": 0.2, "progress": False}  # of all runs here


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def vqgan(make_vqgan):
    return make_vqgan()


@pytest.fixture
def image_processor() -> MarsImageProcessor:
    return MarsImageProcessor(size={"height": 16, "width": 16}, downsample_factor=4)


def picture(number: int) -> Image.Image:
    """Pictures of three sizes: 20 x 30, 21 x 31 and 22 x 32."""
    shape = (20 + number % 3, 30 + number % 3, 3)
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def make_records(broken: int | None = BROKEN) -> datasets.Dataset:
    rows = [
        {
            "image": {"bytes": png(i)[: -900 if i == broken else None], "path": None},
            "caption_en": f"apple {i}",
            "caption_zh": None if i % 2 else f"苹果{i}",
            "style": "noto",
        }
        for i in range(NUM)
    ]
    return open_records(datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()))


def run(records, out: Path, vqgan, image_processor, **options) -> list[dict]:
    encode_records(records, out, vqgan, image_processor, **{**SAME, **options})
    return list(open_records(out, vqgan=vqgan))


@pytest.mark.parametrize("size", [{"height": 16, "width": 16}, {"shortest_edge": 16}, {"height": 8, "width": 24}])
def test_codes_are_those_of_each_picture_alone(tmp_path: Path, vqgan, image_processor, size: dict) -> None:
    rows = run(make_records(), tmp_path, vqgan, image_processor, size=size, batch_size=2)
    kept = [i for i in range(NUM) if i != BROKEN]
    assert [row["caption_en"] for row in rows] == [f"apple {i}" for i in kept]
    for number, row in zip(kept, rows, strict=True):
        pixels = image_processor(picture(number), size=size, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            latents = vqgan.encode(pixels).latents[0].flatten(1).T  # (codes, channels) in raster order
        expected = torch.cdist(latents.double(), vqgan.quantize.embedding.weight.detach().double()).argmin(1)
        assert row["image_codes"] == expected.tolist()
        assert (row["height"], row["width"]) == tuple(pixels.shape[-2:])
        assert (row["caption_zh"], row["style"]) == (None if number % 2 else f"苹果{number}", "noto")
        assert "image" not in row
    # At a shorter side of 16 they are 24, 23.6 and 23.3 wide, that is 24, 24 and 23, cut to whole codes of 4.
    expected_sizes = {(16, 24), (16, 20)} if "shortest_edge" in size else {(size["height"], size["width"])}
    assert {(row["height"], row["width"]) for row in rows} == expected_sizes
    good, _ = validate_records(open_records(tmp_path), RecordRules(codebook_size=40, downsample_factor=4))
    assert len(good) == len(rows)


def test_codes_are_what_the_processor_feeds_the_model(tmp_path: Path, tiny_model, tiny_processor) -> None:
    rows = run(make_records(), tmp_path, tiny_model.vqgan, tiny_processor.image_processor)
    tiny_processor.image_tokenizer = tiny_model.vqgan
    for number, row in zip([i for i in range(NUM) if i != BROKEN], rows, strict=True):
        ids = tiny_processor(images=picture(number))["input_ids"][0].tolist()
        start, end = (ids.index(tiny_processor.tokenizer.convert_tokens_to_ids(name)) for name in ("<img>", "</img>"))
        assert [code + tiny_processor.image_token_offset for code in row["image_codes"]] == ids[start + 1 : end]


@pytest.mark.parametrize("split", ["train[:4]", "train+test", "../train", ""])
def test_a_split_that_names_no_file_is_refused(tmp_path: Path, vqgan, image_processor, split: str) -> None:
    with pytest.raises(ValueError, match="`split` names what is written"):
        run(make_records(), tmp_path / "codes", vqgan, image_processor, split=split)
    assert not (tmp_path / "codes").exists()


def test_a_split_that_was_not_encoded_is_refused_with_those_that_were(tmp_path: Path, vqgan, image_processor) -> None:
    run(make_records(), tmp_path, vqgan, image_processor)
    with pytest.raises(ValueError, match="no codes of the split 'validation', only of train.*--split validation"):
        open_records(tmp_path, "validation", vqgan=vqgan)


def test_the_embedded_image_tokenizer_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vqgan, image_processor = encode.load_image_tokenizer("mars-emoji")
    assert tokenizer_fingerprint(vqgan) == tokenizer_fingerprint(encode.load_image_tokenizer(DEFAULT_CHECKPOINT)[0])
    assert image_processor.size == {"height": 64, "width": 64}


def test_pictures_of_one_size_share_calls_of_at_most_a_batch(
    tmp_path: Path, vqgan, image_processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def spy(vqgan, pixels):
        calls.append([tuple(one.shape[-2:]) for one in pixels])
        return original(vqgan, pixels)

    original = encode.encode_pixels
    monkeypatch.setattr(encode, "encode_pixels", spy)
    run(make_records(None), tmp_path, vqgan, image_processor, size={"shortest_edge": 16}, batch_size=3, shard_size=99)
    # Pictures 2, 5 and 8 are 20 wide, the other eight 24.
    assert sorted((len(call), *call[0]) for call in calls) == [(2, 16, 24), (3, 16, 20), (3, 16, 24), (3, 16, 24)]
    assert all(len(set(call)) == 1 for call in calls)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("step", ["_write_shard", "write_manifest"])
@pytest.mark.parametrize("moment", [0, 1, 2, 3])
def test_a_run_that_was_killed_continues_and_gives_the_same_files(
    tmp_path: Path, vqgan, image_processor, monkeypatch: pytest.MonkeyPatch, moment: int, step: str, streaming: bool
) -> None:
    records = make_records()
    records = records.to_iterable_dataset(2) if streaming else records
    rows = run(records, tmp_path / "whole", vqgan, image_processor)
    original, calls = getattr(encode, step), []

    def killed(*args):
        calls.append(args)
        if len(calls) == moment + 1:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(encode, step, killed)
        with pytest.raises(KeyboardInterrupt):
            run(records, tmp_path / "parts", vqgan, image_processor)
    if (tmp_path / "parts" / "codes.json").exists():
        with pytest.raises(ValueError, match="'train' .* not complete. Run again .* `mars-hf data encode`"):
            open_records(tmp_path / "parts")
    assert run(records, tmp_path / "parts", vqgan, image_processor) == rows
    whole, parts = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("[!.]*.*")} for name in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 5  # four files of codes and `codes.json`


def test_a_continued_run_encodes_only_what_is_left(
    tmp_path: Path, vqgan, image_processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = encode._encode

    def killed(records, *args, **kwargs):
        seen.append([index for index, _ in records])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(records, *args, **kwargs)

    monkeypatch.setattr(encode, "_encode", killed)
    with pytest.raises(KeyboardInterrupt):
        run(make_records(), tmp_path, vqgan, image_processor)
    run(make_records(), tmp_path, vqgan, image_processor)
    assert seen == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8], [9, 10]]
    run(make_records(), tmp_path, vqgan, image_processor)
    assert len(seen) == 5


def test_what_was_left_out_is_counted_by_reason_also_over_an_interruption(
    tmp_path: Path, vqgan, image_processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = RecordRules(min_size=21)  # pictures 0, 3, 6, 9 are 20 high; 5 is broken
    bad_records = encode_records(
        make_records(), tmp_path, vqgan, image_processor, shard_size=2, rules=rules, limit=0.2, progress=False
    )
    expected = {"picture too small": 4, "unreadable picture": 1}
    assert bad_records.reasons == expected and bad_records.num_seen == NUM
    manifest = json.loads((tmp_path / "codes.json").read_text())
    assert manifest["splits"]["train"] == {
        "num_records": NUM, "complete": True, "shards": 6, "seen": NUM, "records": 6, "left_out": expected,
        "long_captions": 0,
    }  # fmt: skip
    numbers = {"downsample_factor": 4, "codebook_size": 40}
    assert manifest["tokenizer"] == {"fingerprint": tokenizer_fingerprint(vqgan), **numbers}
    with pytest.raises(ValueError, match=r"More than 5.0% .*1 unreadable picture.*Record 5: unreadable picture"):
        encode_records(make_records(), tmp_path / "strict", vqgan, image_processor, limit=0.05, progress=False)


def test_documents_keep_their_texts_and_get_codes_in_their_pictures_place(
    tmp_path: Path, vqgan, image_processor
) -> None:
    part = {"text": datasets.Value("string"), "image": datasets.Image()}
    features = datasets.Features({"segments": datasets.List(part), "key": datasets.Value("string")})
    segments = [
        [{"text": "a"}, {"image": png(0)}, {"text": "b"}, {"image": png(2)}],
        [{"text": "c"}, {"image": png(1)[:-900]}, {"image": png(1)}],  # one broken picture spoils a document
        [{"image": png(3)}],
    ]
    segments = [
        [
            {"text": one.get("text"), "image": one.get("image") and {"bytes": one["image"], "path": None}}
            for one in document
        ]
        for document in segments
    ]
    documents = datasets.Dataset.from_dict({"segments": segments, "key": ["x", "y", "z"]}, features=features)
    rows = run(open_records(documents), tmp_path, vqgan, image_processor, limit=0.5, size={"shortest_edge": 16})
    assert [row["key"] for row in rows] == ["x", "z"]
    assert [one["text"] for one in rows[0]["segments"]] == ["a", None, "b", None]
    assert [one["width"] for one in rows[0]["segments"]] == [None, 24, None, 20]
    alone = run(make_records(None), tmp_path / "alone", vqgan, image_processor, size={"shortest_edge": 16})
    assert rows[0]["segments"][3]["image_codes"] == alone[2]["image_codes"]
    assert rows[1]["segments"][0]["image_codes"] == alone[3]["image_codes"]


@pytest.mark.parametrize(("rule", "expected"), [("truncate", "apple"), ("drop", None)])
def test_captions_that_are_too_long_are_cut_or_passed_over(tmp_path: Path, vqgan, image_processor, rule, expected):
    rules = RecordRules(max_caption_length=6, long_captions=rule)
    rows = run(make_records(None).select([2, 10, 4]), tmp_path, vqgan, image_processor, rules=rules)
    assert [row["caption_en"] for row in rows] == [expected] * 3
    assert [row["caption_zh"] for row in rows] == ["苹果2", "苹果10", "苹果4"]
    again = encode_records(
        make_records(None).select([2, 10, 4]), tmp_path, vqgan, image_processor, rules=rules, **SAME
    )
    assert again.num_long_captions == 3 and "3 had a caption that is too long" in str(again)


def test_captions_that_are_lists_are_bad_records_under_a_limit_too(tmp_path: Path, vqgan, image_processor):
    rows = [{"image": {"bytes": png(0), "path": None}, "caption": ["apple", "red apple"]}]
    records = open_records(datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()))
    with pytest.raises(ValueError, match="1 of 1 records were left out .1 caption is no text."):
        encode_records(records, tmp_path, vqgan, image_processor, rules=RecordRules(max_caption_length=6), **SAME)


def test_codes_of_another_tokenizer_are_refused_with_both_fingerprints(
    tmp_path: Path, vqgan, image_processor, make_vqgan
) -> None:
    run(make_records(), tmp_path, vqgan, image_processor)
    other = make_vqgan()
    both = f"{tokenizer_fingerprint(vqgan)}, but this model's is {tokenizer_fingerprint(other)}"
    with pytest.raises(ValueError, match=both):
        open_records(tmp_path, vqgan=other)
    with pytest.raises(ValueError, match="made in another way.*'fingerprint'"):
        run(make_records(), tmp_path, other, image_processor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"height": 8, "width": 8}}, "another way .*'size'.*Choose another folder"),
        ({"shard_size": 5}, "another way .*'shard_size'"),
        ({"rules": RecordRules(min_size=18)}, "another way .*'rules'"),
        ({"lowres_factor": 2}, r"another way .*'lowres_factor': \(None, 2\)"),
        ({"size": {"height": 10, "width": 8}, "split": "test"}, "`height` must be a multiple of 4, got 10"),
        ({"batch_size": 0}, "`batch_size` and `shard_size` must be at least 1, got 0 and 3"),
    ],
)
def test_a_run_is_not_continued_in_another_way(tmp_path: Path, vqgan, image_processor, changes, message) -> None:
    run(make_records(), tmp_path, vqgan, image_processor)
    before = (tmp_path / "codes.json").read_text()
    with pytest.raises(ValueError, match=message):
        run(make_records(), tmp_path, vqgan, image_processor, **changes)
    assert (tmp_path / "codes.json").read_text() == before


def test_a_run_with_small_codes_is_not_continued_without(tmp_path: Path, vqgan, image_processor) -> None:
    run(make_records(), tmp_path, vqgan, image_processor, lowres_factor=2)
    with pytest.raises(ValueError, match=r"another way .*'lowres_factor': \(2, None\)"):
        run(make_records(), tmp_path, vqgan, image_processor, split="test")


def test_other_data_and_foreign_folders_are_refused(tmp_path: Path, vqgan, image_processor) -> None:
    run(make_records(), tmp_path / "codes", vqgan, image_processor)
    with pytest.raises(ValueError, match="codes of 11 train records, the data now have 4"):
        run(make_records().select(range(4)), tmp_path / "codes", vqgan, image_processor)
    with pytest.raises(ValueError, match="hold codes already"):
        run(open_records(tmp_path / "codes"), tmp_path / "twice", vqgan, image_processor)
    with pytest.raises(ValueError, match="not empty and holds no codes"):
        run(make_records(), tmp_path, vqgan, image_processor)
    (tmp_path / "canvas" / "data").mkdir(parents=True)
    (tmp_path / "canvas" / "data" / "train-00000-of-00001.parquet").write_bytes(b"others'")
    with pytest.raises(ValueError, match="not empty and holds no codes"):
        run(make_records(), tmp_path / "canvas", vqgan, image_processor)
    with pytest.raises(ValueError, match=r"nothing to encode: 11 of 11 .*11 picture too small"):
        run(make_records(None), tmp_path / "none", vqgan, image_processor, rules=RecordRules(min_size=99))


def test_a_folder_may_hold_several_splits(tmp_path: Path, vqgan, image_processor) -> None:
    train = run(make_records(), tmp_path, vqgan, image_processor)
    alone = source_fingerprint(tmp_path)
    encode_records(
        make_records(None).select([1, 2]), tmp_path, vqgan, image_processor, split="test", shard_size=3, progress=False
    )
    assert list(open_records(tmp_path)) == train
    assert source_fingerprint(tmp_path) == alone != source_fingerprint(tmp_path, "test")
    test = open_records(tmp_path, split="test", streaming=True)
    assert [row["image_codes"] for row in test] == [row["image_codes"] for row in train[1:3]]


def test_the_command_encodes_with_the_image_tokenizer_of_a_model(
    tmp_path: Path, tiny_model, tiny_processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    tiny_processor.save_pretrained(tmp_path / "model")
    vqgan, image_processor = load_image_tokenizer(tmp_path / "model")
    loaded = MarsForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert tokenizer_fingerprint(vqgan) == tokenizer_fingerprint(loaded.vqgan)

    (tmp_path / "data").mkdir()
    records = make_records(None).rename_column("caption_en", "text")
    records.to_parquet(tmp_path / "data" / "test.parquet")
    command = ["data", "encode", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    command += ["--split", "test", "--column", "text=caption_en", "--out", str(tmp_path / "codes")]
    result = CliRunner().invoke(app, [*command, "--short-side", "16", "--batch-size", "4", "--streaming"])
    assert result.exit_code == 0, result.output
    assert "0 of 11 records were left out" in result.output
    expected = run(make_records(None), tmp_path / "other", vqgan, image_processor, size={"shortest_edge": 16})
    rows = list(open_records(tmp_path / "codes", "test", vqgan=loaded.vqgan))
    assert [row["image_codes"] for row in rows] == [row["image_codes"] for row in expected]

    for wrong, message in (
        (["--size", "16", "16", "--short-side", "16"], "exclude each other"),
        (["--column", "caption"], "must be THEIRS=OURS, got caption"),
        (["--size", "16", "16"], "made in another way"),
    ):
        result = CliRunner().invoke(app, [*command, "--streaming", *wrong])
        assert result.exit_code == 2 and message in result.output


def test_other_data_of_as_many_records_and_a_second_run_at_the_same_time_are_refused(
    tmp_path: Path, vqgan, image_processor
) -> None:
    options = {"progress": False, "limit": 0.2}
    encode_records(open_records(make_records()), tmp_path / "codes", vqgan, image_processor, source="a", **options)
    with pytest.raises(ValueError, match="holds codes of other train data, or their files have changed"):
        encode_records(open_records(make_records()), tmp_path / "codes", vqgan, image_processor, source="b", **options)
    with encode._alone_in(tmp_path / "other"), pytest.raises(ValueError, match="Another encoding is at work in"):
        encode_records(open_records(make_records()), tmp_path / "other", vqgan, image_processor, **options)
    encode_records(open_records(make_records()), tmp_path / "other", vqgan, image_processor, **options)


def test_a_tokenizer_that_looks_codes_up_is_given_pixels_from_0_to_1(tmp_path: Path, vqgan) -> None:
    for looks_up, mean in ((False, 0.5), (True, 0.0)):
        vqgan.register_to_config(lookup_from_codebook=looks_up)
        vqgan.save_pretrained(tmp_path / str(looks_up))
        assert load_image_tokenizer(tmp_path / str(looks_up))[1].image_mean[0] == mean
