"""
`MarsTrainer`: transformers' `Trainer` with what it lacks for MARS, and nothing else.

The loss is computed from hidden states (see `losses.py`). Where the visual part alone trains, prompts in front of the
first picture have no trainable part, so they run without gradient, as a dense call whose keys and values the rest of
the row attends to. This is the plain forward, exactly. Where the rest is one picture a row, it has one shape for all
batches and can be compiled.
"""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch.utils.data import Sampler, SequentialSampler
from transformers import DynamicCache, Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..modeling_mars import MarsForConditionalGeneration, is_visual_parameter
from .losses import HeadLoss, LossTerms, neighbouring_codes
from .muon import ChainedOptimizer

logger = logging.get_logger(__name__)

TERMS = ("loss", "code", "text", "gate", "num_codes", "num_words")
WINDOW = "window.json"  # in a checkpoint: where a packed stream begins that goes on from it
CODES = "codes"  # under which the counts of codes are noted, beside the tasks


class MarsTrainer(Trainer):
    """
    Trains the visual part of a MARS on batches of [`AlignedCollator`] or [`PackedCollator`].

    Each optimizer step is the mean over the labels of all its batches, whatever the accumulation. Logged beside
    Trainer's own, over all processes: the loss of each task and its terms, and of the labels the share of codes in use
    and their perplexity. The training data are read in their order: those of a recipe shuffle themselves, and batches
    are of one task.

    Args:
        loss_scope (`str`, defaults to `"joint"`):
            What competes for a label: `"joint"`, all ids as in the paper, or `"grammar"`, what decoding admits.
        label_spread (`float`, defaults to 0.0): Width of [`neighbouring_codes`]; 0 labels each code alone.
        chunk_size (`int`, defaults to 2048): See [`HeadLoss`].
        prompts_without_gradient (`bool`, defaults to `True`):
            Run prompts as above. Left out by itself where more than the visual part trains, such as a LoRA on the
            language model; on several processes, which must make the same calls; and under gradient checkpointing,
            which keeps no keys and values.
        compile_pictures (`bool`, defaults to `False`): Compile what follows the prompts where pictures are drawn.

    Raises:
        ValueError: If the loss scope is unknown, if `label_spread` has no codebook to go by, if an adapter would not
            save all that trains, if Muon's matrices are sharded, or an argument of the Trainer would have no effect.
    """

    def __init__(
        self,
        *args: Any,
        loss_scope: str = "joint",
        label_spread: float = 0.0,
        chunk_size: int = 2048,
        prompts_without_gradient: bool = True,
        compile_pictures: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            logger.warning(
                f"One of {self.args.n_gpu} accelerators is used: torch's DataParallel would cut batches that belong "
                "together. Start the run with `accelerate launch` to use all of them."
            )
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size
        mars = self._mars()
        if label_spread and mars.vqgan is None:
            raise ValueError(
                f"`label_spread={label_spread}` shares labels among codes that are near in the VQ-GAN's codebook, and "
                "this model has no VQ-GAN. Train from a checkpoint with one, or set `label_spread` to 0."
            )
        ignored = {"compute_metrics": self.compute_metrics, "compute_loss_func": self.compute_loss_func}
        ignored["label_smoothing_factor"] = self.args.label_smoothing_factor or None
        if given := [name for name, value in ignored.items() if value is not None]:
            raise ValueError(f"`{given[0]}` has no effect: the loss is computed without whole logits. Leave it out.")
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        _refuse_what_an_adapter_does_not_save(self.model, trained)
        spread = neighbouring_codes(mars.vqgan.quantize.embedding.weight, label_spread) if label_spread else None
        self.head_loss = HeadLoss(loss_scope, spread, chunk_size, agree=self._most if self._is_sharded() else None)
        self.picture_loss = HeadLoss(loss_scope, spread, chunk_size, all_codes=True)
        self.model_accepts_loss_kwargs = True  # the labels of a step are counted over all its batches
        self.prompts_without_gradient = (
            prompts_without_gradient
            and self.args.world_size == 1
            and not (self.args.gradient_checkpointing or mars.is_activation_checkpointing)
            and all(map(is_visual_parameter, trained))
        )
        if compile_pictures and not self.prompts_without_gradient:
            logger.warning(
                "`compile_pictures` has no effect here: what is compiled runs where the visual part alone trains, in "
                "one process and without gradient checkpointing."
            )
        self._pictures = torch.compile(_picture_terms) if compile_pictures else _picture_terms
        self._notes: dict[str, torch.Tensor] = {}
        self._last_batch: dict[str, Any] = {}
        self._window: tuple[int, int] | None = None
        self.add_callback(FrozenCheck(self.model))
        if self.args.enable_jit_checkpoint:
            self.add_callback(StopTogether(self.pop_callback(JITCheckpointCallback)))

    def _mars(self) -> MarsForConditionalGeneration:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _is_sharded(self) -> bool:
        zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        return zero3 or self.is_fsdp_enabled

    def _most(self, count: int) -> int:
        """Give the largest of the ranks' counts: a sharded head waits in each call until all ranks make it."""
        largest = torch.tensor(count, device=self.args.device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest)

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.accelerator_config.dispatch_batches is None:
            # Rows that come one after the other are read by every process, which keeps its own: accelerate's other
            # way cuts batches up, and ours hold more than tensors of one length.
            self.args.accelerator_config.dispatch_batches = False
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # accelerate rounds what the model returns, which here are sums of losses, and gradients where they are
            # added up.
            exact = {"reduce_dtype": torch.float32, "output_dtype": None}
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **exact)
        if plugin is not None and self.args.accelerator_config.gradient_accumulation_kwargs is None:
            # Else each process keeps whole gradients until the last batch of a step.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # the data set shuffles itself

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Refuse Muon where each process has a piece of a matrix; else as the Trainer."""
        optimizer = super().create_optimizer(model)
        if isinstance(optimizer, ChainedOptimizer) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "Muon orthogonalises whole matrices, and FSDP and DeepSpeed leave each process a piece of them. Take "
                "AdamW (`optimizer.name: adamw` in a recipe), or replicate the model on all processes."
            )
        return optimizer

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if "embed" not in name]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        task, labels = inputs.pop("task"), inputs.pop("labels")
        window = inputs.pop("window", None)
        if model.training:
            self._window = window
        prompt_length, num_drawn = inputs.pop("prompt_length", 0), inputs.pop("num_drawn", 0)
        if self.prompts_without_gradient and prompt_length:
            terms = self._terms_behind_prompts(model, inputs, prompt_length, num_drawn)
        else:
            terms = model(**inputs, head_loss=self.head_loss)
        self._note(task, terms, labels)
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = terms.loss / torch.as_tensor(count, device=terms.loss.device).clamp_min(1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, terms) if return_outputs else loss

    def _terms_behind_prompts(
        self, model: torch.nn.Module, inputs: dict[str, Any], prompt_length: int, num_drawn: int
    ) -> LossTerms:
        mask, cells = inputs["attention_mask"], inputs.get("cells")
        with self.accelerator.autocast():  # accelerate wraps the model's forward; these calls go past it
            prefix = prompt_states(self._mars(), inputs["input_ids"][:, :prompt_length], mask[:, :prompt_length])
        rest = {name: inputs[name][:, prompt_length:] for name in ("input_ids", "position_ids", "shift_labels")}
        rest |= {"attention_mask": mask, "block_ids": inputs.get("block_ids")}
        rest["cells"] = None if cells is None else cells[:, prompt_length:]
        if num_drawn:
            rest["shift_labels"] = rest["shift_labels"][:, -num_drawn:]
            with self.accelerator.autocast():
                return self._pictures(self._mars(), prefix, rest, self.picture_loss)
        return model(**rest, past_key_values=DynamicCache(prefix), head_loss=self.head_loss, use_cache=True)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss, self._last_batch = super().training_step(model, inputs, num_items_in_batch), inputs
        if not torch.isfinite(loss):
            self._stop(f"The loss is {loss.item()}")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # In float16 the scaler leaves out such a step by itself.
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norm):
            self._stop(f"The norm of the gradients is {float(norm)}")
        return norm

    def _stop(self, what: str) -> NoReturn:
        """End the run before the weights change, with the last batch saved."""
        step = self.state.global_step
        path = Path(self.args.output_dir) / f"bad-batch-{step}-{self.args.process_index}.safetensors"
        batch = self._last_batch
        tensors = {name: value.contiguous() for name, value in batch.items() if isinstance(value, torch.Tensor)}
        tensors.pop("shift_labels", None)  # the same memory as `labels`
        save_file(tensors, path)
        raise FloatingPointError(
            f"{what} in step {step} on {batch.get('task')}. The batch is in {path}; the last checkpoint is untouched. "
            "Lower the learning rate, or look at the batch."
        )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._window is not None and self.args.should_save:
            (Path(output_dir) / WINDOW).write_text(json.dumps(self._window), encoding="utf-8")
        # The Trainer's state comes next, and says that a checkpoint is complete: of the other processes, too.
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _note(self, task: str, terms: LossTerms, labels: torch.Tensor) -> None:
        """Add a batch up for the next log, on the device."""
        kind = task if self.model.training else f"eval_{task}"
        exact = torch.float32 if terms.loss.device.type == "mps" else torch.float64
        self._add(kind, torch.stack([getattr(terms, name).detach().to(exact) for name in TERMS]))
        if self.model.training:
            config = self._mars().config
            codes = labels[(labels >= config.image_token_offset) & (labels < config.image_start_token_id)]
            self._add(CODES, torch.bincount(codes - config.image_token_offset, minlength=config.codebook_size))

    def _add(self, kind: str, values: torch.Tensor) -> None:
        self._notes[kind] = self._notes[kind] + values if kind in self._notes else values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the losses of tasks and the statistics of codes since the last log; on every process, or on none."""
        ended = [name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")]
        prefix = next((name for name in ended if name != "train"), None)  # of an evaluation: `eval`, `eval_NAME`, ..
        found = self._task_logs(prefix is not None)
        logs |= {name if prefix is None else name.replace("eval", prefix, 1): value for name, value in found.items()}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._notes = {kind: values for kind, values in self._notes.items() if not kind.startswith("eval_")}
        return super().evaluation_loop(*args, **kwargs)

    def _take_notes(self, is_evaluation: bool) -> dict[str, torch.Tensor]:
        """Add up what all processes have noted: the tasks of their batches need not be the same."""
        kinds = [kind for kind in self._notes if kind.startswith("eval_") == is_evaluation]
        total: dict[str, torch.Tensor] = {}
        for notes in gather_object([{kind: self._notes.pop(kind).cpu() for kind in kinds}]):
            for kind, values in notes.items():
                total[kind] = total[kind] + values if kind in total else values
        return total

    def _task_logs(self, is_evaluation: bool) -> dict[str, float]:
        logs: dict[str, float] = {}
        notes = self._take_notes(is_evaluation)
        counts = notes.pop(CODES, None)
        for kind, values in sorted(notes.items()):
            sums = dict(zip(TERMS, values.tolist(), strict=True))
            count = max(sums["num_codes"] + sums["num_words"], 1)
            logs[f"{kind}/loss"] = sums["loss"] / count
            for term, number in (("code", "num_codes"), ("text", "num_words")):
                if sums[number]:
                    logs[f"{kind}/{term}"] = sums[term] / sums[number]
            if sums["gate"]:
                logs[f"{kind}/gate"] = sums["gate"] / count
        if counts is not None and counts.any():
            shares = counts.double() / counts.sum()
            logs["codes/used"] = float((shares > 0).double().mean())
            logs["codes/perplexity"] = float(torch.special.entr(shares).sum().exp())
        return {name: round(value, 4) for name, value in logs.items()}


def _refuse_what_an_adapter_does_not_save(model: torch.nn.Module, trained: list[str]) -> None:
    """Checkpoints of an adapted model hold the adapter alone: whatever else trains would be lost."""
    if not hasattr(model, "get_base_model"):
        if getattr(model, "peft_config", None):
            raise ValueError(
                "The model has an adapter of `load_adapter` or `add_adapter`, which the Trainer does not resume. Make "
                "it a PEFT model: `PeftModel.from_pretrained(base, folder, is_trainable=True)` or `get_peft_model`."
            )
        return
    from peft import get_peft_model_state_dict

    saved = {
        tensor.data_ptr()
        for name in model.peft_config  # type: ignore[union-attr]
        for tensor in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).values()
    }
    lost = [name for name in trained if model.get_parameter(name).data_ptr() not in saved]
    if lost:
        raise ValueError(
            f"{len(lost)} trainable parameters are no part of the adapter and would be in no checkpoint, {lost[0]} "
            "first. Name their modules under `modules_to_save` of the adapter's configuration, or freeze them."
        )


