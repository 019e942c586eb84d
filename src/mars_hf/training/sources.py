"""
What the data of a recipe become: opened, checked record by record, and given the captions that the recipe asks for.

Every record is checked before the first step, also for what the recipe makes of it: a row that fits neither a pack nor
the context, a grid that an order does not have. What was left out is written beside the run, so that a run that goes
on need not check again.
"""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainingArguments
from transformers.utils import logging

from ..code_order_mars import check_code_order
from ..configuration_mars import MarsConfig
from ..data.emoji_captions import CaptionStyle, emoji_caption, subject_weights
from ..data.encode import LOWRES_COLUMNS, encode_records
from ..data.records import (
    BadRecordError,
    BadRecords,
    CaptionMix,
    RecordRules,
    captions_of,
    find_bad_records,
    has_splits,
    open_records,
    source_fingerprint,
    validate_records,
    without,
)
from ..data.text import LANGUAGES, caption_phrases, with_style
from ..modeling_mars import MarsForConditionalGeneration
from ..processing_mars import MarsProcessor
from .mixture import Source
from .recipe import DataPart, Recipe

logger = logging.get_logger(__name__)

PICTURE = ("image_codes", "height", "width")
EMOJI_TEXTS = ("caption_en", "caption_zh", "style")
ENCODE = "turn pictures into codes with `encode` in the recipe, or with `mars-hf data encode`"


@dataclass
class CheckedSource(Source):
    """
    A [`Source`] whose bad records are left out.

    Args:
        name (`str`): What the recipe calls it.
        bad_records ([`BadRecords`]): What was left out; of a stream it fills as it is read.
    """

    name: str = ""
    bad_records: BadRecords = field(default_factory=BadRecords, repr=False)


