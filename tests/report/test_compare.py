"""Two runs side by side: only what differs, and both curves."""

import json

import pytest

from support.tabled import row
from trainer.report.compare import find_row, row_differences
from trainer.report.curves import read_curves, text_plot
from trainer.runs.results import RowDeviation, RowError, store_row

A = row("a", 0, 95.0, images_per_s=100.0)


def change(path, before, after, origin="set"):
    return RowDeviation(path=path, before=before, after=after, origin=origin)


def found(a, b):
    return {(one.section, one.name): (one.a, one.b, one.change) for one in row_differences(a, b)}


def test_a_run_does_not_differ_from_itself():
    assert (
        row_differences(A, A) == ()
        and row_differences(A, A.model_copy(update={"run": "b", "finished_utc": "later"})) == ()
    )


def test_scores_costs_machine_and_versions_that_differ_are_listed_with_their_change():
    other = {
        "seed": 1,
        "top1_pct": 96.25,
        "num_params": 100,
        "device": "another",
        "versions": {"torch": "2.14.0", "timm": "1"},
        "dirty": True,
    }
    assert found(A, A.model_copy(update=other)) == {
        ("run", "seed"): ("0", "1", ""),
        ("score", "top-1 %"): ("95.00", "96.25", "+1.25"),
        ("cost", "parameters"): ("23,528,522", "100", "-23,528,422"),
        ("machine", "device"): ("a processor", "another", ""),
        ("machine", "commit"): ("unknown", "unknown, with uncommitted changes", ""),
        ("machine", "version of timm"): ("none", "1", ""),
        ("machine", "version of torch"): ("2.15.0", "2.14.0", ""),
    }


def test_deviations_are_compared_by_what_they_lead_to():
    """Twice changed is what it is at last; what one run leaves alone is what its recipe says."""
    a = A.model_copy(
        update={
            "deviations": (
                change("epochs", "300", "9", "profile"),
                change("epochs", "9", "3"),
                change("mix", "on", "off"),
            )
        }
    )
    b = A.model_copy(
        update={"deviations": (change("epochs", "300", "3"), change("loss.name", "bce", "ce"))}
    )
    assert found(a, b) == {
        ("deviation", "loss.name"): ("bce", "ce", ""),
        ("deviation", "mix"): ("off", "on", ""),
    }
    elsewhere = b.model_copy(update={"recipe": "A1", "digest": "1" * 12})
    assert found(a, elsewhere)["deviation", "mix"] == ("off", "as in its recipe", "")


def test_rows_that_hold_their_recipes_are_compared_by_exact_values():
    """What their texts hide is told, and what ran as memory allowed is told beside it."""
    recipe = {
        "name": "A1",
        "title": "a",
        "epochs": 9,
        "lr": {"peak": 0.00123456},
        "augment": [{"name": "flip"}],
    }
    other = recipe | {
        "title": "b",
        "lr": {"peak": 0.0012345649},
        "augment": [{"name": "flip"}, {"name": "cutout", "px": 8}],
    }
    memory = RowDeviation(path="batch.norm_images", before="32", after="16", origin="memory")
    a = A.model_copy(
        update={
            "resolved_recipe": recipe,
            "deviations": (change("lr.peak", "0.005", "0.00123456"),),
        }
    )
    b = A.model_copy(
        update={
            "resolved_recipe": other,
            "deviations": (change("lr.peak", "0.005", "0.00123456"), memory),
        }
    )
    assert [(one.name, one.a, one.b) for one in row_differences(a, b)] == [
        ("lr.peak", "0.00123456", "0.0012345649"),
        ("augment.cutout", "off", "{name: cutout, px: 8}"),
        ("batch.norm_images", "32", "16"),
    ]


def test_a_diverged_run_has_no_score_to_subtract():
    assert found(A, row("a", 0, None, images_per_s=100.0))["score", "top-1 %"] == (
        "95.00",
        "none",
        "",
    )


BCE, CE = ({"name": "A1", "epochs": 9, "loss": {"name": name}} for name in ("bce", "ce"))


