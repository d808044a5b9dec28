"""Where and how passes are computed: precision, a base in 4 bits, an accelerator."""

import importlib.util
from typing import Any

import pytest
import torch

from fedllm import experiment as ex
from fedllm.errors import FedllmError
from fedllm.ledger import total
from fedllm.models.inputs import Inputs
from fedllm.models.loading import load, load_tokenizer, place
from fedllm.round import Federation
from small import BERT, EACH, GPT2, LLAMA, TASKS, TYPES, build, experiment, finish, furthest
from test_models import KINDS, LENGTHS, X, fits, loaded

STRATEGIES: list[dict[str, Any]] = [
    {"kind": "parameters"},
    {"kind": "logits"},
    {"kind": "activations", "cut": 2, "server": "per-client"},
    {"kind": "activations", "cut": 2, "labels": "client"},
]
each_strategy = pytest.mark.parametrize(
    "strategy", STRATEGIES, ids=lambda s: "-".join(map(str, s.values()))
)


def ran(model: dict[str, Any], strategy: dict[str, Any], task: str, **more: Any) -> Federation:
    spec = experiment(
        model["name"], task, model=model, strategy=strategy,
        training={"rate": 0.001, "batch_size": 4}, **more,
    )  # fmt: skip
    built = build(spec)
    finish(built)
    return built


def finals(built: Federation) -> dict[str, torch.Tensor]:
    """The tunables that clients hold at the end of a run."""
    return {
        f"{client} {name}": tensor
        for client, site in built.worker.sites.items()
        for name, tensor in {**site.model.initial, **site.group("tunables")}.items()
    }


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.kind)
def test_bf16_is_near_fp32_for_every_tunable(name: str, spec: Any) -> None:
    if not fits(name, spec):
        return
    whole = loaded(name, spec)
    half = load(ex.Model(name=name, precision="bf16"), ex.Task(), spec, 7, 0)
    gradients = []
    for model in (whole, half):
        params = {n: t.clone().requires_grad_(True) for n, t in model.initial.items()}
        logits = model.whole.apply_to(params, Inputs.of(X, LENGTHS))
        assert logits.dtype == torch.float32
        logits.square().mean().backward()  # type: ignore[no-untyped-call]
        gradients.append(torch.cat([p.grad.flatten() for p in params.values()
                                    if p.grad is not None]))  # fmt: skip
    one, other = gradients
    assert not torch.equal(one, other)
    assert torch.cosine_similarity(one, other, dim=0) > 0.98


@each_strategy
def test_under_bf16_all_that_travels_stays_float32(strategy: dict[str, Any]) -> None:
    half = ran({"name": GPT2, "precision": "bf16"}, strategy, "classification")
    whole = ran({"name": GPT2}, strategy, "classification")
    for column in ("payload_bytes", "flops", "optimizer_steps"):
        assert total(half.ledger.rows, column) == total(whole.ledger.rows, column)


FOUR = [
    pytest.param(*case.values, strategy, marks=case.marks, id=f"{case.id}-{strategy['kind']}")
    for number, case in enumerate(EACH)
    for strategy in (STRATEGIES if number == 0 else [STRATEGIES[number]])
]  # fmt: skip


@pytest.mark.parametrize(("name", "task", "strategy"), FOUR)
def test_a_base_in_four_bits_trains_and_stays(
    name: str, task: str, strategy: dict[str, Any]
) -> None:
    """Law 5 for it; it is smaller; a pass is the same arithmetic. In bf16 for the built-in one."""
    precision = "bf16" if name == GPT2 else "fp32"
    four = ran({"name": name, "quantization": "nf4", "precision": precision}, strategy, task)
    model = four.worker.sites["client-1"].model
    assert model.hash_base() == model.base_hash
    whole = ran({"name": name}, strategy, task)
    other = whole.worker.sites["client-1"].model
    assert model.base_bytes < other.base_bytes
    assert model.base_hash != other.base_hash
    assert total(four.ledger.rows, "flops") == total(whole.ledger.rows, "flops")
    assert {t.dtype for t in finals(four).values()} == {torch.float32}


@pytest.mark.parametrize("name", TYPES)
def test_a_base_in_four_bits_is_near_the_whole_one(name: str) -> None:
    spec, found = ex.Lora(), []
    for quantization in ("none", "nf4"):
        model = load(ex.Model(name=name, quantization=quantization), ex.Task(), spec, 7, 0)  # type: ignore[arg-type]
        core = model.part("client", model.blocks - 1)
        found.append(core.apply_to({}, Inputs.of(X, LENGTHS)).detach())
    real = Inputs.of(X, LENGTHS).real()
    near = torch.cosine_similarity(found[0][real], found[1][real], dim=-1)
    assert not torch.equal(*found)
    assert float(near.mean()) > 0.9


