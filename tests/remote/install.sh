#!/usr/bin/env bash
# Installs the servers that `make test-remote` runs, from Debian or Ubuntu packages, unless they are there already.
set -euo pipefail
declare -A package=([redis-server]=redis-server [redis-cli]=redis-tools [openssl]=openssl
  [ceph-mon]=ceph-mon [ceph-osd]=ceph-osd [radosgw]=radosgw [ceph]=ceph-common)
missing=()
for program in "${!package[@]}"; do
  PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
ldconfig -p | grep -q libibverbs.so.1 || missing+=(libibverbs1) # Mooncake's library is linked with it
if ((${#missing[@]})); then
  command -v apt-get >/dev/null || { echo "install by hand: ${missing[*]}" >&2; exit 1; }
  as_root=(); ((EUID == 0)) || as_root=(sudo)
  policy=/usr/sbin/policy-rc.d # while it says 101, installing a server does not start one of the system's own
  if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod +x "$policy"
    trap '"${as_root[@]}" rm -f "$policy"' EXIT
  fi
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
