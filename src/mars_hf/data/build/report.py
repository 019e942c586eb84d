"""
What became of every item: counts by reason, histograms by filter, sample pictures; as JSON and as one HTML page.

Captions, keys and messages are strangers' text. All text goes into the page through `html.escape`, and the page
forbids its own scripts and connections, should a browser find any.
"""

import base64
import html
import io
import json
import math
from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from .pictures import NOTES, REASONS, clean_text, thumbnail
from .readers import Item
from .recipe import Recipe
from .writers import read_records, write_in_place, write_json

THUMBNAIL = 128  # pixels
SHOWN_CHARACTERS = 300  # of a caption

SIDES = (0, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, math.inf)
RATIOS = (1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 10, math.inf)
LENGTHS = (0, 1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, math.inf)
COSINES = (-1.0, *(i / 50 for i in range(0, 26)), 1.01)
RATINGS = (-math.inf, *(i / 2 for i in range(0, 21)), math.inf)


class Sample(NamedTuple):
    """A dropped item: where it is, and why it was dropped in particular."""

    shard: int
    position: int
    detail: str


@dataclass
class Histogram:
    """
    How a number is spread among what came to a filter.

    Args:
        title (`str`): What the number is.
        edges (`tuple[float, ...]`): Bin `i` holds `edges[i] <= value < edges[i + 1]`.
        setting (`str`): The setting that judges the number, e.g. `"filter.min_side"`.
        threshold (`float`, *optional*): Its value.
    """

    title: str
    edges: tuple[float, ...]
    setting: str = ""
    threshold: float | None = None
    kept: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kept, self.dropped = [0] * (len(self.edges) - 1), [0] * (len(self.edges) - 1)

    def add(self, value: float, kept: bool) -> None:
        place = min(max(bisect_right(self.edges, value) - 1, 0), len(self.edges) - 2)
        (self.kept if kept else self.dropped)[place] += 1

    def as_dict(self) -> dict[str, Any]:
        edges = [edge if math.isfinite(edge) else None for edge in self.edges]
        judged = {"setting": self.setting, "threshold": self.threshold}
        return {"title": self.title, **judged, "edges": edges, "kept": self.kept, "dropped": self.dropped}


