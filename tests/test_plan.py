"""What is planned is what is then measured; what the advisor says is what brute force finds."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from cProfile import Profile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedllm import costs, federation
from fedllm import experiment as ex
from fedllm.cli import app
from fedllm.costs import Blueprint, PublicSize
from fedllm.errors import FedllmError
from fedllm.estimates import lines
from fedllm.estimates.estimator import Estimator
from fedllm.estimates.lines import Line
from fedllm.estimates.sizes import Rows
from fedllm.federation import Silent
from fedllm.ledger import Ledger
from fedllm.models.flops import count
from fedllm.models.loading import load, load_config
from fedllm.planning import advise, plan, show
from fedllm.planning.advise import Choice, Limits
from fedllm.planning.sizes import sizes
from fedllm.summary import costs as measured
from fedllm.summary import per_client_round
from shared import model as shared_model
from shared import needs_shared
from small import BERT, GPT2, experiment, final, finish, furthest

BABY = shared_model("babyllama-0.9m")
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


def config(folder: Path, values: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


@pytest.fixture(scope="module")
def random_gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2 that never saw a text."""
    words = load_config(ex.Model()).vocab_size
    return config(tmp_path_factory.mktemp("gpt2"), {
        "model_type": "gpt2", "n_layer": 5, "n_embd": 96, "n_head": 6, "n_positions": 128,
        "vocab_size": words,
    })  # fmt: skip


def compared(spec: ex.Experiment) -> tuple[Line, dict[str, float], dict[str, Any]]:
    """(planned, measured per client and round that it takes part in, measured of everybody)."""
    (seed,) = spec.seeds
    prepared = federation.prepare(spec, seed)
    name = federation.run_id(spec, seed)
    built = federation.assemble(spec, seed, prepared, Ledger(), name, Silent())
    finish(built)
    found = measured(built.ledger.rows, spec.rounds)
    data = sizes(spec)
    planned = lines.line(Estimator(spec, data.labels), spec.strategy, data)
    took_part = len(found) - ("server" in found)
    times = took_part / (spec.exchange.clients_per_round or took_part)
    mean = per_client_round(found, spec.rounds)
    return planned, {k: v if k == "peak_memory" else v * times for k, v in mean.items()}, found


STRATEGIES: list[dict[str, Any]] = [
    {"kind": "parameters"},
    {"kind": "logits"},
    {"kind": "activations", "cut": 1},
    {"kind": "activations", "cut": 2, "server": "per-client", "labels": "client"},
    {"kind": "activations", "cut": 2, "server": "concatenated", "average_every": 1},
]


MUTUAL: dict[str, Any] = {
    "kind": "logits", "form": "top-k", "top_k": 16, "knowledge": "least-loss", "selective": True,
}  # fmt: skip


SCAFFOLD: dict[str, Any] = {
    "kind": "parameters", "client": {"kind": "scaffold"}, "server": {"kind": "adam"},
}  # fmt: skip


FEATURES: dict[str, Any] = {"kind": "logits", "form": "features", "loss": "mse"}


def hold(spec: ex.Experiment) -> None:
    line, client, everybody = compared(spec)
    server = everybody.get("server", {})
    assert not line.refused
    assert line.up == pytest.approx(client["bytes_up"], rel=0.01)
    assert line.down == pytest.approx(client["bytes_down"], rel=0.01)
    assert line.flops == pytest.approx(client["flops"], rel=0.05)
    assert line.server_flops == pytest.approx(server.get("flops", 0) / spec.rounds, rel=0.05)
    assert line.memory == pytest.approx(client["peak_memory"], rel=0.2)
    for share in line.shares:
        assert share.memory == pytest.approx(everybody[share.name]["peak_memory"], rel=0.2)
    if server.get("peak_memory"):
        assert line.server_memory == pytest.approx(server["peak_memory"], rel=0.2)


