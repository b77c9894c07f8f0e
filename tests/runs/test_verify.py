"""A run folder that is whole is found whole; each thing that is wrong with one is named, with what
was expected.
"""

import dataclasses
import io
import json
import os
import shutil

import pytest
import safetensors.torch
from typer.testing import CliRunner

from support.plans import small_set
from trainer.base.exits import EXIT_DONE
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.base.terminal import Terminal
from trainer.cli.main import app
from trainer.data.dataset import open_data
from trainer.runs import rescore
from trainer.runs.export import file_digest
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.loader_equivalence import certificates_of
from trainer.runs.results import row_path
from trainer.runs.verify_curves import curve_checks, expected_lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder with runs and results, plan, row) of a short run that keeps an average."""
    folder = tmp_path_factory.mktemp("finished")
    average = "average='{name: ema, decay: 0.9, every_steps: 1}'"
    job = Job(
        "A2",
        "test_resnet",
        overrides=small_set(f"epochs=2 batch.images=96 batch.norm_images=48 {average}"),
    )
    plan = plan_of(job)
    settings = make_settings("cpu", workers="0", runs=folder / "runs", results=folder / "results")
    with StopRequest() as stop:
        code, row = run_job(
            job, plan, settings, open_data(plan.profile, None), Terminal(file=io.StringIO()), stop
        )
    assert code == EXIT_DONE
    return folder, plan, row


@pytest.fixture
def run(finished, tmp_path):
    """(run folder, its row's file in the store) to be damaged."""
    folder, _, row = finished
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy" / "runs" / row.run, row_path(tmp_path / "copy" / "results", row.run)


def verified(run, *words):
    words = (
        "verify",
        "--run",
        run.name,
        "--runs",
        run.parent,
        "--results",
        run.parent.parent / "results",
        "--device",
        "cpu",
        *words,
    )
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="rsb")


def test_a_whole_run_is_found_whole(run):
    run, _ = run
    done = verified(run)
    assert done.exit_code == 0, done.output
    for what in (
        "links that lead out",
        "the store's row",
        "step_0000000",
        "metrics.jsonl, ",
        "learning rates",
        "model.safetensors",
        "top-1 % now",
    ):
        assert what in done.output, what
    assert "wrong" not in done.output
    by_path = CliRunner().invoke(
        app,
        [
            "verify",
            "--run",
            str(run),
            "--no-evaluate",
            "--results",
            str(run.parent.parent / "results"),
        ],
    )
    assert by_path.exit_code == 0 and "top-1 % now" not in by_path.output


def test_the_parity_certificate_of_the_rows_own_files_is_named(run, finished):
    folder, _ = run
    results, fingerprint = folder.parent.parent / "results", finished[2].data_fingerprint
    (results / "parity").mkdir()
    for name, source, is_within in (("other", "0" * 64, True), ("own", fingerprint, True)):
        (results / "parity" / f"{name}.json").write_text(
            json.dumps({"source": source, "beton": "1" * 64, "is_within": is_within})
        )
    (results / "parity" / "cut.json").write_text("{")
    done = verified(folder, "--no-evaluate")
    assert done.exit_code == 0 and "own.json" in done.output and "other.json" not in done.output, (
        done.output
    )
    changed_json(results / "parity" / "own.json", is_within=False)
    done = verified(folder, "--no-evaluate")
    assert (
        done.exit_code == 1
        and "wrong: parity certificate: expected one that is within" in done.output
    )
    changed_json(results / "parity" / "own.json", beton=fingerprint, is_within=True)
    for loader, named in (("ffcv", "own.json"), ("pil", "own.json")):
        assert [path.name for path, _ in certificates_of(fingerprint, loader, results)] == [named]
    assert not list(certificates_of("0" * 64, "ffcv", results))


def changed_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flipped(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def lines_of(path, change):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))


def piped(path):
    path.unlink()
    os.mkfifo(path)


def profile_of(run):
    return json.loads((run / "plan.json").read_text())["profile"]


def without_row(run, stored):
    (run / "row.json").unlink()


