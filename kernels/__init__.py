"""Triton kernels, one file a fused operation; imported as `fastcfg.kernels`."""

if __name__ != "fastcfg.kernels":
    raise ImportError("this folder is the package fastcfg.kernels: import fastcfg.kernels, not kernels")
