"""Pictures of fixed prompts in the course of a run: what the loss does not show."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..contact_sheet import contact_sheet
from ..processing_mars import MarsProcessor

logger = logging.get_logger(__name__)


class SamplePictures(TrainerCallback):
    """
    Draws the same prompts with the same seed at each evaluation, and writes `samples/step-N.png` in the run's folder.

    Weights that are sharded over processes cannot draw; replicated ones draw on the first process.

    Args:
        processor ([`MarsProcessor`]): Writes the prompts.
        prompts (`list[str]`): At least one.
        height (`int`, *optional*): In pixels. Defaults to the model's `config.default_image_size`.
        width (`int`, *optional*): In pixels.
        seed (`int`, defaults to 0): Of the sampler.
    """

    def __init__(
        self,
        processor: MarsProcessor,
        prompts: Sequence[str],
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
    ):
        self.processor, self.prompts, self.size, self.seed = processor, list(prompts), (height, width), seed

    def on_evaluate(self, args, state, control, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or model is None:
            return
        mars = getattr(model, "module", model)
        mars = mars.get_base_model() if hasattr(mars, "get_base_model") else mars
        if any(hasattr(parameter, "to_local") or parameter.numel() == 0 for parameter in mars.parameters()):
            logger.warning_once("Weights are sharded over processes: sample pictures are left out.")
            return
        path = Path(args.output_dir) / "samples" / f"step-{state.global_step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".part")
        self._sheet(mars).save(scratch, "PNG")
        os.replace(scratch, path)

    def _sheet(self, mars: Any) -> Any:
        was_training = mars.training
        mars.eval()
        side = mars.config.default_image_size
        height, width = (side if one is None else one for one in self.size)
        inputs = self.processor(self.prompts, height=height, width=width).to(mars.device)
        generator = torch.Generator(mars.device).manual_seed(self.seed)
        drawn = mars.generate(**inputs, generation_mode="image", generator=generator, use_cache=True)
        pixels = mars.decode_image_tokens(drawn, inputs["image_sizes"])
        mars.train(was_training)
        pictures = self.processor.post_process_multimodal_output(pixels, generation_mode="image")
        return contact_sheet(pictures, self.prompts)


__all__ = ["SamplePictures"]