DAMAGES = {
    "checkpoint": (lambda run, stored: flipped(max(run.glob("checkpoints/*.pt")), -100), "checkpoints/step_"),
    "last checkpoint": (lambda run, stored: max(run.glob("checkpoints/*.pt")).unlink(), "the last checkpoint"),
    "no checksum": (lambda run, stored: max(run.glob("checkpoints/*.sha256")).unlink(), "checkpoints"),
    "weights": (lambda run, stored: flipped(run / "model.safetensors", -9), "model.safetensors"),
    "weights cut": (lambda run, stored: (run / "model.safetensors").write_bytes(b"cut"), "model.safetensors"),
    "row": (lambda run, stored: changed_json(run / "row.json", top1_pct=99.0), "the store's top1_pct: expected 99.0"),
    "row's weights": (lambda run, stored: changed_json(run / "row.json", weights_sha256="0" * 64), "model.safetensors: expected 0000"),
    "store": (lambda run, stored: changed_json(stored, seed=7), "the store's seed: expected 0, found 7"),
    "no store": (lambda run, stored: stored.unlink(), "the store's row"),
    "no row": (without_row, "row.json: expected one of a finished run, found none yet: the run has not ended, and rerun the same command to resume"),
    "line lost": (lambda run, stored: lines_of(run / "metrics.jsonl", lambda lines: lines[:1] + lines[2:]), "metrics.jsonl:2: expected loss at step 14"),
    "line twice": (lambda run, stored: lines_of(run / "metrics.jsonl", lambda lines: lines[:2] + lines[1:]), "found loss at step 14 once more"),
    "line cut": (lambda run, stored: lines_of(run / "metrics.jsonl", lambda lines: [*lines[:-1], lines[-1][:20]]), "a line of JSON"),
    "curve": (lambda run, stored: lines_of(run / "metrics.jsonl", lambda lines: [line.replace('"num_images": 360', '"num_images": 359') for line in lines]), "num_val_images, as its last line"),
    "rate": (lambda run, stored: lines_of(run / "metrics.jsonl", lambda lines: [lines[0].replace('"lr": ', '"lr": 1'), *lines[1:]]), "learning rate at step 10"),
    "plan": (lambda run, stored: changed_json(run / "plan.json", deviations=[]), "plan.json's deviations"),
    "seed": (lambda run, stored: changed_json(run / "plan.json", seed=5), "the run's name from recipe.yaml"),
    "page": (lambda run, stored: (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("epochs: 2", "epochs: 3")), "the run's name from recipe.yaml"),
    "recipe cut": (lambda run, stored: (run / "recipe.yaml").write_text("name: ["), "plan: expected one that is read"),
    "timm": (lambda run, stored: changed_json(run / "config.json", num_classes=3), "config.json's num_classes: expected 10, found 3"),
    "no timm": (lambda run, stored: (run / "config.json").write_text("{"), "config.json"),
    "checkpoint pipe": (lambda run, stored: piped(max(run.glob("checkpoints/*.pt"))), "not a regular file"),
    "checksum pipe": (lambda run, stored: piped(max(run.glob("checkpoints/*.sha256"))), "not a regular file"),
    "checkpoint folder": (lambda run, stored: (run / "checkpoints" / "step_9.pt").mkdir(), "checkpoints/step_9.pt"),
    "sparse checkpoint": (lambda run, stored: os.truncate(max(run.glob("checkpoints/*.pt")), 10**12), "1000000000000 bytes"),
    "weights pipe": (lambda run, stored: piped(run / "model.safetensors"), "not a regular file"),
    "curves pipe": (lambda run, stored: piped(run / "metrics.jsonl"), "not a regular file"),
    "sparse curves": (lambda run, stored: os.truncate(run / "metrics.jsonl", 10**12), "1000000000000 bytes"),
    "many images": (lambda run, stored: changed_json(run / "plan.json", profile=profile_of(run) | {"num_train": 10**15}), "plan.json's steps"),
    "link": (lambda run, stored: (run / "more").symlink_to("/etc"), "links that lead out: expected none, found more"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named_with_what_was_expected(run, damage):
    damaging, line = DAMAGES[damage]
    damaging(*run)
    done = verified(run[0], "--no-evaluate")
    assert done.exit_code == 1, done.output
    wrong = [each for each in done.output.splitlines() if each.startswith("wrong: ")]
    assert wrong and any(line in each for each in wrong), done.output
    assert all(": expected " in each and ", found " in each for each in wrong)


def test_weights_that_are_others_score_otherwise(run, finished):
    """Weights, checksum and rows changed together: only the score is left to tell."""
    folder, stored = run
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors = {
        name: -tensor if name.endswith("fc.weight") else tensor for name, tensor in tensors.items()
    }
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in (folder / "row.json", stored):
        changed_json(path, weights_sha256=file_digest(tensors))
    assert verified(folder, "--no-evaluate").exit_code == 0
    done = verified(folder)
    assert done.exit_code == 1 and "wrong: top-1 % now" in done.output, done.output


def test_eval_tells_weights_that_score_the_same_but_are_not_the_rows(run):
    folder, _ = run
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("fc.bias"))
    tensors[name] = tensors[name] + 1  # to every class: no score moves
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = ["eval", "--run", str(folder), "--device", "cpu"]
    done = CliRunner().invoke(app, words, prog_name="rsb")
    assert done.exit_code == 1 and "not the row's weights" in done.output, done.output


@pytest.mark.parametrize(
    ("words", "off", "code"),
    [
        (["--device", "cpu"], 0, 0),
        (["--device", "cpu"], 1, 1),  # as the row was scored: the same sums
        (["--device", "cpu", "--precision", "bf16"], 1, 0),
        (["--device", "cpu", "--precision", "bf16"], 2, 1),  # of 360 images one may move
    ],
)
def test_a_score_found_otherwise_than_the_rows_may_be_an_image_off(
    run, monkeypatch, words, off, code
):
    def scored(folder, settings, data_dir, real=rescore.rescore):
        settings = dataclasses.replace(settings, precision="float32")
        row, scores, digest = real(folder, settings, data_dir)
        return row, dataclasses.replace(scores, num_top1=scores.num_top1 - off), digest

    for module in ("verify", "rescore"):
        monkeypatch.setattr(f"trainer.runs.{module}.rescore", scored)
    folders = ["--runs", str(run[0].parent), "--results", str(run[0].parent.parent / "results")]
    for command in ("verify", "eval"):
        done = CliRunner().invoke(
            app, [command, "--run", run[0].name, *folders, *words], prog_name="rsb"
        )
        assert done.exit_code == code, done.output
        if command == "verify":
            assert ("0.28" in done.output) is ("bf16" in words)  # points that one image is
        else:
            assert ("not the same" in done.output) is bool(code) and (
                f"({off} image" in done.output
            ) is bool(off)


@pytest.mark.parametrize(
    ("of_row", "of_settings", "most"),
    [
        ({}, {}, 0),
        ({}, {"device": "cuda"}, 50),
        ({}, {"precision": "bf16"}, 50),
        ({"precision": "bf16"}, {"precision": "bf16"}, 50),
        ({"bitwise": False}, {}, 50),
        ({"compiled": True}, {}, 50),
        ({"num_val_images": 360}, {"device": "cuda"}, 1),
    ],
)
def test_only_what_a_cpu_repeats_in_float32_must_be_exact(finished, of_row, of_settings, most):
    row = finished[2].model_copy(update={"num_val_images": 50_000} | of_row)
    assert (
        rescore.most_moved(
            row, dataclasses.replace(make_settings("cpu", workers="0"), **of_settings)
        )
        == most
    )


def test_a_stopped_run_has_the_lines_that_it_came_to(finished):
    folder, plan, row = finished
    lines = [
        json.loads(line)
        for line in (folder / "runs" / row.run / "metrics.jsonl").read_text().splitlines()
    ]
    assert (
        len(list(expected_lines(plan, 10, plan.num_steps))) == len(lines) == 2 * (2 + 2)
    )  # 14 steps an epoch: losses at 10, 14 and 20, 28, two scores
    for upto in range(len(lines)):
        assert all(
            expected == found for _, expected, found in curve_checks(lines[:upto], plan, None)
        )
    assert not all(expected == found for _, expected, found in curve_checks(lines[1:], plan, None))
    assert not all(expected == found for _, expected, found in curve_checks(lines[:-1], plan, row))
