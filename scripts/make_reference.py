"""
Write docs/experiment-file.md from the models in fedllm.experiment.

Sections, keys, types, limits and defaults come from the models, the text of a section from its
docstring. What a key means stands in ``MEANING`` below; a key without an entry is an error, and
so is an entry without a key.

    PYTHONPATH=src python scripts/make_reference.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from fedllm import experiment as ex

PAGE = Path(__file__).resolve().parents[1] / "docs" / "experiment-file.md"

INTRO = """\
<!-- Made by scripts/make_reference.py; change that script or src/fedllm/experiment.py instead. -->
# The experiment file

One TOML file says what is trained, on what, and what clients exchange. Every key but one (the
`column` of a partition by column) has a default, so a file holds only what differs. An unknown
key, a wrong type or a value out of range is an error that names the key. `fedllm check FILE` says
what a file would do. [Across machines](across-machines.md) all of it holds but `[simulation]`.

- A path in `model.name`, `model.tokenizer`, `simulation.source`, `simulation.test`,
  `public.source` or `client_models` is relative to the file's folder. A name that is no existing
  path there, and does not start with `.`, `/` or `~`, is left as it is: a name on the hub.
- `${NAME}` in a string becomes the environment variable; `${NAME:-default}` has a default.
- `--set section.key=value` overrides a key; the value is TOML, and bare words are strings. Paths
  given so are relative to the current folder. Setting a `kind` to another one drops the other
  keys of its section.
- `[tunables]` without `kind` is `lora`, `[strategy]` without `kind` is `parameters`.

Rules between keys:

- `simulation.sizes` has one number for each of `simulation.clients`.
- `plan.sites` count as many clients as `simulation.clients`.
- `exchange.clients_per_round` is at most `simulation.clients`.
- `data.prompt` and `data.response` go together; multiple choice needs `data.options`, too.
- Preference needs `data.prompt`, `data.response` and `data.rejected`, and no public set.
- `evaluation.rouge_examples` needs prompt and response of a generation.
- `tunables.head` other than `shared` is for classification only.
- `seeds` holds no seed twice.

