"""
A language model and a VQ-GAN on disk become a MARS on disk, without either ever being in memory as a whole.

`StreamedMars` is the MARS that `MarsForConditionalGeneration.from_text_and_vq` would build, but its weights are made
one at a time: read, written, and afterwards read again and compared. The rest of the folder is `hub.py`'s.
"""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import VQModel
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..hub import CardFacts, export_checkpoint
from ..image_processing_mars import new_image_processor
from ..modeling_mars import MarsForConditionalGeneration
from ..processing_mars import MarsProcessor
from ..prompts_mars import END_OF_TEXT
from .checkpoints import (
    Checkpoint,
    as_bytes,
    find_weight_files,
    is_safetensors,
    read_json,
    read_torch_file,
    write_safetensors,
)
from .qwen1_tokenizer import convert_qwen1_tokenizer
from .text import ConversionWarning, TextModel, read_text_model
from .vqgan import convert_vqgan_state_dict, detect_vqgan_source

GB = 1e9
JANUS_FIELDS = {"image_token_size": "codebook_size", "n_embed": "codebook_embed_dim"}  # its names to LlamaGen's
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
MEMORY_SHARE = 0.5  # of the free memory that both models may take to be compared by what they say
PROBE_SHAPE = (2, 16)  # rows and tokens
PROBE_CODES = (4, 6)  # a picture of so many codes, not square
# Llama's projections have no bias and Qwen2's a zero one: where that is computed otherwise, it is rounding.
ROUNDING = 16  # units of the dtype's precision, of the largest logit

UNIT_PIXELS_NOTE = (
    "This VQ-GAN takes and gives pixels in [0, 1], not in [-1, 1]. The processor is made so; whoever calls the model "
    "without it has to do the same."
)


@dataclass(frozen=True)
class Conversion:
    """
    What a conversion made.

    Args:
        folder (`Path`): The complete Hub folder.
        checks (`tuple[str, ...]`): What was compared, or why it was not, a sentence each.
    """

    folder: Path
    checks: tuple[str, ...]


def convert_to_mars(
    text: str | os.PathLike,
    vqgan: str | os.PathLike,
    out: str | os.PathLike,
    vqgan_config: str | os.PathLike | None = None,
    vqgan_source: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    codebook_size: int | None = None,
    unit_pixels: bool | None = None,
    max_shard_size: int | str = "5GB",
    seed: int = 0,
    overwrite: bool = False,
) -> Conversion:
    """
    Write a MARS whose language model and VQ-GAN are those of two checkpoints, exactly.

    Its visual experts start from the text weights as in [`MarsForConditionalGeneration.from_text_and_vq`]. Tensors are
    streamed: one of them is in memory at a time, and the VQ-GAN. Before the folder appears, every tensor is read again
    and compared with its source, and the outputs of both models too where both fit in half of the free memory.

    Args:
        text (`str` or `os.PathLike`):
            Folder of a Qwen (v1, 1.5, 2, 2.5 or 3, dense) or of a Llama without biases, or a GGUF file.
        vqgan (`str` or `os.PathLike`): Folder or file of a VQ-GAN.
        out (`str` or `os.PathLike`): Folder to write. It appears when it is complete and checked, or not at all.
        vqgan_config (`str` or `os.PathLike`, *optional*):
            Its JSON or YAML. Defaults to `config.json`, or the only YAML file, beside the weights.
        vqgan_source (`str`, *optional*): Its format, see [`convert_vqgan_state_dict`]. `None` finds out.
        tokenizer (`str` or `os.PathLike`, *optional*):
            Folder of the tokenizer, or a `qwen.tiktoken`. Defaults to the language model's own.
        codebook_size (`int`, *optional*): Number of image codes that is expected of the VQ-GAN.
        unit_pixels (`bool`, *optional*):
            Whether the VQ-GAN takes and gives pixels in [0, 1] instead of [-1, 1]. Defaults to `True` for open-muse's
            and aMUSEd's and `False` for all others. The processor is made accordingly.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): Largest file of weights.
        seed (`int`, defaults to 0): Of the noise on the vision head.
        overwrite (`bool`, defaults to `False`): Replace an earlier export at the same place.

    Returns:
        [`Conversion`]: The folder, and what was checked.

    Raises:
        ValueError: If a checkpoint is damaged, of an unsupported kind or incomplete, both do not fit each other, or
            `out` is taken.
        OSError: If the disk is full.
        RuntimeError: If what was written is not what was to be written.
    """
    text, vqgan, out = Path(text), Path(vqgan), Path(out)
    text_model = read_text_model(text)
    vq_model, takes_unit_pixels = read_vqgan(vqgan, None if vqgan_config is None else Path(vqgan_config), vqgan_source)
    text_tokenizer, notes = read_tokenizer(text if tokenizer is None else Path(tokenizer))
    end_of_text_id = text_tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    ends = text_model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end_of_text_id not in ends:  # captions and documents end so, whatever ends a turn of a chat
        text_model.generation_config.eos_token_id = [*ends, end_of_text_id]

    sizes = {} if codebook_size is None else {"codebook_size": codebook_size}
    mars = StreamedMars(text_model, vq_model, end_of_text_id, max_shard_size, seed, **sizes)
    unit_pixels = takes_unit_pixels if unit_pixels is None else unit_pixels
    image_processor = new_image_processor(mars.config, unit_pixels)
    processor = MarsProcessor.from_text_tokenizer(text_tokenizer, mars.config, image_processor=image_processor)
    notes = (*text_model.plan.notes, *notes, *([UNIT_PIXELS_NOTE] if unit_pixels else []))
    for note in (*notes, *_leftovers(out)):
        warnings.warn(note, ConversionWarning, stacklevel=2)
    with _full_disk_explained(out, mars.nbytes):
        export_checkpoint(mars, processor, out, _facts(text, vqgan, notes), overwrite)
    return Conversion(out, tuple(mars.checks))


