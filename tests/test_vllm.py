"""vLLM, as a server and in a process: teachers and engines ask it, and it agrees with transformers."""
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import astuple

import psutil
import pytest
from faulty_proxy import Proxy, forward, some_faults
from teacher_runs import ask_for, assert_each_once, by_key, fails, lines, questions, resumed, start, stopped

from ehr_r1.evaluation.answers import predictions_of
from ehr_r1.inference.asking import answer
from ehr_r1.inference.endpoints import InferenceError
from ehr_r1.inference.engines import Text, Yes
from ehr_r1.inference.local import Transformers
from ehr_r1.inference.recorded import Recorded, Replay
from ehr_r1.inference.servers import Server, ServerEngine

pytest_plugins = ['tiny_model']  # model, tokenizer, folder, asks, prompts
pytestmark = pytest.mark.skipif(importlib.util.find_spec('vllm') is None, reason='vLLM is not installed')

QUIET = {'VLLM_CPU_KVCACHE_SPACE': '1', 'HF_HUB_OFFLINE': '1', 'VLLM_NO_USAGE_STATS': '1', 'TQDM_DISABLE': '1'}
VLLM = {**os.environ, **QUIET}

# one server for all tests


def server_command(folder, port):
    "Starts vLLM's server; the command `vllm` of vllm-cpu looks for a package named vllm and ends."
    program = [sys.executable, '-m', 'vllm.entrypoints.openai.api_server']
    model = ['--model', str(folder), '--served-model-name', 'tiny', '--max-model-len', '1024', '--dtype', 'float32']
    address = ['--host', '127.0.0.1', '--port', str(port)]
    return [*program, *model, *address, '--enforce-eager', '--generation-config', 'vllm']


def wait_for(process, port, log):
    "Until a server listens; an error if it ends before, or takes minutes."
    began = time.monotonic()
    while True:
        log.seek(0)
        said = log.read()[-2000:]
        assert process.poll() is None, f'the server ended: {said}'
        assert time.monotonic() - began < 240, f'the server does not start: {said}'
        with socket.socket() as probe:
            if probe.connect_ex(('127.0.0.1', port)) == 0:
                return
        time.sleep(.5)


def end(process):
    "End a server and all that it started."
    family = [process]
    if process.poll() is None:
        family += psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        pass
    for member in family:
        try:
            member.kill()
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass
    process.wait(10)


@pytest.fixture(scope='module')
def vllm_server(folder):
    "Address of vLLM's own server on the CPU."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    with open(folder.parent/'server.log', 'w+') as log:
        command = server_command(folder, port)
        process = subprocess.Popen(command, stdout=log, stderr=log, env=VLLM, start_new_session=True)
        try:
            wait_for(process, port, log)
            yield f'http://127.0.0.1:{port}/v1'
        finally:
            end(process)


@pytest.fixture
def faulty(vllm_server):
    "A proxy before it that fails now and then."
    with Proxy(forward(vllm_server), fault=some_faults) as proxy:
        yield proxy


# teachers


def test_vllm_server_behind_a_faulty_proxy(faulty, tmp_path):
    requests, file = questions(200, max_tokens=16), tmp_path/'a.jsonl'
    got = by_key(Recorded(Server(faulty.url, 'tiny'), file).ask(requests))
    assert set(faulty.faults) == {'429', '500', 'drop', 'half'}
    assert min(faulty.faults.values()) > 10
    assert set(faulty.delivered.values()) == {1}
    assert len(faulty.delivered) == 200
    assert_each_once(file, 200)
    assert [key for key, _ in got] == sorted(request.key for request in requests)

    replies = [reply for _, reply in got]
    assert {reply.teacher for reply in replies} == {'tiny'}
    assert {reply.finish for reply in replies} <= {'stop', 'length'}
    assert all(reply.prompt_tokens > 5 and 0 < reply.completion_tokens <= 16 for reply in replies)
    assert len({reply.text for reply in replies}) > 100
    assert any(reply.finish == 'length' and reply.completion_tokens == 16 for reply in replies)

    before = faulty.connections
    again = Recorded(Server(faulty.url, 'tiny'), file)
    assert by_key(again.ask(requests)) == got == by_key(Replay(file).ask(requests))
    assert again.tally.asked == 0
    assert faulty.connections == before


