"""What goes into and comes out of `python -m tools.predict`."""
