"""Several processes that make one run: ranks, collectives, gradient reduction, launching."""
