"""Triton kernels: they import torch and triton, nothing of ours, and are imported only where one is launched."""