@dataclass(frozen=True)
class RowRules:
    """
    What a record has to be so that rows can be made of it.

    Args:
        of_records ([`RecordRules`]): What any record has to be.
        task (`str`): `"super-resolution"`, `"documents"`, or `"pairs"` for all else.
        texts (`tuple[str, ...]`): Columns whose texts captions are written of; none of them may be empty.
        codes_per_step (`tuple[int, ...]`): Every K that is trained.
        code_order (`str`): The model's.
        max_length (`int`): Tokens of the longest row.
        max_grid_size (`int`, *optional*): Codes a side that cell embeddings know.
        super_resolution_factor (`int`, *optional*): How many times larger super-resolution draws.
        lowres_embedding (`bool`): Whether the model embeds the enlarged small picture.
    """

    of_records: RecordRules
    task: str
    texts: tuple[str, ...]
    codes_per_step: tuple[int, ...]
    code_order: str
    max_length: int
    max_grid_size: int | None
    super_resolution_factor: int | None
    lowres_embedding: bool

    @classmethod
    def of(cls, part: DataPart, config: MarsConfig, codes_per_step: Sequence[int], packing: int | None) -> "RowRules":
        """Read them off a recipe and its model."""
        of_records = RecordRules(
            min_size=part.min_size,
            max_aspect_ratio=part.max_aspect_ratio,
            min_score=part.min_score,
            max_caption_length=part.max_caption_length,
            long_captions=part.long_captions,  # type: ignore[arg-type]
            codebook_size=config.codebook_size,
            downsample_factor=config.downsample_factor,
        )
        context = config.text_config.max_position_embeddings
        enlarges, is_document = part.task == "super-resolution", part.task == "documents"
        return cls(
            of_records,
            part.task if enlarges or is_document else "pairs",
            EMOJI_TEXTS if part.caption_form == "emoji" and not is_document else (),
            tuple(codes_per_step),
            config.code_order,
            min(context, packing) if packing else context,
            config.max_grid_size if config.cell_embedding else None,
            config.super_resolution_factor if enlarges else None,
            enlarges and config.lowres_embedding,
        )

    def check(self, record: Mapping[str, Any], num_tokens: Callable[[str], int]) -> None:
        """
        Refuse a record of which no row can be made.

        Args:
            record (`Mapping`): One that [`check_record`] has passed.
            num_tokens (`Callable`): Counts the tokens of a text; asked only where its bytes might be too many.

        Raises:
            BadRecordError: Naming what came, what was expected and what to do.
        """
        if missing := [name for name in self.texts if not (record.get(name) or "").strip()]:
            raise BadRecordError("no caption", f"`{missing[0]}` is empty, which `captions: {{form: emoji}}` reads")
        if self.task == "documents":
            pictures = [part for part in record["segments"] if not part.get("text")]
            texts = [part["text"] for part in record["segments"] if part.get("text")]
        else:
            pictures = [record]
            texts = [f"{caption} {record['height']}x{record['width']}" for caption in self._captions(record)]
        brackets = max(self.codes_per_step) + 1
        length = 1 + sum(self._check_grid(picture) + brackets for picture in pictures)
        if self.super_resolution_factor is not None:
            length += self._check_small_picture(record, self.super_resolution_factor) + 2
        for own in [texts] if self.task == "documents" else [[text] for text in texts]:
            self._check_length(length, own, num_tokens)

    def _captions(self, record: Mapping[str, Any]) -> list[str]:
        """Give all captions that a row may get."""
        if not self.texts:
            return list(captions_of(record, self.of_records).values())
        forms = {language: caption_phrases(record[f"caption_{language}"], language) for language in LANGUAGES}
        return [with_style(form, record["style"], language) for language in forms for form in forms[language]]

    def _check_grid(self, picture: Mapping[str, Any]) -> int:
        """Give the number of codes of a picture; refuse a grid that is not drawn so."""
        height, width = (picture[side] // (self.of_records.downsample_factor or 1) for side in ("height", "width"))
        if self.max_grid_size is not None and max(height, width) > self.max_grid_size:
            raise BadRecordError(
                "picture too large",
                f"{height}x{width} codes, and cell embeddings know {self.max_grid_size} a side: encode it smaller, or "
                "raise `model.config.max_grid_size`",
            )
        try:
            for k in self.codes_per_step:
                check_code_order(height, width, k, self.code_order)
        except ValueError as error:
            raise BadRecordError("picture cannot be drawn in this order", str(error)) from None
        return height * width

    def _check_small_picture(self, record: Mapping[str, Any], factor: int) -> int:
        """Give the number of low-resolution codes; refuse what does not belong to the picture."""
        square, codebook_size = (self.of_records.downsample_factor or 1) * factor, self.of_records.codebook_size
        codes, size = record.get("lowres_codes"), (record["height"], record["width"])
        expected = (size[0] // square) * (size[1] // square)
        if codes is None or len(codes) != expected or any(side % square for side in size):
            raise BadRecordError(
                "low-resolution codes do not fit",
                f"`lowres_codes` of a picture of {size[0]} x {size[1]} pixels must be {expected} codes, those of one "
                f"{factor} times smaller, got {'none' if codes is None else len(codes)}: encode the pictures with "
                "`mars-hf data encode --lowres-factor`",
            )
        columns = {"lowres_codes": codes}
        if self.lowres_embedding:
            columns["enlarged_codes"] = large = record.get("enlarged_codes") or []
            if len(large) != len(record["image_codes"]):
                raise BadRecordError(
                    "enlarged codes do not fit",
                    f"`enlarged_codes` must be as many as `image_codes` ({len(record['image_codes'])}), got "
                    f"{len(large)}: encode the pictures with `mars-hf data encode --lowres-factor`",
                )
        for name, values in columns.items():
            if min(values) < 0 or (codebook_size is not None and max(values) >= codebook_size):
                raise BadRecordError(
                    "codes out of range",
                    f"`{name}` must lie in [0, {codebook_size}), got {min(values)} to {max(values)}",
                )
        return expected

    def _check_length(self, length: int, texts: Sequence[str], num_tokens: Callable[[str], int]) -> None:
        if length + sum(len(text.encode()) for text in texts) <= self.max_length:
            return  # no tokenizer makes more tokens than there are bytes
        length += sum(map(num_tokens, texts))
        if length > self.max_length:
            raise BadRecordError(
                "row too long",
                f"{length} tokens, and {self.max_length} fit a row: encode smaller pictures, set "
                "`max_caption_length`, or raise `packing`",
            )


def fit_processor(processor: MarsProcessor, config: MarsConfig) -> None:
    """Have a base's processor lay rows out for a model of another kind."""
    side = {"height": config.default_image_size, "width": config.default_image_size}
    processor.code_order, processor.super_resolution_factor = config.code_order, config.super_resolution_factor
    processor.image_processor.size = side


def build_sources(
    recipe: Recipe,
    model: MarsForConditionalGeneration,
    processor: MarsProcessor,
    eval_split: str | None = None,
    args: TrainingArguments | None = None,
) -> list[CheckedSource]:
    """
    Open all data of a recipe. What several tasks show is checked once, and its records are the same object.

    Args:
        recipe ([`Recipe`]): Whose `data`.
        model ([`MarsForConditionalGeneration`]): Whose codes they have to hold.
        processor ([`MarsProcessor`]): Counts tokens, and makes the pixels of pictures that are to be encoded.
        eval_split (`str`, *optional*): Another split, as it is: without noise, every record as often as the others.
        args (`TrainingArguments`, *optional*):
            Of the run: the first of its processes checks, and what it found is kept in the run's folder.

    Raises:
        ValueError: See [`build_source`].
    """
    known: dict[Any, tuple[Any, BadRecords]] = {}
    options: dict[str, Any] = {"processor": processor, "args": args, "known": known}
    limits = (recipe.trained_codes_per_step, recipe.packing)
    sources = [
        build_source(part, model, eval_split, RowRules.of(part, model.config, *limits), **options)
        for part in recipe.data
    ]
    if recipe.stage == "alignment":
        for source in {id(source.records): source for source in sources}.values():
            _refuse_several_sizes(source)
    return sources


def _refuse_several_sizes(source: CheckedSource) -> None:
    """Hold Stage I to its rule; the sizes of a stream are not known before it is read."""
    if source.is_stream:
        return
    sides = {side: sorted(source.records.unique(side)) for side in ("height", "width")}
    if any(len(values) > 1 for values in sides.values()):
        heights, widths = (f"{values[0]} to {values[-1]}" for values in sides.values())
        raise ValueError(
            f"The stage alignment draws pictures of one size; those of {source.name} are {heights} pixels high and "
            f"{widths} wide: encode them with `size: [height, width]`, or take the stage refinement, which tells the "
            "size in the caption."
        )


def build_source(
    part: DataPart,
    model: MarsForConditionalGeneration,
    eval_split: str | None = None,
    rules: RowRules | None = None,
    processor: MarsProcessor | None = None,
    args: TrainingArguments | None = None,
    known: dict[Any, tuple[Any, BadRecords]] | None = None,
) -> CheckedSource:
    """
    Open records and check every one of them; bad ones are left out and counted.

    Args:
        part ([`DataPart`]): What to open.
        model ([`MarsForConditionalGeneration`]): Whose codes they have to hold.
        eval_split (`str`, *optional*): See [`build_sources`].
        rules ([`RowRules`], *optional*): By default those of the model, one code a step and no packs.
        processor ([`MarsProcessor`], *optional*): See [`build_sources`]. Without it, characters count as tokens.
        args (`TrainingArguments`, *optional*): See [`build_sources`].
        known (`dict`, *optional*): Records that were checked already, and where these are noted.

    Raises:
        ValueError: If a column is missing, pictures are to be encoded outside a run, or more than 1 % of the records
            are bad; of a stream, when they are read.
    """
    rules = RowRules.of(part, model.config, (1,), None) if rules is None else rules
    split, known = eval_split or part.split, {} if known is None else known
    if eval_split not in (None, part.split) and not has_splits(part.source):
        raise ValueError(
            f"`evaluation.split` is {eval_split}, but {part.source} is all of it, whatever the split: losses would be "
            "those of training data. Give a folder with splits, or `evaluation: {split: "
            f"{part.split}}}` to look at those."
        )
    key = (part.source, split, part.streaming, repr((part.columns, part.encode, part.hub_options)), rules)
    is_first = key not in known
    if is_first:
        if part.encode is None:
            records = open_records(part.source, split, part.streaming, part.columns, model.vqgan, **part.hub_options)
        else:
            records = _encoded_records(part, split, model, processor, rules, args)
            # The pictures were held to these as they came, before they were made smaller.
            rules = replace(rules, of_records=replace(rules.of_records, min_size=1, max_aspect_ratio=None))
        _refuse_missing_columns(part, records.features, rules.lowres_embedding)
        known[key] = _good_records(records, rules, len if processor is None else processor.count_tokens, args)
    records, bad = known[key]
    _refuse_missing_columns(part, records.features, rules.lowres_embedding)
    options: dict[str, Any] = {"drop_caption": 0.0}
    if eval_split is None:
        weights = subject_weights(records["hexcode"], part.balance) if part.balance else None
        options = {"weights": weights, "code_noise": part.code_noise, "drop_caption": part.drop_caption}
    write_caption = _caption_writer(part, rules.of_records)
    options |= {"name": part.source, "bad_records": bad, "after_pass": bad.finish}
    share = 1.0 if part.share is None else part.share  # a recipe completes it: this one stands alone
    source = CheckedSource(part.task, share, records, write_caption, **options)
    if not source.is_stream:
        _tell(part.source, bad)
    elif is_first and eval_split is None and args is not None and args.should_log:
        source.after_reading = partial(_tell, part.source, bad)
    return source


def _encoded_records(
    part: DataPart,
    split: str,
    model: MarsForConditionalGeneration,
    processor: MarsProcessor | None,
    rules: RowRules,
    args: TrainingArguments | None,
) -> Dataset:
    """Turn pictures into codes in the run's folder, in its first process; what is there already stays."""
    if args is None or processor is None or model.vqgan is None:
        raise ValueError(
            f"The pictures of {part.source} are encoded by a run of a model with a VQ-GAN. For a dry run, encode them "
            "with `mars-hf data encode` first, or give `assume`."
        )
    asked = [part.source, sorted(part.columns.items()), part.encode, rules.super_resolution_factor]
    asked += [asdict(rules.of_records), *part.hub_options.items()]
    folder = Path(args.output_dir) / f"codes-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}"
    size = None
    if "size" in (encode := part.encode or {}):
        size = dict(zip(("height", "width"), encode["size"], strict=True))
    elif "short_side" in encode:
        size = {"shortest_edge": encode["short_side"]}
    with args.main_process_first(local=False, desc="encoding pictures"):
        if args.should_save:
            pictures = open_records(part.source, split, columns=part.columns, **part.hub_options)
            options: dict[str, Any] = {"rules": rules.of_records, "lowres_factor": rules.super_resolution_factor}
            options["source"] = source_fingerprint(part.source, split)
            vqgan = model.vqgan.to(args.device)
            _tell(
                part.source, encode_records(pictures, folder, vqgan, processor.image_processor, size, split, **options)
            )
            vqgan.to("cpu")
    return open_records(folder, split, vqgan=model.vqgan)


def _good_records(
    records: Dataset | IterableDataset,
    rules: RowRules,
    num_tokens: Callable[[str], int],
    args: TrainingArguments | None,
) -> tuple[Dataset | IterableDataset, BadRecords]:
    """Leave bad records out; what an earlier start of the same run left out is known already."""
    options: dict[str, Any] = {"on_bad": "skip", "check": partial(rules.check, num_tokens=num_tokens)}
    if args is None or isinstance(records, IterableDataset):
        return validate_records(records, rules.of_records, **options)
    asked = [records._fingerprint, len(records), asdict(rules)]
    name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    file = Path(args.output_dir) / f"left-out-{name}.safetensors"
    with args.main_process_first(local=False, desc="checking records"):
        if file.exists():
            left_out, bad = _read_left_out(file)
        else:
            left_out, bad = find_bad_records(records, rules.of_records, **options)
            if args.should_save:
                _write_left_out(file, left_out, bad)
    return without(records, left_out), bad


def _read_left_out(file: Path) -> tuple[list[int], BadRecords]:
    with safe_open(file, framework="pt") as opened:
        facts = json.loads(opened.metadata()["bad_records"])
        left_out = opened.get_tensor("left_out").tolist()
    return left_out, BadRecords(**{**facts, "reasons": Counter(facts["reasons"])})


def _write_left_out(file: Path, left_out: list[int], bad: BadRecords) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".part")
    facts = {"bad_records": json.dumps(vars(bad))}
    save_file({"left_out": torch.tensor(left_out, dtype=torch.long)}, scratch, metadata=facts)
    os.replace(scratch, file)


def _refuse_missing_columns(part: DataPart, features: Features, lowres_embedding: bool) -> None:
    """Refuse data that lack what their task reads, which would end a run in the middle of some batch."""
    needed = dict.fromkeys(PICTURE, ENCODE)
    if part.task == "documents":
        needed = {"segments": "documents are lists of texts and pictures: see `mars_hf.data.records`"}
        needed |= {f"segments.{name}": ENCODE for name in PICTURE}
    elif part.caption_form == "emoji":
        needed |= dict.fromkeys(EMOJI_TEXTS, "take `captions: {form: records}`")
    if part.task == "super-resolution":
        columns = LOWRES_COLUMNS if lowres_embedding else LOWRES_COLUMNS[:1]
        needed |= dict.fromkeys(columns, "encode the pictures with `mars-hf data encode --lowres-factor`")
    if part.balance:
        needed["hexcode"] = "leave `balance` out, which is for emoji"
    if part.min_score is not None:
        needed["score"] = "leave `min_score` out"
    parts = getattr(features.get("segments"), "feature", None)
    given = {*features, *(f"segments.{name}" for name in (parts if isinstance(parts, dict) else ()))}
    if missing := [name for name in needed if name not in given]:
        raise ValueError(
            f"`data`: {part.source} has no `{missing[0]}`, which {part.task} by this recipe reads, only "
            f"{', '.join(features)}: {needed[missing[0]]}, or give a column that name by `columns`."
        )


def _tell(name: str, bad: BadRecords) -> None:
    """Log what was left out of a source, if anything was."""
    if bad.reasons or bad.num_long_captions:
        logger.warning(f"{name}: {bad}")


def _caption_writer(part: DataPart, rules: RecordRules) -> Callable[[dict[str, Any], random.Random], str]:
    if part.caption_form == "emoji":
        style = CaptionStyle(**part.caption_shares)
        return lambda record, rng: emoji_caption(record, rng, style)
    mix = CaptionMix(**part.caption_shares)
    return lambda record, rng: mix.choose(captions_of(record, rules), rng.getrandbits(32), 0)


def rows_of_an_epoch(sources: Sequence[Source]) -> int | None:
    """
    Count the rows of one pass over a recipe's data: records that several tasks show count once.

    Returns:
        `int`, or `None` if there is a stream, whose end is not known.
    """
    if any(source.is_stream for source in sources):
        return None
    return sum({id(source.records): len(source.records) for source in sources}.values())


__all__ = [
    "CheckedSource",
    "RowRules",
    "build_source",
    "build_sources",
    "fit_processor",
    "rows_of_an_epoch",
]
