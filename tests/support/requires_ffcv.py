"""Importing this skips a test module where ffcv is not built.

An import, so that it can stand above those that need ffcv; "support" is sorted before "trainer".
"""

from support.built import needs_ffcv

needs_ffcv()
