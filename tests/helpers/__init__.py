"""Helpers that several tests share: tiny models, random layers, a local Hub."""
