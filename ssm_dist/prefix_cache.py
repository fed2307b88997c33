"""Prompts that begin alike: states kept at places of earlier prompts and answers, and continued from there.

A snapshot lives on the device, in host memory or in a file; when one level is full, its least recently used
snapshot moves to the next, and past the last it is forgotten. What happens depends on the calls alone, so the
ranks, which make the same calls, hold the same snapshots.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ssm_dist.errors import UserError
from ssm_dist.prefix_index import PrefixIndex
from ssm_dist.prefix_limits import PrefixCounters, PrefixLimits
from ssm_dist.snapshots import Snapshot, Tier
from ssm_dist.state_cache import HostState, StateCache
from ssm_dist.state_sizes import PAGE_TOKENS, pages_of


class PrefixCache:
    """Gives sequences their slots, filled with the state of the longest known beginning of their prompt."""

    def __init__(self, cache: StateCache, limits: PrefixLimits | None = None) -> None:
        """limits: None takes no snapshots; states that are `put` here are still found.

        The device level is the snapshot slots of `cache`.
        """
        self.cache = cache
        self.counters = PrefixCounters()
        self.limits = limits
        self._index: PrefixIndex[Snapshot] = PrefixIndex()
        self._device = Tier(cache.slot_bytes * cache.free_snapshots)
        self._host = Tier(0 if limits is None else limits.host_bytes)
        self._files = Tier(0 if limits is None else limits.folder_bytes)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files_written = 0
        self._protected: Snapshot | None = None
        cache.make_room = self._free_pages

    @property
    def bytes_held(self) -> tuple[int, int, int]:
        """Bytes of snapshots on this rank: on the device (shared pages left out), on the host, in files."""
        return self._device.used, self._host.used, self._files.used

    def acquire(self, prompt_ids: Sequence[int], tokens: int) -> tuple[int, int] | None:
        """A slot for a sequence of at most `tokens` tokens, and how many of its prompt it has absorbed.

        None while there is no room. At least one token of the prompt is left to compute.
        """
        if not self.cache.free_slots:
            return None
        found = self._index.longest(prompt_ids[:-1]) if self._index else None
        slot = self._admit(found, tokens)
        if slot is None and found is not None and self.cache.free_slots == self.cache.max_sequences:
            # the snapshot's own pages are in the way, and nobody will ever leave
            found, slot = None, self._admit(None, tokens)
        if slot is None:
            return None
        self.counters.hits += found is not None
        self.counters.misses += found is None
        self.counters.tokens_saved += 0 if found is None else found.tokens
        return slot, 0 if found is None else found.tokens

    def after_chunk(self, slot: int, prompt_ids: Sequence[int], absorbed: int) -> None:
        """Take a snapshot if one is due after `absorbed` tokens of a prompt."""
        if self.limits is not None and (absorbed % self.limits.interval == 0 or absorbed == len(prompt_ids)):
            self.capture(slot, prompt_ids[:absorbed])

    def capture(self, slot: int, token_ids: Sequence[int]) -> None:
        """Remember the state in a slot that has absorbed exactly these tokens, if there is a place for it."""
        if self.limits is None or not token_ids:
            return
        node = self._index.node(token_ids)
        snapshot = node.value
        if snapshot is None:
            snapshot = node.value = Snapshot(node, len(token_ids))
            self.counters.snapshots += 1
        with self._forgotten_if_lost(snapshot):
            if snapshot.kept is None and self._device.budget:
                self._keep(snapshot, slot)
            elif snapshot.lost:
                self._lower(snapshot, lambda: self.cache.export_sequence(slot, len(token_ids)))
            else:
                self._touch(snapshot)

    def put(self, token_ids: Sequence[int], state: HostState) -> None:
        """Hold a state from elsewhere, outside the budgets, until `remove`."""
        node = self._index.node(token_ids)
        snapshot = node.value = node.value or Snapshot(node, len(token_ids))
        self._leave_lower_levels(snapshot)
        snapshot.host, snapshot.pinned = state, True

    def remove(self, token_ids: Sequence[int]) -> None:
        """Forget a state that was `put` here; no state of these tokens is no error."""
        snapshot = self._index.longest(token_ids)
        if snapshot is not None and snapshot.tokens == len(token_ids):
            self._forget(snapshot)

    def _admit(self, found: Snapshot | None, tokens: int) -> int | None:
        """A slot that continues from a snapshot; the snapshot outlives the making of room."""
        self._protected = found
        try:
            if found is None:
                return self.cache.acquire(tokens)
            self._touch(found)
            return self._from_device(found, tokens) if found.kept else self._from_below(found, tokens)
        finally:
            self._protected = None

    def _from_device(self, found: Snapshot, tokens: int) -> int | None:
        kept = found.kept
        assert kept is not None
        full = kept.tokens // PAGE_TOKENS
        self.cache.pool.use(kept.pages[full:])  # until it is copied
        try:
            slot = self.cache.acquire(tokens, kept.pages[:full])
            if slot is not None:
                self.cache.continue_from(kept, slot)
        finally:
            self.cache.pool.leave(kept.pages[full:])
        return slot

    def _from_below(self, found: Snapshot, tokens: int) -> int | None:
        slot = self.cache.acquire(tokens)
        if slot is not None:
            state = found.host if found.host is not None else HostState(**load_file(str(found.file)))
            self.cache.fill(slot, state)
            try:
                if self._device.budget:
                    with self._forgotten_if_lost(found):
                        self._keep(found, slot)
            except UserError:
                self.cache.release(slot)
                raise
        return slot

    def _keep(self, snapshot: Snapshot, slot: int) -> None:
        """Copy the state in a slot to the device level; what has to leave may take its place below."""
        if not snapshot.pinned:
            self._leave_lower_levels(snapshot)
        while not self.cache.free_snapshots:
            self._leave_device(self._device.oldest())
        snapshot.kept = self.cache.keep(slot, snapshot.tokens)
        self._device.add(snapshot, self.cache.slot_bytes)

    def _leave_device(self, snapshot: Snapshot) -> None:
        kept = snapshot.kept
        assert kept is not None
        if snapshot.host is None:
            self._lower(snapshot, lambda: self.cache.export(kept.slot, kept.pages))
        self._device.remove(snapshot)
        snapshot.kept = None
        self.cache.drop(kept)

    def _lower(self, snapshot: Snapshot, export: Callable[[], HostState]) -> None:
        """Hold a state on the host, else in a file, else nowhere."""
        size = self.cache.slot_bytes
        size += pages_of(snapshot.tokens) * self.cache.page_bytes if self.cache.paged else 0
        if self._space(self._host, size, self._spill):
            snapshot.host = export()
            self._host.add(snapshot, size)
        elif self._space(self._files, size, self._forget):
            self._write(snapshot, export(), size)
        else:
            self._index.remove(snapshot.node)

    def _space(self, tier: Tier, size: int, evict: Callable[[Snapshot], None]) -> bool:
        """Make room in a level; False if it cannot hold so much."""
        if size > tier.budget:
            return False
        while tier.used + size > tier.budget:
            if not tier.others(self._protected):
                return False
            evict(tier.oldest(self._protected))
        return True

    def _spill(self, snapshot: Snapshot) -> None:
        """From the host to a file, or away."""
        size, state = self._host.remove(snapshot), snapshot.host
        assert state is not None
        snapshot.host = None
        with self._forgotten_if_lost(snapshot):
            if self._space(self._files, size, self._forget):
                self._write(snapshot, state, size)
            elif snapshot.kept is None:
                self._index.remove(snapshot.node)

    def _write(self, snapshot: Snapshot, state: HostState, size: int) -> None:
        assert self.limits is not None and self.limits.folder is not None
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="snapshots-", dir=self.limits.folder)
        self._files_written += 1
        file = Path(self._folder.name, f"{self._files_written}.safetensors")
        state.wait()
        try:
            save_file({"conv": state.conv, "ssm": state.ssm, "kv": state.kv}, file)
        except (OSError, SafetensorError) as error:
            file.unlink(missing_ok=True)
            raise UserError(f"[cache] prefix_folder: cannot write {file}: {error}") from None
        snapshot.file = file
        self._files.add(snapshot, size)

    @contextmanager
    def _forgotten_if_lost(self, snapshot: Snapshot) -> Iterator[None]:
        """Where a file could not be written, and the state is at no other level, nobody is to find it."""
        try:
            yield
        except UserError:
            if snapshot.lost:
                self._index.remove(snapshot.node)
            raise

    def _forget(self, snapshot: Snapshot) -> None:
        self._leave_lower_levels(snapshot)
        snapshot.pinned = False
        if snapshot.kept is not None:
            self._device.remove(snapshot)
            self.cache.drop(snapshot.kept)
            snapshot.kept = None
        self._index.remove(snapshot.node)

    def _leave_lower_levels(self, snapshot: Snapshot) -> None:
        self._host.remove(snapshot)
        self._files.remove(snapshot)
        snapshot.host = None
        if snapshot.file is not None:
            snapshot.file.unlink()
            snapshot.file = None

    def _touch(self, snapshot: Snapshot) -> None:
        for tier in (self._device, self._host, self._files):
            tier.touch(snapshot)

    def _free_pages(self, count: int) -> None:
        while self.cache.pool.free < count:
            self._leave_device(self._device.oldest(self._protected))
