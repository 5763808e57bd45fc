# `make help` lists what can be made. demo, test, bench, check and package install what they miss
# (packaging/need.sh), with root or sudo; there is nothing else to set up but Rust.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

export PATH := $(PATH):/usr/sbin:/sbin

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET)/release
# Tools of cargo's, built once and kept with the build: nothing is put into the user's ~/.cargo/bin.
TOOLS := $(TARGET)/tools
CARGO_DENY := 0.20.2
CARGO_DEB := 3.8.0
CARGO_GENERATE_RPM := 0.21.1
CARGO_FUZZ := 0.13.2

AS_ROOT := packaging/as-root.sh
SCRIPTS := .ci/run packaging/need.sh packaging/as-root.sh

# make run ARGS="--config my.toml"; make bench ARGS="--flows 100000 --runs 3";
# make test ARGS="--test integration capture::"; make fuzz FUZZ=config SECONDS=600
ARGS ?=
FUZZ ?= decode
SECONDS ?= 60

.PHONY: help
help: ## what can be made
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

.PHONY: demo
demo: ## a NAT gateway in a namespace: its flows live, and a table of what was seen
	@packaging/need.sh cc ip nft
	$(CARGO) build --release --locked --bin conntrail --example lab
	$(AS_ROOT) $(RELEASE)/examples/lab demo --agent $(RELEASE)/conntrail

.PHONY: run
run: ## the agent on this host, until Ctrl-C (ARGS="--config FILE")
	@packaging/need.sh cc
	$(CARGO) build --release --locked --bin conntrail
	$(AS_ROOT) $(RELEASE)/conntrail run $(ARGS)

# One test at a time: those that touch the kernel have namespaces of their own and agree by locks on the
# one setting that is the host's (tests/lab/limit.rs), but they measure what a kernel and two cores do in
# so many milliseconds, and two that failed side by side passed alone. The lab's own tests are part of the
# integration tests.
# Without root and sudo what needs them is skipped, and named; where all is required that is a failure.
TEST_PROGRAMS := cc conntrack fish ip man nft ping setpriv strace sysctl systemd-analyze unshare zsh
.PHONY: test
test: ## all tests, as root (ARGS="--test integration NAME" for some)
	@if ((EUID == 0)) || command -v sudo >/dev/null || [[ -n $${CONNTRAIL_REQUIRE_ALL-} ]]; then
	    packaging/need.sh $(TEST_PROGRAMS)
	    export RUST_TEST_THREADS=1 CONNTRAIL_REQUIRE_ALL=1 INSTA_WORKSPACE_ROOT=$(CURDIR)
	    set -x
	    $(CARGO) test --locked --no-fail-fast \
	        --config "target.'cfg(unix)'.runner = '$(CURDIR)/$(AS_ROOT)'" $(ARGS)
	else
	    echo 'Neither root nor sudo: what needs root is skipped.'
	    $(CARGO) test --locked --no-fail-fast $(ARGS)
	fi

.PHONY: bench
bench: ## CPU, memory and losses beside conntrack -E and ulogd2; then micro-benchmarks
	@packaging/need.sh cc conntrack ip nft ulogd
	$(CARGO) build --release --locked --bin conntrail --example lab
	$(AS_ROOT) $(RELEASE)/examples/lab bench --agent $(RELEASE)/conntrail $(ARGS)
	$(CARGO) bench --locked --bench hot_path

.PHONY: check
check: ## formatting, lints, licences and advisories, documentation, unit, scripts
	@packaging/need.sh cc shellcheck systemd-analyze
	set -x
	$(CARGO) fmt --version >/dev/null 2>&1 || rustup component add rustfmt
	$(CARGO) clippy --version >/dev/null 2>&1 || rustup component add clippy
	$(CARGO) fmt --check
	$(CARGO) fmt --check --manifest-path fuzz/Cargo.toml
	shellcheck $(SCRIPTS)
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --document-private-items
	$(MAKE) --no-print-directory deny unit

.PHONY: deny
deny: $(TOOLS)/bin/cargo-deny
	@set -x
	$< --locked check --hide-inclusion-graph bans licenses sources
	# The advisories are a repository elsewhere: not to reach it says nothing about this program.
	if timeout 120 $< --locked fetch db; then
	    $< --locked check --disable-fetch advisories
	else
	    echo 'NOT CHECKED: advisories, their database cannot be had here' >&2
	fi

# systemd-analyze wants the program to be there, and exits with 0 after most of its complaints.
.PHONY: unit
unit:
	@mkdir -p $(TARGET)
	sed 's,/usr/bin/conntrail,/bin/true,' packaging/conntrail.service >$(TARGET)/conntrail.service
	said=$$(systemd-analyze verify $(abspath $(TARGET))/conntrail.service 2>&1) || true
	[[ -z $$said ]] || { echo "$$said" >&2; exit 1; }

.PHONY: package
package: $(TOOLS)/bin/cargo-deb $(TOOLS)/bin/cargo-generate-rpm ## the .deb and the .rpm
	@packaging/need.sh cc dpkg-shlibdeps
	set -x
	$(CARGO) build --release --locked --bin conntrail
	rm -rf $(RELEASE)/assets
	mkdir -p $(RELEASE)/assets
	# 28 MB become 5: lines are for us, names are enough for a backtrace from afar.
	strip --strip-debug -o $(RELEASE)/assets/conntrail $(RELEASE)/conntrail
	$(RELEASE)/conntrail man --out $(RELEASE)/assets/man1
	for shell in bash zsh fish; do
	    $(RELEASE)/conntrail completions $$shell >$(RELEASE)/assets/conntrail.$$shell
	done
	$(TOOLS)/bin/cargo-deb --no-build --no-strip --locked
	$(TOOLS)/bin/cargo-generate-rpm --target-dir $(TARGET)
	ls -l $(TARGET)/debian/*.deb $(TARGET)/generate-rpm/*.rpm

.PHONY: fuzz
fuzz: $(TOOLS)/bin/cargo-fuzz ## random input for SECONDS=60 to FUZZ=decode or config; needs nightly Rust
	@set -x
	$(CARGO) run --quiet --manifest-path fuzz/Cargo.toml --bin seeds
	PATH=$(abspath $(TOOLS))/bin:$$PATH $(CARGO) +nightly fuzz run $(FUZZ) -- -max_total_time=$(SECONDS)

.PHONY: clean
clean: ## what was built
	$(CARGO) clean

# Optimised builds of these take several times longer, and they work for a second or two.
install = CARGO_TARGET_DIR=$(TOOLS)/build CARGO_PROFILE_DEV_DEBUG=0 \
    $(CARGO) install --locked --profile dev --root $(TOOLS) $(1) && rm -rf $(TOOLS)/build

# Asks for the version, so that another one takes its place.
.PHONY: FORCE
define tool
$(TOOLS)/bin/$(1): FORCE
	@[[ -x $$@ && -n $$$$($(TOOLS)/bin/$(1) --version 2>/dev/null | grep -F '$(2)') ]] || \
	    { packaging/need.sh cc; $$(call install,$(1)@$(2)); }
endef
$(eval $(call tool,cargo-deny,$(CARGO_DENY)))
$(eval $(call tool,cargo-deb,$(CARGO_DEB)))
$(eval $(call tool,cargo-generate-rpm,$(CARGO_GENERATE_RPM)))
$(eval $(call tool,cargo-fuzz,$(CARGO_FUZZ)))
