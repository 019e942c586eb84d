"""
From a recipe to a trained model: builds what it names, trains, goes on where an interrupted run stopped.

A run's folder holds `run.json` (the recipe and what it was run on), `checkpoint-N`, and at last `final`, a complete
MARS with its processor, or of a recipe with an adapter that adapter with the processor.
"""

import json
import os
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.utils import logging

from ..configuration_mars import MarsConfig
from ..data.records import source_fingerprint, tokenizer_fingerprint
from ..hub import ADAPTER_BASE
from ..image_processing_mars import new_image_processor
from ..modeling_mars import MarsForConditionalGeneration
from ..processing_mars import MarsProcessor
from ..prompts_mars import END_OF_TEXT
from ..weights_mars import weight_files, weights_digest
from .collation import AlignedCollator, PackedCollator
from .mixture import MixtureDataset, MixtureStream, PackedStream, Source
from .muon import muon_with_adamw
from .recipe import ADAPTED_MODULES, AdapterPart, DataPart, ModelPart, Recipe
from .samples import SamplePictures
from .sources import build_source, build_sources, fit_processor, rows_of_an_epoch
from .text import last_checkpoint
from .trainer import WINDOW, MarsTrainer

logger = logging.get_logger(__name__)

OF_NO_RUN = ("recipe.about", "recipe.assume")  # what a run does not read