@pytest.mark.parametrize(
    ("name", "task", "strategy"),
    [
        *(pytest.param(BERT, "classification", s, id=f"minilm-{n}", marks=needs_shared)
          for n, s in enumerate(STRATEGIES[:4])),
        *(pytest.param(BABY, "generation", s, id=f"babyllama-{n}", marks=needs_shared)
          for n, s in enumerate(STRATEGIES[:3])),
        pytest.param(GPT2, "classification", STRATEGIES[4], id="builtin-4"),
        pytest.param(GPT2, "generation", MUTUAL, id="builtin-knowledge"),
        pytest.param(GPT2, "classification", FEATURES, id="builtin-features"),
        pytest.param(GPT2, "classification", SCAFFOLD, id="builtin-scaffold"),
        pytest.param(GPT2, "classification", {"kind": "logits", "clusters": 2},
                     id="builtin-clusters"),
    ],
)  # fmt: skip
def test_a_plan_is_what_a_run_then_measures(name: str, task: str, strategy: dict[str, Any]) -> None:
    public = {"size": 12, "labelled": "form" in strategy}
    hold(experiment(name, task, rows=40, strategy=strategy, evaluation={"every": 0},
                    public=public))  # fmt: skip


@pytest.mark.parametrize(
    ("task", "strategy"),
    [("classification", STRATEGIES[0]), ("classification", STRATEGIES[2]),
     ("generation", STRATEGIES[1])],
)  # fmt: skip
def test_a_plan_of_a_random_gpt2(
    random_gpt2: str, task: str, strategy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with logits that are made chunk by chunk."""
    for module in ("estimates.estimator", "training.fit"):
        monkeypatch.setattr(f"fedllm.{module}.LOGITS", 20_000)
    model = {"weights": "random", "tokenizer": "builtin"}
    hold(experiment(random_gpt2, task, strategy=strategy, evaluation={"every": 0}, model=model))


@pytest.mark.parametrize("strategy", STRATEGIES[:3], ids=lambda s: s["kind"])
@pytest.mark.parametrize(
    "tunables",
    [
        {"kind": "lora", "rank": 4, "layers": [-1], "dropout": 0.1},
        {"kind": "adapter", "width": 4},
        {"kind": "prompt", "tokens": 4},
    ],
    ids=lambda t: t["kind"],
)
def test_a_plan_of_every_kind_of_tunables(
    tunables: dict[str, Any], strategy: dict[str, Any]
) -> None:
    training = {"optimizer": "adam", "epochs": 2}
    hold(experiment(GPT2, rounds=2, tunables=tunables, strategy=strategy, training=training,
                    evaluation={"every": 0}))  # fmt: skip


def test_a_plan_of_several_cuts() -> None:
    strategy = {"kind": "activations", "cut": [1, 3, 2], "server": "per-client"}
    hold(experiment(GPT2, strategy=strategy, evaluation={"every": 0}))


@pytest.mark.parametrize(("split", "tunables"), [
    ({"cut": 1, "inside": 3, "labels": "client"}, {"kind": "adapter", "width": 4}),
    # hidden states of the lower blocks are remembered
    ({"cut": [1, 2, 1], "inside": 2}, {"kind": "lora", "rank": 2, "layers": [-1]}),
])  # fmt: skip
def test_a_plan_of_blocks_split_inside(split: dict[str, Any], tunables: dict[str, Any]) -> None:
    hold(experiment(GPT2, strategy={"kind": "activations", **split}, tunables=tunables,
                    evaluation={"every": 0}))  # fmt: skip


def test_a_public_set_too_large_to_remember_is_run_anew() -> None:
    """Beside private rows whose lower blocks are remembered."""
    spec = experiment(
        GPT2, rounds=2, tunables={"kind": "lora", "rank": 2, "layers": [-1]},
        strategy={"kind": "logits"}, public={"size": 20, "rows_per_round": 9},
        evaluation={"every": 0},
    )  # fmt: skip
    ends = [final(replaced) for replaced in (spec, spec.replace(model=ex.Model(cache=False)))]
    assert furthest(*ends) < 1e-5


@pytest.mark.parametrize(
    "strategy", [*STRATEGIES[:2], {"kind": "activations", "cut": 2}], ids=lambda s: s["kind"]
)
def test_a_plan_of_rounds_that_some_miss(strategy: dict[str, Any]) -> None:
    """Who was away is brought up to date; a set is shipped once, and frozen blocks run once."""
    hold(experiment(
        GPT2, rounds=4, seeds=[1], strategy=strategy, exchange={"clients_per_round": 2},
        simulation={"sizes": [8, 8, 8]}, public={"size": 20, "ship": True},
        tunables={"kind": "lora", "rank": 16, "layers": [1, 2, 3]}, evaluation={"every": 0},
    ))  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES[1:4], ids=lambda s: "-".join(map(str, s.values())))
def test_a_plan_of_rows_padded_to_a_fixed_length(strategy: dict[str, Any]) -> None:
    hold(experiment(GPT2, strategy=strategy, training={"padding": "fixed"},
                    evaluation={"every": 0}))  # fmt: skip


def test_a_plan_of_a_shipped_public_set() -> None:
    hold(experiment(
        GPT2, rounds=2, strategy={"kind": "logits"}, evaluation={"every": 0},
        training={"rate": 0.001}, public={"size": 40, "ship": True, "labelled": True},
    ))  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES[1:3], ids=lambda s: s["kind"])
def test_a_plan_of_a_base_in_four_bits(strategy: dict[str, Any]) -> None:
    hold(experiment(strategy=strategy, model={"quantization": "nf4"}, evaluation={"every": 0}))


def test_a_small_site_needs_less_memory_than_a_large_one() -> None:
    watch, room = {"name": "watch", "rows": 2}, {"name": "room", "rows": 1000}
    one, both = (plan.look(described(len(s), sites=s)) for s in ([watch], [watch, room]))
    for alone, line in zip(one.lines, both.lines, strict=True):
        assert line.shares[0].memory == alone.memory <= line.shares[1].memory
        assert line.memory == line.shares[1].memory
    assert line.shares[0].memory < line.memory


def test_codecs_and_absent_clients_are_foreseen() -> None:
    codecs = {"activation": "fp16", "gradient": "fp16", "parameter": "fp16"}
    spec = experiment(strategy={"kind": "activations", "cut": 1}, evaluation={"every": 0},
                      exchange={"codecs": codecs})  # fmt: skip
    every, client, _ = compared(spec)
    assert every.up == pytest.approx(client["bytes_up"], rel=0.01)
    some = spec.replace(exchange=ex.Exchange(clients_per_round=1))
    data = sizes(some)
    estimator = Estimator(some, data.labels)
    one = lines.line(estimator, some.strategy, data)
    assert one.server_flops == pytest.approx(every.server_flops / 3)
    assert one.seconds < every.seconds


@pytest.mark.parametrize(
    ("layers", "task"),
    [((), "classification"), ((2, 3), "generation"), ((1, 4), "classification")],
)  # fmt: skip
def test_a_model_is_the_sum_of_small_ones(
    tmp_path: Path, layers: tuple[int, ...], task: Any
) -> None:
    """FLOPs from one or two blocks of a kind equal those counted on all six."""
    spec = ex.Model(name=config(tmp_path, QWEN))
    found = Blueprint(spec, ex.Task(kind=task), ex.Lora(rank=2, layers=layers), 5)
    model, selected = found.whole, 1 if task == "generation" else 0
    assert model.blocks == 6
    for part, cut, grad in (("whole", 0, False), ("client", 4.5, False), ("server", 3, True)):
        core = model.part(part, cut)  # type: ignore[arg-type]
        chosen = selected if part != "client" else 0
        for back, wanted in ((False, False), (True, grad)):
            whole = count(core, frozenset(model.initial), 10, 1, chosen, back, wanted)
            for once in {True, bool(layers)}:
                assert found.flops(part, 10, back, cut, 0, chosen, wanted, once) == whole  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_seven_billion_parameters_are_planned_in_two_seconds(tmp_path: Path, task: str) -> None:
    import peft  # noqa: F401

    load(ex.Model(), ex.Task(), ex.Lora(), 2, 0, meta=True)  # imports what there is to import
    name = config(tmp_path, LLAMA_7B)
    for clients in (3, 1000):
        spec = described(clients, name, task=task)
        start = time.process_time()
        found = plan.look(spec)
        assert time.process_time() - start < 8  # two on a machine of one's own
        assert found.base > 6.6e9
        assert not any(line.refused for line in found.lines)
        parameters, _, split = found.lines
        assert parameters.up < split.up
        assert split.memory < parameters.memory


def test_a_plan_takes_as_long_as_there_are_unlike_sites() -> None:
    """By the number of calls, which is always the same."""
    few, many = ({"rows": 20, "sites": [{} for _ in range(n)]} for n in (200, 1000))
    estimator, calls = None, []
    for values in (few, few, many):  # the first time also counts what all of them share
        spec = described(len(values["sites"]), **values)
        data = sizes(spec)
        estimator = estimator or Estimator(spec, data.labels)
        estimator.experiment = spec
        with Profile() as profile:
            for strategy in plan.options(spec):
                lines.line(estimator, strategy, data)
        calls.append(sum(entry.callcount for entry in profile.getstats()))
    assert calls[2] < 6 * calls[1]


def described(clients: int, name: str = GPT2, task: str = "classification", **more: Any) -> Any:
    """An experiment whose plan needs no data."""
    values = {"rows": 100, "tokens": 16.5, "labels": 77, "public_rows": 50, **more}
    whole = {"model": {"name": name}, "task": {"kind": task},
             "simulation": {"clients": clients}, "plan": values}  # fmt: skip
    return ex.parse(whole, "test", Path.cwd())


def test_no_data_and_no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("read")

    monkeypatch.setattr(federation, "prepare", never)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    few, many = (plan.look(described(n)) for n in (3, 10_000))
    for a, b in zip(few.lines, many.lines, strict=True):
        assert (a.up, a.flops) == pytest.approx((b.up, b.flops), rel=1e-3)
    split = [found.lines[2] for found in (few, many)]
    assert split[1].seconds / split[0].seconds == pytest.approx(10_000 / 3, rel=1e-3)


def test_means_stand_for_the_rows_themselves() -> None:
    spec = experiment(rows=120, strategy={"kind": "parameters"})
    data = sizes(spec)
    exact = lines.line(Estimator(spec, data.labels), spec.strategy, data)
    rows = sum(len(crowd.train.lengths) for crowd in data.crowds)
    tokens = sum(crowd.train.size.tokens for crowd in data.crowds)
    told = spec.replace(plan=ex.Plan(rows=rows // 3, tokens=tokens / rows, labels=data.labels))
    mean = sizes(told)
    rough = lines.line(Estimator(told, mean.labels), told.strategy, mean)
    assert rough.payload == exact.payload
    assert rough.flops == pytest.approx(exact.flops, rel=0.15)


def test_seconds_are_those_of_the_slowest_site() -> None:
    slow = {"name": "phone", "count": 2, "flops": 1e8, "up": 1e4, "down": 1e5, "latency": 1.0}
    fast = {"name": "server room", "count": 1, "flops": 1e12, "latency": 0.0}
    both = described(3, sites=[slow, fast], server={"flops": 1e15})
    line = plan.look(both).lines[0]
    phone = next(share for share in line.shares if share.name == "phone")
    by_hand = phone.flops / 1e8 + phone.up / 1e4 + phone.down / 1e5 + 2 * 1.0
    assert line.seconds == pytest.approx(by_hand)
    narrow = described(3, sites=[fast, {**fast, "name": "ward", "count": 2}], server={"down": 10.0})
    line = plan.look(narrow).lines[0]
    assert line.seconds == pytest.approx(3 * line.up / 10)


@pytest.mark.parametrize("server", ["per-client", "concatenated"])
def test_each_batch_waits_for_the_slowest_site(server: str) -> None:
    """Until it has none left; the server's own seconds are none here."""
    links = {"up": 1e15, "down": 1e15, "latency": 0.0}
    slow = {"name": "slow", "rows": 32, "flops": 1e7, **links}
    fast = {"name": "fast", "rows": 3200, "flops": 1e9, **links}
    spec = described(2, sites=[fast, slow], tokens=16.0, server={"flops": 1e30})
    spec = spec.replace(strategy=ex.Activations(cut=1, server=server))  # type: ignore[arg-type]
    line = plan.look(spec).lines[2]
    quick, long = (share.seconds for share in line.shares)
    assert line.seconds == pytest.approx(2 * (long / 2) + 198 * (quick / 200), rel=1e-3)


def test_sites_are_told_apart_by_their_place() -> None:
    small, large = {"rows": 10}, {"rows": 1000}
    spec = described(2, sites=[small, large])
    estimator = Estimator(spec, 77)
    for strategy in plan.options(spec):
        both, *alone = (
            lines.line(estimator, strategy, sizes(described(len(sites), sites=sites))).shares
            for sites in ([small, large], [small], [large])
        )
        assert [share.name for share in both] == ["site 1", "site 2"]
        assert [share.flops for share in both] == [share.flops for (share,) in alone]
    with pytest.raises(FedllmError, match="plan: sites: 'ward' twice"):
        described(2, sites=[{"name": "ward"}, {"name": "ward"}])
    again = ex.parse_text(ex.dump(spec), "again", Path.cwd())
    assert again.plan == spec.plan


def test_what_a_run_would_refuse_is_not_planned() -> None:
    """Rows longer than the model takes, however that comes about."""
    for changes, said in (
        ({"public_tokens": 1e5}, r"plan.public_tokens = 100000: a row has at most 128 tokens"),
        ({"targets": 20.0}, r"plan.targets = 20: a row has 16.5 tokens"),
    ):
        with pytest.raises(FedllmError, match=said):
            plan.look(described(3, task="generation", **changes))
    spec = described(3)
    with pytest.raises(FedllmError, match=r"data.max_tokens = 9999: the model takes at most 128"):
        plan.look(spec.replace(data=ex.Data(max_tokens=9999)))
    with pytest.raises(FedllmError, match=r"tunables.tokens: they leave 0 of the model's"):
        plan.look(spec.replace(tunables=ex.Prompt(tokens=200)))
    spec = described(3, ranks=[4, 120, 500], cuts=[1], public_sizes=[9])
    found = advise.advise(spec.replace(tunables=ex.Prompt(tokens=4)), Limits())
    assert {c.rank for c in found.choices if not c.broken} == {4}
    assert {c.broken[0].split(":")[0] for c in found.choices if c.rank > 4} == {
        "plan.tokens = 16.5", "tunables.tokens"
    }  # fmt: skip
    one_by_one = described(3).replace(exchange=ex.Exchange(resident=False))
    parameters, _, split = plan.look(one_by_one).lines
    assert not parameters.refused and "exchange.resident = false" in split.refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[plan.sites]]\nrow = 3", "unknown key 'plan.sites.0.row'; did you mean 'rows'"),
        ("sweep = 3", "sweep = 3: Input should be a valid array"),
        ("compare = 3", "compare = 3: Input should be"),
    ],
)
def test_wrong_tables_are_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(FedllmError, match=said):
        ex.parse_text(text, "test", Path.cwd())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 5}, r"hidden size \(32\) is not a multiple"),
        ({"num_hidden_layers": "four"}, "'num_hidden_layers' expected int, got str"),
        ({"max_position_embeddings": None}, "'max_position_embeddings' expected int, got None"),
    ],
)
def test_a_wrong_configuration_is_named(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:  # fmt: skip
    name = config(tmp_path, {**QWEN, "model_type": "llama", **changes})
    with pytest.raises(FedllmError, match=rf"{tmp_path}.*config.json is wrong.*{said}"):
        plan.look(described(3, name))


OTHERS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 4},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_without_a_family_are_planned_whole(tmp_path: Path, kind: str) -> None:
    name = config(tmp_path, {**OTHERS[kind], "model_type": kind, "hidden_size": 32,
                             "vocab_size": 300, "max_position_embeddings": 128})  # fmt: skip
    spec = described(3, name, task="generation", tokens=16.0)
    parameters, logits, split = plan.look(spec).lines
    assert not parameters.refused and not logits.refused
    assert "cannot be cut yet" in split.refused


