"""The library's version, which the package's metadata, ``pyparallel --version`` and doctor tell."""

__version__ = "0.1.0"
