"""Fine-tuning: labelled tables, tasks with heads of their own, figures, predictions, studies."""
