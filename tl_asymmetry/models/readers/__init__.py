"""Weights on disk: files, how an architecture lays its matrices out in them, adapters."""
