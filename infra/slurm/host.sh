#!/bin/bash
# Run Ray on one node of an allocation, as job.sbatch tells: bash host.sh DASHBOARD_PORT CLIENT_PORT < TOKEN_AND_CREDENTIALS
#
# The first line of the input is the token, the rest the credentials: what is secret comes on no command line, in no
# environment that Slurm keeps, and needs no shared folder.
set -eo pipefail
umask 077
mkdir -p "$VSWIN_RUN"
chmod 700 "$VSWIN_RUN"
read -r token
printf '%s' "$token" >"$RAY_AUTH_TOKEN_PATH"
# shellcheck source=/dev/null
. "$VSWIN_ENV"
while IFS= read -r line || [ -n "$line" ]; do # no shell code: a value is taken as it stands
    case $line in '' | '#'*) ;; *) export "${line%%=*}=${line#*=}" ;; esac
done
export TMPDIR=$VSWIN_RUN

start() {
    rm -rf "$VSWIN_RUN/ray" # of an earlier start of this job
    ray start --block --disable-usage-stats --log-style=record --temp-dir="$VSWIN_RUN/ray" \
        --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${VSWIN_GPUS:-${SLURM_GPUS_ON_NODE:-0}}" \
        --object-store-memory="${VSWIN_OBJECT_STORE:-1000000000}" --labels="slurm-node=$SLURMD_NODENAME" \
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 "$@" </dev/null
}

if [ "$SLURMD_NODENAME" = "$VSWIN_HEAD" ]; then
    start --head --node-ip-address="${VSWIN_ADDRESS%:*}" --port="${VSWIN_ADDRESS#*:}" \
        --dashboard-host=127.0.0.1 --dashboard-port="$1" --ray-client-server-port="$2"
    exit
fi
while :; do # a node that was cut off, and so taken for dead, joins anew
    until (exec 3<>"/dev/tcp/${VSWIN_ADDRESS%:*}/${VSWIN_ADDRESS#*:}") 2>/dev/null; do sleep 1; done
    start --address="$VSWIN_ADDRESS" || echo "Ray ended on $SLURMD_NODENAME with $?; it is started again"
    sleep 2
done
