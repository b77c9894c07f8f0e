"""Reports for tests: a study with every kind of cell, one with hostile texts, one with 2,000 rows;
and a reader of recipes.
"""

import dataclasses
import math
from html.parser import HTMLParser

from support.tabled import cell, table_of
from trainer.report.curves import Curves

NOTES = "## What it says\n\nBCE **wins**.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
HOSTILE = (
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "' onmouseover='window.hacked=1",
    "]]></style></title><script>window.hacked=1</script>",
    "\u202eright to left\u200f \u2066",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; &amp;",
    "<!-- comment --!> <![CDATA[ x",
)
HOSTILE_NOTES = """# <script>window.hacked=1</script>

[x](javascript:window.hacked=1) <img src="http://example.org/a.png" onerror="window.hacked=1"> ![y](http://example.org/b.png)

<style>body {display: none}</style>
"""


def study(notes=NOTES):
    """Two groups of five cells: finished, clear, n = 1, diverged and failed in part, without a row."""
    values, facts = {}, {}
    for group in ("resnet18 on digits", "convnext_atto on digits"):
        model = group.split()[0]
        base, better, alone, torn, absent = (
            cell(
                f"{name} ({model})",
                group,
                overrides=text,
                is_base=name == "BCE",
                levels=(("loss", name), ("lr", "low")),
            )
            for name, text in (
                ("BCE", "epochs=10 loss.name=bce"),
                ("CE", "epochs=10 loss.name=ce"),
                ("sum", "epochs=10 'loss={name: bce, reduction: sum}'"),
                ("focal", "epochs=10 loss.name=focal"),
                ("none", "epochs=10 loss.name=none"),
            )
        )
        values |= {
            base: {0: 90.0, 1: 92.0, 2: 91.0},
            better: {0: 93.0, 1: 95.1, 2: 94.1},
            alone: {0: 93.5},
        }
        values |= {torn: {0: 80.0, 1: None}, absent: {}}
        facts |= {
            one.name: {"train_s": 50.0 + 7 * place, "model": model}
            for place, one in enumerate((base, better, alone, torn))
        }
    table = table_of(
        values, errors={("focal (resnet18)", 2): "RuntimeError: out of memory"}, **facts
    )
    return dataclasses.replace(table, notes=notes)


def hostile():
    """Everything that a recipe, a row or a note may say, said by somebody who means harm."""
    cells = {
        cell(
            text, f"g {text}", overrides=text, is_base=True, published=1.0, published_source=text
        ): {0: 90.0, 1: None}
        for text in HOSTILE
    }
    facts = {
        text: {"device": text, "versions": {text: text}, "run": f"run {text}", "changes": (text,)}
        for text in HOSTILE
    }
    table = table_of(cells, errors={(text, 2): text for text in HOSTILE}, **facts)
    words = {
        "title": HOSTILE[0],
        "question": HOSTILE[1],
        "source": HOSTILE[2],
        "notes": HOSTILE_NOTES,
    }
    return dataclasses.replace(table, **words)


def large(num_cells=400):
    """400 cells of 5 seeds."""
    values = {
        cell(f"cell {place}", is_base=place == 0): {
            seed: 80 + (7 * place + seed**2) % 13 for seed in range(5)
        }
        for place in range(10)
    }
    table = table_of(values, seeds=range(5))
    cells = [
        dataclasses.replace(
            one, cell=dataclasses.replace(one.cell, name=f"cell {place}", is_base=place == 0)
        )
        for place, one in (
            (place, table.cells[place if place == 0 else 1 + place % 9])
            for place in range(num_cells)
        )
    ]
    return dataclasses.replace(table, cells=tuple(cells))


def curves_of(table) -> dict[str, Curves]:
    """Curves for all rows but those of the second cell."""
    rows = [row for place, one in enumerate(table.cells) if place != 1 for row in one.rows]
    return {
        row.run: Curves(
            tuple((step / 4, 2 * math.exp(-step / 20) + 0.01 * row.seed) for step in range(1, 41)),
            tuple(
                (epoch, (row.top1_pct or 40) * (1 - 0.5**epoch) - row.seed)
                for epoch in range(1, 11)
            ),
        )
        for row in rows
    }


def every_case():
    """Two groups; n = 3, 2, 1 and 0; diverged, failed, missing; equal values; a published score;
    names that bite.
    """
    small, large = "resnet18 on digits", "resnet50 on digits"
    cells = {
        cell("BCE", small, is_base=True, levels=(("loss", "BCE"),), published=79.8, published_source="RSB, Table 1 (resnet50, ImageNet-1k)"): {0: 95.8333, 1: 97.2222, 2: 96.1111},
        cell("CE", small, "loss={name: ce}", levels=(("loss", "CE"),)): {0: 96.3889, 1: 97.5, 2: 97.2222},
        cell("CE | 50 % & #1_[a] $x^2$ \\n <b>", small, "mix=null"): {0: 90.0, 1: None, 2: 91.0},
        cell("equal", small, "smoothing=0.1"): {0: 96.3889, 1: 97.7778, 2: 96.6667},
        cell("one", small, "epochs=3"): {1: 80.0}, cell("never ran", small, "epochs=5"): {},
        cell("-β → Ω", large, is_base=True): {0: 98.0, 1: 98.5, 2: 98.2},
        cell("*failed*", large, "`epochs`=4"): {0: 97.0, 2: 97.1},
    }  # fmt: skip
    facts = {"CE": {"device": "another processor"}, "one": {"epochs": 3}}
    table = table_of(cells, errors={("*failed*", 1): "RuntimeError: out of memory"}, **facts)
    return dataclasses.replace(
        table,
        title="Loss & norms: 100 % of it",
        name="every-case",
        word="every-case",
        notes="What was *meant* by it.\n\n- a list",
    )


def one_seed():
    values = {
        cell("base", is_base=True): {0: 95.8333},
        cell("swish", overrides="model.activation={name: swish}"): {0: 96.1111},
    }
    return dataclasses.replace(table_of(values, seeds=(0,)), name="one-seed", word="one-seed")


class Page(HTMLParser):
    """What a recipe's HTML holds: (tag, attributes) of all elements, texts of those asked for, and
    whether all is closed.
    """

    _EMPTY = ("meta", "input", "br", "hr", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), (tag, attributes)
        if tag not in self._EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag) -> list[dict]:
        return [attributes for found, attributes in self.elements if found == tag]
