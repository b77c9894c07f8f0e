"""DETA beside plain loops in float64: attention, which anchor answers for which box, the losses,
the proposals and what is found."""

import math

import numpy as np
import pytest
import timm
import torch

from trainer.base.errors import PlanError
from trainer.components.losses import BinaryCrossEntropy, FocalLoss
from trainer.tasks.constant import lowest_constant_loss
from trainer.tasks.detection.assignment import assigned, owners
from trainer.tasks.detection.deformable import DeformableAttention, sines
from trainer.tasks.detection.deta import Deta
from trainer.tasks.detection.deta_model import anchors_of, level_sides, proposals

SPEC = Deta(
    channels=16, num_levels=4, num_heads=2, num_points=2, hidden_channels=32, encoder_layers=1,
    decoder_layers=2, norm_groups=4, num_queries=12, most_per_box=3, l1_weight=5.0,
    giou_weight=2.0, nms_iou=0.7, most_found=30,
)  # fmt: skip
FOCAL = FocalLoss(gamma=2.0, alpha=0.25, sum_classes=True)
NUM_CLASSES, PX = 3, 96
NUM_ANCHORS = 12**2 + 6**2 + 3**2 + 2**2
BOXES = [
    [
        [8.3, 7.1, 41, 52, 1],
        [33.2, 51.7, 88, 95, 2],
        [69, 3.3, 91.1, 31, 1],
        [10.2, 59.1, 13, 63, 0],
    ],
    [],
    [[20.3, 25.1, 70.7, 61.2, 0]],
]  # of which no two anchors overlap any as much


def padded(boxes):
    made = torch.full((len(boxes), 5, 5), -1.0)
    for row, own in zip(made, boxes, strict=True):
        if own:
            row[: len(own)] = torch.tensor(own)
    return made


# ---- the references


