"""Decoding every kind of file, and the two geometries against timm and torchvision."""

import errno
import io
import os
import resource
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform
from torchvision.transforms import functional

from support.packing import encoded
from trainer.data import decode
from trainer.data.decode import (
    NO_ANTIALIAS,
    RESAMPLING,
    BadImage,
    DataTrouble,
    Planes,
    evaluation_square,
    oddities,
    read_image,
    stack_squares,
    train_square,
)
from trainer.data.jpeg import read_for_training
from trainer.data.transforms import fill_of

PHOTOS = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
SMALL = PHOTOS[1].resize((64, 48))


def palette_with_transparency():
    return encoded(SMALL.quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(SMALL, "JPEG", exif=exif)


ODD_FILES = {
    "CMYK": encoded(SMALL.convert("CMYK"), "JPEG"),
    "palette": palette_with_transparency(),
    "1-bit": encoded(SMALL.convert("1"), "PNG"),
    "alpha": encoded(SMALL.convert("RGBA"), "PNG"),
    "EXIF-rotated": rotated(),
}


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("kind", ODD_FILES)
def test_odd_files_become_what_pil_makes_of_them(tmp_path, kind):
    path = tmp_path / "odd"
    path.write_bytes(ODD_FILES[kind])
    expected = Image.open(path).convert("RGB")
    found = read_image(path)
    assert found.mode == "RGB" and found.tobytes() == expected.tobytes()
    assert oddities(path) == (kind,)


def test_alpha_is_dropped_not_composited(tmp_path):
    red_unseen = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    red_unseen.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_left_alone(tmp_path):
    (tmp_path / "a.jpg").write_bytes(rotated())
    assert read_image(tmp_path / "a.jpg").size == SMALL.size


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, kind):
    levels = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    levels[-1, -1] = 65535
    path = tmp_path / f"deep.{kind}"
    Image.fromarray(levels).save(path)
    found = np.asarray(read_image(path))
    assert np.array_equal(
        found, np.rint(levels / 257).astype(np.uint8)[..., None].repeat(3, axis=2)
    )
    assert oddities(path) == ("16-bit grey",)


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4), "float"),
        (np.full((4, 4), 70_000, np.int32), "32-bit"),
        (np.full((4, 4), -5, np.int32), "32-bit"),
    ],
)
@pytest.mark.parametrize("look", [read_image, oddities])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_without_a_known_white_are_refused(tmp_path, pixels, kind, look, channels):
    path = tmp_path / "a.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(BadImage, match=rf"a\.tif: {kind}.*no rule scales"):
        look(path, channels)


def test_12_bits_are_scaled_where_the_format_says_so_and_listed_where_it_does_not(tmp_path):
    levels = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "a.png")  # says 16 bits
    (tmp_path / "a.pgm").write_bytes(b"P5 16 16 4095\n" + levels.astype(">u2").tobytes())
    assert np.asarray(read_image(tmp_path / "a.png", 1)).max() == 16
    assert oddities(tmp_path / "a.png") == ("16-bit grey, nothing above 4095: nearly black",)
    found = np.asarray(read_image(tmp_path / "a.pgm", 1)).astype(float)
    assert np.abs(found - levels.astype(int) * 255 / 4095).max() <= 0.51
    assert oddities(tmp_path / "a.pgm") == ("16-bit grey",)
    (tmp_path / "a.tif").write_bytes(tiff_of_12_bits(levels))
    found = np.asarray(read_image(tmp_path / "a.tif", 1)).astype(float)
    assert np.abs(found - levels.astype(int) * 255 / 4095).max() <= 0.51


def tiff_of_12_bits(levels):
    """A little-endian TIFF of one uncompressed strip of packed 12-bit samples, by the format's
    specification (TIFF 6.0).
    """
    height, width = levels.shape
    pairs = levels.reshape(-1, 2).astype(int)
    first, second = pairs.T
    strip = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: height}
    tags[279] = strip.size
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = start
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    header = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    return header + entries + bytes(4) + strip.astype(np.uint8).tobytes()


