"""
What a step of training takes, side by side: ours, where the visual part trains beside a frozen language model, and
full fine-tuning of the dense language model over the same joint vocabulary.

    python benchmarks/training.py --json training.json

Models have Qwen2.5-0.5B's shape and random weights. All read the same rows of Stage I: a prompt of words, `<img>` and
codes; codes are labelled. A step is Trainer's: forward, backward, clipping, AdamW, bfloat16 by autocast. Weights that
train, gradients and states are float32, what is frozen is bfloat16. Attention is eager, as our recipes have it on a
CPU. The dense model takes transformers' own loss, of the logits of all positions. Parts:

    time     seconds of a step, the systems in turn: median (fastest to slowest)
    memory   what resident memory grows by, from before the model is made to the highest point of three steps:
             weights, gradients, states, activations and freed memory that is not given back; each system in a process
             of its own (Linux)
    loader   the share of time that a model trains and does not wait for rows, made of precomputed codes: mars-emoji,
             measured, and ours of the part `time`, computed from its step. With --emoji-codes the recipe emoji/stage1
             runs on these, compiled and with its own loader process; without, rows of random codes are made in the
             process that trains
    packing  the share of places that packs leave empty, by the lengths of rows: of mars-emoji's sizes, of Stage II
             with short sides of 512 pixels, or of --lengths

With `--json` and `--resume` it goes on where it was interrupted.
"""

import argparse
import gc
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from ctypes import CDLL
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from _measuring import MIB, Results, resident, table
from _systems import FACTOR, Shape, grid_of
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

from mars_hf import DEFAULT_CHECKPOINT, MarsConfig, MarsForConditionalGeneration, MarsProcessor
from mars_hf.data.records import CODES_FILE
from mars_hf.training.collation import AlignedCollator, ShiftedRow
from mars_hf.training.mixture import MixtureDataset, PackedStream, Source
from mars_hf.training.recipe import ModelPart, Recipe
from mars_hf.training.run import make_trainer
from mars_hf.training.trainer import MarsTrainer

PARTS = ("time", "memory", "loader", "packing")
SYSTEMS = {
    "dense": "full fine-tuning of the dense Qwen2",
    "grammar": "ours, codes compete with codes",
    "joint": "ours, the paper's joint softmax",
}
EMOJI_PACK = 2048  # tokens
EMOJI_SIZES = ((64, 64), (64, 96), (96, 64))
STAGE_2_SIDE = 32  # codes
MAX_ASPECT_RATIO = 2.0

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
parser.add_argument("--prompt", type=int, default=24, help="tokens")
parser.add_argument("--codes", type=int, default=64, help="of a picture")
parser.add_argument("--batch", type=int, default=16, help="rows of a step, of the parts `time` and `memory`")
parser.add_argument("--loader-batch", type=int, default=64, help="rows of a step of mars-emoji")
parser.add_argument(
    "--emoji-codes", type=Path, metavar="FOLDER", help="codes of the emoji data, for the part `loader`"
)
parser.add_argument("--repeats", type=int, default=9)
parser.add_argument("--rows", type=int, default=4096, help="rows that are packed")
parser.add_argument("--lengths", type=Path, metavar="FILE", help="lengths of rows in tokens, one a line, to pack")
parser.add_argument("--pack", type=int, default=4096, help="tokens of a pack of --lengths")
parser.add_argument("--layers", type=int, default=Shape.num_layers, help="fewer, for a look at the script itself")
parser.add_argument("--scale", type=int, default=1, help="divide all widths by this; as above")
parser.add_argument("--json", type=Path, metavar="FILE", help="where all that is measured goes, in seconds and bytes")
parser.add_argument("--resume", action="store_true", help="keep what FILE of --json holds, measure the rest")
parser.add_argument("--memory-of", choices=SYSTEMS, help=argparse.SUPPRESS)  # what a child process is asked
options = parser.parse_args()

