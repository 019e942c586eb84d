"""
Checkpoints that store only what differs from a base: a model of super-resolution keeps the frozen part of the model
whose pictures it enlarges, and is stored without it.

Such a checkpoint's configuration says `base_checkpoint = {"path": .., "sha256": ..}`: where the base is, seen from
the checkpoint's own folder and within its repository, and the digest of the base's files.
"""

import hashlib
import json
import posixpath
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def base_of(name: str | Path, **hub: Any) -> dict[str, str] | None:
    """Read which base a checkpoint is stored against, if any; for the arguments see `from_pretrained`."""
    return PreTrainedConfig.get_config_dict(str(name), **hub)[0].get("base_checkpoint")


def complete_weights(name: str | Path, base: dict[str, str], subfolder: str = "", **hub: Any) -> dict[str, Any]:
    """
    Read the tensors of a base, and over them those of a checkpoint that is stored against it.

    Args:
        name (`str` or `Path`): Folder or name on the Hub.
        base (`dict[str, str]`): From [`base_of`].
        subfolder (`str`, defaults to `""`): Of the checkpoint in its folder or repository.
        hub: Further arguments of `from_pretrained` that say where files are.

    Returns:
        `dict[str, torch.Tensor]`: By name.

    Raises:
        ValueError: If the base is outside the repository, or another one than the checkpoint was stored against.
    """
    place = posixpath.normpath(posixpath.join(subfolder, base["path"]))
    if place.startswith("..") and not Path(name).is_dir():
        raise ValueError(f"The base of {name} would be at {place}, outside its repository.")
    files = weight_files(name, "" if place == "." else place, **hub)
    if (found := weights_digest(files)) != base["sha256"]:
        raise ValueError(
            f"{name} is stored against other weights than those at {base['path']}: expected the sha256 "
            f"{base['sha256']}, found {found}. Put the base there that it was exported with."
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in [*files, *weight_files(name, subfolder, **hub)]:
        tensors |= load_state_dict(file, map_location="cpu")
    return tensors


def adapter_base(name: str | Path, subfolder: str = "") -> str | None:
    """
    Read which model a folder with a PEFT adapter and nothing else belongs on; None of any other place.

    Raises:
        ValueError: If the adapter does not say.
    """
    folder = Path(name) / subfolder
    file = folder / ADAPTER_CONFIG_NAME
    if not file.is_file() or (folder / CONFIG_NAME).is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if base is None:
        raise ValueError(
            f"{folder} holds an adapter that names no base, as one does that a checkpoint carries. Load the "
            "checkpoint, and put the adapter on it by `model.load_adapter`."
        )
    return base


def put_on_adapter(model: Any, folder: str | Path, **kwargs: Any) -> None:
    """
    Load a PEFT adapter onto a model.

    Args:
        model ([`MarsForConditionalGeneration`]): Its base.
        folder (`str` or `Path`): Of the adapter, or its name on the Hub.
        kwargs: Of `load_adapter`.

    Raises:
        ValueError: If it is an adapter of another model.
    """
    try:
        found = model.load_adapter(str(folder), **kwargs)
        odd = sorted(map(str, found.missing_keys | found.unexpected_keys))
    except RuntimeError as error:  # shapes that differ
        raise ValueError(f"The adapter {folder} does not fit the model: {error}") from None
    if odd:
        raise ValueError(f"The adapter {folder} does not fit the model: {len(odd)} tensors, {odd[0]} first.")


def stored_generation_config(name: str | Path, subfolder: str = "", **hub: Any) -> GenerationConfig:
    """Read a generation config; of a subfolder of a local folder the library would read the one above."""
    if Path(name).is_dir():
        name, subfolder = Path(name) / subfolder, ""
    return GenerationConfig.from_pretrained(str(name), subfolder=subfolder, **hub)


def weight_files(name: str | Path, subfolder: str = "", **hub: Any) -> list[str]:
    """Find the safetensors files of a checkpoint, in the order of their names."""
    place = {**hub, "subfolder": subfolder}
    single, index = (  # one file goes before an index, as in the library
        cached_file(str(name), file, _raise_exceptions_for_missing_entries=False, **place)
        for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    names = {SAFE_WEIGHTS_NAME}
    if single is None and index is not None:
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    return [cached_file(str(name), file, **place) for file in sorted(names)]


def weights_digest(files: list[str]) -> str:
    """Give the sha256 of files one after the other, in 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
    return digest.hexdigest()


__all__ = [
    "HUB_ARGUMENTS",
    "adapter_base",
    "base_of",
    "complete_weights",
    "put_on_adapter",
    "stored_generation_config",
    "weight_files",
    "weights_digest",
]
