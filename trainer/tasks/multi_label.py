"""Several classes, or none, for each image: a table of yes and no, and mean average precision."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from trainer.base.devices import sum_dtype
from trainer.base.errors import DataError, PlanError, UserError
from trainer.base.names import plain_text
from trainer.base.settings import Settings
from trainer.components.task import Moved, TaskSection
from trainer.data.datasets.layouts import Layout, TargetSet
from trainer.data.decode import BadImage, Planes, read_image
from trainer.data.evaluation import EvaluationStream, whole_image, whole_images
from trainer.data.transforms import autocast, scored_inputs
from trainer.recipe.plan import Plan
from trainer.tasks.base import Prediction, Scores, Shown, Task, count_of
from trainer.tasks.classification import Classification
from trainer.tasks.constant import lowest_constant_loss
from trainer.tasks.views import viewed

_IMAGE = "image"  # the first column of a table
_MOST_ROWS = 8192  # of targets, for a loss that has to be told each
_NUM_TOLD, _TEXT_PX, _LINE_PX = 5, 180, 14  # classes beside an image, and their room
_OF_ONE_CLASS = ("ce", "dice", "mse")  # losses whose answers are not one yes or no for each class


# ---- data


@dataclass(frozen=True)
class LabelledSet(TargetSet):
    """Images with a row of a table each. images: names below root, in the table's order. table:
    [N, K] uint8, 1 where an image shows a class.
    """

    root: Path
    split: str
    images: tuple[str, ...]
    table: np.ndarray
    classes: tuple[str, ...]
    num_channels: int = 3
    stand_in: str = ""

    @property
    def num_images(self) -> int:  # type: ignore[override]
        """Images of the split, each with a line of the table."""
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """sha256 (hex) over the table, the files' names and their sizes."""
        digest = hashlib.sha256(repr((self.classes, self.images, self.num_channels)).encode())
        digest.update(self.table.tobytes())
        sizes = [path.stat().st_size if path.is_file() else 0 for path in self.files()[1:]]
        digest.update(repr(sizes).encode())
        return digest.hexdigest()

    def path(self, i: int) -> Path:
        return self.root / self.images[i]

    def read(self, i: int) -> Image.Image | Planes:
        return read_image(self.path(i), self.num_channels)

    def read_target(self, i: int) -> np.ndarray:
        return self.table[i]

    def files(self) -> Sequence[Path]:
        return [_table(self.root, self.split), *(self.root / name for name in self.images)]

    def look_at_target(self, i: int, image: Image.Image | Planes) -> tuple[np.ndarray, tuple]:
        return self.table[i].astype(np.int64), ()


def _table(root: Path, split: str) -> Path:
    return root / f"{split}.csv"


class LabelTables(Layout):
    """train.csv and val.csv: a column `image` of files below the folder, and one for each class, 1
    where it is in the image and 0 where not.
    """

    name: ClassVar[str] = "label_tables"
    task: ClassVar[str] = "multi_label"

    def holds(self, root: Path) -> bool:
        try:
            with open(_table(root, "train"), encoding="utf-8", newline="") as file:
                header = next(csv.reader(file), [])
        except (OSError, UnicodeDecodeError, csv.Error):
            return False
        return header[:1] == [_IMAGE] and len(header) > 2

    def find(self, root: Path, split: str, num_channels: int) -> LabelledSet:
        path = _table(root, split)
        header, *rows = _rows(path)
        if header[:1] != [_IMAGE] or len(header) < 3 or len(set(header)) < len(header) or not rows:
            columns = f"a header `{_IMAGE},<class>,<class>,...`, and a row for each image"
            raise DataError(f"{path}: {len(rows)} rows under {header[:3]}", f"write {columns}")
        for number, row in enumerate(rows, 2):
            if len(row) != len(header) or not set(row[1:]) <= {"0", "1"}:
                raise DataError(
                    f"{path}:{number}: not an image and {len(header) - 1} times 0 or 1",
                    "write 1 where the class is in the image, 0 where not",
                )
            if not (root / row[0]).is_file():
                raise DataError(f"{path}:{number}: {root / row[0]} is not there", "add it")
        try:
            classes = tuple(map(plain_text, header[1:]))
        except ValueError as error:
            raise DataError(f"{path}: {error}", "use printable names") from None
        table = np.array([row[1:] for row in rows], np.uint8)
        return LabelledSet(root, split, tuple(row[0] for row in rows), table, classes, num_channels)


