"""
What a build does, read from YAML: sources, stages and where it runs.

Every stage is optional and has a section of its own name. A setting may be written as `{paper: X, ours: Y}`: the
paper's value where the paper states one, else ours. Which of the two was taken is kept and shown in the report.
"""

import json
import re
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

CONFIGS = Path(__file__).parents[1] / "configs"
KINDS = ("webdataset", "parquet", "folder", "datasets")
LANGUAGES = ("en", "zh")
PECULIARITIES = ("animated", "cmyk", "16_bit", "palette", "transparent", "gray", "rotated", "wrong_extension")


def _at_least(low: int, settings: Any, name: str) -> None:
    if (value := getattr(settings, name)) < low:
        raise ValueError(f"`{name}` must be {low} or more, got {value}.")


@strict
@dataclass
class Source:
    """
    One collection of pictures.

    Args:
        name (`str`): Goes into the column `source` and in front of every key; letters, digits, `.`, `_` and `-`.
        kind (`str`):
            `"webdataset"` (tar files, as img2dataset writes them), `"parquet"`, `"folder"` (pictures with captions in
            `.txt` or `.json` beside them) or `"datasets"` (whatever `datasets.load_dataset` finds).
        path (`str`): Files as a glob pattern (also `s3://` and others that fsspec knows), a folder, or a data set.
        image (`str`, *optional*):
            Column with the picture files, or extension of theirs in tar files. Defaults to `"image"`, or to any.
        caption_en (`str`, *optional*):
            Where English captions are: a column, the extension of a text file, or a field of the `.json` file.
            Defaults to `"txt"` (tar files, folders) or `"caption"`, unless `caption_zh` is given.
        caption_zh (`str`, *optional*): The same for Chinese captions.
        key (`str`, *optional*): Column with names of records. Defaults to the file's name and the row's number.
        configuration (`str`, *optional*): Configuration of a data set.
        split (`str`, defaults to `"train"`): Split of a data set.
        records_per_shard (`int`, defaults to 1000):
            How much of a folder or a data set is one unit of work. Tar and parquet files are one each.
    """

    name: str
    kind: str
    path: str
    image: str | None = None
    caption_en: str | None = None
    caption_zh: str | None = None
    key: str | None = None
    configuration: str | None = None
    split: str = "train"
    records_per_shard: int = 1000

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"A source's `name` must be of letters, digits, '.', '_' and '-', got {self.name!r}.")
        if self.kind not in KINDS:
            raise ValueError(f"`kind` of source {self.name} must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.records_per_shard < 1:
            raise ValueError(f"`records_per_shard` must be at least 1, got {self.records_per_shard}.")
        rows = self.kind in ("parquet", "datasets")
        if self.image is None and rows:
            self.image = "image"
        if self.caption_en is None and self.caption_zh is None:
            self.caption_en = "caption" if rows else "txt"

    def field_of(self, language: str) -> str | None:
        """Say where the captions of a language are."""
        return {"en": self.caption_en, "zh": self.caption_zh}[language]


@strict
@dataclass
class Decode:
    """
    What counts as a picture.

    Args:
        max_pixels (`int`, defaults to 64,000,000): Larger pictures are refused by their header, before decoding.
        max_file_bytes (`int`, defaults to 64 MiB):
            Larger files are refused before they are read, and all files of a sample in a tar together.
        refuse (`list[str]`): Peculiarities that drop a picture. Others are put right and counted.
    """

    max_pixels: int = 64_000_000
    max_file_bytes: int = 64 * 2**20
    refuse: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _at_least(1, self, "max_file_bytes")
        _at_least(1, self, "max_pixels")
        if unknown := sorted(set(self.refuse) - set(PECULIARITIES)):
            raise ValueError(f"`refuse` knows {', '.join(PECULIARITIES)}, got {', '.join(unknown)}.")


@strict
@dataclass
class Captions:
    """
    What counts as a caption.

    Args:
        max_characters (`int`, defaults to 2000): A record with a longer one is dropped.
        required (`bool`, defaults to `True`): Drop records without any caption.
    """

    max_characters: int = 2000
    required: bool = True

    def __post_init__(self) -> None:
        _at_least(1, self, "max_characters")


@strict
@dataclass
class Filter:
    """
    Size and shape (section 3.5 of the paper, its numbers lost).

    Args:
        min_side (`int`, *optional*): Shorter side at least, in pixels.
        max_aspect_ratio (`float`, *optional*): Longer by shorter side at most.
    """

    min_side: int | None = None
    max_aspect_ratio: float | int | None = None


@strict
@dataclass
class Duplicates:
    """
    Which pictures are the same (not in the paper). The first one in the order of the input stays.

    Args:
        exact (`bool`, defaults to `True`): Drop pictures with equal pixels.
        max_distance (`int`, *optional*, defaults to 4):
            Drop pictures whose perceptual hashes (64 bits) differ in at most so many bits.
        max_colour_difference (`int`, defaults to 16):
            ... unless the mean colours of a 4 x 4 grid differ by more, of 255: the hash sees brightness alone.
    """

    exact: bool = True
    max_distance: int | None = 4
    max_colour_difference: int = 16

    def __post_init__(self) -> None:
        if self.max_distance is not None and not 0 <= self.max_distance < 64:
            raise ValueError(f"`max_distance` must be 0 to 63 bits, got {self.max_distance}.")


@strict
@dataclass
class Clip:
    """
    Score how well pictures fit captions: the cosine of a CLIP model's embeddings, in [-1, 1].

    Args:
        model (`str`): Folder or Hub name of a `CLIPModel`.
        batch_size (`int`, defaults to 64): Records at once.
    """

    model: str
    batch_size: int = 64

    def __post_init__(self) -> None:
        _at_least(1, self, "batch_size")


@strict
@dataclass
class Aesthetic:
    """
    Score pictures by a head on CLIP's picture embeddings, as the predictor that the paper cites does.

    Args:
        head (`str`):
            File with the head: linear layers one after the other, without activations
            (https://github.com/christophschuhmann/improved-aesthetic-predictor), as safetensors or PyTorch's format.
        model (`str`, *optional*): The CLIP model it was trained on. Defaults to that of `clip`.
        batch_size (`int`, defaults to 64): Records at once; that of `clip` if there is one.
    """

    head: str
    model: str | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        _at_least(1, self, "batch_size")


@strict
@dataclass
class Select:
    """
    Keep the best by score.

    Args:
        clip_minimum (`float`, *optional*): Lowest CLIP score that stays.
        clip_top (`float`, *optional*): Share of the scored records that stays, the best ones, in (0, 1].
        aesthetic_minimum (`float`, *optional*): As `clip_minimum`, of the aesthetic score.
        aesthetic_top (`float`, *optional*): As `clip_top`, of the aesthetic score.
    """

    clip_minimum: float | int | None = None
    clip_top: float | int | None = None
    aesthetic_minimum: float | int | None = None
    aesthetic_top: float | int | None = None

    def __post_init__(self) -> None:
        for name in ("clip_top", "aesthetic_top"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"`{name}` is a share in (0, 1], got {share}.")


@strict
@dataclass
class Recaption:
    """
    Write fine-grained captions, beside those that are there, with a vision-language model.

    Args:
        model (`str`): Folder or Hub name of an image-text-to-text model.
        prompts (`dict[str, str]`): What to ask for, by language (`en`, `zh`). A model without a chat template is given
            them as they are: write placeholders for pictures into them if it needs any.
        max_new_tokens (`int`, defaults to 256): Length of an answer.
        batch_size (`int`, defaults to 8): Pictures at once.
    """

    model: str
    prompts: dict[str, str]
    max_new_tokens: int = 256
    batch_size: int = 8

    def __post_init__(self) -> None:
        _at_least(1, self, "max_new_tokens")
        _at_least(1, self, "batch_size")
        if not self.prompts or set(self.prompts) - set(LANGUAGES):
            raise ValueError(f"`prompts` must be given for some of {', '.join(LANGUAGES)}, got {self.prompts}.")


@strict
@dataclass
class Resize:
    """
    Scale pictures to one shorter side, the aspect ratio kept, and cut the middle to whole codes.

    Args:
        shortest_edge (`int`): In pixels.
        multiple_of (`int`, defaults to 16): Both sides become multiples of it: the VQ-GAN's downsampling.
        jpeg_quality (`int`, *optional*): Store as JPEG of this quality. Defaults to PNG.
    """

    shortest_edge: int
    multiple_of: int = 16
    jpeg_quality: int | None = None

    def __post_init__(self) -> None:
        if self.multiple_of < 1 or self.shortest_edge < 1 or self.shortest_edge % self.multiple_of:
            raise ValueError(
                f"`shortest_edge` must be a multiple of `multiple_of`, got {self.shortest_edge}, {self.multiple_of}."
            )


@strict
@dataclass
class Codes:
    """
    Encode pictures to VQ codes.

    Args:
        model (`str`): Folder or Hub name of a MARS or of a diffusers `VQModel`.
        batch_size (`int`, defaults to 16): Pictures at once.
        keep_images (`bool`, defaults to `True`): Write the pictures, too.
    """

    model: str
    batch_size: int = 16
    keep_images: bool = True

    def __post_init__(self) -> None:
        _at_least(1, self, "batch_size")


@strict
@dataclass
class Write:
    """
    The output.

    Args:
        format (`str`, defaults to `"parquet"`): Or `"webdataset"`.
        records_per_shard (`int`, defaults to 1000): Records of an output file, at most.
        max_shard_bytes (`int`, defaults to 256 MiB): Bytes of source pictures behind an output file, about.
    """

    format: str = "parquet"
    records_per_shard: int = 1000
    max_shard_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        if self.format not in ("parquet", "webdataset"):
            raise ValueError(f"`format` must be parquet or webdataset, got {self.format!r}.")
        if self.records_per_shard < 1 or self.max_shard_bytes < 1:
            raise ValueError("`records_per_shard` and `max_shard_bytes` must be at least 1.")


@strict
@dataclass
class Engine:
    """
    Where the work is done; it changes nothing of the output.

    Args:
        address (`str`, *optional*): A Ray cluster, whose nodes share sources, models and output. Defaults to a Ray of
            its own on this machine.
        workers (`int`, *optional*): Tasks at a time. Defaults to all processors; 0 works in this process, without Ray.
        gpus_per_worker (`float`, *optional*):
            For tasks with models. Defaults to 1 if there are any, else 0; more than there are is refused.
        object_store_bytes (`int`, *optional*): Memory for what travels between tasks. Defaults to Ray's choice.
    """

    address: str | None = None
    workers: int | None = None
    gpus_per_worker: float | int | None = None
    object_store_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"`workers` must be 0 or more, got {self.workers}.")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ValueError(f"`gpus_per_worker` must be 0 or more, got {self.gpus_per_worker}.")


