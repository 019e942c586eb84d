"""
The `"text-to-image"` pipeline of MARS: prompts as strings in, pictures out.

The processor writes the text and makes pictures of pixels, `generate` draws; what is left here is to sort the
arguments to them and to give each prompt its own pictures back.
"""

from typing import Any

import torch
from PIL import Image
from transformers.pipelines import Pipeline

# What the pipeline hands on to `generate` under its own name; the rest goes through `generate_kwargs`.
_GENERATE_ARGUMENTS = ("guidance_scale", "do_sample", "temperature", "top_k", "top_p", "seed", "generator")


class MarsPipeline(Pipeline):
    r"""
    Draw pictures for prompts, task `"text-to-image"`.

    One prompt gives a list of `num_images_per_prompt` dictionaries `{"generated_image": PIL.Image.Image}`, a list of
    prompts a list of such lists.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("text-to-image", model="mars-emoji", trust_remote_code=True)
    >>> picture = pipe("a red apple", height=64, width=64, guidance_scale=3.0)[0]["generated_image"]
    ```
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = True

    def __call__(self, inputs: str | list[str], **kwargs: Any) -> Any:
        r"""
        Draw pictures.

        Args:
            inputs (`str` or `list[str]`):
                One or several prompts. A generator or a `Dataset` of prompts is drawn as it is read.
            height (`int`, *optional*):
                Height of the pictures in pixels. Defaults to the model's `config.default_image_size`.
            width (`int`, *optional*):
                Width of the pictures in pixels. Defaults to the model's `config.default_image_size`.
            negative_prompt (`str`, *optional*):
                What guidance leads away from. `None` leads away from a picture without a caption.
            num_images_per_prompt (`int`, *optional*):
                Number of pictures for each prompt, 1 if not given.
            guidance_scale (`float`, *optional*):
                Strength of guidance; 1 is none. Like all arguments of `generate` that follow, it defaults to the
                checkpoint's generation config.
            do_sample (`bool`, *optional*):
                Whether to draw codes at random; `False` takes the likeliest.
            temperature (`float`, *optional*):
                Divisor of the logits.
            top_k (`int`, *optional*):
                Number of likeliest codes to choose from.
            top_p (`float`, *optional*):
                Probability mass of the likeliest codes to choose from.
            seed (`int`, *optional*):
                Seed of the choice. Each batch starts from it, so that with the default `batch_size=1` a prompt gives
                the same pictures alone and in a list.
            generator (`torch.Generator`, *optional*):
                Source of chance that goes on from one prompt to the next; takes the place of `seed`.
            batch_size (`int`, *optional*):
                Number of prompts that are drawn together, 1 if not given.
            generate_kwargs (`dict`, *optional*):
                Further arguments of `generate`.

        Returns:
            `list[dict]` or `list[list[dict]]`: The pictures of one prompt, or of each.

        Raises:
            ValueError: If a prompt is no string, there is none, or an argument is given twice.
        """
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if inputs == []:
            raise ValueError("Expected a prompt or a list of at least one, got an empty list.")
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
        num_images_per_prompt: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess = {"height": height, "width": width, "negative_prompt": negative_prompt}
        named = {key: kwargs.pop(key) for key in _GENERATE_ARGUMENTS if kwargs.get(key) is not None}
        if unknown := [key for key in kwargs if key not in _GENERATE_ARGUMENTS]:
            raise TypeError(
                f"The text-to-image pipeline takes no argument `{unknown[0]}`. What else `generate` takes goes into "
                "`generate_kwargs`."
            )
        if num_images_per_prompt is not None:
            if num_images_per_prompt < 1:
                raise ValueError(f"`num_images_per_prompt` must be 1 or more, got {num_images_per_prompt}.")
            named["num_return_sequences"] = num_images_per_prompt
        if twice := sorted(named.keys() & (generate_kwargs or {}).keys()):
            raise ValueError(f"`{twice[0]}` is given twice: by its own name and in `generate_kwargs`. Leave one out.")
        if named.get("seed") is not None and named.get("generator") is not None:
            raise ValueError("`seed` and `generator` are both given, but a generator has its own seed. Leave one out.")
        forward = {**(generate_kwargs or {}), **named}
        return {key: value for key, value in preprocess.items() if value is not None}, forward, {}

    def preprocess(
        self,
        prompt: str,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
    ) -> dict[str, torch.Tensor]:
        if not isinstance(prompt, str):
            raise ValueError(f"A prompt must be a string, got {type(prompt).__name__}: {prompt!r}.")
        size = self.model.config.default_image_size
        return self.processor(
            prompt,
            height=size if height is None else height,
            width=size if width is None else width,
            negative_prompt=negative_prompt,
            return_tensors="pt",
        )

    def _forward(self, model_inputs: dict[str, torch.Tensor], seed: int | None = None, **generate_kwargs: Any):
        if seed is not None:
            generate_kwargs["generator"] = torch.Generator(self.device).manual_seed(seed)
        generate_kwargs = self._prepare_generate_kwargs(generate_kwargs)
        sequences = self.model.generate(**model_inputs, **generate_kwargs, generation_mode="image")
        pixels = self.model.decode_image_tokens(sequences, model_inputs["image_sizes"])
        # One row for each prompt, which is how the library takes a batch apart.
        return {"pixel_values": torch.stack(pixels).unflatten(0, (len(model_inputs["input_ids"]), -1))}

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[dict[str, Image.Image]]:
        (pixels,) = model_outputs["pixel_values"]  # (pictures, 3, height, width)
        images = self.processor.post_process_multimodal_output(list(pixels), generation_mode="image")
        return [{"generated_image": image} for image in images]


__all__ = ["MarsPipeline"]