NUMBERS = ("prompt", "codes", "batch", "loader_batch", "repeats", "rows", "pack", "layers", "scale")
if min(getattr(options, name) for name in NUMBERS) < 1:
    parser.error("numbers must be 1 or more")
if options.resume and not options.json:
    parser.error("--resume needs --json FILE, the file to go on with")
if Shape.hidden_size % (options.scale * Shape.num_heads * 2):
    parser.error(f"--scale {options.scale} leaves no even width to the {Shape.num_heads} heads; take 2, 4, 8 or 16")
if options.emoji_codes and not (options.emoji_codes / CODES_FILE).is_file():
    parser.error(f"--emoji-codes {options.emoji_codes}: `mars-hf data encode` wrote no codes there")
if options.lengths and not options.lengths.is_file():
    parser.error(f"--lengths {options.lengths}: there is no such file")

torch.set_flush_denormal(True)
transformers.logging.set_verbosity_error()
shape = Shape().smaller(options.layers, options.scale)
folder = tempfile.TemporaryDirectory(prefix="mars-benchmark-")  # Trainer asks for one


class Step:
    """
    Trainer's step without its loop.

    Args:
        trainer (`Trainer`): Whose model trains.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        trainer.create_optimizer()
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)

    def __call__(self, batch: dict[str, Any]) -> float:
        """Train on a batch; give its loss."""
        count = (batch["labels"] != -100).sum()
        loss = self.trainer.training_step(self.model, batch, num_items_in_batch=count)
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad()
        return loss.item()


def arguments() -> TrainingArguments:
    settings = {"report_to": [], "use_cpu": not torch.accelerator.is_available(), "remove_unused_columns": False}
    settings |= {"bf16": True, "adam_beta2": 0.95, "weight_decay": 0.1, "learning_rate": 1e-4, "disable_tqdm": True}
    return TrainingArguments(folder.name, max_steps=1, per_device_train_batch_size=options.loader_batch, **settings)


def mars_config(sizes: Shape) -> MarsConfig:
    text = Qwen2Config(**sizes.trunk(sizes.num_text_ids), tie_word_embeddings=True)
    return MarsConfig(text_config=text, codebook_size=sizes.num_codes, downsample_factor=FACTOR)


def row(config: MarsConfig, prompt: list[int], codes: torch.Tensor) -> dict[str, Any]:
    """Write a row of text-to-image as the processor does."""
    picture = (codes + config.image_token_offset).tolist()
    ids = [*prompt, config.image_start_token_id, *picture, config.image_end_token_id]
    labels = [-100] * (len(prompt) + 1) + picture + [-100]
    side = [FACTOR * side for side in grid_of(len(picture))]
    return {"input_ids": ids, "labels": labels, "image_sizes": [tuple(side)], "task": "text-to-image"}


def stage_1_batch(sizes: Shape) -> dict[str, Any]:
    """Give the batch that every system trains on."""
    config, prompts = mars_config(sizes), sizes.prompts(options.batch, options.prompt).tolist()
    codes = torch.randint(sizes.num_codes, (options.batch, options.codes), generator=torch.Generator().manual_seed(0))
    rows = [row(config, *pair) for pair in zip(prompts, codes, strict=True)]
    return AlignedCollator(config, pad_token_id=0, prompt_multiple=options.prompt)(rows)


class Dense:
    """Full fine-tuning: all weights are float32 and train."""

    def __init__(self, sizes: Shape):
        vocabulary = mars_config(sizes).vocab_size
        config = Qwen2Config(**sizes.trunk(vocabulary), tie_word_embeddings=True, attn_implementation="eager")
        self.model = Qwen2ForCausalLM(config)
        self.step = Step(Trainer(model=self.model, args=arguments()))
        batch = stage_1_batch(sizes)
        self.batch = {name: batch[name] for name in ("input_ids", "labels", "shift_labels")}

    def train(self, name: str) -> float:
        """Train for a step; give the loss."""
        return self.step(dict(self.batch))


class Ours:
    """The visual part trains in float32, the frozen part is bfloat16. One model and one optimizer for both losses."""

    def __init__(self, sizes: Shape):
        config = mars_config(sizes)
        config._attn_implementation = "eager"
        self.model = MarsForConditionalGeneration(config)
        self.model.freeze_text()
        for parameter in self.model.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(torch.bfloat16)
        self.step = Step(MarsTrainer(model=self.model, args=arguments()))
        self.batch = stage_1_batch(sizes)

    def train(self, name: str) -> float:
        """Train for a step by the loss of a name; give it."""
        trainer = self.step.trainer
        trainer.head_loss.scope = trainer.picture_loss.scope = name
        return self.step(dict(self.batch))


def make(name: str, sizes: Shape) -> Dense | Ours:
    return Dense(sizes) if name == "dense" else Ours(sizes)


def timed(system: Dense | Ours, name: str) -> float:
    """Train for a step; give its seconds."""
    gc.collect()
    start = time.perf_counter()
    loss = system.train(name)
    seconds = time.perf_counter() - start
    if not math.isfinite(loss):
        raise RuntimeError(f"The loss of {SYSTEMS[name]} is {loss}.")
    return seconds


def measure_time() -> dict[str, list[float]]:
    """Time the systems in turn, forwards and backwards, after two steps of each that are not counted."""
    ours = Ours(shape)
    systems = {"dense": Dense(shape), "grammar": ours, "joint": ours}
    seconds: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    with tqdm(total=len(SYSTEMS) * (options.repeats + 2), desc="time", unit="step", leave=False) as bar:
        for repeat in range(-2, options.repeats):
            for name in list(SYSTEMS)[:: 1 if repeat % 2 == 0 else -1]:
                spent = timed(systems[name], name)
                seconds[name] += [spent] if repeat >= 0 else []
                bar.update()
    return seconds


def memory_of(name: str) -> dict[str, int]:
    """Measure in this process what three steps need, the model included. A small model loads the kernels before."""
    make(name, Shape().smaller(1, 16)).train(name)
    gc.collect()
    CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    system = make(name, shape)
    gc.collect()
    CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest value starts again from here
    for _ in range(3):
        system.train(name)
    peak = resident("VmHWM") - before
    weights = list(system.model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    states = [state for one in system.step.optimizer.state.values() for state in one.values()]
    sizes = {"weights": weights, "gradients": trained, "states": states}
    return {"peak": peak, **{kind: sum(tensor.nbytes for tensor in tensors) for kind, tensors in sizes.items()}}


def measure_memory(name: str) -> dict[str, int]:
    """Ask a child process."""
    names = ("layers", "scale", "batch", "codes", "prompt")
    asked = [str(part) for option in names for part in (f"--{option}", getattr(options, option))]
    command = [sys.executable, __file__, "--memory-of", name, *asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def emoji_records(processor: MarsProcessor, count: int) -> list[dict[str, Any]]:
    """Give records with random codes of the sizes that mars-emoji draws, and captions of several lengths."""
    rng, factor = random.Random(0), processor.downsample_factor
    words = "a red apple with green leaves on the white table, twemoji style".split()
    records = []
    for height, width in rng.choices(EMOJI_SIZES, k=count):
        codes = [rng.randrange(processor.codebook_size) for _ in range(height // factor * (width // factor))]
        caption = " ".join(words[: rng.randint(2, len(words))])
        records.append({"image_codes": codes, "height": height, "width": width, "caption": caption})
    return records


def emoji_rows(processor: MarsProcessor, batch: int, num_batches: int) -> MixtureDataset:
    """Give the rows of Stage I of mars-emoji, by its shares and its noise."""
    records = Dataset.from_list(emoji_records(processor, 512))
    sources = [
        Source(part.task, part.share, records, _caption, code_noise=part.code_noise)
        for part in Recipe.load("emoji/stage1").data
    ]
    return MixtureDataset(processor, sources, batch, num_batches)


def _caption(record: dict[str, Any], rng: random.Random) -> str:
    return record["caption"]


def loader_trainer(steps: int) -> MarsTrainer:
    """Build the trainer of emoji/stage1: on its real codes as it is, or on random ones in small."""
    if options.emoji_codes is not None:
        recipe = Recipe.load("emoji/stage1")
        data = [replace(part, source=str(options.emoji_codes)) for part in recipe.data]
        training = {**recipe.training, "max_steps": steps, "per_device_train_batch_size": options.loader_batch}
        training |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0}
        base = ModelPart(base=str(DEFAULT_CHECKPOINT))
        recipe = replace(recipe, model=base, data=data, training=training)
        return make_trainer(recipe, Path(folder.name) / "loader", compile_pictures=True)[0]
    processor = MarsProcessor.from_pretrained(DEFAULT_CHECKPOINT)
    model = MarsForConditionalGeneration.from_pretrained(
        DEFAULT_CHECKPOINT, dtype=torch.float32, attn_implementation="eager"
    )
    rows = emoji_rows(processor, options.loader_batch, steps)
    collate = AlignedCollator(model.config, processor.tokenizer.pad_token_id)
    return MarsTrainer(model=model, args=arguments(), train_dataset=rows, data_collator=collate)


def measure_loader() -> dict[str, list[float]]:
    """Train mars-emoji by Trainer's own loader; give the seconds that each step waits for its batch and trains."""
    warm = 2 if options.emoji_codes is None else 40  # every shape of a batch is compiled once
    steps = options.repeats + warm
    step = Step(loader_trainer(steps))
    loader, found = iter(step.trainer.get_train_dataloader()), {"wait": [], "step": []}
    for number in tqdm(range(steps), desc="loader", unit="step", leave=False):
        start = time.perf_counter()
        batch = next(loader)
        fetched = time.perf_counter()
        step(batch)
        if number >= warm:
            found["wait"].append(fetched - start)
            found["step"].append(time.perf_counter() - fetched)
    return found


