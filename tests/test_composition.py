"""Emoji on canvases that are not square: where they lie, what the captions say, what is held out."""

import re

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from mars_hf.data.composition import (
    EmojiCompositions,
    on_canvas,
    pair_on_canvas,
    part_of,
)
from mars_hf.data.emoji import STYLES, split_of

WHITE = (255, 255, 255)
COLORS = {  # by hexcode: names and the colour of the whole picture
    "1F534": ("red disc", "红色圆盘", (220, 0, 0)),
    "1F535": ("blue disc", "蓝色圆盘", (0, 0, 220)),
    "1F7E2": ("green disc", "绿色圆盘", (0, 200, 0)),
    "1F7E1": ("yellow disc", "黄色圆盘", (220, 220, 0)),
    "1F1EB-1F1F7": ("flag: Purple", "旗: 紫", (150, 0, 150)),
    "0031-20E3": ("keycap: 1", "按键: 1", (0, 220, 220)),
}
COLOR_OF = {name: color for english, chinese, color in COLORS.values() for name in (english, chinese)}
COLOR_OF |= {"flag of Purple": (150, 0, 150), "紫的旗": (150, 0, 150)}
NAMED = re.compile("|".join(map(re.escape, sorted(COLOR_OF, key=len, reverse=True))))


def emoji_data(split="train", size=64):
    rows = [
        {"image": Image.new("RGB", (size, size), color), "caption_en": english, "caption_zh": chinese}
        | {"style": style, "hexcode": hexcode}
        for style in STYLES
        for hexcode, (english, chinese, color) in COLORS.items()
        if split is None or split_of(hexcode, style) == split
    ]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def data():
    return emoji_data()


