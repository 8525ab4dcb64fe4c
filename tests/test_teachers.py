"""Teachers: answers survive faults, kills and full disks, nothing is asked twice, and credentialed text stays here."""
import asyncio, json, os, signal, socket, subprocess, sys, textwrap, time
import psutil, pytest
from ehr_r1.inference.teachers import (
    Answer, Recorded, Replay, Request, Server, TeacherError, Vllm, allowed_endpoints, digest, endpoint_of, guard)
from faulty_proxy import JSON, Proxy, parrot, said, some_faults

def ask_for(text, key=None, **more): return Request(key or text, (dict(role='user', content=text),), **more)
def questions(n, **more): return [ask_for(f'question {i}', **more) for i in range(n)]
def server(proxy, **more): return Server(proxy.url, 'parrot', **{'pause': .02, **more})
def by_key(answers): return sorted(((r.key, a) for r, a in answers), key=lambda x: x[0])
def lines(file): return [json.loads(x) for x in file.read_text().splitlines()]

def fails(teacher, requests=None):
    with pytest.raises(TeacherError) as e: list(teacher.ask(requests or questions(1)))
    return str(e.value)

# asking

def test_faults_lose_and_double_nothing(tmp_path):
    with Proxy(fault=some_faults) as clean, Proxy() as plain:
        teacher = Recorded(server(clean), tmp_path/'a.jsonl')
        got = by_key(teacher.ask(questions(200)))
        assert set(clean.faults) == {'429', '500', 'drop', 'half'} and min(clean.faults.values()) > 10
        assert len(got) == 200 == len(clean.delivered) and set(clean.delivered.values()) == {1}
        assert len({x['digest'] for x in lines(tmp_path/'a.jsonl')}) == 200 == len(lines(tmp_path/'a.jsonl'))
        assert got == by_key(server(plain, concurrency=1).ask(questions(200)))
        before = clean.connections
        again = Recorded(server(clean, key_variable='NO_SUCH_KEY'), tmp_path/'a.jsonl') # what is recorded needs no teacher
        assert by_key(again.ask(questions(200))) == got and again.asked == 0 and clean.connections == before

def test_asks_while_a_loop_is_running():
    async def notebook(): return list(server(proxy).ask(questions(3)))
    with Proxy() as proxy: assert len(asyncio.run(notebook())) == 3

def test_never_more_under_way_than_allowed_and_requests_are_taken_lazily():
    taken, most = [], []
    def requests():
        for r in questions(40): taken.append(r); yield r
    with Proxy() as proxy:
        for n, _ in enumerate(server(proxy, concurrency=4).ask(requests())): most.append(len(taken) - n)
        assert max(most) <= 5 and len(taken) == 40

def test_retry_after_is_honoured():
    with Proxy(fault=lambda body, attempt: '429' if attempt == 0 else None, retry_after='1') as proxy:
        assert len(list(server(proxy).ask(questions(1)))) == 1
        assert .99 < proxy.times[1] - proxy.times[0] < 3
    with Proxy(fault=lambda body, attempt: '429', retry_after='90000') as proxy:
        assert '25.0 hours' in fails(server(proxy)) and len(proxy.seen) == 1

def test_waits_double_and_then_it_gives_up():
    with Proxy(fault=lambda body, attempt: '500') as proxy:
        message = fails(server(proxy, tries=5, pause=.1))
        assert 'question 0' in message and '5 times' in message and '500' in message and len(proxy.seen) == 5
        waits = [b - a for a, b in zip(proxy.times, proxy.times[1:])]
        assert all(.05*2**i <= w < .1*2**i + .1 for i, w in enumerate(waits))

def test_silence_is_tried_again():
    def asleep(*args): time.sleep(.8); return parrot(*args)
    with Proxy(asleep) as proxy: assert 'silent for 0.2 s' in fails(server(proxy, tries=2, timeout=.2)) and len(proxy.seen) == 2

def test_nobody_there():
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
    message = fails(Server(f'http://127.0.0.1:{port}/v1', 'parrot', tries=3, pause=.01))
    assert f'127.0.0.1:{port}' in message and '3 times' in message and 'is it up' in message

