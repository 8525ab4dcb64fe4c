"""An HTTP server for tests that refuses, fails and drops on purpose, and counts what it was sent and what it delivered whole."""
import hashlib, http.client, json, socket, struct, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

JSON = {'content-type': 'application/json'}

def said(text, finish='stop', model='parrot'):
    "A chat completion."
    usage = dict(prompt_tokens=3, completion_tokens=len(text or '') // 4 + 1)
    choice = dict(finish_reason=finish, message=dict(role='assistant', content=text))
    return 200, JSON, json.dumps(dict(model=model, usage=usage, choices=[choice]))

def parrot(method, path, body, headers):
    "A teacher that says what it was told, after a moment."
    if method == 'GET': return 200, JSON, json.dumps(dict(object='list', data=[dict(id='parrot'), dict(id='crow')]))
    time.sleep(.005)
    asked = json.loads(body)
    return said(f"{asked['messages'][-1]['content']} (seed {asked['seed']})")

def forward(url):
    "An answer function that asks another server."
    to = urlsplit(url)
    def answer(method, path, body, headers):
        there = http.client.HTTPConnection(to.hostname, to.port, timeout=120)
        there.request(method, path, body, {k: v for k, v in headers.items() if k.lower() not in ('host', 'connection')})
        r = there.getresponse(); content = r.read(); there.close()
        return r.status, {'content-type': r.getheader('content-type')}, content
    return answer

FAULTS = ('429', '500', 'drop', 'half')

def some_faults(body, attempt):
    "None, one or two faults before the answer, as the request's own bytes say."
    h = hashlib.blake2b(body, digest_size=2).digest()
    return FAULTS[(h[1] + attempt) % 4] if attempt < h[0] % 3 else None

class Proxy:
    "Context manager; `answer` is a function of (method, path, body, headers), `fault` of (body, attempt)."
    def __init__(self, answer=parrot, fault=lambda body, attempt: None, host='127.0.0.1', retry_after='0.05'):
        self.answer, self.fault, self.retry_after = answer, fault, retry_after
        self.connections, self.seen, self.times, self.delivered, self.faults = 0, [], [], Counter(), Counter()
        self.headers, self._lock, proxy = [], threading.Lock(), self
        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = 'HTTP/1.1', True
            def log_message(self, *args): pass
            def do_GET(self): proxy._handle(self)
            def do_POST(self): proxy._handle(self)
        class Listener(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128
            def get_request(self):
                proxy.connections += 1
                return super().get_request()
            def handle_error(self, *args): pass # a client that was killed
        self.server = Listener((host, 0), Handler)
        self.port = self.server.server_port
        self.url = f'http://{host}:{self.port}/v1'
    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(.05,), daemon=True).start()
        return self
    def __exit__(self, *args):
        self.server.shutdown(); self.server.server_close()

    def asked(self): # what the messages of the requests said last
        return [json.loads(b)['messages'][-1]['content'] for b in self.seen]

    def _handle(self, h):
        size = int(h.headers.get('content-length', 0))
        body = h.rfile.read(size)
        if len(body) < size: h.close_connection = True; return # the client has gone
        fault = None
        if h.command == 'POST':
            with self._lock:
                fault = self.fault(body, self.seen.count(body))
                self.seen.append(body); self.times.append(time.monotonic()); self.headers.append(dict(h.headers))
                if fault: self.faults[fault] += 1
        if fault == 'drop': return self._reset(h)
        if fault == '429': reply = 429, JSON | {'retry-after': self.retry_after}, '{"error": {"message": "too many"}}'
        elif fault == '500': reply = 500, {'content-type': 'text/html'}, '<h1>Oops</h1>'
        else: reply = self.answer(h.command, h.path, body, h.headers)
        status, headers, content = reply
        content = content.encode() if isinstance(content, str) else content
        h.send_response(status)
        for k, v in headers.items(): h.send_header(k, v)
        h.send_header('content-length', str(len(content))); h.end_headers()
        if fault == 'half':
            h.wfile.write(content[:len(content)//2]); h.wfile.flush()
            return self._reset(h)
        h.wfile.write(content); h.wfile.flush()
        if h.command == 'POST' and status == 200:
            with self._lock: self.delivered[body] += 1

    def _reset(self, h):
        h.close_connection = True
        h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)) # a reset instead of a polite end
        h.connection.close(); h.rfile.close()
