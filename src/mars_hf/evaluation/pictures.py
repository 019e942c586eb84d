"""
Folders of pictures with everything that decided them: drawn once, measured often.

    guidance-4/settings.json                    prompts, seed, every sampling knob, checkpoint hash, versions
    guidance-4/00000-of-00012/metadata.jsonl    a line for each picture: file_name, prompt, id, group, seed
    guidance-4/00000-of-00012/000000-0.png      prompt 0, its first picture

Every picture has a seed of its own, made of the evaluation's seed, the prompt's id and the picture's number, so that
it does not depend on shards, batches or the number of processes (but for the rounding of sums in batches of another
size). A shard comes into being in one step; what is there is not drawn again. `load_dataset("imagefolder",
data_dir=...)` reads such a folder.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..picture_files import replace_file
from .prompts import Prompt, PromptSet


class Processes(Protocol):
    """The processes that share the work, as accelerate's `PartialState` knows them."""

    num_processes: int
    process_index: int
    is_main_process: bool
    device: torch.device

    def wait_for_everyone(self) -> None: ...


@dataclass(frozen=True)
class Task:
    """
    A picture to be drawn.

    Args:
        prompt ([`Prompt`]): What is asked for.
        number (`int`): Of the prompt in its set.
        sample (`int`): Of the picture among the prompt's.
        seed (`int`): The picture's own.
    """

    prompt: Prompt
    number: int
    sample: int
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.number:06d}-{self.sample}.png"


