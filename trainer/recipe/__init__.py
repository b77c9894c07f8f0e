"""A recipe: its schema, reading it, overrides, data profiles, the plan that follows, explaining
it.
"""
