"""Inference: sharing changes no number, every engine is asked the same, answers survive kills, and credentialed text stays here."""
import json, math, os, random, signal, subprocess, sys, textwrap, time
from dataclasses import replace
from zlib import crc32
import polars as pl, pytest, torch
from hypothesis import given, settings, strategies as st
from ehr_r1.inference.engines import (
    Engine, InferenceError, ServerEngine, Text, Transformers, VllmEngine, Yes, shared_prefixes, yes_no_tokens)
from ehr_r1.inference.asking import Ask, answer
from ehr_r1.evaluation.answers import asks_of, predictions_of
from ehr_r1.intervals import score_all
from ehr_r1.data.tasks import TASKS
from ehr_r1.inference.teachers import Refused, TeacherError
from ehr_r1.training.examples import Writer
from ehr_r1.inference.checkpoints import chat_text
from ehr_r1.training.models import new_model, train_tokenizer
from faulty_proxy import FAULTS, JSON, Proxy

# a model

EVENTS = [f'\n\n## Labs [21{20+i//12}-0{1+i%9}-1{i%7} 0{i%8}:{10+i}]\n- Sodium {120+i} mEq/L [133-145]\n- Glucose {70+3*i} mg/dL [70-100]' for i in range(40)]
PATIENTS = [f'## Patient\n- anchor_age {age}, gender {g}' for age in (41, 73) for g in 'FM']

def user(rng, task):
    "A record of one of four patients, often with the window of another one."
    begin, n = rng.choice((0, 9, 20)), rng.choice((1, 3, 4, 8))
    return rng.choice(PATIENTS) + ''.join(EVENTS[begin:begin+n]) + '\n' + TASKS[task].instruction