@pytest.mark.parametrize('reply, words', [
    ((404, JSON, '{"error": {"message": "no model"}}'), "no model 'pigeon'; it has 'parrot', 'crow'"),
    ((401, JSON, '{"error": {"message": "key sk-secret is wrong"}}'), "does not accept the key; key_variable='TEST_KEY'"),
    ((400, JSON, '{"error": {"message": "prompt of 9000 tokens is too long"}}'), "'question 0': Error code: 400"),
    ((200, {'content-type': 'text/html'}, '<html>Welcome</html>'), '<html>Welcome</html>')])
def test_what_will_not_pass_is_an_error_at_once(monkeypatch, reply, words):
    monkeypatch.setenv('TEST_KEY', 'sk-secret')
    with Proxy(lambda method, *rest: parrot(method, *rest) if method == 'GET' else reply) as proxy:
        message = fails(Server(proxy.url, 'pigeon', 'TEST_KEY'))
        assert words in message and 'sk-secret' not in message and len(proxy.seen) == 1
        assert {h['authorization'] for h in proxy.headers} == {'Bearer sk-secret'}

def test_address_without_v1_and_key_without_value(monkeypatch):
    with Proxy(lambda *args: (404, {'content-type': 'text/html'}, '<h1>Not Found</h1>')) as proxy:
        assert 'end in /v1' in fails(server(proxy))
    monkeypatch.delenv('TEST_KEY', raising=False)
    with Proxy() as proxy:
        assert 'TEST_KEY is not set' in fails(Server(proxy.url, 'parrot', 'TEST_KEY')) and proxy.connections == 0

@pytest.mark.parametrize('bad', [
    '127.0.0.1:8000/v1', 'httpserver:80', 'ftp://127.0.0.1/v1', 'http://me:secret@127.0.0.1/v1', 'http://a b/', '',
    'http://127.0.0.1\\@evil.example/v1', 'http://127.0.0.1/v1?to=evil', 'http://127.0.0.1/v1\n'])
def test_doubtful_addresses_are_refused(bad):
    with pytest.raises(TeacherError): Server(bad, 'parrot')

@pytest.mark.parametrize('bad', [
    '{"choices": [', '[1]', '{"choices": []}', '{"choices": [{"message": null}]}', '{"error": "busy"}'])
def test_an_answer_that_is_none_is_asked_for_again(bad):
    def answer(*args): return (200, JSON, bad) if len(proxy.seen) == 1 else parrot(*args)
    with Proxy(answer) as proxy: assert [a.text for _, a in server(proxy).ask(questions(1))] == ['question 0 (seed 0)']
    with Proxy(lambda *args: (200, JSON, bad)) as proxy: assert 'cannot be read' in fails(server(proxy, tries=2))

def test_answers_are_kept_as_they_came(tmp_path):
    texts = dict(empty=None, cut='half a sent', long='räksmörgås 𝛼\u2028\r\n'*400_000, odd='a\x00b\ud800c')
    def answer(method, path, body, headers):
        what = json.loads(body)['messages'][0]['content']
        return said(texts[what], 'length' if what == 'cut' else 'stop', model='parrot-2')
    with Proxy(answer) as proxy:
        teacher = Recorded(server(proxy), tmp_path/'a.jsonl', price=(1., 2.))
        got = dict(by_key(teacher.ask([ask_for(t) for t in texts])))
        spent = (teacher.prompt_tokens + 2*teacher.completion_tokens)/1e6
    assert got['empty'] == Answer('', 3, 1, 'stop', 'parrot-2') and got['cut'].finish == 'length'
    assert got['long'].text == texts['long'] and got['odd'].text == 'a\x00b?c'
    assert dict(by_key(Replay(tmp_path/'a.jsonl').ask([ask_for(t) for t in texts]))) == got
    assert teacher.cost == pytest.approx(spent) and teacher.prompt_tokens == 12 and teacher.answers == 4

def test_usage_may_be_missing():
    with Proxy(lambda *args: (200, JSON, '{"choices": [{"message": {"content": "yes"}}]}')) as proxy:
        assert [a for _, a in server(proxy).ask(questions(1))] == [Answer('yes', 0, 0, '', 'parrot')]