def build_model(part: ModelPart) -> tuple[MarsForConditionalGeneration, MarsProcessor]:
    """
    Load or build what a recipe trains, in float32.

    Returns:
        `tuple`: The model, its text part frozen, and its processor.
    """
    if part.base is not None:
        model = MarsForConditionalGeneration.from_pretrained(
            part.found_base, dtype=torch.float32, attn_implementation=_attention()
        )
        if getattr(model, "peft_config", None):
            raise ValueError(
                f"`model.base` {part.base} is an adapter: what is trained beyond it would be in no checkpoint. Name "
                "the model that it belongs on."
            )
        processor = MarsProcessor.from_pretrained(part.found_base)
        if part.config:
            model, processor = with_other_config(model, processor, part.config)
    else:
        text = AutoModelForCausalLM.from_pretrained(part.text, dtype=torch.float32, attn_implementation=_attention())
        vqgan = VQModel.from_pretrained(part.vqgan)
        if part.frozen_dtype is not None:
            for weight in chain(text.parameters(), vqgan.parameters()):
                weight.data = weight.data.to(getattr(torch, part.frozen_dtype)).to(torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(part.text)
        end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        model = MarsForConditionalGeneration.from_text_and_vq(text, vqgan, end_of_text_id=end, **part.config)
        image_processor = new_image_processor(model.config, vqgan.config.lookup_from_codebook)
        processor = MarsProcessor.from_text_tokenizer(tokenizer, model.config, image_processor=image_processor)
    if part.image_defaults:
        model.generation_config.image_defaults = part.image_defaults
    return model, processor


def with_other_config(
    base: MarsForConditionalGeneration, processor: MarsProcessor, changes: dict[str, Any]
) -> tuple[MarsForConditionalGeneration, MarsProcessor]:
    """
    Start a model of another kind from a trained one: with more codes a step, another order, or super-resolution.

    Cell embeddings that the base does not have start at zero, so that the function is at first the base's. Those of
    the enlarged small picture (`lowres_embedding`) start as the base's embeddings of the same codes: from zero, it
    would have to be learnt anew which codes are alike.

    Raises:
        ValueError: If the changes ask for other weights than the base has.
    """
    config = MarsConfig.from_dict({**base.config.to_dict(), **changes})
    config._attn_implementation = base.config._attn_implementation
    model = MarsForConditionalGeneration(config)
    fit = model.load_state_dict(base.state_dict(), strict=False)
    odd = fit.unexpected_keys + [name for name in fit.missing_keys if "visual_cell_embedding" not in name]
    if odd:
        raise ValueError(f"`model.config` {changes} asks for other weights than `model.base` has: {', '.join(odd)}.")
    table = "model.visual_cell_embedding.lowres_code"
    if table in fit.missing_keys:
        with torch.no_grad():
            model.get_parameter(table).copy_(model.model.visual_embed_tokens.weight[: config.codebook_size])
    if config.use_visual_expert:
        model.freeze_text()
    model.generation_config = base.generation_config
    fit_processor(processor, config)
    return model.eval(), processor


def with_adapter(model: MarsForConditionalGeneration, part: AdapterPart, base: Path | str | None = None) -> Any:
    """Put the new adapter of a recipe on its base, which it is to find from any folder, and freeze all else."""
    from peft import LoraConfig, get_peft_model

    alpha = 2 * part.r if part.lora_alpha is None else part.lora_alpha
    config = LoraConfig(r=part.r, lora_alpha=alpha, target_modules=ADAPTED_MODULES[part.experts])
    adapted = get_peft_model(model, config)
    if base is not None:
        base = base.absolute() if isinstance(base, Path) else base
        adapted.peft_config["default"].base_model_name_or_path = str(base)
    return adapted


def _attention() -> str:
    """On CPUs torch's fused attention has a slow backward: half of a step at 32-wide heads."""
    return "sdpa" if torch.accelerator.is_available() else "eager"


def is_bfloat16_fast() -> bool:
    """Whether this machine computes in bfloat16 itself: newer GPUs, and CPUs with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def training_arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    """Give Trainer's arguments; bfloat16 where the machine computes it fast, unless the recipe says so itself."""
    batch_size = recipe.training["per_device_train_batch_size"]  # each is of one task
    settings = {
        "per_device_eval_batch_size": batch_size,
        "bf16": is_bfloat16_fast() and not recipe.training.get("fp16", False),
        "save_total_limit": 2,
        "report_to": [],
        "enable_jit_checkpoint": True,
        **recipe.training,
    }
    return TrainingArguments(
        output_dir=str(out),
        learning_rate=recipe.optimizer.learning_rate,
        weight_decay=recipe.optimizer.weight_decay,
        adam_beta2=recipe.optimizer.adam_beta2,
        seed=recipe.seed,
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
        **settings,
    )


def make_trainer(recipe: Recipe, out: Path, compile_pictures: bool = False) -> tuple[MarsTrainer, MarsProcessor]:
    """
    Build all that a recipe names.

    Raises:
        ValueError: If models or data do not fit the recipe.
    """
    model, processor = build_model(recipe.model)
    recipe.check_model(model.config)
    if recipe.model.adapter.r:
        model = with_adapter(model, recipe.model.adapter, recipe.model.found_base)
    args = training_arguments(recipe, out)
    sources = build_sources(recipe, model, processor, args=args)
    data = _training_rows(recipe, model, processor, sources, args)
    eval_data = _evaluation_rows(recipe, model, processor, args)
    if compile_pictures and recipe.packing is not None:
        logger.warning("`--compile` has no effect with `packing`: what is compiled has one picture a row.")
    pad = processor.tokenizer.pad_token_id
    collate = (
        AlignedCollator(model.config, pad)
        if recipe.packing is None
        else PackedCollator(model.config, pad, recipe.packing)
    )
    optimizer: dict[str, Any] = {}
    if recipe.optimizer.name == "muon":
        rates = {
            "muon_learning_rate": recipe.optimizer.muon_learning_rate,
            "learning_rate": recipe.optimizer.learning_rate,
            "weight_decay": recipe.optimizer.weight_decay,
            "adam_beta2": recipe.optimizer.adam_beta2,
        }
        optimizer["optimizer_cls_and_kwargs"] = (lambda: muon_with_adamw, rates)
    trainer = MarsTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=eval_data,
        data_collator=collate,
        loss_scope=recipe.loss_scope,
        label_spread=recipe.loss.label_spread,
        chunk_size=recipe.loss.chunk_size,
        compile_pictures=compile_pictures,
        **optimizer,
    )
    looks = recipe.evaluation
    if looks.prompts:
        trainer.add_callback(SamplePictures(processor, looks.prompts, looks.height, looks.width, recipe.seed))
    return trainer, processor


