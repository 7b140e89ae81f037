"""Model families, one file per Hugging Face model_type (registry.py finds them by name)."""
