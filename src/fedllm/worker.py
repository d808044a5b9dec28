"""Hosts one or many clients in one process and answers what they are asked."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm import experiment as ex
from fedllm.data.examples import Examples
from fedllm.errors import FedllmError
from fedllm.lora import shape_fits
from fedllm.message import Failure, Message, Role, of_role
from fedllm.models.loading import LanguageModel
from fedllm.states import State, States
from fedllm.strategies.base import Site, Strategy
from fedllm.strategies.corrections import SLOT
from fedllm.strategies.parameters import Parameters
from fedllm.training.cohort import together
from fedllm.training.evaluate import generate, preferences, rouge_l, statistics
from fedllm.training.jobs import Tasked

LOG = logging.getLogger(__name__)
TAKES = ("train", "replace", "evaluate")  # tasks whose tensors are parameters
LEFT_OUT = "left-out"  # group of a client's state: what its codecs did not send (``exchange``)
PAID = "paid"  # group of a client's state: what it computed once (``training.known``)
REMEMBERED = 16  # answers that are kept in case they got lost, besides those of the last call


class Worker:
    """
    ``handle`` takes many clients' messages in one call.

    Committed rounds: a client's state as of the last committed round is kept until the next one
    opens; a round asked again (a higher attempt) starts from there. A repeated message id
    returns the stored reply; another run's message or another base is refused.
    """

    def __init__(
        self, sites: Mapping[str, Site], strategy: Strategy, run: str, base: str,
        tokenizers: Mapping[str, Any], states: States | None = None,
    ) -> None:  # fmt: skip
        """
        base: hash of the frozen weights that the server must have, too.  tokenizers: of each
        model, by its name.  states: those that the sites were built with.
        """
        self.sites, self.strategy, self.run, self.base = dict(sites), strategy, run, base
        self.tokenizers = tokenizers
        self.states = states or States()
        self.discreet = False  # whether the text of an unforeseen error stays here
        self._attempt: dict[str, tuple[int, int]] = {}
        self._last: OrderedDict[str, tuple[str, Message | Failure]] = OrderedDict()
        self._round = 0

    def handle(self, messages: Mapping[str, Message]) -> dict[str, Message | Failure]:
        """Answer each client's message; one client's fault leaves the others untouched."""
        replies = {client: self._known(client, message) for client, message in messages.items()}
        tasks = {}
        for client, reply in replies.items():
            if reply is None:
                self._open(self.sites[client], messages[client])
                tasks[client] = self._answer(self.sites[client], messages[client])
        for client, result in together(tasks).items():
            replies[client] = self._finish(client, messages[client], result)
        while len(self._last) > max(len(messages), REMEMBERED):
            self._last.popitem(last=False)
        return {client: reply for client, reply in replies.items() if reply is not None}

    def _known(self, client: str, message: Message) -> Message | Failure | None:
        """The answer to what is refused, or was answered before."""
        if client not in self.sites:
            return Failure(client, message.step, "no such client here")
        if message.run != self.run:
            return Failure(client, message.step, f"asked by another run ({message.run!r})")
        if message.base != self.base:
            return Failure(
                client, message.step,
                f"the server's base model differs (hash {message.base}, here {self.base})",
            )  # fmt: skip
        if (message.round, message.attempt) < self._attempt.get(client, (0, 0)):
            return Failure(client, message.step, f"of round {message.round}, which is over")
        last = self._last.get(client)
        return last[1] if last is not None and last[0] == message.id else None

    def _answer(self, site: Site, message: Message) -> Tasked[Message]:
        controlled = isinstance(self.strategy, Parameters) and self.strategy.scaffold
        _only_tunables(site, message, SLOT if controlled else "")
        if message.task == "evaluate":
            return (yield from self._evaluate(site, message))
        if message.task == "save":
            return Message("commit", facts={"state": self.snapshot().get(site.name, "")})
        task = self.strategy.tasks.get(message.task)
        if task is None:
            raise FedllmError(f"this strategy has no task {message.task!r}")
        reply = task(site, message)
        return reply if isinstance(reply, Message) else (yield from reply)

    def _finish(
        self, client: str, message: Message, result: Message | Exception
    ) -> Message | Failure:
        """Add what the answer cost, or name the fault; kept in case it is asked for again."""
        site = self.sites[client]
        costs = site.meter.take()
        before = set(site.group(PAID))
        if isinstance(result, Message):
            result.facts.update(costs)
            if site.meter.paid != before:
                site.keep(PAID, {name: torch.ones(1, dtype=torch.int8) for name in site.meter.paid})
            reply: Message | Failure = result
        elif isinstance(result, FedllmError):
            reply = Failure(client, message.step, str(result))
        else:
            level = logging.WARNING if self.discreet else logging.DEBUG
            LOG.log(level, "client %s, step %s", client, message.step, exc_info=result)
            more = "the site's log says more" if self.discreet else str(result)
            reply = Failure(client, message.step, f"{type(result).__name__}: {more}")
        if isinstance(reply, Failure):
            site.meter.paid = before  # nobody heard of these costs
        if message.task != "evaluate":  # asked again it is only computed again
            self._last[client] = (message.id, reply)
            self._last.move_to_end(client)
        return reply

    def recall(self, client: str) -> dict[str, State]:
        """What a client's codecs left out of tensors, as of the last committed round."""
        found: dict[str, State] = {}
        if client in self.sites:
            for key, tensor in self.states.committed(client).items():
                if key.startswith(f"{LEFT_OUT}/"):
                    name, _, part = key.removeprefix(f"{LEFT_OUT}/").rpartition("//")
                    found.setdefault(name, {})[part] = tensor
        return found

    def retain(self, client: str, states: Mapping[str, State]) -> None:
        """Keep what they leave out in the open round."""
        flat = {f"{name}//{part}": t for name, state in states.items() for part, t in state.items()}
        self.sites[client].keep(LEFT_OUT, flat)

    def standing(self) -> dict[str, Any]:
        """What a worker in another process needs to go on in the open round."""
        now, then = self.states.standing()
        return {
            "now": now,
            "then": then,
            "attempts": {c: list(a) for c, a in self._attempt.items()},
        }

    def stand(self, standing: Mapping[str, Any]) -> None:
        """
        Go on where another worker's ``standing`` left off.

        What lives only while a round is open (``Site.live``) is not brought along.
        """
        self.states.stand(standing["now"], standing["then"])
        for client, (number, attempt) in standing["attempts"].items():
            self._attempt[client] = (int(number), int(attempt))
            self._round = max(self._round, int(number))
            site = self.sites[client]
            site.round = int(number)
            site.meter.paid = set(site.group(PAID))

    def _open(self, site: Site, message: Message) -> None:
        now = (message.round, message.attempt)
        before = self._attempt.get(site.name)
        if before == now:
            return
        if before is not None and before[0] == message.round:
            self.states.rollback(site.name)  # asked again: as if nothing happened
        else:
            self.states.commit(site.name)
        if message.round != self._round:  # nobody asks for the answers of an earlier round
            self._last.clear()
            self._round = message.round
        site.live.clear()
        site.meter.paid = set(site.group(PAID))
        site.round = message.round
        self._attempt[site.name] = now

    def _evaluate(self, site: Site, message: Message) -> Tasked[Message]:
        """Sums over the client's held-out rows: of the candidate, or of its own model."""
        own = message.facts["model"] == "own"
        model, test = site.model, site.test
        if not own and site.server_model is not None and site.server_data is not None:
            model, test = site.server_model, site.server_data[site.name].test
        tunables: dict[str, Tensor] = dict(message.tensors)
        if own or not self.strategy.evaluates_clients:
            tunables = {**self.strategy.own(site), **tunables}
        model = model.stage(tunables)
        settings = site.setup.evaluation
        task, size = site.setup.task, settings.batch_size
        if task.kind == "preference":
            reference = yield from site.reference("test", test, "eval")
            sums = yield from preferences(
                model, tunables, test, reference, task.beta, size, site.meter, "eval"
            )
        else:
            sums = yield from statistics(model, tunables, test, size, site.meter, "eval")
        if settings.rouge_examples and test.prompts:
            with site.meter.step("eval"):
                sums |= self._rouge(settings, model, tunables, test)
        return Message("eval", tensors=sums, roles=of_role(Role.STATISTIC, sums))

    def _rouge(
        self, settings: ex.Evaluation, model: LanguageModel, tunables: dict[str, Tensor],
        test: Examples,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Rouge-L of the first responses; rows and tokenizer are those of the model."""
        tokenizer = self.tokenizers[model.name]
        count = min(settings.rouge_examples, len(test))
        score = 0.0
        for row in range(count):
            prompt = test.row(row)[: test.prompt_lengths[row]].tolist()
            new = generate(model, tunables, prompt, tokenizer.eos_token_id, settings.max_new_tokens)
            said = tokenizer.decode(new, skip_special_tokens=True)
            score += rouge_l(said, test.responses[row])
        return {
            "rouge": torch.tensor([score], dtype=torch.float64),
            "rouge_units": torch.tensor([count], dtype=torch.int64),
        }

    def attach(self, folder: Path) -> None:
        """Where to keep the clients' states."""
        self.states.attach(folder)

    def snapshot(self) -> dict[str, str]:
        """Every client's state, by name, for a checkpoint."""
        for site in self.sites.values():
            site.live.clear()  # it ends with the round
        return self.states.save()

    def restore(self, names: Mapping[str, str]) -> None:
        """Go back to a checkpoint's states."""
        self.states.restore(names)
        for site in self.sites.values():
            site.live.clear()
        self._attempt.clear()
        self._last.clear()


def _only_tunables(site: Site, message: Message, beside: str) -> None:
    """
    Raise FedllmError for parameters that are none of this experiment's tunables.

    beside: how names end of tensors that come with these tunables, one for each; empty: of none.

    The base is frozen, and a site allowed these tunables and no others. Tasks that take parameters
    take nothing else, whatever the sender calls it, but what an optimizer remembers of tunables.
    """
    every = (site.model, site.model.before, site.server_model)
    models = [model for model in every if model is not None]
    takes = message.task in TAKES
    for name, tensor in message.tensors.items():
        if not takes and message.roles[name] is not Role.PARAMETER:
            continue
        of, mark, slot = name.partition("|")
        shapes = [tuple(model.initial[of].shape) for model in models if of in model.initial]
        if not mark or (message.task == "train" and mark + slot == beside):
            fits = any(shape_fits(of, tensor.shape, own) for own in shapes)
        elif message.task == "replace":  # what an optimizer remembers
            fits = bool(shapes) and tuple(tensor.shape) in ([()] if slot == "step" else shapes)
        else:
            fits = False
        if not fits or tensor.dtype is not torch.float32:
            raise FedllmError(
                f"{name!r} of {tuple(tensor.shape)} is none of this experiment's tunables"
            )
