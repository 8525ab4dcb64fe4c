"""Teachers: answers survive faults, kills and full disks, and nothing is asked twice."""
import asyncio
import json
import signal
import socket
import sys
import time

import pytest
from faulty_proxy import JSON, Proxy, always, at_first, parrot, said, some_faults
from teacher_runs import (
    ask_for,
    assert_each_once,
    by_key,
    ended,
    fails,
    lines,
    questions,
    recorded,
    resumed,
    server,
    start,
    stopped,
)

from ehr_r1.inference.endpoints import InferenceError
from ehr_r1.inference.recorded import Recorded, Replay, cost, request_digest
from ehr_r1.inference.servers import Server
from ehr_r1.inference.teachers import Reply, Request
from ehr_r1.inference.vllm import Vllm


@pytest.fixture
def proxy():
    "A parrot that never fails."
    with Proxy() as proxy:
        yield proxy


@pytest.fixture
def file(tmp_path):
    "Where a record shall stand."
    return tmp_path/'a.jsonl'


# asking


def test_faults_lose_and_double_nothing(proxy, file):
    with Proxy(fault=some_faults) as faulty:
        got = by_key(recorded(faulty, file).ask(questions(200)))
        assert set(faulty.faults) == {'429', '500', 'drop', 'half'}
        assert min(faulty.faults.values()) > 10
        assert len(got) == 200 == len(faulty.delivered)
        assert set(faulty.delivered.values()) == {1}
    assert_each_once(file, 200)
    assert got == by_key(server(proxy, concurrency=1).ask(questions(200)))


def test_what_is_recorded_needs_no_teacher(proxy, file):
    first = by_key(recorded(proxy, file).ask(questions(9)))
    before = proxy.connections
    again = recorded(proxy, file, key_variable='NO_SUCH_KEY')
    assert by_key(again.ask(questions(9))) == first
    assert again.tally.asked == 0
    assert proxy.connections == before


def test_asks_while_a_loop_is_running(proxy):
    async def notebook():
        return list(server(proxy).ask(questions(3)))
    assert len(asyncio.run(notebook())) == 3


def test_never_more_under_way_than_allowed_and_requests_are_taken_lazily(proxy):
    taken = []

    def requests():
        for request in questions(40):
            taken.append(request)
            yield request

    answers = server(proxy, concurrency=4).ask(requests())
    ahead = [len(taken) - given for given, _ in enumerate(answers)]
    assert max(ahead) <= 5
    assert len(taken) == 40


def test_retry_after_is_honoured():
    with Proxy(fault=at_first('429'), retry_after='1') as proxy:
        assert len(list(server(proxy).ask(questions(1)))) == 1
        first, second = proxy.times
    assert .99 < second - first < 3


def test_a_server_that_wants_us_back_much_later_is_not_waited_for():
    with Proxy(fault=always('429'), retry_after='90000') as proxy:
        assert 'Retry-After: 90000' in fails(server(proxy))
        assert len(proxy.seen) == 1


def test_waits_grow_and_then_it_gives_up():
    with Proxy(fault=always('500')) as proxy:
        message = fails(server(proxy, max_retries=2))
        first, second, third = proxy.times
    assert 'question 0' in message
    assert '3 times' in message
    assert '500' in message
    assert .3 < second - first < third - second


def test_silence_is_tried_again():
    def asleep(*args):
        time.sleep(.8)
        return parrot(*args)
    with Proxy(asleep) as proxy:
        assert 'silent for 0.2 s' in fails(server(proxy, max_retries=1, timeout=.2))
        assert len(proxy.seen) == 2


def test_nobody_there():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    message = fails(Server(f'http://127.0.0.1:{port}/v1', 'parrot', max_retries=1))
    assert f'127.0.0.1:{port}' in message
    assert '2 times' in message
    assert 'is it up' in message


