"""GPU kernels of the operations on images and of what makes the model's input of them.

Each is a function of (images, a row of numbers per image) that rounds as the tensor operations do
on a CPU, which are its reference: no multiplication is fused with an addition unless it says so
(`enable_fp_fusion=False` at the launch). `fused` packs the rows and launches; only it imports this.

Images lie as [B, C, H, W] uint8, contiguous. Every program takes BLOCK pixels or values of one
image. Needs Triton, whose interpreter wants a condition of many values to be compared as many.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trainer.components.pixels import rows

COPY, LOOK_UP, COLOR, SHARPNESS, ALONG_X, _, ALONG_BOTH, NEAREST = map(tl.constexpr, rows.KINDS)
CONTRAST, AUTOCONTRAST, _ = map(tl.constexpr, rows.MEASURED)
BOX, KEY, SOURCE, PARTNER, PASTED, SHARE, REST, COLOUR = map(tl.constexpr, rows.INPUT)
NO_BOX, NOISE, _ = map(tl.constexpr, rows.ERASED)
OPERATION_LENGTH, TABLE_LENGTH = map(tl.constexpr, (rows.OPERATION_LENGTH, rows.TABLE_LENGTH))

# A row's or a table's place changes from call to call: one compiled kernel serves them all.
_from_any_place = triton.jit(do_not_specialize_on_alignment=["numbers", "tables"])


@_from_any_place
def measure_kernel(images, numbers, tables, num_px, C: tl.constexpr, BLOCK: tl.constexpr):
    """Tables that follow from an image: [M, C, 256] uint8, for numbers [M, TABLE_LENGTH] float64.

    Grid (M, C). Source: lookup.contrast, autocontrast and equalize.
    """
    member, channel = tl.program_id(0), tl.program_id(1)
    row = numbers + member * TABLE_LENGTH
    pixels = images + tl.load(row).to(tl.int64) * C * num_px
    kind = tl.load(row + 1).to(tl.int32)
    levels = tl.arange(0, 256)
    place = tl.arange(0, BLOCK)
    if kind == CONTRAST:
        total = tl.zeros([BLOCK], tl.int64)
        for start in range(0, num_px, BLOCK):
            here = start + place < num_px
            if C == 3:
                total += _grey(pixels + start + place, num_px, here)  # zero elsewhere
            else:
                for each in range(C):
                    total += tl.load(pixels + each * num_px + start + place, here, 0).to(tl.int64)
        num_values = (num_px if C == 3 else C * num_px).to(tl.float64)
        mean = tl.floor(tl.sum(total).to(tl.float64) / num_values + 0.5).to(tl.float32)
        factor = tl.load(row + 2).to(tl.float32)
        table = _bytes((levels.to(tl.float32) - mean) * factor + mean)
    else:
        counts = tl.zeros([256], tl.int32)
        for start in range(0, num_px, BLOCK):
            here = start + place < num_px
            values = tl.load(pixels + channel * num_px + start + place, here, 0).to(tl.int32)
            counts += tl.histogram(values, 256, here)
        high = tl.max(tl.where(counts > 0, levels, 0))
        if kind == AUTOCONTRAST:
            low = tl.min(tl.where(counts > 0, levels, 255))
            span = tl.maximum(high - low, 1).to(tl.float64)
            scale = tl.full([], 255.0, tl.float64) / span
            stretched = levels.to(tl.float64) * scale + (0 - low).to(tl.float64) * scale
            table = tl.where(high == low, levels, _clipped(stretched).to(tl.int32)).to(tl.uint8)
        else:
            below = tl.cumsum(counts, 0) - counts
            step = (num_px - tl.sum(tl.where(levels == high, counts, 0))) // 255
            spread = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
            table = tl.where(step == 0, levels, spread).to(tl.uint8)
    tl.store(tables + (member * C + channel).to(tl.int64) * 256 + levels, table)


@_from_any_place
def operate_kernel(
    images, result, numbers, tables, fill, height, width, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Each image after its own operation, to uint8 of the same shape. Grid (B, blocks of pixels).

    numbers: [B, OPERATION_LENGTH] float64. LOOK_UP: (kind, the first channel's place in tables [T,
    256] uint8, how far the next one's is). COLOR, SHARPNESS: (kind, factor). Those that move
    pixels: (kind, is it bicubic?) and up to six numbers of _along_one or _along_both. fill: [C]
    uint8.
    """
    image = tl.program_id(0).to(tl.int64)
    num_px = height * width
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = place < num_px
    pixels, target, row = (
        images + image * C * num_px,
        result + image * C * num_px,
        numbers + image * OPERATION_LENGTH,
    )
    kind = tl.load(row).to(tl.int32)
    if kind == COPY:
        for channel in range(C):
            value = tl.load(pixels + channel * num_px + place, here)
            tl.store(target + channel * num_px + place, value, here)
    elif kind == LOOK_UP:
        table, apart = tl.load(row + 1).to(tl.int64), tl.load(row + 2).to(tl.int64)
        for channel in range(C):
            value = tl.load(pixels + channel * num_px + place, here, 0).to(tl.int32)
            found = tl.load(tables + (table + channel * apart) * 256 + value, here)
            tl.store(target + channel * num_px + place, found, here)
    elif kind == COLOR:
        if C == 3:
            grey = _grey(pixels + place, num_px, here).to(tl.float32)
            factor = tl.load(row + 1).to(tl.float32)
            for channel in range(C):
                value = tl.load(pixels + channel * num_px + place, here, 0).to(tl.float32)
                blended = _bytes((value - grey) * factor + grey)
                tl.store(target + channel * num_px + place, blended, here)
    elif kind == SHARPNESS:
        factor = tl.load(row + 1).to(tl.float32)
        for channel in range(C):
            _sharpen(
                pixels + channel * num_px, target + channel * num_px, factor, place, height, width
            )
    elif kind >= ALONG_BOTH:  # or NEAREST
        _along_both(pixels, target, row, kind, fill, place, height, width, C)
    else:
        _along_one(pixels, target, row, kind == ALONG_X, fill, place, height, width, C)


