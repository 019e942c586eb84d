"""
Tensors of saved models, read from disk one at a time, and safetensors files written in the same manner.

Files come from strangers: PyTorch's are read with `weights_only=True`, and nothing that they hold is run.
"""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

# As safetensors names them (https://github.com/huggingface/safetensors).
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

WEIGHT_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
WRAPPERS = ("state_dict", "model", "module")

# Classes that training frameworks leave in their checkpoints beside the weights.
_TRACES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")


class Checkpoint(Mapping[str, torch.Tensor]):
    """
    The tensors of one model, in any number of safetensors or PyTorch files. Looking one up reads it from disk.

    Args:
        files (`Iterable[Path]`): Files that together hold the model.

    Attributes:
        headers (`dict[str, torch.Tensor]`): Name, shape and dtype of every tensor; they lie on the meta device.

    Raises:
        ValueError: If a file is damaged, is no file of tensors, or two files hold the same tensor.
    """

    def __init__(self, files: Iterable[Path]):
        self.headers: dict[str, torch.Tensor] = {}
        self._home: dict[str, Path] = {}
        self._kept: tuple[Path, dict[str, torch.Tensor]] | None = None
        for file in files:
            headers = _safetensors_headers(file) if is_safetensors(file) else _on_meta(self._open(file))
            if twice := sorted(headers.keys() & self.headers.keys()):
                raise ValueError(f"{self._home[twice[0]]} and {file} both hold {', '.join(twice)}. Keep one of them.")
            self.headers |= headers
            self._home |= dict.fromkeys(headers, file)

    @classmethod
    def find(cls, path: Path) -> "Checkpoint":
        """Open the weights of a folder, or one file of weights, see [`find_weight_files`]."""
        return cls(find_weight_files(path))

    def _open(self, file: Path) -> dict[str, torch.Tensor]:
        """Open a PyTorch file; anew for each tensor where it is mapped, as pages once read would stay in memory."""
        if self._kept is not None and self._kept[0] == file:
            return self._kept[1]
        self._kept = None  # let go of the one before
        tensors = unwrap(read_torch_file(file))
        if not zipfile.is_zipfile(file):  # the format before torch 1.6: read as a whole
            self._kept = (file, tensors)
        return tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self._home[name]
        if not is_safetensors(file):
            return self._open(file)[name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(header.nbytes for header in self.headers.values())


def headers_of(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Give what names, shapes and dtypes can be seen from, without reading anything."""
    return tensors.headers if isinstance(tensors, Checkpoint) else tensors


def find_weight_files(path: Path) -> list[Path]:
    """
    Find the weights of a saved model.

    Args:
        path (`Path`):
            A file of weights, or a folder: with a file or an index as transformers and diffusers name them, or with
            just one file of weights of any name.

    Returns:
        `list[Path]`: The files.

    Raises:
        ValueError: If there are none, several that are not of one index, or a file of the index is missing.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist. Name a folder with a saved model, or a file of weights.")
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").is_file():
            return _indexed_files(path / f"{name}.index.json")
    files = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "no file of weights"
        raise ValueError(
            f"{path} holds {found}: expected {', '.join(WEIGHT_FILES)}, or one file of any name. Name it."
        )
    return files


def _indexed_files(index: Path) -> list[Path]:
    files = sorted({index.parent / file for file in read_json(index).get("weight_map", {}).values()})
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index.parent} is incomplete: {index.name} names {', '.join(missing)}. Fetch them.")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """
    Read a JSON file that holds an object.

    Raises:
        ValueError: If it holds something else, or is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content


def unwrap(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """
    Take a state dict out of what training scripts wrap around it (`state_dict`, `model`, `module`).

    Raises:
        ValueError: If there is none, or something other than tensors lies among its tensors.
    """
    while not any(isinstance(value, torch.Tensor) for value in content.values()):
        inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            keys = ", ".join(map(str, content)) or "nothing"
            raise ValueError(f"Expected a state dict, by itself or under {', '.join(WRAPPERS)}; found {keys}.")
        content = inner[0]
    if others := [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"A state dict must hold tensors alone, but these are none: {', '.join(others)}.")
    return dict(content)


def read_torch_file(path: Path) -> dict[str, Any]:
    """
    Read a file of `torch.save`, its tensors mapped from disk where its format allows.

    Raises:
        ValueError: If it is damaged, or holds objects that only code can restore.
    """
    try:
        with torch.serialization.safe_globals(_stand_ins(path)):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if unsafe := _unsafe_names(path):
            raise ValueError(
                f"{path} holds more than tensors ({', '.join(unsafe)}). Reading it would run code, so it is not read. "
                "If you trust its origin, save its state dict alone, best as safetensors."
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
        raise ValueError(f"{path} is damaged or no file of tensors ({reason}). Fetch it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}.")
    return content


def _unsafe_names(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, IndexError, KeyError):
        return []  # damaged, or of the format before torch 1.6


class _Inert:
    """Takes the place of a framework's class while a file is read: whatever is done with it, nothing happens."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_ins(path: Path) -> list[tuple[type, str]]:
    names = [name for name in _unsafe_names(path) if name.startswith(_TRACES)]
    return [(type("Inert", (_Inert,), {}), name) for name in names]


def is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _safetensors_headers(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 it is no dict
            described = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}). Fetch it again.") from None
    if unknown := sorted({dtype for dtype, _ in described.values()} - DTYPES.keys()):
        raise ValueError(f"{path} holds tensors of type {', '.join(unknown)}: expected one of {', '.join(DTYPES)}.")
    return {name: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for name, (dtype, shape) in described.items()}


def _on_meta(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}


def write_safetensors(path: Path, headers: Mapping[str, torch.Tensor], read: Callable[[str], torch.Tensor]) -> None:
    """
    Write a safetensors file tensor by tensor, so that only one of them is in memory at a time.

    Args:
        path (`Path`): File to write.
        headers (`Mapping[str, torch.Tensor]`): Shapes and dtypes, best on the meta device.
        read (`Callable`): Gives the tensor of a name.

    Raises:
        ValueError: If a tensor is not what its header says.
    """
    # Wide dtypes first: so each tensor lies at a multiple of its item size, as the format asks.
    names = sorted(headers, key=lambda name: -headers[name].itemsize)
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + headers[name].nbytes
        described = {"dtype": DTYPE_NAMES[headers[name].dtype], "shape": list(headers[name].shape)}
        content[name] = {**described, "data_offsets": [start, end]}
    encoded = json.dumps(content).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            tensor, header = read(name), headers[name]
            if tensor.shape != header.shape or tensor.dtype != header.dtype:
                raise ValueError(
                    f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected {header.dtype} of shape "
                    f"{tuple(header.shape)}."
                )
            file.write(as_bytes(tensor).numpy())
            del tensor  # before the next one is read
        file.flush()
        os.fsync(file.fileno())


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Show a tensor's memory as bytes `(nbytes,)`: what is stored, and what makes two tensors the same."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
