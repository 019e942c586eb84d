"""
Conversion of released VQ-GANs into diffusers `VQModel`s, tensor by tensor and without loss.

What a `VQModel` can hold, and therefore what this file converts:

- Residual blocks with group norm (32 groups, eps 1e-6) and SiLU, as many in every level of the encoder, and one more
  in every level of the decoder; downsampling by a convolution over zeros padded on the right and at the bottom,
  upsampling by nearest neighbours and a convolution.
- Attention of one head, scaled by `channels ** -0.5`: after every residual block of a level or after none
  (`AttnDownEncoderBlock2D`, `AttnUpDecoderBlock2D`), for every level and both halves on their own; and between the two
  blocks of the middle, in both halves or in neither (`mid_block_add_attention`).
- Channels that are the same in both halves, and in the first level those of the first convolution.
- Codes found as the nearest to the encoder's output. Two originals search otherwise, and still fit:
  LlamaGen and Janus normalise output z and codes e to length 1 (`codebook_l2_norm`). Since |z - e|^2 is
  |z|^2 + 1 - 2 <z, e> for every code of length 1, the nearest code does not depend on the length of z: the codebook is
  stored normalised and z is left alone. IBQ takes the code with the largest inner product. With one coordinate more,
  0 for z and sqrt(max |e|^2 - |e|^2) for a code, all codes are equally long, and the nearest is the one IBQ takes: so
  `quant_conv` gets a row of zeros, `post_quant_conv` a column of zeros, and the decoder sees what it always saw.

Anything else is refused with the reason. What is not a tensor stays with the user: the dropout of training, and the
range of pixels, which is [-1, 1] but for open-muse and aMUSEd, whose networks take and give [0, 1].

Names and arithmetic were read from CompVis/taming-transformers (`taming/models/vqgan.py`), huggingface/open-muse
(`muse/modeling_taming_vqgan.py`), facebookresearch/chameleon (`chameleon/inference/vqgan.py`), deepseek-ai/Janus
(`janus/models/vq_model.py`), FoundationVision/LlamaGen (`tokenizer/tokenizer_image/vq_model.py`) and
TencentARC/SEED-Voken (IBQ).

What this file leaves to others: reading checkpoint and configuration from disk, and writing the result.
"""

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from diffusers import VQModel
from torch.nn import functional as F

from .renames import RenameTable

WRAPPERS = ("ema", "model", "state_dict")  # tried in this order, as LlamaGen's own scripts do
JANUS_PREFIX = "gen_vision_model."  # where a whole Janus keeps its VQ-GAN
AVERAGED_PREFIX = "model_ema."  # moving averages beside the trained weights; their names have lost their dots
TRAINING_ONLY = re.compile(r"loss\..*|quantize\.codebook_used|colorize")

