"""C++ sources of the operators, shipped as package data and compiled by `vitrail.ops.library`."""
