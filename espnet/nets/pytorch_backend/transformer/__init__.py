"""Blocks that encoders and decoders share."""
