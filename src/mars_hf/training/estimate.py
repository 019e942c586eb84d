"""
What a recipe costs, told before it is run: parameters, memory of a GPU, tokens and FLOPs of a step, GPU-days.

No weight is made and none is read: all follows from configurations and from the shapes of some batches, which are
collated as in a run. Models and data that are not on this machine are assumed as the recipe says (`assume`), and the
report tells so. The formulas, and what they leave out, stand in `docs/training_cost.md`; `tests/test_estimate.py`
holds them to measured steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from transformers import AutoConfig, AutoTokenizer

from ..configuration_mars import MarsConfig
from ..modeling_mars import MarsForConditionalGeneration
from ..processing_mars import MarsProcessor
from .collation import AlignedCollator, PackedCollator, Row, ShiftedRow, pack_rows
from .losses import IGNORED_LABEL
from .mixture import MixtureStream
from .recipe import AdapterPart, AssumedPart, ModelPart, Recipe
from .run import with_adapter
from .sources import build_sources, fit_processor, rows_of_an_epoch

PAPER_STAGES = ("paper/stage1", "paper/stage2", "paper/stage3")
PAPER_GPU_DAYS = 587  # of an A100, for all stages: sections 1 and 4.2
A100_TFLOPS = 312.0  # dense bfloat16
SAMPLED_BATCHES = 32  # of data that are here
SECONDS_A_DAY = 86_400
GIB = 2**30
WORD, PAD = 1, 0  # text ids that stand for all
NO_ADAPTER = AdapterPart()
# Tables of logits at once in the backward of the loss: the logits, and on the way to their gradient two more; of the
# visual ones, which are cut and padded and picked from, four more.
TEXT_COPIES, VISUAL_COPIES = 3, 5


@dataclass(frozen=True)
class Part:
    """Parameters of a part of the model: how many, and how many of them train."""

    parameters: int
    trained: int


@dataclass(frozen=True)
class StepShape:
    """
    How large the tensors of a device's batch are.

    Args:
        rows (`int`): Rows, or packs.
        examples (`int`): Rows of the data in them.
        tokens (`int`): Tokens of the examples; the other places of the batch are padding.
        columns (`int`): Places of a row.
        prompt (`int`): Columns that run without gradient, in front.
        text (`int`): Places behind them that go through text experts.
        visual (`int`): Places behind them that go through visual experts.
        codes (`int`): Labels that are codes.
        words (`int`): Labels that are words or `<img>`.
    """

    rows: int
    examples: int
    tokens: int
    columns: int
    prompt: int
    text: int
    visual: int
    codes: int
    words: int

    @classmethod
    def of(cls, batch: dict[str, Any], examples: Sequence[Row], config: MarsConfig, prompts_without_gradient: bool):
        """Read it off a batch of [`AlignedCollator`] or [`PackedCollator`] and the rows that it was made of."""
        ids, labels = batch["input_ids"], batch["shift_labels"]
        rows, columns = ids.shape
        tokens = sum(len(ShiftedRow.of(row, config)) for row in examples)
        prompt = batch.get("prompt_length", 0) if prompts_without_gradient and config.use_visual_expert else 0
        places = rows * (columns - prompt)
        visual = int((ids[:, prompt:] >= config.image_token_offset).sum())
        text = places - visual
        if not config.use_visual_expert:
            text, visual = 0, places
        elif config.expert_impl == "where":
            text, visual = places, places
        is_code = (labels >= config.image_token_offset) & (labels < config.image_start_token_id)
        codes, words = int(is_code.sum()), int(((labels != IGNORED_LABEL) & ~is_code).sum())
        return cls(rows, len(examples), tokens, columns, prompt, text, visual, codes, words)


@dataclass(frozen=True)
class Method:
    """What of a recipe decides the cost of a step: see [`LossPart`] and [`OptimizerPart`]."""

    scope: str
    chunk_size: int
    is_spread: bool
    optimizer: str
    checkpointing: bool
    bf16: bool
    gpus: int
    adapter: AdapterPart = NO_ADAPTER

    @classmethod
    def of(cls, recipe: Recipe, gpus: int):
        """Read it off a recipe. bfloat16 is what a run takes by itself on a GPU."""
        training = recipe.training
        checkpointing = any(training.get(f"{kind}_checkpointing") for kind in ("gradient", "activation"))
        loss = recipe.loss
        return cls(
            scope=recipe.loss_scope,
            chunk_size=loss.chunk_size,
            is_spread=loss.label_spread > 0,
            optimizer=recipe.optimizer.name,
            checkpointing=checkpointing,
            bf16=training.get("fp16") or training.get("bf16", True),
            gpus=gpus,
            adapter=recipe.model.adapter,
        )

    @property
    def prompts_without_gradient(self) -> bool:
        """As [`MarsTrainer`] decides it."""
        return self.gpus == 1 and not self.checkpointing and not self.adapts_text

    @property
    def adapts_text(self) -> bool:
        """Whether an adapter is on the text experts, too."""
        return self.adapter.r > 0 and self.adapter.experts == "all"

    @property
    def width(self) -> int:
        """Bytes of a number that layers compute with."""
        return 2 if self.bf16 else 4


class Sizes:
    """Widths of a model, and the matrices of one layer, and of an adapter on them, in parameters."""

    def __init__(self, config: MarsConfig, adapter: AdapterPart = NO_ADAPTER):
        text = config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.layers, self.hidden, self.inner = text.num_hidden_layers, text.hidden_size, text.intermediate_size
        self.heads, self.attention = text.num_attention_heads, text.num_attention_heads * head_dim
        keys_and_values = 2 * text.num_key_value_heads * head_dim
        self.output = self.attention * self.hidden
        self.projections = (self.attention + keys_and_values) * self.hidden  # of queries, keys and values
        self.expert = self.projections + 3 * self.hidden * self.inner
        # What a matrix takes in and gives, for each rank.
        self.adapter_inputs = adapter.r * 3 * self.hidden
        self.adapter = self.adapter_inputs + adapter.r * (self.attention + keys_and_values)
        self.adapter += adapter.r * 3 * (self.hidden + self.inner)
        self.output_adapter = adapter.r * (self.attention + self.hidden)
        self.vision_head_adapter = adapter.r * (self.hidden + config.num_visual_tokens)
        self.has_output_expert = config.expert_output_projection
        if self.has_output_expert:
            self.expert, self.output = self.expert + self.output, 0
            self.adapter, self.output_adapter = self.adapter + self.output_adapter, 0
        self.text_head = config.text_vocab_size * self.hidden
        self.vision_head = config.num_visual_tokens * self.hidden
        self.text_vocabulary, self.visual_vocabulary = config.text_vocab_size, config.num_visual_tokens
        self.codes = config.codebook_size


# ---- parameters


def count_parameters(config: MarsConfig, adapter: AdapterPart = NO_ADAPTER) -> dict[str, Part]:
    """
    Count the parameters of each part of a model without making it. Tied weights count once, as embeddings.

    Args:
        config ([`MarsConfig`]): Of the model.
        adapter ([`AdapterPart`], *optional*): Trains in place of the visual part.

    Returns:
        `dict[str, Part]`: By the name of the part.
    """
    parts: dict[str, list[int]] = {}
    for name, parameter in _named_parameters(config, adapter):
        numbers = parts.setdefault(_part_of(name, config), [0, 0])
        numbers[0] += parameter.numel()
        numbers[1] += parameter.numel() * _trains(name, parameter)
    return {name: Part(*numbers) for name, numbers in parts.items()}


def _model_without_storage(config: MarsConfig) -> MarsForConditionalGeneration:
    with torch.device("meta"):
        model = MarsForConditionalGeneration(config)
    if config.use_visual_expert:
        model.freeze_text()
    return model


def _named_parameters(config: MarsConfig, adapter: AdapterPart) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Give the parameters of a model, and of an adapter on it, by their names without it."""
    model = _model_without_storage(config)
    if not adapter.r:
        yield from model.named_parameters()
        return
    with torch.device("meta"):
        adapted = with_adapter(model, adapter)
    for name, parameter in adapted.named_parameters():
        yield name.removeprefix("base_model.model.").replace(".base_layer", ""), parameter


