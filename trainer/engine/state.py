"""All that training carries from step to step, on every rank the same, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.base.devices import kind_of, sum_dtype
from trainer.base.errors import UserError
from trainer.base.settings import Settings
from trainer.components.param_groups import param_groups
from trainer.components.pixels.choice import why_not
from trainer.data.loader import MicroBatch
from trainer.distributed.communicator import Ranks, alone
from trainer.distributed.gradients import Gradients
from trainer.distributed.joined_norms import JoinedNorms
from trainer.engine.activation_checkpointing import recompute_activations
from trainer.engine.compile import Compiled
from trainer.engine.cuda_graphs import CapturedPasses, Passes
from trainer.engine.nan_debug import NanDebug
from trainer.engine.precise_norm import StepStatistics
from trainer.engine.shared_noise import SharedNoise
from trainer.models.build import assemble, assembled
from trainer.models.edit.hooks import ChangesInTraining
from trainer.models.freezing import Freezing
from trainer.models.initialization import is_head_loaded
from trainer.models.parts.half_group_norm import use_half_group_norm
from trainer.models.sizes import at_size
from trainer.models.small_maps import leave_out_padding_taps
from trainer.recipe.plan import Plan
from trainer.tasks import Scores, Task, task_of
from trainer.tasks.teacher import Teacher, open_teacher

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Progress:
    """How far training has come: all of it that is not weights. Saved with every checkpoint.

    step: optimizer steps done. evaluated_step: the step of the last evaluation. loss_sum,
    loss_steps: of the training losses since the last line of metrics. num_seen: images trained on.
    train_s: seconds in the loop, evaluations and compiling left out. compile_s: of compiling.
    scores: of the last evaluation, by weights
    ("model", "average"). history: the first percentage of the scored weights at each evaluation.
    changes: where a later process found another machine, and where memory ran
    out. num_pieces: of each micro-batch, since then. injected: faults on purpose that touch the
    row.
    """

    step: int = 0
    evaluated_step: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    num_replaced: int = 0
    num_seen: int = 0
    train_s: float = 0.0
    compile_s: float = 0.0
    scores: dict[str, dict] = field(default_factory=dict)
    history: list[float] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    num_pieces: int = 1
    injected: list[str] = field(default_factory=list)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take the values that `asdict` gave, whatever else stands there."""
        for name, default in asdict(Progress()).items():
            setattr(self, name, saved.get(name, default))


def as_it_runs(model: nn.Module, settings: Settings, px: int) -> nn.Module:
    """A model, changed in place to how a run with these settings computes it on images of px."""
    is_last = settings.is_channels_last(px)
    model.to(settings.device)
    model.to(memory_format=torch.channels_last if is_last else torch.contiguous_format)
    if settings.device == "cpu":
        leave_out_padding_taps(model)
    if settings.half_group_norm:
        use_half_group_norm(model)
    if settings.activation_checkpointing:
        recompute_activations(model)
    return model


def _teacher_as_it_runs(plan: Plan, settings: Settings) -> Teacher | None:
    teacher = open_teacher(plan)
    if teacher is not None:  # which keeps no activations
        alone = replace(settings, activation_checkpointing=False)
        as_it_runs(teacher, alone, plan.recipe.image.train_px)
    return teacher


def set_algorithms(settings: Settings) -> None:
    """Have cuDNN find its algorithms by trying, but in determinism mode: not the same bits twice,
    promised on a CPU alone. float32 is computed as float32 unless precision=tf32 asks for less:
    torch would round the factors of convolutions to 10 bits (TF32), and say nothing.
    """
    if not settings.device.startswith("cuda"):
        return
    backends, is_tf32 = torch.backends, settings.precision == "tf32"
    backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = is_tf32


@contextmanager
def algorithms_kept() -> Iterator[None]:
    """A block after which the choices of `set_algorithms` are as before."""
    backends = torch.backends
    before = backends.cudnn.benchmark, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    try:
        yield
    finally:
        backends.cudnn.benchmark, backends.cudnn.allow_tf32 = before[:2]
        backends.cuda.matmul.allow_tf32 = before[2]


