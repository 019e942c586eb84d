"""
What is drawn: prompts in groups, each measured by itself, with their true pictures where there are any.

A group is a language (emoji), a category (T2I-CompBench), a task (GenEval) or everything (COCO). What this file
leaves to others: drawing, and what benchmarks ask about a prompt (`mars_hf.evaluation.parts`, `.scenes`).
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from PIL import Image

from ..data.text import with_style
from ..image_processing_mars import to_rgb
from .parts import ASPECTS, CATEGORIES, PLACES, PromptParts, load_parser, parse_prompt
from .scenes import TASKS, Scene, read_scene


@dataclass(frozen=True)
class Prompt:
    """
    A prompt.

    Args:
        id (`str`): Its name, unique in its set; part of the seed of its pictures.
        text (`str`): What is asked for.
        group (`str`, defaults to `"all"`): Prompts of a group are measured together.
        parts ([`PromptParts`], *optional*): What T2I-CompBench asks about.
        scene ([`Scene`], *optional*): What GenEval looks for.
    """

    id: str
    text: str
    group: str = "all"
    parts: PromptParts | None = None
    scene: Scene | None = None


class PromptSet:
    """
    Prompts with their true pictures.

    Args:
        name (`str`): What results call it.
        prompts (`Sequence[Prompt]`): At least one.
        reference (`Callable[[int], PIL.Image.Image]`, *optional*): Gives the true picture of prompt `i`.

    Raises:
        ValueError: If there is no prompt, an id comes twice, or a text is empty.
    """

    def __init__(self, name: str, prompts: Sequence[Prompt], reference: Callable[[int], Image.Image] | None = None):
        if not prompts:
            raise ValueError(f"{name}: there are no prompts to draw.")
        seen: set[str] = set()
        for prompt in prompts:
            if not isinstance(prompt.text, str) or not prompt.text.strip():
                raise ValueError(f"{name}: prompt {prompt.id!r} has no text.")
            if prompt.id in seen:
                raise ValueError(f"{name}: two prompts have the id {prompt.id!r}.")
            seen.add(prompt.id)
        self.name, self.prompts, self.reference = name, list(prompts), reference

    def __len__(self) -> int:
        return len(self.prompts)

    def groups(self) -> dict[str, list[int]]:
        """Give the numbers of each group's prompts, groups in the order of their first prompt."""
        groups: dict[str, list[int]] = {}
        for number, prompt in enumerate(self.prompts):
            groups.setdefault(prompt.group, []).append(number)
        return groups


def _sample(count: int, limit: int | None, seed: int) -> list[int]:
    """Choose `limit` of `count` at random, in order; all of them without a limit."""
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise ValueError(f"`limit` must be 1 or more, got {limit}.")
    return sorted(random.Random(seed).sample(range(count), limit))


@strict
@dataclass
class EmojiPrompts:
    """
    Captions of emoji with their style, `"red apple, noto style"` and `"红苹果，noto 风格"`; a group for each language.

    Args:
        data (`str`): Folder that `mars-hf data emoji` wrote.
        split (`str`, defaults to `"test"`): `train`, `validation` or `test`.
        languages (`list[str]`, *optional*): Defaults to `en` and `zh`.
        limit (`int`, *optional*): So many records, chosen at random.
        seed (`int`, defaults to 0): Of that choice.
    """

    data: str
    split: str = "test"
    languages: list[str] | None = None
    limit: int | None = None
    seed: int = 0

    def load(self) -> PromptSet:
        """Read the records of the split."""
        from datasets import load_dataset

        languages = self.languages or ["en", "zh"]
        if unknown := [language for language in languages if language not in ("en", "zh")]:
            raise ValueError(f"`prompts.languages` are en and zh, got {unknown[0]!r}.")
        if not Path(self.data).is_dir():
            raise ValueError(f"{self.data} is no folder. Make the data with `mars-hf data emoji --out {self.data}`.")
        data = load_dataset(self.data, split=self.split)
        chosen = _sample(len(data), self.limit, self.seed)
        records = data.remove_columns("image").to_list()
        entries = [(language, records[i], i) for language in languages for i in chosen]
        prompts = [
            Prompt(f"{r['hexcode']}|{r['style']}|{language}", self.text(r, language), language)
            for language, r, _ in entries
        ]
        return PromptSet(f"emoji, {self.split}", prompts, lambda number: data[entries[number][2]]["image"])

    @staticmethod
    def text(record: dict[str, str], language: str) -> str:
        return with_style(record[f"caption_{language}"], record["style"], language)