STAGES: dict[str, type] = {
    "decode": Decode,
    "captions": Captions,
    "filter": Filter,
    "duplicates": Duplicates,
    "clip": Clip,
    "aesthetic": Aesthetic,
    "select": Select,
    "recaption": Recaption,
    "resize": Resize,
    "codes": Codes,
    "write": Write,
    "engine": Engine,
}


@dataclass
class Recipe:
    """
    A whole build. Stages that are `None` are left out.

    Args:
        sources (`list[Source]`): Read one after the other; their order is the order of the input.
        resolution_text (`bool`): Add the columns `prompt_en` and `prompt_zh`, captions (fine ones first) with their
            size.
        out (`str`, *optional*): Folder to write to.
        samples (`int`): Pictures of each kind that the report shows.
        origins (`dict[str, str]`): Settings written as `{paper: X, ours: Y}`, and which of the two was taken.
    """

    sources: list[Source]
    decode: Decode = field(default_factory=Decode)
    captions: Captions = field(default_factory=Captions)
    filter: Filter | None = None
    duplicates: Duplicates | None = None
    clip: Clip | None = None
    aesthetic: Aesthetic | None = None
    select: Select | None = None
    recaption: Recaption | None = None
    resize: Resize | None = None
    resolution_text: bool = False
    codes: Codes | None = None
    write: Write = field(default_factory=Write)
    engine: Engine = field(default_factory=Engine)
    out: str | None = None
    samples: int = 8
    origins: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least(0, self, "samples")
        names = [source.name for source in self.sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"`sources` must be one or more, each with a name of its own, got {names}.")
        if self.aesthetic and self.aesthetic.model is None:
            if self.clip is None:
                raise ValueError("`aesthetic` needs its `model`, or a stage `clip` whose model it shares.")
            self.aesthetic.model = self.clip.model
        self._check_order()

    def _check_order(self) -> None:
        for score in ("clip", "aesthetic"):
            limits = [getattr(self.select, f"{score}_{kind}", None) for kind in ("minimum", "top")]
            if any(limit is not None for limit in limits) and getattr(self, score) is None:
                raise ValueError(f"`select` asks for a score of `{score}`, but there is no such stage.")
        if self.clip and not self.captions.required:
            raise ValueError("`clip` compares pictures with captions: `captions.required` must be true.")
        if not self.captions.required and self.recaption is None:
            raise ValueError("Without `captions.required`, captions must come from `recaption`.")
        if self.codes and self.resize is None:
            raise ValueError("`codes` needs whole codes: add `resize` with the `multiple_of` of its model.")

    def __hash__(self) -> int:
        return hash(json.dumps(self.what_decides_the_output(), sort_keys=True))

    def what_decides_the_output(self) -> dict[str, Any]:
        """Give all settings but those of the engine and the folder."""
        settings = asdict(self)
        for name in ("engine", "out", "origins"):
            del settings[name]
        return settings


