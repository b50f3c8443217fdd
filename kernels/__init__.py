"""Triton kernels of pykd, one file per op; they import torch and triton only."""
