"""Mathematics on tensors: moments, subspaces, fractions, nulls, spectra. Nothing here knows what a model is."""