def _rows(path: Path) -> list[list[str]]:
    """Of a table; a header without a column where it has none. Raises DataError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [row for row in csv.reader(file) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})", "write it in UTF-8") from None


class PlacedStream(EvaluationStream):
    """The batches of an evaluation with targets [B, 1 + K] int64: the image's number in the set,
    and its row of the table.
    """

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | BadImage:
        found = super().__getitem__(number)
        if isinstance(found, BadImage):
            return found
        first = number * self.batch_images
        places = np.arange(first, first + len(found[0]))
        rows = self.image_set.table[places]  # type: ignore[attr-defined]
        return found[0], torch.from_numpy(np.column_stack([places, rows]).astype(np.int64))


# ---- scores


def average_precision(scores: np.ndarray, is_right: np.ndarray) -> float | None:
    """The area under precision over recall in percent, of scores [N] and whether each image shows
    the class [N]: the sum over thresholds of the gain in recall times the precision there. Equal
    scores pass together. None where no image shows it.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(is_right[order].astype(np.float64))
    if not len(hits) or not hits[-1]:
        return None
    is_last = np.append(np.diff(scores[order]) != 0, True)
    precision = hits[is_last] / (np.flatnonzero(is_last) + 1)
    gains = np.diff(hits[is_last], prepend=0.0)
    return float(100 * (gains * precision).sum() / hits[-1])


@dataclass(frozen=True)
class MultiLabelScores(Scores):
    """Over one pass. precisions: the average precision of each class in percent [K], None where no
    image shows it.
    """

    precisions: tuple[float | None, ...]

    def percentages(self) -> dict[str, float]:
        """mAP: the mean over the classes that have one."""
        found = [one for one in self.precisions if one is not None]
        return {"mAP_pct": sum(found) / len(found) if found else 0.0}

    def counts(self) -> dict[str, int]:
        return {"num_images": self.num_images}

    def record(self) -> dict[str, float]:
        named = {f"precision_{k}": one for k, one in enumerate(self.precisions) if one is not None}
        return super().record() | named

    def summary(self) -> str:
        return f"mAP {self.main_pct:.2f} %  loss {self.loss_nats:.4f}"

    def of_classes(self) -> tuple[float | None, ...]:
        return self.precisions


# ---- the task


