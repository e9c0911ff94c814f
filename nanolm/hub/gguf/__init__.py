"""GGUF, the one-file format of llama.cpp, in and out: Llama-like models and their tokenizers."""
