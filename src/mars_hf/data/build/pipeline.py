"""
The passes of a build, on Ray Data.

1. *Measure*: every shard is read once; each item is decoded, filtered and fingerprinted, and leaves a row.
2. *Decide*: duplicates are found among all rows, in the order of the input, while later shards are measured.
3. *Score*: what is left is scored, in batches that never cross a shard; scores are thresholds' or quantiles' to judge.
4. *Write*: what stays is dealt out to output files; each is read, captioned, resized, encoded and written.

A pass leaves one small file for each shard in `.work`, put there in one step, so that a run that was cut off continues
with the next shard. All decisions are made from these files in the order of the input: who worked on what, and when,
changes nothing. A row that travels through Ray is a whole batch, for the same reason.
"""

import functools
import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from tqdm.auto import tqdm

from .duplicates import DuplicateFinder
from .engine import ModelStep, Row, Step, connected, made, run
from .pictures import clean_captions, decode_picture, encode_file, fit, measure_item
from .readers import Item, Shard, list_shards, read_items
from .recipe import LANGUAGES, Recipe, Resize
from .report import Report, Sample, write_report
from .writers import features_of, scores_of, suffix_of, write_json, write_rows, write_shard

WORK = ".work"
FILES_OF_A_TASK = 16  # of the output, at most


def _measured_schema() -> Any:
    import pyarrow as pa

    integers = {name: pa.int32() for name in ("position", "width", "height", "caption_characters")}
    texts = {name: pa.string() for name in ("key", "reason", "detail")}
    prints = {"pixels": pa.binary(), "perceptual": pa.uint64(), "colours": pa.binary()}
    others = {"notes": pa.list_(pa.string()), "num_bytes": pa.int64(), "verbatim": pa.bool_()}
    return pa.schema(list({**integers, **texts, **others, **prints}.items()))


# What workers do. Each step takes a row and gives rows; settings come with functools.partial.


def _items(row: Row, recipe: Recipe) -> Iterator[Item]:
    shard = Shard.from_dict(json.loads(row["content"]))
    (source,) = (source for source in recipe.sources if source.name == shard.source)
    yield from read_items(shard, source, recipe.decode.max_file_bytes)


def _shard_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.parquet"


def _full_key(item: Item, source: str) -> str:
    return f"{source}/{item.key}"


def measure_shard(row: Row, recipe: Recipe, folder: Path) -> Iterator[Row]:
    """Examine every item of a shard and write down what was found."""
    source = json.loads(row["content"])["source"]
    measured = (
        {**measure_item(item, recipe), "position": position, "key": _full_key(item, source)}
        for position, item in enumerate(_items(row, recipe))
    )
    write_rows(_shard_file(folder, row["shard"]), measured, _measured_schema())
    yield {"shard": row["shard"]}


def _wanted_items(row: Row, recipe: Recipe, positions: set[int]) -> Iterator[tuple[int, Item]]:
    """Read a shard up to the last wanted item."""
    left = len(positions)
    for position, item in enumerate(_items(row, recipe)):
        if position in positions:
            if item.data is None:
                break
            yield position, item
            left -= 1
            if left == 0:
                return
    raise RuntimeError(f"The input changed during the build: {json.loads(row['content'])['path']} lacks records.")


def scoring_batches(row: Row, recipe: Recipe) -> Iterator[Row]:
    """Decode the records of a shard that are to be scored, in batches."""
    stage = recipe.clip or recipe.aesthetic
    batch: list[tuple[int, Any, str]] = []
    wanted = set(json.loads(row["positions"]))
    remaining = len(wanted)
    for position, item in _wanted_items(row, recipe, wanted):
        captions = clean_captions(item.captions, recipe.captions)[0]
        picture = decode_picture(item.data, item.extension, recipe.decode).picture
        batch.append((position, picture, captions.get("en") or captions.get("zh") or ""))
        remaining -= 1
        if len(batch) == stage.batch_size or not remaining:
            positions, pictures, texts = zip(*batch, strict=True)
            pixels = made(make_clip_inputs, recipe)(list(pictures))
            arrays = {"pixels": [array.tobytes() for array in pixels], "shapes": [[*array.shape] for array in pixels]}
            yield {"shard": row["shard"], "positions": [*positions], "captions": [*texts], **arrays}
            batch = []


def make_clip_inputs(recipe: Recipe) -> Any:
    from .models import ClipInputs

    return ClipInputs(recipe)


