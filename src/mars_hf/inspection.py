"""
What a checkpoint is, from its configuration and the headers of its weights, without loading them.
"""

from pathlib import Path
from typing import Any

import torch

from . import MarsConfig
from .configuration_mars import SPECIAL_TOKENS
from .conversion.checkpoints import DTYPE_NAMES, Checkpoint
from .evaluation.provenance import checkpoint_folder, fingerprint
from .hub import DOCUMENTS, ENLARGER, require_checkpoint
from .modeling_mars import is_visual_parameter

PARTS = {
    "text": "language model, shared norms",
    "visual": "visual experts, embedding, head",
    "vqgan": "VQ-GAN",
}
CARRIED = {ENLARGER: "super-resolution", DOCUMENTS: "an adapter for documents"}  # folders inside the checkpoint's
PROMPT_TOKENS = 64  # that the estimate of the cache allows for


def inspect_checkpoint(name: str) -> dict[str, Any]:
    """
    Say what a checkpoint is.

    Args:
        name (`str`): `"mars-emoji"` for the embedded one, a folder, or a name on the Hub.

    Returns:
        `dict[str, Any]`: `folder`, `sha256`, `base_checkpoint`, `language_model`, `parts` (parameters, stored bytes
        and types, whether they train), `carries` (stored bytes of the models in folders of its own), `vocabulary`
        (first and last id of each range), `pictures`, `memory` in bytes.

    Raises:
        ValueError: If there is no MARS, or its files are damaged.
    """
    folder = checkpoint_folder(name)
    require_checkpoint(folder)
    config = MarsConfig.from_pretrained(folder)
    headers = _headers(folder, config.base_checkpoint)
    text = config.text_config
    factor = config.downsample_factor
    return {
        "folder": str(folder),
        "sha256": fingerprint(folder),
        "base_checkpoint": config.base_checkpoint,
        "language_model": {
            "type": text.model_type,
            "layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "context": text.max_position_embeddings,
        },
        "parts": _parts(headers, config),
        "carries": {name: _stored_bytes(folder / name) for name in CARRIED if (folder / name).is_dir()},
        "vocabulary": _vocabulary(config),
        "pictures": {
            "default_size": [config.default_image_size] * 2,
            "multiple_of": factor,
            "codes_by_default": (config.default_image_size // factor) ** 2,
            "codes_per_step": config.trained_codes_per_step,
            "code_order": config.code_order,
        },
        "memory": _memory(headers, config),
    }


def _headers(folder: Path, base: dict[str, str] | None) -> dict[str, torch.Tensor]:
    """Names, shapes and types of all tensors: the folder's own, over those of the base that it is stored against."""
    headers: dict[str, torch.Tensor] = {}
    for place in [folder] if base is None else [folder / base["path"], folder]:
        files = sorted(place.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} is stored against the weights at {base['path']}, but there are none.")
        headers |= Checkpoint(files).headers
    return headers


def _stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _part_of(name: str) -> str:
    return "vqgan" if name.startswith("vqgan.") else "visual" if is_visual_parameter(name) else "text"


def _parts(headers: dict[str, torch.Tensor], config: MarsConfig) -> dict[str, dict[str, Any]]:
    parts = {}
    for part in PARTS:
        own = [header for name, header in headers.items() if _part_of(name) == part]
        parts[part] = {
            "parameters": sum(header.numel() for header in own),
            # Without visual experts the shared weights are what is trained.
            "trains": part == "visual" or (part == "text" and not config.use_visual_expert),
            "stored_bytes": sum(header.nbytes for header in own),
            "stored_as": sorted({DTYPE_NAMES[header.dtype] for header in own}),
        }
    return parts


def _vocabulary(config: MarsConfig) -> dict[str, list[int]]:
    """First and last id of each range."""
    specials = config.image_start_token_id
    padding = specials + len(SPECIAL_TOKENS)
    ranges = {
        "text": (0, config.text_vocab_size),
        "codes": (config.image_token_offset, specials),
        "specials": (specials, padding),
        "padding": (padding, config.vocab_size),
    }
    return {name: [first, end - 1] for name, (first, end) in ranges.items() if end > first}


def _memory(headers: dict[str, torch.Tensor], config: MarsConfig) -> dict[str, Any]:
    """Bytes of the weights when loaded, the VQ-GAN in float32, and of the cache of one picture with guidance."""
    dtype = config.dtype or torch.float32
    weights = {part: 0 for part in PARTS}
    for name, header in headers.items():
        own = torch.promote_types(dtype, torch.float32) if _part_of(name) == "vqgan" else dtype
        weights[_part_of(name)] += header.numel() * own.itemsize
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_codes = (config.default_image_size // config.downsample_factor) ** 2
    row = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * dtype.itemsize  # keys and values
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "weights_bytes": weights,
        "cache_bytes": 2 * (PROMPT_TOKENS + num_codes) * row,
    }


def describe(found: dict[str, Any]) -> str:
    """Lay out for reading what [`inspect_checkpoint`] found."""
    language, pictures, memory = found["language_model"], found["pictures"], found["memory"]
    lines = [
        f"folder      {found['folder']}",
        f"sha256      {found['sha256']}",
        *([f"base        {found['base_checkpoint']['path']}"] if found["base_checkpoint"] else []),
        f"language    {language['type']}, {language['layers']} layers of {language['hidden_size']}, a context of "
        f"{language['context']:,} tokens",
        "",
        "part                               parameters   stored",
    ]
    for name, part in found["parts"].items():
        state = "trains" if part["trains"] else "frozen"
        stored = f"{_mib(part['stored_bytes'])} {'/'.join(part['stored_as'])}"
        lines.append(f"{PARTS[name]:<32} {part['parameters']:>13,}   {stored:<18} {state}")
    lines += [f"{CARRIED[name]:<48}{_mib(size)}, in {name}/" for name, size in found["carries"].items()]
    lines += ["", "ids"]
    lines += [f"{name:<11} {first:>7} to {last:>7}" for name, (first, last) in found["vocabulary"].items()]
    height, width = pictures["default_size"]
    steps = ", ".join(map(str, pictures["codes_per_step"]))
    lines += [
        "",
        f"pictures    {height} x {width} by default, multiples of {pictures['multiple_of']}; "
        f"{pictures['codes_by_default']} codes, {steps} a step, in {pictures['code_order']} order",
        f"memory      {_mib(sum(memory['weights_bytes'].values()))} of weights as {memory['dtype']}, "
        f"{_mib(memory['cache_bytes'])} of cache for a picture with guidance",
    ]
    return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


__all__ = ["describe", "inspect_checkpoint"]
