"""Heads set back to the base, one by one and together, and how much of the alignment that undoes."""
