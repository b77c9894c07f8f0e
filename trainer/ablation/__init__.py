"""One question: its cells, the runner, failures, estimates."""
