"""The native model, whatever is hooked: all hooks are taken off for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from transformer_lens.hook_points import HookPoint

from hooked_models import HookedRecurrent
from hooked_models.errors import HookedModelError

# torch's dictionaries of a module's hooks, to which a hook point's hooks are added.
_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def without_hooks(model: HookedRecurrent) -> Iterator[None]:
    """While open, no hook sees or changes an activation; then all are back, in their order.

    Raises:
        HookedModelError: an SAE is attached, which stands in a hook point's place.
    """
    points = {name: model.hook_point(name) for name in model.busy_hooks}
    if attached := [name for name, point in points.items() if not isinstance(point, HookPoint)]:
        raise HookedModelError(
            f"this looks at the native model, but an SAE is attached at {', '.join(attached[:3])}: detach it "
            "first (model.reset_saes())"
        )
    kept = [(point, {kind: getattr(point, kind) for kind in _KINDS}) for point in set(points.values())]
    try:
        for point, own in kept:
            for kind in own:
                setattr(point, kind, OrderedDict())
        yield
    finally:
        for point, own in kept:
            for kind, hooks in own.items():
                setattr(point, kind, hooks)
