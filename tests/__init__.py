"""Tests of the reference trainer and of the suite itself."""
