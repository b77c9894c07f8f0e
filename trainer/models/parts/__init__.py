"""Norms, activations, attention, convolutions, stems and the like, as a recipe names them."""
