"""20,000 damaged inputs: each is a value or one line of refusal, in time, and nothing else is done."""

import itertools

import pytest

from support.fuzz_targets import TARGETS
from support.fuzzed import Mutator, survived

IDS = [target.__name__ for target in TARGETS]
NUM_IN_DRILL = 20_000
SHARE_IN_TEST = 1 / 65


def fuzz(target, number: int, folder, seed: int) -> None:
    tries = itertools.islice(target(Mutator(seed), folder), number)
    num_tries, num_refused, wrong = survived(tries, folder)
    assert not wrong, "\n\n".join(f"== {place}\n{what}" for place, what in wrong.items())
    assert num_tries == number and (
        num_refused > 0 or target.__name__ in ("indexes", "checkpoints")
    )


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """All that may be written lies in the test's own folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize("target", TARGETS, ids=IDS)
def test_some_damaged_inputs(target, tmp_path):
    fuzz(target, max(2, round(TARGETS[target] * SHARE_IN_TEST)), tmp_path, seed=1)


def test_the_drill_has_20_000():
    assert sum(TARGETS.values()) == NUM_IN_DRILL


@pytest.mark.drill
@pytest.mark.parametrize("target", TARGETS, ids=IDS)
def test_all_damaged_inputs(target, tmp_path):
    fuzz(target, TARGETS[target], tmp_path, seed=2)
