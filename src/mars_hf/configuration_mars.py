"""
Configuration of MARS: a dense Qwen, the codebook of a VQ-GAN, and how the two share one vocabulary.

The vocabulary is contiguous: text ids as in the language model, then one id per image code, then six specials, then
padding. Every number that follows from others is a property here and stands nowhere else.
"""

import difflib
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec, strict
from transformers.utils import logging

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    Filled = Any  # may be given as None; `__post_init__` fills it in
else:
    Filled = int | None

SUPPORTED_TEXT_MODELS = ("qwen2", "qwen3")

# `<img>` and `</img>` are the paper's (figure 3); it counts six specials and names no other, so the rest is ours:
# `<lowres>`, `</lowres>` enclose the picture that super-resolution starts from, `<null>` stands for the caption in
# the unconditional row of guidance, and `<imgpad>` is where a processor leaves room for codes.
SPECIAL_TOKENS = ("<img>", "</img>", "<lowres>", "</lowres>", "<null>", "<imgpad>")

# Version of a checkpoint's layout: names and shapes of tensors, what ids mean, how prompts are written. It grows when
# code of before would misread what code of now writes.
MARS_FORMAT = 1

# What the library itself hands to a configuration beside its fields.
LIBRARY_KEYS = frozenset(
    "auto_map custom_pipelines quantization_config attn_implementation experts_implementation output_attentions "
    "torch_dtype name_or_path model_type num_labels per_layer_config use_cache base_checkpoint".split()
)


