"""Networks, scorers and beam search."""
