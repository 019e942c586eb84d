"""
Decoding of MARS: `generate` with a mode, a grammar for pictures, and classifier-free guidance.

`generation_mode="text"` is transformers' own loop over text ids (captions and plain language). `"image"` draws: after
the prompt comes `<img>`, then exactly as many codes as the picture has cells, then `</img>`, whatever the sampler
does. The conditional and the unconditional row of guidance run as one batch over one cache.
"""

from collections.abc import Iterator
from math import isqrt
from typing import Any

import torch
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .image_processing_mars import check_image_size

GENERATION_MODES = ("text", "image")
# What the drawing loop would not honour, and therefore refuses.
NOT_IN_IMAGE_MODE = (
    "stopping_criteria",
    "max_time",
    "stop_strings",
    "past_key_values",
    "inputs_embeds",
    "visual_mask",
    "position_ids",
    "assistant_model",
    "custom_generate",
    "prefill_chunk_size",
    "output_hidden_states",
    "output_attentions",
    "output_logits",
)
DRAWING_ARGUMENTS = ("height", "width", "image_sizes", "generator", "negative_input_ids", "negative_attention_mask")

# Processors that treat all entries alike: they may see the scores of the codes alone. Any other one, a user's own for
# example, sees the whole vocabulary.
VOCABULARY_BLIND = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)


def position_ids_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Give consecutive positions `(batch, seq)` that start at each row's first attended token."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


class OnWholeVocabulary(LogitsProcessor):
    """
    Applies processors that look ids of the prompt up among the scores (penalties, for example) after a picture: the
    scores of the text ids are widened for them, so that the picture's ids have a place.

    Args:
        processors (`LogitsProcessorList`): What is applied.
        vocab_size (`int`): Number of ids: text and visual.
    """

    def __init__(self, processors: LogitsProcessorList, vocab_size: int):
        self.processors, self.vocab_size = processors, vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        width = scores.shape[-1]
        wide = torch.nn.functional.pad(scores, (0, self.vocab_size - width), value=-torch.inf)
        return self.processors(input_ids, wide)[:, :width]


