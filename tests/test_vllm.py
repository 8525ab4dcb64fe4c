"""vLLM, as a server and in a process: teachers and engines ask it, and it agrees with transformers. One model, one server, one engine."""
import importlib.util, json, os, signal, socket, subprocess, sys, textwrap, time
import psutil, pytest
from ehr_r1.inference.engines import InferenceError, ServerEngine, Transformers, yes_no_tokens
from ehr_r1.inference.asking import answer
from ehr_r1.evaluation.answers import predictions_of
from ehr_r1.inference.teachers import Recorded, Replay, Server
from faulty_proxy import Proxy, forward, some_faults
from test_inference import asks, folder, model, prompts, tokenizer, writer # fixtures
from test_teachers import ask_for, by_key, fails, lines, questions, resumed, start, stopped

pytestmark = pytest.mark.skipif(importlib.util.find_spec('vllm') is None, reason='vLLM is not installed')
VLLM = {**os.environ, 'VLLM_CPU_KVCACHE_SPACE': '1', 'HF_HUB_OFFLINE': '1', 'VLLM_NO_USAGE_STATS': '1', 'TQDM_DISABLE': '1'}

@pytest.fixture(scope='module')
def vllm_server(folder):
    "Address of vLLM's own server on the CPU."
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
    log = open(folder.parent/'server.log', 'w+')
    began = time.monotonic()
    command = [sys.executable, '-m', 'vllm.entrypoints.openai.api_server', '--model', str(folder), '--served-model-name', 'tiny',
               '--host', '127.0.0.1', '--port', str(port), '--max-model-len', '1024', '--dtype', 'float32', '--enforce-eager',
               '--generation-config', 'vllm'] # the command `vllm` of vllm-cpu looks for a package named vllm and ends
    process = subprocess.Popen(command, stdout=log, stderr=log, env=VLLM, start_new_session=True)
    try:
        while True:
            log.seek(0); said = log.read()[-2000:]
            assert process.poll() is None, f'the server ended: {said}'
            assert time.monotonic() - began < 240, f'the server does not start: {said}'
            with socket.socket() as s:
                if s.connect_ex(('127.0.0.1', port)) == 0: break
            time.sleep(.5)
        print(f'vLLM server up after {time.monotonic() - began:.0f} s')
        yield f'http://127.0.0.1:{port}/v1'
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []
        os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(10)
        except subprocess.TimeoutExpired: pass
        for p in family:
            try: p.kill()
            except (psutil.NoSuchProcess, ProcessLookupError): pass
        process.wait(10); log.close()

# teachers

def test_vllm_server_behind_a_faulty_proxy(vllm_server, tmp_path):
    requests = questions(200, max_tokens=16)
    with Proxy(forward(vllm_server), fault=some_faults) as proxy:
        teacher = Recorded(Server(proxy.url, 'tiny', concurrency=16, pause=.05), tmp_path/'a.jsonl')
        began = time.monotonic()
        got = by_key(teacher.ask(requests))
        seconds = time.monotonic() - began
        print(f'{200/seconds:.0f} requests/s, {teacher.completion_tokens/seconds:.0f} tokens/s through {dict(proxy.faults)}')
        assert set(proxy.faults) == {'429', '500', 'drop', 'half'} and min(proxy.faults.values()) > 10
        assert [k for k, _ in got] == sorted(r.key for r in requests)
        assert set(proxy.delivered.values()) == {1} and len(proxy.delivered) == 200
        assert len({x['digest'] for x in lines(tmp_path/'a.jsonl')}) == 200 == len(lines(tmp_path/'a.jsonl'))
        assert all(a.teacher == 'tiny' and a.prompt_tokens > 5 and 0 < a.completion_tokens <= 16 for _, a in got)
        assert {a.finish for _, a in got} <= {'stop', 'length'} and len({a.text for _, a in got}) > 100
        assert any(a.finish == 'length' and a.completion_tokens == 16 for _, a in got)
        before = proxy.connections
        again = Recorded(Server(proxy.url, 'tiny'), tmp_path/'a.jsonl')
        assert by_key(again.ask(requests)) == got == by_key(Replay(tmp_path/'a.jsonl').ask(requests))
        assert again.asked == 0 and proxy.connections == before

def test_killed_and_resumed_with_vllm(vllm_server, tmp_path):
    with Proxy(forward(vllm_server), fault=some_faults) as proxy:
        file = tmp_path/'a.jsonl'
        stopped(start(url=proxy.url, model='tiny', file=str(file), n=200), file, 60, signal.SIGKILL)
        assert 60 <= len(resumed(proxy, file, 200, 'tiny')) < 200

def test_vllm_server_says_what_is_wrong(vllm_server):
    assert "it has 'tiny'" in fails(Server(vllm_server, 'huge'))
    assert 'end in /v1' in fails(Server(vllm_server.removesuffix('/v1'), 'tiny'))
    assert "'long'" in (message := fails(Server(vllm_server, 'tiny'), [ask_for('word '*1200, key='long')])) and '1024' in message

# one engine in a process of its own, for teachers and for inference