def test_16_bit_colour_is_listed(tmp_path):
    def chunk(kind, content):
        sum_ = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + sum_

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    rows = zlib.compress(b"\0" + np.arange(6, dtype=">u2").tobytes())
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(content)
    assert oddities(tmp_path / "a.png") == ("16-bit colour",)


@pytest.mark.parametrize(("value", "kinds"), [(0, ()), (1, ()), (8, ("EXIF-rotated",)), (9, ())])
def test_only_orientations_that_exist_are_listed(tmp_path, value, kinds):
    exif = Image.Exif()
    exif[0x0112] = value
    SMALL.save(tmp_path / "a.jpg", exif=exif)
    assert oddities(tmp_path / "a.jpg") == kinds


def test_a_png_with_malformed_exif_is_a_good_image(tmp_path):
    SMALL.save(tmp_path / "a.png", exif=b"Exif\0\0no TIFF header, as some cameras write")
    assert read_image(tmp_path / "a.png").tobytes() == SMALL.tobytes()
    assert oddities(tmp_path / "a.png") == ("malformed EXIF",)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"\0\0\0\x20ftypavif" + bytes(40), "AVIF"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "JPEG 2000"),
        (b"\0\0\x01\0\x01\0" + bytes(40), "ICO"),
    ],
)
def test_a_known_format_that_is_not_read_is_named(tmp_path, content, name):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BadImage, match=f"the format {name} is not read"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("size", [(2, 60_000), (60_000, 2)])
def test_an_extreme_shape_is_evaluated_in_bounded_memory(size):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    tracked = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square = evaluation_square(Image.fromarray(values), 224, 0.875, "bicubic")
    assert len(square) == 224 * 224 * 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - tracked < 300 * 1024  # KiB


@pytest.mark.parametrize("interpolation", RESAMPLING)
@pytest.mark.parametrize("bands", ["image", "planes"])
def test_a_part_resized_alone_is_the_part_of_the_whole_resized(monkeypatch, interpolation, bands):
    for photo in photo_crops(10):
        image = photo if bands == "image" else Planes(photo.split())
        whole = evaluation_square(image, 96, 0.875, interpolation)
        with monkeypatch.context() as small:
            small.setattr(decode, "_MOST_RESIZED_PX", 1)
            part = evaluation_square(image, 96, 0.875, interpolation)
        whole, part = (np.frombuffer(one, np.uint8).astype(int) for one in (whole, part))
        # PIL may resize rows and columns in another order, and rounds in between
        assert np.abs(whole - part).mean() <= 0.3 and np.abs(whole - part).max() <= 12


def test_a_plain_file_is_not_odd(tmp_path):
    SMALL.save(tmp_path / "a.jpg")
    assert oddities(tmp_path / "a.jpg") == ()


BAD_FILES = {
    "0 bytes": b"",
    "not an image": b"<html>404</html>",
    "truncated": encoded(SMALL, "JPEG")[:700],
    "broken": encoded(SMALL, "PNG")[:60] + b"\0" * 600,
}


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("look", [read_image, oddities])
def test_a_bad_file_is_named_with_its_reason_in_one_line(tmp_path, look, kind):
    path = tmp_path / "bad.jpg"
    path.write_bytes(BAD_FILES[kind])
    with pytest.raises(BadImage) as refused:
        look(path)
    text = str(refused.value)
    assert text.startswith(f"{path}: cannot be decoded (") and "\n" not in text
    assert kind in text


def test_a_missing_file_is_a_bad_image(tmp_path):
    with pytest.raises(BadImage, match="No such file"):
        read_image(tmp_path / "gone.jpg")
    (tmp_path / "link.jpg").symlink_to("gone.jpg")
    with pytest.raises(BadImage, match="No such file"):
        read_image(tmp_path / "link.jpg")


def test_one_in_a_folder_that_is_gone_is_not(tmp_path):
    with pytest.raises(DataTrouble, match="ENOENT"):
        read_image(tmp_path / "gone" / "image.jpg")


@pytest.mark.parametrize("name", ["ESTALE", "EIO", "EACCES", "EMFILE", "ENOTCONN", "ETIMEDOUT"])
def test_what_the_system_says_of_reading_is_no_bad_image(tmp_path, monkeypatch, name):
    def failing(path):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)), str(path))

    path = tmp_path / "image.png"
    path.write_bytes(encoded(SMALL, "PNG"))
    monkeypatch.setattr(Path, "read_bytes", failing)
    for read in (read_image, oddities):
        with pytest.raises(DataTrouble, match=f"{path}: {name}"):
            read(path)


