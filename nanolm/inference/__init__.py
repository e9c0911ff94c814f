"""What a trained model is used for without its trainer: generation and export."""
