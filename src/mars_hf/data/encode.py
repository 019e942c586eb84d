"""
Pictures to codes, once: a data set whose pictures are replaced by what the image tokenizer makes of them.

The result is a folder of parquet files, each written in one step, and a `codes.json` that says which tokenizer made
the codes, how pictures were resized, what is done and what was left out. An interrupted run continues after its last
file. `open_records` reads the folder.

What this file leaves to others: pixels (the image processor), and which records are good (`records.py`).
"""

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from filelock import FileLock, Timeout
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..configuration_mars import MarsConfig
from ..conversion.checkpoints import Checkpoint
from ..evaluation.provenance import local_checkpoint
from ..image_processing_mars import MarsImageProcessor, encode_pixels, enlarge_codes, new_image_processor
from ..weights_mars import base_of, complete_weights
from .records import (
    CAPTIONS,
    CODES_FILE,
    BadRecordError,
    BadRecords,
    RecordRules,
    captions_of,
    check_record,
    open_record_picture,
    tokenizer_fingerprint,
    undecoded,
)

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vq_model import VQModel

LOWRES_COLUMNS = ("lowres_codes", "enlarged_codes")
CODE_COLUMNS = {"image_codes": List(Value("int32")), "height": Value("int32"), "width": Value("int32")}
LOCK = ".lock"  # of a folder that is written to
PIXEL_SETTINGS = ("resample", "rescale_factor", "image_mean", "image_std", "max_pixels")
WINDOW = 8  # batches of pictures held in memory, among which those of one size find each other


def load_image_tokenizer(
    model: str | Path, device: "str | torch.device" = "cpu"
) -> tuple["VQModel", MarsImageProcessor]:
    """
    Load the VQ-GAN of a checkpoint without its language model, and the image processor.

    Args:
        model (`str` or `Path`):
            Folder of a MARS or of a diffusers `VQModel`, its name on the Hub, or `mars-emoji`, the embedded one.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where the VQ-GAN goes.

    Returns:
        `tuple[diffusers.VQModel, MarsImageProcessor]`: The VQ-GAN in float32, as the whole model would have it.

    Raises:
        ValueError: If the checkpoint has no VQ-GAN.
    """
    from diffusers import VQModel
    from huggingface_hub import snapshot_download

    folder = local_checkpoint(model)
    if folder is None:
        folder = Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors"]))
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name") == "VQModel":
        vqgan = VQModel.from_pretrained(folder).eval()
        config = MarsConfig(vq_config={k: v for k, v in vqgan.config.items() if k[0] != "_"})
        return vqgan.to(device), new_image_processor(config, vqgan.config.lookup_from_codebook)
    config = MarsConfig.from_pretrained(folder)
    if config.vq_config is None:
        raise ValueError(f"{model} has no VQ-GAN: its configuration has no `vq_config`. Choose a model with one.")
    base = base_of(folder)
    stored = Checkpoint.find(folder) if base is None else complete_weights(folder, base)
    vqgan = VQModel.from_config(config.vq_config).eval()
    vqgan.load_state_dict({name: stored[f"vqgan.{name}"] for name in vqgan.state_dict()}, strict=True)
    return vqgan.to(device), MarsImageProcessor.from_pretrained(folder)


