"""The plan: a recipe with every unit worked out. Pure: no tensor, no clock, no disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from trainer.base.component import parts_of
from trainer.base.errors import PlanError
from trainer.base.names import LONGEST_NAME_BYTES
from trainer.base.plugins import loaded_plugins
from trainer.base.plural import counted
from trainer.components.losses import Loss
from trainer.recipe.assignment import Assignment, PartRows, assignment
from trainer.recipe.identity import RunIdentity
from trainer.recipe.overrides import as_set
from trainer.recipe.profiles import Profile
from trainer.recipe.schema import Deviation, Recipe

BAD_IMAGES = ("fail", "skip")


class PatchSums(NamedTuple):
    """What is known of the patches of training images: sums over them, in grey levels, exact.

    number: of patches. sums: of each of their values, [C * side * side]. products: of each two.
    """

    number: int
    sums: tuple[int, ...]
    products: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Plan:
    """Everything a run follows, in steps.

    recipe: resolved (model's lines folded in, adapted, overridden). num_micro_batches: per full
    step, as they are mixed; see `assignment` for which are a rank's. One is one norm sample
    (batch.norm_images), or the fewest samples that hold whole mixing units.
    num_steps: optimizer steps of the whole run. plugins: sha256 of each file outside the package
    that the recipe's components come from, by its path. class_counts, patches: training images of
    each class, and what the first weights take from them, once the data are open (planned_over).
    """

    recipe: Recipe
    page_digest: str
    deviations: tuple[Deviation, ...]
    model: str
    profile: Profile
    seed: int
    world_size: int
    bad_images: str
    num_micro_batches: int
    steps_per_epoch: int
    num_steps: int
    plugins: Mapping[str, str] = field(default_factory=dict)
    class_counts: tuple[int, ...] | None = None
    patches: PatchSums | None = None

    @cached_property
    def loss(self) -> Loss:
        """The recipe's loss, with the weights that its rule makes of the training images; of
        classes of one size before the data are open, where only its cost matters.
        """
        counts = self.class_counts or (1,) * self.profile.num_classes
        return self.recipe.loss.for_counts(np.array(counts))

    def with_counts(self, images) -> Plan:
        """The same plan over these training images, with the number of each class where the loss
        depends on it.
        """
        if not self.recipe.loss.needs_counts:
            return self
        counts = np.bincount(images.labels, minlength=self.profile.num_classes).tolist()
        return replace(self, class_counts=tuple(counts))

    @property
    def draws_per_epoch(self) -> int:
        """Images that go through the model in one epoch."""
        if self.recipe.batch.drop_last:
            return self.steps_per_epoch * self.recipe.batch.images
        return self.profile.num_train

    @property
    def unique_per_epoch(self) -> int:
        """Different images seen in one epoch, the most where classes are sampled: repeats show
        fewer of them, more often.
        """
        return -(-self.draws_per_epoch // (self.recipe.repeats or 1))

    @property
    def num_warmup_steps(self) -> int:
        """Optimizer steps of the warm-up, 0 without one."""
        return self.recipe.lr.num_warmup_steps(self.steps_per_epoch)

    def lr_at(self, step: int, scores: Sequence[float] = ()) -> float:
        """The learning rate of an optimizer step. scores: of the epochs before it."""
        lengths = self.steps_per_epoch, self.recipe.epochs
        return self.recipe.lr.at(step, *lengths, self.seed, scores)

    def train_px_at(self, step: int) -> int:
        """The side of the training images of an optimizer step, in px."""
        image = self.recipe.image
        return (
            image.growth.px_at(step, self.steps_per_epoch, image.train_px)
            if image.growth
            else image.train_px
        )

    def window_images(self, step: int) -> int:
        """Images of one optimizer step: the batch, or what is left of the epoch."""
        done = (step % self.steps_per_epoch) * self.recipe.batch.images
        return min(self.recipe.batch.images, self.profile.num_train - done)

    def micro_batches(self, step: int) -> int:
        """Micro-batches of one optimizer step: an epoch's last, smaller one may have fewer."""
        return num_micro_batches_in(
            self.window_images(step), self.recipe.batch.images, self.num_micro_batches
        )

    def micro_batch_images(self, step: int, micro_batch: int) -> int:
        """Images of one micro-batch of a step, over all ranks that share it."""
        return len(range(micro_batch, self.window_images(step), self.micro_batches(step)))

    def norm_samples(self, step: int) -> int:
        """Norm samples in each micro-batch of a step, of at least two images in a smaller step."""
        batch = self.recipe.batch
        number = self.recipe.images_together // batch.norm_images
        if self.window_images(step) == batch.images:
            return number
        return max(1, min(number, self.window_images(step) // self.micro_batches(step) // 2))

    def assignment(self, rank: int, world_size: int) -> Assignment:
        """Which images of each step are those of a rank."""
        return assignment(
            rank, world_size, self.num_micro_batches, self.recipe.mix, self.recipe.units_together
        )

    def part_images(self, step: int) -> int:
        """The fewest images of one micro-batch that a rank has in a step, if any."""
        smallest = self.window_images(step) // self.micro_batches(step)
        num_parts = self.num_parts(step)
        parts = (
            replace(self.assignment(0, 1), part=n, num_parts=num_parts) for n in range(num_parts)
        )
        return min(len(part.rows(smallest).own_rows) for part in parts)

    def num_parts(self, step: int) -> int:
        """Ranks that share each micro-batch of a step."""
        assigned = self.assignment(0, self.world_size)
        return assigned.parts_in(self.window_images(step), self.micro_batches(step))

    def part_rows(self, step: int, micro_batch: int, part: int, num_parts: int) -> PartRows:
        """One of num_parts parts of a micro-batch."""
        assigned = replace(self.assignment(0, 1), part=part, num_parts=num_parts)
        return assigned.rows(self.micro_batch_images(step, micro_batch))

    def mixing_units(self, step: int, micro_batch: int) -> dict[int, slice]:
        """Which images of a micro-batch belong to which of a step's mixing units: unit u of U has
        every U-th image of the step from the u-th on, whatever the micro-batches are.
        """
        number, stride = self.recipe.units_together, self.micro_batches(step)
        return {micro_batch + stride * unit: slice(unit, None, number) for unit in range(number)}

    def last_evaluation(self, step: int, every_epochs: int) -> int:
        """The last step up to `step` after which there is an evaluation, of every n-th epoch and of
        the last; 0 for none.
        """
        every = every_epochs * self.steps_per_epoch
        return step if step == self.num_steps else step - step % every

    @property
    def identity(self) -> RunIdentity:
        """All that may change the score, but for the bytes of the images."""
        science = {
            "recipe": self.recipe.digest,
            "model": self.model,
            "profile": self.profile.model_dump(
                include={"num_classes", "mean", "std", "channels"}, mode="json"
            ),
            "seed": self.seed,
            "bad_images": self.bad_images,
        }
        if self.plugins:
            science["plugins"] = sorted(self.plugins.values())
        recipe = f"{self.recipe.name}.v{self.recipe.version}"
        model = self.model.replace(":", "_")  # the name is that of a folder
        prefix = f"{recipe}-{model}-{self.profile.name}-s{self.seed}-"
        return RunIdentity(prefix, science)

    def run_name(self, data_fingerprint: str) -> str:
        """`<recipe>.v<N>-<model>-<data>-s<seed>-<6 hex of all that may change the score>`."""
        return self.identity.run_name(data_fingerprint)


def make_plan(
    recipe: Recipe,
    model: str,
    profile: Profile,
    seed: int = 0,
    page_digest: str | None = None,
    deviations: tuple[Deviation, ...] = (),
    world_size: int = 1,
    bad_images: str = "fail",
    plugins: Mapping[str, str] | None = None,
) -> Plan:
    """Work out every unit of a resolved recipe, or refuse.

    Raises PlanError where batch, micro-batch, world and data set do not multiply out, UserError
    where a component does not fit the rest (see Component.check).
    """
    recipe.of_task.check_data(profile)
    batch = recipe.batch
    num_micro_batches = batch.images // recipe.images_together
    if not 0 <= seed < 2**32:
        raise PlanError("outside 0 .. 4294967295", "try seed=0", place=f"seed={seed}")
    if bad_images not in BAD_IMAGES:
        raise PlanError(
            "unknown", f"valid: {', '.join(BAD_IMAGES)}", place=f"bad_images={bad_images}"
        )
    _check_ranks(recipe, num_micro_batches, world_size)
    profile = _normalized(profile, recipe)
    steps_per_epoch = _steps_per_epoch(recipe, profile)
    _check_warmup(recipe, steps_per_epoch)
    _check_last_units(recipe, profile)
    _check_classes(recipe)
    plan = Plan(
        recipe=recipe,
        page_digest=page_digest or recipe.digest,
        deviations=deviations,
        model=model,
        profile=profile,
        seed=seed,
        world_size=world_size,
        bad_images=bad_images,
        num_micro_batches=num_micro_batches,
        steps_per_epoch=steps_per_epoch,
        num_steps=steps_per_epoch * recipe.epochs,
        plugins=dict(loaded_plugins() if plugins is None else plugins),
    )
    _check_name(plan)
    for part in parts_of(recipe):
        part.check(plan)
    return plan


def _normalized(profile: Profile, recipe: Recipe) -> Profile:
    """A profile with the recipe's own mean and deviation, where it has them: all that looks at
    images takes them from there.
    """
    mean, std = recipe.image.mean, recipe.image.std
    if mean is None or std is None:
        return profile
    if len(mean) != profile.channels:
        raise PlanError(
            f"image.mean has {len(mean)} numbers, the images of {profile.name}"
            f" {counted(profile.channels, 'channel')}",
            'write one per channel; the data\'s own: set="image.mean=null image.std=null"',
            path=("image", "mean"),
        )
    return profile.model_copy(update={"mean": mean, "std": std})


def _check_name(plan: Plan) -> None:
    """The run's name becomes that of a file."""
    num_bytes = len(plan.run_name("").encode())
    if num_bytes > LONGEST_NAME_BYTES - len("-999.json"):
        raise PlanError(
            f"the run's name would have {num_bytes} bytes",
            "use a shorter name of the recipe or of the data's profile",
            place=plan.run_name(""),
        )


def _check_classes(recipe: Recipe) -> None:
    """What is made of the number of each class's images needs images of one class each."""
    if recipe.of_task.is_counted:
        return
    for is_there, key in (
        (recipe.sampling is not None, "sampling"),
        (recipe.loss.needs_counts, "loss.class_weighting"),
    ):
        if is_there:
            raise PlanError(
                f"{key}: goes by the class of an image, and in task {recipe.of_task.name} it has"
                " none",
                f"leave {key} out",
                path=tuple(key.split(".")),
            )


def check_settings(plan: Plan, settings) -> None:
    """Refuse a machine on which a component of the recipe cannot work, and settings that its task
    or its end does not admit. Raises UserError.
    """
    if settings.test_px and not plan.recipe.of_task.is_counted:
        raise PlanError(
            f"test_px=: scores of task {plan.recipe.of_task.name} are of the recipe's own size",
            "leave test_px out",
        )
    if settings.eval_every_epochs != 1 and plan.recipe.early_stopping:
        raise PlanError(
            f"eval_every={settings.eval_every_epochs}: early_stopping looks at the score of every"
            " epoch",
            "leave eval_every out",
        )
    for part in parts_of(plan.recipe):
        part.check_settings(plan, settings)


def largest_batch(num_images: int, recipe: Recipe) -> dict[str, Any]:
    """The most images in whole micro-batches, or all of them as one."""
    together = recipe.images_together
    return recipe.for_batch(
        num_images if together > num_images else num_images // together * together
    )


def _steps_per_epoch(recipe: Recipe, profile: Profile) -> int:
    full, rest = divmod(profile.num_train, recipe.batch.images)
    if recipe.batch.drop_last:
        if full == 0:
            fix = largest_batch(profile.num_train, recipe)
            raise PlanError(
                f"batch.images {recipe.batch.images} with batch.drop_last is more than the"
                f" {profile.num_train} training images of {profile.name}",
                f"use {as_set(fix)}",
                path=("batch", "images"),
                fix=fix,
            )
        return full
    return full + bool(rest)


def _check_ranks(recipe: Recipe, num_micro_batches: int, world_size: int) -> None:
    """Every rank has an image of each of its micro-batches, in a mix with its partner."""

    def fits(number: int) -> bool:
        one = assignment(0, number, num_micro_batches, recipe.mix, recipe.units_together)
        return one.num_parts <= one.num_blocks(recipe.images_together)

    if fits(world_size):
        return
    near = [number for number in range(1, world_size) if fits(number)][-3:]
    raise PlanError(
        f"batch.images {recipe.batch.images} = {num_micro_batches}"
        f" micro-batch{'es' * (num_micro_batches > 1)} of {recipe.images_together} images cannot be"
        f" shared by {world_size} ranks",
        f"use {' or '.join(map(str, near))} rank{'s' * (near[-1] > 1)}",
        path=("batch", "images"),
    )


def _check_warmup(recipe: Recipe, steps_per_epoch: int) -> None:
    """A warm-up in steps fits into the run, and leaves what its schedule needs, as one in epochs
    does.
    """
    num_steps, needed = (
        recipe.lr.scheduled_epochs(recipe.epochs) * steps_per_epoch,
        recipe.lr.schedule.min_steps_after_warmup(steps_per_epoch),
    )
    if (recipe.lr.warmup_steps or 0) > num_steps - needed:
        # what fits best may be all of the run, which then never leaves the warm-up
        half = min(num_steps // 2, num_steps - needed)
        fix = {"lr.warmup_steps": half} if half > 0 else recipe.lr.without_warmup("warmup_steps")
        raise PlanError(
            f"lr.warmup_steps {recipe.lr.warmup_steps} does not fit into the run's {num_steps}"
            " steps",
            f"use {as_set(fix)}",
            path=("lr", "warmup_steps"),
            fix=fix,
        )


def _check_last_units(recipe: Recipe, profile: Profile) -> None:
    """An epoch's last, smaller step has two images for each of the mixing units in it, where units
    are smaller than what is loaded together: else they would depend on the micro-batches.
    """
    images = recipe.mix.images if recipe.mix else None
    rest = profile.num_train % recipe.batch.images
    if images is None or recipe.batch.drop_last or images == recipe.images_together:
        return
    num_units = recipe.batch.images // images
    if 0 < rest < 2 * num_units:
        raise PlanError(
            f"the last step of an epoch would hold {rest} images for {num_units} mixing units"
            f" (batch.images {recipe.batch.images} / mix.images {images})",
            "use batch.drop_last=true",
            path=("mix", "images"),
            fix={"batch.drop_last": True},
        )


def num_micro_batches_in(num_draws: int, batch_images: int, num_micro_batches: int) -> int:
    """Micro-batches of a step of so many draws, num_micro_batches of a full one.

    In an epoch's last, smaller step each has at least two draws, so that statistics have a
    variance.
    """
    return (
        num_micro_batches
        if num_draws == batch_images
        else min(num_micro_batches, max(1, num_draws // 2))
    )
