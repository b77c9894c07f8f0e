"""From files to micro-batches: index, order, decoding, transforms, loader."""
