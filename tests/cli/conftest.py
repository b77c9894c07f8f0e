"""Fixtures of the command-line tests."""

from support.commands import door as door