def test_killed_and_resumed_with_vllm(faulty, tmp_path):
    file = tmp_path/'a.jsonl'
    process = start(url=faulty.url, model='tiny', file=str(file), n=200)
    stopped(process, file, 60, signal.SIGKILL)
    assert 60 <= len(resumed(faulty, file, 200, 'tiny')) < 200


def test_vllm_server_says_what_is_wrong(vllm_server):
    assert "it has 'tiny'" in fails(Server(vllm_server, 'huge'))
    assert 'end in /v1' in fails(Server(vllm_server.removesuffix('/v1'), 'tiny'))


def test_vllm_server_says_what_is_too_long(vllm_server):
    message = fails(Server(vllm_server, 'tiny'), [ask_for('word '*1200, key='long')])
    assert "'long'" in message
    assert '1024' in message


# one engine in a process of its own, for teachers and for inference

IN_PROCESS = textwrap.dedent('''
    import json
    import sys
    from dataclasses import astuple
    import vllm
    from ehr_r1.inference.endpoints import InferenceError
    from ehr_r1.inference.recorded import Recorded
    from ehr_r1.inference.teachers import Request
    from ehr_r1.inference.vllm import Vllm, VllmEngine

    folder, asked, file = sys.argv[1:]
    settings = dict(max_model_len=1024, enforce_eager=True, dtype='float32')
    real, made = vllm.LLM, []

    def once(**settings):  # starting takes most of a minute
        if not made:
            made.append(real(**settings))
        return made[0]

    vllm.LLM = once
    prompts = json.load(open(asked))
    engine = VllmEngine(folder, batch=20, **settings)
    risks = [astuple(risk) for risk in engine.p_yes(prompts)]
    texts = [astuple(text) for text in engine.generate(prompts, 12)]

    def request(key, text):
        return Request(key, (dict(role='user', content=text),), temperature=0., max_tokens=16)

    requests = [request(f'{i}', f'question {i}') for i in range(40)]
    teacher = Recorded(Vllm(folder, 'here', batch=16, **settings), file)
    first, again = ({r.key: reply for r, reply in teacher.ask(requests)} for _ in range(2))
    assert first == again
    assert teacher.tally.asked == 40
    assert {reply.teacher for reply in first.values()} == {'here'}
    assert len(made) == 1
    try:
        list(teacher.ask([request('long', 'word '*1200)]))
    except InferenceError as e:
        assert 'long' in str(e) and '1024' in str(e)
    else:
        raise AssertionError('a prompt that is too long was answered')
    # more tokens than a step reads, drawn with seeds
    drawn = [Request(f'd{i}', (dict(role='user', content='word '*200),), temperature=.5, seed=i, max_tokens=8)
             for i in range(24)]
    one, two = ({r.key: reply.text for r, reply in Vllm(folder, 'here', batch=24, **settings).ask(drawn)} for _ in '12')
    assert one == two and len(set(one.values())) > 1
    said = {key: astuple(reply) for key, reply in first.items()}
    json.dump(dict(risks=risks, texts=texts, said=said), open(asked, 'w'))
''')


@pytest.fixture(scope='module')
def in_process(folder, prompts, tmp_path_factory):
    "What vLLM in a process says to the prompts and to 40 requests of a teacher."
    where = tmp_path_factory.mktemp('process')
    asked = where/'asked.json'
    asked.write_text(json.dumps(prompts))
    command = [sys.executable, '-c', IN_PROCESS, str(folder), str(asked), str(where/'a.jsonl')]
    alone = VLLM | {'VLLM_ENABLE_V1_MULTIPROCESSING': '0'}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(asked.read_text())


