"""W&B, MLflow and trackio, each through its own client, imported only when it is named.

The id that a service gave a run is kept in `trackers.json` in the run folder, so that a resumed run goes on in it.
"""

from __future__ import annotations

import importlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kitaeru.errors import MissingLibraryError
from kitaeru.events import Event, Notice, RunFinished, RunStarted, Sample
from kitaeru.files import write_json
from kitaeru.i18n import tr
from kitaeru.report.metrics import flat, metrics
from kitaeru.report.wording import run_name

Notify = Callable[[Notice], None]


class Hosted:
    """What the three have in common: the client, the run's id, begin at RunStarted."""

    name = ""
    _module = ""
    _extra = ""

    def __init__(self, project: str, run_dir: Path, config: dict[str, Any], tell: Notify) -> None:
        try:
            self._client: Any = importlib.import_module(self._module)
        except ImportError as error:
            raise MissingLibraryError(
                self._extra,
                tr("Sending numbers to {tracker}", tracker=self.name),
                f"pip install 'kitaeru[{self._extra}]'",
            ) from error
        self._project, self._run_dir, self._config, self._tell = project, run_dir, config, tell
        self._run: Any = None
        self._outcome = "interrupted"

    def __call__(self, event: Event) -> None:
        """Take `event` in."""
        if isinstance(event, RunStarted):
            self._begin(event)
        if self._run is None:
            return
        if isinstance(event, RunFinished):
            self._outcome = event.outcome
        values = metrics(event)
        if values:
            self._log(values, getattr(event, "step", 0), event.time)
        if isinstance(event, Sample):
            self._log_sample(event)

    def close(self) -> None:
        """Tell the service how the run ended."""
        if self._run is not None:
            self._end()
            self._run = None

    def _begin(self, event: RunStarted) -> None:
        raise NotImplementedError

    def _log(self, values: dict[str, float], step: int, time: float) -> None:
        raise NotImplementedError

    def _log_sample(self, event: Sample) -> None:
        """Samples stay in the run folder unless the service has a place for text."""

    def _end(self) -> None:
        raise NotImplementedError

    @property
    def _ended_well(self) -> bool:
        return self._outcome in ("finished", "stopped_early")

    def _remembered(self) -> str | None:
        try:
            value = json.loads((self._run_dir / "trackers.json").read_text(encoding="utf-8"))
            return str(value[self._extra]) if self._extra in value else None
        except (OSError, ValueError, TypeError):
            return None

    def _remember(self, identity: str) -> None:
        path = self._run_dir / "trackers.json"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            value = {}
        write_json(path, {**value, self._extra: identity})


class Wandb(Hosted):
    """Weights & Biases. Steps are an axis of our own: W&B's counter can't go back after a resume."""

    name = "Weights & Biases"
    _module = _extra = "wandb"

    def _begin(self, event: RunStarted) -> None:
        identity = self._remembered() or uuid.uuid4().hex[:12]
        # Silent and without a question: the terminal belongs to the live view. No code, no git remote, no console log.
        settings = self._client.Settings(
            silent=True, login_timeout=15, console="off", disable_code=True, disable_git=True, save_code=False
        )
        self._run = self._client.init(
            project=self._project,
            name=run_name(event),
            id=identity,
            resume="allow",
            config=self._config,
            dir=str(self._run_dir),
            settings=settings,
        )
        self._remember(identity)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if self._run.url:
            self._tell(Notice(level="info", text=tr("Weights & Biases shows this run at {url}", url=self._run.url)))

    def _log(self, values: dict[str, float], step: int, time: float) -> None:
        self._run.log({**values, "step": step})

    def _end(self) -> None:
        self._run.finish(exit_code=0 if self._ended_well else 1)


class MLflow(Hosted):
    """MLflow, on the server that MLFLOW_TRACKING_URI names."""

    name = "MLflow"
    _module, _extra = "mlflow", "mlflow"

    def _begin(self, event: RunStarted) -> None:
        self._service = self._client.MlflowClient()
        identity = self._remembered()
        if identity is None:
            identity = self._create(event)
            self._remember(identity)
        else:
            self._service.update_run(identity, status="RUNNING")
        self._run = identity

    def _create(self, event: RunStarted) -> str:
        experiment = self._service.get_experiment_by_name(self._project)
        number = experiment.experiment_id if experiment else self._service.create_experiment(self._project)
        identity: str = self._service.create_run(number, run_name=run_name(event)).info.run_id
        parameter = self._client.entities.Param
        # MLflow takes values of at most 500 characters in older servers, and a hundred parameters a call.
        values = [parameter(key, str(value)[:500]) for key, value in flat(self._config).items()]
        for i in range(0, len(values), 100):
            self._service.log_batch(identity, params=values[i : i + 100])
        self._service.log_dict(identity, self._config, "recipe.json")
        return identity

    def _log(self, values: dict[str, float], step: int, time: float) -> None:
        metric = self._client.entities.Metric
        self._service.log_batch(self._run, metrics=[metric(k, v, int(time * 1000), step) for k, v in values.items()])

    def _log_sample(self, event: Sample) -> None:
        name = f"samples/{event.step:06d}-{uuid.uuid5(uuid.NAMESPACE_OID, event.prompt).hex[:8]}.txt"
        self._service.log_text(self._run, f"{event.prompt}\n\n{event.answer}\n", name)

    def _end(self) -> None:
        status = "FINISHED" if self._ended_well else ("FAILED" if self._outcome == "failed" else "KILLED")
        self._service.set_terminated(self._run, status)


class Trackio(Hosted):
    """trackio: a local dashboard with W&B's face."""

    name = "trackio"
    _module = _extra = "trackio"

    def _begin(self, event: RunStarted) -> None:
        # The name is trackio's identity of a run.
        name = self._remembered() or run_name(event)
        self._run = self._client.init(
            project=self._project, name=name, config=self._config, resume="allow", embed=False
        )
        self._remember(name)

    def _log(self, values: dict[str, float], step: int, time: float) -> None:
        self._run.log(values, step=step)

    def _end(self) -> None:
        self._run.finish()