class TrainingState:
    """Model, optimizer, average, scaler and progress of one training: on every rank the same, bit
    for bit.

    It knows no folder and no logger: trainer.runs.run.Run saves and resumes it. notes: lines (text,
    style) about what the steps did that nobody has logged yet. is_head_loaded: the classifier is
    that of the recipe's pretrained weights. size_scores: of the finished model at the image sizes
    of test_px=, by px. teacher: of the recipe's `distill`; it never changes, and no checkpoint
    holds it.
    """

    def __init__(self, plan: Plan, settings: Settings, ranks: Ranks = alone()) -> None:
        self.plan, self.settings, self.ranks = plan, settings, ranks
        model, replacements = assemble(plan)
        self.is_head_loaded = is_head_loaded(model, replacements)
        self.size_scores: dict[int, Scores] = {}
        # refused now, not after the last epoch
        self._resized_px = {px for px in self.other_px if self._at(model, px) is not model}
        self.model = as_it_runs(model, settings, plan.recipe.image.train_px)
        self.teacher = _teacher_as_it_runs(plan, settings)
        groups = param_groups(self.model, plan.recipe.optimizer)
        self.optimizer = plan.recipe.optimizer.build(groups, lr=plan.recipe.lr.peak)
        self.average = plan.recipe.average.start(self.model) if plan.recipe.average else None
        self.scaler = torch.amp.GradScaler(
            kind_of(settings.device), enabled=settings.precision == "fp16"
        )
        self.step_statistics = StepStatistics(
            self.model,
            settings.activation_checkpointing,
            settings.compile or settings.cuda_graphs,
        )
        # after the average has copied it
        self.assigned = plan.assignment(ranks.rank, ranks.world_size)
        self.joined = JoinedNorms(self.model, self._sharing())
        self.noise = SharedNoise(
            self.model, self.assigned.num_parts > 1, plan.recipe.augment_splits or 1
        )
        self.compiled = (
            Compiled(self.model, plan.recipe.precise_norm is not None, settings.compile_mode)
            if settings.compile
            else None
        )
        self.captured = (
            CapturedPasses(self.model, settings.device, self.assigned.num_parts)
            if settings.cuda_graphs
            else None
        )
        self.gradients = Gradients(self.model.parameters(), ranks, are_static=settings.cuda_graphs)
        freeze = plan.recipe.model.freeze if plan.recipe.model else None
        if settings.cuda_graphs and freeze and not freeze.is_for_good:
            raise UserError(
                "cuda_graphs=1: model.freeze changes in the run which weights have gradients",
                "use cuda_graphs=0",
            )
        self.freezing = Freezing(self.model, freeze, plan.steps_per_epoch)
        modules = self.model.modules()
        self.changing = [each for each in modules if isinstance(each, ChangesInTraining)]
        # after the average has copied the model without its hooks
        self.debug = NanDebug(self.model) if settings.debug == "nan" else None
        self.progress = Progress()
        # the device's running sum of losses: read only where a line is written, so that no step
        # waits for it
        self.loss_sum = torch.zeros((), dtype=sum_dtype(settings.device), device=settings.device)
        self.notes: list[tuple[str, str | None]] = []
        if settings.device.startswith("cuda") and (reason := why_not(self.loss_sum.device)):
            self.notes.append((f"augmentation by many small operations: {reason}", None))

    def _sharing(self) -> Ranks:
        """The ranks over which norms join their statistics: those that share a micro-batch.

        Raises UserError for micro_batch=auto.
        """
        if not self.step_statistics.is_sampled or self.assigned.num_parts == 1:
            return alone()
        if self.settings.micro_batch == "auto":
            raise UserError(
                "micro_batch=auto: not possible where ranks join statistics inside the forward"
                f" pass; leave micro_batch= out, or use {self.assigned.num_groups} ranks"
            )
        return self.ranks.groups_of(self.assigned.num_parts)

    @contextmanager
    def sharing(self, batch: MicroBatch, place: int, number: int) -> Iterator[None]:
        """A block of passes over one of `number` pieces of a micro-batch: over this rank's part of
        it, norms and noise are those of the whole, where other ranks have the rest.
        """
        if batch.num_parts == 1:
            yield
            return
        address = batch.step, batch.micro_batch
        rows = self.plan.part_rows(*address, batch.part, batch.num_parts).own_rows
        num_images = self.plan.micro_batch_images(*address)
        noise = self.noise.over(rows[place::number], num_images, self.settings.device)
        with noise, self.joined.over():
            yield

    def run(self, passes: Passes, inputs: Tensor, targets: Tensor, share: float) -> Tensor:
        """passes(inputs, targets, share), as a CUDA graph where the settings say so."""
        if self.captured is None:
            return passes(inputs, targets, share)
        return self.captured(passes, inputs, targets, share)

    @property
    def task(self) -> Task:
        """What the plan of now trains for: a learning-rate finder changes the plan from step to
        step.
        """
        return task_of(self.plan, self.settings, self.teacher)

    def weights(self) -> dict[str, nn.Module]:
        """The models that are evaluated: the trained one and, where the recipe keeps one beside it,
        its average.
        """
        if self.average is None or self.average.rule.replaces_model:
            return {"model": self.model}
        return {"model": self.model, "average": self.average.model}

    @property
    def other_px(self) -> list[int]:
        """The image sizes at which the finished model is scored beside the recipe's own."""
        return [px for px in self.settings.test_px if px != self.plan.recipe.image.test_px]

    def model_at(self, image_px: int) -> nn.Module:
        """The scored weights in a model for another image size: the model itself where it takes
        it.
        """
        model = self.weights()[self.scored]
        if image_px not in self._resized_px:
            return model
        with torch.random.fork_rng(devices=[]):  # its first weights are written over
            fresh, _ = assembled(self.plan)
        fresh.load_state_dict(model.state_dict())
        return as_it_runs(self._at(fresh, image_px), self.settings, image_px)

    def _at(self, model: nn.Module, image_px: int) -> nn.Module:
        return at_size(model, self.plan.model, self.plan.profile.channels, image_px)

    @property
    def scored(self) -> str:
        """Whose scores are the run's result."""
        return "average" if self.average and self.average.rule.is_scored else "model"

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint holds of the training: the state's own tensors, not copies of
        them.
        """
        self.progress.loss_sum = self.loss_sum.item()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "progress": asdict(self.progress),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a `state_dict`. Raises whatever torch raises over a state of another
        kind.
        """
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        self.progress.load_state_dict(saved["progress"])
        self.loss_sum.fill_(self.progress.loss_sum)

    def check_equal(self) -> None:
        """Fail where another rank has other weights, statistics or averages: some sum was not one
        over all ranks.
        """
        if self.ranks.is_alone:
            return
        models = [self.model] + ([self.average.model] if self.average else [])
        tensors = [tensor for model in models for tensor in model.state_dict().values()]
        if not self.ranks.is_same(_fingerprint(tensors)):
            raise RuntimeError(
                f"the weights differ between ranks after step {self.progress.step}: ranks of unlike"
                " devices?"
            )