SPATIAL_NORM = "its norms are scaled by the codes (spatial norm, as in MoVQ), where these formats have group norm"
THREE_DIMENSIONS = "it is a 3-D tokenizer, as Emu3's: it convolves over time as well, where a `VQModel` has two axes"
GUMBEL = "it chooses codes by Gumbel logits, from a projection of its own, not by their distance in a codebook"
LOOKUP_FREE = "its codes are signs without a table (lookup-free quantisation, LFQ), where a `VQModel` needs a codebook"
MASKGIT = "it is MaskGIT's network, with average pooling and convolutions without biases"
REMAPPED = "its indices are remapped to a part of the codebook, where a `VQModel` counts all codes"
EXTRA_BLOCKS = "its decoder has further residual blocks in the middle, where a `VQModel` has two"
TRANSFORMERS = (
    "this is transformers' own port, whose Chameleon has no decoder and whose Janus encodes without the normalisation "
    "that it decodes with: take the owner's file instead"
)
REFUSED_CLASSES = (
    (re.compile(r"gumbel", re.I), GUMBEL),
    (re.compile(r"lfq|magvit", re.I), LOOKUP_FREE),
    (re.compile(r"movq", re.I), SPATIAL_NORM),
    (re.compile(r"emu3(vision|_?vq)", re.I), THREE_DIMENSIONS),
    (re.compile(r"maskgit", re.I), MASKGIT),
    (re.compile(r"chameleon_?vq|janus_?vq", re.I), TRANSFORMERS),
)
REFUSED_NAMES = (
    (re.compile(r"model\.vqmodel\."), TRANSFORMERS),
    (re.compile(r"\btime_(conv|res_stack)\b"), THREE_DIMENSIONS),
    (re.compile(r"\b(conv_y|conv_b|norm_layer)\b"), SPATIAL_NORM),
    (re.compile(r"^quantize\.(embed|proj)\."), GUMBEL),
    (re.compile(r"\.adaptive\."), LOOKUP_FREE),
    (re.compile(r"\.upsample_conv\."), MASKGIT),
    (re.compile(r"^quantize\.used$"), REMAPPED),
    (re.compile(r"\.extra_mid_res_blocks\."), EXTRA_BLOCKS),
    (re.compile(r"\.(temb|time_emb)_proj\."), "its blocks take a timestep (temb), which a `VQModel` has not"),
    (re.compile(r"\.conv_shortcut\."), "its shortcuts are 3x3 convolutions, where a `VQModel` has 1x1"),
    (re.compile(r"\.running_(mean|var)$"), "it has batch norms, where a `VQModel` has group norms"),
)
RESAMPLING = (True, "it resamples without convolutions, where a `VQModel` has one in every level")
# Field of a configuration: the value that a `VQModel` computes with, and why it holds no other.
OPTIONS = {
    "double_z": (False, "its encoder gives mean and variance, two numbers per latent channel, where codes need one"),
    "resamp_with_conv": RESAMPLING,
    "resample_with_conv": RESAMPLING,
    "give_pre_end": (False, "its decoder stops before the last norm and convolution"),
    "tanh_out": (False, "its decoder ends in a tanh"),
    "use_linear_attn": (False, "its attention is linear, where a `VQModel` has softmax"),
    "norm_type": ("group", "it has other norms than group norm"),
    "remap": (None, REMAPPED),
    "kl_weight": (None, GUMBEL),
    "temperature_scheduler_config": (None, GUMBEL),
    "l2_normalize": (False, "it normalises codes when it encodes, but not when it looks them up"),
    "cosine_similarity": (False, "it searches by cosine, with codes that it decodes at their own length"),
    "extra_mid_res_blocks": (0, EXTRA_BLOCKS),
}
DDCONFIG_FIELDS = (
    "ch out_ch ch_mult num_res_blocks attn_resolutions dropout resamp_with_conv in_channels resolution z_channels "
    "double_z give_pre_end tanh_out use_linear_attn attn_type norm_type"
).split()
MUSE_DEFAULTS = {
    "resolution": 256,
    "num_channels": 3,
    "hidden_channels": 128,
    "channel_mult": (1, 1, 2, 2, 4),
    "num_res_blocks": 2,
    "decoder_res_blocks": None,
    "extra_mid_res_blocks": None,
    "decoder_hidden_channels": None,
    "decoder_channel_mult": None,
    "attn_resolutions": (16,),
    "no_attn_mid_block": False,
    "z_channels": 256,
    "num_embeddings": 1024,
    "quantized_embed_dim": 256,
    "resample_with_conv": True,
}
MUSE_OTHERS = ("dropout", "commitment_cost", "num_resolutions", "reduction_factor", "latent_size")
LLAMAGEN_DEFAULTS = {
    "codebook_size": 16384,
    "codebook_embed_dim": 8,
    "codebook_l2_norm": True,
    "encoder_ch_mult": (1, 1, 2, 2, 4),
    "decoder_ch_mult": (1, 1, 2, 2, 4),
    "z_channels": 256,
    "ch": 128,
    "num_res_blocks": 2,
    "in_channels": 3,
    "out_channels": 3,
}
LLAMAGEN_OTHERS = (
    "codebook_show_usage commit_loss_beta entropy_loss_ratio dropout_p dropout norm_type resamp_with_conv"
).split()
IBQ_FIELDS = (
    "use_entropy_loss cosine_similarity entropy_temperature sample_minimization_weight batch_maximization_weight"
).split()


