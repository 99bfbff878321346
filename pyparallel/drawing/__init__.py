"""Pictures of how a model is cut, drawn from the sharding objects that cut it."""

from pyparallel.drawing.draw import draw

__all__ = ["draw"]
