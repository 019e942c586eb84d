"""Records: every source gives the same ones, bad ones are named and counted, orders resume where they were left."""

import io
import json
import random
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from mars_hf.data import records as records_module
from mars_hf.data.records import (
    BadRecordError,
    BadRecords,
    CaptionMix,
    RecordRules,
    ShuffledOrder,
    ShuffledStream,
    captions_of,
    check_record,
    open_record_picture,
    open_records,
    source_fingerprint,
    tokenizer_fingerprint,
    validate_records,
)

NUM = 9
DOTTED = {"caption_en.txt": "caption_en", "caption_zh.txt": "caption_zh"}  # members of a WebDataset sample
SOURCES = ("parquet", "imagefolder", "webdataset", "saved", "saved splits", "jsonl", "in memory")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(number: int, height: int = 12, width: int = 16) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_rows(count: int = NUM) -> list[dict]:
    return [
        {"image": png(i), "caption_en": f"apple {i}", "caption_zh": f"苹果{i}", "key": f"k{i}"} for i in range(count)
    ]


def as_dataset(rows: list[dict]) -> datasets.Dataset:
    dataset = datasets.Dataset.from_list([{**row, "image": {"bytes": row["image"], "path": None}} for row in rows])
    return dataset.cast_column("image", datasets.Image())


