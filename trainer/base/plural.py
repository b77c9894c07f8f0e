"""Singular and plural."""


def plural(word: str, num: float) -> str:
    """The word for so many: seed, seeds."""
    return word if num == 1 else f"{word}s"


def counted(num: int, word: str) -> str:
    """The number and the word for so many: 1 seed, 1,200 seeds."""
    return f"{num:,} {plural(word, num)}"
