"""Fetch the secrets of a host by its role, into files that its user alone may read: Ray's token, and MLflow's account.

`python host_secrets.py --region REGION --token ARN --account ARN`, the names of two secrets of Secrets Manager.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import boto3

TOKEN, ACCOUNT = ".ray/auth_token", ".vswin-account"  # the first is where Ray looks


def write(path: Path, text: str) -> None:
    """Write a file that its owner alone may read."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("region", "token", "account"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    client = boto3.client("secretsmanager", args.region)
    account = json.loads(client.get_secret_value(SecretId=args.account)["SecretString"])
    variables = {
        "MLFLOW_TRACKING_USERNAME": account["username"],
        "MLFLOW_TRACKING_PASSWORD": account["password"],
        "AWS_DEFAULT_REGION": args.region,
    }
    write(Path.home() / TOKEN, client.get_secret_value(SecretId=args.token)["SecretString"])
    write(Path.home() / ACCOUNT, "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
