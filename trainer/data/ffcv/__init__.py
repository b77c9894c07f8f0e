"""The only code that knows ffcv."""
