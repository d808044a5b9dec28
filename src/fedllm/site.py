"""One site of a federation: its rows, its half of the experiment, what it allows and what left."""

from __future__ import annotations

import json
import time
from pathlib import Path

from fedllm import experiment as ex
from fedllm import federation, states
from fedllm.data import own
from fedllm.errors import FedllmError
from fedllm.exchange import Endpoint
from fedllm.federation import Prepared, Silent
from fedllm.message import payload_bytes, unpack
from fedllm.remote import Facts, hello

KEPT = 3  # saved states; the server may go back to one of its last two checkpoints


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
            raise FedllmError(f"site {site.name!r} refuses this experiment: {reason}")
        self.name = site.name
        prepared = federation.prepare(
            experiment, seed,
            divided=lambda columns: own.division(experiment, columns, site.data, site.name),
        )  # fmt: skip
        half = federation.halve(experiment, seed, prepared, Silent())
        self._worker = federation.host(half, experiment, prepared, run, Silent())
        mine = self._worker.sites[site.name]
        self.rows = len(mine.train), len(mine.test)
        self._endpoint = Endpoint(self._worker.handle, experiment.exchange.codecs)  # type: ignore[arg-type]
        self._states = folder / "states"
        self._worker.states.attach(self._states)
        self._saved: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._audit, self._paused = folder / "audit.jsonl", folder / "paused.json"
        self.facts: Facts = hello(
            half.model.base_hash, prepared.labels, federation.copied(experiment, prepared)
        )

    def go_on(self) -> None:
        """Take the round up where the process before this one left it (``pause``)."""
        try:
            standing = json.loads(self._paused.read_text())
            states.verify(self._states, [*standing["now"].values(), *standing["then"].values()])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError) as error:
            raise FedllmError(f"{self._paused}: cannot be read ({error})") from None
        self._worker.stand(standing)
        self._saved = [str(name) for name in standing["saved"]]

    def pause(self) -> None:
        """Write down what the next process needs to go on."""
        standing = {**self._worker.standing(), "saved": self._saved}
        aside = self._paused.with_suffix(".part")
        aside.write_text(json.dumps(standing))
        aside.replace(self._paused)
        if len(self._saved) == KEPT:
            kept = [*self._saved, *standing["now"].values(), *standing["then"].values()]
            states.sweep(self._states, kept)

    def welcomed(self, facts: Facts) -> None:
        """Go back to the state of the last committed round, as the server says."""
        name = str(facts.get("state", ""))
        names = {self.name: name} if name else {}
        states.verify(self._states, names.values())
        self._worker.restore(names)

    def answer(self, frame: bytes) -> bytes:
        """Answer one frame."""
        reply = self._endpoint({self.name: frame})[self.name]
        message, _ = unpack(reply)
        if message.step == "commit":
            self._keep(str(message.facts.get("state", "")))
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"), "run": message.run, "round": message.round,
            "step": message.step, "bytes": len(reply),
            "roles": {role.value: size for role, size in payload_bytes(message).items()},
        }  # fmt: skip
        with self._audit.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return reply

    def _keep(self, name: str) -> None:
        if name:
            self._saved = [*[one for one in self._saved if one != name], name][-KEPT:]
            if len(self._saved) == KEPT:  # a fresh process does not know what it saved before
                states.sweep(self._states, self._saved)
