"""What the routes share, made once by the factory."""

from dataclasses import dataclass

from flask import current_app
from redis import Redis

from inference.body import Intake
from inference.loaded import LoadedModels
from inference.metrics import Meters
from inference.shadow import Shadow
from inference.statistics import Statistics
from inference.v2.shared_memory import Regions
from shared.ledger import Ledger
from shared.settings import Settings


@dataclass(frozen=True)
class Api:
    settings: Settings
    redis: "Redis"
    ledger: Ledger
    loaded: LoadedModels
    meters: Meters
    intake: Intake
    statistics: Statistics
    regions: Regions
    shadow: Shadow


def api() -> Api:
    context: Api = current_app.extensions["lanner"]
    return context
