"""Conversion between published checkpoints (Hugging Face, GGUF) and this library's parameters."""
