"""The committed studies say what their rows say: `python tests/test_studies.py` prints the tables anew."""

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
NORMS = ("batch_norm", "group_norm", "group_norm + WS", "batch_channel_norm + WS")
SAMPLES = (2, 8, 64)


def norm_of(row: dict) -> str:
    """The cell of a row of norm-micro-batch: which norm, with weight standardization or without."""
    changes = {change["path"]: change["after"] for change in row["deviations"]}
    if changes.get("model.norm") == "off":
        return "batch_norm"
    name = changes.get("model.norm.name", "group_norm")
    return name if changes.get("model.weight_standardization") == "off" else f"{name} + WS"


def micro_batch_rows() -> dict[tuple[str, int], list[dict]]:
    """The rows of norm-micro-batch by norm and images per micro-batch, seeds in order."""
    rows = [json.loads(path.read_text()) for path in sorted((ROOT / "results/rows").glob("gn-ws.v1-resnet18-digits-*.json"))]
    cells = {(norm, images): [] for norm in NORMS for images in SAMPLES}
    for row in sorted(rows, key=lambda row: row["seed"]):
        cells[norm_of(row), row["norm_images"]].append(row)
    return cells


def micro_batch_table() -> str:
    """Top-1 per cent of val, mean and standard deviation (n - 1) over seeds."""
    cells = micro_batch_rows()
    lines = [f"| norm | {' | '.join(f'{images} images' for images in SAMPLES)} |", "|---" * (len(SAMPLES) + 1) + "|"]
    for norm in NORMS:
        scores = [[row["top1_pct"] for row in cells[norm, images]] for images in SAMPLES]
        shown = [f"{statistics.mean(of_cell):.2f} ± {statistics.stdev(of_cell):.2f}" if of_cell else "not run" for of_cell in scores]
        lines.append(f"| {norm} | {' | '.join(shown)} |")
    return "\n".join(lines)


def micro_batch_list() -> str:
    """Every row of norm-micro-batch: its run and its top-1 per cent."""
    lines = ["| norm | images | seed | top-1 % | run |", "|---|---|---|---|---|"]
    for (norm, images), rows in micro_batch_rows().items():
        lines += [f"| {norm} | {images} | {row['seed']} | {row['top1_pct']:.2f} | `{row['run']}` |" for row in rows]
    return "\n".join(lines)


def test_the_tables_of_norms_are_those_of_their_rows():
    page = (ROOT / "results/norm-micro-batch.md").read_text()
    assert micro_batch_table() in page and micro_batch_list() in page


def test_every_cell_has_the_same_seeds_and_nothing_else_differs():
    cells = {cell: rows for cell, rows in micro_batch_rows().items() if rows}
    seeds = {tuple(row["seed"] for row in rows) for rows in cells.values()}
    assert len(seeds) == 1 and len(*seeds) >= 2
    for key in ("recipe", "version", "model", "data_fingerprint", "epochs", "steps", "batch_images", "precision", "device"):
        assert len({str(row[key]) for rows in cells.values() for row in rows}) == 1, key
    assert not any(row["dirty"] or row["status"] != "finished" for rows in cells.values() for row in rows)


if __name__ == "__main__":
    print(micro_batch_table(), micro_batch_list(), sep="\n\n")