class StreamedMars:
    """
    A MARS whose weights are made one at a time, from a language model on disk and a VQ-GAN.

    Args:
        text ([`TextModel`]): The language model.
        vq_model (`VQModel`): The image tokenizer.
        end_of_text_id (`int`): Whose row `<null>` starts as.
        max_shard_size (`int` or `str`): Largest file of weights.
        seed (`int`): Of the noise on the vision head.
        config_kwargs: Further fields of [`MarsConfig`].

    Raises:
        ValueError: If the VQ-GAN contradicts a field of the configuration.
    """

    def __init__(
        self,
        text: TextModel,
        vq_model: VQModel,
        end_of_text_id: int,
        max_shard_size: int | str,
        seed: int,
        **config_kwargs: Any,
    ):
        self.text, self.vq_model, self.end_of_text_id = text, vq_model, end_of_text_id
        self.max_shard_size, self.seed = max_shard_size, seed
        self.checks: list[str] = []
        with torch.device("meta"):
            empty = VQModel.from_config(vq_model.config)
            self.skeleton = MarsForConditionalGeneration.from_text_and_vq(
                text.skeleton(), empty, end_of_text_id, **config_kwargs
            )
        self.config = self.skeleton.config
        self.headers = self.skeleton.state_dict()
        if self.config.tie_word_embeddings:
            del self.headers["text_head.weight"]

    @property
    def nbytes(self) -> int:
        """Size of all weights in bytes."""
        return sum(header.nbytes for header in self.headers.values())

    def tensor(self, name: str) -> torch.Tensor:
        """Make one weight, by the name that it has in a MARS."""
        if name.startswith("vqgan."):
            return self.vq_model.state_dict()[name.removeprefix("vqgan.")].to(self.headers[name].dtype)
        if name == "model.visual_embed_tokens.weight":
            return self._visual_embeddings(name)
        if name == "vision_head.weight":
            return self._vision_head(name)
        return self.text.plan[name.replace("visual_", "").replace("text_head.", "lm_head.")]

    def _visual_embeddings(self, name: str) -> torch.Tensor:
        header, embeddings = self.headers[name], self.text.plan["model.embed_tokens.weight"]
        visual = torch.empty(header.shape, dtype=header.dtype)
        visual.copy_(embeddings.float().mean(0).expand_as(visual))
        visual[self.config.null_token_id - self.config.image_token_offset] = embeddings[self.end_of_text_id]
        return visual

    def _vision_head(self, name: str) -> torch.Tensor:
        header, plan = self.headers[name], self.text.plan
        head = plan["model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"]
        noise = torch.randn(header.shape, generator=torch.Generator().manual_seed(self.seed))
        noise *= 0.02 * head.float().std()
        return noise.add_(head.float().mean(0)).to(header.dtype)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """
        Write configuration and weights as the model's own `save_pretrained` does, and check them.

        Raises:
            RuntimeError: If a tensor or an output is not what it has to be; `checks` says else what was compared.
        """
        folder = Path(folder)
        self.config.dtype = str(self.text.plan.dtype).removeprefix("torch.")
        self.config.architectures = [type(self.skeleton).__name__]
        self.config.save_pretrained(folder)
        self.skeleton.generation_config.save_pretrained(folder)
        self._write(folder)
        self.checks = [self._compare_tensors(folder), self._compare_outputs(folder)]

    def _write(self, folder: Path) -> None:
        split = split_torch_state_dict_into_shards(self.headers, max_shard_size=self.max_shard_size)
        with self._progress("writing") as progress:

            def read(name: str) -> torch.Tensor:
                progress.update(self.headers[name].nbytes)
                return self.tensor(name)

            for file, names in split.filename_to_tensors.items():
                write_safetensors(folder / file, {name: self.headers[name] for name in names}, read)
        if split.is_sharded:
            count = sum(header.numel() for header in self.headers.values())
            index = {"metadata": {"total_parameters": count, **split.metadata}, "weight_map": split.tensor_to_filename}
            content = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")

    def _progress(self, what: str) -> tqdm:
        return tqdm(total=self.nbytes, desc=what, unit="B", unit_scale=True)

    def _compare_tensors(self, folder: Path) -> str:
        stored = Checkpoint.find(folder)
        wrong = sorted(stored.headers.keys() ^ self.headers.keys())
        with self._progress("checking") as progress:
            for name in (name for name in self.headers if name in stored.headers):
                if not torch.equal(as_bytes(stored[name]), as_bytes(self.tensor(name))):
                    wrong.append(name)
                progress.update(self.headers[name].nbytes)
        if wrong:
            raise RuntimeError(
                f"Read again from disk, these tensors are not what was written: {', '.join(wrong)}. Disk or memory "
                "may be failing; convert again to another disk."
            )
        return (
            f"all {len(self.headers)} tensors ({self.nbytes / GB:.2f} GB) were read again from disk and equal their "
            "sources bit for bit"
        )

    @torch.no_grad()
    def _compare_outputs(self, folder: Path) -> str:
        needed, free = self.text.plan.nbytes + self.nbytes, available_memory()
        if free is None or needed > MEMORY_SHARE * free:
            known = "unknown" if free is None else f"{MEMORY_SHARE * free / GB:.2f} GB"
            return (
                f"outputs were not compared: both models take {needed / GB:.2f} GB, half of the free memory is {known}"
            )
        mars = MarsForConditionalGeneration.from_pretrained(folder, local_files_only=True)
        source = self.text.load().eval()
        random = torch.Generator().manual_seed(self.seed)
        factor = self.config.downsample_factor
        pixels = torch.rand(1, 3, *(factor * side for side in PROBE_CODES), generator=random) * 2 - 1
        if not torch.equal(mars.vqgan(pixels).sample, self.vq_model(pixels).sample):
            raise RuntimeError("The VQ-GAN of the MARS gives a picture back otherwise than the one it was made from.")
        ids = torch.randint(self.config.text_vocab_size, PROBE_SHAPE, generator=random)
        logits = mars(ids, modality="text", vocabulary="text").logits
        expected = source(ids).logits
        error = (logits.double() - expected.double()).abs().max().item()
        if not error <= ROUNDING * torch.finfo(expected.dtype).eps * expected.abs().max().item():
            raise RuntimeError(
                f"The MARS does not say what its language model says: logits differ by up to {error:.3g}."
            )
        how = "bit for bit" if torch.equal(logits, expected) else f"to rounding, {error:.3g} at most"
        return (
            f"probe outputs were compared: logits equal those of {type(source).__name__} {how}, pictures bit for bit"
        )


