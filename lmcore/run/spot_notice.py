"""Reads the cloud's notice that it will take this machine away from the metadata service (``guard.spot_notice``).

Most tools (Slurm, Kubernetes, SkyPilot) turn such a notice into SIGTERM, but nothing does so on a bare spot machine. There a
thread asks the service at its documented address every 5 s, by plain HTTP and without a proxy. ``LMCORE_METADATA_URL`` sets
another address.

Example::

    watch = SpotWatch("aws", on_notice=lambda seconds: print(f"{seconds:.0f} s left"), note=print)
    watch.start()
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Final, final

POLL_SECONDS: Final = 5.0
TIMEOUT_SECONDS: Final = 2.0
_ADDRESSES: Final = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}
_SECONDS: Final = {"aws": 120.0, "gcp": 30.0, "azure": 30.0}
"""Time from the notice to the end, according to the documentation of each cloud."""


@final
class SpotWatch:
    """Asks one metadata service in its own thread until there is a notice.

    Args:
        cloud: ``aws``, ``gcp`` or ``azure``.
        on_notice: called once, on that thread, with the seconds that are left.
        note: called once, on that thread, with a line if the service does not answer.
        environ: for ``LMCORE_METADATA_URL``.
    """

    def __init__(
        self,
        cloud: str,
        *,
        on_notice: Callable[[float], None],
        note: Callable[[str], None],
        poll_seconds: float = POLL_SECONDS,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        found = (os.environ if environ is None else environ).get("LMCORE_METADATA_URL")
        self._cloud, self._url = cloud, (found or _ADDRESSES[cloud]).rstrip("/")
        self._on_notice, self._note, self._poll_seconds = on_notice, note, poll_seconds
        self._ask = {"aws": self._aws, "gcp": self._gcp, "azure": self._azure}[cloud]
        # A proxy from the environment cannot reach this machine's metadata service.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="spot notice", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        said = False
        while True:
            try:
                left = self._ask()
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                if not said:
                    said = True
                    self._note(
                        f"warning: guard.spot_notice {self._cloud}: the metadata service at {self._url} gives no answer "
                        f"({error}); asking again every {self._poll_seconds:.0f} s"
                    )
            else:
                if left is not None:
                    self._on_notice(left)
                    return
            if self._stop.wait(self._poll_seconds):
                return

    # ---- each cloud: the seconds that are left, None without a notice

    def _aws(self) -> float | None:
        hour = {"X-aws-ec2-metadata-token-ttl-seconds": "3600"}
        token, _ = self._request("/latest/api/token", hour, method="PUT")
        headers = {"X-aws-ec2-metadata-token": token.decode()}
        try:
            body, now = self._request("/latest/meta-data/spot/instance-action", headers)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        with contextlib.suppress(ValueError, KeyError, TypeError):  # it counts even with an invalid time
            return self._until(datetime.datetime.fromisoformat(json.loads(body)["time"]), now)
        return _SECONDS["aws"]

    def _gcp(self) -> float | None:
        body, _ = self._request("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        return _SECONDS["gcp"] if body.strip().upper() == b"TRUE" else None

    def _azure(self) -> float | None:
        headers = {"Metadata": "true"}
        name, _ = self._request("/metadata/instance/compute/name?api-version=2021-02-01&format=text", headers)
        body, now = self._request("/metadata/scheduledevents?api-version=2020-07-01", headers)
        for event in json.loads(body)["Events"]:
            # Every machine of a scale set sees the events of all of them.
            mine = name.decode().strip() in event["Resources"]
            if mine and event["EventType"] in ("Preempt", "Terminate"):
                # Once the event has started, it has no time.
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    return self._until(email.utils.parsedate_to_datetime(event["NotBefore"]), now)
                return 0.0
        return None

    def _until(self, moment: datetime.datetime, now: datetime.datetime) -> float:
        return min(max(0.0, (moment - now).total_seconds()), _SECONDS[self._cloud])

    def _request(
        self, path: str, headers: dict[str, str], *, method: str = "GET"
    ) -> tuple[bytes, datetime.datetime]:
        """The body, and the time by the service's clock, because this machine's clock may be wrong."""
        request = urllib.request.Request(self._url + path, headers=headers, method=method)
        with self._opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
            body: Any = answer.read(1 << 20)
            date = answer.headers.get("Date")
        now = email.utils.parsedate_to_datetime(date) if date else datetime.datetime.now(datetime.UTC)
        return body, now
