"""Statistics, tables and their formats, the HTML report, comparison of runs."""
