"""Multiple choice: options in the data, and accuracy by the likeliest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fedllm import experiment as ex
from fedllm import federation
from fedllm.data import builtin, choices, own, sources
from fedllm.data.examples import Encoder, Examples
from fedllm.errors import FedllmError
from fedllm.models.loading import LanguageModel, load, load_tokenizer, source_of
from fedllm.predict import predict
from fedllm.report import init, tables
from fedllm.training.cohort import alone
from fedllm.training.evaluate import add, likelihoods, metrics, misfit, right, statistics
from fedllm.training.meter import Measured, Meter
from shared import data, needs_shared
from small import build, experiment, finish

MEASURED = Measured()  # each shape of a batch is measured once
CONTRACT = ex.Data(prompt="query", options="choices", response="gold", max_tokens=64)
ROWS = [
    {"query": f"{row['text']} What is it about?", "gold": str(number % 3),
     "choices": json.dumps(["parcel", "a light that is out", "money"])}
    for number, row in enumerate(builtin.rows("train", 24))
]  # fmt: skip


def row(options: list[str] | str, answer: str) -> dict[str, str]:
    listed = options if isinstance(options, str) else json.dumps(options)
    return {"query": "Which?", "choices": listed, "gold": answer}


def encoder(**changes: Any) -> Encoder:
    task = ex.Task(kind="multiple-choice")
    return Encoder(load_tokenizer(ex.Model()), task, CONTRACT.model_copy(update=changes), (), 128)


@pytest.fixture
def spec(tmp_path: Path) -> ex.Experiment:
    """Two clients with questions of three options."""
    file = tmp_path / "rows.jsonl"
    lines = [{**row, "choices": json.loads(row["choices"])} for row in ROWS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return experiment(
        task="multiple-choice", data=CONTRACT.model_dump(mode="json", exclude_none=True),
        public={"size": 6}, simulation={"source": str(file), "clients": 2, "sizes": [5, 5],
                                        "test_examples": None},
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load(ex.Model(), ex.Task(kind="multiple-choice"), ex.Lora(rank=2), 0, 0)


def counted(model: LanguageModel, examples: Examples) -> dict[str, torch.Tensor]:
    return alone(statistics(model, model.initial, examples, 64, Meter(MEASURED), "eval"))


def test_the_likelihood_of_an_option_is_that_of_the_plain_model(model: LanguageModel) -> None:
    """Against one forward pass an option."""
    encode, tokenizer = encoder(), load_tokenizer(ex.Model())
    examples = encode.held_out(ROWS[:4], "test")
    plain = AutoModelForCausalLM.from_pretrained(source_of("builtin")).eval()
    wanted, utf8 = [], []
    for one in ROWS[:4]:
        prompt = [tokenizer.bos_token_id, *tokenizer(one["query"])["input_ids"]]
        for option in choices.question(one, CONTRACT, "test"):
            tokens = tokenizer(option)["input_ids"]
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([prompt + tokens])).logits[0]
            chances = logits[len(prompt) - 1 : -1].log_softmax(-1)
            wanted.append(float(chances[range(len(tokens)), tokens].sum()))
            utf8.append(len(option.encode()))
    found = alone(likelihoods(model, model.initial, examples, 64, Meter(MEASURED), "eval"))
    assert np.allclose(found, wanted, atol=1e-4)
    each, long = np.reshape(wanted, (4, 3)), np.reshape(utf8, (4, 3))
    sums = counted(model, examples)
    assert float(sums["right"]) == sum(each.argmax(1) == 0)
    assert float(sums["right_per_byte"]) == sum((each / long).argmax(1) == 0)
    assert float(sums["loss"]) == pytest.approx(-each[:, 0].sum(), abs=1e-3)
    assert int(sums["utf8"]) == long[:, 0].sum()


def test_sums_over_clients_are_the_sums_over_all(model: LanguageModel) -> None:
    encode = encoder()
    parts = [counted(model, encode.held_out(rows, "test")) for rows in (ROWS[:7], ROWS[7:])]
    whole = counted(model, encode.held_out(ROWS, "test"))
    both = add(parts)
    assert both.keys() == whole.keys()
    assert all(torch.allclose(both[name], whole[name]) for name in whole)
    assert int(whole["questions"]) == len(ROWS)
    found = metrics(whole)
    assert found["accuracy"] == float(whole["right"]) / len(ROWS)
    assert found["bits_per_byte"] > 0


def test_the_order_of_options_changes_no_answer(model: LanguageModel) -> None:
    turned = []
    for one in ROWS:
        listed, answer = json.loads(one["choices"]), int(one["gold"])
        turned.append(
            row([*listed[1:], listed[0]], str((answer - 1) % 3)) | {"query": one["query"]}
        )
    first, second = (counted(model, encoder().held_out(rows, "t")) for rows in (ROWS, turned))
    assert all(torch.allclose(first[name], second[name]) for name in first)


@given(st.lists(st.integers(2, 5), min_size=1, max_size=9), st.floats(-300, -0.01))
def test_who_finds_all_alike_is_right_by_chance(counts: list[int], score: float) -> None:
    """A tie is a fraction, also where passes round differently."""
    option = np.concatenate([np.arange(count) for count in counts])
    noise = 1 + 1e-7 * np.sin(np.arange(len(option)))
    assert right(score * noise, option) == pytest.approx(sum(1 / count for count in counts))
    best = np.where(option == 0, score, 2 * score)
    assert right(best, option) == len(counts)
    assert right(3 * score - best, option) == 0


def test_two_options_of_one_text_share_the_answer(model: LanguageModel) -> None:
    sums = counted(model, encoder().held_out([row(["yes", "yes"], "0")], "test"))
    assert (float(sums["right"]), float(sums["right_per_byte"])) == (0.5, 0.5)


def test_training_is_generation_of_the_right_option() -> None:
    asked = [one | {"gold": json.loads(one["choices"])[int(one["gold"])]} for one in ROWS]
    contract = ex.Data(prompt="query", response="gold", max_tokens=64)
    plain = Encoder(load_tokenizer(ex.Model()), ex.Task(kind="generation"), contract, (), 128)
    assert encoder()(ROWS, "test").content == plain(asked, "test").content


def test_a_long_question_is_cut_alike_for_all_options() -> None:
    found = encoder(max_tokens=16).held_out(
        [row(["yes", "no, it is a light that is out"], "0") | {"query": "word " * 50}], "test"
    )
    assert found.lengths.max() == 16
    assert len(set(found.start)) == 1
    with pytest.raises(FedllmError, match=r"option 'no.*tokens; expected 1 to 7"):
        encoder(max_tokens=8).held_out([row(["yes", "no " * 20], "0")], "test")


@pytest.mark.parametrize(("options", "answer", "by", "number"), [
    (["a cat", "a dog"], "1", "any", 1), (["a cat", "a dog"], "B", "any", 1),
    (["a cat", "a dog"], "a dog", "any", 1), (["7", "1"], "1", "text", 1),
    (["2", "0"], "0", "index", 0), (["B", "A"], "A", "letter", 0), (["B", "A"], "A", "text", 1),
    ([1, 0.5, True], "0.5", "text", 1),
])  # fmt: skip
def test_an_answer_is_a_number_a_letter_or_a_text(
    options: list[Any], answer: str, by: str, number: int
) -> None:
    contract = CONTRACT.model_copy(update={"answer_by": by})
    one = row(options, answer)
    assert choices.right(one, choices.options(one, contract, "x"), contract, "x") == number


@pytest.mark.parametrize(("options", "answer", "words"), [
    (["a", "b"], "5", ["data.response = 'gold'", "'5'", "a number from 0 to 1", "A to B"]),
    (["a", "b"], "", ["''", "is none of the options"]),
    (["1", "0"], "0", ["option 0 by index", "option 1 by text", "data.answer_by"]),
    (["yes"], "0", ["data.options = 'choices'", "has 1", "2 options or more"]),
    (["yes", " "], "0", ["option 1", "is empty"]),
    ("yes or no", "0", ["'yes or no' is no list"]),
    ([["a"], ["b"]], "0", ["is no list"]),
])  # fmt: skip
def test_a_row_that_is_no_question_is_refused_by_file_and_row(
    options: list[str] | str, answer: str, words: list[str], spec: ex.Experiment
) -> None:
    file = Path(spec.simulation.source)
    lines = map(json.dumps, [*ROWS, row(options, answer)])
    file.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(FedllmError) as refused:
        federation.prepare(spec, 0)
    for word in (str(file), "row 25", *words):
        assert word in str(refused.value)
    here = ex.SiteData(train=str(file), test=str(file))
    with pytest.raises(FedllmError, match=r"data\.train = .*row 25"):
        own.division(spec, ("query", "gold", "choices"), here, "a")


@pytest.mark.parametrize(("changes", "words"), [
    ({"data": {"options": None}}, "data.options: multiple choice needs"),
    ({"task": {"kind": "generation"}}, "data.options: only with"),
    ({"data": {"options": None, "answer_by": "letter"}, "task": {"kind": "generation"}},
     "data.answer_by: only with"),
    ({"data": {"option_pattern": "("}}, "no regular expression"),
    ({"data": {"option_pattern": "(a)(b)"}}, "2 groups"),
    ({"evaluation": {"rouge_examples": 1}}, "evaluation.rouge_examples: .*'generation' with"),
    ({"data": {"options": None, "prompt": None, "response": None}, "task": {"kind": "generation"},
      "evaluation": {"rouge_examples": 1}}, "evaluation.rouge_examples"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(
    spec: ex.Experiment, changes: dict[str, Any], words: str
) -> None:
    values = spec.model_dump(mode="json")
    for section, change in changes.items():
        values[section] |= change
    with pytest.raises(FedllmError, match=words):
        ex.parse(values, "test", None)


@pytest.mark.parametrize(("change", "words"), [
    (lambda sums: sums.pop("questions"), "not"),
    (lambda sums: sums["right"].fill_(31), "more than all questions"),
    (lambda sums: sums["right"].fill_(float("nan")), "more than all questions"),
    (lambda sums: sums.update(right=torch.ones(1, dtype=torch.int64)), "'right' as"),
    (lambda sums: sums.update(rouge=torch.ones(1)), "rouge"),
])  # fmt: skip
def test_what_no_client_can_count_is_refused(
    change: Callable[[dict[str, torch.Tensor]], Any], words: str
) -> None:
    whole = {"loss": 9.0, "units": 9, "utf8": 9, "tokens": 9, "unknown": 0, "right": 2.5,
             "right_per_byte": 2.0, "questions": 3}  # fmt: skip
    sums = {name: torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else None)
            for name, value in whole.items()}  # fmt: skip
    assert misfit(sums, "multiple-choice", 0) == ""
    change(sums)
    assert words in misfit(sums, "multiple-choice", 0)


@pytest.mark.parametrize("strategy", ["logits", "activations"])
def test_every_strategy_takes_it_as_it_is(spec: ex.Experiment, strategy: str) -> None:
    values = spec.model_dump(mode="json") | {"strategy": {"kind": strategy}}
    built = build(ex.parse(values, "test", None))
    found = finish(built).history[-1]["global"]
    assert 0 <= found["accuracy"] <= 1
    assert found["questions"] == 2


def test_from_a_file_to_a_report_and_answers(spec: ex.Experiment, tmp_path: Path) -> None:
    source = Path(spec.simulation.source)
    written = ex.parse_text(init.template(source, tmp_path / "one.toml"), "init", tmp_path)
    assert (written.task.kind, written.data.options) == ("multiple-choice", "choices")
    folder = tmp_path / "run"
    summary = federation.run(spec, 0, folder)
    assert {"accuracy", "accuracy_per_byte", "bits_per_byte"} <= set(summary["metrics"])
    header, _ = tables.rows(summary)
    assert header[2:5] == ["accuracy", "accuracy per byte", "loss"]
    answers = list(predict(folder, [], source))
    assert len(answers) == len(ROWS)
    assert all(a["answer"] in json.loads(ROWS[0]["choices"]) for a in answers)
    assert all(1 / 3 <= a["probability"] <= 1 for a in answers)
    with pytest.raises(FedllmError, match="give a FILE"):
        list(predict(folder, ["hello"]))


@needs_shared
def test_options_inside_the_text_are_found_by_a_pattern() -> None:
    rows = sources.read(data("multiple-choice/ARC-Challenge/test.json"))
    contract = ex.Data(prompt="instruction", options="instruction", response="answer",
                       option_pattern=r"\banswer\d\b", answer_by="text")  # fmt: skip
    choices.need(rows, contract, "test")
    listed = choices.options(rows[0], contract, "test")
    assert listed == ("answer1", "answer2", "answer3", "answer4")
