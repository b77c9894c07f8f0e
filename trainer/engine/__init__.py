"""Training itself: state, the story (train.py), evaluation, micro-batches, compile."""
