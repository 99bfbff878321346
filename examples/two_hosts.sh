#!/bin/sh
# Train the small GPT on two hosts, two ranks on each: tp inside a host, dp between them.
#
#   first host:   examples/two_hosts.sh 10.0.0.1 0
#   second host:  examples/two_hosts.sh 10.0.0.1 1
#
# The address is the first host's, as the second one sees it; PORT is free on the first host. What joins is
# anybody who reaches that port and says the job's name: docs/security.md.
set -eu
host=${1:?expected the address of the first host}
node=${2:?expected 0 on the first host, 1 on the second}
shift 2
exec "${TORCHRUN:-torchrun}" --nnodes 2 --node-rank "$node" --nproc-per-node 2 \
  --master-addr "$host" --master-port "${PORT:-29500}" "$(dirname "$0")/train_gpt.py" "$@"