@dataclass(frozen=True)
class _Layout:
    """How an original names the parts of its halves; `lowest_first` tells how it counts the decoder's levels."""

    down: str
    up: str
    resnet: str
    mid: tuple[str, str, str]
    lowest_first: bool


TAMING = _Layout("down", "up", "block", ("block_1", "attn_1", "block_2"), lowest_first=False)
LLAMAGEN = _Layout("conv_blocks", "conv_blocks", "res", ("0", "1", "2"), lowest_first=True)
LAYOUTS = dict.fromkeys(("taming", "muse", "chameleon", "ibq"), TAMING)
LAYOUTS |= dict.fromkeys(("llamagen", "janus"), LLAMAGEN)
SOURCES = (*LAYOUTS, "diffusers")
UNCHANGED = (
    "encoder.conv_in encoder.conv_out decoder.conv_in decoder.conv_out quantize.embedding quant_conv post_quant_conv"
).split()
RESNET_PARTS = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
ATTENTION_PARTS = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_DIFFUSERS_PARTS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
ATTENTION_MATRIX = re.compile(r".*\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight")


def convert_vqgan_state_dict(
    state_dict: Mapping[str, Any], config: Mapping[str, Any], source: str | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    Turn an original VQ-GAN into configuration and weights of a diffusers `VQModel` with the same codes and pictures.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            The original's tensors, also inside `{"ema": ...}`, `{"model": ...}` or `{"state_dict": ...}`, or a whole
            Janus, of which `gen_vision_model.*` is read. Tensors of training (`loss.*`, `quantize.codebook_used`,
            `colorize`) are left out; of `model_ema.*` and the trained weights `use_ema` in `config` chooses.
        config (`Mapping[str, Any]`):
            The original's own configuration. taming, Chameleon, IBQ: the `model` node of the YAML, or its `params`
            (`ddconfig`, `n_embed`, `embed_dim`). LlamaGen, Janus: the `ModelArgs` that differ from the defaults, and
            `ch` and `num_res_blocks` where they differ from 128 and 2. open-muse, diffusers: `config.json`.
        source (`str`, *optional*):
            `"taming"`, `"muse"`, `"llamagen"`, `"janus"`, `"chameleon"`, `"ibq"` or `"diffusers"`; by default
            [`detect_vqgan_source`] finds it.

    Returns:
        `tuple[dict[str, Any], dict[str, torch.Tensor]]`: Arguments of `VQModel`, and its complete state dict. Dtypes
        are the original's, but a codebook that has to be computed is at least float32.

    Raises:
        ValueError: If a `VQModel` cannot hold this network exactly, if the format is not known, if `config` is
            incomplete or holds unknown fields, or if tensors are missing, unexpected or of another shape (all are
            listed).

    Example:
        >>> config = {"ddconfig": {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], ...}, "n_embed": 1024, "embed_dim": 256}
        >>> vq_config, tensors = convert_vqgan_state_dict(torch.load("last.ckpt", weights_only=True), config)
        >>> vqgan = VQModel.from_config(vq_config)
        >>> vqgan.load_state_dict(tensors, strict=True)
    """
    if source is not None and source not in SOURCES:
        raise ValueError(f"`source` must be one of {sorted(SOURCES)}, or None to detect it, got {source!r}.")
    tensors, source = _open(state_dict, config, source)
    vq_config = READERS[source](config)
    converted = _rename_strictly(tensors, vq_config, config, source)
    if source in ("llamagen", "janus") and config.get("codebook_l2_norm", True):
        converted["quantize.embedding.weight"] = _normalise(converted["quantize.embedding.weight"])
    if source == "ibq":
        _append_coordinate(converted)
        vq_config["vq_embed_dim"] += 1
    return vq_config, converted


def detect_vqgan_source(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """
    Tell the format of a VQ-GAN from its tensors' names, and where these are shared, from its configuration.

    Janus is LlamaGen's network under the same names, and Chameleon taming's: they come out as `"llamagen"` and
    `"taming"`, which convert alike. IBQ has taming's tensors too, but other codes: it is known by its class or by its
    own fields.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): As for [`convert_vqgan_state_dict`].
        config (`Mapping[str, Any]`): As for [`convert_vqgan_state_dict`].

    Returns:
        `str`: A `source` for [`convert_vqgan_state_dict`].

    Raises:
        ValueError: If no format fits, if taming and IBQ cannot be told apart, or if no `VQModel` can hold the network.
    """
    return _open(state_dict, config, None)[1]


def vqgan_rename_table(source: str, vq_config: Mapping[str, Any], names: Collection[str] = ()) -> RenameTable:
    """
    List the renames from an original's tensors to those of a `VQModel`.

    Args:
        source (`str`): The original's format.
        vq_config (`Mapping[str, Any]`): As [`convert_vqgan_state_dict`] returns it: the levels of the decoder are
            counted the other way round, so that their number matters.
        names (`Collection[str]`, *optional*): The original's names. Only `"diffusers"` needs them, whose older
            releases spell attention in another way.

    Returns:
        `RenameTable`: Forward to the `VQModel`, backward to the original.
    """
    if source == "diffusers":
        return RenameTable((_old_diffusers_name(name, names), name) for name in _shapes(vq_config))
    return RenameTable(_layout_pairs(LAYOUTS[source], len(vq_config["block_out_channels"])))


def _layout_pairs(layout: _Layout, levels: int) -> list[tuple[str, str]]:
    pairs = [(f"{name}.{{kind}}", f"{name}.{{kind}}") for name in UNCHANGED]
    for half in ("encoder", "decoder"):
        first, attention, second = (f"{half}.mid.{name}" for name in layout.mid)
        pairs += _part_pairs(first, f"{half}.mid_block.resnets.0", RESNET_PARTS)
        pairs += _part_pairs(attention, f"{half}.mid_block.attentions.0", ATTENTION_PARTS)
        pairs += _part_pairs(second, f"{half}.mid_block.resnets.1", RESNET_PARTS)
        pairs += [(f"{half}.norm_out.{{kind}}", f"{half}.conv_norm_out.{{kind}}")]
    pairs += _level_pairs(layout, f"encoder.{layout.down}.{{level}}", "encoder.down_blocks.{level}", "downsample")
    for position in range(levels):
        level = position if layout.lowest_first else levels - 1 - position
        pairs += _level_pairs(layout, f"decoder.{layout.up}.{level}", f"decoder.up_blocks.{position}", "upsample")
    return pairs


def _level_pairs(layout: _Layout, old: str, new: str, resampler: str) -> list[tuple[str, str]]:
    return [
        *_part_pairs(f"{old}.{layout.resnet}.{{block}}", f"{new}.resnets.{{block}}", RESNET_PARTS),
        *_part_pairs(f"{old}.attn.{{block}}", f"{new}.attentions.{{block}}", ATTENTION_PARTS),
        (f"{old}.{resampler}.conv.{{kind}}", f"{new}.{resampler}rs.0.conv.{{kind}}"),
    ]


def _part_pairs(old: str, new: str, parts: dict[str, str]) -> list[tuple[str, str]]:
    return [(f"{old}.{old_part}.{{kind}}", f"{new}.{new_part}.{{kind}}") for old_part, new_part in parts.items()]


def _old_diffusers_name(name: str, names: Collection[str]) -> str:
    """Older diffusers named attention otherwise: `from_pretrained` renames it, but `load_state_dict` does not."""
    old = name
    for old_part, new_part in OLD_DIFFUSERS_PARTS.items():
        old = old.replace(f".{new_part}.", f".{old_part}.")
    return old if old in names else name


def _open(
    state_dict: Mapping[str, Any], config: Mapping[str, Any], source: str | None
) -> tuple[dict[str, torch.Tensor], str]:
    """Unwrap the tensors, refuse what no `VQModel` can hold, and name the format."""
    if not isinstance(config, Mapping):
        raise ValueError(f"`config` must be the original's own configuration as a dict, got {config!r}.")
    tensors = _unwrap(state_dict)
    if source == "diffusers" or any(name.startswith("encoder.down_blocks.") for name in tensors):
        return tensors, source or "diffusers"
    _refuse_class(config)
    _refuse_tensors(tensors)
    return tensors, source or _detect(tensors, config)


def _unwrap(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"`state_dict` must be a dict of tensors, got {type(state_dict).__name__}.")
    while wrapper := next((name for name in WRAPPERS if isinstance(state_dict.get(name), Mapping)), None):
        state_dict = state_dict[wrapper]
    prefix = JANUS_PREFIX if any(name.startswith(JANUS_PREFIX) for name in state_dict) else ""
    tensors = {name.removeprefix(prefix): state_dict[name] for name in state_dict if name.startswith(prefix)}
    others = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if others or not tensors:
        raise ValueError(
            f"Expected a state dict of tensors, alone or under one of {list(WRAPPERS)}, but "
            f"{f'these entries are none: {others}' if others else 'it is empty'}."
        )
    return tensors


def _refuse(reason: str) -> NoReturn:
    raise ValueError(f"This VQ-GAN cannot become a diffusers `VQModel` exactly: {reason}.")


def _nodes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Give the configuration and what is nested in it, from a whole YAML down to the model's parameters."""
    inner = next((config[k] for k in ("model", "params", "init_args") if isinstance(config.get(k), Mapping)), None)
    return [config] if inner is None else [config, *_nodes(inner)]


