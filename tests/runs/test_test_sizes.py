"""A finished model scored at further image sizes: beside its result, and nothing else is moved."""

import csv
import io

import pytest
import timm
import torch
from rich.console import Console

from support.commands import rsb
from support.plans import small_set
from support.ranked import on_ranks, size_scores
from support.tabled import cell, table_of
from trainer.base.errors import UserError
from trainer.base.exits import EXIT_DONE, EXIT_STOPPED
from trainer.base.settings import make_settings, sizes_of
from trainer.base.signals import Stopped, StopRequest
from trainer.data.dataset import open_data
from trainer.data.evaluation import EvaluationStream
from trainer.data.transforms import normalize
from trainer.engine import train
from trainer.engine.state import TrainingState
from trainer.models.sizes import at_size
from trainer.recipe.plan import PlanError
from trainer.report.formats import as_markdown
from trainer.report.html import as_html
from trainer.report.test_sizes import size_table
from trainer.report.view import make_view
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.results import SizeScore
from trainer.runs.run_folder import open_model

JOB = Job("A2", "test_resnet", overrides=small_set("batch.images=96 batch.norm_images=48"))


def go(folder, job=JOB, test_px="64 48 32", **machine):
    """(exit code, row, what was printed)."""
    plan = plan_of(job)
    places = {"runs": folder / "runs", "results": folder / "results"}
    settings = make_settings("cpu", **{"workers": "0", "test_px": test_px, **places, **machine})
    out = Console(file=io.StringIO(), width=200)
    with StopRequest() as stop:
        code, row = run_job(job, plan, settings, open_data(plan.profile, None), out, stop)
    return code, row, out.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    return folder, go(folder)[1]


def test_each_size_is_scored_as_a_loop_over_its_images_scores_it(finished):
    folder, row = finished
    assert [scores.test_px for scores in row.test_sizes] == [48, 64]  # 32 is the result's own
    plan = plan_of(JOB)
    model, image = open_model(folder / "runs" / row.run), plan.recipe.image
    for found in row.test_sizes:
        stream = EvaluationStream(
            open_data(plan.profile, None).val, found.test_px, image.test_crop_share,
            image.test_interpolation, 40,
        )  # fmt: skip
        num_top1 = 0
        for number in range(len(stream)):
            images, labels = stream[number]
            assert images.shape[2:] == (found.test_px, found.test_px)
            with torch.no_grad():
                answers = model(normalize(images, plan.profile)).argmax(1)
            num_top1 += int((answers == labels).sum())
        assert found.top1_pct == 100 * num_top1 / 360


def test_the_run_is_the_one_without_the_sizes(finished, tmp_path):
    _, row = finished
    _, plain, _ = go(tmp_path, test_px="")
    same = ("run", "weights_sha256", "top1_pct", "loss_nats", "num_top1_by_epoch")
    assert [getattr(plain, name) for name in same] == [getattr(row, name) for name in same]
    assert plain.test_sizes == ()
    _, found, printed = go(tmp_path, test_px="32 48")
    assert found == plain and f"eval run={plain.run} test_px=48" in printed


def test_loader_processes_give_the_same_scores(finished, tmp_path):
    assert go(tmp_path, workers="2")[1].test_sizes == finished[1].test_sizes


def test_ranks_give_the_same_scores():
    (alone,) = on_ranks(size_scores, 1, "48 64")
    assert set(alone) == {48, 64}
    for found in on_ranks(size_scores, 2, "48 64"):
        for px, scores in found.items():
            assert scores == pytest.approx(alone[px], rel=1e-9)


def test_a_stop_between_two_sizes_loses_nothing(finished, tmp_path, monkeypatch):
    evaluate, calls = train.evaluate, []

    def stopping(*given, **named):
        calls.append(given)
        if len(calls) == 2:
            raise Stopped("SIGTERM")
        return evaluate(*given, **named)

    monkeypatch.setattr(train, "evaluate", stopping)
    assert go(tmp_path)[:2] == (EXIT_STOPPED, None)
    code, row, _ = go(tmp_path)
    assert code == EXIT_DONE and row.test_sizes == finished[1].test_sizes
    assert row.weights_sha256 == finished[1].weights_sha256