class MarsGenerationMixin(GenerationMixin):
    """Adds the drawing of pictures to `generate`."""

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs
    ):
        r"""
        Write text or draw pictures.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, seq)`, *optional*): The prompt, or `input_ids=`.
            generation_config ([`GenerationConfig`], *optional*): As in transformers.
            generation_mode (`str`, defaults to `"text"`): `"text"` or `"image"`.
            image_sizes (`torch.LongTensor` of shape `(batch, pictures, 2)`, *optional*):
                Heights and widths in pixels, as the processor returns them.
            height, width (`int`, *optional*): Fill `image_sizes`, or check it.
            guidance_scale (`float`, *optional*):
                Image mode: `uncond + scale * (cond - uncond)` on the logits, before temperature, top-k and top-p.
                1 leaves the unconditional rows out; None takes the checkpoint's default, or 1.
            negative_input_ids, negative_attention_mask (`torch.LongTensor` of shape `(batch, negative_seq)`):
                The unconditional rows, as the processor returns them.
            generator (`torch.Generator`, *optional*): Source of randomness when sampling pictures.
            kwargs: Everything else that transformers' `generate` takes. Image mode takes what is not given from the
                dictionary `generation_config.image_defaults` of the checkpoint, if it has one.

        Returns:
            `torch.LongTensor` of shape `(batch * num_return_sequences, seq)` or a `GenerateDecoderOnlyOutput`. In
            image mode a row is prompt, `<img>`, codes, `</img>`, then padding if other rows are longer, and `scores`
            hold one entry for each code (`<img>` and `</img>` are not chosen).

        Raises:
            ValueError: If sizes are impossible or contradict each other, the context is too short for the picture,
                or an option does not exist in the mode.
        """
        configs = (generation_config, self.generation_config)
        mode = kwargs.pop("generation_mode", None)
        mode = mode or next((m for c in configs if (m := getattr(c, "generation_mode", None))), "text")
        if mode not in GENERATION_MODES:
            raise ValueError(f"`generation_mode` must be one of {', '.join(GENERATION_MODES)}, got {mode!r}.")
        input_ids = kwargs.pop("input_ids", inputs) if inputs is None else inputs
        if input_ids is not None:
            input_ids = self._prompt_with_codes(input_ids, kwargs.pop("pixel_values", None))
        if mode == "image":
            given = {**(vars(generation_config) if generation_config else {}), **kwargs}
            defaults = getattr(self.generation_config, "image_defaults", None) or {}
            kwargs |= {name: value for name, value in defaults.items() if given.get(name) is None}
            kwargs = self._prepare_drawing(input_ids, generation_config, kwargs)
        else:
            kwargs = self._prepare_writing(input_ids, kwargs)
        return super().generate(input_ids, generation_config, generation_mode=mode, **kwargs)

    def _prompt_with_codes(self, input_ids: torch.Tensor, pixel_values: Any) -> torch.Tensor:
        """Check the prompt's ids and put the codes of its pictures in: once and first, so that they are returned."""
        self._check_ids(input_ids)
        if pixel_values is not None:
            return self.fill_image_codes(input_ids, pixel_values)
        if places := int((input_ids == self.config.image_pad_token_id).sum()):
            raise ValueError(
                f"`input_ids` leave {places} places (`<imgpad>`) for codes of pictures, but `pixel_values` is None. "
                "Pass on all that the processor returned."
            )
        return input_ids

    def _prepare_writing(self, input_ids: torch.Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Give a call of text mode its grammar: the vision head is not even computed."""
        for name in ("generator", "guidance_scale"):
            if kwargs.get(name) is not None:
                raise ValueError(f'`{name}` belongs to `generation_mode="image"`, but this call writes text.')
        kwargs = {name: value for name, value in kwargs.items() if name not in DRAWING_ARGUMENTS}
        kwargs["vocabulary"] = "text"
        if input_ids is not None and not bool((input_ids >= self.config.image_token_offset).any()):
            kwargs["modality"] = "text"
        return kwargs

    def _prepare_drawing(
        self, input_ids: torch.Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Check a call of image mode before any work, and give it `image_sizes` and its length."""
        if input_ids is None:
            raise ValueError('`generation_mode="image"` needs `input_ids` as its prompt.')

        def setting(name: str, default: Any = None) -> Any:
            sources = (
                kwargs.get(name),
                *(getattr(c, name, None) for c in (generation_config, self.generation_config)),
            )
            return next((value for value in sources if value is not None), default)

        if ignored := [name for name in NOT_IN_IMAGE_MODE if setting(name)]:
            raise ValueError(f'`{ignored[0]}` is not possible with `generation_mode="image"`. Leave it out.')
        has_cache = setting("use_cache", True) and setting("cache_implementation") != "paged"
        if setting("num_beams", 1) != 1 or not has_cache:
            raise ValueError(
                '`generation_mode="image"` samples or is greedy, with a cache of its own: no beams, no '
                "`use_cache=False` and no paged cache."
            )
        if self.training and self.is_gradient_checkpointing:
            raise ValueError("Gradient checkpointing leaves no cache to draw with: call `model.eval()` first.")
        negative = self._check_guidance(setting("guidance_scale", 1.0), len(input_ids), kwargs)
        sizes = self._image_sizes(len(input_ids), kwargs.pop("height", None), kwargs.pop("width", None), kwargs)
        num_codes = int(self._num_codes(input_ids, sizes).max())
        needed = num_codes + 2
        longest = max(input_ids.shape[1], 0 if negative is None else negative.shape[1])
        context = self.config.text_config.max_position_embeddings
        if longest + needed > context:
            raise ValueError(
                f"The prompt has {longest} tokens and the picture needs {needed} ({num_codes} codes, `<img>` and "
                f"`</img>`), together more than the context of {context}. Shorten the prompt or draw a smaller "
                "picture."
            )
        asked = kwargs.pop("max_new_tokens", None)
        if (max_length := kwargs.pop("max_length", None)) is not None and asked is None:
            asked = max_length - input_ids.shape[1]
        if asked is not None and asked < needed:
            raise ValueError(f"The picture needs {needed} new tokens, but only {asked} are allowed.")
        return {**kwargs, "image_sizes": sizes, "max_new_tokens": needed}

    def _check_guidance(self, scale: float, batch: int, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Check guidance; give its unconditional rows, or take them out of `kwargs` where the scale is 1."""
        if scale < 0:
            raise ValueError(f"`guidance_scale` must be 0 or more, got {scale}.")
        if scale == 1.0:
            kwargs.pop("negative_input_ids", None), kwargs.pop("negative_attention_mask", None)
            return None
        negative = kwargs.get("negative_input_ids")
        if negative is None:
            raise ValueError(
                f"`guidance_scale={scale}` needs `negative_input_ids`: call the processor with `height=` and `width=` "
                "and pass on all that it returns, or set `guidance_scale=1.0`."
            )
        self._check_ids(negative)
        if len(negative) != batch:
            raise ValueError(f"Every prompt needs its row of `negative_input_ids`: got {len(negative)} for {batch}.")
        return negative

    def _image_sizes(self, batch: int, height: int | None, width: int | None, kwargs: dict[str, Any]) -> torch.Tensor:
        """Read or fill sizes: `(batch, pictures, 2)` in pixels."""
        sizes = kwargs.pop("image_sizes", None)
        if (height is None) != (width is None):
            raise ValueError(f"Give `height` and `width` together, got height={height} and width={width}.")
        if height is not None and width is not None:
            check_image_size(height, width, self.config.downsample_factor)
        if sizes is None:
            side = self.config.default_image_size
            return torch.tensor([[[height or side, width or side]]] * batch)
        sizes = torch.as_tensor(sizes)
        if sizes.ndim != 3 or sizes.shape[0] != batch or sizes.shape[2] != 2 or sizes.is_floating_point():
            raise ValueError(
                f"`image_sizes` must hold whole numbers of shape ({batch}, pictures, 2), got {sizes.dtype} of shape "
                f"{tuple(sizes.shape)}."
            )
        if height is not None and (sizes[:, -1] != torch.tensor([height, width], device=sizes.device)).any():
            raise ValueError(
                f"`height={height}, width={width}` contradict `image_sizes` {sizes[:, -1].tolist()}. Give one of them."
            )
        return sizes

    def _num_codes(self, input_ids: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """
        Count the codes `(batch,)` of the picture that comes next in each row.

        Raises:
            ValueError: If a picture has no whole number of codes.
        """
        before = (input_ids == self.config.image_end_token_id).sum(-1).clamp_max(image_sizes.shape[1] - 1)
        factor, counts = self.config.downsample_factor, []
        for sizes, picture in zip(image_sizes.tolist(), before.tolist(), strict=True):
            height, width = sizes[picture]
            check_image_size(height, width, factor)
            counts.append((height // factor) * (width // factor))
        return torch.tensor(counts, device=input_ids.device)

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any):
        mode, generator = kwargs.pop("generation_mode", "text"), kwargs.pop("generator", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        generation_config.generation_mode, generation_config.generator = mode, generator
        generation_config.image_guidance_scale = 1.0
        if mode == "image":
            if generation_config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
                raise ValueError(
                    '`generation_mode="image"` samples or is greedy, but these settings ask for '
                    f"{generation_config.get_generation_mode().value}."
                )
            # Taken from the library, which would run a second, unbatched forward for it.
            if generation_config.guidance_scale is not None:
                generation_config.image_guidance_scale = generation_config.guidance_scale
            generation_config.guidance_scale = None
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length):
        if generation_config.image_guidance_scale != 1.0:
            batch_size *= 2
            max_cache_length += model_kwargs["negative_input_ids"].shape[1]  # a negative prompt may be the longer
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, mode, batch_size, max_cache_length
        )

    def prepare_inputs_for_generation(
        self, input_ids, is_first_iteration: bool | None = False, inputs_embeds: torch.Tensor | None = None, **kwargs
    ):
        # `inputs_embeds` stand in the signature because that is where the library looks whether they are supported.
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, inputs_embeds=inputs_embeds, **kwargs
        )
        if not is_first_iteration and "input_ids" in model_inputs:
            model_inputs.pop("visual_mask", None)  # it covers the prompt's embeddings; new ids speak for themselves
            if kwargs.get("vocabulary") == "text" and model_inputs["input_ids"].shape[1] == 1:
                model_inputs["modality"] = "text"  # a new word after a picture
        return model_inputs

    def _get_logits_processor(self, generation_config, *args, model_kwargs: dict[str, Any] | None = None, **kwargs):
        processors = super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        writes = getattr(generation_config, "generation_mode", None) == "text"
        if not writes or (model_kwargs or {}).get("modality") == "text":
            return processors
        if all(isinstance(processor, VOCABULARY_BLIND) for processor in processors):
            return processors
        return LogitsProcessorList([OnWholeVocabulary(processors, self.config.vocab_size)])

    def _get_candidate_generator(self, *args, model_kwargs: dict[str, Any], **kwargs):
        # The library hands all of it to an assistant, and a plain language model knows neither.
        shared = {name: value for name, value in model_kwargs.items() if name not in ("vocabulary", "modality")}
        candidates = super()._get_candidate_generator(*args, model_kwargs=shared, **kwargs)
        if isinstance(candidates, PromptLookupCandidateGenerator) and model_kwargs.get("modality") != "text":
            # What followed the same words before may be a picture: a draft ends there.
            visual = torch.arange(self.config.image_token_offset, self.config.vocab_size, device=self.device)
            ends = candidates.eos_token_id
            candidates.eos_token_id = visual if ends is None else torch.cat([ends.to(visual), visual])
            candidates.vocab_size = self.config.vocab_size
        return candidates

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer=None,
        **model_kwargs,
    ):
        if generation_config.generation_mode != "image":
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        return self._draw(input_ids, logits_processor, generation_config, synced_gpus, streamer, **model_kwargs)

    def _draw(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        synced_gpus: bool,
        streamer,
        past_key_values,
        image_sizes: torch.Tensor,
        **model_kwargs,
    ):
        """Draw one picture a row: prefill the prompt, then feed `<img>` and code after code."""
        config, scale = self.config, generation_config.image_guidance_scale
        num_codes = self._num_codes(input_ids, image_sizes)  # (batch,)
        total, batch = int(num_codes.max()), len(input_ids)
        rows, mask = self._prompt_rows(input_ids, scale != 1.0, **model_kwargs)
        positions = position_ids_of(mask)
        step_inputs = {"past_key_values": past_key_values, "use_cache": True, "vocabulary": "visual"}
        step_inputs |= {"logits_to_keep": 1}
        # Ranks that must stay in step call both experts, whatever their own prompts are.
        is_text = not synced_gpus and not bool((rows >= config.image_token_offset).any())
        self(rows, attention_mask=mask, position_ids=positions, modality="text" if is_text else None, **step_inputs)

        picture = input_ids.new_full((batch, total + 2), self._pad_id(generation_config))
        picture[:, 0] = config.image_start_token_id
        picture.scatter_(1, num_codes[:, None] + 1, config.image_end_token_id)
        self._stream(streamer, picture[:, 0])
        scores_kept: list[torch.Tensor] = []
        step, position = 0, positions[:, -1:]
        while self._has_unfinished_sequences(step >= total, synced_gpus, device=input_ids.device):
            # Rows whose picture is complete are fed `</img>` until the longest is done.
            fed = picture[:, min(step, total)].where(step <= num_codes, config.image_end_token_id)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position = position + 1
            token = fed.repeat(len(rows) // batch)[:, None]
            logits = self(token, attention_mask=mask, position_ids=position, modality="image", **step_inputs).logits
            if step < total:
                scores = self._code_scores(logits[:, -1], scale, input_ids, picture[:, : step + 1], logits_processor)
                if generation_config.return_dict_in_generate and generation_config.output_scores:
                    scores_kept.append(self._widen(scores))
                codes = pick_codes(scores, generation_config.do_sample, generation_config.generator)
                ids = codes + config.image_token_offset
                picture[:, step + 1] = torch.where(step < num_codes, ids, picture[:, step + 1])
                self._stream(streamer, picture[:, step + 1])
            step += 1
        self._stream(streamer, picture[:, -1])
        if streamer is not None:
            streamer.end()
        sequences = torch.cat([input_ids, picture], dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=tuple(scores_kept) or None, past_key_values=past_key_values
        )

    @staticmethod
    def _stream(streamer, tokens: torch.Tensor) -> None:
        if streamer is not None:
            streamer.put(tokens.cpu())

    def _pad_id(self, generation_config: GenerationConfig) -> int:
        """Id that fills up rows with smaller pictures; a text id, so that nothing takes it for a code."""
        pad = generation_config._pad_token_tensor
        return 0 if pad is None else int(pad)

    def _prompt_rows(
        self,
        input_ids: torch.Tensor,
        guided: bool,
        attention_mask: torch.Tensor | None = None,
        negative_input_ids: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the prompts to prefill and their mask; guided, conditional over unconditional, left-padded alike."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not guided or negative_input_ids is None:
            return input_ids, attention_mask
        if negative_attention_mask is None:
            negative_attention_mask = torch.ones_like(negative_input_ids)
        width = max(input_ids.shape[1], negative_input_ids.shape[1])
        ids, mask = (
            torch.cat([torch.nn.functional.pad(part, (width - part.shape[1], 0)) for part in pair])
            for pair in ((input_ids, negative_input_ids), (attention_mask, negative_attention_mask))
        )
        return ids, mask

    def _code_scores(
        self,
        logits: torch.Tensor,
        scale: float,
        input_ids: torch.Tensor,
        drawn: torch.Tensor,
        logits_processor: LogitsProcessorList,
    ) -> torch.Tensor:
        """Guidance, then the grammar (codes only), then the sampler's processors: scores `(batch, codebook_size)`."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if scale != 1.0:
            conditional, unconditional = logits.chunk(2)
            logits = torch.lerp(unconditional, conditional, scale)
        scores = logits[:, : self.config.codebook_size]
        if all(isinstance(processor, VOCABULARY_BLIND) for processor in logits_processor):
            return logits_processor(input_ids, scores)
        widened = logits_processor(torch.cat([input_ids, drawn], dim=1), self._widen(scores))
        return widened[:, self.config.image_token_offset :][:, : self.config.codebook_size]

    def _widen(self, scores: torch.Tensor) -> torch.Tensor:
        """Put scores of codes `(batch, codebook_size)` at their places in the whole vocabulary, -inf elsewhere."""
        wide = scores.new_full((len(scores), self.config.vocab_size), -torch.inf)
        wide[:, self.config.image_token_offset :][:, : self.config.codebook_size] = scores
        return wide

    def collect_image_codes(
        self, sequences: torch.Tensor, image_sizes: torch.Tensor | list | None = None
    ) -> list[list[torch.Tensor]]:
        """
        Find every complete picture of generated sequences.

        Args:
            sequences (`torch.LongTensor` of shape `(num, seq)`): As `generate` returns them.
            image_sizes (`torch.LongTensor` of shape `(batch, pictures, 2)`, *optional*):
                Heights and widths in pixels; `num` may be a multiple of `batch`. If None, pictures are square.

        Returns:
            `list[list[torch.LongTensor]]`: For each row, the codes `(height / f, width / f)` of each of its pictures.

        Raises:
            ValueError: If a picture's codes do not fit its size, or anything but codes stands in a picture.
        """
        sizes = None if image_sizes is None else torch.as_tensor(image_sizes).tolist()
        if sizes is not None and len(sequences) % len(sizes):
            raise ValueError(f"{len(sequences)} sequences cannot share {len(sizes)} rows of `image_sizes`.")
        repeats = 1 if sizes is None else len(sequences) // len(sizes)
        rows = []
        for index, row in enumerate(sequences):
            row_sizes = None if sizes is None else sizes[index // repeats]
            pictures = enumerate(self._picture_spans(row))
            rows.append(
                [self._shape_codes(span, row_sizes and row_sizes[min(n, len(row_sizes) - 1)]) for n, span in pictures]
            )
        return rows

    def _picture_spans(self, row: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the ids between each `<img>` (or run of them) and its `</img>`."""
        starts = (row == self.config.image_start_token_id).nonzero().flatten().tolist()
        ends = (row == self.config.image_end_token_id).nonzero().flatten().tolist()
        for end in ends:
            if before := [start for start in starts if start < end]:
                yield row[before[-1] + 1 : end]
                starts = [start for start in starts if start > end]

    def _shape_codes(self, span: torch.Tensor, size: list[int] | None) -> torch.Tensor:
        codes = span - self.config.image_token_offset
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.config.codebook_size):
            raise ValueError("A picture of `sequences` holds ids that are no image codes.")
        factor = self.config.downsample_factor
        side = isqrt(codes.numel())
        height, width = (side, side) if size is None else (size[0] // factor, size[1] // factor)
        if height * width != codes.numel():
            wanted = "a square" if size is None else f"{size[0]}x{size[1]} pixels ({height * width} codes)"
            raise ValueError(f"A picture of `sequences` has {codes.numel()} codes, which do not make {wanted}.")
        return codes.view(height, width)


def pick_codes(scores: torch.Tensor, do_sample: bool, generator: torch.Generator | None = None) -> torch.Tensor:
    """Choose one code a row from scores `(batch, codebook_size)`: sampled, or the best one."""
    if not do_sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), num_samples=1, generator=generator).squeeze(1)


__all__ = ["MarsGenerationMixin"]
