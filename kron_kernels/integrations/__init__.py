"""Kronecker layers of other libraries, computed by this one. Each file imports its library; nothing here is imported
by the rest of the package."""
