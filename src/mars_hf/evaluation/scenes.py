"""
What GenEval looks for in a picture: objects with their number, color and place, and objects that must not be there.

    {"tag": "color_attr", "prompt": "a photo of a red cup and a blue dog",
     "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]}
    {"tag": "position", "prompt": "a photo of a dog left of a cup",
     "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}
    {"tag": "counting", "prompt": "a photo of two cups",
     "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}]}

The format is that of `prompts/evaluation_metadata.jsonl` in https://github.com/djghosh13/geneval.
"""

from dataclasses import dataclass
from typing import Any

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
PLACES = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Clause:
    """
    Objects of one class.

    Args:
        label (`str`): The class.
        count (`int`): So many must be there; or, in what is excluded, so many must not.
        color (`str`, *optional*): One of `COLORS`, of all of them.
        position (`tuple[str, int]`, *optional*):
            One of `PLACES`, and the number of the earlier clause from whose objects it is seen.
    """

    label: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Scene:
    """
    All that must hold of a prompt's picture.

    Args:
        include (`tuple[Clause, ...]`): What must be there.
        exclude (`tuple[Clause, ...]`): What must not.
    """

    include: tuple[Clause, ...] = ()
    exclude: tuple[Clause, ...] = ()

    @property
    def clauses(self) -> tuple[Clause, ...]:
        return self.include + self.exclude


def read_scene(entry: dict[str, Any], where: str) -> Scene:
    """
    Read `include` and `exclude` of a line of prompts.

    Args:
        entry (`dict`): The line.
        where (`str`): What errors call it.

    Raises:
        ValueError: If both are empty, or a clause is not what it must be.
    """
    clauses = {}
    for kind in ("include", "exclude"):
        listed = entry.get(kind, [])
        if not isinstance(listed, list):
            raise ValueError(f"{where}: `{kind}` must be a list of clauses, got {listed!r}.")
        clauses[kind] = tuple(
            _read_clause(value, number, kind, f"{where}, `{kind}`") for number, value in enumerate(listed)
        )
    if not any(clauses.values()):
        raise ValueError(f"{where}: `include` and `exclude` name nothing to look for.")
    return Scene(**clauses)


def _read_clause(value: Any, number: int, kind: str, where: str) -> Clause:
    known = ("class", "count", "color", "position") if kind == "include" else ("class", "count")
    if not isinstance(value, dict) or any(key not in known for key in value):
        raise ValueError(f"{where}: a clause is an object of {', '.join(known)}, got {value!r}.")
    label, count, color, position = (value.get(key) for key in ("class", "count", "color", "position"))
    if not isinstance(label, str) or not label.strip():
        raise ValueError(f"{where}: `class` must name an object, got {label!r}.")
    if type(count) is not int or count < 1:
        raise ValueError(f"{where}: `count` must be a whole number of 1 or more, got {count!r}.")
    if color is not None and color not in COLORS:
        raise ValueError(f"{where}: `color` must be one of {', '.join(COLORS)}, got {color!r}.")
    if position is not None:
        if not isinstance(position, list) or len(position) != 2 or position[0] not in PLACES:
            raise ValueError(f"{where}: `position` is one of {', '.join(PLACES)} and a number, got {position!r}.")
        if type(position[1]) is not int or not 0 <= position[1] < number:
            raise ValueError(f"{where}: `position` of clause {number} must name an earlier one, got {position[1]!r}.")
        position = (position[0], position[1])
    return Clause(label, count, color, position)