IN_PROCESS = textwrap.dedent('''
    import json, sys
    import vllm
    from ehr_r1.evaluation.engines import VllmEngine
    from ehr_r1.synthesis.teachers import Recorded, Request, TeacherError, Vllm
    folder, asked, file = sys.argv[1:]
    how, real, made = dict(max_model_len=1024, enforce_eager=True, dtype='float32'), vllm.LLM, []
    def once(**settings): # starting takes most of a minute
        if not made: made.append(real(**settings))
        return made[0]
    vllm.LLM = once
    prompts, greedy = json.load(open(asked)), dict(temperature=0., max_tokens=16)
    e = VllmEngine(folder, batch=20, **how)
    risks = [(y.yes, y.no, y.p, y.tokens, y.outside) for y in e.p_yes(prompts)]
    texts = [(t.text, t.tokens, t.new_tokens, t.finish) for t in e.generate(prompts, 12)]
    requests = [Request(f'{i}', (dict(role='user', content=f'question {i}'),), **greedy) for i in range(40)]
    here = Recorded(Vllm(folder, 'here', batch=16, **how), file)
    first, again = dict((r.key, a) for r, a in here.ask(requests)), dict((r.key, a) for r, a in here.ask(requests))
    assert first == again and here.asked == 40 and {a.teacher for a in first.values()} == {'here'} and len(made) == 1
    try: list(here.ask([Request('long', (dict(role='user', content='word '*1200),))]))
    except TeacherError as e: assert 'long' in str(e) and '1024' in str(e)
    else: raise AssertionError('a prompt that is too long was answered')
    said = {k: (a.text, a.finish, a.prompt_tokens, a.completion_tokens) for k, a in first.items()}
    json.dump(dict(risks=risks, texts=texts, said=said), open(asked, 'w'))
''')

@pytest.fixture(scope='module')
def in_process(folder, prompts, tmp_path_factory):
    "What vLLM in a process says to the prompts and to 40 requests of a teacher."
    d = tmp_path_factory.mktemp('process')
    (d/'asked.json').write_text(json.dumps(prompts))
    command = [sys.executable, '-c', IN_PROCESS, str(folder), str(d/'asked.json'), str(d/'a.jsonl')]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=VLLM | {'VLLM_ENABLE_V1_MULTIPROCESSING': '0'})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((d/'asked.json').read_text())

def test_vllm_in_the_process_answers_a_teacher_as_the_server_does(in_process, vllm_server):
    asked = [ask_for(f'question {i}', f'{i}', temperature=0., max_tokens=16) for i in range(40)]
    there = {r.key: [a.text, a.finish, a.prompt_tokens, a.completion_tokens] for r, a in Server(vllm_server, 'tiny').ask(asked)}
    same, texts = sum(in_process['said'][k] == v for k, v in there.items()), len({v[0] for v in there.values()})
    print(f'{same} of 40 answers the same, {texts} different ones')
    assert same >= 38 and texts > 10 # greedy; batches of another size may round another way

TOLERANCE = 1e-5 # of P(yes), float32, between engines

def agree(risks, texts, model, tokenizer, prompts):
    "Hold what an engine said against transformers."
    e = Transformers(model, tokenizer)
    ours = e.p_yes(prompts)
    gap = max(abs(a.p - p) for a, (_, _, p, _, _) in zip(ours, risks))
    mass = max(abs(a.yes - yes)/a.yes + abs(a.no - no)/a.no for a, (yes, no, *_) in zip(ours, risks))
    def whole(text): return text.rstrip('\ufffd') # a server may hold half a character back
    same = sum([whole(t.text), t.tokens, t.new_tokens, t.finish] == [whole(x[0]), *x[1:]] for t, x in zip(e.generate(prompts, 12), texts))
    print(f'P(yes) at most {gap:.0e} apart, masses {mass:.0e} of themselves; {same} of {len(texts)} texts the same')
    assert gap < TOLERANCE and mass < 1e-3 and len({round(a.p, 4) for a in ours}) > 20
    assert [a.tokens for a in ours] == [n for *_, n, _ in risks] and not any(outside for *_, outside in risks)
    assert same >= .95*len(texts) and len({t[0] for t in texts}) > 10 and {t[3] for t in texts} == {'stop', 'length'}

def test_vllm_and_transformers_agree(in_process, model, tokenizer, prompts):
    agree(in_process['risks'], in_process['texts'], model, tokenizer, prompts)

def test_vllms_server_and_transformers_agree(vllm_server, model, tokenizer, prompts):
    e = ServerEngine(vllm_server, 'tiny', tokenizer)
    risks = [(y.yes, y.no, y.p, y.tokens, y.outside) for y in e.p_yes(prompts)]
    agree(risks, [(t.text, t.tokens, t.new_tokens, t.finish) for t in e.generate(prompts, 12)], model, tokenizer, prompts)

def test_what_the_server_lists_bounds_the_rest(vllm_server, tokenizer, prompts):
    whole, some = ServerEngine(vllm_server, 'tiny', tokenizer).p_yes(prompts), ServerEngine(vllm_server, 'tiny').p_yes(prompts)
    print(sum(s.p is None for s in some), 'of', len(some), 'list neither yes nor no')
    for w, s in zip(whole, some):
        assert s.yes <= w.yes*1.001 and s.no <= w.no*1.001 and w.yes + w.no <= (s.yes + s.no + s.outside)*1.001

def test_answers_by_way_of_a_faulty_proxy(vllm_server, tokenizer, asks, tmp_path):
    with Proxy(forward(vllm_server), fault=some_faults) as proxy:
        made = answer(asks, ServerEngine(proxy.url, 'tiny', tokenizer), tmp_path/'a.jsonl', 12)
        assert len(proxy.faults) > 2 and len(lines(tmp_path/'a.jsonl')) == len(asks) == predictions_of(made).height

def test_a_server_says_what_is_wrong(vllm_server, tokenizer):
    for e, words in ((ServerEngine(vllm_server, 'huge'), "the model 'huge'"), (ServerEngine(vllm_server.removesuffix('/v1'), 'tiny'), 'end in /v1')):
        with pytest.raises(InferenceError, match=words): e.p_yes(['what?'])
    with pytest.raises(InferenceError, match='1024'): ServerEngine(vllm_server, 'tiny').generate(['word '*1200], 4)