def _training_rows(
    recipe: Recipe,
    model: MarsForConditionalGeneration,
    processor: MarsProcessor,
    sources: list[Source],
    args: TrainingArguments,
) -> MixtureDataset | MixtureStream | PackedStream:
    """Give the rows, or packs of them, of a whole run, and tell `args` how many steps that is: they never repeat."""
    batch, per_step = args.per_device_train_batch_size, args.world_size * args.gradient_accumulation_steps
    options = {"codes_per_step": recipe.trained_codes_per_step, "batches_per_step": per_step, "seed": recipe.seed}
    stream: Any = MixtureStream(processor, sources, batch, **options)
    if recipe.packing is not None:
        stream = PackedStream(stream, model.config, recipe.packing)
    if args.max_steps < 0:
        rows = rows_of_an_epoch(sources)
        if rows is None:
            raise ValueError("A stream does not say how long an epoch is: set `training.max_steps`.")
        of_a_step = batch * per_step * (1 if recipe.packing is None else stream.rows_of_a_pack())
        args.max_steps = max(int(args.num_train_epochs * rows / of_a_step), 1)
        if recipe.packing is not None:  # none of a later epoch among them
            stream.window = min(stream.window, max(int(args.num_train_epochs * rows), 1))
    _check_schedule(args)
    num_batches = args.max_steps * per_step
    # Streams end with the run, so that a run that has made all its steps is not begun anew.
    if recipe.packing is not None:
        stream.num_packs = num_batches * batch
    elif any(source.is_stream for source in sources):
        stream.num_batches = num_batches
    else:
        return MixtureDataset(processor, sources, batch, num_batches, **options)
    return stream


def _check_schedule(args: TrainingArguments) -> None:
    """Refuse phases that do not fit the run: the library's rate would jump, not decay from where it is."""
    warmup = args.get_warmup_steps(args.max_steps)
    phases = {name: (args.lr_scheduler_kwargs or {}).get(f"num_{name}_steps") or 0 for name in ("stable", "decay")}
    if warmup + sum(phases.values()) > args.max_steps:
        raise ValueError(
            f"The run has {args.max_steps} steps, fewer than its schedule: {warmup} of warm-up, {phases['stable']} "
            f"stable, {phases['decay']} of decay. Change `training.warmup_steps` or `training.lr_scheduler_kwargs`."
        )


def _evaluation_rows(
    recipe: Recipe, model: MarsForConditionalGeneration, processor: MarsProcessor, args: TrainingArguments
) -> MixtureStream | PackedStream | None:
    looks = recipe.evaluation
    if looks.split is None:
        return None
    sources = build_sources(recipe, model, processor, looks.split, args)
    options = {"codes_per_step": recipe.trained_codes_per_step, "seed": recipe.seed}
    rows = MixtureStream(processor, sources, args.per_device_eval_batch_size, looks.num_batches, **options)
    return rows if recipe.packing is None else PackedStream(rows, model.config, recipe.packing)


def check_resumption(
    recipe: Recipe, out: Path, facts: dict[str, Any], allow_changes: bool = False, writes: bool = True
) -> None:
    """
    Refuse to go on with a run under another recipe, number of processes or data; write what this run is.

    A run that has no checkpoint is not gone on with: its recipe can be mended in the same folder.

    Args:
        recipe ([`Recipe`]): Of this run.
        out (`Path`): Folder of the run.
        facts (`dict`): What else has to stay the same.
        allow_changes (`bool`, defaults to `False`): Go on all the same.
        writes (`bool`, defaults to `True`): Whether this is the process that writes.

    Raises:
        ValueError: Naming what differs.
    """
    file, now = out / "run.json", json.loads(json.dumps({"recipe": recipe.to_dict(), **facts}))
    if file.exists() and last_checkpoint(out) and not allow_changes:
        before = _with_defaults(json.loads(file.read_text(encoding="utf-8")))
        flat_before, flat_now = _flat(before), _flat(now)
        changed = sorted(
            key
            for key in flat_before.keys() | flat_now.keys()
            if flat_before.get(key) != flat_now.get(key) and not key.startswith(OF_NO_RUN)
        )
        if changed:
            raise ValueError(
                f"{out} holds a run with another `{changed[0]}`: {flat_before.get(changed[0])!r} before, now "
                f"{flat_now.get(changed[0])!r} ({len(changed)} differ). Take another folder, or `--allow-changes`."
            )
    if writes:
        out.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(".part")
        scratch.write_text(json.dumps(now, indent=2, ensure_ascii=False), encoding="utf-8")
        os.replace(scratch, file)


