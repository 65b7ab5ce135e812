"""Training policies on demonstrations."""
