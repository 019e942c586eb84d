"""
An evaluation from its configuration to its tables: draw what is missing, measure what is missing, write the results.

Started by `mars-hf evaluate CONFIG`, or on several processes by `accelerate launch -m mars_hf.cli evaluate CONFIG`:
shards of prompts are shared among them, and the first one writes the results.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from .. import MarsForConditionalGeneration, MarsProcessor
from ..picture_files import replace_file
from .compbench import CompBench, Detector, QuestionAnswerer
from .config import EvaluationConfig, RunConfig
from .drawing import Drawer, Reconstructions, References
from .encoders import ClipEncoder, InceptionEncoder, VisionEncoder
from .geneval import GenEval, load_detector
from .metrics import (
    best_of,
    clip_scores,
    frechet_distance,
    frechet_interval,
    grouped_mean_interval,
    mean_interval,
    retrieval_hits,
)
from .pictures import PictureFolder, Processes
from .provenance import checkpoint_folder, fingerprint, library_versions
from .results import Score, as_rows, report

EXTRACTORS = {"clip": ClipEncoder, "vision": VisionEncoder, "inception": InceptionEncoder}
LONGEST_WAIT = timedelta(days=2)  # processes wait for the slowest


def evaluate(
    config: EvaluationConfig, processes: Processes | None = None, progress: bool = True
) -> dict[str, Any] | None:
    """
    Evaluate a checkpoint; called again, it continues.

    Args:
        config ([`EvaluationConfig`]): What is drawn and measured.
        processes ([`Processes`], *optional*): Defaults to those that accelerate launched.
        progress (`bool`, defaults to `True`): Show progress bars.

    Returns:
        `dict`: What `results.json` holds; `None` in all processes but the first.

    Raises:
        ValueError: If something that is named does not exist or does not fit, before anything is drawn; or if `out`
            holds pictures that were drawn otherwise.
    """
    if processes is None:
        from accelerate import PartialState
        from accelerate.utils import InitProcessGroupKwargs

        processes = PartialState(**InitProcessGroupKwargs(timeout=LONGEST_WAIT).to_kwargs())
    evaluation = Evaluation(config, processes, progress)
    evaluation.draw()
    evaluation.measure()
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return None
    return evaluation.write_results()


class Evaluation:
    """
    The parts of [`evaluate`]: everything is loaded and checked first.

    Args:
        config ([`EvaluationConfig`]): What is drawn and measured.
        processes ([`Processes`]): Who shares the work.
        progress (`bool`): Show progress bars.
    """

    def __init__(self, config: EvaluationConfig, processes: Processes, progress: bool):
        self.config, self.processes, self.progress = config, processes, progress
        self.show = progress and processes.is_main_process
        self.out = Path(config.out)
        self.prompts = config.prompts.load()
        self.notes: list[str] = []
        self._load_evaluators()
        self._check_groups()
        self.checkpoint = checkpoint_folder(config.model)
        self.checkpoint_sha256 = fingerprint(self.checkpoint)
        dtype = self._dtype(config.dtype)
        self.model = MarsForConditionalGeneration.from_pretrained(self.checkpoint, dtype=dtype).eval()
        self.processor = MarsProcessor.from_pretrained(self.checkpoint)
        self.plan = list(self._plan())
        self.folders = {name: folder for name, folder, _ in self.plan}

    @staticmethod
    def _dtype(name: str | None) -> torch.dtype | str:
        dtype = "auto" if name is None else getattr(torch, name, None)
        if dtype != "auto" and not isinstance(dtype, torch.dtype):
            raise ValueError(f"`dtype` must name a type of torch such as bfloat16, got {name!r}.")
        return dtype

    def _load_evaluators(self) -> None:
        """Load every evaluator once, whichever metrics share it, and check that the prompts serve it."""
        metrics = self.config.metrics
        self.clips: dict[str, ClipEncoder] = {}
        for entry in (metrics.clip_score, metrics.best_of, metrics.retrieval, metrics.frechet, metrics.compbench):
            if entry is not None and entry.clip is not None and entry.clip not in self.clips:
                self.clips[entry.clip] = ClipEncoder(entry.clip)
        self.extractor = None
        if metrics.frechet is not None:
            if self.prompts.reference is None:
                raise ValueError(f"{self.prompts.name} has no true pictures, which `metrics.frechet` needs.")
            kind, path = next((kind, path) for kind in EXTRACTORS if (path := getattr(metrics.frechet, kind)))
            self.extractor = self.clips[path] if kind == "clip" else EXTRACTORS[kind](path)
        self.compbench = None
        if metrics.compbench is not None:
            named = metrics.compbench
            vqa = QuestionAnswerer(named.vqa) if named.vqa else None
            detector = Detector(named.detector) if named.detector else None
            self.compbench = CompBench(self.prompts, vqa, detector, named.clip is not None)
            if unknown := self.compbench.unknown_objects():
                self.notes.append(
                    f"the detector has no word for {len(unknown)} objects of the prompts, whose pictures score 0 for "
                    f"their place: {', '.join(unknown[:20])}{', ...' if len(unknown) > 20 else ''}."
                )
        self.geneval = None
        if (asked := metrics.geneval) is not None:
            clip = (self.clips.get(asked.clip) or ClipEncoder(asked.clip)) if asked.clip else None
            detector = load_detector(asked.detector, min(asked.threshold, asked.counting_threshold))
            self.geneval = GenEval(self.prompts, detector, clip, asked.threshold, asked.counting_threshold)
            self.notes += self.geneval.notes()
        if metrics.best_of is not None and max(self._counts().values()) < 2:
            raise ValueError("`metrics.best_of` needs a run with `pictures_per_prompt` of 2 or more.")

    def _check_groups(self) -> None:
        """Refuse groups that are too small for what is measured of them."""
        groups = self.prompts.groups()
        if self.extractor is not None:
            size = (self.config.drawing.width, self.config.drawing.height)
            dim = self.extractor.images([Image.new("RGB", size)]).shape[1]
            group, count = min(((name, len(numbers)) for name, numbers in groups.items()), key=lambda pair: pair[1])
            if count <= dim:
                raise ValueError(
                    f"`metrics.frechet` compares {dim} features of each picture, which takes more than {dim} prompts "
                    f"in each group, but {group!r} has {count}. Take more prompts, or fewer features."
                )
        for group, numbers in groups.items() if self.config.metrics.retrieval is not None else ():
            if len({self.prompts.prompts[number].text for number in numbers}) < 2:
                raise ValueError(
                    f"`metrics.retrieval` needs two or more different prompts in each group, but {group!r} has one."
                )

    def _counts(self) -> dict[str, int]:
        """Give the pictures of each prompt, for each run."""
        default = self.config.drawing.pictures_per_prompt
        return {name: run.pictures_per_prompt or default for name, run in self.config.runs.items()}

    def _plan(self) -> Iterator[tuple[str, PictureFolder, Any]]:
        """Yield every folder of pictures: its name, the folder, and who draws it."""
        drawing, counts = self.config.drawing, self._counts()
        size = (drawing.height, drawing.width)
        makers: dict[str, Any] = {}
        if self.prompts.reference is not None:
            references = References(self.prompts, *size)
            if self.config.references or self.extractor is not None:
                makers["references"] = references
            if self.config.reconstructions:
                makers["reconstructions"] = Reconstructions(self.model, self.processor, references)
        elif self.config.reconstructions:
            raise ValueError(f"{self.prompts.name} has no true pictures, which `reconstructions` needs.")
        for name, run in self.config.runs.items():
            makers[name] = self._drawer(name, run, *size)
        for name, maker in makers.items():
            path = self.out / "pictures" / name
            yield name, PictureFolder(path, self.prompts, counts.get(name, 1), drawing.seed, drawing.shard_size), maker

    def _drawer(self, name: str, run: RunConfig, height: int, width: int) -> Drawer:
        try:
            drawer = Drawer(self.model, self.processor, run, height, width)
            drawer.prepare([prompt.text for prompt in self.prompts.prompts])  # refuses those that do not fit
            return drawer
        except ValueError as error:
            raise ValueError(f"Run {name}: {error}") from None

    def draw(self) -> None:
        """Draw what is missing of this process's shards."""
        if self.processes.is_main_process:
            self._settle()
        self.processes.wait_for_everyone()  # others find what the first one wrote
        if not self.processes.is_main_process:
            self._settle()
        self.processes.wait_for_everyone()  # before pictures are there
        self.model.to(self.processes.device)
        for _, folder, maker in self.plan:
            folder.draw(maker, self.processes, self.config.drawing.batch_size, self.show)
        self.model.to("cpu")

    def _settle(self) -> None:
        for name, folder, maker in self.plan:
            checkpoint = None if name == "references" else self.checkpoint_sha256
            decided = {"run": name, "checkpoint_sha256": checkpoint, **maker.settings()}
            noted = {"model": self.config.model, "batch_size": self.config.drawing.batch_size}
            folder.settle({**decided, "versions": library_versions()}, noted)

    def measure(self) -> None:
        """Measure what is missing of this process's shards."""
        self.processes.wait_for_everyone()  # a process's share may have been drawn by another, in an earlier start
        encoders = {encoder.name: encoder for encoder in [*self.clips.values(), self.extractor] if encoder is not None}
        for encoder in encoders.values():
            encoder.to(self.processes.device)
            for folder in self.folders.values():
                self._measure(folder, encoder.name, lambda pictures, _, encoder=encoder: encoder.images(pictures))
            encoder.to(torch.device("cpu"))
        parts = [(name, tool, rows) for _, name, tool, rows in self._compbench_parts()] if self.compbench else []
        if self.geneval is not None:
            parts.append((self.geneval.name, self.geneval, self.geneval.rows))
        for name, tool, rows in parts:
            tool.to(self.processes.device)
            for run in self.config.runs:
                self._measure(self.folders[run], name, rows)
            tool.to(torch.device("cpu"))

    def _measure(self, folder: PictureFolder, name: str, function: Any) -> None:
        folder.measure(name, function, self.processes, self.config.drawing.batch_size, self.show)

    def _compbench_parts(self) -> Iterator[tuple[str, str, Any, Any]]:
        """Yield what T2I-CompBench measures of pictures: aspect, name with the parts asked about, tool, function."""
        bench = self.compbench
        parts = [asdict(prompt.parts) if prompt.parts else None for prompt in self.prompts.prompts]
        asked = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
        if bench.vqa is not None:
            yield "attribute", f"{bench.vqa.name}-{asked}", bench.vqa, bench.attribute_rows
        if bench.detector is not None:
            yield "spatial", f"{bench.detector.name}-{asked}", bench.detector, bench.spatial_rows

    def write_results(self) -> dict[str, Any]:
        """Compute the scores and write `results.json` and `results.md`."""
        scores = list(self._scores())
        results = {
            "model": self.checkpoint.name if Path(self.config.model).is_dir() else self.config.model,
            "checkpoint_sha256": self.checkpoint_sha256,
            "prompts": self.prompts.name,
            "scores": as_rows(scores),
            "evaluators": self._evaluators(),
            "notes": self.notes,
            "runs": {name: self._settings(folder) for name, folder in self.folders.items()},
            "versions": library_versions(),
            "config": asdict(self.config),
        }
        replace_file(self.out / "results.json", (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
        replace_file(self.out / "results.md", report(results, scores, self.config.paper_tables).encode())
        return results

    def _evaluators(self) -> dict[str, str]:
        """Name what made each metric, with its hash."""
        metrics, named = self.config.metrics, {}
        for metric in ("clip_score", "best_of", "retrieval"):
            if entry := getattr(metrics, metric):
                named[metric] = f"{entry.clip} ({self.clips[entry.clip].name})"
        if self.extractor is not None:
            named["frechet"] = f"{getattr(metrics.frechet, self.extractor.name.split('-')[0])} ({self.extractor.name})"
        for tool in ("vqa", "detector"):
            if self.compbench is not None and (model := getattr(self.compbench, tool)):
                named[tool] = f"{getattr(metrics.compbench, tool)} ({model.name})"
        if self.compbench is not None and metrics.compbench.clip:
            named["compbench_clip"] = f"{metrics.compbench.clip} ({self.clips[metrics.compbench.clip].name})"
        for tool in ("detector", "clip"):
            if self.geneval is not None and (model := getattr(self.geneval, tool)):
                named[f"geneval_{tool}"] = f"{getattr(metrics.geneval, tool)} ({model.name})"
        return named

    @staticmethod
    def _settings(folder: PictureFolder) -> dict[str, Any]:
        return json.loads((folder.path / "settings.json").read_text(encoding="utf-8"))["decided_by"]

    def _scores(self) -> Iterator[Score]:
        """Yield every score: run by run, single pictures before the best of N."""
        self.texts = {path: self._texts(path, [p.text for p in self.prompts.prompts]) for path in self.clips}
        asked = self.config.metrics.compbench
        if self.compbench is not None and asked.clip:
            self.compbench_texts = self._texts(asked.clip, self.compbench.clip_texts())
        totals = {run: self._benchmark_totals(run) for run in self.config.runs}
        order = [*self.config.runs, *(name for name in self.folders if name not in self.config.runs)]
        for run in tqdm(order, desc="Computing scores", unit="run", disable=not self.show):
            if run == "references" and not self.config.references:
                continue
            folder = self.folders[run]
            chosen = {"single": torch.arange(folder.pictures_per_prompt).expand(len(self.prompts), -1)}
            if self.config.metrics.best_of is not None and folder.pictures_per_prompt > 1:
                clip = self.config.metrics.best_of.clip
                picks = best_of(clip_scores(folder.measured(self.clips[clip].name), self.texts[clip]))
                chosen[f"best of {folder.pictures_per_prompt}"] = picks
            for pictures, choice in chosen.items():
                for group, numbers in self.prompts.groups().items():
                    yield from self._group_scores(run, pictures, group, torch.tensor(numbers), choice)
                    for metric, values in totals.get(run, {}).items():
                        yield self._mean_score(run, pictures, group, metric, values[numbers], choice[numbers])
                if self.geneval is not None and run in totals:
                    yield self._overall(run, pictures, totals[run]["geneval"].gather(1, choice))

    def _texts(self, path: str, texts: list[str]) -> torch.Tensor:
        features, cut = self.clips[path].texts(texts)
        note = f"{cut} of {len(texts)} prompts were longer than {path} reads and were cut for it."
        if cut and note not in self.notes:
            self.notes.append(note)
        return features

    def _group_scores(
        self, run: str, pictures: str, group: str, numbers: torch.Tensor, choice: torch.Tensor
    ) -> Iterator[Score]:
        """Yield the scores of a group's prompts that features give, over the chosen pictures."""
        metrics, folder, picks = self.config.metrics, self.folders[run], choice[numbers]
        if metrics.clip_score is not None:
            clip = metrics.clip_score.clip
            scores = clip_scores(folder.measured(self.clips[clip].name)[numbers], self.texts[clip][numbers])
            yield self._mean_score(run, pictures, group, "clip_score", scores, picks)
        if metrics.retrieval is not None:
            clip, texts = metrics.retrieval.clip, [self.prompts.prompts[i].text for i in numbers]
            features = folder.measured(self.clips[clip].name)[numbers]
            hits = 100 * retrieval_hits(features, self.texts[clip][numbers], texts)
            yield self._mean_score(run, pictures, group, "retrieval", hits, picks)
        if self.extractor is not None and run != "references":
            name = self.extractor.name
            # One picture of each prompt, so that all rows compare as many.
            drawn = folder.measured(name)[numbers, picks[:, 0]]
            true = self.folders["references"].measured(name)[numbers, 0]
            options = {**asdict(self.config.interval), "resamples": metrics.frechet.resamples}
            interval = frechet_interval(drawn, true, **options)
            yield Score(run, pictures, group, "frechet", frechet_distance(drawn, true), interval, len(numbers))

    def _mean_score(
        self, run: str, pictures: str, group: str, metric: str, values: torch.Tensor, picks: torch.Tensor
    ) -> Score:
        """Average values of shape `(prompts, pictures)` over each prompt's chosen pictures, then over prompts."""
        means = values.gather(1, picks).double().mean(1)
        interval = mean_interval(means, **asdict(self.config.interval))
        return Score(run, pictures, group, metric, means.mean().item(), interval, len(means))

    def _overall(self, run: str, pictures: str, values: torch.Tensor) -> Score:
        """Average GenEval's tasks, whose numbers of prompts differ."""
        groups = [values[numbers].double().mean(1) for numbers in self.prompts.groups().values()]
        interval = grouped_mean_interval(groups, **asdict(self.config.interval))
        overall = torch.stack([group.mean() for group in groups]).mean().item()
        return Score(run, pictures, "mean of groups", "geneval", overall, interval, len(values))

    def _benchmark_totals(self, run: str) -> dict[str, torch.Tensor]:
        """Give the benchmarks' scores of every picture of a run, in percent."""
        totals = {"compbench": self._compbench_total(run)} if self.compbench else {}
        if self.geneval is not None:
            totals["geneval"] = 100 * self.folders[run].measured(self.geneval.name)
        return totals

    def _compbench_total(self, run: str) -> torch.Tensor:
        """Give T2I-CompBench's score of every picture of a run."""
        folder, bench = self.folders[run], self.compbench
        rows = {aspect: folder.measured(name) for aspect, name, *_ in self._compbench_parts()}
        if clip := self.config.metrics.compbench.clip:
            pictures = folder.measured(self.clips[clip].name)
            rows["non_spatial"] = torch.cosine_similarity(pictures, self.compbench_texts[:, None], dim=-1)
        return bench.total(rows)