def test_vllm_in_the_process_answers_a_teacher_as_the_server_does(in_process, vllm_server):
    asked = [ask_for(f'question {i}', f'{i}', temperature=0., max_tokens=16) for i in range(40)]
    there = dict(by_key(Server(vllm_server, 'tiny').ask(asked)))
    here = in_process['said']
    same = [here[key][:4] == list(astuple(reply))[:4] for key, reply in there.items()]  # all but who said it
    assert sum(same) >= 38  # greedy; batches of another size may round another way
    assert len({reply.text for reply in there.values()}) > 10


# engines agree

TOLERANCE = 1e-5  # of P(yes), float32, between engines


@pytest.fixture(scope='module')
def ours(model, tokenizer):
    return Transformers(model, tokenizer)


def assert_same_risks(risks, ours):
    "What an engine thinks, held against transformers."
    assert len({round(risk.p, 4) for risk in ours}) > 20
    for theirs, mine in zip(risks, ours):
        assert abs(theirs.p - mine.p) < TOLERANCE
        of_yes = abs(theirs.yes - mine.yes)/mine.yes
        of_no = abs(theirs.no - mine.no)/mine.no
        assert of_yes + of_no < 1e-3
        assert theirs.tokens == mine.tokens
        assert theirs.outside == 0


def comparable(text):
    "A server may hold half a character back."
    return text.text.rstrip('\ufffd'), text.tokens, text.new_tokens, text.finish


def assert_same_texts(texts, ours):
    "What an engine writes, held against transformers."
    same = [comparable(theirs) == comparable(mine) for theirs, mine in zip(texts, ours)]
    assert sum(same) >= .95*len(texts)
    assert len({text.text for text in texts}) > 10
    assert {text.finish for text in texts} == {'stop', 'length'}


def test_vllm_and_transformers_agree(in_process, ours, prompts):
    assert_same_risks([Yes(*risk) for risk in in_process['risks']], ours.p_yes(prompts))
    assert_same_texts([Text(*text) for text in in_process['texts']], ours.generate(prompts, 12))


def test_vllms_server_and_transformers_agree(vllm_server, tokenizer, ours, prompts):
    engine = ServerEngine(vllm_server, 'tiny', tokenizer)
    assert_same_risks(engine.p_yes(prompts), ours.p_yes(prompts))
    assert_same_texts(engine.generate(prompts, 12), ours.generate(prompts, 12))


def test_what_the_server_lists_bounds_the_rest(vllm_server, tokenizer, prompts):
    whole = ServerEngine(vllm_server, 'tiny', tokenizer).p_yes(prompts)
    listed = ServerEngine(vllm_server, 'tiny').p_yes(prompts)
    for exact, some in zip(whole, listed):
        assert some.yes <= exact.yes*1.001
        assert some.no <= exact.no*1.001
        assert exact.yes + exact.no <= (some.yes + some.no + some.outside)*1.001


def test_answers_by_way_of_a_faulty_proxy(faulty, tokenizer, asks, tmp_path):
    file = tmp_path/'a.jsonl'
    made = answer(asks, ServerEngine(faulty.url, 'tiny', tokenizer), file, 12)
    assert len(faulty.faults) > 2
    assert len(lines(file)) == len(asks) == predictions_of(made).height


def test_a_server_says_what_is_wrong(vllm_server):
    with pytest.raises(InferenceError, match="no model 'huge'; it has 'tiny'"):
        ServerEngine(vllm_server, 'huge').p_yes(['what?'])
    with pytest.raises(InferenceError, match='end in /v1'):
        ServerEngine(vllm_server.removesuffix('/v1'), 'tiny').p_yes(['what?'])
    with pytest.raises(InferenceError, match='1024'):
        ServerEngine(vllm_server, 'tiny').generate(['word '*1200], 4)