def load_recipe(config: str | Path, out: str | Path | None = None) -> Recipe:
    """
    Read a recipe.

    Args:
        config (`str` or `Path`): A YAML file, or the name of one that comes with the package (`"paper"`).
        out (`str` or `Path`, *optional*): Folder to write to, instead of the one named in the file.

    Returns:
        [`Recipe`]: Checked as far as that goes without looking at files.

    Raises:
        ValueError: If the file is missing, no YAML, has unknown or contradicting settings, or names no folder.
    """
    path = config_path(config)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings by name, got {content!r}.")
    if out is not None:
        content["out"] = str(out)
    recipe = make_recipe(content)
    if recipe.out is None:
        raise ValueError(f"Where to? Give `--out`, or `out:` in {path}.")
    return recipe


def config_path(config: str | Path) -> Path:
    """
    Find the file of a recipe.

    Raises:
        ValueError: If there is none.
    """
    for path in (Path(config), CONFIGS / f"{config}.yaml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    raise ValueError(f"{config} is no file. With the package come: {shipped}.")


def make_recipe(content: dict[str, Any]) -> Recipe:
    """
    Build a recipe from nested dictionaries.

    Raises:
        ValueError: If a name is unknown, a value has the wrong type or contradicts another.

    Example:
        >>> make_recipe({"sources": [{"name": "raw", "kind": "folder", "path": "raw"}]}).write.format
        'parquet'
    """
    origins: dict[str, str] = {}
    content = _take_stated(content, "", origins)
    known = [entry.name for entry in fields(Recipe) if entry.name != "origins"]
    _refuse_unknown("A recipe", content, known)
    sources = content.get("sources")
    if not isinstance(sources, list):
        raise ValueError(f"`sources` must be a list of sources, got {sources!r}.")
    settings = dict(content, sources=[_make(Source, entry, f"sources[{i}]") for i, entry in enumerate(sources)])
    for name, stage in STAGES.items():
        # A bare `filter:` in YAML is None: the stage with its defaults.
        if name in content:
            settings[name] = _make(stage, {} if content[name] is None else content[name], name)
    for name, kind in (("resolution_text", bool), ("samples", int), ("out", str)):
        if settings.get(name) is not None and not isinstance(settings[name], kind):
            raise ValueError(f"`{name}` must be of type {kind.__name__}, got {settings[name]!r}.")
    if settings.get("samples", 0) is None:
        del settings["samples"]  # a bare `samples:`
    return Recipe(**settings, origins=origins)


def _take_stated(value: Any, place: str, origins: dict[str, str]) -> Any:
    """Replace every `{paper: X, ours: Y}` by X if the paper states it, else by Y."""
    if isinstance(value, list):
        return [_take_stated(entry, f"{place}[{i}]", origins) for i, entry in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"paper", "ours"}:
        origins[place] = "ours" if value["paper"] is None else "paper"
        return value[origins[place]]
    return {name: _take_stated(entry, f"{place}.{name}".lstrip("."), origins) for name, entry in value.items()}


def _make(cls: type, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"`{place}` must hold settings by name, got {value!r}.")
    _refuse_unknown(f"`{place}`", value, [entry.name for entry in fields(cls)])
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise ValueError(f"`{place}` needs {', '.join(missing)}.")
    try:
        return cls(**value)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"`{place}`: {' '.join(str(error).split())}") from None


def _refuse_unknown(what: str, value: dict[str, Any], known: list[str]) -> None:
    if unknown := sorted(str(name) for name in value if name not in known):
        raise ValueError(f"{what} knows no {', '.join(unknown)}. It knows {', '.join(known)}.")