class Report:
    """Counts of one build, added up in the order of the input."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.items = self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.samples: dict[str, list[Sample]] = defaultdict(list)
        limits = recipe.filter
        self.histograms = {
            "side": Histogram("shorter side, pixels", SIDES, "filter.min_side", limits and limits.min_side),
            "ratio": Histogram("aspect ratio", RATIOS, "filter.max_aspect_ratio", limits and limits.max_aspect_ratio),
            "caption": Histogram(
                "characters of the caption", LENGTHS, "captions.max_characters", recipe.captions.max_characters
            ),
            "score_clip": Histogram("CLIP score", COSINES, "select.clip_minimum"),
            "score_aesthetic": Histogram("aesthetic score", RATINGS, "select.aesthetic_minimum"),
        }

    def count_item(self, row: dict[str, Any], reason: str | None) -> None:
        """Count one item after measuring; a peculiarity counts where the item is still in."""
        self.items += 1
        if row["caption_characters"] is not None:
            is_fine = reason not in ("caption_too_long", "no_caption")
            self.histograms["caption"].add(row["caption_characters"], is_fine)
        if row["width"] is not None:
            short, long = sorted((row["width"], row["height"]))
            self.histograms["side"].add(short, reason != "too_small")
            if reason != "too_small":
                self.histograms["ratio"].add(long / short, reason != "too_elongated")
        if reason is None:
            self.notes.update(row["notes"])

    def drop(self, reason: str, sample: Sample) -> None:
        """Count one dropped item; the first of each reason are shown."""
        self.dropped[reason] += 1
        if len(self.samples[reason]) < self.recipe.samples:
            self.samples[reason].append(sample)

    def threshold(self, score: str, cut: float, setting: str) -> None:
        """Note which score it takes to stay, and by which setting."""
        self.histograms[score].threshold = cut if math.isfinite(cut) else None
        self.histograms[score].setting = setting

    def count_score(self, score: str, value: float, kept: bool) -> None:
        self.histograms[score].add(value, kept)

    def count_written(self, records: int, without_caption: int) -> None:
        """Count the records of an output file."""
        self.kept += records
        if without_caption:  # the captioner said nothing
            self.dropped["no_caption"] += without_caption

    def as_dict(self) -> dict[str, Any]:
        """Give what the JSON file holds."""
        shown = {
            name: histogram for name, histogram in self.histograms.items() if any(histogram.kept + histogram.dropped)
        }
        return {
            "items": self.items,
            "kept": self.kept,
            "dropped": {reason: self.dropped[reason] for reason in REASONS if self.dropped[reason]},
            "notes": {note: self.notes[note] for note in NOTES if self.notes[note]},
            "histograms": {name: histogram.as_dict() for name, histogram in shown.items()},
            "settings": self.recipe.what_decides_the_output(),
            "origins": self.recipe.origins,
        }


def write_report(report: Report, out: Path, items: dict[Sample, Item], outputs: list[Path]) -> dict[str, Any]:
    """
    Write `report.json` and `report.html`.

    Args:
        report ([`Report`]): The counts.
        out (`Path`): Folder to write to.
        items (`dict[Sample, Item]`): What is shown of dropped items.
        outputs (`list[Path]`): Output files, of whose first records some are shown.

    Returns:
        `dict`: What `report.json` holds.
    """
    content = report.as_dict()
    sections = [("Kept", f"{report.kept:,} records", _kept_samples(report.recipe, outputs))]
    for reason, meaning in REASONS.items():
        if samples := report.samples.get(reason):
            figures = [_dropped_figure(sample, items.get(sample), report.recipe) for sample in samples]
            sections.append((f"Dropped: {reason}", f"{report.dropped[reason]:,}, {meaning}", figures))
    page = _page(content, sections)
    write_json(out / "report.json", content)
    write_in_place(out / "report.html", lambda scratch: scratch.write_text(page, encoding="utf-8"))
    return content


def _kept_samples(recipe: Recipe, outputs: list[Path]) -> list[str]:
    figures: list[str] = []
    for path in outputs:
        for record in read_records(path):
            if len(figures) == recipe.samples:
                return figures
            texts = [record["key"], f"{record['width']} x {record['height']}"]
            texts += [f"{name}: {value}" for name, value in record.items() if "caption" in name and value]
            texts += [f"{name}: {value:.4f}" for name, value in record.items() if name.startswith("score_")]
            picture = Image.open(io.BytesIO(record["image"])) if "image" in record else None
            figures.append(_figure(picture, texts))
    return figures


def _dropped_figure(sample: Sample, item: Item | None, recipe: Recipe) -> str:
    if item is None:
        return _figure(None, [sample.detail])
    picture = thumbnail(item.data, item.extension, recipe.decode, THUMBNAIL) if item.data else None
    texts = [item.key, sample.detail]
    texts += [f"{language}: {clean_text(text[:SHOWN_CHARACTERS])[0]}" for language, text in item.captions.items()]
    return _figure(picture, texts)


def _figure(picture: Image.Image | None, texts: list[str]) -> str:
    image = '<div class="none">no picture</div>'
    if picture is not None:
        buffer = io.BytesIO()
        picture = picture.convert("RGB")
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.save(buffer, "PNG")
        image = f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    lines = "<br>".join(html.escape(text[:SHOWN_CHARACTERS]) for text in texts if text)
    return f"<figure>{image}<figcaption>{lines}</figcaption></figure>"


STYLE = """
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
figure { display: inline-block; width: 150px; margin: 4px; vertical-align: top }
figure img { max-width: 128px } figcaption { font-size: 11px; overflow-wrap: anywhere }
.none { width: 128px; height: 64px; line-height: 64px; background: #eee; color: #888; text-align: center }
.kept { fill: #3a7 } .dropped { fill: #c54 } pre { background: #f6f6f6; padding: 1em; overflow: auto }
"""


def _page(content: dict[str, Any], sections: list[tuple[str, str, list[str]]]) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    parts = [
        f"<p>{content['items']:,} items, {content['kept']:,} kept.</p>",
        "<h2>Dropped</h2>" + _table(content["dropped"], REASONS),
        "<h2>Put right, among what passed all checks of single items and is no duplicate</h2>"
        + _table(content["notes"], NOTES),
        "<h2>Filters</h2>",
        *(_histogram(histogram, content["origins"]) for histogram in content["histograms"].values()),
    ]
    for title, subtitle, figures in sections:
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(subtitle)}</p>{''.join(figures)}")
    settings = html.escape(json.dumps(content["settings"], ensure_ascii=False, indent=1))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Data build</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style></head><body>'
        f"<h1>Data build</h1>{''.join(parts)}<h2>Settings</h2><pre>{settings}</pre></body></html>\n"
    )


def _table(counts: dict[str, int], meanings: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{count:,}</td><td>{html.escape(meanings[name])}</td></tr>'
        for name, count in counts.items()
    )
    return f"<table>{rows}</table>" if rows else "<p>none</p>"


def _histogram(histogram: dict[str, Any], origins: dict[str, str]) -> str:
    """Draw bars of what stayed, and on top of them what was dropped."""
    highest = max(map(sum, zip(histogram["kept"], histogram["dropped"], strict=True))) or 1
    width, height, bars = 36, 100, []
    for i, ((low, high), kept, dropped) in enumerate(
        zip(pairwise(histogram["edges"]), histogram["kept"], histogram["dropped"], strict=True)
    ):
        tall, taller = height * kept / highest, height * (kept + dropped) / highest
        low_text, high_text = ("" if edge is None else f"{edge:g}" for edge in (low, high))
        span = f"{low_text} to {high_text}: {kept} kept, {dropped} dropped"
        bars.append(
            f"<g><title>{html.escape(span)}</title>"
            f'<rect class="kept" x="{i * width}" y="{height - tall:.1f}" width="{width - 2}" height="{tall:.1f}"/>'
            f'<rect class="dropped" x="{i * width}" y="{height - taller:.1f}" width="{width - 2}" '
            f'height="{taller - tall:.1f}"/>'
            f'<text x="{i * width}" y="{height + 14}" font-size="10">{low_text}</text></g>'
        )
    threshold = "no threshold" if histogram["threshold"] is None else f"threshold {histogram['threshold']:g}"
    origin = {"ours": ", ours: not stated in the paper", "paper": ", as in the paper"}.get(
        origins.get(histogram["setting"], ""), ""
    )
    title = html.escape(f"{histogram['title']}: {threshold} ({histogram['setting']}{origin})")
    return f'<p>{title}</p><svg width="{len(bars) * width}" height="{height + 20}">{"".join(bars)}</svg>'
