"""The metadata services of three clouds on loopback, as far as their notices to spot machines go.

Example::

    with serving("aws") as service:            # service.url for LMCORE_METADATA_URL
        service.seconds_left = 90
"""

from __future__ import annotations

import contextlib
import datetime
import http.server
import json
import threading
from collections.abc import Iterator
from email.utils import format_datetime

AZURE_NAME = "spot-machine_3"


class MetadataService:
    """What :func:`serving` yields.

    Attributes:
        seconds_left: of the notice; ``None`` for no notice.
        others: the notice is for another machine of a scale set (azure).
        broken: answer 500.
        skew_seconds: how far the clock of the service is ahead.
        asked: number of requests.
    """

    def __init__(self, cloud: str) -> None:
        self.cloud = cloud
        self.url = ""
        self.seconds_left: float | None = None
        self.others = self.broken = False
        self.skew_seconds = 0.0
        self.asked = 0

    def now(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self.skew_seconds)

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        """Status and body; what the service of this cloud does not know is 404, what lacks a header 401 or 403."""
        if path == "/test/notice":  # from a process that the test has started
            self.seconds_left = 25.0
            return 200, ""
        if self.broken:
            return 500, ""
        left = self.seconds_left
        moment = self.now() + datetime.timedelta(seconds=left or 0)
        if self.cloud == "aws":
            if (method, path) == ("PUT", "/latest/api/token"):
                return (200, "token-1") if "x-aws-ec2-metadata-token-ttl-seconds" in headers else (400, "")
            if headers.get("x-aws-ec2-metadata-token") != "token-1":
                return 401, ""
            if path == "/latest/meta-data/spot/instance-action" and left is not None:
                return 200, json.dumps({"action": "terminate", "time": f"{moment:%Y-%m-%dT%H:%M:%SZ}"})
        elif self.cloud == "gcp" and path == "/computeMetadata/v1/instance/preempted":
            if headers.get("metadata-flavor") != "Google":
                return 403, ""
            return 200, "FALSE" if left is None else "TRUE"
        elif self.cloud == "azure" and headers.get("metadata") == "true":
            if path.startswith("/metadata/instance/compute/name?") and "format=text" in path:
                return 200, AZURE_NAME
            if path.startswith("/metadata/scheduledevents?"):
                event = {
                    "EventId": "1",
                    "EventType": "Preempt",
                    "ResourceType": "VirtualMachine",
                    "Resources": ["spot-machine_4" if self.others else AZURE_NAME],
                    "EventStatus": "Scheduled",
                    "NotBefore": format_datetime(moment, usegmt=True) if left else "",
                }
                return 200, json.dumps({"DocumentIncarnation": 1, "Events": [] if left is None else [event]})
        return 404, ""


@contextlib.contextmanager
def serving(cloud: str) -> Iterator[MetadataService]:
    service = MetadataService(cloud)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            service.asked += 1
            headers = {name.lower(): value for name, value in self.headers.items()}
            code, body = service.answer(self.command, self.path, headers)
            self.send_response_only(code)
            self.send_header("Date", format_datetime(service.now(), usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    service.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
