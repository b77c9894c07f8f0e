"""The two splits of a dataset, opened for one run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.data.content import content_digest
from trainer.data.datasets.beton import BetonSet, has_betons
from trainer.data.datasets.builtin import (
    FolderSet,
    ImageSet,
    for_training,
    open_beton_set,
    open_set,
)
from trainer.data.datasets.layouts import TargetSet, layout_of
from trainer.data.datasets.packed import holds_files
from trainer.data.datasets.split import split_of
from trainer.data.evaluation import evaluation_batches
from trainer.data.jpeg import decoder_name
from trainer.data.loader import MicroBatch, TrainStream
from trainer.data.prefetcher import prefetched
from trainer.data.transforms import fill_of
from trainer.data.workers import Pool, Started, Watch
from trainer.distributed.communicator import Ranks, alone

_TRAIN = 0  # among the streams of a run's pool, where the others are known by their image size


@dataclass(frozen=True)
class StartedLoaders:
    """Processes that make the evaluation batches of a plan at some image sizes, and this rank's
    micro-batches. streams: what each of the pool's streams is, _TRAIN or a size in px.
    """

    pool: Pool
    streams: tuple[int, ...]
    plan: Any
    ranks: Ranks

    def serves(self, stream: int, plan, ranks: Ranks) -> bool:
        """Do they make this stream of a plan for a rank?"""
        return (
            stream in self.streams
            and plan is self.plan
            and (ranks.rank, ranks.world_size) == (self.ranks.rank, self.ranks.world_size)
        )


@dataclass(frozen=True)
class OpenedData:
    """Training and validation images of one dataset.

    content_sha256: of the bytes of all images, once with_content of runs/job or read_content has
    read them; None where it is not known, as of a .beton that an older version wrote. started: the
    loader processes of one run, within a block of `started_for`.
    """

    train: ImageSet
    val: ImageSet
    content_sha256: str | None = None
    started: StartedLoaders | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in the order of their labels."""
        return self.train.classes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the training and the validation images' own fingerprints."""
        return hashlib.sha256(
            f"{self.train.fingerprint} {self.val.fingerprint}".encode()
        ).hexdigest()

    @property
    def ignored(self) -> dict[str, int]:
        """Files of both splits that are not read, counted by split and extension: `train .gif`."""
        return {
            f"{split} {kind}": count
            for split, images in (("train", self.train), ("val", self.val))
            if isinstance(images, FolderSet)
            for kind, count in images.index.ignored.items()
        }

    @property
    def split(self) -> str:
        """What the validation images are, for the row: "val", and by which rule where the command
        split made it; "test" or "valid" where those stand for it.
        """
        if isinstance(self.val, TargetSet):
            return self.val.stand_in or "val"
        if not isinstance(self.val, FolderSet):
            return "val"
        return self.val.index.stand_in or split_of(self.val.index.folder.parent)

    @property
    def changes(self) -> str:
        """How a .beton's pixels were made others than its source's; "" where they are the same."""
        packed = (images for images in (self.train, self.val) if isinstance(images, BetonSet))
        return next((images.facts.changes for images in packed if images.facts.changes), "")

    def read_content(self) -> Iterator[OpenedData | None]:
        """This data with its content_sha256, the last value given, after None for each part of the
        files that has been read.
        """
        digests: list[str | None] = []
        for images in (self.train, self.val):
            digest = None
            for digest in content_digest(images):
                if digest is None:
                    yield None
            digests.append(digest)
        whole = hashlib.sha256(" ".join(map(str, digests)).encode()).hexdigest()
        yield replace(self, content_sha256=whole if all(digests) else None)

    def loader_name(self, settings) -> str:
        """The loader of the training images, for the row: torch's with its JPEG decoder, if it uses
        one, or with what a .beton holds.
        """
        if settings.loader != "torch" or self.train.is_in_memory:
            return settings.loader
        is_beton = isinstance(self.train, BetonSet)
        return f"torch, {self.train.facts.title if is_beton else decoder_name()}"

    @contextmanager
    def started_for(
        self, plan, settings, ranks: Ranks, say: Callable[[str], None]
    ) -> Iterator[OpenedData]:
        """This data with its loader processes running: one set for the training and all evaluations
        of a plan, until the end of the block.

        To be entered before there is a model: see Pool.
        """
        if not settings.num_workers:
            yield self
            return
        sources: dict[int, Any] = {
            px: self._evaluation_stream(plan, settings, px)
            for px in (plan.recipe.image.test_px, *settings.test_px)
        }
        if settings.loader != "ffcv":  # whose threads load
            sources[_TRAIN] = self.stream(plan, settings, ranks).source()
        with Pool(list(sources.values()), settings.num_workers, say) as pool:
            yield replace(self, started=StartedLoaders(pool, tuple(sources), plan, ranks))

    def train_stream(
        self,
        plan,
        settings,
        first_step: int,
        ranks: Ranks = alone(),
        wrap: Callable[[TrainStream], TrainStream] | None = None,
        watch: Watch = Watch(),
    ) -> Iterator[MicroBatch]:
        """The micro-batches of a plan from one step to its end, in order: this rank's of each step.

        wrap: replaces the stream, as fault injection does.
        """
        stream = self.stream(plan, settings, ranks)
        workers = self._workers(_TRAIN, plan, settings, ranks)
        if wrap is not None:
            stream, workers = wrap(stream), settings.num_workers
        return prefetched(
            stream.batches(first_step, plan.num_steps, workers, settings.device, watch),
            settings.device,
        )

    def _workers(self, stream: int, plan, settings, ranks: Ranks) -> int | Started:
        """The processes that were started for this, else the number of those to start."""
        found = self.started
        if found is None or not found.serves(stream, plan, ranks):
            return settings.num_workers
        return Started(found.pool, found.streams.index(stream))

    def stream(self, plan, settings, ranks: Ranks = alone()) -> TrainStream:
        """This rank's training micro-batches of a plan, by key."""
        return _stream_of(settings.loader)(
            image_set=for_training(self.train) if settings.loader == "torch" else self.train,
            seed=plan.seed,
            augment=plan.recipe.augment,
            train_px=plan.recipe.image.train_px,
            repeats=plan.recipe.repeats or 1,
            batch_images=plan.recipe.batch.images,
            num_micro_batches=plan.num_micro_batches,
            steps_per_epoch=plan.steps_per_epoch,
            drop_last=plan.recipe.batch.drop_last,
            bad_images=plan.bad_images,
            growth=plan.recipe.image.growth,
            num_splits=plan.recipe.augment_splits or 1,
            fill=fill_of(plan.profile)
            if settings.device == "cpu" and settings.num_workers
            else None,
            assigned=plan.assignment(ranks.rank, ranks.world_size),
            targets=plan.recipe.of_task.targets,
            sampling=plan.recipe.sampling,
            epochs=plan.recipe.epochs,
        )

    def val_batches(
        self,
        plan,
        settings,
        ranks: Ranks = alone(),
        watch: Watch = Watch(),
        test_px: int | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every validation image once, in order, with its target; several ranks share the batches,
        without padding. test_px: another size than the recipe's.
        """
        px = test_px or plan.recipe.image.test_px
        return evaluation_batches(
            self._evaluation_stream(plan, settings, px),
            self._workers(px, plan, settings, ranks),
            settings.device,
            ranks.rank,
            ranks.world_size,
            watch,
        )

    def _evaluation_stream(self, plan, settings, test_px: int) -> Sequence:
        of_task = plan.recipe.of_task
        return of_task.evaluation_stream(self.val, plan, settings.eval_images, test_px)


def _stream_of(loader: str) -> type[TrainStream]:
    if loader != "ffcv":
        return TrainStream
    from trainer.data.ffcv.stream import FfcvStream  # optional: imports ffcv and numba

    return FfcvStream


def open_data(profile, data_dir: Path | None, in_beton: bool = False) -> OpenedData:
    """Open both splits.

    in_beton: from the folder's .beton files, whatever else is in it; without it, only where nothing
    else is.

    Raises DataError where they are not found or do not match the profile.
    """
    layout = layout_of(data_dir, profile.task)
    if layout is not None and not in_beton:
        return OpenedData(
            *(layout.open_set(profile, data_dir, split) for split in ("train", "val"))
        )
    if in_beton or (has_betons(data_dir) and not holds_files(data_dir)):
        return OpenedData(*(open_beton_set(profile, data_dir, split) for split in ("train", "val")))
    return OpenedData(open_set(profile, data_dir, "train"), open_set(profile, data_dir, "val"))
