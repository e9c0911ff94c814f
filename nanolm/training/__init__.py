"""The trainer and what surrounds one optimizer step."""
