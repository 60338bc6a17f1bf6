# What every process of Ray on a host, and so every job, sees. Sourced by the commands of cluster.yaml.
export PATH="$HOME/venv/bin:$PATH"
export RAY_AUTH_MODE=token # of ~/.ray/auth_token, which host_secrets.py wrote
export RAY_USAGE_STATS_ENABLED=0
export RAY_JOB_STOP_WAIT_TIME_S=135 # longer than training.grace_s
export VSWIN_CACHE="$HOME/cache"
if [ -z "${RAY_HEAD_IP:-}" ]; then # set on workers alone
    RAY_HEAD_IP="$(hostname --all-ip-addresses | cut --delimiter=' ' --fields=1)"
fi
export MLFLOW_TRACKING_URI="http://$RAY_HEAD_IP:5000"
export MLFLOW_DISABLE_TELEMETRY=true
export NCCL_SOCKET_IFNAME=en # for the meeting of the ranks
export NCCL_DEBUG=WARN
if compgen -G "/sys/class/infiniband/*" > /dev/null; then # EFA: one variable, so that the loader's processes can fork
    export FI_EFA_USE_HUGE_PAGE=0
fi
. "$HOME/.vswin-account"
ulimit -n 65536 2> /dev/null || ulimit -n "$(ulimit -H -n)"
