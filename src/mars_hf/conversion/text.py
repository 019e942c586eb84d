"""
Language models in the shape that MARS is built on: dense Qwen2 or Qwen3, exactly, and never loaded as a whole.

A `TextPlan` says for every tensor of the target which rows of which original tensor it is. Three tables fill it:
Qwen2 (also Qwen1.5 and 2.5) and Qwen3 keep their names; Qwen v1 is renamed, and its fused projection cut in three;
Llama without biases gets zeros for those that Qwen2 has. All else is refused by name.

What this file leaves to others: reading files (`checkpoints.py`), tokenizers, and what MARS adds (`convert.py`).
"""

import importlib.util
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

from .checkpoints import Checkpoint, headers_of, read_json, unwrap
from .renames import RenameTable

TextConfig = Qwen2Config | Qwen3Config

# Names of Qwen v1 (https://huggingface.co/Qwen/Qwen-7B, modeling_qwen.py). Its feed-forward block is
# `c_proj(w1(x) * silu(w2(x)))`: w2 is the gate.
QWEN1_NAMES = RenameTable(
    [
        ("transformer.wte.weight", "model.embed_tokens.weight"),
        ("transformer.h.{layer}.ln_1.weight", "model.layers.{layer}.input_layernorm.weight"),
        ("transformer.h.{layer}.attn.c_attn.{kind}", "model.layers.{layer}.self_attn.qkv_proj.{kind}"),
        ("transformer.h.{layer}.attn.c_proj.weight", "model.layers.{layer}.self_attn.o_proj.weight"),
        ("transformer.h.{layer}.ln_2.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
        ("transformer.h.{layer}.mlp.w2.weight", "model.layers.{layer}.mlp.gate_proj.weight"),
        ("transformer.h.{layer}.mlp.w1.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        ("transformer.h.{layer}.mlp.c_proj.weight", "model.layers.{layer}.mlp.down_proj.weight"),
        ("transformer.ln_f.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ]
)
QKV = ("q_proj", "k_proj", "v_proj")  # order of their rows in Qwen v1's `c_attn`

# The first revisions of Qwen v1 name their settings otherwise.
QWEN1_SETTINGS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
}
# What Qwen2 cannot be told: only these values are the same arithmetic.
QWEN1_FIXED = {
    "no_bias": True,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "apply_residual_connection_post_layernorm": False,
    "activation": "swiglu",
    "pos_emb": "rotary",
}
# What it does beyond its training length, unless a configuration says otherwise.
QWEN1_LENGTH_RULES = {"use_dynamic_ntk": "dynamic NTK rotary base", "use_logn_attn": "log-n attention"}
LLAMA_FIXED = {"attention_bias": False, "mlp_bias": False, "rope_interleaved": False}
LLAMA_SETTINGS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings rope_parameters attention_dropout "
    "bos_token_id eos_token_id pad_token_id"
).split()

# Buffers that a model computes anew; old checkpoints may hold them.
KNOWN_BUFFERS = re.compile(r".*\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|logn_tensor)")
QUANTISED_NAMES = re.compile(r".*\.(qweight|qzeros|g_idx|weight_scale|weight_scale_inv|SCB|absmax|quant_state.*)")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOE_SETTINGS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


class ConversionWarning(UserWarning):
    """Something that a converted model does otherwise than the original."""


@dataclass(frozen=True)
class Piece:
    """
    Where a tensor comes from: one of equal blocks of rows of an original tensor.

    Args:
        name (`str`): Name of the original tensor.
        index (`int`): Which block.
        count (`int`): Number of blocks.
    """

    name: str
    index: int = 0
    count: int = 1

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(self.count)[self.index]


@dataclass(frozen=True, eq=False)
class TextPlan(Mapping[str, torch.Tensor]):
    """
    A language model in the target's names; looking a tensor up reads it from the original.

    Args:
        config (`Qwen2Config` or `Qwen3Config`): Configuration of the target.
        pieces (`dict[str, Piece | None]`): Where each tensor comes from; `None` is a tensor of zeros.
        headers (`dict[str, torch.Tensor]`): Shape and dtype of each tensor, on the meta device.
        source (`Mapping[str, torch.Tensor]`): The original's tensors.
        notes (`tuple[str, ...]`): What the target does otherwise than the original.
    """

    config: TextConfig
    pieces: dict[str, Piece | None]
    headers: dict[str, torch.Tensor]
    source: Mapping[str, torch.Tensor]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> torch.Tensor:
        piece, header = self.pieces[name], self.headers[name]
        if piece is None:
            return torch.zeros(header.shape, dtype=header.dtype)
        return piece.of(self.source[piece.name]).to(header.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.headers.values())).dtype

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(header.nbytes for header in self.headers.values())


def convert_qwen1_state_dict(
    state_dict: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[Qwen2Config, dict[str, torch.Tensor]]:
    """
    Turn a Qwen v1 checkpoint (`QWenLMHeadModel`) into one of transformers' `Qwen2ForCausalLM`.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The original's tensors, or such under `state_dict` or `model`.
        config (`Mapping[str, Any]`): The original's `config.json`; names of its first revisions are understood.

    Returns:
        `tuple[Qwen2Config, dict[str, torch.Tensor]]`: What `Qwen2ForCausalLM(config).load_state_dict(..)` takes.

    Raises:
        ValueError: If a tensor is missing, unexpected or of the wrong shape (all are named), or a setting is one that
            Qwen2 has no counterpart of.

    Example:
        >>> config, state_dict = convert_qwen1_state_dict(load_file("model.safetensors"), original_config)
        >>> model = Qwen2ForCausalLM(config)
        >>> model.load_state_dict(state_dict)
    """
    plan = plan_text_model({**config, "model_type": "qwen"}, unwrap(state_dict))
    for note in plan.notes:
        warnings.warn(note, ConversionWarning, stacklevel=2)
    converted = {name: tensor.clone() for name, tensor in plan.items()}
    if plan.config.tie_word_embeddings:
        converted["lm_head.weight"] = converted["model.embed_tokens.weight"]
    return plan.config, converted


def plan_text_model(config: Mapping[str, Any], source: Mapping[str, torch.Tensor]) -> TextPlan:
    """
    Find for every tensor of a MARS's language model where it comes from. Nothing large is read.

    Args:
        config (`Mapping[str, Any]`): The original's `config.json`.
        source (`Mapping[str, torch.Tensor]`): The original's tensors, best a lazy [`Checkpoint`].

    Returns:
        [`TextPlan`]: In the widest of the dtypes found, so that nothing is rounded.

    Raises:
        ValueError: If the model is quantised, a mixture of experts or of another family, has settings that the target
            cannot hold, or its tensors are not the ones that its configuration asks for.
    """
    _refuse_quantised(config, source)
    _refuse_mixture(config, source)
    family = config.get("model_type")
    plans = {"qwen": _plan_qwen1, "qwen2": _plan_qwen2, "qwen3": _plan_qwen3, "llama": _plan_llama}
    if family not in plans:
        raise ValueError(
            f"The language model is of type '{family}', but MARS takes dense Qwen models (qwen, qwen2, qwen3) and "
            "Llama-shaped ones (llama). Choose one of these."
        )
    return plans[family](dict(config), source)


def _plan_qwen2(config: dict[str, Any], source: Mapping[str, torch.Tensor]) -> TextPlan:
    return _fit(Qwen2Config.from_dict(config), source, Piece)


def _plan_qwen3(config: dict[str, Any], source: Mapping[str, torch.Tensor]) -> TextPlan:
    return _fit(Qwen3Config.from_dict(config), source, Piece)


def _plan_qwen1(config: dict[str, Any], source: Mapping[str, torch.Tensor]) -> TextPlan:
    settings = config | {new: config[old] for old, new in QWEN1_SETTINGS.items() if old in config}
    _require_settings("Qwen v1", settings, QWEN1_FIXED)
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    needed += ("seq_length", "layer_norm_epsilon", "rotary_emb_base")
    if missing := [name for name in needed if name not in settings]:
        raise ValueError(
            f"The configuration of a Qwen v1 must state {', '.join(missing)}. Give its whole config.json."
        )
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    _require_settings("Qwen v1", settings, {"kv_channels": hidden // heads})

    trained_length = settings["seq_length"]
    changes = [what for switch, what in QWEN1_LENGTH_RULES.items() if settings.get(switch, True)]
    qwen2 = Qwen2Config(
        vocab_size=settings["vocab_size"],
        hidden_size=hidden,
        intermediate_size=settings["intermediate_size"] // 2,  # the original counts gate and input together
        num_hidden_layers=settings["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=trained_length if changes else settings.get("max_position_embeddings", trained_length),
        initializer_range=settings.get("initializer_range", 0.02),
        rms_norm_eps=settings["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": float(settings["rotary_emb_base"])},
        tie_word_embeddings=settings.get("tie_word_embeddings", False),
        attention_dropout=settings.get("attn_dropout_prob", settings.get("attn_pdrop", 0.0)),
        **{name: settings.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    notes = ()
    if changes:
        notes = (
            f"Qwen v1 changes its arithmetic beyond its training length of {trained_length} tokens "
            f"({' and '.join(changes)}), and Qwen2 does not: up to {trained_length} tokens the numbers are the "
            f"same, beyond they differ. `max_position_embeddings` is therefore {trained_length}.",
        )
    return _fit(qwen2, source, _qwen1_piece, notes)


def _qwen1_piece(name: str) -> Piece:
    for index, projection in enumerate(QKV):
        if f".{projection}." in name:
            return Piece(QWEN1_NAMES.backward(name.replace(projection, "qkv_proj")), index, len(QKV))
    return Piece(QWEN1_NAMES.backward(name))


def _plan_llama(config: dict[str, Any], source: Mapping[str, torch.Tensor]) -> TextPlan:
    _require_settings("Llama", config, LLAMA_FIXED)
    llama = LlamaConfig.from_dict(config)
    _require_settings(
        "Llama", {"head_dim": llama.head_dim}, {"head_dim": llama.hidden_size // llama.num_attention_heads}
    )
    qwen2 = Qwen2Config(**{name: getattr(llama, name) for name in LLAMA_SETTINGS})
    return _fit(qwen2, source, lambda name: None if name.endswith("_proj.bias") else Piece(name))


def _require_settings(model: str, settings: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if name in settings and settings[name] is not None and settings[name] != value:
            raise ValueError(
                f"This {model} has `{name}` {settings[name]!r}. Qwen2, whose shape it has to take, can only hold "
                f"{value!r}: it cannot be converted exactly."
            )


def _refuse_quantised(config: Mapping[str, Any], source: Mapping[str, torch.Tensor]) -> None:
    method = config.get("quantization_config")
    if method is None:
        names = (n for n, t in headers_of(source).items() if t.dtype not in FLOATS and not KNOWN_BUFFERS.fullmatch(n))
        quantised = next((name for name in source if QUANTISED_NAMES.fullmatch(name)), None) or next(names, None)
        if quantised is None:
            return
        method = f"tensor {quantised}"
    elif isinstance(method, Mapping):
        method = method.get("quant_method", "with `quantization_config`")
    raise ValueError(
        f"The language model is quantised ({method}): its weights are stored rounded, in a form that cannot be copied "
        "for visual experts to train from. Convert the original, and quantise the MARS when it is trained."
    )


def _refuse_mixture(config: Mapping[str, Any], source: Mapping[str, torch.Tensor]) -> None:
    signs = [f"{name} {config[name]}" for name in MOE_SETTINGS if config.get(name)]
    signs += [f"tensor {name}" for name in source if ".experts." in name][:1]
    if signs:
        raise ValueError(
            f"The language model is a mixture of experts ({', '.join(signs)}), but MARS takes dense ones: it adds a "
            "visual expert to each projection and feed-forward block itself. Choose a dense model."
        )


def _fit(
    config: TextConfig,
    source: Mapping[str, torch.Tensor],
    origin: Callable[[str], Piece | None],
    notes: tuple[str, ...] = (),
) -> TextPlan:
    """Assign to every tensor of the target its origin; every tensor of the original must be used, each must fit."""
    shapes = _shapes_of(config)
    head = origin("lm_head.weight")
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    pieces = {name: origin(name) for name in shapes}
    expected = {
        piece.name: (shapes[name][0] * piece.count, *shapes[name][1:]) for name, piece in pieces.items() if piece
    }
    found = {name: t for name, t in headers_of(source).items() if not KNOWN_BUFFERS.fullmatch(name)}
    if config.tie_word_embeddings and head.name in found:
        _require_same(source, head.name, pieces["model.embed_tokens.weight"].name)
        del found[head.name]
    _require_fit(expected, found)
    dtype = reduce(torch.promote_types, {found[name].dtype for name in expected})
    headers = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    return TextPlan(config, pieces, headers, source, notes)


def _shapes_of(config: TextConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}


def _require_same(source: Mapping[str, torch.Tensor], head: str, embedding: str) -> None:
    if embedding in source and not torch.equal(source[head], source[embedding]):
        raise ValueError(
            f"`tie_word_embeddings` is True, but {head} and {embedding} differ: one of the two would be lost. Set it "
            "to False in config.json if the model was trained so."
        )


def _require_fit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, torch.Tensor]) -> None:
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of the wrong shape": [
            f"{name} {tuple(found[name].shape)} instead of {shape}"
            for name, shape in expected.items()
            if name in found and tuple(found[name].shape) != shape
        ],
    }
    if told := "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names):
        raise ValueError(f"The tensors of the language model are not those of its configuration. Tensors {told}.")


@dataclass(frozen=True)
class TextModel:
    """
    A language model on disk, ready to become part of a MARS.

    Args:
        path (`Path`): Its folder, or a GGUF file.
        plan ([`TextPlan`]): Its tensors in the target's names.
        generation_config (`GenerationConfig`): With its end and padding tokens.
        loaded (`PreTrainedModel`, *optional*): The original as transformers loaded it, for a GGUF file.
    """

    path: Path
    plan: TextPlan
    generation_config: GenerationConfig
    loaded: PreTrainedModel | None = None

    def skeleton(self) -> PreTrainedModel:
        """Build the target without weights: on the meta device."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.plan.config).to(self.plan.dtype)
        model.generation_config = self.generation_config
        return model

    def load(self) -> PreTrainedModel:
        """Load the original as transformers does; a Qwen v1, whose code transformers lacks, as the target's class."""
        if self.loaded is not None:
            return self.loaded
        if read_json(self.path / "config.json")["model_type"] != "qwen":
            return AutoModelForCausalLM.from_pretrained(self.path, dtype=self.plan.dtype, local_files_only=True)
        weights = {"state_dict": dict(self.plan), "dtype": self.plan.dtype}
        return Qwen2ForCausalLM.from_pretrained(None, config=self.plan.config, **weights)


def read_text_model(path: Path) -> TextModel:
    """
    Open a language model for conversion.

    Args:
        path (`Path`): A folder as transformers saves it, with safetensors or PyTorch files; or a GGUF file, which
            transformers reads and which is the only one to be held in memory as a whole.

    Returns:
        [`TextModel`]: Its tensors are read when they are looked up.

    Raises:
        ValueError: See [`plan_text_model`]; also if there is no `config.json`.
    """
    if path.suffix == ".gguf":
        return _read_gguf(path)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} has no config.json. The language model must be a folder as transformers saves it, or a GGUF file."
        )
    plan = plan_text_model(read_json(path / "config.json"), Checkpoint.find(path))
    stated = path / "generation_config.json"
    tokens = read_json(stated) if stated.is_file() else {}
    return TextModel(path, plan, _generation_config(plan.config, tokens))


def _generation_config(config: TextConfig, tokens: Mapping[str, Any]) -> GenerationConfig:
    """Take over which tokens end a text and which pads; how to draw them is the user's affair."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: tokens.get(name, getattr(config, name)) for name in names})


def _read_gguf(path: Path) -> TextModel:
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"transformers reads GGUF files with packages that are missing here: {', '.join(missing)}.")
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Name a GGUF file, or a folder with a saved model.")
    config = _from_gguf(AutoConfig, path).to_dict()
    config.pop("quantization_config", None)  # says how the file is read: it is unpacked here
    _refuse_mixture(config, {})
    model, info = _from_gguf(AutoModelForCausalLM, path, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{path} lacks tensors: {', '.join(sorted(info['missing_keys']))}. Fetch it again.")
    plan = plan_text_model(config, model.state_dict())
    note = "The language model comes from a GGUF file, with whatever rounding that file holds; stored as float32."
    return TextModel(path, replace(plan, notes=(*plan.notes, note)), _generation_config(plan.config, {}), model)


def _from_gguf(auto_class: Any, path: Path, **kwargs: Any) -> Any:
    try:
        return auto_class.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True, **kwargs)
    except (ValueError, OSError, IndexError, KeyError, struct.error) as error:
        raise ValueError(f"{path} is damaged or no GGUF file that transformers reads ({error}).") from error