def corners_of(box):
    x, y, width, height = box
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def overlap(a, b):
    """(IoU, GIoU) of two boxes (left, top, right, bottom)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(one[2] - one[0]) * (one[3] - one[1]) for one in (a, b)]
    both = sum(areas) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    if not both:
        return 0.0, 0.0
    return width * height / both, width * height / both - (hull - both) / hull


def pairs_by_loops(boxes, candidates, least, most):
    """The set of (candidate, box): of detectron2's matcher and DETA's choice of the best."""
    if not boxes:
        return set()
    ious = np.array([[overlap(box, one)[0] for one in candidates] for box in boxes])
    own = ious.argmax(0)
    is_for = ious.max(0) >= least
    for row in ious:
        is_for |= row == row.max()
    is_for &= ious.max(0) > 0
    found = set()
    for box, row in enumerate(ious):
        number = min(most, int((is_for & (own == box)).sum()))
        found |= {(int(one), box) for one in np.argsort(-row)[:number]}
    return found


def focal(logit, target):
    share = 1 / (1 + math.exp(-logit))
    if target:
        return -0.25 * (1 - share) ** 2 * math.log(share)
    return -0.75 * share**2 * math.log(1 - share)


def loss_by_loops(logits, found, pairs, boxes, labels):
    """The sum for one image: logits [N][K], found [N] (x, y, width, height), boxes likewise."""
    classes = {one: labels[box] for one, box in sorted(pairs, key=lambda pair: pair[1])}
    total = sum(
        focal(value, classes.get(row) == label)
        for row, own in enumerate(logits)
        for label, value in enumerate(own)
    )
    for one, box in pairs:
        total += 5.0 * sum(abs(a - b) for a, b in zip(found[one], boxes[box], strict=True))
        total += 2.0 * (1 - overlap(corners_of(found[one]), corners_of(boxes[box]))[1])
    return total


def anchors_by_loops(px):
    made, side = [], px // 8
    for level in range(4):
        for y in range(side):
            for x in range(side):
                size = 0.05 * 2**level
                box = (x + 0.5) / side, (y + 0.5) / side, size, size
                if all(0.01 < number < 0.99 for number in box):
                    made.append((*box, level))
        side = -(-side // 2)
    return made


def expected_loss(outputs, boxes):
    anchors = [box[:4] for box in anchors_by_loops(PX)]
    total = 0.0
    for rows, own in zip(outputs.double().tolist(), boxes, strict=True):
        shares = [
            ((a + c) / 2 / PX, (b + d) / 2 / PX, (c - a) / PX, (d - b) / PX)
            for a, b, c, d, _ in own
        ]
        labels, wanted = [int(box[4]) for box in own], [corners_of(box) for box in shares]
        pairs = pairs_by_loops(wanted, [corners_of(box) for box in anchors], 0.7, 3)
        first = rows[: len(anchors)]
        found = [row[-4:] for row in first]
        image = loss_by_loops([row[:1] for row in first], found, pairs, shares, [0] * len(own))
        rest = rows[len(anchors) :]
        proposed = [corners_of(row[-4:]) for row in rest[:12]]
        pairs = pairs_by_loops(wanted, proposed, 0.6, 3)
        for layer in (rest[12:24], rest[24:36]):
            found, logits = [row[-4:] for row in layer], [row[:-4] for row in layer]
            image += loss_by_loops(logits, found, pairs, shares, labels)
        total += image / max(1, len(own))
    return total / len(boxes)


def sampled(values, x, y):
    """Bilinear, of values [h][w][d], at (x, y) in shares; 0 beyond the edge."""
    height, width, depth = values.shape
    x, y = x * width - 0.5, y * height - 0.5
    found = np.zeros(depth)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                found += (1 - abs(y - row)) * (1 - abs(x - column)) * values[row, column]
    return found


# ---- attention


@pytest.mark.parametrize("numbers", [2, 4])
def test_attention_is_the_weighted_mean_of_what_its_points_see(numbers):
    draw = torch.Generator().manual_seed(numbers)
    sides, heads, points = [(5, 4), (3, 2)], 2, 3
    layer = DeformableAttention(8, heads, len(sides), points)
    layer.initialize()
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=draw)
    queries, memory = (torch.randn(2, n, 8, generator=draw) for n in (3, 26))
    places = torch.rand(2, 3, numbers, generator=draw)
    with torch.no_grad():
        found = layer(queries, places, memory, sides)

    own = {name: one.double().numpy() for name, one in layer.state_dict().items()}
    expected = np.zeros((2, 3, 8))
    for b in range(2):
        values = memory[b].double().numpy() @ own["values.weight"].T + own["values.bias"]
        maps = [values[:20].reshape(5, 4, 8), values[20:].reshape(3, 2, 8)]
        for q in range(3):
            query = queries[b, q].double().numpy()
            offsets = (own["offsets.weight"] @ query + own["offsets.bias"]).reshape(2, 2, 3, 2)
            weights = (own["weights.weight"] @ query + own["weights.bias"]).reshape(2, 6)
            weights = np.exp(weights) / np.exp(weights).sum(1, keepdims=True)
            x, y, *size = places[b, q].double().tolist()
            seen = np.zeros(8)
            for h in range(heads):
                part = slice(4 * h, 4 * h + 4)
                for level, one in enumerate(maps):
                    for point in range(points):
                        across, down = offsets[h, level, point]
                        if size:
                            across, down = across * size[0] / 6, down * size[1] / 6
                        else:
                            across, down = across / one.shape[1], down / one.shape[0]
                        weight = weights[h, level * points + point]
                        seen[part] += weight * sampled(one[:, :, part], x + across, y + down)
            expected[b, q] = own["out.weight"] @ seen + own["out.bias"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_at_first_heads_look_around_them():
    layer = DeformableAttention(8, 4, 2, 3)
    layer.initialize()
    offsets = layer.offsets.bias.detach().reshape(4, 2, 3, 2)
    ray = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for point in range(3):
        expected = (ray * (point + 1))[:, None].expand(4, 2, 2)
        torch.testing.assert_close(offsets[:, :, point], expected, rtol=0, atol=1e-6)


def test_sines_have_the_periods_of_the_paper():
    found = sines(torch.tensor([[0.3, 0.8]]), 6)
    expected = [
        wave(2 * math.pi * share / 10000 ** (pair / 3))
        for share in (0.3, 0.8)
        for pair in range(3)
        for wave in (math.sin, math.cos)
    ]
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5, atol=1e-6)


# ---- which anchor answers for which box


def random_boxes(draw, number, side=1.0):
    middle, size = torch.rand(number, 2, generator=draw), torch.rand(number, 2, generator=draw)
    size = side * (0.05 + 0.5 * size)
    return torch.cat([middle - size / 2, middle + size / 2], 1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("least", "most"), [(0.7, 4), (0.6, 1), (0.3, 40)])
def test_pairs_are_those_of_the_loops(seed, least, most):
    draw = torch.Generator().manual_seed(seed)
    boxes, candidates = random_boxes(draw, 1 + seed), random_boxes(draw, 60)
    near = boxes.repeat(5, 1) + 0.02 * torch.randn(5 * len(boxes), 4, generator=draw)
    candidates = torch.cat([candidates, near])
    boxes[0] += 5.0 * (seed == 3)  # one that nothing touches
    found = assigned(boxes, candidates, least, most)
    pairs = set(zip(*(one.tolist() for one in found), strict=True))
    assert len(pairs) == len(found.boxes)
    assert pairs == pairs_by_loops(boxes.tolist(), candidates.tolist(), least, most)
    assert (0 in found.boxes.tolist()) == (seed != 3)
    counts = torch.bincount(found.boxes)
    assert counts.max() <= most


def test_without_boxes_there_are_no_pairs_and_fewer_candidates_than_wanted_are_enough():
    candidates = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0.5, 1]])
    assert not len(assigned(torch.zeros(0, 4), candidates, 0.6, 4).boxes)
    found = assigned(torch.tensor([[0.0, 0, 1, 0.9]]), candidates, 0.4, 4)
    assert sorted(found.candidates.tolist()) == [0, 1]


def test_a_candidate_of_two_boxes_has_the_class_of_the_last():
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0.86, 1]])
    candidates = torch.tensor([[0.0, 0, 0.95, 1], [0, 0, 0.65, 1]])
    found = assigned(boxes, candidates, 0.7, 4)
    assert set(zip(*(one.tolist() for one in found), strict=True)) == {(0, 0), (0, 1)}
    assert owners(found, 2).tolist() == [1, -1]


# ---- losses


def random_outputs(seed, scale=1.0):
    """Of each image, with proposals that are near some boxes."""
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.randn(3, NUM_ANCHORS + 36, NUM_CLASSES + 4, generator=draw) * scale
    outputs[:, :, -4:] = outputs[:, :, -4:].sigmoid()
    for rows, own in zip(outputs, BOXES, strict=True):
        for number, (a, b, c, d, _) in enumerate(own):
            near = torch.tensor([(a + c) / 2, (b + d) / 2, c - a, d - b]) / PX
            first = NUM_ANCHORS + 3 * number
            noise = 1 + 0.1 * torch.randn(3, 4, generator=draw)
            rows[first : first + 3, -4:] = near * noise
    return outputs


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_is_that_of_the_loops(seed):
    outputs = random_outputs(seed)
    found = SPEC.loss(outputs, padded(BOXES), PX, FOCAL)
    assert found.item() == pytest.approx(expected_loss(outputs, BOXES), rel=1e-5)
    each = [SPEC.loss(outputs[i : i + 1], padded(BOXES)[i : i + 1], PX, FOCAL) for i in range(3)]
    torch.testing.assert_close(torch.stack(each).mean(), found, rtol=1e-6, atol=0)


def test_anchors_are_those_of_the_loops():
    for px in (PX, 32, 1088):
        anchors = anchors_of(level_sides(px, 4), torch.device("cpu"))
        expected = np.array(anchors_by_loops(px))
        np.testing.assert_allclose(anchors.boxes.numpy(), expected[:, :4], rtol=1e-5)
        assert anchors.levels.tolist() == expected[:, 4].astype(int).tolist()
    pixels = sum(height * width for height, width in level_sides(1088, 4))
    assert len(expected) < pixels and anchors.pixels.max() < pixels


def test_the_constant_level_is_that_of_the_best_constant_logits():
    spec = SPEC.model_copy(update={"num_queries": 1000})
    anchors = anchors_of(level_sides(PX, 4), torch.device("cpu")).boxes
    loss, boxes = BinaryCrossEntropy(sum_classes=True), padded(BOXES)
    parts = spec.constant_parts(boxes, PX, NUM_CLASSES)
    level = sum(
        one.num_asked * lowest_constant_loss(loss, one.shares) + one.box_loss for one in parts
    )

    def of(first, second):
        rows = torch.zeros(3, 4 * NUM_ANCHORS, NUM_CLASSES + 4)
        rows[:, :, -4:] = anchors.repeat(4, 1)
        rows[:, :NUM_ANCHORS, :1], rows[:, 2 * NUM_ANCHORS :, :-4] = first, second
        return spec.loss(rows, boxes, PX, loss).item()

    best = [one.shares.clamp(1e-9).logit().float() for one in parts]
    assert level == pytest.approx(of(*best), rel=1e-4)
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        assert of(*(one + torch.randn(len(one), generator=draw) for one in best)) > level


# ---- proposals and answers


def nms_by_loops(boxes, scores, most_iou):
    kept = []
    for one in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(overlap(boxes[one], boxes[other])[0] <= most_iou for other in kept):
            kept.append(one)
    return kept


@pytest.mark.parametrize("wanted", [8, 40, 150])
def test_proposals_are_the_best_of_each_level(wanted):
    draw = torch.Generator().manual_seed(wanted)
    levels = torch.arange(4).repeat_interleave(torch.tensor([100, 40, 15, 5]))
    boxes = torch.rand(160, 4, generator=draw) * 0.5 + 0.25
    boxes[1:100:2] = boxes[0:100:2] + 0.001  # half of the first level are the same again
    logits = torch.randn(160, generator=draw)
    found = proposals(logits, boxes, levels, wanted)
    assert len(set(found.tolist())) == wanted
    corners = [np.clip(corners_of(box), 0, 1) for box in boxes.tolist()]
    kept = []
    for level in range(4):
        own = [i for i in range(160) if levels[i] == level]
        best = nms_by_loops([corners[i] for i in own], logits[own].tolist(), 0.9)
        kept.append([own[i] for i in best])
    first = {i for own in kept for i in own[: wanted // 4]}
    rest = sorted((i for own in kept for i in own if i not in first), key=lambda i: -logits[i])
    dropped = set(range(160)) - first - set(rest)
    lost = sorted(dropped, key=lambda i: -logits[i])
    assert set(found.tolist()) == set([*first, *rest, *lost][:wanted])
    assert set([*first][:wanted]) <= set(found.tolist())


def test_what_is_found_are_the_answers_of_the_last_layer_that_suppression_keeps():
    outputs = random_outputs(5, scale=2.0)
    last = outputs[:, -12:]
    last[:, 6:] = last[:, :6] + 0.002  # each twice, nearly the same
    seen = torch.tensor([[96.0, 96], [96, 50], [70, 96]])
    found = SPEC.found(outputs, PX, seen)
    assert found.shape == (3, 30, 6)
    for rows, own, (width, height) in zip(found, last.double(), seen.tolist(), strict=True):
        expected = []
        for label in range(NUM_CLASSES):
            scores = own[:, label].sigmoid().tolist()
            boxes = np.array([corners_of(row[-4:].tolist()) for row in own]) * PX
            boxes[:, [0, 2]] = boxes[:, [0, 2]].clip(0, width)
            boxes[:, [1, 3]] = boxes[:, [1, 3]].clip(0, height)
            kept = nms_by_loops(boxes.tolist(), scores, 0.7)
            expected += [(scores[i], *boxes[i], label) for i in kept]
        expected.sort(reverse=True)
        rows = rows[rows[:, 5] >= 0].double().numpy()
        assert len(rows) == min(30, len(expected)) < 36
        np.testing.assert_allclose(rows[:, 4], [one[0] for one in expected[:30]], rtol=1e-5)
        np.testing.assert_allclose(
            rows[:, :4], [one[1:5] for one in expected[:30]], rtol=1e-4, atol=1e-3
        )
        assert rows[:, 5].tolist() == [one[5] for one in expected[:30]]


# ---- the model


@pytest.mark.parametrize("model", ["resnet10t", "convnext_atto", "pvt_v2_b0"])
def test_on_a_backbone_every_weight_learns_and_at_first_anchors_stay(model):
    torch.manual_seed(0)
    made = SPEC.build(timm.create_model(model), NUM_CLASSES)
    outputs = made(torch.randn(2, 3, PX, PX))
    assert outputs.shape == (2, NUM_ANCHORS + 36, NUM_CLASSES + 4)
    anchors = torch.tensor(anchors_by_loops(PX))[:, :4]
    for rows in outputs.detach():
        torch.testing.assert_close(rows[:NUM_ANCHORS, -4:], anchors, rtol=1e-4, atol=1e-5)
        proposed = rows[NUM_ANCHORS : NUM_ANCHORS + 12, -4:]
        torch.testing.assert_close(rows[-12:, -4:], proposed, rtol=1e-4, atol=1e-5)
    shares = torch.cat([outputs[:, :NUM_ANCHORS, 0].flatten(), outputs[:, -24:, :-4].flatten()])
    assert shares.sigmoid().median().item() == pytest.approx(0.01, rel=0.9)
    with torch.no_grad():  # what moves no box has no gradient to the layers before
        for name, weight in made.named_parameters():
            if "box" in name:
                weight += 0.05 * torch.randn(weight.shape)
    loss = SPEC.loss(made(torch.randn(2, 3, PX, PX)), padded(BOXES[::2]), PX, FOCAL)
    loss.backward()
    assert math.isfinite(loss.item())
    lost = [name for name, weight in made.named_parameters() if weight.grad is None]
    assert not lost


def test_an_image_has_the_same_answers_alone_and_with_others():
    torch.manual_seed(0)
    made = SPEC.build(timm.create_model("convnext_atto"), NUM_CLASSES).eval()
    images = torch.randn(3, 3, PX, PX)
    with torch.no_grad():
        together, alone = made(images), made(images[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_of_a_small_image_all_anchors_are_proposals():
    spec = SPEC.model_copy(update={"num_queries": 50})
    made = spec.build(timm.create_model("resnet10t"), NUM_CLASSES)
    number = 16 + 4 + 1 + 1
    outputs = made(torch.randn(2, 3, 32, 32))
    assert outputs.shape[1] == 4 * number
    assert spec.found(outputs.detach(), 32, torch.tensor([[32.0, 32]] * 2)).shape == (2, 30, 6)
    assert math.isfinite(spec.loss(outputs, padded(BOXES[1:2] * 2), 32, FOCAL).item())


def test_a_model_of_one_stride_is_refused():
    with pytest.raises(PlanError, match="strides 8, 16, 32"):
        SPEC.build(timm.create_model("vit_tiny_patch16_224"), 3)


def test_a_side_that_no_map_fits_is_refused():
    SPEC.check_side("train_px", 320)
    with pytest.raises(PlanError, match="train_px 300") as error:
        SPEC.check_side("train_px", 300)
    assert error.value.fix == {"image.train_px": 288}


@pytest.mark.parametrize("wrong", [{"num_heads": 3}, {"norm_groups": 5}, {"channels": 18}])
def test_channels_that_do_not_divide_are_refused(wrong):
    with pytest.raises(ValueError, match="channels"):
        Deta.model_validate(SPEC.model_dump() | wrong)
