"""Text and conversations on top of the engine: templates, stop strings, the public LLM."""
