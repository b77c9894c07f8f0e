"""An evaluation of several views is the mean that its source takes, and a run's other uses see the
same.
"""

import numpy as np
import pytest
import timm
import torch

from support.plans import small_plan
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.data.transforms import normalize
from trainer.engine.evaluate import evaluate
from trainer.tasks.views import viewed

SETTINGS = make_settings("cpu", workers="0")


def of_views(model, images, mirrored, px):
    """By NumPy's padding; half of the weight is on the image itself."""
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (px, px), (px, px)), mode="reflect")
    side = images.shape[2]
    moved = [padded[:, :, :side, :side], padded[:, :, 2 * px :, 2 * px :]]
    total = 0
    for weight, view in ((0.5, images.numpy()), (0.25, moved[0]), (0.25, moved[1])):
        both = (view, view[..., ::-1]) if mirrored else (view,)
        answers = [model(torch.from_numpy(each.copy())).double() for each in both]
        total = total + weight * sum(answers) / len(answers)
    return total


def test_moved_and_mirrored_images_have_their_weights():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for mirrored in (True, False):
            for px in (1, 3):
                torch.testing.assert_close(
                    viewed(model, images, mirrored, px).double(),
                    of_views(model, images, mirrored, px),
                    rtol=1e-4,
                    atol=1e-5,
                )
        assert torch.equal(viewed(model, images, False), model(images))


@pytest.mark.parametrize("mirrored", ["true", "false"])
def test_a_run_is_scored_by_them(mirrored):
    overrides = f"image.test_flip={mirrored} image.test_translate_px=2 loss.name=ce"
    plan = small_plan(overrides=overrides)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    data = open_data(plan.profile, None)
    logits, labels = [], []
    with torch.no_grad():
        for images, of_images in data.val_batches(plan, SETTINGS):
            images = normalize(images, plan.profile)
            logits.append(of_views(model, images, mirrored == "true", 2))
            labels.append(of_images)
    logits, labels = torch.cat(logits), torch.cat(labels)
    if mirrored == "true":  # the sum of both halves, as without moved images
        logits = 2 * logits
    scores = evaluate(plan, SETTINGS, model, data.val_batches(plan, SETTINGS))
    assert scores.num_top1 == (logits.argmax(1) == labels).sum()
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert scores.loss_nats == pytest.approx(expected, rel=1e-5)


def test_moves_out_of_sight_and_of_targets_with_places_are_refused():
    with pytest.raises(UserError) as error:
        small_plan(overrides="image.test_translate_px=32")
    assert "test_translate_px" in str(error.value)
    with pytest.raises(UserError) as error:
        small_plan("mae-vit-base", "vit_tiny_patch4_32", overrides="image.test_translate_px=1")
    assert error.value.path[:2] == ("image", "test_translate_px")
