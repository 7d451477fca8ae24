"""The file of votes while people label: appended to, never rewritten; a vote that was taken is on the disk."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from pathlib import Path
from threading import Lock

from model_core.data.votes import Vote, parse_vote, parse_votes, vote_line
from model_core.documents import UserError
from model_core.storage.file import sync


class VotesFile:
    """A votes file, held by this process alone until it is closed.

    `votes` are its votes in order; `repaired` says in a sentence what was done about a last line that a killed process left
    unfinished, and is None where there was none.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, or begins one. Raises UserError when it cannot be written, is in use, or holds what is no vote."""
        self.path = path.expanduser().absolute()
        self.repaired: str | None = None
        self._lock = Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"votes {path}: cannot be written ({error.strerror})") from error
        try:
            self.votes = self._take_over()
        except BaseException:
            os.close(self._file)
            raise

    def append(self, vote: Vote) -> None:
        """Adds a vote; it is on the disk when this returns. Raises OSError when it cannot be, and the file is as it was then."""
        with self._lock:
            size = os.fstat(self._file).st_size
            try:
                self._write(vote_line(vote))
            except OSError:
                os.ftruncate(self._file, size)
                raise
            self.votes.append(vote)

    def close(self) -> None:
        """Lets go of the file, once a vote that is being written is there."""
        with self._lock:
            os.close(self._file)

    def _take_over(self) -> list[Vote]:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise UserError(f"votes {self.path}: found something else than a file; allowed is a file that can be kept")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"votes {self.path}: in use by another labelling page; allowed is one at a time, or --votes another file"
            ) from error
        data = self.path.read_bytes()
        whole, newline, last = data.rpartition(b"\n")
        votes = parse_votes(whole, f"votes {self.path}")
        if last:
            votes += self._repair(last, keep=len(whole + newline))
        sync(self.path.parent)
        return votes

    def _repair(self, last: bytes, *, keep: int) -> list[Vote]:
        """Ends a last line that lacks its newline alone, and moves any other out of the way."""
        if is_json(last):
            vote = parse_vote(last, f"votes {self.path}: last line")
            self._write(b"\n")
            self.repaired = f"the last line of {self.path} had no end; its vote is whole and counts"
            return [vote]
        aside = self.path.with_name(self.path.name + ".torn")
        with aside.open("ab") as file:
            file.write(last + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync(self.path.parent)
        os.ftruncate(self._file, keep)
        os.fsync(self._file)
        self.repaired = f"the last line of {self.path} was torn ({len(last)} bytes); it was moved to {aside}"
        return []

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)


def is_json(line: bytes) -> bool:
    """Whether a line is whole: no proper beginning of a JSON object is JSON."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
