"""Names and options of other code bases, as `tools/convert_checkpoint.py` translates them."""
