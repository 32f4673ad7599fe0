"""What happens inside a detector, as pictures: see `tools/visualize.py`."""