def test_memory_that_runs_out_is_no_bad_image(tmp_path, monkeypatch):
    def failing(image, mode):
        raise MemoryError

    path = tmp_path / "image.png"
    path.write_bytes(encoded(SMALL.convert("L"), "PNG"))
    monkeypatch.setattr(Image.Image, "convert", failing)
    with pytest.raises(DataTrouble, match=f"{path}: not enough memory"):
        read_image(path)


def photo_crops(num_crops):
    """Crops of two photos, of many sizes and aspects, some smaller than what is cut out of them."""
    rng = np.random.default_rng(0)
    for number in range(num_crops):
        photo = PHOTOS[number % 2]
        width, height = rng.integers(40, photo.width), rng.integers(40, photo.height)
        left, top = rng.integers(0, photo.width - width), rng.integers(0, photo.height - height)
        yield photo.crop((left, top, left + width, top + height))


@pytest.mark.parametrize(
    ("test_px", "share", "interpolation"),
    [(224, 0.95, "bicubic"), (224, 0.965, "bilinear"), (160, 0.875, "bicubic")],
)
def test_evaluation_images_equal_timms(test_px, share, interpolation):
    transform = create_transform(
        test_px, is_training=False, crop_pct=share, interpolation=interpolation, use_prefetcher=True
    )
    for crop in photo_crops(40):
        found = stack_squares([evaluation_square(crop, test_px, share, interpolation)], test_px)[0]
        assert np.array_equal(found.transpose(2, 0, 1), np.asarray(transform(crop)))


@pytest.mark.parametrize("mode", ["squash", "border"])
@pytest.mark.parametrize(("test_px", "share"), [(224, 1.0), (96, 0.875)])
def test_evaluation_images_of_other_crop_modes_equal_timms(mode, test_px, share):
    mean = (0.485, 0.456, 0.406)
    transform = create_transform(
        test_px, is_training=False, crop_pct=share, interpolation="bicubic", crop_mode=mode,
        mean=mean, use_prefetcher=True,
    )  # fmt: skip
    fill = fill_of(SimpleNamespace(mean=mean))
    for crop in photo_crops(40):
        square = evaluation_square(crop, test_px, share, "bicubic", mode, fill)
        found = stack_squares([square], test_px)[0]
        assert np.array_equal(found.transpose(2, 0, 1), np.asarray(transform(crop)))


def test_a_border_around_grey_images_and_planes_is_their_own():
    grey = Image.fromarray(np.full((20, 40), 200, np.uint8))
    square = evaluation_square(grey, 32, 1.0, "bilinear", "border", (30, 60, 90))
    pixels = np.frombuffer(square, np.uint8).reshape(32, 32, 1)
    assert (pixels[:8] == 60).all() and (pixels[8:24] == 200).all() and (pixels[24:] == 60).all()


def test_train_squares_equal_torchvisions_resized_crop():
    rng = np.random.default_rng(1)
    for number, photo in enumerate(photo_crops(20)):
        height, width = rng.integers(1, photo.height + 1), rng.integers(1, photo.width + 1)
        top, left = (
            rng.integers(0, photo.height - height + 1),
            rng.integers(0, photo.width - width + 1),
        )
        resampling = RESAMPLING["bicubic" if number % 2 else "bilinear"]
        name = (
            functional.InterpolationMode.BICUBIC
            if number % 2
            else functional.InterpolationMode.BILINEAR
        )
        expected = functional.resized_crop(photo, top, left, height, width, [96, 96], name)
        found = train_square(photo, (top, left, height, width), resampling, 96)
        assert np.array_equal(found.transpose(1, 2, 0), np.asarray(expected))


