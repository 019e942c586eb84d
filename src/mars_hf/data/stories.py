"""
Emoji stories: documents of sentences and pictures, for joint generation (the paper's section 4.6 has recipes).

A story is a title, one to four pictures, a line before each, and an ending. Its title tells all that is to come, so
that a story written for it can be judged: how many pictures, and of what.

The title is itself the line of the first picture. Before its first picture a document is the frozen language model's
alone: nothing that is trained reaches there, and the small one of mars-emoji cannot be relied on to bring a name from
a title into a sentence. What stands after a picture reads keys and values that are trained. Every line before a
picture ends in a full stop and a line end, one token in both languages, so that the frozen state tells that `<img>` is
due; sentences have the form of the lists that the language model learned (`tell_story` in `text.py`).

What this file leaves to others: codes, ids and labels.
"""

import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from datasets import Dataset

from .composition import is_plain, text_rows
from .emoji import STYLES, split_of
from .emoji_captions import SKIN_TONES
from .text import LANGUAGES, natural_name, with_article

MAX_PICTURES = 4
NUM_CLASSES = len(LANGUAGES) * MAX_PICTURES  # of stories: a language and a number of pictures
NUMBERS = {"en": ("one", "two", "three", "four"), "zh": "一两三四"}
TITLES: dict[str, dict[str, str]] = {
    "single": {"en": "A picture of {a_name}, {style} style.", "zh": "一张{name}的图片，{style} 风格。"},
    "styles": {
        "en": "Pictures of {a_name} in {number} styles: {list}.",
        "zh": "{name}的图片，{number}种风格：{list}。",
    },
    "skin tones": {
        "en": "{Number} pictures of {a_name}, {style} style: {list}.",
        "zh": "{name}的{number}张图片，{style} 风格：{list}。",
    },
    "walk": {"en": "{Number} pictures of {list}, {style} style.", "zh": "{list}的{number}张图片，{style} 风格。"},
}
LINES: dict[str, dict[str, str]] = {
    "styles": {"en": "{place}. {A_name}, {style} style.", "zh": "{place}. {name}，{style} 风格。"},
    "skin tones": {"en": "{place}. {A_name}.", "zh": "{place}. 一个{name}。"},
    "walk": {"en": "{place}. {A_name}.", "zh": "{place}. {name}。"},
}
ENDINGS = {"en": "That is all.", "zh": "就是这些。"}
# Words of labels that say nothing about what is shown.
EMPTY_WORDS = frozenset(("and", "the", "with", "for", "from", "facing"))
ORDERED_KINDS = ("single", "styles", "skin tones")  # a walk goes any way

Picture = tuple[str, str]  # hexcode and style


