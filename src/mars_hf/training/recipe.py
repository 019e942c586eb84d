"""
Recipes: a training stage as a YAML file, and the stages of the paper as a table.

`STAGES` says for each stage what trains, on which tasks, by which rule pictures get their size, and what the loss and
the codes of a step are unless a recipe says otherwise. A [`Recipe`] adds models, data, optimizer and numbers; an
unknown key or a contradiction is refused before anything is loaded, and one with the model as soon as its
configuration is known ([`Recipe.check_model`]).
"""

from collections import Counter
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import GenerationConfig

from ..configuration_mars import MarsConfig
from ..data.emoji_captions import CaptionStyle
from ..data.records import CaptionMix
from ..evaluation.provenance import local_checkpoint
from ..image_processing_mars import check_image_size
from .losses import LOSS_SCOPES

RECIPES = Path(__file__).parent / "recipes"
FROZEN_DTYPES = ("float32", "bfloat16", "float16")
_EXPERT = r".*layers\.\d+\.(self_attn\.{kind}[qkvo]_proj|{kind}mlp\.(gate|up|down)_proj)|vision_head"
ADAPTED_MODULES = {"visual": _EXPERT.format(kind="visual_"), "all": _EXPERT.format(kind="(visual_)?")}
CAPTION_FORMS = {"records": CaptionMix, "emoji": CaptionStyle}
# The language model and the VQ-GAN bring the first three, and a checkpoint the others.
CONFIG_ELSEWHERE = {"text_config", "vq_config", "tie_word_embeddings", "base_checkpoint", "mars_format"}
# How pictures are drawn, beside what transformers' `GenerationConfig` has.
DRAWING_SETTINGS = ("guidance_schedule", "guidance_interval", "codes_per_step", "jacobi_window")
COUNTS = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
# Arguments of the Trainer that a recipe says elsewhere, or that would change what a row is.
SET_ELSEWHERE = {
    "output_dir": "it is `--out`",
    "learning_rate": "see `optimizer`",
    "weight_decay": "see `optimizer`",
    "adam_beta2": "see `optimizer`",
    "seed": "see the recipe's own `seed`",
    "data_seed": "see the recipe's own `seed`",
    "remove_unused_columns": "rows are the collator's",
    "use_cpu": "the machine's accelerator is taken if there is one; hide it with CUDA_VISIBLE_DEVICES=",
    "resume_from_checkpoint": "a run finds its own last checkpoint",
    "train_sampling_strategy": "rows are shuffled by the recipe's own `seed`",
    "auto_find_batch_size": "rows are planned by `per_device_train_batch_size`",
    "label_smoothing_factor": "see `loss.label_spread`",
    "save_only_model": "a checkpoint without the optimizer's state is not one that a run could go on from",
    "ignore_data_skip": "a run goes on with the rows behind those that it has seen",
}


@dataclass(frozen=True)
class Stage:
    """
    What a stage is.

    Args:
        trains (`str`): What trains.
        frozen (`str`): What does not.
        tasks (`dict[str, float]`):
            What a recipe may train, and the task's share of the batches where the recipe's sources state none (the
            paper states no shares).
        resolution (`str`): How pictures get their size.
        loss_scope (`str`): See [`HeadLoss`].
        codes_per_step (`tuple[int, ...]`): Each is trained, one a step.
        source (`str`): Where it is stated.
    """

    trains: str
    frozen: str
    tasks: dict[str, float]
    resolution: str
    loss_scope: str
    codes_per_step: tuple[int, ...]
    source: str


VISUAL_PART = "visual experts, visual embeddings, vision head"
TEXT_PART = "language model with its norms and output projections, VQ-GAN"
STAGES = {
    "alignment": Stage(
        VISUAL_PART,
        TEXT_PART,
        {"text-to-image": 0.5, "captioning": 0.5},
        "fixed: scaled until it covers a square, middle cut out",
        "joint",
        (1,),
        "Stage I, section 3.4",
    ),
    "refinement": Stage(
        VISUAL_PART,
        TEXT_PART,
        {"text-to-image": 0.9, "captioning": 0.1},
        "aspect ratio kept, short side scaled, size told in the caption",
        "joint",
        (1,),
        "Stage II, section 3.4; that captioning may go on is ours",
    ),
    "super-resolution": Stage(
        VISUAL_PART,
        TEXT_PART,
        {"super-resolution": 1.0},
        "low-resolution codes in the prompt, high-resolution codes drawn",
        "grammar",
        (4, 16),
        "Stage III, section 3.4; K and the restricted loss are ours",
    ),
    "documents": Stage(
        VISUAL_PART,
        TEXT_PART,
        {"documents": 0.8, "text-to-image": 0.15, "captioning": 0.05},
        "as in the base model",
        "joint",
        (1,),
        "joint generation, section 4; that pairs keep what was learnt is ours",
    ),
}


