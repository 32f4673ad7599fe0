"""Transformers of the family: encoders, decoders, two-stage proposals."""
