"""
Records: what training reads, from any source that `datasets` can open.

A record is a picture with its captions, or a document of texts and pictures; a picture is a file or the codes of an
image tokenizer ([`Record`]). Reading order: `check_record` refuses what cannot be trained on and `BadRecords` counts
it; `CaptionMix` chooses a caption; `ShuffledOrder` and `ShuffledStream` give orders that a resumed run takes up where
it was left; `open_records` and `validate_records` put a source behind all that.

What this file leaves to others: codes from pictures (`encode.py`), and rows of ids from records (the processor).
"""

import glob
import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from PIL import Image
from torch.utils.data import IterableDataset as TorchIterableDataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..image_processing_mars import check_image_size, open_picture, to_rgb

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vq_model import VQModel

logger = logging.get_logger(__name__)

CAPTIONS = ("caption_en", "caption_zh", "caption", "fine_caption_en", "fine_caption_zh", "fine_caption")
CODES_FILE = "codes.json"
BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".jsonl": "json", ".json": "json", ".csv": "csv"}
# Reasons of the user's own making: such records are left out by intent and never stop a run.
RULED_OUT = frozenset(("picture too small", "picture too elongated", "caption too long", "score too low"))
FEW_RECORDS = 1000  # faults among the first records are measured against this many


class PictureFields(TypedDict, total=False):
    """A picture: a file, or codes in raster order with the size in pixels of what they were made of."""

    image: Any  # what `open_picture` takes, or {"bytes", "path"}
    image_codes: list[int] | None
    height: int | None
    width: int | None


class Segment(PictureFields, total=False):
    """A part of a document: a text or a picture, never both."""

    text: str | None


class Record(PictureFields, total=False):
    """A picture with at least one caption, or a document: `segments`. Null is as good as absent."""

    caption: str | None  # in any language
    caption_en: str | None
    caption_zh: str | None
    fine_caption: str | None  # detailed, for Stage II
    fine_caption_en: str | None
    fine_caption_zh: str | None
    segments: list[Segment] | None
    lowres_codes: list[int] | None  # of the same picture made smaller, for super-resolution
    enlarged_codes: list[int] | None  # of that small one, as its codes give it back, made larger again
    score: float | None  # curates
    style: str | None
    hexcode: str | None  # of an emoji: its code points
    key: str | None  # names the record in messages


class BadRecordError(ValueError):
    """A record that cannot be trained on. `reason` is the same for all of its kind, the message tells this one."""

    def __init__(self, reason: str, message: str):
        super().__init__(f"{reason}: {message}")
        self.reason = reason


