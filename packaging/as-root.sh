#!/usr/bin/env bash
# Runs a program as root. cargo builds as the user, so that no file in the target directory is root's,
# and this runs what was built: Makefile makes it cargo's runner.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
((EUID != 0)) || exec "$@"
keep=("PATH=$PATH")
# sudo drops the environment, and may be told never to keep it: what tests look at is named here.
for name in CONNTRAIL_REQUIRE_ALL CARGO_MANIFEST_DIR CI INSTA_WORKSPACE_ROOT PROPTEST_CASES \
    RUST_BACKTRACE RUST_TEST_THREADS TMPDIR; do
    [[ -z ${!name-} ]] || keep+=("$name=${!name}")
done
exec sudo env "${keep[@]}" "$@"