def read_vqgan(path: Path, config: Path | None, source: str | None) -> tuple[VQModel, bool]:
    """
    Load a VQ-GAN of any format that a diffusers `VQModel` holds exactly, in float32.

    Returns:
        `tuple[VQModel, bool]`: The model, and whether it takes pixels in [0, 1], as open-muse's and aMUSEd's do.

    Raises:
        ValueError: If its file is damaged, or no `VQModel` can hold it.
    """
    files = find_weight_files(path)
    # One PyTorch file may hold several sets of weights (`ema`, `model`): which of them counts is the format's affair.
    wrapped = len(files) == 1 and not is_safetensors(files[0])
    stored = read_torch_file(files[0]) if wrapped else Checkpoint(files)
    original = read_vqgan_config(path, config)
    source = source or detect_vqgan_source(stored, original)
    vq_config, state_dict = convert_vqgan_state_dict(stored, original, source)
    model = VQModel.from_config(vq_config)
    model.load_state_dict(state_dict, strict=True)
    # Only aMUSEd's, which is open-muse's in diffusers' names, decodes from looked-up codes.
    return model.float().eval(), source == "muse" or bool(original.get("lookup_from_codebook"))


def read_vqgan_config(path: Path, config: Path | None) -> dict[str, Any]:
    """
    Find and read the configuration of a VQ-GAN: a named file, `config.json`, or the only YAML file beside its weights.
    A training YAML's node `model` is taken, and of a whole Janus what it says of its VQ-GAN. Empty if there is none:
    some formats need none.

    Raises:
        ValueError: If there are several YAML files and none is named, or the file holds no mapping.
    """
    folder = path if path.is_dir() else path.parent
    if config is None and (folder / "config.json").is_file():
        config = folder / "config.json"
    if config is None:
        found = sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
        if not found:
            return {}
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{folder} holds {names}. Name the one that belongs to the VQ-GAN as its configuration.")
        config = found[0]
    if not config.is_file():
        raise ValueError(f"{config} does not exist. Name the configuration of the VQ-GAN.")
    content = read_json(config) if config.suffix == ".json" else _read_yaml(config)
    if isinstance(whole := content.get("gen_vision_config"), dict):
        params = whole.get("params", {})
        return {ours: params[theirs] for theirs, ours in JANUS_FIELDS.items() if theirs in params}
    return content["model"] if isinstance(content.get("model"), dict) else content


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a YAML mapping, got a {type(content).__name__}.")
    return content


