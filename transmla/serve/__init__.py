"""Use an export: chat in a terminal, and servers."""
