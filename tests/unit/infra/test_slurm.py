"""The scripts of infra/slurm: their times, options and secrets agree, and they act as told at signals and failures.

Slurm's programs are stood in for by ten lines of shell, since a CI machine has none; `make slurm-demo` runs the real ones.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.local import slurm_demo
from tests.support.commands import ROOT, program, refused
from vswin_dist.config import load_settings
from vswin_dist.errors import WorkFailed

FOLDER = ROOT / "infra/slurm"
SCRIPT = FOLDER / "job.sbatch"
SCRIPTS = (SCRIPT, FOLDER / "host.sh")
END_S = 20  # for Ray's end and the requeue, which free the hosts
USERS = {"HOME", "PATH", "MLFLOW_TRACKING_URI", "VSWIN_HOME", "VSWIN_CACHE"}  # that the jobs read, or a shell needs


def directives(text: str) -> dict[str, str]:
    """The options of `#SBATCH` lines; what follows the first command is none."""
    head = re.split(r"^[^#\n]", text, maxsplit=1, flags=re.MULTILINE)[0]
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", head, re.MULTILINE))


def readme_commands() -> list[list[str]]:
    """The words of each submission in the README."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", (FOLDER / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "sbatch"]


def job_of(words: list[str]) -> list[str]:
    """What a submission runs."""
    return words[words.index("infra/slurm/job.sbatch") + 1 :]


def wrong_times(text: str, grace_s: float) -> Iterator[str]:
    """A signal that does not leave a training its time, or that does not come to the script alone."""
    found = re.fullmatch(r"B:USR1@(\d+)", directives(text).get("signal", ""))
    if not found:
        yield "the script alone is to be told of the time limit"
    elif int(found[1]) < grace_s + END_S:
        yield f"the signal comes {found[1]} s before the limit, and the training has {grace_s:g} s"


def wrong_export(texts: list[str]) -> Iterator[str]:
    """Variables of users that do not come to the job, and those that come and are read by nothing."""
    exported = set(directives(texts[0])["export"].split(","))
    read = {name for text in texts for name in re.findall(r"\$\{(VSWIN_\w+):-", text)}
    yield from (f"{name} does not come to the job" for name in read | USERS if name not in exported)
    yield from (f"nothing reads {name}" for name in exported - read - USERS)