def test_what_does_not_run_without_values_is_named(tmp_path: Path) -> None:
    name = config(tmp_path, {**QWEN, "num_attention_heads": 5})
    for line in plan.look(described(3, name)).lines:
        assert f"model.name = {name!r}: a model of type 'qwen2'" in line.refused


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    spec = described(1, ranks=[2], cuts=[1], sites=[{"name": "ward [/red]", "memory": 1.0}])
    spec = spec.replace(name="a[/b] [red]")
    show.show(plan.look(spec), advise.advise(spec, Limits()))
    said = capsys.readouterr().out
    assert "a[/b] [red]: plan" in said and "'ward [/red]'" in said


def test_public_rows_of_a_plan_are_like_those_of_a_run() -> None:
    """Every token but the first is predicted; those that there are not are like the clients'."""
    spec = described(3, task="generation", targets=5.0)
    for told in (spec, spec.replace(plan=spec.plan.model_copy(update={"public_tokens": 16.5}))):
        assert sizes(told).public.size.units == pytest.approx(50 * 15.5, abs=1)
    more = experiment(public={"size": 0}, plan={"public_rows": 50})
    mine = sizes(more)
    tokens = sum(c.train.size.tokens for c in mine.crowds) / sum(
        c.train.size.rows for c in mine.crowds
    )  # fmt: skip
    assert mine.public.size.tokens / 50 == pytest.approx(tokens, abs=0.1)


