"""A loaded model and the server's settings in, the guarded app and its ends out. The one place that knows all parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pixtral_cli.api import Pixtral
from pixtral_cli.engine.driver import Driver
from pixtral_cli.server.app import create_app
from pixtral_cli.server.bodies import MAX_BODY_BYTES
from pixtral_cli.server.guard import guarded
from pixtral_cli.server.lifecycle import Loaded
from pixtral_cli.server.pictures import GuardedPictures, PicturePolicy
from pixtral_cli.server.service import Limits, Service


@dataclass(frozen=True)
class Settings:
    """What the flags say of a server; `names` are the model's in requests, `defaults` options of generation."""

    host: str
    names: tuple[str, ...]
    keys: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    max_body_bytes: int = MAX_BODY_BYTES
    pictures: PicturePolicy = field(default_factory=PicturePolicy)


def assemble(model: Pixtral, settings: Settings) -> Loaded:
    """Put the model behind HTTP; from now on its engine runs on a thread of its own."""
    model.processor.open_picture = GuardedPictures(settings.pictures).opened
    driver = Driver(model.engine)
    service = Service(model, driver, settings.names, settings.defaults, settings.limits)
    app = guarded(create_app(service), host=settings.host, keys=settings.keys, max_body_bytes=settings.max_body_bytes)

    def stop(seconds: float) -> bool:
        return driver.stop(seconds) and not service.preparing

    return Loaded(app, service.drain, stop, service.metrics.answered)