def samples(n=48, seed=0):
    rng, rows = random.Random(seed), []
    for i in range(n):
        task, family, label = (('Inpatient_Mortality', 'risk', ['yes']), ('labevents', 'decision', ['Sodium', 'Glucose']))[i % 2]
        messages = [dict(role='system', content='You are a helpful assistant.'), dict(role='user', content=user(rng, task))]
        rows.append(dict(sample_id=f's{i:03d}', task=task, subject_id=i//4, family=family, label=label, messages=messages))
    return pl.DataFrame(rows)

@pytest.fixture(scope='module')
def tokenizer():
    texts = [m[1]['content'] for m in samples()['messages'].to_list()]
    return train_tokenizer([*texts, *['yes', 'no', ' Yes', 'Sodium\nGlucose', 'You are a helpful assistant.']*200], 512)

@pytest.fixture(scope='module')
def model(tokenizer):
    "Random weights, larger than usual, so that probabilities and words differ from prompt to prompt."
    torch.set_num_threads(1)
    m = new_model('tiny', tokenizer, 0, 1024, copies=False)
    with torch.no_grad():
        for p in m.parameters():
            if p.dim() > 1: p.mul_(5)
        m.model.embed_tokens.weight[tokenizer.eos_token_id] *= 2.5 # so that some answers end
    return m

@pytest.fixture(scope='module')
def writer(tokenizer): return Writer(tokenizer, 700, 24)

@pytest.fixture(scope='module')
def asks(writer): return asks_of(samples(), writer, 'think')

@pytest.fixture(scope='module')
def folder(model, tokenizer, tmp_path_factory):
    f = tmp_path_factory.mktemp('tiny')
    model.save_pretrained(f); tokenizer.save_pretrained(f)
    return f

@pytest.fixture(scope='module')
def prompts(asks): return [a.prompt for a in asks]

# sharing

def test_sharing_and_batching_change_no_number_and_no_word(model, tokenizer, prompts):
    alone = Transformers(model, tokenizer, slots=1, share=False)
    assert all(len(b) == 1 for b in alone.plan(prompts))
    risks, texts = alone.p_yes(prompts), alone.generate(prompts, 12)
    assert len({round(r.p, 4) for r in risks}) > 20 and len({t.text for t in texts}) > 10 and {t.finish for t in texts} == {'stop', 'length'}
    for slots, share in ((2_000, True), (9_000, True), (100_000, True), (9_000, False)):
        e = Transformers(model, tokenizer, slots=slots, share=share)
        assert max(len(b) for b in e.plan(prompts)) > 2
        got = e.p_yes(prompts)
        assert max(abs(a.yes - b.yes) + abs(a.no - b.no) for a, b in zip(got, risks)) < 1e-5
        assert max(abs(a.p - b.p) for a, b in zip(got, risks)) < 1e-4
        assert [a.tokens for a in got] == [len(tokenizer.encode(p)) for p in prompts]
        assert e.generate(prompts, 12) == texts

def test_against_transformers_own_generate(model, tokenizer, prompts):
    for prompt, ours in zip(prompts[:8], Transformers(model, tokenizer).generate(prompts[:8], 12)):
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad(): out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:].tolist()
        ended = tokenizer.eos_token_id in out
        assert ours == Text(tokenizer.decode(out[:-1] if ended else out), ids.shape[1], len(out), 'stop' if ended else 'length')

def test_p_yes_is_the_softmax_over_the_whole_vocabulary(model, tokenizer, prompts):
    with torch.no_grad(): p = model(torch.tensor([tokenizer.encode(prompts[0])])).logits[0, -1].double().softmax(0)
    yes, no = [[i for i in range(len(tokenizer)) if tokenizer.decode([i]) in ways] for ways in (
        ('yes', 'Yes', 'YES', ' yes', ' Yes', ' YES'), ('no', 'No', 'NO', ' no', ' No', ' NO'))]
    assert yes_no_tokens(tokenizer) == (yes, no) and len(yes) > 1
    got, = Transformers(model, tokenizer).p_yes(prompts[:1])
    assert got.yes == pytest.approx(p[yes].sum().item(), rel=1e-5) and got.no == pytest.approx(p[no].sum().item(), rel=1e-5)
    assert got.p == got.yes/(got.yes + got.no) and got.outside == 0

def test_end_token_ends_a_row_and_not_its_neighbours(model, tokenizer, prompts):
    plain = Transformers(model, tokenizer).generate(prompts, 12)
    e = Transformers(model, tokenizer)
    for p in prompts[1:6:2]: # a word that stands fourth, somewhere else in other answers
        ids = torch.tensor([tokenizer.encode(p)])
        with torch.no_grad(): e.ends = e.ends | {model.generate(ids, max_new_tokens=4, do_sample=False)[0, -1].item()}
    got = e.generate(prompts, 12)
    stopped = [t for t in got if t.finish == 'stop']
    assert len(stopped) >= 3 and any(t.finish == 'length' for t in got) and len({t.new_tokens for t in stopped}) > 1
    assert all(a.text.startswith(b.text) for a, b in zip(plain, got) if '�' not in b.text)

def test_one_token_and_no_prompt(model, tokenizer, prompts):
    e = Transformers(model, tokenizer)
    assert [t.new_tokens for t in e.generate(prompts[:5], 1)] == [1]*5 and e.generate([], 5) == e.p_yes([]) == []
    with pytest.raises(InferenceError, match='empty prompt'): e.p_yes([''])

@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), max_size=12), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_groups_hold_every_prompt_once_and_what_they_say_they_share(rows, most):
    groups = shared_prefixes(rows, most, 1)
    assert sorted(i for _, g in groups for i in g) == list(range(len(rows)))
    for n, g in groups:
        assert len({tuple(rows[i][:n]) for i in g}) == 1 and n < min(len(rows[i]) for i in g)
        assert (n == 0) == (len(g) == 1) and (len(g) == 1 or len(g)*max(len(rows[i]) for i in g) <= most)

@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_no_other_cut_of_the_sorted_prompts_saves_more(rows):
    order = sorted(rows)
    def saved(part): return (len(part) - 1)*min(len(os.path.commonprefix(part)), min(map(len, part)) - 1)
    def best(i): return max((saved(order[i:j]) + best(j) for j in range(i+1, len(order)+1)), default=0)
    assert sum(n*(len(g) - 1) for n, g in shared_prefixes(rows, 10**9, 1)) == best(0)

