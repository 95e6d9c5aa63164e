"""Scorers of the beam search that are no networks."""
