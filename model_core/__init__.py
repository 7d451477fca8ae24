"""Darkroom: the training library."""
