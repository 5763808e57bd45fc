#!/usr/bin/env bash
# Installs the Debian packages of the programs named, those only that are missing: a call that finds
# everything asks neither the network nor for a password.
#
#   packaging/need.sh nft conntrack
set -euo pipefail

# Debian keeps some of these where only root looks.
PATH=$PATH:/usr/sbin:/sbin

declare -A package=(
    [cc]=gcc
    [conntrack]=conntrack
    [dpkg-shlibdeps]=dpkg-dev
    [fish]=fish
    [ip]=iproute2
    [make]=make
    [man]=man-db
    [nft]=nftables
    [ping]=iputils-ping
    [setpriv]=util-linux
    [shellcheck]=shellcheck
    [strace]=strace
    [systemd-analyze]=systemd
    [sysctl]=procps
    [ulogd]="ulogd2 ulogd2-json"
    [unshare]=util-linux
    [zsh]=zsh
)

fail() {
    echo "need.sh: $*" >&2
    exit 1
}

missing=()
programs=()
for program in "$@"; do
    [[ -n ${package[$program]-} ]] || fail "no package is known for $program: add it to the list"
    if [[ $program == ulogd ]]; then
        # The program is of no use without its JSON output, which is a package of its own.
        dpkg-query --show --showformat='${db:Status-Status}\n' ulogd2-json 2>/dev/null |
            grep --quiet --line-regexp installed && continue
    else
        command -v "$program" >/dev/null && continue
    fi
    programs+=("$program")
    # One program may be in several packages.
    read -ra names <<<"${package[$program]}"
    missing+=("${names[@]}")
done
((${#missing[@]})) || exit 0

# A C compiler without the C library's headers compiles nothing.
[[ " ${missing[*]} " == *" gcc "* ]] && missing+=(libc6-dev)

command -v apt-get >/dev/null ||
    fail "not Debian: install what has ${programs[*]}, in Debian ${missing[*]}"
as_root=()
if ((EUID != 0)); then
    command -v sudo >/dev/null || fail "as root: apt-get install ${missing[*]}"
    as_root=(sudo)
fi

echo "installing ${missing[*]}"
# ulogd2's package starts a service that would read all of this host's events; it is only wanted as a
# program. policy-rc.d is how Debian is told to start nothing.
policy=/usr/sbin/policy-rc.d
hold=
if [[ " ${missing[*]} " == *" ulogd2 "* && ! -e $policy ]]; then
    hold=yes
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    trap '"${as_root[@]}" rm -f "$policy"' EXIT
    "${as_root[@]}" chmod 755 "$policy"
fi
install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive
    apt-get install --yes --quiet --no-install-recommends "${missing[@]}")
# The lists of a fresh machine are empty, and those of an old one name files that are gone.
if ! "${install[@]}"; then
    "${as_root[@]}" apt-get update --quiet
    "${install[@]}"
fi
if [[ -n $hold ]] && command -v systemctl >/dev/null; then
    # Nor at the next start of this machine.
    "${as_root[@]}" systemctl disable ulogd2.service
fi
