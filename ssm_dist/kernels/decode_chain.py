"""Decode steps of 9 to 64 sequences through layers of a Mamba model: five kernels a layer on a Hopper GPU.

In one kernel, as `decode_layers` has fewer sequences, the vectors that programs hand each other would be too large.
Here kernels end instead, and the next one's weights are on their way by then: `gluon_layers_parts` has the large
products, with the convolution; x_proj, the state update and the norm are the kernels of other steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssm_dist.kernels.decode_sizes import CHAIN_PROGRAMS
from ssm_dist.kernels.decode_weights import LayerWeights
from ssm_dist.kernels.tensor_maps import MAP_BYTES, in_memory, tensor_map


class Chain:
    """Tensor maps of layers' weights, and the memory that their kernels hand over vectors in."""

    def __init__(
        self, layers: Sequence[LayerWeights], sizes: dict[int, dict[str, int]], eps: float, rms_eps: float | None,
        last_norm: Tensor,
    ) -> None:  # fmt: skip
        """sizes: what `chain_sizes` gave, by the most sequences; the rest as in `LayerStack`."""
        self.layers, self.sizes, self._eps, self._rms_eps = layers, sizes, eps, rms_eps
        self._norms = [layer.norm for layer in layers] + [last_norm]
        most = max(sizes)
        (d_model, channels), device = layers[0].out_proj.shape, last_norm.device
        own, parts = sizes[most]["OWN"], sizes[most]["PARTS"]
        narrow = {"dtype": torch.bfloat16, "device": device}
        self._normed, self._mixed, self._x, self._z = (
            torch.zeros(most, width, **narrow) for width in (d_model, channels, channels, channels)
        )
        self._stream = torch.zeros(most, d_model, device=device)
        self._parts = torch.zeros(parts * most * d_model, device=device)
        maps = [
            tensor_map(weight.data_ptr(), *weight.shape, own)
            for layer in layers
            for weight in (layer.in_proj.flatten(0, 1), layer.out_proj)
        ]
        self._places = {rows: len(maps) + 2 * k for k, rows in enumerate(sizes)}
        for rows in sizes:
            maps += [tensor_map(t.data_ptr(), *t.shape, rows) for t in (self._normed, self._mixed)]
        self._maps = in_memory(maps, device)

    def launch(self, hidden: Tensor, slots: Tensor, conv: Tensor, ssm: Tensor, y: Tensor) -> None:
        """As `LayerStack.step`, into y."""
        from ssm_dist.kernels import gluon_layers_parts, triton_linear, triton_projected_update_many, tuning
        from ssm_dist.kernels.dependent_launch import launch_options
        from ssm_dist.kernels.triton_norm import add_parts_rms_norm

        count = len(hidden)
        most = min(most for most in self.sizes if most >= count)
        constants, inputs = self.sizes[most], self._maps.data_ptr() + self._places[most] * MAP_BYTES
        d_model, parts = constants["H"], constants["PARTS"]
        x, z, mixed, stream, normed = (t[:count] for t in (self._x, self._z, self._mixed, self._stream, self._normed))
        of_out = self._parts[: parts * most * d_model].view(parts, most, d_model)
        update = tuning.configuration("projected_state_update", count, y.device)
        options = {"num_warps": 8, "maxnreg": constants.get("maxnreg", 168), "enable_fp_fusion": True, **launch_options(y.device)}
        constants = {n: v for n, v in constants.items() if n != "maxnreg"}
        with torch.cuda.device_of(y):
            add_parts_rms_norm(None, hidden, self._norms[0], self._eps, normed, stream)
            for k, layer in enumerate(self.layers):
                weight = self._maps.data_ptr() + 2 * k * MAP_BYTES
                gluon_layers_parts.in_kernel[(CHAIN_PROGRAMS,)](
                    weight, inputs, layer.taps, layer.conv_bias, conv[k], slots, x, z, count, conv.stride(1),
                    conv.stride(2), **{"AHEAD": constants["SLOTS"]} | {n: v for n, v in constants.items() if n not in ("PARTS", "EARLY")}, **options,
                )  # fmt: skip
                given = triton_linear.linear(x, layer.x_proj, None)[:, None]
                triton_projected_update_many.launch(
                    x, given, layer.dt_proj, layer.A_log, layer.skip, z, layer.dt_bias, ssm[k], slots,
                    self._rms_eps, update, mixed,
                )  # fmt: skip
                gluon_layers_parts.out_kernel[(CHAIN_PROGRAMS,)](
                    weight + MAP_BYTES, inputs + MAP_BYTES, of_out, slots, count, **{"AHEAD": constants["SLOTS"]} | constants, **options,
                )  # fmt: skip
                after = y if k + 1 == len(self.layers) else normed
                add_parts_rms_norm(
                    of_out, stream if k else hidden, self._norms[k + 1], self._eps, after, stream
                )
