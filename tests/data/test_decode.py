"""Decoding every kind of file, and the two geometries against timm and torchvision."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform
from torchvision.transforms import functional

from trainer.data.decode import (
    RESAMPLING,
    BadImage,
    evaluation_square,
    oddities,
    read_image,
    stack_squares,
    train_square,
)

PHOTOS = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
SMALL = PHOTOS[1].resize((64, 48))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
    assert np.array_equal(found, np.rint(levels / 257).astype(np.uint8)[..., None].repeat(3, axis=2))
    assert oddities(path) == ("16-bit grey",)


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


def photo_crops(num_crops):
    """Crops of two photos, of many sizes and aspects, some smaller than what is cut out of them."""
    rng = np.random.default_rng(0)
    for number in range(num_crops):
        photo = PHOTOS[number % 2]
        width, height = rng.integers(40, photo.width), rng.integers(40, photo.height)
        left, top = rng.integers(0, photo.width - width), rng.integers(0, photo.height - height)
        yield photo.crop((left, top, left + width, top + height))


@pytest.mark.parametrize(
    ("test_px", "share", "interpolation"), [(224, 0.95, "bicubic"), (224, 0.965, "bilinear"), (160, 0.875, "bicubic")]
)
def test_evaluation_images_equal_timms(test_px, share, interpolation):
    transform = create_transform(
        test_px, is_training=False, crop_pct=share, interpolation=interpolation, use_prefetcher=True
    )
    for crop in photo_crops(40):
        found = stack_squares([evaluation_square(crop, test_px, share, interpolation)], test_px)[0]
        assert np.array_equal(found.transpose(2, 0, 1), np.asarray(transform(crop)))


def test_train_squares_equal_torchvisions_resized_crop():
    rng = np.random.default_rng(1)
    for number, photo in enumerate(photo_crops(20)):
        height, width = rng.integers(1, photo.height + 1), rng.integers(1, photo.width + 1)
        top, left = rng.integers(0, photo.height - height + 1), rng.integers(0, photo.width - width + 1)
        resampling = RESAMPLING["bicubic" if number % 2 else "bilinear"]
        name = functional.InterpolationMode.BICUBIC if number % 2 else functional.InterpolationMode.BILINEAR
        expected = functional.resized_crop(photo, top, left, height, width, [96, 96], name)
        found = stack_squares([train_square(photo, (top, left, height, width), resampling, 96)], 96)[0]
        assert np.array_equal(found, np.asarray(expected))


def test_grey_squares_keep_one_channel():
    grey = SMALL.convert("L")
    pixels = stack_squares([evaluation_square(grey, 32, 1.0, "bilinear")] * 2, 32)
    assert pixels.shape == (2, 32, 32, 1) and pixels.flags.writeable
    colour = stack_squares([evaluation_square(grey.convert("RGB"), 32, 1.0, "bilinear")], 32)
    assert torch.equal(torch.from_numpy(pixels[0]).expand(-1, -1, 3), torch.from_numpy(colour[0]))
