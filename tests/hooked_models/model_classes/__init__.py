"""Tiny random models of every model class that the package hooks, and one set of checks for all of them.

`table` lists the classes, `checks` has the checks, `test_model_classes` runs all on all, and
``python -m tests.hooked_models.model_classes`` writes the table of errors in docs/compatibility.md.
"""