def test_rows_of_a_round_are_drawn_at_random() -> None:
    """The plan counts those of the mean, not the first ones."""
    spec = described(3, task="generation").replace(public=ex.Public(rows_per_round=8))
    tokens = np.repeat([4, 16], [10, 30])
    data = replace(sizes(spec), public=Rows(tokens, tokens - 1))
    estimator = Estimator(spec, data.labels)
    found = lines.line(estimator, ex.Logits(), data)
    assert found.payload[0] == 8 * 12 * estimator.model.outputs * 4
    assert data.public.resized(8).lengths.tolist() == [4] * 2 + [16] * 6


def test_an_impossible_strategy_says_why() -> None:
    spec = described(3, public_rows=0)
    logits = plan.look(spec).lines[1]
    assert "public set" in logits.refused
    with pytest.raises(FedllmError, match=r"plan.sites: they count 4 clients"):
        described(3, sites=[{"count": 4}])
    with pytest.raises(FedllmError, match=r"plan.tokens = 600: a row has at most 128 tokens"):
        plan.look(described(3, tokens=600.0))


# the advisor --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def choices() -> list[Choice]:
    spec = described(3, ranks=[1, 4, 16], public_sizes=[5, 50, 500], cuts=[1, 3],
                     codecs=["int8", "int4"])  # fmt: skip
    return advise.every(spec, sizes(spec))


