"""A real SLURM of two nodes on this machine, for this user, in a folder of its own: nothing of the system is touched.

Needs Debian's slurm-wlm and munge. Run as a script it starts one, prints the environment and waits.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sacct")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=600
JobRequeue=1
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,requeue_delay=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=2000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=2000 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def missing_programs() -> list[str]:
    """Return what is not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """Two nodes, n1 and n2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.own = {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        folder = self.folder
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self._daemon(
            "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
        )  # fmt: skip
        self._until((folder / "munge.socket").exists, "munged")
        ports = [_free_port() for _ in range(3)]
        text = CONFIGURATION.format(host=socket.gethostname(), user=getpass.getuser(), ports=ports, folder=folder)
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._daemon("slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self.run("sinfo", "-h", "-o", "%T %D").strip() == "idle 2", "the nodes")

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("ab")
        self._daemons.append(
            subprocess.Popen(
                command, env={**os.environ, **self.own}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
                start_new_session=True,
            )
        )  # fmt: skip

    def _until(self, ready, what: str, timeout_s: float = 60) -> None:  # type: ignore[no-untyped-def]
        end = time.monotonic() + timeout_s
        while not ready():
            if time.monotonic() > end:
                logs = "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in self.folder.glob("*.[lo][ou][gt]"))
                raise RuntimeError(f"{what} did not start:\n{logs}")
            time.sleep(0.2)

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run one of SLURM's programs; returns its output."""
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **self.own, **environment}, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        return done.stdout if done.returncode == 0 else done.stdout + done.stderr

    def submit(self, cwd: Path, *command: str, **environment: str) -> str:
        """Submit a script; returns the job's id."""
        reported = self.run("sbatch", "--parsable", *command, cwd=cwd, **environment).strip()
        if not reported.isdigit():
            raise RuntimeError(reported)
        return reported

    def job(self, job: str) -> dict[str, str]:
        """Return what scontrol knows of a job (of the last task, for an array)."""
        text = self.run("scontrol", "show", "job", "-o", job)
        overrides = (word.partition("=") for line in text.splitlines()[:1] for word in line.split())
        return {name: value for name, _, value in overrides}

    def state(self, job: str) -> str:
        """Return a job's state."""
        return self.job(job).get("JobState", "?")

    def wait(self, job: str, *states: str, timeout_s: float = 90) -> str:
        """Wait for a job to come to one of `states` (by default, to its end)."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        end = time.monotonic() + timeout_s
        while (state := self.state(job)) not in wanted:
            if time.monotonic() > end:
                raise RuntimeError(f"job {job} is {state} after {timeout_s} s: {self.job(job)}")
            time.sleep(0.2)
        return state

    def start_again(self, job: str) -> None:
        """Wait until a job is back in the queue, and spare it the minutes that SLURM lets a requeued job wait."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            found = self.job(job)
            if found.get("Restarts") == "1" and found["JobState"] in ("RUNNING", "COMPLETED"):
                return
            ready = self.idle_nodes() == 2  # its former life is over on every node
            if found.get("Restarts") == "1" and found["Reason"] == "BeginTime" and ready:
                time.sleep(3)  # the former life's credential is revoked for a moment
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
                time.sleep(2)
            time.sleep(0.2)

    def log(self) -> str:
        """Return what the daemons logged about jobs."""
        lines = "".join(p.read_text(errors="replace") for p in sorted(self.folder.glob("slurm*.log"))).splitlines()
        return "\n".join(line for line in lines if "JobId" in line or "launch" in line)

    def idle_nodes(self) -> int:
        """Return how many nodes have nothing to do."""
        overrides = self.run("sinfo", "-h", "-t", "idle", "-o", "%D").split()
        return sum(int(w) for w in overrides)

    def stop(self) -> None:
        """End everything."""
        self.run("scancel", "--user", getpass.getuser())
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        mine = f"SLURM_CONF={self.own['SLURM_CONF']}".encode()
        for process in Path("/proc").glob("[0-9]*"):  # what keeps a job's steps outlives the daemons that began it
            with suppress(OSError):
                steps = (process / "comm").read_text().startswith("slurmstepd")
                if steps and mine in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")))
    cluster.start()
    print(f"export SLURM_CONF={cluster.own['SLURM_CONF']} PATH={PATH}", flush=True)
    try:
        sys.stdin.read()
    finally:
        cluster.stop()
