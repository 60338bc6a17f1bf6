"""Slurm on hosts of this machine: a controller and nodes, each with daemons, a disk and an address of its own.

Beside them are S3 and MLflow with accounts, as in a cluster of Ray. Needs namespaces, and Debian's packages slurm-wlm and
munge.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
from pathlib import Path

from infra.local import hosts, network, services
from infra.local.record import Host, Record, wait_until
from infra.local.trials import REPOSITORY
from vswin_dist.errors import PreflightError, WorkFailed
from vswin_dist.tracking.provenance import source_version

PROGRAMS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
SCRIPT = "infra/slurm/job.sbatch"
CONTROLLER_PORT = 6817
START_TIMEOUT_S = 120.0
NODE_TIMEOUT_S = 15  # of a silent node; Slurm's own is 300
CONFIGURATION = """\
ClusterName=vswin
SlurmctldHost={controller.name}({controller.address})
AuthType=auth/munge
AuthInfo=socket={disk}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={disk}/state
SlurmdSpoolDir={disk}/spool
SlurmctldPidFile={disk}/slurmctld.pid
SlurmdPidFile={disk}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={timeout}
"""
CGROUP = "CgroupPlugin=cgroup/v1\n"  # the other is looked for at start, and refuses a machine that has both
MUNGE = (
    "umask 022; mkdir -p {disk}/state {disk}/spool; munged --key-file={disk}/munge.key --socket={disk}/munge.socket "
    "--pid-file={disk}/munged.pid --log-file={disk}/munged.log --seed-file={disk}/munged.seed && exec {daemon} -D"
)
ENVIRONMENT = """\
export PATH={path} PYTHONPATH={repository} OMP_NUM_THREADS=1 LANG=C.UTF-8 MLFLOW_DISABLE_TELEMETRY=true
export HOME={disk}/home TMPDIR={disk}/tmp VSWIN_SOURCE_COMMIT={commit}
"""


def check() -> None:
    """Refuse to start where a program or a right is absent.

    Raises:
        PreflightError: names it, and the package that has it.
    """
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            raise PreflightError(f"there is no {program}: apt-get install {package}")
    if reason := network.why_not():
        raise PreflightError(f"Slurm's nodes need namespaces: {reason}")
    services.check()


def up(folder: Path, nodes: int) -> Record:
    """Start the services, a controller and `nodes` nodes; returns when Slurm calls all of them idle.

    Raises:
        WorkFailed: something did not come up; nothing is left.
    """
    record = hosts.make(folder)
    try:
        controller = hosts.add_host(record, "controller", 0)
        record.set_host(controller, ports={"dashboard": CONTROLLER_PORT})  # for which the nodes wait
        for number in range(1, nodes + 1):
            hosts.add_host(record, f"node{number}", 2)
        services.start(record)
        services.wait(record)
        files = host_files(record)
        for host in list(record.hosts.values()):
            start_host(record, host, files)
        if not wait_until(lambda: states(record) == {f"node{i}": "idle" for i in range(1, nodes + 1)}, START_TIMEOUT_S):
            raise WorkFailed(f"Slurm's nodes are {states(record)}; the controller's log:\n{record.log_end('controller')}")
    except BaseException:
        for name in record.processes:
            print(f"--- {name}.log ends:\n{record.log_end(name, 600)}")
        hosts.down(folder)
        raise
    return record


def host_files(record: Record) -> dict[str, str]:
    """Return what is written onto each host's disk: of Slurm, and what a user's jobs take from files."""
    own, made = hosts.disk(record, record.head), services.all_secrets(record)
    general = CONFIGURATION.format(controller=record.head, disk=own, timeout=NODE_TIMEOUT_S)
    nodes = [host for host in record.hosts.values() if host != record.head]
    lines = [f"NodeName={host.name} NodeAddr={host.address} CPUs={host.cpus} RealMemory=2000\n" for host in nodes]
    lines.append(f"PartitionName=main Nodes={','.join(host.name for host in nodes)} Default=YES MaxTime=INFINITE State=UP\n")
    account = {name: made[key] for name, key in (("USERNAME", "mlflow_user"), ("PASSWORD", "mlflow_password"))}
    keys = services.s3_environment(record, made) | {f"MLFLOW_TRACKING_{name}": value for name, value in account.items()}
    return {
        "slurm.conf": general + "".join(lines),
        "cgroup.conf": CGROUP,
        "munge.key": secrets.token_hex(64),
        "environment": ENVIRONMENT.format(
            path=services.programs(), repository=REPOSITORY, disk=own, commit=source_version(REPOSITORY)
        ),
        "credentials": "".join(f"{name}={value}\n" for name, value in keys.items()),
    }


def start_host(record: Record, host: Host, files: dict[str, str]) -> None:
    """Start a host with munge and a daemon of Slurm."""
    own = hosts.disk(record, host)
    daemon = "slurmctld" if host == record.head else "slurmd"
    program = ["bash", "-c", MUNGE.format(disk=own, daemon=daemon)]
    hosts.start_host(record, host, program, environment(record), files)


def environment(record: Record) -> dict[str, str]:
    """Return the environment of a daemon, and of a user's shell."""
    own = hosts.disk(record, record.head)
    return {
        "PATH": f"/usr/sbin:/sbin:{services.programs()}",
        "HOME": f"{own}/home",
        "LANG": "C.UTF-8",
        "SLURM_CONF": f"{own}/slurm.conf",
    }


def call(record: Record, *words: str, host: Host | None = None) -> str:
    """Run a command on the controller, or on another host; returns what it prints, "" where it fails."""
    try:
        enter = network.entered(record, host or record.head)
    except PreflightError:  # the host is down
        return ""
    done = subprocess.run([*enter, *words], capture_output=True, text=True, env=environment(record), cwd="/")
    return done.stdout if done.returncode == 0 else ""


def states(record: Record) -> dict[str, str]:
    """Return the state of each node, in Slurm's words."""
    lines = call(record, "sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
    return dict(line.split() for line in lines)
