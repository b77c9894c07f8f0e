"""One file per group of commands; options declared once."""
