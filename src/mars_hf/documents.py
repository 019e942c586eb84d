"""
Files of documents: texts and pictures in a row, as [`~MarsProcessor.post_process_multimodal_output`] gives them.

Whatever the model wrote is text: HTML and Markdown in it are shown, never obeyed.
"""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from .picture_files import png_bytes, replace_file

SUFFIXES = (".md", ".html")
# Characters that begin something in Markdown, anywhere or in a line: lists, rules, underlined headings.
_MARKDOWN = re.compile(r"([\\`*_\[\]#~|]|^[-+=])")
_NUMBERED = re.compile(r"^(\d+)([.)])")
_PAGE = """<!doctype html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ max-width: 40em; margin: 2em auto; padding: 0 1em; font: 1.1em/1.6 sans-serif }}
img {{ width: 16em; max-width: 100%; image-rendering: pixelated }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_document(segments: Sequence[str | Image.Image], path: Path) -> list[Path]:
    """
    Write a document, whose first line is its heading.

    Args:
        segments (`Sequence[str | PIL.Image.Image]`): Texts and pictures in order.
        path (`Path`):
            A file `.html`, which holds its pictures, or `.md`, beside which they are written (`story-1.png`, ...).

    Returns:
        `list[Path]`: The files, the document first.

    Raises:
        ValueError: If the file is neither.
    """
    check_suffix(path)
    if path.suffix == ".html":
        replace_file(path, as_html(segments).encode())
        return [path]
    pictures = [segment for segment in segments if isinstance(segment, Image.Image)]
    files = [path.with_name(f"{path.stem}-{number}.png") for number in range(1, len(pictures) + 1)]
    for picture, file in zip(pictures, files, strict=True):
        replace_file(file, png_bytes(picture))
    replace_file(path, as_markdown(segments, [file.name for file in files]).encode())
    return [path, *files]


def check_suffix(path: Path) -> None:
    """Refuse a file that is neither Markdown nor HTML."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"A story is written to a file that ends in {' or '.join(SUFFIXES)}, got {path}.")


def as_html(segments: Sequence[str | Image.Image]) -> str:
    """
    Write a document as a page that needs no other file.

    Example:
        >>> "1 &lt; 2</h1>" in as_html(["1 < 2"])
        True
    """
    title = next((line for segment in segments if isinstance(segment, str) for line in _lines(segment)), "")
    return _PAGE.format(title=html.escape(title), body=as_paragraphs(segments))


def as_paragraphs(segments: Sequence[str | Image.Image]) -> str:
    """Write a document as the inside of a page: its first line as the heading, then paragraphs and pictures."""
    blocks: list[str] = []
    for segment in segments:
        if isinstance(segment, Image.Image):
            data = base64.b64encode(png_bytes(segment)).decode()
            blocks.append(f'<p><img alt="" src="data:image/png;base64,{data}"></p>')
            continue
        for line in _lines(segment):
            tag = "p" if blocks else "h1"
            # `dir` lets each line have the direction of its own script.
            blocks.append(f'<{tag} dir="auto">{html.escape(line)}</{tag}>')
    return "\n".join(blocks)


def as_markdown(segments: Sequence[str | Image.Image], names: Sequence[str]) -> str:
    """
    Write a document as Markdown.

    Args:
        segments (`Sequence[str | PIL.Image.Image]`): Texts and pictures in order.
        names (`Sequence[str]`): Of the files of the pictures.

    Example:
        >>> as_markdown(["a *b* <i>"], [])
        '# a \\\\*b\\\\* &lt;i&gt;\\n'
    """
    remaining, blocks = iter(names), []
    for segment in segments:
        if isinstance(segment, Image.Image):
            blocks.append(f"![]({quote(next(remaining))})")
            continue
        for line in _lines(segment):
            text = _NUMBERED.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\1", html.escape(line, quote=False)))
            blocks.append(text if blocks else f"# {text}")
    return "\n\n".join(blocks) + "\n"


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


__all__ = ["as_html", "as_markdown", "as_paragraphs", "check_suffix", "write_document"]