@triton.jit
def _grey(red, num_px, here):
    """The luma at pointers into the first of three channels, int64. Source: color.grey."""
    r = tl.load(red, here, 0).to(tl.int64)
    g = tl.load(red + num_px, here, 0).to(tl.int64)
    b = tl.load(red + 2 * num_px, here, 0).to(tl.int64)
    return (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16


@triton.jit
def _clipped(values):
    return tl.minimum(tl.maximum(values, 0.0), 255.0)


@triton.jit
def _bytes(values):
    """Clipped to 0..255 and truncated."""
    return _clipped(values).to(tl.int32).to(tl.uint8)


@triton.jit
def _sharpen(pixels, target, factor, place, height, width):
    """One channel. Source: filters.sharpness."""
    here = place < height * width
    y, x = place // width, place % width
    inside = here & (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    center = tl.load(pixels + place, here, 0).to(tl.int32)
    total = 4 * center
    for down in tl.static_range(-1, 2):
        for right in tl.static_range(-1, 2):
            total += tl.load(pixels + place + down * width + right, inside, 0).to(tl.int32)
    # (total + 6.5) / 13, rounded down, in whole numbers
    smooth = tl.where(inside, (2 * total + 13) // 26, center).to(tl.float32)
    tl.store(target + place, _bytes((center.to(tl.float32) - smooth) * factor + smooth), here)


@triton.jit
def _along_one(pixels, target, row, is_x, fill, place, height, width, C: tl.constexpr):
    """Pixels moved along one axis: line l is read l * row[3] + row[2] px further on.

    Source: geometry._moved_along.
    """
    here = place < height * width
    y, x = place // width, place % width
    line, along = tl.where(is_x, y, x), tl.where(is_x, x, y)
    length, step = tl.where(is_x, width, height), tl.where(is_x, 1, width)
    begin = tl.load(row + 2) + tl.load(row + 3) * line.to(tl.float64)
    first = tl.floor(begin)
    is_inside = (along >= tl.ceil(-0.5 - begin).to(tl.int64)) & (
        along < tl.ceil(length.to(tl.float64) - 0.5 - begin).to(tl.int64)
    )
    is_bicubic = tl.zeros_like(place) + tl.load(row + 1).to(tl.int32) != 0
    weights = _weights((begin - first).to(tl.float32), is_bicubic)
    left = along + first.to(tl.int64)
    base = line * tl.where(is_x, width, 1)
    for channel in range(C):
        plane = channel * height * width
        read = pixels + plane + base
        value = _taps(read, left, length, step, weights, here & is_inside, is_bicubic)
        _put(target + plane + place, _bytes(value), is_inside, fill + channel, here)


@triton.jit
def _along_both(pixels, target, row, kind, fill, place, height, width, C: tl.constexpr):
    """Pixel (x, y) is read at row[2] + y * row[3] + x * row[4] px across, counted from the centre
    of the first pixel, and at row[5] + y * row[6] + x * row[7] down; NEAREST in 2**-16 px, counted
    from the first pixel's edge.

    Source: geometry.affine.
    """
    here = place < height * width
    y, x = (place // width).to(tl.float64), (place % width).to(tl.float64)
    across = tl.load(row + 2) + tl.load(row + 3) * y + tl.load(row + 4) * x
    down = tl.load(row + 5) + tl.load(row + 6) * y + tl.load(row + 7) * x
    if kind == NEAREST:  # whole numbers, which float64 holds exactly
        left, top = across.to(tl.int64) >> 16, down.to(tl.int64) >> 16
        is_inside = (left >= 0) & (left < width) & (top >= 0) & (top < height)
        for channel in range(C):
            plane = channel * height * width
            value = tl.load(pixels + plane + top * width + left, here & is_inside, 0)
            _put(target + plane + place, value, is_inside, fill + channel, here)
    else:
        is_inside = (across >= -0.5) & (across < width - 0.5)
        is_inside = is_inside & (down >= -0.5) & (down < height - 0.5)
        is_bicubic = tl.zeros_like(place) + tl.load(row + 1).to(tl.int32) != 0
        left, top = tl.floor(across), tl.floor(down)
        weights = _weights((across - left).to(tl.float32), is_bicubic)
        weights_down = _weights((down - top).to(tl.float32), is_bicubic)
        left, top = left.to(tl.int64), top.to(tl.int64)
        read = here & is_inside
        outer = read & is_bicubic
        r0, r1 = _within(top - 1, height) * width, _within(top, height) * width
        r2, r3 = _within(top + 1, height) * width, _within(top + 2, height) * width
        for channel in range(C):
            plane = channel * height * width
            source = pixels + plane
            t0 = _taps(source + r0, left, width, 1, weights, outer, is_bicubic)
            t1 = _taps(source + r1, left, width, 1, weights, read, is_bicubic)
            t2 = _taps(source + r2, left, width, 1, weights, read, is_bicubic)
            t3 = _taps(source + r3, left, width, 1, weights, outer, is_bicubic)
            value = _interpolated(t0, t1, t2, t3, weights_down)
            _put(target + plane + place, _bytes(value), is_inside, fill + channel, here)


@triton.jit
def _put(target, value, is_inside, fill, here):
    """The fill colour where nothing inside was read."""
    tl.store(target, tl.where(is_inside, value, tl.load(fill)), here)


@triton.jit
def _within(place, length):
    """Beyond the border the border is repeated."""
    return tl.minimum(tl.maximum(place, 0), length - 1)


@triton.jit
def _taps(line, left, length, step, weights, read, is_bicubic):
    """What a filter makes of the pixels left - 1 to left + 2 of a line; zero where not read."""
    outer = read & is_bicubic
    t0 = tl.load(line + _within(left - 1, length) * step, outer, 0).to(tl.float32)
    t1 = tl.load(line + _within(left, length) * step, read, 0).to(tl.float32)
    t2 = tl.load(line + _within(left + 1, length) * step, read, 0).to(tl.float32)
    t3 = tl.load(line + _within(left + 2, length) * step, outer, 0).to(tl.float32)
    return _interpolated(t0, t1, t2, t3, weights)


@triton.jit
def _weights(share, is_bicubic):
    """Source: geometry._weights; bilinear is bicubic without its bend."""
    rest = 1 - share
    bend = tl.where(is_bicubic, share * rest, 0.0)
    outer_right = bend * share
    return share + outer_right, bend * rest, outer_right


@triton.jit
def _interpolated(outer_left, left, right, outer_right, weights):
    """Source: geometry._interpolated, whose addcmul is a fused multiplication on a CPU too."""
    value = tl.fma(right - left, weights[0], left)
    value = tl.fma(left - outer_left, weights[1], value)
    return tl.fma(left - outer_right, weights[2], value)


@_from_any_place
def inputs_kernel(
    images, result, numbers, mean, std, height, width,
    C: tl.constexpr, ROW_LENGTH: tl.constexpr, ERASED: tl.constexpr, MIXED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Model inputs: normalized, moved in colour or erased, mixed, in the result's type and order.

    images: [B, C, H, W] uint8. result: [N, C, H, W] floats, contiguous or channels_last; its image
    n is images[SOURCE of row n], mixed with the PARTNER of that image's row. numbers: [B,
    ROW_LENGTH] int32. mean, std: [C] float32, in grey levels. ERASED: NO_BOX, or what boxes are
    filled with. Grid (N, blocks of values).
    """
    number = tl.program_id(0).to(tl.int64)
    num_px = height * width
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = index < C * num_px
    # in the order of the result, so that it is written without gaps
    if CHANNELS_LAST:
        place, channel = index // C, index % C
    else:
        place, channel = index % num_px, index // num_px
    of_channel = tl.load(mean + channel, here, 0.0), tl.load(std + channel, here, 1.0)
    y, x = place // width, place % width
    source = tl.load(numbers + number * ROW_LENGTH + SOURCE)
    value = _normal(
        images,
        numbers,
        source,
        channel,
        y,
        x,
        of_channel,
        height,
        width,
        here,
        C,
        ROW_LENGTH,
        ERASED,
    )
    if MIXED:
        row = numbers + source.to(tl.int64) * ROW_LENGTH
        partner = tl.load(row + PARTNER)
        if partner != source:
            top, left = tl.load(row + PASTED), tl.load(row + PASTED + 1)
            bottom, right = tl.load(row + PASTED + 2), tl.load(row + PASTED + 3)
            is_pasted = (y >= top) & (y < bottom) & (x >= left) & (x < right)
            share = tl.load(row + SHARE).to(tl.float32, bitcast=True)
            rest = tl.load(row + REST).to(tl.float32, bitcast=True)
            read = here & (is_pasted | (tl.zeros_like(value) + share < 1))
            other = _normal(
                images,
                numbers,
                partner,
                channel,
                y,
                x,
                of_channel,
                height,
                width,
                read,
                C,
                ROW_LENGTH,
                ERASED,
            )
            value = tl.where(is_pasted, other, other * rest + value * share)
    tl.store(result + number * C * num_px + index, value.to(result.dtype.element_ty), here)


@triton.jit
def _normal(
    images, numbers, image, channel, y, x, of_channel, height, width, here,
    C: tl.constexpr, ROW_LENGTH: tl.constexpr, ERASED: tl.constexpr,
):  # fmt: skip
    """One image's normalized values. Source: transforms.normalize, Lighting, RandomErasing."""
    mean, std = of_channel
    first = image.to(tl.int64) * C * height * width
    pixel = tl.load(images + first + channel * height * width + y * width + x, here, 0)
    value = tl.div_rn(pixel.to(tl.float32) - mean, std)
    row = numbers + image.to(tl.int64) * ROW_LENGTH
    if ROW_LENGTH > COLOUR:
        value += tl.load(row + COLOUR + channel, here, 0).to(tl.float32, bitcast=True)
    if ERASED != NO_BOX:
        box_height, box_width = tl.load(row + BOX + 2), tl.load(row + BOX + 3)
        if box_height > 0:
            down, right = y - tl.load(row + BOX), x - tl.load(row + BOX + 1)
            is_in = (down >= 0) & (down < box_height) & (right >= 0) & (right < box_width)
            noise = tl.zeros_like(value)
            if ERASED == NOISE:
                position = channel * (box_height * box_width) + down * box_width + right
                noise = _normals(
                    tl.load(row + KEY).to(tl.uint32, bitcast=True), position.to(tl.uint32)
                )
            value = tl.where(is_in, noise, value)
    return value


@triton.jit
def _normals(key, position):
    """Standard normal numbers of uint32. Source: streams.device_normals."""
    state = _mix32(_mix32(key) ^ position) + _mix32(key + 0x85EBCA6B)
    first = (_mix32(state + 0x9E3779B9).to(tl.int64) + 1).to(tl.float32) * 2.3283064365386963e-10
    second = _mix32(state + 0x3C6EF372).to(tl.int64).to(tl.float32) * 2.3283064365386963e-10
    return tl.sqrt_rn(-2.0 * tl.log(tl.minimum(first, 1.0))) * tl.cos(6.283185307179586 * second)


@triton.jit
def _mix32(value):
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)
