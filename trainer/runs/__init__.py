"""A run from request to stored row: its folder, lock, checkpoints, export, verification,
reproduction.
"""