@pytest.mark.parametrize('reply, words', [
    ((404, JSON, '{"error": {"message": "no model"}}'), "no model 'pigeon'; it has 'parrot', 'crow'"),
    ((401, JSON, '{"error": {"message": "key sk-secret is wrong"}}'),
     "does not accept the key; key_variable='TEST_KEY'"),
    ((400, JSON, '{"error": {"message": "prompt of 9000 tokens is too long"}}'), "'question 0': Error code: 400"),
    ((200, {'content-type': 'text/html'}, '<html>Welcome</html>'), '<html>Welcome</html>')])
def test_what_will_not_pass_is_an_error_at_once(monkeypatch, reply, words):
    def answer(method, *rest):
        return parrot(method, *rest) if method == 'GET' else reply
    monkeypatch.setenv('TEST_KEY', 'sk-secret')
    with Proxy(answer) as proxy:
        message = fails(Server(proxy.url, 'pigeon', 'TEST_KEY'))
        assert words in message
        assert 'sk-secret' not in message
        assert len(proxy.seen) == 1
        assert {headers['authorization'] for headers in proxy.headers} == {'Bearer sk-secret'}


def test_an_address_without_v1_is_said():
    with Proxy(lambda *args: (404, {'content-type': 'text/html'}, '<h1>Not Found</h1>')) as proxy:
        assert 'end in /v1' in fails(server(proxy))


def test_a_key_without_value_is_said(proxy, monkeypatch):
    monkeypatch.delenv('TEST_KEY', raising=False)
    assert 'TEST_KEY is not set' in fails(Server(proxy.url, 'parrot', 'TEST_KEY'))
    assert proxy.connections == 0


@pytest.mark.parametrize('nonsense', [
    '{"choices": [', '[1]', '{"choices": []}', '{"choices": [{"message": null}]}', '{"error": "busy"}'])
def test_an_answer_that_is_none_is_said(nonsense):
    with Proxy(lambda *args: (200, JSON, nonsense)) as proxy:
        message = fails(server(proxy))
        assert "the answer to request 'question 0' cannot be read" in message
        assert len(message.splitlines()) == 1
        assert len(proxy.seen) == 1


def test_after_nonsense_the_next_run_goes_on(file):
    def answer(*args):
        return (200, JSON, '{"choices": []}') if len(proxy.seen) == 3 else parrot(*args)
    with Proxy(answer) as proxy:
        assert 'cannot be read' in fails(recorded(proxy, file, concurrency=1), questions(5))
        got = by_key(recorded(proxy, file).ask(questions(5)))
        assert [reply.text for _, reply in got] == [f'question {i} (seed 0)' for i in range(5)]
        assert len(proxy.seen) == 6


ODD_TEXTS = dict(empty=None, cut='half a sent', long='räksmörgås 𝛼\u2028\r\n'*400_000, odd='a\x00b\ud800c')


@pytest.fixture
def oddities():
    "A server whose answers are hard to keep."
    def answer(method, path, body, headers):
        what = json.loads(body)['messages'][0]['content']
        return said(ODD_TEXTS[what], 'length' if what == 'cut' else 'stop', model='parrot-2')
    with Proxy(answer) as proxy:
        yield proxy


def test_answers_are_kept_as_they_came(oddities, file):
    requests = [ask_for(name) for name in ODD_TEXTS]
    got = dict(by_key(recorded(oddities, file).ask(requests)))
    assert got['empty'] == Reply('', 3, 1, 'stop', 'parrot-2')
    assert got['cut'].finish == 'length'
    assert got['long'].text == ODD_TEXTS['long']
    assert got['odd'].text == 'a\x00b?c'
    assert dict(by_key(Replay(file).ask(requests))) == got


def test_what_is_handed_out_is_counted(oddities, file):
    teacher = Recorded(server(oddities), file, price=(1., 2.))
    list(teacher.ask([ask_for(name) for name in ODD_TEXTS]))
    tally = teacher.tally
    assert tally.answers == 4
    assert tally.prompt_tokens == 12
    assert cost(teacher) == pytest.approx((tally.prompt_tokens + 2*tally.completion_tokens)/1e6)
    assert cost(recorded(oddities, file)) is None


def test_usage_may_be_missing():
    with Proxy(lambda *args: (200, JSON, '{"choices": [{"message": {"content": "yes"}}]}')) as proxy:
        [(_, reply)] = server(proxy).ask(questions(1))
    assert reply == Reply('yes', 0, 0, '', 'parrot')


