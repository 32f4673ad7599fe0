"""From a detector to files that other programs run: see tools/export.py."""
