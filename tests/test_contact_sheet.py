"""Contact sheets: every picture in its place above its caption, Chinese included."""

import pytest
from PIL import Image, ImageChops, ImageFont

from mars_hf.contact_sheet import FONT, FONT_SIZE, LINE_HEIGHT, MARGIN, contact_sheet

COLORS = ["red", "green", "blue"]


def squares(side: int = 64) -> list[Image.Image]:
    return [Image.new("RGB", (side, side), color) for color in COLORS]


def test_pictures_stand_row_by_row_enlarged_by_a_whole_factor() -> None:
    sheet = contact_sheet(squares(), COLORS, columns=2, picture_size=200)
    side, row = 192, 192 + LINE_HEIGHT + MARGIN
    assert sheet.size == (MARGIN + 2 * (side + MARGIN), MARGIN + 2 * row)
    for place, color in zip([(0, 0), (1, 0), (0, 1)], [(255, 0, 0), (0, 128, 0), (0, 0, 255)], strict=True):
        left, top = MARGIN + place[0] * (side + MARGIN), MARGIN + place[1] * row
        assert sheet.getpixel((left, top)) == sheet.getpixel((left + side - 1, top + side - 1)) == color
        assert sheet.getpixel((left - 1, top)) == sheet.getpixel((left + side, top)) == (255, 255, 255)


def test_a_large_picture_keeps_its_size() -> None:
    assert contact_sheet([Image.new("RGB", (300, 100))], ["x"]).width == 300 + 2 * MARGIN


def test_a_long_caption_is_wrapped_inside_its_column() -> None:
    captions = ["waving hand: medium skin tone, noto style", "挥手：中等肤色，twemoji 风格，很长的一行说明", ""]
    sheet = contact_sheet(squares(), captions)
    assert sheet.height == MARGIN + 192 + 3 * LINE_HEIGHT + MARGIN or sheet.height > MARGIN + 192 + 2 * LINE_HEIGHT
    for column in range(1, 4):  # the gap between columns stays white below the pictures
        left = column * (192 + MARGIN)
        gap = sheet.crop((left, MARGIN + 192, left + MARGIN, sheet.height))
        assert gap.getcolors() == [(MARGIN * gap.height, (255, 255, 255))]


@pytest.mark.parametrize("text", ["红苹果", "挥手：中等肤色", "蜥蜴", "a red apple — “64×64”, é"])
def test_the_font_has_a_glyph_for_every_character(text: str) -> None:
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    missing = font.getmask("\uffff")
    for character in set(text) - {" "}:
        drawn = font.getmask(character)
        assert drawn.size != missing.size or ImageChops.difference(drawn_image(drawn), drawn_image(missing)).getbbox()


def drawn_image(mask) -> Image.Image:
    return Image.frombytes("L", mask.size, bytes(mask))


@pytest.mark.parametrize(("pictures", "captions"), [([], []), (squares(), ["one"])])
def test_captions_and_pictures_must_match(pictures: list, captions: list) -> None:
    with pytest.raises(ValueError, match=f"got {len(pictures)} pictures and {len(captions)} captions"):
        contact_sheet(pictures, captions)
