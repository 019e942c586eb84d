"""
Drawing for an evaluation: a checkpoint with every knob spelled out, true pictures, the VQ-GAN's reconstructions.
"""

from dataclasses import asdict
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.generation import BaseStreamer

from .. import MarsForConditionalGeneration, MarsProcessor
from ..code_order_mars import check_code_order
from ..drawing_mars import GUIDANCE_SCHEDULES
from ..image_processing_mars import to_rgb
from ..super_resolution_mars import Enlarger
from .config import RunConfig
from .pictures import Task
from .prompts import PromptSet

# What `generate` takes where neither the run nor the checkpoint says otherwise.
GENERATE_DEFAULTS: dict[str, Any] = {
    "guidance_scale": 1.0,
    "guidance_schedule": "constant",
    "guidance_interval": [0.0, 1.0],
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
}


class Drawer:
    """
    Draws tasks with a checkpoint and one way of sampling.

    Args:
        model ([`MarsForConditionalGeneration`]): The checkpoint.
        processor ([`MarsProcessor`]): Its processor.
        run ([`RunConfig`]): The way of sampling.
        height (`int`): Of the pictures, in pixels.
        width (`int`): Of the pictures, in pixels.
        enlarger ([`Enlarger`], *optional*): Draws them larger.

    Raises:
        ValueError: If the checkpoint cannot draw so.
    """

    def __init__(
        self,
        model: MarsForConditionalGeneration,
        processor: MarsProcessor,
        run: RunConfig,
        height: int,
        width: int,
        enlarger: Enlarger | None = None,
    ):
        self.enlarger = enlarger
        self.model, self.processor, self.height, self.width = model, processor, height, width
        self.sampling = self._spell_out(run)
        self.negative_prompt = run.negative_prompt
        trained, factor = model.config.trained_codes_per_step, model.config.downsample_factor
        if self.sampling["codes_per_step"] not in trained:
            raise ValueError(
                f"The checkpoint was not trained to draw {self.sampling['codes_per_step']} codes a step, only "
                f"{', '.join(map(str, trained))} (`config.codes_per_step`). Leave it out, or take one of these."
            )
        if model.vqgan is None:
            raise ValueError("The checkpoint has no VQ-GAN (`config.vq_config`): it cannot make pictures of codes.")
        if height % factor or width % factor:
            raise ValueError(f"Height and width must be multiples of {factor}, got {height} and {width}.")
        check_code_order(height // factor, width // factor, self.sampling["codes_per_step"], model.config.code_order)
        if self.sampling["guidance_schedule"] not in GUIDANCE_SCHEDULES:
            raise ValueError(
                f"`guidance_schedule` must be one of {', '.join(GUIDANCE_SCHEDULES)}, got "
                f"{self.sampling['guidance_schedule']!r}."
            )

    def _spell_out(self, run: RunConfig) -> dict[str, Any]:
        """Give every knob its value: the run's, else the checkpoint's, else `generate`'s."""
        own = self.model.generation_config
        asked = asdict(run)
        knobs = ("temperature", "top_k", "top_p", "min_p")
        if asked["do_sample"] is None and any(asked[name] is not None for name in knobs):
            asked["do_sample"] = True  # who asks how to sample, asks to sample
        sources = [asked, getattr(own, "image_defaults", None) or {}, vars(own), GENERATE_DEFAULTS]
        values = {n: next((s[n] for s in sources if s.get(n) is not None), None) for n in GENERATE_DEFAULTS}
        if not values["do_sample"]:  # the likeliest code needs none of them, and the library warns of them
            values |= dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))
        k = self.model.config.trained_codes_per_step[0] if run.codes_per_step is None else run.codes_per_step
        return {**values, "codes_per_step": k, "code_order": self.model.config.code_order}

    def settings(self) -> dict[str, Any]:
        """Say what the pictures depend on, beside prompts and checkpoint."""
        size = {"height": self.height, "width": self.width}
        enlarged = {} if self.enlarger is None else {"super_resolution": self.enlarger.factor}
        common = {"dtype": str(self.model.dtype), "negative_prompt": self.negative_prompt}
        return {**size, **enlarged, **common, **self.sampling}

    def __call__(self, tasks: list[Task]) -> list[Image.Image]:
        """Draw a batch; each picture from its own seed."""
        return self.draw([task.prompt.text for task in tasks], [task.seed for task in tasks])

    def prepare(self, prompts: list[str]) -> BatchFeature:
        """
        Turn prompts into the inputs of `generate`.

        Raises:
            ValueError: If the size or the length of a prompt is out of range.
        """
        size = {"height": self.height, "width": self.width}
        return self.processor(prompts, **size, negative_prompt=self.negative_prompt, return_tensors="pt")

    def draw(self, prompts: list[str], seeds: list[int], streamer: BaseStreamer | None = None) -> list[Image.Image]:
        """
        Draw a picture for each prompt.

        Args:
            prompts (`list[str]`): What to draw, together.
            seeds (`list[int]`): One for each picture, which then does not depend on the others.
            streamer (`BaseStreamer`, *optional*): Hears codes as they come, see [`ImageStreamer`].

        Returns:
            `list[PIL.Image.Image]`: The pictures, or none if the streamer has cancelled the drawing.
        """
        device = self.model.device
        inputs = self.prepare(prompts).to(device)
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        given = {name: value for name, value in self.sampling.items() if value is not None}
        drawn = self.model.generate(
            **inputs, generation_mode="image", generator=generators, streamer=streamer, **given
        )
        if getattr(streamer, "cancelled", False):
            return []
        if self.enlarger is None:
            pixels = self.model.decode_image_tokens(drawn, inputs["image_sizes"])
        else:
            grids = [codes for row in self.model.collect_image_codes(drawn, inputs["image_sizes"]) for codes in row]
            generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
            stops = None if streamer is None else StopsWith(streamer)
            pixels = self.enlarger(prompts, grids, generator=generators, streamer=stops) if grids else []
        return self.processor.post_process_multimodal_output(pixels, generation_mode="image")


