"""The measurements behind `tools.benchmark`, one module each."""
