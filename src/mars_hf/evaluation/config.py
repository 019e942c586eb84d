"""
What an evaluation is made of, read from YAML: every key is known, every value has its type, or nothing begins.

    out: runs/evaluation
    model: mars-emoji                                   # the embedded one; or a folder; or a name on the Hub
    prompts: {kind: emoji, data: data/emoji-64}
    drawing: {height: 64, width: 64}
    runs:
      guidance-4: {guidance_scale: 4.0, pictures_per_prompt: 4}
    metrics:
      clip_score: {clip: runs/judge/final}
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from .prompts import PROMPT_KINDS, CocoPrompts, CompBenchPrompts, EmojiPrompts, GenEvalPrompts, JsonlPrompts

SHIPPED = Path(__file__).parent / "configs"
RESERVED_RUNS = ("references", "reconstructions")
Number = int | float


@strict
@dataclass
class DrawingConfig:
    """
    What all runs share.

    Args:
        height (`int`): Of the pictures, in pixels.
        width (`int`): Of the pictures, in pixels.
        pictures_per_prompt (`int`, defaults to 1): More than one for best-of-N and for T2I-CompBench's ten.
        seed (`int`, defaults to 0): Every picture's own seed is made of it, the prompt's id and its number.
        batch_size (`int`, defaults to 32): Pictures drawn or measured together.
        shard_size (`int`, defaults to 64): Prompts in a shard, the unit of resuming and of sharing among processes.
    """

    height: int
    width: int
    pictures_per_prompt: int = 1
    seed: int = 0
    batch_size: int = 32
    shard_size: int = 64

    def validate_counts(self) -> None:
        for name in ("height", "width", "pictures_per_prompt", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")


@strict
@dataclass
class RunConfig:
    """
    One way of sampling. What is left out is as the checkpoint has it; the manifest holds what that was.

    Args:
        guidance_scale, guidance_schedule, guidance_interval, do_sample, temperature, top_k, top_p, min_p,
        codes_per_step: As in `generate`.
        negative_prompt (`str`, *optional*): What guidance leads away from.
        pictures_per_prompt (`int`, *optional*): In place of the drawing's.
    """

    guidance_scale: Number | None = None
    guidance_schedule: str | None = None
    guidance_interval: list[Number] | None = None
    do_sample: bool | None = None
    temperature: Number | None = None
    top_k: int | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    codes_per_step: int | None = None
    negative_prompt: str | None = None
    pictures_per_prompt: int | None = None

    def validate_ranges(self) -> None:
        if self.pictures_per_prompt is not None and self.pictures_per_prompt < 1:
            raise ValueError(f"`pictures_per_prompt` must be 1 or more, got {self.pictures_per_prompt}.")
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise ValueError(f"`guidance_scale` must be 0 or more, got {self.guidance_scale}.")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(
                f"`temperature` must be above 0, got {self.temperature}. `do_sample: false` takes the likeliest codes."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"`min_p` must be 0 to 1, got {self.min_p}.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"`top_k` must be 1 or more, or 0 for all codes, got {self.top_k}.")
        if (interval := self.guidance_interval) is not None and not (
            len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1
        ):
            raise ValueError(
                f"`guidance_interval` must be two shares of a picture, 0 <= start <= end <= 1, got {interval}."
            )


@strict
@dataclass
class ClipMetric:
    """
    A metric of a CLIP model.

    Args:
        clip (`str`): Folder or Hub name of a `CLIPModel` with its processor.
    """

    clip: str


@strict
@dataclass
class FrechetMetric:
    """
    The Fréchet distance between features of drawn and of true pictures. Exactly one extractor is named.

    Args:
        clip (`str`, *optional*): Folder or Hub name of a `CLIPModel`: its image features.
        vision (`str`, *optional*): Folder or Hub name of any vision model of transformers: its pooled output.
        inception (`str`, *optional*): File of the weights of FID's Inception v3 (needs torch-fidelity).
        resamples (`int`, defaults to 100): For the interval; 0 gives none.
    """

    clip: str | None = None
    vision: str | None = None
    inception: str | None = None
    resamples: int = 100

    def validate_extractor(self) -> None:
        named = [name for name in ("clip", "vision", "inception") if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"`frechet` needs one of `clip`, `vision` and `inception`, got {named or 'none'}.")


@strict
@dataclass
class CompBenchMetric:
    """
    The evaluators of T2I-CompBench. What the prompts' groups do not need may be left out.

    Args:
        vqa (`str`, *optional*): A `BlipForQuestionAnswering`, for color, shape, texture and complex.
        detector (`str`, *optional*): An object detector, for spatial and complex.
        clip (`str`, *optional*): A `CLIPModel`, for non_spatial and complex.
    """

    vqa: str | None = None
    detector: str | None = None
    clip: str | None = None


@strict
@dataclass
class GenEvalMetric:
    """
    The evaluators of GenEval.

    Args:
        detector (`str`): A Mask2Former or MaskFormer, or any object detector.
        clip (`str`, *optional*): A `CLIPModel`, for prompts that ask about colors.
        threshold (`float`, defaults to 0.3): An object is one that the detector is surer of, 0 to 1.
        counting_threshold (`float`, defaults to 0.9): The same, for the task of counting.
    """

    detector: str
    clip: str | None = None
    threshold: Number = 0.3
    counting_threshold: Number = 0.9

    def validate_thresholds(self) -> None:
        for name in ("threshold", "counting_threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 0 or more and below 1, got {getattr(self, name)}.")


@strict
@dataclass
class MetricsConfig:
    """
    What is measured.

    Args:
        clip_score ([`ClipMetric`], *optional*): CLIPScore, `100 * max(cosine, 0)`.
        best_of ([`ClipMetric`], *optional*):
            Adds a row with the best of each prompt's pictures by this CLIP model (the paper's MARS*).
        retrieval ([`ClipMetric`], *optional*): Is a picture's own prompt the nearest of its group's?
        frechet ([`FrechetMetric`], *optional*): Needs true pictures.
        compbench ([`CompBenchMetric`], *optional*): Needs prompts of its kinds.
        geneval ([`GenEvalMetric`], *optional*): Needs prompts of its kind.
    """

    clip_score: ClipMetric | None = None
    best_of: ClipMetric | None = None
    retrieval: ClipMetric | None = None
    frechet: FrechetMetric | None = None
    compbench: CompBenchMetric | None = None
    geneval: GenEvalMetric | None = None


@strict
@dataclass
class IntervalConfig:
    """
    Bootstrap intervals over prompts.

    Args:
        confidence (`float`, defaults to 0.95): Between 0 and 1.
        resamples (`int`, defaults to 2000): At least 100.
        seed (`int`, defaults to 0): Of the resampling.
    """

    confidence: Number = 0.95
    resamples: int = 2000
    seed: int = 0

    def validate_ranges(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"`confidence` must lie between 0 and 1, got {self.confidence}.")
        if self.resamples < 100:
            raise ValueError(f"`resamples` must be 100 or more, got {self.resamples}.")


@strict
@dataclass
class EvaluationConfig:
    """
    An evaluation.

    Args:
        out (`str`): Folder of pictures, measurements and results; an interrupted evaluation there is continued.
        prompts: What is drawn; `kind` is `emoji`, `coco`, `compbench`, `geneval` or `jsonl`.
        drawing ([`DrawingConfig`]): What all runs share.
        runs (`dict[str, RunConfig]`): Ways of sampling, by name.
        metrics ([`MetricsConfig`]): What is measured.
        model (`str`, defaults to `"mars-emoji"`): A folder; else `mars-emoji`, the embedded checkpoint; or a Hub name.
        dtype (`str`, *optional*): Computes in it, e.g. `bfloat16`; the checkpoint's if not given.
        references (`bool`, defaults to `True`): Also measure the true pictures, where the prompts have them.
        reconstructions (`bool`, defaults to `False`): Also measure what the VQ-GAN makes of the true pictures.
        interval ([`IntervalConfig`], *optional*): Bootstrap intervals.
        paper_tables (`list[int]`, *optional*): Tables of the paper to print beside the results: 1, 2.
    """

    out: str
    prompts: EmojiPrompts | CocoPrompts | CompBenchPrompts | GenEvalPrompts | JsonlPrompts
    drawing: DrawingConfig
    runs: dict[str, RunConfig]
    metrics: MetricsConfig
    model: str = "mars-emoji"
    dtype: str | None = None
    references: bool = True
    reconstructions: bool = False
    interval: IntervalConfig = field(default_factory=IntervalConfig)
    paper_tables: list[int] = field(default_factory=list)

    def validate_runs(self) -> None:
        if not self.runs:
            raise ValueError("`runs` names no way of sampling: add one, e.g. `runs: {default: {}}`.")
        for name in self.runs:
            if not re.fullmatch(r"[\w.-]+", name) or name in (*RESERVED_RUNS, ".", ".."):
                raise ValueError(
                    f"A run cannot be named {name!r}: names are folders, of letters, digits, '.', '_' and '-', and "
                    f"{' and '.join(RESERVED_RUNS)} are taken."
                )
        if not any(getattr(self.metrics, entry.name) for entry in dataclasses.fields(self.metrics)):
            raise ValueError("`metrics` names nothing to measure.")

    def validate_tables(self) -> None:
        if unknown := sorted(set(self.paper_tables) - {1, 2}):
            raise ValueError(f"`paper_tables` knows tables 1 and 2, got {unknown[0]}.")


def load_config(source: str | Path, changes: Sequence[str] = ()) -> EvaluationConfig:
    """
    Read an evaluation from YAML.

    Args:
        source (`str` or `Path`):
            A file, or the name of a configuration in the package: `emoji`, `coco`, `compbench`, `geneval`.
        changes (`Sequence[str]`): Values to set on top, as `"prompts.data=data/emoji-64"`; values are YAML.

    Raises:
        ValueError: If there is no such file, a key is unknown or missing, or a value is not what it must be.

    Example:
        >>> load_config("emoji", ["prompts.limit=10"]).prompts.limit
        10
    """
    path = Path(source)
    shipped = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
    if str(source) in shipped:
        path = SHIPPED / f"{source}.yaml"
    if not path.is_file():
        raise ValueError(f"{source} is neither a file nor one of the package's evaluations: {', '.join(shipped)}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        for change in changes:
            _set(values, change)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no valid YAML: {error}") from None
    prompts = values.get("prompts") if isinstance(values, dict) else None
    kind = prompts.get("kind") if isinstance(prompts, dict) else None
    if isinstance(prompts, dict):
        if kind not in PROMPT_KINDS:
            raise ValueError(f"{source}: `prompts.kind` must be one of {', '.join(PROMPT_KINDS)}, got {kind!r}.")
        values["prompts"] = _build(
            PROMPT_KINDS[kind], {key: value for key, value in prompts.items() if key != "kind"}, f"{source}: prompts"
        )
    return _build(EvaluationConfig, values, str(source))


def _set(values: Any, change: str) -> None:
    """Set one value by its dotted name."""
    name, equals, text = change.partition("=")
    *parents, last = name.split(".")
    for parent in parents:
        if isinstance(values, dict) and values.get(parent) is None:  # also what stands there empty
            values[parent] = {}
        values = values[parent] if isinstance(values, dict) else None
    if not equals or not isinstance(values, dict):
        raise ValueError(f"A change is written like prompts.limit=100, got {change!r}.")
    values[last] = yaml.safe_load(text)


def _build(cls: type, values: Any, where: str) -> Any:
    """Make a dataclass of a mapping; refuse what it does not know."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping of {', '.join(_names(cls))}, got {values!r}.")
    if unknown := [key for key in values if key not in _names(cls)]:
        near = difflib.get_close_matches(str(unknown[0]), _names(cls), n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ValueError(f"{where}: unknown key `{unknown[0]}`; known are {', '.join(_names(cls))}.{hint}")
    entries = [entry for entry in dataclasses.fields(cls) if entry.name not in values]
    nothing = dataclasses.MISSING
    if missing := [e.name for e in entries if e.default is nothing and e.default_factory is nothing]:
        raise ValueError(f"{where}: `{missing[0]}` is missing.")
    hints = typing.get_type_hints(cls)
    built = {name: _nested(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    try:
        return cls(**built)
    except StrictDataclassError as error:
        raise ValueError(f"{where}: {error.__cause__ or error}") from None


def _nested(hint: Any, value: Any, where: str) -> Any:
    """Make what a field holds: a dataclass, one or nothing, several by name, or a plain value."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if isinstance(hint, types.UnionType):
        classes = [option for option in hint.__args__ if dataclasses.is_dataclass(option)]
        return _build(classes[0], value, where) if len(classes) == 1 and value is not None else value
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        cls = typing.get_args(hint)[1]
        return {str(name): _build(cls, entry or {}, f"{where}.{name}") for name, entry in value.items()}
    return value


def _names(cls: type) -> list[str]:
    return [entry.name for entry in dataclasses.fields(cls)]
