"""Acceptance tests of the catalogue's rows P-01 to P-04, loading, counting and export."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from fedllm import experiment as ex
from fedllm import federation
from fedllm.errors import FedllmError
from fedllm.models import flops
from fedllm.models.flops import FlopCounter, count
from fedllm.models.inputs import Inputs
from fedllm.models.loading import LanguageModel, load, load_config, source_of
from fedllm.predict import export, open_run, predict
from shared import needs_shared
from small import BERT, DECODERS, EACH, GPT2, LLAMA, TASKS, TYPES, build, experiment, finish

CLASSES = ex.Task()
TOKENS = ex.Task(kind="generation")
KINDS: list[Any] = [
    ex.Lora(rank=3), ex.Adapter(width=4), ex.BitFit(), ex.Prompt(tokens=5), ex.Prefix(tokens=5),
    ex.Full(),
]  # fmt: skip


def loaded(name: str, spec: Any, task: ex.Task = CLASSES) -> LanguageModel:
    return load(ex.Model(name=name), task, spec, 7, 0)


def fits(name: str, spec: Any) -> bool:
    if name == BERT and spec.kind == "prefix":
        return False
    return not (name == LLAMA and spec.kind == "bitfit")


X = torch.tensor([[5, 9, 7, 11, 30, 8], [17, 6, 5, 40, 3, 3]])
LENGTHS = torch.tensor([6, 4])


@pytest.mark.parametrize("name", TYPES)
def test_our_forward_is_the_librarys(name: str) -> None:
    """No tunable but the head; right padding; the head of the same random start."""
    found = loaded(name, ex.Lora())
    plain = AutoModelForSequenceClassification.from_pretrained(
        source_of(name), num_labels=7, dtype=torch.float32
    ).eval()
    head = {n: t for n, t in found.model.state_dict().items() if n.startswith(("score", "class"))}
    plain.load_state_dict(head, strict=False)
    for row, length in zip(X, LENGTHS.tolist(), strict=True):
        theirs = plain(input_ids=row[None, :length]).logits[0]
        ours = found.whole.apply_to(found.initial, Inputs.of(row[None, :length]))[0]
        assert torch.allclose(ours, theirs, atol=1e-5)
    both = found.whole.apply_to(found.initial, Inputs.of(X, LENGTHS))
    one = found.whole.apply_to(found.initial, Inputs.of(X[1:, :4]))
    assert torch.allclose(both[1], one[0], atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_token_logits_are_the_librarys_at_the_selected_places(name: str) -> None:
    found = loaded(name, ex.Lora(), TOKENS)
    plain = AutoModelForCausalLM.from_pretrained(source_of(name), dtype=torch.float32).eval()
    theirs = plain(input_ids=X[:1]).logits[0]
    select = torch.tensor([0, 3, 5])
    ours = found.whole.apply_to(found.initial, Inputs.of(X[:1], None, select))
    assert torch.allclose(ours, theirs[select], atol=1e-4)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("spec", KINDS[:2], ids=lambda spec: spec.kind)
def test_the_start_is_the_base_exactly(name: str, spec: Any) -> None:
    """P-01, P-02: B = 0 and W_up = 0."""
    changed = loaded(name, spec)
    plain = loaded(name, ex.Full())
    head = {n: t for n, t in changed.initial.items() if n in changed.head}
    ours = changed.whole.apply_to(changed.initial, Inputs.of(X, LENGTHS))
    theirs = plain.whole.apply_to({**plain.initial, **head}, Inputs.of(X, LENGTHS))
    assert torch.equal(ours, theirs) or torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", [ex.Lora, ex.Adapter])
def test_tunables_of_some_layers_lie_there_and_nowhere_else(name: str, kind: Any) -> None:
    found = loaded(name, kind(layers=(-1, 1)))
    every = loaded(name, kind())
    wanted = {1, found.blocks - 1}
    block = {n: {int(part) for part in n.split(".") if part.isdigit()} for n in every.initial}
    inside = {n for n in every.initial if n in found.head or wanted & block[n]}
    assert set(found.initial) == inside
    assert found.untouched == 1
    assert every.untouched == 0


@pytest.mark.parametrize("layers", [(4,), (-5,), (0, 7)])
def test_a_layer_that_the_model_does_not_have_is_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(FedllmError, match="the model has 4 blocks; expected 0 to 3"):
        loaded(GPT2, ex.Lora(layers=layers))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.kind)
def test_padding_and_gradients_of_every_tunable(name: str, spec: Any) -> None:
    if not fits(name, spec):
        with pytest.raises(FedllmError, match=r"prefix|bitfit"):
            loaded(name, spec)
        return
    found = loaded(name, spec)
    noise = torch.Generator().manual_seed(0)
    params = {
        n: (t + 0.02 * torch.randn(t.shape, generator=noise)).requires_grad_(True)
        for n, t in found.initial.items()
    }
    both = found.whole.apply_to(params, Inputs.of(X, LENGTHS))
    one = found.whole.apply_to(params, Inputs.of(X[1:, :4]))
    assert torch.allclose(both[1], one[0], atol=1e-4)
    both.square().sum().backward()  # type: ignore[no-untyped-call]
    without = [n for n, p in params.items() if p.grad is None]
    assert not without
    assert not any(p.requires_grad for p in found.model.parameters())


def numbers(found: LanguageModel) -> int:
    return sum(t.numel() for n, t in found.initial.items() if n not in found.head)


def test_sizes_are_those_of_the_papers() -> None:
    config = loaded(GPT2, ex.Lora()).model.config
    d, blocks = config.hidden_size, config.num_hidden_layers
    assert numbers(loaded(GPT2, ex.Lora(rank=4))) == blocks * 4 * (d + 3 * d)
    assert numbers(loaded(GPT2, ex.Adapter(width=6))) == blocks * 2 * (2 * d * 6 + 6 + d)
    assert numbers(loaded(GPT2, ex.Prompt(tokens=5))) == 5 * d
    assert numbers(loaded(GPT2, ex.Prefix(tokens=5))) == 2 * blocks * 5 * d
    whole = AutoModelForCausalLM.from_pretrained(source_of(GPT2))
    assert numbers(loaded(GPT2, ex.Full(), TOKENS)) == sum(p.numel() for p in whole.parameters())


@needs_shared
def test_a_paper_size_gpt2_has_36864_parameters_a_rank() -> None:
    """P-01, random weights: 12 blocks of (768 + 3 x 768) per unit of rank."""
    from transformers import GPT2Config

    with torch.device("meta"):
        config = GPT2Config()
        model_ = AutoModelForCausalLM.from_config(config)
    from fedllm.models.tunables import install

    _, names = install(model_, ex.Lora(rank=2), False)
    params = dict(model_.named_parameters())
    assert sum(params[n].numel() for n in names) == 2 * 36_864


def test_the_start_depends_on_the_run_seed_alone() -> None:
    first = load(ex.Model(), CLASSES, ex.Lora(), 7, 0).initial
    torch.manual_seed(99)
    again = load(ex.Model(), CLASSES, ex.Lora(), 7, 0).initial
    other = load(ex.Model(), CLASSES, ex.Lora(), 7, 1).initial
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize(("name", "task"), TASKS)
@pytest.mark.parametrize("part", ["whole", "client", "server"])
def test_flops_by_parabola_are_those_counted(name: str, task: str, part: Any) -> None:
    found = load(ex.Model(name=name), ex.Task(kind=task), ex.Lora(rank=2), 7, 0)  # type: ignore[arg-type]
    core = found.part(part, 2)
    trained = frozenset(found.initial)
    selected = 20 if task == "generation" and part != "client" else 0
    server = part == "server"
    ours = FlopCounter(core, trained)([(3, 37)], selected, True, server)
    assert ours == count(core, trained, 37, 3, selected, True, server)
    assert FlopCounter(core, trained)([(3, 37)], selected, False) < ours


@pytest.mark.parametrize(("name", "task"), EACH)
def test_a_count_does_not_depend_on_what_was_counted_before(
    name: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of the same name and another rank is another; one that is loaded again is not."""
    narrow, again, wide = (
        load(ex.Model(name=name), ex.Task(kind=task), ex.Lora(rank=rank), 7, 0)  # type: ignore[arg-type]
        for rank in (2, 2, 4)
    )

    def counted(found: Any, backward: bool) -> int:
        selected = 3 if task == "generation" else 0
        return count(found.whole, frozenset(found.initial), 8, 1, selected, backward, False)

    def anew(found: Any, backward: bool) -> int:
        monkeypatch.setattr(flops, "_COUNTED", {})
        return counted(found, backward)

    alone = [anew(found, backward) for found in (narrow, wide) for backward in (False, True)]
    assert len(set(alone)) == 4
    monkeypatch.setattr(flops, "_COUNTED", {})
    assert [counted(f, backward) for backward in (True, False) for f in (narrow, again, wide)] == [
        alone[1], alone[1], alone[3], alone[0], alone[0], alone[2],
    ]  # fmt: skip


