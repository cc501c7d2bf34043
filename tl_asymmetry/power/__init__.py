"""How large must a mark be to be found? Directions of known size planted in a pair."""
