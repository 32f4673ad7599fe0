"""Layers shared by the transformers: attention, encodings, projections, heads."""