def test_flops_of_a_known_layer() -> None:
    """2 x rows x in x out for the score alone, on the tail of a cut model."""
    found = loaded(GPT2, ex.Lora())
    tail = found.part("tail", 2)
    assert count(tail, frozenset(), 9, 5, 0, False, False) == 2 * 5 * found.width * 7


def test_any_other_architecture_works_whole(tmp_path: Path) -> None:
    config = DistilBertConfig(
        vocab_size=1000, dim=16, n_layers=2, n_heads=2, hidden_dim=32,
        max_position_embeddings=64, num_labels=7,
    )  # fmt: skip
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "other")
    spec = experiment(tunables={"kind": "lora", "targets": ["q_lin"], "dropout": 0.1})
    spec = spec.replace(
        model=ex.Model(name=str(tmp_path / "other"), tokenizer="builtin"),
        training=spec.training.model_copy(update={"rate": 0.01}),
    )
    for strategy in ("parameters", "logits"):
        assert finish(build(spec.replace(strategy={"kind": strategy}))).history
    with pytest.raises(FedllmError, match="cannot be cut"):
        build(spec.replace(strategy={"kind": "activations"}))
    with pytest.raises(FedllmError, match="not supported"):
        build(spec.replace(tunables=ex.Prompt()))


def test_random_weights_need_no_pretrained_ones() -> None:
    spec = ex.Model(weights="random")
    first, again = (load(spec, CLASSES, ex.Full(), 7, 0).initial for _ in range(2))
    other = load(ex.Model(), CLASSES, ex.Full(), 7, 0).initial
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


