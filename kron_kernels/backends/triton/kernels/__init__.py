"""Device code: what ``triton.jit`` compiles. One file a kernel; ``primitives.py`` is what several share."""