def test_flops_of_a_rank_follow_from_two_others(choices: list[Choice]) -> None:
    spec = described(3, public_sizes=[50])
    for rank in (1, 4, 16):
        sized = spec.replace(tunables=ex.Lora(rank=rank))
        data = sizes(sized)
        mine = next(c for c in choices if c.strategy == "parameters" and c.rank == rank)
        again = lines.line(Estimator(sized, data.labels), ex.Parameters(), data)
        assert replace(mine.line, shares=()) == replace(again, shares=())


def test_bytes_rise_with_the_rank(choices: list[Choice]) -> None:
    """P-05."""
    for strategy, cut, labels in (("parameters", 0, ""), ("activations", 1, "server")):
        same = [
            c
            for c in choices
            if (c.strategy, c.cut, c.labels, c.codec) == (strategy, cut, labels, "")
        ]
        sent = [c.cost("bytes") for c in sorted(same, key=lambda c: c.rank)]
        assert len(sent) == 3
        assert sent == sorted(set(sent))


def obvious(choices: list[Choice], limits: Limits) -> tuple[Choice | None, list[Choice]]:
    """The best and the front, found by looking at everything twice."""
    fitting = []
    for c in choices:
        line = c.line
        values = {"bytes": line.up + line.down, "memory": line.memory, "flops": line.flops,
                  "deadline": line.seconds}  # fmt: skip
        good = not line.refused
        for key, most in limits.most:
            good = good and values[key] <= most
        if "labels" in limits.stay and c.strategy == "activations" and c.labels == "server":
            good = False
        if "weights" in limits.stay and c.strategy != "logits":
            good = False
        if good:
            fitting.append((c, (*values.values(), ["", "int8", "int4"].index(c.codec))))
    front = []
    for c, mine in fitting:
        beaten = False
        for _, other in fitting:
            nowhere_dearer = sum(o > m for o, m in zip(other, mine, strict=True)) == 0
            somewhere_cheaper = sum(o < m for o, m in zip(other, mine, strict=True)) > 0
            beaten = beaten or (nowhere_dearer and somewhere_cheaper)
        if not beaten:
            front.append(c)
    top = None
    for strategy in ("logits", "activations", "parameters"):
        mine_ = [c for c, _ in fitting if c.strategy == strategy]
        if mine_:
            largest = max(c.tunable for c in mine_)
            mine_ = [c for c in mine_ if c.tunable == largest]
            most_public = max(c.public for c in mine_)
            mine_ = [c for c in mine_ if c.public == most_public]
            finest = min(["", "int8", "int4"].index(c.codec) for c in mine_)
            mine_ = [c for c in mine_ if c.codec == ["", "int8", "int4"][finest]]
            top = min(mine_, key=lambda c: (c.line.up + c.line.down, c.line.flops, c.line.seconds))
    return top, front


