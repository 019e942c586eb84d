"""What the side-by-side benchmarks share: the machine, results that survive an interruption, memory, tables."""

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

MIB = 2**20


def machine() -> str:
    """Say what the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    amx = "with AMX" if "amx_bf16" in cpuinfo else "without AMX"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    name = named[0] if named else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {amx}, {torch.get_num_threads()} threads; {versions}"


class Results:
    """
    What was measured, by part and key, kept in a file from the moment that it is measured.

    Args:
        file (`Path`, *optional*): The file.
        is_resumed (`bool`): Go on with what it holds; refused if machine or settings were others.
        parts (`Sequence[str]`): Names of parts.
        settings (`dict`): What all results depend on.
    """

    def __init__(self, file: Path | None, is_resumed: bool, parts: tuple[str, ...], settings: dict[str, Any]):
        self.file = file
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        self.data = {"machine": machine(), "settings": settings, **{part: {} for part in parts}}
        if is_resumed and file is not None and file.exists():
            found = json.loads(file.read_text())
            if different := [name for name in ("machine", "settings") if found[name] != self.data[name]]:
                was, now = found[different[0]], self.data[different[0]]
                sys.exit(f"{file} cannot be resumed: its {different[0]} was {was}, now it is {now}.")
            self.data = found

    def measured(self, part: str, key: str, measure: Callable[[], dict]) -> dict:
        """Give a result, measured now unless it is there."""
        if key not in self.data[part]:
            self.data[part][key] = measure()
            if self.file:
                partial = self.file.with_name(self.file.name + ".partial")
                partial.write_text(json.dumps(self.data, indent=1))
                partial.replace(self.file)
        return self.data[part][key]


def resident(field: str) -> int:
    """Read `VmRSS` or its highest value, `VmHWM`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Set a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))
