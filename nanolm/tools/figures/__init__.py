"""`nanolm figures`: the pictures of the documentation, drawn from the code and from runs, as SVG.

journey.py  a batch on its way through the rooms     masks.py  who may attend to whom
curves.py   what a run wrote to its metrics          svg.py    what all of them share
"""