@pytest.mark.parametrize("seed", range(50))
def test_the_advisor_equals_brute_force(choices: list[Choice], seed: int) -> None:
    rng = random.Random(seed)
    some = rng.sample(choices, rng.randint(1, len(choices)))
    most = []
    for key in rng.sample(["bytes", "memory", "flops", "deadline"], rng.randint(0, 3)):
        most.append((key, rng.choice(some).cost(key) * rng.choice([0.9, 1.0, 1.1])))
    stay = frozenset(rng.sample(["labels", "weights"], rng.choice([0, 0, 1, 2])))
    limits = Limits(tuple(most), stay)
    found = [replace(c, broken=advise.broken(c, limits)) for c in some]
    fitting = [replace(c, broken=()) for c in found if not c.broken]
    top, front = obvious(some, limits)
    best = advise.best(found)
    assert best == top
    assert advise.front(fitting) == front
    budget = rng.choice(some).cost("bytes")
    assert advise.budget(some, budget) == obvious(some, Limits((("bytes", budget),)))[0]


@pytest.mark.parametrize("seed", range(1))
def test_every_choice_is_what_its_own_file_costs(seed: int) -> None:
    """The whole way: an experiment of each choice alone, planned by itself."""
    rng = random.Random(seed)
    spec = described(
        rng.choice([3, 1000]), rows=rng.randint(10, 90), tokens=float(rng.randint(5, 40)),
        ranks=[rng.randint(1, 9)], cuts=[rng.randint(1, 3)], public_sizes=[rng.randint(1, 90)],
    )  # fmt: skip
    found = advise.advise(spec, advise.parse(["bytes=1MB"]))
    assert len(found.choices) == 8
    for choice in found.choices:
        strategy: ex.Strategy = ex.Parameters()
        if choice.strategy == "logits":
            strategy = ex.Logits()
        if choice.strategy == "activations":
            strategy = ex.Activations(cut=choice.cut, labels=choice.labels)  # type: ignore[arg-type]
        alone = spec.replace(
            tunables=ex.Lora(rank=choice.rank), strategy=strategy,
            plan=spec.plan.model_copy(update={"public_rows": choice.public or 50}),
            exchange=ex.Exchange(codecs=dict.fromkeys(advise.SENT[choice.strategy], choice.codec))  # type: ignore[arg-type]
            if choice.codec else ex.Exchange(),
        )  # fmt: skip
        line = next(x for x in plan.look(alone).lines if x.strategy == choice.strategy)
        assert replace(line, shares=()) == replace(choice.line, shares=())
        assert bool(choice.broken) == (line.up + line.down > 1e6)


