"""Figures: one style, pictures, charts."""
