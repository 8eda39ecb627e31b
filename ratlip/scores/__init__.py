"""Scores of a trained run, each beside what real images get."""