def test_patients_prompts_stay_together_and_slots_are_kept(model, tokenizer, prompts):
    for slots in (1_500, 4_000, 20_000):
        e = Transformers(model, tokenizer, slots=slots)
        plan = e.plan(prompts, 10)
        assert sorted(i for b in plan for i in b) == list(range(len(prompts)))
        for b in plan:
            if len(b) > 1:
                ids = [tokenizer.encode(prompts[i]) for i in b]
                assert len(b)*max(map(len, ids)) <= slots

def test_a_tokenizer_without_yes_is_refused():
    class Letters:
        def encode(self, text, add_special_tokens): return [ord(c) for c in text]
    with pytest.raises(InferenceError, match="no token for 'yes'"): yes_no_tokens(Letters())

# asks

def test_risk_questions_are_never_asked_with_thinking(writer, tokenizer):
    for mode in ('plain', 'think', 'no_think'):
        made = asks_of(samples(), writer, mode)
        assert {a.mode for a in made if a.kind == 'decision'} == {mode}
        assert {a.mode for a in made if a.kind == 'risk'} == {'no_think' if mode == 'think' else mode}
        assert all(a.prompt.rstrip().endswith('</think>') == (a.mode != 'think') for a in made)
    s = samples().row(0, named=True)
    a, = asks_of(samples().head(1), writer, 'think')
    assert a.prompt == chat_text(tokenizer, s['messages'], 'no_think') and (a.sample_id, a.task, a.dropped) == ('s000', s['task'], 0)

def test_long_records_are_cut_and_counted(tokenizer):
    made = asks_of(samples(), Writer(tokenizer, 100, 24), 'plain')
    assert sum(a.dropped > 0 for a in made) > 5 and all(len(tokenizer.encode(a.prompt)) <= 100 for a in made)
    assert all('## Patient' in a.prompt and TASKS[a.task].instruction in a.prompt for a in made)

# answers

class Counting(Engine):
    "Answers at once, and remembers what it was asked."
    name, batch = 'counting', 8
    def __init__(self): self.asked = []
    def ask(self, prompts, max_tokens=0):
        for i, p in enumerate(prompts):
            self.asked.append(p)
            yield i, Text(f'Sodium\nline {len(p)}', 10, 5, 'stop') if max_tokens else Yes(.3, .1, 10)

def lines_in(file): return [json.loads(x) for x in file.read_bytes().splitlines()]

def test_answers_come_in_the_order_of_the_asks_and_make_predictions(asks, tmp_path):
    lines = answer(asks, Counting(), tmp_path/'a.jsonl', 24, access='open')
    assert [(x['sample_id'], x['task'], x['kind'], x['mode']) for x in lines] == [(a.sample_id, a.task, a.kind, a.mode) for a in asks]
    made = predictions_of(lines)
    assert set(made.filter(pl.col('task') == 'Inpatient_Mortality')['risk']) == {.3/(.3 + .1)} and made['fallback'].null_count() == len(made)
    scores = score_all(samples(), dict(counting=made), replicates=20)
    assert scores.filter((pl.col('metric') == 'f1') & (pl.col('task') == 'overall'))['value'][0] == .5 # one of two lines
    assert answer([], Counting(), tmp_path/'none.jsonl', 24, access='open') == [] and predictions_of([]).height == 0

def test_nothing_is_asked_twice_and_what_changed_is(asks, tmp_path):
    e, file = Counting(), tmp_path/'a.jsonl'
    first = answer(asks[:20], e, file, 24, access='open')
    assert answer(asks[:20], e, file, 24, access='open') == first and len(e.asked) == 20
    assert answer(asks, e, file, 24, access='open')[:20] == first and len(lines_in(file)) == len(asks)
    assert len(e.asked) <= len(asks) + e.batch # the batch of the last line
    before = len(e.asked)
    answer(asks, e, file, 25, access='open') # the longest answer changed, which is nothing to risk questions
    assert len(e.asked) == before + len([a for a in asks if a.kind == 'decision'])
    answer([replace(asks[0], prompt='another')], e, file, 24, access='open')
    assert e.asked[-1] == 'another'
    e.name = 'another'
    answer(asks[:1], e, file, 24, access='open')
    assert lines_in(file)[-1]['name'] == 'another'

