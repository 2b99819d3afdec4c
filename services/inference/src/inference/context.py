"""What the routes share, made once by the factory."""

from dataclasses import dataclass
from typing import Any

from flask import current_app
from redis import Redis

from inference.body import Intake
from inference.loaded import LOAD_S, LoadedModels
from inference.metrics import Meters
from inference.peers import Actions, Peers
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
    peers: Peers


    def everywhere(self, action: str, *args: Any) -> None:
        """Do it in this process, then in the others: unload, load, register, unregister. Raises as it does."""
        self.actions()[action](*args)
        self.peers.ask(action, *args, patience_s=LOAD_S)

    def actions(self) -> Actions:
        """What the processes of this API ask one another."""
        return {"unload": self.loaded.unload, "load": self.loaded.load, "register": self.regions.register,
                "unregister": self.regions.unregister, "figures": self.statistics.snapshot,
                "families": self.meters.families, "shadow": self.shadow.found}


def api() -> Api:
    context: Api = current_app.extensions["lanner"]
    return context
