"""Hooked mixers, one file an architecture, and the table of the model classes that have them (`adapters`)."""
