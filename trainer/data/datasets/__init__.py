"""The kinds of data set that can be read."""
