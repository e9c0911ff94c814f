"""`nanolm walk`: one row of a run on its way through one real optimizer step.

checkpoint before the step -> replay up to it (tools/replay.py) -> the step, watched
(recording.py) -> what is told at each stop, with the functions that did it (stops.py)
-> terminal (terminal.py), HTML (page.py)
"""