def _with_defaults(before: dict[str, Any]) -> dict[str, Any]:
    """Fill in what recipes have come to say since a run began; it had the default."""
    try:
        return before | {"recipe": json.loads(json.dumps(Recipe.from_dict(before["recipe"]).to_dict()))}
    except ValueError:  # the recipe of a version that knew other keys: they are named as what differs
        return before


def _flat(values: Any, place: str = "") -> dict[str, Any]:
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if pairs is None:
        return {place: values}
    return {key: one for name, value in pairs for key, one in _flat(value, f"{place}.{name}".strip(".")).items()}


def train(recipe: Recipe, out: str | Path, compile_pictures: bool = False, allow_changes: bool = False) -> Path:
    """
    Train by a recipe; run again after an interruption, it continues from the last complete checkpoint.

    Args:
        recipe ([`Recipe`]): What to do.
        out (`str` or `Path`): Folder of the run.
        compile_pictures (`bool`, defaults to `False`): See [`MarsTrainer`]; takes a C++ compiler.
        allow_changes (`bool`, defaults to `False`): Go on with a run although recipe, data or processes differ.

    Returns:
        `Path`: Folder of the finished model, or of a recipe's adapter, and its processor; `out` if SIGTERM stopped
        the run.

    Raises:
        ValueError: If models, data or the run in `out` do not fit the recipe.
    """
    out = Path(out)
    torch.set_flush_denormal(True)
    torch.manual_seed(recipe.seed)
    trainer, processor = make_trainer(recipe, out, compile_pictures)
    model, sources = trainer.model, _mixture_of(trainer).sources
    facts = {
        "processes": trainer.args.world_size,
        "data": [_data_facts(part, source) for part, source in zip(recipe.data, sources, strict=True)],
        "tokenizer": None if model.vqgan is None else tokenizer_fingerprint(model.vqgan),
    }
    if recipe.model.adapter.r:  # whose checkpoints do not hold what it is on
        facts["base"] = weights_digest(weight_files(recipe.model.found_base))
    check_resumption(recipe, out, facts, allow_changes, writes=trainer.args.should_save)
    checkpoint = last_checkpoint(out)
    if checkpoint and isinstance(trainer.train_dataset, PackedStream) and not allow_changes:
        window = Path(checkpoint) / WINDOW
        trainer.train_dataset.begin = tuple(json.loads(window.read_text())) if window.exists() else (0, 0)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < trainer.state.max_steps:
        logger.warning(f"Stopped at step {trainer.state.global_step}, with a checkpoint: the same line goes on.")
        return out
    model.config.use_cache = model.config.text_config.use_cache = True  # Trainer turned it off
    return _save_final(trainer, processor, out / "final", facts.get("base"))


def _save_final(trainer: MarsTrainer, processor: MarsProcessor, final: Path, base: str | None) -> Path:
    """Save what was trained, whole, in place of what an earlier run may have left there."""
    scratch = final.with_suffix(".part")
    if trainer.args.should_save:
        shutil.rmtree(scratch, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_fsdp_enabled:  # whose checkpoints may be in pieces, of which the Trainer would save nothing here
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(scratch))
    if trainer.args.should_save:
        if not any(scratch.glob("*.safetensors")):
            raise RuntimeError(
                f"No whole weights were saved in {scratch}: they are in pieces, in the last checkpoint. Under "
                "DeepSpeed set `zero3_save_16bit_model: true`, and start the same run again."
            )
        processor.save_pretrained(scratch)
        if base is not None:
            (scratch / ADAPTER_BASE).write_text(json.dumps({"sha256": base}), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        scratch.rename(final)
    trainer.accelerator.wait_for_everyone()
    return final


def _data_facts(part: DataPart, source: Source) -> dict[str, Any]:
    num_records = None if source.is_stream else len(source.records)
    return {"records": num_records, "sha256": source_fingerprint(part.source, part.split)}


def _mixture_of(trainer: MarsTrainer) -> MixtureDataset | MixtureStream:
    return getattr(trainer.train_dataset, "rows", trainer.train_dataset)


__all__ = ["build_model", "build_source", "make_trainer", "train", "training_arguments"]
