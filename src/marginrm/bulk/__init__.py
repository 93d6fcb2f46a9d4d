"""Scores a corpus: rows of files and data sets in, one output row for each, in one process or on a Ray cluster."""
