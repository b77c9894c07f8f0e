"""Where a run's progress goes: terminal, JSON lines, TensorBoard, pictures."""
