"""
MARS: a frozen language model with a visual expert beside every projection and feed-forward block.

Reading order: `ModalityRouter` says which expert a token belongs to, `MarsAttention` and `MarsDecoderLayer` apply it
(SemVIE, the paper's section 3.3), `MarsModel` is the trunk, `MarsForConditionalGeneration` adds the two heads and the
VQ-GAN. Building blocks that do not differ from Qwen2 are Qwen2's own. Decoding is in `generation_mars.py`, turning
pictures into pixels is the processor's.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import VQModel
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import GENERATION_CONFIG_NAME, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .code_order_mars import PictureLayout, find_cells, find_small_pictures, sizes_by_row, to_emission_order
from .configuration_mars import MarsConfig
from .generation_mars import MarsGenerationMixin
from .image_processing_mars import decode_codes, encode_pixels, enlarge_codes
from .weights_mars import (
    HUB_ARGUMENTS,
    adapter_base,
    base_of,
    complete_weights,
    put_on_adapter,
    stored_generation_config,
)

Modality = Literal["text", "image"]
Vocabulary = Literal["all", "text", "visual"]


class PermuteRows(torch.autograd.Function):
    """`rows[order]` for a permutation: the backward is the inverse permutation, not the scatter of a general index."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


class ModalityRouter:
    """
    Sends each token to the expert of its own modality (the router of the paper's figure 3; it has no weights).

    Built once per forward and handed down to all layers. `split` gives what each expert reads, `merge` puts back
    together what they answer.

    Args:
        visual_mask (`torch.BoolTensor` of shape `(batch, seq)`):
            `True` where a token is visual.
        modality (`str`, *optional*):
            `"text"` or `"image"` if every token of the call is known to be of that modality: a dense call.
        impl (`str`): `"gather"` or `"where"`, see [`MarsConfig`].
    """

    def __init__(self, visual_mask: torch.Tensor, modality: Modality | None, impl: str):
        self.visual_mask, self.modality, self.impl = visual_mask, modality, impl
        if modality is None and impl == "gather":
            flat = visual_mask.flatten()
            self.order = torch.argsort(flat.to(torch.uint8), stable=True)  # text first, each kind in its order
            self.inverse = torch.argsort(self.order)
            num_visual = int(flat.sum())  # the one host synchronisation of a forward
            self.counts = (flat.numel() - num_visual, num_visual)
        self._elsewhere: dict[torch.device, ModalityRouter] = {}

    def to(self, device: torch.device | str | int, **unused: Any) -> "ModalityRouter":
        """Give a copy on another device, made once: accelerate calls this where layers lie on several."""
        device = torch.empty(0, device=device).device  # an index names the accelerator of that number
        if device == self.visual_mask.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = other = copy.copy(self)
            for name in ("visual_mask", "order", "inverse"):
                if hasattr(self, name):
                    setattr(other, name, getattr(self, name).to(device))
        return self._elsewhere[device]

    def split(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the rows that the text and the visual expert read, from states of shape `(batch, seq, hidden)`."""
        if self.modality is not None or self.impl == "where":
            return hidden_states, hidden_states
        return PermuteRows.apply(hidden_states.flatten(0, 1), self.order, self.inverse).split(self.counts)

    def merge(self, parts: tuple[torch.Tensor, torch.Tensor], text: Callable, visual: Callable) -> torch.Tensor:
        """
        Apply the experts to what `split` gave and put the answers in token order.

        An expert that has no token is called all the same in a mixed call: distributed ranks stay in step, and its
        gradient is zero instead of missing.
        """
        if self.modality is not None:
            return text(parts[0]) if self.modality == "text" else visual(parts[1])
        text_output, visual_output = text(parts[0]), visual(parts[1])
        if self.impl == "where":
            return torch.where(self.visual_mask[..., None], visual_output, text_output)
        merged = PermuteRows.apply(torch.cat([text_output, visual_output]), self.inverse, self.order)
        return merged.view(*self.visual_mask.shape, -1)


def grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attend as the library's sdpa does, with a mask, but without copying keys and values for every head of a group: the
    heads of a group stand one behind the other as queries. In decoding the copies cost more than the attention.
    """
    batch, heads, length, head_dim = query.shape
    groups = heads // key.shape[1]
    queries = query.reshape(batch, key.shape[1], groups * length, head_dim)
    mask = attention_mask[..., : key.shape[-2]].repeat(1, 1, groups, 1)
    output = F.scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(batch, heads, length, head_dim).transpose(1, 2), None  # kernels differ in memory order


class MarsAttention(nn.Module):
    """
    Multi-head attention across modalities with separate projections per modality (Attention-MoE, equation 3).

    Each token is projected to query, key and value by the expert of its own modality; all tokens then attend to one
    another under a single causal mask and share one output projection, unless the configuration gives it an expert.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    visual_o_proj: nn.Linear

    def __init__(self, config: MarsConfig, layer_idx: int):
        super().__init__()
        text = config.text_config
        self.config, self.layer_idx = text, layer_idx
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.num_key_value_groups = text.num_attention_heads // text.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = text.attention_dropout
        self.is_causal = True
        self.sliding_window = text.sliding_window if text.layer_types[layer_idx] == "sliding_attention" else None

        is_qwen3 = text.model_type == "qwen3"
        qkv_bias, output_bias = (text.attention_bias, text.attention_bias) if is_qwen3 else (True, False)
        width, kv_width = text.num_attention_heads * self.head_dim, text.num_key_value_heads * self.head_dim
        for prefix in ("", "visual_") if config.use_visual_expert else ("",):
            self.add_module(f"{prefix}q_proj", nn.Linear(text.hidden_size, width, bias=qkv_bias))
            self.add_module(f"{prefix}k_proj", nn.Linear(text.hidden_size, kv_width, bias=qkv_bias))
            self.add_module(f"{prefix}v_proj", nn.Linear(text.hidden_size, kv_width, bias=qkv_bias))
        for prefix in ("", "visual_") if config.expert_output_projection else ("",):
            self.add_module(f"{prefix}o_proj", nn.Linear(width, text.hidden_size, bias=output_bias))
        # Qwen3 normalises queries and keys of each head; as all norms, these are shared and frozen.
        self.q_norm = Qwen2RMSNorm(self.head_dim, eps=text.rms_norm_eps) if is_qwen3 else nn.Identity()
        self.k_norm = Qwen2RMSNorm(self.head_dim, eps=text.rms_norm_eps) if is_qwen3 else nn.Identity()

    def _expert(self, name: str) -> Callable:
        """The visual counterpart of a text module, or that module itself where both modalities share it."""
        return getattr(self, f"visual_{name}", None) or getattr(self, name)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        router: ModalityRouter,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)

        parts = router.split(hidden_states)
        query = router.merge(parts, self.q_proj, self._expert("q_proj")).view(head_shape)
        key = router.merge(parts, self.k_proj, self._expert("k_proj")).view(head_shape)
        value = router.merge(parts, self.v_proj, self._expert("v_proj")).view(head_shape)
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)
        value = value.transpose(1, 2)  # (batch, kv_heads, seq, head_dim)

        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        is_drawing = router.modality == "image" and attention_mask is not None and not self.training
        if is_drawing and attention_interface is sdpa_attention_forward:
            attention_interface = grouped_sdpa
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        if hasattr(self, "visual_o_proj"):
            return router.merge(router.split(attn_output), self.o_proj, self.visual_o_proj), attn_weights
        return self.o_proj(attn_output), attn_weights


class MarsDecoderLayer(GradientCheckpointingLayer):
    """One layer of SemVIE: shared norms, attention and feed-forward block by modality (equations 3 and 4)."""

    def __init__(self, config: MarsConfig, layer_idx: int):
        super().__init__()
        text = config.text_config
        self.self_attn = MarsAttention(config, layer_idx)
        self.mlp = Qwen2MLP(text)
        if config.use_visual_expert:
            self.visual_mlp = Qwen2MLP(text)
        self.input_layernorm = Qwen2RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, router: ModalityRouter, **kwargs: Any) -> torch.Tensor:
        residual = hidden_states
        hidden_states, _ = self.self_attn(self.input_layernorm(hidden_states), router=router, **kwargs)
        hidden_states = residual + hidden_states

        residual = hidden_states
        parts = router.split(self.post_attention_layernorm(hidden_states))
        return residual + router.merge(parts, self.mlp, getattr(self, "visual_mlp", self.mlp))


class CellEmbedding(nn.Module):
    """
    Learnt embeddings of the cells of a picture, for next-K-token prediction (ours, not in the paper).

    Args:
        max_grid_size (`int`): Largest number of rows or columns.
        hidden_size (`int`): Width of the trunk.
        num_codes (`int`, *optional*): Also embed the codes of the enlarged small picture, which are so many.
    """

    def __init__(self, max_grid_size: int, hidden_size: int, num_codes: int | None = None):
        super().__init__()
        for name in ("row_in", "column_in", "row_out", "column_out"):
            self.register_parameter(name, nn.Parameter(torch.zeros(max_grid_size, hidden_size)))
        if num_codes is not None:
            self.lowres_code = nn.Parameter(torch.zeros(num_codes, hidden_size))

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """Sum up, for cells `(batch, seq, 4 or 5)` as `find_cells` gives them, `(batch, seq, hidden)`."""
        total: Any = 0
        for table, index in zip(self.parameters(), cells.unbind(-1), strict=True):
            total = total + F.embedding(index.clamp_min(0), table) * (index >= 0)[..., None]
        return total


class MarsPreTrainedModel(PreTrainedModel):
    """Weights, loading and freezing shared by the MARS classes."""

    config: MarsConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MarsDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MarsDecoderLayer, "attentions": MarsAttention}

    def __init__(self, config: MarsConfig):
        asked = config._attn_implementation
        super().__init__(config)
        # The layers read the text model's part, which follows what the library makes of the request (sdpa for None,
        # a kernel for an absent flash attention), unless it was given an attention of its own.
        if config.text_config._attn_implementation == asked:
            config.text_config._attn_implementation = config._attn_implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, VQModel):
            for part in module.modules():
                super()._init_weights(part)
            bound = 1.0 / module.config.num_vq_embeddings
            init.uniform_(module.quantize.embedding.weight, -bound, bound)
        elif isinstance(module, CellEmbedding):
            for table in module.parameters():  # at the start the function is that of a model without
                init.zeros_(table)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any):
        """
        Load a checkpoint, strictly, and freeze the text part. One that is stored against a base is completed by it; a
        PEFT adapter by itself is put on its base.

        See [`~PreTrainedModel.from_pretrained`] for the arguments. Loading resets what is trainable, so the freeze
        is made anew here.

        Raises:
            ValueError: If a tensor is missing, unexpected or of the wrong shape, or the base is another one.
        """
        if (adapted := cls._with_adapter(pretrained_model_name_or_path, kwargs)) is not None:
            base, adapter, options, kwargs = adapted
            loaded = cls.from_pretrained(base, *args, **kwargs)
            put_on_adapter(loaded[0] if isinstance(loaded, tuple) else loaded, adapter, adapter_kwargs=options)
            return loaded
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs and key not in ("subfolder", "token")}
        name, kwargs = cls._with_base(pretrained_model_name_or_path, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        problems = {
            kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        if not hasattr(model, "vision_head"):
            problems["unexpected_keys"] = []  # a trunk alone may be loaded from a full checkpoint
        if may_mismatch:
            problems["mismatched_keys"] = []
        found = "; ".join(f"{kind.replace('_keys', '')}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
        if found:
            raise ValueError(f"The checkpoint does not fit the model of its configuration. Tensors {found}.")
        if model.config.use_visual_expert:
            model.freeze_text()
        model._hub_arguments = hub  # what else the repository holds comes of the same revision
        return (model, info) if wants_info else model

    @staticmethod
    def _with_adapter(name: Any, kwargs: dict[str, Any]) -> tuple[str, str | Path, dict, dict] | None:
        """Find the base of a folder with an adapter alone; the Auto classes have put its name in the place already."""
        if name is None:
            return None
        options = kwargs.get("adapter_kwargs") or {}
        adapter, subfolder = options.get("_adapter_model_path"), kwargs.get("subfolder") or ""
        rest = {key: value for key, value in kwargs.items() if key not in ("adapter_kwargs", "subfolder")}
        if adapter is not None and str(adapter) == str(name):
            return None  # a whole model with an adapter beside it, which the library puts on
        if adapter is not None:
            options = {key: value for key, value in options.items() if key != "_adapter_model_path"}
            return name, adapter, options, {**rest, "subfolder": subfolder}
        base = adapter_base(name, subfolder)
        return None if base is None else (base, Path(name) / subfolder, options, rest)

    @classmethod
    def _with_base(cls, name: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Exchange the name of a checkpoint that is stored against a base for the weights of both."""
        if name is None or kwargs.get("state_dict") is not None:
            return name, kwargs
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        base, subfolder = base_of(name, **hub), hub.get("subfolder")
        if base is None and subfolder and (Path(name) / subfolder / GENERATION_CONFIG_NAME).is_file():
            return name, {"generation_config": stored_generation_config(name, **hub), **kwargs}
        if base is None:
            return name, kwargs
        rest = {key: value for key, value in kwargs.items() if key not in HUB_ARGUMENTS}
        config = copy.deepcopy(rest.pop("config", None))
        if not isinstance(config, PreTrainedConfig):
            options = {key: rest.pop(key) for key in list(rest) if key in MarsConfig.__annotations__}
            config = cls.config_class.from_pretrained(config or name, **hub, **options)
        config.base_checkpoint = None  # what is loaded is complete, and is saved so
        rest.setdefault("generation_config", stored_generation_config(name, **hub))
        return None, {**rest, "config": config, "state_dict": complete_weights(name, base, **hub)}

    def freeze_text(self) -> None:
        """
        Freeze the language model, shared norms and output projection, and the VQ-GAN; train the visual part.

        Raises:
            ValueError: If the configuration has no visual experts: then the shared weights are what is trained.
        """
        if not self.config.use_visual_expert:
            raise ValueError("`freeze_text()` needs `use_visual_expert=True`: without experts all weights are shared.")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_visual_parameter(name) and parameter.is_floating_point())  # not if quantised

    def resize_token_embeddings(self, *args: Any, **kwargs: Any):
        """Refuse: the vocabulary is text, codes, specials and padding at fixed places."""
        raise ValueError(
            "MARS cannot resize its vocabulary: image codes and specials stand at fixed ids behind the text ids. Use "
            "ids that the text tokenizer leaves free, or convert a language model with a larger vocabulary."
        )


