"""Questions to teachers for tests, and a process that asks them: to be killed, interrupted, starved of space."""
import json
import os
import subprocess
import sys
import textwrap
import time

import pytest

from ehr_r1.inference.endpoints import InferenceError
from ehr_r1.inference.recorded import Recorded
from ehr_r1.inference.servers import Server
from ehr_r1.inference.teachers import Request


def ask_for(text, key=None, **more):
    "One request."
    return Request(key or text, (dict(role='user', content=text),), **more)


def questions(n, **more):
    "Requests of their own."
    return [ask_for(f'question {i}', **more) for i in range(n)]


def server(proxy, **more):
    "A teacher behind a proxy."
    return Server(proxy.url, 'parrot', **more)


def recorded(proxy, file, **more):
    "The same, its answers kept in a file."
    return Recorded(server(proxy, **more), file)


def by_key(answers):
    "(key, reply), sorted by key."
    pairs = [(request.key, reply) for request, reply in answers]
    return sorted(pairs, key=lambda pair: pair[0])


def lines(file):
    "What stands in a file of JSON Lines."
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def fails(teacher, requests=None):
    "What a teacher says when it fails."
    with pytest.raises(InferenceError) as error:
        list(teacher.ask(requests or questions(1)))
    return str(error.value)


SCRIPT = textwrap.dedent('''
    import json
    import resource
    import sys
    from ehr_r1.inference.endpoints import InferenceError, allowed_endpoints, guard
    from ehr_r1.inference.recorded import Recorded
    from ehr_r1.inference.servers import Server
    sys.path.insert(0, sys.argv[2])
    from teacher_runs import questions

    def main(url, model, file, n, limit=None, dataset=None):
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        teacher = Recorded(Server(url, model, concurrency=4), file)
        try:
            if dataset:
                guard(teacher, dataset, 'credentialed', allowed_endpoints())
            for request, reply in teacher.ask(questions(n, max_tokens=16)):
                pass
        except InferenceError as e:
            sys.exit(f'{type(e).__name__}: {e}')

    main(**json.loads(sys.argv[1]))
''')


def start(**arguments):
    "A process that asks a server and records its answers; arguments of `main` above."
    command = [sys.executable, '-c', SCRIPT, json.dumps(arguments), os.path.dirname(__file__)]
    quiet = {**os.environ, 'TQDM_DISABLE': '1'}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=quiet)


def ended(process, seconds=60):
    "What a process says on its standard error until it ends."
    return process.communicate(timeout=seconds)[1]


def stopped(process, file, n, how):
    "Send the signal when the record holds n answers; returns what the process said."
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_bytes().count(b'\n') < n:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(.005)
    process.send_signal(how)
    return ended(process, 20)


def resumed(proxy, file, n, model='parrot'):
    "Ask the rest, and hold that nothing on file is asked again; returns the keys that were on file."
    kept = {line['request'] for line in whole_lines(file)}
    before = len(proxy.seen)
    teacher = Recorded(Server(proxy.url, model), file)
    answers = list(teacher.ask(questions(n, max_tokens=16)))
    assert len(answers) == n
    assert not kept & set(proxy.asked()[before:])
    assert teacher.tally.asked == n - len(kept) > 0
    assert_each_once(file, n)
    return kept


def whole_lines(file):
    "What stands in a file whose last line may be torn."
    content = file.read_bytes()
    end = content.rfind(b'\n') + 1
    return [json.loads(line) for line in content[:end].splitlines()]


def assert_each_once(file, n):
    "A record holds n answers, none of them twice."
    digests = [line['digest'] for line in lines(file)]
    assert len(digests) == len(set(digests)) == n
