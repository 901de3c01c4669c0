"""The job scripts on a real SLURM: preempted, requeued, cancelled and chained jobs.

The truth is the run of one process that was never stopped, outside of SLURM.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.recorder_runs import OPTIONS, write_pictures
from support.runs import TINY, by_step
from support.slurm_cluster import Cluster, why_not
from support.written import FOLDER, Seen, read_starts

from maepretrain.checkpoints.saved import Saved

ROOT = Path(__file__).parents[2]
BATCH, STEPS = 24, 18
# A start takes ten seconds of a core for its imports, and all jobs share what there is.
ENDS = 240
SLOW = ["--model.pace", "0.5"]

reason = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(reason), reason=reason)]


class Place(NamedTuple):
    """Where all jobs of this file run."""

    folder: Path
    cluster: Cluster
    data: list[str]

    def recipe(self, run: str, *options: object) -> list[str]:
        """Of a pretraining in `folder/run`."""
        words = [*OPTIONS, "--model", "support.written.Written", *self.data]
        words += ["--run", self.folder / run]
        words += ["--trainer.max_steps", STEPS, "--trainer.check_val_every_n_epoch", 1]
        words += ["--data.num_workers", 1, *options]
        return [str(word) for word in words]

    def submit(self, *words: object, **environment: str) -> str:
        """sbatch: the job's number."""
        command = ["sbatch", "--parsable", *words]
        return self.cluster.run(*command, cwd=self.folder, **environment).strip()

    def log(self, job: str) -> str:
        """Of a job, whatever its stage."""
        paths = list(self.folder.glob(f"*-{job}.log"))
        return paths[0].read_text() if paths else ""

    def ended(self, job: str) -> dict[str, str]:
        """How a job ended, which it must."""
        self.cluster.until(lambda: self.cluster.ended(job), ENDS, f"job {job}:\n{self.log(job)}")
        return self.cluster.job(job)

    def status(self, run: str) -> dict[str, Any]:
        path = self.folder / run / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def trains(self, run: str, job: str, step: int) -> None:
        """Wait until a job has taken so many steps."""

        def there() -> bool:
            assert not self.cluster.ended(job), self.log(job)
            path = self.folder / run / "metrics.csv"
            return path.exists() and path.read_text().count("\n") > step

        self.cluster.until(there, ENDS, f"step {step} of {run}:\n{self.log(job)}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("slurm")
    write_pictures(folder, "train", range(150), 43)
    write_pictures(folder, "test", range(1000, 1048), 43)
    bin = folder / "bin"
    bin.mkdir()
    (bin / "maepretrain").write_text(f'#!/bin/sh\nexec {sys.executable} -m maepretrain "$@"\n')
    (bin / "maepretrain").chmod(0o755)
    (folder / "written").mkdir()
    environment = {
        "PATH": os.pathsep.join((str(bin), os.environ["PATH"])),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests")))),
        "MAEPRETRAIN": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        FOLDER: str(folder / "written"),
    }
    data = ["--data.train", f"{folder}/train-*.tar", "--data.val", f"{folder}/test-*.tar"]
    # A short path, for a socket lies in it.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as own,
        ExitStack() as stack,
    ):
        cluster = Cluster(Path(own), environment)
        place = Place(folder, cluster, data)
        # A sandbox may not let the daemons live, or let them live and never run a job: nothing of
        # ours can be tried there, and every test would wait for its end in vain.
        try:
            stack.enter_context(cluster)
            job = place.submit("--nodes=2", "--ntasks-per-node=1", "--wrap=srun true")
            cluster.until(lambda: cluster.ended(job), 90, "the end of tasks that do nothing")
            assert cluster.job(job)["JobState"] == "COMPLETED"
        except AssertionError as error:
            pytest.skip(f"SLURM runs no job on this machine: {error}\n{cluster.logs()}")
        yield place


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    """The truth, in this process."""
    from maepretrain.cli.main import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(place.folder / "written"))
        patch.setattr(sys, "argv", ["maepretrain"])
        assert main(["pretrain", *place.recipe("whole")]) == 0
    return place.folder / "whole"


