# What takes longer than .ci/run may: `make proof` makes two environments, runs everything and leaves dated reports under reports/.
# Single parts: make reference | torch | jax | cuda | ascend | mutants | kernels | benchmarks | documents | serve | vllm

PYTHON ?= python3
VENV := .venv-proof
RUN := . $(VENV)/bin/activate && export TORCH_DEVICE_BACKEND_AUTOLOAD=0 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 &&
CONFORMANCE := $(RUN) dsv4 conformance run --tier standard --jobs 2

.PHONY: proof fuzz reference torch jax cuda ascend mutants kernels benchmarks documents serve vllm
proof: fuzz reference torch jax cuda ascend mutants kernels benchmarks documents serve vllm

$(VENV):
	$(PYTHON) -m venv $(VENV)
	. $(VENV)/bin/activate && pip install -q torch==2.13.0 && pip install -q '.[dev,plots]' triton==3.9.0 transformers

fuzz: $(VENV)
	$(RUN) pytest -m proof tests/test_killed.py tests/fuzz
	$(RUN) python tests/fuzz/fuzz.py --inputs 100000 --seconds 1800

reference: $(VENV)
	$(CONFORMANCE) --backend reference --require 3 --report reports/conformance/reference
	$(CONFORMANCE) --backend reference --batch-invariant --require 4 --report reports/conformance/reference-batch-invariant
	$(RUN) pytest -m proof tests/conformance tests/test_dspark.py tests/test_spellings.py
	$(CONFORMANCE) --backend reference --numerics float32 --report reports/conformance/reference-float32

torch: $(VENV)
	$(CONFORMANCE) --backend torch --require 3 --report reports/conformance/torch
	$(CONFORMANCE) --backend torch --numerics float32 --require 3 --report reports/conformance/torch-float32
	$(CONFORMANCE) --backend torch --numerics float64 --require 3 --report reports/conformance/torch-float64
	$(CONFORMANCE) --backend torch --option few_tokens_by=torch --require 3 --report reports/conformance/torch-without-c
	$(RUN) pytest -m proof tests/torch_backend
	$(RUN) pytest -m "proof or not proof" tests/parallel

# compilation is nearly all that it takes
jax: export XLA_FLAGS = --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true
jax:
	$(PYTHON) -m venv $(VENV)/jax && $(VENV)/jax/bin/pip install -q '.[dev]' ./examples/jax_backend
	. $(VENV)/jax/bin/activate && pytest tests/conformance/test_jax_example.py && \
	dsv4 conformance run --backend jax --tier standard --jobs 2 --require 3 --report reports/conformance/jax

cuda: $(VENV)
	$(CONFORMANCE) --backend cuda --interpret --report reports/conformance/cuda-interpreted
	$(RUN) python tests/cuda/plant.py
	$(RUN) pytest -m "proof or not proof" tests/cuda/test_cuda_models.py
	for v in 3.4.0 3.6.0; do pip install -q --no-deps --target $(VENV)/triton-$$v triton==$$v && \
	$(RUN) DSV4_OLDEST_TRITON=$(VENV)/triton-$$v pytest -m proof tests/cuda/test_jit_path.py || exit 1; done
	$(RUN) pytest -m proof tests/cuda/test_prove.py tests/cuda/test_hopper.py

ascend: $(VENV)
	for chip in 910B 910C 950; do $(CONFORMANCE) --backend ascend --simulate $$chip --require 3 --report reports/conformance/ascend-$$chip-simulated || exit 1; done
	$(RUN) python backends/ascend/tools/plant.py --report reports/ascend/planted.json
	$(RUN) dsv4 ascend launches --before reports/ascend/launches.json --report reports/ascend/launches.new && mv reports/ascend/launches.new reports/ascend/launches.json
	for chip in 910B 910C 950; do $(RUN) dsv4 ascend selftest --simulate $$chip --report reports/ascend/selftest-$$chip.json || exit 1; done
	$(PYTHON) -m venv $(VENV)/triton-ascend && $(VENV)/triton-ascend/bin/pip install -q triton-ascend==3.2.0 ascendnpu-ir==1.2.0 pybind11 attrs psutil
	$(RUN) python backends/ascend/tools/compile_kernels.py list $(VENV)/launched.json
	$(VENV)/triton-ascend/bin/python backends/ascend/tools/compile_kernels.py build $(VENV)/launched.json --report reports/ascend/kernels.json
	$(RUN) python backends/ascend/tools/replay_kernels.py --python $(VENV)/triton-ascend/bin/python --report reports/ascend/replayed.json
	$(RUN) python backends/ascend/tools/plant_kernels.py --report reports/ascend/planted_kernels.json
	$(RUN) pytest -m proof tests/ascend

mutants: $(VENV)
	$(RUN) dsv4 conformance mutants --whole --out docs

kernels: $(VENV)
	$(RUN) dsv4 kernels build --report reports/cuda/kernels.json
	pip install -q --no-deps --target $(VENV)/triton-3.6.0 triton==3.6.0
	$(RUN) PYTHONPATH=$(VENV)/triton-3.6.0 dsv4 kernels build
	$(RUN) python -m dsv4_backend_cuda.document

benchmarks: $(VENV)
	. $(VENV)/bin/activate && unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE && export OMP_NUM_THREADS=2 && \
	for script in startup memory; do python benchmarks/$$script.py | tee reports/benchmarks/$$script.txt || exit 1; done && \
	for dtype in bfloat16 float32; do python benchmarks/vs_transformers.py --dtype $$dtype --ops || exit 1; done | tee reports/benchmarks/vs_transformers.txt

documents: $(VENV)
	$(RUN) python -m dsv4_core.checkpoint.spelling_page > docs/checkpoints.md
	$(RUN) python -m dsv4_conformance.report.op_pages > docs/ops.md
	$(RUN) dsv4 conformance matrix reports/conformance/* --out docs/matrix.md
	$(RUN) dsv4 conformance matrix reports/conformance/* --brief --into README.md
	$(RUN) python backends/ascend/tools/collect.py

serve: $(VENV)
	$(RUN) pip install -q '.[clients]'
	$(PYTHON) -m venv $(VENV)/aiperf && $(VENV)/aiperf/bin/pip install -q aiperf
	$(RUN) DSV4_AIPERF=$(CURDIR)/$(VENV)/aiperf/bin/aiperf DSV4_EXAMPLES=300 pytest -m "proof or not proof" tests/serve
	$(RUN) python tests/serve/soak.py --seconds 3600 --report reports/serve/soak.json
	$(RUN) python benchmarks/serving.py --report reports/serve/load.json
	$(RUN) python benchmarks/serving.py --tokens 128 --clients 1 16 --requests 48 --report reports/serve/load-128.json

vllm:
	integrations/vllm/environment.sh $(VENV)/vllm
	$(VENV)/vllm/bin/python integrations/vllm/prove.py --report reports/vllm.json
