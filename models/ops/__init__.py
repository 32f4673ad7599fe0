"""The multi-scale deformable attention operator; which backend computes it is decided in here."""

from .backends import use_backend
from .ms_deform_attn import ms_deform_attn

__all__ = ["ms_deform_attn", "use_backend"]
