"""Objectives to train and to measure gradients with."""
