"""Gradient rules that wrap another rule: one idea, one file."""
