"""A real SLURM of three virtual nodes on this machine, in one temporary folder.

Its daemons and jobs are the only processes that it ends, and every wait has an end.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# In /usr/sbin, which is not on everybody's path.
DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2", "n3")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=high Nodes=n3 PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=n3 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
"""


def why_not() -> str:
    """Why no cluster can be started here; empty where one can."""
    missing = [name for name in (*DAEMONS, "sbatch", "srun") if _find(name) is None]
    if missing:
        return f"no SLURM here ({', '.join(missing)} missing): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "starting a SLURM of its own needs root"


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin")))


class Cluster:
    """A context manager that holds the daemons.

    Args:
        folder: fresh, with a short path: it holds a socket.
        environment: of the jobs and commands, besides this process's.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = os.environ | environment | {"SLURM_CONF": f"{folder}/slurm.conf"}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._around: list[str] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        ports = _free_ports(1 + len(NODES))
        host, self._around = _known_host()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 "
            "RealMemory=8000"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        for name in ("munge", "state", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        text = CONFIGURATION.format(host=host, port=ports[0], folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "munge").chmod(0o711)
        try:
            munge = ["--key-file", "key", "--socket", "socket", "--pid-file", "pid"]
            munge += ["--log-file", "log", "--seed-file", "seed"]
            paths = [f"{self.folder}/munge/{word}" if word[0] != "-" else word for word in munge]
            self._start("munged", "--foreground", "--force", *paths)
            self.until(lambda: (self.folder / "munge/socket").exists(), 20, "munged")
            self._start("slurmctld", "-D", "-i")
            for name in NODES:
                self._nodes[name] = self._start("slurmd", "-D", "-N", name)
            self.until(lambda: self._idle() == len(NODES), 60, "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}-{len(self._daemons)}.out").open("wb")
        command = [*self._around, _find(name) or name, *arguments]
        daemon = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )
        self._daemons.append(daemon)
        return daemon

    def lose(self, node: str) -> Callable[[], None]:
        """A node falls silent, its connections open: all that runs on it stands still, and SLURM
        notices. What is returned ends it and starts the node anew."""
        daemon, ids = self._nodes[node], self._tasks_of(node)
        for pid in (daemon.pid, *ids):
            os.kill(pid, signal.SIGSTOP)
        self.ask(f"scontrol update nodename={node} state=down reason=lost")

        def back() -> None:
            self._daemons.remove(daemon)
            for pid in ids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            daemon.kill()
            daemon.wait()
            self._nodes[node] = self._start("slurmd", "-D", "-N", node)

        return back

    def _tasks_of(self, node: str) -> list[int]:
        """What this cluster's jobs run on a node, and the daemons of their steps."""
        own = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.environment['SLURM_CONF']}"}
        tasks: list[int] = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                if own <= set((folder / "environ").read_text(errors="replace").split("\0")):
                    tasks.append(int(folder.name))
        steps: set[int] = set()
        for pid in tasks:
            with suppress(OSError):
                parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
                if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                    steps.add(int(parent))
        return [*tasks, *steps]

    def _idle(self) -> int:
        states = self.ask("sinfo --noheader --Node --format=%N,%t").split()
        return len({line.split(",")[0] for line in states if line.endswith(",idle")})

    def __exit__(self, *_: object) -> None:
        with suppress(AssertionError):
            self.ask("scancel --user=root")
            self.until(lambda: not self.ask("squeue --noheader").strip(), 30, "the end of all jobs")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, command: str) -> str:
        """What a command of SLURM prints; empty where it fails."""
        done = subprocess.run(
            command.split(), env=self.environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout if done.returncode == 0 else ""

    def run(self, *words: object, cwd: Path, **environment: str) -> str:
        """What a command prints, which must succeed."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment | environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def until(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until something holds, and no longer than this."""
        deadline = time.monotonic() + seconds
        while not holds():
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            assert not dead, f"ended: {dead}, see {self.folder}"
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{self.look()}"
            time.sleep(0.2)

    def look(self) -> str:
        """The queue."""
        return self.ask("squeue --all")

    def logs(self) -> str:
        """The last lines of each daemon."""
        paths = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"{path.name}:\n{path.read_text()[-1500:]}" for path in sorted(paths))

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says; empty where it is forgotten."""
        words = self.ask(f"scontrol --oneliner show job {number}").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, number: str) -> bool:
        state = self.job(number).get("JobState", "")
        return state not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "")


def _known_host() -> tuple[str, list[str]]:
    """A name of this machine that it knows, and what the daemons need around them to go by it."""
    name = socket.gethostname().partition(".")[0]
    with suppress(OSError):
        socket.gethostbyname(name)
        return name, []
    # A host name of their own.
    return "localhost", ["unshare", "--uts", "sh", "-c", 'hostname localhost && exec "$0" "$@"']


def _free_ports(n: int) -> list[int]:
    probes = [socket.socket() for _ in range(n)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
