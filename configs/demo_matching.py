"""The demonstration without denoising, everything else equal: `make demo-compare`."""

_base_ = "demo.py"

use_dn = False
