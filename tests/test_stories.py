"""Emoji stories: what a title tells is what is shown, and what is held out stays so."""

import re
from itertools import product

import pytest
from datasets import Dataset

from mars_hf import DEFAULT_CHECKPOINT, MarsProcessor
from mars_hf.data.emoji import STYLES, split_of
from mars_hf.data.stories import EmojiStories, held_out_stories

COLORS = {"red": "红", "green": "绿", "blue": "蓝", "pink": "粉", "gold": "金", "black": "黑", "white": "白"}
THINGS = {"apple": "苹果", "kite": "风筝", "boat": "船", "hat": "帽子", "lamp": "灯", "door": "门", "drum": "鼓"}
TONES = {
    "1F3FB": ("light skin tone", "较浅肤色"),
    "1F3FC": ("medium-light skin tone", "中等-浅肤色"),
    "1F3FD": ("medium skin tone", "中等肤色"),
    "1F3FE": ("medium-dark skin tone", "中等-深肤色"),
    "1F3FF": ("dark skin tone", "较深肤色"),
}
PLACES = {"one": 1, "two": 2, "three": 3, "four": 4} | dict(zip("一两三四", (1, 2, 3, 4), strict=True))


def names():
    """By hexcode, in English and in Chinese."""
    made = {}
    for number, ((color, farbe), (thing, ding)) in enumerate(product(COLORS.items(), THINGS.items())):
        made[f"{0x1F400 + number:X}"] = (f"{color} {thing}", farbe + ding)
    for base, english, chinese in (("1F44B", "waving hand", "挥手"), ("270B", "raised hand", "举手")):
        made[base] = (english, chinese)
        for tone, (english_tone, chinese_tone) in TONES.items():
            made[f"{base}-{tone}"] = (f"{english}: {english_tone}", f"{chinese}: {chinese_tone}")
    two_tones = ("people: light skin tone, dark skin tone", "人: 较浅肤色较深肤色")
    return made | {"0031-20E3": ("keycap: 1", "按键: 1"), "1F9D1-1F3FB-1F3FF": two_tones}


NAMES = names()


def emoji_data(*splits):
    rows = [
        {"caption_en": english, "caption_zh": chinese, "style": style, "hexcode": hexcode}
        for style in STYLES
        for hexcode, (english, chinese) in NAMES.items()
        if split_of(hexcode, style) in splits
    ]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def train():
    return emoji_data("train")


@pytest.fixture(scope="module")
def stories(train):
    made = EmojiStories(train, 3000)
    return [made[index] for index in range(len(made))]


def shown(story):
    return [part for part in story["segments"] if not isinstance(part, str)]


def text(story):
    return "".join(part if isinstance(part, str) else "#" for part in story["segments"])


def test_the_pictures_are_the_expected_ones_and_their_rows_hold_them(train, stories):
    rows = train.to_list()
    for story in stories:
        assert [(part["hexcode"], part["style"]) for part in shown(story)] == story["expected"]
        assert 1 <= len(story["expected"]) == len(set(story["expected"])) <= 4
        assert all(rows[part["index"]]["hexcode"] == part["hexcode"] for part in shown(story))
        assert all(rows[part["index"]]["style"] == part["style"] for part in shown(story))


def test_text_and_pictures_take_turns_and_a_line_end_stands_before_every_picture(stories):
    for story in stories:
        assert [isinstance(part, str) for part in story["segments"]] == [True, False] * len(story["expected"]) + [True]
        stop = "。\n" if story["language"] == "zh" else ".\n"
        first, *others, ending = [part for part in story["segments"] if isinstance(part, str)]
        assert first == story["title"] + "\n" and not ending.endswith("\n")
        for line in (first, *others):
            assert line.endswith(stop) and line.count(stop[0] + "\n") == 1
        assert all(line.startswith("\n") for line in (*others, ending))


@pytest.mark.parametrize(
    ("language", "expected", "document"),
    [
        ("en", [("1F416", "noto")], "A picture of a pink kite, noto style.\n#\nThat is all."),
        ("zh", [("1F400", "noto")], "一张红苹果的图片，noto 风格。\n#\n就是这些。"),
        (
            "en",
            [("1F400", "noto"), ("1F400", "twemoji")],
            "Pictures of a red apple in two styles: noto and twemoji.\n#\n2. A red apple, twemoji style.\n#\n"
            "That is all.",
        ),
        (
            "zh",
            [("1F400", "noto"), ("1F400", "twemoji"), ("1F400", "openmoji")],
            "红苹果的图片，三种风格：noto、twemoji 和 openmoji。\n#\n2. 红苹果，twemoji 风格。\n#\n"
            "3. 红苹果，openmoji 风格。\n#\n就是这些。",
        ),
        (
            "en",
            [("1F44B-1F3FB", "noto"), ("1F44B-1F3FF", "noto")],
            "Two pictures of a waving hand, noto style: light skin tone and dark skin tone.\n#\n"
            "2. A waving hand with dark skin tone.\n#\nThat is all.",
        ),
        (
            "zh",
            [("1F44B-1F3FB", "noto"), ("1F44B-1F3FF", "noto")],
            "挥手的两张图片，noto 风格：较浅肤色和较深肤色。\n#\n2. 一个较深肤色的挥手。\n#\n就是这些。",
        ),
        (
            "en",
            [("1F401", "noto"), ("1F400", "noto")],
            "Two pictures of a red kite and a red apple, noto style.\n#\n2. A red apple.\n#\nThat is all.",
        ),
        (
            "zh",
            [("1F401", "noto"), ("1F400", "noto")],
            "红风筝和红苹果的两张图片，noto 风格。\n#\n2. 红苹果。\n#\n就是这些。",
        ),
    ],
)
def test_stories_read_as_written_by_hand(language, expected, document):
    hexcodes = {"1F400", "1F401", "1F402", "1F403", "1F416"} | {f"1F44B-{tone}" for tone in TONES}
    rows = [row for row in emoji_data("train") if row["hexcode"] in hexcodes]
    made = EmojiStories(Dataset.from_list(rows), 40_000)
    told = (made[index] for index in range(len(made)))
    assert text(next(one for one in told if (one["language"], one["expected"]) == (language, expected))) == document