def _fingerprint(tensors: Iterable[torch.Tensor]) -> int:
    """A number that changes with any bit of one tensor: for each the sum of its words, and these in
    their order.
    """
    flat = (tensor.detach().contiguous().view(-1) for tensor in tensors)
    sums = [each.view(_WORDS[each.element_size()]).sum(dtype=torch.int64) for each in flat]
    made = 0
    for number in torch.stack(sums).tolist():
        made = (made * 1_000_003 + number) % (2**61 - 1)
    return made


class Timer:
    """Times the training of images and the waiting for them; evaluations, saving and compiling do
    not count.

    Images are those of all ranks; the times are this rank's.
    """

    def __init__(self, progress: Progress, compiled: Compiled | None = None) -> None:
        self._progress, self._compiled = progress, compiled
        self._compiled_s = 0.0
        self._seen, self._wait_s, self._busy_s = progress.num_seen, 0.0, 0.0
        self._started_s: float | None = None

    def batches(self, stream: Iterator) -> Iterator:
        """The micro-batches of a stream, timed while they are awaited."""
        while True:
            before_s = time.perf_counter()
            try:
                batch = next(stream)
            except StopIteration:
                return
            if self._started_s is not None:  # else it is looked at, not trained on
                self._wait_s += time.perf_counter() - before_s
            yield batch

    def __enter__(self) -> Timer:
        self._compiled_s = self._compiled.seconds if self._compiled else 0.0
        self._started_s = time.perf_counter()
        return self

    def __exit__(self, *exception) -> None:
        assert self._started_s is not None
        compile_s = self._compiled.seconds - self._compiled_s if self._compiled else 0.0
        seconds = time.perf_counter() - self._started_s - compile_s
        self._progress.compile_s += compile_s
        self._busy_s += seconds
        self._progress.train_s += seconds
        self._started_s = None

    def restart(self) -> tuple[float, float]:
        """(images per second, share of the time spent waiting for data) since the last restart."""
        num_images, self._seen = self._progress.num_seen - self._seen, self._progress.num_seen
        speed = num_images / max(self._busy_s, 1e-9), self._wait_s / max(self._busy_s, 1e-9)
        self._wait_s, self._busy_s = 0.0, 0.0
        return speed
