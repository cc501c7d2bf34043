"""Chains of training stages: what each did to the weights, and what the later ones left of it."""
