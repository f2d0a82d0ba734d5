"""Module names from before the modules were moved, which keep working: `keep_old_names`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NewNames = Mapping[str, str | tuple[str, ...]]
OLD_NAMES: dict[str, str | tuple[str, ...]] = {
    "hooked_models.adapters": "hooked_models.architectures.adapters",
    "hooked_models.checkpoints": "hooked_models.files.layouts",
    "hooked_models.gated_delta_net": "hooked_models.architectures.gated_delta_net",
    "hooked_models.loading": "hooked_models.files.loading",
    "hooked_models.mamba2": "hooked_models.architectures.mamba2",
    "hooked_models.rwkv7": "hooked_models.architectures.rwkv7",
    "hooked_models.rwkv7_model": (
        "hooked_models.modeling.rwkv7",
        "hooked_models.modeling.rwkv7.layers",
        "hooked_models.modeling.rwkv7.model",
    ),
    "hooked_models.torch_files": "hooked_models.files.torch_files",
    "hooked_models.world_tokenizer": "hooked_models.files.world_tokenizer",
}
"""The present module of each old name of this package."""


def keep_old_names(table: NewNames) -> None:
    """Let old module names be imported: ``import old`` gives a module with the attributes of the new one.

    Nothing is imported before someone asks for an old name, who then gets a DeprecationWarning.

    Args:
        table: for each old module name the new one, or several where the module was taken apart.
    """
    sys.meta_path.append(_OldNames(table))


class _OldNames(MetaPathFinder, Loader):
    """The last finder in ``sys.meta_path``, so that a real module of the same name comes before it."""

    def __init__(self, table: NewNames) -> None:
        self.table = table

    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.table else None

    def create_module(self, spec: ModuleSpec) -> None:
        """None: Python creates an empty module."""

    def exec_module(self, module: ModuleType) -> None:
        names = self.table[module.__name__]
        new = [import_module(name) for name in ((names,) if isinstance(names, str) else names)]

        def __getattr__(name: str) -> Any:
            # Python asks for names such as __path__, which would make a package of the old name.
            home = None if name.startswith("__") else next((m for m in new if hasattr(m, name)), None)
            if home is None:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return getattr(home, name)

        module.__dict__.update(
            __getattr__=__getattr__, __dir__=lambda: sorted({name for m in new for name in dir(m)})
        )
        places = " and ".join(m.__name__ for m in new)
        warnings.warn(f"{module.__name__} is now {places}", DeprecationWarning, stacklevel=2)
