"""The range test as a whole: pure, honest where there is nothing to find, for any number of the
page.
"""

import hashlib
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import trainer.data.dataset
import trainer.lr_finder.baseline
import trainer.lr_finder.trial
from support.found import found_of
from support.plans import small_plan, small_set
from support.range_trials import drawn, network
from trainer.api import lr_find
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.data.dataset import open_data
from trainer.data.workers import Watch
from trainer.lr_finder.api import (
    LRFinderResult,
    Request,
    baseline_losses,
    obstacle,
    on_few_images,
    run,
    schedule_shape,
    set_up,
    train_command,
)
from trainer.lr_finder.ramp import RATE, Scalar
from trainer.recipe.overrides import overrides_of
from trainer.recipe.schema import apply_overrides
from trainer.recipe.shipped import find_recipe
from trainer.runs.job import Job, plan_of, run_job
from trainer.tasks.constant import equal_odds_loss

SET = small_set("batch.images=8 epochs=1")
TRAINED = "epochs=1 batch.images=128 batch.norm_images=64"
SMALL = {
    "recipe": "A2",
    "model": "test_resnet",
    "set": SET,
    "seeds": 2,
    "steps": 8,
    "device": "cpu",
    "workers": "0",
}


@pytest.fixture(autouse=True, scope="module")
def _small_slice():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.lr_finder.baseline, "MOST_IMAGES", 40)
        yield


def digest(folder: Path) -> str:
    """Of every file below a folder, names and bytes; a range test's own folder does not count."""
    made = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if "lr-find-" not in str(path):
            made.update(
                str(path.relative_to(folder)).encode()
                + (path.read_bytes() if path.is_file() else b"")
            )
    return made.hexdigest()


def trained(base: Path) -> str:
    """The weights' digest of one small run."""
    plan = small_plan("A2", overrides=TRAINED)
    settings = make_settings("cpu", workers="0", runs=base / "runs", results=base / "results")
    with StopRequest() as stop:
        _, row = run_job(
            Job("A2", "test_resnet", overrides=small_set(TRAINED)),
            plan,
            settings,
            open_data(plan.profile, None),
            Console(quiet=True),
            stop,
        )
    return row.weights_sha256


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> LRFinderResult:
    return lr_find(**SMALL, runs=tmp_path_factory.mktemp("runs"))


def test_it_leaves_no_trace_and_training_after_it_is_training_without_it_bit_for_bit(tmp_path):
    before = trained(tmp_path / "before")
    page, others = find_recipe("A2").read_bytes(), digest(tmp_path / "before")
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()

    lr_find(**SMALL, runs=tmp_path / "before" / "runs")

    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert find_recipe("A2").read_bytes() == page
    assert digest(tmp_path / "before") == others
    assert trained(tmp_path / "after") == before


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = lr_find(**{**SMALL, "seeds": 1, "steps": 8})
    assert made.folder is None and not list(tmp_path.iterdir())
    assert made.plot().get_size_inches()[0] == 9


def test_what_is_there_is_found_again_and_again_runs_it_anew(found, monkeypatch):
    monkeypatch.setattr(trainer.lr_finder.trial, "optimizer_step", None)  # no trial may run
    second = lr_find(**SMALL, runs=found.folder.parent)
    assert second.folder == found.folder and second.suggestion.value == found.suggestion.value
    assert [curve.losses.tolist() for curve in second.suggestion.curves] == [
        curve.losses.tolist() for curve in found.suggestion.curves
    ]
    with pytest.raises(TypeError):
        lr_find(**SMALL, runs=found.folder.parent, again=True)


@pytest.mark.drill
def test_a_kill_loses_the_trial_that_was_running_and_the_rest_ends_the_same(found, tmp_path):
    class Killed(BaseException):
        pass

    setup = set_up(
        Job("A2", "test_resnet", overrides=SET),
        Request(num_seeds=2, num_steps=8),
        {"device": "cpu", "workers": "0", "runs": tmp_path},
    )
    for num_steps in (3, 12):
        left = iter(range(num_steps))

        def check():
            if next(left, None) is None:
                raise Killed

        before = len(list(tmp_path.rglob("trials/*.json")))
        with pytest.raises(Killed):
            run(setup, check=check)
        assert len(list(tmp_path.rglob("trials/*.json"))) == before + num_steps // 8 and not list(
            tmp_path.rglob("suggestion.json")
        )
    made = run(setup)
    assert made.suggestion.value == found.suggestion.value
    assert [curve.losses.tolist() for curve in made.suggestion.curves] == [
        curve.losses.tolist() for curve in found.suggestion.curves
    ]
    assert made.folder.name == found.folder.name