def make_scorer(recipe: Recipe) -> Any:
    from .models import Scorer

    return Scorer(recipe)


def collect_records(row: Row, recipe: Recipe, output: "Output") -> Iterator[Row]:
    """Read the records of one output file from the shards that they come from; of one that is written, nothing."""
    manifest = output.manifest(row["index"])
    if manifest is not None and manifest["plan"] == row["plan"]:
        return
    records = []
    for part in json.loads(row["parts"]):
        facts = {fact["position"]: fact for fact in part["records"]}
        for position, item in _wanted_items({"content": json.dumps(part["shard"])}, recipe, set(facts)):
            fact = facts[position]
            captions = clean_captions(item.captions, recipe.captions)[0]
            source = part["shard"]["source"]
            record = {"key": _full_key(item, source), "source": source, **_stored(item, fact, recipe)}
            record |= {f"caption_{language}": captions.get(language) for language in LANGUAGES}
            records.append(record | {name: fact[name] for name in scores_of(recipe)})
    yield {"index": row["index"], "plan": row["plan"], "records": records}


def _stored(item: Item, fact: Row, recipe: Recipe) -> Row:
    """Give a picture's file and size as they are stored; a captioner sees the whole picture before it is resized."""
    data = item.data if fact["verbatim"] else None
    if data is not None and (recipe.resize is None or recipe.recaption):
        return {"image": data, "width": fact["width"], "height": fact["height"]}
    picture = decode_picture(item.data, item.extension, recipe.decode).picture
    return _fitted(picture, data, None if recipe.recaption else recipe.resize)


def _fitted(picture: Image.Image, data: bytes | None, resize: Resize | None) -> Row:
    """Bring a picture to the size of training; the file of one that has it already is kept as it is."""
    fitted = picture if resize is None else fit(picture, resize)
    jpeg_quality = resize and resize.jpeg_quality
    if data is None or fitted.size != picture.size or jpeg_quality is not None:
        data = encode_file(fitted, jpeg_quality)
    return {"image": data, "width": fitted.width, "height": fitted.height}


class WriteModels:
    """The models of the last pass, together, since they share a GPU."""

    def __init__(self, recipe: Recipe):
        from . import models

        self.recipe, self.models = recipe, models
        self.captioner = models.Captioner(recipe) if recipe.recaption else None
        self.encoder = models.CodeEncoder(recipe) if recipe.codes else None

    def __call__(self, row: Row) -> Iterator[Row]:
        records = [dict(record) for record in row["records"]]
        if self.captioner:
            self.models.recaption_records(records, self.captioner)
            for record in records if self.recipe.resize else ():
                picture = Image.open(io.BytesIO(record["image"])).convert("RGB")
                record |= _fitted(picture, record["image"], self.recipe.resize)
        if self.encoder:
            for record, codes in zip(records, self.encoder(self.models.open_all(records)), strict=True):
                record |= codes
        yield {**row, "records": records}


class Output(NamedTuple):
    """The files that a build writes."""

    names: list[str]
    data: Path
    manifests: Path

    def path(self, index: int) -> Path:
        return self.data / self.names[index]

    def manifest(self, index: int) -> Row | None:
        """Read what is said of a file, if it is complete."""
        path, file = self.path(index), (self.manifests / self.names[index]).with_suffix(".json")
        if not (file.exists() and path.exists()):
            return None
        manifest = json.loads(file.read_text(encoding="utf-8"))
        return manifest if manifest["bytes"] == path.stat().st_size else None

    def complete(self) -> list[Row]:
        return [found for i in range(len(self.names)) if (found := self.manifest(i)) is not None]