class StopTogether(JITCheckpointCallback):
    """
    transformers' checkpoint on SIGTERM, with a step that all processes agree on.

    There each process saves where its own timer finds it, and those that save wait for ever for those that train.
    Here the step is ended by all if any was told to, and the Trainer saves as it always does: once, also where a
    checkpoint was due.

    Args:
        found ([`JITCheckpointCallback`]): The one of the Trainer, whose signal handler is kept.
    """

    def __init__(self, found: JITCheckpointCallback):
        self.trainer, self.jit_manager = found.trainer, found.jit_manager

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Go on: what is asked for here is done at the end of the step."""

    on_step_begin = on_epoch_end = on_pre_optimizer_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.jit_manager.is_checkpoint_requested:
            self.trainer.accelerator.set_trigger()
        if self.trainer.accelerator.check_trigger():
            self.jit_manager.is_checkpoint_requested = False
            control.should_save = control.should_training_stop = True


class FrozenCheck(TrainerCallback):
    """
    Holds the promise of the frozen part: its weights are the same at the end of a run as before its start, and so are
    those of a checkpoint that it goes on from.

    Args:
        model (`torch.nn.Module`): As it is built, before a checkpoint is read.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._hashes = frozen_hashes(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if any(map(_is_sharded, model.parameters())):
            self._hashes = frozen_hashes(model)  # each process's share from here on
        else:
            self._compare(model, "the checkpoint differs from the model that the run began with")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._compare(model, "training changed them")

    def _compare(self, model: torch.nn.Module, how: str) -> None:
        now = frozen_hashes(model)
        changed = sorted(name for name in self._hashes if now.get(name) != self._hashes[name])
        if changed:
            raise RuntimeError(f"{len(changed)} frozen weights changed, {changed[0]} first: {how}.")


def _is_sharded(parameter: torch.nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor") or hasattr(parameter, "to_local")


def frozen_hashes(model: torch.nn.Module) -> dict[str, str]:
    """Hash every frozen parameter of a model; of a sharded one, this process's share."""
    hashes = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            local = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed's ZeRO-3 leaves the parameter empty
            local = local.to_local() if hasattr(local, "to_local") else local
            raw = local.detach().cpu().contiguous().view(torch.uint8).numpy()
            hashes[name] = hashlib.sha256(raw.tobytes()).hexdigest()
    return hashes


@torch.no_grad()
def prompt_states(model: MarsForConditionalGeneration, prompts: torch.Tensor, mask: torch.Tensor) -> list[tuple]:
    """Give each layer's keys and values of left-padded prompts `(batch, seq)`; nothing in them is trained."""
    cache = DynamicCache(config=model.config)
    model.model(
        prompts,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        past_key_values=cache,
        modality="text",
        use_cache=True,
    )
    return [(layer.keys, layer.values) for layer in cache.layers]


def _picture_terms(
    model: MarsForConditionalGeneration, prefix: list[tuple], rest: dict[str, Any], head_loss: HeadLoss
) -> LossTerms:
    return model(**rest, past_key_values=DynamicCache(prefix), modality="image", use_cache=True, head_loss=head_loss)


__all__ = ["WINDOW", "FrozenCheck", "MarsTrainer", "StopTogether", "frozen_hashes", "prompt_states"]
