"""Tells whoever runs the suites without the plugin what to add."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """End the run with one sentence if the plugin is missing: pytest alone cannot judge a clause."""
    if not config.pluginmanager.hasplugin("conformance.plugin"):
        pytest.exit("The clauses need their plugin: add -p conformance.plugin to the command line.", 2)