def encode_records(
    dataset: Dataset | IterableDataset,
    out: str | Path,
    vqgan: "VQModel",
    image_processor: MarsImageProcessor,
    size: dict[str, int] | None = None,
    split: str = "train",
    batch_size: int = 32,
    shard_size: int = 1000,
    rules: RecordRules = RecordRules(),  # noqa: B008
    limit: float = 0.01,
    progress: bool = True,
    lowres_factor: int | None = None,
    source: str | None = None,
) -> BadRecords:
    """
    Replace the pictures of records by their codes; run again after an interruption, it continues.

    `image_codes`, `height` and `width` take the place of `image`, in `segments` too; all other columns stay, but for
    captions that are too long, which are cut or passed over as the rules say. For super-resolution, `lowres_codes` are
    those of the same picture scaled down, and `enlarged_codes` those of what these show, scaled up again. Bad records
    are left out and counted, there and in `codes.json`.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): From [`open_records`].
        out (`str` or `Path`): Folder to write to; it may hold other splits that were encoded in the same way.
        vqgan (`diffusers.VQModel`): The image tokenizer.
        image_processor ([`MarsImageProcessor`]): Makes the pixels.
        size (`dict[str, int]`, *optional*):
            In pixels. `{"height", "width"}`: a picture is scaled until it covers that size, and its middle cut out.
            `{"shortest_edge"}`: scaled to that shorter side and cut to whole codes, so that its aspect ratio stays
            (the paper's Stage II). Defaults to the image processor's own.
        split (`str`, defaults to `"train"`): Name to give the records.
        batch_size (`int`, defaults to 32): Most pictures, all of one size, that share a call.
        shard_size (`int`, defaults to 1000): Records of a file, the unit of resuming.
        rules ([`RecordRules`]): What a record has to be.
        limit (`float`, defaults to 0.01): Share of broken records that stops the run, see [`BadRecords`].
        progress (`bool`, defaults to `True`): Show a progress bar.
        lowres_factor (`int`, *optional*):
            How many times smaller, on each side, the pictures of `lowres_codes` are (Stage III); None makes none.
        source (`str`, *optional*):
            What tells these data from others, such as [`source_fingerprint`] gives; with others a run does not go on.

    Returns:
        [`BadRecords`]: What was left out.

    Raises:
        ValueError: If the data have no pictures or codes already, `split` is no name, a number is out of range,
            records are broken beyond the limit, or `out` holds other data, or codes that were made in another way.
    """
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"`batch_size` and `shard_size` must be at least 1, got {batch_size} and {shard_size}.")
    if lowres_factor is not None and (lowres_factor < 2 or "image" not in dataset.features):
        raise ValueError(
            f"`lowres_factor` must be 2 or more, for records with an `image`, got {lowres_factor} and the columns "
            f"{list(dataset.features)}."
        )
    check_split_name(split)
    out, features = Path(out), _coded_features(dataset.features)
    if lowres_factor is not None:
        features = Features({**features, **dict.fromkeys(LOWRES_COLUMNS, CODE_COLUMNS["image_codes"])})
        image_processor = copy.copy(image_processor)
        image_processor.downsample_factor *= lowres_factor  # small pictures have whole codes too
    rules = replace(rules, min_size=max(rules.min_size, image_processor.downsample_factor))
    size = dict(size or image_processor.size)
    to_pixels = partial(image_processor, size=size, return_tensors="pt")
    to_pixels(Image.new("RGB", (rules.min_size, rules.min_size)))  # refuses a wrong size before any work
    settings = {name: image_processor.to_dict()[name] for name in PIXEL_SETTINGS}
    recipe = {"size": size, **settings, "shard_size": shard_size, "rules": asdict(rules)}
    if lowres_factor is not None:
        recipe["lowres_factor"] = lowres_factor
    num_records = None if isinstance(dataset, IterableDataset) else len(dataset)
    with _alone_in(out):
        manifest, done = open_manifest(out, describe_tokenizer(vqgan), recipe, split, num_records, source)
        counts = (done["seen"], done.get("long_captions", 0), Counter(done["left_out"]))
        bad_records = BadRecords("skip", limit, num_records, *counts)
        if done["complete"]:
            return bad_records
        options = {"batch_size": batch_size, "rules": rules, "lowres_factor": lowres_factor}
        encode = partial(_encode, vqgan=vqgan, to_pixels=to_pixels, **options)
        records = enumerate(undecoded(dataset.skip(done["seen"])), start=done["seen"])
        with tqdm(
            total=num_records, initial=done["seen"], desc="Encoding", unit="record", disable=not progress
        ) as bar:
            for shard in _chunks(records, shard_size):
                rows = []
                for window in _chunks(shard, WINDOW * batch_size):
                    rows += encode(window, bad_records)
                    bar.update(len(window))
                _write_shard(out / "data" / f"{split}-{done['shards']:05d}.parquet", rows, features)
                done["shards"], done["records"] = done["shards"] + 1, done["records"] + len(rows)
                done["seen"], done["left_out"] = bad_records.num_seen, dict(bad_records.reasons)
                done["long_captions"] = bad_records.num_long_captions
                write_manifest(out, manifest)
        bad_records.finish()
        if not done["records"]:
            raise ValueError(f"There is nothing to encode: {bad_records} Relax the rules, or choose other data.")
        done["complete"] = True
        write_manifest(out, manifest)
        return bad_records


