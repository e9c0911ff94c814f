"""Published checkpoints in, our models out: one table per family maps keys both ways."""