def test_a_title_tells_the_number_and_every_picture_in_order(stories):
    kinds = set()
    for story in stories:
        language, kind, title, expected = (story[key] for key in ("language", "kind", "title", "expected"))
        kinds.add((kind, language))
        told = re.findall("|".join(STYLES), title)
        styles = [style for _, style in expected]
        assert told == (styles if kind == "styles" else styles[:1])
        labels = [NAMES[hexcode][language == "zh"] for hexcode, _ in expected]
        distinct = dict.fromkeys(label.split(": ")[-1] if kind == "skin tones" else label for label in labels)
        if kind == "single":
            assert len(expected) == 1
        else:
            assert len(expected) == PLACES[re.search("|".join(PLACES), title.lower())[0]]
        if kind == "skin tones":
            listed = re.split("、|和|, | and ", re.split("style: |风格：", title)[1].rstrip(".。"))
            assert listed == list(distinct) and title.count(labels[0].split(": ")[0]) == 1
        elif ":" not in labels[0]:
            places = [title.index(label) for label in distinct]
            assert places == sorted(places)
    assert kinds == set(product(("single", "styles", "skin tones", "walk"), ("en", "zh")))


def test_every_later_line_names_the_number_and_the_subject_of_its_picture(stories):
    for story in stories:
        lines = [part for part in story["segments"] if isinstance(part, str)][1:-1]
        for place, (line, (hexcode, style)) in enumerate(zip(lines, story["expected"][1:], strict=True), 2):
            words = re.split(": ", NAMES[hexcode][story["language"] == "zh"])
            assert line.startswith(f"\n{place}. ") and all(word in line.lower() for word in words)
            assert (style in line) == (story["kind"] == "styles")


def test_any_eight_stories_in_a_row_hold_each_language_with_each_number_of_pictures(stories):
    for start in range(0, 100, 3):
        classes = {(story["language"], len(story["expected"])) for story in stories[start : start + 8]}
        assert classes == set(product(("en", "zh"), (1, 2, 3, 4)))


def test_labels_that_a_list_cannot_hold_are_left_out(stories):
    seen = {hexcode for story in stories for hexcode, _ in story["expected"]}
    assert len(seen) > 50 and not seen & {"0031-20E3", "1F9D1-1F3FB-1F3FF"}


def test_stories_are_decided_by_index_and_seed_alone(train, stories):
    again = EmojiStories(train, 100)
    assert [again[index] for index in reversed(range(100))] == stories[99::-1]
    other = EmojiStories(train, 100, seed=1)
    assert [other[index] for index in range(100)] != stories[:100]


def test_training_refuses_what_is_held_out():
    with pytest.raises(ValueError, match="belongs to 'test', but only 'train' may be used"):
        EmojiStories(emoji_data("train", "test"), 10)
    with pytest.raises(ValueError, match="belongs to 'validation', but only 'train', 'test'"):
        held_out_stories(emoji_data("train", "validation"))


def test_held_out_titles_show_a_held_out_pair_and_never_come_in_training(stories):
    data = emoji_data("train", "test")
    held_out = held_out_stories(data, count=50)
    assert len({story["title"] for story in held_out}) == 50
    assert all(any(split_of(*picture) == "test" for picture in story["expected"]) for story in held_out)
    assert all(split_of(*picture) != "validation" for story in held_out for picture in story["expected"])
    assert not {story["title"] for story in held_out} & {story["title"] for story in stories}
    for language in ("en", "zh"):
        numbers = [len(story["expected"]) for story in held_out if story["language"] == language]
        assert len(numbers) == 25 and {numbers.count(number) for number in (1, 2, 3, 4)} <= {6, 7}
    assert held_out_stories(data, count=50) == held_out
    rows = data.to_list()
    assert all(rows[part["index"]]["hexcode"] == part["hexcode"] for story in held_out for part in shown(story))


def test_held_out_titles_are_refused_where_there_are_too_few(train):
    with pytest.raises(ValueError, match="even, for half in each of two languages, got 7"):
        held_out_stories(train, count=7)
    with pytest.raises(ValueError, match="0 of 2 titles only. Give the train and the test split together"):
        held_out_stories(train, count=2)


def test_data_without_a_story_for_each_number_of_pictures_are_refused(train):
    three_hats = [row for row in train if row["caption_en"] in ("red hat", "blue hat", "pink hat")]
    one_style = Dataset.from_list([row for row in three_hats if row["style"] == three_hats[0]["style"]])
    with pytest.raises(ValueError, match=r"too few for stories of \{.*4\} pictures"):
        EmojiStories(one_style, 10)


def test_one_token_of_the_embedded_tokenizer_stands_before_every_picture_of_a_language(stories):
    tokenizer = MarsProcessor.from_pretrained(DEFAULT_CHECKPOINT).tokenizer
    for language, stop in (("en", ".\n"), ("zh", "。\n")):
        lines = {line for story in stories[:200] if story["language"] == language for line in story["segments"][:-1:2]}
        last = {tokenizer(line, split_special_tokens=True)["input_ids"][-1] for line in lines}
        assert len(last) == 1 and tokenizer.decode(list(last)) == stop
