"""Problems whose range tests are known: trials in plain NumPy for the tests of the rules and of the
race.
"""

import numpy as np

from trainer.lr_finder.rules import Curve


def descend(start, loss_of, gradient_of, values, seed, purpose, noise=0.0):
    """Gradient descent with one value a step, as a range test takes it; the loss is exact, the
    gradient may be noisy.
    """
    draws = np.random.default_rng(seed)
    weights = np.array(start, dtype=float)
    start_loss = loss_of(weights)
    losses, steps, held_out, ended = [], [], [], "ramp"
    every = max(1, len(values) // 20)
    lowest = start_loss
    for step, value in enumerate(values):
        loss = loss_of(weights)
        losses.append(loss)
        lowest = min(lowest, loss)
        if not np.isfinite(loss) or loss > lowest + 4 * (start_loss - lowest) + start_loss:
            ended = "diverged" if np.isfinite(loss) else "not a number"
            break
        weights = weights - value * (
            gradient_of(weights) + noise * draws.standard_normal(weights.shape)
        )
        if (step + 1) % every == 0 or step + 1 == len(values):
            steps.append(step)
            held_out.append(loss_of(weights))
    held_out_losses = np.array(held_out, dtype=float)
    return Curve(
        np.asarray(values, dtype=float)[: len(losses)],
        np.array(losses),
        (np.array(steps, dtype=int), held_out_losses),
        start_loss,
        ended,
        seed,
        purpose,
    )


def bowl(curvatures, noise=0.0):
    """A quadratic bowl: SGD with a constant value is stable below 2 / its largest curvature, and
    not above.
    """
    curvatures = np.asarray(curvatures, dtype=float)

    def trial(seed, values, purpose):
        start = np.random.default_rng([seed, 1]).choice([-10.0, 10.0], len(curvatures))
        with np.errstate(over="ignore", invalid="ignore"):
            return descend(
                start,
                lambda w: 0.5 * float(curvatures @ w**2),
                lambda w: curvatures * w,
                values,
                seed,
                purpose,
                noise,
            )

    return trial


def drawn(loss_at, noise=0.0, rate=0.15, floor=0.0):
    """A made-up model: at each step the loss moves by `rate` towards loss_at(value); steps are
    noisy, the slice hardly.
    """

    def trial(seed, values, purpose):
        draws = np.random.default_rng(
            [seed, len(values), {"ramp": 0, "probe": 1, "race": 2}[purpose]]
        )
        level = start_loss = loss_at(0.0, seed)
        levels = []
        for value in values:
            levels.append(level)
            level += rate * (loss_at(value, seed) - level)
        levels.append(level)
        losses = np.array(levels[:-1]) + noise * draws.standard_normal(len(values))
        every = max(1, len(values) // 20)
        steps = np.arange(every - 1, len(values), every)
        steps = (
            steps
            if len(steps) and steps[-1] == len(values) - 1
            else np.append(steps, len(values) - 1)
        )
        held_out = np.array(levels)[steps + 1] + 0.1 * noise * draws.standard_normal(len(steps))
        return Curve(
            np.asarray(values, dtype=float),
            losses,
            (steps, held_out),
            start_loss,
            "ramp",
            seed,
            purpose,
        )

    return trial


def network(best=0.05, start=2.3, lowest=0.5, width=1.0, edge=20.0):
    """Where a loss ends up by its learning rate: at `lowest` for `best`, at the start for tiny
    ones, above it beyond edge * best.
    """

    def loss_at(value, seed):
        if value <= 0:
            return start
        decades = np.log10(value / best) / width
        if value > edge * best:
            return 2 * start
        return start - (start - lowest) * float(np.exp(-(decades**2)))

    return loss_at
