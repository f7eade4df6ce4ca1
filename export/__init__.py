"""From a module to a file that is proven to compute the same."""
