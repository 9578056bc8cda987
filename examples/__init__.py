"""Training scripts as people write them, and their adapters."""