def _trains(name: str, parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad and not name.startswith("vqgan.")  # no loss reaches the VQ-GAN


def _part_of(name: str, config: MarsConfig) -> str:
    if ".lora_" in name:
        return "adapter"
    if name.startswith("vqgan."):
        return "VQ-GAN"
    if "_head." in name:
        return name.split(".")[0].replace("_", " ")
    if "embed" in name:
        return "visual embeddings" if "visual_" in name else "text embeddings"
    if "visual_" in name:
        return "visual experts"
    is_shared = "norm" in name or ("o_proj" in name and not config.expert_output_projection)
    return "norms and output projections" if is_shared else "text experts"


# ---- FLOPs


@dataclass(frozen=True)
class Flops:
    """Operations of a step: what the model needs, and what is computed twice to save memory."""

    model: float
    recomputed: float


def count_flops(config: MarsConfig, step: StepShape, method: Method) -> Flops:
    """
    Count the operations of a forward and a backward, two for each multiplication of a matrix product.

    A parameter costs 2 operations a token in the forward, 2 in the backward for the gradient of what comes in, and 2
    for its own gradient, which the frozen part has not.

    Args:
        config ([`MarsConfig`]): Of the model.
        step ([`StepShape`]): A batch.
        method ([`Method`]): How it is trained.
    """
    sizes, places = Sizes(config, method.adapter), step.rows * (step.columns - step.prompt)
    is_adapted = method.adapter.r > 0
    shared_trains = not config.use_visual_expert and not is_adapted
    prompt = step.rows * step.prompt
    forward_only = prompt * (sizes.expert + sizes.output) + 2 * prompt * step.prompt * sizes.attention
    frozen = step.text * sizes.expert + (0 if shared_trains else places * sizes.output)
    trained = step.visual * sizes.expert + (places * sizes.output if shared_trains else 0)
    without_gradient = 0  # for what comes into the first layer: nothing below it trains
    if is_adapted:
        adapted = step.visual + step.text * method.adapts_text
        frozen += step.visual * sizes.expert
        trained = adapted * sizes.adapter + places * sizes.output_adapter * method.adapts_text
        without_gradient = (step.visual + step.text) * sizes.projections + adapted * sizes.adapter_inputs
        without_gradient *= not method.checkpointing
    products = 2 * places * step.columns * sizes.attention  # of queries with keys, of weights with values
    layers = sizes.layers * (2 * forward_only + 4 * frozen + 6 * (trained + products)) - 2 * without_gradient
    recomputed = sizes.layers * 2 * (frozen + trained + products) * method.checkpointing
    model = float(layers)
    for labels, has_words in ((step.codes, method.scope == "joint"), (step.words, True)):
        text_head = labels * sizes.text_head * has_words
        vision_head = labels * sizes.vision_head
        on_vision_head = labels * sizes.vision_head_adapter
        model += (6 if shared_trains else 4) * text_head + (4 if is_adapted else 6) * vision_head + 6 * on_vision_head
        recomputed += 2 * (text_head + vision_head + on_vision_head) * (labels > method.chunk_size)
    if method.is_spread and not is_adapted:  # the mean head rows of neighbouring codes: forward, gradient of the head
        model += 4 * sizes.codes**2 * sizes.hidden
    return Flops(model, float(recomputed))


# ---- memory


def estimate_memory(config: MarsConfig, step: StepShape, method: Method) -> dict[str, int]:
    """
    Estimate what is in the memory of one device at the end of a forward, when the gradients of an earlier batch of the
    same step are there.

    Args:
        config ([`MarsConfig`]): Of the model.
        step ([`StepShape`]): A batch.
        method ([`Method`]): How it is trained.

    Returns:
        `dict[str, int]`: Bytes of each kind.
    """
    named = [(name, p, _trains(name, p)) for name, p in _named_parameters(config, method.adapter)]
    everything = sum(p.numel() for _, p, _ in named)
    trained = sum(p.numel() for _, p, trains in named if trains)
    by_muon = sum(p.numel() for name, p, trains in named if trains and p.ndim == 2 and "layers" in name.split("."))
    states = 2 * trained - by_muon * (method.optimizer == "muon")  # Muon keeps one number, AdamW two
    spread = 4 * config.codebook_size**2 * method.is_spread
    return {
        "weights, float32": -(-4 * everything // method.gpus) + spread,
        "weights that layers compute with": _weights_in_use(config, step, method),
        "gradients": -(-4 * trained // method.gpus),
        "optimizer": -(-4 * states // method.gpus),
        **_activations(config, step, method),
    }


def _weights_in_use(config: MarsConfig, step: StepShape, method: Method) -> int:
    """Copies beside the float32 weights: rounded ones, or those that other devices hold."""
    sizes, parts = Sizes(config), count_parameters(config)
    visual_layer, text_layer = sizes.expert * config.use_visual_expert, sizes.expert + sizes.output
    if method.gpus > 1:  # two layers on their way, the gradients of one, and all that is in no layer
        outside = sum(p.numel() for n, p in _model_without_storage(config).named_parameters() if ".layers." not in n)
        gradients = visual_layer if config.use_visual_expert else text_layer
        gradients *= not method.adapter.r
        return method.width * (2 * (visual_layer + text_layer) + gradients + outside)
    if not method.bf16:
        return 0
    heads = parts["vision head"].parameters + sizes.text_head * (method.scope == "joint" or step.words > 0)
    layer = visual_layer if config.use_visual_expert else text_layer  # what trains, from the first use to the loss
    if method.checkpointing and method.adapter.r:
        layer = 0
    if not method.checkpointing and config.use_visual_expert:  # what does not, for the backward
        layer += sizes.output + sizes.expert * (step.text > 0)
    return method.width * (heads + sizes.layers * layer)


def _activations(config: MarsConfig, step: StepShape, method: Method) -> dict[str, int]:
    sizes, places = Sizes(config, method.adapter), step.rows * (step.columns - step.prompt)
    layer = _layer_activations(sizes, step, method)
    labels = step.codes + step.words
    ends = 4 * sizes.hidden * (places + 2 * labels)  # the last norm's input, and the states that have a label
    logits = 0
    for count, has_words in ((step.codes, method.scope == "joint"), (step.words, True)):
        copies = VISUAL_COPIES * sizes.visual_vocabulary + TEXT_COPIES * sizes.text_vocabulary * has_words
        logits = max(logits, 4 * min(count, method.chunk_size) * copies)
    if not method.checkpointing:
        return {"activations": sizes.layers * layer + ends, "logits": logits}
    kept = 4 * sizes.layers * sizes.hidden * places + ends
    return {"activations": kept + max(layer - logits, 0), "logits": logits}


def _layer_activations(sizes: Sizes, step: StepShape, method: Method) -> int:
    """What a layer keeps for its backward, under attention that keeps no scores (sdpa, flash)."""
    places, keys, width = step.rows * (step.columns - step.prompt), step.rows * step.columns, method.width
    trained = step.visual + step.text * method.adapts_text
    norms = 2 * 4 * sizes.hidden * places  # what goes into them
    # What goes into expert projections: for each linear a rounded copy of its own, or the norm's output for all.
    inputs = 5 * width * sizes.hidden * trained if method.bf16 else 2 * 4 * sizes.hidden * places
    # Queries, output, and keys and values of every head; of each row a sum for each head, and the mask as numbers.
    attention = width * sizes.attention * (2 * places + 2 * keys)
    attention += 4 * sizes.heads * places + width * places * step.columns
    attention += width * sizes.attention * places * (sizes.has_output_expert or method.adapts_text)
    # The gate, its activation, the other branch; with a gradient for the last matrix their product, too.
    inner = width * sizes.inner * (3 * (step.text + step.visual) + trained)
    return norms + inputs + attention + inner


# ---- what a recipe feeds


def recipe_config(part: ModelPart, assumed: AssumedPart) -> tuple[MarsConfig, str]:
    """
    Read the configuration of the model that a recipe trains.

    Args:
        part ([`ModelPart`]): Of the recipe.
        assumed ([`AssumedPart`]): Taken for folders that are not here.

    Returns:
        `tuple[MarsConfig, str]`: The configuration, and where it is from.

    Raises:
        ValueError: If a model is not here and the recipe assumes nothing.
    """
    names = [str(name) for name in (part.found_base, part.text, part.vqgan) if name is not None]
    if assumed.text_config and not all(Path(name).is_dir() for name in names):
        config = {**assumed.config, **part.config}
        return MarsConfig(text_config=assumed.text_config, vq_config=assumed.vq_config or None, **config), "assumed"
    try:
        if part.base is not None:
            return MarsConfig.from_pretrained(part.found_base, **part.config), part.base
        vq_config = {name: value for name, value in VQModel.load_config(part.vqgan).items() if name[0] != "_"}
        text_config = AutoConfig.from_pretrained(part.text)
    except OSError as error:
        raise ValueError(
            f"The models of the recipe ({', '.join(names)}) cannot be read, and it does not say what a dry run is to "
            f"assume: give the folder, or `assume.text_config`. {error}"
        ) from None
    return MarsConfig(text_config=text_config, vq_config=vq_config, **part.config), f"{part.text}, {part.vqgan}"


def recipe_batches(
    recipe: Recipe, config: MarsConfig, method: Method
) -> tuple[list[tuple[float, StepShape]], int | None, str]:
    """
    Give the shapes of a recipe's batches, each with its share, the rows of an epoch if they can be counted, and where
    they are from.

    Raises:
        ValueError: If data are not here and the recipe assumes nothing, or not enough.
    """
    names = [part.source for part in recipe.data]
    if recipe.assume.rows is not None and not all(Path(name).exists() for name in names):
        shapes = [(share, _shape(recipe, config, method, rows)) for share, rows in _assumed_batches(recipe, config)]
        return shapes, recipe.assume.rows, "assumed"
    model = _model_without_storage(config)
    model.vqgan = None  # whose codes the data hold is for a run to check: it takes the weights
    processor = (
        MarsProcessor.from_pretrained(recipe.model.found_base)
        if recipe.model.base is not None
        else MarsProcessor.from_text_tokenizer(AutoTokenizer.from_pretrained(recipe.model.text), config)
    )
    if recipe.model.base is not None:
        fit_processor(processor, config)
    sources = build_sources(recipe, model, processor)
    size, k = recipe.training["per_device_train_batch_size"], recipe.trained_codes_per_step
    rows = iter(MixtureStream(processor, sources, size, SAMPLED_BATCHES, codes_per_step=k, seed=recipe.seed))
    batches = [list(islice(rows, size)) for _ in range(SAMPLED_BATCHES)]
    if recipe.packing is not None:
        everything = [row for batch in batches for row in batch]
        packs = pack_rows([len(ShiftedRow.of(row, config)) for row in everything], recipe.packing)
        per_batch = max(len(packs) // size, 1)
        batches = [
            [everything[index] for pack in packs[n * size : (n + 1) * size] for index in pack]
            for n in range(per_batch)
        ]
    shapes = [(1 / len(batches), _shape(recipe, config, method, batch)) for batch in batches]
    return shapes, rows_of_an_epoch(sources), ", ".join(dict.fromkeys(names))


def _shape(recipe: Recipe, config: MarsConfig, method: Method, rows: list[Row]) -> StepShape:
    """Collate rows as a run does."""
    if recipe.packing is None:
        batch = AlignedCollator(config, PAD)(rows)
    else:
        packs = pack_rows([len(ShiftedRow.of(row, config)) for row in rows], recipe.packing)
        batch = PackedCollator(config, PAD, recipe.packing)([[rows[index] for index in pack] for pack in packs])
    return StepShape.of(batch, rows, config, method.prompts_without_gradient)


def _assumed_batches(recipe: Recipe, config: MarsConfig) -> Iterator[tuple[float, list[Row]]]:
    """Make a batch of equal rows for each task and K, with its share."""
    steps, total = recipe.trained_codes_per_step, sum(part.share for part in recipe.data)
    for part in recipe.data:
        for k in steps:
            row = _assumed_row(recipe, config, part.task, k)
            count = recipe.training["per_device_train_batch_size"]
            if recipe.packing is not None:
                fitting = recipe.packing // len(ShiftedRow.of(row, config))
                if not fitting:
                    raise ValueError(f"An assumed row of {len(row['input_ids'])} tokens does not fit `packing`.")
                count *= fitting
            yield part.share / total / len(steps), [row] * count


def _assumed_row(recipe: Recipe, config: MarsConfig, task: str, k: int) -> Row:
    """Write a row as the processor does, of the assumed lengths."""
    assumed = recipe.assume
    own = {"super-resolution": ["lowres_size"], "documents": ["pictures"]}
    needed = ["prompt_tokens", "image_size", *own.get(task, [])]
    missing = [name for name in needed if getattr(assumed, name) is None]
    if missing:
        raise ValueError(
            f"The data of the recipe are not here, and rows of {task!r} cannot be assumed without "
            f"`assume.{missing[0]}`."
        )
    words, code = [WORD] * assumed.prompt_tokens, config.image_token_offset
    picture = [config.image_start_token_id] * k + [code] * _num_codes(assumed.image_size, config)
    if task == "captioning":
        ids = [*picture, config.image_end_token_id, WORD, *words, WORD]  # a line end before, the end of text behind
        labels = [IGNORED_LABEL] * (len(picture) + 1) + ids[len(picture) + 1 :]
    elif task == "documents":
        drawn = [picture[0], *[IGNORED_LABEL] * (k - 1), *picture[k:], IGNORED_LABEL]
        ids = [*words, *picture, config.image_end_token_id] * assumed.pictures + [WORD]  # the end of text
        labels = [*words, *drawn] * assumed.pictures + [WORD]
    else:
        if task == "super-resolution":
            low = [code] * _num_codes(assumed.lowres_size, config)
            words = [*words, config.lowres_start_token_id, *low, config.lowres_end_token_id]
        ids = [*words, *picture, config.image_end_token_id]
        labels = [IGNORED_LABEL] * (len(words) + k) + picture[k:] + [IGNORED_LABEL]
    sizes = [assumed.image_size] * (assumed.pictures if task == "documents" else 1)
    row = {"input_ids": ids, "labels": labels, "image_sizes": sizes, "task": task}
    if task == "super-resolution" and config.lowres_embedding:
        row["enlarged_codes"] = [[0] * _num_codes(assumed.image_size, config)]
    return row


def _num_codes(size: list[int], config: MarsConfig) -> int:
    factor = config.downsample_factor
    if size[0] % factor or size[1] % factor:
        raise ValueError(f"An assumed size must be a multiple of {factor} pixels, got {size[0]}x{size[1]}.")
    return size[0] // factor * (size[1] // factor)


# ---- the estimate


@dataclass(frozen=True)
class Estimate:
    """
    What a recipe costs.

    Args:
        model (`str`): Where the model's shape is from.
        data (`str`): Where the rows' lengths are from.
        gpus (`int`): Over which weights, gradients and states of the optimizer are divided.
        parameters (`dict[str, Part]`): By part.
        memory (`dict[str, int]`): Bytes on one GPU, for the largest batch.
        largest ([`StepShape`]): That batch.
        tokens (`float`): Of a step, over all GPUs.
        padding (`float`): Share of the places of a batch that hold none.
        flops (`float`): Of a step, over all GPUs.
        recomputed (`float`): Operations beyond these that save memory.
        rows (`float`): Rows of the data that a step trains on.
        steps (`int`): Of the run.
        utilisation (`float`): Share of the peak that is assumed to go into `flops`.
        peak_tflops (`float`): Of one GPU.
    """

    model: str
    data: str
    gpus: int
    parameters: dict[str, Part]
    memory: dict[str, int]
    largest: StepShape
    tokens: float
    padding: float
    flops: float
    recomputed: float
    rows: float
    steps: int
    utilisation: float
    peak_tflops: float

    @property
    def days_at_peak(self) -> float:
        """Days that one GPU would need for the run at its peak."""
        return self.steps * self.flops / (self.peak_tflops * 1e12) / SECONDS_A_DAY

    @property
    def gpu_days(self) -> float:
        """Days that one GPU needs for the run at the utilisation."""
        return self.days_at_peak / self.utilisation

    def to_dict(self) -> dict[str, Any]:
        """Give all values, and those that follow from them."""
        return {**asdict(self), "gpu_days": self.gpu_days, "days": self.gpu_days / self.gpus}

    def __str__(self) -> str:
        """Set the tables that `mars-hf train --dry-run` prints."""
        return "\n\n".join([self._parameter_table(), self._memory_table(), self._step_table(), self._run_table()])

    def _parameter_table(self) -> str:
        lines = [(name, f"{part.parameters:,}", f"{part.trained:,}") for name, part in self.parameters.items()]
        total = [
            sum(numbers)
            for numbers in zip(*((p.parameters, p.trained) for p in self.parameters.values()), strict=True)
        ]
        return _table([(f"parameters ({self.model})", "all", "trained"), *lines, ("sum", *(f"{n:,}" for n in total))])

    def _memory_table(self) -> str:
        title = f"memory of one of {self.gpus} GPUs" if self.gpus > 1 else "memory of one GPU"
        lines = [(name, f"{size / GIB:,.3f}") for name, size in self.memory.items()]
        return _table([(title, "GiB"), *lines, ("sum", f"{sum(self.memory.values()) / GIB:,.3f}")])

    def _step_table(self) -> str:
        return _table(
            [
                (f"step of {self.gpus} GPUs ({self.data})" if self.gpus > 1 else f"step ({self.data})", ""),
                ("rows of data", f"{self.rows:,.0f}"),
                ("tokens", f"{self.tokens:,.0f}"),
                ("padding, share of places", f"{100 * self.padding:.1f} %"),
                ("FLOPs", f"{self.flops:.3e}"),
                ("FLOPs recomputed to save memory", f"{self.recomputed:.3e}"),
            ]
        )

    def _run_table(self) -> str:
        return _table(
            [
                ("run", ""),
                ("steps", f"{self.steps:,}"),
                ("tokens", f"{self.steps * self.tokens:.3e}"),
                ("FLOPs", f"{self.steps * self.flops:.3e}"),
                (f"GPU-days at {100 * self.utilisation:g} % of {self.peak_tflops:g} TFLOPS", f"{self.gpu_days:,.3g}"),
                ("days", f"{self.gpu_days / self.gpus:,.3g}"),
            ]
        )


def _table(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def estimate_cost(
    recipe: Recipe, gpus: int = 1, utilisation: float = 0.4, peak_tflops: float = A100_TFLOPS
) -> Estimate:
    """
    Estimate what a recipe costs; nothing is trained.

    Args:
        recipe ([`Recipe`]): What would be run.
        gpus (`int`, defaults to 1): Processes, one a GPU; several divide weights, gradients and states (FSDP2).
        utilisation (`float`, defaults to 0.4): Share of the peak that the model's own operations reach.
        peak_tflops (`float`, defaults to 312.0): Of a GPU, in TFLOPS; an A100's in bfloat16.

    Returns:
        [`Estimate`]

    Raises:
        ValueError: If a number is impossible, the model does not fit the recipe, or models or data are neither here
            nor assumed.

    Example:
        >>> estimate_cost(Recipe.load("paper/stage1"), gpus=64).steps
        48828
    """
    if gpus < 1:
        raise ValueError(f"`gpus` must be 1 or more, got {gpus}.")
    if not 0 < utilisation <= 1:
        raise ValueError(f"`utilisation` is a share above 0 and at most 1, got {utilisation}.")
    if peak_tflops <= 0:
        raise ValueError(f"`peak_tflops` must be above 0, got {peak_tflops}.")
    method = Method.of(recipe, gpus)
    config, model_from = recipe_config(recipe.model, recipe.assume)
    recipe.check_model(config)
    batches, rows, data_from = recipe_batches(recipe, config, method)
    flops = [count_flops(config, step, method) for _, step in batches]
    memories = [estimate_memory(config, step, method) for step in dict.fromkeys(step for _, step in batches)]
    largest = max(memories, key=lambda memory: sum(memory.values()))
    copies = gpus * recipe.training.get("gradient_accumulation_steps", 1)
    shares = [share for share, _ in batches]

    def mean(values: Any) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    per_step = copies * mean(step.examples for _, step in batches)
    tokens, places = mean(s.tokens for _, s in batches), mean(s.rows * s.columns for _, s in batches)
    epochs = recipe.training.get("num_train_epochs")
    if epochs is not None and rows is None:
        raise ValueError("A stream does not say how long an epoch is: set `training.max_steps`.")
    return Estimate(
        model=model_from,
        data=data_from,
        gpus=gpus,
        parameters=count_parameters(config, recipe.model.adapter),
        memory=largest,
        largest=[step for step in dict.fromkeys(s for _, s in batches)][memories.index(largest)],
        tokens=copies * tokens,
        padding=1 - tokens / places,
        flops=copies * mean(one.model for one in flops),
        recomputed=copies * mean(one.recomputed for one in flops),
        rows=per_step,
        steps=recipe.training["max_steps"] if epochs is None else max(int(epochs * rows / per_step), 1),
        utilisation=utilisation,
        peak_tflops=peak_tflops,
    )


@dataclass(frozen=True)
class ImpliedUtilisation:
    """
    Which utilisation the paper's GPU-days imply, if its stages were as the recipes have and assume them.

    Args:
        stages (`dict[str, Estimate]`): By the name of the recipe.
        gpu_days (`float`): That the paper states for all, of an A100.
    """

    stages: dict[str, Estimate]
    gpu_days: float = PAPER_GPU_DAYS

    @property
    def share(self) -> float:
        """Of the peak."""
        return sum(stage.days_at_peak for stage in self.stages.values()) / self.gpu_days

    def to_dict(self) -> dict[str, Any]:
        """Give the days of each stage at the peak, the paper's, and the share that follows."""
        days = {name: stage.days_at_peak for name, stage in self.stages.items()}
        return {"days_at_peak": days, "gpu_days": self.gpu_days, "utilisation": self.share}

    def __str__(self) -> str:
        lines = [
            (
                name,
                f"{stage.steps * stage.rows:.3g}",
                f"{stage.tokens / stage.rows:,.0f}",
                f"{stage.steps * stage.flops:.3g}",
                f"{stage.days_at_peak:,.1f}",
            )
            for name, stage in self.stages.items()
        ]
        return _table(
            [
                ("what the paper's days imply", "rows, all epochs", "tokens a row", "FLOPs", "A100-days at the peak"),
                *lines,
                ("A100-days that the paper states", "", "", "", f"{self.gpu_days:,.1f}"),
                ("utilisation", "", "", "", f"{100 * self.share:.1f} %"),
            ]
        )


def paper_utilisation() -> ImpliedUtilisation:
    """Put the FLOPs of the paper's three stages, as the recipes have and assume them, beside its 587 A100-days."""
    return ImpliedUtilisation({name: estimate_cost(Recipe.load(name)) for name in PAPER_STAGES})


__all__ = [
    "PAPER_STAGES",
    "Estimate",
    "Flops",
    "ImpliedUtilisation",
    "Method",
    "Part",
    "StepShape",
    "count_flops",
    "count_parameters",
    "estimate_cost",
    "estimate_memory",
    "paper_utilisation",
    "recipe_batches",
    "recipe_config",
]
