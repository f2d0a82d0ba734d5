"""What this package leans on inside SAELens and torch is still there, and is what it was."""

import importlib
import inspect

import pytest

from writesae_lens.saelens import upstream
from writesae_lens.saelens.registration import register


def find(where):
    """What ``module:name`` names, without binding it."""
    module, _, path = where.partition(":")
    owner, (*outer, name) = importlib.import_module(module), path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    found = inspect.getattr_static(owner, name)
    return found.__func__ if isinstance(found, classmethod) else found


@pytest.mark.parametrize("dependency", upstream.DEPENDENCIES, ids=lambda d: d.where)
def test_a_dependency_has_not_moved_or_changed(dependency):
    """Fails when an upgrade renames, moves or re-signs it, or no longer calls it: follow here and there."""
    found = find(dependency.where)
    assert getattr(found, "replaced_by_writesae_lens", False) == dependency.replaced
    original = found.__wrapped__ if dependency.replaced else found
    assert not getattr(original, "replaced_by_writesae_lens", False)  # wrapped once
    assert original.__module__.partition(".")[0] in ("sae_lens", "torch")
    if dependency.parameters is not None:
        assert list(inspect.signature(original).parameters) == dependency.parameters.split()
    assert dependency.why
    if dependency.called_in:
        name = dependency.where.replace(":", ".").rpartition(".")[2]
        assert f"{name}(" in inspect.getsource(inspect.unwrap(find(dependency.called_in)))


def test_private_attributes_are_there():
    for where, names in upstream.ATTRIBUTES.items():
        source = inspect.getsource(find(where))
        assert all(f".{name} = " in source for name in names)


def test_registering_twice_replaces_nothing_twice():
    replaced = [d.where for d in upstream.DEPENDENCIES if d.replaced]
    before = [find(where) for where in replaced]
    register()
    assert before == [find(where) for where in replaced]
