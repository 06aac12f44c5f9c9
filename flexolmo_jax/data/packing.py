"""Documents of any length -> records of one length: best-fit packing with a bounded number of open
records.

A document goes into the open record that it fills best and opens a new one where it fits in none;
when too many are open, the fullest is closed. A document that fits in a record is never split; a
longer one is cut into whole records and a tail, which is packed like a document. The result depends
on the order of the documents and on nothing else.
"""

from bisect import bisect_left, insort

import numpy as np

OPEN_RECORDS = 256
MAX_SEGMENTS = np.iinfo(np.uint16).max  # segments are stored as uint16, 0 being padding

Pieces = list[np.ndarray]  # what one record holds: documents or pieces of documents, in order


class Packer:
    """Packs documents as they come; holds at most `open_records` records in memory."""

    def __init__(self, seq_len: int, open_records: int = OPEN_RECORDS):
        self.seq_len = seq_len
        self.open_records = open_records
        # (free tokens, record number), sorted: the best fit is a bisection away
        self._rooms: list[tuple[int, int]] = []
        self._pieces: dict[int, Pieces] = {}
        self._opened = 0

    def add(self, document: np.ndarray) -> list[Pieces]:
        """Takes a document (int [n], n > 0) and returns the records that are now complete."""
        closed = []
        for start in range(0, len(document), self.seq_len):
            closed += self._place(document[start : start + self.seq_len])
        return closed

    def flush(self) -> list[Pieces]:
        """Closes and returns all open records, the fullest first."""
        closed = [self._pieces.pop(record) for _, record in self._rooms]
        self._rooms.clear()
        return closed

    def _place(self, piece: np.ndarray) -> list[Pieces]:
        at = bisect_left(self._rooms, (len(piece), 0))
        if at < len(self._rooms):
            room, record = self._rooms.pop(at)
        else:
            room, record = self.seq_len, self._opened
            self._opened += 1
            self._pieces[record] = []
        pieces = self._pieces[record]
        pieces.append(piece)
        room -= len(piece)
        if room == 0 or len(pieces) == MAX_SEGMENTS:
            return [self._pieces.pop(record)]
        insort(self._rooms, (room, record))
        if len(self._rooms) > self.open_records:
            return [self._pieces.pop(self._rooms.pop(0)[1])]
        return []


def lay_out(pieces: Pieces, seq_len: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """One record as tokens int [T] (padding: `pad_id`) and segments uint16 [T] (padding: 0; pieces:
    1, 2, ...)."""
    tokens = np.full(seq_len, pad_id, pieces[0].dtype)
    segments = np.zeros(seq_len, np.uint16)
    filled = np.concatenate(pieces)
    tokens[: len(filled)] = filled
    segments[: len(filled)] = np.repeat(
        np.arange(1, len(pieces) + 1, dtype=np.uint16), [len(piece) for piece in pieces]
    )
    return tokens, segments
