"""An HTTP server for tests that refuses, fails and drops on purpose, and counts what it delivered whole."""
import hashlib
import http.client
import json
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

JSON = {'content-type': 'application/json'}
FAULTS = ('429', '500', 'drop', 'half')
OWN_HEADERS = ('host', 'connection')  # of each connection

# what is answered: functions of (method, path, body, headers) that give (status, headers, content)


def said(text, finish='stop', model='parrot'):
    "A chat completion."
    usage = dict(prompt_tokens=3, completion_tokens=len(text or '') // 4 + 1)
    choice = dict(finish_reason=finish, message=dict(role='assistant', content=text))
    return 200, JSON, json.dumps(dict(model=model, usage=usage, choices=[choice]))


def parrot(method, path, body, headers):
    "A teacher that says what it was told, after a moment."
    if method == 'GET':
        models = [dict(id='parrot'), dict(id='crow')]
        return 200, JSON, json.dumps(dict(object='list', data=models))
    time.sleep(.005)
    asked = json.loads(body)
    return said(f"{asked['messages'][-1]['content']} (seed {asked['seed']})")


def forward(url):
    "An answer function that asks another server."
    to = urlsplit(url)

    def answer(method, path, body, headers):
        there = http.client.HTTPConnection(to.hostname, to.port, timeout=120)
        passed_on = {name: headers[name] for name in headers if name.lower() not in OWN_HEADERS}
        there.request(method, path, body, passed_on)
        reply = there.getresponse()
        content = reply.read()
        there.close()
        return reply.status, {'content-type': reply.getheader('content-type')}, content
    return answer


# what goes wrong: functions of (body, attempt) that give a name of `FAULTS` or None


def no_faults(body, attempt):
    "Nothing goes wrong."
    return None


def always(fault):
    "The same fault at every attempt."
    return lambda body, attempt: fault


def at_first(fault):
    "A fault at the first attempt of each request."
    return lambda body, attempt: fault if attempt == 0 else None


def some_faults(body, attempt):
    "None, one or two faults before the answer, as the request's own bytes say."
    how_many, which = hashlib.blake2b(body, digest_size=2).digest()
    return FAULTS[(which + attempt) % 4] if attempt < how_many % 3 else None


class Handler(BaseHTTPRequestHandler):
    "Hands each request to the proxy."
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.proxy.handle(self)

    def do_POST(self):
        self.server.proxy.handle(self)


class Listener(ThreadingHTTPServer):
    "Counts connections."
    daemon_threads = True
    request_queue_size = 128

    def get_request(self):
        self.proxy.connections += 1
        return super().get_request()

    def handle_error(self, *args):  # a client that was killed
        pass


class Proxy:
    "Context manager; `answer` and `fault` are functions as above."
    def __init__(self, answer=parrot, fault=no_faults, host='127.0.0.1', retry_after='0.05'):
        self.answer, self.fault, self.retry_after = answer, fault, retry_after
        self.connections = 0
        self.seen = []             # bodies of POST requests
        self.times = []            # when they came, in seconds
        self.headers = []          # that came with them
        self.faults = Counter()    # that were made
        self.delivered = Counter() # body -> how often it got a whole answer
        self._lock = threading.Lock()
        self.server = Listener((host, 0), Handler)
        self.server.proxy = self
        self.port = self.server.server_port
        self.url = f'http://{host}:{self.port}/v1'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(.05,), daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()

    def asked(self):
        "What the messages of the requests said last."
        return [json.loads(body)['messages'][-1]['content'] for body in self.seen]

    def handle(self, handler):
        "Answer one request, or do not."
        size = int(handler.headers.get('content-length', 0))
        body = handler.rfile.read(size)
        if len(body) < size:  # the client has gone
            handler.close_connection = True
            return
        posted = handler.command == 'POST'
        fault = self._note(body, handler.headers) if posted else None
        if fault == 'drop':
            return reset(handler)
        status, headers, content = self._reply(fault, handler, body)
        content = content.encode() if isinstance(content, str) else content
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header('content-length', str(len(content)))
        handler.end_headers()
        if fault == 'half':
            handler.wfile.write(content[:len(content)//2])
            handler.wfile.flush()
            return reset(handler)
        whole = posted and status == 200
        if whole:  # counted first: who has read the last byte may look at once
            self._count(body, 1)
        try:
            handler.wfile.write(content)
            handler.wfile.flush()
        except OSError:
            if whole:
                self._count(body, -1)
            raise

    def _count(self, body, change):
        with self._lock:
            self.delivered[body] += change

    def _note(self, body, headers):
        "Keep what came, and say what goes wrong with it."
        with self._lock:
            fault = self.fault(body, self.seen.count(body))
            self.seen.append(body)
            self.times.append(time.monotonic())
            self.headers.append(dict(headers))
            if fault:
                self.faults[fault] += 1
            return fault

    def _reply(self, fault, handler, body):
        if fault == '429':
            return 429, JSON | {'retry-after': self.retry_after}, '{"error": {"message": "too many"}}'
        if fault == '500':
            return 500, {'content-type': 'text/html'}, '<h1>Oops</h1>'
        return self.answer(handler.command, handler.path, body, handler.headers)


def reset(handler):
    "End a connection with a reset instead of a polite end."
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    handler.connection.close()
    handler.rfile.close()
