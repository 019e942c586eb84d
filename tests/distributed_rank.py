"""
One rank of a run that `test_distributed.py` starts: FOLDER, then how it is spread: alone, ddp, fsdp or zero3; with
"packs" in front, on packs of rows that come one after the other; with "stopped", the last rank is told to stop; with
"rounded", in bfloat16 and with gradient checkpointing, as on GPUs; with "accumulated", in steps of twice as many
batches; with "broken", where the last rank's loss is no number in its 17th step; with "muon" or "adamw", as the recipe
of that name in FOLDER says.

accelerate shards on accelerators only; that CPU ranks may be sharded too is all that is told to it here.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_jit_checkpoint import CheckpointManager

from mars_hf import MarsConfig, MarsForConditionalGeneration, MarsProcessor
from mars_hf.training.collation import AlignedCollator, PackedCollator
from mars_hf.training.mixture import MixtureDataset, MixtureStream, PackedStream, Source
from mars_hf.training.recipe import Recipe
from mars_hf.training.run import train
from mars_hf.training.text import last_checkpoint
from mars_hf.training.trainer import MarsTrainer

FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["MarsDecoderLayer"],
    "state_dict_type": "FULL_STATE_DICT",
    "cpu_ram_efficient_loading": False,
}


ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,  # small weights are gathered too, in each call of their module
    },
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
}


def let_cpu_ranks_be_sharded() -> None:
    """Say that several CPU ranks are what several GPUs are."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    original = PartialState.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = patched


class Rows(MixtureDataset):
    """A mixture in which every seventh batch is text alone, so that one rank of a step has no visual token."""

    def __getitem__(self, index: int) -> dict:
        row = super().__getitem__(index)
        if index // self.batch_size % 7 == 3:
            words = [3, 4, 5, 6 + index % 4]
            return {"input_ids": words, "labels": words, "image_sizes": [], "task": "text"}
        return row


def sources_of() -> list[Source]:
    """Pictures of several sizes, captions and documents of several lengths."""
    rng = torch.Generator().manual_seed(0)
    records = []
    for number in range(8):
        height, width = [(12, 8), (16, 16), (8, 24)][number % 3]
        codes = torch.randint(0, 40, (height * width // 16,), generator=rng).tolist()
        records.append({"image_codes": codes, "height": height, "width": width, "caption": "abcdefgh"[: number + 1]})
    stories = [{"segments": ["one\n", record, "two\n", records[number - 1]]} for number, record in enumerate(records)]
    return [
        Source("text-to-image", 0.5, records, lambda record, rng: record["caption"], code_noise=0.5),
        Source("captioning", 0.25, records, lambda record, rng: record["caption"]),
        Source("documents", 0.25, stories),
    ]


def data_of(processor: MarsProcessor, config: MarsConfig, packed: bool, per_step: int) -> tuple:
    """Give rows or packs of the same rows, and what collates them."""
    pad, options = processor.tokenizer.pad_token_id, {"batch_size": 2, "batches_per_step": per_step}
    if packed:
        stream = MixtureStream(processor, sources_of(), codes_per_step=(1, 2), **options)
        return PackedStream(stream, config, 64, window=16), PackedCollator(config, pad, 64)
    return Rows(processor, sources_of(), num_batches=30 * per_step, **options), AlignedCollator(config, pad)


class TerminateLastRank(TrainerCallback):
    """SIGTERM for one process of all, after its fifth step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def spoil_last_rank(trainer: MarsTrainer) -> None:
    """Make the last rank's loss no number in step 17; the others learn of it from the gradients."""
    compute = trainer.compute_loss

    def spoiled(*args, **kwargs):
        is_due = trainer.state.global_step == 16 and trainer.args.process_index == trainer.args.world_size - 1
        return compute(*args, **kwargs) * (torch.nan if is_due else 1)

    trainer.compute_loss = spoiled


def note_sharded_gradients(trainer: MarsTrainer) -> list[bool]:
    """Note after each batch but the last of a step whether gradients are where the optimizer takes them from."""
    step, found = trainer.training_step, []

    def noted(model, *args):
        loss = step(model, *args)
        if not trainer.accelerator.sync_gradients:
            found.append(any(parameter.grad is not None for parameter in model.parameters()))
        return loss

    trainer.training_step = noted
    return found


def train_by_recipe(folder: Path, optimizer: str, spread: str) -> None:
    """Train as users do; alone, a step takes the batches of two ranks."""
    recipe = Recipe.load(folder / f"{optimizer}.yaml")
    recipe.training["gradient_accumulation_steps"] = 2 if spread == "alone" else 1
    if spread == "fsdp":
        recipe.training |= {"fsdp": True, "fsdp_config": FSDP | {"state_dict_type": "SHARDED_STATE_DICT"}}
    train(recipe, folder / f"{optimizer}-{spread}")


def main(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    CheckpointManager.__init__.__defaults__ = (0,)  # SIGTERM is obeyed at once, not after 3 s
    kind, _, spread = name.rpartition("-")
    if spread == "fsdp":
        let_cpu_ranks_be_sharded()
    if kind in ("muon", "adamw", "lora", "enlarge"):
        train_by_recipe(folder, kind, spread)
        return
    per_step = 4 if kind == "accumulated" else 2  # batches, of all ranks
    args = TrainingArguments(  # before the model: DeepSpeed's is told to the library here
        str(folder / name),
        max_steps=30,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=per_step if spread == "alone" else per_step // 2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps={"rounded": 15, "broken": 1}.get(kind, 30),
        enable_jit_checkpoint=True,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        fsdp=spread == "fsdp",
        fsdp_config=FSDP if spread == "fsdp" else None,
        deepspeed=ZERO3 if spread == "zero3" else None,
        bf16=kind == "rounded",
        gradient_checkpointing=kind == "rounded",
    )
    model = MarsForConditionalGeneration.from_pretrained(folder / "start")
    processor = MarsProcessor.from_pretrained(folder / "start")
    data, collate = data_of(processor, model.config, kind == "packs", per_step)
    callbacks = [TerminateLastRank()] if kind == "stopped" else []
    trainer = MarsTrainer(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=collate,
        callbacks=callbacks,
        chunk_size=4,  # ranks have other numbers of chunks
    )
    dtypes, note = set(), trainer._note
    trainer._note = lambda task, terms, labels: (dtypes.add(str(terms.loss.dtype)), note(task, terms, labels))
    if kind == "broken":
        spoil_last_rank(trainer)
    gradients = note_sharded_gradients(trainer)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / name))
    (folder / f"{name}-{args.process_index}.step").write_text(str(trainer.state.global_step))
    kinds = {type(parameter).__name__ for parameter in trainer.model_wrapped.parameters()}
    if args.process_index == 0:
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        facts = {"logs": entries, "parameters": sorted(kinds), "processes": args.world_size}
        facts["has_gradients_between"] = all(gradients)
        facts["dtypes"] = sorted(dtypes)  # of the sums of losses that the model returns
        (folder / f"{name}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
