"""Adapters: one file per stack, each mapping a Recipe onto that stack's own entry point."""
