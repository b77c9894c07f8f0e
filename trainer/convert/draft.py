"""A recipe in the making: its values, what of them is assumed, and what it cannot say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainer.convert.flags import Args


@dataclass
class Draft:
    """What a converter fills in.

    values: the recipe as plain data; `augment` holds its components by name. assumed: a reason by
    path. lost: (flag with its value, why a recipe cannot say it).
    """

    args: Args
    values: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)
    lost: list[tuple[str, str]] = field(default_factory=list)

    def put(self, path: str, value: Any, *keys: str) -> None:
        """Set a value. keys: the flags that it comes from; where none of them was given it is
        assumed.
        """
        *sections, last = path.split(".")
        place = self.values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = tuple(value) if isinstance(value, list) else value
        if keys and not any(self.args.is_given(key) for key in keys):
            labels = " and ".join(self.args.label(key) for key in keys)
            self.assumed[path] = f"default of {labels} in {self.args.program}"

    def assume(self, path: str, value: Any, why: str) -> None:
        """Set a value that no flag gives."""
        self.put(path, value)
        self.assumed[path] = why

    def lose(self, key: str, why: str) -> None:
        """Note that a recipe cannot say the value of a flag."""
        self.args[key]  # read
        default = "" if self.args.is_given(key) else f" (default in {self.args.program})"
        self.lost.append((self.args.written(key) + default, why))

    def recipe(self) -> dict[str, Any]:
        """The values as plain data of a recipe."""
        parts = self.values["augment"].items()
        augment = tuple({"name": name, **fields} for name, fields in parts)
        return {**self.values, "augment": augment, "assumed": self.assumed}


def tidy(number: float) -> float:
    """A computed number without the noise of its last digits."""
    return float(f"{number:.12g}")