def wrong_ray_options(text: str) -> Iterator[str]:
    """Options that `ray start` does not have."""
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    code = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    yield from (f"ray start has no option {o}" for o in re.findall(r"(?<=\s)--[a-z-]+", code) if o not in known)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_the_shell_takes_the_scripts(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (Debian's shellcheck)")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_checkpoint_fits_before_the_time_limit_and_the_job_comes_back() -> None:
    text = SCRIPT.read_text()
    given = directives(text)
    assert "requeue" in given and given["open-mode"] == "append", "the log of a requeued job goes on"
    trainings = [words for words in map(job_of, readme_commands()) if words[1] == "jobs/train.py"]
    assert trainings
    for words in trainings:
        parser, arguments = program(words[1:])
        parsed = parser.parse_args(arguments)
        grace_s = load_settings(parsed.recipe, parsed.settings).training.grace_s
        assert list(wrong_times(text, grace_s)) == []
    for planted in ("B:USR1@130", "USR1@180", "B:TERM@180"):
        assert len(list(wrong_times(text.replace("B:USR1@180", planted), 120))) == 1


def test_commands_and_options_are_those_of_the_programs() -> None:
    assert list(wrong_ray_options(SCRIPTS[1].read_text())) == []
    assert len(list(wrong_ray_options(SCRIPTS[1].read_text().replace("--num-cpus", "--num-cpu")))) == 1
    texts = [script.read_text() for script in SCRIPTS]
    assert list(wrong_export(texts)) == []
    assert sorted(wrong_export([texts[0].replace(",VSWIN_GPUS,", ",VSWIN_GPU,"), texts[1]])) == [
        "VSWIN_GPUS does not come to the job",
        "nothing reads VSWIN_GPU",
    ]
    for words in readme_commands():
        assert list(refused(job_of(words))) == []
    assert list(refused(list(slurm_demo.TRAIN))) == []
    (waiting,) = re.findall(r"attend (python .*)$", texts[0], re.MULTILINE)
    shown = waiting.replace('"${nodes[@]}"', "a b").replace('"$1"', "3").replace('"$hosts"', "7")
    assert list(refused(shlex.split(shown))) == []


def test_slurm_takes_the_options(tmp_path: Path) -> None:
    if not shutil.which("sbatch"):
        pytest.skip("sbatch is not installed (Debian's slurm-client)")
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=localhost\n")
    env = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}

    def refuses(options: list[str]) -> bool:
        return subprocess.run(["sbatch", *options, "--help"], env=env, capture_output=True).returncode != 0

    own = [f"--{name}={value}".removesuffix("=") for name, value in directives(SCRIPT.read_text()).items()]
    assert len(own) > 5 and not refuses(own)
    for words in readme_commands():
        assert not refuses(words[1 : words.index("infra/slurm/job.sbatch")])
    for planted in ("--nodez=2", "--signal=B:USR9@180"):
        assert refuses([planted])


def test_the_readme_lists_all_variables_that_come_to_the_job() -> None:
    exported = set(directives(SCRIPT.read_text())["export"].split(","))
    rows = re.findall(r"^\| `(\w+)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert set(rows) == exported - {"HOME", "PATH"}


# --- the script at work, among stand-ins --------------------------------------------------------------------------

STANDINS = {
    "srun": """
        echo "srun $*" >>"$CALLS"
        case "$*" in *" rm "*) exit;; esac
        echo $$ >"$SPOOL/srun"
        cat >"$SPOOL/coming"
        mv "$SPOOL/coming" "$SPOOL/input"
        exec sleep 60""",
    "scancel": 'echo "scancel $*" >>"$CALLS"; kill -KILL "$(cat "$SPOOL/srun")"',
    "scontrol": 'echo "scontrol $*" >>"$CALLS"; [ "$1" != show ] || printf "%s\\n" node1 node2',
    "getent": "echo 10.77.1.1 STREAM node1",
    "python": """
        echo "python $*" | head -1 >>"$CALLS"
        [ "$1" = infra/slurm/wait_for_nodes.py ] || exec "$REAL" "$@"
        until [ -f "$SPOOL/input" ]; do sleep 0.05; done
        echo . >>"$SPOOL/waited"
        set -- $WAITS
        shift "$(($(wc -l <"$SPOOL/waited") - 1))"
        exit "$1" """,
}
DRIVER = """
import os, signal, sys, time
def stop(*_):
    print("a checkpoint", flush=True); sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("driver", os.environ["RAY_ADDRESS"].split(":")[0], os.environ["MARKED"], flush=True)
time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))
"""


@dataclass
class Allocation:
    """A folder with stand-ins, in which the script runs as on the first node."""

    folder: Path
    credentials: str = "MARKED=the-secret\n"

    def start(self, *job: str, waits: str = "0 0", mode: int = 0o600) -> subprocess.Popen[str]:
        """Start the script with a job; `waits`: the exit codes of wait_for_nodes.py."""
        (self.folder / "bin").mkdir()
        for name, text in STANDINS.items():
            (self.folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
            (self.folder / "bin" / name).chmod(0o755)
        (self.folder / "environment").write_text(f"PATH={self.folder}/bin:$PATH\n")
        (self.folder / "credentials").write_text(self.credentials)
        (self.folder / "credentials").chmod(mode)
        (self.folder / "driver.py").write_text(DRIVER)
        own = {
            "SPOOL": "",
            "CALLS": "/calls",
            "VSWIN_ENV": "/environment",
            "VSWIN_CREDENTIALS": "/credentials",
            "VSWIN_TMP": "",
        }
        env = {"PATH": os.environ["PATH"], "REAL": sys.executable, "WAITS": waits, "SLURM_SUBMIT_DIR": str(ROOT)}
        env |= {name: f"{self.folder}{place}" for name, place in own.items()}
        env |= {"SLURMD_NODENAME": "node1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
        return subprocess.Popen(["bash", SCRIPT, *job], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def driver(self, seconds: float, code: int = 0) -> list[str]:
        """The command of a job."""
        return ["python", str(self.folder / "driver.py"), str(seconds), str(code)]

    def calls(self) -> list[str]:
        """What was called, in order."""
        return (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    return Allocation(tmp_path)


def told(script: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """The exit code and the output of the script, which gets a signal once its job runs."""
    assert script.stdout
    shown = ""
    for line in script.stdout:
        shown += line
        if line.startswith("driver"):
            script.send_signal(number)
    return script.wait(30), shown


def test_a_job_that_is_done_frees_its_hosts(allocation: Allocation) -> None:
    script = allocation.start(*allocation.driver(0))
    output, _ = script.communicate(timeout=30)
    assert script.returncode == 0, output
    assert "driver 10.77.1.1 the-secret" in output
    calls = allocation.calls()
    assert "scancel --quiet --signal=KILL 7.0" in calls and not [c for c in calls if "requeue" in c]
    assert calls[-1].startswith("srun --overlap") and calls[-1].endswith(f"rm -rf {allocation.folder}/vswin-7")
    token, secret = (allocation.folder / "input").read_text().splitlines()
    assert re.fullmatch("[0-9a-f]{64}", token) and secret == "MARKED=the-secret"
    assert not [c for c in calls if token in c or "the-secret" in c], "what is secret is on no command line"


def test_a_job_that_fails_is_not_requeued(allocation: Allocation) -> None:
    script = allocation.start(*allocation.driver(0, 1))
    script.communicate(timeout=30)
    assert script.returncode == 1 and not [c for c in allocation.calls() if "requeue" in c]


def test_a_job_that_fails_for_a_dead_node_is_requeued(allocation: Allocation) -> None:
    """It may fail minutes before Slurm sees that the node is dead."""
    script = allocation.start(*allocation.driver(0, 1), waits="0 1")
    script.communicate(timeout=30)
    assert allocation.calls()[-1] == "scontrol requeue 7"


def test_before_the_time_limit_a_job_stops_in_order_and_is_requeued(allocation: Allocation) -> None:
    code, output = told(allocation.start(*allocation.driver(60)), signal.SIGUSR1)
    assert code == 130 and "a checkpoint" in output
    calls = allocation.calls()
    assert calls[-1] == "scontrol requeue 7" and "scancel --quiet --signal=KILL 7.0" in calls[:-1]


def test_a_job_that_is_told_to_end_is_not_requeued(allocation: Allocation) -> None:
    code, output = told(allocation.start(*allocation.driver(60)), signal.SIGTERM)
    assert code == 130 and "a checkpoint" in output
    assert not [c for c in allocation.calls() if "requeue" in c]


def test_nodes_that_do_not_join_end_the_job(allocation: Allocation) -> None:
    script = allocation.start(*allocation.driver(60), waits="1")
    output, _ = script.communicate(timeout=30)
    assert script.returncode == 1 and "driver" not in output.splitlines()
    assert not [c for c in allocation.calls() if "requeue" in c]


@pytest.mark.parametrize(
    "mode, job, error", [(0o644, ["python"], "chmod 600"), (0o640, ["python"], "chmod 600"), (0o600, [], "no job is given")]
)
def test_what_cannot_be_is_refused_in_a_line(allocation: Allocation, mode: int, job: list[str], error: str) -> None:
    script = allocation.start(*job, mode=mode)
    output, _ = script.communicate(timeout=30)
    assert script.returncode == 2 and error in output and len(output.splitlines()) == 1
    assert not allocation.calls(), "nothing is started"


VALUES = {"MARKED": "p$HOME`id`&b;c #d", "SPACED": ' two  words\\ "quoted" \'s ', "EQUAL": "a=b=", "EMPTY": "", "LAST": "#x"}
CREDENTIALS = "# MLflow's account\n\n" + "\n".join(f"{name}={value}" for name, value in VALUES.items())  # no newline ends it


def test_credentials_come_to_the_driver_as_they_stand(allocation: Allocation) -> None:
    allocation.credentials = CREDENTIALS
    show = f"import os, json; print(json.dumps({{name: os.environ[name] for name in {list(VALUES)}}}))"
    script = allocation.start("python", "-c", show)
    output, _ = script.communicate(timeout=30)
    assert script.returncode == 0, output
    ended = re.escape(f"{SCRIPT}: line ") + r"\d+: +\d+ (Done|Killed) [^\n]*\n[^\n]*srun [^\n]*\n( .*\n)*"  # bash says so
    said = re.sub(ended, "", output)
    lines = [line for line in said.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert [json.loads(line) for line in lines] == [VALUES], "no value was run, and none is in the log otherwise"
    assert (allocation.folder / "input").read_text().split("\n", 1)[1] == CREDENTIALS


def test_credentials_come_to_ray_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "environment").write_text(f"PATH={tmp_path}:$PATH\n")
    show = f"import os, json; print(json.dumps({{name: os.environ[name] for name in {list(VALUES)}}}))"
    (tmp_path / "ray").write_text(f"#!{sys.executable}\n{show}\n")
    (tmp_path / "ray").chmod(0o755)
    own = {"VSWIN_RUN": "run", "RAY_AUTH_TOKEN_PATH": "token", "VSWIN_ENV": "environment"}
    env = {name: f"{tmp_path}/{place}" for name, place in own.items()}
    env |= {"SLURMD_NODENAME": "node1", "VSWIN_HEAD": "node1", "VSWIN_ADDRESS": "10.77.1.1:1", "SLURM_CPUS_ON_NODE": "2"}
    command = ["bash", str(SCRIPTS[1]), "2", "3"]
    done = subprocess.run(
        command, input=f"a-token\n{CREDENTIALS}", env={"PATH": os.environ["PATH"], **env}, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert json.loads(done.stdout) == VALUES and (tmp_path / "token").read_text() == "a-token"


@pytest.mark.parametrize("line", ["export MARKED=the-secret", "the-secret", "A B=the-secret", "=the-secret"])
def test_a_line_that_is_no_credential_is_refused_by_its_number(allocation: Allocation, line: str) -> None:
    allocation.credentials = f"A=1\n{line}\n"
    script = allocation.start(*allocation.driver(0))
    output, _ = script.communicate(timeout=30)
    assert script.returncode == 2 and "line 2 is not NAME=value" in output and len(output.splitlines()) == 1
    assert "the-secret" not in output and not allocation.calls()


@pytest.mark.slow
def test_nodes_that_are_absent_are_named() -> None:
    command = [sys.executable, str(FOLDER / "wait_for_nodes.py"), "--address", "127.0.0.1:1", "node1", "node2"]
    ended = subprocess.Popen(["true"])
    ended.wait()
    for within, process, why in (("0.5", os.getpid(), "within 0.5 s"), ("60", ended.pid, "before srun")):
        done = subprocess.run(
            [*command, "--within", within, "--process", str(process)], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 1 and f"0 of 2 nodes joined Ray {why}" in done.stderr
        assert done.stderr.endswith("absent: node1, node2\n")


# --- what the trial says ------------------------------------------------------------------------------------------


def test_how_a_job_went_on_is_said_and_one_that_did_not_is_refused() -> None:
    job = slurm_demo.Submitted("7")
    job.lines = [
        (5.0, "step 10/120"),
        (20.0, "17:00:00 told to stop: later"),
        (170.0, "resumed from s3://r/1/step-00000015"),
    ]
    job.lines += [(175.0, "step 20/120")]
    job.states = [(0.0, "PENDING"), (1.0, "RUNNING")]
    with pytest.raises(WorkFailed, match="was not requeued"):
        slurm_demo.went_on(job, "told to stop")
    job.states += [(25.0, "PENDING"), (145.0, "RUNNING"), (200.0, "COMPLETED")]
    said = ["requeued 5 s and started 125 s after", "resumed from step 15", "training 155 s after"]
    assert slurm_demo.went_on(job, "told to stop") == said
    with pytest.raises(WorkFailed, match="were not free"):
        slurm_demo.freed(job)