def _class_name(config: Mapping[str, Any]) -> str:
    fields = ("target", "class_path", "_class_name", "model_type")
    return " ".join(str(node[field]) for node in _nodes(config) for field in fields if node.get(field))


def _refuse_class(config: Mapping[str, Any]) -> None:
    name = _class_name(config)
    for pattern, reason in REFUSED_CLASSES:
        if pattern.search(name):
            _refuse(f"{reason} (its class is {name})")


def _refuse_tensors(tensors: dict[str, torch.Tensor]) -> None:
    kept = [name for name in tensors if not name.startswith("loss.")]
    for pattern, reason in REFUSED_NAMES:
        if found := [name for name in kept if pattern.search(name)]:
            _refuse(f"{reason} (it has {len(found)} tensors such as {found[0]})")
    if found := [name for name in kept if tensors[name].ndim == 5]:
        _refuse(f"{THREE_DIMENSIONS} (it has {len(found)} tensors such as {found[0]})")
    if not {"quantize.embedding.weight", "quant_conv.weight"} & set(kept) and "encoder.conv_in.weight" in kept:
        _refuse(LOOKUP_FREE)


def _detect(tensors: dict[str, torch.Tensor], config: Mapping[str, Any]) -> str:
    if any(name.startswith("encoder.conv_blocks.") for name in tensors):
        return "llamagen"
    if not any(name.startswith("encoder.down.0.block.") for name in tensors):
        raise ValueError(
            f"This is no VQ-GAN of a known format ({', '.join(SOURCES)}): its tensors are {sorted(tensors)[:5]} ... "
            f"If they have a prefix, or lie under another key than {list(WRAPPERS)}, take them out first."
        )
    if "VQGANModel" in _class_name(config) or config.keys() & {"hidden_channels", "channel_mult", "num_embeddings"}:
        return "muse"
    return "ibq" if _is_ibq(tensors, config) else "taming"