def test_digest_knows_all_that_decides_an_answer():
    base = ask_for('x')
    others = [ask_for('y'), ask_for('x', temperature=.6), ask_for('x', top_p=.9), ask_for('x', max_tokens=5),
              ask_for('x', seed=1), Request('x', (dict(role='system', content='x'),)), Request('x', base.messages*2)]
    assert len({digest('t', 'm', r) for r in [base, *others]} | {digest('u', 'm', base), digest('t', 'n', base)}) == 10
    assert digest('t', 'm', base) == digest('t', 'm', ask_for('x', key='other', case=object()))

# the record

def test_one_question_under_many_keys_is_asked_once(tmp_path):
    with Proxy() as proxy:
        requests = [ask_for(f'q{i % 3}', key=f'k{i}') for i in range(30)]
        teacher = Recorded(server(proxy), tmp_path/'a.jsonl')
        got = by_key(teacher.ask(requests))
        assert len(proxy.seen) == 3 == teacher.asked and [k for k, _ in got] == sorted(r.key for r in requests)
        assert all(a.text.startswith(f'q{int(k[1:]) % 3} ') for k, a in got)
        mixed = [*requests, *questions(5), *requests] # recorded ones before, between and behind those that are asked
        assert len(list(Recorded(server(proxy), tmp_path/'a.jsonl').ask(mixed))) == 65 and len(proxy.seen) == 8

def test_whatever_has_arrived_is_recorded_when_the_reader_leaves(tmp_path):
    with Proxy() as proxy:
        answers = Recorded(server(proxy, concurrency=8), tmp_path/'a.jsonl').ask(questions(50))
        next(answers)
        deadline = time.monotonic() + 10
        while sum(proxy.delivered.values()) < 8 and time.monotonic() < deadline: time.sleep(.01)
        time.sleep(.2)
        answers.close()
        assert len(lines(tmp_path/'a.jsonl')) == 8 == sum(proxy.delivered.values())
        asked = len(proxy.seen)
        assert len(list(Recorded(server(proxy), tmp_path/'a.jsonl').ask(questions(50)))) == 50 and len(proxy.seen) - asked == 42

def test_an_error_does_not_cost_the_answers_before_it(tmp_path):
    def answer(*args): return (400, JSON, '{}') if b'question 30"' in args[2] else parrot(*args)
    with Proxy(answer) as proxy:
        assert 'question 30' in fails(Recorded(server(proxy, concurrency=4), tmp_path/'a.jsonl'), questions(50))
        assert len(lines(tmp_path/'a.jsonl')) >= 27

def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path):
    with Proxy() as proxy:
        whole = tmp_path/'whole.jsonl'
        got = by_key(Recorded(server(proxy), whole).ask(questions(3)))
        content = whole.read_bytes(); last = content.rstrip().rindex(b'\n') + 1
        for cut in range(last, len(content), 37):
            file = tmp_path/f'{cut}.jsonl'; file.write_bytes(content[:cut])
            teacher = Recorded(server(proxy), file)
            assert by_key(teacher.ask(questions(3))) == got and teacher.asked == 1 and len(lines(file)) == 3

def test_a_bad_line_is_named(tmp_path):
    file = tmp_path/'a.jsonl'
    with Proxy() as proxy:
        list(Recorded(server(proxy), file).ask(questions(3)))
        good = file.read_text().splitlines()
        for bad in ('{"digest": ', '[]', json.dumps({k: v for k, v in json.loads(good[1]).items() if k != 'text'})):
            file.write_text('\n'.join([good[0], bad, good[2]]) + '\n')
            assert 'line 2' in fails(Recorded(server(proxy), file))

def test_an_unwritable_record_is_found_out_before_anything_is_asked(tmp_path):
    (tmp_path/'file').write_text('')
    (tmp_path/'folder.jsonl').mkdir()
    with Proxy() as proxy:
        for file in (tmp_path/'file'/'a.jsonl', tmp_path/'folder.jsonl'):
            assert 'cannot record' in fails(Recorded(server(proxy), file)) and proxy.connections == 0
        first = Recorded(server(proxy), tmp_path/'a.jsonl').ask(questions(9)); next(first)
        second = Recorded(server(proxy), tmp_path/'a.jsonl')
        assert 'another run' in fails(second, [ask_for('new')])
        first.close()
        assert 'new' not in proxy.asked() and len(list(second.ask([ask_for('new')]))) == 1

