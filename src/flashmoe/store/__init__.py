"""Experts in motion: reading records, the slots they land in, and which of them stay.  No mathematics in here."""