"""

SAME_HEAD = (
    "the task head of a classifier: `shared` travels with the tunables, `personal` is trained and "
    "stays at the client, `frozen` is not trained"
)

MEANING = {
    "name": "name of the run; without it the file's name without its ending",
    "rounds": "number of rounds",
    "seeds": "the run is repeated with each seed; a table then shows mean and standard deviation",
    "model.name": "`builtin`, a folder, or a name on the hub",
    "model.revision": "branch, tag or commit on the hub",
    "model.weights": "`random` takes the architecture only and starts from the run seed",
    "model.tokenizer": "another tokenizer than the model's own, named like a model",
    "model.threads": "torch threads; 0 leaves torch's choice",
    "model.cache": "hidden states of the blocks below the first tunable one are computed once for "
                   "each row and kept, where they fit into a quarter of the memory (not under "
                   "`training.base_dropout`); the results are the same",
    "model.device": "where passes are computed: `auto`, `cpu`, `cuda` or `cuda:1`",
    "model.precision": "of the passes; the rest is float32",
    "model.quantization": "of the frozen base; `nf4` needs the extra `fedllm[qlora]`",
    "task.kind": "what is learnt",
    "task.beta": "of DPO: how dear it is to leave the reference (preference)",
    "task.chat_template": "the prompt is one user turn of the tokenizer's chat template",
    "task.response_only": "false: tokens of the prompt are predicted, too (prompt and response)",
    "data.text": "column of the text",
    "data.label": "column of the label",
    "data.prompt": "column of the prompt (generation, preference) or question (multiple choice)",
    "data.response": "column of the response (generation) or of the better one (preference); "
                     "multiple choice: of what names the right option",
    "data.rejected": "column of the worse response (preference)",
    "data.options": "column of the options: a list, or its JSON (multiple choice)",
    "data.option_pattern": "the options are all matches of this regular expression in their column "
                           "(of its group, where it has one)",
    "data.answer_by": "how the right option is named: `index` (from 0), `letter`, `text`; `any`: "
                      "by whichever fits, and refused where two do and differ",
    "data.labels": "all labels, in the order of their numbers; empty: those of the training rows, "
                   "sorted",
    "data.max_tokens": "longest example in tokens",
    "public.source": "a source of its own; without it the rows are cut from `simulation.source`",
    "public.size": "number of public rows; with `source`, 0 means all",
    "public.rows_per_round": "rows drawn each round; without it all",
    "public.choose": "which rows those are: `random`; the highest `entropy` of the server's "
                     "prediction, or `el2n`, its distance from the label; `coverage`, each the "
                     "farthest from those before it; `disagreement` of the clients; `feedback`, by "
                     "the clients' mix of labels",
    "public.feedback_epsilon": "Laplace noise of scale 2 / epsilon on each count of a client's "
                               "labels, drawn from the run's seed; without it none",
    "public.labelled": "the public set's labels (generation: its tokens) are used as targets, too",
    "public.ship": "the server sends the set to each client once (step b0), counted; false: "
                   "clients have it beforehand",
    "lora.rank": "rank of the update; of several the largest",
    "lora.ranks": "ranks of the clients, taken in turn, or a table of clients' names and ranks",
    "lora.budgets": "bytes each way that clients can pay for in a round, before any codec, "
                    "given as `ranks` are; each a number, or a table of rounds, e.g. "
                    "`{ 1 = 100_000, 4 = 20_000 }`",
    "lora.modules": "blocks and targets that clients have where not all, given as `ranks` are, "
                    "e.g. `{ client-1 = { layers = [-1] } }`; each is made by those who have it",
    "modules.layers": "numbers of the blocks, of those that LoRA is in",
    "modules.targets": "those of LoRA's targets",
    "lora.schedule": "the highest rank from which round on, e.g. `{ 1 = 2, 4 = 8 }`; it grows "
                     "without changing a logit, and shrinks to the best approximation",
    "lora.growth": "ranks that grow while the loss stands still, instead of a `schedule`",
    "growth.start": "rank of the first round",
    "growth.factor": "by which it is multiplied",
    "growth.patience": "rounds in a row without such a gain, after which it grows",
    "growth.gain": "share of the best loss so far by which a lower one counts",
    "lora.sparse": "rounds of sparse training before the first of LoRA (SLoRA)",
    "sparse.rounds": "how many",
    "sparse.density": "share of the targets' weights that is trained",
    "sparse.targets": "as for LoRA",
    "sparse.layers": "as for LoRA",
    "lora.freeze_a": "only the second matrix is trained and sent",
    "lora.alpha": "the update is scaled by alpha / rank",
    "lora.dropout": "dropout before the update's first matrix",
    "lora.targets": "names of the layers; empty: `c_attn` (GPT-2), `q_proj`, `v_proj` (Llama "
                    "types), `query`, `value` (BERT), PEFT's choice elsewhere",
    "lora.layers": "numbers of the blocks, from 0, or from -1 at the end; empty: all. Blocks below "
                   "the first one are never trained (see `model.cache`)",
    "lora.init": "start of the first matrix (the second is zero)",
    "adapter.width": "width of the bottleneck",
    "adapter.after": "which halves of a block get one",
    "adapter.layers": "as for LoRA",
    "prompt.tokens": "number of learnt vectors; they count against the model's longest input",
    "prefix.tokens": "number of learnt keys and values; they count against the model's longest "
                     "input",
    "training.epochs": "passes over a client's rows in each round",
    "training.batch_size": "rows in a batch (preference: pairs)",
    "training.optimizer": "torch's optimizer of that name",
    "training.rate": "learning rate",
    "training.momentum": "of `sgd`",
    "training.weight_decay": "of the optimizer",
    "training.schedule": "of the rate, over all rounds",
    "training.warmup": "first part of the experiment in which the rate rises from 1 % of itself",
    "training.clip": "largest norm of the gradient (under activations of each half); without it no "
                     "clipping",
    "training.optimizer_state": "`keep`: a client's optimizer goes on from round to round. That of "
                                "distillation always starts afresh, those of the server half "
                                "(activations) and of the bounds always go on",
    "training.base_dropout": "the frozen base's dropout layers draw in training, too",
    "training.padding": "`bucket`: rows of similar length meet in a batch; `longest`: random "
                        "batches, padded to their longest row; `fixed`: padded to the longest "
                        "example allowed",
    "training.sampling": "`uniform`: each private row once a pass; `loss`: as many draws, by the "
    "rows' last known losses",
    "training.sampling_floor": "`loss`: share of the draws that is even; no row weighs more than 1 "
    "/ this",
    "parameters.payload": "clients send their tunables, or the difference from what they got "
    "(`delta`); `change`: that, and the server sends what changed since the first values",
    "parameters.server": "what the server makes of the clients' mean change",
    "parameters.client": "what keeps a client near the others while it trains",
    "momentum.rate": "of the server's step",
    "momentum.beta": "share of the last step that is kept",
    "adagrad.rate": "of the server's step; each number moves by about this much a round",
    "adagrad.beta1": "share of the last step that is kept",
    "adagrad.tau": "changes much smaller than this move less",
    "yogi.rate": "as for `adagrad`",
    "yogi.beta1": "as for `adagrad`",
    "yogi.beta2": "how slowly the measure of what changes are usual follows",
    "yogi.tau": "as for `adagrad`",
    "adam.rate": "as for `adagrad`",
    "adam.beta1": "as for `adagrad`",
    "adam.beta2": "as for `yogi`",
    "adam.tau": "as for `adagrad`",
    "prox.mu": "weight of the distance; 0 is `plain`. With SGD it must stay well below "
    "2 / `training.rate`, or steps overshoot",
    "parameters.mentor": "a larger model that each client keeps for itself: it and the common one "
    "teach each other (FedKD)",
    "parameters.aggregation": "`mean` weights clients by their rows (generation: predicted tokens, "
    "preference: pairs); the last four are for LoRA of different ranks",
    "parameters.balance": "as below; without it clients count by their rows alone",
    "parameters.prune": "share of its rank that a client keeps once the rest has become less in "
    "training; without it nobody prunes",
    "parameters.prune_penalty": "weight in the loss of what is to go: the product of its two norms",
    "balance.temperature": "smaller is stricter",
    "balance.floor": "least factor",
    "balance.cap": "largest factor",
    "logits.form": "what is said of each public unit: `logits`, `labels` (softmax at "
    "`temperature`), `top-k`, `statistics` (the likeliest output and its probability), "
    "`features` (the hidden state that the head reads)",
    "logits.top_k": "outputs of each unit that travel with form `top-k`",
    "logits.rest": "`top-k`: who gets the probability that is missing: the k (`renormalize`), or "
    "all others evenly (`uniform`)",
    "logits.selective": "a student follows others only on rows where its own loss is not less",
    "logits.loss_per": "losses of a text are compared a byte (across tokenizers nothing else can "
    "be), or a token as in FedMKT's code",
    "logits.temperature": "of the softmax in `kl`",
    "logits.loss": "of the distillation: `kl` is T^2 KL(teacher, student), `mse` compares logits "
    "or features, `cosine` features",
    "logits.knowledge": "how much each client's word on a public row counts: `mean` by its units "
    "as for parameters, `uniform`, `confidence` by 1 - entropy, `entropy` drops who doubts, "
    "`loss` and `least-loss` by the loss on a labelled set",
    "logits.keep": "on each row only so many best clients count; 0: all",
    "logits.max_entropy": "with `entropy`: doubt, of the largest there may be, above which a "
    "client is dropped",
    "logits.clusters": "clients that think alike teach each other, in so many groups",
    "logits.label_share": "share of the labels' cross-entropy in the loss of distillation; left "
    "out: added whole",
    "logits.server_model": "false: clients get the averaged logits themselves",
    "logits.client_models": "models of the clients, taken in turn, or a table of clients' names "
    "and models; all must give equally many logits, but for top-k knowledge of text",
    "logits.epochs": "passes over the round's public rows, at the server and at each client",
    "logits.batch_size": "rows in a batch of distillation; without it `training.batch_size`",
    "logits.rate": "rate of distillation; without it `training.rate`",
    "activations.cut": "blocks at the client; a list: of the clients in turn; a table: by their "
    "names, who is not in it has half; `auto`: chosen for each client by `[plan]`",
    "activations.recut": "`auto`: change of a machine's or link's speed, as a share of it, above "
    "which cuts are chosen anew for the next round",
    "activations.server": "one server half, client after client; one for each client, averaged "
                          "every round; or one step on all clients' batches together",
    "activations.turn": "`sequential` only: clients take turns after a batch, or after all "
                        "batches of their round",
    "activations.labels": "where the labels, the head and the loss are",
    "activations.average_every": "batches of a client between two averages of the client halves",
    "activations.keep_tokens": "share of a row's tokens that crosses; 1: all",
    "activations.inside": "blocks above the cut whose attention is at the client, and whose "
    "feed-forward part at the server",
    "activations.keep_by": "`attention`: those that the client's last block attends to most; "
    "`random`: any",
    "standalone.steps": "optimizer steps of each client over the whole run, in order of names",
    "standalone.public": "one model, trained on the labelled public set",
    "exchange.clients_per_round": "clients drawn each round; without it all",
    "exchange.minimum_replies": "replies without which a step ends the run with an error; without "
                                "it all that were asked",
    "sweep": "tables of keys (dotted, in quotes) with lists of values: `fedllm sweep` runs every "
    "combination; keys of one table change together",
    "exchange.resident": "across machines: sites stay for the whole run, in a session; `false`: "
    "each message is a process of its own at the site (parameters and logits; slower, one port)",
    "exchange.deadline": "seconds for the answers of one step; who is later is left out of it, and "
                         "what still comes is counted and dropped. In one process nobody is late",
    "exchange.codecs": "codec by role, e.g. `{ activation = \"int8\" }`, or a table of codecs by "
    "tensors' names and ways, e.g. `{ parameter = { up = \"topk-10+int8+feedback\" } }`: "
    "[small messages](small-messages.md)",
    "evaluation.every": "rounds between evaluations; 0: only after the last",
    "evaluation.batch_size": "rows in a batch of evaluation and of public logits",
    "evaluation.on": "which held-out rows",
    "evaluation.rouge_examples": "responses each client writes for Rouge-L (prompt and response); "
                                 "0: none",
    "evaluation.max_new_tokens": "longest response, here and in `fedllm predict`",
    "dirichlet.alpha": "smaller is more uneven",
    "by_column.column": "the column",
    "simulation.source": "training rows: `builtin`, a file (.csv, .json, .jsonl, .txt), or what "
                         "`datasets.load_dataset` takes",
    "simulation.test": "held-out rows; without it each client's are cut from its training rows "
                       "(`builtin` has its own)",
    "simulation.format": "`auto` goes by the file's ending; `dialogue` is a script with lines "
                         "`NAME:`",
    "simulation.split": "split of a source on the hub; of `test` it is always `test`",
    "simulation.clients": "number of clients",
    "simulation.partition": "who gets which rows",
    "simulation.sizes": "rows of each client, one by one; only with the partition `iid`",
    "simulation.examples": "rows of each client, those held out for want of a `test` included; "
                           "`dirichlet` uses `clients` times as many in all, `by_column` as the "
                           "most a client gets; without it all rows are divided",
    "simulation.test_examples": "rows drawn from `test` in all; without it all",
    "simulation.test_fraction": "held-out part of each client's rows where there is no `test`",
    "simulation.validation": "part of each client's training rows set aside for validation",
    "simulation.shuffled": "share of the training rows, by client, whose labels are shuffled among "
                           "themselves",
    "simulation.cohort": "most clients that train side by side in one pass over the base; without "
                         "it as many as memory allows, at most 256 (another number rounds "
                         "differently)",
    "plan.rows": "training rows of each client",
    "plan.tokens": "mean tokens of a row, private and public",
    "plan.targets": "mean predicted tokens of a row (generation); without it all but the first",
    "plan.public_rows": "rows of the public set",
    "plan.public_tokens": "mean tokens of a public row",
    "plan.labels": "number of labels",
    "plan.ranks": "sizes of the tunables that the advisor tries (rank, width or tokens); empty: "
                  "2, 4, 8, 16, 32 and the file's",
    "plan.cuts": "cuts that it tries; empty: after one block and at the quarters",
    "plan.public_sizes": "public rows a round that it tries; empty: a tenth, half, all",
    "plan.codecs": "codecs that it tries for what a strategy is about (parameters; logits or "
                   "features; activations and gradients) beside the file's own, the better ones "
                   "first",
    "plan.sites": "clients that are alike; together as many as `simulation.clients`",
    "plan.server": "the server",
    "plan.sites.name": "what a plan calls them; without it by their number",
    "plan.sites.count": "how many there are",
    "plan.sites.rows": "training rows of each, where not `plan.rows`",
    "plan.sites.flops": "operations a second in training",
    "plan.sites.memory": "bytes of memory; without it memory is no limit",
    "plan.sites.up": "bytes a second to the server",
    "plan.sites.down": "bytes a second from the server",
    "plan.sites.speed": "`cut = \"auto\"`: factor of `flops` in each round, the last for all "
    "after it; empty: 1",
    "plan.sites.bandwidth": "the same of `up` and `down`",
    "plan.sites.latency": "seconds on the way of every message, each way",
    "plan.server.flops": "operations a second in training",
    "plan.server.memory": "bytes of memory; without it memory is no limit",
    "plan.server.up": "bytes a second to all clients together; without it no limit",
    "plan.server.down": "bytes a second from all clients together; without it no limit",
    "compare.strategies": "which strategies run",
    "compare.bounds": "which bounds run",
    "compare.parameters": "options as in `[strategy]` with this kind",
    "compare.logits": "options as in `[strategy]` with this kind",
    "compare.activations": "options as in `[strategy]` with this kind",
}  # fmt: skip


def _choices(values: list[Any]) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in values)


def kind_of(schema: dict[str, Any]) -> str:
    """A property's JSON schema in words."""
    if "anyOf" in schema:
        kinds = [kind_of(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(kinds)
    if "oneOf" in schema or "$ref" in schema:
        return "table"
    if "enum" in schema:
        return _choices(schema["enum"])
    if "const" in schema:
        return _choices([schema["const"]])
    kind = schema.get("type", "any")
    if kind == "any":
        return "values"
    if kind == "array":
        inner = kind_of(schema["items"])
        return f"list of: {inner}"
    if kind == "object":
        names = schema.get("propertyNames", {}).get("enum")
        roles = _choices(names) if names else "keys"
        return f"table from {roles} to {kind_of(schema['additionalProperties'])}"
    name = {"string": "string", "boolean": "true or false", "integer": "whole number",
            "number": "number"}[kind]  # fmt: skip
    limits = [
        f"{sign} {schema[key]:g}"
        for key, sign in (("minimum", "at least"), ("exclusiveMinimum", "above"),
                          ("maximum", "at most"), ("exclusiveMaximum", "below"))
        if key in schema
    ]  # fmt: skip
    return " ".join([name, ", ".join(limits)]).strip()


def default_of(model: type[BaseModel], key: str) -> str:
    """A field's default as it would stand in the file."""
    field = model.model_fields[key]
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return "left out"
    if isinstance(value, BaseModel):
        return f'`{{ kind = "{value.kind}" }}`' if hasattr(value, "kind") else "see there"
    if value == {}:
        return "`{}`"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def _prose(model: type[BaseModel]) -> str:
    """A section's docstring as one paragraph."""
    return " ".join((model.__doc__ or "").replace("``", "`").split())


def _table(model: type[BaseModel], prefix: str, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """The keys of one section, or nothing where it has none."""
    schema = model.model_json_schema()["properties"]
    keys = [key for key in model.model_fields if key not in skip]
    if not keys:
        return
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key in keys:
        meaning = SAME_HEAD if key == "head" else _meaning(f"{prefix}{key}")
        yield f"| `{key}` | {kind_of(schema[key])} | {default_of(model, key)} | {meaning} |"
    yield ""


_used: set[str] = set()


def _meaning(key: str) -> str:
    """What a key means; remembers that it was asked for."""
    _used.add(key)
    return MEANING[key]


def _options(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows or holds: one, or those of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inner = (one for part in get_args(annotation) for one in _options(part))
    return list(dict.fromkeys(inner))


def _kinds(title: str, options: list[type[BaseModel]], level: str) -> Iterator[str]:
    for model in options:
        kind = model.model_fields["kind"].default
        yield f'{level} {title} kind = "{kind}"'
        yield f"\n{_prose(model)}\n"
        yield from _table(model, f"{kind}.", ("kind",))
        for key, field in model.model_fields.items():
            inner = _options(field.annotation)
            if len(inner) > 1:
                yield from _kinds(f"{title.removesuffix(']')}.{key}]", inner, f"{level}#")
            elif inner:
                yield f"{level}# [{title.strip('[]')}.{key}]"
                yield f"\n{_prose(inner[0])}\n"
                yield from _table(inner[0], f"{key}.")


def page() -> str:
    """The whole page."""
    _used.clear()
    fields = ex.Experiment.model_fields
    sections = {name: found for name, field in fields.items() if (found := _options(
        field.annotation))}  # fmt: skip
    lines = ["## Top level", "", *_table(ex.Experiment, "", tuple(sections))]
    for name, options in sections.items():
        lines += [f"## [{name}]", ""]
        if len(options) > 1:
            default = fields[name].default.kind
            kinds = ", ".join(f'`"{model.model_fields["kind"].default}"`' for model in options)
            lines += [f'`kind` is one of {kinds}; default `"{default}"`.', ""]
            lines += _kinds(f"[{name}]", options, "###")
            continue
        model = options[0]
        lines += [_prose(model), "", *_table(model, f"{name}.")]
        if name == "plan":
            for key, inside in (("[plan.sites]", ex.PlanSite), ("plan.server", ex.PlanServer)):
                lines += [f"### [{key}]", "", _prose(inside), ""]
                lines += _table(inside, f"{key.strip('[]')}.")
        for key, field in model.model_fields.items():
            inner = _options(field.annotation)
            if len(inner) > 1:
                lines += _kinds(f"[{name}.{key}]", inner, "###")
    unknown = sorted(set(MEANING) - _used)
    if unknown:
        raise KeyError(f"MEANING of keys that do not exist: {', '.join(unknown)}")
    return INTRO + "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
