"""One site of a federation: its rows, its half of the experiment, what it allows and what left."""

from __future__ import annotations

import fcntl
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm import experiment as ex
from fedllm import federation, states
from fedllm.data import own
from fedllm.errors import FedllmError, Refusal
from fedllm.exchange import Endpoint
from fedllm.federation import Prepared, Silent
from fedllm.message import Frame, outline
from fedllm.remote import Facts, hello


def prepare_server(experiment: ex.Experiment, seed: int) -> Prepared:
    """What the server of a federation has: the public set, the labels, and nobody's rows."""
    return federation.prepare(
        experiment, seed, divided=lambda columns: own.division(experiment, columns, None)
    )


class Hosted:
    """
    A site's half of one run, behind ``answer``: frame in, frame out.

    Its state lies in ``folder``, and so does ``audit.jsonl``: a line for every frame that left.
    """

    def __init__(
        self, experiment: ex.Experiment, seed: int, site: ex.SiteFile, run: str, folder: Path
    ) -> None:
        """Raises FedllmError for what the site does not allow, and for rows that do not fit."""
        if reason := site.allow.refusal(experiment):
            raise Refusal(f"site {site.name!r} refuses this experiment: {reason}")
        self.name = site.name
        prepared = federation.prepare(
            experiment, seed,
            divided=lambda columns: own.division(experiment, columns, site.data, site.name),
        )  # fmt: skip
        half = federation.halve(experiment, seed, prepared, Silent())
        self._worker = federation.host(half, experiment, prepared, run, Silent())
        self._worker.discreet = True
        mine = self._worker.sites[site.name]
        self.rows = mine.train.cases, mine.test.cases
        self._endpoint = Endpoint(
            self._worker.handle, experiment.exchange.codecs, experiment.rounds,  # type: ignore[arg-type]
            seed, self._worker,
        )  # fmt: skip
        self._states = folder / "states"
        self._worker.states.attach(self._states)
        self._audit, self._paused = folder / "audit.jsonl", folder / "paused.json"
        self.facts: Facts = hello(
            half.model.base_hash, prepared.labels, federation.copied(experiment, prepared),
            half.bases.get(site.name, ""),
        )  # fmt: skip

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process of this site works on this run."""
        self._paused.parent.mkdir(parents=True, exist_ok=True)
        with self._paused.with_name("lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed
            yield

    def go_on(self, begun: str = "") -> None:
        """
        Take the round up where the process before this one left it (``pause``).

        begun: the word of the server that asks. Raises FedllmError where there is nothing to go
        on from, or another server left it there.
        """
        try:
            standing = json.loads(self._paused.read_text())
            states.verify(self._states, [*standing["now"].values(), *standing["then"].values()])
        except (OSError, ValueError, KeyError) as error:
            raise FedllmError(f"{self._paused}: cannot be read ({error})") from None
        if standing["begun"] != begun:
            raise FedllmError(f"{self._paused}: of a server that began at another time")
        self._worker.stand(standing)

    def pause(self, begun: str = "") -> None:
        """Write down what the next process needs to go on."""
        federation.write_json(self._paused, {**self._worker.standing(), "begun": begun})

    def welcomed(self, facts: Facts) -> None:
        """Go back to the state of the last committed round, as the server says."""
        name = str(facts.get("state", ""))
        if name and not re.fullmatch(states.NAME, name):
            raise FedllmError(f"the server's state {name[:80]!r}: not the name of one")
        names = {self.name: name} if name else {}
        states.verify(self._states, names.values())
        self._worker.restore(names)

    def answer(self, frame: Frame) -> bytes:
        """Answer one frame."""
        reply = self._endpoint({self.name: frame})[self.name]
        asked, _ = outline(frame)
        if asked["task"] == "save" and "keep" in asked["facts"]:
            standing = self._worker.standing()
            kept = [*str(asked["facts"]["keep"]).split(), *standing["now"].values()]
            states.sweep(self._states, [*kept, *standing["then"].values()])
        return reply

    def sent(self, frame: Frame) -> None:
        """A line in the audit for a frame that leaves."""
        said, roles = outline(frame)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            **{key: said[key] for key in ("run", "round", "step", "task")},
            "bytes": len(frame), "roles": roles,
        }  # fmt: skip
        self._audit.parent.mkdir(parents=True, exist_ok=True)
        with self._audit.open("a") as file:
            file.write(json.dumps(line) + "\n")