def test_digest_knows_all_that_decides_an_answer():
    base = ask_for('x')
    system = dict(role='system', content='x')
    settings = [dict(temperature=.6), dict(top_p=.9), dict(max_tokens=5), dict(seed=1)]
    sampled = [ask_for('x', **setting) for setting in settings]
    said = [ask_for('y'), Request('x', (system,)), Request('x', base.messages*2)]
    others = [*said, *sampled]
    digests = [request_digest('t', 'm', request) for request in (base, *others)]
    of_others = [request_digest('u', 'm', base), request_digest('t', 'n', base)]
    assert len({*digests, *of_others}) == 10


def test_digest_knows_neither_key_nor_case():
    renamed = ask_for('x', key='other', case=object())
    assert request_digest('t', 'm', ask_for('x')) == request_digest('t', 'm', renamed)


def test_digest_is_what_earlier_runs_kept_answers_under():
    request = Request('k', (dict(role='user', content='Sodium 121, then what?'),), seed=2**63 + 5)
    assert request_digest('gpt-4o', 'gpt-4o', request) == '3b0c34134bbcd26c8c2bd17405ede0c7'


# the record


def test_one_question_under_many_keys_is_asked_once(proxy, file):
    requests = [ask_for(f'q{i % 3}', key=f'k{i}') for i in range(30)]
    teacher = recorded(proxy, file)
    got = by_key(teacher.ask(requests))
    assert len(proxy.seen) == 3 == teacher.tally.asked
    assert [key for key, _ in got] == sorted(request.key for request in requests)
    assert all(reply.text.startswith(f'q{int(key[1:]) % 3} ') for key, reply in got)


def test_recorded_ones_may_stand_before_between_and_behind_those_that_are_asked(proxy, file):
    known = [ask_for(f'q{i % 3}', key=f'k{i}') for i in range(30)]
    list(recorded(proxy, file).ask(known))
    mixed = [*known, *questions(5), *known]
    got = by_key(recorded(proxy, file).ask(mixed))
    assert [key for key, _ in got] == sorted(request.key for request in mixed)
    assert len(proxy.seen) == 8


def test_whatever_has_arrived_is_recorded_when_the_reader_leaves(proxy, file):
    answers = recorded(proxy, file, concurrency=8).ask(questions(50))
    next(answers)
    deadline = time.monotonic() + 10
    while sum(proxy.delivered.values()) < 8 and time.monotonic() < deadline:
        time.sleep(.01)
    time.sleep(.2)
    answers.close()
    assert len(lines(file)) == 8 == sum(proxy.delivered.values())
    asked = len(proxy.seen)
    assert len(list(recorded(proxy, file).ask(questions(50)))) == 50
    assert len(proxy.seen) - asked == 42


def test_an_error_does_not_cost_the_answers_before_it(file):
    def answer(method, path, body, headers):
        return (400, JSON, '{}') if b'question 30"' in body else parrot(method, path, body, headers)
    with Proxy(answer) as proxy:
        assert 'question 30' in fails(recorded(proxy, file, concurrency=4), questions(50))
    assert len(lines(file)) >= 27


def test_a_torn_last_line_is_dropped_wherever_it_is_torn(proxy, file, tmp_path):
    got = by_key(recorded(proxy, file).ask(questions(3)))
    content = file.read_bytes()
    last = content.rstrip().rindex(b'\n') + 1
    for cut in range(last, len(content), 37):
        torn = tmp_path/f'{cut}.jsonl'
        torn.write_bytes(content[:cut])
        teacher = recorded(proxy, torn)
        assert by_key(teacher.ask(questions(3))) == got
        assert teacher.tally.asked == 1
        assert len(lines(torn)) == 3


@pytest.mark.parametrize('fault', ['half a line', 'a list', 'no text'])
def test_a_bad_line_is_named(proxy, file, fault):
    list(recorded(proxy, file).ask(questions(3)))
    first, second, third = file.read_text().splitlines()
    textless = {name: value for name, value in json.loads(second).items() if name != 'text'}
    bad = {'half a line': '{"digest": ', 'a list': '[]', 'no text': json.dumps(textless)}[fault]
    file.write_text(f'{first}\n{bad}\n{third}\n')
    assert 'line 2' in fails(recorded(proxy, file))


