"""A real S3 API server on loopback (moto's) behind a proxy that breaks answers on request."""

import contextlib
import http.client
import http.server
import threading
import time

from moto.server import ThreadedMotoServer

BUCKET = "corpora"


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests on; `fault(method, path, number)` of the n-th answer to a path may name one:
    500, 403, slow, truncated (the body ends early), short (and its header agrees), flipped."""

    daemon_threads = True

    def __init__(self, server):
        super().__init__(("127.0.0.1", 0), Handler)
        self.server, self.fault = server, lambda method, path, number: None
        self.seen, self.counts, self.lock = [], {}, threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def plan(self, method, path):
        path = path.partition("?")[0]
        with self.lock:
            number = self.counts[method, path] = self.counts.get((method, path), 0) + 1
            self.seen.append((method, path))
        return self.fault(method, path, number)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        fault = self.server.plan(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault in (500, 403):
            return self.answer(fault, {"Content-Length": "0"}, b"")
        origin = http.client.HTTPConnection(*self.server.server, timeout=30)
        origin.request(self.command, self.path, body, dict(self.headers))
        answer = origin.getresponse()
        data = answer.read()
        headers = {k: v for k, v in answer.getheaders() if k.lower() != "transfer-encoding"}
        origin.close()
        if self.command != "HEAD":  # without one the client would wait for the connection's end
            headers = {k: v for k, v in headers.items() if k.lower() != "content-length"}
            headers["Content-Length"] = str(len(data))
        if fault == "slow":
            time.sleep(0.3)
        if fault == "flipped" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "short":
            data = data[: len(data) // 2]
            headers["Content-Length"] = str(len(data))
        if fault == "truncated":
            data = data[: len(data) // 2]
            self.close_connection = True
        self.answer(answer.status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = handle_any

    def answer(self, status, headers, data):
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("date", "server", "connection"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def object_server():
    """The proxy before a fresh server with an empty bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port())
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        request(proxy, "PUT", f"/{BUCKET}")
        yield proxy
    finally:
        proxy.shutdown()
        server.stop()


def request(proxy, method, path, body=b""):
    connection = http.client.HTTPConnection("127.0.0.1", proxy.server_port, timeout=30)
    connection.request(method, path, body)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert answer.status == 200, (method, path, answer.status)


def upload(proxy, folder, prefix):
    """Copies a folder's files to the bucket; returns its URL."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            request(proxy, "PUT", f"/{BUCKET}/{prefix}/{path.name}", path.read_bytes())
    return f"s3://{BUCKET}/{prefix}"
