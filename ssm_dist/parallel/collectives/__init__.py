"""Reductions over ranks, as opaque operators: eager code, torch.compile and CUDA graphs all take them.

A group travels as a string, since an op takes no process group; `register_group` gives it its name.

    ops           the ops, and which path serves a call
    products      linear layers whose outputs are summed, as one op
    selection     the choice of the algorithm, from static sizes and a table
    exchange      quantised two-shot over the process group (NCCL, gloo): all-to-all, sum, all-gather
    shared        memory that the GPUs of a group share, and the kernels that sum over it
    words         memory for what a kernel of many layers sends
    gather        gathers, maxima, broadcasts
    groups        groups by name
    tables        which algorithm is the fastest, as data
    compiling     their kernels, compiled ahead
    failures      bounded waits, and which rank is to blame
"""

from ssm_dist.errors import RankFailure
from ssm_dist.parallel.collectives.failures import wait_for_device, wait_for_event
from ssm_dist.parallel.collectives.gather import broadcast_bytes, tp_all_gather, tp_all_max, tp_gather_rows
from ssm_dist.parallel.collectives.groups import carrier, register_group
from ssm_dist.parallel.collectives.ops import (
    goes_encoded,
    splits_residual,
    sums_in_place,
    tp_all_reduce,
    tp_all_reduce_add_rms_norm,
    tp_all_reduce_add_rms_norm_split,
    tp_all_reduce_spent,
    tp_all_reduce_with_feedback,
)
from ssm_dist.parallel.collectives.products import (
    pushes_product,
    tp_linear_all_reduce,
    tp_linear_all_reduce_add_rms_norm,
)
from ssm_dist.parallel.collectives.selection import EXACT, Reductions, Wire

__all__ = [
    "EXACT",
    "RankFailure",
    "Reductions",
    "Wire",
    "broadcast_bytes",
    "carrier",
    "goes_encoded",
    "pushes_product",
    "register_group",
    "splits_residual",
    "sums_in_place",
    "tp_all_gather",
    "tp_all_max",
    "tp_all_reduce",
    "tp_all_reduce_add_rms_norm",
    "tp_all_reduce_add_rms_norm_split",
    "tp_all_reduce_spent",
    "tp_all_reduce_with_feedback",
    "tp_gather_rows",
    "tp_linear_all_reduce",
    "tp_linear_all_reduce_add_rms_norm",
    "wait_for_device",
    "wait_for_event",
]