@pytest.mark.parametrize('at', [0, 1, 700, 5_000, -1])
def test_a_torn_file_is_mended_to_the_same_bytes(model, tokenizer, asks, tmp_path, at):
    e, file = Transformers(model, tokenizer, slots=4_000), tmp_path/'a.jsonl'
    first = answer(asks[:20], e, file, 4, access='open')
    whole = file.read_bytes()
    file.write_bytes(whole[:at])
    assert answer(asks[:20], e, file, 4, access='open') == first and file.read_bytes() == whole

KILLED = textwrap.dedent('''
    import sys, time
    sys.path[:0] = sys.argv[3:]
    from test_inference import Counting, asks_for_a_kill
    from ehr_r1.evaluation.inference import answer
    class Slow(Counting):
        whole = sys.argv[2] == 'whole'
        def ask(self, prompts, max_tokens=0):
            for x in super().ask(prompts, max_tokens): time.sleep(.01); yield x
    answer(asks_for_a_kill(), Slow(), sys.argv[1], 24, access='open')
''')

def asks_for_a_kill(): return [Ask(f's{i}', 'labevents', i, 'decision', f'prompt {i}', 'plain') for i in range(100)]

@pytest.mark.parametrize('how', ['whole', 'one by one'])
def test_killed_and_resumed(tmp_path, how):
    file, asks = tmp_path/'a.jsonl', asks_for_a_kill()
    process = subprocess.Popen([sys.executable, '-c', KILLED, str(file), how, os.path.dirname(__file__)])
    while not (file.is_file() and file.read_bytes().count(b'\n') > 30): assert process.poll() is None; time.sleep(.01)
    process.send_signal(signal.SIGKILL); process.wait()
    kept = file.read_bytes().rpartition(b'\n')[0]
    had = kept.count(b'\n') + 1
    assert 30 < had < 100
    e = Counting(); e.whole = how == 'whole'
    answer(asks, e, file, 24, access='open')
    assert file.read_bytes().startswith(kept) and len({x['digest'] for x in lines_in(file)}) == 100 == len(lines_in(file))
    assert len(e.asked) == 100 - (had//8*8 if e.whole else had) # of a batch that is computed together all, else what lacked

def test_two_runs_do_not_write_one_file(asks, tmp_path):
    class Nosy(Counting):
        def ask(self, *args):
            with pytest.raises(TeacherError, match='another run'): answer(asks, Counting(), tmp_path/'a.jsonl', 24, access='open')
            yield from super().ask(*args)
    assert len(answer(asks, Nosy(), tmp_path/'a.jsonl', 24, access='open')) == len(asks)

@pytest.mark.parametrize('text, finish, status, lines', [
    ('<think>\nso\n</think>\n\nSodium\nGlucose', 'stop', 'answered', ['Sodium', 'Glucose']),
    ('Sodium', 'stop', 'answered', ['Sodium']), ('<think>\nso', 'length', 'unclosed', []), ('<think>\nso\n</think>\n\n', 'stop', 'empty', []),
    ('', 'length', 'empty', []), ('Sodium\nGlu', 'length', 'cut', ['Sodium', 'Glu']),
    ('<think>a</think>x<think>', 'stop', 'unclosed', []), ('\x00\u2028\r\n', 'stop', 'answered', ['\x00'])])
def test_status_of_an_answer(tmp_path, text, finish, status, lines):
    class Says(Counting):
        def ask(self, prompts, max_tokens=0): yield 0, Text(text, 3, 4, finish)
    line, = answer([Ask('a', 'labevents', 1, 'decision', 'p', 'think')], Says(), tmp_path/'a.jsonl', 9, access='open')
    assert line['status'] == status and line['text'] == text
    row = predictions_of([line]).row(0, named=True)
    assert row['answer'] == lines and row['fallback'] == (None if status == 'answered' else status) and row['risk'] is None

def test_broken_weights_are_an_error(model, tokenizer, asks, tmp_path):
    broken = new_model('tiny', tokenizer, 0, 1024)
    with torch.no_grad(): broken.model.norm.weight.fill_(float('nan'))
    with pytest.raises(InferenceError, match='NaN'): answer(asks[:1], Transformers(broken, tokenizer), tmp_path/'a.jsonl', 4, access='open')

def test_answers_are_kept_under_the_weights(model, tokenizer, folder):
    other = new_model('tiny', tokenizer, 1, 1024)
    assert Transformers(str(folder)).name == Transformers(model, tokenizer).name != Transformers(other, tokenizer).name
    one = VllmEngine(folder).name
    (folder/'model.safetensors').write_bytes((kept := (folder/'model.safetensors').read_bytes())[:-1] + bytes([kept[-1] ^ 1]))
    assert VllmEngine(folder).name != one
    (folder/'model.safetensors').write_bytes(kept)
    assert VllmEngine(folder).name == one

# servers

TOP = {'yes': math.log(.5), ' no': math.log(.2), 'no\n': math.log(.05), 'maybe': math.log(.1)}

def completion(method, path, body, headers):
    asked = json.loads(body)
    if 'logprobs' not in asked: choice = dict(index=0, text=f"Sodium\n{asked['prompt'][-4:]}", finish_reason='stop')
    else: choice = dict(index=0, text='yes', finish_reason='length', logprobs=dict(top_logprobs=[TOP]))
    usage = dict(prompt_tokens=len(asked['prompt']), completion_tokens=2, total_tokens=9)
    return 200, JSON, json.dumps(dict(id='1', object='text_completion', created=0, model='parrot', usage=usage, choices=[choice]))

def test_server_lists_some_tokens_and_the_rest_is_bounded():
    with Proxy(completion) as proxy:
        got, = ServerEngine(proxy.url, 'parrot').p_yes(['what?'])
        assert json.loads(proxy.seen[0]) == dict(model='parrot', prompt='what?', temperature=0., max_tokens=1, logprobs=20)
    assert (got.yes, got.no, got.tokens) == (pytest.approx(.5), pytest.approx(.2), 5)
    assert got.outside == pytest.approx(min(1 - .85, 10*.05)) and (.5/.85 < got.p < .65/.85)

def test_a_risk_that_no_server_listed_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), 'TOP', dict(maybe=-.1))
    with Proxy(completion) as proxy:
        line, = answer([Ask('a', 'Inpatient_Mortality', 1, 'risk', 'p', 'plain')], ServerEngine(proxy.url, 'parrot'), tmp_path/'a.jsonl', 9)
    assert line['status'] == 'unlisted' and predictions_of([line]).row(0, named=True) | dict(risk=None, fallback='unlisted') == predictions_of([line]).row(0, named=True)