def test_images_rewritten_under_the_same_names_and_sizes_are_not_taken_for_those_before(
    tmp_path, monkeypatch
):
    def name_of(data: Path) -> str:
        fits = SET + " lr.warmup_epochs=1"
        job = Job("A2", "test_resnet", str(data), overrides=fits)
        return set_up(job, Request(num_steps=8), {"device": "cpu", "workers": "0"}).name

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            for i in range(60):
                pixels = np.full((8, 8, 3), 4 * i, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / split / label / f"{i}.bmp")
    first = name_of(tmp_path / "set")
    assert name_of(tmp_path / "set") == first
    path = tmp_path / "set" / "train" / "a" / "3.bmp"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    assert name_of(tmp_path / "set") != first


def test_a_wait_for_images_hears_a_stop(monkeypatch):
    """What watch.check raises ends the run; it is handed to the loader of every trial."""
    seen = []
    real = trainer.data.dataset.OpenedData.train_stream

    def stream(self, *given, watch, **more):
        seen.append(watch)
        return real(self, *given, watch=watch, **more)

    monkeypatch.setattr(trainer.data.dataset.OpenedData, "train_stream", stream)
    watch = Watch(check=lambda: None)
    job = Job("A2", "test_resnet", overrides=SET)
    setup = set_up(job, Request(num_seeds=1, num_steps=8), {"device": "cpu", "workers": "0"})
    run(setup, is_written=False, watch=watch)
    assert seen and all(one is watch for one in seen)


def test_a_constant_loss_gives_no_reliable_suggestion(monkeypatch):
    monkeypatch.setattr(
        trainer.lr_finder.trial, "optimizer_step", lambda state, window, step: torch.tensor(0.5)
    )
    monkeypatch.setattr(trainer.lr_finder.baseline.HeldOut, "loss", lambda self, model: 0.5)
    made = lr_find(**SMALL)
    assert made.suggestion.value is None and made.command is None
    assert made.suggestion.reason.startswith("no reliable suggestion: ")
    assert repr(made) == made.suggestion.reason


def test_a_slice_of_few_images_stands_in_the_answer_and_one_of_fifty_does_not():
    made = found_of(drawn(network(best=0.05), 0.02)).suggestion
    assert "only 13 images" in on_few_images(made, 13).reason
    assert made.reason in on_few_images(made, 13).reason
    assert on_few_images(made, 50) is made
    none = replace(made, value=None)
    assert on_few_images(none, 13) is none


def test_few_training_images_are_an_obstacle_that_longer_trials_do_not_move():
    assert "130 training images" in obstacle(130, False) and "weights=" in obstacle(130, False)
    assert "weights=" not in obstacle(130, True), "they are given"
    assert obstacle(500, False) == ""


def test_a_loss_that_is_never_a_number_gives_no_reliable_suggestion(monkeypatch):
    monkeypatch.setattr(
        trainer.lr_finder.trial,
        "optimizer_step",
        lambda state, window, step: torch.tensor(float("nan")),
    )
    made = lr_find(**SMALL)
    assert made.suggestion.value is None and made.suggestion.reason.startswith(
        "no reliable suggestion: "
    )
    assert made.plot() is not None


@pytest.mark.drill
@pytest.mark.parametrize("ramp", ["weight_decay", "drop_path"])
def test_any_number_of_the_page_has_a_range_test_with_the_same_outputs(ramp, tmp_path):
    made = lr_find(**{**SMALL, "seeds": 1, "steps": 8}, ramp=ramp, runs=tmp_path)
    assert made.scalar.label.endswith(ramp) and made.scalar.own is not None
    assert {path.name for path in made.folder.iterdir()} >= {
        "curve.csv",
        "curve.png",
        "curve.svg",
        "suggestion.json",
        "tensorboard",
    }
    assert made.asked["curve"] == ("both" if ramp == "weight_decay" else "heldout")
    ramps = [curve for curve in made.suggestion.curves if curve.purpose == "ramp"]
    assert [curve.values.tolist() for curve in ramps] == [made.values.tolist()]


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"ramp": "epochs"}, "lr.peak"),
        ({"ramp": "weight_dcay"}, "weight_decay"),
        ({"curve": "held"}, "heldout"),
        ({"seeds": 0}, "seeds=3"),
        ({"steps": 3}, "steps=200"),
        ({"low": 5.0, "high": 1.0}, "from=1e-06"),
        ({"high": 1e9}, "at most 100"),
        ({"device": "tpu"}, "cuda"),
        ({"model": "resnet5O"}, "resnet50"),
        ({"set": "batch.images=1437 batch.norm_images=1437"}, "batch.images="),
        ({"set": "lr.paek=1"}, "peak"),
    ],
)
def test_what_does_not_fit_is_one_line_that_says_what_would_do(change, remedy):
    with pytest.raises(UserError) as error:
        lr_find(**{**SMALL, **change})
    assert remedy in str(error.value) and "\n" not in str(error.value)


