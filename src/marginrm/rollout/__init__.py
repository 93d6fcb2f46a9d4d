"""Decides on the roll-out of a new revision: both revisions score the same traffic, and the results are compared."""
