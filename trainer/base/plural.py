"""Numbers with their words: singular and plural, durations."""


def plural(word: str, num: float) -> str:
    """The word for so many: seed, seeds."""
    return word if num == 1 else f"{word}s"


def counted(num: int, word: str) -> str:
    """The number and the word for so many: 1 seed, 1,200 seeds."""
    return f"{num:,} {plural(word, num)}"


def duration(seconds: float) -> str:
    """A time in the largest unit that it has two of: 3.2 minutes, 15 hours."""
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        number = seconds / length
        if number >= 2:
            return f"{number:.{0 if number >= 10 else 1}f} {plural(unit, 2)}"
    return f"{seconds:.0f} {plural('second', round(seconds))}"
