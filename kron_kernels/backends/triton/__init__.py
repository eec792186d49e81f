"""Kernels in Triton: the portable GPU path. One file a kernel with its launcher, each with the signature of its op.

``plan.py`` (which kernel, tiles) is plain Python; every other file imports Triton, and ``ops.py`` all of them.
"""
