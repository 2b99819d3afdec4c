"""The package and command that talks to Lanner over HTTP.

    from lanner import Client
    client = Client("http://127.0.0.1:8000")
    source = client.upload("flowers/")["source"]
    pipeline = client.submit_pipeline(source, name="flowers")
    for job in client.follow(pipeline["jobs"]["optimize"]): ...
    client.predict("flowers", "rose.jpg")
"""

from lanner.client import Client
from lanner.errors import LannerError

__all__ = ["Client", "LannerError"]
