#!/usr/bin/env bash
# A real S3 gateway on loopback: one Ceph monitor, one OSD that keeps its objects in memory, one RADOS gateway.
#
# usage: ceph.sh FOLDER PORT    FOLDER is empty or absent; PORT is the gateway's, the two above it the monitor's
#
# It stays in the foreground, and its daemons die with it, however it ends. FOLDER/ready appears when the user
# AKIDTEST / SECRETTEST can be used (about 15 s); FOLDER/pids/{mon,osd,rgw} hold the daemons' ids, FOLDER/log their words.
# Needs Debian's ceph-mon, ceph-osd, radosgw and ceph-common.
set -euo pipefail
folder=$(realpath -m "$1") port=$2
mkdir -p "$folder"/{mon,osd,rgw,run,log,pids}
export CEPH_CONF=$folder/ceph.conf
fsid=$(cat /proc/sys/kernel/random/uuid)
# cephx stays on: without it a gateway never gets its keys. One copy of everything, on one OSD.
cat > "$CEPH_CONF" <<END
[global]
fsid = $fsid
mon_host = [v2:127.0.0.1:$((port + 1))/0,v1:127.0.0.1:$((port + 2))/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
keyring = $folder/keyring
run_dir = $folder/run
admin_socket = $folder/run/\$name.asok
log_file = $folder/log/\$name.log
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_data_avail_warn = 1
mon_data_avail_crit = 0
[mon.a]
mon_data = $folder/mon
[osd.0]
osd_data = $folder/osd
osd_objectstore = memstore
memstore_device_bytes = 4294967296
[client.rgw]
rgw_data = $folder/rgw
rgw_frontends = beast endpoint=127.0.0.1:$port tcp_nodelay=1
rgw_enable_apis = s3
END

start() { # NAME COMMAND...: a child that the kernel kills when this script ends
  local name=$1
  shift
  setpriv --pdeathsig KILL "$@" >> "$folder/log/$name.out" 2>&1 &
  echo $! > "$folder/pids/$name"
}

wait_for() { # COMMAND...: until it succeeds, 30 s
  for _ in $(seq 300); do
    if "$@" > /dev/null 2>&1; then return; fi
    sleep 0.1
  done
  echo "gave up on: $*" >&2
  tail -n 20 "$folder"/log/*.out >&2
  exit 1
}

osd_is_up() { ceph osd stat | grep -q ' 1 up'; }
gateway_listens() { (: < "/dev/tcp/127.0.0.1/$port"); }

key() { ceph-authtool "$folder/keyring" --gen-key "$@" > /dev/null; }
ceph-authtool --create-keyring "$folder/keyring" > /dev/null
key -n mon. --cap mon 'allow *'
key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
key -n client.rgw --cap mon 'allow *' --cap osd 'allow *'
key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
addresses="[v2:127.0.0.1:$((port + 1)),v1:127.0.0.1:$((port + 2))]"
monmaptool --create --fsid "$fsid" --addv a "$addresses" "$folder/monmap" > /dev/null
ceph-mon -i a --mkfs --monmap "$folder/monmap" --keyring "$folder/keyring"
start mon ceph-mon -f -i a

osd=$(cat /proc/sys/kernel/random/uuid)
ceph-osd -i 0 --mkfs --osd-uuid "$osd" --monmap "$folder/monmap" > "$folder/log/mkfs.out" 2>&1
ceph osd new "$osd" > /dev/null
ceph osd crush add osd.0 1.0 host=local root=default > /dev/null 2>&1
start osd ceph-osd -f -i 0
wait_for osd_is_up
start rgw radosgw -f -n client.rgw
wait_for gateway_listens
radosgw-admin user create --uid test --display-name test --access-key AKIDTEST --secret SECRETTEST > /dev/null 2>&1
touch "$folder/ready"
wait -n # the first daemon to end takes the others along