def noise(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def colors_at(image, *points):
    return [image.getpixel(point) for point in points]


# Pictures


@pytest.mark.parametrize(
    ("height", "width", "place", "top", "left"),
    [
        (64, 96, "centre", 0, 16),
        (64, 96, "left", 0, 0),
        (64, 96, "right", 0, 32),
        (96, 64, "centre", 16, 0),
        (96, 64, "top", 0, 0),
        (96, 64, "bottom", 32, 0),
        (64, 64, "centre", 0, 0),
    ],
)
def test_an_emoji_that_fills_the_short_side_keeps_its_pixels_and_the_rest_is_white(height, width, place, top, left):
    drawn = np.asarray(on_canvas(noise(64), height, width, place))
    expected = np.full((height, width, 3), 255, np.uint8)
    expected[top : top + 64, left : left + 64] = np.asarray(noise(64))
    assert np.array_equal(drawn, expected)


def test_a_large_emoji_is_scaled_to_the_short_side():
    halves = Image.new("RGB", (128, 128), "red")
    halves.paste("blue", (0, 64, 128, 128))
    drawn = on_canvas(halves, 96, 64)
    assert drawn.size == (64, 96)
    assert colors_at(drawn, (32, 15), (32, 20), (32, 76), (32, 80)) == [WHITE, (255, 0, 0), (0, 0, 255), WHITE]


@pytest.mark.parametrize(
    ("part", "height", "width", "box"),
    [
        ("top", 64, 96, (0, 0, 96, 64)),
        ("bottom", 64, 96, (0, 32, 96, 96)),
        ("left", 96, 64, (0, 0, 64, 96)),
        ("right", 96, 64, (32, 0, 96, 96)),
    ],
)
def test_a_part_is_the_crop_of_the_canvas_shape_at_its_end(part, height, width, box):
    assert part_of(noise(96), part, height, width).tobytes() == noise(96).crop(box).tobytes()


def test_a_part_of_a_larger_picture_is_scaled():
    thirds = Image.new("RGB", (192, 192), "red")
    thirds.paste("blue", (0, 64, 192, 192))
    drawn = part_of(thirds, "top", 64, 96)
    assert drawn.size == (96, 64) and colors_at(drawn, (48, 28), (48, 35)) == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(("height", "width", "corners"), [(64, 96, ((8, 0), (8, 48))), (96, 64, ((0, 8), (48, 8)))])
def test_two_emoji_share_the_long_side(height, width, corners):
    expected = np.full((height, width, 3), 255, np.uint8)
    for seed, (top, left) in enumerate(corners):
        expected[top : top + 48, left : left + 48] = np.asarray(noise(48, seed))
    assert np.array_equal(np.asarray(pair_on_canvas(noise(48, 0), noise(48, 1), height, width)), expected)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: on_canvas(Image.new("RGB", (64, 32)), 64, 96), "square pictures, got one of 32 x 64"),
        (lambda: on_canvas(noise(64), 64, 96, "top"), "centre, left, right at 64 x 96 pixels, got 'top'"),
        (lambda: part_of(noise(64), "left", 64, 96), "top or bottom of a canvas that is not square, got 'left'"),
        (lambda: part_of(noise(64), "top", 64, 64), "not square, got 'top' at 64 x 64"),
    ],
)
def test_pictures_refuse_what_the_canvas_does_not_have(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


# Records


def test_captions_name_what_is_where(data):
    seen = set()
    for record in EmojiCompositions(data, 300, shares={"canvas": 1, "placed": 1, "part": 1, "pair": 3}):
        image, kind, place = record["image"], record["kind"], record["place"]
        assert image.size == (record["width"], record["height"]) in {(96, 64), (64, 96)}
        centre, middle = (48, 32) if record["width"] == 96 else (32, 48), 32
        first, last = ((20, middle), (75, middle)) if record["width"] == 96 else ((middle, 20), (middle, 75))
        for language in ("en", "zh"):
            caption = record[f"caption_{language}"]
            told = [COLOR_OF[name] for name in NAMED.findall(caption)]
            if re.search("to the right of| below |的右边|的下面", caption):
                told.reverse()
            shown = colors_at(image, first, last) if kind == "pair" else colors_at(image, centre)
            assert told == shown, caption
        seen.add((kind, place))
        ends = colors_at(image, (4, 4), (record["width"] - 5, record["height"] - 5))
        if kind == "placed":
            assert [color == WHITE for color in ends] == [place in ("right", "bottom"), place in ("left", "top")]
            assert place in record["caption_en"] and dict(zip(
                ("left", "right", "top", "bottom"), ("左边", "右边", "上面", "下面"), strict=True
            ))[place] in record["caption_zh"]  # fmt: skip
        elif kind == "part":
            words = {"left": "left", "right": "right", "top": "upper", "bottom": "lower"}
            assert WHITE not in ends and f"the {words[place]} part of " in record["caption_en"]
    assert len(seen) == 1 + 4 + 4 + 2


def test_pairs_are_two_subjects_of_one_style_with_names_that_a_list_can_hold(data):
    rows = {(row["hexcode"], row["style"]) for row in data.remove_columns("image")}
    for record in EmojiCompositions(data, 60, shares={"pair": 1}):
        assert len(set(record["hexcodes"])) == 2 and {(code, record["style"]) for code in record["hexcodes"]} <= rows
        assert "0031-20E3" not in record["hexcodes"]


def test_a_style_that_is_named_is_the_one_drawn(data):
    records = list(EmojiCompositions(data, 200))
    named = [record for record in records if " style" in record["caption_en"]]
    assert 100 < len(named) < 190
    assert all(record["caption_en"].endswith(f", {record['style']} style") for record in named)
    chinese = [record["caption_zh"] for record in records if "风格" in record["caption_zh"]]
    assert 100 < len(chinese) < 190 and all(re.search("，[a-z-]+ 风格$", caption) for caption in chinese)


def plain(record):
    return {**record, "image": (record["image"].size, record["image"].tobytes())}


def test_records_are_decided_by_index_and_seed_alone(data):
    forwards = [plain(record) for record in EmojiCompositions(data, 40, seed=5)]
    again = EmojiCompositions(data, 400, seed=5)
    assert [plain(again[index]) for index in reversed(range(40))] == forwards[::-1]
    assert [plain(record) for record in EmojiCompositions(data, 40, seed=6)] != forwards


def test_doubled_sizes_give_the_same_records_at_twice_the_resolution(data):
    double = EmojiCompositions(data, 60, sizes=[(128, 192), (192, 128)])
    for low, high in zip(EmojiCompositions(data, 60), double, strict=True):
        assert high["image"].size == (2 * low["width"], 2 * low["height"])
        same = ("caption_en", "caption_zh", "hexcodes", "style", "kind", "place")
        assert [low[name] for name in same] == [high[name] for name in same]


def test_rows_come_as_often_as_their_weights_say(data):
    weights = [float(row["hexcode"] == "1F534") for row in data.remove_columns("image")]
    records = EmojiCompositions(data, 50, shares={"canvas": 1, "part": 1}, weights=weights)
    assert {record["hexcodes"][0] for record in records} == {"1F534"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [(64, 64)]}, r"another width, multiples of 8 pixels, got \(64, 64\)"),
        ({"sizes": [(64, 100)]}, r"multiples of 8 pixels, got \(64, 100\)"),
        ({"sizes": []}, "one size at least"),
        ({"shares": {"triple": 1.0}}, "canvas, placed, part, pair, none below 0"),
        ({"shares": {"pair": 0.0}}, "not all 0; got"),
        ({"shares": {"pair": -1.0, "part": 2.0}}, "none below 0"),
        ({"weights": [1.0]}, "one number for each of"),
        ({"split": "test"}, "belongs to 'train', but only 'test'"),
    ],
)
def test_options_that_cannot_be_used_are_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        EmojiCompositions(data, 10, **options)


def test_held_out_rows_are_refused_in_training():
    everything = emoji_data(split=None)
    assert {split_of(row["hexcode"], row["style"]) for row in everything.remove_columns("image")} > {"train"}
    with pytest.raises(ValueError, match="Load the split that is meant"):
        EmojiCompositions(everything, 10)


def test_a_style_with_one_subject_has_no_pairs(data):
    lonely = data.filter(lambda row: row["style"] != "noto" or row["hexcode"] in ("1F534", "0031-20E3"))
    with pytest.raises(ValueError, match=r"Pairs need two subjects .* there are fewer of \['noto'\]"):
        EmojiCompositions(lonely, 10)
    assert len(list(EmojiCompositions(lonely, 10, shares={"canvas": 1.0}))) == 10
