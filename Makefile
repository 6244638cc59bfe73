# Two commands do everything from a fresh clone: `make demo` and `make test`.
.DEFAULT_GOAL := help
.PHONY: help demo test setup lint lock bench clean

# The first Python of the supported versions that is there; override with `make PYTHON=...`.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.10 python3,$(if $(shell $(p) -c 'import sys; print(int((3, 10) <= sys.version_info[:2] <= (3, 12)))' 2>/dev/null | grep 1),$(p),)))
VENV := .venv
RUN := $(VENV)/bin/python
RIVALS := .venv-bench
# Options of benchmarks/compare.py: `make bench BENCH="--jobs clean --rounds 5"`.
BENCH ?=

help:
	@echo "make demo   try the toolkit on toy_data, without a GPU or a model hub"
	@echo "make test   run the linter and the tests"
	@echo "make setup  only install: the pinned packages into $(VENV), and the bundled model"
	@echo "make lock   resolve requirements.in into requirements.lock again (needs uv)"
	@echo "make bench  compare with sentence-transformers, SemHash and FAISS, installed into $(RIVALS)"

setup: $(VENV)/.installed
	@$(RUN) -m utils.models.bundled >/dev/null

$(VENV)/.installed: requirements.lock
	@test -n "$(PYTHON)" || { echo "error: Python 3.10, 3.11 or 3.12 is needed; found $$(python3 --version 2>&1). Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "installing the pinned packages into $(VENV) (once, about 2 GB)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

demo: setup
	@echo; echo "1. remove near-duplicate queries"
	@$(RUN) clean_query.py
	@echo; echo "2. mine hard negatives for the queries that are left"
	@$(RUN) mining_negative_samples.py --input_data_path output/toy_clean.json
	@echo; echo "3. judge the model on the dev questions"
	@$(RUN) embedding_evaluate.py
	@echo; echo "4. train it for a few steps on the mined rows"
	@$(RUN) run_embedding.py config/multilingual-e5-small/emb_argument.json --dataset_name_or_path output/toy_mined.json \
	  --output_dir output/demo_model --overwrite_output_dir true --max_steps 5 --per_device_train_batch_size 16 \
	  --max_passage_len 128 --evaluation_strategy no --save_strategy no --logging_steps 1
	@echo; echo "5. judge it again, against step 3: five steps show that it runs, not that it helps"
	@$(RUN) embedding_evaluate.py --model_path output/demo_model --compare_with output/toy_evaluation.jsonl \
	  --output_data_path output/toy_evaluation_trained.jsonl

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

test: setup lint
	@$(RUN) -m pytest

lock:
	uv pip compile --universal --python-version 3.10 --generate-hashes --no-emit-index-url --quiet \
	  --custom-compile-command "make lock" requirements.in -o requirements.lock

bench: setup $(RIVALS)/.installed
	@$(RUN) benchmarks/compare.py --rivals $(RIVALS)/bin/python $(BENCH)

$(RIVALS)/.installed: benchmarks/requirements-rivals.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.10, 3.11 or 3.12 is needed; name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "installing the rivals into $(RIVALS) (once)"
	@rm -rf $(RIVALS)
	@$(PYTHON) -m venv $(RIVALS)
	@$(RIVALS)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements-rivals.txt
	@touch $@

clean:
	rm -rf $(VENV) $(RIVALS) output log