def test_other_types_and_incomplete_weights_train_in_four_bits(tmp_path: Any) -> None:
    """A type of which we know nothing; a classifier from a model that had no pooler."""
    from transformers import BertConfig, BertForMaskedLM, OPTConfig, OPTForCausalLM

    tokenizer = load_tokenizer(ex.Model())
    small = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 128}  # fmt: skip
    for kind, model in (
        ("opt", OPTForCausalLM(OPTConfig(**small, ffn_dim=64, word_embed_proj_dim=32))),
        ("bert", BertForMaskedLM(BertConfig(**small, intermediate_size=64))),
    ):
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        task = "classification" if kind == "bert" else "generation"
        settings = {"name": str(tmp_path / kind), "quantization": "nf4"}
        built = ran(settings, {"kind": "parameters"}, task)
        base = built.worker.sites["client-1"].model
        assert base.hash_base() == base.base_hash
        assert any(type(m).__name__ == "Linear4bit" for m in base.model.modules())


def test_on_a_base_in_four_bits_clients_train_together() -> None:
    ends = []
    for size in (3, 1):
        spec = experiment(
            model={"quantization": "nf4"}, tunables={"dropout": 0.1},
            training={"rate": 0.001, "batch_size": 4},
            simulation={"cohort": size, "clients": 3, "sizes": [11, 8, 5], "test_examples": 30},
        )  # fmt: skip
        built = build(spec)
        ends.append(finish(built).server.shared)
        assert built.worker.sites["client-1"].model.stackable
    assert furthest(*ends) < 2e-5


def test_without_bitsandbytes_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest),
    )  # fmt: skip
    with pytest.raises(FedllmError, match=r"pip install 'fedllm\[qlora\]'"):
        load(ex.Model(quantization="nf4"), ex.Task(), ex.Lora(), 7, 0)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.kind)
def test_shapes_alone_are_those_of_the_model(name: str, spec: Any) -> None:
    if not fits(name, spec):
        return
    whole = loaded(name, spec)
    shapes = load(ex.Model(name=name), ex.Task(), spec, 7, 0, meta=True)
    assert {n: t.shape for n, t in shapes.initial.items()} == {
        n: t.shape for n, t in whole.initial.items()
    }
    assert all(p.is_meta for p in shapes.whole.parameters())
    assert shapes.base_bytes == whole.base_bytes


def test_without_an_accelerator_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place("auto") == place("cpu") == torch.device("cpu")
    with pytest.raises(FedllmError, match="finds 0 CUDA devices"):
        place("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "task"), TASKS)
@each_strategy
@pytest.mark.parametrize("layers", [(), (-1,)], ids=["all", "last"])
def test_an_accelerator_computes_the_same(
    name: str, task: str, strategy: dict[str, Any], layers: tuple[int, ...]
) -> None:
    there = ran({"name": name, "device": "cuda"}, strategy, task, tunables={"layers": layers})
    here = ran({"name": name, "device": "cpu"}, strategy, task, tunables={"layers": layers})
    assert there.worker.sites["client-1"].model.device.type == "cuda"
    assert furthest(finals(there), finals(here)) < 1e-4
    for column in ("payload_bytes", "flops", "optimizer_steps"):
        assert total(there.ledger.rows, column) == total(here.ledger.rows, column)
    assert all(not t.is_cuda for t in finals(there).values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", [GPT2, LLAMA, BERT])
@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.kind)
def test_an_accelerator_takes_every_tunable(name: str, spec: Any) -> None:
    if not fits(name, spec):
        return
    logits = []
    for device in ("cpu", "cuda"):
        model = load(ex.Model(name=name, device=device), ex.Task(), spec, 7, 0)
        inputs = Inputs.of(X.to(device), LENGTHS.to(device))
        logits.append(model.whole.apply_to(model.initial, inputs).detach().cpu())
    assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [{"precision": "bf16"}, {"quantization": "nf4"}])
def test_an_accelerator_computes_in_few_bits(model: dict[str, Any]) -> None:
    built = ran({"name": GPT2, "device": "cuda", **model}, {"kind": "parameters"}, "generation")
    assert total(built.ledger.rows, "optimizer_steps") > 0