def test_server_is_asked_with_token_ids_where_it_is_vllms(tokenizer):
    yes, no = yes_no_tokens(tokenizer)
    def exact(method, path, body, headers):
        top = {f'token_id:{i}': math.log(.1) for i in json.loads(body)['logprob_token_ids']} | {'token_id:0': math.log(.05)}
        reply = json.loads(completion(method, path, body, headers)[2])
        reply['choices'][0]['logprobs']['top_logprobs'] = [top]
        return 200, JSON, json.dumps(reply)
    with Proxy(exact) as proxy:
        got, = ServerEngine(proxy.url, 'parrot', tokenizer).p_yes(['yes'])
        assert json.loads(proxy.seen[0])['prompt'] == tokenizer.encode('yes') and got.outside == 0
        assert (got.yes, got.no) == (pytest.approx(.1*len(yes)), pytest.approx(.1*len(no)))
    with Proxy(completion) as proxy, pytest.raises(InferenceError, match='for vLLM only'):
        ServerEngine(proxy.url, 'parrot', tokenizer).p_yes(['yes'])

def test_faults_of_a_server_lose_and_double_nothing(asks, tmp_path):
    asks = list({a.prompt: a for a in asks}.values())[:24]
    with Proxy(completion, fault=lambda body, attempt: (*FAULTS, None)[crc32(body) % 5] if attempt == 0 else None) as proxy:
        lines = answer(asks, ServerEngine(proxy.url, 'parrot', concurrency=8), tmp_path/'a.jsonl', 9, access='open')
        assert len(proxy.faults) == 4 and set(proxy.delivered.values()) == {1} and len(lines_in(tmp_path/'a.jsonl')) == 24
        assert [x['text'] for x in lines if x['kind'] == 'decision'] == [f'Sodium\n{a.prompt[-4:]}' for a in asks if a.kind == 'decision']
        before = proxy.connections
        assert answer(asks, ServerEngine(proxy.url, 'parrot'), tmp_path/'a.jsonl', 9, access='open') == lines and proxy.connections == before