def test_grey_squares_keep_one_channel():
    grey = SMALL.convert("L")
    pixels = stack_squares([evaluation_square(grey, 32, 1.0, "bilinear")] * 2, 32)
    assert pixels.shape == (2, 32, 32, 1) and pixels.flags.writeable
    colour = stack_squares([evaluation_square(grey.convert("RGB"), 32, 1.0, "bilinear")], 32)
    assert torch.equal(torch.from_numpy(pixels[0]).expand(-1, -1, 3), torch.from_numpy(colour[0]))


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("kind", [*ODD_FILES, "plain"])
def test_one_channel_is_the_luma_of_what_three_would_be(tmp_path, kind):
    path = tmp_path / "odd"
    path.write_bytes(ODD_FILES.get(kind) or encoded(SMALL, "JPEG"))
    red, green, blue = np.asarray(Image.open(path).convert("RGB")).astype(float).transpose(2, 0, 1)
    found = read_image(path, 1)
    # ITU-R BT.601, which PIL rounds in 16-bit fixed point
    assert (
        found.mode == "L"
        and np.abs(np.asarray(found) - (0.299 * red + 0.587 * green + 0.114 * blue)).max() <= 0.51
    )
    assert oddities(path, 1) == (() if kind == "plain" else (kind,))


def test_grey_files_are_seen_as_they_are_in_one_channel(tmp_path):
    grey = np.asarray(SMALL.convert("L"))
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    np.save(tmp_path / "flat.npy", grey)
    np.save(tmp_path / "one.npy", grey[:, :, None])
    for name in ("8.png", "16.png", "flat.npy", "one.npy"):
        assert np.array_equal(np.asarray(read_image(tmp_path / name, 1)), grey)


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_of_three_channels_is_the_png_of_its_pixels(tmp_path, order):
    SMALL.save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.asarray(SMALL, order=order))
    array, png = (read_image(tmp_path / name) for name in ("a.npy", "a.png"))
    assert (array.mode, array.size, array.tobytes()) == (png.mode, png.size, png.tobytes())
    assert oddities(tmp_path / "a.npy") == ()


@pytest.mark.parametrize("interpolation", RESAMPLING)
def test_planes_become_the_same_squares_as_an_rgb_image(interpolation):
    rng = np.random.default_rng(2)
    for photo in photo_crops(10):
        planes = Planes(photo.split())
        height, width = rng.integers(1, photo.height + 1), rng.integers(1, photo.width + 1)
        box = (
            rng.integers(0, photo.height - height + 1),
            rng.integers(0, photo.width - width + 1),
            height,
            width,
        )
        assert planes.size == photo.size and planes.tobytes() == photo.tobytes()
        squares = [
            train_square(image, box, RESAMPLING[interpolation], 48) for image in (planes, photo)
        ]
        assert np.array_equal(*squares)
        squares = [evaluation_square(image, 48, 0.9, interpolation) for image in (planes, photo)]
        assert squares[0] == squares[1]


@pytest.mark.parametrize("channels", [2, 4, 5, 64])
def test_any_number_of_channels_is_cropped_and_resized_channel_by_channel(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, channels), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    found = train_square(
        read_image(tmp_path / "a.npy", channels), (3, 5, 20, 25), RESAMPLING["bicubic"], 16
    )
    assert found.shape == (channels, 16, 16)
    for channel in range(channels):
        part = Image.fromarray(pixels[3:23, 5:30, channel]).resize(
            (16, 16), Image.Resampling.BICUBIC
        )
        assert np.array_equal(found[channel], np.asarray(part))


@pytest.mark.parametrize(
    ("mode", "name"), [("RGBA", "a.png"), ("RGBA", "a.tif"), ("CMYK", "a.tif"), ("LA", "a.png")]
)
def test_images_with_as_many_bands_are_taken_as_they_lie(tmp_path, mode, name):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, bands), dtype=np.uint8)
    Image.fromarray(pixels, mode).save(tmp_path / name)
    found = read_image(tmp_path / name, bands)
    assert np.array_equal(np.frombuffer(found.tobytes(), np.uint8).reshape(9, 7, bands), pixels)
    assert oddities(tmp_path / name, bands) == ()  # alpha is no oddity where it is a channel


