"""Commands: every module is run as `python -m tools.NAME` or serves those that are."""