def test_replay_names_what_it_does_not_hold(tmp_path):
    file = tmp_path/'a.jsonl'
    with pytest.raises(TeacherError, match='Recorded'): Replay(file)
    with Proxy() as proxy:
        first = by_key(Recorded(server(proxy), file).ask(questions(2)))
        assert "'question 2'" in fails(Replay(file), questions(3))
        assert 'question 0' in fails(Replay(file), questions(1, temperature=.7))
        second = by_key(Recorded(server(proxy, name='other'), file).ask(questions(2)))
    with pytest.raises(TeacherError, match='other, parrot'): Replay(file)
    assert by_key(Replay(file, 'parrot').ask(questions(2))) == first == second == by_key(Replay(file, 'other').ask(questions(2)))
    assert Replay(file, 'other').local and Recorded(Replay(file, 'other'), tmp_path/'b.jsonl').model == 'parrot'

def test_a_teacher_that_knows_of_no_record_is_recorded_too(tmp_path):
    class Plain:
        name, local = 'plain', True
        def ask(self, requests):
            for r in requests: yield r, Answer(r.case.upper(), 0, 0, 'stop', 'plain')
    asked = list(Recorded(Plain(), tmp_path/'a.jsonl').ask([ask_for('a', case='b')]))
    assert [a.text for _, a in asked] == ['B'] and list(Replay(tmp_path/'a.jsonl').ask([ask_for('a')])) == asked

# a process of its own: killed, interrupted, out of space, and the network that the tests may not use

SCRIPT = textwrap.dedent('''
    import json, resource, sys
    from ehr_r1.synthesis.teachers import Recorded, Request, Server, TeacherError, allowed_endpoints, guard
    def main(url, model, file, n, limit=None, dataset=None):
        if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        teacher = Recorded(Server(url, model, pause=.02, concurrency=4), file)
        requests = [Request(f'question {i}', (dict(role='user', content=f'question {i}'),), max_tokens=16) for i in range(n)]
        try:
            if dataset: guard(teacher, dataset, 'credentialed', allowed_endpoints())
            for r, a in teacher.ask(requests): pass
        except TeacherError as e: sys.exit(f'{type(e).__name__}: {e}')
    main(**json.loads(sys.argv[1]))
''')

def start(**args):
    return subprocess.Popen([sys.executable, '-c', SCRIPT, json.dumps(args)], stderr=subprocess.PIPE, text=True,
                            env={**os.environ, 'TQDM_DISABLE': '1'})

def stopped(process, file, n, how):
    "Send the signal when the record holds n answers; returns what the process said."
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_bytes().count(b'\n') < n:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(.005)
    process.send_signal(how)
    return process.communicate(timeout=20)[1]

def resumed(proxy, file, n, model='parrot'):
    "Ask the rest; nothing that stands in the record is asked again."
    kept = {x['request'] for x in lines(file) if x}
    before = len(proxy.seen)
    teacher = Recorded(Server(proxy.url, model, pause=.02), file)
    assert len(list(teacher.ask(questions(n, max_tokens=16)))) == n
    assert not kept & set(proxy.asked()[before:]) and teacher.asked == n - len(kept) > 0
    assert len({x['digest'] for x in lines(file)}) == n == len(lines(file))
    return kept

def test_interrupted_run_ends_and_keeps_what_came(tmp_path):
    with Proxy() as proxy:
        file = tmp_path/'a.jsonl'
        words = stopped(start(url=proxy.url, model='parrot', file=str(file), n=2000), file, 50, signal.SIGINT)
        assert 'KeyboardInterrupt' in words
        lost = sum(proxy.delivered.values()) - len(lines(file))
        assert 0 <= lost <= 4 # those under way when the signal came
        resumed(proxy, file, 2000)

def test_full_disk_ends_the_run_with_whole_lines(tmp_path):
    file = tmp_path/'a.jsonl'
    with Proxy() as proxy:
        words = start(url=proxy.url, model='parrot', file=str(file), n=100, limit=5000).communicate(timeout=60)[1]
        assert 'TeacherError: cannot record answers' in words and 'File too large' in words
        assert 10 < len(lines(file)) < 100 and file.read_bytes().endswith(b'}\n')
        resumed(proxy, file, 100)

