"""Adapters as they were released with 0.1.0, unchanged: what works with them works with those of users."""
