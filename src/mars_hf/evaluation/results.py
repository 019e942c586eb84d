"""
What an evaluation found, for machines (`results.json`) and for readers: `results.md` begins with the `model-index`
that the Hub reads and can be pasted into a model card.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

PAPER_TABLES = Path(__file__).parent / "paper_tables.yaml"
TITLES = {
    "clip_score": "CLIPScore ↑",
    "retrieval": "own prompt found, % ↑",
    "frechet": "Fréchet distance ↓",
    "compbench": "T2I-CompBench, % ↑",
    "geneval": "GenEval, % ↑",
}


@dataclass(frozen=True)
class Score:
    """
    One number.

    Args:
        run (`str`): The way of sampling, or `references` or `reconstructions`.
        pictures (`str`): `single`, or `best of N`.
        group (`str`): Of prompts.
        metric (`str`): One of `TITLES`.
        value (`float`): The number.
        interval (`tuple[float, float]`, *optional*): Its confidence interval.
        prompts (`int`): Number of prompts.
    """

    run: str
    pictures: str
    group: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    prompts: int


def paper_table(number: int) -> str:
    """Give a table of the paper as Markdown, with its source."""
    content = yaml.safe_load(PAPER_TABLES.read_text(encoding="utf-8"))
    table = content["tables"][number]
    rows = [
        ["-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else cell for cell in r]
        for r in table["rows"]
    ]
    lines = [f"**{table['title']}.** As the authors of {content['source']} report it. {table['note']}"]
    return "\n\n".join([*lines, _markdown(table["columns"], rows)])


def score_table(scores: Sequence[Score]) -> str:
    """Arrange scores as Markdown: a row for each run and group, a column for each metric."""
    metrics = [metric for metric in TITLES if any(score.metric == metric for score in scores)]
    rows: dict[tuple, dict[str, Score]] = {}
    for score in scores:
        rows.setdefault((score.run, score.pictures, score.group, score.prompts), {})[score.metric] = score
    cells = [
        [run, pictures, group, f"{prompts:,}", *(_cell(found.get(metric)) for metric in metrics)]
        for (run, pictures, group, prompts), found in rows.items()
    ]
    return _markdown(["run", "pictures", "group", "prompts", *(TITLES[metric] for metric in metrics)], cells)


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    digits = 2 if score.value >= 10 else 3
    low_high = "" if score.interval is None else " [{:.{d}f}, {:.{d}f}]".format(*score.interval, d=digits)
    return f"{score.value:.{digits}f}{low_high}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def model_index(model_name: str, dataset: str, scores: Sequence[Score]) -> str:
    """
    Write scores as the metadata of a model card.

    Returns:
        `str`: YAML that holds a `model-index`.
    """
    own = [score for score in scores if score.run not in ("references", "reconstructions")]
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type=dataset.split(",")[0].lower().replace(" ", "-"),
            dataset_name=dataset,
            dataset_config=score.group,
            metric_type=score.metric,
            metric_value=round(score.value, 4),
            metric_name=f"{TITLES[score.metric][:-2]} ({score.run}, {score.pictures})",
        )
        for score in own
    ]
    return ModelCardData(model_name=model_name, eval_results=results).to_yaml()


def report(results: dict[str, Any], scores: Sequence[Score], tables: Sequence[int]) -> str:
    """
    Write `results.md`.

    Args:
        results (`dict`): As in `results.json`.
        scores (`Sequence[Score]`): Its scores.
        tables (`Sequence[int]`): Tables of the paper to print below.
    """
    interval = results["config"]["interval"]
    parts = [
        f"---\n{model_index(results['model'], results['prompts'], scores)}\n---",
        f"# {results['model']} on {results['prompts']}",
        score_table(scores),
        f"In brackets: {100 * interval['confidence']:g} % intervals by bootstrap over prompts. Checkpoint "
        f"`{results['checkpoint_sha256'][:16]}`; "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ". Evaluators: "
        + "; ".join(f"{metric} by {name}" for metric, name in results["evaluators"].items())
        + ".",
        *(f"Note: {note}" for note in results["notes"]),
        *(paper_table(number) for number in tables),
    ]
    return "\n\n".join(parts) + "\n"


def as_rows(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Give scores as JSON has them."""
    return [asdict(score) for score in scores]