def test_floors_are_of_the_curve_that_they_are_drawn_for():
    job, machine = Job("A2", "test_resnet", overrides=SET), {"device": "cpu", "workers": "0"}
    setup = set_up(job, Request(num_steps=8), machine)
    baselines = baseline_losses(setup)
    assert baselines.held_out == pytest.approx(
        0.325, abs=0.005
    )  # ten even classes, each a yes for a tenth
    assert (
        baselines.train > baselines.held_out + 0.05
    )  # two yeses an image, where it is mixed and the threshold is passed
    assert baseline_losses(replace(setup, scalar=Scalar("smoothing", 0.1))).train is None
    labels = setup.data.val.labels
    assert equal_odds_loss(setup.trial_plan, labels) == pytest.approx(math.log(2))  # of A2's BCE
    ce = plan_of(Job("gn-ws", "test_resnet"))
    assert equal_odds_loss(ce, labels) == pytest.approx(math.log(10))


@pytest.mark.parametrize("recipe", ["A1", "convnext", "ffcv-rn18-16", "gn-ws", "torchvision-v1"])
def test_a_race_runs_through_the_pages_own_schedule(recipe):
    plan = plan_of(Job(recipe, "test_resnet"))
    shape = schedule_shape(plan, 40)
    assert len(shape) == 40 and shape.min() >= 0 and shape.max() <= 1
    assert shape[-1] == pytest.approx(
        plan.lr_at(plan.num_steps - plan.num_steps // 80 - 1) / plan.recipe.lr.peak
    )
    assert shape.max() > 0.45


# ---- the command that trains with the value


def command(overrides="", value=0.003123, job=None, label=RATE, own=5e-3):
    plan = small_plan("A1", overrides=overrides)
    return train_command(
        job or Job("A1", "resnet18", overrides=overrides), plan.recipe, Scalar(label, own), value
    )


def test_the_command_keeps_the_users_items_and_puts_the_value_in():
    assert command() == "make recipe=A1 model=resnet18 data=digits set=lr.peak=0.00312"
    assert (
        command("epochs=5 loss.name=ce")
        == 'make recipe=A1 model=resnet18 data=digits set="epochs=5 loss.name=ce lr.peak=0.00312"'
    )
    assert command("epochs=5 lr.peak=0.01 drop_path=null").endswith(
        'set="epochs=5 drop_path=null lr.peak=0.00312"'
    )
    assert command(job=Job("A1", "resnet18", "mnist", Path("/data/my set"))).startswith(
        'make recipe=A1 model=resnet18 data=mnist data_dir="/data/my set"'
    )
    assert command(label="optimizer.weight_decay", own=0.01, value=0.2).endswith(
        "set=optimizer.weight_decay=0.2"
    )


def test_a_warm_up_that_starts_above_the_value_comes_down_with_it():
    """A1's starts at 1e-4, and its cosine ends at 1e-6: as they stand the page would refuse the
    value.
    """
    made = command(value=5e-5)
    assert made.endswith('set="lr.peak=5e-05 lr.warmup_from=1e-06"')
    assert "lr.schedule.end=" in command(value=5e-7)
    page = small_plan("A1").recipe
    recipe, _ = apply_overrides(page, overrides_of(made.partition('set="')[2].rstrip('"')))
    assert recipe.lr.peak == 5e-5


def test_the_command_goes_through_the_shell_to_the_same_overrides():
    import shlex

    given = 'mix="{name: mixup, alpha: 0.2, partner: rolled}" epochs=3'
    words = shlex.split(command(given))
    text = next(word for word in words if word.startswith("set="))[4:]
    assert overrides_of(text) == overrides_of(given + " lr.peak=0.00312")


def test_an_item_in_quotation_marks_is_put_out_by_the_value_too():
    import shlex

    given = "\"lr.peak=0.01\" 'mix={name: mixup, alpha: 0.2, partner: rolled}'"
    text = next(word for word in shlex.split(command(given)) if word.startswith("set="))[4:]
    assert overrides_of(text) == overrides_of(given) | {"lr.peak": 0.00312}
