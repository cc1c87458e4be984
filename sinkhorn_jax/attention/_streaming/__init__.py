"""Attention that stores nothing of size (T, S), forward or backward."""
