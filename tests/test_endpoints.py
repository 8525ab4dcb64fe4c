"""Endpoints: only this machine is local, and credentialed text goes to named hosts only."""
import socket

import psutil
import pytest
from faulty_proxy import Proxy
from teacher_runs import ended, fails, questions, server, start

from ehr_r1.inference.endpoints import InferenceError, allowed_endpoints, endpoint_of, guard
from ehr_r1.inference.recorded import Recorded
from ehr_r1.inference.servers import Server

HERE = ['http://127.0.0.1:8000/v1', 'http://localhost/v1', 'http://LOCALHOST:1/v1', 'https://[::1]:8443/v1',
        '127.9.9.9:80']
ELSEWHERE = ['http://0.0.0.0:8000/v1', 'http://[::]:8000/v1', 'http://10.0.0.1/v1', 'http://127.1/v1',
             'api.example.org:8443', 'http://localhost.example.org/v1', 'http://127.0.0.1.example.org/v1']
DOUBTFUL = ['127.0.0.1:8000/v1', 'httpserver:80', 'ftp://127.0.0.1/v1', 'http://me:secret@127.0.0.1/v1',
            'http://a b/', '', 'http://127.0.0.1\\@evil.example/v1',
            'http://127.0.0.1/v1?to=evil', 'http://127.0.0.1/v1\n']

# addresses


@pytest.mark.parametrize('address', HERE)
def test_loopback_is_local(address):
    assert endpoint_of(address).local


@pytest.mark.parametrize('address', ELSEWHERE)
def test_all_else_is_not_local(address):
    assert not endpoint_of(address).local


@pytest.mark.parametrize('address', DOUBTFUL)
def test_a_server_at_a_doubtful_address_is_refused(address):
    with pytest.raises(InferenceError):
        Server(address, 'parrot')


# who may be told what

FAR = Server('https://API.example.org/v1', 'x')
THE_SAME = ['https://api.example.org:443/v1', FAR, Recorded(FAR, 'a')]


@pytest.mark.parametrize('asked', THE_SAME, ids=['address', 'teacher', 'recorded teacher'])
def test_guard_lets_open_data_and_named_hosts_pass(asked):
    guard(asked, 'hospital', 'open', ())
    guard(asked, 'mimic-iv-3.1', 'credentialed', ('MIMIC-IV-3.1@api.example.org',))


@pytest.mark.parametrize('allowed', [
    (), ('mimic-iv-3.1@example.org',), ('mimic-iv@api.example.org',), ('*@api.example.org',)])
@pytest.mark.parametrize('asked', THE_SAME, ids=['address', 'teacher', 'recorded teacher'])
def test_guard_refuses_hosts_that_are_not_named_with_the_data(asked, allowed):
    with pytest.raises(PermissionError):
        guard(asked, 'mimic-iv-3.1', 'credentialed', allowed)


def test_guard_knows_two_kinds_of_access():
    with pytest.raises(ValueError, match='open or credentialed'):
        guard(FAR, 'mimic-iv-3.1', 'secret', ())


def test_allowed_endpoints_are_parted_by_commas(monkeypatch):
    monkeypatch.setenv('EHR_R1_ALLOW', ' a@b:1 ,, c@d ')
    assert allowed_endpoints() == ('a@b:1', 'c@d')


def test_a_permission_is_read_like_an_address(monkeypatch):
    monkeypatch.setenv('EHR_R1_ALLOW', 'a@https://B.org:443/v1, a@http://b.org:80/v1, a@http://localhost:8000')
    assert allowed_endpoints() == ('a@b.org', 'a@http://b.org', 'a@localhost:8000')


IN_THE_CLEAR = Server('http://api.example.org:443/v1', 'x')


