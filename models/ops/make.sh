#!/usr/bin/env bash
# Builds the compiled kernels; see setup.py.
set -eu
cd "$(dirname "$0")"
exec "${PYTHON:-python}" setup.py build install
