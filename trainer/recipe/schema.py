"""A recipe: one complete file of science, and the one place that knows where recipes are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from trainer.base.component import StrictModel
from trainer.base.errors import ConfigError, did_you_mean
from trainer.components.augment import Augmentation
from trainer.components.averaging import WeightAverage
from trainer.components.distillation import Distillation
from trainer.components.learning_rate import LearningRate
from trainer.components.losses import Loss
from trainer.components.mixing import Mixing
from trainer.components.optimizers import Optimizer
from trainer.components.sampling import Sampling
from trainer.components.task import TaskSection, default_task
from trainer.models.spec import Model
from trainer.recipe import tree
from trainer.recipe.check import ABOUT, check, label_of, refuse
from trainer.recipe.load import Positions, load_yaml
from trainer.recipe.overrides import Deviation, overridden, overrides_of
from trainer.recipe.sections import Batch, EarlyStopping, Image, PreciseNorm, Score

InnerShare = Annotated[float, Field(gt=0, lt=1)]

_NOT_IN_DIGEST = ("title", "source", "adapted_to", "assumed", "unconfirmed", "published")
_STAGES = ("decode", "pixels", "normalized")


class Recipe(StrictModel):
    """One recipe: what the source does, from data to score. An absent key means off.

    task: what is learned; absent, one class for each image (classification). adapted_to: the
    profile that a run's own recipe.yaml has been adapted to: the same profile
    leaves it as it is. per_model: the lines that the source gives to single models, by timm's exact
    name. assumed: what the source does not state, by dotted path, each with what was chosen and
    why. unconfirmed: what a reading of the sources left open, a sentence each, also about the
    scores. published: the source's own scores. augment_splits: every image is shown that many
    times in its micro-batch, cropped and flipped alike: the first time as it then is, the others
    each with an augmentation of its own. A micro-batch is still norm_images different images.
    sampling: how often each class is shown; absent, as often as it has images.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    version: Annotated[int, Field(ge=1, le=9999)]
    title: str
    source: str
    task: TaskSection | None = None
    epochs: Annotated[int, Field(ge=1, le=10_000)]
    batch: Batch
    lr: LearningRate
    optimizer: Optimizer
    loss: Loss
    smoothing: InnerShare | None = None
    distill: Distillation | None = None
    mix: Mixing | None = None
    augment: tuple[Augmentation, ...] = ()
    repeats: Annotated[int, Field(ge=2, le=100)] | None = None
    sampling: Sampling | None = None
    augment_splits: Annotated[int, Field(ge=2, le=16)] | None = None
    image: Image
    drop_path: InnerShare | None = None
    average: WeightAverage | None = None
    precise_norm: PreciseNorm | None = None
    early_stopping: EarlyStopping | None = None
    model: Model | None = None
    adapted_to: str | None = None
    assumed: dict[str, str] = {}
    unconfirmed: tuple[str, ...] = ()
    per_model: dict[str, dict[str, Any]] = {}
    published: tuple[Score, ...] = ()

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        images, norm_images = self.batch.images, self.batch.norm_images
        if images % norm_images:
            near = " or ".join(
                str(n * norm_images)
                for n in (images // norm_images, images // norm_images + 1)
                if n
            )
            sentence = (
                f"batch.images {images} is no multiple of batch.norm_images {norm_images}; write"
                f" {near}"
            )
            raise refuse(("batch", "images"), sentence, fix=self._dividing(images))
        mix_images = self.mix and self.mix.images
        if self.mix and norm_images == 1 and mix_images is None:
            raise refuse(
                ("mix",),
                "mix needs two images, batch.norm_images is 1",
                "write mix.images, raise it, or leave mix out",
            )
        if mix_images and images % mix_images:
            fitting = max(n for n in range(1, mix_images) if images % n == 0)
            raise refuse(
                ("mix", "images"),
                f"batch.images {images} is no multiple of mix.images {mix_images}",
                f"make mix.images {fitting}" if fitting > 1 else "leave mix.images out",
                fix={"mix.images": fitting if fitting > 1 else None},
            )
        return self

    def _dividing(self, images: int) -> dict[str, Any]:
        """The largest norm sample that divides a batch of so many images."""
        most = min(self.batch.norm_images, images)
        return {"batch.norm_images": next(n for n in range(most, 0, -1) if images % n == 0)}

    def for_batch(self, images: int) -> dict[str, Any]:
        """The overrides that make a batch of so many images: norm samples and mixing units keep
        their sizes, or have the largest that divide it.
        """
        fix: dict[str, Any] = {"batch.images": images}
        if images % self.batch.norm_images:
            fix |= self._dividing(images)
        if self.mix and self.mix.images and images % self.mix.images:
            sizes = range(min(self.mix.images, images), 1, -1)
            fix["mix.images"] = next((n for n in sizes if images % n == 0), None)
        return fix

    @property
    def of_task(self) -> TaskSection:
        """The recipe's task; classification where it names none."""
        return self.task or default_task()

    @property
    def images_together(self) -> int:
        """Images that are loaded and mixed together: whole mixing units, whole norm samples."""
        mix_images = self.mix and self.mix.images
        return math.lcm(self.batch.norm_images, mix_images or 1)

    @property
    def units_together(self) -> int:
        """Mixing units in these images."""
        return self.images_together // self.mix.images if self.mix and self.mix.images else 1

    @model_validator(mode="after")
    def _smoothing_survives(self) -> Self:
        # Targets are smoothed first and thresholded second, so a threshold leaves nothing of the
        # smoothing.
        threshold = self.loss.of_image.target_threshold
        if self.smoothing and threshold is not None:
            sentence = (
                f"smoothing {self.smoothing:g} is erased by loss.threshold {threshold:g}; leave one"
                " of them out"
            )
            raise refuse(("smoothing",), sentence)
        return self

    @model_validator(mode="after")
    def _no_part_undoes_a_key(self) -> Self:
        model = self.model or Model()
        isotropic, norm = "lost under model.isotropic, which", model.norm
        for key, is_undone, sentence in (
            (
                "layer_scale",
                model.isotropic,
                f"{isotropic} builds the blocks again; write model.isotropic.layer_scale",
            ),
            ("head_init_scale", model.isotropic, f"{isotropic} draws the head again; leave it out"),
            (
                "zero_init_last",
                norm and not norm.has_gamma,
                "model.norm has no gamma that could start at zero; write false",
            ),
        ):
            if is_undone and getattr(model, key):
                raise refuse(("model", key), sentence)
        return self

    @model_validator(mode="after")
    def _splits_are_compared(self) -> Self:
        is_compared = self.loss.compares_splits
        if is_compared and self.augment_splits is None:
            raise refuse(
                ("loss",),
                f"{self.loss.name} compares splits, and there are none",
                "add augment_splits: 3",
            )
        if self.augment_splits is None:
            return self
        if not is_compared:
            sentence = (
                f"augment_splits needs a loss that compares them, as {self.loss.name} does not; use"
                " jensen_shannon"
            )
            raise refuse(("augment_splits",), sentence)
        if self.distill:
            sentence = f"a teacher gives one answer an image, {self.loss.name} compares several"
            raise refuse(("distill",), sentence, "leave distill or augment_splits out")
        if self.mix:
            sentence = (
                f"{self.mix.name} blends the images that {self.loss.name} compares; leave mix or"
                " augment_splits out"
            )
            raise refuse(("mix",), sentence)
        if all(part.stage == "decode" for part in self.augment):
            sentence = (
                "augment_splits shows one image many times, and nothing in augment makes them"
                " differ; add rand_augment"
            )
            raise refuse(("augment_splits",), sentence)
        return self

    @model_validator(mode="after")
    def _augment_in_order(self) -> Self:
        for number, part in enumerate(self.augment):
            before = {other.purpose: other.name for other in self.augment[:number]}.get(
                part.purpose
            )
            if before == part.name:
                raise refuse(
                    ("augment", number),
                    f"{part.name} is there twice",
                    "an augmentation is used once",
                )
            if before:
                sentence = (
                    f"{part.name} draws the same random numbers as {before} ({part.purpose}); leave"
                    " one of them out"
                )
                raise refuse(("augment", number), sentence)
            later = [
                one
                for one in self.augment[:number]
                if _STAGES.index(one.stage) > _STAGES.index(part.stage)
            ]
            if later:
                sentence = (
                    f"{part.name} ({part.stage}) comes after {later[0].name} ({later[0].stage});"
                    " move it before"
                )
                raise refuse(("augment", number), sentence)
        return self

    @model_validator(mode="after")
    def _images_have_one_size(self) -> Self:
        crops = [part.name for part in self.augment if part.crops]
        if not crops:
            found = "augment has no crop, so the images have no common size"
            raise refuse(("augment",), found, "add random_resized_crop or resize")
        if len(crops) > 1:
            raise refuse(("augment",), f"{' and '.join(crops)} both crop", "keep one of them")
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        warmup_epochs, cooldown_epochs = self.lr.warmup_epochs or 0, self.lr.cooldown_epochs or 0
        if cooldown_epochs >= self.epochs:
            sentence = (
                f"lr.cooldown_epochs {cooldown_epochs} leaves nothing of the run's epochs"
                f" {self.epochs}; leave it out or write less"
            )
            raise refuse(("lr", "cooldown_epochs"), sentence, fix={"lr.cooldown_epochs": None})
        # A schedule over what the warm-up leaves needs something left; a length of its own is
        # refused for itself, below.
        scheduled = self.lr.scheduled_epochs(self.epochs)
        most = scheduled - min(1, self.lr.schedule.min_steps_after_warmup(1))
        if warmup_epochs > most:
            sentence = (
                f"lr.warmup_epochs {warmup_epochs} does not fit into the run's epochs {self.epochs}"
            )
            # what fits best may be all of the run, which then never leaves the warm-up
            half = scheduled // 2
            fix: dict[str, Any] = (
                {"lr.warmup_epochs": half} if half else self.lr.without_warmup("warmup_epochs")
            )
            raise refuse(("lr", "warmup_epochs"), sentence, f"write {most} at most", fix=fix)
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        """What is counted in epochs lies within the run: a number that is never reached has no
        effect.
        """
        schedule, scheduled = self.lr.schedule, self.lr.scheduled_epochs(self.epochs)
        of_schedule = schedule.lengths(scheduled, self.lr.warmup_epochs or 0)
        lengths: list[tuple[tuple[str | int, ...], Any, tuple[str, float, float]]] = [
            (("lr", "schedule"), schedule, length) for length in of_schedule
        ]
        if (growth := self.image.growth) is not None:
            length = "to_epoch", growth.to_epoch, self.epochs
            lengths.append((("image", "growth"), growth, length))
        for place, part in self._ending():
            lengths += [(place, part, length) for length in part.lengths(self.epochs)]
        for place, part, (key, found, most) in lengths:
            if found > most:
                scaled = part.scaled_to(self.epochs, math.ceil(max(found, self.epochs)))
                label = ".".join(part.name if isinstance(one, int) else one for one in place)
                sentence = (
                    f"{label}.{key} {found:g} does not fit into the run's epochs {self.epochs}"
                )
                fix = tree.changed(label, part, scaled)
                raise refuse((*place, key), sentence, f"write {most:g} at most", fix=fix)
        return self

    def _ending(self) -> Iterator[tuple[tuple[str | int, ...], Augmentation | Mixing]]:
        """What may end before the run does, with its place."""
        for number, part in enumerate(self.augment):
            yield ("augment", number), part
        if self.mix is not None:
            yield ("mix",), self.mix

    @model_validator(mode="after")
    def _task_takes_views(self) -> Self:
        if self.image.test_translate_px is not None and self.of_task != default_task():
            raise refuse(
                ("image", "test_translate_px"),
                f"task {self.of_task.name} scores no moved images",
                "leave it out",
            )
        return self

    @model_validator(mode="after")
    def _assumed_exists(self) -> Self:
        plain = tree.plain(self)
        for label in self.assumed:
            try:
                found = label_of(plain, tree.find(Recipe, plain, label))
            except ConfigError as error:
                raise error.raised_as(ConfigError, path=("assumed", label)) from None
            if found != label or label.partition(".")[0] in ABOUT:
                raise refuse(
                    ("assumed", label),
                    f"{label} is not assumable",
                    f"write a path such as {found} or lr.peak",
                )
        return self

    @model_validator(mode="after")
    def _per_model_fits(self) -> Self:
        models = sorted({score.model for score in self.published})
        for model, lines in self.per_model.items():
            if model not in models:
                near = did_you_mean(model, models) or f": {', '.join(models)}"
                raise refuse(
                    ("per_model", model),
                    f"{model} is not among this recipe's published models{near}",
                )
            for key in lines:
                if key in ABOUT:
                    raise refuse(
                        ("per_model", model, key),
                        f"{key} belongs to the whole recipe",
                        "leave it out here",
                    )
            try:
                check(Recipe, self._folded(model))
            except ConfigError as error:
                raise error.raised_as(ConfigError, path=("per_model", model, *error.path)) from None
        return self

    @model_validator(mode="after")
    def _scores_match_images(self) -> Self:
        """A score at other sides than the recipe's own would be of another recipe: it needs a
        per_model line.
        """
        for number, score in sorted(
            enumerate(self.published), key=lambda item: item[1].model not in self.per_model
        ):
            lines = self.per_model.get(score.model, {}).get("image", {})
            image = {**self.image.model_dump(), **lines}
            for key in ("train_px", "test_px"):
                if getattr(score, key) not in (None, image[key]):
                    place = (
                        ("per_model", score.model, "image", key)
                        if key in lines
                        else ("published", number, key)
                    )
                    sentence = (
                        f"{score.model} was scored at {key} {getattr(score, key)}, its recipe says"
                        f" {image[key]}"
                    )
                    raise refuse(place, sentence, f"make image.{key} the same under per_model")
        return self

    def for_model(self, model: str) -> Recipe:
        """This recipe with the lines for one model folded in: mappings merged, lists replaced,
        other models dropped.
        """
        return check(Recipe, self._folded(model))

    def _folded(self, model: str) -> dict[str, Any]:
        plain, lines = tree.plain(self), self.per_model.get(model, {})
        scores = tuple(score for score in plain.get("published", ()) if score["model"] == model)
        plain = tree.merged({**plain, "published": scores, "per_model": {}}, lines)
        return tree.without_assumed(Recipe, plain, tree.leaves(lines))

    @property
    def digest(self) -> str:
        """12 hex digits over all that is on; the same for every spelling of the same science."""
        return digest_of(tree.plain(self))

    def to_yaml(self) -> str:
        """The recipe as YAML that reads back to the same digest."""
        return tree.to_yaml(tree.plain(self))


def digest_of(data: Mapping[str, Any]) -> str:
    """The digest of a recipe that is plain data, as `Recipe.digest`."""
    science = {key: value for key, value in data.items() if key not in _NOT_IN_DIGEST}
    if "distill" in science:  # where the teacher's file lies; which it is, its sha256 says
        science["distill"] = {k: v for k, v in science["distill"].items() if k != "weights"}
    canonical = json.dumps(science, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def apply_overrides(
    recipe: Recipe, overrides: Mapping[str, Any] | str, origin: str = "set"
) -> tuple[Recipe, tuple[Deviation, ...]]:
    """A recipe with values in the place of others, and each deviation that this makes.

    overrides: plain values by path, or text such as `epochs=5 loss.name=ce lr.peak=0.002`. A part
    set to null is off. The recipe is one of for_model: lines for single models are folded in before
    anything is put over them.

    Raises OverrideError naming the item that does not fit.
    """
    assert not recipe.per_model, "overrides come after for_model"
    given = overrides_of(overrides) if isinstance(overrides, str) else overrides
    return overridden(recipe, given, origin, locked=ABOUT)


def from_random_weights(recipe: Recipe) -> Recipe:
    """A recipe that starts from weights which a run names, or learns from a teacher that it names,
    without them: to be read, built, tried. Others are as they were.
    """
    pretrained = recipe.model and recipe.model.pretrained
    off = {"model.pretrained": None} if pretrained and pretrained.file is None else {}
    if recipe.distill and recipe.distill.weights is None:
        off |= {"distill": None}
    return apply_overrides(recipe, off)[0] if off else recipe


def open_recipe(path: Path) -> tuple[Recipe, Positions]:
    """The recipe in a file, and where each of its keys stands.

    Raises ConfigError for what is wrong in it, or a file that is not named after it. A
    run's own recipe.yaml is free of that name: it may hold deviations.
    """
    recipe, positions = load_yaml(path, Recipe)
    identity = f"{recipe.name}.v{recipe.version}"
    if Path(path).stem not in (identity, "recipe"):
        raise positions.error(
            ("name",), f"this recipe is {identity}", f"name its file {identity}.yaml"
        )
    return recipe, positions


def load_recipe(path: Path) -> Recipe:
    """The recipe in a file. Raises ConfigError as open_recipe does."""
    return open_recipe(path)[0]
