# Every target works on a fresh machine with Python >= 3.10, git and make: the virtual environment is made on the way.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Two files at a time, in the order of their names, which puts the long ones, of jobs, first. Threads that wait do not spin: two
# processes share the cores, and what one spins away the other lacks.
SIDE_BY_SIDE := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
COMPILED := .venv/kernels-check.txt
INTERPRETED := .venv/kernels-interpreted.txt

.PHONY: sample test side-by-side compiled interpreted lint bench bench-compare tradeoff quality crash clean

sample: $(INSTALLED)  ## The main job: guided samples of the shipped model, rows = classes, columns = scales.
	$(BIN)/fastcfg sample --labels balanced --scale 1,1.5,2,3,5,8 --batch 10 --out samples.png

test: $(INSTALLED)  ## Every test: the package's, the kernels' under the interpreter in processes of their own, their compilation.
	$(MAKE) --jobs 3 side-by-side compiled interpreted
	cat $(COMPILED) $(INTERPRETED)
	$(BIN)/python -m pytest --ignore tests/kernels -m alone

side-by-side: $(INSTALLED)
	$(SIDE_BY_SIDE) --ignore tests/kernels -m "not alone"

# Both in what the tests, many of which wait, leave of the cores
compiled: $(INSTALLED)
	nice -n 19 $(BIN)/fastcfg kernels check > $(COMPILED) || { cat $(COMPILED); exit 1; }

interpreted: $(INSTALLED)
	TRITON_INTERPRET=1 nice -n 19 env $(SIDE_BY_SIDE) tests/kernels > $(INTERPRETED) || { cat $(INTERPRETED); exit 1; }

lint: $(INSTALLED)  ## Formatting, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## This CPU: fastcfg beside diffusers and OpenVINO (12 minutes on two idle cores), then each piece.
	$(BIN)/python benchmarks/cpu_session.py
	$(BIN)/python -m pytest benchmarks --benchmark-only

bench-compare: $(INSTALLED)  ## make bench-compare BASE=<revision>: the pieces' speed there and here.
	$(BIN)/python benchmarks/compare.py $(BASE)

tradeoff: $(INSTALLED)  ## The study of docs/tradeoff.md, reduced: 500 samples a point, two scales; into runs/tradeoff.
	$(BIN)/python benchmarks/tradeoff_study.py /usr/share/datasets/fashion-mnist --out runs/tradeoff --samples 500 --reduced --engine openvino --workers 2

quality: $(INSTALLED)  ## The quality table of the README: 2,000 samples a scale of the shipped model (about 20 minutes on two cores).
	$(BIN)/python benchmarks/quality.py /usr/share/datasets/fashion-mnist

crash: $(INSTALLED)  ## The crash test at length: 50 runs of a job killed, for each runner (about 15 minutes on two cores).
	$(BIN)/python tests/jobs/crashing.py --kills 50

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