class EmojiStories:
    """
    Stories of one subject in several styles, of its skin tones, or of several subjects that share a word: story `i` is
    decided by `i`, the seed and the data.

    Languages alternate, then the number of pictures, so that any eight stories in a row hold each class once. A story
    is a `dict`:

    - `title`: its first line, which is all that the model is given in evaluation, with a line end;
    - `language`: `"en"` or `"zh"`; `kind`: one of `TITLES`;
    - `segments`: texts and, for each picture, `{"index", "hexcode", "style"}`, where `index` is its row in the data;
    - `expected`: hexcode and style of each picture in order.

    Args:
        data (`datasets.Dataset`): Emoji data; pictures are not read.
        num_stories (`int`): Length.
        splits (`Collection[str]`, defaults to `("train",)`): The splits that rows may belong to.
        seed (`int`, defaults to 0): Decides all else.

    Raises:
        ValueError: If a row belongs to another split, or the data are too few for a story of each number of pictures.

    Example:
        >>> stories = EmojiStories(load_dataset("data/emoji-64", split="train"), num_stories=10_000)
        >>> print("".join(part if isinstance(part, str) else "<picture>" for part in stories[18]["segments"]))
        Pictures of a delivery truck in two styles: twemoji and openmoji.
        <picture>
        2. A delivery truck, openmoji style.
        <picture>
        That is all.
    """

    def __init__(self, data: Dataset, num_stories: int, splits: Collection[str] = ("train",), seed: int = 0):
        self.num_stories, self.seed = num_stories, seed
        rows = text_rows(data, splits)
        self.names = {row["hexcode"]: {lang: row[f"caption_{lang}"] for lang in LANGUAGES} for row in rows}
        self.index_of = {(row["hexcode"], row["style"]): index for index, row in enumerate(rows)}
        plain = sorted({row["hexcode"] for row in rows if is_plain(row)})
        pools = {
            "styles": self._pools_of_styles(plain),
            "skin tones": self._pools_of_skin_tones(),
            "walk": self._pools_of_walks(plain),
        }
        self._pools = {
            (kind, number): long
            for kind, of_kind in pools.items()
            for number in range(2, MAX_PICTURES + 1)
            if (long := [pool for pool in of_kind if len(pool) >= number])
        }
        self._pools["single", 1] = pools["styles"]
        missing = set(range(1, MAX_PICTURES + 1)) - {number for (_, number), found in self._pools.items() if found}
        if missing:
            raise ValueError(
                f"{len(rows)} rows are too few for stories of {missing} pictures: a subject in that many styles or "
                "skin tones, or as many subjects of one style that share a word. Give more rows."
            )

    def __len__(self) -> int:
        return self.num_stories

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_stories:
            raise IndexError(f"There are {self.num_stories} stories, got the index {index}.")
        rng = random.Random(f"{self.seed}/{index}")
        language, number = LANGUAGES[index % len(LANGUAGES)], 1 + index // len(LANGUAGES) % MAX_PICTURES
        kind = rng.choice([kind for kind, length in self._pools if length == number])
        pool = rng.choice(self._pools[kind, number])
        places = rng.sample(range(len(pool)), number)
        pictures = [pool[place] for place in (sorted(places) if kind in ORDERED_KINDS else places)]
        return self._tell(kind, pictures, language)

    # ---- what a story can be about: its pictures are some of one of these lists

    def _pools_of_styles(self, plain: Sequence[str]) -> list[list[Picture]]:
        subjects = [hexcode for hexcode in plain if not _tones(hexcode)]
        return [[(hexcode, style) for style in STYLES if (hexcode, style) in self.index_of] for hexcode in subjects]

    def _pools_of_skin_tones(self) -> list[list[Picture]]:
        """Variants by one tone, from light to dark, where the label is the subject's with the tone after it."""
        pools: dict[Picture, list[Picture]] = {}
        for hexcode, style in sorted(self.index_of, key=lambda picture: (_tones(picture[0]), picture)):
            if len(_tones(hexcode)) == 1 and re.fullmatch("[^:,]+: [a-z-]+ skin tone", self.names[hexcode]["en"]):
                pools.setdefault((_without_tones(hexcode), style), []).append((hexcode, style))
        return list(pools.values())

    def _pools_of_walks(self, plain: Sequence[str]) -> list[list[Picture]]:
        pools: dict[tuple[str, str], list[Picture]] = {}
        for hexcode in plain:
            words = set(re.findall("[a-z]{3,}", self.names[hexcode]["en"].lower())) - EMPTY_WORDS
            for word in () if _tones(hexcode) else sorted(words):
                for style in STYLES:
                    if (hexcode, style) in self.index_of:
                        pools.setdefault((word, style), []).append((hexcode, style))
        return list(pools.values())

    # ---- how it is told

    def _tell(self, kind: str, pictures: list[Picture], language: str) -> dict[str, Any]:
        title = self._title(kind, pictures, language)
        segments: list[str | dict[str, Any]] = []
        for place, (hexcode, style) in enumerate(pictures, 1):
            line = title if place == 1 else "\n" + self._line(kind, place, hexcode, style, language)
            index = self.index_of[hexcode, style]
            segments += [line + "\n", {"index": index, "hexcode": hexcode, "style": style}]
        segments.append("\n" + ENDINGS[language])
        return {"title": title, "language": language, "kind": kind, "segments": segments, "expected": list(pictures)}

    def _title(self, kind: str, pictures: list[Picture], language: str) -> str:
        labels = [self.names[hexcode][language] for hexcode, _ in pictures]
        if kind == "skin tones":
            name, listed = labels[0].split(": ")[0], [label.split(": ")[1] for label in labels]
        else:
            names = [natural_name(label, language) for label in labels]
            name = names[0]
            articled = [with_article(one) for one in names] if language == "en" else names
            listed = articled if kind == "walk" else [style for _, style in pictures]
        number = NUMBERS[language][len(pictures) - 1]
        words = {"style": pictures[0][1], "number": number, "Number": _capital(number)}
        return TITLES[kind][language].format(
            name=name, a_name=with_article(name), list=_enumerate(listed, language), **words
        )

    def _line(self, kind: str, place: int, hexcode: str, style: str, language: str) -> str:
        name = natural_name(self.names[hexcode][language], language)
        words = {"name": name, "A_name": _capital(with_article(name))}
        return LINES[kind][language].format(place=place, style=style, **words)


def held_out_stories(data: Dataset, count: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    """
    Give the stories whose titles are for evaluation: no training story shows the same pictures.

    The rule: go through the stories of `EmojiStories(data, splits=("train", "test"), seed=seed)` in order, and keep
    one if at least one of its pictures is of the test split and its title is new, until there are `count`, with as
    many of each language and each number of pictures as `count` consecutive stories have.

    Args:
        data (`datasets.Dataset`): Rows of the train and the test split together.
        count (`int`, defaults to 50): How many; even, half in each language.
        seed (`int`, defaults to 0): As above.

    Returns:
        `list[dict]`: As [`EmojiStories`] tells them.

    Raises:
        ValueError: If `count` is odd or the data hold too few test pairs for so many.
    """
    if count < 1 or count % len(LANGUAGES):
        raise ValueError(f"`count` must be even, for half in each of two languages, got {count}.")
    stories = EmojiStories(data, num_stories=1000 * count, splits=("train", "test"), seed=seed)
    wanted, chosen = Counter(index % NUM_CLASSES for index in range(count)), {}
    for index in range(len(stories)):
        if not wanted[index % NUM_CLASSES]:
            continue
        story = stories[index]
        if story["title"] not in chosen and any(split_of(*picture) == "test" for picture in story["expected"]):
            chosen[story["title"]] = story
            wanted[index % NUM_CLASSES] -= 1
        if len(chosen) == count:
            return list(chosen.values())
    raise ValueError(
        f"The data hold test pairs for {len(chosen)} of {count} titles only. Give the train and the test split "
        "together."
    )


def _tones(hexcode: str) -> list[str]:
    return [part for part in hexcode.split("-") if part in SKIN_TONES]


def _without_tones(hexcode: str) -> str:
    return "-".join(part for part in hexcode.split("-") if part not in SKIN_TONES)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _enumerate(words: Sequence[str], language: str) -> str:
    """
    Write a list as a sentence has it.

    Example:
        >>> _enumerate(["a cat", "a dog", "a cow"], "en"), _enumerate(["猫", "狗", "牛"], "zh")
        ('a cat, a dog and a cow', '猫、狗和牛')
    """
    comma, last = ("、", "和") if language == "zh" else (", ", " and ")
    if language == "zh" and words[-1].isascii():
        last = f" {last} "  # Latin words stand apart
    return last.join([comma.join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
