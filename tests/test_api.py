"""The Python API as a notebook uses it: the command line's runs, shown, stopped, resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer import api
from trainer.base.errors import UserError
from trainer.recipe.overrides import overrides_of

SHORT = {
    "epochs": 2,
    "batch.images": 128,
    "batch.norm_images": 64,
    "lr.warmup_epochs": None,
    "lr.warmup_from": None,
}
MACHINE = {"device": "cpu", "workers": 0}
EXTRAS = Path(__file__).parent / "support" / "extras.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("api")
    return {"runs": base / "runs", "results": base / "results"}


@pytest.fixture(scope="module")
def run(folders):
    return api.train("A3", "test_resnet", set=SHORT, progress=False, **MACHINE, **folders)


def test_importing_the_package_is_light_and_it_lists_what_it_offers():
    check = "import sys, trainer; print(*dir(trainer)); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    offered, modules = map(str.split, done.stdout.splitlines())
    assert {"load_recipe", "plan", "train", "evaluate", "lr_find", "load_run"} <= {*offered}
    assert not {"torch", "timm", "matplotlib", "rich"} & {*modules}


def test_a_name_that_is_not_offered_is_an_attribute_error():
    import trainer

    with pytest.raises(AttributeError, match="trian"):
        _ = trainer.trian


@pytest.mark.parametrize(
    "overrides",
    [
        {"lr.peak": 0.0012345678901234567, "mix": None},
        {"mix": {"name": "mixup", "alpha": np.float32(0.5)}},
        {"loss.name": "ce", "optimizer.betas": (0.9, 0.99)},
    ],
)
def test_overrides_keep_every_bit_of_their_values_on_the_way_through_text(overrides):
    read = overrides_of(api.text_of(overrides))
    assert json.dumps(read) == json.dumps(overrides, default=lambda value: value.item())


def test_a_value_that_no_recipe_can_have_is_refused():
    with pytest.raises(UserError, match="object"):
        api.plan("A3", "test_resnet", set={"epochs": object()})


def test_plugins_are_loaded_as_by_plugins_on_the_command_line(tmp_path):
    """In a process of its own: a plugin stays loaded."""
    plugin = tmp_path / "extras.py"
    shutil.copy(EXTRAS, plugin)
    script = (
        "import sys, trainer\n"
        "try: trainer.plan('A3', 'test_resnet', set={'loss': {'name': 'brier'}})\n"
        "except ValueError as error: print(error)\n"
        "for plugins in (sys.argv[1], [sys.argv[1]]):\n"
        "    plan = trainer.plan('A3', 'test_resnet', set='loss={name: brier}', plugins=plugins)\n"
        "    print(plan.recipe.loss.name, *plan.plugins)"
    )
    command = [sys.executable, "-c", script, str(plugin)]
    done = subprocess.run(command, capture_output=True, text=True)
    refused, *loaded = done.stdout.splitlines()
    assert "brier" in refused and loaded == ["brier extras.py"] * 2, done.stderr


def test_a_plan_has_its_units_and_displays_itself():
    plan = api.plan("A3", "test_resnet", set=SHORT)
    assert (plan.num_steps, plan.num_micro_batches) == (22, 2) and plan.lr_at(0) == 0.008
    assert "22 = 2 epochs x 11" in str(plan)
    assert "22 = 2 epochs x 11" in plan._repr_html_() and plan._repr_html_().startswith("<pre")


def test_the_same_arguments_give_the_same_run_as_on_the_command_line(run, folders):
    text = " ".join(f"{path}={'null' if value is None else value}" for path, value in SHORT.items())
    words = [
        "train",
        "--recipe",
        "A3",
        "--model",
        "test_resnet",
        "--set",
        text,
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    words += ["--runs", folders["runs"], "--results", folders["results"]]
    done = subprocess.run([sys.executable, "-m", "trainer", *words], capture_output=True, text=True)
    assert done.returncode == 0 and f"{run.name} already has a row" in done.stdout


def test_a_run_gives_its_row_curves_picture_and_model(run):
    assert run.is_finished and run.row.steps == 22
    evaluated = run.history.dropna(subset="top1_pct")
    assert (
        evaluated["epoch"].tolist() == [1, 2] and evaluated["top1_pct"].iloc[-1] == run.row.top1_pct
    )
    assert run.history["loss_nats"].dropna().iloc[-1] > 0
    assert run.plot()._repr_png_().startswith(b"\x89PNG")
    assert not run.model.training and run.model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert f"{run.row.top1_pct:.2f}" in repr(run) and run.name in run._repr_html_()


def test_a_run_is_loaded_by_name_and_scored_again(run, folders):
    loaded = api.load_run(run.name, folders["runs"])
    assert loaded == run
    for asked in (loaded, run.name, run.folder):
        scores = api.evaluate(asked, runs=folders["runs"], **MACHINE)
        assert (scores.top1_pct, scores.num_images) == (run.row.top1_pct, 360)
    with pytest.raises(UserError, match="not a run folder"):
        api.load_run(run.name[:-1], folders["runs"])


def test_a_recipe_in_memory_trains_as_its_file_does_and_a_changed_one_is_a_deviation(run, folders):
    recipe = api.load_recipe("A3")
    assert api.train(recipe, "test_resnet", set=SHORT, progress=False, **MACHINE, **folders) == run
    changed = recipe.model_copy(update={"repeats": 2})
    assert [
        (change.path, change.after, change.origin)
        for change in api.plan(changed, "test_resnet").deviations[:1]
    ] == [("repeats", 2, "file")]


def test_training_prints_lines_unless_progress_is_off(capsys, folders, run):
    api.train("A3", "test_resnet", set=SHORT, progress=False, **MACHINE, **folders)
    assert capsys.readouterr().out == ""
    api.train("A3", "test_resnet", set=SHORT, **MACHINE, **folders)
    assert "already has a row" in capsys.readouterr().out


def test_an_interrupt_saves_the_run_leaves_no_handler_and_the_same_call_resumes_it(
    run, tmp_path, monkeypatch
):
    def interrupt_once(state, window, step, own=sys.modules["trainer.engine.train"].optimizer_step):
        if step == 13:
            signal.raise_signal(signal.SIGINT)
        return own(state, window, step)

    before = [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    ]
    folders = {"runs": tmp_path / "runs", "results": tmp_path / "results"}
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["trainer.engine.train"], "optimizer_step", interrupt_once)
        with pytest.raises(KeyboardInterrupt, match=str(tmp_path)):
            api.train("A3", "test_resnet", set=SHORT, progress=False, **MACHINE, **folders)
    assert [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    ] == before
    stopped = api.load_run(run.name, folders["runs"])
    assert stopped.row is None and not stopped.is_finished and "not ended" in repr(stopped)
    with pytest.raises(UserError, match="not finished"):
        api.evaluate(stopped, **MACHINE)

    resumed = api.train("A3", "test_resnet", set=SHORT, progress=False, **MACHINE, **folders)
    assert resumed.row.weights_sha256 == run.row.weights_sha256
    assert resumed.history.equals(run.history)


def test_a_second_interrupt_ends_the_call_at_once():
    with pytest.raises(KeyboardInterrupt), api.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.is_requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_trains_in_a_thread_and_leaves_generators_as_they_were(run, tmp_path):
    torch.manual_seed(7)
    expected, found = torch.get_rng_state(), []
    words = {"runs": tmp_path / "runs", "results": tmp_path / "results", **MACHINE}
    thread = threading.Thread(
        target=lambda: found.append(
            api.train("A3", "test_resnet", set=SHORT, progress=False, **words)
        )
    )
    thread.start()
    thread.join()
    assert found[0].row.weights_sha256 == run.row.weights_sha256
    assert torch.equal(torch.get_rng_state(), expected)


NOTEBOOK = [
    "import trainer as rsb",
    "recipe = rsb.load_recipe('A3')\nprint(recipe.to_yaml())",
    f"short, cpu = {SHORT}, {MACHINE}\nrsb.plan(recipe, 'test_resnet', set=short)",
    "run = rsb.train(recipe, 'test_resnet', set=short, **cpu)\nrun",
    "run.plot()",
    "rsb.evaluate(rsb.load_run(run.name), **cpu).top1_pct == run.row.top1_pct",
    "found = rsb.lr_find(recipe, 'test_resnet', set=short, seeds=2, steps=8, **cpu)\nfound",
    "found.plot()",
]


def test_a_notebook_runs_top_to_bottom_and_shows_plans_runs_and_plots(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in NOTEBOOK]
    )
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    shown = [
        {kind: text for output in cell.outputs for kind, text in output.get("data", {}).items()}
        for cell in notebook.cells
    ]
    printed = [
        "".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells
    ]
    assert "name: A3" in printed[1]
    assert "22 = 2 epochs x 11" in shown[2]["text/html"]
    assert "top-1" in printed[3] and "<table>" in shown[3]["text/html"]
    assert shown[5]["text/plain"] == "True"
    assert "suggest" in shown[6]["text/plain"] or "lr.peak" in shown[6]["text/plain"]
    for plot in (4, 7):
        assert shown[plot]["image/png"].startswith("iVBOR")
