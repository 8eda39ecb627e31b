"""One file a question that a notebook asks."""