def write_folder_of_pictures(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for row in rows:
        (folder / f"{row['key']}.png").write_bytes(row["image"])
        lines.append({"file_name": f"{row['key']}.png", **{k: v for k, v in row.items() if k != "image"}})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def write_shards_of_tar(folder: Path, rows: list[dict]) -> str:
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as archive:
            for row in rows[number::3]:
                texts = {f"{name}.txt": row[name].encode() for name in ("caption_en", "caption_zh")}
                for name, content in {"png": row["image"], **texts}.items():
                    member = tarfile.TarInfo(f"{row['key']}.{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return str(folder / "*.tar")


def write_shards_of_parquet(folder: Path, rows: list[dict]) -> str:
    folder.mkdir()
    for number in range(3):
        as_dataset(rows[number::3]).to_parquet(folder / f"{number}.parquet")
    return str(folder / "*.parquet")


def write(kind: str, folder: Path, rows: list[dict]):
    folder.mkdir(exist_ok=True)
    folder = folder / "source"
    if kind == "parquet":
        return write_shards_of_parquet(folder, rows)
    if kind == "imagefolder":
        return write_folder_of_pictures(folder, rows)
    if kind == "webdataset":
        return write_shards_of_tar(folder, rows)
    if kind == "saved":
        as_dataset(rows).save_to_disk(folder)
    elif kind == "saved splits":
        datasets.DatasetDict({"train": as_dataset(rows), "test": as_dataset(rows[:1])}).save_to_disk(folder)
    elif kind == "jsonl":
        pictures = write_folder_of_pictures(folder, rows)
        lines = [json.dumps({**row, "image": str(pictures / f"{row['key']}.png")}) for row in rows]
        file = folder.with_suffix(".jsonl")
        file.write_text("\n".join(lines))
        return file
    else:
        return as_dataset(rows)
    return folder


def opened(kind: str, folder: Path, rows: list[dict], streaming: bool = False):
    columns = DOTTED if kind == "webdataset" else None
    return open_records(write(kind, folder, rows), streaming=streaming, columns=columns)


def keys_of(records) -> list[str]:
    return [record["key"] for record in records]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_records(tmp_path: Path, kind: str, streaming: bool) -> None:
    rows = make_rows()
    records = {record["key"]: record for record in opened(kind, tmp_path, rows, streaming)}
    assert len(records) == NUM
    for row in rows:
        record = records[row["key"]]
        assert (record["caption_en"], record["caption_zh"]) == (row["caption_en"], row["caption_zh"])
        expected = np.asarray(Image.open(io.BytesIO(row["image"])))
        assert np.array_equal(np.asarray(open_record_picture(record["image"])), expected)


def test_a_webdataset_with_a_picture_and_a_text_needs_no_names(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in {"a.jpg": png(0), "a.txt": b"an apple"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (record,) = open_records([tmp_path / "0.tar"], streaming=True)
    assert (record["key"], record["caption"]) == ("a", "an apple")
    check_record(record, decode=True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "imagefolder", "webdataset"])
def test_a_corrupt_picture_in_the_middle_is_left_out_and_counted(tmp_path: Path, kind: str, streaming: bool) -> None:
    rows = make_rows()
    rows[4]["image"] = rows[4]["image"][:-200]  # a whole header and half the pixels
    records = opened(kind, tmp_path, rows, streaming)
    good, bad_records = validate_records(records, on_bad="skip", limit=0.2, progress=False)
    assert sorted(keys_of(good)) == [f"k{i}" for i in range(NUM) if i != 4]
    assert bad_records.reasons == {"unreadable picture": 1} and bad_records.num_seen == NUM

    headers_only, _ = validate_records(records, decode=False, progress=False)
    assert len(keys_of(headers_only)) == NUM


def test_the_first_bad_record_is_named_with_what_came_and_what_was_expected() -> None:
    rows = make_rows()
    rows[5]["image"], rows[7]["image"] = b"not a picture", png(7, 4, 4)
    records = open_records(as_dataset(rows[::-1]))
    with pytest.raises(ValueError, match=r"Record 1 \(key 'k7'\): picture too small: .* at least 8 pixels, got 4 x 4"):
        validate_records(records, RecordRules(min_size=8), progress=False)
    with pytest.raises(ValueError, match=r"Record 3 \(key 'k5'\): unreadable picture: A file of 13 bytes"):
        list(validate_records(records.to_iterable_dataset())[0])


def test_a_data_set_with_a_share_of_broken_records_above_the_limit_is_refused() -> None:
    rows = make_rows()
    rows[4]["caption_en"] = rows[4]["caption_zh"] = " "
    with pytest.raises(ValueError, match=r"More than 1.0% .*1 no caption.*Record 4 \(key 'k4'\)"):
        validate_records(open_records(as_dataset(rows)), on_bad="skip", progress=False)


GOOD = {"image": png(0), "caption": "an apple"}
CODED = {"image": None, "image_codes": [0, 39, 3, 4, 5, 6], "height": 8, "width": 12, "caption": "an apple"}
RULES = RecordRules(8, 2.0, None, 10, "drop", codebook_size=40, downsample_factor=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": None}, "no caption: .*got {'caption': None}"),
        ({"caption": " \n"}, "no caption"),
        ({"caption": ["an apple"]}, r"caption is no text: .*got \['an apple'\]"),
        ({"caption": "eleven char"}, "caption too long: .*at most 10 characters"),
        ({"image": None}, "no picture"),
        ({"image": b"PNG"}, "unreadable picture: A file of 3 bytes"),
        ({"image": {"bytes": None, "path": None}}, "unreadable picture"),
        ({"image": png(0)[:-200]}, "unreadable picture: .*truncated"),
        ({"image": png(0, 7, 12)}, "picture too small: .*at least 8 pixels, got 7 x 12"),
        ({"image": png(0, 12, 7)}, "picture too small: .*at least 8 pixels, got 12 x 7"),
        ({"image": png(0, 8, 17)}, "picture too elongated: .*2.0 times the shorter, got 8 x 17"),
        ({"image": png(0, 17, 8)}, "picture too elongated: .*2.0 times the shorter, got 17 x 8"),
        ({**CODED, "height": None}, "codes do not fit their size: `height` must be a positive whole number"),
        ({**CODED, "width": 10}, "codes do not fit their size: `width` must be a multiple of 4, got 10"),
        ({**CODED, "width": 16}, r"codes do not fit .*list of 8 whole numbers, got int64 of shape \(6,\) for 8 x 16"),
        ({**CODED, "image_codes": [0.5] * 6}, "codes do not fit their size: .*float64"),
        ({**CODED, "image_codes": [0, 1, 2, 3, 4, 40]}, r"codes out of range: .*\[0, 40\), got 0 to 40; encode"),
        ({**CODED, "image_codes": [0, 1, 2, 3, 4, -1]}, "codes out of range: .*got -1 to 4"),
        ({"segments": []}, "empty document"),
        ({"segments": [{"text": "a"}, {"text": ""}]}, "broken segment: segment 1 .*neither"),
        ({"segments": [{"text": "a", "image": png(0)}]}, "broken segment: segment 0 .*both"),
        ({"segments": [{"text": "a"}, {"image": b"PNG"}]}, "unreadable picture"),
    ],
)
def test_a_bad_record_is_refused_with_its_reason(changes: dict, message: str) -> None:
    with pytest.raises(BadRecordError, match=message) as refusal:
        check_record({**GOOD, **changes}, RULES, decode=True)
    assert str(refusal.value).startswith(f"{refusal.value.reason}: ")


def test_good_records_pass() -> None:
    words = {"text": " and ", "image": None, "image_codes": None}
    for record in (GOOD, CODED, {"segments": [{"text": "a"}, {"image": png(0)}, words, {**CODED, "text": None}]}):
        check_record(record, RULES, decode=True)
    check_record({**GOOD, "score": 5.0}, RecordRules(min_score=5.0))
    for score in (4.9, None, float("nan")):
        with pytest.raises(BadRecordError, match="score too low: .*at least 5.0"):
            check_record({**GOOD, "score": score}, RecordRules(min_score=5.0))


def test_long_captions_are_cut_or_passed_over_and_counted() -> None:
    record = {"caption_en": " a red apple ", "caption_zh": "红苹果", "caption": ""}
    assert captions_of(record) == {"caption_en": "a red apple", "caption_zh": "红苹果"}
    assert captions_of(record, RecordRules(max_caption_length=6)) == {"caption_en": "a red", "caption_zh": "红苹果"}
    assert captions_of(record, RecordRules(max_caption_length=6, long_captions="drop")) == {"caption_zh": "红苹果"}
    assert not RecordRules(max_caption_length=11).is_too_long(" a red apple ")

    records = open_records(as_dataset(make_rows(12)))  # "apple 10" and "apple 11" have eight characters
    for rule, left in (("truncate", 12), ("drop", 12)):
        good, bad_records = validate_records(records, RecordRules(max_caption_length=7, long_captions=rule))
        assert len(good) == left and bad_records.num_long_captions == 2 and not bad_records.reasons
        assert str(bad_records) == "0 of 12 records were left out (none), 2 had a caption that is too long."


def test_documents_are_read_from_a_file_and_streamed_with_their_pictures_undecoded(tmp_path: Path) -> None:
    part = {"text": datasets.Value("string"), "image": datasets.Image()}
    segments = [[{"text": "a", "image": None}, {"text": None, "image": png(i)}] for i in range(3)]
    segments[1][1]["image"] = b"broken"
    features = datasets.Features({"segments": datasets.List(part)})
    datasets.Dataset.from_dict({"segments": segments}, features=features).to_parquet(tmp_path / "0.parquet")
    for streaming in (False, True):
        records = open_records(tmp_path / "0.parquet", streaming=streaming)
        good, bad_records = validate_records(records, on_bad="skip", limit=0.5, progress=False)
        assert len(list(good)) == 2 and bad_records.reasons == {"unreadable picture": 1}


def test_faults_stop_a_run_at_the_limit_and_rules_never_do() -> None:
    fault, rule = BadRecordError("no caption", ""), BadRecordError("picture too small", "")

    def run(errors: list, **options) -> int:
        bad_records = BadRecords(limit=0.01, **options)
        for index, error in enumerate(errors):
            try:
                with bad_records.skipping({}, index):
                    if error is not None:
                        raise error
            except ValueError:
                return index
        bad_records.finish()
        return -1

    assert run([fault] * 20) == 10  # 10 of the first 1,000 are allowed
    assert run([None] * 1990 + [fault] * 30) == 1990 + 20  # the 21st fault is beyond 1 % of 2,011
    assert run([None] * 25 + [fault], num_records=50) == 25  # one of 50 is 2 %
    assert run([rule] * 3000) == -1
    with pytest.raises(ValueError, match=r"More than 1.0% .*3 of 30 records were left out \(3 no caption\)"):
        run([None] * 27 + [fault] * 3)


def test_captions_are_mixed_by_share_and_the_same_for_the_same_seed_and_index() -> None:
    captions = {name: name for name in ("caption_en", "caption_zh", "fine_caption_en", "fine_caption_zh")}
    mix = CaptionMix(chinese=0.3, fine=0.6)
    chosen = [mix.choose(captions, 3, index) for index in range(4000)]
    assert chosen == [CaptionMix(0.3, 0.6).choose(captions, 3, index) for index in range(4000)]
    assert chosen != [mix.choose(captions, 4, index) for index in range(4000)]
    expected = {"caption_en": 0.28, "caption_zh": 0.12, "fine_caption_en": 0.42, "fine_caption_zh": 0.18}
    shares = {name: count / 4000 for name, count in Counter(chosen).items()}
    assert shares == pytest.approx(expected, abs=0.025)  # three standard deviations are 0.024


@pytest.mark.parametrize(
    ("chinese", "fine", "given", "expected"),
    [
        (1, 0, ["caption_en"], "caption_en"),
        (0, 0, ["caption_zh"], "caption_zh"),
        (1, 0, ["caption", "caption_en"], "caption_en"),
        (1, 1, ["fine_caption_en", "caption_zh"], "fine_caption_en"),
        (1, 1, ["caption_en", "caption_zh"], "caption_zh"),
        (0, 0, ["fine_caption_en", "fine_caption_zh"], "fine_caption_en"),
        (0, 0, ["caption", "fine_caption_en"], "caption"),
    ],
)
def test_a_missing_caption_is_replaced_by_the_one_that_exists(chinese, fine, given, expected) -> None:
    assert CaptionMix(chinese, fine).choose({name: name for name in given}, 0, 0) == expected


def test_a_shuffled_order_shows_every_record_once_a_pass_and_resumes_anywhere() -> None:
    order = ShuffledOrder(50, seed=2)
    samples = [order[index] for index in range(150)]
    passes = [samples[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != [ShuffledOrder(50, seed=3)[i] for i in range(50)]
    resumed = ShuffledOrder(50, seed=2)
    assert [resumed[index] for index in range(77, 150)] == samples[77:]
    places = random.Random(0).sample(range(150), 40)
    assert [order[index] for index in places] == [samples[index] for index in places]


def test_a_weighted_order_draws_each_record_by_its_weight() -> None:
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0, 4.0, 0.0])
    order = ShuffledOrder(6, seed=1, weights=weights)
    counts = Counter(order[index] for index in range(6000))
    shares = [counts[record] / 6000 for record in range(6)]
    assert shares == pytest.approx((weights / weights.sum()).tolist(), abs=0.02)
    assert counts[0] == counts[3] == counts[5] == 0
    assert [ShuffledOrder(6, 1, weights)[index] for index in (5000, 3)] == [order[index] for index in (5000, 3)]


@pytest.mark.parametrize("buffer_size", [1, 4, 100])
@pytest.mark.parametrize("kind", ["parquet", "webdataset", "jsonl"])
def test_a_shuffled_stream_resumes_exactly_where_its_state_was_taken(
    tmp_path: Path, kind: str, buffer_size: int
) -> None:
    def stream() -> ShuffledStream:
        return ShuffledStream(records, seed=1, buffer_size=buffer_size)

    records = opened(kind, tmp_path, make_rows(), streaming=True)
    states, keys, reader = [json.dumps(stream().state_dict())], [], stream()
    for record in islice(reader, 3 * NUM):
        keys.append(record["key"])
        states.append(json.dumps(reader.state_dict()))
    passes = [keys[start : start + NUM] for start in range(0, 3 * NUM, NUM)]
    assert all(sorted(one) == [f"k{i}" for i in range(NUM)] for one in passes)
    if buffer_size > 1 or kind != "jsonl":  # one file and one place in the buffer: there is nothing to shuffle
        assert passes[0] != passes[1] and passes[1] != passes[2]
    for place in range(len(keys)):
        resumed = stream()
        resumed.load_state_dict(json.loads(states[place]))
        assert keys_of(islice(resumed, 3 * NUM - place)) == keys[place:], place


def test_a_stream_that_leaves_records_out_resumes_exactly_too(tmp_path: Path) -> None:
    rows = make_rows()
    rows[4]["image"] = b"broken"
    records = opened("parquet", tmp_path, rows, streaming=True)
    good, bad_records = validate_records(records, on_bad="skip", limit=0.2)
    reader = ShuffledStream(good, buffer_size=4)
    keys, states = [], []
    for record in islice(reader, 2 * (NUM - 1)):
        keys.append(record["key"])
        states.append(reader.state_dict())
    assert sorted(keys) == sorted(2 * [f"k{i}" for i in range(NUM) if i != 4])
    assert bad_records.reasons == {"unreadable picture": 2}
    for place in (0, 5, 7, 12):
        resumed = ShuffledStream(good, buffer_size=4)
        resumed.load_state_dict(states[place])
        assert keys_of(islice(resumed, len(keys) - place - 1)) == keys[place + 1 :]


def test_a_stream_refuses_another_streams_state_and_an_endless_search(tmp_path: Path) -> None:
    records = opened("parquet", tmp_path, make_rows(), streaming=True)
    with pytest.raises(ValueError, match=r"another stream .*'seed': \(1, 2\)"):
        ShuffledStream(records, seed=2).load_state_dict(ShuffledStream(records, seed=1).state_dict())
    with pytest.raises(ValueError, match="gives no records"):
        next(iter(ShuffledStream(records.take(0))))
    with pytest.raises(ValueError, match="1 record or more, got 0"):
        ShuffledStream(records, buffer_size=0)


def test_codes_on_the_hub_are_held_to_their_tokenizer_and_codes_of_nobody_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_vqgan
) -> None:
    vqgan, said, asked = make_vqgan(), [], []
    data = datasets.Dataset.from_list([CODED | {"image": None}]).remove_columns("image")
    monkeypatch.setattr(records_module, "load_dataset", lambda *args, **kwargs: data)
    monkeypatch.setattr(records_module.logger, "warning", said.append)
    manifest = tmp_path / "codes.json"
    manifest.write_text(json.dumps({"tokenizer": {"fingerprint": tokenizer_fingerprint(vqgan)}}))

    def download(*args: str, **kwargs: str) -> str:
        asked.append((args, kwargs))
        if args[0] == "someone/bare":
            raise LocalEntryNotFoundError("no network")
        return str(manifest)

    monkeypatch.setattr(records_module, "hf_hub_download", download)
    open_records("someone/codes", vqgan=vqgan, revision="main")
    assert asked == [(("someone/codes", "codes.json"), {"repo_type": "dataset", "revision": "main"})] and not said
    with pytest.raises(ValueError, match="someone/codes were made by the image tokenizer"):
        open_records("someone/codes", vqgan=make_vqgan())
    open_records("someone/bare", vqgan=vqgan)
    assert "someone/bare have no `codes.json`" in said[0] and len(said) == 1
    open_records("someone/bare")  # no tokenizer to compare with
    assert len(said) == 1 and len(asked) == 3


def test_sources_are_told_apart_by_their_files(tmp_path: Path) -> None:
    for kind in ("parquet", "imagefolder", "saved"):
        source = write(kind, tmp_path / kind, make_rows())
        before = source_fingerprint(source)
        assert before == source_fingerprint(source)
        folder = tmp_path / kind / "source"
        (folder / "README.md").write_text("a description")
        assert source_fingerprint(source) == before
        file = next(path for path in sorted(folder.iterdir()) if path.suffix in (".parquet", ".png", ".arrow"))
        file.write_bytes(file.read_bytes() + b".")
        assert source_fingerprint(source) != before
    assert source_fingerprint(tmp_path / "parquet" / "source") != source_fingerprint(tmp_path / "saved" / "source")
    assert source_fingerprint("somebody/some-data") is None


def test_columns_take_the_names_that_they_are_given(tmp_path: Path) -> None:
    rows = [{"picture": {"bytes": row["image"], "path": None}, "text": row["caption_en"]} for row in make_rows(2)]
    dataset = datasets.Dataset.from_list(rows).cast_column("picture", datasets.Image())
    for source in (dataset, dataset.to_iterable_dataset()):
        records = list(open_records(source, columns={"text": "caption_en"}))
        assert [record["caption_en"] for record in records] == ["apple 0", "apple 1"]
        check_record(records[0], decode=True)
    with pytest.raises(ValueError, match=r"'txt' cannot become 'caption': the columns are \['picture', 'text'\]"):
        open_records(dataset, columns={"txt": "caption"})
    with pytest.raises(ValueError, match="'text' cannot become 'captions'"):
        open_records(dataset, columns={"text": "captions"})
    with pytest.raises(ValueError, match=r"Records need `image`.*The columns are \['picture', 'text'\]"):
        open_records(dataset)


def test_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for source in (tmp_path / "none.parquet", str(tmp_path / "*.tar"), []):
        with pytest.raises(ValueError, match="There is no file"):
            open_records(source)
    there = str(tmp_path / "there.parquet")
    as_dataset(make_rows(2)).to_parquet(there)
    with pytest.raises(ValueError, match="There is no file .*missing.parquet"):
        open_records([there, str(tmp_path / "missing.parquet")])
    for source in (tmp_path / "none", [tmp_path / "a.xyz", tmp_path / "b.xyz"]):
        with pytest.raises(ValueError, match="is no folder, no name on the Hub"):
            open_records(source)
    with pytest.raises(FileNotFoundError, match="There is no folder data/none here, and no data set of that name"):
        open_records("data/none")
    with pytest.raises(ValueError, match="no split 'validation', only 'train', 'test'"):
        open_records(write("saved splits", tmp_path, make_rows(2)), split="validation")


@pytest.mark.parametrize(
    "refused",
    [
        lambda: RecordRules(min_size=0),
        lambda: RecordRules(max_aspect_ratio=0.5),
        lambda: RecordRules(long_captions="cut"),
        lambda: CaptionMix(chinese=1.5),
        lambda: CaptionMix(fine=float("nan")),
        lambda: BadRecords(on_bad="warn"),
        lambda: BadRecords(limit=2),
        lambda: ShuffledOrder(0),
        lambda: ShuffledOrder(2, weights=torch.ones(3)),
        lambda: ShuffledOrder(2, weights=torch.tensor([1.0, -0.5])),
        lambda: ShuffledOrder(2, weights=torch.zeros(2)),
        lambda: ShuffledOrder(2, weights=torch.tensor([1.0, float("nan")])),
    ],
)
def test_settings_out_of_range_are_refused(refused) -> None:
    with pytest.raises(ValueError, match="must be|at least one record"):
        refused()


def test_a_fingerprint_tells_image_tokenizers_apart_and_survives_saving(
    make_vqgan, make_model, tmp_path: Path
) -> None:
    from diffusers import VQModel

    vqgan = make_vqgan()
    fingerprint = tokenizer_fingerprint(vqgan)
    vqgan.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(VQModel.from_pretrained(tmp_path)) == fingerprint
    config = {name: value for name, value in vqgan.config.items() if not name.startswith("_")}
    scaled = VQModel.from_config({**config, "scaling_factor": 0.5})
    scaled.load_state_dict(vqgan.state_dict())
    assert tokenizer_fingerprint(scaled) != fingerprint
    assert tokenizer_fingerprint(vqgan.to(torch.bfloat16).to(torch.float32)) == fingerprint  # as it is shipped
    with torch.no_grad():
        vqgan.quantize.embedding.weight[7, 2] *= 1.02
    assert tokenizer_fingerprint(vqgan) != fingerprint

    model = make_model()
    twin = VQModel.from_config(model.config.vq_config)
    twin.load_state_dict(model.vqgan.state_dict())
    assert tokenizer_fingerprint(twin) == tokenizer_fingerprint(model.vqgan)
