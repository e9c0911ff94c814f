"""The first hours on a machine with a GPU, as one command with a time limit: `make gpu`.

`__main__.py` is the command, `stages.py` the table of what it does in which order; every other
module is one of its measurements and can be called alone. See docs/gpu.md.
"""
