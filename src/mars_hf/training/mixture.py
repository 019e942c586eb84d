"""
The rows of a training run: row `i` of a [`Mixture`] is a task, a record and the form of its caption, all decided by
the number and the seed, so that a run that stops and resumes sees the same rows. Ask for any of them
([`MixtureDataset`]), or take them one after the other ([`MixtureStream`], and [`PackedStream`] of several at once).
"""

import hashlib
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, islice
from typing import Any

import torch
from datasets import IterableDataset as RecordStream
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..data.records import ShuffledOrder, ShuffledStream
from ..processing_mars import MarsProcessor
from .collation import ShiftedRow, pack_rows

Record = dict[str, Any]
TASKS = ("text-to-image", "captioning", "super-resolution", "documents")


@dataclass
class Source:
    """
    Records of one task.

    Args:
        task (`str`): `"text-to-image"`, `"captioning"`, `"super-resolution"` or `"documents"`.
        share (`float`): Share of batches; shares of all sources are divided by their sum.
        records (`Sequence[dict]`, `datasets.Dataset` or `datasets.IterableDataset`):
            With `image_codes` (raster order), `height`, `width` and whatever `write_caption` reads; for
            super-resolution also `lowres_codes`, and `enlarged_codes` if the model embeds them; documents with
            `segments`, a list of texts and such records, or of records with a `text` instead.
        write_caption (`Callable`): `(record, rng) -> str`; not called for documents.
        weights (`torch.Tensor` of shape `(num,)`, *optional*): How often each record comes; once in a pass if None.
        code_noise (`float`, defaults to 0.0):
            Largest share of the codes fed of pictures that are drawn (and of those that super-resolution starts from,
            but not of `enlarged_codes`, and of all in a document) that are replaced by random ones (labels are not);
            each row draws its own share.
            A picture of a small data set can be told by its first codes: without noise the model comes to lean on
            them instead of on the prompt, and goes astray on its own drawings.
        after_pass (`Callable`, *optional*): Called when a stream has been read to its end.
        after_reading (`Callable`, *optional*): Called when a run stops reading, in the process that reads.
        drop_caption (`float`, defaults to 0.1):
            Share of batches that are drawn whose captions are all `<null>`. Together they run apart: `<null>` is
            trained, and a batch whose prompts are text alone needs no gradient in them.

    Raises:
        ValueError: If the task is unknown, there are no records, or a share is impossible.
    """

    task: str
    share: float
    records: Any = field(repr=False)
    write_caption: Callable[[Record, random.Random], str] | None = None
    weights: torch.Tensor | None = field(default=None, repr=False)
    code_noise: float = 0.0
    drop_caption: float = 0.1
    after_pass: Callable[[], None] | None = field(default=None, repr=False)
    after_reading: Callable[[], None] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"A task must be one of {', '.join(TASKS)}, got {self.task!r}.")
        if self.is_stream and self.weights is not None:
            raise ValueError("A stream is read as it comes: its records cannot be weighed. Leave `weights` out.")
        if not self.is_stream and not len(self.records):
            raise ValueError(f"A source of {self.task!r} has no records.")
        for name in ("code_noise", "drop_caption"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a share between 0 and 1, got {getattr(self, name)}.")
        if self.share <= 0:
            raise ValueError(f"The share of {self.task!r} must be above 0, got {self.share}.")

    @property
    def is_stream(self) -> bool:
        """Whether records come one after the other and not by number."""
        return isinstance(self.records, RecordStream)


class Mixture:
    """
    The plan of a run over several sources: every block of `batch_size` consecutive rows has one source and one K, and
    all its captions or none.

    Within each pass over a source every record comes once, in an order of that pass's own; with weights, as often as
    chance has it. Sources of the same records share their passes: each record comes once, in one of the tasks.

    Args:
        processor ([`MarsProcessor`]): Writes prompts, captions and documents.
        sources (`list[Source]`): What is mixed.
        batch_size (`int`): Rows of a batch.
        codes_per_step (`Sequence[int]`, defaults to `(1,)`): K is drawn from these, one for each step.
        batches_per_step (`int`, defaults to 1):
            Batches that share a K: processes times accumulation, so that all of a step agree.
        seed (`int`): Decides all else.
    """

    def __init__(
        self,
        processor: MarsProcessor,
        sources: Sequence[Source],
        batch_size: int,
        codes_per_step: Sequence[int] = (1,),
        batches_per_step: int = 1,
        seed: int = 0,
    ):
        self.processor, self.sources = processor, list(sources)
        self.batch_size, self.seed = batch_size, seed
        self.codes_per_step, self.batches_per_step = tuple(codes_per_step), batches_per_step
        self._bounds = list(accumulate(source.share for source in self.sources))
        # The source whose passes each source takes part in: the first one of the same records.
        self._passes = [
            number
            if source.weights is not None
            else next(
                first
                for first, other in enumerate(self.sources)
                if other.records is source.records and other.weights is None
            )
            for number, source in enumerate(self.sources)
        ]

    def _chance(self, *names: Any) -> float:
        digest = hashlib.blake2b("/".join(map(str, (self.seed, *names))).encode(), digest_size=8).digest()
        return int.from_bytes(digest) / 2**64

    def source_number(self, batch: int) -> int:
        """Give the number of the source of a batch."""
        place = bisect_right(self._bounds, self._chance("source", batch) * self._bounds[-1])
        return min(place, len(self.sources) - 1)

    def source_of(self, index: int) -> Source:
        """Give the source of a row; it is the same for all rows of a batch."""
        return self.sources[self.source_number(index // self.batch_size)]

    def steps_codes(self, index: int) -> int:
        """Give the K of a row; it is the same for all rows of a step."""
        step = index // self.batch_size // self.batches_per_step
        return self.codes_per_step[int(self._chance("k", step) * len(self.codes_per_step))]

    def _order_of(self, number: int) -> ShuffledOrder:
        source = self.sources[number]
        return ShuffledOrder(len(source.records), self.seed * 1_009 + number, source.weights)

    def write_row(self, index: int, record: Record) -> dict[str, Any]:
        """Write row `index` from its record."""
        rng, source = random.Random(f"{self.seed}/{index}"), self.source_of(index)
        if source.task == "documents":
            segments = [part if isinstance(part, str) else part.get("text") or part for part in record["segments"]]
            row = self.processor.training_document(segments, codes_per_step=self.steps_codes(index))
            if source.code_noise:
                row["input_ids"] = self._with_noise(row["input_ids"], source.code_noise * rng.random(), rng)
            return {**row, "task": source.task}
        assert source.write_caption is not None
        draws = source.task in ("text-to-image", "super-resolution")
        drop = draws and self._chance("drop", index // self.batch_size) < source.drop_caption
        size = (record["height"], record["width"])
        row = self.processor.training_example(
            source.task,  # type: ignore[arg-type]
            source.write_caption(record, rng),
            record["image_codes"],
            *size,
            drop_caption=drop,
            codes_per_step=self.steps_codes(index),
            lowres_codes=record["lowres_codes"] if source.task == "super-resolution" else None,
        )
        if draws and source.code_noise:
            row["input_ids"] = self._with_noise(row["input_ids"], source.code_noise * rng.random(), rng)
        if source.task == "super-resolution" and record.get("enlarged_codes") is not None:
            row["enlarged_codes"] = [record["enlarged_codes"]]
        return {**row, "image_sizes": [size], "task": source.task}

    def _with_noise(self, ids: list[int], share: float, rng: random.Random) -> list[int]:
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        offset, count = self.processor.image_token_offset, self.processor.codebook_size
        fed = torch.as_tensor(ids)
        is_code = (fed >= offset) & (fed < offset + count)
        replaced = is_code & (torch.rand(fed.shape, generator=generator) < share)
        return torch.where(replaced, torch.randint(count, fed.shape, generator=generator) + offset, fed).tolist()


class MixtureDataset(Mixture, Dataset):
    """
    The rows of a [`Mixture`] whose sources hold all their records: any row can be asked for.

    Args:
        processor, sources, batch_size: Of [`Mixture`].
        num_batches (`int`): Batches in all.
        kwargs: Of [`Mixture`].
    """

    def __init__(
        self, processor: MarsProcessor, sources: Sequence[Source], batch_size: int, num_batches: int, **kwargs: Any
    ):
        super().__init__(processor, sources, batch_size, **kwargs)
        numbers = [self.source_number(batch) for batch in range(num_batches)]
        self._source = torch.tensor([self._passes[number] for number in numbers])
        of_source = torch.nn.functional.one_hot(self._source, len(self.sources))
        self._before = (of_source.cumsum(0) - of_source).gather(1, self._source[:, None]).squeeze(1)
        self._orders = [self._order_of(number) for number in range(len(self.sources))]

    def __len__(self) -> int:
        return len(self._source) * self.batch_size

    def record_of(self, index: int) -> Record:
        """Give the record that a row shows."""
        batch, place = divmod(index, self.batch_size)
        number = int(self._source[batch])
        return self.sources[number].records[self._orders[number][int(self._before[batch]) * self.batch_size + place]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.write_row(index, self.record_of(index))


class MixtureStream(Mixture, IterableDataset):
    """
    The rows of a [`Mixture`] one after the other: of any sources, streams among them, which are shuffled in blocks
    (see [`ShuffledStream`]).

    Each iteration begins at the first row, or at a later one ([`~MixtureStream.rows_from`]); of several processes each
    reads all and keeps its own. Of several workers of a process the first reads all, in order; the others are idle. A
    source that is a stream itself is read by one worker.

    Args:
        processor, sources, batch_size: Of [`Mixture`].
        num_batches (`int`, *optional*): Batches in all; without end if None.
        buffer_size (`int`, defaults to 1000): See [`ShuffledStream`].
        kwargs: Of [`Mixture`].

    Raises:
        ValueError: When several workers read a source that is a stream.
    """

    def __init__(
        self,
        processor: MarsProcessor,
        sources: Sequence[Source],
        batch_size: int,
        num_batches: int | None = None,
        buffer_size: int = 1000,
        **kwargs: Any,
    ):
        super().__init__(processor, sources, batch_size, **kwargs)
        self.num_batches, self.buffer_size = num_batches, buffer_size

    def __len__(self) -> int:
        if self.num_batches is None:
            raise TypeError("A stream of rows without `num_batches` has no end.")
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.rows_from(0)

    def rows_from(self, first: int) -> Iterator[dict[str, Any]]:
        """Give the rows from number `first` on. Those before are not written; streams are read up to there."""
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1 and any(source.is_stream for source in self.sources):
            raise ValueError(  # `datasets` would give each worker a part of the files
                f"A stream is read by one worker, got {worker.num_workers}: set `dataloader_num_workers` to 0 or 1."
            )
        if worker is not None and worker.id:
            return
        size, begin = self.batch_size, first // self.batch_size
        batches = Counter(self._passes[self.source_number(batch)] for batch in range(begin))
        before = {number: batches[number] * size for number in sorted(set(self._passes))}
        before[self._passes[self.source_number(begin)]] += first % size
        records = {number: self._records_of(number, place) for number, place in before.items()}
        try:
            for batch in count(begin) if self.num_batches is None else range(begin, self.num_batches):
                of_batch = records[self._passes[self.source_number(batch)]]
                for index in range(max(batch * size, first), (batch + 1) * size):
                    yield self.write_row(index, next(of_batch))
        finally:
            for source in self.sources:
                if source.after_reading is not None:
                    source.after_reading()

    def _records_of(self, number: int, first: int = 0) -> Iterator[Record]:
        source = self.sources[number]
        if source.is_stream:
            order = {"seed": self.seed * 1_009 + number, "buffer_size": self.buffer_size}
            return islice(ShuffledStream(source.records, **order, after_pass=source.after_pass), first, None)
        order = self._order_of(number)
        return (source.records[order[place]] for place in count(first))


class Pack(list):
    """
    The rows of a pack, and where a run that resumes behind it may begin.

    Args:
        rows (`Iterable[dict]`): Of [`MixtureStream`].
        window (`tuple[int, int]`): The window that the rows are of, and how many packs come before it.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = (), window: tuple[int, int] = (0, 0)):
        super().__init__(rows)
        self.window = window


class PackedStream(IterableDataset):
    """
    Packs of rows that come one after the other, window after window.

    Rows of a window are packed together, and its packs come in the order of their longest rows; see [`pack_rows`]. How
    many packs a window gives is not known before it is packed, so that each pack tells its window: set as `begin`, the
    rows before it are not written again, and empty packs stand for theirs.

    Args:
        rows ([`MixtureStream`]): Of rows.
        config ([`MarsConfig`]): Of the model.
        max_length (`int`): Tokens of a pack.
        window (`int`, defaults to 4096): Rows that are packed together.
        num_packs (`int`, *optional*): Packs in all; as many as the rows give if None.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]],
        config: Any,
        max_length: int,
        window: int = 4096,
        num_packs: int | None = None,
    ):
        self.rows, self.config, self.max_length, self.window = rows, config, max_length, window
        self.num_packs = num_packs
        self.begin = (0, 0)

    def __len__(self) -> int:
        if self.num_packs is None:
            raise TypeError("How many packs the rows give is not known before they are packed.")
        return self.num_packs

    def __iter__(self) -> Iterator[Pack]:
        return islice(self._packs(), self.num_packs)

    def _packs(self) -> Iterator[Pack]:
        worker, (number, before) = get_worker_info(), self.begin
        if worker is None or not worker.id:
            yield from (Pack(window=self.begin) for _ in range(before))
        rows = self.rows.rows_from(number * self.window) if number else iter(self.rows)  # type: ignore[attr-defined]
        while members := list(islice(rows, self.window)):
            packs = pack_rows([len(ShiftedRow.of(row, self.config)) for row in members], self.max_length)
            for pack in packs:
                yield Pack((members[place] for place in pack), (number, before))
            number, before = number + 1, before + len(packs)

    def rows_of_a_pack(self) -> float:
        """Measure the mean number of rows of a pack, on the first window."""
        members = list(islice(iter(self.rows), self.window))
        packs = pack_rows([len(ShiftedRow.of(row, self.config)) for row in members], self.max_length)
        return len(members) / len(packs)


__all__ = ["TASKS", "Mixture", "MixtureDataset", "MixtureStream", "Pack", "PackedStream", "Source"]