@dataclass(frozen=True)
class MultiLabel(Classification):
    """Targets [B, K] float32, 1 where an image shows a class, mixed by the recipe's `mix`."""

    def targets(self, labels: Tensor) -> Tensor:
        """Of rows of the table."""
        return labels.float()

    def validation_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        inputs = scored_inputs(images, self.plan.profile, self.settings)
        return self.loss(model, inputs, self.targets(labels[:, 1:]))

    @property
    def num_sums(self) -> int:  # type: ignore[override]
        """Of each validation image and class the score and the target, and the losses' sum: an
        average precision is of all images at once, and an image's numbers come from one batch.
        """
        return 2 * self.plan.profile.num_val * self.plan.profile.num_classes + 1

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Of images [B, C, H, W] uint8 on the device; with image.test_flip the mean with those of
        the mirrored images.
        """
        inputs = scored_inputs(images, self.plan.profile, self.settings)
        with autocast(self.settings):
            return viewed(model, inputs, self.plan.recipe.image.test_flip)

    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        device, profile = self.settings.device, self.plan.profile
        images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
        logits = self._logits(model, images)
        targets = self.targets(labels[:, 1:])
        both = torch.stack([logits, targets], 1).to(sum_dtype(device))
        sums = both.new_zeros(profile.num_val, 2, profile.num_classes)
        sums.index_copy_(0, labels[:, 0], both)
        loss = self.plan.loss(logits, targets).to(both.dtype) * len(labels)
        return torch.cat([sums.flatten(), loss[None]])

    def scores(self, sums: Sequence[float], num_images: int) -> MultiLabelScores:  # type: ignore[override]
        *values, loss = sums
        logits, targets = (
            np.array(values).reshape(-1, 2, self.plan.profile.num_classes).swapaxes(0, 1)
        )  # [N, K] each
        pairs = zip(logits.T, targets.T, strict=True)
        found = tuple(average_precision(scores, is_right) for scores, is_right in pairs)
        return MultiLabelScores(num_images, loss / num_images, found)

    def restored(self, record: Mapping[str, float]) -> MultiLabelScores:  # type: ignore[override]
        names = (f"precision_{k}" for k in range(self.plan.profile.num_classes))
        found = tuple(record.get(name) for name in names)
        if any(not 0 <= one <= 100 for one in found if one is not None):
            raise ValueError(f"average precisions {found}")
        return MultiLabelScores(count_of(record, "num_images"), record["loss_nats"], found)

    def constant_loss(self, images: LabelledSet, is_mixed: bool = True) -> float:  # type: ignore[override]
        """Of the classes' shares of the images, unmixed: mixing keeps them."""
        loss, table = self.plan.loss.of_image, torch.from_numpy(images.table).double()
        return lowest_constant_loss(loss, table.mean(0) if loss.is_linear else table[:_MOST_ROWS])

    def majority_pct(self, train: LabelledSet, val: LabelledSet) -> float | None:  # type: ignore[override]
        return None

    def shown(self, pictures: np.ndarray, targets: Tensor, classes: Sequence[str]) -> list[Shown]:
        """Each image with up to three of its classes, and their shares where it is mixed."""
        found = []
        for picture, target in zip(pictures, targets.tolist(), strict=False):
            largest = sorted((-share, k) for k, share in enumerate(target) if share)[:3]
            lines = [f"{classes[k][:12]} {-share:.2f}".replace(" 1.00", "") for share, k in largest]
            found.append(Shown(picture, "\n".join(lines)))
        return found

    @torch.no_grad()
    def predict(
        self, model: nn.Module, image: Image.Image, classes: Sequence[str]
    ) -> Prediction | None:
        """A PNG of the image beside its likeliest classes, each with a probability of its own."""
        pixels = whole_image(image, self.plan).to(self.settings.device)
        shares = self._logits(model, pixels)[0].sigmoid().tolist()
        likeliest = sorted((-share, name) for share, name in zip(shares, classes, strict=True))
        lines = [f"{name} {-share:.2f}" for share, name in likeliest[:_NUM_TOLD]]
        height = max(image.height, _LINE_PX * (len(lines) + 1))
        picture = Image.new("RGB", (image.width + _TEXT_PX, height), "white")
        picture.paste(image.convert("RGB"))
        draw = ImageDraw.Draw(picture)
        for number, line in enumerate(lines):
            draw.text((image.width + 6, 4 + _LINE_PX * number), line, fill="black")
        return Prediction({".png": picture}, ", ".join(lines))


class MultiLabelSection(TaskSection):
    """Each class is in an image or is not. Data: tables (see LabelTables); the loss asks one yes or
    no for each class, as bce does.
    """

    name: Literal["multi_label"] = "multi_label"
    scores: ClassVar[tuple[str, ...]] = ("mAP_pct",)
    answers_with_pictures: ClassVar[bool] = True  # a softmax over its classes would mean nothing

    def bound(self, plan: Plan, settings: Settings) -> Task:
        return MultiLabel(plan, settings)

    def targets(self, images: LabelledSet, places: np.ndarray, moved: Moved) -> Tensor:
        """[b, K] uint8."""
        return torch.from_numpy(images.table[places])

    def evaluation_stream(
        self, images: LabelledSet, plan: Plan, batch_images: int, test_px: int
    ) -> EvaluationStream:
        return whole_images(images, plan, batch_images, test_px, PlacedStream)

    def check(self, plan: Plan) -> None:
        super().check(plan)
        recipe = plan.recipe
        if recipe.loss.name in _OF_ONE_CLASS:
            raise PlanError(
                f"loss: {recipe.loss.name} is not one yes or no for each class, which task"
                " multi_label asks",
                'use set="loss={name: bce}"',
                fix={"loss": {"name": "bce"}},
            )
        for path, value in (
            ("smoothing", recipe.smoothing),
            ("distill", recipe.distill),
            ("augment_splits", recipe.augment_splits),
        ):
            if value is not None:
                raise PlanError(
                    f"{path}: not with task multi_label", f'use set="{path}=null"', fix={path: None}
                )

    def check_settings(self, plan: Plan, settings: Settings) -> None:
        if settings.loader != "torch":
            raise UserError(f"loader={settings.loader}: reads no tables", "use loader=torch")
