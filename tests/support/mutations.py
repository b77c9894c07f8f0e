"""Recipes with a mistake in them."""

import random

from trainer.recipe import check, tree


def mutated(word: str, draw: random.Random) -> str:
    """The word with one letter deleted, replaced, inserted, or swapped with the next one."""
    place, letter = draw.randrange(len(word)), draw.choice("abcdefghijklmnopqrstuvwxyz0123456789_")
    changes = [word[:place] + letter + word[place:], word[:place] + letter + word[place + 1 :]]
    if len(word) > 1:
        changes += [word[:place] + word[place + 1 :]]
        changes += [word[:place] + word[place : place + 2][::-1] + word[place + 2 :]]
    return draw.choice(changes)


def renamed(data, place: check.Path, new: str):
    """Plain data with the key at `place` called `new`, at the same position."""
    parent = check.value_at(data, place[:-1])
    return tree.replaced(
        data, place[:-1], {new if key == place[-1] else key: part for key, part in parent.items()}
    )
