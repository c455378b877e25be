# The human interface to the build. On a fresh Debian 12: `make demo` builds everything and generates from the bundled model,
# `make test` builds and passes all tests. Both install the packages they need first.

BUILD ?= build
JOBS ?= $(shell nproc)
PACKAGES = g++ cmake ninja-build pkg-config python3 nlohmann-json3-dev libpcre2-dev libcli11-dev libfmt-dev libgtest-dev
PROMPT ?= It was late in the evening when

.PHONY: demo test setup build sanitize cuda python format tidy clean

demo: build
	$(BUILD)/apps/dsv4 inspect models/demo
	$(BUILD)/apps/dsv4 generate -m models/demo -p "$(PROMPT)" -n 160 --seed 1

test: setup
	cmake -S . -B $(BUILD) -G Ninja -DDSV4_TESTS=ON
	cmake --build $(BUILD) -j $(JOBS)
	python3 scripts/check_layers.py
	ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS)

build: setup
	cmake -S . -B $(BUILD) -G Ninja
	cmake --build $(BUILD) -j $(JOBS) --target dsv4

# $(call install,PACKAGES): installs only what is missing, so that a machine that has everything needs neither root nor network.
define install
	@missing=""; for p in $(1); do \
	  [ "$$(dpkg-query -W -f='$${db:Status-Status}' $$p 2>/dev/null)" = installed ] || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then echo "installing:$$missing"; \
	  sudo=""; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	  $$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; fi
endef

setup:
	$(call install,$(PACKAGES))

# The parsers of untrusted input under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: setup
	cmake --preset sanitize
	cmake --build build-sanitize -j $(JOBS) --target sanitized_tests
	ctest --test-dir build-sanitize --output-on-failure --no-tests=error -j $(JOBS) -R '^(base|codec|tensor|checkpoint|text|quantize)_test'

# Compiles every kernel (sm_90a, sm_100a and sm_120a; the MoE layer is sm_90a only); runs only what tests/emulate runs on the CPU.
cuda: setup
	cmake --preset cuda
	cmake --build build-cuda -j $(JOBS) --target dsv4_kernels_sm90 dsv4_kernels_sm100 dsv4_kernels_any emulated_tests
	ctest --test-dir build-cuda --output-on-failure --no-tests=error -R '^dsv4_tests_emulate'

# The Python package and its tests in a virtual environment; nanobind and pytest come from PyPI.
python: setup
	$(call install,python3-venv python3-dev)
	python3 -m venv $(BUILD)/venv
	$(BUILD)/venv/bin/pip install -q '.[test]'
	$(BUILD)/venv/bin/python -m pytest -q tests/python

SOURCES = git ls-files -- '*.h' '*.cpp' '*.inl' '*.cu' '*.cuh'
format:
	$(call install,clang-format)
	$(SOURCES) | xargs clang-format -i

tidy: setup
	$(call install,clang-tidy)
	cmake --preset tidy
	cmake --build build-tidy -j $(JOBS)

clean:
	rm -rf build build-*
