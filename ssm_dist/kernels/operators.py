"""Functions as operators of torch.library: opaque to torch.compile, with their state updated in place.

`torch.library.custom_op` would do the same, and costs ten times as much a call (it prepares for gradients
and subclasses): with five operators a layer, more than a short prompt takes on the GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("ssm_dist", "FRAGMENT")


def like_first(first: Tensor, *others: Any) -> Tensor:
    """The fake implementation of operators whose result looks like their first argument."""
    return first.new_empty(first.shape)


def operator(
    name: str, mutates: Sequence[str] = (), fake: Callable[..., Any] = like_first
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function becomes the operator `ssm_dist::name`, for all devices and without gradients.

    `mutates` names the arguments that are updated in place; `fake` gives results of the right shape and dtype
    without computing. Results must be new tensors, never arguments.
    """

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(fn, mutates_args=mutates)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, fn, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ssm_dist::{name}", fake, lib=_library)
        overload: Callable[..., Any] = getattr(torch.ops.ssm_dist, name).default
        return overload

    return add
