"""Training of replacement policies from recorded traces; what runs them is in store/policies."""
