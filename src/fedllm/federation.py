"""Builds server, clients, transport and ledger from an Experiment, and runs it into a folder."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

import fedllm
from fedllm import checkpoint, round
from fedllm import experiment as ex
from fedllm.checkpoint import Committed
from fedllm.data.clients import ClientData, Clients
from fedllm.data.examples import Encoder, Examples
from fedllm.data.simulation import Division, divide
from fedllm.errors import FedllmError, nearest
from fedllm.estimates.cuts import Cutter
from fedllm.estimates.sizes import Rows, Sizes, crowds
from fedllm.exchange import Endpoint, Exchange
from fedllm.knowledge.interpreter import Interpreter, cache, interpreter
from fedllm.ledger import Ledger
from fedllm.models.export import save_adapter
from fedllm.models.loading import LanguageModel, load, load_config, load_tokenizer
from fedllm.remote import Distant, Remote, hello
from fedllm.round import Federation
from fedllm.states import States
from fedllm.strategies import ServerState, Setup, Site, Strategy, build
from fedllm.strategies.logits import NO_PUBLIC
from fedllm.strategies.parameters import Parameters
from fedllm.summary import summarize, variant
from fedllm.training.cohort import cohort_size, stackable
from fedllm.training.known import Use, remember
from fedllm.training.meter import Measured, Meter, clock_of
from fedllm.training.passes import memory
from fedllm.transport import Transport
from fedllm.transport.local import Local
from fedllm.worker import Worker

UNKNOWN_LIMIT = 0.005
T = TypeVar("T")


class Listener(Protocol):
    """Who wants to hear how a run goes on: a progress bar, a log."""

    def begin(self, name: str, rounds: int, done: int) -> None:
        """A run starts, or goes on after ``done`` rounds."""
        ...

    def step(self, step: str, client: str, rows: int) -> None:
        """A step of the paper at a client; ``rows`` examples more are done."""
        ...

    def round(self, entry: Mapping[str, Any]) -> None:
        """A round is committed."""
        ...

    def note(self, text: str) -> None:
        """Something worth knowing."""
        ...


class Silent:
    """A listener that does not."""

    def begin(self, name: str, rounds: int, done: int) -> None:
        """Nothing."""

    def step(self, step: str, client: str, rows: int) -> None:
        """Nothing."""

    def round(self, entry: Mapping[str, Any]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Prepared:
    """Data of one seed, tokenized once and used by every part of a comparison."""

    clients: Clients
    public: Examples | None
    public_labelled: Examples | None
    labels: tuple[str, ...]
    tokenizer: Any
    longest: int
    notes: tuple[str, ...]
    measured: Measured = field(default_factory=Measured)
    divided: Callable[[Sequence[str]], Division] | None = None  # as for ``prepare``


def positions(experiment: ex.Experiment, name: str | None = None) -> int:
    """Tokens that the model (or another one, by its name) takes beside the tunables' own."""
    config = load_config(experiment.model, name)
    limit = int(getattr(config, "max_position_embeddings", None) or 512)
    return limit - int(getattr(experiment.tunables, "tokens", 0))


