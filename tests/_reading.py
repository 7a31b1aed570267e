"""Output layers whose weight is read in small chunks, so that there are several of them."""

from __future__ import annotations


def read_in_chunks(head, size):
    """Makes the predictions of head read `size` classes at a time."""
    make = head._reader

    def reader():
        made = make()
        whole = made.weight_chunks
        made.weight_chunks = lambda _: whole(size)
        return made

    head._reader = reader