class Explosive:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            npy(np.zeros((4, 5, 3), np.uint8)),
            "channels: 3, where the profile has 4; use your own profile",
        ),
        (npy(np.zeros((4, 5), np.uint8)), "channels: 1, where the profile has 4; "),
        (encoded(SMALL, "JPEG"), r"channels: 3 \(mode RGB\), where the profile has 4; "),
        (palette_with_transparency(), r"channels: 1 \(mode P\), where the profile has 4; "),
        (npy(np.zeros((4, 5, 4), np.float32)), r"an array \[4, 5, 4\] of float32; use .* of uint8"),
        (npy(np.zeros((4, 4), np.int16)), "an array .* of int16"),
        (npy(np.zeros((4, 5, 4, 4), np.uint8)), "an array "),
        (npy(np.zeros((0, 5, 4), np.uint8)), "an array "),
        (npy(np.zeros((4, 5, 4), np.uint8))[:-9], "cannot be decoded"),
        (npy(np.zeros((4, 5, 4), np.uint8))[:30], "cannot be decoded"),
    ],
)
@pytest.mark.parametrize("look", [read_image, oddities])
def test_what_is_no_image_of_the_profiles_channels_is_named_in_one_line(
    tmp_path, look, content, message
):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(BadImage, match=message) as refused:
        look(path, 4)
    text = str(refused.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and "; use " in text


def test_a_pickle_in_an_array_file_is_not_opened(tmp_path):
    path, made = tmp_path / "a.npy", tmp_path / "made"
    path.write_bytes(npy(np.array([Explosive(made)], dtype=object), allow_pickle=True))
    with pytest.raises(BadImage, match="allow_pickle"):
        read_image(path, 4)
    assert not made.exists()


def four_nearest(pixels, side_h, side_w):
    """Bilinear without smoothing, from its description: each new pixel's center, read between the
    four nearest old centers, the edge repeated.
    """
    height, width = pixels.shape[:2]
    made = np.zeros((side_h, side_w, pixels.shape[2]))
    for i in range(side_h):
        for j in range(side_w):
            y, x = (i + 0.5) * height / side_h - 0.5, (j + 0.5) * width / side_w - 0.5
            top, left = int(np.floor(y)), int(np.floor(x))
            for row, row_share in ((top, 1 - (y - top)), (top + 1, y - top)):
                for column, share in ((left, 1 - (x - left)), (left + 1, x - left)):
                    pixel = pixels[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
                    made[i, j] += row_share * share * pixel
    return made


@pytest.mark.parametrize("box", [(0, 0, 48, 64), (5, 7, 40, 30), (10, 10, 9, 11)])
def test_a_crop_without_antialias_reads_the_four_nearest_pixels(box):
    top, left, height, width = box
    square = train_square(SMALL, box, NO_ANTIALIAS, 16)
    part = np.asarray(SMALL)[top : top + height, left : left + width].astype(float)
    assert np.abs(square.transpose(1, 2, 0) - four_nearest(part, 16, 16)).max() <= 1
    grey = train_square(SMALL.convert("L"), box, NO_ANTIALIAS, 16)
    assert grey.shape == (1, 16, 16)
    planes = train_square(Planes(SMALL.split()), box, NO_ANTIALIAS, 16)
    assert np.array_equal(planes, square)


def test_a_jpeg_for_training_is_read_without_antialias_too(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(PHOTOS[0], "JPEG", quality=95))
    boxes = [(10, 20, 400, 600), (0, 0, 427, 640), (100, 100, 60, 70)]
    image, whole = read_for_training(path), read_image(path)
    shared = image.decoded_for([(box, NO_ANTIALIAS) for box in boxes], 32)
    for box in boxes:
        expected = train_square(whole, box, NO_ANTIALIAS, 32).astype(int)
        for one in (image, shared):  # half the size and less, but never decoded smaller
            assert np.abs(one.square(box, NO_ANTIALIAS, 32) - expected).mean() < 0.5


def test_an_evaluation_without_antialias_reads_the_four_nearest_pixels():
    made = np.frombuffer(evaluation_square(SMALL, 16, 0.8, "bilinear_no_antialias"), np.uint8)
    whole = four_nearest(np.asarray(SMALL).astype(float), 20, 26)
    assert np.abs(made.reshape(16, 16, 3) - whole[2:18, 5:21]).max() <= 1