@strict
class MarsConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MarsForConditionalGeneration`] (MARS, https://huggingface.co/papers/2407.07614).

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            The language model's own configuration: `Qwen2Config` (the default) or `Qwen3Config`.
        vq_config (`dict`, *optional*):
            Configuration of the diffusers `VQModel` that turns pictures into codes and back. `None` leaves it out:
            such a model takes and gives codes.
        codebook_size (`int`, *optional*):
            Number of image codes. Defaults to the `VQModel`'s, or 8,192 as in the paper.
        downsample_factor (`int`, *optional*):
            Side in pixels of the square that one code stands for. Defaults to the `VQModel`'s, or 16.
        pad_vocab_to_multiple_of (`int`, defaults to 8):
            The vocabulary is padded to a multiple of this. Padding rows have probability zero.
        use_visual_expert (`bool`, defaults to `True`):
            Give visual tokens their own projections and feed-forward blocks (the paper's SemVIE). `False` is the
            paper's ablation: one set of weights for both modalities, which then has to be trained.
        expert_output_projection (`bool`, defaults to `False`):
            Also give visual tokens their own attention output projection. The paper's equation 3 and figure share
            it, its count of trainable parameters fits both.
        expert_impl (`str`, defaults to `"gather"`):
            How a call with both modalities is computed: `"gather"` sends each token through its own expert only,
            `"where"` sends all through both and selects, for export and for distributed ranks that must stay in step.
        default_image_size (`int`, *optional*):
            Height and width in pixels of a picture when none is asked for. Defaults to 16 codes a side.
        codes_per_step (`int` or `list[int]`, defaults to 1):
            Codes that one step draws, the K of next-K-token prediction: what the model was trained for. Of several,
            the first is what `generate` takes by default.
        code_order (`str`, defaults to `"raster"`):
            Order in which codes are emitted: `"raster"`, `"region"` or `"block2x2"`.
        cell_embedding (`bool`, defaults to `False`):
            Add learnt embeddings of the cell that a token holds and of the cell that it predicts. They start at zero.
            Needed for an order other than raster, where positions alone do not tell the cell.
        max_grid_size (`int`, defaults to 64):
            Largest number of rows or columns of codes that the cell embeddings know.
        super_resolution_factor (`int`, *optional*):
            A model of super-resolution (Stage III): its prompts end in the codes of a picture so many times smaller
            on each side than the one that is drawn. None draws from text alone.
        lowres_embedding (`bool`, defaults to `False`):
            In super-resolution, add to each token of a picture a learnt embedding of the code that the small picture,
            enlarged by bicubic interpolation, has in the cell that the token predicts. Ours, not in the paper,
            which leaves it to attention to find out what belongs in a cell.
        base_checkpoint (`dict[str, str]`, *optional*):
            `{"path", "sha256"}` of the checkpoint against which this one is stored; see `weights_mars.py`.
        mars_format (`int`, defaults to 1):
            Version of the checkpoint's layout. Code refuses a version that it does not know.
        use_cache (`bool`, defaults to `True`): Whether a forward returns keys and values unless it is told.

    Raises:
        ValueError: If a value is impossible, two sizes contradict each other, the text model is not supported, an
            unknown key looks like a misspelt one, or the checkpoint is of another model or a later layout.

    Example:
        >>> config = MarsConfig()  # Qwen-7B's numbers
        >>> config.image_token_offset, config.vocab_size
        (151936, 160136)
    """

    model_type = "mars"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs_defaults: ClassVar[dict] = {
        "text_config": SubConfigSpec(
            config_class=AutoConfig, model_type="qwen2", init_kwargs={"intermediate_size": 11008}
        )
    }
    base_model_fsdp_plan: ClassVar[dict] = {}
    base_model_tp_plan: ClassVar[dict] = {
        **{f"layers.*.self_attn.{p}{name}_proj": "colwise" for name in "qkv" for p in ("", "visual_")},
        **{f"layers.*.self_attn.{p}o_proj": "rowwise" for p in ("", "visual_")},
        **{f"layers.*.{p}mlp.{name}_proj": "colwise" for name in ("gate", "up") for p in ("", "visual_")},
        **{f"layers.*.{p}mlp.down_proj": "rowwise" for p in ("", "visual_")},
    }

    text_config: Any = None  # dict or PreTrainedConfig
    vq_config: dict | None = None
    codebook_size: Filled = None
    downsample_factor: Filled = None
    pad_vocab_to_multiple_of: int = 8
    use_visual_expert: bool = True
    expert_output_projection: bool = False
    expert_impl: Literal["gather", "where"] = "gather"
    default_image_size: Filled = None
    codes_per_step: int | list[int] = 1
    code_order: Literal["raster", "region", "block2x2"] = "raster"
    cell_embedding: bool = False
    max_grid_size: int = 64
    super_resolution_factor: int | None = None
    lowres_embedding: bool = False
    base_checkpoint: dict[str, str] | None = None
    mars_format: int = MARS_FORMAT
    use_cache: bool = True
    tie_word_embeddings: bool | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        if (family := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(
                f"This checkpoint is of type '{family}', but a MARS is of type '{cls.model_type}'. Name a folder or "
                "repository that holds a MARS, or make one of this language model with `mars-hf convert`."
            )
        return super().from_dict({"mars_format": 1, **config_dict}, **kwargs)  # the first layout was not numbered

    def __post_init__(self, **kwargs: Any):
        self._refuse_other_formats()
        self._refuse_misspelt(kwargs)
        self._refuse_other_text_models()
        super().__post_init__(**kwargs)
        if self.vq_config is not None:
            # As JSON gives it back.
            self.vq_config = {k: list(v) if isinstance(v, tuple) else v for k, v in self.vq_config.items()}
            self._follow_vq_config(self.vq_config)
        if self.codebook_size is None:
            self.codebook_size = 8192
        if self.downsample_factor is None:
            self.downsample_factor = 16
        if self.default_image_size is None:
            self.default_image_size = 16 * self.downsample_factor
        if self.tie_word_embeddings is None:
            # The library ties by the top-level switch; the text model decides.
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self._refuse_impossible()

    def _refuse_other_formats(self) -> None:
        if not 1 <= self.mars_format <= MARS_FORMAT:
            raise ValueError(
                f"`mars_format` of this checkpoint is {self.mars_format}, but this code reads 1 to {MARS_FORMAT}: "
                "code and weights do not match. Update mars_hf, or in a Hub folder take all files of one revision."
            )

    def _refuse_misspelt(self, kwargs: dict[str, Any]) -> None:
        known = [name for name in self.__dataclass_fields__ if not name.startswith("_")]
        ours = [name for name in known if name in MarsConfig.__annotations__]
        unknown = [key for key in kwargs if key not in known and key not in LIBRARY_KEYS and not key.startswith("_")]
        for key in unknown:
            if close := difflib.get_close_matches(key, ours, n=1, cutoff=0.8):
                raise ValueError(f"`{key}` is no field of MarsConfig; did you mean `{close[0]}`?")
        if unknown:
            logger.warning(f"MarsConfig keeps keys that it does not know: {', '.join(sorted(unknown))}.")

    def _refuse_other_text_models(self) -> None:
        text = self.text_config
        family = text.get("model_type", "qwen2") if isinstance(text, dict) else getattr(text, "model_type", "qwen2")
        if family not in SUPPORTED_TEXT_MODELS:
            raise ValueError(
                f"`text_config` is of type '{family}', but MARS is built on dense Qwen models: expected one of "
                f"{', '.join(SUPPORTED_TEXT_MODELS)}. Convert the language model to Qwen2's shape first."
            )

    def _follow_vq_config(self, vq_config: dict[str, Any]) -> None:
        channels = vq_config.get("block_out_channels", (64,))
        derived = {
            "codebook_size": vq_config.get("num_vq_embeddings", 256),
            "downsample_factor": 2 ** (len(channels) - 1),
        }
        for field, value in derived.items():
            given = getattr(self, field)
            if given is not None and given != value:
                raise ValueError(
                    f"`{field}` is {given}, but `vq_config` makes it {value}. Leave `{field}` out, or use the "
                    "VQ-GAN that belongs to it."
                )
            setattr(self, field, value)

    def _refuse_impossible(self) -> None:
        sizes = (
            "codebook_size",
            "downsample_factor",
            "pad_vocab_to_multiple_of",
            "default_image_size",
            "max_grid_size",
        )
        for field in sizes:
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be 1 or more, got {getattr(self, field)}.")
        if not self.trained_codes_per_step or min(self.trained_codes_per_step) < 1:
            raise ValueError(f"`codes_per_step` must be 1 or more, or a list of such, got {self.codes_per_step}.")
        factor = self.super_resolution_factor
        if factor is not None and factor < 2:
            raise ValueError(f"`super_resolution_factor` must be 2 or more, or None, got {factor}.")
        if factor is not None and self.default_image_size % (factor * self.downsample_factor):
            raise ValueError(
                f"`default_image_size` must be a multiple of `downsample_factor` times `super_resolution_factor` "
                f"({self.downsample_factor} x {factor}), got {self.default_image_size}."
            )
        if self.lowres_embedding and (factor is None or not self.cell_embedding):
            raise ValueError(
                "`lowres_embedding` is True, but it goes with `super_resolution_factor` and `cell_embedding=True`, "
                f"which tell the cells that small codes belong to; got {factor} and {self.cell_embedding}."
            )
        if self.code_order != "raster" and not self.cell_embedding:
            raise ValueError(
                f"`code_order` is {self.code_order!r}, but `cell_embedding` is False: outside raster order a token "
                "cannot tell which cell it draws. Set `cell_embedding=True`."
            )
        if self.default_image_size % self.downsample_factor:
            raise ValueError(
                f"`default_image_size` must be a multiple of `downsample_factor` ({self.downsample_factor}), got "
                f"{self.default_image_size}."
            )
        if self.expert_output_projection and not self.use_visual_expert:
            raise ValueError(
                "`expert_output_projection` is True, but `use_visual_expert` is False: without visual experts there "
                "is nothing to give an output projection to. Set one of the two the other way."
            )
        text = self.text_config
        if self.tie_word_embeddings != text.tie_word_embeddings:
            raise ValueError(
                f"`tie_word_embeddings` is {self.tie_word_embeddings}, but the text model's is "
                f"{text.tie_word_embeddings}. Leave it out: the text model decides."
            )
        if text.num_attention_heads % text.num_key_value_heads:
            raise ValueError(
                f"`text_config.num_attention_heads` ({text.num_attention_heads}) must be a multiple of "
                f"`text_config.num_key_value_heads` ({text.num_key_value_heads})."
            )
        if getattr(text, "head_dim", None) is None and text.hidden_size % text.num_attention_heads:
            raise ValueError(
                f"`text_config.hidden_size` ({text.hidden_size}) must be a multiple of "
                f"`text_config.num_attention_heads` ({text.num_attention_heads})."
            )

    @property
    def trained_codes_per_step(self) -> list[int]:
        """Every K that the model was trained for, the default one first."""
        return [self.codes_per_step] if isinstance(self.codes_per_step, int) else list(self.codes_per_step)

    @property
    def text_vocab_size(self) -> int:
        """Number of text ids, as in the language model's embedding. Ids from here on are visual."""
        return self.text_config.vocab_size

    @property
    def image_token_offset(self) -> int:
        """Id of image code 0: `input_ids = image_codes + config.image_token_offset`."""
        return self.text_vocab_size

    @property
    def vocab_size(self) -> int:
        """Number of ids: text, codes, specials and padding."""
        used = self.text_vocab_size + self.codebook_size + len(SPECIAL_TOKENS)
        return -(-used // self.pad_vocab_to_multiple_of) * self.pad_vocab_to_multiple_of

    @property
    def num_visual_tokens(self) -> int:
        """Rows of the visual embedding and the vision head: codes, specials and padding."""
        return self.vocab_size - self.text_vocab_size

    @property
    def num_padding_tokens(self) -> int:
        """Rows at the end of the vocabulary that no token uses."""
        return self.num_visual_tokens - self.codebook_size - len(SPECIAL_TOKENS)

    def _special_token_id(self, token: str) -> int:
        return self.image_token_offset + self.codebook_size + SPECIAL_TOKENS.index(token)

    @property
    def image_start_token_id(self) -> int:
        """Id of `<img>`."""
        return self._special_token_id("<img>")

    @property
    def image_end_token_id(self) -> int:
        """Id of `</img>`."""
        return self._special_token_id("</img>")

    @property
    def lowres_start_token_id(self) -> int:
        """Id of `<lowres>`."""
        return self._special_token_id("<lowres>")

    @property
    def lowres_end_token_id(self) -> int:
        """Id of `</lowres>`."""
        return self._special_token_id("</lowres>")

    @property
    def null_token_id(self) -> int:
        """Id of `<null>`."""
        return self._special_token_id("<null>")

    @property
    def image_pad_token_id(self) -> int:
        """Id of `<imgpad>`."""
        return self._special_token_id("<imgpad>")


__all__ = ["MARS_FORMAT", "MarsConfig", "SPECIAL_TOKENS"]
