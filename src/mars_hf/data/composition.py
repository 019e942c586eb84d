"""
Emoji in other sizes: pictures that are wider or taller than square (Stage II).

A canvas that is not square shows a whole emoji with white beside it, a part of one, or two emoji; the caption says
which, and where. Everything is drawn from the index and the seed, and from the rows of one split: a held-out pair of
subject and style is held out in every size.

What this file leaves to others: size texts and codes, and the square pictures themselves (`emoji.py`).
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from datasets import Dataset
from PIL import Image

from .emoji import split_of
from .emoji_captions import CaptionStyle, emoji_caption
from .text import LANGUAGES, natural_name, with_article, with_style

TEXT_COLUMNS = ["caption_en", "caption_zh", "style", "hexcode"]
SIZES = ((64, 96), (96, 64))  # height and width in pixels
SIZE_UNIT = 8  # pixels; the side of the square that one code of the emoji tokenizer stands for
SHARES: dict[str, float] = {"canvas": 0.5, "placed": 0.15, "part": 0.1, "pair": 0.25}
PLACES: dict[str, dict[str, str]] = {
    "left": {"en": "on the left", "zh": "左边"},
    "right": {"en": "on the right", "zh": "右边"},
    "top": {"en": "at the top", "zh": "上面"},
    "bottom": {"en": "at the bottom", "zh": "下面"},
}
PARTS: dict[str, dict[str, str]] = {
    "left": {"en": "left", "zh": "左部"},
    "right": {"en": "right", "zh": "右部"},
    "top": {"en": "upper", "zh": "上部"},
    "bottom": {"en": "lower", "zh": "下部"},
}
# Between which ends the long side of a canvas runs, by `is_wide`.
LONG_ENDS = {True: ("left", "right"), False: ("top", "bottom")}
PAIRED: dict[bool, dict[str, tuple[str, ...]]] = {
    True: {
        "en": (
            "{first} and {second}",
            "{first} on the left and {second} on the right",
            "{first} to the left of {second}",
            "{second} to the right of {first}",
        ),
        "zh": (
            "{first}和{second}",
            "左边是{first}，右边是{second}",
            "{first}在左边，{second}在右边",
            "{second}在{first}的右边",
        ),
    },
    False: {
        "en": (
            "{first} above {second}",
            "{second} below {first}",
            "{first} at the top and {second} at the bottom",
        ),
        "zh": (
            "{first}在{second}的上面",
            "{second}在{first}的下面",
            "上面是{first}，下面是{second}",
            "{first}在上面，{second}在下面",
        ),
    },
}


def text_rows(data: Dataset, splits: Collection[str]) -> list[dict[str, str]]:
    """
    Read the rows of emoji data without their pictures, and hold them to their splits.

    Args:
        data (`datasets.Dataset`): With the columns of `TEXT_COLUMNS`.
        splits (`Collection[str]`): Which splits the rows may belong to, by `split_of`.

    Raises:
        ValueError: If a column is missing, there is no row, or one belongs to another split.
    """
    rows = data.select_columns(TEXT_COLUMNS).to_list()
    if not rows:
        raise ValueError("The emoji data hold no row. Make them with `mars-hf data emoji`.")
    for number, row in enumerate(rows):
        split = split_of(row["hexcode"], row["style"])
        if split not in splits:
            raise ValueError(
                f"Row {number} ({row['hexcode']}, {row['style']}) belongs to {split!r}, but only "
                f"{', '.join(map(repr, splits))} may be used here. Load the split that is meant."
            )
    return rows


def is_wide(height: int, width: int) -> bool:
    """Tell whether a canvas is wide and not tall; a square counts as wide."""
    return width >= height


def is_plain(row: Mapping[str, str]) -> bool:
    """Tell whether a subject's names can stand in a list: neither holds a colon or a comma in running words."""
    names = [natural_name(row[f"caption_{language}"], language) for language in LANGUAGES]
    return not any(mark in name for name in names for mark in (":", "：", ", ", "，"))


# Pictures


