"""Optimisations of a module, each tried on this machine before it is taken."""
