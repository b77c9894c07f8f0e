"""The images of an image folder packed into tar shards, parquet files and a folder of Hugging
Face's `datasets`.
"""

import io
import json
import tarfile
from pathlib import Path

NUM_SHARDS = 3


def encoded(image, kind: str = "JPEG", **options) -> bytes:
    """The bytes of a PIL image's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def files_of(folder: Path) -> list[tuple[str, str, bytes]]:
    """(class, name, content) of a split's files, in an order of no meaning."""
    paths = sorted(folder.glob("*/*"), key=lambda path: (path.stem[::-1], path.parent.name))
    return [(path.parent.name, path.name, path.read_bytes()) for path in paths]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    tar.addfile(about, io.BytesIO(content))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add(tar, name, content)
    return path


def members_of(kind: str, class_name: str, name: str, content: bytes) -> dict[str, bytes]:
    """One image as members of a tar. kind: cls, json or folders."""
    if kind == "folders":
        return {f"./{class_name}/{name}": content}
    key = name.partition(".")[0]
    label = (
        class_name.encode()
        if kind == "cls"
        else json.dumps({"label": class_name, "size": [1, 2]}).encode()
    )
    return {name: content, f"{key}.{kind}": label + b"\n", f"{key}.txt": b"a caption"}


def into_tars(
    root: Path, out: Path, kind: str = "cls", name: str = "{split}-{shard:06d}.tar"
) -> Path:
    for split in ("train", "val"):
        rows = files_of(root / split)
        for shard in range(NUM_SHARDS):
            members = {}
            for row in rows[shard::NUM_SHARDS]:
                members |= members_of(kind, *row)
            write_tar(out / name.format(split=split, shard=shard), members)
    return out


def image_type():
    import pyarrow

    return pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})


def table_of(rows, classes: list[str] | None, is_struct: bool = True):
    """A table as the Hub has it: labels are numbers with the classes' names in the metadata, or the
    names themselves.
    """
    import pyarrow

    labels = (
        [row[0] for row in rows] if classes is None else [classes.index(row[0]) for row in rows]
    )
    images = [{"bytes": row[2], "path": row[1]} if is_struct else row[2] for row in rows]
    table = pyarrow.table(
        {
            "image": pyarrow.array(images, image_type() if is_struct else pyarrow.binary()),
            "label": labels,
        }
    )
    if classes is None:
        return table
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def into_parquet(
    root: Path,
    out: Path,
    classes: list[str] | None = None,
    val: str = "validation",
    group_rows: int = 4,
    **changes,
) -> Path:
    import pyarrow.parquet

    (out / "data").mkdir(parents=True, exist_ok=True)
    for split, word in (("train", "train"), ("val", val)):
        rows = files_of(root / split)
        for shard in range(NUM_SHARDS):
            path = out / "data" / f"{word}-{shard:05d}-of-{NUM_SHARDS:05d}.parquet"
            pyarrow.parquet.write_table(
                table_of(rows[shard::NUM_SHARDS], classes, **changes),
                path,
                row_group_size=group_rows,
            )
    return out


def into_datasets(
    root: Path, out: Path, classes: list[str], val: str = "validation", num_shards: int = 2
) -> Path:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    )
    splits = {}
    for split, word in (("train", "train"), ("val", val)):
        rows = [
            {"image": {"bytes": row[2], "path": row[1]}, "label": row[0]}
            for row in files_of(root / split)
        ]
        splits[word] = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(
        str(out), num_shards=dict.fromkeys(splits, num_shards)
    )
    return out