def stage_2_rows(config: MarsConfig, count: int) -> Iterator[dict[str, Any]]:
    """Give rows of pictures of any aspect ratio up to 2, and of captions of 48 to 144 tokens."""
    rng = random.Random(0)
    for _ in range(count):
        long_side = round(STAGE_2_SIDE * MAX_ASPECT_RATIO ** rng.random())
        yield row(config, [8] * rng.randint(48, 144), torch.zeros(STAGE_2_SIDE * long_side, dtype=torch.long))


def measure_packing() -> dict[str, dict[str, Any]]:
    """Pack rows as a run does; tell what is left empty."""
    config = mars_config(Shape())
    if options.lengths:
        lengths = [int(line) for line in options.lengths.read_text().split()]
        rows = [row(config, [], torch.zeros(length, dtype=torch.long)) for length in lengths]
        return {options.lengths.name: packed(rows, config, options.pack)}
    emoji = emoji_rows(MarsProcessor.from_pretrained(DEFAULT_CHECKPOINT), 1, options.rows)
    emoji_config = MarsConfig.from_pretrained(DEFAULT_CHECKPOINT)
    stage_2, pack = list(stage_2_rows(config, options.rows)), Recipe.load("paper/stage2").packing
    return {
        "mars-emoji's sizes": packed([emoji[number] for number in range(len(emoji))], emoji_config, EMOJI_PACK),
        "Stage II": packed(stage_2, config, pack),
        "Stage II, packs of twice the length": packed(stage_2, config, 2 * pack),
    }


