"""GGUF files: their header, tensor types, names, configuration and tokenizer."""