@strict
@dataclass
class CocoPrompts:
    """
    Captions of COCO (https://cocodataset.org), one of each picture, as FID-30k takes them.

    Args:
        annotations (`str`): `captions_val2014.json`.
        pictures (`str`): Folder with its pictures, `val2014`.
        limit (`int`, *optional*): So many pictures, chosen at random; the protocol's is 30,000.
        seed (`int`, defaults to 0): Of the choice of pictures and captions.
    """

    annotations: str
    pictures: str
    limit: int | None = None
    seed: int = 0

    def load(self) -> PromptSet:
        """Read the captions, one of each picture."""
        if not Path(self.annotations).is_file() or not Path(self.pictures).is_dir():
            raise ValueError(
                f"COCO's captions were looked for in the file {self.annotations} and its pictures in the folder "
                f"{self.pictures}. Unpack annotations_trainval2014 and val2014 of https://cocodataset.org there."
            )
        content = json.loads(Path(self.annotations).read_text(encoding="utf-8"))
        if missing := [key for key in ("images", "annotations") if key not in content]:
            raise ValueError(f"{self.annotations} has no {missing[0]!r}: it is not a file of COCO captions.")
        captions: dict[int, list[str]] = {}
        for entry in content["annotations"]:
            captions.setdefault(entry["image_id"], []).append(" ".join(entry["caption"].split()))
        files = {image["id"]: image["file_name"] for image in content["images"] if image["id"] in captions}
        ids = sorted(files)
        ids = [ids[i] for i in _sample(len(ids), self.limit, self.seed)]
        rng = random.Random(f"captions {self.seed}")
        prompts = [Prompt(str(id), rng.choice(captions[id])) for id in ids]
        folder = Path(self.pictures)
        return PromptSet("COCO 2014 validation", prompts, lambda number: _open(folder / files[ids[number]]))


@strict
@dataclass
class CompBenchPrompts:
    """
    The validation prompts of T2I-CompBench (https://huggingface.co/papers/2307.06350), a group for each category.

    Args:
        folder (`str`): `examples/dataset` of the benchmark's repository, with `color_val.txt` and its like.
        categories (`list[str]`, *optional*): Defaults to all six.
        parser (`str`, defaults to `"en_core_web_sm"`): Pipeline of spaCy that finds noun phrases and objects.
        limit (`int`, *optional*): So many prompts of each category, chosen at random.
        seed (`int`, defaults to 0): Of that choice.
    """

    folder: str
    categories: list[str] | None = None
    parser: str = "en_core_web_sm"
    limit: int | None = None
    seed: int = 0

    def load(self) -> PromptSet:
        """Read and parse the prompts."""
        categories = self.categories or list(CATEGORIES)
        if unknown := [category for category in categories if category not in CATEGORIES]:
            raise ValueError(f"`prompts.categories` are {', '.join(CATEGORIES)}, got {unknown[0]!r}.")
        lines = {category: self._lines(f"{category}_val.txt") for category in categories}
        aspects = {"spatial": set(), "action": set()}
        if "complex" in categories:
            aspects = {kind: set(self._lines(f"complex_val_{kind}.txt")) for kind in aspects}
        parser = load_parser(self.parser)
        prompts = []
        for category in categories:
            for i in _sample(len(lines[category]), self.limit, self.seed):
                text = lines[category][i]
                # A complex prompt in neither list is about all three, as the benchmark has it.
                aspect = next((kind for kind, listed in aspects.items() if text in listed), "both")
                parts = parse_prompt(parser(text), category, aspect)
                prompts.append(Prompt(f"{category}-{i}", text, category, parts))
        return PromptSet("T2I-CompBench, validation", prompts)

    def _lines(self, name: str) -> list[str]:
        """Read prompts as the benchmark's scripts do: one a line, up to the first full stop, small letters."""
        path = Path(self.folder) / name
        if not path.is_file():
            raise ValueError(f"{path} does not exist: `prompts.folder` is `examples/dataset` of T2I-CompBench.")
        lines = (line.split(".")[0].strip().lower() for line in path.read_text(encoding="utf-8").splitlines())
        return [line for line in lines if line]


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """Read lines with their numbers, from 1, without empty ones."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    lines = enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
    return [(number, line) for number, line in lines if line.strip()]


def _read_entry(line: str, known: Sequence[str], where: str) -> dict[str, Any]:
    """Read a JSON object with a `prompt` and other known keys."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no valid JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f"{where}: expected an object with a `prompt`, got {line[:80]}")
    if unknown := [key for key in entry if key not in known]:
        raise ValueError(f"{where}: unknown key `{unknown[0]}`; known are {', '.join(known)}.")
    return entry