def prepare(
    experiment: ex.Experiment,
    seed: int,
    name: str | None = None,
    divided: Callable[[Sequence[str]], Division] | None = None,
) -> Prepared:
    """
    Read, divide and tokenize the data of a simulated federation.

    name: of another model than the experiment's, whose tokenizer to use.  divided: given the
    columns that rows must have, who has which; without it ``[simulation]`` says so.
    Raises FedllmError as ``data.simulation.divide`` and ``data.examples.Encoder`` do.
    """
    limit = positions(experiment, name)
    tokenizer = load_tokenizer(experiment.model, name)
    draft = Encoder(tokenizer, experiment.task, experiment.data, (), limit)
    division = divided(draft.columns) if divided else divide(experiment, draft.columns, seed)
    encode = Encoder(tokenizer, experiment.task, experiment.data, division.labels, limit)
    on = experiment.evaluation.on

    def encoded(client: str) -> ClientData:
        rows = division.clients.pop(client)  # text makes room for its tokens
        where = f"client {client!r}"
        return ClientData(encode(rows.train, where), encode.held_out(getattr(rows, on), where))

    clients = Clients.of((client, encoded(client)) for client in list(division.clients))
    public, public_labelled = _public(experiment, division, encode)
    notes = []
    if division.dropped:
        notes.append(f"{division.dropped} training rows belong to no client and stay unused")
    unknown = clients.test.unknown / max(clients.test.tokens, 1)
    if unknown > UNKNOWN_LIMIT:
        notes.append(
            f"{unknown:.1%} of the tokens are unknown to this tokenizer: losses and bits per byte "
            "come out too low"
        )
    return Prepared(
        clients, public, public_labelled, division.labels, tokenizer, encode.max_tokens,
        tuple(notes), divided=divided,
    )  # fmt: skip


def _public(
    experiment: ex.Experiment, division: Division, encode: Encoder
) -> tuple[Examples | None, Examples | None]:
    """The public set as everybody sees it, and with its labels where they may be seen."""
    rows = division.public
    if not rows:
        return None, None
    if experiment.task.kind != "classification":
        # Its text is an input to everybody; only a labelled set is also a target
        seen = encode.seen(rows, "public set")
        return seen, encode(rows, "public set") if experiment.public.labelled else None
    if experiment.public.labelled:
        whole = encode(rows, "public set")
        return whole, whole
    rows = [{**row, experiment.data.label: division.labels[0]} for row in rows]
    hidden = encode(rows, "public set")
    return replace(hidden, labels=np.full(len(hidden), -1, np.int64)), None


def copied(experiment: ex.Experiment, prepared: Prepared) -> str:
    """Hash of the public set where every site must have a copy of it; else empty."""
    public = prepared.public
    return "" if public is None or experiment.public.ship else public.hash


def merged(prepared: Prepared, kind: str) -> Prepared:
    """One client instead of many: everybody's rows (``all``) or the public set (``public``)."""
    train, test = prepared.clients.train, prepared.clients.test
    if kind == "public":
        if prepared.public_labelled is None:
            raise FedllmError("the public-only bound needs public.labelled = true")
        train = prepared.public_labelled
    return replace(prepared, clients=Clients(train, test, {kind: (len(train), len(test))}))


def assemble(
    experiment: ex.Experiment,
    seed: int,
    prepared: Prepared,
    ledger: Ledger,
    run: str,
    listener: Listener,
    remote: Remote | None = None,
) -> Federation:
    """Put a federation together: its server, and in this process its clients unless ``remote``."""
    if isinstance(experiment.strategy, ex.Logits) and prepared.public is None:
        raise FedllmError(NO_PUBLIC)
    if isinstance(experiment.strategy, ex.Centralized):
        prepared = merged(prepared, "all")
    elif isinstance(experiment.strategy, ex.Standalone) and experiment.strategy.public:
        prepared = merged(prepared, "public")
    half = halve(experiment, seed, prepared, listener)
    spec, model, clock = experiment.exchange, half.model, clock_of(half.model.device)
    transport: Transport
    clients: Worker | Distant
    if remote is None:
        worker = host(half, experiment, prepared, run, listener)
        size = experiment.simulation.cohort or cohort_size(model, experiment.training)
        endpoint = Endpoint(worker.handle, spec.codecs, experiment.rounds, seed, worker)  # type: ignore[arg-type]
        transport = Local(list(worker.sites), endpoint, size)
        clients = worker
    else:
        transport = remote
        clients = Distant(
            hello(model.base_hash, prepared.labels, copied(experiment, prepared)), half.bases
        )
    exchange = Exchange(
        transport, ledger, run, model.base_hash, spec.codecs,  # type: ignore[arg-type]
        spec.minimum_replies, listener.step, prepared.measured, clock, spec.deadline, listener.note,
        experiment.rounds, seed,
    )  # fmt: skip
    if isinstance(clients, Distant):
        clients.exchange = exchange
    return Federation(
        experiment, seed, half.strategy, exchange, clients, ledger, prepared.labels, model
    )