def is_visual_parameter(name: str) -> bool:
    """
    Say whether a parameter belongs to the visual part, which trains, by its name.

    Example:
        >>> is_visual_parameter("model.layers.0.self_attn.visual_q_proj.weight")
        True
    """
    return any(part.startswith("visual_") or part == "vision_head" for part in name.split("."))


def _end_tokens(text_model: PreTrainedModel) -> list[int]:
    """Ids that end a text, from the language model's generation config or its configuration."""
    for source in (text_model.generation_config, text_model.config):
        if source.eos_token_id is not None:
            return list(source.eos_token_id) if isinstance(source.eos_token_id, list) else [source.eos_token_id]
    return []


class MarsModel(MarsPreTrainedModel):
    """The trunk of MARS: two embedding tables, SemVIE layers, the language model's final norm."""

    def __init__(self, config: MarsConfig):
        super().__init__(config)
        text = config.text_config
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.visual_embed_tokens = nn.Embedding(config.num_visual_tokens, text.hidden_size)
        if config.cell_embedding:
            num_codes = config.codebook_size if config.lowres_embedding else None
            self.visual_cell_embedding = CellEmbedding(config.max_grid_size, text.hidden_size, num_codes)
        self.layers = nn.ModuleList([MarsDecoderLayer(config, index) for index in range(text.num_hidden_layers)])
        self.norm = Qwen2RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config=text)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, input_ids: torch.Tensor, visual_mask: torch.Tensor, modality: Modality | None) -> torch.Tensor:
        """Look ids `(batch, seq)` up in the table of their modality."""
        if modality == "text":
            return self.embed_tokens(input_ids)
        visual_ids = input_ids - self.config.image_token_offset
        if modality == "image":
            return self.visual_embed_tokens(visual_ids)
        text = self.embed_tokens(input_ids.masked_fill(visual_mask, 0))
        return torch.where(visual_mask[..., None], self.visual_embed_tokens(visual_ids.clamp_min(0)), text)

    def masks(self, **kwargs: Any) -> dict[str, torch.Tensor | None]:
        """Make the masks of each type of layer; for the arguments see the library's `create_causal_mask`."""
        text = self.config.text_config
        masks = {"full_attention": create_causal_mask(config=text, **kwargs)}
        if "sliding_attention" in text.layer_types:
            masks["sliding_attention"] = create_sliding_window_causal_mask(config=text, **kwargs)
        return masks

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_mask: torch.Tensor | None = None,
        modality: Modality | None = None,
        block_ids: torch.Tensor | None = None,
        cells: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Run the trunk; each token goes through the expert of its modality.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Ids of the joint vocabulary.
            attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): 1 to attend, 0 to ignore.
            position_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Consecutive positions.
            past_key_values (`Cache`, *optional*): Keys and values of earlier tokens; extended in place.
            inputs_embeds (`torch.Tensor` of shape `(batch, seq, hidden)`, *optional*): Instead of `input_ids`.
            visual_mask (`torch.BoolTensor` of shape `(batch, seq)`, *optional*):
                `True` where a token is visual. Derived from `input_ids` if None; with `inputs_embeds`, None is text.
            modality (`str`, *optional*):
                `"text"` or `"image"` promises that all tokens are of that modality, which saves the routing.
            block_ids (`torch.LongTensor` of shape `(batch, past + seq)`, *optional*):
                Tokens of one number, -1 apart, see one another whatever their order (next-K-token prediction).
            cells (`torch.LongTensor` of shape `(batch, seq, 4)`, or 5 with `config.lowres_embedding`, *optional*):
                What `find_cells` gives; only with `config.cell_embedding`.
            use_cache (`bool`, *optional*): Return keys and values.

        Returns:
            [`BaseModelOutputWithPast`]: `last_hidden_state` of shape `(batch, seq, hidden)` and the cache.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        given = cast(torch.Tensor, inputs_embeds if input_ids is None else input_ids)
        if visual_mask is None:  # main diff with Qwen2: the id tells the modality
            visual_mask = torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
            visual_mask = visual_mask if input_ids is None else input_ids >= self.config.image_token_offset
        if visual_mask.shape != given.shape[:2]:
            raise ValueError(
                f"`visual_mask` must have shape {tuple(given.shape[:2])}, one entry per token, got "
                f"{tuple(visual_mask.shape)}."
            )
        hidden_states = given if input_ids is None else self.embed(given, visual_mask, modality)
        if cells is not None:
            hidden_states = hidden_states + self.visual_cell_embedding(cells)
        shared = modality if self.config.use_visual_expert else "text"
        router = ModalityRouter(visual_mask, shared, self.config.expert_impl)

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(given.shape[1], device=given.device)[None] + past_length

        if block_ids is not None and "flash" in (self.config.text_config._attn_implementation or ""):
            if bool((block_ids >= 0).any()):
                raise ValueError(
                    "Flash attention cannot let the tokens of a block see one another, as `codes_per_step` above 1 "
                    'needs. Load the model with `attn_implementation="sdpa"` or `"flex_attention"`.'
                )
            block_ids = None  # there is no picture
        masks = (
            attention_mask  # `generate` may have prepared them
            if isinstance(attention_mask, dict)
            else self.masks(
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                block_sequence_ids=block_ids,
            )
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer, layer_type in zip(self.layers, self.config.text_config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                router=router,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class MarsForConditionalGeneration(MarsPreTrainedModel, MarsGenerationMixin):
    """
    MARS complete: trunk, text head and vision head under one softmax, and the VQ-GAN.

    `model.vqgan` is a diffusers `VQModel`, or `None` if the configuration has none: such a model takes and gives
    codes only.
    """

    output_modalities = ("image", "text")
    _keep_in_fp32_modules = ["vqgan"]  # read by quantizers: what is in it is left alone
    _keep_in_fp32_modules_strict = ["vqgan"]
    _tied_weights_keys = {"text_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"text_head": "colwise_gather_output", "vision_head": "colwise_gather_output"}

    def __init__(self, config: MarsConfig):
        super().__init__(config)
        text = config.text_config
        self.model = MarsModel(config)
        # Before the heads: the library spares the last module of a model from quantisation, which is to be a head.
        self.vqgan = VQModel.from_config(config.vq_config) if config.vq_config is not None else None
        self.text_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.vision_head = nn.Linear(text.hidden_size, config.num_visual_tokens, bias=False)
        self.post_init()

    @classmethod
    def from_text_and_vq(
        cls,
        text_model: PreTrainedModel,
        vq_model: VQModel | None = None,
        end_of_text_id: int | None = None,
        **config_kwargs: Any,
    ):
        """
        Build a MARS from a loaded language model and VQ-GAN; visual experts start as copies of the text experts.

        As in the paper (section 3.3), visual embeddings start as the mean of the text embeddings. `<null>` starts as
        the row of the end-of-text token, the vision head as the mean text-head row plus a little noise: with equal
        rows the trunk would receive no gradient at the first step. Neither is stated in the paper.

        Args:
            text_model (`Qwen2ForCausalLM` or `Qwen3ForCausalLM`): The language model; copied, not changed.
            vq_model (`VQModel`, *optional*): The image tokenizer; copied, not changed.
            end_of_text_id (`int`, *optional*):
                Id of the token that separates documents, whose row `<null>` starts as. Defaults to the last of the
                language model's end tokens, which is `<|endoftext|>` for Qwen.
            config_kwargs: Further fields of [`MarsConfig`].

        Returns:
            [`MarsForConditionalGeneration`]: In the dtype of `text_model`, the text part frozen.

        Raises:
            ValueError: If the language model is of an unsupported type, or has no head.
        """
        if text_model.get_output_embeddings() is None:
            raise ValueError(f"`text_model` must be a causal language model, got {type(text_model).__name__}.")
        vq_config = None if vq_model is None else {k: v for k, v in vq_model.config.items() if not k.startswith("_")}
        fields = text_model.config.to_dict()
        fields.pop("_name_or_path", None)  # where the language model lay; nothing that a MARS should carry about
        text_config = type(text_model.config).from_dict(fields)
        config = MarsConfig(text_config=text_config, vq_config=vq_config, **config_kwargs)
        config._attn_implementation = text_model.config._attn_implementation
        model = cls(config).to(device=text_model.device, dtype=text_model.dtype)
        if vq_model is not None:
            model.vqgan.float().load_state_dict(vq_model.state_dict(), strict=True)
        ends = _end_tokens(text_model)
        if end_of_text_id is not None and end_of_text_id not in ends:
            ends = [*ends, end_of_text_id]  # captions and documents end so, whatever ends a turn of a chat
        model._copy_text_model(text_model, ends[-1] if end_of_text_id is None and ends else end_of_text_id)
        if config.use_visual_expert:
            model.freeze_text()
        # One of its own: what the library derives from a model's configuration loses further keys on loading.
        pad = text_model.generation_config.pad_token_id
        pad = text_model.config.pad_token_id if pad is None else pad
        model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=pad)
        return model.eval()

    @torch.no_grad()
    def _copy_text_model(self, text_model: PreTrainedModel, end_of_text_id: int | None) -> None:
        source = {name.replace("lm_head.", "text_head."): value for name, value in text_model.state_dict().items()}
        target = self.state_dict()
        for name in target:
            origin = name.replace("visual_", "") if is_visual_parameter(name) else name
            if origin in source and target[name].shape == source[origin].shape:
                target[name].copy_(source[origin])
        embeddings, head = source["model.embed_tokens.weight"], source["text_head.weight"]
        visual = self.model.visual_embed_tokens.weight
        visual.copy_(embeddings.float().mean(0).expand_as(visual))
        if end_of_text_id is not None:
            visual[self.config.null_token_id - self.config.image_token_offset] = embeddings[end_of_text_id]
        noise = torch.randn(self.vision_head.weight.shape, device=head.device) * (0.02 * head.float().std())
        self.vision_head.weight.copy_(head.float().mean(0) + noise)

    def _apply(self, fn: Callable, recurse: bool = True):
        """Move or cast; the VQ-GAN follows to any device, but never below float32: rounded, it picks other codes."""

        def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.is_floating_point() and moved.dtype.itemsize < 4 else moved

        vqgan = self._modules.get("vqgan")
        self._modules["vqgan"] = None  # in its place: the order of modules stays
        try:
            super()._apply(fn, recurse)
        finally:
            self._modules["vqgan"] = vqgan
        if vqgan is not None:
            vqgan._apply(at_least_float32)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.text_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.text_head = value

    def _require_vqgan(self) -> VQModel:
        if self.vqgan is None:
            raise ValueError(
                "This model carries no VQ-GAN (`config.vq_config` is None). Give and take image codes, or build it "
                "with one: `MarsForConditionalGeneration.from_text_and_vq(text_model, vq_model)`."
            )
        return self.vqgan

    @torch.no_grad()
    def encode_image(self, pixel_values: torch.Tensor | list[torch.Tensor]) -> list[torch.LongTensor]:
        """
        Turn pictures into codes.

        Args:
            pixel_values (`torch.Tensor` of shape `(num, 3, height, width)`, or a list of `(3, height, width)`):
                Pictures in [-1, 1]. Pictures of different sizes come as a list.

        Returns:
            `list[torch.LongTensor]`: For each picture its codes `(height / f, width / f)`, in [0, codebook_size).
        """
        return encode_pixels(self._require_vqgan(), pixel_values)

    @torch.no_grad()
    def decode_image_tokens(
        self,
        sequences: torch.Tensor,
        image_sizes: torch.Tensor | list | None = None,
        slice_size: int | None = 16,
    ) -> list[torch.Tensor]:
        """
        Turn every complete picture of generated sequences into pixels.

        Args:
            sequences (`torch.LongTensor` of shape `(num, seq)`): As `generate` returns them.
            image_sizes (`torch.LongTensor` of shape `(batch, pictures, 2)`, *optional*):
                Heights and widths in pixels. `num` may be a multiple of `batch`. A row's n-th picture has its n-th
                size, later ones the last. If None, pictures are square.
            slice_size (`int`, *optional*, defaults to 16):
                Most pictures that the VQ-GAN decodes at once, which bounds its memory; see [`decode_codes`].

        Returns:
            `list[torch.Tensor]`: One `(3, height, width)` in [-1, 1] for each `<img> .. </img>`, row after row.

        Raises:
            ValueError: If a picture's number of codes does not fit its size.
        """
        codes = [picture for row in self.collect_image_codes(sequences, image_sizes) for picture in row]
        return decode_codes(self._require_vqgan(), codes, slice_size)

    def fill_image_codes(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | list[torch.Tensor]
    ) -> torch.Tensor:
        """
        Replace every `<imgpad>` by the codes of the pictures, in order; within each in emission order.

        Raises:
            ValueError: If there are more or fewer pictures than runs of `<imgpad>`, or one does not fit its run.
        """
        return self.place_codes(input_ids, self.encode_image(pixel_values))

    def place_codes(self, input_ids: torch.Tensor, grids: list[torch.LongTensor]) -> torch.Tensor:
        """
        Replace every `<imgpad>` by the codes `(height / f, width / f)` of pictures; see
        [`~MarsForConditionalGeneration.fill_image_codes`]. What super-resolution starts from stands row by row.
        """
        places = input_ids == self.config.image_pad_token_id
        starts = places & ~F.pad(places, (1, 0))[:, :-1]
        runs = torch.bincount(starts.flatten().cumsum(0)[places.flatten()], minlength=1)[1:].tolist()
        if runs != [grid.numel() for grid in grids]:
            raise ValueError(
                f"`pixel_values` hold pictures of {[grid.numel() for grid in grids]} codes, but `input_ids` "
                f"leave runs of {runs} places (`<imgpad>`). Give both as one call of the processor returned them."
            )
        # K is the length of the run of `<img>` before the codes; without one they stand row by row.
        columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        others = torch.where(input_ids == self.config.image_start_token_id, -1, columns).cummax(1).values
        copies = (columns - 1 - F.pad(others, (1, -1), value=-1))[starts].tolist()
        order = self.config.code_order
        codes = torch.cat(
            [to_emission_order(grid, k or 1, order if k else "raster") for grid, k in zip(grids, copies, strict=True)]
        )
        return input_ids.masked_scatter(places, codes.to(input_ids.device) + self.config.image_token_offset)

    def _check_ids(self, input_ids: torch.Tensor) -> None:
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"`input_ids` must lie in [0, {self.config.vocab_size}), got {low} to {high}. Image codes become ids "
                "by `codes + config.image_token_offset`."
            )

    def compute_logits(self, hidden_states: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
        """
        Apply the heads to states `(batch, seq, hidden)`.

        Returns:
            `torch.Tensor`: Logits over the joint vocabulary, or over its text or visual part only. Padding is -inf.
        """
        if hidden_states.ndim > 2:  # a frozen head on a slice of states would leave torch's fast path on CPUs
            return self.compute_logits(hidden_states.flatten(0, -2), vocabulary).unflatten(0, hidden_states.shape[:-1])
        if vocabulary == "text":
            return self.text_head(hidden_states)
        padding = self.config.num_padding_tokens
        visual = self.vision_head(hidden_states)
        if padding:
            visual = F.pad(visual[..., :-padding], (0, padding), value=-torch.inf)
        if vocabulary == "visual":
            return visual
        words = self.text_head(hidden_states)
        return torch.cat([words, visual.to(words.device)], dim=-1)  # heads may lie on two devices

    def _longest_run(self, codes_per_step: int | None) -> int:
        return max(self.config.trained_codes_per_step) if codes_per_step is None else codes_per_step

    def _layout(
        self, input_ids: torch.Tensor | None, codes_per_step: int | None, past_key_values: Cache | None
    ) -> PictureLayout | None:
        """Find the pictures of whole rows, or give `None` where attention is causal and labels shift by one."""
        config = self.config
        if input_ids is None or (self._longest_run(codes_per_step) == 1 and not config.cell_embedding):
            return None
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return None
        return PictureLayout.of(input_ids, config.image_token_offset, config.image_start_token_id)

    def _cells(
        self, input_ids: torch.Tensor, layout: PictureLayout, image_sizes: torch.Tensor | None
    ) -> torch.Tensor | None:
        config = self.config
        starts = (input_ids == config.image_start_token_id) | (input_ids == config.lowres_start_token_id)
        if not config.cell_embedding or not bool(starts.any()):
            return None
        if image_sizes is None:
            raise ValueError("A model with `cell_embedding` needs the `image_sizes` of the pictures in `input_ids`.")
        sizes = sizes_by_row(image_sizes)
        enlarged = None
        if config.lowres_embedding:
            is_drawn = bool((layout.place >= 0).any())  # a prompt predicts no cell yet
            enlarged = self.enlarge_small_pictures(input_ids, sizes) if is_drawn else [[] for _ in input_ids]
        return find_cells(config, input_ids, layout, sizes, enlarged)

    def enlarge_small_pictures(
        self, input_ids: torch.Tensor, image_sizes: list[list[tuple[int, int]]]
    ) -> list[list[torch.LongTensor]]:
        """
        Give the codes of the small pictures in rows of super-resolution, enlarged; see [`enlarge_codes`].

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`): Prompts or whole rows.
            image_sizes (`list[list[tuple[int, int]]]`): Heights and widths in pixels of what is drawn of them.

        Returns:
            `list[list[torch.LongTensor]]`: For each row, codes `(height / f, width / f)` of each of its pictures.

        Raises:
            ValueError: If the model has no VQ-GAN, or a small picture does not fit the size that is drawn of it.
        """
        grids = find_small_pictures(self.config, input_ids, image_sizes)
        every = [grid for row in grids for grid in row]
        large = iter(enlarge_codes(self._require_vqgan(), every, self.config.super_resolution_factor or 1))
        return [[next(large) for _ in row] for row in grids]

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        image_sizes: torch.Tensor | None = None,
        negative_input_ids: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        modality: Modality | None = None,
        vocabulary: Vocabulary = "all",
        codes_per_step: int | None = None,
        block_ids: torch.Tensor | None = None,
        cells: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        head_loss: Callable | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Predict the next token over the joint vocabulary of text and image codes.

        Args:
            pixel_values (`torch.Tensor` of shape `(num, 3, height, width)` or a list of tensors, *optional*):
                Pictures in [-1, 1] whose codes take the places that `<imgpad>` keeps in `input_ids`.
            image_sizes (`torch.LongTensor` of shape `(batch, pictures, 2)`, *optional*):
                Heights and widths in pixels; read with `config.cell_embedding` only.
            negative_input_ids, negative_attention_mask:
                What the processor returns for `generate`; a forward does not need them.
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
                Targets at the place of the token itself (shifted inside: by one, in pictures by the length of their
                run of `<img>`), -100 where there is none.
            codes_per_step (`int`, *optional*):
                Longest run of `<img>` in the rows. 1 is next-token prediction. Defaults to the configuration's
                largest; the rows may hold pictures of several lengths.
            block_ids, cells:
                See [`MarsModel.forward`]. Read off `input_ids` if None and there is no earlier token in a cache.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): Compute logits for the last so many positions.
            vocabulary (`str`, defaults to `"all"`): `"text"` or `"visual"` leaves the other head out.
            shift_labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
                Targets at the place that predicts them, instead of `labels`.
            head_loss (`Callable`, *optional*):
                Called as `head_loss(model, last_hidden_state, shift_labels)` in place of the heads; the `ModelOutput`
                that it gives is returned. For losses that need logits of some positions only.

        The other arguments are those of [`MarsModel.forward`].

        Returns:
            [`CausalLMOutputWithPast`]: `logits` of shape `(batch, seq, vocab_size)`, `loss` if `labels` are given.
        """
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("`pixel_values` take places in `input_ids`, which are None.")
            filled = self.fill_image_codes(input_ids, pixel_values)
            if labels is not None:
                labels = torch.where(labels == self.config.image_pad_token_id, filled, labels)
            input_ids = filled
        is_step = past_key_values is not None and (block_ids is not None or cells is not None)  # of `generate`
        layout = (
            None
            if is_step or modality == "text" or isinstance(attention_mask, dict)
            else self._layout(input_ids, codes_per_step, past_key_values)
        )
        if layout is not None and input_ids is not None:
            block_ids = layout.block_ids if block_ids is None and self._longest_run(codes_per_step) > 1 else block_ids
            cells = self._cells(input_ids, layout, image_sizes) if cells is None else cells
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            visual_mask=visual_mask,
            modality=modality,
            block_ids=block_ids,
            cells=cells,
            use_cache=use_cache,
            **kwargs,
        )
        if shift_labels is None and labels is not None and (layout is not None or head_loss is not None):
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100) if layout is None else layout.shift_labels(labels)
        if head_loss is not None:
            return head_loss(self, outputs.last_hidden_state, shift_labels)
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.compute_logits(hidden_states, vocabulary)
        loss = None
        if labels is not None or shift_labels is not None:
            targets = {"labels": labels, "shift_labels": shift_labels}
            loss = self.loss_function(logits=logits, vocab_size=logits.shape[-1], **targets, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["MarsForConditionalGeneration", "MarsModel", "MarsPreTrainedModel", "is_visual_parameter"]