@strict
@dataclass
class GenEvalPrompts:
    """
    Prompts of GenEval (https://huggingface.co/papers/2310.11513), a group for each task.

    Args:
        file (`str`): `prompts/evaluation_metadata.jsonl` of the benchmark's repository, or one of that format.
        tasks (`list[str]`, *optional*): Defaults to those in the file.
        limit (`int`, *optional*): So many prompts of each task, chosen at random.
        seed (`int`, defaults to 0): Of that choice.
    """

    file: str
    tasks: list[str] | None = None
    limit: int | None = None
    seed: int = 0

    def load(self) -> PromptSet:
        """Read the prompts; ids count them from 0, as the benchmark's folders of pictures do."""
        path = Path(self.file)
        if unknown := [task for task in self.tasks or [] if task not in TASKS]:
            raise ValueError(f"`prompts.tasks` are {', '.join(TASKS)}, got {unknown[0]!r}.")
        by_task: dict[str, list[Prompt]] = {task: [] for task in self.tasks or TASKS}
        for index, (number, line) in enumerate(_read_lines(path)):
            where = f"{path}, line {number}"
            entry = _read_entry(line, ("prompt", "tag", "include", "exclude"), where)
            if (tag := entry.get("tag")) not in TASKS:
                raise ValueError(f"{where}: `tag` must be one of {', '.join(TASKS)}, got {tag!r}.")
            prompt = Prompt(f"{index:05d}", entry["prompt"], tag, scene=read_scene(entry, where))
            if tag in by_task:
                by_task[tag].append(prompt)
        if missing := [task for task in self.tasks or [] if not by_task[task]]:
            raise ValueError(f"{path} has no prompts of the task {missing[0]}.")
        chosen = [found[i] for found in by_task.values() for i in _sample(len(found), self.limit, self.seed)]
        return PromptSet(f"GenEval, {path.name}", chosen)


@strict
@dataclass
class JsonlPrompts:
    """
    Prompts of one's own: a JSON object a line with `prompt` and, as needed, `id`, `group`, `picture` (a true picture,
    its path relative to the file) and `parts` (see [`PromptParts`]).

    Args:
        file (`str`): The file.
        limit (`int`, *optional*): So many of them, chosen at random.
        seed (`int`, defaults to 0): Of that choice.
    """

    file: str
    limit: int | None = None
    seed: int = 0

    def load(self) -> PromptSet:
        """Read the prompts."""
        path = Path(self.file)
        rows = _read_lines(path)
        rows = [rows[i] for i in _sample(len(rows), self.limit, self.seed)]
        entries = [self._entry(line, f"{path}, line {number}") for number, line in rows]
        prompts = [
            Prompt(str(e.get("id", number)), e["prompt"], str(e.get("group", "all")), e.get("parts"))
            for (number, _), e in zip(rows, entries, strict=True)
        ]
        pictures = [e.get("picture") for e in entries]
        if any(pictures) and not all(pictures):
            raise ValueError(
                f"{path}: some prompts have a `picture` and some have none. Give all of them one, or none."
            )
        reference = (lambda number: _open(path.parent / pictures[number])) if all(pictures) and pictures else None
        return PromptSet(path.name, prompts, reference)

    @staticmethod
    def _entry(line: str, where: str) -> dict[str, Any]:
        entry = _read_entry(line, ("prompt", "id", "group", "picture", "parts"), where)
        if "parts" in entry:
            names = [part.name for part in fields(PromptParts)]
            if not isinstance(entry["parts"], dict) or any(key not in names for key in entry["parts"]):
                raise ValueError(f"{where}: `parts` is an object of {', '.join(names)}.")
            _check_parts(entry["parts"], where, is_spatial=entry.get("group") == "spatial")
            parts = {key: tuple(value) if isinstance(value, list) else value for key, value in entry["parts"].items()}
            entry["parts"] = PromptParts(**parts)
        return entry


def _check_parts(parts: dict[str, Any], where: str, is_spatial: bool) -> None:
    """Refuse parts of a prompt that T2I-CompBench would ask nonsense about."""
    for name in ("noun_phrases", "objects", "aspects"):
        value = parts.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{where}: `parts.{name}` must be a list of texts, got {value!r}.")
    objects, place = parts.get("objects", []), parts.get("place")
    if len(objects) not in (0, 2) or (is_spatial and not (objects and place)):
        raise ValueError(
            f"{where}: `parts.objects` are the two whose places are compared, and a prompt of the group spatial has "
            f"them and a `place`; got {objects} and {place!r}."
        )
    if place not in (None, *PLACES):
        raise ValueError(f"{where}: `parts.place` must be one of {', '.join(PLACES)}, got {place!r}.")
    if unknown := [one for one in parts.get("aspects", []) if one not in ASPECTS]:
        raise ValueError(f"{where}: `parts.aspects` are {', '.join(ASPECTS)}, got {unknown[0]!r}.")


def _open(path: Path) -> Image.Image:
    """Open a true picture, or say which one cannot be opened."""
    try:
        with Image.open(path) as picture:
            return to_rgb(picture)  # as in training: upright, white behind what is transparent
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"The true picture {path} cannot be read: {error}") from None


PROMPT_KINDS = {
    "emoji": EmojiPrompts,
    "coco": CocoPrompts,
    "compbench": CompBenchPrompts,
    "geneval": GenEvalPrompts,
    "jsonl": JsonlPrompts,
}
