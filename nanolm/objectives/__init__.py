"""Objectives: what a row is turned into, and what is asked of the hidden states; a page each."""
