"Questions as jobs: what is begun is waited for, what was answered is kept, and nothing is paid for twice."
import json

import pytest
from faulty_proxy import JSON, Proxy
from job_office import Office
from teacher_runs import by_key, fails, questions

from ehr_r1.inference.batches import Batch, jobs_of
from ehr_r1.inference.endpoints import InferenceError
from ehr_r1.inference.recorded import Recorded


def teacher(proxy, folder, **more):
    return Batch(proxy.url, 'parrot', '', folder, every=.01, **more)


def test_answers_come_to_who_asked(tmp_path):
    with Proxy(office := Office()) as proxy:
        got = by_key(teacher(proxy, tmp_path, most=4).ask(questions(10)))
    assert [len(office.files[job]) for job in office.jobs] == [4, 4, 2]
    assert [(key, reply.text) for key, reply in got] == [(f'question {i}', f'question {i}') for i in range(10)]
    assert not list(tmp_path.iterdir())


def test_a_job_that_was_begun_is_waited_for_and_not_begun_again(tmp_path):
    class Impatient(Batch):
        def send(self, what, *args):
            if what.startswith('how job') and office.seen:
                raise KeyboardInterrupt
            return super().send(what, *args)

    with Proxy(office := Office(looks=3)) as proxy:
        with pytest.raises(KeyboardInterrupt):
            list(Impatient(proxy.url, 'parrot', '', tmp_path, every=.01).ask(questions(5)))
        assert len(list(tmp_path.iterdir())) == 1
        assert len(list(teacher(proxy, tmp_path).ask(questions(5)))) == 5
    assert len(office.jobs) == 1


def test_what_was_answered_is_kept_and_only_the_rest_is_asked_again(tmp_path):
    with Proxy(office := Office(answers=7, status='expired')) as proxy:
        recorded = Recorded(teacher(proxy, tmp_path/'jobs'), tmp_path/'a.jsonl')
        got = []
        with pytest.raises(InferenceError, match='ended as expired, 3 of 10 questions unanswered'):
            got.extend(recorded.ask(questions(10)))
        office.status = 'completed'
        again = Recorded(teacher(proxy, tmp_path/'jobs'), tmp_path/'a.jsonl')
        assert len(list(again.ask(questions(10)))) == 10
    assert [len(office.files[job]) for job in office.jobs] == [10, 3]
    assert again.tally.asked == 3


def test_a_job_that_fails_says_why_and_may_be_begun_again(tmp_path):
    def broke(method, path, body, headers):
        if method == 'GET' and '/batches/' in path:
            errors = dict(data=[dict(message='the file is no file')])
            return office.says(id='questions-0', status='failed', errors=errors)
        return office(method, path, body, headers)

    office = Office()
    with Proxy(broke) as proxy:
        assert 'the file is no file' in fails(teacher(proxy, tmp_path))
        assert 'the file is no file' in fails(teacher(proxy, tmp_path))
    assert len(office.jobs) == 2


@pytest.mark.parametrize('fault', ['429', '500', 'drop'])
def test_faults_of_the_line_are_tried_again(fault, tmp_path):
    faults = iter([fault, None, fault])  # by turns, for the parts of an upload are divided differently each time
    with Proxy(Office(), fault=lambda *_: next(faults, None)) as proxy:
        assert len(list(teacher(proxy, tmp_path).ask(questions(3)))) == 3


def test_a_server_without_jobs_is_told(tmp_path):
    with Proxy(lambda *_: (404, JSON, '{"error": {"message": "no such thing"}}')) as proxy:
        assert 'takes no such requests' in fails(teacher(proxy, tmp_path))
    assert not list(tmp_path.iterdir())


def test_jobs_hold_no_more_bytes_than_a_server_takes(monkeypatch):
    monkeypatch.setattr('ehr_r1.inference.batches.BYTES', 1_000)
    jobs = list(jobs_of(questions(20), 'parrot'))
    assert sum(len(job) for job, _ in jobs) == 20
    assert len(jobs) > 3
    assert all(len(text) <= 1_000 for _, text in jobs)
    assert all(json.loads(text.split('\n')[0])['custom_id'] == '0' for _, text in jobs)