def read_tokenizer(path: Path) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
    """
    Load a language model's tokenizer.

    Args:
        path (`Path`): A folder, a GGUF file, or a file `qwen.tiktoken`.

    Returns:
        `tuple[PreTrainedTokenizerBase, tuple[str, ...]]`: The tokenizer, and what it does otherwise than the original.

    Raises:
        ValueError: If there is none, or it has no `<|endoftext|>`, which separates MARS's documents.
    """
    notes: tuple[str, ...] = ()
    ranks = path / "qwen.tiktoken" if path.is_dir() else path
    if ranks.suffix == ".tiktoken" and ranks.is_file() and not (path / "tokenizer.json").is_file():
        tokenizer = convert_qwen1_tokenizer(ranks)
    elif path.suffix == ".gguf":
        tokenizer, notes = _gguf_tokenizer(path)
    elif any((path / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = _saved_tokenizer(path)
    else:
        names = ", ".join((*TOKENIZER_FILES, "qwen.tiktoken"))
        raise ValueError(f"{path} holds no tokenizer: expected one of {names}. Name its folder with `tokenizer`.")
    if END_OF_TEXT not in tokenizer.get_vocab():
        raise ValueError(
            f"The tokenizer of {path} has no token {END_OF_TEXT}, with which MARS ends a caption. Add it to the "
            "language model first, or choose another one."
        )
    return tokenizer, notes


def _saved_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library under it raises no other kind
        raise ValueError(f"The tokenizer of {path} is damaged, or needs code of its own ({error}).") from error


def _gguf_tokenizer(path: Path) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.integrations.gguf.reader import read_gguf_metadata

    rule = read_gguf_metadata(str(path))[0].get("tokenizer.ggml.pre", "unstated")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if rule in (*GGUF_PRE_TOKENIZER_SPLITS, "gpt-2"):
        return tokenizer, ()
    return tokenizer, (
        f"The tokenizer comes from a GGUF file whose rule for splitting words ({rule}) transformers does not know: it "
        "may cut some text otherwise than the original, numbers above all. Give the original's with `tokenizer`.",
    )


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, or `None` where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _facts(text: Path, vqgan: Path, notes: tuple[str, ...]) -> CardFacts:
    return CardFacts(
        summary=(
            f"A MARS made of the language model `{text.resolve().name}` and the VQ-GAN `{vqgan.resolve().name}`. Its "
            "visual part is not trained yet."
        ),
        training_data="What its language model and its VQ-GAN learnt from; nothing was added.",
        limits=("It cannot draw before it is trained: its visual experts are copies of its text experts.", *notes),
    )


def _leftovers(out: Path) -> list[str]:
    """Tell of what a run that was killed could not clear away."""
    parent = out.resolve().parent
    left = [path for path in parent.iterdir() if path.name.startswith(f".{out.name}-")] if parent.is_dir() else []
    return [
        f"{path} was left by a run that was killed, unless one is at work now. It can be deleted." for path in left
    ]


@contextmanager
def _full_disk_explained(out: Path, needed: int) -> Iterator[None]:
    """Refuse to start what cannot be finished, and name the folder if the disk fills up all the same."""
    place = next(parent for parent in out.resolve().parents if parent.is_dir())
    message = f"The disk of {place} is full: {out} takes {needed / GB:.2f} GB"
    if (free := shutil.disk_usage(place).free) < needed:
        raise OSError(errno.ENOSPC, f"{message}, {free / GB:.2f} GB are free. Nothing was written.")
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(errno.ENOSPC, f"{message}. Nothing was left there.") from error
