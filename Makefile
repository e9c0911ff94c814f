# Two commands do everything on a fresh machine that has Python 3.11, 3.12 or 3.13 and make:
#   make demo    install, prepare the embedded corpus, train, evaluate, sample, fine-tune (minutes)
#   make test    install the development tools too, run the tests                 (six to thirteen minutes on two cores)
# make check is the full, long version of the tests (half an hour to an hour).
# make matrix runs them with other versions of Python and torch, make alone each file by itself.

# The pins of constraints.txt were made with Python 3.11, so it comes first; PYTHON=… overrides it.
FOUND := $(firstword $(foreach v,3.11 3.12 3.13,$(shell python$(v) -c '' 2>/dev/null && echo python$(v))))
PYTHON ?= $(or $(FOUND),$(error found none of python3.11, python3.12 and python3.13; name one: make PYTHON=/path/to/python3 …))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
NANOLM := $(BIN)/nanolm
DEMO := runs/demo
DEMO_DATA := runs/demo-data

# With it every worker, and every process that a test starts, compiles every source anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-mlm demo-t5 test quick check alone doors house matrix gpu chaos lint clean constraints

$(VENV)/base: setup.py constraints.txt
	@echo "$(VENV) gets $$($(PYTHON) --version) ($(PYTHON)); another one: make PYTHON=…"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[plot,finetune]'
	touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) -e '.[dev,plot,tensorboard,zstd]'
	touch $@

$(DEMO_DATA)/manifest.json: | $(VENV)/base
	$(NANOLM) prepare stdlib --out $(DEMO_DATA) --vocab_size 4096 --tokenizer_type bpe

demo: $(VENV)/base $(DEMO_DATA)/manifest.json
	rm -rf $(DEMO)
	$(BIN)/python train.py --config configs/pretrain/demo_clm.yaml
	$(NANOLM) evaluate --run $(DEMO)
	$(NANOLM) generate --run $(DEMO) --prompt def --count 2 --max_tokens 120
	$(NANOLM) plot $(DEMO)
	rm -rf $(DEMO)-finetune $(DEMO)-random
	$(NANOLM) finetune --config configs/finetune/demo_clm.yaml
	$(NANOLM) finetune --config configs/finetune/demo_clm.yaml --weights random --optim.lr 1e-3 --run.dir $(DEMO)-random
	$(NANOLM) evaluate $(DEMO)-random
	$(NANOLM) evaluate $(DEMO)-finetune
	$(NANOLM) compare $(DEMO)-finetune $(DEMO)-random

demo-mlm: $(VENV)/base $(DEMO_DATA)/manifest.json
	rm -rf runs/demo-mlm
	$(BIN)/python train.py --config configs/pretrain/demo_mlm.yaml
	$(NANOLM) evaluate --run runs/demo-mlm
	$(NANOLM) fill --run runs/demo-mlm --text 'def __init__(<mask>, name):'

demo-t5: $(VENV)/base $(DEMO_DATA)/manifest.json
	rm -rf runs/demo-t5
	$(BIN)/python train.py --config configs/pretrain/demo_t5.yaml
	$(NANOLM) evaluate --run runs/demo-t5
	$(NANOLM) generate --run runs/demo-t5 --prompt 'def __init__(<mask>, name):' --temperature 0 --max_tokens 24

# Side by side: mypy takes more than a minute, in which tests wait for processes and sockets.
test: $(VENV)/dev
	+$(MAKE) --no-print-directory -j 2 lint quick

quick: $(VENV)/dev
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist worksteal

check: $(VENV)/dev lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

alone: $(VENV)/dev
	$(BIN)/python -m tests.alone $(if $(SAMPLE),--sample $(SAMPLE))

doors: $(VENV)/dev $(DEMO_DATA)/manifest.json
	$(BIN)/python -m tests.doors $(DEMO_DATA)

house: $(VENV)/dev
	$(BIN)/python -m tests.house docs/house.svg

matrix: $(VENV)/dev
	$(BIN)/python -m tests.matrix

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

constraints: $(VENV)/dev
	{ echo "# What the tests ran with: 'make' installs exactly these. Regenerate with 'make constraints'."; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed -e 's/ @ .*torch-\([0-9.]*\).*/==\1/' -e 's/+cpu//'; } > constraints.txt

clean:
	rm -rf $(VENV) runs build *.egg-info

chaos: $(VENV)/dev
	$(BIN)/python -m tests.chaos

# First contact with a GPU (docs/gpu.md): by the Python that has torch there; nothing is installed.
SYSTEM_PYTHON ?= python3
OUT ?= runs/gpu

gpu:
	$(SYSTEM_PYTHON) -m nanolm.tools.first_contact --out $(OUT) $(if $(PART),--part $(PART)) \
	  $(if $(ONLY),--only $(ONLY)) $(if $(MINUTES),--minutes $(MINUTES)) \
	  $(if $(DEVICE),--device $(DEVICE)) $(if $(FRESH),--fresh)
