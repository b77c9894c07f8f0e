"""RetinaNet on timm's models: torchvision's own, with its weights, its losses and its boxes."""

import math

import pytest
import timm
import torch
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.resnet import resnet50

from trainer.base.errors import PlanError
from trainer.components.losses import BinaryCrossEntropy, FocalLoss
from trainer.tasks.detection.retinanet import RetinaNet

SPEC = RetinaNet(
    channels=256, anchor_px=32, extra_from="p5", box_loss="l1", least_score=0.05, nms_iou=0.5,
    most_found=300,
)  # fmt: skip
FOCAL = FocalLoss(gamma=2.0, alpha=0.25, sum_classes=True)
NUM_CLASSES, PX = 5, 160


def renamed(name: str) -> str:
    """torchvision's name of a weight, of ours."""
    for ours, theirs in (("body.", "backbone.body."), ("pyramid.", "backbone.fpn.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


@pytest.fixture(scope="module")
def pair():
    """torchvision's model, in training mode, and ours with its weights."""
    torch.manual_seed(0)
    theirs = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=NUM_CLASSES, trainable_backbone_layers=5
    )
    theirs.backbone.body.load_state_dict(resnet50().state_dict(), strict=False)
    for logits in (
        theirs.head.classification_head.cls_logits,
        theirs.head.regression_head.bbox_reg,
    ):
        torch.nn.init.normal_(logits.weight, std=0.05)
    ours = SPEC.build(timm.create_model("resnet50"), NUM_CLASSES)
    known = theirs.state_dict()
    own = {name: known.get(renamed(name), value) for name, value in ours.state_dict().items()}
    assert set(map(renamed, own)) - {
        name for name in map(renamed, own) if "num_batches" in name
    } == set(known) - {name for name in known if "num_batches" in name}
    ours.load_state_dict(own)
    return theirs.eval(), ours.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, PX, PX, generator=torch.Generator().manual_seed(1))


BOXES = [
    torch.tensor([[8.0, 8, 60, 50, 1], [30, 90, 150, 155, 4], [100, 3, 120, 30, 1]]),
    torch.zeros(0, 5),
]


def padded(boxes):
    made = torch.full((len(boxes), 4, 5), -1.0)
    for row, own in zip(made, boxes, strict=True):
        row[: len(own)] = own
    return made


def theirs_of(theirs, images):
    features = list(theirs.backbone(images).values())
    anchors = theirs.anchor_generator(ImageList(images, [(PX, PX)] * len(images)), features)
    return theirs.head(features), anchors, features


@torch.no_grad()
def test_outputs_with_the_same_weights_are_the_same(pair, images):
    theirs, ours = pair
    expected, _, _ = theirs_of(theirs, images)
    found = ours(images)
    assert found.shape == (2, 9 * (20**2 + 10**2 + 5**2 + 3**2 + 2**2), NUM_CLASSES + 4)
    torch.testing.assert_close(found[..., :-4], expected["cls_logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[..., -4:], expected["bbox_regression"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1", "giou"])
