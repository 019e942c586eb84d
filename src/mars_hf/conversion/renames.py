"""Ordered tables of renames that can be read in both directions; everything that renames a checkpoint is one."""

import re
from collections.abc import Iterable

FIELD = re.compile(r"\{(\w+)\}")


class RenameTable:
    """
    Renames of whole tensor names, tried in order; the first that fits decides.

    Args:
        pairs (`Iterable[tuple[str, str]]`):
            Old and new name. `{field}` stands for one part of a name between dots and must be once in both.

    Raises:
        ValueError: If the two names of a pair hold different fields, or one of them twice.

    Example:
        >>> table = RenameTable([("h.{layer}.ln_1.{kind}", "layers.{layer}.input_layernorm.{kind}")])
        >>> table.forward("h.3.ln_1.weight"), table.backward("layers.3.input_layernorm.weight")
        ('layers.3.input_layernorm.weight', 'h.3.ln_1.weight')
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        self.pairs = tuple(pairs)
        for old, new in self.pairs:
            fields = sorted(FIELD.findall(old))
            if fields != sorted(FIELD.findall(new)) or len(fields) != len(set(fields)):
                raise ValueError(f"Both names must hold the same fields, each once, got {old!r} and {new!r}.")
        self._forward = [(_pattern(old), new) for old, new in self.pairs]
        self._backward = [(_pattern(new), old) for old, new in self.pairs]

    def forward(self, name: str) -> str | None:
        """Give the new name, or `None` if no pair fits."""
        return _rename(name, self._forward)

    def backward(self, name: str) -> str | None:
        """Give the old name, or `None` if no pair fits."""
        return _rename(name, self._backward)


def _pattern(template: str) -> re.Pattern[str]:
    literals = FIELD.split(template)
    parts = [f"(?P<{part}>[^.]+)" if place % 2 else re.escape(part) for place, part in enumerate(literals)]
    return re.compile("".join(parts))


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rules:
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict())
    return None
