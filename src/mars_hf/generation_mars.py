"""
Decoding of MARS: `generate` with a mode, a grammar for pictures, and classifier-free guidance.

`generation_mode="text"` is transformers' own loop over text ids (captions and plain language). `"image"` draws: after
the prompt comes `<img>`, then exactly as many codes as the picture has cells, then `</img>`, whatever the sampler
does. `"interleaved"` writes text in which the model begins pictures itself. The conditional and the unconditional
row of guidance run as one batch over one cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from transformers.generation import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
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
from transformers.utils import logging

from .code_order_mars import PictureLayout, PictureTokens, cell_table, check_code_order, look_up_cells
from .drawing_mars import (
    GUIDANCE_SCHEDULES,
    Document,
    Drawing,
    DrawingContext,
    Faults,
    guidance_at,
    guided,
    pick_codes,
    position_ids_of,
)
from .image_processing_mars import check_image_size
from .speculation_mars import SpeculativeDrawing
from .streaming_mars import ImageStreamer

logger = logging.get_logger(__name__)

PAGED = "A paged cache (continuous batching) would write codes among words. Use `generate` with another cache."
GENERATION_MODES = ("text", "image", "interleaved")
CACHE_LENGTH_MULTIPLE = 128  # of static caches
IMAGE_SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "guidance_scale")
STEP_SETTINGS = {"codes_per_step", "guidance_schedule", "guidance_interval"}  # of pictures, in either mode
# What the drawing loops would not honour, and therefore refuse: in both modes, and in one of them.
REFUSED = (
    "stop_strings",
    "past_key_values",
    "inputs_embeds",
    "visual_mask",
    "position_ids",
    "assistant_model",
    "custom_generate",
    "prefill_chunk_size",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "output_hidden_states",
    "output_attentions",
    "output_logits",
)
REFUSED_IN_MODE = {"image": ("stopping_criteria", "max_time"), "interleaved": ("output_scores",)}
DRAWING_ARGUMENTS = (
    "height",
    "width",
    "image_sizes",
    "generator",
    "negative_input_ids",
    "negative_attention_mask",
    "codes_per_step",
    "code_order",
    "jacobi_window",
    "initial_codes",
    "image_kwargs",
    "guidance_schedule",
    "guidance_interval",
)

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


def _is_no_wish(value: Any) -> bool:
    """Whether a setting asks for nothing. A tensor asks for something, and so does a cache that is still empty."""
    return value is None or value is False or (isinstance(value, list) and not value)


def code_warpers(settings: dict[str, Any]) -> LogitsProcessorList:
    """Build the processors of code scores from the image settings of interleaved mode, as transformers orders them."""
    warpers = LogitsProcessorList()
    if settings.get("do_sample"):
        if (temperature := settings.get("temperature")) not in (None, 1.0):
            warpers.append(TemperatureLogitsWarper(temperature))
        if top_k := settings.get("top_k", 50):  # as transformers, where nothing is said
            warpers.append(TopKLogitsWarper(top_k))
        if (top_p := settings.get("top_p")) not in (None, 1.0):
            warpers.append(TopPLogitsWarper(top_p))
        if (min_p := settings.get("min_p")) is not None:
            warpers.append(MinPLogitsWarper(min_p))
    return warpers


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
        wide = F.pad(scores, (0, self.vocab_size - width), value=-torch.inf)
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
            generation_mode (`str`, defaults to `"text"`): `"text"`, `"image"` or `"interleaved"`.
            image_sizes (`torch.LongTensor` of shape `(batch, pictures, 2)`, *optional*):
                Heights and widths in pixels, as the processor returns them.
            height, width (`int`, *optional*): Fill `image_sizes`, or check it.
            guidance_scale (`float`, *optional*):
                Image mode: `uncond + scale * (cond - uncond)` on the logits, before temperature, top-k and top-p.
                1 leaves the unconditional rows out; None takes the checkpoint's default, or 1.
            guidance_schedule (`str`, defaults to `"constant"`):
                `"linear"` or `"cosine"`: guidance grows from none at the first code to its full strength.
            guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
                Shares of a picture between which there is guidance.
            negative_input_ids, negative_attention_mask (`torch.LongTensor` of shape `(batch, negative_seq)`):
                The unconditional rows, as the processor returns them.
            generator (`torch.Generator` or a list of one for each returned row, *optional*):
                Source of randomness when sampling pictures.
            codes_per_step (`int`, *optional*):
                Codes that one step draws (next-K-token prediction). Defaults to the configuration's first.
            code_order (`str`, *optional*): Checked against the configuration's.
            jacobi_window (`int`, *optional*):
                Image mode with one code a step: guess so many codes ahead and let one forward check them all
                (speculative Jacobi decoding), so that up to `jacobi_window + 1` codes come of it. Pictures have the
                distribution that they have without it, though a seed gives another one; greedy ones are the same.
                Rows wait for the slowest one of their batch. 0 or None is off.
            image_kwargs (`dict`, *optional*):
                Interleaved mode: `do_sample`, `temperature`, `top_k`, `top_p`, `min_p` and `guidance_scale` of
                pictures, over `generation_config.image_defaults`; outside it they hold for words. K and the course of
                guidance are read from those defaults, too; anything else there holds in image mode only.
            initial_codes (`list[torch.LongTensor]`, *optional*):
                The first codes of each prompt's picture, in emission order; the rest is drawn.
            streamer (`BaseStreamer`, *optional*):
                Hears the tokens of all rows as they come, padding where a row has none. An [`ImageStreamer`] shows
                pictures while they are drawn, and can cancel: then what is there so far comes back, and incomplete
                pictures lack their `</img>`.
            kwargs: Everything else that transformers' `generate` takes. Image mode takes what is not given from the
                dictionary `generation_config.image_defaults` of the checkpoint, if it has one.

        Returns:
            `torch.LongTensor` of shape `(batch * num_return_sequences, seq)` or a `GenerateDecoderOnlyOutput`. In
            image mode a row is prompt, `<img>` once or K times, codes in emission order, `</img>`, then padding if
            other rows are longer, and `scores` hold one entry for each code (`<img>` and `</img>` are not chosen).

        Raises:
            ValueError: If sizes are impossible or contradict each other, the context is too short for the picture,
                or an option does not exist in the mode.
            RuntimeError: If scores are NaN, with their row and step. Infinite scores are defined, see [`pick_codes`]:
                no logits lead out of the codebook.
        """
        streamer, mode = kwargs.get("streamer"), None
        try:
            mode, input_ids, kwargs = self._prepare_call(inputs, generation_config, kwargs)
            return super().generate(input_ids, generation_config, generation_mode=mode, **kwargs)
        finally:
            if streamer is not None and mode != "text":  # the library ends it when a text is written
                streamer.end()  # also when a call is refused or fails: whoever iterates must not wait for ever

    def _prepare_call(
        self, inputs: torch.Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[str, torch.Tensor | None, dict[str, Any]]:
        """Check a call before any work; give its mode, the prompt with the codes of its pictures, and arguments."""
        configs = (generation_config, self.generation_config)
        mode = kwargs.pop("generation_mode", None)
        mode = mode or next((m for c in configs if (m := getattr(c, "generation_mode", None))), "text")
        if mode not in GENERATION_MODES:
            raise ValueError(f"`generation_mode` must be one of {', '.join(GENERATION_MODES)}, got {mode!r}.")
        input_ids = kwargs.pop("input_ids", inputs) if inputs is None else inputs
        if input_ids is not None:
            input_ids = self._prompt_with_codes(input_ids, kwargs)
        if mode != "text" and input_ids is not None and self.device.type != "meta":
            input_ids = input_ids.to(self.device)  # as the library does for text; offloaded models move it themselves
            for name in ("attention_mask", "negative_input_ids", "negative_attention_mask"):
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name].to(self.device)
        if mode != "text":
            given = {**(vars(generation_config) if generation_config else {}), **kwargs}
            defaults = self._image_defaults
            # In documents all others are asked of words; those of pictures come as `image_kwargs`.
            names = defaults if mode == "image" else STEP_SETTINGS & defaults.keys()
            kwargs |= {name: defaults[name] for name in names if given.get(name) is None}
        if mode == "image":
            kwargs = self._prepare_drawing(input_ids, generation_config, kwargs)
        elif mode == "interleaved":
            kwargs = self._prepare_document(input_ids, generation_config, kwargs)
        else:
            kwargs = self._prepare_writing(input_ids, generation_config, kwargs)
        return mode, input_ids, kwargs

    @property
    def _image_defaults(self) -> dict[str, Any]:
        return getattr(self.generation_config, "image_defaults", None) or {}

    def _prompt_with_codes(self, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Check the prompt's ids and put the codes of its pictures in: once and first, so that they are returned."""
        self._check_ids(input_ids)
        pixel_values, negative = kwargs.pop("pixel_values", None), kwargs.get("negative_input_ids")
        if pixel_values is not None:
            grids = self.encode_image(pixel_values)
            if negative is not None and bool((negative == self.config.image_pad_token_id).any()):
                kwargs["negative_input_ids"] = self.place_codes(negative, grids)  # of super-resolution
            return self.place_codes(input_ids, grids)
        if places := int((input_ids == self.config.image_pad_token_id).sum()):
            raise ValueError(
                f"`input_ids` leave {places} places (`<imgpad>`) for codes of pictures, but `pixel_values` is None. "
                "Pass on all that the processor returned."
            )
        return input_ids

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        """Refuse: continuous batching picks words of the whole vocabulary."""
        raise ValueError(PAGED)

    def compute_transition_scores(self, sequences, scores, beam_indices=None, normalize_logits=False):
        """
        As in transformers; of image mode for each code of a row, and 0 where a row has none.

        Args:
            sequences (`torch.LongTensor` of shape `(batch, seq)`): From `generate`.
            scores (`tuple` of `torch.FloatTensor`): From `generate`.
            beam_indices (`torch.LongTensor`, *optional*): Of text.
            normalize_logits (`bool`, defaults to `False`): Give log-probabilities.

        Returns:
            `torch.FloatTensor` of shape `(batch, len(scores))`.
        """
        if scores[0].shape[-1] != self.config.vocab_size:
            return super().compute_transition_scores(sequences, scores, beam_indices, normalize_logits)
        stacked = torch.stack(scores, dim=1)
        stacked = stacked.log_softmax(-1) if normalize_logits else stacked
        ids = sequences[:, -len(scores) - 1 : -1]  # behind them `</img>`, which is not chosen
        is_code = (ids >= self.config.image_token_offset) & (ids < self.config.image_start_token_id)
        return stacked.gather(-1, ids[..., None]).squeeze(-1).masked_fill(~is_code, 0.0)

    def _prepare_writing(
        self, input_ids: torch.Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Give a call of text mode its grammar: the vision head is not even computed."""
        given, own = (getattr(one, "guidance_scale", None) for one in (generation_config, self.generation_config))
        asked = {**kwargs, "guidance_scale": kwargs.get("guidance_scale", given if given != own else None)}
        for name in ("generator", "guidance_scale", "jacobi_window"):
            if asked.get(name) is not None:
                raise ValueError(f'`{name}` belongs to `generation_mode="image"`, but this call writes text.')
        if isinstance(kwargs.get("streamer"), ImageStreamer):
            raise ValueError(
                "An `ImageStreamer` shows pictures, but this call writes text: set `generation_mode`, or take another "
                "streamer."
            )
        config, sizes = self.config, kwargs.get("image_sizes")
        setting = self._setting_reader(generation_config, kwargs)
        if setting("cache_implementation") == "paged":
            raise ValueError(PAGED)
        is_read = input_ids is not None and bool((input_ids >= config.image_token_offset).any())
        if is_read and (max(config.trained_codes_per_step) > 1 or config.cell_embedding):
            self._require_one_prefill(setting)
        kwargs = {name: value for name, value in kwargs.items() if name not in DRAWING_ARGUMENTS}
        kwargs["vocabulary"] = "text"
        if input_ids is not None and not is_read:
            kwargs["modality"] = "text"
        elif config.cell_embedding and sizes is not None:
            kwargs["image_sizes"] = torch.as_tensor(sizes)  # of the pictures that are read
        return kwargs

    @staticmethod
    def _require_one_prefill(setting: Callable) -> None:
        """Refuse calls in which pictures of blocks or cells would not be read whole, as their masks need."""
        past = setting("past_key_values")
        asked = {
            "cache_implementation": setting("cache_implementation") not in (None, "dynamic"),
            "past_key_values": past is not None and past.get_seq_length() > 0,
            "prefill_chunk_size": setting("prefill_chunk_size") is not None,
        }
        if refused := [name for name, is_asked in asked.items() if is_asked]:
            raise ValueError(
                f"`{refused[0]}` is not possible where this model reads a picture: with several codes a step or "
                "embeddings of cells a prompt with pictures is read in one piece, with a dynamic cache. Leave it out."
            )

    def _prepare_drawing(
        self, input_ids: torch.Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Check a call of image mode before any work, and give it `image_sizes` and its length."""
        setting = self._setting_reader(generation_config, kwargs)
        input_ids = self._require_drawable("image", input_ids, setting)
        kwargs |= {name: setting(name) for name in ("guidance_schedule", "guidance_interval")}
        negative = self._check_guidance(setting("guidance_scale", 1.0), len(input_ids), kwargs)
        sizes = self._image_sizes(len(input_ids), kwargs.pop("height", None), kwargs.pop("width", None), kwargs)
        grids = self._grids(input_ids, sizes)
        self._check_low_resolution(input_ids, grids)
        k = self._check_steps(setting("codes_per_step"), setting("code_order"), grids)
        window = self._check_window(setting("jacobi_window"), k, setting("cache_implementation"))
        self._check_initial_codes(kwargs.get("initial_codes"), grids)
        num_codes = max(height * width for height, width in grids)
        needed = num_codes + k + 1
        longest = max(input_ids.shape[1], 0 if negative is None else negative.shape[1])
        context = self.config.text_config.max_position_embeddings
        if longest + needed > context:
            raise ValueError(
                f"The prompt has {longest} tokens and the picture needs {needed} ({num_codes} codes, {k} `<img>` and "
                f"`</img>`), together more than the context of {context}. Shorten the prompt or draw a smaller "
                "picture."
            )
        asked = self._asked_length(input_ids, kwargs)
        if asked is not None and asked < needed:
            raise ValueError(f"The picture needs {needed} new tokens, but only {asked} are allowed.")
        steps = {"codes_per_step": k, "jacobi_window": window}
        return {**kwargs, **steps, "image_sizes": sizes, "max_new_tokens": needed}

    def _check_low_resolution(self, input_ids: torch.Tensor, grids: list[tuple[int, int]]) -> None:
        """Refuse prompts whose low-resolution picture is not what the model draws from."""
        config, factor = self.config, self.config.super_resolution_factor
        start_id, end_id = config.lowres_start_token_id, config.lowres_end_token_id
        if factor is None:
            if bool((input_ids == start_id).any()):
                raise ValueError(
                    "The prompt holds a low-resolution picture (`<lowres>`), but this model draws from text alone "
                    "(`config.super_resolution_factor` is None). Use a model of super-resolution."
                )
            return
        for row, (ids, (height, width)) in enumerate(zip(input_ids.tolist(), grids, strict=True)):
            expected = (height // factor) * (width // factor)
            is_one = ids.count(start_id) == ids.count(end_id) == 1
            found = ids.index(end_id) - ids.index(start_id) - 1 if is_one else None
            if found != expected or height % factor or width % factor:
                raise ValueError(
                    f"A picture of {height}x{width} codes is drawn from one of {height // factor}x{width // factor} "
                    f"({expected} codes between `<lowres>` and `</lowres>`, `config.super_resolution_factor` is "
                    f"{factor}), but row {row} has {found or 'no single one'}. Give the processor `lowres_images` or "
                    "`lowres_codes` and pass on all that it returns."
                )

    def _setting_reader(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> Callable:
        def setting(name: str, default: Any = None) -> Any:
            configs = (getattr(c, name, None) for c in (generation_config, self.generation_config))
            return next((value for value in (kwargs.get(name), *configs) if value is not None), default)

        return setting

    @staticmethod
    def _asked_length(input_ids: torch.Tensor, kwargs: dict[str, Any]) -> int | None:
        """Take the number of new tokens that is asked for, by either name, out of `kwargs`."""
        asked, max_length = kwargs.pop("max_new_tokens", None), kwargs.pop("max_length", None)
        return max_length - input_ids.shape[1] if asked is None and max_length is not None else asked

    def _require_drawable(self, mode: str, input_ids: torch.Tensor | None, setting: Callable) -> torch.Tensor:
        """Refuse what the drawing loops cannot do; give the prompt."""
        if input_ids is None:
            raise ValueError(f'`generation_mode="{mode}"` needs `input_ids` as its prompt.')
        given = {name: setting(name) for name in (*REFUSED_IN_MODE[mode], *REFUSED)}
        if ignored := [name for name, value in given.items() if not _is_no_wish(value)]:
            raise ValueError(f'`{ignored[0]}` is not possible with `generation_mode="{mode}"`. Leave it out.')
        has_cache = setting("use_cache", True) and setting("cache_implementation") != "paged"
        if setting("num_beams", 1) != 1 or not has_cache:
            raise ValueError(
                f'`generation_mode="{mode}"` samples or is greedy, with a cache of its own: no beams, no '
                "`use_cache=False` and no paged cache."
            )
        generator, rows = setting("generator"), len(input_ids) * setting("num_return_sequences", 1)
        if isinstance(generator, list) and len(generator) != rows:
            raise ValueError(
                f"A list of generators needs one for each returned row, {rows} here, got {len(generator)}. Give one "
                "generator for all, or a list of that length."
            )
        if self.training and self.is_activation_checkpointing:
            raise ValueError("Gradient checkpointing leaves no cache to draw with: call `model.eval()` first.")
        return input_ids

    def _prepare_document(
        self, input_ids: torch.Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Check a call of interleaved mode before any work, and give it sizes, settings of pictures and its length."""
        if self.config.super_resolution_factor is not None:
            raise ValueError(
                "A model of super-resolution draws from a small picture, which documents have not: write them with "
                "its base model."
            )
        setting = self._setting_reader(generation_config, kwargs)
        input_ids = self._require_drawable("interleaved", input_ids, setting)
        kwargs |= {name: setting(name) for name in ("guidance_schedule", "guidance_interval")}
        if kwargs.pop("initial_codes", None) is not None:
            raise ValueError('`initial_codes` belong to `generation_mode="image"`: pictures of a document begin anew.')
        if setting("jacobi_window"):
            raise ValueError(
                '`jacobi_window` belongs to `generation_mode="image"`: in a document rows differ in step.'
            )
        config = self.config
        layout = PictureLayout.of(input_ids, config.image_token_offset, config.image_start_token_id)
        if bool((layout.place[:, -1] >= 0).any()):
            raise ValueError("A prompt ends inside a picture. Close it with `</img>`, or complete it in image mode.")
        given = kwargs.pop("image_kwargs", None) or {}
        if unknown := sorted(given.keys() - set(IMAGE_SETTINGS)):
            raise ValueError(f"`image_kwargs` takes {', '.join(IMAGE_SETTINGS)}; it does not know `{unknown[0]}`.")
        settings = {"do_sample": setting("do_sample", False), **self._image_defaults, **given}
        scales = (kwargs.pop("guidance_scale", None), getattr(generation_config, "guidance_scale", None))
        scale = next((scale for scale in scales if scale is not None), settings.get("guidance_scale", 1.0))
        self._check_guidance(scale, len(input_ids), kwargs)
        sizes = self._image_sizes(len(input_ids), kwargs.pop("height", None), kwargs.pop("width", None), kwargs)
        grids = [self._grids_of(row) for row in sizes.tolist()]
        every = [grid for row in grids for grid in row]
        k = self._check_steps(setting("codes_per_step"), setting("code_order"), every)
        room = config.text_config.max_position_embeddings - input_ids.shape[1]
        asked = self._asked_length(input_ids, kwargs)
        if asked is None:
            lengths = {name: setting(name) for name in ("max_new_tokens", "max_length")}
            asked = self._asked_length(input_ids, lengths)
        if room < 1 or (asked is not None and not 1 <= asked <= room):
            raise ValueError(
                f"The prompt has {input_ids.shape[1]} tokens and {asked} new ones are asked for, but the context of "
                f"{config.text_config.max_position_embeddings} leaves room for 1 to {room}."
            )
        steps = {"codes_per_step": k, "guidance_scale": scale, "image_settings": settings}
        return {**kwargs, **steps, "image_sizes": sizes, "max_new_tokens": room if asked is None else asked}

    def _check_steps(self, codes_per_step: int | None, code_order: str | None, grids: list[tuple[int, int]]) -> int:
        """Give K; refuse a K that the pictures or the order do not have, and an order that was not trained."""
        config = self.config
        if code_order not in (None, config.code_order):
            raise ValueError(
                f"This checkpoint was trained to draw in {config.code_order!r} order (`config.code_order`), it cannot "
                f"draw in {code_order!r} order."
            )
        k = config.trained_codes_per_step[0] if codes_per_step is None else codes_per_step
        for grid in set(grids):
            check_code_order(*grid, k, config.code_order)
            if config.cell_embedding and max(grid) > config.max_grid_size:
                raise ValueError(
                    f"A picture has {grid[0]}x{grid[1]} codes, but the cell embeddings know {config.max_grid_size} a "
                    "side (`config.max_grid_size`). Draw a smaller picture."
                )
        if k not in config.trained_codes_per_step:
            logger.warning_once(
                f"`codes_per_step={k}` was not trained for (`config.codes_per_step` is {config.codes_per_step}): "
                "expect poor pictures."
            )
        return k

    @staticmethod
    def _check_window(window: int | None, k: int, cache_implementation: str | None) -> int:
        """Give the number of codes to guess ahead, 0 for none; refuse what cannot be taken back or is no number."""
        if not window:
            return 0
        if not isinstance(window, int) or window < 1:
            raise ValueError(
                f"`jacobi_window` must be a whole number of codes, 1 or more, or 0 for none, got {window}."
            )
        if k > 1:
            raise ValueError(
                f"`jacobi_window={window}` guesses ahead of one code a step, but `codes_per_step` is {k}. Leave one "
                "of them out, or set `codes_per_step=1` with a checkpoint that was trained for it."
            )
        if cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"`jacobi_window={window}` takes wrong guesses out of the cache again, which a cache of "
                f"`cache_implementation={cache_implementation!r}` does not do. Leave one of them out."
            )
        return window

    def _check_initial_codes(self, initial_codes: Any, grids: list[tuple[int, int]]) -> None:
        """Refuse beginnings of pictures that do not fit them."""
        if initial_codes is None:
            return
        if len(initial_codes) != len(grids):
            raise ValueError(f"`initial_codes` needs one row for each prompt: got {len(initial_codes)}, {len(grids)}.")
        for row, (codes, (height, width)) in enumerate(zip(initial_codes, grids, strict=True)):
            codes = torch.as_tensor(codes)
            if codes.ndim != 1 or len(codes) > height * width:
                raise ValueError(
                    f"`initial_codes` of row {row} must be at most {height * width} codes in a line (the picture has "
                    f"{height}x{width}), got shape {tuple(codes.shape)}."
                )
            if len(codes) and (int(codes.min()) < 0 or int(codes.max()) >= self.config.codebook_size):
                raise ValueError(
                    f"`initial_codes` must lie in [0, {self.config.codebook_size}), got {int(codes.min())} to "
                    f"{int(codes.max())} in row {row}."
                )

    def _check_guidance(self, scale: float, batch: int, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Check guidance; give its unconditional rows, or take them out of `kwargs` where the scale is 1."""
        if scale < 0:
            raise ValueError(f"`guidance_scale` must be 0 or more, got {scale}.")
        schedule, interval = kwargs.get("guidance_schedule"), kwargs.get("guidance_interval")
        if schedule not in (None, *GUIDANCE_SCHEDULES):
            raise ValueError(f"`guidance_schedule` must be one of {', '.join(GUIDANCE_SCHEDULES)}, got {schedule!r}.")
        if interval is not None and not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
            raise ValueError(
                f"`guidance_interval` must be two shares of a picture, 0 <= start <= end <= 1, got {interval}."
            )
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

    def _grids(self, input_ids: torch.Tensor, image_sizes: torch.Tensor) -> list[tuple[int, int]]:
        """
        Give rows and columns, in codes, of the picture that comes next in each row.

        Raises:
            ValueError: If a picture has no whole number of codes.
        """
        before = (input_ids == self.config.image_end_token_id).sum(-1).clamp_max(image_sizes.shape[1] - 1)
        rows = zip(image_sizes.tolist(), before.tolist(), strict=True)
        return self._grids_of([sizes[picture] for sizes, picture in rows])

    def _grids_of(self, sizes: list[list[int]]) -> list[tuple[int, int]]:
        factor = self.config.downsample_factor
        for height, width in sizes:
            check_image_size(height, width, factor)
        return [(height // factor, width // factor) for height, width in sizes]

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any):
        mode, generator = kwargs.pop("generation_mode", "text"), kwargs.pop("generator", None)
        k, initial_codes = kwargs.pop("codes_per_step", 1), kwargs.pop("initial_codes", None)
        window = kwargs.pop("jacobi_window", 0)
        image_settings = kwargs.pop("image_settings", None)
        schedule, interval = kwargs.pop("guidance_schedule", None), kwargs.pop("guidance_interval", None)
        kwargs.pop("code_order", None)  # checked: it is the configuration's
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        generation_config.generation_mode, generation_config.generator = mode, generator
        generation_config.codes_per_step, generation_config.initial_codes = k, initial_codes
        generation_config.jacobi_window, generation_config.image_settings = window, image_settings
        generation_config.guidance_schedule = schedule or "constant"
        generation_config.guidance_interval = tuple(interval or (0.0, 1.0))
        generation_config.image_guidance_scale = 1.0
        if mode != "text":
            if generation_config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
                raise ValueError(
                    f'`generation_mode="{mode}"` samples or is greedy, but these settings ask for '
                    f"{generation_config.get_generation_mode().value}."
                )
            if generation_config.guidance_scale is not None:
                generation_config.image_guidance_scale = generation_config.guidance_scale
        # Taken from the library, which would run a second, unbatched forward for it, of text as well.
        generation_config.guidance_scale = None
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length):
        if generation_config.image_guidance_scale != 1.0:
            batch_size *= 2
            max_cache_length += model_kwargs["negative_input_ids"][0].numel()  # a negative prompt may be the longer
        if generation_config.generation_mode == "interleaved":  # a row of text uses one of K columns
            max_cache_length += (generation_config.codes_per_step - 1) * generation_config.max_new_tokens
        if generation_config.generation_mode != "text":  # prompts of like length share a compilation
            max_cache_length = -(-max_cache_length // CACHE_LENGTH_MULTIPLE) * CACHE_LENGTH_MULTIPLE
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
        if generation_config.generation_mode == "text":
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        shared = (generation_config, synced_gpus, streamer)
        if generation_config.generation_mode == "image":
            draw = self._draw_speculatively if generation_config.jacobi_window else self._draw
            return draw(input_ids, logits_processor, *shared, **model_kwargs)
        return self._interleave(input_ids, logits_processor, stopping_criteria, *shared, **model_kwargs)

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
        """Draw one picture a row: prefill the prompt, feed `<img>` K times, then block after block of K codes."""
        k, grids = generation_config.codes_per_step, self._grids(input_ids, image_sizes)
        enlarged = self._enlarged(input_ids, grids)
        drawing = Drawing(self.config, grids, k, self._pad_id(generation_config), input_ids.device, enlarged)
        step_inputs = {"past_key_values": past_key_values, "use_cache": True, "vocabulary": "visual"}
        shared = (generation_config, synced_gpus, streamer, step_inputs)
        context, step = self._begin_drawing(drawing, input_ids, *shared, image_sizes=image_sizes, **model_kwargs)
        scores_kept: list[torch.Tensor] = []
        faults = Faults(input_ids)
        call = self._step_call(generation_config, **step_inputs)
        while self._has_unfinished_sequences(step >= drawing.num_steps, synced_gpus, device=input_ids.device):
            logits = call(**context.feed(*drawing.tokens_until(step)), modality="image", logits_to_keep=k).logits
            if step < drawing.num_steps:
                guidance = self._guidance(generation_config, drawing.progress(step))
                scores = self._code_scores(logits, guidance, input_ids, drawing.emitted, logits_processor)
                faults.look(scores)
                if generation_config.return_dict_in_generate and generation_config.output_scores:
                    scores_kept += [self._widen(slot) for slot in scores[:, : drawing.width(step)].unbind(1)]
                codes = pick_codes(scores, generation_config.do_sample, generation_config.generator)
                self._stream(streamer, drawing.put(step, codes + self.config.image_token_offset))
            step = faults.present = step + 1
            if getattr(streamer, "cancelled", False):
                drawing.cut()
                break
        faults.refuse()
        return self._end_drawing(drawing, input_ids, generation_config, streamer, scores_kept, past_key_values)

    def _draw_speculatively(
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
        """Draw one picture a row, several codes a forward where drafts of them hold; see `speculation_mars.py`."""
        self._require_blind(logits_processor)
        grids, window = self._grids(input_ids, image_sizes), generation_config.jacobi_window
        shape = (window, self._pad_id(generation_config), input_ids.device)
        drawing = SpeculativeDrawing(self.config, grids, *shape, self._enlarged(input_ids, grids))
        step_inputs = {"past_key_values": past_key_values, "use_cache": True, "vocabulary": "visual"}
        shared = (generation_config, synced_gpus, streamer, step_inputs)
        context, place = self._begin_drawing(drawing, input_ids, *shared, image_sizes=image_sizes, **model_kwargs)
        past_key_values.activate_past_recording()  # layers with a sliding window keep what a crop brings back
        do_sample, generator = generation_config.do_sample, generation_config.generator
        scores_kept: list[torch.Tensor] = []
        faults = Faults(input_ids)
        faults.present = place
        while self._has_unfinished_sequences(place >= drawing.total, synced_gpus, device=input_ids.device):
            slots, certain = drawing.draft(place), 1
            inputs = context.feed(*drawing.tokens_until(place + slots - 1))
            logits = self(**inputs, **step_inputs, modality="image", logits_to_keep=slots).logits
            if place < drawing.total:
                guidance = self._guidance(generation_config, drawing.progress(place, slots))
                scores = self._code_scores(logits, guidance, input_ids, drawing.emitted, logits_processor)
                certain = drawing.settle(place, scores, do_sample, generator)
                context.take_back(slots - certain)
                past_key_values.crop(certain - slots)
                for slot in scores[:, :certain].unbind(1):
                    faults.look(slot)
                    faults.present += 1
                    if generation_config.return_dict_in_generate and generation_config.output_scores:
                        scores_kept.append(self._widen(slot))
                self._stream(streamer, drawing.picture[:, 1 + place : 1 + place + certain])
            place += certain
            if getattr(streamer, "cancelled", False):
                drawing.cut()
                break
        faults.refuse()
        return self._end_drawing(drawing, input_ids, generation_config, streamer, scores_kept, past_key_values)

    @staticmethod
    def _require_blind(logits_processor: LogitsProcessorList) -> None:
        """Refuse processors that may look at what is drawn: the scores of drafts come before it is certain."""
        for processor in logits_processor:
            if not isinstance(processor, VOCABULARY_BLIND):
                raise ValueError(
                    f"`jacobi_window` scores codes before those in front of them are certain, which "
                    f"{type(processor).__name__} may ask for. Leave one of them out; what works with it: "
                    f"{', '.join(kind.__name__ for kind in VOCABULARY_BLIND)}."
                )

    def _begin_drawing(
        self,
        drawing: Drawing,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        synced_gpus: bool,
        streamer,
        step_inputs: dict[str, Any],
        image_sizes: torch.Tensor,
        **model_kwargs,
    ) -> tuple[DrawingContext, int]:
        """Prefill the prompts; give the context of what follows and the first step that has something to draw."""
        k, is_guided = generation_config.codes_per_step, generation_config.image_guidance_scale != 1.0
        rows, mask = self._prompt_rows(input_ids, is_guided, **model_kwargs)
        sizes = image_sizes.repeat(len(rows) // len(input_ids), 1, 1)
        longest = max(k, *self.config.trained_codes_per_step)  # with which a picture of the prompt may be drawn
        self._prefill_prompt(
            rows, mask, synced_gpus, codes_per_step=longest, image_sizes=sizes, logits_to_keep=1, **step_inputs
        )
        step = drawing.start(generation_config.initial_codes)
        if isinstance(streamer, ImageStreamer):
            before = (input_ids == self.config.image_end_token_id).sum(1).tolist()
            streamer.begin([[grid] for grid in drawing.grids], before, k, self.config)
        self._stream(streamer, drawing.picture[:, : k + step * k])
        return DrawingContext(mask, k, copies=len(rows) // len(input_ids)), step

    def _end_drawing(
        self,
        drawing: Drawing,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        streamer,
        scores: list[torch.Tensor],
        past_key_values,
    ):
        """Close the pictures and give what `generate` returns."""
        self._stream(streamer, drawing.picture[:, -1:])
        sequences = torch.cat([input_ids, drawing.picture], dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=tuple(scores) or None, past_key_values=past_key_values
        )

    def _interleave(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool,
        streamer,
        past_key_values,
        image_sizes: torch.Tensor,
        **model_kwargs,
    ):
        """Write rows of text and pictures: every call appends K columns, of which a row uses what it has."""
        config, k, scale = self.config, generation_config.codes_per_step, generation_config.image_guidance_scale
        pad, device, ends = self._pad_id(generation_config), input_ids.device, generation_config._eos_token_tensor
        counts = (image_sizes // config.downsample_factor).prod(-1).to(device)  # (batch, pictures)
        number = (input_ids == config.image_end_token_id).sum(-1)
        ends = input_ids[:0, 0] if ends is None else ends
        document = Document(config, counts, number, k, generation_config.max_new_tokens, pad, ends)
        table = self._cell_table(image_sizes, k, device)
        warpers = code_warpers(generation_config.image_settings)
        context, logits, prefixes = self._prefill_document(
            input_ids, scale, k, past_key_values, image_sizes, **model_kwargs
        )
        criteria = StoppingCriteriaList(c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria))
        # Who may count tokens sees no more than there are; that takes another wait for the device.
        blind = (*VOCABULARY_BLIND, EosTokenCriteria)
        counts_tokens = not all(isinstance(one, blind) for one in (*logits_processor, *criteria))
        written, faults = document.compacted(input_ids, pad, counts_tokens), Faults(input_ids)
        if isinstance(streamer, ImageStreamer):
            streamer.begin([self._grids_of(row) for row in image_sizes.tolist()], number.tolist(), k, config)
        call = self._step_call(generation_config, past_key_values=past_key_values, use_cache=True)
        is_done, writing, has_words = False, list(range(len(input_ids))), True
        while self._has_unfinished_sequences(is_done, synced_gpus, device=device):
            token = self._next_words(
                logits, writing, written, document.may_begin, logits_processor, generation_config, faults
            )
            visual = logits[..., config.image_token_offset :] if has_words else logits
            guidance = self._guidance(generation_config, document.progress[:, None])
            scores = self._code_scores(visual, guidance, written, written[:, :0], warpers)
            faults.look(scores)
            codes = pick_codes(scores, generation_config.image_settings["do_sample"], generation_config.generator)
            document.append(token, codes + config.image_token_offset)
            faults.present += 1
            written = document.compacted(input_ids, pad, counts_tokens)
            document.stop(criteria(written, None))
            self._stream_new(streamer, document, pad)
            if getattr(streamer, "cancelled", False):
                break
            live = document.live
            if prefixes is not None:
                context.begin_unconditional(document.begins, document.pick(prefixes))
                live = torch.cat([live, live & document.in_picture[:, None]])
            cells = None if table is None else look_up_cells(table, document.number[:, None], document.place)
            # The one wait for the device: which rows go on, and which of them with a word.
            done, writes = torch.stack([document.done, document.writes]).tolist()
            is_done, writing = all(done), [row for row, may_write in enumerate(writes) if may_write]
            if is_done and not synced_gpus:
                break
            has_words = bool(writing) or synced_gpus  # ranks call the same heads
            head = {"vocabulary": "all" if has_words else "visual", "logits_to_keep": k}
            logits = call(**context.feed(document.fed, live, cells), **head).logits
        faults.refuse()
        sequences = torch.cat([input_ids, document.tokens[:, : int(document.length.max())]], dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=past_key_values)

    def _next_words(
        self,
        logits: torch.Tensor,
        writing: list[int],
        written: torch.Tensor,
        may_begin: torch.Tensor,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        faults: Faults,
    ) -> torch.Tensor:
        """Choose what the rows that stand in their text, `writing`, go on with; others `(batch,)` get anything."""
        token, generator = written[:, -1].clone(), generation_config.generator
        if not writing:
            return token
        rows = torch.tensor(writing, device=written.device)
        if all(isinstance(processor, VOCABULARY_BLIND) for processor in logits_processor):
            scores = logits_processor(written[rows], self._word_scores(logits[rows, 0], may_begin[rows]))
        else:  # it may know rows by their number
            scores = logits_processor(written, self._word_scores(logits[: len(written), 0], may_begin))
            scores = self._word_scores(scores, may_begin)[rows]  # nor does it lead out of the grammar
        faults.look(scores, rows)
        own = [generator[row] for row in writing] if isinstance(generator, list) else generator
        token[rows] = pick_codes(scores[:, None], generation_config.do_sample, own).squeeze(1)
        return token

    def _step_call(self, generation_config: GenerationConfig, **step_inputs: Any) -> Callable:
        """
        Give the forward of decoding steps: compiled where the library would compile its own, that is with a static
        cache on an accelerator, or anywhere if `CompileConfig` says so.

        Masks are made outside of it, in one shape for all steps.
        """
        cache = step_inputs["past_key_values"]
        is_compiled = self._valid_auto_compile_criteria({"past_key_values": cache}, generation_config)
        compiled = self.get_compiled_call(generation_config.compile_config) if is_compiled else self.__call__

        def call(**inputs: Any):
            if not cache.is_compileable:
                return self(**inputs, **step_inputs)
            rows, width = inputs["input_ids"].shape
            masks = self.model.masks(
                inputs_embeds=torch.empty(rows, width, 0, dtype=self.dtype, device=self.device),
                attention_mask=inputs.pop("attention_mask"),
                past_key_values=cache,
                position_ids=inputs["position_ids"],
                block_sequence_ids=inputs.pop("block_ids", None),
            )
            inputs["attention_mask"] = {
                kind: mask if mask is None else mask.contiguous() for kind, mask in masks.items()
            }
            is_one_step = width == generation_config.codes_per_step  # a given beginning comes as several at once
            return (compiled if is_one_step else self)(**inputs, **step_inputs)

        return call

    def _word_scores(self, logits: torch.Tensor, may_begin: torch.Tensor) -> torch.Tensor:
        """The grammar of text: words, and `<img>` in rows `(batch,)` that have room for a picture."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).clone()
        start = scores[:, self.config.image_start_token_id].masked_fill(~may_begin, -torch.inf)
        scores[:, self.config.image_token_offset :] = -torch.inf
        scores[:, self.config.image_start_token_id] = start
        return scores

    def _enlarged(self, input_ids: torch.Tensor, grids: list[tuple[int, int]]) -> list[list[torch.LongTensor]] | None:
        """The codes of enlarged small pictures, one a row, for a model that embeds them."""
        if not self.config.lowres_embedding:
            return None
        factor = self.config.downsample_factor
        return self.enlarge_small_pictures(input_ids, [[(height * factor, width * factor)] for height, width in grids])

    def _cell_table(self, image_sizes: torch.Tensor, k: int, device: torch.device) -> torch.Tensor | None:
        if not self.config.cell_embedding:
            return None
        grids = [self._grids_of(row) for row in image_sizes.tolist()]
        return cell_table(grids, k, self.config.code_order).to(device)

    def _prefill_document(
        self,
        input_ids: torch.Tensor,
        scale: float,
        k: int,
        past_key_values,
        image_sizes: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        negative_input_ids: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        **unused: Any,
    ) -> tuple[DrawingContext, torch.Tensor, torch.Tensor | None]:
        """
        Feed the prompts, and under guidance the unconditional prefix of every picture, each in columns of its own.

        Returns:
            The context, the logits `(rows, 1, vocab_size)` that follow the prompts, and the masks
            `(batch, pictures, columns)` of the prefixes.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs: dict[str, Any] = {"past_key_values": past_key_values, "use_cache": True, "logits_to_keep": 1}
        inputs["codes_per_step"] = max(k, *self.config.trained_codes_per_step)  # of the prompt's pictures
        if scale == 1.0 or negative_input_ids is None:
            positions = position_ids_of(attention_mask)
            inputs["image_sizes"] = image_sizes
            logits = self(input_ids, attention_mask=attention_mask, position_ids=positions, **inputs).logits
            return DrawingContext(attention_mask, k, copies=1), logits, None
        if negative_input_ids.ndim == 2:  # one size for all pictures
            negative_input_ids = negative_input_ids[:, None]
            negative_attention_mask = None if negative_attention_mask is None else negative_attention_mask[:, None]
        if negative_attention_mask is None:
            negative_attention_mask = torch.ones_like(negative_input_ids)
        masks: list[torch.Tensor] = []
        seen = attention_mask[:, :0]
        inputs["image_sizes"] = image_sizes.repeat(2, 1, 1)
        first_logits: Any = None
        for ids, own in zip(negative_input_ids.unbind(1), negative_attention_mask.unbind(1), strict=True):
            words = input_ids if first_logits is None else torch.zeros_like(ids)
            words_mask = attention_mask if first_logits is None else torch.zeros_like(own)
            rows, mask = self._prompt_rows(words, True, words_mask, ids, own)
            whole = torch.cat([torch.cat([seen, torch.zeros_like(seen)]), mask], dim=1)
            seen = whole[: len(input_ids)]
            positions = position_ids_of(mask)
            logits = self(rows, attention_mask=whole, position_ids=positions, **inputs).logits
            first_logits = logits if first_logits is None else first_logits
            masks.append(whole[len(input_ids) :])
        width = seen.shape[1]
        prefixes = torch.stack([F.pad(mask, (0, width - mask.shape[1])) for mask in masks], dim=1)
        context = DrawingContext(torch.cat([seen, torch.zeros_like(seen)]), k, copies=2)
        return context, first_logits, prefixes

    def _prefill_prompt(self, rows: torch.Tensor, mask: torch.Tensor, synced_gpus: bool, **step_inputs: Any) -> None:
        # Ranks that must stay in step call both experts, whatever their own prompts are.
        is_text = not synced_gpus and not bool((rows >= self.config.image_token_offset).any())
        modality = "text" if is_text else None
        self(rows, attention_mask=mask, position_ids=position_ids_of(mask), modality=modality, **step_inputs)

    @staticmethod
    def _stream(streamer, tokens: torch.Tensor) -> None:
        """Hand over columns of tokens `(batch, columns)` one by one."""
        if streamer is not None:
            for column in tokens.cpu().unbind(1):
                streamer.put(column)

    def _stream_new(self, streamer, document: Document, pad: int) -> None:
        """Hand over what the rows of a document got in the step just made."""
        if streamer is not None:
            columns = torch.where(document.live, document.fed, pad)[:, document.live.any(0)]
            self._stream(streamer, columns)

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
            torch.cat([F.pad(part, (width - part.shape[1], 0)) for part in pair])
            for pair in ((input_ids, negative_input_ids), (attention_mask, negative_attention_mask))
        )
        return ids, mask

    def _code_scores(
        self,
        logits: torch.Tensor,
        guidance: torch.Tensor | None,
        input_ids: torch.Tensor,
        drawn: torch.Tensor,
        logits_processor: LogitsProcessorList,
    ) -> torch.Tensor:
        """
        Guidance, then the grammar (codes only), then the sampler's processors.

        Args:
            logits (`torch.Tensor` of shape `(rows, slots, num_visual_tokens)`): Of the slots of one step.
            guidance (`torch.Tensor` of shape `(batch, 1)` or `(batch, slots)`, *optional*):
                Its strength; `None` is none.
            drawn (`torch.LongTensor` of shape `(batch, drawn)`): What of the picture is there already.

        Returns:
            `torch.Tensor` of shape `(batch, slots, codebook_size)`.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if guidance is not None:
            conditional, unconditional = logits.chunk(2)
            logits = guided(conditional, unconditional, guidance[..., None].to(logits))
        scores = logits[..., : self.config.codebook_size]
        if all(isinstance(processor, VOCABULARY_BLIND) for processor in logits_processor):
            return logits_processor(input_ids, scores.flatten(0, 1)).view_as(scores)
        seen = torch.cat([input_ids, drawn], dim=1)  # processors may know rows by their number: slot by slot
        widened = torch.stack([logits_processor(seen, self._widen(slot)) for slot in scores.unbind(1)], dim=1)
        return widened[..., self.config.image_token_offset :][..., : self.config.codebook_size]

    @staticmethod
    def _guidance(generation_config: GenerationConfig, progress: torch.Tensor) -> torch.Tensor | None:
        """Strength of guidance at a progress, of one shape; `None` where there are no unconditional rows."""
        scale = generation_config.image_guidance_scale
        if scale == 1.0:
            return None
        return guidance_at(scale, progress, generation_config.guidance_schedule, generation_config.guidance_interval)

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
        config = self.config
        ids = (config.image_token_offset, config.image_start_token_id, config.image_end_token_id)
        return PictureTokens(*ids, config.downsample_factor, config.code_order).collect(sequences, image_sizes)


__all__ = ["MarsGenerationMixin"]
