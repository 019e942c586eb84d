"""
Where a result comes from: which checkpoint, by its hash, and which versions.
"""

import hashlib
import os
from importlib.metadata import version
from pathlib import Path

from tqdm.auto import tqdm
from transformers.utils import ADAPTER_CONFIG_NAME

from .. import DEFAULT_CHECKPOINT, __version__
from ..weights_mars import adapter_base, weight_files, weights_digest

LIBRARIES = ("torch", "transformers", "diffusers")
HASHED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".txt")
# What Trainer leaves beside the weights: where a run stood, not what the model is.
OF_TRAINING = ("training_args", "trainer_state", "optimizer", "scheduler", "rng_state", "scaler")


def local_checkpoint(name: str | os.PathLike) -> Path | None:
    """Find the folder of a checkpoint on this machine: a folder, or else the embedded one by its name."""
    path = Path(name)
    if (path / "config.json").is_file() or (path.is_dir() and str(name) != DEFAULT_CHECKPOINT.name):
        return path
    return DEFAULT_CHECKPOINT if str(name) == DEFAULT_CHECKPOINT.name else None


def checkpoint_folder(name: str) -> Path:
    """
    Find the folder of a checkpoint: a folder, the embedded one by its name, or one that is brought from the Hub.

    Raises:
        ValueError: If there is no such checkpoint.
    """
    if (folder := local_checkpoint(name)) is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{name!r} is neither a folder nor a repository that the Hub gave: {error}") from None


def fingerprint(path: str | os.PathLike) -> str:
    """
    Hash a checkpoint: the names and contents of its weights, configurations and tokenizer, or one file. Of an adapter
    by itself the weights of its base count, too.

    Returns:
        `str`: A SHA-256 in hexadecimal.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in HASHED_SUFFIXES)
    files = [file for file in files if not file.name.startswith(OF_TRAINING)]
    whole = hashlib.sha256()
    for file in tqdm(files, desc="Hashing the checkpoint", unit="file", leave=False, delay=5):
        with file.open("rb") as stream:
            whole.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    if path.is_dir() and (path / ADAPTER_CONFIG_NAME).is_file() and (base := adapter_base(path)) is not None:
        whole.update(f"base {weights_digest(weight_files(base))}\n".encode())
    return whole.hexdigest()


def library_versions() -> dict[str, str]:
    """Give the versions that pictures may depend on."""
    return {"mars_hf": __version__, **{name: version(name) for name in LIBRARIES}}
