"""Tables of fine-tuning experiments, restartable cell by cell."""
