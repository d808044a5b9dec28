# Two commands for a newcomer: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench study paper knowledge unequal messages results clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/fedllm demo --out runs/demo --resume

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/speed.py --out benchmarks/RESULTS.md

study: paper knowledge unequal messages

paper: $(STAMP)
	for grid in rank samples bounds public; do \
	  $(BIN)/fedllm sweep experiments/study/$$grid.toml --out runs/study/$$grid --jobs 2 --resume \
	  && $(BIN)/python scripts/study.py runs/study docs/study || exit 1; done

knowledge: $(STAMP)
	for grid in depth selection forms features pruning feedback clusters fedmd fedkd alone; do \
	  $(BIN)/fedllm sweep experiments/knowledge/$$grid.toml --out runs/knowledge/$$grid --jobs 2 --resume \
	  && $(BIN)/python scripts/knowledge.py runs/knowledge docs/knowledge-study || exit 1; done
	$(BIN)/python scripts/mutual.py runs/mutual docs/mutual

unequal: $(STAMP)
	for grid in rules modules schedule optimizers slora balance inside; do \
	  $(BIN)/fedllm sweep experiments/unequal/$$grid.toml --out runs/unequal/$$grid --jobs 2 --resume \
	  && $(BIN)/python scripts/unequal.py runs/unequal docs/unequal-study || exit 1; done

messages: $(STAMP)
	for grid in parameters activations logits tokens; do \
	  $(BIN)/fedllm sweep experiments/small-messages/$$grid.toml --out runs/small-messages/$$grid \
	    --jobs 2 --resume \
	  && $(BIN)/python scripts/messages.py runs/small-messages docs/messages-study || exit 1; done

results: $(STAMP)
	$(BIN)/fedllm compare experiments/banking77-minilm.toml --out runs/banking77-minilm --resume
	$(BIN)/fedllm compare experiments/shakespeare.toml --out runs/shakespeare --resume
	$(BIN)/python benchmarks/plain_loop.py --accuracy --out benchmarks/QUALITY.md

clean:
	rm -rf $(VENV) runs dist build
