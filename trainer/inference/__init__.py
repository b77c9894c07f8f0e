"""A trained model in use: its answers on images, and how good they are."""
