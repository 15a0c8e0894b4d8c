"""A loopback server of OpenAI's chat interface with configurable behavior, which records its requests."""

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Behaviour:
    """One answer: after `delay` seconds, a status with a body; or a dropped connection."""

    content: str | None = "Score: 5"
    status: int = 200
    headers: dict = field(default_factory=dict)
    body: str | None = None
    delay: float = 0.0
    drop: bool = False


@dataclass
class Log:
    """Received requests in order of arrival: text, headers and fields."""

    texts: list = field(default_factory=list)
    answered: list = field(default_factory=list)
    headers: list = field(default_factory=list)
    bodies: list = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0


@contextmanager
def judge_server(behave):
    """`behave(text, number)` gives the Behaviour for a text that is asked for the `number`-th time, from 0.

    Yields (base URL, Log).
    """
    log, lock = Log(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            with lock:
                number = log.texts.count(text)
                log.texts.append(text)
                log.headers.append(dict(self.headers))
                log.bodies.append(body)
                log.at_once += 1
                log.most_at_once = max(log.most_at_once, log.at_once)
            answer = behave(text, number)
            stop.wait(answer.delay)
            with lock:
                log.at_once -= 1
            self.close_connection = True
            if answer.drop:
                return
            reply = {"choices": [{"message": {"role": "assistant", "content": answer.content}}]}
            data = (json.dumps(reply) if answer.body is None else answer.body).encode()
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(data)), "Connection": "close", **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            if answer.status == 200:
                with lock:
                    log.answered.append(text)

    stop = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", log
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join()
