"""The head explorer: one page in which a head of the map opens its curves, directions, edits and trajectory."""

from tl_asymmetry.explore.page import explorer

__all__ = ["explorer"]
