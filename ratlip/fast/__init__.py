"""The same numbers, up to rounding, in less time and memory."""
