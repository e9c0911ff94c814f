"""Tools beside training: benchmarks, kernel checks, estimates, the first contact with a GPU."""
