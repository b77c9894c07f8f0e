"""The store: written once, read back whole, damage named."""

import json
from pathlib import Path

import pytest

from trainer.recipe import find_recipe, load_recipe
from trainer.results import Row, RowError, read_row, row_path, store_row

ROW = Row(
    run="A1.v1-resnet50-digits-s0-abcdef", recipe="A1", version=1, digest="0" * 12, model="resnet50", data="digits",
    data_fingerprint="f" * 64, split="val", seed=0, deviations=(), status="finished", scored="model", top1_pct=97.5,
    top5_pct=100.0, loss_nats=0.05, other_top1_pct=None, num_val_images=360, num_replaced_images=0, epochs=10, steps=220,
    batch_images=64, norm_images=64, num_params=23528522, gmacs=0.08, images_per_s=99.0, train_s=140.0, peak_mem_mib=900.0,
    precision="float32", loader="torch", num_workers=0, num_threads=2, world_size=1, bitwise=True, weights_sha256="a" * 64,
    device="a processor", versions={"torch": "2.15.0"}, commit=None, dirty=None, finished_utc="2026-11-21T00:00:00+00:00",
)  # fmt: skip


def test_a_row_is_read_back_as_it_was_stored(tmp_path):
    path = store_row(tmp_path, ROW)
    assert path == row_path(tmp_path, ROW.run)
    assert read_row(tmp_path, ROW.run) == ROW
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_run_without_a_row_has_none(tmp_path):
    assert read_row(tmp_path, "nothing") is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": 3}', "\x00"])
def test_a_damaged_row_is_named_with_a_remedy(tmp_path, content):
    path = row_path(tmp_path, "broken")
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(RowError, match="broken.json.*move it away"):
        read_row(tmp_path, "broken")


def test_a_row_with_an_unknown_key_is_refused(tmp_path):
    path = row_path(tmp_path, ROW.run)
    path.parent.mkdir()
    path.write_text(json.dumps(json.loads(ROW.model_dump_json()) | {"best_top1_pct": 99.0}))
    with pytest.raises(RowError):
        read_row(tmp_path, ROW.run)


RESULTS = Path(__file__).parent.parent / "results"
STORED = sorted(RESULTS.rglob("rows/*.json"))


@pytest.mark.parametrize("path", STORED, ids=[str(path.relative_to(RESULTS)) for path in STORED])
def test_a_page_that_a_stored_row_cites_is_frozen(path):
    """Its digest is still the page's: who wants other numbers writes the next version."""
    row = read_row(path.parent.parent, path.stem)
    page = load_recipe(find_recipe(f"{row.recipe}.v{row.version}")).for_model(row.model)
    assert row.run == path.stem and row.digest == page.digest


def test_every_stored_row_is_told_of_with_its_score():
    told = "".join(
        page.read_text() for page in [RESULTS.parent / "README.md", *RESULTS.glob("*.md")]
    )
    assert len(STORED) >= 2
    for path in STORED:
        top1_pct = read_row(path.parent.parent, path.stem).top1_pct
        assert (
            f"`{path.stem}`" in told
            and ("diverged" if top1_pct is None else f"{top1_pct:.2f}") in told
        )
