"""Text as it is generated: characters that are complete, up to a stop string."""

from collections.abc import Sequence

from ssm_dist.text.tokenizer import Tokenizer

_UNDECODED = "\N{REPLACEMENT CHARACTER}"  # what decoders make of bytes that are no character, or not yet one
_REACH = 4  # bytes of the longest UTF-8 character, so tokens that an unfinished one may span


class TextStream:
    """Decodes ids one by one; what `push` and `finish` return adds up to `decode` of all ids.

    That holds for decoders that look at a token and its neighbour, and for those that join bytes to
    characters (byte-level, byte fallback). Each push decodes a window of a few tokens, whatever came before.
    With stop strings, the text ends before the one that is completed first (the longest, if several are at
    once), so it does not depend on how the text is cut into tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped: str | None = None
        """The stop string met."""
        self._tokenizer = tokenizer
        # The ids that the text to come depends on: the last one decoded for good, and those after it.
        self._window: list[int] = []
        self._decoded = 0  # characters of the window's text that are decoded for good
        self._stops = _StopStrings(stop)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Take the next id; returns the text that has become certain, often "", always so after a stop."""
        if self.stopped is not None or not self._tokenizer.shows(token_id):
            return ""
        self._window.append(token_id)
        if token_id not in self._tokenizer.byte_ids:
            return self._release(self._decode_window(final=False), final=False)
        # One bad byte turns a whole run of them into replacement characters, so a run is held back to its
        # end, which is here if it completes a stop string.
        return self.finish() if self._stops.any and self._completes_stop() else ""

    def finish(self) -> str:
        """The rest of the text, when no id will follow."""
        if self.stopped is not None:
            return ""
        return self._release(self._decode_window(final=True), final=True)

    def _completes_stop(self) -> bool:
        return self._stops.completed_by(self._tokenizer.decode(self._window)[self._decoded :])

    def _decode_window(self, final: bool) -> str:
        """The window's characters that are new and cannot change any more; drops ids no longer needed."""
        text = self._tokenizer.decode(self._window)
        unfinished = text.endswith(_UNDECODED) and not final
        piece = text[self._decoded : len(text) - unfinished]
        self._decoded = len(text) - unfinished
        keep = _REACH if unfinished else 1
        if len(self._window) >= 2 * keep:
            self._window = self._window[-keep:]
            self._decoded = len(self._tokenizer.decode(self._window)) - unfinished
        return piece

    def _release(self, piece: str, final: bool) -> str:
        released, self.stopped = self._stops.pass_on(piece, final)
        self._pieces.append(released)
        return released


class _StopStrings:
    """Holds back what may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest_start = max((len(string) - 1 for string in stop), default=0)
        self._held = ""
        self.any = bool(stop)

    def completed_by(self, piece: str) -> bool:
        """Whether the text held back and `piece` contain a stop string."""
        text = self._held + piece
        return any(string in text for string in self._stop)

    def pass_on(self, piece: str, final: bool) -> tuple[str, str | None]:
        """Text that can be shown after `piece` came, all of it if final, and the stop string that ends it."""
        text = self._held + piece
        met = [string for string in self._stop if string in text]
        if met:
            first = min(met, key=lambda string: (text.find(string) + len(string), -len(string)))
            return text[: text.find(first)], first
        cut = len(text) if final else len(text) - self._possible_start(text)
        self._held = text[cut:]
        return text[:cut], None

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        lengths = range(min(len(text), self._longest_start), 0, -1)
        return next((n for n in lengths if any(string.startswith(text[-n:]) for string in self._stop)), 0)