@dataclass(frozen=True)
class AdapterPart:
    """
    A LoRA of PEFT that trains in place of the visual part, which is frozen then as the rest is. A run's checkpoint is
    the adapter alone; transformers puts it on its base and takes it off.

    Args:
        r (`int`, defaults to 0): Rank of its matrices; 0 is no adapter.
        lora_alpha (`float`, *optional*): What it adds is multiplied by `lora_alpha / r`. Defaults to `2 * r`.
        experts (`str`, defaults to `"visual"`):
            Whose projections and feed-forward blocks it is on: the `"visual"` ones, which leaves text as it is, or
            `"all"`, which changes text while the adapter is on. It is on the vision head in either case.

    Raises:
        ValueError: If a number is impossible, or the experts are unknown.
    """

    r: int = 0
    lora_alpha: float | None = None
    experts: str = "visual"

    def __post_init__(self) -> None:
        if self.r < 0:
            raise ValueError(f"`model.adapter.r` is a rank of 1 or more, or 0 for no adapter, got {self.r}.")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"`model.adapter.lora_alpha` must be above 0, got {self.lora_alpha}.")
        _refuse_unknown("model.adapter.experts", self.experts, tuple(ADAPTED_MODULES))
        if not self.r and (self.lora_alpha is not None or self.experts != "visual"):
            raise ValueError("`model.adapter` needs a rank, `r`, of 1 or more; without one nothing is adapted.")


@dataclass
class ModelPart:
    """
    Where the model comes from: a MARS to go on from, or a language model and a VQ-GAN to build one of.

    Args:
        base (`str`, *optional*): Folder of a MARS, its name on the Hub, or `mars-emoji`, the embedded one.
        text (`str`, *optional*): Folder of the language model and its tokenizer.
        vqgan (`str`, *optional*): Folder of the image tokenizer.
        config (`dict`): Fields of [`MarsConfig`] to set.
        frozen_dtype (`str`, *optional*):
            Round the frozen weights to it, so that what trains sees what is shipped. Those of `base` stay as they are.
        image_defaults (`dict`): Written to the generation config: how pictures are drawn unless a call says otherwise.
        adapter ([`AdapterPart`]): Trains in place of the visual part of `base`.

    Raises:
        ValueError: If there is too much or too little to make a model of, a field or a dtype is unknown, or something
            would be in no checkpoint beside an adapter.
    """

    base: str | None = None
    text: str | None = None
    vqgan: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    frozen_dtype: str | None = None
    image_defaults: dict[str, Any] = field(default_factory=dict)
    adapter: AdapterPart = field(default_factory=AdapterPart)

    def __post_init__(self) -> None:
        built = self.text or self.vqgan
        if bool(built) == bool(self.base) or (built and not (self.text and self.vqgan)):
            raise ValueError(
                "`model` needs either `base`, a MARS to go on from, or both `text` and `vqgan` to build one of; got "
                f"{ {name: getattr(self, name) for name in ('base', 'text', 'vqgan')} }."
            )
        if self.frozen_dtype is not None:
            _refuse_unknown("model.frozen_dtype", self.frozen_dtype, FROZEN_DTYPES)
            if self.base:
                raise ValueError(
                    "`model.frozen_dtype` rounds the `text` and `vqgan` that a MARS is built of; the frozen weights "
                    "of `model.base` stay as they are. Leave it out."
                )
        _refuse_unknown_fields("model.config", self.config)
        _refuse_unknown_keys(
            "model.image_defaults", self.image_defaults, [*vars(GenerationConfig()), *DRAWING_SETTINGS]
        )
        if self.adapter.r and (lost := [name for name in ("text", "config", "image_defaults") if getattr(self, name)]):
            raise ValueError(
                f"`model.adapter` is stored without its base, and `model.{lost[0]}` would be in no checkpoint. Train "
                "and save such a base first."
            )

    @property
    def found_base(self) -> str | Path | None:
        """`base` as a folder where it is on this machine, or its name on the Hub."""
        return self.base and (local_checkpoint(self.base) or self.base)