def on_canvas(picture: Image.Image, height: int, width: int, place: str = "centre") -> Image.Image:
    """
    Show a whole emoji at another size: as large as fits, on white. The one rule for training and for evaluation.

    Args:
        picture (`PIL.Image.Image`): Square. If its side is the shorter one of the canvas, its pixels stay as they are.
        height (`int`): Of the canvas, in pixels.
        width (`int`): Of the canvas, in pixels.
        place (`str`, defaults to `"centre"`): Also `"left"` and `"right"` if the canvas is wide, `"top"` and
            `"bottom"` if it is tall.

    Returns:
        `PIL.Image.Image`: RGB, `width` x `height`.

    Raises:
        ValueError: If the picture is not square or the place is none that the canvas has.

    Example:
        >>> on_canvas(Image.new("RGB", (64, 64), "red"), 64, 96).getpixel((16, 0))
        (255, 0, 0)
    """
    wide = is_wide(height, width)
    first, last = LONG_ENDS[wide]
    side, room = min(height, width), abs(width - height)
    offsets = {"centre": room // 2, first: 0, last: room}
    if place not in offsets:
        raise ValueError(f"`place` must be one of {', '.join(offsets)} at {height} x {width} pixels, got {place!r}.")
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(_resized(picture, side, side), (offsets[place], 0) if wide else (0, offsets[place]))
    return canvas


def part_of(picture: Image.Image, part: str, height: int, width: int) -> Image.Image:
    """
    Show a part of an emoji: a wide canvas its upper or lower one, a tall canvas its left or right one.

    Args:
        picture (`PIL.Image.Image`): Square.
        part (`str`): `"top"` or `"bottom"` if the canvas is wide, `"left"` or `"right"` if it is tall.
        height (`int`): Of the canvas, in pixels.
        width (`int`): Of the canvas, in pixels.

    Returns:
        `PIL.Image.Image`: RGB, `width` x `height`; of 64 x 96 pixels it shows two thirds of the picture.

    Raises:
        ValueError: If the picture is not square, the canvas is, or the part would be cut along its long side.
    """
    parts = LONG_ENDS[not is_wide(height, width)]
    if part not in parts or height == width:
        raise ValueError(
            f"`part` must be {' or '.join(parts)} of a canvas that is not square, got {part!r} at {height} x {width}."
        )
    side = picture.width
    cut = side * min(height, width) / max(height, width)  # need not be whole
    boxes = {
        "left": (0, 0, cut, side),
        "right": (side - cut, 0, side, side),
        "top": (0, 0, side, cut),
        "bottom": (0, side - cut, side, side),
    }
    return _resized(picture, height, width, boxes[part])


def pair_on_canvas(first: Image.Image, second: Image.Image, height: int, width: int) -> Image.Image:
    """
    Show two emoji: side by side on a wide or square canvas, the first above the second on a tall one.

    Args:
        first (`PIL.Image.Image`): Square.
        second (`PIL.Image.Image`): Square.
        height (`int`): Of the canvas, in pixels.
        width (`int`): Of the canvas, in pixels.

    Returns:
        `PIL.Image.Image`: RGB, `width` x `height`; of 64 x 96 pixels each emoji takes 48 x 48.
    """
    canvas = Image.new("RGB", (width, height), "white")
    if is_wide(height, width):
        cells = [(0, width // 2), (width // 2, width - width // 2)]
        for picture, (left, cell) in zip((first, second), cells, strict=True):
            canvas.paste(on_canvas(picture, height, cell), (left, 0))
    else:
        cells = [(0, height // 2), (height // 2, height - height // 2)]
        for picture, (top, cell) in zip((first, second), cells, strict=True):
            canvas.paste(on_canvas(picture, cell, width), (0, top))
    return canvas


def _resized(
    picture: Image.Image, height: int, width: int, box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    if picture.width != picture.height:
        raise ValueError(f"Emoji are square pictures, got one of {picture.height} x {picture.width} pixels.")
    # Of the filters that any factor suits, the one nearest to what the vectors give when drawn at the smaller size.
    return picture.convert("RGB").resize((width, height), Image.Resampling.HAMMING, box)


# Captions: by language, all that say the same


def placed_captions(row: Mapping[str, str], place: str) -> dict[str, list[str]]:
    """
    Name a subject and where it is.

    Example:
        >>> placed_captions({"caption_en": "red apple", "caption_zh": "红苹果"}, "left")
        {'en': ['red apple on the left', 'a red apple on the left'], 'zh': ['红苹果在左边', '左边是红苹果']}
    """
    english, chinese = _names(row)
    where, there = PLACES[place]["en"], PLACES[place]["zh"]
    return {
        "en": [f"{english} {where}", f"{with_article(english)} {where}"],
        "zh": [f"{chinese}在{there}", f"{there}是{chinese}"],
    }


def part_captions(row: Mapping[str, str], part: str) -> dict[str, list[str]]:
    """
    Name a subject and which part of it is seen.

    Example:
        >>> part_captions({"caption_en": "red apple", "caption_zh": "红苹果"}, "top")
        {'en': ['the upper part of a red apple'], 'zh': ['红苹果的上部']}
    """
    english, chinese = _names(row)
    return {
        "en": [f"the {PARTS[part]['en']} part of {with_article(english)}"],
        "zh": [f"{chinese}的{PARTS[part]['zh']}"],
    }


def pair_captions(first: Mapping[str, str], second: Mapping[str, str], wide: bool) -> dict[str, list[str]]:
    """
    Name two subjects and how they stand to one another.

    Args:
        first (`Mapping[str, str]`): The row on the left or above.
        second (`Mapping[str, str]`): The row on the right or below.
        wide (`bool`): They stand side by side.
    """
    (english, chinese), (other_english, other_chinese) = _names(first), _names(second)
    named = [(english, other_english), (with_article(english), with_article(other_english))]
    forms = PAIRED[wide]
    return {
        "en": [form.format(first=a, second=b) for a, b in named for form in forms["en"]],
        "zh": [form.format(first=chinese, second=other_chinese) for form in forms["zh"]],
    }


def _names(row: Mapping[str, str]) -> list[str]:
    return [natural_name(row[f"caption_{language}"], language) for language in LANGUAGES]


# Records


class EmojiCompositions:
    """
    Records of emoji on canvases that are not square: record `i` is decided by `i`, the seed and the data.

    Every record holds `image`, `height`, `width`, `caption_en`, `caption_zh`, `style`, `hexcodes` (a list), `kind` and
    `place`. Kinds: `"canvas"`, a whole emoji in the middle, captioned as the square one; `"placed"`, at one end;
    `"part"`, cut to the canvas; `"pair"`, two of one style. The same seed with all sizes doubled gives the same
    records at twice the resolution.

    Args:
        data (`datasets.Dataset`): Emoji data of one split. Pictures of 128 pixels leave parts and pairs sharper.
        num_records (`int`): Length.
        split (`str`, defaults to `"train"`): The split that every row must belong to.
        sizes (`Sequence[tuple[int, int]]`, *optional*): Heights and widths in pixels. Defaults to 64 x 96 and 96 x 64.
        shares (`Mapping[str, float]`, *optional*): How often which kind comes. Defaults to `SHARES`.
        weights (`Sequence[float]`, *optional*): How often each row comes, such as from `subject_weights`.
        captions ([`CaptionStyle`]): How often captions take which form.
        seed (`int`, defaults to 0): Decides all else.

    Raises:
        ValueError: If a size, a share or a weight cannot be used, a row belongs to another split, or no two subjects
            of one style can be paired.
    """

    def __init__(
        self,
        data: Dataset,
        num_records: int,
        split: str = "train",
        sizes: Sequence[tuple[int, int]] = SIZES,
        shares: Mapping[str, float] | None = None,
        weights: Sequence[float] | None = None,
        captions: CaptionStyle = CaptionStyle(),  # noqa: B008
        seed: int = 0,
    ):
        self.data, self.rows = data, text_rows(data, (split,))
        self.num_records, self.sizes, self.captions, self.seed = num_records, list(sizes), captions, seed
        self.shares = dict(SHARES if shares is None else shares)
        self._check_options(weights)
        weights = [1.0] * len(self.rows) if weights is None else [float(weight) for weight in weights]
        self._all = _Pool(range(len(self.rows)), weights)
        self._to_pair = _Pool([index for index, row in enumerate(self.rows) if is_plain(row)], weights)
        of_style: dict[str, list[int]] = {}
        for index in self._to_pair.indices:
            of_style.setdefault(self.rows[index]["style"], []).append(index)
        self._partners = {style: _Pool(indices, weights) for style, indices in of_style.items()}
        self._check_partners()

    def _check_options(self, weights: Sequence[float] | None) -> None:
        for height, width in self.sizes:
            if height == width or min(height, width) < SIZE_UNIT or height % SIZE_UNIT or width % SIZE_UNIT:
                raise ValueError(
                    f"`sizes` must be pairs of a height and another width, multiples of {SIZE_UNIT} pixels, got "
                    f"{(height, width)}."
                )
        shares = self.shares.values()
        if not self.sizes or self.shares.keys() - SHARES.keys() or min(shares, default=0) < 0 or not sum(shares) > 0:
            raise ValueError(
                f"`sizes` must hold one size at least and `shares` numbers for {', '.join(SHARES)}, none below 0 and "
                f"not all 0; got {self.sizes} and {self.shares}."
            )
        if weights is not None and (len(weights) != len(self.rows) or min(weights) < 0 or not sum(weights) > 0):
            raise ValueError(
                f"`weights` must be one number for each of {len(self.rows)} rows, none below 0 and not all 0; got "
                f"{len(weights)}, the least {min(weights, default=None)}."
            )

    def _check_partners(self) -> None:
        lonely = [
            style
            for style, pool in self._partners.items()
            if len({self.rows[index]["hexcode"] for index in pool.indices}) < 2
        ]
        if self.shares.get("pair", 0) > 0 and (lonely or not self._partners):
            raise ValueError(
                "Pairs need two subjects of one style whose names hold no comma; there are fewer of "
                f"{lonely or 'every style'}. Give more rows, or `shares` without 'pair'."
            )

    def __len__(self) -> int:
        return self.num_records

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_records:
            raise IndexError(f"There are {self.num_records} records, got the index {index}.")
        rng = random.Random(f"{self.seed}/{index}")
        height, width = rng.choice(self.sizes)
        (kind,) = rng.choices(list(self.shares), list(self.shares.values()))
        make = {"canvas": self._canvas, "placed": self._placed, "part": self._part, "pair": self._pair}[kind]
        return {"height": height, "width": width, "kind": kind, **make(height, width, rng)}

    def _canvas(self, height: int, width: int, rng: random.Random) -> dict[str, Any]:
        index = self._all.draw(rng)
        row = self.rows[index]
        captions = {}
        for language in LANGUAGES:
            forms = replace(self.captions, chinese=float(language == "zh"))
            captions[f"caption_{language}"] = emoji_caption(row, rng, forms)
        return {"image": on_canvas(self.data[index]["image"], height, width), **captions, **_about([row], "centre")}

    def _placed(self, height: int, width: int, rng: random.Random) -> dict[str, Any]:
        index, place = self._all.draw(rng), rng.choice(LONG_ENDS[is_wide(height, width)])
        row = self.rows[index]
        image = on_canvas(self.data[index]["image"], height, width, place)
        captions = self._choose(placed_captions(row, place), row["style"], rng)
        return {"image": image, **captions, **_about([row], place)}

    def _part(self, height: int, width: int, rng: random.Random) -> dict[str, Any]:
        index, part = self._all.draw(rng), rng.choice(LONG_ENDS[not is_wide(height, width)])
        row = self.rows[index]
        image = part_of(self.data[index]["image"], part, height, width)
        captions = self._choose(part_captions(row, part), row["style"], rng)
        return {"image": image, **captions, **_about([row], part)}

    def _pair(self, height: int, width: int, rng: random.Random) -> dict[str, Any]:
        first = second = self._to_pair.draw(rng)
        style = self.rows[first]["style"]
        while self.rows[second]["hexcode"] == self.rows[first]["hexcode"]:
            second = self._partners[style].draw(rng)
        row, other = self.rows[first], self.rows[second]
        image = pair_on_canvas(self.data[first]["image"], self.data[second]["image"], height, width)
        wide = is_wide(height, width)
        captions = self._choose(pair_captions(row, other, wide), style, rng)
        return {"image": image, **captions, **_about([row, other], " and ".join(LONG_ENDS[wide]))}

    def _choose(self, forms: dict[str, list[str]], style: str, rng: random.Random) -> dict[str, str]:
        captions = {}
        for language in LANGUAGES:
            caption, named = rng.choice(forms[language]), rng.random() < self.captions.named_style
            captions[f"caption_{language}"] = with_style(caption, style, language) if named else caption
        return captions


def _about(rows: Sequence[Mapping[str, str]], place: str) -> dict[str, Any]:
    return {"style": rows[0]["style"], "hexcodes": [row["hexcode"] for row in rows], "place": place}


class _Pool:
    """Rows to draw from, each as often as its weight says."""

    def __init__(self, indices: Sequence[int], weights: Sequence[float]):
        self.indices = [index for index in indices if weights[index] > 0]
        self._cumulative = list(accumulate(weights[index] for index in self.indices))

    def draw(self, rng: random.Random) -> int:
        return rng.choices(self.indices, cum_weights=self._cumulative)[0]
