"""Parameter-efficient fine-tuning: one file per method, each a pass over a built learner."""
