"""Conversations and rows of files, as people and published data sets write them."""