def _is_ibq(tensors: dict[str, torch.Tensor], config: Mapping[str, Any]) -> bool:
    if name := _class_name(config):
        return _names_ibq(name)
    if any(field in node for node in _nodes(config) for field in IBQ_FIELDS):
        return True
    if "encoder.down.0.block.3.conv1.weight" in tensors:
        raise ValueError(
            "taming and IBQ have the same tensors and different codes, and nothing in `config` tells which this is; "
            'with four residual blocks it may well be IBQ. Give `source="taming"` or `source="ibq"`.'
        )
    return False


def _names_ibq(class_name: str) -> bool:
    """Tell IBQ by the class, not by the package: that has a `VQModel` with taming's search as well."""
    return any(name.rsplit(".", 1)[-1] == "IBQ" for name in class_name.split())


def _check_fields(node: Mapping[str, Any], known: Collection[str], where: str) -> None:
    unknown = sorted(name for name in node if name not in known and not name.startswith("_"))
    if unknown:
        raise ValueError(
            f"{where} holds fields that this conversion does not know: {unknown}. They may change what the network "
            "computes. Leave them out if they do not."
        )


def _check_options(node: Mapping[str, Any]) -> None:
    for field, (held, reason) in OPTIONS.items():
        if (value := node.get(field)) is not None and value != held:
            _refuse(f"{reason} (`{field}` is {value!r})")


