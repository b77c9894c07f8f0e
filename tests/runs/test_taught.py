"""A run with a teacher: killed and resumed to the same bits, named in its row, used without it."""

import hashlib
import json
import signal

import pytest
import safetensors.torch
import timm
import torch

import trainer
from support import forked
from support.commands import rsb
from support.endings import ending

_OF_PLAN = ("recipe", "model", "data", "set", "device", "results")


def given(path, model="test_convnext", number=4):
    torch.manual_seed(1)
    tensors = timm.create_model(model, num_classes=number).state_dict()
    safetensors.torch.save_file(tensors, path)
    return path


def words(folder, weights, model="test_resnet", teacher="test_convnext", **more):
    """Those of a run that a teacher teaches."""
    distill = f"{{name: hard, share: 0.5, teacher: {teacher}, weights: {weights}}}"
    return replaced(folder, set=f"{forked.SET} distill='{distill}'", model=model, **more)


def replaced(folder, **named):
    """The words of a run, some with other values."""
    plain = [word for word in forked.words(folder) if word[2:].partition("=")[0] not in named]
    return [*plain, *(f"--{name}={value}" for name, value in named.items())]


def test_killed_while_it_is_taught_it_ends_the_same(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    weights = given(tmp_path / "teacher.safetensors")
    code, printed = forked.end_of(words(whole, weights))
    assert code == 0, printed
    assert "taught by test_convnext" in printed
    for step in (5, 13):
        code, printed = forked.end_of(words(killed, weights), "step", step)
        assert code == -signal.SIGKILL, printed
    # where it lies is no part of the run
    moved = weights.rename(tmp_path / "moved.safetensors")
    code, printed = forked.end_of(words(killed, moved))
    assert code == 0 and f"resumed after step 13 of {forked.NUM_STEPS}" in printed, printed
    ends = [ending(folder) for folder in (whole, killed)]
    for end in ends:
        end["row"].pop("deviations")
        assert end["row"]["resolved_recipe"]["distill"].pop("weights")
    assert ends[0] == ends[1]
    row = ends[0]["row"]
    sha256 = hashlib.sha256(moved.read_bytes()).hexdigest()
    assert (row["teacher"], row["teacher_sha256"]) == ("test_convnext", sha256)
    assert row["teacher_run"] is None
    alone = timm.create_model("test_resnet", num_classes=4)
    assert row["num_params"] == sum(one.numel() for one in alone.parameters())


def test_resumed_with_another_file_in_its_teachers_place_it_is_refused(tmp_path):
    weights = given(tmp_path / "teacher.safetensors")
    code, printed = forked.end_of(words(tmp_path, weights), "step", 5)
    assert code == -signal.SIGKILL, printed
    (folder,) = (tmp_path / "runs").iterdir()
    given(weights, model="test_resnet")
    # its own recipe says which file it is
    again = replaced(tmp_path, recipe=folder / "recipe.yaml", set="epochs=2")
    code, printed = forked.end_of(again)
    assert code == 2 and "distill.sha256" in printed and "Traceback" not in printed, printed
    assert not list(tmp_path.glob("results/rows/*"))
    # the same words with another file are another run, which begins at its own start
    code, printed = forked.end_of(words(tmp_path, weights, teacher="test_resnet"))
    assert code == 0 and "resumed after" not in printed
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize(
    ("distill", "named"),
    [
        ("teacher: test_convnext", "distill.weights"),
        ("teacher: test_convnext, weights: nothing.pth", "nothing.pth"),
        ("teacher: test_convnext, weights: run:nothing", "runs/nothing"),
        ("teacher: test_convnet, weights: {file}", "distill.teacher"),
        ("teacher: test_convnext, weights: {seven}", "7 classes"),
    ],
)
def test_a_missing_teacher_is_one_line_before_anything_is_made(tmp_path, distill, named):
    file = given(tmp_path / "teacher.safetensors")
    seven = given(tmp_path / "seven.safetensors", number=7)
    distill = distill.format(file=file, seven=seven)
    more = f"{forked.SET} distill='{{name: hard, share: 0.5, {distill}}}'"
    _, *asked = replaced(tmp_path, set=more)
    of_plan = [one for one in asked if one[2:].partition("=")[0] in _OF_PLAN]
    for command, given_words in (("train", asked), ("plan", of_plan)):
        done = rsb(command, *given_words)
        lines = done.stderr.strip().splitlines()
        assert done.exit_code == 2 and len(lines) == 1, (command, done.stderr)
        assert named in lines[0] and "; use" in lines[0], lines[0]
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_a_run_teaches_another_and_what_it_taught_is_used_alone(tmp_path):
    code, printed = forked.end_of(forked.words(tmp_path))
    assert code == 0, printed
    (first,) = (json.loads(path.read_text()) for path in tmp_path.glob("results/rows/*.json"))
    student = "deit_tiny_distilled_patch16_224"
    code, printed = forked.end_of(
        words(tmp_path, f"run:{first['run']}", student, teacher="test_resnet")
    )
    assert code == 0, printed
    rows = [json.loads(path.read_text()) for path in tmp_path.glob("results/rows/*.json")]
    (row,) = (one for one in rows if one["run"] != first["run"])
    assert (row["teacher"], row["teacher_run"]) == ("test_resnet", first["run"])
    # shown alike: the teacher's config.json has the data's own mean and deviation
    assert "normalized anew" not in printed
    for path in (tmp_path / "runs" / first["run"]).iterdir():
        if path.suffix == ".safetensors":
            path.unlink()
    folder = tmp_path / "runs" / row["run"]
    model = trainer.load_run(str(folder)).model
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        answers = model(images)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
    assert answers.shape == (2, 4) and torch.equal(answers, again)
    out = tmp_path / "answers.csv"
    asked = [f"--run={folder}", f"--images={forked.images() / 'val'}", f"--out={out}"]
    done = rsb("predict", *asked, "--no-sheet", "--device=cpu")
    assert done.exit_code == 0 and out.exists(), done.output
