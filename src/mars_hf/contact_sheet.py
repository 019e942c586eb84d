"""
Contact sheets: pictures in a grid with their captions, English or Chinese, on any machine.

Few machines have a Chinese font and Pillow brings none, so a subset of Noto Sans SC travels with the package, in
`fonts/`.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path(__file__).parent / "fonts" / "NotoSansSC-Regular-subset.ttf"
FONT_SIZE = 16
LINE_HEIGHT = 22
MARGIN = 12
# A line may break after a word of a spaced script and after any Chinese character.
_UNBREAKABLE = re.compile(r"[!-\u2e7f]+\s*|.\s*", re.DOTALL)


def contact_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int | None = None,
    picture_size: int = 192,
) -> Image.Image:
    """
    Arrange pictures in rows, each above its caption.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): The pictures, row by row.
        captions (`Sequence[str]`): One for each picture; long ones are wrapped.
        columns (`int`, *optional*): Pictures in a row. Defaults to all of them.
        picture_size (`int`, defaults to 192):
            Small pictures are enlarged by the largest whole factor that keeps them within this many pixels. Pixels
            stay square and sharp, so that what the model drew is what one sees.

    Returns:
        `PIL.Image.Image`: The sheet, RGB on white.

    Raises:
        ValueError: If there is no picture, or not one caption for each.

    Example:
        >>> contact_sheet([Image.new("RGB", (64, 64), "red")], ["红苹果"]).size
        (216, 238)
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(
            f"Expected one caption for each of at least one picture, got {len(pictures)} pictures and "
            f"{len(captions)} captions."
        )
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    enlarged = [_enlarge(picture, picture_size) for picture in pictures]
    width = max(picture.width for picture in enlarged)
    lines = [_wrap(caption, width, font) for caption in captions]
    columns = min(columns or len(pictures), len(pictures))
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    heights = [max(enlarged[i].height for i in row) + LINE_HEIGHT * max(len(lines[i]) for i in row) for row in rows]

    sheet = Image.new(
        "RGB", (MARGIN + columns * (width + MARGIN), MARGIN + sum(heights) + MARGIN * len(rows)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            sheet.paste(enlarged[i], (left, top))
            for number, line in enumerate(lines[i]):
                draw.text((left, top + enlarged[i].height + number * LINE_HEIGHT), line, font=font, fill="black")
        top += height + MARGIN
    return sheet


def _enlarge(picture: Image.Image, size: int) -> Image.Image:
    factor = max(1, size // max(picture.size))
    return picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    lines = [""]
    for piece in _UNBREAKABLE.findall(text):
        if lines[-1] and font.getlength((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]
