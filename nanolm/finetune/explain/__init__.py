"""Which tokens made a model say what it says."""