# Export -----------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, name: str, tunables: dict[str, Any], **sections: Any) -> Path:
    spec = experiment(name, tunables=tunables,
                      training={"optimizer": "adam", "rate": 0.01, "epochs": 2},
                      **sections)  # fmt: skip
    folder = tmp_path / "run"
    federation.run(spec, 0, folder)
    return folder


def ours(folder: Path, client: str | None = None) -> torch.Tensor:
    _, found, tunables, _ = open_run(folder, client)
    return found.whole.apply_to(tunables, Inputs.of(X[:1])).detach()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("head", ["shared", "frozen"])
def test_peft_loads_the_adapter(tmp_path: Path, name: str, kind: str, head: str) -> None:
    from peft import PeftModel

    if kind == "prefix" and name == BERT:
        return
    folder = folder_of(tmp_path, name, {"kind": kind, "head": head})
    base = AutoModelForSequenceClassification.from_pretrained(
        source_of(name), num_labels=24, dtype=torch.float32, pad_token_id=0
    )
    plain = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    mask = torch.ones_like(X[:1])
    theirs = plain(input_ids=X[:1], attention_mask=mask).logits
    assert torch.allclose(ours(folder), theirs, atol=1e-4)


# no bias in a Llama; whether the head is frozen is a question of no model's type
MERGED = [
    pytest.param(*case.values, kind, head, marks=case.marks, id=f"{case.id}-{kind}-{head}")
    for case in TYPES
    for kind in ("lora", "bitfit", "full")
    for head in ("shared", "frozen")
    if (kind, case.id) != ("bitfit", "llama") and (head == "shared" or case.id == "gpt2")
]
MERGED.append(pytest.param(GPT2, "sparse", "shared", id="gpt2-sparse-shared"))


@pytest.mark.parametrize(("name", "kind", "head"), MERGED)
def test_a_merged_model_needs_no_peft(tmp_path: Path, name: str, kind: str, head: str) -> None:
    folder = folder_of(tmp_path, name, {"kind": kind, "head": head})
    before = ours(folder)
    export(folder, tmp_path / "merged", merge=True)
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    ).eval()
    assert torch.allclose(plain(input_ids=X[:1]).logits, before, atol=1e-5)
    assert len(plain.config.id2label) == 24