def _coded_features(features: Features) -> Features:
    """Give the columns of the result: no `image`, but codes."""
    coded = {name: feature for name, feature in features.items() if name not in ("image", *CODE_COLUMNS)}
    parts = features["segments"].feature if "segments" in features else {}
    if "image_codes" in features or "image_codes" in parts:
        raise ValueError("The data hold codes already (`image_codes`). Encode the pictures that they were made of.")
    if "image" in features:
        coded |= CODE_COLUMNS
    if "image" in parts:
        kept = {name: feature for name, feature in parts.items() if name not in ("image", *CODE_COLUMNS)}
        coded["segments"] = List(kept | CODE_COLUMNS)
    return Features(coded)


def _chunks(items: Iterable[Any], length: int) -> Iterator[list[Any]]:
    items = iter(items)
    while chunk := list(islice(items, length)):
        yield chunk


def _encode(
    records: Iterable[tuple[int, dict[str, Any]]],
    bad_records: BadRecords,
    vqgan: "VQModel",
    to_pixels: Callable[..., Any],
    batch_size: int,
    rules: RecordRules,
    lowres_factor: int | None,
) -> list[dict[str, Any]]:
    rows, pictures = [], []
    for index, record in records:
        with bad_records.skipping(record, index):
            bad_records.num_long_captions += any(rules.is_too_long(record.get(name)) for name in CAPTIONS)
            check_record(record, rules)
            row, found = _without_pictures(record, to_pixels)
            row |= _fitting_captions(record, rules)
            rows.append(row)
            pictures += found
    pictures.sort(key=_size_of)
    for (height, width), alike in groupby(pictures, key=_size_of):
        for batch in _chunks(alike, batch_size):
            pixels = torch.stack([pixels for _, pixels in batch])
            for (fields, _), codes in zip(batch, encode_pixels(vqgan, pixels), strict=True):
                fields |= {"image_codes": codes.flatten().tolist(), "height": height, "width": width}
            if lowres_factor is not None:
                small = scale_down(pixels, lowres_factor)
                grids = encode_pixels(vqgan, small)
                both = zip(grids, enlarge_codes(vqgan, grids, lowres_factor), strict=True)
                for (fields, _), codes in zip(batch, both, strict=True):
                    fields |= zip(LOWRES_COLUMNS, (grid.flatten().tolist() for grid in codes), strict=True)
    return rows


def scale_down(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    """Make pixels `(num, 3, height, width)` in [-1, 1] so many times smaller on each side; bicubic, antialiased."""
    size = (pixels.shape[-2] // factor, pixels.shape[-1] // factor)
    return F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)


def _size_of(picture: tuple[dict[str, Any], torch.Tensor]) -> tuple[int, ...]:
    return tuple(picture[1].shape[-2:])


def _without_pictures(
    record: dict[str, Any], to_pixels: Callable[..., Any]
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], torch.Tensor]]]:
    """Take the pictures out of a record: the row that is left, and pixels with the part of it that waits for codes."""
    segments = record.get("segments") or []
    bare = [{name: value for name, value in fields.items() if name != "image"} for fields in (record, *segments)]
    bare = [{**fields, **dict.fromkeys(CODE_COLUMNS)} for fields in bare]
    if segments:
        bare[0]["segments"] = bare[1:]
    sources = zip(bare, (record, *segments), strict=True)
    return bare[0], [
        (fields, _pixels(of["image"], to_pixels)) for fields, of in sources if of.get("image") is not None
    ]


def _fitting_captions(record: dict[str, Any], rules: RecordRules) -> dict[str, str | None]:
    """Give the captions that the limit changes; a document has none."""
    if record.get("segments") is not None:
        return {}
    captions = captions_of(record, rules)
    return {name: captions.get(name) for name in CAPTIONS if rules.is_too_long(record.get(name))}


def _pixels(image: Any, to_pixels: Callable[..., Any]) -> torch.Tensor:
    picture = open_record_picture(image)
    try:
        return to_pixels(picture)["pixel_values"][0]  # (3, height, width)
    except ValueError as error:
        raise BadRecordError("unreadable picture", f"{error}") from error


