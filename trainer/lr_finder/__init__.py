"""The learning-rate LR finder run, for any number of a recipe."""