@pytest.mark.parametrize("text", ["0", "32 x", "4096", "32.5", "-64"])
def test_what_is_no_size_is_refused_in_one_line(text):
    with pytest.raises(UserError, match="test_px=") as error:
        sizes_of(text)
    assert "\n" not in str(error.value) and error.value.hint
    done = rsb("train", "--recipe", "A2", "--test-px", text)
    assert done.exit_code == 2 and "test_px=" in done.stderr


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_patch16_224", {"dynamic_img_size": True}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    ],
)
def test_position_embeddings_are_interpolated_as_timms_dynamic_sizes_are(name, options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, img_size=64).eval()
    theirs = timm.create_model(name, num_classes=7, img_size=64, **options).eval()
    theirs.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 96, 96)
    resized = at_size(model, name, 3, 96)
    with torch.no_grad():
        torch.testing.assert_close(resized(images), theirs(images), rtol=1e-5, atol=1e-6)
    assert at_size(model, name, 3, 64) is model and model.pos_embed.shape[1] == 17


def test_swin_is_scored_at_another_size_as_timm_sets_it():
    name = "swin_tiny_patch4_window7_224"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    theirs = timm.create_model(name, num_classes=7).eval()
    theirs.load_state_dict(model.state_dict())
    theirs.set_input_size((256, 256))
    images = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        assert torch.equal(at_size(model, name, 3, 256)(images), theirs(images))


def test_a_transformers_run_is_scored_at_other_sizes():
    plan = plan_of(Job("A2", "deit_tiny_patch16_224", overrides=small_set("image.test_px=32")))
    state = TrainingState(plan, make_settings("cpu", workers="0", test_px="32 48"))
    larger = state.model_at(48)
    assert state.model_at(32) is state.model and larger is not state.model
    assert larger.pos_embed.shape[1] == 10 and state.model.pos_embed.shape[1] == 5
    assert torch.equal(larger.head.weight, state.model.head.weight)


def test_a_model_of_one_size_is_refused_before_the_first_step():
    plan = plan_of(Job("A2", "levit_128s", overrides=small_set("image.test_px=32")))
    with pytest.raises(PlanError, match=r"test_px=64: levit_128s") as error:
        TrainingState(plan, make_settings("cpu", workers="0", test_px="64"))
    assert "\n" not in str(error.value)


def sized(top1_pct):
    return {"test_sizes": (SizeScore(test_px=64, top1_pct=top1_pct, top5_pct=99.0, loss_nats=1.0),)}


def test_a_table_shows_them_apart_from_the_results():
    plain, scored = cell("plain", is_base=True), cell("scored")
    table = table_of({plain: {0: 90.0}, scored: {0: 91.0, 1: 92.0}}, seeds=(0, 1))
    assert size_table(table) is None
    assert "other image sizes" not in as_markdown(make_view(table)) + as_html(table, {})
    recipe = {"resolved_recipe": {"image": {"test_px": 32}}}
    table = table_of(
        {plain: {0: 90.0, 1: 90.0}, scored: {0: 91.0, 1: 92.0}},
        seeds=(0, 1),
        scored=sized(93.0) | recipe,
    )
    found = size_table(table)
    assert found.sizes == (32, 64) and [line.cell for line in found.lines] == ["scored"]
    assert found.lines[0].texts == ("91.50 ± 0.71 *", "93.00 ± 0.00")
    for text in (as_markdown(make_view(table)), as_html(table, {})):
        assert "At other image sizes" in text and "93.00 ± 0.00" in text


def test_predict_answers_at_each_size_in_a_file_of_its_own(finished, tmp_path):
    folder, row = finished
    digits = open_data(plan_of(JOB).profile, None).val
    (tmp_path / "images").mkdir()
    for number in range(3):
        digits.read(number).save(tmp_path / "images" / f"{number}.png")
    words = [
        "predict", "--run", row.run, "--runs", folder / "runs", "--images", tmp_path / "images",
        "--out", tmp_path / "a.csv", "--test-px", "32 64", "--workers", "0", "--no-sheet",
    ]  # fmt: skip
    assert rsb(*words).exit_code == 0
    paths = [tmp_path / f"a-{px}px.csv" for px in (32, 64)]
    answers = [list(csv.DictReader(path.read_text().splitlines())) for path in paths]
    assert len(answers[0]) == len(answers[1]) == 3
    surest = [[line["probability_1"] for line in each] for each in answers]
    assert surest[0] != surest[1]
    assert rsb(*words).exit_code == 2  # they are there already
    paths[1].rename(tmp_path / "a-64px.csv.part")  # a command that was stopped at the second size
    paths[0].write_text("kept")
    (tmp_path / "a-64px.csv.part").write_text("")
    assert rsb(*words).exit_code == 0 and paths[0].read_text() == "kept"
    assert list(csv.DictReader(paths[1].read_text().splitlines())) == answers[1]
