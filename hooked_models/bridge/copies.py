"""A bridge in another dtype, on another device, copied, pickled or saved: right, or refused in one line."""

from __future__ import annotations

import copy
import os
import types
from typing import Any

import torch
from torch import Tensor, nn

from hooked_models.bridge.arguments import check_device, refusals, wrong
from hooked_models.bridge.public_methods import CheckedMethods
from hooked_models.errors import HookedModelError

# How nn.Module.to reads its arguments.
_parsed: Any = getattr(torch._C, "_nn")._parse_to  # noqa: B009  (torch has no types for it)


class CopyableBridge(CheckedMethods):
    """A bridge whose ``cfg`` goes with its weights, and that is saved as transformers saves the model."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module.to``; ``model.cfg`` has the new dtype and device.

        Raises:
            HookedModelError: the dtype has no fractions, or the device cannot be used or holds no numbers.
        """
        details = kwargs.pop("print_details", True)
        with refusals("to"):
            device, dtype, non_blocking, memory_format = _parsed(*args, **kwargs)
        if memory_format is not None:
            raise HookedModelError("to: memory_format is for images, leave it out")
        wanted: dict[str, Any] = {}
        if device is not None:
            check_device(device)
            if device.type == "meta":
                raise wrong("to", "device", "meta", "a device that holds numbers: 'cpu' or 'cuda'")
            wanted["device"] = device
        if dtype is not None:
            if not dtype.is_floating_point:
                raise wrong("to", "dtype", dtype, "float32, bfloat16, float16 or float64")
            wanted["dtype"] = dtype
        return super().to(**wanted, non_blocking=non_blocking, print_details=details) if wanted else self

    def half(self) -> Any:
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        return self.to(torch.bfloat16)

    def float(self) -> Any:
        return self.to(torch.float32)

    def double(self) -> Any:
        return self.to(torch.float64)

    def type(self, dst_type: Any) -> Any:
        return self.to(dtype=getattr(torch, dst_type, dst_type) if isinstance(dst_type, str) else dst_type)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the model as `boot_transformers` reads it, with its tokenizer, if it has one.

        Args:
            save_directory: a folder; it is made.
            **kwargs: as for transformers' ``save_pretrained``.

        Raises:
            HookedModelError: ``enable_compatibility_mode`` has changed the weights.
        """
        if self.compatibility_mode:
            raise HookedModelError(
                "save_pretrained: the weights are processed: save before compatibility mode"
            )
        save_pretrained(self.original_model, save_directory, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """All weights: by TransformerLens's names, and where it has none by the Hugging Face model's.

        TransformerLens leaves out what belongs to no component of its own, as decays and experts, and its
        ``load_state_dict`` then finds that all keys match.
        """
        held = super().state_dict(destination, prefix=prefix, keep_vars=keep_vars)
        if destination is None and not prefix:
            others = self._weights_without_name().items()
            held |= {name: x if keep_vars else x.detach() for name, x in others}
        return held

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As TransformerLens's, with the weights that only `state_dict` here has.

        Raises:
            HookedModelError: ``strict``, and the weights are not complete.
        """
        given = {name.replace("_original_component.", "") for name in state_dict}
        missing = [name for name in self._weights_without_name() if name not in given]
        if strict and missing:
            raise HookedModelError(
                f"load_state_dict: weights are missing, {missing[0]} among {len(missing)}: give what "
                "HookedRecurrent.state_dict returns"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _weights_without_name(self) -> dict[str, Tensor]:
        """Parameters and buffers that TransformerLens has no name for, by the Hugging Face model's."""
        seen = {id(x) for x in super().state_dict(keep_vars=True).values()}
        others: dict[str, Tensor] = {}
        for name, x in self.original_model.state_dict(keep_vars=True).items():
            if id(x) not in seen and ".hook_" not in name:  # not those of an SAE in a hook's place
                seen.add(id(x))
                others[name.replace("_original_component.", "")] = x
        return others

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        keep_names(self.original_model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A pass with gradients leaves tensors of its graph in modules, which torch does not copy.
        for module in self.original_model.modules():
            for value in vars(module).values():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    memo[id(value)] = value.detach().clone()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        for name, module in (*self.named_modules(), *self.original_model.named_modules()):
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if any("<locals>" in getattr(hook, "__qualname__", "") for hook in hooks):
                raise HookedModelError(
                    f"this model cannot be pickled, because of a hook at {name or 'its root'}: use "
                    "model.save_pretrained(folder) and boot_transformers(folder)"
                )
        return super().__reduce_ex__(protocol)


def keep_names(model: nn.Module) -> None:
    """Have ``bridge.original_model.save_pretrained`` do as `save_pretrained` does.

    Args:
        model: the Hugging Face model in a bridge.
    """
    model.save_pretrained = types.MethodType(save_pretrained, model)  # type: ignore[assignment]


def save_pretrained(model: nn.Module, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save the Hugging Face model in a bridge, under the names of weights that it has outside of one.

    A bridge's components stand between the modules, so that ``state_dict`` has each weight under several
    other names, which transformers would take for weights that are tied by mistake.

    Args:
        model: ``bridge.original_model``.
        save_directory: a folder; it is made.
        **kwargs: as for transformers' ``save_pretrained``.
    """
    with torch.device("meta"):
        names = type(model)(model.config).state_dict().keys()
    held = {name.replace("_original_component.", ""): x for name, x in model.state_dict().items()}
    missing = [name for name in names if name not in held]
    if missing:
        raise HookedModelError(
            f"save_pretrained: the weights {', '.join(missing[:3])} were not found in the model"
        )
    kwargs.setdefault("state_dict", {name: held[name] for name in names})
    type(model).save_pretrained(model, save_directory, **kwargs)  # type: ignore[attr-defined]
