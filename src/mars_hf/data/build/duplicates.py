"""
Duplicates among all records, found in the order of the input: the first of its kind stays.

This needs one process and, for each record that stays, about a kilobyte of memory. What it decides depends on
the records and their order alone, never on who measured them.
"""

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import numpy as np

from .recipe import Duplicates

HASH_BITS = 64


class NearDuplicates:
    """
    Find an earlier hash within a Hamming distance without comparing all pairs.

    Two hashes that differ in at most `d` bits agree in at least one of `d + 1` stretches of bits (the pigeonhole
    principle), so only hashes that share a stretch are compared.

    Args:
        max_distance (`int`): Bits that may differ.
        max_colour_difference (`int`): How far the colours of two pictures may lie apart at most, of 255.
    """

    def __init__(self, max_distance: int, max_colour_difference: int):
        self.max_distance, self.max_colour_difference = max_distance, max_colour_difference
        cuts = [HASH_BITS * i // (max_distance + 1) for i in range(max_distance + 2)]
        self._stretches = [(low, (1 << (high - low)) - 1) for low, high in zip(cuts, cuts[1:], strict=False)]
        self._sharing: list[dict[int, list[int]]] = [defaultdict(list) for _ in self._stretches]
        self._hashes: list[int] = []
        self._colours: list[bytes] = []
        self._names: list[Hashable] = []

    def find(self, perceptual: int, colours: bytes) -> Hashable | None:
        """Name the earliest record that looks the same, if there is one."""
        candidates: set[int] = set()
        for (shift, mask), sharing in zip(self._stretches, self._sharing, strict=True):
            candidates.update(sharing.get(perceptual >> shift & mask, ()))
        for i in sorted(candidates):
            if (self._hashes[i] ^ perceptual).bit_count() <= self.max_distance and self._similar(i, colours):
                return self._names[i]
        return None

    def _similar(self, i: int, colours: bytes) -> bool:
        ours, others = (np.frombuffer(values, np.uint8).astype(np.int16) for values in (self._colours[i], colours))
        return int(np.abs(ours - others).max()) <= self.max_colour_difference

    def add(self, perceptual: int, colours: bytes, name: Hashable) -> None:
        """Remember a record that stays."""
        for (shift, mask), sharing in zip(self._stretches, self._sharing, strict=True):
            sharing[perceptual >> shift & mask].append(len(self._hashes))
        self._hashes.append(perceptual)
        self._colours.append(colours)
        self._names.append(name)


class DuplicateFinder:
    """
    Tell of each record, in the order of the input, whether an earlier one makes it a duplicate.

    Args:
        settings ([`Duplicates`], *optional*): Which pictures are the same. Without it only keys are compared.
    """

    def __init__(self, settings: Duplicates | None):
        self._keys: dict[str, Hashable] = {}
        self._pixels: dict[bytes, Hashable] | None = {} if settings and settings.exact else None
        self._near = None
        if settings and settings.max_distance is not None:
            self._near = NearDuplicates(settings.max_distance, settings.max_colour_difference)

    def check(self, row: dict[str, Any], name: Hashable) -> tuple[str, Hashable] | None:
        """
        Look at the next record.

        Args:
            row (`dict`): With `key`, and `pixels`, `perceptual` and `colours` where pictures are compared.
            name (`Hashable`): What the record is called in answers about later ones.

        Returns:
            `tuple[str, Hashable]`, *optional*: The reason to drop it and the earlier record, or `None` if it stays.
        """
        if row["key"] in self._keys:
            return "duplicate_key", self._keys[row["key"]]
        if self._pixels is not None and row["pixels"] in self._pixels:
            return "exact_duplicate", self._pixels[row["pixels"]]
        if self._near is not None:
            earlier = self._near.find(row["perceptual"], row["colours"])
            if earlier is not None:
                return "near_duplicate", earlier
            self._near.add(row["perceptual"], row["colours"], name)
        if self._pixels is not None:
            self._pixels[row["pixels"]] = name
        self._keys[row["key"]] = name
        return None
