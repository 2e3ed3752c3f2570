"""The version, in one place for the package, its wheel and its checkpoints."""

__version__ = "0.1.0.dev0"