def _read_taming(config: Mapping[str, Any], source: str = "taming") -> dict[str, Any]:
    params = _nodes(config)[-1]
    dd = params.get("ddconfig")
    needed = ("ch", "out_ch", "num_res_blocks", "in_channels", "resolution", "z_channels")
    missing = [name for name in ("ddconfig", "n_embed", "embed_dim") if params.get(name) is None]
    missing += [f"ddconfig.{name}" for name in needed if dd is not None and name not in dd]
    if missing:
        raise ValueError(
            f"`config` must be the `model` node of the original's YAML or its `params`. Missing: {missing}; "
            f"it holds {sorted(params)}."
        )
    if (name := _class_name(config)) and _names_ibq(name) != (source == "ibq"):
        raise ValueError(f"`source` is {source!r}, but the configuration's class is {name}: the codes would differ.")
    _check_options(params)
    _check_options(dd)
    _check_fields(dd, DDCONFIG_FIELDS, "`ddconfig`")
    if (attention := dd.get("attn_type") or "vanilla") not in ("vanilla", "none"):
        _refuse(f"its attention is {attention}, where a `VQModel` has softmax")
    resolutions = (dd.get("attn_resolutions") or ()) if attention == "vanilla" else ()
    return _vq_config(
        channels=(dd["ch"], dd.get("ch_mult") or (1, 2, 4, 8)),
        num_res_blocks=dd["num_res_blocks"],
        attention=_attention_levels(dd["resolution"], len(dd.get("ch_mult") or (1, 2, 4, 8)), resolutions),
        mid_attention=attention == "vanilla",
        pixels=(dd["in_channels"], dd["out_ch"]),
        latents=(dd["z_channels"], params["embed_dim"]),
        num_codes=params["n_embed"],
    )


def _read_muse(config: Mapping[str, Any]) -> dict[str, Any]:
    _check_fields(config, (*MUSE_DEFAULTS, *MUSE_OTHERS), "`config`")
    _check_options(config)
    c = MUSE_DEFAULTS | dict(config)
    levels = len(c["channel_mult"])
    blocks = c["decoder_res_blocks"] if c["decoder_res_blocks"] is not None else c["num_res_blocks"]
    blocks = [blocks] * levels if isinstance(blocks, int) else list(blocks)
    for name, differs in {
        "decoder_res_blocks": blocks != [c["num_res_blocks"]] * levels,
        "decoder_hidden_channels": (c["decoder_hidden_channels"] or c["hidden_channels"]) != c["hidden_channels"],
        "decoder_channel_mult": list(c["decoder_channel_mult"] or c["channel_mult"]) != list(c["channel_mult"]),
    }.items():
        if differs:
            _refuse(f"its decoder is built otherwise than its encoder (`{name}`), where a `VQModel` has one shape")
    attention = _attention_levels(c["resolution"], levels, c["attn_resolutions"] or ())
    if any(attention[0]) and c["num_res_blocks"] == 1:
        # open-muse runs the attention of a level only if the level has more than one.
        _refuse("with one residual block per level, open-muse leaves out attention that its encoder has weights for")
    return _vq_config(
        channels=(c["hidden_channels"], c["channel_mult"]),
        num_res_blocks=c["num_res_blocks"],
        attention=attention,
        mid_attention=not c["no_attn_mid_block"],
        pixels=(c["num_channels"], c["num_channels"]),
        latents=(c["z_channels"], c["quantized_embed_dim"]),
        num_codes=c["num_embeddings"],
    )