def test_merging_keeps_random_weights(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, GPT2, {}, model={"name": "builtin", "weights": "random"})
    before = ours(folder)
    export(folder, tmp_path / "merged", merge=True)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(plain(input_ids=X[:1]).logits, before, atol=1e-5)


@pytest.mark.parametrize("kind", ["adapter", "prompt"])
def test_what_cannot_be_merged_says_so(tmp_path: Path, kind: str) -> None:
    folder = folder_of(tmp_path, GPT2, {"kind": kind})
    with pytest.raises(FedllmError, match="cannot be merged"):
        export(folder, tmp_path / "merged", merge=True)


def test_each_client_with_a_head_of_its_own_has_a_model(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, GPT2, {"head": "personal"})
    with pytest.raises(FedllmError, match="--client is needed"):
        ours(folder)
    first, second = ours(folder, "client-1"), ours(folder, "client-2")
    assert not torch.allclose(first, second)
    (answer,) = predict(folder, ["where is my parcel"], client="client-1")
    assert set(answer) == {"text", "label", "probability"}


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_predict_answers(tmp_path: Path, task: str) -> None:
    written = {"rouge_examples": 2} if task == "generation" else {}
    spec = experiment(GPT2, task, evaluation={"max_new_tokens": 5, **written})
    folder = tmp_path / "run"
    summary = federation.run(spec, 0, folder)
    texts = tmp_path / "texts.txt"
    texts.write_text("the lights are out\n\nmy parcel is late\n")
    answers = list(predict(folder, ["hello there"], texts))
    assert [a["text"] for a in answers] == ["hello there", "the lights are out",
                                            "my parcel is late"]  # fmt: skip
    if task == "classification":
        assert all(0 < a["probability"] <= 1 for a in answers)
    else:
        assert all(isinstance(a["answer"], str) for a in answers)
        assert 0 <= summary["metrics"]["rouge_l"] <= 1


@needs_shared
def test_who_writes_the_response_has_rouge_one_whatever_its_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client's model answers rows in its own tokens, the server's those in the server's."""
    shape = {"kind": "logits", "form": "top-k", "knowledge": "least-loss", "client_models": [LLAMA]}
    spec = experiment(
        GPT2, "generation", strategy=shape, public={"size": 4, "labelled": True},
        evaluation={"rouge_examples": 2}, simulation={"clients": 1, "sizes": [4]},
    )  # fmt: skip
    worker = build(spec).worker
    (one,) = worker.sites.values()
    assert one.server_model is not None
    assert one.server_data is not None
    for model, test in ((one.model, one.test), (one.server_model, one.server_data[one.name].test)):
        said = {}
        for number in range(2):
            row, prompt = test.row(number).tolist(), test.prompt_lengths[number]
            said[tuple(row[:prompt])] = row[prompt:-1]
        monkeypatch.setattr(
            "fedllm.worker.generate", lambda *given, said=said: said[tuple(given[2])]
        )
        found = worker._rouge(spec.evaluation, model, {}, test)
        assert float(found["rouge"]) == int(found["rouge_units"]) == 2


def test_loads_in_threads_leave_the_library_as_it_was() -> None:
    """It replaces methods of its classes while it loads; two at once would put back the wrong."""
    from transformers import PreTrainedModel

    before = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: loaded(GPT2, ex.Lora(), TOKENS), range(8)))
    assert PreTrainedModel.tie_weights is before
    assert len({model.base_hash for model in found}) == 1


@pytest.mark.parametrize(("name", "task"), [(BERT, "classification"), (LLAMA, "generation")])
@needs_shared
def test_a_model_may_be_cut_short(name: str, task: Any) -> None:
    """NAME#3: the first three blocks, with the whole one's weights."""
    kind, lora = ex.Task(kind=task), ex.Lora(rank=2)
    whole, short = (load(ex.Model(name=n), kind, lora, 5, 0) for n in (name, f"{name}#3"))
    assert (whole.blocks > 3, short.blocks) == (True, 3)
    assert short.base_hash != whole.base_hash
    mine, theirs = (dict(m.whole.named_parameters()) for m in (short, whole))
    shared = [n for n in mine if n not in short.initial and "lora" not in n]
    assert shared and all(torch.equal(mine[n], theirs[n]) for n in shared)
    for wrong in ("#0", "#99"):
        with pytest.raises(FedllmError, match=r"expected #1 to #"):
            load_config(ex.Model(name=name + wrong))