def packed(rows: list[dict[str, Any]], config: MarsConfig, max_length: int) -> dict[str, Any]:
    """Pack rows; count."""
    packs, lengths = len(list(PackedStream(rows, config, max_length))), [len(ShiftedRow.of(r, config)) for r in rows]
    ends = {"shortest": min(lengths), "longest": max(lengths), "rows": len(rows)}
    return {**ends, "pack": max_length, "packs": packs, "waste": 1 - sum(lengths) / packs / max_length}


def time_table(seconds: dict[str, list[float]]) -> str:
    rows = []
    for name, title in SYSTEMS.items():
        spent = seconds[name]
        ratio = median(spent) / median(seconds["dense"])
        rows.append([title, f"{median(spent):.3g} ({min(spent):.3g} to {max(spent):.3g})", f"{ratio:.2f}x"])
    return table(["seconds a step: median (fastest to slowest)", "", "to the dense one"], rows)


def memory_table(memory: dict[str, dict[str, int]]) -> str:
    rows = []
    for name, sizes in memory.items():
        cells = [f"{sizes[kind] / MIB:,.0f}" for kind in ("weights", "gradients", "states", "peak")]
        rows.append([SYSTEMS[name], *cells, f"{sizes['peak'] / memory['dense']['peak']:.2f}x"])
    header = [
        "MiB",
        "weights, computed",
        "gradients, computed",
        "states, computed",
        "peak, measured",
        "to the dense one",
    ]
    return table(header, rows)


