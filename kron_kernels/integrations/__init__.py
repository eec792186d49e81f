"""Kronecker layers of other libraries, computed by this one. Each file imports its library; the rest of the package
imports none of them."""