@dataclass(frozen=True)
class Half:
    """
    What the server and a site both build from an experiment.

    others: models of clients who have their own, and the rows in its tokens, by client.
    """

    model: LanguageModel
    others: dict[str, tuple[LanguageModel, Prepared]]
    setup: Setup
    strategy: Strategy

    @property
    def bases(self) -> dict[str, str]:
        """Hashes of the clients' own models; a mentor is nobody's business but its client's."""
        if isinstance(self.strategy, Parameters):
            return {}
        return {name: model.base_hash for name, (model, _) in self.others.items()}


def halve(experiment: ex.Experiment, seed: int, prepared: Prepared, listener: Listener) -> Half:
    if experiment.model.threads:
        torch.set_num_threads(experiment.model.threads)
    spec = experiment.strategy
    steps = spec.steps if isinstance(spec, ex.Standalone) else ()
    if steps and len(steps) != len(prepared.clients):
        raise FedllmError(
            f"strategy.steps: {len(steps)} numbers for {len(prepared.clients)} clients"
        )

    def base_model(name: str | None = None) -> LanguageModel:
        return load(
            experiment.model, experiment.task, experiment.tunables, len(prepared.labels), seed, name
        )

    model = base_model()
    _named(experiment, model)
    others = _client_models(experiment, seed, base_model, model, prepared, listener)
    if isinstance(spec, ex.Parameters) and spec.mentor is not None and len(prepared.clients):
        mentor = _mentor(experiment, spec.mentor, base_model, prepared)
        others = dict.fromkeys(prepared.clients, (mentor, prepared))
    setup = Setup(
        seed, experiment.rounds, experiment.training, experiment.evaluation, experiment.public,
        prepared.longest, _interpreters(experiment, model, prepared, others, listener),
        experiment.task, _width(spec, model, others, list(prepared.clients)),
        _ranks(experiment, prepared), _budgets(experiment, prepared),
        _modules(experiment, prepared), _cuts(spec, prepared), _cutter(experiment, prepared),
    )  # fmt: skip
    narrow = {name: model.only(modules) for name, modules in setup.modules.items()}
    if experiment.model.cache and not experiment.training.base_dropout:
        uses = _uses(experiment, prepared, model, others, narrow)
        size = experiment.training.batch_size
        remark = remember(uses, size, memory(model.device) // 4)
        if remark:
            listener.note(remark)
    return Half(model, others, setup, build(spec, setup, model, prepared.public))


def _named(experiment: ex.Experiment, model: LanguageModel) -> None:
    """Raises FedllmError for a codec of one tunable that there is not; a pattern may fit none."""
    table = experiment.exchange.codecs.get("parameter", {})
    if isinstance(table, str) or not isinstance(
        experiment.strategy, ex.Parameters | ex.Activations
    ):
        return
    there = {n for one in (model, model.before) if one is not None for n in one.initial}
    for key in table:
        name = key.rpartition(":")[2]
        if key not in ex.WAYS and not set(name) & set("*?[") and name not in there:
            raise FedllmError(
                f"exchange.codecs.parameter: {key!r} is no tunable; "
                f"{nearest(key, [*ex.WAYS, *sorted(there)])}"
            )


def host(
    half: Half, experiment: ex.Experiment, prepared: Prepared, run: str, listener: Listener
) -> Worker:
    """The clients whose rows are in this process."""
    model, others, setup = half.model, half.others, half.setup
    sites = {}
    states, listen, clock = States(), listener.step, clock_of(model.device)
    for name in prepared.clients:
        meter = Meter(prepared.measured, name, listen, clock)
        site = Site(name, model, prepared.clients, setup, meter, prepared.public, states=states)
        if name in others:
            own, own_data = others[name]
            site = replace(
                site, model=own, data=own_data.clients, public=own_data.public,
                server_model=model, server_data=prepared.clients,
            )  # fmt: skip
        sites[name] = site
    if len(sites) > 1 and not stackable(model, experiment.training):
        listener.note(
            "clients train one by one: one pass for many needs tunables of their own beside a "
            f"frozen base without dropout (here tunables.kind = {experiment.tunables.kind!r}, "
            f"training.base_dropout = {str(experiment.training.base_dropout).lower()})"
        )
    every = [(model, prepared), *others.values()]
    tokenizers = {one.name: theirs.tokenizer for one, theirs in every}
    return Worker(sites, half.strategy, run, model.base_hash, tokenizers, states)


def _uses(
    experiment: ex.Experiment, prepared: Prepared, model: LanguageModel,
    others: Mapping[str, tuple[LanguageModel, Prepared]], narrow: Mapping[str, LanguageModel],
) -> list[tuple[LanguageModel, Iterator[Use]]]:  # fmt: skip
    """
    What each model will see: its clients' rows, everybody's test rows, public rows.

    narrow: the model of clients who train some of the tunables only.
    """
    rounds, drawn = experiment.rounds, experiment.public.rows_per_round

    def seen(data: Prepared, names: Sequence[str], mine: Container[str]) -> Iterator[Use]:
        for name in names:
            own = data.clients[name]
            yield Use(own.test, len(own.test))
            if name in mine:
                yield Use(own.train, len(own.train))
        if data.public is not None:
            yield Use(data.public, rounds * (drawn or len(data.public)))

    here = list(prepared.clients)
    mentored = isinstance(experiment.strategy, ex.Parameters)  # they train the common model, too
    plain = {n for n in here if n not in narrow and (mentored or n not in others)}
    found = [(model, seen(prepared, here, plain))]
    for own in {id(one): one for one in narrow.values()}.values():
        names = [name for name in here if name in narrow and narrow[name] is own]
        found.append((own, (Use(prepared.clients[n].train, len(prepared.clients[n].train))
                            for n in names)))  # fmt: skip
    for own, theirs in {id(model): (model, data) for model, data in others.values()}.values():
        names = [name for name in here if name in others and others[name][0] is own]
        if names:
            found.append((own, seen(theirs, names, names)))
    return found


def check(experiment: ex.Experiment, seed: int, prepared: Prepared) -> Federation:
    """Build everything in memory and run nothing: raises what a run would raise at its start."""
    return assemble(experiment, seed, prepared, Ledger(), "check", Silent())


def untrained(experiment: ex.Experiment, seed: int, prepared: Prepared) -> dict[str, Any]:
    """Metrics of the base as it is, over everybody's held-out rows."""
    spec = experiment.tunables
    even = spec.even() if isinstance(spec, ex.Lora) else spec
    built = check(experiment.replace(strategy=ex.Centralized(), tunables=even), seed, prepared)
    built.exchange.open(0)
    return dict(round.evaluate(built, ServerState())["mean"])


def _known(
    listed: Sequence[T] | Mapping[str, T], whose: Callable[[Sequence[str]], dict[str, T]],
    prepared: Prepared,
) -> dict[str, T]:  # fmt: skip
    """What clients have of their own; across machines a site knows itself, the server all."""
    here = list(prepared.clients)
    if prepared.divided is not None and isinstance(listed, Mapping):
        return {name: one for name, one in listed.items() if name in here or not here}
    return whose(here)


def _cuts(spec: ex.Strategy, prepared: Prepared) -> dict[str, int]:
    """Cuts of clients where the file has several; who has none there has half of the blocks."""
    if not isinstance(spec, ex.Activations) or isinstance(spec.cut, int):
        return {}
    if isinstance(spec.cut, str):
        return dict.fromkeys(prepared.clients, 0)
    return dict.fromkeys(prepared.clients, 0) | _known(spec.cut, spec.cuts, prepared)


def _cutter(experiment: ex.Experiment, prepared: Prepared) -> Cutter | None:
    """Who chooses the cuts of a simulation, where the file leaves them open."""
    spec = experiment.strategy
    if not isinstance(spec, ex.Activations) or spec.cut != "auto":
        return None
    there = crowds(experiment, prepared.clients)
    rows = Rows.of(prepared.public)
    labels, listed = len(prepared.labels), tuple(prepared.clients)
    return Cutter(experiment, Sizes(there, listed, rows, labels, prepared.longest))


def _client_models(
    experiment: ex.Experiment,
    seed: int,
    base_model: Callable[[str], LanguageModel],
    server: LanguageModel,
    prepared: Prepared,
    listener: Listener,
) -> dict[str, tuple[LanguageModel, Prepared]]:
    """Clients' own architectures with the rows in their tokens, where the strategy has them."""
    spec = experiment.strategy
    if not isinstance(spec, ex.Logits):
        return {}
    names = _known(spec.client_models, spec.models, prepared)
    loaded = {}
    vocabulary = prepared.tokenizer.get_vocab()
    for name in dict.fromkeys(names.values()):
        model = base_model(name)
        theirs = prepare(experiment, seed, name, prepared.divided)  # the same rows, its tokens
        for note in theirs.notes:
            if note not in prepared.notes:
                listener.note(f"{name}: {note}")
        text = experiment.task.kind != "classification"
        if theirs.tokenizer.get_vocab() != vocabulary or (text and model.outputs != server.outputs):
            # a unit without counterpart arrives as the text's own token: only a loss knows better
            by_loss = spec.knowledge in ("loss", "least-loss")
            if text and not (spec.form == "top-k" and spec.server_model and by_loss):
                raise FedllmError(
                    f"strategy.client_models: {name!r} has another tokenizer than the server's "
                    f"model {server.name!r}; logits of tokens need the same, or form = 'top-k' "
                    "with server_model = true and knowledge = 'least-loss' (or 'loss')"
                )
            if experiment.public.ship:
                raise FedllmError(
                    f"public.ship = true: {name!r} has another tokenizer than the server's model; "
                    "the public set travels as tokens"
                )
        loaded[name] = (model, theirs)
    return {client: loaded[name] for client, name in names.items()}


def _mentor(
    experiment: ex.Experiment, name: str, base_model: Callable[[str], LanguageModel],
    prepared: Prepared,
) -> LanguageModel:  # fmt: skip
    """
    The model that each client has beside the common one, and that sees the same batches.

    Raises FedllmError where it does not read the same tokens.
    """
    theirs = load_tokenizer(experiment.model, name).get_vocab()
    if theirs != prepared.tokenizer.get_vocab():
        raise FedllmError(
            f"strategy.mentor = {name!r}: has another tokenizer than {experiment.model.name!r}; "
            "expected a model that reads the same tokens, such as NAME#2 of the same NAME"
        )
    if (most := positions(experiment, name)) < prepared.longest:
        raise FedllmError(
            f"strategy.mentor = {name!r}: reads {most} tokens, examples have up to "
            f"{prepared.longest}; set data.max_tokens = {most}"
        )
    found = base_model(name)
    if found.family is None:
        kind = found.model.config.model_type
        raise FedllmError(
            f"strategy.mentor = {name!r}: nobody knows yet where a model of type {kind!r} has its "
            "hidden states"
        )
    return found


def _ranks(experiment: ex.Experiment, prepared: Prepared) -> dict[str, int]:
    """The ranks of clients who have their own, by name."""
    spec = experiment.tunables
    return _known(spec.ranks, spec.ranks_of, prepared) if isinstance(spec, ex.Lora) else {}


def _budgets(experiment: ex.Experiment, prepared: Prepared) -> dict[str, ex.Budget]:
    """The budgets of clients who have one, by name."""
    spec = experiment.tunables
    return _known(spec.budgets, spec.budgets_of, prepared) if isinstance(spec, ex.Lora) else {}


def _modules(experiment: ex.Experiment, prepared: Prepared) -> dict[str, ex.Modules]:
    """The modules of clients who have their own, by name."""
    spec = experiment.tunables
    return _known(spec.modules, spec.modules_of, prepared) if isinstance(spec, ex.Lora) else {}


def _width(
    spec: ex.Strategy, server: LanguageModel,
    others: Mapping[str, tuple[LanguageModel, Prepared]], clients: Sequence[str],
) -> int:  # fmt: skip
    """
    Width of the hidden states that clients send; 0 where they send none.

    Raises FedllmError where these do not fit one another.
    """
    if not (isinstance(spec, ex.Logits) and spec.form == "features"):
        return 0
    key = "strategy.form = 'features'"
    models = {name: model for name, (model, _) in others.items()}
    own = [models.get(name, server) for name in clients or models] or [server]  # a server: of all
    for model in (server, *own):
        if model.family is None:
            kind = model.model.config.model_type
            raise FedllmError(f"{key}: hidden states of a model of type {kind!r} are not known yet")
    widths = sorted({model.width for model in own})
    if len(widths) > 1:
        raise FedllmError(
            f"{key}: the clients' hidden states are of widths {', '.join(map(str, widths))}, which "
            "have no mean; expected strategy.client_models of one width"
        )
    if spec.selective and widths[0] != server.width:
        raise FedllmError(
            f"strategy.selective with form = 'features': the clients' hidden states are of width "
            f"{widths[0]}, the server's of {server.width}; expected the same"
        )
    return widths[0]


def _interpreters(
    experiment: ex.Experiment, server: LanguageModel, prepared: Prepared,
    others: Mapping[str, tuple[LanguageModel, Prepared]], listener: Listener,
) -> dict[str, tuple[Interpreter, Interpreter]]:  # fmt: skip
    """To the server and back, for each client whose model reads other tokens."""
    if experiment.task.kind == "classification" or not others:
        return {}
    public, vocabulary = prepared.public, prepared.tokenizer.get_vocab()
    made: dict[int, tuple[Interpreter, Interpreter]] = {}
    for model, data in others.values():
        same = data.tokenizer.get_vocab() == vocabulary and model.outputs == server.outputs
        if id(model) in made or same:
            continue
        assert public is not None and data.public is not None  # else it was refused: ``ship``
        ours = (prepared.tokenizer, public, server.outputs)
        theirs = (data.tokenizer, data.public, model.outputs)
        place = cache()
        made[id(model)] = interpreter(theirs, ours, place), interpreter(ours, theirs, place)
        up, down = (100 * one.way.share for one in made[id(model)])
        listener.note(
            f"{model.name}: {up:.0f} % of the server's public tokens take its knowledge, "
            f"{down:.0f} % of its own the server's; all others learn their own token"
        )
    return {name: made[id(model)] for name, (model, _) in others.items() if id(model) in made}


def run_id(experiment: ex.Experiment, seed: int) -> str:
    """The run's name in its ledger and on its messages."""
    return f"{experiment.name}-{variant(experiment).partition(' ')[0]}-{seed}"


def create(folder: Path, force: bool = False) -> None:
    """Make a run folder. Raises FedllmError when it cannot be written or is already used."""
    if folder.exists() and not folder.is_dir():
        raise FedllmError(f"{folder}: cannot be written (it is a file)")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise FedllmError(
            f"{folder}: not empty; --resume goes on with what is there, --out takes another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise FedllmError(f"{folder}: cannot be written ({error.strerror})") from None


def run(
    experiment: ex.Experiment,
    seed: int,
    folder: Path,
    *,
    resume: bool = False,
    prepared: Prepared | None = None,
    listener: Listener | None = None,
    remote: Remote | None = None,
) -> dict[str, Any]:
    """
    Run one experiment with one seed into ``folder``; returns its summary.

    remote: how to reach the sites, where the clients are not in this process; ``prepared`` then has
    no clients.

    ``resume`` goes on after the last committed round, and returns at once where the run is
    complete. Raises FedllmError for bad input, before anything is written, where possible.
    """
    listener = listener or Silent()
    prepared = prepared or prepare(experiment, seed)
    data = experiment.data.model_copy(update={"labels": prepared.labels})
    resolved = experiment.replace(seeds=(seed,), data=data)
    stored = folder / "experiment.toml"
    if resume and stored.exists():
        ex.agree(stored, resolved, ("compare",))
        done = folder / "summary.json"
        if done.exists():
            return dict(json.loads(done.read_text()))
    notes = list(prepared.notes)
    begin = None
    if resume:
        begin = checkpoint.load(folder / "checkpoints", remote is None, notes.append)
    ledger = Ledger()
    name = run_id(experiment, seed)
    federation = assemble(experiment, seed, prepared, ledger, name, listener, remote)
    fresh = not folder.exists()
    create(folder, force=resume)
    try:
        stored.write_text(ex.dump(resolved))
        federation.clients.attach(checkpoint.states_in(folder / "checkpoints"))
        upto = begin.round if begin else 0
        federation.ledger.attach(folder / "ledger.jsonl", upto)
        with (folder / "log.txt").open("a") as log:
            log.write(_log(f"start after round {upto}"))
            for note in notes:
                listener.note(note)
                log.write(_log(note))
            if begin is None:
                begin = Committed(0, federation.strategy.start())
            else:
                federation.clients.restore(begin.clients)
            if remote is not None and isinstance(federation.clients, Distant):
                remote.begin(federation.clients.greet, federation.clients.refuse)
            listener.begin(name, experiment.rounds, begin.round)

            def commit(committed: Committed) -> None:
                checkpoint.save(folder / "checkpoints", committed)
                entry = committed.history[-1]
                listener.round(entry)
                log.write(_log(json.dumps({k: v for k, v in entry.items() if k != "clients"})))
                log.flush()

            end = round.run(federation, begin, commit)
            log.write(_log("done"))
    except (FedllmError, OSError) as error:
        if fresh and not (folder / "checkpoints").exists():
            shutil.rmtree(folder, ignore_errors=True)  # nothing half-written stays behind
        if isinstance(error, FedllmError):
            raise
        raise FedllmError(
            f"{folder}: cannot be written ({error.strerror or error}); committed rounds are kept: "
            "the same command with --resume goes on"
        ) from None
    model = _save_models(federation, end, folder / "adapter")
    summary = summarize(experiment, seed, federation.ledger.rows, end.history, prepared)
    summary["fedllm"] = fedllm.__version__
    summary["base_hash"] = model.base_hash
    write_json(folder / "summary.json", summary)
    return summary


def _save_models(federation: Federation, end: Committed, folder: Path) -> LanguageModel:
    """The common model in ``folder``, clients' own in ``folder/<client>``; returns the base."""
    strategy, labels, model = federation.strategy, federation.labels, federation.model
    clients = federation.clients
    sites = clients.sites if isinstance(clients, Worker) else {}  # others keep their own
    candidate = strategy.candidate(end.server)
    personal = candidate is not None and any(name not in candidate for name in model.initial)
    if candidate is not None and not personal:
        save_adapter(model, candidate, folder, labels)
    if candidate is None or personal or strategy.evaluates_clients:
        for name, site in sites.items():
            own = strategy.own(site)
            if not strategy.evaluates_clients:
                own = {**own, **(candidate or {})}
            save_adapter(site.model, own, folder / name, labels)
    return model


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    aside = path.with_suffix(".part")
    with aside.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
    os.replace(aside, path)


def _log(text: str) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n"
