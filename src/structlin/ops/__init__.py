"""The operator that runs every structure, and its plain-PyTorch reference."""

from .contract import contract

__all__ = ["contract"]
