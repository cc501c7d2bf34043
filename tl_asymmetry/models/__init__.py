"""All that knows TransformerLens, and only that."""