def test_answers_of_a_server_are_kept_until_it_fails(asks, tmp_path):
    def some(*args): return completion(*args) if len(proxy.seen) < 15 else (400, JSON, '{"error": {"message": "prompt too long"}}')
    decisions = [a for a in asks if a.kind == 'decision']
    with Proxy(some) as proxy, pytest.raises(InferenceError, match='prompt too long'):
        answer(decisions, ServerEngine(proxy.url, 'parrot', concurrency=2), tmp_path/'a.jsonl', 9, access='open')
    assert 12 <= len(lines_in(tmp_path/'a.jsonl')) <= 15

@pytest.mark.parametrize('reply, words', [
    ((404, JSON, '{"error": {"message": "Not Found"}}'), 'serve completions and the model'), ((200, {'content-type': 'text/html'}, '<html>'), 'no answer'),
    ((200, JSON, '{"choices": []}'), 'no answer'), ((302, {'location': 'http://evil.example/'}, ''), '302')])
def test_what_a_server_cannot_do_is_said(reply, words):
    with Proxy(lambda *args: reply) as proxy, pytest.raises(InferenceError, match=words):
        ServerEngine(proxy.url, 'parrot', tries=1).generate(['p'], 3)

def test_credentialed_text_goes_to_no_stranger(asks, tmp_path, monkeypatch):
    monkeypatch.delenv('EHR_R1_ALLOW', raising=False)
    stranger = ServerEngine('https://api.example.org/v1', 'big')
    with pytest.raises(Refused, match='nothing was sent'): answer(asks, stranger, tmp_path/'a.jsonl', 9)
    with pytest.raises(Refused, match='mimic-iv-3.1'): answer(asks, stranger, tmp_path/'a.jsonl', 9, 'mimic-iv-3.1', 'credentialed')
    monkeypatch.setenv('EHR_R1_ALLOW', 'mimic-iv-3.1@api.example.org')
    monkeypatch.setattr(ServerEngine, 'ask', lambda self, prompts, most=0: ((i, Yes(.1, .1, 1)) for i, _ in enumerate(prompts)))
    risks = [a for a in asks if a.kind == 'risk']
    assert len(answer(risks, stranger, tmp_path/'b.jsonl', 9, 'mimic-iv-3.1', 'credentialed')) == len(risks)
    with pytest.raises(Refused): answer(risks, stranger, tmp_path/'c.jsonl', 9, 'mimic-iv-2.2', 'credentialed')
    assert not (tmp_path/'a.jsonl').exists() and not (tmp_path/'c.jsonl').exists()

def test_vllm_missing_or_an_adapter_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'vllm', None)
    with pytest.raises(InferenceError, match='install vllm'): VllmEngine(folder).p_yes(['p'])
    (tmp_path/'adapter_config.json').write_text('{}')
    with pytest.raises(InferenceError, match='merge it'): VllmEngine(tmp_path)
