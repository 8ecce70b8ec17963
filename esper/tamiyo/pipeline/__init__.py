"""``esper learn policy``: from a table of tried candidates and an environment to weights that ship."""
