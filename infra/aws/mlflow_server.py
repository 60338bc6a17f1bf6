"""Keep MLflow's server running on the head: its runs in PostgreSQL, its artifacts in S3, both of which outlive the cluster.

Its secrets come from Secrets Manager by the head's role, and are on no command line. What ends is started again.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import boto3
import psycopg
from psycopg import sql

from infra.aws.host_secrets import write
from infra.kubernetes.make_secrets import auth_ini

PORT = 5000
ACCOUNTS = ".mlflow-accounts.ini"
RETRY_S = 5.0
Secret = dict[str, str]  # username and password


def make_databases(place: str, owner: Secret) -> None:
    """Make MLflow's databases where they are not there yet, once PostgreSQL answers at HOST:PORT."""
    while True:
        try:
            connection = psycopg.connect(f"{server(place, owner)}/postgres", autocommit=True)
            break
        except psycopg.OperationalError as error:
            print(f"{place}: {error}", flush=True)
            time.sleep(RETRY_S)
    with connection:
        there = {name for (name,) in connection.execute("SELECT datname FROM pg_database").fetchall()}
        for name in sorted({"mlflow", "mlflow_auth"} - there):
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))


def server(place: str, owner: Secret) -> str:
    """Return the URL of the database server; its secrets are letters and digits."""
    return f"postgresql://{owner['username']}:{owner['password']}@{place}"


def environment(place: str, owner: Secret, admin: Secret) -> dict[str, str]:
    """Write the file of accounts; return the environment of the server, which reads it."""
    accounts = Path.home() / ACCOUNTS
    write(accounts, auth_ini(server(place, owner), admin["password"]))
    own = os.environ["MLFLOW_TRACKING_URI"].removeprefix("http://")
    return {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": f"{server(place, owner)}/mlflow",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(32),
        "MLFLOW_AUTH_CONFIG_PATH": str(accounts),
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"{own},localhost:{PORT},127.0.0.1:{PORT}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def command(artifacts: str) -> list[str]:
    """Return the command of the server; who reaches its port is for the security group to say."""
    options = ["--app-name=basic-auth", "--host=0.0.0.0", f"--port={PORT}", "--workers=1"]
    return [sys.executable, "-m", "mlflow", "server", *options, f"--artifacts-destination={artifacts}"]


def make_account(process: subprocess.Popen[bytes], admin: Secret, account: Secret) -> None:
    """Make the account of the jobs as soon as the server answers; one that is there stays."""
    key = base64.b64encode(f"{admin['username']}:{admin['password']}".encode()).decode()
    headers = {"Authorization": f"Basic {key}", "Content-Type": "application/json"}
    url = f"http://127.0.0.1:{PORT}/api/2.0/mlflow/users/create"
    request = urllib.request.Request(url, json.dumps(account).encode(), headers)  # http, of this host
    while process.poll() is None:
        try:
            urllib.request.urlopen(request, timeout=30).close()  # noqa: S310
            return
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
            if "RESOURCE_ALREADY_EXISTS" in answer:
                return
            print(f"the account {account['username']} was refused: {error.code} {answer}", flush=True)
        except OSError:  # it does not listen yet
            pass
        time.sleep(RETRY_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--region", required=True)
    parser.add_argument("--database", required=True, metavar="HOST:PORT", help="of PostgreSQL")
    parser.add_argument("--artifacts", required=True, metavar="URL", help="where they are kept")
    for name, what in {"owner": "role of the database", "admin": "administrator", "account": "account of the jobs"}.items():
        parser.add_argument(f"--{name}", required=True, metavar="ARN", help=f"of the secret of the {what}")
    args = parser.parse_args()
    os.environ.setdefault("PGSSLMODE", "require")
    client = boto3.client("secretsmanager", args.region)
    owner, admin, account = (
        json.loads(client.get_secret_value(SecretId=name)["SecretString"]) for name in (args.owner, args.admin, args.account)
    )
    make_databases(args.database, owner)
    env = environment(args.database, owner, admin)
    while True:
        process = subprocess.Popen(command(args.artifacts), env=env)
        make_account(process, admin, account)
        print(f"MLflow ended with {process.wait()}", flush=True)
        time.sleep(RETRY_S)


if __name__ == "__main__":
    sys.exit(main())
