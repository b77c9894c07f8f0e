"""Image operations on whole micro-batches of uint8 tensors, each equal to its PIL original."""
