"""Tables of images, of parquet and arrow alike: the columns of images and labels, and their rows.

An image is its file's bytes: a binary column, or a struct {bytes, path} as Hugging Face's Image
feature stores it. The path is only the image's name; no file of that name is opened.
"""

from __future__ import annotations

from typing import NamedTuple

from trainer.base.errors import DataError
from trainer.data.datasets.listing import Listing

_IMAGES = ("image", "img")
_LABELS = ("label", "labels", "class", "cls", "fine_label")  # fine_label: CIFAR-100's


class Columns(NamedTuple):
    """Names of the two columns, whether an image is a struct, and the class names if the table has
    them.
    """

    image: str
    label: str
    is_struct: bool
    class_names: tuple[str, ...] | None


def columns_of(where, schema, features: dict) -> Columns:
    """The columns of a table. schema: pyarrow's. features: Hugging Face's metadata of its columns,
    if any.

    Raises DataError where image or label are missing or ambiguous.
    """
    names, kinds = schema.names, dict(zip(schema.names, schema.types, strict=True))
    images = [name for name in names if _is_image(kinds[name])]
    named = [name for name in _IMAGES if name in images] or images
    if len(named) != 1:
        raise DataError(
            f"{where}: {len(named)} image columns among {', '.join(names)}; "
            "use one column called image with the files' bytes"
        )
    feature_of = {
        name: features.get(name) for name in names if isinstance(features.get(name), dict)
    }
    classes = [name for name, feature in feature_of.items() if feature.get("_type") == "ClassLabel"]
    labels = [name for name in _LABELS if name in names][:1] or classes
    if len(labels) != 1:
        raise DataError(
            f"{where}: {len(labels)} label columns among {', '.join(names)}; use one called label"
        )
    if not _is_label(kinds[labels[0]]):
        raise DataError(
            f"{where}: {labels[0]} has type {kinds[labels[0]]}; use integers or strings"
        )
    found = (feature_of.get(labels[0]) or {}).get("names")
    class_names = tuple(map(str, found)) if isinstance(found, list) and found else None
    return Columns(named[0], labels[0], _is_struct(kinds[named[0]]), class_names)


def _pyarrow():
    import pyarrow.compute  # optional dependency

    return pyarrow


def _is_struct(kind) -> bool:
    pyarrow = _pyarrow()
    return pyarrow.types.is_struct(kind)


def _is_image(kind) -> bool:
    pyarrow = _pyarrow()
    if not pyarrow.types.is_struct(kind):
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    inner = {field.name: field.type for field in kind}
    return (
        "bytes" in inner
        and _is_image(inner["bytes"])
        and not pyarrow.types.is_struct(inner["bytes"])
    )


def _is_label(kind) -> bool:
    types = _pyarrow().types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)


def bytes_of(images):
    """The images' bytes of one chunk of their column, as pyarrow's array."""
    return images.field("bytes") if hasattr(images, "field") else images


def add_rows(listing: Listing, where, images, labels, file: int, first: int) -> None:
    """Add consecutive rows to a listing, the first of which is row `first` of the file.

    Raises DataError for a row without label or bytes.
    """
    pc = _pyarrow().compute
    contents, is_struct = bytes_of(images), hasattr(images, "field")
    sizes = pc.if_else(images.is_valid(), pc.binary_length(contents), None).to_pylist()
    has_paths = is_struct and images.type.get_field_index("path") >= 0
    paths = images.field("path").to_pylist() if has_paths else [None] * len(sizes)
    for place, (label, size, path) in enumerate(zip(labels.to_pylist(), sizes, paths, strict=True)):
        if label is None or label == "":
            raise DataError(f"{where}: row {first + place} has no label; add one for every image")
        if size is None:
            raise DataError(
                f"{where}: row {first + place} has no image bytes ({path}); "
                "store the files' bytes in the table"
            )
        listing.add(
            path if isinstance(path, str) and path else f"{listing.num_images:09d}",
            label,
            size,
            file,
            first + place,
        )
