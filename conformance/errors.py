"""Exceptions of the suite, all under one base class."""


class ConformanceError(Exception):
    """Base class of what the suite raises on purpose."""


class UsageError(ConformanceError):
    """A mistake in how the suite was called. The message is one sentence for the user; no traceback, exit code 2."""