def test_values_of_two_losses_are_shown_and_not_subtracted():
    a = A.model_copy(update={"resolved_recipe": BCE, "loss_nats": 0.076})
    other = {"loss_nats": 0.098, "top1_pct": 96.0}
    same = a.model_copy(update=other)
    assert found(a, same)["score", "loss nats"] == ("0.076", "0.098", "+0.022")
    b = a.model_copy(update=other | {"resolved_recipe": CE})
    assert found(a, b)["score", "loss nats"] == ("0.076", "0.098", "")
    assert found(a, b)["score", "top-1 %"] == ("95.00", "96.00", "+1")
    old = A.model_copy(
        update={"loss_nats": 0.098, "deviations": (change("loss.name", "bce", "ce"),)}
    )
    assert found(A, old)["score", "loss nats"][2] == ""


@pytest.mark.parametrize(
    "other", [{"data_fingerprint": "e" * 64}, {"split": "test"}, {"num_val_images": 36}]
)
def test_scores_on_other_data_are_shown_and_not_subtracted(other):
    b = A.model_copy(update=other | {"top1_pct": 96.0, "loss_nats": 0.5, "num_params": 9})
    changes = found(A, b)
    assert changes["score", "top-1 %"] == ("95.00", "96.00", "")
    assert changes["score", "loss nats"][2] == ""
    assert changes["cost", "parameters"][2]


def test_a_row_is_found_by_name_and_by_folder(tmp_path):
    store_row(tmp_path, A)
    folder = tmp_path / "runs" / "elsewhere"
    folder.mkdir(parents=True)
    (folder / "row.json").write_bytes(A.model_copy(update={"seed": 7}).as_json())
    assert find_row(A.run, tmp_path, tmp_path / "runs") == A
    assert (
        find_row("elsewhere", tmp_path, tmp_path / "runs").seed
        == find_row(str(folder), tmp_path, tmp_path).seed
        == 7
    )
    with pytest.raises(RowError, match=f"did you mean {A.run}"):
        find_row(A.run[:-1], tmp_path, tmp_path / "runs")
    for nothing in ("", "../../etc/passwd", "no such run at all"):
        with pytest.raises(RowError, match=r"no such row; .*rows has 1 row"):
            find_row(nothing, tmp_path, tmp_path / "runs")


def test_curves_are_those_of_the_weights_that_were_scored(tmp_path):
    lines = [
        {"step": 10, "epoch": 0.5, "loss_nats": 2.0, "lr": 0.1},
        {"step": 20, "epoch": 1, "weights": "model", "top1_pct": 50.0},
        {"step": 20, "epoch": 1, "weights": "average", "top1_pct": 60.0},
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "epo'
    )
    assert read_curves(tmp_path, A).val_top1 == ((1.0, 50.0),)
    curves = read_curves(tmp_path, A.model_copy(update={"scored": "average"}))
    assert (curves.train_loss, curves.val_top1) == (((0.5, 2.0),), ((1.0, 60.0),))
    assert read_curves(tmp_path / "nowhere", A) is None


def test_the_plot_has_both_curves_where_they_are():
    lines = text_plot(
        {"a": [(0.0, 0.0), (10.0, 10.0)], "b": [(0.0, 10.0), (10.0, 0.0)]}, width=21, height=11
    )
    drawn = [line.partition("│")[2] for line in lines[:11]]
    assert (
        lines[0].startswith("10 ")
        and lines[10].strip().startswith("0")
        and lines[-1].endswith("epoch")
    )
    for place, line in enumerate(
        drawn
    ):  # a rises and b falls, both straight: they meet in the middle
        assert line[20 - 2 * place] == ("a" if place != 5 else "*") and line[2 * place] == (
            "b" if place != 5 else "*"
        )
    assert "".join(drawn).count("*") == 1


def test_a_plot_of_one_point_and_of_none():
    lines = text_plot({"a": [(3.0, 50.0)], "b": [(0.0, 0.0), (6.0, 0.0)]}, width=13, height=3)
    assert [line.partition("│")[2] for line in lines[:3]] == ["      a", "", "bbbbbbbbbbbbb"]
    assert text_plot({"a": [(3.0, 50.0)]}, width=5, height=3)[1].endswith("│  a")
    assert text_plot({"a": []}) == [] and text_plot({}) == []
