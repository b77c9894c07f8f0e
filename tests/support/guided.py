"""A reader of somebody else's bytes under atheris: mutations that follow which lines the ones
before them reached.

    python tests/guided.py <reader> -atheris_runs=2000 -seed=1 <folder of first inputs>

As in fuzzed.py nothing may come of them but a value or a UserError, and nothing be written or
started elsewhere.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import atheris

with atheris.instrument_imports(
    include=[
        "trainer.data",
        "trainer.recipe.load",
        "trainer.base.json_text",
        "tarfile",
        "PIL.JpegImagePlugin",
        "PIL.PngImagePlugin",
    ]
):
    from trainer.data.datasets import shards
    from trainer.data.datasets.listing import classes_of
    from trainer.data.decode import decoded, oddities_of, train_square
    from trainer.data.jpeg import Jpeg, taken_for_training
    from trainer.recipe.load import parse

from PIL import Image

from support.fuzzed import in_time, watched
from trainer.base.errors import UserError

IMAGE = Path("image.jpg")


def images(content: bytes, folder: Path) -> None:
    """An image file, whole as in evaluation and in training, in three channels and one."""
    for channels in (3, 1):
        lazy = taken_for_training(IMAGE, content, channels)
        if isinstance(lazy, Jpeg) and lazy.width * lazy.height < 10**6:
            lazy.square((0, 0, lazy.height // 2 + 1, lazy.width), Image.Resampling.BICUBIC, 8)
        whole = decoded(IMAGE, content, channels)
        if whole.width * whole.height < 10**6:
            (
                train_square(whole, (0, 0, 1, 1), Image.Resampling.BILINEAR, 4),
                oddities_of(IMAGE, content, channels),
            )


def tars(content: bytes, folder: Path) -> None:
    """A shard of a WebDataset."""
    path = folder / "train-0.tar"
    path.write_bytes(content)
    found, reader = shards.scan([path]), shards.Reader([path])
    if not found.num_images:
        return
    arrays = found.arrays(classes_of(folder, {"train": found, "val": found}))
    for start, size in zip(
        arrays["starts"][:2].tolist(), arrays["sizes"][:2].tolist(), strict=True
    ):
        assert len(reader.content(0, start, size)) == size


def yamls(content: bytes, folder: Path) -> None:
    """A recipe's text."""
    parse(content.decode(errors="replace"), "page")


READERS = {reader.__name__: reader for reader in (images, tars, yamls)}


def main() -> None:
    reader = READERS[sys.argv.pop(1)]
    folder = Path(tempfile.mkdtemp())

    def attempt(content: bytes) -> None:
        with (
            watched(folder) as elsewhere,
            in_time(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.suppress(UserError),
        ):
            reader(content, folder)
        if elsewhere:
            raise AssertionError(f"done elsewhere: {elsewhere}")

    atheris.Setup(sys.argv, attempt)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