@dataclass
class DataPart:
    """
    A source of records; see `mars_hf.data.records`.

    Args:
        source (`str`): What `open_records` takes; with codes, as `mars-hf data encode` writes them.
        name (`str`, *optional*): Configuration of a data set on the Hub that has several.
        revision (`str`, *optional*): Branch, tag or commit of a data set on the Hub; only a commit stays what it is.
        task (`str`): One of the tasks of the stage.
        share (`float`, *optional*):
            Share of batches, for all sources or for none. Defaults to the stage's for the task (`STAGES`), divided
            among the sources of this task.
        split (`str`, defaults to `"train"`): Which split.
        columns (`dict[str, str]`): Names in the source to ours.
        captions (`dict[str, Any]`):
            `form: records` chooses by the shares `chinese` and `fine` of [`CaptionMix`]; `form: emoji` writes the
            forms that the emoji language model knows, by the shares of [`CaptionStyle`].
        balance (`float`, defaults to 0.0): See [`subject_weights`]; for emoji.
        code_noise (`float`, defaults to 0.0): See [`Source`].
        drop_caption (`float`, defaults to 0.1): See [`Source`].
        min_score (`float`, *optional*): Leave records with a lower `score` out (the curated subset of Stage II).
        min_size (`int`, defaults to 1): Leave pictures whose shorter side has fewer pixels out.
        max_aspect_ratio (`float`, *optional*): Leave pictures whose longer side is more times the shorter out.
        max_caption_length (`int`, *optional*): Longest caption of `form: records`, in characters.
        long_captions (`str`, defaults to `"truncate"`): See [`RecordRules`].
        streaming (`bool`, defaults to `False`): Read the records on the way, without a copy; excludes `balance`.
        encode (`dict[str, Any]`, *optional*):
            The source holds pictures: turn them into codes before the first step, once, in the run's folder. `size:
            [height, width]` scales a picture until it covers that and cuts the middle out, `short_side` keeps its
            aspect ratio, in pixels; with neither, the model's own size.

    Raises:
        ValueError: If a share or a length is impossible, or something contradicts something else.
    """

    source: str
    task: str
    share: float | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    captions: dict[str, Any] = field(default_factory=lambda: {"form": "records"})
    balance: float = 0.0
    code_noise: float = 0.0
    drop_caption: float = 0.1
    min_score: float | None = None
    min_size: int = 1
    max_aspect_ratio: float | None = None
    max_caption_length: int | None = None
    long_captions: str = "truncate"
    streaming: bool = False
    encode: dict[str, Any] | None = None
    name: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        self._check_encoding()
        if self.share is not None and self.share <= 0:
            raise ValueError(f"`data.share` must be above 0, got {self.share}.")
        for name in ("code_noise", "drop_caption"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`data.{name}` is a share between 0 and 1, got {getattr(self, name)}.")
        if self.streaming and self.balance:
            raise ValueError(
                f"`data`: {self.source} is read as a stream, whose records cannot be balanced. Leave `streaming` or "
                "`balance` out."
            )
        _refuse_unknown("data.captions.form", self.caption_form, CAPTION_FORMS)
        known = [one.name for one in fields(CAPTION_FORMS[self.caption_form])]
        _refuse_unknown_keys("data.captions", self.caption_shares, known)
        shares = {name: _checked(float, one, f"data.captions.{name}") for name, one in self.caption_shares.items()}
        self.captions = {"form": self.caption_form, **shares}
        if impossible := [name for name, share in shares.items() if not 0 <= share <= 1]:
            raise ValueError(
                f"`data.captions.{impossible[0]}` is a share between 0 and 1, got {shares[impossible[0]]}."
            )
        _refuse_unknown("data.long_captions", self.long_captions, ("truncate", "drop"))
        for name in ("min_size", "max_aspect_ratio"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`data.{name}` must be 1 or more, got {value}.")
        if self.max_caption_length is None:
            return
        if self.max_caption_length < 1:
            raise ValueError(f"`data.max_caption_length` must be 1 or more, got {self.max_caption_length}.")
        if self.task == "documents" or self.caption_form != "records":
            raise ValueError(
                f"`data.max_caption_length` of {self.source} has nothing to limit: documents have no captions, and "
                "`form: emoji` writes its own. Leave it out."
            )

    def _check_encoding(self) -> None:
        if self.encode is None:
            return
        _refuse_unknown_keys("data.encode", self.encode, ["size", "short_side"])
        sides = [side for value in self.encode.values() for side in (value if isinstance(value, list) else [value])]
        if len(self.encode) > 1 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(
                f"`data.encode` takes `size: [height, width]` or `short_side`, in whole pixels, got {self.encode}."
            )
        if "size" in self.encode and len(sides) != 2:
            raise ValueError(f"`data.encode.size` is a height and a width in pixels, got {self.encode['size']}.")
        if self.streaming:
            raise ValueError(
                f"`data`: the codes of {self.source} are written to disk before the first step. Leave `streaming` or "
                "`encode` out, or encode the stream with `mars-hf data encode --streaming`."
            )

    @property
    def hub_options(self) -> dict[str, str]:
        """`name` and `revision` where they are given, as `load_dataset` takes them."""
        return {key: value for key in ("name", "revision") if (value := getattr(self, key)) is not None}

    @property
    def caption_form(self) -> str:
        """`captions.form`."""
        return self.captions.get("form", "records")

    @property
    def caption_shares(self) -> dict[str, Any]:
        """What stands beside `captions.form`."""
        return {name: share for name, share in self.captions.items() if name != "form"}


@dataclass
class EvaluationPart:
    """
    What is looked at in the course of a run, as often as `training.eval_strategy` and `eval_steps` say.

    Args:
        split (`str`, *optional*): Split of all sources whose losses are computed, without noise; None computes none.
        num_batches (`int`, defaults to 8): How many batches of them, the same each time.
        prompts (`list[str]`): Pictures are drawn of these, see [`SamplePictures`]; none if empty.
        height (`int`, *optional*): Of these pictures, in pixels. Defaults to the model's.
        width (`int`, *optional*): In pixels.

    Raises:
        ValueError: If pictures are to be drawn when nothing is looked at, or no batch.
    """

    split: str | None = None
    num_batches: int = 8
    prompts: list[str] = field(default_factory=list)
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if self.prompts and self.split is None:
            raise ValueError("`evaluation.prompts` are drawn at each evaluation, which needs an `evaluation.split`.")
        if self.num_batches < 1:
            raise ValueError(f"`evaluation.num_batches` must be 1 or more, got {self.num_batches}.")


@dataclass
class LossPart:
    """
    How the loss is computed, see [`MarsTrainer`].

    Args:
        scope (`str`, *optional*): `"joint"` or `"grammar"`; the stage's if None.
        label_spread (`float`, defaults to 0.0): See [`MarsTrainer`].
        chunk_size (`int`, defaults to 2048): Positions whose logits exist at once.
    """

    scope: str | None = None
    label_spread: float = 0.0
    chunk_size: int = 2048

    def __post_init__(self) -> None:
        if self.scope is not None:
            _refuse_unknown("loss.scope", self.scope, LOSS_SCOPES)
        if self.label_spread < 0:
            raise ValueError(f"`loss.label_spread` is a distance and cannot be negative, got {self.label_spread}.")
        if self.chunk_size < 1:
            raise ValueError(f"`loss.chunk_size` must be 1 position or more, got {self.chunk_size}.")


@dataclass
class OptimizerPart:
    """
    Args:
        name (`str`, defaults to `"adamw"`): `"adamw"`, or `"muon"` for matrices with AdamW for the rest.
        learning_rate (`float`, defaults to 1e-4): Of AdamW.
        muon_learning_rate (`float`, *optional*): Of Muon.
        weight_decay (`float`, defaults to 0.1): Of matrices.
        adam_beta2 (`float`, defaults to 0.95): Of AdamW.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    muon_learning_rate: float | None = None
    weight_decay: float = 0.1
    adam_beta2: float = 0.95

    def __post_init__(self) -> None:
        _refuse_unknown("optimizer.name", self.name, ("adamw", "muon"))
        if (self.name == "muon") != (self.muon_learning_rate is not None):
            raise ValueError("`optimizer.muon_learning_rate` goes with `optimizer.name: muon`, and only with it.")


@dataclass
class AssumedPart:
    """
    What a dry run ([`estimate_cost`]) takes for models and data that are not on this machine. Nothing else reads it.

    Args:
        text_config (`dict`): Configuration of the language model.
        vq_config (`dict`): Configuration of the VQ-GAN.
        config (`dict`): Other fields of [`MarsConfig`] that a `model.base` has which is not here.
        rows (`int`, *optional*): Rows of an epoch, of all sources together.
        prompt_tokens (`int`, *optional*):
            Text tokens of a row: the caption with its size; of a document, before each picture.
        image_size (`list[int]`, *optional*): Height and width of the pictures in pixels.
        lowres_size (`list[int]`, *optional*): Of the pictures that super-resolution starts from.
        pictures (`int`, *optional*): Of a document.

    Raises:
        ValueError: If a number is impossible.
    """

    text_config: dict[str, Any] = field(default_factory=dict)
    vq_config: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    prompt_tokens: int | None = None
    image_size: list[int] | None = None
    lowres_size: list[int] | None = None
    pictures: int | None = None

    def __post_init__(self) -> None:
        _refuse_unknown_fields("assume.config", self.config)
        for name in ("rows", "prompt_tokens", "pictures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`assume.{name}` must be 1 or more, got {value}.")
        for name in ("image_size", "lowres_size"):
            size = getattr(self, name)
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise ValueError(f"`assume.{name}` is a height and a width in pixels, got {size}.")


@dataclass
class Recipe:
    """
    A stage of training.

    Args:
        stage (`str`): A key of `STAGES`.
        model ([`ModelPart`]): What is trained.
        data (`list[DataPart]`): On what.
        training (`dict`):
            Arguments of `TrainingArguments`; `max_steps` or `num_train_epochs`, and `per_device_train_batch_size`, are
            needed.
        loss ([`LossPart`]): How.
        optimizer ([`OptimizerPart`]): By what.
        codes_per_step (`list[int]`, *optional*): See [`Mixture`]; the stage's if None.
        packing (`int`, *optional*): Tokens of packed rows; rows are padded if None.
        evaluation ([`EvaluationPart`]): What is looked at meanwhile.
        assume ([`AssumedPart`]): For a dry run.
        seed (`int`, defaults to 0): Decides all else.
        about (`str`): What it is, and which of its numbers are the paper's.

    Raises:
        ValueError: If anything is unknown, missing or contradicts something else.
    """

    stage: str
    model: ModelPart
    data: list[DataPart]
    training: dict[str, Any]
    loss: LossPart = field(default_factory=LossPart)
    optimizer: OptimizerPart = field(default_factory=OptimizerPart)
    codes_per_step: list[int] | None = None
    packing: int | None = None
    evaluation: EvaluationPart = field(default_factory=EvaluationPart)
    assume: AssumedPart = field(default_factory=AssumedPart)
    seed: int = 0
    about: str = ""

    def __post_init__(self) -> None:
        _refuse_unknown("stage", self.stage, STAGES)
        if self.model.adapter.r and self.optimizer.name == "muon":
            raise ValueError(
                "Muon makes every direction of a matrix equally strong, which the two halves of a LoRA are not made "
                "for. Take `optimizer.name: adamw` with `model.adapter`."
            )
        if not self.data:
            raise ValueError("A recipe needs at least one source under `data`.")
        for part in self.data:
            _refuse_unknown("data.task", part.task, STAGES[self.stage].tasks, f" in the stage {self.stage}")
        self._complete_shares()
        if self.codes_per_step is not None and (not self.codes_per_step or min(self.codes_per_step) < 1):
            raise ValueError(
                f"`codes_per_step` lists every K that is trained, each 1 or more, got {self.codes_per_step}. Leave it "
                f"out to train the stage's: {list(STAGES[self.stage].codes_per_step)}."
            )
        if self.packing is not None and self.packing < 1:
            raise ValueError(f"`packing` is a number of tokens, got {self.packing}. Leave it out to pad rows.")
        self._check_training()
        if any(part.streaming for part in self.data) and self.training.get("dataloader_num_workers", 0) > 1:
            raise ValueError(
                "A stream is read by one worker: set `training.dataloader_num_workers` to 0 or 1, got "
                f"{self.training['dataloader_num_workers']}."
            )

    def _complete_shares(self) -> None:
        without = [part for part in self.data if part.share is None]
        if 0 < len(without) < len(self.data):
            raise ValueError(
                f"`data.share` is stated for some sources, and not for {without[0].source} ({without[0].task}). State "
                "it for all of them, or for none, to take the stage's."
            )
        sources = Counter(part.task for part in without)
        if without:
            shares = STAGES[self.stage].tasks
            self.data = [replace(part, share=shares[part.task] / sources[part.task]) for part in self.data]

    def _check_training(self) -> None:
        self._type_training()
        if ("max_steps" in self.training) == ("num_train_epochs" in self.training):
            raise ValueError("`training` needs `max_steps` or `num_train_epochs`, and not both.")
        if "per_device_train_batch_size" not in self.training:
            raise ValueError("`training` needs `per_device_train_batch_size`.")
        for name in COUNTS:
            if not (value := self.training.get(name, 1)) > 0:
                raise ValueError(f"`training.{name}` must be above 0, got {value}.")
        if (self.evaluation.split is not None) != ("eval_strategy" in self.training):
            raise ValueError(
                "`training.eval_strategy` says how often `evaluation` looks: give both, `evaluation` with a `split`, "
                "or none of them."
            )
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            if self.training.get(name) == "epoch":
                raise ValueError(
                    f"`training.{name}: epoch` would come once, at the end: a run is one plan of rows. Take `steps` "
                    f"with `{name.removesuffix('_strategy')}_steps`; a number below 1 is a share of the run."
                )
        for name, place in SET_ELSEWHERE.items():
            if name in self.training:
                raise ValueError(f"`training.{name}` is set elsewhere: {place}.")
        of_adamw = {"optim", "optim_args", "adam_beta1", "adam_epsilon"} & self.training.keys()
        if self.optimizer.name == "muon" and of_adamw:
            raise ValueError(
                f"`training.{min(of_adamw)}` has no effect with `optimizer.name: muon`, which brings its own AdamW. "
                "Leave it out."
            )

    def _type_training(self) -> None:
        """Read numbers and switches as `TrainingArguments` means them: YAML takes 1e-8 for a text, `no` for false."""
        hints = _training_argument_types()
        _refuse_unknown_keys("training", self.training, list(hints))
        for name, value in self.training.items():
            if name.endswith("_strategy") and value is False:
                self.training[name] = "no"
            elif hints[name] in (float, float | None, int, int | None, bool, bool | None):
                self.training[name] = _checked(hints[name], value, f"training.{name}")

    def check_model(self, config: MarsConfig) -> None:
        """
        Refuse a model that this recipe cannot train.

        Args:
            config ([`MarsConfig`]): Of `model`, its `config` included.

        Raises:
            ValueError: If the model is made for other codes a step, lacks super-resolution or what an adapter is to be
                on, or cannot draw `evaluation.prompts`.
        """
        if self.model.adapter.r and self.model.adapter.experts == "visual" and not config.use_visual_expert:
            raise ValueError(
                "`model.adapter` is to be on the visual experts, and this model has none: set `experts: all`."
            )
        if self.stage == "super-resolution" and config.super_resolution_factor is None:
            raise ValueError(
                "The stage super-resolution needs a model that knows how many times larger it draws: set "
                "`model.config.super_resolution_factor`."
            )
        if foreign := sorted(set(self.trained_codes_per_step) - set(config.trained_codes_per_step)):
            raise ValueError(
                f"This recipe trains {foreign[0]} codes a step, but the model would be saved as one that draws "
                f"{config.trained_codes_per_step}. Set `model.config.codes_per_step` to all that are trained "
                f"({self.trained_codes_per_step}), the usual one first, or `codes_per_step` to some of the model's."
            )
        looks = self.evaluation
        if looks.prompts and config.super_resolution_factor is not None:
            raise ValueError(
                "`evaluation.prompts` are drawn from text alone, but this is a model of super-resolution, which "
                "starts from a smaller picture. Leave them out; the losses of `evaluation.split` are computed."
            )
        if looks.prompts and config.vq_config is None:
            raise ValueError(
                "`evaluation.prompts` are to be drawn, but the model has no VQ-GAN to make pictures of codes. Leave "
                "them out; the losses of `evaluation.split` are computed."
            )
        try:
            sides = (config.default_image_size if side is None else side for side in (looks.height, looks.width))
            check_image_size(*sides, config.downsample_factor)
        except ValueError as error:
            raise ValueError(f"`evaluation`: {error}") from None

    @property
    def loss_scope(self) -> str:
        """The recipe's, or its stage's."""
        return self.loss.scope or STAGES[self.stage].loss_scope

    @property
    def trained_codes_per_step(self) -> list[int]:
        """The recipe's, or its stage's."""
        return self.codes_per_step or list(STAGES[self.stage].codes_per_step)

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """
        Read a recipe from a YAML file, or one of the package by its name, such as `emoji/stage1`.

        Raises:
            ValueError: If there is no such recipe, or it is not one.
        """
        file = recipe_path(path)
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is no YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"A recipe is a mapping of keys to values; {file} holds {type(values).__name__}.")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """
        Make a recipe of what [`~Recipe.to_dict`] gave, or of some of it: what is missing takes its default.

        Raises:
            ValueError: If a key is not known, a required one is missing, or the values contradict each other.
        """
        return _build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Give all values, defaults included."""
        return asdict(self)


def recipe_path(name: str | Path) -> Path:
    """
    Find the file of a recipe, or of one of the package by its name.

    Raises:
        ValueError: If there is no such recipe.
    """
    for file in (Path(name), RECIPES / f"{name}.yaml"):
        if file.is_file():
            return file
    names = sorted(str(one.relative_to(RECIPES).with_suffix("")) for one in RECIPES.rglob("*.yaml"))
    raise ValueError(f"There is no recipe {name}: give a YAML file, or one of {', '.join(names)}.")


def _training_argument_types() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    return {one.name: hints[one.name] for one in fields(TrainingArguments)}


def _refuse_unknown(name: str, value: Any, known: Any, where: str = "") -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}{where}, got {value!r}.")


def _refuse_unknown_fields(place: str, values: dict[str, Any]) -> None:
    known = [one.name for one in fields(MarsConfig) if one.name in MarsConfig.__annotations__]
    _refuse_unknown_keys(place, values, [name for name in known if name not in CONFIG_ELSEWHERE])


def _refuse_unknown_keys(place: str, values: dict[str, Any], known: list[str]) -> None:
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            hint = f" Did you mean `{near[0]}`?" if near else f" Known are {', '.join(known)}."
            raise ValueError(f"`{place}{'.' if place else ''}{key}` is no key of a recipe.{hint}")


def _build(kind: type, values: Any, place: str) -> Any:
    """Make a data class of a mapping, and of the mappings in it, naming the place of what does not fit."""
    if not isinstance(values, dict):
        raise ValueError(f"`{place}` must be a mapping, got {values!r}.")
    hints = get_type_hints(kind)
    _refuse_unknown_keys(place, values, list(hints))
    missing = [one.name for one in fields(kind) if _is_required(one) and one.name not in values]
    if missing:
        raise ValueError(f"`{place}{'.' if place else ''}{missing[0]}` is missing.")
    made: dict[str, Any] = {}
    for key, value in values.items():
        hint, where = hints[key], f"{place}{'.' if place else ''}{key}"
        if is_dataclass(hint):
            made[key] = _build(hint, value, where)  # type: ignore[arg-type]
        elif key == "data":
            if not isinstance(value, list):
                raise ValueError(f"`{where}` must be a list of sources, got {value!r}.")
            made[key] = [_build(DataPart, one, f"{where}[{n}]") for n, one in enumerate(value)]
        else:
            made[key] = _checked(hint, value, where)
    return kind(**made)


def _is_required(one: Any) -> bool:
    from dataclasses import MISSING

    return one.default is MISSING and one.default_factory is MISSING


def _checked(hint: Any, value: Any, place: str) -> Any:
    """Hold a value to its type; YAML reads 1e-4 as a string and 1 as no float."""
    from huggingface_hub.dataclasses import type_validator
    from huggingface_hub.errors import StrictDataclassFieldValidationError

    if hint in (float, float | None) and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            pass
    try:
        type_validator(place, value, hint)
    except (TypeError, StrictDataclassFieldValidationError) as error:
        raise ValueError(f"`{place}`: {error}") from None
    return value


__all__ = [
    "RECIPES",
    "STAGES",
    "AdapterPart",
    "AssumedPart",
    "DataPart",
    "EvaluationPart",
    "LossPart",
    "ModelPart",
    "OptimizerPart",
    "Recipe",
    "Stage",
    "recipe_path",
]