def test_rejections_name_every_limit_and_value(choices: list[Choice]) -> None:
    limits = advise.parse(["bytes=1kB", "memory=1 kB", "deadline=0.001", "labels=stay"])
    split = next(c for c in choices if c.labels == "server")
    said = advise.broken(split, limits)
    assert [text.split()[0] for text in said] == ["bytes", "memory", "deadline", "labels"]
    assert "> 1.00 kB" in said[0]


def test_under_a_limit_a_codec_or_a_lower_rank_is_offered_with_its_price(
    choices: list[Choice],
) -> None:
    spec = described(3).replace(tunables=ex.Lora(rank=16))
    some = [c for c in choices if c.strategy == "parameters"]
    cost = {(c.rank, c.codec): c.cost("bytes") for c in some}
    prices = {}
    for rank, codec in ((16, ""), (16, "int8"), (16, "int4"), (1, "int4")):
        found = advise.budget(some, cost[rank, codec])
        assert found is not None and (found.rank, found.codec) == (rank, codec)
        prices[rank, codec] = advise.price(found, spec)
    assert prices[16, ""] == ()
    (coarse,) = prices[16, "int8"]
    assert coarse == "parameters as int8: loses up to half a step of each row's range, of 255"
    assert prices[1, "int4"][0].startswith("rank 1 instead of 16: ")
    logits = next(c for c in choices if c.strategy == "logits" and not c.codec and c.rank == 16)
    assert advise.price(logits, spec) == (
        "logits instead of parameters, which the paper found more accurate",
    )
    own = spec.replace(tunables=ex.Lora(rank=16, modules=(ex.Modules(layers=(1,)),)))
    assert advise.price(advise.budget(some, cost[16, ""]), own) == (  # type: ignore[arg-type]
        "one LoRA for all clients and rounds instead of tunables.modules",
    )