@pytest.mark.parametrize('name', ['file/a.jsonl', 'folder.jsonl'])
def test_an_unwritable_record_is_found_out_before_anything_is_asked(proxy, tmp_path, name):
    (tmp_path/'file').write_text('')
    (tmp_path/'folder.jsonl').mkdir()
    assert 'cannot record' in fails(recorded(proxy, tmp_path/name))
    assert proxy.connections == 0


def test_two_runs_do_not_write_one_record(proxy, file):
    first = recorded(proxy, file).ask(questions(9))
    next(first)
    second = recorded(proxy, file)
    assert 'another run' in fails(second, [ask_for('new')])
    assert 'new' not in proxy.asked()
    first.close()
    assert len(list(second.ask([ask_for('new')]))) == 1


def test_replay_of_nothing_is_an_error(file):
    with pytest.raises(InferenceError, match='Recorded'):
        Replay(file)


def test_replay_names_what_it_does_not_hold(proxy, file):
    list(recorded(proxy, file).ask(questions(2)))
    assert "'question 2'" in fails(Replay(file), questions(3))
    assert 'question 0' in fails(Replay(file), questions(1, temperature=.7))


def test_replay_of_two_teachers_needs_a_name(proxy, file, tmp_path):
    first = by_key(recorded(proxy, file).ask(questions(2)))
    second = by_key(recorded(proxy, file, name='other').ask(questions(2)))
    with pytest.raises(InferenceError, match='other, parrot'):
        Replay(file)
    parrots, others = Replay(file, 'parrot'), Replay(file, 'other')
    assert by_key(parrots.ask(questions(2))) == first == second == by_key(others.ask(questions(2)))
    assert others.local
    assert Recorded(others, tmp_path/'b.jsonl').model == 'parrot'


def test_a_teacher_that_knows_of_no_record_is_recorded_too(file):
    class Plain:
        name, local = 'plain', True

        def ask(self, requests):
            for request in requests:
                yield request, Reply(request.case.upper(), 0, 0, 'stop', 'plain')

    asked = list(Recorded(Plain(), file).ask([ask_for('a', case='b')]))
    assert [reply.text for _, reply in asked] == ['B']
    assert list(Replay(file).ask([ask_for('a')])) == asked


# a process of its own: interrupted, and out of space


def test_interrupted_run_ends_and_keeps_what_came(proxy, file):
    process = start(url=proxy.url, model='parrot', file=str(file), n=2000)
    words = stopped(process, file, 50, signal.SIGINT)
    assert 'KeyboardInterrupt' in words
    lost = sum(proxy.delivered.values()) - len(lines(file))
    assert 0 <= lost <= 4  # those under way when the signal came
    resumed(proxy, file, 2000)


def test_interrupted_run_does_not_wait_for_a_silent_server(file):
    def silent_later(*args):
        if len(proxy.seen) > 8:
            time.sleep(60)
        return parrot(*args)
    with Proxy(silent_later) as proxy:
        process = start(url=proxy.url, model='parrot', file=str(file), n=20)
        assert 'KeyboardInterrupt' in stopped(process, file, 8, signal.SIGINT)  # which waits 20 seconds at most


def test_full_disk_ends_the_run_with_whole_lines(proxy, file):
    process = start(url=proxy.url, model='parrot', file=str(file), n=100, limit=5000)
    words = ended(process)
    assert 'InferenceError: cannot record answers' in words
    assert 'File too large' in words
    assert 10 < len(lines(file)) < 100
    assert file.read_bytes().endswith(b'}\n')
    resumed(proxy, file, 100)


# vLLM


def test_vllm_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, 'vllm', None)
    assert 'install vllm' in fails(Vllm('a/model'))


def test_vllm_is_local_and_named_after_its_model():
    teacher = Vllm('a/model')
    assert teacher.local
    assert teacher.name == 'model'
