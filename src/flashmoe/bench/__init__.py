"""Measurements of speed, each beside the bound that the machine sets in the same run."""