def picture_seed(seed: int, prompt_id: str, sample: int) -> int:
    """
    Make the seed of one picture.

    Example:
        >>> picture_seed(0, "1F34E|noto|en", 0) == picture_seed(0, "1F34E|noto|en", 0)
        True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt_id}|{sample}".encode()).digest()[:7], "big")


class PictureFolder:
    """
    A folder of pictures, drawn or being drawn.

    Args:
        path (`Path`): The folder.
        prompts ([`PromptSet`]): What is drawn.
        pictures_per_prompt (`int`): Number of pictures of each prompt.
        seed (`int`): Every picture's own seed is made of it.
        shard_size (`int`): Prompts in a shard.
    """

    def __init__(self, path: Path, prompts: PromptSet, pictures_per_prompt: int, seed: int, shard_size: int):
        self.path, self.prompts, self.pictures_per_prompt = Path(path), prompts, pictures_per_prompt
        self.seed, self.shard_size = seed, shard_size
        self.num_shards = -(-len(prompts) // shard_size)

    def shard(self, index: int) -> Path:
        return self.path / f"{index:05d}-of-{self.num_shards:05d}"

    def tasks(self, index: int) -> list[Task]:
        """List a shard's pictures: prompt by prompt, picture by picture."""
        numbers = range(index * self.shard_size, min((index + 1) * self.shard_size, len(self.prompts)))
        return [
            Task(prompt, number, sample, picture_seed(self.seed, prompt.id, sample))
            for number in numbers
            for prompt in [self.prompts.prompts[number]]
            for sample in range(self.pictures_per_prompt)
        ]

    def settle(self, decided_by: dict[str, Any], noted: dict[str, Any]) -> None:
        """
        Write `settings.json`, or check that the pictures that are there were drawn with the same.

        Args:
            decided_by (`dict`):
                What the pictures depend on, as JSON has it. `versions` may differ where all pictures are there.
            noted (`dict`): What is worth knowing, but free to differ when the folder is continued.

        Raises:
            ValueError: If the folder holds pictures that other settings decided, or something else.
        """
        texts = [[prompt.id, prompt.text, prompt.group] for prompt in self.prompts.prompts]
        content = {
            "prompts": self.prompts.name,
            "num_prompts": len(texts),
            "prompts_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
            "pictures_per_prompt": self.pictures_per_prompt,
            "seed": self.seed,
            "shard_size": self.shard_size,
            **decided_by,
        }
        decided = json.loads(json.dumps(content))
        file = self.path / "settings.json"
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))["decided_by"]
            changed = [name for name in {**before, **decided} if before.get(name) != decided.get(name)]
            if all(self.shard(index).is_dir() for index in range(self.num_shards)):  # nothing more is drawn
                changed = [name for name in changed if name != "versions"]
            if not changed:
                return
            if any(self.path.glob("[0-9]*-of-*")):
                raise ValueError(
                    f"{self.path} holds pictures that were drawn with {changed[0]} = {before.get(changed[0])!r}, but "
                    f"now it is {decided.get(changed[0])!r}. Choose another `out` or run name, or remove the folder."
                )
        elif self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no pictures of an evaluation. Choose another `out`.")
        self.path.mkdir(parents=True, exist_ok=True)
        settings = {"decided_by": decided, "noted": noted}
        replace_file(file, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())

    def draw(
        self,
        make: Callable[[list[Task]], list[Image.Image]],
        processes: Processes,
        batch_size: int,
        progress: bool = True,
    ) -> None:
        """
        Draw what is missing of this process's shards.

        Args:
            make (`Callable`): Draws the pictures of a batch of tasks.
            processes ([`Processes`]): Shard `i` belongs to process `i % num_processes`.
            batch_size (`int`): Pictures drawn together.
            progress (`bool`, defaults to `True`): Show a progress bar.
        """
        missing = [index for index in self._own(processes) if not self.shard(index).is_dir()]
        total = sum(len(self.tasks(index)) for index in missing)
        with tqdm(total=total, desc=f"Drawing {self.path.name}", unit="picture", disable=not progress) as bar:
            for index in missing:
                self._draw_shard(index, make, batch_size, bar)

    def _draw_shard(self, index: int, make: Callable, batch_size: int, bar: tqdm) -> None:
        scratch = self.path / f".{self.shard(index).name}.{os.getpid()}.part"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        tasks, rows = self.tasks(index), []
        for start in range(0, len(tasks), batch_size):
            batch = tasks[start : start + batch_size]
            for task, picture in zip(batch, make(batch), strict=True):
                picture.save(scratch / task.file_name)
                prompt = {"id": task.prompt.id, "prompt": task.prompt.text, "group": task.prompt.group}
                rows.append({"file_name": task.file_name, **prompt, "sample": task.sample, "seed": task.seed})
            bar.update(len(batch))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (scratch / "metadata.jsonl").write_text(lines, encoding="utf-8")
        os.replace(scratch, self.shard(index))

    def pictures(self, tasks: Sequence[Task], index: int) -> list[Image.Image]:
        """
        Read pictures of a shard.

        Raises:
            ValueError: If one is missing or damaged.
        """
        pictures = []
        for task in tasks:
            file = self.shard(index) / task.file_name
            try:
                with Image.open(file) as picture:
                    pictures.append(picture.convert("RGB"))
            except OSError as error:
                raise ValueError(
                    f"{file} cannot be read ({error}). Remove the folder {self.shard(index)} and evaluate again: it "
                    "is drawn anew."
                ) from None
        return pictures

    def measure(
        self,
        name: str,
        function: Callable[[list[Image.Image], list[Task]], torch.Tensor],
        processes: Processes,
        batch_size: int,
        progress: bool = True,
    ) -> None:
        """
        Measure this process's shards and keep what was measured beside them; what is there is not measured again.

        Args:
            name (`str`): Of the measurement and of the model that makes it.
            function (`Callable`): Gives one row for each picture of a batch.
            processes ([`Processes`]): Shard `i` belongs to process `i % num_processes`.
            batch_size (`int`): Pictures measured together.
            progress (`bool`, defaults to `True`): Show a progress bar.
        """
        missing = [index for index in self._own(processes) if not self._measured(index, name).is_file()]
        total = sum(len(self.tasks(index)) for index in missing)
        title = f"Measuring {self.path.name} by {name.partition('-')[0]}"
        with tqdm(total=total, desc=title, unit="picture", disable=not progress) as bar:
            for index in missing:
                tasks, rows = self.tasks(index), []
                for start in range(0, len(tasks), batch_size):
                    batch = tasks[start : start + batch_size]
                    rows.append(function(self.pictures(batch, index), batch).float().cpu())
                    bar.update(len(batch))
                scratch = self._measured(index, name).with_suffix(f".{os.getpid()}.part")
                save_file({"rows": torch.cat(rows).contiguous()}, scratch)
                os.replace(scratch, self._measured(index, name))

    def measured(self, name: str) -> torch.Tensor:
        """
        Gather what was measured of all shards.

        Returns:
            `torch.Tensor` of shape `(prompts, pictures_per_prompt, ...)`.
        """
        shards = [load_file(self._measured(index, name))["rows"] for index in range(self.num_shards)]
        return torch.cat(shards).unflatten(0, (len(self.prompts), self.pictures_per_prompt))

    def _measured(self, index: int, name: str) -> Path:
        return self.shard(index) / f"{name}.safetensors"

    def _own(self, processes: Processes) -> range:
        return range(processes.process_index, self.num_shards, processes.num_processes)
