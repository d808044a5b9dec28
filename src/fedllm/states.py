"""
What clients keep from round to round: in memory up to a limit, the rest on disk.

A state is written once, under a name made of its content, and never changed; a checkpoint lists
the names. So ten thousand clients need the memory of those that are at work.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from fedllm.errors import FedllmError

State = dict[str, Tensor]
NAME = r"[0-9a-f]{40}\.safetensors"
LIMIT = 256 * 2**20  # bytes of states in memory


class States:
    """
    A state for each client that has one, committed round by round.

    ``put`` belongs to the open round: ``commit`` makes it what ``rollback`` goes back to.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        """folder: where states lie that do not fit; None: a temporary one, should it come to it."""
        self._folder, self._limit = folder, limit
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._now: dict[str, str] = {}  # client -> name of its state
        self._then: dict[str, str] = {}  # the same as of the last committed round
        self._cache: OrderedDict[str, State] = OrderedDict()  # by name, the oldest first
        self._sizes: dict[str, int] = {}
        self._held = 0
        self._count = 0
        self._owner: dict[str, str] = {}  # of states that are not written yet

    @property
    def folder(self) -> Path:
        """Where states are written."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="fedllm-")
            self._folder = Path(self._temporary.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def attach(self, folder: Path) -> None:
        """Write to this folder from now on. Only before anything was written elsewhere."""
        assert self._temporary is None
        self._folder = folder

    def get(self, client: str) -> State:
        """A client's state; empty where it has none."""
        return self._get(self._now.get(client))

    def committed(self, client: str) -> State:
        """The same as of the last committed round: what a rollback goes back to."""
        return self._get(self._then.get(client))

    def _get(self, name: str | None) -> State:
        if name is None:
            return {}
        if name in self._cache:
            self._cache.move_to_end(name)
            return dict(self._cache[name])
        state = _read(self.folder / name)
        self._remember(name, state)
        return dict(state)

    def put(self, client: str, state: Mapping[str, Tensor]) -> None:
        """Replace a client's state in the open round."""
        self._count += 1
        name = f"new-{self._count}"  # named by its content once it is written
        old = self._now.get(client)
        self._now[client] = name
        self._owner[name] = client
        self._remember(name, dict(state))
        if old is not None and old != self._then.get(client):
            self._forget(old)

    def commit(self, client: str) -> None:
        """What is there now is what a rollback goes back to."""
        old, new = self._then.get(client), self._now.get(client)
        if new is not None and new != old:
            self._then[client] = new
            if old is not None:
                self._forget(old)

    def rollback(self, client: str) -> None:
        """Go back to the last committed state."""
        new, old = self._now.pop(client, None), self._then.get(client)
        if old is not None:
            self._now[client] = old
        if new is not None and new != old:
            self._forget(new)

    def save(self) -> dict[str, str]:
        """Write what is not written yet; returns the name of each client's state."""
        for name in list(self._now.values()):
            if name in self._owner:
                self._write(name)
        return dict(sorted(self._now.items()))

    def restore(self, names: Mapping[str, str]) -> None:
        """Go back to what ``save`` returned."""
        self._now, self._then = dict(names), dict(names)
        self._cache.clear()
        self._owner.clear()
        self._sizes.clear()
        self._held = 0

    def standing(self) -> tuple[dict[str, str], dict[str, str]]:
        """Names of the states in the open round, and of those committed before; all are written."""
        for name in {*self._now.values(), *self._then.values()} & set(self._owner):
            self._write(name)
        return dict(sorted(self._now.items())), dict(sorted(self._then.items()))

    def stand(self, now: Mapping[str, str], then: Mapping[str, str]) -> None:
        """Go on in the open round, where ``standing`` was asked."""
        self.restore(now)
        self._then = dict(then)

    def _remember(self, name: str, state: State) -> None:
        size = sum(t.numel() * t.element_size() for t in state.values())
        self._cache[name] = state
        self._sizes[name] = size
        self._held += size
        while self._held > self._limit and len(self._cache) > 1:
            oldest = next(iter(self._cache))
            if oldest in self._owner:
                oldest = self._write(oldest)
            self._drop(oldest)

    def _write(self, name: str) -> str:
        """Give a state its file, and the name of that file."""
        client = self._owner.pop(name)
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in
                 self._cache[name].items()}  # fmt: skip
        data = safetensors.torch.save(state)
        written = f"{hashlib.sha256(data).hexdigest()[:40]}.safetensors"
        target = self.folder / written
        aside = target.with_suffix(".part")
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)  # also over an old one, which may be damaged
        for names in (self._now, self._then):
            if names.get(client) == name:
                names[client] = written
        if written in self._cache:  # another client's is the same
            self._held -= self._sizes.pop(name)
            del self._cache[name]
        else:
            self._cache[written] = self._cache.pop(name)
            self._sizes[written] = self._sizes.pop(name)
        return written

    def _forget(self, name: str) -> None:
        """A state that no round refers to; those on disk go with the checkpoints."""
        if name in self._cache:
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._owner.pop(name, None)
        del self._cache[name]
        self._held -= self._sizes.pop(name)


def _read(path: Path) -> State:
    """A written state. Raises FedllmError when it is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FedllmError(f"{path}: a client's state cannot be read ({error.strerror})") from None
    if not path.name.startswith(hashlib.sha256(data).hexdigest()[:40]):
        raise FedllmError(f"{path}: damaged client state (hash differs)")
    return safetensors.torch.load(data)


def verify(folder: Path, names: Iterable[str]) -> None:
    """Raise FedllmError unless all these states are there and whole."""
    for name in sorted(set(names)):
        _read(folder / name)


def sweep(folder: Path, keep: Iterable[str]) -> None:
    """Remove states that no checkpoint lists any more."""
    wanted = set(keep)
    for path in folder.glob("*"):
        if path.name not in wanted:
            path.unlink()