@dataclass(frozen=True)
class RecordRules:
    """
    What a record has to be. `None` sets no limit.

    Args:
        min_size (`int`, defaults to 1): Least shorter side of a picture, in pixels.
        max_aspect_ratio (`float`, *optional*): Most times that a picture's longer side is its shorter.
        min_score (`float`, *optional*): Least `score`; a record without one falls below it.
        max_caption_length (`int`, *optional*): Longest caption, in characters.
        long_captions (`str`, defaults to `"truncate"`):
            [`captions_of`] cuts longer captions to that length (`"truncate"`), or passes them over as if they were
            missing (`"drop"`).
        codebook_size (`int`, *optional*): Codes lie in [0, codebook_size).
        downsample_factor (`int`, *optional*): Side in pixels of the square that one code stands for.

    Raises:
        ValueError: If a limit is out of range.
    """

    min_size: int = 1
    max_aspect_ratio: float | None = None
    min_score: float | None = None
    max_caption_length: int | None = None
    long_captions: Literal["truncate", "drop"] = "truncate"
    codebook_size: int | None = None
    downsample_factor: int | None = None

    def __post_init__(self) -> None:
        for name in ("min_size", "max_aspect_ratio", "max_caption_length", "codebook_size", "downsample_factor"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.long_captions not in ("truncate", "drop"):
            raise ValueError(f"`long_captions` must be 'truncate' or 'drop', got {self.long_captions!r}.")

    def is_too_long(self, caption: Any) -> bool:
        """Tell whether a caption is beyond the limit; blanks around it do not count. What is no text is not long."""
        if self.max_caption_length is None or not isinstance(caption, str):
            return False
        return len(caption.strip()) > self.max_caption_length


def captions_of(record: Mapping[str, Any], rules: RecordRules = RecordRules()) -> dict[str, str]:  # noqa: B008
    """
    Give the captions that a record has, by column, without blanks around them and none of them too long.

    Raises:
        BadRecordError: If there is none, or one is no text.
    """
    captions, was_too_long = {}, False
    for name in CAPTIONS:
        caption = record.get(name)
        if not isinstance(caption, str | None):
            raise BadRecordError("caption is no text", f"`{name}` must be a string or null, got {caption!r:.80}")
        if rules.is_too_long(caption) and rules.long_captions == "drop":
            was_too_long = True
        elif caption and caption.strip():
            captions[name] = caption.strip()[: rules.max_caption_length].rstrip()
    if was_too_long and not captions:
        limit = f"at most {rules.max_caption_length} characters"
        raise BadRecordError("caption too long", f"a caption may have {limit}; cut long ones or raise the limit")
    if not captions:
        given = {name: record[name] for name in CAPTIONS if name in record}
        raise BadRecordError(
            "no caption", f"one of {', '.join(CAPTIONS)} must hold text, got {given or 'none of them'}"
        )
    return captions


def open_record_picture(image: Any) -> Image.Image:
    """
    Open the picture of a record; a local file is read no further than its header.

    Args:
        image: What `open_picture` takes, or `{"bytes", "path"}`, which is what [`open_records`] gives.

    Raises:
        BadRecordError: If it is no picture.
    """
    try:
        if not isinstance(image, dict):
            return open_picture(image)
        if image.get("bytes") is not None:
            return open_picture(image["bytes"])
        is_local = os.path.isfile(image.get("path") or "")
        return open_picture(Path(image["path"])) if is_local else ImageFeature().decode_example(image)
    except Exception as error:  # decoders and networks raise whatever they like
        raise BadRecordError("unreadable picture", f"{error}") from error


def check_record(
    record: Mapping[str, Any],
    rules: RecordRules = RecordRules(),  # noqa: B008
    decode: bool = False,
) -> None:
    """
    Refuse a record that cannot be trained on.

    Args:
        record ([`Record`]): As [`open_records`] gives it.
        rules ([`RecordRules`]): What it has to be.
        decode (`bool`, defaults to `False`): Read whole pictures, which finds damaged ones, and not only headers.

    Raises:
        BadRecordError: Naming what came, what was expected and what to do.
    """
    score, segments = record.get("score"), record.get("segments")
    if rules.min_score is not None and not (score is not None and score >= rules.min_score):
        raise BadRecordError("score too low", f"`score` must be at least {rules.min_score}, got {score}")
    if segments is None:
        captions_of(record, rules)
        _check_picture(record, rules, decode)
    elif not segments:
        raise BadRecordError("empty document", "`segments` must hold at least one text or picture, got none")
    for position, segment in enumerate(segments or ()):
        has_text = bool(segment.get("text"))
        if has_text == _has_picture(segment):
            came = "both" if has_text else "neither"
            raise BadRecordError("broken segment", f"segment {position} must be a text or a picture, got {came}")
        if not has_text:
            _check_picture(segment, rules, decode)


def _has_picture(fields: Mapping[str, Any]) -> bool:
    return fields.get("image") is not None or fields.get("image_codes") is not None


def _check_picture(fields: Mapping[str, Any], rules: RecordRules, decode: bool) -> None:
    if not _has_picture(fields):
        raise BadRecordError("no picture", "`image` or `image_codes` must be given, got neither")
    if fields.get("image_codes") is not None:
        _check_codes(fields["image_codes"], fields.get("height"), fields.get("width"), rules)
        return
    picture = open_record_picture(fields["image"])
    _check_size(picture.height, picture.width, rules)
    try:
        if decode:
            to_rgb(picture)
    except ValueError as error:
        raise BadRecordError("unreadable picture", f"{error}") from error


def _check_codes(image_codes: Any, height: Any, width: Any, rules: RecordRules) -> None:
    codes, factor = np.asarray(image_codes), rules.downsample_factor
    try:
        check_image_size(height, width, factor or 1)
    except ValueError as error:
        raise BadRecordError("codes do not fit their size", f"{error}") from error
    _check_size(height, width, rules)
    count = codes.size if factor is None else height * width // factor**2
    if codes.shape != (count,) or codes.dtype.kind not in "iu":
        came = f"{codes.dtype} of shape {codes.shape} for {height} x {width} pixels"
        expected = f"`image_codes` must be a list of {count} whole numbers"
        raise BadRecordError("codes do not fit their size", f"{expected}, got {came}")
    if codes.min() < 0 or codes.max() >= (rules.codebook_size or np.inf):
        came = f"{codes.min()} to {codes.max()}; encode the pictures with this model's image tokenizer"
        raise BadRecordError("codes out of range", f"codes must lie in [0, {rules.codebook_size}), got {came}")


def _check_size(height: int, width: int, rules: RecordRules) -> None:
    short, long = sorted((height, width))
    if short < rules.min_size:
        limit = f"its shorter side must be at least {rules.min_size} pixels"
        raise BadRecordError("picture too small", f"{limit}, got {height} x {width}")
    if rules.max_aspect_ratio is not None and long > rules.max_aspect_ratio * short:
        limit = f"its longer side may be {rules.max_aspect_ratio} times the shorter"
        raise BadRecordError("picture too elongated", f"{limit}, got {height} x {width}; crop it or raise the limit")


@dataclass
class BadRecords:
    """
    Counts bad records by reason, and stops a run that meets too many.

    What breaks a rule of size, length or score is left out by intent; all else is a fault of the data. The run stops
    when faults exceed `limit` times the records seen so far, which count as 1,000 (or all there are) at the start.

    Args:
        on_bad (`str`, defaults to `"skip"`): `"raise"` stops at the first bad record, whatever its reason.
        limit (`float`, defaults to 0.01): Largest share of faults.
        num_records (`int`, *optional*): Records in all, if that is known.

    Example:
        >>> for index, record in enumerate(records):
        ...     with bad_records.skipping(record, index):
        ...         check_record(record)
        ...         rows.append(record)
        >>> bad_records.finish()
        >>> print(bad_records)
        2 of 2,000 records were left out (1 picture too small, 1 unreadable picture), 3 had a caption that is too long.
    """

    on_bad: Literal["raise", "skip"] = "skip"
    limit: float = 0.01
    num_records: int | None = None
    num_seen: int = 0
    num_long_captions: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.on_bad not in ("raise", "skip") or not 0 <= self.limit <= 1:
            given = f"{self.on_bad!r} and {self.limit}"
            raise ValueError(f"`on_bad` must be 'raise' or 'skip' and `limit` a share in [0, 1], got {given}.")

    @contextmanager
    def skipping(self, record: Mapping[str, Any], index: int) -> Iterator[None]:
        """
        Count a record; a [`BadRecordError`] ends the block and no more.

        Raises:
            ValueError: Naming the record, if it is the first bad one (`on_bad="raise"`) or one too many.
        """
        self.num_seen += 1
        try:
            yield
        except BadRecordError as error:
            self.reasons[error.reason] += 1
            key = "" if record.get("key") is None else f" (key {record['key']!r})"
            message = f"Record {index}{key}: {error}."
            if self.on_bad == "raise":
                raise ValueError(message) from error
            self._stop_beyond(max(self.num_seen, min(FEW_RECORDS, self.num_records or FEW_RECORDS)), message)

    def finish(self) -> None:
        """Stop if the share of faults is too large, now that all records were seen."""
        self._stop_beyond(self.num_seen, "")

    def _stop_beyond(self, num_records: int, message: str) -> None:
        if sum(self.reasons[reason] for reason in self.reasons.keys() - RULED_OUT) > self.limit * num_records:
            raise ValueError(f"More than {self.limit:.1%} of the data are broken: {self} Mend the data. {message}")

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
        left_out = f"{self.reasons.total():,} of {self.num_seen:,} records were left out ({reasons or 'none'})"
        return f"{left_out}, {self.num_long_captions:,} had a caption that is too long."


@dataclass(frozen=True)
class CaptionMix:
    """
    Shares of captions. What a record has not is replaced: first the language, then the detail.

    Args:
        chinese (`float`, defaults to 0.5): Share of Chinese captions.
        fine (`float`, defaults to 0.0): Share of fine-grained captions.

    Raises:
        ValueError: If a share is not in [0, 1].

    Example:
        >>> CaptionMix(chinese=1.0).choose({"caption_en": "a red apple", "caption_zh": "红苹果"}, seed=0, index=5)
        '红苹果'
    """

    chinese: float = 0.5
    fine: float = 0.0

    def __post_init__(self) -> None:
        for name in ("chinese", "fine"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be a share in [0, 1], got {getattr(self, name)}.")

    def choose(self, captions: Mapping[str, str], seed: int, index: int) -> str:
        """
        Choose one of the captions that [`captions_of`] gives; the same `seed` and `index` choose the same.

        Args:
            captions (`dict[str, str]`): At least one.
            seed (`int`): Of the run.
            index (`int`): Of the sample, counted over all passes.
        """
        rng = random.Random(f"{seed}/{index}")
        is_chinese, is_fine = rng.random() < self.chinese, rng.random() < self.fine
        languages = ("_zh", "_en", "") if is_chinese else ("_en", "_zh", "")
        details = ("fine_", "") if is_fine else ("", "fine_")
        names = (f"{detail}caption{language}" for detail in details for language in languages)
        return next(captions[name] for name in names if name in captions)


class ShuffledOrder:
    """
    Endless passes over records by number: `order[i]` is the record of the i-th sample, whatever was asked before.

    Each pass has an order of its own, in which every record comes once, or with `weights` as often as chance has it.

    Args:
        num_records (`int`): Records of a pass.
        seed (`int`, defaults to 0): Decides all orders.
        weights (`torch.Tensor` of shape `(num_records,)`, *optional*): How often each record comes, to scale.

    Raises:
        ValueError: If there are no records, or weights that cannot be shares.
    """

    def __init__(self, num_records: int, seed: int = 0, weights: torch.Tensor | None = None):
        if num_records < 1:
            raise ValueError(f"An order needs at least one record, got {num_records}.")
        self.num_records, self.seed = num_records, seed
        self._bounds = None if weights is None else weights.double().cumsum(0)
        if weights is not None and not (
            weights.shape == (num_records,) and (weights >= 0).all() and 0 < weights.double().sum() < torch.inf
        ):
            raise ValueError(
                f"`weights` must be {num_records} numbers from 0 on with a finite sum above 0, got shape "
                f"{tuple(weights.shape)} from {weights.min():g} on."
            )
        self._pass, self._order = -1, torch.empty(0)

    def __getitem__(self, index: int) -> int:
        number, place = divmod(index, self.num_records)
        if number != self._pass:
            self._pass, self._order = number, self._order_of(number)
        return int(self._order[place])

    def _order_of(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(_seed_of_pass(self.seed, number))
        if self._bounds is None:
            return torch.randperm(self.num_records, generator=generator)
        # Not `torch.multinomial`, which ends at 2**24 records.
        draws = torch.rand(self.num_records, generator=generator, dtype=torch.float64) * self._bounds[-1]
        return torch.searchsorted(self._bounds, draws, right=True)


def _seed_of_pass(seed: int, number: int) -> int:
    return seed * 100_003 + number


class ShuffledStream(TorchIterableDataset):
    """
    Endless passes over a stream, each in an order of its own, that a saved state takes up exactly.

    Shards come in a random order, and records are shuffled inside blocks of `buffer_size`. The library's own buffer
    mixes a little more, but forgets what it holds when it resumes; a block is read and shuffled again.

    Args:
        dataset (`datasets.IterableDataset`): From [`open_records`] with `streaming=True`.
        seed (`int`, defaults to 0): Decides all orders.
        buffer_size (`int`, defaults to 1000): Records held in memory.
        after_pass (`Callable`, *optional*): Called at the end of each pass.

    Raises:
        ValueError: If a state of another seed or block size is loaded, or the stream is empty.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        seed: int = 0,
        buffer_size: int = 1000,
        after_pass: Callable[[], None] | None = None,
    ):
        if buffer_size < 1:
            raise ValueError(f"`buffer_size` must be 1 record or more, got {buffer_size}.")
        self.dataset, self.settings = dataset, {"seed": seed, "buffer_size": buffer_size}
        self.after_pass, self._pass = after_pass, 0
        self._stream: IterableDataset | None = None
        self._saved: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            stream, saved, self._saved = self._stream_of(self._pass), self._saved, None
            self._stream = stream
            if saved is not None:
                stream.load_state_dict(saved)
            is_empty = saved is None  # a saved state may stand at the end of a pass
            for record in stream:
                is_empty = False
                yield record
            if self.after_pass is not None:
                self.after_pass()
            if is_empty:
                raise ValueError("The stream gives no records: it is empty, or all of them are left out.")
            self._pass += 1

    def _stream_of(self, number: int) -> IterableDataset:
        seed = _seed_of_pass(self.settings["seed"], number)
        blocks = {"batched": True, "batch_size": self.settings["buffer_size"], "with_indices": True}
        shuffle = partial(_shuffle_block, seed=seed)
        stream = self.dataset.map(shuffle, **blocks, features=self.dataset.features)
        stream.set_epoch(1 + seed)  # shuffles shards
        return stream

    def state_dict(self) -> dict[str, Any]:
        """Say where the stream stands: after the record that it gave last."""
        stream = self._saved if self._stream is None else self._stream.state_dict()
        return {**self.settings, "pass": self._pass, "stream": stream}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin where `state` was taken."""
        if differing := {name: (state[name], own) for name, own in self.settings.items() if state[name] != own}:
            raise ValueError(f"The state is of another stream (there, here): {differing}. Resume with the same.")
        self._pass, self._saved, self._stream = state["pass"], state["stream"], None


def _shuffle_block(block: dict[str, list[Any]], indices: list[int], seed: int) -> dict[str, list[Any]]:
    order = np.random.default_rng((seed, indices[0])).permutation(len(indices))
    return {name: [values[i] for i in order] for name, values in block.items()}


def tokenizer_fingerprint(vqgan: "VQModel") -> str:
    """
    Tell image tokenizers apart: the sha256 of the configuration and of all tensors, by name, as bfloat16.

    Weights are often stored in half precision: the rounded tokenizer is the same one.

    Returns:
        `str`: 64 hexadecimal digits. Equal ones give equal codes for equal pixels, up to rounding.
    """
    config = {name: value for name, value in vqgan.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(vqgan.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().to(torch.bfloat16).contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def open_records(
    source: Any,
    split: str = "train",
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
    vqgan: "VQModel | None" = None,
    **options: Any,
) -> Dataset | IterableDataset:
    """
    Open records from any source of `datasets`. Pictures come as `{"bytes", "path"}`: see [`open_record_picture`].

    Columns bear the names of [`Record`]. If there is one column of pictures it becomes `image` by itself, and in a
    WebDataset `__key__` becomes `key`, `txt` becomes `caption`, and what `json` holds become columns. For more than
    new names, open and `map` the data with `datasets` and give the result as `source`.

    Args:
        source (`str`, `Path`, a list of them, or a data set):
            A name on the Hub; a folder with pictures, parquet files or tar shards, or one that `save_to_disk`,
            `mars-hf data encode` or `mars-hf data build` wrote; files (`"shards/*.tar"`); or a data set of `datasets`.
        split (`str`, defaults to `"train"`): Which split. Files named one by one, or a single data set, are all of it.
        streaming (`bool`, defaults to `False`): Read on the way instead of preparing all first.
        columns (`dict[str, str]`, *optional*): Their names to ours, e.g. `{"text": "caption_en"}`.
        vqgan (`diffusers.VQModel`, *optional*): Refuse codes that another image tokenizer made.
        options: Further arguments of `load_dataset`, such as `name`, `revision`, `cache_dir`, `num_proc`.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: [`Record`]s, and whatever columns there are beside.

    Raises:
        ValueError: If there is no such source or split, if columns are missing, or if codes are another tokenizer's.
    """
    dataset = _load(source, split, streaming, vqgan, options)
    if vqgan is not None and isinstance(source, str | Path | list):
        _check_tokenizer(_files_of(source)[0], "image_codes" in (dataset.features or ()), vqgan, options)
    if dataset.features is None:  # of streamed lines of JSON nothing is known in advance
        dataset = dataset.cast(Dataset.from_list(list(dataset.take(FEW_RECORDS))).features)
    if isinstance(dataset, IterableDataset):
        return _with_our_names(_unpacked(undecoded(dataset)), columns or {})  # in this order: renaming would decode
    dataset = _with_our_names(_unpacked(dataset), columns or {})
    for name, feature in dataset.features.items():
        dataset = dataset.cast_column(name, ImageFeature(decode=False)) if _is_picture(feature) else dataset
    return dataset


def undecoded(dataset: Dataset | IterableDataset) -> IterableDataset:
    """Stream records with pictures as files, those of documents too: one that is damaged does not end the stream."""
    return (dataset if isinstance(dataset, IterableDataset) else dataset.to_iterable_dataset()).decode(False)


def _load(
    source: Any, split: str, streaming: bool, vqgan: "VQModel | None", options: dict[str, Any]
) -> Dataset | IterableDataset:
    if isinstance(source, Dataset | IterableDataset):
        return source
    if isinstance(source, dict):
        if split not in source:
            raise ValueError(f"The data have no split {split!r}, only {', '.join(map(repr, source))}.")
        return source[split]
    names = _files_of(source)
    folder = Path(names[0])
    if (folder / CODES_FILE).is_file():
        names = _code_files(folder, split)
    builder = BUILDERS.get(Path(names[0]).suffix)
    if builder is not None and not Path(names[0]).is_dir():
        return load_dataset(builder, data_files={split: names}, split=split, streaming=streaming, **options)
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        dataset = _load(load_from_disk(folder), split, streaming, vqgan, options)
        return dataset.to_iterable_dataset() if streaming else dataset
    if len(names) > 1 or not (folder.is_dir() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", names[0])):
        raise ValueError(
            f"{names[0]} is no folder, no name on the Hub, and no file that ends in {', '.join(BUILDERS)}. Name one; "
            "pictures go in a folder."
        )
    try:
        return load_dataset(names[0], split=split, streaming=streaming, **options)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"There is no folder {names[0]} here, and no data set of that name could be read from the Hub: {error}"
        ) from error


def has_splits(source: Any) -> bool:
    """Tell whether a source of [`open_records`] may hold several splits; files named one by one do not."""
    names = _files_of(source)
    folder = Path(names[0])
    is_file = folder.suffix in BUILDERS and not folder.is_dir()
    return not is_file and not (folder / "state.json").is_file()


def _files_of(source: Any) -> list[str]:
    """List what a source names, with patterns written out."""
    names: list[str] = []
    for name in map(str, [source] if isinstance(source, str | Path) else source):
        is_path = "://" not in name and not Path(name).exists()
        is_file = is_path and (glob.has_magic(name) or Path(name).suffix in BUILDERS)
        found = sorted(glob.glob(name, recursive=True)) if is_file else [name]
        if not found:
            raise ValueError(f"There is no file {name}.")
        names += found
    if not names:
        raise ValueError(f"There is no file {source}.")
    return names


def source_fingerprint(source: Any, split: str = "train") -> str | None:
    """
    Tell sources apart without reading their records: the sha256 of names and sizes of files, and of `codes.json`.

    Of a folder with `codes.json` only what is of the split counts, so that another one may be encoded beside it.

    Args:
        source (`str`, `Path` or a list of them): As in [`open_records`].
        split (`str`, defaults to `"train"`): Which split.

    Returns:
        `str`: 64 hexadecimal digits; or `None` if the source is not on this machine.
    """
    digest = hashlib.sha256()
    for name in _files_of(source):
        root = Path(name)
        if not root.exists():
            return None
        files = [root] if root.is_file() else _data_in(root)
        if (root / CODES_FILE).is_file():
            manifest = json.loads((root / CODES_FILE).read_text(encoding="utf-8"))
            digest.update(json.dumps({**manifest, "splits": manifest["splits"].get(split)}, sort_keys=True).encode())
            files = _shards_of(root, split)
        for file in files:
            digest.update(f"{file.relative_to(root.parent).as_posix()} {file.stat().st_size}\n".encode())
    return digest.hexdigest()


def _data_in(folder: Path) -> list[Path]:
    """List what a folder holds, without its description and what is hidden."""
    inside = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return sorted(path for path in inside if not any(part[0] == "." for part in path.relative_to(folder).parts))


def _shards_of(folder: Path, split: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"data/{split}-*") if path.suffix in BUILDERS)


def _code_files(folder: Path, split: str) -> list[str]:
    manifest = json.loads((folder / CODES_FILE).read_text(encoding="utf-8"))
    if split not in manifest["splits"]:
        raise ValueError(
            f"{folder} holds no codes of the split {split!r}, only of {', '.join(manifest['splits'])}. "
            f"`mars-hf data encode --split {split}` with the same `--out` puts them beside these."
        )
    if not manifest["splits"][split].get("complete"):
        raise ValueError(
            f"The codes of split {split!r} in {folder} are not complete. Run again what writes them, such as "
            "`mars-hf data encode` or `mars-hf data build`: it continues."
        )
    return [str(path) for path in _shards_of(folder, split)]


def _check_tokenizer(name: str, has_codes: bool, vqgan: "VQModel", options: Mapping[str, Any]) -> None:
    """Refuse codes that another image tokenizer made; say so where nothing tells which one did."""
    file = _codes_file_of(name, options)
    if file is None:
        if has_codes:
            logger.warning(
                f"The codes of {name} have no `{CODES_FILE}` beside them: whether this model's image tokenizer made "
                "them is not known. `mars-hf data encode` writes one."
            )
        return
    made_by = json.loads(file.read_text(encoding="utf-8"))["tokenizer"]["fingerprint"]
    if (own := tokenizer_fingerprint(vqgan)) != made_by:
        raise ValueError(
            f"The codes in {name} were made by the image tokenizer {made_by}, but this model's is {own}. Encode the "
            "pictures again with `mars-hf data encode` and this model."
        )


def _codes_file_of(name: str, options: Mapping[str, Any]) -> Path | None:
    """Find what says which tokenizer made codes: in a folder, above a file of one, or in a repository of the Hub."""
    place = Path(name)
    if place.exists():
        folders = [place] if place.is_dir() else list(place.absolute().parents)[:2]
        return next((folder / CODES_FILE for folder in folders if (folder / CODES_FILE).is_file()), None)
    try:
        found = hf_hub_download(name, CODES_FILE, repo_type="dataset", revision=options.get("revision"))
    except (OSError, EntryNotFoundError, HFValidationError):  # no such file, no network, no name of the Hub
        return None
    return Path(found)


def _unpacked(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Make columns of what a WebDataset's `json` holds; a file of the same name goes before it."""
    features, fields = dataset.features, dataset.features.get("json")
    if "__key__" not in features or not isinstance(fields, dict):
        return dataset
    taken = {*features, "caption"} if "txt" in features else {*features}
    own = {name: feature for name, feature in fields.items() if name not in taken}
    if isinstance(dataset, IterableDataset):
        others = {name: feature for name, feature in features.items() if name != "json"}
        unpack = partial(_unpack, names=list(own))
        return dataset.map(unpack, remove_columns=["json"], features=Features({**others, **own}))
    flat = dataset.flatten(max_depth=2)  # of that column alone: no picture is copied
    flat = flat.remove_columns([f"json.{name}" for name in fields if name not in own])
    return flat.rename_columns({f"json.{name}": name for name in own})


def _unpack(record: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: (record["json"] or {}).get(name) for name in names}


def _with_our_names(dataset: Dataset | IterableDataset, columns: Mapping[str, str]) -> Dataset | IterableDataset:
    """Rename columns, and refuse a data set whose columns make no record."""
    features = dataset.features
    for theirs, ours in columns.items():
        if theirs not in features or ours in features or ours not in Record.__annotations__:
            raise ValueError(
                f"{theirs!r} cannot become {ours!r}: the columns are {list(features)}, and those of a record "
                f"{list(Record.__annotations__)}."
            )
    taken = {*features, *columns.values()}
    usual = {theirs: ours for theirs, ours in _usual_names(features).items() if ours not in taken}
    renamed = {**usual, **columns}
    dataset = dataset.rename_columns(renamed) if renamed else dataset
    names = set(dataset.column_names)
    has_picture = "image" in names or {"image_codes", "height", "width"} <= names
    if "segments" not in names and not (has_picture and names & set(CAPTIONS)):
        raise ValueError(
            f"Records need `image`, or `image_codes` with `height` and `width`, and one of {', '.join(CAPTIONS)}; or "
            f"`segments`. The columns are {list(features)}. Name them with columns={{'theirs': 'ours'}}."
        )
    return dataset


def _usual_names(features: Features) -> dict[str, str]:
    pictures = [name for name, feature in features.items() if _is_picture(feature)]
    names = {pictures[0]: "image"} if len(pictures) == 1 else {}
    of_webdataset = {"__key__": "key", "txt": "caption"} if "__key__" in features else {}
    return names | {theirs: ours for theirs, ours in of_webdataset.items() if theirs in features}


def _is_picture(feature: Any) -> bool:
    return isinstance(feature, ImageFeature)


def validate_records(
    dataset: Dataset | IterableDataset,
    rules: RecordRules = RecordRules(),  # noqa: B008
    on_bad: Literal["raise", "skip"] = "raise",
    limit: float = 0.01,
    decode: bool = True,
    progress: bool = True,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> tuple[Dataset | IterableDataset, BadRecords]:
    """
    Keep the records that can be trained on. A data set is checked now, a stream while it is read.

    Records are given as they are: nothing is copied. Where they have captions that are too long beside others,
    [`captions_of`] with the same rules cuts them or passes them over.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): From [`open_records`].
        rules ([`RecordRules`]): What a record has to be.
        on_bad (`str`, defaults to `"raise"`): Stop at the first bad record (`"raise"`), or leave it out (`"skip"`).
        limit (`float`, defaults to 0.01): Share of broken records that stops a run all the same, see [`BadRecords`].
        decode (`bool`, defaults to `True`): Read whole pictures, which finds damaged ones, and not only headers.
        progress (`bool`, defaults to `True`): Show a progress bar.
        check (`Callable`, *optional*): Raises a [`BadRecordError`] for what else a record must not be.

    Returns:
        `tuple`: The good records, and the [`BadRecords`] with counts by reason; of a stream it fills as it is read.

    Raises:
        ValueError: Naming the first bad record, by its number and its `key`, and what is wrong with it.
    """
    if isinstance(dataset, IterableDataset):
        bad_records = BadRecords(on_bad, limit)
        is_good = partial(_is_good, rules=rules, decode=decode, bad_records=bad_records, check=check)
        return undecoded(dataset).filter(is_good, with_indices=True), bad_records
    left_out, bad_records = find_bad_records(dataset, rules, on_bad, limit, decode, progress, check)
    return without(dataset, left_out), bad_records


def find_bad_records(
    dataset: Dataset,
    rules: RecordRules = RecordRules(),  # noqa: B008
    on_bad: Literal["raise", "skip"] = "raise",
    limit: float = 0.01,
    decode: bool = True,
    progress: bool = True,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> tuple[list[int], BadRecords]:
    """Give the numbers of the records that cannot be trained on, and why: see [`validate_records`]."""
    bad_records = BadRecords(on_bad, limit, len(dataset))
    records = tqdm(undecoded(dataset), desc="Checking records", total=len(dataset), disable=not progress)
    options = {"rules": rules, "decode": decode, "bad_records": bad_records, "check": check}
    left_out = [index for index, record in enumerate(records) if not _is_good(record, index, **options)]
    return left_out, bad_records


def without(dataset: Dataset, left_out: Sequence[int]) -> Dataset:
    """Give a data set without the records of these numbers; the same one if there are none."""
    if not left_out:
        return dataset
    is_good = np.ones(len(dataset), dtype=bool)
    is_good[left_out] = False
    return dataset.select(is_good.nonzero()[0])


def _is_good(
    record: Mapping[str, Any],
    index: int,
    rules: RecordRules,
    decode: bool,
    bad_records: BadRecords,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> bool:
    with bad_records.skipping(record, index):
        check_record(record, rules, decode)
        if check is not None:
            check(record)
        bad_records.num_long_captions += any(rules.is_too_long(record.get(name)) for name in CAPTIONS)
        return True
    return False