def _read_llamagen(config: Mapping[str, Any]) -> dict[str, Any]:
    _check_fields(config, (*LLAMAGEN_DEFAULTS, *LLAMAGEN_OTHERS), "`config`")
    _check_options(config)
    c = LLAMAGEN_DEFAULTS | dict(config)
    if list(c["encoder_ch_mult"]) != list(c["decoder_ch_mult"]):
        _refuse("its decoder has other channels than its encoder (`decoder_ch_mult`), where a `VQModel` has one list")
    last = [False] * (len(c["encoder_ch_mult"]) - 1) + [True]
    return _vq_config(
        channels=(c["ch"], c["encoder_ch_mult"]),
        num_res_blocks=c["num_res_blocks"],
        attention=(last, last[::-1]),
        mid_attention=True,
        pixels=(c["in_channels"], c["out_channels"]),
        latents=(c["z_channels"], c["codebook_embed_dim"]),
        num_codes=c["codebook_size"],
    )


def _read_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    if (name := config.get("_class_name", "VQModel")) != "VQModel":
        _refuse(f"it is a {name}, another class of diffusers")
    defaults = {n: p.default for n, p in inspect.signature(VQModel.__init__).parameters.items() if n != "self"}
    _check_fields(config, defaults, "`config`")
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in (defaults | given).items()}


READERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "taming": _read_taming,
    "chameleon": _read_taming,
    "ibq": lambda config: _read_taming(config, "ibq"),
    "muse": _read_muse,
    "llamagen": _read_llamagen,
    "janus": _read_llamagen,
    "diffusers": _read_diffusers,
}