@pytest.fixture(scope='module')
def outer():
    "An address of this machine that is not loopback; where there is none, the one that means all of them."
    found = [a.address for net in psutil.net_if_addrs().values() for a in net if a.family == socket.AF_INET]
    return next((a for a in found if not a.startswith('127.')), '0.0.0.0')

def test_credentialed_text_goes_to_a_named_host_only(tmp_path, outer, monkeypatch):
    with Proxy(host=outer) as proxy:
        args = dict(url=proxy.url, model='parrot', file=str(tmp_path/'a.jsonl'), n=3, dataset='mimic-iv-3.1')
        for allow in ('', f'mimic-iv-2.2@{outer}:{proxy.port}', f'mimic-iv-3.1@{outer}', f'mimic-iv-3.1@127.0.0.1:{proxy.port}'):
            monkeypatch.setenv('EHR_R1_ALLOW', allow)
            words = start(**args).communicate(timeout=60)[1]
            assert words.startswith('Refused: mimic-iv-3.1') and f'EHR_R1_ALLOW=mimic-iv-3.1@{outer}:{proxy.port}' in words
        assert proxy.connections == 0 and not (tmp_path/'a.jsonl').exists()
        monkeypatch.setenv('EHR_R1_ALLOW', f'other@example.org, mimic-iv-3.1@{outer}:{proxy.port}')
        assert start(**args).communicate(timeout=60)[1] == '' and len(proxy.delivered) == 3

# who may be told what

@pytest.mark.parametrize('address, local', [
    *((a, True) for a in ('http://127.0.0.1:8000/v1', 'http://localhost/v1', 'http://LOCALHOST:1/v1', 'https://[::1]:8443/v1',
                          '127.9.9.9:80')),
    *((a, False) for a in ('http://0.0.0.0:8000/v1', 'http://[::]:8000/v1', 'http://10.0.0.1/v1', 'http://127.1/v1',
                           'api.example.org:8443', 'http://localhost.example.org/v1', 'http://127.0.0.1.example.org/v1'))])
def test_only_loopback_is_local(address, local): assert endpoint_of(address)[1] is local

def test_guard_takes_addresses_and_teachers(monkeypatch):
    far = Server('https://API.example.org/v1', 'x')
    for teacher in ('https://api.example.org:443/v1', far, Recorded(far, 'a')):
        guard(teacher, 'hospital', 'open', ())
        guard(teacher, 'mimic-iv-3.1', 'credentialed', ('MIMIC-IV-3.1@api.example.org',))
        for allowed in ((), ('mimic-iv-3.1@example.org',), ('mimic-iv@api.example.org',), ('*@api.example.org',)):
            with pytest.raises(PermissionError): guard(teacher, 'mimic-iv-3.1', 'credentialed', allowed)
        with pytest.raises(ValueError): guard(teacher, 'mimic-iv-3.1', 'secret', ())
    monkeypatch.setenv('EHR_R1_ALLOW', ' a@b:1 ,, c@d ')
    assert allowed_endpoints() == ('a@b:1', 'c@d')
    for bad in ('api.example.org', 'a@', '@b'):
        monkeypatch.setenv('EHR_R1_ALLOW', bad)
        with pytest.raises(TeacherError, match='EHR_R1_ALLOW'): allowed_endpoints()

def test_redirects_are_not_followed():
    with Proxy() as stranger, Proxy(lambda *args: (status, {'location': stranger.url + '/chat/completions'}, '')) as proxy:
        for status in (301, 302, 307, 308):
            assert stranger.url in fails(server(proxy))
        assert stranger.connections == 0 and len(proxy.seen) == 4

def test_this_machine_is_not_reached_through_a_proxy(monkeypatch):
    for name in ('NO_PROXY', 'no_proxy'): monkeypatch.delenv(name, raising=False)
    with Proxy() as outside, Proxy() as here:
        for name in ('HTTP_PROXY', 'http_proxy', 'ALL_PROXY'): monkeypatch.setenv(name, f'http://127.0.0.1:{outside.port}')
        assert len(list(server(here).ask(questions(2)))) == 2 and outside.connections == 0
        assert len(list(Server('http://teacher.invalid/v1', 'parrot').ask(questions(2)))) == 2 == len(outside.seen) # they do work

def test_vllm_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, 'vllm', None)
    assert 'install vllm' in fails(Vllm('a/model')) and Vllm('a/model').local and Vllm('a/model').name == 'model'