PRETRAIN = ROOT / "slurm/pretrain.sbatch"
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
TWO_TASKS = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1"]
DDP, ZERO = ["--trainer.strategy", "ddp"], ["-c", "overlay/zero1"]


@pytest.fixture(scope="module")
def limited(place: Place) -> str:
    """A job that cannot end in its time; it waits while others work."""
    recipe = place.recipe("limit", *DDP, "--model.pace", 4)
    limit = ["--time=2", "--signal=B:USR1@60"]
    return place.submit(*TWO_NODES, *limit, PRETRAIN, *recipe)


def assert_nothing_lost_or_twice(place: Place, job: str, run: str, whole: Path) -> list[int]:
    """Consumed samples of the surviving weights' history, the loss curve and the weights equal the
    run that was never stopped; the step at which each start after the first began."""
    starts = read_starts(place.folder / "written", job)
    begins = [start[0].position for start in starts]
    assert begins[0] == 0 and len(starts) >= 2
    history: list[Seen] = []
    for start, until in zip(starts, [*begins[1:], STEPS * BATCH], strict=True):
        history += [seen for seen in start if seen.position < until]
    truth = read_starts(place.folder / "written", "0")[0]
    assert [seen.position for seen in truth] == list(range(STEPS * BATCH))
    assert history == truth
    for name in ("loss", "val_loss", "lr"):
        assert by_step(place.folder / run, name) == pytest.approx(by_step(whole, name), abs=2e-6)
    mine, theirs = (
        Saved(folder / "checkpoints/last.ckpt").weights() for folder in (place.folder / run, whole)
    )
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-6)
    status = place.status(run)
    assert (status["state"], status["starts"]) == ("done", len(starts))
    return [begin // BATCH for begin in begins[1:]]


def test_preemption_by_another_partition(place: Place, limited: str, whole: Path) -> None:
    """SLURM sends TERM, and would kill after its GraceTime; one node, two tasks, ZeRO-1."""
    recipe = place.recipe("preempted", *ZERO, *SLOW)
    job = place.submit(*TWO_TASKS, "--partition=low", "--time=20", PRETRAIN, *recipe)
    place.trains("preempted", job, 3)
    wants = place.submit("--partition=high", "--exclusive", "--wrap=sleep 1", "--output=/dev/null")
    end = place.ended(job)
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("COMPLETED", "1", "0:0")
    assert place.ended(wants)["JobState"] == "COMPLETED"
    (step,) = assert_nothing_lost_or_twice(place, job, "preempted", whole)
    # It saved where the signal came, and nowhere else.
    before = read_starts(place.folder / "written", job)[0]
    assert step == before[-1].position // BATCH + 1 >= 3
    assert "Traceback" not in place.log(job)


def test_scontrol_requeue(place: Place, whole: Path) -> None:
    """Two nodes, ZeRO-1; what SLURM leaves no time to save runs again from the periodic save."""
    recipe = place.recipe("requeued", *ZERO, *SLOW, "--checkpoint_every_steps", 2)
    job = place.submit(*TWO_NODES, "--time=20", PRETRAIN, *recipe)
    place.trains("requeued", job, 3)
    place.cluster.run("scontrol", "requeue", job, cwd=place.folder)
    end = place.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")
    (step,) = assert_nothing_lost_or_twice(place, job, "requeued", whole)
    assert step >= 2


def test_a_lost_node(place: Place, whole: Path) -> None:
    """The node of rank one falls silent, and comes back empty. Two nodes, DDP."""
    recipe = place.recipe("lost", *DDP, *SLOW, "--checkpoint_every_steps", 2)
    job = place.submit(*TWO_NODES, "--time=20", PRETRAIN, *recipe)
    place.trains("lost", job, 3)
    back = place.cluster.lose("n2")
    try:
        place.cluster.until(
            lambda: place.cluster.job(job)["Restarts"] == "1", 60, f"the requeue of job {job}"
        )
    finally:
        back()
    end = place.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")
    (step,) = assert_nothing_lost_or_twice(place, job, "lost", whole)
    assert step >= 2


def test_the_time_limit(place: Place, limited: str, whole: Path) -> None:
    """Two minutes are not enough; USR1 comes a minute ahead of their end. Two nodes, DDP."""
    job = limited
    end = place.ended(job)
    assert end["JobState"] == "COMPLETED" and int(end["Restarts"]) >= 1
    steps = assert_nothing_lost_or_twice(place, job, "limit", whole)
    for start, step in zip(read_starts(place.folder / "written", job), steps, strict=False):
        assert step == start[-1].position // BATCH + 1
    assert "goes back into the queue" in place.log(job)


def test_a_cancelled_job_stays_away(place: Place) -> None:
    job = place.submit(*TWO_TASKS, "--time=20", PRETRAIN, *place.recipe("cancelled", *DDP, *SLOW))
    waits = place.submit(f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--wrap=true")
    place.trains("cancelled", job, 3)
    place.cluster.run("scancel", job, cwd=place.folder)
    end = place.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
    assert place.ended(waits)["JobState"] == "CANCELLED"
    assert place.status("cancelled")["state"] != "done"
    # It had the time to save; who submits it again goes on from there.
    assert "goes back into the queue" not in place.log(job)


PICTURES = ["--data.image_size", "8", "--data.channels", "3", "--data.num_workers", "0"]
PICTURES += ["--data.mean", "[0,0,0]", "--data.std", "[1,1,1]"]


def mae(place: Place, run: str) -> list[str]:
    """Pretraining of a small MAE, which can be fine-tuned."""
    words = [
        "-c",
        "data/digits",
        "-c",
        "recipe/mae_digits",
        *TINY,
        *PICTURES,
        *place.data,
        "--trainer.max_steps",
        "6",
    ]
    return [*words, "--pictures", "0", "--run", str(place.folder / run)]


def chain(place: Place, recipe: list[str]) -> dict[str, str]:
    """Pretraining, probe and fine-tuning: job numbers by stage."""
    small = ["--ntasks-per-node=1", "--cpus-per-task=1", "--time=20"]
    probe = ["probe", *place.data, *PICTURES]
    finetune = [
        "finetune",
        "-c",
        "data/fashion_mnist",
        "-c",
        "eval/finetune_small",
        *place.data,
        *PICTURES,
    ]
    finetune += ["--data.global_batch", "24", "--trainer.max_steps", "6"]
    stages = ["--", "pretrain", *recipe, "--", *probe, "--", *finetune]
    out = place.cluster.run(ROOT / "slurm/chain.sh", *small, *stages, cwd=place.folder)
    return dict(line.split() for line in out.splitlines())


def test_a_chain_whose_first_stage_fails(place: Place) -> None:
    # After its first checkpoint: a run that fails before it leaves no trace.
    recipe = place.recipe("fails", "--model.fails_at", 100, "--checkpoint_every_steps", 2)
    jobs = chain(place, recipe)
    assert place.ended(jobs["pretrain"])["JobState"] == "FAILED"
    for stage in ("probe", "finetune"):
        assert place.ended(jobs[stage])["JobState"] == "CANCELLED"
        assert not place.log(jobs[stage])
    log = place.log(jobs["pretrain"])
    others = f"{jobs['probe']} {jobs['finetune']}"
    assert f"cancelled, since they wait for its success: jobs {others}" in log
    *_, last = log.strip().splitlines()
    assert last == "RuntimeError: position 100 is where this model fails"
    assert "the first rank that failed, rank-0:" in log
    assert place.status("fails")["state"] == "failed"
    # The gate alone, without a dependency.
    judge = place.submit(ROOT / "slurm/eval.sbatch", "knn", "--encoder", place.folder / "fails")
    assert place.ended(judge)["JobState"] == "FAILED"
    assert "has not come to its end; nothing is judged" in place.log(judge)


REFUSED = {
    "MASTER_ADDR": "MASTER_ADDR n1 does not resolve on every node",
    "shards": "no shard matches /nowhere/*.tar",
    "config": "no config file mae/nowhere",
    "access": "no write access to run folder",
    "devices": "--trainer.devices: nodes and devices come from SLURM",
    "GPUs": "1 tasks on a node do not match its 8 GPUs",
}


@pytest.fixture(scope="module")
def refused_jobs(place: Place) -> dict[str, str]:
    """One job for each mistake, all at once."""
    how: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
        "MASTER_ADDR": (TWO_NODES, [], {"MASTER_ADDR": "n1"}),
        "shards": (TWO_NODES, ["--data.train", "/nowhere/*.tar"], {}),
        "config": (TWO_NODES, ["-c", "mae/nowhere"], {}),
        "access": (TWO_NODES, ["--run", "/proc/nowhere"], {}),
        "devices": (TWO_NODES, ["--trainer.devices", "2"], {}),
        # This SLURM has no GPUs to give: what it would say of them.
        "GPUs": (["--nodes=1", "--export=ALL,SLURM_GPUS_ON_NODE=8"], [], {}),
    }
    return {
        what: place.submit(
            *options,
            "--no-requeue",
            PRETRAIN,
            *place.recipe(f"refused-{what}"),
            *more,
            **environment,
        )
        for what, (options, more, environment) in how.items()
    }


@pytest.mark.parametrize("what", REFUSED)
def test_mistakes_end_a_job_at_once(place: Place, refused_jobs: dict[str, str], what: str) -> None:
    job = refused_jobs[what]
    assert place.ended(job)["ExitCode"] == "2:0", place.log(job)
    log = place.log(job)
    assert f"maepretrain: error: {REFUSED[what]}" in log
    assert "Traceback" not in log
    assert not (place.folder / f"refused-{what}/config.yaml").exists()


def test_dry_run_prints_script_and_plan(place: Place) -> None:
    plan = [
        "--devices",
        2,
        "--memory",
        "80GB",
        "--images",
        1000,
        "-c",
        "data/digits",
        "-c",
        "recipe/mae_digits",
    ]
    out = place.cluster.run("bash", PRETRAIN, "--dry-run", *plan, cwd=place.folder)
    assert PRETRAIN.read_text() in out and (ROOT / "slurm/job.sh").read_text() in out
    assert "zero1" in out and "GiB a process" in out
    stages = [
        "--",
        "pretrain",
        "-c",
        "data/digits",
        "-c",
        "recipe/mae_digits",
        "--run",
        "x",
        "--",
        "knn",
    ]
    chained = place.cluster.run(
        ROOT / "slurm/chain.sh",
        "--dry-run",
        "--nodes=2",
        *stages,
        cwd=place.folder,
        PLAN="--devices 2 --memory 80GB --images 1000",
    )
    assert "GiB a process" in chained
    assert "'--dependency=afterok:JOB' '--kill-on-invalid-dep=yes' '--nodes=2'" in chained
    assert chained.rstrip().endswith("'knn' '--encoder' 'x'")


def test_an_array_of_three_seeds(place: Place) -> None:
    job = place.submit("--array=0-2", "--cpus-per-task=1", PRETRAIN, *place.recipe("array"))
    for seed in range(3):
        place.cluster.until(
            lambda seed=seed: place.status(f"array/seed-{seed}").get("state") == "done",
            ENDS,
            f"seed {seed} of array {job}",
        )
    losses = [by_step(place.folder / f"array/seed-{seed}", "loss") for seed in range(3)]
    assert all(list(loss) == list(range(STEPS)) for loss in losses)
    assert losses[0] != losses[1] != losses[2] != losses[0]


def test_a_chain_that_succeeds(place: Place) -> None:
    jobs = chain(place, mae(place, "chained"))
    for stage, job in jobs.items():
        assert place.ended(job)["JobState"] == "COMPLETED", f"{stage}: {place.log(job)}"
    assert list(jobs) == ["pretrain", "probe", "finetune"]
    assert "probe" in json.loads((place.folder / "chained/results.json").read_text())
    assert place.status("chained-finetuned")["state"] == "done"
    results = json.loads((place.folder / "chained-finetuned/results.json").read_text())
    assert 0 <= results["finetune"]["top1"] <= 1
    # A job that is submitted again has nothing left to do, and another experiment is refused.
    again = place.submit(PRETRAIN, *mae(place, "chained"))
    other = place.submit(PRETRAIN, *mae(place, "chained"), "--optim.base_lr", 2)
    assert place.ended(again)["JobState"] == "COMPLETED"
    assert place.ended(other)["ExitCode"] == "2:0"
    assert "belongs to another configuration: optim.base_lr: 0.012 -> 2.0" in place.log(other)