@pytest.mark.parametrize('asked', [IN_THE_CLEAR, Recorded(IN_THE_CLEAR, 'a'), 'HTTP://api.example.org:443'])
def test_a_permission_for_a_host_is_none_for_plain_http(asked):
    with pytest.raises(PermissionError, match='http can be read on the way'):
        guard(asked, 'mimic', 'credentialed', ('mimic@api.example.org', 'mimic@api.example.org:443'))
    guard(asked, 'mimic', 'credentialed', ('mimic@http://api.example.org:443',))
    guard(asked, 'hospital', 'open', ())


@pytest.mark.parametrize('entry', ['api.example.org', 'a@', '@b', 'a@ftp://b', 'a@b?c'])
def test_a_permission_names_data_and_host(monkeypatch, entry):
    monkeypatch.setenv('EHR_R1_ALLOW', entry)
    with pytest.raises(InferenceError, match='EHR_R1_ALLOW'):
        allowed_endpoints()


# what really leaves


def what_is_said(stranger, file):
    "By a process that asks a server far away about credentialed data."
    process = start(url=stranger.url, model='parrot', file=str(file), n=3, dataset='mimic-iv-3.1')
    return ended(process)


@pytest.fixture(scope='module')
def outer():
    "An address of this machine that is not loopback; where there is none, the one that means all of them."
    nets = psutil.net_if_addrs().values()
    found = [about.address for net in nets for about in net if about.family == socket.AF_INET]
    return next((address for address in found if not address.startswith('127.')), '0.0.0.0')


@pytest.fixture
def stranger(outer):
    "A server that is not on this machine."
    with Proxy(host=outer) as proxy:
        yield proxy


@pytest.mark.parametrize('allow', [
    '', 'mimic-iv-2.2@http://{host}:{port}', 'mimic-iv-3.1@http://{host}', 'mimic-iv-3.1@127.0.0.1:{port}',
    'mimic-iv-3.1@{host}:{port}', 'mimic-iv-3.1@https://{host}:{port}'])
def test_credentialed_text_stays_here(stranger, outer, tmp_path, monkeypatch, allow):
    monkeypatch.setenv('EHR_R1_ALLOW', allow.format(host=outer, port=stranger.port))
    file = tmp_path/'a.jsonl'
    said = what_is_said(stranger, file)
    assert said.startswith('Refused: mimic-iv-3.1')
    assert f'EHR_R1_ALLOW=mimic-iv-3.1@http://{outer}:{stranger.port}' in said
    assert stranger.connections == 0
    assert not file.exists()


def test_credentialed_text_goes_to_a_named_host(stranger, outer, tmp_path, monkeypatch):
    monkeypatch.setenv('EHR_R1_ALLOW', f'other@example.org, mimic-iv-3.1@http://{outer}:{stranger.port}')
    assert what_is_said(stranger, tmp_path/'a.jsonl') == ''
    assert len(stranger.delivered) == 3


@pytest.mark.parametrize('status', [301, 302, 307, 308])
def test_redirects_are_not_followed(status):
    with Proxy() as stranger:
        headers = {'location': stranger.url + '/chat/completions'}
        with Proxy(lambda *args: (status, headers, '')) as proxy:
            assert stranger.url in fails(server(proxy))
            assert stranger.connections == 0
            assert len(proxy.seen) == 1


@pytest.fixture
def outside(monkeypatch):
    "A server that the environment names as the proxy to the world."
    for name in ('NO_PROXY', 'no_proxy'):
        monkeypatch.delenv(name, raising=False)
    with Proxy() as proxy:
        for name in ('HTTP_PROXY', 'http_proxy', 'ALL_PROXY'):
            monkeypatch.setenv(name, f'http://127.0.0.1:{proxy.port}')
        yield proxy


def test_this_machine_is_not_reached_through_a_proxy(outside):
    with Proxy() as here:
        assert len(list(server(here).ask(questions(2)))) == 2
    assert outside.connections == 0


def test_others_are_reached_through_a_proxy(outside):
    far = Server('http://teacher.invalid/v1', 'parrot')
    assert len(list(far.ask(questions(2)))) == 2
    assert len(outside.seen) == 2
