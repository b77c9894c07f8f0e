"""A trained model as a file that other programs run: written, checked, quantized, timed."""
