"""The outer HTTP application, over models' applications that a test makes."""

from __future__ import annotations

from typing import Any

from crosspool.config.deployment import Deployment
from crosspool.server.app import App
from crosspool.server.model_apps import ModelApps
from crosspool.server.state import State


def http_app(deployment: Deployment, state: State, scheduler: Any) -> App:
    """The application over the models of ``state``, beside which none can be made. Where all have
    their names, they can leave."""

    def make(deployment: Deployment, number: int) -> Any:
        raise AssertionError(f"model {number} of {deployment.names} has no application")

    models = list(state.models.values())
    apps = ModelApps(deployment, state, scheduler, make)
    app = App(deployment, state, scheduler, apps)
    if all(hasattr(model, "name") for model in models):
        apps.begin(dict(enumerate(models)))
    return app
