"""What the GPU kernels read about each image: the places and meanings of a row's entries."""

# Of `operate_kernel`: float64, first what is done.
KINDS = COPY, LOOK_UP, COLOR, SHARPNESS, ALONG_X, ALONG_Y, ALONG_BOTH, NEAREST = tuple(range(8))
OPERATION_LENGTH = 8

# Of `measure_kernel`: float64, image, what the table is for, factor.
MEASURED = CONTRAST, AUTOCONTRAST, EQUALIZE = tuple(range(3))
TABLE_LENGTH = 3

# Of `inputs_kernel`: int32, floats by their bits. Boxes are (top, left, height, width) where erased
# and (top, left, bottom, right) where pasted; colours come last, where there are any.
INPUT = BOX, KEY, SOURCE, PARTNER, PASTED, SHARE, REST, COLOUR = (0, 4, 5, 6, 7, 11, 12, 13)
ERASED = NO_BOX, NOISE, ZERO = tuple(range(3))
