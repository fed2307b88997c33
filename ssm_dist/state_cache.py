"""The memory of sequences in flight: preallocated state slots, and pages of keys and values.

Admission is exact: a sequence takes one slot and, for hybrid models, the pages of all tokens that it may
reach, so a sequence once admitted can always run to its end. Snapshots are slots past those of sequences, and
a share in the pages of the sequence that they are taken of: the rows of a page that a snapshot covers never
change, and whoever continues from it copies the page that is not full. One slot and one page more belong to
nobody: what pads a batch to the size of a captured step works on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssm_dist.errors import UserError
from ssm_dist.models.batch import KVPages, MixerState, ModelState, StateShapes
from ssm_dist.pages import PagePool
from ssm_dist.state_sizes import PAGE_TOKENS, pages_of, slot_bytes


@dataclass(frozen=True)
class Kept:
    """A snapshot on the device."""

    slot: int
    pages: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class HostState:
    """The state of one sequence on this rank, in host memory."""

    conv: Tensor
    """(layers, conv_width - 1, d_inner)"""
    ssm: Tensor
    """(layers, d_inner, d_state)"""
    kv: Tensor
    """(sites, 2, pages, page_size, heads, head_dim); rows past the tokens are arbitrary"""

    def wait(self) -> None:
        """Until copies on their way from a GPU have come, and the host may read."""
        if self.conv.is_pinned():
            torch.cuda.synchronize()


class StateCache:
    """Slots and pages, who holds them, and the tensors behind them.

    The tensors never move, so that captured graphs can hold on to them. All bookkeeping is on the host and
    depends on the calls alone: ranks that make the same calls hold the same slots.
    """

    def __init__(
        self,
        shapes: StateShapes,
        *,
        max_sequences: int,
        max_tokens: int,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        device: torch.device,
        snapshots: int = 0,
    ) -> None:
        """dtype is that of the convolution's inputs, keys and values; state_dtype that of the scan's states.

        max_tokens bounds the keys and values over all sequences and snapshots; models without attention
        ignore it. snapshots: slots beside those of sequences.
        """
        slots = max_sequences + 1 + snapshots
        self._conv = torch.zeros(shapes.layers, slots, *shapes.conv, dtype=dtype, device=device)
        self._ssm = torch.zeros(shapes.layers, slots, *shapes.ssm, dtype=state_dtype, device=device)
        pages = pages_of(max_tokens) if shapes.attention_sites else 0
        kv_shape = (shapes.attention_sites, 2, pages + min(pages, 1), PAGE_TOKENS, *shapes.kv)
        self._kv = torch.zeros(kv_shape, dtype=dtype, device=device)
        self._state = ModelState.of(
            MixerState(self._conv, self._ssm), [KVPages(*site) for site in self._kv]
        )
        self.paged = shapes.attention_sites > 0
        self.max_sequences = max_sequences
        self.padding_slot = max_sequences
        """Nobody's slot, and the last page is nobody's page."""
        self._page_table = torch.full((max_sequences + 1, pages), pages, dtype=torch.int32, device=device)
        pin = device.type == "cuda"
        self._page_rows = torch.full(self._page_table.shape, pages, dtype=torch.int32, pin_memory=pin)
        """The same in host memory. A row on its way to the device changes no more until its slot is free."""
        self.max_tokens = pages * PAGE_TOKENS
        self.slot_bytes = slot_bytes(shapes, dtype, state_dtype)
        self.page_bytes = self._kv.nbytes // (pages + 1) if pages else 0
        self.pool = PagePool(pages)
        self.make_room: Callable[[int], None] | None = None
        """Called when fewer than so many pages are free and snapshots hold the rest: it drops snapshots."""
        self._free_slots = list(reversed(range(max_sequences)))
        self._free_snapshots = list(reversed(range(max_sequences + 1, slots)))
        self._pages: dict[int, list[int]] = {}
        self._to_zero: set[int] = set()

    @property
    def state(self) -> ModelState:
        """The tensors, which never move; slots just taken are zeroed."""
        self.zero_taken()
        return self._state

    @property
    def bytes_allocated(self) -> int:
        """Bytes of slots and pages on this rank."""
        return self._conv.nbytes + self._ssm.nbytes + self._kv.nbytes

    @property
    def free_slots(self) -> int:
        """Slots that no sequence holds."""
        return len(self._free_slots)

    @property
    def free_snapshots(self) -> int:
        """Slots for snapshots that hold none."""
        return len(self._free_snapshots)

    def has_room(self, tokens: int, shared: int = 0) -> bool:
        """Whether there is room for a sequence of at most `tokens` tokens, `shared` of its pages at hand."""
        return bool(self._free_slots) and self._need(tokens, shared) <= self.pool.free + self.pool.reclaimable

    def acquire(self, tokens: int, shared: Sequence[int] = ()) -> int | None:
        """A slot for a sequence of at most `tokens` tokens, or None while there is no room for it.

        It is zeroed before it is read. Raises `UserError` as `make_room`, and has taken nothing then.

        shared: full pages with the first keys and values of the sequence, which somebody holds already.
        """
        need = self._need(tokens, len(shared))
        self.pool.use(shared)
        if not self.has_room(tokens, len(shared)):
            self.pool.leave(shared)
            return None
        if need > self.pool.free:
            assert self.make_room is not None
            try:
                self.make_room(need)
            except UserError:
                self.pool.leave(shared)
                raise
        slot = self._free_slots.pop()
        self._pages[slot] = [*shared, *self.pool.take(need)]
        self._enter_pages(slot)
        self._to_zero.add(slot)
        return slot

    def zero_taken(self) -> None:
        """Zero the slots taken since the last call, all at once: a step must not begin before."""
        for first, end in _runs(self._to_zero):
            self._conv[:, first:end] = 0
            self._ssm[:, first:end] = 0
        self._to_zero.clear()

    def release(self, slot: int) -> None:
        """Give back a slot and its pages."""
        self.pool.leave(reversed(self._pages.pop(slot)))
        self._free_slots.append(slot)

    def page_table(self, slots: Tensor) -> Tensor | None:
        """Pages of each slot, (S, P) int32 on the device, short rows filled up; None without pages."""
        return self._page_table[slots] if self.paged else None

    def keep(self, slot: int, tokens: int) -> Kept:
        """A snapshot of a sequence that has absorbed `tokens` tokens; a slot for it must be free."""
        self.zero_taken()
        pages = tuple(self._pages[slot][: pages_of(tokens)])
        kept = Kept(self._free_snapshots.pop(), pages, tokens)
        self.pool.keep(pages)
        self._copy_slot(slot, kept.slot)
        return kept

    def drop(self, kept: Kept) -> None:
        """Give back a snapshot's slot and pages."""
        self.pool.drop(reversed(kept.pages))
        self._free_snapshots.append(kept.slot)

    def continue_from(self, kept: Kept, slot: int) -> None:
        """Put a snapshot into the slot of a sequence that shares its full pages."""
        self._to_zero.discard(slot)
        self._copy_slot(kept.slot, slot)
        if self.paged and kept.tokens % PAGE_TOKENS:
            last = kept.tokens // PAGE_TOKENS
            self._kv[:, :, self._pages[slot][last]] = self._kv[:, :, kept.pages[last]]

    def export(self, slot: int, pages: Sequence[int]) -> HostState:
        """A copy in host memory: pinned and asynchronous from a GPU, in the order of its stream."""
        self.zero_taken()
        where = torch.tensor(list(pages), dtype=torch.int64, device=self._kv.device)
        kv = self._kv.index_select(2, where)
        return HostState(_to_host(self._conv[:, slot]), _to_host(self._ssm[:, slot]), _to_host(kv))

    def export_sequence(self, slot: int, tokens: int) -> HostState:
        """`export` of a sequence that has absorbed `tokens` tokens."""
        return self.export(slot, self._pages[slot][: pages_of(tokens)])

    def fill(self, slot: int, state: HostState) -> None:
        """Put a state from the host into the slot of a sequence that shares no pages."""
        self._to_zero.discard(slot)
        self._conv[:, slot].copy_(state.conv, non_blocking=True)
        self._ssm[:, slot].copy_(state.ssm, non_blocking=True)
        if self.paged:
            mine = self._pages[slot][: state.kv.shape[2]]
            where = torch.tensor(mine, dtype=torch.int64, device=self._kv.device)
            self._kv.index_copy_(2, where, state.kv.to(self._kv.device, non_blocking=True))

    def _need(self, tokens: int, shared: int) -> int:
        """Pages that a sequence takes beside those that it shares."""
        return (pages_of(tokens) if self.paged else 0) - shared

    def _enter_pages(self, slot: int) -> None:
        """Show the pages of a slot to the device."""
        if self.paged:
            row, mine = self._page_rows[slot], self._pages[slot]
            row[: len(mine)] = torch.tensor(mine, dtype=torch.int32)
            row[len(mine) :] = len(row)  # nobody's page
            self._page_table[slot].copy_(row, non_blocking=True)

    def _copy_slot(self, source: int, target: int) -> None:
        self._conv[:, target] = self._conv[:, source]
        self._ssm[:, target] = self._ssm[:, source]


def _runs(slots: set[int]) -> list[tuple[int, int]]:
    """The ranges of neighbours that make up some slots: filling one is faster than filling by index."""
    ordered = sorted(slots)
    begins = [slot for slot in ordered if slot - 1 not in slots]
    ends = [slot + 1 for slot in ordered if slot + 1 not in slots]
    return list(zip(begins, ends, strict=True))


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.contiguous(), non_blocking=True)
