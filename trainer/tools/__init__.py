"""Doctor, bench, fault injection, the compatibility matrix."""