def main() -> None:
    if options.memory_of:
        return print(json.dumps(memory_of(options.memory_of)))
    settings = {name: getattr(options, name) for name in NUMBERS}
    settings |= {"lengths": str(options.lengths), "emoji_codes": str(options.emoji_codes)}
    results = Results(options.json, options.resume, PARTS, settings)
    if "packing" in options.parts:
        results.measured("packing", "packing", measure_packing)
    if "loader" in options.parts:
        results.measured("loader", "mars-emoji", measure_loader)
    if "time" in options.parts:
        results.measured("time", "time", measure_time)
        gc.collect()
    if "memory" in options.parts:
        for name in tqdm(SYSTEMS, desc="memory", unit="process", leave=False):
            results.measured("memory", name, lambda name=name: measure_memory(name))
    report(results.data)


def bounds(data: dict) -> Iterator[list[str]]:
    """Compare with what training is to reach."""

    def against(what: str, limit: str, value: float, is_met: bool, unit: str = "x") -> list[str]:
        return [what, limit, f"{value:.2f}{unit}", "met" if is_met else "not met"]

    seconds, memory = data["time"].get("time"), data["memory"]
    if seconds:
        ratio = median(seconds["grammar"]) / median(seconds["dense"])
        yield against("time of a step", "at most 0.80x of the dense one", ratio, ratio <= 0.8)
    if len(memory) == len(SYSTEMS):
        ratio = memory["grammar"]["peak"] / memory["dense"]["peak"]
        yield against("peak memory", "at most 0.90x of the dense one", ratio, ratio <= 0.9)
    for found in data["loader"].values():
        share = 100 * sum(found["step"]) / (sum(found["step"]) + sum(found["wait"]))
        yield against("mars-emoji trains", "above 95 % of the time", share, share > 95, " %")
        if seconds:
            wait = median(found["wait"]) * options.batch / options.loader_batch
            share = 100 * median(seconds["grammar"]) / (median(seconds["grammar"]) + wait)
            yield against("ours trains", "above 95 % of the time", share, share > 95, " %")
    for name, found in data["packing"].get("packing", {}).items():
        rows = (
            f"{found['rows']:,} rows of {found['shortest']} to {found['longest']} tokens in packs of {found['pack']}"
        )
        waste = 100 * found["waste"]
        yield against(f"empty places, {name}: {rows}", "under 2 %", waste, waste < 2, " %")


def report(data: dict) -> None:
    """Print the tables and what was to be reached."""
    rows = f"{options.batch} rows of {options.prompt} words and {options.codes} codes"
    print(f"{data['machine']}\n{options.repeats} repeats, {rows}, {shape}\n")
    if data["time"]:
        print(time_table(data["time"]["time"]), end="\n\n")
    if data["memory"]:
        print(memory_table(data["memory"]), end="\n\n")
    print(table(["what", "bound", "measured", ""], list(bounds(data))))
    if shape != Shape():
        print("\nThe bounds are for the full shape, not for this one.")


main()
