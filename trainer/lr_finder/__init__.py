"""The learning-rate range test, for any number of a recipe."""
