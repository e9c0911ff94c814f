"""Tasks: what a labelled row is turned into, its head and its loss; a page each."""
