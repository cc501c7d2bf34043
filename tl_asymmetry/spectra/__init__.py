"""Weight deltas in the base weight's own spectral frame: shares, rotation, intruders, sparsity, each beside chance."""
