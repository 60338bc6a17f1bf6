"""Print the secrets that the manifests name, with random values, for `kubectl apply -f -`.

They are made once: passwords that change later have to be changed in the database, too. Ray's tokens are made by the
operator, one for each cluster.
"""

import argparse
import configparser
import io
import json
import secrets
import sys
from typing import Any

DATABASE = "postgresql://mlflow:{password}@postgres:5432"  # of services/postgres.yaml


def auth_ini(database: str, admin_password: str) -> str:
    """Write MLflow's settings of its accounts."""
    settings = configparser.RawConfigParser()
    settings["mlflow"] = {
        "default_permission": "READ",  # with none, MLflow also refuses to say whether a new name is taken (403)
        "database_uri": f"{database}/mlflow_auth",
        "admin_username": "admin",
        "admin_password": admin_password,
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    text = io.StringIO()
    settings.write(text)
    return text.getvalue()


def make(database: str, namespace: str) -> list[dict[str, Any]]:
    """Make secrets of fresh random values that agree with each other.

    Args:
        database: URL of the database server; `{password}` stands for that of the role `mlflow`.
    """
    password, admin = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    server = database.format(password=password)
    values = {
        "postgres": {"postgres-password": secrets.token_urlsafe(24), "mlflow-password": password},
        "mlflow-server": {
            "auth.ini": auth_ini(server, admin),
            "backend-store-uri": f"{server}/mlflow",
            "flask-secret-key": secrets.token_urlsafe(32),
        },
        # Of an account that the administrator makes (README.md); until then nobody but the administrator may log in.
        "mlflow-client": {"username": "trainer", "password": secrets.token_urlsafe(24)},
        "redis": {"password": secrets.token_urlsafe(24)},
    }
    return [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace}, "stringData": data}
        for name, data in values.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--namespace", default="vswin", help="(%(default)s)")
    parser.add_argument(
        "--database", default=DATABASE, metavar="URL", help="database server, without a database (%(default)s)"
    )
    args = parser.parse_args()
    json.dump({"apiVersion": "v1", "kind": "List", "items": make(args.database, args.namespace)}, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