def write_records(row: Row, recipe: Recipe, output: Output, schema: Any) -> Iterator[Row]:
    """Write one output file, and then its manifest, by which it counts as done."""
    path = output.path(row["index"])
    records = [record for record in row["records"] if any(_caption(record, language) for language in LANGUAGES)]
    if recipe.resolution_text:
        for record in records:
            for language in LANGUAGES:
                caption = _caption(record, language)
                # As `prompts_mars.prompt_ids` writes it, which also tokenises.
                record[f"prompt_{language}"] = caption and f"{caption} {record['height']}x{record['width']}"
    write_shard(path, records, schema, row["index"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    counts = {"records": len(records), "without_caption": len(row["records"]) - len(records)}
    manifest = {"file": path.name, "sha256": digest, "bytes": path.stat().st_size, **counts, "plan": row["plan"]}
    write_json(output.manifests / f"{path.stem}.json", manifest)
    yield {"index": row["index"]}


def _caption(record: Row, language: str) -> str | None:
    return record.get(f"fine_caption_{language}") or record[f"caption_{language}"]


# What the leading process does.


class Kept(NamedTuple):
    """A record that is still in."""

    position: int
    width: int
    height: int
    num_bytes: int
    verbatim: bool


def build_dataset(recipe: Recipe, progress: bool = True) -> dict[str, Any]:
    """
    Build a data set; run again after an interruption, it continues.

    The folder is a data set of `datasets`: its files are `data/train-*`, with the columns of
    [`~mars_hf.data.build.writers.features_of`], each with a manifest in `manifests`. What was dropped and why stands
    in `report.json` and `report.html`; which tokenizer made the codes, in `codes.json`.

    Args:
        recipe ([`Recipe`]): What to do, see [`~mars_hf.data.build.recipe.load_recipe`].
        progress (`bool`, defaults to `True`): Show progress bars.

    Returns:
        `dict`: What `report.json` holds, without pictures.

    Raises:
        ValueError: If a source is empty, a model does not fit, the folder holds something else or another build is at
            work there, or nothing is left.
        RuntimeError: If a worker fails, or the input changes meanwhile.
    """
    return Build(recipe, progress).run()


class Build:
    """One build: its folder, its shards, and what has been decided so far."""

    def __init__(self, recipe: Recipe, progress: bool = True):
        if recipe.out is None:
            raise ValueError("A build needs a folder to write to: `out`.")
        self.recipe, self.progress, self.out = recipe, progress, Path(recipe.out).absolute()
        self.measured, self.scored = self.out / WORK / "measured", self.out / WORK / "scored"
        self.shards = [shard for source in recipe.sources for shard in list_shards(source)]
        self.contents = [json.dumps(shard.as_dict()) for shard in self.shards]
        self.report = Report(recipe)

    def run(self) -> dict[str, Any]:
        """Lead through all passes."""
        models: dict[str, Any] = {}
        if any((self.recipe.clip, self.recipe.aesthetic, self.recipe.recaption, self.recipe.codes)):
            from .models import check_models

            models = check_models(self.recipe)
        with self._folder_to_itself():
            self._claim_folder(models)
            with connected(self.recipe.engine):
                return self._run(models)

    def _run(self, models: dict[str, Any]) -> dict[str, Any]:
        kept = self._measure()
        scores: dict[int, dict[str, np.ndarray]] = {}
        if scores_of(self.recipe):
            self._score(kept)
            kept, scores = self._select(kept)
        output = self._write(kept, scores, models)
        for manifest in output.complete():
            self.report.count_written(manifest["records"], manifest["without_caption"])
        outputs = [output.path(i) for i in range(len(output.names))]
        summary = write_report(self.report, self.out, self._read_samples(), outputs)
        if not self.report.kept:
            raise ValueError(f"Nothing is left of {self.report.items} items: see {self.out / 'report.html'}.")
        if self.recipe.codes:
            self._write_codes_file(models["codes"], complete=True)
        return summary

    @contextmanager
    def _folder_to_itself(self) -> Iterator[None]:
        """Keep other builds out of the folder; the lock goes with the process that holds it."""
        file, own = self.out / "recipe.json", (WORK, ".part")
        if not file.exists() and self.out.is_dir() and any(not e.name.endswith(own) for e in self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and holds no build. Choose another folder.")
        (self.out / WORK).mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.out / WORK / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"Another build is at work in {self.out}. Wait for it, stop it, or choose another folder."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _claim_folder(self, models: dict[str, Any]) -> None:
        listing = hashlib.sha256("\n".join(self.contents).encode()).hexdigest()
        own = {"recipe": self.recipe.what_decides_the_output(), "shards": len(self.shards), "listing": listing}
        own |= {"models": models} if models else {}
        file = self.out / "recipe.json"
        if file.exists():
            there = json.loads(file.read_text(encoding="utf-8"))
            reasons = {"recipe": "of another recipe", "models": "one of its models has changed since"}
            if differing := [name for name in own if there.get(name) != own[name]]:
                what = next((reasons[name] for name in reasons if name in differing), "its input has changed since")
                raise ValueError(f"{self.out} holds a build, but {what}. Choose another folder, or remove this one.")
        for left_over in self.out.rglob(".*.part"):  # of a run that was killed
            left_over.unlink()
        write_json(file, own)

    def _write_codes_file(self, tokenizer: dict[str, Any], complete: bool) -> None:
        """Say which tokenizer made the codes, where `open_records` looks for it."""
        from ..records import CODES_FILE  # which imports what workers need not wait for

        split = {"complete": complete, "records": self.report.kept}
        content = {"tokenizer": tokenizer, "recipe": self.recipe.what_decides_the_output(), "splits": {"train": split}}
        write_json(self.out / CODES_FILE, content)

    def _progress(self, rows: Iterator[Row], what: str, unit: str, total: int, done: int) -> Iterator[Row]:
        yield from tqdm(rows, desc=what, unit=unit, total=total, initial=done, disable=not self.progress)

    def _measure(self) -> dict[int, list[Kept]]:
        """Measure all shards, and go through them in the order of the input as they come; give what stays of each."""
        rows = [
            {"shard": index, "content": content}
            for index, content in enumerate(self.contents)
            if not _shard_file(self.measured, index).exists()
        ]
        step = functools.partial(measure_shard, recipe=self.recipe, folder=self.measured)
        measured = set(range(len(self.shards))) - {row["shard"] for row in rows}
        results = self._progress(
            run(rows, [step], self.recipe.engine), "Measuring", "shard", len(self.shards), len(measured)
        )
        finder = DuplicateFinder(self.recipe.duplicates)
        kept: dict[int, list[Kept]] = {}
        index = 0
        # What an earlier run has measured is there at once.
        for shard in chain(sorted(measured)[:1], (row["shard"] for row in results)):
            measured.add(shard)
            while index in measured:
                if records := self._judge(index, finder):
                    kept[index] = records
                index += 1
        return kept

    def _judge(self, index: int, finder: DuplicateFinder) -> list[Kept]:
        """Go through the rows of a shard; give what stays."""
        kept = []
        for row in _read_rows(_shard_file(self.measured, index)):
            reason, detail = row["reason"], row["detail"]
            if reason is None and (found := finder.check(row, row["key"])) is not None:
                reason, detail = found[0], f"of {found[1]}"
            self.report.count_item(row, reason)
            if reason is None:
                kept.append(Kept(*(row[name] for name in Kept._fields)))
            else:
                self.report.drop(reason, Sample(index, row["position"], detail))
        return kept

    def _score(self, kept: dict[int, list[Kept]]) -> None:
        rows = [
            {"shard": index, "content": self.contents[index], "positions": json.dumps([r.position for r in records])}
            for index, records in kept.items()
            if not _shard_file(self.scored, index).exists()
        ]
        steps: list[Step] = [functools.partial(scoring_batches, recipe=self.recipe)]
        steps.append(ModelStep(make_scorer, self.recipe))
        total = sum(len(records) for records in kept.values())
        done = total - sum(len(kept[row["shard"]]) for row in rows)
        collected: dict[int, list[Row]] = defaultdict(list)
        with tqdm(desc="Scoring", unit="record", total=total, initial=done, disable=not self.progress) as bar:
            for batch in run(rows, steps, self.recipe.engine):
                index = batch["shard"]
                columns = ["position", *scores_of(self.recipe)]
                values = [batch["positions"], *(batch[name] for name in columns[1:])]
                collected[index] += [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]
                bar.update(len(batch["positions"]))
                if len(collected[index]) == len(kept[index]):
                    rows_of_shard = sorted(collected.pop(index), key=lambda row: row["position"])
                    write_rows(_shard_file(self.scored, index), rows_of_shard, _scored_schema(self.recipe))

    def _select(self, kept: dict[int, list[Kept]]) -> tuple[dict[int, list[Kept]], dict[int, dict[str, np.ndarray]]]:
        """Keep what reaches all thresholds and quantiles; quantiles are of all that was scored."""
        scores = {index: _read_columns(_shard_file(self.scored, index)) for index in kept}
        for index, records in kept.items():
            if scores[index]["position"].tolist() != [record.position for record in records]:
                raise RuntimeError(f"{_shard_file(self.scored, index)} is of other records. Remove it and run again.")
        cuts = {}
        for name in scores_of(self.recipe):
            values = np.concatenate([columns[name] for columns in scores.values()]) if scores else np.empty(0)
            cuts[name], setting = _cut(values, self.recipe, name.removeprefix("score_"))
            self.report.threshold(name, cuts[name], setting)
        for index, records in kept.items():
            stays = np.ones(len(records), bool)
            for name, cut in cuts.items():
                values = scores[index][name]
                passes = values >= cut
                for place in np.flatnonzero(stays):
                    self.report.count_score(name, float(values[place]), bool(passes[place]))
                for place in np.flatnonzero(stays & ~passes):
                    sample = Sample(index, records[place].position, f"{values[place]:.4f}, {cut:.4f} is needed")
                    self.report.drop(f"low_{name.removeprefix('score_')}", sample)
                stays &= passes
            kept[index] = [record for record, stay in zip(records, stays, strict=True) if stay]
            scores[index] = {name: values[stays] for name, values in scores[index].items()}
        return kept, scores

    def _plan(self, kept: dict[int, list[Kept]], scores: dict[int, dict[str, np.ndarray]]) -> list[str]:
        """Deal out the records to output files, in the order of the input."""
        limits = self.recipe.write
        plans: list[list[Row]] = []
        count = size = 0
        for index in sorted(kept):
            for place, record in enumerate(kept[index]):
                full = count == limits.records_per_shard or size + record.num_bytes > limits.max_shard_bytes
                if not plans or (count and full):
                    plans.append([])
                    count = size = 0
                parts = plans[-1]
                if not parts or parts[-1]["index"] != index:
                    parts.append({"index": index, "shard": self.shards[index].as_dict(), "records": []})
                values = {name: float(scores[index][name][place]) for name in scores_of(self.recipe)}
                parts[-1]["records"].append({**record._asdict(), **values})
                count, size = count + 1, size + record.num_bytes
        return [json.dumps(parts) for parts in plans]

    def _write(
        self, kept: dict[int, list[Kept]], scores: dict[int, dict[str, np.ndarray]], models: dict[str, Any]
    ) -> Output:
        """Write the output files that are not there yet."""
        plans = self._plan(kept, scores)
        names = [f"train-{i:05d}-of-{len(plans):05d}{suffix_of(self.recipe)}" for i in range(len(plans))]
        output = Output(names, self.out / "data", self.out / "manifests")
        digests = [hashlib.sha256(plan.encode()).hexdigest() for plan in plans]
        done = {manifest["plan"] for manifest in output.complete()}
        rows = [
            {"index": i, "parts": plan, "plan": digest}
            for i, (plan, digest) in enumerate(zip(plans, digests, strict=True))
            if digest not in done
        ]
        if rows and self.recipe.codes:  # what is complete already stays so
            self._write_codes_file(models["codes"], complete=False)
        places = {"recipe": self.recipe, "output": output}
        schema = features_of(self.recipe).arrow_schema  # made here: workers need not import `datasets`
        steps: list[Step] = [functools.partial(collect_records, **places)]
        if self.recipe.recaption or self.recipe.codes:
            steps.append(ModelStep(WriteModels, self.recipe))
        steps.append(functools.partial(write_records, **places, schema=schema))
        results = run(rows, steps, self.recipe.engine, FILES_OF_A_TASK)
        for _ in self._progress(results, "Writing", "shard", len(plans), len(plans) - len(rows)):
            pass
        return output

    def _read_samples(self) -> dict[Sample, Item]:
        """Read again the few dropped items that the report shows."""
        wanted: dict[int, dict[int, Sample]] = defaultdict(dict)
        for samples in self.report.samples.values():
            for sample in samples:
                wanted[sample.shard][sample.position] = sample
        found = {}
        for index, by_position in wanted.items():
            items = _items({"content": self.contents[index]}, self.recipe)
            for position, item in zip(range(max(by_position) + 1), items, strict=False):
                if position in by_position:
                    found[by_position[position]] = item
        return found


def _scored_schema(recipe: Recipe) -> Any:
    import pyarrow as pa

    return pa.schema([("position", pa.int32()), *((name, pa.float32()) for name in scores_of(recipe))])


def _read_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def _cut(values: np.ndarray, recipe: Recipe, score: str) -> tuple[float, str]:
    """Find the lowest score that stays, the threshold or that of the best share, and which setting it is of."""
    minimum, top = (getattr(recipe.select, f"{score}_{kind}", None) for kind in ("minimum", "top"))
    cuts = [(-math.inf if minimum is None else float(minimum), f"select.{score}_minimum")]
    if top is not None and len(values):
        stay = math.ceil(top * len(values) - 1e-9)  # 0.1 * 30 is a little more than 3
        cuts.append((float(np.sort(values)[len(values) - stay]), f"select.{score}_top"))
    return max(cuts)
