"""
Where the work is done: rows through steps, on Ray Data or in this process.

A step takes a row and gives rows. Rows come out in any order; what they hold must not depend on it.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

from .recipe import Engine, Recipe

Row = dict[str, Any]
Step = Callable[[Row], Iterator[Row]]
TASKS_OF_A_WORKER = 4  # at least, so that none waits long for the others at the end


@functools.lru_cache(maxsize=4)
def made(make: Callable[[Recipe], Any], recipe: Recipe) -> Any:
    """Make something that takes long to make, once in each process."""
    return make(recipe)


@dataclass(frozen=True)
class ModelStep:
    """A step that needs models: `make(recipe)` loads them and gives a `Step`."""

    make: Callable[[Recipe], Step]
    recipe: Recipe

    def __call__(self, row: Row) -> Iterator[Row]:
        yield from made(self.make, self.recipe)(row)


class ModelActor:
    """A model step in an actor, which holds a GPU; it loads with the first row, so that Ray can tell what failed."""

    def __init__(self, step: ModelStep):
        self.step = step

    def __call__(self, row: Row) -> Iterator[Row]:
        yield from self.step(row)


@contextmanager
def connected(engine: Engine) -> Iterator[None]:
    """
    Start a Ray of one's own, or join the one named or already there; leave things as they were found.

    Raises:
        ValueError: If workers are to have more of a GPU than there is: they would wait for ever.
    """
    if engine.workers == 0:
        try:
            yield
        finally:
            made.cache_clear()
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ours = not ray.is_initialized()
    if ours:
        local = {"num_cpus": engine.workers, "object_store_memory": engine.object_store_bytes}
        place = {"address": engine.address} if engine.address else {"address": "local", "include_dashboard": False}
        ray.init(**place, **({} if engine.address else local), logging_level=logging.ERROR, log_to_driver=False)
    try:
        available = ray.cluster_resources().get("GPU", 0)
        if (engine.gpus_per_worker or 0) > available:
            raise ValueError(
                f"`engine.gpus_per_worker` is {engine.gpus_per_worker}, but Ray has {available:g} GPUs here. Leave it "
                "out, or set it to 0 to work without."
            )
        with _quiet():
            yield
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """One progress bar is enough: ours, by shards."""
    from ray.data import DataContext

    context, logger = DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, logger.level
    context.enable_progress_bars = context.print_on_execution_start = False
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before[:2]
        logger.setLevel(before[2])


def through(row: Row, steps: list[Step]) -> Iterator[Row]:
    """Take a row through steps, one after the other."""
    results: Iterator[Row] = iter([row])
    for step in steps:
        results = chain.from_iterable(map(step, results))
    yield from results


def run(rows: list[Row], steps: list[Step], engine: Engine, rows_per_task: int = 1) -> Iterator[Row]:
    """
    Take every row through all steps.

    Args:
        rows (`list[dict]`): One unit of work each.
        steps (`list[Step]`): Functions that pickle can name, or [`ModelStep`].
        engine ([`Engine`]): How many at a time, and where.
        rows_per_task (`int`, defaults to 1):
            Rows that share a task at most: Ray pauses between tasks. If one of them fails, all are tried again.

    Yields:
        `dict`: What the last step gives, in any order.

    Raises:
        RuntimeError: If a step fails in a worker.
    """
    if not rows:
        return
    if engine.workers == 0:
        for row in rows:
            yield from through(row, steps)
        return
    yield from _run_on_ray(rows, steps, engine, rows_per_task)


def _run_on_ray(rows: list[Row], steps: list[Step], engine: Engine, rows_per_task: int) -> Iterator[Row]:
    import ray

    gpus, resources = engine.gpus_per_worker, ray.cluster_resources()
    available = resources.get("GPU", 0)
    if gpus is None:
        gpus = 1 if available else 0
    slots = TASKS_OF_A_WORKER * (engine.workers or int(resources["CPU"]))
    tasks = -(-len(rows) // min(rows_per_task, -(-len(rows) // slots)))
    workers = engine.workers and min(engine.workers, tasks)
    data = ray.data.from_items(rows, override_num_blocks=tasks)
    # Without a GPU an actor would only hold a processor that the other steps need.
    for needs_gpu, group in groupby(steps, lambda step: isinstance(step, ModelStep) and gpus > 0):
        if needs_gpu:
            actors = {"num_gpus": gpus, "concurrency": max(1, int(available // gpus))}
            for step in group:
                data = data.flat_map(ModelActor, fn_constructor_args=[step], **actors)
        else:  # as one function: between two, Ray would shape blocks anew
            data = data.flat_map(functools.partial(through, steps=list(group)), num_cpus=1, concurrency=workers)
    try:
        yield from data.iter_rows()
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        raise RuntimeError(f"A worker failed: {type(cause).__name__}: {cause}") from error
