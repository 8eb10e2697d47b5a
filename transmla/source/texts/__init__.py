"""Shelf of texts: one file per named text that a machine has, and readers of files and Hub datasets.

A module with a ``TEXT`` (``base.NamedText``) adds a named text, which every option that takes a text accepts by its
name. The readers are ``files`` and ``hub``; both read tables through ``rows``.
"""
