"""Formats of others: what a compressed model becomes for those who do not have pykd."""