def test_machines_too_small_are_named() -> None:
    spec = described(3, ranks=[2], cuts=[1], sites=[{"name": "watch", "count": 3, "memory": 1e6}],
                     server={"memory": 1e6})  # fmt: skip
    for choice in advise.advise(spec, Limits()).choices:
        assert any("of 'watch'" in text for text in choice.broken)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bites=3", "did you mean 'bytes'"),
        ("bytes=much", "expected a number above 0"),
        ("bytes=-3", "expected a number above 0"),
        ("bytes=3 Mb", "did you mean 'MB'"),
        ("deadline=3 MB", "valid: h, min, s"),
        ("bytes", "expected a number above 0"),
        ("labels=go", "expected labels=stay"),
    ],
)
def test_a_bad_limit_is_refused_by_name(text: str, expected: str) -> None:
    with pytest.raises(FedllmError, match=expected) as error:
        advise.parse([text])
    assert f"--limit {text}" in str(error.value)


def test_limits_have_units() -> None:
    found = dict(advise.parse(["bytes=50MB", "memory=2GiB", "flops=3T", "deadline=10min"]).most)
    assert found == {"bytes": 50e6, "memory": 2 * 2**30, "flops": 3e12, "deadline": 600}


def test_a_cut_outside_the_model_is_refused() -> None:
    with pytest.raises(FedllmError, match=r"plan.cuts = \[9\]: the model has 4 blocks"):
        advise.advise(described(3, cuts=[9]), Limits())


def _logits(model: Any, rows: int, codecs: dict[str, str]) -> int:
    whole, index = sum(costs.logits_payload(model, PublicSize(rows, rows, rows))), 2 * rows * 4
    return costs.coded({"logit": whole - index, "index": index}, codecs)


def test_break_even_is_where_both_send_the_same() -> None:
    """F-04, against a search over numbers of rows."""
    codecs: list[dict[str, str]] = [{}, {"parameter": "fp16"}, {"logit": "fp16"}]
    for head, codec in (*product(["shared"], codecs), ("frozen", {})):
        spec = described(3, ranks=[1, 8, 30]).replace(
            tunables=ex.Lora(rank=8, head=head), exchange=ex.Exchange(codecs=codec)  # type: ignore[arg-type]
        )  # fmt: skip
        data = sizes(spec)
        model = Estimator(spec, data.labels).model
        even = plan.even_rows(spec, data, Estimator(spec, data.labels))
        for rank, rows in even.items():
            sized = load(ex.Model(), ex.Task(), ex.Lora(rank=rank, head=head), 77, 0, meta=True)  # type: ignore[arg-type]
            sent = costs.coded({"parameter": sum(costs.parameters_payload(sized))}, codec)
            less = [n for n in range(3000) if _logits(model, n, codec) < sent]
            assert less[-1] < rows <= less[-1] + 1


def test_the_command_speaks_three_formats(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text("[plan]\nrows = 10\ntokens = 8\nlabels = 3\nranks = [2]\ncuts = [1]\n")
    call: Callable[..., Any] = CliRunner().invoke
    table = call(app, ["plan", str(path)])
    assert table.exit_code == 0, table.output
    assert "activations" in table.output and "break-even" in table.output
    md = call(app, ["plan", str(path), "--format", "md", "--limit", "bytes=100kB"])
    assert "| strategy |" in md.output and "## What fits" in md.output
    found = call(app, ["plan", str(path), "--format", "json", "--limit", "labels=stay"])
    data = json.loads(found.output)
    assert set(data["lines"]) == {"parameters", "logits", "activations"}
    assert data["advice"]["best"]["strategy"] == "parameters"
    assert isinstance(call(app, ["plan", str(path), "--format", "xml"]).exception, FedllmError)


def test_the_plan_section_survives_its_own_text(tmp_path: Path) -> None:
    spec = described(3, sites=[{"name": "a", "count": 3, "memory": 1e9}])
    (tmp_path / "again.toml").write_text(ex.dump(spec))
    assert ex.load(tmp_path / "again.toml").plan == spec.plan


def test_a_meta_pass_leaves_the_model_as_it_was() -> None:
    spec = described(3).replace(training=ex.Training(base_dropout=True))
    data = sizes(spec)
    estimator = Estimator(spec, data.labels)
    lines.line(estimator, ex.Parameters(), data)
    for small in estimator.shapes.small("whole", more=1):
        whole = small.model.whole
        assert not any(p.requires_grad or p.grad is not None for p in whole.parameters())
        assert not any(m.training for m in whole.modules())
    assert torch.is_grad_enabled()