def _attention_levels(resolution: int, levels: int, chosen: Collection[int]) -> tuple[list[bool], list[bool]]:
    """
    Tell which levels have attention, in the order in which each half runs them.

    The originals halve the training resolution on the way down and double the lowest on the way up, which differ where
    a half is no whole number.
    """
    down = [resolution // 2**level for level in range(levels)]
    up = [down[-1] * 2**level for level in range(levels)]
    return [side in chosen for side in down], [side in chosen for side in up]


def _vq_config(
    channels: tuple[int, Sequence[int]],
    num_res_blocks: int,
    attention: tuple[list[bool], list[bool]],
    mid_attention: bool,
    pixels: tuple[int, int],
    latents: tuple[int, int],
    num_codes: int,
) -> dict[str, Any]:
    base, multipliers = channels
    if multipliers[0] != 1:
        _refuse(
            f"its first convolution gives {base} channels and its first level {base * multipliers[0]}, where a "
            "`VQModel` has as many in both"
        )
    if not isinstance(num_res_blocks, int):
        _refuse(f"its levels have different numbers of residual blocks ({num_res_blocks}), where a `VQModel` has one")
    down, up = attention
    return {
        "in_channels": pixels[0],
        "out_channels": pixels[1],
        "down_block_types": ["AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D" for attends in up],
        "block_out_channels": [base * multiplier for multiplier in multipliers],
        "layers_per_block": num_res_blocks,
        "act_fn": "silu",
        "latent_channels": latents[0],
        "num_vq_embeddings": num_codes,
        "norm_num_groups": 32,
        "vq_embed_dim": latents[1],
        "norm_type": "group",
        "mid_block_add_attention": mid_attention,
    }


def _shapes(vq_config: Mapping[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = VQModel.from_config(dict(vq_config))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _rename_strictly(
    tensors: dict[str, torch.Tensor], vq_config: dict[str, Any], config: Mapping[str, Any], source: str
) -> dict[str, torch.Tensor]:
    table = vqgan_rename_table(source, vq_config, tensors)
    shapes = _shapes(vq_config)
    stored = {}  # what the original must hold: its name, and its shape
    for name, shape in shapes.items():
        # The originals' attention projects by 1x1 convolutions, diffusers' by linear layers.
        is_convolution = source != "diffusers" and ATTENTION_MATRIX.fullmatch(name)
        stored[table.backward(name)] = torch.Size((*shape, 1, 1)) if is_convolution else shape
    tensors = {name: tensor for name, tensor in tensors.items() if not TRAINING_ONLY.fullmatch(name)}
    tensors = _choose_weights(tensors, list(stored), config)
    _check_tensors(tensors, stored, source)
    return {name: tensors[table.backward(name)].detach().reshape(shape) for name, shape in shapes.items()}


def _choose_weights(
    tensors: dict[str, torch.Tensor], names: list[str], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    trained = {name: tensor for name, tensor in tensors.items() if not name.startswith(AVERAGED_PREFIX)}
    if len(trained) == len(tensors):
        return trained
    use_ema = _nodes(config)[-1].get("use_ema")
    if use_ema is None:
        raise ValueError(
            f"The checkpoint holds two sets of weights, the trained ones and their moving averages "
            f"({AVERAGED_PREFIX}*). Say which: `use_ema` in `config` is True for the averages, False for the others."
        )
    if not use_ema:
        return trained
    averaged = {name: tensors.get(AVERAGED_PREFIX + name.replace(".", "")) for name in names}
    return {name: tensor for name, tensor in averaged.items() if tensor is not None}


def _check_tensors(tensors: dict[str, torch.Tensor], stored: dict[str, torch.Size], source: str) -> None:
    shared = [name for name in stored if name in tensors]
    problems = {
        "missing": [name for name in stored if name not in tensors],
        "unexpected": [name for name in tensors if name not in stored],
        "of another shape": [
            f"{name} is {tuple(tensors[name].shape)}, expected {tuple(stored[name])}"
            for name in shared
            if tensors[name].shape != stored[name]
        ],
        "not floating point": [name for name in shared if not tensors[name].is_floating_point()],
    }
    if any(problems.values()):
        lists = "".join(f"\n{what} ({len(names)}): {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"The tensors are not those of the {source} VQ-GAN that `config` describes; check that checkpoint and "
            f"configuration belong together.{lists}"
        )


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _normalise(codes: torch.Tensor) -> torch.Tensor:
    codes = _at_least_float32(codes)
    if empty := (codes.norm(dim=-1) < 1e-12).nonzero().flatten().tolist():
        _refuse(f"it normalises codes, and codes {empty} have no direction")
    return F.normalize(codes, dim=-1)


def _append_coordinate(tensors: dict[str, torch.Tensor]) -> None:
    """Make the nearest code the one with the largest inner product; the module's docstring has the reason."""
    codes = _at_least_float32(tensors["quantize.embedding.weight"])
    squares = codes.double().square().sum(-1)
    extra = (squares.max() - squares).sqrt().to(codes.dtype)
    tensors["quantize.embedding.weight"] = torch.cat((codes, extra[:, None]), dim=-1)
    tensors["quant_conv.weight"] = F.pad(tensors["quant_conv.weight"], (0, 0, 0, 0, 0, 0, 0, 1))  # a row
    tensors["quant_conv.bias"] = F.pad(tensors["quant_conv.bias"], (0, 1))
    tensors["post_quant_conv.weight"] = F.pad(tensors["post_quant_conv.weight"], (0, 0, 0, 0, 0, 1))  # a column


__all__ = ["SOURCES", "convert_vqgan_state_dict", "detect_vqgan_source", "vqgan_rename_table"]