def test_the_loss_is_the_same(pair, images, box_loss):
    theirs, ours = pair
    outputs, anchors, _ = theirs_of(theirs, images)
    targets = [{"boxes": own[:, :4], "labels": own[:, 4].long()} for own in BOXES]
    theirs.head.regression_head._loss_type = box_loss
    expected = sum(theirs.compute_loss(targets, outputs, anchors).values())
    spec = SPEC.model_copy(update={"box_loss": box_loss})
    found = spec.loss(ours(images), padded(BOXES), PX, FOCAL)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # the images one by one, as accumulated micro-batches of equal size
    each = [spec.loss(ours(images[i : i + 1]), padded(BOXES)[i : i + 1], PX, FOCAL) for i in (0, 1)]
    torch.testing.assert_close(torch.stack(each).mean(), found, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_is_found_is_the_same(pair, images):
    theirs, ours = pair
    outputs, anchors, features = theirs_of(theirs, images)
    numbers = [9 * one.shape[2] * one.shape[3] for one in features]
    split = {name: list(one.split(numbers, dim=1)) for name, one in outputs.items()}
    sizes = [(PX, PX), (100, PX)]  # height, width of what is no padding
    expected = theirs.postprocess_detections(
        split, [list(one.split(numbers)) for one in anchors], sizes
    )
    found = SPEC.found(ours(images), PX, torch.tensor([[PX, PX], [PX, 100.0]]))
    assert found.shape == (2, 300, 6)
    for rows, want in zip(found, expected, strict=True):
        rows = rows[rows[:, 5] >= 0]
        assert len(rows) == len(want["scores"]) > 20
        torch.testing.assert_close(rows[:, 4], want["scores"], rtol=1e-4, atol=1e-5)
        order = [tuple(map(round, row)) for row in rows[:, :4].tolist()]
        assert sorted(order) == sorted(tuple(map(round, row)) for row in want["boxes"].tolist())
        assert sorted(rows[:, 5].tolist()) == sorted(want["labels"].tolist())
    assert found[1, :, 3].max() <= 100


def test_cross_entropy_is_focal_loss_without_its_focus(pair, images):
    with torch.no_grad():
        outputs = pair[1](images)
    plain = SPEC.loss(outputs, padded(BOXES), PX, BinaryCrossEntropy(sum_classes=True))
    unfocused = SPEC.loss(outputs, padded(BOXES), PX, FocalLoss(gamma=0.0, sum_classes=True))
    torch.testing.assert_close(plain, unfocused, rtol=1e-5, atol=1e-6)


def test_the_constant_level_is_below_any_constant_answer_and_near_the_best(pair):
    boxes = padded([BOXES[0], BOXES[0][:2]])
    (parts,) = SPEC.constant_parts(boxes, PX, NUM_CLASSES)
    anchors = 9 * (20**2 + 10**2 + 5**2 + 3**2 + 2**2)
    best = parts.shares.clamp(1e-9).logit().float()
    loss = BinaryCrossEntropy(sum_classes=True)

    def of(logits, coded):
        outputs = torch.cat([logits, coded]).expand(2, anchors, -1)
        return SPEC.loss(outputs, boxes, PX, loss).item()

    level = parts.num_asked * loss(best[None].double(), parts.shares[None]).item() + parts.box_loss
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = best + torch.randn(NUM_CLASSES, generator=draw) * 0.3
        assert of(other, torch.randn(4, generator=draw) * 0.1) > level * 0.98
    assert level < of(best, torch.zeros(4)) < level * 1.5


@pytest.mark.parametrize(
    "model", ["convnext_atto", "tf_efficientnet_lite0", "pvt_v2_b0", "resnet10t"]
)
def test_other_backbones_have_the_same_anchors(model):
    spec = SPEC.model_copy(update={"channels": 16, "norm_groups": 4})
    ours = spec.build(timm.create_model(model), NUM_CLASSES)
    outputs = ours(torch.randn(1, 3, 64, 64))
    assert outputs.shape == (1, 9 * (64 + 16 + 4 + 1 + 1), NUM_CLASSES + 4)
    loss = spec.loss(outputs, padded(BOXES[:1]), 64, FOCAL)
    loss.backward()
    assert all(weight.grad is not None for weight in ours.parameters())
    # rare answers at first: the paper's prior of 0.01
    assert outputs[..., :NUM_CLASSES].sigmoid().mean().item() == pytest.approx(0.01, rel=0.2)
    assert math.isfinite(loss.item())


def test_p6_from_the_backbone():
    spec = SPEC.model_copy(update={"extra_from": "c5", "channels": 16})
    ours = spec.build(timm.create_model("resnet10t"), 3)
    assert ours.pyramid.extra_blocks.p6.in_channels == 512
    assert ours(torch.randn(1, 3, 64, 64)).shape[1] == 9 * (64 + 16 + 4 + 1 + 1)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "mixer_s16_224"])
def test_a_model_of_one_stride_is_refused(model):
    with pytest.raises(PlanError, match="strides 8, 16, 32"):
        SPEC.build(timm.create_model(model), 3)


def test_a_side_that_no_anchor_fits_is_refused():
    SPEC.check_side("train_px", 320)
    with pytest.raises(PlanError, match="train_px 300") as error:
        SPEC.check_side("train_px", 300)
    assert error.value.fix == {"image.train_px": 288}