class StopsWith(BaseStreamer):
    """
    Hears nothing, and stops a drawing when another streamer is cancelled.

    Args:
        other (`BaseStreamer`): The other one.
    """

    def __init__(self, other: BaseStreamer):
        self.other = other

    @property
    def cancelled(self) -> bool:
        """Whether the other one is."""
        return getattr(self.other, "cancelled", False)

    def put(self, value: torch.Tensor) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""


class References:
    """Gives the true pictures of tasks, cut to the shape of the drawings around their middle and resized."""

    def __init__(self, prompts: PromptSet, height: int, width: int):
        self.prompts, self.size = prompts, (width, height)

    def settings(self) -> dict[str, Any]:
        return {"height": self.size[1], "width": self.size[0], "pictures": "true"}

    def __call__(self, tasks: list[Task]) -> list[Image.Image]:
        true = (to_rgb(self.prompts.reference(task.number)) for task in tasks)
        return [
            one if one.size == self.size else ImageOps.fit(one, self.size, Image.Resampling.BICUBIC) for one in true
        ]


class Reconstructions:
    """Gives what a checkpoint's VQ-GAN makes of the true pictures of tasks: what no drawing can surpass."""

    def __init__(self, model: MarsForConditionalGeneration, processor: MarsProcessor, references: References):
        self.model, self.processor, self.references = model, processor, references

    def settings(self) -> dict[str, Any]:
        return {**self.references.settings(), "dtype": str(self.model.dtype), "pictures": "reconstructed"}

    def __call__(self, tasks: list[Task]) -> list[Image.Image]:
        true = self.references(tasks)
        pixels = self.processor.image_processor(true, do_resize=False, return_tensors="pt")["pixel_values"]
        codes = self.model.encode_image(pixels.to(self.model.device))
        self.processor.image_tokenizer = self.model.vqgan
        return self.processor.decode_images(codes, [list(pixels.shape[2:])] * len(codes))
