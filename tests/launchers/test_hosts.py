"""Two hosts: network namespaces with an address, a cable and an sshd each, under one hostfile. Needs root, ip, sshd and pdsh."""

import contextlib
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from common.ranks import free_port
from tests.support.commands import ROOT, SMALL, command, deepspeed, wait_for
from tests.support.runs import losses

pytestmark = pytest.mark.slow
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
WORDS = [ROOT / "train/main.py", "reuse=hidden", "deepspeed=zero2", "train.batch=2", "train.max_steps=40", "train.save_every=10"]
WORDS += ["train.timeout_s=15", "train.diagnose=false", *SMALL]
PATH = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}:/usr/sbin:/sbin"


def run(*words) -> str:
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True, env={"PATH": PATH}).stdout


def missing() -> str | None:
    """Why there can be no hosts here."""
    if absent := [name for name in ("ip", "pdsh", "ssh", "sshd", "ssh-keygen") if shutil.which(name, path=PATH) is None]:
        return f"{' and '.join(absent)} not installed (apt-get install iproute2 pdsh openssh-server)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode == 0:
        made = subprocess.run(["ip", "netns", "exec", name, "true"], capture_output=True, text=True)
        run("ip", "netns", "delete", name)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else None


class Hosts:
    """Two namespaces, `a` and `b`; their sshds run until `close`. The file system is shared, as on a cluster."""

    def __init__(self, folder):
        self.folder = folder
        self.names = {host: f"{host}-{os.getpid()}" for host in ADDRESSES}
        for name in self.names.values():
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", self.names["a"], "link", "add", "cable", "type", "veth", "peer", "cable", "netns", self.names["b"])
        for key in ("key", "host_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
        os.makedirs("/run/sshd", exist_ok=True)  # sshd wants it, and its package leaves it to the service manager
        keys = f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\n"
        (folder / "sshd_config").write_text(f"{keys}UsePAM no\nPermitRootLogin yes\nPidFile none\n")
        options = f"IdentityFile {folder}/key\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        (folder / "ssh_config").write_text(options)
        for host, name in self.names.items():
            run("ip", "-n", name, "address", "add", f"{ADDRESSES[host]}/24", "dev", "cable")
            self.plug(host)
            run(
                "ip",
                "netns",
                "exec",
                name,
                shutil.which("sshd", path=PATH),
                "-f",
                folder / "sshd_config",
                "-E",
                folder / "sshd.log",
            )
        (folder / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES.values()))

    def plug(self, host: str, state: str = "up") -> None:
        run("ip", "-n", self.names[host], "link", "set", "cable", state)

    def start(self, *words, log) -> subprocess.Popen:
        """The job as a user of host `a` would start it."""
        launcher = ["ip", "netns", "exec", self.names["a"], ROOT / "launchers/hostfile.sh", self.folder / "hostfile"]
        launcher += ["--no_ssh_check", "--master_addr", ADDRESSES["a"]]  # deepspeed's own ssh knows no options: pdsh's does
        env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
        env |= {"PDSH_SSH_ARGS_APPEND": f"-F {self.folder / 'ssh_config'}", "PATH": PATH}
        with open(log, "w") as file:
            return subprocess.Popen(
                [*map(str, [*launcher, *words])], env={**os.environ, **env}, cwd=self.folder, stdout=file, stderr=file
            )

    def processes(self, of: str = "") -> list[psutil.Process]:
        """What runs on them and has `of` in its command line."""
        found = []
        for name in self.names.values():
            for pid in run("ip", "netns", "pids", name).split():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if of in " ".join(psutil.Process(int(pid)).cmdline()):
                        found.append(psutil.Process(int(pid)))
        return found

    def close(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for name in self.names.values():
            run("ip", "netns", "delete", name)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def one_host(cache, tmp_path_factory):
    """The same run by two ranks of one host, never interrupted."""
    folder = tmp_path_factory.mktemp("one")
    done = command(*WORDS, f"cache.dir={cache}", f"run.dir={folder / 'run'}", launcher=deepspeed(2, free_port()), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_a_host_that_loses_its_network_ends_both_sides_and_the_run_can_be_resumed(cache, hosts, one_host, tmp_path):
    """The time-out ends the run, launchers and all; said again, it ends with the weights of one host, bit for bit."""
    log, run_dir = tmp_path / "log", tmp_path / "two=hosts"  # a name that two shells and Hydra must leave alone
    words = [*WORDS, f"cache.dir={cache}", f"run.dir='{run_dir}'"]
    job = hosts.start(*words, log=log)
    try:
        wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) >= 12, 120, "twelve steps")
        hosts.plug("b", "down")
        cut = time.monotonic()
        assert job.wait(timeout=60) not in (0, None)
        wait_for(lambda: not hosts.processes("train/main.py"), 60 - (time.monotonic() - cut), "the end of both sides")
    finally:
        hosts.plug("b")
    said = log.read_text()
    assert not (run_dir / "checkpoints/step-000040").exists()
    # What rank 1 says, on the far side of the cut, cannot come through.
    assert said.count("error: ") == 1 and "error: not heard of for 15 s: rank 1 (" in said and "Traceback" not in said

    job = hosts.start(*words, "train.timeout_s=60", log=log)
    assert job.wait(timeout=180) == 0, log.read_text()
    assert "resuming" in log.read_text()
    whole, again = (load_file(run / "checkpoints/last/model.safetensors") for run in (one_host, run_dir))
    assert whole and all(torch.equal(whole[name], again[name]) for name in whole)
    assert losses(run_dir) == losses(one_host)
