"""pyparallel: many devices work on one transformer."""

# The extension links against torch's libraries, which importing torch loads.
import torch  # noqa: F401
