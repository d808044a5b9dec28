"""Data sets and data loading."""