def check_split_name(split: str) -> None:
    """
    Refuse a split that files cannot be named by, such as `train[:100]`.

    Raises:
        ValueError: If it is no name.
    """
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(
            f"`split` names what is written, such as 'train', got {split!r}. For a part of a split, or several of "
            "them, load them with `datasets`, save them, and give that folder."
        )


def describe_tokenizer(vqgan: "VQModel") -> dict[str, Any]:
    """Say what tells an image tokenizer from another one: the `"tokenizer"` of a `codes.json`."""
    factor = 2 ** (len(vqgan.config.block_out_channels) - 1)
    numbers = {"downsample_factor": factor, "codebook_size": vqgan.config.num_vq_embeddings}
    return {"fingerprint": tokenizer_fingerprint(vqgan), **numbers}


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """
    Read the `codes.json` of a folder.

    Raises:
        ValueError: If there is none.
    """
    file = Path(folder) / CODES_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no `{CODES_FILE}`, which says what image tokenizer made the codes. Give a folder that "
            "`mars-hf data encode` wrote."
        )
    return json.loads(file.read_text(encoding="utf-8"))


def open_manifest(
    out: Path,
    tokenizer: dict[str, Any],
    recipe: dict[str, Any],
    split: str,
    num_records: int | None,
    source: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Begin the `codes.json` of a folder, or go on with it.

    Args:
        out (`Path`): The folder; it may hold other splits that were made in the same way.
        tokenizer (`dict`): What made the codes; `"tokenizer"` of a `codes.json`.
        recipe (`dict`): How they were made.
        split (`str`): Which split is written.
        num_records (`int`, *optional*): Records that it is made of; None if that is not known.
        source (`str`, *optional*): What tells these records from others.

    Returns:
        `tuple[dict, dict]`: The whole content, and the part of the split, to be changed and written with
        [`write_manifest`].

    Raises:
        ValueError: If the folder holds other data, or codes that were made in another way.
    """
    manifest: dict[str, Any] = {"tokenizer": tokenizer, "recipe": recipe, "splits": {}}
    if (out / CODES_FILE).exists():
        held = read_manifest(out)
        for part in ("tokenizer", "recipe"):
            asked = json.loads(json.dumps(manifest[part]))
            if differing := {
                name: (held[part].get(name), asked.get(name))
                for name in sorted(held[part].keys() | asked.keys())
                if held[part].get(name) != asked.get(name)
            }:
                raise ValueError(
                    f"{out} holds codes made in another way (there, here): {differing}. Choose another folder, or "
                    "remove this one."
                )
        manifest = held
    elif out.is_dir() and (
        {path.name for path in out.iterdir()} - {"data", "codes.part", LOCK}  # what a start that was cut off leaves
        or any((out / "data").glob("*"))
    ):
        raise ValueError(f"{out} is not empty and holds no codes. Choose another folder.")
    nothing: dict[str, Any] = {
        "num_records": num_records,
        "complete": False,
        "shards": 0,
        "seen": 0,
        "records": 0,
        "left_out": {},
    }
    nothing |= {} if source is None else {"source": source}
    done = manifest["splits"].setdefault(split, nothing)
    known = done.get("source")
    if source is not None and known is not None and known != source:
        raise ValueError(
            f"{out} holds codes of other {split} data, or their files have changed since. Choose another folder, or "
            "remove this one."
        )
    if done["num_records"] != num_records:
        raise ValueError(
            f"{out} holds codes of {done['num_records']} {split} records, the data now have {num_records}: they are "
            "not the same. Choose another folder, or remove this one."
        )
    (out / "data").mkdir(parents=True, exist_ok=True)
    write_manifest(out, manifest)
    return manifest, done


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other encodings out of a folder, of other splits too: each writes the whole `codes.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"Another encoding is at work in {folder}. Wait for it, or choose another folder; splits of one folder "
            "are encoded one after the other."
        ) from None


def write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    """Write a `codes.json` in one step."""
    scratch = (out / CODES_FILE).with_suffix(".part")
    scratch.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    os.replace(scratch, out / CODES_FILE)


def _write_shard(path: Path, rows: list[dict[str, Any]], features: Features) -> None:
    """Write a file in one step; none if every record was left out."""
    if rows:
        scratch = path.with_suffix(".part")
        columns = {name: [row.get(name) for row in rows] for name in features}
        Dataset.from_dict(columns, features=features).to_parquet(scratch)
        os.replace(scratch, path)
