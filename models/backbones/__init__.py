"""Networks that turn images into feature maps."""

from .frozen_batch_norm import FrozenBatchNorm2d
from .joiner import Backbone, Joiner, build_backbone

__all__ = ["Backbone", "FrozenBatchNorm2d", "Joiner", "build_backbone"]
