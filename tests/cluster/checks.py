"""What a cluster must do, in the order in which runs can share work and go on side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tests.cluster.cleaning import clean, schedules
from tests.cluster.figures import Tracking, compare
from tests.cluster.local import LocalRun
from tests.cluster.pods import Pods
from tests.cluster.runs import FIRST, STEPS, Run, Runs
from tests.cluster.settings import Settings
from tests.cluster.table import Failed, Skipped, Table

SWEEP = "sweep={vary: {distillation.temperature: [1.0, 2.0]}, parallelism: 2, metric: kl}"
_SHORT = ("training.train_iters=30", "training.save_interval=30", "training.eval_interval=30")
INTERRUPTED = ("deleted", "killed")
_SECONDS_OF_A_MISTAKE = 60.0  # of the pod that finds it, its start included
_NO_KUBECONFIG = "KUBECONFIG is not set: Kubernetes' API is not asked"
_NO_MLFLOW = (
    "MLFLOW_TRACKING_URI is not set; kubectl port-forward svc/mlflow 5000:5000, then "
    "MLFLOW_TRACKING_URI=http://localhost:5000"
)
_NO_SHARED = "the platform file has no `shared`: checkpoints are lost with their pod"


class Checks:
    """One go over a cluster.

    Args:
        settings: what is checked, and with what.
        table: gets the outcomes.
        runs: the server.
        local: the same recipe on this machine; None where nothing can be compared.
    """

    def __init__(
        self, settings: Settings, table: Table, runs: Runs, local: LocalRun | None
    ) -> None:
        self.settings, self.table, self.runs, self.local = settings, table, runs, local
        self.pods = Pods(settings.namespace) if settings.kubeconfig else None
        self.started: dict[str, Run] = {}
        self.whole: list[Run] = []  # that ended as they should, with all six steps
        self.came_of_it: dict[str, str | Exception] = {}  # of starting and striking, by run

    def go(self) -> None:
        """All checks; what was made is taken away whatever happens."""
        try:
            self._go()
        finally:
            if not self.settings.keep:
                self.table.check("cleaned up", lambda: clean(self.runs))

    def _go(self) -> None:
        check = self.table.check
        check("retries: the policy", self.policy)
        if not check("pipeline and run accepted", lambda: self.start("first")):
            return
        check("schedule made and removed", self.schedule)
        self.begin("mistake", self._start_mistake)
        self.begin("sweep", self._start_sweep)
        self.ended("mistake refused by the first task", "mistake", self.mistake)
        self.ended("run from data to report", "first", self.first)
        self.begin("cached", lambda: self._start_again("cached"))
        for what in INTERRUPTED:
            self.begin(what, lambda what=what: self._start_again(what))
        self.strike()  # before anything else is waited for: a training takes a minute
        self.ended("cached the second time", "cached", self.cached)
        check("figures of a run on this machine", self.figures)
        self.ended("training's pod deleted: retried, resumed", "deleted", self.resumed)
        self.ended("main process killed: retried, resumed", "killed", self.resumed)
        check("weights of an undisturbed run", self.weights)
        self.begin("nodes", self._start_nodes)
        self.ended("training on two nodes", "nodes", self.nodes)
        self.ended("sweep of two", "sweep", self.sweep)
        check("MLflow: trees complete and closed", self.tree)

    def begin(self, what: str, start: Callable[[], object]) -> None:
        """Start something that is checked later; why it could not be is kept for then."""
        try:
            start()
        except Exception as error:  # as Table.check
            self.came_of_it[what] = error

    def ended(self, name: str, what: str, work: Callable[[str, Run], str]) -> bool:
        """Check a run that was started before; its time counts from there."""

        def seen() -> str:
            found = self.came_of_it.get(what)
            if isinstance(found, Exception):
                raise found
            return work(what, self.started[what])

        began = self.started[what].began if what in self.started else None
        return self.table.check(name, seen, began)

    def start(self, what: str, *sets: str) -> str:
        """Start a run of the recipe; of another name, where it is not to be the same again."""
        run = self.runs.submit(what, *(f"--set={text}" for text in sets))
        self.started[what] = run
        return f"run {run.run_id}"

    def _start_again(self, what: str) -> None:
        self._first()
        if what not in INTERRUPTED:
            self.start(what)
            return
        self._check_interruptible()
        # Of another name, and so with checkpoints of its own; data, teacher and student are reused.
        self.start(what, f"name={self.settings.name}-{what}")

    def _start_sweep(self) -> None:
        self.start("sweep", f"name={self.settings.name}-sweep", SWEEP, *_SHORT)

    def _start_nodes(self) -> None:
        self._first()
        self._check_interruptible()
        if not self.pods.has_trainer():
            raise Skipped("Kubeflow Trainer is not installed")
        self.start("nodes", f"name={self.settings.name}-nodes", "resources.nodes=2")

    def _check_interruptible(self) -> None:
        if self.pods is None:
            raise Skipped(_NO_KUBECONFIG)
        if self.settings.shared is None:
            raise Skipped(_NO_SHARED)

    def _first(self) -> Run:
        """The first run, once it has succeeded."""
        if self.started["first"] not in self.whole:
            raise Skipped("the first run did not succeed")
        return self.started["first"]

    def policy(self) -> str:
        """The controller's ConfigMap, judged by what it does to each kind of failure."""
        if self.pods is None:
            raise Skipped(_NO_KUBECONFIG)
        faults = self.pods.policy().faults()
        if faults:
            raise Failed("; ".join(faults) + " (docs/cluster.md, Retries)")
        return "repeats stopped, killed and vanished pods; no mistake, nothing out of memory"

    def schedule(self) -> str:
        """A schedule in a far night."""
        name = self.settings.name
        options = (*self.settings.recipe, *self.runs.place, f"--name={name}")
        self.runs.command("schedule", *options, "--cron=0 0 3 29 2 *")
        made = schedules(self.runs)
        if len(made) != 1:
            raise Failed(f"{len(made)} schedules named {name}")
        client = self.runs.server.client
        self.runs.server.write("deleting it", lambda: client.delete_recurring_run(made[0]))
        if schedules(self.runs):
            raise Failed(f"schedule {made[0]} is still there")
        return f"schedule {made[0]}"

    def _start_mistake(self) -> str:
        wrong = {"distillation": {"temperature": -1}}
        first = self.runs.look(self.started["first"])
        self.started["mistake"] = self.runs.start_as_the_ui_does("mistake", first, wrong)
        return ""

    def mistake(self, _: str, run: Run) -> str:
        """Refused at once, once, and by the first task."""
        self.runs.wait(run)
        if run.state != "FAILED":
            raise Failed(f"a run with temperature -1 {run.state}")
        begun = sorted(set(run.steps()) & set(STEPS))
        if begun:
            raise Failed(f"a mistake started {', '.join(begun)}")
        if run.steps().get(FIRST) != "FAILED":
            raise Failed(f"{FIRST} did not fail: {run.steps()}")
        if len(run.attempts()) != 1:
            raise Failed(f"a mistake was tried {len(run.attempts())} times")
        taken = run.pod_seconds()
        if taken > _SECONDS_OF_A_MISTAKE:
            raise Failed(f"{FIRST} took {taken:.0f} s")
        return f"{FIRST} failed after {taken:.0f} s, once; nothing else began"

    def first(self, _: str, run: Run) -> str:
        """All steps."""
        self._whole(run)
        return f"{len(run.steps())} steps"

    def cached(self, _: str, run: Run) -> str:
        """The same again."""
        self._whole(run)
        reused = run.executors().count("SKIPPED")
        if reused < len(STEPS):
            raise Failed(f"{reused} of {len(run.executors())} steps came from the cache")
        return f"{reused} of {len(run.executors())} steps from the cache"

    def _whole(self, run: Run) -> None:
        self.runs.succeed(run)
        absent = [step for step in STEPS if run.steps().get(step) != "SUCCEEDED"]
        if absent:
            raise Failed(f"the run SUCCEEDED, but without {', '.join(absent)}")
        self.whole.append(run)

    def sweep(self, _: str, run: Run) -> str:
        """Both variants, the leaderboard and the winner."""
        self.runs.succeed(run)
        trainings = [t for t in run.named("distil-student") if t == "SUCCEEDED"]
        last = [s for s in ("leaderboard", "export-winner") if run.steps().get(s) == "SUCCEEDED"]
        if len(trainings) != 2 or len(last) != 2:
            raise Failed(f"{len(trainings)} trainings of 2, then {', '.join(last) or 'nothing'}")
        return "two trainings, the leaderboard, the winner exported"

    def figures(self) -> str:
        """The cluster's beside this machine's."""
        first, cluster = self._first(), self._tracking()
        assert self.local is not None, "there is one wherever there is MLflow"
        here = self.local.finish(self.runs.deadline - time.monotonic())
        return compare(here.figures(), cluster.figures(first.run_id))

    def strike(self) -> None:
        """Take the pods away once they have a checkpoint behind them, whichever is first."""
        pods = self.pods
        waiting = {what: self.started[what] for what in INTERRUPTED if what in self.started}
        if pods is None:
            return
        how: dict[str, Callable[[Any], str]] = {"deleted": pods.delete, "killed": pods.kill}
        while waiting:
            for what, run in list(waiting.items()):
                try:
                    struck = self._strike(pods, run, how[what])
                except Exception as error:  # as Table.check
                    struck = error
                if struck:
                    self.came_of_it[what] = struck
                    del waiting[what]
            if waiting:
                time.sleep(min(1.0, self.runs.pause_seconds))

    def _strike(self, pods: Pods, run: Run, how: Callable[[Any], str]) -> str | None:
        pod = pods.saved(run.run_id)
        if pod is not None:
            return how(pod)
        if self.runs.look(run).state != "RUNNING" and run.state != "PENDING":
            raise Failed(f"the run {run.state} before its training had a checkpoint to go on from")
        if time.monotonic() > self.runs.deadline:
            raise Failed(f"no checkpoint within {self.settings.minutes:g} minutes (MINUTES=...)")
        return None

    def resumed(self, what: str, run: Run) -> str:
        """Another attempt, from the checkpoint on, to the end."""
        blow = self.came_of_it[what]
        self._whole(run)
        again = [number for number, _ in run.attempts() if number]
        if not again:
            raise Failed(f"{blow}, but there was one attempt")
        assert self.pods is not None
        step = self.pods.resumed(run.run_id)
        if not step:
            raise Failed(f"{blow}: attempt {max(again) + 1} began at step 0")
        return f"{blow}; attempt {max(again) + 1} went on after step {step}"

    def weights(self) -> str:
        """The interrupted students beside the first run's."""
        self._first()
        tracking, name = self._tracking(), self.settings.name
        seen = [what for what in INTERRUPTED if self.started.get(what) in self.whole]
        if not seen:
            raise Skipped("no interrupted run came to its end")
        undisturbed = tracking.weights(name)
        for what in seen:
            found = tracking.weights(f"{name}-{what}")
            if found != undisturbed:
                raise Failed(f"{what}: weights {found}, not {undisturbed}")
        return f"{undisturbed}, byte for byte ({', '.join(seen)})"

    def nodes(self, _: str, run: Run) -> str:
        """A TrainJob's student is that of one node."""
        self._whole(run)
        if self.settings.tracking is None:
            return "the run succeeded; " + _NO_MLFLOW
        tracking = self._tracking()
        one, two = (tracking.figures(found.run_id) for found in (self._first(), run))
        return "a TrainJob's evaluation: " + compare(one, two, steps=("evaluate",))

    def tree(self) -> str:
        """Every run that ended well is one tree, and nothing is left open."""
        tracking = self._tracking()
        for run in self.started.values():  # one that was not to be interrupted may go on still
            if self.runs.wait(run).state != "SUCCEEDED":
                with suppress(Failed):  # it says so of the run, and ends what MLflow has open
                    self.runs.command("status", run.run_id)
        roots = {tracking.check_tree(run.run_id) for run in self.whole}
        if len(roots) != len(self.whole):
            raise Failed(f"{len(self.whole)} runs are {len(roots)} trees")
        tracking.check_closed()
        return f"{len(roots)} trees of {len(STEPS)} steps, all finished; nothing else open"

    def _tracking(self) -> Tracking:
        if self.settings.tracking is None:
            raise Skipped(_NO_MLFLOW)
        return Tracking(self.settings.tracking, self.settings.name)
