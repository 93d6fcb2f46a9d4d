"""Attention over packed rows: the registered function and its backends."""
